"""Mixture of experts: a feed-forward layer of which each token uses a few parts.

    y_n = sum_e G_ne expert_e(x_n)  (+ shared(x_n))      expert_e(x) = W2_e (silu(A_e x) * B_e x),  W13_e = [A_e; B_e]

The gates G come from a router (`reference.routers`); here are the experts. Only the pairs (token, expert) that G keeps
are computed: sorted by expert, so that each expert multiplies all of its rows at once.

    b batch   t time   n = b t tokens   d width   e experts   k experts a token visits   f hidden width of an expert
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.routers import Load, Routing, check, load, route, row, wanted

# ------------------------------------------------------------------------------------------------- the functions


def swiglu(x: Float[Tensor, "... d"], w13: Float[Tensor, "2*f d"], w2: Float[Tensor, "d f"]) -> Float[Tensor, "... d"]:
    """W2 (silu(A x) * B x), with A the first f rows of w13 and B the last f (2002.05202). All of one dtype."""
    gate, up = F.linear(x, w13).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, w2)


def experts(
    x: Float[Tensor, "n d"], routing: Routing, w13: Float[Tensor, "e 2*f d"], w2: Float[Tensor, "e d f"]
) -> Float[Tensor, "n d"]:
    """y_n = sum over n's slots of gate * swiglu_expert(x_n), one product an expert over all of its rows.

    Pairs that are not kept are not computed and add 0. The gates multiply in their own dtype (float32 at least), y has
    x's. Every weight gets a gradient, zeros where no token came. Deterministic, backward too: tokens are copied to
    their slots, moved by a permutation, and each gathers its own, so no two pairs ever add into one place.
    """
    order, lengths = by_expert(routing, len(w13))
    slots = repeat(x, "n d -> (n k) d", k=routing.index.shape[1])
    # index_select: its backward took 0.16 ms on two cores where that of slots[order] took 1.5 (4096 rows of 128).
    *rows, dropped = slots.index_select(0, order).split(lengths)
    # Expert 0 runs even on no rows, which keeps the weights in the graph when nobody visits anyone.
    y = [
        swiglu(mine, w13_e, w2_e)
        for e, (mine, w13_e, w2_e) in enumerate(zip(rows, w13.unbind(), w2.unbind(), strict=True))
        if len(mine) or e == 0
    ]
    y = torch.cat([*y, torch.zeros_like(dropped)]).index_select(0, order.argsort())
    return combine(y, routing.gate).to(x.dtype)


def by_expert(routing: Routing, experts: int) -> tuple[Int[Tensor, " nk"], list[int]]:
    """The pairs sorted by expert, tokens in order inside each, and how many each has; last those that are not kept."""
    expert = routing.index.masked_fill(~routing.kept, experts).flatten()
    return expert.sort(stable=True).indices, expert.bincount(minlength=experts + 1).tolist()


def combine(y: Float[Tensor, "nk d"], gate: Float[Tensor, "n k"]) -> Float[Tensor, "n d"]:
    """Each token's sum over its own k rows of y, weighted by its gates."""
    return (gate[..., None] * y.view(*gate.shape, y.shape[-1])).sum(1)


# --------------------------------------------------------------------------------------------------- the layers


