"""A sequence cut over ranks is the same sequence: outputs, every gradient, whole training steps; and what travels.

Three ranks at least: with two no transition is ever applied, and wrong ones pass. One start of three processes runs
all cases; the tests look up their verdicts.
"""

import itertools
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from data.stream import Batch
from inputs import HERE, here, leaves, make, pieces, refused
from parallel import comm, lasp, mesh, shard, testing
from parallel.graph import twice
from reference.lsm import LSM
from reference.model import LanguageModel, initialize, starts
from reference.ops import ops
from reference.presets import Model
from reference.recurrence import empty, measured
from reference.span import BRIEF, TRANSITION, Ends, fold, transition
from train import PRESETS, optimizer_of

W = 3
SEGMENTS = {"ragged": (5, 0, 9), "equal": (5, 5, 5), "short": (1, 2, 6), "late": (0, 1, 3)}
# Borders of documents: none, one document, on ranks' borders and off them, several in a rank, empty ones.
PACKED = {None: None, "one": (), "borders": (0, 5, 10), "many": (2, 3, 3, 6, 7, 9), "last": (13,)}


def borders_of(packed, t: int):
    if PACKED[packed] is None:
        return None
    return torch.tensor([0, *(x for x in PACKED[packed] if x <= t), t], dtype=torch.int32, device=HERE)


def mine(lengths, rank: int) -> tuple[int, int]:
    return sum(lengths[:rank]), sum(lengths[: rank + 1])


# ------------------------------------------------------------- an op's call on the whole sequence and on a segment


def call_row(name):
    def call(ops, x, cu_seqlens):
        row = LSM[name]
        return ops.recurrence(row, {n: x[n] for n in row.tokens}, {n: x[n] for n in row.constants}, None, cu_seqlens)[0]

    def inputs(b, t):
        _, tokens, constants = make(name, b=b, t=t, h=2, k=3, v=4, strength=0.3)
        return tokens, constants

    return call, inputs


def call_convolution(width):
    def call(ops, x, cu_seqlens):
        return ops.short_convolution(x["x"], x["weight"], x["bias"], "silu", None, cu_seqlens)[0]

    return call, lambda b, t: ({"x": draw(b, t, 4)}, {"weight": draw(4, width), "bias": draw(4)})


def call_shift():
    def call(ops, x, cu_seqlens):
        return ops.token_shift(x["x"], None, cu_seqlens)[0]

    return call, lambda b, t: ({"x": draw(b, t, 4)}, {})


def call_sum():
    def call(ops, x, cu_seqlens):
        return ops.running_sum(x["x"], None, cu_seqlens)[0]

    return call, lambda b, t: ({"x": draw(b, t, 4)}, {})


def call_attention(window=None, scale=None, value=3, heads=4):
    def call(ops, x, cu_seqlens):
        return ops.attention(x["q"], x["k"], x["v"], None, cu_seqlens, window, scale)[0]

    return call, lambda b, t: (
        {"q": draw(b, t, heads, 3), "k": draw(b, t, 2, 3), "v": draw(b, t, 2, value, seed=1)},
        {},
    )


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64)


AFFINE = [name for name in LSM if transition(LSM[name]) is not None]
CALLS = {name: call_row(name) for name in AFFINE}
AGAIN = {f"{name}, again": CALLS[name] for name in ("lightning", "mamba2", "gla", "rwkv6")}  # as with kernels
CALLS |= AGAIN
ENDS = {  # as with kernels that skip the outputs
    f"{name}, ends": CALLS[name] for name in ("lightning", "mamba2", "gla", "rwkv6", "gated_delta_net", "kda", "rwkv7")
}
CALLS |= ENDS
CALLS |= {f"convolution {w}": call_convolution(w) for w in (1, 2, 4)}
CALLS |= {"token_shift": call_shift(), "running_sum": call_sum()}


def recomputed(name: str) -> dict[str, tuple]:
    """In a block that runs again in the backward pass, where nothing is gathered again."""
    call, inputs = CALLS[name]
    return {f"{name}, recomputed": (partial(checkpoint, call, use_reentrant=False, context_fn=twice), inputs)}


