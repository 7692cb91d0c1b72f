"""Inputs for every row of the table in a stable range, and the error budget by which paths are compared."""

import torch
import torch.nn.functional as F

from reference.lsm import LSM
from reference.recurrence import counted, empty, momentum


def head(lsm, key_size=4, value_size=6):
    """The sizes of a head of that row's layer: values of another size than keys, where the row allows it."""
    return {"key_size": key_size, "value_size": key_size if LSM[lsm].tokens["v"] == "b t h k" else value_size}


def make(name, b=2, t=13, h=2, k=4, v=5, seed=0, dtype=torch.float64, strength=1.0):
    """(row, tokens, constants): unit keys, log-sigmoid gates times `strength`, write strengths in (0, 2)."""
    row, rng = LSM[name], torch.Generator().manual_seed(seed)
    sizes = {"b": b, "t": t, "h": h, "k": k, "v": v, "m": 3, "r": k + 1}

    def draw(letters):
        return torch.randn([sizes[letter] for letter in letters.split()], generator=rng, dtype=torch.float64)

    shape = {
        "k": lambda x: F.normalize(x, dim=-1),
        "g": lambda x: F.logsigmoid(x) * strength,
        "f": lambda x: F.logsigmoid(x) * strength,
        "beta": lambda x: 2 * x.sigmoid(),
        "dt": lambda x: F.softplus(x) * strength,
        "A": lambda x: -x.exp(),
        "a": lambda x: -0.7 * F.normalize(x, dim=-1),
        "b": lambda x: 0.7 * F.normalize(x, dim=-1),
        "ridge": lambda x: x.exp(),
        "place": lambda x: (torch.arange(x.shape[1]) + 3 * torch.arange(1, 1 + len(x))[:, None]) % 7,
    }

    def drawn(shapes):
        made = {n: shape.get(n, lambda x: x)(draw(s)) for n, s in shapes.items()}
        return {n: x.to(dtype) if x.is_floating_point() else x for n, x in made.items()}

    tokens, constants = drawn(row.tokens), drawn(row.constants)
    if row.update is momentum:  # whose step is twice beta, again and again
        tokens["beta"] = tokens["beta"] / 8
    if row.update is counted:  # a normaliser divides by the sum of the weights: they must be positive
        tokens |= {n: tokens[n].abs() + 0.1 for n in ("q", "k")}
    return row, tokens, constants


def start(name, row, tokens, constants, seed=1, n=None):
    """A memory to start from."""
    zeros = empty(row, tokens, constants, n)
    M = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(zeros.dtype)
    return M.abs() if row.update is counted else M


def leaves(*groups):
    """The tensors of dicts (and tensors) as leaves that want gradients, in place of the originals."""
    out = []
    for group in groups:
        if isinstance(group, dict):
            for name, x in group.items():
                if not x.is_floating_point():  # a place in a mini-batch
                    continue
                group[name] = x.detach().clone().requires_grad_()
                out.append(group[name])
    return out


def pieces(x, start, stop):
    return {name: y[:, start:stop] for name, y in x.items()}


def assert_within_budget(got, plain, exact, what=""):
    """`got` may be twice as far from `exact` (float64) as `plain`, the reference in the same dtype, plus a rounding."""

    def error(y):
        return (y.double() - exact).abs().max().item() if exact.numel() else 0.0

    scale = exact.abs().max().item() if exact.numel() else 0.0
    budget = 2 * error(plain) + torch.finfo(got.dtype).eps * scale
    assert torch.isfinite(got).all(), f"{what}: not finite"
    assert error(got) <= budget, f"{what}: error {error(got):.1e} > budget {budget:.1e}"
