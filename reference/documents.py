"""Packed documents: several texts side by side in one row, told apart by their borders `cu_seqlens`.

Nothing may pass a border. What works on whole sequences (a recurrence, softmax attention) runs here over documents
of similar length as one padded batch; what looks back a few tokens asks how far its own document reaches back.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Documents(NamedTuple):
    """Which document each token belongs to, by numbers of which the host knows the largest. So layers that keep
    documents apart count them without a sort. Not every number needs a token, and they may stand in any order."""

    number: Int[Tensor, " n"]  # int64; 0 ... many - 1, rows of a batch one behind the other
    many: int


def numbered(names: Int[Tensor, " n"]) -> Documents:
    """The same documents with numbers 0, 1, ... in the order of their names, whatever those are. (`unique` tells the
    host how many there are, which would wait for the GPU: here there are at most as many as tokens.)"""
    ordered, order = names.sort(stable=True)
    ranks = torch.empty_like(order).scatter_(0, order, ordered.diff(prepend=ordered[:1]).ne(0).cumsum(0))
    return Documents(ranks, len(names))


def documents_of(cu_seqlens: Int[Tensor, " n1"], t: int) -> Documents:
    """Those of t tokens of one packed row, whose last border is t."""
    return Documents(document_of(cu_seqlens, t), len(cu_seqlens) - 1)


def document_of(cu_seqlens: Int[Tensor, " n1"], t: int) -> Int[Tensor, " t"]:
    """The document that each of t tokens belongs to, 0 ... n - 1. Empty documents have no token."""
    token = torch.arange(t, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return torch.searchsorted(cu_seqlens[1:], token, right=True)


def position_in_document(cu_seqlens: Int[Tensor, " n1"], t: int) -> Int[Tensor, " t"]:
    """How many tokens of its own document stand before each of t tokens."""
    token = torch.arange(t, device=cu_seqlens.device)
    return token - cu_seqlens[document_of(cu_seqlens, t)]


def end_to_end(cu_seqlens: Int[Tensor, "l n1"] | Int[Tensor, " n1"] | None) -> Int[Tensor, " ln1"] | None:
    """The borders of l lines of n documents each, one line behind the other, as the borders of l n documents.

    Each line ends where the next begins; both are counted from the start of the first.
    """
    if cu_seqlens is None or cu_seqlens.ndim == 1:
        return cu_seqlens
    return torch.cat([cu_seqlens[:, :-1].flatten(), cu_seqlens[-1, -1:]])


def batches(cu_seqlens: Int[Tensor, " n1"], padded: bool = True) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Documents grouped by length, so that padding at most doubles the work, whatever the lengths (or none is needed).

    Yields (documents : n, token : n l, valid : n l): which documents, where each of their tokens stands in the row
    (0 where there is none), and whether there is one. Empty documents are left out.
    """
    borders = cu_seqlens.long()
    start, length = borders[:-1], borders.diff()
    group = length.clamp(min=1).float().log2().ceil() if padded else length.float()
    group = torch.where(length > 0, group, -1.0)
    for value in group.unique().tolist():
        if value < 0:
            continue
        documents = (group == value).nonzero()[:, 0]
        offset = torch.arange(int(length[documents].max()), device=borders.device)
        valid = offset < length[documents, None]
        yield documents, torch.where(valid, start[documents, None] + offset, 0), valid


def over_documents(run: Callable, tokens: dict[str, Tensor], memory: Tensor, cu_seqlens: Tensor, padded: bool = True):
    """`run(tokens, memory) -> (o, memory)`, a function of whole sequences, for each document of a packed row.

    Padding is zeros: for most recurrences a token that neither decays, writes nor is read. Where it is not (padded
    False), only documents of the same length go together.
    """
    order, outputs, memories = [], [], memory.clone()
    for documents, token, valid in batches(cu_seqlens, padded):
        padded = {name: gather(x[0], token, valid) for name, x in tokens.items()}
        o, last = run(padded, memory[documents])
        outputs.append(o[valid])
        order.append(token[valid])
        memories = memories.index_copy(0, documents, last)
    if not outputs:
        v = tokens["v"]
        return v.new_zeros(v.shape), memories
    back = torch.cat(order).argsort()
    return torch.cat(outputs)[back][None], memories


def gather(x: Tensor, token: Int[Tensor, "n l"], valid: Tensor) -> Tensor:
    y = x[token]
    return y.masked_fill(~valid.reshape(valid.shape + (1,) * (y.ndim - 2)), 0)
