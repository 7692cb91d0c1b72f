"""Laws of the router table: every row, in the gate matrix G it stands for; then capacity, the losses, the bias."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.routers import (
    ROUTER,
    Load,
    Router,
    Routing,
    as_they_are,
    balance_loss,
    dense,
    load,
    route,
    row,
    sigmoid,
    softmax,
    sum_to_one,
    updated_bias,
    violation,
    z_loss,
)

# Every row of the table, and the corners of the formula that no row of it stands in yet.
ROWS = ROUTER | {
    "post_softmax": Router("softmax of the chosen", "", post=True),
    "post_sigmoid": Router("sigmoid of the chosen", "", score=sigmoid, post=True),
    "best_groups": Router("groups by their best", "2405.04434", group_best=1, scale=16.0),
}
every = pytest.mark.parametrize("name", ROWS)
seeds = st.integers(0, 10**6)


def orders(n):
    return st.permutations(range(n)).map(lambda order: torch.tensor(order, dtype=torch.int64))


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def cases(draw, name, n_max=12, e_max=8):
    """(logits : n e, k, bias) of a row: plain, full of ties, or all tokens alike."""
    n, e, seed = draw(st.integers(0, n_max)), draw(st.integers(1, e_max)), draw(seeds)
    k = ROWS[name].top_k or draw(st.integers(1, e))
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
        s = {softmax: [a / sum(odds) for a in odds], sigmoid: [a / (1 + a) for a in odds]}[router.score]
        choice = s if bias is None else [a + b for a, b in zip(s, bias.tolist(), strict=True)]
        members = [range(g * e // groups, (g + 1) * e // groups) for g in range(groups)]
        worth = [sum(sorted((choice[j] for j in m), reverse=True)[: router.group_best]) for m in members]
        best = sorted(range(groups), key=lambda g: (-worth[g], g))[:groups_kept]
        allowed = [j for g in best for j in members[g]]
        i = sorted(allowed, key=lambda j: (-choice[j], j))[:k]
        w = [s[j] for j in i]
        if (router.post and router.score is softmax) or router.renormalize is sum_to_one:
            w = [a / sum(w) for a in w]
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


@pytest.mark.parametrize("name", ["linear_moe", "qwen2_moe"])
def test_all_experts_without_renormalisation_are_the_dense_mixture(name):
    logits = randn(5, 6)
    torch.testing.assert_close(dense(route(ROUTER[name], logits, 6), 6), logits.softmax(-1))


@every
@given(data=st.data(), seed=seeds)
def test_permuting_experts_or_tokens_permutes_G(name, data, seed):
    router = ROWS[name]
    n, e = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 8))
    k = router.top_k or data.draw(st.integers(1, e))
    logits, bias = randn(n, e, seed=seed), randn(e, seed=seed + 1) if router.bias else None
    experts, tokens = data.draw(orders(e)), data.draw(orders(n))
    G = dense(route(router, logits, k, bias), e)
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
    torch.testing.assert_close(routing.gate, router.scale * chosen / chosen.sum(-1, keepdim=True))
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


def trials(name, n=24, e=4, count=200):
    for seed in range(count):
        yield ROWS[name].top_k or 2, randn(n, e, seed=seed), randn(e, seed=seed + count) if ROWS[name].bias else None


def differ(a, b, n):
    """Whether the first n rows of G differ by more than the last bit, which depends on a tensor's length."""
    return not torch.allclose(dense(a, 4)[:n], dense(b, 4)[:n], rtol=1e-12, atol=0)


@every
def test_causal_as_flagged(name):
    """Change the last token; the other rows of G stay, or a counter-example is found."""

    def changed(k, logits, bias):
        other = torch.cat([logits[:-1], -logits[-1:]])
        return differ(*(route(ROWS[name], x, k, bias) for x in (logits, other)), 23)

    found = any(changed(*trial) for trial in trials(name))
    assert found == (not ROWS[name].causal)


@every
def test_prefix_stable_as_flagged(name):
    """Leave the second half away; the rows of G of the first half stay, or a counter-example is found."""

    def changed(k, logits, bias):
        return differ(*(route(ROWS[name], x, k, bias) for x in (logits, logits[:12])), 12)

    found = any(changed(*trial) for trial in trials(name))
    assert found == (not ROWS[name].prefix_stable)


