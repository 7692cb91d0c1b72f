"""Runs of the command lines in processes of their own, on a model and a text so small that a run takes seconds."""

import faulthandler
import logging
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from parallel import testing

ROOT = Path(__file__).resolve().parent.parent
HANGS = 45  # seconds, after which a forked run says where it is
SMALL = [
    *("--model.width", "16", "--model.heads", "2", "--model.pattern", "LN", "--model.lsm", "gla"),
    *("--model.experts", "4", "--model.expert-width", "8", "--length", "24", "--batch", "6"),
    *("--optimizer.warmup", "2", "--evaluate-every", "4", "--evaluate-batches", "1", "--log-every", "1", "--no-report"),
]


def environment() -> dict:
    """One thread, and nothing of a launcher that may have started us."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {**{n: v for n, v in os.environ.items() if n not in drop}, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(script: str, *arguments: str, ranks: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )


def run(script: str, *arguments: str, ranks: int = 1, timeout: float = 120) -> subprocess.CompletedProcess:
    """The command line in forked processes, which need not load what is loaded here; the first that fails ends the
    others, as with torchrun. Where there are GPUs, which a fork may lose: in fresh ones."""
    if torch.cuda.is_available():
        return fresh(script, *arguments, ranks=ranks, timeout=timeout)

    def main(_):
        os.chdir(ROOT)
        runpy.run_path(str(ROOT / script), run_name="__main__")

    command = [str(ROOT / script), *map(str, arguments)]
    ends = _forked(ranks, command, main, seconds=timeout, launched=ranks > 1, together=True)
    if all(not end.code for end in ends) and any(end.code is None for end in ends):
        raise subprocess.TimeoutExpired(command, timeout, ends[0].out, ends[0].err)
    code = next((end.code for end in ends if end.code), 0)
    return subprocess.CompletedProcess(command, code, "".join(e.out for e in ends), "".join(e.err for e in ends))


def fresh(script: str, *arguments: str, ranks: int = 1, timeout: float = 120) -> subprocess.CompletedProcess:
    """The command line in processes of its own, started as a user does."""
    process = start(script, *arguments, ranks=ranks)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class End(NamedTuple):
    """How a rank ended: exit code (negative: the signal), seconds from the start (None: it did not), what it said on
    standard error and output."""

    code: int | None
    seconds: float | None
    err: str
    out: str

    @property
    def said(self) -> list[str]:
        """Its lines, without what a progress bar draws."""
        lines = self.err.replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip() and "step/s" not in line and "s/step]" not in line]


def forked(
    n: int, *arguments, before: Callable[[int], None], enough: int | None = None, seconds: float = 60
) -> list[End]:
    """train.py with these arguments on n ranks, forked: it starts quickly, with nobody to stop the others if one dies.
    `before(rank)` runs first in each, and may patch what it likes. Who still runs when `enough` have ended (None: all),
    or after `seconds`, is killed."""
    import train

    def main(rank):
        before(rank)
        train.main()

    return _forked(n, ["train.py", *map(str, arguments)], main, enough=enough, seconds=seconds)


def _forked(
    n: int,
    command: list[str],
    main: Callable[[int], None],
    *,
    enough: int | None = None,
    seconds: float = 60,
    launched: bool = True,
    together: bool = False,
) -> list[End]:
    """main(rank) in n forked processes with that command line, `launched` as torchrun launches ranks. Who still runs
    when `enough` have ended (`together`: when one has failed), or after `seconds`, is killed."""
    import matplotlib.pyplot
    import torch._dynamo

    import train

    assert matplotlib and torch._dynamo and train  # what every run loads: once, before the fork

    fork, start = get_context("fork"), time.monotonic()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        files = [(Path(folder) / f"{rank}.err", Path(folder) / f"{rank}.out") for rank in range(n)]
        where = {"WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if launched else None
        ranks = [
            fork.Process(target=_child, args=(rank, where, said, command, main)) for rank, said in enumerate(files)
        ]
        for child in ranks:
            child.start()
        ends = {}
        while len(ends) < (enough or n) and time.monotonic() < start + seconds:
            for rank, child in enumerate(ranks):
                if rank not in ends and child.exitcode is not None:
                    ends[rank] = time.monotonic() - start
            if together and any(ranks[rank].exitcode for rank in ends):
                break
            time.sleep(0.01)
        for child in ranks:
            child.kill()
            child.join()
        return [
            End(child.exitcode if rank in ends else None, ends.get(rank), *(file.read_text() for file in said))
            for rank, (child, said) in enumerate(zip(ranks, files, strict=True))
        ]


def _child(rank: int, where: dict | None, said: tuple[Path, Path], command: list[str], main: Callable) -> None:
    testing.on_its_own()
    for stream, file in zip((2, 1), said, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stderr, sys.stdout = (os.fdopen(stream, "w", 1, "utf-8", closefd=False) for stream in (2, 1))
    _forget_pytest()
    faulthandler.dump_traceback_later(HANGS, file=sys.stderr)
    if where is not None:
        os.environ.update({name: str(x) for name, x in ({"RANK": rank, "LOCAL_RANK": rank} | where).items()})
    sys.argv, code = command, 1
    try:
        main(rank)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _forget_pytest() -> None:
    """Warnings and logs are said, as in a process of its own, and not collected."""
    logging.getLogger().handlers.clear()
    warnings.showwarning = lambda *x, file=None, line=None: sys.stderr.write(warnings.formatwarning(*x, line))
    warnings.resetwarnings()
    for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)


def text(folder: Path, documents: int = 40) -> Path:
    """A folder of short texts, some of them validation."""
    path = folder / "text"
    path.mkdir(exist_ok=True)
    for i in range(documents):
        (path / f"{i}.txt").write_text("".join(f"line {j} of text {i}: {j * i}\n" for j in range(3 + i % 7)))
    return path


def checkpoint(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, by name, whole."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    reader = FileSystemReader(run / "checkpoints" / f"step-{step}")
    found = {}

    def flat(prefix, value):
        if isinstance(value, dict):
            for name, inner in value.items():
                flat(f"{prefix}.{name}", inner)
        elif isinstance(value, torch.Tensor):
            found[prefix] = value

    flat("", _load_state_dict_from_keys(storage_reader=reader))
    assert found
    return found
