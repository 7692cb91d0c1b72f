"""Softmax attention, its window, its cache and its rotary positions against formulas written out."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flash
from inputs import Made
from reference.attention import Past, attention, behind, rotate

close = {"rtol": 1e-9, "atol": 1e-10}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(b, t, h=2, g=2, d=4, seed=0, e=None):
    return draw(b, t, h, d, seed=seed), draw(b, t, g, d, seed=seed + 1), draw(b, t, g, e or d, seed=seed + 2)


def naive(q, k, v, window=None, scale=None):
    """One sequence whose queries are the last of its tokens: t h d, s g d, s g e -> t h e."""
    t, h, d = q.shape
    s, g, e = v.shape
    o = q.new_zeros(t, h, e)
    for i in range(t):
        last = s - t + i
        seen = range(0 if window is None else max(0, last - window + 1), last + 1)
        for head in range(h):
            shared = head // (h // g)  # neighbours share
            weights = [math.exp(sum(q[i, head] * k[j, shared]) * (scale or d**-0.5)) for j in seen]
            for j, weight in zip(seen, weights, strict=True):
                o[i, head] += weight / sum(weights) * v[j, shared]
    return o


def kept(n, window):
    """How many of n tokens a later one can see."""
    return n if window is None else min(n, window - 1)


WINDOW = st.sampled_from([None, None, 1, 2, 3, 5])
SCALE = st.sampled_from([None, 0.3])


@given(
    t=st.integers(0, 6),
    g=st.integers(1, 2),
    share=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    window=WINDOW,
    scale=SCALE,
    seed=st.integers(0, 99),
)
def test_attention_is_its_formula(t, g, share, sizes, window, scale, seed):
    q, k, v = qkv(2, t, g * share, g, sizes[0], seed, sizes[1])
    o, past = attention(q, k, v, window=window, scale=scale)
    for i in range(2):
        torch.testing.assert_close(o[i], naive(q[i], k[i], v[i], window, scale), **close)
    first = t - kept(t, window)
    assert torch.equal(past.k, k[:, first:]) and torch.equal(past.v, v[:, first:])
    assert past.length.tolist() == [t - first] * 2


@given(
    lengths=st.lists(st.sampled_from([0, 1, 1, 3, 6]), min_size=1, max_size=5),
    g=st.sampled_from([1, 2, 4]),
    window=WINDOW,
)
def test_pieces_equal_the_whole(lengths, g, window):
    q, k, v = qkv(2, sum(lengths), 4, g, e=3)
    whole, wanted = attention(q, k, v, window=window)
    o, past = [], None
    for a, b in pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]):
        y, past = attention(q[:, a:b], k[:, a:b], v[:, a:b], past, window=window)
        o.append(y)
        assert past.k.shape[1] == past.v.shape[1] == kept(b, window)
    torch.testing.assert_close(torch.cat(o, 1), whole, **close)
    assert all(torch.equal(a, b) for a, b in zip(past, wanted, strict=True))


@given(before=st.integers(1, 6), t=st.integers(0, 6), g=st.sampled_from([1, 2, 4]), scale=SCALE)
def test_what_stands_behind_others_sees_them_all(before, t, g, scale):
    q, k, v = qkv(2, before + t, 4, g, e=3)
    whole, _ = attention(q, k, v, scale=scale)
    torch.testing.assert_close(behind(q[:, before:], k, v, scale), whole[:, before:], **close)


@given(
    before=st.integers(0, 6),
    t=st.integers(1, 6),
    g=st.sampled_from([1, 2, 4]),
    window=WINDOW,
    scale=SCALE,
    inner=st.none() | st.lists(st.integers(0, 6), max_size=3),
)
def test_kernels_find_the_same(before, t, g, window, scale, inner):
    """Behind a past, and in packed documents: outputs, cache and gradients."""
    q, k, v = (x.requires_grad_() for x in qkv(1, t, 4, g, e=3))
    old = [draw(1, before, g, n) for n in (4, 3)]
    cu = None if inner is None else torch.tensor(sorted([0, *(min(n, t) for n in inner), t]), dtype=torch.int32)

    def found():
        o, past = attention(q, k, v, None, cu, window, scale)
        later = behind(q, torch.cat([old[0], k], 1), torch.cat([old[1], v], 1), scale, window)
        return o, *past, later, *torch.autograd.grad((o * o + later).sum(), (q, k, v))

    wanted = found()
    with flash.there():
        for got, x in zip(found(), wanted, strict=True):
            torch.testing.assert_close(got, x, **close)


@pytest.mark.parametrize("window", [None, 3])
def test_kernels_make_no_table_of_scores(window):
    """Neither forward nor backward, behind a past, of packed documents, or with a window."""
    q, k, v = (x.requires_grad_() for x in qkv(1, 64))
    with flash.there(), Made() as made:
        o = behind(q[:, 32:], k, v, window=window) + attention(q, k, v, window=window or 9)[0][:, 32:]
        cu = torch.tensor([0, 9, 40, 64], dtype=torch.int32)
        o = o + attention(q, k, v, None, cu, window)[0][:, 32:]
        o.sum().backward()
    assert max(made.sizes) < 32 * 64


def test_what_a_window_forgets_takes_no_memory():
    """The cache after a long text is a copy of its end, not a view of it."""
    _, past = attention(*qkv(1, 100), window=4)
    assert past.k.untyped_storage().nbytes() == past.v.untyped_storage().nbytes() == 3 * 2 * 4 * 8


def padded(parts, fill):
    """Keys and values of uneven length as one cache. What stands behind a length must not matter."""
    room = max(len(k) for k, _ in parts)
    grown = [[torch.cat([x, x.new_full((room - len(x), *x.shape[1:]), fill)]) for x in part] for part in parts]
    length = torch.tensor([len(k) for k, _ in parts])
    return Past(*map(torch.stack, zip(*grown, strict=True)), length)


@given(
    before=st.lists(st.sampled_from([0, 1, 2, 5, 9]), min_size=1, max_size=4),
    t=st.sampled_from([0, 1, 1, 2, 7]),
    window=WINDOW,
    seed=st.integers(0, 99),
)
def test_rows_with_uneven_pasts(before, t, window, seed):
    b = len(before)
    parts = [tuple(draw(n, 1, 4, seed=seed + i) for i in (10, 11)) for n in before]
    q, k, v = qkv(b, t, 2, 1, seed=seed)
    o, past = attention(q, k, v, padded(parts, 50.0), window=window)
    assert past.length.tolist() == [kept(n + t, window) for n in before]
    for i, (old_k, old_v) in enumerate(parts):
        all_k, all_v = torch.cat([old_k, k[i]]), torch.cat([old_v, v[i]])
        torch.testing.assert_close(o[i], naive(q[i], all_k, all_v, window), **close)
        last = kept(len(all_k), window)
        for got, wanted in ((past.k, all_k), (past.v, all_v)):
            assert torch.equal(got[i, :last], wanted[len(wanted) - last :])


@st.composite
def borders(draw, n):
    lengths = draw(st.lists(st.sampled_from([0, 1, 2, 5]), min_size=n, max_size=n))
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@given(data=st.data(), n=st.integers(1, 4), window=WINDOW, scale=SCALE, seed=st.integers(0, 99))
def test_packed_documents_with_pasts_equal_each_alone(data, n, window, scale, seed):
    state, alone = None, [None] * n
    for turn in range(3):
        cu_seqlens = data.draw(borders(n))
        q, k, v = qkv(1, int(cu_seqlens[-1]), 2, 1, seed=seed + turn)
        o, state = attention(q, k, v, state, cu_seqlens, window, scale)
        for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
            own, alone[i] = attention(q[:, a:b], k[:, a:b], v[:, a:b], alone[i], None, window, scale)
            torch.testing.assert_close(o[:, a:b], own, **close)
            end = int(alone[i].length)
            assert int(state.length[i]) == end
            assert torch.equal(state.k[i, :end], alone[i].k[0, :end])
            assert torch.equal(state.v[i, :end], alone[i].v[0, :end])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 3])
def test_gradients(packed, window):
    """Of the outputs and of the cache, from the inputs and the past."""
    inputs = [*qkv(1, 5, 2, 1, 2, e=3), draw(1, 3, 1, 2, seed=7), draw(1, 3, 1, 3, seed=8)]
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32) if packed else None

    def run(q, k, v, old_k, old_v):
        o, past = attention(q, k, v, Past(old_k, old_v, torch.tensor([2])), cu_seqlens, window)
        return o, past.k, past.v

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


def test_bad_inputs_give_one_line():
    q, k, v = qkv(2, 5, 4, 3)
    packed = torch.tensor([0, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 key heads") as caught:
        attention(q, k, v)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="expected b = 1, got b = 2"):
        attention(q, k[:, :, :2], v[:, :, :2], cu_seqlens=packed)
    with pytest.raises(ValueError, match="must rise from 0 to t = 5"):
        attention(q[:1], k[:1, :, :2], v[:1, :, :2], cu_seqlens=packed - 1)
    for channels, message in (
        (None, "heads of 5 channels cannot rotate"),
        (6, "6 channels cannot rotate in heads of 5"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            rotate(draw(1, 2, 2, 5), torch.arange(2)[None], channels=channels)
        assert "\n" not in str(caught.value)
    for window in (0, -1):
        with pytest.raises(ValueError, match=f"window is {window}; it must be at least 1") as caught:
            attention(q[:, :, :3], k, v, window=window)
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------- positions


@given(half=st.integers(1, 5), base=st.sampled_from([100.0, 1e4, 5e5]), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_rotation_is_a_complex_product(half, base, seed):
    x = draw(2, 3, 2, 2 * half, seed=seed)
    positions = torch.randint(0, 1000, (2, 3), generator=torch.Generator().manual_seed(seed))
    y = rotate(x, positions, base)
    z = torch.complex(x[..., :half], x[..., half:])
    for i in range(half):
        turned = z[..., i] * torch.exp(1j * positions.double() * base ** (-2 * i / (2 * half)))[..., None]
        torch.testing.assert_close(y[..., i], turned.real, **close)
        torch.testing.assert_close(y[..., i + half], turned.imag, **close)


@given(c=st.sampled_from([0, 2, 4, 6]), seed=st.integers(0, 99))
def test_the_first_channels_rotate_as_a_head_of_their_own(c, seed):
    x, positions = draw(2, 3, 2, 6, seed=seed), torch.arange(6).view(2, 3)
    y = rotate(x, positions, channels=c)
    assert torch.equal(y[..., :c], rotate(x[..., :c], positions)) and torch.equal(y[..., c:], x[..., c:])
    assert (y[:, 1:, :, :c] != x[:, 1:, :, :c]).all()


@given(
    a=st.integers(0, 50), b=st.integers(0, 50), shift=st.sampled_from([1, 77, 131072, 10**6]), seed=st.integers(0, 99)
)
def test_scores_depend_on_the_distance_alone(a, b, shift, seed):
    """In float32 too, and far into a text, where an angle that was rounded to float32 would be off by 0.004."""
    q, k = draw(1, 1, 1, 16, seed=seed), draw(1, 1, 1, 16, seed=seed + 1)

    def score(dtype, shift):
        at = [torch.tensor([[p + shift]]) for p in (a, b)]
        return (rotate(q.to(dtype), at[0]) * rotate(k.to(dtype), at[1])).sum().item()

    scale = (q.norm() * k.norm()).item()
    assert abs(score(torch.float64, shift) - score(torch.float64, 0)) < 1e-9 * scale
    assert abs(score(torch.float32, shift) - score(torch.float64, 0)) < 1e-6 * scale


def test_rotation_keeps_lengths_and_the_first_position():
    x = draw(1, 4, 2, 6)
    y = rotate(x, torch.arange(4)[None])
    assert torch.equal(y[:, 0], x[:, 0])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), **close)
    assert (y[:, 1:] != x[:, 1:]).all()
    assert rotate(x.bfloat16(), torch.arange(4)[None]).dtype == torch.bfloat16
