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
# how Y is multiplied by itself: products of tf32 are coarser than bfloat16 tokens need, and not than float16 tokens
SOLVING = {torch.float32: "ieee", torch.float16: "tf32x3", torch.bfloat16: "tf32"}


@triton.jit(do_not_specialize=["tokens", "heads", "parts", "count_rows"])
def delta_prepare(
    q, k, beta, g, sums, borders, scores, itself, solved, tokens, heads, parts, count_rows,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, SOLVING: tl.constexpr,
):  # fmt: skip
    """A and Y of every chunk, b t h C in the tokens' dtype, zeros on and above the diagonal; q_t·k_t: h (b t).

    C = 2^LEVELS. Products: 2·C·C·K multiply-adds, and 2·C³ for all levels but the first, whose Y is its Z.
    """
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
        ok = inside[:, None] & (ik < K)[None, :]
        bk = tl.load(k + at, mask=ok, other=0.0)
        bq = tl.load(q + at, mask=ok, other=0.0)
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
        L = tl.dot(bk, tl.trans(bk), input_precision=PRECISION)
        A = tl.dot(bq, tl.trans(bk), input_precision=PRECISION)
        tl.store(itself + line + t, tl.sum(tl.where(here == other, A, 0.0), 1), mask=inside)
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, lo, _, _ = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
            )
            between = decays_of(hi, lo, g, 0, ic, GATE, EXACT, False)
            L = L * between
            A = A * between
        at_c = row * C + here * (heads * C) + other
        tl.store(scores + at_c, tl.where(here > other, A, 0.0), mask=inside[:, None])
        Y = tl.where((here == other + 1) & (here % 2 == 1), L, 0.0)
        for level in tl.static_range(1, LEVELS):
            half = 1 << level
            meet = (here // (2 * half) == other // (2 * half)) & (here // half > other // half)
            Z = tl.where(meet, L, 0.0)
            Z -= tl.dot(Z, strength[:, None] * Y, input_precision=SOLVING)
            Y += Z - tl.dot(Y, strength[:, None] * Z, input_precision=SOLVING)
        tl.store(solved + at_c, Y, mask=inside[:, None])


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "count_rows"])
def delta_values(
    q, k, v, beta, g, sums, scores, itself, solved, borders, entry, o, news, states, end,
    tokens, heads, segments, count_rows,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, NEWS: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """One slice of o and, with NEWS, of r. With STATES the state before every segment, and after the last, is left.

    Products a chunk: 3·C·X·BZ + 2·C·C·BZ multiply-adds.
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
            A = tl.load(scores + row * C + at_c, mask=inside[:, None], other=0.0)
            Y = tl.load(solved + row * C + at_c, mask=inside[:, None], other=0.0)
            strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
            own = tl.load(itself + line + t, mask=inside, other=0.0) * strength
            if GATE != 0:
                count = tl.minimum(stop - begin, C)
                hi, _, after, total = sums_of(
                    g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
                )
            before = S.to(bk.dtype)
            found = tl.dot(bk, before, input_precision=PRECISION)
            seen = tl.dot(bq, before, input_precision=PRECISION)
            if GATE != 0:
                reading = tl.exp2(hi)
                found = found * reading[:, None]
                seen = seen * reading[:, None]
                S = S * tl.exp2(total)
            r = bv.to(tl.float32) - found
            r -= tl.dot(Y, (strength[:, None] * r).to(bk.dtype), input_precision=PRECISION)
            written = strength[:, None] * r
            out = tl.dot(A, written.to(bk.dtype), seen + own[:, None] * r, input_precision=PRECISION)
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
    do, q, k, news, beta, g, sums, scores, itself, solved, borders, entry, dv, dbeta, part, states, end,
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
            A = tl.load(scores + row * C + at_c, mask=inside[:, None], other=0.0)
            Y = tl.load(solved + row * C + at_c, mask=inside[:, None], other=0.0)
            # what feeds no dot is not pipelined: asked for before the dots, it arrives during them
            r = tl.load(news + row * Z + at_z, mask=in_rows_z, other=0.0).to(tl.float32)
            strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
            own = tl.load(itself + line + t, mask=inside, other=0.0)
            if GATE != 0:
                count = tl.minimum(stop - begin, C)
                hi, _, after, total = sums_of(
                    g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
                )
            asked = tl.dot(bk, E.to(bk.dtype), input_precision=PRECISION)
            writing = strength * 0.0 + 1.0
            if GATE != 0:
                asked = asked * tl.exp2(after)[:, None]
                writing = tl.exp2(hi)
                E = E * tl.exp2(total)
            asked = tl.dot(tl.trans(A), bdo, asked, input_precision=PRECISION)
            from_itself = own[:, None] * bdo.to(tl.float32)
            whole = (strength[:, None] * (asked + from_itself)).to(bk.dtype)
            du = asked - tl.dot(tl.trans(Y), whole, input_precision=PRECISION)
            at_part = s.to(tl.int64) * count_rows + line + t
            if PART:  # the token's own term cancels in dg
                tl.store(part + at_part, strength * tl.sum(du * r, 1), mask=inside)
            du += from_itself
            answer = strength[:, None] * du
            tl.store(dbeta + at_part, tl.sum(du * r, 1), mask=inside)
            tl.store(dv + row * Z + at_z, answer, mask=in_rows_z)
            written = (bdo.to(tl.float32) * writing[:, None]).to(bk.dtype)
            E = tl.dot(tl.trans(bq), written, E, input_precision=PRECISION)
            E = tl.dot(tl.trans(bk), (-answer * writing[:, None]).to(bk.dtype), E, input_precision=PRECISION)

    if STATES:
        tl.store(states + nh * (segments + 1) * X * Z + cell, E, mask=in_cell)
    tl.store(end + nh * X * Z + cell, E, mask=in_cell)


@triton.jit(do_not_specialize=["tokens", "heads", "parts", "count_rows"])
def delta_pairs(
    do, dv, news, q, k, beta, g, sums, borders, told, erased, own, part, tokens, heads, parts, count_rows,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """(do rᵀ γ) β and (dv rᵀ γ) β of every chunk, b t h C in the tokens' dtype, zeros on and above the diagonal;
    own_t = β_t r_t·do_t; with PART also Σ_j (do_i·r_j) γ_ij β_j (q_i·k_j), j < i: h (b t) both.

    The last from scores before they are rounded: those roundings add up in dg. 2·C·C·V + C·C·K multiply-adds a chunk.
    """
    pid = tl.program_id(0)
    share = pid % parts
    h = (pid // parts) % heads
    start, length = run_of(borders, pid // parts // heads, tokens, PACKED)
    first, stop = part_of(length, share, parts)
    line = h.to(tl.int64) * (count_rows // heads) + start
    ic, ik, iv = tl.arange(0, C), tl.arange(0, BK), tl.arange(0, BV)
    here, other = ic[:, None], ic[None, :]
    for i in range(0, tl.cdiv(stop - first, C)):
        begin = first + i * C
        t = begin + ic
        inside = t < stop
        row = (start + begin) * heads + h
        at_v = row * V + here * (heads * V) + iv[None, :]
        ok_v = inside[:, None] & (iv < V)[None, :]
        bdo = tl.load(do + at_v, mask=ok_v, other=0.0)
        bdv = tl.load(dv + at_v, mask=ok_v, other=0.0)
        br = tl.load(news + at_v, mask=ok_v, other=0.0)
        strength = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
        P = tl.dot(bdo, tl.trans(br), input_precision=PRECISION)
        D = tl.dot(bdv, tl.trans(br), input_precision=PRECISION)
        tl.store(own + line + t, strength * tl.sum(tl.where(here == other, P, 0.0), 1), mask=inside)
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, lo, _, _ = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
            )
            between = decays_of(hi, lo, g, 0, ic, GATE, EXACT, False)
            P = P * between
            D = D * between
        P = tl.where(here > other, P * strength[None, :], 0.0)
        D = tl.where(here > other, D * strength[None, :], 0.0)
        at_c = row * C + here * (heads * C) + other
        tl.store(told + at_c, P, mask=inside[:, None])
        tl.store(erased + at_c, D, mask=inside[:, None])
        if PART:
            at_k = row * K + here * (heads * K) + ik[None, :]
            ok_k = inside[:, None] & (ik < K)[None, :]
            bq = tl.load(q + at_k, mask=ok_k, other=0.0)
            bk = tl.load(k + at_k, mask=ok_k, other=0.0)
            met = tl.dot(bq, tl.trans(bk), input_precision=PRECISION)
            tl.store(part + line + t, tl.sum(P * met, 1), mask=inside)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count_rows"])
def delta_queries(
    do, dv, news, q, k, beta, g, sums, told, erased, own, borders, entry, dq, dk, part,
    tokens, heads, segments, slots, count_rows,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """One slice (of K) of dq = do M_tᵀ and of dk = -dv M̂ᵀ over a segment; with PART the slice's part of dg.

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
    at_c = ic[:, None] * (heads * C) + ic[None, :]
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
        P = tl.load(told + row * C + at_c, mask=inside[:, None], other=0.0)
        D = tl.load(erased + row * C + at_c, mask=inside[:, None], other=0.0)
        # what feeds no dot is not pipelined: asked for before the dots, it arrives during them
        if PART:
            bq = tl.load(q + row * Z + at_z, mask=in_rows_z, other=0.0).to(tl.float32)
        writing = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
        itself = tl.load(own + line + t, mask=inside, other=0.0)
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, _, after, total = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
            )
        before = S.to(bk.dtype)
        seen = tl.dot(bdo, before, input_precision=PRECISION)
        gone = tl.dot(bdv, before, input_precision=PRECISION)
        if GATE != 0:
            reading = tl.exp2(hi)
            seen = seen * reading[:, None]
            gone = gone * reading[:, None]
            writing = writing * tl.exp2(after)
            S = S * tl.exp2(total)
        wide = bk.to(tl.float32)
        if PART:
            asked = tl.sum(seen * bq, 1)
        seen = tl.dot(P, bk, seen + itself[:, None] * wide, input_precision=PRECISION)
        gone = tl.dot(D, bk, gone, input_precision=PRECISION)
        S = tl.dot(tl.trans(br), (wide * writing[:, None]).to(bk.dtype), S, input_precision=PRECISION)
        if PART:
            asked -= tl.sum(gone * wide, 1)
            tl.store(part + s.to(tl.int64) * count_rows + line + t, asked, mask=inside)
        tl.store(dq + row * Z + at_z, seen, mask=in_rows_z)
        tl.store(dk + row * Z + at_z, -gone, mask=in_rows_z)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count_rows"])
