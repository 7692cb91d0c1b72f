"""Triton kernels for delta rules: with M̂ = e^{g_t} M_{t-1}, M_t = M̂ + β_t k_tᵀ (v_t - k_t M̂), o_t = q_t M_t.

The gate is nothing (DeltaNet) or a number a head and token (Gated DeltaNet, Gated DeltaProduct). Or a vector of its own
erases (Comba): r_t = v_t - a_t M_{t-1}, from the memory before its decay, M_t = e^{g_t} M_{t-1} + β_t k_tᵀ r_t.

In a chunk of C tokens, with b_i = g_1 + ... + g_i, γ_ij = e^{b_i - b_j}, the state S from before the chunk and
L = stril(k kᵀ γ), the news r_t = v_t - k_t M̂ (what a token tells the memory) solve (I + L diag(β)) r = v - e^b (k S).
The inverse is I - Y diag(β) with Y = (I + L diag(β))⁻¹ L, strictly lower triangular. So, forwards

    ρ = v - e^b (k S)        r = ρ - Y β ρ        o = e^b (q S) + tril(q kᵀ γ) β r
    S <- e^{b_C} S + kᵀ (e^{b_C - b} β r)

and with r for given the memory is an ordinary one that writes k_tᵀ β_t r_t. Backwards, with D_t the cotangent of M_t
and E the state from behind the chunk, û = β r has the cotangent dû_t = k_t D_t and solves the transposed system:

    ρ = e^{b_C - b} (k E) + triu(k qᵀ γᵀ) do        dû = ρ - Yᵀ β ρ        dv = β dû        dβ_t = dû_t · r_t
    E <- e^{b_C} E + qᵀ (e^b do) - kᵀ (e^b dv)

    dq_t = do_t M_tᵀ        dk_t = β_t r_t D_tᵀ - dv_t M̂ᵀ        dg_t = dg_{t+1} + q_t·dq_t - r_t·dv_t - k_t M̂ · dv_t

The last with dg_{T+1} = <M_T, dM_T>: <M_t, D_t> is q_t·dq_t + dg_{t+1}, and dg_t = <M̂, D_t - k_tᵀ dv_t>. (In sum
r_t + k_t M̂ is v_t. But the memory that goes with rounded r is another by as much, and the sum over tokens sees it.)

With a vector a that erases apart from keys (APART) the same, with c_i = b_{i-1}: L = stril(a kᵀ γ'), γ'_ij =
e^{c_i - b_j}, and nothing else is solved. It stands where keys erase,

    ρ = v - e^c (a S)        E <- e^{b_C} E + qᵀ (e^b do) - aᵀ (e^c dv)        da_t = -dv_t M_{t-1}ᵀ
    dk_t = β_t r_t D_tᵀ

and the gates' gradient dg_t = <e^{g_t} M_{t-1}, D_t> is by chunk, with ' for what came through S or E and '' for what
came from other tokens of the chunk, as in `rank_one.py`,

    dg_t = e^{b_C} <S, E> + Σ_{s<t} k dk' + Σ_{s>=t} (q dq' + q dq'' - k dk'') + Σ_{s>t} a da

since a_t finds a memory that token t's gate has not decayed: a dv that is rounded is on both sides of it, and cancels.

Two kernels know nothing of memories and run for all chunks at once: `delta_prepare` makes A = stril(q kᵀ γ), q·k and
Y, by halves from single tokens up: Y_b of the two halves, L_o of the later half's tokens with the earlier's keys, Z =
L_o - L_o β Y_b, Y = Y_b + Z - Y_b β Z. `delta_pairs` makes stril(do rᵀ γ), stril(dv rᵀ γ) and r·do. Two are sweeps as
in `decay.py`: a program owns a slice of the output's columns, streams through time and keeps its slice of the state
in registers; with a gradient in sight they leave the state of every chunk in the tokens' dtype, as products take it.
From these `delta_chunks` has the rest, again for all chunks at once.

    delta_values     o, r          forwards     the memory before every chunk         S     K × V     a slice of V
    delta_answers    dv            backwards    the cotangent behind every chunk      E     K × V     a slice of V
    delta_chunks     the others    all at once                                                        a slice of K

Two more sweeps (a memory built again from r, a cotangent from dv) instead of memories kept, 4 U on the way, made the
whole 1.3 to 1.5 times slower, each of their slices reading do, dv and r, and less exact: a delta rule corrects the
errors of its own memory, one built again keeps the rounding of each token.

Segments. What a stretch of tokens does to a memory costs a K × K matrix: the sweep once more without outputs, from zero
and from the identity (SPAN). Then `delta_fold` has the memories between, and all segments run at once. So it is done
only where there are too few programs for half of the GPU.

Gates. As in `decay.py`, whose sums of gates these are. The sum for dg runs within a chunk alone: <M, E> is known for
every chunk. A token's own term, (q·k) (β r·do), is in q·dq and in r·dv. What pairs add to it is summed before they are
rounded to 16 bits, and what dv loses by that, δ, is made good as δ·v, since r + k M̂ is v but for roundings of its own:
without either a gate's gradient had up to 1.5 of the error budget. (With a vector apart only the former.)

Precision. Y is found in float32: in products of tf32 for bfloat16 tokens, of three tf32 for float16, and it is stored
as they are. A chunk has at most K tokens: more keys than channels depend on each other and the system loses digits
(chunks of float32 have 16 all the same).

Bytes and operations. In U = one b t h d tensor in 16 bits, K = V = d = 128, C = 64: `delta_prepare` reads 2 U and
writes 1; values 4 and 1, and 3 more for r and memories; answers 4 (5 with a gate) and 3; pairs 3 (5 with a gate) and 1;
chunks 10 and 2. So 8 U forward where the floor is 4, and 39 U with the gradient where it is 11. Kept for the gradient:
r, A, Y and the memories, 4 U; on the way back the cotangents and pairs, 3 U. A vector apart is read by all five, da is
written, and answers do not read v: 10 U of 5, 44 U of 14. Multiply-adds a token and head: preparing 2·C·d, 6·16² and
4·C²; values and answers 3·d² + 2·C·d; pairs 2·C·d (4·C·d with a gate); chunks 3·d² + 4·C·d.

Compilers: what `decay.py` says. No dot's result is transposed; no 16-bit line of CONFIG has one stage. With chunks of
64 tokens `delta_chunks` has 64 channels a program: with 32, and more columns than that, dk and dβ are wrong by
hundreds on Triton 3.6.0, in 16 bits, as gradients of `channel.py` were (K = 256 had them). Compiled for Hopper by
Triton 3.7.1 at d = 128 in 16 bits at most 24 bytes of a thread's registers spill, with a vector apart 40. The sweeps
and `delta_chunks` take 115 KB of shared memory, so that two programs fit a multiprocessor; sweeps with a vector apart
115,712 bytes (87 KB backwards), the very last that do, by way of registers (`faded`; 148 KB without). With more than
128 channels they would spill 296 bytes, or without a gate not fit: these are `rank_one.py`'s. With V = 256
`delta_chunks` does not fit: columns beyond 128 are computed on their own (`fast/delta.py`).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay
from fast.kernels.decay import (
    cdiv,
    chunk_of,
    chunks_of,
    decays_of,
    padded,
    place_of,
    places,
    power_of_2,
    sequences_of,
    stretch_of,
    sums_of,
)

# padded row size of the state, bytes of a number -> (columns of the output a program, warps, stages)
CONFIG = {
    (16, 2): (16, 4, 2),
    (32, 2): (32, 4, 2),
    (64, 2): (32, 4, 2),
    (128, 2): (32, 4, 2),
    (256, 2): (16, 4, 2),
    (16, 4): (16, 4, 1),
    (32, 4): (32, 4, 1),
    (64, 4): (32, 4, 1),
    (128, 4): (32, 4, 1),
    (256, 4): (16, 8, 1),
}
UNGATED = {(64, 2): (32, 4, 3)}  # in three stages copies are a turn ahead; with a gate they take longer (bench/LOG.md)
# the same for `delta_chunks`: (channels of K a program, warps, stages)
CHUNKS = {
    (16, 2): (16, 4, 2),
    (32, 2): (32, 4, 2),
    (64, 2): (64, 4, 2),
    (128, 2): (64, 4, 2),
    (256, 2): (64, 4, 2),
    (16, 4): (16, 4, 1),
    (32, 4): (32, 4, 1),
    (64, 4): (32, 4, 1),
    (128, 4): (32, 4, 1),
    (256, 4): (16, 4, 1),
}
FOLDED = 128  # channels of K at most: of segments, whose K × K matrices have to fit, and of vectors apart
# how Y is multiplied by itself: products of tf32 are coarser than bfloat16 tokens need, and not than float16 tokens
SOLVING = {torch.float32: "ieee", torch.float16: "tf32x3", torch.bfloat16: "tf32"}


@triton.jit
def joined(L, Y, strength, here, other, FIRST: tl.constexpr, LEVELS: tl.constexpr, SOLVING: tl.constexpr):
    """From Y of blocks of 2^FIRST tokens that of blocks of 2^LEVELS: two products of whole tiles a level."""
    for level in tl.static_range(FIRST, LEVELS):
        half = 1 << level
        meet = (here // (2 * half) == other // (2 * half)) & (here // half > other // half)
        Z = tl.where(meet, L, 0.0)
        Z -= tl.dot(Z, strength * Y, input_precision=SOLVING)
        Y += Z - tl.dot(Y, strength * Z, input_precision=SOLVING)
    return Y


@triton.jit
def solved_by_halves(L, strength, here, other, LEVELS: tl.constexpr, SOLVING: tl.constexpr):
    """Y = (I + L diag(β))⁻¹ L of the part of L below its diagonal: C × C, C = 2^LEVELS; I - Y diag(β) is the inverse.

    Blocks of 16 tokens first, side by side: 6·16² multiply-adds a token; then whole tiles: 2·C² each time that blocks
    double.
    """
    if LEVELS <= 4:
        Y = tl.where((here == other + 1) & (here % 2 == 1), L, 0.0)
        return joined(L, Y, strength[:, None], here, other, 1, LEVELS, SOLVING)
    C: tl.constexpr = 2**LEVELS
    B: tl.constexpr = C // 16
    ib, ic = tl.arange(0, B), tl.arange(0, 16)
    same = ib[:, None, None, None] == ib[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(L, (B, 16, B, 16)), 0.0), 2)
    row, column = ic[None, :, None], ic[None, None, :]
    Y = tl.where((row == column + 1) & (row % 2 == 1), blocks, 0.0)
    Y = joined(blocks, Y, tl.reshape(strength, (B, 16))[:, :, None], row, column, 1, 4, SOLVING)
    Y = tl.reshape(tl.where(same, Y[:, :, None, :], 0.0), (C, C))
    return joined(L, Y, strength[:, None], here, other, 4, LEVELS, SOLVING)


@triton.jit
def sums_before(sums, line, t, inside, ic, total, count_rows, EXACT: tl.constexpr):
    """(hi, lo) of the sum of gates before every token of a chunk, as `sums_of` has that behind it."""
    earlier = inside & (ic > 0)
    hi = tl.load(sums + line + t - 1, mask=earlier, other=tl.where(ic > 0, total, 0.0))
    lo = hi * 0.0
    if EXACT:
        lo = tl.load(sums + count_rows + line + t - 1, mask=earlier, other=0.0)
    return hi, lo


@triton.jit
def decays_before(hi, lo, sums, line, t, inside, ic, total, count_rows, EXACT: tl.constexpr):
    """e^{c_i - b_j} where j < i, else 0: b = hi + lo of `sums_of`, c that before a token."""
    until, until_lo = sums_before(sums, line, t, inside, ic, total, count_rows, EXACT)
    exponent = until[:, None] - hi[None, :]
    if EXACT:
        exponent += until_lo[:, None] - lo[None, :]
    return power_of_2(tl.where(ic[:, None] > ic[None, :], exponent, -float("inf")), EXACT)


@triton.jit
def faded(x, exponents, EXACT: tl.constexpr):
    """Rows of x times 2^exponents, for dots of sweeps.

    What comes to a dot by way of registers needs one buffer, or none, and what does not two: then three tiles of 128
    channels would leave room for one program a multiprocessor.
    """
    return (x.to(tl.float32) * power_of_2(exponents, EXACT)[:, None]).to(x.dtype)


@triton.jit
def sums_where(which, x):
    """C: of every token the sum of x (C) over the tokens s with which[:, s]."""
    return tl.sum(tl.where(which, x[None, :], 0.0), 1)


@triton.jit
def sums_behind(later, erasing, ic, BEFORE: tl.constexpr):
    """Σ_{s>=t} later + Σ_{s>=t, BEFORE: s>t} erasing: C."""
    here, other = ic[:, None], ic[None, :]
    until = (other > here) if BEFORE else (other >= here)
    return sums_where(other >= here, later) + sums_where(until, erasing)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences", "count_rows"])
def delta_prepare(
    q, k, a, beta, g, sums, borders, scores, itself, solved, tokens, heads, sequences, count_rows,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, GATE: tl.constexpr, APART: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, SOLVING: tl.constexpr,
):  # fmt: skip
    """A and Y of every chunk, b t h C in the tokens' dtype, zeros on and above the diagonal; q_t·k_t: h (b t).

    C = 2^LEVELS. Products: 2·C·C·K multiply-adds, and those of `solved_by_halves`.
    """
    pid = tl.program_id(0)
    h = pid % heads
    _, start, begin, count = chunk_of(borders, pid // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    line = h.to(tl.int64) * (count_rows // heads) + start  # of sums: h (b t)
    ic, ik = tl.arange(0, C), tl.arange(0, BK)
    here, other = ic[:, None], ic[None, :]
    t = begin + ic
    inside = ic < count
    row = (start + begin) * heads + h
    at = row * K + here * (heads * K) + ik[None, :]
    ok = inside[:, None] & (ik < K)[None, :]
    bk = tl.load(k + at, mask=ok, other=0.0)
    bq = tl.load(q + at, mask=ok, other=0.0)
    ba = bk
    if APART:
        ba = tl.load(a + at, mask=ok, other=0.0)
    strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
    L = tl.dot(ba, tl.trans(bk), input_precision=PRECISION)
    A = tl.dot(bq, tl.trans(bk), input_precision=PRECISION)
    tl.store(itself + line + t, tl.sum(tl.where(here == other, A, 0.0), 1), mask=inside)
    if GATE != 0:
        hi, lo, _, total = sums_of(
            g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
        )
        between = decays_of(hi, lo, g, 0, ic, GATE, EXACT, False)
        erasing = between
        if APART:
            erasing = decays_before(hi, lo, sums, line, t, inside, ic, total, count_rows, EXACT)
        L = L * erasing
        A = A * between
    at_c = row * C + here * (heads * C) + other
    tl.store(scores + at_c, tl.where(here > other, A, 0.0), mask=inside[:, None])
    Y = solved_by_halves(L, strength, here, other, LEVELS, SOLVING)
    tl.store(solved + at_c, Y, mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count_rows"])
def delta_values(
    q, k, v, beta, g, a, sums, scores, itself, solved, borders, entry, o, news, states, end, moves,
    tokens, heads, segments, slots, count_rows,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, APART: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, KEEP: tl.constexpr, SPAN: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """One slice of o over a segment and, with KEEP, of r and of the memory before every chunk.

    With SPAN only what the segment does to a memory, M -> A M + S: a slice of S, or, by MOVES more programs, of A, the
    memory that the segment makes of the identity without values. Products a chunk: 3·C·X·BZ + 2·C·C·BZ.
    """
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES + MOVES, PACKED)
    line = h.to(tl.int64) * (count_rows // heads) + start

    moving = s >= SLICES
    ix = tl.arange(0, BX)
    iz = (s - SLICES if moving else s) * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, (iz < Z) & (not moving)
    cell = ix[:, None] * Z + iz[None, :]
    in_cell = in_x[:, None] & in_z[None, :]
    nh = (n * heads + h).to(tl.int64)
    if ENTRY:
        S = tl.load(entry + (nh * slots + segment) * X * Z + cell, mask=in_cell, other=0.0)
    elif MOVES > 0:
        S = tl.where(moving & (ix[:, None] == iz[None, :]), 1.0, 0.0)
    else:
        S = tl.zeros((BX, BZ), tl.float32)

    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    at_c = ic[:, None] * (heads * C) + ic[None, :]
    for i in range(0, tl.cdiv(stop - first, C)):
        begin = first + i * C
        t = begin + ic
        inside = t < stop
        row = (start + begin) * heads + h
        in_rows_x = inside[:, None] & in_x[None, :]
        in_rows_z = inside[:, None] & in_z[None, :]
        bk = tl.load(k + row * X + at_x, mask=in_rows_x, other=0.0)
        ba = bk
        if APART:
            ba = tl.load(a + row * X + at_x, mask=in_rows_x, other=0.0)
        bv = tl.load(v + row * Z + at_z, mask=in_rows_z, other=0.0)
        Y = tl.load(solved + row * C + at_c, mask=inside[:, None], other=0.0)
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
        if not SPAN:
            bq = tl.load(q + row * X + at_x, mask=in_rows_x, other=0.0)
            A = tl.load(scores + row * C + at_c, mask=inside[:, None], other=0.0)
            own = tl.load(itself + line + t, mask=inside, other=0.0) * strength
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, _, after, total = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT, APART
            )
        if GATE != 0 and APART:
            until, _ = sums_before(sums, line, t, inside, ic, total, count_rows, EXACT)
            ba = faded(ba, until, EXACT)
            if not SPAN:
                bq = faded(bq, hi, EXACT)
        before = S.to(bk.dtype)
        if KEEP:
            place = (place_of(start, n, begin, C) * heads + h).to(tl.int64) * X * Z
            tl.store(states + place + cell, before, mask=in_cell)
        found = tl.dot(ba, before, input_precision=PRECISION)
        if not SPAN:
            seen = tl.dot(bq, before, input_precision=PRECISION)
        if GATE != 0:
            if not APART:
                reading = power_of_2(hi, EXACT)
                found = found * reading[:, None]
                if not SPAN:
                    seen = seen * reading[:, None]
            S = S * power_of_2(total, EXACT)
        r = bv.to(tl.float32) - found
        r -= tl.dot(Y, (strength[:, None] * r).to(bk.dtype), input_precision=PRECISION)
        written = strength[:, None] * r
        if not SPAN:
            out = tl.dot(A, written.to(bk.dtype), seen + own[:, None] * r, input_precision=PRECISION)
            tl.store(o + row * Z + at_z, out, mask=in_rows_z)
        if KEEP:
            tl.store(news + row * Z + at_z, r, mask=in_rows_z)
        if GATE != 0:
            written = written * power_of_2(after, EXACT)[:, None]
        S = tl.dot(tl.trans(bk), written.to(bk.dtype), S, input_precision=PRECISION)

    if SPAN:
        tl.store(end + (nh * slots + segment + 1) * X * Z + cell, S, mask=in_cell)
        if MOVES > 0:
            cell = ix[:, None] * X + iz[None, :]
            tl.store(
                moves + (nh * segments + segment) * X * X + cell, S, mask=in_x[:, None] & (iz < X)[None, :] & moving
            )
    elif slots == 1:
        tl.store(end + nh * X * Z + cell, S, mask=in_cell)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count_rows"])
def delta_answers(
    do, q, k, beta, g, a, sums, scores, itself, solved, borders, v, entry, dv, cotangents, lost, end,
    tokens, heads, segments, slots, count_rows,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, APART: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, SPAN: tl.constexpr, LOST: tl.constexpr,
):  # fmt: skip
    """One slice of dv and of the memories' cotangents behind every chunk over a segment, backwards; SPAN as above.

    With LOST the slice's part of v times what dv loses when it is rounded: slices h (b t).
    """
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)
    line = h.to(tl.int64) * (count_rows // heads) + start

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    cell = ix[:, None] * Z + iz[None, :]
    in_cell = in_x[:, None] & in_z[None, :]
    nh = (n * heads + h).to(tl.int64)
    if ENTRY:
        E = tl.load(entry + (nh * slots + segment) * X * Z + cell, mask=in_cell, other=0.0)
    else:
        E = tl.zeros((BX, BZ), tl.float32)

    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    at_c = ic[:, None] * (heads * C) + ic[None, :]
    chunks = tl.cdiv(stop - first, C)
    # what feeds no dot is not pipelined: q·k is asked for a chunk before it is needed
    at_last = first + (chunks - 1) * C + ic
    own = tl.load(itself + line + at_last, mask=(at_last >= first) & (at_last < stop), other=0.0)
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C
        t = begin + ic
        inside = t < stop
        row = (start + begin) * heads + h
        in_rows_x = inside[:, None] & in_x[None, :]
        in_rows_z = inside[:, None] & in_z[None, :]
        own_then = tl.load(itself + line + t - C, mask=t - C >= first, other=0.0)
        if LOST:
            bv = tl.load(v + row * Z + at_z, mask=in_rows_z, other=0.0)
        bq = tl.load(q + row * X + at_x, mask=in_rows_x, other=0.0)
        bk = tl.load(k + row * X + at_x, mask=in_rows_x, other=0.0)
        ba = bk
        if APART:
            ba = tl.load(a + row * X + at_x, mask=in_rows_x, other=0.0)
        bdo = tl.load(do + row * Z + at_z, mask=in_rows_z, other=0.0)
        A = tl.load(scores + row * C + at_c, mask=inside[:, None], other=0.0)
        Y = tl.load(solved + row * C + at_c, mask=inside[:, None], other=0.0)
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, _, after, total = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
            )
        behind = E.to(bk.dtype)
        if not SPAN:
            place = (place_of(start, n, begin, C) * heads + h).to(tl.int64) * X * Z
            tl.store(cotangents + place + cell, behind, mask=in_cell)
        if GATE != 0 and APART:
            until, _ = sums_before(sums, line, t, inside, ic, total, count_rows, EXACT)
            ba, bq = faded(ba, until, EXACT), faded(bq, hi, EXACT)
        du = tl.dot(bk, behind, input_precision=PRECISION)
        wide = bdo.to(tl.float32)
        asking = bdo
        if GATE != 0:
            du = du * power_of_2(after, EXACT)[:, None]
            if not APART:
                writing = power_of_2(hi, EXACT)
                asking = (wide * writing[:, None]).to(bk.dtype)
            E = E * power_of_2(total, EXACT)
        du = tl.dot(tl.trans(A), bdo, du + own[:, None] * wide, input_precision=PRECISION)
        du -= tl.dot(tl.trans(Y), (strength[:, None] * du).to(bk.dtype), input_precision=PRECISION)
        answer = strength[:, None] * du
        if not SPAN:
            tl.store(dv + row * Z + at_z, answer, mask=in_rows_z)
            if LOST:
                rest = (answer - answer.to(bv.dtype).to(tl.float32)) * bv.to(tl.float32)
                tl.store(lost + s.to(tl.int64) * count_rows + line + t, tl.sum(rest, 1), mask=inside)
        if GATE != 0 and not APART:
            answer = answer * writing[:, None]
        E = tl.dot(tl.trans(bq), asking, E, input_precision=PRECISION)
        E = tl.dot(tl.trans(ba), (-answer).to(bk.dtype), E, input_precision=PRECISION)
        own = own_then

    if SPAN:
        tl.store(end + (nh * slots + segment) * X * Z + cell, E, mask=in_cell)
    elif slots == 1:
        tl.store(end + nh * X * Z + cell, E, mask=in_cell)


@triton.jit(do_not_specialize=["segments"])
def delta_fold(
    states, moves, first, last, segments,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr,
    REVERSE: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The memories before every segment and after the last (backwards: their cotangents), in place of what the
    segments wrote: M_0 = first, M_{s+1} = A_s M_s + S_s; backwards with A_sᵀ. Reads `moves` once a slice."""
    pid = tl.program_id(0)
    s = pid % SLICES
    nh = (pid // SLICES).to(tl.int64)
    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    in_x = ix < X
    cell = ix[:, None] * Z + iz[None, :]
    in_cell = in_x[:, None] & (iz < Z)[None, :]
    square = ix[:, None] * X + ix[None, :]
    in_square = in_x[:, None] & in_x[None, :]
    states += nh * (segments + 1) * X * Z
    moves += nh * segments * X * X
    if FIRST:
        M = tl.load(first + nh * X * Z + cell, mask=in_cell, other=0.0)
    else:
        M = tl.zeros((BX, BZ), tl.float32)
    end = segments if REVERSE else 0
    tl.store(states + end * X * Z + cell, M, mask=in_cell)
    for i in range(0, segments):
        segment = segments - 1 - i if REVERSE else i
        slot = states + (segment if REVERSE else segment + 1) * X * Z + cell
        A = tl.load(moves + segment * X * X + square, mask=in_square, other=0.0)
        if REVERSE:
            A = tl.trans(A)
        M = tl.dot(A, M, tl.load(slot, mask=in_cell, other=0.0), input_precision=PRECISION)
        tl.store(slot, M, mask=in_cell)
    tl.store(last + nh * X * Z + cell, M, mask=in_cell)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences", "count_rows"])
def delta_pairs(
    do, dv, news, q, k, a, beta, g, sums, borders, told, gone, own, tokens, heads, sequences, count_rows,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    APART: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, MET: tl.constexpr,
):  # fmt: skip
    """P = (do rᵀ) γ and D = (dv rᵀ) γ of every chunk, b t h C in the tokens' dtype, zeros on and above the diagonal.

    `own`, 2 h (b t): r·do, the diagonal of P; with MET what pairs add to the sum for dg, q·dq - k·dk of a chunk without
    its memories: Σ_s β_s (P_ts q_t·k_s - D_ts k_t·k_s) + β_t r·do q·k - r·dv, before any rounding. APART: γ' for D, and
    what they add to dg itself. 2·C·C·V multiply-adds a chunk, with MET 2·C·C·K more.
    """
    pid = tl.program_id(0)
    h = pid % heads
    _, start, begin, count = chunk_of(borders, pid // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    line = h.to(tl.int64) * (count_rows // heads) + start
    ic, iv = tl.arange(0, C), tl.arange(0, BV)
    here, other = ic[:, None], ic[None, :]
    t = begin + ic
    inside = ic < count
    row = (start + begin) * heads + h
    at_v = row * V + here * (heads * V) + iv[None, :]
    ok_v = inside[:, None] & (iv < V)[None, :]
    bdo = tl.load(do + at_v, mask=ok_v, other=0.0)
    bdv = tl.load(dv + at_v, mask=ok_v, other=0.0)
    br = tl.load(news + at_v, mask=ok_v, other=0.0)
    P = tl.dot(bdo, tl.trans(br), input_precision=PRECISION)
    D = tl.dot(bdv, tl.trans(br), input_precision=PRECISION)
    asked = tl.sum(tl.where(here == other, P, 0.0), 1)
    erased = tl.sum(tl.where(here == other, D, 0.0), 1)
    tl.store(own + line + t, asked, mask=inside)
    if GATE != 0:
        hi, lo, _, total = sums_of(
            g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
        )
        between = decays_of(hi, lo, g, 0, ic, GATE, EXACT, False)
        erasing = between
        if APART:
            erasing = decays_before(hi, lo, sums, line, t, inside, ic, total, count_rows, EXACT)
        P, D = P * between, D * erasing
    at_c = row * C + here * (heads * C) + other
    tl.store(told + at_c, tl.where(here > other, P, 0.0), mask=inside[:, None])
    tl.store(gone + at_c, tl.where(here > other, D, 0.0), mask=inside[:, None])
    if MET:
        ik = tl.arange(0, BK)
        at_k = row * K + here * (heads * K) + ik[None, :]
        ok_k = inside[:, None] & (ik < K)[None, :]
        bq = tl.load(q + at_k, mask=ok_k, other=0.0)
        bk = tl.load(k + at_k, mask=ok_k, other=0.0)
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
        found = tl.dot(bq, tl.trans(bk), input_precision=PRECISION) * P
        if APART:
            ba = tl.load(a + at_k, mask=ok_k, other=0.0)
            lost = tl.dot(ba, tl.trans(bk), input_precision=PRECISION) * D
            found = tl.where(here > other, found, 0.0) * strength[None, :]
            lost = tl.where(here > other, -lost, 0.0) * strength[None, :]
            later = tl.sum(found, 1) - tl.sum(found + lost, 0)
            tl.store(own + count_rows + line + t, sums_behind(later, tl.sum(lost, 1), ic, True), mask=inside)
        else:
            found -= tl.where(here > other, tl.dot(bk, tl.trans(bk), input_precision=PRECISION) * D, 0.0)
            found = tl.where(here >= other, found, 0.0) * strength[None, :]
            tl.store(own + count_rows + line + t, tl.sum(found, 1) - erased, mask=inside)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences", "count_rows"])
def delta_chunks(
    do, dv, news, q, k, a, beta, g, sums, told, gone, own, states, cotangents, lost, borders, dq, dk, da, dbeta, dg,
    tokens, heads, sequences, count_rows,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, APART: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    MET: tl.constexpr, LOST: tl.constexpr,
):  # fmt: skip
    """A slice (of K) of dq, dk and da of every chunk from the memory before it and the cotangent behind it; its parts
    of dβ and, with MET, of dg: slices (b t) h.

    dg's sum goes from the chunk's end, where <M, D> is e^{b_C} <M, E> and what the chunk wrote, to its start; what
    pairs add to it is in `own`, what dv lost in as many slices as LOST says. Where e^g is 0 it is 0, and is set to it.
    3·C·BK·BV + 4·C·C·BK multiply-adds a chunk.
    """
    pid = tl.program_id(0)
    s = pid % SLICES
    h = (pid // SLICES) % heads
    n, start, begin, count = chunk_of(borders, pid // SLICES // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    line = h.to(tl.int64) * (count_rows // heads) + start
    ic, iv = tl.arange(0, C), tl.arange(0, BV)
    ik = s * BK + tl.arange(0, BK)
    in_k, in_v = ik < K, iv < V
    cell = ik[:, None] * V + iv[None, :]
    in_cell = in_k[:, None] & in_v[None, :]
    t = begin + ic
    inside = ic < count
    row = (start + begin) * heads + h
    at_k = row * K + ic[:, None] * (heads * K) + ik[None, :]
    at_v = row * V + ic[:, None] * (heads * V) + iv[None, :]
    at_c = row * C + ic[:, None] * (heads * C) + ic[None, :]
    ok_k, ok_v = inside[:, None] & in_k[None, :], inside[:, None] & in_v[None, :]
    chunk = (place_of(start, n, begin, C) * heads + h).to(tl.int64)
    bdo = tl.load(do + at_v, mask=ok_v, other=0.0)
    bdv = tl.load(dv + at_v, mask=ok_v, other=0.0)
    br = tl.load(news + at_v, mask=ok_v, other=0.0)
    bq = tl.load(q + at_k, mask=ok_k, other=0.0)
    bk = tl.load(k + at_k, mask=ok_k, other=0.0)
    ba = bk
    if APART:
        ba = tl.load(a + at_k, mask=ok_k, other=0.0)
    M = tl.load(states + chunk * K * V + cell, mask=in_cell, other=0.0)
    E = tl.load(cotangents + chunk * K * V + cell, mask=in_cell, other=0.0)
    P = tl.load(told + at_c, mask=inside[:, None], other=0.0)
    D = tl.load(gone + at_c, mask=inside[:, None], other=0.0)
    strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
    itself = tl.load(own + line + t, mask=inside, other=0.0)
    if GATE != 0:
        hi, _, after, total = sums_of(
            g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
        )
    written = (strength[:, None] * bk.to(tl.float32)).to(bk.dtype)

    asked = tl.dot(bdo, tl.trans(M), input_precision=PRECISION)
    if GATE != 0:
        asked = asked * power_of_2(hi, EXACT)[:, None]
    if MET:
        change = tl.sum(asked * bq.to(tl.float32), 1)
    asked = tl.dot(P, written, asked, input_precision=PRECISION)
    asked += (strength * itself)[:, None] * bk.to(tl.float32)
    tl.store(dq + at_k, asked, mask=ok_k)

    erased = tl.dot(bdv, tl.trans(M), input_precision=PRECISION)
    if GATE != 0:
        until = hi
        if APART:
            until, _ = sums_before(sums, line, t, inside, ic, total, count_rows, EXACT)
        erased = erased * power_of_2(until, EXACT)[:, None]
    if MET:
        if APART:
            erasing = -tl.sum(erased * ba.to(tl.float32), 1)
        else:
            change -= tl.sum(erased * bk.to(tl.float32), 1)
    erased = tl.dot(D, written, erased, input_precision=PRECISION)

    answered = tl.dot(br, tl.trans(E), input_precision=PRECISION)
    if GATE != 0:
        answered = answered * power_of_2(after, EXACT)[:, None]
    if MET:
        kept = strength * tl.sum(answered * bk.to(tl.float32), 1)
        later = 0.0 if APART else tl.sum(kept, 0)
        later += tl.sum(tl.sum(M.to(tl.float32) * E.to(tl.float32), 1), 0) * power_of_2(total, EXACT)
    answered = tl.dot(tl.trans(P), bq, answered, input_precision=PRECISION)
    answered = tl.dot(tl.trans(D), (-ba.to(tl.float32)).to(bk.dtype), answered, input_precision=PRECISION)
    answered += itself[:, None] * bq.to(tl.float32)
    rows = row + ic * heads
    at = s.to(tl.int64) * count_rows + rows
    tl.store(dbeta + at, tl.sum(answered * bk.to(tl.float32), 1), mask=inside)
    if APART:
        tl.store(dk + at_k, strength[:, None] * answered, mask=ok_k)
        tl.store(da + at_k, -erased, mask=ok_k)
    else:
        tl.store(dk + at_k, strength[:, None] * answered - erased, mask=ok_k)
    if MET:
        if APART:
            value = later + sums_where(ic[None, :] < ic[:, None], kept) + sums_behind(change, erasing, ic, True)
            if s == 0:
                value += tl.load(own + count_rows + line + t, mask=inside, other=0.0)
        else:
            if s == 0:
                change += tl.load(own + count_rows + line + t, mask=inside, other=0.0)
                for slice in tl.static_range(LOST):
                    change -= tl.load(lost + slice * count_rows + line + t, mask=inside, other=0.0)
            value = later + tl.cumsum(change, 0, reverse=True)
        gate = tl.load(g + rows, mask=inside, other=0.0)
        tl.store(dg + at, tl.where(gate < -104.0, 0.0, value), mask=inside)


@triton.jit
def delta_step(
    q, k, v, beta, g, a, memory, o,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, GATE: tl.constexpr,
    APART: tl.constexpr,
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
    bk = tl.load(k + row * K + ik, mask=in_k, other=0.0).to(tl.float32)
    bv = tl.load(v + row * V + iv, mask=in_v, other=0.0).to(tl.float32)
    if APART:
        ba = tl.load(a + row * K + ik, mask=in_k, other=0.0).to(tl.float32)
        found = tl.sum(ba[:, None] * M, 0)
    if GATE != 0:
        M = M * tl.exp(tl.load(g + row))
    if not APART:
        found = tl.sum(bk[:, None] * M, 0)
    r = bv - found
    M = M + bk[:, None] * (tl.load(beta + row) * r)[None, :]
    tl.store(cell, M, mask=in_cell)
    tl.store(o + row * V + iv, tl.sum(bq[:, None] * M, 0), mask=in_v)


# ------------------------------------------------------------------------------------------------ the launchers
# Tensors are contiguous, K and V multiples of 16, beta, gates and memories float32. beta : b t h, g : None | b t h,
# a : None | b t h K.


def chunk_for(k: Tensor) -> int:
    """Tokens a chunk: at most K of them; float32 products are not done by tensor cores."""
    return 16 if k.element_size() == 4 else min(padded(k.shape[-1]), 64)


def columns_of(x: Tensor, z: Tensor) -> int:
    return min(CONFIG[padded(x.shape[-1]), x.element_size()][0], padded(z.shape[-1]))


def segments_for(q: Tensor, v: Tensor, sequences: int) -> int:
    """In how many segments to cut each sequence. What a segment does to a memory costs two sweeps more, so only where
    not half of the GPU would be busy; two programs a multiprocessor, and at least 512 tokens a segment."""
    if padded(q.shape[-1]) > FOLDED:
        return 1
    programs = max(1, sequences * q.shape[2] * cdiv(v.shape[-1], columns_of(q, v)))
    wanted = 2 * decay.multiprocessors(q.device) // programs
    return 1 if wanted < 4 else decay.long_enough(wanted, q, sequences)


def words_of(g: Tensor | None, a: Tensor | None) -> dict:
    return {"GATE": decay.NONE if g is None else decay.TOKEN, "APART": a is not None}


def kind_of(x: Tensor, g: Tensor | None, a: Tensor | None, borders: Tensor | None) -> dict:
    return {**words_of(g, a), "PACKED": borders is not None, "EXACT": x.element_size() == 4, "PRECISION": "ieee"}


def shape_of(x: Tensor, z: Tensor, g: Tensor | None, a: Tensor | None, borders: Tensor | None, chunk: int) -> dict:
    """The compile-time arguments of a sweep whose state is x's columns × z's columns."""
    sizes = sizes_of(x.shape[-1], z.shape[-1], x.element_size(), g is None and a is None)
    return {**sizes, "C": chunk, **kind_of(x, g, a, borders)}


@functools.cache
def sizes_of(X: int, Z: int, width: int, ungated: bool) -> dict:
    line = padded(X), width
    columns, warps, stages = UNGATED.get(line, CONFIG[line]) if ungated else CONFIG[line]
    columns = min(columns, padded(Z))
    sizes = {"X": X, "Z": Z, "BX": padded(X), "BZ": columns, "SLICES": cdiv(Z, columns)}
    return {**sizes, "num_warps": warps, "num_stages": stages}


def prepare(q, k, beta, g, a, sums, borders) -> tuple[Tensor, Tensor, Tensor]:
    """`delta_prepare`: A, q·k and Y."""
    b, t, h, K = k.shape
    chunk, n, exact = chunk_for(k), sequences_of(k, borders), k.element_size() == 4
    scores, solved = (k.new_empty(b, t, h, chunk) for _ in range(2))
    itself = beta.new_empty(h, b * t)
    decay.launch(
        delta_prepare, chunks_of(k, borders, chunk) * h,
        q, k, a, beta, g, sums, borders, scores, itself, solved, t, h, n, beta.numel(),
        K=K, BK=padded(K), C=chunk, LEVELS=chunk.bit_length() - 1, SOLVING=SOLVING[k.dtype],
        **kind_of(k, g, a, borders), num_warps=4 if chunk == 64 else 1, num_stages=1 if exact else 2,
        # three programs a multiprocessor; three tf32 would need more registers
        maxnreg=168 if chunk == 64 and k.dtype == torch.bfloat16 else None,
    )  # fmt: skip
    return scores, itself, solved


def memories(x: Tensor, z: Tensor, borders: Tensor | None, chunk: int) -> tuple[int, ...]:
    """The shape of the memories of all chunks."""
    return places(x, borders, chunk), x.shape[2], x.shape[-1], z.shape[-1]


def fold(states, moves, first, reverse: bool, exact: bool) -> Tensor:
    """`delta_fold`, in place; returns the memory at the far end."""
    n, h, _, K, V = states.shape
    last = torch.empty_like(states[:, :, 0])
    columns = min(32, padded(V))
    slices = cdiv(V, columns)
    decay.launch(
        delta_fold, n * h * slices, states, moves, first, last, moves.shape[2],
        X=K, Z=V, BX=padded(K), BZ=columns, SLICES=slices, REVERSE=reverse, FIRST=first is not None,
        PRECISION="ieee" if exact else "tf32x3", num_warps=8,
    )  # fmt: skip
    return last


def whole(moves: Tensor, exact: bool) -> Tensor:
    """What all segments do to a memory one after the other: n h K K."""
    n, h, segments, K, _ = moves.shape
    if segments == 1:
        return moves[:, :, 0]
    identity = torch.eye(K, device=moves.device).expand(n, h, K, K).contiguous()
    return fold(moves.new_zeros(n, h, segments + 1, K, K), moves, identity, False, exact)


def between(given: tuple, first, moves, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """The memories between segments (n h segments+1 K V) and the one at the far end, from `first`; or reverse, their
    cotangents. `given`: q, k, v, beta, g, a, sums, A, q·k, Y and borders, with do in place of v on the way back.
    `moves` are filled on the way forwards and read on the way back."""
    q, k, z, beta, g, a, sums, scores, itself, solved, borders = given
    (n, h, segments, K, _), chunk, exact = moves.shape, chunk_for(k), k.element_size() == 4
    shape = shape_of(q, z, g, a, borders, chunk)
    states, more = moves.new_empty(n, h, segments + 1, K, z.shape[-1]), 0 if reverse else cdiv(K, shape["BZ"])
    programs = (shape["SLICES"] + more) * segments * h * n
    sizes = (q.shape[1], h, segments, segments + 1, beta.numel())
    if reverse:
        decay.launch(
            delta_answers, programs,
            z, q, k, beta, g, a, sums, scores, itself, solved, borders, None, None, None, None, None, states,
            *sizes, **shape, ENTRY=False, SPAN=True, LOST=False,
        )  # fmt: skip
    else:
        decay.launch(
            delta_values, programs, *given, None, None, None, None, states, moves,
            *sizes, **shape, ENTRY=False, KEEP=False, SPAN=True, MOVES=more,
        )  # fmt: skip
    return states, fold(states, moves, first, reverse, exact)


def end(q, k, z, beta, g, a, borders, moves, reverse: bool) -> Tensor:
    """What tokens leave of an empty memory, z their v, and what each segment does to a memory, in `moves`; or reverse,
    with z their do and `moves` for given, what the memory before them receives."""
    sums = decay.sums_in_chunks(g, borders, q, chunk_for(k))
    prepared = prepare(q, k, beta, g, a, sums, borders)
    return between((q, k, z, beta, g, a, sums, *prepared, borders), None, moves, reverse)[1]


def moves_of(q: Tensor, borders: Tensor | None, segments: int) -> Tensor:
    """Room for what each segment does to memories: K × K, from the left."""
    return q.new_empty(sequences_of(q, borders), q.shape[2], segments, q.shape[-1], q.shape[-1], dtype=torch.float32)


def forward(q, k, v, beta, g, a, memory, borders, segments: int, wide: bool, keep: bool) -> tuple[Tensor, ...]:
    """(o, the last memory, r, the memory before every chunk, what segments do to memories, A, q·k, Y).

    `wide`: o in float32. `keep`: what the gradient needs is kept; else the third and fourth are empty. The fifth is
    where there is one segment.
    """
    chunk = chunk_for(k)
    sums = decay.sums_in_chunks(g, borders, q, chunk)
    prepared = prepare(q, k, beta, g, a, sums, borders)
    shape = shape_of(q, v, g, a, borders, chunk)
    n, (_, t, h, K), V = sequences_of(q, borders), q.shape, v.shape[-1]
    o = torch.empty_like(v, dtype=torch.float32 if wide else v.dtype)
    news = torch.empty_like(v) if keep else v.new_empty(0)
    states = q.new_empty(memories(q, v, borders, chunk) if keep else 0)
    entry = memory
    given, moves, slots = (q, k, v, beta, g, a, sums, *prepared, borders), beta.new_empty(0), 1
    if segments > 1:
        slots, moves = segments + 1, moves_of(q, borders, segments)
        entry, last = between(given, memory, moves)
    else:
        last = beta.new_empty(n, h, K, V)
    decay.launch(
        delta_values, shape["SLICES"] * segments * h * n,
        *given, entry, o, news, states, last, None, t, h, segments, slots, beta.numel(),
        **shape, ENTRY=entry is not None, KEEP=keep, SPAN=False, MOVES=0,
    )  # fmt: skip
    return o, last, news, states, moves, *prepared


def backward(
    do, dlast, q, k, v, beta, g, a, memory, borders, news, states, moves, scores, itself, solved, want_g: bool
) -> tuple:
    """(dq, dk, dv, dβ, dg, da, dmemory) from the cotangents of o and of the last memory (None: zeros), with None for a
    gate's unless it is wanted and for da where there is no a."""
    chunk, exact, count = chunk_for(k), q.element_size() == 4, beta.numel()
    sums = decay.sums_in_chunks(g, borders, q, chunk)
    n, (b, t, h, K), V = sequences_of(q, borders), q.shape, v.shape[-1]
    segments = moves.shape[2] if moves.numel() else 1
    shape = shape_of(q, v, g, a, borders, chunk)
    shared = (beta, g, a, sums, scores, itself, solved, borders)
    want_g = want_g and g is not None
    made_good = want_g and a is None  # what dv loses when it is rounded
    dv, cotangents, entry, slots = torch.empty_like(v), torch.empty_like(states), dlast, 1
    lost = beta.new_empty(shape["SLICES"], h, b * t) if made_good else None
    if segments > 1:
        slots = segments + 1
        entry, dmemory = between((q, k, do, *shared), dlast, moves, reverse=True)
        entry = entry[:, :, 1:]
    else:
        dmemory = beta.new_empty(n, h, K, V)
    decay.launch(
        delta_answers, shape["SLICES"] * segments * h * n,
        do, q, k, *shared, v, entry, dv, cotangents, lost, dmemory, t, h, segments, slots, count,
        **shape, ENTRY=entry is not None, SPAN=False, LOST=made_good,
    )  # fmt: skip

    columns, warps, stages = CHUNKS[padded(K), q.element_size()]
    columns = min(columns, padded(K))
    slices, chunks = cdiv(K, columns), chunks_of(k, borders, chunk) * h
    told, gone, own = torch.empty_like(scores), torch.empty_like(scores), beta.new_empty(2, h, b * t)
    decay.launch(
        delta_pairs, chunks, do, dv, news, q, k, a, beta, g, sums, borders, told, gone, own, t, h, n, count,
        K=K, V=V, BK=padded(K), BV=padded(V), C=chunk, MET=want_g, **kind_of(q, g, a, borders),
        num_warps=4 if chunk == 64 else 1, num_stages=1 if exact else 2,
    )  # fmt: skip
    dq, dk, dbeta = torch.empty_like(q), torch.empty_like(k), beta.new_empty(slices, b, t, h)
    dg, da = torch.empty_like(dbeta) if want_g else None, None if a is None else torch.empty_like(a)
    decay.launch(
        delta_chunks, slices * chunks,
        do, dv, news, q, k, a, beta, g, sums, told, gone, own, states, cotangents, lost, borders, dq, dk, da, dbeta, dg,
        t, h, n, count,
        K=K, V=V, BK=columns, BV=padded(V), SLICES=slices, C=chunk,
        MET=want_g, LOST=shape["SLICES"] if made_good else 0, **kind_of(q, g, a, borders),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    dbeta, dg = (y if y is None else y[0] if slices == 1 else y.sum(0) for y in (dbeta, dg))
    return dq, dk, dv, dbeta, dg, da, dmemory


def step(q, k, v, beta, g, a, memory) -> Tensor:
    """o : b h V in float32 of one token a sequence, its inputs without their time axis; overwrites memory."""
    return decay.one_token(delta_step, (q, k, v, beta, g, a, memory), v, **words_of(g, a))
