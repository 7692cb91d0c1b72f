"""Experts shared out over ranks: tokens travel to theirs and come back.

    dispatch   pairs (token, expert) sorted by expert;  exchange how many;  exchange the rows
    compute    each rank its own e / W experts, over the rows of all ranks of the group
    combine    exchange the rows back;  each token's sum over its own pairs, weighted by its gates

Nobody is dropped for the sake of an even exchange: what a router keeps is computed, whatever goes where. A layer takes
three exchanges forward (one of a few numbers) and two backward. The gradient of an expert is the sum over all tokens
that came to it, from whichever rank; losses are sums over tokens, so no factor of any group's size is anywhere.

    n my tokens   k experts a token visits   d width   e experts   W ranks of the group   l = e / W experts of a rank
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import repeat
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from parallel import comm
from parallel.comm import Group
from reference.moe import MoE, combine
from reference.ops import Ops


def over(ops: Ops, group: Group) -> Ops:
    """The same ops for layers whose experts are shared out over the ranks of `group` by `place`, in rank order."""
    if comm.size(group) == 1:
        return ops
    name = f"{ops.name}, experts over {comm.size(group)} ranks"
    return ops._replace(name=name, experts=experts(ops, group))


def experts(ops: Ops, group: Group) -> Callable:
    """Receives, of the pairs that other ranks send here, and again of those that come back, the bytes of a row each;
    and 8 (W - 1) (l + 1) bytes of numbers, 8 a pair besides where experts have dropout. Backward the rows alone."""

    def run(x, routing, w13, w2, b13=None, b2=None, *, gate_at="output", drop=None, room=None, **how):
        weights = [mine(w, group) for w in (w13, w2, b13, b2)]
        plan = planned(routing, len(weights[0]), room, group)
        slots = repeat(x, "n d -> (n k) d", k=routing.index.shape[1])
        if gate_at == "input":
            slots = (routing.gate.flatten()[:, None] * slots).to(x.dtype)
        rows = exchange(narrow(slots).index_select(0, plan.order), plan.send, plan.receive, group)
        # Here each row is a token that visits one expert of mine, with weight 1.
        index = plan.expert[:, None]
        one = routing.gate.new_ones(index.shape)
        there = routing._replace(index=index, gate=one, kept=torch.ones_like(index, dtype=torch.bool))
        if drop is not None:
            drop = drop._replace(index=renumbered(drop.index, routing, plan, group))
        y = ops.experts(rows, there, *weights, gate_at="output", drop=drop, room=plan.room, **how)
        y = exchange(y, plan.receive, plan.send, group)
        y = torch.cat([y, y.new_zeros(len(slots) - len(y), y.shape[1])]).index_select(0, plan.back)
        gate = routing.gate if gate_at == "output" else routing.kept.to(routing.gate)
        return combine(y, gate).to(x.dtype)

    return run


class Plan(NamedTuple):
    """Which pairs go where."""

    order: Int[Tensor, " s"]  # the pairs that are kept, sorted by expert: what I send
    back: Int[Tensor, " nk"]  # where each pair stands in that order; behind it those that are not kept
    send: list[int]  # pairs that go to each rank
    receive: list[int]  # pairs that come from each rank
    expert: Int[Tensor, " r"]  # of each row that comes, which of my experts it visits
    room: int | None  # rows that each of my experts takes, of all ranks


def planned(routing: Any, own: int, room: int | None, group: Group) -> Plan:
    """The exchange of how many pairs go where, `own` experts a rank.

    Here the host waits for the GPU, once a layer: a tensor's size is a number of the host's, and how many rows come
    is known when all ranks have routed. (Only buffers as large as the worst case would do without.)
    """
    ranks = comm.size(group)
    expert = routing.index.masked_fill(~routing.kept, own * ranks).flatten()
    order = expert.sort(stable=True).indices
    # Not bincount, which would wait for the largest number first.
    counts = expert.new_zeros(own * ranks + 1).index_add_(0, expert, torch.ones_like(expert))[:-1].view(ranks, own)
    said = torch.cat([counts, torch.full_like(counts[:, :1], room or 0)], 1)
    theirs = exchange(said, [1] * ranks, [1] * ranks, group)
    here = theirs[:, :own].flatten()
    sums = torch.stack([counts.sum(1), here.view(ranks, own).sum(1), theirs[:, own]])
    send, receive, rooms = sums.tolist()
    names = torch.arange(own, device=expert.device).repeat(ranks)
    visits = names.repeat_interleave(here, output_size=sum(receive))
    return Plan(order[: sum(send)], order.argsort(), send, receive, visits, None if room is None else sum(rooms))


def renumbered(index: Int[Tensor, " n"], routing: Any, plan: Plan, group: Group) -> Int[Tensor, " r"]:
    """The numbers of the tokens whose rows come here, such that (number, my expert) counts like (token, expert) among
    all experts: number * e + (rank * l + expert) = (number * W + rank) * l + expert."""
    pairs = index.repeat_interleave(routing.index.shape[1]).index_select(0, plan.order)
    theirs = exchange(pairs, plan.send, plan.receive, group)
    return theirs * comm.size(group) + comm.rank(group)


def narrow(x: Tensor) -> Tensor:
    """In autocast's dtype where it is on: the experts' first product would cast it there anyway."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(kind))


