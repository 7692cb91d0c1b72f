"""Heads shared by ranks are the same layers: losses, every gradient, whole training steps; and what travels.

Each world of two or four processes starts once and runs all of its cases; the tests look up their verdicts.
"""

import itertools
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

import train as trainer
from inputs import HERE, Made, refused
from parallel import checkpoint, comm, mesh, shard, tensor, testing, tracing
from ranks import made_once, prepared
from reference import mixers
from reference.lsm import LSM
from reference.model import LanguageModel
from reference.ops import ops
from reference.presets import Model
from test_experts import config_of, run, same, steps, values

SMALL = {"width": 8, "heads": 2, "experts": 4, "expert_width": 6, "router": "linear_moe"}
ALONE, TWO, SPARING = mesh.Degrees(), mesh.Degrees(tensor=2), mesh.Degrees(tensor=2, between="cut")
BOTH = mesh.Degrees(tensor=2, expert=2)


def runs(configs):
    return {name: run(config) for name, config in configs.items()}


# ------------------------------------------------------------------------------------------------- every mixer

# Sizes of a head are given where the published ones are large; odd ones show that no size is taken for another.
SIZES = {"mamba2": {"key_size": 3}, "log_linear_mamba2": {"key_size": 3, "levels": 3}, "mamba3": {"key_size": 4}}
SIZES |= {name: {"key_size": 3, "value_size": 5} for name in ("gla", "lightning", "linear_attention", "mesa", "comba")}
SIZES |= {"rwkv6": {"key_size": 3, "value_size": 5}, "rwkv7": {"key_size": 3, "value_size": 5}}
SIZES |= {name: {"key_size": 3, "value_size": 5} for name in ("mamba", "longhorn", "mom_gla")}
SIZES |= {"s4": {"key_size": 3}, "ttt": {"value_size": 3}}
ROWS = {name: SMALL | {"lsm": name, "pattern": "L"} | SIZES.get(name, {}) for name in LSM}
ROWS["hgrn2"] |= {"repeat": 2}  # a single layer has no bound to learn
ROWS["rwkv7"] |= {"repeat": 2}  # nor does it take another's values
MODELS = {
    "two groups": {"lsm": "mamba2", "key_size": 3, "heads": 4, "state_groups": 2},
    "four value heads": {"lsm": "kda", "value_heads": 4, "key_size": 4},
    "grouped": {"pattern": "N", "heads": 4, "key_heads": 2, "qkv_bias": True, "qk_norm": True, "attention_gate": True},
    "one key head": {"pattern": "N", "heads": 4, "key_heads": 1, "window": 3, "head_size": 4},
    "maps": {"lsm": "mamba", "state_norm": "learned", "projection_experts": ("input", "output"), "mixer_experts": 3},
    "as many on each rank as the width": {"lsm": "s4", "key_size": 3, "value_size": 8},
    "mixture": {"pattern": "N", "attention": "mixture", "heads": 4, "key_heads": 2, "qk_norm": True},
    "latent": {"pattern": "N", "attention": "latent", "query_rank": 3, "attention_gate": True},
    "features": {"lsm": "linear_attention", "feature_map": "hedgehog", "gate": False},
    "one kind beside another": {"pattern": "L+EN+DE", "lsm": "retention", "tied": True, "dense_width": 6},
}
ROUTED = {
    "bias": {"router": "deepseek_v3", "balance": {"switch": 0.1}, "shared_width": 4, "shared_gate": True},
    "penalty": {"router": "remoe", "balance": {"penalty": 1e6}, "dropout": 0.1, "expert_kind": "relu"},
    "biases": {"expert_biases": True, "expert_kind": "clamped_swish", "identity": 3, "router": "longcat", "latent": 4},
    "slots": {"router": "soft", "expert_slots": 2},
    "room": {"router": "switch", "pad": True, "capacity_factor": 0.7, "balance": {"switch": 0.1, "z": 0.1}},
    "choice": {"router": "expert_choice"},
}
CUT_BETWEEN = {
    "odd tokens": {"pattern": "LN", "lsm": "mamba2", "key_size": 3, "micro": 3, "shared_width": 4},
    "dense": {"pattern": "L+DL+E", "dense_width": 6, "lsm": "hgrn2", "recompute": True},
    "a gate behind the sum": {"pattern": "L", "lsm": "s4", "key_size": 3, "micro": 3, "recompute": True},
}
DEALT = {  # experts that are shared out by the ranks that share heads
    "bias and dropout": ROUTED["bias"] | {"expert_dropout": 0.3, "expert_width": 5},
    **{name: ROUTED[name] for name in ("penalty", "biases", "slots", "room")},
}
DEALT = {name: SMALL | {"lsm": "retention"} | how for name, how in DEALT.items()}
CUT_BETWEEN = {name: SMALL | how for name, how in CUT_BETWEEN.items()}
MODELS = {name: SMALL | how for name, how in MODELS.items()}
MODELS |= {name: SMALL | {"lsm": "retention"} | how for name, how in ROUTED.items()}


