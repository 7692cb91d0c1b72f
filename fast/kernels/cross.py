"""Triton kernels for memories that fade by row and by column, or turn by row: gated fast weights and GateLoop.

    M_t = e^{g_t} M_{t-1} e^{f_t} + k_tᵀ v_t     g a number a row, f (if there is one) a column     o_t = q_t M_t
    M_t = e^{g_t + i θ_t} M_{t-1} + k_tᵀ v_t     complex rows                                       o_t = Re(q_t M_t)

A complex row is two real ones that do not turn. With Θ the sum of θ since the sequence began, M_t = e^{iΘ_t} N_t, and
N fades by e^g alone under q and k that are turned instead: both times [cos Θ, -sin Θ], twice as wide (`turns`). What
comes in and goes out (the first memory, where Θ is 0, the last one and its cotangent) is turned by the launchers.

One kernel, `cross_sweep`, is the output and all three gradients, as in `decay.py`, because all four are the same sweep.
In a block of C = 16 tokens, with a and b the running sums of gates beside x and z (a row of X, a row of Z):

    forwards     out_i = e^{b_i} ((x_i e^{a_i}) S) + Σ_{j<i} A_ij e^{b_i - b_j} z_j
                 S <- e^{a_C} S e^{b_C} + Σ_j (y_j e^{a_C - a_j})ᵀ (z_j e^{b_C - b_j})
    backwards    i and j, and the first and the last token, change places

    output     x = q    y = k    z = v    forwards     the state is M     K × V    A_ij = Σ_c q_ic k_jc e^{G_ic - G_jc}
    dv         x = k    y = q    z = do   backwards   D, cotangent of M  K × V    the same
    dq         x = do   y = v    z = k    forwards     Mᵀ                 V × K    P_ij = Σ_c do_ic v_jc e^{F_ic - F_jc}
    dk         x = v    y = do   z = q    backwards    Dᵀ                 V × K    the same

A program owns a slice of z's columns and streams through time with its slice of the state in registers. What all slices
need is made of all blocks at once (`cross_prepare`): A or P, and x e^a and y e^{a_C - a} in float32, which are those of
dv in the other order.

No exponent is above 0, but in a block whose gates sum to more than -MILD: there pairs of tokens are one product, of
rows e^{b_i} with rows e^{-b_j} z_j, and so is A. In any other block they are weighed element by element. So any g and f
in [-inf, 0] are right and finite (a gate is raised to FLOOR first, as in `decay.py`); for float32 tokens the sums are
float64.

The gates' gradients need no second memory: with D_t the cotangent of M_t, its own read included,

    dg_t = <M_e, D_e> + Σ_{t <= s <= e} (q_s dq_s - k_s dk_s)     by row      df_t: o do - v dv, by column
    dθ_t = <M_e, i D_e> + Σ_{t <= s <= e} (q_s × dq_s + k_s × dk_s)     of turned vectors, a × b = a₁b₀ - a₀b₁

for any later token e: that at the end of a stretch of STRETCH tokens, of which the sweeps for o and dv keep M and D.
So rounding errors add up over a stretch and no further. But even there pairs of tokens on the same side of t are in
both and must cancel: with memories and vectors rounded to 16 bits as in `channel.py` dθ is off by up to 1.8 of the
error budget. So products of bfloat16 tokens are in tf32 (8 times as fine as they are; 0.3 of the budget over 2048
tokens, if tf32 is cut off), those of float16 ones in three such (as fine as float32), and what is summed is float32. A
token's own pair cancels altogether, and is added when the sums have been taken (`cross_gradients`).

Scores of float32 tokens are found PREPARING channels a time and then added: one chain of 256 multiply-adds had up to
1.36 of the error budget on a GPU (0.87 of it since, by the same sums in the interpreter).

Too few programs: segments, as in `decay.py`: what each does to a memory (the same sweep without outputs), the memories
between them (`cross_fold`), then the sweeps from every one of them.

Bytes and operations. In U = one b t h d tensor in 16 bits, K = V = d, gates in float32 (2 U). Gated fast weights,
forward: sums of g and f read 4 and write 4, preparing reads 4 and writes 4, the sweep reads 7 and writes 1, or 3 where
there will be a gradient (o in float32, too): 24 or 26 U, where the floor is 8. Backward: preparing twice 8, dv, dq and
dk read 7 each and write 2, what remains reads 12 and writes 7: 62 U (floor 15). GateLoop, forward: cosines and sines
read 4 and write 4, sums 4, preparing reads 8 and writes 8, the sweep reads 9 and writes 1: 38 U (floor 8); backward 18,
the sweeps 10, 13 and 13, and 20: 74 U (floor 15). Kept for the gradient besides what came: sums 4 U and o 2, or sums
2 U and cosines and sines 4; memories, U or 2 U. Multiply-adds a token and head: a sweep 2·X·Z and C·Z, preparing C·X.
Exponentials: 3·X once, 2·Z a sweep whose z has gates; where blocks are not mild C·X and C·Z more.

Compilers: what `decay.py` says. No operand of a product is a result transposed: y is loaded in columns. With two or
three stages barriers are 10 a block, with one 27; in three two programs fit a multiprocessor up to 128 rows. Compiled
for sm_90 (Triton 3.7.1, tests/hopper.py) sweeps of bfloat16 spill at most 8 bytes a thread up to 128 rows, with 256
about 0.1 KiB; those of float16 and float32 up to 0.4 KiB with 256 rows, and any with 512 (GateLoop with K = 256) up to
2.4 KiB. So does the library's cosine, 32 bytes for angles that do not occur.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay
from fast.kernels.decay import (
    FLOOR,
    LOG2_E,
    cdiv,
    chunk_of,
    chunks_of,
    next_power_of_2,
    padded,
    place_of,
    places,
    plus_product,
    run_of,
    sequences_of,
    stretch_of,
)

BLOCK = 16  # tokens
MILD = 60.0  # exponents of 2 up to which numbers are raised within a block
STRETCH = {2: 256, 4: 64}  # tokens after which sums begin anew by bytes of a number
PRECISION = {torch.bfloat16: "tf32", torch.float16: "tf32x3", torch.float32: "ieee"}
TURN = tl.constexpr(6.283185307179586)

# padded rows of the state, how products are made -> (columns of the output a program, warps, stages)
CONFIG = {
    (16, "tf32"): (32, 2, 2),
    (32, "tf32"): (32, 2, 2),
    (64, "tf32"): (32, 4, 2),
    (128, "tf32"): (32, 4, 3),
    (256, "tf32"): (32, 4, 2),
    (512, "tf32"): (16, 8, 2),
    (16, "tf32x3"): (32, 2, 2),
    (32, "tf32x3"): (32, 2, 2),
    (64, "tf32x3"): (32, 4, 2),
    (128, "tf32x3"): (32, 4, 2),
    (256, "tf32x3"): (16, 8, 2),
    (512, "tf32x3"): (16, 8, 2),
    (16, "ieee"): (32, 4, 1),
    (32, "ieee"): (32, 4, 1),
    (64, "ieee"): (32, 8, 1),
    (128, "ieee"): (16, 8, 1),
    (256, "ieee"): (16, 8, 1),
    (512, "ieee"): (16, 8, 1),
}
PREPARING = 64  # channels a time in `cross_prepare`
FINISHING = 32  # columns a program of `cross_gradients`


@triton.jit
def tile_of(x, turns, row, heads, token, column, ok, W: tl.constexpr, TURNED: tl.constexpr):
    """Some columns of some tokens from that row on, in float32. TURNED: of the W columns twice over, turned."""
    at = column % W if TURNED else column
    found = tl.load(x + row * W + token * (heads * W) + at, mask=ok, other=0.0).to(tl.float32)
    if TURNED:
        found *= tl.load(turns + row * 2 * W + token * (heads * 2 * W) + column, mask=ok, other=0.0)
    return found


@triton.jit
def sums_of(sums, row, heads, token, column, ok, W: tl.constexpr, TURNED: tl.constexpr):
    at = column % W if TURNED else column
    return tl.load(sums + row * W + token * (heads * W) + at, mask=ok, other=0.0)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def cross_sums(
    g, borders, sums, tokens, heads, sequences,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Running sums of gates in each block, to the base 2. Reads g once and writes as much (EXACT: twice)."""
    h = tl.program_id(0) % heads
    _, start, begin, count = chunk_of(borders, tl.program_id(0) // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    ic, ik = tl.arange(0, C), tl.arange(0, BK)
    at = ((start + begin) * heads + h) * K + ic[:, None] * (heads * K) + ik[None, :]
    ok = (ic < count)[:, None] & (ik < K)[None, :]
    gates = tl.maximum(tl.load(g + at, mask=ok, other=0.0), FLOOR, propagate_nan=tl.PropagateNan.ALL)
    if EXACT:
        gates = gates.to(tl.float64)
    tl.store(sums + at, tl.cumsum(gates * LOG2_E, 0), mask=ok)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def cross_turns(
    theta, borders, parts, turns, tokens, heads, sequences,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, STRETCH: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """[cos Θ, -sin Θ] of a stretch; or first, with SUM, by how many turns each stretch turns. Reads θ once either way.

    Angles are float64 and whole turns are dropped: no length makes them less exact.
    """
    s, h = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES % heads
    place = tl.program_id(0) // SLICES // heads
    n, start, begin, count = chunk_of(borders, place, tokens, sequences, STRETCH, PACKED)
    if count <= 0:
        return
    ic, ik = tl.arange(0, C), s * BK + tl.arange(0, BK)
    in_k = ik < K
    turn = tl.zeros((BK,), tl.float64)
    here = place_of(start, n, begin, STRETCH)
    if not SUM:
        for i in range(0, begin // STRETCH):
            turn += tl.load(parts + ((here - 1 - i) * heads + h) * K + ik, mask=in_k, other=0.0)
    for i in range(0, tl.cdiv(count, C)):
        row = (start + begin + i * C) * heads + h
        ok = (ic < count - i * C)[:, None] & in_k[None, :]
        each = tl.load(theta + row * K + ic[:, None] * (heads * K) + ik[None, :], mask=ok, other=0.0)
        each = each.to(tl.float64) / TURN
        if SUM:
            turn += tl.sum(each, 0)
        else:
            since = turn[None, :] + tl.cumsum(each, 0)
            angle = (since - tl.floor(since + 0.5)) * TURN
            if not EXACT:
                angle = angle.to(tl.float32)
            at = turns + row * 2 * K + ic[:, None] * (heads * 2 * K) + ik[None, :]
            tl.store(at, tl.cos(angle).to(tl.float32), mask=ok)
            tl.store(at + K, -tl.sin(angle).to(tl.float32), mask=ok)
            turn += tl.sum(each, 0)
        turn -= tl.floor(turn)
    if SUM:
        tl.store(parts + (here * heads + h) * K + ik, turn, mask=in_k)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def cross_prepare(
    x, y, turns, sums, borders, scores, asked, written, tokens, heads, sequences,
    X: tl.constexpr, BX: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, TURNED: tl.constexpr,
    GATES: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr, MILD: tl.constexpr,
):  # fmt: skip
    """Σ_c x_ic y_jc e^{a_ic - a_jc} of the pairs j <= i of a block: b t h C. With gates x e^a and y e^{a_C - a}, too.

    Reads x, y and a (twice). C·C·X multiply-adds a block, and as many exponentials if it is not mild.
    """
    W: tl.constexpr = X // 2 if TURNED else X
    h = tl.program_id(0) % heads
    _, start, begin, count = chunk_of(borders, tl.program_id(0) // heads, tokens, sequences, C, PACKED)
    if count <= 0:
        return
    row = (start + begin) * heads + h
    ic = tl.arange(0, C)
    inside, here, there = ic < count, ic[:, None], ic[None, :]
    A = tl.zeros((C, C), tl.float32)
    for s in tl.static_range(SLICES):
        ix = s * BX + tl.arange(0, BX)
        in_x, column, rest = ix < X, ix[None, :], ix[:, None]
        ok, in_rest = inside[:, None] & in_x[None, :], in_x[:, None] & inside[None, :]
        bx = tile_of(x, turns, row, heads, here, column, ok, W, TURNED)
        y_t = tile_of(y, turns, row, heads, there, rest, in_rest, W, TURNED)
        if GATES:
            a = sums_of(sums, row, heads, here, column, ok, W, TURNED)
            a_t = sums_of(sums, row, heads, there, rest, in_rest, W, TURNED)
            end = sums_of(sums, row, heads, count - 1, ix, in_x, W, TURNED)[:, None]
            faded = bx * tl.exp2(a).to(tl.float32)
            tl.store(asked + row * X + here * (heads * X) + column, faded, mask=ok)
            to_end = tl.exp2(tl.where(inside[None, :], end - a_t, 0.0)).to(tl.float32)
            tl.store(written + row * X + there * (heads * X) + rest, y_t * to_end, mask=in_rest)
            if tl.min(end) > -MILD:
                A = plus_product(A, faded, y_t * tl.exp2(-a_t).to(tl.float32), inside[:, None], PRECISION)
            else:
                for j in range(0, count):
                    y_j = tile_of(y, turns, row, heads, j, ix, in_x, W, TURNED)[None, :]
                    a_j = sums_of(sums, row, heads, j, ix, in_x, W, TURNED)[None, :]
                    fade = tl.exp2(tl.where((here > j) & inside[:, None], a - a_j, 0.0)).to(tl.float32)
                    A += tl.where(there == j, tl.sum(bx * fade * y_j, 1)[:, None], 0.0)
        else:
            A = plus_product(A, bx, y_t, inside[:, None], PRECISION)
    A = tl.where(here >= there, A, 0.0)
    tl.store(scores + row * C + here * (heads * C) + there, A, mask=inside[:, None])


@triton.jit
def kept_if(due, marks, mark, S, in_cell):
    """A branch: with a mask alone S would be brought in order for the store in every block."""
    if due:
        tl.store(marks + mark, S, mask=in_cell)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots"])
def cross_sweep(
    x, y, z, turns, x_sums, z_sums, scores, borders, entry, out, wide, end, marks, x_totals, z_totals,
    tokens, heads, segments, slots,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    TWICE: tl.constexpr, Z_TURNS: tl.constexpr, X_FADES: tl.constexpr, Z_FADES: tl.constexpr,
    REVERSE: tl.constexpr, TRANSPOSED: tl.constexpr, PACKED: tl.constexpr, ENTRY: tl.constexpr, OUT: tl.constexpr,
    WIDE: tl.constexpr, END: tl.constexpr, MARKS: tl.constexpr, SPAN: tl.constexpr, STRETCH: tl.constexpr,
    PRECISION: tl.constexpr, MILD: tl.constexpr,
):  # fmt: skip
    """A slice of the output over a segment of one head of one sequence: in `out`; in `wide` without tokens' own pairs.

    TRANSPOSED: memories are Z × X where they are kept. TWICE: two rows of the state have one gate. `marks`: the states
    at the ends of stretches. SPAN: there are no outputs; the state and the sums of gates over the segment are what it
    does to a memory. Reads x, y, scores and its slice of z and of its sums. 2·X·BZ + C·BZ multiply-adds a token.
    """
    XW: tl.constexpr = X // 2 if TWICE else X
    ZW: tl.constexpr = Z // 2 if Z_TURNS else Z
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)
    _, length = run_of(borders, n, tokens, PACKED)

    ic, ix, iz = tl.arange(0, C), tl.arange(0, BX), s * BZ + tl.arange(0, BZ)
    in_x, in_z = ix < X, iz < Z
    in_cell = in_x[:, None] & in_z[None, :]
    if TRANSPOSED:
        cell = iz[None, :] * X + ix[:, None]
    else:
        cell = ix[:, None] * Z + iz[None, :]
    nh = (n * heads + h).to(tl.int64)
    if ENTRY:
        S = tl.load(entry + (nh * slots + segment) * X * Z + cell, mask=in_cell, other=0.0)
    else:
        S = tl.zeros((BX, BZ), tl.float32)
    x_total, z_total = tl.zeros((BX,), tl.float32), tl.zeros((BZ,), tl.float32)
    here, there, c_z = ic[:, None], ic[None, :], iz[None, :]
    blocks = tl.cdiv(stop - first, C)
    if X_FADES:  # what feeds no dot is not pipelined: asked for a block before it is needed
        begin = first + (blocks - 1) * C if REVERSE else first
        last = tl.minimum(stop - begin, C) - 1
        row = (start + begin) * heads + h
        a_end = sums_of(x_sums, row, heads, last, ix, in_x & (blocks > 0), XW, TWICE)
    for i in range(0, blocks):
        begin = first + (blocks - 1 - i) * C if REVERSE else first + i * C
        count = tl.minimum(stop - begin, C)
        inside = ic < count
        row = (start + begin) * heads + h
        if X_FADES:
            then = -C if REVERSE else C
            last = tl.minimum(stop - begin - then, C) - 1
            wanted = in_x & (i + 1 < blocks)
            a_end_then = sums_of(x_sums, row + then * heads, heads, last, ix, wanted, XW, TWICE)
        if OUT:
            own = tl.load(scores + row * C + ic * (heads * C) + ic, mask=inside, other=0.0)
        ok_x, ok_y, ok_z = inside[:, None] & in_x[None, :], in_x[:, None] & inside[None, :], inside[:, None] & in_z
        by = tl.load(y + row * X + there * (heads * X) + ix[:, None], mask=ok_y, other=0.0).to(tl.float32)
        bz = tile_of(z, turns, row, heads, here, c_z, ok_z, ZW, Z_TURNS)
        written = bz
        if Z_FADES:
            b = sums_of(z_sums, row, heads, here, c_z, ok_z, ZW, Z_TURNS)
            b_end = sums_of(z_sums, row, heads, count - 1, iz, in_z, ZW, Z_TURNS)
            end_fade = tl.exp2(b_end).to(tl.float32)[None, :]
            from_start = tl.exp2(b).to(tl.float32)
        mark = (place_of(start, n, begin, STRETCH) * heads + h).to(tl.int64) * X * Z + cell
        due = ((begin + count) % STRETCH == 0) | (begin + count == length)
        if MARKS & REVERSE:  # D behind the block
            kept_if(due, marks, mark, S, in_cell)
        if not SPAN:
            bx = tl.load(x + row * X + here * (heads * X) + ix[None, :], mask=ok_x, other=0.0).to(tl.float32)
            found = tl.dot(bx, S, input_precision=PRECISION)
            if REVERSE:
                pair, later = there * (heads * C) + here, (here < there) & (there < count)
            else:
                pair, later = here * (heads * C) + there, (here > there) & (here < count)
            A = tl.load(scores + row * C + pair, mask=later, other=0.0)
        if Z_FADES:
            if tl.min(b_end) > -MILD:
                back = tl.exp2(-b).to(tl.float32)
                written = bz * (from_start if REVERSE else back)
                if not SPAN:
                    if REVERSE:
                        found = (found * end_fade + tl.dot(A, written, input_precision=PRECISION)) * back
                    else:
                        found = (found + tl.dot(A, written, input_precision=PRECISION)) * from_start
                if not REVERSE:
                    written *= end_fade
            else:
                to_end = tl.exp2(tl.where(inside[:, None], b_end[None, :] - b, 0.0)).to(tl.float32)
                written = bz * (from_start if REVERSE else to_end)
                if not SPAN:
                    found *= to_end if REVERSE else from_start
                    for j in range(0, count):
                        z_j = tile_of(z, turns, row, heads, j, iz, in_z, ZW, Z_TURNS)[None, :]
                        b_j = sums_of(z_sums, row, heads, j, iz, in_z, ZW, Z_TURNS)[None, :]
                        weight = tl.sum(tl.where(there == j, A, 0.0), 1)[:, None]
                        if REVERSE:
                            fade = tl.where(here < j, b_j - b, -float("inf"))
                        else:
                            fade = tl.where((here > j) & inside[:, None], b - b_j, -float("inf"))
                        found += weight * tl.exp2(fade).to(tl.float32) * z_j
        elif not SPAN:
            found += tl.dot(A, bz, input_precision=PRECISION)
        if not SPAN:
            at = row * Z + here * (heads * Z) + c_z
            if WIDE:
                tl.store(wide + at, found, mask=ok_z)
            if OUT:
                tl.store(out + at, (found + own[:, None] * bz).to(out.dtype.element_ty), mask=ok_z)
        if X_FADES:
            S *= tl.exp2(a_end).to(tl.float32)[:, None]
        if Z_FADES:
            S *= end_fade
        if SPAN:
            if X_FADES:
                x_total += a_end.to(tl.float32)
            if Z_FADES:
                z_total += b_end.to(tl.float32)
        S = plus_product(S, by, written, in_x[:, None], PRECISION)
        if MARKS & (not REVERSE):  # M behind the block
            kept_if(due, marks, mark, S, in_cell)
        if X_FADES:
            a_end = a_end_then

    if END:
        slot = nh
        if SPAN:
            slot = nh * (segments + 1) + (segment if REVERSE else segment + 1)
        tl.store(end + slot * X * Z + cell, S, mask=in_cell)
    if SPAN:
        if X_FADES:
            tl.store(x_totals + (nh * segments + segment) * X + ix, x_total, mask=in_x & (s == 0))
        if Z_FADES:
            tl.store(z_totals + (nh * segments + segment) * Z + iz, z_total, mask=in_z)


@triton.jit(do_not_specialize=["segments"])
def cross_fold(
    states, x_totals, z_totals, first, last, segments,
    X: tl.constexpr, Z: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, Z_FADES: tl.constexpr,
    REVERSE: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    """The memories before every segment and after the last (backwards: their cotangents), in place of what the
    segments wrote: M_0 = first, M_{s+1} = e^{g_s} M_s e^{f_s} + S_s, g and f the sums over a segment."""
    pid = tl.program_id(0)
    nh = (pid // BLOCKS).to(tl.int64)
    cell = (pid % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < X * Z
    states += nh * (segments + 1) * X * Z
    if FIRST:
        M = tl.load(first + nh * X * Z + cell, mask=inside, other=0.0)
    else:
        M = tl.zeros((BLOCK,), tl.float32)
    far = segments if REVERSE else 0
    tl.store(states + far * X * Z + cell, M, mask=inside)
    for i in range(0, segments):
        segment = segments - 1 - i if REVERSE else i
        slot = states + (segment if REVERSE else segment + 1) * X * Z + cell
        M *= tl.exp2(tl.load(x_totals + (nh * segments + segment) * X + cell // Z, mask=inside, other=0.0))
        if Z_FADES:
            M *= tl.exp2(tl.load(z_totals + (nh * segments + segment) * Z + cell % Z, mask=inside, other=0.0))
        M += tl.load(slot, mask=inside, other=0.0)
        tl.store(slot, M, mask=inside)
    tl.store(last + nh * X * Z + cell, M, mask=inside)


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def cross_ends(
    marks, behind, borders, rows, columns, angles, tokens, heads, sequences,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STRETCH: tl.constexpr,
    TURNED: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """<M, D> at the end of a stretch by row and by column, and with TURNED <M, i D> by row. Reads M and D once."""
    h = tl.program_id(0) % heads
    n, start, begin, count = chunk_of(borders, tl.program_id(0) // heads, tokens, sequences, STRETCH, PACKED)
    if count <= 0:
        return
    line = (place_of(start, n, begin, STRETCH) * heads + h).to(tl.int64)
    size: tl.constexpr = K * V * (2 if TURNED else 1)
    iv = tl.arange(0, BV)
    total = tl.zeros((BV,), tl.float32)
    for s in range(0, (K + BK - 1) // BK):
        ik = s * BK + tl.arange(0, BK)
        inside = (ik < K)[:, None] & (iv < V)[None, :]
        cell = line * size + ik[:, None] * V + iv[None, :]
        M, D = tl.load(marks + cell, mask=inside, other=0.0), tl.load(behind + cell, mask=inside, other=0.0)
        both = M * D
        if TURNED:
            N = tl.load(marks + cell + K * V, mask=inside, other=0.0)
            E = tl.load(behind + cell + K * V, mask=inside, other=0.0)
            both += N * E
            tl.store(angles + line * K + ik, tl.sum(M * E - N * D, 1), mask=ik < K)
        tl.store(rows + line * K + ik, tl.sum(both, 1), mask=ik < K)
        if COLUMNS:
            total += tl.sum(both, 0)
    if COLUMNS:
        tl.store(columns + line * V + iv, total, mask=iv < V)


@triton.jit
def finished(
    a, b, da, db, turns, scores, a_out, b_out, row, heads, ic, ik, ok,
    W: tl.constexpr, C: tl.constexpr, TURNED: tl.constexpr, BOTH: tl.constexpr,
):  # fmt: skip
    """Gradients of a block with tokens' own pairs, stored; what its tokens add to the gates' sums and to angles'."""
    at = row * W + ic[:, None] * (heads * W) + ik[None, :]
    ba = tl.load(a + at, mask=ok, other=0.0).to(tl.float32)
    bb = tl.load(b + at, mask=ok, other=0.0).to(tl.float32)
    if TURNED:
        twice = row * 2 * W + ic[:, None] * (heads * 2 * W) + ik[None, :]
        c, s = tl.load(turns + twice, mask=ok, other=0.0), tl.load(turns + twice + W, mask=ok, other=0.0)
        a_0, a_1 = tl.load(da + twice, mask=ok, other=0.0), tl.load(da + twice + W, mask=ok, other=0.0)
        b_0, b_1 = tl.load(db + twice, mask=ok, other=0.0), tl.load(db + twice + W, mask=ok, other=0.0)
        d_a, d_b = c * a_0 + s * a_1, c * b_0 + s * b_1
        turned = ba * (s * a_0 - c * a_1) + bb * (s * b_0 - c * b_1)
    else:
        d_a, d_b = tl.load(da + at, mask=ok, other=0.0), tl.load(db + at, mask=ok, other=0.0)
        turned = d_a
    own = tl.load(scores + row * C + ic * (heads * C + 1), mask=tl.max(ok.to(tl.int32), 1) > 0, other=0.0)[:, None]
    if BOTH:
        tl.store(a_out + at, (d_a + own * bb).to(a_out.dtype.element_ty), mask=ok)
    tl.store(b_out + at, (d_b + own * ba).to(b_out.dtype.element_ty), mask=ok)
    return ba * d_a - bb * d_b, turned


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def cross_gradients(
    a, b, da, db, turns, scores, ends, angles, borders, a_out, b_out, d_gate, d_theta, tokens, heads, sequences,
    W: tl.constexpr, BW: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, STRETCH: tl.constexpr,
    TURNED: tl.constexpr, BOTH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dq, dk, dg and dθ (a = q, b = k), or dv and df (a = do, whose `da` is o, and b = v), of some columns of a
    stretch, from what the sweeps left; `ends` and `angles`: the sums behind it. Reads and writes everything once."""
    s, h = tl.program_id(0) % SLICES, tl.program_id(0) // SLICES % heads
    place = tl.program_id(0) // SLICES // heads
    n, start, begin, count = chunk_of(borders, place, tokens, sequences, STRETCH, PACKED)
    if count <= 0:
        return
    ic, ik = tl.arange(0, C), s * BW + tl.arange(0, BW)
    in_k = ik < W
    behind = (place_of(start, n, begin, STRETCH) * heads + h) * W + ik
    gate = tl.load(ends + behind, mask=in_k, other=0.0)
    angle = gate
    if TURNED:
        angle = tl.load(angles + behind, mask=in_k, other=0.0)
    blocks = tl.cdiv(count, C)
    for i in range(0, blocks):
        since = (blocks - 1 - i) * C
        row = (start + begin + since) * heads + h
        ok = (ic < count - since)[:, None] & in_k[None, :]
        at = row * W + ic[:, None] * (heads * W) + ik[None, :]
        change, turned = finished(
            a, b, da, db, turns, scores, a_out, b_out, row, heads, ic, ik, ok, W, C, TURNED, BOTH
        )  # fmt: skip
        tl.store(d_gate + at, gate[None, :] + tl.cumsum(change, 0, reverse=True), mask=ok)
        gate += tl.sum(change, 0)
        if TURNED:
            tl.store(d_theta + at, angle[None, :] + tl.cumsum(turned, 0, reverse=True), mask=ok)
            angle += tl.sum(turned, 0)


@triton.jit(do_not_specialize=["heads"])
def cross_step(
    q, k, v, g, f, theta, memory, o, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr,
    COLUMNS: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """One token of one head, a slice of V: reads and writes its part of the memory once, in place."""
    pid = tl.program_id(0)
    row = (pid // SLICES).to(tl.int64)
    ik = tl.arange(0, BK)
    iv = (pid % SLICES) * BV + tl.arange(0, BV)
    in_k, in_v = ik < K, iv < V
    in_cell = in_k[:, None] & in_v[None, :]
    cell = memory + row * K * V * (2 if TURNED else 1) + ik[:, None] * V + iv[None, :]
    bq = tl.load(q + row * K + ik, mask=in_k, other=0.0).to(tl.float32)
    bk = tl.load(k + row * K + ik, mask=in_k, other=0.0).to(tl.float32)
    bv = tl.load(v + row * V + iv, mask=in_v, other=0.0).to(tl.float32)
    fade = tl.exp(tl.load(g + row * K + ik, mask=in_k, other=0.0))[:, None]
    M = tl.load(cell, mask=in_cell, other=0.0)
    if TURNED:
        angle = tl.load(theta + row * K + ik, mask=in_k, other=0.0)
        c, s = fade * tl.cos(angle)[:, None], fade * tl.sin(angle)[:, None]
        N = tl.load(cell + K * V, mask=in_cell, other=0.0)
        tl.store(cell + K * V, s * M + c * N, mask=in_cell)
        M = c * M - s * N
    else:
        M *= fade
    if COLUMNS:
        M *= tl.exp(tl.load(f + row * V + iv, mask=in_v, other=0.0))[None, :]
    M += bk[:, None] * bv[None, :]
    tl.store(cell, M, mask=in_cell)
    tl.store(o + row * V + iv, tl.sum(bq[:, None] * M, 0), mask=in_v)


# ------------------------------------------------------------------------------------------------ the launchers
# Tensors are contiguous, gates, angles and memories float32. q k g : b t h K, v : b t h V; f : None | b t h V and
# theta : None | b t h K; memory : n h K V, or n h 2K V where there is theta. `turns` is [cos Θ, -sin Θ] : b t h 2K.


def segments_for(k: Tensor, v: Tensor, theta: Tensor | None, sequences: int) -> int:
    """In how many segments to cut each sequence: two programs a multiprocessor, and at least 512 tokens a segment."""
    columns = min(CONFIG[padded(memory_rows(k, theta)), PRECISION[v.dtype]][0], padded(v.shape[-1]))
    programs = sequences * v.shape[2] * cdiv(v.shape[-1], columns)
    return decay.long_enough(2 * decay.multiprocessors(v.device) // max(programs, 1), v, sequences)


def memory_rows(k: Tensor, theta: Tensor | None) -> int:
    return k.shape[-1] * (1 if theta is None else 2)


def marks_of(k: Tensor, v: Tensor, theta: Tensor | None, borders: Tensor | None) -> tuple[int, ...]:
    """The shape of the memories at the ends of all stretches."""
    return places(v, borders, STRETCH[v.element_size()]), v.shape[2], memory_rows(k, theta), v.shape[3]


def sums_in(v: Tensor) -> torch.dtype:
    """The dtype of running sums of gates."""
    return torch.float64 if v.element_size() == 4 else torch.float32


def sums_by_block(g: Tensor | None, like: Tensor, borders: Tensor | None) -> Tensor | None:
    """`cross_sums`: b t h K."""
    if g is None:
        return None
    (_, t, h, K), sums = g.shape, torch.empty_like(g, dtype=sums_in(like))
    decay.launch(
        cross_sums, chunks_of(g, borders, BLOCK) * h, g, borders, sums, t, h, sequences_of(g, borders),
        K=K, BK=padded(K), C=BLOCK, PACKED=borders is not None, EXACT=like.element_size() == 4,
    )  # fmt: skip
    return sums


def turns_of(theta: Tensor | None, like: Tensor, borders: Tensor | None) -> Tensor | None:
    """`cross_turns`: b t h 2K."""
    if theta is None:
        return None
    (b, t, h, K), columns, stretch = theta.shape, min(32, padded(theta.shape[-1])), STRETCH[like.element_size()]
    parts = theta.new_empty(places(theta, borders, stretch), h, K, dtype=torch.float64)
    turns = theta.new_empty(b, t, h, 2 * K)
    for first in (True, False):
        decay.launch(
            cross_turns, chunks_of(theta, borders, stretch) * h * cdiv(K, columns),
            theta, borders, parts, turns, t, h, sequences_of(theta, borders), K=K, BK=columns, SLICES=cdiv(K, columns),
            C=BLOCK, STRETCH=stretch, PACKED=borders is not None, EXACT=like.element_size() == 4, SUM=first,
        )  # fmt: skip
    return turns


def prepared(x, y, turns: Tensor | None, sums: Tensor | None, borders: Tensor | None) -> tuple[Tensor, ...]:
    """`cross_prepare`: (scores : b t h C, x e^a, y e^{a_C - a}); without gates x and y as they are."""
    (b, t, h, X), turned = x.shape, turns is not None
    X *= 1 + turned
    columns = min(PREPARING, padded(X))
    scores = x.new_empty(b, t, h, BLOCK, dtype=torch.float32)
    asked, written = (x, y) if sums is None else (scores.new_empty(b, t, h, X) for _ in range(2))
    decay.launch(
        cross_prepare, chunks_of(x, borders, BLOCK) * h, x, y, turns, sums, borders, scores, asked, written, t, h,
        sequences_of(x, borders), X=X, BX=columns, SLICES=cdiv(X, columns), C=BLOCK, TURNED=turned,
        GATES=sums is not None, PACKED=borders is not None, PRECISION=PRECISION[x.dtype], MILD=MILD,
    )  # fmt: skip
    return scores, asked, written


@functools.cache
def shape_by_numbers(X: int, Z: int, dtype: torch.dtype, packed: bool) -> dict:
    """The compile-time arguments of a sweep whose state is X × Z."""
    columns, warps, stages = CONFIG[padded(X), PRECISION[dtype]]
    columns = min(columns, padded(Z))
    sizes = {"X": X, "Z": Z, "BX": padded(X), "BZ": columns, "SLICES": cdiv(Z, columns), "C": BLOCK}
    kinds = {"STRETCH": STRETCH[dtype.itemsize], "PACKED": packed, "PRECISION": PRECISION[dtype], "MILD": MILD}
    return {**sizes, **kinds, "num_warps": warps, "num_stages": stages}


def sweep(
    x, y, z, turns, sums, scores, borders, entry, *, totals=(None, None), segments=1, slots=1, reverse=False,
    transposed=False, span=False, out=None, wide=None, end=None, marks=None,
) -> None:  # fmt: skip
    """`cross_sweep`: fills what is given of `out`, `wide`, `end` and `marks`. `sums` and `totals` are those beside x
    and z; `turns` are given where z turns."""
    X, Z = y.shape[-1], z.shape[-1] * (1 if turns is None else 2)
    shape = shape_by_numbers(X, Z, z.dtype, borders is not None)
    decay.launch(
        cross_sweep, shape["SLICES"] * segments * z.shape[2] * sequences_of(z, borders),
        y if x is None else x, y, z, turns, *sums, scores, borders, entry, out, wide, end, marks, *totals,
        *z.shape[1:3], segments, slots, **shape, TWICE=sums[0] is not None and sums[0].shape[-1] < X,
        Z_TURNS=turns is not None, X_FADES=sums[0] is not None, Z_FADES=sums[1] is not None, REVERSE=reverse,
        TRANSPOSED=transposed, ENTRY=entry is not None, OUT=out is not None, WIDE=wide is not None,
        END=end is not None, MARKS=marks is not None, SPAN=span,
    )  # fmt: skip


def between(y, z, sums, borders, first, segments: int, reverse=False) -> tuple[Tensor, Tensor]:
    """The memories between segments (n h segments+1 · V) and the one at the far end (n h · V), from `first`."""
    n, h, K, V = sequences_of(z, borders), *y.shape[2:], z.shape[-1]
    states = z.new_empty(n, h, segments + 1, K, V, dtype=torch.float32)
    totals = [
        None if x is None else states.new_empty(n, h, segments, size) for x, size in zip(sums, (K, V), strict=True)
    ]
    last = torch.empty_like(states[:, :, 0])
    run = {"segments": segments, "reverse": reverse, "span": True}
    sweep(None, y, z, None, sums, None, borders, None, end=states, totals=totals, **run)
    block = min(1024, next_power_of_2(K * V))
    blocks = cdiv(K * V, block)
    decay.launch(
        cross_fold, n * h * blocks, states, *totals, first, last, segments,
        X=K, Z=V, BLOCK=block, BLOCKS=blocks, Z_FADES=totals[1] is not None, REVERSE=reverse, FIRST=first is not None,
    )  # fmt: skip
    return states, last


def turned(M: Tensor | None, turns: Tensor | None, borders: Tensor | None, back: bool = False) -> Tensor | None:
    """e^{iΘ} M with Θ at the end of each sequence, M : n h 2K V; or back, e^{-iΘ} M."""
    if M is None or turns is None or not turns.shape[1]:
        return M
    if borders is None:
        at = turns[:, -1]
    else:
        stops = borders.clamp(0, turns.shape[1]).cummax(0).values  # as the kernels clamp them
        at = turns[0, (stops[1:] - 1).clamp(min=0)]
        still = at.new_tensor([1.0, 0.0]).repeat_interleave(at.shape[-1] // 2)
        at = torch.where((stops.diff() > 0)[:, None, None], at, still)
    c, s = at[..., None].chunk(2, -2)
    real, imaginary = M.chunk(2, -2)
    s = s if back else -s
    return torch.cat([c * real - s * imaginary, s * real + c * imaginary], -2)


def forward(q, k, v, g, f, theta, memory, borders, segments: int, keep: bool) -> tuple[Tensor, ...]:
    """(o, the last memory, memories between segments, and for the gradient: sums of g and f, turns, o in float32,
    memories at the ends of stretches). Empty: what is not wanted, or not there. `keep`: a gradient will be."""
    turns = turns_of(theta, v, borders)
    sums = sums_by_block(g, v, borders), sums_by_block(f, v, borders)
    scores, asked, written = prepared(q, k, turns, sums[0], borders)
    o = torch.empty_like(v)
    wide = torch.empty_like(v, dtype=torch.float32) if keep and f is not None else None
    marks = g.new_empty(marks_of(k, v, theta, borders)) if keep else None
    last = g.new_empty(sequences_of(v, borders), *written.shape[2:], v.shape[3])
    states, run, start, end = g.new_empty(0), {}, memory, last
    if segments > 1:
        states, last = between(written, v, sums, borders, memory, segments)
        run, start, end = {"segments": segments, "slots": segments + 1}, states, None
    sweep(asked, written, v, None, sums, scores, borders, start, out=o, wide=wide, end=end, marks=marks, **run)
    last = turned(last, turns, borders)
    if not keep:
        return o, last, states, *(g.new_empty(0) for _ in range(5))
    kept = sums[0], g.new_empty(0, dtype=sums_in(v)) if f is None else sums[1], turns, wide, marks
    return o, last, states, *(g.new_empty(0) if x is None else x for x in kept)


def backward(do, dlast, q, k, v, memory, borders, states, g_sums, f_sums, turns, wide, marks):
    """(dq, dk, dv, dg, df, dtheta, dmemory) from the cotangents of o and of the last memory (None: zeros). df and
    dtheta are None where no such gate is."""
    f_sums, turns, wide = (x if x.numel() else None for x in (f_sums, turns, wide))
    sums, far, start, end = (g_sums, f_sums), turned(dlast, turns, borders, back=True), memory, None
    scores, asked, written = prepared(q, k, turns, g_sums, borders)
    run = {}
    if states.numel():
        segments = states.shape[2] - 1
        cotangents, dmemory = between(asked, do, sums, borders, far, segments, reverse=True)
        run, start, far = {"segments": segments, "slots": segments + 1}, states, cotangents[:, :, 1:]
    else:
        dmemory = end = marks.new_empty(sequences_of(v, borders), *marks.shape[1:])
    behind, dv = torch.empty_like(marks), torch.empty_like(v)
    found = {"out": dv} if wide is None else {"wide": torch.empty_like(wide)}
    sweep(written, asked, do, None, sums, scores, borders, far, **found, end=end, marks=behind, reverse=True, **run)
    shape = asked.shape
    del asked, written  # as soon as nobody reads them their memory, 4 U, is free for what follows
    pairs, asking, answered = prepared(do, v, None, f_sums, borders)
    dq, dk = (marks.new_empty(shape) for _ in range(2))
    sides = {"sums": sums[::-1], "scores": pairs, "borders": borders, "transposed": True, **run}
    sweep(asking, answered, k, turns, entry=start, wide=dq, **sides)
    sweep(answered, asking, q, turns, entry=far, wide=dk, reverse=True, **sides)
    del asking, answered
    ends, columns, angles = ends_of(v, marks, behind, borders, f_sums is not None, turns is not None)
    *rows, dg, dtheta = gradients(q, k, dq, dk, turns, pairs, ends, angles, borders)
    del dq, dk
    df = None
    if wide is not None:
        _, dv, df, _ = gradients(do, v, wide, found["wide"], None, scores, columns, None, borders, one=True)
    return *rows, dv, dg, df, dtheta, dmemory


def ends_of(v: Tensor, marks, behind, borders, columns: bool, turned: bool) -> tuple[Tensor | None, ...]:
    """`cross_ends`: by row, by column and of angles, of all stretches."""
    (places, h, K, V), t, stretch = marks.shape, v.shape[1], STRETCH[v.element_size()]
    K //= 1 + turned
    rows = marks.new_empty(places, h, K)
    by_column = marks.new_empty(places, h, V) if columns else None
    angles = torch.empty_like(rows) if turned else None
    decay.launch(
        cross_ends, chunks_of(v, borders, stretch) * h,
        marks, behind, borders, rows, by_column, angles, t, h, sequences_of(v, borders),
        K=K, V=V, BK=16, BV=padded(V), STRETCH=stretch, TURNED=turned, COLUMNS=columns, PACKED=borders is not None,
        num_warps=4,
    )  # fmt: skip
    return rows, by_column, angles


def gradients(a, b, da, db, turns, scores, ends, angles, borders, one=False) -> tuple[Tensor | None, ...]:
    """`cross_gradients`: the gradients of a (None if only `one` is wanted) and b, of their gate and of their angle."""
    (_, t, h, W), columns, stretch = a.shape, min(FINISHING, padded(a.shape[-1])), STRETCH[a.element_size()]
    a_out, b_out = None if one else torch.empty_like(a), torch.empty_like(b)
    d_gate = torch.empty_like(a, dtype=torch.float32)
    d_theta = None if turns is None else torch.empty_like(d_gate)
    decay.launch(
        cross_gradients, chunks_of(a, borders, stretch) * h * cdiv(W, columns),
        a, b, da, db, turns, scores, ends, angles, borders, a_out, b_out, d_gate, d_theta, t, h,
        sequences_of(a, borders), W=W, BW=columns, SLICES=cdiv(W, columns), C=BLOCK, STRETCH=stretch,
        TURNED=turns is not None, BOTH=not one, PACKED=borders is not None,
    )  # fmt: skip
    return a_out, b_out, d_gate, d_theta


def step(q, k, v, g, f, theta, memory) -> Tensor:
    """o : b h V in float32 of one token a sequence, q k g : b h K, v : b h V and so on; overwrites memory."""
    given = q, k, v, g, f, theta, memory
    return decay.one_token(cross_step, given, v, q.shape[1], COLUMNS=f is not None, TURNED=theta is not None)
