"""The ways over a cut sequence: rings and exchanges for softmax layers, a chain for memories, memories that come late.

Worlds of two, three and four ranks run all cases in one start each; `test_lasp` has the laws of the way by default.
"""

import contextlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flash
from inputs import leaves, make, refused, start
from parallel import attention, comm, lasp, mesh, testing
from reference import late, pieces
from reference.lsm import LSM
from reference.ops import exact, ops
from reference.span import BRIEF, brief, rebuilt
from test_lasp import AFFINE, ATTENTION, CALLS, call_attention, call_row, draw, error
from test_lasp import train as three_steps
from test_mixers import Layer

WORLDS = (2, 3, 4)
SEGMENTS = {"ragged": (5, 0, 7, 2), "equal": (4, 4, 4, 4), "short": (1, 2, 6, 1), "late": (0, 1, 3, 2)}
WAYS = ("gather", "ring", "ulysses")
LATE = [name for name in LSM if late.comes_late(LSM[name])]

# ------------------------------------------------------------------------------------------------ ranks equal one

for name, how in ATTENTION.items():  # of twelve heads, which 2, 3 and 4 ranks can share; two heads of keys
    CALLS[f"twelve {name}"] = call_attention(**how, heads=12)
CALLS |= {name: call_row(name) for name in LSM}
SOFTMAX = [f"twelve {name}" for name in ATTENTION]


def cases_of(ranks: int) -> list:
    """(what, segments, documents, how): softmax layers in every way, rows by chain and gather. Three ranks, of which
    `test_lasp` has all that is gathered, chain every row; two and four take one of each class."""
    cut = [lengths[:ranks] for lengths in SEGMENTS.values()]
    several = cut if ranks == 3 else cut[::2]
    cases = [(*x, {"attention": way}) for way in WAYS for x in itertools.product(SOFTMAX, several, PACKED)]
    if ranks < 4:
        some = itertools.product(WAYS[:2], SOFTMAX, cut[::2], (None, "many"))
        cases += [(*x, {"attention": way, "kernels": True}) for way, *x in some]
    packed = [(cut[0], None), (cut[2], "many")]
    cases += [(name, *x, {"how": "ring"}) for name in (LSM if ranks == 3 else CLASSES) for x in packed]
    cases += [(name, *x, {}) for name in CLASSES for x in packed if ranks != 3]
    return cases


CLASSES = ("lightning", "mamba2", "rwkv6", "gated_fast_weights", "mamba", "s4", "gate_loop", "log_linear_mamba2", "kda")
PACKED = (None, "one", "borders", "many")


def errors(cases) -> list[float]:
    pieces.SCORES = 100  # the ring's queries in pieces, of one and of several
    return [error_of(*case) for case in cases]


def error_of(what, segments, packed, how) -> float:
    how = dict(how)
    with flash.there() if how.pop("kernels", False) else contextlib.nullcontext():
        return error(what, segments, packed, **how)


@pytest.fixture(scope="module", params=WORLDS)
def verdicts(request) -> dict:
    """The largest error of any rank, by what was computed and how."""
    cases = cases_of(request.param)
    worst = {}
    for errors_of_case, (what, *_, how) in zip(
        zip(*testing.run(request.param, errors, cases, seconds=120), strict=True), cases, strict=True
    ):
        key = (what, *how.values())
        worst[key] = max(worst.get(key, 0.0), *errors_of_case)
    return worst


@pytest.mark.parametrize("way", WAYS)
def test_softmax_layers_equal_one_rank(way, verdicts):
    found = {key: e for key, e in verdicts.items() if key[1:] == (way,) and key[0] in SOFTMAX}
    assert len(found) == len(ATTENTION) and max(found.values()) < 1e-12


@pytest.mark.parametrize("way", WAYS[:2])
def test_softmax_layers_by_kernels_equal_one_rank(way, verdicts):
    found = {key: e for key, e in verdicts.items() if key[1:] == (way, True)}
    assert len(found) in (0, len(ATTENTION)) and max(found.values(), default=0.0) < 1e-12


