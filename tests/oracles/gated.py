"""Channel decays: GLA, HGRN2."""

import math

import torch

from oracles.common import H, Heads, K, rms, sigmoid, silu, written


def gla_step(w, x, t, M, h):
    """2312.06635, equations 4 and section 4.4: α = sigmoid(W₂ W₁ x + b)^(1/16)."""
    of = Heads(w, x[t], H)
    raw = of("decay.1", h, w["decay.0.weight"] @ x[t]) + w["decay.1.bias"].chunk(H)[h]
    M = sigmoid(raw)[:, None] ** (1 / 16) * M + torch.outer(of("k", h), of("v", h))
    o = of("q", h) / math.sqrt(K) @ M
    return rms(o, w["norm"]) * silu(of("gate", h)), M


def hgrn2(layer):
    def hgrn2_step(w, x, t, M, h):
        """2404.07904: α = l + (1 - l) sigmoid(W x), k = 1 - α, l the softmax over layers, summed after the first."""
        of = Heads(w, x[t], H)
        share = torch.exp(w["common.lower_bounds"]) / torch.exp(w["common.lower_bounds"]).sum(0)
        bound = share[1 : layer + 1].sum(0).chunk(H)[h]
        alpha = bound + (1 - bound) * sigmoid(of("f", h))
        M = alpha[:, None] * M + torch.outer(1 - alpha, of("i", h))
        return silu(of("q", h)) / math.sqrt(K) @ M, M

    return hgrn2_step


ORACLES = {
    "formula of 2312.06635": written("gla", gla_step),
    "formula of 2404.07904, first": written("hgrn2", hgrn2(0), number=0),
    "formula of 2404.07904, last": written("hgrn2", hgrn2(2), number=2),
}
