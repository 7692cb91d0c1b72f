"""Train a Linear-MoE language model, on one CPU or on many GPUs.

    python train.py tiny                                            two CPU cores, three minutes
    python train.py tiny --model.lsm kda --steps 100 --out runs/kda
    torchrun --nproc-per-node 8 train.py a0.3b-2b --data text.jsonl --mesh.sequence 2 --out runs/a

The same folder again resumes where the run stopped, to the bit on one CPU rank: everything random is a function of
(seed, step, token), so a checkpoint is parameters, optimizer and step. The loss is a sum over tokens divided by the
number of tokens of the whole step, and gradients are summed over ranks, so neither the number of ranks nor that of
micro-batches is in the mathematics.
"""

import contextlib
import functools
import json
import math
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import command
from data import corpus
from data.stream import Batch, Stream, evaluation
from parallel import checkpoint, comm, lasp, pipeline, shard
from parallel import mesh as meshes
from parallel.window import Symmetric
from reference.balance import LOSS, add_up, updated_bias, updated_penalty, violation, weights_of
from reference.head import HELD
from reference.lsm import row as lsm_row
from reference.mixers.softmax import heads_of
from reference.model import LanguageModel, decayed, experts_of, for_writing, initialize, starts
from reference.moe import MoE
from reference.noise import seed_of
from reference.objective import OBJECTIVE, Masks, Objective, objective
from reference.presets import PRESETS as SHAPES
from reference.presets import Model
from reference.routers import Load, row
from reference.span import transition

