"""The Triton kernels against the token loop in float64: outputs, memories and every gradient, within the error budget.

Without a GPU the kernels run in Triton's interpreter on CPU (float32 and float16, tiny shapes): the mathematics and
the addresses, not the compiler. With one the same laws run on it, bfloat16 and larger shapes too.
"""

import functools
import inspect
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fast
import reference
from fast import operators
from fast import recurrence as quick
from fast import scan as by_element
from fast.kernels import channel as channels
from fast.kernels import cross as crosses
from fast.kernels import decay as kernels
from fast.kernels import delta as deltas
from fast.kernels import features as polynomials
from fast.kernels import rank_one as ones
from fast.kernels import scan as scans
from fast.kernels import slots as slotted
from inputs import Made, assert_within_budget, compiled_alike, leaves, make, start
from interpreter import add_as_a_gpu_does
from reference import chunked, example, printed, span
from reference import recurrence as exact
from reference.bidirectional import both_ways
from reference.lsm import LSM
from reference.peak import peak
from reference.printed import PRINTED

CUDA = torch.cuda.is_available()
# one of the same three words and features
ALL = list({(*LSM[name][:3], LSM[name].features): name for name in reversed(quick.rows())}.values())[::-1]
# token by token: few, in the interpreter
SCANNED = [name for name in ALL if by_element.has_form(LSM[name])]
FEATURED = [name for name in ALL if LSM[name].features]
WEIGHTED = [name for name in ALL if LSM[name].update is exact.counted]  # means, by weights
LOOSE = [name for name in ALL if name in PRINTED and name not in SCANNED]  # other mixtures of what the families know
ROWS = [name for name in ALL if name not in SCANNED and name not in PRINTED]
GATED = (
    "mamba2",
    "gla",
    "hgrn2",
    "rwkv6",
    "gated_delta_net",
    "kda",
    "comba",
    "rwkv7",
    "gated_fast_weights",
    "gate_loop",
)  # one row for every way that a gate of one number a token, or more, goes
CHANNELS = 16 if CUDA else 6  # of queries and keys that have features, at most
# Without a GPU: float32 chunks are of 16 tokens, segments end at multiples of 64. What a law needs beyond one chunk or
# one segment is little more than that.
SEVERAL = 64 if CUDA else 32  # tokens: whole chunks, more than one
FEW = 70 if CUDA else 35  # tokens: several chunks, the last one not whole
MANY = 140 if CUDA else 75  # tokens: two segments, too
INPUTS = ("q", "k", "v", "beta", "g", "a", "b")  # of `rank_one`
DEVICE = "cuda" if CUDA else "cpu"
HALVES = [torch.float16] + [torch.bfloat16] * CUDA
gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU: the interpreter shows no compiler, no allocations, no bfloat16")


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote reads NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launched(monkeypatch):
    """How often each kernel was launched."""
    counts, launch = Counter(), kernels.launch
    monkeypatch.setattr(kernels, "launch", lambda k, *a, **m: (counts.update([k.__name__]), launch(k, *a, **m)))
    return counts


def family_of(name):
    row, tokens, constants = make(name, t=1)
    form = quick.form_of(row, {**tokens, **constants})
    return quick.family_of(form).__name__.removeprefix("fast.")


def cut(monkeypatch, segments):
    for family in (kernels, channels, crosses, deltas, ones, polynomials, scans):
        monkeypatch.setattr(family, "segments_for", lambda *_: segments)


def narrowed(tokens, dtype):
    """Gates, write strengths, steps, angles and weights stay float32 whatever q, k and v are."""
    return {n: x.to(dtype) if n in ("q", "k", "v", "a", "b") else x for n, x in tokens.items()}


def run(f, row, inputs, weights, dtype, device, cu_seqlens=None):
    """Outputs and gradients of sum(weights · (o, memory)), by name, on CPU."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tokens, constants, memory = ({n: x.to(wide).to(device) for n, x in group.items()} for group in inputs)
    tokens = narrowed(tokens, dtype)
    given = leaves(tokens, constants, memory)
    borders = None if cu_seqlens is None else cu_seqlens.to(device)
    o, last = f(row, tokens, constants, memory.get("memory"), borders)
    seeds = [w.to(y.dtype).to(device) for w, y in zip(weights, (o, last), strict=True)]
    grads = torch.autograd.grad([o, last], given, seeds)
    names = [*tokens, *constants, *memory]
    return {"o": o, "last": last, **{f"d{n}": x for n, x in zip(names, grads, strict=True)}}


def compare(
    name,
    dtype=torch.float32,
    b=1,
    t=83,
    h=1,
    k=20 if CUDA else 12,
    v=33 if CUDA else 9,
    cu_seqlens=None,
    seed=0,
    change=None,
    bare=False,
    wide=False,
    but=(),
    loose=MappingProxyType({}),
):
    """fast within the budget: exact is the token loop in float64, plain the worse of loop and chunk form in float32.

    Float32 results of 16-bit tokens (memories, gates' gradients) are sums of 16-bit products: they are judged as
    16-bit numbers. A gate's gradient is a difference of sums: in float32 it may be off by 8 eps of what they add up.
    Where queries and keys have features they have few channels, unless `wide`. There, in float32, 3 eps of a gradient's
    two parts, which nearly cancel: polynomials' constants are factors of their own, three on each side, each with a
    rounding of half an eps. And 3 eps of what an output adds up: (q·k)² may be small where q and k are not.
    `loose`: results that may be off by so many eps of the same or another result's largest number, not one of theirs.
    """
    row, tokens, constants = make(name, b, t, h, k if wide or not LSM[name].features else min(k, CHANNELS), v, seed)
    if change is not None:
        change(tokens, constants)
    n = None if cu_seqlens is None else len(cu_seqlens) - 1
    rng = torch.Generator().manual_seed(seed)
    memory = start(name, row, tokens, constants, n=n)
    weights = [torch.randn(s, generator=rng) for s in ((b, t, h, v), memory.shape)]
    inputs = (tokens, constants, {} if bare else {"memory": memory})
    given = narrowed(tokens, dtype), *inputs[1:]
    rounded = tuple({n: (x if x.dtype == dtype else x.float()).double() for n, x in group.items()} for group in given)
    weights = [weights[0].to(dtype), weights[1]]
    args = (row, rounded, weights)
    want = run(exact.recurrence, *args, torch.float64, "cpu", cu_seqlens)
    loop, chunks = (run(f.recurrence, *args, dtype, "cpu", cu_seqlens) for f in (exact, chunked))
    ratio = row.features and row.update is exact.counted and cu_seqlens is None
    parts = numerators(*args) if ratio and dtype == torch.float32 else {}
    got = run(quick.recurrence, *args, dtype, DEVICE, cu_seqlens)
    for what, x in got.items():
        assert x.dtype == loop[what].dtype, what
        if what in but:
            continue
        plain = max(loop[what], chunks[what], key=lambda y: (y.double() - want[what]).abs().max().item())
        judged = x.cpu().to(dtype)
        rate, full = what == "dA" and row.decay is printed.timed, dtype == torch.float32
        if rate or (what in ("dg", "df", "dtheta") and full):
            size = rate_added_up(full, *args, want, cu_seqlens) if rate else added_up(*args, want, cu_seqlens, what)
            judged = nearer(judged, want[what], (8 if full else 1) * torch.finfo(dtype).eps * size)
        elif what in parts:
            judged = nearer(judged, want[what], 3 * torch.finfo(dtype).eps * parts[what].abs().max())
        if what in loose:
            times, of = loose[what]
            judged = nearer(judged, want[what], times * torch.finfo(dtype).eps * want[of].abs().max())
        if (judged - want[what]).abs().max() < torch.finfo(torch.float32).tiny:
            continue  # behind a gate of -90 numbers are subnormal, which a GPU may flush to 0
        assert_within_budget(judged, plain, want[what], f"{name} {dtype} T={t} {what}")


def nearer(x, exact, slack):
    """x, by so much nearer to what is exact."""
    off = x - exact
    return (exact + off.sign() * (off.abs() - slack).clamp(min=0)).float()


def added_up(row, inputs, weights, want, cu_seqlens, what="dg"):
    """The size of what is summed for a gate's gradient: the terms of <M_T, dM_T> and, for a slope, of all tokens. (For
    an angle's they are those of <M_T, i dM_T>, for a column's gate they stand in columns.)"""
    axes = -2 if what == "df" else -1 if want["dg"].ndim == 4 else (-2, -1)
    other = weights[1].roll(weights[1].shape[-2] // 2, -2) if what == "dtheta" else weights[1]
    size = (want["last"] * other).norm(dim=axes).max().item() + want[what].abs().max().item()
    if row.decay is exact.fixed:
        tokens, constants, memory = inputs
        each = {**tokens, "g": constants["g"].expand(tokens["q"].shape[:3])}
        parts = run(exact.recurrence, LSM["mamba2"], (each, {}, memory), weights, torch.float64, "cpu", cu_seqlens)[
            "dg"
        ]
        size += parts.abs().sum((0, 1)).max().item()
    return size


def numerators(row, inputs, weights):
    """Gradients of a ratio's numerators alone, by name; and the terms of its outputs, none of which cancels another."""
    (tokens, constants, memory), counted = inputs, row._replace(read=exact.inclusive)
    count = exact.recurrence(counted, tokens, constants, memory.get("memory"))[0][..., -1:]
    sizes = [{n: x.abs() for n, x in group.items()} for group in (tokens, constants, memory)]
    terms = exact.recurrence(counted, *sizes[:2], sizes[2].get("memory"))[0][..., :-1] / count
    weights = [torch.cat([weights[0] / count, torch.zeros_like(count)], -1), weights[1]]
    found = run(exact.recurrence, counted, inputs, weights, torch.float64, "cpu")
    return {"o": terms} | {what: x for what, x in found.items() if what in ("dq", "dk", "dv")}


