"""Tensor parallelism by heads: each rank computes some heads of every mixer, some channels of every expert, some words.

    y = Σ_r mixer_r(x)      mixer_r: the same layer with heads / W heads, whose parameters are a part of the layer's own

All ranks of the group have the same tokens and repeat what stands between the layers: embedding, norms, routers,
loss. Each counts a W-th of its loss, so that the ranks' losses add up to the loss; its gradients then add up, too,
wherever a parameter stands, and one collective is all there is: a sum over the group, which is its own adjoint. One
goes forward and one back a layer, besides a number a token where a norm goes over the channels of all heads, and three
for the loss, which goes over all words.

How a parameter is cut follows from the layer itself: built with fewer heads, it has fewer rows (of projections, decays,
convolutions, ...) or fewer columns (of the output), and what it has whole all heads share. `PLAN` says the rest: which
parameters hold several projections one behind the other, and so are cut in each.

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
from reference.mixers import delta, gated, linear_attention, mamba2, mamba3, mesa, polynomial, printed, slots, softmax
from reference.mixers import titans as surprise
from reference.mixers.parts import Mixer, wide
from reference.moe import Dense, MoE
from reference.ops import Ops

# ------------------------------------------------------------------------------------------------ what is cut, and how

Blocks = list[tuple[int, bool]]  # sizes along a dimension, one behind the other, and whether each is cut


class Plan(NamedTuple):
    """What a layer with fewer heads does not tell by its shapes."""

    packed: Mapping[str, Callable[[nn.Module], Blocks]] = {}  # parameters of several blocks, by name
    across: Callable[[nn.Module], bool] = lambda layer: False  # whether its norm goes over the channels of all heads
    common: tuple[str, ...] = ()  # parameters that all layers share, whose last dimension is cut


def each(sizes: list[int]) -> Blocks:
    return [(size, True) for size in sizes]


def of_state_space(layer: mamba2.Mamba2) -> Blocks:
    """x, B, C. One group's B and C serve all heads, and so come whole."""
    values, *shared = layer.parts
    return [(values, True), *((size, layer.groups > 1) for size in shared)]


def always(layer: nn.Module) -> bool:
    return True


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
    across=lambda m: m.groups == 1,
)
PLAN: dict[type[nn.Module], Plan] = {
    linear_attention.LinearAttention: Plan(),
    linear_attention.NormalizedLinearAttention: Plan(),
    linear_attention.Lightning: Plan(across=always),
    linear_attention.Retention: Plan(),
    gated.GLA: Plan(),
    gated.HGRN2: Plan(across=always, common=("lower_bounds",)),
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
    slots.GSA: Plan(across=always),
    printed.Printed: Plan(),
    printed.OneDecay: Plan(),
    softmax.Softmax: Plan(),
    softmax.Latent: Plan(),
    Dense: Plan({"w13": lambda m: each(m.kind.rows * [m.w2.shape[1]])}),
}


class Cut(NamedTuple):
    """A parameter's part on one of W ranks: along `dim` (None: all of it), of every block that is cut its own W-th."""

    dim: int | None
    blocks: Blocks


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


def part(weight: Tensor, cut: Cut, rank: int, ranks: int) -> Tensor:
    """This rank's part of a parameter, that it holds alone or cuts out here; differentiable."""
    if isinstance(weight, DTensor):
        return weight.to_local()
    if cut.dim is None:
        return weight
    pieces = weight.split([size for size, _ in cut.blocks], cut.dim)
    own = [x.chunk(ranks, cut.dim)[rank] if apart else x for x, (_, apart) in zip(pieces, cut.blocks, strict=True)]
    return own[0] if len(own) == 1 else torch.cat(own, cut.dim)


# ------------------------------------------------------------------------------------------------------- the layers


