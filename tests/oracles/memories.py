"""Mixture-of-Memories: each memory over the tokens that were sent to it, all written out."""

import math

import torch

from oracles.common import H, K, Oracle, V, rms, sigmoid, silu

MEMORIES, KEPT = 4, 2


def chosen(w, x) -> dict[int, float]:
    """The memories of a token and their weights, the shared one with weight 1."""
    p = torch.exp(w["router"] @ x) / torch.exp(w["router"] @ x).sum()
    best = sorted(range(MEMORIES), key=lambda e: -p[e].item())[:KEPT]
    return {e: p[e] / sum(p[i] for i in best) for e in best} | {MEMORIES: 1.0}


def gla(w, x):
    """Section 3 of 2502.13685 with the memories of 2312.06635."""
    texts = []
    for text in x.unbind():
        M = [[torch.zeros(K, V, dtype=x.dtype) for _ in range(H)] for _ in range(MEMORIES + 1)]
        y = []
        for now in text:
            weights, heads = chosen(w, now), []
            for h in range(H):
                q, o = (w["memories.0.q.weight"] @ now).chunk(H)[h] / math.sqrt(K), 0
                for e, weight in weights.items():
                    k, v = ((w[f"memories.{e}.{n}.weight"] @ now).chunk(H)[h] for n in "kv")
                    low = w[f"memories.{e}.decay.0.weight"] @ now
                    raw = (w[f"memories.{e}.decay.1.weight"] @ low + w[f"memories.{e}.decay.1.bias"]).chunk(H)[h]
                    M[e][h] = sigmoid(raw)[:, None] ** (1 / 16) * M[e][h] + torch.outer(k, v)
                    o = o + weight * (q @ M[e][h])
                gate = silu((w["memories.0.gate.weight"] @ now).chunk(H)[h])
                heads.append(rms(o, w["memories.0.norm"]) * gate)
            y.append(w["memories.0.o.weight"] @ torch.cat(heads))
        texts.append(torch.stack(y))
    return torch.stack(texts)


def mixture(lsm, formula):
    sizes = {"width": 6, "heads": H, "key_size": K, "value_size": V, "memories": MEMORIES, "memories_kept": KEPT}
    return Oracle(lsm, lambda: formula, sizes, 23, 1e-12, torch.float64)


ORACLES = {
    "formula of 2502.13685, GLA": mixture("mom_gla", gla),
}
