"""What each row can learn: small models on small tasks, one JSON line a cell, and a picture of the grid.

    python learn.py grid --tasks parity --rows gla delta_net delta_net_negative --out FILE      on a CPU, minutes
    python learn.py grid --workers 16 --commit HASH --out FILE                         every row and task, 16 cores
    python learn.py draw FILE --figure docs/tasks.png

A cell is a row, a task of `data.tasks` and a seed. A model of a few layers learns the task from nothing, at each rate
of a sweep until one solves it; the rate with the best accuracy on held-out samples is kept. `longer` is the same
model's accuracy on longer samples than it ever saw. Cells that the file already has are not run again: the same line
goes on where it was cut off. A cell that cannot run becomes a line with the reason.
"""

import argparse
import datetime
import json
import math
import multiprocessing
import platform
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

import command
from bench import commit, machine
from command import at_least
from data.tasks import TASK, Samples, samples
from reference.balance import LOSS
from reference.lsm import LSM
from reference.mixers.parts import normal
from reference.model import LanguageModel, decayed, initialize, starts, state_bytes
from reference.ops import Ops
from reference.presets import Model
from reference.printed import PRINTED
from reference.recurrence import delta

SOLVED = 0.99  # of the held-out labels: no further rate is tried
FEED_FORWARD = {"dense": "D", "experts": "E"}  # what stands behind each mixer


class Variant(NamedTuple):
    """A line of the grid: the letter of its mixer in a pattern, and the model's fields that make it this one."""

    title: str
    letter: str
    model: dict


def variants() -> dict[str, Variant]:
    """Every row of the table but the survey's looser ones; delta rules once more with write strengths up to 2; softmax
    attention beside them."""
    found = {}
    for name, row in LSM.items():
        if name in PRINTED:
            continue
        found[name] = Variant(row.title, "L", {"lsm": name})
        if row.update is delta:
            found[f"{name}_negative"] = Variant(f"{row.title}, β ≤ 2", "L", {"lsm": name, "negative_eigenvalues": True})
    return found | {"softmax": Variant("Softmax attention", "N", {})}


def flag(default, about: str, **how):
    """A field of `Cell` that the command line sets."""
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    return field(default=default, metadata={"default": default, "help": f"{about} (default: {shown})", **how})


COUNT = {"type": at_least(int, 1), "metavar": "N"}


@dataclass(frozen=True)
class Cell:
    """All that a training depends on: the same cell gives the same model on the same machine."""

    row: str  # a key of `variants()`
    task: str  # a key of `TASK`
    seed: int = 0  # of the parameters and of the samples
    steps: int = flag(1000, "trained at each rate", **COUNT)
    batch: int = flag(32, "samples a step", **COUNT)
    rates: tuple[float, ...] = flag(
        (3e-3, 1e-2),
        "peak learning rates, in order until one solves",
        type=at_least(float, 0),
        nargs="+",
        metavar="R",
    )
    layers: int = flag(2, "mixers, each with a feed-forward layer behind it", **COUNT)
    width: int = flag(64, "of the residual stream; dense layers are twice as wide", **COUNT)
    heads: int = flag(2, "of every mixer", **COUNT)
    feed_forward: str = flag("dense", "what stands behind each mixer", choices=list(FEED_FORWARD))
    tests: int = flag(512, "held-out samples, of the trained sizes and of the longer ones", **COUNT)
    backend: str = flag("reference", "whose ops", choices=["reference", "fast"])

    def config(self) -> Model:
        row, task = variants()[self.row], TASK[self.task]
        return Model(
            pattern=row.letter + FEED_FORWARD[self.feed_forward],
            repeat=self.layers,
            width=self.width,
            heads=self.heads,
            dense_width=2 * self.width,
            expert_width=self.width,
            vocabulary=task.vocabulary(**task.sizes),
            **row.model,
        )


OPTIONS = {f.name: f.metadata for f in fields(Cell) if f.metadata}

# --------------------------------------------------------------------------------------------------------- learning


class Learned(NamedTuple):
    """What one training came to."""

    accuracy: float  # on held-out samples of the trained sizes
    longer: float  # on held-out samples of the task's longer sizes
    loss: float | None  # mean of the last hundred steps; None if it is not finite
    parameters: int
    state_bytes: int  # what one sample of the trained sizes leaves in the model


