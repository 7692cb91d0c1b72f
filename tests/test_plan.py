"""The calculator's numbers are those of the model, of autograd, and of the collectives that really ran."""

import functools
import json
import math
import re
import shlex
import weakref
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from data.stream import Batch
from parallel import budget, comm, lasp, shard, tensor, testing, tracing
from parallel import mesh as trainers
from parallel import plan as program
from parallel.budget import Asked, Assumptions, Counted, Degrees, Run, Traffic
from reference import moe
from reference.model import LanguageModel, initialize, sizes
from reference.objective import OBJECTIVE
from reference.ops import ops
from reference.presets import PRESETS, Model

README = Path(__file__).resolve().parent.parent / "README.md"
TINY, A03B, A1B = (PRESETS[name][1] for name in ("tiny", "a0.3b-2b", "a1b-7b"))
PLAIN = {"a0.3b": replace(A03B, gate=False), "a1b": replace(A1B, gate=False)}  # as the papers count: no output gate
BF16, RUN = Assumptions(gathered="bf16"), Run()
LENGTHS = (tracing.LENGTH, 2 * tracing.LENGTH)
SMALL = Model(width=64, heads=2, pattern="LN", expert_width=32, experts=4, capacity_factor=math.inf)


@functools.cache
def known(model: Model, precision: str, kernels: str, tensor: int, between: str, expert=1, objective="next") -> Counted:
    run, given = replace(RUN, precision=precision, objective=objective), replace(BF16, kernels=kernels)
    return budget.counted(model, run, given, Degrees(tensor=tensor, between=between, expert=expert))


def counted(model: Model) -> Counted:
    return known(model, "bf16", "fused", 1, "repeated")


def planned(model: Model, gpus: int = 1, run: Run = RUN, given: Assumptions = BF16, **mesh) -> program.Plan:
    degrees = Degrees(**mesh)
    experts = 2 if degrees.expert > 1 and degrees.tensor > 1 else 1  # else the trace is the same
    own = known(model, run.precision, given.kernels, degrees.tensor, degrees.between, experts, run.objective)
    return program.plan("it", Asked(model, gpus, degrees, run, given), own)


def root(p: program.Plan) -> float:
    """Parameters outside the blocks."""
    return budget.places(p.asked).root.here


def bytes_of(p: program.Plan, what: str) -> float:
    return sum(t.bytes for t in p.traffic if t.what == what)


# -------------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("name", PRESETS)
def test_parts_add_up_to_the_model(name):
    model = PRESETS[name][1]
    with torch.device("meta"):
        built = LanguageModel(model, ops)
    parts = budget.parts_of(built)
    assert sum(p.total for p in parts.values()) == sum(p.numel() for p in built.parameters())
    known = sizes(model)
    assert sum(p.total for p in parts.values()) == known["total"]
    assert sum(p.active for p in parts.values()) == known["active"]
    own = [p.numel() for n, p in built.named_parameters() if n in ("embedding", "head")]
    assert parts["embedding"].total + parts.get("head", budget.Part()).total == sum(own)


def test_sizes_and_operations_of_the_papers_models():
    """Counted by hand: (total and active without embeddings, of the head, experts, projections and core in GFLOP,
    training, training with everything recomputed)."""
    table = {
        "a0.3b": (2.165, 0.315, (0.311, 0.528, 0.101, 0.009), 2.859, 3.810),
        "a1b": (6.713, 1.076, (0.622, 1.611, 0.537, 0.025), 8.410, 11.209),
    }
    for name, (total, active, forward, training, recomputed) in table.items():
        known = counted(PLAIN[name])
        ends = known.parts["embedding"].total + known.parts["head"].total
        assert (known.sum("total") - ends) / 1e9 == pytest.approx(total, abs=5e-4)
        assert (known.sum("active") - ends) / 1e9 == pytest.approx(active, abs=5e-4)
        of = budget.operations(known, RUN, BF16)
        found = [of[n]["forward"] / 1e9 for n in ("head", "experts", "linear mixers", "linear core")]
        assert found == pytest.approx(forward, abs=5e-4)
        assert sum(n["training"] for n in of.values()) / 1e9 == pytest.approx(training, abs=1e-3)
        again = sum(n["training"] + n["recomputed"] for n in of.values()) + of["head"]["forward"]
        assert again / 1e9 == pytest.approx(recomputed, abs=1.5e-3)
    with_gate = counted(A1B)
    assert (with_gate.sum("active") - 2 * A1B.vocabulary * A1B.width) / 1e9 == pytest.approx(1.143, abs=5e-4)


def test_attention_costs_what_its_pairs_do():
    """One layer of d channels over 2k, 8k, 32k tokens: 2 d T operations a token; a window ends that."""
    layer = budget.Crossing("attention", q=1024, k=1024, v=1024, o=1024, heads=(8, 8))
    assert [budget.core(layer, n * 1024) / 1e6 for n in (2, 8, 32)] == pytest.approx([4.2, 16.8, 67.1], abs=0.05)
    near = budget.core(layer._replace(window=1024), 2**20)
    assert near == pytest.approx(2 * 1024 * 2048, rel=1e-3)


