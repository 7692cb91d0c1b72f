"""Experts shared out over ranks: tokens travel to theirs and come back.

    dispatch   each token's row to the ranks of its experts: exchange how many, then the rows
    compute    each rank its own e / W experts, over the rows of all ranks of the group
    combine    exchange the rows back;  each token's sum over its own

Nobody is dropped for the sake of an even exchange: what a router keeps is computed, whatever goes where. The gradient
of an expert is the sum over all tokens that came to it, from whichever rank; losses are sums over tokens, so no factor
of any group's size is anywhere.

    n my tokens   k experts a token visits   d width   e experts   W ranks of the group   l = e / W experts of a rank
    row: what is sent of a token;  r rows that come.  By rank a token has a place on each of W ranks, not of k experts
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from parallel import comm
from parallel.comm import Group
from parallel.graph import exchange
from reference.head import product_of
from reference.moe import MoE, counts_of
from reference.ops import Ops


def over(ops: Ops, group: Group, dispatch: str = "pair") -> Ops:
    """The same ops for layers whose experts are shared out over the ranks of `group` by `place`, in rank order.
    `dispatch` is a name of `DISPATCH`; ValueError lists them."""
    if dispatch not in DISPATCH:
        raise ValueError(f"unknown dispatch {dispatch!r}; expected one of {', '.join(DISPATCH)}")
    if comm.size(group) == 1:
        return ops
    name = f"{ops.name}, experts over {comm.size(group)} ranks by {dispatch}"
    return ops._replace(name=name, experts=DISPATCH[dispatch](ops, group))


def by_pair(ops: Ops, group: Group) -> Callable:
    """A token's row travels once for each expert that it visits, and comes back as often; gates stay at home. Equal to
    one rank to the rounding of products.

    Received are 8 (W - 1) (l + 1) bytes of numbers and, each way, the rows; 8 bytes a row besides where experts have
    dropout. Three exchanges forward, two backward, of the rows alone.
    """

    def run(x, routing, w13, w2, b13=None, b2=None, *, gate_at="output", drop=None, room=None, **how):
        weights = [mine(w, group) for w in (w13, w2, b13, b2)]
        own = len(weights[0])
        plan = planned(routing.index, routing.kept, own, ops, group, room or 0)
        rows = sent(x, plan, ops, group, routing.gate if gate_at == "input" else None, product_of(x))
        # Here each row is a token that visits one expert of mine, with weight 1. They come rank by rank, by expert.
        names = torch.arange(own, device=x.device).repeat(comm.size(group))
        index = names.repeat_interleave(plan.counts, output_size=len(rows))[:, None]
        there = routing._replace(index=index, gate=routing.gate.new_ones(index.shape), kept=index >= 0)
        if drop is not None:
            drop = renumbered(drop, plan, ops, group)
        room = None if room is None else sum(plan.told[0])
        y = ops.experts(rows, there, *weights, gate_at="output", drop=drop, room=room, **how)
        return returned(y, plan, ops, group, routing.gate if gate_at == "output" else None, x.dtype)

    return run


def by_rank(ops: Ops, group: Group) -> Callable:
    """A token's row travels once to each rank that holds some of its experts, with their gates, and is summed there
    before the way back: fewer bytes, and in 16 bits one more rounding.

    Received are 32 (W - 1) bytes of numbers and, each way, the rows; on the way there and back again 2 k numbers a row
    besides (gates and experts), and forward 8 bytes a row where experts have dropout. Four exchanges forward, three
    backward.
    """

    def run(x, routing, w13, w2, b13=None, b2=None, *, gate_at="output", drop=None, room=None, **how):
        weights = [mine(w, group) for w in (w13, w2, b13, b2)]
        own, ranks = len(weights[0]), comm.size(group)
        each = torch.arange(ranks, device=x.device)[:, None]
        here = routing.kept[:, None] & ((routing.index // own)[:, None] == each)  # n W k
        place = each[:, 0].expand(here.shape[:2])
        plan = planned(place, here.any(-1), 1, ops, group, room or 0, routing.index.shape[1], here.sum((0, 2)))
        rooms, slots, pairs = plan.told
        rows = sent(x, plan, ops, group, dtype=product_of(x))
        # Indices are small enough to be whole numbers in the gates' dtype, float32 at least.
        index = torch.where(here, routing.index[:, None] - own * each, -1).to(routing.gate)
        both = torch.stack([torch.where(here, routing.gate[:, None], 0), index], -2)
        both = F.pad(both, (0, max(slots) - both.shape[-1]), value=-1)  # k may differ from rank to rank
        apart = plan._replace(place=plan.place.view(-1, 1))  # a token has its own numbers for each rank
        gate, index = sent(both.flatten(2).flatten(0, 1), apart, ops, group).unflatten(1, (2, -1)).unbind(1)
        index = index.detach().long()
        there = routing._replace(index=index, gate=gate.masked_fill(index < 0, 0), kept=index >= 0)
        if drop is not None:
            drop = renumbered(drop, plan, ops, group)
        room = None if room is None else sum(rooms)
        y = ops.experts(rows, there, *weights, gate_at=gate_at, drop=drop, room=room, pairs=sum(pairs), **how)
        return returned(y, plan, ops, group, dtype=x.dtype)

    return run


DISPATCH = {"pair": by_pair, "rank": by_rank}


class Plan(NamedTuple):
    """Which rows go where."""

    place: Int[Tensor, "n k"]  # where the row of each of my places stands in what I send; behind it: goes nowhere
    send: list[int]  # rows that go to each rank
    receive: list[int]  # rows that come from each rank
    counts: Int[Tensor, " wl"]  # the same, by my places
    told: list[list[int]]  # each of the numbers that ranks tell each other: of each rank, what it told me


def planned(
    place: Int[Tensor, "n k"], kept: Bool[Tensor, "n k"], own: int, ops: Ops, group: Group, *numbers: int | Tensor
) -> Plan:
    """The exchange of how many rows go where: to places 0 to W * own - 1, `own` on each rank, or (not kept) nowhere.
    With it go `numbers` of each rank's, the same for all ranks or one for each.

    Here the host waits for the GPU, once a layer: a tensor's size is a number of the host's, and how many rows come
    is known when all ranks have routed. (Only buffers as large as the worst case would do without.)
    """
    ranks = comm.size(group)
    rows, ends, *_ = ops.by_expert(place, kept, own * ranks)
    counts = counts_of(ends.long()).view(ranks, own)
    mine = [place.new_full((ranks,), x) if isinstance(x, int) else x for x in numbers]
    theirs = exchange(torch.cat([counts, torch.stack(mine, 1)], 1), [1] * ranks, [1] * ranks, group)
    coming = theirs[:, :own]
    send, receive, *told = torch.stack([counts.sum(1), coming.sum(1), *theirs[:, own:].T]).tolist()
    return Plan(rows, send, receive, coming.flatten(), told)


def sent(
    x: Float[Tensor, "n ..."], plan: Plan, ops: Ops, group: Group, gate=None, dtype=None
) -> Float[Tensor, "r ..."]:
    """The rows that come here, of `dtype`; times their gates if there are any."""
    return exchange(ops.taken(x, plan.place, sum(plan.send), gate, dtype), plan.send, plan.receive, group)


def returned(
    y: Float[Tensor, "r d"], plan: Plan, ops: Ops, group: Group, gate=None, dtype=None
) -> Float[Tensor, "n d"]:
    """What became of my rows, summed for each token, times their gates if there are any."""
    return ops.combined(exchange(y, plan.receive, plan.send, group), plan.place, gate, dtype)


def renumbered(drop: Any, plan: Plan, ops: Ops, group: Group) -> Any:
    """Dropout for the rows that come here, whose tokens have these numbers where they come from. Such that (number, my
    expert) counts as (token, expert) does among all experts: number e + (rank l + expert) = (number W + rank) l +
    expert."""
    index = sent(drop.index[:, None], plan, ops, group)[:, 0]
    return drop._replace(index=index * comm.size(group) + comm.rank(group))


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
