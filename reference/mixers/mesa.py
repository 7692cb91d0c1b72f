"""MesaNet: every read is the least squares solution for all that was written."""

import math

import torch
import torch.nn.functional as F

from reference.mixers.parts import Mixer, Taps, constant, convolution, head_norm, linear, parameter, wide


class Mesa(Mixer):
    """MesaNet's layer (2506.05233): o = q (G + Λ)⁻¹ M with G the sum of beta kᵀ k, M that of beta kᵀ v, both fading.

    g = log sigmoid(W x + b), beta = sigmoid(W x + b); unit queries and keys behind short convolutions with SiLU, the
    values as projected; RMS norm a head, no gate, no scale. Λ = softplus(ridge) + 1/4 for every head and key channel,
    1 at the start. The published kernels solve by 30 steps of conjugate gradients; here the solution is exact.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads, config.width // config.heads)
        self.q, self.k = linear(config.width, self.keys), linear(config.width, self.keys)
        self.v = linear(config.width, self.values)
        self.decay, self.beta = (linear(config.width, self.heads, bias=True) for _ in range(2))
        self.conv = convolution(2 * self.keys, config.convolution)  # of q and k, side by side
        self.ridge = parameter(self.heads, self.key_size, start=constant(math.log(math.expm1(0.75))))
        self.o, self.norm = linear(self.values, config.width), head_norm(self.value_size)

    def forward(self, x, side, state: Taps | None = None):
        mixed = torch.cat([self.q(x), self.k(x)], -1)
        mixed, taps = self.ops.short_convolution(mixed, self.conv, None, "silu", state and state.taps, side.cu_seqlens)
        q, k = (self.ops.unit(self.split(y)) for y in mixed.split(self.keys, -1))
        g, beta = F.logsigmoid(wide(self.decay(x))), wide(self.beta(x)).sigmoid()
        tokens = {"q": q, "k": k, "v": self.split(self.v(x)), "g": g, "beta": beta}
        ridge = F.softplus(wide(self.ridge)) + 0.25
        o, memory = self.advance(tokens, {"ridge": ridge}, state and state.memory, side)
        return self.o(self.ops.norm(o, self.norm, self.eps).flatten(-2)), Taps(memory, taps)
