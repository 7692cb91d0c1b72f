"""The shapes of released Linear-MoE systems, and of what they are compared with: fields of `reference.presets.Model`.

A preset has the published sizes, so its number of parameters is the published one; `tests/test_presets.py` compares
them. What adds no parameters and no word of the configuration has (scaled residual streams, longer contexts by scaled
rotations) is left out, and so are heads that predict more than the next token. Sources are the papers named, and the
configurations released with the weights.
"""

# ------------------------------------------------------------------------------------ linear sequence models inside

MINIMAX = {
    "pattern": "LLLLLLLN",
    "repeat": 10,
    "lsm": "lightning",
    "vocabulary": 200064,
    "width": 6144,
    "heads": 64,
    "key_size": 128,
    "value_size": 128,
    "head_size": 128,
    "key_heads": 8,
    "router": "minimax_01",
    "experts": 32,
    "top_k": 2,
    "expert_width": 9216,
    "rope_base": 1e7,
    "rope_share": 0.5,
}
# Its report tells 57 Mamba2, 7 attention and 64 expert layers of width 5120, 16 groups in Mamba2, one shared expert and
# 2 of 32. Its blocks of attention, Mamba2, experts (AMF) and Mamba2, experts (MF) would have 57 expert layers: here
# every mixer has its own. Heads, their sizes, the experts' width and the vocabulary are not told: these meet the number
# of parameters, 560 billion and, without the vocabulary, 56 for a token.
HUNYUAN = {
    "pattern": "LLLLNLLLL",
    "repeat": 7,
    "last": "L",
    "lsm": "mamba2",
    "vocabulary": 128512,
    "width": 5120,
    "heads": 80,
    "attention_heads": 64,
    "key_heads": 8,
    "value_size": 64,
    "state_groups": 16,
    "router": "hunyuan",
    "experts": 32,
    "top_k": 2,
    "expert_width": 17056,
    "shared_width": 17056,
    "tied": True,
}
QWEN3_NEXT = {
    "pattern": "LLLN",
    "repeat": 12,
    "lsm": "gated_delta_net",
    "vocabulary": 151936,
    "width": 2048,
    "heads": 16,
    "key_size": 128,
    "value_size": 128,
    "value_heads": 32,
    "head_size": 256,
    "key_heads": 2,
    "qk_norm": True,
    "attention_gate": True,
    "router": "qwen3_next",
    "experts": 512,
    "top_k": 10,
    "expert_width": 512,
    "shared_width": 512,
    "shared_gate": True,
    "rope_base": 1e7,
    "rope_share": 0.25,
    "eps": 1e-6,
}
KIMI_LINEAR = {
    "first": "LDLELENE",
    "pattern": "LLLN",
    "repeat": 5,
    "last": "LLN",
    "lsm": "kda",
    "vocabulary": 163840,
    "width": 2304,
    "heads": 32,
    "key_size": 128,
    "value_size": 128,
    "attention": "latent",
    "head_size": 128,
    "latent_rank": 512,
    "rope_size": 64,
    "rope_share": 0.0,
    "router": "kimi_linear",
    "experts": 256,
    "top_k": 8,
    "expert_width": 1024,
    "shared_width": 1024,
    "dense_width": 9216,
}
JAMBA = {
    "pattern": "LDLELDLENDLELDLE",
    "repeat": 4,
    "lsm": "mamba",
    "state_norm": "learned",
    "vocabulary": 65536,
    "width": 4096,
    "heads": 32,
    "key_heads": 8,
    "router": "jamba",
    "experts": 16,
    "top_k": 2,
    "expert_width": 14336,
    "dense_width": 14336,
    "rope_share": 0.0,
    "eps": 1e-6,
}
GRANITE_SMALL = {
    "pattern": "LLLLLNLLLL",
    "repeat": 4,
    "lsm": "mamba2",
    "vocabulary": 100352,
    "width": 4096,
    "heads": 128,
    "attention_heads": 32,
    "key_heads": 8,
    "router": "granite",
    "experts": 72,
    "top_k": 10,
    "expert_width": 768,
    "shared_width": 1536,
    "rope_share": 0.0,
    "tied": True,
}
GRANITE_TINY = GRANITE_SMALL | {
    "width": 1536,
    "heads": 48,
    "attention_heads": 12,
    "key_heads": 4,
    "experts": 64,
    "top_k": 6,
    "expert_width": 512,
    "shared_width": 1024,
}

NEMOTRON = {
    "pattern": "LELELNE",
    "repeat": 5,
    "last": "LELELELNELELELELE",
    "lsm": "mamba2",
    "vocabulary": 131072,
    "width": 2688,
    "heads": 64,
    "value_size": 64,
    "state_groups": 8,
    "attention_heads": 32,
    "head_size": 128,
    "key_heads": 2,
    "router": "nemotron_3",
    "experts": 128,
    "top_k": 6,
    "expert_kind": "relu_squared",
    "expert_width": 1856,
    "shared_width": 3712,
    "rope_share": 0.0,
}

# ---------------------------------------------------------------------------------------- MoE-Mamba and its baselines

# Its experts and dense layers are MLPs of two matrices, 3 widths wide (in the Transformers 4).
MOE_MAMBA = {
    "pattern": "L",
    "repeat": 8,
    "lsm": "mamba",
    "vocabulary": 50257,
    "width": 512,
    "heads": 8,
    "router": "moe_mamba",
    "top_k": 1,
    "expert_kind": "relu",
    "expert_width": 1536,
    "dense_width": 1536,
}
TRANSFORMER = MOE_MAMBA | {"pattern": "N", "experts": 32, "expert_width": 2048, "dense_width": 2048}

