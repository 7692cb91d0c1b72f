"""State space layers whose memory decays by element: Mamba.

Every channel has its own decays, so all channels are one head: they share the keys and the queries, if there are any.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.mixers.parts import (
    Mixer,
    Taps,
    constant,
    convolution,
    head_norm,
    linear,
    parameter,
    time_step,
    uniform,
    wide,
)

# config.state_norm -> the weights of the norms of what Δ, B and C come from: Mamba, Jamba, Falcon Mamba
STATE_NORM = {
    "none": lambda sizes: None,
    "learned": lambda sizes: nn.ParameterList(head_norm(size) for size in sizes),
    "weightless": lambda sizes: [None] * len(sizes),
}


def counting(shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    """log 1, log 2, ... down every column: S4D's real start (2206.11893)."""
    return torch.arange(1.0, shape[0] + 1).log()[:, None].expand(shape)


class Mamba(Mixer):
    """Mamba (2312.00752): k = B, q = C, v = Δ x, each element fades by e^{AΔ}, y = C M + D x, SiLU gate, no norm.

    A = -exp(A_log); Δ = softplus(W₂ W₁ x + dt_bias), a number a channel, through width / 16 numbers. With RMS norms of
    W₁ x, B and C by `config.state_norm`: learned as in Jamba (2403.19887), weightless as in Falcon Mamba (2410.05355).
    Agrees with transformers' MambaMixer, JambaMambaMixer and FalconMambaMixer.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, 16, 2 * config.width // config.heads)
        rank, self.heads = math.ceil(config.width / 16), 1
        self.project = linear(config.width, 2 * self.values)  # [x | z]
        self.conv = convolution(self.values, config.convolution)
        self.conv_bias = parameter(self.values, start=constant(0.0))
        self.sizes = [rank, self.key_size, self.key_size]
        self.select = linear(self.values, sum(self.sizes))  # [dt | B | C]
        self.norms = STATE_NORM[config.state_norm](self.sizes)
        self.dt_up = parameter(self.values, rank, start=uniform(-(rank**-0.5), rank**-0.5))
        self.dt_bias = parameter(self.values, start=time_step)
        self.A_log = parameter(self.key_size, self.values, start=counting)
        self.D = parameter(self.values, start=constant(1.0))
        self.o = linear(self.values, config.width)

    def selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Δ, B and C of these channels."""
        parts = self.select(u).split(self.sizes, -1)
        if self.norms is not None:
            parts = [self.ops.norm(y, weight, self.eps) for y, weight in zip(parts, self.norms, strict=True)]
        dt, B, C = parts
        return F.softplus(wide(F.linear(dt, self.dt_up.to(dt.dtype))) + wide(self.dt_bias)), B, C

    def forward(self, x, side, state: Taps | None = None):
        u, z = self.project(x).chunk(2, -1)
        u, taps = self.ops.short_convolution(
            u, self.conv, self.conv_bias, "silu", state and state.taps, side.cu_seqlens
        )
        dt, B, C = self.selected(u)
        tokens = {"q": C, "k": B, "v": (dt * wide(u)).to(u.dtype), "dt": dt}
        tokens, A = {name: self.split(y) for name, y in tokens.items()}, -wide(self.A_log).exp()
        o, memory = self.advance(tokens, {"A": A[None]}, state and state.memory, side)
        o = o.flatten(-2) + self.D.to(o.dtype) * u
        return self.o(o * F.silu(z)), Taps(memory, taps)
