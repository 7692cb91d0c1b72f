"""Softmax attention, the N of a hybrid: grouped heads, windows, partial or no rotation, latents."""

import sys
from functools import partial

import torch

from oracles.common import Oracle, called, released, renamed

GROUPED = " ".join(f"{n}_proj.weight={n}.weight" for n in "qkvo")
HEADS = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
OURS = {"width": 24, "heads": 6, "key_heads": 2}


def angles(oracle, kind, x, past=0):
    """What the released model's own rotary embedding hands its layers behind so many tokens."""
    rotary = getattr(sys.modules[type(oracle).__module__], f"{kind}RotaryEmbedding")(oracle.config)
    return rotary(x, past + torch.arange(x.shape[1])[None])


def grouped(model: str, kind: str, rotary: bool = True, mask=None, weights=None, **sizes):
    """A released layer of grouped heads, as a function of our weights (which `weights` turns into its own)."""
    oracle = released(model, f"{kind}Config", f"{kind}Attention", **HEADS | sizes)

    def run(w, x):
        named = {"position_embeddings": angles(oracle, kind, x)} if rotary else {}
        named |= {"attention_mask": mask and mask(oracle.config, x, None, None)}
        own = weights(w) if weights else renamed(w, GROUPED)
        return called(oracle, own, (x,), named)[0]

    return run


def sliding(*asked):
    """The mask that transformers makes for a configuration's `sliding_window`."""
    from transformers.masking_utils import create_sliding_window_causal_mask

    return create_sliding_window_causal_mask(*asked)


def qwen2():
    names = GROUPED + " " + " ".join(f"{n}_proj.bias={n}.bias" for n in "qkv")
    return grouped("qwen2_moe", "Qwen2Moe", weights=lambda w: renamed(w, names))


def qwen3_next():
    """Its query and gate share a matrix, head after head, and its norms keep their weight's distance from one."""

    def weights(w):
        q = torch.cat([w[f"{n}.weight"].unflatten(0, (6, -1)) for n in ("q", "gate")], 1).flatten(0, 1)
        norms = {f"{n}_norm.weight": w[f"{n}_norm"] - 1 for n in "qk"}
        return renamed(w, GROUPED) | {"q_proj.weight": q} | norms

    sizes = {"head_dim": 8, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "layer_types": ["full_attention"]}
    return grouped("qwen3_next", "Qwen3Next", weights=weights, **sizes, num_hidden_layers=1)


# ---------------------------------------- mixtures of heads

JET_MOE = (
    "experts.router.layer.weight=router experts.input_linear.weight=q.weight experts.output_linear.weight=o.weight "
)
JET_MOE += "experts.bias=bias"


def jet_moe():
    sizes = {"hidden_size": 24, "kv_channels": 6, "num_key_value_heads": 3, "num_local_experts": 5}
    return released("jetmoe", "JetMoeConfig", "JetMoeAttention", **sizes, attn_implementation="sdpa")


def mixture(oracle, w, x, past=0, cache=None):
    """The released layer behind `past` tokens that the cache has."""
    own = renamed(w, JET_MOE) | {"kv_proj.weight": torch.cat([w["k.weight"], w["v.weight"]])}
    named = {"position_embeddings": angles(oracle, "JetMoe", x, past), "cache": cache, "attention_mask": None}
    return called(oracle, own, (x,), named)[0]


# ---------------------------------------- latents

SIZES = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "attn_implementation": "sdpa"}
SIZES |= {"kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5}
LATENT = {"width": 24, "heads": 3, "latent_rank": 10, "rope_size": 4, "nope_size": 6, "latent_value_size": 5}
NAMES = "kv_a_proj_with_mqa.weight=down.weight kv_a_layernorm.weight=norm kv_b_proj.weight=up.weight "
NAMES += "o_proj.weight=o.weight "
QUERIES = {
    None: "q_proj.weight=q.weight",
    7: "q_a_proj.weight=q_down.weight q_a_layernorm.weight=q_norm q_b_proj.weight=q.weight",
}


def interleaved(rows):
    """The last four rows, of which i and i + 2 turn together, in DeepSeek's order: pairs side by side."""
    return torch.cat([rows[:-4], rows[-4:].unflatten(0, (2, 2)).transpose(0, 1).flatten(0, 1)])


def latent(model: str, kind: str, query_rank=None, rotary=True, mask=None, **sizes):
    oracle = released(model, f"{kind}Config", f"{kind}Attention", **SIZES | sizes, q_lora_rank=query_rank)

    def run(w, x):
        if rotary:
            q = torch.cat([interleaved(head) for head in w["q.weight"].chunk(3)])
            w = w | {"q.weight": q, "down.weight": interleaved(w["down.weight"])}
        named = {"position_embeddings": angles(oracle, kind, x)} if rotary else {}
        named |= {"attention_mask": mask and mask(oracle.config, x, None, None)}
        return called(oracle, renamed(w, NAMES + QUERIES[query_rank]), (x,), named)[0]

    return run


def kimi():
    return latent("kimi_linear", "KimiLinear", rotary=False, layer_types=["full_attention"], num_hidden_layers=1)


HEADS_OF_EXPERTS = {"width": 24, "heads": 3, "head_size": 6, "key_heads": 3, "mixer_experts": 5}
ORACLES = {
    "LlamaAttention": Oracle("softmax", lambda: grouped("llama", "Llama"), OURS),
    "MistralAttention": Oracle(
        "window", lambda: grouped("mistral", "Mistral", mask=sliding, sliding_window=5), OURS | {"window": 5}
    ),
    "StableLmAttention": Oracle(
        "softmax", lambda: grouped("stablelm", "StableLm", partial_rotary_factor=0.5), OURS | {"rope_share": 0.5}
    ),
    "NemotronHAttention": Oracle(
        "nope", lambda: grouped("nemotron_h", "NemotronH", False, head_dim=5), OURS | {"head_size": 5}
    ),
    "JetMoeAttention": Oracle("mixture", lambda: partial(mixture, jet_moe()), HEADS_OF_EXPERTS),
    "Qwen2MoeAttention": Oracle("bias", qwen2, OURS | {"heads": 4, "attention_heads": 6}),
    "Qwen3NextAttention": Oracle("partial", qwen3_next, OURS),
    "DeepseekV2Attention": Oracle("latent", lambda: latent("deepseek_v2", "DeepseekV2"), LATENT | {"eps": 1e-6}),
    "DeepseekV3Attention": Oracle(
        "latent", lambda: latent("deepseek_v3", "DeepseekV3", 7), LATENT | {"query_rank": 7, "eps": 1e-6}
    ),
    "DeepseekV3Attention, sliding window": Oracle(
        "latent, window",
        lambda: latent("deepseek_v3", "DeepseekV3", 7, mask=sliding, sliding_window=5),
        LATENT | {"window": 5, "eps": 1e-6},
    ),
    "KimiLinearAttention": Oracle(
        "latent", kimi, LATENT | {"heads": 2, "attention_heads": 3, "rope_share": 0.0, "eps": 1e-6}
    ),
}
