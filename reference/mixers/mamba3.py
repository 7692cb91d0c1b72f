"""Mamba3: a state space layer that weighs both ends of every step, and whose keys and queries turn as it goes."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reference.mixers.parts import Mixer, constant, head_norm, linear, parameter, time_step, wide
from reference.recurrence import Memory


class Waiting(NamedTuple):
    """A memory, the token that is still to be written to it, and the angle up to there."""

    memory: Memory
    last: Float[Tensor, "b hkv1"]  # of each head: key, value, and the part of its weight that is known
    angle: Float[Tensor, "b hr"]  # float64


class Mamba3(Mixer):
    """Mamba3 (2603.15569), one input and one output a head (SISO): with α = e^{ΔA} and λ = sigmoid(W x),

        M_t = α_t M_{t-1} + (1 - λ_t) Δ_t α_t k_{t-1}ᵀ v_{t-1} + λ_t Δ_t k_tᵀ v_t,   y = q M + D x, SiLU gate, no norm.

    Δ = softplus(W x + dt_bias), A = -softplus(W x), at most -1e-4; k, q = RMSNorm(B), RMSNorm(C), which all heads
    share, plus a bias a head that starts as ones. Then pairs of neighbours among the first half of their channels turn
    by the sum of Δ π tanh(W x) so far: a complex decay. No convolution. Agrees in pairs and order of projections with
    the authors' released layer (state-spaces/mamba); its form of several inputs and outputs (MIMO) is not here.

    The row is Mamba2's, one token late. A token's key counts (λ_t Δ_t + (1 - λ_{t+1}) Δ_{t+1}) once the next token is
    known; then it is written, as that token's key and value, faded by α_{t+1}. Until then the state holds it, and its
    own output reads it beside the memory: λ_t Δ_t (q_t · k_t) v_t.
    """

    narrow = False  # queries and keys are as precise as what it sees

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, 128, 2 * config.width // config.heads)
        self.turns = self.key_size // 4
        if not self.turns:
            raise ValueError(
                f"half a key of {self.key_size} channels cannot rotate: {self.row.title}'s key_size must be at least 4"
            )
        # [z | x | B | C | Δ | A | λ | angles]
        self.sizes = [*[self.values] * 2, *[self.key_size] * 2, *[self.heads] * 3, self.turns]
        self.project = linear(config.width, sum(self.sizes))
        self.B_norm, self.C_norm = head_norm(self.key_size), head_norm(self.key_size)
        self.B_bias, self.C_bias = (parameter(self.heads, self.key_size, start=constant(1.0)) for _ in "BC")
        self.dt_bias = parameter(self.heads, start=time_step)
        self.D = parameter(self.heads, start=constant(1.0))
        self.o = linear(self.values, config.width)

    def address(self, x, norm, bias, angle) -> Float[Tensor, "b t h k"]:
        """A key or query, at least float32: normed, moved, turned."""
        return turned(wide(self.ops.norm(x, norm, self.eps))[:, :, None] + wide(bias), angle)

    def forward(self, x, side, state: Waiting | None = None):
        z, u, B, C, dt, rate, share, turn = self.project(x).split(self.sizes, -1)
        dt = F.softplus(wide(dt) + wide(self.dt_bias))
        g = -F.softplus(wide(rate)).clamp(min=1e-4) * dt
        now, then = dt * wide(share).sigmoid(), dt * wide(-share).sigmoid()  # of this token, and of the one before
        step = dt[..., None] * math.pi * wide(turn).tanh()[:, :, None]
        angle, total = self.ops.running_sum(step.flatten(-2), state and state.angle, side.cu_seqlens)
        k, q = (
            self.address(y, *how, self.split(angle))
            for y, how in ((B, (self.B_norm, self.B_bias)), (C, (self.C_norm, self.C_bias)))
        )
        v = self.split(u)
        whole = torch.cat([k, wide(v), now[..., None]], -1)
        late, last = self.ops.token_shift(whole.flatten(-2), state and state.last, side.cu_seqlens)
        late_k, late_v, late_now = self.split(late).split([self.key_size, self.value_size, 1], -1)
        weight = g.exp()[..., None] * (late_now + then[..., None])
        tokens = {"q": q.to(x.dtype), "k": (weight * late_k).to(x.dtype), "v": late_v.to(x.dtype), "g": g}
        o, memory = self.advance(tokens, {}, state and state.memory, side)
        own = now * (q * k).sum(-1) + wide(self.D)
        o = (o + own[..., None] * v).to(x.dtype).flatten(-2)
        return self.o(o * F.silu(z)), Waiting(memory, last, total)


def turned(x: Float[Tensor, "b t h k"], angle: Float[Tensor, "b t h r"]) -> Float[Tensor, "b t h k"]:
    """Channels 2i and 2i + 1 as a complex number, times e^{i angle_i}; those behind the last angle stay."""
    c, s = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    turning, rest = x.tensor_split([2 * angle.shape[-1]], -1)
    a, b = turning.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.cat([torch.stack([c * a - s * b, s * a + c * b], -1).flatten(-2), rest], -1)
