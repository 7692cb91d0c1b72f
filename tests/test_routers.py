"""Laws of the router table: every row, in the gate matrix G it stands for; then capacity."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from reference.assignment import assigned, transported
from reference.balance import LOSS
from reference.documents import Documents
from reference.noise import noise
from reference.routers import (
    QUEUE,
    ROUTER,
    Load,
    Router,
    Routing,
    as_they_are,
    by_position,
    by_table,
    compact,
    dense,
    evenly_hashed,
    hashed,
    load,
    noisy_choice,
    relu,
    rounded_down,
    route,
    row,
    second_by_chance,
    sigmoid,
    softmax,
    sqrt_softplus,
    sum_to_one,
)

# The rows that are the one formula (two of them only out of training), and corners of it that no row stands in.
CORNERS = {
    "post_sigmoid": Router("sigmoid of the chosen", "", score=sigmoid, post=True),
    "best_groups": Router("groups by the sum of three", "", group_best=3, scale=16.0),
}
SAME = (None, noisy_choice, second_by_chance)
ROWS = {
    name: router for name, router in ROUTER.items() if router.choose in SAME and router.weights != "slots"
} | CORNERS
# All that turn logits into G: Soft MoE has two matrices instead.
MATRIX = {name: router for name, router in ROUTER.items() if router.weights != "slots"}
every = pytest.mark.parametrize("name", ROWS)
matrix = pytest.mark.parametrize("name", MATRIX)
seeds = st.integers(0, 10**6)


def more(router, n, e, k, seed=0, training=True):
    """What the row looks at besides logits."""
    words = noise(seed, torch.arange(n), 1)[:, 0].mul(5).long()
    extra = {"listed": hashed(words, e, k, 3)} if "table" in router.weights else {}
    if router.weights == "gate and spread":
        extra["spread"] = torch.nn.functional.softplus(randn(n, e, seed=seed + 7)) + 0.01
    return extra | ({"draw": draws(n, e, seed)} if training else {})


def draws(n, e, seed=0):
    """Even numbers in (0, 1): a token's own depend on its number alone."""
    return lambda s: noise(seed + 31 * s, torch.arange(n), e).double() + 2.0**-25


def orders(n):
    return st.permutations(range(n)).map(lambda order: torch.tensor(order, dtype=torch.int64))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def cases(draw, name, n_max=12, e_max=8):
    """(logits : n e, k, bias) of a row: plain, full of ties, or all tokens alike."""
    fixed = ROWS[name].top_k
    n, e, seed = draw(st.integers(0, n_max)), draw(st.integers(fixed or 1, e_max)), draw(seeds)
    k = fixed or draw(st.integers(1, e))
    logits = 3 * randn(n, e, seed=seed)
    kind = draw(st.sampled_from(("plain", "ties", "alike")))
    logits = {"plain": logits, "ties": logits.round() / 2, "alike": logits[:1].expand(n, e)}[kind]
    bias = randn(e, seed=seed + 1) / 3 if ROWS[name].bias and draw(st.booleans()) else None
    return logits, k, bias