def delta_keys(
    do, dv, news, q, k, beta, g, sums, told, erased, own, borders, entry, dk,
    tokens, heads, segments, slots, count_rows,
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
    at_c = ic[:, None] * (heads * C) + ic[None, :]
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
        P = tl.load(told + row * C + at_c, mask=inside[:, None], other=0.0)
        D = tl.load(erased + row * C + at_c, mask=inside[:, None], other=0.0)
        gone = tl.load(dk + row * Z + at_z, mask=in_rows_z, other=0.0).to(tl.float32)
        answering = tl.load(beta + row + ic * heads, mask=inside, other=0.0)
        itself = tl.load(own + line + t, mask=inside, other=0.0)
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, _, after, total = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
            )
        out = tl.dot(br, E.to(bk.dtype), input_precision=PRECISION)
        asking = bq
        minus = -bk.to(tl.float32)
        if GATE != 0:
            writing = tl.exp2(hi)
            asking = (bq.to(tl.float32) * writing[:, None]).to(bk.dtype)
            erasing = (minus * writing[:, None]).to(bk.dtype)
            answering = answering * tl.exp2(after)
            E = E * tl.exp2(total)
        else:
            erasing = minus.to(bk.dtype)
        out = gone + answering[:, None] * out + itself[:, None] * bq.to(tl.float32)
        out = tl.dot(tl.trans(P), bq, out, input_precision=PRECISION)
        out = tl.dot(tl.trans(D), minus.to(bk.dtype), out, input_precision=PRECISION)
        E = tl.dot(tl.trans(bdo), asking, E, input_precision=PRECISION)
        E = tl.dot(tl.trans(bdv), erasing, E, input_precision=PRECISION)
        tl.store(dk + row * Z + at_z, out, mask=in_rows_z)


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
    QS: tl.constexpr, KS: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr, CELL_BLOCK: tl.constexpr,
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
        later = product_of(last, behind, at, CELLS, CELL_BLOCK)
    if STARTS:
        missing = product_of(memory, cotangent, at, CELLS, CELL_BLOCK)
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
    sizes = {"X": X, "Z": Z, "BX": padded(X), "BZ": columns, "SLICES": triton.cdiv(Z, columns)}
    return {**sizes, "C": chunk, **kind_of(x, g, borders), "num_warps": warps, "num_stages": stages}


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


