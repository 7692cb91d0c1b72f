"""Experts without a loop on the host: all of them in one grouped product, over rows sorted by expert.

    y_r = W2_e inner(W13_e x_r + b13_e) + b2_e      e the expert of row r, which no one but the GPU knows

The host never asks how many rows an expert has. `ends` says it to torch's grouped product (`F.grouped_mm`): expert e
has the rows from ends_{e-1} to ends_e. Pairs that nobody computes have no row. Where the host does not know how many
there are, rows are left behind the last expert's that nobody writes or reads, forward and backward.

    n tokens   k experts a token visits   d width   e experts   f hidden width   r 2 where an expert has a gate, else 1
    p rows: pairs that are computed, if the host knows how many, else n k
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from fast.kernels import experts as kernels
from fast.local import has_kernels
from fast.operators import operator
from fast.routers import by_expert
from reference import moe
from reference.head import product_of
from reference.moe import Drop, Groups, counts_of, each, spared, thinned
from reference.routers import Routing


def experts(
    x: Float[Tensor, "n d"],
    routing: Routing,
    w13: Float[Tensor, "e r*f d"],
    w2: Float[Tensor, "e d f"],
    b13: Float[Tensor, "e r*f"] | None = None,
    b2: Float[Tensor, "e d"] | None = None,
    inner: Callable = moe.swiglu,
    gate_at: Literal["output", "input"] = "output",
    drop: Drop | None = None,
    room: int | None = None,
    pairs: int | None = None,
    between: Callable[[], None] | None = None,
) -> Float[Tensor, "n d"]:
    """`reference.moe.experts`: by grouped products where there are some, else the reference's loop, deliberately.

    Grouped are products in bfloat16 on a GPU (tensors of bfloat16, or autocast to it), with d and f multiples of 8 and
    fewer than 1024 experts. On Hopper the host does not wait for the GPU; on GPUs that torch has no such kernel for,
    torch itself loops and waits. All other dtypes, sizes and devices, and padded experts (`room`), are the reference's.
    Differs from the loop by roundings: a bias is added to a product that is rounded, and a token's sums and swiglu are
    rounded once, forward and backward.
    """
    if room is None and has_grouped(x, w13, w2):
        return grouped(x, routing, w13, w2, b13, b2, inner, gate_at, drop, pairs, between)
    return moe.experts(x, routing, w13, w2, b13, b2, inner, gate_at, drop, room, pairs, between)


def has_grouped(x: Tensor, w13: Tensor, w2: Tensor) -> bool:
    """Whether torch multiplies these by a grouped kernel: rows begin at multiples of 16 bytes."""
    narrow = x.is_cuda and all(product_of(y) == torch.bfloat16 for y in (x, w13, w2))
    return narrow and len(w13) < 1024 and all(size % 8 == 0 for size in (*w13.shape[1:], w2.shape[2]))


def grouped(
    x,
    routing: Routing,
    w13,
    w2,
    b13=None,
    b2=None,
    inner: Callable = moe.swiglu,
    gate_at="output",
    drop=None,
    pairs: int | None = None,
    between: Callable[[], None] | None = None,
) -> Float[Tensor, "n d"]:
    """`experts` by grouped products, on any device, in any dtype and sizes that torch takes (on a CPU also float32 with
    d and f multiples of 4). Deterministic, backward too: no two pairs add into one place.

    Kept for a gradient are the rows, both sides of `inner`, and y where a gate follows it.
    """
    e, dtype, pairs = len(w13), product_of(w13), routing.index.numel() if pairs is None else pairs
    place, ends, visited, order = by_expert(routing.index, routing.kept, e)
    rows = taken(x, place, pairs, routing.gate if gate_at == "input" else None, dtype)
    mask = None if drop is None else spared(drop, routing, order[:pairs], e, w2.shape[-1])
    inner = swiglu if inner is moe.swiglu else inner
    y = together(rows, ends, visited, (w13, w2, b13, b2), inner, mask, dtype, between)
    return combined(y, place, routing.gate if gate_at == "output" else None, x.dtype)


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
    visited, dtype, size = counts_of(ends) > 0, product_of(weights[0]), len(weights[0])

    def stacked(parts: list[Tensor]) -> Float[Tensor, "e o ..."]:
        w = torch.stack([part.to(dtype) for part in parts])
        return Visited.apply(F.pad(w, (0, 0) * (w.ndim - 2) + (0, -size % 8)), visited, dtype)

    return product(x.to(dtype), stacked(weights), None if biases is None else stacked(biases), ends)[:, :size]


def together(
    rows: Float[Tensor, "p d"],
    ends: Int[Tensor, " e"],
    visited: Bool[Tensor, " e"],
    weights,
    inner: Callable,
    mask,
    dtype: torch.dtype,
    between: Callable | None = None,
) -> Float[Tensor, "p d"]:
    """All experts over their rows at once. `reference.moe.each`.

    Rows behind the last expert's may hold anything. Torch's products never read them, those of gradients included (the
    weights' sum over an expert's own rows), and what they leave there themselves is not defined: whoever comes before
    or after must not look at it, nor at its gradient. Between the products it is only mapped row by row.
    """
    if not len(rows):  # which the host knows, and grouped products have no gradient of
        return each(rows, [0] * len(ends), weights, inner, mask, between)
    w13, w2, b13, b2 = (None if w is None else Visited.apply(w, visited, dtype) for w in weights)
    h = product(rows, w13, b13, ends)
    a = inner(h) if mask is None else thinned(inner, mask)(h)
    if between is not None:
        between()
    return product(a.to(dtype), w2, b2, ends)


def product(
    x: Float[Tensor, "nk i"], w: Float[Tensor, "e o i"], b: Float[Tensor, "e o"] | None, ends: Int[Tensor, " e"]
) -> Float[Tensor, "nk o"]:
    """W_e x + b_e for each expert's rows. A bias is a product too, with eight ones a row (16 bytes); seven meet
    zeros. So its gradient is the sum of each expert's rows, in an order that does not change."""
    y = F.grouped_mm(x, w.mT, offs=ends)
    if b is None:
        return y
    return y + F.grouped_mm(x.new_ones(len(x), 8), F.pad(b[..., None], (0, 7)).mT, offs=ends)