def learn(cell: Cell, rate: float, device: str = "cpu", bar: tqdm | None = None) -> Learned:
    """Train at one peak rate: AdamW, warm-up over a tenth of the steps, cosine to zero, gradients clipped at 1."""
    config = cell.config()
    model = LanguageModel(config, ops_of(cell.backend))
    initialize(model, cell.seed, narrow(model))
    model.to(device)
    optimizer, losses = optimizer_of(model), []
    for step in range(cell.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule(step, cell.steps)
        indices = range(step * cell.batch, (step + 1) * cell.batch)
        batch = on(device, samples(cell.task, indices, cell.seed))
        out = model(batch.tokens, batch.labels)
        loss = out.losses.sum() / (batch.labels >= 0).sum()
        losses = [*losses[-99:], loss.detach()]
        optimizer.zero_grad()
        balanced = balance(out.loads, config.top_k) + sum(balance(load, k) for k, load in out.inside)
        (loss + balanced).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if bar is not None:
            bar.update()
    last = torch.stack(losses).mean().item()
    task = TASK[cell.task]
    return Learned(
        accuracy=accuracy(model, cell, device),
        longer=accuracy(model, cell, device, **{name: task.sizes[name] * times for name, times in task.longer.items()}),
        loss=last if math.isfinite(last) else None,
        parameters=sum(p.numel() for p in model.parameters()),
        state_bytes=state_bytes(left(model, batch.tokens[:1])),
    )


def narrow(model: LanguageModel) -> dict:
    """How the parameters start: as the model says, but the matrices inside as torch's linear layers do, with a standard
    deviation of (3 inputs)^-0.5. The model's own 0.02 is that of a thousand channels and too still for a few."""
    matrices = decayed(model) - {"embedding", "head"}
    return {
        name: (shape, normal((3 * shape[-1]) ** -0.5) if name in matrices else start)
        for name, (shape, start) in starts(model).items()
    }


def ops_of(backend: str) -> Ops:
    if backend == "fast":
        from fast.ops import ops
    else:
        from reference.ops import ops
    return ops


def optimizer_of(model: LanguageModel) -> torch.optim.Optimizer:
    """AdamW; weight decay for the parameters that the model names."""
    matrices = decayed(model)
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in matrices) == decays], "weight_decay": 0.01 * decays}
        for decays in (True, False)
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def schedule(step: int, steps: int) -> float:
    """The share of the peak rate."""
    return min(10 * (step + 1) / steps, (1 + math.cos(math.pi * step / steps)) / 2)


def balance(loads, top_k: int) -> Tensor | float:
    """A little of the balance loss, where there are routers."""
    if loads is None:
        return 0.0
    return 0.01 * LOSS["switch"].value(loads, loads, top_k, 1).sum()


def on(device: str, batch: Samples) -> Samples:
    return Samples(*(x.to(device) for x in batch))


@torch.no_grad()
def accuracy(model: LanguageModel, cell: Cell, device: str, **sizes: int) -> float:
    """The share of right answers among the labels of held-out samples."""
    right = asked = 0
    for start in range(0, cell.tests, 64):
        indices = range(start, min(start + 64, cell.tests))
        batch = on(device, samples(cell.task, indices, cell.seed, test=True, **sizes))
        labelled = batch.labels >= 0
        right += (model(batch.tokens).logits.argmax(-1) == batch.labels)[labelled].sum().item()
        asked += labelled.sum().item()
    return right / asked


@torch.no_grad()
def left(model: LanguageModel, tokens: Tensor) -> tuple:
    return model(tokens, keep_state=True).state.mixers


# ---------------------------------------------------------------------------------------------------------- the grid


def grid(args) -> None:
    """Train every cell of rows x tasks x seeds that the file does not have yet, and append its line."""
    cells = [
        Cell(row, task, seed, *(getattr(args, name) for name in OPTIONS))
        for seed in range(args.seeds)
        for task in args.tasks or TASK
        for row in args.rows or variants()
    ]
    with command.mistakes("learn.py"):
        if args.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device is cuda but no GPU was found; use --device cpu")
        if args.backend == "fast" and args.device == "cpu":
            raise ValueError("the kernels of backend fast need --device cuda; on a CPU there is --backend reference")
        for cell in cells:
            cell.config()
        out = Path(args.out)
        done = [key(line) for line in read(out) if "reason" not in line] if out.exists() else []
    torch.set_num_threads(1)  # matrices this small are slower on several
    cells = [cell for cell in cells if key(asdict(cell)) not in done]
    out.parent.mkdir(parents=True, exist_ok=True)
    everywhere = facts(args)
    with out.open("a") as file, tqdm(total=len(cells), unit="cell", disable=None) as bar:
        for line in lines(cells, args.device, args.workers):
            print(json.dumps({**everywhere, **line}, ensure_ascii=False), file=file, flush=True)
            bar.write(as_text(line))
            bar.update()