def parts_of(x: Tensor, borders: Tensor | None) -> int:
    """In how many parts each sequence is cut where chunks need not wait for each other: 64 tokens each, or a quarter
    of the average document where many share a row."""
    t = x.shape[1]
    return min(triton.cdiv(t, 64), 4 * triton.cdiv(t, 64 * max(sequences_of(x, borders), 1)))


def prepare(q, k, beta, g, sums, borders) -> tuple[Tensor, Tensor, Tensor]:
    """`delta_prepare`: A, q·k and Y."""
    b, t, h, K = k.shape
    chunk, parts, exact = chunk_for(k), parts_of(k, borders), k.element_size() == 4
    scores, solved = (k.new_empty(b, t, h, chunk) for _ in range(2))
    itself = beta.new_empty(h, b * t)
    decay.launch(
        delta_prepare, sequences_of(k, borders) * h * parts,
        q, k, beta, g, sums, borders, scores, itself, solved, t, h, parts, beta.numel(),
        K=K, BK=padded(K), C=chunk, LEVELS=chunk.bit_length() - 1, SOLVING=SOLVING[k.dtype],
        **kind_of(k, g, borders), num_warps=4 if chunk == 64 else 1, num_stages=1 if exact else 2,
    )  # fmt: skip
    return scores, itself, solved


