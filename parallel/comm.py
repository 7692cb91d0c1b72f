"""Every collective that we issue by hand: flat buffers, counted.

The only file that calls torch.distributed's communication; torch's own engines (fully_shard, checkpoint, symmetric
memory) bring theirs.
A group is a process group. None, or a group of one rank, has nobody to talk to: nothing is sent and nothing counted.
`rank` is always the place in the group, never the global rank.
"""

import contextlib
import datetime
import math
import os
import re
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

Group = ProcessGroup | None
SUM = dist.ReduceOp.SUM

# The flat forms have new names since torch 2.13, where the old ones warn.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_underway: dict[int, tuple] = {}  # address of a buffer that `begin_gather` fills -> the work, and what it sends


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


def begin_gather(x: Tensor, everyone: Tensor, group: Group) -> None:
    """Starts a `gather` of x into the front of the flat buffer `everyone`. Until `end_gather(everyone)` nobody may read
    or write it; what is computed in between costs no waiting."""
    mine = x.detach().contiguous().view(-1)
    if not mine.numel():
        return
    front = everyone.data[: size(group) * mine.numel()]  # .data: autograd, which saves it, would mind late writing
    work = _gather(front, mine, group=group, async_op=True)
    _underway[everyone.data_ptr()] = work, mine
    _note("gather", (size(group) - 1) * _bytes(x))


def end_gather(everyone: Tensor) -> None:
    """Waits for the gather into that buffer, if there is one under way."""
    work, _ = _underway.pop(everyone.data_ptr(), (None, None))
    if work is not None:
        work.wait()


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


def total_of_some(x: Tensor, group: Group, ranks: Sequence[int]) -> Tensor:
    """The sum of x over `ranks`, those of the group that call this; in their order, so that all get the same bits. No
    gradient. Receives (len(ranks) - 1) · bytes of x."""
    x, others = x.detach().contiguous(), [r for r in ranks if r != rank(group)]
    if not others or not x.numel():
        return x
    every = {rank(group): x} | {r: torch.empty_like(x) for r in others}
    ends = [(f, y, r) for r in others for f, y in ((dist.isend, x), (dist.irecv, every[r]))]
    for work in dist.batch_isend_irecv([dist.P2POp(f, y, group=group, group_peer=r) for f, y, r in ends]):
        work.wait()
    _note("total of some", len(others) * _bytes(x))
    return sum(every[r] for r in ranks)


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


def rotate(x: Tensor, group: Group, steps: int = 1) -> Tensor:
    """The x of the rank `steps` before me; before the first comes the last. No gradient."""
    n, me = size(group), rank(group)
    x = x.detach().contiguous()
    if steps % n == 0 or not x.numel():
        return x
    theirs = torch.empty_like(x)
    ends = [(dist.isend, x, me + steps), (dist.irecv, theirs, me - steps)]
    for work in dist.batch_isend_irecv([dist.P2POp(f, y, group=group, group_peer=at % n) for f, y, at in ends]):
        work.wait()
    _note("rotate", _bytes(x))
    return theirs


def give(x: Tensor, group: Group, steps: int = 1) -> None:
    """Sends x to the rank `steps` after me, which must `take` it; past either end nobody is there."""
    if 0 <= rank(group) + steps < size(group) and x.numel():
        dist.send(x.detach().contiguous(), group=group, group_dst=rank(group) + steps)
    _note("give", 0)


