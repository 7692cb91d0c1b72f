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


def affine(w, name, y):
    return w[f"{name}.weight"] @ y + w[f"{name}.bias"]


def hedgehog(w, of, y):
    e = torch.exp(2 * affine(w, f"phi_{of}.inner", y))
    return torch.cat([e, 1 / e]) / (e + 1 / e).sum()


def dpfp(y):
    r = [*y.clamp(min=0), *(-y).clamp(min=0)]
    return torch.stack([r[i] * r[(i - j) % len(r)] for j in (1, 2, 3, 4) for i in range(len(r))])


# (weights, "q" or "k", a head's query or key) -> features
FEATURES = {
    "elu": lambda w, of, y: elu_features(y),
    "relu": lambda w, of, y: y * (y > 0),
    "silu": lambda w, of, y: silu(y),
    "swish": lambda w, of, y: silu(y),
    "identity": lambda w, of, y: y,
    "elementwise_product": lambda w, of, y: affine(w, f"phi_{of}.left", y) * affine(w, f"phi_{of}.right", y),
    "hedgehog": hedgehog,  # 2402.04347, equation 6
    "t2r": lambda w, of, y: (w[f"phi_{of}.inner.weight"] @ y).clamp(min=0),  # 2103.13076, equation 6
    "dpfp": lambda w, of, y: dpfp(y),  # 2102.11174, equations 37 to 39
}


def with_features(lsm, features):
    """The weights themselves, φ(q_t)·φ(k_s), instead of a memory."""
    phi = FEATURES[features]

    def featured_step(w, x, t, M, h):
        tokens = [Heads(w, token, H) for token in x[: t + 1]]
        q, gate = phi(w, "q", tokens[t]("q", h)), silu(tokens[t]("gate", h))
        weights = torch.stack([q @ phi(w, "k", of("k", h)) for of in tokens])
        total = weights.sum() + 1e-10 * math.sqrt(len(q)) if lsm.endswith("normalized") else math.sqrt(len(q))
        return rms(weights @ torch.stack([of("v", h) for of in tokens]) / total, w["norm"]) * gate, M

    return written(lsm, featured_step, feature_map=features)


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
    **{f"features {name}": with_features("linear_attention", name) for name in FEATURES if name != "elu"},
    **{
        f"normalised {name}": with_features("linear_attention_normalized", name) for name in ("hedgehog", "t2r", "dpfp")
    },
}
