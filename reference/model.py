"""Pattern -> blocks -> language model, written once against `ops`.

A stack is a string of letters, one a sublayer: L a linear sequence model, N softmax attention, E experts, D a dense
feed-forward layer. Every sublayer is x + f(norm(x)); L+E is one of both side by side, x + f(norm(x)) + g(norm(x)). A
mixer and the feed-forward layers behind it are one block, the unit that is sharded and recomputed. The model's state is
a position and a state for every mixer.

    b batch   t time   d width   e experts
"""

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference import mixers
from reference.documents import Documents, documents_of, position_in_document
from reference.head import product_of
from reference.mixers.parts import constant, head_norm, normal, parameter
from reference.mixers.softmax import ATTENTION
from reference.moe import Dense, Experts, Linears, MoE
from reference.noise import dropout, seed_of
from reference.ops import Ops
from reference.presets import Model as Config
from reference.presets import side_by_side
from reference.routers import Inside, Load, row


class Side(NamedTuple):
    """What a block may know about its tokens besides x, and what earlier blocks want it to know."""

    positions: Int[Tensor, "b t"]  # in the document
    cu_seqlens: Int[Tensor, " n1"] | None = None  # borders of packed documents
    documents: Documents | None = None  # that each token belongs to, where they are packed; counted once for all layers
    index: Int[Tensor, "b t"] | None = None  # the token's number in the whole run, for randomness
    key: int | None = None  # of the step's randomness; None: no training step, hence none
    common: Mapping[str, Tensor] = {}  # parameters that mixers of one kind share
    values: Float[Tensor, "b t hv"] | None = None  # that a first layer handed to all later ones
    tokens: Int[Tensor, "b t"] | None = None  # the words themselves, for routers that go by them


class State(NamedTuple):
    """All that a text so far has left in the model."""

    position: Int[Tensor, " b"]
    mixers: tuple


class Output(NamedTuple):
    """What the model returns: losses if it was given labels, else logits."""

    losses: Float[Tensor, "b t"] | None
    logits: Float[Tensor, "b t vocabulary"] | None
    state: State | None
    loads: Load | None  # every field stacked over the expert layers, in order
    inside: tuple[Inside, ...] = ()  # the same of the routers inside mixers, one for each number of experts and k


class Sublayer(nn.Module):
    """x + dropout(f(norm(x))), f a mixer or a feed-forward layer, or the sum of several side by side.

    Under autocast the norm is rounded once, to the dtype of products, for all layers that are `narrow`, where each of
    their products would round it. Its gradients add up in that dtype, too.
    """

    def __init__(self, config: Config, inner: list[nn.Module], number: int, ops: Ops):
        super().__init__()
        self.inner, self.beside, self.number, self.ops = inner[0], nn.ModuleList(inner[1:]), number, ops
        self.norm, self.eps, self.dropout = head_norm(config.width), config.eps, config.dropout

    def forward(self, x: Float[Tensor, "b t d"], side: Side, state=None):
        layers, dtype, outputs, loads = (self.inner, *self.beside), product_of(x), [], []
        narrow = [inner.narrow for inner in layers]
        wide = self.ops.norm(x, self.norm, self.eps, dtype=dtype if all(narrow) else x.dtype)
        rounded = wide.to(dtype) if any(narrow) else wide
        for inner in layers:
            seen = rounded if inner.narrow else wide
            if isinstance(inner, MoE):
                y, *own = inner(seen, side)
            elif isinstance(inner, Dense):
                y, own = inner(seen, side), []
            else:
                y, state, *more = inner(seen, side, state)
                side, own = more or (side, [])
            outputs.append(y)
            loads += own
        y = sum(outputs[1:], outputs[0])
        if side.key is not None and self.dropout:
            y = dropout(y, self.dropout, side.key + self.number, side.index)
        return x + y, side, state, loads


class Block(nn.Module):
    """A mixer and what follows it, up to the next mixer."""

    def __init__(self, sublayers: list[Sublayer]):
        super().__init__()
        self.sublayers = nn.ModuleList(sublayers)

    def forward(self, x, side: Side, state=None):
        """(x, side, state, loads). Nothing is accumulated inside: recomputing is safe.

        loads: in order, a `Load` of each expert layer and an `Inside` of each router in a mixer.
        """
        loads = []
        for sublayer in self.sublayers:
            x, side, state, own = sublayer(x, side, state)
            loads += own
        return x, side, state, loads


