"""Attention over slots."""

import torch

from oracles.common import Heads, K, Oracle, V, rms, sigmoid, silu

SLOTS = 5


def gsa(w, x):
    """2409.07146, equations 8 to 10: α = sigmoid(f)^(1/8), K̃ = diag(α) K̃ + (1 - α) kᵀ, o = Ṽᵀ softmax(K̃ q)."""
    y = []
    for text in x:
        slots = [[(torch.zeros(K).double(), torch.zeros(V).double())] * SLOTS for _ in range(3)]
        for token in text:
            of, o = Heads(w, token, 3), []
            for h in range(3):
                alpha = sigmoid(of("f", h)) ** (1 / 8)
                k, v, q = (silu(of(name, h)) for name in "kvq")
                slots[h] = [
                    (a * key + (1 - a) * k, a * value + (1 - a) * v)
                    for a, (key, value) in zip(alpha, slots[h], strict=True)
                ]
                weight = torch.stack([torch.exp(q @ key) for key, _ in slots[h]])
                o.append(sum(p * value for p, (_, value) in zip(weight / weight.sum(), slots[h], strict=True)))
            y.append(w["o.weight"] @ rms(silu(torch.cat(o)), w["norm"]))
    return torch.stack(y).reshape(*x.shape[:2], -1)


SIZES = {"width": 6, "heads": 3, "key_size": K, "value_size": V, "slots": SLOTS}
ORACLES = {"formula of 2409.07146": Oracle("gsa", lambda: gsa, SIZES, 9, 1e-12, torch.float64)}
