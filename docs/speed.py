"""Draws what was measured of the kernels on GPUs, from lines in bench/results: times over lengths, shares of the floor.

    python docs/speed.py          writes docs/lengths.png and docs/floors.png

A panel a GPU: lines of two GPUs never meet in one. Of a row and a side the newest lines are drawn; a curve is of one
run's kernels. What was not recorded is left out. A star: kernels that have been rewritten since they were measured.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BOTH, AT = "forward+backward", "B8 T2048 H8 D128"
LENGTHS = {AT: 2048, "B1 T16384 H8 D128": 16384}  # of the same 16,384 tokens
PEERS = {"ours": "", "fla": " (FLA)", "torch SDPA": " attention (torch's flash kernel)"}
LINES = {"ours": "-", "fla": "--", "torch SDPA": ":"}
# kernels that are no longer these; or those of one row
REWRITTEN = ("6479faec3c20", "57c554ce8586", "a34abf246e98", "14369835af4d", "mamba2 f1e78674b044")
REWRITTEN += ("based 7b7420ff5730", "rebased 7b7420ff5730", "gate_loop 4383883d522d", "mom_gla fd8befd07dd6")
REWRITTEN += ("gated_fast_weights 0b3ddb52a3a1",)
STYLE = {"font.family": "DejaVu Sans", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
DPI = 110


def recorded(folder: Path = RESULTS) -> list[dict]:
    """Every time of a kernel on a GPU, oldest first within a file."""
    lines = [json.loads(line) for file in sorted(folder.glob("kernels-*.jsonl")) for line in file.open()]
    return [x for x in lines if "graph_ms" in x and x["what"] in ("forward", BOTH)]


def machines(lines: Iterable[dict]) -> list[str]:
    """Those on which some of today's kernels ran."""
    return sorted({x["machine"] for x in lines if x["side"] == "ours" and not label(x).endswith("*")})


def label(x: dict) -> str:
    kernels = x["kernels_sha256"]
    star = "*" if x["side"] == "ours" and {kernels, f"{x['row']} {kernels}"} & set(REWRITTEN) else ""
    return x["row"] + PEERS.get(x["side"], f" ({x['side']})") + star


def curves(lines: Iterable[dict]) -> dict[str, list[dict]]:
    """Forward and backward of each row and side over lengths; of the run that has most of them, the newest of such."""
    runs: dict[tuple, dict[str, dict]] = {}
    for x in lines:
        if x["what"] == BOTH and x["shape"] in LENGTHS:
            key = x["row"], x["side"], x["machine"], x["triton"], x["kernels_sha256"]
            runs.setdefault(key, {})[x["shape"]] = x
    best: dict[tuple, list[dict]] = {}
    for (*who, _, _), found in runs.items():
        points = sorted(found.values(), key=lambda x: LENGTHS[x["shape"]])
        if len(points) >= len(best.get(tuple(who), ())):
            best[tuple(who)] = points
    return {label(points[0]): points for _, points in by_row(best)}


def shares(lines: Iterable[dict]) -> dict[str, dict[str, dict]]:
    """The newest line of each row and side at one shape, forward and with backward."""
    found: dict[tuple, dict[str, dict]] = {}
    for x in lines:
        if x["shape"] == AT:
            found.setdefault((x["row"], x["side"]), {})[x["what"]] = x
    return {label(next(iter(both.values()))): both for _, both in by_row(found)}


def by_row(found: dict[tuple, object]) -> list[tuple]:
    """What is found by (row, side), the sides of a row next to each other."""
    rows = list(dict.fromkeys(row for row, *_ in found))
    return sorted(found.items(), key=lambda item: (rows.index(item[0][0]), item[0][1] != "ours"))


