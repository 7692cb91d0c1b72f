"""Layers whose attention weights are polynomials of q·k: Based and ReBased.

Both are linear attention with a normaliser, over queries and keys of 16 channels. Their features have a size that
grows with the square of that, so the row makes them, token by token or chunk by chunk, and the layer hands over q, k.
"""

import torch.nn.functional as F
from torch import Tensor

from reference.mixers.parts import Mixer, Only, constant, linear, parameter, wide


class Based(Mixer):
    """Based's linear attention (2402.18668): weights 1 + s + s²/2 with s = q·k / √d, over their sum; no gate, no norm.

    16 channels a head give 153 features. A weight is at least 1/2, so what keeps the sum from zero does not matter
    (1e-10 here, up to 1e-6 in released code). The paper's models also have layers of convolutions and of sliding
    windows.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, 16, config.width // config.heads)
        self.q, self.k = linear(config.width, self.keys), linear(config.width, self.keys)
        self.v, self.o = linear(config.width, self.values), linear(self.values, config.width)

    def prepared(self, x: Tensor) -> Tensor:
        """Queries and keys, b t h k, before the row's features."""
        return x

    def forward(self, x, side, state: Only | None = None):
        q, k = (self.prepared(self.split(project(x))) for project in (self.q, self.k))
        o, memory = self.advance({"q": q, "k": k, "v": self.split(self.v(x))}, {}, state and state.memory, side)
        return self.o(o.flatten(-2)), Only(memory)


class Rebased(Based):
    """ReBased (2402.10644): weights (LN(q)·LN(k))² / d over their sum; queries and keys of all heads share one LN.

    16 channels a head give 136 features. Such a weight may be zero, so the sum of weights starts from 1e-5, as in
    released code (from 1e-10, float32's rounding alone could move an output by as much as the output itself).
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, layer, layers, ops)
        self.norm = parameter(self.key_size, start=constant(1.0))
        self.norm_bias = parameter(self.key_size, start=constant(0.0))

    def prepared(self, x):
        return F.layer_norm(wide(x), (self.key_size,), wide(self.norm), wide(self.norm_bias), 1e-5).to(x.dtype)
