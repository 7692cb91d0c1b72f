"""`reference.recurrence` on Triton kernels: the same functions, the same rows, the same answers.

A row is brought to its normal form (`reference.normal`) and the form says which family of kernels runs it: memories
that fade as a whole (`fast/kernels/decay.py`: no gate, one number a head, or one number a head and token) or channel by
channel (`fast/kernels/channel.py`: one number a key channel and token), or delta rules (`fast/kernels/delta.py`: no
gate, or one number a head and token). Whatever has no kernel raises; nothing falls back.

Queries, keys and values are float32, bfloat16 or float16 and all alike; sums, gates, write strengths and memories are
float32. Each family is two operators for torch (forward and gradient) with shape rules, so that `torch.compile` sees
whole graphs, and a third for one token.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fast.kernels import channel as channels
from fast.kernels import decay as kernels
from fast.kernels import delta as deltas
from fast.local import DTYPES, runnable
from reference import recurrence as words
from reference import span as spans
from reference.lsm import LSM
from reference.normal import Normal, has_normal, normal
from reference.recurrence import Inputs, Memory, Row, check, empty, fixed

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
    q, k, v = (even(y).contiguous() for y in (x.q, x.k, x.v))
    g = gate_of(row, x, constants)
    if x.beta is not None:
        segments = deltas.segments_for(q, v, sequences)
        given = (q, k, v, x.beta.float(), g, memory)
        keep = torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in given)
        o, last, *_ = delta(*given, cu_seqlens, segments, wide, keep)
    elif by_channel(x):
        segments = channels.segments_for(q, v, sequences)
        u = bonus_of(x)
        u = u if u is None else even(u)
        keep = torch.is_grad_enabled() and g.requires_grad
        o, last, *_ = channel(q, k, v, even(g), u, memory, cu_seqlens, segments, wide, keep)
    else:
        segments = kernels.segments_for(q, v, g, sequences)
        o, last, _ = decay(q, k, v, g, memory, cu_seqlens, segments, wide)
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
    g = gate_of(row, x, constants)
    g = g[:, 0].contiguous() if g is not None and g.ndim > 1 else g
    q, k, v = (y[:, 0].contiguous() for y in (x.q, x.k, x.v))
    if x.beta is not None:
        o = delta_step(q, k, v, x.beta[:, 0].float().contiguous(), g, memory)
    else:
        o = channel_step(q, k, v, g, bonus_of(x), memory) if by_channel(x) else decay_step(q, k, v, g, memory)
    return x.finish(o[:, None]).to(x.q.dtype), memory


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
    if form is None or not has_kernel(form):
        raise NotImplementedError(
            f"no fast kernel for {row.title!r} (have {', '.join(rows())}); use the backend 'reference'"
        )
    # keys that are made of gates (HGRN2) are float32 as gates are: the products want all alike
    return form if "k" in row.tokens else form._replace(k=form.k.to(form.q.dtype))


def may_have_kernel(row: Row) -> bool:
    """Whether the row has a normal form whose gates are inputs of the row as they are, and no features."""
    return has_normal(row) and row.features is None and row.decay in (words.keep, fixed, words.scalar, words.channel)


def has_kernel(x: Normal) -> bool:
    if x.a is not None or x.f is not None:
        return False
    return not by_channel(x) and x.u is None if x.beta is not None else x.u is None or by_channel(x)


def by_channel(x: Normal) -> bool:
    """Whether the row belongs to the second family: a gate of one number a key channel."""
    return x.g is not None and x.g.ndim == 4


def rows() -> list[str]:
    """The rows of the table that have a kernel."""

    def form(row: Row) -> Normal:
        inputs = {**row.tokens, **row.constants}
        return normal(row, {name: torch.empty([1] * len(s.split()), device="meta") for name, s in inputs.items()})

    return [name for name, row in LSM.items() if may_have_kernel(row) and has_kernel(form(row))]


def supported(row: Row, x: Normal, memory) -> None:
    """One line for what no kernel computes, before any launch."""
    given = {"q": x.q, "k": x.k, "v": x.v, "g": x.g, "beta": x.beta, "u": x.u, "memory": memory}
    given = {name: y for name, y in given.items() if y is not None}
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


def gate_of(row: Row, x: Normal, constants: Inputs) -> Float[Tensor, "b t h ..."] | Float[Tensor, " h"] | None:
    """The log decay in float32; where it is the same for every token, as one number a head (but for delta rules)."""
    if x.g is None:
        return None
    return (constants["g"] if row.decay is fixed and x.beta is None else x.g).float().contiguous()


def bonus_of(x: Normal) -> Float[Tensor, "h k"] | None:
    return None if x.u is None else x.u.float().contiguous()


def even(x: Tensor, rows: int = 0) -> Tensor:
    """The last axis filled with zeros to a multiple of 16 (and the one before with `rows` zeros)."""
    columns = -x.shape[-1] % 16
    return F.pad(x, (0, columns, 0, rows)) if columns or rows else x


# ------------------------------------------------------------------------------------- the operators, as torch sees


def results(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, segments: int, wide: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the first three results of every family look like: o, the last memory, the memories between segments."""
    n = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    h, K, V = q.shape[2], q.shape[3], v.shape[3]
    o = torch.empty_like(v, dtype=torch.float32 if wide else v.dtype)
    states = (n, h, segments + 1, K, V) if segments > 1 else (0,)
    return o, q.new_empty(n, h, K, V, dtype=torch.float32), q.new_empty(states, dtype=torch.float32)


