"""Command lines: typed configurations by tyro, and one clear line for a mistake."""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path


def read(parse: Callable, prog: str):
    """`parse()` (a call of tyro) with its errors in one line: what was asked, what is allowed; exit code 2."""
    screen = io.StringIO()
    try:
        with contextlib.redirect_stderr(screen):
            return parse()
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        refuse(prog, boxed(screen.getvalue()))


def choose(presets: dict[str, tuple[str, object]], prog: str, description: str):
    """One of the presets by name, each of its fields open to a flag."""
    if len(sys.argv) < 2 or (sys.argv[1].startswith("-") and sys.argv[1] not in ("-h", "--help")):
        refuse(prog, f"a preset comes first; expected one of {', '.join(presets)}")
    if sys.argv[1] not in (*presets, "-h", "--help"):
        refuse(prog, f"unknown preset {sys.argv[1]!r}; expected one of {', '.join(presets)}")
    import tyro  # not above: what needs no typed configuration runs without it

    return read(lambda: tyro.extras.overridable_config_cli(presets, prog=prog, description=description), prog)


@contextlib.contextmanager
def mistakes(prog: str) -> Iterator[None]:
    """A user's mistake (ValueError) inside becomes one line and exit code 2; anything else stays a traceback."""
    try:
        yield
    except ValueError as error:
        refuse(prog, str(error))


class Parser(argparse.ArgumentParser):
    """argparse for the program `name`, with a mistake in one line; its subcommands too."""

    def __init__(self, name: str, **how):
        super().__init__(**how)
        self.name = name

    def add_subparsers(self, **how):
        return super().add_subparsers(parser_class=functools.partial(Parser, self.name), **how)

    def error(self, message: str):
        refuse(self.name, message)


def at_least(kind: type, least: float) -> Callable[[str], float]:
    """A type of argparse."""

    def number(text: str):
        if kind(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is below {least}")
        return kind(text)

    number.__name__ = kind.__name__
    return number


def refuse(prog: str, line: str) -> typing.NoReturn:
    """The line, once however many ranks there are, and exit code 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{prog}: {' '.join(line.split())}", file=sys.stderr, flush=True)
    else:  # torchrun stops all ranks when one ends: the first one speaks before that, and ends this wait
        time.sleep(20)
    raise SystemExit(2)


def fail(prog: str, line: str) -> typing.NoReturn:
    """The line, on every rank that calls this, and exit code 1: nobody's mistake."""
    print(f"{prog}: {' '.join(line.split())}", file=sys.stderr, flush=True)
    raise SystemExit(1)


def boxed(screen: str) -> str:
    """What tyro says in a box: its first two paragraphs, without the frame and the pointer to --help."""
    inside = [line.strip("│ ") for line in screen.splitlines() if line.startswith("│")]
    text = "\n".join("" if set(line) <= {"─"} else line for line in inside)
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n")]
    said = "; ".join(p for p in paragraphs[:2] if p and not p.startswith(("For full help", "Argument help")))
    return said.replace("Error parsing __tyro-dummy-inner__", "in the configuration")


# ------------------------------------------------------------------------------ configurations as files


def write(config, path: Path) -> None:
    path.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def restore(kind: type, path: Path):
    """The dataclass `kind` from a file that `write` wrote. ValueError names a field that it does not know."""
    if not path.is_file():
        raise ValueError(f"no run at {path.parent}: expected the folder of a run of train.py, with {path.name} in it")
    return build(kind, json.loads(path.read_text()), path)


def build(kind: type, values: dict, path: Path):
    known = typing.get_type_hints(kind)
    for name in values:
        if name not in known:
            raise ValueError(f"{path}: {kind.__name__} has no field {name!r}; it has {', '.join(known)}")
    made = {
        name: build(known[name], value, path) if dataclasses.is_dataclass(known[name]) else value
        for name, value in values.items()
    }
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in made.items()})