def pairs(do, dv, news, q, k, beta, g, sums, borders, part) -> tuple[Tensor, Tensor, Tensor]:
    """`delta_pairs`; with `part` its share of dg goes there."""
    (b, t, h, K), V = q.shape, dv.shape[-1]
    chunk, parts, exact = chunk_for(k), parts_of(k, borders), k.element_size() == 4
    told, erased = (k.new_empty(b, t, h, chunk) for _ in range(2))
    own = beta.new_empty(h, b * t)
    decay.launch(
        delta_pairs, sequences_of(k, borders) * h * parts,
        do, dv, news, q, k, beta, g, sums, borders, told, erased, own, part, t, h, parts, beta.numel(),
        K=K, V=V, BK=padded(K), BV=padded(V), C=chunk, PART=part is not None,
        **kind_of(k, g, borders), num_warps=4 if chunk == 64 else 1, num_stages=1 if exact else 2,
    )  # fmt: skip
    return told, erased, own


def forward(q, k, v, beta, g, memory, borders, segments: int, wide: bool, keep: bool) -> tuple[Tensor, ...]:
    """(o, the last memory, the memories between segments, r, A, q·k, Y). `wide`: o in float32.

    `keep`: r and, where there are several segments, the memories are kept for the gradient; else they are empty.
    """
    chunk = chunk_for(k)
    sums = sums_in_chunks(g, borders, q.element_size() == 4, chunk)
    scores, itself, solved = prepare(q, k, beta, g, sums, borders)
    shape = shape_of(q, v, g, borders, chunk)
    n, h, K, V = sequences_of(q, borders), *q.shape[2:], v.shape[-1]
    o = torch.empty_like(v, dtype=torch.float32 if wide else v.dtype)
    news = torch.empty_like(v) if keep else v.new_empty(0)
    last = q.new_empty(n, h, K, V, dtype=torch.float32)
    several = keep and segments > 1
    states = last.new_empty((n, h, segments + 1, K, V) if several else 0)
    decay.launch(
        delta_values, shape["SLICES"] * h * n,
        q, k, v, beta, g, sums, scores, itself, solved, borders, memory, o, news, states, last,
        q.shape[1], h, segments if several else 1, beta.numel(),
        **shape, ENTRY=memory is not None, NEWS=keep, STATES=several,
    )  # fmt: skip
    return o, last, states, news, scores, itself, solved


