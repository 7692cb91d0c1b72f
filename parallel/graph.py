"""How torch sees what communicates: ops that a compiler leaves alone, and that every rank's backward pass reaches."""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from parallel import comm
from parallel.comm import Group
from reference.ops import observed


def known(name: str, schema: str, function: Callable, shapes: Callable) -> Callable:
    """`function` as torch.ops.linear_moe.`name`; `shapes` makes empty results. A compiler sees the same graph on every
    rank, whatever the ranks do inside.

    Registered by hand: the decorator `custom_op` imports the compiler at the first call, which takes seconds.
    """
    torch.library.define(f"linear_moe::{name}", schema)
    torch.library.impl(f"linear_moe::{name}", "default", function)
    torch.library.register_fake(f"linear_moe::{name}", shapes)
    return getattr(torch.ops.linear_moe, name)


def differentiable(name: str, backward: Callable, keep: Callable) -> None:
    """Its gradient: `keep(ctx, inputs, output)` saves what `backward(ctx, *gradients)` needs."""
    torch.library.register_autograd(f"linear_moe::{name}", backward, setup_context=keep)


class _Depend(torch.autograd.Function):
    """y, which from now on depends on the others too, with no gradient for them."""

    @staticmethod
    def forward(ctx, y, *others):
        ctx.count = len(others)
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, *[None] * ctx.count


def attached(y: Tensor, received: list[Tensor], inputs: list[Tensor | None]) -> Tensor:
    """y, from which the backward pass reaches `received` and `inputs` on every rank.

    A segment of no tokens, or one that begins a document, uses nothing of what enters it. Its backward pass must still
    come by the same collectives in the same order (autograd takes the newest first, among those it reaches), and end
    in a gradient, of zeros, for the same parameters.
    """
    inputs = [x for x in inputs if x is not None]
    if not y.numel():
        y = y + 0 * sum(x.sum() for x in inputs)
    return _Depend.apply(y, *(received or inputs))


class _Run:
    """A run of a block, or the run `again` that finds in `found` what the first left there."""

    def __init__(self, found: list, again: bool):
        self.found, self.again = found, again

    def __enter__(self) -> None:
        self.known = iter(self.found)
        self.token = _runs.set(self)

    def __exit__(self, *_) -> None:
        _runs.reset(self.token)

    def once(self, f: Callable):
        if self.again:
            found = next(self.known, None)
            if found is None:
                raise RuntimeError(
                    "a block that runs again asks for more than in its first run: is it a function of its inputs?"
                )
            return found
        self.found.append(f())
        return self.found[-1]


_runs: ContextVar[_Run | None] = ContextVar("runs", default=None)


class _Enough(Exception):
    """All is found that the first run had saved."""


class _Saved:
    """What autograd would have saved of a run: numbers, until the first of it is asked for. Then the run is made again,
    up to the last of it."""

    def __init__(self, run: Callable, again: _Run, autocast: Callable):
        self.run, self.again, self.autocast = run, again, autocast
        self.count = 0
        self.found: dict[int, list[Tensor | None]] = {}  # by backward pass: there are two where a pipeline splits it

    def number(self, _: Tensor) -> int:
        self.count += 1
        return self.count - 1

    def find(self, number: int) -> Tensor:
        task = torch._C._current_graph_task_id()
        if task not in self.found:
            self.found[task] = self.made()
        x, self.found[task][number] = self.found[task][number], None
        if x is None:
            raise RuntimeError(
                "what a block that runs again has saved is there to be asked for once in a backward pass"
            )
        return x

    def made(self) -> list[Tensor | None]:
        found = []

        def keep(x: Tensor) -> Tensor:
            found.append(x.detach())
            if len(found) == self.count:
                raise _Enough
            return found[-1]

        with torch.enable_grad(), self.again, self.autocast(), saved_tensors_hooks(keep, lambda x: x):
            try:
                self.run()
            except _Enough:
                return found
        raise RuntimeError(
            f"a block that runs again saves {len(found)} tensors, {self.count} in its first run: "
            "is it a function of its inputs?"
        )


