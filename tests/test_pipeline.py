"""Blocks shared out over ranks train as one process does: losses, every gradient, parameters; and what is refused.

Each world of two or four processes starts once and runs all of its cases; the tests look up their verdicts.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.pipelining import _backward

import train as trainer
from data.corpus import Document
from data.stream import Batch, Stream
from inputs import HERE
from parallel import budget, checkpoint, comm, mesh, pipeline, testing
from ranks import made_once, prepared, whole
from reference.lsm import LSM
from reference.model import LanguageModel
from reference.ops import ops
from reference.presets import Model
from test_experts import MOVED_BY, STEPS

SIZES = {"width": 8, "heads": 2, "lsm": "retention", "experts": 4, "expert_width": 6, "top_k": 2, "dense_width": 8}
BATCH, LENGTH = 8, 5
DOCUMENTS = [Document("a", bytes(range(40)) * 3), Document("b", bytes(range(90, 120)) * 4)]
STREAM = Stream(DOCUMENTS, LENGTH, 0)
OF_SEVERAL = {"lsm": "hgrn2", "tied": True}  # bounds that all layers share; a matrix of the first stage and the last
MODELS = {
    "tied": {"pattern": "LD", "repeat": 4, "tied": True},
    "hybrid": {
        "pattern": "LN",
        "repeat": 2,
        "bare": True,
        "lsm": "rwkv7",  # the first layer's values go to all others
        "dropout": 0.1,
        "optimizer": "adamw",
    },
    "experts": {"pattern": "LE", "repeat": 4, "balance": {"switch": 0.1, "z": 0.01}, **OF_SEVERAL},
    "bias": {
        "pattern": "LENEDLELD",
        "router": "deepseek_v3",
        "balance": {"switch": 0.1},
        "shared_width": 4,
        **OF_SEVERAL,
    },
    "penalty": {"pattern": "LENE", "repeat": 2, "router": "remoe", "balance": {"penalty": 1e6}, "dropout": 0.1},
    "recomputed": {"pattern": "LE", "repeat": 4, "recompute": True, "dropout": 0.1, "lsm": "rwkv7"},
    "constants": {"pattern": "LD", "repeat": 4, "lsm": "mamba", "key_size": 3},
    "chain": {"pattern": "LD", "repeat": 4, "lsm": "ttt_linear", "mini_batch": 3},
    "inside": {
        "pattern": "L+EN+E",
        "repeat": 2,
        "attention": "mixture",
        "mixer_experts": 3,
        "lsm": "gated_delta_net",
    },
    "slots": {"pattern": "LE", "repeat": 4, "router": "soft"},
    "masked": {"pattern": "LN", "repeat": 2, "bare": True, "lsm": "gla", "objective": "masked", "mask_rate": 0.3},
}
ALONE = mesh.Degrees()
# Where tokens choose how many experts they visit, what a document adds to this sum depends on its neighbours.
UNSAID = "remoe", "sequence"


def config_of(degrees=ALONE, **more) -> trainer.Train:
    names = ("balance", "micro", "recompute", "precision", "objective", "mask_rate")
    outside = {name: more.pop(name) for name in names if name in more}
    optimizer = more.pop("optimizer", MOVED_BY)
    outside = {"micro": 2 // max(degrees.data, 1), "precision": "float64"} | outside
    return trainer.Train(
        model=Model(**SIZES | more),
        # Adam divides by the gradient's size, which makes a rounding of a small gradient a large one.
        optimizer=trainer.Optimizer(name=optimizer, rate=0.05, warmup=1, clip=0.5, eps=1e-2),
        mesh=degrees,
        length=LENGTH,
        batch=BATCH,
        steps=STEPS,
        bias_rate=0.05,
        **outside,
    )


def named(model) -> dict:
    return {name: whole(x) for name, x in (*model.named_parameters(), *model.named_buffers())}


def batches_of(config, place, step, data=1) -> list[Batch]:
    """The trainer's; in one process those of `data` ranks, micro-batch by micro-batch, as routers compare in these."""
    if data == 1:
        return trainer.micro_batches(config, STREAM, trainer.feed_of(config, place), place, step, HERE)
    share, rows = BATCH // data, config.micro // data
    first = [step * BATCH + i for i in range(0, share, rows)]
    return [STREAM.batch([f + r * share + j for r in range(data) for j in range(rows)]) for f in first]


