"""What the operators of all families have in common, as torch sees them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from reference.ops import observed

LARGEST = 256  # channels of keys and of values, and slots


def small_enough(title: str, **sizes: int) -> None:
    """ValueError, one line, where there is more of something than the programs of a family hold."""
    if max(sizes.values()) > LARGEST:
        said = " and ".join(f"{name} = {size}" for name, size in sizes.items())
        raise ValueError(f"{title}: {said}, fast kernels take at most {LARGEST}; use the backend 'reference'")


class Operator:
    """A function as torch's operator `linear_moe::name`, with a rule for shapes and perhaps a gradient.

    An operator is what a compiler sees as a whole. But every call of one passes torch's dispatcher and many layers of
    Python, which takes longer than the kernels of a short sequence: where nobody looks on, the function is called as it
    is, with the same gradient.
    """

    def __init__(self, name: str, function: Callable, mutated: tuple[str, ...]):
        self.function, self.differentiable = function, None
        self.seen = torch.library.custom_op(f"linear_moe::{name}", function, mutates_args=mutated)
        self.register_fake = self.seen.register_fake

    def register_autograd(self, backward: Callable, *, setup_context: Callable) -> None:
        self.seen.register_autograd(backward, setup_context=setup_context)
        function, once = self.function, once_differentiable(backward)

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                output = function(*inputs)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            def backward(ctx, *cotangents):
                # the wrapper takes a while, and where no graph is made there is nothing that it could refuse
                return (once if torch.is_grad_enabled() else backward)(ctx, *cotangents)

        self.differentiable = Differentiable

    def __call__(self, *inputs):
        if observed():
            return self.seen(*inputs)
        if self.differentiable is None or not differentiated(*inputs):
            return self.function(*inputs)
        return self.differentiable.apply(*inputs)


def differentiated(*inputs) -> bool:
    """Whether a gradient of any of these may be wanted."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)


def operator(name: str, *mutated: str) -> Callable[[Callable], Operator]:
    """A decorator: the function as an `Operator` that overwrites the arguments `mutated`."""
    return lambda function: Operator(name, function, mutated)


def results(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, segments: int, wide: bool, rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What the first three results of every family look like: o, the last memory, the memories between segments.
    `rows` of a memory, if not as many as q has columns."""
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h, K, V = q.shape[2], rows or q.shape[3], v.shape[3]
    o = torch.empty_like(v, dtype=torch.float32 if wide else v.dtype)
    states = (n, h, segments + 1, K, V) if segments > 1 else (0,)
    return o, q.new_empty(n, h, K, V, dtype=torch.float32), q.new_empty(states, dtype=torch.float32)


def packed(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous: a gradient arrives expanded from a sum, a compiler may have chosen other strides."""
    return [None if x is None else x.contiguous() for x in tensors]


def of_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which for what is so already takes longer than to look."""
    return x if x.dtype == dtype else x.to(dtype)


def even(x: Tensor, rows: int = 0) -> Tensor:
    """The last axis filled with zeros to a multiple of 16 (and the one before with `rows` zeros)."""
    columns = -x.shape[-1] % 16
    return F.pad(x, (0, columns, 0, rows)) if columns or rows else x


def by_columns(run: Callable, v: Tensor, memory: Tensor | None, widths: list[int]) -> tuple[Tensor, Tensor]:
    """(o, the last memory) of columns of v on their own, since no column of a memory knows of another."""
    if len(widths) == 1:  # no split, whose gradient would be a copy
        return run(v, memory)
    memories = [None] * len(widths) if memory is None else memory.split(widths, -1)
    parts = [run(x, M) for x, M in zip(v.split(widths, -1), memories, strict=True)]
    return tuple(torch.cat(y, -1) for y in zip(*parts, strict=True))
