"""The same rows, a chunk of tokens at a time, in matrix products.

A chunk is a span, so the recurrence over a long sequence is: what does each chunk do to the memory (all chunks at
once), fold them (a short loop), and read (all chunks at once again). Time is linear in T and so is memory, which is
T/C memories and a C×C score matrix a chunk.

Nothing is ever divided by a decay. Every decay between two tokens is the exponential of a sum of the gates that lie
between them, taken from one end, so it is at most 1 and a gate of -inf is as good as any other.

    b batch   n chunks   c tokens of a chunk   h heads   k key size   v value size
    b_i = g_1 + ... + g_i within the chunk, c_i = b_{i-1};   ⟨q, k⟩_ij = sum over channels of q_i k_j e^{b_i - b_j}

    additive   O = (Q e^b) M + tril⟨Q, K⟩ V        A = e^{b_C}                     S = (K e^{b_C - b})ᵀ V
    delta      L = diag(beta) stril⟨K, K⟩          [U W] = (I + L)⁻¹ diag(beta) [V  K e^b]
               O = (Q e^b) M + tril⟨Q, K⟩ (U - W M)
               A = diag(e^{b_C}) - (K e^{b_C - b})ᵀ W       S = (K e^{b_C - b})ᵀ U

A delta rule that looks before the decay has a for the first K in L and e^c for e^b beside it. Where what erases goes to
b and not to k, a token writes twice: V to k, and X to b with X = (I - stril⟨a, b⟩)⁻¹ (stril⟨a, k⟩ V + (a e^c) M).

Sources: GLA (2312.06635, section 4), Mamba2 (2405.21060, section 6), DeltaNet (2406.06484, section 3), Gated DeltaNet
(2412.06464, section 3.3), KDA (2510.26692, section 3), RWKV7 (2503.14456, appendix on its parallel form). Rows whose
words do not unroll to this have a chunk form of their own in `reference.forms`.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from reference import span as spans
from reference.documents import over_documents
from reference.normal import Normal, has_normal, normal
from reference.recurrence import Inputs, Memory, Row, check, in_full_precision, prepare

CHUNK = 64
TIMED = ("q", "k", "v", "g", "f", "beta", "a", "b")  # the parts of the normal form with a time axis


def recurrence(
    row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None, cu_seqlens=None, chunk: int = CHUNK
) -> tuple[Float[Tensor, "b t h v"], Memory]:
    """The row from `memory` (zeros if None): outputs, and the memory after the last token, as `recurrence.recurrence`.

    `chunk`, a power of two, is the most tokens of a chunk. Raises ValueError, in one line, for inputs that do not fit.
    """
    constants = constants or {}
    check(row, tokens, constants, memory, cu_seqlens)
    dtype, tokens, constants, memory = prepare(row, tokens, constants, memory, cu_seqlens)
    run, parts, finish, still = unrolled(row, tokens, constants, chunk)
    with in_full_precision(memory):
        o, memory = run(parts, memory) if cu_seqlens is None else over_documents(run, parts, memory, cu_seqlens, still)
    return finish(o).to(dtype), memory


def unrolled(row: Row, tokens: Inputs, constants: Inputs, chunk: int):
    """(run, parts, finish, still): run(parts, memory) is the row over whole sequences, parts have a time axis.

    still: tokens of zeros leave the memory as it is, so that sequences may be padded with them.
    """
    if not has_normal(row):
        from reference import forms  # which stand on this file

        form = forms.of(row)
        return lambda parts, M: form.run(row, parts, constants, M, chunk), tokens, lambda o: o, form.still
    x = normal(row, {**tokens, **constants})
    parts = {name: y for name, y in x._asdict().items() if name in TIMED and y is not None}
    return lambda parts, M: over_chunks(x._replace(**parts), M, chunk), parts, x.finish, True


def span(row: Row, tokens: Inputs, constants: Inputs | None = None, cu_seqlens=None) -> spans.Span:
    """`span.span`, with the chunked run inside."""
    return spans.span(row, tokens, constants, cu_seqlens, run=recurrence)


def over_chunks(x: Normal, M: Memory, chunk: int = CHUNK) -> tuple[Tensor, Memory]:
    t = x.v.shape[1]
    if t == 0:
        return x.v, M
    chunk = min(chunk, power_of_two(t), chunk if x.beta is None and x.a is None else well_conditioned(x.k.shape[-1]))
    x = x._replace(**{name: cut(getattr(x, name), chunk) for name in TIMED})
    # e^-10000 is 0 in any precision, and sums of finite gates can be matrix products
    x = x._replace(**{n: getattr(x, n).clamp(min=-1e4) for n in "gf" if getattr(x, n) is not None})
    inside = chunk_of(x)
    before, written, last = fold(inside, M)
    o = inside.reach @ before
    if x.f is None:
        o = o + inside.scores @ written
    else:
        o = prefix(x.f).exp() * o + spread(inside.scores, written, list(middles(x.f, exclusive=False)))
    return rearrange(o, "b n h c v -> b (n c) h v")[:, :t], last


def power_of_two(n: int) -> int:
    """The smallest that is not below n."""
    return 1 << (n - 1).bit_length()


def well_conditioned(keys: int) -> int:
    """The most tokens of a delta rule's chunk: more keys than they have channels depend on each other, and the system
    that they solve loses digits (over 65,536 tokens of 16 channels, chunks of 64 left the error budget)."""
    return max(4, power_of_two(keys))


def cut(x: Tensor | None, chunk: int) -> Tensor | None:
    """Into whole chunks. The last one is filled with zeros: tokens without decay, write or read."""
    if x is None:
        return None
    missing = -x.shape[1] % chunk
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing)) if missing else x
    # copied here once: every matrix product would copy it for itself
    return rearrange(x, "b (n c) h ... -> b n h c ...", c=chunk).contiguous()


class Chunk(NamedTuple):
    """What is known of each chunk before any memory is. A token writes once, or twice (w = c or 2 c writes)."""

    reach: Float[Tensor, "b n h c k"]  # q e^b: what each token sees of the memory that comes in
    scores: Float[Tensor, "b n h c w"]  # ⟨q, k⟩, masked
    written: Float[Tensor, "b n h w v"]  # V, or U for a delta rule
    erased: Float[Tensor, "b n h w k"] | None  # W for a delta rule: written is U - W M once M is known
    lasting: Float[Tensor, "b n h w k"]  # k e^{b_C - b}: what is left of each write at the chunk's end
    total: Tensor | None  # what is left of the memory: e^{b_C} for each row and column, b n h k v or 1 for either
    fading: Float[Tensor, "b n h c v"] | None = None  # e^{f_C - f}: what is left of a write's columns


def chunk_of(x: Normal) -> Chunk:
    if x.g is None:
        start, end, total = x.k.new_ones(()), x.k.new_ones(()), None
    else:
        g = x.g[..., None] if x.g.ndim == 4 else x.g
        start, end, total = prefix(g).exp(), suffix(g).exp(), g.sum(-2).exp()[..., None]
    fading = None
    if x.f is not None:
        fading, columns = suffix(x.f).exp(), x.f.sum(-2).exp()[..., None, :]
        total = columns if total is None else total * columns
    undecayed = x.u is not None or x.a is not None  # whether something looks at the memory before it decays
    earlier = prefix(g, exclusive=True).exp() if undecayed and x.g is not None else start
    inclusive = tril(x.g)
    exclusive = tril(x.g, exclusive=True) if undecayed else inclusive
    if x.u is not None:
        scores = exclusive(x.q, x.k).tril(-1) + torch.diag_embed((x.q * x.u[:, None] * x.k).sum(-1))
        return Chunk(x.q * earlier, scores, x.v, None, x.k * end, total, fading)
    asked, lasting = x.q * start, x.k * end
    scores = inclusive(x.q, x.k)
    if x.a is None and x.beta is None:
        return Chunk(asked, scores, x.v, None, lasting, total, fading)
    a = x.k if x.a is None else x.a
    if x.b is None:
        L = x.beta[..., None] * exclusive(a, x.k).tril(-1)
        U, W = solved(L, x.beta[..., None] * x.v, x.beta[..., None] * a * earlier)
        return Chunk(asked, scores, U, W, lasting, total)
    U, W = solved(-exclusive(a, x.b).tril(-1), exclusive(a, x.k).tril(-1) @ x.v, -a * earlier)
    scores = torch.cat([inclusive(x.q, x.b), scores], -1)
    nothing = torch.zeros_like(W)
    return Chunk(asked, scores, stacked(U, x.v), stacked(W, nothing), stacked(x.b * end, lasting), total)


def stacked(erasing: Tensor, new: Tensor) -> Tensor:
    """The two writes of each token of a chunk: first all that erase, then all that add."""
    return torch.cat([erasing, new], -2)


def solved(L: Float[Tensor, "... c c"], v: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(I + L)⁻¹ of both, L strictly lower triangular: the solver takes the ones for given and never reads them."""
    both = torch.linalg.solve_triangular(L, torch.cat([v, k], -1), upper=False, unitriangular=True)
    return both.split([v.shape[-1], k.shape[-1]], -1)


