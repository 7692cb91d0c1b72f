"""Delta rules: no gate, or one number a head and token."""

import torch
from torch import Tensor

from fast.kernels import delta as kernels
from fast.operators import packed, results
from reference.normal import Normal


def takes(x: Normal) -> bool:
    plain = x.g is None or x.g.ndim == 3
    return x.beta is not None and plain and all(y is None for y in (x.a, x.b, x.f, x.u))


def run(x: Normal, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    segments = kernels.segments_for(x.q, x.v, sequences)
    given = (x.q, x.k, x.v, x.beta, x.g, memory)
    keep = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in given)
    o, last, *_ = delta(*given, cu_seqlens, segments, wide, keep)
    return o, last


def step(x: Normal, memory: Tensor) -> Tensor:
    return delta_step(x.q, x.k, x.v, x.beta, x.g, memory)


# ------------------------------------------------------------------------------------- the operators, as torch sees


@torch.library.custom_op("linear_moe::delta", mutates_args=())
def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    wide: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments, the news, and of chunks: scores, q·k, the system solved).

    `wide`: o in float32. `keep`: what the gradient needs is kept; without it there is no gradient.
    """
    return kernels.forward(*packed(q, k, v, beta, g, memory, cu_seqlens), segments, wide, keep)


@delta.register_fake
def _(q, k, v, beta, g, memory, cu_seqlens, segments, wide, keep):
    o, last, states = results(q, v, cu_seqlens, segments if keep else 1, wide)
    news = torch.empty_like(v) if keep else v.new_empty(0)
    scores, solved = (q.new_empty(*q.shape[:3], kernels.chunk_for(q)) for _ in range(2))
    return o, last, states, news, scores, beta.new_empty(q.shape[2], beta.shape[0] * beta.shape[1]), solved


@torch.library.custom_op("linear_moe::delta_gradients", mutates_args=())
def delta_gradients(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    states: Tensor,
    news: Tensor,
    scores: Tensor,
    itself: Tensor,
    solved: Tensor,
    want_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbeta, dg, dmemory); dg is empty unless wanted."""
    do, dlast = packed(do.to(v.dtype), dlast)
    given = packed(q, k, v, beta, g, memory, cu_seqlens)
    *grads, dg, dmemory = kernels.backward(do, dlast, *given, last, states, news, scores, itself, solved, want_g)
    return *grads, last.new_empty(0) if dg is None else dg, dmemory


@delta_gradients.register_fake
def _(do, dlast, q, k, v, beta, g, memory, cu_seqlens, last, states, news, scores, itself, solved, want_g):
    dg = torch.empty_like(g) if want_g else last.new_empty(0)
    return *(torch.empty_like(y) for y in (q, k, v, beta)), dg, torch.empty_like(last)


def delta_context(ctx, inputs, output) -> None:
    *given, _, _, keep = inputs
    if not keep:
        raise RuntimeError("a delta rule's gradient needs what its forward pass kept: call it with keep = True")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *output[1:])


def delta_backward(ctx, do, dlast, *_):
    given = ctx.saved_tensors
    v = given[2]
    do = torch.zeros_like(v) if do is None else do
    want_g, want_memory = ctx.needs_input_grad[4:6]
    *grads, dg, dmemory = delta_gradients(do, dlast, *given, want_g)
    return *grads, dg if want_g else None, dmemory if want_memory else None, None, None, None, None


delta.register_autograd(delta_backward, setup_context=delta_context)


@torch.library.custom_op("linear_moe::delta_step", mutates_args=("memory",))
def delta_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, memory: Tensor) -> Tensor:
    """o : b h v, in float32; memory is overwritten."""
    return kernels.step(q, k, v, beta, g, memory)


@delta_step.register_fake
def _(q, k, v, beta, g, memory):
    return torch.empty_like(v, dtype=torch.float32)
