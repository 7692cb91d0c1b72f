"""Titans with a linear memory: what is written follows a momentum of surprises, not the last surprise alone."""

import torch.nn.functional as F

from reference.mixers.delta import DeltaNet
from reference.mixers.parts import constant, linear, wide


class Titans(DeltaNet):
    """Titans' neural memory, linear (2501.00663): S <- η S - θ ∇|k M - v|², M <- (1 - α) M + S; SiLU gate.

    α, η, θ are sigmoids, a number a head and token. The front is DeltaNet's: the paper too has short convolutions,
    SiLU, and unit queries and keys; it prints no starts and no bound for θ. A key seen again and again is learned where
    2 θ < (2 - α)(1 + η), so θ < 1/2 does for every α and η, and that is the bound here (`negative_eigenvalues`: θ < 1).
    As any momentum, it can still be swung up by a key that comes and goes in time with it.
    Left out: memories of more than one layer, gradients taken at a chunk's start, persistent tokens, and the three
    arrangements with attention (memory as context, as gate, as layer): here a hybrid is a pattern of layers.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, layer, layers, ops)
        self.strongest /= 2  # the gradient of a square brings a 2
        self.forget, self.momentum = (linear(config.width, self.heads, bias=True) for _ in range(2))
        self.forget.bias.start = constant(-4.0)  # α = 0.018: a start at 1/2 would forget within a few tokens
        self.gate = linear(config.width, self.values)

    def decay(self, x):
        """log(1 - α) and log η, as logarithms of sigmoids: no difference that rounds to nothing."""
        return {"g": F.logsigmoid(-wide(self.forget(x))), "f": F.logsigmoid(wide(self.momentum(x)))}

    def normed(self, o, x):
        return self.ops.norm(o, self.norm, self.eps, self.split(self.gate(x)))
