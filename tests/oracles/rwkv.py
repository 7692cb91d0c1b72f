"""RWKV."""

import math

import torch

from oracles.common import H, Heads, K, sigmoid, silu, written


def rwkv6_step(w, x, t, M, h):
    """2404.05892, equations 16 to 20; the norm is a group norm with a head a group."""
    now = x[t]
    step = (x[t - 1] if t else torch.zeros_like(now)) - now
    rank = w["mix_up"].shape[1]
    hidden = torch.tanh(w["mix_down.weight"] @ (now + step * w["mix"]))
    mixed = {}
    for i, name in enumerate("wkvrg"):
        share = hidden[i * rank : (i + 1) * rank] @ w["mix_up"][i] + w["mix_bias"][i]
        mixed[name] = now + step * share
    of = Heads(w, None, H)
    low = torch.tanh(w["w.0.weight"] @ mixed["w"])
    decay = torch.exp(-torch.exp(of("w.2", h, low) + w["w.2.bias"].chunk(H)[h]))
    k, v, r = (of(n, h, mixed[n]) for n in "kvr")
    o = r @ (M + torch.outer(w["u"][h] * k, v))
    o = (o - o.mean()) / torch.sqrt(((o - o.mean()) ** 2).mean() + 1e-5)
    o = o * w["norm"].chunk(H)[h] + w["norm_bias"].chunk(H)[h]
    return o * silu(of("g", h, mixed["g"])), decay[:, None] * M + torch.outer(k, v)


def rwkv7_step(w, x, t, M, h):
    """2503.14456: mixes, low-rank projections, memory, bonus and gate in the order of its equations."""
    now = x[t]
    step = (x[t - 1] if t else torch.zeros_like(now)) - now
    mixed = {name: now + step * mix for name, mix in zip("rwkvag", w["mix"], strict=True)}
    of = Heads(w, None, H)

    def low_rank(name, branch, activation=lambda y: y):
        hidden = activation(w[f"{name}.0.weight"] @ mixed[branch])
        return of(f"{name}.2", h, hidden) + (w[f"{name}.2.bias"].chunk(H)[h] if f"{name}.2.bias" in w else 0)

    r, k, v = (of(n, h, mixed[n]) for n in "rkv")
    if "values" in w:
        share = sigmoid(low_rank("nu", "v"))
        v = (1 - share) * v + share * (w["values"].chunk(H)[h] @ now)
    decay = torch.exp(-math.exp(-0.5) * sigmoid(low_rank("w", "w", torch.tanh)))
    rate = sigmoid(low_rank("a", "a"))
    removed = k * w["xi"].chunk(H)[h]
    removed = removed / torch.sqrt((removed * removed).sum())
    k = k * (1 + (rate - 1) * w["alpha"].chunk(H)[h])
    M = (torch.diag(decay) - torch.outer(removed * rate, removed)) @ M + torch.outer(k, v)
    o = r @ M
    o = (o - o.mean()) / torch.sqrt(((o - o.mean()) ** 2).mean() + K * 1e-5)
    o = o * w["norm"].chunk(H)[h] + w["norm_bias"].chunk(H)[h]
    return (o + (r * w["rho"][h] * k).sum() * v) * low_rank("g", "g", sigmoid), M


ORACLES = {
    "formula of 2404.05892": written("rwkv6", rwkv6_step),
    "formula of 2503.14456, first": written("rwkv7", rwkv7_step, number=0),
    "formula of 2503.14456, later": written("rwkv7", rwkv7_step, number=2),
}