def place(model: nn.Module, grid: DeviceMesh | None, sparing: bool = False) -> None:
    """Every mixer, dense layer and expert of a language model computes its part from now on; in place, before sharding.

    `grid` ends in the dimensions `tensor_shards` (ranks that hold the same part) and `tensor` (the group). Names of
    parameters stay. If `sparing`, each rank keeps a part of the tokens between layers (`spare`). Raises ValueError, one
    line, for layers that cannot be cut so.
    """
    if grid is None:
        return
    group, layer, end = grid.get_group("tensor"), 0, own_sum if sparing else total
    count = sum(letter in "LN" for letter in model.config.letters)
    for block in model.blocks:
        for sublayer in block.sublayers:
            inner = [sublayer.inner, *sublayer.beside]
            for module in inner:
                if isinstance(module, MoE):
                    place_experts(module, grid)
                else:
                    place_layer(module, model.config, layer, count, model.ops, grid, end)
            layer += any(not isinstance(module, MoE | Dense) for module in inner)
    if sparing:
        spare(model, group)


def place_layer(module: nn.Module, config, layer: int, count: int, ops: Ops, grid: DeviceMesh, end: Callable) -> None:
    """A layer's forward becomes the sum over ranks of the same layer with fewer heads, or hidden channels."""
    group = grid.get_group("tensor")
    ranks, rank = comm.size(group), comm.rank(group)
    plan = PLAN.get(type(module))
    if plan is None:
        raise ValueError(
            f"{title(module)} is not cut by heads (--mesh.tensor {ranks}): its channels meet inside the layer; use "
            "--mesh.tensor 1"
        )
    with torch.device("meta"):
        smaller = fewer(module, config, layer, count, ops, ranks)
    if isinstance(module, Mixer):
        smaller.first, smaller.all_heads = rank * smaller.heads, module.heads
    if plan.across(module):
        smaller.ops = ops._replace(norm=partial(norm_across, group))
    cuts = {}
    for name, weight in list(module.named_parameters()):
        packed = plan.packed[name](module) if name in plan.packed else None
        of = f"{name} of {title(module)}"
        cuts[name] = cut_of(weight, smaller.get_parameter(name), ranks, packed, of)
    for name, cut in cuts.items():
        hold(module, name, cut, grid)
    module.forward = partial(summed_forward, module, smaller, cuts, plan.common, end, group)


def place_experts(layer: MoE, grid: DeviceMesh) -> None:
    """The weights of experts; what they compute is `over`'s. The shared expert is a layer like any other."""
    ranks, c = grid["tensor"].size(), layer.config
    if c.dropout:
        raise ValueError(
            f"dropout inside experts ({c.dropout}) is drawn for all hidden channels at once, and they are cut over "
            f"{ranks} ranks; use --model.expert-dropout 0 or --mesh.tensor 1"
        )
    divided(c.hidden, "hidden channels of an expert", ranks)
    rows = layer.kind.rows
    for name in layer.own():
        cut = {"w13": Cut(1, each(rows * [c.hidden])), "w2": Cut(2, each([c.hidden]))}.get(name)
        if cut is not None:
            hold(layer, name, cut, grid)
    if layer.shared is not None:
        place_layer(layer.shared, None, 0, 0, layer.ops, grid, total)


def hold(module: nn.Module, name: str, cut: Cut, grid: DeviceMesh) -> None:
    """Keep this rank's part alone of a matrix that is cut in one piece, and whose other side its holders can share."""
    weight, over = module.get_parameter(name), grid["tensor_shards"].size()
    sides = [size for i, size in enumerate(weight.shape) if i != cut.dim]
    if cut.dim is None or len(cut.blocks) > 1 or not any(size % over == 0 for size in sides):
        return
    own = part(weight.detach(), cut, grid.get_local_rank("tensor"), grid["tensor"].size()).contiguous()
    shared = DTensor.from_local(own, grid["tensor"], [Shard(cut.dim)], run_check=False)
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner).register_parameter(last, nn.Parameter(shared))


def placement(weight: DTensor, over: int) -> Shard:
    """Along which dimension a part is sharded over its holders: the first that they divide, but for its own."""
    (own,) = weight.placements
    return Shard(next(i for i, size in enumerate(weight.shape) if i != own.dim and size % over == 0))


