"""From the last layer's features to the loss.

n tokens   d width   p tokens of a piece
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # the label of a token that is not to be predicted
HELD = 2**28  # logits that are there at one moment, unless somebody says otherwise: 1 GiB in float32


def token_losses(
    x: Float[Tensor, "n d"],
    head: Float[Tensor, "vocabulary d"],
    labels: Int[Tensor, " n"],
    held: int = HELD,
    joined: Callable | None = None,
) -> Float[Tensor, " n"]:
    """-log softmax(x headᵀ)[label] of every token in nats, float32 (float64 stays); 0 where the label is -100.

    More than `held` logits are never there at once: of so many tokens they are made piece by piece, and once more in
    the backward pass, from the features and a number a token.

    `joined` is for a head that has a part of the words: it makes the losses of the logarithm of each token's sum of
    exponentials and its label's logit, 0 where the label is -100.
    """
    rows = max(held // max(len(head), 1), 1)
    if len(x) <= rows:
        logits = F.linear(x, head)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if joined is None:
            return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
        sums, own = logits.logsumexp(-1), own_logits(logits, labels)
    else:
        sums, own = PieceByPiece.apply(x, head, labels, rows, product_of(x))
    if joined is None:
        return (sums - own).where(labels != IGNORED, 0)
    return joined(sums, own.where(labels != IGNORED, 0))


def own_logits(logits: Float[Tensor, "n vocabulary"], labels: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Of each token that of its label; where that is -100, any."""
    return logits.gather(1, labels[:, None].clamp(min=0))[:, 0]


def product_of(x: Tensor) -> torch.dtype:
    """In which dtype a product with x is computed: autocast's where it is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class PieceByPiece(torch.autograd.Function):
    """Of `rows` tokens after `rows` tokens: l, the logarithm of each one's sum of exponentials, and o, its label's
    logit; kept are x, the head and l.

    With p = softmax(x headᵀ) and the cotangents dl of l and do of o, E = dl p + do onehot(label), dx = E head and
    dhead = Eᵀ x, which is added up over the pieces in float32 at least.
    """

    @staticmethod
    def forward(ctx, x, head, labels, rows: int, dtype: torch.dtype):
        wide = torch.promote_types(dtype, torch.float32)
        sums, own = x.new_empty(len(x), dtype=wide), x.new_empty(len(x), dtype=wide)
        with torch.autocast(x.device.type, enabled=False):
            narrow = head.to(dtype)
            for piece in pieces(len(x), rows):
                logits = F.linear(x[piece].to(dtype), narrow).to(wide)
                sums[piece] = logits.logsumexp(-1)
                own[piece] = own_logits(logits, labels[piece])
        ctx.save_for_backward(x, head, labels, sums)
        ctx.rows, ctx.dtype = rows, dtype
        return sums, own

    @staticmethod
    @once_differentiable
    def backward(ctx, dl: Float[Tensor, " n"], do: Float[Tensor, " n"]):
        x, head, labels, sums = ctx.saved_tensors
        dx, dhead = torch.empty_like(x), torch.zeros_like(head, dtype=sums.dtype)
        with torch.autocast(x.device.type, enabled=False):
            narrow = head.to(ctx.dtype)
            for piece in pieces(len(x), ctx.rows):
                logits = F.linear(x[piece].to(ctx.dtype), narrow).to(sums.dtype)
                E = logits.sub_(sums[piece, None]).exp_().mul_(dl[piece, None])
                E = E.scatter_add_(1, labels[piece, None].clamp(min=0), do[piece, None]).to(ctx.dtype)
                dx[piece] = (E @ narrow).to(x.dtype)
                dhead += E.T @ x[piece].to(ctx.dtype)
        return dx, dhead.to(head.dtype), None, None, None


def pieces(n: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
