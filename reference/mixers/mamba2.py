"""Mamba2: a state space layer whose memory decays by one number a head and token."""

import torch.nn.functional as F
from einops import repeat

from reference.mixers.parts import (
    Mixer,
    Taps,
    constant,
    convolution,
    dt_gate,
    head_norm,
    linear,
    log_uniform,
    parameter,
    time_step,
    wide,
)


class Mamba2(Mixer):
    """Mamba2 (2405.21060): k = B, q = C, v = Δ x, g = -exp(A_log) Δ, y = C M + D x, gate before the norm.

    Δ = softplus(dt + dt_bias). B and C are shared by all heads. Agrees with transformers' Mamba2Mixer.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, 128, 2 * config.width // config.heads)
        mixed = self.values + 2 * self.key_size  # x, B, C go through one convolution
        self.sizes = [self.values, mixed, self.heads]
        self.project = linear(config.width, sum(self.sizes))  # [z | x B C | dt]
        self.conv = convolution(mixed, config.convolution)
        self.conv_bias = parameter(mixed, start=constant(0.0))
        self.A_log = parameter(self.heads, start=log_uniform(1, 16))
        self.dt_bias = parameter(self.heads, start=time_step)
        self.D = parameter(self.heads, start=constant(1.0))
        self.norm, self.o = head_norm(self.values), linear(self.values, config.width)

    def forward(self, x, side, state: Taps | None = None):
        z, mixed, dt = self.project(x).split(self.sizes, -1)
        mixed, taps = self.ops.short_convolution(
            mixed, self.conv, self.conv_bias, "silu", state and state.taps, side.cu_seqlens
        )
        u, B, C = mixed.split([self.values, self.key_size, self.key_size], -1)
        u = self.split(u)
        tokens = {
            "q": repeat(C, "b t k -> b t h k", h=self.heads),
            "k": repeat(B, "b t k -> b t h k", h=self.heads),
            "v": (wide(u) * F.softplus(wide(dt) + wide(self.dt_bias))[..., None]).to(u.dtype),
            "g": dt_gate(dt, self.A_log, self.dt_bias),
        }
        o, memory = self.advance(tokens, {}, state and state.memory, side)
        o = (o + self.D.to(o.dtype)[:, None] * u).flatten(-2)
        return self.o(self.ops.norm(o * F.silu(z), self.norm, self.eps)), Taps(memory, taps)
