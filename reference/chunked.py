"""The same rows, a chunk of tokens at a time, in matrix products.

A chunk is a span, so the recurrence over a long sequence is: what does each chunk do to the memory (all chunks at
once), fold them (a short loop), and read (all chunks at once again). Time is linear in T and so is memory, which is
T/C memories and a C×C score matrix a chunk.

Nothing is ever divided by a decay. Every decay between two tokens is the exponential of a sum of the gates that lie
between them, taken from one end, so it is at most 1 and a gate of -inf is as good as any other.

    b batch   n chunks   c tokens of a chunk   h heads   k key size   v value size
    b_i = g_1 + ... + g_i within the chunk;   ⟨q, k⟩_ij = sum over channels of q_i k_j e^{b_i - b_j}

    additive   O = (Q e^b) M + tril⟨Q, K⟩ V        A = e^{b_C}                     S = (K e^{b_C - b})ᵀ V
    delta      L = diag(beta) stril⟨K, K⟩          [U W] = (I + L)⁻¹ diag(beta) [V  K e^b]
               O = (Q e^b) M + tril⟨Q, K⟩ (U - W M)
               A = diag(e^{b_C}) - (K e^{b_C - b})ᵀ W       S = (K e^{b_C - b})ᵀ U

Sources: GLA (2312.06635, section 4), Mamba2 (2405.21060, section 6), DeltaNet (2406.06484, section 3), Gated DeltaNet
(2412.06464, section 3.3), KDA (2510.26692, section 3).
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from reference import recurrence as words
from reference.documents import over_documents
from reference.recurrence import (
    Inputs,
    Memory,
    Normal,
    Row,
    check,
    in_full_precision,
    normal,
    prepare,
)

CHUNK = 64
TIMED = ("q", "k", "v", "g", "beta")  # the parts of the normal form with a time axis


def recurrence(
    row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None, cu_seqlens=None, chunk: int = CHUNK
) -> tuple[Float[Tensor, "b t h v"], Memory]:
    """The row from `memory` (zeros if None): outputs, and the memory after the last token, as `recurrence.recurrence`.

    `chunk` is a power of two. Raises ValueError, in one line, for inputs that do not fit the row.
    """
    constants = constants or {}
    check(row, tokens, constants, memory, cu_seqlens)
    dtype, tokens, constants, memory = prepare(row, tokens, constants, memory, cu_seqlens)

    x = normal(row, {**tokens, **constants})
    parts = {name: y for name, y in x._asdict().items() if name in TIMED and y is not None}

    def run(parts, memory):
        return over_chunks(x._replace(**parts), memory, chunk)

    with in_full_precision(memory):
        o, memory = run(parts, memory) if cu_seqlens is None else over_documents(run, parts, memory, cu_seqlens)
    return x.finish(o).to(dtype), memory


def span(row: Row, tokens: Inputs, constants: Inputs | None = None, cu_seqlens=None) -> words.Span:
    """`recurrence.span`, with the chunked run inside."""
    return words.span(row, tokens, constants, cu_seqlens, run=recurrence)


def over_chunks(x: Normal, M: Memory, chunk: int) -> tuple[Tensor, Memory]:
    t = x.v.shape[1]
    if t == 0:
        return x.v, M
    chunk = min(chunk, 1 << (t - 1).bit_length())
    x = x._replace(**{name: cut(getattr(x, name), chunk) for name in TIMED})
    if x.g is not None:  # e^-10000 is 0 in any precision, and sums of finite gates can be matrix products
        x = x._replace(g=x.g.clamp(min=-1e4))
    inside = chunk_of(x)
    before, written, last = fold(inside, M)
    o = inside.reach @ before + inside.scores @ written
    return rearrange(o, "b n h c v -> b (n c) h v")[:, :t], last


def cut(x: Tensor | None, chunk: int) -> Tensor | None:
    """Into whole chunks. The last one is filled with zeros: tokens without decay, write or read."""
    if x is None:
        return None
    missing = -x.shape[1] % chunk
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
    # copied here once: every matrix product would copy it for itself
    return rearrange(x, "b (n c) h ... -> b n h c ...", c=chunk).contiguous()


class Chunk(NamedTuple):
    """What is known of each chunk before any memory is."""

    reach: Float[Tensor, "b n h c k"]  # q e^b: what each token sees of the memory that comes in
    scores: Float[Tensor, "b n h c c"]  # ⟨q, k⟩, masked
    written: Float[Tensor, "b n h c v"]  # V, or U for a delta rule
    erased: Float[Tensor, "b n h c k"] | None  # W for a delta rule
    lasting: Float[Tensor, "b n h c k"]  # k e^{b_C - b}: what is left of each write at the chunk's end
    total: Float[Tensor, "b n h k"] | None  # e^{b_C}, by channel or one for all (k = 1)


def chunk_of(x: Normal) -> Chunk:
    if x.g is None:
        start, end, total = x.k.new_ones(()), x.k.new_ones(()), None
    else:
        g = x.g[..., None] if x.g.ndim == 4 else x.g
        start, end, total = prefix(g).exp(), suffix(g).exp(), g.sum(-2).exp()
    asked = start if x.u is None else prefix(g, exclusive=True).exp()
    between = tril(x.g, exclusive=x.u is not None)
    scores = between(x.q, x.k)
    if x.u is not None:
        scores = scores.tril(-1) + torch.diag_embed((x.q * x.u[:, None] * x.k).sum(-1))
    if x.beta is None:
        return Chunk(x.q * asked, scores, x.v, None, x.k * end, total)
    L = x.beta[..., None] * between(x.k, x.k).tril(-1)
    right = x.beta[..., None] * torch.cat([x.v, x.k * start], -1)
    # unitriangular: the solver takes the ones on the diagonal as given and never reads it
    U, W = torch.linalg.solve_triangular(L, right, upper=False, unitriangular=True).split(
        [x.v.shape[-1], x.k.shape[-1]], -1
    )
    return Chunk(x.q * asked, scores, U, W, x.k * end, total)


def fold(inside: Chunk, M: Memory) -> tuple[Float[Tensor, "b n h k v"], Tensor, Memory]:
    """The memory before each chunk, what each chunk writes once it knows it (U - W M), and the memory after the last.

    M -> A M + S, chunk after chunk. The A of a delta rule is never formed: its two factors act in turn.
    """
    n = inside.written.shape[1]
    totals = [1.0] * n if inside.total is None else inside.total[..., None].unbind(1)
    before, written = [], inside.written
    if inside.erased is None:
        for total, S in zip(totals, (inside.lasting.mT @ written).unbind(1), strict=True):
            before.append(M)
            M = total * M + S
        return torch.stack(before, 1), written, M
    corrected = []
    for total, U, W, lasting in zip(
        totals, *(y.unbind(1) for y in (written, inside.erased, inside.lasting.mT)), strict=True
    ):
        before.append(M)
        corrected.append(U - W @ M)
        M = total * M + lasting @ corrected[-1]
    return torch.stack(before, 1), torch.stack(corrected, 1), M


# --------------------------------------------------------------------------------- decays between two tokens


def prefix(g: Float[Tensor, "... c k"], exclusive: bool = False) -> Tensor:
    """b_i: from the chunk's start up to and with token i (exclusive: without it). Sums of finite gates."""
    return g.new_ones(g.shape[-2], g.shape[-2]).tril(-1 if exclusive else 0) @ g


