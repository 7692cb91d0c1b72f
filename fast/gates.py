"""Keys that are made of gates, as an op of one pass each way."""

import torch
from torch import Tensor

from fast.kernels import gates as kernels
from fast.operators import operator


@operator("complement")
def complement(g: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - e^g, rounded once to `dtype`, one of 16 bits; g is float32."""
    return kernels.complement(g.contiguous(), dtype)


@complement.register_fake
def _(g, dtype):
    return torch.empty_like(g, dtype=dtype, memory_format=torch.contiguous_format)


@operator("complement_gradient")
def complement_gradient(dk: Tensor, g: Tensor) -> Tensor:
    return kernels.complement_gradient(dk.contiguous(), g.contiguous())


@complement_gradient.register_fake
def _(dk, g):
    return torch.empty_like(g, memory_format=torch.contiguous_format)


complement.register_autograd(
    lambda ctx, dk: (complement_gradient(dk, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
