"""State space layers whose memory decays by element: S4D, whose rates no token changes, Mamba and Longhorn.

Every channel has its own decays, so all channels are one head: they share the keys and the queries, if there are any.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.mixers.parts import (
    Mixer,
    Only,
    Taps,
    constant,
    convolution,
    head_norm,
    linear,
    normal,
    parameter,
    time_step,
    uniform,
    wide,
)
from reference.moe import Switched, through
from reference.routers import Inside


def harmonics(shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    """0, π, 2π, ... down every column: S4D-Lin (2206.11893, equation 9)."""
    return math.pi * torch.arange(float(shape[0]))[:, None].expand(shape)


class S4D(Mixer):
    """S4D (2206.11893): M <- e^{ΔA} M + x in every mode, y = 2 Re(c (e^{ΔA} - 1) / A M) + D x, then GELU, linear, GLU.

    This is S4 (2111.00396) with a diagonal A; A, c and M are complex, key_size modes a channel. The input's factor
    (e^{ΔA} - 1) / A stands in the read: the memory is linear in its inputs. A layer with as many values as the width,
    as published, has no projection in front.
    """

    scattered = True

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, 32, config.width // config.heads)
        modes, self.heads = (self.key_size, self.values), 1
        self.narrow = self.values != config.width
        self.i = linear(config.width, self.values) if self.narrow else nn.Identity()
        self.rate = parameter(*modes, start=constant(math.log(0.5)))  # log(-Re A)
        self.frequency = parameter(*modes, start=harmonics)  # Im A
        self.dt_log = parameter(self.values, start=uniform(math.log(1e-3), math.log(0.1)))
        self.c = parameter(2, *modes, start=normal(0.5**0.5))  # real and imaginary parts
        self.D = parameter(self.values, start=normal(1.0))
        self.o = linear(self.values, 2 * config.width, bias=True)

    def discrete(self) -> dict[str, Tensor]:
        """The row's constants. e^z - 1 is taken in parts: as a difference it would lose the digits of short steps."""
        A = torch.complex(-wide(self.rate).exp(), wide(self.frequency))
        z = wide(self.dt_log).exp() * A
        g, theta = z.real, z.imag
        gained = torch.complex(g.expm1() * theta.cos() - 2 * (theta / 2).sin().square(), g.exp() * theta.sin())
        read = torch.complex(*wide(self.c)) * gained / A
        return {"g": g[None], "theta": theta[None], "q": read.real[None], "p": read.imag[None]}

    def forward(self, x, side, state: Only | None = None):
        u = self.split(self.i(x))
        o, memory = self.advance({"v": u}, self.discrete(), state and state.memory, side)
        y = F.gelu((o + self.D.to(o.dtype) * u).flatten(-2))
        return F.glu(self.summed(self.o(y)), -1), Only(memory)


# config.state_norm -> the weights of the norms of what Δ, B and C come from: Mamba, Jamba, Falcon Mamba
STATE_NORM = {
    "none": lambda sizes: None,
    "learned": lambda sizes: nn.ParameterList(head_norm(size) for size in sizes),
    "weightless": lambda sizes: [None] * len(sizes),
}


def counting(shape: tuple[int, int], rng: torch.Generator) -> Tensor:
    """log 1, log 2, ... down every column: S4D's real start (2206.11893)."""
    return torch.arange(1.0, shape[0] + 1).log()[:, None].expand(shape)


class Selective(Mixer):
    """The block of Mamba (2312.00752, figure 3): v = Δ x behind a convolution, y = q M + D x, SiLU gate, no norm.

    k, q and, through width / 16 numbers, the step Δ of each channel come from x; a subclass says how Δ does. Of a
    projection in `config.projection_experts` there are several, and each token goes through one (2401.04081).
    """

    takes = ("projection_experts",)

    def __init__(self, config, ops, dt_bias):
        super().__init__(config, ops, 16, 2 * config.width // config.heads)
        rank, self.heads = math.ceil(config.width / 16), 1
        several, d, experts = config.projection_experts or (), config.width, config.mixer_experts

        def projection(name: str, inputs: int, outputs: int) -> nn.Module:
            return Switched(inputs, outputs, experts) if name in several else linear(inputs, outputs)

        self.narrow = together = not {"input", "gate"} & set(several)  # else a router sees it
        self.project = linear(d, 2 * self.values) if together else None  # [x | z]
        self.input, self.gate = (None if together else projection(n, d, self.values) for n in ("input", "gate"))
        self.conv = convolution(self.values, config.convolution)
        self.conv_bias = parameter(self.values, start=constant(0.0))
        self.sizes = [rank, self.key_size, self.key_size]
        self.select = linear(self.values, sum(self.sizes))  # [dt | k | q]
        self.dt_up = parameter(self.values, rank, start=uniform(-(rank**-0.5), rank**-0.5))
        self.dt_bias = parameter(self.values, start=dt_bias)
        self.D = parameter(self.values, start=constant(1.0))
        self.o = projection("output", self.values, d)

    def projected(self, x, loads: list[Inside]) -> tuple[Tensor, Tensor]:
        """x and z of all inner channels."""
        if self.project is not None:
            return self.project(x).chunk(2, -1)
        return through(self.input, x, loads), through(self.gate, x, loads)

    def normed(self, parts: list[Tensor]) -> list[Tensor]:
        return parts

    def forward(self, x, side, state: Taps | None = None):
        loads = []
        u, z = self.projected(x, loads)
        u, taps = self.ops.short_convolution(
            u, self.conv, self.conv_bias, "silu", state and state.taps, side.cu_seqlens
        )
        dt, k, q = self.normed(self.summed(self.select(u)).split(self.sizes, -1))
        dt, constants = self.steps(wide(F.linear(dt, self.dt_up.to(dt.dtype))) + wide(self.dt_bias), k)
        tokens = {"q": q, "k": k, "v": (dt * wide(u)).to(u.dtype), "dt": dt}
        tokens = {name: self.split(y) for name, y in tokens.items()}
        o, memory = self.advance(tokens, constants, state and state.memory, side)
        o = o.flatten(-2) + self.D.to(o.dtype) * u
        return through(self.o, o * F.silu(z), loads, self.summed), Taps(memory, taps), side, loads


class Mamba(Selective):
    """Mamba (2312.00752): each element fades by e^{AΔ}, A = -exp(A_log), Δ = softplus(W₂ W₁ x + dt_bias).

    With RMS norms of W₁ x, k (its B) and q (its C) by `config.state_norm`: learned as in Jamba (2403.19887), weightless
    as in Falcon Mamba (2410.05355). Agrees with transformers' MambaMixer, JambaMambaMixer and FalconMambaMixer.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, time_step)
        self.norms = STATE_NORM[config.state_norm](self.sizes)
        self.A_log = parameter(self.key_size, self.values, start=counting)

    def normed(self, parts):
        if self.norms is None:
            return parts
        return [self.ops.norm(y, weight, self.eps) for y, weight in zip(parts, self.norms, strict=True)]

    def steps(self, dt, k):
        return F.softplus(dt), {"A": -wide(self.A_log).exp()[None]}


class Longhorn(Selective):
    """Longhorn (2407.14207, section 3): each element fades by 1 - Δ k², Δ = β / (1 + β |k|²), β = sigmoid(W₂ W₁ x + b).

    The published, diagonal form of the implicit step of online regression.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, constant(0.0))

    def steps(self, dt, k):
        beta = dt.sigmoid()
        return beta / (1 + beta * wide(k).square().sum(-1, keepdim=True)), {}