def rate_added_up(full, row, inputs, weights, want, cu_seqlens):
    """The same of a rate that each token's write strength multiplies: of 16-bit products all tokens' gradients; in
    float32 the differences that these are, each with the errors of those behind it."""
    (tokens, constants, memory), beta = inputs, inputs[0]["beta"]
    each = {"q": tokens["q"], "k": beta[..., None] * tokens["k"], "v": tokens["v"], "g": constants["A"] * beta}
    args = LSM["mamba2"], (each, {}, memory), weights
    found = run(exact.recurrence, *args, torch.float64, "cpu", cu_seqlens)
    if full:
        return added_up(*args, found, cu_seqlens) * beta.abs().sum((0, 1)).max().item()
    return (beta * found["dg"]).abs().sum((0, 1)).max().item()


# ------------------------------------------------------------------------------------------------------ the laws


SHAPES = [(1, 20, 33), (SEVERAL - 1, 16, 16), (SEVERAL, 33, 20), (SEVERAL + 1, 5, 40)] + [(83, 20, 33)] * CUDA


@pytest.mark.parametrize("t, k, v", SHAPES)
@pytest.mark.parametrize("name", ROWS)
def test_values_and_gradients(name, t, k, v):
    compare(name, b=2 if t < SEVERAL else 1, h=2 if t > SEVERAL else 1, t=t, k=k, v=v)


@pytest.mark.parametrize("name", LOOSE)
def test_rules_as_they_are_printed(name):
    compare(name, t=FEW, k=20, v=33)
    compare(name, torch.float16, t=70, k=33, v=20, cu_seqlens=torch.tensor([0, 33, 33, 70], dtype=torch.int32))


@pytest.mark.parametrize("name, t, k, v", [("gated_fast_weights", 32, 16, 256), ("based", 21, 16, 7)])
def test_sums_of_products_are_exact_enough_in_the_order_of_a_gpu(name, t, k, v, monkeypatch):
    if not CUDA:
        add_as_a_gpu_does(monkeypatch)
    compare(name, t=t, k=k, v=v, wide=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ROWS)
def test_sixteen_bits(name, dtype):
    compare(name, dtype, t=83, k=33, v=20)


@pytest.mark.parametrize("dtype", HALVES)
def test_what_cancels_in_the_gradient_of_a_weighted_mean(dtype):
    """The first few tokens' queries have the largest gradients: what is left of terms of 16 bits that cancel."""
    for seed in range(3):
        sizes = {"t": 512, "h": 8, "k": 64, "v": 64} if CUDA else {"t": 64, "h": 4, "k": 64, "v": 64}
        compare("linear_attention_normalized", dtype, **sizes, seed=seed, bare=True)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", WEIGHTED)
def test_where_all_keys_are_the_same_a_query_has_no_gradient(name, dtype):
    """The output is the mean of all values so far, whatever the query is (but for what a row's sum of weights starts
    from): to the last bit where 16 bits hold it, as after 1, 2, 4, ... tokens. Then a query's gradient is off by what
    float32 rounds; one rounding to 16 bits too many is more than 50 times as much."""
    row, tokens, _ = some(name, t=64)
    rng, exact_at = torch.Generator().manual_seed(0), torch.tensor([1, 2, 4, 8, 16, 32, 64]) - 1
    tokens["k"] = tokens["k"][:, :1].expand_as(tokens["k"])
    tokens["v"] = torch.randint(-2, 3, tokens["v"].shape, generator=rng).to(tokens["v"])
    do = torch.randn(tokens["v"].shape, generator=rng).to(tokens["v"])
    tokens = {n: x.to(dtype) for n, x in tokens.items()}
    given = leaves(tokens)
    o, _ = quick.recurrence(row, tokens)
    dq, dk, _ = torch.autograd.grad(o, given, do.to(dtype))
    mean = tokens["v"].float().cumsum(1) / torch.arange(1, 65, device=DEVICE)[:, None, None]
    assert (o.float() == mean)[:, exact_at].all()
    right = exact.recurrence(row, {n: x.double() for n, x in tokens.items()})[0]
    (want,) = torch.autograd.grad(right, given[:1], do.to(dtype).double())
    error = (dq - want)[:, exact_at].abs().max()
    assert error < 0.005 * torch.finfo(dtype).eps * dk.abs().max()


@pytest.mark.parametrize("name", ROWS)
def test_from_an_empty_memory(name):
    compare(name, bare=True, t=FEW)


@pytest.mark.parametrize("segments", [2, 3])
@pytest.mark.parametrize("name", ROWS)
def test_segments(name, segments, monkeypatch, launched):
    cut(monkeypatch, segments)
    compare(name, t=150 if CUDA else 64 * (segments - 1) + 19, k=16, v=16, bare=segments == 3)
    family = {"ratio": "decay"}.get(family_of(name), family_of(name))
    fold = {"rank_one": "delta", "features": "decay", "slots": "channel"}.get(family, family)
    each = 2 if family == "slots" else 1  # memories
    assert launched[f"{fold}_fold"] == 2 * each  # the memories, and their cotangents
    # spans of delta rules, of steps of rank one, of features and by row and column are their sweeps without outputs
    sweeps = {
        "delta": {"delta_values": 2, "delta_answers": 2},
        "rank_one": {"rank_one_sweep": 4},
        "features": {"features_sweep": 4},
        "slots": {"channel_span": 4},
        "cross": {"cross_sweep": 6},
    }
    spans = sweeps.get(family, {f"{family}_span": 2})
    assert {span: launched[span] for span in spans} == spans


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", ROWS)
def test_documents(name, segments, monkeypatch):
    cut(monkeypatch, segments)
    long = 130 if CUDA else 64 * (segments - 1) + 20
    borders = torch.tensor([0, 7, 7, 7 + long, 20 + long, 20 + long], dtype=torch.int32)
    compare(name, t=20 + long, k=20, v=24, cu_seqlens=borders)


@given(
    name=st.sampled_from(("mamba2", "rwkv6", "gated_delta_net", "kda", "rwkv7")),
    t=st.integers(1, 130 if CUDA else 80),
    k=st.integers(1, 40 if CUDA else 24),
    v=st.integers(1, 40 if CUDA else 24),
    cuts=st.lists(st.integers(0, 130 if CUDA else 80), max_size=3),
    segments=st.integers(1, 3),
)
@settings(deadline=None, derandomize=True, max_examples=14)
def test_any_shape(name, t, k, v, cuts, segments):
    borders = [0, *sorted(min(c, t) for c in cuts), t]
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, segments)
        compare(name, t=t, k=k, v=v, cu_seqlens=torch.tensor(borders, dtype=torch.int32), seed=t)


@pytest.mark.parametrize("name", ["comba", "gated_delta_net_printed", "mamba2"])
def test_a_gate_with_nothing_to_decay_has_no_gradient(name, monkeypatch):
    """Pairs of later tokens cancel in it: those of steps of rank one have not been rounded to 16 bits before, those of
    whole decays alike, in mild chunks too."""
    monkeypatch.setitem(kernels.LITTLE, torch.float16, -8.0)
    row, tokens, constants = some(name, b=1, t=50, h=2, k=33, v=20)
    tokens = narrowed(tokens, torch.float16)
    if name == "mamba2":
        tokens["g"] *= 0.1
    leaves(tokens)
    first = torch.tensor([0, 40], device=DEVICE)
    o, _ = quick.recurrence(row, tokens, constants, None, torch.tensor([0, 40, 50], dtype=torch.int32, device=DEVICE))
    (dg,) = torch.autograd.grad(o.float().square().sum(), [tokens["g"]])
    assert dg[:, first].abs().max() < 1e-5 * dg.abs().max()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["gla", "rwkv6"])
def test_sixteen_bits_by_channel_over_segments_and_documents(name, dtype, monkeypatch):
    """Their chunks are 64 tokens: more than one a document and a segment."""
    cut(monkeypatch, 2)
    borders = [0, 33, 33, 290, 300] if CUDA else [0, 13, 13, 185, 190]
    compare(name, dtype, t=borders[-1], k=16, v=20, cu_seqlens=torch.tensor(borders, dtype=torch.int32))


def lasting(name, repeated=False):
    """Gates near one, for vectors that erase along what they erase; keys that come back every seven tokens."""

    def change(tokens, _):
        tokens["g"].mul_(0.01)
        tokens.update({n: f(tokens) for n, f in example.ALIGNED.get(LSM[name].update, {}).items()})
        if repeated:
            each = torch.arange(tokens["q"].shape[1]) % 7
            tokens.update({n: tokens[n][:, each] for n in "kab" if n in tokens})

    return change


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["kda", "comba", "rwkv7"])
def test_what_segments_do_to_lasting_memories(name, dtype, monkeypatch):
    """What a segment does is a product of hundreds of steps: no later step corrects what it gets wrong."""
    cut(monkeypatch, 4)
    # What KDA's gates and write strengths receive adds up some 25 roundings to 16 bits, each 0.1 to 0.45 eps and none
    # most of it: 0.8 to 1.25 and 0.6 to 1.55 times what one eps allows, seeds 0 to 5. So two, as of 16-bit results.
    loose = {n: (2, n) for n in ("dg", "dbeta")} if name == "kda" else {}
    compare(name, dtype, t=500 if CUDA else 200, k=32, v=16, change=lasting(name), loose=loose)
    compare(name, t=300 if CUDA else 200, k=16, v=16, change=lasting(name, repeated=True))


