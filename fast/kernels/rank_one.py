"""Triton kernels for memories whose transition is diagonal plus rank one: one vector finds, another writes over it.

    r_t = v_t - e_t M̂      M_t = Diag(e^{g_t}) M_{t-1} + β_t w_tᵀ r_t (+ k_tᵀ v_t)      o_t = q_t M_t

    delta rules with a gate a channel (KDA)         e = w = k, M̂ = Diag(e^{g_t}) M_{t-1}
    a vector of its own that erases (Comba)         e = a, w = k, M̂ = M_{t-1}
    two writes (RWKV7)                              e = -a, w = b, M̂ = M_{t-1}, β = 1, r_t = -e_t M̂, and k_tᵀ v_t

The gate is nothing, a number a head and token, or a number a key channel and token.

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

Five kernels. `rank_one_prepare`: T, R and what the sweep forwards takes. `rank_one_sweep`: as in `delta.py` a program
owns a slice of V and streams through time. `rank_one_reverse`: what the sweep backwards takes. `rank_one_gradients`:
the rest. `rank_one_step`: one token.

Gates. No exponent is positive and, where gates differ by channel, none is a difference of sums: any g in [-inf, 0] is
right and finite; as in `decay.py` a gate is raised to FLOOR first. Pairs of tokens meet by halves, as in
`reference/chunked.py`: queries of the later half meet keys of the earlier at the middle, both decayed towards it, at
log C levels. The sums are products of the gates with zeros and ones: in float32 for float32 tokens, else in float16,
whose error of 2^-12 |g| e^g has no more than 2^-13 at its highest. A gate that is not a number spoils its chunk.

Precision. T is found in float32, by elimination in blocks of 16 tokens and by halves above, with products of tf32 for
16-bit tokens; it is stored as they are. Its diagonal of ones is exact in any dtype, so T v is v and a correction. r is
what is kept, not w'ᵀ T v and w'ᵀ W S, so that a memory still corrects its own errors. A chunk has at most K tokens:
more keys than channels depend on each other.

Bytes and operations. In U = one b t h d tensor in 16 bits, K = V = d = 128, C = 32, one write, a gate a channel (2 U):
prepare reads 4 U and writes 3.5; the sweep reads 4.5 and writes 1, and 5 for r and states where there is a gradient;
reverse reads 4.25 and writes 3; the sweep backwards reads 4.25 and writes 5; gradients read 15 and write 4. So 13 U
forward where the floor is 6, and 53.5 U with the gradient where it is 17. Two writes: 17.5 U of 8, and 68.5 of 23. Kept
for the gradient: T, R, r and states, 5.5 U. Chunks of 64 tokens would halve the states, 4 U each.
Multiply-adds a token and head: prepare 2·C·d and 3·C², and for each of log C levels 4·C·d (two writes: 7·C·d); the
sweep 3·d² + 2·C·d (two writes: 4·d²); gradients 3·d² + 4·slices·C·d, and for each level 6·C·d (two writes: 16·C·d).

Compilers: what `decay.py` says. No dot's result is transposed on its way into another dot: keys that meet queries are
loaded K × C, as their gates are; no 16-bit line has one stage. Levels are a loop that is not unrolled: unrolled, all
their gates were in registers at once. By the machine code for sm_90 of Triton 3.7.1 (16 bits, K = V = 128) chunks of 32
tokens, not of 64: with 64 a sweep takes 127 KB of shared memory, so that one program fits a multiprocessor, with 32 it
takes 49 to 66; prepare spills 150 numbers a thread, with 32 two (42 with two writes); gradients spill 86 to 134 of
them all the same. None of this was timed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay
from fast.kernels.channel import NOTHING, gates_of
from fast.kernels.decay import padded, part_of, place_of, places, run_of, sequences_of

NONE, TOKEN, CHANNEL = 0, 2, 3  # the kinds of gate

CHUNK = {2: 32, 4: 16}  # tokens a chunk by bytes of a number: float32 products are not done by tensor cores

# padded row size of the state, bytes of a number -> (columns of V a program, warps, stages) of the sweeps
CONFIG = {
    (16, 2): (16, 4, 2),
    (32, 2): (32, 4, 2),
    (64, 2): (32, 4, 2),
    (128, 2): (32, 4, 2),
    (256, 2): (16, 4, 2),
    (16, 4): (16, 4, 1),
    (32, 4): (32, 4, 1),
    (64, 4): (32, 8, 1),
    (128, 4): (16, 8, 1),
    (256, 4): (16, 8, 1),
}


@triton.jit
def summed(which, gates, GATE: tl.constexpr, EXACT: tl.constexpr):
    """Row i: the sum of the gates of the tokens s with which[i, s]. C × K from gates C × K, C × 1 from gates C."""
    if GATE == 2:
        total = tl.sum(tl.where(which, gates[None, :], 0.0), 1)[:, None]
    else:
        if EXACT:
            total = tl.dot(which.to(tl.float32), gates, input_precision="ieee")
        else:
            total = tl.dot(which.to(tl.float16), gates.to(tl.float16))
    return total


@triton.jit
def summed_across(gates, which, EXACT: tl.constexpr):
    """K × C, column i: the sum of the gates (K × C) of the tokens s with which[s, i]."""
    if EXACT:
        total = tl.dot(gates, which.to(tl.float32), input_precision="ieee")
    else:
        total = tl.dot(gates.to(tl.float16), which.to(tl.float16))
    return total


@triton.jit
def fades_of(gates, ic, GATE: tl.constexpr, BEFORE: tl.constexpr, EXACT: tl.constexpr):
    """(e^b, e^c, e^{b_C - b}, e^{b_C}) of a chunk: C × K, or C × 1; the last without its first axis."""
    here, other = ic[:, None], ic[None, :]
    reading = tl.exp2(summed(other <= here, gates, GATE, EXACT))
    finding = reading
    if BEFORE:
        finding = tl.exp2(summed(other < here, gates, GATE, EXACT))
    return reading, finding, tl.exp2(summed(other > here, gates, GATE, EXACT)), tl.exp2(tl.sum(gates, 0))


@triton.jit
def to_middle(gates, ic, half, BEFORE: tl.constexpr, EXACT: tl.constexpr):
    """e^{sum of the gates between a token and the middle of its block of 2·half tokens}: C × K, at most 1.

    From the middle on: up to and with the token's own gate (BEFORE: without); before the middle: after the token.
    """
    here, other = ic[:, None], ic[None, :]
    middle = (here | (2 * half - 1)) + 1 - half
    until = (other < here) if BEFORE else (other <= here)
    later = (other >= middle) & until
    return tl.exp2(summed(later | ((other > here) & (other < middle)), gates, 3, EXACT))


@triton.jit
def to_middle_across(gates, ic, half, EXACT: tl.constexpr):
    """`to_middle` of the tokens before the middle, K × C from gates K × C."""
    here, other = ic[None, :], ic[:, None]
    middle = (here | (2 * half - 1)) + 1 - half
    return tl.exp2(summed_across(gates, (other > here) & (other < middle), EXACT))


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
    return tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def meeting(ic, half):
    """Whether row and column are of the two halves of a block of 2·half tokens: whether `half` is their highest bit
    that differs."""
    differ = ic[:, None] ^ ic[None, :]
    return (differ >= half) & (differ < 2 * half)


@triton.jit
def inverse_of(L, here, other, LEVELS: tl.constexpr, SOLVING: tl.constexpr):
    """(I + L)⁻¹, L strictly lower triangular: C × C, C = 16·2^LEVELS.

    In blocks of 16 by elimination, column j of all blocks at once: what a token changes is taken from those after it.
    By halves above: [[A, 0], [B, D]]⁻¹ has -D⁻¹ B A⁻¹ in its corner.
    """
    same = here // 16 == other // 16
    inside = tl.where(same, L, 0.0)
    X = tl.where(here == other, 1.0, 0.0)
    for j in range(0, 15):
        column = tl.sum(tl.where(other % 16 == j, inside, 0.0), 1)
        row = tl.sum(tl.where(here % 16 == j, X, 0.0), 0)
        X -= tl.where(same, column[:, None] * row[None, :], 0.0)
    for level in tl.static_range(LEVELS):
        half = 16 << level
        corner = tl.where((here ^ other >= half) & (here ^ other < 2 * half), L, 0.0)
        X -= tl.dot(tl.dot(X, corner, input_precision=SOLVING), X, input_precision=SOLVING)
    return X


@triton.jit(do_not_specialize=["tokens", "heads", "parts"])
def rank_one_prepare(
    q, e, w, k, beta, g, borders, inverse, mixed, reads, more_reads, finding, asking, writing, adding, totals,
    tokens, heads, parts,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    GATE: tl.constexpr, BEFORE: tl.constexpr, TWO: tl.constexpr, BETA: tl.constexpr, PACKED: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, SOLVING: tl.constexpr,
):  # fmt: skip
    """Of every chunk T, -T N, R, R with two writes (b t h C each), -W, q e^b - P W, w', k' (b t h K) and e^{b_C}.

    e is None where it is w, and k where there is one write. Through slices of K twice: for the scores, then with T.
    """
    pid = tl.program_id(0)
    part = pid % parts
    h = (pid // parts) % heads
    n = pid // parts // heads
    start, length = run_of(borders, n, tokens, PACKED)
    first, stop = part_of(length, part, parts)
    ic = tl.arange(0, C)
    here, other = ic[:, None], ic[None, :]
    for i in range(0, tl.cdiv(stop - first, C)):
        begin = first + i * C
        count = tl.minimum(stop - begin, C)
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
        for s in range(0, SLICES):
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
                across = ik[:, None] + ic[None, :] * (heads * K)
                ok_across = (ik < K)[:, None] & inside[None, :]
                wide = tl.load(w + row * K + across, mask=ok_across, other=0.0)
                if TWO:
                    wide_k = tl.load(k + row * K + across, mask=ok_across, other=0.0)
                gates = gates_of(g + row * K, at, ok)
                gates_across = gates_of(g + row * K, across, ok_across)
                for level in range(0, LEVELS + 4):
                    half = 1 << level
                    meet = meeting(ic, half) & (here > other)
                    fade = to_middle(gates, ic, half, False, EXACT)
                    asked = (bq.to(tl.float32) * fade).to(bq.dtype)
                    if BEFORE:
                        fade = to_middle(gates, ic, half, True, EXACT)
                    found = (be.to(tl.float32) * fade).to(bq.dtype)
                    fade = to_middle_across(gates_across, ic, half, EXACT)
                    keys = (wide.to(tl.float32) * fade).to(bq.dtype)
                    L += tl.where(meet, tl.dot(found, keys, input_precision=PRECISION), 0.0)
                    P += tl.where(meet, tl.dot(asked, keys, input_precision=PRECISION), 0.0)
                    if TWO:
                        keys = (wide_k.to(tl.float32) * fade).to(bq.dtype)
                        N += tl.where(meet, tl.dot(found, keys, input_precision=PRECISION), 0.0)
                        Q += tl.where(meet, tl.dot(asked, keys, input_precision=PRECISION), 0.0)
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
        L = tl.where(here > other, L, 0.0) * strength[None, :]
        P = tl.where(here > other, P, tl.where(here == other, own[:, None], 0.0)) * strength[None, :]
        X = inverse_of(L, here, other, LEVELS, SOLVING)
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
        for s in range(0, SLICES):
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
                if GATE == 3:
                    gates = gates_of(g + row * K, at, ok)
                reach, find, last, total = fades_of(gates, ic, GATE, BEFORE, EXACT)
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


@triton.jit(do_not_specialize=["tokens", "heads", "parts"])
def rank_one_reverse(
    q, e, w, k, beta, g, borders, inverse, mixed, finding, asking, writing, adding, tokens, heads, parts,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    BEFORE: tl.constexpr, TWO: tl.constexpr, BETA: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """-e e^c, q e^b, Tᵀ w' and, with two writes, k' - (T N)ᵀ w' of every chunk, for a slice of K: b t h K each."""
    pid = tl.program_id(0)
    ik = (pid % SLICES) * BK + tl.arange(0, BK)
    part = (pid // SLICES) % parts
    h = (pid // SLICES // parts) % heads
    start, length = run_of(borders, pid // SLICES // parts // heads, tokens, PACKED)
    first, stop = part_of(length, part, parts)
    ic = tl.arange(0, C)
    for i in range(0, tl.cdiv(stop - first, C)):
        begin = first + i * C
        inside = ic < tl.minimum(stop - begin, C)
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
            if GATE == 3:
                gates = gates_of(g + row * K, at, ok)
            else:
                gates = gates_of(g, row + ic * heads, inside)
            reach, find, last, _ = fades_of(gates, ic, GATE, BEFORE, EXACT)
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


@triton.jit(do_not_specialize=["tokens", "heads"])
def rank_one_sweep(
    z, A, B, A2, B2, F, F2, totals, borders, entry, x, out, states, end, tokens, heads,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, OUT: tl.constexpr, MORE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """x = A z + B S, with OUT out = A2 z + B2 S, S <- e^{b_C} S + Fᵀ x, with MORE + F2ᵀ z: one slice of V, X = K.

    REVERSE: from the last chunk to the first, with A and A2 transposed. With KEEP x is stored, and the state that comes
    into every chunk, in the tokens' dtype.
    """
    pid = tl.program_id(0)
    s = pid % SLICES
    h = (pid // SLICES) % heads
    n = pid // SLICES // heads
    start, length = run_of(borders, n, tokens, PACKED)
    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    cell = ix[:, None] * Z + iz[None, :]
    in_cell = in_x[:, None] & in_z[None, :]
    nh = (n * heads + h).to(tl.int64)
    if ENTRY:
        S = tl.load(entry + nh * X * Z + cell, mask=in_cell, other=0.0)
    else:
        S = tl.zeros((BX, BZ), tl.float32)
    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    if REVERSE:
        at_c = ic[:, None] + ic[None, :] * (heads * C)
    else:
        at_c = ic[:, None] * (heads * C) + ic[None, :]
    chunks = tl.cdiv(length, C)
    for i in range(0, chunks):
        chunk = chunks - 1 - i if REVERSE else i
        begin = chunk * C
        inside = ic < tl.minimum(length - begin, C)
        row = (start + begin) * heads + h
        slot = place_of(start, n, begin, C) * heads + h
        in_rows_x = inside[:, None] & in_x[None, :]
        in_rows_z = inside[:, None] & in_z[None, :]
        in_rows_c = inside[:, None] & inside[None, :]
        bz = tl.load(z + row * Z + at_z, mask=in_rows_z, other=0.0)
        bA = tl.load(A + row * C + at_c, mask=in_rows_c, other=0.0)
        bB = tl.load(B + row * X + at_x, mask=in_rows_x, other=0.0)
        bF = tl.load(F + row * X + at_x, mask=in_rows_x, other=0.0)
        if GATE == 3:  # what feeds no dot is not pipelined: asked for before the dots, it arrives during them
            fade = tl.load(totals + slot * X + ix, mask=in_x, other=0.0)[:, None]
        if GATE == 2:
            fade = tl.load(totals + slot)
        before = S.to(bz.dtype)
        if KEEP:
            tl.store(states + slot * X * Z + cell, before, mask=in_cell)
        new = tl.dot(bA, bz, input_precision=PRECISION)
        new = tl.dot(bB, before, new, input_precision=PRECISION)
        if GATE != 0:
            S = S * fade
        S = tl.dot(tl.trans(bF), new.to(bz.dtype), S, input_precision=PRECISION)
        if MORE:
            bF2 = tl.load(F2 + row * X + at_x, mask=in_rows_x, other=0.0)
            S = tl.dot(tl.trans(bF2), bz, S, input_precision=PRECISION)
        if KEEP:
            tl.store(x + row * Z + at_z, new, mask=in_rows_z)
        if OUT:
            bA2 = tl.load(A2 + row * C + at_c, mask=in_rows_c, other=0.0)
            bB2 = tl.load(B2 + row * X + at_x, mask=in_rows_x, other=0.0)
            o = tl.dot(bA2, bz, input_precision=PRECISION)
            o = tl.dot(bB2, before, o, input_precision=PRECISION)
            tl.store(out + row * Z + at_z, o, mask=in_rows_z)
    tl.store(end + nh * X * Z + cell, S, mask=in_cell)


@triton.jit
def from_earlier(
    seen, erased, keys, gates, ic,
    LEVELS: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(Σ_{j<i} seen_ij keys_j e^{b_i - b_j}, Σ_{j<i} erased_ij keys_j e^{c_i - b_j}): C × K each, by levels."""
    here, other = ic[:, None], ic[None, :]
    if GATE == 3:
        asked, found = keys.to(tl.float32) * 0.0, keys.to(tl.float32) * 0.0
        seen, erased = seen.to(keys.dtype), erased.to(keys.dtype)
        for level in range(0, LEVELS + 4):
            half = 1 << level
            meet = meeting(ic, half) & (here > other)
            fade = to_middle(gates, ic, half, False, EXACT)
            faded = (keys.to(tl.float32) * fade).to(keys.dtype)
            asked += fade * tl.dot(tl.where(meet, seen, 0.0), faded, input_precision=PRECISION)
            if BEFORE:
                fade = to_middle(gates, ic, half, True, EXACT)
            found += fade * tl.dot(tl.where(meet, erased, 0.0), faded, input_precision=PRECISION)
    else:
        if GATE == 2:
            seen = seen * decays_between(gates, ic, False, False, EXACT)
            erased = erased * decays_between(gates, ic, BEFORE, False, EXACT)
        seen, erased = tl.where(here > other, seen, 0.0), tl.where(here > other, erased, 0.0)
        asked = tl.dot(seen.to(keys.dtype), keys, input_precision=PRECISION)
        found = tl.dot(erased.to(keys.dtype), keys, input_precision=PRECISION)
    return asked, found


@triton.jit
def from_later(
    seen, erased, queries, finders, gates, ic,
    LEVELS: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_{i>j} (seen_ji queries_i e^{b_i - b_j} - erased_ji finders_i e^{c_i - b_j}): C × K, by levels."""
    here, other = ic[:, None], ic[None, :]
    if GATE == 3:
        written = queries.to(tl.float32) * 0.0
        seen, erased = seen.to(queries.dtype), -erased.to(queries.dtype)
        for level in range(0, LEVELS + 4):
            half = 1 << level
            meet = meeting(ic, half) & (here < other)
            fade = to_middle(gates, ic, half, False, EXACT)
            find = fade
            if BEFORE:
                find = to_middle(gates, ic, half, True, EXACT)
            faded = (queries.to(tl.float32) * fade).to(queries.dtype)
            change = tl.dot(tl.where(meet, seen, 0.0), faded, input_precision=PRECISION)
            faded = (finders.to(tl.float32) * find).to(queries.dtype)
            written += fade * tl.dot(tl.where(meet, erased, 0.0), faded, change, input_precision=PRECISION)
    else:
        if GATE == 2:
            seen = seen * decays_between(gates, ic, False, True, EXACT)
            erased = erased * decays_between(gates, ic, BEFORE, True, EXACT)
        seen, erased = tl.where(here < other, seen, 0.0), tl.where(here < other, -erased, 0.0)
        written = tl.dot(seen.to(queries.dtype), queries, input_precision=PRECISION)
        written = tl.dot(erased.to(queries.dtype), finders, written, input_precision=PRECISION)
    return written


@triton.jit
def gate_sums(begun, later, kept, erasing, ic, BEFORE: tl.constexpr, EXACT: tl.constexpr):
    """begun + Σ_{s>=t} later + Σ_{s<t} kept + Σ_{s>=t, BEFORE: s>t} erasing: C × K. EXACT: nothing is taken off again,
    since under strong gates what remains is much smaller."""
    if EXACT:
        here, other = ic[:, None], ic[None, :]
        value = begun[None, :] + tl.dot((other >= here).to(tl.float32), later, input_precision="ieee")
        value = tl.dot((other < here).to(tl.float32), kept, value, input_precision="ieee")
        until = (other > here) if BEFORE else (other >= here)
        value = tl.dot(until.to(tl.float32), erasing, value, input_precision="ieee")
    else:
        value = (begun + tl.sum(kept, 0))[None, :] + tl.cumsum(later + erasing - kept, 0, reverse=True)
        if BEFORE:
            value -= erasing
    return value


@triton.jit(do_not_specialize=["tokens", "heads", "parts", "count_rows"])
def rank_one_gradients(
    do, y, r, v, q, e, w, k, beta, g, borders, states, cotangents, dq, de, dw, dk, dbeta, dg,
    tokens, heads, parts, count_rows,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, GATE: tl.constexpr, BEFORE: tl.constexpr, TWO: tl.constexpr, BETA: tl.constexpr,
    GATES: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, de (with two writes that of -e), dw (without BEFORE dw + de), dk of two writes, for a slice of K of every
    chunk; this slice's part of dβ; with GATES dg or, of one number a token, this slice's part of it.

    Parts lie as slices b t h. First what each token reads and finds, then what it wrote: one after the other, so that
    the scores of one are out of the registers when those of the other come.
    """
    pid = tl.program_id(0)
    s = pid % SLICES
    ik = s * BK + tl.arange(0, BK)
    part = (pid // SLICES) % parts
    h = (pid // SLICES // parts) % heads
    n = pid // SLICES // parts // heads
    start, length = run_of(borders, n, tokens, PACKED)
    first, stop = part_of(length, part, parts)
    ic, iv = tl.arange(0, C), tl.arange(0, BV)
    here, other = ic[:, None], ic[None, :]
    in_k, in_v = ik < K, iv < V
    for i in range(0, tl.cdiv(stop - first, C)):
        begin = first + i * C
        inside = ic < tl.minimum(stop - begin, C)
        row = (start + begin) * heads + h
        slot = place_of(start, n, begin, C) * heads + h
        at = ic[:, None] * (heads * K) + ik[None, :]
        ok = inside[:, None] & in_k[None, :]
        at_v = ic[:, None] * (heads * V) + iv[None, :]
        ok_v = inside[:, None] & in_v[None, :]
        turned = iv[:, None] + ik[None, :] * V
        in_cell = in_v[:, None] & in_k[None, :]
        bdo = tl.load(do + row * V + at_v, mask=ok_v, other=0.0)
        by = tl.load(y + row * V + at_v, mask=ok_v, other=0.0)
        br = tl.load(r + row * V + at_v, mask=ok_v, other=0.0)
        bq = tl.load(q + row * K + at, mask=ok, other=0.0)
        bw = tl.load(w + row * K + at, mask=ok, other=0.0)
        be = bw
        if BEFORE:
            be = tl.load(e + row * K + at, mask=ok, other=0.0)
        if TWO:
            be = -be
            bk = tl.load(k + row * K + at, mask=ok, other=0.0)
            bv = tl.load(v + row * V + at_v, mask=ok_v, other=0.0)
        strong = bw.to(tl.float32)
        if BETA:
            strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
            strong = strong * strength[:, None]
        gates = inside
        if GATE == 3:
            gates = gates_of(g + row * K, at, ok)
        if GATE == 2:
            gates = gates_of(g, row + ic * heads, inside)
        if GATE != 0:
            reach, find, last, total = fades_of(gates, ic, GATE, BEFORE, EXACT)

        seen = tl.dot(bdo, tl.trans(br), input_precision=PRECISION)
        erased = tl.dot(by, tl.trans(br), input_precision=PRECISION)
        own = tl.sum(tl.where(here == other, seen, 0.0), 1)[:, None]
        asked, found = from_earlier(
            seen, erased, strong.to(bq.dtype), gates, ic, LEVELS, GATE, BEFORE, EXACT, PRECISION
        )
        itself = own * strong
        if TWO:
            seen = tl.dot(bdo, tl.trans(bv), input_precision=PRECISION)
            erased = tl.dot(by, tl.trans(bv), input_precision=PRECISION)
            own_v = tl.sum(tl.where(here == other, seen, 0.0), 1)[:, None]
            more, more_found = from_earlier(seen, erased, bk, gates, ic, LEVELS, GATE, BEFORE, EXACT, PRECISION)
            asked += more
            found += more_found
            itself += own_v * bk.to(tl.float32)
        S = tl.load(states + slot * K * V + turned, mask=in_cell, other=0.0)
        through = tl.dot(bdo, S, input_precision=PRECISION)
        erases = tl.dot(by, S, input_precision=PRECISION)
        if GATE != 0:
            through, erases = through * reach, erases * find
        asked += through
        found = -found - erases
        later = bq.to(tl.float32) * asked
        erasing = be.to(tl.float32) * found
        tl.store(dq + row * K + at, asked + itself, mask=ok)
        if BEFORE:
            tl.store(de + row * K + at, -found if TWO else found, mask=ok)

        E = tl.load(cotangents + slot * K * V + turned, mask=in_cell, other=0.0)
        seen = tl.dot(br, tl.trans(bdo), input_precision=PRECISION)
        erased = tl.dot(br, tl.trans(by), input_precision=PRECISION)
        pairs = from_later(seen, erased, bq, be, gates, ic, LEVELS, GATE, BEFORE, EXACT, PRECISION)
        written = tl.dot(br, E, input_precision=PRECISION)
        if GATE != 0:
            written = written * last
        kept = strong * written
        later -= strong * pairs
        written += pairs + own * bq.to(tl.float32)
        if BETA:
            change = tl.sum(bw.to(tl.float32) * written, 1)
            tl.store(dbeta + s.to(tl.int64) * count_rows + row + ic * heads, change, mask=inside)
            written = written * strength[:, None]
        if not BEFORE:
            written += found
        tl.store(dw + row * K + at, written, mask=ok)
        if TWO:
            seen = tl.dot(bv, tl.trans(bdo), input_precision=PRECISION)
            erased = tl.dot(bv, tl.trans(by), input_precision=PRECISION)
            pairs = from_later(seen, erased, bq, be, gates, ic, LEVELS, GATE, BEFORE, EXACT, PRECISION)
            added = tl.dot(bv, E, input_precision=PRECISION)
            if GATE != 0:
                added = added * last
            kept += bk.to(tl.float32) * added
            later -= bk.to(tl.float32) * pairs
            tl.store(dk + row * K + at, added + pairs + own_v * bq.to(tl.float32), mask=ok)
        if GATES:
            S = tl.load(states + slot * K * V + turned, mask=in_cell, other=0.0)
            begun = tl.sum(S.to(tl.float32) * E.to(tl.float32), 0) * total
            if GATE == 3:
                value = gate_sums(begun, later, kept, erasing, ic, BEFORE, EXACT)
                tl.store(dg + row * K + at, tl.where(gates < NOTHING, 0.0, value), mask=ok)
            else:
                until = (other > here) if BEFORE else (other >= here)
                value = tl.sum(begun, 0) + tl.sum(tl.where(other >= here, tl.sum(later, 1)[None, :], 0.0), 1)
                value += tl.sum(tl.where(other < here, tl.sum(kept, 1)[None, :], 0.0), 1)
                value += tl.sum(tl.where(until, tl.sum(erasing, 1)[None, :], 0.0), 1)
                to = dg + s.to(tl.int64) * count_rows + row + ic * heads
                tl.store(to, tl.where(gates < NOTHING, 0.0, value), mask=inside)


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


def in_chunks(q: Tensor, borders: Tensor | None) -> tuple[dict, int]:
    """The sizes of a kernel that goes through chunks in any order, and the parts of a sequence."""
    K = q.shape[-1]
    block = min(32 if q.element_size() == 4 else 64, padded(K))
    kind = {"PACKED": borders is not None, "EXACT": q.element_size() == 4, "PRECISION": "ieee"}
    parts = decay.parts_of(q, borders)
    return {"K": K, "BK": block, "SLICES": triton.cdiv(K, block), "C": chunk_for(q), **kind}, parts


def levels_of(q: Tensor) -> int:
    return (chunk_for(q) // 16).bit_length() - 1


def solved(q: Tensor, g: Tensor | None, b: Tensor | None, borders: Tensor | None) -> list[Tensor]:
    """Room for T, -T N, R, R of v (b t h C) and e^{b_C} (a place a chunk, h, and K if the gate has it); empty is what
    there is not."""
    square, slots = (*q.shape[:3], chunk_for(q)), slots_of(q, borders)
    squares = [q.new_empty(square if b is not None or i in (0, 2) else 0) for i in range(4)]
    fades = 0 if g is None else (slots, q.shape[2]) if g.ndim == 3 else (slots, *q.shape[2:])
    return [*squares, q.new_empty(fades, dtype=torch.float32)]


def prepare(q, k, beta, g, a, b, borders) -> tuple[list[Tensor], list[Tensor | None]]:
    """`rank_one_prepare`: what `solved` has room for, and [-W, q e^b - P W, w', k' or None]."""
    shape, parts = in_chunks(q, borders)
    found = solved(q, g, b, borders)
    rows = [torch.empty_like(q) if b is not None or i < 3 else None for i in range(4)]
    exact = shape["EXACT"]
    decay.launch(
        rank_one_prepare, sequences_of(q, borders) * q.shape[2] * parts,
        q, *vectors_of(k, a, b), beta, g, borders, *found[:4], *rows, found[4], q.shape[1], q.shape[2], parts,
        **shape, **kind_of(q, beta, g, a, b), LEVELS=levels_of(q), SOLVING="ieee" if exact else "tf32",
        num_warps=2 if exact else 4, num_stages=1 if exact else 2,
    )  # fmt: skip
    return found, rows


def reverse(q, k, beta, g, a, b, borders, inverse, mixed) -> list:
    """`rank_one_reverse`: [-e e^c, q e^b, Tᵀ w', k' - (T N)ᵀ w' or None]."""
    shape, parts = in_chunks(q, borders)
    rows = [torch.empty_like(q) if b is not None or i < 3 else None for i in range(4)]
    decay.launch(
        rank_one_reverse, sequences_of(q, borders) * q.shape[2] * parts * shape["SLICES"],
        q, *vectors_of(k, a, b), beta, g, borders, inverse, mixed, *rows, q.shape[1], q.shape[2], parts,
        **shape, **kind_of(q, beta, g, a, b), num_warps=4, num_stages=1 if shape["EXACT"] else 2,
    )  # fmt: skip
    return rows


def sweep(z, A, B, A2, B2, F, F2, g, totals, borders, entry, *, reverse=False, keep=True, out=None) -> tuple:
    """`rank_one_sweep`: (x, states, the state at the far end). `out` receives the second output; x and states are empty
    unless they are to be kept."""
    X, Z, h = B.shape[-1], z.shape[-1], z.shape[2]
    columns, warps, stages = CONFIG[padded(X), z.element_size()]
    columns = min(columns, padded(Z))
    slices, n = triton.cdiv(Z, columns), sequences_of(z, borders)
    x = torch.empty_like(z) if keep else z.new_empty(0)
    states = z.new_empty((slots_of(B, borders), h, X, Z) if keep else 0)
    end = z.new_empty(n, h, X, Z, dtype=torch.float32)
    decay.launch(
        rank_one_sweep, slices * h * n, z, A, B, A2, B2, F, F2, totals, borders, entry, x, out, states, end,
        z.shape[1], h,
        X=X, Z=Z, BX=padded(X), BZ=columns, SLICES=slices, C=A.shape[-1],
        GATE=kind_of(B, None, g, None, None)["GATE"], REVERSE=reverse, PACKED=borders is not None, PRECISION="ieee",
        ENTRY=entry is not None, OUT=out is not None, MORE=F2 is not None, KEEP=keep,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return x, states, end


def forward(q, k, v, beta, g, a, b, memory, borders, wide: bool, keep: bool) -> tuple[Tensor, ...]:
    """(o, the last memory, r, states, and what `solved` has room for). `wide`: o in float32.

    `keep`: the gradient will be wanted; else all but the first two are empty.
    """
    found, (finding, asking, writing, adding) = prepare(q, k, beta, g, a, b, borders)
    inverse, mixed, reads, more_reads, totals = found
    A, A2 = (inverse, reads) if b is None else (mixed, more_reads)
    o = torch.empty_like(v, dtype=torch.float32 if wide else v.dtype)
    news, states, last = sweep(
        v, A, finding, A2, asking, writing, adding, g, totals, borders, memory, keep=keep, out=o
    )  # fmt: skip
    return o, last, news, states, *(x if keep else x.new_empty(0) for x in found)


def backward(do, dlast, q, k, v, beta, g, a, b, borders, news, states, found: list[Tensor], want_g: bool):
    """(dq, dk, dv, dβ, dg, da, db, dmemory) from the cotangents of o and of the last memory (None: zeros), with None
    for what was not given, and for dg unless it is wanted."""
    inverse, mixed, reads, more_reads, totals = found
    finding, asking, writing, adding = reverse(q, k, beta, g, a, b, borders, inverse, mixed)
    dv = None if b is None else torch.empty_like(v)
    answers, cotangents, dmemory = sweep(
        do, reads, writing, more_reads, adding, finding, asking, g, totals, borders, dlast, reverse=True, out=dv
    )
    del finding, asking, writing, adding  # their memory is free for the gradients
    want_g = want_g and g is not None
    grads = gradients(do, answers, news, v, q, k, beta, g, a, b, borders, states, cotangents, want_g)
    dq, dk, dbeta, dg, da, db = grads
    return dq, dk, answers if dv is None else dv, dbeta, dg, da, db, dmemory


def gradients(do, answers, news, v, q, k, beta, g, a, b, borders, states, cotangents, want_g: bool) -> tuple:
    """`rank_one_gradients`: (dq, dk, dβ, dg, da, db), None for what is not."""
    shape, parts = in_chunks(q, borders)
    kind, exact, slices = kind_of(q, beta, g, a, b), shape["EXACT"], shape["SLICES"]
    dq, dw, de, dk = (torch.empty_like(q) if there else None for there in (True, True, a is not None, b is not None))
    dbeta = None if beta is None else beta.new_empty(slices, *beta.shape)
    dg = None
    if want_g:
        dg = torch.empty_like(g) if kind["GATE"] == CHANNEL else g.new_empty(slices, *g.shape)
    decay.launch(
        rank_one_gradients, sequences_of(q, borders) * q.shape[2] * parts * slices,
        do, answers, news, v, q, *vectors_of(k, a, b), beta, g, borders, states, cotangents, dq, de, dw, dk, dbeta, dg,
        q.shape[1], q.shape[2], parts, q.shape[0] * q.shape[1] * q.shape[2],
        V=v.shape[-1], BV=padded(v.shape[-1]), LEVELS=levels_of(q), GATES=want_g,
        **shape, **kind, num_warps=8, num_stages=1 if exact else 2,
    )  # fmt: skip
    if want_g and kind["GATE"] == TOKEN:
        dg = dg.sum(0)
    dk, db = (dw, None) if b is None else (dk, dw)
    return dq, dk, None if dbeta is None else dbeta.sum(0), dg, de, db


def step(q, k, v, beta, g, a, b, memory) -> Tensor:
    """o : b h V in float32 of one token a sequence, its inputs without their time axis; overwrites memory."""
    given = (q, *vectors_of(k, a, b), v, beta, g, memory)
    return decay.one_token(rank_one_step, given, v, **kind_of(q, beta, g, a, b))
