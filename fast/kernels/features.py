"""Triton kernels for memories of polynomial features: M_t = M_{t-1} + φ(k_t)ᵀ v_t, o_t = φ(q_t) M_t.

φ(q)·φ(k) is a polynomial w of s = q·k / √D: 1 + s + s²/2 (TAYLOR) or s² (SQUARES). So pairs within a chunk need no
features: their weight is w(s). Only what goes from chunk to chunk does: F = 1 + D + D (D + 1) / 2 rows of a memory, or
D (D + 1) / 2, in the reference's order. The constant is a sum over tokens, linear features are x itself, and products

    φ_f = c_f x_{i(f)} x_{j(f)}        i <= j, c² = 1/D or, where i = j, half of that (SQUARES: twice both)

are made where they are needed and never written to memory: x_{i(f)} of all f is x times a matrix of zeros and ones,
exact in any precision, two small products of tensor cores. The same matrices turned over take dφ back to dx. c stays
out of what is rounded to 16 bits: the state in registers is a memory over c, and is read times c².

As in `fast/kernels/decay.py` the output and the gradients are sweeps, in chunks of C tokens from the state S before a
chunk:

    features_sweep        out = φ(x) S + tril(w) z                                          S <- S + φ(y)ᵀ z
        o     x = q    y = k    z = v      forwards     the state is M
        dv    x = k    y = q    z = do     backwards    the state is dM, triu for tril
    features_gradients    out = (a Sᵀ) dφ/dx                                                S <- S + φ(y)ᵀ z
        dq    x = q    y = k    a = do   z = v      forwards     the state is M
        dk    x = k    y = q    a = v    z = do     backwards    the state is dM
    features_pairs        dq += E k, dk += Eᵀ q                 E = tril(w'(s) / √D ⊙ (do vᵀ))

A weighted mean has two columns of ones beside v, so that sums of weights come with the values; `features_quotient`
divides. Backwards the second of them has what the first one's gradient loses to 16 bits: as `fast/kernels/decay.py`
says of means, what cancels in dq must be rounded alike, and what a row of E loses goes with the token's own key.

A program owns a slice of z's columns and streams through time. The number of products is no power of two (136 for
D = 16): the state has three blocks of them (64, 64 and 16), which is also what registers hold at a time. dq and dk of a
slice are parts that are summed afterwards: D columns are few. Long sequences of few heads are cut in segments: what a
segment does to a memory is `features_sweep` without its output, and `decay_fold` makes the memories between them.

Bytes and operations. In U = one b t h V tensor: a sweep reads U and writes U, gradients read 2 U and so do pairs: 10 U
with all five, against a floor of 2 + 3, and 8 more where a mean is divided (o of the sweep is in float32); and q, k of
D columns each for every slice (from the L2 cache), and D float32 numbers a slice for each gradient, twice. The four
sweeps do, a token and head, 2·F·V multiply-adds for the state and, in each slice, 4·D·F (gradients 6·D·F) for features.

Outputs of float32 tokens are sums of products that are each found first: a query's gradient of Based is what is left of
terms that cancel, and had 1.15 of the error budget where features' products went on from where pairs' had stopped.

Compilers. See `fast/kernels/decay.py`: no result of a dot is transposed, so φ(y)ᵀ is made as such by matrices turned
over, and the gradients keep their state transposed; 16-bit lines have at least 2 stages; rows of q, k and z are
multiples of 16; what changes from call to call is not specialised. With 8 warps and chunks of 64 tokens Triton 3.7 has
both groups of four warps compute the same products. Matrices of zeros and ones stay in shared memory; numbers that
belong to columns of features would be kept in registers over the whole loop, and spill: there are none in it.

Triton 3.6 and 3.7 leave the last products of a turn of the loop running into the next one, also where z has one buffer
only (it is read into registers, too, by the product with REST): so the next z was written over the one that they still
read, and some outputs beyond the first chunk were off by 1 to 6 %, other ones in every run (SQUARES, H200, 207 heads;
compute-sanitizer sees nothing). What uses S within the turn makes it wait. `tests/hopper.py` looks for such products
in whatever is compiled. Not seen since, with as many heads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay
from fast.kernels.decay import (
    cdiv,
    chunk_of,
    chunks_of,
    decay_fold,
    multiprocessors,
    next_power_of_2,
    padded,
    plus_product,
    rows_at_once,
    rows_of,
    sequences_of,
    stretch_of,
    through_quotient,
)

SQUARES, TAYLOR = 0, 1  # the polynomials
LARGEST = 32  # D


@triton.jit
def pair_of(f, D: tl.constexpr):
    """(i, j) of products f; -1, which picks nothing, beyond the last.

    Pairs i <= j stand row by row, row i from i D - i (i - 1) / 2: i is a root, found with room for its rounding.
    """
    root = tl.sqrt(tl.maximum((2 * D + 1) * (2 * D + 1) - 8 * f, 0).to(tl.float32))
    i = ((2 * D + 1 - root) * 0.5 + 0.01).to(tl.int32)
    j = f - i * D + i * (i - 1) // 2 + i
    there = f < D * (D + 1) // 2
    return tl.where(there, i, -1), tl.where(there, j, -1)


@triton.jit
def place_of(f, D: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """(row, c, there) of products f: where one stands in a memory, c in φ_f = c x_i x_j, whether there is one."""
    i, j = pair_of(f, D)
    if POLYNOMIAL == 1:
        return f + 1 + D, tl.where(i == j, (2 * D) ** -0.5, D**-0.5), j >= 0
    else:
        return f, tl.where(i == j, D**-0.5, (0.5 * D) ** -0.5), j >= 0


@triton.jit
def picked(x, index, X: tl.constexpr):
    """x_{index} : C × features, in float32; of float32 tokens, which no tensor core multiplies, by a gather."""
    if x.dtype == tl.float32:
        at = tl.maximum(index, 0)[None, :] + tl.zeros((x.shape[0], 1), tl.int32)
        return tl.where(index[None, :] < 0, 0.0, tl.gather(x, at, 1))
    pick = (tl.arange(0, X)[:, None] == index[None, :]).to(x.dtype)
    return tl.dot(x, pick, input_precision="ieee")


@triton.jit
def picked_across(x, index, X: tl.constexpr):
    """`picked`, transposed: features × C."""
    if x.dtype == tl.float32:
        at = tl.maximum(index, 0)[:, None] + tl.zeros((1, x.shape[0]), tl.int32)
        return tl.where(index[:, None] < 0, 0.0, tl.gather(tl.trans(x), at, 0))
    pick = (index[:, None] == tl.arange(0, X)[None, :]).to(x.dtype)
    return tl.dot(pick, tl.trans(x), input_precision="ieee")


@triton.jit
def products(x, FIRST: tl.constexpr, B: tl.constexpr, D: tl.constexpr, X: tl.constexpr):
    """x_i x_j of B features : C × B, in x's dtype."""
    i, j = pair_of(FIRST + tl.arange(0, B), D)
    one = picked(x, i, X).to(x.dtype)  # exactly: half the registers
    return (one.to(tl.float32) * picked(x, j, X)).to(x.dtype)


