"""Memories that fade channel by channel: one number a key channel and token; with or without a bonus.

Where k is None, keys are what gates leave room for, 1 - e^g: the kernels make them where they read gates.
"""

import torch
from torch import Tensor

from fast.kernels import channel as kernels
from fast.operators import differentiated, of_dtype, operator, packed, results
from reference.normal import Normal


def takes(x: Normal) -> bool:
    return x.g is not None and x.g.ndim == 4 and all(y is None for y in (x.beta, x.a, x.b, x.f))


def run(x: Normal, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    segments = kernels.segments_for(x.q, x.v, sequences)
    keep = differentiated(x.q, x.k, x.v, x.g, x.u, memory)
    return channel(x.q, x.k, x.v, x.g, x.u, memory, cu_seqlens, segments, wide, keep)[:2]


def step(x: Normal, memory: Tensor) -> Tensor:
    return channel_step(x.q, x.k, x.v, x.g, x.u, memory)


def span(x: Normal, cu_seqlens: Tensor | None, sequences: int) -> tuple[Tensor, list[Tensor]]:
    """(what the tokens leave of an empty memory, what `received` needs besides)."""
    segments = kernels.segments_for(x.q, x.v, sequences)
    return channel_end(x.q, x.k, x.v, x.g, x.u, cu_seqlens, segments, False), []


def received(x: Normal, do: Tensor, cu_seqlens: Tensor | None, sequences: int) -> Tensor:
    """What the memory before the tokens receives from the cotangents of their outputs."""
    segments = kernels.segments_for(x.q, x.v, sequences)
    return channel_end(x.q, x.k, do, x.g, x.u, cu_seqlens, segments, True)


# ------------------------------------------------------------------------------------- the operators, as torch sees


@operator("channel_end")
def channel_end(
    q: Tensor,
    k: Tensor | None,
    z: Tensor,
    g: Tensor,
    u: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    back: bool,
) -> Tensor:
    return kernels.end(*packed(q, k, z, g, u, cu_seqlens), segments, back)


@channel_end.register_fake
def _(q, k, z, g, u, cu_seqlens, segments, back):
    return results(q, z, cu_seqlens, 1, False)[1]


@operator("channel")
def channel(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    g: Tensor,
    u: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    wide: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, and of chunks: scores, queries faded to the start and keys to the end, how memories fade,
    the running sums of gates, the memory before each). `wide`: o in float32. `keep`: what the gradient needs is kept;
    without it there is none."""
    return kernels.forward(*packed(q, k, v, g, u, memory, cu_seqlens), segments, wide, keep)


@channel.register_fake
def _(q, k, v, g, u, memory, cu_seqlens, segments, wide, keep):
    o, last, _ = results(q, v, cu_seqlens, 1, wide)
    if not keep:
        return o, last, *(q.new_empty(0) for _ in range(6))
    places, h, K, V = kernels.memories(q, v, cu_seqlens)
    fades, sums, states = g.new_empty(places, h, K), torch.empty_like(g, dtype=kernels.sums_in(q)), (places, h, K, V)
    return o, last, kernels.scores_for(q), torch.empty_like(q), torch.empty_like(q), fades, sums, q.new_empty(states)


@operator("channel_gradients")
def channel_gradients(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    u: Tensor | None,
    cu_seqlens: Tensor | None,
    scores: Tensor,
    asked: Tensor,
    written: Tensor,
    fades: Tensor,
    sums: Tensor,
    states: Tensor,
    segments: int,
    want_g: bool,
    want_u: bool,
    tied: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, du, dmemory); dg and du are empty unless wanted. `tied`: k is g, dk is empty."""
    do, dlast = packed(of_dtype(do, v.dtype), dlast)
    given = packed(q, k, v, u, cu_seqlens)
    kept = (scores, asked, written, fades, sums, states)
    dq, dk, dv, dg, du, dmemory = kernels.backward(do, dlast, *given, *kept, segments, want_g, want_u, tied=tied)
    dk, dg, du = (fades.new_empty(0) if y is None else y for y in (dk, dg, du))
    return dq, dk, dv, dg, du, dmemory


@channel_gradients.register_fake
def _(do, dlast, q, k, v, u, cu_seqlens, scores, asked, written, fades, sums, states, segments, want_g, want_u, tied):
    dg = torch.empty_like(sums, dtype=torch.float32) if want_g else fades.new_empty(0)
    du = torch.empty_like(u) if want_u else fades.new_empty(0)
    _, dmemory, _ = results(q, v, cu_seqlens, 1, False)
    dk = fades.new_empty(0) if tied else torch.empty_like(k)
    return torch.empty_like(q), dk, torch.empty_like(v), dg, du, dmemory


def channel_context(ctx, inputs, output) -> None:
    q, k, v, g, u, _, cu_seqlens, ctx.segments, _, keep = inputs
    if not keep:
        raise RuntimeError("the gradient by channel needs what its forward pass kept: call it with keep = True")
    ctx.set_materialize_grads(False)
    ctx.tied = k is None
    ctx.save_for_backward(q, g if ctx.tied else k, v, u, cu_seqlens, *output[2:])


def channel_backward(ctx, do, dlast, *_):
    given = ctx.saved_tensors  # once: a checkpoint refuses to make them twice
    do = torch.zeros_like(given[2]) if do is None else do
    want_g, want_u, want_memory = ctx.needs_input_grad[3:6]
    dq, dk, dv, dg, du, dmemory = channel_gradients(do, dlast, *given, ctx.segments, want_g, want_u, ctx.tied)
    asked = (dg if want_g else None, du if want_u else None, dmemory if want_memory else None)
    return dq, None if ctx.tied else dk, dv, *asked, None, None, None, None


channel.register_autograd(channel_backward, setup_context=channel_context)


@operator("channel_step", "memory")
def channel_step(q: Tensor, k: Tensor | None, v: Tensor, g: Tensor, u: Tensor | None, memory: Tensor) -> Tensor:
    """o : b h v, in float32; memory is overwritten."""
    return kernels.step(q, k, v, g, u, memory)


@channel_step.register_fake
def _(q, k, v, g, u, memory):
    return torch.empty_like(v, dtype=torch.float32)