def suffix(g: Float[Tensor, "... c k"]) -> Tensor:
    """b_C - b_j without the subtraction: from after token j to the chunk's end."""
    return g.new_ones(g.shape[-2], g.shape[-2]).triu(1) @ g


def tril(g: Tensor | None, exclusive: bool = False) -> Callable[[Tensor, Tensor], Float[Tensor, "... c c"]]:
    """The product tril⟨q, k⟩: q_i · k_j times the decay after token j up to token i (exclusive: to the one before)."""
    if g is None:
        return lambda q, k: (q @ k.mT).tril()
    if g.ndim == 4:
        decay = decays(g)
        return lambda q, k: (q @ k.mT) * decay
    to_middle = list(middles(g, exclusive))
    return lambda q, k: halves(q, k, to_middle)


def decays(g: Float[Tensor, "b n h c"]) -> Float[Tensor, "b n h c c"]:
    """e^{g_{j+1} + ... + g_i}, each sum taken on its own (a difference of two sums would lose -1e4 and break -inf)."""
    c = g.shape[-1]
    later = torch.ones(c, c, dtype=torch.bool, device=g.device).tril(-1)
    sums = torch.where(later, g[..., :, None], 0.0).cumsum(-2)
    return sums.masked_fill(~later.logical_or(torch.eye(c, dtype=torch.bool, device=g.device)), -torch.inf).exp()


def middles(g: Float[Tensor, "... c k"], exclusive: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """For halves, quarters, ... of the chunk: the decay from the middle to each later token, and from each earlier
    token to the middle. All are at most 1."""
    while g.shape[-2] > 1:
        early, late = g.unflatten(-2, (2, g.shape[-2] // 2)).unbind(-3)
        yield prefix(late, exclusive).exp(), suffix(early).exp()
        g = torch.stack([early, late])


def halves(q: Tensor, k: Tensor, to_middle: list[tuple[Tensor, Tensor]]) -> Float[Tensor, "... c c"]:
    """Decays that differ by channel: queries of the later half meet keys of the earlier half at the middle.

    Both are decayed towards it, and one matrix product does the quarter. The two quarters on the diagonal are the
    same problem at half the size.
    """
    if not to_middle:
        return (q * k).sum(-1, keepdim=True)
    c = q.shape[-2]
    (q1, q2), (k1, k2) = (x.unflatten(-2, (2, c // 2)).unbind(-3) for x in (q, k))
    reach, rest = to_middle[0]
    corner = (q2 * reach) @ (k1 * rest).mT
    quarters = halves(torch.stack([q1, q2]), torch.stack([k1, k2]), to_middle[1:])
    return torch.cat([F.pad(quarters[0], (0, c // 2)), torch.cat([corner, quarters[1]], -1)], -2)