def configured(how, degrees=ALONE) -> trainer.Train:
    """Plain steps: Adam divides by the gradient's size, which makes a rounding of a small gradient a large one."""
    how = dict(how)
    optimizer, micro = how.pop("optimizer", "sgd"), how.pop("micro", None)
    config = config_of(**how, degrees=degrees)
    return replace(config, micro=micro, optimizer=replace(config.optimizer, name=optimizer, eps=1e-2))


def configs(models, degrees=ALONE):
    return {name: configured(how, degrees) for name, how in models.items()}


@pytest.fixture(scope="module")
def alone() -> dict:
    return runs(configs(ROWS | MODELS | CUT_BETWEEN | DEALT))


@pytest.fixture(scope="module")
def shared(alone) -> list:
    cases = configs(ROWS | MODELS, TWO) | configs(CUT_BETWEEN, SPARING)
    cases |= {("dealt", name): how for name, how in configs(DEALT, BOTH).items()}
    return testing.run(2, runs, cases)


@pytest.mark.parametrize("name", ROWS)
def test_steps_of_every_mixer_with_shared_heads_are_those_of_one_process(name, alone, shared):
    for rank in shared:
        same(rank[name], alone[name])


@pytest.mark.parametrize("name", MODELS)
def test_so_are_those_of_attention_and_experts(name, alone, shared):
    for rank in shared:
        same(rank[name], alone[name])


@pytest.mark.parametrize("name", CUT_BETWEEN)
def test_so_are_those_with_tokens_cut_between_the_layers(name, alone, shared):
    for rank in shared:
        same(rank[name], alone[name])


@pytest.mark.parametrize("name", DEALT)
def test_so_are_those_with_experts_that_are_shared_out(name, alone, shared):
    for rank in shared:
        same(rank["dealt", name], alone[name])


# ------------------------------------------------------------------------------------------------- every mesh

WHOLE = {
    "hybrid": {
        **{"pattern": "LN", "lsm": "gated_delta_net", "key_size": 2, "heads": 4, "key_heads": 1, "shared_width": 4},
        **{"recompute": True, "optimizer": "adamw", "balance": {"switch": 0.1}, "dropout": 0.1},
    },
    "decays": {"pattern": "LDE", "repeat": 2, "lsm": "hgrn2", "heads": 4, "dense_width": 8},
    "channels": {"pattern": "L", "lsm": "mamba", "key_size": 3},
}
WHOLE = {name: SMALL | how for name, how in WHOLE.items()}
ON_FOUR = [("hybrid", mesh.Degrees(tensor=2)), ("hybrid", mesh.Degrees(tensor=2, sequence=2, attention="ulysses"))]
ON_FOUR += [
    ("decays", mesh.Degrees(tensor=2, sequence=2, between="cut")),
    ("decays", mesh.Degrees(tensor=2, replicas=2)),
    ("hybrid", mesh.Degrees(tensor=2, expert=4)),
    ("channels", mesh.Degrees(tensor=2, sequence=2)),
    ("decays", mesh.Degrees(tensor=2, sequence=2, expert=2, dispatch="rank", between="cut")),
]


