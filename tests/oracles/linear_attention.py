"""Linear attention, Lightning, Retention."""

import math

import torch

from oracles.common import H, Heads, K, V, called, classes, released, renamed, rms, silu, written


def minimax(layer, layers=4):
    oracle = released(
        "minimax",
        "MiniMaxConfig",
        "MiniMaxLightningAttention",
        layer,
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_hidden_layers=layers,
        block_size=64,
        layer_types=["linear_attention"] * layers,
    )
    names = "qkv_proj.weight=qkv.weight out_proj.weight=o.weight norm.weight=norm output_gate.weight=gate.weight"
    return lambda w, x: called(oracle, renamed(w, names), (x, None, None))[0]


def elu_features(x):
    return torch.where(x > 0, x + 1, torch.exp(x))


def linear_attention_step(w, x, t, M, h):
    """2503.05447: o = φ(q) M, norm, ⊙ SiLU(W x)."""
    of = Heads(w, x[t], H)
    M = M + torch.outer(elu_features(of("k", h)), of("v", h))
    o = elu_features(of("q", h)) / math.sqrt(K) @ M
    return rms(o, w["norm"]) * silu(of("gate", h)), M


def normalized_step(w, x, t, M, h):
    """2006.16236, equation 9: the weights of all values sum to one. M is [sum of φ(k)ᵀ v | sum of φ(k)]."""
    of = Heads(w, x[t], H)
    k = elu_features(of("k", h))
    M = M + torch.cat([torch.outer(k, of("v", h)), k[:, None]], 1)
    seen = elu_features(of("q", h)) @ M
    return rms(seen[:-1] / seen[-1], w["norm"]) * silu(of("gate", h)), M


def retention_step(w, x, t, M, h):
    """2307.08621, equations 6 and 8, rotations as complex numbers."""
    of = Heads(w, x[t], H)
    turn = torch.exp(1j * t * 10000.0 ** (-torch.arange(K // 2, dtype=torch.float64) / (K // 2)))

    def rotated(y):
        z = torch.complex(y[: K // 2], y[K // 2 :]) * turn
        return torch.cat([z.real, z.imag])

    M = (1 - 2.0 ** (-5 - h)) * M + torch.outer(rotated(of("k", h)), of("v", h))
    o = rotated(of("q", h)) / math.sqrt(K) @ M
    return rms(o, w["norm"]) * silu(of("gate", h)), M


def lightning(layer):
    return classes("lightning", lambda: minimax(layer), 8, eps=1e-6, number=layer, layers=4)


ORACLES = {
    "MiniMaxLightningAttention, first": lightning(0),
    "MiniMaxLightningAttention, third": lightning(2),
    "MiniMaxLightningAttention, last": lightning(3),
    "formula of 2503.05447": written("linear_attention", linear_attention_step),
    "formula of 2006.16236": written("linear_attention_normalized", normalized_step, V + 1),
    "formula of 2307.08621": written("retention", retention_step),
}
