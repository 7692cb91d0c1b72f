"""Experts without a loop on the host: all of them in one grouped product, over rows sorted by expert.

    y_r = W2_e inner(W13_e x_r + b13_e) + b2_e      e the expert of row r, which no one but the GPU knows

The host never asks how many rows an expert has. `ends` says it to torch's grouped product (`F.grouped_mm`): expert e
has the rows from ends_{e-1} to ends_e. Pairs that nobody computes are sorted behind the last; what a product leaves in
their rows is not defined, forward and backward, and is replaced by zeros (not multiplied by them: 0 times NaN is NaN).

    n tokens   k experts a token visits   d width   e experts   f hidden width   r 2 where an expert has a gate, else 1
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reference import moe
from reference.head import product_of
from reference.moe import Drop, Groups, combine, each, spared, swiglu, thinned
from reference.routers import Routing


def experts(
    x: Float[Tensor, "n d"],
    routing: Routing,
    w13: Float[Tensor, "e r*f d"],
    w2: Float[Tensor, "e d f"],
    b13: Float[Tensor, "e r*f"] | None = None,
    b2: Float[Tensor, "e d"] | None = None,
    inner: Callable = swiglu,
    gate_at: Literal["output", "input"] = "output",
    drop: Drop | None = None,
    room: int | None = None,
) -> Float[Tensor, "n d"]:
    """`reference.moe.experts`: by grouped products where there are some, else the reference's loop, deliberately.

    Grouped are products in bfloat16 on a GPU (tensors of bfloat16, or autocast to it), with d and f multiples of 8 and
    fewer than 1024 experts. On Hopper the host does not wait for the GPU; on GPUs that torch has no such kernel for,
    torch itself loops and waits. All other dtypes, sizes and devices, and padded experts (`room`), are the reference's.
    Differs from the loop by roundings: a bias is added to a product that is rounded, and under autocast the gradients
    of a token's k rows are summed before they are widened.
    """
    if room is None and has_grouped(x, w13, w2):
        return grouped(x, routing, w13, w2, b13, b2, inner, gate_at, drop)
    return moe.experts(x, routing, w13, w2, b13, b2, inner, gate_at, drop, room)


def has_grouped(x: Tensor, w13: Tensor, w2: Tensor) -> bool:
    """Whether torch multiplies these by a grouped kernel: rows begin at multiples of 16 bytes."""
    narrow = x.is_cuda and all(product_of(y) == torch.bfloat16 for y in (x, w13, w2))
    return narrow and len(w13) < 1024 and all(size % 8 == 0 for size in (*w13.shape[1:], w2.shape[2]))


def grouped(
    x, routing: Routing, w13, w2, b13=None, b2=None, inner: Callable = swiglu, gate_at="output", drop=None
) -> Float[Tensor, "n d"]:
    """`experts` by grouped products, on any device, in any dtype and sizes that torch takes (on a CPU also float32 with
    d and f multiples of 4). Deterministic, backward too: a permutation each way, and no two pairs add into one place.

    Kept for a gradient is what the loop keeps: the rows, both sides of `inner`, and y.
    """
    e, k, dtype = len(w13), routing.index.shape[1], product_of(w13)
    expert, order = routing.index.masked_fill(~routing.kept, e).flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(e, device=x.device), right=True, out_int32=True)
    back = order.argsort()
    slots = repeat(x if gate_at == "input" else x.to(dtype), "n d -> (n k) d", k=k)
    if gate_at == "input":
        slots = (routing.gate.flatten()[:, None] * slots).to(dtype)
    rows = Moved.apply(slots, order, back)
    mask = None if drop is None else spared(drop, routing, order, e, w2.shape[-1])
    y = together(rows, ends, (w13, w2, b13, b2), inner, mask, dtype)
    gate = routing.gate if gate_at == "output" else routing.kept.to(routing.gate)
    return combine(Moved.apply(y, back, order), gate).to(x.dtype)


def linears(
    x: Float[Tensor, "p i"], groups: Groups, weights: list[Tensor], biases: list[Tensor] | None = None
) -> Float[Tensor, "p o"]:
    """`reference.moe.linears`: one grouped product where `experts` would have some (i a multiple of 8), else the
    reference's loop, which asks the GPU once for the groups' sizes."""
    bf16 = x.is_cuda and all(product_of(y) == torch.bfloat16 for y in (x, *weights))
    if bf16 and len(x) and len(weights) < 1024 and x.shape[1] % 8 == 0:
        return grouped_linears(x, groups.ends, weights, biases)
    return moe.linears(x, groups, weights, biases)


def grouped_linears(
    x: Float[Tensor, "p i"], ends: Int[Tensor, " e"], weights: list[Tensor], biases: list[Tensor] | None = None
) -> Float[Tensor, "p o"]:
    """`linears` by a grouped product, on any device and in any dtype that torch takes; columns are filled up to a
    multiple of 8."""
    visited, dtype, size = ends.diff(prepend=ends.new_zeros(1)) > 0, product_of(weights[0]), len(weights[0])

    def stacked(parts: list[Tensor]) -> Float[Tensor, "e o ..."]:
        w = torch.stack([part.to(dtype) for part in parts])
        return Visited.apply(F.pad(w, (0, 0) * (w.ndim - 2) + (0, -size % 8)), visited)

    return product(x.to(dtype), stacked(weights), None if biases is None else stacked(biases), ends)[:, :size]


def together(
    rows: Float[Tensor, "nk d"], ends: Int[Tensor, " e"], weights, inner: Callable, mask, dtype: torch.dtype
) -> Float[Tensor, "nk d"]:
    """All experts over their rows at once; zeros for the last ones, which belong to none. `reference.moe.each`."""
    if not len(rows):  # which the host knows, and grouped products have no gradient of
        return each(rows, [0] * (len(ends) + 1), weights, inner, mask)
    visited = ends.diff(prepend=ends.new_zeros(1)) > 0
    mine = (torch.arange(len(rows), device=rows.device) < ends[-1])[:, None]
    w13, w2, b13, b2 = (None if w is None else Visited.apply(w.to(dtype), visited) for w in weights)
    h = product(torch.where(mine, rows, 0), w13, b13, ends)
    a = inner(h) if mask is None else thinned(inner, mask)(h)
    return torch.where(mine, product(a.to(dtype), w2, b2, ends), 0)


def product(
    x: Float[Tensor, "nk i"], w: Float[Tensor, "e o i"], b: Float[Tensor, "e o"] | None, ends: Int[Tensor, " e"]
) -> Float[Tensor, "nk o"]:
    """W_e x + b_e for each expert's rows. A bias is a product too, with eight ones a row (16 bytes); seven meet
    zeros. So its gradient is the sum of each expert's rows, in an order that does not change."""
    y = F.grouped_mm(x, w.mT, offs=ends)
    if b is None:
        return y
    return y + F.grouped_mm(x.new_ones(len(x), 8), F.pad(b[..., None], (0, 7)).mT, offs=ends)


class Moved(torch.autograd.Function):
    """x[to], a permutation, whose gradient is the inverse one (where that of index_select adds to zeros)."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "nk d"], to: Int[Tensor, " nk"], back: Int[Tensor, " nk"]):
        ctx.save_for_backward(to, back)
        return x.index_select(0, to)

    @staticmethod
    def backward(ctx, D: Float[Tensor, "nk d"]):
        to, back = ctx.saved_tensors
        return Moved.apply(D, back, to), None, None


class Visited(torch.autograd.Function):
    """w, whose gradient is zero for experts that nobody visits: not every GPU's grouped product writes one there."""

    @staticmethod
    def forward(ctx, w: Float[Tensor, "e ..."], visited: Bool[Tensor, " e"]):
        ctx.save_for_backward(visited)
        return w.view_as(w)

    @staticmethod
    def backward(ctx, D: Float[Tensor, "e ..."]):
        (visited,) = ctx.saved_tensors
        return D.masked_fill(~visited.view(-1, *[1] * (D.ndim - 1)), 0), None