def test_switch_is_causal_but_not_prefix_stable():
    """The counter-example by hand: alone, the second token finds the expert full; in a longer text it has room."""
    logits = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert route(ROUTER["switch"], logits[:2], 1, capacity=1.0).kept.flatten().tolist() == [True, False]
    assert route(ROUTER["switch"], logits, 1, capacity=1.0).kept.flatten().tolist() == [True] * 4
    assert ROUTER["switch"].causal and not ROUTER["switch"].prefix_stable
    assert [name for name in ROUTER if not ROUTER[name].prefix_stable] == ["switch"]


# ------------------------------------------------------------------------------------------------------- capacity


def queued(index, experts, k, factor, documents):
    """Which pairs find room, one at a time: documents apart, token after token, slot after slot."""
    sizes, served, kept = Counter(documents), Counter(), []
    for document, slots in zip(documents, index.tolist(), strict=True):
        room = max(1, math.ceil(factor * k * sizes[document] / experts))
        kept.append([served[document, e] < room for e in slots])
        served.update((document, e) for e in slots)
    return torch.tensor(kept, dtype=torch.bool).view(-1, k)


@every
@given(data=st.data(), factor=st.sampled_from((0.1, 0.5, 1.0, 1.25, 2.0)) | st.floats(0.01, 4.0))
def test_capacity(name, data, factor):
    router = ROWS[name]
    logits, k, bias = data.draw(cases(name))
    n, e = logits.shape
    documents = data.draw(st.lists(st.integers(-1, 2), min_size=n, max_size=n))
    logits = logits.clone().requires_grad_()
    routing = route(router, logits, k, bias, documents=torch.tensor(documents, dtype=torch.int64), capacity=factor)
    assert torch.equal(routing.kept, queued(routing.index, e, k, factor, documents))
    assert (routing.gate[~routing.kept] == 0).all()
    free = route(router, logits, k, bias, capacity=math.inf)
    assert torch.equal(routing.gate[routing.kept], free.gate[routing.kept])  # not renormalised after dropping
    stats = load(router, logits, routing)
    assert stats.counts.sum() == n * k == stats.dropped.sum() + routing.kept.sum()
    assert torch.equal(stats.counts, (dense(free, e) > 0).sum(0))
    assert torch.equal(stats.dropped, stats.counts - (dense(routing, e) > 0).sum(0))
    for d in set(documents):
        mine = torch.tensor(documents) == d
        kept = routing.index[mine][routing.kept[mine]].bincount(minlength=e)
        assert (kept <= max(1, math.ceil(factor * k * int(mine.sum()) / e))).all()
        alone = route(router, logits[mine], k, bias, capacity=factor)
        assert torch.equal(alone.kept, routing.kept[mine])  # documents do not see each other
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


# --------------------------------------------------------------------------------------------------- load, losses


@every
@given(data=st.data())
def test_load_is_additive_over_documents(name, data):
    router = ROWS[name]
    logits, k, bias = data.draw(cases(name))
    cut = data.draw(st.integers(0, len(logits)))
    documents = (torch.arange(len(logits)) >= cut).long()
    whole = load(router, logits, route(router, logits, k, bias, documents=documents))
    parts = [load(router, x, route(router, x, k, bias)) for x in (logits[:cut], logits[cut:])]
    for total, a, b in zip(whole, *parts, strict=True):
        torch.testing.assert_close(total, a + b)
    assert (
        whole.tokens == len(logits) and whole.counts.dtype == whole.dropped.dtype == whole.tokens.dtype == torch.int64
    )
    torch.testing.assert_close(whole.probability.sum(), torch.tensor(float(len(logits)), dtype=torch.float64))


