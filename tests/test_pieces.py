"""Softmax attention in pieces: each against its formula, all together against the whole, with kernels and without."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import flash
from reference import pieces
from reference.pieces import Sight, merge, piece, piece_back

close = {"rtol": 1e-11, "atol": 1e-12}
KERNELS = (torch.bfloat16, torch.float16)
# t, s, causal, left, and borders of documents: one piece each of a kind, a rectangle, a diagonal, a past, a window
SIGHTS = {
    "all": (5, 7, Sight()),
    "diagonal": (6, 6, Sight(True)),
    "behind": (4, 7, Sight(True)),
    "window": (7, 7, Sight(True, 2)),
    "corner": (3, 5, Sight(False, 1)),
    "documents": (7, 7, Sight(True, None, torch.tensor([0, 0, 3, 4, 7], dtype=torch.int32))),
    "windows": (7, 7, Sight(True, 1, torch.tensor([0, 4, 7, 7], dtype=torch.int32))),
    "single tokens": (2, 2, Sight(True, None, torch.tensor([0, 1, 1, 2], dtype=torch.int32))),
}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(sight, t, s, g=2, share=2, d=6, e=9, seed=0):
    b = 2 if sight.cu_seqlens is None else 1
    return draw(b, t, g * share, d, seed=seed), draw(b, s, g, d, seed=seed + 1), draw(b, s, g, e, seed=seed + 2)


def formula(q, k, v, sight, scale):
    """(o, l) score by score."""
    t, h, s = *q.shape[1:3], k.shape[1]
    o, log_sum = [], []
    for i in range(t):
        at = i + s - t
        borders = [0, s] if sight.cu_seqlens is None else sight.cu_seqlens.tolist()
        start, stop = next((x, y) for x, y in pairwise(borders) if x <= at < y)
        seen = [
            j
            for j in range(start, stop)
            if (j <= at or not sight.causal) and (sight.left is None or j >= at - sight.left)
        ]
        keys, values = (x[:, seen].repeat_interleave(h // x.shape[2], 2) for x in (k, v))
        scores = (q[:, i, None] * keys).sum(-1) * scale  # b j h
        log_sum.append(scores.logsumexp(1))
        o.append((scores.softmax(1)[..., None] * values).sum(1))
    return torch.stack(o, 1), torch.stack(log_sum, 2)


@pytest.mark.parametrize("kind", SIGHTS)
@pytest.mark.parametrize("share", [1, 3])
def test_a_piece_is_its_formula(kind, share, monkeypatch):
    """With kernels and without, in one go and a few queries at a time: o, l, and gradients."""
    t, s, sight = SIGHTS[kind]
    inputs = [x.requires_grad_() for x in qkv(sight, t, s, share=share)]
    o, log_sum = formula(*inputs, sight, 0.4)
    do = draw(*o.shape, seed=7)
    wanted = o, log_sum, *torch.autograd.grad((o * do).sum(), inputs)
    inputs = [x.detach() for x in inputs]

    def compare():
        o, log_sum = piece(*inputs, sight, 0.4)
        torch.testing.assert_close((o, log_sum, *piece_back(do, *inputs, o, log_sum, sight, 0.4)), wanted, **close)

    compare()
    monkeypatch.setattr(pieces, "SCORES", 30)
    compare()
    with flash.there():
        compare()


@given(s=st.integers(1, 9), cut=st.integers(0, 9), t=st.integers(1, 4), kernels=st.booleans(), seed=st.integers(0, 99))
def test_pieces_together_are_the_whole(s, cut, t, kernels, seed):
    """Scores far apart, too: what one piece finds may be nothing beside another."""
    q, k, v = qkv(Sight(), t, s, seed=seed)
    k[:, 0] *= 300
    if kernels:
        with flash.there():
            put_together(q, k, v, sorted({0, min(cut, s), s}))
    else:
        put_together(q, k, v, sorted({0, min(cut, s), s}))


def put_together(q, k, v, cuts):
    do = draw(*q.shape[:3], v.shape[-1], seed=7)
    whole, log_whole = piece(q, k, v, Sight(), 0.4)
    o, log_sum = torch.zeros_like(whole), torch.full_like(log_whole, -torch.inf)
    dq, dk, dv = piece_back(do, q, k, v, whole, log_whole, Sight(), 0.4)
    total, scale = torch.zeros_like(dq), max(1.0, dq.abs().max().item())
    for a, b in pairwise(cuts):
        merge(o, log_sum, *piece(q, k[:, a:b], v[:, a:b], Sight(), 0.4))
        part = piece_back(do, q, k[:, a:b], v[:, a:b], whole, log_whole, Sight(), 0.4)
        total += part[0]
        torch.testing.assert_close(part[1:], (dk[:, a:b], dv[:, a:b]), **close)
    torch.testing.assert_close((o, log_sum), (whole, log_whole), **close)
    torch.testing.assert_close(total / scale, dq / scale, **close)


def test_who_has_kernels():
    x = torch.zeros(1, 1, 1, 8, dtype=torch.float64)
    assert not pieces.fused(x, x, x)
    with flash.there():
        assert pieces.fused(x, x, x)
        assert not pieces.fused(x.float(), x.float(), x.float()) and not pieces.fused(x, x, x.float())
        wide = x[..., :1].expand(1, 1, 1, 257)
        assert not pieces.fused(x, x, wide) and not pieces.fused(wide, wide, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", KERNELS)
@pytest.mark.parametrize("kind", SIGHTS)
def test_kernels_on_gpus(kind, dtype):
    """torch's own, in heads of many sizes: as near to float64 as 16 bits allow."""
    for (d, e), long in product([(64, 64), (6, 9), (12, 16), (192, 128)], [1, 50]):
        near(*SIGHTS[kind], dtype, d, e, long)


def near(t, s, sight, dtype, d, e, long):
    t, s, left = t * long, s * long, None if sight.left is None else sight.left * long
    cu = None if sight.cu_seqlens is None else sight.cu_seqlens.cuda() * long
    sight = Sight(sight.causal, left, cu)
    exact = [x.cuda().to(dtype).double() for x in qkv(sight, t, s, d=d, e=e)]
    o, log_sum = piece(*exact, sight, d**-0.5)
    do = draw(*o.shape, seed=7).cuda().to(dtype)
    right = o, log_sum, *piece_back(do.double(), *exact, o, log_sum, sight, d**-0.5)
    low = [x.to(dtype) for x in exact]
    assert pieces.fused(*low)
    found = *piece(*low, sight, d**-0.5), *piece_back(do, *low, o.to(dtype), log_sum.float(), sight, d**-0.5)
    for name, x, y in zip(("o", "l", "dq", "dk", "dv"), found, right, strict=True):
        assert x.dtype == (torch.float32 if name == "l" else dtype) and x.shape == y.shape
        error, allowed = (x - y).abs().max().item(), 4 * torch.finfo(dtype).eps * max(1.0, y.abs().max().item())
        assert error <= allowed, f"{name}: {error:.1e} > {allowed:.1e}"