def run(config, data=1):
    """(What each step said; the first one's gradients after clipping; the start; the end; bits of validation; bytes of
    gradients that a step received of parameters that several stages have)."""
    place, model, over, optimizer = prepared(config)
    start, said, grads = named(model), [], {}

    def keep(*_):
        if not grads:
            grads.update({name: whole(p.grad) for name, p in model.named_parameters()})

    optimizer.register_step_pre_hook(keep)
    for step in range(STEPS):
        batches = batches_of(config, place, step, data)
        with comm.counted() as counter:
            result = trainer.one_step(config, model, over, optimizer, batches, step, False)
        fields = {} if result.load is None else result.load._asdict()
        load = [x.double().flatten() for name, x in fields.items() if (config.model.router, name) != UNSAID]
        load = [x.detach().cpu() for x in load]
        said.append(torch.cat([torch.tensor([result.loss, result.norm], dtype=torch.float64), *load]))
        assert result.finite and not result.stop
    bits = trainer.validate(config, model, over, place, DOCUMENTS[1:], HERE)
    return torch.cat(said), grads, start, named(model), bits, counter.received["total of some"]


def runs(configs):
    return {name: run(config) for name, config in configs.items()}


def same(ranks: list, want, **how) -> None:
    """Every rank said what one process says, and holds its part of it; together they hold all."""
    close = {"rtol": 1e-11, "atol": 1e-12} | how
    for got in ranks:
        torch.testing.assert_close(got[0], want[0], **close)
        assert got[4] == pytest.approx(want[4], abs=close["atol"])
        for part, exact in zip(got[1:4], want[1:4], strict=True):
            torch.testing.assert_close(part, {name: exact[name] for name in part}, **close)
        assert all(torch.equal(x, want[2][name]) for name, x in got[2].items())
    for i in (1, 3):
        assert set().union(*(got[i] for got in ranks)) == set(want[i])
        for name in want[i]:  # no copy drifts away from the others
            first, *others = [got[i][name] for got in ranks if name in got[i]]
            assert all(torch.equal(first, x) for x in others), name


def degrees(schedule, **more):
    return mesh.Degrees(**{"pipeline": 2, "data": 1, "schedule": schedule} | more)


# Every schedule with a hybrid and with experts, the others' in turn.
TWO = [(n, s) for n in ("hybrid", "bias") for s in pipeline.SCHEDULE]
TWO += [("tied", "1f1b"), ("experts", "gpipe"), ("penalty", "interleaved"), ("penalty", "zero-bubble")]
TWO += [("inside", "1f1b"), ("inside", "zero-bubble-v"), ("recomputed", "1f1b"), ("recomputed", "interleaved")]
TWO += [("masked", "interleaved")]
TWO += [("slots", "zero-bubble"), ("chain", "zero-bubble")]
AT_ONCE = [("bias", "zero-bubble"), ("hybrid", "zero-bubble-v")]  # as with a torch that cannot make them by parts


@pytest.fixture(scope="module")
def alone() -> dict:
    return runs({name: config_of(**how) for name, how in MODELS.items()})


@functools.cache
def alone_in_parts(name) -> tuple:
    """In one process, the micro-batches of two data ranks."""
    return run(config_of(**MODELS[name]), data=2)


@pytest.fixture(scope="module")
def two() -> list:
    return testing.run(2, runs_at_once_too, {(n, s): config_of(degrees(s), **MODELS[n]) for n, s in TWO})


def runs_at_once_too(configs):
    found = runs(configs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "BY_PARTS", False)
        return found | {(*case, "at once"): run(configs[case]) for case in AT_ONCE}


@pytest.mark.parametrize("case", [*TWO, *((*case, "at once") for case in AT_ONCE)], ids="-".join)
def test_two_ranks_train_as_one(case, alone, two):
    same([rank[case] for rank in two], alone[case[0]])


@pytest.mark.parametrize(("name", "schedule"), TWO)
def test_two_ranks_exchange_gradients_of_what_both_have(name, schedule, two):
    """Once a step; of a tied embedding nothing where the last stage is on the first rank."""
    here, there = (rank[name, schedule] for rank in two)
    model = config_of(**MODELS[name]).model
    apart = model.tied and not pipeline.SCHEDULE[schedule].turns
    both = ["embedding"] * apart + ["common.lower_bounds"] * (model.lsm == "hgrn2")
    assert set(here[3]) & set(there[3]) == set(both)
    assert here[5] == there[5] == sum(here[3][n].nbytes for n in both)


