"""Layers whose memory keeps, or decays at a rate that no token changes: linear attention, Lightning, Retention."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from reference.attention import rotate
from reference.mixers.parts import Mixer, Only, head_norm, identity, linear, wide

# ------------------------------------------------------------------------------- feature maps of queries and keys


class Product(nn.Module):
    """φ(x) = (W₁ x + b₁) ⊙ (W₂ x + b₂)."""

    def __init__(self, size: int):
        super().__init__()
        self.left, self.right = linear(size, size, bias=True), linear(size, size, bias=True)

    def forward(self, x: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
        return self.left(x) * self.right(x)


class Hedgehog(nn.Module):
    """φ(x) = softmax([2y, -2y]) with y = W x + b, which starts as x (2402.04347)."""

    def __init__(self, size: int):
        super().__init__()
        self.inner = linear(size, size, bias=True)
        self.inner.weight.start = identity

    def forward(self, x: Float[Tensor, "... k"]) -> Float[Tensor, "... f"]:
        y = 2 * wide(self.inner(x))
        return torch.cat([y, -y], -1).softmax(-1).to(x.dtype)


class T2R(nn.Module):
    """φ(x) = relu(W x) (2103.13076)."""

    def __init__(self, size: int):
        super().__init__()
        self.inner = linear(size, size)

    def forward(self, x: Float[Tensor, "... k"]) -> Float[Tensor, "... k"]:
        return F.relu(self.inner(x))


def dpfp(x: Float[Tensor, "... k"], reach: int = 4) -> Float[Tensor, "... f"]:
    """The deterministic, parameter-free projection: r = relu([x, -x]) times r rolled by 1 ... 4 (2102.11174)."""
    r = F.relu(torch.cat([x, -x], -1))
    return torch.cat([r * r.roll(j, -1) for j in range(1, reach + 1)], -1)


# Functions, and modules that are made for a head's size. All heads of a layer share a module; queries and keys have
# one each. As in flash-linear-attention, whose names these are; Linear-MoE's scripts say swish for silu.
FEATURE_MAP: dict[str, Callable] = {
    "elu": lambda x: F.elu(x) + 1,  # in a layer `ops.elu_plus_one`
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "identity": lambda x: x,
    "elementwise_product": Product,
    "hedgehog": Hedgehog,
    "t2r": T2R,
    "dpfp": dpfp,
}
POSITIVE = ("elu", "relu", "hedgehog", "t2r", "dpfp")  # never negative: their weights can be normalised


def feature_map(name: str, size: int) -> Callable[[Tensor], Tensor]:
    """The map of that name for heads of `size` channels. Its output may be larger: it is the row's key size."""
    kind = FEATURE_MAP[name]
    return kind(size) if isinstance(kind, type) else kind


# ------------------------------------------------------------------------------------------------------ the layers


class LinearAttention(Mixer):
    """o = φ(q) M with M the sum of φ(k)ᵀ v (2006.16236), then RMS norm a head, and SiLU gate if `config.gate`.

    The gated form is the layer of Linear-MoE (2503.05447): five projections of d × d. φ is `config.feature_map`.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads, config.width // config.heads)
        self.phi_q, self.phi_k = (feature_map(config.feature_map, self.key_size) for _ in "qk")
        self.q, self.k = linear(config.width, self.keys), linear(config.width, self.keys)
        self.v, self.o = linear(config.width, self.values), linear(self.values, config.width)
        self.gate = linear(config.width, self.values) if config.gate else None
        self.norm = head_norm(self.value_size)

    def features(self, q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t h k"]) -> tuple[Tensor, Tensor]:
        """φ(q) / √f and φ(k), with f features."""
        if self.phi_q is FEATURE_MAP["elu"]:
            return self.ops.elu_plus_one(q, q.shape[-1] ** -0.5), self.ops.elu_plus_one(k)
        q = self.phi_q(q)
        return q * q.shape[-1] ** -0.5, self.phi_k(k)

    def forward(self, x, side, state: Only | None = None):
        q, k = self.features(self.split(self.q(x)), self.split(self.k(x)))
        tokens = {"q": q, "k": k, "v": self.split(self.v(x))}
        o, memory = self.advance(tokens, {}, state and state.memory, side)
        gate = None if self.gate is None else self.split(self.gate(x))
        return self.o(self.ops.norm(o, self.norm, self.eps, gate).flatten(-2)), Only(memory)


class NormalizedLinearAttention(LinearAttention):
    """o = φ(q) M / φ(q)·z with z the sum of φ(k): weights that sum to one. φ must be positive."""

    def __init__(self, config, layer, layers, ops):
        if config.feature_map not in POSITIVE:
            raise ValueError(
                f"a normaliser needs positive features, {config.feature_map!r} has negative ones: "
                f"use one of {', '.join(POSITIVE)}"
            )
        super().__init__(config, layer, layers, ops)


def alibi_slopes(heads: int) -> Tensor:
    """2^(-8 (h+1) / H) for h = 0 ... H-1 (2108.12409)."""
    return 2.0 ** (-8.0 * torch.arange(1, heads + 1, dtype=torch.float64) / heads)


class Lightning(Mixer):
    """MiniMax-01's lightning attention (2501.08313): SiLU on q, k, v, slopes that fade with depth, a sigmoid gate.

    Agrees with transformers' MiniMaxLightningAttention.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads, config.width // config.heads)
        self.qkv = linear(config.width, 2 * self.keys + self.values)  # head after head, each [q | k | v]
        self.gate, self.o = linear(config.width, self.values), linear(self.values, config.width)
        self.norm = head_norm(self.values)
        self.fade = 1 - layer / (layers - 1 + 1e-5) + 1e-5

    def forward(self, x, side, state: Only | None = None):
        parts = F.silu(self.split(self.qkv(x))).split([self.key_size, self.key_size, self.value_size], -1)
        slopes = -alibi_slopes(self.all_heads)[self.first :][: self.heads]
        slopes = slopes.to(x.device, torch.float64 if x.dtype == torch.float64 else torch.float32)
        tokens = dict(zip("qkv", parts, strict=True))
        o, memory = self.advance(tokens, {"g": slopes * self.fade}, state and state.memory, side)
        o = self.ops.norm(o.flatten(-2), self.norm, self.eps, self.gate(x), "sigmoid")
        return self.o(o), Only(memory)


class Retention(Mixer):
    """RetNet's retention (2307.08621): rotary positions, head h forgets 2^(-5-h) of its memory a token, SiLU gate.

    Values are twice as wide as keys. The paper's row normalisers do not survive the norm that follows.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads, 2 * config.width // config.heads)
        self.q, self.k = linear(config.width, self.keys), linear(config.width, self.keys)
        self.v, self.gate = linear(config.width, self.values), linear(config.width, self.values)
        self.o, self.norm, self.base = linear(self.values, config.width), head_norm(self.value_size), config.rope_base
        if self.key_size % 2:
            raise ValueError(f"a key of {self.key_size} channels cannot rotate: Retention's key_size must be even")

    def forward(self, x, side, state: Only | None = None):
        q, k = (rotate(self.split(project(x)), side.positions, self.base) for project in (self.q, self.k))
        h = self.first + torch.arange(self.heads, device=x.device, dtype=torch.float64)
        g = torch.log1p(-(2.0 ** (-5 - h))).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        tokens = {"q": q * self.key_size**-0.5, "k": k, "v": self.split(self.v(x))}
        o, memory = self.advance(tokens, {"g": g}, state and state.memory, side)
        return self.o(self.ops.norm(o, self.norm, self.eps, self.split(self.gate(x))).flatten(-2)), Only(memory)
