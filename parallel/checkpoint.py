"""Checkpoints that are whole or not there, by torch.distributed.checkpoint.

    folder/step-20/          published: every byte is on disk
        __0_0.distcp ...     tensors, cut as the ranks held them; any other number of ranks can load them
        .metadata            their names, shapes and places
        manifest.json        size and SHA-256 of every file
    folder/step-30.tmp/      being written, or left behind by a process that was killed

A checkpoint is written aside and renamed when all ranks are done, so a process killed at any moment loses at most the
one that it was writing. What is damaged later is found by the manifest, named, and passed over.
"""

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from parallel import comm

MANIFEST = "manifest.json"


def save(folder: Path | str, step: int, state: dict, keep: int) -> Path:
    """Write folder/step-N, then remove all but the `keep` newest up to it. Every rank calls this; returns its path.

    `state` holds one model, perhaps its optimizer, and anything else that can be pickled and is the same on all ranks.
    Raises ValueError if this step is there already, and whole.
    """
    folder, group = Path(folder), comm.world()
    done, aside = folder / f"step-{step}", folder / f"step-{step}.tmp"
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least 1 checkpoint must stay")
    if at_first(done.exists) and damage(done) is None:
        raise ValueError(f"checkpoint {done} is there already, and whole; a step is saved once")
    at_first(lambda: prepare(aside))
    quietly(dcp.save, stored(state), checkpoint_id=aside)
    comm.barrier(group)
    digests = {name: digest for part in comm.objects(digests_of(aside), group) for name, digest in part.items()}
    at_first(lambda: publish(aside, done, digests))
    at_first(lambda: prune(folder, step, keep))
    return done


def load(folder: Path | str, state: dict) -> int | None:
    """Fill `state`, as given to `save` or a part of it, from the newest whole checkpoint; its step, None if there is
    none at all. Every rank calls this; their number may differ from that at saving.

    Model and optimizer are filled in place, other values are replaced in the dict. The optimizer's hyperparameters
    stay those of the one given. A damaged checkpoint is named on standard error, and the one before it used. Raises
    ValueError, in one line, if all are damaged, and if tensors are missing, unknown, or of another shape.
    """
    folder = Path(folder)
    steps = at_first(lambda: published(folder))
    for step in steps:
        path = folder / f"step-{step}"
        fault = damage(path)
        if fault is None:
            fill(path, state)
            return step
        if comm.rank(comm.world()) == 0:
            print(f"checkpoint {path} is damaged ({fault}); trying the one before it", file=sys.stderr, flush=True)
    if steps:
        raise ValueError(f"all checkpoints in {folder} are damaged (steps {steps}); move them away to start anew")
    return None


def newest(folder: Path | str) -> list[int]:
    """The steps of the checkpoints whose files are all there with their sizes, newest first."""
    return [step for step in published(Path(folder)) if lacking(Path(folder) / f"step-{step}") is None]


# ------------------------------------------------------------------------------------------------------ the files


def published(folder: Path) -> list[int]:
    """All that were ever renamed to step-N, newest first."""
    names = [path.name for path in folder.glob("step-*")]
    return sorted((int(name[5:]) for name in names if name[5:].isdecimal()), reverse=True)


def prepare(aside: Path) -> None:
    """A fresh folder: saving twice into one could pair new tensors with old metadata."""
    for stray in aside.parent.glob("step-*.tmp"):
        shutil.rmtree(stray)
    aside.mkdir(parents=True)


def publish(aside: Path, done: Path, digests: dict) -> None:
    """The manifest, everything to disk, and only then the name."""
    (aside / MANIFEST).write_text(json.dumps(digests, indent=2) + "\n")
    for path in (*aside.iterdir(), aside):
        to_disk(path)
    if done.exists():  # damaged: `save` has looked
        discard(done)
    aside.rename(done)
    to_disk(done.parent)


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove what is older than the `keep` newest whole ones up to `step`. Later ones are none of this run's, or
    damaged: they neither count nor go."""
    kept = [s for s in newest(folder) if s <= step][:keep]
    for old in published(folder):
        if kept and old < kept[-1]:
            discard(folder / f"step-{old}")


def discard(path: Path) -> None:
    """Under another name first: half a checkpoint must not be called one."""
    shutil.rmtree(path.rename(path.with_name(f"{path.name}.old.tmp")))


def to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digests_of(path: Path) -> dict[str, list]:
    """Size and SHA-256 of my share of a checkpoint's files: every n-th, of n ranks."""
    group = comm.world()
    names = sorted(file.name for file in path.iterdir() if file.name != MANIFEST)
    return {name: digest(path / name) for name in names[comm.rank(group) :: comm.size(group)]}


