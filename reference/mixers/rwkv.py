"""RWKV6 and RWKV7: channel decays, a token shift, and a bonus for the token at hand."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from reference.mixers.parts import Mixer, Start, constant, linear, normal, parameter, uniform, wide
from reference.recurrence import Memory

BRANCHES = ("w", "k", "v", "r", "g")


class Shifted(NamedTuple):
    memory: Memory
    last: Float[Tensor, "b d"]


class RWKV6(Mixer):
    """RWKV6, "Finch" (2404.05892): each branch sees its own, token-dependent mix of x_t and x_{t-1}.

    o = r (M + (u k)ᵀ v), then M <- e^w M + kᵀ v with w = -exp(LoRA(x)); group norm a head; SiLU gate.
    """

    narrow = False  # a token and the one before it are mixed

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
        o = group_norm(o, self.norm, self.norm_bias, self.eps)
        return self.o(o * F.silu(self.g(mixed["g"]))), Shifted(memory, last)


def group_norm(o: Float[Tensor, "b t h v"], weight, bias, eps: float) -> Float[Tensor, "b t hv"]:
    """Each head's mean becomes 0 and its variance 1, in float32; then a weight and a bias for every channel."""
    y = F.layer_norm(wide(o), o.shape[-1:], None, None, eps).flatten(-2)
    return (y * wide(weight) + wide(bias)).to(o.dtype)


MIX_POWERS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


class RWKV7(Mixer):
    """RWKV7, "Goose" (2503.14456): M <- (diag(e^w) - (κ̂ ι)ᵀ κ̂) M + k̃ᵀ v, o = r M, scale 1.

    w = -e^-½ sigmoid(LoRA(x)) and ι = sigmoid(LoRA(x)) per channel, κ̂ = ξ k as a unit vector, k̃ = (1 + (ι - 1) α) k.
    Group norm a head; the bonus (r ρ · k̃) v comes after it; gate W₂ sigmoid(W₁ x). The first such layer hands its
    values to all later ones, where v goes the part sigmoid(LoRA(x)) of the way to them. Vectors start as in
    the authors' training code (RWKV-LM, RWKV-v7), matrices as everywhere here.
    """

    narrow = False  # as RWKV6

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads, config.width // config.heads)
        d, size = config.width, self.key_size / 64
        self.gives_values = is_first(config, layer)
        self.needs_values = not self.gives_values
        self.mix = parameter(len(MIX_POWERS), d, start=mixes(1 - layer / layers))
        self.r, self.k = linear(d, self.keys), linear(d, self.keys)
        self.v, self.o = linear(d, self.values), linear(self.values, d)
        self.w = low_rank(d, rank(2.5 * size, d), self.keys, nn.Tanh())
        self.w[2].bias.start = decays(layer / max(layers - 1, 1), self.key_size)
        self.a = low_rank(d, rank(2.5 * size, d), self.keys)
        self.a[2].bias.start = lambda shape, rng: 0.3 * zigzag(*shape, self.key_size) + 0.4 * ramp(*shape) - 0.39
        if self.needs_values:
            self.nu = low_rank(d, rank(1.7 * size, d), self.values)
            self.nu[2].bias.start = lambda shape, rng: 0.93 - 0.4 * ramp(*shape)
        self.g = nn.Sequential(linear(d, rank(5, d)), nn.Sigmoid(), linear(rank(5, d), self.values))
        self.xi = parameter(self.keys, start=lambda shape, rng: 0.76 - 0.1 * ramp(*shape))
        self.alpha = parameter(self.keys, start=constant(1.02))
        self.rho = parameter(self.heads, self.key_size, start=constant(-0.04))
        self.norm = parameter(self.values, start=constant(((layer + 1) / layers) ** 0.7))
        self.norm_bias = parameter(self.values, start=constant(0.0))

    def values_of(self, x, side):
        """v, and what the later layers know: the first one's v."""
        v = self.v(x)
        if self.gives_values:
            return v, side._replace(values=v)
        return torch.lerp(v, side.values.to(v.dtype), self.nu(x).sigmoid()), side

    def forward(self, x, side, state: Shifted | None = None):
        shifted, last = self.ops.token_shift(x, state and state.last, side.cu_seqlens)
        mixed = {name: x + (shifted - x) * mix for name, mix in zip(MIX_POWERS, self.mix.to(x.dtype), strict=True)}
        v, side = self.values_of(mixed["v"], side)
        k, iota = wide(self.k(mixed["k"])), wide(self.a(mixed["a"])).sigmoid()
        erased = F.normalize(self.split(k * wide(self.xi)), dim=-1)
        tokens = {
            "q": self.split(self.r(mixed["r"])),
            "k": self.split(k * (1 + (iota - 1) * wide(self.alpha))).to(x.dtype),
            "v": self.split(v),
            "g": self.split(-math.exp(-0.5) * wide(self.w(mixed["w"])).sigmoid()),
            "a": -erased.to(x.dtype),
            "b": (erased * self.split(iota)).to(x.dtype),
        }
        o, memory = self.advance(tokens, {}, state and state.memory, side)
        bonus = (tokens["q"] * self.rho.to(x.dtype) * tokens["k"]).sum(-1, keepdim=True) * tokens["v"]
        o = group_norm(o, self.norm, self.norm_bias, self.key_size * self.eps) + bonus.flatten(-2)
        return self.o(o * self.g(mixed["g"])), Shifted(memory, last), side, []


def is_first(config, layer: int) -> bool:
    """Whether all layers before this one are softmax attention."""
    return "L" not in [letter for letter in config.letters if letter in "LN"][:layer]


def rank(factor: float, width: int) -> int:
    """Of a low-rank projection: about factor · √width, in steps of 32."""
    return max(32, 32 * round(factor * width**0.5 / 32))


def low_rank(inputs: int, rank: int, outputs: int, activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(linear(inputs, rank), activation or nn.Identity(), linear(rank, outputs, bias=True))


def ramp(n: int) -> Float[Tensor, " n"]:
    """From 0 to 1 over the channels."""
    return torch.arange(n) / max(n - 1, 1)


def zigzag(n: int, size: int) -> Float[Tensor, " n"]:
    """From -1 to 1 over the channels of each head, flat in the middle: y |y| with y even."""
    y = 2 * ramp(size).repeat(n // size) - 1
    return y * y.abs()


def mixes(rest: float) -> Start:
    """1 - (channel / width)^(power · rest) a branch, `rest` the part of the layers that are still to come."""

    def start(shape, rng):
        powers = rest * torch.tensor(list(MIX_POWERS.values()))
        return 1 - (torch.arange(shape[-1]) / shape[-1]) ** powers[:, None]

    return start


def decays(depth: float, size: int) -> Start:
    """The later the channel (of all, and of its head) and the shallower the layer, the faster it forgets."""
    return lambda shape, rng: 6 * ramp(*shape) ** (1 + depth**0.3) + 2.5 * zigzag(*shape, size) - 5.5
