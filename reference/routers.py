"""The table of routers.

    G = select(score(l))               l logits, G gates : n e        y_n = sum_e G_ne expert_e(x_n)

A router turns each token's logits into the experts it visits and the weight of each. Nearly every published router is
one formula with different parameters (`token_choice`), the others replace the word `choose`: so a router is a row, its
parameters, in `ROUTER` at the end of this file. `route` returns G in few numbers, `load` what the router knows about
its balance; the losses that keep experts equally busy are functions of such loads (`reference.balance`).

    n tokens   e experts   k experts a token visits (slots)   m groups of experts
    pair: one token visiting one expert
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reference.assignment import assigned, transported
from reference.documents import Documents, numbered
from reference.noise import noise


class Routing(NamedTuple):
    """Which experts each token visits, and how much each visit counts. The rows of G, without most of their zeros.

    Routers that give every token k experts have k slots a token; where the number of experts varies there are as many
    slots as a token may use, and those that it does not use are empty: index -1, gate 0, not kept.
    """

    index: Int[Tensor, "n k"]  # int64; the experts of one token are distinct
    gate: Float[Tensor, "n k"]  # float32 (float64 if the logits are); 0 where the pair is not kept
    kept: Bool[Tensor, "n k"]  # False: the slot is empty, or the expert was full; the pair is not computed


class Load(NamedTuple):
    """What one layer's router did with n tokens. All are sums, so they add up over documents, steps and ranks."""

    counts: Int[Tensor, " e"]  # pairs sent to each expert, the dropped ones included
    dropped: Int[Tensor, " e"]  # those of them that found the expert full
    first: Int[Tensor, " e"]  # tokens whose first slot went to each expert
    probability: Float[Tensor, " e"]  # sum over tokens of p, the scores normalised to sum 1; differentiable
    mass: Float[Tensor, " e"]  # sum over tokens of the scores themselves; differentiable
    importance: Float[Tensor, " e"]  # sum over tokens of G; differentiable
    chance: Float[Tensor, " e"]  # sum over tokens of the chance to be chosen under noise; differentiable
    sequence: Float[Tensor, ""]  # sum over documents of n_d sum_e f P, both of the document; differentiable
    z: Float[Tensor, ""]  # sum over tokens of logsumexp(l)^2; differentiable
    entropy: Float[Tensor, ""]  # sum over tokens of the entropy of p, in nats; for the log, no gradient
    tokens: Int[Tensor, ""]  # n


class Inside(NamedTuple):
    """What a router inside a mixer did, of which each token visits k."""

    k: int
    load: Load


def top(values: Float[Tensor, "n e"], k: int) -> Int[Tensor, "n k"]:
    """The k largest of each row, largest first; among equals the lowest index, which `torch.topk` does not promise."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]


class Asked(NamedTuple):
    """What a router may look at: what n tokens want, and under which limits."""

    logits: Float[Tensor, "n e"]
    k: int
    bias: Float[Tensor, " e"] | None = None  # of balance, for the routers that have one
    groups: int = 1  # of experts
    groups_kept: int = 1  # of them open to a token
    documents: Documents | Int[Tensor, " n"] | None = None  # who know nothing of each other, in any numbers; None: one
    spread: Float[Tensor, "n e"] | None = None  # standard deviation of the noise on each logit
    listed: Int[Tensor, "n k"] | None = None  # each token's experts in a table of the vocabulary
    draw: Callable[[int], Float[Tensor, "n e"]] | None = None  # the s-th even numbers in (0, 1) of this step;
    # None: no training step, hence no noise
    scores: Float[Tensor, "n e"] | None = None  # score(l), where somebody has it already
    top: Callable[[Tensor, int], Tensor] = top  # the backend's


Chosen = tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]  # experts and gates of each token


# ---------------------------------------------------------------------------------------------------- the words


# score: how much a token wants an expert
def softmax(logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
    return logits.softmax(-1)


def sigmoid(logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
    return logits.sigmoid()


def sqrt_softplus(logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
    return F.softplus(logits).sqrt()


def relu(logits: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
    return logits.relu()


# renormalize: what becomes of the scores of the experts that were chosen
def as_they_are(gate: Float[Tensor, "n k"], eps: float) -> Float[Tensor, "n k"]:
    return gate


def sum_to_one(gate: Float[Tensor, "n k"], eps: float) -> Float[Tensor, "n k"]:
    return gate / (gate.sum(-1, keepdim=True) + eps)


# queue: the order in which pairs (numbered token by token) are served while an expert has room
def by_position(gate: Float[Tensor, "n k"]) -> Int[Tensor, " nk"]:
    """Token after token, and each token's experts as it ranks them: no token minds a later one."""
    return torch.arange(gate.numel(), device=gate.device)


