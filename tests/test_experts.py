"""Experts shared out over ranks are the same experts: outputs, every gradient, whole training steps; and what travels.

Each world of one to four processes starts once and runs all of its cases; the tests look up their verdicts.
"""

import itertools
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor, Shard

import train as trainer
from data.corpus import Document
from data.stream import Stream
from inputs import HERE, refused
from parallel import checkpoint, comm, experts, mesh, shard, testing
from ranks import prepared, whole
from reference.model import LanguageModel
from reference.moe import Drop, relu_squared, swiglu
from reference.ops import ops
from reference.presets import Model
from reference.routers import ROUTER, Routing, row


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64)


# ------------------------------------------------------------------------------------------------- the exchange


def exchanged():
    """Rank s sends s + 2 r rows of its own number to rank r, and none of some; then the same way back."""
    group = comm.world()
    n, me = comm.size(group), comm.rank(group)
    rows = [[0 if (s + r) % 3 == 2 else s + 2 * r for r in range(n)] for s in range(n)]
    receive = [row[me] for row in rows]
    said = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        x = torch.cat([torch.full((count, 3), 10 * me + r) for r, count in enumerate(rows[me])]).to(dtype)
        with comm.counted() as counter:
            y = comm.exchange(x, rows[me], receive, group)
        want = torch.cat([torch.full((count, 3), 10 * s + me) for s, count in enumerate(receive)]).to(dtype)
        away = sum(receive) - receive[me]
        assert counter.calls["exchange"] == (n > 1) and counter.received["exchange"] == away * 3 * x.element_size()
        said[dtype] = torch.equal(y, want) and torch.equal(comm.exchange(y, receive, rows[me], group), x)
    x = draw(sum(rows[me]), 2, seed=me).requires_grad_()
    D = draw(sum(receive), 2, seed=me + 9)
    if n > 1:
        experts.exchange(x, rows[me], receive, group).backward(D)
        said["gradient"] = torch.equal(x.grad, comm.exchange(D, receive, rows[me], group))
    for wrong in (([1] * (n + 1), [1] * n), ([1] * n, [1] * n)):
        with pytest.raises(ValueError, match=r"exchange (over|of)"):
            comm.exchange(torch.zeros(n + 1, 2), *wrong, group)
    return said


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_rows_go_where_they_are_told_and_come_back(ranks):
    for said in testing.run(ranks, exchanged):
        assert all(said.values()), said


def compiled():
    """Fake shapes and the way back, in one graph."""
    group = comm.world()
    x, receive = draw(5, 2).requires_grad_(), [2 + comm.rank(group)] * 2

    def f(x):
        underway = experts.begin_exchange(x.cos(), [2, 3], receive, group)
        return experts.exchange(2 * x, [2, 3], receive, group).sin() + experts.end_exchange(underway)

    torch.compile(f, backend="aot_eager", fullgraph=True)(x).sum().backward()
    got, x.grad = x.grad, None
    f(x).sum().backward()
    return torch.equal(got, x.grad)


def test_a_compiler_sees_one_call():
    import torch._dynamo.backends.debugging  # once, before the fork

    assert all(testing.run(2, compiled)) and torch._dynamo


# ------------------------------------------------------------------------------- one layer of experts, op by op

E, D_, F_ = 12, 5, 3
TOKENS = {"ragged": (7, 0, 4, 1), "none": (0, 0, 0, 0), "last": (0, 0, 0, 6), "equal": (5, 5, 5, 5)}
WAYS = {
    "plain": {},
    "biases": {"biases": True},
    "ungated": {"inner": relu_squared},
    "gate at the input": {"gate_at": "input", "biases": True},
    "dropped pairs": {"lose": True},
    "dropped pairs, gate at the input": {"lose": True, "gate_at": "input", "biases": True},
    "dropout": {"share": 0.4},
    "room": {"room": True, "biases": True, "lose": True},
    "one expert has all": {"only": 5},
    "one expert a token": {"k": 1},
}
CASES = list(itertools.product(WAYS, TOKENS, experts.DISPATCH))


