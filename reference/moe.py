"""Mixture of experts: a feed-forward layer of which each token uses a few parts.

    y_n = sum_e G_ne expert_e(x_n)  (+ shared(x_n))      expert_e(x) = W2_e inner(W13_e x)

The gates G come from a router (`reference.routers`); here are the experts. Only the pairs (token, expert) that G keeps
are computed: sorted by expert, so that each expert multiplies all of its rows at once.

    b batch   t time   n = b t tokens   d width   e experts   k experts a token visits   f hidden width of an expert
    r 2 where an expert has a gate: the first f rows of W13 are its gate's; else 1
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from reference.documents import Documents, numbered
from reference.mixers.parts import alone, constant, orthogonal
from reference.noise import noise
from reference.routers import (
    QUEUE,
    Inside,
    Load,
    Routing,
    capacity_of,
    check,
    hashed,
    load,
    rooms,
    route,
    row,
    tally,
    wanted,
)

# ------------------------------------------------------------------------------------------- what an expert does


def swiglu(h: Float[Tensor, "... 2*f"]) -> Float[Tensor, "... f"]:
    """silu(g) u (2002.05202)."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate) * up


def relu_squared(h: Float[Tensor, "... f"]) -> Float[Tensor, "... f"]:
    """relu(h)^2 (2109.08668)."""
    return F.relu(h).square()


def clamped_swish(h: Float[Tensor, "... 2*f"]) -> Float[Tensor, "... f"]:
    """g sigmoid(1.702 g) (u + 1), with g at most 7 and u within 7 of 0 (GPT-OSS, 2508.10925)."""
    gate, up = h.chunk(2, dim=-1)
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def clamped_swiglu(h: Float[Tensor, "... 2*f"]) -> Float[Tensor, "... f"]:
    """silu(g) u, with g at most 10 and u within 10 of 0 (DeepSeek-V4)."""
    gate, up = h.chunk(2, dim=-1)
    return F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


class Kind(NamedTuple):
    """What stands between the two matrices of an expert."""

    inner: Callable[[Tensor], Tensor]
    rows: int = 1  # r: 2 where one half gates the other


EXPERT: dict[str, Kind] = {
    "swiglu": Kind(swiglu, 2),
    "gelu": Kind(F.gelu),
    "relu": Kind(F.relu),
    "relu_squared": Kind(relu_squared),
    "clamped_swish": Kind(clamped_swish, 2),
    "clamped_swiglu": Kind(clamped_swiglu, 2),
}


class Drop(NamedTuple):
    """Dropout inside the experts, a function of the step's key, the token's number in the run, expert and channel."""

    share: float
    key: int
    index: Int[Tensor, " n"]


def feed_forward(x, w13, w2, b13=None, b2=None, inner: Callable = swiglu) -> Float[Tensor, "... d"]:
    """W2 inner(W13 x + b13) + b2. x : ... d, w13 : rf d, w2 : d f, b13 : rf, b2 : d; all of one dtype."""
    return F.linear(inner(F.linear(x, w13, b13)), w2, b2)


# ------------------------------------------------------------------------------------------------- the functions


