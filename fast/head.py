"""`reference.head` on Triton kernels: products are torch's, and logits are read once each way, in their own dtype."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from fast.kernels import head as kernels
from fast.local import has_kernels
from fast.operators import of_dtype, operator, packed
from reference import head as plain
from reference.head import HELD, product_of


def token_losses(
    x: Float[Tensor, "n d"],
    head: Float[Tensor, "vocabulary d"],
    labels: Int[Tensor, " n"],
    held: int = HELD,
    joined: Callable | None = None,
) -> Float[Tensor, " n"]:
    """`reference.head.token_losses`, always piece by piece: what is kept between the passes is x, the head and a number
    a token, and at most `held` logits (of a vocabulary filled up to a multiple of 16) are there in the dtype of their
    product, in whose place their gradient comes. The loss of a label that is no word of a whole head is NaN. On a CPU,
    and in other dtypes than fast.local.DTYPES, it is the reference's own."""
    dtype = product_of(x)
    if not has_kernels(x, dtype):
        return plain.token_losses(x, head, labels, held, joined)
    return plain.losses_of(*summed(x, head, labels, held, dtype), labels, joined)


def even(head: Float[Tensor, "vocabulary d"], dtype: torch.dtype) -> Float[Tensor, "wider d"]:
    """The head in the dtype of its products, with words of zeros up to a multiple of 16."""
    spare = -len(head) % kernels.EVEN
    return F.pad(of_dtype(head, dtype), (0, 0, 0, spare)) if spare else of_dtype(head, dtype)


@operator("summed_logits")
def summed(x: Tensor, head: Tensor, labels: Tensor, held: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """l and o of `reference.head.PieceByPiece`."""
    sums = partial(kernels.sums, words=len(head))
    return plain.sums_by_pieces(x, even(head, dtype), labels.contiguous(), held, sums)


@summed.register_fake
def _(x, head, labels, held, dtype):
    return tuple(x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))


@operator("summed_logits_gradients")
def summed_gradients(
    dl: Tensor, do: Tensor, x: Tensor, head: Tensor, labels: Tensor, sums: Tensor, held: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """dx and dhead."""
    cotangents = partial(kernels.cotangents, words=len(head))
    given = packed(dl, do, x, even(head, dtype), labels, sums)
    dx, dhead = plain.gradients_by_pieces(*given, held, cotangents, kernels.EVEN)
    return dx, of_dtype(dhead[: len(head)], head.dtype)


@summed_gradients.register_fake
def _(dl, do, x, head, labels, sums, held, dtype):
    return tuple(torch.empty_like(y, memory_format=torch.contiguous_format) for y in (x, head))


def summed_context(ctx, inputs, output) -> None:
    x, head, labels, ctx.held, ctx.dtype = inputs
    ctx.save_for_backward(x, head, labels, output[0])


def summed_backward(ctx, dl, do):
    x, head, labels, sums = ctx.saved_tensors
    return *summed_gradients(dl, do, x, head, labels, sums, ctx.held, ctx.dtype), None, None, None


summed.register_autograd(summed_backward, setup_context=summed_context)