@triton.jit
def products_across(x, FIRST: tl.constexpr, B: tl.constexpr, D: tl.constexpr, X: tl.constexpr):
    """`products`, transposed: B × C."""
    i, j = pair_of(FIRST + tl.arange(0, B), D)
    one = picked_across(x, i, X).to(x.dtype)
    return (one.to(tl.float32) * picked_across(x, j, X)).to(x.dtype)


@triton.jit
def through_products(dx, a, S, x, scale, FIRST: tl.constexpr, B: tl.constexpr, D: tl.constexpr, X: tl.constexpr):
    """dx and what B products add to it: C × X; a S is their cotangent, but for c².

    `scale` is c² of i < j; where i = j it is half as much, for each of two equal factors. Products go in x's dtype, as
    all others.
    """
    i, j = pair_of(FIRST + tl.arange(0, B), D)
    d = tl.dot(a, S.to(a.dtype), input_precision="ieee") * scale
    ix = tl.arange(0, X)
    share = tl.where(i == j, 0.5, 1.0)[:, None]
    to_i = tl.where(i[:, None] == ix[None, :], share, 0.0).to(x.dtype)
    to_j = tl.where(j[:, None] == ix[None, :], share, 0.0).to(x.dtype)
    dx = tl.dot((d * picked(x, j, X)).to(x.dtype), to_i, dx, input_precision="ieee")
    return tl.dot((d * picked(x, i, X)).to(x.dtype), to_j, dx, input_precision="ieee")


