"""RWKV6: channel decays, a token shift, and a bonus for the token at hand."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from reference.mixers.parts import Mixer, constant, linear, normal, parameter, uniform, wide
from reference.recurrence import Memory

BRANCHES = ("w", "k", "v", "r", "g")


class Shifted(NamedTuple):
    memory: Memory
    last: Float[Tensor, "b d"]


class RWKV6(Mixer):
    """RWKV6, "Finch" (2404.05892): each branch sees its own, token-dependent mix of x_t and x_{t-1}.

    o = r (M + (u k)ᵀ v), then M <- e^w M + kᵀ v with w = -exp(LoRA(x)); group norm a head; SiLU gate.
    """

    def __init__(self, config, layer, layers, ops, mix_rank=32, decay_rank=64):
        super().__init__(config, ops, config.width // config.heads // 2, config.width // config.heads)
        d = config.width
        self.mix = parameter(d, start=uniform(0, 1))
        self.mix_down = linear(d, len(BRANCHES) * mix_rank)
        self.mix_up = parameter(len(BRANCHES), mix_rank, d, start=normal(0.02))
        self.mix_bias = parameter(len(BRANCHES), d, start=uniform(0, 1))
        self.r, self.k = linear(d, self.keys), linear(d, self.keys)
        self.v, self.g = linear(d, self.values), linear(d, self.values)
        self.w = nn.Sequential(linear(d, decay_rank), nn.Tanh(), linear(decay_rank, self.keys, bias=True))
        self.w[2].bias.start = lambda shape, rng: torch.linspace(-6, -1, self.key_size).repeat(self.heads)
        self.u = parameter(self.heads, self.key_size, start=uniform(0, 1))
        self.norm, self.norm_bias = (
            parameter(self.values, start=constant(1.0)),
            parameter(self.values, start=constant(0.0)),
        )
        self.o = linear(self.values, d)

    def branches(self, x, shifted) -> dict[str, Tensor]:
        step = shifted - x
        hidden = torch.tanh(self.mix_down(x + step * self.mix.to(x.dtype))).unflatten(-1, (len(BRANCHES), -1))
        mix = einsum(hidden, self.mix_up.to(x.dtype), "b t n r, n r d -> b t n d") + self.mix_bias.to(x.dtype)
        return {name: x + step * mix[:, :, i] for i, name in enumerate(BRANCHES)}

    def forward(self, x, side, state: Shifted | None = None):
        shifted, last = self.ops.token_shift(x, state and state.last, side.cu_seqlens)
        mixed = self.branches(x, shifted)
        tokens = {
            "q": self.split(self.r(mixed["r"])),
            "k": self.split(self.k(mixed["k"])),
            "v": self.split(self.v(mixed["v"])),
            "g": self.split(-wide(self.w(mixed["w"])).exp()),
        }
        o, memory = self.advance(tokens, {"u": wide(self.u)}, state and state.memory, side)
        o = F.group_norm(wide(o).flatten(0, 1).flatten(1), self.heads, wide(self.norm), wide(self.norm_bias), self.eps)
        o = o.unflatten(0, x.shape[:2]).to(x.dtype) * F.silu(self.g(mixed["g"]))
        return self.o(o), Shifted(memory, last)