class LanguageModel(nn.Module):
    """Tokens in; losses of labels, or logits, out."""

    def __init__(self, config: Config, ops: Ops):
        super().__init__()
        self.config, self.ops = config, ops
        letters = config.letters
        if "E" in letters and not experts_of(config).causal and ops.one_way is None:
            looks_ahead(row(config.router).title)
        count = sum(letter in "LN" for letter in letters)
        self.embedding = parameter(config.vocabulary, config.width, start=normal(0.02))
        self.common = nn.ParameterDict(common(config, count))
        self.blocks = nn.ModuleList(blocks(config, letters, count, ops))
        self.norm = head_norm(config.width)
        if not config.tied:
            self.head = parameter(config.vocabulary, config.width, start=normal(0.02))

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        labels: Int[Tensor, "b t"] | None = None,
        positions: Int[Tensor, "b t"] | None = None,
        cu_seqlens: Int[Tensor, " n1"] | None = None,
        index: Int[Tensor, "b t"] | None = None,
        key: int | None = None,
        state: State | None = None,
        keep_state: bool = False,
    ) -> Output:
        """The model over these tokens, from `state` (the start of a text if None).

        `positions` and `cu_seqlens` describe packed documents (b = 1); without them every row goes on from its state.
        `key` makes it a training step: dropout and the routers' noise are functions of key and `index` alone;
        ValueError without `index`.
        """
        side = self.side(tokens, positions, cu_seqlens, index, key, state)
        x = nn.functional.embedding(tokens, self.embedding)
        states, loads = [], []
        for i, block in enumerate(self.blocks):
            x, side, after, own = block(x, side, None if state is None else state.mixers[i])
            states.append(after)
            loads += own
        x = self.ops.norm(x, self.norm, self.config.eps)
        head = self.embedding if self.config.tied else self.head
        losses = logits = None
        if labels is None:
            logits = nn.functional.linear(x, head)
        else:
            losses = self.ops.token_losses(x.flatten(0, 1), head, labels.flatten()).view(labels.shape)
        after = State(reached(side, state, tokens), tuple(states)) if keep_state else None
        return Output(losses, logits, after, stacked([x for x in loads if isinstance(x, Load)]), alike(loads))

    def side(self, tokens, positions, cu_seqlens, index, key, state) -> Side:
        if key is not None and index is None:
            raise ValueError(f"a training step with key {key} needs the tokens' index: their numbers in the run, b t")
        documents = None if cu_seqlens is None else documents_of(cu_seqlens, tokens.shape[1])
        if positions is None:
            start = 0 if state is None else state.position
            if cu_seqlens is None:
                offset = torch.arange(tokens.shape[1], device=tokens.device)
                positions = (offset if state is None else start[:, None] + offset).expand(tokens.shape)
            else:
                own = position_in_document(cu_seqlens, tokens.shape[1])[None]
                positions = own if state is None else own + start[documents.number]
        return Side(positions, cu_seqlens, documents, index, key, dict(self.common.items()), tokens=tokens)

    def check(self, tokens: Tensor) -> None:
        """One line for tokens outside the vocabulary. Reads the tokens, so a GPU waits: for entry points, not steps."""
        low, high = (int(f(tokens)) if tokens.numel() else 0 for f in (torch.min, torch.max))
        if low < 0 or high >= self.config.vocabulary:
            raise ValueError(f"tokens are {low} ... {high}; the vocabulary is 0 ... {self.config.vocabulary - 1}")


@functools.cache
def looks_ahead(title: str) -> None:
    """Said once of each router."""
    warnings.warn(
        f"router {title} is not causal here: which experts a token gets depends on later tokens, so a language model "
        "trained with it looks ahead, and its loss is no likelihood",
        stacklevel=3,
    )


def stacked(loads: list[Load]) -> Load | None:
    return Load(*map(torch.stack, zip(*loads, strict=True))) if loads else None


def alike(loads: list[Load | Inside]) -> tuple[Inside, ...]:
    """The loads of routers inside mixers, stacked where they have the same k and number of experts."""
    groups = {}
    for inside in loads:
        if isinstance(inside, Inside):
            groups.setdefault((inside.k, len(inside.load.counts)), []).append(inside.load)
    return tuple(Inside(k, stacked(own)) for (k, _), own in groups.items())


def reached(side: Side, state: State | None, tokens: Tensor) -> Int[Tensor, " b"]:
    """The position after the last token of every sequence, or of every packed document."""
    before = 0 if state is None else state.position
    if side.cu_seqlens is None:
        return torch.full(tokens.shape[:1], tokens.shape[1], device=tokens.device) + before
    return side.cu_seqlens.diff().long() + before


def common(config: Config, count: int) -> dict[str, nn.Parameter]:
    if "L" not in config.letters:
        return {}
    return mixers.kind(config.lsm).common(config, count)


def blocks(config: Config, letters: str, count: int, ops: Ops) -> Iterator[Block]:
    block, layer, number = [], 0, 0
    for group in side_by_side(letters):
        names = group.split("+")
        mixer = any(letter in "LN" for letter in names)
        if mixer and block:
            yield Block(block)
            block = []
        inner = [INNER[letter](config, layer, count, ops, number + i) for i, letter in enumerate(names)]
        block.append(Sublayer(config, inner, number, ops))
        layer, number = layer + mixer, number + len(names)
    yield Block(block)


