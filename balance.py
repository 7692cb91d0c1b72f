"""What balancing does to experts: one short training run a rule on one CPU core, a JSON line each, and a picture.

    python balance.py run --commit HASH --out FILE                     every rule, half a minute each
    python balance.py run --rules none switch --steps 100 --out FILE
    python balance.py draw FILE --figure docs/balance.png

Every run trains the same two layers on the same bytes by the trainer's own step; what differs is the rule that keeps
the experts equally busy, or that there is none. A line has, for every few steps, each expert's share of the pairs, how
sure the router is, what was dropped, and the loss. Rules that the file already has are not run again.
"""

import argparse
import datetime
import json
import math
import platform
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

import command
import train
from bench import commit, machine
from command import at_least
from data import corpus
from data.stream import Stream
from parallel import mesh as meshes
from reference.balance import LOSS, violation
from reference.ops import ops
from reference.presets import Model
from reference.routers import ROUTER, Load
from train import Optimizer, Train


class Rule(NamedTuple):
    """A panel of the picture: a router, and what keeps its experts equally busy."""

    title: str
    router: str  # a row of `ROUTER`
    losses: dict[str, float] | None  # and their weights a layer; None: the router's own
    top_k: int = 2
    bias_rate: float = 1e-3  # a step, as published, for the routers that have a balancing bias


RULES = {
    "none": Rule("no balancing", "mixtral", {}),
    "z": Rule(f"{LOSS['z'].title} alone", "mixtral", {"z": 0.001}),
    "switch": Rule(LOSS["switch"].title, "mixtral", {"switch": 0.01}),
    "first": Rule(LOSS["first"].title, "mixtral", {"first": 0.01}),
    "sequence": Rule(LOSS["sequence"].title, "mixtral", {"sequence": 0.01}),
    "noisy": Rule("noise, importance and load", "noisy", None),
    "bias": Rule(f"{ROUTER['deepseek_v3'].title}'s bias, 0.001", "deepseek_v3", {}),
    "bias_fast": Rule(f"{ROUTER['deepseek_v3'].title}'s bias, 0.01", "deepseek_v3", {}, bias_rate=1e-2),
    "penalty": Rule(LOSS["penalty"].title, "remoe", None),
    "expert_choice": Rule(ROUTER["expert_choice"].title, "expert_choice", None),
    "base": Rule(f"{ROUTER['base'].title}, top-1", "base", None, 1),
    "sinkhorn": Rule(ROUTER["sinkhorn"].title, "sinkhorn", None),
    "capacity": Rule("capacity 1.25, top-1, no loss", "switch", {}, 1),
    "capacity_loss": Rule("capacity 1.25, Switch's loss", "switch", None, 1),
}

# ---------------------------------------------------------------------------------------------------------- the runs


def config_of(rule: Rule, steps: int, seed: int) -> Train:
    """The same for every rule but the router, its losses and its k: a rate high enough that experts are lost early."""
    model = Model(
        pattern="L",
        repeat=2,
        lsm="mamba2",
        width=64,
        router=rule.router,
        experts=16,
        top_k=rule.top_k,
        expert_width=32,
    )
    optimizer = Optimizer(rate=1e-2, warmup=10)
    return Train(
        model=model,
        length=128,
        optimizer=optimizer,
        steps=steps,
        batch=8,
        balance=rule.losses,
        bias_rate=rule.bias_rate,
        seed=seed,
        backend="reference",
        device="cpu",
    )


def curves(config: Train, every: int, bar: tqdm | None = None) -> dict:
    """Train once: the points of the curves, one for each `every` steps, and bits per byte on held-out text."""
    device = torch.device("cpu")
    mesh = meshes.make(config.mesh, device)
    training, held_out = corpus.split(corpus.load(config.data))
    stream, feed = Stream(training, config.length, config.seed), train.feed_of(config, mesh)
    model, matrices = train.model_of(config, ops, mesh, device)
    optimizer = train.optimizer_of(config, model, matrices)
    points, since = [], []
    for step in range(config.steps):
        batches = train.micro_batches(config, stream, feed, mesh, step, device)
        since.append(train.one_step(config, model, ops, optimizer, batches, step, stop=False))
        if len(since) == every or step + 1 == config.steps:
            points.append(point(step + 1, since))
            since = []
        if bar is not None:
            bar.update()
    return {
        "points": points,
        "held_out_bits": train.validate(config, model, ops, mesh, held_out, device, config.evaluate_batches),
    }