class Visited(torch.autograd.Function):
    """w in the dtype of products, whose gradient is zero for experts that nobody visits: not every GPU's grouped
    product writes one there. The gradient comes in that dtype and leaves in w's, in one pass: of 64 experts of 2.8
    million numbers each, 1.1 GB in place of 1.8."""

    @staticmethod
    def forward(ctx, w: Float[Tensor, "e ..."], visited: Bool[Tensor, " e"], dtype: torch.dtype):
        ctx.save_for_backward(visited)
        ctx.dtype = w.dtype
        return w.view_as(w) if w.dtype == dtype else w.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, D: Float[Tensor, "e ..."]):
        (visited,) = ctx.saved_tensors
        if has_kernels(D, ctx.dtype):
            return of_visited(D, visited, ctx.dtype), None, None
        return torch.where(visited.view(-1, *[1] * (D.ndim - 1)), D, 0).to(ctx.dtype), None, None


# ------------------------------------------------------------------------------ around the products, on Triton kernels


def taken(
    x: Float[Tensor, "n d"],
    place: Int[Tensor, "n k"],
    rows: int,
    gate: Float[Tensor, "n k"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "p d"]:
    """`reference.moe.taken`, without a copy of x: in one pass each way, deterministic. The gradient is summed in
    float32. On a CPU, in other dtypes than DTYPES and beyond 16384 channels it is the reference's own."""
    if has_kernels(x, dtype) and x.shape[1] <= kernels.WIDEST:
        return dispatched(x.contiguous(), place, rows, None if gate is None else gate.contiguous(), dtype or x.dtype)
    return moe.taken(x, place, rows, gate, dtype)


def combined(
    rows: Float[Tensor, "p d"],
    place: Int[Tensor, "n k"],
    gate: Float[Tensor, "n k"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n d"]:
    """`reference.moe.combined`, without a copy of the rows: in one pass each way, deterministic. Where it is the
    reference's own says `taken`."""
    if has_kernels(rows, dtype) and rows.shape[1] <= kernels.WIDEST:
        return summed(rows.contiguous(), place, None if gate is None else gate.contiguous(), dtype or rows.dtype)
    return moe.combined(rows, place, gate, dtype)


def swiglu(h: Float[Tensor, "p 2*f"]) -> Float[Tensor, "p f"]:
    """`reference.moe.swiglu` of rows, rounded once, forward and backward in one pass each; only h is kept. On a CPU and
    in other dtypes than DTYPES it is the reference's own."""
    if has_kernels(h):
        return gated(h.contiguous())
    return moe.swiglu(h)


@operator("of_visited")
def of_visited(D: Tensor, visited: Tensor, dtype: torch.dtype) -> Tensor:
    return kernels.of_visited(D.contiguous(), visited, dtype)


@of_visited.register_fake
def _(D, visited, dtype):
    return torch.empty_like(D, dtype=dtype, memory_format=torch.contiguous_format)


@operator("dispatched")
def dispatched(x: Tensor, place: Tensor, rows: int, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    return kernels.to_rows(x, place.contiguous(), gate, rows, dtype)[0]


@dispatched.register_fake
def _(x, place, rows, gate, dtype):
    return x.new_empty(rows, x.shape[1], dtype=dtype)


@operator("dispatched_gradients")
def dispatched_gradients(
    D: Tensor, place: Tensor, gate: Tensor | None, x: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dx, and dgate (float32) where x is given; else empty."""
    dx, dots = kernels.to_tokens(D.contiguous(), place.contiguous(), gate, dtype, x)
    return dx, D.new_empty(0, dtype=torch.float32) if dots is None else dots


@dispatched_gradients.register_fake
def _(D, place, gate, x, dtype):
    dots = (0,) if x is None else place.shape
    return D.new_empty(place.shape[0], D.shape[1], dtype=dtype), D.new_empty(dots, dtype=torch.float32)


def dispatched_context(ctx, inputs, output) -> None:
    x, place, _, gate, _ = inputs
    ctx.dtype, ctx.wanted = x.dtype, gate is not None and ctx.needs_input_grad[3]
    ctx.save_for_backward(place, gate, x if ctx.wanted else None)


def dispatched_backward(ctx, D):
    place, gate, x = ctx.saved_tensors
    dx, dgate = dispatched_gradients(D, place, gate, x, ctx.dtype)
    return dx, None, None, dgate.to(gate.dtype) if ctx.wanted else None, None


dispatched.register_autograd(dispatched_backward, setup_context=dispatched_context)


@operator("summed")
def summed(rows: Tensor, place: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    return kernels.to_tokens(rows, place.contiguous(), gate, dtype)[0]


@summed.register_fake
def _(rows, place, gate, dtype):
    return rows.new_empty(place.shape[0], rows.shape[1], dtype=dtype)


@operator("summed_gradients")
def summed_gradients(
    D: Tensor, place: Tensor, gate: Tensor | None, rows: Tensor | None, size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """drows, and dgate (float32) where the rows are given; else empty."""
    drows, dots = kernels.to_rows(D.contiguous(), place.contiguous(), gate, size, dtype, rows)
    return drows, D.new_empty(0, dtype=torch.float32) if dots is None else dots


@summed_gradients.register_fake
def _(D, place, gate, rows, size, dtype):
    dots = (0,) if rows is None else place.shape
    return D.new_empty(size, D.shape[1], dtype=dtype), D.new_empty(dots, dtype=torch.float32)


def summed_context(ctx, inputs, output) -> None:
    rows, place, gate, _ = inputs
    ctx.size, ctx.dtype = len(rows), rows.dtype
    ctx.wanted = gate is not None and ctx.needs_input_grad[2]
    ctx.save_for_backward(place, gate, rows if ctx.wanted else None)


def summed_backward(ctx, D):
    place, gate, rows = ctx.saved_tensors
    drows, dgate = summed_gradients(D, place, gate, rows, ctx.size, ctx.dtype)
    return drows, None, dgate.to(gate.dtype) if ctx.wanted else None, None


summed.register_autograd(summed_backward, setup_context=summed_context)


@operator("swiglu")
def gated(h: Tensor) -> Tensor:
    return kernels.swiglu(h)


@gated.register_fake
def _(h):
    return h.new_empty(h.shape[0], h.shape[1] // 2)


@operator("swiglu_gradient")
def gated_gradient(da: Tensor, h: Tensor) -> Tensor:
    return kernels.swiglu_gradient(da.contiguous(), h)


@gated_gradient.register_fake
def _(da, h):
    return torch.empty_like(h)


def gated_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


gated.register_autograd(lambda ctx, da: gated_gradient(da, *ctx.saved_tensors), setup_context=gated_context)
