"""Triton kernels for memories scanned element by element: M_t = a_t ⊙ M_{t-1} + k_tᵀ v_t, o_t = q_t M_t.

a_t is a number an element and token, of few parts, by KIND (c is a column, a number a value channel):

    RATE     e^{A_kc Δ_tc}        Mamba
    ERASE    1 - k_tk² Δ_tc       Longhorn
    PACE     e^{A_kc Δ_tk}        S4 and Mamba as a survey prints them: Δ of a row
    FULL     e^{G_tkc}            gated fast weights as it prints them: a gate of each token's own for every element
    SPIRAL   z_kc, complex, no token's                 S4; k is 1, o = Σ_k Re(r_kc M_kc)

Chunks of tokens are no matrix products here: the sum over tokens has another weight for every pair of row and column.
So a program owns all K rows of a slice of columns, in registers, and goes through time token by token; every input is
read once. With D_t the cotangent of M_t, its own read included, and Λ_t = D_t ⊙ a_t ⊙ M_{t-1}:

    D_t += q_tᵀ do_t     dq_t = Σ_c M_t do_t     dk_t = Σ_c D_t v_t     dv_t = Σ_k k_t D_t     D_{t-1} = conj(a_t) ⊙ D_t
    RATE     dA = Σ_t Δ_t Λ_t     dΔ_t = Σ_k A Λ_t
    ERASE    dΔ_t = -Σ_k k² D_t M_{t-1}     dk_t -= 2 k Σ_c Δ_t D_t M_{t-1}
    PACE     dA = Σ_t Δ_t Λ_t     dΔ_t = Σ_c A Λ_t
    FULL     dG_t = Λ_t
    SPIRAL   dz = Σ_t D_t conj(M_{t-1})     dr = Σ_t do_t conj(M_t)     D_t += conj(r) do_t     r = 2 (q + i p)

The forward pass keeps the memory of every KEPT = 16th token, if a gradient will be wanted. The backward pass goes from
the last tokens to the first, R at a time: from the memory that is kept before them forwards, with the memories (and
decays) of the R tokens in registers, then back. Walking from the kept memory to the R tokens costs (KEPT / R - 1) / 2
further decays a token, 1.5 where R = 4. Where a memory has more than 16 rows that would be K / 8 U and more, so every
FAR = 256th token is kept, and the backward pass finds the others of such a stretch again, one more decay a token, and
leaves them in `near`, one stretch a program: a place that stays in the L2 cache if programs are few.

What is summed over time (dA, dz, dr) stays in registers, a partial sum a program; what is summed over columns (dq, dk,
row gates) is a partial sum a slice: `parts`. Both are added up afterwards, in a fixed order, so that results are the
same bits every time.

Too few programs: segments, as in `decay.py`: what each does to a memory, M -> A ⊙ M + S (`scan_span`, which needs all
decays once more), the memories between them (`scan_fold`), then the same kernels from every one of them.

No exponent is a sum over tokens, so any Δ and gates in [-inf, 0] are right; tokens beyond the end have a_t = 1 and
write nothing. Inputs are 16 or 32 bits, everything is computed in float32 on ordinary lanes: there is no product of
matrices, so odd sizes need no padding.

Bytes and operations, Mamba with N = 16 rows, U = one b t V tensor in 16 bits, Δ in float32 (2 U): forward v Δ -> o 4 U,
the floor, and 2 U of kept memories; backward v Δ do, kept memories -> dv dΔ 9 U (floor 7), 2 U for `parts`, read again.
At B8 T2048 V2048 there are 537 M elements and tokens: as many exponentials forward (0.145 ms at 16 a clock and
multiprocessor of an H200, where 4 U take 0.063), 2.5 times as many backward. Beside it an element and token costs
2 multiplications and 2 multiply-adds forward; backward 12, and 4 for each step of walking. S4 has no exponentials and
moves 2 U forward and 3 more backward; a complex element and token costs 4 multiply-adds, a sum, and 2 to be read.

PACE has RATE's exponentials and products, with a sum over columns in place of one over rows. Its Δ is a row's, so that
2 U forward and 5 backward are left beside q k Δ. FULL has an exponential an element and token as well, and 4 bytes of G
(16 × 16: 1 KiB a token and head, where q k v o are 128 bytes in 16 bits): read once forward; backward read once, 1.5
times more in walking where R = 4, and once more where FAR counts, with dG written once. The floor is one read forward,
one read and one write backward: whoever wants speed does not give every element a gate of its own.

Layout. The first tile loaded decides how Triton lays out the memory: 16 bytes a thread, so 4 × 8 threads of 4 × 4
elements each for 16 × 32. A sum over rows is then 8 exchanges between threads and one over columns 12; with all rows in
one thread, which Triton would choose for sums over rows alone, a sum over columns takes 80. Tokens are asked for R at a
time, one group ahead (forwards): no load is waited for in the chain.

Compilers: code after a `return` that stands under a condition known at compile time is compiled all the same. The lines
of the tables below are chosen by instructions (bench/LOG.md), not by times. Compiled for sm_90 (Triton 3.7.1,
tests/hopper.py) they do not spill, in 16 and 32 bits, but for RATE, PACE and FULL from 128 rows on in float32, whose
exponents are float64 (up to 200 bytes a thread), and 24 bytes of PACE's span with 256 rows in 16 bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay
from fast.kernels.decay import LOG2_E, cdiv, next_power_of_2, padded, power_of_2, sequences_of, stretch_of

# what a_t is made of; RATE and ERASE have a gate of columns, PACE one of rows, and SPIRAL is complex
RATE, ERASE, PACE, FULL, SPIRAL = (tl.constexpr(i) for i in range(5))

# padded rows of the memory, how many memories it is (2: a complex one) -> (columns a program, warps, tokens at once)
CONFIG = {
    (16, 1): (32, 1, 4),
    (32, 1): (32, 2, 4),
    (64, 1): (32, 4, 4),
    (128, 1): (64, 8, 2),
    (256, 1): (32, 8, 2),
    (16, 2): (32, 2, 4),
    (32, 2): (32, 4, 4),
    (64, 2): (32, 8, 4),
    (128, 2): (32, 8, 2),
}
# the same where gradients are computed: registers hold the memories before all those tokens, and their decays (RATE,
# PACE, FULL) or what becomes the gradients of four constants (SPIRAL)
BACKWARD = {
    (16, 1): (32, 2, 4),
    (32, 1): (32, 4, 4),
    (64, 1): (32, 8, 4),
    (128, 1): (32, 8, 2),
    (256, 1): (16, 8, 2),
    (16, 2): (16, 2, 4),
    (32, 2): (16, 4, 4),
    (64, 2): (16, 8, 4),
    (128, 2): (16, 8, 2),
}
KEPT = 16  # tokens from one memory on the way back to the next
FAR = 256  # tokens between those kept from the forward pass where they are large; the others are found again


@triton.jit
def token_of(
    v, x, k, rows, columns, at, ok, ik, iv, in_k, in_v,
    K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr, ASKED: tl.constexpr,
):  # fmt: skip
    """(v, k, a row's gate, a column's gate, ASKED: x) of one token in float32; nothing that changes M where it is not
    ok."""
    bv = tl.load(v + at * V + iv, mask=in_v & ok, other=0.0).to(tl.float32)
    bk, gate, step, bx = bv, bv, bv, bv
    if KIND != SPIRAL:
        bk = tl.load(k + at * K + ik, mask=in_k & ok, other=0.0).to(tl.float32)
        bx = bk
        if ASKED:
            bx = tl.load(x + at * K + ik, mask=in_k & ok, other=0.0).to(tl.float32)
    if KIND == PACE:
        gate = tl.load(rows + at * K + ik, mask=in_k & ok, other=0.0)
    if KIND < PACE:
        step = tl.load(columns + at * V + iv, mask=in_v & ok, other=0.0)
    return bv, bk, gate, step, bx


@triton.jit
def tokens_of(
    v, x, k, rows, columns, row, heads, h, first, last, ik, iv, in_k, in_v,
    K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr, ASKED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """`token_of` the R tokens from that row on, of which those from `first` to before `last` are there: all loads are
    asked for before the first of them is waited for."""
    found = ()
    for j in tl.static_range(R):
        ok = (j >= first) & (j < last)
        at = (row + j) * heads + h
        found += (token_of(v, x, k, rows, columns, at, ok, ik, iv, in_k, in_v, K, V, KIND, ASKED),)
    return found


@triton.jit
def rate_of(fixed, rate, at, cell, inside, ok, K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr):
    """The rates of a token's elements: those of all tokens, unless it has its own (FULL)."""
    if KIND == FULL:
        rate = tl.load(fixed + at.to(tl.int64) * K * V + cell, mask=inside & ok, other=0.0) * LOG2_E
    return rate


