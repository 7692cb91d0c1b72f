"""Softmax attention in pieces: some queries over some keys, and the logarithm of each query's sum of e^score.

    o = Σ_p e^(l_p - l) o_p,  l = log Σ_p e^(l_p)            outputs of pieces are those of all their keys together

Backward a piece needs no more than the whole's o and l (2205.14135): its weights are e^(score - l). Where tensors lie
on a GPU in 16 bits, torch's FlashAttention-2 (2307.08691) computes a piece, and no table of scores is made; elsewhere,
and in heads above 256 channels, it is plain PyTorch in float32 or float64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reference.documents import document_of
from reference.head import product_of

FUSED = {("cuda", torch.bfloat16), ("cuda", torch.float16)}
WIDEST = 256  # channels of a head in those kernels
SCORES = 2**28  # that are there at one moment, in plain PyTorch: 1 GiB in float32


class Sight(NamedTuple):
    """Who sees whom. The last of t queries stands beside the last of s keys, whatever t and s. Every query must see a
    key."""

    causal: bool = False  # none behind the key that it stands beside
    left: int | None = None  # so many keys before that one; None: all
    cu_seqlens: Int[Tensor, " n1"] | None = None  # of documents that do not see each other: b = 1, t = s

    def seen(self, rows: slice, t: int, s: int, device) -> Bool[Tensor, "r s"]:
        beside = torch.arange(t, device=device)[rows, None] + s - t
        place = torch.arange(s, device=device)
        seen = (place <= beside) if self.causal else (place < s).expand(len(beside), s)
        if self.left is not None:
            seen = seen & (place >= beside - self.left)
        if self.cu_seqlens is not None:
            document = document_of(self.cu_seqlens, t)
            seen = seen & (document[rows, None] == document)
        return seen


def fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether there are kernels for these, as `multiplied`."""
    kinds = {(x.device.type, product_of(x)) for x in (q, k, v)}
    return len(kinds) == 1 and kinds <= FUSED and max(q.shape[-1], v.shape[-1]) <= WIDEST


def multiplied(*tensors: Tensor) -> list[Tensor]:
    """In the dtype in which autocast has products computed: the kernels' own functions are unknown to it."""
    return [x.to(product_of(x)) for x in tensors]


def piece(
    q: Float[Tensor, "b t h d"], k: Float[Tensor, "b s g d"], v: Float[Tensor, "b s g e"], sight: Sight, scale: float
) -> tuple[Float[Tensor, "b t h e"], Float[Tensor, "b h t"]]:
    """(o, l) of these queries over these keys; h query heads share g key heads. Without kernels o is as wide as l."""
    return (by_kernel if fused(q, k, v) else plainly)(q, k, v, sight, scale)


