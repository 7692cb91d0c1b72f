"""Delta rules: no gate, or one number a head and token; a vector of its own may erase."""

import torch
from torch import Tensor

from fast.kernels import delta as kernels
from fast.operators import by_columns, differentiated, of_dtype, operator, packed, results
from reference.normal import Normal

WHOLE = 128


def takes(x: Normal) -> bool:
    """Not what has a vector that erases of more channels than sweeps have room for beside queries and keys: that is
    `rank_one`'s."""
    plain = x.g is None or x.g.ndim == 3
    fits = x.a is None or x.a.shape[-1] <= kernels.FOLDED
    return x.beta is not None and plain and fits and all(y is None for y in (x.b, x.f, x.u))


def run(x: Normal, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    """Columns of v beyond WHOLE on their own: `delta_chunks` holds all of them, and 256 do not fit."""
    V = x.v.shape[-1]
    keep = differentiated(x.q, x.k, x.v, x.beta, x.g, x.a, memory)

    def some(v: Tensor, M: Tensor | None) -> tuple[Tensor, Tensor]:
        segments = kernels.segments_for(x.q, v, sequences)
        return delta(x.q, x.k, v, x.beta, x.g, x.a, M, cu_seqlens, segments, wide, keep)[:2]

    return by_columns(some, x.v, memory, [WHOLE, V - WHOLE] if V > WHOLE else [V])


def step(x: Normal, memory: Tensor) -> Tensor:
    return delta_step(x.q, x.k, x.v, x.beta, x.g, x.a, memory)


def span(x: Normal, cu_seqlens: Tensor | None, sequences: int) -> tuple[Tensor, list[Tensor]]:
    """(what the tokens leave of an empty memory, [what they do to one, what each of their segments does])."""
    moves = kernels.moves_of(x.q, cu_seqlens, kernels.segments_for(x.q, x.v, sequences))
    S = delta_end(x.q, x.k, x.v, x.beta, x.g, x.a, cu_seqlens, moves, False)
    return S, [kernels.whole(moves, x.v.element_size() == 4), moves]


def received(x: Normal, do: Tensor, cu_seqlens: Tensor | None, sequences: int, moves: Tensor) -> Tensor:
    """What the memory before the tokens receives from the cotangents of their outputs."""
    return delta_end(x.q, x.k, do, x.beta, x.g, x.a, cu_seqlens, moves, True)


# ------------------------------------------------------------------------------------- the operators, as torch sees


@operator("delta_end", "moves")
def delta_end(
    q: Tensor,
    k: Tensor,
    z: Tensor,
    beta: Tensor,
    g: Tensor | None,
    a: Tensor | None,
    cu_seqlens: Tensor | None,
    moves: Tensor,
    back: bool,
) -> Tensor:
    return kernels.end(*packed(q, k, z, beta, g, a, cu_seqlens), moves, back)


@delta_end.register_fake
def _(q, k, z, beta, g, a, cu_seqlens, moves, back):
    return results(q, z, cu_seqlens, 1, False)[1]


@operator("delta")
def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    a: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    wide: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, the news, the memory before every chunk, what segments do to memories, and of chunks:
    scores, q·k, the system solved). `wide`: o in float32. `keep`: what the gradient needs is kept; without it there is
    none."""
    return kernels.forward(*packed(q, k, v, beta, g, a, memory, cu_seqlens), segments, wide, keep)


@delta.register_fake
def _(q, k, v, beta, g, a, memory, cu_seqlens, segments, wide, keep):
    o, last, _ = results(q, v, cu_seqlens, 1, wide)
    (b, t, h, K), chunk = q.shape, kernels.chunk_for(q)
    news = torch.empty_like(v) if keep else v.new_empty(0)
    states = q.new_empty(kernels.memories(q, v, cu_seqlens, chunk) if keep else (0,))
    moves = last.new_empty((last.shape[0], h, segments, K, K) if segments > 1 else (0,))
    scores, solved = (q.new_empty(b, t, h, chunk) for _ in range(2))
    return o, last, news, states, moves, scores, beta.new_empty(h, b * t), solved


@operator("delta_gradients")
def delta_gradients(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    a: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    news: Tensor,
    states: Tensor,
    moves: Tensor,
    scores: Tensor,
    itself: Tensor,
    solved: Tensor,
    want_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbeta, dg, da, dmemory); dg is empty unless wanted, da where there is no a."""
    do, dlast = packed(of_dtype(do, v.dtype), dlast)
    given = packed(q, k, v, beta, g, a, memory, cu_seqlens)
    grads = kernels.backward(do, dlast, *given, news, states, moves, scores, itself, solved, want_g)
    return tuple(beta.new_empty(0) if x is None else x for x in grads)


@delta_gradients.register_fake
def _(do, dlast, q, k, v, beta, g, a, memory, cu_seqlens, news, states, moves, scores, itself, solved, want_g):
    _, dmemory, _ = results(q, v, cu_seqlens, 1, False)
    some = (q, k, v, beta, g if want_g else None, a)
    return *(beta.new_empty(0) if x is None else torch.empty_like(x) for x in some), dmemory


def delta_context(ctx, inputs, output) -> None:
    *given, _, _, keep = inputs
    if not keep:
        raise RuntimeError("a delta rule's gradient needs what its forward pass kept: call it with keep = True")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *output[2:])


def delta_backward(ctx, do, dlast, *_):
    given = ctx.saved_tensors
    v = given[2]
    do = torch.zeros_like(v) if do is None else do
    wanted = ctx.needs_input_grad[:7]
    grads = delta_gradients(do, dlast, *given, wanted[4])
    return *(x if want else None for x, want in zip(grads, wanted, strict=True)), None, None, None, None


delta.register_autograd(delta_backward, setup_context=delta_context)


@operator("delta_step", "memory")
def delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, a: Tensor | None, memory: Tensor
) -> Tensor:
    """o : b h v, in float32; memory is overwritten."""
    return kernels.step(q, k, v, beta, g, a, memory)


@delta_step.register_fake
def _(q, k, v, beta, g, a, memory):
    return torch.empty_like(v, dtype=torch.float32)
