"""Delta rules."""

import math

import torch

from oracles.common import H, K, V, called, classes, released, renamed, rms, sigmoid, silu, unit, written


def by_head(w, *names, heads=3):
    """Rows of several matrices, head after head."""
    return torch.cat([w[f"{n}.weight"].unflatten(0, (heads, -1)) for n in names], 1).flatten(0, 1)


def gated_delta_net(model, name, kind, heads, value_heads):
    return released(
        model,
        name,
        kind,
        hidden_size=24,
        linear_num_key_heads=heads,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        rms_norm_eps=1e-5,
    )


QWEN = "norm.weight=norm out_proj.weight=o.weight conv1d.weight=conv A_log=A_log dt_bias=dt_bias "


def qwen3_next(heads=3, value_heads=3):
    """Its projections are two matrices, laid out by heads of keys."""
    oracle = gated_delta_net("qwen3_next", "Qwen3NextConfig", "Qwen3NextGatedDeltaNet", heads, value_heads)

    def run(w, x):
        projections = {
            "in_proj_qkvz": by_head(w, *"qkv", "gate", heads=heads),
            "in_proj_ba": by_head(w, "beta", "a", heads=heads),
        }
        projections = {f"{n}.weight": matrix for n, matrix in projections.items()}
        return called(oracle, renamed(w, QWEN) | projections, (x,))

    return run


def qwen3_5(heads=3, value_heads=3):
    oracle = gated_delta_net("qwen3_5", "Qwen3_5TextConfig", "Qwen3_5GatedDeltaNet", heads, value_heads)
    names = QWEN + "in_proj_z.weight=gate.weight in_proj_b.weight=beta.weight in_proj_a.weight=a.weight"

    def run(w, x):
        qkv = {"in_proj_qkv.weight": torch.cat([w[f"{n}.weight"] for n in "qkv"])}
        return called(oracle, renamed(w, names) | qkv, (x,))

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


LOW_RANK = DELTA + "g_a_proj.weight=gate.0.weight g_b_proj.weight=gate.1.weight forget_gate.dt_bias=dt_bias "
LOW_RANK += "forget_gate.f_a_proj.weight=a.0.weight forget_gate.f_b_proj.weight=a.1.weight "


def kimi():
    oracle = released("kimi_linear", "KimiLinearConfig", "KimiLinearDeltaAttention", **KDA)

    def run(w, x):
        A_log = {"forget_gate.A_log": w["A_log"][None, None, :, None]}
        return called(oracle, renamed(w, LOW_RANK) | A_log, (x,))

    return run


def glm(floor):
    kind = {"linear_lower_bound": floor, "layer_types": ["linear_attention"]}
    oracle = released("glm5_next", "Glm5NextTextConfig", "Glm5NextTextLinearAttention", **KDA, **kind)
    return lambda w, x: called(oracle, renamed(w, LOW_RANK + "forget_gate.A_log=A_log"), (x,))


def bailing(safe):
    """Its two gates are full matrices; ours are products of two."""
    kind = {"kda_safe_gate": safe, "kda_lower_bound": -5.0, "layer_types": ["linear_attention"]}
    oracle = released("bailing_hybrid", "BailingHybridConfig", "BailingHybridDeltaAttention", **KDA, **kind)
    names = DELTA + "forget_gate.dt_bias=dt_bias forget_gate.A_log=A_log"

    def run(w, x):
        full = {theirs: w[f"{n}.1.weight"] @ w[f"{n}.0.weight"] for theirs, n in (("g_proj", "gate"), ("f_proj", "a"))}
        gates = {"g_proj.weight": full["g_proj"], "forget_gate.f_proj.weight": full["f_proj"]}
        return called(oracle, renamed(w, names) | gates, (x,))

    return run


class Front:
    """A token's q, ks and vs behind the short convolutions, for one head of values: ks and vs for each step of it."""

    def __init__(self, w, x, t, h, steps=1):
        value_heads = len(w["beta.weight"]) // steps
        self.key = h * H // value_heads  # the head of keys that this head of values has
        q, k, v = w["conv"].split([H * K, steps * H * K, steps * value_heads * V])
        window = range(max(0, t - 3), t + 1)

        def head(name, taps, i, heads):
            rows = w[f"{name}.weight"].chunk(heads)[i]
            return silu(sum(taps.chunk(heads)[i][:, 3 - (t - s)] * (rows @ x[s]) for s in window))

        self.q = head("q", q, self.key, H)
        self.ks = [head("k", k, i * H + self.key, H * steps) for i in range(steps)]
        self.vs = [head("v", v, i * value_heads + h, value_heads * steps) for i in range(steps)]
        self.betas = [sigmoid(w["beta.weight"][i * value_heads + h] @ x[t]) for i in range(steps)]


def softplus(x):
    return torch.log(1 + torch.exp(x))


