"""Laws of what keeps experts busy: losses and their values at balance, shares of ranks, bias and penalty."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from reference.balance import LOSS, add_up, updated_bias, updated_penalty, violation, weights_of
from reference.routers import ROUTER, Load, load, route
from test_routers import more, randn, seeds

FITS = {name: [r for r in ROUTER if r != "soft" and LOSS[name].fits(ROUTER[r], 2)] for name in LOSS}
PAIRS = [(name, r) for name in LOSS for r in FITS[name]]


def loads(counts, p, n, k, **other):
    """A load with these counts and sums of p, all else what a softmax router would say."""
    counts, p = torch.as_tensor(counts), torch.as_tensor(p, dtype=torch.float64)
    zero = torch.zeros(counts.shape[:-1], dtype=torch.float64)
    fields = {"counts": counts, "dropped": 0 * counts, "first": counts, "probability": p, "mass": p, "importance": p}
    fields |= {"chance": counts.double(), "z": zero, "entropy": zero, "tokens": torch.full(zero.shape, n)}
    e = counts.shape[-1]
    fields["sequence"] = (counts * p).sum(-1) * e / (k * max(n, 1))  # one document
    return Load(**fields | other)


def value(name, total, k, groups=2):
    return LOSS[name].value(total, total, k, groups)


def some_load(router, n, e, k, seed=0, logits=None, documents=None, training=True):
    extra = more(router, n, e, k, seed, training)
    logits = randn(n, e, seed=seed) if logits is None else logits
    return load(router, logits, route(router, logits, k, documents=documents, **extra), documents=documents, **extra)


# -------------------------------------------------------------------------------------------------- at balance

BALANCED = [name for name in LOSS if LOSS[name].at_balance is not None]


@pytest.mark.parametrize("name", BALANCED)
@pytest.mark.parametrize(("e", "k"), [(2, 1), (4, 1), (4, 2), (6, 3), (8, 8)])
def test_value_at_balance(name, e, k):
    n = 24
    even = loads([n * k // e] * e, [n / e] * e, n, k, first=torch.tensor([n / e] * e))
    assert value(name, even, k).item() == pytest.approx(LOSS[name].at_balance, abs=1e-12)


@pytest.mark.parametrize("name", ["switch", "first", "sequence", "device"])
@given(e=st.integers(1, 4), n=st.integers(1, 20), seed=seeds, data=st.data())
def test_one_whenever_one_of_the_two_is_even(name, e, n, seed, data):
    e, router = 2 * e, ROUTER["linear_moe"]
    k = data.draw(st.integers(1, e))
    got = some_load(router, n, e, k, seed)
    even_counts = loads([n * k] * e, e * got.probability, n * e, k, first=torch.full((e,), n))
    even_chances = loads(got.counts, [n / e] * e, n, k, first=got.first)
    for case in (even_counts, even_chances):
        assert value(name, case, k).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(("e", "k"), [(4, 1), (6, 2), (8, 8)])
def test_values_at_collapse(e, k):
    n = 24
    counts = torch.tensor([n] * k + [0] * (e - k))
    sure = loads(counts, counts / k, n, k)
    for name in ("switch", "sequence"):
        assert value(name, sure, k).item() == pytest.approx(e / k, abs=1e-12)
    for name in ("importance", "load"):
        assert value(name, sure, k).item() == pytest.approx(e / k - 1, abs=1e-9)
    assert value("device", sure, k, 2).item() == pytest.approx(2 if k <= e // 2 else 1, abs=1e-12)
    assert violation(counts).item() == pytest.approx(e / k - 1) and violation(torch.full((e,), 3)).item() == 0


@pytest.mark.parametrize("name", LOSS)
def test_no_tokens_no_loss(name):
    assert value(name, loads([0, 0], [0.0, 0.0], 0, 1), 1).item() == 0


def test_two_collapsed_layers_are_not_pooled():
    counts = torch.tensor([[10, 0], [0, 10]])
    assert value("switch", loads(counts, counts.double(), 10, 1), 1).tolist() == [2.0, 2.0]
    assert violation(counts).tolist() == [1.0, 1.0]
    pooled = loads(counts.sum(0), counts.sum(0).double(), 20, 1)
    assert value("switch", pooled, 1).item() == 1.0  # what pooling would have said


def test_one_is_no_lower_bound():
    p = torch.tensor([[0.51, 0.49]] * 6 + [[0.01, 0.99]] * 4, dtype=torch.float64)
    assert value("switch", some_load(ROUTER["linear_moe"], 10, 2, 1, logits=p.log()), 1).item() == pytest.approx(0.924)


@pytest.mark.parametrize("e", [1, 2, 64])
def test_z_loss_of_zero_logits(e):
    stats = some_load(ROUTER["linear_moe"], 7, e, 1, logits=torch.zeros(7, e))
    assert value("z", stats, 1, 1).item() == pytest.approx(math.log(e) ** 2, rel=1e-6, abs=1e-12)
    assert stats.entropy.item() / 7 == pytest.approx(math.log(e), rel=1e-6, abs=1e-12)


def test_device_loss_by_hand():
    """Two groups; all pairs in the first, a quarter of the probability: f = (2, 0), P = (1/4, 3/4)."""
    stats = loads([4, 4, 0, 0], [1.0, 1.0, 3.0, 3.0], 8, 1)
    assert value("device", stats, 1, 2).item() == pytest.approx(2 * 2 / 8)


def test_sequence_loss_is_of_each_document_by_itself():
    """Each document collapses on an expert of its own: even as a whole, 2 for each."""
    logits = torch.tensor([[9.0, -9.0]] * 3 + [[-9.0, 9.0]] * 3, dtype=torch.float64)
    documents = torch.tensor([4, 4, 4, 1, 1, 1])
    stats = some_load(ROUTER["linear_moe"], 6, 2, 1, logits=logits, documents=documents)
    assert value("sequence", stats, 1).item() == pytest.approx(2, rel=1e-6)
    assert value("switch", stats, 1).item() == pytest.approx(1, rel=1e-6)


def test_the_sequence_loss_counts_without_the_bias():
    """f is of the largest scores, whatever the bias and the groups chose (2412.19437, equation 18)."""
    router, logits = ROUTER["deepseek_v3"], randn(9, 4)
    bias = torch.tensor([9.0, 0, 0, 0])
    free, moved = (load(router, logits, route(router, logits, 1, b), b) for b in (None, bias))
    assert not torch.equal(free.counts, moved.counts) and torch.equal(free.sequence, moved.sequence)


def test_gshard_counts_first_choices_alone():
    router, logits = ROUTER["gshard"], randn(20, 4)
    stats = some_load(router, 20, 4, 2, logits=logits, training=False)
    first = logits.argmax(-1).bincount(minlength=4).double()
    expected = 4 * (first / 20 * logits.softmax(-1).mean(0)).sum()
    assert value("first", stats, 2).item() == pytest.approx(expected.item())


def test_importance_and_load_by_hand():
    """CV^2 = variance over squared mean: of 1, 3 it is 1/4; of 2, 6 too."""
    stats = loads([1, 3], [0.0, 0.0], 4, 1, importance=torch.tensor([1.0, 3.0]), chance=torch.tensor([2.0, 6.0]))
    assert value("importance", stats, 1).item() == pytest.approx(0.25)
    assert value("load", stats, 1).item() == pytest.approx(0.25)


def test_remoe_penalty_by_hand():
    """e / (k n^2) sum_e c_e sum_n relu(l)_ne (2412.14711, equation 8)."""
    logits = torch.tensor([[1.0, -1.0, 2.0], [3.0, -2.0, -1.0]], dtype=torch.float64)
    stats = some_load(ROUTER["remoe"], 2, 3, 1, logits=logits)
    assert value("penalty", stats, 1).item() == pytest.approx(3 / (1 * 4) * (2 * 4 + 0 + 1 * 2))


def test_remoe_penalty_at_balance_is_the_sum_of_a_tokens_scores():
    stats = loads([6, 6, 6, 6], [1.0, 2.0, 3.0, 4.0], 12, 2)
    assert value("penalty", stats, 2).item() == pytest.approx((1 + 2 + 3 + 4) / 12)


# ------------------------------------------------------------------------------------------ gradients and ranks


@pytest.mark.parametrize(("name", "router"), PAIRS)
def test_ranks_add_up_to_the_whole(name, router):
    """Totals of all, one's own part: the shares sum to the loss, and each rank's gradient is exact.

    In micro-batches too, for the losses that are means over documents or tokens.
    """
    router, n, e = ROUTER[router], 30, 6
    k = router.top_k or 2
    documents = torch.arange(n) // 5

    def shares(logits, size, pool=True):
        extra = more(router, n, e, k)

        def own(rows):
            mine = {key: x[rows] for key, x in extra.items() if key != "draw"}
            mine |= {"draw": lambda s: extra["draw"](s)[rows], "documents": documents[rows]}
            room = None if router.offered else math.inf
            return load(router, logits[rows], route(router, logits[rows], k, **mine, capacity=room), **mine)

        def whole(x):
            return Load(*(sum(parts) for parts in zip(*(add_up(y, lambda z: z) for y in x), strict=True)))

        parts = [own(slice(i, i + size)) for i in range(0, n, size)]
        if pool:
            return [LOSS[name].value(whole(parts), part, k, 2) for part in parts]
        return [LOSS[name].value(add_up(part, lambda z: z), part, k, 2) * size / n for part in parts]

    logits = randn(n, e).requires_grad_()
    (loss,) = shares(logits, n)
    exact = torch.autograd.grad(loss, logits)[0]
    assert exact.abs().max() > 0
    for size in (15, 10, 5):
        both = [True, False] if name in ("sequence", "z") else [True]
        for pool in both:
            parts = shares(logits, size, pool)
            torch.testing.assert_close(sum(parts), loss)
            torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], exact)


def test_the_gradient_runs_through_probability_alone():
    router, logits = ROUTER["linear_moe"], randn(12, 5).requires_grad_()
    counts = some_load(router, 12, 5, 2, logits=logits).counts

    def loss(x):
        return value("switch", some_load(router, 12, 5, 2, logits=x)._replace(counts=counts), 2)

    assert torch.autograd.gradcheck(loss, logits)
    by_hand = (logits.softmax(-1) * counts).sum() * 5 / (2 * 12 * 12)
    torch.testing.assert_close(loss(logits), by_hand)
    torch.testing.assert_close(*(torch.autograd.grad(f, logits)[0] for f in (loss(logits), by_hand)))
    weighed = counts.double().requires_grad_()  # even counts that could carry a gradient do not
    P = torch.ones(5, dtype=torch.float64, requires_grad=True)
    value("switch", loads(counts, [1.0] * 5, 12, 2)._replace(counts=weighed, probability=P), 2).backward()
    assert weighed.grad is None and P.grad is not None


def test_load_of_noise_has_its_gradient():
    """Of importance and load, by finite differences, through logits and spread."""
    router, extra = ROUTER["noisy"], more(ROUTER["noisy"], 7, 4, 2)

    def both(logits, spread):
        own = extra | {"spread": spread}
        stats = load(router, logits, route(router, logits, 2, **own), **own)
        return value("importance", stats, 2), value("load", stats, 2)

    assert torch.autograd.gradcheck(both, (randn(7, 4).requires_grad_(), extra["spread"].clone().requires_grad_()))


# --------------------------------------------------------------------------------------------- without a loss


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


def test_penalty_reaches_the_wanted_number_of_experts():
    """Gradient descent on the logits' common shift: tokens visit 4 of 8 experts at first, 2 in the mean at the end."""
    router, shift, weight = ROUTER["remoe"], torch.zeros(1, dtype=torch.float64, requires_grad=True), torch.tensor(1e-8)
    visits = []
    for step in range(300):
        logits = randn(256, 8, seed=step) + shift
        stats = load(router, logits, route(router, logits, 2))
        (gradient,) = torch.autograd.grad(weight * value("penalty", stats, 2), shift)
        with torch.no_grad():
            shift -= 0.2 * gradient + 0.01 * shift  # the weight decay is what the language model's loss would be
        visits.append(stats.counts.sum().item() / 256)
        weight = updated_penalty(weight, stats.counts[None], stats.tokens[None], 2)
    assert visits[0] > 3.5 and abs(sum(visits[-100:]) / 100 - 2) < 0.4