def test_rows_go_from_rank_to_rank(verdicts):
    found = {key[0]: e for key, e in verdicts.items() if key[1:] == ("ring",) and key[0] in LSM}
    assert set(found) in (set(LSM), set(CLASSES)) and max(found.values()) < 1e-12


def test_rows_are_gathered(verdicts):
    found = {key[0]: e for key, e in verdicts.items() if key[1:] == ()}
    assert set(found) in (set(), set(CLASSES)) and max(found.values(), default=0.0) < 1e-12


# -------------------------------------------------------------------------------------------------- what travels


def traffic(what: str, t: int, cu_seqlens=None, **how):
    group = comm.world()
    call, inputs = CALLS[what]
    tokens, constants = inputs(1, t)
    leaves(tokens, constants)
    with comm.counted() as forward:
        o = call(lasp.over(ops, group, **how), tokens | constants, cu_seqlens)
    with comm.counted() as backward:
        o.sum().backward()
    return forward, backward


def ring_traffic():
    """By length of the segments, window, and whether each segment is a document of its own."""
    CALLS.update({f"window {w}": call_attention(window=w, heads=12) for w in (None, 1, 2, 6, 7, 11, 12)})
    found = {}
    for (t, w), apart in itertools.product(
        [(5, None), (10, None), (5, 1), (5, 2), (5, 6), (5, 7), (5, 11), (5, 12)], (0, 1)
    ):
        cu = torch.tensor([0, 0, t], dtype=torch.int32) if apart else None
        found[t, w, apart] = traffic(f"window {w}", t, cu, attention="ring")
    return found


