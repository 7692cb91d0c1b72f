"""What the packages show each other: one seam, arrows one way, no kernels behind the reference, no ladders of names."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reference
from mutants import MUTANTS, out_of_date
from reference.lsm import LSM
from reference.mixers.softmax import ATTENTION
from reference.ops import Ops
from reference.routers import ROUTER

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("reference", "fast", "parallel", "data")
PROGRAMS = tuple(path.stem for path in ROOT.glob("*.py"))  # train, generate, ...
FUNCTIONS = [name for name in Ops._fields if name not in ("name", "kept", "one_way", "cut", "again", "ends")]

# ----------------------------------------------------------------------------------------------------- the seam


def signature(name: str, function) -> list[str]:
    """The seam's arguments, each with its annotation and default, and what comes back: as text, because jaxtyping's
    types never equal."""
    found = inspect.signature(function)
    taken = [str(p) for p in found.parameters.values()]
    return [*taken[: len(promised()[name])], str(found.return_annotation)]


def fast_ops():
    if not (ROOT / "fast" / "ops.py").exists():
        pytest.skip("there is no package fast here")
    import fast

    return fast.ops


def backends():
    return {"reference": reference.ops, "exact": reference.exact, "fast": fast_ops()}


def promised() -> dict[str, list[str]]:
    """The arguments that the comment behind each field of Ops names."""
    said = re.findall(r"^    (\w+): Callable  # \((.*?)\) -> ", inspect.getsource(Ops), re.MULTILINE)
    return {name: [argument.split()[0] for argument in arguments.split(", ")] for name, arguments in said}


def test_ops_is_a_frozen_tuple_of_functions():
    assert issubclass(Ops, tuple) and set(promised()) == set(FUNCTIONS)
    for backend in (reference.ops, reference.exact):
        assert isinstance(backend, Ops) and backend.kept == ()
        assert all(callable(getattr(backend, name)) for name in FUNCTIONS)
    changed = {name for name in FUNCTIONS if getattr(reference.ops, name) is not getattr(reference.exact, name)}
    assert changed == {"recurrence", "span"}


@pytest.mark.parametrize("backend", ["reference", "exact", "fast"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_take_what_the_seam_says(backend, name):
    """The arguments named in the seam, in that order; whatever else there is has a default."""
    taken = list(inspect.signature(getattr(backends()[backend], name)).parameters.values())
    wanted = promised()[name]
    assert [p.name for p in taken[: len(wanted)]] == wanted
    assert all(p.default is not p.empty for p in taken[len(wanted) :])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_backends_have_the_same_signatures(name):
    wanted = signature(name, getattr(reference.ops, name))
    assert signature(name, getattr(reference.exact, name)) == wanted
    assert signature(name, getattr(fast_ops(), name)) == wanted


def test_what_fast_shares_with_the_reference_it_says_by_name():
    fast = fast_ops()
    assert isinstance(fast, Ops) and fast.name == "fast"
    shared = {name for name in FUNCTIONS if getattr(fast, name) is getattr(reference.ops, name)}
    assert set(fast.kept) == shared and len(fast.kept) == len(shared)
    assert fast.recurrence is not reference.ops.recurrence


# ---------------------------------------------------------------------------------------------------- the arrows


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it: a, a.b and, for `from a import b`, a.b too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parts[: -node.level]) if node.level else ""
            module = ".".join(part for part in (package, node.module) if part)
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def test_imports_are_found_in_every_form(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "a" / "b.py"
    path.parent.mkdir()
    path.write_text("import x.y\nfrom p import q\ndef f():\n    from . import r\n    from .s import t\n")
    assert imported(path) == {"x.y", "p", "p.q", "a", "a.r", "a.s", "a.s.t"}


FORBIDDEN = {
    "reference": ("fast", "parallel", "data", "triton", "fla", "transformers", *PROGRAMS),
    "fast": ("parallel", "data", "fla", "transformers", *PROGRAMS),
    "parallel": ("fast", "data", "triton", "fla", "transformers", "reference.lsm", "reference.routers", *PROGRAMS),
    "data": ("reference", "fast", "parallel", "triton", "fla", "transformers", *PROGRAMS),
}


INSIDE = ("parallel/plan.py",)  # programs that lie in a package, which nobody in it imports


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_one_way(package):
    """train, generate, bench -> parallel -> ops -> fast -> reference; the tables stay behind the seam."""
    for path in sources(package):
        if str(path.relative_to(ROOT)) in INSIDE:
            continue
        assert not imported(path) & {name.removesuffix(".py").replace("/", ".") for name in INSIDE}, path
        wrong = {n for n in imported(path) for f in FORBIDDEN[package] if n == f or n.startswith(f + ".")}
        assert not wrong, f"{path.relative_to(ROOT)} imports {', '.join(sorted(wrong))}"


def test_the_reference_loads_no_kernels():
    """In a fresh process, every file of it."""
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources("reference")]
    modules = [name.removesuffix(".__init__") for name in modules]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\n"
    code += "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = set(run.stdout.split())
    assert {"reference", "torch"} <= loaded
    assert not loaded & {"triton", "fla", "transformers", "fast", "parallel", "data", *PROGRAMS}


def test_models_reach_what_depends_on_the_machine_through_the_seam():
    functions = {f"{f.__module__}.{f.__name__}" for f in (getattr(reference.ops, name) for name in FUNCTIONS)}
    for path in (*sources("reference/mixers"), ROOT / "reference/model.py"):
        assert not imported(path) & functions, path


# ------------------------------------------------------------------------------------------------ no second list


def compared(tree: ast.AST) -> set[str]:
    """Strings that a program compares something with: ==, in, `case`, startswith and the like."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            found += [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            found.append(node.value)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("startswith", "endswith"):
            found += node.args
    return {c.value for x in found for c in ast.walk(x) if isinstance(c, ast.Constant) and isinstance(c.value, str)}


def test_comparisons_are_found_in_every_form():
    code = "a == 'x'\n'y' in b\nc not in ('z', 'u')\nd.startswith('v')\nmatch e:\n    case 'w' | 's': f('q')\n"
    assert compared(ast.parse(code)) == set("xyzuvws")


TABLE = {"reference/lsm.py": LSM, "reference/routers.py": ROUTER, "reference/mixers/softmax.py": ATTENTION}


def test_no_file_compares_the_name_of_a_model_or_router():
    """What differs between rows stands in their row. The tables themselves may look a name up."""
    paths = [path for package in PACKAGES for path in sources(package)] + sorted(ROOT.glob("*.py"))
    assert len(paths) > 20
    for path in paths:
        place = path.relative_to(ROOT).as_posix()
        rows = {name for file, table in TABLE.items() if file != place for name in table}
        found = compared(ast.parse(path.read_text())) & rows
        assert not found, f"{place} compares {', '.join(sorted(found))}"


def test_every_row_names_its_mixer_and_its_paper():
    from reference import mixers

    for name, row in LSM.items():
        kind = mixers.kind(name)
        assert f"{kind.__module__.split('.')[-1]}:{kind.__name__}" == row.mixer
        assert re.fullmatch(r"\d{4}\.\d{5}", row.paper), name
    with pytest.raises(ValueError, match=f"unknown linear sequence model 'rnn'; expected one of {', '.join(LSM)}"):
        mixers.kind("rnn")


# -------------------------------------------------------------------------------------------------- planted bugs


def test_every_planted_bug_finds_its_place():
    """`tests/mutants.py` breaks the code by its text, which must be there once; names tell the bugs apart."""
    assert [line for line in map(out_of_date, MUTANTS) if line] == []
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