def point(step: int, results: list[train.Result]) -> dict:
    """What some steps did, over all their tokens: lists have a number a layer, the shares a list of its experts."""
    load = Load(*map(sum, zip(*(result.load for result in results), strict=True)))
    pairs = load.counts.sum(-1).clamp(min=1)
    P = load.probability.detach() / load.probability.detach().sum(-1, keepdim=True)
    values = {
        "share": load.counts / pairs[:, None],  # of the pairs, the dropped ones included
        "visits": load.counts.sum(-1) / load.tokens,  # experts that a token asks for
        "violation": violation(load.counts),  # the busiest expert over the mean, - 1
        "entropy": load.entropy / load.tokens,  # nats, of a token's distribution over experts: the mean
        "mean_entropy": torch.special.entr(P).sum(-1),  # nats, of the mean of these distributions
        "dropped": load.dropped.sum(-1) / pairs,  # share of the pairs that found their expert full
    }
    bits = sum(result.loss for result in results) / len(results) / math.log(2)
    return train.json_numbers({"step": step, "bits": round(bits, 4), **{n: rounded(x) for n, x in values.items()}})


def rounded(values: torch.Tensor) -> list:
    """As lists, to four digits behind the point."""
    return (values.double() * 1e4).round().div(1e4).tolist()


def run(args) -> None:
    """Train with every rule that the file does not have yet, and append its line."""
    with command.mistakes("balance.py"):
        out = Path(args.out)
        configs = {name: config_of(RULES[name], args.steps, args.seed) for name in args.rules or RULES}
        done = [key(line) for line in read(out)] if out.exists() else []
    torch.set_num_threads(1)  # matrices this small are slower on several
    heads = [
        {"rule": name, "title": RULES[name].title, "every": args.every, "config": plain(config)}
        for name, config in configs.items()
    ]
    heads = [head for head in heads if key(head) not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file, tqdm(total=args.steps * len(heads), unit="step", disable=None) as bar:
        for head in heads:
            bar.set_description(head["rule"])
            line = facts(args) | head | curves(configs[head["rule"]], args.every, bar)
            print(json.dumps(line, ensure_ascii=False), file=file, flush=True)
            bar.write(as_text(line))


def plain(config: Train) -> dict:
    """The configuration as JSON has it; infinity, which JSON does not know, as null."""
    return json.loads(json.dumps(asdict(config)), parse_constant=lambda _: None)


def key(line: dict) -> str:
    """What makes two lines the same run."""
    return json.dumps([line[name] for name in ("rule", "every", "config")], sort_keys=True)


def facts(args) -> dict:
    """Where, when and with what."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine("cpu"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": args.commit,
        "command": "python balance.py " + " ".join(Path(a).name if a == args.out else a for a in sys.argv[1:]),
    }


def as_text(line: dict) -> str:
    end = ending(line)
    return (
        f"{titled(line):32} violation {end.violation:.2f}  idle {end.idle}  dropped {end.dropped:.3f}  "
        f"router entropy {end.entropy:.2f} of {math.log(end.experts):.2f}  bits {end.bits:.2f}"
    )


def read(file: Path) -> list[dict]:
    """The lines of a file. ValueError names the first that is no run."""
    found = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            found.append(json.loads(text))
            key(found[-1]), found[-1]["title"], found[-1]["points"][-1]["share"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{file}: line {number} is no run of balance.py: {error}") from None
    return found


# ------------------------------------------------------------------------------------------------------ what was seen

LAST, IDLE = 50, 0.1  # steps that an ending is the mean of; the part of an even share below which an expert is idle


class Ending(NamedTuple):
    """The mean of a run's last steps, in the layer that the picture shows: the last one."""

    experts: int
    violation: float  # the busiest expert over the mean, - 1
    idle: int  # experts with less than a tenth of an even share
    visits: float  # experts that a token asks for
    entropy: float  # nats, of a token's distribution
    mean_entropy: float  # nats, of the mean distribution
    dropped: float  # share of pairs
    bits: float  # a byte, in training
    held_out_bits: float


def ending(line: dict) -> Ending:
    last = [p for p in line["points"] if p["step"] > line["points"][-1]["step"] - LAST]
    shares = [mean(p["share"][-1][e] for p in last) for e in range(len(last[-1]["share"][-1]))]
    names = ("violation", "visits", "entropy", "mean_entropy", "dropped")
    return Ending(
        experts=len(shares),
        idle=sum(share < IDLE / len(shares) for share in shares),
        bits=mean(p["bits"] for p in last),
        held_out_bits=line["held_out_bits"],
        **{name: mean(p[name][-1] for p in last) for name in names},
    )


def mean(values: Iterable[float | None]) -> float:
    """Of those that there are: a layer that no token visited has no violation."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else math.nan


# ------------------------------------------------------------------------------------------------------- the picture

WIDTH, COLUMNS, MARGIN, GAP = 880, 4, 34, 14  # pixels
HEAD, AREA, CURVES, FOOT, LEGEND = 38, 84, 58, 22, 104  # heights: a panel from top to bottom, and below them all
PAPER, INK, QUIET, FAINT = "#ffffff", "#1f2933", "#66727f", "#d5dae0"
STRIPES = ("#2f5d8a", "#9dbbd8", "#4f7fab", "#c9dbea")  # of the experts, neighbours told apart by lightness
# name -> what it says, colour (of Okabe and Ito, safe for colour-blind readers), dashes
CURVE = {
    "dropped": ("share of visits dropped, their expert being full", "#cc79a7", "-"),
    "entropy": (
        "entropy of a token's router scores over that of even ones: 1 undecided, 0 sure",
        "#000000",
        (0, (4, 1.5)),
    ),
    "violation": ("busiest expert: 0 as busy as the mean, 1 as busy as it can be", "#d55e00", "-"),
}
# the same bytes every time, letters as paths
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "balance"}
METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
FONT = {"family": "DejaVu Sans"}  # comes with matplotlib


def draw(args) -> None:
    """A panel a rule: the experts' shares of the last layer over the steps, and curves of how even they are."""
    with command.mistakes("balance.py"):
        found = read(opened(Path(args.file)))
        file = Path(args.figure)
        if file.suffix not in METADATA:
            raise ValueError(f"a picture ends in {' or '.join(METADATA)}, found {args.figure}")
        with matplotlib.rc_context(STYLE):
            figure = picture(found)
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file, dpi=150, metadata=METADATA[file.suffix])
    print(file)


