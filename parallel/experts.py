"""Experts shared out over ranks: tokens travel to theirs and come back.

    dispatch   each token's row to the ranks of its experts: exchange how many, then the rows
    compute    each rank its own e / W experts, over the rows of all ranks of the group
    combine    exchange the rows back;  each token's sum over its own

Nobody is dropped for the sake of an even exchange: what a router keeps is computed, whatever goes where. The gradient
of an expert is the sum over all tokens that came to it, from whichever rank; losses are sums over tokens, so no factor
of any group's size is anywhere.

    n my tokens   k experts a token visits   d width   e experts   W ranks of the group   l = e / W experts of a rank
    row: what is sent of a token; p all pairs or, in `by_rank`, all W n tokens and ranks;  s rows that go,  r that come
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from parallel import comm
from parallel.comm import Group
from parallel.graph import exchange
from reference.moe import MoE, combine
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

    Received are 8 (W - 1) (l + 2) bytes of numbers and, each way, the rows; 8 bytes a row besides where experts have
    dropout. Three exchanges forward, two backward, of the rows alone.
    """

    def run(x, routing, w13, w2, b13=None, b2=None, *, gate_at="output", drop=None, room=None, **how):
        weights = [mine(w, group) for w in (w13, w2, b13, b2)]
        own, k = len(weights[0]), routing.index.shape[1]
        everywhere = own * comm.size(group)
        plan = planned(routing.index.masked_fill(~routing.kept, everywhere).flatten(), own, room, 1, group)
        slots = repeat(x, "n d -> (n k) d", k=k)
        if gate_at == "input":
            slots = (routing.gate.flatten()[:, None] * slots).to(x.dtype)
        rows = sent(narrow(slots), plan, group)
        # Here each row is a token that visits one expert of mine, with weight 1. They come rank by rank, by expert.
        names = torch.arange(own, device=x.device).repeat(comm.size(group))
        index = names.repeat_interleave(plan.counts, output_size=len(rows))[:, None]
        there = routing._replace(index=index, gate=routing.gate.new_ones(index.shape), kept=index >= 0)
        if drop is not None:
            drop = renumbered(drop, repeat(drop.index, "n -> (n k)", k=k), plan, group)
        y = ops.experts(rows, there, *weights, gate_at="output", drop=drop, room=plan.room, **how)
        gate = routing.gate if gate_at == "output" else routing.kept.to(routing.gate)
        return combine(returned(y, plan, group), gate).to(x.dtype)

    return run


def by_rank(ops: Ops, group: Group) -> Callable:
    """A token's row travels once to each rank that holds some of its experts, with their gates, and is summed there
    before the way back: fewer bytes, and in 16 bits one more rounding.

    Received are 24 (W - 1) bytes of numbers and, each way, the rows; on the way there and back again 2 k numbers a row
    besides (gates and experts), and forward 8 bytes a row where experts have dropout. Four exchanges forward, three
    backward.
    """

    def run(x, routing, w13, w2, b13=None, b2=None, *, gate_at="output", drop=None, room=None, **how):
        weights = [mine(w, group) for w in (w13, w2, b13, b2)]
        own, ranks = len(weights[0]), comm.size(group)
        each = torch.arange(ranks, device=x.device)[:, None, None]
        here = routing.kept & (routing.index // own == each)  # W n k
        place = torch.where(here.any(-1), each[..., 0], ranks)
        plan = planned(place.flatten(), 1, room, routing.index.shape[1], group)
        rows = sent(repeat(narrow(x), "n d -> (w n) d", w=ranks), plan, group)
        # Indices are small enough to be whole numbers in the gates' dtype, float32 at least.
        index = torch.where(here, routing.index - own * each, -1).to(routing.gate)
        both = torch.stack([torch.where(here, routing.gate, 0), index], -2)
        both = F.pad(both, (0, plan.slots - both.shape[-1]), value=-1)  # k may differ from rank to rank
        gate, index = sent(both.flatten(0, 1), plan, group).unbind(1)
        index = index.detach().long()
        there = routing._replace(index=index, gate=gate.masked_fill(index < 0, 0), kept=index >= 0)
        if drop is not None:
            drop = renumbered(drop, drop.index.repeat(ranks), plan, group)
        y = ops.experts(rows, there, *weights, gate_at=gate_at, drop=drop, room=plan.room, **how)
        return returned(y, plan, group).unflatten(0, (ranks, len(x))).sum(0).to(x.dtype)

    return run


DISPATCH = {"pair": by_pair, "rank": by_rank}


class Plan(NamedTuple):
    """Which rows go where."""

    order: Int[Tensor, " s"]  # what I send, of all p, sorted by place
    back: Int[Tensor, " p"]  # where each stands in that order; behind it those that go nowhere
    send: list[int]  # rows that go to each rank
    receive: list[int]  # rows that come from each rank
    counts: Int[Tensor, " wl"]  # the same, by my places
    room: int | None  # rows that each of my experts takes, of all ranks
    slots: int  # the most that any rank has of a row


def planned(place: Int[Tensor, " p"], own: int, room: int | None, slots: int, group: Group) -> Plan:
    """The exchange of how many rows go where: to places 0 to W * own - 1, `own` on each rank, or (W * own) nowhere.

    Here the host waits for the GPU, once a layer: a tensor's size is a number of the host's, and how many rows come
    is known when all ranks have routed. (Only buffers as large as the worst case would do without.)
    """
    ranks = comm.size(group)
    order = place.sort(stable=True).indices
    # Not bincount, which would wait for the largest number first.
    counts = place.new_zeros(own * ranks + 1).index_add_(0, place, torch.ones_like(place))[:-1].view(ranks, own)
    mine = torch.tensor([room or 0, slots], device=place.device).expand(ranks, 2)
    theirs = exchange(torch.cat([counts, mine], 1), [1] * ranks, [1] * ranks, group)
    coming = theirs[:, :own]
    send, receive, rooms, most = torch.stack([counts.sum(1), coming.sum(1), *theirs[:, own:].T]).tolist()
    room = None if room is None else sum(rooms)
    return Plan(order[: sum(send)], order.argsort(), send, receive, coming.flatten(), room, max(most))


def sent(x: Float[Tensor, "p ..."], plan: Plan, group: Group) -> Float[Tensor, "r ..."]:
    """The rows that come here."""
    return exchange(x.index_select(0, plan.order), plan.send, plan.receive, group)


def returned(y: Float[Tensor, "r d"], plan: Plan, group: Group) -> Float[Tensor, "p d"]:
    """What became of my rows; zeros for those that went nowhere."""
    y = exchange(y, plan.receive, plan.send, group)
    return torch.cat([y, y.new_zeros(len(plan.back) - len(y), y.shape[1])]).index_select(0, plan.back)


def renumbered(drop: Any, index: Int[Tensor, " p"], plan: Plan, group: Group) -> Any:
    """Dropout for the rows that come here, whose tokens have these numbers where they come from. Such that (number, my
    expert) counts as (token, expert) does among all experts: number e + (rank l + expert) = (number W + rank) l +
    expert."""
    return drop._replace(index=sent(index, plan, group) * comm.size(group) + comm.rank(group))


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