@pytest.fixture(scope="module")
def whole_alone() -> dict:
    return runs(configs(WHOLE))


@pytest.fixture(scope="module")
def on_four(whole_alone) -> list:
    return testing.run(4, runs, {(name, degrees): configured(WHOLE[name], degrees) for name, degrees in ON_FOUR})


def titled(case) -> str:
    name, where = case
    return f"{name}, {where.sequence} {where.replicas} {where.expert}"


@pytest.mark.parametrize("case", ON_FOUR, ids=titled)
def test_every_mesh_trains_as_one_process(case, whole_alone, on_four):
    for rank in on_four:
        same(rank[case], whole_alone[case[0]])


# ------------------------------------------------------------------------------------------------ what travels

B, T_ = 2, 3
LAYERS = {
    "mixer": ({"lsm": "gla"}, ["sum"]),
    "mixer with one norm over all heads": ({"lsm": "lightning"}, ["norm", "sum"]),
    "mixer with one state group": ({"lsm": "mamba2", "key_size": 3}, ["norm", "sum"]),
    "two state groups": ({"lsm": "mamba2", "key_size": 3, "heads": 4, "state_groups": 2}, ["sum"]),
    "step, B and C from all channels": ({"lsm": "mamba", "key_size": 3}, ["select", "sum"]),
    "a gate behind the sum": ({"lsm": "s4", "key_size": 3}, ["halves"]),
    "values of a first layer": ({"lsm": "rwkv7"}, ["sum"]),
    "mean and variance over all heads": ({"lsm": "ttt"}, ["norm", "norm", "sum"]),
    "memories": ({"lsm": "mom_gla"}, ["sum"]),
    "attention": ({"pattern": "N"}, ["sum"]),
    "latent attention": ({"pattern": "N", "attention": "latent"}, ["sum"]),
    "dense": ({"pattern": "D"}, ["sum"]),
    "experts": ({"pattern": "E", "expert_biases": True}, ["sum"]),
    "experts and a shared one": ({"pattern": "E", "shared_width": 4}, ["sum", "sum"]),
}
NUMBERS = {"sum": SMALL["width"], "halves": 2 * SMALL["width"], "norm": 1, "select": 1 + 3 + 3}
BYTES = {what: 8 * B * T_ * n for what, n in NUMBERS.items()}  # on two ranks a total receives as many as it has


def counted(function, *args):
    """(the first that it returns, whose sum then goes backward; what travels forward; backward)"""
    with comm.counted() as forward:
        y = function(*args)[0]
    with comm.counted() as backward:
        y.sum().backward()
    return y, forward, backward


def layer(how, place, tokens, sparing=False):
    """A model of one bare layer whose heads are shared, an input and its side."""
    model = LanguageModel(Model(**SMALL | {"bare": True, "pattern": "L"} | how), mesh.over(ops, place)).double()
    tensor.place(model, place.tensors, sparing)
    for weight in model.parameters():
        torch.nn.init.normal_(shard.local(weight.data))
    x = torch.ones(B, tokens, SMALL["width"], dtype=torch.float64, requires_grad=True)
    return model, x, model.side(torch.zeros(B, tokens, dtype=torch.int64), None, None, None, None, None)


def travelled():
    """Of each layer: the calls and bytes forward and backward. Then those of one with tokens cut before and behind it,
    and of the loss."""
    place, said = mesh.make(TWO, HERE), {}
    for name, (how, _) in LAYERS.items():
        model, x, side = layer(how, place, T_)
        _, *said[name] = counted(model.blocks[0], x, side)
    model, x, side = layer({"lsm": "gla"}, place, T_ + 1, sparing=True)
    mine = tensor.own_tokens(x, tensor.team_of(place.tensor))
    y, *said["cut between"] = counted(model.blocks[0].sublayers[0], mine, side)
    x, head = (torch.ones(n, 8, dtype=torch.float64, requires_grad=True) for n in (6, 5))
    _, *said["loss"] = counted(
        lambda *given: [mesh.over(ops, place).token_losses(*given)], x, head, torch.arange(6) % 5
    )
    return {**said, "shape": y.shape}


