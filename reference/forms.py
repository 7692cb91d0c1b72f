"""Chunk forms of the rows whose words do not unroll to the normal form: each is still a span of tokens at a time.

    rotation      a complex decay by channel is a real one once queries and keys are turned by the running angle
    two readings  slots are read twice: the first reading weighs the second
    convolution   a memory that treats every token alike is a convolution: powers of its decay
    levels        memories that merge: the highest merge between two tokens says how one reads the other
    scan          decays that differ by element: every chunk by the loop itself, all chunks side by side
    momentum      two memories above each other, whose decays are 2×2 matrices
    mini-batches  gradients are taken where a mini-batch began: all tokens of one at once, one after the other

A form is run(row, tokens, constants, M, chunk) -> (o, M), all inputs float32 (or float64), whole sequences.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from reference import printed
from reference import recurrence as words
from reference.chunked import (
    Chunk,
    cut,
    decays,
    fold,
    over_chunks,
    power_of_two,
    prefix,
    solved,
    suffix,
    well_conditioned,
)
from reference.normal import Normal
from reference.recurrence import (
    Inputs,
    Memory,
    Row,
    highest_full,
    in_full_precision,
    inner_slope,
    loop,
    standard,
    with_one,
)
from reference.span import TRANSITION, left, parted, transition


class Form(NamedTuple):
    run: Callable
    still: bool = True  # tokens of zeros leave the memory as it is


def of(row: Row) -> Form:
    """The form of the row's first word that asks for one. NotImplementedError if none does."""
    for word in (row.read, row.update, row.decay):
        if word in FORM:
            return FORM[word]
    raise NotImplementedError(f"{row.title}: a word has no normal form, and none has a chunk form in reference.forms")


# ------------------------------------------------------------------------------------------------------- rotation


def rotated(row: Row, x: Inputs, constants: Inputs, M: Memory, chunk: int) -> tuple[Tensor, Memory]:
    """With Θ the sum of the angles so far, M_t = e^{iΘ_t} N_t and N decays by e^g alone (GateLoop 2311.01927).

    Angles are summed in float64: after 65,536 tokens a float32 sum would be off by a hundredth of a turn.
    """
    angle = x["theta"].double().cumsum(1)
    c, s = (f(angle).to(M.dtype) for f in (torch.cos, torch.sin))
    q, k = (torch.cat([x[name] * c, -x[name] * s], -1) for name in "qk")
    o, N = over_chunks(Normal(q, k, x["v"], None, g=torch.cat([x["g"], x["g"]], -1)), M, chunk)
    if not angle.shape[1]:
        return o, N
    c, s, real, imaginary = c[:, -1, ..., None], s[:, -1, ..., None], *N.chunk(2, -2)
    return o, torch.cat([c * real - s * imaginary, s * real + c * imaginary], -2)


# --------------------------------------------------------------------------------------------------- two readings


def twice(row: Row, x: Inputs, constants: Inputs, M: Memory, chunk: int) -> tuple[Tensor, Memory]:
    """Gated slot attention (2409.07146): p = softmax(q K) over the slots' keys, o = p V over their values.

    The slots' keys are a memory k × m whose columns decay, the values one of m × v whose rows do.
    """
    keys, values = M.split([x["k"].shape[-1], x["v"].shape[-1]], -1)
    g, s = x["g"], -torch.expm1(x["g"])
    weights, keys = over_chunks(Normal(x["q"], x["k"], s, None, f=g), keys.mT, chunk)
    o, values = over_chunks(Normal(weights.softmax(-1), s, x["v"], None, g=g), values, chunk)
    return o, torch.cat([keys.mT, values], -1)


# ---------------------------------------------------------------------------------------------------- convolution


def convolved(row: Row, x: Inputs, constants: Inputs, M: Memory, chunk: int) -> tuple[Tensor, Memory]:
    """S4 (2111.00396, section 2): what no token changes is a convolution within chunks and a recurrence between them.

    Whole chunks, then the rest: a token of zeros would still let the memory fade.
    """
    u, o = x["v"], []
    whole = u.shape[1] // chunk * chunk
    for part, c in ((u[:, :whole], chunk), (u[:, whole:], u.shape[1] - whole)):
        if part.shape[1]:
            y, M = convolved_chunks(rearrange(part, "b (n c) h v -> b n c h v", c=c), constants, M)
            o.append(y)
    return torch.cat(o, 1) if o else u, M


