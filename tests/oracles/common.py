"""What oracles are made of: released layers on their plain path, and published formulas written out."""

import importlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.func import functional_call


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------- released layers of transformers


def released(model: str, name: str, kind: str, layer: int = 0, **config):
    """That layer of transformers, on its plain PyTorch path."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    settings = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    oracle = getattr(module, kind)(getattr(settings, name)(**config), layer)
    assert not {"fla", "mamba_ssm", "causal_conv1d"} & {n for n, m in sys.modules.items() if m is not None}
    return oracle.eval()


def called(oracle, weights, inputs, named=None):
    """The oracle with exactly these weights for its own."""
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in oracle.named_parameters()}
    return functional_call(oracle, weights, inputs, named)


def renamed(w, names: str):
    """Our weights under the oracle's names, given as "theirs=ours ..."; convolutions get their middle axis."""
    pairs = (name.split("=") for name in names.split())
    return {theirs: w[ours][:, None] if ours == "conv" else w[ours] for theirs, ours in pairs}


# ---------------------------------------- formulas, token by token and head by head

H, K, V = 3, 4, 6


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, weight):
    return weight * x / torch.sqrt((x * x).mean() + 1e-5)


def unit(x):
    return x / torch.sqrt((x * x).sum() + 1e-6)


class Heads:
    """A token's projections, head by head."""

    def __init__(self, w, x, heads):
        self.w, self.x, self.heads = w, x, heads

    def __call__(self, name, h, x=None):
        rows = self.w[f"{name}.weight"].chunk(self.heads)[h]
        return rows @ (self.x if x is None else x)


def sequence(step, memories):
    """A formula for one head and token, step(w, text, t, M, h) -> (output, memory), as a function of a batch."""

    def run(w, x):
        texts = []
        for text in x.unbind():
            y, M = [], list(memories)
            for t in range(len(text)):
                heads = [step(w, text, t, before, h) for h, before in enumerate(M)]
                M = [after for _, after in heads]
                o = torch.cat([part for part, _ in heads])
                o = rms(o, w["norm"]) if step.__name__ == "hgrn2_step" else o  # its norm is over all heads at once
                y.append(w["o.weight"] @ o)
            texts.append(torch.stack(y))
        return torch.stack(texts)

    return run


# ---------------------------------------- how an oracle is asked


class Oracle(NamedTuple):
    mixer: str  # of the names in tests/test_mixers.py
    make: Callable  # () -> the oracle as a function of our weights and x : b t d
    layer: dict  # our layer's configuration
    t: int = 131
    tolerance: float = 2e-6  # of the largest number, 4 times that for gradients; the classes compute in float32
    dtype: torch.dtype = torch.float32


def classes(lsm, make, value_size, tolerance=2e-6, **layer):
    sizes = {"width": 24, "heads": 3, "key_size": 8, "value_size": value_size}
    return Oracle(lsm, make, sizes | layer, tolerance=tolerance)


def written(lsm, step, columns=V, memories=H, **layer):
    """A formula is compared in float64 on a short text."""
    sizes = {"width": 6, "heads": H, "key_size": K, "value_size": V}
    memories = [torch.zeros(K, columns, dtype=torch.float64)] * memories
    return Oracle(lsm, lambda: sequence(step, memories), sizes | layer, 9, 1e-12, torch.float64)