def plainly(router, logits, k, bias=None, groups=1, groups_kept=1):
    """One token after the other, in plain Python: the experts and gates of the formula."""
    index, gate = [], []
    for token in logits.tolist():
        e = len(token)
        odds = [math.exp(a) for a in token]
        scores = {softmax: [a / sum(odds) for a in odds], sigmoid: [a / (1 + a) for a in odds]}
        s = (scores | {sqrt_softplus: [math.sqrt(math.log1p(a)) for a in odds]})[router.score]
        choice = s if bias is None else [a + b for a, b in zip(s, bias.tolist(), strict=True)]
        members = [range(g * e // groups, (g + 1) * e // groups) for g in range(groups)]
        worth = [sum(sorted((choice[j] for j in m), reverse=True)[: router.group_best]) for m in members]
        best = sorted(range(groups), key=lambda g: (-worth[g], g))[:groups_kept]
        allowed = [j for g in best for j in members[g]]
        i = sorted(allowed, key=lambda j: (-choice[j], j))[:k]
        w = [s[j] for j in i]
        if (router.post and router.score is softmax) or router.renormalize is sum_to_one:
            w = [a / (sum(w) + router.eps) for a in w]
        index.append(i)
        gate.append([router.scale * a for a in w])
    return torch.tensor(index).view(-1, k), torch.tensor(gate, dtype=torch.float64).view(-1, k)


# ------------------------------------------------------------------------------------------------------- the rows


@every
@given(data=st.data())
def test_the_formula_in_plain_python(name, data):
    router = ROWS[name]
    logits, k, bias = data.draw(cases(name))
    routing = route(router, logits, k, bias, capacity=math.inf)
    index, gate = plainly(router, logits, k, bias)
    assert torch.equal(routing.index, index)
    torch.testing.assert_close(routing.gate, gate, rtol=1e-12, atol=1e-15)
    assert routing.index.dtype == torch.int64 and routing.kept.all()


@pytest.mark.parametrize("name", [n for n in ROWS if ROWS[n].group_best])
@given(data=st.data(), seed=seeds)
def test_groups(name, data, seed):
    router = ROWS[name]
    m, size = data.draw(st.integers(1, 4)), data.draw(st.integers(router.group_best, 4))
    kept = data.draw(st.integers(1, m))
    k = data.draw(st.integers(1, kept * size))
    logits, bias = randn(7, m * size, seed=seed), randn(m * size, seed=seed + 1) if router.bias else None
    routing = route(router, logits, k, bias, m, kept)
    index, gate = plainly(router, logits, k, bias, m, kept)
    assert torch.equal(routing.index, index)
    torch.testing.assert_close(routing.gate, gate, rtol=1e-12, atol=1e-15)
    assert all(len(set(i)) <= kept for i in (routing.index // size).tolist())
    for mine, free in zip(route(router, logits, k, bias, m, m), route(router, logits, k, bias), strict=True):
        assert torch.equal(mine, free)  # all groups open: no groups
    # Renaming whole groups, and experts inside a group, permutes G.
    order = torch.arange(m * size).view(m, size)[data.draw(orders(m))][:, data.draw(orders(size))].flatten()
    renamed = route(router, logits[:, order], k, bias if bias is None else bias[order], m, kept)
    torch.testing.assert_close(dense(renamed, m * size), dense(routing, m * size)[:, order])


@every
@given(data=st.data())
def test_k_distinct_experts_and_the_sum_of_their_gates(name, data):
    router = ROWS[name]
    logits, k, bias = data.draw(cases(name))
    routing = route(router, logits, k, bias, capacity=math.inf)
    assert routing.index.shape == routing.gate.shape == routing.kept.shape == (len(logits), k)
    assert all(len(set(i)) == k for i in routing.index.tolist())
    total = dense(routing, logits.shape[1]).sum(-1) / router.scale
    if router.renormalize is sum_to_one or (router.post and router.score is softmax):
        torch.testing.assert_close(total, torch.ones_like(total))
    elif router.score is softmax:
        assert (total <= 1 + 1e-12).all() and (k == logits.shape[1] or (total < 1).all())


@pytest.mark.parametrize("name", ["linear_moe", "v_moe"])
def test_all_experts_without_renormalisation_are_the_dense_mixture(name):
    logits = randn(5, 6)
    torch.testing.assert_close(dense(route(ROUTER[name], logits, 6, capacity=math.inf), 6), logits.softmax(-1))


@every
@given(data=st.data(), seed=seeds)
def test_permuting_experts_or_tokens_permutes_G(name, data, seed):
    router = ROWS[name]
    n, e = data.draw(st.integers(0, 9)), data.draw(st.integers(router.top_k or 1, 8))
    k = router.top_k or data.draw(st.integers(1, e))
    logits, bias = randn(n, e, seed=seed), randn(e, seed=seed + 1) if router.bias else None
    experts, tokens = data.draw(orders(e)), data.draw(orders(n))
    G = dense(route(router, logits, k, bias), e)  # (two pairs never have the same probability here)
    renamed = route(router, logits[:, experts], k, None if bias is None else bias[experts])
    torch.testing.assert_close(dense(renamed, e), G[:, experts])
    free = dense(route(router, logits, k, bias, capacity=math.inf), e)  # dropping by position minds the order
    torch.testing.assert_close(dense(route(router, logits[tokens], k, bias, capacity=math.inf), e), free[tokens])


@every
def test_equal_scores_go_to_the_first_experts(name):
    router = ROWS[name]
    k = router.top_k or 8
    routing = route(router, torch.zeros(3, 64), k, capacity=math.inf)
    assert routing.index.tolist() == [list(range(k))] * 3


@every
@given(data=st.data(), seed=seeds)
def test_constants_that_change_nothing(name, data, seed):
    router, shift = ROWS[name], data.draw(st.floats(-8, 8))
    k = router.top_k or data.draw(st.integers(1, 6))
    logits, bias = randn(6, 6, seed=seed), randn(6, seed=seed + 1) if router.bias else None
    routing = route(router, logits, k, bias)
    if router.score is softmax:
        shifted = route(router, logits + shift, k, bias)
        assert torch.equal(shifted.index, routing.index)
        torch.testing.assert_close(shifted.gate, routing.gate)
    if router.bias:
        assert torch.equal(route(router, logits, k, bias + shift).index, routing.index)


@pytest.mark.parametrize("name", [n for n in ROWS if ROWS[n].bias])
@given(data=st.data())
def test_the_bias_chooses_and_never_weighs(name, data):
    router = ROWS[name]
    logits, k, _ = data.draw(cases(name))
    logits, e = logits.clone().requires_grad_(), logits.shape[1]
    bias = randn(e, seed=3).requires_grad_()
    routing = route(router, logits, k, bias)
    chosen = router.score(logits).gather(-1, routing.index)
    whole = chosen.sum(-1, keepdim=True) + router.eps if router.renormalize is sum_to_one else 1
    torch.testing.assert_close(routing.gate, router.scale * chosen / whole)
    routing.gate.square().sum().backward()
    assert bias.grad is None and logits.grad is not None
    for with_zeros, without in zip(route(router, logits, k, torch.zeros(e)), route(router, logits, k), strict=True):
        assert torch.equal(with_zeros, without)
    hot = torch.zeros(e).index_fill(0, torch.tensor([e - 1]), 9.0)
    assert (route(router, logits, k, hot).index[:, 0] == e - 1).all()  # it does choose


@every
def test_arithmetic_is_float32_at_least(name):
    router = ROWS[name]
    k = router.top_k or 2
    logits = randn(9, 5, dtype=torch.float32)
    for dtype, expected in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        x = logits.to(dtype)
        routing = route(router, x, k)
        stats = load(router, x, routing)
        assert {routing.gate.dtype, stats.probability.dtype, stats.z.dtype, stats.entropy.dtype} == {expected}
        exact = route(router, x.double(), k)
        torch.testing.assert_close(routing.gate.double(), exact.gate, rtol=1e-6, atol=1e-7)


# ------------------------------------------------------------------------------------- what may be relied on, found


def trials(router, n=24, e=5, count=200):
    for seed in range(count):
        logits = randn(n, e, seed=seed) + torch.linspace(1, 0, e)  # the first experts are full first
        yield router.top_k or 2, logits, randn(e, seed=seed + count) if router.bias else None, seed


def differ(a, b, n):
    """Whether the first n rows of G differ by more than the last bit, which depends on a tensor's length."""
    return not torch.allclose(dense(a, 5)[:n], dense(b, 5)[:n], rtol=1e-12, atol=1e-12)


@matrix
def test_causal_as_flagged(name):
    """In training, change the last token; the other rows of G stay, or a counter-example is found."""
    router = MATRIX[name]

    def changed(k, logits, bias, seed):
        other = torch.cat([logits[:-1], -logits[-1:]])
        return differ(*(route(router, x, k, bias, **more(router, 24, 5, k, seed)) for x in (logits, other)), 23)

    found = any(changed(*trial) for trial in trials(router))
    assert found == (not router.causal())


@matrix
def test_prefix_stable_as_flagged(name):
    """Out of training, leave the second half away; the rows of G of the first half stay, or a counter-example is
    found."""
    router = MATRIX[name]

    def changed(k, logits, bias, seed):
        extra = more(router, 24, 5, k, seed, training=False)
        half = {key: x[:12] for key, x in extra.items()}
        return differ(route(router, logits, k, bias, **extra), route(router, logits[:12], k, bias, **half), 12)

    found = any(changed(*trial) for trial in trials(router))
    assert found == (not router.prefix_stable())


def test_the_flags_of_the_table():
    """By hand, so that a flag cannot change with a property's code."""
    looking_ahead = {"v_moe", "open_moe", "gshard", "st_moe", "expert_choice", "base", "sinkhorn", "soft"}
    assert {name for name in ROUTER if not ROUTER[name].causal()} == looking_ahead
    crowded = {"v_moe", "open_moe", "gshard", "st_moe", "expert_choice", "soft", "switch", "moe_mamba"}
    assert {name for name in ROUTER if not ROUTER[name].prefix_stable()} == crowded
    assert ROUTER["gshard"].causal(math.inf) and ROUTER["gshard"].prefix_stable(math.inf)
    assert ROUTER["gshard"].causal(queue=by_position) and not ROUTER["mixtral"].causal(1.0, QUEUE["probability"])


def test_switch_is_causal_but_not_prefix_stable():
    """The counter-example by hand: alone, the second token finds the expert full; in a longer text it has room."""
    logits = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert route(ROUTER["switch"], logits[:2], 1, capacity=1.0).kept.flatten().tolist() == [True, False]
    assert route(ROUTER["switch"], logits, 1, capacity=1.0).kept.flatten().tolist() == [True] * 4


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@matrix
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_choice_on_a_gpu(name, deterministic):
    """Ties, drops and noise included, with torch's deterministic mode on or off."""
    router, k = MATRIX[name], MATRIX[name].top_k or 2
    logits = randn(64, 8).round()
    logits[:32] = 0
    extra = more(router, 64, 8, k)
    there = {key: x.cuda() for key, x in extra.items() if key != "draw"} | {"draw": lambda s: extra["draw"](s).cuda()}
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        here, other = route(router, logits, k, **extra), route(router, logits.cuda(), k, **there)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(here.index, other.index.cpu()) and torch.equal(here.kept, other.kept.cpu())
    torch.testing.assert_close(here.gate, other.gate.cpu())


# ------------------------------------------------------------------------------------------------------- capacity


def queued(router, queue, routing, experts, k, factor, documents):
    """Which pairs find room, one at a time: documents apart, in the order that the queue's name says."""
    sizes, served = Counter(documents), Counter()
    gates = routing.gate.tolist()
    n, slots = routing.index.shape
    pairs = list(itertools.product(range(n), range(slots)))
    order = {
        "position": pairs,
        "slot": sorted(pairs, key=lambda p: p[1]),
        "probability": sorted(pairs, key=lambda p: -gates[p[0]][p[1]]),
        "priority": sorted(pairs, key=lambda p: (p[1], -max(gates[p[0]]))),
    }[queue]
    kept = torch.zeros(n, slots, dtype=torch.bool)
    for i, j in order:
        share = factor * k * sizes[documents[i]] / experts
        line = documents[i], routing.index[i, j].item()
        kept[i, j] = served[line] < max(1, (math.floor if router.room is rounded_down else math.ceil)(share))
        served[line] += 1
    return kept


@every
@pytest.mark.parametrize("queue", QUEUE)
@given(data=st.data(), factor=st.sampled_from((0.1, 0.5, 1.0, 1.25, 2.0)) | st.floats(0.01, 4.0))
def test_capacity(name, queue, data, factor):
    router, order = ROWS[name], QUEUE[queue]
    logits, k, bias = data.draw(cases(name))
    n, e = logits.shape
    documents = data.draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n))
    logits = logits.clone().requires_grad_()
    limits = {"capacity": factor, "queue": order}
    routing = route(router, logits, k, bias, documents=torch.tensor(documents, dtype=torch.int64), **limits)
    free = route(router, logits, k, bias, capacity=math.inf)
    assert torch.equal(routing.index, free.index)
    assert torch.equal(routing.kept, queued(router, queue, free, e, k, factor, documents))
    assert (routing.gate[~routing.kept] == 0).all()
    assert torch.equal(routing.gate[routing.kept], free.gate[routing.kept])  # not renormalised after dropping
    stats = load(router, logits, routing)
    assert stats.counts.sum() == n * k == stats.dropped.sum() + routing.kept.sum()
    assert torch.equal(stats.counts, (dense(free, e) > 0).sum(0))
    assert torch.equal(stats.dropped, stats.counts - (dense(routing, e) > 0).sum(0))
    for d in set(documents):
        mine = torch.tensor(documents) == d
        alone = route(router, logits[mine], k, bias, **limits)
        # Documents do not see each other. (Equal gates may differ in their last bit with a tensor's length.)
        alike = queue in ("probability", "priority") and free.gate[mine].unique().numel() < free.gate[mine].numel()
        assert alike or torch.equal(alone.kept, routing.kept[mine])
    if n:
        routing.gate.sum().backward()
        assert (logits.grad[~routing.kept.any(-1)] == 0).all()


@every
@given(data=st.data())
def test_room_for_all_keeps_all(name, data):
    logits, k, bias = data.draw(cases(name))
    n, e = logits.shape
    factor = float(load(ROWS[name], logits, route(ROWS[name], logits, k, bias)).counts.max()) * e / max(n * k, 1)
    assert route(ROWS[name], logits, k, bias, capacity=factor + 1e-9).kept.all()


def test_documents_compete_only_among_themselves():
    alike = torch.tensor([[1.0, 0]]).expand(8, 2)
    kept = route(ROUTER["switch"], alike, 1, capacity=0.5, documents=torch.tensor([5, 5, 5, 5, 0, 0, 0, 0])).kept
    assert kept.flatten().tolist() == [True, False, False, False] * 2
    assert route(ROUTER["switch"], alike, 1, capacity=0.5).kept.flatten().tolist() == [True] * 2 + [False] * 6


# ---------------------------------------------------------------------------------------------------------- load


@matrix
@given(data=st.data(), training=st.booleans(), seed=seeds)
def test_load_is_additive_over_documents(name, data, training, seed):
    router = MATRIX[name]
    n, e = data.draw(st.integers(0, 10)), data.draw(st.integers(1, 6))
    k, cut = router.top_k or data.draw(st.integers(1, e)), data.draw(st.integers(0, n))
    e = max(e, k)
    logits, extra = randn(n, e, seed=seed).round(decimals=1), more(router, n, e, k, seed, training)

    def part(rows):
        own = {key: x[rows] for key, x in extra.items() if key != "draw"}
        own |= {"draw": lambda s: extra["draw"](s)[rows]} if training else {}
        return load(router, logits[rows], route(router, logits[rows], k, **own), **own)

    extra["documents"] = (torch.arange(n) >= cut).long()
    whole = load(router, logits, route(router, logits, k, **extra), **extra)
    for name, total, a, b in zip(Load._fields, whole, part(slice(0, cut)), part(slice(cut, n)), strict=True):
        if name != "sequence" or not (router.offered or router.score is relu):  # there k is no number of slots
            torch.testing.assert_close(total, a + b)
    assert whole.tokens == n and {whole.counts.dtype, whole.dropped.dtype, whole.tokens.dtype} == {torch.int64}
    if router.score is not relu:
        torch.testing.assert_close(whole.probability.sum(), torch.tensor(float(n), dtype=torch.float64))


NOISY_SCORES = Router("noise, then a softmax over all", "", choose=noisy_choice, weights="gate and spread")


@pytest.mark.parametrize("router", [*MATRIX.values(), NOISY_SCORES], ids=[*MATRIX, "noisy_scores"])
@pytest.mark.parametrize("capacity", [None, math.inf])
def test_what_is_known_already_changes_nothing(router, capacity):
    """Scores that somebody has; that nobody is dropped; how documents are numbered. To the bit."""
    k, e = router.top_k or 2, 5
    capacity = None if router.offered else capacity
    logits, extra = randn(12, e).round(decimals=1), more(router, 12, e, k)
    names, numbers = torch.tensor([7, -1, 3]), torch.tensor([2, 0, 1])
    which = torch.arange(12) // 5
    plain = route(router, logits, k, **extra, documents=names[which], capacity=capacity)
    known = extra | {"documents": Documents(numbers[which], 4), "scores": router.score(logits)}
    routing = route(router, logits, k, **known, capacity=capacity)
    for got, wanted in zip(routing, plain, strict=True):
        assert torch.equal(got, wanted)
    kept = router.keeps_all(capacity)
    assert routing.kept.all() or not kept
    found = load(router, logits, routing, **known, all_kept=kept)
    for got, wanted in zip(found, load(router, logits, plain, **extra, documents=names[which]), strict=True):
        assert torch.equal(got, wanted)


def test_load_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, -math.inf]], dtype=torch.float64)
    stats = load(ROUTER["linear_moe"], logits, route(ROUTER["linear_moe"], logits, 1))
    p = torch.tensor([1 / 3 + 2 / 3, 1 / 3 + 1 / 3, 1 / 3], dtype=torch.float64)
    expected = Load(
        counts=torch.tensor([2, 0, 0]),
        dropped=torch.tensor([0, 0, 0]),
        first=torch.tensor([2, 0, 0]),
        probability=p,
        mass=p,
        importance=torch.tensor([1 / 3 + 2 / 3, 0, 0], dtype=torch.float64),
        chance=torch.tensor([2.0, 0, 0], dtype=torch.float64),
        sequence=torch.tensor(2 * 3 * 1.0 * (1 / 3 + 2 / 3) / 2, dtype=torch.float64),
        z=torch.tensor(2 * math.log(3) ** 2, dtype=torch.float64),
        entropy=torch.tensor(math.log(3) + math.log(3) - 2 / 3 * math.log(2), dtype=torch.float64),
        tokens=torch.tensor(2),
    )
    for got, want in zip(stats, expected, strict=True):
        torch.testing.assert_close(got, want)
    scores = randn(4, 3).sigmoid()
    stats = load(ROUTER["deepseek_v3"], randn(4, 3), route(ROUTER["deepseek_v3"], randn(4, 3), 2))
    torch.testing.assert_close(stats.probability, (scores / scores.sum(-1, keepdim=True)).sum(0))
    torch.testing.assert_close(stats.mass, scores.sum(0))


