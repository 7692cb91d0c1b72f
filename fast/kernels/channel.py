"""Triton kernels for memories whose channels fade each at its own rate: M_t = Diag(e^{g_t}) M_{t-1} + k_tᵀ v_t.

The gate is a number a key channel and token (GLA, HGRN2). The read is o_t = q_t M_t, or, with a bonus u (RWKV6), that
of the memory before the token and of the token itself by a weight of its own: o_t = q_t M_{t-1} + (q_t u · k_t) v_t.

Chunks have C = 64 tokens in 16 bits, 16 in float32. With b_i = g_1 + ... + g_i in a chunk (a row of K sums), r_i = b_i
(b_{i-1} where the read is of the memory before), S the memory from before the chunk, R the cotangent of the one after
it, and all products with e by row:

    q' = q e^r     k' = k e^{b_C - b}     A_ij = Σ_c q_ic k_jc e^{r_ic - b_jc}  j < i,     A_ii = q_i·k_i, or q_i u·k_i

    o     q' S + A v         S <- e^{b_C} S + k'ᵀ v      forwards
    dv    k' R + Aᵀ do       R <- e^{b_C} R + q'ᵀ do     backwards

    dq = e^r (do Sᵀ) + Σ_{j<i} P_ij e^{r_i - b_j} k_j        dk = e^{b_C - b} (v Rᵀ) + Σ_{i>j} P_ij e^{r_i - b_j} q_i

with P = do vᵀ. `channel_gates` makes b, q', k', e^{b_C} and A of all chunks at once, so the chain of chunks
(`channel_sweep`, one kernel for both directions) knows of gates only K numbers a chunk. A program of it owns a slice of
V and streams through time, as in `decay.py`, whose segments are these, too. With a gradient in sight it keeps S of
every chunk, and backward R, in the tokens' dtype, and `channel_gradients` makes dq, dk and dg of all chunks at once.
`slots.py` asks for parts of this: gates without queries, or of other queries at the same gates, dq alone or all but dq,
and o of all chunks at once where S is known (`channel_outputs`).

Pairs of tokens. No split q e^b · k e^{-b} is safe for any gate: under strong ones the second factor has no bound. So
queries of the later half of a block meet keys of the earlier at its middle m, both decayed towards it, e^{r - b_m} and
e^{b_m - b}, at most 1, and the halves are the same problem again: six levels for 64 tokens (as in
`reference/chunked.py`). But where the gates of half a block sum to no more than MILD, both factors are in range on
either side of the middle, and one product is the whole block. For gates as models have them that is mostly the whole
chunk: a program looks at b there (`ends_of`), and has a way of its own for such a chunk, with two exponentials a
number, since q', k' and what memories give are by row those from the middle times e^{b_m} or e^{b_C - b_m}. Else it
stops at the first level that is mild. An exponent is a difference of two sums b, the second read again from the cache.
For float32 tokens they are float64; for 16-bit tokens products of ones with gates in two float16, right to 2^-22 of the
largest gate, behind one of FLOOR to 1e-3. Any g in [-inf, 0] is right and finite: as in `decay.py` a gate is raised to
FLOOR first.

The gate's gradient is dg_t = <e^{g_t} M_{t-1}, D_t> by row of the memory, D_t the cotangent of M_t. With those of a
chunk's last token, and dq and dk without a token's own pair, which is in both and cancels,

    dg_t = <M_C, D_C> + Σ_{s >= t} (q_s dq_s - k_s dk_s)        read before the write: q dq from s > t

begun anew in every chunk, so that rounding errors do not add up over a sequence: D_C is R, and <M_C, R> is
e^{b_C} <S, R> and what the chunk's own keys find in R, which dk has. The products are taken before dq and dk are
rounded. A token's own pair P_tt comes in afterwards: dq += P_tt k, dk += P_tt q (times u), du = Σ_t P_tt q_t k_t. So
does, where the read is before the write, that with the token before: no gate is between them, so where gates are strong
it is by far the largest of a sum from which it cancels, and rounded it had up to 2.2 of dg's error budget.

Keys may be tied to their gates, k = 1 - e^g (HGRN2's, whose write is what the decay leaves room for). They are made in
float32 where g is read and never written, and what they receive, -e^g dk, is added to dg where both are at hand.

Bytes and operations. In U = one b t h d tensor in 16 bits, K = V = d = 128, gates (2 U) in float32: forward, gates read
4 and write 4 1/2, the sweep reads 3 1/2 and writes 1, and S where there will be a gradient: 13 or 15 U. Backward, the
sweep reads 3 1/2 and writes dv and R, gradients read 10 and write 4: 20 1/2; both 35 1/2 where the floor is 17. With
tied keys 1 less forwards, and backwards g is read (2 U) for k, dk not written: 34 1/2 where the floor is 14. Kept
for the gradient: A, q', k', b and S (6 1/2 U; all made once), and not the gates (2 U); needed on the way: R, 2 U.
Multiply-adds a chunk: a sweep 2·C·K·V and C·C·V, gates 2·C·C·K for b and C·C·K a level, gradients 2·C·K·V, 2·C·C·V a
slice of channels and 2·C·C·K a level.

Compilers: what `decay.py` says, and no 16-bit line of CONFIG has one stage. A program has one chunk, so that levels are
no loop within a loop (unrolled they take five times the code and are no faster). A program waits for memory most of the
time: what it will need it asks for at once, and two programs fit a multiprocessor. b is stored, awaited and loaded
again rather than used, since a dot's result must not be transposed into another dot. In `channel_gradients` on Hopper
that compiler gives wrong rows from the 17th on, or an illegal access, where a program has fewer channels of K than 64
and fewer than of V: 16-bit tiles are never narrower than 64. The lines of CONFIG for K = 128 in 16 bits are chosen by
times on an H100 (bench/LOG.md), the others by registers and shared memory.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay
from fast.kernels.decay import (
    CHUNK,
    FLOOR,
    LOG2_E,
    NOTHING,
    ask_ahead,
    cdiv,
    chunk_of,
    chunks_of,
    next_power_of_2,
    padded,
    place_of,
    places,
    plus_product,
    sequences_of,
    stretch_of,
    summed,
)

# exponents of 2 up to which queries and keys are decayed from the middle of a block, too; in float16 as in its range
MILD = {torch.float16: 8.0, torch.bfloat16: 60.0, torch.float32: 60.0}

# padded row size of the state, bytes of a number -> (columns of the output a program, warps, stages)
CONFIG = {
    (16, 2): (16, 4, 2),
    (32, 2): (32, 4, 2),
    (64, 2): (32, 4, 3),
    (128, 2): (64, 4, 3),
    (256, 2): (16, 4, 2),
    (16, 4): (16, 4, 1),
    (32, 4): (32, 4, 1),
    (64, 4): (32, 8, 1),
    (128, 4): (32, 8, 1),
    (256, 4): (16, 8, 1),
}
# bytes of a number -> (channels of K at a time, warps)
FOLDING = {2: (64, 4), 4: (32, 4)}
FINISHING = {2: (64, 4), 4: (32, 4)}
APART = {2: 64, 4: 32}  # bytes of a number -> columns of the output a program, chunk by chunk


@triton.jit
def at_token(sums, index, count, heads, ik, K: tl.constexpr):
    """Rows `index` of a chunk's running sums; after the last token as at it, before the first 0."""
    row = tl.minimum(tl.maximum(index, 0), count - 1)[:, None]
    found = tl.load(sums + row * (heads * K) + ik[None, :], mask=(ik < K)[None, :], other=0.0)
    return tl.where(index[:, None] < 0, 0.0, found)


