"""Every linear sequence model is one loop over a memory that is a matrix.

    M_t = update(decay(M_{t-1}, x_t), M_{t-1}, x_t)        memory   M : b h k v
    o_t = read(M_t, M_{t-1}, x_t)                          output   o : b h v

A model is a row of three words: how its memory decays, what is written, how it is read. The words come first, then
the loop, then the algebra of spans: what a run of tokens does to the memory, M -> A ⋄ M + S, and how runs compose.

    b batch   t time   h heads   k key size   v value size   n documents
    q query   k key    v value   g log decay (natural log, -inf <= g <= 0)   beta write strength   u bonus

`tokens` are the inputs with a time axis (b t ...), `constants` those without one (slopes, u). The memory and all
arithmetic are float32 (float64 if the inputs are), outputs come back in the queries' dtype. Packed documents: b = 1
and `cu_seqlens` holds their borders (int32, n + 1 entries, equal neighbours are empty documents); memories then have
n in place of b.
"""

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
    """One model of the table: three words, the shapes of its inputs, where it comes from."""

    decay: Callable[[Memory, Inputs], Memory]
    update: Callable[[Memory, Memory, Inputs], Memory]
    read: Callable[[Memory, Memory, Inputs], Tensor]
    tokens: Mapping[str, str]
    constants: Mapping[str, str]
    mixer: str  # the published layer around the row, "file:Class" below reference/mixers
    title: str
    paper: str


# ---------------------------------------------------------------------------------------------------- the words


def look(M: Memory, q: Float[Tensor, "b h k"]) -> Float[Tensor, "b h v"]:
    return einsum(q, M, "b h k, b h k v -> b h v")


def write(M: Memory, k: Float[Tensor, "b h k"], v: Float[Tensor, "b h v"]) -> Memory:
    return M + einsum(k, v, "b h k, b h v -> b h k v")


def with_one(v: Tensor) -> Tensor:
    """v and a column of ones, which counts: the same recurrence then sums the weights (a normaliser)."""
    return F.pad(v, (0, 1), value=1.0)


def over_count(o: Tensor) -> Tensor:
    """The weighted sum over the sum of the weights. The weights must be positive."""
    return o[..., :-1] / (o[..., -1:] + 1e-10)


# decay: what the memory forgets
def keep(M, x):
    return M


def fixed(M, x):  # one number a head, the same for every token
    return x["g"].exp()[:, None, None] * M


def scalar(M, x):  # one number a head and token
    return x["g"].exp()[..., None, None] * M


def channel(M, x):  # one number a key channel and token
    return x["g"].exp()[..., None] * M


# update: what the memory learns
def outer(M, before, x):
    return write(M, x["k"], x["v"])


def counted(M, before, x):
    return write(M, x["k"], with_one(x["v"]))


def tied(M, before, x):  # what is forgotten makes room for what is written
    return write(M, -torch.expm1(x["g"]), x["v"])


def delta(M, before, x):  # write the difference to what the key already finds
    return write(M, x["k"], x["beta"][..., None] * (x["v"] - look(M, x["k"])))


# read: what the query finds
def inclusive(M, before, x):
    return look(M, x["q"])


def ratio(M, before, x):
    return over_count(look(M, x["q"]))


def bonus(M, before, x):  # the memory before this token, and this token by its own weight
    return look(write(before, x["u"] * x["k"], x["v"]), x["q"])


# ------------------------------------------------------------------------------------------- the words, unrolled
# What each word contributes when many tokens are taken at once: the row's normal form. The chunk form, the spans
# and the kernels start from here, so that a new row needs nothing but its three words.


class Normal(NamedTuple):
    """M_t = e^g M̂ + k^T v, or with beta M̂ = e^g M, M_t = M̂ + beta k^T (v - k M̂); o = finish(q M_t).

    With u the read is exclusive: o = q M_{t-1} + (q u . k) v.
    """

    q: Float[Tensor, "b t h k"]
    k: Float[Tensor, "b t h k"]
    v: Float[Tensor, "b t h v"]
    g: Float[Tensor, "b t h"] | Float[Tensor, "b t h k"] | None
    beta: Float[Tensor, "b t h"] | None
    u: Float[Tensor, "h k"] | None
    finish: Callable[[Tensor], Tensor]


LOG_DECAY = {
    keep: lambda x: None,
    fixed: lambda x: x["g"].expand(x["v"].shape[:3]),
    scalar: lambda x: x["g"],
    channel: lambda x: x["g"],
}
WRITTEN = {
    outer: lambda x: (x["k"], x["v"], None),
    counted: lambda x: (x["k"], with_one(x["v"]), None),
    tied: lambda x: (-torch.expm1(x["g"]), x["v"], None),
    delta: lambda x: (x["k"], x["v"], x["beta"]),
}
ASKED = {
    inclusive: lambda x: (None, lambda o: o),
    ratio: lambda x: (None, over_count),
    bonus: lambda x: (x["u"], lambda o: o),
}


def normal(row: Row, x: Inputs) -> Normal:
    """The row's tokens (and constants, all in x) in normal form."""
    k, v, beta = WRITTEN[row.update](x)
    u, finish = ASKED[row.read](x)
    return Normal(x["q"], k, v, LOG_DECAY[row.decay](x), beta, u, finish)


def transition(row: Row) -> str:
    """The class of the row's A in M -> A ⋄ M + S, a key of `TRANSITION`."""
    if row.update is delta:
        return "matrix"
    return "channel" if row.decay is channel else "scalar"