def test_both_sides_are_twice_the_core_and_nothing_else():
    """Two runs of a recurrence, and all pairs of tokens; in a gather both spans."""
    one, both = (planned(TINY, 1, Run(objective=name)) for name in OBJECTIVE)
    for name, numbers in both.operations.items():
        times = 1 + name.endswith("core")
        assert numbers == {kind: pytest.approx(times * n) for kind, n in one.operations[name].items()}, name
    assert one.memory["parameters"] == both.memory["parameters"]
    assert one.memory["saved activations"] < both.memory["saved activations"] < 2 * one.memory["saved activations"]


# ------------------------------------------------------------------------------------------------------------ memory


def test_memory_of_the_papers_models():
    for name, size, shares, flight in (
        ("a0.3b", 2.476, (39.6, 19.8, 5.0), 2.2),
        ("a1b", 7.335, (117.4, 58.7, 14.7), 5.0),
    ):
        for gpus, wanted in zip((1, 2, 8), shares, strict=True):
            p = planned(PLAIN[name], gpus, Run(batch=8))
            state = sum(p.memory[n] for n in ("parameters", "gradients", "optimizer state"))
            assert state / 1e9 == pytest.approx(wanted, abs=0.06)
        assert p.counted.sum("total") / 1e9 == pytest.approx(size, abs=1e-3)
        assert p.memory["gathered: two blocks"] / 1e9 == pytest.approx(flight, abs=0.06)
        layers, width = p.counted.blocks, PLAIN[name].width
        # the trainer's stream between blocks is float32: twice the 24.6 and 65.5 KB of a bf16 one
        entering = [width * k.stream for k in p.counted.kept]
        assert sum(entering) == 2 * layers * width * 2


