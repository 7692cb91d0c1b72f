"""What the operators of all families have in common, as torch sees them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def results(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, segments: int, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the first three results of every family look like: o, the last memory, the memories between segments."""
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h, K, V = q.shape[2], q.shape[3], v.shape[3]
    o = torch.empty_like(v, dtype=torch.float32 if wide else v.dtype)
    states = (n, h, segments + 1, K, V) if segments > 1 else (0,)
    return o, q.new_empty(n, h, K, V, dtype=torch.float32), q.new_empty(states, dtype=torch.float32)


def packed(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous: a gradient arrives expanded from a sum, a compiler may have chosen other strides."""
    return [None if x is None else x.contiguous() for x in tensors]


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
