"""What a training run needs: parameters, operations, memory, bytes that travel, and time.

`parallel.plan` is the program that prints it.

Counted, not measured, are parameters, operations, what every collective receives, and memory by part. Time is a model:

    step = compute / efficiency + pipeline bubble + the optimizer's reading and writing + communication that shows
    a collective = latency x rounds + bytes received / bandwidth        shows = what nothing hides
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import nn

from parallel import lasp, pipeline, tensor, tracing
from parallel.tracing import CHUNK, Crossing, Kept
from reference.head import HELD
from reference.mixers.softmax import Attention, heads_of
from reference.model import LanguageModel
from reference.moe import Dense, Linears, MoE
from reference.objective import OBJECTIVE, objective
from reference.presets import Model

# ------------------------------------------------------------------------------------------------ what is asked


@dataclass(frozen=True)
class Degrees:
    """How GPUs are used: data x sequence x tensor x pipeline is their number; replicas and expert divide data x
    sequence x tensor, another way to see the same GPUs."""

    data: int = -1
    """groups with different samples (-1: as many as there are GPUs for)"""
    sequence: int = 1
    """GPUs that share the tokens of each sample"""
    expert: int = 1
    """GPUs that share the experts of each layer"""
    tensor: int = 1
    """GPUs that share the heads of every mixer and the hidden channels (beside expert: the tokens) of every expert"""
    pipeline: int = 1
    """stages, each with a share of the blocks"""
    replicas: int = 1
    """groups that hold all parameters, each sharded over its group"""
    reshard: bool = True
    """whether what is gathered of parameters goes after the forward pass and is gathered again for the backward pass"""
    attention: Literal["gather", "ring", "ulysses"] = "gather"
    """how softmax layers see other GPUs' tokens"""
    states: Literal["gather", "ring"] = "gather"
    """how memories cross GPUs"""
    dispatch: Literal["pair", "rank"] = "pair"
    """what travels to experts: a row for each of them, or for each GPU that holds some"""
    between: Literal["repeated", "cut"] = "repeated"
    """what GPUs that share heads have between layers: all tokens, or their part of them"""

    @property
    def shards(self) -> int:
        """GPUs that parameters are cut over."""
        return self.data * self.sequence * self.tensor // self.replicas

    @property
    def alike(self) -> int:
        """Of them, those that hold the same parts of matrices."""
        return self.shards // self.tensor

    @property
    def same_experts(self) -> int:
        return self.shards // self.expert

    @property
    def again(self) -> bool:
        """Whether what was gathered for the forward pass is gathered again for the backward pass. In a pipeline it
        stays from a step's first micro-batch to its last."""
        return self.reshard and self.pipeline == 1

    def __str__(self) -> str:
        used = [f"{n} {name}" for name, n in asdict(self).items() if n not in (1, *WORDS) and name != "reshard"]
        return (" x ".join(used) or "1 GPU") + ", parameters stay" * (not self.reshard)


WORDS = ("gather", "ring", "ulysses", "pair", "rank", "repeated", "cut")
SIZES = ("data", "sequence", "expert", "tensor", "pipeline", "replicas")


@dataclass(frozen=True)
class Run:
    """What a step works on. Defaults of the command line: those of the trainer's preset."""

    length: int = 2048
    """tokens of one sample"""
    batch: int = 64
    """samples a step, over all GPUs"""
    micro: int | None = None
    """samples a group takes at once (all)"""
    recompute: bool = True
    """keep only what enters a block, and run it again in the backward pass"""
    precision: Literal["bf16", "float32"] = "bf16"
    """of matrix products; parameters are float32"""
    objective: Literal[tuple(OBJECTIVE)] = "next"
    """what the model says; masked tokens see both sides, so recurrences run twice and softmax layers see all pairs"""

    @property
    def causal(self) -> bool:
        return objective(self.objective).causal


@dataclass(frozen=True)
class Assumptions:
    """Of the machine and of what overlaps. Only the efficiency and the workspace are measured here."""

    peak: float = 790.0
    """matrix products in bf16, TFLOP/s a GPU"""
    efficiency: float = 0.44  # of A0.3B-2B, 32,768 tokens recomputed on one H200: 0.34 to 0.39 s (bench/results)
    """share of the peak that a step reaches"""
    memory: float = 149.0
    """GB a GPU"""
    workspace: float = 0.08
    """GB that the libraries of products keep"""
    memory_bandwidth: float = 4.3
    """TB/s a GPU"""
    host: int = 8
    """GPUs of a host"""
    inside: float = 250.0
    """GB/s that a GPU receives from others of its host"""
    between: float = 50.0
    """GB/s that a GPU receives from other hosts"""
    latency_inside: float = 20.0
    """us, of a round inside a host"""
    latency_between: float = 30.0
    """us, of a round between hosts"""
    overlap_weights: float = 0.8
    """share of their time that computing hides, if it lasts that long: parameters, gradients"""
    overlap_states: float = 0.0
    """the same: memories and halos"""
    overlap_tokens: float = 0.0
    """the same: keys, values, activations, tokens for experts"""
    core_backward: float = 2.5
    """backward over forward operations of recurrences and attention (matrices: 2)"""
    optimizer_traffic: float = 42.0
    """bytes a parameter read and written outside the products (Adam 30, gradients 12)"""
    gathered: Literal["float32", "bf16"] = "float32"
    """in which parameters travel, but for experts beside products in bf16 (the trainer: float32)"""
    windows: bool = True
    """whether GPUs of a host read each other's memory: what is sharded over them alone goes through windows"""
    kernels: Literal["fused", "reference"] = "fused"
    """whether norms, convolutions, attention and losses keep their inputs alone"""