@dataclass(frozen=True)
class Experts:
    """What an expert layer is made of."""

    width: int
    """Channels of the tokens, d."""
    experts: int
    """Number of experts, e."""
    top_k: int
    """Experts a token visits, k."""
    hidden: int
    """Channels inside an expert, f."""
    router: str = "linear_moe"
    """Row of the router table."""
    capacity_factor: float | None = None
    """Room of an expert over its share of the tokens (None: the router's own; inf: never full)."""
    groups: int = 1
    """Groups of experts, for routers that choose groups first."""
    groups_kept: int = 1
    """Groups that a token may visit."""
    shared: int = 0
    """Channels inside the expert that every token visits (0: none)."""
    shared_gate: bool = False
    """Whether the shared expert is weighted by sigmoid(w · x) (Qwen2-MoE) or added as it is (DeepSeek)."""

    def __post_init__(self):
        for name in ("width", "experts", "hidden", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.shared < 0:
            raise ValueError(f"shared={self.shared} must be at least 0 (0: no shared expert)")
        if self.shared_gate and not self.shared:
            raise ValueError("shared_gate=True needs a shared expert, got shared=0")
        check(row(self.router), self.experts, self.top_k, self.groups, self.groups_kept, self.capacity)

    @property
    def capacity(self) -> float:
        """The capacity factor in force; inf: no expert is ever full."""
        return row(self.router).capacity if self.capacity_factor is None else self.capacity_factor

    @property
    def prefix_stable(self) -> bool:
        """Whether decoding token by token gives what the whole text gives."""
        return row(self.router).causal and self.capacity == math.inf


class Dense(nn.Module):
    """The SwiGLU feed-forward layer of Llama: every token, one expert."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.w13 = nn.Parameter(torch.empty(2 * hidden, width))
        self.w2 = nn.Parameter(torch.empty(width, hidden))

    def forward(self, x: Float[Tensor, "b t d"], side: Any = None) -> Float[Tensor, "b t d"]:
        return swiglu(x, self.w13, self.w2)


class MoE(nn.Module):
    """Router, experts and, if any, the shared expert. Weights start uninitialised.

    Parameters: gate : e d (the router), w13 : e 2f d, w2 : e d f, shared.w13, shared.w2, shared_gate : 1 d. Routers
    balanced by bias have a buffer `bias` : e, float32, starting at 0, which this layer reads and never changes.
    """

    def __init__(self, config: Experts, ops: Any):
        super().__init__()
        self.config, self.ops, self.router = config, ops, row(config.router)
        e, d, f = config.experts, config.width, config.hidden
        self.gate = nn.Parameter(torch.empty(e, d))
        self.w13 = nn.Parameter(torch.empty(e, 2 * f, d))
        self.w2 = nn.Parameter(torch.empty(e, d, f))
        self.shared = Dense(d, config.shared) if config.shared else None
        self.shared_gate = nn.Parameter(torch.empty(1, d)) if config.shared_gate else None
        self.register_buffer("bias", torch.zeros(e, dtype=torch.float32) if self.router.bias else None)

    def forward(self, x: Float[Tensor, "b t d"], side: Any) -> tuple[Float[Tensor, "b t d"], Load]:
        """The layer's output, in x's dtype, and what its router did. Tokens compete for room within their document:
        `side.documents` (b t, int64), or None where each row of the batch is one."""
        tokens = rearrange(x, "b t d -> (b t) d")
        logits = self.logits(tokens)
        c = self.config
        documents = None if c.capacity == math.inf else numbered(side.documents, x)
        routing = route(self.router, logits, c.top_k, self.bias, c.groups, c.groups_kept, documents, c.capacity)
        y = self.ops.experts(tokens, routing, self.w13, self.w2).view_as(x)
        if self.shared is not None:
            y = y + self.always(x)
        return y, load(self.router, logits, routing)

    def logits(self, tokens: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        return wanted(tokens, self.gate)

    def _apply(self, *args, **kwargs):
        """The balancing bias stays float32 when the model is cast: in bf16 its small steps would be lost."""
        bias = self.bias
        super()._apply(*args, **kwargs)
        if bias is not None and self.bias.dtype != torch.float32:
            self.bias = bias.to(self.bias.device)
        return self

    def always(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        y = self.shared(x)
        return y if self.shared_gate is None else F.linear(x, self.shared_gate).sigmoid() * y


def numbered(documents: Int[Tensor, "b t"] | None, x: Float[Tensor, "b t d"]) -> Int[Tensor, " n"]:
    """A number for each token's document, different in each row of the batch."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None]
    if documents is None:
        return batch.expand(x.shape[:2]).flatten()
    names, number = documents.unique(return_inverse=True)
    return (batch * len(names) + number).flatten()