def experts(
    x: Float[Tensor, "n d"],
    routing: Routing,
    w13: Float[Tensor, "e r*f d"],
    w2: Float[Tensor, "e d f"],
    b13: Float[Tensor, "e r*f"] | None = None,
    b2: Float[Tensor, "e d"] | None = None,
    inner: Callable = swiglu,
    gate_at: Literal["output", "input"] = "output",
    drop: Drop | None = None,
    room: int | None = None,
    pairs: int | None = None,
    between: Callable[[], None] | None = None,
) -> Float[Tensor, "n d"]:
    """y_n = sum over n's slots of gate * expert(x_n), or of expert(gate * x_n); one product an expert over its rows.

    Pairs that are not kept are not computed and add 0. The gates multiply in their own dtype (float32 at least), y has
    x's. Every weight gets a gradient, zeros where no token came. Deterministic, backward too: tokens are copied to
    their slots, moved by a permutation, and each gathers its own, so no two pairs ever add into one place. With `room`
    every expert gets that many rows, filled up with zeros: one batched product, of a shape that no routing changes.
    `pairs` is how many are kept, for backends whose host does not count them. `between` is called between the experts'
    two matrices, forward; what it does stands between their gradients as well.
    """
    place, ends, _, order = by_expert(routing.index, routing.kept, len(w13))
    lengths = Groups(ends).lengths
    kept = sum(lengths)
    rows = taken(x, place, kept, routing.gate if gate_at == "input" else None)
    mask = None if drop is None else spared(drop, routing, order[:kept], len(w13), w2.shape[-1])
    weights = (w13, w2, b13, b2)
    if room is None:
        y = each(rows, lengths, weights, inner, mask, between)
    else:
        y = padded(rows, lengths, weights, inner, mask, room, between)
    return combined(y, place, routing.gate if gate_at == "output" else None, x.dtype)


class Sorted(NamedTuple):
    """Pairs sorted by expert, tokens in order inside each; last those that are not kept, which no expert has."""

    place: Int[Tensor, "n k"]  # int64; where each pair's row stands; n k, behind them all, of pairs that are not kept
    ends: Int[Tensor, " e"]  # int32; where the rows of each expert end
    visited: Bool[Tensor, " e"]  # whether it has any
    order: Int[Tensor, " nk"]  # int64; which pair stands where


def by_expert(index: Int[Tensor, "n k"], kept: Bool[Tensor, "n k"], experts: int) -> Sorted:
    """The pairs sorted by expert, which index_nk is where kept_nk."""
    expert, order = index.masked_fill(~kept, experts).flatten().int().sort(stable=True)
    names = torch.arange(experts, dtype=torch.int32, device=index.device)
    ends = torch.searchsorted(expert, names, right=True, out_int32=True)
    place = order.scatter(0, order, torch.arange(len(order), device=order.device))
    place = place.view(kept.shape).masked_fill(~kept, len(order))
    return Sorted(place, ends, counts_of(ends) > 0, order)


def counts_of(ends: Int[Tensor, " e"]) -> Int[Tensor, " e"]:
    """How many rows each group has, from where they end one behind the other."""
    return ends.diff(prepend=ends.new_zeros(1))