def convolved_chunks(u: Float[Tensor, "b n c h v"], x: Inputs, M: Memory) -> tuple[Tensor, Memory]:
    """With z the factor of an element, r its read and d its distance in tokens: o = 2 Re(r z^{d+1} M) + K u, where
    K_d = 2 Re(sum over rows of r z^d), and M <- z^c M + the sum of z^d u. Powers, not their tokens, have k and v."""
    lag = torch.arange(u.shape[2] + 1, device=u.device)
    angle, size = (lag.view(-1, 1, 1, 1) * y for y in (x["theta"].double(), x["g"].clamp(min=-1e4)))
    z = torch.complex(*(size.exp() * f(angle).to(M.dtype) for f in (torch.cos, torch.sin)))
    read = 2 * torch.complex(x["q"], x["p"])
    kernel = (read * z[:-1]).sum(2).real
    lag = lag[:-1, None] - lag[:-1]
    K = torch.where((lag >= 0)[..., None, None], kernel[lag.clamp(min=0)], 0.0)
    written, before = einsum(parted(z[:-1].flip(0), -2), u, "c h k v, b n c h v -> b n h k v"), []
    for S in written.unbind(1):
        before.append(M)
        M = TRANSITION["spiral"].act(parted(z[-1], -2), M) + S
    o = einsum(parted((read * z[1:]).conj(), -2), torch.stack(before, 1), "c h k v, b n h k v -> b n c h v")
    o = o + einsum(K, u, "c s h v, b n s h v -> b n c h v")
    return rearrange(o, "b n c h v -> b (n c) h v"), M


# --------------------------------------------------------------------------------------------------------- levels


def by_levels(row: Row, x: Inputs, constants: Inputs, M: Memory, chunk: int) -> tuple[Tensor, Memory]:
    """Log-linear attention (2506.04761, section 3.3): what is on level m and meets merges into levels up to r is then
    on level max(m, r). So the highest merge between two tokens says by which weight one reads the other, and the
    highest since a chunk began what became of the memories that came in."""
    t, levels = x["v"].shape[1], x["weight"].shape[-1]
    if not t:
        return x["v"], M
    chunk = min(chunk, power_of_two(t))
    rise = cut(highest_full(x["place"], levels)[..., None], chunk)  # b n 1 c, of each token
    q, k, v, g, weight = (cut(x[name], chunk) for name in ("q", "k", "v", "g", "weight"))
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=rise.device).triu(1)
    level = torch.where(later, rise[..., None, :], 0).cummax(-1).values.mT  # of each earlier token at each later one
    became = torch.maximum(torch.arange(levels, device=rise.device), rise.cummax(-1).values[..., None])

    def weights(index: Tensor) -> Tensor:
        return weight.gather(-1, index.expand(*weight.shape[:-1], -1))

    def on_levels(share: Float[Tensor, "b n h c l"], y: Float[Tensor, "b n h c k"]) -> Tensor:
        return (share[..., :, None] * y[..., None, :]).flatten(-2)

    g = g.clamp(min=-1e4)
    start, end = prefix(g[..., None]).exp(), suffix(g[..., None]).exp()
    reach = on_levels(weights(became), start * q)
    scores = (q @ k.mT) * decays(g) * weights(level)
    lasting = on_levels(F.one_hot(level[..., -1, :], levels).to(k.dtype), end * k)
    total = start[..., -1:, :] * F.one_hot(became[..., -1, :], levels).to(k.dtype).mT
    inside = Chunk(reach, scores, v, None, lasting, total)
    before, written, M = fold(inside, M, TRANSITION["levels"].act)
    o = inside.reach @ before + inside.scores @ written
    return rearrange(o, "b n h c v -> b (n c) h v")[:, :t], M


# ----------------------------------------------------------------------------------------------------------- scan

PIECE = 256  # tokens whose memories may exist at the same time
SHORT = 16  # tokens of a chunk: PIECE / SHORT chunks go side by side


def scan(row: Row, x: Inputs, constants: Inputs, M: Memory, chunk: int) -> tuple[Tensor, Memory]:
    """Piece after piece; a piece is computed again for its gradient, so that no memory of every token is ever kept."""

    def piece(M: Memory, *values: Tensor) -> tuple[Tensor, Memory]:
        tokens, fixed = values[: len(x)], values[len(x) :]
        return side_by_side(row, dict(zip(x, tokens, strict=True)), dict(zip(constants, fixed, strict=True)), M)

    if not x["v"].shape[1]:
        return x["v"], M
    o = []
    for parts in zip(*(y.split(PIECE, 1) for y in x.values()), strict=True):
        y, M = Again.apply(piece, M, *parts, *constants.values())
        o.append(y)
    return torch.cat(o, 1), M


