"""Mixture-of-Memories: each memory over the tokens that were sent to it, all written out."""

import math

import torch

from oracles.common import H, K, Oracle, V, rms, sigmoid, silu, unit

MEMORIES, KEPT = 4, 2


def chosen(w, x) -> dict[int, float]:
    """The memories of a token and their weights, the shared one with weight 1."""
    p = torch.exp(w["router"] @ x) / torch.exp(w["router"] @ x).sum()
    best = sorted(range(MEMORIES), key=lambda e: -p[e].item())[:KEPT]
    return {e: p[e] / sum(p[i] for i in best) for e in best} | {MEMORIES: 1.0}


def memory(e: int) -> str:
    return f"others.{e - 1}" if e else "first"


def gla(w, x):
    """Section 3 of 2502.13685 with the memories of 2312.06635."""
    texts = []
    for text in x.unbind():
        M = [[torch.zeros(K, V, dtype=x.dtype) for _ in range(H)] for _ in range(MEMORIES + 1)]
        y = []
        for now in text:
            weights, heads = chosen(w, now), []
            for h in range(H):
                q, o = (w["first.q.weight"] @ now).chunk(H)[h] / math.sqrt(K), 0
                for e, weight in weights.items():
                    k, v = ((w[f"{memory(e)}.{n}.weight"] @ now).chunk(H)[h] for n in "kv")
                    low = w[f"{memory(e)}.decay.0.weight"] @ now
                    raw = (w[f"{memory(e)}.decay.1.weight"] @ low + w[f"{memory(e)}.decay.1.bias"]).chunk(H)[h]
                    M[e][h] = sigmoid(raw)[:, None] ** (1 / 16) * M[e][h] + torch.outer(k, v)
                    o = o + weight * (q @ M[e][h])
                gate = silu((w["first.gate.weight"] @ now).chunk(H)[h])
                heads.append(rms(o, w["first.norm"]) * gate)
            y.append(w["first.o.weight"] @ torch.cat(heads))
        texts.append(torch.stack(y))
    return torch.stack(texts)


def gated_delta_net(w, x):
    """The same with those of 2412.06464, as released: a memory's convolutions run over the tokens that it gets."""
    return torch.stack([with_taps(w, text) for text in x.unbind()])


def with_taps(w, text):
    M = [[torch.zeros(K, V, dtype=text.dtype) for _ in range(H)] for _ in range(MEMORIES + 1)]
    seen, y = [[] for _ in range(MEMORIES + 1)], []
    for now in text:
        weights, o = chosen(w, now), [0] * H
        for e, weight in weights.items():
            of = memory(e)
            seen[e].append(torch.cat([w[f"{n}.weight"] @ now for n in ("first.q", f"{of}.k", f"{of}.v")]))
            mixed = silu(sum(w["first.conv"][:, 3 - i] * past for i, past in enumerate(reversed(seen[e][-4:]))))
            q, k, v = mixed.split([H * K, H * K, H * V])
            step = torch.log(1 + torch.exp(w[f"{of}.a.weight"] @ now + w["first.dt_bias"]))
            beta = sigmoid(w[f"{of}.beta.weight"] @ now)
            for h in range(H):
                q_h, k_h = (unit(part.chunk(H)[h]) for part in (q, k))
                faded = torch.exp(-torch.exp(w["first.A_log"][h]) * step[h]) * M[e][h]
                M[e][h] = faded + beta[h] * torch.outer(k_h, v.chunk(H)[h] - k_h @ faded)
                o[h] = o[h] + weight * (q_h / math.sqrt(K) @ M[e][h])
        gate = silu(w["first.gate.weight"] @ now).chunk(H)
        y.append(w["first.o.weight"] @ torch.cat([rms(o[h], w["first.norm"]) * gate[h] for h in range(H)]))
    return torch.stack(y)


def mixture(lsm, formula):
    sizes = {"width": 6, "heads": H, "key_size": K, "value_size": V, "memories": MEMORIES, "memories_kept": KEPT}
    return Oracle(lsm, lambda: formula, sizes, 23, 1e-12, torch.float64)


ORACLES = {
    "formula of 2502.13685, GLA": mixture("mom_gla", gla),
    "formula of 2502.13685, Gated DeltaNet": mixture("mom_gated_delta_net", gated_delta_net),
}
