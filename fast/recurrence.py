"""`reference.recurrence` on Triton kernels: the same functions, the same rows, the same answers.

A row is brought to its normal form (`reference.normal`) and the form says which family of kernels runs it: memories
that fade as a whole (`fast/decay.py`) or channel by channel (`fast/channel.py`), delta rules (`fast/delta.py`), or
whatever else changes by a rank one (`fast/rank_one.py`). Whatever no family takes raises; nothing falls back.

Queries, keys and values are float32, bfloat16 or float16 and all alike; sums, gates, write strengths and memories are
float32. A family is two operators for torch (forward and gradient) with shape rules, so that `torch.compile` sees
whole graphs, and a third for one token; its kernels are in the file of its name in `fast/kernels/`.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fast import channel, decay, delta, rank_one
from fast.local import DTYPES, runnable
from reference import recurrence as words
from reference import span as spans
from reference.lsm import LSM
from reference.normal import Normal, has_normal, normal
from reference.recurrence import Inputs, Memory, Row, check, empty, fixed

FAMILIES = (decay, channel, delta, rank_one)
LARGEST = 256  # K and V, the count column of a normalised row included


def recurrence(
    row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None, cu_seqlens=None
) -> tuple[Float[Tensor, "b t h v"], Memory]:
    """The row from `memory` (zeros if None): outputs, and the memory after the last token, as the reference's.

    Raises in one line, before any launch: ValueError for inputs that do not fit the row, a dtype or a device without
    kernels; NotImplementedError for a row without one. Borders that lie on the GPU are not read here (that would
    wait for it): the kernels clamp them to the sequence.
    """
    constants = constants or {}
    checked(row, tokens, constants, memory, cu_seqlens)
    x = form_of(row, {**tokens, **constants})
    supported(row, x, memory)
    wide = row.read is not words.inclusive  # something is still to be computed from o
    K, V = x.k.shape[-1], x.v.shape[-1]
    if memory is not None:
        memory = even(memory.float(), -K % 16).contiguous()
    sequences = x.q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    o, last = family_of(x).run(ready(row, x, constants, even), memory, cu_seqlens, sequences, wide)
    return x.finish(o[..., :V]).to(x.q.dtype), last[..., :K, :V]


def step(row: Row, tokens: Inputs, constants: Inputs | None = None, memory=None) -> tuple[Tensor, Memory]:
    """One token for each of b running sequences (t = 1). A float32 memory is overwritten and returned.

    With gradients wanted it is `recurrence` over one token, and nothing is overwritten.
    """
    constants = constants or {}
    checked(row, tokens, constants, memory, None)
    inputs = [*tokens.values(), *constants.values(), *([] if memory is None else [memory])]
    if torch.is_grad_enabled() and any(y.requires_grad for y in inputs):
        return recurrence(row, tokens, constants, memory)
    x = form_of(row, {**tokens, **constants})
    supported(row, x, memory)
    if x.q.shape[1] != 1:
        raise ValueError(f"{row.title}: step takes one token, got t = {x.q.shape[1]}; use recurrence")
    memory = empty(row, tokens, constants) if memory is None else memory.float().contiguous()
    one = ready(row, x, constants, lambda y: y)
    one = one._replace(**{n: y[:, 0].contiguous() for n, y in tensors_of(one).items() if n != "u" and y.ndim > 2})
    return x.finish(family_of(x).step(one, memory)[:, None]).to(x.q.dtype), memory


def span(row: Row, tokens: Inputs, constants: Inputs | None = None, cu_seqlens=None) -> spans.Span:
    """`reference.span.span`, with the kernels' run inside."""
    return spans.span(row, tokens, constants, cu_seqlens, run=recurrence)


# ------------------------------------------------------------------------------------------- what can be computed