class Again(torch.autograd.Function):
    """run(*inputs), once more for its gradient; in between there are the inputs and nothing else.

    torch's checkpoint keeps a graph without its tensors: small pieces of memory, between which a CPU finds no room for
    the next large one, so that its memory grows with the text all the same.
    """

    @staticmethod
    def forward(ctx, run: Callable, *inputs: Tensor):
        ctx.run = run
        ctx.save_for_backward(*inputs)
        return run(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad(), in_full_precision(inputs[0]):
            outputs = ctx.run(*inputs)
        return None, *torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)


def side_by_side(row: Row, x: Inputs, constants: Inputs, M: Memory) -> tuple[Tensor, Memory]:
    """The loop over the first token of every chunk, then the second, ...: once from nothing, which is what the chunks
    write; folded, that is the memory before each; and once from there."""
    b, t = x["v"].shape[:2]
    n = t // SHORT
    if n < 2:
        return loop(row, x, constants, M)
    whole = {name: rearrange(y[:, : n * SHORT], "b (n c) ... -> (b n) c ...", c=SHORT) for name, y in x.items()}
    written = loop(row._replace(read=unread), whole, constants, M.new_zeros(b * n, *M.shape[1:]))[1]
    kept = left(row._replace(read=unread), whole, constants, written, loop)
    act, before = TRANSITION[transition(row)].act, []
    for A, S in zip(*(y.unflatten(0, (b, n)).unbind(1) for y in (kept, written)), strict=True):
        before.append(M)
        M = act(A, M) + S
    o, _ = loop(row, whole, constants, torch.stack(before, 1).flatten(0, 1))
    rest, M = loop(row, {name: y[:, n * SHORT :] for name, y in x.items()}, constants, M)
    return torch.cat([rearrange(o, "(b n) c ... -> b (n c) ...", n=n), rest], 1), M


def unread(M, before, x):
    return x["v"]


# ------------------------------------------------------------------------------------------------------- momentum


