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

Inside a chunk no split q e^{b} · k e^{-b} is safe: under strong gates the second factor has no bound. Pairs of tokens
belong to two kernels that know nothing of the state and run for all chunks at once. `channel_scores` makes A, key by
key: on the way from key j to key j - 1 all queries from j on fade by e^{g_j}, so what starts as q is right for every
key in its turn. `channel_pairs` makes the two sums of dq and dk with j < i by halves, as `reference/chunked.py` does:
queries of the later half meet keys of the earlier at the middle, both decayed towards it.

Gates. No exponent is ever positive and none is a difference: each is a sum of the gates that lie between, so any g in
[-inf, 0] is right and finite. As in `decay.py` a gate is raised to FLOOR first. For 16-bit tokens those sums are
products of float16 numbers with zeros and ones, right to 2^-22 of the largest gate.

The gate's gradient is dg_t = <e^{g_t} M_{t-1}, D_t> by row of the memory, and with M and D after any later token (dq',
dk': without a token's own pair, which is in both and cancels)

    dg_t = <M, D> + Σ_{s >= t} (q_s dq'_s - k_s dk'_s)        read before the write: q dq' from s > t

Rounding errors of 16-bit products add up along that sum, in each channel for itself: begun at the end of 2048 tokens
they leave the error budget (1.6 of it; float16, K = V = 64), over STRETCH = 512 tokens they do not (0.8). So o's sweep
keeps M at the end of every stretch, 1/2 U in all, and dk's sweep, which has D there, begins the sum anew;
`channel_keys` leaves q dq' where dg will be, and, running backwards, turns it into dg, before dq and dk are rounded.
A token's own pair P_tt comes in afterwards: dq += P_tt k, dk += P_tt q (times u), du = Σ_t P_tt q_t k_t.

Bytes and operations. In U = one b t h d tensor in 16 bits, K = V = d = 128, gates (2 U) in float32: scores read 4 U and
write 1/8, the forward sweep reads 5 (and k's gates twice) and writes 1; backward, dv moves 6, the pairs 8, dq 9 (the
pairs' part and q dq' among them) and dk 11: 44 U where the floor is 6 forward and 11 more backward. Kept for the
gradient: A, 16 numbers a token and head, the stretches' memories where a gate's gradient is wanted, and what `decay.py`
keeps; needed on the way: P_tt, 1 number a token and head.
A chunk costs scores 2·C²·K multiply-adds off the tensor cores, and on them: a sweep 2·C·K·BZ and C² for each gate read,
pairs 2·C²·V and C² (2 gates and 2 gradients) for each of four levels and K channels.

Compilers: what `decay.py` says, so no dot's result is transposed on its way into another dot (hence y and its gates
K × C in `channel_values`; what the compiler transposes are loaded tensors alone), and no 16-bit line of CONFIG has one
stage. By the machine code for sm_90 of Triton 3.6.0 and 3.7.1 (16 bits, K = V = 128): nothing spills; scans instead of
products made the loop of `channel_values` a fifth longer, pairs taken one by one that of `channel_pairs` two to three
times as long. The lines of CONFIG for K = 128 in 16 bits are chosen by times on an H100 (bench/LOG.md), the others by
such counts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay
from fast.kernels.decay import FLOOR, LOG2_E, padded, part_of, run_of, sequences_of

NOTHING = tl.constexpr(-150.0)  # 2^-150 is 0 in float32

CHUNK = 16
STRETCH = 512  # tokens over which the gate's gradient is summed from one exact value

# padded row size of the state, bytes of a number -> (columns of the output a program, warps, stages)
CONFIG = {
    (16, 2): (16, 4, 2),
    (32, 2): (32, 4, 2),
    (64, 2): (32, 4, 2),
    (128, 2): (32, 4, 3),
    (256, 2): (16, 4, 2),
    (16, 4): (16, 4, 1),
    (32, 4): (32, 4, 1),
    (64, 4): (32, 8, 1),
    (128, 4): (32, 8, 1),
    (256, 4): (16, 8, 1),
}
# where sequences are cut in segments: `channel_span` then costs as much as a sweep, and less in fewer, wider slices
CUT = {(128, 2): (128, 8, 2)}


