"""`reference.recurrence` on Triton kernels: the same functions, the same rows, the same answers.

A row is brought to its normal form (`reference.normal`) and the form says which family of kernels runs it: memories
that fade as a whole (`fast/decay.py`) or channel by channel (`fast/channel.py`), delta rules (`fast/delta.py`), or
whatever else changes by a rank one (`fast/rank_one.py`). What fades by row and by column, or turns by row, has no such
form, but one of its own (`fast/cross.py`); so have what fades or turns element by element (`fast/scan.py`), weighted
means (`fast/ratio.py`), slots, two memories that fade by channel (`fast/slots.py`), and rows whose queries and keys
have features (`fast/features.py`). Whatever no family takes raises; nothing falls back.

Queries, keys and values are float32, bfloat16 or float16 and all alike; sums, gates, write strengths and memories are
float32. A family is two operators for torch (forward and gradient) with shape rules, so that `torch.compile` sees
whole graphs, and a third for one token; its kernels are in the file of its name in `fast/kernels/`.
"""

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from fast import channel, cross, decay, delta, features, rank_one, ratio, scan, slots
from fast.kernels import decay as kernels
from fast.kernels.delta import FOLDED
from fast.local import DTYPES, runnable
from fast.operators import differentiated, even, of_dtype, small_enough
from reference import recurrence as words
from reference import span as spans
from reference.lsm import LSM
from reference.normal import PASSED_ON, Normal, is_plain, normal, passes_on
from reference.ops import observed
from reference.recurrence import Inputs, Memory, Row, check, empty, fixed

OWN = (ratio, cross, scan, slots, features)  # families whose form is not the normal one
FAMILIES = (*OWN, decay, channel, delta, rank_one)
Form = Normal | ratio.Ratio | cross.Gated | scan.Elements | slots.Slots | features.Polynomial


def recurrence(
    row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None, cu_seqlens=None
) -> tuple[Float[Tensor, "b t h v"], Memory]:
    """The row from `memory` (zeros if None): outputs, and the memory after the last token, as the reference's.

    Raises in one line, before any launch: ValueError for inputs that do not fit the row, a dtype or a device without
    kernels; NotImplementedError for a row without one. Borders that lie on the GPU are not read here (that would
    wait for it): the kernels clamp them to the sequence.
    """
    constants = constants or {}
    x, family, sequences = computable(row, tokens, constants, memory, cu_seqlens)
    wide = row.read not in PASSED_ON  # something is still to be computed from o
    memory = None if memory is None else memory.float()
    if not isinstance(x, Normal):  # no products, whose rows must be even
        return family.run(ready(row, x, constants, same), memory, cu_seqlens, sequences, wide)
    K, V = x.q.shape[-1], x.v.shape[-1]
    if memory is not None:
        memory = even(memory, -K % 16).contiguous()
    o, last = family.run(ready(row, x, constants, even), memory, cu_seqlens, sequences, wide)
    if o.shape[-1] != V or last.shape[-2] != K:  # a slice that is the whole would be one more step backwards
        o, last = o[..., :V], last[..., :K, :V]
    return of_dtype(x.finish(o), x.q.dtype), last


def step(row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None) -> tuple[Tensor, Memory]:
    """One token for each of b running sequences (t = 1). A float32 memory is overwritten and returned.

    With gradients wanted it is `recurrence` over one token, and nothing is overwritten.
    """
    constants = constants or {}
    if differentiated(*tokens.values(), *constants.values(), memory):
        return recurrence(row, tokens, constants, memory)
    x, family, _ = computable(row, tokens, constants, memory, None)
    if x.v.shape[1] != 1:
        raise ValueError(f"{row.title}: step takes one token, got t = {x.v.shape[1]}; use recurrence")
    memory = empty(row, tokens, constants) if memory is None else memory.float().contiguous()
    one = ready(row, x, constants, same)
    if isinstance(x, Normal):
        one = one._replace(**{n: y[:, 0].contiguous() for n, y in tensors_of(one).items() if n != "u" and y.ndim > 2})
    return x.finish(family.step(one, memory)[:, None]).to(x.v.dtype), memory


def span(row: Row, tokens: Inputs, constants: Inputs | None = None, cu_seqlens=None) -> spans.Span:
    """`reference.span.span`, with the kernels' run inside."""
    return spans.span(row, tokens, constants, cu_seqlens, recurrence, checked)


