"""Tokens shared out among experts: exactly (an auction), or softly (a transport plan). Both without gradient.

n tokens   e experts   scores : n e, how much a token wants an expert
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


@torch.no_grad()
def assigned(scores: Float[Tensor, "n e"]) -> Int[Tensor, "n 1"]:
    """The expert of each token: at most ceil(n/e) tokens an expert, the sum of their scores the largest possible.

    An auction for identical seats (Bertsekas, Annals of Operations Research 1988; Bertsekas and Castañon 1989). Every
    expert has ceil(n/e) seats; a token without one bids for the expert that is worth most to it over its price, up to
    what the second best is worth and a little more, and each expert keeps its highest bids; its price is the lowest of
    them. The last little is 1e-7 of the range of the scores, and n times that is the most that the sum can miss.
    """
    n, e = scores.shape
    if e == 1 or n == 0:
        return torch.zeros(n, 1, dtype=torch.int64, device=scores.device)
    seats = math.ceil(n / e)
    # Tokens that want nothing fill the seats, so that all prices rise from a market where everything is sold.
    worth = torch.cat([scores.double(), scores.new_zeros(seats * e - n, e, dtype=torch.float64)])
    extent = (worth.max() - worth.min()).item() or 1.0
    price = worth.new_zeros(e)
    step, least = extent / 4, extent * 1e-7
    while True:
        seat, price = auction(worth, price, seats, step)
        if step <= least:
            return seat[:n, None]
        step = max(step / 5, least)


def auction(worth, price, seats: int, step: float) -> tuple[Int[Tensor, " n"], Float[Tensor, " e"]]:
    """Everyone without a seat bids at once, until all have one: seats, and the experts' prices at the end."""
    seat = torch.full_like(worth[:, 0], -1, dtype=torch.int64)
    paid = torch.zeros_like(worth[:, 0])
    price = price.clone()
    while (free := (seat < 0).nonzero()[:, 0]).numel():
        value, choice = (worth[free] - price).sort(dim=-1, descending=True, stable=True)
        seat[free] = choice[:, 0]
        paid[free] = price[choice[:, 0]] + value[:, 0] - value[:, 1] + step
        # Highest bids first, expert after expert; whoever stands behind the last seat is free again.
        order = paid.sort(descending=True, stable=True).indices
        order = order[seat[order].sort(stable=True).indices]
        order = order[seat[order] >= 0]
        sizes = seat[order].bincount(minlength=len(price))
        place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[seat[order]]
        last = order[place == seats - 1]
        price[seat[last]] = paid[last]
        seat[order[place >= seats]] = -1
    return seat, price


@torch.no_grad()
def transported(scores: Float[Tensor, "n e"], sweeps: int = 200, close: float = 1e-6) -> Float[Tensor, "n e"]:
    """log of the plan diag(a) exp(scores) diag(b) whose rows sum to 1/n and whose columns sum to 1/e.

    Sinkhorn's sweeps on logarithms, so that no score is too large for exp, until a column changes by less than `close`
    or after `sweeps` of them.
    """
    n, e = scores.shape
    columns = scores.new_zeros(e)
    for _ in range(sweeps if n else 0):
        rows = -math.log(n) - (scores + columns).logsumexp(1)
        before, columns = columns, -math.log(e) - (scores + rows[:, None]).logsumexp(0)
        if (columns - before).abs().max() < close:
            break
    return scores + rows[:, None] + columns if n else scores
