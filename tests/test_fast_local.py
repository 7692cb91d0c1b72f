"""The Triton kernels of norms and short convolutions against the reference in float64: values and every gradient.

Without a GPU they run in Triton's interpreter (float32 and float16); with one the same laws run on it, in bfloat16 too.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fast
import reference
from fast import local as quick
from fast.kernels import local as kernels
from inputs import assert_within_budget, small
from reference import local
from reference.model import LanguageModel
from reference.presets import Model

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
EPS = st.sampled_from([1e-6, 0.1])  # the latter would be seen in another place
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU: the interpreter shows no compiler and no allocations")


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote reads NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(f, inputs, seeds, dtype, device):
    """Outputs and gradients of sum(seeds · outputs), on CPU; weights stay float32 unless all is float64."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {n: x.to(wide if n in ("weight", "bias") else dtype).to(device) for n, x in inputs.items()}
    leaves = {n: x.requires_grad_() for n, x in leaves.items()}
    outputs = f(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    given = [s.to(y.dtype).to(device) for s, y in zip(seeds, outputs, strict=True)]
    moved = [(y, s) for y, s in zip(outputs, given, strict=True) if y.requires_grad]  # no taps, nothing to move
    some, given = zip(*moved, strict=True)
    grads = torch.autograd.grad(some, list(leaves.values()), given, materialize_grads=True)
    return {f"output {i}": y.cpu() for i, y in enumerate(outputs)} | {
        f"d{n}": g.cpu() for n, g in zip(leaves, grads, strict=True)
    }


def compare(ours, theirs, inputs, seeds, dtype, cancelled=0.0):
    """Within the error budget; dx may besides be off by two roundings of the terms that cancel in it."""
    rounded = {n: (x.float() if n in ("weight", "bias") else x.to(dtype)).double() for n, x in inputs.items()}
    seeds = [s.to(dtype).double() for s in seeds]
    exact = run(theirs, rounded, seeds, torch.float64, "cpu")
    plain, got = run(theirs, rounded, seeds, dtype, "cpu"), run(ours, rounded, seeds, dtype, DEVICE)
    for name, x in got.items():
        assert x.dtype == plain[name].dtype and x.shape == plain[name].shape, name
        if x.numel():
            judged = x.to(dtype) if x.dtype == torch.float32 else x  # sums of 16-bit products are judged as such
            off = judged.double() - exact[name]
            slack = 2 * torch.finfo(dtype).eps * cancelled if name == "dx" else 0.0
            judged = (exact[name] + off.sign() * (off.abs() - slack).clamp(min=0)).to(dtype) if slack else judged
            assert_within_budget(judged, plain[name], exact[name], f"{name} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", list(kernels.ACTIVATIONS))
@given(n=st.integers(0, 9), d=st.integers(1, 70), weighed=st.booleans(), gated=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_norm(dtype, activation, n, d, weighed, gated, seed):
    inputs = {"x": draw(n, 2, d, seed=seed)}
    inputs |= {"weight": draw(d, seed=seed + 1)} if weighed else {}
    inputs |= {"gate": draw(n, 2, d, seed=seed + 2)} if gated else {}

    def call(f):
        return lambda x, weight=None, gate=None: f(x, weight, 1e-5, gate, activation)

    dy = draw(n, 2, d, seed=seed + 3)
    u = dy * inputs.get("weight", 1) * (local.ACTIVATION[activation](inputs["gate"]) if gated else 1)
    r = (inputs["x"].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    compare(call(quick.norm), call(local.norm), inputs, [dy], dtype, (u * r).abs().max().item() if n else 0.0)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@given(n=st.integers(0, 9), d=st.integers(1, 70), gated=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_norm_of_another_dtype(dtype, n, d, gated, seed):
    """Rows of float32 become 16 bits, and what their gradient is made of comes in them; it leaves in float32."""
    inputs = {"x": draw(n, 2, d, seed=seed), "weight": draw(d, seed=seed + 1)}
    inputs |= {"gate": draw(n, 2, d, seed=seed + 2)} if gated else {}
    dy = draw(n, 2, d, seed=seed + 3).to(dtype).double()

    def call(f):
        def narrowed(x, weight, gate=None):
            return f(x, weight, gate=gate, dtype=dtype if x.dtype == torch.float32 else None)

        return narrowed

    u = dy * inputs["weight"] * (local.ACTIVATION["silu"](inputs["gate"]) if gated else 1)
    r = (inputs["x"].square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    compare(call(quick.norm), call(local.norm), inputs, [dy], torch.float32, (u * r).abs().max().item() if n else 0.0)


@pytest.mark.parametrize("lsm", ["linear_attention", "gated_delta_net", "mamba3"])
def test_a_block_under_autocast_is_the_reference_s(lsm):
    """Its output and all gradients, within the error budget; a layer gets from the kernel the dtype it asks for."""
    sizes = small(lsm) | {"vocabulary": 7, "dense_width": 8, "pattern": "LD", "lsm": lsm}
    x, dy, seen = draw(1, 20, 12), draw(1, 20, 12, seed=1), []

    def run(ops, dtype, device, autocast):
        model = LanguageModel(Model(**sizes), ops).to(device, dtype)
        for i, weight in enumerate(model.parameters()):
            weight.data = draw(*weight.shape, seed=i).to(weight) * weight.shape[-1] ** -0.5
        block, own = model.blocks[0], x.to(device, dtype).requires_grad_()
        for sublayer in block.sublayers:
            sublayer.inner.register_forward_pre_hook(lambda m, inputs: seen.append((m.narrow, inputs[0].dtype)))
        tokens = torch.zeros(1, 20, dtype=torch.int64, device=device)
        with torch.autocast(device, autocast, enabled=autocast is not None):
            y = block(own, model.side(tokens, None, None, None, None, None))[0]
        grads = torch.autograd.grad(y, [own, *block.parameters()], dy.to(y))
        return [y.cpu(), *(g.cpu() for g in grads)]

    narrow = torch.bfloat16 if CUDA else torch.float16
    exact = run(reference.ops, torch.float64, "cpu", None)
    plain = run(reference.ops, torch.float32, "cpu", narrow)
    seen.clear()
    got = run(fast.ops, torch.float32, DEVICE, narrow)
    assert [dtype for _, dtype in seen] == [narrow if own else torch.float32 for own, _ in seen]
    for i, (a, b, c) in enumerate(zip(got, plain, exact, strict=True)):
        assert a.dtype == torch.float32
        assert_within_budget(a.to(narrow), b, c, str(i))


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=st.lists(st.integers(0, 5), max_size=3), d=st.integers(1, 70), scale=st.sampled_from([1.0, 0.3]), eps=EPS)
@settings(max_examples=8)
def test_unit(dtype, shape, d, scale, eps):
    """Whatever is in front of a row, and rows that are no power of two."""
    x, dy = draw(*shape, d, seed=d), draw(*shape, d, seed=d + 1)
    longest = (scale * dy * (x.square().sum(-1, keepdim=True) + eps).rsqrt()).abs().max().item() if x.numel() else 0.0
    compare(lambda x: quick.unit(x, eps, scale), lambda x: local.unit(x, eps, scale), {"x": x}, [dy], dtype, longest)


@pytest.mark.parametrize("dtype", DTYPES)
@given(shape=st.lists(st.integers(0, 5), max_size=4), scale=st.sampled_from([1.0, 0.3]), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_elu_plus_one(dtype, shape, scale, seed):
    """Gradients of a view, too, whose numbers do not stand side by side."""
    x, dy = 3 * draw(*shape, 7, 2, seed=seed), draw(*shape, 7, 2, seed=seed + 1)
    ours, theirs = (lambda x, f=f: f.elu_plus_one(x.mT, scale).mT for f in (quick, local))
    compare(ours, theirs, {"x": x}, [dy], dtype)


def test_rows_of_zeros_have_no_direction_and_a_gradient():
    compare(quick.unit, local.unit, {"x": torch.zeros(3, 5)}, [draw(3, 5)], torch.float32)


@pytest.mark.parametrize("scale", [1e-4, 1e3])
def test_norm_of_small_and_large_rows(scale):
    inputs = {"x": scale * draw(5, 300), "weight": draw(300, seed=1)}
    compare(
        lambda x, weight: quick.norm(x, weight),
        lambda x, weight: local.norm(x, weight),
        inputs,
        [draw(5, 300, seed=2)],
        torch.float32,
    )


LENGTHS = st.lists(st.sampled_from([0, 0, 1, 2, 3, 4, 8, 19]), min_size=1, max_size=5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@given(
    lengths=LENGTHS,
    c=st.integers(1, 40),
    w=st.integers(1, 5),
    activation=st.sampled_from(list(kernels.ACTIVATIONS)),
    biased=st.booleans(),
    tapped=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_short_convolution(dtype, packed, lengths, c, w, activation, biased, tapped, seed):
    """Documents that are empty or shorter than the taps too; the new taps and their gradients with the rest."""
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    n, (b, t) = (len(lengths), (1, sum(lengths))) if packed else (2, (2, sum(lengths)))
    inputs = {"x": draw(b, t, c, seed=seed), "weight": draw(c, w, seed=seed + 1)}
    inputs |= {"bias": draw(c, seed=seed + 2)} if biased else {}
    inputs |= {"taps": draw(n, w - 1, c, seed=seed + 3)} if tapped else {}

    def call(f):
        def convolve(x, weight, bias=None, taps=None):
            return f(x, weight, bias, activation, taps, borders.to(x.device) if packed else None)

        return convolve

    seeds = [draw(b, t, c, seed=seed + 4), draw(n, w - 1, c, seed=seed + 5)]
    compare(call(quick.short_convolution), call(local.short_convolution), inputs, seeds, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
@given(lengths=LENGTHS, c=st.integers(1, 70), tapped=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_token_shift(dtype, packed, lengths, c, tapped, seed):
    """To the bit, since nothing is added: but for dx, where the new last's gradient comes on top."""
    borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    n, (b, t) = (len(lengths), (1, sum(lengths))) if packed else (2, (2, sum(lengths)))
    inputs = {"x": draw(b, t, c, seed=seed)} | ({"last": draw(n, c, seed=seed + 1)} if tapped else {})

    def call(f):
        return lambda x, last=None: f(x, last, borders.to(x.device) if packed else None)

    seeds = [draw(b, t, c, seed=seed + 2), draw(n, c, seed=seed + 3)]
    compare(call(quick.token_shift), call(local.token_shift), inputs, seeds, dtype)
    given = {name: x.to(dtype) for name, x in inputs.items()}
    ours = call(quick.token_shift)(**{name: x.to(DEVICE) for name, x in given.items()})
    assert all(torch.equal(x.cpu(), y) for x, y in zip(ours, call(local.token_shift)(**given), strict=True))


def test_shifts_over_many_tiles():
    inputs, seeds = {"x": draw(2, 40, 40), "last": draw(2, 40, seed=1)}, [draw(2, 40, 40, seed=2), draw(2, 40, seed=3)]
    compare(quick.token_shift, local.token_shift, inputs, seeds, torch.float32)


def test_many_tiles():
    """More tokens and channels than one program takes, over a border between two of them."""
    inputs = {
        "x": draw(2, 40, 40),
        "weight": draw(40, 4, seed=1),
        "bias": draw(40, seed=2),
        "taps": draw(2, 3, 40, seed=3),
    }
    seeds = [draw(2, 40, 40, seed=4), draw(2, 3, 40, seed=5)]

    def call(f):
        return lambda x, weight, bias, taps: f(x, weight, bias, "silu", taps)

    compare(call(quick.short_convolution), call(local.short_convolution), inputs, seeds, torch.float32)


def test_a_document_that_is_not_a_number_spoils_no_other():
    x = draw(1, 12, 3).float().to(DEVICE)
    x[:, :5] = torch.nan
    borders = torch.tensor([0, 5, 12], dtype=torch.int32, device=DEVICE)
    y, taps = quick.short_convolution(x, draw(3, 4, seed=1).float().to(DEVICE), None, "silu", None, borders)
    assert y[:, 5:].isfinite().all() and y[:, :5].isnan().all() and taps[1].isfinite().all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: quick.norm(x.double(), None), "norm: no fast kernel for torch.float64; allowed are float32"),
        (lambda x: quick.norm(x, None, dtype=torch.float64), "norm: no fast kernel for torch.float64; allowed are"),
        (
            lambda x: quick.elu_plus_one(x.double()),
            "elu_plus_one: no fast kernel for torch.float64; allowed are float32",
        ),
        (lambda x: quick.unit(x.double()), "unit: no fast kernel for torch.float64; allowed are float32"),
        (lambda x: quick.unit(x.new_zeros(1, 20000)), "unit: no fast kernel for rows of 20000, at most 16384"),
        (
            lambda x: quick.norm(x, None, gate=x, activation="tanh"),
            "unknown activation 'tanh'; expected one of None, silu",
        ),
        (lambda x: quick.norm(x.new_zeros(1, 20000), None), "norm: no fast kernel for rows of 20000, at most 16384"),
        (
            lambda x: quick.short_convolution(x, x.new_zeros(3, 9)),
            "no fast kernel for 9 taps, at most 8; use 'reference'",
        ),
        (lambda x: quick.short_convolution(x.long(), x.new_zeros(3, 4)), "no fast kernel for torch.int64"),
        (lambda x: quick.token_shift(x.double()), "token_shift: no fast kernel for torch.float64; allowed are float32"),
        (lambda x: quick.token_shift(x, x[:, 0].to("meta")), "token_shift: inputs on several devices: .*, meta"),
    ],
)
def test_errors_are_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(torch.zeros(1, 5, 3, device=DEVICE))
    assert "\n" not in str(error.value)


@gpu
def test_deterministic_to_the_bit():
    x, z = (draw(4096, 256, seed=i).cuda().bfloat16().requires_grad_() for i in range(2))
    w = draw(256, seed=3).cuda().float().requires_grad_()
    u, v = draw(2, 3000, 512).cuda().bfloat16().requires_grad_(), draw(512, 4).cuda().float().requires_grad_()

    def gradients():
        y = quick.norm(x, w, 1e-5, z), quick.unit(x), quick.short_convolution(u, v, None, "silu")[0]
        return torch.autograd.grad([(a * a).sum() for a in y], [x, z, w, u, v])

    first = gradients()
    for _ in range(10):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


@gpu
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_whole(packed):
    x, w = draw(1, 65, 48).cuda().bfloat16(), draw(48, 4).cuda().requires_grad_()
    norm_weight = draw(48, seed=1).cuda().float()
    borders = torch.tensor([0, 5, 65], dtype=torch.int32, device="cuda") if packed else None

    def f(x, w):
        x = quick.unit(x.unflatten(-1, (3, 16)), scale=0.5).flatten(-2)
        return quick.norm(quick.short_convolution(x, w.float(), None, "silu", None, borders)[0], norm_weight)

    torch.testing.assert_close(torch.compile(f, fullgraph=True)(x, w), f(x, w))


@gpu
def test_no_extra_memory():
    """Forward nothing beside the output, backward only sums over rows that are a part of a program's."""
    x, z = (draw(8192, 1024, seed=i).cuda().bfloat16() for i in range(2))
    w = draw(1024).cuda().float()
    quick.norm(x, w, 1e-5, z)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = quick.norm(x, w, 1e-5, z)
    assert torch.cuda.max_memory_allocated() - before <= y.numel() * 2 + 4096