def has_ends(row: Row, tokens: Inputs) -> bool:
    """Rows in normal form, of as many key channels as segments of a sequence may have."""
    return passes_on(row) and kernels.padded(tokens["q"].shape[-1]) <= FOLDED


def span_alone(row: Row, tokens: Inputs, constants: Inputs, cu_seqlens) -> tuple[spans.Span, list[Tensor]]:
    """`span` without outputs and without a gradient, and without a wait for borders: of several documents all are
    run, and the last one counts."""
    x, family, sequences = computable(row, tokens, constants, None, cu_seqlens)
    one = ready(row, x, constants, even)
    K, V, kind = tokens["q"].shape[-1], tokens["v"].shape[-1], spans.transition(row)
    S, kept = family.span(one, cu_seqlens, sequences)
    if kind == "matrix":
        A, *kept = kept
        A = A[-1:, :, :K, :K] if cu_seqlens is not None else A[..., :K, :K]
    else:
        A = spans.LEFT[row.decay]({**tokens, **constants}).float()
    if cu_seqlens is not None and len(cu_seqlens) > 2:
        A, S = torch.zeros_like(A), S[-1:]
    return spans.Span(A, S[..., :K, :V], kind), kept


def received(
    row: Row, tokens: Inputs, constants: Inputs, do: Tensor, cu_seqlens, kept: list[Tensor]
) -> Float[Tensor, "n h k v"]:
    """What the memory before these tokens receives from their outputs' cotangents; of each document."""
    x, family, sequences = computable(row, tokens, constants, None, cu_seqlens)
    one = ready(row, x, constants, even)
    K, V = tokens["q"].shape[-1], do.shape[-1]
    G = family.received(one, even(do.to(one.v.dtype)), cu_seqlens, sequences, *kept)
    return G[..., :K, :V]


ends = spans.Ends(has_ends, span_alone, received)


# ------------------------------------------------------------------------------------------- what can be computed


class Found(NamedTuple):
    """What has been found out about inputs that were right. The row is kept, so that its id stays its own."""

    row: Row
    form: Callable[[Row, Inputs], Form]
    family: ModuleType


FOUND: dict[tuple, Found] = {}  # by the outline of inputs
MOST = 1000  # outlines that are remembered


def computable(row: Row, tokens: Inputs, constants: Inputs, memory, cu_seqlens) -> tuple[Form, ModuleType, int]:
    """The row's form, of inputs that are right and that kernels take, the family whose kernels they are, and how many
    sequences there are. Inputs that look as others did, which were right, are not looked at again."""
    seen, given = outline(row, tokens, constants, memory, cu_seqlens), {**tokens, **constants}
    found, x = FOUND.get(seen), None  # None is nobody's outline
    if found is None:
        checked(row, tokens, constants, memory, cu_seqlens)
        x = form_of(row, given)
        supported(row, x, memory)
        found = Found(row, former_of(row), family_of(x))
        if seen is not None:
            if len(FOUND) >= MOST:
                FOUND.clear()
            FOUND[seen] = found
    if x is None:
        x = found.form(row, given)
    return x, found.family, x.v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1


def outline(row: Row, tokens: Inputs, constants: Inputs, memory, cu_seqlens) -> tuple | None:
    """All by which `checked`, `form_of` and `supported` tell inputs apart. None where they read numbers (borders on the
    CPU), and where a compiler looks on, to whom what is remembered would be a constant."""
    if observed() or (cu_seqlens is not None and not cu_seqlens.is_cuda):
        return None
    given = (*tokens.values(), *constants.values(), memory, cu_seqlens)
    if not all(x is None or type(x) in (Tensor, Parameter) for x in given):
        return None
    looks = [None if x is None else (x.shape, x.dtype, x.device) for x in given]
    return id(row), kernels.INTERPRETED, len(tokens), *tokens, *constants, *looks


