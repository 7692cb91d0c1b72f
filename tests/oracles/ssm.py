"""State space models."""

import math

import torch

from oracles.common import Oracle, called, classes, released, renamed, sigmoid, silu


def state_space(*kind, **config):
    oracle = released(*kind, hidden_size=24, **config)
    names = "in_proj.weight=project.weight conv1d.weight=conv conv1d.bias=conv_bias A_log=A_log dt_bias=dt_bias D=D "
    names += "norm.weight=norm out_proj.weight=o.weight"
    return lambda w, x: called(oracle, renamed(w, names), (x,))


def mamba2(heads=3, groups=1, limits=(0.0, math.inf)):
    sizes = {"num_heads": heads, "head_dim": 48 // heads, "state_size": 8, "n_groups": groups, "chunk_size": 64}
    return state_space("mamba2", "Mamba2Config", "Mamba2Mixer", **sizes, time_step_limit=limits, num_hidden_layers=1)


def nemotron(heads=3, groups=1, least=0.0):
    sizes = {"mamba_num_heads": heads, "mamba_head_dim": 48 // heads, "ssm_state_size": 8, "n_groups": groups}
    sizes |= {"time_step_min": least, "chunk_size": 64, "layers_block_type": ["linear_attention"]}
    return state_space("nemotron_h", "NemotronHConfig", "NemotronHMamba2Mixer", **sizes)


def granite(heads, groups):
    sizes = {"mamba_n_heads": heads, "mamba_d_head": 48 // heads, "mamba_d_state": 8, "mamba_n_groups": groups}
    sizes |= {"mamba_chunk_size": 64, "rms_norm_eps": 1e-5, "num_hidden_layers": 1, "layer_types": ["linear_attention"]}
    return state_space("granitemoehybrid", "GraniteMoeHybridConfig", "GraniteMoeHybridMambaLayer", **sizes)


def grouped(make, **layer):
    return classes("mamba2", make, 8, heads=6, **layer)


MAMBA = "in_proj.weight=project.weight conv1d.weight=conv conv1d.bias=conv_bias x_proj.weight=select.weight D=D "
MAMBA += "dt_proj.weight=dt_up dt_proj.bias=dt_bias out_proj.weight=o.weight "


def mamba(*kind, names="", **config):
    with torch.device("meta"):  # all weights are ours, and Falcon Mamba cannot start its own
        oracle = released(*kind, hidden_size=24, num_hidden_layers=1, **config)
    return lambda w, x: called(oracle, renamed(w, MAMBA + names) | {"A_log": w["A_log"].mT}, (x,))


def jamba():
    norms = "dt_layernorm.weight=norms.0 b_layernorm.weight=norms.1 c_layernorm.weight=norms.2"
    sizes = {"mamba_d_state": 8, "rms_norm_eps": 1e-5}
    return mamba("jamba", "JambaConfig", "JambaMambaMixer", names=norms, **sizes)


def falcon_mamba():
    return mamba("falcon_mamba", "FalconMambaConfig", "FalconMambaMixer", state_size=8, mixer_rms_eps=1e-5)


def s4d(outputs):
    """2206.11893: outputs(u : t v, A, Δ, c : v k) are the state space model's, without its D."""

    def run(w, x):
        A = (-torch.exp(w["rate"]) + 1j * w["frequency"]).T
        step, c = torch.exp(w["dt_log"])[:, None], (w["c"][0] + 1j * w["c"][1]).T
        texts = []
        for text in x.unbind():
            u = text @ w["i.weight"].T if "i.weight" in w else text
            y = outputs(u, A, step, c) + w["D"] * u
            y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
            value, gate = (y @ w["o.weight"].T + w["o.bias"]).chunk(2, 1)
            texts.append(value * sigmoid(gate))
        return torch.stack(texts)

    return run


def s4d_steps(u, A, step, c):
    """Section 2, equations 2 and 3: h_t = Ā h_{t-1} + B̄ u_t, y_t = 2 Re(c h_t), with B = 1."""
    h, y = torch.zeros_like(A), []
    for now in u:
        h = torch.exp(step * A) * h + (torch.exp(step * A) - 1) / A * now[:, None]
        y.append(2 * (c * h).sum(1).real)
    return torch.stack(y)


def s4d_convolution(u, A, step, c):
    """Equation 6: y is u convolved with K_t = 2 Re(c B̄ Ā^t), here by way of its spectrum."""
    t = len(u)
    powers = torch.exp(torch.arange(t)[:, None, None] * step * A)
    kernel = 2 * (c * (torch.exp(step * A) - 1) / A * powers).sum(2).real
    return torch.fft.irfft(torch.fft.rfft(kernel, 2 * t, 0) * torch.fft.rfft(u, 2 * t, 0), 2 * t, 0)[:t]


def diagonal(outputs, value_size):
    sizes = {"width": 6, "heads": 3, "key_size": 4, "value_size": value_size}
    return Oracle("s4", lambda: s4d(outputs), sizes, 20, 1e-12, torch.float64)


def longhorn():
    """2407.14207, algorithm 1 in Mamba's block: S <- (1 - Δ ⊗ k²) S + (Δ x) ⊗ k, channel by channel."""

    def block(w, text, t, S):
        window = [w["project.weight"].chunk(2)[0] @ now for now in text[max(0, t - 3) : t + 1]]
        mixed = sum(tap * now for tap, now in zip(w["conv"].T[4 - len(window) :], window, strict=True))
        u, z = silu(mixed + w["conv_bias"]), w["project.weight"].chunk(2)[1] @ text[t]
        low, k, q = (w["select.weight"] @ u).split([1, 4, 4])
        y, after = [], []
        for d, memory in enumerate(S):
            beta = sigmoid(w["dt_up"][d] @ low + w["dt_bias"][d])
            step = beta / (1 + beta * (k @ k))
            after.append(memory - step * k**2 * memory + step * u[d] * k)
            y.append(q @ after[-1] + w["D"][d] * u[d])
        return w["o.weight"] @ (torch.stack(y) * silu(z)), after

    def run(w, x):
        texts = []
        for text in x.unbind():
            S, y = [torch.zeros(4, dtype=x.dtype)] * len(w["D"]), []
            for t in range(len(text)):
                o, S = block(w, text, t, S)
                y.append(o)
            texts.append(torch.stack(y))
        return torch.stack(texts)

    return run


ORACLES = {
    "Mamba2Mixer": classes("mamba2", mamba2, 16),
    "NemotronHMamba2Mixer": classes("mamba2", nemotron, 16),
    "Mamba2Mixer, groups": grouped(lambda: mamba2(6, 2), state_groups=2),
    "Mamba2Mixer, limits": grouped(lambda: mamba2(6, 3, (0.4, 1.2)), state_groups=3, step_limits=(0.4, 1.2)),
    "NemotronHMamba2Mixer, groups": grouped(lambda: nemotron(6, 3), state_groups=3),
    "NemotronHMamba2Mixer, least step": grouped(
        lambda: nemotron(6, 2, 0.4), state_groups=2, step_limits=(0.4, math.inf)
    ),
    "GraniteMoeHybridMambaLayer": grouped(lambda: granite(6, 2), state_groups=2),
    "MambaMixer": classes("mamba", lambda: mamba("mamba", "MambaConfig", "MambaMixer", state_size=8), 16),
    "JambaMambaMixer": classes("mamba", jamba, 16, state_norm="learned"),
    "FalconMambaMixer": classes("mamba", falcon_mamba, 16, state_norm="weightless"),
    "formula of 2206.11893": diagonal(s4d_steps, 2),
    "formula of 2206.11893, values of another width": diagonal(s4d_steps, 3),
    "convolution of 2206.11893": diagonal(s4d_convolution, 2),
    "formula of 2407.14207": Oracle(
        "longhorn",
        longhorn,
        {"width": 6, "heads": 3, "key_size": 4, "value_size": 4},
        9,
        1e-12,
        torch.float64,
    ),
}