@triton.jit
def gates_of(g, at, ok):
    """Gates in units of log 2, so that exp2 follows; 0 where there is no token."""
    gate = tl.load(g + at, mask=ok, other=0.0)
    return tl.maximum(gate, FLOOR, propagate_nan=tl.PropagateNan.ALL) * LOG2_E


@triton.jit
def added(which, gates, EXACT: tl.constexpr):
    """Sums of gates, C × K, as a product with zeros and ones: a scan is shuffles between threads, a product is not.

    For 16-bit tokens a gate is two float16, 22 bits of it. A gate that is not a number spoils its chunk's channel.
    """
    if EXACT:
        return tl.dot(which.to(tl.float32), gates, input_precision="ieee")
    which = which.to(tl.float16)
    rough = gates.to(tl.float16)
    rest = tl.dot(which, (gates - rough.to(tl.float32)).to(tl.float16))
    return tl.dot(which, rough, rest)


@triton.jit
def until(here, other, BEFORE: tl.constexpr):
    """Whether the gate of token `other` counts in r of token `here`."""
    return other < here if BEFORE else other <= here


@triton.jit
def writes_of(y, gates, ic, BEFORE: tl.constexpr, REVERSE: tl.constexpr, EXACT: tl.constexpr):
    """y e^{b_C - b}, REVERSE: y e^r, from y and gates that are K × C, as is the result: no dot's result is transposed
    on its way into another dot."""
    here, other = ic[None, :], ic[:, None]
    which = until(here, other, BEFORE) if REVERSE else other > here
    if EXACT:
        total = tl.dot(gates, which.to(tl.float32), input_precision="ieee")
    else:
        which = which.to(tl.float16)
        rough = gates.to(tl.float16)
        rest = tl.dot((gates - rough.to(tl.float32)).to(tl.float16), which)
        total = tl.dot(rough, which, rest)
    return (y.to(tl.float32) * tl.exp2(total)).to(y.dtype)


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
    x, y, z, g, scores, borders, entry, out, end, marks, tokens, heads, segments, slots,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    BEFORE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, END: tl.constexpr, MARKS: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """One slice of o (x y z = q k v) over a segment of one head of one sequence; REVERSE: of dv (k q do).

    With MARKS the states at the borders of stretches are kept, at their row over STRETCH (`marks_of`). Reads x and y,
    its slice of z, gates and scores; writes its slice of out. 2·C·X·BZ + C·C·BZ multiply-adds a chunk.
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
    across_x = ix[:, None] + ic[None, :] * (heads * X)
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    if REVERSE:
        at_scores = ic[:, None] + ic[None, :] * (heads * C)
    else:
        at_scores = ic[:, None] * (heads * C) + ic[None, :]
    stretches = tl.cdiv(stop - first, STRETCH)
    for stretch in range(0, stretches):
        origin = first + (stretches - 1 - stretch if REVERSE else stretch) * STRETCH
        chunks = tl.cdiv(tl.minimum(stop - origin, STRETCH), C)
        if MARKS:
            mark = ((start + origin) // STRETCH * heads + h) * X * Z
            tl.store(marks + mark + cell, S, mask=in_cell & (stretch > 0))
        for i in range(0, chunks):
            begin = origin + (chunks - 1 - i if REVERSE else i) * C
            count = tl.minimum(stop - begin, C)
            inside = ic < count
            row = (start + begin) * heads + h
            bx = tl.load(x + row * X + at_x, mask=inside[:, None] & in_x[None, :], other=0.0)
            across = in_x[:, None] & inside[None, :]
            by = tl.load(y + row * X + across_x, mask=across, other=0.0)
            bz = tl.load(z + row * Z + at_z, mask=inside[:, None] & in_z[None, :], other=0.0)
            A = tl.load(scores + row * C + at_scores, mask=inside[:, None] & inside[None, :], other=0.0)
            gates = gates_of(g, row * X + at_x, inside[:, None] & in_x[None, :])
            which = ic[None, :] > ic[:, None] if REVERSE else until(ic[:, None], ic[None, :], BEFORE)
            reading = added(which, gates, EXACT)
            seen = (bx.to(tl.float32) * tl.exp2(reading)).to(bx.dtype)
            o = tl.dot(seen, S.to(bx.dtype), input_precision=PRECISION)
            o = tl.dot(A, bz, o, input_precision=PRECISION)
            gates = gates_of(g, row * X + across_x, across)
            written = writes_of(by, gates, ic, BEFORE, REVERSE, EXACT)
            S = tl.dot(written, bz, S * tl.exp2(tl.sum(gates, 1))[:, None], input_precision=PRECISION)
            tl.store(out + row * Z + at_z, o, mask=inside[:, None] & in_z[None, :])

    if END:
        tl.store(end + nh * X * Z + cell, S, mask=in_cell)


@triton.jit
def to_middle(gates, ic, half: tl.constexpr, BEFORE: tl.constexpr, EXACT: tl.constexpr):
    """e^{sum of the gates between a token and the middle of its block of 2·half tokens}: C × K, at most 1.

    From the middle on: up to and with the token's own gate (BEFORE: without); before the middle: after the token.
    """
    here, other = ic[:, None], ic[None, :]
    middle = here // (2 * half) * (2 * half) + half
    later = (other >= middle) & until(here, other, BEFORE)
    return tl.exp2(added(tl.where(here >= middle, later, (other > here) & (other < middle)), gates, EXACT))


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
    x, y, z, w, g, u, own, borders, entry, memory, marks, out, dg, du, tokens, heads, segments, slots,
    X: tl.constexpr, Z: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    BEFORE: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ENTRY: tl.constexpr, GATES: tl.constexpr, BONUS: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """One slice of dq (x y z w = do v k q) over a segment of one head of one sequence; REVERSE: of dk (v do q k).

    `out` holds what `channel_pairs` found, and the rest is added. With GATES the forward run leaves q dq' in dg, which
    the run backwards replaces by dg; its sums start from <M, D> at the segment's end (`memory`, and `entry` of that
    run) and at the end of every stretch (`marks`, and the state), and are float64 where EXACT. With BONUS du of this
    segment: n h segments K. 2·C·X·BZ multiply-adds a chunk.
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
    turned = ix[:, None] + iz[None, :] * X  # the state lies transposed in memory
    cell = (nh * slots + segment) * X * Z + turned
    in_cell = in_x[:, None] & in_z[None, :]
    wide = tl.float64 if EXACT else tl.float32
    if ENTRY:
        S = tl.load(entry + cell, mask=in_cell, other=0.0)
    else:
        S = tl.zeros((BX, BZ), tl.float32)
    later = tl.zeros((C, BZ), wide)  # in every row the same
    if GATES and REVERSE and ENTRY:
        later += tl.sum((S * tl.load(memory + cell, mask=in_cell, other=0.0)).to(wide), 0)[None, :]
    weight = tl.full((BZ,), 1.0, tl.float32)
    if BEFORE:
        weight = tl.load(u + h * Z + iz, mask=in_z, other=0.0)
    bonus = tl.zeros((BZ,), tl.float32)

    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    stretches = tl.cdiv(stop - first, STRETCH)
    for stretch in range(0, stretches):
        origin = first + (stretches - 1 - stretch if REVERSE else stretch) * STRETCH
        chunks = tl.cdiv(tl.minimum(stop - origin, STRETCH), C)
        if GATES and REVERSE:  # noqa: SIM102 (known to the compiler, what follows is not)
            if stretch > 0:
                mark = ((start + origin + STRETCH) // STRETCH * heads + h) * X * Z
                M = tl.load(marks + mark + turned, mask=in_cell, other=0.0)
                later = tl.zeros((C, BZ), wide) + tl.sum((S * M).to(wide), 0)[None, :]
        for i in range(0, chunks):
            begin = origin + (chunks - 1 - i if REVERSE else i) * C
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
            gates = gates_of(g, row * Z + at_z, in_rows_z)
            reading = added(until(ic[:, None], ic[None, :], BEFORE), gates, EXACT)
            writing = added(ic[None, :] > ic[:, None], gates, EXACT)
            if REVERSE:
                reading, writing = writing, reading
            own_z = bz.to(tl.float32) * itself[:, None]
            written = (bz.to(tl.float32) * tl.exp2(writing)).to(bz.dtype)
            o = tl.dot(bx, S.to(bx.dtype), input_precision=PRECISION) * tl.exp2(reading) + pairs
            S = tl.dot(tl.trans(by), written, S * tl.exp2(tl.sum(gates, 0))[None, :], input_precision=PRECISION)
            if GATES:
                change = bw * o
                if REVERSE:
                    change = asked.to(wide) - change.to(wide)
                    if EXACT:
                        value = later + tl.cumsum(change, 0, reverse=True)
                        later += tl.sum(change, 0)[None, :]
                    else:  # sums over rows are shuffles, products are not
                        value = tl.dot((ic[:, None] <= ic[None, :]).to(wide), change, later, input_precision="tf32x3")
                        later = tl.dot(tl.full((C, C), 1.0, wide), change, later, input_precision="tf32x3")
                    if BEFORE:
                        value -= asked.to(wide)
                    change = tl.where(gates < NOTHING, 0.0, value.to(tl.float32))
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
        across_x = row * X + ix[:, None] + ic[None, :] * (heads * X)
        at_z = row * Z + ic[:, None] * (heads * Z) + iz[None, :]
        across = in_x[:, None] & inside[None, :]
        by = tl.load(y + across_x, mask=across, other=0.0)
        bz = tl.load(z + at_z, mask=inside[:, None] & in_z[None, :], other=0.0)
        gates = gates_of(g, across_x, across)
        written = writes_of(by, gates, ic, BEFORE, REVERSE, EXACT)
        total = tl.sum(gates, 1)
        S = tl.dot(written, bz, S * tl.exp2(total)[:, None], input_precision=PRECISION)
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

    def fit(cut: bool) -> int:
        columns = min(line_of(padded(q.shape[-1]), q.element_size(), cut)[0], padded(v.shape[-1]))
        programs = sequences * q.shape[2] * triton.cdiv(v.shape[-1], columns)
        return 2 * decay.multiprocessors(q.device) // max(programs, 1)

    wanted = fit(cut=True) if fit(cut=False) > 1 else 1
    return max(1, min(wanted, q.shape[0] * q.shape[1] // max(sequences, 1) // 512))


def line_of(size: int, width: int, cut: bool) -> tuple[int, int, int]:
    return CUT.get((size, width), CONFIG[size, width]) if cut else CONFIG[size, width]


def shape_of(x: Tensor, z: Tensor, borders: Tensor | None, u: Tensor | None, segments: int) -> dict:
    """The compile-time arguments of a sweep or span whose state is x's columns × z's columns."""
    X, Z = x.shape[-1], z.shape[-1]
    columns, warps, stages = line_of(padded(X), x.element_size(), segments > 1)
    columns = min(columns, padded(Z))
    sizes = {"X": X, "Z": Z, "BX": padded(X), "BZ": columns, "SLICES": triton.cdiv(Z, columns), "C": CHUNK}
    kind = {"BEFORE": u is not None, "PACKED": borders is not None, "EXACT": x.element_size() == 4, "PRECISION": "ieee"}
    return {**sizes, **kind, "num_warps": warps, "num_stages": stages}


def scores_of(q, k, g, u, borders) -> Tensor:
    """`channel_scores`: b t h C."""
    scores = q.new_empty(*q.shape[:3], CHUNK)
    n = sequences_of(q, borders)
    parts = decay.parts_of(q, borders)
    decay.launch(
        channel_scores, n * q.shape[2] * parts, q, k, g, u, borders, scores, q.shape[1], q.shape[2], parts,
        K=q.shape[-1], BK=padded(q.shape[-1]), C=CHUNK, BEFORE=u is not None, PACKED=borders is not None,
        num_warps=1 if q.shape[-1] <= 128 else 2,
    )  # fmt: skip
    return scores


def values(
    x, y, z, g, u, scores, borders, entry, end=None, marks=None, *, segments=1, slots=1, reverse=False, wide=False
) -> Tensor:
    """`channel_values`: o, or dv. `end` receives the last state, `marks` those at the borders of stretches."""
    shape = shape_of(x, z, borders, u, segments)
    out = torch.empty_like(z, dtype=torch.float32 if wide else z.dtype)
    decay.launch(
        channel_values, shape["SLICES"] * segments * z.shape[2] * sequences_of(x, borders),
        x, y, z, g, scores, borders, entry, out, end, marks, x.shape[1], x.shape[2], segments, slots,
        **shape, REVERSE=reverse, ENTRY=entry is not None, END=end is not None, MARKS=marks is not None,
        STRETCH=STRETCH,
    )  # fmt: skip
    return out


def pairs(do, q, k, v, g, u, borders) -> tuple[Tensor, Tensor, Tensor]:
    """`channel_pairs`: the parts of dq and dk, b t h K each, and own, b t h."""
    K, V = q.shape[-1], v.shape[-1]
    dq, dk, own = torch.empty_like(q), torch.empty_like(k), g.new_empty(q.shape[:3])
    exact = q.element_size() == 4
    n, block = sequences_of(q, borders), min(32 if exact else 64, padded(K))
    parts, slices = decay.parts_of(q, borders), triton.cdiv(K, block)
    decay.launch(
        channel_pairs, n * q.shape[2] * parts * slices, do, q, k, v, g, borders, dq, dk, own,
        q.shape[1], q.shape[2], parts,
        K=K, V=V, BK=block, BV=padded(V), SLICES=slices, C=CHUNK, BEFORE=u is not None, PACKED=borders is not None,
        EXACT=exact, PRECISION="ieee", num_warps=4 if exact else 2, num_stages=1 if exact else 2,
    )  # fmt: skip
    return dq, dk, own


def keys(
    x, y, z, w, g, u, own, borders, entry, memory, marks, out, dg=None, du=None, *, segments=1, slots=1, reverse=False
) -> None:
    """`channel_keys`: adds the rest to dq, or dk, in `out`."""
    shape = shape_of(x, z, borders, u, segments)
    decay.launch(
        channel_keys, shape["SLICES"] * segments * z.shape[2] * sequences_of(x, borders),
        x, y, z, w, g, u, own, borders, entry, memory, marks, out, dg, du, x.shape[1], x.shape[2], segments, slots,
        **shape, REVERSE=reverse, ENTRY=entry is not None, GATES=dg is not None, BONUS=du is not None, STRETCH=STRETCH,
    )  # fmt: skip


def between(y, z, g, u, borders, first, segments, reverse=False) -> tuple[Tensor, Tensor]:
    """The memories between segments (n h segments+1 K V) and the one at the far end (n h K V), from `first`."""
    n, h, K, V = sequences_of(y, borders), *y.shape[2:], z.shape[-1]
    states = y.new_empty(n, h, segments + 1, K, V, dtype=torch.float32)
    totals = y.new_empty(n, h, segments, K, dtype=torch.float32)
    last = torch.empty_like(states[:, :, 0])
    shape = shape_of(y, z, borders, u, segments)
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


def marks_of(q: Tensor, v: Tensor, keep: bool) -> tuple[int, ...]:
    """The shape of the memories kept for the gate's gradient. Borders of stretches that lie inside a sequence are
    STRETCH rows apart, also from those of its neighbours: their rows over STRETCH are a place of their own."""
    b, t, h, K = q.shape
    return (triton.cdiv(b * t, STRETCH), h, K, v.shape[-1]) if keep else (0,)


def forward(q, k, v, g, u, memory, borders, segments: int, wide: bool, keep: bool) -> tuple[Tensor, ...]:
    """(o, the last memory, the memories between segments: nothing when there is one, scores, marks). `wide`: o in
    float32. `keep`: the gate's gradient will be wanted, so that marks are not empty."""
    scores = scores_of(q, k, g, u, borders)
    last = q.new_empty(sequences_of(q, borders), *q.shape[2:], v.shape[-1], dtype=torch.float32)
    marks = last.new_empty(marks_of(q, v, keep))
    states, run, start, end = last.new_empty(0), {}, memory, last
    if segments > 1:
        states, last = between(k, v, g, u, borders, memory, segments)
        run, start, end = {"segments": segments, "slots": segments + 1}, states, None
    o = values(q, k, v, g, u, scores, borders, start, end, marks if keep else None, wide=wide, **run)
    return o, last, states, scores, marks


def backward(do, dlast, q, k, v, g, u, memory, borders, last, states, scores, marks, want_g: bool, want_u: bool):
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
    keys(do, v, k, q, g, u, own, borders, start, None, None, dq, dg, **run)
    keys(v, do, q, k, g, u, own, borders, far, end, marks, dk, dg, du, reverse=True, **run)
    return dq, dk, dv, dg, du if du is None else du.sum((0, 2)), dmemory


def step(q, k, v, g, u, memory) -> Tensor:
    """o : b h V in float32 of one token a sequence, q k g : b h K, v : b h V, u : None | h K; overwrites memory."""
    return decay.one_token(channel_step, (q, k, v, g, u, memory), v, q.shape[1], BEFORE=u is not None)
