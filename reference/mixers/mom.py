"""Mixture-of-Memories (2502.13685): several memories, of which each token writes to a few and to one that all share."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.mixers.delta import GatedDeltaNet
from reference.mixers.gated import GLA
from reference.mixers.parts import Mixer
from reference.routers import Load, load, route
from reference.routers import row as router


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
        self.memories = nn.ModuleList(self.inner(config, layer, layers, ops) for _ in range(self.count + 1))
        first, *others = self.memories
        for other in others:
            for name in {n.split(".")[0] for n, _ in first.named_parameters()} - set(self.inner.own):
                setattr(other, name, getattr(first, name))
        self.key_size, self.value_size = first.key_size, first.value_size

    @classmethod
    def common(cls, config, layers: int) -> dict[str, nn.Parameter]:
        return cls.inner.common(config, layers)

    def forward(self, x: Float[Tensor, "b t d"], side, state=None) -> tuple[Tensor, tuple, Load]:
        (b, t), flat = x.shape[:2], x.flatten(0, 1)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(flat.to(dtype), self.router.to(dtype))
        routing = route(router("mixtral"), logits, self.kept)
        cu_seqlens = side.cu_seqlens
        if cu_seqlens is None:
            cu_seqlens = torch.arange(b + 1, device=x.device, dtype=torch.int32) * t
        one_each = t == 1 and side.cu_seqlens is None and state is not None and not torch.is_grad_enabled()
        run = self.stepped if one_each else self.packed
        o, after = 0.0, []
        for e, memory in enumerate(self.memories):
            chosen = routing.index == e
            who = chosen.any(-1).nonzero()[:, 0] if e < self.count else torch.arange(len(flat), device=x.device)
            before = None if state is None else type(state)(*(part[:, e] for part in state))
            y, own = run(memory, flat, who, cu_seqlens, side, before)
            if e < self.count:
                y = y * (routing.gate * chosen).sum(-1)[who, None, None].to(y.dtype)
            o = o + y.new_zeros(len(flat), *y.shape[1:]).index_copy(0, who, y)
            after.append(own)
        y = self.memories[0].output(o.unflatten(0, (b, t)), x)
        state = type(after[0])(*(torch.stack(parts, 1) for parts in zip(*after, strict=True)))
        return y, state, load(router("mixtral"), logits, routing)

    def packed(self, memory: Mixer, x: Float[Tensor, "n d"], who: Int[Tensor, " p"], cu_seqlens, side, state):
        """The memory over its tokens `who`, packed in as many documents as there are: outputs p h v, and its state."""
        borders = torch.searchsorted(who, cu_seqlens.long()).int()
        own = side._replace(positions=side.positions.flatten()[who][None], cu_seqlens=borders)
        tokens, constants, carried = memory.inputs(x[who][None], own, state)
        o, M = self.ops.recurrence(memory.row, tokens, constants, state and state.memory, borders)
        if not len(who):  # a memory that nobody visits gets a gradient of zeros, not none: optimizers tell them apart
            o = o + 0 * sum(y.sum() for y in tokens.values())
        return o[0], memory.state(M, *carried)

    def stepped(self, memory: Mixer, x: Float[Tensor, "b d"], who: Int[Tensor, " p"], cu_seqlens, side, state):
        """One token for each of the sequences `who`; the others keep their state."""
        own = side._replace(positions=side.positions[who])
        before = type(state)(*(part[who] for part in state))
        tokens, constants, carried = memory.inputs(x[who][:, None], own, before)
        o, M = self.ops.step(memory.row, tokens, constants, before.memory)
        parts = zip(state, (M, *carried), strict=True)
        return o[:, 0], type(state)(*(old.index_copy(0, who, new.to(old.dtype)) for old, new in parts))


class GLAMemories(MixtureOfMemories):
    """Memories of gated linear attention."""

    inner = GLA


class GatedDeltaNetMemories(MixtureOfMemories):
    """Memories of Gated DeltaNet, as in the released models."""

    inner = GatedDeltaNet
