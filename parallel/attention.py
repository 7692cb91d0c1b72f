"""Softmax attention over a cut sequence, the N of a hybrid: three ways to see the tokens of other ranks.

    gather     every rank gathers all keys and values (LASP-2H, 2502.07563)
    ring       keys and values go from rank to rank, the softmax is taken as they come by (2310.01889)
    ulysses    tokens for heads: every rank gets all tokens of some heads, and gives the outputs back (2309.14509)

All have documents, windows, scales and shared key heads as `ops.attention`, and segments of any length, padded to the
longest where they travel. None has a cache: decoding does not run on a cut sequence. Positions must be in q and k, as
everywhere, so they are those of the whole sequence.

    received a rank, forward      gather    (W - 1) T_r (bytes of a token's k and v)             backward as much
                                  ring      as much, less where windows or documents end it      2 to 3 times that
                                  ulysses   (W - 1)/W T_r (bytes of a token's q, k, v and o)     as much
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from parallel import comm
from parallel.comm import Group
from parallel.graph import attached, differentiable, exchange, known
from reference.attention import behind, checked, reach
from reference.ops import Ops
from reference.pieces import Sight, fused, merge, multiplied, piece, piece_back
from reference.recurrence import in_full_precision


def refuse(name: str, state) -> None:
    if state is not None:
        raise ValueError(f"{name} over a cut sequence starts at the sequence's beginning: no state can be given")


# ---------------------------------------------------------------------------------------------- who has which tokens


class Layout(NamedTuple):
    """Places are counted over all ranks."""

    rank: int
    starts: list[int]  # where each rank's segment begins, and where the last one ends
    opened: list[int]  # where the document began that enters each rank's segment (or that ends where it begins)

    @property
    def lengths(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.starts)]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def rounds(self, window: int | None) -> int:
        """How many ranks back any rank must look."""
        return max(rank - self.earliest(rank, window) for rank in range(len(self.lengths)))

    def earliest(self, rank: int, window: int | None) -> int:
        """The first rank whose tokens that rank can see."""
        start = self.starts[rank]
        place = self.opened[rank] if window is None else max(self.opened[rank], start - window + 1)
        seen = [r for r in range(rank) if place < self.starts[r + 1] and self.lengths[r]]
        return min(seen, default=rank) if self.lengths[rank] else rank


def layout_of(x: Float[Tensor, "b t ..."], cu_seqlens, group: Group) -> Layout:
    """One tiny gather: everybody's length, and where its last document begins."""
    single = cu_seqlens is None or len(cu_seqlens) == 2
    last = torch.tensor(-1, device=x.device) if single else cu_seqlens[-2].long()
    everyone = comm.gather(torch.stack([torch.tensor(x.shape[1], device=x.device), last]), group)
    starts, opened = [0], [0]
    for length, last in torch.stack(everyone).tolist():
        opened.append(opened[-1] if last < 0 else starts[-1] + last)
        starts.append(starts[-1] + length)
    return Layout(comm.rank(group), starts, opened[:-1])


def padded(x: Float[Tensor, "b t h d"], layout: Layout) -> Float[Tensor, "b l h d"]:
    """Segments of one length, so that all parts of a collective have one shape."""
    return F.pad(x, (0, 0, 0, 0, 0, layout.longest - x.shape[1]))


def segments(parts: Float[Tensor, "w b l ..."], layout: Layout) -> list[Float[Tensor, "b t ..."]]:
    """Every rank's tokens, without the padding."""
    return [part[:, :length] for part, length in zip(parts, layout.lengths, strict=True)]


# ------------------------------------------------------------------------------------------------------------ gather