# ------------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Optimizer:
    """How parameters move."""

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    """adam: the decay is part of the gradient; adamw: apart from it; sgd: with momentum betas[0]."""
    rate: float = 3e-3
    """Learning rate at its peak."""
    least: float = 0.1
    """Last learning rate, as a share of the peak."""
    warmup: int = 20
    """Steps from 0 to the peak; then a cosine to the least."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of the running means of the gradient and its square."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    decay: float = 0.1
    """Weight decay, of matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient, over all parameters and ranks."""


@dataclass(frozen=True)
class Train:
    """One run."""

    out: str = "runs/run"
    """Its folder. With checkpoints in it, the run goes on from the newest."""
    model: Model = field(default_factory=Model)
    objective: Literal[tuple(OBJECTIVE)] = "next"
    """What the model says: the next token, or (masked) the tokens that a mask hides, and it then sees both sides of
    each. The mask is one id more than text has, and the vocabulary is made as large."""
    mask_rate: float = 0.15
    """Share of the bytes that the mask hides, for objective masked."""
    data: str | None = None
    """A text file, a folder of them, or .jsonl (None: the source of Python's standard library)."""
    text_field: str = "text"
    """Of each .jsonl line."""
    length: int = 256
    """Tokens of one sample."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    mesh: meshes.Degrees = field(default_factory=meshes.Degrees)
    steps: int = 1000
    """Optimizer steps."""
    batch: int = 16
    """Samples a step, over all ranks."""
    micro: int | None = None
    """Samples a rank takes at once; the step adds up as many as the batch needs (None: all at once)."""
    balance: dict[str, float] | None = None
    """Losses that keep the experts equally busy, by name, and their weights a layer, as in: switch 0.01 z 0.001 (None:
    the router's own)."""
    mixer_balance: float = 0.01
    """Weight of the balance loss of routers inside mixers (of memories, heads or projections), each."""
    bias_rate: float = 1e-3
    """How fast a balancing bias moves, for the routers that have one."""
    seed: int = 0
    """Of parameters, data order and dropout."""
    backend: Literal["auto", "reference", "fast", "fla"] = "auto"
    """Whose ops (auto: fast on a GPU if it has the model's kernels, else reference; fla: flash-linear-attention's)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run (auto: a GPU if there is one)."""
    precision: Literal["float32", "bf16", "float64"] = "float32"
    """bf16: matrix products in bfloat16, everything else and the parameters in float32. Where these are cut over ranks,
    and heads are not shared, those of experts travel in bfloat16, and their gradients are summed in float32."""
    recompute: bool = False
    """Keep only each block's input and run it again in the backward pass."""
    held_logits: int = HELD
    """Most logits that are there at once: the losses of more tokens are made piece by piece."""
    evaluate_every: int = 100
    """Steps between two looks at the validation text."""
    evaluate_batches: int = 4
    """Batches of such a look."""
    save_every: int = 200
    """Steps between checkpoints."""
    keep: int = 2
    """Newest checkpoints that stay."""
    save_in_background: bool = True
    """Write checkpoints while training goes on, from a copy in the CPU's memory."""
    timeout: float = 600.0
    """Seconds that a rank waits for another (which may be writing a checkpoint, or the report) before the run ends."""
    log_every: int = 10
    """Steps between lines."""
    patience: int = 10
    """Steps in a row whose gradients are not finite before the run gives up; each of them is skipped."""
    report: bool = True
    """At the end, compare with baselines and print what the model writes (for models of bytes)."""

    def __post_init__(self):
        for name in (
            "length",
            "steps",
            "batch",
            "held_logits",
            "evaluate_every",
            "evaluate_batches",
            "save_every",
            "keep",
            "log_every",
            "patience",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.timeout > 0:
            raise ValueError(f"timeout is {self.timeout}; it must be more than 0 seconds")
        if self.micro is not None and (self.micro < 1 or self.batch % self.micro):
            raise ValueError(f"micro {self.micro} must divide batch {self.batch}")
        if self.model.vocabulary < corpus.VOCABULARY:
            raise ValueError(
                f"the vocabulary is {self.model.vocabulary}; "
                f"text is read as bytes and needs at least {corpus.VOCABULARY}"
            )
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"mask_rate is {self.mask_rate}; it must be above 0 and below 1")
        goal = objective(self.objective)
        goal.check(self.model)
        words = max(self.model.vocabulary, corpus.VOCABULARY + goal.ids)
        object.__setattr__(self, "model", replace(self.model, vocabulary=words))  # what checkpoints and plans go by
        self.balances()

    def balances(self) -> dict[str, float]:
        """The balance losses in force and their weights a layer."""
        model = self.model
        return weights_of(row(model.router), model.groups, self.balance) if "E" in model.letters else {}


LARGE = Train(
    length=2048,
    optimizer=Optimizer(rate=3e-4, warmup=500),
    steps=20000,
    batch=64,
    micro=8,
    precision="bf16",
    recompute=True,
    evaluate_every=1000,
    save_every=1000,
    report=False,
)
PRESETS = {
    name: (what, replace(LARGE, model=model, out=f"runs/{name}"))
    for name, (what, model) in SHAPES.items()
    if name != "tiny"
}
TINY = Train(
    out="runs/tiny",
    model=SHAPES["tiny"][1],
    optimizer=Optimizer(rate=4e-3, warmup=50),
    steps=1000,
    batch=4,
    evaluate_every=250,
    evaluate_batches=16,
    save_every=250,
    log_every=25,
)
PRESETS = {"tiny": (SHAPES["tiny"][0], TINY), **PRESETS}


# ------------------------------------------------------------------------------------- the machine and the ops


def device_of(config: Train) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for and no GPU was found; use --device cpu")
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name, meshes.local_rank() if name == "cuda" else None)


def ops_of(config: Train, device: torch.device):
    """The backend that was named; `auto` is settled here, once, and said."""
    from reference.ops import ops as reference

    exact = config.precision == "float64"  # which no kernel computes
    if config.backend == "reference" or (config.backend == "auto" and (device.type == "cpu" or exact)):
        return reference
    import fast
    from fast import fla
    from fast.recurrence import rows

    lsm = config.model.lsm
    if config.backend == "fla":
        try:
            if "L" in config.model.letters:
                fla.operator(fla.adapter(lsm))
        except NotImplementedError as lack:
            raise ValueError(str(lack)) from None
        return fla.ops
    if "L" not in config.model.letters or lsm in rows():
        return fast.ops
    if config.backend == "fast":
        raise ValueError(f"no fast kernel for {lsm!r} (have {', '.join(rows())}); use --backend reference")
    return reference


def ops_on(config: Train, mesh, device: torch.device):
    """The backend on this mesh, its losses made of as many logits at once as the configuration allows."""
    ops = ops_of(config, device)
    ops = ops._replace(token_losses=functools.partial(ops.token_losses, held=config.held_logits))
    return meshes.over(objective(config.objective).ops(ops), mesh)


def precise(config: Train, device: torch.device):
    """bf16 as autocast: products in bfloat16, while gates, memories, norms and parameters stay float32.

    Its cache would keep the copies of all blocks' parameters until the step's end, of which recomputing needs one.
    """
    if config.precision != "bf16":
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=not config.recompute)


# -------------------------------------------------------------------------------------------------- the model


def model_of(config: Train, ops, mesh, device: torch.device) -> tuple[LanguageModel, set[str]]:
    """Built, then filled parameter by parameter from (seed, name); and which names decay."""
    model, how, matrices = built(config, ops, mesh, device)
    initialize(model, config.seed, how)
    return model, matrices


