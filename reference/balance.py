"""What keeps experts equally busy: losses, a balancing bias, a growing penalty; and how far from balance they are.

Everything here is of one layer (e) or of all, stacked (l e); never pooled over layers, where two collapsed layers can
look balanced. A loss reads two loads: `total`, of all N tokens of all ranks, which carries no gradient (a count is no
function of the weights), and `mine`, this rank's own part, which does. What it returns is this rank's share: the
shares of all ranks sum to the loss, and each has exactly its part of the gradient.

f_e = e c_e / (k N) is an expert's part of the pairs (mean 1), P_e = sum_n p_ne / N of the probability (sum 1).
Over several micro-batches a step's loss is the mean of theirs. That is the loss of the whole step for `sequence`, `z`
and, where documents are as long, nothing else: the others compare experts within a micro-batch of all ranks.

    e experts   k experts a token visits   l layers   N tokens of all ranks   m groups of experts
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from reference.routers import Load, Router, relu

Share = Float[Tensor, "*l"]


class Loss(NamedTuple):
    """One way to ask for balance: its value, and which routers it can be asked of."""

    title: str
    paper: str  # arXiv id
    value: Callable[[Load, Load, int, int], Share]  # (total, mine, k, groups) -> this rank's share, a layer
    at_balance: float | None  # its value when all experts are equally busy and equally probable; None: depends
    fits: Callable[[Router, int], bool]  # (router, groups) -> whether it means anything there
    needs: str  # for what does not fit: what it would take


def tokens(load: Load) -> Float[Tensor, "*l"]:
    return load.tokens.clamp(min=1).to(load.probability.dtype)


def overlap(counts: Int[Tensor, "*l e"], mass: Float[Tensor, "*l e"], N: Float[Tensor, "*l"], k: int) -> Share:
    """e / (k N^2) sum_e c_e m_e, with m a sum over tokens: sum_e f_e P_e where m is that of p.

    1 whenever c or m is uniform, e/k when all tokens visit the same k experts with certainty; 1 is no lower bound. The
    gradient runs through m alone.
    """
    return (counts.detach().to(mass) * mass).sum(-1) * counts.shape[-1] / (k * N.square())


def switch(total: Load, mine: Load, k: int, groups: int) -> Share:
    """sum_e f_e P_e (2101.03961 at k = 1; any k as in 2401.06066; f over the global batch as in 2501.11873)."""
    return overlap(total.counts, mine.probability, tokens(total), k)


def first_choices(total: Load, mine: Load, k: int, groups: int) -> Share:
    """sum_e f_e P_e with f of first choices alone (GShard, 2006.16668, there divided by e^2)."""
    return overlap(total.first, mine.probability, tokens(total), 1)


def importance(total: Load, mine: Load, k: int, groups: int) -> Share:
    """CV^2 of the experts' sums of gates (1701.06538, equation 7)."""
    return shared(variation(through(total.importance, mine.importance)), total, mine)


def chances(total: Load, mine: Load, k: int, groups: int) -> Share:
    """CV^2 of the experts' expected number of tokens under the noise (1701.06538, equation 11)."""
    return shared(variation(through(total.chance, mine.chance)), total, mine)


def variation(x: Float[Tensor, "*l e"]) -> Share:
    """Variance over the square of the mean, of the experts (population variance; + 1e-10 against no tokens)."""
    return x.var(-1, correction=0) / (x.mean(-1).square() + 1e-10)


def through(total: Tensor, mine: Tensor) -> Tensor:
    """The total's value, with the gradient of one's own part."""
    return total.detach().to(mine) + mine - mine.detach()


def shared(loss: Share, total: Load, mine: Load) -> Share:
    """A value that is no sum over ranks, as one: each rank counts its tokens' part of it, its gradient is untouched."""
    return loss - loss.detach() * (1 - mine.tokens / tokens(total))


def by_sequence(total: Load, mine: Load, k: int, groups: int) -> Share:
    """sum_e f_e P_e of each document by itself, the mean over documents weighted by their tokens (2412.19437, eq. 17).

    f counts the k largest scores before bias and groups; a document must be whole on its rank.
    """
    return mine.sequence / tokens(total)


def by_device(total: Load, mine: Load, k: int, groups: int) -> Share:
    """sum_i f_i P_i over the m groups of experts: f their mean, P their sum (2401.06066, equation 15)."""
    f = reduce(total.counts.detach().to(mine.probability), "... (m e) -> ... m", "mean", m=groups)
    P = reduce(mine.probability, "... (m e) -> ... m", "sum", m=groups)
    return (f * P).sum(-1) * total.counts.shape[-1] / (k * tokens(total).square())


def z(total: Load, mine: Load, k: int, groups: int) -> Share:
    """mean_n logsumexp(l_n)^2: keeps logits small (ST-MoE, 2202.08906). (log e)^2 at zero logits."""
    return mine.z / tokens(total)


