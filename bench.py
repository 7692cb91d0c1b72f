"""Every speed in the README comes from here: one JSON line a measurement, and a table.

    python bench.py reference --out bench/results/reference.jsonl                       CPU, two threads, a minute
    python bench.py kernels --commit $(git rev-parse --short HEAD) --out FILE           needs a GPU
    python bench.py kernels --rows mamba2 --peer fla --commit HASH --out FILE           beside flash-linear-attention

Times are medians over many runs, with the 20th and 80th percentile, of random data; `eager` includes what the host
needs to launch, `graph` replays a CUDA graph. The floor is each input read once and each output written once at the
copy bandwidth measured in the same run: forward q k v -> o (4 tensors), forward and backward 11 (the gradient reads
q k v do and writes dq dk dv), gates included. Before anything is timed both sides must pass the error budget against
the token loop in float64, with the same inputs. Peers that cannot run are listed as unavailable, with the reason.
"""

import argparse
import datetime
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

from reference import chunked
from reference import recurrence as exact
from reference.lsm import LSM
from reference.recurrence import counted

SHAPES = ("8x2048x8x128", "1x16384x8x128", "2x16384x16x128")
CHECKED = (1, 512, 2)  # b t h of the inputs for the error budget: the token loop in float64 is slow
TENSORS = {"forward": 4, "forward+backward": 11}


def main() -> None:
    args = parser().parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    everywhere = facts(args)
    with Path(args.out).open("a") as file:  # line by line: what was measured stays when a run is cut off
        for line in COMMANDS[args.command](args):
            print(json.dumps({**everywhere, **line}), file=file, flush=True)
            print(as_text(line), flush=True)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True)
    for name, function in COMMANDS.items():
        sub = commands.add_parser(name, help=function.__doc__.splitlines()[0])
        sub.add_argument("--rows", nargs="+", choices=list(LSM), default=None, help="rows of the table (all there are)")
        sub.add_argument("--commit", default=commit(), help="of the code measured")
        sub.add_argument("--out", required=True, help="file of JSON lines, appended to")
        if name == "reference":
            sub.add_argument("--threads", type=int, default=2, help="of the CPU")
        if name == "kernels":
            sub.add_argument("--peer", nargs="*", choices=list(PEERS), default=[], help="measure these beside ours")
            sub.add_argument("--shapes", nargs="+", default=list(SHAPES), help="b x t x h x d")
            sub.add_argument("--peer-shapes", nargs="+", default=None, help="shapes for peers that tune (all)")
            sub.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    return top


# ------------------------------------------------------------------------------------------------ on the processor


def reference(args) -> Iterable[dict]:
    """The chunk form beside the token loop in plain PyTorch: forward and backward, on CPU threads."""
    torch.set_num_threads(args.threads)
    b, t, h, d = shape = (1, 2048, 4, 64)
    ratios = []
    for name in progress(args.rows or list(LSM)):
        row, tokens, constants = inputs(name, b, t, h, d, torch.float32)
        given = [x.requires_grad_() for x in tokens.values()]
        do = torch.randn(b, t, h, d)
        runs = {}
        for side, f in (("chunked", chunked.recurrence), ("token loop", exact.recurrence)):

            def both(f=f, row=row, tokens=tokens, constants=constants, given=given, do=do):
                torch.autograd.grad(f(row, tokens, constants)[0], given, do)

            runs[side] = both
            both()
        # in turn, so that a machine whose speed drifts is as fast for one as for the other
        turns = [(clock(runs["token loop"]), [clock(runs["chunked"]) for _ in range(4)]) for _ in range(5)]
        seconds = {"chunked": [s for _, many in turns for s in many], "token loop": [s for s, _ in turns]}
        for side, measured in seconds.items():
            yield {
                "row": name,
                "side": side,
                "what": "forward+backward",
                "shape": text(shape),
                "dtype": "float32",
                "threads": args.threads,
                "eager_ms": 1e3 * statistics.median(measured),
                "spread_ms": [1e3 * min(measured), 1e3 * max(measured)],
            }
        ratios.append(statistics.median(seconds["token loop"]) / statistics.median(seconds["chunked"]))
        yield {"row": name, "side": "token loop / chunked", "what": "ratio", "shape": text(shape), "ratio": ratios[-1]}
    yield {"row": "all", "side": "geometric mean", "what": "ratio", "ratio": statistics.geometric_mean(ratios)}


def clock(f: Callable) -> float:
    begin = time.perf_counter()
    f()
    return time.perf_counter() - begin


