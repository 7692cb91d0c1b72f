"""Draws the README's picture from the table of models: decays across, updates down, each model in its cell.

    python docs/figure.py          writes docs/grid.svg and docs/grid.png, the same bytes every time

Words of a kind share a column or a lane: `docs.words` has each word's kind and formula. Places, colours and the words
under each name come from `reference.lsm.LSM`; a new row appears by itself, a new word by its name, as a kind of its
own until `docs.words` has an entry for it.
"""

import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, where it is not installed

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.textpath import TextPath

from docs.words import MEANING, meaning
from reference.lsm import LSM
from reference.printed import PRINTED
from reference.recurrence import Row
from reference.span import transition

ROOT = Path(__file__).resolve().parent.parent

# class of a span's A -> what A is, fill and edge of its chips
CLASS = {
    "scalar": ("a number", "#e9eef5", "#8aa0bd"),
    "channel": ("a number a channel", "#e3f1ec", "#76ab99"),
    "cross": ("a number a row times one a column", "#e6f3d8", "#93b56a"),
    "element": ("a number an element", "#f6f3cf", "#b9ad4f"),
    "rotation": ("a complex number a channel", "#ebe4f6", "#9d86c6"),
    "spiral": ("a complex number an element", "#f7e3f1", "#c685b2"),
    "levels": ("a mix of whole memories", "#dff0f7", "#6fabc4"),
    "matrix": ("a matrix", "#f9eddc", "#cfa468"),
    None: ("not affine: no A", "#f8dfdc", "#c97f77"),
}
OTHER = ("", "#f0f0f0", "#999999")
PLAIN = "inclusive"  # as most rows read: their chips do not say it
FONT = "DejaVu Sans"  # comes with matplotlib
INK, QUIET, LINE, LANE = "#1f2933", "#66727f", "#d5dae0", "#fafbfc"

# letters as paths: the picture looks the same wherever it is shown; the salt names its parts the same every time
STYLE = {"font.family": FONT, "mathtext.fontset": "stix", "svg.fonttype": "path", "svg.hashsalt": "grid"}

# pixels
WIDTH, MARGIN, LABELS, TITLE, LEGEND = 1000, 14, 166, 50, 28
CHIP, WORDS, GAP, PAD = 16, 13, 9, 9  # height of a line of a chip's name and of its words, between chips, around them
KIND, NAME, FORMULA, BREAK = 24, 13, 17, 4  # heights in a column's or a lane's head: its kind; each word, and a break


class Chip(NamedTuple):
    """One model in its cell: its name, and the row's words under it."""

    title: str
    lines: list[str]
    words: list[str]
    kind: str | None

    @property
    def height(self) -> int:
        return CHIP * len(self.lines) + WORDS * len(self.words) + 9


def shown() -> list[Row]:
    """The rows of the table, but for the survey's looser rules."""
    return [row for name, row in LSM.items() if name not in PRINTED]


def words(part: str) -> list[str]:
    """The names that the table's rows have for one of their words: as `docs.words` has them, and then the others."""
    found = {getattr(row, part).__name__ for row in shown()}
    return [name for name in MEANING if name in found] + sorted(found - MEANING.keys())


def kinds(part: str) -> dict[str, list[str]]:
    """kind -> its words."""
    out: dict[str, list[str]] = {}
    for name in words(part):
        out.setdefault(meaning(name).group, []).append(name)
    return out


def size(text: str, pixels: float) -> float:
    """Width of a text, in pixels."""
    return TextPath((0, 0), text, size=pixels, prop=FontProperties(family=FONT)).get_extents().x1


def wrap(text: str, room: float, pixels: float) -> list[str]:
    """Into lines that fit, cut at spaces and behind hyphens."""
    lines = [""]
    for word in re.findall(r"\s*[^\s-]+-?", text):
        if lines[-1] and size(lines[-1] + word, pixels) > room:
            lines.append(word.strip())
        else:
            lines[-1] += word if lines[-1] else word.strip()
    return lines


def chip(row: Row, room: float) -> Chip:
    names = [word.__name__ for word in row[:3]]
    if names[2] == PLAIN:
        names.pop()
    return Chip(row.title, wrap(row.title, room, 12.5), wrap(", ".join(names), room, 10.5), transition(row))


def cells(room: float) -> dict[tuple[str, str], list[Chip]]:
    """(kind of decay, kind of update) -> the models there."""
    out: dict[tuple[str, str], list[Chip]] = {}
    for row in shown():
        place = meaning(row.decay.__name__).group, meaning(row.update.__name__).group
        out.setdefault(place, []).append(chip(row, room))
    return out


def entry(kind: str, name: str, room: float) -> list[tuple[str, int]]:
    """A word in the head of its column or lane: its name, unless the kind is called so, and what it changes."""
    word = meaning(name)
    formulas = [
        f"${f}$" for f, same in ((word.formula, word.second and "M"), (word.second, "N")) if f not in ("", same)
    ]
    both = r"$,\;\;\,$".join(formulas)
    if len(formulas) > 1 and size(both, 12.5) <= room:
        formulas = [both]
    return ([] if kind == name else [(name, NAME)]) + [(f, FORMULA) for f in formulas]


def head(kind: str, names: list[str], room: float) -> list[tuple[str, int]]:
    """The lines of a column's or a lane's head, with their heights."""
    return [(kind, KIND)] + [line for name in names for line in [*entry(kind, name, room), ("", BREAK)]]