def test_penalty_moves_by_a_fifth():
    counts, tokens = torch.tensor([[6, 0], [2, 0]]), torch.tensor([4, 4])  # one expert a token, in the mean over layers
    assert updated_penalty(1.0, counts, tokens, 1).item() == pytest.approx(1 / 1.2)
    assert updated_penalty(1.0, counts + 1, tokens, 1).item() == pytest.approx(1.2)


# ------------------------------------------------------------------------------------------------ what is asked


def test_each_router_has_its_own_losses():
    assert weights_of(ROUTER["olmoe"], 1, None) == {"switch": 0.01, "z": 0.001}
    assert weights_of(ROUTER["noisy"], 1, None) == {"importance": 0.01, "load": 0.01}
    assert weights_of(ROUTER["deepseek_v2"], 1, None) == {"sequence": 0.003}  # no groups, no devices
    assert weights_of(ROUTER["deepseek_v2"], 4, None) == {"sequence": 0.003, "device": 0.05}
    assert weights_of(ROUTER["expert_choice"], 1, None) == {} == weights_of(ROUTER["mixtral"], 1, {})
    for name, router in ROUTER.items():
        for loss in router.losses:
            assert LOSS[loss].fits(router, 2), (name, loss)


@pytest.mark.parametrize(
    ("router", "asked", "message"),
    [
        ("mixtral", {"swich": 1}, r"unknown balance loss 'swich'; expected some of switch, first, importance, load"),
        ("mixtral", {"load": 1}, r"router Mixtral has no load \('load'\): it needs noise on the logits; it can have s"),
        ("mixtral", {"penalty": 1}, r"router Mixtral has no ReMoE penalty \('penalty'\): it needs ReLU scores"),
        ("mixtral", {"device": 1}, r"it needs groups of experts \(--model.groups\); it can have switch, first"),
        ("expert_choice", {"switch": 1}, r"router expert choice has no Switch balance .* it can have z$"),
        ("hash", {"z": 1}, r"router hash has no router z-loss \('z'\): it needs logits; it can have none"),
        ("remoe", {"sequence": 1}, r"router ReMoE has no sequence-wise balance"),
        ("mixtral", {"switch": -1}, r"the weight of balance loss 'switch' must be at least 0 and finite, got -1"),
    ],
)
def test_errors_are_one_clear_line(router, asked, message):
    with pytest.raises(ValueError, match=message) as error:
        weights_of(ROUTER[router], 1, asked)
    assert "\n" not in str(error.value)
