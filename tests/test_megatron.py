"""Routers, losses and drops are those of Megatron-core's functions, over drawn shapes.

Its functions give G as a matrix and its support. They compute scores in float32, whatever the logits are.
"""

import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.assignment import transported
from reference.balance import LOSS
from reference.routers import ROUTER, Asked, by_probability, dense, load, route, top, within_best_groups

seeds = st.integers(0, 10**6)


@pytest.fixture(scope="module")
def megatron():
    """The module of its routing functions, which says at length what it would rather have found installed."""
    if sys.version_info >= (3, 14):
        pytest.skip("megatron-core 0.16.1 has no package for this Python")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.moe import moe_utils
    return moe_utils


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def shapes(draw):
    """(logits : n e, k), float32, wanting gradients."""
    n, e = draw(st.integers(1, 20)), draw(st.integers(1, 9))
    return (2 * randn(n, e, seed=draw(seeds))).requires_grad_(), draw(st.integers(1, e))


@st.composite
def grouped(draw, best):
    """(logits, k, groups, groups kept): k is `best` times the groups kept, where their rule for groups is the papers'.

    Theirs values a group by its k / kept best experts: DeepSeek-V2 takes one, V3 two.
    """
    n, m, size = draw(st.integers(1, 20)), draw(st.integers(1, 4)), draw(st.integers(best, 4))
    kept = draw(st.integers(1, m))
    return (2 * randn(n, m * size, seed=draw(seeds))).requires_grad_(), best * kept, m, kept


def assert_same(G, kept, theirs, logits):
    """The matrix, its support, and the gradient that the logits get."""
    probability, chosen = theirs
    assert torch.equal(kept, chosen)
    torch.testing.assert_close(G, probability, rtol=2e-6, atol=1e-7)
    w = randn(*G.shape, seed=1)
    ours, other = (torch.autograd.grad((g * w).sum(), logits, retain_graph=True)[0] for g in (G, probability))
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6 * max(1.0, other.abs().max().item()))


def gates(routing, e):
    return dense(routing, e), dense(routing._replace(gate=torch.ones_like(routing.gate)), e).bool()


@pytest.mark.parametrize(("name", "before"), [("linear_moe", True), ("granite", False), ("mixtral", False)])
@given(case=shapes())
def test_softmax_before_or_after_the_choice(megatron, name, before, case):
    """Softmax over the chosen is also softmax over all, divided by its sum over the chosen."""
    logits, k = case
    theirs = megatron.topk_routing_with_score_function(logits, k, use_pre_softmax=before)
    assert_same(*gates(route(ROUTER[name], logits, k), logits.shape[1]), theirs, logits)


@pytest.mark.parametrize("name", ["deepseek_v3", "ling", "kimi_linear", "glm_4_5", "nemotron_3"])
@given(case=shapes(), biased=st.booleans())
def test_sigmoid_with_a_bias(megatron, name, case, biased):
    """With one expert a token theirs leaves the score as it is; ours divides it by itself, as released models do."""
    logits, k = case
    router, bias = ROUTER[name], randn(logits.shape[1], seed=3) / 5 if biased else None
    theirs = megatron.topk_routing_with_score_function(
        logits, k, score_function="sigmoid", expert_bias=bias, scaling_factor=router.scale
    )
    G, kept = gates(route(router, logits, k, bias), logits.shape[1])
    if k == 1:
        torch.testing.assert_close(G, router.scale * kept.float())
        G = G * logits.sigmoid()
    assert_same(G, kept, theirs, logits)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
@given(data=st.data())
def test_groups_of_experts(megatron, name, data):
    router = ROUTER[name]
    logits, k, groups, kept = data.draw(grouped(router.group_best))
    bias = randn(logits.shape[1], seed=3) / 5 if router.bias else None
    score = {"score_function": "sigmoid", "expert_bias": bias} if router.bias else {"use_pre_softmax": True}
    theirs = megatron.topk_routing_with_score_function(
        logits, k, num_groups=groups, group_topk=kept, scaling_factor=router.scale, **score
    )
    assert_same(*gates(route(router, logits, k, bias, groups, kept), logits.shape[1]), theirs, logits)


@pytest.mark.parametrize("best", [1, 2, 3])
@given(data=st.data())
def test_the_best_of_the_best_groups(megatron, best, data):
    scores, k, groups, kept = data.draw(grouped(best))
    values, index = megatron.group_limited_topk(scores, k, *scores.shape, groups, kept)
    ours = top(within_best_groups(scores, best, Asked(scores, k, groups=groups, groups_kept=kept)), k)
    assert torch.equal(ours, index) and torch.equal(scores.gather(-1, ours), values)


