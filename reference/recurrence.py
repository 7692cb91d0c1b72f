"""Every linear sequence model is one loop over a memory that is a matrix.

    M_t = update(decay(M_{t-1}, x_t), M_{t-1}, x_t)        memory   M : b h k v
    o_t = read(M_t, M_{t-1}, x_t)                          output   o : b h v

A model is a row of three words: how its memory decays, what is written, how it is read. Here are the words and the
loop; `reference.span` has the algebra of spans: what a run of tokens does to the memory, M -> A ⋄ M + S.

    b batch   t time   h heads   k key size   v value size   m slots   n documents
    q query   k key    v value   g log decay (natural log, -inf <= g <= 0)   beta write strength   u bonus

Some rows have two memories. They stand in one matrix, above each other (a complex memory: the real part above the
imaginary part) or side by side, so that everything that handles a memory handles one tensor.

`tokens` are the inputs with a time axis (b t ...), `constants` those without one (slopes, u). The memory and all
arithmetic are float32 (float64 if the inputs are), outputs come back in the values' dtype. Packed documents: b = 1
and `cu_seqlens` holds their borders (int32, n + 1 entries, equal neighbours are empty documents); memories then have
n in place of b.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

Inputs = Mapping[str, Tensor]
Memory = Float[Tensor, "b h k v"]


class Row(NamedTuple):
    """One model of the table: three words, the shapes of its inputs and its memory, where it comes from."""

    decay: Callable[[Memory, Inputs], Memory]
    update: Callable[[Memory, Memory, Inputs], Memory]
    read: Callable[[Memory, Memory, Inputs], Tensor]
    tokens: Mapping[str, str]
    constants: Mapping[str, str]
    mixer: str  # the published layer around the row, "file:Class" below reference/mixers
    title: str
    paper: str
    memory: str = "k v"  # rows and columns of one head's memory, in the letters of the inputs
    features: Callable[[Tensor], Tensor] | None = None  # what queries and keys become before they meet the memory
    used: str = ""  # released models that have it


# ---------------------------------------------------------------------------------------------------- the words


def look(M: Memory, q: Float[Tensor, "b h k"]) -> Float[Tensor, "b h v"]:
    return einsum(q, M, "b h k, b h k v -> b h v")


def write(M: Memory, k: Float[Tensor, "b h k"], v: Float[Tensor, "b h v"]) -> Memory:
    return M + einsum(k, v, "b h k, b h v -> b h k v")


def with_one(x: Tensor) -> Tensor:
    """x and a one. To values it adds a column that counts: the same recurrence then sums the weights (a normaliser).
    To keys it adds a row for a bias."""
    return F.pad(x, (0, 1), value=1.0)


def over_count(o: Tensor, least: float = 1e-10) -> Tensor:
    """The weighted sum over the sum of the weights, which starts from `least`. The weights must be positive."""
    return o[..., :-1] / (o[..., -1:] + least)


def turn(M: Memory, g: Tensor, theta: Tensor) -> Memory:
    """e^{g + i theta} M of a complex memory: its real part's rows above those of its imaginary part."""
    real, imaginary = M.chunk(2, -2)
    c, s = g.exp() * theta.cos(), g.exp() * theta.sin()
    return torch.cat([c * real - s * imaginary, s * real + c * imaginary], -2)


# decay: what the memory forgets
def keep(M, x):
    return M


def fixed(M, x):  # one number a head, the same for every token
    return x["g"].exp()[:, None, None] * M


def scalar(M, x):  # one number a head and token
    return x["g"].exp()[..., None, None] * M


def channel(M, x):  # one number a key channel and token
    return x["g"].exp()[..., None] * M


def cross(M, x):  # one number a key channel, times one a value channel
    return x["g"].exp()[..., None] * M * x["f"].exp()[..., None, :]


def element(M, x):  # one number an element, in factors: a rate of its own times a time step for the value channel
    return (x["A"] * x["dt"][..., None, :]).exp() * M


def erased(M, x):  # one number an element, in factors: the key's square times a step for the value channel
    return (1 - x["k"].square()[..., None] * x["dt"][..., None, :]) * M


def rotating(M, x):  # a complex number a key channel
    return turn(M, x["g"][..., None], x["theta"][..., None])


def spiral(M, x):  # a complex number an element, the same for every token
    return turn(M, x["g"], x["theta"])


def slowing(M, x):  # the memory above fades, and so does its momentum below
    memory, momentum = M.chunk(2, -2)
    return torch.cat([x["g"].exp()[..., None, None] * memory, x["f"].exp()[..., None, None] * momentum], -2)


