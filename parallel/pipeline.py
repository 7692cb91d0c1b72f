"""Blocks shared out over ranks: each rank holds some of the stack, and micro-batches flow through.

A stack of blocks is cut into stages, one or two of them on each rank. Between stages travels the residual stream x,
forward, and its gradient, backward, and beside x what a layer hands to later ones (RWKV7: values); in which order a
rank does what is the schedule's, which is torch's (`torch.distributed.pipelining`). All ranks of a pipeline make the
same batches, as data is a function of the step, so that nothing else that a block knows about its tokens travels.

Ranks with the same stages may share data, sequences, heads and experts as without a pipeline: each of them has its own
pipeline, with the ranks in the same place of the other stages. All of them follow the same schedule, so what they
exchange with each other inside a stage comes in the same order on all.

Every parameter keeps the name that it has in the whole model: it starts as there, and checkpoints fit any number of
stages. A parameter of several stages (a tied embedding, HGRN2's bounds) has a copy in each of them; the gradients of
all copies are summed before they are clipped, so that the copies stay equal. Losses of routers belong to the stage that
has the layer: they join its gradient where x leaves it.

    b batch (1, packed)   t time   d width   l expert layers   e experts   s stages
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from parallel import comm, shard
from parallel.mesh import Mesh
from reference.model import LanguageModel, Load, Output, alike, stacked
from reference.moe import MoE


class Schedule(NamedTuple):
    """An order of work that torch has."""

    kind: str  # torch's name: whoever has no pipeline does not wait for the import, which brings the compiler along
    stages: int = 1  # of each rank
    turns: bool = False  # at the last rank: the stages go back from there, and loss and embedding are on the first
    parts: bool = False  # of a backward pass by themselves: the gradient of what enters a stage, and those of weights


SCHEDULE = {
    "gpipe": Schedule("ScheduleGPipe"),  # 1811.06965
    "1f1b": Schedule("Schedule1F1B"),  # 2006.09503
    "interleaved": Schedule("ScheduleInterleaved1F1B", 2),  # 2104.04473
    "zero-bubble": Schedule("ScheduleInterleavedZeroBubble", 2, parts=True),  # 2401.10241
    "zero-bubble-v": Schedule("ScheduleZBVZeroBubble", 2, turns=True, parts=True),  # 2405.15362
}


def place(stage: int, ranks: int, schedule: Schedule) -> int:
    """The rank that has this stage: round after round, or there and back."""
    return 2 * ranks - 1 - stage if schedule.turns and stage >= ranks else stage % ranks


def cut(blocks: int, stages: int) -> list[range]:
    """Neighbouring blocks of each stage, as many as of any other; where that cannot be, the first have one more, as
    the last has the head."""
    few, more = divmod(blocks, stages)
    ends = [i * few + min(i, more) for i in range(stages + 1)]
    return [range(a, b) for a, b in itertools.pairwise(ends)]


def refuse(model: LanguageModel, mesh: Mesh, micro_batches: int) -> None:
    """ValueError, one line, for what cannot be cut into stages, and for too few micro-batches to fill them."""
    ranks, how = mesh.pipeline_size, SCHEDULE[mesh.schedule]
    blocks, stages = len(model.blocks), ranks * how.stages
    if how.parts and mesh.sequence_size > 1 and mesh.states == "ring":
        # The second part may come once more by where one rank gives a memory's cotangent and another takes it.
        raise ValueError(
            f"schedule {mesh.schedule!r} asks for gradients of weights by themselves, which a chain of memories has "
            "not; use --mesh.states gather, or another schedule"
        )
    if stages > blocks:
        raise ValueError(
            f"{ranks} pipeline ranks x {how.stages} of schedule {mesh.schedule!r} are {stages} stages, and the model "
            f"has {blocks} blocks (a mixer and what follows it): use fewer ranks, or a schedule of one stage a rank"
        )
    if micro_batches < ranks:
        raise ValueError(
            f"{ranks} pipeline ranks need as many micro-batches a step, found {micro_batches}: use a smaller --micro"
        )
    rounds = micro_batches // ranks
    if how.stages > 1 and micro_batches % rounds:
        raise ValueError(
            f"schedule {mesh.schedule!r} goes {rounds} rounds over {ranks} ranks, by which {micro_batches} "
            f"micro-batches cannot be divided: let them be a multiple of {ranks}"
        )


def of_several(model: LanguageModel, stage: int, stages: int) -> list[str]:
    """Parameters that a stage has as others have them: those of all layers, and a tied embedding."""
    tied = model.config.tied and stage in (0, stages - 1)
    return [*(f"common.{name}" for name in model.common), *["embedding"] * tied]


def handed_on(model: LanguageModel, parts: list[range], ranks: int) -> list[int]:
    """Channels of the values that enter each stage beside x, from the layer that gives its own to the last one that
    needs them. Each of the `ranks` that share heads has those of its heads."""
    layers = [(i, layer) for i, block in enumerate(model.blocks) for layer in block.modules()]
    given = [(i, layer.values // ranks) for i, layer in layers if getattr(layer, "gives_values", False)]
    last = max((i for i, layer in layers if getattr(layer, "needs_values", False)), default=0)
    return [sum(size for i, size in given if i < part[0] <= last) for part in parts]


class Stage(nn.Module):
    """Some neighbouring blocks; the first stage has the embedding, too, and the last one the norm and the head."""

    def __init__(self, whole: LanguageModel, index: int, parts: list[range], repeated: int = 1):
        super().__init__()
        self.config, self.ops, self.index, self.repeated = whole.config, whole.ops, index, repeated
        self.first, self.last = index == 0, index == len(parts) - 1
        self.side, self.several = whole.side, of_several(whole, index, len(parts))
        self.enters, self.leaves = [*handed_on(whole, parts, repeated), 0][index : index + 2]
        if self.first or "embedding" in self.several:
            self.embedding = whole.embedding
        self.common = nn.ParameterDict(whole.common)
        self.blocks = nn.ModuleDict({str(i): whole.blocks[i] for i in parts[index]})
        if self.last:
            self.norm = whole.norm
        if self.last and not self.config.tied:
            self.head = whole.head
        self.task: Task | None = None
        self.loads: dict[int, Load | None] = {}  # of each micro-batch, over all ranks
        self.losses: dict[int, Tensor] = {}  # the sum over its tokens

    def forward(self, x: Tensor, number: Int[Tensor, " 1"] | None = None, batch=None, key: int | None = None):
        """Of micro-batch `number` of the step at hand: x, or the last stage's share of the loss. Of a `batch` that is
        given: x, or the losses of its tokens. x comes and goes with the values that are handed on, as `packed`."""
        training = batch is None
        i = int(number) if training else 0
        batch, key = (self.task.batches[i], self.task.key) if training else (batch, key)
        x, loads = self.through(x, batch, key)
        if not training:
            return self.lost(x, batch) if self.last else x
        stack = stacked([y for y in loads if isinstance(y, Load)])
        aside, self.loads[i] = self.task.aside(stack, alike(loads), self)
        aside = aside / self.repeated  # so many ranks repeat each token: each has its share
        if not self.last:
            return Joined.apply(x, aside) if isinstance(aside, Tensor) else x
        losses = self.lost(x, batch).sum()
        self.losses[i] = losses.detach()
        return (losses / self.task.tokens / self.repeated + aside)[None]

    def through(self, x: Tensor, batch, key: int | None) -> tuple[Tensor, list]:
        side = self.side(batch.tokens, batch.positions, batch.cu_seqlens, batch.indices, key, None)
        x, values = (nn.functional.embedding(x, self.embedding), None) if self.first else self.unpacked(x, batch)
        x, *common = Entering.apply(x, *self.common.values())
        side = side._replace(common=dict(zip(self.common, common, strict=True)), values=values)
        loads = []
        for block in self.blocks.values():
            x, side, _, own = block(x, side, None)
            loads += own
        return packed(x, side.values) if self.leaves else x, loads

    def unpacked(self, x: Tensor, batch) -> tuple[Float[Tensor, "b s d"], Float[Tensor, "b t v"] | None]:
        if not self.enters:
            return x, None
        values = batch.tokens.numel() * self.enters
        x, values = x.split([x.numel() - values, values])
        b, t = batch.tokens.shape
        return x.view(b, -1, self.config.width), values.view(b, t, self.enters)

    def lost(self, x: Tensor, batch) -> Float[Tensor, "b t"]:
        x, head = self.ops.norm(x, self.norm, self.config.eps), self.embedding if self.config.tied else self.head
        return self.ops.token_losses(x.flatten(0, 1), head, batch.labels.flatten()).view(batch.labels.shape)


def packed(x: Float[Tensor, "b s d"], values: Float[Tensor, "b t v"]) -> Float[Tensor, " n"]:
    """One tensor, as torch's stages (2.11) hand on no second one that some stage has no use for. Flat, because ranks
    that share heads may have a part of the tokens of x, and of the values those of their heads."""
    return torch.cat([x.flatten(), values.to(x.dtype).flatten()])


class Task(NamedTuple):
    """What every stage knows of the step at hand."""

    batches: list
    tokens: Tensor  # labels of the whole step
    key: int
    aside: Callable  # (loads, inside, stage) -> the routers' losses, and their loads over all ranks


class Joined(torch.autograd.Function):
    """x; in the backward pass another loss, here `aside`, joins in, with the weight 1 that the whole loss has."""

    @staticmethod
    def forward(ctx, x: Tensor, aside: Float[Tensor, ""]) -> Tensor:
        ctx.like = aside
        return x.clone()  # no view: zero-bubble schedules detach in place what leaves a stage

    @staticmethod
    def backward(ctx, D: Tensor) -> tuple[Tensor, Tensor]:
        return D, torch.ones_like(ctx.like)


class Entering(torch.autograd.Function):
    """x and the parameters that all layers share, as they are: here they meet, and nowhere else. Zero-bubble schedules
    begin the gradient of a weight at the places where it meets what comes of x, and before torch 2.13 count twice if
    one of these is behind another (pytorch/pytorch#180952)."""

    @staticmethod
    def forward(ctx, *both: Tensor) -> tuple[Tensor, ...]:
        return tuple(y.view_as(y) for y in both)

    @staticmethod
    def backward(ctx, *D: Tensor) -> tuple[Tensor, ...]:
        return D


class Part(nn.Module):
    """The stages of this rank, with the names of the whole model. Built on the meta device; `fill` it."""

    def __init__(self, whole: LanguageModel, mesh: Mesh):
        super().__init__()
        self.config, self.mesh, how = whole.config, mesh, SCHEDULE[mesh.schedule]
        self.parts = cut(len(whole.blocks), mesh.pipeline_size * how.stages)
        self.places = [place(i, mesh.pipeline_size, how) for i in range(len(self.parts))]
        mine = [i for i, rank in enumerate(self.places) if rank == mesh.pipeline_rank]
        several = [(rank, of_several(whole, i, len(self.parts))) for i, rank in enumerate(self.places)]
        # ranks with copies of the parameters of several stages, of which the first stage has all
        self.holders = {name: sorted({rank for rank, names in several if name in names}) for name in several[0][1]}
        self.stages = Hidden(Stage(whole, i, self.parts, mesh.tensor_size) for i in mine)
        layers = [name for name, layer in whole.named_modules() if isinstance(layer, MoE)]
        blocks = {f"blocks.{i}" for stage in self.stages for i in stage.blocks}
        self.numbers = [i for i, name in enumerate(layers) if ".".join(name.split(".")[:2]) in blocks]
        self.layers, self.experts = len(layers), whole.config.experts + whole.config.identity
        self.schedule = None
        self.has_head = any(stage.last for stage in self.stages)

    def begin(self, device: torch.device) -> None:
        """Memory for the parameters, after sharding. Only then do they get their names here: both replace them."""
        for stage in self.stages:
            stage.to_empty(device=device)
        for stage in reversed(self.stages):
            for name in ("embedding", "norm", "head"):
                if hasattr(stage, name):
                    setattr(self, name, getattr(stage, name))
        here = {
            name: [stage.get_parameter(name) for stage in self.stages if name in stage.several] for name in self.holders
        }
        self.copies = {name: copies for name, copies in here.items() if copies}  # the first of them has the name
        self.common = nn.ParameterDict(self.stages[0].common)
        self.blocks = nn.ModuleDict({i: block for stage in self.stages for i, block in stage.blocks.items()})

    def backward(self, task: Task) -> tuple[Tensor, Load | None]:
        """Forward and backward of all micro-batches; (sum of the token losses, 0 on ranks without the head; the loads
        of all layers, over all ranks and micro-batches). Gradients are summed over the ranks that hold the same."""
        self.begin_alike()
        times = len(task.batches)
        if self.schedule is None:
            self.schedule = self.scheduled(task.batches[0].tokens, times)
        for stage in self.stages:
            stage.task, stage.loads, stage.losses = task, {}, {}
        x = [torch.cat([batch.tokens for batch in task.batches])] if self.mesh.pipeline_rank == 0 else []
        number = torch.arange(times)
        self.schedule.step(*x, number=number, target=number if self.has_head else None)
        self.add_up()
        losses = [loss for stage in self.stages for loss in stage.losses.values()]
        loads = [[stage.loads[i] for stage in self.stages if stage.loads[i] is not None] for i in range(times)]
        return sum(losses, task.tokens * 0).to(task.tokens), self.whole(loads)

    @torch.no_grad()
    def begin_alike(self) -> None:
        """Copies on this rank that have no name, which nobody fills or moves, become those that have one."""
        for named, *others in self.copies.values():
            for copy in others:
                shard.local(copy).copy_(shard.local(named))

    @torch.no_grad()
    def add_up(self) -> None:
        """Of parameters of several stages each rank's named copy gets the gradient of all copies of all ranks."""
        for name, copies in self.copies.items():
            grad, *others = [torch.zeros_like(copy) if copy.grad is None else copy.grad for copy in copies]
            mine = sum(map(shard.local, others), shard.local(grad))
            shard.local(grad).copy_(comm.total_of_some(mine, self.mesh.pipeline, self.holders[name]))
            for copy in copies:
                copy.grad = None
            copies[0].grad = grad

    def scheduled(self, tokens: Int[Tensor, "1 t"], times: int):
        from torch.distributed.pipelining import PipelineStage, schedules

        how, dtype = SCHEDULE[self.mesh.schedule], next(self.parameters()).dtype
        comm.total(tokens.new_zeros(1), self.mesh.pipeline)  # NCCL wants all ranks in the first exchange of a group
        one = torch.empty(1, dtype=dtype, device=tokens.device, requires_grad=True)
        stages = [
            PipelineStage(
                stage,
                stage.index,
                len(self.parts),
                tokens.device,
                input_args=tokens if stage.first else self.between(tokens, dtype, stage.enters),
                output_args=one if stage.last else self.between(tokens, dtype, stage.leaves),
                group=self.mesh.pipeline,
                dw_builder=at_once(stage),
            )
            for stage in self.stages
        ]
        return getattr(schedules, how.kind)(
            stages if how.stages > 1 else stages[0], times, loss_fn=lambda loss, _: loss.sum(), scale_grads=False
        )

    def between(self, tokens: Int[Tensor, "1 t"], dtype: torch.dtype, channels: int) -> Tensor:
        """As large as what goes from stage to stage: x of all these tokens, or of a rank's part of them; with so many
        channels of values, packed."""
        b, t = tokens.shape
        share = self.mesh.tensor_size if self.mesh.between == "cut" else 1
        how = {"dtype": dtype, "device": tokens.device, "requires_grad": True}
        x = torch.empty(b, -(-t // share), self.config.width, **how)
        return torch.empty(x.numel() + b * t * channels, **how) if channels else x

    def whole(self, loads: list[list[Load]]) -> Load | None:
        """Over micro-batches, and of the layers of all stages, in the order of the stack."""
        if not self.layers:
            return None
        wide = [self.experts if name in EACH else 1 for name in Load._fields]
        numbers = torch.zeros(self.layers, sum(wide), dtype=torch.float64, device=next(self.parameters()).device)
        for some in loads:
            rows = [torch.cat([y.detach().double().view(len(y), -1) for y in load], 1) for load in some]
            if rows:
                numbers[self.numbers] += torch.cat(rows)
        parts = zip(Load._fields, comm.total(numbers, self.mesh.pipeline).split(wide, 1), strict=True)
        fields = [(name, x if name in EACH else x.squeeze(1)) for name, x in parts]
        return Load(*(x.long() if name in COUNTED else x for name, x in fields))

    def forward(self, tokens, labels, positions=None, cu_seqlens=None) -> Output:
        """The losses of a batch, on every rank, stage after stage. Without gradients."""
        self.begin_alike()
        batch = Seen(tokens, labels, positions, cu_seqlens)
        stages, me, group = {stage.index: stage for stage in self.stages}, self.mesh.pipeline_rank, self.mesh.pipeline
        dtype = next(self.parameters()).dtype
        x, losses = tokens, torch.zeros(labels.shape, dtype=dtype, device=labels.device)
        for i, rank in enumerate(self.places):
            if rank != me:
                continue
            if i and self.places[i - 1] != me:
                x = comm.take(self.between(tokens, dtype, stages[i].enters), group, me - self.places[i - 1])
            x = stages[i](x, batch=batch)
            if stages[i].last:
                losses = x.to(losses)
            elif self.places[i + 1] != me:
                comm.give(x.to(dtype), group, self.places[i + 1] - me)
        return Output(comm.total(losses, group), None, None, None)


BY_PARTS = torch.__version__ >= "2.13"  # older ones add up gradients of an operation's outputs (pytorch/pytorch#170277)


def at_once(stage: Stage) -> Callable | None:
    """For torch's stage, which counts gradients twice or fails (pytorch/pytorch#180952) if it is to make those of
    scattered parameters by themselves, and those of any in a torch that is not right about it: what is left to do after
    a backward pass that made all of them. Nothing."""
    whole = not BY_PARTS or any(getattr(layer, "scattered", False) for layer in stage.modules())
    return (lambda: lambda: None) if whole else None


class Seen(NamedTuple):
    """A batch that is only read."""

    tokens: Tensor
    labels: Tensor
    positions: Tensor | None
    cu_seqlens: Tensor | None
    indices: Tensor | None = None


class Hidden(tuple):
    """Modules that are not children of who holds them: no names."""


COUNTED = ("counts", "dropped", "first", "tokens")  # fields of a load that are whole numbers
EACH = ("counts", "dropped", "first", "probability", "mass", "importance", "chance")  # a number for each expert


def divide(whole: LanguageModel, mesh: Mesh, recompute: bool) -> Part:
    """This rank's part of a model on the meta device, its stages sharded over the ranks that hold the same ones."""
    apart = shard.share_out(whole, mesh)
    part = Part(whole, mesh)
    for stage in part.stages:
        if recompute:
            shard.checkpointing(stage.blocks.values())
        shard.cut(stage, mesh, stage.blocks.values(), apart)
        if mesh.shards is not None:
            # Whole from a step's first micro-batch to its last: gathered once, and torch's weight passes look for them.
            stage.set_reshard_after_forward(False)
    return part


def numbers(model: nn.Module) -> list[int]:
    """Which of all expert layers each of this rank's is."""
    return model.numbers if isinstance(model, Part) else list(range(sum(isinstance(m, MoE) for m in model.modules())))


def once(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that count on this rank, where over all ranks each counts once."""
    if not isinstance(model, Part):
        return list(model.parameters())
    elsewhere = {name for name, ranks in model.holders.items() if ranks[0] != model.mesh.pipeline_rank}
    return [p for name, p in model.named_parameters() if name not in elsewhere]


def told(model: nn.Module, mesh: Mesh) -> list[str]:
    """A line for each rank of the pipeline: what it holds."""
    mine = sum(shard.local(p).numel() for p in model.parameters())
    blocks = " and ".join(
        f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in (model.parts[s.index] for s in model.stages)
    )
    ends = [name for name in ("embedding", "head") if hasattr(model, name)]
    lines = comm.objects(f"blocks {blocks}{''.join(f', {name}' for name in ends)}: {mine:,} parameters", mesh.everyone)
    return [f"rank {rank} holds {line}" for rank, line in enumerate(lines)]


def bubble(mesh: Mesh, micro_batches: int) -> float:
    """The share of time that a rank waits, were all passes as long as each other: (p - 1) / (v m + p - 1) of p ranks
    with v stages each and m micro-batches. An upper bound where the weights' gradients fill it (zero-bubble)."""
    idle = mesh.pipeline_size - 1
    return idle / (SCHEDULE[mesh.schedule].stages * micro_batches + idle)
