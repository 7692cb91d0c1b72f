"""Tensor parallelism by heads: each rank computes some heads of every mixer, some channels of every expert, some words.

    y = Σ_r mixer_r(x)      mixer_r: the same layer with heads / W heads, whose parameters are a part of the layer's own

All ranks of the group have the same tokens and repeat what stands between the layers: embedding, norms, routers,
loss. Each counts a W-th of its loss, so that the ranks' losses add up to the loss; its gradients then add up, too,
wherever a parameter stands, and one collective is all there is: a sum over the group, which is its own adjoint. One
goes forward and one back a layer, besides a few numbers a token where channels of all heads meet inside (in a norm, or
in Mamba's step, B and C), and three for the loss, which goes over all words.

How a parameter is cut follows from the layer itself: built with fewer heads, or fewer channels of the single head of
S4, Mamba and Longhorn, it has fewer rows (of projections, decays, convolutions, ...) or fewer columns (of the output),
and what it has whole all heads share: RWKV's token shift and low ranks, a router of memories. `PLAN` says the rest:
which parameters hold several projections one behind the other, and so are cut in each, and where ranks meet inside.

Projections that are cut in one piece are DTensors, on each rank its own part, sharded once more over the ranks that
hold the same one. All else (packed projections, vectors, what heads share) is sharded over all ranks as without tensor
parallelism, comes whole to each, and is cut where it is used.

    W ranks of the group   b batch   t time   d width   h heads   v channels of a value   e experts   f hidden channels
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.func import functional_call

from parallel import comm
from parallel.comm import Group
from parallel.graph import differentiable, known
from reference import mixers
from reference.head import IGNORED
from reference.local import ACTIVATION
from reference.mixers import (
    delta,
    gated,
    linear_attention,
    mamba,
    mamba2,
    mamba3,
    mesa,
    mom,
    polynomial,
    printed,
    rwkv,
    slots,
    softmax,
    ttt,
)
from reference.mixers import titans as surprise
from reference.mixers.parts import Mixer, alone, linear, wide
from reference.moe import Dense, MoE
from reference.ops import Ops

# ------------------------------------------------------------------------------------------------------- who shares


class Team(NamedTuple):
    """The ranks that share heads, as one of them, and what they exchange."""

    rank: int
    ranks: int
    total: Callable[[Tensor], Tensor]  # the sum over ranks, the same on all of them; its gradient is the sum of theirs
    gathered: Callable[[Tensor], Tensor]  # b s d -> b ws d: everybody's tokens, one rank's behind the other's
    scattered: Callable[[Tensor], Tensor]  # b ws d -> b s d: my tokens of the sum over ranks; the adjoint


def team_of(group: Group) -> Team:
    ops = (partial(op, group=group.group_name) for op in (_total, _gathered, _scattered))
    return Team(comm.rank(group), comm.size(group), *ops)


# ------------------------------------------------------------------------------------------------ what is cut, and how

Blocks = list[tuple[int, bool]]  # sizes along a dimension, one behind the other, and whether each is cut


def apart(smaller: nn.Module, whole: nn.Module, team: Team) -> None:
    """No channels meet but in the last sum."""


def norm_of_all(smaller: nn.Module, whole: nn.Module, team: Team) -> None:
    """Its norm goes over the channels of all heads."""
    smaller.ops = smaller.ops._replace(norm=partial(norm_across, team))


def norm_of_one_group(smaller: mamba2.Mamba2, whole: mamba2.Mamba2, team: Team) -> None:
    if whole.groups == 1:
        norm_of_all(smaller, whole, team)


def layer_norm_of_all(smaller: ttt.TTT, whole: ttt.TTT, team: Team) -> None:
    smaller.layer_norm = partial(layer_norm_across, team)


def inner_sums(smaller: nn.Module, whole: nn.Module, team: Team) -> None:
    """What it projects from its channels is a sum over those of all ranks."""
    smaller.summed = team.total


def own_inputs(smaller: mamba.S4D, whole: mamba.S4D, team: Team) -> None:
    """Whether there is a projection in front goes by the size of the whole."""
    smaller.i = Own(team) if isinstance(whole.i, nn.Identity) else linear(whole.i.in_features, smaller.values)


class Own(nn.Module):
    """This rank's channels."""

    def __init__(self, team: Team):
        super().__init__()
        self.team = team

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        return x.chunk(self.team.ranks, -1)[self.team.rank]


