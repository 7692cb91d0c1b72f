"""Every speed in the README comes from here: one JSON line a measurement, and a table.

    python bench.py reference --out FILE                                       every row on a CPU, half a minute a row
    python bench.py reference --device cuda --budget 2 --out FILE              the same on a GPU
    python bench.py drift --out FILE                                           errors over 65,536 tokens
    python bench.py kernels --commit $(git rev-parse --short HEAD) --out FILE  needs a GPU
    python bench.py kernels --rows mamba2 --peer fla --commit HASH --out FILE  beside flash-linear-attention
    python bench.py tune --rows mamba2 --peer fla --tuned DIR --out FILE       minutes that `kernels --tuned DIR` saves
    python bench.py local --commit HASH --out FILE                             norms and short convolutions
    torchrun --nproc-per-node 2 bench.py parallel --commit HASH --out FILE     steps, experts and sequences over ranks

`reference` times the chunk form, the token loop and a decode step in plain PyTorch, and measures their peak memory as
`reference/peak.py` does. `--budget` bounds the seconds of one run and of its repetitions; a length at which one run
would take longer, by the time of the length before, is skipped, and a line says so. `drift` compares the chunk form in
float32 with the token loop in float64 over a long sequence: in all, and in its first, middle and last eighth.

`kernels`: times are medians over many runs, with the 20th and 80th percentile, of random data; `eager` includes what
the host needs to launch (`eager_here` without handing the backward pass to a thread of its own, as autograd does and
takes a third of a millisecond for), `graph` replays a CUDA graph. The floor is each input read once and each output
written once at the copy bandwidth measured in the same run: forward q k v -> o (4 tensors), forward and backward 11
(the gradient reads q k v do and writes dq dk dv), and float32 gates and write strengths (read by both, and their
gradients written).
Where every element of the memory needs an exponential of its own (Mamba), one a token each way is a second floor, at 16
a clock and multiprocessor; the larger counts. Rows of one head (Mamba, Longhorn, S4) take a shape's h·d as the width of
their layer: at 8x2048x8x128 Mamba has 2048 channels of 16 keys.
`extra_mib` is the most that one run holds beside its inputs, `own_mib` that without outputs and gradients. Before
anything is timed both sides must pass the error budget against the token loop in float64, with the same inputs.
Peers that cannot run are listed as unavailable, with the reason. `tune` has peers tune themselves beforehand, several
side by side, and says how long their first calls took; with `--tuned` those in `kernels` are no first calls. `decode`
lines (`--decode`: batches, or none) are one token a sequence at 8 heads of 128: the memory overwritten where that is
ours to choose, 16 of them in turn as a model's layers have theirs, so that none is found in the cache, and a time is
that of one. The floor is the memory read and written once in float32, and the token's inputs and outputs.

`parallel`: what W ranks do together beside one alone, in W processes at once. A time is the slowest rank's, of the
median run; what would pass `--seconds`, by the time of the measurement before, is skipped, and a line says so. `steps`:
whole training steps of a preset, of as many tokens on each rank, parameters cut over all ranks: of different samples
(`data`), or of one sequence cut over them (`sequence`); `share` is tokens a second of one rank over those of one alone.
`experts`: one layer of experts, whose parameters are gathered, or to which tokens travel. `layers`: a mixer's core on a
sequence of T tokens cut over all ranks, beside T / W tokens on every rank by itself: rows of the table by the gather of
spans and by the chain, softmax attention by gather, ring and ulysses, the latter up to `--softmax-tokens`; here `share`
is the time of `alone` over that of all. Bytes are those that a rank receives in our own exchanges, without FSDP's.
"""

import argparse
import datetime
import functools
import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F

from reference import chunked, example
from reference import recurrence as exact
from reference.lsm import LSM
from reference.peak import peak as held

SHAPES = ("8x2048x8x128", "1x16384x8x128", "2x16384x16x128")
IN_A_ROW = 3  # training steps and layers that are timed together, since each begins while the one before still runs
CHECKED = (1, 512, 8)  # b t h of the inputs for the error budget: few tokens, and heads for which peers have tuned
# how often inputs with a time axis and outputs must move
TENSORS = {"forward": (1, 1), "forward+backward": (3, 2)}
ONE_HEAD = {"mamba": (16, 2), "longhorn": (16, 2), "s4": (32, 1)}  # keys, and channels for each of the layer's width
SPECIAL = 16  # exponentials a clock and multiprocessor (CUDA C++ programming guide, compute capability 9.0)
SIDES = {"token loop": exact.recurrence, "chunked": chunked.recurrence}
DECODED, LAYERS = (8, 128), 16  # heads and their size of a decoding step, and memories that take turns
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
AVERAGED = 2048  # tokens at which the geometric mean over the rows is taken


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"bench.py {args.command} needs a CUDA GPU; on a CPU there is `bench.py reference`")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    everywhere, lines = facts(args), []
    with Path(args.out).open("a") as file:  # line by line: what was measured stays when a run is cut off
        for line in COMMANDS[args.command](args):
            print(json.dumps({**everywhere, **line}), file=file, flush=True)
            print(as_text(line), flush=True)
            lines.append(line)
    if args.command in TABLES:
        print("\n" + TABLES[args.command](lines))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        sub = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        sub.add_argument("--rows", nargs="+", choices=list(LSM), default=None, help="rows of the table (all there are)")
        sub.add_argument("--commit", default=commit(), help="of the code measured")
        sub.add_argument("--out", required=True, help="file of JSON lines, appended to")
        if name == "kernels":
            sub.set_defaults(device="cuda")
            sub.add_argument("--peer", nargs="*", choices=list(PEERS), default=[], help="measure these beside ours")
            sub.add_argument("--shapes", nargs="+", default=list(SHAPES), help="b x t x h x d")
            sub.add_argument("--peer-shapes", nargs="+", default=None, help="shapes for peers that tune (all)")
            sub.add_argument("--softmax", action=argparse.BooleanOptionalAction, default=True, help="a line beside")
            sub.add_argument("--tuned", default=None, help="folder of Triton's cache in which peers have tuned (none)")
            sub.add_argument("--decode", nargs="*", type=int, default=[1, 16, 128], help="batches of one token (none)")
            sub.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
            continue
        if name == "tune":
            sub.set_defaults(device="cuda")
            sub.add_argument("--peer", nargs="+", choices=list(PEERS), default=list(PEERS), help="who tunes")
            sub.add_argument("--peer-shapes", nargs="+", default=list(SHAPES), help="b x t x h x d")
            sub.add_argument("--tuned", required=True, help="folder for Triton's cache")
            sub.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
            continue
        if name == "local":
            sub.set_defaults(device="cuda")
            continue
        if name == "parallel":
            lengths, whole = [2**n for n in (14, 16, 18, 20)], ["steps", "meshes", "experts", "layers"]
            sub.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
            sub.add_argument("--what", nargs="+", choices=whole, default=whole)
            sub.add_argument("--seconds", type=float, default=1e9, help="in all: what may take longer is left out")
            sub.add_argument("--preset", default="a0.3b-2b", help="the trainer's, of steps and experts")
            sub.add_argument("--step-tokens", nargs="+", type=int, default=[2**15, 2**16, 2**17], help="of a rank")
            sub.add_argument("--steps", type=int, default=3, help="times that steps are timed, three in a row")
            sides = ["alone", "data", "sequence"]
            sub.add_argument("--sides", nargs="+", choices=sides, default=sides, help="of steps")
            sub.add_argument(
                "--recompute", action=argparse.BooleanOptionalAction, default=True, help="blocks, in steps"
            )
            sub.add_argument(
                "--reshard",
                action=argparse.BooleanOptionalAction,
                default=True,
                help="gather parameters again for the way back, in steps",
            )
            sub.add_argument("--samples", type=int, default=8, help="of a step of all ranks, on every mesh")
            sub.add_argument("--sample-tokens", type=int, default=2048)
            sub.add_argument("--expert-tokens", nargs="+", type=int, default=[2**12, 2**14, 2**16], help="of a rank")
            sub.add_argument("--tokens", nargs="+", type=int, default=lengths, help="of a layer's whole sequence")
            sub.add_argument("--softmax-tokens", type=int, default=2**18, help="longest sequence of softmax attention")
            sub.add_argument("--heads", type=int, default=8)
            sub.add_argument("--size", type=int, default=128, help="of keys and values")
            sub.add_argument("--times", type=int, default=10, help="runs of each")
            continue
        sub.add_argument("--threads", type=int, default=2, help="of the CPU")
        if name == "reference":
            sub.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
            sub.add_argument("--tokens", nargs="+", type=int, default=list(LENGTHS), help="lengths to measure at")
            sub.add_argument("--budget", type=float, default=2.0, help="seconds: a run that needs more is skipped")
        if name == "drift":
            sub.set_defaults(device="cpu")
            sub.add_argument("--tokens", type=int, default=65536, help="length of the sequence")
            sub.add_argument("--size", type=int, default=16, help="of keys and values")
    return top