def height(lines: list[tuple[str, int]]) -> int:
    return sum(high for _, high in lines)


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

    def stack(self, x, y, lines: list[tuple[str, int]], **how):
        """The lines of a head, one below the other: the kind in bold, names in quiet letters, formulas."""
        for i, (what, high) in enumerate(lines):
            pixels, color = (12.5, INK) if "$" in what or not i else (11, QUIET)
            if what:
                self.text(x, y + high / 2, what, pixels, color, weight="normal" if i else "bold", **how)
            y += high


@matplotlib.rc_context(STYLE)
def draw() -> Figure:
    """The picture."""
    decays, updates = kinds("decay"), kinds("update")
    column = (WIDTH - 2 * MARGIN - LABELS) / len(decays)
    columns = [(kind, head(kind, names, column - PAD)) for kind, names in decays.items()]
    lanes = [(kind, head(kind, names, LABELS - PAD)) for kind, names in updates.items()]
    models = cells(column - 2 * PAD - 8)
    heights = [
        2 * PAD
        + max(height(lines), *(sum(c.height + GAP for c in models.get((c, lane), [])) - GAP for c, _ in columns))
        for lane, lines in lanes
    ]
    top = TITLE + 6 + max(height(lines) for _, lines in columns)
    page = Page(top + sum(heights) + LEGEND * (len(reads()) + len(classes()) + 1))
    heading(page)
    across(page, columns, column, top + sum(heights))
    y = top
    for (lane, lines), high in zip(lanes, heights, strict=True):
        page.line([MARGIN, WIDTH - MARGIN], [y, y])
        page.stack(MARGIN + 4, y + (high - height(lines)) / 2, lines, ha="left")
        for i, (kind, _) in enumerate(columns):
            x = MARGIN + LABELS + i * column
            place(page, models.get((kind, lane), []), x + PAD, y, column - 2 * PAD, high)
        y += high
    page.line([MARGIN, WIDTH - MARGIN], [y, y])
    legend(page, y)
    return page.figure


def heading(page: Page) -> None:
    loop = (
        r"$M_t = \mathrm{update}(\mathrm{decay}(M_{t-1}))$",
        r"$o_t = \mathrm{read}(M_t)$",
    )
    page.text(WIDTH / 2, 24, "          ".join(loop), 17)


def across(page: Page, columns: list[tuple[str, list]], column: float, bottom: float) -> None:
    page.text(MARGIN + LABELS - 12, TITLE + KIND / 2, "decay  →", 11, QUIET, ha="right")
    page.text(MARGIN + 4, TITLE + KIND / 2, "update  ↓", 11, QUIET, ha="left")
    for i, (_, lines) in enumerate(columns):
        x = MARGIN + LABELS + i * column
        if i % 2 == 0:
            page.axes.add_patch(Rectangle((x, TITLE), column, bottom - TITLE, facecolor=LANE, edgecolor="none"))
        page.stack(x + column / 2, TITLE, lines)


def place(page: Page, chips: list[Chip], x: float, y: float, width: float, height: float) -> None:
    """The chips of one cell, one below the other, in its middle."""
    y += (height - sum(c.height + GAP for c in chips) + GAP) / 2
    for chip in chips:
        _, fill, edge = CLASS.get(chip.kind, OTHER)
        page.box(x, y, width, chip.height, fill, edge)
        middle, at = x + width / 2, y + 4
        for line in chip.lines:
            page.text(middle, at + CHIP / 2, line, 12.5)
            at += CHIP
        for line in chip.words:
            page.text(middle, at + WORDS / 2, line, 10.5, QUIET)
            at += WORDS
        y += chip.height + GAP


def rows_of(items: list, length) -> list[list[tuple[float, object]]]:
    """The items in as many lines of the legend as it takes: (x, item)."""
    lines, x = [[]], MARGIN + LABELS
    for item in items:
        if lines[-1] and x + length(item) > WIDTH - MARGIN:
            lines, x = [*lines, []], MARGIN + LABELS
        lines[-1].append((x, item))
        x += length(item) + 26
    return lines


def reads() -> list[list[tuple[float, str]]]:
    items = [f"{name}  ${meaning(name).formula}$" if name in MEANING else name for name in words("read")]
    items = [f"{item}  (where none is named)" if item.startswith(f"{PLAIN} ") else item for item in items]
    return rows_of(items, lambda item: size(item, 12.5))


def classes() -> list[list[tuple[float, tuple]]]:
    found = {transition(row) for row in shown()}
    return rows_of([CLASS[kind] for kind in CLASS if kind in found], lambda item: 26 + size(item[0], 12))


def legend(page: Page, y: float) -> None:
    """What the words of the reads and the colours say."""
    y += LEGEND
    page.text(MARGIN + 4, y, "read", 13, weight="bold", ha="left")
    for line in reads():
        for x, text in line:
            page.text(x, y, text, 12.5, ha="left")
        y += LEGEND
    page.text(MARGIN + 4, y, r"span  $M \rightarrow A\,M + S$,  $A$ is", 12.5, ha="left")
    for line in classes():
        for x, (about, fill, edge) in line:
            page.box(x, y - 7, 18, 14, fill, edge, 4)
            page.text(x + 26, y, about, 12, ha="left")
        y += LEGEND


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