# ------------------------------------------------------------------------------------ rows with rules of their own


@given(n=st.integers(0, 20), e=st.integers(2, 6), seed=seeds)
def test_noisy_top_k(n, e, seed):
    """Out of training softmax of the chosen; in training the same of the noisy logits."""
    router, logits, k = ROUTER["noisy"], randn(n, e, seed=seed), 2
    quiet = route(router, logits, k, **more(router, n, e, k, seed, training=False))
    for a, b in zip(quiet, route(ROUTER["granite"], logits, k), strict=True):
        assert torch.equal(a, b)
    extra = more(router, n, e, k, seed)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(extra["draw"](0))
    loud = route(router, logits, k, **extra)
    for a, b in zip(loud, route(ROUTER["granite"], logits + extra["spread"] * normal, k), strict=True):
        torch.testing.assert_close(a, b)


def test_the_chance_of_noisy_top_k_is_its_frequency():
    """One expert's noise is drawn anew, the others' stay (1701.06538, appendix A): how often is it chosen?"""
    router, n, e, k = ROUTER["noisy"], 6, 5, 2
    logits, extra = randn(n, e), more(ROUTER["noisy"], n, e, k)
    expected = load(router, logits, route(router, logits, k, **extra), **extra).chance
    h = logits + extra["spread"] * torch.special.ndtri(extra["draw"](0))
    g = torch.Generator().manual_seed(1)
    for j in range(e):
        anew = logits[:, j] + extra["spread"][:, j] * torch.randn(20000, n, generator=g, dtype=torch.float64)
        others = h[:, [i for i in range(e) if i != j]].sort(-1, descending=True).values[:, k - 1]
        assert (anew > others).double().mean(0).sum().item() == pytest.approx(expected[j].item(), abs=0.03)
    assert expected.sum() != n * k