def title(module: nn.Module) -> str:
    return module.row.title if isinstance(module, Mixer) else f"{type(module).__name__} (in reference.mixers.softmax)"


def divided(whole: int, what: str, ranks: int) -> int:
    """Each rank's share. ValueError, one line, if there is none."""
    if whole % ranks:
        fits = ", ".join(str(n) for n in range(1, whole + 1) if whole % n == 0)
        raise ValueError(f"{whole} {what} cannot be shared over {ranks} ranks; let --mesh.tensor be one of {fits}")
    return whole // ranks


def fewer(module: nn.Module, config, layer: int, count: int, ops: Ops, ranks: int) -> nn.Module:
    """The same layer with a W-th of the heads, each as large as before."""
    if isinstance(module, Dense):
        rows, hidden = module.kind.rows, divided(module.w2.shape[1], "hidden channels", ranks)
        smaller = Dense(module.w13.shape[1], hidden)
        smaller.kind, smaller.w13 = module.kind, nn.Parameter(torch.empty(rows * hidden, module.w13.shape[1]))
        return smaller
    if not isinstance(module, Mixer):
        heads = softmax.heads_of(config)
        own = {"attention_heads": divided(heads, "attention heads", ranks), "head_size": softmax.size_of(config)}
        if isinstance(module, softmax.Softmax) and (config.key_heads or heads) > 1:
            own["key_heads"] = divided(config.key_heads or heads, "key heads", ranks)
        if isinstance(module, softmax.Latent):
            own |= {"latent_rank": module.rank}
        return type(module)(replace(config, **own), ops)
    own = {"heads": divided(module.heads, f"heads of {title(module)}", ranks)}
    own |= {"key_size": module.key_size, "value_size": module.value_size}
    if config.value_heads is not None:
        own["value_heads"] = divided(config.value_heads, f"value heads of {title(module)}", ranks)
    if isinstance(module, mamba2.Mamba2) and config.state_groups > 1:
        own["state_groups"] = divided(config.state_groups, f"state_groups of {title(module)}", ranks)
    return mixers.build(replace(config, **own), layer, count, ops)


def summed_forward(
    module, smaller, cuts: dict[str, Cut], common: tuple[str, ...], end: Callable, group: Group, x, side=None, *state
):
    """The sum over ranks of what each rank's heads give; the state, if there is one, is that of its own heads."""
    rank, ranks = comm.rank(group), comm.size(group)
    own = {name: part(weight, cuts[name], rank, ranks) for name, weight in module.named_parameters()}
    if common:
        mine = {name: side.common[name].chunk(ranks, -1)[rank] for name in common}
        side = side._replace(common={**side.common, **mine})
    x = x if side is None else x[:, : side.positions.shape[1]]
    y = functional_call(smaller, own, (x, side, *state))
    return end(y, group) if isinstance(y, Tensor) else (end(y[0], group), *y[1:])


