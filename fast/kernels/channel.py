"""Triton kernels for memories whose channels fade each at its own rate: M_t = Diag(e^{g_t}) M_{t-1} + k_tᵀ v_t.

The gate is a number a key channel and token (GLA, HGRN2). The read is o_t = q_t M_t, or, with a bonus u (RWKV6), that
of the memory before the token and of the token itself by a weight of its own: o_t = q_t M_{t-1} + (q_t u · k_t) v_t.

Chunks have C = 16 tokens. With b_i = g_1 + ... + g_i in a chunk (a row of K sums), r_i = b_i (b_{i-1} where the read
is of the memory before), S the state from before the chunk, D_t the cotangent of M_t, and all products with e by row:

    A_ij = Σ_c q_ic k_jc e^{r_ic - b_jc}  for j < i,     A_ii = q_i · k_i, or q_i u · k_i;     P_ij = do_i · v_j

    o    forwards     (q e^r) S + A v                              S <- e^{b_C} S + (k e^{b_C - b})ᵀ v         K × V
    dv   backwards    (k e^{b_C - b}) S + Aᵀ do                    S <- e^{b_C} S + (q e^r)ᵀ do                K × V
    dq   forwards     e^r (do S) + Σ_j P_ij e^{r_i - b_j} k_j      S <- S e^{b_C} + vᵀ (k e^{b_C - b})         V × K
    dk   backwards    e^{b_C - b} (v S) + Σ_i P_ij e^{r_i - b_j} q_i    S <- S e^{b_C} + doᵀ (q e^r)           V × K

o and dv are one kernel (`channel_values`: the state's rows fade), dq and dk another (`channel_keys`: its columns do). A
program owns a slice of the output's columns and streams through time, as in `decay.py`, whose segments are these, too.

Inside a chunk no split q e^{b} · k e^{-b} is safe: under strong gates the second factor has no bound. So all pairs of
16 tokens are taken one by one, by two kernels that know nothing of the state and run for all chunks at once: A with
`channel_scores`, and the two sums of dq and dk with j < i with `channel_pairs`. Neither takes an exponential of a pair:
going from key j to key j - 1, all queries from j on fade by e^{g_j}, so a row of queries that starts as q and is
multiplied on the way is right for every key in its turn. No exponent is ever positive and no sum of gates is a
difference, so any gate in [-inf, 0] is right. Between chunks, for 16-bit tokens, b_C - b is a difference of float32
sums (off by 5e-4 at the very worst, below those tokens' own rounding); for float32 tokens (EXACT) it is a sum of its
own. As in `decay.py` a gate is raised to FLOOR first.

The gate's gradient needs no memory: dg_t = <e^{g_t} M_{t-1}, D_t> by row of the memory, and with M and D at a segment's
end (dq', dk': without a token's own pair, which is in both and cancels)

    dg_t = <M, D> + Σ_{s >= t} (q_s dq'_s - k_s dk'_s)        read before the write: q dq' from s > t

so `channel_keys` leaves q dq' where dg will be, and, running backwards, turns it into dg, before dq and dk are rounded.
A token's own pair P_tt comes in afterwards: dq += P_tt k, dk += P_tt q (times u), du = Σ_t P_tt q_t k_t.

Bytes and operations. In U = one b t h d tensor in 16 bits, K = V = d = 128, gates (2 U) in float32: scores read 4 U and
write 1/8, the forward sweep reads 5 and writes 1; backward, the pairs read 6 and write 2, dv moves 6, dq 8 (the pairs'
part, q and the gate's part beside its own) and dk 9: 41 U where the floor is 17 (forward 6, backward 11). Saved for
the gradient: A, 16 numbers a token and head, and what `decay.py` saves. Scores cost 16·K multiply-adds and as many
multiplications a token and head, pairs four times that, off the tensor cores; a sweep 2·d² on them.

Compilers: what `decay.py` says. No dot's result is transposed; no 16-bit line of CONFIG has one stage.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay
from fast.kernels.decay import FLOOR, LOG2_E, padded, part_of, run_of, sequences_of

CHUNK = 16

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
    (256, 4): (16, 4, 1),
}


@triton.jit
def gates_of(g, at, ok):
    """Gates in units of log 2, so that exp2 follows; 0 where there is no token."""
    gate = tl.load(g + at, mask=ok, other=0.0)
    return tl.maximum(gate, FLOOR, propagate_nan=tl.PropagateNan.ALL) * LOG2_E


@triton.jit
def sums_of(
    g, row, heads, ic, ik, count,
    K: tl.constexpr, BEFORE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """(r, b_C - b, b_C) of the chunk that begins at `row`: C × K, C × K, K. BEFORE: r leaves out the token's own."""
    at = row * K + ic[:, None] * (heads * K) + ik[None, :]
    in_k = (ik < K)[None, :]
    if EXACT:
        later = gates_of(g, at + heads * K, (ic + 1 < count)[:, None] & in_k)
        total = tl.sum(later, 0) + gates_of(g, row * K + ik, ik < K)
        after = tl.cumsum(later, 0, reverse=True)
        if BEFORE:
            r = tl.cumsum(gates_of(g, at - heads * K, ((ic > 0) & (ic < count))[:, None] & in_k), 0)
        else:
            r = tl.cumsum(gates_of(g, at, (ic < count)[:, None] & in_k), 0)
    else:
        own = gates_of(g, at, (ic < count)[:, None] & in_k)
        r = tl.cumsum(own, 0)
        total = tl.sum(own, 0)
        after = total[None, :] - r
        if BEFORE:
            r -= own
    return r, after, total