def take(like: Tensor, group: Group, steps: int = 1) -> Tensor:
    """What the rank `steps` before me gives, of the shape and dtype of `like`; zeros if there is none. It waits."""
    theirs = torch.zeros_like(like, memory_format=torch.contiguous_format)
    there = 0 <= rank(group) - steps < size(group) and bool(like.numel())
    if there:
        dist.recv(theirs, group=group, group_src=rank(group) - steps)
    _note("take", _bytes(theirs) if there else 0)
    return theirs


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Rows of x to everybody: the first send[0] to rank 0, the next send[1] to rank 1, ...; what comes back are
    receive[r] rows of each rank r, in rank order. My send[r] must be r's receive[me]. No gradient. The adjoint is the
    same with `send` and `receive` exchanged; receives the bytes of all rows but my own.

    Zero rows are as good as any, and a rank that has none to send or to get takes part all the same. One tensor cut by
    numbers, and no list of tensors, which gloo does not exchange.
    """
    theirs = x.new_empty(sum(receive), *x.shape[1:])
    _exchange(x, theirs, send, receive, group, later=False)
    return theirs


def begin_exchange(x: Tensor, theirs: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> tuple:
    """Starts an `exchange` of the rows x into `theirs`. Until `end_exchange` of what it returns nobody may write x, or
    read or write `theirs`; what is computed in between costs no waiting."""
    return _exchange(x, theirs, send, receive, group, later=True)


def end_exchange(underway: tuple) -> None:
    """Waits until the rows are there. On a GPU it is the stream that waits, not the host."""
    work, _ = underway
    if work is not None:
        work.wait()


def _exchange(x, theirs, send, receive, group, later: bool) -> tuple:
    """(The work, or None if there is no more to wait for; what it reads.)"""
    n = size(group)
    for name, rows in (("send", send), ("receive", receive)):
        if len(rows) != n:
            raise ValueError(f"exchange over {n} ranks needs {n} numbers of rows, got {name} {list(rows)}")
    if sum(send) != len(x):
        raise ValueError(f"exchange of {len(x)} rows was told to send {list(send)}, which is {sum(send)}")
    width = math.prod(x.shape[1:])
    if n == 1:
        theirs.copy_(x)
    if n == 1 or not width:
        return None, x
    mine, splits = x.detach().contiguous().view(-1), ([r * width for r in receive], [s * width for s in send])
    work = dist.all_to_all_single(theirs.detach().view(-1), mine, *splits, group=group, async_op=later)
    _note("exchange", (sum(receive) - receive[rank(group)]) * width * x.element_size())
    return work, mine


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


# ----------------------------------------------------------------------------------------------------- to the host


def fetched(x: Tensor) -> Callable[[], list]:
    """Sends x's numbers to the host; what comes back waits for them, and not for what is asked of the device later."""
    there, arrival = x.to("cpu", non_blocking=True), torch.cuda.Event() if x.is_cuda else None
    if arrival is not None:
        arrival.record()

    def numbers() -> list:
        if arrival is not None:
            arrival.synchronize()
        return there.tolist()

    return numbers


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
    limit = datetime.timedelta(seconds=timeout)
    if not where and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        where = dict(zip(("store", "rank", "world_size"), next(dist.rendezvous("env://", timeout=limit)), strict=True))
        where["store"] = dist.PrefixStore(restart(), where["store"])
    dist.init_process_group(backend, timeout=limit, **where)


def restart() -> str:
    """Which start of the ranks this is. torchrun keeps one store for all of them, in which a second start would find
    the addresses of the first, and wait for them (pytorch/pytorch#135712). Hosts count apart from each other: several
    need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1."""
    return f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}" if os.environ["GROUP_WORLD_SIZE"] == "1" else "start"


def begun() -> bool:
    return dist.is_available() and dist.is_initialized()


def end() -> None:
    dist.destroy_process_group()


def another(timeout: float) -> Group:
    """A second group of all processes, for tensors on CPU: what a thread says in it meets no other collective."""
    return None if world() is None else dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout))


def lost(error: BaseException) -> str | None:
    """What a collective found, in one line, when another rank was gone or silent; None if the error is another's.

    Gloo raises plain RuntimeErrors: only their text, with a place in gloo's source, tells them from others.
    """
    line = next(iter(str(error).strip().splitlines()), "")
    if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and re.search(r"gloo/|NCCL", line)):
        return re.sub(r"^\[[^\]]*:\d+\] |\. This is typically .*|\.$", "", line)
    return None


def world() -> Group:
    """The group of all processes; None if there is but one."""
    return dist.group.WORLD if begun() and dist.get_world_size() > 1 else None


def named(name: str) -> ProcessGroup:
    """The group of that `group_name`: what torch registers as an op takes strings, not groups. A private function of
    torch, the same in 2.11 and 2.13; every test of `lasp` goes through it."""
    return dist.distributed_c10d._resolve_process_group(name)
