"""Mamba2: a state space layer whose memory decays by one number a head and token."""

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from reference.mixers.parts import (
    Mixer,
    Taps,
    constant,
    convolution,
    head_norm,
    linear,
    log_uniform,
    parameter,
    time_step,
    wide,
)


class Mamba2(Mixer):
    """Mamba2 (2405.21060): k = B, q = C, v = Δ x, g = -exp(A_log) Δ, y = C M + D x, gate before the norm.

    Δ = softplus(dt + dt_bias), within `config.step_limits`. Of `config.state_groups` groups of heads each shares its B
    and C, and is normed by itself. Agrees with transformers' Mamba2Mixer, NemotronHMamba2Mixer and
    GraniteMoeHybridMambaLayer.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, 128, 2 * config.width // config.heads)
        self.groups, self.limits = config.state_groups, config.step_limits
        if self.heads % self.groups:
            raise ValueError(f"{self.heads} heads cannot share {self.groups} state_groups: heads must be a multiple")
        shared = self.groups * self.key_size
        self.parts = [self.values, shared, shared]  # x, B, C go through one convolution
        mixed = sum(self.parts)
        self.sizes = [self.values, mixed, self.heads]
        self.project = linear(config.width, sum(self.sizes))  # [z | x B C | dt]
        self.conv = convolution(mixed, config.convolution)
        self.conv_bias = parameter(mixed, start=constant(0.0))
        self.A_log = parameter(self.heads, start=log_uniform(1, 16))
        self.dt_bias = parameter(self.heads, start=time_step)
        self.D = parameter(self.heads, start=constant(1.0))
        self.norm, self.o = head_norm(self.values), linear(self.values, config.width)

    def for_heads(self, x: Float[Tensor, "b t gk"]) -> Float[Tensor, "b t h k"]:
        return repeat(x, "b t (g k) -> b t (g r) k", g=self.groups, r=self.heads // self.groups)

    def normed(self, y: Float[Tensor, "b t hv"]) -> Float[Tensor, "b t hv"]:
        if self.groups == 1:
            return self.ops.norm(y, self.norm, self.eps)
        return self.ops.norm(y.unflatten(-1, (self.groups, -1)), None, self.eps).flatten(-2) * self.norm.to(y.dtype)

    def more(self, x, side) -> dict[str, Tensor]:
        """What else the row asks for."""
        return {}

    def forward(self, x, side, state: Taps | None = None):
        z, mixed, dt = self.project(x).split(self.sizes, -1)
        mixed, taps = self.ops.short_convolution(
            mixed, self.conv, self.conv_bias, "silu", state and state.taps, side.cu_seqlens
        )
        u, B, C = mixed.split(self.parts, -1)
        u, dt = self.split(u), F.softplus(wide(dt) + wide(self.dt_bias)).clamp(*self.limits)
        tokens = {
            "q": self.for_heads(C),
            "k": self.for_heads(B),
            "v": (u * dt[..., None]).to(u.dtype),  # dt is wide, and so is the product
            "g": -wide(self.A_log).exp() * dt,
            **self.more(x, side),
        }
        o, memory = self.advance(tokens, {}, state and state.memory, side)
        o = torch.addcmul(o, self.D.to(o.dtype)[:, None], u).flatten(-2)
        return self.o(self.normed(o * F.silu(z))), Taps(memory, taps)


class LogLinearMamba2(Mamba2):
    """Log-linear Mamba2 (2506.04761): memories of 1, 2, 4, ... tokens, read with weights softplus(L ⊙ W x).

    Level l holds the tokens whose position differs from this one's in l low bits. So many levels as `config.levels`,
    15 as published, serve 2^14 tokens apart; what is older stays in the last.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, layer, layers, ops)
        self.weigh = linear(config.width, self.heads * config.levels)
        self.L = parameter(config.levels, start=constant(1.0))

    def more(self, x, side):
        weight = F.softplus(wide(self.L) * wide(self.weigh(x)).unflatten(-1, (self.heads, -1)))
        return {"weight": weight, "place": side.positions}
