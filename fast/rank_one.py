"""Delta rules with a gate a channel, or with two writes; and those of `fast/delta.py` that find no room there."""

import torch
from torch import Tensor

from fast.kernels import delta
from fast.kernels import rank_one as kernels
from fast.operators import differentiated, of_dtype, operator, packed, results
from reference.normal import Normal


def takes(x: Normal) -> bool:
    return (x.beta is not None or x.b is not None) and x.f is None and x.u is None


def run(x: Normal, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    given = (x.q, x.k, x.v, x.beta, x.g, x.a, x.b, memory)
    keep = differentiated(*given)
    segments = kernels.segments_for(x.q, x.v, sequences)
    o, last, *_ = rank_one(*given, cu_seqlens, segments, wide, keep)
    return o, last


def step(x: Normal, memory: Tensor) -> Tensor:
    return rank_one_step(x.q, x.k, x.v, x.beta, x.g, x.a, x.b, memory)


def span(x: Normal, cu_seqlens: Tensor | None, sequences: int) -> tuple[Tensor, list[Tensor]]:
    """(what the tokens leave of an empty memory, [what they do to one, what each of their segments does])."""
    moves = delta.moves_of(x.q, cu_seqlens, kernels.segments_for(x.q, x.v, sequences))
    S = rank_one_end(x.q, x.k, x.v, x.beta, x.g, x.a, x.b, cu_seqlens, moves, False)
    return S, [delta.whole(moves, x.v.element_size() == 4), moves]


def received(x: Normal, do: Tensor, cu_seqlens: Tensor | None, sequences: int, moves: Tensor) -> Tensor:
    """What the memory before the tokens receives from the cotangents of their outputs."""
    return rank_one_end(x.q, x.k, do, x.beta, x.g, x.a, x.b, cu_seqlens, moves, True)


# ------------------------------------------------------------------------------------- the operators, as torch sees


@operator("rank_one_end", "moves")
def rank_one_end(
    q: Tensor,
    k: Tensor,
    z: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    cu_seqlens: Tensor | None,
    moves: Tensor,
    back: bool,
) -> Tensor:
    return kernels.end(*packed(q, k, z, beta, g, a, b, cu_seqlens), moves, back)


@rank_one_end.register_fake
def _(q, k, z, beta, g, a, b, cu_seqlens, moves, back):
    return results(q, z, cu_seqlens, 1, False)[1]


@operator("rank_one")
def rank_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    wide: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, and what the gradient needs: empty unless `keep`). `wide`: o in float32.

    Without `keep` there is no gradient.
    """
    return kernels.forward(*packed(q, k, v, beta, g, a, b, memory, cu_seqlens), segments, wide, keep)


@rank_one.register_fake
def _(q, k, v, beta, g, a, b, memory, cu_seqlens, segments, wide, keep):
    o, last, _ = results(q, v, cu_seqlens, 1, wide)
    states = v.new_empty(kernels.slots_of(q, cu_seqlens), *last.shape[1:])
    moves = kernels.moves_of(q, cu_seqlens, segments)
    kept = (torch.empty_like(v), states, moves, *kernels.solved(q, g, b, cu_seqlens))
    return o, last, *(x if keep else x.new_empty(0) for x in kept)


@operator("rank_one_gradients")
def rank_one_gradients(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    g: Tensor | None,
    a: Tensor | None,
    b: Tensor | None,
    cu_seqlens: Tensor | None,
    news: Tensor,
    states: Tensor,
    moves: Tensor,
    inverse: Tensor,
    mixed: Tensor,
    reads: Tensor,
    more_reads: Tensor,
    totals: Tensor,
    want_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbeta, dg, da, db, dmemory); empty where there is no such input, dg unless wanted."""
    do, dlast = packed(of_dtype(do, v.dtype), dlast)
    given = packed(q, k, v, beta, g, a, b, cu_seqlens)
    found = [inverse, mixed, reads, more_reads, totals]
    grads = kernels.backward(do, dlast, *given, news, states, moves, found, want_g)
    return tuple(totals.new_empty(0) if x is None else x for x in grads)


@rank_one_gradients.register_fake
def _(
    do, dlast, q, k, v, beta, g, a, b, cu_seqlens,
    news, states, moves, inverse, mixed, reads, more_reads, totals, want_g,
):  # fmt: skip
    _, dmemory, _ = results(q, v, cu_seqlens, 1, False)
    some = (q, k, v, beta, g if want_g else None, a, b)
    return *(totals.new_empty(0) if x is None else torch.empty_like(x) for x in some), dmemory


def rank_one_context(ctx, inputs, output) -> None:
    *given, _, cu_seqlens, _, _, keep = inputs
    if not keep:
        raise RuntimeError("the gradient of rank_one needs what its forward pass kept: call it with keep = True")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, cu_seqlens, *output[2:])


def rank_one_backward(ctx, do, dlast, *_):
    given = ctx.saved_tensors
    v = given[2]
    do = torch.zeros_like(v) if do is None else do
    wanted = ctx.needs_input_grad[:8]
    grads = rank_one_gradients(do, dlast, *given, wanted[4])
    return *(x if want else None for x, want in zip(grads, wanted, strict=True)), None, None, None, None


rank_one.register_autograd(rank_one_backward, setup_context=rank_one_context)


@operator("rank_one_step", "memory")
def rank_one_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, a: Tensor | None, b: Tensor | None,
    memory: Tensor,
) -> Tensor:  # fmt: skip
    """o : b h v, in float32; memory is overwritten."""
    return kernels.step(q, k, v, beta, g, a, b, memory)


@rank_one_step.register_fake
def _(q, k, v, beta, g, a, b, memory):
    return torch.empty_like(v, dtype=torch.float32)
