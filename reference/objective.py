"""What a model is trained to say: of packed tokens, which it sees and which it is asked for.

    next      Σ_t -log p(x_{t+1} | x_1 ... x_t)                   each token is asked for the one behind it
    masked    Σ_{t ∈ H} -log p(x_t | x_j, j ∉ H)                  tokens that are hidden are asked for where they stand

H is drawn: every word is in it with probability `rate`, and one more id, the mask, stands in its place. That is BERT's
objective (1810.04805) but for its exceptions, where a hidden word is now and then left, or another one put there. What
stands on both sides of a hidden token says something about it, so the model has no causal mask
(`reference.bidirectional`). Both losses are divided by how many tokens are asked for.

    b batch (1, packed)   t time
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from reference.bidirectional import both_ways, without_count
from reference.head import IGNORED
from reference.lsm import row
from reference.noise import noise
from reference.ops import Ops
from reference.presets import Model


class Masks(NamedTuple):
    """Which tokens are hidden, and by what."""

    rate: float  # share of the words
    key: int  # of the draw
    words: int  # tokens below are words; others, such as a document's start, stay and are not asked for
    mask: int  # the id that stands in their place


Posed = tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]  # tokens that are seen; labels, -100 where nothing is asked


def next_tokens(
    tokens: Int[Tensor, "b t"], labels: Int[Tensor, "b t"], index: Int[Tensor, "b t"], masks: Masks
) -> Posed:
    """All tokens are seen; labels are those of the text."""
    return tokens, labels


def masked_tokens(
    tokens: Int[Tensor, "b t"], labels: Int[Tensor, "b t"], index: Int[Tensor, "b t"], masks: Masks
) -> Posed:
    """Who is hidden is a function of (key, index), the token's number in the run: of no rank, cut or order."""
    chosen = (noise(masks.key, index, 1).squeeze(-1) < masks.rate) & (tokens < masks.words)
    return torch.where(chosen, masks.mask, tokens), torch.where(chosen, tokens, IGNORED)


class Objective(NamedTuple):
    """One row of the table."""

    pose: Callable  # (tokens, labels, index, masks) -> Posed
    causal: bool  # whether a token sees those before it alone
    ids: int  # of the vocabulary, besides those of text
    one: str  # what is asked for
    prefix: str  # of the names of measures, which tells them from those of other objectives

    def ops(self, ops: Ops) -> Ops:
        """What the model is built of; cut these over ranks, not the other way round."""
        return ops if self.causal else both_ways(ops)

    def check(self, model: Model) -> None:
        """ValueError, one line, for a model that cannot be trained so."""
        if not self.causal and "L" in model.letters:
            without_count(row(model.lsm))


OBJECTIVE: dict[str, Objective] = {
    "next": Objective(next_tokens, True, 0, "byte", ""),
    "masked": Objective(masked_tokens, False, 1, "masked token", "masked_"),
}


def objective(name: str) -> Objective:
    """The objective of that name; ValueError lists the names there are."""
    if name not in OBJECTIVE:
        raise ValueError(f"unknown objective {name!r}; expected one of {', '.join(OBJECTIVE)}")
    return OBJECTIVE[name]