def test_load_by_hand():
    logits = torch.tensor([[0.0, 0.0, 0.0], [math.log(2), 0.0, -math.inf]], dtype=torch.float64)
    stats = load(ROUTER["mixtral"], logits, route(ROUTER["mixtral"], logits, 1))
    expected = Load(
        counts=torch.tensor([2, 0, 0]),
        dropped=torch.tensor([0, 0, 0]),
        probability=torch.tensor([1 / 3 + 2 / 3, 1 / 3 + 1 / 3, 1 / 3], dtype=torch.float64),
        z=torch.tensor(2 * math.log(3) ** 2, dtype=torch.float64),
        entropy=torch.tensor(math.log(3) + math.log(3) - 2 / 3 * math.log(2), dtype=torch.float64),
        tokens=torch.tensor(2),
    )
    for got, want in zip(stats, expected, strict=True):
        torch.testing.assert_close(got, want)
    scores = randn(4, 3).sigmoid()
    stats = load(ROUTER["deepseek_v3"], randn(4, 3), route(ROUTER["deepseek_v3"], randn(4, 3), 2))
    torch.testing.assert_close(stats.probability, (scores / scores.sum(-1, keepdim=True)).sum(0))


@given(layers=st.integers(1, 3), e=st.integers(1, 6), n=st.integers(1, 20), seed=seeds, data=st.data())
def test_balance_loss_is_one_at_balance(layers, e, n, seed, data):
    k = data.draw(st.integers(1, e))
    logits = randn(layers, n, e, seed=seed)
    routed = [load(ROUTER["linear_moe"], x, route(ROUTER["linear_moe"], x, k)) for x in logits]
    counts, P = torch.stack([s.counts for s in routed]), torch.stack([s.probability for s in routed])
    one = torch.ones(layers, dtype=torch.float64)
    torch.testing.assert_close(balance_loss(torch.full_like(counts, n * k), e * P, e * n, k), one)  # any P
    torch.testing.assert_close(balance_loss(counts, torch.full_like(P, n / e), n, k), one)  # any counts


