"""From the last layer's features to the loss.

n tokens   d width   p tokens of a piece
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # the label of a token that is not to be predicted
HELD = 2**28  # logits that are there at one moment, unless somebody says otherwise: 1 GiB in float32


def token_losses(
    x: Float[Tensor, "n d"], head: Float[Tensor, "vocabulary d"], labels: Int[Tensor, " n"], held: int = HELD
) -> Float[Tensor, " n"]:
    """-log softmax(x headᵀ)[label] of every token in nats, float32 (float64 stays); 0 where the label is -100.

    More than `held` logits are never there at once: of so many tokens they are made piece by piece, and once more in
    the backward pass, from the features and a number a token.
    """
    rows = max(held // max(len(head), 1), 1)
    if len(x) > rows:
        return PieceByPiece.apply(x, head, labels, rows, product_of(x))
    logits = F.linear(x, head)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)


def product_of(x: Tensor) -> torch.dtype:
    """In which dtype a product with x is computed: autocast's where it is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


class PieceByPiece(torch.autograd.Function):
    """The losses of `rows` tokens after `rows` tokens; kept are x, the head and the logarithm of each token's sum.

    With p = softmax(x headᵀ) and D the cotangent of the losses, E = D (p - onehot(label)), dx = E head and
    dhead = Eᵀ x, which is added up over the pieces in float32 at least.
    """

    @staticmethod
    def forward(ctx, x, head, labels, rows: int, dtype: torch.dtype):
        wide, known = torch.promote_types(dtype, torch.float32), labels != IGNORED
        sums, own = x.new_empty(len(x), dtype=wide), x.new_empty(len(x), dtype=wide)
        with torch.autocast(x.device.type, enabled=False):
            narrow = head.to(dtype)
            for piece in pieces(len(x), rows):
                logits = F.linear(x[piece].to(dtype), narrow).to(wide)
                sums[piece] = logits.logsumexp(-1)
                own[piece] = logits.gather(1, labels[piece, None].clamp(min=0))[:, 0]
        ctx.save_for_backward(x, head, labels, sums)
        ctx.rows, ctx.dtype = rows, dtype
        return (sums - own).where(known, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, D: Float[Tensor, " n"]):
        x, head, labels, sums = ctx.saved_tensors
        D = D.where(labels != IGNORED, 0)[:, None]
        dx, dhead = torch.empty_like(x), torch.zeros_like(head, dtype=sums.dtype)
        with torch.autocast(x.device.type, enabled=False):
            narrow = head.to(ctx.dtype)
            for piece in pieces(len(x), ctx.rows):
                logits = F.linear(x[piece].to(ctx.dtype), narrow).to(sums.dtype)
                E = logits.sub_(sums[piece, None]).exp_()
                E.scatter_add_(1, labels[piece, None].clamp(min=0), E.new_full((len(E), 1), -1.0))
                E = E.mul_(D[piece]).to(ctx.dtype)
                dx[piece] = (E @ narrow).to(x.dtype)
                dhead += E.T @ x[piece].to(ctx.dtype)
        return dx, dhead.to(head.dtype), None, None, None


def pieces(n: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
