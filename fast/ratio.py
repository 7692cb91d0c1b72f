"""Weighted means: a memory that does not fade, and the sum of the weights that it was read with (a normaliser)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fast import decay
from fast.kernels import decay as kernels
from fast.operators import even, of_dtype, operator, packed, results, small_enough
from reference import recurrence as words
from reference.normal import Normal
from reference.recurrence import Inputs, Row, over_count, with_one

LEAST = {words.ratio: 1e-10, words.damped: 1e-5}  # what the sum of the weights starts from


class Ratio(NamedTuple):
    """o_t = q_t M_t / (q_t N_t + least), M_t = M_{t-1} + k_tᵀ v_t, N_t = N_{t-1} + k_t. The memory is [M N]."""

    q: Float[Tensor, "b t h k"]
    k: Float[Tensor, "b t h k"]
    v: Float[Tensor, "b t h v"]
    least: float

    @staticmethod
    def finish(o: Tensor) -> Tensor:
        return o


def has_form(row: Row) -> bool:
    return row.decay is words.keep and row.update is words.counted and row.read in LEAST and row.features is None


def form(row: Row, x: Inputs) -> Ratio:
    return Ratio(x["q"], x["k"], x["v"], LEAST[row.read])


def takes(x) -> bool:
    return isinstance(x, Ratio)


def fits(title: str, x: Ratio) -> None:
    small_enough(title, K=x.k.shape[-1], V=x.v.shape[-1])


def run(x: Ratio, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    K, V = x.k.shape[-1], x.v.shape[-1]
    values = count = None
    if memory is not None:
        values = even(memory[..., :V], -K % 16).contiguous()
        count = even(memory[..., V]).contiguous()
    segments = kernels.segments_for(x.q, x.v, sequences)
    o, last, total, *_ = ratio(even(x.q), even(x.k), even(x.v), values, count, cu_seqlens, segments, x.least)
    return o[..., :V], torch.cat([last[..., :K, :V], total[..., :K, None]], -1)


def step(x: Ratio, memory: Tensor) -> Tensor:
    q, k, v = (y[:, 0].contiguous() for y in (x.q, x.k, with_one(x.v)))
    return over_count(decay.step(Normal(q, k, v, None), memory), x.least)


# ------------------------------------------------------------------------------------- the operators, as torch sees


@operator("ratio")
def ratio(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    least: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, the last N, the sums of weights, memories and Ns between segments)."""
    return kernels.ratio(*packed(q, k, v, memory, count, cu_seqlens), segments, least)


@ratio.register_fake
def _(q, k, v, memory, count, cu_seqlens, segments, least):
    o, last, states = results(q, v, cu_seqlens, segments, False)
    counts = states.new_empty(states.shape[:-1] if segments > 1 else 0)
    return o, last, last.new_empty(last.shape[:-1]), last.new_empty(q.shape[:3]), states, counts


@operator("ratio_gradients")
def ratio_gradients(
    do: Tensor,
    dlast: Tensor | None,
    dtotal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor | None,
    count: Tensor | None,
    cu_seqlens: Tensor | None,
    o: Tensor,
    weights: Tensor,
    states: Tensor,
    counts: Tensor,
    least: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dmemory, dcount)."""
    given = packed(of_dtype(do, v.dtype), dlast, dtotal, q, k, v, memory, count, cu_seqlens)
    return kernels.ratio_gradients(*given, o, weights, states, counts, least)


@ratio_gradients.register_fake
def _(do, dlast, dtotal, q, k, v, memory, count, cu_seqlens, o, weights, states, counts, least):
    _, dmemory, _ = results(q, v, cu_seqlens, 1, False)
    return *(torch.empty_like(y) for y in (q, k, v)), dmemory, dmemory.new_empty(dmemory.shape[:-1])


def ratio_context(ctx, inputs, output) -> None:
    *given, _, ctx.least = inputs
    o, _, _, *kept = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, o, *kept)


def ratio_backward(ctx, do, dlast, dtotal, *_):
    *given, o, weights, states, counts = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    grads = ratio_gradients(do, dlast, dtotal, *given, o, weights, states, counts, ctx.least)
    return *(x if want else None for x, want in zip(grads, ctx.needs_input_grad[:5], strict=True)), None, None, None


ratio.register_autograd(ratio_backward, setup_context=ratio_context)
