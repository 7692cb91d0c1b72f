"""Every collective that we issue by hand: flat buffers, counted.

The only file that calls torch.distributed's communication; torch's own engines (fully_shard, checkpoint) bring theirs.
A group is a process group. None, or a group of one rank, has nobody to talk to: nothing is sent and nothing counted.
`rank` is always the place in the group, never the global rank.
"""

import contextlib
import datetime
import math
from collections import Counter as Tally
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Group = ProcessGroup | None

# The flat forms have new names since torch 2.13, where the old ones warn.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


# ------------------------------------------------------------------------------------------------ the collectives


def gather(x: Tensor, group: Group) -> list[Tensor]:
    """Everybody's x, in rank order; all must have the same shape. No gradient. Receives (W - 1) · bytes of x."""
    n = size(group)
    if n == 1 or not x.numel():
        return [x] * n
    mine = x.detach().contiguous().view(-1)
    everyone = mine.new_empty(n * mine.numel())
    _gather(everyone, mine, group=group)
    _note("gather", (n - 1) * _bytes(x))
    return list(everyone.view(n, *x.shape).unbind())


def scatter(x: Tensor, group: Group) -> Tensor:
    """x has a part for each rank in front; returns the sum over ranks of my part. No gradient. The adjoint of
    `gather`; receives (W - 1) / W of the bytes of x."""
    n = size(group)
    if len(x) != n:
        raise ValueError(f"scatter over {n} ranks needs x of {n} parts, got shape {tuple(x.shape)}")
    if n == 1 or not x.numel():
        return x[0]
    mine = torch.empty_like(x[0], memory_format=torch.contiguous_format)
    _scatter(mine.view(-1), x.detach().contiguous().view(-1), group=group)
    _note("scatter", (n - 1) * _bytes(mine))
    return mine


def total(x: Tensor, group: Group) -> Tensor:
    """The sum of x over the ranks. No gradient. Counted as 2 (W - 1) / W of the bytes of x (a ring)."""
    n = size(group)
    x = x.detach()
    if n == 1 or not x.numel():
        return x
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    _note("total", 2 * (n - 1) * _bytes(x) // n)
    return x


def shift(x: Tensor, group: Group, forward: bool = True) -> Tensor:
    """The x of the rank before me (`forward`), or after me; zeros where there is none. No gradient."""
    n, me = size(group), rank(group)
    step = 1 if forward else -1
    theirs = torch.zeros_like(x, memory_format=torch.contiguous_format)
    ends = [(dist.isend, x.detach().contiguous(), me + step), (dist.irecv, theirs, me - step)]
    ends = [dist.P2POp(f, y, group=group, group_peer=peer) for f, y, peer in ends if 0 <= peer < n]
    if ends:
        for work in dist.batch_isend_irecv(ends):
            work.wait()
        _note("shift", _bytes(x) if 0 <= me - step < n else 0)
    return theirs


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Rows of x to everybody: the first send[0] to rank 0, the next send[1] to rank 1, ...; what comes back are
    receive[r] rows of each rank r, in rank order. My send[r] must be r's receive[me]. No gradient. The adjoint is the
    same with `send` and `receive` exchanged; receives the bytes of all rows but my own.

    Zero rows are as good as any, and a rank that has none to send or to get takes part all the same. One tensor cut by
    numbers, and no list of tensors, which gloo does not exchange.
    """
    n = size(group)
    for name, rows in (("send", send), ("receive", receive)):
        if len(rows) != n:
            raise ValueError(f"exchange over {n} ranks needs {n} numbers of rows, got {name} {list(rows)}")
    if sum(send) != len(x):
        raise ValueError(f"exchange of {len(x)} rows was told to send {list(send)}, which is {sum(send)}")
    theirs = x.new_empty(sum(receive), *x.shape[1:])
    width = math.prod(x.shape[1:])
    if n == 1 or not width:
        return theirs.copy_(x) if n == 1 else theirs
    mine = x.detach().contiguous().view(-1)
    dist.all_to_all_single(theirs.view(-1), mine, [r * width for r in receive], [s * width for s in send], group=group)
    _note("exchange", (sum(receive) - receive[rank(group)]) * width * x.element_size())
    return theirs


def objects(x: object, group: Group) -> list:
    """Everybody's x, any small Python object, in rank order. Slow, and not counted: for files and messages."""
    everyone = [x] * size(group)
    if size(group) > 1:
        dist.all_gather_object(everyone, x, group=group)
    return everyone


def barrier(group: Group) -> None:
    """Returns when every rank is here."""
    if size(group) > 1:
        dist.barrier(group)
        _note("barrier", 0)


# ------------------------------------------------------------------------------------------------------- counting


@dataclass
class Counter:
    """What this rank did: calls, and bytes that it received, by the name of the collective."""

    calls: Tally = field(default_factory=Tally)
    received: Tally = field(default_factory=Tally)


_open: list[Counter] = []  # a list and no context variable: on GPUs the backward pass runs in another thread


@contextlib.contextmanager
def counted() -> Iterator[Counter]:
    """Counts the collectives of this file from here to the end of the block, forward and backward."""
    counter = Counter()
    _open.append(counter)
    try:
        yield counter
    finally:
        del _open[[c is counter for c in _open].index(True)]


def _note(name: str, received: int) -> None:
    for counter in _open:
        counter.calls[name] += 1
        counter.received[name] += received


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


# --------------------------------------------------------------------------------------------------- the processes


def begin(backend: str, timeout: float, **where) -> None:
    """Join the other processes. `where` is torch's rendezvous: nothing for torchrun's environment, or init_method,
    rank and world_size. `timeout` in seconds is how long a collective waits for a missing rank."""
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout), **where)


def begun() -> bool:
    return dist.is_available() and dist.is_initialized()


def end() -> None:
    dist.destroy_process_group()


def world() -> Group:
    """The group of all processes; None if there is but one."""
    return dist.group.WORLD if begun() and dist.get_world_size() > 1 else None


def named(name: str) -> ProcessGroup:
    """The group of that `group_name`: what torch registers as an op takes strings, not groups. A private function of
    torch, the same in 2.11 and 2.13; every test of `lasp` goes through it."""
    return dist.distributed_c10d._resolve_process_group(name)