# ------------------------------------------------------------------------------------------------ in plain PyTorch


def reference(args) -> Iterable[dict]:
    """The chunk form beside the token loop and one decode step in plain PyTorch: times and peak memory."""
    torch.set_num_threads(args.threads)
    ratios, names = [], args.rows or list(LSM)
    for name in progress(names):
        try:
            for line in measured(name, args):
                yield {"row": name, **line, "dtype": "float32", "device": args.device, "threads": args.threads}
                ratios += [line["ratio"]] if line.get("tokens") == AVERAGED and "ratio" in line else []
        except Exception as error:  # a row that cannot run must not take the others with it
            yield {"row": name, "side": "all", "what": "unavailable", "reason": reason(error)}
    if ratios:
        mean, rows = statistics.geometric_mean(ratios), f"{len(ratios)} of {len(names)} rows"
        yield {"row": rows, "side": "geometric mean", "what": "ratio", "tokens": AVERAGED, "ratio": mean}


def measured(name: str, args) -> Iterable[dict]:
    """One row: its decode step, then each length, shortest first, forward and with backward."""
    yield decode(name, args)
    expected: dict[tuple, float] = {}  # seconds a token of (side, what), from the length before
    for t in sorted(args.tokens):
        for what in TENSORS:
            yield from at_length(name, t, what, args, expected)


def at_length(name: str, t: int, what: str, args, expected: dict) -> Iterable[dict]:
    """Chunk form and token loop in turn, so that a machine whose speed drifts is as fast for one as for the other."""
    b, _, h, d = shape = (1, t, 4, 64)
    common = {"what": what, "shape": text(shape), "tokens": t}
    row, tokens, constants = on(args.device, inputs(name, b, t, h, d, torch.float32))
    runs, memory = {}, {}
    for side, f in SIDES.items():
        ahead = t * expected.get((side, what), 0.0)
        if ahead > args.budget:
            said = f"one run would take {ahead:.1f} s, more than the budget of {args.budget:g} s"
            yield {"side": side, **common, "what": "skipped", "of": what, "reason": said}
            continue
        run = job(f, row, tokens, constants, what)
        try:
            memory[side] = held(run, args.device).bytes / 2**20  # the first run: it warms up, too
        except NotImplementedError as error:
            yield {"side": side, **common, "what": "unavailable", "of": what, "reason": reason(error)}
            continue
        runs[side] = run
    seconds = {side: [clock(run, args.device)] for side, run in runs.items()}
    often = {side: 4 if side == "chunked" and len(runs) > 1 else 1 for side in runs}
    turn = sum(often[side] * found[0] for side, found in seconds.items())
    for _ in range(min(5, int(args.budget / turn)) if runs else 0):
        for side, run in runs.items():
            seconds[side] += [clock(run, args.device) for _ in range(often[side])]
    expected |= {(side, what): min(found) / t for side, found in seconds.items()}
    for side, found in seconds.items():
        yield {"side": side, **common, **spread(found), "peak_mib": memory[side]}
    if what == "forward+backward" and len(runs) > 1:
        ratio = statistics.median(seconds["token loop"]) / statistics.median(seconds["chunked"])
        yield {"side": "token loop / chunked", **common, "what": "ratio", "ratio": ratio}


def job(f: Callable, row, tokens, constants, what: str) -> Callable:
    """`f` as it is measured: alone and without gradients, or with the gradient of every input with a time axis."""
    if what == "forward":
        return torch.no_grad()(lambda: f(row, tokens, constants)[0])
    given = [x.requires_grad_() for x in tokens.values() if x.is_floating_point()]

    def both():
        o = f(row, tokens, constants)[0]
        return torch.autograd.grad(o, given, torch.ones_like(o), allow_unused=True)

    return both


def decode(name: str, args) -> dict:
    """One token after the other through `recurrence.step`: seconds a token, and what one step holds at most."""
    many, (b, h, d) = 64, (1, 4, 64)
    row, tokens, constants = on(args.device, inputs(name, b, many, h, d, torch.float32))
    each = [{n: x[:, i : i + 1] for n, x in tokens.items()} for i in range(many)]
    memory = exact.recurrence(row, tokens, constants)[1]

    @torch.no_grad()
    def steps(each=each, M=memory):
        for x in each:
            o, M = exact.step(row, x, constants, M)
        return o, M

    peak_mib = held(lambda: steps(each[:1]), args.device).bytes / 2**20
    steps()
    found = [clock(steps, args.device) / many for _ in range(9)]
    return {
        "side": "decode step",
        "what": "forward",
        "shape": text((b, 1, h, d)),
        **spread(found),
        "peak_mib": peak_mib,
    }


def on(device: str, made: tuple) -> tuple:
    row, *groups = made
    return row, *({n: x.to(device) for n, x in group.items()} for group in groups)


