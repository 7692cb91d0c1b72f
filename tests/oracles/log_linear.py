"""Log-linear attention: every earlier token by the level it stands on, in quadratic time."""

import torch

from oracles.common import H, K, Oracle, V, sigmoid, silu


def level(t: int, s: int) -> int:
    """The number of low bits in which two positions differ (2506.04761, section 3.1: the Fenwick tree's buckets)."""
    return (t ^ s).bit_length()


def mamba2(w, x):
    """o_t = sum over s <= t of λ_t[level] e^{g_{s+1} + ... + g_t} (C_t · B_s) Δ_s x_s, in the layer of 2405.21060."""
    return torch.stack([text(w, y) for y in x.unbind()])


def text(w, x):
    z, mixed, dt = (x @ w["project.weight"].T).split([H * V, H * V + 2 * K, H], -1)
    mixed = torch.stack([convolved(w, mixed, t) for t in range(len(x))])
    u, B, C = mixed.split([H * V, K, K], -1)
    dt = torch.log(1 + torch.exp(dt + w["dt_bias"]))
    g = -torch.exp(w["A_log"]) * dt
    raw = (x @ w["weigh.weight"].T).unflatten(-1, (H, -1))
    weight = torch.log(1 + torch.exp(w["L"] * raw))
    y = []
    for t in range(len(x)):
        heads = []
        for h in range(H):
            o = w["D"][h] * u[t].chunk(H)[h]
            for s in range(t + 1):
                share = weight[t, h, level(t, s)] * torch.exp(g[s + 1 : t + 1, h].sum()) * (C[t] @ B[s])
                o = o + share * dt[s, h] * u[s].chunk(H)[h]
            heads.append(o)
        o = torch.cat(heads) * silu(z[t])
        y.append(w["o.weight"] @ (w["norm"] * o / torch.sqrt((o * o).mean() + 1e-5)))
    return torch.stack(y)


def convolved(w, x, t):
    taps = range(max(0, t - 3), t + 1)
    y = sum(w["conv"][:, 3 - (t - s)] * x[s] for s in taps) + w["conv_bias"]
    return y * sigmoid(y)


SIZES = {"width": 6, "heads": H, "key_size": K, "value_size": V, "levels": 5}
ORACLES = {
    "formula of 2506.04761": Oracle("log_linear_mamba2", lambda: mamba2, SIZES, 16, 1e-12, torch.float64),
}
