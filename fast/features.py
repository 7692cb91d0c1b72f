"""Memories of polynomial features: Based and ReBased in linear time, whose features are never written to memory."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fast import decay
from fast.kernels import features as kernels
from fast.operators import even, operator, packed, results
from reference import recurrence as words
from reference.normal import ASKED, WRITTEN, Normal
from reference.recurrence import Inputs, Row, with_one

POLYNOMIALS = {words.taylor: kernels.TAYLOR, words.squares: kernels.SQUARES}


class Polynomial(NamedTuple):
    """M_t = M_{t-1} + φ(k_t)ᵀ v_t, o_t = finish(φ(q_t) M_t). `counted`: the last column of v is ones."""

    q: Float[Tensor, "b t h k"]
    k: Float[Tensor, "b t h k"]
    v: Float[Tensor, "b t h v"]
    features: Callable[[Tensor], Tensor]
    counted: bool
    finish: Callable[[Tensor], Tensor]


def has_form(row: Row) -> bool:
    kept = row.decay is words.keep and row.update in (words.outer, words.counted)
    return kept and row.features in POLYNOMIALS and row.read in (words.inclusive, words.ratio, words.damped)


def form(row: Row, x: Inputs) -> Polynomial:
    v, counted = WRITTEN[row.update](x)["v"], row.update is words.counted
    return Polynomial(x["q"], x["k"], v, row.features, counted, **ASKED[row.read](x))


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
    size, V, polynomial = x.k.shape[-1], x.v.shape[-1], POLYNOMIALS[x.features]
    v, count = x.v, -1
    if x.counted and v.element_size() == 2:  # a second count, for what `split` adds
        v, count = with_one(v), V - 1
        memory = None if memory is None else torch.cat([memory, memory[..., -1:]], -1)
    q, k, v = even(x.q), even(x.k), even(v)
    memory = None if memory is None else even(memory)
    segments = kernels.segments_for(q, v, sequences)
    o, last, _ = features(q, k, v, memory, cu_seqlens, size, polynomial, count, segments, wide)
    return x.finish(o[..., :V]).to(x.q.dtype), last[..., :V]


def step(x: Polynomial, memory: Tensor) -> Tensor:
    """The features of one token are few: they are made, and the memory is one that does not fade."""
    q, k = (x.features(y[:, 0].float()).contiguous() for y in (x.q, x.k))
    return decay.step(Normal(q, k, x.v[:, 0].contiguous(), None), memory)


def split(do: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    """do in 16 bits; the count's, which nearly cancels what the values' columns give dq, in two: the second column of
    ones has what the first lost."""
    rounded = do.to(dtype)
    if count >= 0:
        rounded[..., count + 1] = do[..., count] - rounded[..., count]
    return rounded


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
    count: int,
    segments: int,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments). `size`: columns of q and k before those filled in; `count`:
    the first of two columns of v that are ones, or -1; `wide`: o in float32."""
    return kernels.forward(*packed(q, k, v, memory, cu_seqlens), size, polynomial, segments, wide)


@features.register_fake
def _(q, k, v, memory, cu_seqlens, size, polynomial, count, segments, wide):
    return results(q, v, cu_seqlens, segments, wide, kernels.features(size, polynomial))


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
    size: int,
    polynomial: int,
    count: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dmemory)."""
    do, dlast = packed(split(do.contiguous(), v.dtype, count), dlast)
    return kernels.backward(do, dlast, *packed(q, k, v, memory, cu_seqlens), states, size, polynomial)


@features_gradients.register_fake
def _(do, dlast, q, k, v, memory, cu_seqlens, states, size, polynomial, count):
    _, dmemory, _ = results(q, v, cu_seqlens, 1, False, kernels.features(size, polynomial))
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dmemory


def features_context(ctx, inputs, output) -> None:
    q, k, v, memory, cu_seqlens, ctx.size, ctx.polynomial, ctx.count, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, memory, cu_seqlens, output[2])


def features_backward(ctx, do, dlast, _):
    given = ctx.saved_tensors
    do = torch.zeros_like(given[2]) if do is None else do
    *grads, dmemory = features_gradients(do, dlast, *given, ctx.size, ctx.polynomial, ctx.count)
    return *grads, dmemory if ctx.needs_input_grad[3] else None, *[None] * 6


features.register_autograd(features_backward, setup_context=features_context)
