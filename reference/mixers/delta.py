"""Layers that write by the delta rule: DeltaNet, Gated DeltaNet and what came of it.

All share their front: projections, short convolutions with SiLU, unit queries and keys, beta = sigmoid(W x).
"""

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

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


class DeltaNet(Mixer):
    """DeltaNet (2406.06484): M <- M + beta kᵀ (v - k M), RMS norm a head, no gate.

    A token may take several such steps, each with its own k, v and beta.
    """

    state, own = Taps, ("k", "v", "beta")
    negative_eigenvalues = False  # as published, unless the configuration says

    def __init__(self, config, layer, layers, ops, key_size=None, value_size=None, steps=1):
        size = config.width // config.heads
        super().__init__(config, ops, key_size or size, value_size or size)
        self.steps, self.parts = steps, [self.keys, steps * self.keys, steps * self.values]
        self.q, self.k, self.v = (linear(config.width, part) for part in self.parts)
        self.beta = linear(config.width, steps * self.value_heads)
        self.conv = convolution(sum(self.parts), config.convolution)  # of q, k and v, side by side
        self.o, self.norm = linear(self.values, config.width), head_norm(self.value_size)
        given = config.negative_eigenvalues
        self.strongest = 2 if (self.negative_eigenvalues if given is None else given) else 1

    def addresses(self, q, k) -> dict[str, Tensor]:
        """Where in the memory is read and written."""
        return {"q": self.ops.unit(q, scale=self.key_size**-0.5), "k": self.ops.unit(k)}

    def decay(self, x) -> dict[str, Tensor]:
        return {}

    def normed(self, o, x):
        return self.ops.norm(o, self.norm, self.eps)

    def inputs(self, x, side, state):
        mixed = torch.cat([self.q(x), self.k(x), self.v(x)], -1)
        mixed, taps = self.ops.short_convolution(mixed, self.conv, None, "silu", state and state.taps, side.cu_seqlens)
        q, k, v = mixed.split(self.parts, -1)
        k = rearrange(k, "b t (n h k) -> b (t n) h k", n=self.steps, h=self.heads)
        v = rearrange(v, "b t (n h v) -> b (t n) h v", n=self.steps, h=self.value_heads)
        beta = rearrange(wide(self.beta(x)).sigmoid(), "b t (n h) -> b (t n) h", n=self.steps)
        shared = self.value_heads // self.heads
        tokens = {
            **{n: repeat(y, "b t h k -> b t (h r) k", r=shared) for n, y in self.addresses(self.split(q), k).items()},
            "v": v,
            "beta": self.strongest * beta,
            **self.decay(x),
        }
        return tokens, {}, (taps,)

    def output(self, o, x):
        return self.o(self.normed(o, x).flatten(-2))


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet (2412.06464): the memory first decays by exp(-exp(A_log) softplus(W x + dt_bias)); SiLU gate.

    Keys have 3/4 of the width, a head's values are twice as wide as its keys. Agrees with transformers'
    Qwen3NextGatedDeltaNet.
    """

    own, takes = (*DeltaNet.own, "a"), ("value_heads",)

    def __init__(self, config, layer, layers, ops, steps=1):
        size = 3 * config.width // 4 // config.heads
        super().__init__(config, layer, layers, ops, size, 2 * (config.key_size or size), steps)
        self.a, self.gate = linear(config.width, self.value_heads), linear(config.width, self.values)
        self.A_log, self.dt_bias = (
            parameter(self.value_heads, start=log_uniform(0, 16)),
            parameter(self.value_heads, start=time_step),
        )

    def decay(self, x):
        return {"g": dt_gate(self.a(x), self.A_log, self.dt_bias)}

    def normed(self, o, x, activation="silu"):
        return self.ops.norm(o, self.norm, self.eps, self.split_values(self.gate(x)), activation)


class Comba(GatedDeltaNet):
    """Comba (2506.02475): the write is the difference to what p = sigmoid(c) k finds before the decay; the query is
    corrected to q - D p; sigmoid gate.

    As in the released layer q - D p, k and p all become unit vectors: c then acts through the query alone.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, layer, layers, ops)
        self.c, self.D = parameter(self.heads, start=constant(1.0)), parameter(self.heads, start=constant(1.0))

    def addresses(self, q, k):
        p = wide(self.c).sigmoid().to(k.dtype)[:, None] * k
        return {**super().addresses(q - self.D.to(q.dtype)[:, None] * p, k), "a": self.ops.unit(p)}

    def normed(self, o, x):
        return super().normed(o, x, "sigmoid")


class GatedDeltaProduct(GatedDeltaNet):
    """Gated DeltaProduct (2502.10297): `config.delta_steps` delta steps a token, the decay before the first, the read
    after the last. Writes are twice as strong unless the configuration says otherwise.
    """

    negative_eigenvalues = True

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, layer, layers, ops, config.delta_steps)

    def advance(self, tokens, constants, memory, side):
        """The row over n times as many tokens, of which only the last of each n asks."""
        more = self.steps - 1
        q = F.pad(tokens["q"][:, :, None], (0, 0, 0, 0, more, 0)).flatten(1, 2)
        g = F.pad(tokens["g"][:, :, None], (0, 0, 0, more)).flatten(1, 2)
        if side.cu_seqlens is not None:
            side = side._replace(cu_seqlens=side.cu_seqlens * self.steps)
        o, memory = super().advance(tokens | {"q": q, "g": g}, constants, memory, side, self.steps)
        return o[:, more :: self.steps], memory


class KDA(DeltaNet):
    """Kimi Delta Attention (2510.26692): as Gated DeltaNet with a decay for every key channel; sigmoid gate.

    Decay and gate come from projections of rank value_size. Agrees with transformers' KimiLinearDeltaAttention, and
    with `config.gate_floor` with its Glm5NextTextLinearAttention.
    """

    takes = ("value_heads", "gate_floor")

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, layer, layers, ops)
        rank, channels, self.floor = self.value_size, self.value_heads * self.key_size, config.gate_floor
        self.a = nn.Sequential(linear(config.width, rank), linear(rank, channels))
        self.gate = nn.Sequential(linear(config.width, rank), linear(rank, self.values))
        self.A_log, self.dt_bias = (
            parameter(self.value_heads, start=log_uniform(1, 16) if self.floor is None else constant(0.0)),
            parameter(channels, start=time_step),
        )

    def decay(self, x):
        u, bias = self.split_values(self.a(x)), self.dt_bias.unflatten(0, (self.value_heads, -1))
        return {"g": dt_gate(u, self.A_log[:, None], bias, self.floor)}

    def normed(self, o, x):
        return self.ops.norm(o, self.norm, self.eps, self.split_values(self.gate(x)), "sigmoid")
