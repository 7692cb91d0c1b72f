"""Softmax attention as a mixer: the N of a hybrid."""

from torch import nn

from reference.attention import Past, rotate
from reference.mixers.parts import linear


class Softmax(nn.Module):
    """Causal softmax attention with rotary positions; `key_heads` heads of keys and values serve all queries.

    As in Llama (2302.13971, 2305.13245). Its state grows with the text: keys and values of every token.
    """

    def __init__(self, config, ops):
        super().__init__()
        self.ops, self.size, self.base = ops, config.width // config.heads, config.rope_base
        keys = (config.key_heads or config.heads) * self.size
        self.q, self.o = linear(config.width, config.width), linear(config.width, config.width)
        self.k, self.v = linear(config.width, keys), linear(config.width, keys)

    def forward(self, x, side, state: Past | None = None):
        q, k, v = (project(x).unflatten(-1, (-1, self.size)) for project in (self.q, self.k, self.v))
        q, k = (rotate(y, side.positions, self.base) for y in (q, k))
        o, past = self.ops.attention(q, k, v, state, side.cu_seqlens)
        return self.o(o.flatten(-2)), past