class Plan(NamedTuple):
    """What a layer with fewer heads does not tell by its shapes."""

    packed: Mapping[str, Callable[[nn.Module], Blocks]] = {}  # parameters of several blocks, by name
    common: tuple[str, ...] = ()  # parameters that all layers share, whose last dimension is cut
    joins: Callable[[nn.Module, nn.Module, Team], None] = apart  # tells a part, and the whole, where ranks meet inside
    once: tuple[str, ...] = ()  # parameters that come whole, and are added to what is summed
    inside: bool = False  # whether the last sum stands inside, before what is no sum


def each(sizes: list[int]) -> Blocks:
    return [(size, True) for size in sizes]


def of_state_space(layer: mamba2.Mamba2) -> Blocks:
    """x, B, C. One group's B and C serve all heads, and so come whole."""
    values, *shared = layer.parts
    return [(values, True), *((size, layer.groups > 1) for size in shared)]


FRONT = Plan(
    {
        "conv": lambda m: each([m.keys, *m.steps * [m.keys], *m.steps * [m.values]]),
        "k.weight": lambda m: each(m.steps * [m.keys]),
        "v.weight": lambda m: each(m.steps * [m.values]),
        "beta.weight": lambda m: each(m.steps * [m.value_heads]),
    }
)
STATE_SPACE = Plan(
    {
        "project.weight": lambda m: [(m.values, True), *of_state_space(m), (m.heads, True)],
        "conv": of_state_space,
        "conv_bias": of_state_space,
    },
    joins=norm_of_one_group,
)
SELECTIVE = Plan({"project.weight": lambda m: each([m.values, m.values])}, joins=inner_sums)
PLAN: dict[type[nn.Module], Plan] = {
    linear_attention.LinearAttention: Plan(),
    linear_attention.NormalizedLinearAttention: Plan(),
    linear_attention.Lightning: Plan(joins=norm_of_all),
    linear_attention.Retention: Plan(),
    gated.GLA: Plan(),
    gated.HGRN2: Plan(joins=norm_of_all, common=("lower_bounds",)),
    gated.GatedFastWeights: Plan(),
    gated.GateLoop: Plan(),
    delta.DeltaNet: FRONT,
    delta.GatedDeltaNet: FRONT,
    delta.Comba: FRONT,
    delta.GatedDeltaProduct: FRONT,
    delta.KDA: FRONT,
    surprise.Titans: FRONT,
    mamba2.Mamba2: STATE_SPACE,
    mamba2.LogLinearMamba2: STATE_SPACE,
    mamba3.Mamba3: Plan(
        # [z | x | B | C | Δ | A | λ | angles]: B, C and the angles serve all heads
        {"project.weight": lambda m: [(n, i not in (2, 3, 7)) for i, n in enumerate(m.sizes)]},
    ),
    mesa.Mesa: Plan({"conv": lambda m: each([m.keys, m.keys])}),
    polynomial.Based: Plan(),
    polynomial.Rebased: Plan(),
    slots.GSA: Plan(joins=norm_of_all),
    rwkv.RWKV6: Plan(),
    rwkv.RWKV7: Plan(),
    ttt.TTT: Plan(joins=layer_norm_of_all),
    ttt.TTTLinear: Plan(joins=layer_norm_of_all),
    mamba.Mamba: SELECTIVE,
    mamba.Longhorn: SELECTIVE,
    mamba.S4D: Plan(joins=own_inputs, once=("o.bias",), inside=True),
    mom.GLAMemories: Plan(),
    mom.GatedDeltaNetMemories: Plan({"first.conv": lambda m: FRONT.packed["conv"](m.first)}),
    printed.Printed: Plan(),
    printed.Stationary: Plan(),
    printed.OneDecay: Plan(),
    softmax.Softmax: Plan(),
    softmax.Latent: Plan(),
    softmax.MixtureOfHeads: Plan(once=("bias",)),
    Dense: Plan({"w13": lambda m: each(m.kind.rows * [m.w2.shape[1]])}),
}


