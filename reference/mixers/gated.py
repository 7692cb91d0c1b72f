"""Layers whose memory decays channel by channel: GLA and HGRN2."""

import torch
import torch.nn.functional as F
from torch import nn

from reference.mixers.parts import Mixer, Only, constant, head_norm, linear, parameter, wide


class GLA(Mixer):
    """Gated linear attention (2312.06635): g = log sigmoid(W₂ W₁ x + b) / 16, half-width keys, SiLU gate."""

    own = ("k", "v", "decay")

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads // 2, config.width // config.heads)
        self.q, self.k = linear(config.width, self.keys), linear(config.width, self.keys)
        self.v, self.gate = linear(config.width, self.values), linear(config.width, self.values)
        self.decay = nn.Sequential(linear(config.width, 16), linear(16, self.keys, bias=True))
        self.o, self.norm = linear(self.values, config.width), head_norm(self.value_size)

    def inputs(self, x, side, state):
        tokens = {
            "q": self.split(self.q(x)) * self.key_size**-0.5,
            "k": self.split(self.k(x)),
            "v": self.split(self.v(x)),
            "g": self.split(F.logsigmoid(wide(self.decay(x))) / 16),
        }
        return tokens, {}, ()

    def output(self, o, x):
        return self.o(self.ops.norm(o, self.norm, self.eps, self.split(self.gate(x))).flatten(-2))


class HGRN2(Mixer):
    """HGRN2 (2404.07904): the key is what the gate leaves free, 1 - α, with α above a bound that grows with depth."""

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads, config.width // config.heads)
        self.layer = layer
        self.q, self.f = linear(config.width, self.keys), linear(config.width, self.keys)
        self.i, self.o = linear(config.width, self.values), linear(self.values, config.width)
        self.norm = head_norm(self.values)

    @classmethod
    def common(cls, config, layers):
        keys = config.heads * (config.key_size or config.width // config.heads)
        return {"lower_bounds": parameter(layers, keys, start=constant(0.0))}

    def log_gate(self, x, lower_bounds):
        """log(l + (1 - l) sigmoid(W x)), l the bounds' softmax over layers, summed from the second up to this one.

        In logarithms: as a difference of sums l could round to 0 or 1, where its gradient is infinite.
        """
        f = F.logsigmoid(wide(self.f(x)))
        if self.layer == 0:
            return f
        share = wide(lower_bounds).log_softmax(0)
        bound = share[1 : self.layer + 1].logsumexp(0)
        free = torch.cat([share[:1], share[self.layer + 1 :]]).logsumexp(0)
        return torch.logaddexp(bound, free + f)

    def forward(self, x, side, state: Only | None = None):
        tokens = {
            "q": self.split(F.silu(self.q(x))) * self.key_size**-0.5,
            "v": self.split(self.i(x)),
            "g": self.split(self.log_gate(x, side.common["lower_bounds"])),
        }
        o, memory = self.advance(tokens, {}, state and state.memory, side)
        return self.o(self.ops.norm(o.flatten(-2), self.norm, self.eps)), Only(memory)
