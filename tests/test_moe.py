"""Laws of the expert layer: sorted experts are a loop over experts, the layer is its gate matrix, and the blocks of
transformers agree, outputs and gradients."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from reference.moe import Dense, Experts, MoE, experts, swiglu
from reference.routers import ROUTER, Routing, dense

OPS = SimpleNamespace(experts=experts)  # all that the layer asks of a backend
NOWHERE = SimpleNamespace(documents=None)
every = pytest.mark.parametrize("name", ROUTER)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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
    by_expert = torch.stack([swiglu(x, w13[e], w2[e]) for e in range(len(w13))], 1)  # n e d
    inner = (dy[:, None] * by_expert).sum(-1).gather(-1, routing.index) * routing.kept
    torch.testing.assert_close(torch.autograd.grad(y, routing.gate, dy)[0], inner)


def test_dropped_pairs_are_not_computed():
    """Not even when the expert would overflow and the gate were not zero."""
    w13, w2 = randn(2, 4, 3), randn(2, 3, 2)
    w13[1] = math.inf
    routing = Routing(torch.tensor([[0, 1]] * 3), torch.ones(3, 2), torch.tensor([[True, False]] * 3))
    x = randn(3, 3)
    torch.testing.assert_close(experts(x, routing, w13, w2), swiglu(x, w13[0], w2[0]))


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
    torch.testing.assert_close(y.float(), 0.001 * swiglu(x, w13[0], w2[0]).float(), rtol=1e-2, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the layer


def config(name, **other):
    router = ROUTER[name]
    limits = {"groups": 3, "groups_kept": 2} if router.group_best else {}
    return Experts(
        **{"width": 6, "experts": 6, "top_k": router.top_k or 2, "hidden": 5, "router": name} | limits | other
    )


def layer(c, seed=0, dtype=torch.float64):
    """Every parameter and the balancing bias random."""
    moe = MoE(c, OPS).to(dtype)
    with torch.no_grad():
        for i, p in enumerate(moe.parameters()):
            p.copy_(randn(*p.shape, seed=seed + i) / 2)
        if moe.bias is not None:
            moe.bias.copy_(randn(c.experts, seed=seed + 50) / 4)
    return moe


@every
@pytest.mark.parametrize("shared", [{}, {"shared": 4}, {"shared": 4, "shared_gate": True}])
def test_the_layer_is_its_gate_matrix(name, shared):
    moe, x = layer(config(name, **shared)), randn(2, 7, 6, seed=20)
    seen = []

    def spy(tokens, routing, w13, w2):
        seen.append(routing)
        return experts(tokens, routing, w13, w2)

    moe.ops = SimpleNamespace(experts=spy)
    y, stats = moe(x, NOWHERE)
    (routing,) = seen
    tokens = x.reshape(14, 6)
    expected = looped(tokens, routing, moe.w13, moe.w2)
    if shared:
        extra = swiglu(tokens, moe.shared.w13, moe.shared.w2)
        expected += torch.sigmoid(tokens @ moe.shared_gate[0])[:, None] * extra if len(shared) > 1 else extra
    torch.testing.assert_close(y.view(14, 6), expected)
    scores = ROUTER[name].score(tokens @ moe.gate.T)
    torch.testing.assert_close(stats.probability, (scores / scores.sum(-1, keepdim=True)).sum(0))
    assert stats.counts.sum() == 14 * moe.config.top_k and stats.tokens == 14
    assert stats.dropped.sum() == (~routing.kept).sum()


def test_names_and_shapes_of_the_parameters():
    shapes = {"gate": (6, 6), "w13": (6, 10, 6), "w2": (6, 6, 5)}
    shared = {"shared.w13": (8, 6), "shared.w2": (6, 4), "shared_gate": (1, 6)}
    for name in ROUTER:
        bias = {"bias": (6,)} if ROUTER[name].bias else {}
        plain, full = MoE(config(name), OPS), MoE(config(name, shared=4, shared_gate=True), OPS)
        assert {n: tuple(p.shape) for n, p in plain.state_dict().items()} == shapes | bias
        assert {n: tuple(p.shape) for n, p in full.state_dict().items()} == shapes | shared | bias
        assert {n for n, _ in full.named_parameters()} == set(shapes | shared)
    assert {n: tuple(p.shape) for n, p in Dense(6, 5).named_parameters()} == {"w13": (10, 6), "w2": (6, 5)}


@every
def test_a_forward_pass_changes_nothing(name):
    moe = layer(config(name, shared=4))
    before = {n: p.clone() for n, p in moe.state_dict().items()}
    first, second = moe(randn(2, 5, 6), NOWHERE), moe(randn(2, 5, 6), NOWHERE)
    assert all(torch.equal(p, before[n]) for n, p in moe.state_dict().items())
    for a, b in zip((first[0], *first[1]), (second[0], *second[1]), strict=True):
        assert torch.equal(a, b)  # counted once each, not accumulated


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_balancing_bias_stays_float32(dtype):
    moe = MoE(config("deepseek_v3"), OPS)
    assert moe.bias.dtype == torch.float32 and (moe.bias == 0).all()
    moe.bias += 1 + 2**-20
    moe.to(dtype)
    assert moe.bias.dtype == torch.float32 and (moe.bias == 1 + 2**-20).all() and moe.gate.dtype == dtype
    assert "bias" in dict(moe.named_buffers()) and "bias" in moe.state_dict()
    with torch.device("meta"):
        empty = MoE(config("deepseek_v3"), OPS)
    assert empty.to_empty(device="cpu").bias.device.type == "cpu"


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
    torch.testing.assert_close(moe.logits(x), x.float() @ moe.gate.float().T)
    assert moe(x[None], NOWHERE)[0].dtype == torch.bfloat16


@every
def test_sequences_do_not_see_each_other(name):
    moe = layer(config(name, capacity_factor=0.4))
    x = randn(3, 8, 6)
    whole, _ = moe(x, NOWHERE)
    for row in range(3):
        torch.testing.assert_close(moe(x[row : row + 1], NOWHERE)[0][0], whole[row])


@every
def test_packed_documents_do_not_see_each_other(name):
    moe = layer(config(name, capacity_factor=0.4))
    x = randn(2, 10, 6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 7, 7, -1, -1]])
    packed, stats = moe(x, SimpleNamespace(documents=documents))
    for row, borders in enumerate(([3, 7], [6, 2, 2])):
        parts = [moe(part[None], NOWHERE)[0][0] for part in x[row].split(borders)]
        torch.testing.assert_close(packed[row], torch.cat(parts))
    assert not torch.allclose(packed, moe(x, NOWHERE)[0]) and stats.dropped.sum() > 0  # and it matters here


@every
def test_decoding_agrees_where_promised(name):
    """Token by token against the whole text, with the row's own capacity and with another."""
    for factor in (None, 0.5, math.inf):
        moe = layer(config(name, capacity_factor=factor))
        agree = []
        for seed in range(20):
            x = randn(1, 12, 6, seed=seed)
            alone = torch.cat([moe(x[:, t : t + 1], NOWHERE)[0] for t in range(12)], 1)
            agree.append(torch.allclose(alone, moe(x, NOWHERE)[0]))
        assert all(agree) == moe.config.prefix_stable
        assert moe.config.capacity == (ROUTER[name].capacity if factor is None else factor)