class Cut(NamedTuple):
    """A parameter's part on one of W ranks: along `dim` (None: all of it), of every block that is cut its own W-th."""

    dim: int | None
    blocks: Blocks

    def share(self, ranks: int) -> float:
        """Of the parameter's numbers, in one part."""
        sizes = [(size, size // ranks if is_cut else size) for size, is_cut in self.blocks or [(1, False)]]
        return sum(own for _, own in sizes) / sum(whole for whole, _ in sizes)


def cut_of(weight: Tensor, smaller: Tensor, ranks: int, blocks: Blocks | None, name: str) -> Cut:
    """How a parameter is cut whose part has the shape of `smaller`. ValueError, one line, if the two do not fit."""
    differing = [i for i, sizes in enumerate(zip(weight.shape, smaller.shape, strict=True)) if sizes[0] != sizes[1]]
    if not differing:
        return Cut(None, [])
    blocks = blocks or [(weight.shape[differing[0]], True)]
    found, left = (x.shape[differing[0]] for x in (weight, smaller))
    fits = all(size % ranks == 0 for size, cut in blocks if cut) and sum(size for size, _ in blocks) == found
    if len(differing) > 1 or not fits or sum(size // ranks if cut else size for size, cut in blocks) != left:
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} cannot be cut over {ranks} ranks into parts of "
            f"{tuple(smaller.shape)}; use --mesh.tensor 1"
        )
    return Cut(differing[0], blocks)


def part(weight: Tensor, cut: Cut, team: Team) -> Tensor:
    """This rank's part of a parameter, that it holds alone or cuts out here; differentiable."""
    if isinstance(weight, DTensor):
        return weight.to_local()
    if cut.dim is None:
        return weight
    pieces = weight.split([size for size, _ in cut.blocks], cut.dim)
    own = [
        x.chunk(team.ranks, cut.dim)[team.rank] if is_cut else x
        for x, (_, is_cut) in zip(pieces, cut.blocks, strict=True)
    ]
    return own[0] if len(own) == 1 else torch.cat(own, cut.dim)


# ------------------------------------------------------------------------------------------------------- the layers


class Shared(NamedTuple):
    """A parameter, and how it is cut."""

    module: nn.Module
    name: str
    cut: Cut

    @property
    def weight(self) -> Tensor:
        return self.module.get_parameter(self.name)

    def alone(self, alike: int) -> bool:
        """Whether each rank holds its part alone: of a matrix that is cut in one piece, and whose other side the ranks
        with the same part, so many, can share."""
        sides = [size for i, size in enumerate(self.weight.shape) if i != self.cut.dim]
        return self.cut.dim is not None and len(self.cut.blocks) == 1 and any(size % alike == 0 for size in sides)


def place(
    model: nn.Module, grid: DeviceMesh | None, sparing: bool = False, shared_out: bool = False
) -> dict[nn.Module, set[nn.Parameter]]:
    """`share`, and each rank holds alone what it can of its parts; in place, before sharding. Returns these, by layer.

    `grid` ends in the dimensions `tensor_shards` (ranks that hold the same part) and `tensor` (the group). Names of
    parameters stay.
    """
    held = {}
    if grid is None:
        return held
    team, alike = team_of(grid.get_group("tensor")), grid["tensor_shards"].size()
    for shared in share(model, team, sparing, shared_out):
        if shared.alone(alike):
            hold(shared, team, grid["tensor"])
            held.setdefault(shared.module, set()).add(shared.weight)
    return held


def share(model: nn.Module, team: Team, sparing: bool = False, shared_out: bool = False) -> list[Shared]:
    """Every mixer, dense layer and expert of a language model computes its part from now on, in place; returns their
    parameters.

    If `sparing`, each rank keeps a part of the tokens between layers (`spare`). If experts are `shared_out`, each is on
    one rank, and whole. Raises ValueError, one line, for layers that cannot be cut so.
    """
    layer, end = 0, partial(own_sum, team) if sparing else team.total
    count = sum(letter in "LN" for letter in model.config.letters)
    parameters = []
    for sublayer in (sublayer for block in model.blocks for sublayer in block.sublayers):
        inner = [sublayer.inner, *sublayer.beside]
        for module in inner:
            if isinstance(module, MoE):
                parameters += share_experts(module, team, shared_out)
            else:
                smaller = part_of(module, model.config, layer, count, model.ops, team)
                parameters += share_layer(module, smaller, team, end)
        layer += any(not isinstance(module, MoE | Dense) for module in inner)
    if sparing:
        spare(model, team)
    return parameters


def share_layer(module: nn.Module, smaller: nn.Module, team: Team, end: Callable) -> list[Shared]:
    """A layer's forward becomes the sum over ranks of the same layer with fewer heads, or hidden channels."""
    plan, cuts = PLAN[type(module)], {}
    for name, weight in module.named_parameters():
        packed = plan.packed[name](module) if name in plan.packed else None
        cuts[name] = cut_of(weight, smaller.get_parameter(name), team.ranks, packed, f"{name} of {title(module)}")
    if plan.inside:
        smaller.summed, end = end, alone
    module.forward = partial(summed_forward, module, smaller, cuts, plan, team, end)
    return [Shared(module, name, cut) for name, cut in cuts.items()]


def share_experts(layer: MoE, team: Team, shared_out: bool) -> list[Shared]:
    """The weights of experts; what they compute is `sharing`'s. The shared expert is a layer like any other."""
    parameters = [] if shared_out else cut_experts(layer, team)
    if layer.shared is not None:
        smaller = part_of(layer.shared, None, 0, 0, layer.ops, team)
        parameters += share_layer(layer.shared, smaller, team, team.total)
    return parameters


def cut_experts(layer: MoE, team: Team) -> list[Shared]:
    c = layer.config
    if c.dropout:
        raise ValueError(
            f"dropout inside experts ({c.dropout}) is drawn for all hidden channels at once, and they are cut over "
            f"{team.ranks} ranks; use --model.expert-dropout 0 or --mesh.tensor 1"
        )
    divided(c.hidden, "hidden channels of an expert", team.ranks)
    cuts = cuts_of_experts(layer.kind.rows, c.hidden)
    return [Shared(layer, name, cuts[name]) for name in layer.own()]


def cuts_of_experts(rows: int, hidden: int) -> dict[str, Cut]:
    inner = Cut(1, each(rows * [hidden]))
    return {"w13": inner, "b13": inner, "w2": Cut(2, each([hidden])), "b2": Cut(None, [])}


def hold(shared: Shared, team: Team, mesh: DeviceMesh) -> None:
    """Keep this rank's part alone."""
    own = part(shared.weight.detach(), shared.cut, team).clone(memory_format=torch.contiguous_format)
    weight = DTensor.from_local(own, mesh, [Shard(shared.cut.dim)], run_check=False)
    owner, _, last = shared.name.rpartition(".")
    shared.module.get_submodule(owner).register_parameter(last, nn.Parameter(weight))


def placement(weight: DTensor, alike: int) -> Shard:
    """Along which dimension a part is sharded over its holders: the first that they divide, but for its own."""
    (own,) = weight.placements
    return Shard(next(i for i, size in enumerate(weight.shape) if i != own.dim and size % alike == 0))


def title(module: nn.Module) -> str:
    core = core_of(module)
    return core.row.title if isinstance(core, Mixer) else f"{type(core).__name__} (in reference.mixers.softmax)"


def core_of(module: nn.Module) -> nn.Module:
    """The layer with the heads: of a mixture of memories the first."""
    return module.first if isinstance(module, mom.MixtureOfMemories) else module


def divided(whole: int, what: str, ranks: int) -> int:
    """Each rank's share. ValueError, one line, if there is none."""
    if whole % ranks:
        fits = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
        raise ValueError(f"{whole} {what} cannot be shared over {ranks} ranks; let --mesh.tensor be one of {fits}")
    return whole // ranks


def part_of(module: nn.Module, config, layer: int, count: int, ops: Ops, team: Team) -> nn.Module:
    """The layer that this rank computes, whose parameters come from the whole one. ValueError, one line, if the whole
    one cannot be cut."""
    plan = PLAN.get(type(module))
    if plan is None:
        raise ValueError(
            f"{title(module)} is not cut by heads (--mesh.tensor {team.ranks}): parallel.tensor.PLAN does not say how; "
            "use --mesh.tensor 1"
        )
    with torch.device("meta"):
        smaller = fewer(module, config, layer, count, ops, team.ranks)
        plan.joins(smaller, module, team)
    if isinstance(module, Mixer):
        smaller.first, smaller.all_heads = team.rank * smaller.heads, module.heads
    return smaller


def fewer(module: nn.Module, config, layer: int, count: int, ops: Ops, ranks: int) -> nn.Module:
    """The same layer with a W-th of the heads, each as large as before, or of the channels of a single one."""
    if isinstance(module, Dense):
        rows, hidden = module.kind.rows, divided(module.w2.shape[1], "hidden channels", ranks)
        smaller = Dense(module.w13.shape[1], hidden)
        smaller.kind, smaller.w13 = module.kind, nn.Parameter(torch.empty(rows * hidden, module.w13.shape[1]))
        return smaller
    if isinstance(module, softmax.Attention):
        heads = softmax.heads_of(config)
        own = {"attention_heads": divided(heads, "attention heads", ranks), "head_size": softmax.size_of(config)}
        if isinstance(module, softmax.Softmax) and (config.key_heads or heads) > 1:
            own["key_heads"] = divided(config.key_heads or heads, "key heads", ranks)
        if isinstance(module, softmax.Latent):
            own |= {"latent_rank": module.rank}
        return type(module)(replace(config, **own), ops)
    core, own = core_of(module), {"key_size": module.key_size}
    if isinstance(module, mamba.S4D | mamba.Selective):
        own |= {"heads": 1, "value_size": divided(module.values, f"channels of {title(module)}", ranks)}
    else:
        own |= {"heads": divided(core.heads, f"heads of {title(module)}", ranks), "value_size": module.value_size}
    if config.value_heads is not None:
        own["value_heads"] = divided(config.value_heads, f"value heads of {title(module)}", ranks)
    if isinstance(module, mamba2.Mamba2) and config.state_groups > 1:
        own["state_groups"] = divided(config.state_groups, f"state_groups of {title(module)}", ranks)
    return mixers.build(replace(config, **own), layer, count, ops)


def summed_forward(module, smaller, cuts: dict[str, Cut], plan: Plan, team: Team, end: Callable, x, side=None, *state):
    """The sum over ranks of what each rank's heads give; the state, if there is one, is that of its own heads."""
    own = {name: part(weight, cuts[name], team) for name, weight in module.named_parameters()}
    own |= {name: own[name] * (team.rank == 0) for name in plan.once}
    if plan.common:
        mine = {name: side.common[name].chunk(team.ranks, -1)[team.rank] for name in plan.common}
        side = side._replace(common={**side.common, **mine})
    x = x if side is None else x[:, : side.positions.shape[1]]
    y = functional_call(smaller, own, (x, side, *state))
    return end(y) if isinstance(y, Tensor) else (end(y[0]), *y[1:])


def over(ops: Ops, group: Group, shared_out: bool = False) -> Ops:
    """The same ops for a model whose layers are placed, whose loss goes over parts of the words, too."""
    if comm.size(group) == 1:
        return ops
    name, share = f"{ops.name}, heads over {comm.size(group)} ranks", dealing if shared_out else sharing
    return share(ops, team_of(group))._replace(name=name, token_losses=partial(token_losses, group, ops.token_losses))


def dealing(ops: Ops, team: Team) -> Ops:
    """Of experts that are shared out (by `ops.experts`) each rank sends its part of the tokens to theirs, and what
    comes back is gathered. Routing is the same on all ranks; `room`, if given, is there for the tokens of each."""

    def experts(x, routing, *weights, drop=None, **how):
        rows = -(-len(x) // team.ranks)
        own = slice(team.rank * rows, (team.rank + 1) * rows)
        drop = None if drop is None else drop._replace(index=drop.index[own])
        y = ops.experts(x[own], type(routing)(*(part[own] for part in routing)), *weights, drop=drop, **how)
        return team.gathered(F.pad(y, (0, 0, 0, rows - len(y)))[None])[0, : len(x)]

    return ops._replace(experts=experts)


def sharing(ops: Ops, team: Team) -> Ops:
    """Of every expert each rank computes its hidden channels. Routing is the same on all ranks; the second bias is
    added by the first rank alone."""

    def experts(x, routing, w13, w2, b13=None, b2=None, **how):
        hidden = w2.shape[2]
        cuts = cuts_of_experts(w13.shape[1] // hidden, hidden)
        w13, w2 = part(w13, cuts["w13"], team), part(w2, cuts["w2"], team)
        b13 = None if b13 is None else part(b13, cuts["b13"], team)
        b2 = None if b2 is None else b2 * (team.rank == 0)
        return team.total(ops.experts(x, routing, w13, w2, b13, b2, **how))

    return ops._replace(experts=experts)


def token_losses(
    group: Group,
    part_of_losses: Callable,
    x: Float[Tensor, "n d"],
    head: Float[Tensor, "vocabulary d"],
    labels: Int[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """The losses of `ops.token_losses`, which is given, with a part of the vocabulary on each rank, a word more on some
    than on others."""
    rank, ranks = comm.rank(group), comm.size(group)
    start, stop = (len(head) * r // ranks for r in (rank, rank + 1))
    mine = torch.where((start <= labels) & (labels < stop), labels - start, IGNORED)
    losses = part_of_losses(x, head[start:stop], mine, joined=partial(joined, group))
    return torch.where(labels == IGNORED, 0, losses)


def joined(group: Group, sums: Float[Tensor, " n"], own: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Losses, from the logarithm of each rank's sum of exponentials and the label's logit, which one of them has.

    Of each token travel the largest logarithm, so that no exponential overflows, and two numbers more.
    """
    highest = torch.stack(comm.gather(sums.detach(), group)).amax(0)
    summed, own = _total(torch.stack([(sums - highest).exp(), own]), group.group_name)
    return highest + summed.log() - own


def norm_across(
    team: Team,
    x: Float[Tensor, "... hv"],
    weight: Float[Tensor, " hv"] | None,
    eps: float = 1e-5,
    gate: Float[Tensor, "... hv"] | None = None,
    activation: str | None = "silu",
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... hv"]:
    """`reference.local.norm` over the channels of all ranks: of each token one sum of squares is exchanged."""
    y = wide(x)
    square = team.total(y.square().sum(-1, keepdim=True)) / (x.shape[-1] * team.ranks)
    y = y * torch.rsqrt(square + eps)
    y = y if weight is None else y * weight.to(y.dtype)
    return (y if gate is None else y * ACTIVATION[activation](gate.to(y.dtype))).to(dtype or x.dtype)


def layer_norm_across(team: Team, x: Float[Tensor, "... c"], weight, bias, eps: float) -> Float[Tensor, "... c"]:
    """`reference.mixers.ttt.layer_norm` over the channels of all ranks: two sums of a number a token, as the squares
    of what is not centred would lose digits."""
    mean = team.total(x.mean(-1, keepdim=True)) / team.ranks
    return norm_across(team, x - mean, weight, eps) + bias


# ------------------------------------------------------------------------------------------- tokens between layers
# A sum of which each rank keeps its own tokens, and after the norm a gather, are as many bytes as the sum alone. Tokens
# that W does not divide are filled up with zeros, whose norm is zero.


def spare(model: nn.Module, team: Team) -> None:
    """Between the layers of a model that is placed, each rank has a W-th of the tokens; in place.

    ValueError, one line, if there is dropout, which is drawn for all tokens at once.
    """
    if model.config.dropout:
        raise ValueError(
            f"dropout ({model.config.dropout}) is drawn for all tokens at once, and each rank keeps a part of them; "
            "use --model.dropout 0 or --mesh.between repeated"
        )
    for block in model.blocks:
        for sublayer in block.sublayers:
            sublayer.ops = sublayer.ops._replace(norm=gathering(sublayer.ops.norm, team))
            for module in (sublayer.inner, *sublayer.beside):
                if isinstance(module, MoE):
                    module.forward = partial(of_all_tokens, module.forward, team)
    first, last = model.blocks[0], model.blocks[-1]
    first.forward = partial(from_here, first.forward, team)
    last.forward = partial(up_to_here, last.forward, team)


def gathering(norm: Callable, team: Team) -> Callable:
    return lambda *args, **how: team.gathered(norm(*args, **how))


def of_all_tokens(forward: Callable, team: Team, x: Float[Tensor, "b t d"], side, *state):
    """A layer that has all tokens' outputs, of which this rank's go on."""
    y, *more = forward(x[:, : side.positions.shape[1]], side, *state)
    return own_tokens(y, team), *more


def from_here(forward: Callable, team: Team, x: Float[Tensor, "b t d"], side, *state):
    return forward(own_tokens(x, team), side, *state)


def up_to_here(forward: Callable, team: Team, x: Float[Tensor, "b s d"], side, *state):
    x, *more = forward(x, side, *state)
    return team.gathered(x)[:, : side.positions.shape[1]], *more


def own_tokens(x: Float[Tensor, "b t d"], team: Team) -> Float[Tensor, "b s d"]:
    return filled(x, team).chunk(team.ranks, 1)[team.rank]


def own_sum(team: Team, y: Float[Tensor, "b t d"]) -> Float[Tensor, "b s d"]:
    return team.scattered(filled(y, team))


def filled(x: Float[Tensor, "b t d"], team: Team) -> Float[Tensor, "b ws d"]:
    return F.pad(x, (0, 0, 0, -x.shape[1] % team.ranks))


# ---------------------------------------------------------------------------------------------------- known to torch


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.group = inputs[1]


_total = known(
    "total",
    "(Tensor x, str group) -> Tensor",
    lambda x, group: comm.total(x, comm.named(group)),
    lambda x, group: torch.empty_like(x, memory_format=torch.contiguous_format),
)
differentiable("total", lambda ctx, D: (_total(D, ctx.group), None), _keep)


def _gather(x: Tensor, group: str) -> Tensor:
    """Everybody's tokens, one rank's behind the other's."""
    return torch.cat(comm.gather(x, comm.named(group)), 1)


def _scatter(y: Tensor, group: str) -> Tensor:
    """My tokens of the sum over ranks: the adjoint."""
    group = comm.named(group)
    return comm.scatter(torch.stack(y.chunk(comm.size(group), 1)), group)


def _more_tokens(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] * comm.size(comm.named(group)), *x.shape[2:])


def _fewer_tokens(y: Tensor, group: str) -> Tensor:
    return y.new_empty(y.shape[0], y.shape[1] // comm.size(comm.named(group)), *y.shape[2:])


_gathered = known("all_tokens", "(Tensor x, str group) -> Tensor", _gather, _more_tokens)
_scattered = known("own_tokens", "(Tensor y, str group) -> Tensor", _scatter, _fewer_tokens)
differentiable("all_tokens", lambda ctx, D: (_scattered(D, ctx.group), None), _keep)
differentiable("own_tokens", lambda ctx, D: (_gathered(D, ctx.group), None), _keep)