@torch.library.custom_op("linear_moe::decay", mutates_args=())
def decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    wide: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments). `wide`: o in float32."""
    return kernels.forward(*packed(q, k, v, g, memory, cu_seqlens), segments, wide)


@decay.register_fake
def _(q, k, v, g, memory, cu_seqlens, segments, wide):
    return results(q, v, cu_seqlens, segments, wide)


@torch.library.custom_op("linear_moe::decay_gradients", mutates_args=())
def decay_gradients(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    states: Tensor,
    want_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, dmemory); dg is empty unless wanted."""
    do, dlast = packed(do.to(v.dtype), dlast)
    q, k, v, g, memory, cu_seqlens = packed(q, k, v, g, memory, cu_seqlens)
    *grads, dg, dmemory = kernels.backward(do, dlast, q, k, v, g, memory, cu_seqlens, last, states, want_g)
    return *grads, last.new_empty(0) if dg is None else dg, dmemory


@decay_gradients.register_fake
def _(do, dlast, q, k, v, g, memory, cu_seqlens, last, states, want_g):
    dg = torch.empty_like(g) if want_g else last.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, torch.empty_like(last)


def packed(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous: a gradient arrives expanded from a sum, a compiler may have chosen other strides."""
    return [None if x is None else x.contiguous() for x in tensors]


def decay_context(ctx, inputs, output) -> None:
    q, k, v, g, memory, cu_seqlens, _, _ = inputs
    _, last, states = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, g, memory, cu_seqlens, last, states)


def decay_backward(ctx, do, dlast, _):
    q, k, v, g, memory, cu_seqlens, last, states = ctx.saved_tensors
    do = torch.zeros_like(v) if do is None else do
    want_g, want_memory = ctx.needs_input_grad[3:5]
    dq, dk, dv, dg, dmemory = decay_gradients(do, dlast, q, k, v, g, memory, cu_seqlens, last, states, want_g)
    return dq, dk, dv, dg if want_g else None, dmemory if want_memory else None, None, None, None


decay.register_autograd(decay_backward, setup_context=decay_context)


@torch.library.custom_op("linear_moe::decay_step", mutates_args=("memory",))
def decay_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, memory: Tensor) -> Tensor:
    """o : b h v, in float32; memory is overwritten."""
    return kernels.step(q, k, v, g, memory)


@decay_step.register_fake
def _(q, k, v, g, memory):
    return torch.empty_like(v, dtype=torch.float32)


@torch.library.custom_op("linear_moe::channel", mutates_args=())
def channel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    wide: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments, scores within chunks, marks). `wide`: o in float32; `keep`:
    the gate's gradient will be wanted."""
    return channels.forward(*packed(q, k, v, g, u, memory, cu_seqlens), segments, wide, keep)


@channel.register_fake
def _(q, k, v, g, u, memory, cu_seqlens, segments, wide, keep):
    o, last, states = results(q, v, cu_seqlens, segments, wide)
    scores = q.new_empty(*q.shape[:3], channels.CHUNK)
    return o, last, states, scores, last.new_empty(channels.marks_of(q, v, keep))


@torch.library.custom_op("linear_moe::channel_gradients", mutates_args=())
def channel_gradients(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    u: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    states: Tensor,
    scores: Tensor,
    marks: Tensor,
    want_g: bool,
    want_u: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dg, du, dmemory); dg and du are empty unless wanted."""
    do, dlast = packed(do.to(v.dtype), dlast)
    q, k, v, g, u, memory, cu_seqlens = packed(q, k, v, g, u, memory, cu_seqlens)
    given = (q, k, v, g, u, memory, cu_seqlens, last, states, scores, marks)
    dq, dk, dv, dg, du, dmemory = channels.backward(do, dlast, *given, want_g, want_u)
    dg, du = (last.new_empty(0) if y is None else y for y in (dg, du))
    return dq, dk, dv, dg, du, dmemory


@channel_gradients.register_fake
def _(do, dlast, q, k, v, g, u, memory, cu_seqlens, last, states, scores, marks, want_g, want_u):
    dg = torch.empty_like(g) if want_g else last.new_empty(0)
    du = torch.empty_like(u) if want_u else last.new_empty(0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dg, du, torch.empty_like(last)


def channel_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:7], *output[1:])


def channel_backward(ctx, do, dlast, *_):
    do = torch.zeros_like(ctx.saved_tensors[2]) if do is None else do
    want_g, want_u, want_memory = ctx.needs_input_grad[3:6]
    *grads, dg, du, dmemory = channel_gradients(do, dlast, *ctx.saved_tensors, want_g, want_u)
    asked = (dg if want_g else None, du if want_u else None, dmemory if want_memory else None)
    return *grads, *asked, None, None, None, None


channel.register_autograd(channel_backward, setup_context=channel_context)


@torch.library.custom_op("linear_moe::channel_step", mutates_args=("memory",))
def channel_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor | None, memory: Tensor) -> Tensor:
    """o : b h v, in float32; memory is overwritten."""
    return channels.step(q, k, v, g, u, memory)


@channel_step.register_fake
def _(q, k, v, g, u, memory):
    return torch.empty_like(v, dtype=torch.float32)


@torch.library.custom_op("linear_moe::delta", mutates_args=())
def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: int,
    wide: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(o, the last memory, the memories between segments, the news, the solved chunks). `wide`: o in float32.

    `keep`: what the gradient needs is kept; without it there is no gradient.
    """
    return deltas.forward(*packed(q, k, v, beta, g, memory, cu_seqlens), segments, wide, keep)


@delta.register_fake
def _(q, k, v, beta, g, memory, cu_seqlens, segments, wide, keep):
    o, last, states = results(q, v, cu_seqlens, segments if keep else 1, wide)
    news = torch.empty_like(v) if keep else v.new_empty(0)
    return o, last, states, news, q.new_empty(*q.shape[:3], deltas.chunk_for(q))


@torch.library.custom_op("linear_moe::delta_gradients", mutates_args=())
def delta_gradients(
    do: Tensor,
    dlast: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    memory: Tensor | None,
    cu_seqlens: Tensor | None,
    last: Tensor,
    states: Tensor,
    news: Tensor,
    solved: Tensor,
    want_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbeta, dg, dmemory); dg is empty unless wanted."""
    do, dlast = packed(do.to(v.dtype), dlast)
    given = packed(q, k, v, beta, g, memory, cu_seqlens)
    *grads, dg, dmemory = deltas.backward(do, dlast, *given, last, states, news, solved, want_g)
    return *grads, last.new_empty(0) if dg is None else dg, dmemory


@delta_gradients.register_fake
def _(do, dlast, q, k, v, beta, g, memory, cu_seqlens, last, states, news, solved, want_g):
    dg = torch.empty_like(g) if want_g else last.new_empty(0)
    return *(torch.empty_like(y) for y in (q, k, v, beta)), dg, torch.empty_like(last)


def delta_context(ctx, inputs, output) -> None:
    *given, _, _, keep = inputs
    if not keep:
        raise RuntimeError("a delta rule's gradient needs what its forward pass kept: call it with keep = True")
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*given, *output[1:])


def delta_backward(ctx, do, dlast, *_):
    given = ctx.saved_tensors
    v = given[2]
    do = torch.zeros_like(v) if do is None else do
    want_g, want_memory = ctx.needs_input_grad[4:6]
    *grads, dg, dmemory = delta_gradients(do, dlast, *given, want_g)
    return *grads, dg if want_g else None, dmemory if want_memory else None, None, None, None, None


delta.register_autograd(delta_backward, setup_context=delta_context)


@torch.library.custom_op("linear_moe::delta_step", mutates_args=("memory",))
def delta_step(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, memory: Tensor) -> Tensor:
    """o : b h v, in float32; memory is overwritten."""
    return deltas.step(q, k, v, beta, g, memory)


@delta_step.register_fake
def _(q, k, v, beta, g, memory):
    return torch.empty_like(v, dtype=torch.float32)