def digest(file: Path) -> list:
    with file.open("rb") as data:
        return [file.stat().st_size, hashlib.file_digest(data, "sha256").hexdigest()]


def lacking(path: Path) -> str | None:
    """Which file is missing or of another size than in the manifest; None if none is."""
    try:
        sizes = {name: size for name, (size, _) in json.loads((path / MANIFEST).read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's bytes, the same answer on every rank; None if nothing is."""
    fault = at_first(lambda: lacking(path))
    if fault:
        return fault
    known = json.loads((path / MANIFEST).read_text())
    wrong = [name for name, mine in digests_of(path).items() if known.get(name) != mine]
    wrong = sorted(name for part in comm.objects(wrong, comm.world()) for name in part)
    return f"{wrong[0]} is not what was written" if wrong else None


def at_first(act):
    """What `act()` returns on the first rank, which alone calls it; its OSError is everybody's. The others wait."""
    group, said = comm.world(), None
    if comm.rank(group) == 0:
        try:
            said = act()
        except OSError as error:
            said = error
    said = comm.objects(said, group)[0]
    if isinstance(said, OSError):
        raise said
    return said


# -------------------------------------------------------------------------------------------------- the contents


def stored(state: dict) -> dict:
    """What a state looks like on disk: models and optimizers by the names of parameters, all else as it is."""
    model = next(x for x in state.values() if isinstance(x, nn.Module))

    def plain(x):
        if isinstance(x, nn.Module):
            return get_model_state_dict(x)
        return get_optimizer_state_dict(model, x) if isinstance(x, Optimizer) else x

    return {name: plain(x) for name, x in state.items()}


def fill(path: Path, state: dict) -> None:
    model = next(x for x in state.values() if isinstance(x, nn.Module))
    hyper = {name: hyperparameters(x) for name, x in state.items() if isinstance(x, Optimizer)}
    values = stored(state)
    fit(path, values, [name for name, x in state.items() if isinstance(x, nn.Module)])
    quietly(dcp.load, values, checkpoint_id=path)
    for name, x in state.items():
        if isinstance(x, nn.Module):
            set_model_state_dict(x, values[name])
        elif isinstance(x, Optimizer):
            set_optimizer_state_dict(model, x, values[name])
            for group, own in zip(x.param_groups, hyper[name], strict=True):
                group.update(own)
        else:
            state[name] = values[name]


def hyperparameters(optimizer: Optimizer) -> list[dict]:
    return [{name: x for name, x in group.items() if name != "params"} for group in optimizer.param_groups]


def fit(path: Path, values: dict, models: list[str]) -> None:
    """One line if the checkpoint is of another model or optimizer, before anything is changed."""
    there = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    here = {name: tuple(x.shape) for name, x in tensors(values)}
    for name, shape in here.items():
        if name not in there:
            raise ValueError(f"{path} is of another model or optimizer: it has no {name}, which is {shape} here")
        if tuple(there[name].size) != shape:
            raise ValueError(
                f"{path} is of another shape: {name} is {tuple(there[name].size)} there and {shape} here; "
                "use the configuration that it was saved with, or another folder"
            )
    for name in there:
        if name.split(".")[0] in models and name not in here:
            raise ValueError(f"{path} is of another model: it has {name}, which is not here")


def tensors(values: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts, with the names that torch gives them in a checkpoint."""
    for name, x in values.items():
        if isinstance(x, dict):
            yield from tensors(x, f"{prefix}{name}.")
        elif isinstance(x, Tensor):
            yield f"{prefix}{name}", x


def quietly(function, *args, **kwargs) -> None:
    """Without torch's remark that a single process is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        function(*args, **kwargs)
