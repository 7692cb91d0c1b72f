"""Mixture-of-Memories (2502.13685): several memories, of which each token writes to a few and to one that all share."""

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from inspect import isfunction
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from reference.documents import end_to_end
from reference.mixers.delta import GatedDeltaNet
from reference.mixers.gated import GLA
from reference.mixers.parts import Mixer
from reference.moe import Groups, combine
from reference.routers import Inside, load, route, wanted
from reference.routers import row as router


class Together:
    """A layer of whose submodules named in `own` each group of tokens has its own; all else is where it was."""

    def __init__(self, layer: Mixer, own: list[Mapping[str, nn.Module]], groups: Groups):
        self.layer, self.own, self.groups = layer, own, groups

    def __getattr__(self, name: str):
        if name in self.layer.own:
            return partial(through, self.layer.ops, [modules[name] for modules in self.own], self.groups)
        method = getattr(type(self.layer), name, None)
        return MethodType(method, self) if isfunction(method) else getattr(self.layer, name)


def through(ops, modules: Sequence[nn.Module], groups: Groups, x: Float[Tensor, "... i"]) -> Float[Tensor, "... o"]:
    """Each group's tokens through its own linear map, or chain of them."""
    if isinstance(modules[0], nn.Sequential):
        return reduce(lambda y, stage: through(ops, stage, groups, y), zip(*modules, strict=True), x)
    biases = None if modules[0].bias is None else [m.bias for m in modules]
    return ops.linears(x.flatten(0, -2), groups, [m.weight for m in modules], biases).unflatten(0, x.shape[:-1])


class Visits(NamedTuple):
    """All (token, memory) pairs, sorted by memory and then by token; the memory that all share is the last one."""

    order: Int[Tensor, " p"]  # pair -> its place among (token, slot), where a token's slots stand side by side
    memory: Int[Tensor, " p"]
    token: Int[Tensor, " p"]

    def borders(self, cu_seqlens: Int[Tensor, " n1"], tokens: int, memories: int) -> Int[Tensor, "m n1"]:
        """Where each memory's documents begin and end among the pairs. No number is asked of the device."""
        first = torch.arange(memories, device=cu_seqlens.device)[:, None] * tokens
        return torch.searchsorted(self.memory * tokens + self.token, first + cu_seqlens, out_int32=True)

    def home(self, y: Float[Tensor, "p ..."]) -> Float[Tensor, "p ..."]:
        """What became of the pairs, each at its place among (token, slot)."""
        return y.index_select(0, self.order.argsort())


def visits(index: Int[Tensor, "n s"]) -> Visits:
    memory, order = index.flatten().sort(stable=True)
    return Visits(order, memory, order // index.shape[1])


class MixtureOfMemories(nn.Module):
    """o = sum over the k memories that a router chose of w_e q M^e, and q M of the shared one.

    Each memory is a whole layer of the class `inner` that sees its own tokens alone, as if they were a text of their
    own: recurrence and convolution go from one of its tokens to its next. `inner.own` names what each memory has for
    itself (the projections of keys, values and gates); all else is shared, and norm, gate and output follow the sum.
    w = softmax over all memories, the k largest, divided by their sum; in float32.

    All memories are one recurrence over (k + 1) b t tokens: those of the first, row by row of the batch or document by
    document, then those of the second, ... so the length is known and no device has to be asked who visits whom.
    A token's memories depend on that token alone, so nothing here looks ahead. A batch of several rows cannot be cut
    over ranks, packed documents (b = 1) can.
    """

    inner: type[Mixer]
    narrow = False  # a router sees it

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
        flat = x.flatten(0, 1)
        logits = wanted(flat, self.router)
        routing = route(router("mixtral"), logits, self.kept)
        shared = F.pad(routing.index, (0, 1), value=self.count)
        alone = x.shape[1] == 1 and side.cu_seqlens is None and state is not None and not torch.is_grad_enabled()
        y, state = (self.stepped if alone else self.packed)(x, visits(shared), side, state)
        o = combine(y.flatten(1), F.pad(routing.gate, (0, 1), value=1.0)).to(y.dtype)
        y = self.first.output(o.view(*x.shape[:2], *y.shape[1:]), x)
        return y, state, side, [Inside(self.kept, load(router("mixtral"), logits, routing))]

    def together(self, borders: Int[Tensor, "m n1"]) -> Together:
        own = [{name: getattr(self.first, name) for name in self.inner.own}, *self.others]
        return Together(self.first, own, Groups(borders[:, -1]))

    def packed(self, x: Float[Tensor, "b t d"], pairs: Visits, side, state):
        """All memories over their tokens, one memory's documents behind the other's: outputs a (token, slot) h v, and
        the state."""
        (b, t), cu_seqlens = x.shape[:2], side.cu_seqlens
        if cu_seqlens is None:
            cu_seqlens = torch.arange(b + 1, device=x.device, dtype=torch.int32) * t
        borders = pairs.borders(cu_seqlens, b * t, self.count + 1)
        layer = self.together(borders)
        # where the sequence is cut, each memory's first document goes on from what enters, not the first of all alone
        line = borders if self.ops.cut else end_to_end(borders)
        own = side._replace(positions=side.positions.flatten()[pairs.token][None], cu_seqlens=line)
        before = state and type(state)(*(part.transpose(0, 1).flatten(0, 1) for part in state))
        tokens, constants, carried = layer.inputs(self.seen(x, pairs)[None], own, before)
        o, M = layer.advance(tokens, constants, before and before.memory, own)
        if not b * t:  # weights that no token meets get a gradient of zeros, not none: optimizers tell them apart
            o = o + 0 * sum(y.sum() for y in tokens.values())
        documents = (self.count + 1, len(cu_seqlens) - 1)
        after = (part if part is None else part.unflatten(0, documents).transpose(0, 1) for part in (M, *carried))
        return pairs.home(o[0]), layer.state(*after)

    def stepped(self, x: Float[Tensor, "b 1 d"], pairs: Visits, side, state):
        """One token for each sequence and memory that it visits; the other memories stay as they are."""
        all_of_them = torch.arange(2, device=x.device) * len(x)
        layer = self.together(pairs.borders(all_of_them, len(x), self.count + 1))
        place = pairs.token * (self.count + 1) + pairs.memory
        own = side._replace(positions=side.positions[pairs.token])
        before = type(state)(*(part.flatten(0, 1)[place] for part in state))
        tokens, constants, carried = layer.inputs(self.seen(x, pairs)[:, None], own, before)
        o, M = layer.advance(tokens, constants, before.memory, own)
        after = (
            old.flatten(0, 1).index_copy(0, place, new.to(old.dtype)).view(old.shape)
            for old, new in zip(state, (M, *carried), strict=True)
        )
        return pairs.home(o[:, 0]), layer.state(*after)

    def seen(self, x: Float[Tensor, "b t d"], pairs: Visits) -> Float[Tensor, "p d"]:
        """Each pair's token: copied to its slots, then moved, so that no two gradients are added up in one place."""
        return repeat(x, "b t d -> (b t s) d", s=self.kept + 1).index_select(0, pairs.order)


class GLAMemories(MixtureOfMemories):
    """Memories of gated linear attention."""

    inner = GLA


class GatedDeltaNetMemories(MixtureOfMemories):
    """Memories of Gated DeltaNet, as in the released models."""

    inner = GatedDeltaNet
