"""Degrees of parallelism -> groups of ranks with names."""

import os
import sys
import traceback
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel import comm, lasp
from reference.ops import Ops


@dataclass(frozen=True)
class Degrees:
    """How the ranks are used. Their product is the number of ranks."""

    data: int = -1
    """Groups of ranks that take different samples (-1: as many as there are ranks for)."""
    sequence: int = 1
    """Ranks that share the tokens of each sample."""
    attention: Literal["gather", "ring", "ulysses"] = "gather"
    """How softmax layers see the tokens of other ranks: all keys and values are gathered, or go round; or each rank
    gets all tokens of some heads."""
    states: Literal["gather", "ring"] = "gather"
    """How memories cross ranks: all at once, or one rank after the other (slow; for rows that are not affine)."""


class Mesh(NamedTuple):
    """This rank's place. Groups and meshes are None where there is nobody else."""

    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1
    sequence_rank: int = 0
    sequence_size: int = 1
    everyone: comm.Group = None  # over whom losses and counts are summed
    sequence: comm.Group = None  # who shares a sequence with me, in the order of its segments
    shards: DeviceMesh | None = None  # over whom parameters are sharded: everyone, in one dimension
    attention: str = "gather"  # how softmax layers and memories cross a cut sequence
    states: str = "gather"

    def __str__(self) -> str:
        if self.size == 1:
            return "one process"
        return f"{self.size} ranks = {self.data_size} data x {self.sequence_size} sequence, parameters sharded over all"


def make(degrees: Degrees, device: torch.device) -> Mesh:
    """The mesh of the processes that there are; rank = data_rank * sequence_size + sequence_rank.

    Raises ValueError if the degrees do not multiply to their number.
    """
    group = comm.world()
    world, data, sequence = comm.size(group), degrees.data, degrees.sequence
    if sequence < 1 or (data < 1 and data != -1):
        raise ValueError(f"mesh degrees must be at least 1 (data: or -1), got data {data}, sequence {sequence}")
    data = max(world // sequence, 1) if data == -1 else data
    if data * sequence != world:
        fits = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ValueError(
            f"a mesh of {data} data x {sequence} sequence needs {data * sequence} ranks, found {world}: start as many "
            f"(torchrun --nproc-per-node {data * sequence}), or let sequence be one of {fits}"
        )
    if world == 1:
        return Mesh()
    mesh = init_device_mesh(device.type, (data, sequence), mesh_dim_names=("data", "sequence"))
    return Mesh(
        rank=comm.rank(group),
        size=world,
        data_rank=mesh.get_local_rank("data"),
        data_size=data,
        sequence_rank=mesh.get_local_rank("sequence"),
        sequence_size=sequence,
        everyone=group,
        sequence=mesh.get_group("sequence") if sequence > 1 else None,
        shards=init_device_mesh(device.type, (world,), mesh_dim_names=("shards",)),
        attention=degrees.attention,
        states=degrees.states,
    )


def over(ops: Ops, mesh: Mesh) -> Ops:
    """The same ops on this mesh: sequences cut over their group, totals over everyone."""
    if mesh.size == 1:
        return ops
    cut = lasp.over(ops, mesh.sequence, mesh.attention, mesh.states)
    return cut._replace(total=lambda x: comm.total(x, mesh.everyone))


# -------------------------------------------------------------------------------------- the beginning and the end


def local_rank() -> int:
    """This process's number on its machine: its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def who() -> str:
    """This process, by what torchrun calls it: there may be no group yet, or no longer."""
    return f"rank {os.environ.get('RANK', 0)} of {os.environ.get('WORLD_SIZE', 1)}"


def launch(timeout: float = 600.0) -> None:
    """Join the other processes if torchrun started several; `timeout` in seconds is how long one waits for another.

    Gloo for tensors on CPU, which checkpoints use on GPUs, too, and NCCL for those on GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    comm.begin("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout)


def close() -> None:
    """The last call of a process that `launch` joined to others; it does not return. Alone, it does nothing.

    Gloo's threads may abort an interpreter that tears them down after all work is done, so the process is left at
    once, with the exit code that it would have had. After an error nobody is waited for: the others may be stuck.
    """
    if not comm.begun():
        return
    error = sys.exc_info()[1]
    code = code_of(error) or (parted() if error is None else 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def parted() -> int:
    """Waits for everybody; 0, or 1 and a line if somebody did not come."""
    try:
        comm.barrier(comm.world())
        comm.end()
    except RuntimeError as error:
        print(f"{who()}: all is done, but not all others came to the end ({comm.lost(error)})", file=sys.stderr)
        return 1
    return 0


def code_of(error: BaseException | None) -> int:
    """The interpreter's rule: SystemExit brings its own code, anything else a traceback and 1."""
    if error is None or (isinstance(error, SystemExit) and error.code is None):
        return 0
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1
