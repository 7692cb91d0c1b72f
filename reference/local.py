"""What looks at a token and its nearest neighbours: short convolution, token shift, norms; and running sums.

Both neighbours' states are the last inputs: `taps` the last w - 1 of a convolution, `last` the one before for a shift.
A running sum's is the sum so far.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reference.documents import document_of, over_documents

ACTIVATION = {None: lambda x: x, "silu": F.silu, "sigmoid": torch.sigmoid, "relu": F.relu, "gelu": F.gelu}


def short_convolution(
    x: Float[Tensor, "b t c"],
    weight: Float[Tensor, "c w"],
    bias: Float[Tensor, " c"] | None = None,
    activation: str | None = None,
    taps: Float[Tensor, "b w1 c"] | None = None,
    cu_seqlens=None,
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b w1 c"]]:
    """Depthwise and causal: y_t = act(sum_j weight[:, w-1-j] x_{t-j} + bias), the last tap being the token itself.

    Before a sequence's (document's) first token stand its `taps`, its last w - 1 inputs, zeros if None.
    Returns y and the new taps. Used on projected q, k, v (Mamba 2312.00752, DeltaNet 2406.06484).
    """
    width = weight.shape[-1]
    line, seat, taps = lined_up(x, taps, width - 1, cu_seqlens)
    reach = line.shape[1] - (width - 1)
    y = sum(weight[:, j].to(x.dtype) * line[:, j : j + reach] for j in range(width))
    y = y if bias is None else y + bias.to(x.dtype)
    return ACTIVATION[activation](y if seat is None else y.index_select(1, seat)), taps


def token_shift(
    x: Float[Tensor, "b t d"], last: Float[Tensor, "b d"] | None = None, cu_seqlens=None
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """x_{t-1} for every t, with `last` (zeros if None) before the first; and the new last. RWKV (2404.05892)."""
    line, seat, taps = lined_up(x, None if last is None else last[:, None], 1, cu_seqlens)
    return line[:, :-1] if seat is None else line.index_select(1, seat), taps[:, 0]


def running_sum(
    x: Float[Tensor, "b t c"], last: Float[Tensor, "b c"] | None = None, cu_seqlens=None
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b c"]]:
    """last + x_1 + ... + x_t for every t (`last` zeros if None), and the new last; document by document.

    Float64: the angles that layers sum up would, in float32, be off by hundredths of a radian after 65,536 tokens.
    """
    n = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    last = x.new_zeros(n, x.shape[-1], dtype=torch.float64) if last is None else last.double()
    if cu_seqlens is None:
        return summed({"v": x.double()}, last)
    return over_documents(summed, {"v": x.double()}, last, cu_seqlens)


def summed(x: dict[str, Float[Tensor, "b t c"]], last: Float[Tensor, "b c"]) -> tuple[Tensor, Tensor]:
    return last[:, None] + x["v"].cumsum(1), last + x["v"].sum(1)


def lined_up(x: Float[Tensor, "b t c"], taps: Float[Tensor, "n r c"] | None, reach: int, cu_seqlens):
    """Every sequence (document) with its `reach` taps in front, so that whoever looks back finds its own past.

    Returns the line, where in it the window that ends at each token begins (None: at its own place), and the new taps.
    """
    n = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    taps = x.new_zeros(n, reach, x.shape[-1]) if taps is None else taps.to(x.dtype)
    if cu_seqlens is None:
        line = torch.cat([taps, x], 1)
        return line, None, line[:, line.shape[1] - reach :]
    t = x.shape[1]
    document, shift = document_of(cu_seqlens, t), torch.arange(n, device=x.device) * reach
    seat = torch.arange(t, device=x.device) + shift[document]
    ahead = torch.arange(reach, device=x.device)
    line = x.new_empty(t + n * reach, x.shape[-1])
    line = line.index_copy(0, seat + reach, x[0])
    line = line.index_copy(0, ((cu_seqlens[:-1] + shift)[:, None] + ahead).flatten(), taps.flatten(0, 1))
    return line[None], seat, line[(cu_seqlens[1:] + shift)[:, None] + ahead]


def norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"] | None,
    eps: float = 1e-5,
    gate: Float[Tensor, "... d"] | None = None,
    activation: str | None = "silu",
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "... d"]:
    """x / sqrt(mean(x²) + eps) · weight, then · act(gate) if there is one. Float32 inside (1910.07467), `dtype` (that
    of x if None) outside."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = F.rms_norm(x.to(wide), x.shape[-1:], None if weight is None else weight.to(wide), eps)
    if gate is not None:
        y = y * ACTIVATION[activation](gate.to(wide))
    return y.to(dtype or x.dtype)


def unit(x: Float[Tensor, "... d"], eps: float = 1e-6, scale: float = 1.0) -> Float[Tensor, "... d"]:
    """x / sqrt(sum(x²) + eps) · scale, float32 inside: keys of length one keep a delta rule's step from growing."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    return (y * (torch.rsqrt((y * y).sum(-1, keepdim=True) + eps) * scale)).to(x.dtype)


def elu_plus_one(x: Float[Tensor, "..."], scale: float = 1.0) -> Float[Tensor, "..."]:
    """(elu(x) + 1) · scale = scale · (x + 1 where x > 0, else e^x), float32 inside: the features of 2006.16236."""
    y = x.to(torch.promote_types(x.dtype, torch.float32))
    return (torch.where(y > 0, y + 1, y.clamp(max=0).exp()) * scale).to(x.dtype)