def penalty(total: Load, mine: Load, k: int, groups: int) -> Share:
    """sum_e f_e R_e with R_e the mean score of expert e (ReMoE, 2412.14711, equation 8): fewer and evener visits.

    Its weight is `updated_penalty`'s, times the one asked for. At balance it is the sum of a token's scores.
    """
    return overlap(total.counts, mine.mass, tokens(total), k)


def chosen_by_scores(router: Router, groups: int) -> bool:
    return router.pooled == "never" and not router.offered and router.weights in ("gate", "gate and spread")


LOSS: dict[str, Loss] = {
    "switch": Loss("Switch balance", "2101.03961", switch, 1.0, chosen_by_scores, "tokens that choose by their scores"),
    "first": Loss(
        "GShard balance", "2006.16668", first_choices, 1.0, chosen_by_scores, "tokens that choose by their scores"
    ),
    "importance": Loss(
        "importance", "1701.06538", importance, 0.0, chosen_by_scores, "tokens that choose by their scores"
    ),
    "load": Loss(
        "load", "1701.06538", chances, 0.0, lambda r, m: r.weights == "gate and spread", "noise on the logits"
    ),
    "sequence": Loss(
        "sequence-wise balance",
        "2412.19437",
        by_sequence,
        1.0,
        lambda r, m: chosen_by_scores(r, m) and r.score is not relu,
        "tokens that choose k experts by their scores",
    ),
    "device": Loss(
        "device-level balance",
        "2401.06066",
        by_device,
        1.0,
        lambda r, m: chosen_by_scores(r, m) and m > 1,
        "groups of experts (--model.groups)",
    ),
    "z": Loss("router z-loss", "2202.08906", z, None, lambda r, m: r.weights not in ("table", "slots"), "logits"),
    "penalty": Loss("ReMoE penalty", "2412.14711", penalty, None, lambda r, m: r.score is relu, "ReLU scores"),
}


def weights_of(router: Router, groups: int, asked: dict[str, float] | None) -> dict[str, float]:
    """The losses in force, by name, and their weights a layer: those asked for, else the router's own that fit.

    ValueError, one line, for a loss that does not exist or that the router does not have.
    """
    if asked is None:
        return {name: weight for name, weight in router.losses.items() if LOSS[name].fits(router, groups)}
    for name, weight in asked.items():
        if name not in LOSS:
            raise ValueError(f"unknown balance loss {name!r}; expected some of {', '.join(LOSS)}")
        if not LOSS[name].fits(router, groups):
            have = ", ".join(n for n, loss in LOSS.items() if loss.fits(router, groups)) or "none"
            raise ValueError(
                f"router {router.title} has no {LOSS[name].title} ({name!r}): it needs {LOSS[name].needs}; "
                f"it can have {have}"
            )
        if not 0 <= weight < float("inf"):
            raise ValueError(f"the weight of balance loss {name!r} must be at least 0 and finite, got {weight}")
    return dict(asked)


def add_up(load: Load, total: Callable[[Tensor], Tensor]) -> Load:
    """The load of all ranks, without gradient: one exchange, `total`, for all layers and fields."""
    parts = [x.detach().double().flatten() for x in load]
    everyone = total(torch.cat(parts)).split([x.numel() for x in load])
    return Load(*(got.view_as(x).to(x.dtype) for got, x in zip(everyone, load, strict=True)))


# ---------------------------------------------------------------------------------------------- without a loss


def violation(counts: Int[Tensor, "*l e"]) -> Float[Tensor, "*l"]:
    """max_e c_e / mean_e c_e - 1, a layer: 0 at balance, e/k - 1 when all visit the same k experts (2408.15664).

    Exact at balance. Without tokens: nan.
    """
    return counts.shape[-1] * counts.max(-1).values / counts.sum(-1) - 1


def updated_bias(bias: Float[Tensor, "*l e"], counts_total: Int[Tensor, "*l e"], rate: float) -> Float[Tensor, "*l e"]:
    """b + rate sign(mean_e c - c_e), once an optimizer step, c over all its tokens (2408.15664; 2412.19437: rate 1e-3).

    Experts with too much go down, with too little up; at balance nothing moves. In integers, so exact.
    """
    experts = counts_total.shape[-1]
    return bias + rate * (counts_total.sum(-1, keepdim=True) - experts * counts_total).sign().to(bias)


def updated_penalty(weight: float | Tensor, counts_total: Int[Tensor, "*l e"], tokens: Tensor, k: int) -> Tensor:
    """The weight of ReMoE's penalty after a step: 1.2 times what it was if tokens visit more than k experts in the mean
    over layers, else 1/1.2 of it; it starts at 1e-8 (2412.14711, equation 7)."""
    visits = counts_total.sum(-1).double().mean() / tokens.double().mean().clamp(min=1)
    return weight * torch.where(visits > k, 1.2, 1 / 1.2)