ENDS |= recomputed("mamba2, ends") | recomputed("kda, ends")
CALLS |= ENDS | recomputed("convolution 4") | recomputed("token_shift") | recomputed("running_sum")
ATTENTION = {
    "attention": {},
    "attention, window 1": {"window": 1},
    "attention, window 4": {"window": 4},
    "attention, window 8": {"window": 8, "value": 5},
    "attention, latent": {"scale": 0.3, "value": 5},
}
CALLS |= {name: call_attention(**how) for name, how in ATTENTION.items()}
GATHERED = tuple(CALLS)  # to which test_sequence adds calls of its own
# Of every call half of all pairs of segments and documents, and of its neighbours in the table the other half.
CASES = [
    (what, segments, packed)
    for (i, what), (j, segments), (k, packed) in itertools.product(*map(enumerate, (GATHERED, SEGMENTS, PACKED)))
    if (i + j + k) % 2 == 0
]


def received(row, tokens, constants, do, cu_seqlens, kept):
    """What kernels compute at once: the gradient of the outputs with respect to a memory before them."""
    with torch.enable_grad():
        n = None if cu_seqlens is None else len(cu_seqlens) - 1
        M = empty(row, tokens, constants, n).requires_grad_()
        o, _ = ops.recurrence(row, tokens, constants, M, cu_seqlens)
        return torch.autograd.grad(o + 0 * M.sum(), M, do)[0]


def backend(what: str):
    by_hand = Ends(lambda *_: True, lambda *x: (ops.span(*x), []), received)
    return ops._replace(again=what in AGAIN, ends=by_hand if what in ENDS else None)


def both(what: str, segments, packed, **how) -> tuple[list, list]:
    """(outputs and gradients on this rank, what they should be: the whole sequence's, cut)."""
    group, lengths = comm.world(), SEGMENTS.get(segments, segments)
    call, inputs = CALLS[what]
    b, t = (2 if packed is None else 1), sum(lengths)
    start, stop = mine(lengths, comm.rank(group))
    tokens, constants = here(*inputs(b, t))
    cu_seqlens = borders_of(packed, t)
    own, shared = pieces(tokens, start, stop), dict(constants)
    wanted = leaves(tokens, constants)
    o = call(ops, tokens | constants, cu_seqlens)
    cotangent = draw(*o.shape, seed=7).to(HERE)
    exact = torch.autograd.grad((o * cotangent).sum(), wanted, materialize_grads=True)
    timed = sum(x.is_floating_point() for x in tokens.values())
    exact = [o[:, start:stop], *(g[:, start:stop] for g in exact[:timed]), *exact[timed:]]
    wanted = leaves(own, shared)
    local = None if cu_seqlens is None else lasp.cut_borders(cu_seqlens, start, stop)
    o = call(lasp.over(backend(what), group, **how), own | shared, local)
    (o * cotangent[:, start:stop]).sum().backward()
    got = [x.grad for x in wanted]
    assert all(g is not None for g in got), "a rank without a gradient would leave the others waiting for it"
    return [o, *got[:timed], *(comm.total(g, group) for g in got[timed:])], exact


def error(what, segments, packed, **how) -> float:
    """The largest deviation on this rank, relative to the largest number that it should be."""
    worst = 0.0
    for got, exact in zip(*both(what, segments, packed, **how), strict=True):
        assert got.shape == exact.shape and torch.isfinite(got).all()
        if exact.numel():
            worst = max(worst, ((got - exact).abs().max() / exact.abs().max().clamp(min=1)).item())
    return worst


def errors(cases) -> dict:
    return {case: error(*case) for case in cases}


@pytest.fixture(scope="module")
def verdicts() -> dict:
    ranks = testing.run(W, errors, CASES, seconds=120)
    return {case: max(rank[case] for rank in ranks) for case in CASES}


@pytest.mark.parametrize("what", CALLS)
def test_ranks_equal_one(what, verdicts):
    wrong = {case: e for case, e in verdicts.items() if case[0] == what and not e < 1e-12}
    assert not wrong and sum(case[0] == what for case in verdicts) == len(SEGMENTS) * len(PACKED) // 2


