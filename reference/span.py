"""What a run of tokens does to the memory: one affine map, M -> A ⋄ M + S, and how such maps compose.

    token    chunk (64 tokens)    segment of a GPU's work    a rank's part of the sequence    everything so far

are all spans: the loop, the chunk form, the kernels, sequence parallelism and the decode state are this one algebra.

A has the shape of its class, from a number a head (all keys forget alike) to a matrix (a delta rule mixes the keys).
The last lines of the table below say which class a row belongs to; a row whose step is not affine in its memory has
none, and no span.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from reference import printed
from reference import recurrence as words
from reference.recurrence import Inputs, Memory, Row, check, empty, prepare

# ----------------------------------------------------------------------------------- the classes of A, and their laws


class Transition(NamedTuple):
    """One class of A: how it acts on a memory, its adjoint, its product, and its gradient."""

    shape: str  # behind b, in the letters h, k and v of a memory b h k v
    act: Callable[[Tensor, Memory], Memory]  # A ⋄ M
    adjoint: Callable[[Tensor, Memory], Memory]  # Aᵀ ⋄ D
    product: Callable[[Tensor, Tensor], Tensor]  # A₂ A₁: first A₁, then A₂
    gradient: Callable[[Tensor, Memory, Memory], Tensor]  # from A, D, the cotangent of A ⋄ M, and M


def elementwise(spread: Callable[[Tensor], Tensor], shape: str) -> Transition:
    """A class whose A holds numbers that multiply the memory's; `spread` gives them its axes."""
    return Transition(
        shape,
        lambda A, M: spread(A) * M,
        lambda A, D: spread(A) * D,
        lambda later, earlier: later * earlier,
        lambda A, D, M: einsum(D, M, f"b h k v, b h k v -> b {shape}"),
    )


def pair(x: Tensor, axis: int) -> Tensor:
    """The complex tensor whose real parts stand before its imaginary parts along the axis."""
    return torch.complex(*x.chunk(2, axis))


def parted(z: Tensor, axis: int) -> Tensor:
    return torch.cat([z.real, z.imag], axis)


def rotation(axis: int) -> Transition:
    """Complex numbers, a row of the memory each (axis -1 of A) or an element each (axis -2)."""

    def spread(A):
        return pair(A, axis)[..., None] if axis == -1 else pair(A, axis)

    def gradient(A, D, M):
        turned = pair(D, -2) * pair(M, -2).conj()
        return parted(turned.sum(-1) if axis == -1 else turned, axis)

    return Transition(
        "h k" if axis == -1 else "h k v",
        lambda A, M: parted(spread(A) * pair(M, -2), -2),
        lambda A, D: parted(spread(A).conj() * pair(D, -2), -2),
        lambda later, earlier: parted(pair(later, axis) * pair(earlier, axis), axis),
        gradient,
    )


def rows_and_columns(A: Tensor, M: Memory) -> tuple[Tensor, Tensor]:
    """A number for each row of M and one for each column, of an A that holds both side by side."""
    row, column = A.split(list(M.shape[-2:]), -1)
    return row[..., :, None], column[..., None, :]


def cross_gradient(A: Tensor, D: Memory, M: Memory) -> Tensor:
    row, column = rows_and_columns(A, M)
    return torch.cat([(D * M * column).sum(-1), (D * M * row).sum(-2)], -1)


def crossed(A: Tensor, M: Memory) -> Memory:
    row, column = rows_and_columns(A, M)
    return row * M * column


def with_levels(A: Tensor, M: Memory) -> Float[Tensor, "b h l k v"]:
    return M.unflatten(-2, (A.shape[-1], -1))


def levels(A: Float[Tensor, "b h l l"], M: Memory) -> Memory:
    """A mixes the memories that stand above each other, whole."""
    return einsum(A, with_levels(A, M), "b h new old, b h old k v -> b h new k v").flatten(-3, -2)


TRANSITION = {
    "scalar": elementwise(lambda A: A[..., None, None], "h"),
    "channel": elementwise(lambda A: A[..., None], "h k"),
    "element": elementwise(lambda A: A, "h k v"),
    "cross": Transition("h k+v", crossed, crossed, lambda later, earlier: later * earlier, cross_gradient),
    "rotation": rotation(-1),
    "spiral": rotation(-2),
    "levels": Transition(
        "h l l",
        levels,
        lambda A, D: levels(A.mT, D),
        lambda later, earlier: later @ earlier,
        lambda A, D, M: einsum(with_levels(A, D), with_levels(A, M), "b h new k v, b h old k v -> b h new old"),
    ),
    "matrix": Transition(
        "h k k",
        lambda A, M: A @ M,
        lambda A, D: A.mT @ D,
        lambda later, earlier: later @ earlier,
        lambda A, D, M: D @ M.mT,
    ),
}