def gather(ops: Ops, group: Group) -> Callable:
    """Every rank gathers all keys and values and takes those of its own first document as its past.

    A rank receives (W - 1)(16 + bytes of the padded k and v) forward; backward (W - 1) times their gradient in float32,
    in which the ranks' shares are summed. A window shortens what is attended to, not what is gathered.
    """

    def run(q, k, v, past=None, cu_seqlens=None, window=None, scale=None):
        refuse("attention", past)
        checked(q, k, cu_seqlens, window)
        layout = layout_of(k, cu_seqlens, group)
        own = torch.cat([k, v], -1)
        everyone = torch.ops.linear_moe.gather_tokens(padded(own, layout), group.group_name)
        earlier = segments(everyone, layout)[: layout.rank]
        before = torch.cat([own[:, :0], *earlier], 1)[:, layout.opened[layout.rank] :]
        before = before.split([k.shape[-1], v.shape[-1]], -1)
        o = continued(ops, q, k, v, before, cu_seqlens, {"window": window, "scale": scale})
        return attached(o, [everyone], [q, k, v]), None

    return run


def continued(ops: Ops, q, k, v, before: tuple[Tensor, Tensor], cu_seqlens, how: dict) -> Float[Tensor, "b t h e"]:
    """Attention over my tokens: the first document (where nothing is packed, all rows) has a past, the others none."""
    first, past = q.shape[1] if cu_seqlens is None else int(cu_seqlens[1]), before[0].shape[1]
    if not past or not first:
        return ops.attention(q, k, v, None, cu_seqlens, **how)[0]
    start = 0 if how["window"] is None else max(past - reach(how["window"]), 0)
    own = (torch.cat([x[:, start:], y[:, :first]], 1) for x, y in zip(before, (k, v), strict=True))
    o = behind(q[:, :first], *own, **how)
    if first == q.shape[1]:
        return o
    rest = ops.attention(q[:, first:], k[:, first:], v[:, first:], None, cu_seqlens[1:] - first, **how)[0]
    return torch.cat([o, rest], 1)


def _gather_tokens(x: Tensor, group: str) -> Tensor:
    """Every rank's x, stacked."""
    return torch.stack(comm.gather(x, comm.named(group)))


def _gather_tokens_backward(D: Tensor, group: str) -> Tensor:
    """The sum over ranks of what my x received."""
    wide = torch.promote_types(D.dtype, torch.float32)
    return comm.scatter(D.to(wide), comm.named(group)).to(D.dtype, copy=True)


# -------------------------------------------------------------------------------------------------------------- ring


def ring(ops: Ops, group: Group) -> Callable:
    """Keys and values go round, and each rank takes of them what it may see: pieces of a softmax, merged as they come
    (`reference.pieces`: by kernels where there are any, else scores of some of my queries at a time).

    They go on for as many ranks as any rank looks back: a window, or documents that end, make that fewer than W - 1.
    Backward they go round again, with what they have received so far, which is then sent home. Later ranks have more
    to see than earlier ones, and all wait for the last.
    """

    def run(q, k, v, past=None, cu_seqlens=None, window=None, scale=None):
        refuse("attention", past)
        checked(q, k, cu_seqlens, window)
        layout = layout_of(k, cu_seqlens, group)
        q, k, v = multiplied(q, k, v) if fused(q, k, v) else (q, k, v)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        first = q.shape[1] if cu_seqlens is None else int(cu_seqlens[1])
        how = (layout.starts, layout.opened[layout.rank], first, window, layout.rounds(window), scale, group.group_name)
        o, _ = torch.ops.linear_moe.ring_attention(q, k, v, cu_seqlens, *how)
        return attached(o, [], [q, k, v]), None

    return run


class Part(NamedTuple):
    """Of my queries, and of another rank's keys, those that have to do with each other, and how."""

    rows: slice
    columns: slice
    sight: Sight


