"""The laws of one recurrence, for every row of the table, in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inputs import assert_within_budget, compiled_alike, leaves, make, pieces, start
from reference import chunked, example, forms, recurrence, span
from reference.lsm import LSM
from reference.normal import has_normal
from reference.span import LEFT, TRANSITION, Span, apply, compose, fold, fold_back, transition

SCANNED = [name for name in LSM if not has_normal(LSM[name]) and forms.of(LSM[name]).run is forms.scan]
SCANNED.remove("fast_weights_printed")  # its gate is as large as a memory for every token
SHAPES = {
    "t": st.integers(1, 40),
    "k": st.integers(1, 6),
    "v": st.integers(1, 6),
    "seed": st.integers(0, 999),
}
rows = pytest.mark.parametrize("name", LSM)
same = {"rtol": 1e-9, "atol": 1e-10}


def gradients(run, row, tokens, constants, M):
    """Outputs, last memory, and the gradient of a random function of both for every input."""
    tokens, constants = dict(tokens), dict(constants)
    memory = {"M": M}
    wanted = leaves(tokens, constants, memory)
    o, last = run(row, tokens, constants, memory["M"])
    rng = torch.Generator().manual_seed(5)
    loss = sum((x * torch.randn(x.shape, generator=rng, dtype=x.dtype)).sum() for x in (o, last))
    return [o.detach(), last.detach(), *torch.autograd.grad(loss, wanted, materialize_grads=True)]


@rows
@given(**SHAPES, chunk=st.sampled_from([1, 2, 8, 64]))
def test_chunks_equal_the_loop(name, t, k, v, seed, chunk):
    row, tokens, constants = make(name, t=t, k=k, v=v, seed=seed)
    M = start(name, row, tokens, constants)
    wanted = gradients(recurrence.recurrence, row, tokens, constants, M)
    got = gradients(lambda *x: chunked.recurrence(*x, chunk=chunk), row, tokens, constants, M)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **same)


@pytest.mark.parametrize("name", SCANNED)
def test_scans_go_on_from_piece_to_piece_and_keep_only_their_inputs(name, monkeypatch):
    monkeypatch.setattr(forms, "PIECE", 64)
    row, tokens, constants = make(name, t=150, k=8, v=16)
    M, kept = start(name, row, tokens, constants), []
    for a, b in zip(
        *(gradients(run, row, tokens, constants, M) for run in (chunked.recurrence, recurrence.recurrence)), strict=True
    ):
        torch.testing.assert_close(a, b, **same)
    leaves(tokens, constants)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: None):
        chunked.recurrence(row, tokens, constants, M)
    inputs = sum(x.numel() for x in tokens.values()) + 3 * sum(x.numel() for x in (M, *constants.values()))
    assert sum(kept) < 2 * inputs < 150 * M.numel()


@rows
@pytest.mark.parametrize("run", [recurrence.recurrence, chunked.recurrence])
@given(**SHAPES, data=st.data())
def test_memory_carries_over_a_cut(name, run, t, k, v, seed, data):
    row, tokens, constants = make(name, t=t, k=k, v=v, seed=seed)
    cut = data.draw(st.integers(0, t))
    whole, last = run(row, tokens, constants)
    head, M = run(row, pieces(tokens, 0, cut), constants)
    tail, M = run(row, pieces(tokens, cut, t), constants, M)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, **same)
    torch.testing.assert_close(M, last, **same)


@rows
@given(**SHAPES)
def test_steps_equal_the_whole(name, t, k, v, seed):
    row, tokens, constants = make(name, t=t, k=k, v=v, seed=seed)
    whole, last = chunked.recurrence(row, tokens, constants)
    M, o = None, []
    for i in range(t):
        y, M = recurrence.step(row, pieces(tokens, i, i + 1), constants, M)
        o.append(y)
    torch.testing.assert_close(torch.cat(o, 1), whole, **same)
    torch.testing.assert_close(M, last, **same)


@rows
@pytest.mark.parametrize("run", [recurrence.recurrence, chunked.recurrence])
def test_no_token_sees_a_later_one_or_another_sequence(name, run):
    row, tokens, constants = make(name, t=11)
    wanted = leaves(tokens)
    o, _ = run(row, tokens, constants)
    for gradient in torch.autograd.grad(o[1, 6].sum(), wanted):
        assert gradient[0].abs().max() == 0 and gradient[1, 7:].abs().max() == 0
        assert gradient[1, :7].abs().max() > 0


@st.composite
def borders(draw):
    lengths = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 5, 7, 17, 21]), min_size=1, max_size=5))
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@rows
@pytest.mark.parametrize("run", [recurrence.recurrence, chunked.recurrence])
@given(cu_seqlens=borders(), seed=st.integers(0, 99))
def test_packed_documents_equal_each_alone(name, run, cu_seqlens, seed):
    n, t = len(cu_seqlens) - 1, int(cu_seqlens[-1])
    row, tokens, constants = make(name, b=1, t=t, seed=seed)
    M = start(name, row, tokens, constants, n=n)
    o, last = run(row, tokens, constants, M, cu_seqlens)
    for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
        alone, end = recurrence.recurrence(row, pieces(tokens, a, b), constants, M[i : i + 1])
        torch.testing.assert_close(o[:, a:b], alone, **same)
        torch.testing.assert_close(last[i : i + 1], end, **same)


@rows
@given(
    t=st.integers(0, 20),
    cut=st.integers(0, 20),
    seed=st.integers(0, 99),
    run=st.sampled_from([span.span, chunked.span]),
)
def test_a_span_is_what_its_tokens_do(name, t, cut, seed, run):
    row, tokens, constants = make(name, t=t, seed=seed)
    if transition(row) is None:
        with pytest.raises(ValueError, match=r"not affine in its memory.*use another row"):
            run(row, tokens, constants)
        return
    M, cut = start(name, row, tokens, constants), min(cut, t)
    whole = run(row, tokens, constants)
    torch.testing.assert_close(apply(whole, M), recurrence.recurrence(row, tokens, constants, M)[1], **same)
    early, late = (run(row, pieces(tokens, *x), constants) for x in ((0, cut), (cut, t)))
    for a, b in zip(compose(late, early)[:2], whole[:2], strict=True):
        torch.testing.assert_close(a, b, **same)


THETA, LONG = torch.tensor([0.1, 1.7, 9.3]).view(1, 3, 1), 65521  # prime: no sum of angles is a round number
TURNING = {
    "the same for all": lambda x: LEFT[recurrence.spiral](x | {"g": 0 * x["theta"]}),
    "a span's": lambda x: chunked.span(LSM["gate_loop"], spread_out(x)).A,
    "a chunk's": lambda x: chunked.recurrence(LSM["gate_loop"], spread_out(x), {}, 1 + x["v"].new_zeros(1, 1, 6, 1))[1],
}


def spread_out(x):
    """The angles for every token of texts that write nothing."""
    theta = x["theta"].mT.expand(1, LONG, 1, 3)
    return {"q": 0 * theta, "k": 0 * theta, "v": x["v"], "g": 0 * theta, "theta": theta}


@pytest.mark.parametrize("turned", TURNING)
def test_angles_of_long_texts_keep_their_digits(turned):
    x = {"v": torch.zeros(1, LONG, 1, 1), "theta": THETA}
    got, wanted = (TURNING[turned](y) for y in (x, {n: y.double() for n, y in x.items()}))
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in LSM if transition(LSM[n]) == "matrix"])
def test_chunks_of_more_tokens_than_keys_keep_their_digits(name):
    """Up to 1.7 times the loop's error on average; with 64 tokens to a system of equations, 4 to 9 times."""
    row, tokens, constants = make(name, b=1, t=64, h=64, k=2, v=3, dtype=torch.float32, strength=0.01)
    M = start(name, row, tokens, constants)
    wide = [{n: x.double() if x.is_floating_point() else x for n, x in y.items()} for y in (tokens, constants)]
    exact = recurrence.recurrence(row, *wide, M.double())[0]
    runs = chunked.recurrence, recurrence.recurrence
    got, plain = ((run(row, tokens, constants, M)[0] - exact).square().mean().sqrt() for run in runs)
    assert got < 2.5 * plain


