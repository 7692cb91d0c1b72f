"""Softmax attention as a mixer, the N of a hybrid: grouped heads, mixtures of them, latents that all share."""

from typing import NamedTuple

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.attention import Past, rotate
from reference.cache import fresh, remember
from reference.mixers.parts import head_norm, linear
from reference.moe import Linears
from reference.routers import Inside, load, route, row, wanted


class Attention(nn.Module):
    """What all kinds have in common: a window, positions, and y = W_o o, or W_o (o ⊙ sigmoid(W_g x)) (2505.06708)."""

    narrow = True  # as `Mixer` says it

    def __init__(self, config, ops, values: int):
        super().__init__()
        self.ops, self.window, self.eps = ops, config.window, config.eps
        self.base, self.channels = config.rope_base, self.turning(config)
        self.o = linear(values, config.width)
        self.gate = linear(config.width, values) if config.attention_gate else None

    @staticmethod
    def may_turn(config) -> int:
        """Channels of a key that may turn with the position."""
        raise NotImplementedError

    @classmethod
    def turning(cls, config) -> int:
        """How many of them do: the first ones, rounded down as in released models."""
        return int(cls.may_turn(config) * config.rope_share)

    def turned(self, x: Float[Tensor, "b t h d"], side) -> Float[Tensor, "b t h d"]:
        return rotate(x, side.positions, self.base, self.channels)

    def output(self, o: Float[Tensor, "b t h e"], x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        o = o.flatten(-2)
        return self.o(o if self.gate is None else o * self.gate(x).sigmoid())


class Softmax(Attention):
    """Causal softmax attention with rotary positions; `key_heads` heads of keys and values serve all queries.

    As in Llama (2302.13971, 2305.13245), and in Mistral (2310.06825) with a window. An RMS norm of every head's query
    and key comes before the rotation, if asked (as in Qwen3); q, k and v have a bias, if asked (as in Qwen2). Its state
    grows with the text: keys and values of every token, or of the last window - 1.
    """

    def __init__(self, config, ops):
        heads, bias = heads_of(config), config.qkv_bias
        super().__init__(config, ops, heads * size_of(config))
        self.size = size_of(config)
        keys = (config.key_heads or heads) * self.size
        self.q = linear(config.width, heads * self.size, bias)
        self.k, self.v = linear(config.width, keys, bias), linear(config.width, keys, bias)
        self.q_norm, self.k_norm = (head_norm(self.size) if config.qk_norm else None for _ in "qk")

    @staticmethod
    def may_turn(config) -> int:
        return size_of(config)

    def forward(self, x, side, state: Past | None = None):
        o, past = self.attended(self.q(x), x, side, state)
        return self.output(o, x), past

    def attended(self, q: Float[Tensor, "b t hd"], x, side, state: Past | None):
        """What these queries, as many heads as there are, find at the keys."""
        q, k, v = (y.unflatten(-1, (-1, self.size)) for y in (q, self.k(x), self.v(x)))
        if self.q_norm is not None:
            q, k = self.ops.norm(q, self.q_norm, self.eps), self.ops.norm(k, self.k_norm, self.eps)
        q, k = self.turned(q, side), self.turned(k, side)
        return self.ops.attention(q, k, v, state, side.cu_seqlens, self.window)


class MixtureOfHeads(Softmax):
    """Mixture of attention heads (2210.05144), as in JetMoE (2404.07413): y = sum over k experts of w_e W_e o_e + bias.

    An expert is a pair of matrices, of queries and of outputs, with all `heads`; keys and values are those of grouped
    attention, and all experts share them: the cache is that of one. A router chooses each token's experts and their
    weights w, a softmax over the logits of the k chosen. Agrees with transformers' JetMoeAttention.
    """

    narrow = False  # a router sees it

    def __init__(self, config, ops):
        for name in ("qkv_bias", "attention_gate"):
            if getattr(config, name):
                raise ValueError(f"a mixture of heads has no {name}: it is True, expected False")
        super().__init__(config, ops)
        experts, self.kept = config.mixer_experts, config.mixer_top_k
        if not 1 <= self.kept <= experts:
            raise ValueError(
                f"mixer_top_k is {self.kept}; it must be at least 1 and at most the {experts} mixer_experts"
            )
        self.groups, values = config.key_heads or heads_of(config), heads_of(config) * self.size
        self.router = nn.Parameter(torch.empty(experts, config.width))
        self.q, self.o = (
            Linears(*sizes, experts, self.kept) for sizes in ((config.width, values), (values, config.width))
        )
        self.bias = nn.Parameter(torch.empty(config.width))

    def forward(self, x, side, state: Past | None = None):
        flat, jet_moe = x.flatten(0, 1), row("jet_moe")
        logits = wanted(flat, self.router)
        routing = route(jet_moe, logits, self.kept)
        q = self.q(repeat(flat, "n d -> n k d", k=self.kept), routing)
        # The heads of all slots that read the same keys stand side by side, as grouped attention wants them.
        q = rearrange(q, "(b t) k (g h) -> b t (g k h)", b=len(x), g=self.groups)
        o, past = self.attended(q, x, side, state)
        o = rearrange(o, "b t (g k r) h -> (b t) k (g r h)", g=self.groups, k=self.kept)
        y = (routing.gate[..., None] * self.o(o, routing)).sum(1).to(x.dtype) + self.bias.to(x.dtype)
        return y.view_as(x), past, side, [Inside(self.kept, load(jet_moe, logits, routing))]


class Latents(NamedTuple):
    """A cache: of every token its latent and the key that all heads share, side by side."""

    latent: Float[Tensor, "b s c"]
    length: Int[Tensor, " b"]


class Latent(Attention):
    """Multi-head latent attention (2405.04434): keys and values of all heads are read from one small vector a token.

        [c | r] = W_down x, c = norm(c), r = rotate(r)      the cache: latent_rank + rope_size numbers a token
        [k_h | v_h] = W_up,h c, k_h = [k_h | r]             for every head
        q_h = W_q,h x, or W_q,h norm(W_q_down x)            whose last rope_size channels turn

    With rope_share 0 nothing turns and r is a plain shared key, as in Kimi Linear (2510.26692). One new token is
    answered in the latent space: q_h · W_k,h c = W_k,hᵀ q_h · c, so no key or value of the past is ever made.
    """

    def __init__(self, config, ops):
        size, value = size_of(config), config.latent_value_size or size_of(config)
        heads = heads_of(config)
        super().__init__(config, ops, heads * value)
        self.heads, self.value, self.rank = heads, value, config.latent_rank or 4 * size
        self.own, self.shared = config.nope_size or size, self.may_turn(config)
        self.scale = (self.own + self.shared) ** -0.5
        self.down, self.norm = linear(config.width, self.rank + self.shared), head_norm(self.rank)
        self.up = linear(self.rank, self.heads * (self.own + self.value))
        self.q = linear(config.query_rank or config.width, self.heads * (self.own + self.shared))
        self.q_down = linear(config.width, config.query_rank) if config.query_rank else None
        self.q_norm = head_norm(config.query_rank) if config.query_rank else None

    @staticmethod
    def may_turn(config) -> int:
        return size_of(config) // 4 * 2 if config.rope_size is None else config.rope_size

    def forward(self, x, side, state: Latents | None = None):
        q, latent = self.queries(x, side), self.latents(x, side)
        one = state is not None and side.cu_seqlens is None and x.shape[1] == 1
        o, state = (self.absorbed if one else self.expanded)(q, latent, state, side.cu_seqlens)
        return self.output(o, x), state

    def queries(self, x, side) -> Float[Tensor, "b t h d"]:
        if self.q_down is not None:
            x = self.ops.norm(self.q_down(x), self.q_norm, self.eps)
        own, shared = self.q(x).unflatten(-1, (self.heads, -1)).split([self.own, self.shared], -1)
        return torch.cat([own, self.turned(shared, side)], -1)

    def latents(self, x, side) -> Float[Tensor, "b t c"]:
        c, shared = self.down(x).split([self.rank, self.shared], -1)
        shared = self.turned(shared[:, :, None], side)[:, :, 0]
        return torch.cat([self.ops.norm(c, self.norm, self.eps), shared], -1)

    def expanded(self, q, latent, state: Latents | None, cu_seqlens=None) -> tuple[Tensor, Latents | None]:
        """Keys and values of every head, of the past too."""
        past = None if state is None else Past(*self.keys_and_values(state.latent), state.length)
        o, past = self.ops.attention(q, *self.keys_and_values(latent), past, cu_seqlens, self.window, self.scale)
        if past is None:  # the sequence is cut over ranks: no cache comes back
            return o, None
        return o, remember(state, fresh(Latents, latent), cu_seqlens, self.window)

    def keys_and_values(self, latent: Float[Tensor, "b s c"]) -> tuple[Tensor, Tensor]:
        """b s h (own + shared) and b s h value."""
        c, shared = latent.split([self.rank, self.shared], -1)
        own, v = self.up(c).unflatten(-1, (self.heads, -1)).split([self.own, self.value], -1)
        return torch.cat([own, shared[:, :, None].expand(*own.shape[:3], -1)], -1), v

    def absorbed(self, q, latent, state: Latents, cu_seqlens=None) -> tuple[Tensor, Latents]:
        """The same in the latent space: one key head, of [c | r], whose values are c, serves all queries."""
        k_up, v_up = self.up.weight.unflatten(0, (self.heads, -1)).split([self.own, self.value], 1)
        own, shared = q.split([self.own, self.shared], -1)
        q = torch.cat([einsum(own, k_up, "b t h d, h d r -> b t h r"), shared], -1)
        k, v = latent[:, :, None], latent[:, :, None, : self.rank]
        past = Past(state.latent[:, :, None], state.latent[:, :, None, : self.rank], state.length)
        o, past = self.ops.attention(q, k, v, past, cu_seqlens, self.window, self.scale)
        return einsum(o, v_up, "b t h r, h e r -> b t h e"), Latents(past.k[:, :, 0], past.length)


def heads_of(config) -> int:
    return config.attention_heads or config.heads


def size_of(config) -> int:
    return config.head_size or config.width // heads_of(config)


ATTENTION = {"grouped": Softmax, "latent": Latent, "mixture": MixtureOfHeads}