# -------------------------------------------------------------------------------------------------- planted bugs


def dropped(kind, A, D, M):
    return 0 * TRANSITION[kind].gradient(A, D, M)


def untransposed(spans, G, D):
    cotangents = [D]
    for span, own in zip(reversed(spans), reversed(G), strict=True):
        cotangents.append(own + TRANSITION[span.kind].act(span.A, cotangents[-1]))
    return cotangents[::-1]


def skipped(spans, M):
    return fold([span._replace(A=torch.zeros_like(span.A)) for span in spans], M)


def unmasked(last, t, cu_seqlens, pushed_out=lasp.pushed_out):
    return pushed_out(last, t, None)


def for_all(state, cu_seqlens):
    return state if cu_seqlens is None else torch.cat([state] * (len(cu_seqlens) - 1))


BUGS = {
    "gradient of A dropped": ("gradient_of_transition", dropped, ("mamba2", "gla", "rwkv6", "gated_delta_net", "kda")),
    "A for its transpose": ("fold_back", untransposed, ("gated_delta_net", "kda", "kda, ends", "convolution 4")),
    "transition skipped": (
        "fold",
        skipped,
        ("mamba2", "lightning", "gla", "kda", "kda, ends", "convolution 4", "running_sum"),
    ),
    "halo across documents": ("pushed_out", unmasked, ("convolution 4",)),
    "memory for every document": (
        "for_first",
        for_all,
        ("linear_attention_normalized", "kda", "convolution 4", "token_shift", "running_sum"),
    ),
    "memory for every document's tokens": ("tokens_of_first", lambda tokens, _: tokens, ("mamba2", "gla", "rwkv6")),
}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug, monkeypatch):
    name, wrong, touched = BUGS[bug]
    monkeypatch.setattr(lasp, name, wrong)
    cases = list(itertools.product(touched, ["equal", "short"], [None, "many"]))
    ranks = testing.run(W, errors, cases)
    for what in touched:
        assert max(rank[case] for rank in ranks for case in cases if case[0] == what) > 1e-6, what


# -------------------------------------------------------------------------------------------------- what travels


def traffic(what: str, t: int):
    group = comm.world()
    call, inputs = CALLS[what]
    tokens, constants = inputs(2, t)
    leaves(tokens, constants)
    with comm.counted() as forward:
        o = call(lasp.over(backend(what), group), tokens | constants, None)
    with comm.counted() as backward:
        o.sum().backward()
    return forward, backward


def traffics():
    return {(what, t): traffic(what, t) for what in GATHERED for t in (6, 12)}


@pytest.fixture(scope="module")
def counters():
    return testing.run(W, traffics)


BRIEFLY = {"element": 2 * 4, "stepped": 2 * 3, "spiral": 1}  # a step for each value or key channel; the tokens' number


def numbers(what: str) -> tuple[int, int]:
    """Of A and of S, for b = 2 and the sizes above."""
    what = what.partition(", ")[0]
    if what in LSM:
        row, tokens, constants = make(what, b=2, t=1, h=2, k=3, v=4)
        b, h, k, v = empty(row, tokens, constants).shape
        if row.decay.__name__ in BRIEF:  # its sums, and whether a border lies within
            return b * (1 + BRIEFLY[row.decay.__name__]), b * h * k * v
        letters = {"h": h, "k": k, "v": v, "l": 4}
        return b * math.prod(measured(TRANSITION[transition(row)].shape, letters)), b * h * k * v
    reach = 1 if what in ("token_shift", "running_sum") else int(what.split()[1]) - 1
    return 2 * reach * reach, 2 * reach * 4


@pytest.mark.parametrize("what", [name for name in CALLS if name not in (*ATTENTION, "convolution 1")])
def test_one_gather_each_way_of_a_size_that_does_not_know_the_length(what, counters):
    A, S = numbers(what)
    for rank, t in itertools.product(counters, (6, 12)):
        forward, backward = rank[what, t]
        assert dict(forward.calls) == dict(backward.calls) == {"gather": 1}
        assert forward.received["gather"] == (W - 1) * (A + S) * 8
        assert backward.received["gather"] == (W - 1) * S * 8


