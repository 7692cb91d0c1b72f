"""Triton kernels for memories that fade as a whole: M_t = e^{g_t} M_{t-1} + k_tᵀ v_t, o_t = q_t M_t.

The gate is nothing (linear attention), a number a head (lightning, retention) or a number a head and token (Mamba2).
One kernel, `decay_sweep`, is the output and all three gradients, because all four are the same sweep:

    out_i = Σ_j (x_i · y_j) e^{sum of the gates between} z_j      over j <= i, or over j >= i when it runs backwards

    output     x = q    y = k    z = v    forwards     the state is M      K × V
    dq         x = do   y = v    z = k    forwards     the state is Mᵀ     V × K
    dk         x = v    y = do   z = q    backwards    the state is Dᵀ     V × K    D_t: the cotangent of M_t
    dv         x = k    y = q    z = do   backwards    the state is D      K × V

In a chunk of C tokens, with b_i = g_1 + ... + g_i and the state S from before the chunk:

    forwards     out = e^{b_i} (x S) + tril((x yᵀ) e^{b_i - b_j}) z       S <- e^{b_C} S + yᵀ (e^{b_C - b_j} z)
    backwards    out = e^{b_C - b_i} (x S) + triu((x yᵀ) e^{b_j - b_i}) z     S <- e^{b_C} S + yᵀ (e^{b_j} z)

A program owns a slice of z's columns and streams through time; its slice of the state stays in registers and nothing
but the output is written. Splitting x's columns instead would leave partial outputs to be summed. When there are too
few programs to fill the GPU the sequence is cut in segments, as over GPUs in sequence parallelism: what each segment
does to a memory (`decay_span`), the memories between them (`decay_fold`), then the same sweep from every one of them.

Gates. Any g in [-inf, 0] is right and finite. A gate is raised to FLOOR first, where e^g is 0 in float32 all the
same. Behind such a gate a difference of two float32 sums is off by 1e-3 at worst. For float32 tokens (EXACT) the sums
are therefore taken in float64 and split in two float32; for 16-bit tokens the error is below their own rounding.

A chunk is mild if it leaves more than 2^LEAST of what it got. If all chunks of a program are (`fades_little`), what
fades is put on rows instead of pairs: with m = b_C / 2, r_i = e^{b_i - m} and z'_j = e^{m - b_j} z_j,

    forwards     out = r_i (x (e^m S) + tril(x yᵀ) z')       S <- e^m (e^m S + yᵀ z')        (backwards: 1 / r, triu)

so that no pair of tokens needs an exponential, one z' serves both products, and what is left of a slice in instructions
are 0.6 of those with pairs.

The gate's gradient needs no memory: with D_t as above, dg_t = <e^{g_t} M_{t-1}, D_t> obeys
dg_t = dg_{t+1} + q_t·dq_t - k_t·dk_t, and dg_{T+1} = <M_T, dM_T>. The products are taken in float32, before dq and dk
are rounded. The token's own term q_t·k_t v_t·do_t is in both and cancels: with EXACT it is left out of both, so that
what remains is as small as dg is. One number a head has a kernel of its own (`decay_slope`).

A pair of tokens i > j >= t is in q_i·dq_i as in k_j·dk_j and must cancel with all that was rounded on the way, or dg_t
has the errors of all later pairs (1.7 of the error budget over 2048 tokens). With [x] for x in 16 bits and P = do vᵀ,

    by pairs        q_i·dq_i  has  [P_ij e^{b_i - b_j}] k_j·q_i            k_j·dk_j  has  [P_ij e^{b_i - b_j}] q_i·k_j
    mild chunks     q_i·dq_i  has  [P_ij] [k_j / r_j]·(q_i r_i)            k_j·dk_j  has  [P_ij] [q_i r_i]·(k_j / r_j)

of which the latter two are not the same: one rounds the key, one the query. So what is summed is out before it fades,
weighed by w' = [q r] or [k / r], the z' of the other sweep: both have [P_ij] [k_j / r_j]·[q_i r_i]. For this both must
have the same r (they read the same sums, and the exponent of the one is minus that of the other), and both be mild or
neither (`fades_little` looks at the same sums). A pair over two chunks differs by the rounding of S and D as they are
read, as it does by pairs; these are made of the same [k / r] and [q r].

A weighted mean, o_t = q_t M_t / q_t N_t with N_t = k_1 + ... + k_t (no gates), is the same sweeps with a column of ones
beside v, which none of them needs to read: with w_i = q_i N_i, x = do / w and d_i = -x_i·o_i (`decay_quotient`), the
forward sweep sums its scores to w and divides by it, that of dq adds d_i to each of its scores do·v, that of dk d_j.
What N is at the end of a segment is one sum (`decay_counts`). 3 U more backward, and per token b t h four bytes.

A query's gradient Σ_j x_i·(v_j - o_i) k_j is what is left of terms that cancel: all of them for the first token, whose
o is v, and most where keys have much in common. Rounded on their own in 16 bits they were off by up to 2.6 of the error
budget. So w sums the scores as the product with v has them, in 16 bits (o is a mean of values, whatever was rounded), d
is of the x that the sweep reads, and what all x·v + d of a token lose to 16 bits is given to the token's own key.
Nothing more is read or written.

Bytes and operations. In U = one b t h d tensor, K = V = d: the forward sweep moves 4 U and each of the three backward
ones 4 U (reads three, writes one; where the gate's gradient is wanted dq and dk read a fifth), 12 U against a floor of
7. Every sweep does slices·C·d + C·d + 2·d² multiply-adds a token and head. The slices of one head are neighbours in
the grid and find x and y, which each of them reads, in the L2 cache. With a chain of 32 chunks of 64 tokens the time
is that of one chunk's loads and products, one after the other, more than that of bytes (bench/LOG.md).

Compilers. Triton 3.4 to 3.7.0 on Hopper gives wrong numbers when a dot's result is cast, transposed and fed to another
dot (flash-linear-attention issue 640): transposed scores are computed as their own product here, and no result of a
dot is ever transposed. Triton 3.6.0 on Hopper gives wrong numbers, or an illegal access, for the gated sweeps in 16
bits with num_stages = 1 (2 and 3 are right; found by the tests): CONFIG has no such line. It does so, too, where N of a
weighted mean is a tile of the forward sweep's products (keys times ones, queries times N): its sums are taken element
by element. 16-bit tensors with odd rows have been miscompiled: the caller pads K and V to multiples of 16. Sizes that
change from call to call are never specialised, so an argument of 1 builds no different program.

What a loop loads for its products is copied to shared memory ahead, but only so far: with two stages copies begin at
the end of a turn and are waited for at the beginning of the next, with three there is a whole turn between. A load that
has another one as its `other` is a level behind it, and each level gets a part of the stages. And what feeds no product
is loaded where it stands: sweeps ask for it a chunk before they need it.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

FLOOR = tl.constexpr(-200.0)  # e^-200 is 0 in float32 (the least number is e^-103)
LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(-150.0)  # 2^-150 is 0 in float32
NONE, HEAD, TOKEN = 0, 1, 2  # the kinds of gate

CHUNK = {2: 64, 4: 16}  # tokens a chunk by bytes of a number: float32 products are not done by tensor cores

# padded row size, bytes of a number -> (columns of z a program, warps, stages of the load pipeline)
CONFIG = {
    (16, 2): (16, 4, 2),
    (32, 2): (32, 4, 2),
    (64, 2): (64, 4, 3),
    (128, 2): (64, 4, 3),
    (256, 2): (16, 4, 2),
    (16, 4): (16, 4, 1),
    (32, 4): (32, 4, 1),
    (64, 4): (32, 4, 1),
    (128, 4): (32, 4, 1),
    (256, 4): (16, 4, 1),
}
# log 2 of what a chunk must leave to be mild: half of it either way is within the dtype's range. Not within float16's,
# whose largest number is 2^16: there no chunk is
LITTLE = {torch.bfloat16: -80.0}
# dk and dv in one launch, where K = V and the gate is one number a token: two programs must fit a multiprocessor
PAIRED = {(16, 4): (16, 4, 1), (32, 4): (32, 4, 1), (64, 2): (64, 4, 2), (128, 2): (64, 4, 2)}


@triton.jit
def power_of_2(x, EXACT: tl.constexpr):
    """2^x in float32. EXACT: by way of float64, since a GPU's own is right to 2^-22 and float32 to 2^-24."""
    if EXACT:
        x = x.to(tl.float64)
    return tl.exp2(x).to(tl.float32)


