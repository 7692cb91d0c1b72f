"""Runs of the command lines in processes of their own, on a model and a text so small that a run takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
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
    process = start(script, *arguments, ranks=ranks)
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


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
