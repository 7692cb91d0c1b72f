"""Gated slot attention: what queries find among slots' keys weighs slots' values. Two memories that fade by channel."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fast.kernels import channel as channels
from fast.kernels import slots as kernels
from fast.operators import differentiated, even, of_dtype, operator, packed, small_enough
from reference import recurrence as words
from reference.recurrence import Inputs, Row


class Slots(NamedTuple):
    """With s = 1 - e^g:  K_t = K_{t-1} e^g + k_tᵀ s_t (the columns fade), p_t = softmax(q_t K_t),
    V_t = e^g V_{t-1} + s_tᵀ v_t (the rows do), o_t = p_t V_t. The memory is [Kᵀ V]."""

    q: Float[Tensor, "b t h k"]
    k: Float[Tensor, "b t h k"]
    v: Float[Tensor, "b t h v"]
    g: Float[Tensor, "b t h m"]

    @staticmethod
    def finish(o: Tensor) -> Tensor:
        return o


def has_form(row: Row) -> bool:
    return row[:3] == (words.channel, words.slots, words.attended)


def form(row: Row, x: Inputs) -> Slots:
    return Slots(**x)


def takes(x) -> bool:
    return isinstance(x, Slots)


def fits(title: str, x: Slots) -> None:
    small_enough(title, K=x.k.shape[-1], V=x.v.shape[-1], m=x.g.shape[-1])


def run(x: Slots, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    K, V, m = x.k.shape[-1], x.v.shape[-1], x.g.shape[-1]
    parts = (None, None) if memory is None else memory.split([K, V], -1)
    given = [even(y) for y in (x.q, x.k, x.v, x.g)] + [None if M is None else even(M, -m % 16) for M in parts]
    o, keys, values, *_ = slots(*given, cu_seqlens, m, differentiated(*given))
    return o[..., :V], torch.cat([keys[..., :m, :K], values[..., :m, :V]], -1)


def step(x: Slots, memory: Tensor) -> Tensor:
    return slots_step(*(y[:, 0] for y in x), memory)


# ------------------------------------------------------------------------------------- the operators, as torch sees


@operator("slots")
def slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    cu_seqlens: Tensor | None,
    count: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, the last keys and values of slots, n h m k and n h m v; and how slots are weighed, and of chunks: scores,
    weights faded to the start and writes to the end, how memories fade, the running sums of gates, keys and values
    before each). `count`: how many slots there are, the others only fill tiles. `keep`: what the gradient needs is
    kept; without it there is none."""
    return kernels.forward(*packed(q, k, v, g, keys, values, cu_seqlens), count, keep)


@slots.register_fake
def _(q, k, v, g, keys, values, cu_seqlens, count, keep):
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h, m = g.shape[2:]
    s = torch.empty_like(g, dtype=q.dtype)
    last = (g.new_empty(n, h, m, x.shape[-1]) for x in (k, v))
    if not keep:
        return torch.empty_like(v), *last, *(s.new_empty(0) for _ in range(8))
    first, second = (channels.memories(s, x, cu_seqlens) for x in (k, v))
    chunks = channels.scores_for(s), torch.empty_like(s), torch.empty_like(s), g.new_empty(first[0], h, m)
    sums, met = torch.empty_like(g, dtype=channels.sums_in(s)), (s.new_empty(first), s.new_empty(second))
    return torch.empty_like(v), *last, torch.empty_like(g), *chunks, sums, *met


@operator("slots_gradients")
def slots_gradients(
    do: Tensor,
    dkeys: Tensor | None,
    dvalues: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    cu_seqlens: Tensor | None,
    weights: Tensor,
    scores: Tensor,
    asked: Tensor,
    faded: Tensor,
    fades: Tensor,
    sums: Tensor,
    keys_met: Tensor,
    values_met: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, and the cotangents of the first keys and values)."""
    do, dkeys, dvalues, *given = packed(of_dtype(do, v.dtype), dkeys, dvalues, q, k, v, g, cu_seqlens)
    kept = (weights, scores, asked, faded, fades, sums, keys_met, values_met)
    return kernels.backward(do, dkeys, dvalues, *given, *kept)


@slots_gradients.register_fake
def _(do, dkeys, dvalues, q, k, v, g, cu_seqlens, *_):
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    first = (g.new_empty(n, *g.shape[2:], x.shape[-1]) for x in (k, v))
    return *(torch.empty_like(x) for x in (q, k, v, g)), *first


def slots_context(ctx, inputs, output) -> None:
    *given, _, _, cu_seqlens, _, keep = inputs
    if not keep:
        raise RuntimeError("the gradient of slots needs what their forward pass kept: call it with keep = True")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, cu_seqlens, *output[3:])


def slots_backward(ctx, do, dkeys, dvalues, *_):
    given = ctx.saved_tensors  # once: a checkpoint refuses to make them twice
    do = torch.zeros_like(given[2]) if do is None else do
    grads = slots_gradients(do, dkeys, dvalues, *given)
    wanted = zip(grads, ctx.needs_input_grad[:6], strict=True)
    return *(dy if want else None for dy, want in wanted), None, None, None


slots.register_autograd(slots_backward, setup_context=slots_context)


@operator("slots_step", "memory")
def slots_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, memory: Tensor) -> Tensor:
    """o : b h v, in float32; memory is overwritten."""
    return kernels.step(*packed(q, k, v, g), memory)


@slots_step.register_fake
def _(q, k, v, g, memory):
    return torch.empty_like(v, dtype=torch.float32)
