"""Windows: memory that every rank of a group reads, so that sharded parameters travel by the GPUs' copy engines.

    gather    each rank writes its part into its window; then each copies the others' parts out of theirs
    sum       each rank writes what it has for everybody into its window; then each copies what is its own out of all
              of them, and adds that up

A copy engine needs no multiprocessor: products beside it take as long as alone, which they don't beside NCCL's kernels.
And what is added up here is added in float32 whatever it travels in, which no library's sum does: gradients of 16 bits
travel as they are, half the bytes, and not one bit of the sum is lost.

Where ranks cannot read each other's memory (CPUs, several hosts, GPUs without a link) there are no windows, and torch's
own collectives remain. A group waits for one that is gone as long as in any collective: until NCCL's watchdog, which
has other work of the same step in sight, ends the process.

Written for `fully_shard`'s `set_custom_all_gather` and `set_custom_reduce_scatter`, which ask for buffers (`allocate`),
fill them, and call.
"""

import functools
import math
import socket
from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from parallel import comm
from parallel.comm import Group


class Window(Protocol):
    """As many numbers on each rank of a group."""

    mine: Tensor  # flat

    def meet(self) -> None:
        """Behind it, what anybody has done with any of these windows before its own `meet` is done."""

    def of(self, rank: int, start: int, stop: int) -> Tensor:
        """Some numbers of that rank's."""


Maker = Callable[[int, torch.dtype, torch.device, Group], Window]  # all ranks of the group call it together


class Symmetric:
    """A window by torch's symmetric memory: every GPU maps the memory of the others."""

    held: ClassVar[int] = 0  # bytes of all of them on this rank that torch's own statistics leave out
    apart = 0  # those of this one

    def __init__(self, count: int, dtype: torch.dtype, device: torch.device, group: Group):
        before = torch.cuda.memory_allocated(device)
        self.mine = symmetric.empty(count, dtype=dtype, device=device)
        self.there = symmetric.rendezvous(self.mine, group.group_name)
        self.apart = self.mine.nbytes - (torch.cuda.memory_allocated(device) - before)
        Symmetric.held += self.apart

    def __del__(self):
        Symmetric.held -= self.apart

    def meet(self) -> None:
        self.there.barrier(channel=0)

    def of(self, rank: int, start: int, stop: int) -> Tensor:
        return self.there.get_buffer(rank, (stop - start,), self.mine.dtype, start)


@functools.cache
def reachable(group: Group) -> bool:
    """Whether the ranks of this group are GPUs of one host that map each other's memory, as one number shows: a
    container may forbid it. All of them ask together, and get the same answer."""
    if not torch.cuda.is_available():
        return False
    here = torch.cuda.current_device()
    hosts, devices = zip(*comm.objects((socket.gethostname(), here), group), strict=True)
    linked = len(set(hosts)) == 1 and len(set(devices)) == len(devices)
    linked = linked and all(torch.cuda.can_device_access_peer(here, there) for there in devices if there != here)
    if not all(comm.objects(linked, group)):
        return False
    try:
        Symmetric(1, torch.float32, torch.device("cuda", here), group)
    except RuntimeError:
        linked = False
    return all(comm.objects(linked, group))


class Windows:
    """The windows of a model's parts. Those at the same place of two blocks, one behind the other, have two, in turn:
    while one block's numbers are read, the next one's are written, and torch lets nobody begin with the one after
    before the first has done. Places share none: all parts of a block are written before the first of them is read."""

    def __init__(self, make: Maker | None = None):
        self.make, self.made = make, {}

    def on(self, group: Group) -> bool:
        """Whether a group has windows. All of its ranks ask together."""
        return comm.size(group) > 1 and (self.make is not None or reachable(group))

    def part(self, group: Group, block: int, place: int) -> "tuple[Gather, Sum]":
        """How the part at a place of a block (each counted) gathers, and sums."""
        own = functools.partial(self.get, group, block % 2, place)
        return Gather(functools.partial(own, "gather")), Sum(functools.partial(own, "sum"))

    def get(self, group: Group, turn: int, place: int, what: str, size: Sequence[int], dtype, device) -> Window:
        key = group, turn, place, what, math.prod(size), dtype
        if key not in self.made:
            self.made[key] = (self.make or Symmetric)(math.prod(size), dtype, device, group)
        return self.made[key]


class Gather:
    """Everybody's part, into a window that has all of them. Torch writes mine where it belongs."""

    def __init__(self, get: Callable[..., Window]):
        self.get = get

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        self.window = self.get(size, dtype, device)
        return self.window.mine

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Group, async_op: bool = False):
        parts = output_tensor.view(comm.size(group), -1)
        mine, count = parts[comm.rank(group)], parts.shape[1]
        if mine.data_ptr() != input_tensor.data_ptr():
            mine.copy_(input_tensor)
        self.window.meet()
        for rank in others(group):
            parts[rank].copy_(self.window.of(rank, rank * count, (rank + 1) * count))
        self.window.meet()


class Sum:
    """The sum of everybody's numbers for me, in float32 or wider."""

    def __init__(self, get: Callable[..., Window]):
        self.get = get
        self.window: Window | None = None  # that has been asked for, and not been read yet

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """First for what is summed, then for the sum."""
        if self.window is not None:
            return torch.empty(*size, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.window = self.get(size, dtype, device)
        return self.window.mine

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Group, op, async_op: bool = False) -> None:
        if op != comm.SUM:
            raise ValueError(f"windows are summed, got {op}")
        window, self.window, me, count = self.window, None, comm.rank(group), len(output_tensor)
        theirs = input_tensor.new_empty(comm.size(group), count)
        theirs[me].copy_(input_tensor[me * count : (me + 1) * count])
        window.meet()
        for rank in others(group):
            theirs[rank].copy_(window.of(rank, me * count, (me + 1) * count))
        window.meet()
        torch.sum(theirs, 0, dtype=output_tensor.dtype, out=output_tensor)


def others(group: Group) -> list[int]:
    """The other ranks, everybody beginning with the next: no two read from the same one at a time."""
    n, me = comm.size(group), comm.rank(group)
    return [(me + step) % n for step in range(1, n)]
