"""Triton kernels for memories whose transition is diagonal plus rank one: one vector finds, another writes over it.

    r_t = v_t - e_t M̂      M_t = Diag(e^{g_t}) M_{t-1} + β_t w_tᵀ r_t (+ k_tᵀ v_t)      o_t = q_t M_t

    delta rules with a gate a channel (KDA)         e = w = k, M̂ = Diag(e^{g_t}) M_{t-1}
    a vector of its own that erases                 e = a, w = k, M̂ = M_{t-1}
    two writes (RWKV7)                              e = -a, w = b, M̂ = M_{t-1}, β = 1, r_t = -e_t M̂, and k_tᵀ v_t

The gate is nothing, a number a head and token, or a number a key channel and token. One write with one of the former
two is `delta.py`'s, but for Comba's with more than 128 key channels.

In a chunk of C tokens, with b_i = g_1 + ... + g_i, c_i = b_i or, where M̂ is the memory before its decay, b_{i-1}, with
⟨x, y⟩_ij = Σ_c x_ic y_jc e^{(b or c)_ic - b_jc} and S the state from before the chunk:

    T = (I + stril⟨e, w⟩ β)⁻¹      W = T (e e^c)      w' = β w e^{b_C - b}      P = tril⟨q, w⟩ β      R = P T
    r = T v - W S      o = R v + (q e^b - P W) S      S <- e^{b_C} S + w'ᵀ r

and with two writes, N = stril⟨e, k⟩ and k' = k e^{b_C - b},

    r = -T N v - W S      o = (tril⟨q, k⟩ - P T N) v + (q e^b - P W) S      S <- e^{b_C} S + w'ᵀ r + k'ᵀ v

Backwards, with E the cotangent of the memory behind the chunk and y that of what r is T times (with one write that is
dv; with two, ŷ = k' - (T N)ᵀ w'):

    y = Rᵀ do + (Tᵀ w') E      E <- e^{b_C} E + (q e^b)ᵀ do - (e e^c)ᵀ y      dv = (tril⟨q, k⟩ - P T N)ᵀ do + ŷ E

So all that is not a state is found for all chunks at once, and both ways are the same sweep through the chunks, whose
chain from one state to the next is two products and a sum:

    x = A z + B S      out = A' z + B' S      S <- e^{b_C} S + Fᵀ x + F'ᵀ z

    forwards     z = v, x = r, out = o       A = T or -T N   B = -W       B' = q e^b - P W   F = w'       F' = k'
    backwards    z = do, x = y, out = dv     A = Rᵀ          B = Tᵀ w'    B' = ŷ             F = -e e^c   F' = q e^b

Both leave the state that comes into every chunk. With these no other gradient waits for another chunk:

    dq_i = e^{b_i} (do S) + Σ_{j<=i} (do_i·r_j) β_j w_j e^{b_i-b_j} (+ the same with v_j k_j for r_j β_j w_j)
    de_i = -e^{c_i} (y S) - Σ_{j<i} (y_i·r_j) β_j w_j e^{c_i-b_j} (- ...)
    ω_j = e^{b_C-b_j} (r E) + Σ_{i>=j} (do_i·r_j) q_i e^{b_i-b_j} - Σ_{i>j} (y_i·r_j) e_i e^{c_i-b_j}
    dw = β ω    dβ = w·ω    and, where there are two writes, dk_j as ω_j, with v for r

The gate's gradient is the sum of every term above times its vector whose exponent holds the gate: with ' for what came
through S or E and '' for what came from other tokens of the chunk (a token's own pair holds no gate)

    dg_t = e^{b_C} <S, E> + Σ_{s<t} w dw' + Σ_{s>=t} (q dq' + q dq'' - w dw'') + Σ_{s>=t} e de

by row of the memory (the last over s > t where e^c is without a token's own gate; with two writes k dk beside w dw).
The pairs on both sides of t, or behind it, cancel; nothing is summed over more than a chunk, and no rounding error is.
Where the gate is a number a token, pairs are summed for it before they are rounded: else one pair would be two numbers
that hardly cancel. What y loses when it is rounded is the same on both sides; made good, as in `delta.py`, it gave
nothing.

Seven kernels. `rank_one_sums`: running sums of gates. `rank_one_prepare`: T, R and what the sweep forwards takes.
`rank_one_sweep`: as in `delta.py` a program owns a slice of V and streams through time. `rank_one_reverse`: what the
sweep backwards takes. `rank_one_gradients`: ' above ('' of a gate a token, too), and the scores do rᵀ, y rᵀ.
`rank_one_pairs`: '' above, added to it. `rank_one_step`: one token. All but the sweep take a chunk a program.

Segments. As in `delta.py`: what a stretch of tokens does to a memory is M -> A M + M₀, and backwards E -> Aᵀ E + E₀, so
the sweep goes through every segment once more without outputs (SPAN), forwards from the identity, too, z being zeros
there, for A; `delta_fold` has the states between; then all segments run at once. A is kept for the way back: found
again it would be a sweep of K columns, 2.25 U read, where it is 1/8 U for 2048 tokens a segment. That is twice the
work of the sweeps, so it is done only where there are four segments or more for less than half of the GPU.

Gates. As in `decay.py` a gate is raised to FLOOR first, and every decay is a difference of two running sums from the
chunk's start, for float32 tokens in float64, for 16-bit tokens in float32: off by 1e-3 at worst, behind gates of FLOOR.
Where the gate is a number a channel pairs of tokens meet as in `channel.py`: by halves, both decayed towards the middle
of their block, at log C levels, so that no exponent is positive and any g in [-inf, 0] is right and finite; or, where
the gates are mild, all pairs of a block at its middle in one product. The sums are loaded from where `rank_one_sums`
left them, since that is one load a number, from the cache, where sums found anew for every level and slice were
products or scans. A gate that is not a number spoils what follows in its chunk.

Precision. T is found as in `delta.py` in float32, by halves from single tokens up; it is stored as the tokens are. Its
diagonal of ones is exact in any dtype, so T v is v and a correction. r is what is kept, not w'ᵀ T v and w'ᵀ W S, so
that a memory still corrects its own errors. A chunk has at most K tokens: more keys than channels depend on each other.
A of a segment and the states between are float32, the fold's products three tf32, and what feeds a span's products is
rounded as in the sweep. Over five segments of gates near one errors are those of one segment but for chance, the first
memory's gradient's a sixth more; a span's state and r in two 16-bit parts, twice its products, would take a fifth off
the last memory's and a sixth off that gradient's (bench/LOG.md).
' of dq, dw, de and dk is rounded to the tokens' dtype on its way to where '' is added, and the gates' gradient is not.

Bytes and operations. In U = one b t h d tensor in 16 bits, K = V = d = 128, C = 32, one write, a gate a channel (2 U):
sums read 2 U and write 2, once each way; prepare reads 4 and writes 3.5; the sweep reads 4.5 and writes 1, and 5 for r
and states where there is a gradient; reverse reads 4.25 and writes 3; the sweep backwards reads 4.25 and writes 5;
gradients read 15 and write 4.5; pairs read 8.5 and write 4. So 17 U forward where the floor is 6, and 74.5 U with the
gradient where it is 17. Two writes: 21.5 U of 8, and 94.5 of 23. Kept for the gradient: T, R, r and states, 5.5 U; on
the way back at most 12 U more. Chunks of 64 tokens would halve the states, 4 U each. In segments spans read 3.25 U
forwards (4.25 with two writes) and 4.25 backwards, and of A and the states between, with n tokens a segment, 2·K/n U
each are written and read (1/8 at n = 2048).
Multiply-adds a token and head: prepare 2·C·d, 6·16² and 3·C², and for each level (one where gates are mild, else log
C) 2·C·d (two writes: 4·C·d); the sweep 3·d² + 2·C·d (two writes: 4·d²); in segments spans 4·d² + 2·C·d forwards (two
writes: 6·d²), 3·d² + C·d backwards, folds d³/n; gradients 3·d² + 2·slices·C·d (with a gate a token 2·C·d more, two
writes 4·C·d), pairs 2·C·d and for each level 4·C·d (two writes: 8·C·d).

Compilers: what `decay.py` says. No dot's result is transposed on its way into another dot; no 16-bit line has one
stage. What goes into several dots is `pinned`. By the machine code for sm_90 of Triton 3.7.1 (16 bits, K = V = 128)
chunks of 32 tokens, not of 64: with 64 a sweep takes 127 KB of shared memory in two stages, so that one program fits a
multiprocessor, with 32 it takes 48 to 64, in three stages 80 to 104, and a span 66 to 90. A program's instructions,
times warps and slices, for a chunk of KDA (RWKV7) with mild gates: prepare 14 (18) thousand, reverse 4 (5), gradients
15 (17), pairs 21 (26); bytes of stack 0 (112), 0, 0 and 40 (216); sweeps and spans 0, `delta_fold` 40. For times see
bench/LOG.md.
What a tile of memories is to several dots in a loop lies in shared memory as it was loaded, with eight-way conflicts:
`rank_one_gradients` has no loop.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay, delta
from fast.kernels.channel import MILD, at_token, faded
from fast.kernels.decay import (
    COMPILED,
    FLOOR,
    LOG2_E,
    NOTHING,
    cdiv,
    chunk_of,
    chunks_of,
    padded,
    place_of,
    places,
    plus_product,
    power_of_2,
    sequences_of,
    stretch_of,
    summed,
)
from fast.kernels.delta import FOLDED, SOLVING, fold, solved_by_halves, sums_behind, sums_where

NONE, TOKEN, CHANNEL = 0, 2, 3  # the kinds of gate
PART = tl.bfloat16 if COMPILED else tl.float32  # of a sum's numbers; the interpreter has no products of bfloat16

CHUNK = {2: 32, 4: 16}  # tokens a chunk by bytes of a number: float32 products are not done by tensor cores

# padded row size of the state, bytes of a number -> (columns of V a program, warps, stages) of the sweeps
CONFIG = {
    (16, 2): (16, 4, 2),
    (32, 2): (32, 4, 2),
    (64, 2): (32, 4, 3),
    (128, 2): (32, 4, 3),
    (256, 2): (16, 4, 2),
    (16, 4): (16, 4, 1),
    (32, 4): (32, 4, 1),
    (64, 4): (32, 8, 1),
    (128, 4): (16, 8, 1),
    (256, 4): (16, 8, 1),
}
# where a segment is gone through for what it does to a state: V and K columns at once, twice as many programs
SPANS = {(128, 2): (64, 4, 3)}
# the kernels of chunks, by bytes of a number: (channels of K a program, warps, registers a thread may have)
CHUNKS = {
    2: {"prepare": (64, 4, None), "reverse": (64, 4, None), "gradients": (64, 4, None), "pairs": (64, 8, 128)},
    4: {"prepare": (32, 2, None), "reverse": (32, 4, None), "gradients": (32, 4, None), "pairs": (32, 4, None)},
}  # the last two share parts of sums: their channels are the same


@triton.jit
def gates_of(g, at, ok):
    """Gates in units of log 2, so that exp2 follows; 0 where there is no token."""
    gate = tl.load(g + at, mask=ok, other=0.0)
    return tl.maximum(gate, FLOOR, propagate_nan=tl.PropagateNan.ALL) * LOG2_E


@triton.jit
def fades_of(
    g, sums, row, count, heads, ic, ik, K: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, EXACT: tl.constexpr
):
    """(e^b, e^c, e^{b_C - b}, e^{b_C}) of a chunk of `count` tokens that begins at `row`: C × K, or C × 1; the last
    without its first axis."""
    if GATE == 2:
        here, other = ic[:, None], ic[None, :]
        gates = gates_of(g, row + ic * heads, ic < count)
        reading = power_of_2(sums_where(other <= here, gates), EXACT)[:, None]
        finding = reading
        if BEFORE:
            finding = power_of_2(sums_where(other < here, gates), EXACT)[:, None]
        writing = power_of_2(sums_where(other > here, gates), EXACT)[:, None]
        total = power_of_2(tl.sum(gates, 0), EXACT)
    else:
        sums += row * K
        b = at_token(sums, ic, count, heads, ik, K)
        last = tl.load(sums + (count - 1) * heads * K + ik, mask=ik < K, other=0.0)
        reading = tl.exp2(b).to(tl.float32)
        finding = reading
        if BEFORE:
            finding = tl.exp2(at_token(sums, ic - 1, count, heads, ik, K)).to(tl.float32)
        writing = tl.exp2(last[None, :] - b).to(tl.float32)
        total = tl.exp2(last).to(tl.float32)
    return reading, finding, writing, total


@triton.jit
def gates_between(sums, count, heads, ic, ik, K: tl.constexpr):
    """The gates of a chunk's tokens, as differences of their sums: C × K."""
    return at_token(sums, ic, count, heads, ik, K) - at_token(sums, ic - 1, count, heads, ik, K)


