"""What a training run would need, before anybody starts it.

    python -m parallel.plan a0.3b-2b --gpus 8                         the best meshes, and the best one in full
    python -m parallel.plan a0.3b-2b --gpus 64 --mesh.sequence 8      this mesh
    python -m parallel.plan a1b-7b --gpus 4096 --batch 4096 --json    numbers for programs

Every assumption is printed under the name of the option that changes it. Of a network it knows two bandwidths and two
latencies; numbers for many hosts are extrapolations.
"""

import argparse
import ast
import inspect
import itertools
import json
import sys
import typing
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Literal

import train
from command import Parser, at_least, mistakes, refuse
from parallel import mesh as trainers
from parallel import pipeline
from parallel.budget import (
    SIZES,
    Asked,
    Assumptions,
    Counted,
    Degrees,
    Run,
    Shape,
    Traffic,
    check,
    check_layers,
    counted,
    item,
    memory,
    on_meta,
    operations,
    saved,
    shape_of,
    times,
    traffic,
    wire,
)
from reference.moe import EXPERT
from reference.presets import PRESETS

PROG = "parallel.plan"


# -------------------------------------------------------------------------------------------------------- the answer


@dataclass(frozen=True)
class Plan:
    """All numbers of one mesh."""

    name: str
    asked: Asked
    counted: Counted
    shape: Shape
    operations: dict[str, dict[str, float]]
    memory: dict[str, float]
    traffic: list[Traffic]
    times: dict[str, float] = field(default_factory=dict)

    @property
    def step(self) -> float:
        return sum(self.times.values())

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.asked.run.batch * self.asked.run.length / self.step

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        return self.bytes <= self.asked.given.memory * 1e9

    @property
    def binds(self) -> str:
        return max(self.times, key=self.times.get)


def plan(name: str, asked: Asked, known: Counted | None = None) -> Plan:
    """ValueError, one line, for what cannot work. `known` saves counting the same model again."""
    asked = check(asked)
    known = known or counted(asked.model, asked.run, asked.given, asked.mesh)
    check_layers(asked, known)
    moved = traffic(asked, known)
    shape = shape_of(asked, known)
    by_part = operations(known, asked.run, asked.given)
    return Plan(name, asked, known, shape, by_part, memory(asked, known), moved, times(asked, known, moved))


def best(name: str, asked: Asked, n: int) -> list[Plan]:
    """The fastest meshes of data, sequence, heads, experts and replicas, those that fit first, then the smallest (to
    10 GB). ValueError if there is none."""
    plans, why = [], None
    for ranks, experts in itertools.product(divisors(min(asked.gpus, asked.given.host)), (False, True)):
        several = meshes(asked, ranks, experts)
        if not several:
            continue
        try:
            known = counted(asked.model, asked.run, asked.given, several[0])
        except ValueError as error:
            why = why or error
            continue
        for mesh in several:
            try:
                plans.append(plan(name, asked._replace(mesh=mesh), known))
            except ValueError as error:
                why = why or error
    if not plans:
        raise ValueError(f"no mesh of {asked.gpus} GPUs works; the first that was tried: {why}")
    return sorted(plans, key=lambda p: (not p.fits, 0 if p.fits else round(p.bytes, -10), -p.rate))[:n]


