"""State space models."""

import math

import torch

from oracles.common import H, Oracle, V, called, classes, released, renamed, rms, sigmoid, silu


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


class Likeliest(torch.nn.Module):
    """A projection that is several: each token through the likeliest alone, times its probability (2401.04081)."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.router = torch.nn.Parameter(torch.empty(3, inputs))
        self.maps = torch.nn.Parameter(torch.empty(3, outputs, inputs))

    def token(self, x):
        p = torch.exp(self.router @ x) / torch.exp(self.router @ x).sum()
        return p.max() * self.maps[p.argmax()] @ x

    def forward(self, x):
        return torch.stack([torch.stack([self.token(now) for now in text.unbind()]) for text in x.unbind()])


class Halves(torch.nn.Module):
    """Mamba's x and z, from projections of their own."""

    def __init__(self, x, z):
        super().__init__()
        self.x, self.z = x, z

    def forward(self, x):
        return torch.cat([self.x(x), self.z(x)], -1)


def likeliest(*several):
    """The released Mamba with those of its projections replaced."""

    def projection(name, inputs, outputs):
        return Likeliest(inputs, outputs) if name in several else torch.nn.Linear(inputs, outputs, bias=False)

    names = " ".join(part for part in MAMBA.split() if part.split("_")[0] not in ("in", "out"))
    for theirs, ours in (("in_proj.x", "input"), ("in_proj.z", "gate"), ("out_proj", "o")):
        if ours in several or (ours == "o" and "output" in several):
            names += f" {theirs}.router={ours}.router {theirs}.maps={ours}.maps.weight"
        else:
            names += f" {theirs}.weight={ours}.weight"
    oracle = released("mamba", "MambaConfig", "MambaMixer", hidden_size=24, num_hidden_layers=1, state_size=8)
    oracle.in_proj = Halves(projection("input", 24, 48), projection("gate", 24, 48))
    oracle.out_proj = projection("output", 48, 24)
    return lambda w, x: called(oracle, renamed(w, names) | {"A_log": w["A_log"].mT}, (x,))


def several(name, *which):
    return classes(name, lambda: likeliest(*which), 16, projection_experts=which, mixer_experts=3)


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


def mamba3(read):
    """2603.15569 with one input and output a head: read(q, k, x, g, Δ, λ, Θ) -> y, of one head's whole text."""

    def block(w, x):
        heads, size = w["B_bias"].shape
        wide, r = x @ w["project.weight"].T, size // 4
        z, u, B, C, dt, rate, share, turn = wide.split([*[heads * V] * 2, size, size, *[heads] * 3, r], 1)
        y = []
        for h in range(heads):
            step = torch.log(1 + torch.exp(dt[:, h] + w["dt_bias"][h]))
            g = -torch.log(1 + torch.exp(rate[:, h])).clamp(min=1e-4) * step
            angle = torch.cumsum(step[:, None] * math.pi * torch.tanh(turn), 0)
            k, q = (
                torch.stack([rms(row, w[f"{n}_norm"]) for row in part]) + w[f"{n}_bias"][h]
                for n, part in (("B", B), ("C", C))
            )
            own = u[:, h * V : (h + 1) * V]
            o = read(q, k, own, g, step, sigmoid(share[:, h]), angle) + w["D"][h] * own
            y.append(o * silu(z[:, h * V : (h + 1) * V]))
        return torch.cat(y, 1) @ w["o.weight"].T

    return lambda w, x: torch.stack([block(w, text) for text in x.unbind()])


def complex_state(q, k, x, g, step, share, angle):
    """The paper's complex state space, step by step: pairs of channels are complex numbers that decay and turn, and the
    trapezoid's earlier end is the last token's own key."""
    r, turn = angle.shape[1], angle.diff(dim=0, prepend=torch.zeros_like(angle[:1]))
    pairs = [y.unflatten(1, (-1, 2)) for y in (q, k)]
    q, k = (torch.complex(y[..., 0], y[..., 1]) for y in pairs)
    turn = torch.cat([turn, torch.zeros(len(x), q.shape[1] - r, dtype=x.dtype)], 1)
    state, y = torch.zeros(q.shape[1], x.shape[1], dtype=q.dtype), []
    for t in range(len(x)):
        if t:
            state = state + ((1 - share[t]) * step[t]) * k[t - 1][:, None] * x[t - 1]
        state = torch.exp(g[t] - 1j * turn[t])[:, None] * state + share[t] * step[t] * k[t][:, None] * x[t]
        y.append((q[t].conj() @ state).real)
    return torch.stack(y)


def rotated(y, angle):
    """Its first channels in pairs, turned by a matrix each."""
    pairs = list(y.split(2))
    for i, a in enumerate(angle):
        pairs[i] = torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()]).view(2, 2) @ pairs[i]
    return torch.cat(pairs)


def unrolled(q, k, x, g, step, share, angle):
    """Every earlier token and the one behind it: o_t = the sum over s <= t of e^{g_{s+1} + ... + g_t} (q_t · k_s) times
    λ_s Δ_s x_s, and, below t, (1 - λ_{s+1}) Δ_{s+1} x_s."""
    q, k = (torch.stack([rotated(*pair) for pair in zip(y, angle, strict=True)]) for y in (q, k))
    y = []
    for t in range(len(x)):
        o = torch.zeros_like(x[0])
        for s in range(t + 1):
            seen = torch.exp(g[s + 1 : t + 1].sum()) * (q[t] @ k[s])
            o = o + seen * share[s] * step[s] * x[s]
            if s < t:
                o = o + seen * (1 - share[s + 1]) * step[s + 1] * x[s]
        y.append(o)
    return torch.stack(y)


def looking_ahead(q, k, x, g, step, share, angle):
    """A scalar row whose keys have both ends' weights at once, and an output without what the next token will add."""
    q, k = (torch.stack([rotated(*pair) for pair in zip(y, angle, strict=True)]) for y in (q, k))
    ahead = torch.cat([((1 - share) * step)[1:], torch.ones_like(step[:1])])  # the last one's cancels
    M, y = torch.zeros(k.shape[1], x.shape[1], dtype=x.dtype), []
    for t in range(len(x)):
        M = torch.exp(g[t]) * M + (share[t] * step[t] + ahead[t]) * torch.outer(k[t], x[t])
        y.append(q[t] @ M - ahead[t] * (q[t] @ k[t]) * x[t])
    return torch.stack(y)


def trapezoid(read, size, t=9):
    sizes = {"width": 6, "heads": H, "key_size": size, "value_size": V}
    return Oracle("mamba3", lambda: mamba3(read), sizes, t, 1e-12, torch.float64)


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
    "MambaMixer, input and output of several": several("projections", "input", "output"),
    "MambaMixer, gate of several": several("a projection", "gate"),
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
    "formula of 2603.15569, unrolled": trapezoid(unrolled, 8),
    "complex state of 2603.15569": trapezoid(complex_state, 8, 20),
    "complex state of 2603.15569, keys that do not divide": trapezoid(complex_state, 10),
    "scalar row of 2603.15569, looking ahead": trapezoid(looking_ahead, 4, 20),
}
