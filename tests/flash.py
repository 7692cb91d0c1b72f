"""FlashAttention-2's functions as torch has them on GPUs, written out for CPUs and float64, with the kernels' limits.

`there()` registers them, and says that they may be used: what composes them can then be tested exactly without a GPU.
"""

import contextlib
import math
from itertools import pairwise
from unittest import mock

import torch

from reference import pieces

_kept = []  # the registration, which ends with the object


@contextlib.contextmanager
def there():
    """Inside, float64 on CPUs has the kernels."""
    if not _kept:
        library = torch.library.Library("aten", "IMPL")
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        _kept.append(library)
    with mock.patch.object(pieces, "FUSED", {("cpu", torch.float64)}):
        yield


def check(q, k, v, cu_q, cu_k, max_q, max_k, dropout):
    size = q.shape[-1]
    assert k.shape[-1] == v.shape[-1] == size <= 256 and size % 8 == 0 and not dropout
    assert q.shape[-2] % k.shape[-2] == 0 and q.numel() and k.numel()
    for x in (q, k, v):  # 16 bits each, 16 bytes at a time
        assert x.stride(-1) == 1 and x.storage_offset() % 8 == 0 and all(n % 8 == 0 for n in x.stride()[:-1])
    if cu_q is None:
        assert cu_k is None and (max_q, max_k) == (q.shape[1], k.shape[1]) and q.ndim == 4
        return
    assert q.ndim == 3 and max_q >= cu_q.diff().max() and max_k >= cu_k.diff().max() and max_q > 1
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.is_contiguous() and cu_k.is_contiguous()


def texts(q, k, cu_q, cu_k):
    """Indices of queries and of keys that belong to one sequence."""
    if cu_q is None:
        return [(i, i) for i in range(len(q))]
    return [(slice(*a), slice(*b)) for a, b in zip(pairwise(cu_q.tolist()), pairwise(cu_k.tolist()), strict=True)]


def scores_of(q, k, causal, scale, left, right):
    """t h d, s g d -> h t s: query i may see keys from i + s - t - left to i + s - t + right."""
    t, s, right = len(q), len(k), 0 if causal else right
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    for i in range(t):
        if left is not None and left >= 0:
            scores[:, i, : max(i + s - t - left, 0)] = -math.inf
        if right is not None and right >= 0:
            scores[:, i, max(i + s - t + right + 1, 0) :] = -math.inf
    return scores


def forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, window_size_left=None, window_size_right=None
):
    check(q, k, v, cu_q, cu_k, max_q, max_k, dropout)
    o = torch.full_like(q, math.nan, memory_format=torch.contiguous_format)
    log_sum = q.new_empty((len(q), q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], len(q)))
    for mine, theirs in texts(q, k, cu_q, cu_k):
        scores = scores_of(q[mine], k[theirs], causal, scale, window_size_left, window_size_right)
        repeated = v[theirs].repeat_interleave(q.shape[-2] // k.shape[-2], 1)
        o[mine] = torch.einsum("hts,she->the", scores.softmax(-1), repeated)
        log_sum[mine if cu_q is None else (slice(None), mine)] = scores.logsumexp(-1)
    empty = q.new_empty(0)
    return o, log_sum, empty, empty, empty


def backward(
    do, q, k, v, o, log_sum, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *,
    scale, window_size_left=None, window_size_right=None,
):  # fmt: skip
    cu_q, cu_k = (None if x is None or not x.numel() else x for x in (cu_q, cu_k))
    check(q, k, v, cu_q, cu_k, max_q, max_k, dropout)
    assert do.shape == o.shape == q.shape and log_sum.is_contiguous()
    dq, dk, dv = (torch.full_like(x, math.nan, memory_format=torch.contiguous_format) for x in (q, k, v))
    groups = q.shape[-2] // k.shape[-2]
    for mine, theirs in texts(q, k, cu_q, cu_k):
        scores = scores_of(q[mine], k[theirs], causal, scale, window_size_left, window_size_right)
        weights = (scores - log_sum[mine if cu_q is None else (slice(None), mine)][..., None]).exp()
        keys, values = (x[theirs].repeat_interleave(groups, 1) for x in (k, v))
        along = (do[mine] * o[mine]).sum(-1).T[..., None]
        ds = weights * (torch.einsum("the,she->hts", do[mine], values) - along) * scale
        dq[mine] = torch.einsum("hts,shd->thd", ds, keys)
        dk[theirs] = torch.einsum("hts,thd->shd", ds, q[mine]).unflatten(1, (-1, groups)).sum(2)
        dv[theirs] = torch.einsum("hts,the->she", weights, do[mine]).unflatten(1, (-1, groups)).sum(2)
    return dq, dk, dv
