"""A model run without memory or arithmetic: what autograd keeps of a token, and what would travel between ranks.

The model's own code runs on tensors that have a shape and a dtype but no numbers, so every layer that there is counts
itself. Where a number would decide a shape, all goes evenly: every pair of a token and an expert is kept, and there is
one document.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode

from parallel import tensor
from parallel.lasp import lines
from reference import moe
from reference.bidirectional import both_ways, reverse
from reference.documents import end_to_end
from reference.model import LanguageModel
from reference.normal import passes_on
from reference.ops import Ops
from reference.ops import ops as reference
from reference.recurrence import prepare
from reference.span import TRANSITION, brief, transition

CHUNK = 64  # tokens between two memories that a fused kernel keeps
LENGTH = 2 * CHUNK  # of the shorter of two runs; what is kept grows by a straight line


class Crossing(NamedTuple):
    """What one layer must know of other ranks' tokens: a span (A, S), or the tokens themselves."""

    kind: str  # the function of ops
    A: int = 0  # bytes
    S: int = 0  # bytes, and of its cotangent
    memory: tuple[int, int, int] = (0, 0, 0)  # h k v
    transition: str | None = None  # the class of A
    q: int = 0  # numbers a token, here and below
    k: int = 0
    v: int = 0
    o: int = 0
    heads: tuple[int, int] = (0, 0)  # of queries and of keys
    window: int | None = None
    sides: int = 1  # of a token that it sees
    once: bool = False  # a block that runs again knows what it found
    item: int = 4  # bytes of one of q, k, v


class Sum(NamedTuple):
    """What ranks that share heads exchange once in a block's forward pass. Its gradient is as large."""

    kind: str  # the field of `tensor.Team`
    fixed: float  # bytes of all of it, whatever the tokens
    a_token: float  # bytes more, of each token
    again: bool  # whether recomputing does it once more: behind the last tensor that autograd keeps it does not


class Kept(NamedTuple):
    """Of one block."""

    a_token: float  # bytes that autograd keeps for the backward pass
    stream: int  # bytes of one number between blocks
    crossings: tuple[Crossing, ...]
    sums: tuple[Sum, ...] = ()


# ------------------------------------------------------------------------------------- functions that have no numbers


class Given(torch.autograd.Function):
    """o, as if made by a kernel that keeps these tensors for its backward pass."""

    @staticmethod
    def forward(ctx, o, *kept):
        ctx.save_for_backward(*kept)
        return o.clone()


def made_of(o: Tensor, *kept: Tensor | None) -> Tensor:
    return Given.apply(o.detach(), *(x for x in kept if x is not None))