@pytest.mark.parametrize("name", ["gshard", "st_moe"])
def test_the_second_expert_by_chance(name):
    """Kept with probability min(1, its gate / threshold); the first expert's gate is untouched."""
    router, logits = ROUTER[name], torch.tensor([[2.0, 1.0, -9.0, -9.0]], dtype=torch.float64).expand(20000, 4)
    whole = route(router, logits, 2, capacity=math.inf)
    some = route(router, logits, 2, capacity=math.inf, draw=draws(20000, 4))
    second = whole.gate[0, 1].item()
    assert second == pytest.approx(1 / (1 + math.e), rel=1e-3) and whole.kept.all()
    frequency = some.kept[:, 1].double().mean().item()
    assert frequency == pytest.approx(min(1, second / router.threshold), abs=0.01)
    assert torch.equal(some.gate[:, 0], whole.gate[:, 0]) and (some.index[~some.kept] == -1).all()
    stats = load(router, logits, some)
    assert stats.counts.tolist() == [20000, some.kept[:, 1].sum(), 0, 0] and stats.dropped.sum() == 0


def test_empty_slots_take_no_room():
    index, gate = torch.tensor([[0, -1], [0, 1], [0, 1]]), torch.ones(3, 2)
    router = Router("fixed", "", choose=lambda router, x: (index, gate), capacity=1.0)
    routing = route(router, torch.zeros(3, 3), 2)  # room 2
    assert routing.kept.tolist() == [[True, False], [True, True], [False, True]]
    assert dense(routing, 3).tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert load(router, torch.zeros(3, 3), routing).counts.tolist() == [3, 2, 0]


