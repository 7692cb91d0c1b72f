"""The table of routers, and what keeps their experts equally busy.

    G = select(score(l))               l logits, G gates : n e        y_n = sum_e G_ne expert_e(x_n)

A router turns each token's logits into the experts it visits and the weight of each. Nearly every published router is
one formula with different parameters (`token_choice`), so a router is a row: its parameters, in `ROUTER` at the end of
this file. `route` returns G in few numbers, `load` what the router knows about its balance; the losses and the
balancing bias are functions of totals over layers, documents and ranks, which the caller adds up.

    n tokens   e experts   k experts a token visits (slots)   l layers   m groups of experts
    pair: one token visiting one expert; there are n k
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Routing(NamedTuple):
    """Which experts each token visits, and how much each visit counts. The rows of G, without their zeros."""

    index: Int[Tensor, "n k"]  # int64; the experts of one token are distinct
    gate: Float[Tensor, "n k"]  # float32 (float64 if the logits are); 0 where the pair is not kept
    kept: Bool[Tensor, "n k"]  # False: the expert was full, the pair is not computed


class Load(NamedTuple):
    """What one layer's router did with n tokens. All are sums, so they add up over documents, steps and ranks."""

    counts: Int[Tensor, " e"]  # pairs sent to each expert, the dropped ones included
    dropped: Int[Tensor, " e"]  # those of them that found the expert full
    probability: Float[Tensor, " e"]  # sum over tokens of p, the scores normalised to sum 1; differentiable
    z: Float[Tensor, ""]  # sum over tokens of logsumexp(l)^2; differentiable
    entropy: Float[Tensor, ""]  # sum over tokens of the entropy of p, in nats; for the log, no gradient
    tokens: Int[Tensor, ""]  # n


# ---------------------------------------------------------------------------------------------------- the words


