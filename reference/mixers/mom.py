"""Mixture-of-Memories (2502.13685): several memories, of which each token writes to a few and to one that all share."""

from inspect import isfunction
from types import MethodType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.mixers.delta import GatedDeltaNet
from reference.mixers.gated import GLA
from reference.mixers.parts import Mixer
from reference.routers import Inside, load, route, wanted
from reference.routers import row as router


class Apart:
    """A layer with some of its submodules replaced: its methods find those, and everything else where it was."""

    def __init__(self, layer: Mixer, own: nn.ModuleDict):
        self.layer, self.own = layer, own

    def __getattr__(self, name: str):
        if name in self.own:
            return self.own[name]
        method = getattr(type(self.layer), name, None)
        return MethodType(method, self) if isfunction(method) else getattr(self.layer, name)


class MixtureOfMemories(nn.Module):
    """o = sum over the k memories that a router chose of w_e q M^e, and q M of the shared one.

    Each memory is a whole layer of the class `inner` that sees its own tokens alone, as if they were a text of their
    own: recurrence and convolution go from one of its tokens to its next. `inner.own` names what each memory has for
    itself (the projections of keys, values and gates); all else is shared, and norm, gate and output follow the sum.
    w = softmax over all memories, the k largest, divided by their sum; in float32.

    A token's memories depend on that token alone, so nothing here looks ahead. Rows of a batch are packed for the
    memories, one after the other: a batch of several rows cannot be cut over ranks, packed documents (b = 1) can.
    """

    inner: type[Mixer]

    def __init__(self, config, layer, layers, ops):
        super().__init__()
        if not 1 <= config.memories_kept <= config.memories:
            raise ValueError(
                f"memories_kept is {config.memories_kept}; a token writes to at least 1 and at most all of the "
                f"{config.memories} memories"
            )
        self.ops, self.count, self.kept = ops, config.memories, config.memories_kept
        self.router = nn.Parameter(torch.empty(self.count, config.width))
        self.first, *others = (self.inner(config, layer, layers, ops) for _ in range(self.count + 1))
        self.others = nn.ModuleList(nn.ModuleDict({n: getattr(m, n) for n in self.inner.own}) for m in others)
        self.key_size, self.value_size = self.first.key_size, self.first.value_size

    def __init_subclass__(cls):
        cls.takes = cls.inner.takes

    @classmethod
    def common(cls, config, layers: int) -> dict[str, nn.Parameter]:
        return cls.inner.common(config, layers)

    def forward(self, x: Float[Tensor, "b t d"], side, state=None) -> tuple[Tensor, tuple, Any, list[Inside]]:
        (b, t), flat = x.shape[:2], x.flatten(0, 1)
        logits = wanted(flat, self.router)
        routing = route(router("mixtral"), logits, self.kept)
        cu_seqlens = side.cu_seqlens
        if cu_seqlens is None:
            cu_seqlens = torch.arange(b + 1, device=x.device, dtype=torch.int32) * t
        one_each = t == 1 and side.cu_seqlens is None and state is not None and not torch.is_grad_enabled()
        run = self.stepped if one_each else self.packed
        o, after = 0.0, []
        for e, memory in enumerate([self.first, *(Apart(self.first, own) for own in self.others)]):
            chosen = routing.index == e
            who = chosen.any(-1).nonzero()[:, 0] if e < self.count else torch.arange(len(flat), device=x.device)
            before = None if state is None else type(state)(*(part[:, e] for part in state))
            y, own = run(memory, flat, who, cu_seqlens, side, before)
            if e < self.count:
                y = y * (routing.gate * chosen).sum(-1)[who, None, None].to(y.dtype)
            o = o + y.new_zeros(len(flat), *y.shape[1:]).index_copy(0, who, y)
            after.append(own)
        y = self.first.output(o.unflatten(0, (b, t)), x)
        state = type(after[0])(*(torch.stack(parts, 1) for parts in zip(*after, strict=True)))
        return y, state, side, [Inside(self.kept, load(router("mixtral"), logits, routing))]

    def packed(self, memory: Mixer | Apart, x: Float[Tensor, "n d"], who: Int[Tensor, " p"], cu_seqlens, side, state):
        """The memory over its tokens `who`, packed in as many documents as there are: outputs p h v, and its state."""
        borders = torch.searchsorted(who, cu_seqlens.long()).int()
        own = side._replace(positions=side.positions.flatten()[who][None], cu_seqlens=borders)
        tokens, constants, carried = memory.inputs(x[who][None], own, state)
        o, M = memory.advance(tokens, constants, state and state.memory, own)
        if not len(who):  # a memory that nobody visits gets a gradient of zeros, not none: optimizers tell them apart
            o = o + 0 * sum(y.sum() for y in tokens.values())
        return o[0], memory.state(M, *carried)

    def stepped(self, memory: Mixer | Apart, x: Float[Tensor, "b d"], who: Int[Tensor, " p"], cu_seqlens, side, state):
        """One token for each of the sequences `who`; the others keep their state."""
        own = side._replace(positions=side.positions[who])
        before = type(state)(*(part[who] for part in state))
        tokens, constants, carried = memory.inputs(x[who][:, None], own, before)
        o, M = memory.advance(tokens, constants, before.memory, own)
        parts = zip(state, (M, *carried), strict=True)
        return o[:, 0], type(state)(*(old.index_copy(0, who, new.to(old.dtype)) for old, new in parts))


class GLAMemories(MixtureOfMemories):
    """Memories of gated linear attention."""

    inner = GLA


class GatedDeltaNetMemories(MixtureOfMemories):
    """Memories of Gated DeltaNet, as in the released models."""

    inner = GatedDeltaNet