@given(n=st.integers(0, 20), e=st.integers(1, 6), seed=seeds, ties=st.booleans(), data=st.data())
def test_expert_choice(n, e, seed, ties, data):
    """Each expert takes the C = max(1, int(k n / e)) tokens of largest probability, among equals the earlier; no
    renormalisation, nobody dropped."""
    router, k = ROUTER["expert_choice"], data.draw(st.integers(1, e))
    logits = randn(n, e, seed=seed)
    logits = logits[:1].expand(n, e) if ties else logits
    routing = route(router, logits, k)
    p, room = logits.softmax(-1), max(1, int(k * n / e))
    expected = torch.zeros(n, e, dtype=torch.float64)
    for j in range(e):
        best = sorted(range(n), key=lambda i: (-p[i, j].item(), i))[:room]
        expected[best, j] = p[best, j]
    torch.testing.assert_close(dense(routing, e), expected)
    stats = load(router, logits, routing)
    assert stats.counts.tolist() == [min(n, room)] * e and stats.dropped.sum() == 0
    assert routing.index.shape[1] == max(1, int((expected > 0).sum(-1).max()) if n else 1)  # no wider than needed


@given(
    n=st.integers(0, 24),
    e=st.integers(1, 5),
    seed=seeds,
    kind=st.sampled_from(("plain", "ties", "alike", "large")),
)
def test_base_shares_tokens_out_best(n, e, seed, kind):
    """At most ceil(n/e) tokens an expert, the same total as scipy's assignment (Jonker and Volgenant)."""
    scores = randn(n, e, seed=seed)
    scores = {"plain": scores, "ties": scores.round(), "alike": scores[:1].expand(n, e), "large": 1e4 * scores}[kind]
    index, seats = assigned(scores)[:, 0], math.ceil(n / e)
    assert index.bincount(minlength=e).max() <= seats
    seats_of = scores.repeat_interleave(seats, 1).numpy()
    best = seats_of[linear_sum_assignment(seats_of, maximize=True)].sum()
    assert scores.gather(1, index[:, None]).sum().item() == pytest.approx(best, abs=1e-4, rel=1e-7)


