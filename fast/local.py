"""`reference.local` on Triton kernels: the same functions, the same answers. Running sums are kept."""

import torch
from jaxtyping import Float
from torch import Tensor

from fast.kernels import decay
from fast.kernels import local as kernels
from fast.operators import operator
from reference.documents import document_of
from reference.local import ACTIVATION

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def has_kernels(x: Tensor, other: torch.dtype | None = None) -> bool:
    """Whether kernels run where x is, from its dtype to `other`. (Triton's interpreter gets bfloat16 wrong.)"""
    dtypes = {x.dtype, other or x.dtype}
    return dtypes <= set(DTYPES) and (x.is_cuda or (decay.INTERPRETED and torch.bfloat16 not in dtypes))


def norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"] | None,
    eps: float = 1e-5,
    gate: Float[Tensor, "... d"] | None = None,
    activation: str | None = "silu",
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... d"]:
    """x / sqrt(mean(x²) + eps) · weight, then · act(gate) if there is one; as the reference's, in one pass, `dtype` or
    not: a gradient comes in it and leaves in that of x.

    Raises ValueError, in one line and before any launch, for a dtype, a device or a width without kernels.
    """
    able("norm", x, gate, activation, dtype)
    return in_rows("norm", x, weight, eps, gate, activation, 1.0, dtype or x.dtype)


def unit(x: Float[Tensor, "... d"], eps: float = 1e-6, scale: float = 1.0) -> Float[Tensor, "... d"]:
    """x / sqrt(sum(x²) + eps) · scale, as the reference's, in one pass: the norm with another ε, times scale / √d.

    Raises ValueError, in one line and before any launch, for a dtype, a device or a width without kernels.
    """
    able("unit", x, None, None)
    d = x.shape[-1]
    return in_rows("unit", x, None, eps / d, None, None, scale * d**-0.5, x.dtype)


def in_rows(name: str, x: Tensor, weight, eps: float, gate, activation, factor: float, dtype: torch.dtype) -> Tensor:
    """The norm's operator, which takes rows side by side."""
    if x.shape[-1] > kernels.WIDEST:
        raise ValueError(f"{name}: no fast kernel for rows of {x.shape[-1]}, at most {kernels.WIDEST}; use 'reference'")
    flat = (None if y is None else y.reshape(-1, x.shape[-1]).contiguous() for y in (x, gate))
    return normed(next(flat), weight, eps, next(flat), activation, factor, dtype).view(x.shape)


def elu_plus_one(x: Float[Tensor, "..."], scale: float = 1.0) -> Float[Tensor, "..."]:
    """(elu(x) + 1) · scale, as the reference's, in one pass each way; only x is kept.

    Raises ValueError, in one line and before any launch, for a dtype or a device without kernels.
    """
    able("elu_plus_one", x, None, None)
    return features(x.contiguous(), scale)