@pytest.mark.parametrize(("e", "k"), [(1, 1), (4, 1), (6, 2), (8, 8)])
def test_balance_loss_values(e, k):
    n = 24
    uniform = torch.full((e,), n * k // e)
    collapsed = torch.tensor([n] * k + [0] * (e - k))
    sure = collapsed.double() / k
    assert balance_loss(uniform, sure, n, k).item() == pytest.approx(1, abs=1e-12)  # counts uniform
    assert balance_loss(collapsed, uniform.double() / k, n, k).item() == pytest.approx(1, abs=1e-12)  # P uniform
    assert balance_loss(collapsed, sure, n, k).item() == pytest.approx(e / k, abs=1e-12)
    assert balance_loss(0 * uniform, 0 * sure, 0, k).item() == 0  # no tokens
    assert violation(uniform).item() == 0 and violation(collapsed).item() == pytest.approx(e / k - 1)


def test_two_collapsed_layers_are_not_pooled():
    counts = torch.tensor([[10, 0], [0, 10]])
    losses = balance_loss(counts, counts.double(), 10, 1)
    assert losses.tolist() == [2.0, 2.0] and violation(counts).tolist() == [1.0, 1.0]
    assert balance_loss(counts.sum(0), counts.sum(0).double(), 20, 1).item() == 1.0  # what pooling would have said
    each = balance_loss(counts, counts.double(), torch.tensor([10, 10]), 1)  # a number of tokens a layer
    assert torch.equal(each, losses)


def test_one_is_no_lower_bound():
    p = torch.tensor([[0.51, 0.49]] * 6 + [[0.01, 0.99]] * 4, dtype=torch.float64)
    router = ROUTER["linear_moe"]
    stats = load(router, p.log(), route(router, p.log(), 1))
    assert balance_loss(stats.counts, stats.probability, 10, 1).item() == pytest.approx(0.924, abs=1e-12)


@every
def test_ranks_add_up_to_the_whole(name):
    """Counts of all, probabilities of one's own: the shares sum to the loss, and each rank's gradient is exact."""
    router, n, e = ROWS[name], 30, 6
    k = router.top_k or 2

    def parts(logits, cuts):
        stats = [load(router, x, route(router, x, k)) for x in logits.tensor_split(cuts)]
        counts = sum(s.counts for s in stats)
        return [(balance_loss(counts, s.probability, n, k), z_loss(s.z, n)) for s in stats]

    logits = randn(n, e).requires_grad_()
    (whole,) = parts(logits, ())
    exact = torch.autograd.grad(sum(whole), logits)[0]
    for cuts in ((15,), (1, 2, 20), (0, 7, 7, 30)):
        shares = parts(logits, cuts)
        for total, mine in zip(whole, zip(*shares, strict=True), strict=True):
            torch.testing.assert_close(sum(mine), total)
        torch.testing.assert_close(torch.autograd.grad(sum(map(sum, shares)), logits)[0], exact)
    assert exact.abs().max() > 0


def test_balance_gradient_runs_through_probability_alone():
    router, logits = ROUTER["linear_moe"], randn(12, 5).requires_grad_()
    counts = load(router, logits, route(router, logits, 2)).counts

    def loss(x):
        return balance_loss(counts, load(router, x, route(router, x, 2)).probability, 12, 2)

    assert torch.autograd.gradcheck(loss, logits)
    by_hand = (logits.softmax(-1) * counts).sum() * 5 / (2 * 12 * 12)
    torch.testing.assert_close(loss(logits), by_hand)
    torch.testing.assert_close(*(torch.autograd.grad(f, logits)[0] for f in (loss(logits), by_hand)))
    weighed = counts.double().requires_grad_()  # even counts that could carry a gradient do not
    P = torch.ones(5, dtype=torch.float64, requires_grad=True)
    balance_loss(weighed, P, 12, 2).backward()
    assert weighed.grad is None and P.grad is not None


@pytest.mark.parametrize("e", [1, 2, 64])
def test_z_loss_of_zero_logits(e):
    stats = load(ROUTER["linear_moe"], torch.zeros(7, e), route(ROUTER["linear_moe"], torch.zeros(7, e), 1))
    assert z_loss(stats.z, 7).item() == pytest.approx(math.log(e) ** 2, rel=1e-6, abs=1e-12)
    assert stats.entropy.item() / 7 == pytest.approx(math.log(e), rel=1e-6, abs=1e-12)
    assert z_loss(torch.zeros(2), 0).tolist() == [0, 0]


@given(layers=st.integers(1, 3), e=st.integers(1, 6), seed=seeds)
def test_bias_moves_towards_balance(layers, e, seed):
    counts = torch.randint(0, 4, (layers, e), generator=torch.Generator().manual_seed(seed))
    bias = randn(layers, e, seed=seed, dtype=torch.float32)
    moved = updated_bias(bias, counts, 0.25) - bias
    mean = counts.double().mean(-1, keepdim=True)
    assume((counts * e != counts.sum(-1, keepdim=True)).any())
    torch.testing.assert_close(moved, 0.25 * (mean - counts).sign().float(), rtol=0, atol=1e-6)
    assert torch.equal(updated_bias(bias, torch.full((layers, e), 3), 0.25), bias)  # at balance nothing moves
    assert updated_bias(bias, counts, 0.25).dtype == torch.float32


def test_bias_balances_a_skewed_router():
    router, bias = ROUTER["deepseek_v3"], torch.zeros(8)
    violations = []
    for step in range(150):
        logits = randn(1024, 8, seed=step) + torch.linspace(-1, 1, 8, dtype=torch.float64)
        counts = load(router, logits, route(router, logits, 2, bias)).counts
        violations.append(violation(counts).item())
        bias = updated_bias(bias, counts, 0.01)
    assert violations[0] > 0.8 and sum(violations[-20:]) / 20 < 0.2


# --------------------------------------------------------------------------------------------------------- errors


def test_the_table():
    for name, router in ROUTER.items():
        assert row(name) is router and router.title and router.paper
        assert not (router.post and router.bias), name  # the chosen logits are the scores: nothing to add a bias to
        assert (router.renormalize is not as_they_are) or not router.eps, name
        assert router.balance in ("loss", "bias"), name
    with pytest.raises(ValueError, match=r"^unknown router 'mixtrall'; expected one of linear_moe, mixtral, "):
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
    ],
)
def test_errors_are_one_clear_line(name, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        route(ROUTER[name], torch.zeros(3, 8), **{"k": 2, **arguments})
    assert "\n" not in str(error.value)


def test_dense_ignores_the_gates_of_dropped_pairs():
    routing = Routing(torch.tensor([[0, 2]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[True, False]]))
    assert dense(routing, 3).tolist() == [[0.5, 0.0, 0.0]]
