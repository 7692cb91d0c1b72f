"""The seam: what a model is written against.

A model calls these functions and nothing else that depends on the machine. `reference.ops` computes them in plain
PyTorch, `fast.ops` in Triton kernels, and each kind of parallelism takes an `Ops` and returns an `Ops`, so the model
knows neither the backend nor the number of ranks.
"""

from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from reference import chunked, recurrence, span
from reference.attention import attention
from reference.head import token_losses
from reference.local import elu_plus_one, norm, running_sum, short_convolution, token_shift, unit
from reference.moe import by_expert, combined, experts, linears, taken
from reference.routers import top


def observed() -> bool:
    """Whether a compiler, or something else that must see every operator, looks on: such sees no closures."""
    return torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None


class Ops(NamedTuple):
    """One backend. Shapes are `b t ...`; with `cu_seqlens` b = 1 and states have a document each in place of b."""

    name: str
    recurrence: Callable  # (row, tokens, constants, memory, cu_seqlens) -> (o : b t h v, memory)
    span: Callable  # (row, tokens, constants, cu_seqlens) -> Span
    step: Callable  # (row, tokens of t = 1, constants, memory) -> (o, memory); may reuse the memory
    short_convolution: Callable  # (x : b t c, weight : c w, bias, activation, taps, cu_seqlens) -> (y, taps)
    token_shift: Callable  # (x : b t d, last : b d, cu_seqlens) -> (the token before each, last)
    running_sum: Callable  # (x : b t c, last : b c, cu_seqlens) -> (the sum up to each token, last), float64
    attention: Callable  # (q : b t h d, k : b t g d, v : b t g e, past, cu_seqlens, window, scale) -> (o, past)
    top: Callable  # (values : n e, k) -> n k, the columns of each row's largest; among equals the lowest
    by_expert: Callable  # (index : n k, kept : n k, experts) -> Sorted, where each pair stands if sorted by expert
    experts: Callable  # (x : n d, routing, w13 : e 2f d, w2 : e d f) -> y : n d
    taken: Callable  # (x : n d, place : n k, rows, gate : n k, dtype) -> p rows of d: at place_nk gate_nk x_n
    combined: Callable  # (rows : p d, place : n k, gate : n k, dtype) -> n d, the sum over k of gate_nk rows_{place_nk}
    linears: Callable  # (x : p i, groups, weights : o i each, biases) -> p o, each group's rows by its own map
    norm: Callable  # (x, weight, eps, gate, activation, dtype) -> RMS norm over the last axis
    unit: Callable  # (x, eps, scale) -> the last axis made as long as scale
    elu_plus_one: Callable  # (x, scale) -> (elu(x) + 1) scale
    token_losses: Callable  # (x : n d, head : vocabulary d, labels : n) -> cross entropy of each token, 0 where -100
    total: Callable  # (x) -> the sum of x over all ranks that share the batch
    kept: tuple[str, ...] = ()  # functions that this backend deliberately shares with `reference`
    one_way: Optional["Ops"] = None  # of ops that look both ways (`reference.bidirectional`): those they are made of
    cut: bool = False  # whether the sequence lies cut over ranks
    again: bool = False  # whether to run tokens again is less work than to add what a memory adds in plain PyTorch
    ends: span.Ends | None = None  # kernels that skip the outputs


ops = Ops(
    name="reference",
    recurrence=chunked.recurrence,
    span=chunked.span,
    step=recurrence.step,
    short_convolution=short_convolution,
    token_shift=token_shift,
    running_sum=running_sum,
    attention=attention,
    top=top,
    by_expert=by_expert,
    experts=experts,
    taken=taken,
    combined=combined,
    linears=linears,
    norm=norm,
    unit=unit,
    elu_plus_one=elu_plus_one,
    token_losses=token_losses,
    total=lambda x: x,
)

# The definition itself, token by token: slow, and what everything else is compared with.
exact = ops._replace(name="exact", recurrence=recurrence.recurrence, span=span.span)