@pytest.mark.parametrize("name", ["bias", "hybrid"])
def test_so_it_is_planned(name, two):
    """What stages hand on, too: x, and in the hybrid the first layer's values."""
    model, place = config_of(**MODELS[name]).model, mesh.Mesh(pipeline_size=2, schedule="1f1b")
    with torch.device("meta"):
        part = pipeline.Part(LanguageModel(model, ops), place)
    asked = budget.Asked(model, 2, budget.Degrees(data=1, pipeline=2), budget.Run(), budget.Assumptions())
    known = SimpleNamespace(kept=[SimpleNamespace(stream=4)])  # bytes of a number
    on, *sums = budget.staging(asked, known, budget.Shape(2 * LENGTH, 3, 2))
    between = part.between(torch.zeros(1, 2 * LENGTH), torch.float32, part.stages[0].leaves)
    assert on.bytes == on.calls * between.nbytes == 2 * 3 * between.nbytes
    assert 2 * sum(t.bytes * t.calls for t in sums) == two[0][name, "1f1b"][5]  # in float64


def test_values_go_from_the_first_layer_that_has_them_to_the_last_that_needs_them():
    model = LanguageModel(Model(**SIZES | {"pattern": "NLLDNLN", "lsm": "rwkv7", "value_size": 3}), ops)
    assert pipeline.handed_on(model, pipeline.cut(6, 6), 2) == [0, 0, 3, 3, 3, 0]
    assert pipeline.handed_on(model, pipeline.cut(6, 2), 1) == [0, 6]


def test_older_torch_makes_all_gradients_at_once(monkeypatch):
    """Of `torch.split` and every other operation of several outputs it adds up what they receive."""
    stage = pipeline.Part(LanguageModel(Model(**SIZES | {"lsm": "gla"}), ops), mesh.Mesh(pipeline_size=1)).stages[0]
    monkeypatch.setattr(pipeline, "BY_PARTS", True)
    assert pipeline.at_once(stage) is None
    monkeypatch.setattr(pipeline, "BY_PARTS", False)
    assert pipeline.at_once(stage)()() is None


@pytest.mark.parametrize("name", LSM)
def test_zero_bubble_schedules_know_of_scattered_parameters(name):
    """They begin a parameter's gradient where it meets what comes of x. If one such place is behind another, torch 2.11
    counts some of it twice, and 2.13 may fail."""
    whole = LanguageModel(Model(**SIZES | {"lsm": name, "pattern": "L", "repeat": 2}), ops)
    part = pipeline.Part(whole, mesh.Mesh(pipeline_size=2, pipeline_rank=1))
    (stage,), batch = part.stages, batches_of(config_of(), mesh.Mesh(), 0)[0]
    for p in stage.parameters():
        torch.nn.init.normal_(p)
    x = part.between(batch.tokens, torch.float32, stage.enters).detach().normal_().requires_grad_()
    losses = stage(x, batch=batch)
    first, *others = map(_backward._get_grad_fn_or_grad_acc, (x, *stage.parameters()))
    groups = _backward.get_param_groups([first], others, _backward.construct_reverse_graph([losses.grad_fn]))
    behind = [set(group["intermediates"]) & below(node) for group in groups for node in group["intermediates"]]
    assert any(behind) == (pipeline.at_once(stage) is not None)


def below(node) -> set:
    """What of a graph of autograd comes after this node in a backward pass."""
    found, todo = set(), [node]
    while todo:
        new = {n for n, _ in todo.pop().next_functions if n is not None} - found
        found |= new
        todo += new
    return found


