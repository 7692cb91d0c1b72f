"""Memories that fade by row and by column (gated fast weights), or by row as they turn (GateLoop: a complex memory)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fast.kernels import cross as kernels
from fast.operators import differentiated, of_dtype, operator, packed, small_enough
from reference import recurrence as words
from reference.recurrence import Inputs, Row

WORDS = ((words.cross, words.outer, words.inclusive), (words.rotating, words.real, words.above))


class Gated(NamedTuple):
    """M_t = e^{g_t} M_{t-1} e^{f_t} + k_tᵀ v_t, g for rows and f for columns; or e^{g_t + i θ_t} M_{t-1} + k_tᵀ v_t,
    M complex. o_t = Re(q_t M_t)."""

    q: Float[Tensor, "b t h k"]
    k: Float[Tensor, "b t h k"]
    v: Float[Tensor, "b t h v"]
    g: Float[Tensor, "b t h k"]
    f: Float[Tensor, "b t h v"] | None = None
    theta: Float[Tensor, "b t h k"] | None = None

    @staticmethod
    def finish(o: Tensor) -> Tensor:
        return o


def has_form(row: Row) -> bool:
    return row[:3] in WORDS


def form(row: Row, x: Inputs) -> Gated:
    return Gated(**{name: x[name] for name in Gated._fields if name in x})


def takes(x) -> bool:
    return isinstance(x, Gated)


def fits(title: str, x: Gated) -> None:
    small_enough(title, K=x.k.shape[-1], V=x.v.shape[-1])


def run(x: Gated, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    segments = kernels.segments_for(x.k, x.v, x.theta, sequences)
    return cross(*x, memory, cu_seqlens, segments, differentiated(*x, memory))[:2]


def step(x: Gated, memory: Tensor) -> Tensor:
    return cross_step(*(None if y is None else y[:, 0].contiguous() for y in x), memory)


# ------------------------------------------------------------------------------------- the operators, as torch sees


@operator("cross")
def cross(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    f: Tensor | None,
    theta: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, memories between segments, and with `keep` for the gradient: sums of g and of f, turns,
    o in float32, memories at the ends of stretches)."""
    return kernels.forward(*packed(q, k, v, g, f, theta, memory, cu_seqlens), segments, keep)


@cross.register_fake
def _(q, k, v, g, f, theta, memory, cu_seqlens, segments, keep):
    n, (b, t, h, V) = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, v.shape
    rows = kernels.memory_rows(k, theta)
    o, last = torch.empty_like(v), g.new_empty(n, h, rows, V)
    states = g.new_empty((n, h, segments + 1, rows, V) if segments > 1 else 0)
    if not keep:
        return o, last, states, *(g.new_empty(0) for _ in range(5))
    sums = (g.new_empty(0 if x is None else x.shape, dtype=kernels.sums_in(v)) for x in (g, f))
    turns = g.new_empty(0 if theta is None else (b, t, h, rows))
    wide = g.new_empty(0 if f is None else v.shape)
    return o, last, states, *sums, turns, wide, g.new_empty(kernels.marks_of(k, v, theta, cu_seqlens))


@operator("cross_gradients")
def cross_gradients(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    g_sums: Tensor,
    f_sums: Tensor,
    turns: Tensor,
    wide: Tensor,
    marks: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, df, dtheta, dmemory); df and dtheta are empty where there is no such gate."""
    do, dlast = packed(of_dtype(do, v.dtype), dlast)
    given = packed(q, k, v, memory, cu_seqlens)
    grads = kernels.backward(do, dlast, *given, states, g_sums, f_sums, turns, wide, marks)
    return tuple(marks.new_empty(0) if y is None else y for y in grads)


@cross_gradients.register_fake
def _(do, dlast, q, k, v, memory, cu_seqlens, states, g_sums, f_sums, turns, wide, marks):
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    dg, df = (torch.empty_like(x, dtype=torch.float32) for x in (g_sums, f_sums))
    dtheta = torch.empty_like(dg) if turns.numel() else turns.new_empty(0)
    return *(torch.empty_like(x) for x in (q, k, v)), dg, df, dtheta, marks.new_empty(n, *marks.shape[1:])


def cross_context(ctx, inputs, output) -> None:
    q, k, v, _, _, _, memory, cu_seqlens, _, keep = inputs
    if not keep:
        raise RuntimeError("the gradient by row and column needs what its forward pass kept: call it with keep = True")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, memory, cu_seqlens, *output[2:])


def cross_backward(ctx, do, dlast, *_):
    given = ctx.saved_tensors
    do = torch.zeros_like(given[2]) if do is None else do
    grads = cross_gradients(do, dlast, *given)
    return *(dy if want else None for dy, want in zip(grads, ctx.needs_input_grad[:7], strict=True)), None, None, None


cross.register_autograd(cross_backward, setup_context=cross_context)


@operator("cross_step", "memory")
def cross_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, f: Tensor | None, theta: Tensor | None, memory: Tensor
) -> Tensor:
    """o : b h v, in float32; memory is overwritten."""
    return kernels.step(q, k, v, g, f, theta, memory)


@cross_step.register_fake
def _(q, k, v, g, f, theta, memory):
    return torch.empty_like(v, dtype=torch.float32)
