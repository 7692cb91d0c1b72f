"""Writes docs/gallery.md: every row of the table as an equation, with what it costs, keeps and runs on.

    python docs/gallery.py             rewrites docs/gallery.md
    python docs/gallery.py --check     exits with 1, and one line, if docs/gallery.md is not what would be written

Equations are composed of `docs.words`; sizes, bytes and operations are those of the published layers, from `docs.cost`.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the repository, where it is not installed
sys.path.append(str(ROOT / "tests"))  # the oracles


from docs import tables
from docs.cost import layer
from docs.words import Word, meaning
from oracles import FAMILIES
from reference import forms
from reference.chunked import CHUNK
from reference.lsm import LSM
from reference.normal import has_normal
from reference.printed import PRINTED
from reference.recurrence import Row
from reference.span import TRANSITION, transition

FILE = ROOT / "docs" / "gallery.md"
FORMS = {  # functions of reference.forms -> what that file calls their form
    "rotated": "rotation",
    "twice": "two readings",
    "convolved": "convolution",
    "with_momentum": "momentum",
    "over_mini_batches": "mini-batches",
}
ABOUT = f"""# The table as a picture

Every linear sequence model of [reference/lsm.py](../reference/lsm.py) as an equation. Written by
`python docs/gallery.py` from the table itself: do not edit.

![The models, placed by how their memory decays and what is written](grid.svg)

All vectors are rows. M is the memory of one head, a matrix whose rows are key channels and whose columns are value
channels; N, where there is one, is a second memory. Of each token come q (query), k (key), v (value) and what else a
row names: g and f log decays, β a write strength, Δ a step, θ an angle, a and b keys to erase by. They carry a t where
a decay depends on the token. φ are features. In shapes b is the batch, t time, h heads, k and v the sizes of keys and
values, r = k + 1, m slots, l levels.

