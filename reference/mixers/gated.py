"""Layers whose memory decays channel by channel: GLA, HGRN2, gated fast weights and GateLoop."""

import torch
import torch.nn.functional as F
from torch import nn

from reference.mixers.parts import Mixer, Only, constant, even_gates, head_norm, linear, parameter, wide


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


class GatedFastWeights(Mixer):
    """Decaying fast weights (2210.04243): M <- (αᵀ γ) ⊙ M + kᵀ v, o = q M, α = sigmoid(W x + b), γ = sigmoid(U x + c).

    α has a number for each key channel, γ one for each value channel. Queries and keys have no feature map, outputs no
    norm and no gate: the paper puts the rule in the place of GPT-2's attention, whose scale stays. The biases start as
    the tests of the paper's kernels draw them (github.com/jenni-ai/T2FW): gates even in (0, 1).
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads, config.width // config.heads)
        self.q, self.k = linear(config.width, self.keys), linear(config.width, self.keys)
        self.v, self.o = linear(config.width, self.values), linear(self.values, config.width)
        self.alpha, self.gamma = (linear(config.width, size, bias=True) for size in (self.keys, self.values))
        self.alpha.bias.start = self.gamma.bias.start = even_gates

    def forward(self, x, side, state: Only | None = None):
        tokens = {
            "q": self.split(self.q(x)) * self.key_size**-0.5,
            "k": self.split(self.k(x)),
            "v": self.split(self.v(x)),
            "g": self.split(F.logsigmoid(wide(self.alpha(x)))),
            "f": self.split(F.logsigmoid(wide(self.gamma(x)))),
        }
        o, memory = self.advance(tokens, {}, state and state.memory, side)
        return self.o(o.flatten(-2)), Only(memory)


class GateLoop(Mixer):
    """GateLoop (2311.01927): M <- diag(a) M + kᵀ v, o = Re(q M), a = sigmoid(α) e^{iθ}, α and θ linear in x; SiLU gate.

    This is the form of the paper's text: magnitude and phase have a projection each, queries, keys and values are
    real, and the real part is taken after the read. Released code (of the author's, and others') forms one complex
    number c instead, a = sigmoid(|c|) e^{i arg c}, whose magnitude is never below 1/2 and whose phase jumps at c = 0,
    and some of it keeps the output complex up to the projection back; weights of it do not fit here. The paper's own
    models have a head for every channel (heads = width, keys and values of size 1), where the scale is 1.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads, config.width // config.heads)
        self.q, self.k = linear(config.width, self.keys), linear(config.width, self.keys)
        self.v, self.gate = linear(config.width, self.values), linear(config.width, self.values)
        self.magnitude, self.phase = linear(config.width, self.keys), linear(config.width, self.keys)
        self.o = linear(self.values, config.width)

    def forward(self, x, side, state: Only | None = None):
        tokens = {
            "q": self.split(self.q(x)) * self.key_size**-0.5,
            "k": self.split(self.k(x)),
            "v": self.split(self.v(x)),
            "g": self.split(F.logsigmoid(wide(self.magnitude(x)))),
            "theta": self.split(wide(self.phase(x))),
        }
        o, memory = self.advance(tokens, {}, state and state.memory, side)
        return self.o(o.flatten(-2) * F.silu(self.gate(x))), Only(memory)