@pytest.fixture(scope="module")
def traffic() -> list:
    return testing.run(2, travelled)


@pytest.mark.parametrize("name", LAYERS)
def test_one_sum_a_layer_and_direction(name, traffic):
    sums = LAYERS[name][1]
    for said in traffic:
        for direction in said[name]:
            assert dict(direction.calls) == {"total": len(sums)}
            assert dict(direction.received) == {"total": sum(BYTES[what] for what in sums)}


def test_a_gather_and_a_sum_of_own_tokens_where_they_are_cut_between(traffic):
    half = 8 * B * (T_ + 1) // 2 * SMALL["width"]
    for said in traffic:
        assert said["shape"] == (B, (T_ + 1) // 2, SMALL["width"])
        for direction in said["cut between"]:
            assert dict(direction.calls) == {"gather": 1, "scatter": 1}
            assert dict(direction.received) == {"gather": half, "scatter": half}


def test_three_numbers_a_token_for_the_loss(traffic):
    for said in traffic:
        forward, backward = said["loss"]
        assert dict(forward.received) == {"gather": 8 * 6, "total": 8 * 2 * 6} and forward.calls["total"] == 1
        assert dict(backward.received) == {"total": 8 * 2 * 6}


# ----------------------------------------------------------------------------------------------- the loss itself


def lost(words, ignored, held):
    """(losses and gradients, what they should be), with labels on every border of a part."""
    group, n = comm.world(), 7
    x, head = (torch.randn(k, 4, generator=torch.Generator().manual_seed(k)).double() for k in (n, words))
    x, head = 30 * x.requires_grad_(), head.requires_grad_()  # without a maximum, exponentials would overflow
    labels = torch.arange(n) * 3 % words
    labels[ignored] = -100
    cotangent = torch.arange(1.0, n + 1).double()
    want = ops.token_losses(x, head, labels)
    exact = torch.autograd.grad((want * cotangent).sum(), (x, head))
    got = tensor.token_losses(group, partial(ops.token_losses, held=held), x, head, labels)
    mine = torch.autograd.grad((got * cotangent).sum() / comm.size(group), (x, head))
    pairs = [(got, want), *((comm.total(a, group), b) for a, b in zip(mine, exact, strict=True))]
    return max((a - b).abs().max().item() for a, b in pairs)


def losses():
    """All tokens at once, two after two, and one by one."""
    ignored = [], [0, 6], list(range(7))
    return [lost(words, some, held) for words, some, held in itertools.product((2, 5, 8), ignored, (99, 8, 1))]


def test_a_loss_over_parts_of_the_words_is_that_over_all():
    for rank in testing.run(2, losses):
        assert max(rank) < 1e-12, rank


def pieces():
    """The size of the largest tensor that the loss of a rank makes, and what it is given."""
    x, head = torch.randn(100, 2, requires_grad=True), torch.randn(50, 2, requires_grad=True)
    with Made() as made:
        own = partial(ops.token_losses, held=500)
        tensor.token_losses(comm.world(), own, x, head, torch.arange(100) % 50).sum().backward()
    return max(made.sizes)


def test_nor_are_all_its_logits_ever_there():
    """A rank has 25 words of 100 tokens, and room for 500 logits."""
    assert testing.run(2, pieces) == [500, 500]


# ------------------------------------------------------------------------------------------------- checkpoints

SAVED = {
    "heads": {"lsm": "gated_delta_net", "pattern": "LN", "key_size": 2},
    "channels": {"lsm": "s4", "pattern": "L", "key_size": 2},
    "memories": {"lsm": "mom_gla", "pattern": "L"},
}
SAVED = {name: SMALL | {"optimizer": "adamw"} | how for name, how in SAVED.items()}


def saves(folder, *ask):
    return {name: save(folder / name, how, *ask) for name, how in SAVED.items()}


def save(folder, how, degrees, first, last):
    """Steps from the newest checkpoint, if any, and a checkpoint; what is then there."""
    config = configured(how, degrees)
    place, model, over, optimizer = prepared(config)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    checkpoint.load(folder, state)
    assert state["step"] == first
    at_load = values(model)
    steps(config, place, model, over, optimizer, first, last)
    checkpoint.save(folder, last, {**state, "step": last}, 1)
    return at_load, values(model)


def test_checkpoints_go_from_shared_heads_to_other_meshes_and_back(tmp_path):
    said = {}
    for name, how in SAVED.items():
        config = configured(how)
        model = prepared(config)
        for step in range(3):
            steps(config, *model, step, step + 1)
            said[name, step] = values(model[1])
    for step, (ranks, degrees) in enumerate([(2, TWO), (1, ALONE), (4, TWO)]):
        ask = (tmp_path, degrees, step, step + 1)
        for rank in testing.run(ranks, saves, *ask) if ranks > 1 else [saves(*ask)]:
            for name, (at_load, after) in rank.items():
                if step:
                    torch.testing.assert_close(at_load, said[name, step - 1], rtol=1e-11, atol=1e-12)
                torch.testing.assert_close(after, said[name, step], rtol=1e-11, atol=1e-12)


# ------------------------------------------------------------------------------------- the mesh, and what is refused


def places():
    place = mesh.make(mesh.Degrees(tensor=2, sequence=2), HERE)
    me = torch.tensor([float(place.rank)])
    model = prepared(configured(SAVED["heads"], TWO))[1]
    return {
        "place": (place.data_rank, place.sequence_rank, place.tensor_rank),
        "heads": [x.item() for x in comm.gather(me, place.tensor)],
        "sequence": [x.item() for x in comm.gather(me, place.sequence)],
        "said": str(place),
        "real": sum(shard.local(p).numel() for p in model.parameters()),
        "cut": {n for n, p in model.named_parameters() if "tensor" in p.device_mesh.mesh_dim_names},
    }


def test_neighbours_share_heads_and_every_number_is_on_one_rank():
    ranks, model = testing.run(4, places), prepared(configured(SAVED["heads"]))[1]
    for r, said in enumerate(ranks):
        assert said["place"] == (0, r // 2, r % 2)
        assert said["heads"] == [r - r % 2, r - r % 2 + 1] and said["sequence"] == [r % 2, r % 2 + 2]
        assert said["said"] == "4 ranks = 1 data x 2 sequence x 2 tensor, parameters sharded over all"
        first, second = "blocks.0.sublayers.0.inner", "blocks.1.sublayers.0.inner"
        want = {f"{first}.{n}.weight" for n in ("q", "k", "v", "beta", "a", "gate", "o")}
        want |= {f"{second}.{n}.weight" for n in "qkvo"} | {f"blocks.{i}.sublayers.1.inner.w2" for i in (0, 1)}
        assert said["cut"] == want
    assert sum(said["real"] for said in ranks) == sum(p.numel() for p in model.parameters())


REFUSED = {
    "channels": ({"lsm": "mamba", "heads": 1, "value_size": 3}, "^3 channels of Mamba cannot be shared over 2 ranks"),
    "heads of memories": ({"lsm": "mom_gla", "heads": 1}, "^1 heads of .* cannot be shared over 2 ranks; let .* of 1$"),
    "heads": ({"heads": 1}, "^1 heads of .* cannot be shared over 2 ranks; let --mesh.tensor be one of 1$"),
    "value heads": ({"lsm": "kda", "heads": 1, "value_heads": 2}, "^1 heads of "),
    "groups": ({"lsm": "mamba2", "heads": 6, "width": 12, "state_groups": 3}, "^3 state_groups of .* let .* of 1, 3$"),
    "attention": ({"pattern": "N", "attention_heads": 1}, "^1 attention heads cannot be shared over 2 ranks"),
    "key heads": ({"pattern": "N", "heads": 6, "width": 12, "key_heads": 3}, "^3 key heads cannot be shared"),
    "experts": ({"expert_width": 5}, "^5 hidden channels of an expert cannot be shared over 2 ranks; let .* of 1, 5$"),
    "dense": ({"pattern": "D", "dense_width": 3}, "^3 hidden channels cannot be shared over 2 ranks"),
    "dropped": ({"dropout": 0.1}, "^dropout .0.1. is drawn .* use --model.dropout 0 or --mesh.between repeated$"),
    "dropout": ({"expert_dropout": 0.1}, "^dropout inside experts .* use --model.expert-dropout 0 or --mesh.tensor 1$"),
}
WRONG = {
    mesh.Degrees(tensor=3): (
        "groups of 3 ranks that share heads do not fit into 2 ranks; let --mesh.tensor be one of 1, 2"
    ),
    mesh.Degrees(tensor=2, expert=4): (
        "groups of 4 ranks that share experts do not fit into 2 ranks; let --mesh.expert be one of 1, 2"
    ),
    mesh.Degrees(tensor=2, replicas=2): (
        "groups of 2 ranks that share heads do not fit into each of 2 replicas, 1 rank; let --mesh.replicas be 1"
    ),
    mesh.Degrees(tensor=2, sequence=2): (
        "a mesh of 1 data x 2 sequence x 2 tensor needs 4 ranks, found 2: start as many (torchrun --nproc-per-node 4), "
        "or let sequence be 1"
    ),
    mesh.Degrees(tensor=2, pipeline=2): (
        "groups of 2 ranks that share heads do not fit into 1 rank, those of each of 2 pipeline ranks; let "
        "--mesh.tensor be 1"
    ),
    mesh.Degrees(tensor=0): (
        "mesh degrees must be at least 1 (data: or -1), got data -1, sequence 1, expert 1, replicas 1, tensor 0"
    ),
}


ULYSSES = (
    "ulysses gives each of 4 ranks an equal share of the attention heads, and there are 2; use a multiple of 4, or "
    "--mesh.attention gather or ring"
)


def cut(how):
    with torch.device("meta"):
        model = LanguageModel(Model(**SMALL | {"lsm": "retention", "pattern": "L"} | how), ops)
    shard.shard(model, made_once(SPARING), model.blocks)


def refusals():
    return refused(
        [
            *(partial(cut, how) for how, _ in REFUSED.values()),
            *(partial(mesh.make, degrees, HERE) for degrees in WRONG),
        ]
    )


def test_what_cannot_be_cut_is_refused_in_one_line():
    for said in testing.run(2, refusals):
        for line, (_, words) in zip(said, REFUSED.values(), strict=False):
            assert re.search(words, line) and "\n" not in line, line
        assert said[len(REFUSED) :] == list(WRONG.values())


def test_a_layer_without_a_plan_is_refused_in_one_line(monkeypatch):
    with torch.device("meta"):
        model = LanguageModel(Model(**SMALL | {"lsm": "retention", "pattern": "L"}), ops)
    monkeypatch.delitem(tensor.PLAN, mixers.kind("retention"))
    (said,) = refused([lambda: tensor.share(model, tracing.imagined(2, []))])
    assert said == (
        "Retention is not cut by heads (--mesh.tensor 2): parallel.tensor.PLAN does not say how; use --mesh.tensor 1"
    )


def test_ulysses_shares_the_heads_of_a_rank():
    config, place = configured({"pattern": "N"} | SMALL), mesh.Mesh(attention="ulysses", sequence_size=2, tensor_size=2)
    assert refused([lambda: trainer.refuse_to_cut(config, place)]) == [ULYSSES]