def over(ops: Ops, group: Group) -> Ops:
    """The same ops for a model whose layers are placed: of every expert each rank computes its hidden channels.

    Routing is the same on all ranks. The second bias is added by the first rank alone.
    """
    if comm.size(group) == 1:
        return ops

    def experts(x, routing, w13, w2, b13=None, b2=None, **how):
        rank, ranks, f = comm.rank(group), comm.size(group), w2.shape[2]
        inner = Cut(1, each(w13.shape[1] // f * [f]))
        w13, w2 = part(w13, inner, rank, ranks), part(w2, Cut(2, each([f])), rank, ranks)
        b13 = None if b13 is None else part(b13, inner, rank, ranks)
        b2 = None if b2 is None else b2 * (rank == 0)
        return total(ops.experts(x, routing, w13, w2, b13, b2, **how), group)

    name = f"{ops.name}, heads over {comm.size(group)} ranks"
    return ops._replace(name=name, experts=experts, token_losses=partial(token_losses, group))


def token_losses(
    group: Group, x: Float[Tensor, "n d"], head: Float[Tensor, "vocabulary d"], labels: Int[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """`reference.head.token_losses` with a part of the vocabulary on each rank, a word more on some than on others.

    Of each token travel the largest logit, so that no exponential overflows, and two numbers more: the sum of
    exponentials and the label's own logit, which one of the ranks has.
    """
    rank, ranks = comm.rank(group), comm.size(group)
    start, stop = (len(head) * r // ranks for r in (rank, rank + 1))
    logits = wide(F.linear(x, head[start:stop]))
    highest = torch.stack(comm.gather(logits.amax(-1), group)).amax(0)
    logits = logits - highest[:, None]
    mine = (start <= labels) & (labels < stop)
    own = logits.gather(1, torch.where(mine, labels - start, 0)[:, None])[:, 0]
    summed, own = total(torch.stack([logits.exp().sum(-1), own * mine]), group)
    return torch.where(labels == IGNORED, 0, summed.log() - own)


def norm_across(
    group: Group,
    x: Float[Tensor, "... hv"],
    weight: Float[Tensor, " hv"] | None,
    eps: float = 1e-5,
    gate: Float[Tensor, "... hv"] | None = None,
    activation: str | None = "silu",
) -> Float[Tensor, "... hv"]:
    """`reference.local.norm` over the channels of all ranks: of each token one sum of squares is exchanged."""
    y = wide(x)
    square = total(y.square().sum(-1, keepdim=True), group) / (x.shape[-1] * comm.size(group))
    y = y * torch.rsqrt(square + eps)
    y = y if weight is None else y * weight.to(y.dtype)
    return (y if gate is None else y * ACTIVATION[activation](gate.to(y.dtype))).to(x.dtype)


# ------------------------------------------------------------------------------------------- tokens between layers
# A sum of which each rank keeps its own tokens, and after the norm a gather, are as many bytes as the sum alone. Tokens
# that W does not divide are filled up with zeros, whose norm is zero.


def spare(model: nn.Module, group: Group) -> None:
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
            sublayer.ops = sublayer.ops._replace(norm=gathering(sublayer.ops.norm, group))
            for module in (sublayer.inner, *sublayer.beside):
                if isinstance(module, MoE):
                    module.forward = partial(of_all_tokens, module.forward, group)
    first, last = model.blocks[0], model.blocks[-1]
    first.forward = partial(from_here, first.forward, group)
    last.forward = partial(up_to_here, last.forward, group)


def gathering(norm: Callable, group: Group) -> Callable:
    return lambda *args: _gathered(norm(*args), group.group_name)


def of_all_tokens(forward: Callable, group: Group, x: Float[Tensor, "b t d"], side, *state):
    """A layer that has all tokens' outputs, of which this rank's go on."""
    y, *more = forward(x[:, : side.positions.shape[1]], side, *state)
    return own_tokens(y, group), *more


def from_here(forward: Callable, group: Group, x: Float[Tensor, "b t d"], side, *state):
    return forward(own_tokens(x, group), side, *state)


def up_to_here(forward: Callable, group: Group, x: Float[Tensor, "b s d"], side, *state):
    x, *more = forward(x, side, *state)
    return _gathered(x, group.group_name)[:, : side.positions.shape[1]], *more


def own_tokens(x: Float[Tensor, "b t d"], group: Group) -> Float[Tensor, "b s d"]:
    return filled(x, group).chunk(comm.size(group), 1)[comm.rank(group)]


def own_sum(y: Float[Tensor, "b t d"], group: Group) -> Float[Tensor, "b s d"]:
    return _scattered(filled(y, group), group.group_name)


def filled(x: Float[Tensor, "b t d"], group: Group) -> Float[Tensor, "b ws d"]:
    return F.pad(x, (0, 0, 0, -x.shape[1] % comm.size(group)))


# ---------------------------------------------------------------------------------------------------- known to torch


def total(x: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, the same on all of them; its gradient is the sum of theirs."""
    return _total(x, group.group_name)


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