@pytest.mark.parametrize("what", ATTENTION)
def test_attention_receives_keys_and_values_once_each_way(what, counters):
    for rank, t in itertools.product(counters, (6, 12)):
        forward, backward = rank[what, t]
        assert dict(forward.calls) == {"gather": 2} and dict(backward.calls) == {"scatter": 1}
        tokens = 2 * t * 2 * (3 + ATTENTION[what].get("value", 3)) * 8
        assert forward.received["gather"] == (W - 1) * (tokens + 16)
        assert backward.received["scatter"] == (W - 1) * tokens


def test_a_convolution_of_one_tap_sends_nothing(counters):
    for rank in counters:
        assert not any(counter.calls for counter in rank["convolution 1", 6])


# ------------------------------------------------------------------------------------------- a training step


def batch_of(lengths: tuple[int, ...]) -> Batch:
    """Documents of these lengths, one packed row."""
    n, cu = sum(lengths), torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    rng = torch.Generator().manual_seed(3)
    tokens = torch.randint(11, (1, n + 1), generator=rng)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    labels = tokens[:, 1:].clone()
    labels[:, cu[1:].long() - 1] = -100
    return Batch(tokens[:, :-1], labels, positions, cu, torch.arange(n)[None])


BATCHES = [batch_of((7, 1, 13)), batch_of((4, 9)), batch_of((2,))]  # two tokens, three ranks: one has none


def train(lsm: str, degrees: mesh.Degrees, recompute: bool, **more):
    """Three steps; the losses, the norms, and the parameters after them."""
    place = mesh.make(degrees, HERE)
    sizes = {"width": 8, "heads": 2, "vocabulary": 11, "experts": 4, "expert_width": 4, "dense_width": 8}
    config = Model(**{"pattern": "LNE", "lsm": lsm, "dropout": 0.1} | sizes | (more or TRAINED[lsm]))
    model = LanguageModel(config, mesh.over(ops, place)).double().to(HERE)
    how = starts(model)
    if recompute:
        shard.checkpointing(model.blocks)
    shard.shard(model, place, model.blocks)
    initialize(model, 5, how)
    # AdamW works out anew at each step where its operations go, and needs longer for it than for the step
    kind = torch.optim.AdamW if lsm == "rwkv6" or torch.cuda.is_available() else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.01, fused=kind is torch.optim.AdamW)
    said = []
    for step, packed in enumerate(BATCHES):
        batch = Batch(*(x.to(HERE) for x in lasp.cut(packed, place.sequence_size, place.sequence_rank)))
        share = place.data_rank == 0  # the other samples of the step have no labels
        labels = batch.labels if share else torch.full_like(batch.labels, -100)
        count = model.ops.total((labels >= 0).sum())
        out = model(batch.tokens, labels, batch.positions, batch.cu_seqlens, batch.indices, key=step)
        shard.synchronize(model, True)
        (out.losses.sum() / count).backward()
        norm = shard.grad_norm(model.parameters())
        shard.move(optimizer, norm, 0.1)
        assert shard.grad_norm(model.parameters()) <= 0.1 * (1 + 1e-6)  # torch scales by a float32
        said += [model.ops.total(out.losses.detach().sum()) / count, norm]
        optimizer.zero_grad()
    values = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.stack(said).detach().cpu(), [x.detach().clone().cpu() for x in values]


MESHES = [
    (mesh.Degrees(sequence=3), False),
    (mesh.Degrees(sequence=3), True),
    (mesh.Degrees(data=3, reshard=False), False),
]
TRAINED = {  # with the softmax attention beside them
    "rwkv6": {},
    "gated_delta_product": {"window": 3, "qk_norm": True, "attention_gate": True, "rope_share": 0.5},
    "mamba2": {"attention": "latent", "query_rank": 3},
    "retention": {"attention": "latent", "window": 3},
    "mom_gated_delta_net": {},
    "rwkv7": {"pattern": "LNLE"},
    "mamba3": {"key_size": 8},
    "gla": {"pattern": "L+DN+E", "attention": "mixture", "mixer_experts": 3, "key_heads": 1},
    "mamba": {"window": 3, "attention": "mixture", "projection_experts": ("input", "gate", "output")},
}