def tracing(crossings: list[Crossing], fused: bool, causal: bool = True) -> Ops:
    """ops that note what would cross ranks. `fused`: kernels keep their inputs (and a memory a chunk), nothing else;
    else the reference's own functions, but for recurrences. Not `causal`: they look both ways."""
    plain = reference if causal else both_ways(reference)

    def recurrence(row, tokens, constants=None, memory=None, cu_seqlens=None):
        constants, v = constants or {}, tokens["v"]
        S = prepare(row, tokens, constants, None, end_to_end(cu_seqlens))[-1]
        crossing = crossing_of(row, tokens, constants, S, lines(cu_seqlens))
        crossings.append(crossing._replace(once=fused and causal and by_ends(row, crossing, lines(cu_seqlens))))
        memories = S.new_empty(v.shape[0], v.shape[1] // CHUNK, *S.shape[1:])
        # Zeros and no memory as it is: where there are numbers, a router behind this goes by them.
        return made_of(torch.zeros_like(v), *tokens.values(), *constants.values(), memories), S

    def short_convolution(x, weight, bias=None, activation=None, taps=None, cu_seqlens=None):
        reach = weight.shape[-1] - 1
        if reach:
            crossings.append(window("short_convolution", x, reach, lines(cu_seqlens)))
        cu_seqlens = end_to_end(cu_seqlens)
        if not fused:
            return reference.short_convolution(x, weight, bias, activation, taps, cu_seqlens)
        y, taps = without_gradient(reference.short_convolution)(x, weight, bias, activation, taps, cu_seqlens)
        return made_of(y, x, weight, bias), taps

    def token_shift(x, last=None, cu_seqlens=None):
        crossings.append(window("token_shift", x, 1, lines(cu_seqlens)))
        return reference.token_shift(x, last, end_to_end(cu_seqlens))

    def running_sum(x, last=None, cu_seqlens=None):
        y, last = reference.running_sum(x, last, cu_seqlens)
        size = last.element_size()
        crossings.append(Crossing("running_sum", size, x.shape[-1] * size, once=True))
        return y, last

    def attention(q, k, v, past=None, cu_seqlens=None, window=None, scale=None):
        heads = (q.shape[2], k.shape[2])
        sizes = [math.prod(x.shape[2:]) for x in (q, k, v)] + [q.shape[2] * v.shape[3]]
        crossings.append(
            Crossing(
                "attention",
                **dict(zip("qkvo", sizes, strict=True)),
                heads=heads,
                window=window,
                sides=1 if causal else 2,
                item=q.element_size(),
            )
        )
        if not fused:
            return plain.attention(q, k, v, past, cu_seqlens, window, scale)
        o = v.new_empty(*q.shape[:3], v.shape[3])
        sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        return made_of(o, q, k, v, o, sums), None

    def norm(x, weight=None, eps=1e-5, gate=None, *more, **how):
        return made_of(without_gradient(reference.norm)(x, weight, eps, gate, *more, **how), x, weight, gate)

    def unit(x, *how, **more):
        return made_of(without_gradient(reference.unit)(x, *how, **more), x)

    def elu_plus_one(x, *how, **more):
        return made_of(without_gradient(reference.elu_plus_one)(x, *how, **more), x)

    own = (recurrence, short_convolution, token_shift, running_sum, attention, experts, linears)
    own = {f.__name__: f for f in own}
    made = reference._replace(
        name="tracing", cut=True, **own, **({f.__name__: f for f in (norm, unit, elu_plus_one)} if fused else {})
    )
    if causal:
        return made

    def there_and_back(row, tokens, constants, cu_seqlens):
        there = recurrence(row, tokens, constants, None, cu_seqlens)[0]
        tokens, cu_seqlens = reverse(tokens, cu_seqlens)
        back = recurrence(row, tokens, constants, None, cu_seqlens)[0].flip(1)
        crossings.append(together(crossings.pop(), crossings.pop()))
        return there + back

    return both_ways(made, there_and_back)._replace(attention=attention)


def together(one: Crossing, other: Crossing) -> Crossing:
    """Two spans in one gather."""
    heads = one.memory[0] + other.memory[0]
    return one._replace(A=one.A + other.A, S=one.S + other.S, memory=(heads, *one.memory[1:]))


def crossing_of(row, tokens, constants, S: Tensor, lines: int) -> Crossing:
    """The row's span, of each of so many lines. None of a row that has none: its A has no bytes."""
    kind = transition(row)
    h, k, v = S.shape[1:]
    numbers = 0
    if kind is not None:
        sizes = {"h": h, "k": k, "v": v, "k+v": k + v, "l": tokens["weight"].shape[-1] if "weight" in tokens else 1}
        short = brief(row, tokens, constants)
        numbers = short[0].numel() if short else math.prod(sizes[n] for n in TRANSITION[kind].shape.split())
    return Crossing("recurrence", lines * numbers * 4, lines * h * k * v * 4, (lines * h, k, v), kind)


def by_ends(row, crossing: Crossing, lines: int) -> bool:
    """Whether kernels find spans without outputs (`fast.recurrence.has_ends`, which needs Triton to say so)."""
    return passes_on(row) and lines == 1 and crossing.memory[1] <= 128


def window(kind: str, x: Tensor, reach: int, lines: int) -> Crossing:
    size = lines * reach * x.element_size()
    return Crossing(kind, size * reach, size * x.shape[-1], once=True)


def without_gradient(function):
    return torch.no_grad()(function)


def experts(x, routing, w13, w2, b13=None, b2=None, inner=moe.swiglu, gate_at="output", drop=None, **how) -> Tensor:
    """As `reference.moe.experts`, with every pair at the first expert: as many rows, and no number needed."""
    place = torch.arange(routing.index.numel()).view(routing.index.shape)
    rows = moe.taken(x, place, place.numel(), routing.gate if gate_at == "input" else None)
    y = moe.each(rows, [len(rows)], [None if w is None else w[:1] for w in (w13, w2, b13, b2)], inner, None)
    return moe.combined(y, place, routing.gate if gate_at == "output" else None, x.dtype)


def linears(x, groups, weights, biases=None) -> Tensor:
    """As `reference.moe.linears`, with all rows in the first group."""
    return torch.nn.functional.linear(x, weights[0], biases and biases[0])


def imagined(ranks: int, sums: list[tuple[str, int]]) -> tensor.Team:
    """The first of ranks that share heads and are not there: results have the right shapes, and all is noted."""

    def noted(kind: str, x: Tensor, whole: int) -> Tensor:
        sums.append((kind, whole * x.element_size()))
        return x

    return tensor.Team(
        0,
        ranks,
        lambda x: noted("total", x.clone(), x.numel()),
        lambda x: noted("gathered", torch.cat([x] * ranks, 1), x.numel() * ranks),
        lambda x: noted("scattered", x.chunk(ranks, 1)[0].clone(), x.numel()),
    )


class Even(TorchFunctionMode):
    """Answers whose shape only numbers would tell, and how many rows there are of each kind: all of the first."""

    counts = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is Tensor.bincount:
            return args[0].new_zeros((kwargs or {}).get("minlength", 1))
        if function is torch.searchsorted:  # the ends of groups of rows, whose differences are counts
            self.rows = args[0].numel()
        if function is Tensor.diff:
            self.counts = function(*args, **(kwargs or {}))
            return self.counts
        if function is Tensor.unbind and args[0] is self.counts:  # on its way to a list of integers
            return [np.int64(self.rows), *[np.int64(0)] * (len(self.counts) - 1)]
        if function is Tensor.unique:
            return args[0][:1], torch.zeros_like(args[0])
        if function is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            return args[0].flatten(0, args[1].ndim - 1)
        return function(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------------------ tracing


def trace(
    config,
    bf16: bool = True,
    fused: bool = True,
    ranks: int = 1,
    sparing: bool = False,
    shared_out: bool = False,
    causal: bool = True,
) -> list[Kept]:
    """One for each block, in order, of a rank of those that share heads (`sparing`: and have a part of the tokens
    between layers; `shared_out`: and send a part to experts), of a model that is `causal` or looks both ways. Raises
    ValueError for a model whose shapes depend on its numbers, or whose heads cannot be shared."""
    config = replace(config, capacity_factor=math.inf, pad=False)
    try:
        short, long = (traced(config, n * LENGTH, bf16, fused, ranks, sparing, shared_out, causal) for n in (1, 2))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ValueError(f"cannot trace {config.lsm!r}: how much it computes depends on the text ({error})") from error
    return [per_token(less, more) for less, more in zip(short, long, strict=True)]


def per_token(less: Kept, more: Kept) -> Kept:
    """From all bytes of LENGTH tokens, and of as many more."""
    slopes = [(y.fixed - x.fixed) / LENGTH for x, y in zip(less.sums, more.sums, strict=True)]
    sums = (
        x._replace(fixed=x.fixed - slope * LENGTH, a_token=slope) for x, slope in zip(less.sums, slopes, strict=True)
    )
    return less._replace(a_token=(more.a_token - less.a_token) / LENGTH, sums=tuple(sums))


def traced(
    config, t: int, bf16: bool, fused: bool, ranks: int, sparing: bool, shared_out: bool, causal: bool
) -> list[Kept]:
    """The bytes are those of t tokens. Blocks with the same parameters are run once."""
    found, order, crossings, sums = {}, [], [], []
    with FakeTensorMode(), Even():
        team = imagined(ranks, sums)
        ops = tracing(crossings, fused, causal)
        if ranks > 1:
            ops = tensor.dealing(ops, team) if shared_out else tensor.sharing(ops, team)
        model = LanguageModel(config, ops)
        if ranks > 1:
            tensor.share(model, team, sparing, shared_out)
        place = torch.arange(t)[None]
        side = model.side(torch.zeros(1, t, dtype=torch.int64), place, None, place, 0, None)
        x, last = torch.zeros(1, t, config.width), len(model.blocks) - 1
        for i, block in enumerate(model.blocks):
            ends = sparing and (i == 0, i == last)  # where tokens are cut, and come together
            key = (ends, *((name, tuple(p.shape)) for name, p in block.named_parameters()))
            if key not in found:
                crossings.clear()
                sums.clear()
                x = x.detach().requires_grad_()
                with autocast(bf16), saved(model, sums) as (sizes, done):
                    y, side, _, _ = block(x, side)
                noted = (Sum(kind, size, 0.0, i < done[-1]) for i, (kind, size) in enumerate(sums))
                found[key] = Kept(sum(sizes.values()), x.element_size(), tuple(crossings), tuple(noted))
                x = y
            order.append(found[key])
    return order


def autocast(bf16: bool):
    return torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()


@contextlib.contextmanager
def saved(model: torch.nn.Module, sums: list) -> Iterator[tuple[dict[int, int], list[int]]]:
    """Bytes of every storage that autograd keeps, once each, parameters left out; and how many `sums` there were each
    time that it kept something."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    sizes, done, alive = {}, [0], []

    def pack(x: Tensor) -> Tensor:
        done.append(len(sums))
        storage = x.untyped_storage()
        if storage._cdata not in own:
            sizes[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield sizes, done
