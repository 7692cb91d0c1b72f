"""Without a mask: equal to the whole matrix of scores, both triangles, for every row that runs both ways; and cut."""

import itertools
from itertools import pairwise

import pytest
import torch
from einops import einsum
from hypothesis import given
from hypothesis import strategies as st

from data.stream import Batch
from inputs import leaves, make, pieces, refused
from parallel import comm, lasp, testing
from reference import exact, ops
from reference.bidirectional import both_ways, without_count
from reference.lsm import LSM
from reference.model import LanguageModel, initialize, starts
from reference.presets import Model

PLAIN = ["linear_attention", "lightning", "retention", "mamba2", "mamba3", "gla", "hgrn2", "rwkv6", "mom_gla"]
COUNTED = ["linear_attention_normalized", "based", "rebased"]
PRINTED = [f"{name}_printed" for name in ("retention", "rebased", "mamba2", "hgrn2", "rwkv6")]
ROWS = [*PLAIN, *COUNTED, "gated_fast_weights", *PRINTED]
EMPTY, BORDERS = [0, 0, 3, 3, 4, 9, 9], [0, 2, 3, 9]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64)


def between(g: torch.Tensor, alone: bool) -> torch.Tensor:
    """b t j ...: the sum of the gates that lie between j and t: those of (j, t] or [t, j), alone: of neither end."""
    t = g.shape[1]
    sums = g.new_zeros(g.shape[0], t, *g.shape[1:])
    for i, j in itertools.product(range(t), range(t)):
        low, high = (j + 1, i + (not alone)) if j <= i else (i + alone, j)
        sums[:, i, j] = g[:, low : max(low, high)].sum(1)
    return sums


def scored(name: str, tokens: dict, constants: dict) -> torch.Tensor:
    """The row of one document by its T×T matrix of scores, from the words' formulas alone."""
    row, x = LSM[name], tokens | constants
    q, v = x["q"], x["v"]
    shape = q.shape[:3]
    g = {"keep": lambda: q.new_zeros(*shape, 1), "fixed": lambda: x["g"].expand(shape)[..., None]}
    g |= {"scalar": lambda: x["g"][..., None], "channel": lambda: x["g"], "cross": lambda: x["g"]}
    g["timed"] = lambda: (x["A"] * x["beta"])[..., None]
    g = g[row.decay.__name__]()
    k = {"tied": lambda: 1 - x["g"].exp(), "weighed": lambda: x["beta"][..., None] * x["k"]}
    k = k.get(row.update.__name__, lambda: x["k"])()
    if row.features is not None:
        q, k = row.features(q), row.features(k)
    bonus = "u" in constants
    decay = between(g, bonus).exp()
    scores = einsum(q, k, decay.expand(*decay.shape[:4], q.shape[-1]), "b t h k, b j h k, b t j h k -> b t j h")
    if bonus:
        own = einsum(q, x["u"], k, "b t h k, h k, b t h k -> b t h")
        scores = torch.where(torch.eye(q.shape[1], dtype=bool)[None, ..., None], own[:, :, None], scores)
    columns = between(x["f"], False).exp() if "f" in tokens else v.new_ones(1)
    o = einsum(scores, columns.expand(*scores.shape, v.shape[-1]), v, "b t j h, b t j h v, b j h v -> b t h v")
    least = {"ratio": 1e-10, "damped": 1e-5}.get(row.read.__name__)
    return o if least is None else o / (scores.sum(2)[..., None] + least)


def by_document(name, tokens, constants, borders) -> torch.Tensor:
    return torch.cat([scored(name, pieces(tokens, a, b), constants) for a, b in pairwise(borders)], 1)


def packed(borders):
    return None if borders is None else torch.tensor(borders, dtype=torch.int32)


# ---------------------------------------------------------------------------------------------- the definition


def test_these_rows_run_both_ways_and_no_others():
    found = []
    for name, row in LSM.items():
        try:
            without_count(row)
        except ValueError as error:
            assert row.title in str(error) and str(error).count("\n") == 0
            assert f"got {row.decay.__name__}, {row.update.__name__} and {row.read.__name__}" in str(error)
        else:
            found.append(name)
    assert set(found) == set(ROWS)