@every
def test_no_tokens(name):
    moe = layer(config(name, shared=4))
    for shape in ((0, 5, 6), (2, 0, 6)):
        y, stats = moe(
            torch.zeros(shape, dtype=torch.float64), SimpleNamespace(documents=torch.zeros(shape[:2]).long())
        )
        assert y.shape == shape and stats.tokens == 0 and stats.counts.tolist() == [0] * 6
        (y.sum() + stats.probability.sum() + stats.z).backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in moe.parameters())


@every
def test_recomputation_changes_nothing(name):
    """Ties and drops included: the second forward pass routes as the first."""
    moe, x = layer(config(name, capacity_factor=0.7)), randn(2, 9, 6).round().requires_grad_()

    def gradients(run):
        y, stats = run(x)
        loss = y.square().sum() + (stats.probability * stats.counts).sum() + stats.z
        return (*stats, *torch.autograd.grad(loss, (x, *moe.parameters())))

    plain = gradients(lambda x: moe(x, NOWHERE))
    again = gradients(lambda x: checkpoint(moe, x, NOWHERE, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"router": "mixtrall"}, r"unknown router 'mixtrall'; expected one of linear_moe, mixtral"),
        ({"top_k": 7}, r"top_k=7 must be at least 1 and at most experts=6"),
        ({"router": "switch"}, r"router Switch is defined for top_k=1 only, got top_k=2"),
        ({"router": "deepseek_v3", "groups": 4}, r"groups=4 must divide experts=6"),
        ({"groups": 2}, r"router Mixtral has no groups of experts"),
        ({"groups": 0}, r"groups=0 must be at least 1"),
        ({"width": 0}, r"width=0 must be at least 1"),
        ({"hidden": -1}, r"hidden=-1 must be at least 1"),
        ({"shared": -1}, r"shared=-1 must be at least 0"),
        ({"shared_gate": True}, r"shared_gate=True needs a shared expert, got shared=0"),
        ({"capacity_factor": 0.0}, r"capacity factor must be above 0"),
    ],
)
def test_errors_are_one_clear_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        replace(config("mixtral"), **arguments)
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------- the published blocks, same weights