@triton.jit
def decay_of(bk, gate, step, rate, spin, ok, KIND: tl.constexpr, EXACT: tl.constexpr):
    """a_t, and its imaginary part."""
    a, b = rate, spin
    if KIND == RATE:
        each = rate.to(tl.float64) if EXACT else rate
        a = power_of_2(each * step[None, :], EXACT)
    if KIND == PACE:
        each = rate.to(tl.float64) if EXACT else rate
        a = power_of_2(each * gate[:, None], EXACT)
    if KIND == FULL:
        a = power_of_2(rate, EXACT)
    if KIND == ERASE:
        a = 1 - (bk * bk)[:, None] * step[None, :]
    if KIND == SPIRAL:
        a, b = tl.where(ok, rate, 1.0), tl.where(ok, spin, 0.0)
    return a, b


@triton.jit
def times(a, b, M, N, COMPLEX: tl.constexpr):
    """(a + i b) (M + i N)."""
    if COMPLEX:
        real = a * M - b * N
        N = b * M + a * N
    else:
        real = a * M
    return real, N


@triton.jit
def written(M, bk, bv, KIND: tl.constexpr):
    """M + kᵀ v; SPIRAL: v to every row."""
    if KIND == SPIRAL:
        M += bv[None, :]
    else:  # what stands behind a return is compiled all the same
        M += bk[:, None] * bv[None, :]
    return M