def test_base_by_hand():
    """Both prefer the first expert; the one who would lose more by leaving stays. Out of training both go there."""
    logits = torch.tensor([[2.0, 1.5], [1.0, -1.0]], dtype=torch.float64)
    router = ROUTER["base"]
    trained, later = route(router, logits, 1, draw=draws(2, 2)), route(router, logits, 1)
    assert trained.index.tolist() == [[1], [0]] and later.index.tolist() == [[0], [0]]
    torch.testing.assert_close(trained.gate.flatten(), torch.tensor([1.5, 1.0], dtype=torch.float64).sigmoid())


@given(n=st.integers(1, 20), e=st.integers(1, 6), seed=seeds, size=st.sampled_from((1.0, 3.0)))
def test_sinkhorn_has_its_marginals(n, e, seed, size):
    plan = transported(size * randn(n, e, seed=seed), sweeps=2000).exp()
    torch.testing.assert_close(plan.sum(0), torch.full((e,), 1 / e, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(plan.sum(1), torch.full((n,), 1 / n, dtype=torch.float64), atol=1e-3 / n, rtol=0)


def test_sinkhorn_of_large_logits_is_finite():
    assert transported(1e4 * randn(12, 4)).isfinite().all()
    routing = route(ROUTER["sinkhorn"], 1e4 * randn(12, 4), 2, draw=draws(12, 4))
    assert routing.gate.isfinite().all()


@pytest.mark.parametrize("k", [1, 2])
def test_sinkhorn_gates(k):
    """sigmoid for one expert, softmax over all for several; training evens the experts out."""
    router, logits = ROUTER["sinkhorn"], randn(64, 4) + torch.tensor([2.0, 0, 0, -2])
    trained, later = route(router, logits, k, draw=draws(64, 4)), route(router, logits, k)
    assert torch.equal(later.index, route(ROUTER["linear_moe"], logits, k).index)
    for routing in (trained, later):
        wanted = (logits.sigmoid() if k == 1 else logits.softmax(-1)).gather(-1, routing.index)
        torch.testing.assert_close(routing.gate, wanted)
    spread = [r.index.flatten().bincount(minlength=4).double().std().item() for r in (trained, later)]
    assert spread[0] < 0.5 * spread[1]


@pytest.mark.parametrize("name", ["hash", "deepseek_v4_hash"])
def test_the_word_chooses(name):
    router, words = ROUTER[name], torch.tensor([3, 1, 3, 0, 3])
    listed, logits = hashed(words, 6, 2, key=5), randn(5, 6)
    routing = route(router, logits, 2, listed=listed)
    assert (
        torch.equal(routing.index, listed) and torch.equal(listed[0], listed[2]) and torch.equal(listed[0], listed[4])
    )
    assert not torch.equal(listed, hashed(words, 6, 2, key=6))
    if router.weights == "table":
        assert (routing.gate == 1).all()
    else:
        s = torch.nn.functional.softplus(logits).sqrt().gather(-1, listed)
        torch.testing.assert_close(routing.gate, 1.5 * s / s.sum(-1, keepdim=True))


@given(e=st.integers(1, 6), frequencies=st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_an_even_hash_table(e, frequencies):
    """Loads differ by at most the most frequent word's count."""
    table = evenly_hashed(torch.tensor(frequencies, dtype=torch.float64), e)[:, 0]
    load = torch.zeros(e).index_add(0, table, torch.tensor(frequencies, dtype=torch.float32))
    assert load.max() - load.min() <= max(frequencies) and torch.equal(
        table, evenly_hashed(torch.tensor(frequencies, dtype=torch.float64), e)[:, 0]
    )


def test_random_hashes_are_distinct_and_even():
    index = hashed(torch.arange(4000), 8, 3, key=1)
    assert all(len(set(i)) == 3 for i in index.tolist())
    assert index.flatten().bincount().double().sub(1500).abs().max() < 150


@given(n=st.integers(0, 12), e=st.integers(1, 6), seed=seeds)
def test_remoe_visits_what_is_positive(n, e, seed):
    router, logits = ROUTER["remoe"], randn(n, e, seed=seed).round(decimals=1)
    routing = route(router, logits, 1)
    torch.testing.assert_close(dense(routing, e), logits.relu())
    visits = (logits > 0).sum(-1)
    assert torch.equal(routing.kept.sum(-1), visits) and torch.equal(routing.kept, routing.index >= 0)
    assert load(router, logits, routing).counts.tolist() == (logits > 0).sum(0).tolist()


def test_compact_keeps_the_pairs_in_order():
    routing = Routing(
        torch.tensor([[-1, 2, -1, 0], [-1, -1, -1, -1]]), torch.tensor([[0, 0.5, 0, 0.25], [0.0] * 4]), None
    )
    routing = compact(routing._replace(kept=routing.index >= 0))
    assert routing.index.tolist() == [[2, 0], [-1, -1]] and routing.gate.tolist() == [[0.5, 0.25], [0, 0]]


def test_sparse_mixer_by_hand():
    """The second logit is 1 % below the best, the third 10 %: only the second shares with the first."""
    router, logits = ROUTER["sparse_mixer"], torch.tensor([[10.0, 9.9, 9.0, -5.0]], dtype=torch.float64)
    routing = route(router, logits, 2)
    first = 1 / (1 + math.exp(-0.1))
    assert routing.index.tolist() == [[0, 1]] and routing.gate[0, 0].item() == pytest.approx(first)
    assert routing.gate[0, 1].item() == 1  # 9 is further than 2 % of 9.9 away


def test_sparse_mixer_in_training():
    """Drawn from the softmax of the near ones; not the best counts a third, but once in four times; the gradient is
    that of the whole gate."""
    n, logit = 40000, torch.tensor([5.0, 4.95, 1.0], dtype=torch.float64, requires_grad=True)
    logits = logit.expand(n, 3)
    routing = route(ROUTER["sparse_mixer"], logits, 1, draw=draws(n, 3))
    p = torch.tensor([5.0, 4.95], dtype=torch.float64).softmax(-1)
    best = routing.index[:, 0] == 0
    assert best.double().mean().item() == pytest.approx(p[0].item(), abs=0.01) and (routing.index < 2).all()
    torch.testing.assert_close(routing.gate[best, 0], p[:1].expand(int(best.sum())))
    whole = (routing.gate[~best, 0] - p[1]).abs() < 1e-9
    torch.testing.assert_close(routing.gate[~best, 0][~whole], (p[1:] / 3).expand(int((~whole).sum())))
    assert whole.double().mean().item() == pytest.approx(0.25, abs=0.01)
    gradient = torch.autograd.grad(routing.gate.sum(), logit)[0] / n  # each gate's own p (1 - p), whatever it counts
    expected = (p[0] * p[1]).item() * (2 * best.double().mean().item() - 1)
    assert gradient[0].item() == pytest.approx(expected) == -gradient[1].item()


# --------------------------------------------------------------------------------------------------------- errors


def test_the_table():
    for name, router in ROUTER.items():
        assert row(name) is router and router.title and router.paper
        assert not (router.post and router.bias), name  # the chosen logits are the scores: nothing to add a bias to
        assert (router.renormalize is not as_they_are) or not router.eps, name
        assert set(router.losses) <= set(LOSS), name
        assert router.decode in ("", *ROUTER) and (not router.offered or router.decode), name
        assert ("table" in router.weights) == (router.choose is by_table), name
    assert len({(r.title, r.paper) for r in ROUTER.values()}) == len(ROUTER)
    with pytest.raises(ValueError, match=r"^unknown router 'mixtrall'; expected one of linear_moe, qwen2_moe, "):
        row("mixtrall")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("mixtral", {"k": 9}, r"top_k=9 must be at least 1 and at most experts=8"),
        ("mixtral", {"k": 0}, r"top_k=0 must be at least 1"),
        ("switch", {"k": 2}, r"router Switch is defined for top_k=1 only, got top_k=2"),
        ("deepseek_v3", {"groups": 3}, r"groups=3 must divide experts=8"),
        ("deepseek_v3", {"groups": 2, "groups_kept": 3}, r"groups_kept=3 must be at least 1 and at most groups=2"),
        ("deepseek_v3", {"groups": 0}, r"groups_kept=1 must be at least 1 and at most groups=0"),
        ("deepseek_v3", {"groups": 8}, r"best 2 experts, but groups=8 of experts=8 have 1 each"),
        ("deepseek_v3", {"groups": 4, "k": 3}, r"top_k=3 must be at most the 2 experts of groups_kept=1"),
        ("mixtral", {"groups": 2}, r"router Mixtral has no groups of experts, got groups=2; use groups=1"),
        ("mixtral", {"bias": torch.zeros(8)}, r"router Mixtral has no balancing bias, got one"),
        ("mixtral", {"capacity": 0.0}, r"capacity factor must be above 0 \(inf: no expert is ever full\), got 0.0"),
        ("mixtral", {"capacity": math.nan}, r"capacity factor must be above 0"),
        ("gshard", {"k": 1}, r"router GShard is defined for top_k=2 only, got top_k=1"),
        ("expert_choice", {"capacity": math.inf}, r"chooses by its experts' capacity, which cannot be inf; use 1.0"),
    ],
)
def test_errors_are_one_clear_line(name, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        route(ROUTER[name], torch.zeros(3, 8), **{"k": 2, **arguments})
    assert "\n" not in str(error.value)


def test_dense_ignores_the_gates_of_dropped_pairs():
    routing = Routing(torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[True, False]]))
    assert dense(routing, 3).tolist() == [[0.5, 0.0, 0.0]]
