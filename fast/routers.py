"""Choosing experts and sorting pairs by them on Triton kernels: one launch and three."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fast.kernels import routers as kernels
from fast.kernels.decay import INTERPRETED
from fast.local import has_kernels
from fast.operators import operator
from reference import moe, routers
from reference.moe import Sorted


def top(values: Float[Tensor, "n e"], k: int) -> Int[Tensor, "n k"]:
    """`reference.routers.top`, the same for ties and nan too. On a CPU, in other dtypes than float32 and beyond 1024
    columns it is the reference's own."""
    if values.dtype == torch.float32 and has_kernels(values) and values.shape[1] <= kernels.WIDEST:
        return largest(values.contiguous(), k)
    return routers.top(values, k)


def by_expert(index: Int[Tensor, "n k"], kept: Bool[Tensor, "n k"], experts: int) -> Sorted:
    """`reference.moe.by_expert`. On a CPU and from 1024 experts on it is the reference's own."""
    if (kept.is_cuda or INTERPRETED) and experts < kernels.WIDEST:
        return Sorted(*sorted_pairs(index.contiguous(), kept.contiguous(), experts))
    return moe.by_expert(index, kept, experts)


@operator("top")
def largest(values: Tensor, k: int) -> Tensor:
    return kernels.top(values, k)


@largest.register_fake
def _(values, k):
    return values.new_empty(values.shape[0], k, dtype=torch.int64)


@operator("by_expert")
def sorted_pairs(index: Tensor, kept: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels.by_expert(index, kept, experts)


@sorted_pairs.register_fake
def _(index, kept, experts):
    ends = index.new_empty(experts, dtype=torch.int32)
    return torch.empty_like(index), ends, kept.new_empty(experts), index.new_empty(index.numel())