@triton.jit
def plus_product(total, x, y, inside, PRECISION: tl.constexpr):
    """total + x y where `inside`. Of float32 the product is found first: added term by term to what is larger than all
    of them, every term would be rounded as the sum is. (The mask keeps the compiler from doing so. Tensor cores do not
    round every term: products in tf32 go on from `total`.)"""
    if (x.dtype == tl.float32) & (PRECISION == "ieee"):
        total += tl.where(inside, tl.dot(x, y, input_precision=PRECISION), 0.0)
    else:
        total = tl.dot(x, y, total, input_precision=PRECISION)
    return total


@triton.jit
def run_of(borders, n, tokens, PACKED: tl.constexpr):
    """The first row and the number of tokens of sequence n. Borders are clamped: no bad one reads foreign memory."""
    if PACKED:
        start = tl.minimum(tl.maximum(tl.load(borders + n), 0), tokens)
        stop = tl.minimum(tl.maximum(tl.load(borders + n + 1), start), tokens)
        length = stop - start
        start = start.to(tl.int64)
    else:
        start = n.to(tl.int64) * tokens
        length = tokens
    return start, length


@triton.jit
def part_of(length, segment, segments):
    """The first token of a segment and the token after its last. The unit is 64 tokens whatever the chunk is."""
    each = tl.cdiv(tl.cdiv(length, 64), segments) * 64
    first = tl.minimum(segment * each, length)
    return first, tl.minimum(first + each, length)


