"""Triton kernels for what looks at a token and its nearest neighbours: RMS norm, short convolution, token shift.

    norm          y = f x r w · act(z),  r = 1 / sqrt(mean(x²) + eps)                     a row x : d, its gate z : d
      backwards   D = f dy,  u = D w act(z),  dx = r (u - x r mean(u x r)),  dw = Σ D act(z) x r,  dz = D x r w act'(z)

    unit          x / sqrt(Σ x² + eps) · scale: the norm with eps / d for its eps and f = scale / √d; else f is 1

    elu + 1       y = f (x + 1 where x > 0, else e^x)
      backwards   dx = f dy (1 where x > 0, else e^x)

    convolution   y_t = act(s_t),  s_t = Σ_j w_j x_{t-j} + bias                    channel by channel, j = 0 ... W - 1
      backwards   ds = dy act'(s),  dx_t = Σ_j w_j ds_{t+j},  dw_j = Σ_t ds_t x_{t-j},  dbias = Σ_t ds_t

    shift         y_t = x_{t-1}
      backwards   dx_t = dy_{t+1}

Before a sequence's first token stand its taps, which belong to it alone: x_{-r} is tap W - 1 - r. All sums in float32.

Bytes. In U = one tensor of x's size, both are bound by memory: forward 2 U (3 U with a gate), backward 3 U (5 U), each
tensor once. A convolution's ds, in float32, goes by way of memory, 4 U more in 16 bits, where each of the W tokens that
ask for it would find it from W inputs. Kept for the gradient are the inputs alone: r and s are computed again. Sums
over rows (dw, dbias) are one partial result a program, added up by torch: deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fast.kernels.decay import INTERPRETED, cdiv, launch, multiprocessors, next_power_of_2

ACTIVATIONS = {None: 0, "silu": 1, "sigmoid": 2, "relu": 3, "gelu": 4}
WIDEST = 16384  # of a norm: one row stands in registers
SIZE = 16384 if INTERPRETED else 2048  # numbers a program
LONGEST = 8  # taps of a convolution


@triton.jit
def activated(x, ACT: tl.constexpr):
    if ACT == 1:
        return x * tl.sigmoid(x)
    elif ACT == 2:
        return tl.sigmoid(x)
    elif ACT == 3:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == 4:
        return 0.5 * x * (1.0 + tl.erf(0.7071067811865476 * x))
    else:
        return x


@triton.jit
def slope(x, ACT: tl.constexpr):
    """The derivative of `activated`."""
    if ACT == 1:
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    elif ACT == 2:
        s = tl.sigmoid(x)
        return s * (1.0 - s)
    elif ACT == 3:
        return tl.where(x > 0, 1.0, 0.0)
    elif ACT == 4:
        return 0.5 * (1.0 + tl.erf(0.7071067811865476 * x)) + 0.3989422804014327 * x * tl.exp(-0.5 * x * x)
    else:
        return x * 0.0 + 1.0


# ---------------------------------------------------------------------------------------------------------- norm


@triton.jit
def norm_forward(
    x, w, z, y, rows, d, eps, factor,
    WEIGHT: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)[:, None]
    column = tl.arange(0, D)[None, :]
    ok = (row < rows) & (column < d)
    at = row * d + column
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    value = value * (tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / d + eps) * factor)
    if WEIGHT:
        value *= tl.load(w + column, mask=column < d, other=0.0).to(tl.float32)
    if GATED:
        value *= activated(tl.load(z + at, mask=ok, other=0.0).to(tl.float32), ACT)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=ok)


@triton.jit
def norm_backward(
    x, dy, w, z, dx, dw, dz, rows, d, eps, factor, programs,
    WEIGHT: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, D)[None, :]
    here = column < d
    weight = tl.full((1, D), 1.0, tl.float32)
    if WEIGHT:
        weight = tl.load(w + column, mask=here, other=0.0).to(tl.float32)
    total = tl.zeros((1, D), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, N), programs):
        row = (block * N + tl.arange(0, N)).to(tl.int64)[:, None]
        ok = (row < rows) & here
        at = row * d + column
        value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        up = tl.load(dy + at, mask=ok, other=0.0).to(tl.float32) * factor
        r = tl.rsqrt(tl.sum(value * value, 1, keep_dims=True) / d + eps)
        value *= r
        if GATED:
            gate = tl.load(z + at, mask=ok, other=0.0).to(tl.float32)
            tl.store(dz + at, (up * value * weight * slope(gate, ACT)).to(dz.dtype.element_ty), mask=ok)
            up *= activated(gate, ACT)
        total += tl.sum(up * value, 0, keep_dims=True)
        up *= weight
        down = r * (up - value * (tl.sum(up * value, 1, keep_dims=True) / d))
        tl.store(dx + at, down.to(dx.dtype.element_ty), mask=ok)
    if WEIGHT:
        tl.store(dw + tl.program_id(0) * d + column, total, mask=here)


def block_of(d: int) -> tuple[int, int, int]:
    """Rows a program takes at once, channels with padding, warps: 2048 to 4096 numbers at once where rows are short."""
    D = next_power_of_2(d)
    return max(1, 2048 // D), D, 4 if D <= 4096 else 8


def norm(x: Tensor, w: Tensor | None, eps: float, z: Tensor | None, activation, factor: float, dtype) -> Tensor:
    """x, z : n d, contiguous; w : d. `factor` multiplies the result, which is of that dtype."""
    (rows, d), (N, D, warps), y = x.shape, block_of(x.shape[1]), torch.empty_like(x, dtype=dtype)
    meta = {"WEIGHT": w is not None, "ACT": ACTIVATIONS[activation], "GATED": z is not None, "N": N, "D": D}
    launch(norm_forward, cdiv(rows, N), x, w, z, y, rows, d, eps, factor, **meta, num_warps=warps)
    return y


def norm_gradients(dy: Tensor, x: Tensor, w: Tensor | None, eps: float, z: Tensor | None, activation, factor: float):
    """dx, dw (float32), dz; None for what is not there."""
    (rows, d), (N, D, warps) = x.shape, block_of(x.shape[1])
    programs = min(cdiv(rows, N), 4 * multiprocessors(x.device))
    dx, dz = torch.empty_like(x), None if z is None else torch.empty_like(z)
    dw = None if w is None else x.new_empty(programs, d, dtype=torch.float32)
    meta = {"WEIGHT": w is not None, "ACT": ACTIVATIONS[activation], "GATED": z is not None, "N": N, "D": D}
    args = (x, dy, w, z, dx, dw, dz, rows, d, eps, factor, programs)
    launch(norm_backward, programs, *args, **meta, num_warps=warps)
    return dx, None if dw is None else dw.sum(0), dz


# ------------------------------------------------------------------------------------------------------- elu + 1


@triton.jit(do_not_specialize=["count"])
def elu_forward(x, y, count, factor, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    value = tl.where(value > 0, value + 1.0, tl.exp(value)) * factor
    tl.store(y + at, value.to(y.dtype.element_ty), mask=at < count)


@triton.jit(do_not_specialize=["count"])
def elu_backward(x, dy, dx, count, factor, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    up = tl.load(dy + at, mask=at < count, other=0.0).to(tl.float32) * factor
    tl.store(dx + at, tl.where(value > 0, up, up * tl.exp(value)).to(dx.dtype.element_ty), mask=at < count)


def elu_plus_one(x: Tensor, factor: float) -> Tensor:
    """x : contiguous. `factor` multiplies the result."""
    y = torch.empty_like(x)
    launch(elu_forward, cdiv(x.numel(), SIZE), x, y, x.numel(), factor, N=SIZE)
    return y


def elu_plus_one_gradient(dy: Tensor, x: Tensor, factor: float) -> Tensor:
    dx = torch.empty_like(x)
    launch(elu_backward, cdiv(x.numel(), SIZE), x, dy, dx, x.numel(), factor, N=SIZE)
    return dx


# --------------------------------------------------------------------------------------------------- convolution


@triton.jit
def input_at(x, taps, sequence, place, start, channel, ok, c, W: tl.constexpr):
    """x at a place in its sequence, or its tap where the place is before the first token; 0 without taps."""
    inside = place >= 0
    value = tl.load(x + (start + place).to(tl.int64) * c + channel, mask=ok & inside, other=0.0).to(tl.float32)
    if taps is not None:
        at = (sequence.to(tl.int64) * (W - 1) + place + W - 1) * c + channel
        before = ok & (place < 0) & (place >= 1 - W)
        value += tl.load(taps + at, mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def weighed(x, w, bias, taps, sequence, place, start, channel, ok, here, c, W: tl.constexpr):
    """s = Σ_j w_j x_{t-j} + bias."""
    s = tl.zeros(ok.shape, tl.float32)
    if bias is not None:
        s += tl.load(bias + channel, mask=here, other=0.0).to(tl.float32)
    for j in tl.static_range(W):
        own = tl.load(w + channel * W + (W - 1 - j), mask=here, other=0.0).to(tl.float32)
        s += own * input_at(x, taps, sequence, place - j, start, channel, ok, c, W)
    return s


@triton.jit
def tile_of(c, T: tl.constexpr, C: tl.constexpr):
    """This program's tokens (a column), its channels (a row), and which of these there are."""
    blocks = tl.cdiv(c, C)
    t = (tl.program_id(0) // blocks * T + tl.arange(0, T))[:, None]
    channel = (tl.program_id(0) % blocks * C + tl.arange(0, C))[None, :]
    return t, channel, channel < c


@triton.jit
def token_of(t, tokens, length, starts, sequences, PACKED: tl.constexpr):
    """Of a row of the flat tensor: its sequence, the sequence's first row, and its length."""
    if PACKED:
        sequence = tl.load(sequences + t, mask=t < tokens, other=0)
        start = tl.load(starts + sequence)
        return sequence, start, tl.load(starts + sequence + 1) - start
    else:
        sequence = t // length
        return sequence, sequence * length, length + 0 * sequence


@triton.jit
def convolution_forward(
    x, w, bias, taps, y, starts, sequences, tokens, length, c,
    W: tl.constexpr, ACT: tl.constexpr, PACKED: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    t, channel, here = tile_of(c, T, C)
    ok = (t < tokens) & here
    sequence, start, _ = token_of(t, tokens, length, starts, sequences, PACKED)
    s = weighed(x, w, bias, taps, sequence, t - start, start, channel, ok, here, c, W)
    tl.store(y + t.to(tl.int64) * c + channel, activated(s, ACT).to(y.dtype.element_ty), mask=ok)


@triton.jit
def convolution_backward(
    x, dy, w, bias, taps, ds, dw, dbias, starts, sequences, tokens, length, c, programs,
    W: tl.constexpr, TAPS: tl.constexpr, ACT: tl.constexpr, PACKED: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """ds in float32, and a program's part of dw and dbias."""
    blocks = tl.cdiv(c, C)
    program = tl.program_id(0) // blocks
    channel = (tl.program_id(0) % blocks * C + tl.arange(0, C))[None, :]
    here = channel < c
    tap = tl.arange(0, TAPS)[:, None]
    sums = tl.zeros((TAPS, C), tl.float32)  # of dw
    total = tl.zeros((1, C), tl.float32)
    for block in range(program, tl.cdiv(tokens, T), programs):
        t = (block * T + tl.arange(0, T))[:, None]
        ok = (t < tokens) & here
        sequence, start, _ = token_of(t, tokens, length, starts, sequences, PACKED)
        at = t.to(tl.int64) * c + channel
        s = weighed(x, w, bias, taps, sequence, t - start, start, channel, ok, here, c, W)
        up = tl.where(ok, tl.load(dy + at, mask=ok, other=0.0).to(tl.float32) * slope(s, ACT), 0.0)
        tl.store(ds + at, up, mask=ok)
        total += tl.sum(up, 0, keep_dims=True)
        for i in tl.static_range(W):
            back = input_at(x, taps, sequence, t - start - i, start, channel, ok, c, W)
            sums += tl.where(tap == W - 1 - i, tl.sum(up * back, 0, keep_dims=True), 0.0)
    tl.store(dw + (program * W + tap) * c + channel, sums, mask=here & (tap < W))
    if dbias is not None:
        tl.store(dbias + program * c + channel, total, mask=here)


@triton.jit
def convolution_down(
    ds, w, dx, starts, sequences, tokens, length, c,
    W: tl.constexpr, PACKED: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A token is in its own sum and in those of the W - 1 behind it."""
    t, channel, here = tile_of(c, T, C)
    ok = (t < tokens) & here
    _, start, size = token_of(t, tokens, length, starts, sequences, PACKED)
    down = tl.zeros((T, C), tl.float32)
    for j in tl.static_range(W):
        later = ok & (t - start + j < size)
        own = tl.load(w + channel * W + (W - 1 - j), mask=here, other=0.0).to(tl.float32)
        down += own * tl.load(ds + (t + j).to(tl.int64) * c + channel, mask=later, other=0.0)
    tl.store(dx + t.to(tl.int64) * c + channel, down.to(dx.dtype.element_ty), mask=ok)


@triton.jit
def taps_backward(
    ds, w, dtaps, starts, length, c,
    W: tl.constexpr, PACKED: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Tap r is in the sums of the tokens that come less than W places after it."""
    blocks = tl.cdiv(c, C)
    sequence = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * C + tl.arange(0, C)
    here = channel < c
    if PACKED:
        start = tl.load(starts + sequence)
        size = tl.load(starts + sequence + 1) - start
    else:
        start = sequence * length
        size = length
    for r in tl.static_range(W - 1):
        down = tl.zeros((C,), tl.float32)
        for j in tl.static_range(W):
            place = r - (W - 1) + j  # of the token that has this tap j places before it
            if place >= 0:
                ok = here & (place < size)
                own = tl.load(w + channel * W + (W - 1 - j), mask=here, other=0.0).to(tl.float32)
                down += own * tl.load(ds + (start + place).to(tl.int64) * c + channel, mask=ok, other=0.0)
        tl.store(
            dtaps + (sequence.to(tl.int64) * (W - 1) + r) * c + channel, down.to(dtaps.dtype.element_ty), mask=here
        )


def tiles(x: Tensor, length: int, starts, sequences) -> tuple[dict, int, int]:
    """What all kernels of the convolution are told, and the number of tiles along t and along c."""
    c = x.shape[-1]
    T, C = (16, 32) if INTERPRETED else (32, 128)
    C = min(C, max(16, next_power_of_2(c)))
    return {"PACKED": starts is not None, "T": T, "C": C}, cdiv(x.shape[0], T), cdiv(c, C)


def convolution(x, w, bias, activation, taps, length: int, starts, sequences) -> Tensor:
    """x : n c, sequences of `length` rows, or from row starts[s] to starts[s + 1] where `sequences` says s of each row;
    w : c W; taps : s W-1 c."""
    y, (meta, along, across) = torch.empty_like(x), tiles(x, length, starts, sequences)
    args = (x, w, bias, taps, y, starts, sequences, x.shape[0], length, x.shape[1])
    launch(convolution_forward, along * across, *args, W=w.shape[1], ACT=ACTIVATIONS[activation], **meta)
    return y


def convolution_gradients(dy, x, w, bias, activation, taps, length: int, starts, sequences):
    """dx, dw, dbias (float32), dtaps; None for what is not there."""
    (n, c), W, (meta, along, across) = x.shape, w.shape[1], tiles(x, length, starts, sequences)
    programs = max(1, min(along, cdiv(8 * multiprocessors(x.device), across)))
    dx, dw = torch.empty_like(x), x.new_empty(programs, W, c, dtype=torch.float32)
    ds = torch.empty_like(x, dtype=torch.float32)
    dbias = None if bias is None else x.new_empty(programs, c, dtype=torch.float32)
    args = (x, dy, w, bias, taps, ds, dw, dbias, starts, sequences, n, length, c, programs)
    launch(convolution_backward, programs * across, *args, W=W, TAPS=LONGEST, ACT=ACTIVATIONS[activation], **meta)
    launch(convolution_down, along * across, ds, w, dx, starts, sequences, n, length, c, W=W, **meta)
    dtaps = None
    if taps is not None:
        dtaps = torch.empty_like(taps)
        meta.pop("T")
        launch(taps_backward, taps.shape[0] * across, ds, w, dtaps, starts, length, c, W=W, **meta)
    return dx, dw.sum(0).T, None if dbias is None else dbias.sum(0), dtaps


# --------------------------------------------------------------------------------------------------------- shift
#
# Bytes: 2 U either way, each number read once and written once. `last` is the one tap of a window of two.


@triton.jit
def shift_forward(
    x, last, y, starts, sequences, tokens, length, c,
    PACKED: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    t, channel, here = tile_of(c, T, C)
    ok = (t < tokens) & here
    sequence, start, _ = token_of(t, tokens, length, starts, sequences, PACKED)
    value = input_at(x, last, sequence, t - start - 1, start, channel, ok, c, 2)
    tl.store(y + t.to(tl.int64) * c + channel, value.to(y.dtype.element_ty), mask=ok)


@triton.jit
def shift_backward(
    dy, dx, dlast, starts, sequences, tokens, length, c,
    PACKED: tl.constexpr, T: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A sequence's first dy is its `last`'s; where there is no token, nobody writes: dlast is zeros before."""
    t, channel, here = tile_of(c, T, C)
    ok = (t < tokens) & here
    sequence, start, size = token_of(t, tokens, length, starts, sequences, PACKED)
    at = t.to(tl.int64) * c + channel
    up = tl.load(dy + at + c, mask=ok & (t - start + 1 < size), other=0.0)
    tl.store(dx + at, up, mask=ok)
    if dlast is not None:
        first = ok & (t == start)
        tl.store(dlast + sequence.to(tl.int64) * c + channel, tl.load(dy + at, mask=first, other=0.0), mask=first)


def shift(x: Tensor, last: Tensor | None, length: int, starts, sequences) -> Tensor:
    """x : n c as in `convolution`; last : s c."""
    y, (meta, along, across) = torch.empty_like(x), tiles(x, length, starts, sequences)
    launch(shift_forward, along * across, x, last, y, starts, sequences, x.shape[0], length, x.shape[1], **meta)
    return y


def shift_gradients(dy: Tensor, last: Tensor | None, length: int, starts, sequences):
    """dx, dlast; None for what is not there."""
    dx, (meta, along, across) = torch.empty_like(dy), tiles(dy, length, starts, sequences)
    dlast = None if last is None else torch.zeros_like(last)
    args = (dy, dx, dlast, starts, sequences, dy.shape[0], length, dy.shape[1])
    launch(shift_backward, along * across, *args, **meta)
    return dx, dlast
