"""Short convolution, token shift and norms against their formulas, number by number."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from reference.local import elu_plus_one, norm, running_sum, short_convolution, token_shift, unit

ACTIVATIONS = {
    None: lambda x: x,
    "silu": lambda x: x / (1 + math.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "relu": lambda x: max(x, 0.0),
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
}
close = {"rtol": 1e-10, "atol": 1e-11}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def line_of(x, taps, w):
    """The inputs of one sequence as lists, with w - 1 of them before its first token."""
    before = taps.tolist() if taps is not None else [[0.0] * x.shape[-1]] * (w - 1)
    return before + x.tolist()


def convolved(x, weight, bias, activation, taps):
    """One sequence: y[t][c] = act(sum over j of weight[c][w-1-j] x[t-j][c] + bias[c]), and the last w - 1 inputs."""
    w, line, y = weight.shape[1], line_of(x, taps, weight.shape[1]), []
    for t in range(len(x)):
        now = []
        for c in range(x.shape[-1]):
            total = sum(weight[c, w - 1 - j].item() * line[t + w - 1 - j][c] for j in range(w))
            now.append(ACTIVATIONS[activation](total + (0.0 if bias is None else bias[c].item())))
        y.append(now)
    shape = (len(x), x.shape[-1])
    last = line[len(line) - (w - 1) :]
    return torch.tensor(y, dtype=x.dtype).view(shape), torch.tensor(last, dtype=x.dtype).view(w - 1, x.shape[-1])


SIZES = {"t": st.integers(0, 9), "c": st.integers(1, 3), "w": st.integers(1, 5), "seed": st.integers(0, 99)}


@given(
    **SIZES,
    activation=st.sampled_from(list(ACTIVATIONS)),
    with_bias=st.booleans(),
    with_taps=st.booleans(),
)
def test_short_convolution_is_its_formula(t, c, w, seed, activation, with_bias, with_taps):
    x, weight = draw(2, t, c, seed=seed), draw(c, w, seed=seed + 1)
    bias = draw(c, seed=seed + 2) if with_bias else None
    taps = draw(2, w - 1, c, seed=seed + 3) if with_taps else None
    y, last = short_convolution(x, weight, bias, activation, taps)
    assert y.shape == x.shape and last.shape == (2, w - 1, c)
    for i in range(2):
        wanted, end = convolved(x[i], weight, bias, activation, None if taps is None else taps[i])
        torch.testing.assert_close(y[i], wanted, **close)
        assert torch.equal(last[i], end)


@st.composite
def borders(draw):
    lengths = draw(st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 8]), min_size=1, max_size=6))
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@given(cu_seqlens=borders(), w=st.integers(1, 5), seed=st.integers(0, 99), with_taps=st.booleans())
def test_packed_short_convolution_never_crosses_a_border(cu_seqlens, w, seed, with_taps):
    """Documents that are empty or shorter than the taps too, each behind its own taps."""
    n, t, c = len(cu_seqlens) - 1, int(cu_seqlens[-1]), 2
    x, weight, bias = draw(1, t, c, seed=seed), draw(c, w, seed=seed + 1), draw(c, seed=seed + 2)
    taps = draw(n, w - 1, c, seed=seed + 3) if with_taps else None
    y, last = short_convolution(x, weight, bias, "silu", taps, cu_seqlens)
    assert y.shape == x.shape and last.shape == (n, w - 1, c)
    for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
        wanted, end = convolved(x[0, a:b], weight, bias, "silu", None if taps is None else taps[i])
        torch.testing.assert_close(y[0, a:b], wanted, **close)
        assert torch.equal(last[i], end)


@given(**SIZES, data=st.data())
def test_short_convolution_goes_on_from_its_taps(t, c, w, seed, data):
    x, weight, cut = draw(2, t, c, seed=seed), draw(c, w, seed=seed + 1), data.draw(st.integers(0, t))
    head, taps = short_convolution(x[:, :cut], weight)
    tail, taps = short_convolution(x[:, cut:], weight, taps=taps)
    whole, last = short_convolution(x, weight)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, **close)
    assert torch.equal(taps, last)


PACKED = torch.tensor([0, 1, 1, 5, 7], dtype=torch.int32)


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["batch", "packed"])
def test_gradients_of_the_short_convolution(cu_seqlens):
    n, b = (2, 2) if cu_seqlens is None else (4, 1)
    inputs = [draw(b, 7, 2), draw(2, 4, seed=1), draw(2, seed=2), draw(n, 3, 2, seed=3)]

    def run(x, weight, bias, taps):
        return short_convolution(x, weight, bias, "silu", taps, cu_seqlens)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["batch", "packed"])
def test_the_convolution_keeps_its_inputs_dtype(cu_seqlens):
    x = draw(1, 7, 2, dtype=torch.bfloat16)
    y, taps = short_convolution(x, draw(2, 4).float(), draw(2).float(), "silu", None, cu_seqlens)
    assert y.dtype == taps.dtype == torch.bfloat16


@given(t=st.integers(0, 9), seed=st.integers(0, 99), with_last=st.booleans())
def test_token_shift_is_the_token_before(t, seed, with_last):
    x = draw(2, t, 3, seed=seed)
    last = draw(2, 3, seed=seed + 1) if with_last else None
    y, end = token_shift(x, last)
    before = torch.zeros(2, 3, dtype=x.dtype) if last is None else last
    for i in range(t):
        assert torch.equal(y[:, i], before)
        before = x[:, i]
    assert y.shape == x.shape and torch.equal(end, before)


@given(cu_seqlens=borders(), seed=st.integers(0, 99), with_last=st.booleans())
def test_packed_token_shift_never_crosses_a_border(cu_seqlens, seed, with_last):
    n, t = len(cu_seqlens) - 1, int(cu_seqlens[-1])
    x = draw(1, t, 3, seed=seed)
    last = draw(n, 3, seed=seed + 1) if with_last else None
    y, end = token_shift(x, last, cu_seqlens)
    for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
        wanted, own = token_shift(x[:, a:b], None if last is None else last[i : i + 1])
        assert torch.equal(y[:, a:b], wanted) and torch.equal(end[i : i + 1], own)


def test_gradients_of_the_token_shift():
    inputs = [draw(1, 7, 2).requires_grad_(), draw(4, 2, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, last: token_shift(x, last, PACKED), inputs)


@given(cu_seqlens=borders(), seed=st.integers(0, 99), with_last=st.booleans())
def test_running_sums_add_up_document_by_document(cu_seqlens, seed, with_last):
    """Alone, packed, and in pieces; from what came before."""
    n, t = len(cu_seqlens) - 1, int(cu_seqlens[-1])
    x, last = draw(1, t, 2, seed=seed), draw(n, 2, seed=seed + 1) if with_last else None
    y, end = running_sum(x, last, cu_seqlens)
    for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
        before = torch.zeros(1, 2, dtype=x.dtype) if last is None else last[i : i + 1]
        alone = running_sum(x[:, a:b], before)
        for s in range(a, b):
            before = before + x[:, s]
            torch.testing.assert_close(torch.stack([y[:, s], alone[0][:, s - a]]), torch.stack([before] * 2), **close)
        torch.testing.assert_close(torch.stack([end[i], alone[1][0]]), before.expand(2, -1), **close)


@pytest.mark.parametrize("cu_seqlens", [None, PACKED], ids=["batch", "packed"])
def test_running_sums_of_long_texts_keep_their_digits(cu_seqlens):
    """Whatever the inputs' precision; and no document moves another one's last bit."""
    x = draw(1, 65521, 1, dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        y, end = running_sum(x.to(dtype))
        assert y.dtype == end.dtype == torch.float64
        torch.testing.assert_close(y[0, -1], x.to(dtype).double().sum(1)[0], rtol=1e-12, atol=1e-10)
    inputs = [draw(1, 7, 2).requires_grad_(), draw(1 if cu_seqlens is None else 4, 2, seed=1).requires_grad_()]
    assert torch.autograd.gradcheck(lambda x, last: running_sum(x, last, cu_seqlens), inputs)


@given(
    d=st.integers(1, 7),
    seed=st.integers(0, 99),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    activation=st.sampled_from(list(ACTIVATIONS)),
    with_weight=st.booleans(),
    with_gate=st.booleans(),
)
def test_norm_is_its_formula(d, seed, eps, activation, with_weight, with_gate):
    x, weight, gate = draw(2, 3, d, seed=seed), draw(d, seed=seed + 1), draw(2, 3, d, seed=seed + 2)
    y = norm(x, weight if with_weight else None, eps, gate if with_gate else None, activation)
    for i in range(2):
        for j in range(3):
            root = math.sqrt(sum(v * v for v in x[i, j].tolist()) / d + eps)
            for c in range(d):
                wanted = x[i, j, c].item() / root * (weight[c].item() if with_weight else 1.0)
                wanted *= ACTIVATIONS[activation](gate[i, j, c].item()) if with_gate else 1.0
                assert math.isclose(y[i, j, c].item(), wanted, rel_tol=1e-12, abs_tol=1e-14)


def test_norm_gates_by_silu_unless_told():
    x, gate = draw(3, 4), draw(3, 4, seed=1)
    assert torch.equal(norm(x, None, gate=gate), norm(x, None, gate=gate, activation="silu"))


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1.0), (torch.float16, 1e4)])
def test_norms_of_half_precision_are_taken_in_float32(dtype, scale):
    """The result is the exact one rounded once, and squares that float16 cannot hold do no harm."""
    x, weight, gate = (draw(*s, seed=i).to(dtype) for i, s in enumerate(((50, 64), (64,), (50, 64))))
    for function in (unit, lambda x: norm(x, weight.to(x), gate=gate.to(x))):
        got, exact = function(x * scale), function((x * scale).double())
        assert got.dtype == dtype
        assert ((got.double() - exact).abs() <= 0.501 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


@given(n=st.integers(0, 9), scale=st.sampled_from([1.0, 0.3]), seed=st.integers(0, 99))
def test_elu_plus_one_is_torch_s(n, scale, seed):
    """And where that has no digits left, next to nothing: a weight, not zero."""
    x = (3 * draw(n, seed=seed)).requires_grad_()
    y, wanted = elu_plus_one(x, scale), (F.elu(x) + 1) * scale
    torch.testing.assert_close(y, wanted, **close)
    pairs = [torch.autograd.grad(a, x, draw(n, seed=seed + 1))[0] for a in (y, wanted)]
    torch.testing.assert_close(*pairs, **close)
    assert elu_plus_one(torch.tensor([-50.0])) > 0


def test_a_norm_of_another_dtype_is_rounded_once():
    """Forward; and its gradient is that of the same cotangent as wide as x."""
    x, weight, dy = draw(50, 64, dtype=torch.float32).requires_grad_(), draw(64, dtype=torch.float32), draw(50, 64)
    y, wanted = norm(x, weight, dtype=torch.bfloat16), norm(x, weight)
    assert y.dtype == torch.bfloat16 and torch.equal(y, wanted.bfloat16())
    dy = dy.bfloat16()
    assert torch.equal(*(torch.autograd.grad(a, x, b)[0] for a, b in ((y, dy), (wanted, dy.float()))))


@given(d=st.integers(1, 7), seed=st.integers(0, 99), scale=st.sampled_from([1.0, 0.3]))
def test_unit_is_its_formula(d, seed, scale):
    x = draw(3, d, seed=seed)
    for row, got in zip(x.tolist(), unit(x, scale=scale).tolist(), strict=True):
        root = math.sqrt(sum(v * v for v in row) + 1e-6)
        assert all(math.isclose(a, scale * v / root, rel_tol=1e-12) for a, v in zip(got, row, strict=True))
    assert torch.equal(unit(torch.zeros(2, d)), torch.zeros(2, d))
