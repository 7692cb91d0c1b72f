"""Delta rules."""

import math

import torch

from oracles.common import H, Heads, K, V, called, classes, released, renamed, rms, sigmoid, silu, unit, written


def by_head(w, *names, heads=3):
    """Rows of several matrices, head after head."""
    return torch.cat([w[f"{n}.weight"].unflatten(0, (heads, -1)) for n in names], 1).flatten(0, 1)


def qwen3_next():
    oracle = released(
        "qwen3_next",
        "Qwen3NextConfig",
        "Qwen3NextGatedDeltaNet",
        hidden_size=24,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        rms_norm_eps=1e-5,
    )
    names = "norm.weight=norm out_proj.weight=o.weight conv1d.weight=conv A_log=A_log dt_bias=dt_bias"

    def run(w, x):
        projections = {"in_proj_qkvz": by_head(w, *"qkv", "gate"), "in_proj_ba": by_head(w, "beta", "a")}
        projections = {f"{n}.weight": matrix for n, matrix in projections.items()}
        return called(oracle, renamed(w, names) | projections, (x,))

    return run


DELTA = (
    "q_proj.weight=q.weight k_proj.weight=k.weight v_proj.weight=v.weight o_proj.weight=o.weight o_norm.weight=norm "
)
DELTA += "b_proj.weight=beta.weight conv1d.weight=conv "


def olmo_hybrid(negative):
    oracle = released(
        "olmo_hybrid",
        "OlmoHybridConfig",
        "OlmoHybridGatedDeltaNet",
        hidden_size=24,
        num_attention_heads=3,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_allow_neg_eigval=negative,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    names = DELTA + "a_proj.weight=a.weight g_proj.weight=gate.weight A_log=A_log dt_bias=dt_bias"
    return lambda w, x: called(oracle, renamed(w, names), (x,))


KDA = {"hidden_size": 24, "linear_num_heads": 3, "linear_head_dim": 8, "rms_norm_eps": 1e-5, "num_hidden_layers": 1}


def kimi():
    oracle = released("kimi_linear", "KimiLinearConfig", "KimiLinearDeltaAttention", **KDA)
    names = DELTA + "g_a_proj.weight=gate.0.weight g_b_proj.weight=gate.1.weight forget_gate.dt_bias=dt_bias "
    names += "forget_gate.f_a_proj.weight=a.0.weight forget_gate.f_b_proj.weight=a.1.weight"

    def run(w, x):
        A_log = {"forget_gate.A_log": w["A_log"][None, None, :, None]}
        return called(oracle, renamed(w, names) | A_log, (x,))

    return run


def bailing():
    """Its two gates are full matrices; ours are products of two."""
    kind = {"kda_safe_gate": False, "layer_types": ["linear_attention"]}
    oracle = released("bailing_hybrid", "BailingHybridConfig", "BailingHybridDeltaAttention", **KDA, **kind)
    names = DELTA + "forget_gate.dt_bias=dt_bias forget_gate.A_log=A_log"

    def run(w, x):
        full = {theirs: w[f"{n}.1.weight"] @ w[f"{n}.0.weight"] for theirs, n in (("g_proj", "gate"), ("f_proj", "a"))}
        gates = {"g_proj.weight": full["g_proj"], "forget_gate.f_proj.weight": full["f_proj"]}
        return called(oracle, renamed(w, names) | gates, (x,))

    return run


def delta_net_step(w, x, t, M, h):
    """2406.06484, equations 1 to 3 and section 3.4: short convolutions, unit keys and queries."""
    taps = w["conv"].split([H * K, H * K, H * V])

    def convolved(name, taps):
        window = range(max(0, t - 3), t + 1)
        return silu(sum(taps.chunk(H)[h][:, 3 - (t - s)] * Heads(w, x[s], H)(name, h) for s in window))

    q, k, v = (convolved(n, tap) for n, tap in zip("qkv", taps, strict=True))
    q, k, beta = unit(q), unit(k), sigmoid(w["beta.weight"][h] @ x[t])
    M = M - beta * torch.outer(k, k @ M) + beta * torch.outer(k, v)
    return rms(q / math.sqrt(K) @ M, w["norm"]), M


ORACLES = {
    "Qwen3NextGatedDeltaNet": classes("gated_delta_net", qwen3_next, 12),
    "OlmoHybridGatedDeltaNet": classes("gated_delta_net", lambda: olmo_hybrid(False), 12),
    "OlmoHybridGatedDeltaNet, negative eigenvalues": classes(
        "gated_delta_net", lambda: olmo_hybrid(True), 12, negative_eigenvalues=True
    ),
    "KimiLinearDeltaAttention": classes("kda", kimi, 8, 5e-6),
    "BailingHybridDeltaAttention": classes("kda", bailing, 8),
    "formula of 2406.06484": written("delta_net", delta_net_step),
}
