"""Memories of polynomial features: Based and ReBased in linear time, whose features are never written to memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fast import decay
from fast.kernels import features as kernels
from fast.operators import even, of_dtype, operator, packed, results
from fast.ratio import LEAST
from reference import recurrence as words
from reference.normal import ASKED, Normal
from reference.recurrence import Inputs, Row, with_one

POLYNOMIALS = {words.taylor: kernels.TAYLOR, words.squares: kernels.SQUARES}


class Polynomial(NamedTuple):
    """M_t = M_{t-1} + φ(k_t)ᵀ v_t, o_t = finish(φ(q_t) M_t). `counts`: a column of ones stands behind those of v, for
    the sum of weights. `least`: that sum, which starts from there, divides the other columns of o; or None."""

    q: Float[Tensor, "b t h k"]
    k: Float[Tensor, "b t h k"]
    v: Float[Tensor, "b t h v"]
    features: Callable[[Tensor], Tensor]
    counts: bool
    least: float | None
    finish: Callable[[Tensor], Tensor]


def has_form(row: Row) -> bool:
    mean = row.update is words.counted and row.read in LEAST
    summed = mean or (row.update in (words.outer, words.counted) and row.read is words.inclusive)
    return row.decay is words.keep and summed and row.features in POLYNOMIALS


def form(row: Row, x: Inputs) -> Polynomial:
    counts, least = row.update is words.counted, LEAST.get(row.read)
    return Polynomial(x["q"], x["k"], x["v"], row.features, counts, least, **ASKED[row.read](x))


def takes(x) -> bool:
    return isinstance(x, Polynomial)


def fits(title: str, x: Polynomial) -> None:
    """One line where there are too many channels."""
    size = x.k.shape[-1]
    if size > kernels.LARGEST:
        raise ValueError(
            f"{title}: queries and keys of {size} channels, fast kernels of their products take at most "
            f"{kernels.LARGEST}; use the backend 'reference'"
        )


def run(x: Polynomial, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    size, V, polynomial = x.k.shape[-1], x.v.shape[-1] + x.counts, POLYNOMIALS[x.features]
    ones, values, least = int(x.counts), -1, x.least or 0.0
    if x.least is not None:  # a second column of ones, for what the first one's gradient loses to 16 bits
        ones, values = ones + 1, V - 1
        memory = None if memory is None else torch.cat([memory, memory[..., -1:]], -1)
    q, k, v = even(x.q), even(x.k), with_ones(x.v, ones)
    memory = None if memory is None else even(memory)
    segments = kernels.segments_for(q, v, sequences)
    o, last, *_ = features(q, k, v, memory, cu_seqlens, size, polynomial, values, least, segments)
    return o[..., :V], last[..., :V]


def with_ones(v: Tensor, ones: int) -> Tensor:
    """v, so many columns of ones, and zeros up to a multiple of 16: one copy."""
    if ones == 0:
        return even(v)
    columns = torch.arange(ones + -(v.shape[-1] + ones) % 16, device=v.device)
    return torch.cat([v, (columns < ones).to(v.dtype).expand(*v.shape[:-1], -1)], -1)


def step(x: Polynomial, memory: Tensor) -> Tensor:
    """The features of one token are few: they are made, and the memory is one that does not fade."""
    q, k = (x.features(y[:, 0].float()).contiguous() for y in (x.q, x.k))
    v = with_one(x.v[:, 0]) if x.counts else x.v[:, 0].contiguous()
    return decay.step(Normal(q, k, v, None), memory)


# ------------------------------------------------------------------------------------- the operators, as torch sees


@operator("features")
def features(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    size: int,
    polynomial: int,
    values: int,
    least: float,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments, what was divided). `size`: columns of q and k before those
    filled in; `values`: columns of v before two of ones, whose sum of weights divides o, or -1: nothing is divided."""
    given, mean = packed(q, k, v, memory, cu_seqlens), values >= 0
    o, last, states = kernels.forward(*given, size, polynomial, segments, mean)
    return (kernels.quotient(o, values, least, v.dtype), last, states, o) if mean else (o, last, states, o.new_empty(0))


@features.register_fake
def _(q, k, v, memory, cu_seqlens, size, polynomial, values, least, segments):
    o, *others = results(q, v, cu_seqlens, segments, values >= 0, kernels.features(size, polynomial))
    return (v.new_empty(*v.shape[:3], values), *others, o) if values >= 0 else (o, *others, o.new_empty(0))


@operator("features_gradients")
def features_gradients(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    divided: Tensor,
    size: int,
    polynomial: int,
    least: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dmemory)."""
    do, dlast = packed(of_dtype(do, v.dtype), dlast)
    if divided.ndim > 1:
        do = kernels.quotient_gradients(do, divided, least)
    return kernels.backward(do, dlast, *packed(q, k, v, memory, cu_seqlens), states, size, polynomial)


@features_gradients.register_fake
def _(do, dlast, q, k, v, memory, cu_seqlens, states, divided, size, polynomial, least):
    _, dmemory, _ = results(q, v, cu_seqlens, 1, False, kernels.features(size, polynomial))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dmemory


def features_context(ctx, inputs, output) -> None:
    *given, ctx.size, ctx.polynomial, _, ctx.least, _ = inputs
    o, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *kept)
    ctx.like = o.shape


def features_backward(ctx, do, dlast, *_):
    given = ctx.saved_tensors
    do = given[2].new_zeros(ctx.like) if do is None else do
    *grads, dmemory = features_gradients(do, dlast, *given, ctx.size, ctx.polynomial, ctx.least)
    return *grads, dmemory if ctx.needs_input_grad[3] else None, *[None] * 6


features.register_autograd(features_backward, setup_context=features_context)