# ------------------------------------------------------------------------------------------------------ on the GPU


def kernels(args) -> Iterable[dict]:
    """The Triton kernels, and peers on the same inputs, on this GPU."""
    if not torch.cuda.is_available():
        sys.exit("bench.py kernels needs a CUDA GPU; on a CPU there is `bench.py reference`")
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # so that a first call's seconds are a first call's
    import fast.recurrence

    dtype = getattr(torch, args.dtype)
    shapes = [tuple(int(n) for n in s.split("x")) for s in args.shapes]
    peer_shapes = (
        shapes if args.peer_shapes is None else [tuple(int(n) for n in s.split("x")) for s in args.peer_shapes]
    )
    ceiling = ceilings()
    yield ceiling
    for shape in shapes:
        yield from timed("softmax", "torch SDPA", softmax, None, shape, dtype, ceiling)
    for name in args.rows or fast.recurrence.rows():
        for side, (f, where) in contestants(name, args.peer, fast.recurrence.recurrence, shapes, peer_shapes).items():
            head = {"row": name, "side": side, "dtype": args.dtype}
            try:
                yield {**head, **budget(name, f, where[0][3], dtype)}
                for shape in where:
                    yield from timed(name, side, f, fast.recurrence.recurrence, shape, dtype, ceiling)
            except Exception as error:
                yield {**head, "what": "unavailable", "reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
            torch.cuda.empty_cache()


def contestants(name: str, peers: list[str], ours: Callable, shapes, peer_shapes) -> dict:
    return {"ours": (ours, shapes)} | {peer: (PEERS[peer](name), peer_shapes) for peer in peers}


def fla(name: str) -> Callable:
    """flash-linear-attention's operator for the row, as `recurrence(row, tokens, constants)`."""

    def linear(row, x, constants):
        from fla.ops.linear_attn import chunk_linear_attn

        return chunk_linear_attn(x["q"], x["k"], x["v"], 1.0, output_final_state=True, normalize=row.update is counted)

    def slopes(row, x, constants):
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla(x["q"], x["k"], x["v"], g_gamma=constants["g"], scale=1.0, output_final_state=True)

    def gated(row, x, constants):
        from fla.ops.simple_gla import chunk_simple_gla

        return chunk_simple_gla(x["q"], x["k"], x["v"], x["g"], scale=1.0, output_final_state=True)

    operators = {"linear_attention": linear, "linear_attention_normalized": linear, "mamba2": gated}
    operators |= {"lightning": slopes, "retention": slopes}
    return operators.get(name, lambda *_: (_ for _ in ()).throw(NotImplementedError(f"no operator named for {name}")))


PEERS = {"fla": fla}


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
    row, tokens, constants = inputs(name, *CHECKED, d, dtype)
    do = torch.randn(*CHECKED, d).to(dtype)

    def run(f, wide, device):
        there = {n: (x if wide is None else x.to(wide)).to(device).requires_grad_() for n, x in tokens.items()}
        fixed = {n: (x if wide is None else x.to(wide)).to(device) for n, x in constants.items()}
        o = f(row, there, fixed)[0]
        grads = torch.autograd.grad(o, list(there.values()), do.to(o.dtype).to(device))
        return [x.detach().double().cpu() for x in (o, *grads)]

    want = run(exact.recurrence, torch.float64, "cpu")
    plain = run(chunked.recurrence, None, "cpu")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    got = run(f, None, "cuda")
    seconds = time.perf_counter() - begin
    eps, worst = torch.finfo(dtype).eps, {}
    for what, x, y, z in zip(("o", *(f"d{n}" for n in tokens)), got, plain, want, strict=True):
        allowed = 2 * (y - z).abs().max() + eps * z.abs().max()
        worst[what] = round(((x - z).abs().max() / allowed).item(), 3)
    passed = all(ratio <= 1 for ratio in worst.values())  # NaN fails
    return {
        "what": "budget" if passed else "BUDGET EXCEEDED",
        "shape": text((*CHECKED, d)),
        "error_over_budget": worst,
        "first_call_s": seconds,
    }


def timed(name: str, side: str, f: Callable, ours, shape, dtype, ceiling: dict) -> Iterable[dict]:
    """Forward, and forward with backward: eager, as a CUDA graph, extra memory, and the ratio to the byte floor."""
    row, tokens, constants = inputs(name if name in LSM else "linear_attention", *shape, dtype)
    tokens = {n: x.cuda().requires_grad_() for n, x in tokens.items()}
    constants = {n: x.cuda() for n, x in constants.items()}
    do = torch.randn(shape, device="cuda").to(dtype)
    given = list(tokens.values())

    def forward():
        with torch.no_grad():
            return f(row, tokens, constants)[0]

    def both():
        return torch.autograd.grad(f(row, tokens, constants)[0], given, do)

    gates = sum(x.numel() * 4 for n, x in tokens.items() if n == "g")
    for what, run in {"forward": forward, "forward+backward": both}.items():
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        first, extra = time.perf_counter() - begin, peak(run)
        floor = TENSORS[what] * do.numel() * do.element_size() + gates * (1 if what == "forward" else 3)
        floor_ms = floor / ceiling["copy_gb_s"] / 1e6
        eager, graph = median(run), median(captured(run))
        yield {
            "row": name,
            "side": side,
            "what": what,
            "shape": text(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "eager_ms": eager[0],
            "eager_spread_ms": eager[1:],
            "graph_ms": graph[0],
            "graph_spread_ms": graph[1:],
            "floor_bytes": floor,
            "floor_ms": floor_ms,
            "graph_over_floor": graph[0] / floor_ms,
            "extra_mib": extra,
            "first_call_s": first,
        }


def inputs(name: str, b: int, t: int, h: int, d: int, dtype) -> tuple:
    """(row, tokens, constants): normal queries and values, unit keys, gates near 1 as trained models have them."""
    row, rng = LSM[name], torch.Generator().manual_seed(0)
    sizes = {"b": b, "t": t, "h": h, "k": d, "v": d}

    def draw(letters):
        return torch.randn([sizes[letter] for letter in letters.split()], generator=rng)

    made = {
        "k": lambda x: F.normalize(x, dim=-1).to(dtype),
        "g": lambda x: F.logsigmoid(x + 3),
        "beta": lambda x: x.sigmoid().to(dtype),
        "u": lambda x: x,
    }
    tokens = {n: made.get(n, lambda x: x.to(dtype))(draw(s)) for n, s in row.tokens.items()}
    constants = {n: made[n](draw(s)) for n, s in row.constants.items()}
    if row.update is counted:  # a normaliser divides by the sum of the weights: they must be positive
        tokens |= {n: tokens[n].abs() for n in "qk"}
    return row, tokens, constants


def median(run: Callable) -> list[float]:
    """[median, 20 %, 80 %] in ms, the L2 cache emptied before every run."""
    from triton.testing import do_bench

    return [round(x, 5) for x in do_bench(run, warmup=50, rep=300, quantiles=[0.5, 0.2, 0.8])]


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


def peak(run: Callable) -> float:
    """MiB above what was allocated before, outputs and gradients included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


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
    }


# ---------------------------------------------------------------------------------------------------------- report


def facts(args) -> dict:
    """Where, when and with what: repeated on every line, so that a line can be read alone."""
    source = Path(__file__).parent / "fast" / "kernels" / "decay.py"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "driver": driver(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "fla": version("fla-core"),
        "commit": args.commit,
        "kernels_sha256": hashlib.sha256(source.read_bytes()).hexdigest()[:12],
        "command": "python bench.py " + " ".join(Path(a).name if a == args.out else a for a in sys.argv[1:]),
    }


def machine() -> str:
    cpu = f"CPU {platform.machine()}, {os.cpu_count()} cores"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
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


def text(shape) -> str:
    return "B{} T{} H{} D{}".format(*shape)


def as_text(line: dict) -> str:
    """One line of the table."""
    if line["what"] == "ceilings":
        return f"ceilings: copy {line['copy_gb_s']:.0f} GB/s, bf16 product {line['matmul_tflop_s']:.0f} TFLOP/s"
    head = f"{line['row']:28} {line['side']:22}"
    if line["what"] == "unavailable":
        return f"{head} unavailable: {line['reason']}"
    if "error_over_budget" in line:
        return f"{head} {line['what']}: {line['error_over_budget']}, first call {line['first_call_s']:.1f} s"
    if "graph_ms" in line:
        times = (
            f"eager {line['eager_ms']:8.3f}  graph {line['graph_ms']:8.3f} ms {line['graph_over_floor']:6.2f} x floor"
        )
        return f"{head} {line['shape']:20} {line['what']:17} {times} {line['extra_mib']:7.0f} MiB"
    return f"{head} {line['ratio']:8.1f}" if "ratio" in line else f"{head} {line['eager_ms']:8.1f} ms"


COMMANDS = {"reference": reference, "kernels": kernels}

if __name__ == "__main__":
    main()