def checked(row: Row, tokens: Inputs, constants: Inputs, memory, cu_seqlens) -> None:
    """The reference's check, without a wait for borders that lie on the GPU: these are only looked at from outside."""
    if torch.compiler.is_compiling() and cu_seqlens is not None:
        memory, cu_seqlens = None, None
    elif cu_seqlens is not None and cu_seqlens.is_cuda and cu_seqlens.ndim == 1 and len(cu_seqlens):
        cu_seqlens = torch.zeros(cu_seqlens.shape, dtype=cu_seqlens.dtype)
        cu_seqlens[-1] = next(iter(tokens.values())).shape[1]
    check(row, tokens, constants, memory, cu_seqlens)


def form_of(row: Row, x: Inputs) -> Form:
    """The row's form. NotImplementedError, in one line, if no kernel computes it."""
    form = form_by_words(row, x)
    if form is None or family_of(form) is None:
        raise NotImplementedError(
            f"no fast kernel for {row.title!r} (have {', '.join(rows())}); use the backend 'reference'"
        )
    return form


def form_by_words(row: Row, x: Inputs) -> Form | None:
    former = former_of(row)
    return None if former is None else former(row, x)


def former_of(row: Row) -> Callable[[Row, Inputs], Form] | None:
    """What makes the row's form: a family's own, or the normal one."""
    for family in OWN:
        if family.has_form(row):
            return family.form
    return plain_form if is_plain(row) else None


def plain_form(row: Row, x: Inputs) -> Normal:
    if row.update is words.tied and row.decay is words.channel:  # no keys: kernels make them where they read gates
        return normal(row._replace(update=words.outer), {**x, "k": x["g"]})._replace(k=None)
    form = normal(row, x)
    # vectors that are made of gates or write strengths are float32 as these are: the products want all alike
    made = {n: of_dtype(y, form.q.dtype) for n in "kab" if (y := getattr(form, n)) is not None and y is not x.get(n)}
    return form._replace(**made) if made else form


def family_of(x: Form) -> ModuleType | None:
    """The family whose kernels compute this form."""
    return next((family for family in FAMILIES if family.takes(x)), None)


def rows() -> list[str]:
    """The rows of the table that have a kernel."""

    def form(row: Row) -> Form | None:
        inputs = {**row.tokens, **row.constants}
        return form_by_words(row, {n: torch.empty([1] * len(s.split()), device="meta") for n, s in inputs.items()})

    forms = {name: form(row) for name, row in LSM.items()}
    return [name for name, x in forms.items() if x is not None and family_of(x) is not None]


def supported(row: Row, x: Form, memory) -> None:
    """One line for what no kernel computes, before any launch."""
    given = tensors_of(x) | ({} if memory is None else {"memory": memory})
    dtype, device = x.v.dtype, x.v.device
    if dtype not in DTYPES or any(given[n].dtype != dtype for n in "qk" if n in given):
        found = ", ".join(f"{n} {y.dtype}" for n, y in given.items() if n in "qkv")
        raise ValueError(
            f"{row.title}: no fast kernel for {found}; allowed: all float32, all bfloat16 or all float16 (the backend "
            "'reference' takes any)"
        )
    if any(y.device != device for y in given.values()):
        devices = sorted({str(y.device) for y in given.values()})
        raise ValueError(f"{row.title}: inputs on several devices: {', '.join(devices)}; put all on one")
    runnable(row.title, x.v)
    if not isinstance(x, Normal):
        family_of(x).fits(row.title, x)
    else:
        small_enough(row.title, K=x.q.shape[-1], V=x.v.shape[-1])


def tensors_of(x: Form) -> dict[str, Tensor]:
    return {name: y for name, y in zip(x._fields, x, strict=True) if y is not None and isinstance(y, Tensor)}


def ready(row: Row, x: Form, constants: Inputs, pad) -> Form:
    """The form as kernels take it: contiguous, all but vectors in float32, what has K or V columns through `pad`.

    A gate that is the same for every token is one number a head (but for delta rules).
    """
    if row.decay is fixed and x.beta is None and x.b is None:
        x = x._replace(g=constants["g"])
    made, dtype = {}, x.v.dtype
    for name, y in tensors_of(x).items():
        vectors = name in ("q", "k", "v", "a", "b")
        y = of_dtype(y, dtype if vectors else torch.float32)
        made[name] = (pad(y) if vectors or name in ("f", "u") or y.ndim == 4 else y).contiguous()
    return x._replace(**made)


def same(x: Tensor) -> Tensor:
    return x