def restart(M, x):  # the memory below is the one above as it was when a mini-batch began
    memory, start = M.chunk(2, -2)
    return torch.cat([memory, torch.where(begins(x), memory, start)], -2)


def commit(M, x):  # when a mini-batch begins, what was learned below goes into the weights above
    weights, learned = M.chunk(2, -2)
    weights = torch.where(begins(x), weights - x["last"][:, None, None] * learned, weights)
    return torch.cat([weights, torch.where(begins(x), 0.0, learned)], -2)


def merging(M, x):  # memories of 1, 2, 4, ... tokens: those that are full move up together, and all fade
    levels = M.unflatten(-2, (x["weight"].shape[-1], -1))
    moved = einsum(merges(x["place"], levels.shape[2]).to(M.dtype), levels, "b new old, b h old k v -> b h new k v")
    return x["g"].exp()[..., None, None] * moved.flatten(-3, -2)


def merges(place: Int[Tensor, "..."], levels: int) -> Float[Tensor, "... new old"]:
    """What happens to the memories of each level before the token at that place: 0 ... l - 1 go into l, which is one
    above the lowest set bit of the place (the last level, if there are no more); at place 0 nothing moves."""
    level, target = torch.arange(levels, device=place.device), highest_full(place, levels)[..., None]
    stays, arrives = level >= target, level == target
    return torch.diag_embed(stays.float()) + (arrives[..., :, None] & ~stays[..., None, :])


def highest_full(place: Int[Tensor, "..."], levels: int) -> Int[Tensor, "..."]:
    """The level that all lower ones merge into before the token at that place; 0: none does."""
    place = place.long()
    target = (place & -place).clamp(min=1).log2().long().add(1).clamp(max=levels - 1)
    return torch.where(place > 0, target, 0)


def begins(x: Inputs) -> Tensor:
    return (x["place"] == 0)[..., None, None, None]


# update: what the memory learns
def outer(M, before, x):
    return write(M, x["k"], x["v"])


def counted(M, before, x):
    return write(M, x["k"], with_one(x["v"]))


def tied(M, before, x):  # what is forgotten makes room for what is written
    return write(M, -torch.expm1(x["g"]), x["v"])


def slots(M, before, x):  # tied, with keys and values side by side in every slot
    return write(M, -torch.expm1(x["g"]), torch.cat([x["k"], x["v"]], -1))


def paired(M, before, x):  # keys among themselves, beside keys with values
    return write(M, x["beta"][..., None] * x["k"], torch.cat([x["k"], x["v"]], -1))


def real(M, before, x):  # a complex memory, a real key
    return write(M, F.pad(x["k"], (0, x["k"].shape[-1])), x["v"])


def level(M, before, x):  # a complex memory, every row the same
    above, below = M.chunk(2, -2)
    return torch.cat([above + x["v"][..., None, :], below], -2)


def delta(M, before, x):  # write the difference to what the key already finds
    return write(M, x["k"], x["beta"][..., None] * (x["v"] - look(M, x["k"])))


def foresight(M, before, x):  # the difference to what a key of its own finds before the decay
    return write(M, x["k"], x["beta"][..., None] * (x["v"] - look(before, x["a"])))


def replace(M, before, x):  # what one key finds before the decay moves to another, with a sign of its own; then write
    return write(write(M, x["b"], look(before, x["a"])), x["k"], x["v"])


def momentum(M, before, x):  # the memory follows a momentum, which follows the gradient of |kM - v|^2
    memory, speed = M.chunk(2, -2)
    surprise = x["v"] - look(before.chunk(2, -2)[0], x["k"])
    speed = write(speed, 2 * x["beta"][..., None] * x["k"], surprise)
    return torch.cat([memory + speed, speed], -2)


def lowest(M, before, x):  # into the memory of the last token alone
    return write(M, F.pad(x["k"], (0, M.shape[-2] - x["k"].shape[-1])), x["v"])


def gradient(M, before, x):  # the delta rule, its difference taken where the mini-batch began
    memory, start = M.chunk(2, -2)
    return torch.cat([write(memory, x["k"], x["beta"][..., None] * (x["v"] - look(start, x["k"]))), start], -2)


def inner(M, before, x):  # the gradient of |LN(kW) - (v - k)|^2 / 2, taken where the mini-batch began
    weights, learned = M.chunk(2, -2)
    k = with_one(x["k"])
    slope = inner_slope(look(x["W"] + weights, k), x["v"] - x["k"], x["scale"], x["shift"])
    return torch.cat([weights, write(learned, k, x["beta"][..., None] * slope)], -2)


