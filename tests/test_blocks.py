"""The expert layer is the published blocks of transformers: same weights and input, same output and gradients.

A released block is a line of `BLOCKS`, under the row of the router table that it is. Where it keeps a weight in another
layout, the line says how to turn theirs into ours, and their gradient is turned the same way. Rows that nobody has
released as a block are computed by hand elsewhere; tests/conftest.py names where (`EXEMPT`), and none is in neither.
"""

import math
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import EXEMPT
from reference.moe import Experts, MoE, experts
from reference.routers import ROUTER, dense, rooms, route, sum_to_one, top

OPS = SimpleNamespace(experts=experts, top=top)  # all that the layer asks of a backend
WIDE = {"width": 16, "experts": 8, "top_k": 3, "hidden": 12}
WORDS = 7
GATE = "gate.weight"


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = randn(2, 33, 16)
SIDE = SimpleNamespace(documents=None, key=None, index=None, tokens=torch.arange(66).view(2, 33) % WORDS)


def under_each_other(weights):
    return torch.cat(weights, -2) if len(weights) > 1 else weights[0]


class Block(NamedTuple):
    """A released block, in their words and in ours."""

    model: str  # its folder in transformers
    name: str  # of its class
    theirs: Mapping[str, Any]  # of their configuration, besides the width
    ours: Mapping[str, Any] = {}  # of our configuration, besides `WIDE` and the router
    names: Mapping[str, list[str]] = {}  # our parameter: theirs, where they are not those of `STANDARD`
    layout: Mapping[str, Callable[[list], torch.Tensor]] = {}  # our parameter: how ours is made of theirs
    buffers: Mapping[str, str] = {}  # our buffer: theirs
    besides: str = ""  # another module that their model adds to the block
    output: Callable = lambda block, x: block(x)
    begin: Callable = lambda block: None  # what random weights need to reach every branch


STANDARD = {"gate": [GATE], "w13": ["experts.gate_up_proj"], "w2": ["experts.down_proj"]}
AT_ROUTER = {"gate": ["router.weight"]}
BIAS = {"bias": "gate.e_score_correction_bias"}


def mlp(name):
    return {
        "shared.w13": [f"{name}.gate_proj.weight", f"{name}.up_proj.weight"],
        "shared.w2": [f"{name}.down_proj.weight"],
    }


def loud(block):
    """Experts whose hidden channels reach what they are clamped to."""
    block.experts.gate_up_proj.mul_(6)


def alike(block):
    """Logits near each other, for a router that drops those which are not."""
    block.router.weight.copy_(block.router.weight[:1] + block.router.weight / 50)


# ---------------------------------------------------------------------------------------------- the published blocks

MANY = {"num_experts": 8, "num_experts_per_tok": 3}  # the spellings of 8 experts, 3 a token
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 3}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3}
SMALL, LESS = {"intermediate_size": 12}, {"moe_intermediate_size": 12}
SHARED = LESS | {"n_shared_experts": 2}
SIGMOID_GATED = mlp("shared_expert") | {"shared_gate": ["shared_expert_gate.weight"]}
ONE_GROUP, GROUPS = {"n_group": 1, "topk_group": 1}, {"n_group": 4, "topk_group": 2}
OUR_GROUPS = {"groups": 4, "groups_kept": 2}
SUM = {"norm_topk_prob": True}
RELU_SQUARED = (
    {"w13": ["experts.up_proj"], "shared.w13": ["shared_experts.up_proj.weight"]}
    | {"shared.w2": ["shared_experts.down_proj.weight"]}
    | {"down": ["fc1_latent_proj.weight"], "up": ["fc2_latent_proj.weight"]}
)
SWITCH = {
    "gate": ["router.classifier.weight"],
    "w13": [f"experts.expert_{e}.wi.weight" for e in range(4)],
    "w2": [f"experts.expert_{e}.wo.weight" for e in range(4)],
}


def qwen2():
    theirs = MANY | LESS | {"shared_expert_intermediate_size": 20, "norm_topk_prob": False}
    return Block("qwen2_moe", "Qwen2MoeSparseMoeBlock", theirs, {"shared": 20, "shared_gate": True}, SIGMOID_GATED)


def like_deepseek_v3(model, name, scale=2.5, groups=False, **theirs):
    """The many blocks of that plan."""
    return Block(
        model,
        name,
        SHARED | SUM | {"routed_scaling_factor": scale} | (GROUPS if groups else ONE_GROUP) | theirs,
        {"shared": 24} | (OUR_GROUPS if groups else {}),
        mlp("shared_experts"),
        buffers=BIAS,
    )