def caption(lines: list[dict]) -> str:
    """Of the lines drawn: GPU, versions, dates; and what a star means."""

    def all_of(field):
        return ", ".join(sorted({str(x[field]) for x in lines}))

    said = f"{all_of('dtype')}, CUDA graphs, {all_of('date')}\ntorch {all_of('torch')}, Triton {all_of('triton')}"
    return said + ("\n* kernels that have been rewritten since" if any(label(x)[-1] == "*" for x in lines) else "")


def panels(n: int, height: float) -> tuple[Figure, list]:
    figure = Figure(figsize=(9.5, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, n, squeeze=False)[0])


def lengths(lines: list[dict]) -> Figure:
    """A curve a row; one length alone is a point."""
    figure, axes = panels(len(machines(lines)), 5.0)
    for ax, machine in zip(axes, machines(lines), strict=True):
        drawn = curves(x for x in lines if x["machine"] == machine)
        rows = list(dict.fromkeys(points[0]["row"] for points in drawn.values()))
        for name, points in drawn.items():  # a colour a row, a line a side
            xs, ys = [LENGTHS[x["shape"]] for x in points], [x["graph_ms"] for x in points]
            i, line = rows.index(points[0]["row"]), LINES.get(points[0]["side"], "-.")
            ax.plot(xs, ys, line, marker="os^Dv"[i % 5], color=f"C{i % 10}", label=name, markersize=4)
        ax.set(xscale="log", yscale="log", xlabel="tokens of a sequence, T", ylabel="forward and backward, ms")
        ax.set_xticks(list(LENGTHS.values()), [f"{t:,}\nB {16384 // t}" for t in LENGTHS.values()])
        ax.set_yticks([0.2, 0.5, 1, 2, 5], ["0.2", "0.5", "1", "2", "5"])
        ax.minorticks_off()
        ax.legend(frameon=False, fontsize=6.5, loc="center left", bbox_to_anchor=(1.0, 0.5), ncols=1)
        ax.set_title(f"{machine}\n{caption([x for points in drawn.values() for x in points])}", fontsize=7.5)
    figure.suptitle("The same 16,384 tokens in sequences of two lengths, H 8, D 128", fontsize=10)
    return figure


def floors(lines: list[dict]) -> Figure:
    """Two bars a row: the time that the bytes need at the least, over the time taken."""
    every = [shares(x for x in lines if x["machine"] == machine) for machine in machines(lines)]
    figure, axes = panels(len(every), 1.6 + 0.19 * max(map(len, every)))
    for ax, machine, drawn in zip(axes, machines(lines), every, strict=True):
        for what, shift, colour in (("forward", -0.2, "#8aa0bd"), (BOTH, 0.2, "#cfa468")):
            there = [(i, 100 / both[what]["graph_over_floor"]) for i, both in enumerate(drawn.values()) if what in both]
            for i, share in there:
                ax.text(share + 0.7, i + shift, f"{share:.0f}", va="center", fontsize=6.5)
            ax.barh([i + shift for i, _ in there], [y for _, y in there], 0.38, color=colour, label=what)
        ax.set_yticks(range(len(drawn)), list(drawn))
        ax.invert_yaxis()
        ax.set(xlim=(0, 100), xlabel="% of the byte floor")
        ax.legend(frameon=False, loc="lower right")
        ax.set_title(f"{machine}\n{caption([x for both in drawn.values() for x in both.values()])}", fontsize=7.5)
    figure.suptitle(AT, fontsize=10)
    return figure


def write(folder: Path, lines: list[dict] | None = None) -> list[Path]:
    lines, files = recorded() if lines is None else lines, []
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("lengths", lengths), ("floors", floors)):
        with matplotlib.rc_context(STYLE):
            draw(lines).savefig(file := folder / f"{name}.png", metadata={"Software": None})
        files.append(file)
    return files


if __name__ == "__main__":
    if not recorded():
        sys.exit(f"docs/speed.py: no times of kernels in {RESULTS}: run `bench.py kernels --out FILE` there")
    for file in write(ROOT / "docs"):
        print(file.relative_to(ROOT))
