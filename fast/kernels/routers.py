"""Triton kernels that choose experts and sort pairs by them.

    top       the k largest of each row, largest first; among equals the lowest index
    counts    how many pairs of each tile of pairs visit each expert
    ranks     where each pair stands when all are sorted by expert: before it are the pairs of experts before its own,
              its own expert's in tiles before its own, and its own expert's before it in its tile

Torch sorts rows and keys by radix: 5 launches for the first, 22 from a routing to places, of which most take longer to
launch than to run. Here it is one and two, each number once: of n e scores, 4 bytes in and 8 k a row out; of n k pairs,
9 bytes in twice, 16 out, and a table of at most 256 tiles that every program reads (128 kB for 64 experts, from the
second-level cache). Whole numbers alone are added, in registers: no order of threads changes anything.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels.decay import INTERPRETED, cdiv, launch, next_power_of_2

WIDEST = 1024  # experts, of which a row stands in registers
TILES = 256  # at most: of pairs, with a row of the table each

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
def visits(index, kept, first, pairs, e, S: tl.constexpr, E: tl.constexpr):
    """S pairs, whether there are so many, and a matrix that is 1 where the pair visits the expert. Expert e has those
    that are not kept."""
    pair = first + tl.arange(0, S)
    there = pair < pairs
    stays = tl.load(kept + pair, mask=there, other=0) != 0
    expert = tl.where(stays, tl.load(index + pair, mask=there, other=0).to(tl.int32), e)
    expert = tl.where(there, expert, E)  # no expert's
    return pair, there, stays, (expert[:, None] == tl.arange(0, E)[None, :]).to(tl.int32)


@triton.jit(do_not_specialize=["pairs", "tile"])
def counts(index, kept, table, pairs, tile, e, S: tl.constexpr, E: tl.constexpr):
    """table : tiles E, how many of a tile's pairs visit each expert."""
    start = tl.program_id(0) * tile
    total = tl.zeros((S, E), tl.int32)
    for first in range(start, start + tile, S):
        _, _, _, own = visits(index, kept, first, pairs, e, S, E)
        total += own
    tl.store(table + tl.program_id(0) * E + tl.arange(0, E), tl.sum(total, 0))


@triton.jit(do_not_specialize=["pairs", "tile", "tiles"])
def ranks(
    index, kept, table, place, order, ends, visited, pairs, tile, tiles, e,
    S: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """place : pairs (`pairs` where not kept), ends : e, visited : e, order : pairs."""
    me, expert = tl.program_id(0), tl.arange(0, E)
    total, before = tl.zeros((E,), tl.int32), tl.zeros((E,), tl.int32)
    for first in range(0, tiles, R):
        row = first + tl.arange(0, R)[:, None]
        part = tl.load(table + row * E + expert[None, :], mask=row < tiles, other=0)
        total += tl.sum(part, 0)
        before += tl.sum(tl.where(row < me, part, 0), 0)
    end = tl.cumsum(total, 0)
    if me == 0:
        tl.store(ends + expert, end, mask=expert < e)
        tl.store(visited + expert, total > 0, mask=expert < e)
    next_one = end - total + before
    for first in range(me * tile, (me + 1) * tile, S):
        pair, there, stays, own = visits(index, kept, first, pairs, e, S, E)
        rank = tl.sum(own * (next_one[None, :] + tl.cumsum(own, 0) - 1), 1)
        next_one += tl.sum(own, 0)
        tl.store(place + pair, tl.where(stays, rank, pairs).to(tl.int64), mask=there)
        tl.store(order + rank, pair.to(tl.int64), mask=there)


def by_expert(index: Tensor, kept: Tensor, e: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(place : n k, int64; ends : e, int32; visited : e, bool; order : nk, int64). index : n k, int64, and kept : n k,
    bool, contiguous; e below WIDEST, so that pairs of no expert have a column beside theirs."""
    pairs, E = index.numel(), next_power_of_2(e + 1)
    S = min(256, max(16, 8192 // E))  # rows of the matrix, which mostly is 8192 numbers
    tile = S * cdiv(cdiv(pairs, TILES), S)
    tiles = cdiv(pairs, tile) if pairs else 1
    place, order, table = torch.empty_like(index), index.new_empty(pairs), index.new_empty(tiles, E, dtype=torch.int32)
    ends, visited = index.new_empty(e, dtype=torch.int32), index.new_empty(e, dtype=torch.bool)
    launch(counts, tiles, index, kept, table, pairs, tile, e, S=S, E=E, num_warps=8)
    args = (index, kept, table, place, order, ends, visited, pairs, tile, tiles, e)
    launch(ranks, tiles, *args, S=S, E=E, R=8192 // E, num_warps=8)
    return place, ends, visited, order
