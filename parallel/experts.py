"""Experts shared out over ranks: tokens travel to theirs and come back, while others stay and are computed.

    y_n = Σ_{e mine} G_ne expert_e(x_n)  +  Σ_{e of other ranks} G_ne expert_e(x_n)       near + far

    dispatch   exchange how many rows go where;  the far ones set out
    near       h = inner(W13 x), my tokens at my experts         beside the way there
    far        my experts over the rows that came;  they set out for home
    near       W2 h                                              beside the way back
    combine    each token's sum over its own

The gradient takes the same steps from the last to the first, so its two exchanges have products beside them as well. Of
the experts' weights it is a sum of two, near and far. Nobody is dropped for the sake of an even exchange: what a router
keeps is computed, whatever goes where. The gradient of an expert is the sum over all tokens that came to it, from
whichever rank; losses are sums over tokens, so no factor of any group's size is anywhere.

    n my tokens   k experts a token visits   d width   e experts   W ranks of the group   l = e / W experts of a rank
    row: what is sent of a token;  r rows that come.  By rank a token has a place on each of W ranks, not of k experts
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from parallel import comm
from parallel.comm import Group
from parallel.graph import begin_exchange, end_exchange, exchange, once
from reference.head import product_of
from reference.moe import Drop, MoE, counts_of
from reference.ops import Ops


def over(ops: Ops, group: Group, dispatch: str = "pair") -> Ops:
    """The same ops for layers whose experts are shared out over the ranks of `group` by `place`, in rank order.
    `dispatch` is a name of `DISPATCH`; ValueError lists them."""
    if dispatch not in DISPATCH:
        raise ValueError(f"unknown dispatch {dispatch!r}; expected one of {', '.join(DISPATCH)}")
    if comm.size(group) == 1:
        return ops
    name = f"{ops.name}, experts over {comm.size(group)} ranks by {dispatch}"
    return ops._replace(name=name, experts=shared(ops, group, DISPATCH[dispatch]))


def shared(ops: Ops, group: Group, dispatch: Callable) -> Callable:
    """`ops.experts` of which each rank has some. `dispatch` sends tokens to those of other ranks; what stays needs no
    exchange, and is computed while the rest travels: first up to the experts' second matrix, then from there. That is
    a W-th of all work where routing is even. In 16 bits the sum of the two is one more rounding than one rank has.

    What sets out stands in front of a buffer for as many rows as might: it is filled before the host knows how many do.
    """

    def run(x, routing, w13, w2, b13=None, b2=None, *, gate_at="output", drop=None, room=None, **how):
        weights = [mine(w, group) for w in (w13, w2, b13, b2)]
        near, far = parted(routing, len(weights[0]), group)
        plan, arrived, gate = dispatch(x, far, len(weights[0]), near.kept.sum(), room or 0, gate_at, ops, group)
        if drop is not None:
            numbers = ops.taken(drop.index[:, None], plan.place, sum(plan.send))
            numbers = begin_exchange(numbers, plan.send, plan.receive, group)

        def meanwhile() -> None:
            rows, there, more = arrived()
            if drop is not None:
                more["drop"] = renumbered(drop, end_exchange(numbers)[:, 0], group)
            if room is not None:
                more["room"] = sum(plan.told[0]) - room  # what the others have promised
            y = ops.experts(rows, there, *weights, **more, **how)
            back.append(begin_exchange(y, plan.receive, plan.send, group))

        back = []
        here = {"gate_at": gate_at, "room": room, "pairs": plan.stay, "between": meanwhile}
        here["drop"] = None if drop is None else renumbered(drop, drop.index, group)
        y = ops.experts(x, near, *weights, **here, **how)
        return y + ops.combined(end_exchange(*back), plan.place, gate, x.dtype)

    return run


class Sent(NamedTuple):
    """Rows that have set out."""

    plan: "Plan"
    arrived: Callable  # () -> (rows : r d, their routing to my experts, whatever else `ops.experts` takes); waits
    gate: Float[Tensor, "n k"] | None  # the weights of what comes back


def by_pair(x, far, own: int, stay: Tensor, room: int, gate_at: str, ops: Ops, group: Group) -> Sent:
    """A token's row travels once for each expert that it visits, and comes back as often; gates stay at home. Equal to
    one rank to the rounding of products and of the sum near + far.

    Received are 8 (W - 1) (l + 1) bytes of numbers and, each way, the rows; 8 bytes a row besides where experts have
    dropout. Three exchanges forward (two where a block runs again), two backward, of the rows alone.
    """
    place, numbers = planned(far.index, far.kept, own, stay, ops, group, room)
    rows = ops.taken(x, place, place.numel(), far.gate if gate_at == "input" else None, product_of(x))
    plan = numbers()
    underway = begin_exchange(rows, plan.send, plan.receive, group)

    def arrived() -> tuple:
        rows = end_exchange(underway)
        # Each is a token that visits one expert of mine, with weight 1. They come rank by rank, by expert.
        names = torch.arange(own, device=x.device).repeat(comm.size(group))
        index = names.repeat_interleave(plan.counts, output_size=len(rows))[:, None]
        there = far._replace(index=index, gate=far.gate.new_ones(index.shape), kept=index >= 0)
        return rows, there, {"gate_at": "output"}

    return Sent(plan, arrived, far.gate if gate_at == "output" else None)


def by_rank(x, far, own: int, stay: Tensor, room: int, gate_at: str, ops: Ops, group: Group) -> Sent:
    """A token's row travels once to each rank that holds some of its experts, with their gates, and is summed there
    before the way back: fewer bytes, and in 16 bits one more rounding.

    Received are 32 (W - 1) bytes of numbers and, each way, the rows; on the way there and back again 2 k numbers a row
    besides (gates and experts), and forward 8 bytes a row where experts have dropout. Four exchanges forward (three
    where a block runs again), three backward.
    """
    (n, k), ranks = far.index.shape, comm.size(group)
    each = torch.arange(ranks, device=x.device)[:, None]
    here = far.kept[:, None] & ((far.index // own)[:, None] == each)  # n W k
    others = each[:, 0].expand(here.shape[:2])
    place, numbers = planned(others, here.any(-1), 1, stay, ops, group, room, k, here.sum((0, 2)))
    most = n * min(k, ranks - 1)
    # Indices are small enough to be whole numbers in the gates' dtype, float32 at least.
    index = torch.where(here, far.index[:, None] - own * each, -1).to(far.gate)
    both = torch.stack([torch.where(here, far.gate[:, None], 0), index], -2).view(n * ranks, 2 * k)
    both = ops.taken(both, place.view(-1, 1), most)  # a token has its own for each rank
    rows = ops.taken(x, place, most, None, product_of(x))
    plan = numbers()
    _, slots, pairs = plan.told
    if max(slots) > k:  # which may differ from rank to rank
        both = F.pad(both.unflatten(1, (2, k)), (0, max(slots) - k), value=-1).flatten(1)
    underway = [begin_exchange(sent, plan.send, plan.receive, group) for sent in (rows, both)]

    def arrived() -> tuple:
        both, rows = map(end_exchange, reversed(underway))
        gate, index = both.view(len(both), 2, max(slots)).unbind(1)
        index = index.detach().long()
        there = far._replace(index=index, gate=gate.masked_fill(index < 0, 0), kept=index >= 0)
        return rows, there, {"gate_at": gate_at, "pairs": sum(pairs)}

    return Sent(plan, arrived, None)


DISPATCH = {"pair": by_pair, "rank": by_rank}


def parted(routing, own: int, group: Group) -> tuple:
    """The routing of pairs whose expert is mine, numbered from my first on, and that of the others."""
    me = comm.rank(group)
    stay = routing.index // own == me
    near = routing._replace(index=routing.index - own * me, kept=routing.kept & stay)
    return near, routing._replace(kept=routing.kept & ~stay)


class Plan(NamedTuple):
    """Which rows go where."""

    place: Int[Tensor, "n k"]  # where the row of each of my places stands in what I send; behind it: goes nowhere
    send: list[int]  # rows that go to each rank
    receive: list[int]  # rows that come from each rank
    counts: Int[Tensor, " wl"]  # the same, by my places
    stay: int  # pairs that go nowhere for their expert is mine
    told: list[list[int]]  # each of the numbers that ranks tell each other: of each rank, what it told me


def planned(
    place: Int[Tensor, "n k"],
    kept: Bool[Tensor, "n k"],
    own: int,
    stay: Int[Tensor, ""],
    ops: Ops,
    group: Group,
    *numbers: int | Tensor,
) -> tuple[Int[Tensor, "n k"], Callable[[], Plan]]:
    """The exchange of how many rows go where: to places 0 to W * own - 1, `own` on each rank, or (not kept) nowhere.
    With it go `numbers` of each rank's, the same for all ranks or one for each.

    First comes where rows stand in what is sent, which the GPU alone knows; then the plan, when it is called for. There
    the host waits, once a layer: a tensor's size is a number of the host's, and how many rows come is known when all
    ranks have routed. (Only buffers for as many as might come would do without.) It waits for these numbers alone:
    what is asked of the GPU in between keeps that busy while the host reads, and asks for the exchange. A block that
    runs again finds the numbers of the first time.
    """
    ranks = comm.size(group)
    rows, ends, *_ = ops.by_expert(place, kept, own * ranks)

    def asked() -> tuple[Tensor, Callable[[], list]]:
        counts = counts_of(ends.long()).view(ranks, own)
        mine = [place.new_full((ranks,), x) if isinstance(x, int) else x for x in numbers]
        theirs = exchange(torch.cat([counts, torch.stack(mine, 1)], 1), [1] * ranks, [1] * ranks, group)
        known = torch.stack([counts.sum(1), theirs[:, :own].sum(1), stay.expand(ranks), *theirs[:, own:].T])
        return theirs[:, :own].flatten(), comm.fetched(known)

    coming, fetched = once(asked)

    def plan() -> Plan:
        send, receive, (stays, *_), *told = fetched()
        return Plan(rows, send, receive, coming, stays, told)

    return rows, plan


def renumbered(drop: Drop, index: Int[Tensor, " r"], group: Group) -> Drop:
    """Dropout for rows at my experts, whose tokens have these numbers where they come from. Such that (number, my
    expert) counts as (token, expert) does among all experts: number e + (rank l + expert) = (number W + rank) l +
    expert."""
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