def mine(weight: Tensor | None, group: Group) -> Tensor | None:
    """My experts' part of a weight. ValueError if the weight is not shared out."""
    if weight is None:
        return None
    if not isinstance(weight, DTensor) or weight.device_mesh.size() != comm.size(group):
        raise ValueError(
            f"experts over {comm.size(group)} ranks need weights that are shared out (parallel.experts.place), got all "
            f"of {tuple(weight.shape)}"
        )
    return weight.to_local()


# ------------------------------------------------------------------------------------------------- who holds which


def place(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Each rank of the mesh's dimension `expert` keeps its own experts of every layer; before sharding, in place.

    Raises ValueError, one line, if there are no experts or their number is no multiple of that of the ranks.
    """
    if mesh is None:
        return
    ranks, rank = mesh["expert"].size(), mesh.get_local_rank("expert")
    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    if not layers:
        raise ValueError(f"the model has no expert layer to share over {ranks} ranks; use --mesh.expert 1")
    for layer in layers:
        e = layer.config.experts
        if e % ranks:
            fits = ", ".join(str(n) for n in range(1, e + 1) if e % n == 0)
            raise ValueError(f"{e} experts cannot be shared over {ranks} ranks; let --mesh.expert be one of {fits}")
        for name, weight in layer.own().items():
            part = weight.detach().chunk(ranks)[rank]
            shared = DTensor.from_local(part, mesh["expert"], [Shard(0)], run_check=False)
            layer.register_parameter(name, nn.Parameter(shared))


def placement(weight: Tensor, over: int) -> Shard:
    """Along which dimension a weight of experts is sharded over so many ranks: the first behind the experts that they
    divide. That of the experts themselves, which are few, is the last resort."""
    divided = (i for i, size in enumerate(weight.shape[1:], 1) if size % over == 0)
    return Shard(next(divided, 0))


# ---------------------------------------------------------------------------------------------- known to torch
# As in `lasp`: an op of torch's, so that a compiler and recomputation see one call, whatever the rank.


def exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Rows to everybody (`comm.exchange`); differentiable. On every rank one exchange forward, and one backward, of
    no rows at all if need be."""
    return torch.ops.linear_moe.exchange(x, send, receive, group.group_name)


def _exchange(x: Tensor, send: list[int], receive: list[int], group: str) -> Tensor:
    return comm.exchange(x, send, receive, comm.named(group))


def _exchange_shape(x, send, receive, group):
    return x.new_empty(sum(receive), *x.shape[1:])


def _keep_numbers(ctx, inputs, output):
    _, ctx.send, ctx.receive, ctx.group = inputs


def _back_to_rows(ctx, D):
    return torch.ops.linear_moe.exchange(D, ctx.receive, ctx.send, ctx.group), None, None, None


torch.library.define("linear_moe::exchange", "(Tensor x, SymInt[] send, SymInt[] receive, str group) -> Tensor")
torch.library.impl("linear_moe::exchange", "default", _exchange)
torch.library.register_fake("linear_moe::exchange", _exchange_shape)
torch.library.register_autograd("linear_moe::exchange", _back_to_rows, setup_context=_keep_numbers)