@given(n=st.integers(1, 20), e=st.integers(1, 6), seed=seeds, data=st.data())
def test_sinkhorn(megatron, n, e, seed, data):
    """The plan; and in training the choice of its largest entries, compared by what they carry (of two as large, either
    will do). Theirs adds 1e-8 to every sum, so it drifts and never comes to rest: 1e-5 is as close as it may be asked
    to, and large logits are not for it."""
    logits = 4 * torch.rand(n, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 2
    k, plan = data.draw(st.integers(1, e)), megatron.sinkhorn(logits, tol=1e-5)
    torch.testing.assert_close(transported(logits, sweeps=1000, close=1e-12).exp(), plan, rtol=3e-4, atol=0)
    routing = route(ROUTER["sinkhorn"], logits, k, draw=lambda s: torch.full((n, e), 0.5))  # a training step
    torch.testing.assert_close(plan.gather(-1, routing.index), plan.topk(k).values, rtol=3e-4, atol=0)


@pytest.mark.parametrize("training", [False, True])
@given(n=st.integers(1, 20), e=st.integers(1, 6), seed=seeds, data=st.data())
def test_the_gates_of_sinkhorn(megatron, training, n, e, seed, data):
    from megatron.core.transformer.moe.router import TopKRouter

    logits, k = randn(n, e, seed=seed).requires_grad_(), data.draw(st.integers(1, e))
    layer = SimpleNamespace(topk=k, training=training, config=SimpleNamespace(moe_aux_loss_coeff=0))
    theirs = TopKRouter.sinkhorn_load_balancing(layer, logits)
    draw = (lambda s: torch.full((n, e), 0.5)) if training else None
    G, kept = gates(route(ROUTER["sinkhorn"], logits, k, draw=draw), e)
    assert training or torch.equal(kept, theirs[1])
    both = kept & theirs[1]
    torch.testing.assert_close(G[both], theirs[0][both], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("loss", ["switch", "sequence"])
@pytest.mark.parametrize("name", ["linear_moe", "deepseek_v3"])
@given(case=shapes())
def test_balance_losses(megatron, name, loss, case):
    """Value and gradient; sigmoid scores are divided by their sum. `sequence` counts the choice before the bias."""
    logits, k = case
    router, (n, e) = ROUTER[name], logits.shape
    bias = randn(e, seed=3) / 5 if router.bias else None
    routing = route(router, logits, k, bias)
    ours = load(router, logits, routing, bias)
    chosen, p = megatron.compute_routing_scores_for_aux_loss(logits, k, "sigmoid" if router.bias else "softmax")
    counts = chosen.sum(0) if loss == "sequence" else routing.index.flatten().bincount(minlength=e)
    theirs = megatron.switch_load_balancing_loss_func(p, counts, n, k, e, 0.01)
    value = 0.01 * LOSS[loss].value(ours, ours, k, 1)
    torch.testing.assert_close(value, theirs, rtol=2e-6, atol=1e-8)
    got, want = (torch.autograd.grad(v, logits, retain_graph=True)[0] for v in (value, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@given(case=shapes())
def test_z_loss(megatron, case):
    logits, k = case
    ours = load(ROUTER["linear_moe"], logits, route(ROUTER["linear_moe"], logits, k))
    value, theirs = 0.001 * LOSS["z"].value(ours, ours, k, 1), megatron.z_loss_func(logits, 0.001)
    torch.testing.assert_close(value, theirs, rtol=2e-6, atol=1e-9)
    got, want = (torch.autograd.grad(v, logits)[0] for v in (value, theirs))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["linear_moe", "mixtral", "granite"])
@given(case=shapes(), factor=st.sampled_from((0.25, 0.5, 1.0, 2.0)))
def test_the_least_probable_are_dropped(megatron, name, case, factor):
    """Gates without ties, of which theirs takes any, and factors that are powers of two: of others it rounds n k / e
    before it multiplies, and may find room for one more."""
    logits, k = case
    before = name == "linear_moe"
    G, chosen = megatron.topk_routing_with_score_function(logits, k, use_pre_softmax=before)
    assume(len(G[chosen].unique()) == chosen.sum())
    theirs = megatron.apply_router_token_dropping(G, chosen, k, factor, drop_policy="probs")
    routing = route(ROUTER[name], logits, k, capacity=factor, queue=by_probability)
    assert_same(*gates(routing, logits.shape[1]), theirs, logits)