def short_convolution(
    x: Float[Tensor, "b t c"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None = None,
    activation: str | None = None,
    taps: Float[Tensor, "b w1 c"] | None = None,
    cu_seqlens=None,
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b w1 c"]]:
    """Depthwise and causal, with its activation, as the reference's: y and the new taps.

    Raises ValueError, in one line and before any launch, for a dtype, a device or a number of taps without kernels.
    """
    able("short_convolution", x, taps, activation)
    if weight.shape[-1] > kernels.LONGEST:
        raise ValueError(
            f"short_convolution: no fast kernel for {weight.shape[-1]} taps, at most {kernels.LONGEST}; use 'reference'"
        )
    (b, t, c), reach = x.shape, weight.shape[-1] - 1
    n = b if cu_seqlens is None else len(cu_seqlens) - 1
    taps = None if taps is None or not reach else taps.to(x.dtype).contiguous()
    flat = x.reshape(b * t, c).contiguous()
    y = convolved(flat, weight.contiguous(), bias, activation, taps, t, cu_seqlens).view(x.shape)
    return y, newest(x, taps, reach, n, cu_seqlens)


def token_shift(
    x: Float[Tensor, "b t d"], last: Float[Tensor, "b d"] | None = None, cu_seqlens=None
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """x_{t-1} for every t, with `last` (zeros if None) before the first, as the reference's; and the new last.

    Raises ValueError, in one line and before any launch, for a dtype or a device without kernels.
    """
    able("token_shift", x, last, None)
    b, t, d = x.shape
    n = b if cu_seqlens is None else len(cu_seqlens) - 1
    last = None if last is None else last.to(x.dtype).contiguous()
    y = shifted(x.reshape(b * t, d).contiguous(), last, t, cu_seqlens).view(x.shape)
    return y, newest(x, None if last is None else last[:, None], 1, n, cu_seqlens)[:, 0]


def newest(x: Float[Tensor, "b t c"], taps, reach: int, n: int, cu_seqlens) -> Float[Tensor, "n r c"]:
    """The last `reach` inputs of every sequence, its taps among them where it is shorter."""
    if cu_seqlens is None and x.shape[1] >= reach:
        return x[:, x.shape[1] - reach :]
    before = x.new_zeros(n, reach, x.shape[-1]) if taps is None else taps
    if cu_seqlens is None:
        return torch.cat([before, x], 1)[:, x.shape[1] :]
    ends, sizes = cu_seqlens[1:].long()[:, None], cu_seqlens.diff().long()[:, None]
    back = torch.arange(reach, 0, -1, device=x.device)  # places before the end
    own = x[0][(ends - back).clamp(min=0)] if x.shape[1] else before
    if taps is None:
        return own.masked_fill((back > sizes)[..., None], 0)
    older = (
        before.gather(1, (reach + sizes - back).clamp(max=reach - 1)[..., None].expand_as(before)) if reach else before
    )
    return torch.where((back <= sizes)[..., None], own, older)


def able(name: str, x: Tensor, other: Tensor | None, activation: str | None, dtype: torch.dtype | None = None) -> None:
    """One line for what no kernel computes; `dtype` is the result's, if it is not that of x."""
    for own in (x.dtype, dtype or x.dtype):
        if own not in DTYPES:
            allowed = "float32, bfloat16 and float16"
            raise ValueError(f"{name}: no fast kernel for {own}; allowed are {allowed}, or the backend 'reference'")
    if activation not in ACTIVATION:
        raise ValueError(
            f"{name}: unknown activation {activation!r}; expected one of {', '.join(map(str, ACTIVATION))}"
        )
    runnable(name, x, dtype)
    if other is not None and other.device != x.device:
        raise ValueError(f"{name}: inputs on several devices: {x.device}, {other.device}; put all on one")


def runnable(what: str, x: Tensor, dtype: torch.dtype | None = None) -> None:
    """One line where no kernel runs, whatever it computes."""
    if x.device.type != "cuda" and not decay.INTERPRETED:
        raise ValueError(
            f"{what}: fast kernels need a CUDA GPU, got tensors on {x.device}; use the backend 'reference'"
        )
    if decay.INTERPRETED and torch.bfloat16 in (x.dtype, dtype):
        raise ValueError(f"{what}: Triton's interpreter gets bfloat16 wrong; use float32 or float16 there")


# ------------------------------------------------------------------------------------- the operators, as torch sees


@operator("norm")
def normed(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gate: Tensor | None,
    activation: str | None,
    factor: float,
    dtype: torch.dtype,
) -> Tensor:
    return kernels.norm(x, weight, eps, gate, activation, factor, dtype)


@normed.register_fake
def _(x, weight, eps, gate, activation, factor, dtype):
    return torch.empty_like(x, dtype=dtype)


@operator("norm_gradients")
def norm_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gate: Tensor | None,
    activation: str | None,
    factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, dgate; empty for what is not there."""
    dx, dw, dz = kernels.norm_gradients(dy.contiguous(), x, weight, eps, gate, activation, factor)
    nothing = x.new_empty(0)
    return dx, nothing if dw is None else dw.to(weight.dtype), nothing.clone() if dz is None else dz


@norm_gradients.register_fake
def _(dy, x, weight, eps, gate, activation, factor):
    like = [x.new_empty(0) if y is None else torch.empty_like(y) for y in (weight, gate)]
    return torch.empty_like(x), *like


def norm_context(ctx, inputs, output) -> None:
    x, weight, ctx.eps, gate, ctx.activation, ctx.factor, _ = inputs
    ctx.save_for_backward(x, weight, gate)


def norm_backward(ctx, dy):
    x, weight, gate = ctx.saved_tensors
    dx, dw, dz = norm_gradients(dy, x, weight, ctx.eps, gate, ctx.activation, ctx.factor)
    return dx, None if weight is None else dw, None, None if gate is None else dz, None, None, None


normed.register_autograd(norm_backward, setup_context=norm_context)


@operator("elu_plus_one")
def features(x: Tensor, scale: float) -> Tensor:
    return kernels.elu_plus_one(x, scale)


@features.register_fake
def _(x, scale):
    return torch.empty_like(x)


@operator("elu_plus_one_gradient")
def features_gradient(dy: Tensor, x: Tensor, scale: float) -> Tensor:
    return kernels.elu_plus_one_gradient(dy.contiguous(), x, scale)


@features_gradient.register_fake
def _(dy, x, scale):
    return torch.empty_like(x)


def features_context(ctx, inputs, output) -> None:
    x, ctx.scale = inputs
    ctx.save_for_backward(x)


def features_backward(ctx, dy):
    return features_gradient(dy, *ctx.saved_tensors, ctx.scale), None


features.register_autograd(features_backward, setup_context=features_context)


@operator("convolution")
def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    taps: Tensor | None,
    length: int,
    cu_seqlens: Tensor | None,
) -> Tensor:
    return kernels.convolution(x, weight, bias, activation, taps, length, *borders(x, cu_seqlens))


def borders(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Where each document starts, and which one a row belongs to. Here, within the operator, since torch 2.11's
    compiler finds other documents (its searchsorted in a view of cu_seqlens)."""
    if cu_seqlens is None:
        return None, None
    return cu_seqlens.int(), document_of(cu_seqlens, x.shape[0]).int()


@convolved.register_fake
def _(x, weight, bias, activation, taps, length, cu_seqlens):
    return torch.empty_like(x)


@operator("convolution_gradients")
def convolution_gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    taps: Tensor | None,
    length: int,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias, dtaps; empty for what is not there."""
    given = (dy.contiguous(), x, weight, bias, activation, taps, length, *borders(x, cu_seqlens))
    dx, dw, dbias, dtaps = kernels.convolution_gradients(*given)
    dbias = x.new_empty(0) if dbias is None else dbias.to(bias.dtype)
    return dx, dw.to(weight.dtype).contiguous(), dbias, x.new_empty(0) if dtaps is None else dtaps


@convolution_gradients.register_fake
def _(dy, x, weight, bias, activation, taps, length, cu_seqlens):
    like = [x.new_empty(0) if y is None else torch.empty_like(y) for y in (bias, taps)]
    return torch.empty_like(x), torch.empty_like(weight), *like


def convolution_context(ctx, inputs, output) -> None:
    x, weight, bias, ctx.activation, taps, ctx.length, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, taps, cu_seqlens)


def convolution_backward(ctx, dy):
    x, weight, bias, taps, cu_seqlens = ctx.saved_tensors
    given = (dy, x, weight, bias, ctx.activation, taps, ctx.length, cu_seqlens)
    dx, dw, dbias, dtaps = convolution_gradients(*given)
    return dx, dw, None if bias is None else dbias, None, None if taps is None else dtaps, None, None


convolved.register_autograd(convolution_backward, setup_context=convolution_context)


@operator("shift")
def shifted(x: Tensor, last: Tensor | None, length: int, cu_seqlens: Tensor | None) -> Tensor:
    return kernels.shift(x, last, length, *borders(x, cu_seqlens))


@shifted.register_fake
def _(x, last, length, cu_seqlens):
    return torch.empty_like(x)


@operator("shift_gradients")
def shift_gradients(dy: Tensor, last: Tensor | None, length: int, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """dx, dlast; the latter empty if there is no last."""
    dx, dlast = kernels.shift_gradients(dy.contiguous(), last, length, *borders(dy, cu_seqlens))
    return dx, dy.new_empty(0) if dlast is None else dlast


@shift_gradients.register_fake
def _(dy, last, length, cu_seqlens):
    dx = torch.empty_like(dy, memory_format=torch.contiguous_format)
    return dx, dy.new_empty(0) if last is None else torch.empty_like(last)


def shift_context(ctx, inputs, output) -> None:
    _, last, ctx.length, cu_seqlens = inputs
    ctx.save_for_backward(last, cu_seqlens)


def shift_backward(ctx, dy):
    last, cu_seqlens = ctx.saved_tensors
    dx, dlast = shift_gradients(dy, last, ctx.length, cu_seqlens)
    return dx, None if last is None else dlast, None, None


shifted.register_autograd(shift_backward, setup_context=shift_context)
