"""The rules of 2503.05447's Table 1, as printed: a formula a rule, one layer around them all."""

import math

import torch

from oracles.common import H, K, Oracle, V, rms, sigmoid, silu, unit


def softplus(x):
    return torch.log(1 + torch.exp(x))


# name -> the memory after a token, from what the layer projects for one head (q k v and the row's gates, raw)
def gradient(M, k, v):
    return torch.outer(k, k @ M - v)


RULES = {
    "retention": lambda M, x: sigmoid(x["g"]) * M + torch.outer(x["k"], x["v"]),
    "delta_net": lambda M, x: (
        (torch.eye(K) - sigmoid(x["alpha"]) * torch.outer(x["k"], x["k"])) @ M
        + sigmoid(x["beta"]) * torch.outer(x["k"], x["v"])
    ),
    "gated_delta_net": lambda M, x: (
        sigmoid(x["g"]) * (torch.eye(K) - torch.outer(x["k"], x["k"])) @ M
        + sigmoid(x["beta"]) * torch.outer(x["k"], x["v"])
    ),
    "rebased": lambda M, x: M + torch.outer(torch.outer(x["k"], x["k"]).flatten() / K**0.5, x["v"]),
    "fast_weights": lambda M, x: sigmoid(x["G"]) * M + torch.outer(x["k"], x["v"]),
    "ttt": lambda M, x: M + sigmoid(x["beta"]) * gradient(M, x["k"], x["v"]),
    "titans": lambda M, x: sigmoid(x["g"]) * M + sigmoid(x["beta"]) * gradient(M, x["k"], x["v"]),
    "mamba": lambda M, x: (
        torch.exp(-softplus(x["dt"])[:, None] * torch.exp(x["A"])) * M
        + softplus(x["dt"])[:, None] * torch.outer(x["k"], x["v"])
    ),
    "mamba2": lambda M, x: (
        torch.exp(-sigmoid(x["beta"]) * torch.exp(x["A"])) * M + sigmoid(x["beta"]) * torch.outer(x["k"], x["v"])
    ),
    "hgrn2": lambda M, x: sigmoid(x["g"])[:, None] * M + torch.outer(1 - sigmoid(x["g"]), x["v"]),
    "rwkv6": lambda M, x: sigmoid(x["g"])[:, None] * M + torch.outer(x["k"], x["v"]),
    "rwkv7": lambda M, x: sigmoid(x["g"])[:, None] * M + sigmoid(x["beta"]) * gradient(M, x["k"], x["v"]),
}
RULES["s4"] = RULES["mamba"]
ERASING = ("delta_net", "gated_delta_net", "ttt", "titans", "rwkv7")
SHAPE = {"k": (K,), "q": (K,), "v": (V,), "dt": (K,), "G": (K, V)}


def layer(name):
    def run(w, x):
        return torch.stack([text(w, y) for y in x.unbind()])

    def text(w, x):
        rows = K * K if name == "rebased" else K
        M, y = [torch.zeros(rows, V, dtype=x.dtype)] * H, []
        for now in x:
            heads = []
            for h in range(H):
                mine = of_head(w, now, h)
                M[h] = RULES[name](M[h], mine)
                q = torch.outer(mine["q"], mine["q"]).flatten() / K**0.5 if name == "rebased" else mine["q"]
                gate = silu((w["gate.weight"] @ now).chunk(H)[h])
                heads.append(rms(q @ M[h], w["norm"]) * gate)
            y.append(w["o.weight"] @ torch.cat(heads))
        return torch.stack(y)

    def of_head(w, now, h):
        x = {n.split(".")[1]: (m @ now).chunk(H)[h] for n, m in w.items() if n.startswith("project.")}
        x |= {n.split(".")[1]: m if len(m) == 1 else m[h] for n, m in w.items() if n.startswith(("still.", "rates."))}
        per_channel = ("hgrn2", "rwkv6", "rwkv7")
        shapes = SHAPE | ({"g": (K,)} if name in per_channel else {})
        x = {n: y.reshape(y.shape if n == "A" else shapes.get(n, ())) for n, y in x.items()}
        if name in ERASING:
            x |= {n: unit(x[n]) for n in "qk"}
        return x | {"q": x["q"] / math.sqrt(K)}

    return run


def printed(name):
    sizes = {"width": 6, "heads": H, "key_size": K, "value_size": V}
    return Oracle(f"{name}_printed", lambda: layer(name), sizes, 9, 1e-12, torch.float64)


ORACLES = {f"printed in 2503.05447, {name}": printed(name) for name in RULES}