# ---------------------------------------------------------------------------------------------------- the loop


def recurrence(
    row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None, cu_seqlens=None
) -> tuple[Float[Tensor, "b t h v"], Memory]:
    """The definition: token by token from `memory` (zeros if None). Returns outputs and the memory after the last.

    Raises ValueError, in one line, for inputs that are missing or do not fit the row's shapes.
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
    o = []
    for values in zip(*(x.unbind(1) for x in tokens.values()), strict=True):
        x = {**dict(zip(tokens, values, strict=True)), **constants}
        before, M = M, row.update(row.decay(M, x), M, x)
        o.append(row.read(M, before, x))
    v = tokens["v"]
    return torch.stack(o, 1) if o else v.new_zeros(v.shape), M


def step(row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None) -> tuple[Tensor, Memory]:
    """One token for each of b running sequences (t = 1): the loop's body. The memory given may be reused."""
    dtype, tokens, constants, memory = prepare(row, tokens, constants or {}, memory, None)
    with in_full_precision(memory):
        o, memory = loop(row, tokens, constants, memory)
    return o.to(dtype), memory


def empty(row: Row, tokens: Inputs, n: int | None = None) -> Memory:
    """The memory before the first token: zeros of the row's size, for n sequences (b if None)."""
    first = {name: x[:, :1] for name, x in tokens.items()}
    k, v, _ = WRITTEN[row.update](first)
    b, _, h, size = k.shape
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    return v.new_zeros(b if n is None else n, h, size, v.shape[-1], dtype=dtype)


def prepare(row: Row, tokens: Inputs, constants: Inputs, memory, cu_seqlens):
    """The dtype rule, once: returns the queries' dtype and everything in float32 (float64 if the queries are)."""
    dtype = tokens["q"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens = {name: tokens[name].to(wide) for name in row.tokens}
    constants = {name: constants[name].to(wide) for name in row.constants}
    if memory is None:
        memory = empty(row, tokens, None if cu_seqlens is None else len(cu_seqlens) - 1)
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
        wanted = empty(row, tokens, None if cu_seqlens is None else len(cu_seqlens) - 1).shape
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


# ----------------------------------------------------------------------------------------- the algebra of spans


class Transition(NamedTuple):
    """One class of A: how it acts on a memory, its adjoint, its product, and its gradient."""

    shape: str
    act: Callable[[Tensor, Memory], Memory]  # A ⋄ M
    adjoint: Callable[[Tensor, Memory], Memory]  # Aᵀ ⋄ D
    product: Callable[[Tensor, Tensor], Tensor]  # A₂ A₁: first A₁, then A₂
    gradient: Callable[[Memory, Memory], Tensor]  # from D, the cotangent of A ⋄ M, and M


TRANSITION = {
    "scalar": Transition(
        "b h",
        lambda A, M: A[..., None, None] * M,
        lambda A, D: A[..., None, None] * D,
        lambda later, earlier: later * earlier,
        lambda D, M: einsum(D, M, "b h k v, b h k v -> b h"),
    ),
    "channel": Transition(
        "b h k",
        lambda A, M: A[..., None] * M,
        lambda A, D: A[..., None] * D,
        lambda later, earlier: later * earlier,
        lambda D, M: einsum(D, M, "b h k v, b h k v -> b h k"),
    ),
    "matrix": Transition(
        "b h k k",
        lambda A, M: A @ M,
        lambda A, D: A.mT @ D,
        lambda later, earlier: later @ earlier,
        lambda D, M: D @ M.mT,
    ),
}


class Span(NamedTuple):
    """What a run of tokens does to a memory: M -> A ⋄ M + S. Float32 (float64 if the inputs are).

    A has the shape of its class: b h (scalar), b h k (channel) or b h k k (matrix). S : b h k v.
    A border of documents inside the run, or before its first token, makes A zero: nothing before it remains.
    """

    A: Tensor
    S: Memory
    kind: str


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


def span(row: Row, tokens: Inputs, constants: Inputs | None = None, cu_seqlens=None, run=recurrence) -> Span:
    """What these tokens do to a memory. S is the run from an empty memory; A never depends on v.

    Decays multiply: A = exp(sum of g). A delta rule's A is found by the same run: from the memory [I 0] with values
    [0 v] it ends at [A S]. With several documents only the last one counts, and A = 0.
    """
    constants = constants or {}
    check(row, tokens, constants, None, cu_seqlens)
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        start = int(cu_seqlens[-2])
        last = span(row, {name: x[:, start:] for name, x in tokens.items()}, constants, run=run)
        return last._replace(A=torch.zeros_like(last.A))
    kind = transition(row)
    if kind == "matrix":
        return Span(*span_of_matrix(row, tokens, constants, run), kind)
    S = run(row, tokens, constants)[1]
    g = LOG_DECAY[row.decay]({**tokens, **constants})
    A = S.new_ones(S.shape[:2]) if g is None else g.to(S.dtype).sum(1).exp()
    return Span(A, S, kind)


def span_of_matrix(row: Row, tokens: Inputs, constants: Inputs, run) -> tuple[Tensor, Memory]:
    M = empty(row, tokens)
    b, h, k, _ = M.shape
    eye = torch.eye(k, dtype=M.dtype, device=M.device).expand(b, h, k, k)
    v = F.pad(tokens["v"], (k, 0))
    A, S = run(row, {**tokens, "v": v}, constants, torch.cat([eye, M], -1))[1].split([k, M.shape[-1]], -1)
    return A, S
