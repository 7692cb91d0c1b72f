"""The layer that Linear-MoE puts around every rule of its table, for the rules that stand in `reference.printed`."""

import math

import torch.nn.functional as F
from torch import nn

from reference.mixers.parts import Mixer, constant, head_norm, linear, normal, parameter, wide
from reference.span import transition

# What a projection becomes, by the name of the row's input; q, k and v stay as they are.
GATE = {
    "g": F.logsigmoid,
    "G": F.logsigmoid,
    "beta": F.sigmoid,
    "alpha": F.sigmoid,
    "dt": F.softplus,
}


class Printed(Mixer):
    """A projection of x for each input of the row, RMS norm a head, SiLU gate (2503.05447, section 2.1).

    Rates A start near -1. Queries and keys of rules that erase are of length one, as their own papers have them.
    """

    fixed: tuple[str, ...] = ()  # inputs that are parameters, the same for every token

    def __init__(self, config, layer, layers, ops):
        size = config.width // config.heads
        super().__init__(config, ops, size, size)
        self.narrow = not self.fixed  # which are as precise as what it sees
        letters = {"h": self.heads, "k": self.key_size, "v": self.value_size}
        self.shapes = {n: [letters[x] for x in shape.split()[2:]] for n, shape in self.row.tokens.items()}
        moving = {n: math.prod(shape) for n, shape in self.shapes.items() if n not in self.fixed}
        self.project = nn.ModuleDict({n: linear(config.width, size) for n, size in moving.items()})
        self.still = nn.ParameterDict({n: parameter(*self.shapes[n], start=normal(1.0)) for n in self.fixed})
        rates = {n: [letters[x] for x in shape.split()] for n, shape in self.row.constants.items()}
        self.rates = nn.ParameterDict({n: parameter(*shape, start=normal(0.1)) for n, shape in rates.items()})
        self.gate, self.o = linear(config.width, self.values), linear(self.values, config.width)
        self.norm, self.erases = head_norm(self.value_size), transition(self.row) == "matrix"

    def inputs(self, x, side, state):
        raw = {n: p(x).unflatten(-1, self.shapes[n]) for n, p in self.project.items()}
        raw |= {n: p.to(x.dtype).expand(*x.shape[:2], *self.shapes[n]) for n, p in self.still.items()}
        tokens = {n: GATE[n](wide(y)) if n in GATE else y for n, y in raw.items()}
        scale = self.key_size**-0.5
        if self.erases:
            tokens |= {"q": self.ops.unit(tokens["q"], scale=scale), "k": self.ops.unit(tokens["k"])}
        else:
            tokens["q"] = tokens["q"] * scale
        return tokens, {n: -wide(p).exp() for n, p in self.rates.items()}, ()

    def output(self, o, x):
        return self.o(self.ops.norm(o, self.norm, self.eps, self.split(self.gate(x))).flatten(-2))


class Stationary(Printed):
    """A state space model that no token changes: what is written, how far time moves and what is read are learned."""

    fixed = ("q", "k", "dt")


class OneDecay(Printed):
    """One decay for all heads and tokens, learned."""

    fixed = ("g",)

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, layer, layers, ops)
        self.still["g"] = parameter(1, start=constant(3.0))