@triton.jit
def stretch_of(pid, borders, tokens, heads, segments, SLICES: tl.constexpr, PACKED: tl.constexpr):
    """(s, segment, h, n, start, first, stop) of a program that takes one slice over one segment of one head: its
    numbers, the sequence's first row, the segment's first token and that after its last. Slices of a head are
    neighbours in the grid."""
    s = pid % SLICES
    segment = (pid // SLICES) % segments
    h = (pid // SLICES // segments) % heads
    n = pid // SLICES // segments // heads
    start, length = run_of(borders, n, tokens, PACKED)
    first, stop = part_of(length, segment, segments)
    return s, segment, h, n, start, first, stop


@triton.jit
def place_of(start, n, begin, C: tl.constexpr):
    """Where the chunk that begins at token `begin` of sequence n has a place of its own (`places` is how many)."""
    return start // C + n + begin // C


@triton.jit
def chunk_of(borders, place, tokens, sequences, C: tl.constexpr, PACKED: tl.constexpr):
    """(n, the first row of sequence n, where in it the chunk at `place` begins, how many tokens it has; none if <= 0).

    Places in order: `place_of`, or one sequence after the other. The last sequence that begins at or before `place` is
    found by halves.
    """
    if PACKED:
        n, end = 0, sequences
        while n + 1 < end:
            middle = (n + end) // 2
            start = tl.minimum(tl.maximum(tl.load(borders + middle), 0), tokens)
            ahead = start // C + middle > place
            end = tl.where(ahead, middle, end)
            n = tl.where(ahead, n, middle)
        start, length = run_of(borders, n, tokens, PACKED)
        begin = (place - start // C - n).to(tl.int32) * C
        count = tl.where(begin < 0, 0, tl.minimum(length - begin, C))
    else:
        chunks = tl.cdiv(tokens, C)
        n = place // chunks
        begin = place % chunks * C
        start = n.to(tl.int64) * tokens
        count = tl.minimum(tokens - begin, C)
    return n, start, begin, count


@triton.jit
def summed(which, x, PART: tl.constexpr):
    """which @ x, of zeros and ones and a float32 in two parts of 16 bits: a scan is shuffles between threads.

    Two float16 keep 2^-22 of a number, within their range; two bfloat16 2^-17 of any.
    """
    which, rough = which.to(PART), x.to(PART)
    rest = tl.dot(which, (x - rough.to(tl.float32)).to(PART), input_precision="ieee")
    return tl.dot(which, rough, rest, input_precision="ieee")


@triton.jit
def ask_ahead(x, stride, rows, ic, N, BN: tl.constexpr):
    """Asks memory for N numbers (of at most BN) in each of some rows from x on: later loads find them in the L2 cache.

    For what a program has no register and no buffer to load yet. `rows`: from 1 to as many as `ic` has.
    """
    if COMPILED:
        LINE: tl.constexpr = 1024 // x.dtype.element_ty.primitive_bitwidth  # of 128 bytes
        LINES: tl.constexpr = BN // LINE if BN > LINE else 1
        column = tl.minimum(tl.arange(0, LINES) * LINE, N - 1)
        at = tl.minimum(ic, rows - 1)[:, None] * stride + column[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [x + at], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def sums_of(
    g, sums, line, t, h, inside, ic, count, last, count_rows, C: tl.constexpr, GATE: tl.constexpr, EXACT: tl.constexpr,
    LATE: tl.constexpr = False,
):  # fmt: skip
    """(hi, lo, after, total) of a chunk: b = hi + lo the running sum of its gates, after = b_C - b, total = b_C.

    In units of log 2, so that exp2 follows. `last` is the chunk's last token; those beyond it are given b_C. LATE: one
    load waits for the other, and so is not asked for before its turn, nor has it a buffer: for loops that have no room.
    """
    if GATE == 1:
        slope = tl.maximum(tl.load(g + h), FLOOR, propagate_nan=tl.PropagateNan.ALL) * LOG2_E
        total = slope * count
        hi = slope * (ic + 1)
        lo = hi * 0.0
        after = slope * tl.maximum(count - 1 - ic, 0)
    else:
        total = tl.load(sums + line + last)
        if LATE:
            hi = tl.load(sums + line + t, mask=inside, other=total)
        else:
            hi = tl.where(inside, tl.load(sums + line + t, mask=inside, other=0.0), total)
        after = total - hi
        lo = hi * 0.0
        if EXACT:
            total_lo = tl.load(sums + count_rows + line + last)
            lo = tl.where(inside, tl.load(sums + count_rows + line + t, mask=inside, other=0.0), total_lo)
            after += total_lo - lo
    return hi, lo, after, total


@triton.jit
def decays_of(hi, lo, g, h, ic, GATE: tl.constexpr, EXACT: tl.constexpr, REVERSE: tl.constexpr):
    """e^{b_i - b_j} where j <= i, else 0; backwards e^{b_j - b_i} where j >= i."""
    if GATE == 1:
        slope = tl.maximum(tl.load(g + h), FLOOR, propagate_nan=tl.PropagateNan.ALL) * LOG2_E
        exponent = (ic[:, None] - ic[None, :]) * (-slope if REVERSE else slope)
    elif REVERSE:
        exponent = hi[None, :] - hi[:, None]
        if EXACT:
            exponent += lo[None, :] - lo[:, None]
    else:
        exponent = hi[:, None] - hi[None, :]
        if EXACT:
            exponent += lo[:, None] - lo[None, :]
    before = (ic[:, None] <= ic[None, :]) if REVERSE else (ic[:, None] >= ic[None, :])
    return power_of_2(tl.where(before, exponent, -float("inf")), EXACT)


@triton.jit(do_not_specialize=["tokens", "heads", "parts", "count_rows"])
def decay_sums(
    g, borders, sums, tokens, heads, parts, count_rows,
    C: tl.constexpr, BH: tl.constexpr, BLOCKS: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Running sums of a gate of one number a token within every chunk, in units of log 2; with EXACT as hi and lo.

    Reads and writes one float32 a token and head: 1/32 U at d = 128. Every sweep reads them; without this kernel each
    slice of each sweep would repeat the scan, in the middle of its chain of chunks.
    """
    pid = tl.program_id(0)
    part = pid % parts
    ih = (pid // parts) % BLOCKS * BH + tl.arange(0, BH)
    start, length = run_of(borders, pid // parts // BLOCKS, tokens, PACKED)
    first, stop = part_of(length, part, parts)
    for i in range(0, tl.cdiv(stop - first, C)):
        t = first + i * C + tl.arange(0, C)
        at = (start + t)[:, None] * heads + ih[None, :]
        to = ih.to(tl.int64)[None, :] * (count_rows // heads) + (start + t)[:, None]
        inside = (t < stop)[:, None] & (ih < heads)[None, :]
        each = tl.maximum(tl.load(g + at, mask=inside, other=0.0), FLOOR, propagate_nan=tl.PropagateNan.ALL)
        if EXACT:
            b = tl.cumsum(each.to(tl.float64) * LOG2_E, 0)
            hi = b.to(tl.float32)
            tl.store(sums + count_rows + to, (b - hi.to(tl.float64)).to(tl.float32), mask=inside)
        else:
            hi = tl.cumsum(each * LOG2_E, 0)
        tl.store(sums + to, hi, mask=inside)


@triton.jit
def fades_little(g, sums, line, h, first, stop, C: tl.constexpr, GATE: tl.constexpr, LEAST: tl.constexpr):
    """Whether every chunk of tokens [first, stop) leaves more than 2^LEAST of what it got."""
    if GATE == 1:
        strong = tl.where(tl.load(g + h) * LOG2_E * C > LEAST, 0, 1)
    else:
        strong = 0
        for i in range(0, tl.cdiv(stop - first, C * 32)):
            last = tl.minimum(first + (i * 32 + tl.arange(0, 32)) * C + C, stop) - 1
            strong += tl.sum(tl.where(tl.load(sums + line + last) > LEAST, 0, 1), 0)  # what is no number counts
    return strong == 0


@triton.jit
def swept(
    S, N, x, y, z, w, g, sums, out, part, side,
    start, first, stop, line, h, heads, count_rows, ix, iz, s, second, least,
    X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, PART: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr, SIDE: tl.constexpr, MILD: tl.constexpr,
):  # fmt: skip
    """The chunks of `decay_sweep`, one after the other: S and N after the last. MILD: as the head of this file says."""
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    chunks = tl.cdiv(stop - first, C)
    carried = 0.0  # half of what the chunk before faded
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C if REVERSE else first + i * C
        t = begin + ic
        inside = t < stop
        row = (start + begin) * heads + h  # 64 bits for where a chunk begins, 32 within it
        in_rows_x = inside[:, None] & in_x[None, :]
        in_rows_z = inside[:, None] & in_z[None, :]
        bx = tl.load(x + row * X + at_x, mask=in_rows_x, other=0.0)
        by = tl.load(y + row * X + at_x, mask=in_rows_x, other=0.0)
        bz = tl.load(z + row * Z + at_z, mask=in_rows_z, other=0.0)
        # what feeds no dot is not pipelined: asked for before the dots, it arrives during them
        if PART:
            bw = tl.load(w + row * Z + at_z, mask=in_rows_z & (not second), other=0.0)
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, lo, after, total = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
            )

        if SIDE > 1:
            more = tl.load(side + row + ic * heads, mask=inside, other=0.0)

        if MILD:
            half = total * 0.5
            S = S * power_of_2(carried + half, EXACT)
            carried = half
        seen = tl.dot(bx, S.to(bx.dtype), input_precision=PRECISION)
        scores = tl.dot(bx, tl.trans(by), input_precision=PRECISION)
        if SIDE == 2:
            scores += more[:, None]
            seen += more[:, None] * N[None, :]
            N += tl.sum(bz.to(tl.float32), 0)
        if SIDE == 3:
            scores += more[None, :]
            seen += N[None, :]
            N += tl.sum(bz.to(tl.float32) * more[:, None], 0)
        written = bz
        if (GATE == 0) or MILD:
            before = (ic[:, None] <= ic[None, :]) if REVERSE else (ic[:, None] >= ic[None, :])
            scores = tl.where(before, scores, 0.0)
            if MILD:
                fading = half - hi if REVERSE else hi - half
                written = (bz.to(tl.float32) * power_of_2(-fading, EXACT)[:, None]).to(bz.dtype)
        else:
            reading, writing = power_of_2(hi, EXACT), power_of_2(after, EXACT)
            if REVERSE:
                reading, writing = writing, reading
            scores = scores * decays_of(hi, lo, g, h, ic, GATE, EXACT, REVERSE)
            seen = seen * reading[:, None]
            written = (bz.to(tl.float32) * writing[:, None]).to(bz.dtype)
            S = S * power_of_2(total, EXACT)
        if PART and EXACT:  # the token's own term cancels in dg: add it to out after the sum
            diagonal = ic[:, None] == ic[None, :]
            own = tl.sum(tl.where(diagonal, scores, 0.0), 1)
            scores = tl.where(diagonal, 0.0, scores)
        if SIDE == 2 and not EXACT:  # what a row of pairs loses goes with the token's own key
            lost = tl.sum(scores - scores.to(bz.dtype).to(tl.float32), 1)
            seen += lost[:, None] * bz.to(tl.float32)
        o = tl.dot(scores.to(bz.dtype), written if MILD else bz, seen, input_precision=PRECISION)
        if MILD:
            fade = power_of_2(fading, EXACT)[:, None]
        if PART:
            weight = bw.to(tl.float32)
            if MILD:  # w', which is `written` in the other sweep
                weight = (weight * fade).to(bz.dtype).to(tl.float32)
            tl.store(part + line + t, tl.sum(o * weight, 1), mask=inside & (not second))
            if EXACT:  # then nothing is MILD, and what is added here does not fade
                o += own[:, None] * bz.to(tl.float32)
        if MILD:
            o = o * fade
        S = tl.dot(tl.trans(by), written, S, input_precision=PRECISION)
        if SIDE == 1:
            weights = tl.sum(scores.to(bz.dtype).to(tl.float32), 1) + tl.sum(bx.to(tl.float32) * N[None, :], 1)
            N += tl.sum(by.to(tl.float32), 0)
            tl.store(side + row + ic * heads, weights, mask=inside & (s == 0))
            o = o / (weights + least)[:, None]
        tl.store(out + row * Z + at_z, o, mask=in_rows_z)
    if MILD:
        S = S * power_of_2(carried, EXACT)
    return S, N


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count_rows"])
def decay_sweep(
    x, y, z, w, g, sums, borders, entry, out, end, part, x2, out2, side, side_entry, side_end,
    tokens, heads, segments, slots, count_rows, least,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    SX: tl.constexpr, SZ: tl.constexpr, GATE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr,
    ENTRY: tl.constexpr, END: tl.constexpr, PART: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    PAIR: tl.constexpr, SIDE: tl.constexpr, SIDE_ENTRY: tl.constexpr, SIDE_END: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """One slice of `out` over one segment of one head of one sequence; with PART also Σ_z w·out.

    Reads x and y (X columns), its slice of z (and w), the gates; writes its slice of out. Products a chunk:
    C·C·X + C·C·BZ + 2·C·X·BZ multiply-adds. State X × BZ float32 in registers: 64 a thread at 128 × 64 and 4 warps.
    With PAIR (K = V) every second program makes dv where its neighbour makes dk, from the same q and do: a chain of
    chunks waits more than it computes, and two on one multiprocessor fill each other's gaps.
    With SIDE (no gates) one column more, of which the other side's are ones: of z, whose output, a sum of weights, is
    left in `side` and divides `out` (1); of x (2) or of y (3), which is in `side`. Its own state is a row or column
    N beside S: from `side_entry`, and at the end to `side_end`.
    """
    pid = tl.program_id(0)
    second = False
    if PAIR:
        second = pid % 2 == 1
        pid = pid // 2
        if second:
            swap = y
            x, y, z, out = x2, z, swap, out2
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)
    line = h.to(tl.int64) * (count_rows // heads) + start  # of sums and parts: h (b t)

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    in_x, in_z = ix < X, iz < Z
    cell = ix[:, None] * SX + iz[None, :] * SZ
    if PAIR:
        cell = tl.where(second, ix[:, None] * SZ + iz[None, :] * SX, cell)
    in_cell = in_x[:, None] & in_z[None, :]
    nh = (n * heads + h).to(tl.int64)
    if ENTRY:
        S = tl.load(entry + (nh * slots + segment) * X * Z + cell, mask=in_cell, other=0.0)
    else:
        S = tl.zeros((BX, BZ), tl.float32)
    N = tl.zeros((1,), tl.float32)
    if SIDE != 0:
        WIDTH: tl.constexpr = X if SIDE == 1 else Z
        if SIDE == 1:
            side_at = ix
        else:
            side_at = iz
        N = tl.zeros(side_at.shape, tl.float32)
        if SIDE_ENTRY:
            N = tl.load(side_entry + (nh * slots + segment) * WIDTH + side_at, mask=side_at < WIDTH, other=0.0)

    if PART:
        part += s.to(tl.int64) * count_rows
    if (GATE == 0) or (LEAST == 0):
        S, N = swept(
            S, N, x, y, z, w, g, sums, out, part, side,
            start, first, stop, line, h, heads, count_rows, ix, iz, s, second, least,
            X, Z, C, GATE, REVERSE, PART, EXACT, PRECISION, SIDE, False,
        )  # fmt: skip
    elif fades_little(g, sums, line, h, first, stop, C, GATE, LEAST):
        S, N = swept(
            S, N, x, y, z, w, g, sums, out, part, side,
            start, first, stop, line, h, heads, count_rows, ix, iz, s, second, least,
            X, Z, C, GATE, REVERSE, PART, EXACT, PRECISION, SIDE, True,
        )  # fmt: skip
    else:
        S, N = swept(
            S, N, x, y, z, w, g, sums, out, part, side,
            start, first, stop, line, h, heads, count_rows, ix, iz, s, second, least,
            X, Z, C, GATE, REVERSE, PART, EXACT, PRECISION, SIDE, False,
        )  # fmt: skip

    if END:
        tl.store(end + nh * X * Z + cell, S, mask=in_cell & second if PAIR else in_cell)
    if SIDE_END:
        mine = (side_at < WIDTH) & (s == 0) if SIDE == 1 else side_at < WIDTH
        tl.store(side_end + nh * WIDTH + side_at, N, mask=mine)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "count_rows"])
def decay_span(
    y, z, g, sums, borders, states, totals,
    tokens, heads, segments, count_rows,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment does to a memory, M -> e^total M + S: S = Σ_j e^{gates after j} y_jᵀ z_j (backwards: before j).

    The state update of `decay_sweep` and nothing else: reads y and z once more (2 U), C·X·BZ multiply-adds a chunk.
    S goes to the slot that `decay_fold` turns into the memory behind this segment.
    """
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)
    line = h.to(tl.int64) * (count_rows // heads) + start  # of sums and parts: h (b t)

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    S = tl.zeros((BX, BZ), tl.float32)
    sum_of_totals = 0.0
    chunks = tl.cdiv(stop - first, C)
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C if REVERSE else first + i * C
        t = begin + ic
        inside = t < stop
        rows = (start + t) * heads + h
        by = tl.load(y + rows[:, None] * X + ix[None, :], mask=inside[:, None] & in_x[None, :], other=0.0)
        bz = tl.load(z + rows[:, None] * Z + iz[None, :], mask=inside[:, None] & in_z[None, :], other=0.0)
        if GATE != 0:
            count = tl.minimum(stop - begin, C)
            hi, _, after, total = sums_of(
                g, sums, line, t, h, inside, ic, count, begin + count - 1, count_rows, C, GATE, EXACT
            )
            writing = power_of_2(hi if REVERSE else after, EXACT)
            bz = (bz.to(tl.float32) * writing[:, None]).to(bz.dtype)
            S = S * power_of_2(total, EXACT)
            sum_of_totals += total
        S = tl.dot(tl.trans(by), bz, S, input_precision=PRECISION)

    nh = (n * heads + h).to(tl.int64)
    slot = segment if REVERSE else segment + 1
    cell = ix[:, None] * Z + iz[None, :]
    tl.store(states + (nh * (segments + 1) + slot) * X * Z + cell, S, mask=in_x[:, None] & in_z[None, :])
    if GATE != 0:
        tl.store(totals + nh * segments + segment, sum_of_totals, mask=s == 0)


@triton.jit(do_not_specialize=["segments"])
def decay_fold(
    states, totals, first, last, segments,
    CELLS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
    GATE: tl.constexpr, REVERSE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The memories before every segment and after the last (backwards: their cotangents), in place of what the
    segments wrote: M_0 = first, M_{s+1} = e^{total_s} M_s + S_s. Reads and writes `states` once."""
    pid = tl.program_id(0)
    nh = (pid // BLOCKS).to(tl.int64)
    cell = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < CELLS
    states += nh * (segments + 1) * CELLS
    if FIRST:
        M = tl.load(first + nh * CELLS + cell, mask=inside, other=0.0)
    else:
        M = tl.zeros((BLOCK,), tl.float32)
    if REVERSE:
        tl.store(states + segments * CELLS + cell, M, mask=inside)
    else:
        tl.store(states + cell, M, mask=inside)
    for i in range(0, segments):
        if REVERSE:
            segment = segments - 1 - i
            slot = states + segment * CELLS + cell
        else:
            segment = i
            slot = states + (i + 1) * CELLS + cell
        if GATE != 0:
            M = M * power_of_2(tl.load(totals + nh * segments + segment), True)
        M += tl.load(slot, mask=inside, other=0.0)
        tl.store(slot, M, mask=inside)
    tl.store(last + nh * CELLS + cell, M, mask=inside)


@triton.jit(do_not_specialize=["tokens", "heads", "segments"])
def decay_counts(
    y, weights, borders, counts, tokens, heads, segments,
    X: tl.constexpr, BX: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr,
    WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Σ_t y_t over each segment, with WEIGHTED Σ_t weights_t y_t: what it does to N. Reads y (1 U)."""
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)
    ix = s * BX + tl.arange(0, BX)
    ic = tl.arange(0, C)
    N = tl.zeros((BX,), tl.float32)
    for i in range(0, tl.cdiv(stop - first, C)):
        t = first + i * C + ic
        row = (start + t) * heads + h
        inside = t < stop
        by = tl.load(y + row[:, None] * X + ix[None, :], mask=inside[:, None] & (ix < X)[None, :], other=0.0)
        by = by.to(tl.float32)
        if WEIGHTED:
            by *= tl.load(weights + row, mask=inside, other=0.0)[:, None]
        N += tl.sum(by, 0)
    tl.store(counts + ((n * heads + h) * segments + segment).to(tl.int64) * X + ix, N, mask=ix < X)


@triton.jit
def through_quotient(do, o, by):
    """Back through o = x / by, rows by their own numbers: dx in do's dtype, and of this dx dby = -Σ_v dx o."""
    dx = (do.to(tl.float32) / by[:, None]).to(do.dtype)
    return dx, -tl.sum(dx.to(tl.float32) * o.to(tl.float32), 1)


@triton.jit(do_not_specialize=["rows"])
def decay_quotient(
    do, o, weights, dx, dweights, rows, least, V: tl.constexpr, BV: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """Back through o = x / (weights + least). Reads do and o, writes dx: 3 U."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    iv = tl.arange(0, BV)
    at = row[:, None] * V + iv[None, :]
    ok = (row < rows)[:, None] & (iv < V)[None, :]
    by = tl.load(weights + row, mask=row < rows, other=1.0) + least
    bdo = tl.load(do + at, mask=ok, other=0.0)
    down, change = through_quotient(bdo, tl.load(o + at, mask=ok, other=0.0), by)
    tl.store(dx + at, down, mask=ok)
    tl.store(dweights + row, change, mask=row < rows)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count_rows"])
def decay_dg(
    asked, answered, g, borders, memory, cotangent, dg,
    tokens, heads, segments, slots, count_rows,
    QS: tl.constexpr, KS: tl.constexpr, CELLS: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
    PACKED: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    """dg_t = Σ_{s >= t} (q_s·dq_s - k_s·dk_s) + <M_end, dM_end>, the sum within a segment, M_end at the segment's end.

    Every segment starts from its own exact end, so errors of 16-bit products add up over a segment and no further.
    Where e^g is 0 the gradient is 0, and is set to it. Reads slices × 2 float32 a token and head, writes one.
    """
    pid = tl.program_id(0)
    _, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, 1, PACKED)

    nh = (n * heads + h).to(tl.int64)
    later = tl.zeros((), tl.float64)
    if ENDS:
        for i in range(0, CELLS, PART):
            cell = i + tl.arange(0, PART)
            at = (nh * slots + segment) * CELLS + cell
            M = tl.load(memory + at, mask=cell < CELLS, other=0.0)
            D = tl.load(cotangent + at, mask=cell < CELLS, other=0.0)
            later += tl.sum((M * D).to(tl.float64), 0)
    for i in range(0, tl.cdiv(stop - first, BLOCK)):
        t = stop - (i + 1) * BLOCK + tl.arange(0, BLOCK)
        inside = t >= first
        rows = (start + t) * heads + h
        line = h.to(tl.int64) * (count_rows // heads) + start + t
        change = tl.zeros((BLOCK,), tl.float32)
        for s in tl.static_range(QS):
            change += tl.load(asked + s * count_rows + line, mask=inside, other=0.0)
        for s in tl.static_range(KS):
            change -= tl.load(answered + s * count_rows + line, mask=inside, other=0.0)
        change = change.to(tl.float64)
        value = (later + tl.cumsum(change, 0, reverse=True)).to(tl.float32)
        gate = tl.load(g + rows, mask=inside, other=0.0)
        tl.store(dg + rows, tl.where(gate < -104.0, 0.0, value), mask=inside)
        later += tl.sum(change, 0)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots"])
def decay_slope(
    q, k, v, do, g, borders, entry, cotangent, parts,
    tokens, heads, segments, slots,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    PACKED: tl.constexpr, ENTRY: tl.constexpr, ENDS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of a gate of one number a head, by carrying N_t = dM_t/dg = e^g (N_{t-1} + M_{t-1}) beside M_t:

        dg = Σ_t do_t · q_t N_t + <N_end, dM_end>       N = 0 at a segment's start

    Summing `decay_dg` over tokens instead would weigh rounding errors with up to T. Reads 4 U, writes a number a
    program; two states of K × BV, so half the columns of a sweep. Only for slopes that are learned.
    """
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)

    ik = tl.arange(0, BK)
    iv = s * BV + tl.arange(0, BV)
    ic = tl.arange(0, C)
    in_k, in_v = ik < K, iv < V
    in_cell = in_k[:, None] & in_v[None, :]
    cell = (((n * heads + h).to(tl.int64) * slots + segment) * K + ik[:, None]) * V + iv[None, :]
    if ENTRY:
        S = tl.load(entry + cell, mask=in_cell, other=0.0)
    else:
        S = tl.zeros((BK, BV), tl.float32)
    N = tl.zeros((BK, BV), tl.float32)
    result = tl.zeros((BV,), tl.float32)
    chunks = tl.cdiv(stop - first, C)
    for i in range(0, chunks):
        begin = first + i * C
        t = begin + ic
        inside = t < stop
        rows = (start + t) * heads + h
        at_k = rows[:, None] * K + ik[None, :]
        at_v = rows[:, None] * V + iv[None, :]
        bq = tl.load(q + at_k, mask=inside[:, None] & in_k[None, :], other=0.0)
        bk = tl.load(k + at_k, mask=inside[:, None] & in_k[None, :], other=0.0)
        bv = tl.load(v + at_v, mask=inside[:, None] & in_v[None, :], other=0.0)
        bdo = tl.load(do + at_v, mask=inside[:, None] & in_v[None, :], other=0.0).to(tl.float32)
        count = tl.minimum(stop - begin, C)
        hi, lo, after, total = sums_of(g, g, 0, t, h, inside, ic, count, 0, 0, C, 1, False)
        distance = tl.maximum(ic[:, None] - ic[None, :], 0).to(tl.float32)
        decay = decays_of(hi, lo, g, h, ic, 1, False, False)
        scores = tl.dot(bq, tl.trans(bk), input_precision=PRECISION) * decay * distance
        age = (ic + 1).to(tl.float32)
        o = tl.dot(bq, N.to(bq.dtype), input_precision=PRECISION)
        o += tl.dot(bq, S.to(bq.dtype), input_precision=PRECISION) * age[:, None]
        o = tl.dot(scores.to(bv.dtype), bv, o * tl.exp2(hi)[:, None], input_precision=PRECISION)
        result += tl.sum(o * bdo, 0)
        written = bv.to(tl.float32) * tl.exp2(after)[:, None]
        aged = written * tl.maximum(count - 1 - ic, 0).to(tl.float32)[:, None]
        N = (N + S * count.to(tl.float32)) * tl.exp2(total)
        N = tl.dot(tl.trans(bk), aged.to(bv.dtype), N, input_precision=PRECISION)
        S = tl.dot(tl.trans(bk), written.to(bv.dtype), S * tl.exp2(total), input_precision=PRECISION)
    if ENDS:
        result += tl.sum(N * tl.load(cotangent + cell, mask=in_cell, other=0.0), 0)
    tl.store(parts + pid, tl.sum(result, 0))


@triton.jit(do_not_specialize=["heads"])
def decay_step(
    q, k, v, g, memory, o, heads,
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
    if GATE == 1:
        M = M * tl.exp(tl.load(g + row % heads))
    if GATE == 2:
        M = M * tl.exp(tl.load(g + row))
    M = M + bk[:, None] * bv[None, :]
    tl.store(cell, M, mask=in_cell)
    tl.store(o + row * V + iv, tl.sum(bq[:, None] * M, 0), mask=in_v)


# ------------------------------------------------------------------------------------------------ the launchers
# Tensors are contiguous, K and V multiples of 16, gates and memories float32. `g` is None | h | b t h.


INTERPRETED = not isinstance(decay_sweep, triton.JITFunction)  # TRITON_INTERPRET=1: the kernels run on CPU tensors
COMPILED = tl.constexpr(not INTERPRETED)
KNOWN: dict[tuple, tuple] = {}  # compiled kernels, by all that they depend on


def launch(kernel, programs: int, *args, **meta) -> None:
    """The one way into a kernel: a grid of `programs`, on the device of the first tensor."""
    if programs == 0:
        return
    if not args[0].is_cuda:
        kernel[(programs,)](*args, **meta)
        return
    device = args[0].get_device()
    if device == torch.cuda.current_device():
        launch_here(device, kernel, programs, args, meta)
    else:
        with torch.cuda.device(device):
            launch_here(device, kernel, programs, args, meta)


def launch_here(device: int, kernel, programs: int, args: tuple, meta: dict) -> None:
    """Triton finds out at every launch which compiled kernel it is, in Python, which for short sequences takes longer
    than the kernels. Here it is asked once for each kind of arguments: what it distinguishes (and more, such as numbers
    that it was told not to look at) is the key. (A kernel's own hash takes a lock. Its id is its own while it is kept.)
    """
    key = (device, id(kernel), *specialized(args), *meta, *meta.values())
    known = KNOWN.get(key)
    if known is None:
        compiled = kernel[(programs,)](*args, **meta)
        KNOWN[key] = kernel, compiled, tuple(meta[name] for name in kernel.arg_names[len(args) :])
        return
    _, compiled, constants = known
    if watched():
        compiled[programs, 1, 1](*args, *constants)
    else:  # the same without what hooks would be told
        stream = torch._C._cuda_getCurrentRawStream(device)
        named = stream, compiled.function, compiled.packed_metadata
        compiled.run(programs, 1, 1, *named, None, None, None, *args, *constants)


def watched() -> bool:
    """Whether anybody, such as a profiler, is called at every launch: Triton has chains of hooks, or one, or None."""
    before, after = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return bool(getattr(before, "calls", before) or getattr(after, "calls", after))


def specialized(args: tuple[Tensor | float | None, ...]) -> list:
    """All of the arguments that a compiled kernel may depend on."""
    return [
        None if x is None else (x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else kind_of_number(x)
        for x in args
    ]


@functools.lru_cache(maxsize=4096, typed=True)
def kind_of_number(x: float) -> tuple:
    return type(x), x == 1, x % 16 == 0, -(2**31) <= x < 2**31


def gate(g: Tensor | None) -> int:
    return NONE if g is None else HEAD if g.ndim == 1 else TOKEN


def cdiv(a: int, b: int) -> int:
    """⌈a / b⌉. As the next, what Triton has too, and takes ten times as long for."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def padded(size: int) -> int:
    return 16 if size <= 16 else 1 << (size - 1).bit_length()


COUNTED: dict[int | None, int] = {}  # multiprocessors of GPUs by number: to be told takes as long as a launch


def multiprocessors(device: torch.device) -> int:
    if device.index not in COUNTED:
        cuda = device.type == "cuda"
        COUNTED[device.index] = torch.cuda.get_device_properties(device).multi_processor_count if cuda else 1
    return COUNTED[device.index]


def segments_for(q: Tensor, v: Tensor, sequences: int) -> int:
    """In how many segments to cut each sequence: 64 columns a multiprocessor, and at least 512 tokens a segment."""
    columns = tile_of(q.shape[-1], q.element_size())[0]
    programs = sequences * q.shape[2] * cdiv(v.shape[-1], columns)
    return long_enough(multiprocessors(q.device) * 64 // columns // max(programs, 1), q, sequences)


def long_enough(segments: int, x: Tensor, sequences: int) -> int:
    """So many segments of each sequence, or fewer: a segment has at least 512 tokens."""
    return max(1, min(segments, x.shape[0] * x.shape[1] // max(sequences, 1) // 512))


def tile_of(size: int, width: int, pair: bool = False) -> tuple[int, int, int]:
    key = padded(size), width
    return PAIRED[key] if pair else CONFIG[key]


def shape_of(x: Tensor, z: Tensor, g: Tensor | None, borders: Tensor | None, pair: bool = False) -> dict:
    """The compile-time arguments of a sweep or span whose state is x's columns × z's columns."""
    return shape_by_numbers(x.shape[-1], z.shape[-1], x.element_size(), gate(g), borders is not None, pair)


@functools.cache  # as everywhere in these files: what few numbers decide is worked out once, since every launch asks
def shape_by_numbers(X: int, Z: int, width: int, kind: int, packed: bool, pair: bool) -> dict:
    columns, warps, stages = tile_of(X, width, pair)
    columns = min(columns, padded(Z))
    sizes = {"X": X, "Z": Z, "BX": padded(X), "BZ": columns, "SLICES": cdiv(Z, columns), "C": CHUNK[width]}
    kinds = {"GATE": kind, "PACKED": packed, "EXACT": width == 4, "PRECISION": "ieee"}
    return {**sizes, **kinds, "num_warps": warps, "num_stages": stages}


def sequences_of(x: Tensor, borders: Tensor | None) -> int:
    return x.shape[0] if borders is None else len(borders) - 1


def places(x: Tensor, borders: Tensor | None, chunk: int) -> int:
    """How many places the chunks of all sequences need: `place_of`."""
    return x.shape[0] * x.shape[1] // chunk + sequences_of(x, borders)


def chunks_of(x: Tensor, borders: Tensor | None, chunk: int) -> int:
    """How many chunks all sequences have, for `chunk_of`; where documents share a row, as many as there can be."""
    return x.shape[0] * cdiv(x.shape[1], chunk) if borders is None else places(x, borders, chunk)


def rows_of(x: Tensor) -> int:
    return x.shape[0] * x.shape[1] * x.shape[2]


def sums_in_chunks(g: Tensor | None, borders: Tensor | None, like: Tensor, chunk: int | None = None) -> Tensor | None:
    """`decay_sums` for the tokens' dtype: (1 or 2) h (b t), or None if the gate is not one number a token. In chunks of
    this family, if no other size is given."""
    if gate(g) != TOKEN:
        return None
    b, t, h = g.shape
    exact = like.element_size() == 4
    sums = g.new_empty(1 + exact, h, b * t)
    n, block = sequences_of(g, borders), min(16, next_power_of_2(h))
    parts, blocks = cdiv(t, 64 if borders is None else 256), cdiv(h, block)  # documents share tokens
    launch(
        decay_sums, n * blocks * parts, g, borders, sums, t, h, parts, b * t * h,
        C=chunk or CHUNK[like.element_size()], BH=block, BLOCKS=blocks, PACKED=borders is not None, EXACT=exact,
    )  # fmt: skip
    return sums


def sweep(
    x, y, z, g, sums, borders, entry=None, *, slots=1, segments=1, reverse=False, swapped=False, end=None, weight=None,
    wide=False, pair=None, side=0, sides=(None, None, None), least=0.0,
) -> tuple:  # fmt: skip
    """`decay_sweep`: (out, part). `swapped`: the state lies transposed in `entry`. `end` receives the last state.

    `pair`: the x of a second sweep with y and z exchanged, whose output comes as a third result. `sides`: what the
    kernel has for SIDE.
    """
    shape, (b, t, h, X) = shape_of(x, z, g, borders, pair is not None), x.shape
    out = torch.empty_like(z, dtype=torch.float32 if wide else z.dtype)
    second = None if pair is None else torch.empty_like(y)
    part = None if weight is None else z.new_empty(shape["SLICES"], h, b * t, dtype=torch.float32)
    programs = shape["SLICES"] * segments * h * sequences_of(x, borders) * (1 if pair is None else 2)
    SX, SZ = (1, X) if swapped else (shape["Z"], 1)
    launch(
        decay_sweep, programs, x, y, z, weight, g, sums, borders, entry, out, end, part, pair, second, *sides,
        t, h, segments, slots, b * t * h, least,
        **shape, SX=SX, SZ=SZ, REVERSE=reverse, ENTRY=entry is not None, END=end is not None, PART=part is not None,
        PAIR=pair is not None, SIDE=side, SIDE_ENTRY=sides[1] is not None,
        SIDE_END=sides[2] is not None, LEAST=LITTLE.get(x.dtype, 0),
    )  # fmt: skip
    return (out, part) if pair is None else (out, part, second)


def between(y, z, g, sums, borders, first, segments, reverse=False) -> tuple[Tensor, Tensor]:
    """The memories between segments (n h segments+1 K V) and the one at the far end (n h K V), from `first`."""
    n, h, cells = sequences_of(y, borders), y.shape[2], y.shape[-1] * z.shape[-1]
    states = y.new_empty(n, h, segments + 1, y.shape[-1], z.shape[-1], dtype=torch.float32)
    totals = y.new_empty(n, h, segments, dtype=torch.float32)
    last = torch.empty_like(states[:, :, 0])
    shape = shape_of(y, z, g, borders)
    programs = shape["SLICES"] * segments * h * n
    launch(
        decay_span, programs, y, z, g, sums, borders, states, totals, y.shape[1], h, segments, rows_of(y),
        **shape, REVERSE=reverse,
    )  # fmt: skip
    block = min(1024, next_power_of_2(cells))
    blocks = cdiv(cells, block)
    launch(
        decay_fold, n * h * blocks, states, totals, first, last, segments,
        CELLS=cells, BLOCK=block, BLOCKS=blocks, GATE=gate(g), REVERSE=reverse, FIRST=first is not None,
    )  # fmt: skip
    return states, last


def end(y, z, g, borders, segments: int, reverse: bool) -> Tensor:
    """What tokens leave of an empty memory, y and z their k and v; or reverse, y and z their q and do, what the memory
    before them receives. Nothing is computed for each token."""
    return between(y, z, g, sums_in_chunks(g, borders, y), borders, None, segments, reverse)[1]


def forward(q, k, v, g, memory, borders, segments: int, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments: nothing when there is one segment). `wide`: o in float32."""
    sums = sums_in_chunks(g, borders, q)
    if segments > 1:
        states, last = between(k, v, g, sums, borders, memory, segments)
        o, _ = sweep(q, k, v, g, sums, borders, states, slots=segments + 1, segments=segments, wide=wide)
        return o, last, states
    n = sequences_of(q, borders)
    last = q.new_empty(n, q.shape[2], q.shape[-1], v.shape[-1], dtype=torch.float32)
    o, _ = sweep(q, k, v, g, sums, borders, memory, end=last, wide=wide)
    return o, last, last.new_empty(0)


def backward(do, dlast, q, k, v, g, memory, borders, last, states, want_g: bool):
    """(dq, dk, dv, dg or None, dmemory) from the cotangents of o and of the last memory (None: zeros)."""
    cut, sums = states.numel() > 0, sums_in_chunks(g, borders, q)
    segments = states.shape[2] - 1 if cut else 1
    run = {"segments": segments, "slots": segments + 1 if cut else 1}
    if cut:
        cotangents, dmemory = between(q, do, g, sums, borders, dlast, segments, reverse=True)
        before, after, end = states, cotangents[:, :, 1:], None
    else:
        dmemory = torch.empty_like(last)
        before, after, end = memory, dlast, dmemory
    each = want_g and g.ndim == 3
    dq, asked = sweep(do, v, k, g, sums, borders, before, swapped=True, weight=q if each else None, **run)
    run |= {"reverse": True}
    weight = k if each else None
    if q.shape == v.shape and gate(g) == TOKEN and (padded(q.shape[-1]), q.element_size()) in PAIRED:
        ends = {"end": end, "pair": k}
        dk, answered, dv = sweep(v, do, q, g, sums, borders, after, swapped=True, weight=weight, **ends, **run)
    else:
        dk, answered = sweep(v, do, q, g, sums, borders, after, swapped=True, weight=weight, **run)
        dv, _ = sweep(k, q, do, g, sums, borders, after, end=end, **run)
    dg = None
    if each:
        ends = (states[:, :, 1:], after) if cut else (last, dlast)
        dg = gate_gradient(asked, answered, g, borders, *ends, q, v, run["segments"], run["slots"])
    elif want_g:
        dg = slope_gradient(q, k, v, do, g, borders, before, after, run["segments"], run["slots"])
    return dq, dk, dv, dg, dmemory


def counts_between(y, weights, borders, first, segments, reverse=False) -> tuple[Tensor, Tensor]:
    """N between segments (n h segments+1 X) and at the far end (n h X), from `first` (None: zeros): `decay_counts`,
    and sums of what few numbers it leaves."""
    n, h, X = sequences_of(y, borders), y.shape[2], y.shape[-1]
    counts = y.new_empty(n, h, segments, X, dtype=torch.float32)
    slices = cdiv(X, 16)
    launch(
        decay_counts, slices * n * h * segments, y, weights, borders, counts, y.shape[1], h, segments,
        X=X, BX=16, SLICES=slices, C=256, PACKED=borders is not None, WEIGHTED=weights is not None,
    )  # fmt: skip
    first = counts.new_zeros(n, h, X) if first is None else first
    counts = torch.cat([counts, first[:, :, None]] if reverse else [first[:, :, None], counts], 2)
    counts = counts.flip(2).cumsum(2).flip(2) if reverse else counts.cumsum(2)
    return counts.contiguous(), counts[:, :, 0 if reverse else -1].contiguous()


def ratio(q, k, v, memory, count, borders, segments: int, least: float) -> tuple[Tensor, ...]:
    """(o, the last memory, the last N, the weights' sums b t h, memories and Ns between segments) of a memory that does
    not fade: o_t = q_t M_t / (q_t N_t + least), N_t = N_{t-1} + k_t."""
    n, h, K, V = sequences_of(q, borders), *q.shape[2:], v.shape[-1]
    weights = q.new_empty(q.shape[:3], dtype=torch.float32)
    if segments > 1:
        states, last = between(k, v, None, None, borders, memory, segments)
        counts, total = counts_between(k, None, borders, count, segments)
        run = {"slots": segments + 1, "segments": segments}
        entry, sides = states, (weights, counts, None)
    else:
        last, total = weights.new_empty(n, h, K, V), weights.new_empty(n, h, K)
        states, counts = last.new_empty(0), last.new_empty(0)
        run, entry, sides = {"end": last}, memory, (weights, count, total)
    o, _ = sweep(q, k, v, None, None, borders, entry, side=1, sides=sides, least=least, **run)
    return o, last, total, weights, states, counts


def rows_at_once(columns: int) -> int:
    """How many rows of so many columns a program of elementwise kernels has."""
    return max(1, 4096 // padded(columns))


def ratio_gradients(
    do, dlast, dtotal, q, k, v, memory, count, borders, o, weights, states, counts, least: float
) -> tuple[Tensor, ...]:
    """(dq, dk, dv, dmemory, dcount) from the cotangents of o, of the last memory and the last N (None: zeros)."""
    n, h, K, V = sequences_of(q, borders), *q.shape[2:], v.shape[-1]
    cut = states.numel() > 0
    segments = states.shape[2] - 1 if cut else 1
    run = {"segments": segments, "slots": segments + 1 if cut else 1}
    dx, dweights, rows = torch.empty_like(do), torch.empty_like(weights), rows_at_once(V)
    launch(
        decay_quotient, cdiv(rows_of(q), rows), do, o, weights, dx, dweights, rows_of(q), least,
        V=V, BV=padded(V), N=rows,
    )  # fmt: skip
    if cut:
        cotangents, dmemory = between(q, dx, None, None, borders, dlast, segments, reverse=True)
        later, dcount = counts_between(q, dweights, borders, dtotal, segments, reverse=True)
        before, after, end = states, cotangents[:, :, 1:], None
        early, late, far = counts, later[:, :, 1:], None
    else:
        dmemory, dcount = weights.new_empty(n, h, K, V), weights.new_empty(n, h, K)
        before, after, end = memory, dlast, dmemory
        early, late, far = count, dtotal, dcount
    dq, _ = sweep(dx, v, k, None, None, borders, before, swapped=True, side=2, sides=(dweights, early, None), **run)
    run |= {"reverse": True}
    dk, _ = sweep(v, dx, q, None, None, borders, after, swapped=True, side=3, sides=(dweights, late, far), **run)
    dv, _ = sweep(k, q, dx, None, None, borders, after, end=end, **run)
    return dq, dk, dv, dmemory, dcount


def gate_gradient(asked, answered, g, borders, memory, cotangent, q, v, segments, slots) -> Tensor:
    """`decay_dg` from the ends of all segments: b t h."""
    b, t, h = g.shape
    dg, cells = asked.new_empty(b, t, h), q.shape[-1] * v.shape[-1]
    launch(
        decay_dg, segments * h * sequences_of(q, borders), asked, answered, g, borders, memory, cotangent, dg,
        t, h, segments, slots, b * t * h,
        QS=asked.shape[0], KS=answered.shape[0], CELLS=cells, PART=min(4096, next_power_of_2(cells)), BLOCK=256,
        PACKED=borders is not None, ENDS=cotangent is not None,
    )  # fmt: skip
    return dg


def slope_gradient(q, k, v, do, g, borders, entry, cotangent, segments, slots) -> Tensor:
    """`decay_slope` summed over sequences, segments and slices: h."""
    shape = shape_of(q, v, g, borders)
    h, V = v.shape[2:]
    slices = cdiv(V, 16)
    parts = v.new_empty(sequences_of(q, borders), h, segments * slices, dtype=torch.float32)
    launch(
        decay_slope, parts.numel(), q, k, v, do, g, borders, entry, cotangent, parts,
        v.shape[1], h, segments, slots,
        K=shape["X"], V=V, BK=shape["BX"], BV=16, SLICES=slices, C=shape["C"], PACKED=borders is not None,
        ENTRY=entry is not None, ENDS=cotangent is not None, PRECISION="ieee",
        num_warps=4, num_stages=2 if q.element_size() == 2 else 1,
    )  # fmt: skip
    return parts.double().sum((0, 2)).float()


def one_token(kernel, given: tuple[Tensor | None, ...], v: Tensor, *sizes: int, **kind) -> Tensor:
    """o : b h V in float32 of a kernel for one token of one head and a slice of V; `given` begins with q : b h K."""
    (b, h, K), V = given[0].shape, v.shape[-1]
    columns = min(32, padded(V))
    o, slices = torch.empty_like(v, dtype=torch.float32), cdiv(V, columns)
    launch(
        kernel, b * h * slices, *given, o, *sizes,
        K=K, V=V, BK=padded(K), BV=columns, SLICES=slices, num_warps=4, **kind,
    )  # fmt: skip
    return o


def step(q, k, v, g, memory) -> Tensor:
    """o : b h V in float32 of one token a sequence, q k : b h K, v : b h V, g : None | h | b h; overwrites memory."""
    kind = NONE if g is None else HEAD if g.ndim == 1 else TOKEN
    return one_token(decay_step, (q, k, v, g, memory), v, q.shape[1], GATE=kind)