# ------------------------------------------------------------------------------- softmax attention and other baselines

MIXTRAL = {
    "pattern": "N",
    "repeat": 32,
    "vocabulary": 32000,
    "width": 4096,
    "heads": 32,
    "key_heads": 8,
    "router": "mixtral",
    "experts": 8,
    "top_k": 2,
    "expert_width": 14336,
    "rope_base": 1e6,
}
DEEPSEEK_V2 = {
    "first": "ND",
    "pattern": "N",
    "repeat": 59,
    "vocabulary": 102400,
    "width": 5120,
    "heads": 128,
    "attention": "latent",
    "head_size": 128,
    "latent_rank": 512,
    "query_rank": 1536,
    "rope_size": 64,
    "router": "deepseek_v2",
    "groups": 8,
    "groups_kept": 3,
    "experts": 160,
    "top_k": 6,
    "expert_width": 1536,
    "shared_width": 3072,
    "dense_width": 12288,
    "eps": 1e-6,
}
DEEPSEEK_V3 = DEEPSEEK_V2 | {
    "first": "NDNDND",
    "repeat": 58,
    "vocabulary": 129280,
    "width": 7168,
    "router": "deepseek_v3",
    "experts": 256,
    "top_k": 8,
    "groups": 8,
    "groups_kept": 4,
    "expert_width": 2048,
    "shared_width": 2048,
    "dense_width": 18432,
}
QWEN15_MOE = {
    "pattern": "N",
    "repeat": 24,
    "vocabulary": 151936,
    "width": 2048,
    "heads": 16,
    "qkv_bias": True,
    "router": "qwen2_moe",
    "experts": 60,
    "top_k": 4,
    "expert_width": 1408,
    "shared_width": 5632,
    "shared_gate": True,
    "rope_base": 1e6,
    "eps": 1e-6,
}
QWEN2_MOE = QWEN15_MOE | {
    "repeat": 28,
    "width": 3584,
    "heads": 28,
    "key_heads": 4,
    "experts": 64,
    "top_k": 8,
    "expert_width": 2560,
    "shared_width": 20480,
}
LLAMA3 = {
    "pattern": "ND",
    "repeat": 32,
    "vocabulary": 128256,
    "width": 4096,
    "heads": 32,
    "key_heads": 8,
    "dense_width": 14336,
    "rope_base": 5e5,
}

# name -> (what it is, its fields)
RELEASED: dict[str, tuple[str, dict]] = {
    "minimax-01": ("MiniMax-Text-01 456B-A45.9B, one layer in eight softmax (2501.08313)", MINIMAX),
    "hunyuan-turbos": ("Hunyuan-TurboS 560B-A56B; sizes that its report leaves out fitted (2505.15431)", HUNYUAN),
    "qwen3-next-80b-a3b": ("Qwen3-Next 80B-A3B, Gated DeltaNet (2412.06464)", QWEN3_NEXT),
    "kimi-linear-48b-a3b": ("Kimi Linear 48B-A3B, latent attention without positions (2510.26692)", KIMI_LINEAR),
    "jamba-v0.1": ("Jamba v0.1 52B-A12B, experts in every other layer (2403.19887)", JAMBA),
    "granite-4.0-h-small": ("Granite 4.0 H Small 32B-A9B, Mamba2 (2405.21060)", GRANITE_SMALL),
    "granite-4.0-h-tiny": ("Granite 4.0 H Tiny 7B-A1B, Mamba2 (2405.21060)", GRANITE_TINY),
    "nemotron-3-nano-30b-a3b": ("Nemotron 3 Nano 30B-A3B, Mamba2, experts of relu squared (2512.20848)", NEMOTRON),
    **{
        f"moe-mamba-{experts}": (f"MoE-Mamba 25M with {experts} experts (2401.04081)", MOE_MAMBA | {"experts": experts})
        for experts in (4, 8, 16, 32, 42)
    },
    "moe-mamba-100m": (
        "MoE-Mamba 100M with 42 experts (2401.04081)",
        MOE_MAMBA | {"repeat": 16, "width": 768, "experts": 42, "expert_width": 2304},
    ),
    "mamba-25m": ("Mamba alone, of MoE-Mamba (2401.04081)", MOE_MAMBA | {"repeat": 16, "bare": True}),
    "mamba-mlp-25m": ("Mamba and dense layers, of MoE-Mamba (2401.04081)", MOE_MAMBA | {"pattern": "LD"}),
    "transformer-25m": ("Transformer, of MoE-Mamba (2401.04081)", TRANSFORMER | {"pattern": "ND"}),
    "transformer-moe-25m": ("Transformer with 32 experts, of MoE-Mamba (2401.04081)", TRANSFORMER),
    "mixtral-8x7b": ("Mixtral 8x7B, 46.7B-A12.9B (2401.04088)", MIXTRAL),
    "deepseek-v2": ("DeepSeek-V2 236B-A21B (2405.04434)", DEEPSEEK_V2),
    "deepseek-v3": ("DeepSeek-V3 671B-A37B (2412.19437)", DEEPSEEK_V3),
    "qwen1.5-moe-a2.7b": ("Qwen1.5-MoE 14.3B-A2.7B (2407.10671)", QWEN15_MOE),
    "qwen2-57b-a14b": ("Qwen2 57B-A14B (2407.10671)", QWEN2_MOE),
    "llama3-8b": ("Llama 3 8B, dense (2407.21783)", LLAMA3),
}
