"""Degrees of parallelism -> groups of ranks with names."""

import math
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel import comm, experts, lasp, tensor
from reference.ops import Ops


@dataclass(frozen=True)
class Degrees:
    """How the ranks are used. The product of data, sequence, tensor and pipeline is the number of ranks; replicas and
    expert divide that of data, sequence and tensor, another way to see the same ranks."""

    data: int = -1
    """Groups of ranks that take different samples (-1: as many as there are ranks for)."""
    sequence: int = 1
    """Ranks that share the tokens of each sample."""
    tensor: int = 1
    """Ranks that share the heads of every mixer and the hidden channels of every expert (beside --mesh.expert: the
    tokens of all of them), and repeat all else."""
    between: Literal["repeated", "cut"] = "repeated"
    """What ranks that share heads do between two layers: all of them repeat all tokens, or each keeps its share of them
    (for activations that take less memory)."""
    attention: Literal["gather", "ring", "ulysses"] = "gather"
    """How softmax layers see the tokens of other ranks: all keys and values are gathered, or go round; or each rank
    gets all tokens of some heads."""
    states: Literal["gather", "ring"] = "gather"
    """How memories cross ranks: all at once, or one rank after the other (slow; for rows that are not affine)."""
    expert: int = 1
    """Ranks that share the experts of each layer: of e experts each holds e / expert, and tokens travel to theirs."""
    dispatch: Literal["pair", "rank"] = "pair"
    """What travels to the experts: a token's row once for each expert that it visits, or once for each rank that holds
    some of them, which sums before it answers (fewer bytes, and in 16 bits one more rounding)."""
    replicas: int = 1
    """Groups of ranks that hold all parameters (of a stage), each cut over its group (1: parameters are cut over all
    ranks)."""
    reshard: bool = True
    """Whether what is gathered of the parameters goes after a block's forward pass and is gathered again for the way
    back; else it stays from the one to the other (half of the gathers, for memory of all parameters of a replica). In
    a pipeline it stays in any case."""
    windows: bool = True
    """Whether parameters and their gradients travel by the GPUs' copy engines between those that map each other's
    memory; else by NCCL."""
    pipeline: int = 1
    """Ranks that share the blocks, one part of the stack each (with schedules of two stages: two parts)."""
    schedule: Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zero-bubble-v"] = "1f1b"
    """In which order the ranks of a pipeline work: all forward, then all backward; one forward, one backward; the same
    with two stages a rank; with gradients of weights in the gaps; the same, with the last stage on the first rank."""


class Mesh(NamedTuple):
    """This rank's place. Groups and meshes are None where there is nobody else."""

    rank: int = 0
    size: int = 1
    data_rank: int = 0
    data_size: int = 1
    sequence_rank: int = 0
    sequence_size: int = 1
    tensor_rank: int = 0
    tensor_size: int = 1
    expert_rank: int = 0
    expert_size: int = 1
    dispatch: str = "pair"
    replicas: int = 1
    reshard: bool = True
    windows: bool = True
    everyone: comm.Group = None  # over whom losses and counts are summed
    sequence: comm.Group = None  # who shares a sequence with me, in the order of its segments
    tensor: comm.Group = None  # who shares the heads with me, in their order
    expert: comm.Group = None  # who shares the experts with me, in their order
    shards: DeviceMesh | None = None  # over whom parameters are sharded: all ranks of a replica, in its last dimension
    experts: DeviceMesh | None = None  # the same of the experts' parameters, and behind it the group `expert`
    tensors: DeviceMesh | None = None  # the same of parameters that are cut by heads, and behind it the group `tensor`
    between: str = "repeated"  # what they do between layers
    attention: str = "gather"  # how softmax layers and memories cross a cut sequence
    states: str = "gather"
    pipeline_rank: int = 0
    pipeline_size: int = 1
    schedule: str = "1f1b"
    pipeline: comm.Group = None  # who shares a stack with me, in the order of its first stages
    alike: comm.Group = None  # in a pipeline: who holds the same stages as I do

    def __str__(self) -> str:
        if self.size == 1:
            return "one process"
        over = self.size // (self.pipeline_size * self.replicas)
        text = f"{self.size} ranks = "
        text += f"{self.pipeline_size} pipeline x " if self.pipeline_size > 1 else ""
        text += f"{self.data_size} data x {self.sequence_size} sequence"
        text += f" x {self.tensor_size} tensor" if self.tensor_size > 1 else ""
        text += ", parameters of a stage " if self.pipeline_size > 1 else ", parameters "
        if self.replicas > 1:
            text += f"sharded over {over} in each of {self.replicas} replicas"
        else:
            text += f"sharded over {over if self.pipeline_size > 1 else 'all'}" if over > 1 else "whole"
        if self.expert_size > 1:
            text += f", experts shared out to {self.expert_size} and sharded over {over // self.expert_size}"
        return text + (f", schedule {self.schedule}" if self.pipeline_size > 1 else "")


