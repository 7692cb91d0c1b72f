"""Memories scanned element by element: every element fades, or turns too, at a rate of its own."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fast.kernels import scan as kernels
from fast.operators import differentiated, of_dtype, operator, packed
from reference import printed
from reference import recurrence as words
from reference.recurrence import Inputs, Row


class Elements(NamedTuple):
    """M_t = a_t ⊙ M_{t-1} + k_tᵀ v_t, o_t = q_t M_t, where a_t, a number an element, is

        rate     e^{A dt}          A of an element, dt of a token and column
        erase    1 - k² dt         k² of a row, dt of a column
        pace     e^{A dt}          A of an element, dt of a token and row
        full     e^G               G of an element and token
        spiral   e^{g + i θ}       of an element, no token's; M complex, k is 1, q + i p an element's: o = 2 Re(q M)

    `rows`, `columns` and `fixed` hold what a_t (and a spiral's read) is made of; what a kind does not have is None.
    """

    kind: int
    v: Float[Tensor, "b t h v"]
    q: Float[Tensor, "b t h k"] | None = None
    k: Float[Tensor, "b t h k"] | None = None
    rows: Float[Tensor, "b t h k"] | None = None
    columns: Float[Tensor, "b t h v"] | None = None
    fixed: Float[Tensor, "n h k v"] | Float[Tensor, "b t h k v"] | None = None

    @staticmethod
    def finish(o: Tensor) -> Tensor:
        return o


def turned(g: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """e^{g + i θ} in two parts."""
    size = g.exp()
    return size * theta.cos(), size * theta.sin()


# the words of a row -> its kind, and the inputs by which a_t is made
FORM: dict[tuple[Callable, ...], Callable[[Inputs], dict]] = {
    (words.element, words.outer, words.inclusive): lambda x: {
        "kind": kernels.RATE.value,
        "columns": x["dt"],
        "fixed": x["A"][None],
    },
    (words.erased, words.outer, words.inclusive): lambda x: {"kind": kernels.ERASE.value, "columns": x["dt"]},
    (printed.stepped, printed.paced, words.inclusive): lambda x: {
        "kind": kernels.PACE.value,
        "k": (x["dt"] * x["k"]).to(x["k"].dtype),
        "rows": x["dt"],
        "fixed": x["A"][None],
    },
    (printed.full, words.outer, words.inclusive): lambda x: {"kind": kernels.FULL.value, "fixed": x["G"]},
    (words.spiral, words.level, words.real_part): lambda x: {
        "kind": kernels.SPIRAL.value,
        # an error of z grows with every token: no larger than its last rounding
        "fixed": torch.stack([*(z.float() for z in turned(x["g"].double(), x["theta"].double())), x["q"], x["p"]]),
    },
}


def has_form(row: Row) -> bool:
    return row[:3] in FORM


def form(row: Row, x: Inputs) -> Elements:
    """The row's tokens and constants (all in x), as its elements see them."""
    x = {name: y if name in ("q", "k", "v") and name in row.tokens else y.float() for name, y in x.items()}
    tokens = {name: x[name] for name in ("q", "k", "v") if name in row.tokens}
    return Elements(**(tokens | FORM[row[:3]](x)))


def takes(x) -> bool:
    return isinstance(x, Elements)


def fits(title: str, x: Elements) -> None:
    """One line where the memory has more rows than a program holds."""
    size, most = kernels.keys_of(x.k, x.fixed), kernels.largest(x.kind)
    if size > most:
        raise ValueError(f"{title}: K = {size}, fast kernels take at most {most}; use the backend 'reference'")


def run(x: Elements, memory: Tensor | None, cu_seqlens: Tensor | None, sequences: int, wide: bool):
    segments = kernels.segments_for(x.kind, x.k, x.v, x.fixed, sequences)
    given = (x.q, x.k, x.v, x.rows, x.columns, x.fixed, memory)
    keep = differentiated(*given)
    o, last, *_ = scan(x.kind, *given, cu_seqlens, segments, keep)
    return o, last


def step(x: Elements, memory: Tensor) -> Tensor:
    return scan_step(x.kind, x.q, x.k, x.v, x.rows, x.columns, x.fixed, memory)[:, 0]


# ------------------------------------------------------------------------------------- the operators, as torch sees


@operator("scan")
def scan(
    kind: int,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    fixed: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments, what segments leave of one, marks). `keep`: a gradient will
    be wanted."""
    return kernels.forward(kind, *packed(q, k, v, rows, columns, fixed, memory, cu_seqlens), segments, keep)


@scan.register_fake
def _(kind, q, k, v, rows, columns, fixed, memory, cu_seqlens, segments, keep):
    n, h = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, v.shape[2]
    size = (kernels.memories(kind) * kernels.keys_of(k, fixed), v.shape[3])
    last = v.new_empty(n, h, *size, dtype=torch.float32)
    states = last.new_empty((n, h, segments + 1, *size) if segments > 1 else (0,))
    totals = last.new_empty((n, h, segments, *size) if segments > 1 else (0,))
    return torch.empty_like(v), last, states, totals, last.new_empty(kernels.marks_of(kind, k, v, fixed, n, keep))


@operator("scan_gradients")
def scan_gradients(
    do: Tensor,
    dlast: Tensor | None,
    kind: int,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    fixed: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    states: Tensor,
    totals: Tensor,
    marks: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, drows, dcolumns, dfixed, dmemory), empty for what the kind does not have."""
    do, dlast = packed(of_dtype(do, v.dtype), dlast)
    given = packed(q, k, v, rows, columns, fixed, memory, cu_seqlens)
    grads = kernels.backward(do, dlast, kind, *given, last, states, totals, marks)
    return tuple(last.new_empty(0) if y is None else y for y in grads)


@scan_gradients.register_fake
def _(do, dlast, kind, q, k, v, rows, columns, fixed, memory, cu_seqlens, last, states, totals, marks):
    grads = (last.new_empty(0) if y is None else torch.empty_like(y) for y in (q, k, v, rows, columns, fixed))
    return *grads, torch.empty_like(last)


def scan_context(ctx, inputs, output) -> None:
    kind, *given, _, keep = inputs
    if not keep:
        raise RuntimeError("a scan's gradient needs what its forward pass kept: call it with keep = True")
    ctx.kind = kind
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *output[1:])


def scan_backward(ctx, do, dlast, *_):
    saved = ctx.saved_tensors
    given = saved[:7]
    do = torch.zeros_like(given[2]) if do is None else do
    grads = scan_gradients(do, dlast, ctx.kind, *saved)
    wanted = zip(grads, given, ctx.needs_input_grad[1:8], strict=True)
    return None, *(dy if want else None for dy, _, want in wanted), None, None, None


scan.register_autograd(scan_backward, setup_context=scan_context)


@operator("scan_step", "memory")
def scan_step(
    kind: int,
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    fixed: Tensor | None,
    memory: Tensor,
) -> Tensor:
    """o : b 1 h v, in float32, of one token (inputs b 1 h ·); memory is overwritten."""
    return kernels.step(kind, q, k, v, rows, columns, fixed, memory)


@scan_step.register_fake
def _(kind, q, k, v, rows, columns, fixed, memory):
    return torch.empty_like(v, dtype=torch.float32)
