"""Gated slot attention: softmax attention over a fixed number of slots, each a key and a value that fade."""

import torch.nn.functional as F

from reference.mixers.parts import Mixer, Only, head_norm, linear, wide


class GSA(Mixer):
    """Gated slot attention (2409.07146): o = softmax(q K) V over `config.slots` slots a head, their keys K, values V.

    A token fades every slot by e^g, g = log sigmoid(W x) / 8, and writes its key and value to it by 1 - e^g. SiLU on
    q, k, v and on o, then one norm over all heads; queries are not scaled.
    """

    def __init__(self, config, layer, layers, ops):
        super().__init__(config, ops, config.width // config.heads, config.width // config.heads)
        self.q, self.k = linear(config.width, self.keys), linear(config.width, self.keys)
        self.v, self.f = linear(config.width, self.values), linear(config.width, self.heads * config.slots)
        self.o, self.norm = linear(self.values, config.width), head_norm(self.values)

    def forward(self, x, side, state: Only | None = None):
        tokens = {name: self.split(F.silu(getattr(self, name)(x))) for name in "qkv"}
        tokens["g"] = self.split(F.logsigmoid(wide(self.f(x))) / 8)
        o, memory = self.advance(tokens, {}, state and state.memory, side)
        return self.o(self.ops.norm(F.silu(o).flatten(-2), self.norm, self.eps)), Only(memory)
