"""Layers whose memory is a model that learns while it reads (test-time training): TTT-linear, and its plain rule.

Both take all gradients of a mini-batch of tokens where it begins. Positions count within the mini-batch, for the rotary
embedding too, so a text may be cut anywhere: `side.positions` say where in its mini-batch a token stands.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reference.attention import rotate
from reference.mixers.parts import Mixer, Only, constant, head_norm, linear, normal, parameter, wide


def layer_norm(x: Float[Tensor, "... c"], weight, bias, eps: float) -> Float[Tensor, "... c"]:
    """Mean 0 and variance 1 over the channels of all heads; then a weight and a bias for each."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class TTT(Mixer):
    """The delta rule in mini-batches (2407.04620, section 2.4, without the inner norm): M <- M + eta kᵀ (v - k M₀).

    M₀ is the memory where the mini-batch of n tokens began. Queries and keys have length one and
    eta = sigmoid(w x + b) / n, so that those of a mini-batch sum to at most 1: I - Kᵀ diag(eta) K then has its
    eigenvalues in [0, 1], whatever the keys are (`negative_eigenvalues`: a sum of 2, and [-1, 1]). With n = 1 it is the
    delta rule. Around it stand the other parts of TTT-linear.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads, config.width // config.heads)
        if self.key_size % 2:
            raise ValueError(
                f"a key of {self.key_size} channels cannot rotate: {self.row.title}'s key_size must be even"
            )
        self.mini_batch, self.base = config.mini_batch, config.rope_base
        self.q, self.k = linear(config.width, self.keys), linear(config.width, self.keys)
        self.v, self.rate = linear(config.width, self.values), linear(config.width, self.heads, bias=True)
        self.norm, self.norm_bias = head_norm(self.values), parameter(self.values, start=constant(0.0))
        self.layer_norm = layer_norm
        self.o = linear(self.values, config.width)
        self.fastest = (2 if config.negative_eigenvalues else 1) / self.mini_batch

    def views(self, x, place) -> dict[str, Tensor]:
        """The token as the inner model's question, input and target, and how fast it learns from it."""
        q, k = (rotate(self.split(project(x)), place, self.base) for project in (self.q, self.k))
        rate = self.fastest * wide(self.rate(x)).sigmoid()
        return {"q": q, "k": k, "v": self.split(self.v(x)), "beta": rate, "place": place}

    def tokens(self, x, place) -> dict[str, Tensor]:
        seen = self.views(x, place)
        return seen | {name: self.ops.unit(seen[name]) for name in "qk"}

    def constants(self) -> dict[str, Tensor]:
        return {}

    def forward(self, x, side, state: Only | None = None):
        tokens = self.tokens(x, side.positions % self.mini_batch)
        o, memory = self.advance(tokens, self.constants(), state and state.memory, side)
        o = self.layer_norm(wide(o).flatten(-2), wide(self.norm), wide(self.norm_bias), 1e-6)
        return self.o(o.to(x.dtype)), Only(memory)


class TTTLinear(TTT):
    """TTT-linear (2407.04620): the inner model f(x) = x + LN(x W + c) learns f(k) = v by gradient steps, o = f(q).

    Token j of a mini-batch reaches place i with the rate max(1/(i+1) + tau_i, 0) sigmoid(w x_j + b) / V; W, c and the
    inner norm start from what the outer training learns. This is the layer in its Transformer backbone, the default
    of the released code; what that code adds in its Mamba backbone is left out: q and k from one projection and two
    convolutions, a GELU gate, a convolution before the layer. There channels 2i and 2i+1 rotate together, here i and
    i + K/2: the same layer with its channels in another order. V = K, since f maps k to v.
    """

    scattered = True

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, layer, layers, ops)
        h, k = self.heads, self.key_size
        if k != self.value_size:
            raise ValueError(
                f"TTT-linear's inner model maps keys to values: key_size {k} and value_size {self.value_size} "
                "must be equal"
            )
        self.fastest = 1 / self.value_size
        self.W, self.c = parameter(h, k, k, start=normal(0.02)), parameter(h, k, start=constant(0.0))
        self.scale, self.shift = parameter(h, k, start=constant(1.0)), parameter(h, k, start=constant(0.0))
        self.tau = parameter(self.mini_batch, start=constant(0.0))

    def reach(self) -> Float[Tensor, " n"]:
        """How far the tokens so far move the weights that a place of the mini-batch reads: their mean, at the start."""
        tau = wide(self.tau)
        return (1 / torch.arange(1, self.mini_batch + 1, device=tau.device, dtype=tau.dtype) + tau).clamp(min=0)

    def tokens(self, x, place):
        return self.views(x, place) | {"reach": self.reach()[place]}

    def constants(self):
        W = torch.cat([self.W, self.c[:, None]], 1)
        last = self.reach()[-1].expand(self.heads)
        return {"W": wide(W), "last": last, "scale": wide(self.scale), "shift": wide(self.shift)}