def recomputed(forward: Callable, *inputs, **more):
    """forward(*inputs, **more), of which nothing is kept but the inputs and what was found `once`: in the backward pass
    it runs again. Random numbers are not drawn again, nor is it checked that what is found has the same shapes.

    What torch's `checkpoint` does, in a fifth of its time on the host, which has none to spare (bench/LOG.md). A
    compiler, which takes no hooks of ours, gets torch's; nor is there anything under one that is found once.
    """
    if torch.compiler.is_compiling():
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **more)
    kind = next((x.device.type for x in inputs if isinstance(x, Tensor)), "cpu")
    how = {"dtype": torch.get_autocast_dtype(kind), "enabled": torch.is_autocast_enabled(kind)}
    autocast = partial(torch.autocast, kind, **how, cache_enabled=torch.is_autocast_cache_enabled())
    known = []
    saved = _Saved(partial(forward, *inputs, **more), _Run(known, True), autocast)
    with _Run(known, False), saved_tensors_hooks(saved.number, saved.find):
        return forward(*inputs, **more)


def once(f: Callable):
    """f(), without a gradient; where a block runs again, what it was the first time."""
    run = _runs.get()
    with torch.no_grad():
        return f() if run is None else run.once(f)


def exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Rows to everybody (`comm.exchange`); differentiable. On every rank one exchange forward, and one backward, of
    no rows at all if need be."""
    if not (observed() or x.requires_grad):  # by way of torch's operators the host would need several times as long
        return comm.exchange(x, send, receive, group)
    return torch.ops.linear_moe.exchange(x, send, receive, group.group_name)


def _keep_numbers(ctx, inputs, output):
    _, ctx.send, ctx.receive, ctx.group = inputs


def _back_to_rows(ctx, D):
    return torch.ops.linear_moe.exchange(D, ctx.receive, ctx.send, ctx.group), None, None, None


known(
    "exchange",
    "(Tensor x, SymInt[] send, SymInt[] receive, str group) -> Tensor",
    lambda x, send, receive, group: comm.exchange(x, send, receive, comm.named(group)),
    lambda x, send, receive, group: x.new_empty(sum(receive), *x.shape[1:]),
)
differentiable("exchange", _back_to_rows, _keep_numbers)


class Underway(NamedTuple):
    """Rows that nobody may look at before `end_exchange`."""

    rows: Tensor
    way: "_Way | None"  # None: they are here


def begin_exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Underway:
    """Sends the first rows of x on their way (`exchange`); those behind them stay, and get no gradient that means
    anything. What is computed before `end_exchange` has the sending beside it. Backward mirrors it: the end sends the
    gradients on their way, the begin waits for them, and between the two autograd, which takes the newest first, has
    what was computed between the two here.

    Where somebody looks on there is but one op, which waits.
    """
    if observed():
        return Underway(exchange(x[: sum(send)], send, receive, group), None)
    way = _Way(send, receive, group)
    return Underway(_Begun.apply(x, way), way)


def end_exchange(underway: Underway) -> Tensor:
    """The rows that came, from each rank in rank order."""
    return underway.rows if underway.way is None else _Ended.apply(*underway)


class _Way:
    """What both halves of an exchange share. Autograd could not hand it on: for it, a gradient that sets out would have
    as many rows as one that arrives."""

    def __init__(self, send: list[int], receive: list[int], group: Group):
        self.send, self.receive, self.group = send, receive, group

    def begin(self, x: Tensor, buffer: Tensor, send: list[int], receive: list[int]) -> Tensor:
        self.underway = buffer, comm.begin_exchange(x, buffer[: sum(receive)], send, receive, self.group)
        return buffer

    def end(self) -> Tensor:
        (buffer, underway), self.underway = self.underway, None
        comm.end_exchange(underway)
        return buffer


class _Begun(torch.autograd.Function):
    """A buffer for the rows that come. Its gradient says nothing but that those of the rows are on their way."""

    @staticmethod
    def forward(ctx, x, way):
        ctx.way, way.rows = way, len(x)
        return way.begin(x[: sum(way.send)], x.new_empty(sum(way.receive), *x.shape[1:]), way.send, way.receive)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        return ctx.way.end(), None


class _Ended(torch.autograd.Function):
    """The rows that came."""

    @staticmethod
    def forward(ctx, buffer, way):
        ctx.way = way
        way.end()
        return buffer.view_as(buffer)

    @staticmethod
    @once_differentiable
    def backward(ctx, D):
        ctx.way.begin(D, D.new_empty(ctx.way.rows, *D.shape[1:]), ctx.way.receive, ctx.way.send)
        return D, None