class Asked(NamedTuple):
    """All of it."""

    model: Model
    gpus: int
    mesh: Degrees
    run: Run
    given: Assumptions


# ------------------------------------------------------------------------------------------------ the model, counted


class Part(NamedTuple):
    """Parameters: all, those that a token uses, those that it multiplies with."""

    total: int = 0
    active: int = 0
    products: int = 0

    def plus(self, total: int, active: int, products: int) -> "Part":
        return Part(self.total + total, self.active + active, self.products + products)


class Counted(NamedTuple):
    """What a model is. Of the mesh it knows how many GPUs share heads, whether they share experts out, and what they
    have between layers."""

    parts: dict[str, Part]
    routed: int  # parameters of experts
    blocks: int
    kept: list[Kept]  # of each block, on a GPU
    expert_layers: int
    tensor: int = 1

    def sum(self, what: str) -> int:
        return sum(getattr(part, what) for part in self.parts.values())


def counted(model: Model, run: Run, given: Assumptions, mesh: Degrees) -> Counted:
    """Of the model on torch's meta device, and of two traced runs."""
    built = on_meta(model)
    how = (run.precision == "bf16", given.kernels == "fused", mesh.tensor, mesh.between == "cut", mesh.expert > 1)
    return Counted(
        parts_of(built),
        sum(p.numel() for p in routed(built)),
        len(built.blocks),
        tracing.trace(model, *how, run.causal),
        sum(isinstance(m, MoE) for m in built.modules()),
        mesh.tensor,
    )


def on_meta(model: Model) -> LanguageModel:
    from reference.ops import ops

    with torch.device("meta"):
        return LanguageModel(model, ops)


def routed(module: nn.Module) -> list[nn.Parameter]:
    """The experts' parameters."""
    return [p for m in module.modules() if isinstance(m, MoE) for p in m.own().values()]


def parts_of(model: LanguageModel) -> dict[str, Part]:
    """By name; what a layer has that is no part of its own counts with the layer. Empty parts are left out."""
    parts = dict.fromkeys(PARTS, Part())

    def add(name: str, parameters, idle: int = 0) -> None:
        parameters = list(parameters)
        total = sum(p.numel() for p in parameters)
        products = sum(p.numel() for p in parameters if p.ndim >= 2)
        parts[name] = parts[name].plus(total, total - idle, products - idle)

    layers = [inner for block in model.blocks for s in block.sublayers for inner in (s.inner, *s.beside)]
    for layer in layers:
        if isinstance(layer, MoE):
            own = routed(layer)
            shared = [] if layer.shared is None else list(layer.shared.parameters())
            mine = {id(p) for p in (*own, *shared)}
            add("experts", own, layer.idle())
            add("shared experts", shared)
            add("routers", (p for p in layer.parameters() if id(p) not in mine))
        else:
            add(called(layer), layer.parameters(), sum(m.idle() for m in layer.modules() if isinstance(m, Linears)))
    add("linear mixers", model.common.values())
    add("norms", (s.norm for block in model.blocks for s in block.sublayers))
    add("norms", [model.norm])
    n = model.embedding.numel()
    parts["embedding"] = Part(n, n, 0)
    parts["head"] = Part(0, 0, n) if model.config.tied else Part(n, n, n)
    return {name: part for name, part in parts.items() if any(part)}


PARTS = (
    "embedding",
    "linear mixers",
    "softmax mixers",
    "experts",
    "shared experts",
    "routers",
    "dense layers",
    "norms",
    "head",
)


def called(layer: nn.Module) -> str:
    """The part that a layer without a router is."""
    if isinstance(layer, Dense):
        return "dense layers"
    return "softmax mixers" if isinstance(layer, Attention) else "linear mixers"


# ------------------------------------------------------------------------------------------------------- operations