def test_keys_go_round_as_far_as_any_rank_looks_back():
    token = 2 * (3 + 3) * 8
    for rank in testing.run(4, ring_traffic):
        for (t, w, apart), (forward, backward) in rank.items():
            # of five tokens a rank, a window of 2 reaches one rank back, of 7 two, of 12 all three
            rounds = 3 if w is None else -(-(w - 1) // t)
            rounds = min(rounds, 1) if apart else rounds  # whose document ends at my border is not known
            assert forward.calls["rotate"] == rounds and forward.calls["gather"] == 1
            assert forward.received["rotate"] == rounds * t * token
            assert backward.calls["rotate"] == 2 * rounds + (rounds > 0) and not backward.calls["gather"]
            assert backward.received["rotate"] == (2 * rounds + (rounds > 0)) * t * token


def other_traffic():
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    found = {t: traffic("twelve attention", t, attention="ulysses") for t in (6, 12)}
    found["packed"] = traffic("twelve attention", 6, cu, attention="ulysses")
    rows = {(name, t): traffic(name, t, how="ring") for name in LSM for t in (6, 12)}
    return comm.rank(comm.world()), found, rows


@pytest.fixture(scope="module")
def others():
    return testing.run(3, other_traffic)


def test_ulysses_exchanges_tokens_for_heads_twice_each_way(others):
    for _, found, _ in others:
        for t, (forward, backward) in found.items():
            # two key heads are repeated to six, which three ranks can share
            bytes_of_token = (12 * 3 + 6 * 3 + 6 * 3 + 12 * 3) * 8
            t = 6 if t == "packed" else t
            assert forward.calls["exchange"] == backward.calls["exchange"] == 2
            assert forward.received["exchange"] == backward.received["exchange"] == 2 * t * bytes_of_token // 3
        assert [found[t][0].calls["gather"] for t in (6, 12, "packed")] == [1, 1, 2]
        assert not any(backward.calls["gather"] for _, backward in found.values())


@pytest.mark.parametrize("name", LSM)
def test_a_chain_passes_on_one_memory_each_way(name, others):
    for rank, _, rows in others:
        size = start(name, *make(name, b=1, t=1, h=2, k=3, v=4)).numel() * 8
        for t in (6, 12):
            forward, backward = rows[name, t]
            assert dict(forward.calls) == dict(backward.calls) == {"give": 1, "take": 1}
            assert forward.received["take"] == (size if rank > 0 else 0)
            assert backward.received["take"] == (size if rank < 2 else 0)


COUNTED = ("recurrence", "short_convolution", "token_shift", "running_sum")


def layer_traffic():
    """Of every published layer: which of the ops it calls, and what it receives."""
    found = {}
    for name, t in itertools.product(AFFINE, (4, 8)):
        over, called = lasp.over(ops, comm.world()), []

        def spied(name, over=over, called=called):
            def run(*args, **named):
                called.append(name)
                return getattr(over, name)(*args, **named)

            return run

        layer = Layer(name, ops=over._replace(**{n: spied(n) for n in COUNTED}))
        x = draw(1, t, 12).requires_grad_()
        with comm.counted() as forward:
            y = layer(x, cu_seqlens=torch.tensor([0, t], dtype=torch.int32))[0]
        with comm.counted() as backward:
            y.sum().backward()
        found[name, t] = called, forward, backward
    return found


@pytest.fixture(scope="module")
def layers():
    return testing.run(3, layer_traffic)


@pytest.mark.parametrize("name", AFFINE)
def test_a_layer_gathers_its_span_and_its_nearest_neighbours(name, layers):
    for rank in layers:
        called, forward, backward = rank[name, 4]
        assert called.count("recurrence") == 1  # of all memories of a mixture, too
        assert dict(forward.calls) == dict(backward.calls) == {"gather": len(called)}
        longer = rank[name, 8]
        assert longer[0] == called
        assert (longer[1].received, longer[2].received) == (forward.received, backward.received)


# --------------------------------------------------------------------------------------- memories that come late


@pytest.mark.parametrize("name", LATE)
@given(
    t=st.integers(0, 70),
    extreme=st.booleans(),
    borders=st.lists(st.integers(0, 70), max_size=3),
    seed=st.integers(0, 99),
)
def test_what_a_memory_adds_afterwards(name, t, extreme, borders, seed):
    row, tokens, constants = make(name, b=1, t=t, seed=seed)
    if extreme and "g" in tokens and t:
        tokens["g"][:, seed % t] = -torch.inf
    M, cu = start(name, row, tokens, constants), None
    if borders:
        cu = torch.tensor(sorted([0, *(min(x, t) for x in borders), t]), dtype=torch.int32)
    span, wanted = late.span(row, tokens, constants, cu), exact.span(row, tokens, constants, cu)
    torch.testing.assert_close((span.A, span.S), (wanted.A, wanted.S), rtol=1e-10, atol=1e-12)
    first = lasp.tokens_of_first(tokens, cu)
    nothing = ops.recurrence(row, tokens, constants, None, cu)
    o = lasp.added(nothing[0], late.seen(row, first, constants, M))
    last = nothing[1] + lasp.for_first(late.left_of(row, first, constants, M), cu)
    wanted = exact.recurrence(row, tokens, constants, lasp.for_first(M, cu), cu)
    torch.testing.assert_close((o, last), wanted, rtol=1e-10, atol=1e-12)


@given(extreme=st.sampled_from([0.0, -torch.inf, -1e4]))
def test_gradients_of_what_comes_late_are_finite_whatever_the_gates(extreme):
    for name in LATE:
        row, tokens, constants = make(name, b=1, t=6)
        if "g" in tokens:
            tokens["g"][:, 2:4] = extreme
        wanted = leaves(tokens, constants)
        M = start(name, row, tokens, constants)
        y = late.seen(row, tokens, constants, M).sum() + late.written(row, tokens, constants).sum()
        for x in torch.autograd.grad(y, wanted, materialize_grads=True):
            assert torch.isfinite(x).all(), name


def order_of_events() -> dict:
    """What happens when in a layer: gathers begin and end, tokens run; forward, and then backward."""
    found, events = {}, []
    begin, end = comm.begin_gather, comm.end_gather
    comm.begin_gather = lambda *x: (events.append("begin"), begin(*x))[1]
    comm.end_gather = lambda *x: (events.append("end"), end(*x))[1]

    class Ran(torch.autograd.Function):
        @staticmethod
        def forward(ctx, o):
            return o.view_as(o)

        @staticmethod
        def backward(ctx, do):
            events.append("run")
            return do

    def run(*inputs):
        events.append("run")
        o, last = ops.recurrence(*inputs)
        return Ran.apply(o), last

    over = lasp.over(ops._replace(recurrence=run), comm.world())
    for name in AFFINE:
        call, inputs = CALLS[name]
        tokens, constants = inputs(1, 6)
        leaves(tokens, constants)
        events.clear()
        call(over, tokens | constants, None).sum().backward()
        found[name] = list(events)
    return found


def test_tokens_run_while_the_gather_is_under_way():
    """Those of late rows, both ways; the others wait for their memory."""
    for rank in testing.run(3, order_of_events):
        for name, events in rank.items():
            both = ["begin", "run", "end"] * 2 if name in LATE else ["begin", "end", "run", "run", "begin", "end"]
            assert events == both, name


# ------------------------------------------------------------------------------------------------ brief transitions


@pytest.mark.parametrize("name", [name for name in LSM if LSM[name].decay.__name__ in BRIEF])
@given(t=st.integers(0, 9), border=st.booleans(), seed=st.integers(0, 99))
def test_a_few_numbers_make_up_the_whole_transition(name, t, border, seed):
    row, tokens, constants = make(name, b=1 + (not border), t=t, seed=seed)
    cu = torch.tensor([0, t // 2, t], dtype=torch.int32) if border else None
    A = ops.span(row, tokens, constants, cu).A
    sums, given_constants, word = brief(row, tokens, constants, cu)
    torch.testing.assert_close(rebuilt(sums, given_constants, word), A, rtol=1e-12, atol=1e-12)
    assert sums.numel() < A.numel()


# ------------------------------------------------------------------------------------------------------ the layout


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 12),
    data=st.data(),
)
def test_who_sees_whom_is_known_before_anything_travels(lengths, window, data):
    t, ends = sum(lengths), [0, *itertools.accumulate(lengths)]
    inner = data.draw(st.lists(st.integers(0, t), max_size=4))
    cu = torch.tensor(sorted([0, *inner, t]), dtype=torch.int32)
    begins = torch.repeat_interleave(cu[:-1], cu.diff())  # of every token, its document's first
    low = begins if window is None else torch.maximum(begins, torch.arange(t) - window + 1)
    locals_ = [lasp.cut_borders(cu, i, j) for i, j in itertools.pairwise(ends)]
    opened = [0]
    for start_, borders in zip(ends, locals_, strict=False):
        opened.append(start_ + int(borders[-2]) if len(borders) > 2 else opened[-1])
    far, place = 0, torch.arange(t)
    for rank, borders in enumerate(locals_):
        layout = attention.Layout(rank, ends, opened[:-1])
        own, seen = place[ends[rank] : ends[rank + 1]], torch.zeros(lengths[rank], t, dtype=torch.bool)
        for back in range(layout.rounds(window) + 1):
            where = (ends, rank, layout.opened[rank], int(borders[1]), window)
            part = attention.part_of(back, borders, *where)
            if part is not None:
                theirs = place[ends[rank - back] : ends[rank - back + 1]][part.columns]
                block = part.sight.seen(slice(None), len(own[part.rows]), len(theirs), "cpu")
                assert block.any(1).all()
                seen[part.rows, theirs] = block
        assert torch.equal(seen, (place <= own[:, None]) & (place >= low[own, None]))
        if len(own):
            owner = next(r for r in range(len(lengths)) if low[own].min() < ends[r + 1])
            far = max(far, rank - owner)
            assert layout.earliest(rank, window) <= owner
    assert far <= layout.rounds(window) <= len(lengths) - 1
    if len(cu.unique()) <= 2:
        assert layout.rounds(window) == far  # one document: no round too many


# ----------------------------------------------------------------------------------------------------- refusals


def refusals() -> list[str]:
    group = comm.world()
    q, k = draw(1, 4, 4, 3), draw(1, 4, 2, 3)
    row, tokens, constants = make("ttt_linear")
    over = {way: lasp.over(ops, group, attention=way) for way in WAYS}
    calls = [
        lambda: over["ulysses"].attention(q, k, k),
        lambda: over["ring"].attention(q, k, k, ()),
        lambda: over["ulysses"].attention(q, k, k, ()),
        lambda: over["ring"].attention(q[:, :, :3], k, k),
        lambda: over["ring"].attention(q, k, k, window=0),
        lambda: over["gather"].attention(q, k, k, window=0),
        lambda: over["gather"].recurrence(row, tokens, constants),
        lambda: lasp.over(ops, group, how="ring").recurrence(row, tokens, constants, draw(2, 2, 10, 4)),
        lambda: lasp.over(ops, group, attention="star"),
        lambda: lasp.over(ops, group, how="ulysses"),
    ]
    return refused(calls)


def test_what_no_way_can_do_is_refused_in_one_line():
    words = ["each of 3 ranks an equal share of the heads, and there are 4", *["no state can be given"] * 2]
    words += ["cannot share 2 key heads", *["window is 0"] * 2, "TTT-linear is not affine", "no state can be given"]
    words += ["'star' for attention", "'ulysses' for states over a cut sequence: expected one of gather, ring"]
    for rank in testing.run(3, refusals):
        assert all(word in line and "\n" not in line for word, line in zip(words, rank, strict=True)), rank


@pytest.mark.parametrize(
    ("model", "how", "message"),
    [
        ({"lsm": "ttt_linear", "pattern": "LNE"}, {}, "'ttt_linear' is not affine.*--mesh.states ring"),
        ({"heads": 4, "pattern": "LNE"}, {"attention": "ulysses"}, "3 ranks an equal share.*there are 4"),
        ({"lsm": "ttt_linear", "pattern": "LNE"}, {"states": "ring"}, None),
        ({"heads": 4, "pattern": "LE"}, {"attention": "ulysses"}, None),
        ({"heads": 6, "pattern": "LNE"}, {"attention": "ulysses"}, None),
    ],
)
def test_the_trainer_says_so_before_it_starts(model, how, message):
    import train  # a program: where only the packages are, the other laws still run

    config = train.Train(model=train.Model(**{"width": 48, "router": "linear_moe"} | model))
    place = mesh.Mesh(sequence_size=3, **how)
    if message is None:
        train.refuse_to_cut(config, place)
        return
    with pytest.raises(ValueError, match=message) as caught:
        train.refuse_to_cut(config, place)
    assert "\n" not in str(caught.value)


def test_one_rank_is_left_alone():
    for how in ({}, {"attention": "ring"}, {"attention": "ulysses"}, {"how": "ring"}):
        assert lasp.over(ops, None, **how) is ops


# --------------------------------------------------------------------------------------------------- whole trainings

TRAINED = {
    "ring": ("gla", {"window": 4}, {"attention": "ring"}),
    "ulysses": ("mamba2", {"heads": 3, "width": 12, "attention": "latent"}, {"attention": "ulysses"}),
    "chain": ("ttt_linear", {"mini_batch": 4}, {"states": "ring", "attention": "ring"}),
}


def trained():
    found = {}
    for (name, (lsm, model, how)), recompute in itertools.product(TRAINED.items(), (False, True)):
        found[name, recompute] = three_steps(lsm, mesh.Degrees(sequence=3, **how), recompute, **model)
    return found


@pytest.fixture(scope="module")
def trainings():
    alone = {name: three_steps(lsm, mesh.Degrees(), False, **model) for name, (lsm, model, _) in TRAINED.items()}
    return alone, testing.run(3, trained)


@pytest.mark.parametrize("name", TRAINED)
def test_three_steps_in_every_way_are_those_of_one_process(name, trainings):
    alone, ranks = trainings
    for rank, recompute in itertools.product(ranks, (False, True)):
        torch.testing.assert_close(rank[name, recompute][0], alone[name][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank[name, recompute][1], alone[name][1], rtol=1e-10, atol=1e-12)
