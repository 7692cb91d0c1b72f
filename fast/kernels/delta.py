"""Triton kernels for delta rules: with M̂ = e^{g_t} M_{t-1}, M_t = M̂ + β_t k_tᵀ (v_t - k_t M̂), o_t = q_t M_t.

The gate is nothing (DeltaNet) or a number a head and token (Gated DeltaNet, Gated DeltaProduct).

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

Six kernels. `delta_solve` finds Y for all chunks at once: by elimination in blocks of 16 tokens, all blocks of the
chunk together, and by halves above: Y_b of the two halves, L_o of the later half's tokens with the earlier's keys,
Z = L_o - L_o β Y_b, Y = Y_b + Z - Y_b β Z. The others are sweeps as in `decay.py`: a program owns a slice of the
output's columns, streams through time and keeps its slice of the state in registers.

    delta_values     o, r         forwards     S     K × V     a slice of V
    delta_answers    dv, dβ       backwards    E     K × V     a slice of V
    delta_queries    dq, -dv M̂ᵀ   forwards     Sᵀ    V × K     a slice of K
    delta_keys       dk           backwards    Eᵀ    V × K     a slice of K
    delta_dg         dg           from numbers that the second and third leave, one a token, head and slice

Segments. To know what a stretch of tokens does to a memory costs a K × K matrix, so the first two go through whole
sequences. They leave the states at the borders of segments, and the last two run in all segments at once. The segments
are for exactness, too: a delta rule corrects the errors of its own memory, but a memory that is built again from r, as
`delta_queries` does, or from dv keeps the rounding of each. Over 2,048 tokens without gates that left the error budget.

Gates. As in `decay.py`, whose sums of gates these are. A token's own term, (q·k) (β r · do), is in q·dq and in r·dv and
cancels: it is left out of both. k M̂ · dv is k·(M̂ dvᵀ), so the queries have it, in their slices. What a chunk gives to
q·dq is taken from scores in float32, and `delta_dg` knows dg at both ends of a segment: without either, what rounding
left after 512 tokens was outside the error budget.

Precision. Y is found in float32: in products of tf32 for 16-bit tokens, whose own rounding is coarser, and it is
stored as they are. A chunk has at most K tokens: more keys than channels depend on each other and the system loses
digits (chunks of float32 have 16 all the same).

Bytes and operations. In U = one b t h d tensor in 16 bits, K = V = d = 128, C = 64: `delta_solve` reads 1 U and writes
1/2; values 3.5 and 1, and 1.5 for r and states where there is a gradient; answers 4.5 and 1.5; queries 4.5 (5.5 with a
gate) and 2; keys 6.5 and 1. So 6 U forward where the floor is 4, and 28.5 U with the gradient where it is 11. Saved for
the gradient: r, Y and states, 2 U. Multiply-adds a token and head: solving C·d, and 4·C² a chunk of more than 16 tokens
by halves; values and answers 3·d² + slices·C·d + 2·C·d; queries and keys 3·d² + 2·slices·C·d + 2·C·d.

Compilers: what `decay.py` says. No dot's result is transposed; no 16-bit line of CONFIG has one stage. Compiled for
Hopper by Triton 3.7.1 at d = 128 in 16 bits the sweeps use all 255 registers and spill 12 to 48 numbers a thread.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay
from fast.kernels.decay import decays_of, padded, part_of, run_of, sequences_of, sums_of

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


@triton.jit
def pairs_of(scores, hi, lo, g, ic, GATE: tl.constexpr, EXACT: tl.constexpr, REVERSE: tl.constexpr):
    """Scores of pairs with what the gates between leave of them: j <= i, backwards j >= i; else 0."""
    if GATE == 0:
        before = (ic[:, None] <= ic[None, :]) if REVERSE else (ic[:, None] >= ic[None, :])
        scores = tl.where(before, scores, 0.0)
    else:
        scores = scores * decays_of(hi, lo, g, 0, ic, GATE, EXACT, REVERSE)
    return scores


@triton.jit(do_not_specialize=["tokens", "heads", "parts", "count_rows"])
def delta_solve(
    k, beta, g, sums, borders, solved, tokens, heads, parts, count_rows,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, SOLVING: tl.constexpr,
):  # fmt: skip
    """Y of every chunk: b t h C in the tokens' dtype, zeros on and above the diagonal. C = 16·2^LEVELS."""
    pid = tl.program_id(0)
    part = pid % parts
    h = (pid // parts) % heads
    start, length = run_of(borders, pid // parts // heads, tokens, PACKED)
    first, stop = part_of(length, part, parts)
    line = h.to(tl.int64) * (count_rows // heads) + start  # of sums: h (b t)
    ic, ik = tl.arange(0, C), tl.arange(0, BK)
    here, other = ic[:, None], ic[None, :]
    for i in range(0, tl.cdiv(stop - first, C)):
        begin = first + i * C
        t = begin + ic
        inside = t < stop
        row = (start + begin) * heads + h
        at = row * K + here * (heads * K) + ik[None, :]
        bk = tl.load(k + at, mask=inside[:, None] & (ik < K)[None, :], other=0.0)
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
        L = tl.dot(bk, tl.trans(bk), input_precision=PRECISION)
        hi, lo = strength, strength
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, lo, _, _ = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
            )
        L = tl.where(here > other, pairs_of(L, hi, lo, g, ic, GATE, EXACT, False), 0.0)
        # column j of a block of 16, for all blocks: whatever it erases is taken from the rows below
        same = here // 16 == other // 16
        Y = tl.where(same, L, 0.0)
        N = Y * strength[None, :]
        for j in range(0, 15):
            column = tl.sum(tl.where(other % 16 == j, N, 0.0), 1)
            found = tl.sum(tl.where(here % 16 == j, Y, 0.0), 0)
            Y -= tl.where(same, column[:, None] * found[None, :], 0.0)
        for level in tl.static_range(LEVELS):
            half = 16 << level
            meet = (here // (2 * half) == other // (2 * half)) & (here // half > other // half)
            Z = tl.where(meet, L, 0.0)
            Z -= tl.dot(Z, strength[:, None] * Y, input_precision=SOLVING)
            Y += Z - tl.dot(Y, strength[:, None] * Z, input_precision=SOLVING)
        tl.store(solved + row * C + here * (heads * C) + other, Y, mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "count_rows"])
def delta_values(
    q, k, v, beta, g, sums, solved, borders, entry, o, news, states, end, tokens, heads, segments, count_rows,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, NEWS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """One slice of o and, with NEWS, of r. With STATES the state before every segment, and after the last, is left.

    Products a chunk: 3·C·X·BZ + C·C·X + 2·C·C·BZ multiply-adds.
    """
    pid = tl.program_id(0)
    s = pid % SLICES
    h = (pid // SLICES) % heads
    n = pid // SLICES // heads
    start, length = run_of(borders, n, tokens, PACKED)
    line = h.to(tl.int64) * (count_rows // heads) + start

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
    at_c = ic[:, None] * (heads * C) + ic[None, :]
    for segment in range(0, segments):
        first, stop = part_of(length, segment, segments)
        if STATES:
            tl.store(states + (nh * (segments + 1) + segment) * X * Z + cell, S, mask=in_cell)
        for i in range(0, tl.cdiv(stop - first, C)):
            begin = first + i * C
            t = begin + ic
            inside = t < stop
            row = (start + begin) * heads + h
            in_rows_x = inside[:, None] & in_x[None, :]
            in_rows_z = inside[:, None] & in_z[None, :]
            bq = tl.load(q + row * X + at_x, mask=in_rows_x, other=0.0)
            bk = tl.load(k + row * X + at_x, mask=in_rows_x, other=0.0)
            bv = tl.load(v + row * Z + at_z, mask=in_rows_z, other=0.0)
            Y = tl.load(solved + row * C + at_c, mask=inside[:, None], other=0.0)
            strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
            hi, lo = strength, strength
            if GATE != 0:
                count = tl.minimum(stop - begin, C)
                hi, lo, after, total = sums_of(
                    g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
                )
            before = S.to(bk.dtype)
            found = tl.dot(bk, before, input_precision=PRECISION)
            seen = tl.dot(bq, before, input_precision=PRECISION)
            scores = tl.dot(bq, tl.trans(bk), input_precision=PRECISION)
            scores = pairs_of(scores, hi, lo, g, ic, GATE, EXACT, False)
            if GATE != 0:
                reading = tl.exp2(hi)
                found = found * reading[:, None]
                seen = seen * reading[:, None]
                S = S * tl.exp2(total)
            r = bv.to(tl.float32) - found
            r -= tl.dot(Y, (strength[:, None] * r).to(bk.dtype), input_precision=PRECISION)
            written = strength[:, None] * r
            out = tl.dot(scores.to(bk.dtype), written.to(bk.dtype), seen, input_precision=PRECISION)
            if GATE != 0:
                written = written * tl.exp2(after)[:, None]
            S = tl.dot(tl.trans(bk), written.to(bk.dtype), S, input_precision=PRECISION)
            tl.store(o + row * Z + at_z, out, mask=in_rows_z)
            if NEWS:
                tl.store(news + row * Z + at_z, r, mask=in_rows_z)

    if STATES:
        tl.store(states + (nh * (segments + 1) + segments) * X * Z + cell, S, mask=in_cell)
    tl.store(end + nh * X * Z + cell, S, mask=in_cell)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "count_rows"])
def delta_answers(
    do, q, k, news, beta, g, sums, solved, borders, entry, dv, dbeta, part, states, end,
    tokens, heads, segments, count_rows,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, PART: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """One slice of dv, its part of dβ and, with PART, of r·dv: slices h (b t). Backwards; states as `delta_values`."""
    pid = tl.program_id(0)
    s = pid % SLICES
    h = (pid // SLICES) % heads
    n = pid // SLICES // heads
    start, length = run_of(borders, n, tokens, PACKED)
    line = h.to(tl.int64) * (count_rows // heads) + start

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    cell = ix[:, None] * Z + iz[None, :]
    in_cell = in_x[:, None] & in_z[None, :]
    nh = (n * heads + h).to(tl.int64)
    if ENTRY:
        E = tl.load(entry + nh * X * Z + cell, mask=in_cell, other=0.0)
    else:
        E = tl.zeros((BX, BZ), tl.float32)

    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    at_c = ic[:, None] * (heads * C) + ic[None, :]
    for j in range(0, segments):
        segment = segments - 1 - j
        first, stop = part_of(length, segment, segments)
        if STATES:
            tl.store(states + (nh * (segments + 1) + segment + 1) * X * Z + cell, E, mask=in_cell)
        chunks = tl.cdiv(stop - first, C)
        for i in range(0, chunks):
            begin = first + (chunks - 1 - i) * C
            t = begin + ic
            inside = t < stop
            row = (start + begin) * heads + h
            in_rows_x = inside[:, None] & in_x[None, :]
            in_rows_z = inside[:, None] & in_z[None, :]
            bq = tl.load(q + row * X + at_x, mask=in_rows_x, other=0.0)
            bk = tl.load(k + row * X + at_x, mask=in_rows_x, other=0.0)
            bdo = tl.load(do + row * Z + at_z, mask=in_rows_z, other=0.0)
            Y = tl.load(solved + row * C + at_c, mask=inside[:, None], other=0.0)
            # what feeds no dot is not pipelined: asked for before the dots, it arrives during them
            r = tl.load(news + row * Z + at_z, mask=in_rows_z, other=0.0).to(tl.float32)
            strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
            hi, lo = strength, strength
            if GATE != 0:
                count = tl.minimum(stop - begin, C)
                hi, lo, after, total = sums_of(
                    g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
                )
            asked = tl.dot(bk, E.to(bk.dtype), input_precision=PRECISION)
            scores = tl.dot(bk, tl.trans(bq), input_precision=PRECISION)
            scores = pairs_of(scores, hi, lo, g, ic, GATE, EXACT, True)
            writing = strength * 0.0 + 1.0
            if GATE != 0:
                asked = asked * tl.exp2(after)[:, None]
                writing = tl.exp2(hi)
                E = E * tl.exp2(total)
            if PART:  # the token's own term cancels in dg: add it to dv after the sum
                diagonal = ic[:, None] == ic[None, :]
                own = tl.sum(tl.where(diagonal, scores, 0.0), 1)
                scores = tl.where(diagonal, 0.0, scores)
            asked = tl.dot(scores.to(bk.dtype), bdo, asked, input_precision=PRECISION)
            whole = asked
            if PART:
                whole = asked + own[:, None] * bdo.to(tl.float32)
            erased = tl.dot(tl.trans(Y), (strength[:, None] * whole).to(bk.dtype), input_precision=PRECISION)
            du = asked - erased
            at_part = s.to(tl.int64) * count_rows + line + t
            if PART:
                tl.store(part + at_part, strength * tl.sum(du * r, 1), mask=inside)
                du += own[:, None] * bdo.to(tl.float32)
            answer = strength[:, None] * du
            tl.store(dbeta + at_part, tl.sum(du * r, 1), mask=inside)
            tl.store(dv + row * Z + at_z, answer, mask=in_rows_z)
            written = (bdo.to(tl.float32) * writing[:, None]).to(bk.dtype)
            E = tl.dot(tl.trans(bq), written, E, input_precision=PRECISION)
            E = tl.dot(tl.trans(bk), (-answer * writing[:, None]).to(bk.dtype), E, input_precision=PRECISION)

    if STATES:
        tl.store(states + nh * (segments + 1) * X * Z + cell, E, mask=in_cell)
    tl.store(end + nh * X * Z + cell, E, mask=in_cell)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count_rows"])
def delta_queries(
    do, dv, news, q, k, beta, g, sums, borders, entry, dq, dk, part,
    tokens, heads, segments, slots, count_rows,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One slice (of K) of dq = do M_tᵀ and of dk = -dv M̂ᵀ over a segment; with PART the queries' part of dg.

    X = V, Z = K. The state lies transposed in `entry`; part: slices h (b t).
    """
    pid = tl.program_id(0)
    s = pid % SLICES
    segment = (pid // SLICES) % segments
    h = (pid // SLICES // segments) % heads
    n = pid // SLICES // segments // heads
    start, length = run_of(borders, n, tokens, PACKED)
    first, stop = part_of(length, segment, segments)
    line = h.to(tl.int64) * (count_rows // heads) + start

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    cell = ix[:, None] + iz[None, :] * X
    in_cell = in_x[:, None] & in_z[None, :]
    nh = (n * heads + h).to(tl.int64)
    if ENTRY:
        S = tl.load(entry + (nh * slots + segment) * X * Z + cell, mask=in_cell, other=0.0)
    else:
        S = tl.zeros((BX, BZ), tl.float32)

    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    for i in range(0, tl.cdiv(stop - first, C)):
        begin = first + i * C
        t = begin + ic
        inside = t < stop
        row = (start + begin) * heads + h
        in_rows_x = inside[:, None] & in_x[None, :]
        in_rows_z = inside[:, None] & in_z[None, :]
        bdo = tl.load(do + row * X + at_x, mask=in_rows_x, other=0.0)
        bdv = tl.load(dv + row * X + at_x, mask=in_rows_x, other=0.0)
        br = tl.load(news + row * X + at_x, mask=in_rows_x, other=0.0)
        bk = tl.load(k + row * Z + at_z, mask=in_rows_z, other=0.0)
        if PART:
            bq = tl.load(q + row * Z + at_z, mask=in_rows_z, other=0.0)
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
        hi, lo = strength, strength
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, lo, after, total = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
            )
        before = S.to(bk.dtype)
        seen = tl.dot(bdo, before, input_precision=PRECISION)
        erased = tl.dot(bdv, before, input_precision=PRECISION)
        scores = tl.dot(bdo, tl.trans(br), input_precision=PRECISION)
        doubts = tl.dot(bdv, tl.trans(br), input_precision=PRECISION)
        scores = pairs_of(scores, hi, lo, g, ic, GATE, EXACT, False) * strength[None, :]
        doubts = pairs_of(doubts, hi, lo, g, ic, GATE, EXACT, False) * strength[None, :]
        doubts = tl.where(ic[:, None] > ic[None, :], doubts, 0.0)
        writing = strength
        if GATE != 0:
            reading = tl.exp2(hi)
            seen = seen * reading[:, None]
            erased = erased * reading[:, None]
            writing = writing * tl.exp2(after)
            S = S * tl.exp2(total)
        if PART:
            diagonal = ic[:, None] == ic[None, :]
            own = tl.sum(tl.where(diagonal, scores, 0.0), 1)
            scores = tl.where(diagonal, 0.0, scores)
            # q·dq of pairs from scores before they are rounded: those roundings add up in dg
            asked = tl.sum(seen * bq.to(tl.float32), 1)
            asked += tl.sum(scores * tl.dot(bq, tl.trans(bk), input_precision=PRECISION), 1)
        seen = tl.dot(scores.to(bk.dtype), bk, seen, input_precision=PRECISION)
        erased = tl.dot(doubts.to(bk.dtype), bk, erased, input_precision=PRECISION)
        S = tl.dot(tl.trans(br), (bk.to(tl.float32) * writing[:, None]).to(bk.dtype), S, input_precision=PRECISION)
        if PART:
            asked -= tl.sum(erased * bk.to(tl.float32), 1)
            tl.store(part + s.to(tl.int64) * count_rows + line + t, asked, mask=inside)
            seen += own[:, None] * bk.to(tl.float32)
        tl.store(dq + row * Z + at_z, seen, mask=in_rows_z)
        tl.store(dk + row * Z + at_z, -erased, mask=in_rows_z)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count_rows"])
def delta_keys(
    do, dv, news, q, k, beta, g, sums, borders, entry, dk, tokens, heads, segments, slots, count_rows,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """Adds β_t r_t D_tᵀ to one slice (of K) of dk over a segment, backwards. X = V, Z = K."""
    pid = tl.program_id(0)
    s = pid % SLICES
    segment = (pid // SLICES) % segments
    h = (pid // SLICES // segments) % heads
    n = pid // SLICES // segments // heads
    start, length = run_of(borders, n, tokens, PACKED)
    first, stop = part_of(length, segment, segments)
    line = h.to(tl.int64) * (count_rows // heads) + start

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    cell = ix[:, None] + iz[None, :] * X
    in_cell = in_x[:, None] & in_z[None, :]
    nh = (n * heads + h).to(tl.int64)
    if ENTRY:
        E = tl.load(entry + (nh * slots + segment) * X * Z + cell, mask=in_cell, other=0.0)
    else:
        E = tl.zeros((BX, BZ), tl.float32)

    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    chunks = tl.cdiv(stop - first, C)
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C
        t = begin + ic
        inside = t < stop
        row = (start + begin) * heads + h
        in_rows_x = inside[:, None] & in_x[None, :]
        in_rows_z = inside[:, None] & in_z[None, :]
        bdo = tl.load(do + row * X + at_x, mask=in_rows_x, other=0.0)
        bdv = tl.load(dv + row * X + at_x, mask=in_rows_x, other=0.0)
        br = tl.load(news + row * X + at_x, mask=in_rows_x, other=0.0)
        bq = tl.load(q + row * Z + at_z, mask=in_rows_z, other=0.0)
        bk = tl.load(k + row * Z + at_z, mask=in_rows_z, other=0.0)
        erased = tl.load(dk + row * Z + at_z, mask=in_rows_z, other=0.0)
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
        hi, lo = strength, strength
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, lo, after, total = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
            )
        out = tl.dot(br, E.to(bk.dtype), input_precision=PRECISION)
        scores = tl.dot(br, tl.trans(bdo), input_precision=PRECISION)
        doubts = tl.dot(br, tl.trans(bdv), input_precision=PRECISION)
        scores = pairs_of(scores, hi, lo, g, ic, GATE, EXACT, True)
        doubts = pairs_of(doubts, hi, lo, g, ic, GATE, EXACT, True)
        doubts = tl.where(ic[:, None] < ic[None, :], -doubts, 0.0)
        asking = bq
        minus = -bk.to(tl.float32)
        if GATE != 0:
            writing = tl.exp2(hi)
            asking = (bq.to(tl.float32) * writing[:, None]).to(bk.dtype)
            minus = minus * writing[:, None]
            out = out * tl.exp2(after)[:, None]
            E = E * tl.exp2(total)
        out = tl.dot(scores.to(bk.dtype), bq, out, input_precision=PRECISION)
        out = tl.dot(doubts.to(bk.dtype), bk, out, input_precision=PRECISION)
        E = tl.dot(tl.trans(bdo), asking, E, input_precision=PRECISION)
        E = tl.dot(tl.trans(bdv), minus.to(bk.dtype), E, input_precision=PRECISION)
        tl.store(dk + row * Z + at_z, erased.to(tl.float32) + strength[:, None] * out, mask=in_rows_z)


@triton.jit
def product_of(memory, cotangent, at, CELLS: tl.constexpr, BLOCK: tl.constexpr):
    """<M, D> of two memories at the same place, summed in float64."""
    total = tl.zeros((), tl.float64)
    for i in range(0, CELLS, BLOCK):
        cell = i + tl.arange(0, BLOCK)
        M = tl.load(memory + at + cell, mask=cell < CELLS, other=0.0)
        D = tl.load(cotangent + at + cell, mask=cell < CELLS, other=0.0)
        total += tl.sum((M * D).to(tl.float64), 0)
    return total


@triton.jit
def change_of(asked, answered, line, inside, count_rows, QS: tl.constexpr, KS: tl.constexpr):
    """dg_t - dg_{t+1} of some tokens, from the slices' parts."""
    change = tl.load(asked + line, mask=inside, other=0.0)
    for s in tl.static_range(1, QS):
        change += tl.load(asked + s * count_rows + line, mask=inside, other=0.0)
    for s in tl.static_range(KS):
        change -= tl.load(answered + s * count_rows + line, mask=inside, other=0.0)
    return change.to(tl.float64)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count_rows"])
def delta_dg(
    asked, answered, g, borders, memory, cotangent, last, behind, dg, tokens, heads, segments, slots, count_rows,
    QS: tl.constexpr, KS: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr, STARTS: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """dg_t = <M, D> behind the segment + the changes from its end to t, and at its first token <M, D> before it.

    Both ends are known, so what rounding left of the sum at the first token is taken from all tokens in proportion to
    how far they are from the end. Where e^g is 0 the gradient is 0, and is set to it.
    """
    pid = tl.program_id(0)
    segment = pid % segments
    h = (pid // segments) % heads
    n = pid // segments // heads
    start, length = run_of(borders, n, tokens, PACKED)
    first, stop = part_of(length, segment, segments)
    at = ((n * heads + h).to(tl.int64) * slots + segment) * CELLS
    line = h.to(tl.int64) * (count_rows // heads) + start
    later = tl.zeros((), tl.float64)
    missing = tl.zeros((), tl.float64)
    if ENDS:
        later = product_of(last, behind, at, CELLS, BLOCK)
    if STARTS:
        missing = product_of(memory, cotangent, at, CELLS, BLOCK)
    missing -= later
    for i in range(0, tl.cdiv(stop - first, BLOCK)):
        t = first + i * BLOCK + tl.arange(0, BLOCK)
        missing -= tl.sum(change_of(asked, answered, line + t, t < stop, count_rows, QS, KS), 0)
    missing = missing / tl.maximum(stop - first, 1).to(tl.float64)
    for i in range(0, tl.cdiv(stop - first, BLOCK)):
        t = stop - (i + 1) * BLOCK + tl.arange(0, BLOCK)
        inside = t >= first
        change = change_of(asked, answered, line + t, inside, count_rows, QS, KS)
        value = later + tl.cumsum(change, 0, reverse=True) + missing * (stop - t).to(tl.float64)
        rows = (start + t) * heads + h
        gate = tl.load(g + rows, mask=inside, other=0.0)
        tl.store(dg + rows, tl.where(gate < -104.0, 0.0, value.to(tl.float32)), mask=inside)
        later += tl.sum(change, 0)


@triton.jit
def delta_step(
    q, k, v, beta, g, memory, o,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, GATE: tl.constexpr,
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
    if GATE != 0:
        M = M * tl.exp(tl.load(g + row))
    r = bv - tl.sum(bk[:, None] * M, 0)
    M = M + bk[:, None] * (tl.load(beta + row) * r)[None, :]
    tl.store(cell, M, mask=in_cell)
    tl.store(o + row * V + iv, tl.sum(bq[:, None] * M, 0), mask=in_v)


# ------------------------------------------------------------------------------------------------ the launchers
# Tensors are contiguous, K and V multiples of 16, beta, gates and memories float32. beta : b t h, g : None | b t h.


def chunk_for(k: Tensor) -> int:
    """Tokens a chunk: at most K of them; float32 products are not done by tensor cores."""
    return 16 if k.element_size() == 4 else min(padded(k.shape[-1]), 64)


def columns_of(x: Tensor, z: Tensor) -> int:
    return min(CONFIG[padded(x.shape[-1]), x.element_size()][0], padded(z.shape[-1]))


def segments_for(q: Tensor, v: Tensor, sequences: int) -> int:
    """In how many segments the sweeps for dq and dk run: of 512 tokens (where documents share a row, on average)."""
    return max(1, triton.cdiv(q.shape[0] * q.shape[1], max(sequences, 1) * 512))


def kind_of(x: Tensor, g: Tensor | None, borders: Tensor | None) -> dict:
    gated = decay.NONE if g is None else decay.TOKEN
    return {"GATE": gated, "PACKED": borders is not None, "EXACT": x.element_size() == 4, "PRECISION": "ieee"}


def shape_of(x: Tensor, z: Tensor, g: Tensor | None, borders: Tensor | None, chunk: int) -> dict:
    """The compile-time arguments of a sweep whose state is x's columns × z's columns."""
    X, Z, columns = x.shape[-1], z.shape[-1], columns_of(x, z)
    _, warps, stages = CONFIG[padded(X), x.element_size()]
    sizes = {"X": X, "Z": Z, "BX": padded(X), "BZ": columns, "SLICES": triton.cdiv(Z, columns), "C": chunk}
    return {**sizes, **kind_of(x, g, borders), "num_warps": warps, "num_stages": stages}


def sums_in_chunks(g: Tensor | None, borders: Tensor | None, exact: bool, chunk: int) -> Tensor | None:
    """`decay_sums` in chunks of this family: (1 or 2) h (b t)."""
    if g is None:
        return None
    b, t, h = g.shape
    sums = g.new_empty(1 + exact, h, b * t)
    n, block = sequences_of(g, borders), min(16, triton.next_power_of_2(h))
    parts, blocks = triton.cdiv(t, 256), triton.cdiv(h, block)
    decay.launch(
        decay.decay_sums, n * blocks * parts, g, borders, sums, t, h, parts, b * t * h,
        C=chunk, BH=block, BLOCKS=blocks, PACKED=borders is not None, EXACT=exact,
    )  # fmt: skip
    return sums


def solve(k: Tensor, beta: Tensor, g: Tensor | None, sums: Tensor | None, borders: Tensor | None) -> Tensor:
    """`delta_solve`: b t h C. A part is 64 tokens, or a quarter of the average document where many share a row."""
    _, t, h, K = k.shape
    chunk, n = chunk_for(k), sequences_of(k, borders)
    parts = min(triton.cdiv(t, 64), 4 * triton.cdiv(t, 64 * max(n, 1)))
    solved = k.new_empty(*k.shape[:3], chunk)
    exact = k.element_size() == 4
    decay.launch(
        delta_solve, n * h * parts, k, beta, g, sums, borders, solved, t, h, parts, beta.numel(),
        K=K, BK=padded(K), C=chunk, LEVELS=(chunk // 16).bit_length() - 1, SOLVING="ieee" if exact else "tf32",
        **kind_of(k, g, borders), num_warps=4 if chunk == 64 else 1, num_stages=1 if exact else 2,
    )  # fmt: skip
    return solved


def forward(q, k, v, beta, g, memory, borders, segments: int, wide: bool, keep: bool) -> tuple[Tensor, ...]:
    """(o, the last memory, the memories between segments, r, Y). `wide`: o in float32.

    `keep`: r and, where there are several segments, the memories are kept for the gradient; else they are empty.
    """
    chunk = chunk_for(k)
    sums = sums_in_chunks(g, borders, q.element_size() == 4, chunk)
    solved = solve(k, beta, g, sums, borders)
    shape = shape_of(q, v, g, borders, chunk)
    n, h, K, V = sequences_of(q, borders), *q.shape[2:], v.shape[-1]
    o = torch.empty_like(v, dtype=torch.float32 if wide else v.dtype)
    news = torch.empty_like(v) if keep else v.new_empty(0)
    last = q.new_empty(n, h, K, V, dtype=torch.float32)
    several = keep and segments > 1
    states = last.new_empty((n, h, segments + 1, K, V) if several else 0)
    decay.launch(
        delta_values, shape["SLICES"] * h * n, q, k, v, beta, g, sums, solved, borders, memory, o, news, states, last,
        q.shape[1], h, segments if several else 1, beta.numel(),
        **shape, ENTRY=memory is not None, NEWS=keep, STATES=several,
    )  # fmt: skip
    return o, last, states, news, solved


def backward(do, dlast, q, k, v, beta, g, memory, borders, last, states, news, solved, want_g: bool):
    """(dq, dk, dv, dβ, dg or None, dmemory) from the cotangents of o and of the last memory (None: zeros)."""
    several, count = states.numel() > 0, beta.numel()
    segments = states.shape[2] - 1 if several else 1
    slots = segments + 1 if several else 1
    chunk = solved.shape[-1]
    sums = sums_in_chunks(g, borders, q.element_size() == 4, chunk)
    n, (b, t, h, _) = sequences_of(q, borders), q.shape
    want_g = want_g and g is not None

    by_value = shape_of(q, v, g, borders, chunk)
    dv, dmemory, cotangents = torch.empty_like(v), torch.empty_like(last), torch.empty_like(states)
    answered, dbeta = (beta.new_empty(by_value["SLICES"], h, b * t) for _ in range(2))
    decay.launch(
        delta_answers, by_value["SLICES"] * h * n,
        do, q, k, news, beta, g, sums, solved, borders, dlast, dv, dbeta, answered, cotangents, dmemory,
        t, h, segments, count, **by_value, ENTRY=dlast is not None, PART=want_g, STATES=several,
    )  # fmt: skip

    before, behind = (states, cotangents[:, :, 1:]) if several else (memory, dlast)
    by_key = shape_of(v, q, g, borders, chunk)
    dq, dk, asked = torch.empty_like(q), torch.empty_like(k), beta.new_empty(by_key["SLICES"], h, b * t)
    run, programs = (t, h, segments, slots, count), by_key["SLICES"] * segments * h * n
    decay.launch(
        delta_queries, programs, do, dv, news, q, k, beta, g, sums, borders, before, dq, dk, asked, *run,
        **by_key, ENTRY=before is not None, PART=want_g,
    )  # fmt: skip
    decay.launch(
        delta_keys, programs, do, dv, news, q, k, beta, g, sums, borders, behind, dk, *run,
        **by_key, ENTRY=behind is not None,
    )  # fmt: skip
    dg = None
    if want_g:
        starts = (states, cotangents) if several else (memory, dmemory)
        ends = (states[:, :, 1:], behind) if several else (last, dlast)
        dg = torch.empty_like(g)
        decay.launch(
            delta_dg, segments * h * n, asked, answered, g, borders, *starts, *ends, dg, *run,
            QS=asked.shape[0], KS=answered.shape[0], CELLS=q.shape[-1] * v.shape[-1], BLOCK=256,
            PACKED=borders is not None, STARTS=starts[0] is not None, ENDS=ends[1] is not None,
        )  # fmt: skip
    return dq, dk, dv, dbeta.sum(0).view(h, b, t).permute(1, 2, 0).contiguous(), dg, dmemory


def step(q, k, v, beta, g, memory) -> Tensor:
    """o : b h V in float32 of one token a sequence, q k : b h K, v : b h V, beta : b h, g : None | b h; overwrites
    memory."""
    b, h, K = q.shape
    V = v.shape[-1]
    columns = min(32, padded(V))
    o = torch.empty_like(v, dtype=torch.float32)
    slices = triton.cdiv(V, columns)
    decay.launch(
        delta_step, b * h * slices, q, k, v, beta, g, memory, o,
        K=K, V=V, BK=padded(K), BV=columns, SLICES=slices, GATE=decay.NONE if g is None else decay.TOKEN, num_warps=4,
    )  # fmt: skip
    return o
