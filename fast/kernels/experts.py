"""Triton kernels around the grouped products of experts: tokens to their rows, rows to their tokens, swiglu.

    spread      rows_{p} = g_nk x_n                p = place_nk, the row of n's k-th pair       (dispatch)
    gathered    x_n = Σ_k g_nk rows_{p}                                                         (combine)
    dots        <x_n, rows_{p}>, of each pair: the gradient of g in either, on the way of the other
    swiglu      a = silu(u) v,  (u, v) the halves of a row
    visited     an expert's gradient in the dtype of its weight, or zeros, where nobody was with it

Each of the first two is the other's gradient. Nothing but the places is looked up: a program takes a token and its k
rows, so that x is read or written once, rows are never copied, sums are in registers (float32, one order, one rounding
at the end) and no two programs write one place. A place that is no row is a pair that nobody computes: it is skipped,
and a row that is nobody's is neither read nor written, whatever stands there.

Bytes. With R = the rows that there are and X = the tokens, both forward ways are X + R, each number once; backward,
`combined` reads X and R and writes R, `taken` reads R and writes X (gates at the input: reads X too). At 65,536 tokens
of 1024 that visit 8 in 16 bits, R is 1.07 GB. swiglu moves 3 F forward and 5 F backward (F = its result): halves in,
and computed again where their gradient is wanted. A gradient of weights is read once in the dtype of products, and
written once in the weights'.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels.decay import INTERPRETED, cdiv, launch, next_power_of_2

WIDEST = 16384  # of a row, which stands in registers


@triton.jit
def pair_of(place, gate, token, there, j, k, size):
    """Of the tokens' j-th pairs: number, row, whether there is one, and gate (1 without gates)."""
    pair = token * k + j
    to = tl.load(place + pair, mask=there & (j < k), other=size)
    goes = to < size
    weight = tl.full(pair.shape, 1.0, tl.float32)
    if gate is not None:
        weight = tl.load(gate + pair, mask=goes, other=0.0).to(tl.float32)
    return pair, to, goes, weight


@triton.jit
def dot(row, value, dots, pair, goes, ok):
    """<row, value> of a pair, in float32: 0 where there is none. (Not 0 times value, which may be infinite.)"""
    tl.store(dots + pair, tl.where(goes, tl.sum(row * value, 1), 0.0), mask=ok)