def with_momentum(row: Row, x: Inputs, constants: Inputs, M: Memory, chunk: int) -> tuple[Tensor, Memory]:
    """Titans with a linear memory (2501.00663): what a write s leaves in the memory at t is G_ts, a product of two
    triangular matrices of decays, since the momentum's share fades first and the memory's after it.

    Whole chunks, then the rest: a token of zeros would still let the momentum move the memory.
    """
    t, o, chunk = x["v"].shape[1], [], min(chunk, well_conditioned(x["k"].shape[-1]))
    for start, stop, c in ((0, t // chunk * chunk, chunk), (t // chunk * chunk, t, t % chunk)):
        if stop > start:
            parts = {name: cut(y[:, start:stop], c) for name, y in x.items()}
            y, M = momentum_chunks(parts, M)
            o.append(y)
    return torch.cat(o, 1) if o else x["v"], M


def momentum_chunks(x: Inputs, M: Memory) -> tuple[Tensor, Memory]:
    """All of (b n h c ...), from the stacked memory and momentum M."""
    q, k, g, f = x["q"], x["k"], x["g"].clamp(min=-1e4), x["f"].clamp(min=-1e4)
    strength = 2 * x["beta"]
    fade, speed = decays(g), decays(f)
    G = fade @ speed
    kept, pushed = prefix(g[..., None]).exp(), prefix(f[..., None]).exp()
    moved = fade @ pushed  # what the momentum that comes in has added by then
    earlier = lambda y, first: torch.cat([torch.full_like(y[..., :1, :], first), y[..., :-1, :]], -2)
    L = strength[..., None, :] * earlier(G, 0.0).tril(-1) * (k @ k.mT)
    U, W = solved(L, x["v"], torch.cat([earlier(kept, 1.0) * k, earlier(moved, 0.0) * k], -1))
    ends = [strength[..., None] * y[..., -1, :, None] * k for y in (G, speed)]
    total = torch.stack([torch.cat([kept, moved], -1)[..., -1, :], F.pad(pushed[..., -1, :], (1, 0))], -2)
    reach = torch.cat([kept * q, moved * q], -1)
    inside = Chunk(reach, (q @ k.mT) * G * strength[..., None, :], U, W, torch.cat(ends, -1), total)
    before, written, M = fold(inside, M, two_by_two)
    o = inside.reach @ before + inside.scores @ written
    return rearrange(o, "b n h c v -> b (n c) h v"), M


def two_by_two(A: Float[Tensor, "b h 2 2"], M: Memory) -> Memory:
    upper, lower = M.chunk(2, -2)
    A = A[..., None, None]
    return torch.cat([A[..., 0, 0, :, :] * upper + A[..., 0, 1, :, :] * lower, A[..., 1, 1, :, :] * lower], -2)


# --------------------------------------------------------------------------------------------------- mini-batches


def over_mini_batches(one: Callable) -> Callable:
    """The form that runs one(tokens, constants, M) -> (o, M) for each mini-batch (or the part of one that is there).

    A mini-batch begins where `place` is 0. Sequences that begin theirs at the same tokens go together.
    """

    def run(row: Row, x: Inputs, constants: Inputs, M: Memory, chunk: int) -> tuple[Tensor, Memory]:
        o, last = torch.zeros_like(x["v"]), M
        for who, borders in alike(x["place"] == 0):
            y, end = [], M[who]
            for start, stop in pairwise(borders):
                part, end = one({name: z[who, start:stop] for name, z in x.items()}, constants, end)
                y.append(part)
            o, last = o.index_copy(0, who, torch.cat(y, 1)), last.index_copy(0, who, end)
        return o, last

    return run


def alike(begins: Bool[Tensor, "b t"]) -> Iterator[tuple[Int[Tensor, " n"], list[int]]]:
    """The sequences whose mini-batches begin at the same tokens, and the borders between these."""
    t = begins.shape[1]
    if not t:
        return
    patterns, kind = begins.unique(dim=0, return_inverse=True)
    for i, pattern in enumerate(patterns):
        yield (kind == i).nonzero()[:, 0], sorted({0, *pattern.nonzero()[:, 0].tolist(), t})


def by_head(x: Inputs, *names: str) -> list[Float[Tensor, "b h c d"]]:
    return [rearrange(x[name], "b c h d -> b h c d") for name in names]


def gradient_batch(x: Inputs, constants: Inputs, M: Memory) -> tuple[Tensor, Memory]:
    """The delta rule with all differences taken from one memory (2407.04620, section 2.4, without the inner norm)."""
    q, k, v = by_head(x, "q", "k", "v")
    memory, start = M.chunk(2, -2)
    start = memory if x["place"][0, 0] == 0 else start
    written = rearrange(x["beta"], "b c h -> b h c 1") * (v - k @ start)
    o = q @ memory + (q @ k.mT).tril() @ written
    return rearrange(o, "b h c v -> b c h v"), torch.cat([memory + k.mT @ written, start], -2)


def inner_batch(x: Inputs, constants: Inputs, M: Memory) -> tuple[Tensor, Memory]:
    """TTT-linear (2407.04620, sections 2.3 to 2.6): all gradients of a mini-batch, then what its tokens read."""
    q, k, v = by_head(x, "q", "k", "v")
    wide_q, wide_k = with_one(q), with_one(k)
    weights, learned = M.chunk(2, -2)
    if x["place"][0, 0] == 0:
        weights, learned = weights - constants["last"][:, None, None] * learned, torch.zeros_like(learned)
    scale, shift = (constants[name][:, None] for name in ("scale", "shift"))
    W = constants["W"] + weights
    slope = rearrange(x["beta"], "b c h -> b h c 1") * inner_slope(wide_k @ W, v - k, scale, shift)
    moved = wide_q @ learned + (wide_q @ wide_k.mT).tril() @ slope
    o = q + scale * standard(wide_q @ W - rearrange(x["reach"], "b c -> b 1 c 1") * moved)[0] + shift
    return rearrange(o, "b h c v -> b c h v"), torch.cat([weights, learned + wide_k.mT @ slope], -2)


# word -> the chunk form of the rows that have it
FORM = {
    words.rotating: Form(rotated),
    words.attended: Form(twice),
    words.solved: Form(scan),
    words.element: Form(scan),
    printed.stepped: Form(scan),
    printed.full: Form(scan),
    words.merging: Form(by_levels),
    words.erased: Form(scan),
    words.level: Form(convolved, still=False),
    words.momentum: Form(with_momentum, still=False),
    words.gradient: Form(over_mini_batches(gradient_batch), still=False),
    words.inner: Form(over_mini_batches(inner_batch), still=False),
}