DATA = {"gpipe": {}, "1f1b": {}, "interleaved": {"replicas": 2}, "zero-bubble": {"replicas": 2}, "zero-bubble-v": {}}
# (model, degrees): every schedule over data and a pipeline; four stages and eight; then a pipeline of ranks that share
# sequences, experts, heads, or two of these
FOUR = [("experts", degrees(s, data=2, **more)) for s, more in DATA.items()]
FOUR += [(n, degrees("1f1b", data=2)) for n in ("tied", "bias", "penalty", "inside")]
FOUR += [("tied", degrees("1f1b", pipeline=4)), ("bias", degrees("gpipe", pipeline=4))]
FOUR += [
    ("hybrid", degrees("zero-bubble", sequence=2, attention="ring")),
    ("hybrid", degrees("zero-bubble-v", sequence=2, attention="ulysses")),
    ("constants", degrees("zero-bubble", sequence=2)),
    ("chain", degrees("interleaved", sequence=2, states="ring")),
    ("masked", degrees("zero-bubble", sequence=2, attention="ulysses")),
    ("bias", degrees("gpipe", data=2, expert=2)),
    ("recomputed", degrees("1f1b", sequence=2, expert=2)),
    ("hybrid", degrees("zero-bubble", tensor=2)),
    ("tied", degrees("1f1b", tensor=2, between="cut")),
    ("bias", degrees("interleaved", tensor=2, expert=2, dispatch="rank")),
]


@pytest.fixture(scope="module")
def four() -> list:
    return testing.run(4, runs, {case: config_of(case[1], **MODELS[case[0]]) for case in FOUR})


def titled(case) -> str:
    name, where = case
    return " ".join([name, *(f"{n} {x}" for n, x in vars(where).items() if x != getattr(ALONE, n))])


@pytest.mark.parametrize("case", FOUR, ids=titled)
def test_four_ranks_train_as_one(case, alone, four):
    want = alone[case[0]] if case[1].data == 1 else alone_in_parts(case[0])
    same([rank[case] for rank in four], want)


# --------------------------------------------------------------------------------------------------- checkpoints

SAVED = MODELS["bias"] | {"optimizer": "adamw"}


def save(folder, where, first, last):
    """Steps from the newest checkpoint, if any, and a checkpoint; what is then there."""
    config = config_of(where, **SAVED)
    place, model, over, optimizer = prepared(config)
    state = {"model": model, "optimizer": optimizer, "step": 0}
    checkpoint.load(folder, state)
    assert state["step"] == first
    at_load = named(model)
    for step in range(first, last):
        trainer.one_step(config, model, over, optimizer, batches_of(config, place, step), step, False)
    checkpoint.save(folder, last, {**state, "step": last}, 1)
    return at_load, named(model)


def test_checkpoints_go_from_any_number_of_stages_to_any_other(tmp_path):
    config = config_of(**SAVED)
    place, model, over, optimizer = prepared(config)
    said = []
    for step in range(3):
        trainer.one_step(config, model, over, optimizer, batches_of(config, place, step), step, False)
        said.append(named(model))
    for name, places in {
        "a": [(2, degrees("interleaved")), (1, ALONE), (4, degrees("gpipe", pipeline=4))],
        "b": [(1, ALONE), (2, degrees("zero-bubble-v")), (2, degrees("1f1b"))],
    }.items():
        for step, (ranks, where) in enumerate(places):
            ask = (tmp_path / name, where, step, step + 1)
            for at_load, after in testing.run(ranks, save, *ask) if ranks > 1 else [save(*ask)]:
                for got, want in ((at_load, said[step - 1]), (after, said[step])) if step else ((after, said[0]),):
                    wanted = {n: want[n] for n in got}
                    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def other(folder):
    """A checkpoint of a larger model is refused on every rank, though none holds all of either."""
    config = config_of(degrees("1f1b"), pattern="LD", repeat=2)
    state = dict(zip(("model", "optimizer"), prepared(config)[1::2], strict=True))
    with pytest.raises(ValueError) as caught:
        checkpoint.load(folder, state)
    return str(caught.value)


def test_a_checkpoint_of_more_blocks_is_refused(tmp_path):
    _, model, _, optimizer = prepared(config_of(pattern="LD", repeat=3))
    optimizer.step()
    checkpoint.save(tmp_path, 1, {"model": model, "optimizer": optimizer}, 1)
    for line in testing.run(2, other, tmp_path):
        assert "is of another model: it has model.blocks.2" in line


# ------------------------------------------------------------------------------------- the stages, and what is refused


@pytest.mark.parametrize(("blocks", "stages"), [(b, s) for b in range(1, 9) for s in range(1, b + 1)])
def test_stages_are_neighbouring_blocks_of_even_number(blocks, stages):
    parts = pipeline.cut(blocks, stages)
    assert [i for part in parts for i in part] == list(range(blocks))
    sizes = [len(part) for part in parts]
    assert len(parts) == stages and sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("schedule", pipeline.SCHEDULE)