@triton.jit(do_not_specialize=["n", "size"])  # of which every exchange between ranks makes others
def spread(
    x, place, gate, rows, other, dots, n, k, size, d,
    J: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """rows = g x; where `dots` are wanted, of x and the `other` rows."""
    token = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    column = tl.arange(0, D)[None, :]
    there, here = token < n, column < d
    value = tl.load(x + token[:, None] * d + column, mask=there[:, None] & here, other=0.0).to(tl.float32)
    for first in range(0, k, J):
        for j in tl.static_range(J):  # so many rows at once are on their way
            pair, to, goes, weight = pair_of(place, gate, token, there, first + j, k, size)
            at, ok = to[:, None] * d + column, goes[:, None] & here
            tl.store(rows + at, (weight[:, None] * value).to(rows.dtype.element_ty), mask=ok)
            if dots is not None:
                row = tl.load(other + at, mask=ok, other=0.0).to(tl.float32)
                dot(row, value, dots, pair, goes, there & (first + j < k))


@triton.jit(do_not_specialize=["n", "size"])
def gathered(
    rows, place, gate, x, other, dots, n, k, size, d,
    J: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """x = Σ g rows; where `dots` are wanted, of the rows and `other`, a vector a token."""
    token = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    column = tl.arange(0, D)[None, :]
    there, here = token < n, column < d
    own, all_of_it = token[:, None] * d + column, there[:, None] & here
    total = tl.zeros((N, D), tl.float32)
    if dots is not None:
        value = tl.load(other + own, mask=all_of_it, other=0.0).to(tl.float32)
    for first in range(0, k, J):
        for j in tl.static_range(J):
            pair, to, goes, weight = pair_of(place, gate, token, there, first + j, k, size)
            row = tl.load(rows + to[:, None] * d + column, mask=goes[:, None] & here, other=0.0).to(tl.float32)
            total += weight[:, None] * row
            if dots is not None:
                dot(row, value, dots, pair, goes, there & (first + j < k))
    tl.store(x + own, total.to(x.dtype.element_ty), mask=all_of_it)


def moved(kernel, source: Tensor, place: Tensor, gate: Tensor | None, target: Tensor, size: int, other, dots) -> None:
    """One of the two kernels above, over n tokens of k places. All contiguous."""
    (n, k), d = place.shape, source.shape[1]
    D = next_power_of_2(d)
    # A row of 16-bit numbers is 16 bytes a thread; short ones go several tokens at a time.
    N = max(1, (8192 if INTERPRETED else 1024) // D)
    J, warps = min(4, next_power_of_2(k)), min(16, max(4, D // 512))
    args = (source, place, gate, target, other, dots, n, k, size, d)
    launch(kernel, cdiv(n, N) if d else 0, *args, J=J, N=N, D=D, num_warps=warps)


def to_rows(
    x: Tensor, place: Tensor, gate: Tensor | None, size: int, dtype: torch.dtype, other: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(rows : size d, dots : n k in float32, with `other` : size d; or None). x : n d, place : n k, gate : n k."""
    rows = x.new_empty(size, x.shape[1], dtype=dtype)
    dots = None if other is None else x.new_empty(place.shape, dtype=torch.float32)
    moved(spread, x, place, gate, rows, size, other, dots)
    return rows, dots


def to_tokens(
    rows: Tensor, place: Tensor, gate: Tensor | None, dtype: torch.dtype, other: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(x : n d, dots : n k in float32, with `other` : n d; or None). rows : size d, place : n k, gate : n k."""
    x = rows.new_empty(place.shape[0], rows.shape[1], dtype=dtype)
    dots = None if other is None else rows.new_empty(place.shape, dtype=torch.float32)
    moved(gathered, rows, place, gate, x, len(rows), other, dots)
    return x, dots


# -------------------------------------------------------------------------------------------------------- swiglu


@triton.jit
def halves(h, rows, f, N: tl.constexpr, F: tl.constexpr):
    """A tile of a result's columns: its places there and in the first half of h, which are there, and both halves."""
    blocks = tl.cdiv(f, F)
    row = (tl.program_id(0) // blocks * N + tl.arange(0, N)).to(tl.int64)[:, None]
    column = (tl.program_id(0) % blocks * F + tl.arange(0, F))[None, :]
    ok = (row < rows) & (column < f)
    at = row * (2 * f) + column
    u = tl.load(h + at, mask=ok, other=0.0).to(tl.float32)
    v = tl.load(h + at + f, mask=ok, other=0.0).to(tl.float32)
    return row * f + column, at, ok, u, v


@triton.jit(do_not_specialize=["rows"])
def swiglu_forward(h, a, rows, f, N: tl.constexpr, F: tl.constexpr):
    own, _, ok, u, v = halves(h, rows, f, N, F)
    tl.store(a + own, (u * tl.sigmoid(u) * v).to(a.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows"])
def swiglu_backward(h, da, dh, rows, f, N: tl.constexpr, F: tl.constexpr):
    own, at, ok, u, v = halves(h, rows, f, N, F)
    up, s = tl.load(da + own, mask=ok, other=0.0).to(tl.float32), tl.sigmoid(u)
    tl.store(dh + at, (up * v * s * (1.0 + u * (1.0 - s))).to(dh.dtype.element_ty), mask=ok)
    tl.store(dh + at + f, (up * u * s).to(dh.dtype.element_ty), mask=ok)


def tiled(kernel, h: Tensor, *others: Tensor) -> None:
    """A kernel over tiles of 2048 numbers, in columns of 128: hidden widths are multiples of it, not powers of 2."""
    rows, f = h.shape[0], h.shape[1] // 2
    F = min(128, next_power_of_2(f))
    N = (16384 if INTERPRETED else 2048) // F
    launch(kernel, cdiv(rows, N) * cdiv(f, F), h, *others, rows, f, N=N, F=F)


def swiglu(h: Tensor) -> Tensor:
    """h : p 2f, contiguous."""
    a = h.new_empty(h.shape[0], h.shape[1] // 2)
    tiled(swiglu_forward, h, a)
    return a


def swiglu_gradient(da: Tensor, h: Tensor) -> Tensor:
    dh = torch.empty_like(h)
    tiled(swiglu_backward, h, da, dh)
    return dh


# ------------------------------------------------------------------------------------------- gradients of weights


@triton.jit
def visited_alone(D, visited, dw, size, N: tl.constexpr):
    """What stands in D for an expert that nobody visits is not defined, and not read."""
    blocks = tl.cdiv(size, N)
    expert = tl.program_id(0) // blocks
    own = tl.program_id(0) % blocks * N + tl.arange(0, N)
    at = expert.to(tl.int64) * size + own
    value = tl.load(D + at, mask=(own < size) & (tl.load(visited + expert) != 0), other=0.0)
    tl.store(dw + at, value.to(dw.dtype.element_ty), mask=own < size)


def of_visited(D: Tensor, visited: Tensor, dtype: torch.dtype) -> Tensor:
    """D : e ..., contiguous; visited : e."""
    dw, size, N = torch.empty_like(D, dtype=dtype), D[:1].numel(), 8192 if INTERPRETED else 4096
    launch(visited_alone, len(D) * cdiv(size, N), D, visited.view(torch.uint8), dw, size, N=N, num_warps=8)
    return dw