@given(*[st.sampled_from([1, 2, 4, 8])] * 4)
def test_shards_of_a_replica_hold_the_model_once(data, sequence, expert, replicas):
    ranks = data * sequence
    mesh = {"data": data, "sequence": sequence, "expert": expert, "replicas": replicas}
    if ranks % replicas or (ranks // replicas) % expert:
        with pytest.raises(ValueError, match=r"do(es)? not divide"):
            planned(TINY, ranks, Run(batch=64), **mesh)
        return
    p = planned(TINY, ranks, Run(batch=64), **mesh)
    assert p.memory["parameters"] * ranks / replicas == pytest.approx(4 * p.counted.sum("total"))
    assert p.step == pytest.approx(sum(p.times.values()))
    assert sum(t.bytes for t in p.traffic if t.axis == "shards") == 0 or ranks > replicas


@given(*[st.sampled_from([1, 2])] * 2, st.sampled_from([1, 2, 4]), *[st.sampled_from([1, 2])] * 2)
def test_so_do_ranks_that_share_heads(data, sequence, tensor, replicas, expert):
    ranks = data * sequence * tensor
    mesh = {"data": data, "sequence": sequence, "tensor": tensor, "replicas": replicas, "expert": expert}
    if data * sequence % replicas or ranks // replicas % expert:
        with pytest.raises(ValueError, match=r"do(es)? not divide"):
            planned(TINY, ranks, Run(batch=64), **mesh)
        return
    p = planned(TINY, ranks, Run(batch=64), **mesh)
    assert p.memory["parameters"] * ranks / replicas == pytest.approx(4 * p.counted.sum("total"))
    assert bytes_of(p, "sum activations") == 0 or tensor > 1
    once = budget.operations(counted(TINY), Run(batch=64), BF16)
    for name, numbers in p.operations.items():
        assert numbers == pytest.approx(once[name]), name


def test_only_the_pieces_of_a_sample_wait():
    """Softmax over contiguous segments: the last of n does (2n - 1)/n of the mean; whole samples wait for nobody."""
    for rows, late in ((1, 3 / 4), (2, 1 / 2), (4, 0)):
        times = planned(TINY, 4, Run(batch=4, micro=rows, length=256), sequence=4).times
        core = budget.operations(counted(TINY), Run(length=256), BF16)["softmax core"]
        seconds = (core["training"] + core["recomputed"]) * 256 / (BF16.peak * 1e12 * BF16.efficiency)
        assert times.get("waiting for the last segment", 0) == pytest.approx(late * seconds)


def test_gradients_are_whole_between_micro_batches():
    once, twice = (planned(A03B, 8, Run(batch=16, micro=micro)) for micro in (2, 1))
    assert once.memory["gradients"] == once.memory["parameters"]
    assert twice.memory["gradients"] == 4 * twice.counted.sum("total")


class Alive(TorchDispatchMode):
    """The most bytes that were there at once of all that is made, without autograd."""

    def __init__(self):
        super().__init__()
        self.made, self.most = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.made += [weakref.ref(x) for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        there = [x.untyped_storage() for made in self.made if (x := made()) is not None]
        self.most = max(self.most, sum({x.data_ptr(): x.nbytes() for x in there}.values()))
        return out


def test_the_optimizer_makes_nothing_but_its_state():
    """Which is there from the first step on; all else happens in place."""
    p = planned(SMALL, 1, Run(length=1, batch=1), Assumptions())
    built = LanguageModel(SMALL, ops)
    optimizer = train.optimizer_of(train.LARGE, built, set())
    for first in (True, False):
        for weight in built.parameters():
            weight.grad = torch.ones_like(weight)
        with Alive() as alive:
            optimizer.step()
        assert alive.most == pytest.approx(p.memory["optimizer state"] if first else 0, rel=1e-3)


def kept(model: Model, own, t: int, bf16: bool, then=lambda built: None) -> int:
    """Bytes that autograd keeps of t tokens in the blocks of a model on the CPU."""
    built = LanguageModel(model, own)
    initialize(built, 0)
    then(built)
    place = torch.arange(t)[None]
    side = built.side(torch.zeros(1, t, dtype=torch.int64), place, None, place, 0, None)
    x = torch.randn(1, t, model.width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tensors, parameters = [], {shard.local(p).data_ptr() for p in built.parameters()}
    with (
        tracing.autocast(bf16),
        torch.autograd.graph.saved_tensors_hooks(lambda y: tensors.append(y) or y, lambda y: y),
    ):
        for block in built.blocks:
            x, side, _, _ = block(x, side)
    storages = {y.untyped_storage().data_ptr(): y.untyped_storage().nbytes() for y in tensors}
    return sum(size for place, size in storages.items() if place not in parameters)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize(
    "change",
    [
        {"pattern": "ND"},
        {"pattern": "N", "shared_width": 48, "router": "deepseek_v3", "key_heads": 1, "qk_norm": True},
        {"pattern": "N", "attention": "latent", "expert_kind": "relu_squared", "latent": 32},
        {"pattern": "L", "lsm": "mom_gated_delta_net"},
        {"pattern": "L", "lsm": "mamba2"},
        {"pattern": "L", "lsm": "rwkv6"},
    ],
    ids=lambda change: " ".join(map(str, change.values())),
)
def test_autograd_keeps_what_the_trace_says(change, bf16):
    """With real numbers and real routing. A recurrence keeps what a kernel would, in both; everything else, softmax
    attention too, is the reference itself. What does not grow with the tokens is left to the next test."""
    model = replace(SMALL, **change)
    own = tracing.tracing([], False)._replace(experts=moe.experts, linears=moe.linears)
    less, more = (kept(model, own, t, bf16) for t in LENGTHS)
    traced = tracing.trace(model, bf16, fused=False)
    assert sum(k.a_token for k in traced) == pytest.approx((more - less) / LENGTHS[0], rel=0.01)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_so_it_does_where_both_sides_are_seen(bf16):
    model = replace(SMALL, lsm="gla")
    own = tracing.tracing([], False, causal=False)._replace(experts=moe.experts)
    less, more = (kept(model, own, t, bf16) for t in LENGTHS)
    traced = tracing.trace(model, bf16, fused=False, causal=False)
    assert sum(k.a_token for k in traced) == pytest.approx((more - less) / LENGTHS[0], rel=0.01)


SHARED = {
    "mamba2": {"pattern": "LN", "lsm": "mamba2", "router": "deepseek_v3", "shared_width": 32},
    "lightning": {"pattern": "L+DN", "lsm": "lightning", "dense_width": 32, "key_heads": 1},
    "latent attention": {"pattern": "NE", "attention": "latent", "expert_kind": "relu_squared"},
    "maps inside mixers": {
        "pattern": "LN",
        "lsm": "mamba",
        "projection_experts": ("input", "gate", "output"),
        "attention": "mixture",
        "mixer_experts": 3,
    },
    "s4": {"pattern": "LD", "lsm": "s4", "dense_width": 32},
}


def kept_by_one_of_two(model: Model, degrees: trainers.Degrees, bf16: bool) -> list[int]:
    place = trainers.make(degrees, torch.device("cpu"))
    own = tracing.tracing([], False)._replace(experts=moe.experts)
    over = tensor.over(own, place.tensor)
    return [
        kept(model, over, t, bf16, lambda m: tensor.place(m, place.tensors, degrees.between == "cut")) for t in LENGTHS
    ]


@pytest.mark.parametrize("between", ["repeated", "cut"])
@pytest.mark.parametrize("name", SHARED)
def test_so_it_does_where_heads_are_shared(name, between):
    model, degrees = replace(SMALL, **SHARED[name]), trainers.Degrees(tensor=2, between=between)
    traced = tracing.trace(model, True, False, 2, between == "cut")
    for less, more in testing.run(2, kept_by_one_of_two, model, degrees, True):
        assert sum(k.a_token for k in traced) == pytest.approx((more - less) / LENGTHS[0], rel=0.01)


@pytest.mark.parametrize("precision", ["bf16", "float32"])
def test_parts_of_whole_parameters_are_copies(precision):
    """In float32 those that are put together, in bf16 all that are cast."""
    model, bf16 = replace(SMALL, pattern="L", lsm="delta_net"), precision == "bf16"
    p = planned(model, 2, Run(batch=1, recompute=False, precision=precision), Assumptions(), tensor=2)
    copied, parts = 4 * budget.places(p.asked).inside.copied, budget.moments(p.asked, p.counted)["backward"]
    assert parts["cut out of what was gathered"] == copied > 0
    cast = parts["bf16 copies of parameters"] - root(p)
    for less, more in testing.run(2, kept_by_one_of_two, model, trainers.Degrees(tensor=2), bf16):
        assert 2 * less - more == pytest.approx(cast if bf16 else copied, rel=0.05)


def test_autocast_keeps_a_copy_of_every_matrix():
    model = replace(SMALL, pattern="N")
    less, more = (kept(model, ops, t, True) for t in LENGTHS)
    p = planned(model, 1, Run(recompute=False), Assumptions())
    parts = budget.moments(p.asked, p.counted)["backward"]
    inside = sum(part.total for name, part in p.counted.parts.items() if name not in ("embedding", "head", "norms"))
    copies = parts["bf16 copies of parameters"] - 2 * root(p)
    assert 2 * less - more == pytest.approx(copies, rel=0.02)
    assert copies == pytest.approx(2 * inside, rel=0.01)


def test_recomputing_keeps_the_copies_of_one_block():
    p = planned(A03B, 1, Run(), Assumptions())
    largest = max(placed.here for placed in budget.places(p.asked).blocks)
    parts = budget.moments(p.asked, p.counted)
    found = [parts[moment]["bf16 copies of parameters"] for moment in ("loss", "backward")]
    assert found == [2 * root(p), 2 * largest]
    config = replace(train.LARGE, recompute=True)
    with train.precise(config, torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") and not torch.is_autocast_cache_enabled()
    with train.precise(replace(config, recompute=False), torch.device("cpu")):
        assert torch.is_autocast_cache_enabled()


def test_recomputing_keeps_one_block_and_what_enters_the_others():
    all_of_it, little = (planned(A03B, 8, Run(recompute=r)) for r in (False, True))
    blocks = little.counted.kept
    tokens = little.shape.tokens
    assert all_of_it.memory["saved activations"] == pytest.approx(tokens * sum(k.a_token for k in blocks))
    assert little.memory["saved activations"] == tokens * (12 * 4 * 1024 + max(k.a_token for k in blocks))


# ----------------------------------------------------------------------------------------------------- communication


def on_two_ranks(model: Model, attention: str, states: str, objective: str, t: int) -> tuple[int, int]:
    """Bytes and calls of a forward and backward pass of one row of tokens, of this file's collectives alone."""
    group = comm.world()
    built = LanguageModel(model, lasp.over(OBJECTIVE[objective].ops(ops), group, attention, states))
    initialize(built, 0)
    place = torch.arange(t)[None]
    whole = Batch(**{n: place % 7 for n in Batch._fields if n != "cu_seqlens"}, cu_seqlens=torch.tensor([0, t]).int())
    b = lasp.cut(whole, 2, comm.rank(group))
    with comm.counted() as counter:
        built(b.tokens, b.labels, b.positions, b.cu_seqlens, b.indices, 0).losses.sum().backward()
    return sum(counter.received.values()), sum(counter.calls.values())


@pytest.mark.parametrize(
    "change, attention, states, objective",
    [
        ({"pattern": "L", "lsm": "linear_attention"}, "gather", "gather", "next"),
        ({"pattern": "L", "lsm": "mamba2"}, "gather", "gather", "next"),
        ({"pattern": "L", "lsm": "mom_gated_delta_net", "convolution": 3}, "gather", "gather", "next"),
        ({"pattern": "L", "lsm": "kda"}, "gather", "ring", "next"),
        ({"pattern": "LD", "lsm": "rwkv6"}, "gather", "gather", "next"),
        ({"pattern": "L", "lsm": "mamba"}, "gather", "gather", "next"),
        ({"pattern": "N", "key_heads": 1}, "gather", "gather", "next"),
        ({"pattern": "N"}, "ring", "gather", "next"),
        ({"pattern": "N", "key_heads": 1}, "ulysses", "gather", "next"),
        ({"pattern": "LN", "lsm": "mamba2"}, "gather", "gather", "next"),
        ({"pattern": "LN", "lsm": "gla", "key_heads": 1}, "ulysses", "gather", "masked"),
        ({"pattern": "L", "lsm": "rwkv6"}, "gather", "gather", "masked"),
    ],
    ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x.values())),
)
def test_two_ranks_receive_what_is_planned(change, attention, states, objective):
    """To the byte, and as often: spans, halos, chains, keys and values."""
    model = replace(SMALL, **change)
    run = Run(length=64, batch=1, recompute=False, precision="float32", objective=objective)
    p = planned(model, 2, run, sequence=2, attention=attention, states=states)
    mine = [t for t in p.traffic if t.axis == "sequence"]
    found = testing.run(2, on_two_ranks, model, attention, states, objective, 64)
    # of two ranks each receives a chain's memory one way only
    both = sum(t.bytes * (1 if t.what == "chain of memories" else 2) for t in mine)
    assert sum(size for size, _ in found) == both
    if states == "gather":
        assert [size for size, _ in found] == [both / 2] * 2
        assert [calls for _, calls in found] == [sum(t.calls for t in mine)] * 2


def over_ranks(model: Model, degrees: trainers.Degrees, recompute: bool, bf16: bool = False) -> LanguageModel:
    """The model on these ranks, its parameters cut as the trainer does it."""
    mesh = trainers.make(degrees, torch.device("cpu"))
    built = LanguageModel(model, trainers.over(ops, mesh))
    initialize(built, 0)
    if recompute:
        shard.checkpointing(built.blocks)
    shard.shard(built, mesh, built.blocks, torch.bfloat16 if bf16 else None)
    return built


def with_shared_heads(model: Model, degrees: trainers.Degrees, recompute: bool, bf16: bool, t: int) -> tuple[int, int]:
    """Bytes and calls of this file's collectives, forward and backward, of one row of tokens; of exchanges with experts
    the calls alone, as their bytes are the router's."""
    built = over_ranks(model, degrees, recompute)
    place = torch.arange(t)[None]
    with comm.counted() as counter, tracing.autocast(bf16):
        built(place % 7, place % 7, place, None, place, 0).losses.sum().backward()
    return sum(n for name, n in counter.received.items() if name != "exchange"), sum(counter.calls.values())


@pytest.mark.parametrize("between", ["repeated", "cut"])
@pytest.mark.parametrize("recompute, precision", [(False, "float32"), (True, "bf16")])
@pytest.mark.parametrize("name", SHARED)
def test_two_ranks_that_share_heads_receive_what_is_planned(name, recompute, precision, between):
    """To the byte, and as often: layers' outputs, norms over all heads, tokens between layers, the loss over words."""
    model = replace(SMALL, **SHARED[name])
    run = Run(length=64, batch=1, recompute=recompute, precision=precision)
    p = planned(model, 2, run, Assumptions(), tensor=2, between=between)
    mine = [t for t in p.traffic if t.axis == "tensor"]
    want = sum(t.bytes for t in mine), sum(t.calls for t in mine)
    degrees = trainers.Degrees(tensor=2, between=between)
    assert testing.run(2, with_shared_heads, model, degrees, recompute, precision == "bf16", 64) == [want] * 2


@pytest.mark.parametrize("recompute", [False, True])
def test_so_do_two_that_share_experts_out_as_well(recompute):
    """And mixtures of memories."""
    model = replace(SMALL, **SHARED["mamba2"] | {"lsm": "mom_gla"})
    run = Run(length=63, batch=1, recompute=recompute, precision="bf16")
    p = planned(model, 2, run, Assumptions(), tensor=2, expert=2)
    size = sum(t.bytes for t in p.traffic if t.axis == "tensor")
    calls = sum(t.calls for t in p.traffic if t.axis in ("tensor", "expert"))
    degrees = trainers.Degrees(tensor=2, expert=2)
    for found in testing.run(2, with_shared_heads, model, degrees, recompute, True, 63):
        assert found == (pytest.approx(size, rel=0.01), calls)  # one token is filled up


def test_volumes_of_a_layer():
    """Forward, a layer, 64k tokens on 8 ranks in bf16, in MiB; by hand."""
    run = Run(length=2**16, batch=1)
    for model, states, ulysses, tokens in ((A03B, 3.5, 56, 224), (A1B, 7, 112, 448)):
        block = counted(model).kept[0]
        mesh = Degrees(sequence=8)
        (span,) = block.crossings
        assert budget.crossed(span, mesh, 2**13).forward / 2**20 == pytest.approx(states, rel=0.01)
        d = model.width
        layer = budget.Crossing("attention", q=d, k=d, v=d, o=d, heads=(8, 8), item=2)
        assert budget.by_ulysses(layer, 8, 2**13).backward / 2**20 == ulysses
        assert budget.by_gather(layer, 8, 2**13).forward / 2**20 == pytest.approx(tokens, rel=1e-5)
        delta = counted(replace(model, lsm="delta_net", convolution=1)).kept[0].crossings[-1]
        assert budget.crossed(delta, mesh, 2**13).forward / 2**20 == pytest.approx(2 * states, rel=0.01)
        p = planned(replace(model, repeat=1), 8, replace(run, batch=8, recompute=False, length=2**13), expert=8)
        assert bytes_of(p, "exchange tokens") / 2 / 2**20 == pytest.approx(tokens, rel=0.001)


def test_sharding_moves_eight_bytes_a_parameter_and_experts_six_by_windows():
    """bf16 gathered twice and float32 summed, (W - 1) / W of it; what is not in a block is gathered once. By windows
    experts' gradients travel in bf16, unless they are those of several backward passes."""
    for name, wanted in (("a0.3b", 9.9), ("a1b", 29.3)):
        plans = [planned(PLAIN[name], 2, Run(batch=2, micro=1), replace(BF16, windows=way)) for way in (False, True)]
        sizes = [bytes_of(p, "gather parameters") + bytes_of(p, "reduce-scatter gradients") for p in plans]
        assert (sizes[0] + root(plans[0]) * 2 / 2) / 1e9 == pytest.approx(wanted, abs=0.05)
        model = PLAIN[name]
        experts = model.repeat * model.experts * 3 * model.width * model.expert_width
        assert sizes[0] - sizes[1] == experts * 2 / 2
        assert plans[0].memory["windows"] == 0 < plans[1].memory["windows"]
    wide = [planned(PLAIN[name], 2, Run(batch=4, micro=1), replace(BF16, windows=way)) for way in (False, True)]
    assert len({bytes_of(p, "reduce-scatter gradients") for p in wide}) == 1


class Sent(TorchDispatchMode):
    """Calls of torch's collectives, and the bytes that gathers and scatters receive."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "c10d" in str(function):
            name = str(function).split(".")[1].split("_base")[0]
            self.calls[name] += 1
            sizes = [x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
            self.bytes[name] += max(sizes) - min(sizes)
        return function(*args, **(kwargs or {}))


class Moved(NamedTuple):
    """By torch's collectives alone; and what a rank holds."""

    calls: Counter
    bytes: Counter  # received
    held: int


def sharded(model: Model, degrees: trainers.Degrees, recompute: bool, bf16: bool) -> Moved:
    """Two micro-batches under FSDP, gradients summed after the second."""
    built = over_ranks(model, degrees, recompute, bf16)
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    with Sent() as sent, tracing.autocast(bf16):
        for last in (False, True):
            shard.synchronize(built, last)
            built(tokens, tokens).losses.sum().backward()
    if degrees.tensor > 1:  # a gather for each loss, of a number a token; the layers' own are inside ops
        sent.calls["_allgather"] -= 2
        sent.bytes["_allgather"] -= 2 * (degrees.tensor - 1) * tokens.numel() * 4
    return Moved(sent.calls, sent.bytes, sum(shard.local(p).numel() for p in built.parameters()))


COLLECTIVES = {
    "gather parameters": "_allgather",
    "reduce-scatter gradients": "_reduce_scatter",
    "all-reduce gradients": "allreduce_",
}
MESHES = [
    (2, {}),
    (2, {"reshard": False}),
    (2, {"tensor": 2}),
    (4, {"tensor": 2}),
    (4, {"tensor": 2, "replicas": 2}),
    (2, {"expert": 2}),
    (4, {"expert": 2}),
    (4, {"tensor": 2, "expert": 2}),
]


@pytest.mark.parametrize("recompute, precision", [(False, "float32"), (True, "bf16")])
@pytest.mark.parametrize("ranks, mesh", MESHES, ids=str)
def test_fsdp_gathers_and_sums_what_is_planned(ranks, mesh, recompute, precision):
    """As often, and as many bytes but for padding; and ranks hold as many numbers, in the mean."""
    samples = 2 * ranks // mesh.get("tensor", 1)
    run = Run(length=64, batch=samples, micro=1, recompute=recompute, precision=precision)
    p = planned(SMALL, ranks, run, Assumptions(), **mesh)
    found = testing.run(ranks, sharded, SMALL, trainers.Degrees(**mesh), recompute, precision == "bf16")
    assert sum(moved.held for moved in found) == pytest.approx(p.memory["parameters"] / 4 * ranks)
    for moved in found:
        for t in (t for t in p.traffic if t.what in COLLECTIVES):
            name = COLLECTIVES[t.what]
            assert moved.calls[name] == t.calls
            if name != "allreduce_":  # whose ring is the backend's
                assert moved.bytes[name] == pytest.approx(t.bytes, rel=0.01)


def test_a_pipeline_gathers_its_parameters_once_a_step():
    """As often as it sums their gradients; beside several micro-batches all of a stage's are there."""
    p = planned(PLAIN["a0.3b"], 4, Run(batch=16, micro=1), Assumptions(), pipeline=2)
    calls = {t.what: t.calls for t in p.traffic if t.axis == "shards"}
    assert calls["gather parameters"] == calls["reduce-scatter gradients"]
    assert p.memory["gathered: blocks, which stay"] > p.memory["parameters"] and "gathered: two blocks" not in p.memory


def test_replicas_sum_their_own_shards():
    p = planned(PLAIN["a0.3b"], 256, Run(batch=256), replace(BF16, windows=False), replicas=32)
    inside = bytes_of(p, "gather parameters") + bytes_of(p, "reduce-scatter gradients") + root(p) * 2 * 7 / 8
    assert inside / 1e9 == pytest.approx(17.3, abs=0.1)
    (between,) = (t for t in p.traffic if t.axis == "replicas")
    assert between.bytes / 1e9 == pytest.approx(2.4, abs=0.1)
    assert between.seconds(p.asked.given) == pytest.approx(0.050, abs=0.003)


def test_experts_travel_or_tokens_do():
    for name, bound in (("a0.3b", 21.5e3), ("a1b", 24.6e3)):
        assert program.break_even(Asked(PLAIN[name], 1, Degrees(), Run(), BF16)) == pytest.approx(bound, rel=2e-3)
    for ranks, fewer in ((2, 4.0), (4, 2.2), (8, 1.5), (16, 1.2)):
        assert 8 * (ranks - 1) / ranks / budget.visited(64, 8, ranks) == pytest.approx(fewer, abs=0.05)


def test_a_flat_gather_between_hosts_takes_its_bytes_over_the_port():
    given = Assumptions(latency_between=0)
    s = 8 * 128 * 128 * 4
    found = [Traffic("sequence", "", 1, (w - 1) * s, w).seconds(given) * 1e3 for w in (64, 256, 1024)]
    assert found == pytest.approx([0.66, 2.7, 10.7], rel=0.02)


# -------------------------------------------------------------------------------------------------------------- time


def test_floors_of_one_gpu():
    """At the whole peak, 16k tokens: milliseconds of compute and of the optimizer."""
    for name, compute, optimizer in (("a0.3b", 59, 24.2), ("a1b", 174, 71.6)):
        run = Run(length=2**14, batch=1, recompute=False)
        times = planned(PLAIN[name], 1, run, replace(BF16, efficiency=1.0)).times
        assert times["compute"] * 1e3 == pytest.approx(compute, abs=0.6)
        assert times["optimizer"] * 1e3 == pytest.approx(optimizer, abs=0.1)


# which side, on how many GPUs, and how far off seconds and memory may be
MEASURED = [
    ("alone", 1, 1 / 7, 1 / 30),
    ("data", 2, 1 / 9, 1 / 8),
    ("sequence", 2, 1 / 8, 1 / 8),
]
COMMIT = "18d1b0e"


@pytest.mark.parametrize("side, gpus, off, over", MEASURED)
def test_a_plan_is_about_what_was_measured(side, gpus, off, over):
    """Seconds within that share; memory is never less than it took, and at most so much more."""
    file = Path(budget.__file__).parent.parent / "bench" / "results" / "parallel-2xh200-torch-2.11.jsonl"
    steps = [x for x in map(json.loads, file.open()) if (x["what"], x["side"], x["commit"]) == ("step", side, COMMIT)]
    assert len(steps) >= 3
    for x in steps:
        if x["row"] in ("linear_attention", "gated_delta_net"):
            whole = {"length": x["tokens"] * gpus, "batch": 1} if side == "sequence" else {"length": x["tokens"]}
            run = Run(**{"batch": gpus, "micro": 1} | whole)
            mesh = {"reshard": x["reshard"]} | ({side: gpus} if gpus > 1 else {})
            p = planned(replace(A03B, lsm=x["row"]), gpus, run, Assumptions(), **mesh)
            assert p.step * 1e3 == pytest.approx(x["eager_ms"], rel=off)
            assert 1 <= sum(p.memory.values()) / (x["peak_mib"] * 2**20) < 1 + over


def test_hiding_ends_where_computing_does():
    slow = replace(BF16, between=1.0, inside=1.0, overlap_weights=1.0)
    p = planned(A03B, 8, Run(length=64, batch=8), slow)
    assert p.step == pytest.approx(p.times["optimizer"] + sum(t.seconds(slow) for t in p.traffic))


def test_a_step_is_the_sum_of_its_terms_and_the_longest_binds():
    p = planned(A1B, 16, Run(batch=16), sequence=2)
    assert p.step == sum(p.times.values())
    assert p.times[p.binds] == max(p.times.values())
    assert p.rate == 16 * 2048 / p.step


# ----------------------------------------------------------------------------------------------------- the program


def run_program(capsys, line: str) -> str:
    program.main(shlex.split(line))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "line, words",
    [
        ("nothing --gpus 8", "unknown preset 'nothing'"),
        ("tiny --gpus 0", "0 is below 1"),
        ("tiny --gpus 8 --mesh.sequence 3", "sequence 3, tensor 1, pipeline 1 do not multiply out to 8 GPUs"),
        ("tiny --gpus 8 --mesh.data 3", "data 3, sequence 1, tensor 1, pipeline 1 do not multiply out"),
        ("tiny --gpus 8 --mesh.data 0", "at least 1"),
        ("tiny --gpus 8", None),
        ("tiny --gpus 8 --mesh.data 8", "batch of 4 samples does not divide over data 8"),
        ("tiny --gpus 1 --micro 3", "micro 3 must divide the 4 samples"),
        ("tiny --gpus 4 --mesh.replicas 3", "3 replicas do not divide 4 ranks"),
        ("tiny --gpus 3 --batch 3 --mesh.expert 3", "8 experts cannot be shared over expert 3"),
        ("tiny --gpus 2 --mesh.expert 4", "expert 4 does not divide the 2 ranks"),
        ("llama3-8b --gpus 2 --mesh.expert 2", "no expert layer"),
        (
            "tiny --gpus 8 --mesh.tensor 8",
            "4 heads of Mamba2 cannot be shared over 8 ranks; let --mesh.tensor be one of 1",
        ),
        ("tiny --gpus 2 --mesh.tensor 2 --mesh.expert 4", "expert 4 does not divide the 2 ranks"),
        ("mamba-25m --gpus 3 --batch 3 --mesh.tensor 3", "1024 channels of Mamba cannot be shared over 3 ranks"),
        ("tiny --gpus 8 --mesh.sequence 4 --mesh.tensor 2 --mesh.attention ulysses", "sequence x tensor 8 (ulysses)"),
        ("tiny --gpus 8 --mesh.sequence 8 --mesh.attention ulysses", "4 heads of attention do not divide"),
        ("tiny --gpus 8 --mesh.pipeline 8", "4 blocks do not divide over pipeline 8"),
        ("tiny --gpus 2 --efficiency 2", "efficiency is 2.0"),
        ("tiny --gpus 7 --length 3", "no mesh of 7 GPUs works"),
        ("tiny --gpus 2 --mesh.sequence 2 --objective masked", "gather attention over a cut sequence is causal"),
        ("kimi-linear-48b-a3b --gpus 8 --objective masked", "Kimi Delta Attention has no form that runs both ways"),
    ],
)
def test_what_cannot_work_is_one_line(capsys, line, words):
    if words is None:
        assert "the best meshes" in run_program(capsys, line)
        return
    with pytest.raises(SystemExit) as stop:
        program.main(shlex.split(line))
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert words in error and error.count("\n") == 1


def test_what_does_not_fit_is_said_and_not_refused(capsys):
    said = run_program(capsys, "deepseek-v3 --gpus 8 --mesh.data 8")
    assert "DOES NOT FIT in 149 GB" in said


def test_proposals_fit_first_and_the_fastest_of_them_first(capsys):
    plans = json.loads(run_program(capsys, "a1b-7b --gpus 8 --memory 80 --json"))
    assert len(plans) == 5
    assert [p["fits"] for p in plans] == sorted((p["fits"] for p in plans), reverse=True)
    rates = [p["tokens a second"] for p in plans if p["fits"]]
    assert rates == sorted(rates, reverse=True)
    for p in plans:
        assert p["mesh"]["data"] * p["mesh"]["sequence"] * p["mesh"]["tensor"] == 8
        assert p["step"] == pytest.approx(sum(p["times"].values()))


def test_pipelines_that_the_trainer_refuses_are_named(capsys):
    said = run_program(capsys, "tiny --gpus 4 --mesh.tensor 2 --mesh.pipeline 2")
    assert "the trainer refuses the preset as it is (2 pipeline ranks need as many micro-batches a step, fou" in said
    said = run_program(capsys, "tiny --gpus 4 --mesh.tensor 2 --mesh.pipeline 2 --micro 1")
    assert "the trainer" not in said.split("assumptions")[0]


def test_what_the_trainer_refuses_is_said(capsys):
    """A capacity for which a sequence's tokens compete."""
    said = run_program(capsys, "moe-mamba-4 --gpus 8 --mesh.sequence 2")
    assert "the trainer refuses the preset as it is (router 'moe_mamba' has a capacity" in said


def test_a_block_that_runs_again_by_kernels_does_not_gather_spans_again(capsys):
    calls = []
    for kernels in ("fused", "reference"):
        said = run_program(capsys, f"a0.3b-2b --gpus 2 --mesh.sequence 2 --length 4096 --kernels {kernels}")
        calls.append(int(re.search(r"gather spans +([\d,]+)", said)[1].replace(",", "")))
    assert 3 * calls[0] == 2 * calls[1] > 0


def test_every_assumption_is_printed_and_changes_under_its_name(capsys):
    said = run_program(capsys, "tiny --gpus 2 --mesh.data 2 --between 12.5 --host 1")
    for f in fields(Assumptions):
        assert re.search(rf"^  {f.name.replace('_', '-')} ", said, re.MULTILINE)
    assert re.search(r"^  between +12\.5 ", said, re.MULTILINE)
    assert "between hosts" in said


@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_the_example_in_the_readme_is_what_the_program_prints(capsys):
    line, block = re.search(r"```\n\$ python -m parallel\.plan (.*)\n((?:.*\n)*?)```", README.read_text()).groups()
    assert run_program(capsys, line) == block
