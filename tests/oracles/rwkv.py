"""RWKV."""

import torch

from oracles.common import H, Heads, silu, written


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


ORACLES = {
    "formula of 2404.05892": written("rwkv6", rwkv6_step),
}
