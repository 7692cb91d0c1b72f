"""Triton kernels for keys that are made of gates: k = 1 - e^g (HGRN2's, whose write is what the decay leaves room for).

Bytes. In U = one b t h d tensor in 16 bits: forward reads 2 U (gates are float32) and writes 1; backward reads 3 U and
writes 2. PyTorch's own way, a number at a time in float32 and a copy for the products, moves 7 U and 16 U.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels import decay
from fast.kernels.decay import INTERPRETED, cdiv

SIZE = 16384 if INTERPRETED else 2048  # numbers a program


@triton.jit
def complement_of(x):
    """1 - e^x in float32. Near zero by its series, for the difference would have no digits left."""
    small = -x * (1.0 + x * (1 / 2) * (1.0 + x * (1 / 3) * (1.0 + x * (1 / 4) * (1.0 + x * (1 / 5)))))
    return tl.where(tl.abs(x) < 0.0625, small, 1.0 - tl.exp(x))


@triton.jit(do_not_specialize=["count"])
def complement_forward(g, k, count, N: tl.constexpr):
    """k = 1 - e^g."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    x = tl.load(g + at, mask=at < count, other=0.0)
    tl.store(k + at, complement_of(x).to(k.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=["count"])
def complement_backward(g, dk, dg, count, N: tl.constexpr):
    """dg = -e^g dk."""
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    x = tl.load(g + at, mask=at < count, other=0.0)
    tl.store(dg + at, -tl.exp(x) * tl.load(dk + at, mask=at < count, other=0.0).to(tl.float32), mask=at < count)


def complement(g: Tensor, dtype: torch.dtype) -> Tensor:
    """1 - e^g as `dtype`, of float32 g, contiguous."""
    k = torch.empty_like(g, dtype=dtype)
    decay.launch(complement_forward, cdiv(g.numel(), SIZE), g, k, g.numel(), N=SIZE)
    return k


def complement_gradient(dk: Tensor, g: Tensor) -> Tensor:
    """-e^g dk in float32."""
    dg = torch.empty_like(g)
    decay.launch(complement_backward, cdiv(g.numel(), SIZE), g, dk, dg, g.numel(), N=SIZE)
    return dg