# word -> the class of A. An update's word goes before a decay's; None: not affine.
KIND = {
    words.keep: "scalar",
    words.fixed: "scalar",
    words.scalar: "scalar",
    words.channel: "channel",
    words.cross: "cross",
    words.element: "element",
    printed.timed: "scalar",
    printed.stepped: "element",
    printed.full: "element",
    words.erased: "element",
    words.rotating: "rotation",
    words.spiral: "spiral",
    words.delta: "matrix",
    words.foresight: "matrix",
    words.replace: "matrix",
    words.momentum: "matrix",
    words.gradient: "matrix",
    printed.independent: "matrix",
    printed.ascent: "matrix",
    words.merging: "levels",
    words.inner: None,
}


def transition(row: Row) -> str | None:
    """The class of the row's A in M -> A ⋄ M + S, a key of `TRANSITION`; None if its step is not affine."""
    return KIND[row.update] if row.update in KIND else KIND[row.decay]


# ----------------------------------------------------------------------------------------------------- the algebra


class Span(NamedTuple):
    """What a run of tokens does to a memory: M -> A ⋄ M + S. Float32 (float64 if the inputs are).

    A : b and the shape of its class; S : b h k v, as the memory.
    A border of documents inside the run, or before its first token, makes A zero: nothing before it remains.
    """

    A: Tensor
    S: Memory
    kind: str


class Ends(NamedTuple):
    """A backend's way to both ends of a run of tokens without the outputs between them, and without gradients."""

    takes: Callable[[Row, Inputs], bool]  # whether it has one for this row and these tokens
    span: Callable  # (row, tokens, constants, cu_seqlens) -> (what the tokens do to a memory, what `received` needs)
    received: Callable  # (row, tokens, constants, do, cu_seqlens, that) -> what the memory before them gets: n h k v


def apply(span: Span, M: Memory) -> Memory:
    """A ⋄ M + S."""
    return TRANSITION[span.kind].act(span.A, M) + span.S


def compose(later: Span, earlier: Span) -> Span:
    """The span of both: (A₂ A₁, A₂ ⋄ S₁ + S₂). Associative, not commutative."""
    return Span(TRANSITION[later.kind].product(later.A, earlier.A), apply(later, earlier.S), later.kind)


def fold(spans: list[Span], M: Memory) -> list[Memory]:
    """The memories before each span, and after the last: M, A₁ ⋄ M + S₁, ... (one more than there are spans)."""
    memories = [M]
    for span in spans:
        memories.append(apply(span, memories[-1]))
    return memories


def fold_back(spans: list[Span], G: list[Memory], D: Memory) -> list[Memory]:
    """The cotangents of `fold`'s memories, from G, what each memory receives from its own span's outputs, and D,
    what the last memory receives: D_i = G_i + A_iᵀ ⋄ D_{i+1} (one more than there are spans)."""
    cotangents = [D]
    for span, own in zip(reversed(spans), reversed(G), strict=True):
        cotangents.append(own + TRANSITION[span.kind].adjoint(span.A, cotangents[-1]))
    return cotangents[::-1]


# ------------------------------------------------------------------------------------------------ the span of tokens
# Decays multiply, so their logarithms add up: all that a run of tokens leaves of each part of the memory.


def turned(g: Tensor, theta: Tensor, axis: int) -> Tensor:
    return torch.cat([g.exp() * theta.cos(), g.exp() * theta.sin()], axis)


def within_turn(angle: Tensor) -> Tensor:
    """Angles come in float64: after 65,536 tokens a float32 sum would be off by hundredths of a radian."""
    return angle.remainder(2 * math.pi)


class Brief(NamedTuple):
    """A large A that a few numbers of the tokens and the row's constants, which everybody has, make up."""

    sums: Callable[[Inputs], Float[Tensor, "b n"]]
    constants: tuple[str, ...]
    rebuilt: Callable[..., Tensor]  # (sums, *constants) -> A


def spiral_of(count: Float[Tensor, "b 1"], g: Tensor, theta: Tensor) -> Tensor:
    count = count[..., None, None]
    return turned(g * count, within_turn(theta.double() * count).to(g.dtype), -2)


BRIEF = {  # by the name of the decay
    "element": Brief(
        lambda x: x["dt"].sum(1).flatten(1),
        ("A",),
        lambda sums, A: (A * rearrange(sums, "b (h v) -> b h 1 v", h=A.shape[0])).exp(),
    ),
    "stepped": Brief(
        lambda x: x["dt"].sum(1).flatten(1),
        ("A",),
        lambda sums, A: (A * rearrange(sums, "b (h k) -> b h k 1", h=A.shape[0])).exp(),
    ),
    "spiral": Brief(
        lambda x: x["v"].new_full((x["v"].shape[0], 1), x["v"].shape[1]),
        ("g", "theta"),
        spiral_of,
    ),
}