def granite(model, name, mlp):
    """Their always-on MLP stands beside the block, in the decoder layer."""
    names = {name: [f"block.{n}" for n in own] for name, own in (STANDARD | AT_ROUTER).items()}
    names |= {"shared.w13": ["besides.input_linear.weight"], "shared.w2": ["besides.output_linear.weight"]}
    theirs = LOCAL | SMALL | {"shared_intermediate_size": 20, "num_attention_heads": 4}
    theirs |= {"mamba_n_heads": 4} if model == "granitemoehybrid" else {}
    return Block(model, name, theirs, {"shared": 20}, names, besides=mlp)


def nemotron(latent):
    theirs = ROUTED | LESS | SUM | ONE_GROUP | {"moe_shared_expert_intermediate_size": 20, "moe_latent_size": latent}
    return Block(
        "nemotron_h",
        "NemotronHMoE",
        theirs | {"routed_scaling_factor": 2.5, "mlp_hidden_act": "relu2"},
        {"kind": "relu_squared", "shared": 20, "latent": latent or 0},
        {name: own for name, own in RELU_SQUARED.items() if latent or name not in ("down", "up")},
        buffers=BIAS,
    )


def deepseek_v4(layer, ours, buffers, output=lambda block, x: block(x)):
    return Block(
        "deepseek_v4",
        "DeepseekV4SparseMoeBlock",
        ROUTED
        | LESS
        | {"routed_scaling_factor": 1.5, "vocab_size": WORDS, "mlp_layer_types": [layer], "num_hidden_layers": 1},
        {"kind": "clamped_swiglu", "shared": 12} | ours,
        mlp("shared_experts"),
        buffers=buffers,
        output=output,
        begin=loud,
    )


def switch(room, **ours):
    """A capacity of `room` tokens of a row of the batch."""
    return Block(
        "switch_transformers",
        "SwitchTransformersSparseMLP",
        {
            "d_model": 16,
            "d_ff": 12,
            "num_experts": 4,
            "expert_capacity": room,
            "dropout_rate": 0.0,
            "router_jitter_noise": 0.0,
        },
        {"experts": 4, "top_k": 1, "kind": "relu"} | ours,
        SWITCH,
        {"w13": torch.stack, "w2": torch.stack},
    )


