"""Writes the README's tables from the code.

    python docs/tables.py                     rewrites README.md in place
    python docs/tables.py --check             exits with 1, and one line, if README.md is not what would be written
    python docs/tables.py [--check] FILE      the same for another file at the repository's root

A table stands between two comments, `<!-- begin: models -->` and `<!-- end: models -->`; the names are those of
`TABLES` at the end of this file. What is between them is replaced. Links carry line numbers, so a moved row is a
changed README.
"""

import argparse
import ast
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository, where it is not installed

import torch

from reference.balance import LOSS, Loss
from reference.lsm import LSM
from reference.model import LanguageModel, sizes, state_bytes
from reference.ops import Ops, ops
from reference.presets import PRESETS, Model
from reference.printed import PRINTED
from reference.recurrence import Row
from reference.routers import ROUTER, Router
from reference.span import transition

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"<!-- begin: ([\w-]+) -->\n(.*?)<!-- end: \1 -->", re.DOTALL)
MARKER = re.compile(r"<!-- (?:begin|end): ([\w-]+) -->")
WIDTH, HEADS = 1024, 8  # of the layers whose state is measured
CACHED = 128 * 1024  # tokens of the cache that it is compared with
FOLDERS = ("reference", "fast", "parallel", "data", "notebooks", "docs")


def table(columns: str, rows: list[list]) -> str:
    """A Markdown table. `columns` are names separated by |; one that ends in : is set to the right."""
    names = [name.strip() for name in columns.split("|")]
    rule = ["--:" if name.endswith(":") else "---" for name in names]
    lines = [[name.rstrip(":") for name in names], rule, *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def line_of(file: str, pattern: str) -> int:
    """The number of the first line that matches."""
    for number, line in enumerate((ROOT / file).read_text().splitlines(), 1):
        if re.search(pattern, line):
            return number
    raise ValueError(f"no line of {file} matches {pattern!r}")


def link(text: str, file: str, pattern: str) -> str:
    return f"[{text}]({file}#L{line_of(file, pattern)})"


def paper(title: str, source: str) -> str:
    """A link to an arXiv id or an address."""
    return f"[{title}]({source if '://' in source else f'https://arxiv.org/abs/{source}'})"


# ------------------------------------------------------------------------------------------------------ the tables


@torch.no_grad()
def published(name: str, ops: Ops = ops) -> LanguageModel:
    """The row's published layer, alone in a model of `WIDTH` and `HEADS`, in bfloat16, all its weights 0."""
    model = LanguageModel(Model(pattern="L", lsm=name, width=WIDTH, heads=HEADS), ops).bfloat16()
    for weight in model.parameters():
        weight.zero_()
    return model


@functools.cache
@torch.no_grad()
def layer_bytes(name: str) -> int:
    """Bytes of the state that the row's published layer keeps of a text, memory in float32, taps in bfloat16.

    Measured behind one token: `tests/test_mixers.py` shows that it does not grow.
    """
    model = published(name)
    return state_bytes(model(torch.zeros(1, 1, dtype=torch.int64), keep_state=True).state.mixers)


def cache_bytes() -> int:
    """Bytes of a softmax layer's keys and values of `CACHED` tokens in bfloat16."""
    return CACHED * 2 * WIDTH * 2


def models() -> str:
    columns = "model | name | decay | update | read | A of a span | state of a layer: | KV cache over it: | code"
    return table(columns, [model(name, row) for name, row in LSM.items() if name not in PRINTED])


def model(name: str, row: Row) -> list:
    file, layer = row.mixer.split(":")
    at = link("row", "reference/lsm.py", rf'^    "{name}":')
    around = link(layer, f"reference/mixers/{file}.py", rf"^class {layer}\b")
    words = [f"`{word.__name__}`" for word in (row.decay, row.update, row.read)]
    state = layer_bytes(name)
    size, times = f"{state / 1024:,.0f} KiB", f"{cache_bytes() / state:,.0f}"
    kind = transition(row) or "not affine"
    return [paper(row.title, row.paper), f"`{name}`", *words, kind, size, times, f"{at}, {around}"]


def routers() -> str:
    columns = "router | name | causal | prefix-stable | capacity: | balanced by | code"
    return table(columns, [router(name, row) for name, row in ROUTER.items()])


def router(name: str, row: Router) -> list:
    yes = ["yes" if flag else "no" for flag in (row.causal(), row.prefix_stable())]
    capacity = "none" if row.capacity == float("inf") else f"{row.capacity:g}"
    rules = ["bias"] * row.bias + [f"{loss} {weight:g}" for loss, weight in row.losses.items()]
    at = link("row", "reference/routers.py", rf'^    "{name}":')
    return [paper(row.title, row.paper), f"`{name}`", *yes, capacity, ", ".join(rules) or "its choice", at]


def losses() -> str:
    columns = "loss | name | at perfect balance: | for | code"
    return table(columns, [loss(name, row) for name, row in LOSS.items()])


def loss(name: str, row: Loss) -> list:
    at = link("formula", "reference/balance.py", rf"^def {row.value.__name__}\b")
    value = "–" if row.at_balance is None else f"{row.at_balance:g}"
    return [paper(row.title, row.paper), f"`{name}`", value, row.needs, at]


def presets() -> str:
    columns = (
        "preset | what | pattern | width: | heads: | experts × width, top-k"
        " | parameters without embeddings: | active of them: | embeddings:"
    )
    return table(columns, [preset(name, *entry) for name, entry in PRESETS.items()])


def preset(name: str, what: str, config) -> list:
    count = sizes(config)
    heads = f"{config.heads}, {config.attention_heads}" if config.attention_heads else config.heads
    experts = f"{config.experts} × {config.expert_width}, {config.top_k}" if "E" in config.letters else "none"
    inner = [millions(count[kind] - count["embeddings"]) for kind in ("total", "active")]
    stack = ", ".join(part for part in (config.first, f"{config.pattern} × {config.repeat}", config.last) if part)
    stack += ", bare" * config.bare
    return [f"`{name}`", what, stack, config.width, heads, experts, *inner, millions(count["embeddings"])]


def millions(count: int) -> str:
    return f"{count / 1e6:,.0f} M" if count >= 1e8 else f"{count / 1e6:,.1f} M"


def tree() -> str:
    """Every Python file of the project, with the first sentence of its docstring."""
    lines = [(file.name, about(file)) for file in sorted(ROOT.glob("*.py"))]
    for folder in FOLDERS:
        lines += list(branch(ROOT / folder))
    lines.append(("tests/", "the laws, parametrised by the tables"))
    room = max(len(name) for name, _ in lines) + 2
    return "```text\n" + "".join(f"{name:{room}}{comment}".rstrip() + "\n" for name, comment in lines) + "```\n"


def branch(folder: Path, indent: str = ""):
    files = sorted(folder.glob("*.py"))
    if not files and not any(folder.glob("*/*.py")):
        return
    start = folder / "__init__.py"
    yield f"{indent}{folder.name}/", about(start) if start in files else ""
    for file in files:
        if file != start:
            yield f"{indent}  {file.name}", about(file)
    for below in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"):
        yield from branch(below, indent + "  ")


def about(file: Path) -> str:
    """The first sentence of a file's docstring, of a notebook's title."""
    text = file.read_text()
    title = re.search(r"^# # (.+)$", text, re.MULTILINE)
    if text.startswith("# %%") and title:
        return title[1]
    doc = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0].replace("\n", " ")
    return doc.split(". ")[0].rstrip(".:")