def made(lengths, biases=False, lose=False, share=None, room=False, only=None, k=3, inner=swiglu, gate_at="output"):
    """(x, routing, weights, how) of all ranks' tokens."""
    n, rng = sum(lengths), torch.Generator().manual_seed(4)
    index = torch.rand(n, E, generator=rng).argsort(-1)[:, :k]
    index = torch.full((n, 1), only) if only is not None else index
    kept = torch.rand(index.shape, generator=rng) < 0.6 if lose else torch.ones_like(index, dtype=torch.bool)
    gate = torch.rand(index.shape, generator=rng, dtype=torch.float64) * kept
    index = index.masked_fill(
        ~kept & (torch.rand(index.shape, generator=rng) < 0.5), -1
    )  # empty slots, or full experts
    rows = 2 if inner is swiglu else 1
    weights = [draw(E, rows * F_, D_), draw(E, D_, F_, seed=1)]
    weights += [draw(E, rows * F_, seed=2), draw(E, D_, seed=3)] if biases else []
    how = {"inner": inner, "gate_at": gate_at}
    if share is not None:
        how["drop"] = Drop(share, 3, torch.arange(n, device=HERE) * 5 + 2)
    if room:
        how["room"] = n * k  # of all ranks; each says its part
    x, routing = draw(n, D_, seed=5).to(HERE), Routing(*(t.to(HERE) for t in (index, gate, kept)))
    return x, routing, [w.to(HERE) for w in weights], how


