"""Softmax attention, the N of a hybrid."""

import sys

import torch

from oracles.common import Oracle, called, released, renamed


def llama():
    sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    oracle = released("llama", "LlamaConfig", "LlamaAttention", **sizes)
    rotary = sys.modules[type(oracle).__module__].LlamaRotaryEmbedding(oracle.config)
    names = " ".join(f"{n}_proj.weight={n}.weight" for n in "qkvo")

    def run(w, x):
        angles = rotary(x, torch.arange(x.shape[1])[None])
        return called(oracle, renamed(w, names), (x, angles), {"attention_mask": None})[0]

    return run


ORACLES = {
    "LlamaAttention": Oracle("softmax", llama, {"width": 24, "heads": 6, "key_heads": 2}),
}
