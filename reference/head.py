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
    rows = rows_of(len(head), held)
    if len(x) > rows:
        return losses_of(*PieceByPiece.apply(x, head, labels, rows, product_of(x)), labels, joined)
    logits = F.linear(x, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if joined is None:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    return losses_of(*sums_of(logits, labels), labels, joined)


def rows_of(words: int, held: int) -> int:
    """Tokens of a piece that has at most `held` logits."""
    return max(held // max(words, 1), 1)


def losses_of(
    sums: Float[Tensor, " n"], own: Float[Tensor, " n"], labels: Int[Tensor, " n"], joined: Callable | None
) -> Float[Tensor, " n"]:
    """l - o, or what `joined` makes of them, but where nothing is to be predicted."""
    if joined is None:
        return (sums - own).where(labels != IGNORED, 0)
    return joined(sums, own.where(labels != IGNORED, 0))


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
        sums, own = sums_by_pieces(x, head.to(dtype), labels, rows, sums_of)
        ctx.save_for_backward(x, head, labels, sums)
        ctx.rows, ctx.dtype = rows, dtype
        return sums, own

    @staticmethod
    @once_differentiable
    def backward(ctx, dl: Float[Tensor, " n"], do: Float[Tensor, " n"]):
        x, head, labels, sums = ctx.saved_tensors
        dx, dhead = gradients_by_pieces(dl, do, x, head.to(ctx.dtype), labels, sums, ctx.rows, cotangents)
        return dx, dhead.to(head.dtype), None, None, None


def sums_of(
    logits: Float[Tensor, "p vocabulary"], labels: Int[Tensor, " p"]
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """l and o of a piece, float32 at least; where a label is -100, o is any logit."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1), logits.gather(1, labels[:, None].clamp(min=0))[:, 0]


def cotangents(
    logits: Float[Tensor, "p vocabulary"],
    labels: Int[Tensor, " p"],
    sums: Float[Tensor, " p"],
    dl: Float[Tensor, " p"],
    do: Float[Tensor, " p"],
) -> Float[Tensor, "p vocabulary"]:
    """E of a piece in the logits' dtype, perhaps in their place."""
    E = logits.to(sums.dtype).sub_(sums[:, None]).exp_().mul_(dl[:, None])
    return E.scatter_add_(1, labels[:, None].clamp(min=0), do[:, None]).to(logits.dtype)


def sums_by_pieces(
    x: Float[Tensor, "n d"],
    head: Float[Tensor, "vocabulary d"],
    labels: Int[Tensor, " n"],
    rows: int,
    sums_of: Callable,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """l and o of all tokens; products are computed in the head's dtype."""
    wide = torch.promote_types(head.dtype, torch.float32)
    sums, own = x.new_empty(len(x), dtype=wide), x.new_empty(len(x), dtype=wide)
    with torch.autocast(x.device.type, enabled=False):
        for piece in pieces(len(x), rows):
            sums[piece], own[piece] = sums_of(F.linear(x[piece].to(head.dtype), head), labels[piece])
    return sums, own


def gradients_by_pieces(
    dl: Float[Tensor, " n"],
    do: Float[Tensor, " n"],
    x: Float[Tensor, "n d"],
    head: Float[Tensor, "vocabulary d"],
    labels: Int[Tensor, " n"],
    sums: Float[Tensor, " n"],
    rows: int,
    cotangents: Callable,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "vocabulary d"]]:
    """dx, and dhead in the dtype of l. No piece's logits are there any more when the next one's are made."""
    dx, dhead = torch.empty_like(x), torch.zeros_like(head, dtype=sums.dtype)

    def add(piece: slice) -> None:
        features = x[piece].to(head.dtype)
        E = cotangents(F.linear(features, head), labels[piece], sums[piece], dl[piece], do[piece])
        dx[piece] = E @ head
        dhead.add_(E.T @ features)

    with torch.autocast(x.device.type, enabled=False):
        for piece in pieces(len(x), rows):
            add(piece)
    return dx, dhead


def pieces(n: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