def assert_same_block(moe, block, names, x):
    """Outputs and every gradient agree in float32, and the output moves when a weight moves."""
    theirs = dict(block.named_parameters())
    x = x.requires_grad_()
    y, expected = moe(x, NOWHERE)[0], block(x)
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6)
    dy = randn(*x.shape, seed=77, dtype=torch.float32)
    ours = torch.autograd.grad(y, [x, *moe.parameters()], dy)
    other = torch.autograd.grad(expected, [x, *theirs.values()], dy)
    other = dict(zip(["x", *theirs], other, strict=True))
    for (name, _), got in zip([("x", x), *moe.named_parameters()], ours, strict=True):
        want = torch.cat([other[n] for n in names[name]], -2) if name != "x" else other["x"]
        scale = want.abs().max()
        assert scale > 0, f"{name} does not move the output"
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * scale.item(), msg=lambda m, n=name: f"{n}: {m}")
    assert sorted(n for own in names.values() for n in own) == sorted(theirs)
    assert "fla" not in sys.modules


def filled(moe, block, names):
    """Random weights everywhere, ours copied from theirs."""
    theirs = dict(block.named_parameters())
    with torch.no_grad():
        for i, p in enumerate(theirs.values()):
            p.copy_(randn(*p.shape, seed=i, dtype=torch.float32) / 3)
        for name, p in moe.named_parameters():
            p.copy_(torch.cat([theirs[n] for n in names[name]], -2))
    return moe, block


STANDARD = {"gate": ["gate.weight"], "w13": ["experts.gate_up_proj"], "w2": ["experts.down_proj"]}
WIDE = {"width": 16, "experts": 8, "top_k": 3, "hidden": 12}
X = (2, 33, 16)


def mlp(name):
    return {
        "shared.w13": [f"{name}.gate_proj.weight", f"{name}.up_proj.weight"],
        "shared.w2": [f"{name}.down_proj.weight"],
    }


def test_mixtral_block():
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    c = MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=8, num_experts_per_tok=3)
    c._experts_implementation = "eager"
    moe, block = filled(MoE(Experts(**WIDE, router="mixtral"), OPS), MixtralSparseMoeBlock(c), STANDARD)
    assert_same_block(moe, block, STANDARD, randn(*X, dtype=torch.float32))


@pytest.mark.parametrize("name", ["qwen2_moe", "linear_moe"])
def test_qwen2_moe_block(name):
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock

    c = Qwen2MoeConfig(
        hidden_size=16,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=20,
        num_experts=8,
        num_experts_per_tok=3,
        norm_topk_prob=False,
    )
    c._experts_implementation = "eager"
    names = STANDARD | mlp("shared_expert") | {"shared_gate": ["shared_expert_gate.weight"]}
    ours = MoE(Experts(**WIDE, router=name, shared=20, shared_gate=True), OPS)
    moe, block = filled(ours, Qwen2MoeSparseMoeBlock(c), names)
    assert_same_block(moe, block, names, randn(*X, dtype=torch.float32))


@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (2, 1)])
def test_deepseek_v3_block(groups, kept):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    c = DeepseekV3Config(
        hidden_size=16,
        moe_intermediate_size=12,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
    )
    c._experts_implementation = "eager"
    names = STANDARD | mlp("shared_experts")
    ours = MoE(Experts(**WIDE, router="deepseek_v3", groups=groups, groups_kept=kept, shared=24), OPS)
    moe, block = filled(ours, DeepseekV3MoE(c), names)
    plain = moe(randn(*X, dtype=torch.float32), NOWHERE)[0]
    bias = randn(8, seed=5, dtype=torch.float32) / 2
    moe.bias.copy_(bias)
    block.gate.e_score_correction_bias.copy_(bias)
    assert not torch.allclose(plain, moe(randn(*X, dtype=torch.float32), NOWHERE)[0])  # the bias matters here
    assert_same_block(moe, block, names, randn(*X, dtype=torch.float32))


@pytest.mark.parametrize("factor", [None, 0.5])
def test_switch_router(factor):
    """G itself: the block of that model has other experts. Its capacity is set by hand to ours, per sequence."""
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersConfig,
        SwitchTransformersTop1Router,
    )

    moe = layer(Experts(width=16, experts=4, top_k=1, hidden=12, router="switch", capacity_factor=factor))
    room = math.ceil((factor or 1.25) * 33 / 4)
    c = SwitchTransformersConfig(d_model=16, num_experts=4, expert_capacity=room, router_jitter_noise=0.0)
    router = SwitchTransformersTop1Router(c)
    moe.float()
    with torch.no_grad():
        router.classifier.weight.copy_(moe.gate)
    seen = []
    moe.ops = SimpleNamespace(experts=lambda x, routing, w13, w2: seen.append(routing) or x)
    x = randn(*X, dtype=torch.float32)
    stats = moe(x, NOWHERE)[1]
    G = dense(seen[0], 4)
    index, probability, _ = router(x)
    expected = (index * probability).view(-1, 4)
    torch.testing.assert_close(G, expected, rtol=1e-6, atol=1e-7)
    assert stats.dropped.sum() == (index.sum(-1) == 0).sum() > 0
    weights = randn(*G.shape, seed=3, dtype=torch.float32)
    ours = torch.autograd.grad((G * weights).sum(), moe.gate)[0]
    theirs = torch.autograd.grad((expected * weights).sum(), router.classifier.weight)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert ours.abs().max() > 0 and "fla" not in sys.modules
