"""Laws of the expert layer: sorted experts are a loop over experts, and the layer is its gate matrix.

(That it is the released blocks of its rows: tests/test_blocks.py.)
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from reference.documents import Documents
from reference.moe import EXPERT, Dense, Experts, MoE, apart, experts, feed_forward
from reference.routers import ROUTER, Routing, dense, second_by_chance, top

OPS = SimpleNamespace(experts=experts, top=top)  # all that the layer asks of a backend
NOWHERE = SimpleNamespace(documents=None, key=None, index=None, tokens=None)
every = pytest.mark.parametrize("name", ROUTER)
matrix = pytest.mark.parametrize("name", [name for name in ROUTER if ROUTER[name].weights != "slots"])


def at(x, **side):
    """A side for x : b t d: words and numbers for all of its tokens."""
    index = torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2])
    return SimpleNamespace(**{"documents": None, "key": None, "index": index, "tokens": index % 7} | side)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def looped(x, routing, w13, w2):
    """The definition: every expert on every token, weighted by G."""
    G = dense(routing, len(w13))
    half = w13.shape[1] // 2
    y = torch.zeros_like(x)
    for e in range(len(w13)):
        inner = torch.nn.functional.silu(x @ w13[e, :half].T) * (x @ w13[e, half:].T)
        y = y + (G[:, e, None] * (inner @ w2[e].T)).to(x.dtype)
    return y


@st.composite
def pairs(draw, n_max=9, e_max=6):
    """(x, routing, w13, w2), float64, wanting gradients: any n from 0, empty and hot experts, dropped pairs, alike."""
    n, e, seed = draw(st.integers(0, n_max)), draw(st.integers(1, e_max)), draw(st.integers(0, 10**6))
    k = draw(st.integers(1, e))
    d, f = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    scores = randn(n, e, seed=seed)
    scores = scores[:1].expand(n, e) if draw(st.booleans()) else scores  # all tokens to the same experts
    kept = draw(st.sampled_from((1.0, 0.5, 0.0)))
    kept = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < kept
    x = randn(n, d, seed=seed + 1)
    x = x[:1].expand(n, d).clone() if draw(st.booleans()) else x  # all tokens alike
    gate = randn(n, k, seed=seed + 2)
    w13, w2 = randn(e, 2 * f, d, seed=seed + 3), randn(e, d, f, seed=seed + 4)
    leaves = [a.requires_grad_() for a in (x, gate, w13, w2)]
    return leaves[0], Routing(scores.argsort(-1)[:, :k], leaves[1], kept), *leaves[2:]


@given(case=pairs())
def test_sorted_experts_are_the_loop(case):
    x, routing, w13, w2 = case
    leaves = (x, routing.gate, w13, w2)
    y, exact = experts(*case), looped(*case)
    torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
    dy = randn(*x.shape, seed=5)
    for got, want in zip(
        torch.autograd.grad(y, leaves, dy), torch.autograd.grad(exact, leaves, dy, materialize_grads=True), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@given(case=pairs())
def test_every_weight_gets_a_gradient(case):
    """Zeros, not none, where no token came: ranks without tokens still have something to add up."""
    x, routing, w13, w2 = case
    experts(*case).square().sum().backward()
    visited = dense(Routing(routing.index, torch.ones_like(routing.gate), routing.kept), len(w13)).any(0)
    for weight in (w13, w2):
        assert weight.grad is not None and (weight.grad[~visited] == 0).all()
    assert x.grad is not None and routing.gate.grad is not None
    assert (routing.gate.grad[~routing.kept] == 0).all()


def test_gradients_by_finite_differences():
    index, kept = torch.tensor([[1, 0], [2, 1], [2, 0]]), torch.tensor([[True, True], [True, False], [True, True]])
    leaves = [randn(*s, seed=i).requires_grad_() for i, s in enumerate(((3, 2), (3, 2), (4, 4, 2), (4, 2, 2)))]

    def f(x, gate, w13, w2):
        return experts(x, Routing(index, gate, kept), w13, w2)

    assert torch.autograd.gradcheck(f, leaves)


@given(case=pairs(), a=st.floats(-2, 2))
def test_linear_in_the_gates(case, a):
    x, routing, w13, w2 = case
    other = randn(*routing.gate.shape, seed=9)
    y, z = (experts(x, routing._replace(gate=g), w13, w2) for g in (routing.gate, other))
    torch.testing.assert_close(experts(x, routing._replace(gate=routing.gate + a * other), w13, w2), y + a * z)
    dy = randn(*x.shape, seed=6)
    by_expert = torch.stack([feed_forward(x, w13[e], w2[e]) for e in range(len(w13))], 1)  # n e d
    inner = (dy[:, None] * by_expert).sum(-1).gather(-1, routing.index) * routing.kept
    torch.testing.assert_close(torch.autograd.grad(y, routing.gate, dy)[0], inner)


def test_dropped_pairs_are_not_computed():
    """Not even when the expert would overflow and the gate were not zero."""
    w13, w2 = randn(2, 4, 3), randn(2, 3, 2)
    w13[1] = math.inf
    routing = Routing(torch.tensor([[0, 1]] * 3), torch.ones(3, 2), torch.tensor([[True, False]] * 3))
    x = randn(3, 3)
    torch.testing.assert_close(experts(x, routing, w13, w2), feed_forward(x, w13[0], w2[0]))


def test_repeatable_to_the_bit():
    x, gate, w13, w2 = (a.requires_grad_() for a in (randn(64, 8), randn(64, 3), randn(6, 10, 8), randn(6, 8, 5)))
    routing = Routing(randn(64, 6, seed=1).argsort(-1)[:, :3], gate, torch.ones(64, 3, dtype=torch.bool))
    y, again = experts(x, routing, w13, w2), experts(x, routing, w13, w2)
    assert torch.equal(y, again)
    leaves, dy = (x, gate, w13, w2), randn(64, 8, seed=2)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    for other in (torch.autograd.grad(y, leaves, dy), torch.autograd.grad(again, leaves, dy)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_bf16_experts_and_float32_gates():
    """Two experts that cancel but for their gates: with gates in bf16 the difference, 0.001, would be lost."""
    x, w13, w2 = randn(5, 8, dtype=torch.float32), randn(1, 12, 8, dtype=torch.float32), randn(1, 8, 6)
    x, w13, w2 = x.bfloat16(), w13.bfloat16(), w2.bfloat16()
    gate = torch.tensor([[1.001, 1.0]] * 5)
    routing = Routing(torch.tensor([[0, 1]] * 5), gate, torch.ones(5, 2, dtype=torch.bool))
    y = experts(x, routing, w13.repeat(2, 1, 1), torch.cat([w2, -w2]))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), 0.001 * feed_forward(x, w13[0], w2[0]).float(), rtol=1e-2, atol=1e-6)


# ------------------------------------------------------------------------------ kinds of experts, gates, padding


@pytest.mark.parametrize("kind", EXPERT)
@given(case=pairs(), seed=st.integers(0, 99), biases=st.booleans(), at_input=st.booleans(), room=st.booleans())
def test_every_kind_is_the_loop(kind, case, seed, biases, at_input, room):
    """With biases, with the gate at the input, padded or not: outputs and gradients of the loop over experts."""
    x, routing, w13, w2 = case
    inner, e, f = EXPERT[kind].inner, len(w13), w2.shape[-1]
    if EXPERT[kind].rows == 1:
        w13 = w13[:, :f].detach().clone().requires_grad_()
    weights = [w13, w2]
    if biases:
        weights += [
            randn(e, w13.shape[1], seed=seed).requires_grad_(),
            randn(e, w2.shape[1], seed=seed).requires_grad_(),
        ]
    G, visits = dense(routing, e), dense(routing._replace(gate=torch.ones_like(routing.gate)), e)
    exact = torch.zeros_like(x)
    for j in range(e):
        own = [w[j] for w in weights]
        if at_input:
            exact = exact + visits[:, j, None] * feed_forward(G[:, j, None] * x, *own, inner=inner)
        else:
            exact = exact + G[:, j, None] * feed_forward(x, *own, inner=inner)
    gate_at = "input" if at_input else "output"
    y = experts(x, routing, *weights, inner=inner, gate_at=gate_at, **({"room": len(x) + 1} if room else {}))
    torch.testing.assert_close(y, exact, rtol=1e-11, atol=1e-11)
    leaves, dy = (x, routing.gate, *weights), randn(*x.shape, seed=5)
    got = torch.autograd.grad(y, leaves, dy, materialize_grads=True)
    for one, other in zip(got, torch.autograd.grad(exact, leaves, dy, materialize_grads=True), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_kinds_by_hand():
    """Values worked out from the formulas, beside the clamps."""
    h = torch.tensor([20.0, -1.0, 9.0, 0.5], dtype=torch.float64)  # gate 20, -1; up 9, 0.5
    silu = [v / (1 + math.exp(-v)) for v in (20, -1, 10)]
    by_hand = {
        "swiglu": [silu[0] * 9, silu[1] * 0.5],
        "clamped_swish": [7 / (1 + math.exp(-1.702 * 7)) * 8, -1 / (1 + math.exp(1.702)) * 1.5],
        "clamped_swiglu": [silu[2] * 9, silu[1] * 0.5],
        "relu": [20, 0, 9, 0.5],
        "relu_squared": [400, 0, 81, 0.25],
        "gelu": [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in (20, -1, 9, 0.5)],
    }
    assert set(by_hand) == set(EXPERT)
    for kind, values in by_hand.items():
        torch.testing.assert_close(EXPERT[kind].inner(h), torch.tensor(values, dtype=torch.float64))


def test_a_room_that_is_too_small():
    routing = Routing(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="an expert has 3 pairs, more than its room of 2"):
        experts(randn(3, 2), routing, randn(2, 4, 2), randn(2, 2, 2), room=2)


# ------------------------------------------------------------------------------------------------------ the layer


def config(name, **other):
    router = ROUTER[name]
    limits = {"groups": 3, "groups_kept": 2} if router.group_best else {}
    limits |= {"vocabulary": 7} if "table" in router.weights else {}
    return Experts(
        **{"width": 6, "experts": 6, "top_k": router.top_k or 2, "hidden": 5, "router": name} | limits | other
    )


def layer(c, seed=0, dtype=torch.float64, ops=OPS):
    """Every parameter and the balancing bias random."""
    moe = MoE(c, ops, 3).to(dtype)
    moe.begin(seed)
    with torch.no_grad():
        for i, p in enumerate(moe.parameters()):
            p.copy_(randn(*p.shape, seed=seed + i) / 2)
        if moe.bias is not None:
            moe.bias.copy_(randn(c.columns, seed=seed + 50) / 4)
    return moe


def spied(moe):
    """The routings that the layer hands to its experts, as they come."""
    seen = []

    def spy(tokens, routing, *weights, **more):
        seen.append(routing)
        return experts(tokens, routing, *weights, **more)

    moe.ops = SimpleNamespace(experts=spy, top=top)
    return seen


EXTRAS = {
    "plain": {},
    "shared": {"shared": 4},
    "gated": {"shared": 4, "shared_gate": True},
    "latent": {"latent": 4, "shared": 3},
    "biases": {"biases": True},
    "relu squared": {"kind": "relu_squared", "shared": 4},
    "padded": {"pad": True, "capacity_factor": 0.8},
}


@matrix
@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("key", [None, 5])
def test_the_layer_is_its_gate_matrix(name, extra, key):
    c = config(name, **EXTRAS[extra])
    moe, x = layer(c), randn(2, 7, 6, seed=20)
    seen = spied(moe)
    y, stats = moe(x, at(x, key=key))
    (routing,) = seen
    tokens, kind = x.reshape(14, 6), EXPERT[c.kind].inner
    G, inputs = dense(routing, 6), tokens if moe.down is None else tokens @ moe.down.T
    visits = dense(routing._replace(gate=torch.ones_like(routing.gate)), 6)
    expected = torch.zeros_like(inputs)
    for e in range(6):
        own = [None if w is None else w[e] for w in (moe.w13, moe.w2, moe.b13, moe.b2)]
        if ROUTER[name].gate_at == "input":
            expected += visits[:, e, None] * feed_forward(G[:, e, None] * inputs, *own, inner=kind)
        else:
            expected += G[:, e, None] * feed_forward(inputs, *own, inner=kind)
    expected = expected if moe.up is None else expected @ moe.up.T
    if c.shared:
        always = feed_forward(tokens, moe.shared.w13, moe.shared.w2, inner=kind)
        expected += torch.sigmoid(tokens @ moe.shared_gate[0])[:, None] * always if c.shared_gate else always
    torch.testing.assert_close(y.view(14, 6), expected)
    asked = (routing.index >= 0).sum()
    assert stats.counts.sum() == asked and stats.tokens == 14
    assert stats.dropped.sum() == asked - routing.kept.sum()
    if key is None and moe.gate is not None and moe.gate_bias is None:
        scores = ROUTER[name].score(tokens @ moe.gate.T)
        torch.testing.assert_close(stats.probability, (scores / (scores.sum(-1, keepdim=True) + 1e-20)).sum(0))


def test_a_latent_is_left_after_the_sum():
    """up(sum of the experts) = sum of up(expert): what a token gets is a mixture of whole experts (Nemotron-3)."""
    moe, x = layer(config("nemotron_3", latent=4, groups=1, groups_kept=1)), randn(1, 9, 6)
    seen = spied(moe)
    y = moe(x, NOWHERE)[0][0]
    (routing,) = seen
    inputs, expected = x[0] @ moe.down.T, torch.zeros(9, 6, dtype=torch.float64)
    for e in range(6):
        mine = feed_forward(inputs, moe.w13[e], moe.up @ moe.w2[e])
        expected += dense(routing, 6)[:, e, None] * mine
    torch.testing.assert_close(y, expected)


def test_identity_experts():
    """Alone, with gates that sum to one, they return the token; beside others they add gate times token."""
    x = randn(1, 9, 6)
    moe = layer(config("mixtral", experts=3, identity=3, top_k=2))
    with torch.no_grad():
        moe.gate[:3] -= 50 * x.sum((0, 1))  # ... whom the tokens of this text do not want at all
    logits = moe.logits(x[0])
    only = (logits.argsort(-1, descending=True)[:, :2] >= 3).all(-1)
    torch.testing.assert_close(moe(x, NOWHERE)[0][0][only], x[0][only])
    moe = layer(config("linear_moe", experts=3, identity=3, top_k=3))
    G = moe.logits(x[0]).softmax(-1)
    G = G * (G.sort(-1).values[:, 3:4] <= G)
    expected = G[:, 3:].sum(-1, keepdim=True) * x[0]
    for e in range(3):
        expected = expected + G[:, e, None] * feed_forward(x[0], moe.w13[e], moe.w2[e])
    y, stats = moe(x, NOWHERE)
    torch.testing.assert_close(y[0], expected)
    assert stats.counts.shape == (6,) and stats.counts.sum() == 27 and stats.counts[3:].sum() > 0


@pytest.mark.parametrize("slots", [1, 3])
def test_soft_moe_is_its_two_matrices(slots):
    """y = C experts(D x): columns of D sum to one over a document's tokens, rows of C over all slots (2308.00951)."""
    moe, x = layer(config("soft", slots=slots)), randn(1, 9, 6)
    documents = torch.tensor([[0, 0, 0, 0, 5, 5, 5, 5, 5]])
    y, stats = moe(x, at(x, documents=documents))
    for own in (slice(0, 4), slice(4, 9)):
        tokens = x[0, own]
        normal, mu = (v / v.norm(dim=-1, keepdim=True) for v in (tokens, moe.gate))
        logits = moe.scale * normal @ mu.T
        D, C = logits.softmax(0), logits.softmax(1)
        mixed = D.T @ tokens
        out = torch.stack([feed_forward(m, moe.w13[i // slots], moe.w2[i // slots]) for i, m in enumerate(mixed)])
        torch.testing.assert_close(y[0, own], C @ out)
    assert stats.counts.tolist() == [2 * slots] * 6 and stats.probability.sum().item() == pytest.approx(9)


def test_no_router_jitters_its_experts_input():
    """The router's copy is multiplied by a number within 1 +- jitter in training; the experts' is not (Switch)."""
    moe, x = layer(config("switch", jitter=0.3, capacity_factor=math.inf)), randn(1, 40, 6)
    shaken = moe.jittered(x[0], at(x, key=1))
    ratio = shaken / x[0]
    assert ratio.min() < 0.75 and ratio.max() > 1.25 and ((ratio >= 0.7) & (ratio <= 1.3)).all()
    assert torch.equal(moe.jittered(x[0], at(x)), x[0])  # not out of training
    seen = []
    moe.ops = SimpleNamespace(experts=lambda tokens, *_, **__: seen.append(tokens) or tokens, top=top)
    moe(x, at(x, key=1))
    assert torch.equal(seen[0], x[0])
    assert torch.equal(moe.jittered(x[0, 20:], at(x[:, 20:], key=1, index=torch.arange(20, 40))), shaken[20:])


@pytest.mark.parametrize("pad", [False, True])
def test_dropout_inside_the_experts(pad):
    """A share of hidden channels, the rest scaled up; a token's are the same wherever it stands in the batch."""
    c = config(
        "mixtral", experts=1, top_k=1, hidden=400, dropout=0.25, **({"pad": True, "capacity_factor": 1} if pad else {})
    )
    moe, x = layer(c), randn(1, 30, 6)
    with torch.no_grad():
        moe.w13.fill_(1.0), moe.w2.fill_(1.0 / 400)
    kept, whole = moe(x, at(x, key=4))[0], moe(x, at(x))[0]
    share = (kept / whole)[0, :, 0]
    assert share.mean().item() == pytest.approx(1, abs=0.02) and share.std().item() == pytest.approx(
        math.sqrt(0.25 / 0.75 / 400), rel=0.5
    )
    part = moe(x[:, 10:], at(x[:, 10:], key=4, index=torch.arange(10, 30)[None]))[0]
    torch.testing.assert_close(part, kept[:, 10:])


@matrix
def test_noise_is_a_function_of_key_and_token(name):
    """The same whatever the batch; another key, another draw, where the row has noise."""
    moe, x = layer(config(name, capacity_factor=None if ROUTER[name].offered else math.inf)), randn(4, 5, 6)
    with torch.no_grad():
        if moe.gate is not None and ROUTER[name].choose is not second_by_chance:
            moe.gate.copy_(moe.gate[:1] + randn(6, 6, seed=8) / 100)  # nearly alike, so that a little noise decides
    if ROUTER[name].pooled == "training" or ROUTER[name].offered:  # tokens of a sequence are routed together
        part = slice(1, 3)
        whole, some = moe(x, at(x, key=9))[0][part], moe(x[part], at(x[part], key=9, index=at(x).index[part]))[0]
    else:
        flat = x.view(20, 1, 6)
        whole, some = moe(x, at(x, key=9))[0], moe(flat, at(flat, key=9))[0].view_as(x)
    torch.testing.assert_close(some, whole)
    other = [not torch.allclose(moe(x, at(x, key=key))[0], whole) for key in range(3)] if whole.shape == x.shape else []
    assert any(other) == (name in ("noisy", "gshard", "st_moe", "sparse_mixer", "switch")) or not other


def test_names_and_shapes_of_the_parameters():
    shapes = {"gate": (6, 6), "w13": (6, 10, 6), "w2": (6, 6, 5)}
    shared = {"shared.w13": (8, 6), "shared.w2": (6, 4), "shared_gate": (1, 6)}
    weights = {
        "gate": {},
        "gate and spread": {"spread": (6, 6)},
        "slots": {"scale": (1,)},
        "table": {"table": (7, 2)},
        "table and gate": {"table": (7, 2)},
    }
    for name, router in ROUTER.items():
        buffers = ({"bias": (6,)} if router.bias else {}) | ({"penalty": ()} if name == "remoe" else {})
        own = shapes | weights[router.weights] | buffers
        own = {n: shape for n, shape in own.items() if n != "gate" or router.weights != "table"}
        plain, full = MoE(config(name), OPS), MoE(config(name, shared=4, shared_gate=True), OPS)
        assert {n: tuple(p.shape) for n, p in plain.state_dict().items()} == own
        assert {n: tuple(p.shape) for n, p in full.state_dict().items()} == own | shared
        assert {n for n, _ in full.named_parameters()} == set(own | shared) - {"bias", "penalty", "table"}
    assert {n: tuple(p.shape) for n, p in Dense(6, 5).named_parameters()} == {"w13": (10, 6), "w2": (6, 5)}
    assert {n: tuple(p.shape) for n, p in Dense(6, 5, "gelu").named_parameters()} == {"w13": (5, 6), "w2": (6, 5)}
    biased = MoE(config("gpt_oss", biases=True, latent=4, identity=2), OPS).state_dict()
    assert {n: tuple(p.shape) for n, p in biased.items()} == {
        "gate": (8, 6),
        "gate_bias": (8,),
        "w13": (6, 10, 4),
        "b13": (6, 10),
        "w2": (6, 4, 5),
        "b2": (6, 4),
        "down": (4, 6),
        "up": (6, 4),
    }


@every
def test_a_forward_pass_changes_nothing(name):
    moe, x = layer(config(name, shared=4)), randn(2, 5, 6)
    before = {n: p.clone() for n, p in moe.state_dict().items()}
    for key in (None, 3):
        first, second = moe(x, at(x, key=key)), moe(x, at(x, key=key))
        for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
            assert torch.equal(a, b)  # counted once each, not accumulated
    assert all(torch.equal(p, before[n]) for n, p in moe.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "buffer"), [("deepseek_v3", "bias"), ("remoe", "penalty")])
def test_bias_and_penalty_stay_float32(name, buffer, dtype):
    moe = MoE(config(name), OPS)
    own = getattr(moe, buffer)
    assert own.dtype == torch.float32 and (own == 0).all()
    own += 1 + 2**-20
    moe.to(dtype)
    own = getattr(moe, buffer)
    assert own.dtype == torch.float32 and (own == 1 + 2**-20).all() and moe.gate.dtype == dtype
    assert buffer in dict(moe.named_buffers()) and buffer in moe.state_dict()
    with torch.device("meta"):
        empty = MoE(config(name), OPS)
    assert getattr(empty.to_empty(device="cpu"), buffer).device.type == "cpu"


def test_how_buffers_begin():
    bias, penalty, table = (MoE(config(name), OPS) for name in ("deepseek_v3", "remoe", "hash"))
    bias.bias.fill_(3)
    for moe in (bias, penalty, table):
        moe.begin(4)
    assert (bias.bias == 0).all() and penalty.penalty.item() == pytest.approx(1e-8)
    assert all(len(set(line)) == 2 for line in table.table.tolist())
    again, other = MoE(config("hash"), OPS), MoE(config("hash"), OPS)
    again.begin(4), other.begin(5)
    assert torch.equal(again.table, table.table) and not torch.equal(other.table, table.table)


def test_one_expert_is_a_dense_layer():
    moe, ffn, x = layer(config("mixtral", experts=1, top_k=1)), Dense(6, 5).double(), randn(2, 7, 6)
    ffn.load_state_dict({"w13": moe.w13[0].detach(), "w2": moe.w2[0].detach()})
    torch.testing.assert_close(moe(x, NOWHERE)[0], ffn(x, NOWHERE))
    gate, up = (x @ ffn.w13.T).split(5, -1)
    torch.testing.assert_close(ffn(x, NOWHERE), (gate * gate.sigmoid() * up) @ ffn.w2.T)


@every
def test_router_in_float32_under_bf16(name):
    """A bf16 layer routes by float32 products of its bf16 tokens and weights."""
    moe = layer(config(name), dtype=torch.bfloat16)
    x = randn(64, 6).bfloat16()
    assert moe.logits(x).dtype == torch.float32
    if moe.gate is not None:
        torch.testing.assert_close(moe.logits(x), x.float() @ moe.gate.float().T)
    assert moe(x[None], at(x[None]))[0].dtype == torch.bfloat16


@every
def test_autocast_leaves_the_router_alone(name):
    """Under bf16 autocast, as the trainer runs it."""
    moe, x = layer(config(name), dtype=torch.float32), randn(2, 8, 6, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, stats = moe(x, at(x))
    assert y.isfinite().all()
    if ROUTER[name].weights != "slots":
        torch.testing.assert_close(stats.probability, moe(x, at(x))[1].probability)


TIGHT = {name: {} if ROUTER[name].weights == "slots" else {"capacity_factor": 0.4} for name in ROUTER}


@every
@pytest.mark.parametrize("key", [None, 5])
def test_sequences_do_not_see_each_other(name, key):
    moe = layer(config(name, **TIGHT[name]))
    x = randn(3, 8, 6)
    whole, _ = moe(x, at(x, key=key))
    for row in range(3):
        mine = slice(row, row + 1)
        alone = moe(x[mine], at(x[mine], key=key, index=at(x).index[mine], tokens=at(x).tokens[mine]))[0][0]
        torch.testing.assert_close(alone, whole[row])


@every
def test_packed_documents_do_not_see_each_other(name):
    moe = layer(config(name, **TIGHT[name]))
    x = randn(2, 10, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 7, 7, -1, -1]])
    words = at(x).tokens
    packed, stats = moe(x, at(x, documents=documents))
    for row, borders in enumerate(([3, 7], [6, 2, 2])):
        pieces = zip(x[row].split(borders), words[row].split(borders), strict=True)
        parts = [moe(part[None], at(part[None], tokens=own[None]))[0][0] for part, own in pieces]
        torch.testing.assert_close(packed[row], torch.cat(parts))
    assert not torch.allclose(packed, moe(x, at(x))[0])  # and it matters here
    assert stats.dropped.sum() > 0 or ROUTER[name].offered or ROUTER[name].weights == "slots"
    # In numbers that are counted already, some of them nobody's: the same, and as much room where it is filled up.
    counted = Documents(torch.tensor([4] * 3 + [3] * 7 + [0] * 6 + [8] * 2 + [6] * 2), 10)
    for got, wanted in zip(moe(x, at(x, documents=counted))[1], stats, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moe(x, at(x, documents=counted))[0], packed, rtol=1e-12, atol=1e-12)
    if moe.config.capacity < math.inf:
        moe = layer(config(name, pad=True, **TIGHT[name]))
        rooms = [moe.more(at(x), apart(given, x))["room"] for given in (counted, documents)]
        assert rooms[0] == rooms[1]


@every
def test_decoding_agrees_where_promised(name):
    """Token by token against the whole text, with the row's own capacity and with another."""
    router = ROUTER[name]
    for factor in [None] if router.weights == "slots" else (None, 0.5) if router.offered else (None, 0.5, math.inf):
        moe = layer(config(name, capacity_factor=factor))
        agree = []
        for seed in range(40):
            x = randn(1, 12, 6, seed=seed)
            x = x + 3 * x[:, :1] if seed % 2 else x  # nearly all tokens to the same experts
            alone = [moe(x[:, t : t + 1], at(x[:, :1], tokens=at(x).tokens[:, t : t + 1]))[0] for t in range(12)]
            agree.append(torch.allclose(torch.cat(alone, 1), moe(x, at(x))[0]))
        assert all(agree) == moe.config.prefix_stable, factor
        assert moe.config.capacity == (router.capacity if factor is None else factor)


@every
def test_no_tokens(name):
    moe = layer(config(name, shared=4))
    for shape in ((0, 5, 6), (2, 0, 6)):
        x = torch.zeros(shape, dtype=torch.float64)
        y, stats = moe(x, at(x, documents=torch.zeros(shape[:2]).long()))
        assert y.shape == shape and stats.tokens == 0 and stats.counts.tolist() == [0] * 6
        (y.sum() + stats.probability.sum() + stats.z).backward()
        assert all(p.grad is None or (p.grad == 0).all() for p in moe.parameters())
        for own in (moe.w13, moe.w2, moe.gate):
            assert own is None or own.grad is not None, name


@every
@pytest.mark.parametrize("key", [None, 5])
def test_recomputation_changes_nothing(name, key):
    """Ties, drops and noise included: the second forward pass routes as the first."""
    tight = {} if ROUTER[name].weights == "slots" else {"capacity_factor": 0.7}
    moe, x = layer(config(name, **tight)), randn(2, 9, 6).round().requires_grad_()

    def gradients(run):
        y, stats = run(x)
        loss = y.square().sum() + (stats.probability * stats.counts).sum() + stats.z
        leaves = (x, *moe.parameters())
        return (*stats, *torch.autograd.grad(loss, leaves, materialize_grads=True))

    plain = gradients(lambda x: moe(x, at(x, key=key)))
    again = gradients(lambda x: checkpoint(moe, x, at(x, key=key), use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"router": "mixtrall"}, r"unknown router 'mixtrall'; expected one of linear_moe, qwen2_moe"),
        ({"top_k": 7}, r"top_k=7 must be at least 1 and at most experts=6"),
        ({"router": "switch"}, r"router Switch is defined for top_k=1 only, got top_k=2"),
        ({"router": "deepseek_v3", "groups": 4}, r"groups=4 must divide experts=6"),
        ({"groups": 2}, r"router Mixtral has no groups of experts"),
        ({"groups": 0}, r"groups=0 must be at least 1"),
        ({"width": 0}, r"width=0 must be at least 1"),
        ({"hidden": -1}, r"hidden=-1 must be at least 1"),
        ({"slots": 0}, r"slots=0 must be at least 1"),
        ({"shared": -1}, r"shared=-1 must be at least 0"),
        ({"latent": -1}, r"latent=-1 must be at least 0 \(0: the token itself\)"),
        ({"identity": -1}, r"identity=-1 must be at least 0 \(0: none\)"),
        ({"jitter": 1.0}, r"jitter=1.0 must be at least 0 and below 1"),
        ({"dropout": -0.1}, r"dropout=-0.1 must be at least 0 and below 1"),
        ({"shared_gate": True}, r"shared_gate=True needs a shared expert, got shared=0"),
        ({"capacity_factor": 0.0}, r"capacity factor must be above 0"),
        ({"kind": "swish"}, r"unknown kind of expert 'swish'; expected one of swiglu, gelu"),
        ({"drop": "random"}, r"unknown drop order 'random'; expected one of position, slot, probability, priority"),
        ({"pad": True}, r"pad=True needs a capacity, and router Mixtral has none: give a capacity_factor"),
        ({"router": "hash"}, r"router hash goes by the word: it needs the vocabulary, got 0"),
        ({"router": "soft", "capacity_factor": 1.0}, r"router Soft MoE mixes all tokens: it has no identity experts"),
        ({"router": "expert_choice", "capacity_factor": math.inf}, r"by its experts' capacity, which cannot be inf"),
    ],
)
def test_errors_are_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        replace(config("mixtral"), **arguments)
    assert "\n" not in str(error.value)
