"""What looks at a token and its nearest neighbours: short convolution, token shift, norms.

Both neighbours' states are the last inputs: `taps` the last w - 1 of a convolution, `last` the one before for a shift.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from reference.documents import document_of, position_in_document

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
    n = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if taps is None:
        taps = x.new_zeros(n, width - 1, x.shape[-1])
    if cu_seqlens is None:
        line = torch.cat([taps.to(x.dtype), x], 1)
        y = F.conv1d(line.mT, weight[:, None].to(x.dtype), bias, groups=x.shape[-1]).mT
        return ACTIVATION[activation](y), line[:, line.shape[1] - (width - 1) :]
    y = sum(weight[:, width - 1 - j].to(x.dtype) * back(x, j, taps, cu_seqlens) for j in range(width))
    y = y if bias is None else y + bias
    return ACTIVATION[activation](y), last_inputs(x, taps, cu_seqlens)


def token_shift(
    x: Float[Tensor, "b t d"], last: Float[Tensor, "b d"] | None = None, cu_seqlens=None
) -> tuple[Float[Tensor, "b t d"], Float[Tensor, "b d"]]:
    """x_{t-1} for every t, with `last` (zeros if None) before the first; and the new last. RWKV (2404.05892)."""
    n = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    taps = x.new_zeros(n, 1, x.shape[-1]) if last is None else last[:, None].to(x.dtype)
    if cu_seqlens is None:
        line = torch.cat([taps, x], 1)
        return line[:, :-1], line[:, -1]
    return back(x, 1, taps, cu_seqlens), last_inputs(x, taps, cu_seqlens)[:, -1]


def back(x: Float[Tensor, "1 t c"], j: int, taps: Float[Tensor, "n w1 c"], cu_seqlens) -> Float[Tensor, "1 t c"]:
    """x_{t-j} within each token's own document; its document's taps where that lies before the first token."""
    if j == 0:
        return x
    t, reach = x.shape[1], taps.shape[1]
    position = position_in_document(cu_seqlens, t)
    earlier = F.pad(x[0], (0, 0, j, 0))[:t]
    slot = (reach - j + position).clamp(0, reach - 1)
    tap = taps[document_of(cu_seqlens, t), slot].to(x.dtype)
    return torch.where((position >= j)[:, None], earlier, tap)[None]


def last_inputs(x: Float[Tensor, "1 t c"], taps: Float[Tensor, "n w1 c"], cu_seqlens) -> Float[Tensor, "n w1 c"]:
    """The last inputs of every document: of its tokens, and of its former taps where it is shorter than they are."""
    reach = taps.shape[1]
    if reach == 0:
        return taps
    length = cu_seqlens.diff()[:, None]
    from_end = torch.arange(reach, 0, -1, device=x.device)  # reach, ..., 2, 1 tokens before the document's end
    line = torch.cat([x[0], x.new_zeros(1, x.shape[-1])])
    inside = length >= from_end
    token = torch.where(inside, cu_seqlens[1:, None] - from_end, x.shape[1])
    slot = (reach - from_end + length).clamp(max=reach - 1)
    tap = taps.to(x.dtype).gather(1, slot[..., None].expand(-1, -1, x.shape[-1]).long())
    return torch.where(inside[..., None], line[token], tap)


def norm(
    x: Float[Tensor, "... d"],
    weight: Float[Tensor, " d"] | None,
    eps: float = 1e-5,
    gate: Float[Tensor, "... d"] | None = None,
    activation: str | None = "silu",
) -> Float[Tensor, "... d"]:
    """x / sqrt(mean(x²) + eps) · weight, then · act(gate) if there is one. Float32 inside (1910.07467)."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = F.rms_norm(x.to(wide), x.shape[-1:], None if weight is None else weight.to(wide), eps)
    if gate is not None:
        y = y * ACTIVATION[activation](gate.to(wide))
    return y.to(x.dtype)


def unit(x: Float[Tensor, "... d"], eps: float = 1e-6) -> Float[Tensor, "... d"]:
    """x / sqrt(sum(x²) + eps), float32 inside: keys of length one keep a delta rule's step from growing."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(wide)
    return (y * torch.rsqrt((y * y).sum(-1, keepdim=True) + eps)).to(x.dtype)