def lines(cells: list[Cell], device: str, workers: int) -> Iterator[dict]:
    """The cells' lines as they get ready, from that many processes of one CPU thread each (1: this process)."""
    if workers == 1:
        yield from (line_of(cell, device, shown=True) for cell in cells)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the GPU's state
    with ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(line_of, cell, device) for cell in cells]):
            yield future.result()


def line_of(cell: Cell, device: str, shown: bool = False) -> dict:
    """The sweep: rates in turn until one solves the task, and the best of them. Or why the cell cannot run."""
    begin, tried = time.perf_counter(), {}
    head = {**asdict(cell), "rates": list(cell.rates), "title": variants()[cell.row].title, "device": device}
    try:
        for rate in cell.rates:
            with tqdm(total=cell.steps, desc=f"{cell.row} {cell.task} {rate:g}", leave=False, disable=not shown) as bar:
                tried[rate] = learn(cell, rate, device, bar)
            if tried[rate].accuracy >= SOLVED:
                break
    except Exception as error:  # one row's fault must not end the grid
        return {**head, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
    best = max(tried, key=lambda rate: tried[rate].accuracy)
    return {
        **head,
        "rate": best,
        **tried[best]._asdict(),
        "tried": {f"{rate:g}": found.accuracy for rate, found in tried.items()},
        "seconds": round(time.perf_counter() - begin, 1),
    }


def key(line: dict) -> tuple:
    """What makes two lines the same cell."""
    return tuple(json.dumps(line.get(name)) for name in (f.name for f in fields(Cell)))


def facts(args) -> dict:
    """Where, when and with what: repeated on every line, so that a line can be read alone."""
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(args.device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": args.commit,
        "command": "python learn.py " + " ".join(Path(a).name if a == args.out else a for a in sys.argv[1:]),
    }


def as_text(line: dict) -> str:
    head = f"{line['task']:12} {line['row']:32}"
    if "reason" in line:
        return f"{head} unavailable: {line['reason']}"
    found = f"accuracy {line['accuracy']:.3f}  longer {line['longer']:.3f}  rate {line['rate']:g}"
    return f"{head} {found}  {line['seconds']:.0f} s"


def read(file: Path) -> list[dict]:
    """The lines of a file. ValueError names the first that is no cell."""
    found = []
    for number, text in enumerate(file.read_text().splitlines(), 1):
        try:
            found.append(json.loads(text))
            found[-1]["row"], found[-1]["task"], found[-1]["seed"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}: line {number} is no cell of a grid: {error}") from None
    return found


# ------------------------------------------------------------------------------------------------------- the picture

LABELS, COLUMN, GAP, STATE, HEAD, LINE = 236, 61, 8, 52, 72, 20  # pixels of a picture about 800 wide
PAPER, INK, QUIET = "#ffffff", "#1f2933", "#66727f"
SHADES = ((0.94, 0.95, 0.97), (0.13, 0.36, 0.58))  # of chance and of 1
# the same bytes every time, letters as paths
STYLE = {"svg.fonttype": "path", "svg.hashsalt": "learn"}
METADATA = {".png": {"Software": None}, ".svg": {"Date": None, "Creator": None}}
FONT = {"family": "DejaVu Sans", "va": "center_baseline"}  # comes with matplotlib


def draw(args) -> None:
    """A heat map from the lines of the grid: accuracy in percent, on the trained and on the longer sizes."""
    with command.mistakes("learn.py"):
        found = [line for file in args.files for line in read(opened(Path(file)))]
        file = Path(args.figure)
        if file.suffix not in METADATA:
            raise ValueError(f"a picture ends in {' or '.join(METADATA)}, found {args.figure}")
        figure = picture(found)
        file.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            figure.savefig(file, dpi=200, metadata=METADATA[file.suffix])
    print(file)


def opened(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"no results at {file}: expected a file that `learn.py grid` wrote")
    return file


class Mean(NamedTuple):
    """A cell of the picture: means over seeds, each by its latest line."""

    accuracy: float
    longer: float
    state_bytes: int


def means(found: list[dict]) -> dict[tuple[str, str], Mean]:
    latest = {(line["row"], line["task"], line["seed"]): line for line in found if "reason" not in line}
    cells: dict[tuple[str, str], list[dict]] = {}
    for (row, task, _), line in latest.items():
        cells.setdefault((row, task), []).append(line)
    return {
        where: Mean(*(sum(line[name] for line in several) / len(several) for name in Mean._fields))
        for where, several in cells.items()
    }


class Page(NamedTuple):
    """Axes whose coordinates are pixels from the top left corner."""

    axes: object

    def text(self, x: float, y: float, what: str, pixels: float = 11.0, color: str = INK, **how) -> None:
        self.axes.text(x, y, what, fontsize=0.72 * pixels, color=color, **{"ha": "center", **FONT, **how})

    def cell(self, x: float, y: float, share: float | None, chance: float) -> None:
        """A share in percent, never rounded up, the darker the better; a dash where nothing was measured."""
        depth = 0.0 if share is None else max(0.0, (share - chance) / (1 - chance))
        low, high = SHADES
        fill = [a + depth * (b - a) for a, b in zip(low, high, strict=True)]
        self.axes.fill([x, x + COLUMN, x + COLUMN, x], [y, y, y + LINE, y + LINE], color=fill, ec=PAPER, lw=1)
        said = "–" if share is None else f"{math.floor(100 * share)}"
        self.text(x + COLUMN / 2, y + LINE / 2, said, color=PAPER if depth > 0.55 else INK)


def picture(found: list[dict]) -> Figure:
    """The figure: rows in the order of `variants()`, two columns for each task, and what a model keeps of a text."""
    if not found:
        raise ValueError("there are no cells to draw")
    titles, cells = {line["row"]: line["title"] for line in found}, means(found)
    rows = [*(name for name in variants() if name in titles), *(name for name in titles if name not in variants())]
    names = [name for name in TASK if any(line["task"] == name for line in found)]
    width = LABELS + (2 * COLUMN + GAP) * len(names) + STATE
    height = HEAD + LINE * len(rows) + GAP
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor=PAPER)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    page = Page(axes)
    page.text(LABELS - 10, 56, "held-out accuracy in %", 10, QUIET, ha="right")
    for j, row in enumerate(rows):
        page.text(LABELS - 10, HEAD + (j + 0.5) * LINE, titles[row], ha="right")
    for i, name in enumerate(names):
        column(page, LABELS + i * (2 * COLUMN + GAP), name, [cells.get((row, name)) for row in rows])
    memories(
        page, width - 4, [max((c.state_bytes for (r, _), c in cells.items() if r == row), default=None) for row in rows]
    )
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    return figure