def part_of(back: int, cu_seqlens, starts: list[int], me: int, opened: int, first: int, window: int | None):
    """My part with the rank so far back, or None. Of earlier ranks only my first `first` tokens see something, from
    the place `opened` on."""
    block = me - back
    if block < 0:  # before the first rank comes the last
        return None
    t, s = (starts[r + 1] - starts[r] for r in (me, block))
    if not back:
        several = cu_seqlens is not None and len(cu_seqlens) > 2
        return Part(slice(t), slice(s), Sight(True, reach(window), cu_seqlens if several else None)) if t else None
    end = starts[block + 1]
    rows, columns, left = first, min(s, end - opened), None
    if window is not None:
        near = reach(window) - (starts[me] - end)  # so many of their last tokens my first one sees, the next one less
        rows, columns = min(rows, near), min(columns, near)
        left = near - rows
    return Part(slice(rows), slice(s - columns, s), Sight(False, left)) if rows > 0 and columns > 0 else None


def held_first(k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    longest = max(stop - start for start, stop in pairwise(starts))
    return F.pad(torch.cat([k, v], -1), (0, 0, 0, 0, 0, longest - k.shape[1]))


def _ring_attention(q, k, v, cu_seqlens, starts, opened, first, window, rounds, scale, group):
    """o, and the logarithm of each query's sum of e^score, for the backward pass."""
    group, held, sizes = comm.named(group), held_first(k, v, starts), [k.shape[-1], v.shape[-1]]
    wide = torch.promote_types(q.dtype, torch.float32)
    o, log_sum = v.new_zeros(*q.shape[:3], sizes[1], dtype=wide), q.new_empty(sums_of(q), dtype=wide)
    log_sum.fill_(-math.inf)
    with in_full_precision(q):
        for back in range(rounds + 1):
            held = comm.rotate(held, group) if back else held
            part = part_of(back, cu_seqlens, starts, comm.rank(group), opened, first, window)
            if part is None:
                continue
            theirs = held[:, part.columns].split(sizes, -1)
            found = piece(q[:, part.rows], *theirs, part.sight, scale)
            merge(o[:, part.rows], log_sum[..., part.rows], *found)
    return o.to(v.dtype), log_sum


def _ring_attention_backward(do, q, k, v, o, log_sum, cu_seqlens, starts, opened, first, window, rounds, scale, group):
    """(dq, dk, dv)."""
    group, held, sizes = comm.named(group), held_first(k, v, starts), [k.shape[-1], v.shape[-1]]
    dq, received = (torch.zeros_like(x, dtype=log_sum.dtype) for x in (q, held))
    with in_full_precision(q):
        for back in range(rounds + 1):
            if back:
                held, received = comm.rotate(held, group), comm.rotate(received, group)
            part = part_of(back, cu_seqlens, starts, comm.rank(group), opened, first, window)
            if part is None:
                continue
            mine = (x[:, part.rows] for x in (do, q, o))
            (D, queries, seen), theirs = mine, held[:, part.columns].split(sizes, -1)
            dq_part, *more = piece_back(D, queries, *theirs, seen, log_sum[..., part.rows], part.sight, scale)
            dq[:, part.rows] += dq_part
            received[:, part.columns] += torch.cat(more, -1)
        received = comm.rotate(received, group, -rounds)
    dk, dv = received[:, : k.shape[1]].split(sizes, -1)
    return dq.to(q.dtype), dk.to(k.dtype, copy=True), dv.to(v.dtype, copy=True)


def sums_of(q: Tensor) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]


def _keep_ring(ctx, inputs, output):
    *tensors, ctx.starts, ctx.opened, ctx.first, ctx.window, ctx.rounds, ctx.scale, ctx.group = inputs
    ctx.save_for_backward(*tensors, *output)


def _back_to_ring(ctx, do, _):
    q, k, v, cu_seqlens, o, log_sum = ctx.saved_tensors
    how = (ctx.starts, ctx.opened, ctx.first, ctx.window, ctx.rounds, ctx.scale, ctx.group)
    return *torch.ops.linear_moe.ring_attention_backward(do, q, k, v, o, log_sum, cu_seqlens, *how), *[None] * 8


# ----------------------------------------------------------------------------------------------------------- ulysses