def fold(inside: Chunk, M: Memory, act: Callable = torch.mul) -> tuple[Float[Tensor, "b n h k v"], Tensor, Memory]:
    """The memory before each chunk, what each chunk writes once it knows it (U - W M), and the memory after the last.

    M -> act(total, M) + S, chunk after chunk. The A of a delta rule is never formed: its two factors act in turn.
    """
    n = inside.written.shape[1]
    totals = [M.new_ones(())] * n if inside.total is None else inside.total.unbind(1)
    before, written, lasting = [], inside.written, inside.lasting.mT
    if inside.erased is None:
        S = lasting @ (written if inside.fading is None else written * inside.fading)
        for total, new in zip(totals, S.unbind(1), strict=True):
            before.append(M)
            M = act(total, M) + new
        return torch.stack(before, 1), written, M
    corrected = []
    for total, U, W, left in zip(totals, *(y.unbind(1) for y in (written, inside.erased, lasting)), strict=True):
        before.append(M)
        corrected.append(U - W @ M)
        M = act(total, M) + left @ corrected[-1]
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
        decay = F.pad(decays(g)[..., :-1, :], (0, 0, 1, 0)) if exclusive else decays(g)
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


def spread(
    scores: Float[Tensor, "... c c"], v: Float[Tensor, "... c v"], to_middle: list[tuple[Tensor, Tensor]]
) -> Float[Tensor, "... c v"]:
    """scores @ v with decays that differ by column: as in `halves`, earlier values are decayed to the middle."""
    if not to_middle:
        return scores * v
    c = v.shape[-2]
    early, late = v.unflatten(-2, (2, c // 2)).unbind(-3)
    reach, rest = to_middle[0]
    above, below = scores[..., : c // 2, : c // 2], scores[..., c // 2 :, c // 2 :]
    own = spread(torch.stack([above, below]), torch.stack([early, late]), to_middle[1:])
    return torch.cat([own[0], own[1] + reach * (scores[..., c // 2 :, : c // 2] @ (early * rest))], -2)