@triton.jit(do_not_specialize=["tokens", "heads", "parts"])
def channel_scores(
    q, k, g, u, borders, scores, tokens, heads, parts,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """A of every chunk: b t h C, in the tokens' dtype, zeros above the diagonal.

    Reads q, k and g, the latter two again a row at a time, from the L1 cache. `asked` is what is left of every query
    when key j is reached.
    """
    pid = tl.program_id(0)
    part = pid % parts
    h = (pid // parts) % heads
    start, length = run_of(borders, pid // parts // heads, tokens, PACKED)
    first, stop = part_of(length, part, parts)
    ic, ik = tl.arange(0, C), tl.arange(0, BK)
    in_k = ik < K
    for i in range(0, tl.cdiv(stop - first, C)):
        begin = first + i * C
        row = (start + begin) * heads + h
        count = tl.minimum(stop - begin, C)
        at = row * K + ic[:, None] * (heads * K) + ik[None, :]
        ok = (ic < count)[:, None] & in_k[None, :]
        asked = tl.load(q + at, mask=ok, other=0.0).to(tl.float32)
        A = tl.zeros((C, C), tl.float32)
        if BEFORE:
            weight = tl.load(u + h * K + ik, mask=in_k, other=0.0)
            own = tl.sum(asked * weight[None, :] * tl.load(k + at, mask=ok, other=0.0).to(tl.float32), 1)
            A = tl.where(ic[:, None] == ic[None, :], own[:, None], A)
        for step in tl.static_range(C):
            j = C - 1 - step
            there = (j < count) & in_k
            line = (row + j * heads) * K + ik
            key = tl.load(k + line, mask=there, other=0.0).to(tl.float32)
            found = tl.sum(asked * key[None, :], 1)
            since = (ic > j) if BEFORE else (ic >= j)
            A = tl.where((ic[None, :] == j) & since[:, None], found[:, None], A)
            asked = tl.where(since[:, None], asked * tl.exp2(gates_of(g, line, there))[None, :], asked)
        to = row * C + ic[:, None] * (heads * C) + ic[None, :]
        tl.store(scores + to, A, mask=(ic < count)[:, None])


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots"])
def channel_values(
    x, y, z, g, scores, borders, entry, out, end, tokens, heads, segments, slots,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    BEFORE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """One slice of o (x y z = q k v) over a segment of one head of one sequence; REVERSE: of dv (k q do).

    Reads x and y, its slice of z, gates and scores; writes its slice of out. 2·C·X·BZ + C·C·BZ multiply-adds a chunk.
    """
    pid = tl.program_id(0)
    s = pid % SLICES
    segment = (pid // SLICES) % segments
    h = (pid // SLICES // segments) % heads
    n = pid // SLICES // segments // heads
    start, length = run_of(borders, n, tokens, PACKED)
    first, stop = part_of(length, segment, segments)

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    cell = ix[:, None] * Z + iz[None, :]
    in_cell = in_x[:, None] & in_z[None, :]
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
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C if REVERSE else first + i * C
        count = tl.minimum(stop - begin, C)
        inside = ic < count
        row = (start + begin) * heads + h
        bx = tl.load(x + row * X + at_x, mask=inside[:, None] & in_x[None, :], other=0.0)
        by = tl.load(y + row * X + at_x, mask=inside[:, None] & in_x[None, :], other=0.0)
        bz = tl.load(z + row * Z + at_z, mask=inside[:, None] & in_z[None, :], other=0.0)
        A = tl.load(scores + row * C + at_scores, mask=inside[:, None] & inside[None, :], other=0.0)
        reading, writing, total = sums_of(g, row, heads, ic, ix, count, X, BEFORE, EXACT)
        if REVERSE:
            reading, writing = writing, reading
        seen = (bx.to(tl.float32) * tl.exp2(reading)).to(bx.dtype)
        written = (by.to(tl.float32) * tl.exp2(writing)).to(by.dtype)
        o = tl.dot(seen, S.to(bx.dtype), input_precision=PRECISION)
        o = tl.dot(A, bz, o, input_precision=PRECISION)
        S = tl.dot(tl.trans(written), bz, S * tl.exp2(total)[:, None], input_precision=PRECISION)
        tl.store(out + row * Z + at_z, o, mask=inside[:, None] & in_z[None, :])

    if END:
        tl.store(end + nh * X * Z + cell, S, mask=in_cell)


@triton.jit
def to_middle(gates, ic, half: tl.constexpr, BEFORE: tl.constexpr, EXACT: tl.constexpr):
    """e^{sum of the gates between a token and the middle of its block of 2·half tokens}: C × K, at most 1.

    From the middle on: up to and with the token's own gate (BEFORE: without); before the middle: after the token. The
    sums are products with zeros and ones; for 16-bit tokens of gates in two float16, exact to 22 bits.
    """
    here, other = ic[:, None], ic[None, :]
    middle = here // (2 * half) * (2 * half) + half
    until = here if BEFORE else here + 1
    between = tl.where(here >= middle, (other >= middle) & (other < until), (other > here) & (other < middle))
    if EXACT:
        total = tl.dot(between.to(tl.float32), gates, input_precision="ieee")
    else:
        rough = gates.to(tl.float16)
        total = tl.dot(between.to(tl.float16), (gates - rough.to(tl.float32)).to(tl.float16))
        total = tl.dot(between.to(tl.float16), rough, total)
    return tl.exp2(total)


@triton.jit(do_not_specialize=["tokens", "heads", "parts"])
def channel_pairs(
    do, q, k, v, g, borders, dq, dk, own, tokens, heads, parts,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    BEFORE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What pairs j < i of one chunk give dq_i and dk_j, for a slice of channels; own_i = P_ii: b t h.

    By halves: the later half's queries meet the earlier half's keys at the middle, both decayed towards it; the halves
    of the halves are the same problem. Four levels are all pairs of 16 tokens. Products a chunk: 2·C·C·V for P and its
    transpose, and for each level 2·C·C·BK for gates, 2·C·C·BK for gradients.
    """
    pid = tl.program_id(0)
    s = pid % SLICES
    part = (pid // SLICES) % parts
    h = (pid // SLICES // parts) % heads
    start, length = run_of(borders, pid // SLICES // parts // heads, tokens, PACKED)
    first, stop = part_of(length, part, parts)
    ic, iv = tl.arange(0, C), tl.arange(0, BV)
    ik = s * BK + tl.arange(0, BK)
    in_k, in_v = ik < K, iv < V
    for i in range(0, tl.cdiv(stop - first, C)):
        begin = first + i * C
        row = (start + begin) * heads + h
        inside = ic < tl.minimum(stop - begin, C)
        at_k = row * K + ic[:, None] * (heads * K) + ik[None, :]
        at_v = row * V + ic[:, None] * (heads * V) + iv[None, :]
        ok_k, ok_v = inside[:, None] & in_k[None, :], inside[:, None] & in_v[None, :]
        answer = tl.load(do + at_v, mask=ok_v, other=0.0)
        value = tl.load(v + at_v, mask=ok_v, other=0.0)
        query = tl.load(q + at_k, mask=ok_k, other=0.0)
        key = tl.load(k + at_k, mask=ok_k, other=0.0)
        gates = gates_of(g, at_k, ok_k)
        P = tl.dot(answer, tl.trans(value), input_precision=PRECISION)
        turned = tl.dot(value, tl.trans(answer), input_precision=PRECISION)
        if s == 0:
            diagonal = tl.sum(tl.where(ic[:, None] == ic[None, :], P, 0.0), 1)
            tl.store(own + row + ic * heads, diagonal, mask=inside)
        asking = tl.zeros((C, BK), tl.float32)
        answering = tl.zeros((C, BK), tl.float32)
        for level in tl.static_range(4):
            half = 1 << level
            fade = to_middle(gates, ic, half, BEFORE, EXACT)
            block, late = ic // (2 * half), ic % (2 * half) >= half
            meet = (block[:, None] == block[None, :]) & (late[:, None] != late[None, :])
            asked = tl.where(meet & late[:, None], P, 0.0).to(key.dtype)
            answered = tl.where(meet & late[None, :], turned, 0.0).to(key.dtype)
            keys = (key.to(tl.float32) * fade).to(key.dtype)
            queries = (query.to(tl.float32) * fade).to(key.dtype)
            asking += fade * tl.dot(asked, keys, input_precision=PRECISION)
            answering += fade * tl.dot(answered, queries, input_precision=PRECISION)
        tl.store(dq + at_k, asking, mask=ok_k)
        tl.store(dk + at_k, answering, mask=ok_k)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots"])
def channel_keys(
    x, y, z, w, g, u, own, borders, entry, memory, out, dg, du, tokens, heads, segments, slots,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    BEFORE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, GATES: tl.constexpr, BONUS: tl.constexpr,
):  # fmt: skip
    """One slice of dq (x y z w = do v k q) over a segment of one head of one sequence; REVERSE: of dk (v do q k).

    `out` holds what `channel_pairs` found, and the rest is added. With GATES the forward run leaves q dq' in dg, which
    the run backwards replaces by dg; its sums start from <M, D> at the segment's end (`memory`, and `entry` of that
    run) and are float64 where EXACT. With BONUS du of this segment: n h segments K. 2·C·X·BZ multiply-adds a chunk.
    """
    pid = tl.program_id(0)
    s = pid % SLICES
    segment = (pid // SLICES) % segments
    h = (pid // SLICES // segments) % heads
    n = pid // SLICES // segments // heads
    start, length = run_of(borders, n, tokens, PACKED)
    first, stop = part_of(length, segment, segments)

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    nh = (n * heads + h).to(tl.int64)
    cell = (nh * slots + segment) * X * Z + ix[:, None] + iz[None, :] * X  # the state lies transposed in memory
    in_cell = in_x[:, None] & in_z[None, :]
    wide = tl.float64 if EXACT else tl.float32
    if ENTRY:
        S = tl.load(entry + cell, mask=in_cell, other=0.0)
    else:
        S = tl.zeros((BX, BZ), tl.float32)
    later = tl.zeros((BZ,), wide)
    if GATES and REVERSE and ENTRY:
        later += tl.sum((S * tl.load(memory + cell, mask=in_cell, other=0.0)).to(wide), 0)
    weight = tl.full((BZ,), 1.0, tl.float32)
    if BEFORE:
        weight = tl.load(u + h * Z + iz, mask=in_z, other=0.0)
    bonus = tl.zeros((BZ,), tl.float32)

    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    chunks = tl.cdiv(stop - first, C)
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C if REVERSE else first + i * C
        count = tl.minimum(stop - begin, C)
        inside = ic < count
        row = (start + begin) * heads + h
        in_rows_x = inside[:, None] & in_x[None, :]
        in_rows_z = inside[:, None] & in_z[None, :]
        bx = tl.load(x + row * X + at_x, mask=in_rows_x, other=0.0)
        by = tl.load(y + row * X + at_x, mask=in_rows_x, other=0.0)
        bz = tl.load(z + row * Z + at_z, mask=in_rows_z, other=0.0)
        # what feeds no dot is not pipelined: asked for before the dots, it arrives during them
        pairs = tl.load(out + row * Z + at_z, mask=in_rows_z, other=0.0).to(tl.float32)
        itself = tl.load(own + row + ic * heads, mask=inside, other=0.0)
        if GATES or BONUS:
            bw = tl.load(w + row * Z + at_z, mask=in_rows_z, other=0.0).to(tl.float32)
        if GATES and REVERSE:
            asked = tl.load(dg + row * Z + at_z, mask=in_rows_z, other=0.0)
            gate = tl.load(g + row * Z + at_z, mask=in_rows_z, other=0.0)
        reading, writing, total = sums_of(g, row, heads, ic, iz, count, Z, BEFORE, EXACT)
        if REVERSE:
            reading, writing = writing, reading
        own_z = bz.to(tl.float32) * itself[:, None]
        written = (bz.to(tl.float32) * tl.exp2(writing)).to(bz.dtype)
        o = tl.dot(bx, S.to(bx.dtype), input_precision=PRECISION) * tl.exp2(reading) + pairs
        S = tl.dot(tl.trans(by), written, S * tl.exp2(total)[None, :], input_precision=PRECISION)
        if GATES:
            change = bw * o
            if REVERSE:
                change = asked.to(wide) - change.to(wide)
                value = later[None, :] + tl.cumsum(change, 0, reverse=True)
                if BEFORE:
                    value -= asked.to(wide)
                later += tl.sum(change, 0)
                change = tl.where(gate < -104.0, 0.0, value.to(tl.float32))
            tl.store(dg + row * Z + at_z, change, mask=in_rows_z)
        if BONUS:
            bonus += tl.sum(own_z * bw, 0)
        tl.store(out + row * Z + at_z, o + own_z * weight[None, :], mask=in_rows_z)

    if BONUS:
        tl.store(du + (nh * segments + segment) * Z + iz, bonus, mask=in_z)


@triton.jit(do_not_specialize=["tokens", "heads", "segments"])
def channel_span(
    y, z, g, borders, states, totals, tokens, heads, segments,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    BEFORE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a segment does to a memory, M -> e^total M + S by row: the state update of `channel_values` alone.

    S goes to the slot that `channel_fold` turns into the memory behind this segment; totals: n h segments K.
    """
    pid = tl.program_id(0)
    s = pid % SLICES
    segment = (pid // SLICES) % segments
    h = (pid // SLICES // segments) % heads
    n = pid // SLICES // segments // heads
    start, length = run_of(borders, n, tokens, PACKED)
    first, stop = part_of(length, segment, segments)

    ix = tl.arange(0, BX)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_x, in_z = ix < X, iz < Z
    S = tl.zeros((BX, BZ), tl.float32)
    sum_of_totals = tl.zeros((BX,), tl.float32)
    chunks = tl.cdiv(stop - first, C)
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C if REVERSE else first + i * C
        count = tl.minimum(stop - begin, C)
        inside = ic < count
        row = (start + begin) * heads + h
        at_x = row * X + ic[:, None] * (heads * X) + ix[None, :]
        at_z = row * Z + ic[:, None] * (heads * Z) + iz[None, :]
        by = tl.load(y + at_x, mask=inside[:, None] & in_x[None, :], other=0.0)
        bz = tl.load(z + at_z, mask=inside[:, None] & in_z[None, :], other=0.0)
        r, after, total = sums_of(g, row, heads, ic, ix, count, X, BEFORE, EXACT)
        written = (by.to(tl.float32) * tl.exp2(r if REVERSE else after)).to(by.dtype)
        S = tl.dot(tl.trans(written), bz, S * tl.exp2(total)[:, None], input_precision=PRECISION)
        sum_of_totals += total

    nh = (n * heads + h).to(tl.int64)
    slot = segment if REVERSE else segment + 1
    cell = ix[:, None] * Z + iz[None, :]
    tl.store(states + (nh * (segments + 1) + slot) * X * Z + cell, S, mask=in_x[:, None] & in_z[None, :])
    tl.store(totals + (nh * segments + segment) * X + ix, sum_of_totals, mask=in_x & (s == 0))


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
        M = M * tl.exp2(total) + tl.load(slot, mask=inside, other=0.0)
        tl.store(slot, M, mask=inside)
    tl.store(last + nh * X * Z + cell, M, mask=inside)


@triton.jit(do_not_specialize=["heads"])
def channel_step(
    q, k, v, g, u, memory, o, heads,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, SLICES: tl.constexpr, BEFORE: tl.constexpr,
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
    fade = tl.exp(tl.load(g + row * K + ik, mask=in_k, other=0.0))
    after = M * fade[:, None] + bk[:, None] * bv[None, :]
    tl.store(cell, after, mask=in_cell)
    if BEFORE:
        weight = tl.load(u + row % heads * K + ik, mask=in_k, other=0.0)
        after = M + (weight * bk)[:, None] * bv[None, :]
    tl.store(o + row * V + iv, tl.sum(bq[:, None] * after, 0), mask=in_v)


# ------------------------------------------------------------------------------------------------ the launchers
# Tensors are contiguous, K and V multiples of 16, gates, bonus and memories float32. g : b t h K, u : None | h K.


def segments_for(q: Tensor, v: Tensor, sequences: int) -> int:
    """In how many segments to cut each sequence: two programs a multiprocessor, and at least 512 tokens a segment."""
    columns = min(CONFIG[padded(q.shape[-1]), q.element_size()][0], padded(v.shape[-1]))
    programs = sequences * q.shape[2] * triton.cdiv(v.shape[-1], columns)
    wanted = 2 * decay.multiprocessors(q.device) // max(programs, 1)
    return max(1, min(wanted, q.shape[0] * q.shape[1] // max(sequences, 1) // 512))


def shape_of(x: Tensor, z: Tensor, borders: Tensor | None, u: Tensor | None) -> dict:
    """The compile-time arguments of a sweep or span whose state is x's columns × z's columns."""
    X, Z = x.shape[-1], z.shape[-1]
    columns, warps, stages = CONFIG[padded(X), x.element_size()]
    columns = min(columns, padded(Z))
    sizes = {"X": X, "Z": Z, "BX": padded(X), "BZ": columns, "SLICES": triton.cdiv(Z, columns), "C": CHUNK}
    kind = {"BEFORE": u is not None, "PACKED": borders is not None, "EXACT": x.element_size() == 4, "PRECISION": "ieee"}
    return {**sizes, **kind, "num_warps": warps, "num_stages": stages}


def parts_of(tokens: int, sequences: int) -> int:
    """In how many parts each sequence is cut where chunks need not wait for each other: 64 tokens each; documents
    that share a row: four times as many as the average one has pieces of 64 tokens, since most programs are idle."""
    return min(triton.cdiv(tokens, 64), 4 * triton.cdiv(tokens, 64 * max(sequences, 1)))


def scores_of(q, k, g, u, borders) -> Tensor:
    """`channel_scores`: b t h C."""
    scores = q.new_empty(*q.shape[:3], CHUNK)
    n = sequences_of(q, borders)
    parts = parts_of(q.shape[1], n)
    decay.launch(
        channel_scores, n * q.shape[2] * parts, q, k, g, u, borders, scores, q.shape[1], q.shape[2], parts,
        K=q.shape[-1], BK=padded(q.shape[-1]), C=CHUNK, BEFORE=u is not None, PACKED=borders is not None,
        num_warps=1 if q.shape[-1] <= 128 else 2,
    )  # fmt: skip
    return scores


def values(x, y, z, g, u, scores, borders, entry, end=None, *, segments=1, slots=1, reverse=False, wide=False):
    """`channel_values`: o, or dv. `end` receives the last state."""
    shape = shape_of(x, z, borders, u)
    out = torch.empty_like(z, dtype=torch.float32 if wide else z.dtype)
    decay.launch(
        channel_values, shape["SLICES"] * segments * z.shape[2] * sequences_of(x, borders),
        x, y, z, g, scores, borders, entry, out, end, x.shape[1], x.shape[2], segments, slots,
        **shape, REVERSE=reverse, ENTRY=entry is not None, END=end is not None,
    )  # fmt: skip
    return out


def pairs(do, q, k, v, g, u, borders) -> tuple[Tensor, Tensor, Tensor]:
    """`channel_pairs`: the parts of dq and dk, b t h K each, and own, b t h."""
    K, V = q.shape[-1], v.shape[-1]
    dq, dk, own = torch.empty_like(q), torch.empty_like(k), g.new_empty(q.shape[:3])
    n, block = sequences_of(q, borders), min(64, padded(K))
    parts, slices = parts_of(q.shape[1], n), triton.cdiv(K, block)
    decay.launch(
        channel_pairs, n * q.shape[2] * parts * slices, do, q, k, v, g, borders, dq, dk, own,
        q.shape[1], q.shape[2], parts,
        K=K, V=V, BK=block, BV=padded(V), SLICES=slices, C=CHUNK, BEFORE=u is not None, PACKED=borders is not None,
        EXACT=q.element_size() == 4, PRECISION="ieee", num_warps=2, num_stages=2,
    )  # fmt: skip
    return dq, dk, own


def keys(x, y, z, w, g, u, own, borders, entry, memory, out, dg=None, du=None, *, segments=1, slots=1, reverse=False):
    """`channel_keys`: adds the rest to dq, or dk, in `out`."""
    shape = shape_of(x, z, borders, u)
    decay.launch(
        channel_keys, shape["SLICES"] * segments * z.shape[2] * sequences_of(x, borders),
        x, y, z, w, g, u, own, borders, entry, memory, out, dg, du, x.shape[1], x.shape[2], segments, slots,
        **shape, REVERSE=reverse, ENTRY=entry is not None, GATES=dg is not None, BONUS=du is not None,
    )  # fmt: skip


def between(y, z, g, u, borders, first, segments, reverse=False) -> tuple[Tensor, Tensor]:
    """The memories between segments (n h segments+1 K V) and the one at the far end (n h K V), from `first`."""
    n, h, K, V = sequences_of(y, borders), *y.shape[2:], z.shape[-1]
    states = y.new_empty(n, h, segments + 1, K, V, dtype=torch.float32)
    totals = y.new_empty(n, h, segments, K, dtype=torch.float32)
    last = torch.empty_like(states[:, :, 0])
    shape = shape_of(y, z, borders, u)
    decay.launch(
        channel_span, shape["SLICES"] * segments * h * n, y, z, g, borders, states, totals, y.shape[1], h, segments,
        **shape, REVERSE=reverse,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(K * V))
    blocks = triton.cdiv(K * V, block)
    decay.launch(
        channel_fold, n * h * blocks, states, totals, first, last, segments,
        X=K, Z=V, BLOCK=block, BLOCKS=blocks, REVERSE=reverse, FIRST=first is not None,
    )  # fmt: skip
    return states, last


def forward(q, k, v, g, u, memory, borders, segments: int, wide: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments: nothing when there is one, scores). `wide`: o in float32."""
    scores = scores_of(q, k, g, u, borders)
    if segments > 1:
        states, last = between(k, v, g, u, borders, memory, segments)
        run = {"segments": segments, "slots": segments + 1}
        return values(q, k, v, g, u, scores, borders, states, wide=wide, **run), last, states, scores
    last = q.new_empty(sequences_of(q, borders), *q.shape[2:], v.shape[-1], dtype=torch.float32)
    o = values(q, k, v, g, u, scores, borders, memory, last, wide=wide)
    return o, last, last.new_empty(0), scores


def backward(do, dlast, q, k, v, g, u, memory, borders, last, states, scores, want_g: bool, want_u: bool):
    """(dq, dk, dv, dg, du, dmemory) from the cotangents of o and of the last memory (None: zeros); dg and du are None
    unless wanted."""
    cut = states.numel() > 0
    segments = states.shape[2] - 1 if cut else 1
    run = {"segments": segments, "slots": segments + 1 if cut else 1}
    if cut:
        cotangents, dmemory = between(q, do, g, u, borders, dlast, segments, reverse=True)
        start, end, far, stop = states, states[:, :, 1:], cotangents[:, :, 1:], None
    else:
        dmemory = torch.empty_like(last)
        start, end, far, stop = memory, last, dlast, dmemory
    dv = values(k, q, do, g, u, scores, borders, far, stop, reverse=True, **run)
    dq, dk, own = pairs(do, q, k, v, g, u, borders)
    dg = torch.empty_like(g) if want_g else None
    du = g.new_empty(last.shape[0], q.shape[2], segments, q.shape[-1]) if want_u else None
    keys(do, v, k, q, g, u, own, borders, start, None, dq, dg, **run)
    keys(v, do, q, k, g, u, own, borders, far, end, dk, dg, du, reverse=True, **run)
    return dq, dk, dv, dg, du if du is None else du.sum((0, 2)), dmemory


def step(q, k, v, g, u, memory) -> Tensor:
    """o : b h V in float32 of one token a sequence, q k g : b h K, v : b h V, u : None | h K; overwrites memory."""
    b, h, K = q.shape
    V = v.shape[-1]
    columns = min(32, padded(V))
    o = torch.empty_like(v, dtype=torch.float32)
    slices = triton.cdiv(V, columns)
    decay.launch(
        channel_step, b * h * slices, q, k, v, g, u, memory, o, h,
        K=K, V=V, BK=padded(K), BV=columns, SLICES=slices, BEFORE=u is not None, num_warps=4,
    )  # fmt: skip
    return o