def ulysses(ops: Ops, group: Group) -> Callable:
    """Every rank gets all tokens of an n-th of the heads, attends as if nothing were cut, and gives the outputs back.

    W must divide the query heads. Key heads that W does not divide are repeated until it does.
    """

    def run(q, k, v, past=None, cu_seqlens=None, window=None, scale=None):
        refuse("attention", past)
        checked(q, k, cu_seqlens, window)
        ranks, heads, keys = comm.size(group), q.shape[2], k.shape[2]
        each = [1] * ranks
        if heads % ranks:
            raise ValueError(
                f"ulysses attention gives each of {ranks} ranks an equal share of the heads, and there are {heads}: "
                f"use a multiple of {ranks}, or attention gather or ring"
            )
        layout = layout_of(k, cu_seqlens, group)
        k, v = (x.repeat_interleave(math.lcm(keys, ranks) // keys, 2) for x in (k, v))
        own = [rearrange(padded(x, layout), "b t (w h) d -> w b t (h d)", w=ranks) for x in (q, k, v)]
        parts = exchange(torch.cat(own, -1), each, each, group)
        whole = torch.cat(segments(parts, layout), 1).split([x.shape[-1] for x in own], -1)
        mine = (x.unflatten(-1, (-1, y.shape[-1])) for x, y in zip(whole, (q, k, v), strict=True))
        o = ops.attention(*mine, None, all_borders(layout, cu_seqlens, group), window, scale)[0]
        o = torch.stack([padded(x, layout) for x in o.split(layout.lengths, 1)])
        o = exchange(o, each, each, group)
        o = rearrange(o, "w b t h e -> b t (w h) e")[:, : q.shape[1]]
        return attached(o, [], [q, k, v]), None

    return run


def all_borders(layout: Layout, cu_seqlens, group: Group) -> Int[Tensor, " n1"] | None:
    """The borders of documents in the whole sequence: one more gather, of a byte a token."""
    if cu_seqlens is None:
        return None
    marks = torch.zeros(layout.longest + 1, dtype=torch.uint8, device=cu_seqlens.device)
    marks[cu_seqlens[1:-1].long()] = 1
    everyone = zip(comm.gather(marks, group), layout.lengths, strict=True)
    marks = torch.cat([own[:length] for own, length in everyone])
    marks[:1] = 1
    return F.pad(marks.nonzero()[:, 0], (0, 1), value=layout.starts[-1]).int()


ATTENTION = {"gather": gather, "ring": ring, "ulysses": ulysses}

# ------------------------------------------------------------------------------------------------------ known to torch


def _keep_group(ctx, inputs, output):
    ctx.group = inputs[1]


def _back_to_tokens(ctx, D):
    return torch.ops.linear_moe.gather_tokens_backward(D, ctx.group), None


def _gather_tokens_shapes(x, group):
    return x.new_empty(comm.size(comm.named(group)), *x.shape)


def _ring_shapes(q, k, v, *_):
    sums = q.new_empty(sums_of(q), dtype=torch.promote_types(q.dtype, torch.float32))
    return v.new_empty(*q.shape[:3], v.shape[-1]), sums


known("gather_tokens", "(Tensor x, str group) -> Tensor", _gather_tokens, _gather_tokens_shapes)
known(
    "gather_tokens_backward",
    "(Tensor D, str group) -> Tensor",
    _gather_tokens_backward,
    lambda D, group: torch.empty_like(D[0]),
)
differentiable("gather_tokens", _back_to_tokens, _keep_group)


PLACE = "Tensor? cu_seqlens, int[] starts, int opened, int first, int? window"
HOW = f"{PLACE}, int rounds, float scale, str group"
known("ring_attention", f"(Tensor q, Tensor k, Tensor v, {HOW}) -> (Tensor, Tensor)", _ring_attention, _ring_shapes)
known(
    "ring_attention_backward",
    f"(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor log_sum, {HOW}) -> (Tensor, Tensor, Tensor)",
    _ring_attention_backward,
    lambda do, q, k, v, *_: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)),
)
differentiable("ring_attention", _back_to_ring, _keep_ring)
