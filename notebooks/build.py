"""Builds the notebooks: each `NN_name.py` in percent format becomes `NN_name.ipynb`, without outputs.

    python notebooks/build.py              writes every notebook whose source has changed
    python notebooks/build.py --check      exits with 1, and one line, if one is not what would be written

The `.py` is the source, the `.ipynb` never edited. A line `# %%` starts a cell of code, `# %% [markdown]` one of text,
whose lines are comments.
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
START = re.compile(r"^# %%(.*)$", re.MULTILINE)
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def sources() -> list[Path]:
    return sorted(HERE.glob("[0-9]*.py"))


def cells(text: str) -> list[tuple[str, str]]:
    """The (kind, content) of each cell of a source in percent format. ValueError for a marker of another kind."""
    before, *parts = START.split(text)
    if before.strip():
        raise ValueError(f"text before the first '# %%': {before.strip().splitlines()[0]!r}")
    return [cell(mark.strip(), body.strip("\n")) for mark, body in zip(parts[::2], parts[1::2], strict=True)]


def cell(mark: str, body: str) -> tuple[str, str]:
    if mark == "":
        return "code", body
    if mark != "[markdown]":
        raise ValueError(f"a cell is '# %%' or '# %% [markdown]', got '# %% {mark}'")
    wrong = [line for line in body.splitlines() if line != "#" and not line.startswith("# ")]
    if wrong:
        raise ValueError(f"a line of a text cell starts with '# ', got {wrong[0]!r}")
    return "markdown", "\n".join(line[2:] for line in body.splitlines())


def notebook(text: str) -> str:
    """The .ipynb (nbformat 4.5) of a source."""
    return (
        json.dumps(
            {
                "cells": [entry(i, kind, body) for i, (kind, body) in enumerate(cells(text))],
                "metadata": METADATA,
                "nbformat": 4,
                "nbformat_minor": 5,
            },
            ensure_ascii=False,
            indent=1,
        )
        + "\n"
    )


def entry(number: int, kind: str, body: str) -> dict:
    common = {"cell_type": kind, "id": f"cell-{number:02}", "metadata": {}, "source": body.splitlines(keepends=True)}
    return common | ({"execution_count": None, "outputs": []} if kind == "code" else {})


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build the notebooks from their .py sources.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if something would change")
    check = parser.parse_args(arguments).check
    for source in sources():
        target, new = source.with_suffix(".ipynb"), notebook(source.read_text())
        if target.exists() and target.read_text() == new:
            continue
        if check:
            print(f"{target.name} differs from {source.name}: run python notebooks/build.py", file=sys.stderr)
            return 1
        target.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
