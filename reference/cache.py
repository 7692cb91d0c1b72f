"""What softmax attention keeps of a text: a row of tokens for each sequence, padded to the longest.

A cache is a named tuple of tensors `b s ...` and, as its last field, `length : b`: sequence i has `length[i]` tokens,
the rest of its row is padding. With packed documents a document stands in place of a sequence.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def fresh(kind: type, *parts: Tensor) -> tuple:
    """A cache of that kind that holds these tokens, b t ..., and nothing else."""
    b, t = parts[0].shape[:2]
    return kind(*parts, torch.full((b,), t, dtype=torch.int64, device=parts[0].device))


def joined(past: tuple | None, new: tuple) -> tuple:
    """Each sequence's new tokens (as many for all) behind its own last one."""
    if past is None:
        return new
    b, t = new[0].shape[:2]
    length = past.length + new.length
    room = max(int(length.max()) - past[0].shape[1], 0)
    at = past.length[:, None] + torch.arange(t, device=length.device)
    row = torch.arange(b, device=length.device)[:, None]
    grown = [padded(x, room).index_put((row, at), y) for x, y in zip(past[:-1], new[:-1], strict=True)]
    return type(past)(*grown, length)


def recent(cache: tuple, window: int | None) -> tuple:
    """Without the tokens that no later one will see: the last window - 1 stay (None: all).

    They are copied, so that the memory of the others is free.
    """
    if window is None or cache[0].shape[1] < window:
        return cache
    length = cache.length.clamp(max=window - 1)
    at = (cache.length - length)[:, None] + torch.arange(window - 1, device=length.device)
    row = torch.arange(len(length), device=length.device)[:, None]
    return type(cache)(*(x[row, at] for x in cache[:-1]), length)


def remember(past: tuple | None, new: tuple, cu_seqlens=None, window: int | None = None) -> tuple:
    """The cache after these tokens: what a later token can see of `past` and `new`, document by document."""
    if cu_seqlens is None:
        return recent(joined(past, new), window)
    caches = []
    for start, stop, own in by_document(past, cu_seqlens):
        text = fresh(type(new), *(x[:, start:stop] for x in new[:-1]))
        caches.append(remember(own, text, None, window))
    return stacked(caches)


def by_document(past: tuple | None, cu_seqlens) -> Iterator[tuple[int, int, tuple | None]]:
    """(start, stop, past) of each packed document."""
    for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
        yield start, stop, None if past is None else type(past)(*(x[i : i + 1] for x in past))


def stacked(caches: list[tuple]) -> tuple:
    """The caches of several documents as one, padded to the longest."""
    room = max(cache[0].shape[1] for cache in caches)
    *parts, lengths = zip(*caches, strict=True)
    held = [torch.cat([padded(x, room - x.shape[1]) for x in xs]) for xs in parts]
    return type(caches[0])(*held, torch.cat(lengths))


def padded(x: Tensor, room: int) -> Tensor:
    """x with `room` more places for tokens, of zeros."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, room)) if room else x
