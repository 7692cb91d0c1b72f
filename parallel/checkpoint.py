"""Checkpoints that are whole or not there, by torch.distributed.checkpoint.

    folder/step-20/          published: every byte is on disk
        __0_0.distcp ...     tensors, cut as the ranks held them; any other number of ranks can load them
        .metadata            their names, shapes and places
        manifest.json        size and SHA-256 of every file
    folder/step-30.tmp/      being written, or left behind by a process that was killed

A checkpoint is written aside and renamed when all ranks are done, so a process killed at any moment loses at most the
one that it was writing. What is damaged later is found by the manifest, named, and passed over. A `Saver` writes while
the run goes on, from a copy in the CPU's memory.
"""

import contextlib
import copy
import hashlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from parallel import comm
from parallel.shard import local

MANIFEST = "manifest.json"


class Unsaved(OSError):
    """A checkpoint that could not be written: one line, the same on every rank."""


def save(folder: Path | str, step: int, state: dict, keep: int) -> Path:
    """Write folder/step-N, then remove all but the `keep` newest up to it. Every rank calls this; returns its path.

    `state` holds one model, perhaps its optimizer, and anything else that can be pickled and is the same on all ranks.
    Raises ValueError if this step is there already, and whole; Unsaved, on all ranks, if one of them cannot write.
    """
    return write(Path(folder), step, stored(state), keep, comm.world())


class Saver:
    """A run's checkpoints, each written while the run goes on. Every rank makes one, and calls its methods in step.

    `save` copies the state to the CPU's memory and returns; a thread writes the copy, and talks to the other ranks'
    threads in a group of its own, so that its collectives never meet the run's. At most one save is under way. What
    went wrong in it is raised by the next `save` or `wait`. Without `background`, `save` makes no copy and returns when
    all is on disk. `timeout`, in seconds, is how long a rank's thread waits for another's.

    Raises Unsaved at once if nothing can be written to the folder.
    """

    def __init__(self, folder: Path | str, keep: int, background: bool = True, timeout: float = 600.0):
        self.folder, self.keep = Path(folder), keep
        self.group = comm.another(timeout) if background else comm.world()
        self.thread = ThreadPoolExecutor(1, "checkpoint", *on_my_gpu()) if background else None
        self.copies: dict[tuple, Tensor] = {}  # of the state's tensors, in the CPU's memory, by their place in it
        self.pending: Future | None = None
        with telling(self.folder):
            at_first(lambda: touch(self.folder), self.group)

    def save(self, step: int, state: dict) -> None:
        """As the function `save`, later. Returns when the state may change."""
        self.wait()
        if self.thread is None:
            write(self.folder, step, stored(state), self.keep, self.group)
        else:
            values = apart(stored(state), self.copies)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.pending = self.thread.submit(write, self.folder, step, values, self.keep, self.group)

    def failed(self) -> bool:
        """Whether the save under way has gone wrong, as far as this rank knows; does not wait."""
        return self.pending is not None and self.pending.done() and self.pending.exception() is not None

    def wait(self) -> None:
        """Until everything is on disk; raises what went wrong, on all ranks."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def settle(self) -> None:
        """Until the save under way has ended, whatever became of it: for a rank that has another error to tell."""
        if self.pending is not None:
            self.pending.exception()


def on_my_gpu() -> tuple:
    """How a thread begins, whose GPU is the first one until it says otherwise."""
    return (torch.cuda.set_device, (torch.cuda.current_device(),)) if torch.cuda.is_initialized() else ()


def load(folder: Path | str, state: dict) -> int | None:
    """Fill `state`, as given to `save` or a part of it, from the newest whole checkpoint; its step, None if there is
    none at all. Every rank calls this; their number may differ from that at saving.

    Model and optimizer are filled in place, other values are replaced in the dict. The optimizer's hyperparameters
    stay those of the one given. A damaged checkpoint is named on standard error, and the one before it used. Raises
    ValueError, in one line, if all are damaged, and if tensors are missing, unknown, or of another shape.
    """
    folder = Path(folder)
    group = comm.world()
    steps = at_first(lambda: published(folder), group)
    for step in steps:
        path = folder / f"step-{step}"
        fault = damage(path, group)
        if fault is None:
            fill(path, state)
            return step
        if comm.rank(group) == 0:
            print(f"checkpoint {path} is damaged ({fault}); trying the one before it", file=sys.stderr, flush=True)
    if steps:
        raise ValueError(f"all checkpoints in {folder} are damaged (steps {steps}); move them away to start anew")
    return None


def newest(folder: Path | str) -> list[int]:
    """The steps of the checkpoints whose files are all there with their sizes, newest first."""
    return [step for step in published(Path(folder)) if lacking(Path(folder) / f"step-{step}") is None]


# ------------------------------------------------------------------------------------------------------ the files


def write(folder: Path, step: int, values: dict, keep: int, group: comm.Group) -> Path:
    """`save` of what `stored` made of a state, by the ranks of `group`."""
    done, aside = folder / f"step-{step}", folder / f"step-{step}.tmp"
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least 1 checkpoint must stay")
    with telling(done):
        if at_first(done.exists, group) and damage(done, group) is None:
            raise ValueError(f"checkpoint {done} is there already, and whole; a step is saved once")
        at_first(lambda: prepare(aside), group)
        quietly(dcp.save, values, storage_writer=Writer(aside), process_group=group)
        comm.barrier(group)
        digests = {name: digest for part in together(lambda: digests_of(aside, group), group) for name, digest in part}
        at_first(lambda: publish(aside, done, digests), group)
        at_first(lambda: prune(folder, step, keep), group)
    return done


@contextlib.contextmanager
def telling(path: Path) -> Iterator[None]:
    """What goes wrong in the files becomes one line; ranks that are gone are another matter."""
    try:
        yield
    except OSError as error:
        raise Unsaved(f"{path} cannot be written ({error}): make room, or see who may write there") from error


class Writer(dcp.FileSystemWriter):
    """Torch's zip writer says "unexpected pos" on a full disk, over the OSError that says so."""

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            reason = error
            while reason is not None and not isinstance(reason, OSError):
                reason = reason.__context__
            raise reason or error from None