def column(page: Page, x: float, name: str, cells: list[Mean | None]) -> None:
    """A task: its heading, and for each row the accuracy on the trained and on the longer samples."""
    task = TASK[name]
    chance = 1 / task.answers(**task.sizes)
    page.text(x + COLUMN, 14, name.capitalize(), 13, weight="bold")
    page.text(x + COLUMN, 32, f"chance {100 * chance:.0f}", 10.5, QUIET)
    size, times = next(iter(task.longer.items()))
    for k, shown in enumerate((task.sizes[size], task.sizes[size] * times)):
        page.text(x + (k + 0.5) * COLUMN, 56, f"{size} {shown}", 10, QUIET)
        for j, cell in enumerate(cells):
            page.cell(x + k * COLUMN, HEAD + j * LINE, None if cell is None else cell[k], chance)


def memories(page: Page, x: float, sizes: list[float | None]) -> None:
    page.text(x, 14, "state", 10.5, QUIET, ha="right")
    page.text(x, 32, "KiB", 10.5, QUIET, ha="right")
    for j, size in enumerate(sizes):
        said = "–" if size is None else f"{size / 1024:.0f}"
        page.text(x, HEAD + (j + 0.5) * LINE, said, 10.5, QUIET, ha="right")


# -------------------------------------------------------------------------------------------------- the command line


def parser() -> command.Parser:
    top = command.Parser("learn.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    run = commands.add_parser("grid", help=grid.__doc__.splitlines()[0])
    run.add_argument("--rows", nargs="+", choices=list(variants()), metavar="ROW", help="lines of the grid (all)")
    run.add_argument("--tasks", nargs="+", choices=list(TASK), metavar="TASK", help="columns of the grid (all)")
    run.add_argument("--seeds", type=at_least(int, 1), default=1, metavar="N", help="trainings a cell (1)")
    for name, how in OPTIONS.items():
        run.add_argument(f"--{name.replace('_', '-')}", **how)
    run.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    run.add_argument(
        "--workers",
        type=at_least(int, 1),
        default=1,
        metavar="N",
        help="cells at a time, each in a process (1)",
    )
    run.add_argument("--commit", default=commit(), help="of the code that learns")
    run.add_argument("--out", required=True, help="file of JSON lines, appended to")
    run.set_defaults(run=grid)
    show = commands.add_parser("draw", help=draw.__doc__.splitlines()[0])
    show.add_argument("files", nargs="+", help="what `grid` wrote")
    show.add_argument("--figure", required=True, help="picture to write: .png or .svg")
    show.set_defaults(run=draw)
    return top


def main() -> None:
    args = parser().parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