def clock(f: Callable, device: str = "cpu") -> float:
    """Seconds of one call, until the device is done."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    f()
    wait()
    return time.perf_counter() - begin


def spread(seconds: list[float]) -> dict:
    return {
        "eager_ms": 1e3 * statistics.median(seconds),
        "spread_ms": [1e3 * min(seconds), 1e3 * max(seconds)],
        "runs": len(seconds),
    }


def summary(lines: list[dict]) -> str:
    """A line for each row and length: milliseconds forward, forward with backward, and the latter's peak memory."""
    kinds = [(side, what) for side in ("chunked", "token loop") for what in TENSORS]
    titles = "".join(f"{side + ', ms':>16}{'with backward':>16}{'its MiB':>10}" for side in ("chunked", "token loop"))
    said = [f"{'':28}{'T':>7}{titles}{'a step, ms':>12}"]
    step = {line["row"]: line["eager_ms"] for line in lines if line["side"] == "decode step"}
    cells: dict[tuple, dict] = {}
    for line in lines:
        if "tokens" in line and line["what"] != "ratio":  # measured, skipped or unavailable
            cells.setdefault((line["row"], line["tokens"]), {})[line["side"], line.get("of", line["what"])] = line
    for (name, t), found in cells.items():
        said.append(f"{name:28}{t:7}")
        for kind in kinds:
            line = found.get(kind, {"what": "-"})
            said[-1] += f"{line['eager_ms']:16.2f}" if "eager_ms" in line else f"{line['what']:>16}"
            if kind[1] == "forward+backward":
                said[-1] += f"{line['peak_mib']:10.1f}" if "peak_mib" in line else f"{'-':>10}"
        said[-1] += f"{step[name]:12.3f}"
    return "\n".join(said)


# ----------------------------------------------------------------------------------------------------------- drift

# How gates are made of ordinary ones (a new row's gates are named in `example.GATES`).
SETTINGS = {
    "ordinary": lambda g: g,
    "lasting": lambda g: 1e-4 * g,  # a memory of ten thousand tokens
    "extreme": lambda g: example.extreme(g, share=0.5),
    "rarely extreme": lambda g: example.extreme(1e-4 * g, share=1 / 64),  # about one in every chunk
}


def drift(args) -> Iterable[dict]:
    """Errors of the chunk form in float32 over a long sequence, and where they are, against the loop in float64."""
    torch.set_num_threads(args.threads)
    for name in progress(args.rows or list(LSM)):
        head = {"row": name, "side": "chunked", "shape": text((1, args.tokens, 1, args.size)), "dtype": "float32"}
        begin = time.perf_counter()
        try:
            found = drifted(name, args.tokens, args.size)
        except Exception as error:
            yield {**head, "what": "unavailable", "reason": reason(error)}
            continue
        bounded = {n: x for n, x in found.items() if x["largest"] < torch.finfo(torch.float32).max}
        passed = all(x["output"] <= 1 and x["memory"] <= 1 for x in bounded.values())  # NaN fails
        verdict = "within budget" if passed else "BUDGET EXCEEDED"
        if len(bounded) < len(found):
            unbounded = ", ".join(n for n in found if n not in bounded)
            verdict += f" but for {unbounded}, where the exact loop leaves float32's range"
        yield {**head, "what": "drift", "verdict": verdict, "seconds": time.perf_counter() - begin, "settings": found}


@torch.no_grad()
def drifted(name: str, t: int, size: int) -> dict[str, dict]:
    """By setting of the gates, which are sequences of one batch where only tokens differ: errors over their budgets."""
    row = LSM[name]
    tokens, constants = example.inputs(row, {"b": 1, "t": t, "h": 1, "k": size, "v": size}, dtype=torch.float32)
    tokens |= {n: f(tokens) for n, f in example.ALIGNED.get(row.update, {}).items()}
    spoilt = [n for n in example.GATES if n in tokens]
    if any(n in constants for n in example.GATES):  # the same for a whole batch
        gates = lambda f: {n: f(x) if n in example.GATES else x for n, x in constants.items()}
        each = {s: judged(row, tokens, gates(SETTINGS[s])) for s in ("ordinary", "lasting")}
        return {setting: found[0] for setting, found in each.items()}
    if not spoilt:
        return {"ordinary": judged(row, tokens, constants)[0]}
    batch = {n: torch.cat([f(x) if n in spoilt else x for f in SETTINGS.values()]) for n, x in tokens.items()}
    return dict(zip(SETTINGS, judged(row, batch, constants), strict=True))