def taken(
    x: Float[Tensor, "n d"],
    place: Int[Tensor, "n k"],
    rows: int,
    gate: Float[Tensor, "n k"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "p d"]:
    """The dispatch: p `rows`, at place_nk stands gate_nk x_n (x_n without gates). A place that is no row is a pair that
    goes nowhere; no two pairs have one place. What stands in rows that are no pair's is not defined, and whatever
    gradient comes from there leads nowhere. Rows have `dtype`, x's if None; each is rounded once."""
    n, k = place.shape
    slots = repeat(x, "n d -> (n k) d", k=k)
    if gate is not None:
        slots = gate.flatten()[:, None] * slots
    slots, place = slots.to(dtype or x.dtype), place.flatten().clamp(max=rows)
    pair = place.new_full((rows + 1,), n * k).scatter(0, place, torch.arange(n * k, device=x.device))[:rows]
    # index_select: its backward took 0.16 ms on two cores where that of slots[pair] took 1.5 (4096 rows of 128).
    return F.pad(slots, (0, 0, 0, 1)).index_select(0, pair)


def combined(
    rows: Float[Tensor, "p d"],
    place: Int[Tensor, "n k"],
    gate: Float[Tensor, "n k"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "n d"]:
    """The way back, y_n = sum_k gate_nk rows_{place_nk}: each token's sum over its own rows, without gates a plain one.
    Pairs whose place is no row add 0, and other rows are not looked at. Summed in the gates' dtype (else in float32 at
    least) and rounded once, to `dtype` (the rows' if None)."""
    own = F.pad(rows, (0, 0, 0, 1)).index_select(0, place.flatten().clamp(max=len(rows)))
    here = place < len(rows)
    if gate is None:
        gate = here.to(torch.promote_types(rows.dtype, torch.float32))
    return combine(own, gate.masked_fill(~here, 0)).to(dtype or rows.dtype)


def each(
    rows: Float[Tensor, "p d"], lengths: list[int], weights, inner, mask, between: Callable | None = None
) -> Float[Tensor, "p d"]:
    """Expert after expert over its own rows: all up to their second matrix, then all from there."""
    mine = rows.split(lengths)
    masks = [None] * len(mine) if mask is None else mask.split(lengths)
    w13, w2, b13, b2 = ([None] * len(mine) if w is None else w.unbind() for w in weights)
    # Expert 0 runs even on no rows, which keeps the weights in the graph when nobody visits anyone.
    busy = [e for e, length in enumerate(lengths) if length or e == 0]
    words = {e: inner if masks[e] is None else thinned(inner, masks[e]) for e in busy}
    hidden = {e: words[e](F.linear(mine[e], w13[e], b13[e])) for e in busy}
    if between is not None:
        between()
    return torch.cat([F.linear(a, w2[e], b2[e]) for e, a in hidden.items()])


def padded(
    rows: Float[Tensor, "p d"], lengths: list[int], weights, inner, mask, room: int, between: Callable | None = None
) -> Float[Tensor, "p d"]:
    """All experts at once, each with `room` rows of which the last may be nobody's."""
    if max(lengths) > room:
        raise ValueError(f"an expert has {max(lengths)} pairs, more than its room of {room}")
    w13, w2, b13, b2 = weights
    place = torch.full((len(w13), room), len(rows), device=rows.device)  # beyond the rows: zeros
    start = 0
    for e, length in enumerate(lengths):
        place[e, :length] = torch.arange(start, start + length, device=rows.device)
        start += length

    def laid_out(x):
        return torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, place.flatten()).unflatten(0, place.shape)

    h = laid_out(rows) @ w13.mT + (0 if b13 is None else b13[:, None])
    h = inner(h) if mask is None else inner(h) * laid_out(mask)
    if between is not None:
        between()
    y = h @ w2.mT + (0 if b2 is None else b2[:, None])
    return y.flatten(0, 1).index_select(0, (place.flatten() < len(rows)).nonzero()[:, 0])


def thinned(inner: Callable, mask: Tensor) -> Callable:
    return lambda h: inner(h) * mask


def spared(drop: Drop, routing: Routing, order: Tensor, experts: int, width: int) -> Float[Tensor, "p f"]:
    """What the hidden channels of each pair are multiplied by, in that order: 0 for a `share` of them, else
    1 / (1 - share)."""
    number = (drop.index[:, None] * experts + routing.index).flatten()[order]
    return (noise(drop.key, number, width) >= drop.share).float() / (1 - drop.share)


def combine(y: Float[Tensor, "nk d"], gate: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
    """Each token's sum over its own k rows of y, weighted by its gates."""
    return (gate[..., None] * y.view(*gate.shape, y.shape[-1])).sum(1)


class Groups:
    """Rows of several groups, one group's behind the other's: group e has those from ends_{e-1} to ends_e."""

    def __init__(self, ends: Int[Tensor, " e"]):
        self.ends = ends

    @cached_property
    def lengths(self) -> list[int]:
        """Rows of each. Asks the device, once."""
        return counts_of(self.ends).tolist()


def linears(
    x: Float[Tensor, "p i"], groups: Groups, weights: list[Tensor], biases: list[Tensor] | None = None
) -> Float[Tensor, "p o"]:
    """W_e x + b_e for each group's rows, all p of which belong to one; weights are o i, biases o.

    Every weight and bias gets a gradient, zeros where its group has no rows.
    """
    biases = biases or [None] * len(weights)
    return torch.cat(list(map(F.linear, x.split(groups.lengths), weights, biases)))


def softly(
    x: Float[Tensor, "n d"], slots: Float[Tensor, "s d"], scale: Float[Tensor, "1"], documents: Int[Tensor, " n"]
) -> tuple[Float[Tensor, "m s n"], Float[Tensor, "m s n"], Float[Tensor, "n s"]]:
    """Soft MoE's two matrices for each of m documents, and the logits: D is a softmax over the document's tokens, C
    one over the slots, zero for other documents' tokens (2308.00951, equations 1 to 3, logits between normed vectors
    and normed tokens, section 2.3). In float32 at least."""
    logits = wanted(F.normalize(x.to(slots.dtype), dim=-1), scale * F.normalize(slots, dim=-1))
    number = documents.unique(return_inverse=True)[1]
    own = F.one_hot(number, int(number.max()) + 1 if len(x) else 1).T.bool()[:, None]  # m 1 n
    dispatch = logits.T.masked_fill(~own, -torch.inf).softmax(-1).masked_fill(~own, 0)
    return dispatch, logits.softmax(-1).T * own, logits


# --------------------------------------------------------------------------------------------------- the layers


@dataclass(frozen=True)
class Experts:
    """What an expert layer is made of."""

    width: int
    """Channels of the tokens, d."""
    experts: int
    """Number of experts, e."""
    top_k: int
    """Experts a token visits, k (in the mean, where experts choose)."""
    hidden: int
    """Channels inside an expert, f."""
    router: str = "linear_moe"
    """Row of the router table."""
    kind: str = "swiglu"
    """What stands between an expert's two matrices."""
    biases: bool = False
    """Whether router and experts add biases (GPT-OSS)."""
    capacity_factor: float | None = None
    """Room of an expert over its share of the tokens (None: the router's own; inf: never full)."""
    drop: str | None = None
    """Whom a full expert turns away: the latest position, the second slots first, the least probability, or the second
    slots of the least probable tokens first (None: the router's own)."""
    pad: bool = False
    """Whether every expert computes as many rows as it has room for."""
    groups: int = 1
    """Groups of experts, for routers that choose groups first."""
    groups_kept: int = 1
    """Groups that a token may visit."""
    shared: int = 0
    """Channels inside the expert that every token visits (0: none)."""
    shared_gate: bool = False
    """Whether the shared expert is weighted by sigmoid(w · x) (Qwen2-MoE) or added as it is (DeepSeek)."""
    identity: int = 0
    """Experts besides, that return the token as it is (LongCat-Flash, 2509.01322)."""
    latent: int = 0
    """Channels that the experts see of a token, between two projections around them all (0: the token itself)."""
    slots: int = 1
    """Of one expert, for Soft MoE."""
    jitter: float | None = None
    """In training the router sees the token times 1 - jitter to 1 + jitter (None: the router's own)."""
    dropout: float = 0.0
    """Share of the experts' hidden channels set to zero in training."""
    vocabulary: int = 0
    """Number of words, for routers that go by the word."""

    def __post_init__(self):
        for name in ("width", "experts", "hidden", "groups", "slots"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, none in (("shared", "no shared expert"), ("identity", "none"), ("latent", "the token itself")):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 (0: {none})")
        for name in ("jitter", "dropout"):
            if not 0 <= (getattr(self, name) or 0) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate=True needs a shared expert, got shared=0")
        if self.kind not in EXPERT:
            raise ValueError(f"unknown kind of expert {self.kind!r}; expected one of {', '.join(EXPERT)}")
        if self.drop is not None and self.drop not in QUEUE:
            raise ValueError(f"unknown drop order {self.drop!r}; expected one of {', '.join(QUEUE)}")
        router = row(self.router)
        check(router, self.columns, self.top_k, self.groups, self.groups_kept, self.capacity)
        if self.pad and self.capacity == math.inf:
            raise ValueError(f"pad=True needs a capacity, and router {router.title} has none: give a capacity_factor")
        if "table" in router.weights and self.vocabulary < 1:
            raise ValueError(f"router {router.title} goes by the word: it needs the vocabulary, got {self.vocabulary}")
        if router.weights == "slots" and (self.identity or self.capacity < math.inf):
            raise ValueError(f"router {router.title} mixes all tokens: it has no identity experts and no capacity")

    @property
    def columns(self) -> int:
        """Experts that the router chooses from."""
        return self.experts + self.identity

    @property
    def capacity(self) -> float:
        """The capacity factor in force in training; inf: no expert is ever full."""
        return capacity_of(row(self.router), self.capacity_factor, training=True)

    @property
    def causal(self) -> bool:
        """Whether no token's output depends on a later token of a text as long."""
        return row(self.router).causal(self.capacity, self.queue)

    @property
    def queue(self) -> Callable:
        """The order in which pairs find room."""
        return row(self.router).queue if self.drop is None else QUEUE[self.drop]

    @property
    def prefix_stable(self) -> bool:
        """Whether decoding token by token gives what the whole text gives."""
        return row(self.router).prefix_stable(self.capacity)


class Dense(nn.Module):
    """A feed-forward layer: every token, one expert; by default the SwiGLU of Llama."""

    narrow = True  # as `reference.mixers.parts.Mixer` says it

    def __init__(self, width: int, hidden: int, kind: str = "swiglu"):
        super().__init__()
        self.kind = EXPERT[kind]
        self.w13 = nn.Parameter(torch.empty(self.kind.rows * hidden, width))
        self.w2 = nn.Parameter(torch.empty(width, hidden))

    def forward(self, x: Float[Tensor, "b t d"], side: Any = None) -> Float[Tensor, "b t d"]:
        return feed_forward(x, self.w13, self.w2, inner=self.kind.inner)


class Linears(nn.Module):
    """Linear maps of which each token takes k, W_e x: one product a map over all of its pairs. weight : e o i."""

    def __init__(self, inputs: int, outputs: int, experts: int, k: int):
        super().__init__()
        self.weight, self.k = nn.Parameter(torch.empty(experts, outputs, inputs)), k

    def forward(self, x: Float[Tensor, "n k i"], routing: Routing) -> Float[Tensor, "n k o"]:
        """Of each slot of a token its own x, through the map of its expert; 0 where the pair is not kept."""
        _, ends, _, order = by_expert(routing.index, routing.kept, len(self.weight))
        lengths = Groups(ends).lengths
        *mine, dropped = x.flatten(0, 1).index_select(0, order).split([*lengths, len(order) - sum(lengths)])
        y = [F.linear(own, W) for own, W in zip(mine, self.weight.unbind(), strict=True)]
        y = torch.cat([*y, y[0].new_zeros(len(dropped), self.weight.shape[1])])
        return y.index_select(0, order.argsort()).unflatten(0, routing.index.shape)

    def idle(self) -> int:
        """Numbers that one token leaves alone."""
        return self.weight[0].numel() * (len(self.weight) - self.k)


class Switched(nn.Module):
    """y = p_e W_e x, with e the likeliest map and p = softmax(router x): the Switch router, but no map is ever full, so
    that a token's map does not depend on the text around it. Parameters: router : e i, maps.weight : e o i."""

    def __init__(self, inputs: int, outputs: int, experts: int):
        super().__init__()
        self.router = nn.Parameter(torch.empty(experts, inputs))
        self.maps = Linears(inputs, outputs, experts, 1)

    def forward(self, x: Float[Tensor, "b t i"], summed: Callable = alone) -> tuple[Float[Tensor, "b t o"], Inside]:
        """Where ranks share the inputs' channels, `summed` makes the logits one sum over them; y is left in parts."""
        flat, switch = x.flatten(0, 1), row("switch")
        logits = summed(wanted(flat, self.router))
        routing = route(switch, logits, 1, capacity=math.inf)
        y = self.maps(flat[:, None], routing)
        y = (routing.gate[..., None] * y).sum(1).to(y.dtype)
        stats = load(switch, logits, routing, all_kept=switch.keeps_all(math.inf))
        return y.unflatten(0, x.shape[:2]), Inside(1, stats)


def through(
    layer: nn.Module, x: Float[Tensor, "b t i"], loads: list[Inside], summed: Callable = alone
) -> Float[Tensor, "b t o"]:
    """The layer's output; if it is one of several maps, what its router did goes to `loads`."""
    if not isinstance(layer, Switched):
        return layer(x)
    y, inside = layer(x, summed)
    loads.append(inside)
    return y


class MoE(nn.Module):
    """Router, experts and, if any, the shared expert. Weights start uninitialised.

    Parameters: gate : e d (the router), w13 : e rf d, w2 : e d f; where the configuration asks for them gate_bias : e,
    b13 : e rf, b2 : e d, shared.w13, shared.w2, shared_gate : 1 d, down : l d and up : d l around a latent; where the
    router has them spread : e d (noise), scale : 1 (Soft MoE, whose gate is e s d). Buffers: `bias` : e, float32, from
    0, for routers balanced by bias; `penalty`, float32, the weight of ReMoE's loss; `table` : words k, where the word
    chooses. This layer reads buffers and never changes them.
    """

    OWN = ("w13", "w2", "b13", "b2")  # the experts' parameters: of each, the first dimension counts experts
    narrow = False  # the router sees it

    def __init__(self, config: Experts, ops: Any, number: int = 0):
        super().__init__()
        self.config, self.ops, self.number, self.router = config, ops, number, row(config.router)
        self.kind, c = EXPERT[config.kind], config
        e, d, f = c.experts, c.width, c.hidden
        inside = c.latent or d
        self.gate = None if self.router.weights == "table" else started(self.router.start, self.rows, d)
        self.w13 = nn.Parameter(torch.empty(e, self.kind.rows * f, inside))
        self.w2 = nn.Parameter(torch.empty(e, inside, f))
        self.gate_bias = nn.Parameter(torch.empty(c.columns)) if c.biases else None
        self.b13 = nn.Parameter(torch.empty(e, self.kind.rows * f)) if c.biases else None
        self.b2 = nn.Parameter(torch.empty(e, inside)) if c.biases else None
        for bias in (self.b13, self.b2):
            if bias is not None:
                bias.start = constant(0.0)
        self.shared = Dense(d, c.shared, c.kind) if c.shared else None
        self.shared_gate = nn.Parameter(torch.empty(1, d)) if c.shared_gate else None
        self.down = nn.Parameter(torch.empty(c.latent, d)) if c.latent else None
        self.up = nn.Parameter(torch.empty(d, c.latent)) if c.latent else None
        self.spread = started("zero", c.columns, d) if self.router.weights == "gate and spread" else None
        # One number as a vector: parameters are sharded along their first dimension, and a scalar has none.
        self.scale = nn.Parameter(torch.empty(1)) if self.router.weights == "slots" else None
        if self.scale is not None:
            self.scale.start = constant(1.0)
        self.register_buffer("bias", torch.zeros(c.columns) if self.router.bias else None)
        self.register_buffer("penalty", torch.zeros(()) if "penalty" in self.router.losses else None)
        table = torch.zeros(c.vocabulary, c.top_k, dtype=torch.int64) if "table" in self.router.weights else None
        self.register_buffer("table", table)

    @property
    def rows(self) -> int:
        """Of the router's matrix."""
        return self.config.experts * self.config.slots if self.router.weights == "slots" else self.config.columns

    def begin(self, seed: int) -> None:
        """The buffers before the first step: no bias, ReMoE's first weight, a random expert for each word."""
        if self.bias is not None:
            self.bias.zero_()
        if self.penalty is not None:
            self.penalty.fill_(1e-8)
        if self.table is not None:
            words = torch.arange(self.config.vocabulary, device=self.table.device)
            self.table.copy_(hashed(words, self.config.columns, self.config.top_k, seed))

    def forward(self, x: Float[Tensor, "b t d"], side: Any) -> tuple[Float[Tensor, "b t d"], Load]:
        """The layer's output, in x's dtype, and what its router did. Tokens compete for room within their document:
        `side.documents`, in numbers that are counted already or (b t, int64) in any; None where each row of the batch
        is one. It is a training step where `side.key` is given, with `side.index` (b t), the tokens' numbers in the
        run."""
        tokens = rearrange(x, "b t d -> (b t) d")
        documents = apart(side.documents, x)
        y, stats = (self.mixed if self.scale is not None else self.routed)(tokens, documents, side)
        y = y.view_as(x)
        return y if self.shared is None else y + self.always(x), stats

    def own(self) -> dict[str, nn.Parameter]:
        """The experts' parameters, without those that this layer does not have."""
        return {name: getattr(self, name) for name in self.OWN if getattr(self, name) is not None}

    def idle(self) -> int:
        """Numbers of the experts that one token does not visit."""
        routed = sum(p.numel() for p in self.own().values())
        return routed - routed * self.config.top_k // self.config.experts

    def routed(self, tokens: Float[Tensor, "n d"], documents: Documents, side) -> tuple[Tensor, Load]:
        """Each token at its own experts."""
        c, training = self.config, side.key is not None
        logits = self.logits(self.jittered(tokens, side))
        limits = {
            "bias": self.bias,
            "groups": c.groups,
            "groups_kept": c.groups_kept,
            "documents": documents,
            "spread": None if self.spread is None else F.softplus(wanted(tokens, self.spread)) + 0.01,
            "listed": None if self.table is None else self.table[side.tokens.flatten()],
            "draw": self.draws(side, c.columns) if training else None,
            "scores": self.router.score(logits),
            "top": self.ops.top,
        }
        routing = route(self.router, logits, c.top_k, **limits, capacity=c.capacity_factor, queue=c.queue)
        y = self.ops.experts(self.seen(tokens), self.within(routing), self.w13, self.w2, **self.more(side, documents))
        y = y if self.up is None else F.linear(y, self.up)
        if c.identity:
            y = y + (routing.gate * (routing.index >= c.experts)).sum(-1, keepdim=True).to(y.dtype) * tokens
        limits["all_kept"] = self.router.keeps_all(c.capacity_factor, training)
        return y, load(self.router, logits, routing, **limits)

    def mixed(self, tokens: Float[Tensor, "n d"], documents: Documents, side) -> tuple[Tensor, Load]:
        """Each expert's slots a mixture of the tokens, each token a mixture of the slots (Soft MoE)."""
        dispatch, gather, logits = softly(tokens, self.gate, self.scale, documents.number)
        e, slots = self.config.experts, (dispatch.to(tokens.dtype) @ self.seen(tokens)).flatten(0, 1)
        own = torch.arange(e, device=tokens.device).repeat_interleave(self.config.slots)
        index = own.repeat(len(dispatch))[:, None]
        all_of_them = Routing(index, torch.ones_like(index, dtype=dispatch.dtype), torch.ones_like(index).bool())
        y = self.ops.experts(slots, all_of_them, self.w13, self.w2, **self.more(side, documents, slots=True))
        y = (gather.flatten(0, 1).T.to(y.dtype)) @ y
        p = rearrange(logits.softmax(-1), "n (e s) -> n e s", e=e).sum(-1)
        zero = p.sum() * 0
        counts = index.flatten().bincount(minlength=e) * bool(len(tokens))
        stats = Load(
            counts=counts,
            dropped=torch.zeros_like(counts),
            first=counts,
            probability=p.sum(0),
            mass=p.sum(0),
            importance=p.sum(0),
            chance=counts.to(p),
            sequence=zero,
            z=zero,
            entropy=torch.special.entr(p.detach()).sum(),
            tokens=torch.tensor(len(tokens), device=tokens.device),
        )
        return y if self.up is None else F.linear(y, self.up), stats

    def seen(self, tokens: Float[Tensor, "n d"]) -> Float[Tensor, "n l"]:
        """What the experts see of a token."""
        return tokens if self.down is None else F.linear(tokens, self.down)

    def within(self, routing: Routing) -> Routing:
        """The pairs that have an expert to compute: not those of identity experts."""
        if not self.config.identity:
            return routing
        kept = routing.kept & (routing.index < self.config.experts)
        return Routing(routing.index.masked_fill(~kept, -1), routing.gate, kept)

    def more(self, side, documents: Documents, slots: bool = False) -> dict[str, Any]:
        """What the experts need besides tokens, gates and matrices."""
        c = self.config
        more = {"b13": self.b13, "b2": self.b2, "inner": self.kind.inner, "gate_at": self.router.gate_at}
        if c.dropout and side.key is not None and not slots:
            more["drop"] = Drop(c.dropout, self.key(side, 1), side.index.flatten())
        if c.pad:
            factor = capacity_of(self.router, c.capacity_factor, training=side.key is not None)
            size = tally(*documents)
            room = rooms(self.router, factor, c.top_k, c.columns, size)
            more["room"] = int(room[size > 0].sum())
        return more

    def logits(self, tokens: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """What each token wants, in float32 at least; nothing at all where the word chooses."""
        if self.gate is None:
            return tokens.new_zeros(
                len(tokens), self.config.columns, dtype=torch.promote_types(tokens.dtype, torch.float32)
            )
        return wanted(tokens, self.gate, self.gate_bias)

    def jittered(self, tokens: Float[Tensor, "n d"], side) -> Float[Tensor, "n d"]:
        """The router's own copy of the tokens, in training times 1 - jitter to 1 + jitter."""
        jitter = self.router.jitter if self.config.jitter is None else self.config.jitter
        if not jitter or side.key is None:
            return tokens
        return tokens * (1 + jitter * (2 * noise(self.key(side, 0), side.index.flatten(), tokens.shape[1]) - 1))

    def key(self, side, stream: int) -> int:
        """Of this layer's own randomness in this step."""
        return side.key + self.number + (stream + 1) * 2**32

    def draws(self, side, width: int) -> Callable[[int], Float[Tensor, "n e"]]:
        return lambda s: noise(self.key(side, 2 + s), side.index.flatten(), width) + 2.0**-25

    def _apply(self, *args, **kwargs):
        """Bias and penalty stay float32 when the model is cast: in bf16 their small steps would be lost."""
        before = {name: getattr(self, name) for name in ("bias", "penalty")}
        super()._apply(*args, **kwargs)
        for name, own in before.items():
            if own is not None and getattr(self, name).dtype != torch.float32:
                setattr(self, name, own.to(getattr(self, name).device))
        return self

    def always(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        y = self.shared(x)
        return y if self.shared_gate is None else F.linear(x, self.shared_gate).sigmoid() * y


START = {"normal": None, "zero": constant(0.0), "orthogonal": orthogonal(0.1)}


def started(how: str, *shape: int) -> nn.Parameter:
    """The router's weights, which begin as its paper says."""
    weight = nn.Parameter(torch.empty(shape))
    if START[how] is not None:
        weight.start = START[how]
    return weight


def apart(documents: Documents | Int[Tensor, "b t"] | None, x: Float[Tensor, "b t d"]) -> Documents:
    """The document of each token, which differs between rows of the batch."""
    if isinstance(documents, Documents):
        return documents
    b, t = x.shape[:2]
    batch = torch.arange(b, device=x.device)[:, None]
    if documents is None:
        return Documents(batch.expand(b, t).flatten(), b)
    number, many = numbered(documents.flatten())
    return numbered((batch * many + number.view(b, t)).flatten())  # again, so that there are no more than tokens
