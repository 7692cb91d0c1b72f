"""Triton kernels between a head's logits and the losses, for `reference.head`'s two steps of a piece.

    sums         l = log Σ_w exp(z_w),  o = z_label                                       a row of logits z : vocabulary
    cotangents   E_w = dl exp(z_w - l) + do [w = label]                                    of a part of the words

Bytes. Of a logit in 16 bits, sums read 2 and write none, and cotangents read 2 and write 2, in its own place; a token
has two or four numbers more. PyTorch's own steps go over float32 copies: 4 read or written a dozen times.

The sum is made in one pass: each lane keeps the highest logit that it has seen, and the sum of exponentials against
it, of every C-th word, and lanes meet at the end of the row. Rows may be wider than the vocabulary, so that each
begins where 16 bytes do: what stands behind the words is not looked at, and its E is 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels.decay import INTERPRETED, cdiv, launch, next_power_of_2
from reference import head

EVEN = 16  # widths of rows are multiples
IGNORED = tl.constexpr(head.IGNORED)
LEAST = tl.constexpr(-3.0e38)  # no logit has been seen: finite, since its distance to -inf is no number


@triton.jit(do_not_specialize=["rows"])
def sums_forward(
    logits, labels, sums, own, rows, words, width,
    N: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A label that is no word has the logit NaN, for nobody waits for a GPU to refuse it."""
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    ok = row < rows
    begin = logits + (row * width)[:, None, None]
    lane = (tl.arange(0, R)[:, None] * C + tl.arange(0, C)[None, :])[None, :, :]
    highest = tl.full((N, C), LEAST, tl.float32)
    total = tl.zeros((N, C), tl.float32)
    for start in range(0, words, R * C):
        column = start + lane
        z = tl.load(begin + column, mask=ok[:, None, None] & (column < width), other=0.0).to(tl.float32)
        z = tl.where(column < words, z, float("-inf"))
        higher = tl.maximum(highest, tl.max(z, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(z - higher[:, None, :]), 1)
        highest = higher
    top = tl.max(highest, 1)
    total = tl.sum(total * tl.exp(highest - top[:, None]), 1)
    tl.store(sums + row, top + tl.log(total), mask=ok)
    label = tl.load(labels + row, mask=ok, other=0)
    known = (label >= 0) & (label < words)
    z = tl.load(logits + row * width + label, mask=ok & known, other=0.0).to(tl.float32)
    known = known | (label == IGNORED)
    tl.store(own + row, tl.where(known, z, float("nan")), mask=ok)


@triton.jit(do_not_specialize=["rows", "first"])
def cotangents_backward(
    logits, labels, sums, dl, do, rows, words, width, first,
    N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """E takes the place of the logits, which are those of words from `first` on."""
    slices = tl.cdiv(width, C)
    row = (tl.program_id(0) // slices).to(tl.int64) * N + tl.arange(0, N)
    column = (tl.program_id(0) % slices * C + tl.arange(0, C))[None, :]
    ok = row < rows
    at, here = (row * width)[:, None] + column, ok[:, None] & (column < width)
    z = tl.load(logits + at, mask=here, other=float("-inf")).to(tl.float32)
    label = tl.load(labels + row, mask=ok, other=0)[:, None] - first
    l = tl.load(sums + row, mask=ok, other=0.0)[:, None]  # noqa: E741
    up = tl.load(dl + row, mask=ok, other=0.0)[:, None]
    own = tl.load(do + row, mask=ok, other=0.0)[:, None]
    p = tl.exp(tl.where(column < words, z - l, float("-inf")))
    E = up * p + tl.where(column == label, own, 0.0)
    tl.store(logits + at, E.to(logits.dtype.element_ty), mask=here)


def tile_of(width: int) -> tuple[int, int, int]:
    """Rows a program takes at once, and of each R words for every of C lanes: 32 logits a thread of a long row."""
    if INTERPRETED:
        return 32, 2, 16
    C = min(next_power_of_2(width), 2048)
    return 2048 // C, min(4, next_power_of_2(cdiv(width, C))), C


def sums(logits: Tensor, labels: Tensor, words: int) -> tuple[Tensor, Tensor]:
    """l and o, float32, of logits whose first `words` columns are words; labels are contiguous."""
    (rows, width), (N, R, C) = logits.shape, tile_of(logits.shape[1])
    summed, own = (logits.new_empty(rows, dtype=torch.float32) for _ in range(2))
    args = (logits, labels, summed, own, rows, words, width)
    launch(sums_forward, cdiv(rows, N), *args, N=N, R=R, C=C, num_warps=8)
    return summed, own


def cotangents(
    logits: Tensor, labels: Tensor, summed: Tensor, dl: Tensor, do: Tensor, first: int, words: int
) -> Tensor:
    """E, in the place of the logits of words from `first` on, if less than `words`; the others are contiguous, l, dl
    and do float32."""
    (rows, width), (N, R, C) = logits.shape, tile_of(logits.shape[1])
    args = (logits, labels, summed, dl, do, rows, words - first, width, first)
    launch(cotangents_backward, cdiv(rows, N) * cdiv(width, R * C), *args, N=N, C=R * C, num_warps=8)
    return logits