BLOCKS: dict[str, list[Block]] = {
    "linear_moe": [qwen2()],
    "qwen2_moe": [qwen2()],
    "olmoe": [Block("olmoe", "OlmoeSparseMoeBlock", MANY | SMALL | {"norm_topk_prob": False})],
    "jamba": [Block("jamba", "JambaSparseMoeBlock", MANY | SMALL, names=AT_ROUTER)],
    "deepseek_moe": [
        Block(
            "deepseek_v2",
            "DeepseekV2Moe",
            ROUTED | SHARED | {"topk_method": "greedy", "routed_scaling_factor": 1.0, "num_attention_heads": 4},
            {"shared": 24},
            mlp("shared_experts"),
        )
    ],
    "mixtral": [Block("mixtral", "MixtralSparseMoeBlock", LOCAL | SMALL)],
    "minimax_01": [Block("minimax", "MiniMaxSparseMoeBlock", LOCAL | SMALL)],
    "qwen3_moe": [Block("qwen3_moe", "Qwen3MoeSparseMoeBlock", LOCAL | LESS | SUM)],
    "qwen3_next": [
        Block(
            "qwen3_next",
            "Qwen3NextSparseMoeBlock",
            MANY | LESS | SUM | {"shared_expert_intermediate_size": 20},
            {"shared": 20, "shared_gate": True},
            SIGMOID_GATED,
        )
    ],
    "hunyuan": [
        Block(
            "hunyuan_v1_moe",
            "HunYuanMoEV1Moe",
            {"num_experts": 8, "moe_topk": 3} | SMALL,
            {"shared": 12},
            mlp("shared_mlp") | {"gate": ["gate.wg.weight"]},
        )
    ],
    "granite": [
        Block("granitemoe", "GraniteMoeMoE", LOCAL | SMALL, names=AT_ROUTER),
        granite("granitemoeshared", "GraniteMoeSharedMoE", "GraniteMoeSharedMLP"),
        granite("granitemoehybrid", "GraniteMoeHybridMoE", "GraniteMoeHybridMLP"),
    ],
    "jet_moe": [
        Block(
            "jetmoe",
            "JetMoeMoE",
            LOCAL | SMALL | {"activation_function": "silu"},
            names={
                "gate": ["router.layer.weight"],
                "w13": ["input_linear.weight"],
                "w2": ["output_linear.weight"],
            },
            output=lambda block, x: block(x) - block.bias,  # one for all experts, after their sum: not the experts'
        )
    ],
    "gpt_oss": [
        Block(
            "gpt_oss",
            "GptOssMLP",
            LOCAL | SMALL,
            {"kind": "clamped_swish", "biases": True},
            AT_ROUTER
            | {"gate_bias": ["router.bias"], "b13": ["experts.gate_up_proj_bias"], "b2": ["experts.down_proj_bias"]},
            {
                "w13": lambda w: rearrange(w, "1 e d (f r) -> e (r f) d", r=2),  # theirs: gate and up by turns
                "b13": lambda b: rearrange(b, "1 e (f r) -> e (r f)", r=2),
                "w2": lambda w: rearrange(w, "1 e f d -> e d f"),
            },
            output=lambda block, x: block(x)[0],
            begin=loud,
        )
    ],
    "llama_4": [
        Block(
            "llama4",
            "Llama4TextMoe",
            {"num_local_experts": 8, "num_experts_per_tok": 1} | SMALL,
            {"top_k": 1, "shared": 12},
            AT_ROUTER | mlp("shared_expert"),
            {
                "w13": lambda w: rearrange(w, "1 e d f -> e f d"),
                "w2": lambda w: rearrange(w, "1 e f d -> e d f"),
            },
            output=lambda block, x: block(x)[0].view_as(x),
        )
    ],
    "deepseek_v2": [
        Block(
            "deepseek_v2",
            "DeepseekV2Moe",
            ROUTED
            | SHARED
            | GROUPS
            | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "num_attention_heads": 4},
            {"shared": 24} | OUR_GROUPS,
            mlp("shared_experts"),
        )
    ],
    "deepseek_v3": [
        like_deepseek_v3("deepseek_v3", "DeepseekV3MoE", groups=grouped, **ROUTED) for grouped in (False, True)
    ],
    "ling": [
        like_deepseek_v3("bailing_hybrid", "BailingHybridMoE", groups=True, num_experts=8, num_experts_per_token=3)
    ],
    "kimi_linear": [like_deepseek_v3("kimi_linear", "KimiLinearMoE", 2.446, num_experts=8, num_experts_per_token=3)],
    "glm_4_5": [like_deepseek_v3("glm4_moe", "Glm4MoeMoE", **ROUTED)],
    "nemotron_3": [nemotron(latent) for latent in (None, 10)],
    "deepseek_v4": [deepseek_v4("moe", {}, BIAS)],
    "deepseek_v4_hash": [
        deepseek_v4("hash_moe", {"vocabulary": WORDS}, {"table": "gate.tid2eid"}, lambda b, x: b(x, SIDE.tokens))
    ],
    "longcat": [
        Block(
            "longcat_flash",
            "LongcatFlashMoE",
            {"n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 3, "expert_ffn_hidden_size": 12}
            | {"routed_scaling_factor": 6.0},
            {"identity": 4},
            {"gate": ["router.classifier.weight"]},
            {"w13": lambda w: w[0][:8]},  # theirs has rows for the identity experts, which nothing reads
            {"bias": "router.e_score_correction_bias"},
        )
    ],
    "switch": [switch(math.ceil(factor * 33 / 4), capacity_factor=own) for factor, own in ((1.25, None), (0.5, 0.5))],
    "moe_mamba": [switch(33 // 4)],
    "sparse_mixer": [
        Block(
            "phimoe",
            "PhimoeSparseMoeBlock",
            {"num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.01} | SMALL,
            {"top_k": 2},
            AT_ROUTER,
            begin=alike,
        )
    ],
}
CASES = {f"{row}-{block.name}-{i}": (row, block) for row, own in BLOCKS.items() for i, block in enumerate(own)}


class Beside(nn.Module):
    """A block and what stands beside it: their sum."""

    def __init__(self, block: nn.Module, besides: nn.Module):
        super().__init__()
        self.block, self.besides = block, besides

    def forward(self, x):
        return self.block(x) + self.besides(x)


def released(case: Block) -> nn.Module:
    """Their block, as in evaluation, its experts in the plain loop."""
    module = import_module(f"transformers.models.{case.model}.modeling_{case.model}")
    names = (n for n in vars(module) if n.endswith("Config") and case.name.startswith(n.removesuffix("Config")))
    config = getattr(module, max(names, key=len))(**{"hidden_size": 16} | case.theirs)
    config._experts_implementation = "eager"
    layer = {"layer_idx": 0} if case.model == "deepseek_v4" else {}
    block = getattr(module, case.name)(config, **layer)
    return (Beside(block, getattr(module, case.besides)(config)) if case.besides else block).eval()


def weights(block: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in block.named_parameters() if p.requires_grad}


def turned(case: Block, name: str, theirs: list[torch.Tensor]) -> torch.Tensor:
    """Our parameter of that name, made of theirs; or its gradient, of theirs."""
    return case.layout.get(name, under_each_other)(theirs)


@torch.no_grad()
def same(row: str, case: Block) -> tuple[MoE, nn.Module, dict[str, list[str]]]:
    """Our layer and their block, random weights everywhere, ours made of theirs, and which are made of which."""
    moe, block = MoE(Experts(**(WIDE | {"router": row} | case.ours)), OPS), released(case)
    names = {name: (STANDARD | case.names)[name] for name, _ in moe.named_parameters()}
    for i, p in enumerate(weights(block).values()):
        p.copy_(randn(*p.shape, seed=i) / 3)
    case.begin(block)
    for name, p in moe.named_parameters():
        p.copy_(turned(case, name, [block.get_parameter(n) for n in names[name]]))
    moe.begin(3)
    if moe.bias is not None:
        moe.bias.copy_(randn(len(moe.bias), seed=5) / 10)
    for name, other in case.buffers.items():
        block.get_buffer(other).copy_(getattr(moe, name))
    return moe, block, names


@pytest.mark.parametrize("name", CASES)
def test_released_blocks(name):
    """Outputs and every gradient agree in float32, and both move when a weight moves."""
    row, case = CASES[name]
    moe, block, names = same(row, case)
    theirs, x = weights(block), X.clone().requires_grad_()
    (y, stats), expected = moe(x, SIDE), case.output(block, x)
    size = expected.abs().max().item()
    torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6 * max(1.0, size))
    dy = randn(*x.shape, seed=77)
    ours = torch.autograd.grad(y, [x, *moe.parameters()], dy)
    other = torch.autograd.grad(expected, [x, *theirs.values()], dy, materialize_grads=True)
    other = dict(zip(["x", *theirs], other, strict=True))
    for (own, _), got in zip([("x", x), *moe.named_parameters()], ours, strict=True):
        want = other["x"] if own == "x" else turned(case, own, [other[n] for n in names[own]])
        scale = want.abs().max().item()
        assert scale > 0, f"{own} does not move the output"
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6 * scale, msg=lambda m, own=own: f"{own}: {m}")
    left = set(theirs) - {n for own in names.values() for n in own}
    assert not any(other[n].any() for n in left), f"{left} move the output"
    assert set(case.buffers) == {n for n, b in moe.named_buffers() if b is not None}
    assert bool(stats.dropped.sum() > 0) == (moe.config.capacity < math.inf)
    if moe.bias is not None:  # it matters here
        moe.bias.zero_()
        assert not torch.allclose(moe(x, SIDE)[0], y)
    assert "fla" not in sys.modules


@pytest.mark.parametrize("name", ["gshard", "st_moe", "open_moe", "v_moe"])
@given(
    n=st.integers(1, 24),
    e=st.integers(2, 6),
    seed=st.integers(0, 10**6),
    factor=st.sampled_from((0.3, 0.5, 1.0, 1.25, 2.0)),
)
def test_two_experts_a_token_are_those_of_nllb(name, n, e, seed, factor):
    """G and its gradient out of training, where no second expert is left out by chance: who is served first, who finds
    no room. The released block feeds its router's mask where its experts expect numbers, so the router alone is the
    oracle; rows that do not divide the two gates by their sum are its G times that sum."""
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeConfig, NllbMoeTop2Router

    router, logits = ROUTER[name], randn(n, e, seed=seed).double().requires_grad_()
    room = int(rooms(router, factor, 2, e, torch.tensor(n)))
    theirs = NllbMoeTop2Router(NllbMoeConfig(d_model=4, num_experts=e, expert_capacity=room))
    theirs.dtype = torch.float64
    theirs.second_expert_policy, theirs.normalize_router_prob_before_dropping = "all", True
    theirs.batch_prioritized_routing = name == "v_moe"
    if name == "gshard" and factor == 1.0 and n % e == 0:
        theirs.expert_capacity = None  # their own, 2 ceil(n/e), is then ours
    expected = theirs.route_tokens(logits, torch.float64)[1]
    if router.renormalize is not sum_to_one:
        expected = expected * logits.softmax(-1).topk(2).values.sum(-1, keepdim=True)
    G = dense(route(router, logits, 2, capacity=factor), e)
    torch.testing.assert_close(G, expected, rtol=1e-8, atol=1e-8)  # 1e-9 in GShard's denominator, none in theirs
    w = randn(n, e, seed=seed + 1).double()
    got, want = (torch.autograd.grad((g * w).sum(), logits)[0] for g in (G, expected))
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-8)


def test_every_row_has_an_oracle_or_says_where_it_has():
    elsewhere = EXEMPT["test_released_blocks"]
    assert set(BLOCKS) | set(elsewhere) == set(ROUTER) and not set(BLOCKS) & set(elsewhere)
    for row, where in elsewhere.items():
        file, _, law = where.partition(".py::")
        assert hasattr(import_module(file), law), f"{row}: there is no {where}"