# score: how much a token wants an expert
def softmax(logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
    return logits.softmax(-1)


def sigmoid(logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
    return logits.sigmoid()


# renormalize: what becomes of the scores of the experts that were chosen
def as_they_are(gate: Float[Tensor, "n k"], eps: float) -> Float[Tensor, "n k"]:
    return gate


def sum_to_one(gate: Float[Tensor, "n k"], eps: float) -> Float[Tensor, "n k"]:
    return gate / (gate.sum(-1, keepdim=True) + eps)


# queue: the order in which pairs (numbered token by token) are served while an expert has room
def by_position(gate: Float[Tensor, "n k"]) -> Int[Tensor, " nk"]:
    return torch.arange(gate.numel(), device=gate.device)


# --------------------------------------------------------------------------------------------------- one formula


class Router(NamedTuple):
    """One router of the table: the parameters of its formula, where it comes from, what may be relied on."""

    title: str
    paper: str  # arXiv id
    score: Callable[[Tensor], Tensor] = softmax
    post: bool = False  # choose by the logits and score only those chosen
    group_best: int = 0  # a group of experts is worth the sum of this many of its largest scores; 0: has no groups
    renormalize: Callable[[Tensor, float], Tensor] = as_they_are
    eps: float = 0.0
    scale: float = 1.0
    top_k: int | None = None  # the only k that the paper defines; None: any
    capacity: float = math.inf  # an expert's room over its share of the tokens; inf: no expert is ever full
    queue: Callable[[Tensor], Tensor] = by_position
    balance: Literal["loss", "bias"] = "loss"  # what the paper balances it by
    causal: bool = True  # no token's row of G depends on a later token, at a fixed number of tokens

    @property
    def bias(self) -> bool:
        """Whether a balancing bias takes part in the choice."""
        return self.balance == "bias"

    @property
    def prefix_stable(self) -> bool:
        """Whether a token's row of G is the same when it comes last as inside a longer text, so that decoding agrees
        with the whole. An expert's capacity grows with the text, hence not under a capacity."""
        return self.causal and self.capacity == math.inf


def top(values: Float[Tensor, "n e"], k: int) -> Int[Tensor, "n k"]:
    """The k largest of each row, largest first; among equals the lowest index, which `torch.topk` does not promise."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def token_choice(
    router: Router,
    logits: Float[Tensor, "n e"],
    k: int,
    bias: Float[Tensor, " e"] | None,
    groups: int,
    groups_kept: int,
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """Each token chooses k experts: indices and gates.

        s = score(l),  i = the k largest of s + b within the best groups,  gate = scale * renormalize(s_i)
        post:          i = the k largest of l,                             gate = scale * renormalize(score(l_i))

    The bias b changes the choice, never the gate, and gets no gradient.
    """
    scores = logits if router.post else router.score(logits)
    choice = scores.detach() if bias is None else scores.detach() + bias.detach().to(scores)
    index = top(within_best_groups(choice, router.group_best, groups, groups_kept), k)
    gate = scores.gather(-1, index)
    gate = router.score(gate) if router.post else gate
    return index, router.scale * router.renormalize(gate, router.eps)


def within_best_groups(choice: Float[Tensor, "n e"], best: int, groups: int, kept: int) -> Float[Tensor, "n e"]:
    """-inf outside the `kept` groups whose `best` largest values have the largest sum (2412.19437, section 2.1.2)."""
    if kept == groups:
        return choice
    grouped = rearrange(choice, "n (m e) -> n m e", m=groups)
    winners = top(grouped.topk(best, dim=-1).values.sum(-1), kept)
    outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, winners, False)
    return grouped.masked_fill(outside[..., None], -torch.inf).flatten(1)


def within_capacity(
    index: Int[Tensor, "n k"],
    queue: Int[Tensor, " nk"],
    experts: int,
    k: int,
    factor: float,
    documents: Int[Tensor, " n"] | None,
) -> Bool[Tensor, "n k"]:
    """Which pairs find room: in each document every expert serves the first C = max(1, ceil(factor k n_d / e)) of its
    queue, with n_d the document's tokens. Documents do not see each other."""
    document = torch.zeros_like(index[:, 0]) if documents is None else documents.unique(return_inverse=True)[1]
    line = (document[:, None] * experts + index).flatten()  # where each pair stands in line: a document's expert
    served = queue[line[queue].sort(stable=True).indices]  # line after line, each in the order of the queue
    lengths = line.bincount()
    starts = lengths.cumsum(0) - lengths
    place = torch.empty_like(line)
    place[served] = torch.arange(len(line), device=line.device) - starts[line[served]]
    tokens = document.bincount()[document].double()
    capacity = (factor * k * tokens / experts).ceil().clamp(min=1)
    return place.view_as(index) < capacity[:, None]


def check(
    router: Router, experts: int, k: int, groups: int = 1, groups_kept: int = 1, capacity: float | None = None
) -> None:
    """ValueError, one line, unless the router can choose k of that many experts under those limits."""
    if not 1 <= k <= experts:
        raise ValueError(f"top_k={k} must be at least 1 and at most experts={experts}")
    if router.top_k not in (None, k):
        raise ValueError(f"router {router.title} is defined for top_k={router.top_k} only, got top_k={k}")
    if not 1 <= groups_kept <= groups:
        raise ValueError(f"groups_kept={groups_kept} must be at least 1 and at most groups={groups}")
    if groups > 1 and not router.group_best:
        raise ValueError(f"router {router.title} has no groups of experts, got groups={groups}; use groups=1")
    if experts % groups:
        raise ValueError(f"groups={groups} must divide experts={experts}")
    size = experts // groups
    if groups > 1 and size < router.group_best:
        raise ValueError(
            f"router {router.title} values a group by its best {router.group_best} experts, "
            f"but groups={groups} of experts={experts} have {size} each"
        )
    if k > groups_kept * size:
        raise ValueError(f"top_k={k} must be at most the {groups_kept * size} experts of groups_kept={groups_kept}")
    if capacity is not None and not capacity > 0:
        raise ValueError(f"capacity factor must be above 0 (inf: no expert is ever full), got {capacity}")


# -------------------------------------------------------------------------------------------- what a layer calls


def wanted(tokens: Float[Tensor, "n d"], gate: Float[Tensor, "e d"]) -> Float[Tensor, "n e"]:
    """The logits, in float32 at least, product included: with bf16 logits 4 % of tokens tie at the border (64 experts,
    k 8)."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        return F.linear(tokens.to(dtype), gate.to(dtype))


def route(
    router: Router,
    logits: Float[Tensor, "n e"],
    k: int,
    bias: Float[Tensor, " e"] | None = None,
    groups: int = 1,
    groups_kept: int = 1,
    documents: Int[Tensor, " n"] | None = None,
    capacity: float | None = None,
) -> Routing:
    """The experts that each token visits and their gates: G in few numbers.

    bias (e) is the balancing bias, None for none; groups of experts of which groups_kept are open to a token; documents
    (n, int64) tells tokens that compete for room from those that do not, None: all compete; capacity replaces the row's
    own capacity factor (inf: no expert is ever full). Arithmetic in float32, in float64 if the logits are. Ties go to
    the lowest expert index. Raises ValueError for a combination that the row does not have (`check`).
    """
    experts = logits.shape[-1]
    check(router, experts, k, groups, groups_kept, capacity)
    if bias is not None and not router.bias:
        raise ValueError(f"router {router.title} has no balancing bias, got one")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    index, gate = token_choice(router, logits, k, bias, groups, groups_kept)
    factor = router.capacity if capacity is None else capacity
    if factor == math.inf:
        return Routing(index, gate, torch.ones_like(index, dtype=torch.bool))
    kept = within_capacity(index, router.queue(gate.detach()), experts, k, factor, documents)
    return Routing(index, gate.masked_fill(~kept, 0), kept)


def dense(routing: Routing, experts: int) -> Float[Tensor, "n e"]:
    """The gate matrix G itself, in which the laws are stated; zero where a token does not visit an expert."""
    gate = routing.gate.masked_fill(~routing.kept, 0)
    return gate.new_zeros(len(gate), experts).scatter(-1, routing.index, gate)


def load(router: Router, logits: Float[Tensor, "n e"], routing: Routing) -> Load:
    """What the layer reports of n tokens. p = s / (sum_e s + 1e-20) with s = score(l): for softmax, p = s."""
    experts = logits.shape[-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = router.score(logits)
    p = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return Load(
        counts=routing.index.flatten().bincount(minlength=experts),
        dropped=routing.index[~routing.kept].bincount(minlength=experts),
        probability=p.sum(0),
        z=logits.logsumexp(-1).square().sum(),
        entropy=torch.special.entr(p.detach()).sum(),
        tokens=torch.tensor(len(logits), device=logits.device),
    )


# --------------------------------------------------------------------------------------------- losses and balance
# Of one layer (e) or of all, stacked (l e); never pooled over layers, where two collapsed layers can look balanced.
# A count is no function of the weights, so it may come from all ranks while p stays local: each rank's share of the
# loss then has exactly its share of the gradient, and the shares add up.


def balance_loss(
    counts_total: Int[Tensor, "*l e"], probability_local: Float[Tensor, "*l e"], tokens_total: int | Tensor, k: int
) -> Float[Tensor, "*l"]:
    """e / (k N) sum_e c_e P_e / N, a layer: c counts of all N tokens, P this rank's sum of p.

    The sum over ranks is the loss over all of them. It is 1 at balance, whenever c or P is uniform, e/k when all visit
    the same k experts with certainty, and 1 is no lower bound. N: int, or a count a layer. No tokens: 0. The gradient
    runs through P alone. Switch (2101.03961) at k = 1; for any k as in DeepSeekMoE (2401.06066), here without its
    coefficient; c over the global batch as in 2501.11873.
    """
    N = torch.as_tensor(tokens_total, dtype=probability_local.dtype, device=probability_local.device).clamp(min=1)
    overlap = (counts_total.detach().to(probability_local) * probability_local).sum(-1)
    return overlap * counts_total.shape[-1] / (k * N.square())


def z_loss(z_local: Float[Tensor, "*l"], tokens_total: int | Tensor) -> Float[Tensor, "*l"]:
    """mean_n logsumexp(l_n)^2, a layer: this rank's sum over all N tokens. The sum over ranks is the loss over all.

    Keeps logits small (ST-MoE, 2202.08906). It is (log e)^2 at zero logits and has no value of its own at balance.
    """
    return z_local / torch.as_tensor(tokens_total, device=z_local.device).clamp(min=1)


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


# ------------------------------------------------------------------------------------------------------ the table

ROUTER: dict[str, Router] = {
    "linear_moe": Router("Linear-MoE", "2503.05447"),
    "mixtral": Router("Mixtral", "2401.04088", renormalize=sum_to_one),
    "qwen2_moe": Router("Qwen2-MoE", "2407.10671"),
    "switch": Router("Switch", "2101.03961", top_k=1, capacity=1.25),
    "deepseek_v3": Router(
        "DeepSeek-V3",
        "2412.19437",
        score=sigmoid,
        group_best=2,
        renormalize=sum_to_one,
        eps=1e-20,
        scale=2.5,
        balance="bias",
    ),
}


def row(name: str) -> Router:
    """The router of that name; ValueError lists the names there are."""
    if name not in ROUTER:
        raise ValueError(f"unknown router {name!r}; expected one of {', '.join(ROUTER)}")
    return ROUTER[name]