def checked(row: Row, tokens: Inputs, constants: Inputs, memory, cu_seqlens) -> None:
    """The reference's check, without a wait for borders that lie on the GPU: these are only looked at from outside."""
    if torch.compiler.is_compiling() and cu_seqlens is not None:
        memory, cu_seqlens = None, None
    elif cu_seqlens is not None and cu_seqlens.is_cuda and cu_seqlens.ndim == 1 and len(cu_seqlens):
        cu_seqlens = torch.zeros(cu_seqlens.shape, dtype=cu_seqlens.dtype)
        cu_seqlens[-1] = next(iter(tokens.values())).shape[1]
    check(row, tokens, constants, memory, cu_seqlens)


def form_of(row: Row, x: Inputs) -> Normal:
    """The row's normal form. NotImplementedError, in one line, if no kernel computes it."""
    form = normal(row, x) if may_have_kernel(row) else None
    if form is None or family_of(form) is None:
        raise NotImplementedError(
            f"no fast kernel for {row.title!r} (have {', '.join(rows())}); use the backend 'reference'"
        )
    # vectors that are made of gates or write strengths are float32 as these are: the products want all alike
    made = {n: y.to(form.q.dtype) for n in "kab" if (y := getattr(form, n)) is not None and y is not x.get(n)}
    return form._replace(**made)


def may_have_kernel(row: Row) -> bool:
    """Whether the row has a normal form whose gates are inputs of the row as they are, and no features."""
    return has_normal(row) and row.features is None and row.decay in (words.keep, fixed, words.scalar, words.channel)


def family_of(x: Normal) -> ModuleType | None:
    """The family whose kernels compute this form."""
    return next((family for family in FAMILIES if family.takes(x)), None)


def rows() -> list[str]:
    """The rows of the table that have a kernel."""

    def form(row: Row) -> Normal:
        inputs = {**row.tokens, **row.constants}
        return normal(row, {name: torch.empty([1] * len(s.split()), device="meta") for name, s in inputs.items()})

    return [name for name, row in LSM.items() if may_have_kernel(row) and family_of(form(row)) is not None]


def supported(row: Row, x: Normal, memory) -> None:
    """One line for what no kernel computes, before any launch."""
    given = tensors_of(x) | ({} if memory is None else {"memory": memory})
    dtypes = {name: y.dtype for name, y in given.items() if name in "qkv"}
    if x.q.dtype not in DTYPES or len(set(dtypes.values())) > 1:
        raise ValueError(
            f"{row.title}: no fast kernel for {', '.join(f'{n} {d}' for n, d in dtypes.items())}; allowed: all "
            "float32, all bfloat16 or all float16 (the backend 'reference' takes any)"
        )
    devices = {str(y.device) for y in given.values()}
    if len(devices) > 1:
        raise ValueError(f"{row.title}: inputs on several devices: {', '.join(sorted(devices))}; put all on one")
    runnable(row.title, x.q)
    if max(x.k.shape[-1], x.v.shape[-1]) > LARGEST:
        raise ValueError(
            f"{row.title}: K = {x.k.shape[-1]} and V = {x.v.shape[-1]} (a count column included), fast kernels take "
            f"at most {LARGEST}; use the backend 'reference'"
        )


def tensors_of(x: Normal) -> dict[str, Tensor]:
    return {name: y for name, y in x._asdict().items() if isinstance(y, Tensor)}


def ready(row: Row, x: Normal, constants: Inputs, pad) -> Normal:
    """The form as kernels take it: contiguous, all but vectors in float32, what has K or V columns through `pad`.

    A gate that is the same for every token is one number a head (but for delta rules).
    """
    if row.decay is fixed and x.beta is None and x.b is None:
        x = x._replace(g=constants["g"])
    made = {}
    for name, y in tensors_of(x).items():
        y = y.to(x.q.dtype) if name in ("q", "k", "v", "a", "b") else y.float()
        made[name] = (pad(y) if name in ("q", "k", "v", "a", "b", "f", "u") or y.ndim == 4 else y).contiguous()
    return x._replace(**made)


def even(x: Tensor, rows: int = 0) -> Tensor:
    """The last axis filled with zeros to a multiple of 16 (and the one before with `rows` zeros)."""
    columns = -x.shape[-1] % 16
    return F.pad(x, (0, columns, 0, rows)) if columns or rows else x
