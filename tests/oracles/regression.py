"""Memories that fit values to keys: by gradients (TTT, Titans), which are autograd's here, or exactly (Mesa)."""

import math

import torch

from oracles.common import H, K, Oracle, V, rms, sigmoid, silu, unit


def over_heads(one, finish):
    """one(w, text, h) -> the head's outputs for a text, finish(w, outputs of all heads) -> what the layer returns."""

    def run(w, x):
        texts = (torch.cat([one(w, text, h) for h in range(H)], -1) for text in x)
        return torch.stack([torch.stack([w["o.weight"] @ finish(w, o) for o in text]) for text in texts])

    return run


def projected(w, name, text, h):
    y = text @ w[f"{name}.weight"].chunk(H)[h].T
    return y + w[f"{name}.bias"].chunk(H)[h] if f"{name}.bias" in w else y


def convolved(w, names, text, h):
    """Four taps and SiLU; the taps of all channels of all `names` stand above each other."""
    taps = w["conv"].split([len(w[f"{name}.weight"]) for name in names])
    for name, tap in zip(names, taps, strict=True):
        y = torch.cat([text.new_zeros(3, len(tap) // H), projected(w, name, text, h)])
        yield silu(torch.stack([(tap.chunk(H)[h].T * y[t : t + 4]).sum(0) for t in range(len(text))]))


def turned(x, place):
    """A pair of channels, i and i + K/2, is a complex number that turns by place · 10000^(-2i/K)."""
    angle = place * torch.tensor([10000.0 ** (-2 * i / K) for i in range(K // 2)], dtype=torch.float64)
    z = torch.complex(x[: K // 2], x[K // 2 :]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag])


def layer_norm(x, scale, shift):
    return scale * (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-6) + shift


def after_norm(w, o):
    return layer_norm(o, w["norm"], w["norm_bias"])


def views(w, text, h, n):
    """Query, key, value and the sigmoid of the rate of every token; both turned by the place in the mini-batch."""
    q, k, v, rate = (projected(w, name, text, h) for name in ("q", "k", "v", "rate"))
    return [(turned(q[t], t % n), turned(k[t], t % n), v[t], sigmoid(rate[t, 0])) for t in range(len(text))]


def ttt_linear(n):
    def head(w, text, h):
        """2407.04620, section 2.7: f(x) = x + LN(x W + c), loss |f(k) - v|² / 2, gradients where a mini-batch began."""
        W, c, o, steps = w["W"][h], w["c"][h], [], []

        def f(x, W, c):
            return x + layer_norm(x @ W + c, w["scale"][h], w["shift"][h])

        for t, (q, k, v, rate) in enumerate(views(w, text, h, n)):
            loss = ((f(k, W, c) - v) ** 2).sum() / 2
            steps.append((rate / K, torch.autograd.grad(loss, (W, c), create_graph=True)))
            reach = torch.clamp(1 / (t % n + 1) + w["tau"][t % n], min=0)
            now = [start - sum(reach * rate * g[i] for rate, g in steps) for i, start in enumerate((W, c))]
            o.append(f(q, *now))
            if t % n == n - 1:
                (W, c), steps = now, []
        return torch.stack(o)

    return over_heads(head, after_norm)


def ttt(n, strongest):
    def head(w, text, h):
        """2407.04620, equation 6: W <- W - sum of eta ∇|k W₀ - v|² / 2; unit keys and queries."""
        W, start, o = torch.zeros(K, V).double(), None, []
        for t, (q, k, v, rate) in enumerate(views(w, text, h, n)):
            if t % n == 0:
                start = W.requires_grad_()
            loss = ((unit(k) @ start - v) ** 2).sum() / 2
            W = W - strongest * rate / n * torch.autograd.grad(loss, start, create_graph=True)[0]
            o.append(unit(q) @ W)
        return torch.stack(o)

    return over_heads(head, after_norm)


def titans(strongest):
    def head(w, text, h):
        """2501.00663, equations 9, 10 and 13, 14, the loss |k M - v|²."""
        q, k, v = convolved(w, "qkv", text, h)
        alpha, eta, theta = (sigmoid(projected(w, name, text, h))[:, 0] for name in ("forget", "momentum", "beta"))
        gate, M, S, o = projected(w, "gate", text, h), torch.zeros(K, V).double(), torch.zeros(K, V).double(), []
        for t in range(len(text)):
            M = M.requires_grad_()
            loss = ((unit(k[t]) @ M - v[t]) ** 2).sum()
            S = eta[t] * S - strongest / 2 * theta[t] * torch.autograd.grad(loss, M, create_graph=True)[0]
            M = (1 - alpha[t]) * M + S
            o.append(rms(unit(q[t]) / math.sqrt(K) @ M, w["norm"]) * silu(gate[t]))
        return torch.stack(o)

    return over_heads(head, lambda w, o: o)


def mesa(w, text, h):
    """2506.05233, section 3: o = q Φ with Φ the least squares fit of all values so far to all keys, by weights that
    fade, and of zeros to the ridge."""
    q, k = convolved(w, "qk", text, h)
    v, ridge = projected(w, "v", text, h), torch.log(1 + torch.exp(w["ridge"][h])) + 0.25
    fade, beta = (sigmoid(projected(w, name, text, h))[:, 0] for name in ("decay", "beta"))
    o = []
    for t in range(len(text)):
        weight = [torch.sqrt(beta[j] * torch.prod(fade[j + 1 : t + 1])) for j in range(t + 1)]
        keys = torch.stack([weight[j] * unit(k[j]) for j in range(t + 1)])
        values = torch.stack([weight[j] * v[j] for j in range(t + 1)])
        fit = torch.linalg.lstsq(
            torch.cat([keys, torch.diag(torch.sqrt(ridge))]), torch.cat([values, torch.zeros(K, V).double()])
        )
        o.append(rms(unit(q[t]) @ fit.solution, w["norm"]))
    return torch.stack(o)


def oracle(lsm, make, **layer):
    sizes = {"width": 6, "heads": H, "key_size": K, "value_size": V} | layer
    return Oracle(lsm, make, sizes, 9, 1e-12, torch.float64)


ORACLES = {
    "gradients of 2407.04620": oracle(
        "ttt_linear",
        lambda: ttt_linear(4),
        value_size=K,
        mini_batch=4,
        seed=2,  # whose weights reach every place
    ),
    "plain gradients of 2407.04620": oracle("ttt", lambda: ttt(4, 1), mini_batch=4),
    "plain gradients of 2407.04620, negative eigenvalues": oracle(
        "ttt", lambda: ttt(2, 2), mini_batch=2, negative_eigenvalues=True
    ),
    "gradients of 2501.00663": oracle("titans", lambda: titans(1)),
    "gradients of 2501.00663, negative eigenvalues": oracle("titans", lambda: titans(2), negative_eigenvalues=True),
    "least squares of 2506.05233": oracle("mesa", lambda: over_heads(mesa, lambda w, o: o)),
}
