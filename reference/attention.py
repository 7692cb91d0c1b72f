"""Softmax attention, the N of a hybrid, with rotary positions and a cache of keys and values."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from reference.recurrence import check_borders


class Past(NamedTuple):
    """Keys and values of the tokens so far. Sequence i has `length[i]` of them; the rest of its row is padding."""

    k: Float[Tensor, "b s g d"]
    v: Float[Tensor, "b s g d"]
    length: Int[Tensor, " b"]


def attention(
    q: Float[Tensor, "b t h d"],
    k: Float[Tensor, "b t g d"],
    v: Float[Tensor, "b t g d"],
    past: Past | None = None,
    cu_seqlens=None,
) -> tuple[Float[Tensor, "b t h d"], Past]:
    """o_i = sum over j <= i of softmax(q_i · k_j / sqrt(d)) v_j; h query heads share g key heads (2305.13245).

    Earlier tokens come from `past`. Positions must be in q and k already (`rotate`). Documents do not see each other.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads: the first must be a multiple")
    if cu_seqlens is not None:
        check_borders(cu_seqlens, *q.shape[:2])
        return over_packed(q, k, v, past, cu_seqlens)
    if past is None:
        length = torch.full((q.shape[0],), q.shape[1], dtype=torch.int64, device=q.device)
        return product(q, k, v, None), Past(k, v, length)
    now = appended(past, k, v)
    return product(q, now.k, now.v, visible(past.length, q.shape[1], now.k.shape[1])), now


def appended(past: Past, k: Tensor, v: Tensor) -> Past:
    """The new keys and values behind each sequence's own last one."""
    b, t = k.shape[:2]
    length = past.length + t
    room = int(length.max()) - past.k.shape[1]
    at = past.length[:, None] + torch.arange(t, device=k.device)
    row = torch.arange(b, device=k.device)[:, None]
    grown = [F.pad(x, (0, 0, 0, 0, 0, max(room, 0))).index_put((row, at), new) for x, new in ((past.k, k), (past.v, v))]
    return Past(*grown, length)


def visible(before: Int[Tensor, " b"], t: int, s: int) -> Tensor:
    """Which of s cached positions each of t new tokens may see: b 1 t s."""
    own = before[:, None] + torch.arange(t, device=before.device)
    return (torch.arange(s, device=before.device) <= own[..., None])[:, None]


def product(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Float[Tensor, "b t h d"]:
    if not q.shape[1]:
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    q, k, v = (rearrange(x, "b t h d -> b h t d") for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
    )
    return rearrange(o, "b h t d -> b t h d")


def over_packed(q: Tensor, k: Tensor, v: Tensor, past: Past | None, cu_seqlens) -> tuple[Tensor, Past]:
    """Each document on its own. Their pasts are padded to the longest."""
    borders, o, pasts = cu_seqlens.tolist(), [], []
    for i, (start, stop) in enumerate(pairwise(borders)):
        own = None if past is None else Past(*(x[i : i + 1] for x in past))
        y, own = attention(*(x[:, start:stop] for x in (q, k, v)), own)
        o.append(y)
        pasts.append(own)
    room = max(own.k.shape[1] for own in pasts)
    held = (
        torch.cat([F.pad(x, (0, 0, 0, 0, 0, room - x.shape[1])) for x in xs])
        for xs in zip(*(p[:2] for p in pasts), strict=True)
    )
    return torch.cat(o, 1), Past(*held, torch.cat([own.length for own in pasts]))


def rotate(x: Float[Tensor, "b t h d"], positions: Int[Tensor, "b t"], base: float = 10000.0) -> Tensor:
    """RoPE (2104.09864): channels i and i + d/2 turn by position · base^(-2i/d). d must be even."""
    if x.shape[-1] % 2:
        raise ValueError(f"heads of {x.shape[-1]} channels cannot rotate: channels turn in pairs, use an even size")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    half = x.shape[-1] // 2
    speed = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions[..., None].double() * speed)[:, :, None]  # as float32 it is off by 0.004 at position 100,000
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    a, b = x.to(wide).split(half, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