@triton.jit
def tile_of(x, cell, inside, GIVEN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    if GIVEN:
        tile = tl.load(x + cell, mask=inside, other=0.0)
    else:
        tile = tl.zeros((BK, BV), tl.float32)
    return tile


@triton.jit
def constants_of(fixed, M, h, heads, cell, inside, K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr):
    """What no token changes, in registers: (rate, spin, the read's real and imaginary parts)."""
    rate, spin, asked, turned = M, M, M, M
    if (KIND == RATE) | (KIND == PACE):
        rate = tl.load(fixed + h * K * V + cell, mask=inside, other=0.0) * LOG2_E
    if KIND == SPIRAL:
        rate = tl.load(fixed + h * K * V + cell, mask=inside, other=0.0)
        spin = tl.load(fixed + (heads + h) * K * V + cell, mask=inside, other=0.0)
        asked = 2 * tl.load(fixed + (2 * heads + h) * K * V + cell, mask=inside, other=0.0)
        turned = 2 * tl.load(fixed + (3 * heads + h) * K * V + cell, mask=inside, other=0.0)
    return rate, spin, asked, turned


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots"])
def scan_forward(
    v, q, k, rows, columns, fixed, borders, entry, o, end, marks, tokens, heads, segments, slots,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, KIND: tl.constexpr,
    R: tl.constexpr, FAR: tl.constexpr, PACKED: tl.constexpr, ENTRY: tl.constexpr, END: tl.constexpr,
    MARKS: tl.constexpr,
):  # fmt: skip
    """A slice of o over a segment of one head of one sequence. MARKS: memories are kept for the gradient.

    Reads its slice of v and of the columns' gates once, q, k and the rows' gates once a slice. One token, with `entry`
    as its own `end`, is a step: every program reads its tile before it writes it.
    """
    COMPLEX: tl.constexpr = KIND == SPIRAL
    SIZE: tl.constexpr = K * V * (2 if COMPLEX else 1)
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)

    ik = tl.arange(0, BK)
    iv = s * BV + tl.arange(0, BV)
    in_k, in_v = ik < K, iv < V
    cell = ik[:, None] * V + iv[None, :]
    inside = in_k[:, None] & in_v[None, :]
    nh = (n * heads + h).to(tl.int64)
    place = (nh * slots + segment) * SIZE
    M = tile_of(entry, place + cell, inside, ENTRY, BK, BV)
    N = M
    if COMPLEX:
        N = tile_of(entry, place + K * V + cell, inside, ENTRY, BK, BV)
    rate, spin, asked, turned = constants_of(fixed, M, h, heads, cell, inside, K, V, KIND)
    ahead = tokens_of(
        v, q, k, rows, columns, start + first, heads, h, 0, stop - first, ik, iv, in_k, in_v, K, V, KIND, True, R
    )
    for i in range(0, tl.cdiv(stop - first, R)):
        begin = first + i * R
        now = ahead
        ahead = tokens_of(
            v, q, k, rows, columns, start + begin + R, heads, h, 0, stop - begin - R, ik, iv, in_k, in_v,
            K, V, KIND, True, R,
        )  # fmt: skip
        if MARKS:
            mark = marks + ((start + begin) // FAR * heads + h) * SIZE
            due = (i * R % FAR == 0) & (i > 0)
            tl.store(mark + cell, M, mask=inside & due)
            if COMPLEX:
                tl.store(mark + K * V + cell, N, mask=inside & due)
        for j in tl.static_range(R):
            ok = begin + j < stop
            bv, bk, gate, step, bq = now[j]
            each = rate_of(fixed, rate, (start + begin + j) * heads + h, cell, inside, ok, K, V, KIND)
            a, b = decay_of(bk, gate, step, each, spin, ok, KIND, v.dtype.element_ty == tl.float32)
            M, N = times(a, b, M, N, COMPLEX)
            M = written(M, bk, bv, KIND)
            if KIND == SPIRAL:
                out = tl.sum(asked * M - turned * N, 0)
            else:
                out = tl.sum(bq[:, None] * M, 0)
            tl.store(o + ((start + begin + j) * heads + h) * V + iv, out, mask=in_v & ok)

    if END:
        tl.store(end + nh * SIZE + cell, M, mask=inside)
        if COMPLEX:
            tl.store(end + nh * SIZE + K * V + cell, N, mask=inside)


@triton.jit
def walked(
    M, N, near, v, k, rows, columns, fixed, start, origin, stop, groups, heads, h, rate, spin, cell, inside,
    ik, iv, in_k, in_v,
    K: tl.constexpr, V: tl.constexpr, KIND: tl.constexpr, R: tl.constexpr, KEPT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The memory `groups` times R tokens later than at `origin`; KEEP: every KEPT tokens it is left in `near`."""
    COMPLEX: tl.constexpr = KIND == SPIRAL
    SIZE: tl.constexpr = K * V * (2 if COMPLEX else 1)
    for i in range(0, groups):
        begin = origin + i * R
        if KEEP:
            due = i * R % KEPT == 0
            slot = near + i * R // KEPT * SIZE + cell
            tl.store(slot, M, mask=inside & due)
            if COMPLEX:
                tl.store(slot + K * V, N, mask=inside & due)
        now = tokens_of(
            v, k, k, rows, columns, start + begin, heads, h, 0, stop - begin, ik, iv, in_k, in_v, K, V, KIND, False, R
        )
        for j in tl.static_range(R):
            bv, bk, gate, step, _ = now[j]
            ok = begin + j < stop
            each = rate_of(fixed, rate, (start + begin + j) * heads + h, cell, inside, ok, K, V, KIND)
            a, b = decay_of(bk, gate, step, each, spin, ok, KIND, v.dtype.element_ty == tl.float32)
            M, N = times(a, b, M, N, COMPLEX)
            M = written(M, bk, bv, KIND)
    return M, N


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count"])
def scan_backward(
    do, q, k, v, rows, columns, fixed, borders, entry, cotangent, marks, near, dv, dcolumns, parts, dfixed, end,
    tokens, heads, segments, slots, count,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, KIND: tl.constexpr,
    R: tl.constexpr, KEPT: tl.constexpr, FAR: tl.constexpr, PACKED: tl.constexpr, ENTRY: tl.constexpr,
    ENDS: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """The gradients of a slice of columns, a segment of one head of one sequence.

    Decays that take an exponential an element, or a load (HELD), stay in registers until the way back.

    The memory before R tokens comes from `marks` (at a segment's start: `entry`) where FAR = KEPT. Else the first time
    that a stretch of FAR tokens is met its memories are made from there, every KEPT tokens, and left in `near`.
    `parts`: what its columns give the gradients of rows (dq, dk and the gate's): · SLICES (b t h) K; count
    is b t h. `dfixed`: what its tokens give those of constants: n segments · h K V; of FULL, each token's: b t h K V.
    """
    COMPLEX: tl.constexpr = KIND == SPIRAL
    HELD: tl.constexpr = (KIND == RATE) | (KIND == PACE) | (KIND == FULL)
    SIZE: tl.constexpr = K * V * (2 if COMPLEX else 1)
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)

    ik = tl.arange(0, BK)
    iv = s * BV + tl.arange(0, BV)
    in_k, in_v = ik < K, iv < V
    cell = ik[:, None] * V + iv[None, :]
    inside = in_k[:, None] & in_v[None, :]
    nh = (n * heads + h).to(tl.int64)
    place = (nh * slots + segment) * SIZE
    D = tile_of(cotangent, place + cell, inside, ENDS, BK, BV)
    E = D
    if COMPLEX:
        E = tile_of(cotangent, place + K * V + cell, inside, ENDS, BK, BV)
    rate, spin, asked, turned = constants_of(fixed, D, h, heads, cell, inside, K, V, KIND)
    d_rate = tl.zeros((BK, BV), tl.float32)
    d_spin, d_asked, d_turned = d_rate, d_rate, d_rate
    parts += s.to(tl.int64) * count * K
    kind = count.to(tl.int64) * SLICES * K  # from the part of dq to that of dk
    if FAR > KEPT:
        near += (nh * segments + segment) * (FAR // KEPT) * SIZE
    blocks = tl.cdiv(stop - first, KEPT)
    for i in range(0, blocks * (KEPT // R)):
        block = blocks - 1 - i // (KEPT // R)
        ahead = (KEPT // R - 1 - i % (KEPT // R)) * R  # tokens between the kept memory and these R
        origin = first + block * KEPT
        begin = origin + ahead
        late = block % (FAR // KEPT)  # blocks between the memory that was kept and this one
        newly = (i % (KEPT // R) == 0) & ((late == FAR // KEPT - 1) | (block == blocks - 1))  # not met before
        wanted = inside & newly if FAR > KEPT else inside
        far = block - late
        mark = ((start + first + far * KEPT) // FAR * heads + h) * SIZE + cell
        M = tl.load(marks + mark, mask=wanted & (far > 0), other=0.0)
        N = M
        if COMPLEX:
            N = tl.load(marks + mark + K * V, mask=wanted & (far > 0), other=0.0)
        if ENTRY:
            M += tl.load(entry + place + cell, mask=wanted & (far == 0), other=0.0)
            if COMPLEX:
                N += tl.load(entry + place + K * V + cell, mask=wanted & (far == 0), other=0.0)
        if FAR > KEPT:
            tl.debug_barrier()  # the stretch before has been read
            groups = tl.where(newly, late * (KEPT // R), 0)
            M, N = walked(
                M, N, near, v, k, rows, columns, fixed, start, first + far * KEPT, stop, groups, heads, h,
                rate, spin, cell, inside, ik, iv, in_k, in_v, K, V, KIND, R, KEPT, True,
            )  # fmt: skip
            tl.store(near + late * SIZE + cell, M, mask=wanted)
            if COMPLEX:
                tl.store(near + late * SIZE + K * V + cell, N, mask=wanted)
            tl.debug_barrier()  # this one has been written
            M = tl.load(near + late * SIZE + cell, mask=inside, other=0.0)
            N = M
            if COMPLEX:
                N = tl.load(near + late * SIZE + K * V + cell, mask=inside, other=0.0)
        M, N = walked(
            M, N, near, v, k, rows, columns, fixed, start, origin, stop, ahead // R,
            heads, h, rate, spin, cell, inside, ik, iv, in_k, in_v, K, V, KIND, R, KEPT, False,
        )  # fmt: skip
        states, turns, decays = (), (), ()
        now = tokens_of(
            v, q, k, rows, columns, start + begin, heads, h, 0, stop - begin, ik, iv, in_k, in_v, K, V, KIND, True, R
        )
        cotangents = ()
        for j in tl.static_range(R):
            at = (start + begin + j) * heads + h
            asked_of = tl.load(do + at * V + iv, mask=in_v & (begin + j < stop), other=0.0)
            cotangents += (asked_of.to(tl.float32),)
        for j in tl.static_range(R):
            ok = begin + j < stop
            bv, bk, gate, step, _ = now[j]
            bdo = cotangents[j]
            each = rate_of(fixed, rate, (start + begin + j) * heads + h, cell, inside, ok, K, V, KIND)
            a, b = decay_of(bk, gate, step, each, spin, ok, KIND, v.dtype.element_ty == tl.float32)
            states += (M,)
            turns += (N,)
            if HELD:
                decays += (a,)
            M, N = times(a, b, M, N, COMPLEX)
            M = written(M, bk, bv, KIND)
            if KIND == SPIRAL:
                d_asked += 2 * M * bdo[None, :]
                d_turned -= 2 * N * bdo[None, :]
            else:
                line = parts + ((start + begin + j) * heads + h) * K + ik
                tl.store(line, tl.sum(M * bdo[None, :], 1), mask=in_k & ok)
        for back in tl.static_range(R):
            j = R - 1 - back
            ok = begin + j < stop
            at = (start + begin + j) * heads + h
            bv, bk, gate, step, bq = now[R - 1 - back]
            bdo = cotangents[R - 1 - back]
            if HELD:
                a, b = decays[R - 1 - back], decays[R - 1 - back]
            else:
                a, b = decay_of(bk, gate, step, rate, spin, ok, KIND, v.dtype.element_ty == tl.float32)
            before, turned_before = states[R - 1 - back], turns[R - 1 - back]
            if KIND == SPIRAL:
                D += asked * bdo[None, :]
                E -= turned * bdo[None, :]
                tl.store(dv + at * V + iv, tl.sum(D, 0), mask=in_v & ok)
                d_rate += tl.where(ok, D * before + E * turned_before, 0.0)
                d_spin += tl.where(ok, E * before - D * turned_before, 0.0)
                D, E = times(a, -b, D, E, COMPLEX)
            else:
                D += bq[:, None] * bdo[None, :]
                line = parts + at * K + ik
                dk = tl.sum(D * bv[None, :], 1)
                tl.store(dv + at * V + iv, tl.sum(D * bk[:, None], 0), mask=in_v & ok)
                if KIND == ERASE:
                    felt = D * before
                    dk -= 2 * bk * tl.sum(felt * step[None, :], 1)
                    d_step = -tl.sum(felt * (bk * bk)[:, None], 0)
                    D = a * D
                else:
                    D = a * D
                    felt = D * before
                    if KIND == RATE:
                        d_rate += felt * step[None, :]
                        d_step = tl.sum(felt * rate, 0) / LOG2_E
                    if KIND == PACE:
                        d_rate += felt * gate[:, None]
                        tl.store(line + 2 * kind, tl.sum(felt * rate, 1) / LOG2_E, mask=in_k & ok)
                    if KIND == FULL:
                        tl.store(dfixed + at.to(tl.int64) * K * V + cell, felt, mask=inside & ok)
                if KIND < PACE:
                    tl.store(dcolumns + at * V + iv, d_step, mask=in_v & ok)
                tl.store(line + kind, dk, mask=in_k & ok)

    if END:
        tl.store(end + nh * SIZE + cell, D, mask=inside)
        if COMPLEX:
            tl.store(end + nh * SIZE + K * V + cell, E, mask=inside)
    own = ((n * segments + segment).to(tl.int64) * (4 if COMPLEX else 1) * heads + h) * K * V + cell
    if (KIND == RATE) | (KIND == PACE):
        tl.store(dfixed + own, d_rate, mask=inside)
    if KIND == SPIRAL:
        tl.store(dfixed + own, d_rate, mask=inside)
        tl.store(dfixed + own + heads * K * V, d_spin, mask=inside)
        tl.store(dfixed + own + 2 * heads * K * V, d_asked, mask=inside)
        tl.store(dfixed + own + 3 * heads * K * V, d_turned, mask=inside)


@triton.jit(do_not_specialize=["tokens", "heads", "segments"])
def scan_span(
    v, x, k, rows, columns, fixed, borders, states, totals, tokens, heads, segments,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, KIND: tl.constexpr,
    R: tl.constexpr, PACKED: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a segment does to a memory, M -> A ⊙ M + S: S to the slot behind it, A to `totals`. REVERSE (x v = q do):
    what its outputs give the cotangent of the memory before it; A is the same, conjugate."""
    COMPLEX: tl.constexpr = KIND == SPIRAL
    SIZE: tl.constexpr = K * V * (2 if COMPLEX else 1)
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)

    ik = tl.arange(0, BK)
    iv = s * BV + tl.arange(0, BV)
    in_k, in_v = ik < K, iv < V
    cell = ik[:, None] * V + iv[None, :]
    inside = in_k[:, None] & in_v[None, :]
    M = tl.zeros((BK, BV), tl.float32)
    N, A, B = M, M + 1.0, M
    rate, spin, asked, turned = constants_of(fixed, M, h, heads, cell, inside, K, V, KIND)
    for i in range(0, tl.cdiv(stop - first, R)):
        begin = (stop - (i + 1) * R) if REVERSE else first + i * R
        now = tokens_of(
            v, x, k, rows, columns, start + begin, heads, h, first - begin, stop - begin, ik, iv, in_k, in_v,
            K, V, KIND, REVERSE, R,
        )  # fmt: skip
        for j in tl.static_range(R):
            bv, bk, gate, step, bx = now[R - 1 - j if REVERSE else j]
            ok = (begin + R - 1 - j >= first) if REVERSE else (begin + j < stop)
            at = (start + begin + (R - 1 - j if REVERSE else j)) * heads + h
            each = rate_of(fixed, rate, at, cell, inside, ok, K, V, KIND)
            a, b = decay_of(bk, gate, step, each, spin, ok, KIND, v.dtype.element_ty == tl.float32)
            if REVERSE:
                if KIND == SPIRAL:
                    M += asked * bv[None, :]
                    N -= turned * bv[None, :]
                else:
                    M = written(M, bx, bv, KIND)
                M, N = times(a, -b, M, N, COMPLEX)
            else:
                M, N = times(a, b, M, N, COMPLEX)
                M = written(M, bk, bv, KIND)
                A, B = times(a, b, A, B, COMPLEX)
    nh = (n * heads + h).to(tl.int64)
    slot = states + (nh * (segments + 1) + (segment if REVERSE else segment + 1)) * SIZE + cell
    total = totals + (nh * segments + segment) * SIZE + cell
    tl.store(slot, M, mask=inside)
    if COMPLEX:
        tl.store(slot + K * V, N, mask=inside)
    if not REVERSE:
        tl.store(total, A, mask=inside)
        if COMPLEX:
            tl.store(total + K * V, B, mask=inside)


@triton.jit(do_not_specialize=["segments"])
def scan_fold(
    states, totals, first, last, segments,
    CELLS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, COMPLEX: tl.constexpr, REVERSE: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    """The memories before every segment and after the last (backwards: their cotangents), in place of what the
    segments wrote: M_0 = first, M_{s+1} = A_s ⊙ M_s + S_s."""
    SIZE: tl.constexpr = CELLS * (2 if COMPLEX else 1)
    pid = tl.program_id(0)
    nh = (pid // BLOCKS).to(tl.int64)
    cell = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < CELLS
    states += nh * (segments + 1) * SIZE
    M = tl.zeros((BLOCK,), tl.float32)
    N = M
    if FIRST:
        M = tl.load(first + nh * SIZE + cell, mask=inside, other=0.0)
        if COMPLEX:
            N = tl.load(first + nh * SIZE + CELLS + cell, mask=inside, other=0.0)
    far = states + (segments * SIZE if REVERSE else 0) + cell
    tl.store(far, M, mask=inside)
    if COMPLEX:
        tl.store(far + CELLS, N, mask=inside)
    for i in range(0, segments):
        segment = segments - 1 - i if REVERSE else i
        slot = states + (segment if REVERSE else segment + 1) * SIZE + cell
        total = totals + (nh * segments + segment) * SIZE + cell
        a = tl.load(total, mask=inside, other=0.0)
        b = a
        if COMPLEX:
            b = tl.load(total + CELLS, mask=inside, other=0.0)
        M, N = times(a, -b if REVERSE else b, M, N, COMPLEX)
        M += tl.load(slot, mask=inside, other=0.0)
        tl.store(slot, M, mask=inside)
        if COMPLEX:
            N += tl.load(slot + CELLS, mask=inside, other=0.0)
            tl.store(slot + CELLS, N, mask=inside)
    tl.store(last + nh * SIZE + cell, M, mask=inside)
    if COMPLEX:
        tl.store(last + nh * SIZE + CELLS + cell, N, mask=inside)


# ------------------------------------------------------------------------------------------------ the launchers
# Tensors are contiguous; gates, constants and memories float32. q k : b t h K, v : b t h V (SPIRAL has only v);
# rows : b t h K (PACE), columns : b t h V (RATE, ERASE), fixed : 1 h K V (RATE, PACE: A), 4 h K V (SPIRAL) or b t h K V
# (FULL: G); memory : n h K V, complex ones n h 2K V. What a kind does not have is None.


def keys_of(k: Tensor | None, fixed: Tensor | None) -> int:
    return fixed.shape[-2] if k is None else k.shape[-1]


def memories(kind: int) -> int:
    """How many matrices of K × V a memory is."""
    return 2 if kind == SPIRAL.value else 1


def largest(kind: int) -> int:
    """How many rows a memory may have."""
    return max(size for size, parts in CONFIG if parts == memories(kind))


def row_gradients(kind: int) -> int:
    """Of how many inputs by row: q, k and their gates."""
    return {PACE.value: 3, SPIRAL.value: 0}.get(kind, 2)


def line_of(kind: int, K: int, backward: bool = False) -> tuple[int, int, int]:
    return (BACKWARD if backward else CONFIG)[padded(K), memories(kind)]


def segments_for(kind: int, k: Tensor | None, v: Tensor, fixed: Tensor | None, sequences: int) -> int:
    """In how many segments to cut each sequence: four warps a multiprocessor, and at least 512 tokens a segment."""
    columns, warps, _ = line_of(kind, keys_of(k, fixed))
    running = sequences * v.shape[2] * cdiv(v.shape[3], columns) * warps
    return decay.long_enough(4 * decay.multiprocessors(v.device) // max(running, 1), v, sequences)


def shape_of(
    kind: int, k: Tensor | None, v: Tensor, fixed: Tensor | None, borders: Tensor | None, backward=False
) -> dict:
    """The compile-time arguments of a kernel that goes through time."""
    K, V = keys_of(k, fixed), v.shape[-1]
    columns, warps, tokens = line_of(kind, K, backward)
    columns, full = min(columns, padded(V)), columns
    warps = max(1, warps * columns // full)
    sizes = {"K": K, "V": V, "BK": padded(K), "BV": columns, "SLICES": cdiv(V, columns)}
    return {**sizes, "KIND": kind, "R": tokens, "PACKED": borders is not None, "num_warps": warps}


def far_of(kind: int, k: Tensor | None, v: Tensor, fixed: Tensor | None, sequences: int) -> int:
    """Tokens from one memory that the forward pass keeps to the next: KEPT where memories are small, or sequences
    short."""
    small = memories(kind) * keys_of(k, fixed) <= 16
    return KEPT if small or v.shape[0] * v.shape[1] < FAR * sequences else FAR


def marks_of(
    kind: int, k: Tensor | None, v: Tensor, fixed: Tensor | None, sequences: int, keep: bool
) -> tuple[int, ...]:
    """The shape of the memories kept for the gradient. Those inside a sequence are `far_of` rows apart, also from those
    of its neighbours: their rows over that are a place of their own."""
    (b, t, h, V), far = v.shape, far_of(kind, k, v, fixed, sequences)
    return (cdiv(b * t, far), h, memories(kind) * keys_of(k, fixed), V) if keep else (0,)


def between(kind, x, k, v, rows, columns, fixed, borders, first, totals, segments: int, reverse=False):
    """The memories between segments (n h segments+1 · V) and the one at the far end (n h · V), from `first`."""
    shape = shape_of(kind, k, v, fixed, borders)
    n, t, h, V = sequences_of(v, borders), *v.shape[1:]
    size = (memories(kind) * shape["K"], V)
    states = v.new_empty(n, h, segments + 1, *size, dtype=torch.float32)
    last = torch.empty_like(states[:, :, 0])
    decay.launch(
        scan_span, shape["SLICES"] * segments * h * n, v, x, k, rows, columns, fixed, borders, states, totals,
        t, h, segments, **shape, REVERSE=reverse,
    )  # fmt: skip
    cells = shape["K"] * V
    block = min(1024, next_power_of_2(cells))
    blocks = cdiv(cells, block)
    decay.launch(
        scan_fold, n * h * blocks, states, totals, first, last, segments,
        CELLS=cells, BLOCK=block, BLOCKS=blocks, COMPLEX=memories(kind) == 2, REVERSE=reverse, FIRST=first is not None,
    )  # fmt: skip
    return states, last


def sweep(kind, q, k, v, rows, columns, fixed, borders, entry, end=None, marks=None, segments=1, slots=1, wide=False):
    """`scan_forward`: o. `end` receives the last memory, `marks` those on the way."""
    shape, n = shape_of(kind, k, v, fixed, borders), sequences_of(v, borders)
    if v.shape[1] == 1:
        shape["R"] = 1
    o = torch.empty_like(v, dtype=torch.float32 if wide else v.dtype)
    decay.launch(
        scan_forward, shape["SLICES"] * segments * v.shape[2] * n,
        v, q, k, rows, columns, fixed, borders, entry, o, end, marks, *v.shape[1:3], segments, slots,
        **shape, FAR=far_of(kind, k, v, fixed, n), ENTRY=entry is not None, END=end is not None,
        MARKS=marks is not None,
    )  # fmt: skip
    return o


def forward(kind, q, k, v, rows, columns, fixed, memory, borders, segments: int, keep: bool) -> tuple[Tensor, ...]:
    """(o, the last memory, memories between segments, what segments leave of one: nothing where there is one segment,
    marks). `keep`: a gradient will be wanted, so that marks are not empty."""
    given = (k, v, rows, columns, fixed, borders)
    n, h, size = sequences_of(v, borders), v.shape[2], memories(kind) * keys_of(k, fixed)
    last = v.new_empty(n, h, size, v.shape[-1], dtype=torch.float32)
    states, totals = last.new_empty(0), last.new_empty(0)
    marks = last.new_empty(marks_of(kind, k, v, fixed, n, keep))
    run, start, end = {}, memory, last
    if segments > 1:
        totals = last.new_empty(n, h, segments, *last.shape[2:])
        states, last = between(kind, q, *given, memory, totals, segments)
        run, start, end = {"segments": segments, "slots": segments + 1}, states, None
    o = sweep(kind, q, *given, start, end, marks if keep else None, **run)
    return o, last, states, totals, marks


def backward(do, dlast, kind, q, k, v, rows, columns, fixed, memory, borders, last, states, totals, marks):
    """(dq, dk, dv, drows, dcolumns, dfixed, dmemory), None for what the kind does not have, from the cotangents of o
    and of the last memory (None: zeros)."""
    cut = states.numel() > 0
    segments = states.shape[2] - 1 if cut else 1
    start, far, end, slots = memory, dlast, torch.empty_like(last), 1
    if cut:
        cotangents, end = between(kind, q, k, do, rows, columns, fixed, borders, dlast, totals, segments, reverse=True)
        start, far, slots = states, cotangents[:, :, 1:], segments + 1
    shape = shape_of(kind, k, v, fixed, borders, backward=True)
    n, (b, t, h), K = sequences_of(v, borders), v.shape[:3], shape["K"]
    dv, dcolumns = torch.empty_like(v), None if columns is None else torch.empty_like(columns)
    parts = last.new_empty(row_gradients(kind), shape["SLICES"], b, t, h, K)
    between_marks = far_of(kind, k, v, fixed, n)
    near = last.new_empty(n, h, segments, between_marks // KEPT, *last.shape[2:]) if between_marks > KEPT else None
    dfixed = None if fixed is None else last.new_empty(*(() if kind == FULL.value else (n, segments)), *fixed.shape)
    decay.launch(
        scan_backward, shape["SLICES"] * segments * h * n,
        do, q, k, v, rows, columns, fixed, borders, start, far, marks, near, dv, dcolumns, parts, dfixed,
        None if cut else end, t, h, segments, slots, b * t * h,
        **shape, KEPT=KEPT, FAR=between_marks, ENTRY=start is not None, ENDS=far is not None, END=not cut,
    )  # fmt: skip
    dq, dk, *gates = (part.sum(0) for part in parts) if len(parts) else (None, None)
    drows = torch.cat(gates, -1) if gates else None
    dq, dk = (None if y is None else y.to(q.dtype) for y in (dq, dk))
    dfixed = dfixed if dfixed is None or kind == FULL.value else dfixed.sum((0, 1))
    return dq, dk, dv, drows, dcolumns, dfixed, end


def step(kind, q, k, v, rows, columns, fixed, memory) -> Tensor:
    """o : b 1 h V in float32 of one token a sequence (inputs b 1 h ·); overwrites memory."""
    return sweep(kind, q, k, v, rows, columns, fixed, None, memory, memory, wide=True)
