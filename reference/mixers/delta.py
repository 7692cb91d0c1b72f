"""Layers that write by the delta rule: DeltaNet, Gated DeltaNet, Kimi Delta Attention.

All three share their front: projections, short convolutions with SiLU, unit queries and keys, beta = sigmoid(W x).
"""

import torch
from torch import Tensor, nn

from reference.local import unit
from reference.mixers.parts import (
    Mixer,
    Taps,
    convolution,
    dt_gate,
    head_norm,
    linear,
    log_uniform,
    parameter,
    time_step,
    wide,
)


class DeltaNet(Mixer):
    """DeltaNet (2406.06484): M <- M + beta kᵀ (v - k M), RMS norm a head, no gate."""

    def __init__(self, config, layer, layers, ops, key_size=None, value_size=None):
        size = config.width // config.heads
        super().__init__(config, ops, key_size or size, value_size or size)
        self.q, self.k = linear(config.width, self.keys), linear(config.width, self.keys)
        self.v, self.beta = linear(config.width, self.values), linear(config.width, self.heads)
        self.conv = convolution(2 * self.keys + self.values, config.convolution)  # of q, k and v, side by side
        self.o, self.norm = linear(self.values, config.width), head_norm(self.value_size)
        self.strongest = 2 if config.negative_eigenvalues else 1

    def decay(self, x) -> dict[str, Tensor]:
        return {}

    def output(self, o, x):
        return self.ops.norm(o, self.norm, self.eps)

    def forward(self, x, side, state: Taps | None = None):
        mixed = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        mixed, taps = self.ops.short_convolution(mixed, self.conv, None, "silu", state and state.taps, side.cu_seqlens)
        q, k, v = (self.split(y) for y in mixed.split([self.keys, self.keys, self.values], -1))
        tokens = {
            "q": unit(q) * self.key_size**-0.5,
            "k": unit(k),
            "v": v,
            "beta": self.strongest * wide(self.beta(x)).sigmoid(),
            **self.decay(x),
        }
        o, memory = self.advance(tokens, {}, state and state.memory, side)
        return self.o(self.output(o, x).flatten(-2)), Taps(memory, taps)


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet (2412.06464): the memory first decays by exp(-exp(A_log) softplus(W x + dt_bias)); SiLU gate.

    Keys have 3/4 of the width, values are twice as wide as keys. Agrees with transformers' Qwen3NextGatedDeltaNet.
    """

    def __init__(self, config, layer, layers, ops):
        size = 3 * config.width // 4 // config.heads
        super().__init__(config, layer, layers, ops, size, 2 * (config.key_size or size))
        self.a, self.gate = linear(config.width, self.heads), linear(config.width, self.values)
        self.A_log, self.dt_bias = (
            parameter(self.heads, start=log_uniform(0, 16)),
            parameter(self.heads, start=time_step),
        )

    def decay(self, x):
        return {"g": dt_gate(self.a(x), self.A_log, self.dt_bias)}

    def output(self, o, x):
        return self.ops.norm(o, self.norm, self.eps, self.split(self.gate(x)))


class KDA(DeltaNet):
    """Kimi Delta Attention (2510.26692): as Gated DeltaNet with a decay for every key channel; sigmoid gate.

    Decay and gate come from projections of rank value_size. Agrees with transformers' KimiLinearDeltaAttention.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, layer, layers, ops)
        rank = self.value_size
        self.a = nn.Sequential(linear(config.width, rank), linear(rank, self.keys))
        self.gate = nn.Sequential(linear(config.width, rank), linear(rank, self.values))
        self.A_log, self.dt_bias = (
            parameter(self.heads, start=log_uniform(1, 16)),
            parameter(self.keys, start=time_step),
        )

    def decay(self, x):
        return {"g": dt_gate(self.split(self.a(x)), self.A_log[:, None], self.dt_bias.unflatten(0, (self.heads, -1)))}

    def output(self, o, x):
        return self.ops.norm(o, self.norm, self.eps, self.split(self.gate(x)), "sigmoid")