def test_every_rank_has_as_many_stages(schedule):
    how = pipeline.SCHEDULE[schedule]
    for ranks in (1, 2, 3, 4):
        places = [pipeline.place(i, ranks, how) for i in range(ranks * how.stages)]
        assert sorted(places) == sorted(list(range(ranks)) * how.stages) and places[0] == 0
        assert places[-1] == (0 if how.turns else ranks - 1)


def test_the_bubble_shrinks_with_stages_and_micro_batches():
    four = mesh.Mesh(pipeline_size=4)
    assert pipeline.bubble(four, 8) == 3 / 11  # of 2104.04473, 2.2: (p - 1) / m over the ideal time
    assert pipeline.bubble(four._replace(schedule="interleaved"), 8) == 3 / 19


REFUSED = {
    "few blocks": (
        {"pattern": "LD", "repeat": 3},
        {"schedule": "interleaved"},
        "are 4 stages, and the model has 3 blo",
    ),
    "few micro-batches": ({"micro": 8}, {}, "2 pipeline ranks need as many micro-batches a step, found 1"),
    "sequence": ({}, {"sequence": 2}, "a mesh of 2 pipeline x 1 data x 2 sequence needs 4 ranks, found 2"),
    "experts": (
        {},
        {"expert": 2},
        "2 ranks that share experts do not fit into 1 rank, those of each of 2 pipeline",
    ),
    "replicas": ({}, {"replicas": 2}, "2 replicas cannot be made of 1 rank, those of each of 2 pipeline ranks"),
    "heads": (
        {},
        {"tensor": 2},
        "2 ranks that share heads do not fit into 1 rank, those of each of 2 pipeline",
    ),
    "data": ({}, {"data": 2}, "a mesh of 2 pipeline x 2 data x 1 sequence needs 4 ranks, found 2"),
    "ranks": ({}, {"pipeline": 3}, "3 pipeline ranks do not fit into 2 ranks; let --mesh.pipeline be one of 1, 2"),
    "none": ({}, {"pipeline": 0}, "--mesh.pipeline is 0; it must be at least 1"),
}


def refusals():
    said = {}
    for name, (model, where, _) in REFUSED.items():
        with pytest.raises(ValueError) as caught:
            prepared(config_of(degrees(**{"schedule": "1f1b"} | where), **{"pattern": "LD", "repeat": 4} | model))
        said[name] = str(caught.value)
    return said


def test_what_cannot_be_cut_is_refused_in_one_line():
    for said in testing.run(2, refusals):
        for name, line in said.items():
            assert REFUSED[name][2] in line and "\n" not in line, (name, line)


def test_rounds_must_divide_the_micro_batches():
    two = mesh.Mesh(pipeline_size=2, schedule="zero-bubble")
    model = LanguageModel(Model(**SIZES, pattern="LD", repeat=4), ops)
    with pytest.raises(ValueError, match="goes 2 rounds over 2 ranks, by which 5 micro-batches cannot be divided"):
        pipeline.refuse(model, two, 5)
    pipeline.refuse(model, two, 6)


def test_chains_of_memories_need_whole_backward_passes():
    place = mesh.Mesh(pipeline_size=2, sequence_size=2, states="ring", schedule="zero-bubble")
    model = LanguageModel(Model(**SIZES, pattern="LD", repeat=4), ops)
    with pytest.raises(ValueError, match=r"'zero-bubble' asks for gradients of weights by themselves.*states gather"):
        pipeline.refuse(model, place, 6)
    pipeline.refuse(model, place._replace(schedule="interleaved"), 6)


def lines():
    _, model, _, _ = prepared(config_of(degrees("zero-bubble-v"), **MODELS["constants"]))
    place = made_once(degrees("zero-bubble-v"))
    return str(place), pipeline.told(model, place), sum(p.numel() for p in model.parameters())


def test_the_mesh_says_what_each_rank_holds():
    said = testing.run(2, lines)
    count = sum(p.numel() for p in prepared(config_of(**MODELS["constants"]))[1].parameters())
    assert sum(own for _, _, own in said) == count
    for text, held, _ in said:
        assert text == "2 ranks = 2 pipeline x 1 data x 1 sequence, parameters of a stage whole, schedule zero-bubble-v"
        assert held == [
            f"rank 0 holds blocks 0 and 3, embedding, head: {said[0][2]:,} parameters",
            f"rank 1 holds blocks 1 and 2: {said[1][2]:,} parameters",
        ]
