"""Degrees of parallelism -> groups of ranks with names."""

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
    expert divide that of data and sequence, another way to see the same ranks."""

    data: int = -1
    """Groups of ranks that take different samples (-1: as many as there are ranks for)."""
    sequence: int = 1
    """Ranks that share the tokens of each sample."""
    tensor: int = 1
    """Ranks that share the heads of every mixer and the hidden channels of every expert, and repeat all else."""
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
    """Groups of ranks that hold all parameters, each cut over its group (1: parameters are cut over all ranks)."""
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
        if self.pipeline_size > 1:
            inside = "sharded over data" if self.data_size > 1 else "whole"
            return (
                f"{self.size} ranks = {self.pipeline_size} pipeline x {self.data_size} data, parameters of a stage "
                f"{inside}, schedule {self.schedule}"
            )
        text = f"{self.size} ranks = {self.data_size} data x {self.sequence_size} sequence"
        text += f" x {self.tensor_size} tensor" if self.tensor_size > 1 else ""
        text += ", parameters sharded over "
        over = self.size // self.replicas
        text += "all" if self.replicas == 1 else f"{over} in each of {self.replicas} replicas"
        if self.expert_size > 1:
            text += f", experts shared out to {self.expert_size} and sharded over {over // self.expert_size}"
        return text


def make(degrees: Degrees, device: torch.device) -> Mesh:
    """The mesh of the processes that there are.

    The same ranks, in the same order, are seen in three ways, the last name counting fastest:
    data x sequence x tensor; replicas x shards; replicas x shards of experts x experts, or the same of heads. So the
    ranks that share heads are neighbours, and those that share a sequence or experts are near each other.

    Raises ValueError, one line, if the degrees do not fit the number of ranks.
    """
    group = comm.world()
    world = comm.size(group)
    data = check(degrees, world)
    if world == 1:
        return Mesh()
    if degrees.pipeline > 1:
        return piped(degrees, data, group, device)
    expert, replicas = degrees.expert, degrees.replicas

    def view(**dims: int) -> DeviceMesh:
        return init_device_mesh(device.type, tuple(dims.values()), mesh_dim_names=tuple(dims))

    batch = view(data=data, sequence=degrees.sequence, tensor=degrees.tensor)
    shards = view(replicas=replicas, shards=world // replicas)
    shared = heads = None
    if degrees.tensor > 1:
        heads = view(replicas=replicas, tensor_shards=world // (replicas * degrees.tensor), tensor=degrees.tensor)
    if expert > 1:
        shared = view(replicas=replicas, expert_shards=world // (replicas * expert), expert=expert)
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
        everyone=group,
        sequence=batch.get_group("sequence") if degrees.sequence > 1 else None,
        tensor=heads.get_group("tensor") if heads else None,
        expert=shared.get_group("expert") if shared else None,
        shards=shards if replicas > 1 else shards["shards"],
        experts=shared,
        tensors=heads,
        between=degrees.between,
        attention=degrees.attention,
        states=degrees.states,
    )


def piped(degrees: Degrees, data: int, group: comm.Group, device: torch.device) -> Mesh:
    """pipeline x data: the ranks that hold the same stages are neighbours."""
    ranks = init_device_mesh(device.type, (degrees.pipeline, data), mesh_dim_names=("pipeline", "data"))
    return Mesh(
        rank=comm.rank(group),
        size=comm.size(group),
        data_rank=ranks.get_local_rank("data"),
        data_size=data,
        everyone=group,
        shards=ranks["data"] if data > 1 else None,
        pipeline_rank=ranks.get_local_rank("pipeline"),
        pipeline_size=degrees.pipeline,
        schedule=degrees.schedule,
        pipeline=ranks.get_group("pipeline"),
        alike=ranks.get_group("data") if data > 1 else None,
    )


def check_pipeline(degrees: Degrees, world: int) -> int:
    """The degree of data beside a pipeline; ValueError, one line, for what does not go with it."""
    others = {name: getattr(degrees, name) for name in ("sequence", "tensor", "expert", "replicas")}
    wrong = [f"--mesh.{name} {n}" for name, n in others.items() if n != 1]
    if wrong:
        raise ValueError(f"--mesh.pipeline {degrees.pipeline} goes with data alone, not with {', '.join(wrong)}")
    data = max(world // degrees.pipeline, 1) if degrees.data == -1 else degrees.data
    need = data * degrees.pipeline
    if need != world:
        raise ValueError(
            f"a mesh of {degrees.pipeline} pipeline x {data} data needs {need} ranks, found {world}: start as many "
            f"(torchrun --nproc-per-node {need}), or let pipeline be {one_of(world)}"
        )
    return data


def check(degrees: Degrees, world: int) -> int:
    """The degree of data; ValueError, one line, if this many ranks cannot be used that way."""
    if degrees.pipeline < 1:
        raise ValueError(f"--mesh.pipeline is {degrees.pipeline}; it must be at least 1")
    if degrees.pipeline > 1:
        return check_pipeline(degrees, world)
    data, sequence, expert, replicas = degrees.data, degrees.sequence, degrees.expert, degrees.replicas
    if min(sequence, expert, replicas, degrees.tensor) < 1 or (data < 1 and data != -1):
        raise ValueError(
            f"mesh degrees must be at least 1 (data: or -1), got data {data}, sequence {sequence}, expert {expert}, "
            f"replicas {replicas}, tensor {degrees.tensor}"
        )
    each = with_tensor(degrees, world)  # ranks for each of the parts of the heads
    data = max(each // sequence, 1) if data == -1 else data
    if data * sequence != each:
        shape, need = f"{data} data x {sequence} sequence", data * sequence * degrees.tensor
        shape += f" x {degrees.tensor} tensor" if degrees.tensor > 1 else ""
        raise ValueError(
            f"a mesh of {shape} needs {need} ranks, found {world}: start as many "
            f"(torchrun --nproc-per-node {need}), or let sequence be {one_of(each)}"
        )
    if world % replicas:
        raise ValueError(
            f"{replicas} replicas cannot be made of {ranks(world)}; let --mesh.replicas be {one_of(world)}"
        )
    size = world // replicas
    if size % expert:
        inside = f"each of {replicas} replicas, {ranks(size)}" if replicas > 1 else ranks(size)
        raise ValueError(
            f"groups of {expert} ranks that share experts do not fit into {inside}; let --mesh.expert be {one_of(size)}"
        )
    return data


def with_tensor(degrees: Degrees, world: int) -> int:
    """How many groups that share heads there are; ValueError, one line, if they cannot be made."""
    not_both(degrees.tensor, degrees.expert)
    if world % degrees.tensor:
        raise ValueError(
            f"groups of {degrees.tensor} ranks that share heads do not fit into {ranks(world)}; let --mesh.tensor be "
            f"{one_of(world)}"
        )
    size = world // degrees.replicas
    if world % degrees.replicas == 0 and size % degrees.tensor:
        raise ValueError(
            f"groups of {degrees.tensor} ranks that share heads do not fit into each of {degrees.replicas} replicas, "
            f"{ranks(size)}; let --mesh.replicas be {one_of(world // degrees.tensor)}"
        )
    return world // degrees.tensor


def not_both(tensor: int, expert: int) -> None:
    """ValueError, one line, for experts that would be cut and shared out."""
    if tensor > 1 and expert > 1:
        raise ValueError(
            f"experts are cut over {tensor} ranks (--mesh.tensor) or shared out to {expert} (--mesh.expert), not both: "
            "let one of them be 1"
        )


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
    shared = tensor.over(experts.over(cut, mesh.expert, mesh.dispatch), mesh.tensor)

    def total(x: Tensor) -> Tensor:
        summed = comm.total(x, mesh.everyone)
        return summed if mesh.tensor_size == 1 else summed / mesh.tensor_size

    return shared._replace(total=total)


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