def make(degrees: Degrees, device: torch.device) -> Mesh:
    """The mesh of the processes that there are.

    The same ranks, in the same order, are seen in three ways, the last name counting fastest: pipeline, and of the
    ranks with the same stages data x sequence x tensor; replicas x shards; replicas x shards of experts x experts, or
    the same of heads. So the ranks that share heads are neighbours, and those that share a sequence or experts are near
    each other; ranks of a pipeline, which say the least to each other, are far apart.

    Raises ValueError, one line, if the degrees do not fit the number of ranks.
    """
    group = comm.world()
    world = comm.size(group)
    data = check(degrees, world)
    if world == 1:
        return Mesh()
    expert, replicas, stages = degrees.expert, degrees.replicas, degrees.pipeline
    alike = world // stages  # ranks with the same stages

    def view(**dims: int) -> DeviceMesh:
        dims = ({"pipeline": stages} if stages > 1 else {}) | dims
        return init_device_mesh(device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))

    batch = view(data=data, sequence=degrees.sequence, tensor=degrees.tensor)
    shards = view(replicas=replicas, shards=alike // replicas) if alike > 1 else None
    shared = heads = None
    if degrees.tensor > 1:
        heads = view(replicas=replicas, tensor_shards=alike // (replicas * degrees.tensor), tensor=degrees.tensor)
    if expert > 1:
        shared = view(replicas=replicas, expert_shards=alike // (replicas * expert), expert=expert)
    return Mesh(
        rank=comm.rank(group),
        size=world,
        data_rank=batch.get_local_rank("data"),
        data_size=data,
        sequence_rank=batch.get_local_rank("sequence"),
        sequence_size=degrees.sequence,
        tensor_rank=batch.get_local_rank("tensor"),
        tensor_size=degrees.tensor,
        expert_rank=shared.get_local_rank("expert") if shared else 0,
        expert_size=expert,
        dispatch=degrees.dispatch,
        replicas=replicas,
        reshard=degrees.reshard,
        windows=degrees.windows,
        everyone=group,
        sequence=batch.get_group("sequence") if degrees.sequence > 1 else None,
        tensor=heads.get_group("tensor") if heads else None,
        expert=shared.get_group("expert") if shared else None,
        shards=None if shards is None else shards["replicas", "shards"] if replicas > 1 else shards["shards"],
        experts=shared,
        tensors=heads,
        between=degrees.between,
        attention=degrees.attention,
        states=degrees.states,
        pipeline_rank=batch.get_local_rank("pipeline") if stages > 1 else 0,
        pipeline_size=stages,
        schedule=degrees.schedule,
        pipeline=batch.get_group("pipeline") if stages > 1 else None,
        alike=view(alike=alike).get_group("alike") if stages > 1 and alike > 1 else None,
    )


def check(degrees: Degrees, world: int) -> int:
    """The degree of data; ValueError, one line, if this many ranks cannot be used that way."""
    data, sequence, expert, replicas = degrees.data, degrees.sequence, degrees.expert, degrees.replicas
    if degrees.pipeline < 1:
        raise ValueError(f"--mesh.pipeline is {degrees.pipeline}; it must be at least 1")
    if min(sequence, expert, replicas, degrees.tensor) < 1 or (data < 1 and data != -1):
        raise ValueError(
            f"mesh degrees must be at least 1 (data: or -1), got data {data}, sequence {sequence}, expert {expert}, "
            f"replicas {replicas}, tensor {degrees.tensor}"
        )
    if world % degrees.pipeline:
        raise ValueError(
            f"{degrees.pipeline} pipeline ranks do not fit into {ranks(world)}; let --mesh.pipeline be {one_of(world)}"
        )
    alike = world // degrees.pipeline  # ranks with the same stages
    beside = f", those of each of {degrees.pipeline} pipeline ranks" if degrees.pipeline > 1 else ""
    each = with_tensor(degrees, alike, beside)  # ranks for each of the parts of the heads
    data = max(each // sequence, 1) if data == -1 else data
    if data * sequence != each:
        raise ValueError(of_another_size(degrees, data, world, each))
    if alike % replicas:
        raise ValueError(
            f"{replicas} replicas cannot be made of {ranks(alike)}{beside}; let --mesh.replicas be {one_of(alike)}"
        )
    size = alike // replicas
    if size % expert:
        inside = f"each of {replicas} replicas, {ranks(size)}" if replicas > 1 else ranks(size)
        raise ValueError(
            f"groups of {expert} ranks that share experts do not fit into {inside}{beside}; let --mesh.expert be "
            f"{one_of(size)}"
        )
    return data


def of_another_size(degrees: Degrees, data: int, world: int, each: int) -> str:
    sizes = {"pipeline": degrees.pipeline, "data": data, "sequence": degrees.sequence, "tensor": degrees.tensor}
    shape = " x ".join(f"{n} {name}" for name, n in sizes.items() if n > 1 or name in ("data", "sequence"))
    need = math.prod(sizes.values())
    return (
        f"a mesh of {shape} needs {need} ranks, found {world}: start as many "
        f"(torchrun --nproc-per-node {need}), or let sequence be {one_of(each)}"
    )


def with_tensor(degrees: Degrees, alike: int, beside: str) -> int:
    """How many groups that share heads there are; ValueError, one line, if they cannot be made."""
    if alike % degrees.tensor:
        raise ValueError(
            f"groups of {degrees.tensor} ranks that share heads do not fit into {ranks(alike)}{beside}; let "
            f"--mesh.tensor be {one_of(alike)}"
        )
    size = alike // degrees.replicas
    if alike % degrees.replicas == 0 and size % degrees.tensor:
        raise ValueError(
            f"groups of {degrees.tensor} ranks that share heads do not fit into each of {degrees.replicas} replicas, "
            f"{ranks(size)}{beside}; let --mesh.replicas be {one_of(alike // degrees.tensor)}"
        )
    return alike // degrees.tensor


def ranks(n: int) -> str:
    return f"{n} rank" + "s" * (n > 1)


def one_of(whole: int) -> str:
    """The divisors."""
    fits = [str(n) for n in range(1, whole + 1) if whole % n == 0]
    return f"one of {', '.join(fits)}" if len(fits) > 1 else fits[0]


def over(ops: Ops, mesh: Mesh) -> Ops:
    """The same ops on this mesh: sequences cut over their group, experts and heads shared by theirs, totals over
    everyone, of which ranks that share heads have the same tokens."""
    if mesh.size == 1:
        return ops
    cut = lasp.over(ops, mesh.sequence, mesh.attention, mesh.states)
    shared = tensor.over(experts.over(cut, mesh.expert, mesh.dispatch), mesh.tensor, mesh.expert_size > 1)
    return totals(shared, mesh.everyone, mesh.tensor_size)


def totals(ops: Ops, group: comm.Group, alike: int) -> Ops:
    """The same ops with sums over `group`, whose ranks have the same tokens, so many each."""

    def total(x: Tensor) -> Tensor:
        summed = comm.total(x, group)
        return summed if alike == 1 else summed / alike

    return ops._replace(total=total)


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