def backward(
    do, dlast, q, k, v, beta, g, memory, borders, last, states, news, scores, itself, solved, want_g: bool
) -> tuple:
    """(dq, dk, dv, dβ, dg or None, dmemory) from the cotangents of o and of the last memory (None: zeros)."""
    several, count = states.numel() > 0, beta.numel()
    segments = states.shape[2] - 1 if several else 1
    slots = segments + 1 if several else 1
    chunk = chunk_for(k)
    sums = sums_in_chunks(g, borders, q.element_size() == 4, chunk)
    n, (b, t, h, _) = sequences_of(q, borders), q.shape
    want_g = want_g and g is not None

    by_value, by_key = shape_of(q, v, g, borders, chunk), shape_of(v, q, g, borders, chunk)
    dv, dmemory, cotangents = torch.empty_like(v), torch.empty_like(last), torch.empty_like(states)
    answered, dbeta = (beta.new_empty(by_value["SLICES"], h, b * t) for _ in range(2))
    decay.launch(
        delta_answers, by_value["SLICES"] * h * n,
        do, q, k, news, beta, g, sums, scores, itself, solved, borders, dlast, dv, dbeta, answered, cotangents, dmemory,
        t, h, segments, count, **by_value, ENTRY=dlast is not None, PART=want_g, STATES=several,
    )  # fmt: skip

    asked = beta.new_empty(by_key["SLICES"] + 1, h, b * t)
    told, erased, own = pairs(do, dv, news, q, k, beta, g, sums, borders, asked[-1] if want_g else None)
    before, behind = (states, cotangents[:, :, 1:]) if several else (memory, dlast)
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    run, programs = (t, h, segments, slots, count), by_key["SLICES"] * segments * h * n
    decay.launch(
        delta_queries, programs,
        do, dv, news, q, k, beta, g, sums, told, erased, own, borders, before, dq, dk, asked, *run,
        **by_key, ENTRY=before is not None, PART=want_g,
    )  # fmt: skip
    decay.launch(
        delta_keys, programs, do, dv, news, q, k, beta, g, sums, told, erased, own, borders, behind, dk, *run,
        **by_key, ENTRY=behind is not None,
    )  # fmt: skip
    dg = None
    if want_g:
        starts = (states, cotangents) if several else (memory, dmemory)
        ends = (states[:, :, 1:], behind) if several else (last, dlast)
        dg = torch.empty_like(g)
        decay.launch(
            delta_dg, segments * h * n, asked, answered, g, borders, *starts, *ends, dg, *run,
            QS=asked.shape[0], KS=answered.shape[0], CELLS=q.shape[-1] * v.shape[-1], BLOCK=256, CELL_BLOCK=2048,
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