def opened(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"no results at {file}: expected a file that `balance.py run` wrote")
    return file


def picture(found: list[dict]) -> Figure:
    """The figure: a panel for each rule, in the order of `RULES`, by its latest line; the legend below."""
    if not found:
        raise ValueError("there are no runs to draw")
    latest = {line["rule"]: line for line in found}
    lines = [latest[name] for name in [*RULES, *(latest.keys() - RULES.keys())] if name in latest]
    rows = math.ceil(len(lines) / COLUMNS)
    high = HEAD + AREA + CURVES + FOOT
    height = rows * high + LEGEND
    figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor=PAPER)
    FigureCanvasAgg(figure)
    wide = (WIDTH - MARGIN - GAP * COLUMNS) / COLUMNS
    for i, line in enumerate(lines):
        x, y = MARGIN + (i % COLUMNS) * (wide + GAP), (i // COLUMNS) * high
        panel(figure, line, x, y, wide, first=i % COLUMNS == 0)
    legend(figure, rows * high, lines)
    return figure


def axes(figure: Figure, x: float, y: float, wide: float, high: float):
    """Axes at a place in pixels from the top left corner."""
    width, height = 100 * figure.get_size_inches()
    found = figure.add_axes((x / width, 1 - (y + high) / height, wide / width, high / height))
    found.tick_params(length=2, pad=2, labelsize=6.8, colors=QUIET, width=0.6)
    for spine in found.spines.values():
        spine.set(color=FAINT, linewidth=0.6)
    return found


def write(figure: Figure, x: float, y: float, what: str, pixels: float = 10.5, color: str = INK, **how) -> None:
    width, height = 100 * figure.get_size_inches()
    how = {"va": "center_baseline", **FONT, **how}
    figure.text(x / width, 1 - y / height, what, fontsize=0.72 * pixels, color=color, **how)


def panel(figure: Figure, line: dict, x: float, y: float, wide: float, first: bool) -> None:
    """A rule: its title and what it came to, its experts' shares, and the three curves, over the same steps."""
    end = ending(line)
    write(figure, x, y + 12, titled(line), 11, weight="bold")
    write(figure, x, y + 27, came_to(end), 9.1, QUIET)
    steps = [p["step"] for p in line["points"]]
    top, below = axes(figure, x, y + HEAD, wide, AREA), axes(figure, x, y + HEAD + AREA + 6, wide, CURVES - 6)
    experts = [[p["share"][-1][e] for p in line["points"]] for e in order(line)]
    colors = [STRIPES[e % len(STRIPES)] for e in range(end.experts)]
    top.stackplot(steps, experts, colors=colors, edgecolor=PAPER, linewidth=0.25)
    for name, (_, color, dashes) in CURVE.items():
        below.plot(steps, [of(p, end.experts)[name] for p in line["points"]], color=color, linestyle=dashes, lw=1.2)
    third = steps[-1] // 3
    for part, least, ticks in ((top, 0, []), (below, -0.06, [third, 2 * third])):
        part.set(xlim=(steps[0], max(steps[-1], steps[0] + 1)), ylim=(least, 1 - least), xticks=ticks, yticks=[0, 1])
        part.set_yticklabels(["0", "1"] if first else [])
        for label, place in zip(part.get_yticklabels(), ("bottom", "top"), strict=False):
            label.set_verticalalignment(place)  # two axes stand close


def titled(line: dict) -> str:
    """As the rules are called now; as the line says where there is no such rule any more."""
    return RULES[line["rule"]].title if line["rule"] in RULES else line["title"]


def came_to(end: Ending) -> str:
    """The words under a title; what was dropped only where something was."""
    dropped = f"dropped {100 * end.dropped:.0f} %, " if end.dropped else ""
    return f"max {1 + end.violation:.1f} ×, idle {end.idle}, {dropped}{end.bits:.2f} bits"


def of(p: dict, experts: int) -> dict[str, float]:
    """A point's curves in the last layer, each between 0 and 1: the violation over its most, e/k - 1 where tokens ask
    for k of e experts (e - 1 where for less than one); the entropy over its most, ln e."""
    most = experts / max(p["visits"][-1], 1) - 1
    violation = p["violation"][-1]
    return {
        "violation": math.nan if violation is None else violation / most if most > 0 else 0.0,
        "entropy": p["entropy"][-1] / math.log(experts),
        "dropped": p["dropped"][-1],
    }


def order(line: dict) -> list[int]:
    """The last layer's experts, the busiest of the last steps first."""
    last = [p["share"][-1] for p in line["points"] if p["step"] > line["points"][-1]["step"] - LAST]
    return sorted(range(len(last[0])), key=lambda e: -sum(shares[e] for shares in last))


def legend(figure: Figure, y: float, lines: list[dict]) -> None:
    """What the stripes, the curves and the words above them say."""
    last = lines[0]["points"][-1]["step"]
    for i, color in enumerate(STRIPES):
        swatch = axes(figure, MARGIN + 7 * i, y + 5, 7, 10)
        swatch.set(facecolor=color, xticks=[], yticks=[])
    said = f"each expert's share of all visits in the last layer, over {last} steps; the busiest at the end lie lowest"
    write(figure, MARGIN + 36, y + 10, said)
    for i, (name, color, dashes) in enumerate(CURVE.values()):
        at = y + 28 + 18 * i
        key = axes(figure, MARGIN, at - 5, 28, 10)
        key.plot([0, 1], [0, 0], color=color, linestyle=dashes, lw=1.4)
        key.axis("off")
        write(figure, MARGIN + 36, at, name)
    said = "in words: visits of the busiest expert over the mean, experts with under a tenth of the mean, training bits"
    said += f" per byte, of the last {LAST} steps"
    write(figure, MARGIN + 36, y + 28 + 18 * len(CURVE), said, color=QUIET)


# -------------------------------------------------------------------------------------------------- the command line


def parser() -> command.Parser:
    top = command.Parser("balance.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help=run.__doc__.splitlines()[0])
    runs.add_argument("--rules", nargs="+", choices=list(RULES), metavar="RULE", help=f"of {', '.join(RULES)} (all)")
    runs.add_argument("--steps", type=at_least(int, 1), default=300, metavar="N", help="of each run (300)")
    runs.add_argument("--every", type=at_least(int, 1), default=5, metavar="N", help="steps that a point adds up (5)")
    runs.add_argument("--seed", type=int, default=0, metavar="N", help="of parameters and data (0)")
    runs.add_argument("--commit", default=commit(), help="of the code that trains")
    runs.add_argument("--out", required=True, help="file of JSON lines, appended to")
    runs.set_defaults(run=run)
    show = commands.add_parser("draw", help=draw.__doc__.splitlines()[0])
    show.add_argument("file", help="what `run` wrote")
    show.add_argument("--figure", required=True, help="picture to write: .png or .svg")
    show.set_defaults(run=draw)
    return top


def main() -> None:
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
