"""The published shapes have the published sizes, and a configuration that cannot be built says so in one line."""

import ast
import importlib
import inspect
import math
import re
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch

from inputs import small
from reference import ops
from reference.lsm import LSM
from reference.mixers.gated import GLA
from reference.mixers.linear_attention import FEATURE_MAP
from reference.mixers.softmax import Softmax
from reference.model import LanguageModel, sizes
from reference.moe import Dense, MoE
from reference.presets import PRESETS, Model
from reference.printed import PRINTED
from reference.released import RELEASED
from reference.routers import ROUTER

# Billions of parameters without embeddings and norms, then of those one token uses, as 2503.05447 counts them (its
# layers have four d × d projections), then the same with the output gate; embedding and head.
PUBLISHED = {
    "a0.3b-2b": ((2.165, 0.315), (2.178, 0.328), 0.311),
    "a1b-7b": ((6.713, 1.076), (6.780, 1.143), 0.622),
}


def billions(n):
    return round(n / 1e9, 3)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("gate", [False, True])
def test_published_sizes(name, gate):
    count = sizes(replace(PRESETS[name][1], gate=gate))
    besides = count["embeddings"] + count["norms"]
    got = (billions(count["total"] - besides), billions(count["active"] - besides))
    assert got == PUBLISHED[name][gate]
    assert billions(count["embeddings"]) == PUBLISHED[name][2]
    assert 0 < count["norms"] < 1e-3 * besides


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_without_memory(name):
    config = PRESETS[name][1]
    with torch.device("meta"):
        model = LanguageModel(config, ops)
    assert all(p.is_meta for p in model.parameters())
    assert sizes(config)["total"] == sum(p.numel() for p in model.parameters())