**Sizes** are those of the published layer at width {tables.WIDTH:,} with {tables.HEADS} heads: its parameters, the
bytes that it keeps of a text of any length (memory in float32, taps of convolutions in bfloat16), and how many times as
large the keys and values of {tables.CACHED // 1024}K tokens in bfloat16 are.

**Operations** are counted while that layer's recurrence runs, all heads together, without its projections: 2mnk for a
product of matrices, one a number for whatever else computes. Training is the chunk form forward and backward over
{CHUNK} tokens in the middle of a text, a token's share; decoding is one step of a running text. They are what the
reference computes, not the least that would do: it merges the levels of log-linear memories, for one, by a matrix of
zeros and ones.

**A** is what a run of tokens does to the memory, M → A ⋄ M + S; its class says which numbers it holds, and
[reference/span.py](../reference/span.py) how they act.
"""

# ------------------------------------------------------------------------------------------------------ equations


def put(formula: str, M: str, N: str) -> str:
    """The formula with those memories in place of M and N; M_t and N_t stay."""
    return re.sub(r"\b[MN]\b", lambda found: M if found[0] == "M" else N, formula)


def equations(row: Row) -> list[tuple[str, str]]:
    """(left, right) of the row: its update of what its decay leaves, and its read."""
    decay, update, read = (spelled(word.__name__) for word in row[:3])
    M, N = (put(f or last, "M_{t-1}", "N_{t-1}") for f, last in ((decay.formula, "M"), (decay.second, "N")))
    lines = [("M_t", put(update.formula, M, N))]
    if update.second or decay.second:
        lines.insert(0, ("N_t", put(update.second or "N", M, N)))
    lines = [(left, featured(right, row)) for left, right in [*lines, ("o_t", read.formula)]]
    return lines if row.features is None else [*lines, tuple(spelled(row.features.__name__).formula.split(" = ", 1))]


def spelled(name: str) -> Word:
    """The word's entry; a word that has none yet is its name."""
    word = meaning(name)
    return word if word.formula else word._replace(formula=rf"\mathrm{{{name.replace('_', ' ')}}}(M)")


def featured(formula: str, row: Row) -> str:
    """With the row's features of q and k in their place."""
    return formula if row.features is None else re.sub(r"(?<![\\A-Za-z])[qk](?![A-Za-z])", r"\\varphi(\g<0>)", formula)


# ------------------------------------------------------------------------------------------------------ the page


def link(text: str, file: str, pattern: str) -> str:
    return tables.link(text, file, pattern).replace("](", "](../")


def form(row: Row) -> tuple[str, str]:
    """The row's chunk form, linked, and what it does."""
    if has_normal(row):
        return link("normal form", "reference/chunked.py", "^def over_chunks"), "a chunk of tokens in matrix products"
    function = forms.of(row).run.__qualname__.split(".")[0]
    name = FORMS.get(function, function)
    about = re.search(rf"^ +{name}  +(.+)$", forms.__doc__, re.MULTILINE)
    return link(name, "reference/forms.py", rf"^def {function}\b"), about[1] if about else ""


def oracles(name: str) -> str:
    """What the row's layer is compared with, linked."""
    found = []
    for family in FAMILIES:
        names = dict.fromkeys(title.split(",")[0] for title, oracle in family.ORACLES.items() if oracle.mixer == name)
        if names:
            found.append(link(", ".join(names), f"tests/oracles/{Path(family.__file__).name}", "^ORACLES"))
    return ", ".join(found)


def anchor(title: str) -> str:
    """The name that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def kilo(count: float) -> str:
    return f"{count / 1000:,.0f}"


def overview() -> str:
    columns = "model | memory | A | chunk form | KiB kept: | training, 10³ operations a token: | decoding:"
    return tables.table(columns, [line(name, row) for name, row in LSM.items()])


def line(name: str, row: Row) -> list:
    memory = dict(equations(row))
    shown = ", ".join(f"$`{left} = {memory[left]}`$" for left in ("N_t", "M_t") if left in memory)
    size = layer(name)
    title, kind = f"[{row.title}](#{anchor(row.title)})", transition(row) or "not affine"
    return [title, shown, kind, form(row)[0], f"{size.bytes / 1024:,.0f}", kilo(size.training), kilo(size.decoding)]


def section(name: str, row: Row) -> str:
    lines = " \\\\\n".join(f"{left} &= {right}" for left, right in equations(row))
    said = "; ".join(f"`{word.__name__}`: {meaning(word.__name__).about}" for word in row[:3])
    kind, size = transition(row), layer(name)
    affine = (
        f"{kind}, `b {TRANSITION[kind].shape}`; affine"
        if kind
        else "none: not affine, over ranks its memory goes from one to the next"
    )
    shapes = [", ".join(f"{n} `{shape}`" for n, shape in inputs.items()) for inputs in (row.tokens, row.constants)]
    constants = f"; constants {shapes[1]}" if shapes[1] else ""
    kept, times = f"{size.bytes / 1024:,.0f}", f"{tables.cache_bytes() / size.bytes:,.0f}"
    file, mixer = row.mixer.split(":")
    where = "lsm" if name not in PRINTED else "printed"
    code = [
        link("row", f"reference/{where}.py", rf'^    "{name}":'),
        link(mixer, f"reference/mixers/{file}.py", rf"^class {mixer}\b"),
    ]
    return f"""### {row.title}

```math
\\begin{{aligned}}
{lines}
\\end{{aligned}}
```

- `{name}`, {tables.paper(row.paper, row.paper)}. {said}
- A of a span: {affine}
- chunk form: {": ".join(filter(None, form(row)))}
- inputs: tokens {shapes[0]}{constants}; memory `{row.memory}`
- layer: {tables.millions(size.parameters)} parameters, {kept} KiB kept; the cache is {times} times that
- operations a token: {kilo(size.training)} thousand in training, {kilo(size.decoding)} thousand in decoding
- used in: {row.used or "–"}
- code: {", ".join(code)}; held to {oracles(name)}
"""


def page() -> str:
    own, loose = ([section(n, row) for n, row in LSM.items() if (n in PRINTED) == kind] for kind in (False, True))
    titles = "## All rows", "## The models", "## As Table 1 of Linear-MoE prints them"
    return "\n".join([ABOUT, titles[0] + "\n", overview(), titles[1] + "\n", *own, titles[2] + "\n", *loose])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/gallery.md from the code.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    asked = parser.parse_args(arguments)
    new = page()
    if not asked.check:
        FILE.write_text(new)
    elif not FILE.exists() or FILE.read_text() != new:
        print(f"{FILE.name} differs from the code: run python docs/gallery.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