def spans(kind, lengths, seed=0, k=4, v=2):
    rng = torch.Generator().manual_seed(seed)
    shape = [2, *recurrence.measured(TRANSITION[kind].shape, {"h": 2, "k": k, "v": v, "l": 2})]
    draw = lambda s: torch.randn(s, generator=rng, dtype=torch.float64)
    return [Span(draw(shape), draw([2, 2, k, v]), kind) for _ in range(lengths)]


@pytest.mark.parametrize("kind", TRANSITION)
@given(seed=st.integers(0, 99))
def test_spans_compose_associatively(kind, seed):
    a, b, c = spans(kind, 3, seed)
    for x, y in zip(compose(compose(c, b), a)[:2], compose(c, compose(b, a))[:2], strict=True):
        torch.testing.assert_close(x, y)
    M = a.S + 1
    torch.testing.assert_close(apply(compose(b, a), M), apply(b, apply(a, M)))


@pytest.mark.parametrize("kind", TRANSITION)
@given(n=st.integers(0, 4), seed=st.integers(0, 99))
def test_fold_back_is_the_gradient_of_fold(kind, n, seed):
    many = [s._replace(A=s.A.requires_grad_(), S=s.S.requires_grad_()) for s in spans(kind, n, seed)]
    M = torch.ones(2, 2, 4, 2, dtype=torch.float64, requires_grad=True)
    memories = fold(many, M)
    G = [torch.randn(m.shape, dtype=m.dtype) for m in memories]
    loss = sum((m * g).sum() for m, g in zip(memories, G, strict=True))
    cotangents = fold_back(many, G[:-1], G[-1])
    torch.testing.assert_close(torch.autograd.grad(loss, M, retain_graph=True)[0], cotangents[0])
    for i, s in enumerate(many):
        dA, dS = torch.autograd.grad(loss, [s.A, s.S], retain_graph=True)
        torch.testing.assert_close(dS, cotangents[i + 1])
        torch.testing.assert_close(dA, TRANSITION[kind].gradient(s.A, cotangents[i + 1], memories[i]))