@given(
    b=st.integers(1, 16),
    t=st.sampled_from([1, 100, 1000, 2048, 5000, 16384]),
    h=st.integers(1, 64),
    k=st.sampled_from([16, 64, 128, 256]),
    v=st.sampled_from([16, 64, 128, 256]),
)
@settings(deadline=None, derandomize=True, max_examples=100)
def test_delta_rules_are_cut_where_few_programs_would_run(b, t, h, k, v):
    """Then at most two a multiprocessor, of 512 tokens or more."""
    q, x = (torch.empty(b, t, h, n, dtype=torch.bfloat16, device="meta") for n in (k, v))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "multiprocessors", lambda _: 132)
        for family, columns in ((deltas, deltas.columns_of(q, x)), (ones, ones.shape_of(q, x, None)["BZ"])):
            segments, programs = family.segments_for(q, x, b), b * h * -(-v // columns)
            assert segments == 1 or (k <= 128 and programs * segments <= 264 and t // segments >= 512)
            assert segments == 1 or programs <= 66
            if k == 128 and programs <= 32 and t == 16384:
                assert programs * segments >= 132 or segments == 32


def test_what_erases_apart_from_keys_has_kernels_of_more_channels_elsewhere(launched):
    """Sweeps of whole gates have no room for three tiles of more than 128 channels."""
    compare("comba", t=18, k=129, v=16)
    assert launched["rank_one_sweep"] == 2 and not launched["delta_values"]


def extreme(tokens, constants):
    for g in (tokens[n] for n in "gf" if n in tokens):
        if g.ndim == 4:  # at other tokens in every channel
            g.copy_(example.extreme(g, share=0.2))
        for token, gate in {0: -90.0, 3: -torch.inf, 4: -20.0, 10: -1e4, 12: 0.0, 30: -torch.inf, 63: -1e4}.items():
            g[:, token::70] = gate
        g[:, -1] = -torch.inf


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["gla", "rwkv6"])
def test_extreme_gates_in_sixteen_bits(name, dtype):
    compare(name, dtype, t=140, change=extreme)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", GATED)
def test_extreme_gates(name, segments, monkeypatch):
    cut(monkeypatch, segments)
    compare(name, t=MANY, change=extreme)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, HALVES[0]])