def piece_back(do, q, k, v, o, log_sum, sight: Sight, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) of a piece, from the o and l of the whole that it is a piece of."""
    return (by_kernel_back if fused(q, k, v) else plainly_back)(do, q, k, v, o, log_sum, sight, scale)


def merge(o: Tensor, log_sum: Tensor, more: Tensor, log_more: Tensor) -> None:
    """Adds what another piece found, in place."""
    both = torch.logaddexp(log_sum, log_more)
    old, new = (rearrange((x - both).exp(), "b h t -> b t h 1") for x in (log_sum, log_more))
    o.mul_(old).add_(more * new)
    log_sum.copy_(both)


# ------------------------------------------------------------------------------------------------------ by kernels


def flash(q, k, v, sight: Sight, scale: float | None = None) -> Float[Tensor, "b t h e"]:
    """The outputs alone, by the kernels; differentiable. `scale` is 1 / sqrt(d) if None."""
    return by_kernel(*multiplied(q, k, v), sight, q.shape[-1] ** -0.5 if scale is None else scale)[0]


def by_kernel(q, k, v, sight, scale):
    places, how = arguments(q, k, sight, scale)
    tensors = as_kernels_want(sight, q, k, v)
    o, log_sum, *_ = torch.ops.aten._flash_attention_forward(*tensors, *places, 0.0, sight.causal, False, **how)
    if sight.cu_seqlens is not None:
        o, log_sum = o[None], log_sum[None]
    return o[..., : v.shape[-1]], log_sum


def by_kernel_back(do, q, k, v, o, log_sum, sight, scale):
    places, how = arguments(q, k, sight, scale)
    do, *tensors, o = as_kernels_want(sight, do, q, k, v, o)
    log_sum = (log_sum if sight.cu_seqlens is None else log_sum[0]).contiguous()
    unread = (torch.zeros(shape, dtype=torch.uint64, device=q.device) for shape in ((2,), ()))  # there is no dropout
    found = torch.ops.aten._flash_attention_backward(
        do, *tensors, o, log_sum, *places, 0.0, sight.causal, *unread, **how
    )
    return tuple(dx.view(*x.shape[:-1], -1)[..., : x.shape[-1]] for dx, x in zip(found, (q, k, v), strict=True))


def arguments(q: Tensor, k: Tensor, sight: Sight, scale: float) -> tuple[tuple, dict]:
    """Borders of documents and the longest one, or the lengths; and what has a name."""
    how = {"scale": scale, "window_size_left": sight.left}
    cu = sight.cu_seqlens
    if cu is None:
        return (None, None, q.shape[1], k.shape[1]), how
    longest = max(int(cu.diff().max()), 2)  # were it 1, the kernels would take each document to have one token
    return (cu.contiguous(), cu.contiguous(), longest, longest), how


def as_kernels_want(sight: Sight, *tensors: Tensor) -> list[Tensor]:
    """All heads of one size, a multiple of 8, that lie where 16 bytes begin; documents in one row, without a batch."""
    size = -(-max(x.shape[-1] for x in tensors) // 8) * 8
    padded = (F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x for x in tensors)
    padded = [x if in_place(x) else x.clone(memory_format=torch.contiguous_format) for x in padded]
    return padded if sight.cu_seqlens is None else [x[0] for x in padded]


def in_place(x: Tensor) -> bool:
    return x.stride(-1) == 1 and not any(n % 8 for n in (x.storage_offset(), *x.stride()[:-1]))


# --------------------------------------------------------------------------------------------------------- plainly


def plainly(q, k, v, sight, scale):
    queries, k, v = by_head(q, k, v, scale)
    log_sum = queries.new_empty(queries.shape[:-1])
    o = queries.new_empty(*log_sum.shape, v.shape[-1])
    for rows, scores in scored(queries, k, sight):
        log_sum[..., rows] = scores.logsumexp(-1)
        weights = (scores - log_sum[..., rows, None]).exp()
        o[..., rows, :] = einsum(weights, v, "b g r t s, b g s e -> b g r t e")
    return rearrange(o, "b g r t e -> b t (g r) e"), rearrange(log_sum, "b g r t -> b (g r) t")


def plainly_back(do, q, k, v, o, log_sum, sight, scale):
    queries, keys, values = by_head(q, k, v, scale)
    do, o = (rearrange(x.to(queries.dtype), "b t (g r) e -> b g r t e", g=k.shape[2]) for x in (do, o))
    along = (do * o).sum(-1, keepdim=True)
    log_sum = rearrange(log_sum, "b (g r) t -> b g r t 1", g=k.shape[2])
    dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))
    for rows, scores in scored(queries, keys, sight):
        weights, D = (scores - log_sum[..., rows, :]).exp(), do[..., rows, :]
        dv += einsum(weights, D, "b g r t s, b g r t e -> b g s e")
        ds = weights * (einsum(D, values, "b g r t e, b g s e -> b g r t s") - along[..., rows, :])
        dq[..., rows, :] = einsum(ds, keys, "b g r t s, b g s d -> b g r t d")
        dk += einsum(ds, queries[..., rows, :], "b g r t s, b g r t d -> b g s d")
    dq = rearrange(dq * scale, "b g r t d -> b t (g r) d")
    return dq, *(rearrange(x, "b g s d -> b s g d") for x in (dk, dv))


def by_head(q, k, v, scale):
    """Scaled queries b g r t d, of r heads that share a key head, and keys and values b g s d, in one wide dtype."""
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = rearrange(q.to(wide) * scale, "b t (g r) d -> b g r t d", g=k.shape[2])
    return queries, *(rearrange(x.to(wide), "b s g d -> b g s d") for x in (k, v))


def scored(q, k, sight: Sight) -> Iterator[tuple[slice, Float[Tensor, "b g r t s"]]]:
    """Scores of some queries at a time, and which they are."""
    t, s = q.shape[-2], k.shape[-2]
    step = max(SCORES // (q.shape[:3].numel() * s), 1)
    for start in range(0, t, step):
        rows = slice(start, start + step)
        scores = einsum(q[..., rows, :], k, "b g r t d, b g s d -> b g r t s")
        yield rows, scores.masked_fill(~sight.seen(rows, t, s, q.device), -torch.inf)