@triton.jit
def cells_of(
    FIRST: tl.constexpr, B: tl.constexpr, iz, in_z, Z: tl.constexpr, D: tl.constexpr, POLYNOMIAL: tl.constexpr
):
    """(where in a memory, times what, whether there at all) of B products × a slice of columns."""
    row, c, there = place_of(FIRST + tl.arange(0, B), D, POLYNOMIAL)
    return row[:, None] * Z + iz[None, :], c[:, None], there[:, None] & in_z[None, :]


@triton.jit
def read_across(
    memory, FIRST: tl.constexpr, B: tl.constexpr, iz, in_z, Z: tl.constexpr, D: tl.constexpr, POLYNOMIAL: tl.constexpr
):
    """A memory's B products × a slice of columns, transposed, over c."""
    row, c, there = place_of(FIRST + tl.arange(0, B), D, POLYNOMIAL)
    at, inside = row[None, :] * Z + iz[:, None], there[None, :] & in_z[:, None]
    return tl.div_rn(tl.load(memory + at, mask=inside, other=0.0), c[None, :])


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "ends", "shift"])
def features_sweep(
    x, y, z, borders, entry, out, end,
    tokens, heads, segments, slots, ends, shift,
    D: tl.constexpr, F: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, B: tl.constexpr, REST: tl.constexpr,
    BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, POLYNOMIAL: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr, ENTRY: tl.constexpr, OUT: tl.constexpr, END: tl.constexpr,
):  # fmt: skip
    """One slice of `out` over one segment of one head of one sequence, and the state at its end.

    Reads x and y (X columns) and its slice of z, writes its slice of out; without OUT the state alone (y and z are
    read). Products a chunk: 4·C·X·F for both features, 2·C·F·BZ for the state, C·C·(X + BZ) for pairs. The state is
    F × BZ float32 in registers, over c: S of products, L of x itself, K of the constant. It goes to `end`, slot
    `segment + shift` of `ends`.
    """
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)

    ix = tl.arange(0, X)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_z = iz < Z
    cell0, c0, in0 = cells_of(0, B, iz, in_z, Z, D, POLYNOMIAL)
    cell1, c1, in1 = cells_of(B, B, iz, in_z, Z, D, POLYNOMIAL)
    cell2, c2, in2 = cells_of(2 * B, REST, iz, in_z, Z, D, POLYNOMIAL)
    cell, inner = (1 + ix)[:, None] * Z + iz[None, :], (ix < D)[:, None] & in_z[None, :]
    nh = (n * heads + h).to(tl.int64)
    S0 = tl.zeros((B, BZ), tl.float32)
    S1 = tl.zeros((B, BZ), tl.float32)
    S2 = tl.zeros((REST, BZ), tl.float32)
    L = tl.zeros((X, BZ), tl.float32)
    K = tl.zeros((BZ,), tl.float32)
    if ENTRY:
        entry += (nh * slots + segment) * F * Z
        S0 = tl.div_rn(tl.load(entry + cell0, mask=in0, other=0.0), c0)
        S1 = tl.div_rn(tl.load(entry + cell1, mask=in1, other=0.0), c1)
        S2 = tl.div_rn(tl.load(entry + cell2, mask=in2, other=0.0), c2)
        if POLYNOMIAL == 1:
            L = tl.load(entry + cell, mask=inner, other=0.0) * D**0.25
            K = tl.load(entry + iz, mask=in_z, other=0.0)

    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    chunks = tl.cdiv(stop - first, C)
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C if REVERSE else first + i * C
        inside = begin + ic < stop
        row = (start + begin) * heads + h  # 64 bits for where a chunk begins, 32 within it
        in_rows = inside[:, None] & in_z[None, :]
        by = tl.load(y + row * X + at_x, mask=inside[:, None], other=0.0)
        bz = tl.load(z + row * Z + at_z, mask=in_rows, other=0.0)
        if OUT:
            bx = tl.load(x + row * X + at_x, mask=inside[:, None], other=0.0)
            scores = tl.dot(bx, tl.trans(by), input_precision="ieee") * D**-0.5
            scores = 1.0 + scores + 0.5 * scores * scores if POLYNOMIAL == 1 else scores * scores
            before = (ic[:, None] <= ic[None, :]) if REVERSE else (ic[:, None] >= ic[None, :])
            scores = tl.where(before, scores, 0.0)
            o = tl.dot(scores.to(bz.dtype), bz, input_precision="ieee")
            if POLYNOMIAL == 1:
                o = tl.dot(bx, (L * D**-0.5).to(bz.dtype), o, input_precision="ieee") + K[None, :]
            o = plus_product(o, products(bx, 2 * B, REST, D, X), (S2 * (c2 * c2)).to(bz.dtype), in_rows, "ieee")
            o = plus_product(o, products(bx, 0, B, D, X), (S0 * (c0 * c0)).to(bz.dtype), in_rows, "ieee")
            o = plus_product(o, products(bx, B, B, D, X), (S1 * (c1 * c1)).to(bz.dtype), in_rows, "ieee")
            tl.store(out + row * Z + at_z, o, mask=in_rows)
        S2 = tl.dot(products_across(by, 2 * B, REST, D, X), bz, S2, input_precision="ieee")
        S0 = tl.dot(products_across(by, 0, B, D, X), bz, S0, input_precision="ieee")
        S1 = tl.dot(products_across(by, B, B, D, X), bz, S1, input_precision="ieee")
        S0, S1 = tl.where(chunks > 0, S0, 0.0), tl.where(chunks > 0, S1, 0.0)  # waited for (Compilers)
        if POLYNOMIAL == 1:
            L = tl.dot(tl.trans(by), bz, L, input_precision="ieee")
            K += tl.sum(bz.to(tl.float32), 0)

    if END:
        end += (nh * ends + segment + shift) * F * Z
        tl.store(end + cell0, S0 * c0, mask=in0)
        tl.store(end + cell1, S1 * c1, mask=in1)
        tl.store(end + cell2, S2 * c2, mask=in2)
        if POLYNOMIAL == 1:
            tl.store(end + cell, L * D**-0.25, mask=inner)
            tl.store(end + iz, K, mask=in_z)


