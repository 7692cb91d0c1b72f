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
    if len(x) > part_of(len(head), held):
        return losses_of(*PieceByPiece.apply(x, head, labels, held, product_of(x)), labels, joined)
    logits = F.linear(x, head)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if joined is None:
        return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
    return losses_of(*sums_of(logits, labels), labels, joined)


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
    if kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class PieceByPiece(torch.autograd.Function):
    """Of all tokens, with at most `held` logits at once: l, the logarithm of each one's sum of exponentials, and o, its
    label's logit; kept are x, the head and l.

    With p = softmax(x headᵀ) and the cotangents dl of l and do of o, E = dl p + do onehot(label), dx = E head and
    dhead = Eᵀ x, which are added up over the pieces in float32 at least.
    """

    @staticmethod
    def forward(ctx, x, head, labels, held: int, dtype: torch.dtype):
        sums, own = sums_by_pieces(x, head.to(dtype), labels, held, sums_of)
        ctx.save_for_backward(x, head, labels, sums)
        ctx.held, ctx.dtype = held, dtype
        return sums, own

    @staticmethod
    @once_differentiable
    def backward(ctx, dl: Float[Tensor, " n"], do: Float[Tensor, " n"]):
        x, head, labels, sums = ctx.saved_tensors
        dx, dhead = gradients_by_pieces(dl, do, x, head.to(ctx.dtype), labels, sums, ctx.held, cotangents)
        return dx, dhead.to(head.dtype), None, None, None


def sums_of(
    logits: Float[Tensor, "p vocabulary"], labels: Int[Tensor, " p"]
) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """l and o of some tokens, float32 at least; where a label is -100, o is any logit."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(-1), logits.gather(1, labels[:, None].clamp(min=0))[:, 0]


def cotangents(
    logits: Float[Tensor, "p w"],
    labels: Int[Tensor, " p"],
    sums: Float[Tensor, " p"],
    dl: Float[Tensor, " p"],
    do: Float[Tensor, " p"],
    first: int,
) -> Float[Tensor, "p w"]:
    """E of some tokens and of words from `first` on, in the logits' dtype, perhaps in their place."""
    E = logits.to(sums.dtype).sub_(sums[:, None]).exp_().mul_(dl[:, None])
    label = labels - first
    here = (label >= 0) & (label < E.shape[1])
    return E.scatter_add_(1, label.where(here, 0)[:, None], do.where(here, 0)[:, None]).to(logits.dtype)


def sums_by_pieces(
    x: Float[Tensor, "n d"],
    head: Float[Tensor, "vocabulary d"],
    labels: Int[Tensor, " n"],
    held: int,
    sums_of: Callable,
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """l and o of all tokens; products are computed in the head's dtype."""
    wide = torch.promote_types(head.dtype, torch.float32)
    sums, own = x.new_empty(len(x), dtype=wide), x.new_empty(len(x), dtype=wide)
    with torch.autocast(x.device.type, enabled=False):
        for piece in pieces(len(x), part_of(len(head), held)):
            sums[piece], own[piece] = sums_of(F.linear(x[piece].to(head.dtype), head), labels[piece])
    return sums, own


def gradients_by_pieces(
    dl: Float[Tensor, " n"],
    do: Float[Tensor, " n"],
    x: Float[Tensor, "n d"],
    head: Float[Tensor, "vocabulary d"],
    labels: Int[Tensor, " n"],
    sums: Float[Tensor, " n"],
    held: int,
    cotangents: Callable,
    even: int = 1,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "vocabulary d"]]:
    """dx, and dhead in the dtype of l. The longer of tokens and words is cut (words at multiples of `even`), since each
    piece adds to the gradient of all of the other. No piece's logits are there when the next one's are made."""
    dx, dhead = (torch.zeros_like(y, dtype=sums.dtype) for y in (x, head))
    n, vocabulary = len(x), len(head)
    rounded = x.to(head.dtype) if n < vocabulary else x  # once where every piece needs all of it

    def add(tokens: slice, words: slice) -> None:
        features, some = rounded[tokens].to(head.dtype), head[words]
        given = (labels[tokens], sums[tokens], dl[tokens], do[tokens], words.start)
        E = cotangents(F.linear(features, some), *given)
        dx[tokens].add_(E @ some)
        dhead[words].add_(E.T @ features)

    with torch.autocast(x.device.type, enabled=False):
        if n < vocabulary:
            for words in pieces(vocabulary, part_of(n, held, even)):
                add(slice(0, n), words)
        else:
            for tokens in pieces(n, part_of(vocabulary, held)):
                add(tokens, slice(0, vocabulary))
    return dx.to(x.dtype), dhead


def part_of(others: int, held: int, even: int = 1) -> int:
    """How many tokens (words) have at most `held` logits of so many words (tokens), a multiple of `even`: one at
    least."""
    return max(held // max(others, 1) // even, 1) * even


def pieces(n: int, part: int) -> list[slice]:
    return [slice(start, min(start + part, n)) for start in range(0, n, part)]