@rows
@pytest.mark.parametrize("run", [recurrence.recurrence, chunked.recurrence])
def test_gradcheck(name, run):
    row, tokens, constants = make(name, b=1, t=5, h=1, k=2, v=2)
    M = start(name, row, tokens, constants)
    names = [n for n, x in (tokens | constants).items() if x.is_floating_point()]
    wanted = leaves(tokens, constants)

    def function(M, *values):
        x = tokens | constants | dict(zip(names, values, strict=True))
        return run(row, {n: x[n] for n in tokens}, {n: x[n] for n in constants}, M)

    assert torch.autograd.gradcheck(function, (M.requires_grad_(), *wanted))


POLYNOMIAL = {"based": lambda dot, d: 1 + dot / d**0.5 + dot**2 / (2 * d), "rebased": lambda dot, d: dot**2 / d}


@pytest.mark.parametrize("name", POLYNOMIAL)
@given(d=st.integers(1, 20), seed=st.integers(0, 99))
def test_features_are_polynomials_of_the_product(name, d, seed):
    q, k = torch.randn(2, 7, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    got = (LSM[name].features(q) * LSM[name].features(k)).sum(-1)
    torch.testing.assert_close(got, POLYNOMIAL[name]((q * k).sum(-1), d), rtol=1e-12, atol=1e-12)


def vectors(*numbers):
    """One sequence, one head."""
    return torch.tensor(numbers, dtype=torch.float64)[None, :, None]


BY_HAND = {
    # Two tokens learn from an empty memory, which becomes (6, 4); the third finds 8 there where 1 should be.
    "ttt": (
        {
            "q": vectors([1, 0], [1, -1], [1, 1]),
            "k": vectors([1, 0], [1, 1], [0, 2]),
            "v": vectors([2], [4], [1]),
            "beta": vectors(1, 1, 1),
            "place": torch.tensor([[0, 1, 0]]),
        },
        {},
        [[2], [2], [-4]],
        [[6], [-10], [6], [4]],
    ),
    # Half of the memory and half of the momentum stay. Surprises 4, -2, 2; momenta (4, 0), (0, -2), (0, 1).
    "titans": (
        {
            "q": vectors([1, 1], [1, 2], [3, 1]),
            "k": vectors([1, 0], [1, 1], [0, 1]),
            "v": vectors([4], [2], [0]),
            "g": vectors(0.5, 0.5, 0.5).log(),
            "f": vectors(0.5, 0.5, 0.5).log(),
            "beta": vectors(0.5, 0.5, 0.5),
        },
        {},
        [[4], [-2], [3]],
        [[1], [0], [0], [1]],
    ),
    # With this scale LN(z) of z = (-1, 0, 1) is z itself. The target v - k = (-1, 3, -5) makes the slope
    # z - target without its mean 1 and its part along z: (-1, -4, 5) - 3 z = (2, -4, 2). Half is read, then committed.
    "ttt_linear": (
        {
            "q": vectors([0, 0, 1], [1, 0, 0]),
            "k": vectors([1, 0, 0], [0, 0, 0]),
            "v": vectors([0, 3, -5], [0, 0, 0]),
            "beta": vectors(1, 0),
            "place": torch.tensor([[0, 0]]),
            "reach": torch.tensor([[0.5, 0.5]]),
        },
        {
            "W": torch.tensor([[[-1, 0, 1], [0, 0, 0], [0, 0, 0], [0, 0, 0]]]),
            "last": torch.tensor([0.5]),
            "scale": torch.full((1, 3), 2 / 3, dtype=torch.float64).sqrt(),
            "shift": torch.zeros(1, 3),
        },
        [[-1 / 3**0.5, 2 / 3**0.5, 1 - 1 / 3**0.5], [1 - 3 / 13**0.5, 4 / 13**0.5, -1 / 13**0.5]],
        [[-1, 2, -1], [0, 0, 0], [0, 0, 0], [-1, 2, -1], *[[0, 0, 0]] * 4],
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("run", [recurrence.recurrence, chunked.recurrence])
def test_a_few_tokens_by_hand(name, run):
    tokens, constants, o, memory = BY_HAND[name]
    got = run(LSM[name], tokens, constants)
    wanted = vectors(*o), torch.tensor(memory, dtype=torch.float64)[None, None]
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [n for n in LSM if "g" in LSM[n].tokens])
@given(seed=st.integers(0, 99), t=st.sampled_from([1, 5, 63, 70]))
def test_extreme_gates(name, seed, t):
    # eight heads: the largest error of a few numbers is a matter of luck
    row, tokens, constants = make(name, t=t, h=8, k=4, v=3, seed=seed, dtype=torch.float32)
    tokens |= {n: example.extreme(tokens[n], seed) for n in example.GATES if n in tokens}
    M = start(name, row, tokens, constants)
    wide = [{n: x.double() if x.is_floating_point() else x for n, x in y.items()} for y in (tokens, constants)]
    exact = gradients(recurrence.recurrence, row, *wide, M.double())
    plain = gradients(recurrence.recurrence, row, tokens, constants, M)
    for i, triple in enumerate(
        zip(gradients(chunked.recurrence, row, tokens, constants, M), plain, exact, strict=True)
    ):
        assert_within_budget(*triple, what=f"{name} {i}")


@rows
def test_half_precision_inputs_give_half_precision_outputs_and_a_wide_memory(name):
    row, tokens, constants = make(name, dtype=torch.bfloat16)
    o, M = chunked.recurrence(row, tokens, constants)
    wide = {n: x.float() for n, x in tokens.items()}, {n: x.float() for n, x in constants.items()}
    assert o.dtype == torch.bfloat16 and M.dtype == torch.float32
    torch.testing.assert_close(M, chunked.recurrence(row, *wide)[1])


@pytest.mark.parametrize("name", ["mamba2", "gla", "gated_delta_net"])
def test_a_compiler_sees_one_graph_each_way_from_a_memory(name):
    row, tokens, constants = make(name, t=2)
    given = {**tokens, "memory": start(name, row, tokens, constants)}
    leaves(given)

    def f(memory, **tokens):
        o, last = recurrence.recurrence(row, tokens, constants, memory)
        return torch.cat([o.flatten(), last.flatten()]).sin()

    compiled_alike(f, given)


def test_a_row_without_a_chunk_form_is_named():
    row, tokens, constants = make("gla")
    row = row._replace(read=lambda M, before, x: M.sum(-2))
    with pytest.raises(NotImplementedError, match="GLA: a word has no normal form, and none has a chunk form"):
        chunked.recurrence(row, tokens, constants)


BAD = {
    "missing": (lambda x: x.pop("v"), "'v' is missing"),
    "ndim": (lambda x: x.update(v=x["v"][0]), r"v has shape .* expected 'b t h [kv]'"),
    "heads": (lambda x: x.update(v=x["v"][:, :, 1:]), r"has shape .* with h = [12]"),
}


@rows
@pytest.mark.parametrize("run", [recurrence.recurrence, chunked.recurrence])
@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_give_one_line(name, run, case):
    row, tokens, constants = make(name)
    spoil, message = BAD[case]
    spoil(tokens)
    with pytest.raises(ValueError, match=message) as caught:
        run(row, tokens, constants)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("borders", [[0, 5], [1, 13], [0, 9, 8, 13]])
def test_bad_borders_give_one_line(borders):
    row, tokens, constants = make("gla", b=1)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to t = 13"):
        chunked.recurrence(row, tokens, constants, None, torch.tensor(borders, dtype=torch.int32))


def test_transitions_are_what_the_words_say():
    kinds = {name: transition(row) for name, row in LSM.items()}
    assert kinds["linear_attention"] == kinds["mamba2"] == "scalar"
    assert kinds["gla"] == kinds["rwkv6"] == "channel"
    assert kinds["delta_net"] == kinds["kda"] == "matrix"
