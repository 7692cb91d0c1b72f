"""Rows whose memory may come late: run the tokens from nothing, and add what the memory before them adds.

    S = Σ (k_t e^{b_T - b_t})ᵀ v_t        b_t = g_1 + ... + g_t: the decays so far
    o_t = (its own from nothing) + (q_t e^{b_t}) M        a bonus reads before it decays: b_{t-1}

So what a segment does to a memory is one matrix product, with no run, and what a memory does to a segment another.
It holds where the write does not look at the memory and the read is linear in it: no delta rule, no ratio (its
denominator has a share in the memory, too), no softmax over slots. Decays are never divided: each sum is taken on its
own, and is at most 0.
"""

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from reference import printed
from reference import recurrence as words
from reference import span as spans
from reference.normal import FORGOTTEN, Normal, normal
from reference.recurrence import Inputs, Memory, Row, in_full_precision, prepare

WRITES = (words.outer, words.tied, printed.weighed)
READS = (words.inclusive, words.bonus)


def comes_late(row: Row) -> bool:
    """Whether the row's memory may come late."""
    return row.decay in FORGOTTEN and row.update in WRITES and row.read in READS


def span(row: Row, tokens: Inputs, constants: Inputs | None = None, cu_seqlens=None) -> spans.Span:
    """`span.span`, with S as one matrix product in place of a run."""
    return spans.span(row, tokens, constants, cu_seqlens, run=lambda *inputs: (None, written(*inputs)))


def written(row: Row, tokens: Inputs, constants: Inputs) -> Memory:
    """S: the memory that these tokens leave, from nothing."""
    x, M = form_of(row, tokens, constants)
    with in_full_precision(M):
        k = x.k if x.g is None else x.k * rest(by_head(x.g)).exp()
        v = x.v if x.f is None else x.v * rest(x.f).exp()
        return einsum(k, v, "b t h k, b t h v -> b h k v")


def seen(row: Row, tokens: Inputs, constants: Inputs, M: Memory) -> Float[Tensor, "b t h v"]:
    """What the tokens see of the memory before them, in its precision."""
    x, M = form_of(row, tokens, constants, M)
    with in_full_precision(M):
        q = x.q
        if x.g is not None:
            g = by_head(x.g)
            q = q * (so_far(g) if x.u is None else before(g)).exp()
        o = einsum(q, M, "b t h k, b h k v -> b t h v")
        return o if x.f is None else o * so_far(x.f).exp()


def left_of(row: Row, tokens: Inputs, constants: Inputs, M: Memory) -> Memory:
    """What the tokens leave of the memory before them."""
    _, tokens, constants, M = prepare(row, tokens, constants, M, None)
    A = spans.left(row, tokens, constants, M, None)
    return spans.TRANSITION[spans.transition(row)].act(A, M)


def form_of(row: Row, tokens: Inputs, constants: Inputs, M: Memory | None = None) -> tuple[Normal, Memory]:
    _, tokens, constants, M = prepare(row, tokens, constants, M, None)
    return normal(row, {**tokens, **constants}), M


def by_head(g: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"]) -> Float[Tensor, "b t h k"]:
    return g[..., None] if g.ndim == 3 else g


def so_far(g: Float[Tensor, "b t h k"]) -> Float[Tensor, "b t h k"]:
    """The decays up to and with each token."""
    return g.cumsum(1)


def before(g: Float[Tensor, "b t h k"]) -> Float[Tensor, "b t h k"]:
    """The decays before each token."""
    return torch.cat([torch.zeros_like(g[:, :1]), so_far(g)[:, :-1]], 1)


def rest(g: Float[Tensor, "b t h k"]) -> Float[Tensor, "b t h k"]:
    """The decays after each token. Summed from the end: a difference of two sums would lose what is small."""
    return before(g.flip(1)).flip(1)
