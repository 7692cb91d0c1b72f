"""Softmax attention, the N of a hybrid, with sliding windows, rotary positions and a cache of keys and values."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reference.cache import by_document, fresh, joined, recent, remember, stacked
from reference.pieces import Sight, flash, fused, multiplied
from reference.recurrence import check_borders


class Past(NamedTuple):
    """Keys and values of the tokens so far. Sequence i has `length[i]` of them; the rest of its row is padding."""

    k: Float[Tensor, "b s g d"]
    v: Float[Tensor, "b s g e"]
    length: Int[Tensor, " b"]


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g e"],
    past: Past | None = None,
    cu_seqlens=None,
    window: int | None = None,
    scale: float | None = None,
) -> tuple[Float[Tensor, "b t h e"], Past]:
    """o_i = Σ softmax(scale q_i · k_j) v_j over i - window < j <= i; h query heads share g key heads (2305.13245).

    `window` counts the token itself, as in Mistral (2310.06825); None: all j <= i. `scale` is 1 / sqrt(d) if None.
    Earlier tokens come from `past`; the new one has those that a later token can see, window - 1 at most. Positions
    must be in q and k already (`rotate`). Documents do not see each other. ValueError: h is no multiple of g, window
    below 1, wrong borders.
    """
    checked(q, k, cu_seqlens, window)
    new = fresh(Past, k, v)
    if past is None and cu_seqlens is not None and len(cu_seqlens) > 2 and q.shape[1] and fused(q, k, v):
        sight = Sight(True, reach(window), cu_seqlens)
        return flash(q, k, v, sight, scale), remember(None, new, cu_seqlens, window)
    if cu_seqlens is not None:
        texts = [
            attention(*(x[:, start:stop] for x in (q, k, v)), own, None, window, scale)
            for start, stop, own in by_document(past, cu_seqlens)
        ]
        return torch.cat([o for o, _ in texts], 1), stacked([own for _, own in texts])
    if past is None:
        return behind(q, k, v, scale, window), recent(new, window)
    now, t = joined(past, new), q.shape[1]
    mask = visible(now.length - t, t, now.k.shape[1], window)
    return product(q, now.k, now.v, mask, scale), recent(now, window)


def checked(q: Tensor, k: Tensor, cu_seqlens, window: int | None) -> None:
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads: the first must be a multiple")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it must be at least 1, the token itself, or None for all tokens")
    if cu_seqlens is not None:
        check_borders(cu_seqlens, *q.shape[:2])


def visible(before: Int[Tensor, " b"], t: int, s: int, window: int | None = None) -> Bool[Tensor, "b 1 t s"]:
    """Which of s cached positions each of t new tokens may see."""
    own = (before[:, None] + torch.arange(t, device=before.device))[..., None]
    place = torch.arange(s, device=before.device)
    seen = place <= own
    return (seen if window is None else seen & (place > own - window))[:, None]


def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Float[Tensor, "b t h e"]:
    if not q.shape[1]:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return rearrange(o, "b h t d -> b t h d")


def behind(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b s g d"],
    v: Float[Tensor, "b s g e"],
    scale: float | None = None,
    window: int | None = None,
) -> Float[Tensor, "b t h e"]:
    """The outputs of the last t of s tokens: those of `attention` after a past of s - t tokens in every row. On a GPU
    who sees whom is a rule that fast kernels know, and no table of t s places is made: in 16 bits by those of
    `reference.pieces`; in other dtypes by torch's own, which have no window."""
    t, s = q.shape[1], k.shape[1]
    if t == s and (window is None or t <= window):
        return product(q, k, v, None, scale)
    if t and fused(q, k, v):
        return flash(q, k, v, Sight(True, reach(window)), scale)
    if q.is_cuda and window is None:
        from torch.nn.attention.bias import causal_lower_right

        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
        return product(*multiplied(q, k, v), causal_lower_right(t, s), scale)
    return product(q, k, v, visible(torch.tensor([s - t], device=q.device), t, s, window), scale)


def reach(window: int | None) -> int | None:
    """How many tokens before itself a token sees."""
    return None if window is None else window - 1


def rotate(
    x: Float[Tensor, "b t h d"],
    positions: Int[Tensor, "b t"],
    base: float = 10000.0,
    channels: int | None = None,
) -> Float[Tensor, "b t h d"]:
    """RoPE (2104.09864) of a head's first c channels (None: all): i and i + c/2 turn by position · base^(-2i/c).

    The other channels pass, as in released models with a `partial_rotary_factor`. ValueError if c is odd or above d.
    """
    c = x.shape[-1] if channels is None else channels
    if c % 2:
        raise ValueError(f"heads of {c} channels cannot rotate: channels turn in pairs, use an even size")
    if not 0 <= c <= x.shape[-1]:
        raise ValueError(f"{c} channels cannot rotate in heads of {x.shape[-1]}: use 0 to {x.shape[-1]}")
    if not c:
        return x
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    speed = base ** (-torch.arange(c // 2, device=x.device, dtype=torch.float64) / (c // 2))
    angle = (positions[..., None].double() * speed)[:, :, None]  # as float32 it is off by 0.004 at position 100,000
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    a, b = x[..., :c].to(wide).chunk(2, -1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return torch.cat([turned, x[..., c:]], -1) if c < x.shape[-1] else turned