TABLES: dict[str, Callable[[], str]] = {f.__name__: f for f in (models, routers, losses, presets, tree)}

# ------------------------------------------------------------------------------------------------------ the file


def written(text: str) -> str:
    """The text with its tables as the code has them. ValueError, one line, for unknown or unpaired markers."""
    found = MARKER.findall(text)
    unknown = [name for name in found if name not in TABLES]
    if unknown:
        raise ValueError(f"there is no table {unknown[0]!r}; there are {', '.join(TABLES)}")
    if found != [name for block in BLOCK.finditer(text) for name in (block[1], block[1])]:
        raise ValueError(f"markers must come in pairs of begin and end, each on its own line; found {', '.join(found)}")
    return BLOCK.sub(lambda block: f"<!-- begin: {block[1]} -->\n{TABLES[block[1]]()}<!-- end: {block[1]} -->", text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the README's tables from the code.")
    parser.add_argument("file", nargs="?", type=Path, default=ROOT / "README.md")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    asked = parser.parse_args(arguments)
    try:
        text = asked.file.read_text()
        new = written(text)
    except (OSError, ValueError) as error:
        print(f"{asked.file.name}: {error}", file=sys.stderr)
        return 1
    if asked.check and new != text:
        print(f"{asked.file.name} differs from the code: run python docs/tables.py", file=sys.stderr)
        return 1
    if new != text:
        asked.file.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