def train_all():
    return {(lsm, i): train(lsm, *MESHES[i]) for lsm in TRAINED for i in range(len(MESHES))}


@pytest.fixture(scope="module")
def alone():
    return {lsm: train(lsm, mesh.Degrees(), False) for lsm in TRAINED}


@pytest.fixture(scope="module")
def trained(alone):  # after `alone`: what the optimizer imports at its first step is then there to be forked
    return testing.run(W, train_all)


@pytest.mark.parametrize("lsm", TRAINED)
def test_three_steps_on_every_mesh_are_those_of_one_process(lsm, alone, trained):
    said, values = alone[lsm]
    for rank, i in itertools.product(trained, range(len(MESHES))):
        torch.testing.assert_close(rank[lsm, i][0], said, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank[lsm, i][1], values, rtol=1e-10, atol=1e-12)


def gathers():
    """In a step of three blocks whose experts are gathered apart: who asks for parameters (True) and who waits for
    them (False), by the name of its first parameter."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as torchs

    place, said = mesh.make(mesh.Degrees(), HERE), []
    config = Model(pattern="LE" * 3, lsm="linear_attention", width=8, heads=2, vocabulary=11, experts=2, expert_width=4)
    model = LanguageModel(config, mesh.over(ops, place)).to(HERE)
    how = starts(model)
    shard.checkpointing(model.blocks)
    shard.shard(model, place, model.blocks, torch.bfloat16)
    initialize(model, 5, how)
    gather, wait = torchs.foreach_all_gather, torchs.FSDPParamGroup.wait_for_unshard

    def asks(parameters, *more):
        said.append((parameters[0]._param_fqn, True))
        return gather(parameters, *more)

    def waits(group):
        if group._all_gather_result is not None:
            said.append((group.fsdp_params[0]._param_fqn, False))
        return wait(group)

    torchs.foreach_all_gather, torchs.FSDPParamGroup.wait_for_unshard = asks, waits
    batch = Batch(*(x.to(HERE) for x in BATCHES[0]))
    with torch.autocast(HERE.type, torch.bfloat16):
        out = model(batch.tokens, batch.labels, batch.positions, batch.cu_seqlens, batch.indices, key=0)
    out.losses.sum().backward()
    return said


def test_parameters_are_gathered_while_others_compute():
    said = testing.run(2, gathers)[0]
    assert sum(asking for _, asking in said) == 1 + 2 * 6  # none twice but on the way back
    at_once = [name for (name, asking), then in itertools.pairwise(said) if asking and then == (name, False)]
    none_before = ("embedding", "blocks.2.sublayers.0", "blocks.2.sublayers.1")
    assert all(name.startswith(none_before) for name in at_once), said


# ----------------------------------------------------------------------------------------------- in one process


@pytest.mark.parametrize("name", AFFINE)
@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6), data=st.data(), seed=st.integers(0, 99))
def test_drawn_segments_folded_are_the_whole(name, lengths, data, seed):
    t = sum(lengths)
    row, tokens, constants = make(name, b=1, t=t, k=3, v=2, seed=seed)
    inner = data.draw(st.lists(st.integers(0, t), max_size=4))
    cu_seqlens = torch.tensor(sorted([0, *inner, t]), dtype=torch.int32)
    ends = [0, *itertools.accumulate(lengths)]
    cuts = [(pieces(tokens, i, j), lasp.cut_borders(cu_seqlens, i, j)) for i, j in itertools.pairwise(ends)]
    spans = [ops.span(row, x, constants, borders) for x, borders in cuts]
    memories = fold(spans, torch.zeros_like(spans[0].S))
    o = [
        ops.recurrence(row, x, constants, lasp.for_first(M, borders), borders)[0]
        for (x, borders), M in zip(cuts, memories, strict=False)
    ]
    torch.testing.assert_close(torch.cat(o, 1), ops.recurrence(row, tokens, constants, None, cu_seqlens)[0])


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), ranks=st.integers(1, 8))
def test_segments_hold_every_token_once(lengths, ranks):
    whole = batch_of(tuple(lengths))
    parts = [lasp.cut(whole, ranks, r) for r in range(ranks)]
    for name in ("tokens", "labels", "positions", "indices"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name))
    sizes = [part.tokens.shape[1] for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for part, size in zip(parts, sizes, strict=True):
        cu = part.cu_seqlens
        assert cu.dtype == torch.int32 and cu[0] == 0 and cu[-1] == size and (cu.diff() >= 0).all()
        if ranks > 1 and size:
            begins = set(part.positions[0].eq(0).nonzero()[:, 0].tolist())
            first = {0} if part.indices[0, 0] == whole.indices[0, 0] else set()  # of all: nothing comes before it
            assert set(cu[1:-1].tolist()) == begins - first


def test_a_leading_empty_document_says_that_the_first_token_begins_another():
    cu = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    want = {(0, 2): [0, 2], (2, 3): [0, 1], (3, 8): [0, 0, 5], (2, 6): [0, 1, 4], (4, 4): [0, 0], (3, 3): [0, 0]}
    assert {cut: lasp.cut_borders(cu, *cut).tolist() for cut in want} == want
    with pytest.raises(ValueError, match=r"segment \[2, 9\) does not lie in the 8 tokens"):
        lasp.cut_borders(cu, 2, 9)


# --------------------------------------------------------------------------------------- what is refused, and alone


def refusals():
    group = comm.world()
    over = lasp.over(ops, group)
    row, tokens, constants = make("gla")
    x = draw(2, 3, 4)
    calls = [
        lambda: over.recurrence(row, tokens, constants, torch.zeros(2, 2, 4, 5)),
        lambda: over.short_convolution(x, draw(4, 4), taps=x),
        lambda: over.token_shift(x, x[:, 0]),
        lambda: over.running_sum(x, x[:, 0]),
        lambda: over.attention(x[..., None], x[..., None], x[..., None], ()),
        lambda: lasp.over(type("Ops", (), {"_fields": ("recurrence", "sorting")})(), group),
        lambda: mesh.make(mesh.Degrees(sequence=2), torch.device("cpu")),
        lambda: mesh.make(mesh.Degrees(data=2, sequence=3), torch.device("cpu")),
        lambda: mesh.make(mesh.Degrees(data=0), torch.device("cpu")),
    ]
    return refused(calls)


def test_what_cannot_be_cut_is_refused_in_one_line():
    words = [
        *["no state can be given"] * 5,
        "cannot cut ops.sorting",
        "1 data x 2 sequence needs 2 ranks, found 3",
    ]
    words += ["needs 6 ranks, found 3", "at least 1"]
    for rank in testing.run(W, refusals):
        assert all(word in line and "\n" not in line for word, line in zip(words, rank, strict=True)), rank


def test_one_process_is_a_mesh_of_one():
    place = mesh.make(mesh.Degrees(), torch.device("cpu"))
    assert place == mesh.Mesh() and str(place) == "one process" and mesh.over(ops, place) is ops
    with comm.counted() as counter:
        assert (
            torch.equal(comm.total(torch.ones(2), None), torch.ones(2)) and len(comm.gather(torch.ones(2), None)) == 1
        )
        comm.barrier(None)
    assert not counter.calls
    with pytest.raises(ValueError, match="needs 4 ranks, found 1"):
        mesh.make(mesh.Degrees(sequence=4), torch.device("cpu"))


def exchanges():
    group, me = comm.world(), torch.full((2,), float(comm.rank(comm.world())))
    pairs = mesh.make(mesh.Degrees(data=2, sequence=2), torch.device("cpu"))
    neighbour = comm.shift(me, pairs.sequence)  # within a pair: never global rank - 1
    return (
        [x.tolist() for x in (comm.shift(me, group), comm.shift(me, group, forward=False), neighbour)],
        comm.total(me, pairs.everyone).tolist(),
        comm.total(me, pairs.sequence).tolist(),
        comm.total_of_some(me, group, [0, 2, 3]).tolist() if comm.rank(group) != 1 else [5.0] * 2,
        comm.scatter(torch.arange(8.0).view(4, 2) + comm.rank(group), group).tolist(),
        comm.objects(comm.rank(group), group),
        (pairs.rank, pairs.data_rank, pairs.sequence_rank, str(pairs)),
    )


def test_exchanges_go_by_the_place_in_the_group():
    for r, (shifts, everyone, pair, some, part, said, place) in enumerate(testing.run(4, exchanges)):
        before, after = (float(r - 1) if r else 0.0), (float(r + 1) if r < 3 else 0.0)
        assert shifts == [[before] * 2, [after] * 2, [float(r - 1) if r % 2 else 0.0] * 2]
        assert everyone == [6.0] * 2 and pair == [1.0 + 4.0 * (r // 2)] * 2 and some == [5.0] * 2
        assert part == [4 * 2 * r + 6.0, 4 * (2 * r + 1) + 6.0] and said == [0, 1, 2, 3]
        assert place == (r, r // 2, r % 2, "4 ranks = 2 data x 2 sequence, parameters sharded over all")


def test_a_rank_that_fails_or_hangs_is_named():
    def fails():
        if comm.rank(comm.world()) == 1:
            raise RuntimeError("as it should")
        comm.barrier(comm.world())

    def hangs():
        while comm.rank(comm.world()) == 0:
            pass

    with pytest.raises(AssertionError, match=r"(?s)rank 1 of 2.*as it should"):
        testing.run(2, fails)
    with pytest.raises(AssertionError, match=r"no word from ranks \[0, 1\]"):
        testing.run(2, hangs, seconds=1)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_clipping_scales_down_and_never_up_and_what_is_not_finite_moves_nothing(name):
    x, idle = torch.zeros(4, requires_grad=True), torch.zeros(2, requires_grad=True)
    model = torch.nn.ParameterDict({"x": x, "idle": idle})
    x, idle = model["x"], model["idle"]
    config = PRESETS["tiny"][1]
    config = replace(config, optimizer=replace(config.optimizer, name=name))
    optimizer = optimizer_of(config, model, {"x"})
    for bad in (torch.nan, torch.inf):  # the first step of all too
        x.grad = torch.tensor([3.0, bad, 3.0, 3.0])
        shard.move(optimizer, shard.grad_norm([x, idle]), 2.0)
        assert not x.any() and not any(y.any() for y in optimizer.state[x].values())
    for limit, scaled in ((7.0, 3.0), (2.0, 1.0)):
        x.grad = torch.full((4,), 3.0)
        norm = shard.grad_norm([x, idle])
        assert norm == 6
        shard.move(optimizer, norm, limit)
        torch.testing.assert_close(x.grad, torch.full((4,), scaled), rtol=1e-6, atol=0)
        assert (x < 0).all()
    assert not idle.any()


def test_the_exit_code_survives_the_hard_way_out(capsys):
    assert [mesh.code_of(e) for e in (None, SystemExit(), SystemExit(2), SystemExit("no"), ValueError("x"))] == [
        0,
        0,
        2,
        1,
        1,
    ]
    said = capsys.readouterr().err
    assert said.startswith("no\n") and "ValueError: x" in said


def test_one_file_communicates_by_hand_and_none_reads_the_tables():
    root = Path(__file__).resolve().parent.parent
    files = [
        *root.glob("*.py"),
        *(f for part in ("reference", "fast", "parallel", "data") for f in (root / part).rglob("*.py")),
    ]
    engines = re.compile(
        r"torch\.distributed(?!\.(device_mesh|fsdp|tensor|checkpoint|pipelining|_symmetric_memory)\b)[. ]"
    )
    assert {f.name for f in files if any(engines.search(x) for x in imports(f))} == {"comm.py"}
    tables = re.compile(r"reference\.(lsm|routers|mixers|presets)|import (fla|triton)")
    reading = {f.name for f in (root / "parallel").glob("*.py") if any(tables.search(x) for x in imports(f))}
    # Two calculate what a preset would need, and communicate nothing; one cuts layers by heads, each kind its own way.
    assert reading == {"plan.py", "budget.py", "tensor.py"}


def imports(file) -> list[str]:
    return [x.strip() for x in file.read_text().splitlines() if x.strip().startswith(("import ", "from "))]