@triton.jit
def meeting(
    sums, level, steepest, count, heads, ic, ik, C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr,
    MILD: tl.constexpr,
):  # fmt: skip
    """e^{b - b_m}, e^{c - b_m}, e^{b_m - b} for tokens that meet at level's middles m; which pairs are in one block of
    twice 2^level tokens; the level that is left to do, none if this one was mild."""
    mild = steepest * (1 << level) > -MILD
    asking, writing = faded(sums, level, mild, count, heads, ik, C, K, False)
    finding = asking
    if BEFORE:
        finding, _ = faded(sums, level, mild, count, heads, ik, C, K, True)
    block = (ic[:, None] ^ ic[None, :]) >> level < 2
    return asking, finding, writing, block, level - 1 - mild.to(tl.int32) * C


@triton.jit
def pinned(x):
    """x, which the compiler may not find anew in another layout, nor before its turn.

    It would move the layout of every dot through whatever is element by element and without effects, exponentials
    included, and out of loops what does not change there: an empty instruction "with effects" stops it.
    """
    if COMPILED and x.dtype != tl.float32:
        x = tl.inline_asm_elementwise("", "=r,0", [x], x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def weighed(x, fade):
    """x · fade in x's dtype, for dots."""
    return pinned((pinned(x).to(tl.float32) * fade).to(x.dtype))


@triton.jit
def decays_between(gates, ic, BEFORE: tl.constexpr, TURNED: tl.constexpr, EXACT: tl.constexpr):
    """e^{b_i - b_j} (BEFORE: e^{b_{i-1} - b_j}) where j < i, else 0, of a gate of one number a token. TURNED: j i."""
    each = gates.to(tl.float64) if EXACT else gates
    until = tl.cumsum(each, 0)
    asked = until - each if BEFORE else until
    if TURNED:
        exponent = (asked[None, :] - until[:, None]).to(tl.float32)
        exponent = tl.where(ic[None, :] > ic[:, None], exponent, -float("inf"))
    else:
        exponent = (asked[:, None] - until[None, :]).to(tl.float32)
        exponent = tl.where(ic[:, None] > ic[None, :], exponent, -float("inf"))
    return power_of_2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL), EXACT)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def rank_one_sums(
    g, borders, sums, tokens, heads, sequences,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Running sums of a gate a channel within every chunk, in units of log 2; with EXACT in float64.

    A decay between two tokens is then one difference, for every level of halves, in every kernel.
    """
    pid = tl.program_id(0)
    ik = (pid % SLICES) * BK + tl.arange(0, BK)
    h = (pid // SLICES) % heads
    _, start, begin, count = chunk_of(borders, pid // SLICES // heads, tokens, sequences, C, PACKED)
    ic = tl.arange(0, C)
    at = ((start + begin) * heads + h) * K + ic[:, None] * (heads * K) + ik[None, :]
    ok = (ic < count)[:, None] & (ik < K)[None, :]
    gates = gates_of(g, at, ok)
    if EXACT:
        gates = gates.to(tl.float64)
    tl.store(sums + at, tl.cumsum(gates, 0), mask=ok)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def rank_one_prepare(
    q, e, w, k, beta, g, sums, borders, inverse, mixed, reads, more_reads, finding, asking, writing, adding,
    totals, tokens, heads, sequences,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, BEFORE: tl.constexpr, TWO: tl.constexpr, BETA: tl.constexpr, PACKED: tl.constexpr,
    EXACT: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr, SOLVING: tl.constexpr,
):  # fmt: skip
    """Of every chunk T, -T N, R, R with two writes (b t h C each), -W, q e^b - P W, w', k' (b t h K) and e^{b_C}.

    e is None where it is w, and k where there is one write. Through slices of K twice: for the scores, then with T.
    """
    pid = tl.program_id(0)
    h = pid % heads
    n, start, begin, count = chunk_of(borders, pid // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    ic = tl.arange(0, C)
    here, other = ic[:, None], ic[None, :]
    inside = ic < count
    row = (start + begin) * heads + h
    strength = tl.full((C,), 1.0, tl.float32)
    if BETA:
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
    if GATE == 2:
        gates = gates_of(g, row + ic * heads, inside)
    L = tl.zeros((C, C), tl.float32)
    P = tl.zeros((C, C), tl.float32)
    own = tl.zeros((C,), tl.float32)
    if TWO:
        N = tl.zeros((C, C), tl.float32)
        Q = tl.zeros((C, C), tl.float32)
        more = tl.zeros((C,), tl.float32)
    for s in tl.static_range(SLICES):
        ik = s * BK + tl.arange(0, BK)
        at = ic[:, None] * (heads * K) + ik[None, :]
        ok = inside[:, None] & (ik < K)[None, :]
        bq = tl.load(q + row * K + at, mask=ok, other=0.0)
        bw = tl.load(w + row * K + at, mask=ok, other=0.0)
        be = bw
        if BEFORE:
            be = tl.load(e + row * K + at, mask=ok, other=0.0)
        if TWO:
            be = -be
            bk = tl.load(k + row * K + at, mask=ok, other=0.0)
            more += tl.sum(bq.to(tl.float32) * bk.to(tl.float32), 1)
        own += tl.sum(bq.to(tl.float32) * bw.to(tl.float32), 1)
        if GATE == 3:
            steepest = tl.min(gates_between(sums + row * K, count, heads, ic, ik, K))
            level = LEVELS + 3
            while level >= 0:
                to_ask, to_find, to_write, block, level = meeting(
                    sums + row * K, level, steepest, count, heads, ic, ik, C, K, BEFORE, MILD
                )
                meet = block & (here > other)
                asked, found, keys = weighed(bq, to_ask), weighed(be, to_find), weighed(bw, to_write)
                L += tl.where(meet, tl.dot(found, tl.trans(keys), input_precision=PRECISION), 0.0)
                P += tl.where(meet, tl.dot(asked, tl.trans(keys), input_precision=PRECISION), 0.0)
                if TWO:
                    keys = weighed(bk, to_write)
                    N += tl.where(meet, tl.dot(found, tl.trans(keys), input_precision=PRECISION), 0.0)
                    Q += tl.where(meet, tl.dot(asked, tl.trans(keys), input_precision=PRECISION), 0.0)
        else:
            L += tl.dot(be, tl.trans(bw), input_precision=PRECISION)
            P += tl.dot(bq, tl.trans(bw), input_precision=PRECISION)
            if TWO:
                N += tl.dot(be, tl.trans(bk), input_precision=PRECISION)
                Q += tl.dot(bq, tl.trans(bk), input_precision=PRECISION)
    if GATE == 2:
        between = decays_between(gates, ic, BEFORE, False, EXACT)
        L = L * between
        if TWO:
            N = N * between
        between = decays_between(gates, ic, False, False, EXACT)
        P = P * between
        if TWO:
            Q = Q * between
    L = tl.where(here > other, L, 0.0)
    P = tl.where(here > other, P, tl.where(here == other, own[:, None], 0.0)) * strength[None, :]
    Y = solved_by_halves(L, strength, here, other, LEVELS + 4, SOLVING)
    X = tl.where(here == other, 1.0, -Y * strength[None, :])
    R = tl.dot(P, X, input_precision=SOLVING)
    to = here * (heads * C) + other
    tl.store(inverse + row * C + to, X, mask=inside[:, None])
    if TWO:
        N = tl.dot(X, tl.where(here > other, N, 0.0), input_precision=SOLVING)
        tl.store(mixed + row * C + to, -N, mask=inside[:, None])
        Q = tl.where(here > other, Q, tl.where(here == other, more[:, None], 0.0))
        Q -= tl.dot(P, N, input_precision=SOLVING)
        tl.store(more_reads + row * C + to, Q, mask=inside[:, None])
    tl.store(reads + row * C + to, R, mask=inside[:, None])

    solved, asks = X.to(inverse.dtype.element_ty), P.to(inverse.dtype.element_ty)
    slot = place_of(start, n, begin, C) * heads + h
    for s in tl.static_range(SLICES):
        ik = s * BK + tl.arange(0, BK)
        at = ic[:, None] * (heads * K) + ik[None, :]
        ok = inside[:, None] & (ik < K)[None, :]
        seen = tl.load(q + row * K + at, mask=ok, other=0.0).to(tl.float32)
        bw = tl.load(w + row * K + at, mask=ok, other=0.0)
        be = bw
        if BEFORE:
            be = tl.load(e + row * K + at, mask=ok, other=0.0)
        if TWO:
            be = -be
        written = strength[:, None] * bw.to(tl.float32)
        if GATE != 0:
            reach, find, last, total = fades_of(g, sums, row, count, heads, ic, ik, K, GATE, BEFORE, EXACT)
            seen = seen * reach
            be = (be.to(tl.float32) * find).to(be.dtype)
            written = written * last
            if GATE == 3:
                tl.store(totals + slot * K + ik, total, mask=ik < K)
            else:
                tl.store(totals + slot, total)
        found = tl.dot(solved, be, input_precision=PRECISION)
        seen -= tl.dot(asks, found.to(be.dtype), input_precision=PRECISION)
        tl.store(finding + row * K + at, -found, mask=ok)
        tl.store(asking + row * K + at, seen, mask=ok)
        tl.store(writing + row * K + at, written, mask=ok)
        if TWO:
            added = tl.load(k + row * K + at, mask=ok, other=0.0).to(tl.float32)
            if GATE != 0:
                added = added * last
            tl.store(adding + row * K + at, added, mask=ok)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def rank_one_reverse(
    q, e, w, k, beta, g, sums, borders, inverse, mixed, finding, asking, writing, adding,
    tokens, heads, sequences,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    BEFORE: tl.constexpr, TWO: tl.constexpr, BETA: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """-e e^c, q e^b, Tᵀ w' and, with two writes, k' - (T N)ᵀ w' of every chunk, for a slice of K: b t h K each."""
    pid = tl.program_id(0)
    ik = (pid % SLICES) * BK + tl.arange(0, BK)
    h = (pid // SLICES) % heads
    _, start, begin, count = chunk_of(borders, pid // SLICES // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    ic = tl.arange(0, C)
    inside = ic < count
    row = (start + begin) * heads + h
    at = ic[:, None] * (heads * K) + ik[None, :]
    ok = inside[:, None] & (ik < K)[None, :]
    across = ic[None, :] * (heads * C) + ic[:, None]
    solved = tl.load(inverse + row * C + across, mask=inside[None, :], other=0.0)
    bw = tl.load(w + row * K + at, mask=ok, other=0.0)
    seen = tl.load(q + row * K + at, mask=ok, other=0.0).to(tl.float32)
    written = bw.to(tl.float32)
    found = -written
    if BEFORE:
        found = -tl.load(e + row * K + at, mask=ok, other=0.0).to(tl.float32)
    if TWO:
        found = -found
        added = tl.load(k + row * K + at, mask=ok, other=0.0).to(tl.float32)
    if BETA:
        written = written * tl.load(beta + row + ic * heads, mask=inside, other=0.0)[:, None]
    if GATE != 0:
        reach, find, last, _ = fades_of(g, sums, row, count, heads, ic, ik, K, GATE, BEFORE, EXACT)
        seen = seen * reach
        found = found * find
        written = written * last
        if TWO:
            added = added * last
    written = written.to(bw.dtype)
    tl.store(finding + row * K + at, found, mask=ok)
    tl.store(asking + row * K + at, seen, mask=ok)
    tl.store(writing + row * K + at, tl.dot(solved, written, input_precision=PRECISION), mask=ok)
    if TWO:
        turned = tl.load(mixed + row * C + across, mask=inside[None, :], other=0.0)
        tl.store(adding + row * K + at, tl.dot(turned, written, added, input_precision=PRECISION), mask=ok)


@triton.jit
def fade_of(totals, slot, wanted, ix, X: tl.constexpr, GATE: tl.constexpr):
    """How a chunk fades the rows of the memory: a number, or a column of them."""
    if GATE == 3:
        return tl.load(totals + slot * X + ix, mask=(ix < X) & wanted, other=0.0)[:, None]
    else:
        return tl.load(totals + slot, mask=wanted, other=0.0)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots"])
def rank_one_sweep(
    z, A, B, A2, B2, F, F2, totals, borders, entry, x, out, states, end, moves, tokens, heads, segments, slots,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, OUT: tl.constexpr, MORE: tl.constexpr, KEEP: tl.constexpr, SPAN: tl.constexpr,
    MOVES: tl.constexpr,
):  # fmt: skip
    """x = A z + B S, with OUT out = A2 z + B2 S, S <- e^{b_C} S + Fᵀ x, with MORE + F2ᵀ z: one slice of V, X = K, over
    one segment.

    REVERSE: from the last chunk to the first, with A and A2 transposed. With KEEP x is stored, and the state that comes
    into every chunk, in the tokens' dtype. SPAN: nothing but what the segment does to a state, S -> (moves) S + (end);
    by MOVES more programs `moves`, the state that the segment makes of the identity without z.
    """
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES + MOVES, PACKED)
    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    cell = ix[:, None] * Z + iz[None, :]
    in_cell = in_x[:, None] & in_z[None, :]
    nh = (n * heads + h).to(tl.int64)
    if ENTRY:
        S = tl.load(entry + (nh * slots + segment) * X * Z + cell, mask=in_cell, other=0.0)
    elif MOVES > 0:
        im = iz - SLICES * BZ  # columns of the identity, behind all of z
        S = tl.where(ix[:, None] == im[None, :], 1.0, 0.0)
    else:
        S = tl.zeros((BX, BZ), tl.float32)
    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    if REVERSE:
        at_c = ic[:, None] + ic[None, :] * (heads * C)
    else:
        at_c = ic[:, None] * (heads * C) + ic[None, :]
    chunks = tl.cdiv(stop - first, C)
    slot = place_of(start, n, first + (chunks - 1) * C if REVERSE else first, C) * heads + h
    if GATE != 0:  # what feeds no dot is not pipelined: asked for a chunk before it is needed
        fade = fade_of(totals, slot, chunks > 0, ix, X, GATE)
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C if REVERSE else first + i * C
        inside = ic < tl.minimum(stop - begin, C)
        row = (start + begin) * heads + h
        coming = slot - heads if REVERSE else slot + heads
        if GATE != 0:
            fade_then = fade_of(totals, coming, i + 1 < chunks, ix, X, GATE)
        in_rows_x = inside[:, None] & in_x[None, :]
        in_rows_z = inside[:, None] & in_z[None, :]
        in_rows_c = inside[None, :] if REVERSE else inside[:, None]  # beyond the last token, columns are zeros
        bz = tl.load(z + row * Z + at_z, mask=in_rows_z, other=0.0)
        bA = tl.load(A + row * C + at_c, mask=in_rows_c, other=0.0)
        bB = tl.load(B + row * X + at_x, mask=in_rows_x, other=0.0)
        bF = tl.load(F + row * X + at_x, mask=in_rows_x, other=0.0)
        before = S.to(bz.dtype)
        if KEEP:
            tl.store(states + slot * X * Z + cell, before, mask=in_cell)
        new = tl.dot(bA, bz, input_precision=PRECISION)
        new = plus_product(new, bB, before, inside[:, None], PRECISION)
        if GATE != 0:
            S = S * fade
        S = plus_product(S, tl.trans(bF), new.to(bz.dtype), in_x[:, None], PRECISION)
        if MORE:
            bF2 = tl.load(F2 + row * X + at_x, mask=in_rows_x, other=0.0)
            S = plus_product(S, tl.trans(bF2), bz, in_x[:, None], PRECISION)
        if KEEP:
            tl.store(x + row * Z + at_z, new, mask=in_rows_z)
        if OUT:
            bA2 = tl.load(A2 + row * C + at_c, mask=in_rows_c, other=0.0)
            bB2 = tl.load(B2 + row * X + at_x, mask=in_rows_x, other=0.0)
            o = tl.dot(bA2, bz, input_precision=PRECISION)
            o = plus_product(o, bB2, before, inside[:, None], PRECISION)
            tl.store(out + row * Z + at_z, o, mask=in_rows_z)
        slot = coming
        if GATE != 0:
            fade = fade_then
    if SPAN:
        slot = segment if REVERSE else segment + 1
        tl.store(end + (nh * slots + slot) * X * Z + cell, S, mask=in_cell)
    elif slots == 1:
        tl.store(end + nh * X * Z + cell, S, mask=in_cell)
    if MOVES > 0:
        to = moves + (nh * segments + segment) * X * X + ix[:, None] * X + im[None, :]
        tl.store(to, S, mask=in_x[:, None] & (im >= 0)[None, :] & (im < X)[None, :])


@triton.jit
def sums_behind_of_channels(later, erasing, ic, BEFORE: tl.constexpr, EXACT: tl.constexpr):
    """Σ_{s>=t} later + Σ_{s>=t, BEFORE: s>t} erasing: C × K, as products with zeros and ones.

    EXACT: nothing is taken off again, since under strong gates what remains is much smaller. Else by `summed`, a
    quarter of a scan's instructions.
    """
    here, other = ic[:, None], ic[None, :]
    if EXACT:
        value = tl.dot((other >= here).to(tl.float32), later, input_precision="ieee")
        until = (other > here) if BEFORE else (other >= here)
        value = tl.dot(until.to(tl.float32), erasing, value, input_precision="ieee")
    else:
        value = summed(other >= here, later + erasing, PART)
        if BEFORE:
            value -= erasing
    return value


@triton.jit
def gate_sums(begun, later, kept, erasing, ic, BEFORE: tl.constexpr, EXACT: tl.constexpr):
    """begun + Σ_{s<t} kept + `sums_behind_of_channels`: C × K."""
    if EXACT:
        value = begun[None, :] + sums_behind_of_channels(later, erasing, ic, BEFORE, EXACT)
        before = (ic[None, :] < ic[:, None]).to(tl.float32)
        value = tl.dot(before, kept, value, input_precision="ieee")
    else:
        value = (begun + tl.sum(kept, 0))[None, :]
        value += sums_behind_of_channels(later - kept, erasing, ic, BEFORE, EXACT)
    return value


@triton.jit(do_not_specialize=["tokens", "heads", "sequences", "count_rows"])
def rank_one_gradients(
    do, y, r, v, q, e, w, k, beta, g, sums, borders, states, cotangents, seen, erased, seen_v, erased_v,
    dq, de, dw, dk, dbeta, dg, tokens, heads, sequences, count_rows,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, BEFORE: tl.constexpr, TWO: tl.constexpr, BETA: tl.constexpr, GATES: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What comes through states and their cotangents to dq, de (with two writes that of -e), dw (without BEFORE dw +
    de) and dk of two writes, for a slice of K of every chunk; this slice's part of dβ; with GATES dg or, of one number
    a token, this slice's part of it. And for `rank_one_pairs` tril(do rᵀ), stril(y rᵀ), with two writes also
    tril(do vᵀ), stril(y vᵀ): b t h C.

    Parts lie as slices b t h.
    """
    pid = tl.program_id(0)
    s = pid % SLICES
    ik = s * BK + tl.arange(0, BK)
    h = (pid // SLICES) % heads
    n, start, begin, count = chunk_of(borders, pid // SLICES // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    ic = tl.arange(0, C)
    here, other = ic[:, None], ic[None, :]
    in_k, inside = ik < K, ic < count
    row = (start + begin) * heads + h
    slot = place_of(start, n, begin, C) * heads + h
    asked = tl.zeros((C, BK), tl.float32)
    found = tl.zeros((C, BK), tl.float32)
    written = tl.zeros((C, BK), tl.float32)
    begun = tl.zeros((BK,), tl.float32)
    A = tl.zeros((C, C), tl.float32)
    B = tl.zeros((C, C), tl.float32)
    if TWO:
        added = tl.zeros((C, BK), tl.float32)
        Av = tl.zeros((C, C), tl.float32)
        Bv = tl.zeros((C, C), tl.float32)
    for j in tl.static_range(0, V, BV):  # in a loop shared memory would lie as loads do, not as dots read
        iv = j + tl.arange(0, BV)
        at_v = row * V + here * (heads * V) + iv[None, :]
        ok_v = inside[:, None] & (iv < V)[None, :]
        cell = slot * K * V + ik[:, None] * V + iv[None, :]
        in_cell = in_k[:, None] & (iv < V)[None, :]
        bdo = tl.load(do + at_v, mask=ok_v, other=0.0)
        by = tl.load(y + at_v, mask=ok_v, other=0.0)
        br = tl.load(r + at_v, mask=ok_v, other=0.0)
        S = tl.load(states + cell, mask=in_cell, other=0.0)
        E = tl.load(cotangents + cell, mask=in_cell, other=0.0)
        asked = tl.dot(bdo, tl.trans(S), asked, input_precision=PRECISION)
        found = tl.dot(by, tl.trans(S), found, input_precision=PRECISION)
        written = tl.dot(br, tl.trans(E), written, input_precision=PRECISION)
        A = tl.dot(bdo, tl.trans(br), A, input_precision=PRECISION)
        B = tl.dot(by, tl.trans(br), B, input_precision=PRECISION)
        if TWO:
            bv = tl.load(v + at_v, mask=ok_v, other=0.0)
            added = tl.dot(bv, tl.trans(E), added, input_precision=PRECISION)
            Av = tl.dot(bdo, tl.trans(bv), Av, input_precision=PRECISION)
            Bv = tl.dot(by, tl.trans(bv), Bv, input_precision=PRECISION)
        if GATES:
            begun += tl.sum(S.to(tl.float32) * E.to(tl.float32), 1)

    along = row * C + here * (heads * C) + other
    once = inside[:, None] & (s == 0)
    tl.store(seen + along, tl.where(here >= other, A, 0.0), mask=once)
    tl.store(erased + along, tl.where(here > other, B, 0.0), mask=once)
    if TWO:
        tl.store(seen_v + along, tl.where(here >= other, Av, 0.0), mask=once)
        tl.store(erased_v + along, tl.where(here > other, Bv, 0.0), mask=once)
    at = here * (heads * K) + ik[None, :]
    ok = inside[:, None] & in_k[None, :]
    strength = tl.full((C,), 1.0, tl.float32)
    if BETA:
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
    found = -found
    if GATE != 0:
        reach, find, last, total = fades_of(g, sums, row, count, heads, ic, ik, K, GATE, BEFORE, EXACT)
        asked, found, written = asked * reach, found * find, written * last
        begun = begun * total
        if TWO:
            added = added * last
    bw = tl.load(w + row * K + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(dq + row * K + at, asked, mask=ok)
    if BETA:
        to_beta = dbeta + s.to(tl.int64) * count_rows + row + ic * heads
        tl.store(to_beta, tl.sum(bw * written, 1), mask=inside)
    change = written * strength[:, None]
    if BEFORE:
        tl.store(de + row * K + at, -found if TWO else found, mask=ok)
        tl.store(dw + row * K + at, change, mask=ok)
    else:
        tl.store(dw + row * K + at, change + found, mask=ok)
    if TWO:
        tl.store(dk + row * K + at, added, mask=ok)
    if GATES:
        later = tl.load(q + row * K + at, mask=ok, other=0.0).to(tl.float32) * asked
        kept = bw * change
        be = bw
        if BEFORE:
            be = tl.load(e + row * K + at, mask=ok, other=0.0).to(tl.float32)
        if TWO:
            be = -be
            kept += tl.load(k + row * K + at, mask=ok, other=0.0).to(tl.float32) * added
        if GATE == 3:
            value = gate_sums(begun, later, kept, be * found, ic, BEFORE, EXACT)
            tl.store(dg + row * K + at, value, mask=ok)
        else:  # '' too: pairs that cancel would not, had they been rounded on their way to `rank_one_pairs`
            gates = gates_of(g, row + ic * heads, inside)
            bq, keys = tl.load(q + row * K + at, mask=ok, other=0.0), tl.load(w + row * K + at, mask=ok, other=0.0)
            A = A * strength[None, :] * tl.dot(bq, tl.trans(keys), input_precision=PRECISION)
            finders = be.to(keys.dtype)
            B = B * strength[None, :] * tl.dot(finders, tl.trans(keys), input_precision=PRECISION)
            if TWO:
                keys = tl.load(k + row * K + at, mask=ok, other=0.0)
                A += Av * tl.dot(bq, tl.trans(keys), input_precision=PRECISION)
                B += Bv * tl.dot(finders, tl.trans(keys), input_precision=PRECISION)
            A = A * decays_between(gates, ic, False, False, EXACT)
            B = -B * decays_between(gates, ic, BEFORE, False, EXACT)
            later = tl.sum(later, 1) + tl.sum(A, 1) - tl.sum(A + B, 0)
            value = tl.sum(begun, 0) + sums_behind(later, tl.sum(be * found, 1) + tl.sum(B, 1), ic, BEFORE)
            value += sums_where(other < here, tl.sum(kept, 1))
            to_gates = dg + s.to(tl.int64) * count_rows + row + ic * heads
            tl.store(to_gates, tl.where(gates < NOTHING, 0.0, value), mask=inside)


@triton.jit
def scores_at(seen, erased, at, ok, decay, decay_before, which, GATE: tl.constexpr):
    """A chunk's do rᵀ and -y rᵀ off the diagonal, with the decays of a gate of one number a token."""
    a, b = tl.load(seen + at, mask=ok, other=0.0), tl.load(erased + at, mask=ok, other=0.0)
    if GATE == 2:
        a, b = (a.to(tl.float32) * decay).to(a.dtype), (b.to(tl.float32) * decay_before).to(b.dtype)
    return tl.where(which, a, 0.0).to(a.dtype), tl.where(which, -b, 0.0).to(b.dtype)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences", "count_rows"])
def rank_one_pairs(
    q, e, w, k, beta, g, sums, borders, seen, erased, seen_v, erased_v, dq, de, dw, dk, dbeta, dg,
    tokens, heads, sequences, count_rows,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, TWO: tl.constexpr, BETA: tl.constexpr,
    GATES: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to what `rank_one_gradients` left what comes from other tokens of the chunk, and from a token itself; with
    GATES to a gate's gradient, too, of a number a channel."""
    pid = tl.program_id(0)
    s = pid % SLICES
    ik = s * BK + tl.arange(0, BK)
    h = (pid // SLICES) % heads
    _, start, begin, count = chunk_of(borders, pid // SLICES // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    ic = tl.arange(0, C)
    here, other = ic[:, None], ic[None, :]
    in_k, inside = ik < K, ic < count
    row = (start + begin) * heads + h
    at = here * (heads * K) + ik[None, :]
    ok = inside[:, None] & in_k[None, :]
    bq = tl.load(q + row * K + at, mask=ok, other=0.0)
    bw = tl.load(w + row * K + at, mask=ok, other=0.0)
    be = bw
    if BEFORE:
        be = tl.load(e + row * K + at, mask=ok, other=0.0)
    if TWO:
        be = -be
        bk = tl.load(k + row * K + at, mask=ok, other=0.0)
    strength = tl.full((C,), 1.0, tl.float32)
    if BETA:
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
    decay, decay_before, turned_decay, turned_before = 1.0, 1.0, 1.0, 1.0
    if GATE == 2:
        gates = gates_of(g, row + ic * heads, inside)
        decay = decays_between(gates, ic, False, False, EXACT)
        decay_before = decays_between(gates, ic, BEFORE, False, EXACT)
        turned_decay = decays_between(gates, ic, False, True, EXACT)
        turned_before = decays_between(gates, ic, BEFORE, True, EXACT)
    along = row * C + here * (heads * C) + other
    across = row * C + here + other * (heads * C)
    A, B = scores_at(seen, erased, along, inside[:, None], decay, decay_before, here > other, GATE)
    A = (A.to(tl.float32) * strength[None, :]).to(bq.dtype)
    B = (B.to(tl.float32) * strength[None, :]).to(bq.dtype)
    At, Bt = scores_at(seen, erased, across, inside[None, :], turned_decay, turned_before, here < other, GATE)
    if TWO:
        Av, Bv = scores_at(seen_v, erased_v, along, inside[:, None], decay, decay_before, here > other, GATE)
        Avt, Bvt = scores_at(seen_v, erased_v, across, inside[None, :], turned_decay, turned_before, here < other, GATE)
    if GATE == 3:
        asked = tl.zeros((C, BK), tl.float32)
        found = tl.zeros((C, BK), tl.float32)
        pairs = tl.zeros((C, BK), tl.float32)
        if TWO:
            more = tl.zeros((C, BK), tl.float32)
        gates = gates_between(sums + row * K, count, heads, ic, ik, K)
        steepest = tl.min(gates)
        level = LEVELS + 3
        while level >= 0:
            to_ask, to_find, to_write, block, level = meeting(
                sums + row * K, level, steepest, count, heads, ic, ik, C, K, BEFORE, MILD
            )
            keys = weighed(bw, to_write)
            change = tl.dot(pinned(tl.where(block, pinned(A), 0.0)), keys, input_precision=PRECISION)
            change_found = tl.dot(pinned(tl.where(block, pinned(B), 0.0)), keys, input_precision=PRECISION)
            if TWO:
                keys = weighed(bk, to_write)
                change = tl.dot(pinned(tl.where(block, pinned(Av), 0.0)), keys, change, input_precision=PRECISION)
                change_found = tl.dot(
                    pinned(tl.where(block, pinned(Bv), 0.0)), keys, change_found, input_precision=PRECISION
                )
            asked += to_ask * change
            found += to_find * change_found
            queries, finders = weighed(bq, to_ask), weighed(be, to_find)
            change = tl.dot(pinned(tl.where(block, pinned(At), 0.0)), queries, input_precision=PRECISION)
            change = tl.dot(pinned(tl.where(block, pinned(Bt), 0.0)), finders, change, input_precision=PRECISION)
            pairs += to_write * change
            if TWO:
                change = tl.dot(pinned(tl.where(block, pinned(Avt), 0.0)), queries, input_precision=PRECISION)
                change = tl.dot(pinned(tl.where(block, pinned(Bvt), 0.0)), finders, change, input_precision=PRECISION)
                more += to_write * change
    else:
        asked = tl.dot(A, bw, input_precision=PRECISION)
        found = tl.dot(B, bw, input_precision=PRECISION)
        pairs = tl.dot(At, bq, input_precision=PRECISION)
        pairs = tl.dot(Bt, be, pairs, input_precision=PRECISION)
        if TWO:
            asked = tl.dot(Av, bk, asked, input_precision=PRECISION)
            found = tl.dot(Bv, bk, found, input_precision=PRECISION)
            more = tl.dot(Avt, bq, input_precision=PRECISION)
            more = tl.dot(Bvt, be, more, input_precision=PRECISION)

    own = tl.load(seen + row * C + ic * (heads * C + 1), mask=inside, other=0.0).to(tl.float32)[:, None]
    wide, strong = bq.to(tl.float32), bw.to(tl.float32) * strength[:, None]
    if GATES:
        later = wide * asked - strong * pairs
        erasing = be.to(tl.float32) * found
        if TWO:
            later -= bk.to(tl.float32) * more
        value = sums_behind_of_channels(later, erasing, ic, BEFORE, EXACT)
        value += tl.load(dg + row * K + at, mask=ok, other=0.0)
        tl.store(dg + row * K + at, tl.where(gates < NOTHING, 0.0, value), mask=ok)
    asked += own * strong
    if TWO:
        own_v = tl.load(seen_v + row * C + ic * (heads * C + 1), mask=inside, other=0.0).to(tl.float32)[:, None]
        asked += own_v * bk.to(tl.float32)
        more += own_v * wide + tl.load(dk + row * K + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(dk + row * K + at, more, mask=ok)
    asked += tl.load(dq + row * K + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(dq + row * K + at, asked, mask=ok)
    pairs += own * wide
    if BETA:
        to_beta = dbeta + s.to(tl.int64) * count_rows + row + ic * heads
        change = tl.sum(bw.to(tl.float32) * pairs, 1) + tl.load(to_beta, mask=inside, other=0.0)
        tl.store(to_beta, change, mask=inside)
        pairs = pairs * strength[:, None]
    if BEFORE:
        if TWO:
            found = -found
        found += tl.load(de + row * K + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(de + row * K + at, found, mask=ok)
    else:
        pairs += found
    pairs += tl.load(dw + row * K + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(dw + row * K + at, pairs, mask=ok)


@triton.jit
def rank_one_step(
    q, e, w, k, v, beta, g, memory, o,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, GATE: tl.constexpr,
    BEFORE: tl.constexpr, TWO: tl.constexpr, BETA: tl.constexpr,
):  # fmt: skip
    """One token of one head, a slice of V: reads and writes its part of the memory once, in place."""
    pid = tl.program_id(0)
    row = (pid // SLICES).to(tl.int64)
    ik = tl.arange(0, BK)
    iv = (pid % SLICES) * BV + tl.arange(0, BV)
    in_k, in_v = ik < K, iv < V
    cell = memory + row * K * V + ik[:, None] * V + iv[None, :]
    in_cell = in_k[:, None] & in_v[None, :]
    M = tl.load(cell, mask=in_cell, other=0.0)
    bq = tl.load(q + row * K + ik, mask=in_k, other=0.0).to(tl.float32)
    bw = tl.load(w + row * K + ik, mask=in_k, other=0.0).to(tl.float32)
    bv = tl.load(v + row * V + iv, mask=in_v, other=0.0).to(tl.float32)
    if BEFORE:
        be = tl.load(e + row * K + ik, mask=in_k, other=0.0).to(tl.float32)
        found = tl.sum(be[:, None] * M, 0)
    if GATE == 2:
        M = M * tl.exp(tl.load(g + row))
    if GATE == 3:
        M = M * tl.exp(tl.load(g + row * K + ik, mask=in_k, other=0.0))[:, None]
    if not BEFORE:
        found = tl.sum(bw[:, None] * M, 0)
    if TWO:
        r = found
        bk = tl.load(k + row * K + ik, mask=in_k, other=0.0).to(tl.float32)
        M = M + bk[:, None] * bv[None, :]
    else:
        r = bv - found
    if BETA:
        r = r * tl.load(beta + row)
    M = M + bw[:, None] * r[None, :]
    tl.store(cell, M, mask=in_cell)
    tl.store(o + row * V + iv, tl.sum(bq[:, None] * M, 0), mask=in_v)


# ------------------------------------------------------------------------------------------------ the launchers
# Tensors are contiguous, K and V multiples of 16, beta, gates and memories float32. beta : None | b t h,
# g : None | b t h | b t h K, a b : None | b t h K. With b there are two writes; beta goes with one.


def chunk_for(q: Tensor) -> int:
    """Tokens a chunk: at most K of them."""
    return min(padded(q.shape[-1]), CHUNK[q.element_size()])


def kind_of(q: Tensor, beta: Tensor | None, g: Tensor | None, a: Tensor | None, b: Tensor | None) -> dict:
    gate = NONE if g is None else CHANNEL if g.ndim == q.ndim else TOKEN
    return {"GATE": gate, "BEFORE": a is not None, "TWO": b is not None, "BETA": beta is not None}


def vectors_of(k: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """(e, w, k) as kernels take them: None where e is w, and where there is one write."""
    return a, k if b is None else b, None if b is None else k


def slots_of(q: Tensor, borders: Tensor | None) -> int:
    """Places for something a chunk."""
    return places(q, borders, chunk_for(q))


def in_chunks(q: Tensor, borders: Tensor | None, kernel: str) -> tuple[dict, int]:
    """The sizes of a kernel that takes chunks in any order, a program each; the chunks of all sequences and heads."""
    chunk = chunk_for(q)
    shape = in_chunks_by_numbers(q.shape[-1], chunk, q.element_size(), borders is not None, kernel)
    return shape, chunks_of(q, borders, chunk) * q.shape[2]


@functools.cache
def in_chunks_by_numbers(K: int, chunk: int, width: int, packed: bool, kernel: str) -> dict:
    columns, warps, registers = CHUNKS[width][kernel]
    block = min(columns, padded(K))
    kind = {"PACKED": packed, "EXACT": width == 4, "PRECISION": "ieee"}
    options = {"num_warps": warps, "num_stages": 1 if width == 4 else 2}
    if registers is not None and not decay.INTERPRETED:
        options["maxnreg"] = registers
    return {"K": K, "BK": block, "SLICES": cdiv(K, block), "C": chunk, **kind, **options}


def levels_of(q: Tensor) -> int:
    return (chunk_for(q) // 16).bit_length() - 1


def sums_in_chunks(q: Tensor, g: Tensor | None, borders: Tensor | None) -> Tensor | None:
    """`rank_one_sums`: running sums of a gate a channel (b t h K), for float32 tokens in float64."""
    if g is None or g.ndim == 3:
        return None
    shape, programs = in_chunks(q, borders, "prepare")
    block = min(128, padded(shape["K"]))  # with one warp a thread has all tokens of its channels, and a scan is sums
    slices, exact = cdiv(shape["K"], block), shape["EXACT"]
    sums = torch.empty_like(g, dtype=torch.float64 if exact else g.dtype)
    decay.launch(
        rank_one_sums, programs * slices,
        g, borders, sums, q.shape[1], q.shape[2], sequences_of(q, borders),
        K=shape["K"], BK=block, SLICES=slices, C=shape["C"], PACKED=shape["PACKED"], EXACT=exact, num_warps=1,
    )  # fmt: skip
    return sums


def solved(q: Tensor, g: Tensor | None, b: Tensor | None, borders: Tensor | None) -> list[Tensor]:
    """Room for T, -T N, R, R of v (b t h C) and e^{b_C} (a place a chunk, h, and K if the gate has it); empty is what
    there is not."""
    square, slots = (*q.shape[:3], chunk_for(q)), slots_of(q, borders)
    squares = [q.new_empty(square if b is not None or i in (0, 2) else 0) for i in range(4)]
    fades = 0 if g is None else (slots, q.shape[2]) if g.ndim == 3 else (slots, *q.shape[2:])
    return [*squares, q.new_empty(fades, dtype=torch.float32)]


def prepare(q, k, beta, g, a, b, borders) -> tuple[list[Tensor], list[Tensor | None]]:
    """`rank_one_prepare`: what `solved` has room for, and [-W, q e^b - P W, w', k' or None]."""
    shape, programs = in_chunks(q, borders, "prepare")
    found = solved(q, g, b, borders)
    rows = [torch.empty_like(q) if b is not None or i < 3 else None for i in range(4)]
    decay.launch(
        rank_one_prepare, programs,
        q, *vectors_of(k, a, b), beta, g, sums_in_chunks(q, g, borders), borders, *found[:4], *rows, found[4],
        q.shape[1], q.shape[2], sequences_of(q, borders),
        **shape, **kind_of(q, beta, g, a, b), LEVELS=levels_of(q), MILD=MILD[q.dtype], SOLVING=SOLVING[q.dtype],
    )  # fmt: skip
    return found, rows


def reverse(q, k, beta, g, a, b, sums, borders, inverse, mixed) -> list:
    """`rank_one_reverse`: [-e e^c, q e^b, Tᵀ w', k' - (T N)ᵀ w' or None]."""
    shape, programs = in_chunks(q, borders, "reverse")
    rows = [torch.empty_like(q) if b is not None or i < 3 else None for i in range(4)]
    decay.launch(
        rank_one_reverse, programs * shape["SLICES"],
        q, *vectors_of(k, a, b), beta, g, sums, borders, inverse, mixed, *rows,
        q.shape[1], q.shape[2], sequences_of(q, borders),
        **shape, **kind_of(q, beta, g, a, b),
    )  # fmt: skip
    return rows


def shape_of(B: Tensor, z: Tensor, borders: Tensor | None, span: bool = False) -> dict:
    """The compile-time arguments of a sweep whose state is B's columns × z's columns."""
    sizes = sizes_of(B.shape[-1], z.shape[-1], z.element_size(), span)
    return {**sizes, "C": chunk_for(B), "PACKED": borders is not None}


@functools.cache
def sizes_of(X: int, Z: int, width: int, span: bool) -> dict:
    size = padded(X), width
    columns, warps, stages = SPANS.get(size, CONFIG[size]) if span else CONFIG[size]
    columns = min(columns, padded(Z))
    sizes = {"X": X, "Z": Z, "BX": padded(X), "BZ": columns, "SLICES": cdiv(Z, columns)}
    return {**sizes, "PRECISION": "ieee", "num_warps": warps, "num_stages": stages}


def segments_for(q: Tensor, v: Tensor, sequences: int) -> int:
    """In how many segments to cut each sequence. What a segment does to a memory costs almost as much as the sweeps, so
    only where there are four or more: where not half of the GPU would be busy, and 512 tokens a segment."""
    if padded(q.shape[-1]) > FOLDED:
        return 1
    columns = CONFIG[padded(q.shape[-1]), v.element_size()][0]
    programs = sequences * q.shape[2] * cdiv(v.shape[-1], min(columns, padded(v.shape[-1])))
    wanted = decay.long_enough(2 * decay.multiprocessors(q.device) // max(1, programs), q, sequences)
    return wanted if wanted >= 4 else 1


def moves_of(q: Tensor, borders: Tensor | None, segments: int) -> Tensor:
    """Room for what each segment does to memories; empty where there is one segment."""
    return delta.moves_of(q, borders, segments) if segments > 1 else q.new_empty(0, dtype=torch.float32)


def between(z, A, B, F, F2, g, totals, borders, first, moves, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states between segments (n h segments+1 K V) and the one at the far end (n h K V), from `first`.

    `moves` are filled on the way forwards and read on the way back, where what a segment does is transposed.
    """
    h, segments, X, Z, n = *moves.shape[1:4], z.shape[-1], sequences_of(z, borders)
    shape = shape_of(B, z, borders, span=True)
    states, more = moves.new_empty(n, h, segments + 1, X, Z), 0 if reverse else cdiv(X, shape["BZ"])
    decay.launch(
        rank_one_sweep, (shape["SLICES"] + more) * segments * h * n,
        z, A, B, None, None, F, F2, totals, borders, None, None, None, None, states, moves,
        z.shape[1], h, segments, segments + 1,
        **shape, GATE=kind_of(B, None, g, None, None)["GATE"], REVERSE=reverse,
        ENTRY=False, OUT=False, MORE=F2 is not None, KEEP=False, SPAN=True, MOVES=more,
    )  # fmt: skip
    return states, fold(states, moves, first, reverse, z.element_size() == 4)


def sweep(z, A, B, A2, B2, F, F2, g, totals, borders, entry, moves, *, reverse=False, keep=True, out=None) -> tuple:
    """`rank_one_sweep`: (x, states, the state at the far end). `out` receives the second output; x and states are empty
    unless they are to be kept. In segments where there are `moves`."""
    (_, t, h, Z), X, n = z.shape, B.shape[-1], sequences_of(z, borders)
    shape, segments, slots = shape_of(B, z, borders), 1, 1
    x = torch.empty_like(z) if keep else z.new_empty(0)
    states = z.new_empty((slots_of(B, borders), h, X, Z) if keep else 0)
    if moves.numel():
        segments, slots = moves.shape[2], moves.shape[2] + 1
        entry, end = between(z, A, B, F, F2, g, totals, borders, entry, moves, reverse)
        entry = entry[:, :, 1:] if reverse else entry
    else:
        end = z.new_empty(n, h, X, Z, dtype=torch.float32)
    decay.launch(
        rank_one_sweep, shape["SLICES"] * segments * h * n,
        z, A, B, A2, B2, F, F2, totals, borders, entry, x, out, states, end, None, t, h, segments, slots,
        **shape, GATE=kind_of(B, None, g, None, None)["GATE"], REVERSE=reverse,
        ENTRY=entry is not None, OUT=out is not None, MORE=F2 is not None, KEEP=keep, SPAN=False, MOVES=0,
    )  # fmt: skip
    return x, states, end


def end(q, k, z, beta, g, a, b, borders, moves, back: bool) -> Tensor:
    """What tokens leave of an empty memory, z their v, and what each segment does to a memory, in `moves`; or `back`,
    with z their do and `moves` for given, what the memory before them receives."""
    (inverse, mixed, reads, _, totals), (finding, asking, writing, adding) = prepare(q, k, beta, g, a, b, borders)
    given = (z, inverse if b is None else mixed, finding, writing, adding)
    if back:
        sums = sums_in_chunks(q, g, borders)
        finding, asking, writing, adding = reverse(q, k, beta, g, a, b, sums, borders, inverse, mixed)
        given = (z, reads, writing, finding, asking)
    return between(*given, g, totals, borders, None, moves, back)[1]


def forward(q, k, v, beta, g, a, b, memory, borders, segments: int, wide: bool, keep: bool) -> tuple[Tensor, ...]:
    """(o, the last memory, r, states, what segments do to memories, and what `solved` has room for). `wide`: o in
    float32.

    `keep`: the gradient will be wanted; else all but the first two are empty.
    """
    found, (finding, asking, writing, adding) = prepare(q, k, beta, g, a, b, borders)
    inverse, mixed, reads, more_reads, totals = found
    A, A2 = (inverse, reads) if b is None else (mixed, more_reads)
    o = torch.empty_like(v, dtype=torch.float32 if wide else v.dtype)
    moves = moves_of(q, borders, segments)
    news, states, last = sweep(
        v, A, finding, A2, asking, writing, adding, g, totals, borders, memory, moves, keep=keep, out=o
    )
    return o, last, news, states, *(x if keep else x.new_empty(0) for x in (moves, *found))


def backward(do, dlast, q, k, v, beta, g, a, b, borders, news, states, moves, found: list[Tensor], want_g: bool):
    """(dq, dk, dv, dβ, dg, da, db, dmemory) from the cotangents of o and of the last memory (None: zeros), with None
    for what was not given, and for dg unless it is wanted."""
    inverse, mixed, reads, more_reads, totals = found
    sums = sums_in_chunks(q, g, borders)
    finding, asking, writing, adding = reverse(q, k, beta, g, a, b, sums, borders, inverse, mixed)
    dv = None if b is None else torch.empty_like(v)
    answers, cotangents, dmemory = sweep(
        do, reads, writing, more_reads, adding, finding, asking, g, totals, borders, dlast, moves, reverse=True, out=dv
    )
    del finding, asking, writing, adding  # their memory is free for the gradients
    want_g = want_g and g is not None
    grads = gradients(do, answers, news, v, q, k, beta, g, a, b, sums, borders, states, cotangents, want_g)
    dq, dk, dbeta, dg, da, db = grads
    return dq, dk, answers if dv is None else dv, dbeta, dg, da, db, dmemory


def gradients(do, answers, news, v, q, k, beta, g, a, b, sums, borders, states, cotangents, want_g: bool) -> tuple:
    """`rank_one_gradients`, `rank_one_pairs`: (dq, dk, dβ, dg, da, db), None for what is not."""
    shape, programs = in_chunks(q, borders, "gradients")
    kind, exact, slices = kind_of(q, beta, g, a, b) | {"GATES": want_g}, shape["EXACT"], shape["SLICES"]
    scores = [q.new_empty(*q.shape[:3], shape["C"]) if b is not None or i < 2 else None for i in range(4)]
    dq, dw, de, dk = (torch.empty_like(q) if there else None for there in (True, True, a is not None, b is not None))
    dbeta = None if beta is None else beta.new_empty(slices, *beta.shape)
    dg = None
    if want_g:
        dg = torch.empty_like(g) if kind["GATE"] == CHANNEL else g.new_empty(slices, *g.shape)
    given = (q, *vectors_of(k, a, b), beta, g, sums, borders)
    to = (dq, de, dw, dk, dbeta, dg, q.shape[1], q.shape[2], sequences_of(q, borders), decay.rows_of(q))
    decay.launch(
        rank_one_gradients, programs * slices, do, answers, news, v, *given, states, cotangents, *scores, *to,
        V=v.shape[-1], BV=min(32 if exact else 64, padded(v.shape[-1])), **shape, **kind,
    )  # fmt: skip
    shape, programs = in_chunks(q, borders, "pairs")
    decay.launch(
        rank_one_pairs,
        programs * slices,
        *given,
        *scores,
        *to,
        LEVELS=levels_of(q),
        MILD=MILD[q.dtype],
        **shape,
        **kind | {"GATES": want_g and kind["GATE"] == CHANNEL},
    )
    if want_g and kind["GATE"] == TOKEN:
        dg = dg.sum(0)
    dk, db = (dw, None) if b is None else (dk, dw)
    return dq, dk, None if dbeta is None else dbeta.sum(0), dg, de, db


def step(q, k, v, beta, g, a, b, memory) -> Tensor:
    """o : b h V in float32 of one token a sequence, its inputs without their time axis; overwrites memory."""
    given = (q, *vectors_of(k, a, b), v, beta, g, memory)
    return decay.one_token(rank_one_step, given, v, **kind_of(q, beta, g, a, b))