def alpha(w, x, h):
    """The decay of Mamba2, which 2412.06464 takes over."""
    return torch.exp(-torch.exp(w["A_log"][h]) * softplus(w["a.weight"][h] @ x + w["dt_bias"][h]))


def gate(w, x, h):
    return w["gate.weight"].chunk(len(w["A_log"]))[h] @ x


def delta_net_step(w, x, t, M, h):
    """2406.06484, equations 1 to 3 and section 3.4: short convolutions, unit keys and queries."""
    at = Front(w, x, t, h)
    q, k, v, beta = unit(at.q), unit(at.ks[0]), at.vs[0], at.betas[0]
    M = M - beta * torch.outer(k, k @ M) + beta * torch.outer(k, v)
    return rms(q / math.sqrt(K) @ M, w["norm"]), M


def comba_step(w, x, t, M, h):
    """2506.02475: erased is what p finds before the decay. As in the released layer q - D p, k and p have length 1."""
    at = Front(w, x, t, h)
    k, v, beta = at.ks[0], at.vs[0], at.betas[0]
    p = k * sigmoid(w["c"][at.key])
    q, k, p = unit(at.q - w["D"][at.key] * p), unit(k), unit(p)
    M = alpha(w, x[t], h) * M - beta * torch.outer(k, p @ M) + beta * torch.outer(k, v)
    return rms(q / math.sqrt(K) @ M, w["norm"]) * sigmoid(gate(w, x[t], h)), M


def delta_product(steps):
    def delta_product_step(w, x, t, M, h):
        """2502.10297: a product of generalized Householder matrices (I - beta kᵀ k), the gate before the first."""
        at = Front(w, x, t, h, steps)
        M = alpha(w, x[t], h) * M
        for k, v, beta in zip(map(unit, at.ks), at.vs, at.betas, strict=True):
            M = (torch.eye(K) - 2 * beta * torch.outer(k, k)) @ M + 2 * beta * torch.outer(k, v)
        return rms(unit(at.q) / math.sqrt(K) @ M, w["norm"]) * silu(gate(w, x[t], h)), M

    return delta_product_step


def kda_step(w, x, t, M, h):
    """2510.26692, with the floor of -5 that GLM-5.3 and Ling-3.0 give to the log decay."""
    at, heads = Front(w, x, t, h), len(w["A_log"])
    k, v, beta = unit(at.ks[0]), at.vs[0], at.betas[0]
    u = w["a.1.weight"].chunk(heads)[h] @ (w["a.0.weight"] @ x[t]) + w["dt_bias"].chunk(heads)[h]
    M = torch.exp(-5 * sigmoid(torch.exp(w["A_log"][h]) * u))[:, None] * M
    M = M + beta * torch.outer(k, v - k @ M)
    z = w["gate.1.weight"].chunk(heads)[h] @ (w["gate.0.weight"] @ x[t])
    return rms(unit(at.q) / math.sqrt(K) @ M, w["norm"]) * sigmoid(z), M


SHARED = {"memories": 2 * H, "value_heads": 2 * H}
ORACLES = {
    "Qwen3NextGatedDeltaNet": classes("gated_delta_net", qwen3_next, 12),
    "Qwen3NextGatedDeltaNet, shared keys": classes("gated_delta_net", lambda: qwen3_next(3, 6), 12, value_heads=6),
    "Qwen3_5GatedDeltaNet, shared keys": classes("gated_delta_net", lambda: qwen3_5(2, 6), 12, heads=2, value_heads=6),
    "OlmoHybridGatedDeltaNet": classes("gated_delta_net", lambda: olmo_hybrid(False), 12),
    "OlmoHybridGatedDeltaNet, negative eigenvalues": classes(
        "gated_delta_net", lambda: olmo_hybrid(True), 12, negative_eigenvalues=True
    ),
    "KimiLinearDeltaAttention": classes("kda", kimi, 8, 5e-6),
    "BailingHybridDeltaAttention": classes("kda", lambda: bailing(False), 8),
    "BailingHybridDeltaAttention, floor": classes("kda", lambda: bailing(True), 8, gate_floor=-5.0),
    "Glm5NextTextLinearAttention, floor": classes("kda", lambda: glm(-3.0), 8, gate_floor=-3.0),
    "formula of 2510.26692, shared keys": written("kda", kda_step, gate_floor=-5.0, **SHARED),
    "formula of 2406.06484": written("delta_net", delta_net_step),
    "formula of 2506.02475": written("comba", comba_step),
    "formula of 2506.02475, shared keys": written("comba", comba_step, **SHARED),
    "OlmoHybridGatedDeltaNet, as a product of one": classes(
        "gated_delta_product", lambda: olmo_hybrid(True), 12, delta_steps=1
    ),
    "formula of 2502.10297": written("gated_delta_product", delta_product(2)),
    "formula of 2502.10297, three steps, shared keys": written(
        "gated_delta_product", delta_product(3), delta_steps=3, **SHARED
    ),
}