def meshes(asked: Asked, ranks: int, experts: bool) -> list[Degrees]:
    """Of those with so many ranks that share heads, and with experts shared out or not."""
    gpus, host, found = asked.gpus, asked.given.host, []
    for sequence, expert in itertools.product(divisors(gpus // ranks), divisors(min(gpus, host))):
        for shards in {gpus, min(gpus, host)}:
            if gpus % shards == 0 and (expert > 1) == experts:
                sizes = {"data": -1, "sequence": sequence, "tensor": ranks, "expert": expert}
                found.append(replace(asked.mesh, **sizes, replicas=gpus // shards))
    return found


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def objections(p: Plan) -> list[str]:
    """What the trainer has against this mesh: it refuses it, or this preset on it as it is."""
    mesh, found = p.asked.mesh, []
    try:
        trainers.check(trainers.Degrees(**asdict(mesh)), p.asked.gpus)
    except ValueError as error:
        found.append(f"refuses this mesh ({error})")
    try:
        if p.name in PRESETS:
            place = trainers.Mesh(
                sequence_size=mesh.sequence,
                tensor_size=mesh.tensor,
                attention=mesh.attention,
                states=mesh.states,
                pipeline_size=mesh.pipeline,
            )
            train.refuse_to_cut(replace(train.PRESETS[p.name][1], objective=p.asked.run.objective), place)
            if mesh.pipeline > 1:
                pipeline.refuse(on_meta(p.asked.model), place, p.shape.times)
    except ValueError as error:
        found.append(f"refuses the preset as it is ({error})")
    return found


# -------------------------------------------------------------------------------------------------------------- text


def text(p: Plan) -> str:
    a, mesh = p.asked, p.asked.mesh
    return "\n\n".join(
        block
        for block in (
            f"{p.name} on {a.gpus} GPU{'s' * (a.gpus > 1)}: {mesh}\n"
            f"a step: {a.run.batch} samples of {a.run.length} tokens; a GPU takes {p.shape.tokens:,} tokens at once, "
            f"{p.shape.times} time{'s' * (p.shape.times > 1)}",
            warned(p),
            table("parameters", parameters_of(p), ("part", "total", "active")),
            table(*operations_of(p), ("part", "forward", "training", "recomputed")),
            table(*memory_of(p), ()),
            table("received by a GPU in a step", traffic_of(p), ("axis", "what", "calls", "MB", "ms", "link")),
            table("a step, ms, estimated", times_of(p), ()),
            summary(p),
            assumptions(p),
            LEFT_OUT,
        )
        if block
    )


LEFT_OUT = """\
left out: sums of a few numbers, uneven routing, waiting for data, the framework's own memory and its fragments
memory adds up what may be there at the worst of three moments: loss, a block's backward pass, optimizer
time of pipelines and of several hosts was checked on no machine"""


def warned(p: Plan) -> str:
    return "\n".join(f"the trainer {line}" for line in objections(p))


def parameters_of(p: Plan) -> list[tuple]:
    rows = [(name, f"{part.total:,}", f"{part.active:,}") for name, part in p.counted.parts.items() if part.total]
    return [*rows, ("all", *(f"{p.counted.sum(what):,}" for what in ("total", "active")))]


def operations_of(p: Plan) -> tuple[str, list[tuple]]:
    kinds = ("forward", "training", "recomputed")
    sums = {kind: sum(n[kind] for n in p.operations.values()) for kind in kinds}
    unit, scale = unit_of(sums["training"])
    rows = [(name, *(f"{n[kind] / scale:.3f}" for kind in kinds)) for name, n in (p.operations | {"all": sums}).items()]
    return f"operations a token, {unit}FLOP", rows


def memory_of(p: Plan) -> tuple[str, list[tuple]]:
    unit, scale = unit_of(p.bytes)
    rows = [(name, f"{size / scale:.2f}") for name, size in p.memory.items() if size]
    room = f"{'fits in' if p.fits else 'DOES NOT FIT in'} {p.asked.given.memory:g} GB"
    rows += [("all", f"{p.bytes / scale:.2f}", room), (f"activations {other(p)}", f"{activations(p) / scale:.2f}")]
    return f"memory a GPU, {unit}B", rows


def unit_of(most: float) -> tuple[str, float]:
    """In which a column is printed whose largest number is this one."""
    return next(((unit, x) for unit, x in (("T", 1e12), ("G", 1e9), ("M", 1e6)) if most >= x), ("k", 1e3))


def other(p: Plan) -> str:
    return "if all were saved" if p.asked.run.recompute else "if recomputed"


def activations(p: Plan) -> float:
    """Those of the other choice."""
    run = replace(p.asked.run, recompute=not p.asked.run.recompute)
    return saved(p.asked._replace(run=run), p.counted)


def traffic_of(p: Plan) -> list[tuple]:
    given = p.asked.given
    return [
        (
            t.axis,
            t.what,
            f"{t.calls:,}",
            f"{t.bytes / 1e6:,.2f}",
            f"{t.seconds(given) * 1e3:.2f}",
            "between hosts" if t.ranks * t.stride > given.host else "inside",
        )
        for t in p.traffic
    ]


def times_of(p: Plan) -> list[tuple]:
    rows = [(name, f"{s * 1e3:.2f}", f"{s / p.step:.0%}") for name, s in p.times.items()]
    return [*rows, ("all", f"{p.step * 1e3:.2f}", "100%")]


def summary(p: Plan) -> str:
    lines = [f"{p.rate:,.0f} tokens/s, {p.rate / p.asked.gpus:,.0f} a GPU; what binds: {p.binds}"]
    if p.counted.routed and p.asked.gpus > 1:
        lines.append(
            f"moving tokens to experts is fewer bytes than gathering experts below {break_even(p.asked):,.0f} tokens a "
            f"GPU at once, here {p.shape.tokens:,}"
        )
    return "\n".join(lines)


def break_even(asked: Asked) -> float:
    """Tokens of a micro-batch at which both move as many bytes, forward and backward, without recomputing: 4 k d item
    bytes of a token's rows, against parameters gathered twice and a gradient in float32."""
    model = asked.model
    matrices = 3 if EXPERT[model.expert_kind].rows == 2 else 2
    layer = matrices * model.expert_width * model.experts * (2 * wire(asked.given) + 4)  # over the width, as all here
    return layer / (4 * model.top_k * item(asked.run))


def assumptions(p: Plan) -> str:
    lines = ["assumptions (each an option of that name)"]
    docs = described(Assumptions)
    values = asdict(p.asked.given)
    wide = max(len(name) for name in values)
    for name, value in values.items():
        number = f"{value:g}" if isinstance(value, float) else str(value)
        lines.append(f"  {name.replace('_', '-'):<{wide}}  {number:>9}  {docs[name]}")
    return "\n".join(lines)


def table(title: str, rows: list[tuple], head: tuple) -> str:
    """Aligned: words to the left, numbers to the right. No rows, no table."""
    if not rows:
        return ""
    count = max(map(len, rows))
    rows = [(*row, *[""] * (count - len(row))) for row in ([head, *rows] if head else rows)]
    wide = [max(len(row[i]) for row in rows) for i in range(count)]
    right = [all(numeric(row[i]) for row in rows[bool(head) :]) for i in range(count)]
    lines = [
        "  ".join(f"{x:>{w}}" if r else f"{x:<{w}}" for x, w, r in zip(row, wide, right, strict=True)) for row in rows
    ]
    return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])


def numeric(x: str) -> bool:
    return not x or (x[0].isdigit() and x[-1] in "0123456789%")


def compared(plans: list[Plan]) -> str:
    rows = [
        (
            str(p.asked.mesh),
            f"{p.rate:,.0f}",
            f"{p.step * 1e3:,.1f}",
            f"{p.bytes / 1e9:,.1f}",
            "yes" if p.fits else "NO",
            "no" if objections(p) else "yes",
            p.binds,
        )
        for p in plans
    ]
    head = ("mesh", "tokens/s", "ms a step", "GB a GPU", "fits", "trainer", "what binds")
    return table("the best meshes", rows, head)


def as_dict(p: Plan) -> dict:
    a = p.asked
    return {
        "model": p.name,
        "gpus": a.gpus,
        "mesh": asdict(a.mesh),
        "run": asdict(a.run),
        "assumptions": asdict(a.given),
        "the trainer": objections(p),
        "parameters": {name: part._asdict() for name, part in p.counted.parts.items()},
        "operations": p.operations,
        "memory": p.memory,
        "traffic": [t._asdict() | {"seconds": t.seconds(a.given)} for t in p.traffic],
        "times": p.times,
        "step": p.step,
        "tokens a second": p.rate,
        "binds": p.binds,
        "fits": p.fits,
    }


# ------------------------------------------------------------------------------------------------------ command line


def described(kind: type) -> dict[str, str]:
    """The sentence under each field."""
    body = ast.parse(inspect.getsource(kind)).body[0].body
    after = itertools.pairwise(body)
    return {
        a.target.id: b.value.value
        for a, b in after
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)
    }


def options(parser: argparse.ArgumentParser, kind: type, prefix: str = "", defaults: dict | None = None) -> None:
    """One for each field of the dataclass."""
    docs, group = described(kind), parser.add_argument_group(kind.__name__.lower())
    for f in fields(kind):
        name = "--" + prefix + f.name.replace("_", "-")
        how = {"dest": prefix + f.name, "default": None, "help": docs[f.name]}
        if f.type is bool:
            group.add_argument(name, action=argparse.BooleanOptionalAction, **how)
        elif typing.get_origin(f.type) is Literal:
            group.add_argument(name, choices=typing.get_args(f.type), **how)
        else:
            number = float if f.type is float else int
            group.add_argument(name, type=number, metavar="N", **how)


def chosen(kind: type, args: argparse.Namespace, start, prefix: str = ""):
    """`start` with the options that were given."""
    given = {f.name: getattr(args, prefix + f.name) for f in fields(kind)}
    return replace(start, **{name: x for name, x in given.items() if x is not None})


def defaults_of(preset: str) -> Run:
    """The trainer's."""
    config = train.PRESETS[preset][1]
    precision = "bf16" if config.precision == "bf16" else "float32"
    return Run(config.length, config.batch, config.micro, config.recompute, precision)


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        PROG, prog=f"python -m {PROG}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", help=f"one of {', '.join(PRESETS)}")
    parser.add_argument("--gpus", type=at_least(int, 1), required=True, metavar="N", help="how many there are")
    parser.add_argument("--best", type=at_least(int, 1), default=5, metavar="N", help="meshes to propose (5)")
    parser.add_argument("--json", action="store_true", help="all numbers, in bytes, seconds and operations")
    options(parser, Degrees, "mesh.")
    options(parser, Run)
    options(parser, Assumptions)
    args = parser.parse_args(argv)
    if args.preset not in PRESETS:
        refuse(PROG, f"unknown preset {args.preset!r}; expected one of {', '.join(PRESETS)}")
    with mistakes(PROG):
        run = chosen(Run, args, defaults_of(args.preset))
        given = chosen(Assumptions, args, Assumptions())
        positive(run, given)
        model = replace(train.PRESETS[args.preset][1], objective=run.objective).model
        asked = Asked(model, args.gpus, chosen(Degrees, args, Degrees(), "mesh."), run, given)
        if any(getattr(args, f"mesh.{name}") is not None for name in SIZES) or args.gpus == 1:
            plans = [plan(args.preset, asked)]
        else:
            plans = best(args.preset, asked, args.best)
    if args.json:
        print(json.dumps([as_dict(p) for p in plans], indent=2))
        return
    if len(plans) > 1:
        print(compared(plans), end="\n\n")
    print(text(plans[0]))


def positive(run: Run, given: Assumptions) -> None:
    """ValueError, one line, for a number out of its range."""
    for name, x in (asdict(run) | asdict(given)).items():
        if not isinstance(x, int | float) or isinstance(x, bool):
            continue
        share, zero = name.startswith("overlap") or name == "efficiency", name.startswith(("overlap", "latency"))
        if x < 0 or (x == 0 and not zero) or (share and x > 1):
            raise ValueError(f"{name} is {x}; it must be {'at least' if zero else 'above'} 0{' and at most 1' * share}")


if __name__ == "__main__":
    main(sys.argv[1:])