@triton.jit
def complement_of(x):
    """1 - e^x in float32. Above -1/2 by its series, for the difference would have fewer digits than a float32 has."""
    rest = 1.0 + x * (1 / 5) * (1.0 + x * (1 / 6) * (1.0 + x * (1 / 7) * (1.0 + x * (1 / 8))))
    small = -x * (1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * rest)))
    return tl.where(tl.abs(x) < 0.5, small, 1.0 - tl.exp(x))


@triton.jit
def key_of(k, at, ok, TIED: tl.constexpr):
    """Some keys in float32. TIED: k is the gates, and a key what they leave room for."""
    key = tl.load(k + at, mask=ok, other=0.0).to(tl.float32)
    return complement_of(key) if TIED else key


@triton.jit
def faded(sums, level, mild, count, heads, ik, C: tl.constexpr, K: tl.constexpr, BEFORE: tl.constexpr):
    """e^{r - b_m} for queries and e^{b_m - b} for keys, m the middle of a token's block of twice 2^level tokens: C × K.

    Unless `mild`, only for queries after m and keys before it: none is above 1.
    """
    ic = tl.arange(0, C)
    side, both = (ic >> level) & 1, mild.to(tl.int32)
    middle = tl.where(side == 1, (ic >> level << level) - 1, ic | ((1 << level) - 1))
    there = at_token(sums, middle, count, heads, ik, K)
    b = at_token(sums, ic, count, heads, ik, K)
    r = at_token(sums, ic - 1, count, heads, ik, K) if BEFORE else b
    asking = tl.where((side + both > 0)[:, None], r - there, -float("inf"))
    writing = tl.where((side - both < 1)[:, None], there - b, -float("inf"))
    return tl.exp2(asking).to(tl.float32), tl.exp2(writing).to(tl.float32)


