"""Every notebook runs from top to bottom, and is the build of its source."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reference import recurrence

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "notebooks").glob("[0-9]*.py"))
spec = importlib.util.spec_from_file_location("notebooks_build", ROOT / "notebooks" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)

each = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)


def test_there_are_notebooks():
    assert build.sources() == SOURCES
    assert SOURCES


@each
def test_runs_and_its_asserts_hold(source, tmp_path):
    code = f"import runpy; assert __debug__; runpy.run_path({str(source)!r}, run_name='__main__')"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@each
def test_is_the_build_of_its_source(source):
    built = json.loads(source.with_suffix(".ipynb").read_text())
    code = [cell for cell in built["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in built["cells"]]
    assert found == plainly(source.read_text())
    assert source.with_suffix(".ipynb").read_text() == build.notebook(source.read_text())


def plainly(text):
    """The cells of a source, read a second way: line by line."""
    cells = []
    for line in text.splitlines():
        if line.startswith("# %%"):
            cells.append(("markdown" if "[markdown]" in line else "code", []))
        else:
            kind, lines = cells[-1]
            lines.append(line[2:] if kind == "markdown" else line)
    return [(kind, "\n".join(lines).strip("\n")) for kind, lines in cells]


@each
def test_imports_the_words_and_asserts(source):
    nodes = list(ast.walk(ast.parse(source.read_text())))
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    assert not defined & set(vars(recurrence)), "import from reference/, never define again"
    checks = sum(isinstance(n, ast.Assert) or (isinstance(n, ast.Name) and n.id == "assert_close") for n in nodes)
    assert checks >= 6


def test_the_build_notices_what_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "HERE", tmp_path)
    (tmp_path / "01_a.py").write_text("# %% [markdown]\n# # Title\n#\n# Text\n\n# %%\nx = 1\n\ny = 2\n")
    assert build.main(["--check"]) == 1
    assert build.main([]) == 0
    assert build.main(["--check"]) == 0
    cells = json.loads((tmp_path / "01_a.ipynb").read_text())["cells"]
    assert ["".join(cell["source"]) for cell in cells] == ["# Title\n\nText", "x = 1\n\ny = 2"]
    (tmp_path / "01_a.py").write_text("# %%\nx = 2\n")
    assert build.main(["--check"]) == 1
    assert "01_a.ipynb differs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, message",
    [("x = 1\n", "before the first"), ("# %% [raw]\n", "a cell is"), ("# %% [markdown]\ntext\n", "starts with")],
)
def test_a_source_in_another_format_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        build.cells(text)
