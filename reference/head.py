"""From the last layer's features to the loss."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100  # the label of a token that is not to be predicted


def token_losses(
    x: Float[Tensor, "n d"], head: Float[Tensor, "vocabulary d"], labels: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """-log softmax(x headᵀ)[label] of every token in nats, float32 (float64 stays); 0 where the label is -100."""
    logits = F.linear(x, head)
    logits = logits if logits.dtype == x.new_zeros(()).double().dtype else logits.float()
    return F.cross_entropy(logits, labels, reduction="none", ignore_index=IGNORED)