INNER = {
    "L": lambda config, layer, layers, ops, number: mixers.build(config, layer, layers, ops),
    "N": lambda config, layer, layers, ops, number: ATTENTION[config.attention](config, ops),
    "E": lambda config, layer, layers, ops, number: MoE(experts_of(config), ops, number),
    "D": lambda config, layer, layers, ops, number: Dense(config.width, config.dense_width, config.expert_kind),
}


def experts_of(config: Config) -> Experts:
    return Experts(
        width=config.width,
        experts=config.experts,
        top_k=config.top_k,
        hidden=config.expert_width,
        router=config.router,
        kind=config.expert_kind,
        biases=config.expert_biases,
        capacity_factor=config.capacity_factor,
        drop=config.drop,
        pad=config.pad,
        groups=config.groups,
        groups_kept=config.groups_kept,
        shared=config.shared_width,
        shared_gate=config.shared_gate,
        identity=config.identity,
        latent=config.latent,
        slots=config.expert_slots,
        jitter=config.jitter,
        dropout=config.expert_dropout,
        vocabulary=config.vocabulary,
    )


# --------------------------------------------------------------------------------------------- the parameters


def starts(model: nn.Module) -> dict:
    """How each parameter begins, by name. Ask before sharding: it replaces the parameters."""
    default = {1: constant(0.0)}
    return {n: (p.shape, getattr(p, "start", default.get(p.ndim, normal(0.02)))) for n, p in model.named_parameters()}


def decayed(model: nn.Module) -> set[str]:
    """The parameters that weight decay is for: matrices of projections, experts, embedding and head."""
    names = {n for n, p in model.named_parameters() if p.ndim >= 2 and not hasattr(p, "start")}
    return names | {n for n, _ in model.named_parameters() if n in ("embedding", "head")}


@torch.no_grad()
def initialize(model: nn.Module, seed: int, how: dict | None = None) -> None:
    """Every parameter from (seed, its name) alone: any machine, backend or number of ranks starts the same.

    `how` is what `starts` said before the model was sharded (None: the model is whole).
    """
    for name, (shape, start) in (how or starts(model)).items():
        rng = torch.Generator().manual_seed(seed_of(seed, name))
        value, weight = start(tuple(shape), rng), model.get_parameter(name)
        if hasattr(weight, "placements"):
            from torch.distributed.tensor import distribute_tensor

            value = value.to(weight.device, weight.dtype)
            weight.copy_(distribute_tensor(value, weight.device_mesh, weight.placements, src_data_rank=None))
        else:
            weight.copy_(value)
    for _, buffer in model.named_buffers():
        buffer.zero_()
    for name, layer in model.named_modules():
        if isinstance(layer, MoE):
            layer.begin(seed_of(seed, name))


def sizes(config: Config) -> dict[str, int]:
    """Number of parameters: total, active (what one token uses), and of both the embeddings and norms."""
    from reference.ops import ops

    with torch.device("meta"):
        model = LanguageModel(config, ops)
    count = {name: p.numel() for name, p in model.named_parameters()}
    idle = sum(m.idle() for m in model.modules() if isinstance(m, MoE | Linears))
    return {
        "total": sum(count.values()),
        "active": sum(count.values()) - idle,
        "embeddings": sum(n for name, n in count.items() if name in ("embedding", "head")),
        "norms": sum(n for name, n in count.items() if name.endswith("norm")),
    }


def for_writing(model: LanguageModel) -> tuple[LanguageModel, str]:
    """The model that writes token by token, with the same parameters, and what it does otherwise ("": nothing).

    Where a token's experts depend on the text around it, it chooses them by itself: no expert is ever full, and
    routers whose experts choose give way to their token choice (`Router.decode`). ValueError for a router that has
    none, as Soft MoE mixes all tokens of a text; and for a model that looks both ways.
    """
    if model.ops.one_way is not None:
        raise ValueError("a model without a causal mask, as objective masked trains it, has no next token to write")
    config, router = model.config, row(model.config.router)
    if "E" not in config.letters or experts_of(config).prefix_stable:
        return model, ""
    if router.pooled == "always":
        raise ValueError(f"router {router.title} mixes all tokens of a text: it cannot write them one by one")
    name = router.decode or config.router
    alone = replace(config, router=name, capacity_factor=math.inf, pad=False)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = LanguageModel(alone, model.ops)
    writer.load_state_dict(model.state_dict(), assign=True)
    choice = f"each token chooses its own {config.top_k} experts as in {row(name).title}"
    what = choice if router.decode else "no expert is ever full"
    return writer.train(model.training), f"router {router.title} goes by the whole text: in writing, {what}"


def state_bytes(state) -> int:
    """Bytes of all tensors of a state, however deep its tuples."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(map(state_bytes, state)) if isinstance(state, tuple) else 0