@triton.jit
def ends_of(sums, count, heads, ik, C: tl.constexpr, K: tl.constexpr, MILD: tl.constexpr):
    """b at the middle of a chunk and at its end, and whether decays from the middle to either end are in range."""
    at, in_k = sums + ik, ik < K
    there = tl.load(at + (tl.minimum(C // 2, count) - 1) * (heads * K), mask=in_k, other=0.0)
    total = tl.load(at + (count - 1) * (heads * K), mask=in_k, other=0.0)
    return there, total, tl.max(tl.maximum(-there, there - total)) < MILD


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def channel_gates(
    q, k, g, u, borders, asked, written, fades, sums, scores, tokens, heads, sequences,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr,
    BEFORE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, MILD: tl.constexpr, SCORES: tl.constexpr,
    ASKED: tl.constexpr, KNOWN: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    """b, q e^r and k e^{b_C - b}: b t h K each; e^{b_C}, a row of K a chunk; with SCORES A: b t h C. Without ASKED
    there is no q; where b is KNOWN q e^r and A are all that is new. TIED: k is g, of which the keys are made.

    Reads q, k and g; b again from the cache. C·C·K multiply-adds a chunk and level, and 2·C·C·K for b.
    """
    h = tl.program_id(0) % heads
    n, start, begin, count = chunk_of(borders, tl.program_id(0) // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    line = (place_of(start, n, begin, C) * heads + h) * K
    ic = tl.arange(0, C)
    here, other = ic[:, None], ic[None, :]
    row = (start + begin) * heads + h
    inside = ic < count
    kind = written.dtype.element_ty
    A = tl.zeros((C, C), tl.float32)
    own = tl.zeros((C,), tl.float32)
    for s in tl.static_range(SLICES):
        ik = s * BK + tl.arange(0, BK)
        in_k = ik < K
        at = row * K + here * (heads * K) + ik[None, :]
        ok = inside[:, None] & in_k[None, :]
        if not KNOWN:
            gates = tl.maximum(tl.load(g + at, mask=ok, other=0.0), FLOOR, propagate_nan=tl.PropagateNan.ALL)
        if ASKED:
            query = tl.load(q + at, mask=ok, other=0.0)
        if TIED and not KNOWN:
            key = complement_of(gates)
        else:
            key = key_of(k, at, ok, TIED)
        if not KNOWN:
            if EXACT:
                b = tl.cumsum(gates.to(tl.float64) * LOG2_E, 0)
            else:
                b = summed(other <= here, gates * LOG2_E, tl.float16)
            tl.store(sums + at, b, mask=ok)
            tl.debug_barrier()
        if ASKED:
            query = query.to(tl.float32)
        b = at_token(sums + row * K, ic, count, heads, ik, K)
        r = at_token(sums + row * K, ic - 1, count, heads, ik, K) if BEFORE else b
        there, total, mild = ends_of(sums + row * K, count, heads, ik, C, K, MILD)
        if not KNOWN:
            tl.store(fades + line + ik, tl.exp2(total).to(tl.float32), mask=in_k)
        if SCORES:
            if BEFORE:
                weight = tl.load(u + h * K + ik, mask=in_k, other=0.0)
                own += tl.sum(query * weight[None, :] * key, 1)
            else:
                own += tl.sum(query * key, 1)
        if mild:
            if ASKED:
                queries = query * tl.exp2(r - there[None, :]).to(tl.float32)
            keys = key * tl.exp2(there[None, :] - b).to(tl.float32)
            if ASKED:
                tl.store(asked + at, queries * tl.exp2(there).to(tl.float32)[None, :], mask=ok)
            if not KNOWN:
                tl.store(written + at, keys * tl.exp2(total - there).to(tl.float32)[None, :], mask=ok)
            if SCORES:
                A = plus_product(A, queries.to(kind), tl.trans(keys.to(kind)), inside[:, None], "ieee")
        else:
            if ASKED:
                tl.store(asked + at, query * tl.exp2(r).to(tl.float32), mask=ok)
            if not KNOWN:
                tl.store(written + at, key * tl.exp2(total[None, :] - b).to(tl.float32), mask=ok)
            if SCORES:
                steepest = tl.min(tl.load(g + at, mask=ok, other=0.0)) * LOG2_E
                level = LEVELS - 1
                while level >= 0:
                    mild = steepest * (1 << level) > -MILD
                    asking, writing = faded(sums + row * K, level, mild, count, heads, ik, C, K, BEFORE)
                    queries = (tl.load(q + at, mask=ok, other=0.0).to(tl.float32) * asking).to(kind)
                    keys = (key_of(k, at, ok, TIED) * writing).to(kind)
                    meet = ((here ^ other) >> level < 2) & (here > other)
                    A += tl.where(meet, tl.dot(queries, tl.trans(keys), input_precision="ieee"), 0.0)
                    level -= 1 + mild.to(tl.int32) * LEVELS
    if SCORES:
        A = tl.where(here > other, A, tl.where(here == other, own[:, None], 0.0))
        tl.store(scores + row * C + here * (heads * C) + other, A, mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots"])
def channel_sweep(
    x, y, z, fades, scores, borders, entry, out, end, kept, tokens, heads, segments, slots,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, OUT: tl.constexpr, END: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """One slice of out = x S + A z over a segment of one head of one sequence, S <- e^{b_C} S + yᵀ z.

    With KEPT the state that meets each chunk is kept at its `place_of`, in the tokens' dtype; without OUT nothing else
    is made. Reads x, y and A, its slice of z, K numbers a chunk. 2·C·X·BZ + C·C·BZ multiply-adds a chunk.
    """
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    in_cell = in_x[:, None] & in_z[None, :]
    cell = ix[:, None] * Z + iz[None, :]
    nh = (n * heads + h).to(tl.int64)
    if ENTRY:
        S = tl.load(entry + (nh * slots + segment) * X * Z + cell, mask=in_cell, other=0.0)
    else:
        S = tl.zeros((BX, BZ), tl.float32)

    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    if REVERSE:
        at_scores = ic[:, None] + ic[None, :] * (heads * C)
    else:
        at_scores = ic[:, None] * (heads * C) + ic[None, :]
    chunks = tl.cdiv(stop - first, C)
    # what feeds no dot is not pipelined: how a memory fades is asked for a chunk before it is needed
    line = place_of(start, n, first + (chunks - 1) * C if REVERSE else first, C) * heads + h
    fade = tl.load(fades + line * X + ix, mask=in_x & (chunks > 0), other=0.0)
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C if REVERSE else first + i * C
        inside = ic < stop - begin
        row = (start + begin) * heads + h  # 64 bits for where a chunk begins, 32 within it
        in_rows_x = inside[:, None] & in_x[None, :]
        in_rows_z = inside[:, None] & in_z[None, :]
        coming = line - heads if REVERSE else line + heads
        fade_then = tl.load(fades + coming * X + ix, mask=in_x & (i + 1 < chunks), other=0.0)
        by = tl.load(y + row * X + at_x, mask=in_rows_x, other=0.0)
        bz = tl.load(z + row * Z + at_z, mask=in_rows_z, other=0.0)
        if KEPT:
            tl.store(kept + line.to(tl.int64) * X * Z + cell, S, mask=in_cell)
        if OUT:
            bx = tl.load(x + row * X + at_x, mask=in_rows_x, other=0.0)
            there = inside[None, :] if REVERSE else inside[:, None]  # beyond the last token, columns are zeros
            A = tl.load(scores + row * C + at_scores, mask=there, other=0.0)
            o = tl.dot(bx, S.to(bx.dtype), input_precision=PRECISION)
            o = tl.dot(A, bz, o, input_precision=PRECISION)
            tl.store(out + row * Z + at_z, o, mask=in_rows_z)
        S = tl.dot(tl.trans(by), bz, S * fade[:, None], input_precision=PRECISION)
        line, fade = coming, fade_then

    if END:
        tl.store(end + nh * X * Z + cell, S, mask=in_cell)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def channel_outputs(
    x, z, scores, states, borders, out, tokens, heads, sequences,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """One slice of out = x S + A z of one chunk, where the memories before chunks are known: no chain of chunks.

    Reads x, A, its slice of z and of the memory. C·X·BZ + C·C·BZ multiply-adds.
    """
    s = tl.program_id(0) % SLICES
    h = tl.program_id(0) // SLICES % heads
    n, start, begin, count = chunk_of(borders, tl.program_id(0) // SLICES // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    ic, ix = tl.arange(0, C), tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    inside, in_x, in_z = ic < count, ix < X, iz < Z
    row = (start + begin) * heads + h
    place = place_of(start, n, begin, C) * heads + h
    at_z = row * Z + ic[:, None] * (heads * Z) + iz[None, :]
    cell = place.to(tl.int64) * X * Z + ix[:, None] * Z + iz[None, :]
    S = tl.load(states + cell, mask=in_x[:, None] & in_z[None, :], other=0.0)
    at_x = row * X + ic[:, None] * (heads * X) + ix[None, :]
    bx = tl.load(x + at_x, mask=inside[:, None] & in_x[None, :], other=0.0)
    at_scores = row * C + ic[:, None] * (heads * C) + ic[None, :]
    A = tl.load(scores + at_scores, mask=inside[:, None], other=0.0)
    bz = tl.load(z + at_z, mask=inside[:, None] & in_z[None, :], other=0.0)
    o = tl.dot(bx, S.to(bx.dtype), input_precision="ieee")
    o = tl.dot(A, bz, o, input_precision="ieee")
    tl.store(out + at_z, o, mask=inside[:, None] & in_z[None, :])


@triton.jit
def gradients_of_chunk(
    do, q, k, v, u, sums, states, cotangents, dq, dk, dg, du, ic, ik, iv, count, heads, wanted,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, BEFORE: tl.constexpr,
    EXACT: tl.constexpr, MILD: tl.constexpr, GATES: tl.constexpr, BONUS: tl.constexpr, KEYS: tl.constexpr,
    TIED: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """`channel_gradients`, every pointer being at its chunk. ONE: of mild gates, all pairs in one product.
    dq is stored where it is `wanted`."""
    in_k, in_v = ik < K, iv < V
    here, other = ic[:, None], ic[None, :]
    kind = do.dtype.element_ty
    inside = ic < count
    at_k = here * (heads * K) + ik[None, :]
    at_v = here * (heads * V) + iv[None, :]
    ok_k, ok_v = inside[:, None] & in_k[None, :], inside[:, None] & in_v[None, :]
    cell = ik[:, None] * V + iv[None, :]
    in_cell = in_k[:, None] & in_v[None, :]
    answer = tl.load(do + at_v, mask=ok_v, other=0.0)
    value = tl.load(v + at_v, mask=ok_v, other=0.0)
    M = tl.load(states + cell, mask=in_cell, other=0.0)
    if KEYS:
        D = tl.load(cotangents + cell, mask=in_cell, other=0.0)
    if GATES:
        end = tl.sum(M.to(tl.float32) * D.to(tl.float32), 1)
    if KEYS or EXACT:
        queried = tl.dot(answer, tl.trans(M.to(kind)), input_precision="ieee")
    else:
        queried = summed(answer, tl.trans(M), kind)
    if KEYS:
        query = tl.load(q + at_k, mask=ok_k, other=0.0)
    key = key_of(k, at_k, ok_k, TIED)
    b = at_token(sums, ic, count, heads, ik, K)
    r = b if not BEFORE else at_token(sums, ic - 1, count, heads, ik, K)
    there, total, _ = ends_of(sums, count, heads, ik, C, K, MILD)
    if ONE:
        queried *= tl.exp2(there).to(tl.float32)[None, :]
    P = tl.dot(answer, tl.trans(value), input_precision="ieee")
    if KEYS:
        query = query.to(tl.float32)
    if ONE:
        if not EXACT:  # zeros that lie as products do: all that follows is found once, and there
            nothing = tl.minimum(tl.abs(queried), 0.0)
            b += nothing
            r += nothing
        asking, writing = tl.exp2(r - there[None, :]).to(tl.float32), tl.exp2(there[None, :] - b).to(tl.float32)
        if KEYS:
            queries = (query * asking).to(kind)
        keys = (key * writing).to(kind)
    own = tl.sum(tl.where(here == other, P, 0.0), 1)
    NEAR: tl.constexpr = 1 if BEFORE else 0
    if BEFORE:
        beside = tl.sum(tl.where(here == other + 1, P, 0.0), 1)
    P = tl.where(here > other + NEAR, P, 0.0).to(kind)
    if ONE:
        queried = plus_product(queried, P, keys, inside[:, None], "ieee")
        queried *= asking
    else:
        steepest = tl.min(b - at_token(sums, ic - 1, count, heads, ik, K))
        queried *= tl.exp2(r).to(tl.float32)
        level = LEVELS - 1
        while level >= 0:
            mild = steepest * (1 << level) > -MILD
            asking, writing = faded(sums, level, mild, count, heads, ik, C, K, BEFORE)
            keys = (key_of(k, at_k, ok_k, TIED) * writing).to(kind)
            met = tl.where((here ^ other) >> level < 2, P, 0.0).to(kind)
            queried += asking * tl.dot(met, keys, input_precision="ieee")
            level -= 1 + mild.to(tl.int32) * LEVELS
    weight = tl.full((BK,), 1.0, tl.float32)
    if BEFORE:
        weight = tl.load(u + ik, mask=in_k, other=0.0)
    if KEYS:
        change = query * queried
    if wanted != 0:
        queried += own[:, None] * key * weight[None, :]
        if BEFORE:
            queried += beside[:, None] * key_of(k, at_k - heads * K, ok_k & (here > 0), TIED)
        tl.store(dq + at_k, queried, mask=ok_k)
    if KEYS:
        if BONUS:
            tl.store(du + ik, tl.sum(own[:, None] * query * key, 0), mask=in_k)

        there, total, _ = ends_of(sums, count, heads, ik, C, K, MILD)
        keyed = tl.dot(value, tl.trans(D), input_precision="ieee")
        turned = tl.dot(value, tl.trans(answer), input_precision="ieee")
        if BEFORE:
            beside = tl.sum(tl.where(here + 1 == other, turned, 0.0), 1)
        turned = tl.where(here + NEAR < other, turned, 0.0).to(kind)
        if GATES:
            end *= tl.exp2(total).to(tl.float32)
        if ONE:
            keyed *= writing * tl.exp2(total - there).to(tl.float32)[None, :]
            if GATES:
                end += tl.sum(key * keyed, 0)
            keyed += writing * tl.dot(turned, queries, input_precision="ieee")
        else:
            keyed *= tl.exp2(total[None, :] - b).to(tl.float32)
            if GATES:
                end += tl.sum(key * keyed, 0)
            level = LEVELS - 1
            while level >= 0:
                mild = steepest * (1 << level) > -MILD
                asking, writing = faded(sums, level, mild, count, heads, ik, C, K, BEFORE)
                queries = (tl.load(q + at_k, mask=ok_k, other=0.0).to(tl.float32) * asking).to(kind)
                met = tl.where((here ^ other) >> level < 2, turned, 0.0).to(kind)
                keyed += writing * tl.dot(met, queries, input_precision="ieee")
                level -= 1 + mild.to(tl.int32) * LEVELS
        if GATES:
            later = change - key * keyed
        keyed += own[:, None] * query * weight[None, :]
        if BEFORE:
            after = tl.load(q + at_k + heads * K, mask=ok_k & (here + 1 < count), other=0.0)
            keyed += beside[:, None] * after.to(tl.float32)
        if not TIED:
            tl.store(dk + at_k, keyed, mask=ok_k)
        if GATES:
            if EXACT:
                since = tl.cumsum(later, 0, reverse=True)
            else:
                largest = tl.maximum(tl.max(tl.abs(later)), 1e-30)
                since = summed(other >= here, later / largest, tl.float16) * largest
            since += end[None, :]
            if BEFORE:
                since -= change
            if not ONE:
                b = at_token(sums, ic, count, heads, ik, K)
                since = tl.where(b - at_token(sums, ic - 1, count, heads, ik, K) < NOTHING, 0.0, since)
            if TIED:  # dk's part: -e^g
                since -= (1.0 - key) * keyed
            tl.store(dg + at_k, since, mask=ok_k)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences", "queries"])
def channel_gradients(
    do, q, k, v, u, sums, states, cotangents, borders, dq, dk, dg, du, tokens, heads, sequences, queries,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, MILD: tl.constexpr,
    GATES: tl.constexpr, BONUS: tl.constexpr, KEYS: tl.constexpr, TIED: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of one chunk, a slice of channels; with BONUS du of the chunk, at its `place_of`. Where `queries`
    is 0 all but dq: a branch, since a kernel of its own would take five seconds to compile. Without KEYS dq alone, of
    which q is no part. TIED: k is the gates, and what their keys receive goes to dg.

    Reads do, v and b, its slice of q, k, of the memory before the chunk and the cotangent of that after it.
    Multiply-adds: 2·C·C·V + 2·C·V·BK, and 2·C·C·BK for each level, mostly one.
    """
    s = tl.program_id(0) % SLICES
    h = tl.program_id(0) // SLICES % heads
    n, start, begin, count = chunk_of(borders, tl.program_id(0) // SLICES // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    ic, iv = tl.arange(0, C), tl.arange(0, BV)
    ik = s * BK + tl.arange(0, BK)
    row = (start + begin) * heads + h
    place = place_of(start, n, begin, C) * heads + h
    sums += row * K
    states += place.to(tl.int64) * K * V
    if KEYS:
        cotangents += place.to(tl.int64) * K * V
        q += row * K
        if not TIED:
            dk += row * K
    dq += row * K
    k, do, v = k + row * K, do + row * V, v + row * V
    if GATES:
        dg += row * K
    if BONUS:
        du += place * K
    if BEFORE:
        u += h * K
    ask_ahead(do, heads * V, count, ic, V, BV)
    ask_ahead(v, heads * V, count, ic, V, BV)
    ask_ahead(states + s * BK * V, V, K - s * BK, tl.arange(0, BK), V, BV)
    ask_ahead(sums + s * BK, heads * K, count, ic, K - s * BK, BK)
    ask_ahead(k + s * BK, heads * K, count, ic, K - s * BK, BK)
    if KEYS:
        ask_ahead(cotangents + s * BK * V, V, K - s * BK, tl.arange(0, BK), V, BV)
        ask_ahead(q + s * BK, heads * K, count, ic, K - s * BK, BK)
    _, _, mild = ends_of(sums, count, heads, ik, C, K, MILD)
    if mild and (not BEFORE):  # whose sums and bonus would need more registers than there are
        gradients_of_chunk(
            do, q, k, v, u, sums, states, cotangents, dq, dk, dg, du, ic, ik, iv, count, heads, queries,
            K, V, BK, C, LEVELS, BEFORE, EXACT, MILD, GATES, BONUS, KEYS, TIED, True,
        )  # fmt: skip
    else:
        gradients_of_chunk(
            do, q, k, v, u, sums, states, cotangents, dq, dk, dg, du, ic, ik, iv, count, heads, queries,
            K, V, BK, C, LEVELS, BEFORE, EXACT, MILD, GATES, BONUS, KEYS, TIED, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "heads", "segments"])
def channel_span(
    y, z, fades, borders, states, totals, tokens, heads, segments,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment does to a memory, M -> e^total M + S by row: the state update of `channel_sweep` alone.

    S goes to the slot that `channel_fold` turns into the memory behind this segment; e^total: n h segments K.
    """
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    S = tl.zeros((BX, BZ), tl.float32)
    total = tl.full((BX,), 1.0, tl.float32)
    chunks = tl.cdiv(stop - first, C)
    line = place_of(start, n, first + (chunks - 1) * C if REVERSE else first, C) * heads + h
    fade = tl.load(fades + line * X + ix, mask=in_x & (chunks > 0), other=0.0)
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C if REVERSE else first + i * C
        inside = ic < stop - begin
        row = (start + begin) * heads + h
        coming = line - heads if REVERSE else line + heads
        fade_then = tl.load(fades + coming * X + ix, mask=in_x & (i + 1 < chunks), other=0.0)
        by = tl.load(y + row * X + at_x, mask=inside[:, None] & in_x[None, :], other=0.0)
        bz = tl.load(z + row * Z + at_z, mask=inside[:, None] & in_z[None, :], other=0.0)
        S = tl.dot(tl.trans(by), bz, S * fade[:, None], input_precision=PRECISION)
        total *= fade
        line, fade = coming, fade_then

    nh = (n * heads + h).to(tl.int64)
    slot = segment if REVERSE else segment + 1
    cell = ix[:, None] * Z + iz[None, :]
    tl.store(states + (nh * (segments + 1) + slot) * X * Z + cell, S, mask=in_x[:, None] & in_z[None, :])
    tl.store(totals + (nh * segments + segment) * X + ix, total, mask=in_x & (s == 0))


@triton.jit(do_not_specialize=["segments"])
def channel_fold(
    states, totals, first, last, segments,
    X: tl.constexpr, Z: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    REVERSE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The memories before every segment and after the last (backwards: their cotangents), in place of what the
    segments wrote: M_0 = first, M_{s+1} = e^{total_s} M_s + S_s by row. Reads and writes `states` once."""
    pid = tl.program_id(0)
    nh = (pid // BLOCKS).to(tl.int64)
    cell = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < X * Z
    states += nh * (segments + 1) * X * Z
    if FIRST:
        M = tl.load(first + nh * X * Z + cell, mask=inside, other=0.0)
    else:
        M = tl.zeros((BLOCK,), tl.float32)
    end = segments if REVERSE else 0
    tl.store(states + end * X * Z + cell, M, mask=inside)
    for i in range(0, segments):
        segment = segments - 1 - i if REVERSE else i
        slot = states + (segment if REVERSE else segment + 1) * X * Z + cell
        total = tl.load(totals + (nh * segments + segment) * X + cell // Z, mask=inside, other=0.0)
        M = M * total + tl.load(slot, mask=inside, other=0.0)
        tl.store(slot, M, mask=inside)
    tl.store(last + nh * X * Z + cell, M, mask=inside)


@triton.jit(do_not_specialize=["heads"])
def channel_step(
    q, k, v, g, u, memory, o, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, BEFORE: tl.constexpr,
    TIED: tl.constexpr,
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
    bk = key_of(k, row * K + ik, in_k, TIED)
    bv = tl.load(v + row * V + iv, mask=in_v, other=0.0).to(tl.float32)
    fade = tl.exp(tl.load(g + row * K + ik, mask=in_k, other=0.0))
    after = M * fade[:, None] + bk[:, None] * bv[None, :]
    tl.store(cell, after, mask=in_cell)
    if BEFORE:
        weight = tl.load(u + row % heads * K + ik, mask=in_k, other=0.0)
        after = M + (weight * bk)[:, None] * bv[None, :]
    tl.store(o + row * V + iv, tl.sum(bq[:, None] * after, 0), mask=in_v)


# ------------------------------------------------------------------------------------------------ the launchers
# Tensors are contiguous, K and V multiples of 16, gates, bonus and memories float32. g : b t h K, u : None | h K. k is
# None where keys are what gates leave room for, 1 - e^g: they are made where g is read.


def segments_for(q: Tensor, v: Tensor, sequences: int) -> int:
    """In how many segments to cut each sequence: two programs a multiprocessor, and at least 512 tokens a segment."""

    columns = min(CONFIG[padded(q.shape[-1]), q.element_size()][0], padded(v.shape[-1]))
    programs = sequences * q.shape[2] * cdiv(v.shape[-1], columns)
    fit = 2 * decay.multiprocessors(q.device) // max(programs, 1)
    return decay.long_enough(fit if fit > 2 else 1, q, sequences)


def shape_of(x: Tensor, z: Tensor, borders: Tensor | None) -> dict:
    """The compile-time arguments of a sweep or span whose state is x's columns × z's columns."""
    return shape_by_numbers(x.shape[-1], z.shape[-1], x.element_size(), borders is not None)


@functools.cache
def shape_by_numbers(X: int, Z: int, width: int, packed: bool) -> dict:
    columns, warps, stages = CONFIG[padded(X), width]
    columns = min(columns, padded(Z))
    sizes = {"X": X, "Z": Z, "BX": padded(X), "BZ": columns, "SLICES": cdiv(Z, columns), "C": CHUNK[width]}
    return {**sizes, "PACKED": packed, "PRECISION": "ieee", "num_warps": warps, "num_stages": stages}


def pairs_of(g: Tensor, dtype: torch.dtype, u: Tensor | None, borders: Tensor | None, line: tuple[int, int]) -> dict:
    """The compile-time arguments of a kernel that takes chunks of tokens of `dtype` one by one, some channels at a
    time, as many as g has."""
    return pairs_by_numbers(g.shape[-1], dtype, u is not None, borders is not None, *line)


@functools.cache
def pairs_by_numbers(K: int, dtype: torch.dtype, before: bool, packed: bool, channels: int, warps: int) -> dict:
    chunk = CHUNK[dtype.itemsize]
    sizes = {"K": K, "BK": channels, "SLICES": cdiv(K, channels), "C": chunk, "LEVELS": chunk.bit_length() - 1}
    kind = {"BEFORE": before, "PACKED": packed, "EXACT": dtype.itemsize == 4, "MILD": MILD[dtype]}
    return {**sizes, **kind, "num_warps": warps}


def sums_in(q: Tensor) -> torch.dtype:
    """The dtype of running sums of gates."""
    return torch.float64 if q.element_size() == 4 else torch.float32


def gates(q, k, g, u, borders, like, scores=None, known=None) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """`channel_gates`: q e^r (None without q), k e^{b_C - b}, e^{b_C} and b, in the dtype of `like`; fills `scores`.
    `known`: the last three, as they were found before."""
    (_, t, h, K), width, dtype = g.shape, like.element_size(), like.dtype
    asked = None if q is None else torch.empty_like(g, dtype=dtype)
    if known is None:
        fades = g.new_empty(places(g, borders, CHUNK[width]), h, K)
        made = torch.empty_like(g, dtype=dtype), fades, torch.empty_like(g, dtype=sums_in(like))
    written, fades, sums = known or made
    decay.launch(
        channel_gates, chunks_of(g, borders, CHUNK[width]) * h,
        g if q is None else q, g if k is None else k, g, u, borders, asked, written, fades, sums, scores, t, h,
        sequences_of(g, borders), **pairs_of(g, dtype, u, borders, FOLDING[width]), SCORES=scores is not None,
        ASKED=q is not None, KNOWN=known is not None, TIED=k is None,
    )  # fmt: skip
    return asked, written, fades, sums


def sweep(
    x, y, z, fades, scores, borders, entry, *, out=None, end=None, kept=None, segments=1, slots=1, reverse=False
) -> None:
    """`channel_sweep`: fills `out`, `end` with the last state and `kept` with those that meet each chunk."""
    shape = shape_of(y, z, borders)
    decay.launch(
        channel_sweep, shape["SLICES"] * segments * z.shape[2] * sequences_of(y, borders),
        y if x is None else x, y, z, fades, scores, borders, entry, out, end, kept, *y.shape[1:3], segments, slots,
        **shape, REVERSE=reverse, ENTRY=entry is not None, OUT=out is not None, END=end is not None,
        KEPT=kept is not None,
    )  # fmt: skip


def between(y, z, fades, borders, first, segments, reverse=False) -> tuple[Tensor, Tensor]:
    """The memories between segments (n h segments+1 K V) and the one at the far end (n h K V), from `first`."""
    n, h, K, V = sequences_of(y, borders), *y.shape[2:], z.shape[-1]
    states = y.new_empty(n, h, segments + 1, K, V, dtype=torch.float32)
    totals = y.new_empty(n, h, segments, K, dtype=torch.float32)
    last = torch.empty_like(states[:, :, 0])
    shape = shape_of(y, z, borders)
    decay.launch(
        channel_span, shape["SLICES"] * segments * h * n, y, z, fades, borders, states, totals, y.shape[1], h, segments,
        **shape, REVERSE=reverse,
    )  # fmt: skip
    block = min(1024, next_power_of_2(K * V))
    blocks = cdiv(K * V, block)
    decay.launch(
        channel_fold, n * h * blocks, states, totals, first, last, segments,
        X=K, Z=V, BLOCK=block, BLOCKS=blocks, REVERSE=reverse, FIRST=first is not None,
    )  # fmt: skip
    return states, last


def end(q, k, z, g, u, borders, segments: int, reverse: bool) -> Tensor:
    """What tokens leave of an empty memory, z their v; or reverse, z their do, what the memory before them receives."""
    asked, written, fades, _ = gates(q, k, g, u, borders, q)
    return between(asked if reverse else written, z, fades, borders, None, segments, reverse)[1]


def memories(q: Tensor, v: Tensor, borders: Tensor | None) -> tuple[int, ...]:
    """The shape of the memories of all chunks."""
    return places(q, borders, CHUNK[q.element_size()]), q.shape[2], q.shape[3], v.shape[3]


def forward(q, k, v, g, u, memory, borders, segments: int, wide: bool, keep: bool) -> tuple[Tensor, ...]:
    """(o, the last memory, A, q e^r, k e^{b_C - b}, e^{b_C}, b, the memory before every chunk). `wide`: o in float32.

    `keep`: what the gradient needs is kept; else all but the first two are empty.
    """
    scores = scores_for(q)
    asked, written, fades, sums = gates(q, k, g, u, borders, q, scores)
    sums = sums if keep else None  # 2 U, free for o
    o = torch.empty_like(v, dtype=torch.float32 if wide else v.dtype)
    last, met = onwards(asked, written, v, fades, scores, memory, borders, segments, o, q.dtype if keep else None)
    kept = scores, asked, written, fades, sums, met
    return o, last, *(kept if keep else (q.new_empty(0) for _ in kept))


def scores_for(q: Tensor) -> Tensor:
    """Where A of all chunks goes."""
    return q.new_empty(*q.shape[:3], CHUNK[q.element_size()])


def onwards(asked, written, v, fades, scores, memory, borders, segments, o, keep) -> tuple[Tensor, Tensor | None]:
    """One sweep forwards, from `memory`: fills o, if there is one; (the last memory, those before chunks in `keep`)."""
    last = fades.new_empty(sequences_of(written, borders), *written.shape[2:], v.shape[-1])
    met = None if keep is None else written.new_empty(memories(written, v, borders), dtype=keep)
    run, start, end = {}, memory, last
    if segments > 1:
        states, last = between(written, v, fades, borders, memory, segments)
        run, start, end = {"segments": segments, "slots": segments + 1}, states, None
    sweep(asked, written, v, fades, scores, borders, start, out=o, end=end, kept=met, **run)
    return last, met


def outputs(asked, v, scores, met, borders) -> Tensor:
    """`channel_outputs`: o of queries by other ones than those of the sweep that kept the memories `met`."""
    (_, t, h, K), V, width = asked.shape, v.shape[-1], v.element_size()
    o, columns = torch.empty_like(v), min(APART[width], padded(V))
    decay.launch(
        channel_outputs, chunks_of(v, borders, CHUNK[width]) * h * cdiv(V, columns),
        asked, v, scores, met, borders, o, t, h, sequences_of(v, borders), X=K, Z=V, BX=padded(K), BZ=columns,
        SLICES=cdiv(V, columns), C=CHUNK[width], PACKED=borders is not None, num_warps=4,
    )  # fmt: skip
    return o


def backward(
    do, dlast, q, k, v, u, borders, scores, asked, written, fades, sums, met, segments, want_g, want_u, want_q=True,
    tied=False,
):  # fmt: skip
    """(dq, dk, dv, dg, du, dmemory) from the cotangents of o and of the last memory (None: zeros); dq, dg and du are
    None unless wanted. `tied`: k is g, of which keys are made; dk is None, and what they receive is in dg. Others may
    read what was kept again: nothing of it is overwritten."""
    run, far = {"segments": segments}, dlast
    if segments > 1:
        cotangents, dmemory = between(asked, do, fades, borders, dlast, segments, reverse=True)
        run["slots"], far, stop = segments + 1, cotangents[:, :, 1:], None
    else:
        dmemory = stop = fades.new_empty(sequences_of(q, borders), *q.shape[2:], v.shape[-1])
    dv, cotangents = torch.empty_like(v), torch.empty_like(met, dtype=v.dtype)
    sweep(written, asked, do, fades, scores, borders, far, out=dv, end=stop, kept=cotangents, reverse=True, **run)
    dq = torch.empty_like(q) if want_q else None
    dk, dg, du = gradients(do, q, k, v, u, sums, met, cotangents, borders, dq, want_g, want_u, tied)
    return dq, dk, dv, dg, du, dmemory


def gradients(do, q, k, v, u, sums, states, cotangents, borders, dq, want_g=False, want_u=False, tied=False):
    """`channel_gradients`: (dk, dg, du); fills dq, if there is one. Without q nothing else. `tied`: as above."""
    (_, t, h, K), V, width = k.shape, v.shape[-1], v.element_size()
    shape = pairs_of(k, v.dtype, u, borders, FINISHING[width])
    dk = None if q is None or tied else torch.empty_like(k)
    dg = torch.empty_like(sums, dtype=torch.float32) if want_g else None
    du = sums.new_zeros(places(k, borders, shape["C"]), h, K, dtype=torch.float32) if want_u else None
    decay.launch(
        channel_gradients, chunks_of(k, borders, shape["C"]) * h * shape["SLICES"],
        do, q, k, v, u, sums, states, cotangents, borders, q if dq is None else dq, dk, dg, du, t, h,
        sequences_of(k, borders), int(dq is not None), V=V, BV=max(shape["BK"], padded(V)), **shape, GATES=want_g,
        BONUS=want_u, KEYS=q is not None, TIED=tied,
    )  # fmt: skip
    return dk, dg, du if du is None else du.sum(0)


def step(q, k, v, g, u, memory) -> Tensor:
    """o : b h V in float32 of one token a sequence, q k g : b h K, v : b h V, u : None | h K; overwrites memory."""
    given = q, g if k is None else k, v, g, u, memory
    return decay.one_token(channel_step, given, v, q.shape[1], BEFORE=u is not None, TIED=k is None)