@pytest.mark.parametrize("name", ROWS)
@given(t=st.integers(1, 8), k=st.integers(1, 3), v=st.integers(1, 3), b=st.integers(1, 2), seed=st.integers(0, 99))
def test_a_row_equals_its_matrix_of_scores(name, t, k, v, b, seed):
    row, tokens, constants = make(name, b=b, t=t, k=k, v=v, seed=seed)
    wanted = scored(name, tokens, constants)
    for one in (ops, exact):
        o, memory = both_ways(one).recurrence(row, tokens, constants)
        assert memory is None
        torch.testing.assert_close(o, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("borders", [EMPTY, BORDERS])
@pytest.mark.parametrize("name", ROWS)
def test_documents_do_not_see_each_other(name, borders):
    """In outputs and gradients."""
    row, tokens, constants = make(name, b=1, t=9)
    wanted = leaves(tokens, constants)
    o, _ = both_ways(ops).recurrence(row, tokens, constants, None, packed(borders))
    right = by_document(name, tokens, constants, borders)
    torch.testing.assert_close(o, right, rtol=1e-9, atol=1e-10)
    cotangent = draw(*o.shape, seed=7) * right.detach().abs().clamp(min=1).reciprocal()  # a ratio's may be huge
    got, right = (torch.autograd.grad((x * cotangent).sum(), wanted) for x in (o, right))
    torch.testing.assert_close(got, right, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ROWS)
def test_a_reversed_sequence_gives_reversed_outputs(name):
    row, tokens, constants = make(name, b=2, t=7)
    forwards = both_ways(ops).recurrence(row, tokens, constants)[0]
    backwards = both_ways(ops).recurrence(row, {n: x.flip(1) for n, x in tokens.items()}, constants)[0]
    torch.testing.assert_close(backwards.flip(1), forwards)


@pytest.mark.parametrize("name", ROWS)
def test_no_token_at_all(name):
    row, tokens, constants = make(name, b=2, t=0)
    for one in (ops, exact):
        assert both_ways(one).recurrence(row, tokens, constants)[0].shape == tokens["v"].shape


def test_gates_that_forget_everything_leave_the_token_alone():
    row, tokens, _ = make("gla", b=1, t=5)
    tokens["g"] = torch.full_like(tokens["g"], -torch.inf)
    wanted = (tokens["q"] * tokens["k"]).sum(-1, keepdim=True) * tokens["v"]
    torch.testing.assert_close(both_ways(ops).recurrence(row, tokens)[0], wanted)


@pytest.mark.parametrize("name", ["gla", "based"])
def test_low_precision_rounds_once(name):
    row, tokens, constants = make(name, t=9, dtype=torch.bfloat16)
    wide = {n: x.double() for n, x in tokens.items()}
    o = both_ways(ops).recurrence(row, tokens, constants)[0]
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(o.double(), scored(name, wide, constants), rtol=2**-8, atol=1e-5)


# ------------------------------------------------------------------------------------------------- softmax attention


def softmax_of_scores(q, k, v, borders, window, scale):
    place, document = torch.arange(q.shape[1]), torch.zeros(q.shape[1], dtype=torch.long)
    for border in borders[1:-1]:
        document[border:] += 1
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    seen = document[:, None] == document
    if window is not None:
        seen &= (place[:, None] - place).abs() < window
    scores = einsum(q, k, "b t h d, b j h d -> b h t j") * (q.shape[-1] ** -0.5 if scale is None else scale)
    return einsum(scores.masked_fill(~seen, -torch.inf).softmax(-1), v, "b h t j, b j h e -> b t h e")


@pytest.mark.parametrize("window", [None, 1, 2, 9])
@pytest.mark.parametrize("borders", [None, EMPTY, BORDERS])
def test_attention_sees_the_whole_document(borders, window):
    q, k, v = draw(1, 9, 4, 3), draw(1, 9, 2, 3, seed=1), draw(1, 9, 2, 5, seed=2)
    o, past = both_ways(ops).attention(q, k, v, None, packed(borders), window, 0.3)
    assert past is None
    torch.testing.assert_close(o, softmax_of_scores(q, k, v, borders or [0, 9], window, 0.3))


@pytest.mark.parametrize("lsm", ["linear_attention_normalized", "gla", "mamba2"])
def test_a_model_sees_every_token_of_a_document(lsm):
    sizes = {"width": 8, "heads": 2, "vocabulary": 11, "experts": 4, "expert_width": 4, "dense_width": 8}
    model = LanguageModel(Model(pattern="LN", lsm=lsm, **sizes), both_ways(ops)).double().eval()
    initialize(model, 5, starts(model))
    tokens = torch.randint(11, (1, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = model(tokens).logits[:, 0]
        tokens[0, -1] = (tokens[0, -1] + 1) % 11
        assert (model(tokens).logits[:, 0] - first).abs().max() > 1e-9


# --------------------------------------------------------------------------------------------------- what is refused


def test_what_has_no_meaning_is_refused_in_one_line():
    both = both_ways(ops)
    row, tokens, constants = make("gla", t=1)
    delta = make("delta_net")
    calls = {
        "no state can be given": lambda: both.recurrence(row, tokens, constants, torch.zeros(2, 2, 4, 5)),
        "no state": lambda: both.attention(*[draw(1, 2, 1, 3)] * 3, ()),
        "GLA both ways has no memory that goes on": lambda: both.step(row, tokens, constants),
        "has no memory that goes on": lambda: both.span(row, tokens, constants),
        "DeltaNet has no form that runs both ways: expected decay keep,": lambda: both.recurrence(*delta),
        "'k' is missing": lambda: both.recurrence(row, {n: x for n, x in tokens.items() if n != "k"}),
    }
    for said, call in calls.items():
        with pytest.raises(ValueError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert both_ways(both).one_way is ops and both.name == "reference, both ways"


# ------------------------------------------------------------------------------------------------ over a cut sequence

SEGMENTS = {2: [(5, 4), (0, 9)], 3: [(5, 0, 4), (3, 3, 3), (0, 1, 8)]}
CUT = [None, (0, 5, 9), (0, 2, 3, 6, 9), (0, 3, 3, 9)]
SAME = ("retention", "mamba3", "mom_gla", "retention_printed", "hgrn2_printed", "rwkv6_printed")  # words as others
CASES = {
    w: list(itertools.product([*(name for name in ROWS if name not in SAME), "attention"], SEGMENTS[w], CUT))
    for w in SEGMENTS
}


def called(what, ops, x, cu_seqlens):
    if what == "attention":
        return ops.attention(x["q"], x["k"], x["v"], None, cu_seqlens, 4)[0]
    row = LSM[what]
    return ops.recurrence(row, {n: x[n] for n in row.tokens}, {n: x[n] for n in row.constants}, None, cu_seqlens)[0]


def error(what, lengths, borders) -> float:
    """The largest deviation of outputs and gradients on this rank from those of the whole sequence."""
    group, both = comm.world(), both_ways(ops)
    b, stop = (2 if borders is None else 1), sum(lengths[: comm.rank(group) + 1])
    start = stop - lengths[comm.rank(group)]
    if what == "attention":
        tokens, constants = {"q": draw(b, 9, 6, 3), "k": draw(b, 9, 2, 3), "v": draw(b, 9, 2, 4)}, {}
    else:
        _, tokens, constants = make(what, b=b, t=9, k=3, v=4, strength=0.3)
    mine, shared, cu = pieces(tokens, start, stop), dict(constants), packed(borders)
    wanted = leaves(tokens, constants)
    o = called(what, both, tokens | constants, cu)
    cotangent = draw(*o.shape, seed=7)
    grads = torch.autograd.grad((o * cotangent).sum(), wanted)
    right = [o[:, start:stop], *(g[:, start:stop] for g in grads[: len(tokens)]), *grads[len(tokens) :]]
    wanted = leaves(mine, shared)
    local = None if cu is None else lasp.cut_borders(cu, start, stop)
    with comm.counted() as forward:
        o = called(what, lasp.over(both, group, "ulysses"), mine | shared, local)
    with comm.counted() as backward:
        (o * cotangent[:, start:stop]).sum().backward()
    if what != "attention":
        assert dict(forward.calls) == dict(backward.calls) == {"gather": 1}  # for both directions
    got = [x.grad for x in wanted]
    got = [o, *got[: len(tokens)], *(comm.total(g, group) for g in got[len(tokens) :])]
    scale = [max(1.0, x.abs().max().item()) if x.numel() else 1.0 for x in right]
    assert all(x.shape == y.shape for x, y in zip(got, right, strict=True))
    return max([0.0, *((x - y).abs().max().item() / s for x, y, s in zip(got, right, scale, strict=True) if x.numel())])


def errors(cases) -> dict:
    return {case: error(*case) for case in cases}


@pytest.mark.parametrize("w", SEGMENTS)
def test_ranks_equal_one(w):
    for rank in testing.run(w, errors, CASES[w], seconds=120):
        wrong = {case: e for case, e in rank.items() if not e < 1e-12}
        assert not wrong and len(rank) == len(CASES[w])


def received(ops, name, t) -> list[dict]:
    """Bytes forward and backward."""
    row, tokens, constants = make(name, b=1, t=t, k=3, v=4)
    leaves(tokens, constants)
    with comm.counted() as forward:
        o = lasp.over(ops, comm.world()).recurrence(row, tokens, constants)[0]
    with comm.counted() as backward:
        o.sum().backward()
    return [dict(x.received) for x in (forward, backward)]


def travelled() -> dict:
    return {
        name: [received(ops, name, 5), received(both_ways(ops), name, 5), received(both_ways(ops), name, 10)]
        for name in ("retention", "gla", "rwkv6")
    }


def test_both_directions_are_twice_the_bytes_of_one_whatever_the_length():
    for rank in testing.run(2, travelled):
        for one, both, longer in rank.values():
            assert both == longer == [{"gather": 2 * way["gather"]} for way in one]


def model_error(lsm: str) -> float:
    """Of a hybrid's loss and gradients on my part of a packed row."""
    group, losses, grads = comm.world(), [], []
    sizes = {"width": 8, "heads": 2, "vocabulary": 11, "experts": 4, "expert_width": 4, "dense_width": 8}
    n = torch.arange(9)[None]
    whole = Batch(n % 11, n % 7, n, packed((0, 2, 9)), n)
    for own, batch in ((both_ways(ops), whole), (lasp.over(both_ways(ops), group, "ulysses"), None)):
        batch = batch or lasp.cut(whole, comm.size(group), comm.rank(group))
        model = LanguageModel(Model(pattern="LNL", lsm=lsm, **sizes), own).double()
        initialize(model, 5, starts(model))
        loss = model(batch.tokens, batch.labels, batch.positions, batch.cu_seqlens, batch.indices, key=0).losses.sum()
        loss.backward()
        losses.append(loss.detach())
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
    right, mine = [losses[0], *grads[0]], [comm.total(x, group) for x in (losses[1], *grads[1])]
    return max((x - y).abs().max().item() for x, y in zip(mine, right, strict=True))


def test_a_cut_model_is_the_whole_one():
    for rank in testing.run(2, lambda: {lsm: model_error(lsm) for lsm in ("gla", "mamba2", "mom_gla")}):
        assert all(e < 1e-10 for e in rank.values()), rank


def refusals() -> list[str]:
    group, both = comm.world(), both_ways(ops)
    q = draw(1, 2, 2, 3)
    assert lasp.over(both, group).name == "reference over 2 ranks of a sequence, both ways"
    calls = [
        lambda: lasp.over(both, group).attention(q, q, q),
        lambda: lasp.over(both, group, "ring").attention(q, q, q),
        lambda: lasp.over(both, group, how="ring"),
        lambda: both_ways(lasp.over(ops, group)),
        lambda: both_ways(lasp.over(both, group)),
        lambda: lasp.over(both, group).recurrence(*make("kda")),
    ]
    return refused(calls)


def test_what_cannot_be_cut_is_refused():
    first = "first let ops look both ways"
    for said in testing.run(2, refusals):
        expected = ("gather attention", "ring attention", "states ring", first, first, "Kimi Delta")
        for got, wanted in zip(said, expected, strict=True):
            assert wanted in got and "\n" not in got
