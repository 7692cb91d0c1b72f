"""Draws the README's picture from the table of models: decays across, updates down, each model in its cell.

    python docs/figure.py          writes docs/grid.svg and docs/grid.png, the same bytes every time

Places, colours and signs come from `reference.lsm.LSM`; a new row appears by itself. A new word appears by its name;
what it means may be added to `MEANING`, in row vectors as everywhere (o = q M).
"""

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, where it is not installed

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath

from reference.lsm import LSM
from reference.printed import PRINTED
from reference.recurrence import Row
from reference.span import transition

ROOT = Path(__file__).resolve().parent.parent

# word -> its formula in mathtext, and what it does
MEANING = {
    "keep": (r"$M$", "nothing fades"),
    "fixed": (r"$e^{g_h}\,M$", "a rate for each head"),
    "scalar": (r"$e^{g_t}\,M$", "… and token"),
    "channel": (r"$\mathrm{diag}(e^{g_t})\,M$", "… and key channel"),
    "outer": (r"$M + k^{\mathrm{T}}\,v$", "add"),
    "counted": (r"$M + k^{\mathrm{T}}\,[\,v\;\,1\,]$", "add, and count"),
    "tied": (r"$M + (1 - e^{g_t})^{\mathrm{T}}\,v$", "fill what faded"),
    "delta": (r"$M + \beta\,k^{\mathrm{T}}\,(v - kM)$", "correct"),
    "inclusive": (r"$q\,M_t$", ""),
    "ratio": (r"$q\,M_t$ over its count", "÷"),
    "bonus": (r"$q\,(M_{t-1} + (u\odot k)^{\mathrm{T}}\,v)$", "u"),
}
# class of a span's A -> what A is, fill and edge of its chips
CLASS = {
    "scalar": ("a number", "#e9eef5", "#8aa0bd"),
    "channel": ("a number a channel", "#e3f1ec", "#76ab99"),
    "matrix": ("a matrix", "#f9eddc", "#cfa468"),
}
OTHER = ("", "#f0f0f0", "#999999")
FONT = "DejaVu Sans"  # comes with matplotlib
INK, QUIET, LINE, LANE = "#1f2933", "#66727f", "#d5dae0", "#fafbfc"

# letters as paths: the picture looks the same wherever it is shown; the salt names its parts the same every time
STYLE = {"font.family": FONT, "mathtext.fontset": "stix", "svg.fonttype": "path", "svg.hashsalt": "grid"}

# pixels
WIDTH, MARGIN, LABELS, TITLE, HEAD, LEGEND = 800, 14, 164, 50, 76, 28
CHIP, GAP, PAD, LEAST = 17, 9, 10, 76  # height of a chip's line, between chips, around them; least height of a lane


class Chip(NamedTuple):
    """One model in its cell."""

    lines: list[str]
    kind: str
    sign: str

    @property
    def height(self) -> int:
        return CHIP * len(self.lines) + 11


def shown() -> list[Row]:
    """The rows of the table, but for the survey's looser rules."""
    return [row for name, row in LSM.items() if name not in PRINTED]


def words(part: str) -> list[str]:
    """The names that the table's rows have for one of their words, in the order in which they are defined."""
    found = {getattr(row, part) for row in shown()}
    return [f.__name__ for f in sorted(found, key=lambda f: (f.__module__, f.__code__.co_firstlineno))]


def size(text: str, pixels: float) -> float:
    """Width of a text, in pixels."""
    return TextPath((0, 0), text, size=pixels, prop=FontProperties(family=FONT)).get_extents().x1


def wrap(text: str, room: float, pixels: float) -> list[str]:
    """Into lines that fit."""
    lines = []
    for word in text.split():
        if lines and size(f"{lines[-1]} {word}", pixels) <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def sign(row: Row) -> str:
    """What marks the row's read; most rows have the plain one and no mark."""
    name = row.read.__name__
    return MEANING.get(name, ("", name[0]))[1]


def cells(room: float) -> dict[tuple[str, str], list[Chip]]:
    """(decay, update) -> the models there."""
    out: dict[tuple[str, str], list[Chip]] = {}
    for row in shown():
        chip = Chip(wrap(row.title, room - 12, 12.5), transition(row), sign(row))
        out.setdefault((row.decay.__name__, row.update.__name__), []).append(chip)
    return out


class Page:
    """A figure whose coordinates are pixels from the top left corner."""

    def __init__(self, height: float):
        self.figure = Figure(figsize=(WIDTH / 100, height / 100), dpi=100, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def text(self, x, y, what, pixels=12.0, color=INK, **how):
        how = {"ha": "center", "va": "center_baseline", **how}
        self.axes.text(x, y, what, fontsize=pixels * 0.72, color=color, **how)

    def box(self, x, y, width, height, fill, edge="none", radius=5.0):
        shape = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(
            FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=fill, edgecolor=edge, linewidth=0.8)
        )

    def line(self, x, y, color=LINE, width=0.8):
        self.axes.plot(x, y, color=color, linewidth=width, solid_capstyle="butt")

    def badge(self, x, y, what):
        self.axes.add_patch(Circle((x, y), 8, facecolor="white", edgecolor=QUIET, linewidth=0.8, zorder=3))
        self.text(x, y, what, 10.5, zorder=4)