@triton.jit(do_not_specialize=["tokens", "heads", "segments", "slots", "count_rows"])
def features_gradients(
    x, y, a, z, borders, entry, parts,
    tokens, heads, segments, slots, count_rows,
    D: tl.constexpr, F: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, B: tl.constexpr, REST: tl.constexpr,
    BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr, POLYNOMIAL: tl.constexpr, REVERSE: tl.constexpr,
    PACKED: tl.constexpr, ENTRY: tl.constexpr,
):  # fmt: skip
    """What one slice of columns adds to the gradient of x, over one segment of one head of one sequence.

    Reads x and y (X columns), its slices of a and z; writes X float32 numbers a token. Products a chunk: 2·C·X·F for
    y's features, 4·C·X·F through x's, 2·C·F·BZ for the state, which lies transposed. Of a constant there is no
    gradient, and no state here. What comes from pairs within a chunk is added by `features_pairs`.
    """
    pid = tl.program_id(0)
    s, segment, h, n, start, first, stop = stretch_of(pid, borders, tokens, heads, segments, SLICES, PACKED)

    ix = tl.arange(0, X)
    iz = s * BZ + tl.arange(0, BZ)
    ic = tl.arange(0, C)
    in_z = iz < Z
    S0 = tl.zeros((BZ, B), tl.float32)
    S1 = tl.zeros((BZ, B), tl.float32)
    S2 = tl.zeros((BZ, REST), tl.float32)
    L = tl.zeros((BZ, X), tl.float32)
    if ENTRY:
        entry += ((n * heads + h).to(tl.int64) * slots + segment) * F * Z
        S0 = read_across(entry, 0, B, iz, in_z, Z, D, POLYNOMIAL)
        S1 = read_across(entry, B, B, iz, in_z, Z, D, POLYNOMIAL)
        S2 = read_across(entry, 2 * B, REST, iz, in_z, Z, D, POLYNOMIAL)
        if POLYNOMIAL == 1:
            inner = (ix < D)[None, :] & in_z[:, None]
            L = tl.load(entry + (1 + ix)[None, :] * Z + iz[:, None], mask=inner, other=0.0) * D**0.25

    scale: tl.constexpr = (1.0 if POLYNOMIAL == 1 else 2.0) / D
    at_x = ic[:, None] * (heads * X) + ix[None, :]
    at_z = ic[:, None] * (heads * Z) + iz[None, :]
    parts += s.to(tl.int64) * count_rows * X
    chunks = tl.cdiv(stop - first, C)
    for i in range(0, chunks):
        begin = first + (chunks - 1 - i) * C if REVERSE else first + i * C
        inside = begin + ic < stop
        row = (start + begin) * heads + h
        in_rows = inside[:, None] & in_z[None, :]
        bx = tl.load(x + row * X + at_x, mask=inside[:, None], other=0.0)
        by = tl.load(y + row * X + at_x, mask=inside[:, None], other=0.0)
        ba = tl.load(a + row * Z + at_z, mask=in_rows, other=0.0)
        bz = tl.load(z + row * Z + at_z, mask=in_rows, other=0.0)

        dx = tl.zeros((C, X), tl.float32)
        dx = through_products(dx, ba, S2, bx, scale, 2 * B, REST, D, X)
        dx = through_products(dx, ba, S0, bx, scale, 0, B, D, X)
        dx = through_products(dx, ba, S1, bx, scale, B, B, D, X)
        if POLYNOMIAL == 1:
            dx = tl.dot(ba, (L * D**-0.5).to(ba.dtype), dx, input_precision="ieee")
        tl.store(parts + row * X + at_x, dx, mask=inside[:, None])
        if POLYNOMIAL == 1:
            L = tl.dot(tl.trans(bz), by, L, input_precision="ieee")
        S2 = tl.dot(tl.trans(bz), products(by, 2 * B, REST, D, X), S2, input_precision="ieee")
        S0 = tl.dot(tl.trans(bz), products(by, 0, B, D, X), S0, input_precision="ieee")
        S1 = tl.dot(tl.trans(bz), products(by, B, B, D, X), S1, input_precision="ieee")