def built(config: Train, ops, mesh, device: torch.device) -> tuple[LanguageModel, dict, set[str]]:
    """Built without memory, sharded, and given memory with nothing in it yet; how each parameter begins; and which
    names decay. Sharding replaces the parameters, so both are asked of the model before."""
    with torch.device("meta"):
        model = LanguageModel(config.model, ops)
    how, matrices = starts(model), decayed(model)
    if config.precision == "float64":
        model = model.double()
    if mesh.pipeline_size > 1:
        pipeline.refuse(model, mesh, feed_of(config, mesh).times)
        model = pipeline.divide(model, mesh, config.recompute)
        model.begin(device)
        how = {name: how[name] for name, _ in model.named_parameters()}
    else:
        if config.recompute:
            shard.checkpointing(model.blocks)
        narrow, times = torch.bfloat16 if config.precision == "bf16" else None, feed_of(config, mesh).times
        shard.shard(model, mesh, model.blocks, narrow, times)
        model.to_empty(device=device)
    return model, how, matrices


def optimizer_of(config: Train, model: LanguageModel, matrices: set[str]) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in matrices) == decays], "weight_decay": decay}
        for decays, decay in ((True, config.optimizer.decay), (False, 0.0))
    ]
    o = config.optimizer
    if o.name == "sgd":
        return torch.optim.SGD(groups, lr=o.rate, momentum=o.betas[0])
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.name]
    return kind(groups, lr=o.rate, betas=o.betas, eps=o.eps, fused=True)


def rate(config: Train, step: int) -> float:
    """The learning rate of step 0, 1, ...: linear warm-up, then a cosine to its least."""
    o = config.optimizer
    if step < o.warmup:
        return o.rate * (step + 1) / o.warmup
    along = (step - o.warmup) / max(config.steps - o.warmup, 1)
    return o.rate * (o.least + (1 - o.least) * 0.5 * (1 + math.cos(math.pi * min(along, 1.0))))


# ---------------------------------------------------------------------------------------------------- one step


def refuse_to_cut(config: Train, mesh) -> None:
    """Rows without spans, heads that ranks cannot share; and tokens that are routed together must be on one rank."""
    letters, ranks = config.model.letters, mesh.sequence_size
    if ranks == 1:
        return
    if not objective(config.objective).causal:
        lasp.check_both_ways("N" in letters, mesh.attention, mesh.states)
    if "L" in letters and mesh.states == "gather" and transition(lsm_row(config.model.lsm)) is None:
        raise ValueError(
            f"the memory of {config.model.lsm!r} is not affine, so its segments cannot be gathered over {ranks} ranks; "
            "use --mesh.states ring (slow) or --mesh.sequence 1"
        )
    heads, shares = heads_of(config.model), ranks * mesh.tensor_size
    if "N" in letters and mesh.attention == "ulysses" and heads % shares:
        raise ValueError(
            f"ulysses gives each of {shares} ranks an equal share of the attention heads, and there are {heads}; use a "
            f"multiple of {shares}, or --mesh.attention gather or ring"
        )
    if "E" not in letters:
        return
    layer, name = experts_of(config.model), config.model.router
    ranks = f"they cannot be cut over {mesh.sequence_size} ranks; use --mesh.sequence 1"
    if row(name).pooled != "never":
        raise ValueError(f"router {name!r} routes the tokens of a sequence together: {ranks}")
    if layer.capacity < math.inf:
        raise ValueError(
            f"router {name!r} has a capacity ({layer.capacity}), for which a sequence's tokens compete: {ranks} or "
            "--model.capacity-factor inf"
        )
    if "sequence" in config.balances():
        raise ValueError(
            f"the sequence-wise balance loss of router {name!r} is one of whole sequences: {ranks} or other losses, "
            "such as --balance switch 0.0001"
        )


class Feed(NamedTuple):
    """What a rank takes from each step: `rows` samples at a time, `times` times, from its `first`."""

    rows: int
    times: int
    first: int


