"""Blocks shared out over ranks train as one process does: losses, every gradient, parameters; and what is refused.

Each world of two or four processes starts once and runs all of its cases; the tests look up their verdicts.
"""

import functools

import pytest
import torch
from torch.distributed.tensor import DTensor

import train as trainer
from data.corpus import Document
from data.stream import Batch, Stream
from parallel import mesh, pipeline, testing
from reference.ops import ops
from reference.presets import Model

CPU = torch.device("cpu")
SIZES = {"width": 8, "heads": 2, "lsm": "retention", "experts": 4, "expert_width": 6, "top_k": 2, "dense_width": 8}
BATCH, LENGTH, STEPS = 8, 5, 3
DOCUMENTS = [Document("a", bytes(range(40)) * 3), Document("b", bytes(range(90, 120)) * 4)]
STREAM = Stream(DOCUMENTS, LENGTH, 0)
MODELS = {
    "L": {"pattern": "LD", "repeat": 4},
    "hybrid": {"pattern": "LN", "repeat": 2, "bare": True, "lsm": "gated_delta_net", "dropout": 0.1},
    "experts": {"pattern": "LE", "repeat": 4, "balance": {"switch": 0.1, "z": 0.01}, "lsm": "gla"},
    "bias": {"pattern": "LENEDLELD", "router": "deepseek_v3", "balance": {"switch": 0.1}, "shared_width": 4},
    "penalty": {"pattern": "LENE", "repeat": 2, "router": "remoe", "balance": {"penalty": 1e6}, "dropout": 0.1},
    "inside": {"pattern": "L+EN+E", "repeat": 2, "attention": "mixture", "mixer_experts": 3},
}
ALONE = mesh.Degrees()


def config_of(degrees=ALONE, **more) -> trainer.Train:
    outside = {name: more.pop(name) for name in ("balance", "micro", "recompute", "precision") if name in more}
    outside = {"micro": 2 // max(degrees.data, 1), "precision": "float64"} | outside
    return trainer.Train(
        model=Model(**SIZES | more),
        optimizer=trainer.Optimizer(rate=0.05, warmup=1, clip=0.5),
        mesh=degrees,
        length=LENGTH,
        batch=BATCH,
        steps=STEPS,
        bias_rate=0.05,
        **outside,
    )


@functools.cache
def made_once(degrees: mesh.Degrees) -> mesh.Mesh:
    """Of this process: a mesh takes as long as a step."""
    return mesh.make(degrees, CPU)


def prepared(config: trainer.Train):
    """As the trainer does it: (place, model, ops, optimizer)."""
    place = made_once(config.mesh)
    over = mesh.over(ops, place)
    model, matrices = trainer.model_of(config, over, place, CPU)
    return place, model, over, trainer.optimizer_of(config, model, matrices)


def whole(x):
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()


def named(model) -> dict:
    return {name: whole(x) for name, x in (*model.named_parameters(), *model.named_buffers())}


def batches_of(config, place, step, data=1) -> list[Batch]:
    """The trainer's; in one process those of `data` ranks, micro-batch by micro-batch, as routers compare in these."""
    if data == 1:
        return trainer.micro_batches(config, STREAM, trainer.feed_of(config, place), place, step, CPU)
    share, rows = BATCH // data, config.micro // data
    first = [step * BATCH + i for i in range(0, share, rows)]
    return [STREAM.batch([f + r * share + j for r in range(data) for j in range(rows)]) for f in first]


def run(config, data=1):
    """(What each step said; the first one's gradients after clipping; the start; the end; bits of validation)."""
    place, model, over, optimizer = prepared(config)
    start, said, grads = named(model), [], {}

    def keep(*_):
        if not grads:
            grads.update({name: whole(p.grad) for name, p in model.named_parameters()})

    optimizer.register_step_pre_hook(keep)
    for step in range(STEPS):
        result = trainer.one_step(config, model, over, optimizer, batches_of(config, place, step, data), step, False)
        load = [] if result.load is None else [x.double().flatten() for x in result.load]
        said.append(torch.cat([torch.tensor([result.loss, result.norm], dtype=torch.float64), *load]).detach())
        assert result.finite and not result.stop
    bits = trainer.validate(config, model, over, place, DOCUMENTS[1:], CPU)
    return torch.cat(said), grads, start, named(model), bits


def runs(configs):
    return {name: run(config) for name, config in configs.items()}


def same(ranks: list, want) -> None:
    """Every rank said what one process says, and holds its part of it; together they hold all."""
    for got in ranks:
        torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12)
        assert got[4] == pytest.approx(want[4], abs=1e-12)
        for part, exact in zip(got[1:4], want[1:4], strict=True):
            torch.testing.assert_close(part, {name: exact[name] for name in part}, rtol=1e-11, atol=1e-12)
        assert all(torch.equal(x, want[2][name]) for name, x in got[2].items())
    for i in (1, 3):
        assert set().union(*(got[i] for got in ranks)) == set(want[i])


def degrees(schedule, **more):
    return mesh.Degrees(**{"pipeline": 2, "data": 1, "schedule": schedule} | more)


@pytest.fixture(scope="module")
def alone() -> dict:
    return runs({name: config_of(**how) for name, how in MODELS.items()})


@pytest.fixture(scope="module")
def two() -> list:
    cases = {(n, s): config_of(degrees(s), **MODELS[n]) for n in MODELS for s in pipeline.SCHEDULE}
    return testing.run(2, runs, cases)


@pytest.mark.parametrize("schedule", pipeline.SCHEDULE)
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_train_as_one(name, schedule, alone, two):
    same([rank[name, schedule] for rank in two], alone[name])


FOUR = {  # (model, degrees, precision): every schedule over data and a pipeline; four stages and eight
    **{("experts", degrees(s, data=2)): "experts" for s in pipeline.SCHEDULE},
    **{(n, degrees("1f1b", data=2)): n for n in ("L", "bias", "penalty", "inside")},
    **{("L", degrees("1f1b", pipeline=4)): "L", ("bias", degrees("gpipe", pipeline=4)): "bias"},
}


@pytest.fixture(scope="module")
def four() -> list:
    return testing.run(4, runs, {case: config_of(case[1], **MODELS[name]) for case, name in FOUR.items()})


@pytest.mark.parametrize("case", FOUR, ids=lambda case: f"{case[0]}, {case[1].data} data, {case[1].schedule}")
def test_four_ranks_train_as_one(case, alone, four):
    want = alone[FOUR[case]] if case[1].data == 1 else run(config_of(**MODELS[FOUR[case]]), data=2)
    same([rank[case] for rank in four], want)