def test_hybrid_presets_have_one_softmax_layer_in_four():
    for name in PUBLISHED:
        pure, hybrid = (PRESETS[n][1] for n in (name, f"{name}-hybrid"))
        assert set(pure.letters) == {"L", "E"}
        assert hybrid.letters == "LELELENE" * (len(pure.letters) // 8)
        assert sizes(hybrid)["embeddings"] == sizes(pure)["embeddings"]


def test_tiny_is_a_small_model_of_the_same_kind():
    tiny = PRESETS["tiny"][1]
    assert tiny.experts >= 8 and tiny.top_k >= 2 and {"L", "N", "E"} <= set(tiny.letters)
    assert sizes(tiny)["total"] < 20e6


# The released configurations, where they are not the defaults of transformers' classes: file, class, fields.
GRANITE = {"vocab_size": 100352, "num_hidden_layers": 40, "mamba_d_state": 128, "tie_word_embeddings": True}
GRANITE |= {"layer_types": ["full_attention" if i % 10 == 5 else "linear_attention" for i in range(40)]}
KIMI = {"full_attn_layers": [4, 8, 12, 16, 20, 24, 27]}  # counted from 1
KIMI |= {"kda_layers": [i for i in range(1, 28) if i not in KIMI["full_attn_layers"]]}
NEMOTRON = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"  # M: Mamba2, *: attention, E: experts
CLASSES = {
    "minimax-01": (
        *("minimax", "MiniMax"),
        {
            "vocab_size": 200064,
            "hidden_size": 6144,
            "intermediate_size": 9216,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "head_dim": 128,
            "num_local_experts": 32,
            "layer_types": (["linear_attention"] * 7 + ["full_attention"]) * 10,
        },
    ),
    "qwen3-next-80b-a3b": ("qwen3_next", "Qwen3Next", {}),
    "kimi-linear-48b-a3b": ("kimi_linear", "KimiLinear", {"linear_attn_config": KIMI}),
    "jamba-v0.1": ("jamba", "Jamba", {}),
    "granite-4.0-h-small": (
        *("granitemoehybrid", "GraniteMoeHybrid"),
        GRANITE
        | {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "mamba_n_heads": 128,
            "num_local_experts": 72,
            "num_experts_per_tok": 10,
            "intermediate_size": 768,
            "shared_intermediate_size": 1536,
        },
    ),
    "granite-4.0-h-tiny": (
        *("granitemoehybrid", "GraniteMoeHybrid"),
        GRANITE
        | {
            "hidden_size": 1536,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "mamba_n_heads": 48,
            "num_local_experts": 64,
            "num_experts_per_tok": 6,
            "intermediate_size": 512,
            "shared_intermediate_size": 1024,
        },
    ),
    "nemotron-3-nano-30b-a3b": (
        *("nemotron_h", "NemotronH"),
        {
            "hybrid_override_pattern": NEMOTRON,
            "hidden_size": 2688,
            "num_key_value_heads": 2,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
        },
    ),
    "mixtral-8x7b": ("mixtral", "Mixtral", {}),
    "deepseek-v2": (
        *("deepseek_v2", "DeepseekV2"),
        {
            "hidden_size": 5120,
            "num_hidden_layers": 60,
            "num_attention_heads": 128,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 160,
            "num_experts_per_tok": 6,
            "first_k_dense_replace": 1,
        },
    ),
    "deepseek-v3": ("deepseek_v3", "DeepseekV3", {}),
    "qwen1.5-moe-a2.7b": ("qwen2_moe", "Qwen2Moe", {}),
    "qwen2-57b-a14b": (
        *("qwen2_moe", "Qwen2Moe"),
        {
            "hidden_size": 3584,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
        },
    ),
    "llama3-8b": (
        *("llama", "Llama"),
        {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
    ),
}


def of_transformers(name):
    """The released model of that preset, without memory."""
    file, kind, settings = CLASSES[name]
    configuration = importlib.import_module(f"transformers.models.{file}.configuration_{file}")
    modeling = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    with torch.device("meta"):
        return getattr(modeling, f"{kind}ForCausalLM")(getattr(configuration, f"{kind}Config")(**settings))


@pytest.mark.parametrize("name", CLASSES)
def test_released_models_have_as_many_parameters_as_in_transformers(name):
    """To the last one: no norm, bias or gate is more or less than released."""
    model, config = of_transformers(name), PRESETS[name][1]
    assert sizes(config)["total"] == sum(p.numel() for p in model.parameters())
    assert config.top_k == getattr(model.config, "num_experts_per_tok", config.top_k)


@pytest.mark.parametrize("name", CLASSES)
def test_released_models_have_their_layers_in_the_order_of_transformers(name):
    model, config = of_transformers(name), PRESETS[name][1]
    if name.startswith("nemotron"):  # whose layers have one sublayer each
        assert config.letters == NEMOTRON.translate(str.maketrans("M*", "LN"))
        assert [type(layer.mixer).__name__.removeprefix("NemotronH") for layer in model.model.layers] == [
            {"L": "Mamba2Mixer", "N": "Attention", "E": "MoE"}[letter] for letter in config.letters
        ]
        return
    layers = [{path.split(".")[1] for path, _ in layer.named_modules() if "." in path} for layer in model.model.layers]
    assert [letter for letter in config.letters if letter in "ED"] == ["DE"["experts" in parts] for parts in layers]
    kinds = getattr(model.config, "layer_types", len(layers) * ["full_attention"])
    linear = [kind == "linear_attention" for kind in kinds]
    assert [letter for letter in config.letters if letter in "LN"] == ["NL"[is_linear] for is_linear in linear]


# Billions of parameters as published, all and those that one token uses, then how many of the two matrices of the
# vocabulary each of the two numbers has in it. Hunyuan-TurboS was not released: some of its sizes are chosen to fit.
BILLIONS = {
    "minimax-01": ("456", "45.9", 2, 0),
    "hunyuan-turbos": ("560", "56", 2, 0),
    "qwen3-next-80b-a3b": ("80", "3", 2, 0),
    "kimi-linear-48b-a3b": ("48", "3", 0, 0),
    "jamba-v0.1": ("52", "12", 2, 2),
    "granite-4.0-h-small": ("32", "9", 2, 2),
    "granite-4.0-h-tiny": ("7", "1", 2, 2),
    "nemotron-3-nano-30b-a3b": ("31.6", "3.6", 2, 2),
    "mixtral-8x7b": ("46.7", "12.9", 2, 2),
    "deepseek-v2": ("236", "21", 2, 2),
    "deepseek-v3": ("671", "37", 2, 1),
    "qwen1.5-moe-a2.7b": ("14.3", "2.7", 2, 2),
    "qwen2-57b-a14b": ("57", "14", 2, 2),
    "llama3-8b": ("8.03", "8.03", 2, 2),
}
# Millions without embeddings and norms, as MoE-Mamba (2401.04081) counts them: all, those that one token uses.
MILLIONS = {
    "moe-mamba-4": (63.9, 26.2),
    "moe-mamba-8": (114.3, 26.2),
    "moe-mamba-16": (214.9, 26.2),
    "moe-mamba-32": (416.3, 26.3),
    "moe-mamba-42": (542.2, 26.3),
    "moe-mamba-100m": (2439.0, 117.5),
    "mamba-25m": (27.1, 27.1),
    "mamba-mlp-25m": (26.1, 26.1),
    "transformer-25m": (25.2, 25.2),
    "transformer-moe-25m": (545.4, 25.3),
}
# Sublayers as published: linear, softmax, experts, dense.
SUBLAYERS = {
    "minimax-01": (70, 10, 80, 0),
    "hunyuan-turbos": (57, 7, 64, 0),
    "qwen3-next-80b-a3b": (36, 12, 48, 0),
    "kimi-linear-48b-a3b": (20, 7, 26, 1),
    "jamba-v0.1": (28, 4, 16, 16),
    "granite-4.0-h-small": (36, 4, 40, 0),
    "granite-4.0-h-tiny": (36, 4, 40, 0),
    "nemotron-3-nano-30b-a3b": (23, 6, 23, 0),
    **{f"moe-mamba-{experts}": (8, 0, 8, 0) for experts in (4, 8, 16, 32, 42)},
    "moe-mamba-100m": (16, 0, 16, 0),
    "mamba-25m": (16, 0, 0, 0),
    "mamba-mlp-25m": (8, 0, 0, 8),
    "transformer-25m": (0, 8, 0, 8),
    "transformer-moe-25m": (0, 8, 8, 0),
    "mixtral-8x7b": (0, 32, 32, 0),
    "deepseek-v2": (0, 60, 59, 1),
    "deepseek-v3": (0, 61, 58, 3),
    "qwen1.5-moe-a2.7b": (0, 24, 24, 0),
    "qwen2-57b-a14b": (0, 28, 28, 0),
    "llama3-8b": (0, 32, 0, 32),
}


@pytest.mark.parametrize("name", BILLIONS)
def test_released_models_have_the_published_billions(name):
    count = sizes(PRESETS[name][1])
    total, active, *counted = BILLIONS[name]
    for text, kind, matrices in zip((total, active), ("total", "active"), counted, strict=True):
        n = count[kind] - count["embeddings"] * (2 - matrices) // 2
        assert f"{n / 1e9:.{len(text.partition('.')[2])}f}" == text


@pytest.mark.parametrize("name", MILLIONS)
def test_moe_mamba_and_its_baselines_have_the_published_millions(name):
    count = sizes(PRESETS[name][1])
    besides = count["embeddings"] + count["norms"]
    assert tuple(round((count[kind] - besides) / 1e6, 1) for kind in ("total", "active")) == MILLIONS[name]


def test_every_released_model_is_checked_and_has_the_published_layers():
    assert set(RELEASED) == set(SUBLAYERS) == {*BILLIONS, *MILLIONS} and set(CLASSES) < set(RELEASED)
    for name, (what, _) in RELEASED.items():
        assert re.search(r"\(\d{4}\.\d{5}\)$", what), name
        assert tuple(PRESETS[name][1].letters.count(letter) for letter in "LNED") == SUBLAYERS[name], name


def head(lsm, key_size, value_size):
    return {name: n for name, n in small(lsm, key_size, value_size).items() if name in ("key_size", "value_size")}


@pytest.mark.parametrize("lsm", LSM)
def test_every_row_builds_in_the_tiny_preset(lsm):
    with torch.device("meta"):
        LanguageModel(replace(PRESETS["tiny"][1], lsm=lsm, **head(lsm, 32, 64)), ops)


# Keys that are as large as published whatever the width.
FIXED = {
    "mamba2": 128,
    "based": 16,
    "rebased": 16,
    "mamba": 16,
    "s4": 32,
    "longhorn": 16,
    "log_linear_mamba2": 128,
    "mamba3": 128,
}
# The published size of a head's keys (None: fixed) and values, as parts of a head's share of the width.
HEADS = {
    "linear_attention": (1, 1),
    "linear_attention_normalized": (1, 1),
    "lightning": (1, 1),
    "retention": (1, 2),
    "mamba2": (None, 2),
    "mamba3": (None, 2),
    "gla": (1 / 2, 1),
    "hgrn2": (1, 1),
    "rwkv6": (1 / 2, 1),
    "delta_net": (1, 1),
    "gated_delta_net": (3 / 4, 3 / 2),
    "kda": (1, 1),
    "mom_gla": (1 / 2, 1),
    "mom_gated_delta_net": (3 / 4, 3 / 2),
    "log_linear_mamba2": (None, 2),
    **dict.fromkeys(PRINTED, (1, 1)),
    "based": (None, 1),
    "rebased": (None, 1),
    "gated_fast_weights": (1, 1),
    "gate_loop": (1, 1),
    "mamba": (None, 2),
    "s4": (None, 1),
    "longhorn": (None, 2),
    "gsa": (1, 1),
    "ttt": (1, 1),
    "ttt_linear": (1, 1),
    "titans": (1, 1),
    "mesa": (1, 1),
    "rwkv7": (1, 1),
    "comba": (3 / 4, 3 / 2),
    "gated_delta_product": (3 / 4, 3 / 2),
}


@pytest.mark.parametrize("lsm", LSM)
def test_heads_are_as_large_as_published_unless_told(lsm):
    with torch.device("meta"):
        plain = LanguageModel(Model(pattern="L", lsm=lsm, width=256, heads=4), ops)
        told = LanguageModel(Model(pattern="L", lsm=lsm, width=256, heads=4, **head(lsm, 6, 10)), ops)
    key, value = HEADS[lsm]
    mixer = plain.blocks[0].sublayers[0].inner
    assert (mixer.key_size, mixer.value_size) == (FIXED[lsm] if key is None else key * 64, value * 64)
    mixer = told.blocks[0].sublayers[0].inner
    assert {"key_size": mixer.key_size, "value_size": mixer.value_size} == head(lsm, 6, 10)


def test_letters():
    assert Model(pattern="LLLN").letters == "LELELENE"
    assert Model(pattern="LN", repeat=2).letters == "LENELENE"
    assert Model(pattern="LDNE", repeat=2).letters == "LDNELDNE"
    assert Model(pattern="LLD").letters == "LLD"
    assert Model(pattern="LN", repeat=2, first="LD", last="N").letters == "LD" + "LENELENE" + "NE"
    assert Model(pattern="LD", repeat=2, first="N", last="L").letters == "NE" + "LDLD" + "LE"
    assert Model(pattern="LN", repeat=2, last="LE", bare=True).letters == "LNLNLE"
    assert Model(pattern="L+EN", repeat=2, last="N").letters == "L+ENL+ENNE"


SPELLED = {  # where experts sit: the model, and how many of L, N, E and D, of blocks and of sublayers
    "every layer": ({"pattern": "L", "repeat": 4}, (4, 0, 4, 0), 4, 8),
    "every second mixer": ({"pattern": "LLE", "repeat": 3}, (6, 0, 3, 0), 6, 9),
    "every second, dense between (GShard)": ({"pattern": "NDNE", "repeat": 3}, (0, 6, 3, 3), 6, 12),
    "every fourth (OpenMoE)": ({"pattern": "NDNDNDNE", "repeat": 2}, (0, 8, 2, 6), 8, 16),
    "a period of eight (Jamba)": ({"pattern": "LDLELDLENDLELDLE", "repeat": 4}, (28, 4, 16, 16), 32, 64),
    "blocks AMF and MF (Hunyuan-TurboS)": ({"pattern": "NLELE", "repeat": 2}, (4, 2, 4, 0), 6, 10),
    "one sublayer a letter (Nemotron)": ({"pattern": "LELELNE", "repeat": 2}, (6, 2, 6, 0), 8, 14),
    "dense first layers (DeepSeek)": ({"pattern": "N", "repeat": 3, "first": "NDND"}, (0, 5, 3, 2), 5, 10),
    "a dense last layer": ({"pattern": "L", "repeat": 2, "last": "ND"}, (2, 1, 2, 1), 3, 6),
    "no experts": ({"pattern": "LN", "repeat": 2, "bare": True}, (2, 2, 0, 0), 4, 4),
    "side by side (MoE-Mamba's ablation)": ({"pattern": "L+E", "repeat": 4}, (4, 0, 4, 0), 4, 4),
    "all three": ({"pattern": "N+DL+E", "first": "L+D+E"}, (2, 1, 2, 2), 3, 3),
}


@pytest.mark.parametrize("name", SPELLED)
def test_experts_sit_where_the_pattern_says(name):
    values, letters, blocks, sublayers = SPELLED[name]
    config = Model(**values, lsm="gla")
    with torch.device("meta"):
        model = LanguageModel(config, ops)
    kinds = (GLA, Softmax, MoE, Dense)
    assert tuple(sum(isinstance(m, kind) for m in model.modules()) for kind in kinds) == letters
    assert tuple(config.letters.count(letter) for letter in "LNED") == letters
    assert (len(model.blocks), sum(len(block.sublayers) for block in model.blocks)) == (blocks, sublayers)


BAD = {
    "pattern X": ({"pattern": "LXN"}, "pattern 'LXN' has letters 'X'; allowed are L .*, N .*, E .*, D"),
    "pattern empty": ({"pattern": ""}, "pattern ''.* allowed are L .*, N .*, E .*, D"),
    "first": ({"first": "LX"}, "first 'LX' has letters 'X'; allowed are L .*, N .*, E .*, D"),
    "last": ({"last": "nE"}, "last 'nE' has letters 'n'; allowed are L .*, N .*, E .*, D"),
    "plus first": ({"pattern": "+L"}, r"pattern '\+L' has a \+ that is not between two letters, as in L\+E"),
    "plus last": ({"last": "LE+"}, r"last 'LE\+' has a \+ that is not between two letters"),
    "plus twice": ({"pattern": "L++E"}, r"pattern 'L\+\+E' has a \+ that is not between two letters"),
    "two mixers": (
        {"pattern": "LEL+E+N"},
        r"pattern 'LEL\+E\+N' has two mixers side by side in L\+E\+N; allowed is one",
    ),
    "mixer_experts": ({"mixer_experts": 0}, "mixer_experts is 0; it must be at least 1"),
    "projection": (
        {"projection_experts": ("x",)},
        "unknown projection 'x'; projection_experts are some of input, gate",
    ),
    "lsm": ({"lsm": "mambo"}, f"'mambo'; expected one of {', '.join(LSM)}"),
    "features": ({"feature_map": "elo"}, f"'elo'; expected one of {', '.join(FEATURE_MAP)}"),
    "router": ({"router": "mixtrall"}, f"'mixtrall'; expected one of {', '.join(ROUTER)}"),
    **{
        name: ({name: 0}, f"{name} is 0; it must be at least 1")
        for name in (
            *("repeat", "vocabulary", "width", "heads", "experts", "top_k", "expert_width", "dense_width"),
            *("convolution", "key_heads", "key_size", "value_size", "slots", "mini_batch", "delta_steps"),
            *("value_heads", "levels", "memories", "attention_heads"),
        )
    },
    "divide": ({"width": 130, "heads": 4}, "width 130 does not divide into 4 heads"),
    "divide for N": ({"attention_heads": 3}, "width 128 does not divide into 3 heads of attention"),
    "divide behind": (
        {"pattern": "N", "attention_heads": 4, "heads": 3, "last": "L"},
        "128 does not divide into 3 heads",
    ),
    "share of N": ({"attention_heads": 6, "head_size": 8, "key_heads": 4}, "6 heads cannot share 4 key_heads"),
    "share": ({"heads": 4, "key_heads": 3}, "4 heads cannot share 3 key_heads"),
    **{
        name: ({name: 0}, f"{name} is 0; it must be at least 1")
        for name in ("window", "head_size", "latent_rank", "query_rank", "nope_size", "latent_value_size")
    },
    "base": ({"rope_base": 0.0}, "rope_base is 0.0; it must be above 0"),
    "eps": ({"eps": -1.0}, "eps is -1.0; it must be above 0"),
    "rope_size": ({"rope_size": -1}, "rope_size is -1; it must be at least 0"),
    "attention": ({"attention": "sparse"}, "unknown attention 'sparse'; expected one of grouped, latent"),
    "told heads": ({"width": 130, "heads": 4, "head_size": 32}, "width 130 does not divide into 4 heads"),
    "odd": ({"width": 12, "heads": 4}, "share 1.0 of a head of 3: 3 channels cannot rotate, they turn in pairs"),
    "odd told": ({"head_size": 5}, "share 1.0 of a head of 5: 5 channels cannot rotate"),
    "odd share": ({"rope_share": 0.1}, "share 0.1 of a head of 32: 3 channels cannot rotate"),
    "lost share": ({"rope_share": 0.01}, "share 0.01 of a head of 32: 0 channels cannot rotate"),
    "odd latent": ({"attention": "latent", "rope_size": 3}, "share 1.0 of a head of 3: 3 channels cannot rotate"),
    "share above": ({"rope_share": 1.5}, "rope_share is 1.5; it must be at least 0 and at most 1"),
    "share below": ({"rope_share": -0.5}, "rope_share is -0.5; it must be at least 0 and at most 1"),
    "values": ({"heads": 4, "value_heads": 6}, "6 value_heads cannot share 4 heads: they must be a multiple"),
    "few values": ({"heads": 4, "value_heads": 2}, "2 value_heads cannot share 4 heads: they must be a multiple"),
    "floor": ({"gate_floor": 0.0}, "gate_floor is 0.0; it must be below 0 and finite"),
    "deep floor": ({"gate_floor": -math.inf}, "gate_floor is -inf; it must be below 0 and finite"),
    "top_k": ({"top_k": 9}, "top_k 9 needs at least as many experts, got 8"),
    "state_groups": ({"state_groups": 0}, "state_groups is 0; it must be at least 1"),
    "step_limits": ({"step_limits": (0.1, 0.01)}, r"step_limits are \(0.1, 0.01\); .* below the largest"),
    "step_limits below": ({"step_limits": (-1.0, 0.01)}, "the least must be at least 0"),
    "dropout 1": ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
    "dropout below": ({"dropout": -0.1}, "dropout is -0.1; it must be at least 0 and below 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_built_gives_one_line(case):
    values, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        Model(**values)
    assert "\n" not in str(caught.value)


def test_rules_only_bind_what_the_model_has():
    Model(pattern="LD", top_k=9)  # no experts
    Model(pattern="L", width=12, heads=4)  # nothing that rotates
    Model(width=12, heads=4, rope_share=0.0)
    Model(attention="latent", rope_size=0)
    Model(attention="latent", width=12, heads=4)  # what turns is half a head, made even
    Model(pattern="N", width=130, heads=4, head_size=32)  # heads that the width does not know
    Model(pattern="N", heads=3, attention_heads=4)  # nothing has heads
    Model(attention_heads=6, head_size=8, key_heads=3)
    Model(dropout=0.0)


def test_every_field_says_what_it_is():
    """Each field of the configuration is followed by its own line of documentation, which the command line prints."""
    body = ast.parse(inspect.getsource(Model)).body[0].body
    documented = {
        a.target.id
        for a, b in pairwise(body)
        if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)
    }
    assert documented == {field.name for field in fields(Model)}