def touch(folder: Path) -> None:
    """The folder is there, and a file in it can be made."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


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


def digests_of(path: Path, group: comm.Group) -> list[tuple[str, list]]:
    """Names, sizes and SHA-256 of my share of a checkpoint's files: every n-th, of n ranks."""
    names = sorted(file.name for file in path.iterdir() if file.name != MANIFEST)
    return [(name, digest(path / name)) for name in names[comm.rank(group) :: comm.size(group)]]


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


def damage(path: Path, group: comm.Group) -> str | None:
    """What is wrong with a checkpoint's bytes, the same answer on every rank; None if nothing is."""
    fault = at_first(lambda: lacking(path), group)
    if fault:
        return fault
    known = json.loads((path / MANIFEST).read_text())
    found = sorted(x for part in together(lambda: digests_of(path, group), group) for x in part)
    wrong = [name for name, digest in found if known.get(name) != digest]
    return f"{wrong[0]} is not what was written" if wrong else None


def together(act: Callable, group: comm.Group) -> list:
    """What `act()` returned on each rank; an OSError of one is everybody's, so that all leave at the same place."""
    try:
        said = act()
    except OSError as error:
        said = error
    everyone = comm.objects(said, group)
    for x in everyone:
        if isinstance(x, OSError):
            raise x
    return everyone


def at_first(act: Callable, group: comm.Group):
    """What `act()` returns on the first rank, which alone calls it. The others wait."""
    return together(lambda: act() if comm.rank(group) == 0 else None, group)[0]


# -------------------------------------------------------------------------------------------------- the contents


def stored(state: dict) -> dict:
    """What a state looks like on disk: models and optimizers by the names of parameters, all else as it is."""
    model = next(x for x in state.values() if isinstance(x, nn.Module))

    def plain(x):
        if isinstance(x, nn.Module):
            return get_model_state_dict(x)
        return get_optimizer_state_dict(model, x) if isinstance(x, Optimizer) else x

    return {name: plain(x) for name, x in state.items()}


def apart(x, copies: dict[tuple, Tensor], place: tuple = ()):
    """What `stored` returns, with a copy of every tensor in `copies`, which are made once and then written to. From a
    GPU they are under way: wait for it. (Torch's own stagers copy the mesh as well, which fails in 2.11.)"""
    if isinstance(x, dict):
        return {name: apart(y, copies, (*place, name)) for name, y in x.items()}
    if isinstance(x, list | tuple):
        return type(x)(apart(y, copies, (*place, i)) for i, y in enumerate(x))
    if not isinstance(x, Tensor):
        return copy.deepcopy(x)
    x = x.detach()
    if place not in copies:
        copies[place] = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
    local(copies[place]).copy_(local(x), non_blocking=True)
    return copies[place]


def fill(path: Path, state: dict) -> None:
    model = next(x for x in state.values() if isinstance(x, nn.Module))
    hyper = {name: hyperparameters(x) for name, x in state.items() if isinstance(x, Optimizer)}
    values = stored(state)
    own = {name: values[name]["param_groups"] for name in hyper}
    fit(path, values, [name for name, x in state.items() if isinstance(x, nn.Module)])
    quietly(dcp.load, values, checkpoint_id=path)
    for name, groups in own.items():  # what was saved may name the parameters of one rank of a pipeline
        values[name]["param_groups"] = groups
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
    anywhere = set().union(*comm.objects(set(here), comm.world()))  # in a pipeline each rank holds some
    for name in there:
        if name.split(".")[0] in models and name not in anywhere:
            raise ValueError(f"{path} is of another model: it has {name}, which is not here")


def tensors(values: dict, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of nested dicts, with the names that torch gives them in a checkpoint."""
    for name, x in values.items():
        if isinstance(x, dict):
            yield from tensors(x, f"{prefix}{name}.")
        elif isinstance(x, Tensor):
            yield f"{prefix}{name}", x


def quietly(function: Callable, *args, **kwargs) -> None:
    """Without torch's remark that a single process is one, and with the error of a rank as everybody's."""
    warnings.filterwarnings("ignore", message="torch.distributed is .*unavailable or uninitialized")
    try:
        function(*args, **kwargs)
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error