def brief(row: Row, tokens: Inputs, constants: Inputs, cu_seqlens=None) -> tuple[Tensor, list[Tensor], str] | None:
    """(the sums, and 0 behind them if a border makes A zero, else 1; the constants; the key of `BRIEF`) from which
    `rebuilt` makes the span's A, or None for a row whose A is small or known by its tokens alone."""
    name = row.decay.__name__
    if name not in BRIEF:
        return None
    _, tokens, constants, _ = prepare(row, tokens, constants, None, None)
    whole = cu_seqlens is None or len(cu_seqlens) == 2
    sums = BRIEF[name].sums(tokens).detach()
    return F.pad(sums, (0, 1), value=float(whole)), [constants[n].detach() for n in BRIEF[name].constants], name


def rebuilt(sums: Float[Tensor, "b n1"], constants: list[Tensor], name: str) -> Tensor:
    A = BRIEF[name].rebuilt(sums[:, :-1], *constants)
    return A * sums[:, -1, None, None, None]


def summed_up(word: Callable) -> Callable[[Inputs], Tensor]:
    """The A of a word that has a brief form."""
    whole = BRIEF[word.__name__]
    return lambda x: whole.rebuilt(whole.sums(x), *(x[name] for name in whole.constants))


def merged(x: Inputs) -> Float[Tensor, "b h l l"]:
    """What all merges do, which is what the highest of them does, times what all gates leave."""
    place = x["place"].long()
    highest = F.pad(place & -place, (1, 0)).amax(1)  # the lowest set bit of each place says how high it merges
    A = words.merges(highest, x["weight"].shape[-1]).to(x["g"].dtype)
    return x["g"].sum(1).exp()[..., None, None] * A[:, None]


LEFT = {
    words.keep: lambda x: x["v"].new_ones(x["v"].shape[0], x["v"].shape[2]),
    words.fixed: lambda x: x["g"].expand(x["v"].shape[:3]).sum(1).exp(),
    words.scalar: lambda x: x["g"].sum(1).exp(),
    words.channel: lambda x: x["g"].sum(1).exp(),
    words.cross: lambda x: torch.cat([x["g"].sum(1), x["f"].sum(1)], -1).exp(),
    words.element: summed_up(words.element),
    printed.timed: lambda x: (x["A"] * x["beta"].sum(1)).exp(),
    printed.stepped: summed_up(printed.stepped),
    printed.full: lambda x: x["G"].sum(1).exp(),
    words.rotating: lambda x: turned(x["g"].sum(1), within_turn(x["theta"].double().sum(1)).to(x["g"].dtype), -1),
    words.merging: merged,
    words.spiral: summed_up(words.spiral),
}


def span(
    row: Row, tokens: Inputs, constants: Inputs | None = None, cu_seqlens=None, run=words.recurrence, look=check
) -> Span:
    """What these tokens do to a memory. S is the run from an empty memory; A never depends on v.

    Decays multiply: A = exp(sum of g). A delta rule's A is found by the same run: from the memory [I 0] with values
    [0 v] it ends at [A S]. With several documents only the last one counts, and A = 0.
    Raises ValueError, in one line, for a row that is not affine in its memory: it has no span.
    """
    constants, kind = constants or {}, transition(row)
    if kind is None:
        raise ValueError(
            f"{row.title} is not affine in its memory: a run of tokens is no span, so its sequence cannot be cut; "
            "use another row, or keep sequences whole"
        )
    look(row, tokens, constants, None, cu_seqlens)
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        start = int(cu_seqlens[-2])
        last = span(row, {name: x[:, start:] for name, x in tokens.items()}, constants, None, run, look)
        return last._replace(A=torch.zeros_like(last.A))
    if kind == "matrix":
        return Span(*span_of_matrix(row, tokens, constants, run), kind)
    S = run(row, tokens, constants)[1]
    _, tokens, constants, _ = prepare(row, tokens, constants, S, None)
    return Span(left(row, tokens, constants, S, run), S, kind)


def left(row: Row, tokens: Inputs, constants: Inputs, S: Memory, run) -> Tensor:
    """A: the sum of all decays; or, where none is known, what the run leaves of ones when it writes nothing."""
    if row.decay in LEFT:
        return LEFT[row.decay]({**tokens, **constants})
    return run(row, {**tokens, "v": torch.zeros_like(tokens["v"])}, constants, torch.ones_like(S))[1]


def span_of_matrix(row: Row, tokens: Inputs, constants: Inputs, run) -> tuple[Tensor, Memory]:
    M = empty(row, tokens, constants)
    b, h, k, v = M.shape
    eye = torch.eye(k, dtype=M.dtype, device=M.device).expand(b, h, k, k)
    wide = F.pad(tokens["v"], (k, 0))
    A, S = run(row, {**tokens, "v": wide}, constants, torch.cat([eye, M], -1))[1].split([k, v], -1)
    return A, S
