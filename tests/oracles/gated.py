"""Channel decays: GLA, HGRN2, gated fast weights, GateLoop."""

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


def so_far(w, x, t, h, decay):
    """q_t, and for every s <= t the key, the value, and what the decays of s + 1 ... t leave, multiplied together."""
    tokens, left, past = [Heads(w, token, H) for token in x[: t + 1]], 1.0, []
    for of in reversed(tokens):
        past.append((of("k", h), of("v", h), left))
        left = left * decay(of, h)
    return tokens[t]("q", h) / math.sqrt(K), past


def fast_weights_step(w, x, t, M, h):
    """2210.04243, without a memory: a write of token s is dimmed by all later αᵀ γ."""

    def decay(of, h):
        alpha = sigmoid(of("alpha", h) + w["alpha.bias"].chunk(H)[h])
        return torch.outer(alpha, sigmoid(of("gamma", h) + w["gamma.bias"].chunk(H)[h]))

    q, past = so_far(w, x, t, h, decay)
    return sum(q @ (left * torch.outer(k, v)) for k, v, left in past), M


def gate_loop_step(w, x, t, M, h):
    """2311.01927, as the attention it is: o = Re(sum of (q ⊙ a_{s+1} ... a_t)·k v), then ⊙ SiLU(W x)."""
    q, past = so_far(w, x, t, h, lambda of, h: sigmoid(of("magnitude", h)) * torch.exp(1j * of("phase", h)))
    return sum((((q * left) * k).sum() * v).real for k, v, left in past) * silu(Heads(w, x[t], H)("gate", h)), M


ORACLES = {
    "formula of 2312.06635": written("gla", gla_step),
    "formula of 2404.07904, first": written("hgrn2", hgrn2(0), number=0),
    "formula of 2404.07904, last": written("hgrn2", hgrn2(2), number=2),
    "formula of 2210.04243": written("gated_fast_weights", fast_weights_step),
    "formula of 2311.01927": written("gate_loop", gate_loop_step),
}