@pytest.mark.parametrize("name", ["gla", "rwkv6"])
def test_strong_gates_in_one_half_of_a_chunk(name, dtype, half):
    """Decays from its middle are out of range on that side alone. The next chunk's are in range on both."""
    chunk = channels.CHUNK[4 if dtype == torch.float32 else 2]
    strong = slice(chunk // 2, chunk) if half else slice(chunk // 2)

    def change(tokens, _):
        tokens["g"].mul_(0.02)
        tokens["g"][:, strong, :, 0] = -30.0

    compare(name, dtype, t=2 * chunk, change=change)


@pytest.mark.parametrize("gate", [0.0, -1e-6, -20.0, -79.0, -150.0, -1e4, -torch.inf])
@pytest.mark.parametrize("name", GATED)
def test_the_same_gate_everywhere(name, gate):
    """Strong decay everywhere makes the gate's gradient tiny: it must not drown in what cancels."""
    compare(name, t=FEW, change=lambda tokens, _: tokens["g"].fill_(gate))


@pytest.mark.parametrize("name", GATED)
def test_precision_behind_strong_gates(name):
    """Every other gate -79: sums of gates reach thousands, differences must not notice."""
    compare(name, t=2 * SEVERAL, change=lambda tokens, _: tokens["g"][:, ::2].fill_(-79.0))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", ["retention", "mamba2"])
def test_heads_that_fade_little_and_heads_that_fade_much(name, segments, dtype, monkeypatch):
    """Of chunks whose sums of gates stand on either side of what divides them, and far from it. (A slope's gradient is
    another kernel's.)"""
    cut(monkeypatch, segments)
    monkeypatch.setitem(kernels.LITTLE, torch.float16, -8.0)  # as for bfloat16, which the interpreter does not multiply
    middle = kernels.LITTLE[dtype] * math.log(2) / 64
    each = torch.tensor([-1e-4, 0.8 * middle, 1.25 * middle, -20.0])

    def change(tokens, constants):
        g = {**tokens, **constants}["g"]
        g.copy_(each if name == "retention" else each * (0.75 + 0.5 * torch.rand(g.shape)))

    compare(name, dtype, h=4, t=150, k=16, v=16, change=change, but=("dg",) if name == "retention" else ())


def test_angles_of_a_long_sequence():
    """As exact at its end as at its beginning; each document begins anew."""
    theta = 3 * torch.randn(1, 700, 1, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    borders = torch.tensor([0, 30, 30, 700], dtype=torch.int32, device=DEVICE)
    angle = torch.cat([x.double().cumsum(1) for x in theta.split([30, 670], 1)], 1)
    turns = crosses.turns_of(theta, theta, borders).double()
    assert (turns - torch.cat([angle.cos(), -angle.sin()], -1)).abs().max() < 2**-23


def test_gates_of_rows_and_columns_are_cut_where_few_programs_would_run(monkeypatch):
    """Eight heads of 16,384 tokens: two programs a multiprocessor; of 64 heads nothing is cut."""
    monkeypatch.setattr(kernels, "multiprocessors", lambda _: 132)
    for h, want in ((8, 8), (64, 1)):
        x = torch.empty(1, 16384, h, 128, dtype=torch.bfloat16, device="meta")
        assert crosses.segments_for(x, x, None, 1) == crosses.segments_for(x, x, x, 1) == want


def with_slots(m, strength=1.0):
    """So many slots, whose gates are that strong."""

    def change(tokens, _):
        drawn = torch.randn(*tokens["g"].shape[:3], m, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
        tokens["g"] = strength * torch.nn.functional.logsigmoid(drawn)

    return change


@pytest.mark.parametrize(
    "m, k, v", [(20, 12, 33), (33, 40, 5)] + [(64, 128, 128), (128, 64, 256), (256, 96, 64)] * CUDA
)
def test_any_number_of_slots(m, k, v):
    compare("gsa", t=20, k=k, v=v, change=with_slots(m))


@pytest.mark.parametrize("dtype", HALVES)
def test_what_slots_keys_have_in_common_weighs_nothing(dtype):
    """However large it is: what goes into an exponent is not rounded to 16 bits on the way."""
    row, tokens, _ = some("gsa", t=70, h=1)
    tokens = narrowed(tokens, dtype) | {"g": 0.1 * tokens["g"][..., :1].expand_as(tokens["g"])}
    M = start("gsa", row, tokens, {}).to(DEVICE)
    more = M.clone()
    more[..., :16] += 100.0
    o, same = (quick.recurrence(row, tokens, None, memory)[0].float() for memory in (M, more))
    assert (o - same).abs().max() < 8 * torch.finfo(dtype).eps


def test_slots_that_forget(launched):
    """Whatever the gate; one that is no number shows from its token on."""
    compare("gsa", t=FEW, change=extreme)
    row, tokens, _ = some("gsa", b=2, t=20, h=1)
    tokens["g"][0, 17, 0, 1] = torch.nan
    o, _ = quick.recurrence(row, tokens)
    assert o[0, 17:].isnan().all() and o[0, :16].isfinite().all() and o[1].isfinite().all()


def test_values_that_float16_just_holds():
    """No value on the way is larger than the largest that came."""
    row, tokens, constants = make("mamba2", t=64, k=16, v=16, dtype=torch.float16)
    tokens["v"] = (torch.randn(tokens["v"].shape) * 2000).half()
    tokens["g"] = torch.full_like(tokens["g"], -0.08).float()
    o, _ = quick.recurrence(row, {n: x.to(DEVICE) for n, x in tokens.items()}, constants)
    assert o.isfinite().all()


@pytest.mark.parametrize("gate", [0.0, -1e4, -torch.inf])
def test_extreme_slopes(gate):
    compare("retention", t=FEW, change=lambda _, constants: constants["g"].fill_(gate))


@pytest.mark.parametrize("least, most", [(-7, -5), (-1.204, -1.2), (-3, 2.4)])
@pytest.mark.parametrize("name", ["hgrn2", "gsa"])
def test_keys_that_are_made_of_gates(name, least, most):
    """1 - e^g, however near to nothing the gates are, and what they receive. Gates of -0.063, too, all alike: what a
    difference loses of each key is the same, and adds up."""

    def change(tokens, _):
        rng = torch.Generator().manual_seed(0)
        tokens["g"] = -(10 ** (least + (most - least) * torch.rand(tokens["g"].shape, generator=rng))).double()

    compare(name, t=FEW, change=change)


def test_a_memory_that_does_not_fade_may_be_written_by_gates_all_the_same():
    """Kernels that read no gate for every channel are given the keys that gates make."""
    row, tokens, _ = some("hgrn2", h=1)
    row = row._replace(decay=exact.keep)
    for got, want in zip(quick.recurrence(row, tokens), chunked.recurrence(row, tokens), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["g", "qv"])
def test_gates_that_make_keys_want_the_only_gradient_or_none(wanted):
    row, tokens, _ = some("hgrn2")

    def gradients(these):
        given = {n: x.detach().requires_grad_(n in these) for n, x in tokens.items()}
        o, last = quick.recurrence(row, given)
        return torch.autograd.grad(o.sin().sum() + last.sum(), [given[n] for n in these])

    every = dict(zip("qvg", gradients("qvg"), strict=True))
    for n, got in zip(wanted, gradients(wanted), strict=True):
        torch.testing.assert_close(got, every[n])


@pytest.mark.parametrize("seed", range(4))
def test_neighbours_without_a_gate_between_them_cancel_in_its_gradient(seed, monkeypatch):
    """Where the read is before the write, of pairs of tokens those that follow each other do not fade at all."""
    monkeypatch.setitem(channels.MILD, torch.float16, 12.0)  # all pairs of a chunk in one product, as in bfloat16
    channels.pairs_by_numbers.cache_clear()

    def change(tokens, _):
        rng = torch.Generator().manual_seed(seed)
        tokens["g"] = -3.0 * torch.rand(tokens["g"].shape, generator=rng).double()

    try:
        compare("rwkv6", torch.float16, t=130, k=16, v=16, seed=seed, change=change, bare=True)
    finally:
        channels.pairs_by_numbers.cache_clear()


def test_a_gate_that_is_not_a_number_in_sixteen_bits_shows(monkeypatch):
    monkeypatch.setitem(kernels.LITTLE, torch.float16, -8.0)
    row, tokens, constants = make("mamba2", t=40, k=16, v=16, dtype=torch.float16)
    tokens["g"] = torch.full_like(tokens["g"], -1e-3).float()
    tokens["g"][0, 20] = torch.nan
    o, _ = quick.recurrence(row, {n: x.to(DEVICE) for n, x in tokens.items()}, constants)
    assert o[0, 20:].isnan().all() and o[0, :20].isfinite().all() and o[1].isfinite().all()


@pytest.mark.parametrize("name", GATED)
def test_a_gate_that_is_not_a_number_shows(name):
    """From its token on (where the read is of the memory before: from the next one)."""
    row, tokens, constants = make(name, t=40, k=16, v=16, dtype=torch.float32)
    tokens["g"][0, 20] = torch.nan
    o, _ = quick.recurrence(row, *({n: x.to(DEVICE) for n, x in group.items()} for group in (tokens, constants)))
    assert o[0, 20 + (name == "rwkv6") :].isnan().all() and o[0, :16].isfinite().all() and o[1].isfinite().all()


@pytest.mark.parametrize("k", [1, 16, 23, 32])
@pytest.mark.parametrize("name", FEATURED)
def test_features_of_any_number_of_channels(name, k):
    """ReBased from four on: of fewer a query's gradient nearly cancels in the normaliser and is all rounding."""
    k = k if name == "based" else max(k, 4)
    compare(name, t=21, k=k, v=7, wide=True)
    borders = torch.tensor([0, 3, 70, 70], dtype=torch.int32)
    # One channel's keys are all the same: a query has no gradient (4e-6 of dk). What it gets is a memory's rounding to
    # 16 bits, each column's its own, where values and weights should cancel: 0.005 to 0.008 eps of dk, seeds 0 to 2,
    # which is 80 to 150 times what one eps allows (within a chunk, from an empty memory, it is a twentieth of that).
    loose = {"dq": (0.01, "dk")} if name == "based" and k == 1 else {}
    compare(name, torch.float16, t=70, k=k, v=7, cu_seqlens=borders, wide=True, loose=loose)


@pytest.mark.parametrize("segments", [1, 2])
def test_features_are_never_written_to_memory(segments, monkeypatch):
    """Forward and backward make nothing of the size of one head's features: 153 numbers a token."""
    cut(monkeypatch, segments)
    t = 300 if CUDA else 200
    row, tokens, _ = some("based", t=t, h=1)
    given = leaves(tokens)
    with Made() as made:
        o, _ = quick.recurrence(row, tokens)
        torch.autograd.grad(o.square().sum(), given)
    assert t * 17 <= max(made.sizes) < t * 153 / 2


# ------------------------------------------------------------------------------------ the laws, element by element


@pytest.mark.parametrize("t, k, v", [(1, 5, 6), (16, 16, 16), (21, 20, 33)])
@pytest.mark.parametrize("name", SCANNED)
def test_scanned_values_and_gradients(name, t, k, v):
    compare(name, b=2 if t < 16 else 1, h=2 if t < 16 else 1, t=t, k=k, v=v)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", SCANNED)
def test_scanned_in_sixteen_bits(name, dtype):
    compare(name, dtype, t=19, k=5, v=12, bare=True)


@pytest.mark.parametrize("name", SCANNED)
def test_scanned_documents_in_segments(name, monkeypatch, launched):
    cut(monkeypatch, 2)
    compare(name, t=75, k=4, v=6, cu_seqlens=torch.tensor([0, 3, 3, 72, 75, 75], dtype=torch.int32))
    assert launched["scan_span"] == launched["scan_fold"] == 2  # the memories, and their cotangents


@given(
    name=st.sampled_from(SCANNED),
    t=st.integers(1, 20),
    k=st.integers(1, 20),
    v=st.integers(1, 20),
    cuts=st.lists(st.integers(0, 20), max_size=3),
)
@settings(deadline=None, derandomize=True, max_examples=6)
def test_scanned_in_any_shape(name, t, k, v, cuts):
    borders = [0, *sorted(min(c, t) for c in cuts), t]
    compare(name, t=t, k=k, v=v, cu_seqlens=torch.tensor(borders, dtype=torch.int32), seed=t)


@pytest.mark.parametrize("name, k, segments", [("fast_weights_printed", 17, 1), ("s4", 9, 2)])
def test_scanned_with_memories_kept_far_apart(name, k, segments, monkeypatch):
    """Those between are found again, a stretch of tokens at a time."""
    monkeypatch.setattr(scans, "FAR", 32)
    cut(monkeypatch, segments)
    compare(name, t=88, k=k, v=4, cu_seqlens=torch.tensor([0, 5, 88], dtype=torch.int32))


def forgetful(tokens, constants):
    """Steps and gates from nothing to everything."""
    for name in ("dt", "G"):
        if name in tokens:
            far = 1e4 if name == "dt" else -torch.inf
            for token, x in {0: 0.0, 3: far, 7: 1e-7 if name == "dt" else -1e4, 8: far}.items():
                tokens[name][:, token] = x


@pytest.mark.parametrize("name", ["mamba", "s4_printed", "fast_weights_printed"])
def test_scanned_with_extreme_gates(name):
    compare(name, t=10, k=5, v=6, change=forgetful)


def test_a_step_that_is_not_a_number_shows():
    row, tokens, constants = some("mamba", t=9)
    tokens["dt"][0, 5, 0, 3] = torch.nan
    o, _ = quick.recurrence(row, tokens, constants)
    assert o[0, 5:, 0, 3].isnan().all() and o.isnan().sum() == 4


def test_long_scans_end_their_angles_where_the_loop_does():
    """A turn of every token by one angle adds up: a memory of 150 tokens, nearly as large as when it began."""
    compare("s4", t=150, k=2, v=2, change=lambda _, constants: constants["g"].mul_(1e-3))


# --------------------------------------------------------------------------------------------- gradients arriving


def some(name, **sizes):
    row, tokens, constants = make(name, **{"b": 1, "t": FEW, "h": 2, "k": 16, "v": 16, **sizes}, dtype=torch.float32)
    return row, {n: x.to(DEVICE) for n, x in tokens.items()}, {n: x.to(DEVICE) for n, x in constants.items()}


@pytest.mark.parametrize("ask", ["o", "last", "both"])
@pytest.mark.parametrize(
    "name", ["mamba2", "rwkv6", "gated_delta_net", "mamba", "s4", "rwkv7", "based", "gsa", "gate_loop"]
)
def test_expanded_or_missing_gradients(name, ask):
    """A sum's gradient has stride 0; an output that is not used has none."""

    def grads(f):
        row, tokens, constants = some(name, t=17 if name in SCANNED else FEW)
        given = leaves(tokens, constants)
        o, last = f(row, tokens, constants)
        loss = {"o": o.sum(), "last": last.sum(), "both": o.sum() + last.sum()}[ask]
        return torch.autograd.grad(loss, given, materialize_grads=True)

    for a, b in zip(grads(quick.recurrence), grads(chunked.recurrence), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


class Asked:
    """A kernel that Triton would compile, and what it was launched with: at first, and later as the compiled one."""

    arg_names = ("x", "n", "size")

    def __init__(self):
        self.first, self.later, self.told = [], [], []

    def __getitem__(self, grid):
        def run(*args, **meta):
            self.first.append((grid, args, meta))
            return Later(self, meta)

        return run


class Later:
    """`function` and `packed_metadata` are what Triton's own launcher wants, besides a stream and hooks."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, asked, meta):
        self.asked, self.meta = asked, meta

    def __getitem__(self, grid):
        return lambda *args: self.asked.told.append((grid, args))

    def run(self, x, y, z, stream, function, metadata, told, before, after, *args):
        assert (stream, function, metadata) == (5, self.function, self.packed_metadata)
        assert told is before is after is None
        self.asked.later.append(((x, y, z), args, self.meta))


@pytest.fixture
def asked(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 5 + device, raising=False)
    monkeypatch.setattr(kernels, "KNOWN", {})
    return Asked()


def test_triton_is_asked_once_for_each_kind_of_arguments(asked):
    """The compiled kernel gets all arguments in order; others of an alignment, a dtype, a size or a number of their
    own. (Where tensors lie: 16 bytes off the start of a buffer that is aligned, and 4.)"""
    buffer = torch.empty(64)
    launch = functools.partial(kernels.launch_here, 0, asked)
    for x in (buffer, buffer[4:]):
        launch(7, (x, 5), {"size": 3, "num_warps": 4})
    assert asked.first == [((7,), (buffer, 5), {"size": 3, "num_warps": 4})]
    assert [(grid, args[1:]) for grid, args, _ in asked.later] == [((7, 1, 1), (5, 3))]
    assert asked.later[0][1][0].data_ptr() == buffer[4:].data_ptr()
    for x, n, meta in (
        (buffer[1:], 5, {}),
        (buffer.half(), 5, {}),
        (buffer, 1, {}),
        (buffer, 1.0, {}),
        (buffer, True, {}),
        (buffer, 32, {}),
        (buffer, 2**31, {}),
        (None, 5, {}),
        (buffer, None, {}),
        (buffer, 5, {"size": 4}),
        (buffer, 5, {"num_warps": 8}),
        (buffer, 5, {"num_stages": 4}),
    ):
        before = len(asked.first)
        for _ in range(2):
            launch(7, (x, n), {"size": 3, "num_warps": 4} | meta)
        assert len(asked.first) == before + 1
        assert asked.later[-1][2] == asked.first[-1][2]


def test_each_device_and_each_kernel_is_asked(asked):
    other, x = Asked(), torch.empty(64)
    for device, kernel in ((0, asked), (1, asked), (0, other)):
        kernels.launch_here(device, kernel, 7, (x, 5), {"size": 3})
    assert (len(asked.first), len(other.first)) == (2, 1) and not asked.later + other.later


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("chain", [True, False])
def test_who_watches_launches_is_told(asked, hook, chain, monkeypatch):
    """By Triton itself: a hook alone, or in a chain of hooks."""
    launch = functools.partial(kernels.launch_here, 0, asked, 7, (torch.empty(64), 5), {"size": 3})
    launch(), launch()
    if chain:
        monkeypatch.setattr(getattr(triton.knobs.runtime, hook), "calls", [print])
    else:
        monkeypatch.setattr(triton.knobs.runtime, hook, print)
    launch()
    assert [grid for grid, *_ in asked.told] == [(7, 1, 1)] and len(asked.later) == 1
    assert asked.told[0][1] == asked.later[0][1]


@pytest.mark.parametrize("name", ALL)
def test_activation_checkpointing(name):
    """What a checkpoint makes again it makes once, and of an output that is not used too."""
    row, tokens, constants = some(name, t=3, h=1)
    given = leaves(tokens, constants)
    call = functools.partial(quick.recurrence, row)
    for used in (0, 1):
        want = torch.autograd.grad(call(tokens, constants)[used].sum(), given, materialize_grads=True)
        again = checkpoint(call, tokens, constants, use_reentrant=False)[used]
        for a, b in zip(torch.autograd.grad(again.sum(), given, materialize_grads=True), want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["mamba2", "rwkv6", "gated_delta_net", "mamba", "rwkv7", "based"])
def test_strided_inputs(name):
    row, *given = some(name, t=17 if name in SCANNED else FEW)
    want, _ = quick.recurrence(row, *given)
    strided = [{n: torch.stack([x, x], -1)[..., 0] for n, x in group.items()} for group in given]
    assert torch.equal(quick.recurrence(row, *strided)[0], want)


def test_only_what_is_asked_is_computed(launched):
    """One sweep forward, two backward (dk and dv share one); no gate gradient unless wanted."""
    row, tokens, _ = some("mamba2")
    tokens["q"].requires_grad_()
    o, _ = quick.recurrence(row, tokens)
    assert launched == {"decay_sums": 1, "decay_sweep": 1}
    o.sum().backward()
    assert launched == {"decay_sums": 2, "decay_sweep": 3}
    tokens["g"].requires_grad_()
    quick.recurrence(row, tokens)[0].sum().backward()
    assert launched == {"decay_sums": 4, "decay_sweep": 6, "decay_dg": 1}


@pytest.mark.parametrize("name", ["gla", "rwkv6"])
def test_only_what_is_asked_is_computed_by_channel(name, launched):
    """Of gates all is made once and kept; one sweep for o and the memories, one for dv and their cotangents."""
    row, tokens, constants = some(name)
    form = quick.ready(row, quick.form_of(row, {**tokens, **constants}), constants, quick.same)
    unasked = torch.ops.linear_moe.channel(form.q, form.k, form.v, form.g, form.u, None, None, 1, False, False)
    assert [x.numel() for x in unasked[2:]] == [0] * 6
    assert launched == {"channel_gates": 1, "channel_sweep": 1}
    launched.clear()
    given = leaves(tokens, constants)
    o, _ = quick.recurrence(row, tokens, constants)
    torch.autograd.grad(o.sum(), given)
    assert launched == {"channel_gates": 1, "channel_sweep": 2, "channel_gradients": 1}


@pytest.mark.parametrize("name", ["gla", "gated_delta_net"])
def test_what_is_kept_for_the_gradient_may_be_asked_twice(name):
    row, tokens, constants = some(name, t=70)
    tokens = narrowed(tokens, torch.float16)
    given = leaves(tokens, constants)
    o, _ = quick.recurrence(row, tokens, constants)
    first, second = (torch.autograd.grad(o.sum(), given, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["delta_net", "gated_delta_net", "comba"])
def test_only_what_is_asked_is_computed_by_delta_rules(name, launched):
    """What two sweeps share is found once and kept; without a gradient in sight nothing but that is."""
    row, tokens, _ = some(name)
    sums = {"decay_sums": 1} if "g" in tokens else {}
    quick.recurrence(row, tokens)
    assert launched == {"delta_prepare": 1, "delta_values": 1, **sums}
    launched.clear()
    given = leaves(tokens)
    o, _ = quick.recurrence(row, tokens)
    torch.autograd.grad(o.sum(), given)
    gates = {"decay_sums": 2} if sums else {}
    each = ("prepare", "values", "answers", "pairs", "chunks")
    assert launched == {**{f"delta_{name}": 1 for name in each}, **gates}


def test_only_what_is_asked_is_computed_of_slots(launched):
    """What both memories share is made once; what queries find of keys is all that is made of these on the way."""
    row, tokens, _ = some("gsa")
    forwards = {"channel_gates": 2, "channel_sweep": 2, "channel_gradients": 1, "slots_weights": 1}
    unasked = torch.ops.linear_moe.slots(*(tokens[n] for n in "qkvg"), None, None, None, 3, False)
    assert [x.numel() for x in unasked[3:]] == [0] * 8
    assert launched == forwards
    launched.clear()
    given = leaves(tokens)
    o, _ = quick.recurrence(row, tokens)
    torch.autograd.grad(o.sum(), given)
    backwards = {"channel_gates": 1, "channel_sweep": 2, "channel_outputs": 1, "channel_gradients": 2}
    assert launched == Counter(forwards) + Counter(backwards) + Counter({"slots_cotangents": 1})


def test_one_compiled_kernel_is_the_gradients_of_both_memories_of_slots(monkeypatch):
    """On a first call every kernel is compiled, one after the other: this one takes longest."""
    row, tokens, _ = some("gsa", t=20, h=1)
    tokens, kinds, launch = narrowed(tokens, torch.float16), [], kernels.launch

    def seen(kernel, programs, *args, **meta):
        if kernel is channels.channel_gradients:
            kinds.append(([x.dtype if isinstance(x, torch.Tensor) else type(x) for x in args], meta))
        launch(kernel, programs, *args, **meta)

    leaves(tokens)
    o, _ = quick.recurrence(row, tokens)
    monkeypatch.setattr(kernels, "launch", seen)
    o.sum().backward()
    assert len(kinds) == 2 and kinds[0] == kinds[1]


@pytest.mark.parametrize("name", SCANNED)
def test_only_what_is_asked_is_computed_by_scans(name, launched):
    """One pass each way; memories on the way are kept for a gradient and for nothing else."""
    row, tokens, constants = some(name, t=5)
    form = quick.ready(row, quick.form_of(row, {**tokens, **constants}), constants, quick.same)
    given = (form.q, form.k, form.v, form.rows, form.columns, form.fixed, None, None)
    assert [x.numel() for x in torch.ops.linear_moe.scan(form.kind, *given, 1, False)[2:]] == [0, 0, 0]
    assert launched == {"scan_forward": 1}
    launched.clear()
    given = leaves(tokens, constants)
    o, _ = quick.recurrence(row, tokens, constants)
    torch.autograd.grad(o.sum(), given)
    assert launched == {"scan_forward": 1, "scan_backward": 1}


@pytest.mark.parametrize("name, gates, turns", [("gated_fast_weights", 2, 0), ("gate_loop", 1, 2)])
def test_only_what_is_asked_is_computed_by_row_and_column(name, gates, turns, launched):
    """One sweep for o, and without a gradient in sight nothing is kept; one each for dv, dq and dk."""
    row, tokens, _ = some(name, t=20)
    forwards = Counter({"cross_sums": gates, "cross_turns": turns, "cross_prepare": 1, "cross_sweep": 1})
    inputs = (tokens.get(n) for n in ("q", "k", "v", "g", "f", "theta"))
    assert [x.numel() for x in torch.ops.linear_moe.cross(*inputs, None, None, 1, False)[2:]] == [0] * 6
    assert launched == forwards
    launched.clear()
    given = leaves(tokens)
    o, _ = quick.recurrence(row, tokens)
    torch.autograd.grad(o.sum(), given)
    assert launched == forwards + Counter(
        {"cross_prepare": 2, "cross_sweep": 3, "cross_ends": 1, "cross_gradients": gates}
    )


@pytest.mark.parametrize("name", FEATURED)
def test_only_what_is_asked_is_computed_of_features(name, launched):
    """One sweep for o and the memory, one for dv and the memory's gradient, one each for dq and dk, and their pairs; of
    a mean a quotient each way."""
    row, tokens, _ = some(name, t=5)
    given = leaves(tokens)
    o, _ = quick.recurrence(row, tokens)
    mean = name in WEIGHTED
    assert launched == {"features_sweep": 1} | ({"features_quotient": 1} if mean else {})
    launched.clear()
    torch.autograd.grad(o.sum(), given)
    gradients = {"features_sweep": 1, "features_gradients": 2, "features_pairs": 1}
    assert launched == gradients | ({"features_quotient_gradients": 1} if mean else {})


def test_a_scan_that_kept_nothing_has_no_gradient():
    _, tokens, _ = some("longhorn", t=3)
    q, k, v, dt = (tokens[n].requires_grad_() for n in ("q", "k", "v", "dt"))
    with pytest.raises(RuntimeError, match="keep = True"):
        torch.ops.linear_moe.scan(scans.ERASE.value, q, k, v, None, dt, None, None, None, 1, False)


@pytest.mark.parametrize("name", ["mamba2", "gated_delta_net", "comba"])
def test_more_columns_of_values_than_one_state_holds(name, monkeypatch):
    """They are computed apart from the first."""
    monkeypatch.setattr(getattr(fast, family_of(name)), "WHOLE", 32)
    compare(name, b=1, h=1, t=40, k=16, v=50)
    compare(name, b=1, h=1, t=20, k=16, v=50, cu_seqlens=torch.tensor([0, 9, 20], dtype=torch.int32))


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", ["mamba", "s4", "s4_printed", "fast_weights_printed"])
def test_the_operator_of_scans_keeps_torchs_rules(name, segments):
    row, tokens, constants = some(name, t=5)
    form = quick.ready(row, quick.form_of(row, {**tokens, **constants}), constants, quick.same)
    given = [
        x if x is None else x.requires_grad_() for x in (form.q, form.k, form.v, form.rows, form.columns, form.fixed)
    ]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    given = (form.kind, *given, None, None, segments, True)
    torch.library.opcheck(torch.ops.linear_moe.scan.default, given, test_utils=checks)


@pytest.mark.parametrize("name", ["kda", "rwkv7", "rwkv7_printed", "delta_net_printed"])
def test_only_what_is_asked_is_computed_by_rank_one(name, launched):
    """One sweep each way, and what no state is needed for before it; all gradients but that of v in two launches."""
    row, tokens, _ = some(name)
    quick.recurrence(row, tokens)
    sums = 1 if "g" in tokens and tokens["g"].ndim == 4 else 0  # of gates, found again on the way back
    once = Counter({"rank_one_prepare": 1, "rank_one_sweep": 1, "rank_one_sums": sums})
    assert launched == once
    launched.clear()
    given = leaves(tokens)
    o, _ = quick.recurrence(row, tokens)
    torch.autograd.grad(o.sum(), given)
    back = ("reverse", "sweep", "gradients", "pairs")
    assert launched == once + Counter({f"rank_one_{x}": 1 for x in back}) + Counter({"rank_one_sums": sums})


def test_a_gradient_that_is_not_asked_for_is_none():
    row, tokens, _ = some("kda", t=3)
    o, _ = quick.recurrence(row, {**tokens, "v": tokens["v"].requires_grad_()})
    o.sum().backward()
    assert tokens["v"].grad is not None and all(x.grad is None for n, x in tokens.items() if n != "v")


def test_a_delta_rule_that_kept_nothing_has_no_gradient():
    _, tokens, _ = some("delta_net", t=3)
    given = [x.requires_grad_() for x in tokens.values()]
    with pytest.raises(RuntimeError, match="keep = True"):
        torch.ops.linear_moe.delta(*given, *[None] * 4, 1, False, False)
    with pytest.raises(RuntimeError, match="keep = True"):
        torch.ops.linear_moe.rank_one(*given, *[None] * 5, 1, False, False)
    _, tokens, _ = some("gsa", t=3)
    with pytest.raises(RuntimeError, match="keep = True"):
        torch.ops.linear_moe.slots(*(tokens[n].requires_grad_() for n in "qkvg"), None, None, None, 3, False)
    _, tokens, _ = some("gated_fast_weights", t=3)
    with pytest.raises(RuntimeError, match="keep = True"):
        torch.ops.linear_moe.cross(*(tokens[n].requires_grad_() for n in "qkvgf"), None, None, None, 1, False)


@pytest.mark.parametrize("dtype, segments", [(torch.float32, 1), (HALVES[0], 2)])
@pytest.mark.parametrize("name", ["gated_fast_weights", "gate_loop"])
def test_gates_of_rows_and_columns_keep_torchs_rules(name, dtype, segments):
    _, tokens, _ = some(name, t=7)
    tokens = narrowed(tokens, dtype)
    given = [tokens[n].requires_grad_() if n in tokens else None for n in ("q", "k", "v", "g", "f", "theta")]
    given[3:] = [None if x is None else x.detach().float().requires_grad_() for x in given[3:]]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.linear_moe.cross.default
    torch.library.opcheck(operator, (*given, None, None, segments, True), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, HALVES[0]])
def test_the_operator_of_slots_keeps_torchs_rules(dtype):
    _, tokens, _ = some("gsa", t=7)
    given = [x.requires_grad_() for x in narrowed(tokens, dtype).values()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.linear_moe.slots.default
    torch.library.opcheck(operator, (*given, None, None, None, 3, True), test_utils=checks)


@pytest.mark.parametrize("segments, values", [(1, -1), (2, 14)])
@pytest.mark.parametrize("polynomial", [polynomials.SQUARES, polynomials.TAYLOR])
def test_the_operator_of_features_keeps_torchs_rules(polynomial, segments, values):
    _, tokens, _ = some("based", t=7)
    given = [x.requires_grad_() for x in tokens.values()]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.linear_moe.features.default
    how = (5, polynomial, values, 1e-5, segments)
    torch.library.opcheck(operator, (*given, None, None, *how), test_utils=checks)


@pytest.mark.parametrize("segments", [1, 2])
def test_weighted_means_keep_torchs_rules(segments):
    _, tokens, _ = some("linear_attention_normalized", t=7)
    given = [tokens[n].requires_grad_() for n in "qkv"]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.linear_moe.ratio.default
    torch.library.opcheck(operator, (*given, None, None, None, segments, 1e-10), test_utils=checks)


@pytest.mark.parametrize("segments, wide", [(1, False), (2, True)])
@pytest.mark.parametrize("name", ["mamba2", "gla", "rwkv6", "delta_net", "gated_delta_net", "comba"])
def test_the_operators_keep_torchs_rules(name, segments, wide):
    _, tokens, constants = some(name, t=7)
    given = [tokens[n].requires_grad_() for n in "qkv"]
    if "beta" in tokens:
        given.append(tokens["beta"].requires_grad_())
    given.append(tokens["g"].requires_grad_() if "g" in tokens else None)
    if family_of(name) == "channel":
        given.append(constants["u"].requires_grad_() if constants else None)
    if family_of(name) == "delta":
        given.append(tokens["a"].requires_grad_() if "a" in tokens else None)
    operator = getattr(torch.ops.linear_moe, family_of(name)).default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    more = (True,) if family_of(name) in ("channel", "delta") else ()
    torch.library.opcheck(operator, (*given, None, None, segments, wide, *more), test_utils=checks)


@pytest.mark.parametrize("segments", [1, 2])
@pytest.mark.parametrize("name", ["kda", "rwkv7", "rwkv7_printed", "gated_delta_net_printed"])
def test_rank_one_keeps_torchs_rules(name, segments):
    row, tokens, constants = some(name, t=7)
    form = quick.ready(row, quick.form_of(row, tokens), constants, lambda x: x)
    given = [None if x is None else x.detach().requires_grad_() for x in (getattr(form, n) for n in INPUTS)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operator = torch.ops.linear_moe.rank_one.default
    torch.library.opcheck(operator, (*given, None, None, segments, name == "kda", True), test_utils=checks)


class Watched(TorchDispatchMode):
    """Counts this project's operators."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.seen.update([f.name()] if f.namespace == "linear_moe" else [])
        return f(*args, **kwargs or {})


@pytest.mark.parametrize("name", ["mamba2", "gla", "gated_delta_net", "kda", "mamba", "based", "gsa", "gate_loop"])
def test_operators_only_where_somebody_looks(name):
    """The same bits by way of torch's operators and without them; neither is differentiated twice."""
    row, tokens, constants = some(name, t=7)

    def both():
        given = leaves(dict(tokens), dict(constants))
        mine = dict(zip([*tokens, *constants], given, strict=True))
        o, _ = quick.recurrence(row, {n: mine[n] for n in tokens}, {n: mine[n] for n in constants})
        return [o.detach(), *torch.autograd.grad(o.square().sum(), given)]

    with Watched() as watched:
        want = both()
    assert watched.seen == {f"linear_moe::{family_of(name)}": 1, f"linear_moe::{family_of(name)}_gradients": 1}
    assert all(torch.equal(a, b) for a, b in zip(both(), want, strict=True))
    given = leaves(tokens)
    o = quick.recurrence(row, tokens, constants)[0]
    grads = torch.autograd.grad(o.square().sum(), given, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in grads).backward()


# ------------------------------------------------------------------------------------------------ spans and steps


@pytest.mark.parametrize("name", ALL)
def test_span(name):
    row, tokens, constants = some(name, t=9 if name in SCANNED else FEW)
    M = start(name, row, tokens, constants).to(DEVICE)
    _, want = chunked.recurrence(row, tokens, constants, M)
    got = span.apply(quick.span(row, tokens, constants), M)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


ENDED = [name for name in ALL if quick.has_ends(LSM[name], {"q": torch.empty(1, 1, 1, 16)})]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ENDED)
def test_both_ends_of_a_run_without_its_outputs(name, packed, monkeypatch):
    """What tokens do to a memory, and what the memory before them receives from their outputs."""
    segments = 2 if not packed and name in ("mamba2", "gla", "gated_delta_net", "kda") else 1
    cut(monkeypatch, segments)
    t = MANY if segments > 1 or CUDA else 19
    row, tokens, constants = some(name, t=t, h=1 if segments > 1 else 2, k=20, v=33, strength=0.05)
    cu_seqlens = torch.tensor([0, 3, 3, t], dtype=torch.int32, device=DEVICE) if packed else None
    exact_ones = [{n: x.double() for n, x in group.items()} for group in (tokens, constants)]
    M = exact.empty(row, *exact_ones, 3 if packed else None).requires_grad_()
    o, _ = chunked.recurrence(row, *exact_ones, M, cu_seqlens)
    do = torch.randn(o.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(DEVICE)
    found, kept = quick.ends.span(row, tokens, constants, cu_seqlens)
    want = chunked.span(row, *exact_ones, cu_seqlens)
    G = quick.ends.received(row, tokens, constants, do.float(), cu_seqlens, kept)
    for got, right in ((found.A, want.A), (found.S, want.S), (G, torch.autograd.grad(o, M, do)[0])):
        assert got.shape == right.shape
        torch.testing.assert_close(got.double(), right, rtol=2e-5, atol=2e-5 * right.abs().max().item())


@pytest.mark.parametrize("name", ALL)
def test_steps_are_the_whole(name, launched):
    row, tokens, constants = some(name, b=2, t=5, k=20, v=33)
    M = start(name, row, tokens, constants).to(DEVICE)
    want, last = chunked.recurrence(row, tokens, constants, M)
    memory, o = M.clone(), []
    for i in range(5):
        y, after = quick.step(row, {n: x[:, i : i + 1] for n, x in tokens.items()}, constants, memory)
        assert after.data_ptr() == memory.data_ptr()  # in place
        o.append(y)
    torch.testing.assert_close(torch.cat(o, 1), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(memory, last, rtol=1e-5, atol=1e-5)
    kernels = {
        "ratio": ["decay_step"],
        "features": ["decay_step"],
        "scan": ["scan_forward"],
    }
    assert launched == dict.fromkeys(kernels.get(family_of(name), [f"{family_of(name)}_step"]), 5)


def test_a_step_with_gradients_overwrites_nothing(launched):
    row, tokens, constants = some("mamba2", t=1)
    M = start("mamba2", row, tokens, constants).to(DEVICE)
    before = M.clone()
    tokens["k"].requires_grad_()
    quick.step(row, tokens, None, M)[0].sum().backward()
    assert torch.equal(M, before) and launched["decay_step"] == 0


@pytest.mark.parametrize("name", ["linear_attention_normalized", "mamba2", "gla", "rwkv6"])
def test_both_ways(name):
    row, tokens, constants = make(name, b=1, t=33, k=16, v=16)
    cu_seqlens = torch.tensor([0, 7, 7, 33], dtype=torch.int32, device=DEVICE)

    def outputs(ops, dtype):
        x, c = ({n: y.to(DEVICE, dtype) for n, y in group.items()} for group in (tokens, constants))
        return both_ways(ops).recurrence(row, x, c, None, cu_seqlens)[0]

    right = outputs(reference.ops, torch.float64)
    assert_within_budget(outputs(fast.ops, torch.float32), outputs(reference.ops, torch.float32), right, name)


@pytest.mark.parametrize("name", ALL)
def test_autocast_changes_nothing(name):
    """Products are in the tokens' dtype; sums of gates and memories stay float32 where torch would narrow them."""
    dtype = HALVES[-1]
    row, tokens, constants = some(name, t=5)
    tokens = narrowed(tokens, dtype)
    first = {"memory": start(name, row, tokens, constants).float().to(DEVICE)}
    given = leaves(tokens, constants, first)

    def run(autocast):
        with torch.autocast(DEVICE, dtype, enabled=autocast):
            o, last = quick.recurrence(row, tokens, constants, first["memory"])
        return [o, last, *torch.autograd.grad(o.float().square().sum() + last.square().sum(), given)]

    for alone, within in zip(run(False), run(True), strict=True):
        assert alone.dtype == within.dtype and torch.equal(alone, within)


# ----------------------------------------------------------------------------------------------------- the surface


@pytest.mark.parametrize("f, of", [("recurrence", exact), ("span", chunked), ("step", exact)])
def test_signatures(f, of):
    assert str(inspect.signature(getattr(quick, f))) == str(inspect.signature(getattr(of, f)))


def test_ops_says_what_it_shares():
    ours, theirs = fast.ops._asdict(), reference.ops._asdict()
    assert fast.ops.kept == tuple(n for n, f in ours.items() if callable(f) and f is theirs[n])


def test_import_loads_no_peer():
    code = "import sys, fast; assert 'fla' not in sys.modules and 'triton' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def error(kind, *words, row="mamba2", change=lambda tokens: None, **more):
    row, tokens, constants = some(row, t=3)
    change(tokens)
    with pytest.raises(kind) as caught:
        quick.recurrence(row, tokens, constants, **more)
    line = str(caught.value)
    assert "\n" not in line and all(word in line for word in words), line


def test_errors(launched):
    def cast(dtype, *names):
        return lambda tokens: tokens.update({n: tokens[n].to(dtype) for n in names or tokens})

    error(NotImplementedError, "MesaNet", "mamba2", "reference", row="mesa")
    error(NotImplementedError, "Titans", "reference", row="titans")
    error(ValueError, "float64", "bfloat16", "reference", change=cast(torch.float64))
    error(ValueError, "q torch.float16", "k torch.float32", change=cast(torch.float16, "q"))
    error(ValueError, "missing", change=lambda tokens: tokens.pop("g"))
    error(ValueError, "memory has shape", memory=torch.zeros(1, 2, 3, 4))
    many = {"v": torch.zeros(1, 3, 2, 300, device=DEVICE)}
    for row in ("mamba2", "linear_attention_normalized", "gate_loop", "gsa"):
        error(ValueError, "V = 300", "256", row=row, change=lambda tokens: tokens.update(many))
    wide = {n: torch.zeros(1, 3, 2, 300, device=DEVICE) for n in "qk"}
    error(ValueError, "K = 300", "256", row="longhorn", change=lambda tokens: tokens.update(wide))
    many = {n: torch.zeros(1, 3, 2, 33, device=DEVICE) for n in "qk"}
    error(ValueError, "Based", "33 channels", "32", "reference", row="based", change=lambda tokens: tokens.update(many))
    error(ValueError, "int32", cu_seqlens=torch.tensor([0, 3], device=DEVICE))
    error(ValueError, "several devices", change=lambda tokens: tokens.update(v=tokens["v"].to("meta")))
    if not CUDA:
        error(ValueError, "interpreter", change=cast(torch.bfloat16))
    assert not launched


@pytest.mark.parametrize("k, v", [(20, 16), (16, 20), (16, 16)])
def test_what_only_fills_tiles_is_not_handed_out(k, v):
    """And where nothing does, nothing is cut: that would be one more step backwards for each result."""
    row, tokens, constants = some("mamba2", t=2, h=1, k=k, v=v)
    leaves(tokens)
    o, last = quick.recurrence(row, tokens, constants)
    assert (o.shape[-1], *last.shape[-2:]) == (v, k, v)
    assert (o.grad_fn is last.grad_fn) == (k == v)


def right():
    """What `computable` is given, and finds right."""
    row, tokens, constants = some("mamba2", t=3)
    memory = torch.zeros(1, 2, 16, 16, device=DEVICE)
    borders = torch.tensor([0, 3], dtype=torch.int32)
    return {"row": row, "tokens": tokens, "constants": constants, "memory": memory, "cu_seqlens": borders}


def changed(name, change):
    def act(given):
        given["tokens"][name] = change(given["tokens"][name])

    return act


WRONG = {  # each differs in one way from what is right
    "no gate": lambda given: given["tokens"].pop("g"),
    "a gate by another name": lambda given: given["tokens"].update(gate=given["tokens"].pop("g")),
    "a gate that is a constant": lambda given: given["constants"].update(g=given["tokens"].pop("g")),
    "a token fewer": changed("k", lambda x: x[:, :2]),
    "a head fewer": changed("v", lambda x: x[:, :, :1]),
    "channels fewer": changed("q", lambda x: x[..., :8]),
    "an axis fewer": changed("g", lambda x: x[..., 0]),
    "too many columns": changed("v", lambda x: x.repeat(1, 1, 1, 17)),
    "another dtype": changed("q", torch.Tensor.half),
    "no kernel's dtype": lambda given: given["tokens"].update({n: x.double() for n, x in given["tokens"].items()}),
    "another device": changed("v", lambda x: x.to("meta")),
    "a memory's device": lambda given: given.update(memory=given["memory"].to("meta")),
    "a memory's size": lambda given: given.update(memory=given["memory"][..., :8]),
    "two memories": lambda given: given.update(memory=given["memory"].repeat(2, 1, 1, 1)),
    "borders that end early": lambda given: given.update(cu_seqlens=torch.tensor([0, 2], dtype=torch.int32)),
    "long borders": lambda given: given.update(cu_seqlens=torch.tensor([0, 3])),
    "another row": lambda given: given.update(row=LSM["gla"]),
    "a row without kernels": lambda given: given.update(row=LSM["mesa"]),
}


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(quick, "FOUND", {})
    return quick.FOUND


@pytest.mark.parametrize("packed", [True, False])
def test_what_was_right_says_nothing_of_what_differs(packed, found):
    """In whatever one way it does; borders that can be read are, every time."""

    def given():
        return right() if packed else right() | {"cu_seqlens": None}

    quick.computable(**given())
    for way, change in WRONG.items():
        for _ in range(2):
            wrong = given()
            change(wrong)
            with pytest.raises((ValueError, NotImplementedError)):
                quick.computable(**wrong)
                pytest.fail(way)
    assert len(found) == (not packed)


def test_what_was_right_is_not_looked_at_again(found, monkeypatch):
    """But where a compiler, or another mode that sees every operator, looks on."""
    given = right() | {"cu_seqlens": None}
    x, family, sequences = quick.computable(**given)
    looks = Counter()
    for name in ("checked", "supported"):
        monkeypatch.setattr(quick, name, lambda *_, name=name: looks.update([name]))
    again = quick.computable(**given)
    assert all(a is b for a, b in zip(again[0], x, strict=True) if isinstance(a, torch.Tensor))
    assert again[1:] == (family, sequences) and not looks
    with Made():
        quick.computable(**given)
    assert looks == {"checked": 1, "supported": 1} and len(found) == 1


def test_a_compiler_sees_nothing_that_is_remembered(found):
    """One graph, no warning of a cache, and inputs are looked at as if none had been right."""
    rows = {name: some(name, t=1, h=1) for name in ("mamba2", "gla", "gated_delta_net", "kda")}

    def outputs(rows):
        return [quick.recurrence(*given)[0] for given in rows.values()]

    want = outputs(rows)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Dynamo detected a call to a `functools.lru_cache`")
        got = torch.compile(outputs, backend="eager", fullgraph=True)(rows)
    assert all(map(torch.equal, got, want)) and len(found) == len(rows)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["mamba2", "gla", "gated_delta_net"])
def test_a_compiler_sees_one_graph_each_way_from_a_memory(name, packed):
    row, tokens, constants = some(name, t=5, h=1)
    borders = torch.tensor([0, 2, 5], dtype=torch.int32, device=DEVICE) if packed else None
    given = {**tokens, "memory": start(name, row, tokens, constants, n=1 + packed).to(DEVICE)}
    leaves(given)

    def f(memory, **tokens):
        o, last = quick.recurrence(row, tokens, constants, memory, borders)
        return torch.cat([o.flatten(), last.flatten()]).sin()

    compiled_alike(f, given)


def test_rows_that_were_right_are_kept_and_few(found, monkeypatch):
    """A row is known by its id, which another may get once it is gone."""
    monkeypatch.setattr(quick, "MOST", 3)
    given = right() | {"cu_seqlens": None}
    for i in range(5):
        quick.computable(**given | {"row": given["row"]._replace(title=str(i))})
        assert [seen.row.title for seen in found.values()] == [*"01234"][i // 3 * 3 : i + 1]


@pytest.fixture
def hopper(request, tmp_path):
    """What tests/hopper.py says, in a process whose Triton compiles: it takes less than the interpreter. Kernels that
    are what they were in the run of tests before are not compiled again."""
    cache = getattr(request.config, "cache", None)  # pytest may be told to have none
    folder = cache.mkdir("triton") if cache else tmp_path
    outside = {n: x for n, x in os.environ.items() if n != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder)}

    def said(*words):
        script = [sys.executable, Path(__file__).with_name("hopper.py"), *words]
        return subprocess.run(script, env=outside, check=True, capture_output=True, text=True).stdout.splitlines()

    return said


def kernels_of(module, prefix):
    return {name for name in vars(module) if name.startswith(prefix)}


def spilling(said):
    return {line.split()[0] for line in said if not line.endswith(" 0 bytes of stack")}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_for_hopper_without_one(dtype, hopper):
    """Kernels by channel and by rank one."""
    names = {line.split()[0] for line in hopper("16", "32", dtype)}
    assert names == {"delta_fold"} | kernels_of(channels, "channel_") | kernels_of(ones, "rank_one_")


def test_delta_rules_compile_for_hopper_without_one_and_do_not_spill(hopper):
    said = hopper("32", "32", "bfloat16", "delta")
    assert {line.split()[0] for line in said} == {"decay_sums"} | kernels_of(deltas, "delta_")
    assert not spilling(said), said


def test_scans_compile_for_hopper_without_one_and_do_not_spill(hopper):
    said = hopper("32", "256", "bfloat16", "rate", "full", "spiral")
    assert {line.split()[0] for line in said} == kernels_of(scans, "scan_")
    assert not spilling(said), said


def test_features_routers_losses_and_gates_of_columns_compile_for_hopper_without_one_and_do_not_spill(hopper):
    said = hopper("16", "64", "bfloat16", "features", "routers", "words", "crossed")
    assert {line.split()[0] for line in said} == {
        "features_sweep",
        "features_gradients",
        "features_pairs",
        "features_quotient",
        "features_quotient_gradients",
        "decay_fold",
        "cross_sums",
        "cross_prepare",
        "cross_sweep",
        "cross_fold",
        "cross_ends",
        "cross_gradients",
        "cross_step",
        "top_rows",
        "counts",
        "starts",
        "ranks",
        "sums_forward",
        "cotangents_backward",
    }
    assert not spilling(said), said


def test_slots_compile_for_hopper_without_one(hopper):
    """Only gradients by channel spill, as they do without slots."""
    said = hopper("16", "16", "bfloat16", "slots")
    by_channel = {f"channel_{name}" for name in ("gates", "sweep", "gradients", "outputs")}
    assert {line.split()[0] for line in said} == by_channel | kernels_of(slotted, "slots_")
    assert spilling(said) <= {"channel_gradients"}, said


def test_tensors_on_cpu_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    row, tokens, _ = make("mamba2", t=3, dtype=torch.float32)
    with pytest.raises(ValueError, match="need a CUDA GPU, got tensors on cpu; use the backend 'reference'"):
        quick.recurrence(row, tokens)


def test_every_row_has_a_kernel_or_says_so():
    for name in LSM:
        row, tokens, constants = some(name, t=2)
        if name in quick.rows():
            quick.recurrence(row, tokens, constants)
        else:
            with pytest.raises(NotImplementedError, match="have linear_attention"):
                quick.recurrence(row, tokens, constants)


# ---------------------------------------------------------------------------------------------- on a GPU, for real


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, v", [(32, 128), (64, 64), (128, 128), (128, 64), (96, 256), (256, 64), (256, 256)])
@pytest.mark.parametrize("name", [*GATED, *SCANNED, "gsa", "linear_attention_normalized"])
def test_head_sizes(name, k, v, dtype):
    if name in SCANNED:
        compare(name, dtype, b=1, h=2, t=100, k=min(k, 128), v=v)
    else:
        compare(name, dtype, b=1, h=2, t=200, k=k, v=v)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_many_programs_and_long_sequences(name, dtype):
    compare(name, dtype, b=3, h=23, t=100, k=32, v=64)  # 138 programs: no segments
    compare(name, dtype, b=1, h=1, t=2500, k=64, v=64)  # 4 segments


@gpu
@pytest.mark.parametrize("name", [*GATED, "gsa"])
def test_sixteen_bits_over_one_long_segment(name, monkeypatch):
    """The gate's gradient sums rounding errors from a segment's end to its start (delta rules: over 512 tokens)."""
    if family_of(name) in ("decay", "channel", "slots"):
        cut(monkeypatch, 1)
    compare(name, torch.bfloat16, t=2048, k=64, v=64)
    compare(name, torch.bfloat16, t=2048, k=64, v=64, change=lasting(name))


@gpu
@pytest.mark.parametrize("b, t, h", [(2, 3000, 4), (9, 700, 23)])
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_every_time(name, b, t, h, dtype):
    """Whatever else the GPU is doing: a kernel that reads what another program may not have written would differ."""
    row, tokens, constants = some(name, b=b, t=t, h=h, k=16 if LSM[name].features else 64, v=64)
    tokens = narrowed(tokens, dtype)
    given = leaves(tokens, constants)

    def once():
        o, last = quick.recurrence(row, tokens, constants)
        return [o, last, *torch.autograd.grad(o.square().sum() + last.square().sum(), given)]

    first, busy = once(), torch.cuda.Stream()
    for run in range(8):
        with torch.cuda.stream(busy):
            for _ in range(run):
                torch.randn(2**22, device=DEVICE).sort()
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@gpu
@pytest.mark.parametrize(
    "name, forward, backward",
    [
        ("mamba2", 1.3, 5.8),
        ("gla", 8.4, 16.9),
        ("gated_delta_net", 5.6, 13.0),
        ("comba", 5.6, 14.0),
        ("kda", 10.5, 20.0),
    ],
)
def test_extra_memory(name, forward, backward):
    """Forward: the output and one memory; by channel scores, queries and keys faded, the sums of gates (2 units, in
    float32) and the memories of chunks; delta rules: news, two tiles a chunk and the memories of chunks. Backward: o
    do dq dk dv, 2 memories, the gates' gradient (2 units by channel, in float32) and the cotangents of the chunks'
    memories; delta rules: two more tiles, and da."""
    torch.use_deterministic_algorithms(False)
    row, tokens, _ = some(name, b=8, t=1024, h=8, k=128, v=128)
    tokens = {n: x if n == "g" else x.bfloat16() for n, x in tokens.items()}
    given = leaves(tokens)
    unit = tokens["q"].numel() * 2
    quick.recurrence(row, tokens)[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, _ = quick.recurrence(row, tokens)
    assert torch.cuda.max_memory_allocated() - before < forward * unit
    grads = torch.autograd.grad(o, given, torch.ones_like(o))
    assert torch.cuda.max_memory_allocated() - before < backward * unit
    assert len(grads) == len(given)


@pytest.mark.parametrize(
    "name, alone, both",
    [
        ("linear_attention", 0.2, 0.4),
        ("mamba2", 0.3, 0.5),
        ("gla", 3.7, 9.0),
        ("gated_delta_net", 1.3, 7.7),
        ("kda", 4.7, 12.6),
        ("gsa", 7.6, 11.9),
        ("gated_fast_weights", 8.6, 13.2),
        ("gate_loop", 17.2, 20.6),
    ],
)
def test_memory_beside_inputs_and_results(name, alone, both, monkeypatch):
    """In units of q's size, by count, whatever computes: without a gradient, and with what the gradient needs."""
    cut(monkeypatch, 1)
    monkeypatch.setattr(kernels, "launch", lambda *_, **__: None)
    monkeypatch.setattr(operators, "observed", lambda: False)  # what an operator makes within itself counts
    torch.use_deterministic_algorithms(False)
    row, tokens, constants = make(name, b=1, t=2048, h=1, k=128, v=128, dtype=torch.float32)
    tokens = {n: x.to(DEVICE) for n, x in narrowed(tokens, torch.float16).items()}
    if name == "gsa":
        tokens["g"] = tokens["g"].new_zeros(1, 2048, 1, 64)
    given, unit = leaves(tokens, constants), tokens["q"].nbytes
    do = torch.zeros_like(tokens["v"])

    def run():
        return torch.autograd.grad(quick.recurrence(row, tokens, constants)[0], given, do)

    def forward():
        with torch.no_grad():
            return quick.recurrence(row, tokens, constants)[0]

    results = do.nbytes + sum(x.nbytes for x in given)
    assert (peak(forward).bytes - do.nbytes) / unit < alone
    assert (peak(run).bytes - results) / unit < both


@gpu
def test_extra_memory_of_a_scan():
    """Forward: the output, and memories for the gradient (2 units). Backward: do dv, what slices give dq and dk (2),
    the steps' gradient in float32 (2)."""
    torch.use_deterministic_algorithms(False)
    row, tokens, constants = some("mamba", b=8, t=1024, h=1, k=16, v=1024)
    tokens = {n: x if n == "dt" else x.bfloat16() for n, x in tokens.items()}
    given = leaves(tokens, constants)
    unit = tokens["v"].numel() * 2
    quick.recurrence(row, tokens, constants)[0].sum().backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, _ = quick.recurrence(row, tokens, constants)
    assert torch.cuda.max_memory_allocated() - before < 3.3 * unit
    grads = torch.autograd.grad(o, given, torch.ones_like(o))
    assert torch.cuda.max_memory_allocated() - before < 9.8 * unit
    assert len(grads) == len(given)


@gpu
@pytest.mark.parametrize("name, most", [("s4", 4), ("gate_loop", 9)])  # o and memories 1 each; sums 2, turns 4
def test_few_memories_are_kept_where_they_are_large(name, most):
    torch.use_deterministic_algorithms(False)
    row, tokens, constants = some(name, b=2, t=2048, h=8, k=64, v=64)
    tokens = {n: x if n in ("g", "theta") else x.bfloat16() for n, x in tokens.items()}
    leaves(tokens)
    unit = tokens["v"].numel() * 2
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = quick.recurrence(row, tokens, constants)
    assert torch.cuda.memory_allocated() - before < most * unit
    assert results[0].dtype == torch.bfloat16


@gpu
@pytest.mark.parametrize("name", ["mamba2", "rwkv6", "gated_delta_net", "mamba", "s4", "rwkv7", "based", "gsa"])
def test_cuda_graph(name):
    row, tokens, constants = some(name, t=2000)
    given = leaves(tokens, constants)

    def both():
        o, last = quick.recurrence(row, tokens, constants)
        return [o, last, *torch.autograd.grad([o, last], given, [torch.ones_like(o), torch.ones_like(last)])]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        both()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = both()
    with torch.no_grad():
        for x in given:
            x.mul_(0.9)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(results, both(), strict=True))


@gpu
@pytest.mark.parametrize("name", ALL)
def test_compiles_whole(name):
    torch._dynamo.reset()
    row, tokens, constants = some(name, t=130)
    given = leaves(tokens, constants)

    def loss(tokens, constants):
        o, last = quick.recurrence(row, tokens, constants)
        return o.square().sum() + last.square().sum()

    want = torch.autograd.grad(loss(tokens, constants), given)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(tokens, constants), given)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