def by_slot(gate: Float[Tensor, "n k"]) -> Int[Tensor, " nk"]:
    """The first choice of every token before any second choice (GShard)."""
    return by_position(gate).view_as(gate).T.flatten()


def by_probability(gate: Float[Tensor, "n k"]) -> Int[Tensor, " nk"]:
    """The largest gate first; among equals the earlier token."""
    return gate.flatten().sort(descending=True, stable=True).indices


def by_priority(gate: Float[Tensor, "n k"]) -> Int[Tensor, " nk"]:
    """As by_slot, the tokens in the order of their largest gate (V-MoE, 2106.05974)."""
    tokens = gate.amax(-1).sort(descending=True, stable=True).indices if gate.shape[1] else by_position(gate)
    return by_position(gate).view_as(gate)[tokens].T.flatten()


QUEUE = {"position": by_position, "slot": by_slot, "probability": by_probability, "priority": by_priority}


# room: how many pairs an expert serves, of its share f k n / e
def rounded_up(share: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return share.ceil().clamp(min=1)


def rounded_down(share: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    return share.floor().clamp(min=1)


# --------------------------------------------------------------------------------------------------- one formula


class Router(NamedTuple):
    """One router of the table: the parameters of its formula, where it comes from, what may be relied on."""

    title: str
    paper: str  # arXiv id, or the address of a public description
    score: Callable[[Tensor], Tensor] = softmax
    choose: "Callable[[Router, Asked], Chosen]" = None  # None: `token_choice`
    post: bool = False  # choose by the logits and score only those chosen
    bias: bool = False  # whether a balancing bias takes part in the choice
    group_best: int = 0  # a group of experts is worth the sum of this many of its largest scores; 0: has no groups
    renormalize: Callable[[Tensor, float], Tensor] = as_they_are
    eps: float = 0.0
    scale: float = 1.0
    threshold: float = 0.0  # of the rows that have one: see their `choose`
    gate_at: Literal["output", "input"] = "output"  # what the gate multiplies: y = G expert(x), or expert(G x)
    top_k: int | None = None  # the only k that the paper defines; None: any
    capacity: float = math.inf  # an expert's room over its share of the tokens; inf: no expert is ever full
    lasting: float | None = None  # the same out of training; None: as in training
    queue: Callable[[Tensor], Tensor] = by_position
    room: Callable[[Tensor], Tensor] = rounded_up
    offered: bool = (
        False  # tokens offer themselves to all experts, which take the best: who is not taken is not dropped
    )
    pooled: Literal["never", "training", "always"] = "never"  # when tokens are routed together, not each by itself
    losses: Mapping[str, float] = {}  # what the paper balances by (`reference.balance.LOSS`), weights
    jitter: float = 0.0  # in training the router's input is multiplied by a number between 1 - jitter and 1 + jitter
    start: Literal["normal", "zero", "orthogonal"] = "normal"  # how the router's weights begin
    weights: Literal["gate", "gate and spread", "table", "table and gate", "slots"] = (
        "gate"  # what the layer learns or keeps for it
    )
    decode: str = ""  # the row that takes this one's place where a text is written token by token; "": itself

    def causal(self, capacity: float | None = None, queue: Callable | None = None) -> bool:
        """Whether no token's row of G depends on a later token, in training, at a fixed number of tokens."""
        full = (self.capacity if capacity is None else capacity) < math.inf
        return self.pooled == "never" and not (full and (queue or self.queue) is not by_position)

    def prefix_stable(self, capacity: float | None = None) -> bool:
        """Whether out of training a token's row of G is the same when it comes last as inside a longer text, so that
        decoding agrees with the whole. An expert's capacity grows with the text, hence not under a capacity."""
        return self.pooled != "always" and (self.capacity if capacity is None else capacity) == math.inf

    def keeps_all(self, capacity: float | None = None, training: bool = True) -> bool:
        """Whether no slot is ever empty and no pair dropped: the host knows, and need not compute who is."""
        return self.choose in (None, noisy_choice) and capacity_of(self, capacity, training) == math.inf


def token_choice(router: Router, x: Asked) -> Chosen:
    """Each token chooses k experts: indices and gates.

        s = score(l),  i = the k largest of s + b within the best groups,  gate = scale * renormalize(s_i)
        post:          i = the k largest of l,                             gate = scale * renormalize(score(l_i))

    The bias b changes the choice, never the gate, and gets no gradient.
    """
    scores = x.logits if router.post else scored(router, x)
    choice = scores.detach() if x.bias is None else scores.detach() + x.bias.detach().to(scores)
    index = x.top(within_best_groups(choice, router.group_best, x), x.k)
    gate = scores.gather(-1, index)
    gate = router.score(gate) if router.post else gate
    gate = router.renormalize(gate, router.eps)
    return index, gate if router.scale == 1 else router.scale * gate


def scored(router: Router, x: Asked) -> Float[Tensor, "n e"]:
    return router.score(x.logits) if x.scores is None else x.scores


def within_best_groups(choice: Float[Tensor, "n e"], best: int, x: Asked) -> Float[Tensor, "n e"]:
    """-inf outside the groups whose `best` largest values have the largest sum (2412.19437, section 2.1.2)."""
    if x.groups_kept == x.groups:
        return choice
    grouped = rearrange(choice, "n (m e) -> n m e", m=x.groups)
    winners = x.top(grouped.topk(best, dim=-1).values.sum(-1), x.groups_kept)
    outside = torch.ones_like(grouped[..., 0], dtype=torch.bool).scatter(-1, winners, False)
    return grouped.masked_fill(outside[..., None], -torch.inf).flatten(1)


# -------------------------------------------------------------------------------------- other ways to choose


def noisy_choice(router: Router, x: Asked) -> Chosen:
    """i = the k largest of h = l + spread * normal noise, gate = softmax(h_i); without noise out of training.

    Noisy top-k gating (1701.06538, equations 3 to 5).
    """
    return token_choice(router, x._replace(logits=noisy(x), scores=None))


def noisy(x: Asked) -> Float[Tensor, "n e"]:
    """The logits under this step's noise."""
    if x.draw is None or x.spread is None:
        return x.logits
    return x.logits + x.spread * torch.special.ndtri(x.draw(0).to(x.logits))


def second_by_chance(router: Router, x: Asked) -> Chosen:
    """Two experts; in training the second is visited with probability min(1, its gate / threshold) (2006.16668).

    Its slot is empty where it is not. The first expert's gate stays as it is.
    """
    index, gate = token_choice(router, x)
    if x.draw is None:
        return index, gate
    stays = x.draw(0)[:, :1].to(gate) * router.threshold < gate.detach()
    stays = stays | (torch.arange(x.k, device=gate.device) == 0)
    return index.masked_fill(~stays, -1), gate.masked_fill(~stays, 0)


def every_expert(router: Router, x: Asked) -> Chosen:
    """Each token offers itself to all experts; their capacity then takes the best of them (expert choice, 2202.09368):
    C = k n / e tokens an expert, so k experts a token on average."""
    scores = scored(router, x)
    return torch.arange(scores.shape[1], device=scores.device).expand(scores.shape), scores


def positive(router: Router, x: Asked) -> Chosen:
    """Each token visits the experts whose score is above 0, any number of them (ReMoE, 2412.14711)."""
    scores = scored(router, x)
    index = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
    return index.masked_fill(scores <= 0, -1), scores


def by_assignment(router: Router, x: Asked) -> Chosen:
    """In training: each document's tokens are shared out evenly, at most ceil(n/e) an expert, so that the sum of
    their logits is largest; else the largest logit. gate = score(l_i) (BASE layers, 2103.16716)."""
    index = shared_out(assigned, x) if x.draw is not None else x.top(x.logits.detach(), x.k)
    return index, scored(router, x).gather(-1, index)


def by_transport(router: Router, x: Asked) -> Chosen:
    """In training: the k largest entries of the transport plan from tokens to experts (Sinkhorn routing, 2202.01169),
    else the k largest logits. gate = sigmoid(l_i) if k = 1, else softmax(l)_i."""
    plan = shared_out(transported, x) if x.draw is not None else x.logits.detach()
    index = x.top(plan, x.k)
    return index, (sigmoid if x.k == 1 else softmax)(x.logits).gather(-1, index)


def shared_out(rule: Callable[[Tensor], Tensor], x: Asked) -> Tensor:
    """The rule applied to the logits of each document by itself."""
    logits = x.logits.detach()
    if x.documents is None:
        return rule(logits)
    number = counted(x.documents, logits).number
    order = number.sort(stable=True).indices
    sizes = number.unique(return_counts=True)[1].tolist()
    parts = [rule(part) for part in logits[order].split(sizes)]
    return torch.cat([*parts, rule(logits[:0])])[order.argsort()]


def by_table(router: Router, x: Asked) -> Chosen:
    """The experts that a table lists for the token's word, whatever the token is: gate 1 (hash layers, 2106.04426), or
    scale * renormalize(score(l_i)) where the router has weights besides."""
    if router.weights == "table":
        return x.listed, torch.ones_like(x.listed, dtype=x.logits.dtype)
    gate = scored(router, x).gather(-1, x.listed)
    return x.listed, router.scale * router.renormalize(gate, router.eps)


def one_by_one(router: Router, x: Asked) -> Chosen:
    """SparseMixer-v2 (2409.12136): k times the best expert left, weighed among those not far behind it.

        m = the largest l left;  near: (m - l) / max(|l|, m) <= threshold;  gate = softmax(l among the near ones)

    In training the expert is drawn from that softmax (by Gumbel noise); its gate then counts a third, unless it is the
    best one or, once in four times, by chance, while the gradient is that of the whole gate: Heun's third-order rule.
    """
    left, index, gates = x.logits, [], []
    for slot in range(x.k):
        best = x.top(left.detach(), 1)
        largest = left.gather(-1, best).detach()
        far = (largest - left) / torch.maximum(x.logits.abs(), largest) > router.threshold
        near = left.masked_fill(far, -torch.inf)
        chosen = best if x.draw is None else x.top(near.detach() - (-x.draw(2 * slot).to(left).log()).log(), 1)
        gate = near.softmax(-1).gather(-1, chosen)
        if x.draw is not None:
            whole = (chosen == best) | (x.draw(2 * slot + 1)[:, :1] < 0.25)
            gate = gate - (torch.where(whole, 0, 2 / 3) * gate).detach()
        index, gates = [*index, chosen], [*gates, gate]
        left = left.scatter(-1, chosen, -torch.inf)
    return torch.cat(index, -1), torch.cat(gates, -1)


# ------------------------------------------------------------------------------------------------------- capacity


def within_capacity(
    index: Int[Tensor, "n k"], queue: Int[Tensor, " nk"], room: Float[Tensor, " n"], experts: int, number
) -> Bool[Tensor, "n k"]:
    """Which pairs find room: of each document every expert serves the first pairs of its queue. `number` (n) is each
    token's document, `room` how many those are. Documents do not see each other, and empty slots take no room."""
    expert = index.masked_fill(index < 0, experts)
    line = (number[:, None] * (experts + 1) + expert).flatten()  # where each pair stands in line: a document's expert
    ordered, order = line[queue].sort(stable=True)
    served = queue[order]  # line after line, each in the order of the queue
    place = torch.empty_like(line)
    place[served] = torch.arange(len(line), device=line.device) - torch.searchsorted(ordered, ordered)
    return (place.view_as(index) < room[:, None]) & (index >= 0)


def rooms(router: Router, factor: float, k: int, experts: int, size: Int[Tensor, " m"]) -> Float[Tensor, " m"]:
    """C = room(factor k n_m / e): the pairs that an expert serves of documents that have n_m tokens."""
    return router.room(factor * k * size.double() / experts)


def counted(documents: Documents | Int[Tensor, " n"] | None, like: Tensor) -> Documents:
    """Documents by numbers that may be counted; those that are so already as they are."""
    if documents is None:
        return Documents(like.new_zeros(len(like), dtype=torch.int64), 1)
    return documents if isinstance(documents, Documents) else numbered(documents)


def tally(index: Int[Tensor, "..."], many: int, which: Bool[Tensor, "..."] | None = None) -> Int[Tensor, " many"]:
    """How often each number below `many` comes, of those that `which` says. (`bincount` would ask for the largest.)"""
    one = torch.ones_like(index) if which is None else which.to(index.dtype)
    return index.new_zeros(many).index_add_(0, index.flatten(), one.flatten())


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
    if router.offered and capacity == math.inf:
        raise ValueError(f"router {router.title} chooses by its experts' capacity, which cannot be inf; use 1.0")


# -------------------------------------------------------------------------------------------- what a layer calls


def wanted(tokens: Float[Tensor, "n d"], gate: Float[Tensor, "e d"], bias=None) -> Float[Tensor, "n e"]:
    """The logits, in float32 at least, product included: with bf16 logits 4 % of tokens tie at the border (64 experts,
    k 8)."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with torch.autocast(tokens.device.type, enabled=False):
        return F.linear(tokens.to(dtype), gate.to(dtype), None if bias is None else bias.to(dtype))


def route(
    router: Router, logits: Float[Tensor, "n e"], k: int, *limits, capacity: float | None = None, queue=None, **more
) -> Routing:
    """The experts that each token visits and their gates: G in few numbers.

    limits and more: the other fields of `Asked`, in their order or by name; capacity and queue replace the row's own
    (inf: no expert is ever full). Arithmetic in float32, in float64 if the logits are. Ties go to the lowest expert
    index. Raises ValueError for a combination that the row does not have (`check`).
    """
    x = asked(logits, k, *limits, **more)
    experts = logits.shape[-1]
    check(router, experts, k, x.groups, x.groups_kept, capacity)
    if x.bias is not None and not router.bias:
        raise ValueError(f"router {router.title} has no balancing bias, got one")
    index, gate = (router.choose or token_choice)(router, x)
    training = x.draw is not None
    if router.keeps_all(capacity, training):
        return Routing(index, gate, torch.ones_like(index, dtype=torch.bool))
    factor = capacity_of(router, capacity, training)
    kept = index >= 0
    if factor < math.inf:
        number, many = counted(x.documents, index)
        room = rooms(router, factor, k, experts, tally(number, many))[number]
        kept = within_capacity(index, (queue or router.queue)(gate.detach()), room, experts, number)
        index = index.masked_fill(~kept, -1) if router.offered else index
    routing = Routing(index, gate.masked_fill(~kept, 0), kept)
    return compact(routing) if index.shape[1] > k else routing


def compact(routing: Routing) -> Routing:
    """The same with as many slots as the token has that uses most, its empty ones last (one at least)."""
    order = (routing.index < 0).sort(dim=-1, stable=True).indices
    used = max(1, int((routing.index >= 0).sum(-1).max())) if len(order) else 1
    return Routing(*(x.gather(-1, order[:, :used]) for x in routing))


def asked(logits: Float[Tensor, "n e"], k: int, *limits, **more) -> Asked:
    """float32 at least."""
    return Asked(logits.to(torch.promote_types(logits.dtype, torch.float32)), k, *limits, **more)


def capacity_of(router: Router, factor: float | None, training: bool) -> float:
    """The capacity factor in force: the one asked for, else the row's own."""
    if factor is not None:
        return factor
    return router.capacity if training or router.lasting is None else router.lasting


def dense(routing: Routing, experts: int) -> Float[Tensor, "n e"]:
    """The gate matrix G itself, in which the laws are stated; zero where a token does not visit an expert."""
    return laid_out(routing.index.clamp(min=0), routing.gate.masked_fill(~routing.kept, 0), experts)


def laid_out(index: Int[Tensor, "n k"], gate: Float[Tensor, "n k"], experts: int) -> Float[Tensor, "n e"]:
    return gate.new_zeros(len(gate), experts).scatter_add_(-1, index, gate)


def load(
    router: Router, logits: Float[Tensor, "n e"], routing: Routing, *limits, all_kept: bool = False, **more
) -> Load:
    """What the layer reports of n tokens; limits and more as in `route`.

    p = s / (sum_e s + 1e-20) with s = score(l): for softmax, p = s. In `sequence`, f and P are a document's share of
    pairs and of p, f without bias and groups: sum_e f P is 1 at balance. Where the caller knows that `all_kept` are
    (`Router.keeps_all`), nobody looks for those that are not.
    """
    x = asked(logits, routing.index.shape[1], *limits, **more)
    n, e = x.logits.shape
    scores = scored(router, x)
    p = scores if router.score is softmax else scores / (scores.sum(-1, keepdim=True) + 1e-20)
    own, probability = by_document(router, x, p, routing), p.sum(0)
    slots = routing.index if all_kept else routing.index.masked_fill(routing.index < 0, e)  # e: empty
    counts = own.counts.sum(0) if own.of_pairs else tally(slots, e + 1)[:e]
    return Load(
        counts=counts,
        dropped=torch.zeros_like(counts) if all_kept else tally(slots, e + 1, ~routing.kept)[:e],
        first=tally(slots[:, 0], e + 1)[:e],
        probability=probability,
        mass=probability if p is scores else scores.sum(0),
        importance=(laid_out(slots, routing.gate, e) if all_kept else dense(routing, e)).sum(0),
        chance=counts.to(p) if x.draw is None or x.spread is None or x.k == e else chance(x, routing),
        sequence=own.sequence,
        z=x.logits.logsumexp(-1).square().sum(),
        entropy=torch.special.entr(p.detach()).sum(),
        tokens=torch.full((), n, device=logits.device),  # a number that is not copied from the host
    )


def chance(x: Asked, routing: Routing) -> Float[Tensor, " e"]:
    """sum_n P(token n would visit e if its noise there were drawn anew) (1701.06538, equation 9): Phi((l - t) / spread)
    with t the k-th largest noisy logit of the other experts. (Without noise, or if all are visited: the counts.)"""
    h = noisy(x)
    ranked = h.gather(-1, x.top(h.detach(), x.k + 1))
    inside = torch.zeros_like(h, dtype=torch.bool).scatter(-1, routing.index, True)
    threshold = torch.where(inside, ranked[:, x.k :], ranked[:, x.k - 1 : x.k])
    return torch.special.ndtr((x.logits - threshold) / x.spread).sum(0)


class OfDocuments(NamedTuple):
    """What is known of each document by itself."""

    counts: Int[Tensor, "m e"]  # how often each expert is among a token's k largest p
    of_pairs: bool  # whether those are the experts that it visits
    sequence: Float[Tensor, ""]  # of `Load`


def by_document(router: Router, x: Asked, p: Float[Tensor, "n e"], routing: Routing) -> OfDocuments:
    """sum over documents of n_d sum_e f_e P_e = sum_ne p_ne c_de e / (k n_d), with c of the k largest p."""
    e = p.shape[1]
    plain = router.choose is None and x.bias is None and x.groups == x.groups_kept
    index = routing.index if plain else x.top(p.detach(), x.k)
    number, many = counted(x.documents, index)
    counts = tally(torch.add(index, number[:, None], alpha=e), many * e).view(many, e)
    # A document has k n_d of them. (0 / 0 of one without tokens is not looked at.)
    weight = counts.to(p) * e / counts.sum(-1, keepdim=True)
    return OfDocuments(counts, plain, (p * weight.index_select(0, number)).sum())


def hashed(words: Int[Tensor, " n"], experts: int, k: int, key: int) -> Int[Tensor, "n k"]:
    """k experts for each word of a vocabulary, drawn at random by a hash of (key, word)."""
    return top(noise(key, words, experts), k)


def evenly_hashed(frequency: Float[Tensor, " words"], experts: int) -> Int[Tensor, "words 1"]:
    """One expert for each word: the most frequent word first, each to the expert with the least text so far
    (2106.04426, section 3.1), so that two experts never differ by more than the most frequent word."""
    table, load = torch.zeros(len(frequency), 1, dtype=torch.int64), torch.zeros(experts, dtype=torch.float64)
    for word in frequency.sort(descending=True, stable=True).indices.tolist():
        table[word] = load.argmin()
        load[table[word]] += frequency[word]
    return table


# ------------------------------------------------------------------------------------------------------ the table

MILD = {"switch": 0.01}  # where the source gives no weight
SOFTMAX = Router("Linear-MoE", "2503.05447", losses=MILD)
RENORMALIZED = Router("Mixtral", "2401.04088", renormalize=sum_to_one, losses=MILD)
OF_THE_CHOSEN = Router("Granite", "2404.07413", post=True, losses=MILD)
BIASED = Router(
    "DeepSeek-V3",
    "2412.19437",
    score=sigmoid,
    bias=True,
    group_best=2,
    renormalize=sum_to_one,
    eps=1e-20,
    scale=2.5,
    losses={"sequence": 1e-4},
)
GSHARD = Router(
    "GShard",
    "2006.16668",
    choose=second_by_chance,
    threshold=0.5,
    renormalize=sum_to_one,
    eps=1e-9,
    top_k=2,
    capacity=1.0,
    queue=by_slot,
    losses={"first": 0.01},
)
SWITCH = Router("Switch", "2101.03961", top_k=1, capacity=1.25, jitter=0.01, losses={"switch": 0.01})
PAGES = "https://huggingface.co/docs/transformers/model_doc/"  # for models that no paper describes

ROUTER: dict[str, Router] = {
    # softmax, the k largest
    "linear_moe": SOFTMAX,
    "qwen2_moe": SOFTMAX._replace(title="Qwen2-MoE", paper="2407.10671", losses={"switch": 0.001}),
    "olmoe": SOFTMAX._replace(title="OLMoE", paper="2409.02060", losses={"switch": 0.01, "z": 0.001}),
    "jamba": SOFTMAX._replace(title="Jamba", paper="2403.19887", losses={"switch": 0.001}),
    "deepseek_moe": SOFTMAX._replace(title="DeepSeekMoE", paper="2401.06066", losses={"switch": 0.001}),
    "open_moe": SOFTMAX._replace(
        title="OpenMoE",
        paper="2402.01739",
        capacity=1.25,
        lasting=2.0,
        queue=by_slot,
        losses={"switch": 0.01, "z": 1e-4},
    ),
    # and divided by their sum
    "mixtral": RENORMALIZED,
    "minimax_01": RENORMALIZED._replace(title="MiniMax-01", paper="2501.08313"),
    "qwen3_moe": RENORMALIZED._replace(title="Qwen3-MoE", paper="2505.09388", losses={"switch": 0.001}),
    "qwen3_next": RENORMALIZED._replace(title="Qwen3-Next", paper=PAGES + "qwen3_next", losses={"switch": 0.001}),
    "hunyuan": RENORMALIZED._replace(title="Hunyuan-TurboS", paper="2505.15431"),
    "v_moe": RENORMALIZED._replace(
        title="V-MoE, batch prioritised",
        paper="2106.05974",
        renormalize=as_they_are,
        capacity=1.05,
        queue=by_priority,
        losses={"importance": 0.005},
    ),
    # softmax of the k largest logits
    "granite": OF_THE_CHOSEN._replace(paper=PAGES + "granitemoehybrid"),
    "jet_moe": OF_THE_CHOSEN._replace(title="JetMoE", losses={"switch": 0.01, "z": 0.001}),
    "gpt_oss": OF_THE_CHOSEN._replace(title="GPT-OSS", paper="2508.10925"),
    "noisy": OF_THE_CHOSEN._replace(
        title="noisy top-k",
        paper="1701.06538",
        choose=noisy_choice,
        weights="gate and spread",
        start="zero",
        losses={"importance": 0.01, "load": 0.01},
    ),
    # sigmoid or its like
    "llama_4": Router(
        "Llama-4", PAGES + "llama4", score=sigmoid, post=True, gate_at="input", top_k=1, losses={"switch": 0.001}
    ),
    "deepseek_v2": Router(
        "DeepSeek-V2", "2405.04434", group_best=1, scale=16.0, losses={"sequence": 0.003, "device": 0.05}
    ),
    "deepseek_v3": BIASED,
    "ling": BIASED._replace(title="Ling 2.0", paper="2510.22115"),
    "kimi_linear": BIASED._replace(title="Kimi-Linear", paper="2510.26692", scale=2.446),
    "glm_4_5": BIASED._replace(title="GLM-4.5", paper="2508.06471"),
    "nemotron_3": BIASED._replace(title="Nemotron-3", paper="2512.20848"),
    "deepseek_v4": BIASED._replace(title="DeepSeek-V4", paper=PAGES + "deepseek_v4", score=sqrt_softplus, scale=1.5),
    "deepseek_v4_hash": Router(
        "DeepSeek-V4, first layers",
        PAGES + "deepseek_v4",
        score=sqrt_softplus,
        choose=by_table,
        weights="table and gate",
        renormalize=sum_to_one,
        eps=1e-20,
        scale=1.5,
    ),
    "longcat": Router("LongCat-Flash", "2509.01322", bias=True, scale=6.0),
    # with a capacity
    "switch": SWITCH,
    "moe_mamba": SWITCH._replace(title="MoE-Mamba", paper="2401.04081", capacity=1.0, room=rounded_down, jitter=0.0),
    "gshard": GSHARD,
    "st_moe": GSHARD._replace(
        title="ST-MoE",
        paper="2202.08906",
        threshold=0.2,
        capacity=0.625,  # 1.25 n / e for both slots together
        lasting=1.0,
        room=rounded_down,
        losses={"first": 0.01, "z": 0.001},
    ),
    "expert_choice": Router(
        "expert choice",
        "2202.09368",
        choose=every_expert,
        capacity=1.0,
        queue=by_probability,
        room=rounded_down,
        offered=True,
        decode="linear_moe",
    ),
    # tokens shared out
    "base": Router(
        "BASE", "2103.16716", score=sigmoid, choose=by_assignment, top_k=1, pooled="training", start="orthogonal"
    ),
    "sinkhorn": Router("Sinkhorn", "2202.01169", choose=by_transport, pooled="training"),
    # a number of experts that varies
    "remoe": Router("ReMoE", "2412.14711", score=relu, choose=positive, losses={"penalty": 1.0}),
    "sparse_mixer": Router("SparseMixer-v2", "2409.12136", choose=one_by_one, threshold=0.02, losses=MILD),
    # other ways altogether
    "hash": Router("hash", "2106.04426", choose=by_table, weights="table"),
    "soft": Router("Soft MoE", "2308.00951", weights="slots", pooled="always"),
}


def row(name: str) -> Router:
    """The router of that name; ValueError lists the names there are."""
    if name not in ROUTER:
        raise ValueError(f"unknown router {name!r}; expected one of {', '.join(ROUTER)}")
    return ROUTER[name]