def layer(what, tokens, dispatch, place, ops=ops, again=False):
    """(output and gradients on this rank, what they should be) of each case."""
    group = comm.world()
    ranks, me = comm.size(group), comm.rank(group)
    lengths = TOKENS[tokens][:ranks]
    x, routing, weights, how = made(lengths, **WAYS[what])
    start, stop = sum(lengths[:me]), sum(lengths[: me + 1])
    wanted = [t.clone().requires_grad_() for t in (x, routing.gate, *weights)]
    o = ops.experts(wanted[0], routing._replace(gate=wanted[1]), *wanted[2:], **how)
    cotangent = draw(*o.shape, seed=7).to(HERE)
    exact = list(torch.autograd.grad((o * cotangent).sum(), wanted))
    own = slice(me * E // ranks, (me + 1) * E // ranks)
    exact = [t[start:stop] for t in (o, *exact[:2])] + [g[own] for g in exact[2:]]
    part = Routing(*(t[start:stop] for t in routing))
    mine = [x[start:stop].clone().requires_grad_(), part.gate.clone().requires_grad_()]
    if ranks > 1:
        weights = [DTensor.from_local(w[own], place.experts["expert"], [Shard(0)]).requires_grad_() for w in weights]
    else:
        weights = [w.clone().requires_grad_() for w in weights]
    if "drop" in how:
        how["drop"] = how["drop"]._replace(index=how["drop"].index[start:stop])
    if "room" in how:
        how["room"] = (stop - start) * routing.index.shape[1]
    with comm.counted() as forward:
        run = experts.over(ops, group, dispatch).experts
        run = partial(shard.recomputed, run) if again else run
        got = run(mine[0], part._replace(gate=mine[1]), *weights, **how)
    with comm.counted() as backward:
        (got * cotangent[start:stop]).sum().backward()
    assert all(t.grad is not None for t in (*mine, *weights)), "a rank without a gradient would leave others waiting"
    got = [got, *(t.grad for t in mine), *(shard.local(t.grad) for t in weights)]
    worst = max((a - b).abs().max().item() for a, b in zip(got, exact, strict=True) if b.numel())
    assert all(a.shape == b.shape for a, b in zip(got, exact, strict=True))
    return worst, forward, backward


def order(dispatch, place):
    """What a rank does of a layer that is shared out, in turn; of the backward pass exchanges and products."""
    done = []

    def noted(name, function, back=False):
        def call(*inputs, **how):
            done.append(name)
            y = function(*inputs, **how)
            if back and y.requires_grad:
                y.register_hook(lambda _: done.append(name))
            return y

        return call

    fetched, exchanges = comm.fetched, {name: noted(name[:-9], getattr(comm, name)) for name in HALVES}
    with (
        patch.multiple(comm, **exchanges, fetched=noted("ask", lambda x: noted("read", fetched(x)))),
        patch.object(F, "linear", noted("product", F.linear, back=True)),
    ):
        layer("plain", "equal", dispatch, place, ops._replace(taken=noted("take", ops.taken)))
    names = [name for name, _ in itertools.groupby(done)]
    return names[names.index("ask") :]  # before it one rank has all experts


HALVES = ("begin_exchange", "end_exchange")


def layers():
    ranks = comm.size(comm.world())
    place = mesh.make(mesh.Degrees(expert=ranks), HERE)
    said = {case: layer(*case, place) for case in CASES}
    for way in experts.DISPATCH if ranks > 1 else ():
        said[way], said[way, "again"] = order(way, place), layer("plain", "ragged", way, place, again=True)
    return said


@pytest.fixture(scope="module")
def verdicts() -> dict:
    return {ranks: testing.run(ranks, layers) for ranks in (1, 2, 3, 4)}


@pytest.mark.parametrize("what", WAYS)
def test_experts_over_ranks_are_those_of_one(what, verdicts):
    for ranks, tokens, dispatch in itertools.product(verdicts, TOKENS, experts.DISPATCH):
        worst = max(said[what, tokens, dispatch][0] for said in verdicts[ranks])
        assert worst < 1e-12, (ranks, tokens, dispatch, worst)


@pytest.mark.parametrize("what", WAYS)
def test_exchanges_of_the_rows_that_go_elsewhere_and_of_nothing_else(what, verdicts):
    for ranks, tokens in itertools.product((2, 3, 4), TOKENS):
        lengths, own = TOKENS[tokens][:ranks], E // ranks
        _, routing, _, how = made(lengths, **WAYS[what])
        source, k = torch.arange(ranks).repeat_interleave(torch.tensor(lengths)), routing.index.shape[1]
        dropout = "drop" in how
        for me, said in enumerate(verdicts[ranks]):

            def moved(r, mine, me=me, source=source, routing=routing, own=own):
                """Of each token that is mine (or is not), the pairs that rank r computes."""
                return ((routing.kept & (routing.index // own == r)) & ((source == me) == mine)[:, None]).sum(-1)

            comes, goes = moved(me, False), [moved(r, True) for r in range(ranks) if r != me]
            pairs = comes.sum().item(), sum(x.sum().item() for x in goes)
            rows = (comes > 0).sum().item(), sum((x > 0).sum().item() for x in goes)
            _, forward, backward = said[what, tokens, "pair"]
            assert dict(forward.calls) == {"exchange": 3 + dropout} and dict(backward.calls) == {"exchange": 2}
            numbers = 8 * (ranks - 1) * (own + 1) + 8 * pairs[0] * dropout
            assert forward.received["exchange"] == 8 * D_ * sum(pairs) + numbers
            assert backward.received["exchange"] == 8 * D_ * sum(pairs)
            _, forward, backward = said[what, tokens, "rank"]
            assert dict(forward.calls) == {"exchange": 4 + dropout} and dict(backward.calls) == {"exchange": 3}
            numbers = 32 * (ranks - 1) + 8 * rows[0] * (2 * k + dropout)
            assert forward.received["exchange"] == 8 * D_ * sum(rows) + numbers
            assert backward.received["exchange"] == 8 * D_ * sum(rows) + 8 * 2 * k * rows[1]


@pytest.mark.parametrize("dispatch", experts.DISPATCH)
def test_products_are_beside_every_exchange_and_work_beside_the_numbers(dispatch, verdicts):
    each_way = ["begin", "product", "end", "product", "begin", "product", "end"]
    for ranks in (2, 3, 4):
        for said in verdicts[ranks]:
            assert said[dispatch] == ["ask", "take", "read", *each_way, *each_way]


@pytest.mark.parametrize(("dispatch", "rows"), [("pair", 2), ("rank", 3)])
def test_a_block_that_runs_again_knows_the_numbers(dispatch, rows, verdicts):
    for worst, forward, backward in (said[dispatch, "again"] for ranks in (2, 3) for said in verdicts[ranks]):
        assert worst < 1e-12 and forward.calls["exchange"] == 1 + rows and backward.calls["exchange"] == 2 * rows


# ------------------------------------------------------------------------------------------------ whole training

SIZES = {"width": 8, "heads": 2, "pattern": "L", "lsm": "retention", "experts": 12, "expert_width": 6, "top_k": 2}
BATCH, LENGTH = 12, 5
# Without GPUs two steps: the second goes by what the first has moved (parameters, momentum, biases of routers,
# penalties). AdamW, which works out anew at each step where its operations go, and needs longer for it than for the
# step, moves one model a file.
STEPS, MOVED_BY = (3, "adamw") if torch.cuda.is_available() else (2, "sgd")
STREAM = Stream([Document("a", bytes(range(40)) * 3), Document("b", bytes(range(90, 120)) * 4)], LENGTH, 0)


ALONE = mesh.Degrees()


def config_of(router="linear_moe", degrees=ALONE, **more) -> trainer.Train:
    only = {"top_k": row(router).top_k} if row(router).top_k else {}
    more = {"balance": None, "recompute": False, "optimizer": MOVED_BY} | more
    outside = {name: more.pop(name) for name in ("balance", "recompute")}
    return trainer.Train(
        optimizer=trainer.Optimizer(name=more.pop("optimizer"), rate=0.05, warmup=1, clip=0.5),
        model=Model(**SIZES | {"router": router} | only | more),
        mesh=degrees,
        length=LENGTH,
        batch=BATCH,
        steps=STEPS,
        bias_rate=0.05,
        precision="float64",
        **outside,
    )


def steps(config, place, model, over, optimizer, first=0, last=STEPS):
    """What each step said, and the first one's gradients after clipping."""
    said, grads = [], []

    def keep(*_):
        if not grads:
            grads.extend(whole(p.grad) for p in model.parameters())

    look = optimizer.register_step_pre_hook(keep)
    for step in range(first, last):
        feed = trainer.feed_of(config, place)
        batches = trainer.micro_batches(config, STREAM, feed, place, step, HERE)
        result = trainer.one_step(config, model, over, optimizer, batches, step, False)
        said += [result.loss, result.norm, *result.load.counts.flatten().tolist()]
    look.remove()
    return torch.tensor(said, dtype=torch.float64), grads


def values(model) -> list:
    """Parameters and buffers."""
    return [whole(x) for x in (*model.parameters(), *model.buffers())]


def run(config):
    place, model, over, optimizer = prepared(config)
    start = values(model)
    said, grads = steps(config, place, model, over, optimizer)
    return said, grads, start, values(model)


def runs(configs):
    return {name: run(config) for name, config in configs.items()}


def same(got, want, **how):
    """The same start to the bit; then losses, norms, counts, gradients, parameters and buffers."""
    close = {"rtol": 1e-11, "atol": 1e-12} | how
    assert all(map(torch.equal, got[2], want[2]))
    for a, b in zip((got[0], *got[1], *got[3]), (want[0], *want[1], *want[3]), strict=True):
        torch.testing.assert_close(a, b, **close)


ROWS = {name: {"router": name} for name in ROUTER}
ROWS["deepseek_v2"] |= {"groups": 3, "groups_kept": 2}


@pytest.fixture(scope="module")
def alone() -> dict:
    return runs({name: config_of(**how) for name, how in ROWS.items()})


@pytest.fixture(scope="module")
def shared(alone) -> list:
    return testing.run(2, runs, {name: config_of(**how, degrees=mesh.Degrees(expert=2)) for name, how in ROWS.items()})


@pytest.mark.parametrize("router", ROUTER)
def test_steps_with_shared_experts_are_those_of_one_process(router, alone, shared):
    for rank in shared:
        same(rank[router], alone[router])


# Models for every mesh: recomputed or not, biases that move, penalties that grow, dropout, experts of many kinds.
MODELS = {
    "bias": {
        **{"router": "deepseek_v3", "balance": {"switch": 0.1}, "shared_width": 4, "expert_dropout": 0.3},
        "optimizer": "adamw",
    },
    "penalty": {"router": "remoe", "balance": {"penalty": 1e6}, "dropout": 0.1, "pattern": "LENE"},
    "odd sizes": {"width": 5, "heads": 1, "expert_width": 3, "expert_kind": "relu", "lsm": "gla", "recompute": True},
    "side by side": {
        **{"router": "longcat", "identity": 3, "latent": 4, "expert_biases": True, "expert_kind": "clamped_swish"},
        **{"pattern": "L+EN+E", "attention": "mixture", "mixer_experts": 3, "recompute": True},
    },
}
MESHES = {
    2: [mesh.Degrees(expert=2), mesh.Degrees(sequence=2, expert=2, dispatch="rank"), mesh.Degrees(replicas=2)],
    3: [mesh.Degrees(sequence=3, expert=3), mesh.Degrees(expert=3), mesh.Degrees(sequence=3, replicas=3)],
    4: [
        mesh.Degrees(expert=2),
        mesh.Degrees(sequence=2, expert=2),
        mesh.Degrees(sequence=2, expert=4, dispatch="rank"),
        mesh.Degrees(expert=2, replicas=2),
        mesh.Degrees(sequence=4, replicas=2),
    ],
}


@pytest.fixture(scope="module")
def models_alone() -> dict:
    return runs({name: config_of(**how) for name, how in MODELS.items()})


@pytest.fixture(scope="module", params=MESHES)
def on_meshes(request, models_alone):
    some = list(itertools.product(MODELS, MESHES[request.param]))[:: max(request.param - 1, 2)]  # every mesh and model
    return testing.run(request.param, runs, {(n, d): config_of(**MODELS[n], degrees=d) for n, d in some})


@pytest.mark.parametrize("name", MODELS)
def test_every_mesh_trains_as_one_process(name, models_alone, on_meshes):
    for rank in on_meshes:
        mine = [got for (model, _), got in rank.items() if model == name]
        assert mine
        for got in mine:
            same(got, models_alone[name])


# --------------------------------------------------------------------------------------------------- checkpoints

SAVED = {"router": "deepseek_v3", "balance": {"switch": 0.1}, "shared_width": 4, "expert_biases": True}
SAVED |= {"optimizer": "adamw"}


def save(folder, degrees, first, last):
    """Steps from the newest checkpoint, if any, and a checkpoint; what is then there."""
    place, model, over, optimizer = prepared(config_of(**SAVED, degrees=degrees))
    state = {"model": model, "optimizer": optimizer, "step": 0}
    checkpoint.load(folder, state)
    assert state["step"] == first
    at_load = values(model)
    steps(config_of(**SAVED, degrees=degrees), place, model, over, optimizer, first, last)
    checkpoint.save(folder, last, {**state, "step": last}, 1)
    return at_load, values(model)


def test_checkpoints_go_from_any_mesh_to_any_other(tmp_path):
    """Each of three steps on another mesh: shared experts to one process, to replicas, to experts and sequences."""
    model, said = prepared(config_of(**SAVED)), []
    for step in range(3):
        steps(config_of(**SAVED), *model, step, step + 1)
        said.append(values(model[1]))
    for name, meshes in {
        "a": [(2, mesh.Degrees(expert=2)), (1, ALONE), (2, mesh.Degrees(sequence=2, expert=2))],
        "b": [(1, ALONE), (4, mesh.Degrees(expert=2, replicas=2)), (3, mesh.Degrees(expert=3))],
    }.items():
        for step, (ranks, degrees) in enumerate(meshes):
            ask = (tmp_path / name, degrees, step, step + 1)
            for at_load, after in testing.run(ranks, save, *ask) if ranks > 1 else [save(*ask)]:
                if step:
                    torch.testing.assert_close(at_load, said[step - 1], rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(after, said[step], rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------------- the mesh, and what is refused


def places():
    place = mesh.make(mesh.Degrees(sequence=2, expert=2, replicas=2), HERE)
    me = torch.tensor([float(place.rank)])
    near = mesh.make(mesh.Degrees(expert=4), HERE)
    config = config_of(degrees=mesh.Degrees(expert=2))
    model = prepared(config)[1]
    return {
        "place": (place.data_rank, place.sequence_rank, place.expert_rank, place.shards.get_local_rank("shards")),
        "expert": comm.total(me, place.expert).item(),
        "four": [x.item() for x in comm.gather(me, near.expert)],
        "said": (str(place), str(near)),
        "held": shard.held(model),
        "real": sum(shard.local(p).numel() for p in model.parameters()),
    }


def test_one_set_of_ranks_is_seen_in_three_ways():
    ranks, count = testing.run(4, places), sum(p.numel() for p in prepared(config_of())[1].parameters())
    for r, said in enumerate(ranks):
        assert said["place"] == (r // 2, r % 2, r % 2, r % 2)
        assert said["expert"] == 2 * (r - r % 2) + 1 and said["four"] == [0, 1, 2, 3]
        assert said["said"] == (
            "4 ranks = 2 data x 2 sequence, parameters sharded over 2 in each of 2 replicas, "
            "experts shared out to 2 and sharded over 1",
            "4 ranks = 4 data x 1 sequence, parameters sharded over all, experts shared out to 4 and sharded over 1",
        )
        (mine, all_), (others, rest) = said["held"].values()
        assert list(said["held"]) == ["experts", "everything else"] and all_ + rest == count
        assert all_ == 12 * 3 * 6 * 8 and mine * 4 == all_ and mine + others == said["real"]
    assert sum(said["real"] for said in ranks) == count


def refusals():
    place = mesh.make(mesh.Degrees(expert=2), HERE)
    x, routing, weights, _ = made((4,))
    layers = LanguageModel(Model(**SIZES | {"experts": 5}), ops), LanguageModel(Model(**SIZES | {"pattern": "LD"}), ops)
    calls = [
        lambda: shard.shard(layers[0], place, layers[0].blocks),
        lambda: shard.shard(layers[1], place, layers[1].blocks),
        lambda: mesh.over(ops, place).experts(x, routing, *weights),
        lambda: mesh.make(mesh.Degrees(expert=4), HERE),
        lambda: mesh.make(mesh.Degrees(expert=2, replicas=2), HERE),
        lambda: mesh.make(mesh.Degrees(replicas=3), HERE),
        lambda: mesh.make(mesh.Degrees(expert=0), HERE),
    ]
    return refused(calls)


def test_what_cannot_be_shared_is_refused_in_one_line():
    words = [
        "5 experts cannot be shared over 2 ranks; let --mesh.expert be one of 1, 5",
        "the model has no expert layer to share over 2 ranks; use --mesh.expert 1",
        "experts over 2 ranks need weights that are shared out (parallel.experts.place), got all of (12, 6, 5)",
        "groups of 4 ranks that share experts do not fit into 2 ranks; let --mesh.expert be one of 1, 2",
        "groups of 2 ranks that share experts do not fit into each of 2 replicas, 1 rank; let --mesh.expert be 1",
        "3 replicas cannot be made of 2 ranks; let --mesh.replicas be one of 1, 2",
        "mesh degrees must be at least 1 (data: or -1), got data -1, sequence 1, expert 0, replicas 1, tensor 1",
    ]
    for rank in testing.run(2, refusals):
        assert rank == words
    with pytest.raises(ValueError, match="groups of 2 ranks that share experts do not fit into 1 rank"):
        mesh.make(mesh.Degrees(expert=2), HERE)