def core(crossing: Crossing, length: int) -> float:
    """Forward operations a token, in products of matrices, of a recurrence in chunks or of attention.

    Chunks of c tokens: scores and what they read 2c(K + V), the memory read and written 4KV a head. A row that mixes
    keys solves for what it writes: 4cK + 2cV + 2KV more. Attention: 2(k + v) a pair of tokens that see each other.
    """
    if crossing.kind == "attention":
        seen = min(crossing.window or length, length)
        pairs = crossing.sides * (seen - seen**2 / (2 * length))  # in the mean over the sample's tokens
        heads = crossing.heads[0]
        return 2 * pairs * (crossing.q + heads * (crossing.v // crossing.heads[1]))
    if crossing.kind != "recurrence":
        return 0.0
    h, k, v = crossing.memory
    mixes = 4 * CHUNK * k + 2 * CHUNK * v + 2 * k * v if crossing.transition == "matrix" else 0
    return h * (2 * CHUNK * (k + v) + 4 * k * v + mixes)


def operations(counted: Counted, run: Run, given: Assumptions) -> dict[str, dict[str, float]]:
    """Of one token by part, once: forward, training (forward and backward), and what recomputing adds."""
    found = {}
    for name, part in counted.parts.items():
        if part.products:
            found[name] = {"forward": 2.0 * part.products, "training": 6.0 * part.products}
    for name, kind in (("linear core", "recurrence"), ("softmax core", "attention")):
        each = sum(core(c, run.length) for block in counted.kept for c in block.crossings if c.kind == kind)
        forward = each * counted.tensor  # traced are the heads of one GPU
        if forward:
            found[name] = {"forward": forward, "training": forward * (1 + given.core_backward)}
    for name, numbers in found.items():
        numbers["recomputed"] = numbers["forward"] if run.recompute and name != "head" else 0.0
    return found


# ------------------------------------------------------------------------------------------------------ what is cut


class Shape(NamedTuple):
    """A GPU's part of a step."""

    tokens: int  # of a micro-batch
    times: int  # micro-batches
    blocks: int


def check(asked: Asked) -> Asked:
    """The same with `data` known. ValueError, one line, for what cannot work."""
    mesh, gpus, model = asked.mesh, asked.gpus, asked.model
    low = {name: getattr(mesh, name) for name in SIZES if getattr(mesh, name) < 1}
    if set(low) - {"data"} or low.get("data", -1) != -1:
        raise ValueError(f"mesh degrees must be at least 1 (data: or -1), got {said(low)}")
    others = mesh.sequence * mesh.tensor * mesh.pipeline
    data = gpus // others if mesh.data == -1 else mesh.data
    if data * others != gpus:
        names = {name: getattr(mesh, name) for name in ("sequence", "tensor", "pipeline")}
        asked_for = said({"data": mesh.data} | names if mesh.data != -1 else names)
        raise ValueError(f"{asked_for} do not multiply out to {gpus} GPUs: each must divide them, and data fills up")
    mesh = replace(mesh, data=data)
    ranks = data * mesh.sequence
    if ranks % mesh.replicas:
        raise ValueError(f"{mesh.replicas} replicas do not divide {ranks} ranks of data x sequence")
    if mesh.shards % mesh.expert:
        raise ValueError(f"expert {mesh.expert} does not divide the {mesh.shards} ranks of a replica")
    if mesh.expert > 1 and "E" not in model.letters:
        raise ValueError(f"expert is {mesh.expert}, and the model has no expert layer: use --mesh.expert 1")
    if mesh.expert > 1 and model.experts % mesh.expert:
        raise ValueError(f"{model.experts} experts cannot be shared over expert {mesh.expert}: it must divide them")
    asked = asked._replace(mesh=mesh)
    check_samples(asked)
    check_heads(asked)
    return asked


def said(names: dict[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in names.items())


def check_samples(asked: Asked) -> None:
    run, mesh = asked.run, asked.mesh
    if run.batch % mesh.data:
        raise ValueError(f"a batch of {run.batch} samples does not divide over data {mesh.data}: use a multiple")
    share = run.batch // mesh.data
    if share % min(run.micro or share, share):
        raise ValueError(f"micro {run.micro} must divide the {share} samples that each group has of batch {run.batch}")
    if run.length < mesh.sequence:
        raise ValueError(f"{run.length} tokens of a sample do not give each of sequence {mesh.sequence} one")


def check_heads(asked: Asked) -> None:
    model, mesh, heads = asked.model, asked.mesh, heads_of(asked.model)
    shares = mesh.sequence * mesh.tensor
    if "N" in model.letters and mesh.attention == "ulysses" and mesh.sequence > 1 and heads % shares:
        raise ValueError(f"{heads} heads of attention do not divide over sequence x tensor {shares} (ulysses)")


def check_layers(asked: Asked, counted: Counted) -> None:
    """ValueError, one line, for what the model's layers do not allow."""
    if counted.blocks % asked.mesh.pipeline:
        raise ValueError(f"{counted.blocks} blocks do not divide over pipeline {asked.mesh.pipeline}")
    if asked.mesh.sequence > 1 and not asked.run.causal:
        lasp.check_both_ways("N" in asked.model.letters, asked.mesh.attention, asked.mesh.states)
    rows = [c for block in counted.kept for c in block.crossings if c.kind == "recurrence"]
    if asked.mesh.sequence > 1 and asked.mesh.states == "gather" and any(c.transition is None for c in rows):
        raise ValueError(f"the memory of {asked.model.lsm!r} is not affine and cannot be gathered: --mesh.states ring")


def shape_of(asked: Asked, counted: Counted) -> Shape:
    """Packed: a micro-batch is one row of tokens, of which a rank holds the longest segment."""
    run, mesh = asked.run, asked.mesh
    share = run.batch // mesh.data
    rows = min(run.micro or share, share)
    return Shape(math.ceil(rows * run.length / mesh.sequence), share // rows, counted.blocks // mesh.pipeline)


# ----------------------------------------------------------------------------------------------------- who holds what


class Placed(NamedTuple):
    """Parameters of a block, or of more, as one GPU sees them."""

    whole: float = 0.0  # that come whole to it, and are cut over all GPUs of a replica
    own: float = 0.0  # its part of those that are cut by heads, which is cut over the GPUs that hold the same
    dealt: float = 0.0  # its experts, where they are shared out, the same
    used: float = 0.0  # that it computes with
    copied: float = 0.0  # of them, those that it puts together from parts of whole ones
    again: float = 0.0  # in products that all GPUs which share heads do alike, but its share
    apart: float = 0.0  # layers with some that are cut by heads, which travel by themselves
    apart_experts: float = 0.0  # layers whose experts do
    narrow: float = 0.0  # of those that are here, the ones that travel and compute in 16 bits

    def plus(self, other: "Placed") -> "Placed":
        return Placed(*map(sum, zip(self, other, strict=True)))

    def times(self, share: float) -> "Placed":
        return Placed(*(x * share for x in self))

    @property
    def here(self) -> float:
        """Those that are there while it computes."""
        return self.whole + self.own + self.dealt

    def over(self, mesh: Degrees) -> "Placed":
        """The parts of these that one GPU of a replica keeps."""
        alike, same = mesh.alike, mesh.same_experts
        own = {"whole": self.whole / mesh.shards, "own": self.own / alike, "dealt": self.dealt / same}
        return self._replace(**own, narrow=self.narrow / same)

    def gathered(self, given: Assumptions) -> float:
        """Bytes of those that are there."""
        return (self.here - self.narrow) * wire(given) + self.narrow * 2

    def sent(self, narrow: bool) -> float:
        """Bytes of their gradients as they travel: in float32, or those of narrow ones as they are."""
        return 4 * self.here - 2 * self.narrow * narrow

    def windows(self, given: Assumptions, narrow: bool) -> float:
        """Bytes of the windows through which all of them go."""
        return self.gathered(given) + self.sent(narrow)

    def received_bytes(self, mesh: Degrees, given: Assumptions) -> float:
        return self.gathered(given) - self.over(mesh).gathered(given)

    def layers_apart(self, mesh: Degrees) -> int:
        """Layers that travel by themselves, to GPUs that hold the same."""
        return round(self.apart * (mesh.alike > 1) + self.apart_experts * (mesh.same_experts > 1))


class Places(NamedTuple):
    blocks: tuple[Placed, ...]
    root: Placed  # what is outside the blocks

    @property
    def inside(self) -> Placed:
        return functools.reduce(Placed.plus, self.blocks)


def places(asked: Asked) -> Places:
    """As `parallel.shard` has them: experts are narrow beside products in bf16, but not in stages or cut by heads."""
    mesh, bf16 = asked.mesh, asked.run.precision == "bf16"
    narrow = bf16 and mesh.shards > 1 and mesh.pipeline == 1 and (mesh.tensor == 1 or mesh.expert > 1)
    return placed(asked.model, mesh.expert, mesh.tensor, mesh.alike if mesh.tensor > 1 else 1, narrow)


@functools.cache
def placed(model: Model, expert: int, ranks: int, alike: int, narrow: bool) -> Places:
    """With experts shared out, or heads shared by so many ranks, of which `alike` hold the same part."""
    built = on_meta(model)
    layers = [m for m in built.modules() if isinstance(m, MoE)] if expert > 1 or narrow else []
    experts = {id(p) for layer in layers for p in routed(layer)}
    found = tensor.share(built, tracing.imagined(ranks, []), shared_out=expert > 1) if ranks > 1 else []
    heads = {id(shared.weight): shared for shared in found}
    apart = {shared.module for shared in found if shared.alone(alike)}

    def of(p: nn.Parameter) -> Placed:
        n = p.numel()
        if id(p) in experts:
            return Placed(dealt=n / expert, used=n / expert, narrow=n / expert * narrow)
        if id(p) not in heads:
            return Placed(n, used=n, again=(n - n / ranks) * (p.ndim >= 2))
        cut = heads[id(p)].cut
        mine = n * cut.share(ranks)
        if heads[id(p)].alone(alike):
            return Placed(own=mine, used=mine)
        copied = mine * (len(cut.blocks) > 1)
        return Placed(n, used=mine, copied=copied, again=(mine - n / ranks) * (p.ndim >= 2))

    def of_all(block: nn.Module) -> Placed:
        inside = set(block.modules())
        several = Placed(apart=len(inside & apart), apart_experts=len(inside & set(layers)))
        return functools.reduce(Placed.plus, map(of, block.parameters()), several)

    blocks = tuple(map(of_all, built.blocks))
    rest = sum(p.numel() for name, p in built.named_parameters() if not name.startswith("blocks."))
    return Places(blocks, Placed(rest, used=rest / ranks))


# ------------------------------------------------------------------------------------------------------------ memory


def memory(asked: Asked, counted: Counted) -> dict[str, float]:
    """Bytes a GPU by part, at the worst of the `moments`."""
    return max(moments(asked, counted).values(), key=lambda parts: sum(parts.values()))


def moments(asked: Asked, counted: Counted) -> dict[str, dict[str, float]]:
    """Bytes a GPU by part, of the fullest stage with everything in flight: while logits are there, in the backward pass
    of the largest block, and while the optimizer moves the parameters."""
    mesh, run, given = asked.mesh, asked.run, asked.given
    shape, where = shape_of(asked, counted), places(asked)
    stage = shape.blocks / counted.blocks
    block, root = max(where.blocks, key=lambda placed: placed.here), where.root
    everything = where.inside.times(stage).plus(root)
    held = everything.over(mesh).here
    cut, several, bf16 = mesh.shards > 1, shape.times > 1, run.precision == "bf16"
    gradients = 4 * (everything.here if cut and several else held)
    # cut out in the dtype in which parameters travel; of what is then cast, the copy is kept
    copied = (block if run.recompute or (bf16 and wire(given) == 4) else everything).copied
    narrow = sent_narrow(asked, shape)
    windows = 2 * block.windows(given, narrow) + root.windows(given, narrow)  # blocks take turns with two
    lasting = {"parameters": 4 * held, "optimizer state": 8 * held, "workspace": given.workspace * 1e9}
    lasting |= {"windows": windows * by_windows(asked)}
    rest = {"gathered: the rest": (root.gathered(given) + 4 * root.here * (not several)) * cut}
    blocks = where.inside.times(stage)
    stays = blocks.gathered(given) * cut * (not mesh.again)  # of one micro-batch they go as gradients come
    beside = stays if several else max(stays - gradients, 0.0)
    sums = 2 * 4 * block.here * (not several)  # gradients of the block at hand and of the one that is summed
    two = {"gathered: two blocks": (2 * block.gathered(given) * mesh.again + sums) * cut}

    def casts(placed: Placed) -> float:
        return 2 * (placed.used - placed.narrow) * (bf16 and given.gathered == "float32")

    return {
        "loss": lasting
        | rest
        | {
            "gathered: blocks, which stay": stays,
            "gradients": gradients if several else 4 * root.here * (not cut),
            "bf16 copies of parameters": casts(root if run.recompute else everything),
            "saved activations": saved(asked, counted, one=False),
        }
        | loss(asked, shape),
        "backward": lasting
        | rest
        | two
        | {
            "gathered: blocks, which stay": beside,
            "gradients": gradients,
            "cut out of what was gathered": copied * wire(given),
            "bf16 copies of parameters": casts(block if run.recompute else everything),
            "saved activations": saved(asked, counted),
            "memories that travel": travelling(asked, counted),
        },
        "optimizer": lasting | {"gradients": 4 * held},
    }


def saved(asked: Asked, counted: Counted, one: bool = True) -> float:
    """Bytes that are kept of a stage's blocks: when recomputing, what enters them, and, with `one`, all of one."""
    shape, model, inside = shape_of(asked, counted), asked.model, [kept.a_token for kept in counted.kept]
    part = 1 / asked.mesh.tensor if asked.mesh.between == "cut" else 1
    each = [model.width * kept.stream * part for kept in counted.kept] if asked.run.recompute else inside
    a_token = sum(each) * shape.blocks / counted.blocks + max(inside) * (one and asked.run.recompute)
    return a_token * shape.tokens * min(asked.mesh.pipeline, shape.times)


def loss(asked: Asked, shape: Shape) -> dict[str, float]:
    """Bytes of the logits that are there at once, and of what they add to gradients.

    By kernels a logit is one number of a product, in whose place its gradient comes; else there are log-probabilities
    and logits (or their gradient) in float32, and the gradient in bf16. Gradients of features and head are summed over
    the pieces in float32; the head's becomes the parameter's unless that has one.
    """
    bf16, fused = asked.run.precision == "bf16", asked.given.kernels == "fused"
    words, product = asked.model.vocabulary / asked.mesh.tensor, 2.0 if bf16 else 4.0
    added = product * min(shape.tokens, words) + 4 * shape.tokens + 4 * words * (shape.times > 1)
    return {
        "logits": (product if fused else 8.0 + 2.0 * bf16) * min(shape.tokens * words, HELD),
        "gradients by pieces of them": asked.model.width * added,
    }


def travelling(asked: Asked, counted: Counted) -> float:
    """What came of all ranks' spans and is kept for the backward pass: of all layers; of one when recomputing, but for
    what is found once, by every micro-batch that is under way."""
    mesh, times = asked.mesh, shape_of(asked, counted).times
    if mesh.sequence == 1 or mesh.states == "ring":
        return 0.0
    once, again = (
        [mesh.sequence * sum(c.A + c.S for c in k.crossings if c.once == kind) for k in counted.kept]
        for kind in (True, False)
    )
    if not asked.run.recompute:
        return float(sum(once + again) / mesh.pipeline)
    return max(again) + sum(once) * min(mesh.pipeline, times) / mesh.pipeline


# ----------------------------------------------------------------------------------------------------- communication


class Traffic(NamedTuple):
    """What one kind of collective does in a step."""

    axis: str
    what: str
    calls: int
    bytes: float  # received by a GPU
    ranks: int
    stride: int = 1  # between neighbours of the group
    rounds: int | None = None  # of one call (None: as many as doublings reach all ranks)
    hidden: str = "tokens"  # the overlap that it has

    def seconds(self, given: Assumptions) -> float:
        far = self.ranks * self.stride > given.host
        rate, latency = (given.between, given.latency_between) if far else (given.inside, given.latency_inside)
        rounds = self.rounds or math.ceil(math.log2(self.ranks))
        return self.calls * rounds * latency * 1e-6 + self.bytes / (rate * 1e9)


def traffic(asked: Asked, counted: Counted) -> list[Traffic]:
    """All of a step, the largest first. Left out: sums of a few numbers (losses, loads, the norm of the gradient)."""
    makers = (sharding, replicating, sequencing, dispatching, splitting, staging)
    found = [t for make in makers for t in make(asked, counted, shape_of(asked, counted)) if t.calls]
    return sorted(found, key=lambda t: -t.bytes)


def sharding(asked: Asked, counted: Counted, shape: Shape) -> Iterator[Traffic]:
    """FSDP: a block is gathered before its forward pass and, unless it stays, before its backward pass, the rest of the
    model once, for each micro-batch (in a pipeline for all); the last one's backward pass sums gradients."""
    mesh = asked.mesh
    if mesh.shards == 1:
        return
    inside, root = places(asked).inside.times(shape.blocks / counted.blocks), places(asked).root

    calls, narrow = shape.blocks + inside.layers_apart(mesh), sent_narrow(asked, shape)
    sent = sum(placed.sent(narrow) - placed.over(mesh).sent(narrow) for placed in (inside, root))
    often, times = 1 + mesh.again, shape.times if mesh.pipeline == 1 else 1
    yield Traffic(
        "shards",
        "gather parameters",
        (often * calls + 1) * times,
        (often * inside.received_bytes(mesh, asked.given) + root.received_bytes(mesh, asked.given)) * times,
        mesh.shards,
        hidden="weights",
    )
    yield Traffic("shards", "reduce-scatter gradients", calls + 1, sent, mesh.shards, hidden="weights")


def by_windows(asked: Asked) -> bool:
    """Whether a replica's GPUs are those of one host, which read each other's memory (`parallel.window`)."""
    return asked.given.windows and 1 < asked.mesh.shards <= asked.given.host


def sent_narrow(asked: Asked, shape: Shape) -> bool:
    """Whether gradients in 16 bits travel as they are: not where those of several backward passes have been added."""
    return by_windows(asked) and shape.times == 1


def received(numbers: float, ranks: int) -> float:
    """By one rank that has its part of these numbers and gets the others'."""
    return numbers * (ranks - 1) / ranks


def replicating(asked: Asked, counted: Counted, shape: Shape) -> Iterator[Traffic]:
    """A ring all-reduce of each GPU's own gradients."""
    mesh = asked.mesh
    if mesh.replicas > 1:
        held = memory(asked, counted)["parameters"]
        where = {"ranks": mesh.replicas, "stride": mesh.shards, "hidden": "weights"}
        inside = places(asked).inside.times(shape.blocks / counted.blocks)
        calls = shape.blocks + round(inside.apart + inside.apart_experts) + 1
        yield Traffic("replicas", "all-reduce gradients", calls, 2 * received(held, mesh.replicas), **where)


def sequencing(asked: Asked, counted: Counted, shape: Shape) -> Iterator[Traffic]:
    """Spans, halos and softmax layers; when recomputing the forward ones again, but for those found once."""
    mesh = asked.mesh
    if mesh.sequence == 1:
        return
    crossings = [c for kept in counted.kept for c in kept.crossings]
    ways = [(crossed(c, mesh, shape.tokens), 1 + (asked.run.recompute and not c.once)) for c in crossings]
    for name in dict.fromkeys(way.name for way, _ in ways):
        mine = [(way, passes) for way, passes in ways if way.name == name]
        calls = sum(passes * way.calls[0] + way.calls[1] for way, passes in mine) * shape.times // mesh.pipeline
        size = sum(passes * way.forward + way.backward for way, passes in mine) * shape.times / mesh.pipeline
        first = mine[0][0]
        yield Traffic("sequence", name, calls, size, mesh.sequence, mesh.tensor, first.rounds, first.hidden)


class Way(NamedTuple):
    """What one layer and micro-batch receives, and in how many calls forward and backward."""

    name: str
    calls: tuple[int, int]
    forward: float
    backward: float
    rounds: int | None = None
    hidden: str = "states"


def crossed(crossing: Crossing, mesh: Degrees, tokens: int) -> Way:
    others = mesh.sequence - 1
    if crossing.kind == "attention":
        return SOFTMAX[mesh.attention](crossing, mesh.sequence, tokens)
    if crossing.kind == "recurrence" and mesh.states == "ring":
        return Way("chain of memories", (1, 1), crossing.S, crossing.S, others)
    name = NAMES.get(crossing.kind, "gather halos of shifts")
    return Way(name, (1, 1), others * (crossing.A + crossing.S), others * crossing.S)


NAMES = {"recurrence": "gather spans", "short_convolution": "gather halos of convolutions"}
LAYOUT = 16  # bytes that say how long another rank's segment is


def by_gather(c: Crossing, ranks: int, tokens: int) -> Way:
    numbers = (ranks - 1) * tokens * (c.k + c.v)
    forward = numbers * c.item + (ranks - 1) * LAYOUT
    return Way("gather keys and values", (2, 1), forward, numbers * 4, hidden="tokens")


def by_ring(c: Crossing, ranks: int, tokens: int) -> Way:
    """Backward: again, with what they have received so far in float32, which then goes home. Of one document; windows
    and documents that end make it less."""
    numbers, others = tokens * (c.k + c.v), ranks - 1
    forward, backward = others * (numbers * c.item + LAYOUT), others * numbers * (c.item + 4) + numbers * 4
    return Way("ring of keys and values", (ranks, 2 * others + 1), forward, backward, 1, "tokens")


def by_ulysses(c: Crossing, ranks: int, tokens: int) -> Way:
    """Key heads are repeated until the ranks divide them. A byte a token says where documents begin."""
    repeated = math.lcm(c.heads[1], ranks) // c.heads[1]
    rows = received(tokens * (c.q + repeated * (c.k + c.v) + c.o) * c.item, ranks)
    marks = (ranks - 1) * (LAYOUT + tokens + 1)
    return Way("swap tokens for heads", (4, 2), rows + marks, rows, hidden="tokens")


SOFTMAX: dict[str, Callable] = {"gather": by_gather, "ring": by_ring, "ulysses": by_ulysses}


def dispatching(asked: Asked, counted: Counted, shape: Shape) -> Iterator[Traffic]:
    """Tokens to their experts and back, forward and backward; routing is taken to be even. Ranks that share heads send
    a part each."""
    model, mesh = asked.model, asked.mesh
    if mesh.expert == 1:
        return
    layers = counted.expert_layers / mesh.pipeline
    width = model.latent or model.width
    row = width * (2 if asked.run.precision == "bf16" else 4)
    n, k = mesh.expert, model.top_k
    gates = 2 * k * 4 if mesh.dispatch == "rank" else 0
    tokens = math.ceil(shape.tokens / mesh.tensor)
    rows = tokens * visited(model.experts, k, n)
    if mesh.dispatch == "pair":
        rows = tokens * k * (n - 1) / n
    numbers = 8 * (n - 1) * (model.experts // n + 1 if mesh.dispatch == "pair" else 4)
    passes = 1 + asked.run.recompute
    size = numbers + (passes + 1) * rows * (2 * row + gates)
    calls = round(layers * shape.times * (1 + (passes + 1) * (2 if not gates else 3)))
    yield Traffic("expert", "exchange tokens", calls, size * layers * shape.times, n)


def visited(experts: int, k: int, ranks: int) -> float:
    """Ranks besides its own that have one of a token's k experts, in the mean over even routing."""
    none = math.comb(experts - experts // ranks, k) / math.comb(experts, k)
    return (ranks - 1) * (1 - none)


def splitting(asked: Asked, counted: Counted, shape: Shape) -> Iterator[Traffic]:
    """Ranks that share heads: what was traced forward, backward and when recomputing; and the loss over words."""
    mesh = asked.mesh
    if mesh.tensor == 1:
        return
    calls, sizes = dict.fromkeys(EXCHANGES, 0), dict.fromkeys(EXCHANGES, 0.0)

    def note(kind: str, size: float, times: int) -> None:
        calls[kind] += times
        sizes[kind] += times * received(size, mesh.tensor) * (2 if kind == "total" else 1)

    for kept in counted.kept:
        for one in kept.sums:
            size = one.fixed + one.a_token * shape.tokens
            note(one.kind, size, 1 + (asked.run.recompute and one.again))
            note(EXCHANGES[one.kind].adjoint, size, 1)
    for kind, exchange in EXCHANGES.items():
        times = shape.times / mesh.pipeline
        yield Traffic("tensor", exchange.name, round(calls[kind] * times), sizes[kind] * times, mesh.tensor)
    a_token = received((mesh.tensor + 2 * 2 * 2) * 4.0, mesh.tensor)  # the largest logit; two sums, there and back
    yield Traffic("tensor", "loss over words", 3 * shape.times, a_token * shape.tokens * shape.times, mesh.tensor)


class Exchange(NamedTuple):
    name: str
    adjoint: str


EXCHANGES = {
    "total": Exchange("sum activations", "total"),
    "gathered": Exchange("gather tokens", "scattered"),
    "scattered": Exchange("sum own tokens", "gathered"),
}


def staging(asked: Asked, counted: Counted, shape: Shape) -> Iterator[Traffic]:
    """Pipeline parallelism: what enters a stage, and its gradient; gradients of parameters that several stages have."""
    mesh, model = asked.mesh, asked.model
    if mesh.pipeline == 1:
        return
    tokens = math.ceil(shape.tokens / mesh.tensor) if mesh.between == "cut" else shape.tokens
    values, common = of_several_stages(model, mesh.pipeline, mesh.tensor)
    size = (tokens * model.width + shape.tokens * values) * counted.kept[0].stream
    stride = mesh.tensor * mesh.sequence * mesh.data
    both = 2 * shape.times  # forward and backward
    yield Traffic("pipeline", "pass activations on", both, float(size * both), mesh.pipeline, stride, 1)
    numbers = sum(common) / mesh.shards * (mesh.pipeline - 1)
    yield Traffic("pipeline", "sum gradients of common bounds", len(common), numbers * 4, mesh.pipeline, stride, 1)
    numbers = model.vocabulary * model.width / mesh.shards
    ends = stride * (mesh.pipeline - 1)
    yield Traffic("pipeline", "sum the tied embedding's gradient", int(model.tied), numbers * 4, 2, ends, 1)


@functools.cache
def of_several_stages(model: Model, stages: int, ranks: int) -> tuple[int, list[int]]:
    """Channels of the values that go on beside x, on one of the ranks that share heads; sizes of what all layers have
    in common."""
    built = on_meta(model)
    values = pipeline.handed_on(built, pipeline.cut(len(built.blocks), stages), ranks)
    return max(values), [p.numel() for p in built.common.values()]


def item(run: Run) -> int:
    """Bytes of a number in a product of matrices."""
    return 2 if run.precision == "bf16" else 4


def wire(given: Assumptions) -> int:
    """Bytes of a parameter that travels."""
    return 2 if given.gathered == "bf16" else 4


# -------------------------------------------------------------------------------------------------------------- time


def times(asked: Asked, counted: Counted, moved: list[Traffic]) -> dict[str, float]:
    """Seconds of a step by term."""
    mesh, run, given = asked.mesh, asked.run, asked.given
    by_part = operations(counted, run, given)
    each = {name: n["training"] + n["recomputed"] for name, n in by_part.items()}
    rate = given.peak * 1e12 * given.efficiency
    mine = run.batch * run.length / asked.gpus
    found = {"compute": sum(each.values()) * mine / rate}
    if mesh.tensor > 1:
        again = 2 * (3 + run.recompute) * places(asked).inside.again * mesh.tensor
        found["repeated by all that share heads"] = again * mine / rate
    pieces = run.length / shape_of(asked, counted).tokens  # that a sample is cut into
    if pieces > 1 and mesh.attention != "ulysses" and "softmax core" in each:
        found["waiting for the last segment"] = each["softmax core"] * (1 - 1 / pieces) * mine / rate
    if mesh.pipeline > 1:
        found["pipeline bubble"] = found["compute"] * (mesh.pipeline - 1) / shape_of(asked, counted).times
    held = memory(asked, counted)["parameters"] / 4
    found["optimizer"] = held * given.optimizer_traffic / (given.memory_bandwidth * 1e12)
    left = found["compute"]
    for t in moved:
        took = t.seconds(given)
        hides = min(took * getattr(given, f"overlap_{t.hidden}"), left)
        left -= hides
        name = f"{t.axis}: {t.what}"
        found[name] = found.get(name, 0.0) + took - hides
    return found