def standard(z: Tensor) -> tuple[Tensor, Tensor]:
    """z with mean 0 and variance 1 over its last axis, and the deviation it had."""
    z = z - z.mean(-1, keepdim=True)
    deviation = (z.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return z / deviation, deviation


def inner_slope(z: Tensor, target: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The gradient of |scale · standard(z) + shift - target|² / 2 for z."""
    normal, deviation = standard(z)
    y = scale * (scale * normal + shift - target)
    along = (y * normal).mean(-1, keepdim=True)
    return (y - y.mean(-1, keepdim=True) - normal * along) / deviation


# read: what the query finds
def inclusive(M, before, x):
    return look(M, x["q"])


def ratio(M, before, x):
    return over_count(look(M, x["q"]))


def damped(M, before, x):  # ratio, of weights that may all be close to zero
    return over_count(look(M, x["q"]), 1e-5)


def bonus(M, before, x):  # the memory before this token, and this token by its own weight
    return look(write(before, x["u"] * x["k"], x["v"]), x["q"])


def above(M, before, x):  # the first of two memories, or the real part of a complex one
    return look(M.chunk(2, -2)[0], x["q"])


def real_part(M, before, x):  # Re(q M), each value channel with a complex query of its own
    parts = M.unflatten(-2, (2, -1))
    return 2 * (x["q"] * parts[..., 0, :, :] - x["p"] * parts[..., 1, :, :]).sum(-2)


def attended(M, before, x):  # softmax attention over slots, each with a key and a value
    keys, values = M.split([x["k"].shape[-1], x["v"].shape[-1]], -1)
    return look(values, look(keys.mT, x["q"]).softmax(-1))


def solved(M, before, x):  # q (G + Λ)⁻¹ M, G the keys among themselves: the least squares that M's writes ask for
    G, values = M.split([x["k"].shape[-1], x["v"].shape[-1]], -1)
    return look(values, torch.linalg.solve(G + torch.diag_embed(x["ridge"]), x["q"]))


def by_level(M, before, x):  # memories of different spans, each with its weight
    levels = M.unflatten(-2, (x["weight"].shape[-1], -1))
    return einsum(x["weight"], x["q"], levels, "b h l, b h k, b h l k v -> b h v")


def inner_read(M, before, x):  # the inner model at the query: q + LN(qW)
    weights, learned = M.chunk(2, -2)
    z = look(x["W"] + weights - x["reach"][..., None, None, None] * learned, with_one(x["q"]))
    return x["q"] + x["scale"] * standard(z)[0] + x["shift"]


# features: what queries and keys become before they meet the memory
def taylor(x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
    """taylor(q)·taylor(k) = 1 + s + s²/2, s = q·k / √d: e^s to the second order in 1 + d + d(d+1)/2 numbers (Based
    2402.18668, equation 3; equal products i, j and j, i stand once)."""
    d = x.shape[-1]
    return torch.cat([torch.ones_like(x[..., :1]), x * d**-0.25, products(x) * (2 * d) ** -0.5], -1)


def squares(x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
    """squares(q)·squares(k) = (q·k)² / d in d(d+1)/2 numbers (ReBased 2402.10644)."""
    return products(x) * x.shape[-1] ** -0.5


def products(x: Float[Tensor, "... d"]) -> Float[Tensor, "... f"]:
    """products(q)·products(k) = (q·k)²: x_i² and, for i < j, √2 x_i x_j."""
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    return x[..., i] * x[..., j] * (1 + (i != j).to(x.dtype)).sqrt()


# ---------------------------------------------------------------------------------------------------- the loop


def recurrence(
    row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None, cu_seqlens=None
) -> tuple[Float[Tensor, "b t h v"], Memory]:
    """The definition: token by token from `memory` (zeros if None). Returns outputs and the memory after the last.

    A compiler sees one graph, but not where documents are packed: their borders are read. Raises ValueError, in one
    line, for inputs that are missing or do not fit the row's shapes.
    """
    constants = constants or {}
    check(row, tokens, constants, memory, cu_seqlens)
    dtype, tokens, constants, memory = prepare(row, tokens, constants, memory, cu_seqlens)
    borders = [0, tokens["v"].shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    starts = [memory] if cu_seqlens is None else memory.split(1)
    with in_full_precision(memory):
        runs = [
            loop(row, {n: x[:, start:stop] for n, x in tokens.items()}, constants, M)
            for start, stop, M in zip(borders, borders[1:], starts, strict=False)
        ]
    return torch.cat([o for o, _ in runs], 1).to(dtype), torch.cat([M for _, M in runs])


def in_full_precision(x: Tensor):
    """Autocast off: a memory adds up thousands of tokens, which bfloat16 products would spoil."""
    return torch.autocast(x.device.type, enabled=False)


def loop(row: Row, tokens: Inputs, constants: Inputs, M: Memory) -> tuple[Tensor, Memory]:
    """The loop itself, without checks or conversions."""
    o, tokens = [], featured(row, tokens)
    for values in zip(*(x.unbind(1) for x in tokens.values()), strict=True):
        x = {**dict(zip(tokens, values, strict=True)), **constants}
        before, M = M, row.update(row.decay(M, x), M, x)
        o.append(row.read(M, before, x))
    v = tokens["v"]
    return torch.stack(o, 1) if o else v.new_zeros(v.shape), M


def featured(row: Row, tokens: Inputs) -> Inputs:
    """The tokens with the row's features of queries and keys in their place."""
    if row.features is None:
        return tokens
    return {name: row.features(x) if name in ("q", "k") else x for name, x in tokens.items()}


def step(row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None) -> tuple[Tensor, Memory]:
    """One token for each of b running sequences (t = 1): the loop's body. The memory given may be reused."""
    dtype, tokens, constants, memory = prepare(row, tokens, constants or {}, memory, None)
    with in_full_precision(memory):
        o, memory = loop(row, tokens, constants, memory)
    return o.to(dtype), memory


def empty(row: Row, tokens: Inputs, constants: Inputs | None = None, n: int | None = None) -> Memory:
    """The memory before the first token: zeros of the row's size, for n sequences (b if None)."""
    first = featured(row, {name: tokens[name][:, :1] for name in row.tokens})
    sizes: dict[str, int] = {}
    for shapes, given in ((row.tokens, first), (row.constants, constants or {})):
        for name in shapes.keys() & given.keys():
            sizes |= zip(shapes[name].split(), given[name].shape, strict=True)
    v = tokens["v"]
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    return v.new_zeros(v.shape[0] if n is None else n, *measured(f"h {row.memory}", sizes), dtype=dtype)


def measured(shape: str, sizes: Mapping[str, int]) -> list[int]:
    """The numbers of a shape such as "h 2*k v+1"."""

    def product(term: str) -> int:
        return math.prod([int(part) if part.isdigit() else sizes[part] for part in term.split("*")])

    return [sum([product(term) for term in part.split("+")]) for part in shape.split()]


def prepare(row: Row, tokens: Inputs, constants: Inputs, memory, cu_seqlens):
    """The dtype rule, once: returns the values' dtype and everything in float32 (float64 if the values are)."""
    dtype = tokens["v"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = {name: tokens[name].to(wide) for name in row.tokens}
    constants = {name: constants[name].to(wide) for name in row.constants}
    if memory is None:
        memory = empty(row, tokens, constants, None if cu_seqlens is None else len(cu_seqlens) - 1)
    return dtype, tokens, constants, memory.to(wide)


def check(row: Row, tokens: Inputs, constants: Inputs, memory, cu_seqlens) -> None:
    """One line for inputs that cannot be right, before any work."""
    sizes: dict[str, int] = {}
    for kind, wanted, given in (("tokens", row.tokens, tokens), ("constants", row.constants, constants)):
        for name, shape in wanted.items():
            if name not in given:
                raise ValueError(f"{row.title} needs {kind} {', '.join(wanted)}; {name!r} is missing")
            fit(f"{row.title}: {name}", given[name], shape, sizes)
    if cu_seqlens is not None:
        check_borders(cu_seqlens, sizes["b"], sizes["t"])
    if memory is not None:
        wanted = empty(row, tokens, constants, None if cu_seqlens is None else len(cu_seqlens) - 1).shape
        if memory.shape != wanted:
            raise ValueError(f"{row.title}: memory has shape {tuple(memory.shape)}, expected {tuple(wanted)}")


def fit(name: str, x: Tensor, shape: str, sizes: dict[str, int]) -> None:
    letters = shape.split()
    if x.ndim != len(letters):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape!r}")
    for letter, size in zip(letters, x.shape, strict=True):
        if sizes.setdefault(letter, size) != size:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {shape!r} with {letter} = {sizes[letter]}")


def check_borders(cu_seqlens: Int[Tensor, " n1"], b: int, t: int) -> None:
    """cu_seqlens must be int32, start at 0, never fall and end at t, and the batch must be one row."""
    if b != 1:
        raise ValueError(f"cu_seqlens packs documents into one row: expected b = 1, got b = {b}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must be int32 with at least 2 entries, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != t or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to t = {t}, got {cu_seqlens.tolist()}")