def judged(row, tokens, constants) -> list[dict]:
    """For each sequence of the batch, all errors over their budgets: of the outputs, of the last memory, and of the
    outputs of the first, middle and last eighth of the tokens, each by the budget of that eighth."""
    wide = [{n: x.double() if x.is_floating_point() else x for n, x in group.items()} for group in (tokens, constants)]
    runs = {
        "exact": exact.recurrence(row, *wide),
        "plain": exact.recurrence(row, tokens, constants),
        "chunked": chunked.recurrence(row, tokens, constants),
    }
    o = {side: run[0] for side, run in runs.items()}
    M = {side: flat(run[1]) for side, run in runs.items()}
    t, eighth = o["exact"].shape[1], -(-o["exact"].shape[1] // 8)
    places = {"first": 0, "middle": (t - eighth) // 2, "last": t - eighth}
    found = []
    for i in range(len(o["exact"])):
        one = {side: x[i] for side, x in o.items()}
        part = {place: {side: x[a : a + eighth] for side, x in one.items()} for place, a in places.items()}
        memories = [over({side: M[side][j][i] for side in M}) for j in range(len(M["exact"]))]
        found.append(
            {
                "output": over(one),
                "memory": max(memories, key=lambda x: (x != x, x)),  # NaN is the worst
                **{place: over(x) for place, x in part.items()},
                "error": {place: example.error(x["chunked"], x["exact"]) for place, x in part.items()},
                "plain_error": {place: example.error(x["plain"], x["exact"]) for place, x in part.items()},
                "largest": one["exact"].abs().max().item(),
            }
        )
    return found


def over(sides: dict) -> float:
    """The chunk form's error over its budget; exact equality is 0, also where the budget is."""
    wrong = example.error(sides["chunked"], sides["exact"])
    budget = example.allowed(sides["plain"], sides["exact"], torch.finfo(torch.float32).eps)
    return wrong / budget if budget > 0 else (0.0 if wrong == 0 else float("inf"))


def flat(memory) -> list:
    """The tensors of a memory, which may be a tuple of them."""
    return [memory] if isinstance(memory, torch.Tensor) else [x for part in memory for x in flat(part)]


# ------------------------------------------------------------------------------------------------------ on the GPU


def kernels(args) -> Iterable[dict]:
    """The Triton kernels, and peers on the same inputs, on this GPU."""
    new = tempfile.mkdtemp()  # so that a first call's seconds are a first call's
    os.environ["TRITON_CACHE_DIR"] = new
    import fast.recurrence

    dtype = getattr(torch, args.dtype)
    shapes, peer_shapes = (sizes_of(s or args.shapes) for s in (args.shapes, args.peer_shapes))
    ceiling = ceilings()
    yield ceiling
    for shape in shapes if args.softmax else ():
        yield from timed("softmax", "torch SDPA", softmax, None, shape, dtype, ceiling)
    for name in args.rows or fast.recurrence.rows():
        for side, (f, where) in contestants(name, args.peer, fast.recurrence.recurrence, shapes, peer_shapes).items():
            head = {"row": name, "side": side, "dtype": args.dtype}
            os.environ["TRITON_CACHE_DIR"] = new if side == "ours" else args.tuned or new
            try:
                yield {**head, **budget(name, f, where[0][3], dtype)}
                for shape in where:
                    yield from timed(name, side, f, fast.recurrence.recurrence, shape, dtype, ceiling)
            except Exception as error:
                yield {**head, "what": "unavailable", "reason": reason(error)}
            torch.cuda.empty_cache()
        os.environ["TRITON_CACHE_DIR"] = new
        for side, step in {"ours": fast.recurrence.step, **{peer: STEPS[peer] for peer in args.peer}}.items():
            yield from decoded(name, side, step, args.decode, dtype, ceiling)
            torch.cuda.empty_cache()


def tune(args) -> Iterable[dict]:
    """Peers tune themselves: seconds of their first calls, whose results stay in a folder for `kernels --tuned`."""
    os.environ["TRITON_CACHE_DIR"] = args.tuned
    for name in args.rows or list(LSM):
        for shape in sizes_of(args.peer_shapes):
            for side in args.peer:
                line = {"row": name, "side": side, "shape": text(shape), "dtype": args.dtype}
                try:
                    f = PEERS[side](name)
                    row, tokens, constants = inputs(name, *shape, getattr(torch, args.dtype), as_layers=True)
                    tokens = {n: x.cuda().requires_grad_() for n, x in tokens.items()}
                    constants = {n: x.cuda() for n, x in constants.items()}
                    begin = time.perf_counter()
                    f(row, tokens, constants)[0].sum().backward()
                    torch.cuda.synchronize()
                    yield {**line, "what": "tuned", "first_call_s": time.perf_counter() - begin}
                except Exception as error:
                    yield {**line, "what": "unavailable", "reason": reason(error)}


def sizes_of(shapes: list[str]) -> list[tuple[int, ...]]:
    return [tuple(int(n) for n in s.split("x")) for s in shapes]


def contestants(name: str, peers: list[str], ours: Callable, shapes, peer_shapes) -> dict:
    return {"ours": (ours, shapes)} | {peer: (PEERS[peer](name), peer_shapes) for peer in peers}


def fla(name: str) -> Callable:
    """flash-linear-attention's operators."""
    from fast.fla import recurrence

    return recurrence


def fla_step(*given):
    """flash-linear-attention's loop over tokens in one kernel, over one."""
    from fast.fla import step

    return step(*given)


PEERS, STEPS = {"fla": fla}, {"fla": fla_step}


def softmax(row, x, constants):
    """Causal softmax attention by torch's flash kernel: no row of ours, a line to compare with."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        q, k, v = (x[n].transpose(1, 2) for n in "qkv")
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2), None


def budget(name: str, f: Callable, d: int, dtype) -> dict:
    """The largest error over its budget, of the output and every gradient, and the seconds of the first call.

    Budget: twice the error of the chunk form in plain PyTorch on the same 16-bit inputs, and one rounding.
    """
    row, tokens, constants = drawn_once(name, *CHECKED, d, dtype, as_layers=True)
    do = torch.randn(tokens["v"].shape).to(dtype)

    def run(f, wide, device):
        there = {n: x.detach().to(device, wide or x.dtype).requires_grad_() for n, x in tokens.items()}
        fixed = {n: x.to(device, wide or x.dtype) for n, x in constants.items()}
        o = f(row, there, fixed)[0]
        grads = torch.autograd.grad(o, list(there.values()), do.to(o.dtype).to(device))
        return [x.detach().double().cpu() for x in (o, *grads)]

    want = run(exact.recurrence, torch.float64, "cuda")
    plain = run(chunked.recurrence, None, "cpu")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    got = run(f, None, "cuda")
    seconds = time.perf_counter() - begin
    names = ("o", *(f"d{n}" for n in tokens))
    said = verdict("budget", names, got, plain, want, [torch.finfo(dtype).eps] * len(names))
    return {**said, "shape": text((*CHECKED, d)), "first_call_s": seconds}


def verdict(kind: str, names: Iterable[str], got, plain, want, eps: Iterable[float]) -> dict:
    """Each error over its budget, twice that of `plain` and one rounding, and whether all are within; NaN is not."""
    ratios = {}
    for what, x, y, z, rounding in zip(names, got, plain, want, eps, strict=True):
        allowed = 2 * (y - z).abs().max() + rounding * z.abs().max()
        ratios[what] = round(((x - z).abs().max() / allowed).item(), 3)
    passed = all(ratio <= 1 for ratio in ratios.values())
    return {"what": kind if passed else f"{kind.upper()} EXCEEDED", "error_over_budget": ratios}


def timed(name: str, side: str, f: Callable, ours, shape, dtype, ceiling: dict) -> Iterable[dict]:
    """Forward, and forward with backward: eager, as a CUDA graph, extra memory, and the ratio to the byte floor."""
    row, tokens, constants = drawn_once(name if name in LSM else "linear_attention", *shape, dtype, as_layers=True)
    tokens = {n: x.cuda().requires_grad_() for n, x in tokens.items()}
    constants = {n: x.cuda() for n, x in constants.items()}
    do = torch.randn(tokens["v"].shape, device="cuda").to(dtype)
    given = list(tokens.values())

    def forward():
        with torch.no_grad():
            return f(row, tokens, constants)[0]

    def both():
        return torch.autograd.grad(f(row, tokens, constants)[0], given, do)

    for what, run in (("forward", forward), ("forward+backward", both)):
        floor = moved(what, tokens, do), exponentials(what, row, tokens, constants)
        found = clocked(run, do.dtype, *floor, ceiling)
        found["own_mib"] = found["extra_mib"] - results(what, tokens, do) / 2**20
        yield {"row": name, "side": side, "what": what, "shape": text(shape), **found}


def decoded(name: str, side: str, step: Callable, batches, dtype, ceiling: dict, sizes=DECODED, device="cuda"):
    """One token for each of so many sequences, after its error was looked at; a line of each batch."""
    head = {"row": name, "side": side, "dtype": str(dtype).removeprefix("torch.")}
    for b in batches:
        line = {**head, "what": "decode", "shape": text((b, 1, *sizes))}
        try:
            if b == batches[0]:
                yield {**head, **step_budget(name, step, sizes, dtype, device)}
            yield {**line, **one_token(name, step, (b, *sizes), dtype, ceiling, device)}
        except Exception as error:
            yield {**line, "what": "unavailable", "of": "decode", "reason": reason(error)}


@torch.no_grad()
def step_budget(name: str, step: Callable, sizes: tuple[int, int], dtype, device: str) -> dict:
    """As `budget`, of one token's output and the memory after it; `plain` is the token loop on the same inputs."""
    row, tokens, constants = inputs(name, 2, 1, *sizes, dtype, as_layers=True)
    M = memory_of(row, tokens, constants)

    def run(f, wide, device):
        given = [{n: (x if wide is None else x.to(wide)).to(device) for n, x in y.items()} for y in (tokens, constants)]
        memory = M.clone().to(device) if wide is None else M.to(device, wide)
        return [y.double().cpu() for y in f(row, *given, memory)]

    want, plain = run(exact.step, torch.float64, "cpu"), run(exact.step, None, "cpu")
    begin = time.perf_counter()
    got = run(step, None, device)
    seconds = time.perf_counter() - begin
    eps = [torch.finfo(x).eps for x in (dtype, torch.float32)]
    said = verdict("decode budget", ("o", "memory"), got, plain, want, eps)
    return {**said, "shape": text((2, 1, *sizes)), "first_call_s": seconds}


def memory_of(row, tokens: dict, constants: dict) -> torch.Tensor:
    """Some memory that a text could have left, in float32."""
    return torch.randn(exact.empty(row, tokens, constants).shape) / 8


def one_token(name: str, step: Callable, shape: tuple[int, int, int], dtype, ceiling: dict, device: str) -> dict:
    """Times of one step, its floor in bytes and exponentials, and what it holds beside the memory."""
    b, h, d = shape
    row, tokens, constants = on(device, inputs(name, b, 1, h, d, dtype, as_layers=True))
    M = memory_of(row, tokens, constants).to(device)
    memories = [M, *(M.clone() for _ in range(LAYERS - 1))]

    @torch.no_grad()
    def steps():
        for M in memories:
            step(row, tokens, constants, M)

    alone = torch.no_grad()(lambda: step(row, tokens, constants, memories[0]))
    o = alone()[0]
    floor = 2 * memories[0].nbytes + sum(x.nbytes for x in tokens.values()) + o.nbytes
    line = clocked(steps, dtype, floor, exponentials("forward", row, tokens, constants), ceiling, LAYERS, device)
    held_mib = held(alone, device).bytes / 2**20
    return {
        **line,
        "layers": LAYERS,
        "floor_share": 1 / line["graph_over_floor"],
        "memory_mib": memories[0].nbytes / 2**20,
        "extra_mib": held_mib,  # of one step
        "peak_mib": (memories[0].nbytes + sum(x.nbytes for x in tokens.values())) / 2**20 + held_mib,
    }


def moved(what: str, tokens: dict, o: torch.Tensor) -> int:
    """The bytes that must move at least: every input with a time axis, its gradient, and outputs like `o`."""
    of_inputs, of_outputs = TENSORS[what]
    return of_inputs * sum(x.nbytes for x in tokens.values()) + of_outputs * o.nbytes


def results(what: str, tokens: dict, o: torch.Tensor) -> int:
    """The bytes of what a run returns: outputs like `o`, and backward the gradient of every input with a time axis."""
    return o.nbytes + (sum(x.nbytes for x in tokens.values()) if what != "forward" else 0)


def exponentials(what: str, row, tokens: dict, constants: dict) -> int:
    """Those of a decay that differs by element and token: one of each a direction."""
    if row.decay is not exact.element:
        return 0
    each = tokens["v"].shape[:2].numel() * constants["A"].numel()
    return each * (1 if what == "forward" else 2)


def clocked(run: Callable, dtype, floor: int, exps: int, ceiling: dict, times: int = 1, device: str = "cuda") -> dict:
    """First call, extra memory, eager and as a CUDA graph, and the ratio to the time that `floor` bytes or `exps`
    exponentials take, whichever is longer. Times are of one of the `times` that `run` does the same."""
    first, extra = clock(run, device), held(run, device).bytes / 2**20
    rate = ceiling["exponentials_g_s"]
    floors = floor / ceiling["copy_gb_s"] / 1e6, exps / rate / 1e6 if exps and rate else 0.0
    eager, here, graph = ([x / times for x in median(f)] for f in (run, in_one_thread(run), captured(run)))
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "eager_ms": eager[0],
        "eager_spread_ms": eager[1:],
        "eager_here_ms": here[0],
        "graph_ms": graph[0],
        "graph_spread_ms": graph[1:],
        "floor_bytes": floor,
        "floor_ms": floors[0],
        "exponentials_ms": floors[1],
        "graph_over_floor": graph[0] / max(floors),
        "extra_mib": extra,
        "first_call_s": first,
    }


def local(args) -> Iterable[dict]:
    """Norms, convolutions and token shifts: our kernels, plain PyTorch and FLA's on this GPU, over the byte floor."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # so that a first call's seconds are a first call's
    ceiling = ceilings()
    yield ceiling
    for name, (shape, given, sides, moved) in neighbours().items():
        leaves = [x.cuda().requires_grad_() for x in given]
        dy = torch.randn(shape, device="cuda").bfloat16()
        for side, f in sides.items():
            try:
                yield from raced(name, side, f, leaves, dy, moved, ceiling)
            except Exception as error:
                yield {"row": name, "side": side, "what": "unavailable", "reason": reason(error)}


def neighbours() -> dict[str, tuple]:
    """Of each: the output's shape, the inputs, who computes it, and how many tensors of that size forward moves, and
    backward."""
    import fast.local
    import reference.local as plain

    def fla_norm(x, w):
        from fla.modules.norm.layernorm import rms_norm

        return rms_norm(x, w, None)

    def fla_gated(x, w, z):
        from fla.modules.norm.fused_norm_gate import rms_norm_gated

        return rms_norm_gated(x, z, w, None)

    def fla_unit(x):
        from fla.modules.l2norm import l2norm

        return l2norm(x)

    def fla_convolution(x, w):
        from fla.modules.causal_conv1d.ops import causal_conv1d

        return causal_conv1d(x, w, activation="silu")[0]

    def no_shift(x):
        raise NotImplementedError("flash-linear-attention's shift is x_{t-1} - x_t, another function")

    def half(*shape):
        return torch.randn(shape).bfloat16()

    def sides(call, peer):
        return {"ours": call(fast.local), "plain PyTorch": call(plain), "fla": peer}

    tokens, d = 16384, 1024
    heads = (tokens * d // 128, 128)
    norms = sides(lambda f: f.norm, fla_norm)
    gated = sides(lambda f: lambda x, w, z: f.norm(x, w, 1e-5, z), fla_gated)
    units = sides(lambda f: f.unit, fla_unit)
    taps = sides(lambda f: lambda x, w: f.short_convolution(x, w, None, "silu")[0], fla_convolution)
    shifts = sides(lambda f: lambda x: f.token_shift(x)[0], no_shift)
    return {
        "norm d 1024": ((tokens, d), (half(tokens, d), torch.randn(d)), norms, (2, 3)),
        "gated norm d 128": (heads, (half(*heads), torch.randn(128), half(*heads)), gated, (3, 5)),
        "unit d 128": (heads, (half(*heads),), units, (2, 3)),
        "token shift d 1024": ((8, 2048, d), (half(8, 2048, d),), shifts, (2, 2)),
        "convolution w 4": ((8, 2048, d), (half(8, 2048, d), torch.randn(d, 4)), taps, (2, 3)),
    }


def raced(name: str, side: str, f: Callable, leaves: list, dy, moved: tuple[int, int], ceiling: dict) -> Iterable[dict]:
    """Forward, and forward with backward: eager, as a CUDA graph, and the ratio to the byte floor."""

    def forward():
        with torch.no_grad():
            return f(*leaves)

    def both():
        return torch.autograd.grad(f(*leaves), leaves, dy)

    shape = "x".join(map(str, dy.shape))
    for what, run, tensors in (("forward", forward, moved[0]), ("forward+backward", both, sum(moved))):
        floor = tensors * dy.numel() * dy.element_size()
        yield {"row": name, "side": side, "what": what, "shape": shape, **clocked(run, dy.dtype, floor, 0, ceiling)}


def inputs(name: str, b: int, t: int, h: int, d: int, dtype, as_layers: bool = False) -> tuple:
    """(row, tokens, constants): tokens in dtype but for gates and steps; gates near 1 as trained models have them.

    `as_layers`: rows of one head get the keys and values that a layer of width h·d gives them.
    """
    row = LSM[name]
    keys = d if row.features is None else 16  # polynomial features of more are thousands
    if as_layers and name in ONE_HEAD:
        keys, times = ONE_HEAD[name]
        h, d = 1, h * d * times
    sizes = {"b": b, "t": t, "h": h, "k": keys, "v": d, "m": 64, "l": 15}
    tokens, constants = example.inputs(row, sizes, dtype=torch.float32, drawn=example.TRAINED)
    narrow = {n for n, x in tokens.items() if x.is_floating_point()} - {*example.GATES, "dt"}
    return row, {n: x.to(dtype) if n in narrow else x for n, x in tokens.items()}, constants


# The same for every side, which copies them: drawing takes longer than what is measured.
drawn_once = functools.lru_cache(maxsize=8)(inputs)


def median(run: Callable) -> list[float]:
    """[median, 20 %, 80 %] in ms, the L2 cache emptied before every run."""
    from triton.testing import do_bench

    return [round(x, 5) for x in do_bench(run, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])]


def in_one_thread(run: Callable) -> Callable:
    """The backward pass in the caller's own thread."""

    def alone():
        with torch.autograd.set_multithreading_enabled(False):
            return run()

    return alone


def captured(run: Callable) -> Callable:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graph.kept = run()  # the graph's results live as long as the graph
    return graph.replay


def ceilings() -> dict:
    """What this GPU does at best, measured now: a copy (bytes read and written) and a bf16 matrix product."""
    x = torch.randn(2**30, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    copy = median(lambda: y.copy_(x))
    del x, y
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = median(lambda: a @ b)
    return {
        "what": "ceilings",
        "copy_gb_s": 2 * 2**31 / copy[0] / 1e6,
        "matmul_tflop_s": 2 * 8192**3 / product[0] / 1e9,
        "exponentials_g_s": special_functions(),
    }


def special_functions() -> float | None:
    """10^9 exponentials a second, at this GPU's highest clock; None if nvidia-smi does not say which that is."""
    try:
        clock = float(asked_of_driver("clocks.max.sm"))
    except (TypeError, ValueError):
        return None
    return SPECIAL * torch.cuda.get_device_properties(0).multi_processor_count * clock / 1e3


# --------------------------------------------------------------------------------------------------------- parallel

CUT = ("linear_attention", "gla", "mamba2", "gated_delta_net")
OUT_OF_MEMORY = "out of memory"
DRAWN = 4096  # tokens that are drawn; longer sequences repeat them


def parallel(args) -> Iterable[dict]:
    """Training steps, layers of experts and token mixers over the ranks that torchrun started, beside one alone."""
    from parallel import comm
    from parallel import mesh as meshes

    meshes.launch(timeout=120.0)
    ranks = Ranks(args)
    for lines in (
        steps(args, ranks, args.step_tokens[:1]) if "steps" in args.what else (),
        meshes_of(args, ranks) if "meshes" in args.what else (),
        experts(args, ranks) if "experts" in args.what else (),
        layers(args, ranks) if "layers" in args.what else (),
        steps(args, ranks, args.step_tokens[1:]) if "steps" in args.what else (),  # the longest last: they may not fit
    ):
        for line in lines:
            if comm.rank(ranks.group) == 0:
                yield line


class Ranks:
    """The processes, and the time that they have together."""

    def __init__(self, args):
        from parallel import comm
        from parallel import mesh as meshes

        self.group, self.end = comm.world(), time.monotonic() + args.seconds
        self.size, self.name, self.times = comm.size(self.group), args.device, args.times
        self.device = torch.device("cuda", meshes.local_rank()) if args.device == "cuda" else torch.device("cpu")
        self.took: dict[tuple, tuple[float, int]] = {}  # by kind: seconds of the last measurement, and its tokens
        self.full: dict[tuple, int] = {}  # by kind: tokens for which there was no memory
        self.alone: dict[tuple, float] = {}
        self.meshes: dict = {}

    def measured(
        self, head: dict, build: Callable, times: int, first: float = 15.0, power: int = 1, in_a_row: int = 1
    ) -> dict:
        """`head`, and what was found of the run that `build` returns, with what else there is to say.

        Or why there is nothing: no time is left for as much as the last of its kind took, by its tokens (`first`: the
        first one), no memory, an error. All ranks say the same, if all fail or none of them was waited for.
        """
        kind, tokens = tuple(head[n] for n in ("what", "row", "side")), head["tokens"]
        seconds, before = self.took.get(kind, (first, tokens))
        expected, left = seconds * (tokens / before) ** power, self.agreed(self.end - time.monotonic())[0]
        nothing = {**head, "what": "skipped", "of": head["what"]}
        if left < expected:
            return {**nothing, "reason": f"it may take {expected:.0f} s, and {max(left, 0):.0f} s are left"}
        if kind in self.full:
            return {**nothing, "reason": f"out of memory at {self.full[kind]} tokens"}
        begin = time.monotonic()
        run, more, wrong = self.begun(build)
        wrong = max(self.agreed(wrong))
        if not wrong:
            found = self.clocked(run, times, in_a_row)
            found |= more(found)
        run = more = None
        self.emptied()
        self.took[kind] = time.monotonic() - begin, tokens
        if not wrong:
            return {**head, **found}
        if OUT_OF_MEMORY in wrong:
            self.full[kind], nothing["what"] = tokens, OUT_OF_MEMORY
        else:
            nothing["what"] = "unavailable"
        return {**nothing, "reason": wrong}

    def begun(self, build: Callable) -> tuple:
        """The run, after it ran twice; what else is to say; and what went wrong, if anything did."""
        try:
            run, more = build()
            for _ in range(2):
                clock(run, self.name)
            return run, more, ""
        except torch.OutOfMemoryError as error:
            return None, None, f"{OUT_OF_MEMORY}: {str(error).partition('. GPU')[0]}"
        except Exception as error:
            from parallel import comm

            if comm.lost(error):
                raise
            return None, None, reason(error)

    def agreed(self, x) -> list:
        """Everybody's x."""
        from parallel import comm

        return comm.objects(x, self.group)

    def placed(self, degrees):
        """A mesh, once: each has communicators of its own, and memory for them."""
        from parallel import mesh as meshes

        if degrees not in self.meshes:
            self.meshes[degrees] = meshes.make(degrees, self.device)
        return self.meshes[degrees]

    def emptied(self) -> None:
        gc.collect()  # a sharded model is a ring of references
        if self.name == "cuda":
            torch.cuda.empty_cache()

    def beside(self, key: tuple, line: dict, speed: Callable[[dict], float]) -> dict:
        """The line, with `share`: its speed over that of the rank alone, which came before."""
        if "eager_ms" not in line:
            return line
        if line["side"] == "alone":
            self.alone[key] = speed(line)
        return {**line, "share": speed(line) / self.alone[key] if key in self.alone else None}

    def clocked(self, run: Callable, times: int, in_a_row: int) -> dict:
        """All ranks begin together; the time of a run, or of each of several in a row, is that of the last to end."""
        from parallel import comm
        from parallel.window import Symmetric

        if self.name == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with comm.counted() as seen:
            run()
        seconds = []
        for _ in range(times):
            comm.barrier(self.group)
            seconds.append(clock(lambda: [run() for _ in range(in_a_row)], self.name) / in_a_row)
        own = torch.tensor(seconds, device=self.device, dtype=torch.float64)
        slowest = torch.stack(comm.gather(own, self.group)).amax(0)
        peak = torch.cuda.max_memory_allocated() + Symmetric.held if self.name == "cuda" else float("nan")
        traffic = {"calls": sum(seen.calls.values()), "received_bytes": sum(seen.received.values())}
        return {**spread(slowest.tolist()), "peak_mib": peak / 2**20, **traffic}


def steps(args, ranks: Ranks, lengths: list[int]) -> Iterable[dict]:
    """Whole steps of the trainer: so many tokens on each rank."""
    from parallel import mesh as meshes

    ways = {"alone": None, "data": meshes.Degrees(), "sequence": meshes.Degrees(sequence=ranks.size)}
    for n in lengths:
        for name in args.rows or CUT:
            for side in args.sides:
                head = {"row": name, "side": side, "what": "step", "ranks": ranks.size, "tokens": n}
                head |= how_steps_ran(args)
                sizes = lambda place, n=n: (n * place.sequence_size, place.data_size, 1)
                build = functools.partial(step_of, args, ranks, name, ways[side], sizes)
                line = ranks.measured(head, build, args.steps, first=40.0, in_a_row=IN_A_ROW)
                yield ranks.beside(("step", name, n), line, lambda line: line["tokens_s"] / line["used"])


def meshes_of(args, ranks: Ranks) -> Iterable[dict]:
    """Steps of the same samples on every mesh of all ranks in one dimension, and by one rank alone, half of them at a
    time: as many as a pipeline's stages work at."""
    from parallel import mesh as meshes

    n, half = ranks.size, args.samples // 2
    ways = {
        "alone": None,
        "data": meshes.Degrees(),
        "experts by pair": meshes.Degrees(expert=n),
        "experts by rank": meshes.Degrees(expert=n, dispatch="rank"),
        "tensor": meshes.Degrees(tensor=n),
        "tensor, tokens cut between": meshes.Degrees(tensor=n, between="cut"),
        "pipeline": meshes.Degrees(pipeline=n),
        "sequence": meshes.Degrees(sequence=n),
    }
    for name in args.rows or CUT[:1]:
        for side, degrees in ways.items():
            head = {"row": name, "side": side, "what": "mesh", "ranks": ranks.size}
            head |= {"tokens": args.samples * args.sample_tokens, "samples": args.samples}
            head |= how_steps_ran(args)
            sizes = lambda _: (args.sample_tokens, args.samples, max(half, 1))
            build = functools.partial(step_of, args, ranks, name, degrees, sizes)
            line = ranks.measured(head, build, args.steps, in_a_row=IN_A_ROW)
            yield ranks.beside(("mesh", name), line, lambda line: line["tokens_s"] / line["used"])


def how_steps_ran(args) -> dict:
    return {"preset": args.preset, "recompute": args.recompute, "reshard": args.reshard, "in_a_row": IN_A_ROW}


def step_of(args, ranks: Ranks, name: str, degrees, sizes: Callable) -> tuple[Callable, Callable]:
    """One step, and tokens a second of all ranks (those of `alone`: of one). `sizes` of a mesh: the tokens of a sample,
    how many samples, and how many at a time."""
    from dataclasses import replace

    import train
    from parallel import mesh as meshes

    degrees = degrees and replace(degrees, reshard=args.reshard)
    place = ranks.placed(degrees) if degrees else meshes.Mesh()
    _, config = train.PRESETS[args.preset]
    length, batch, micro = sizes(place)
    config = replace(
        config,
        model=replace(config.model, lsm=name),
        mesh=degrees or meshes.Degrees(),
        length=length,
        batch=batch,
        micro=micro,
        recompute=args.recompute,
        precision="bf16",
        device=args.device,
    )
    ops = train.ops_on(config, place, ranks.device)
    model, how, matrices = train.built(config, ops, place, ranks.device)
    filled(model, how)
    optimizer, done, said, count = train.optimizer_of(config, model, matrices), [], [], iter(range(1000))
    feed, samples = train.feed_of(config, place), Samples(config.model.vocabulary, length)

    def run():
        step = next(count)
        batches = train.micro_batches(config, samples, feed, place, step, ranks.device)
        done.append(train.one_step(config, model, ops, optimizer, batches, step, False))
        said.extend(result.loss for result in done[len(said) : -1])  # the trainer, too, looks at the step before

    facts = {
        "used": place.size,
        "backend": ops.name,
        "parameters": sum(p.numel() for p in model.parameters()),
    }

    def more(found):
        return {"tokens_s": length * batch / found["eager_ms"] * 1e3, "loss": [said[0], said[-1]], **facts}

    return run, more


class Samples:
    """As many documents as one likes, of `length` random tokens each: a stream for `train.micro_batches`."""

    def __init__(self, vocabulary: int, length: int):
        self.vocabulary, self.length = vocabulary, length

    def batch(self, numbers: range):
        from data.stream import Batch

        rng, n = torch.Generator().manual_seed(numbers.start), self.length
        tokens = torch.randint(self.vocabulary, (len(numbers), n + 1), generator=rng)
        place = torch.arange(n).repeat(len(numbers))[None]
        borders = torch.arange(len(numbers) + 1, dtype=torch.int32) * n
        index = torch.arange(numbers.start * n, numbers.stop * n)[None]
        return Batch(tokens[:, :-1].reshape(1, -1), tokens[:, 1:].reshape(1, -1), place, borders, index)


@torch.no_grad()
def filled(model, how: dict) -> None:
    """Small parameters as they begin, matrices by the device's own random numbers, which are there sooner."""
    from parallel import shard
    from reference.model import initialize

    few = {name: start for name, start in how.items() if start[0].numel() < 2**16}
    initialize(model, 0, few)
    for name, weight in model.named_parameters():
        if name not in few:
            shard.local(weight).normal_(0.0, 0.02)


def experts(args, ranks: Ranks) -> Iterable[dict]:
    """One layer of experts, forward and backward: tokens go to the experts, or their parameters come."""
    for n in args.expert_tokens:
        for side in ("alone", "gather", "pair", "rank"):
            head = {"row": "experts", "side": side, "what": "forward+backward", "ranks": ranks.size, "tokens": n}
            head |= {"preset": args.preset, "in_a_row": IN_A_ROW}
            build = functools.partial(expert_layer, args, ranks, side, n)
            line = ranks.measured(head, build, args.times, in_a_row=IN_A_ROW)
            yield ranks.beside(("experts", n), line, lambda line: 1 / line["eager_ms"])


def expert_layer(args, ranks: Ranks, side: str, n: int) -> tuple[Callable, Callable]:
    """`gather`: FSDP's, of all parameters in bfloat16; `pair` and `rank`: what travels of a token."""
    import train
    from parallel import mesh as meshes
    from parallel import shard
    from reference.model import Side, experts_of, starts
    from reference.moe import MoE

    degrees = meshes.Degrees() if side == "gather" else meshes.Degrees(expert=ranks.size, dispatch=side)
    place = meshes.Mesh() if side == "alone" else ranks.placed(degrees)
    config = train.replace(train.PRESETS[args.preset][1], precision="bf16", device=args.device)
    ops = train.ops_on(config, place, ranks.device)
    with torch.device("meta"):
        holder = Holder(MoE(experts_of(config.model), ops))
    how = starts(holder)
    shard.shard(holder, place, [], torch.bfloat16)
    filled(holder.to_empty(device=ranks.device), how)
    x = torch.randn(1, n, config.model.width, device=ranks.device).requires_grad_()
    dy, side_of = torch.randn_like(x), Side(positions=None)

    def run():
        with train.precise(config, ranks.device):
            y, _ = holder(x, side_of)
        y.backward(dy.to(y))
        holder.zero_grad()
        x.grad = None

    numbers = sum(w.numel() for w in holder.layer.own().values())

    def more(found):  # FSDP's bytes our counters do not see: twice in bfloat16, and the gradients in float32
        moved = numbers * (2 + 2 + 4) * (ranks.size - 1) // ranks.size
        return {"received_bytes": moved} if side == "gather" else {}

    return run, more


class Holder(torch.nn.Module):
    """What a layer is sharded within."""

    def __init__(self, layer: torch.nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer(*inputs)


def layers(args, ranks: Ranks) -> Iterable[dict]:
    """One token mixer's core, forward and backward, of a sequence cut over all ranks."""
    ways = [(name, how) for name in args.rows or CUT for how in ("alone", "gather", "ring")]
    ways += [("softmax", how) for how in ("alone", "gather", "ring", "ulysses")]
    for t in args.tokens:
        for name, how in ways:
            if name == "softmax" and t > args.softmax_tokens:
                continue
            shape = (1, t // ranks.size, args.heads, args.size)
            head = {"row": name, "side": how, "what": "forward+backward", "shape": text(shape), "tokens": t}
            head["ranks"] = ranks.size
            power = 2 if name == "softmax" else 1
            line = ranks.measured(head, functools.partial(mixer, ranks, name, how, shape), ranks.times, 5.0, power)
            yield ranks.beside((name, t), line, lambda line: 1 / line["eager_ms"])


def mixer(ranks: Ranks, name: str, how: str, shape: tuple[int, ...]) -> tuple[Callable, Callable]:
    from parallel import lasp

    ops = operations(ranks.name)
    if how != "alone":
        ops = lasp.over(ops, ranks.group, *((how, "gather") if name == "softmax" else ("gather", how)))
    return layer(ops, name, shape, ranks.device), lambda found: {}


def operations(device: str):
    if device == "cuda":
        import fast

        return fast.ops
    import reference as plain

    return plain.ops


def layer(ops, name: str, shape: tuple[int, ...], device: torch.device) -> Callable:
    """Forward and backward of a row, or of causal softmax attention, on this rank's tokens."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    b, t, h, d = shape
    drawn = inputs("linear_attention" if name == "softmax" else name, b, min(t, DRAWN), h, d, dtype)
    row, tokens, constants = on(device, drawn)
    tokens = {n: torch.cat([x] * -(-t // DRAWN), 1)[:, :t].contiguous() for n, x in tokens.items()}
    leaves = [x.requires_grad_() for x in tokens.values()]
    do = torch.randn_like(tokens["v"])

    def run():
        if name == "softmax":
            o = ops.attention(tokens["q"], tokens["k"], tokens["v"])[0]
        else:
            o = ops.recurrence(row, tokens, constants)[0]
        return torch.autograd.grad(o, leaves, do)

    return run


# ---------------------------------------------------------------------------------------------------------- report


def facts(args) -> dict:
    """Where, when and with what: repeated on every line, so that a line can be read alone."""
    sources = sorted((Path(__file__).parent / "fast" / "kernels").glob("*.py"))
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(args.device),
        "driver": driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fla": version("fla-core"),
        "commit": args.commit,
        "kernels_sha256": hashlib.sha256(b"".join(file.read_bytes() for file in sources)).hexdigest()[:12],
        "command": "python bench.py " + " ".join(Path(a).name if a == args.out else a for a in sys.argv[1:]),
    }


def machine(device: str) -> str:
    cpu = f"CPU {platform.machine()}, {os.cpu_count()} cores"
    return torch.cuda.get_device_name() if device == "cuda" else cpu


def driver() -> str | None:
    return asked_of_driver("driver_version")


def asked_of_driver(what: str) -> str | None:
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return asked.stdout.strip() or None


def progress(names):
    try:
        from tqdm import tqdm
    except ImportError:
        return names
    return tqdm(names)


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def text(shape) -> str:
    return "B{} T{} H{} D{}".format(*shape)


def as_text(line: dict) -> str:
    """One line of the table."""
    if line["what"] == "ceilings":
        return f"ceilings: copy {line['copy_gb_s']:.0f} GB/s, bf16 product {line['matmul_tflop_s']:.0f} TFLOP/s"
    head = f"{line['row']:28} {line['side']:22}"
    if "ranks" in line and "eager_ms" in line:
        received = f"{line['received_bytes'] / 2**20:9.2f} MiB received, {line['peak_mib']:9.0f} MiB"
        share = "" if line["share"] is None else f", share {line['share']:.3f}"
        speed = f"{line['tokens_s']:10.0f} tokens/s" if "tokens_s" in line else ""
        return f"{head} {line['tokens']:9} tokens {line['eager_ms']:10.3f} ms{share}, {received} {speed}"
    if "ranks" in line:
        return f"{head} {line['tokens']:9} tokens {line['of']:17} {line['what']}: {line['reason']}"
    if line["what"] == "unavailable":
        head += f" {line['shape']:20} {line['of']:17}" if "of" in line else ""
        return f"{head} unavailable: {line['reason']}"
    if "error_over_budget" in line:
        return f"{head} {line['what']}: {line['error_over_budget']}, first call {line['first_call_s']:.1f} s"
    if line["what"] == "tuned":
        return f"{head} {line['shape']:20} {'tuned':17} first call {line['first_call_s']:.1f} s"
    if line["what"] == "decode":
        times = f"eager {1e3 * line['eager_ms']:8.1f}  graph {1e3 * line['graph_ms']:8.1f} us"
        held = f"{100 * line['floor_share']:4.0f} % of the floor {line['peak_mib']:8.2f} MiB"
        return f"{head} {line['shape']:20} {'decode':17} {times} {held}"
    if "graph_ms" in line:
        times = (
            f"eager {line['eager_ms']:8.3f}  graph {line['graph_ms']:8.3f} ms {line['graph_over_floor']:6.2f} x floor"
        )
        return f"{head} {line['shape']:20} {line['what']:17} {times} {line['extra_mib']:7.0f} MiB"
    if "settings" in line:
        ratios = "; ".join(
            f"{setting} {x['output']:.2f} ({' '.join(f'{x[n]:.2f}' for n in x['error'])}), memory {x['memory']:.2f}"
            for setting, x in line["settings"].items()
        )
        return f"{head} {line['verdict']}, {line['seconds']:.0f} s: {ratios}"
    place = f"{line.get('shape', ''):20}"
    if line["what"] == "skipped":
        return f"{head} {place} {line['of']:17} skipped: {line['reason']}"
    if "ratio" in line:
        return f"{head} {place} {line['ratio']:8.1f}"
    return f"{head} {place} {line['what']:17} {line['eager_ms']:10.3f} ms {line['peak_mib']:9.2f} MiB"


COMMANDS = {
    "reference": reference,
    "drift": drift,
    "kernels": kernels,
    "tune": tune,
    "local": local,
    "parallel": parallel,
}
TABLES = {"reference": summary}  # of all lines, printed at the end

if __name__ == "__main__":
    try:
        main()
    finally:
        if "parallel.mesh" in sys.modules:
            sys.modules["parallel.mesh"].close()