@matplotlib.rc_context(STYLE)
def draw() -> Figure:
    """The picture."""
    decays, updates = words("decay"), words("update")
    column = (WIDTH - 2 * MARGIN - LABELS) / len(decays)
    models = cells(column - 2 * PAD)
    heights = [
        max([2 * PAD + 6 + sum(c.height + GAP for c in models.get((d, u), [])) - GAP for d in decays] + [LEAST])
        for u in updates
    ]
    top = TITLE + HEAD
    page = Page(top + sum(heights) + LEGEND * (len(reads()) + 2))
    heading(page)
    across(page, decays, column, top + sum(heights))
    y = top
    for update, height in zip(updates, heights, strict=True):
        down(page, update, y, height)
        for i, decay in enumerate(decays):
            x = MARGIN + LABELS + i * column
            place(page, models.get((decay, update), []), x + PAD, y, column - 2 * PAD, height)
        y += height
    page.line([MARGIN, WIDTH - MARGIN], [y, y])
    legend(page, y)
    return page.figure


def heading(page: Page) -> None:
    loop = (
        r"$M_t = \mathrm{update}(\mathrm{decay}(M_{t-1}))$",
        r"$o_t = \mathrm{read}(M_t)$",
    )
    page.text(WIDTH / 2, 24, "          ".join(loop), 17)


def across(page: Page, decays: list[str], column: float, bottom: float) -> None:
    page.text(MARGIN + LABELS - 12, TITLE + 18, "decay  →", 11, QUIET, ha="right")
    page.text(MARGIN + 4, TITLE + HEAD - 16, "update  ↓", 11, QUIET, ha="left")
    for i, name in enumerate(decays):
        x = MARGIN + LABELS + i * column
        if i % 2 == 0:
            page.axes.add_patch(Rectangle((x, TITLE), column, bottom - TITLE, facecolor=LANE, edgecolor="none"))
        formula, about = MEANING.get(name, ("", ""))
        middle = x + column / 2
        page.text(middle, TITLE + 18, name, 13.5, weight="bold")
        page.text(middle, TITLE + 39, formula, 15)
        page.text(middle, TITLE + 60, about, 10.5, QUIET)


def down(page: Page, name: str, y: float, height: float) -> None:
    formula, about = MEANING.get(name, ("", ""))
    page.line([MARGIN, WIDTH - MARGIN], [y, y])
    middle, x = y + height / 2, MARGIN + 4
    page.text(x, middle - 18, name, 13.5, weight="bold", ha="left")
    page.text(x, middle + 1, formula, 15, ha="left")
    page.text(x, middle + 19, about, 10.5, QUIET, ha="left")


def place(page: Page, chips: list[Chip], x: float, y: float, width: float, height: float) -> None:
    """The chips of one cell, one below the other, in its middle."""
    y += (height - sum(c.height + GAP for c in chips) + GAP) / 2
    for chip in chips:
        _, fill, edge = CLASS.get(chip.kind, OTHER)
        page.box(x, y, width, chip.height, fill, edge)
        for i, line in enumerate(chip.lines):
            page.text(x + width / 2, y + chip.height / 2 + CHIP * (i - (len(chip.lines) - 1) / 2), line, 12.5)
        if chip.sign:
            page.badge(x + width - 3, y + 3, chip.sign)
        y += chip.height + GAP


def reads() -> list[list[tuple[float, str, str]]]:
    """The legend of the reads, in as many lines as it takes: (x, sign, text)."""
    lines, x = [[]], MARGIN + LABELS
    for name in words("read"):
        formula, mark = MEANING.get(name, ("", name[0]))
        text = f"{name}  {formula}"
        length = (22 if mark else 0) + size(text, 13)
        if lines[-1] and x + length > WIDTH - MARGIN:
            lines, x = [*lines, []], MARGIN + LABELS
        lines[-1].append((x, mark, text))
        x += length + 26
    return lines


def legend(page: Page, y: float) -> None:
    """What the signs and the colours say."""
    start, x = MARGIN + 4, MARGIN + LABELS
    y += LEGEND
    page.text(start, y, "read", 13.5, weight="bold", ha="left")
    for line in reads():
        for at, mark, text in line:
            if mark:
                page.badge(at + 8, y, mark)
            page.text(at + (22 if mark else 0), y, text, 13, ha="left")
        y += LEGEND
    page.text(start, y, r"span  $M \rightarrow A\,M + S$", 13, ha="left")
    page.text(x, y, "$A$ is", 13, ha="left")
    x += 44
    for about, fill, edge in [CLASS[kind] for kind in CLASS if kind in {transition(row) for row in shown()}]:
        page.box(x, y - 7, 20, 14, fill, edge, 4)
        page.text(x + 28, y, about, 12.5, ha="left")
        x += 28 + size(about, 12.5) + 26


def write(folder: Path) -> list[Path]:
    """grid.svg and grid.png in that folder."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "grid.svg", folder / "grid.png"]
    figure = draw()
    with matplotlib.rc_context(STYLE):
        figure.savefig(files[0], metadata={"Date": None, "Creator": None})
        figure.savefig(files[1], dpi=200, metadata={"Software": None})
    return files


if __name__ == "__main__":
    for file in write(ROOT / "docs"):
        print(file.relative_to(ROOT))
