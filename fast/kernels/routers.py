"""Triton kernels that choose experts and sort pairs by them.

    top       the k largest of each row, largest first; among equals the lowest index
    counts    how many pairs of each tile of 256 pairs visit each expert
    starts    where an expert's pairs of a tile begin when all pairs are sorted: before them are the pairs of experts
              before theirs, and their own expert's in tiles before
    ranks     where each pair stands: its own expert's pairs before it in its tile come first

Torch sorts rows and keys by radix: 5 launches for the first, 22 from a routing to places, of which most take longer to
launch than to run. Here it is one and three, each number once: of n e scores, 4 bytes in and 8 k a row out; of n k
pairs, 9 bytes in twice, 16 out, and a table of (e + 1) n k / 256 numbers, written, scanned and read from the
second-level cache. Whole numbers alone are added, in registers: no order of threads changes anything.

No program goes from tile to tile, so that as many run as there are tiles; with 256 programs of 16 turns each, every one
a scan over threads that waits for the turn before, `ranks` alone took 135 µs for 262,144 pairs of 64 experts. In a tile
each pair is compared with each, 5 instructions each, which is less than sums along a column for every expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels.decay import INTERPRETED, cdiv, launch, next_power_of_2

WIDEST = 1024  # experts, of which a row stands in registers
TILE = 256  # pairs, with a column of the table
AT_ONCE = 8192, 1024  # numbers of the table that are summed, and scanned

# ---------------------------------------------------------------------------------------------------------- choice


@triton.jit
def ranked(value, column, there, E: tl.constexpr):
    """One whole number for each value and column, larger where `top` has it first. Of a float's bits those below the
    sign count backwards where it is set; 0 has one sign, and what is no number stands before all, as in torch."""
    value = tl.where(value == 0.0, 0.0, value)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value != value, 0x7FC00000, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    key = (bits.to(tl.int64) << 32) + (E - 1 - column)
    return tl.where(there, key, -(2**63))


@triton.jit(do_not_specialize=["n"])
def top_rows(values, index, n, e, k, N: tl.constexpr, E: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N), tl.arange(0, E)[None, :]
    there = (row < n)[:, None] & (column < e)
    value = tl.load(values + row[:, None] * e + column, mask=there, other=0.0)
    key = ranked(value, column, there, E)
    for j in range(k):
        best = tl.max(key, 1)
        tl.store(index + row * k + j, E - 1 - (best & 0xFFFFFFFF), mask=row < n)
        key = tl.where(key == best[:, None], -(2**63), key)


def top(values: Tensor, k: int) -> Tensor:
    """values : n e, contiguous, float32, e at most WIDEST. index : n k, int64."""
    n, e = values.shape
    index = values.new_empty(n, k, dtype=torch.int64)
    E = next_power_of_2(e)
    N = max(1, (32768 if INTERPRETED else 2048) // E)
    launch(top_rows, cdiv(n, N) if k else 0, values, index, n, e, k, N=N, E=E)
    return index


# ------------------------------------------------------------------------------------------------------------ order


@triton.jit
def visits(index, kept, first, pairs, e, S: tl.constexpr):
    """S pairs, whether there are so many, which are kept, and the experts that they visit: e where not kept, -1 where
    there is no pair."""
    pair = first + tl.arange(0, S)
    there = pair < pairs
    stays = tl.load(kept + pair, mask=there, other=0) != 0
    expert = tl.where(stays, tl.load(index + pair, mask=there, other=0).to(tl.int32), e)
    return pair, there, stays, tl.where(there, expert, -1)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def counts(index, kept, table, pairs, tiles, e, T: tl.constexpr, S: tl.constexpr, E: tl.constexpr):
    """table : e+1 tiles, how many of a tile's T pairs visit each expert."""
    me, expert = tl.program_id(0), tl.arange(0, E)
    total = tl.zeros((E, S), tl.int32)
    for first in range(me * T, (me + 1) * T, S):
        _, _, _, its = visits(index, kept, first, pairs, e, S)
        total += (expert[:, None] == its[None, :]).to(tl.int32)
    tl.store(table + expert * tiles + me, tl.sum(total, 1), mask=expert <= e)


@triton.jit(do_not_specialize=["fours"])
def starts(table, start, ends, visited, fours, e, R: tl.constexpr, Q: tl.constexpr):
    """start : e+1 tiles, where an expert's pairs of a tile begin: the sum of all of the table before. ends : e,
    visited : e. One program an expert; rows of a multiple of 4 numbers are read 4 at a time."""
    tiles, me = fours * 4, tl.program_id(0)
    part = tl.zeros((R,), tl.int32)
    for first in range(0, me * tiles, R):
        at = first + tl.arange(0, R)
        part += tl.load(table + at, mask=at < me * tiles, other=0)
    before = tl.sum(part, 0)
    end = before
    for first in range(0, tiles, Q):
        at = first + tl.arange(0, Q)
        count = tl.load(table + me * tiles + at, mask=at < tiles, other=0)
        tl.store(start + me * tiles + at, end + tl.cumsum(count, 0) - count, mask=at < tiles)
        end += tl.sum(count, 0)
    if me < e:
        tl.store(ends + me, end)
        tl.store(visited + me, end > before)


@triton.jit(do_not_specialize=["pairs", "tiles"])
def ranks(index, kept, start, place, order, pairs, tiles, e, T: tl.constexpr):
    """place : pairs (`pairs` where not kept), order : pairs."""
    me, i = tl.program_id(0), tl.arange(0, T)
    pair, there, stays, its = visits(index, kept, me * T, pairs, e, T)
    # the one of 256 numbers with itself: of fewer than threads each would load its own share again, number by number
    earlier = (its[:, None] == its[None, :]) & (i[:, None] < i[None, :])
    rank = tl.load(start + its * tiles + me, mask=there, other=0) + tl.sum(earlier.to(tl.int32), 0)
    tl.store(place + pair, tl.where(stays, rank, pairs).to(tl.int64), mask=there)
    tl.store(order + rank, pair.to(tl.int64), mask=there)


def by_expert(index: Tensor, kept: Tensor, e: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(place : n k, int64; ends : e, int32; visited : e, bool; order : nk, int64). index : n k, int64, and kept : n k,
    bool, contiguous; e below WIDEST, so that pairs of no expert have a row of the table beside theirs."""
    pairs, E = index.numel(), next_power_of_2(e + 1)
    fours = max(1, cdiv(pairs, 4 * TILE))
    tiles, S = 4 * fours, min(TILE, max(16, 8192 // E))  # S columns of a matrix, which mostly is 8192 numbers
    R, Q = AT_ONCE
    table, start = index.new_empty(2, e + 1, tiles, dtype=torch.int32)
    place, order = torch.empty_like(index), index.new_empty(pairs)
    ends, visited = index.new_empty(e, dtype=torch.int32), index.new_empty(e, dtype=torch.bool)
    launch(counts, tiles, index, kept, table, pairs, tiles, e, T=TILE, S=S, E=E, num_warps=8)
    launch(starts, e + 1, table, start, ends, visited, fours, e, R=R, Q=Q, num_warps=8)
    launch(ranks, tiles, index, kept, start, place, order, pairs, tiles, e, T=TILE, num_warps=8)
    return place, ends, visited, order
