"""Memories that fade as a whole: no gate, one number a head, or one number a head and token."""

import torch
from torch import Tensor

from fast.kernels import decay as kernels
from fast.operators import by_columns, of_dtype, operator, packed, results
from reference.normal import Normal

WHOLE = 128


def takes(x: Normal) -> bool:
    """Whether the family computes this normal form; of gates the number of axes is all that counts."""
    return (x.g is None or x.g.ndim < 4) and all(y is None for y in (x.beta, x.a, x.b, x.f, x.u))


def run(x: Normal, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    """Columns of v beyond WHOLE on their own: the backward sweeps would hold all of them as 256."""
    V = x.v.shape[-1]

    def some(v: Tensor, M: Tensor | None) -> tuple[Tensor, Tensor]:
        return decay(x.q, x.k, v, x.g, M, cu_seqlens, kernels.segments_for(x.q, v, sequences), wide)[:2]

    return by_columns(some, x.v, memory, [WHOLE, V - WHOLE] if WHOLE < V < 2 * WHOLE else [V])


def step(x: Normal, memory: Tensor) -> Tensor:
    return decay_step(x.q, x.k, x.v, x.g, memory)


def span(x: Normal, cu_seqlens: Tensor | None, sequences: int) -> tuple[Tensor, list[Tensor]]:
    """(what the tokens leave of an empty memory, what `received` needs besides)."""
    return decay_end(x.k, x.v, x.g, cu_seqlens, kernels.segments_for(x.q, x.v, sequences), False), []


def received(x: Normal, do: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Tensor:
    """What the memory before the tokens receives from the cotangents of their outputs."""
    return decay_end(x.q, do, x.g, cu_seqlens, kernels.segments_for(x.q, x.v, sequences), True)


# ------------------------------------------------------------------------------------- the operators, as torch sees


@operator("decay_end")
def decay_end(y: Tensor, z: Tensor, g: Tensor | None, cu_seqlens: Tensor | None, segments: int, back: bool) -> Tensor:
    return kernels.end(*packed(y, z, g, cu_seqlens), segments, back)


@decay_end.register_fake
def _(y, z, g, cu_seqlens, segments, back):
    return results(y, z, cu_seqlens, 1, False)[1]


@operator("decay")
def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments). `wide`: o in float32."""
    return kernels.forward(*packed(q, k, v, g, memory, cu_seqlens), segments, wide)


@decay.register_fake
def _(q, k, v, g, memory, cu_seqlens, segments, wide):
    return results(q, v, cu_seqlens, segments, wide)


@operator("decay_gradients")
def decay_gradients(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    states: Tensor,
    want_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, dmemory); dg is empty unless wanted."""
    do, dlast = packed(of_dtype(do, v.dtype), dlast)
    q, k, v, g, memory, cu_seqlens = packed(q, k, v, g, memory, cu_seqlens)
    *grads, dg, dmemory = kernels.backward(do, dlast, q, k, v, g, memory, cu_seqlens, last, states, want_g)
    return *grads, last.new_empty(0) if dg is None else dg, dmemory


@decay_gradients.register_fake
def _(do, dlast, q, k, v, g, memory, cu_seqlens, last, states, want_g):
    dg = torch.empty_like(g) if want_g else last.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, torch.empty_like(last)


def decay_context(ctx, inputs, output) -> None:
    q, k, v, g, memory, cu_seqlens, _, _ = inputs
    _, last, states = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, memory, cu_seqlens, last, states)


def decay_backward(ctx, do, dlast, _):
    q, k, v, g, memory, cu_seqlens, last, states = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    want_g, want_memory = ctx.needs_input_grad[3:5]
    dq, dk, dv, dg, dmemory = decay_gradients(do, dlast, q, k, v, g, memory, cu_seqlens, last, states, want_g)
    return dq, dk, dv, dg if want_g else None, dmemory if want_memory else None, None, None, None


decay.register_autograd(decay_backward, setup_context=decay_context)


@operator("decay_step", "memory")
def decay_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, memory: Tensor) -> Tensor:
    """o : b h v, in float32; memory is overwritten."""
    return kernels.step(q, k, v, g, memory)


@decay_step.register_fake
def _(q, k, v, g, memory):
    return torch.empty_like(v, dtype=torch.float32)