def feed_of(config: Train, mesh) -> Feed:
    if config.batch % mesh.data_size:
        raise ValueError(
            f"{mesh.data_size} data ranks cannot share a batch of {config.batch} samples: the batch must be a multiple"
        )
    share = config.batch // mesh.data_size
    rows = min(config.micro or share, share)
    if share % rows:
        raise ValueError(f"micro {rows} must divide the {share} samples a rank has of batch {config.batch}")
    return Feed(rows, share // rows, mesh.data_rank * share)


def micro_batches(config: Train, stream: Stream, feed: Feed, mesh, step: int, device) -> list[Batch]:
    """This rank's part of a step: its samples by number, and of each micro-batch its segment of the sequence."""
    first = step * config.batch + feed.first
    batches = [stream.batch(range(first + i * feed.rows, first + (i + 1) * feed.rows)) for i in range(feed.times)]
    batches = [posed(config, batch, seed_of(config.seed, "masks")) for batch in batches]
    mine = [lasp.cut(batch, mesh.sequence_size, mesh.sequence_rank) for batch in batches]
    return [Batch(*(sent(x, device) for x in batch)) for batch in mine]


def sent(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, where it arrives behind all that is asked of it by now; the host does not wait."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def posed(config: Train, batch: Batch, key: int) -> Batch:
    """What the objective shows of these tokens, and asks for: a function of the key and of each token's number."""
    masks = Masks(config.mask_rate, key, corpus.BYTES, corpus.VOCABULARY)
    tokens, labels = objective(config.objective).pose(batch.tokens, batch.labels, batch.indices, masks)
    return batch._replace(tokens=tokens, labels=labels)


class Sums(NamedTuple):
    """What a step adds up, over its micro-batches."""

    loss: Tensor  # of token losses, in nats
    load: Load | None  # of the routers, by layer, over all ranks


def backward(config: Train, model, ops, batch: Batch, tokens: Tensor, times: int, step: int) -> Sums:
    """Forward and backward of one micro-batch. `tokens` counts the labels of the whole step, over all ranks."""
    key = seed_of(config.seed, "dropout", step)
    out = model(batch.tokens, batch.labels, batch.positions, batch.cu_seqlens, batch.indices, key)
    total = out.losses.sum()
    beside, load = aside(config, ops, times, out.loads, out.inside, model)
    loss = total / tokens + beside
    (loss / config.mesh.tensor).backward()  # so many ranks repeat each token: each has its share
    return Sums(total.detach(), load)


def aside(config: Train, ops, times: int, loads: Load | None, inside, model) -> tuple[Tensor | float, Load | None]:
    """This rank's share of the losses of the routers in `model`, of one micro-batch of `times`; the load of all."""
    loss, load = 0.0, None
    for k, own in inside:
        loss = loss + asked({"switch": config.mixer_balance}, own, ops, k)[0] / times
    if loads is not None:
        weights = config.balances()
        if "penalty" in weights:
            weights["penalty"] = weights["penalty"] * expert_layers(model)[0].penalty
        own, load = asked(weights, loads, ops, config.model.top_k, config.model.groups)
        loss = loss + own / times
    return loss, load


def one_by_one(config: Train, model, ops, batches: list[Batch], tokens: Tensor, step: int) -> list[Sums]:
    """`backward` of one micro-batch after the other; the last one's ends in the sum of gradients over ranks."""
    sums = []
    for i, batch in enumerate(batches):
        shard.synchronize(model, i == len(batches) - 1)
        with precise(config, tokens.device):
            sums.append(backward(config, model, ops, batch, tokens, len(batches), step))
    return sums


def through_stages(config: Train, model, ops, batches: list[Batch], tokens: Tensor, step: int) -> Sums:
    """`backward` of all micro-batches, in the order of the pipeline's schedule."""
    alike = meshes.totals(ops, model.mesh.alike, model.mesh.tensor_size)  # routers are those of my stages
    beside = functools.partial(aside, config, alike, len(batches))
    key = seed_of(config.seed, "dropout", step)
    with precise(config, tokens.device):
        return Sums(*model.backward(pipeline.Task(batches, tokens, key, beside)))


def asked(weights: dict[str, float], mine: Load, ops, k: int, groups: int = 1) -> tuple[Tensor, Load]:
    """This rank's share of the weighted losses, summed over layers, and the load of all ranks."""
    total = add_up(mine, ops.total)
    zero = mine.probability.sum() * 0
    return sum((w * LOSS[name].value(total, mine, k, groups).sum() for name, w in weights.items()), zero), total


class Result:
    """What a step did. Who asks for its numbers waits until the device has them."""

    def __init__(self, step: int, numbers: Callable[[], list[float]], load: Load | None):
        self.step, self.numbers = step, functools.cache(numbers)
        self.load = load  # of the routers, by layer

    @property
    def loss(self) -> float:
        """Nats a token that was asked for."""
        return self.numbers()[0]

    @property
    def norm(self) -> float:
        return self.numbers()[1]

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm)

    @property
    def stop(self) -> bool:
        """Whether some rank asked for it."""
        return self.numbers()[2] > 0


def one_step(config: Train, model, ops, optimizer, batches: list[Batch], step: int, stop: bool) -> Result:
    """Gradients of all micro-batches, then the parameters' move, unless a gradient is not finite. The host waits for
    nothing (but for optimizers that are not fused): it can be a step ahead of the device."""
    device = batches[0].tokens.device
    piped = isinstance(model, pipeline.Part)
    mine = sum((b.labels >= 0).sum() for b in batches) * (model.has_head if piped else 1)
    everyone = ops.total(torch.stack([mine.double(), torch.full((), float(stop), device=device, dtype=torch.float64)]))
    tokens = everyone[0].clamp(min=1).to(torch.float64 if config.precision == "float64" else torch.float32)
    if piped:
        sums = [through_stages(config, model, ops, batches, tokens, step)]
    else:
        sums = one_by_one(config, model, ops, batches, tokens, step)
    loss = sum(s.loss for s in sums)
    load = Load(*map(sum, zip(*(s.load for s in sums), strict=True))) if sums[0].load is not None else None
    norm = shard.grad_norm(pipeline.once(model), apart=piped)
    mean = ops.total(loss) / everyone[0].clamp(min=1)
    numbers = comm.fetched(torch.stack([x.to(everyone) for x in (mean, norm, everyone[1])]))
    for group in optimizer.param_groups:
        group["lr"] = rate(config, step)
    shard.move(optimizer, norm, config.optimizer.clip)
    move_balance(config, model, load, norm.isfinite())
    optimizer.zero_grad(set_to_none=True)
    return Result(step + 1, numbers, load)


def expert_layers(model) -> list[MoE]:
    return [m for m in model.modules() if isinstance(m, MoE)]


def move_balance(config: Train, model, load: Load | None, moves: Tensor) -> None:
    """Once a step that `moves`, over all ranks: overloaded experts become less attractive, underloaded ones more
    (2408.15664); ReMoE's penalty grows while tokens visit too many experts (2412.14711)."""
    for i, layer in zip(pipeline.numbers(model), expert_layers(model), strict=True):
        if layer.bias is not None:
            bias = updated_bias(layer.bias, load.counts[i], config.bias_rate)
            layer.bias.copy_(torch.where(moves, bias, layer.bias))
        if layer.penalty is not None:
            penalty = updated_penalty(layer.penalty, load.counts, load.tokens, config.model.top_k)
            layer.penalty.copy_(torch.where(moves, penalty, layer.penalty))


FIXED = seed_of("masks of validation")


@torch.no_grad()
def validate(config: Train, model, ops, mesh, documents, device, batches: int | None = None) -> float:
    """Bits a label on the documents (or their first batches): per byte; or per masked token, with masks that are the
    same whatever the seed. (The last byte of a document, which is a label and no token here, has no mask.)

    All ranks share the parameters and so make the same calls; those that differ in data alone see the same rows.
    """
    loss = count = 0.0
    rows = max(config.batch // mesh.data_size, 1)
    work = evaluation(documents, config.length, rows)
    for i, batch in enumerate(tqdm(work, desc="validation", disable=mesh.rank > 0 or batches is not None, leave=False)):
        if batches is not None and i >= batches:
            break
        batch = lasp.cut(posed(config, batch, FIXED), mesh.sequence_size, mesh.sequence_rank)
        batch = Batch(*(x.to(device) for x in batch))
        with precise(config, device):
            losses = model(batch.tokens, batch.labels, batch.positions, batch.cu_seqlens).losses
        both = ops.total(torch.stack([losses.sum().double(), (batch.labels >= 0).sum().double()]))
        loss, count = loss + both[0].item() / mesh.data_size, count + both[1].item() / mesh.data_size
    return loss / max(count, 1) / math.log(2)


# ------------------------------------------------------------------------------------------------ the run folder


def memory_mib(device: torch.device) -> float:
    """Peak: of the GPU's allocator, or of the process."""
    if device.type == "cuda":
        return (torch.cuda.max_memory_allocated(device) + Symmetric.held) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def commit() -> str:
    """The source's git commit, or why there is none."""
    try:
        ask = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no git repository"


class Folder:
    """The files of a run. Only the first rank writes."""

    def __init__(self, config: Train, first: bool):
        self.path, self.first, self.goal = Path(config.out), first, objective(config.objective)
        self.metrics = self.path / "metrics.jsonl"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"out {config.out} is a file; it must be a folder or not exist yet")
        self.check(config)

    def check(self, config: Train) -> None:
        """ValueError, one line, if the run in the folder was of another objective: parameters alone do not tell."""
        file = self.path / "config.json"
        before = json.loads(file.read_text()).get("objective", config.objective) if file.exists() else config.objective
        if before != config.objective:
            raise ValueError(
                f"{config.out} is a run of objective {before}, and {config.objective} was asked for: use another --out"
            )

    def open(self, config: Train, step: int) -> None:
        """Who ran what; lines of steps that a crash undid are dropped."""
        if not self.first:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        command.write(config, self.path / "config.json")
        shutil.copyfile(__file__, self.path / "train.py")
        (self.path / "commit.txt").write_text(commit() + "\n")
        last = f"{self.goal.prefix}validation"  # made anew
        kept = [line for line in self.lines() if line["step"] <= step and last not in line]
        half = self.metrics.with_suffix(".tmp")
        half.write_text("".join(json.dumps(line) + "\n" for line in kept))
        half.replace(self.metrics)

    def lines(self) -> list[dict]:
        if not self.metrics.exists():
            return []
        whole = self.metrics.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in whole if line.endswith("\n")]

    def log(self, **line) -> None:
        if self.first:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def plot(self) -> None:
        """Training and validation loss in bits, over steps."""
        if not self.first:
            return
        pyplot = drawing()
        figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for name, label, style in (
            ("bits", "training", "-"),
            ("validation_part", "part of validation", "o-"),
            ("validation", "validation", "*"),
        ):
            name = self.goal.prefix + name
            points = [(line["step"], line[name]) for line in self.lines() if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(xlabel="step", ylabel=f"bits per {self.goal.one}", title=self.path.name)
        axis.grid(alpha=0.3)
        axis.legend()
        figure.savefig(self.path / "loss.png", dpi=120)
        pyplot.close(figure)

    def heat(self, step: int, load: Load) -> None:
        """Pairs by layer and expert over the mean, in `experts.png`. The numbers are in the metrics."""
        if not self.first:
            return
        share = load.counts * load.counts.shape[-1] / load.counts.sum(-1, keepdim=True).clamp(min=1)
        pyplot = drawing()
        figure, axis = pyplot.subplots(figsize=(7, 1.2 + 0.3 * len(share)), layout="constrained")
        image = axis.imshow(share.cpu(), vmin=0, vmax=2, cmap="RdBu_r", aspect="auto")
        axis.set(xlabel="expert", ylabel="expert layer", title=f"{self.path.name}, step {step}: use over the mean")
        axis.set_yticks(range(len(share)))
        figure.colorbar(image, extend="max")
        figure.savefig(self.path / "experts.png", dpi=120)
        pyplot.close(figure)


def drawing():
    """matplotlib without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# ------------------------------------------------------------------------------------------------------ the loop


class Flag:
    """Ctrl-C and SIGTERM ask for a stop: steps at hand are finished and saved. Asked twice, the run ends at once."""

    def __init__(self):
        self.up = False
        self.former = {name: signal.signal(name, self.raised) for name in (signal.SIGINT, signal.SIGTERM)}

    def raised(self, *_):
        self.up = True
        self.lower()

    def lower(self):
        for name, handler in self.former.items():
            signal.signal(name, handler)


def state_of(model, optimizer, step: int, skipped: int) -> dict:
    return {"model": model, "optimizer": optimizer, "step": step, "skipped": skipped}


@dataclass
class Place:
    """Where the run is, for its last words: the newest step that was seen, the checkpoint under way, the bar on the
    screen."""

    step: int = 0
    saver: checkpoint.Saver | None = None
    bar: tqdm | None = None


@contextlib.contextmanager
def failures(config: Train, place: Place) -> Iterator[None]:
    """Other ranks that are gone, and files that cannot be written, become one line on every rank that sees it, and exit
    code 1. Anything else stays a traceback."""
    try:
        yield
    except Exception as error:
        gone = comm.lost(error)
        if place.bar is not None:
            place.bar.close()
        if gone is None and place.saver is not None:
            place.saver.settle()
        if gone is None and not isinstance(error, OSError):
            raise
        what = (
            f"lost the others ({gone}): one died, or was silent for --timeout {config.timeout:g} s" if gone else error
        )
        there = checkpoint.newest(Path(config.out) / "checkpoints")
        command.fail(
            "train.py",
            f"{meshes.who()}, after step {place.step} of {config.steps}: {what}; "
            f"the same command goes on from {f'step {there[0]}' if there else 'the start, as nothing was saved'}",
        )


class Course:
    """What the host has seen of the run: steps that were skipped, those in a row (`bad`), and whether to stop."""

    def __init__(self, config: Train, folder: Folder, place: Place, skipped: int, device: torch.device):
        self.config, self.folder, self.place, self.device = config, folder, place, device
        self.skipped, self.bad, self.stopped = skipped, 0, False
        self.start, self.since = time.perf_counter(), place.step  # of the time that speed is of

    def see(self, result: Result, check: Callable[[], float] | None) -> None:
        """Waits for a step; what there is to say of it is written down, with what a part of the validation gives if
        there is a `check` now."""
        self.place.step = result.step
        self.place.bar.update()
        self.stopped |= result.stop
        self.bad = 0 if result.finite else self.bad + 1
        self.skipped += not result.finite
        last = result.step == self.config.steps
        if result.step % self.config.log_every == 0 or check or last or self.bad or self.stopped:
            self.say(result, check, last)

    def say(self, result: Result, check: Callable[[], float] | None, last: bool) -> None:
        tokens = (result.step - self.since) * self.config.batch * self.config.length
        line = line_of(self.config, result, self.skipped, tokens / (time.perf_counter() - self.start), self.device)
        if check:
            line[f"{self.folder.goal.prefix}validation_part"] = check()
            self.start, self.since = time.perf_counter(), result.step
        if (check or last) and result.load is not None:
            line |= {"counts": result.load.counts.tolist(), "full": result.load.dropped.tolist()}
            self.folder.heat(result.step, result.load)
        self.folder.log(**line)
        if self.folder.first:
            self.place.bar.write(spoken(self.folder.goal, line, result))


def train(config: Train, place: Place) -> None:
    """The whole run: build, resume, loop, save, report."""
    with command.mistakes("train.py"):
        device = device_of(config)
        mesh = meshes.make(config.mesh, device)
        folder = Folder(config, mesh.rank == 0)
        ops = ops_on(config, mesh, device)
        feed = feed_of(config, mesh)
        refuse_to_cut(config, mesh)
        training, validation = corpus.split(corpus.load(config.data, config.text_field))
        stream = Stream(training, config.length, config.seed)
        model, matrices = model_of(config, ops, mesh, device)
        optimizer = optimizer_of(config, model, matrices)
        state = state_of(model, optimizer, 0, 0)
        checkpoint.load(folder.path / "checkpoints", state)
        step, skipped = state["step"], state["skipped"]
        folder.open(config, step)
    place.step = step
    saver = place.saver = checkpoint.Saver(
        folder.path / "checkpoints", config.keep, config.save_in_background, config.timeout
    )
    say = print if mesh.rank == 0 else (lambda *_: None)
    introduce(say, config, model, mesh, ops, device, step)
    check = functools.partial(validate, config, model, ops, mesh, validation, device, config.evaluate_batches)
    flag, course = Flag(), Course(config, folder, place, skipped, device)
    waiting: deque[Result] = deque()  # steps that are asked of the device: the host looks at the one before, if it may
    bar = place.bar = tqdm(total=config.steps, initial=step, disable=mesh.rank > 0, unit="step", dynamic_ncols=True)
    while step < config.steps and not course.stopped:
        batches = micro_batches(config, stream, feed, mesh, step, device)
        waiting.append(one_step(config, model, ops, optimizer, batches, step, flag.up or saver.failed()))
        step += 1
        saves = step % config.save_every == 0 or step == config.steps
        look = step % config.evaluate_every == 0 and step < config.steps
        while len(waiting) > (0 if saves or look or course.stopped or step % config.log_every == 0 else 1):
            result = waiting.popleft()
            course.see(result, check if look and result.step == step else None)
            if course.bad >= config.patience:
                bar.close()
                saver.wait()
                flag.lower()
                command.refuse(
                    "train.py",
                    f"stopped at step {result.step}: the gradients of {course.bad} steps in a row were not finite; "
                    f"lower --optimizer.rate (now {config.optimizer.rate}) or look at the data",
                )
        if saves or course.stopped:
            saver.save(step, state_of(model, optimizer, step, course.skipped))
    bar.close()
    saver.wait()
    flag.lower()
    folder.plot()
    if course.stopped and step < config.steps:
        say(f"stopped at step {step} of {config.steps}; the same command goes on from there")
    elif config.report:
        report(say, config, model, ops, mesh, folder, training, validation, device)


def line_of(config: Train, result: Result, skipped: int, speed: float, device) -> dict:
    line = {
        "step": result.step,
        "loss": result.loss,
        f"{objective(config.objective).prefix}bits": result.loss / math.log(2),
        "norm": result.norm,
        "rate": rate(config, result.step - 1),
        "skipped": skipped,
        "tokens_per_second": round(speed),
        "memory_mib": round(memory_mib(device)),
    }
    return json_numbers(line | (experts_of_line(config, result.load) if result.load is not None else {}))


def experts_of_line(config: Train, load: Load) -> dict:
    """How the experts were used: over all layers, and a list a layer."""
    model, n = config.model, load.tokens.clamp(min=1)
    pairs = load.counts.sum(-1).clamp(min=1)
    layers = {
        "violation": violation(load.counts),  # the busiest expert over the mean, - 1
        "dropped": load.dropped.sum(-1) / pairs,  # share of pairs
        "entropy": load.entropy / n,  # of a token's distribution over experts, nats
    }
    losses = {name: LOSS[name].value(load, load, model.top_k, model.groups) for name in {"switch", *config.balances()}}
    return {
        "balance": losses["switch"].mean().item(),  # 1 at perfect balance
        "violation": layers["violation"].max().item(),
        "dropped": (load.dropped.sum() / pairs.sum()).item(),
        "entropy": layers["entropy"].mean().item(),
        "losses": {name: value.mean().item() for name, value in losses.items()},
        "layers": {name: value.tolist() for name, value in (layers | losses).items()},
    }


def json_numbers(x):
    """NaN and infinity, which JSON does not know, as null."""
    if isinstance(x, dict):
        return {name: json_numbers(y) for name, y in x.items()}
    if isinstance(x, list):
        return [json_numbers(y) for y in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x


def spoken(goal: Objective, line: dict, result: Result) -> str:
    text = f"step {line['step']:5d}  loss {result.loss:.4f} ({result.loss / math.log(2):.3f} bits per {goal.one})  "
    if result.load is not None:
        text += f"balance {line['balance']:.3f}  "
    text += f"{line['tokens_per_second']} tokens/s  {line['memory_mib']} MiB"
    part = f"{goal.prefix}validation_part"
    if part in line:
        text += f"  part of validation {line[part]:.3f}"
    return text if result.finite else text + f"  gradients not finite: step skipped ({line['skipped']} so far)"


def introduce(say, config: Train, model, mesh, ops, device, step: int) -> None:
    from reference.model import sizes

    count = sizes(config.model)
    say(
        f"{config.model.letters}: {config.model.lsm}, {config.model.router}; "
        f"{count['total']:,} parameters, {count['active']:,} active"
    )
    say(f"backend {ops.name} on {device}, {config.precision}; {mesh}; run folder {config.out}")
    if mesh.pipeline_size > 1:
        for line in pipeline.told(model, mesh):
            say(line)
        times = feed_of(config, mesh).times
        say(f"{times} micro-batches a step: a rank waits at most {pipeline.bubble(mesh, times):.0%} of even passes")
    elif mesh.size > 1:
        held = [
            f"{mine:,} of {all_:,} parameters of {part}" for part, (mine, all_) in shard.held(model).items() if all_
        ]
        say(f"rank 0 holds {' and '.join(held)}")
        if shard.by_windows(mesh.shards, shard.windows_of(mesh)):
            say("parameters and gradients travel by the GPUs' copy engines (--mesh.no-windows: by NCCL)")
    if "E" in config.model.letters:
        rules = [f"{name} loss x {weight:g}" for name, weight in config.balances().items()]
        rules += [f"a bias that moves by {config.bias_rate:g} a step"] * row(config.model.router).bias
        chosen = row(config.model.router)
        alone = "nothing" if chosen.pooled == "never" and not chosen.offered else "how the router chooses"
        say(f"experts kept busy by {', '.join(rules) or alone} (a layer)")
    if step:
        say(f"resumed at step {step} of {config.steps}" + ("; nothing left to train" if step >= config.steps else ""))


# ---------------------------------------------------------------------------------------------------- the report


def report(say, config: Train, model, ops, mesh, folder: Folder, training, validation, device) -> None:
    """Bits on all validation text, per byte beside what simple models get; then text that the model wrote."""
    from generate import continuations

    if folder.goal.causal:
        beside_simple_models(say, config, model, ops, mesh, folder, training, validation, device)
    else:
        bits = validate(config, model, ops, mesh, validation, device)
        folder.log(step=config.steps, **{f"{folder.goal.prefix}validation": bits})
        folder.plot()
        say(f"validation: {bits:.3f} bits per {folder.goal.one}")
    if mesh.size == 1:
        try:
            writer, otherwise = for_writing(model)
        except ValueError as reason:
            return say(f"no text: {reason}")
        if otherwise:
            say(otherwise)
        for text in continuations(writer, validation, training, device, seed=config.seed):
            say(text)


def beside_simple_models(say, config: Train, model, ops, mesh, folder: Folder, training, validation, device) -> None:
    from data import baselines

    core = corpus.without_tests(validation)
    rest = [d for d in validation if d not in set(core)]
    parts = [
        (sum(len(d.text) for d in ds), validate(config, model, ops, mesh, ds, device)) for ds in (core, rest) if ds
    ]
    whole = sum(size * bits for size, bits in parts) / sum(size for size, _ in parts)
    folder.log(step=config.steps, validation=whole, validation_without_tests=parts[0][1] if core else None)
    folder.plot()
    if mesh.rank == 0:
        say("baselines: byte models of order 2 and 4 with back-off, and zlib ...")
        table = {}
        for name, documents in (("validation", validation), ("without tests", core)):
            if documents:
                table[name] = [*baselines.ngrams(training, documents).values(), baselines.zlib_bits(documents)]
        say(f"{'bits per byte':16}{'model':>8}{'order 2':>9}{'order 4':>9}{'zlib -9':>9}")
        for (name, values), bits in zip(table.items(), (whole, parts[0][1]), strict=False):
            say(f"{name:16}{bits:8.3f}" + "".join(f"{x:9.3f}" for x in values))


def main() -> None:
    config = command.choose(PRESETS, "train.py", __doc__)
    place = Place()
    try:
        with failures(config, place):
            with command.mistakes("train.py"):
                meshes.launch(config.timeout)
            train(config, place)
    finally:
        meshes.close()


if __name__ == "__main__":
    main()