@triton.jit
def sloped(x, y, d, D: tl.constexpr, POLYNOMIAL: tl.constexpr):
    """d w'(s) / √D, s = x yᵀ / √D."""
    s = tl.dot(x, tl.trans(y), input_precision="ieee") * D**-0.5
    return (1.0 + s if POLYNOMIAL == 1 else 2.0 * s) * D**-0.5 * d


@triton.jit(do_not_specialize=["tokens", "heads", "sequences"])
def features_pairs(
    q, k, v, do, borders, dq, dk, tokens, heads, sequences,
    D: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, BZ: tl.constexpr, SLICES: tl.constexpr, C: tl.constexpr,
    POLYNOMIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """What pairs within one chunk of one head add to dq and dk: all chunks at once, and all columns of v.

    Reads q, k, v and do once, writes 2 X float32 numbers a token. 2·C·C·(V + 2 X) multiply-adds a chunk: the scores
    and their transposed ones are products each. Where an output is a ratio, what v and what its count give dq nearly
    cancels: they are added up before anything is rounded to 16 bits.
    """
    pid = tl.program_id(0)
    h = pid % heads
    _, start, begin, count = chunk_of(borders, pid // heads, tokens, sequences, C, PACKED)
    if count > 0:
        ic, ix = tl.arange(0, C), tl.arange(0, X)
        inside = (ic < count)[:, None]
        row = (start + begin) * heads + h
        at_x = ic[:, None] * (heads * X) + ix[None, :]
        bq = tl.load(q + row * X + at_x, mask=inside, other=0.0)
        bk = tl.load(k + row * X + at_x, mask=inside, other=0.0)
        d = tl.zeros((C, C), tl.float32)
        across = tl.zeros((C, C), tl.float32)
        for s in range(0, SLICES):
            iz = s * BZ + tl.arange(0, BZ)
            at_z = row * Z + ic[:, None] * (heads * Z) + iz[None, :]
            bv = tl.load(v + at_z, mask=inside & (iz < Z)[None, :], other=0.0)
            bdo = tl.load(do + at_z, mask=inside & (iz < Z)[None, :], other=0.0)
            d = tl.dot(bdo, tl.trans(bv), d, input_precision="ieee")
            across = tl.dot(bv, tl.trans(bdo), across, input_precision="ieee")
        d = tl.where(ic[:, None] >= ic[None, :], sloped(bq, bk, d, D, POLYNOMIAL), 0.0)
        across = tl.where(ic[:, None] <= ic[None, :], sloped(bk, bq, across, D, POLYNOMIAL), 0.0)
        more = tl.dot(d.to(bk.dtype), bk, input_precision="ieee")
        if bk.dtype != tl.float32:  # what a row loses goes with the token's own key: of a ratio a row nearly cancels
            more += tl.sum(d - d.to(bk.dtype).to(tl.float32), 1)[:, None] * bk.to(tl.float32)
        tl.store(dq + row * X + at_x, more, mask=inside)
        tl.store(dk + row * X + at_x, tl.dot(across.to(bq.dtype), bq, input_precision="ieee"), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def features_quotient(x, o, rows, least, V: tl.constexpr, BV: tl.constexpr, Z: tl.constexpr, N: tl.constexpr):
    """o = x / (weights + least) of V columns; the weights' sums are x's next one. Reads x in float32, writes o: 3 U."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    iv = tl.arange(0, BV)
    ok = (row < rows)[:, None] & (iv < V)[None, :]
    by = tl.load(x + row * Z + V, mask=row < rows, other=1.0) + least
    value = tl.load(x + row[:, None] * Z + iv[None, :], mask=ok, other=0.0) / by[:, None]
    tl.store(o + row[:, None] * V + iv[None, :], value, mask=ok)


@triton.jit(do_not_specialize=["rows"])
def features_quotient_gradients(
    do, x, dx, rows, least, V: tl.constexpr, BV: tl.constexpr, Z: tl.constexpr, N: tl.constexpr
):  # fmt: skip
    """dx of Z columns: V of values, the weights' in two, the second what the first loses to 16 bits, and zeros.

    Reads do and x (in float32: of keys that are much alike the rounding of o would be all that a query gets), writes
    dx: 4 U.
    """
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    iv = tl.arange(0, BV)
    at = row[:, None] * Z + iv[None, :]
    ok = (row < rows)[:, None] & (iv < V)[None, :]
    by = tl.load(x + row * Z + V, mask=row < rows, other=1.0) + least
    bdo = tl.load(do + row[:, None] * V + iv[None, :], mask=ok, other=0.0)
    down, change = through_quotient(bdo, tl.load(x + at, mask=ok, other=0.0) / by[:, None], by)
    tl.store(dx + at, down, mask=ok)
    iz = tl.arange(0, 32)[None, :]  # 2 columns, and fewer than 16 that fill a tile
    rough = change.to(dx.dtype.element_ty).to(tl.float32)
    rest = tl.where(iz == 0, rough[:, None], tl.where(iz == 1, (change - rough)[:, None], 0.0))
    tl.store(dx + row[:, None] * Z + V + iz, rest, mask=(row < rows)[:, None] & (V + iz < Z))


# ------------------------------------------------------------------------------------------------ the launchers
# Tensors are contiguous; q and k have D columns filled with zeros to a multiple of 16, V is one; memories float32.

# (tokens a chunk, columns of z a program, warps, stages) of 16-bit tokens, of D up to 16 and beyond
SWEEP = (64, 32, 4, 2), (32, 16, 8, 2)
GRADIENTS = (64, 64, 4, 2), (32, 16, 8, 2)
SINGLE = (16, 16, 8, 1)  # float32 products are not done by tensor cores


def features(size: int, polynomial: int) -> int:
    """How many features a query of so many channels has."""
    return size * (size + 1) // 2 + (1 + size if polynomial == TAYLOR else 0)


def blocks(size: int) -> tuple[int, int]:
    """Sizes of blocks of products, powers of two of at least 16: two as large as they can be, and one for the rest."""
    count = features(size, SQUARES)
    each = max(16, next_power_of_2(count + 1) // 4)
    return each, padded(count - 2 * each)


def tile_of(x: Tensor, tiles: tuple) -> tuple[int, int, int, int]:
    return SINGLE if x.element_size() == 4 else tiles[x.shape[-1] > 16]


def shape_of(x: Tensor, z: Tensor, size: int, polynomial: int, borders: Tensor | None, tiles: dict) -> dict:
    """The compile-time arguments of a sweep or of gradients."""
    chunk, columns, warps, stages = tile_of(x, tiles)
    count, Z = features(size, polynomial), z.shape[-1]
    B, rest = blocks(size)
    columns = min(columns, padded(Z))
    sizes = {"D": size, "F": count, "X": x.shape[-1], "Z": Z, "B": B, "REST": rest, "BZ": columns, "C": chunk}
    kind = {"SLICES": cdiv(Z, columns), "POLYNOMIAL": polynomial, "PACKED": borders is not None}
    return {**sizes, **kind, "num_warps": warps, "num_stages": stages}


def segments_for(q: Tensor, v: Tensor, sequences: int) -> int:
    """In how many segments to cut each sequence: 64 columns a multiprocessor, and at least 512 tokens a segment."""
    columns = tile_of(q, SWEEP)[1]
    programs = sequences * q.shape[2] * cdiv(v.shape[-1], columns)
    return decay.long_enough(multiprocessors(q.device) * 64 // columns // max(programs, 1), q, sequences)


def sweep(
    x, y, z, size, polynomial, borders, entry=None, *,
    slots=1, segments=1, reverse=False, end=None, ends=1, shift=0, output=True, wide=False,
) -> Tensor | None:  # fmt: skip
    """`features_sweep`: out (None without `output`). `end` receives the last state of every segment."""
    shape = shape_of(y, z, size, polynomial, borders, SWEEP)
    out = torch.empty_like(z, dtype=torch.float32 if wide else z.dtype) if output else None
    decay.launch(
        features_sweep, shape["SLICES"] * segments * y.shape[2] * sequences_of(y, borders),
        x, y, z, borders, entry, out, end, y.shape[1], y.shape[2], segments, slots, ends, shift,
        **shape, REVERSE=reverse, ENTRY=entry is not None, OUT=output, END=end is not None,
    )  # fmt: skip
    return out


def gradients(x, y, a, z, parts, size, polynomial, borders, entry, *, slots, segments, reverse=False) -> None:
    """`features_gradients` into parts, a slice of columns each."""
    shape = shape_of(x, z, size, polynomial, borders, GRADIENTS)
    decay.launch(
        features_gradients, shape["SLICES"] * segments * x.shape[2] * sequences_of(x, borders),
        x, y, a, z, borders, entry, parts, x.shape[1], x.shape[2], segments, slots, rows_of(x),
        **shape, REVERSE=reverse, ENTRY=entry is not None,
    )  # fmt: skip


def pairs(q, k, v, do, size, polynomial, borders) -> tuple[Tensor, Tensor]:
    """What dq and dk are the sums of, one part of each for a slice of columns to come, and at last that of pairs."""
    shape = shape_of(q, v, size, polynomial, borders, GRADIENTS)
    dq, dk = (q.new_empty(shape["SLICES"] + 1, *q.shape, dtype=torch.float32) for _ in range(2))
    shape = {name: x for name, x in shape.items() if name not in ("F", "B", "REST")}
    decay.launch(
        features_pairs, chunks_of(q, borders, shape["C"]) * q.shape[2],
        q, k, v, do, borders, dq[-1], dk[-1], q.shape[1], q.shape[2], sequences_of(q, borders), **shape,
    )  # fmt: skip
    return dq, dk


def between(y, z, size, polynomial, borders, first, segments, reverse=False) -> tuple[Tensor, Tensor]:
    """The memories between segments (n h segments+1 F V) and the one at the far end (n h F V), from `first`."""
    n, h, F, V = sequences_of(y, borders), y.shape[2], features(size, polynomial), z.shape[-1]
    states = y.new_empty(n, h, segments + 1, F, V, dtype=torch.float32)
    last = torch.empty_like(states[:, :, 0])
    places = {"end": states, "ends": segments + 1, "shift": 0 if reverse else 1}
    sweep(y, y, z, size, polynomial, borders, segments=segments, reverse=reverse, output=False, **places)
    block = min(1024, next_power_of_2(F * V))
    decay.launch(
        decay_fold, n * h * cdiv(F * V, block), states, None, first, last, segments,
        CELLS=F * V, BLOCK=block, BLOCKS=cdiv(F * V, block), GATE=decay.NONE, REVERSE=reverse, FIRST=first is not None,
    )  # fmt: skip
    return states, last


def forward(
    q, k, v, memory, borders, size: int, polynomial: int, segments: int, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments: nothing when there is one segment). `wide`: o in float32."""
    kind = (size, polynomial, borders)
    if segments > 1:
        states, last = between(k, v, *kind, memory, segments)
        return sweep(q, k, v, *kind, states, slots=segments + 1, segments=segments, wide=wide), last, states
    F = features(size, polynomial)
    last = q.new_empty(sequences_of(q, borders), q.shape[2], F, v.shape[-1], dtype=torch.float32)
    return sweep(q, k, v, *kind, memory, end=last, wide=wide), last, last.new_empty(0)


def quotient(x: Tensor, values: int, least: float, dtype: torch.dtype) -> Tensor:
    """o : b t h values of numerators in float32, whose next column is the sums of weights."""
    o, rows = x.new_empty(*x.shape[:3], values, dtype=dtype), rows_at_once(values)
    decay.launch(
        features_quotient, cdiv(rows_of(x), rows), x, o, rows_of(x), least,
        V=values, BV=padded(values), Z=x.shape[-1], N=rows,
    )  # fmt: skip
    return o


def quotient_gradients(do: Tensor, x: Tensor, least: float) -> Tensor:
    """The gradient of what was divided, in do's dtype."""
    values, dx = do.shape[-1], torch.empty_like(x, dtype=do.dtype)
    rows = rows_at_once(values)
    decay.launch(
        features_quotient_gradients, cdiv(rows_of(x), rows), do, x, dx, rows_of(x), least,
        V=values, BV=padded(values), Z=x.shape[-1], N=rows,
    )  # fmt: skip
    return dx


def backward(
    do, dlast, q, k, v, memory, borders, states, size: int, polynomial: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dmemory) from the cotangents of o and of the last memory (None: zeros)."""
    kind, cut = (size, polynomial, borders), states.numel() > 0
    run = {"segments": states.shape[2] - 1, "slots": states.shape[2]} if cut else {"segments": 1, "slots": 1}
    if cut:
        cotangents, dmemory = between(q, do, *kind, dlast, run["segments"], reverse=True)
        before, after, end = states, cotangents[:, :, 1:], None
    else:
        n, h, F, V = sequences_of(q, borders), q.shape[2], features(size, polynomial), v.shape[-1]
        dmemory = end = q.new_empty(n, h, F, V, dtype=torch.float32)
        before, after = memory, dlast
    dq, dk = pairs(q, k, v, do, *kind)
    gradients(q, k, do, v, dq, *kind, before, **run)
    gradients(k, q, v, do, dk, *kind, after, reverse=True, **run)
    dv = sweep(k, q, do, *kind, after, end=end, reverse=True, **run)
    return dq.sum(0).to(q.dtype), dk.sum(0).to(k.dtype), dv, dmemory
