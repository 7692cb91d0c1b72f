"""Grouped experts are the reference's loop: outputs and every gradient, without a question to the GPU on the way.

Without a GPU the grouped path is called directly, on torch's own CPU product (float32 and bfloat16). With one the same
laws run on it, in bfloat16 and under autocast.
"""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.distributed.tensor import DTensor, Shard

import fast
from fast import experts as quick
from fast.kernels import experts as kernels
from fast.kernels import routers as sorting
from inputs import assert_within_budget, compiled_alike
from parallel import comm, mesh, shard, tensor, testing
from parallel import experts as shared
from reference import moe, routers
from reference.example import error
from reference.model import initialize, starts
from reference.moe import EXPERT, Drop, Experts, MoE
from reference.ops import ops
from reference.routers import ROUTER, Routing

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
WAYS = ["bfloat16", "autocast"] if CUDA else ["float32", "bfloat16", "autocast"]
gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU: torch's CPU product loops over experts and shows no waiting")
# Routers that ask: how many tokens each document has (shared out), how many experts a token visits at most, or how many
# documents there are.
ASKING = {"base", "sinkhorn", "remoe", "expert_choice", "soft"}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote reads NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(n, e, k, d=8, f=16, kind="swiglu", biases=True, kept=1.0, alike=False, seed=0):
    """(x, gate, w13, w2, ...) by name in float64, and which pairs there are: of `kept` a share, the others full experts
    or empty slots."""
    scores = draw(n, e, seed=seed)
    index = (scores[:1].expand(n, e) if alike else scores).argsort(-1)[:, :k]
    stays = torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) < kept
    index = index.masked_fill(~stays & (draw(n, k, seed=seed + 1) < 0), -1)
    rows = EXPERT[kind].rows * f
    given = {"x": draw(n, d, seed=seed + 2), "gate": draw(n, k, seed=seed + 3) * stays}
    given |= {"w13": draw(e, rows, d, seed=seed + 4) / d**0.5, "w2": draw(e, d, f, seed=seed + 5) / f**0.5}
    if biases:
        given |= {"b13": draw(e, rows, seed=seed + 6), "b2": draw(e, d, seed=seed + 7)}
    return given, index, stays


def run(function, case, dtype, device, autocast=False, **how):
    """The output and the gradient of each input, by name, on CPU. Gates are float32 at least."""
    given, index, kept = case
    wide = torch.promote_types(dtype, torch.float32)
    given = {name: x.to(wide if name == "gate" else dtype).to(device) for name, x in given.items()}
    given = {name: x.requires_grad_() for name, x in given.items()}
    weights = {name: x for name, x in given.items() if name not in ("x", "gate")}
    if "drop" in how:
        how["drop"] = how["drop"]._replace(index=how["drop"].index.to(device))
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y = function(given["x"], Routing(index.to(device), given["gate"], kept.to(device)), **weights, **how)
    assert y.dtype == dtype
    grads = torch.autograd.grad(y, list(given.values()), draw(*y.shape, seed=9).to(y))
    return {"y": y.detach().cpu()} | {f"d{name}": g.cpu() for name, g in zip(given, grads, strict=True)}


def apart(x, w13, w2, b13=None, b2=None, inner=moe.swiglu):
    """`feed_forward` with biases added to products that are rounded already."""
    h = F.linear(x, w13)
    y = F.linear(inner(h if b13 is None else h + b13.to(h)), w2)
    return y if b2 is None else y + b2.to(y)


def compare(way, case, function=quick.grouped, **how):
    """Within the budget: exact is the loop in float64, plain the loop as it would be run, its biases within the
    products or behind them, the worse of both. All are judged as sums of products in the products' dtype."""
    narrow = torch.float32 if way == "float32" else torch.bfloat16
    dtype, autocast = torch.bfloat16 if way == "bfloat16" else torch.float32, way == "autocast"
    given, *routing = case
    given = {name: x.to(torch.float32 if name == "gate" else dtype).double() for name, x in given.items()}
    case = (given, *routing)
    exact = run(moe.experts, case, torch.float64, "cpu", **how)
    plain = run(moe.experts, case, dtype, "cpu", autocast, **how)
    with mock.patch.object(moe, "feed_forward", apart):
        for name, x in run(moe.experts, case, dtype, "cpu", autocast, **how).items():
            plain[name] = max(plain[name], x, key=lambda y, name=name: error(y, exact[name]))
    got = run(function, case, dtype, DEVICE, autocast, **how)
    for name, x in got.items():
        assert x.dtype == plain[name].dtype and x.shape == plain[name].shape, name
        assert_within_budget(x.to(narrow), plain[name], exact[name], f"{way} {name}")
    return got


# ------------------------------------------------------------------------------------------------------ the laws


@pytest.mark.parametrize("kind", EXPERT)
@pytest.mark.parametrize("way", WAYS)
@given(
    n=st.integers(0, 20),
    e=st.integers(1, 6),
    sizes=st.tuples(st.sampled_from((8, 16, 40)), st.sampled_from((8, 24))),
    kept=st.sampled_from((1.0, 0.6, 0.0)),
    choices=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    data=st.data(),
)
@settings(max_examples=12)
def test_grouped_experts_are_the_loop(way, kind, n, e, sizes, kept, choices, data):
    """Any number of tokens, experts that nobody visits or everybody does, pairs dropped, a gate at either side."""
    k, seed = data.draw(st.integers(1, e)), data.draw(st.integers(0, 99))
    biases, alike, at_input = choices
    case = made(n, e, k, *sizes, kind=kind, biases=biases, kept=kept, alike=alike, seed=seed)
    compare(way, case, inner=EXPERT[kind].inner, gate_at="input" if at_input else "output")


@pytest.mark.parametrize("way", WAYS)
@given(
    lengths=st.lists(st.sampled_from((0, 1, 3, 8)), min_size=1, max_size=5).filter(any),
    columns=st.sampled_from((3, 8, 20)),
    biases=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=8)
def test_grouped_maps_are_the_loop(way, lengths, columns, biases, seed):
    """Of any number of rows each, none too, and any number of columns."""
    dtype, autocast = torch.bfloat16 if way == "bfloat16" else torch.float32, way == "autocast"
    narrow = torch.float32 if way == "float32" else torch.bfloat16
    shapes = [(sum(lengths), 8), *[(columns, 8)] * len(lengths), *[(columns,)] * len(lengths) * biases]
    inputs = [draw(*shape, seed=seed + i).to(dtype) for i, shape in enumerate(shapes)]

    def run(function, dtype, device, autocast):
        x, *weights = leaves = [y.to(dtype).to(device).requires_grad_() for y in inputs]
        ends = torch.tensor(lengths, device=device).cumsum(0, dtype=torch.int32)
        maps, shifts = weights[: len(lengths)], weights[len(lengths) :] or None
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            y = function(x, ends, maps, shifts)
        return [y, *torch.autograd.grad(y, leaves, draw(*y.shape, seed=seed).to(y))]

    def loop(x, ends, *more):
        return moe.linears(x, moe.Groups(ends), *more)

    exact, plain = run(loop, torch.float64, "cpu", False), run(loop, dtype, "cpu", autocast)
    for got, near, right in zip(run(quick.grouped_linears, dtype, DEVICE, autocast), plain, exact, strict=True):
        assert got.dtype == near.dtype
        assert_within_budget(got.cpu().to(narrow), near, right, way)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "bfloat16"])
@pytest.mark.parametrize("gate_at", ["output", "input"])
def test_dropout_is_the_loop_s(way, gate_at):
    """(In bfloat16 alone the loop refuses its float32 mask.)"""
    case = made(17, 5, 2, kept=0.8)
    drop = Drop(0.4, 3, torch.arange(17) * 5 + 2)
    got = compare(way, case, gate_at=gate_at, drop=drop)
    assert not torch.equal(got["y"], compare(way, case, gate_at=gate_at)["y"])


def visited(case, experts):
    _, index, kept = case
    return torch.zeros(experts + 1, dtype=torch.bool).index_fill(0, index.masked_fill(~kept, experts).flatten(), True)[
        :-1
    ]


class Careless(torch.autograd.Function):
    """A grouped product that writes no more than it must: NaN where nobody has rows, both ways."""

    @staticmethod
    def forward(ctx, x, w, offs):
        ctx.save_for_backward(x, w, offs)
        return Careless.rows(x, w, offs)

    @staticmethod
    def rows(x, w, offs):
        y = torch._grouped_mm(x, w, offs=offs)
        return y.index_fill(0, torch.arange(int(offs[-1]), len(x), device=x.device), torch.nan)

    @staticmethod
    def backward(ctx, D):
        x, w, offs = ctx.saved_tensors
        nobody = offs.diff(prepend=offs.new_zeros(1)) == 0
        dw = torch._grouped_mm(D.mT, x, offs=offs).masked_fill(nobody[:, None, None], torch.nan)
        return Careless.rows(D, w.mT, offs), dw.mT, None


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("careless", [False, True])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "autocast"])
def test_an_expert_that_nobody_visits_gets_exactly_zero(way, careless, kept, monkeypatch):
    """A gradient, not none, and not what memory held, whatever torch's product leaves there."""
    if careless:
        monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: Careless.apply(x, w, offs))
    case = made(3, 12, 2, d=16, f=16, kept=kept, seed=5)
    come = visited(case, 12)
    assert not come.all() and come.any() == (kept > 0)
    got = compare(way, case)
    for name in ("dw13", "dw2", "db13", "db2"):
        assert (got[name][~come] == 0).all()
        assert all(x.any() for x in got[name][come])
    assert (got["dgate"][~case[2]] == 0).all()
    assert (got["dx"][~case[2].any(-1)] == 0).all() and (got["y"][~case[2].any(-1)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@given(e=st.integers(0, 5), size=st.sampled_from(((), (1,), (7, 3), (0, 4), (9000,))), seed=st.integers(0, 99))
@settings(max_examples=8)
def test_gradients_of_weights_leave_in_the_weights_dtype(dtype, e, size, seed):
    """To the bit, with and without a kernel, and whatever stands where nobody was."""
    come, w, D = draw(e, seed=seed) > 0, draw(e, *size, seed=seed + 1).float(), draw(e, *size, seed=seed + 2).to(dtype)
    D[~come] = torch.nan
    leaf = w.to(DEVICE).requires_grad_()
    y = quick.Visited.apply(leaf, come.to(DEVICE), dtype)
    (dw,) = torch.autograd.grad(y, leaf, D.to(DEVICE))
    assert torch.equal(y.cpu(), w.to(dtype)) and dw.dtype == torch.float32
    assert torch.equal(dw.cpu(), torch.where(come.view(-1, *[1] * len(size)), D.float(), 0))
    if quick.has_kernels(D.to(DEVICE)):  # else autograd could make it wide, in a pass of its own
        assert quick.of_visited(D.to(DEVICE), come.to(DEVICE), torch.float32).dtype == torch.float32


def test_dropped_pairs_are_not_computed():
    """Not even when their expert would overflow."""
    given, index, kept = made(9, 2, 2)
    index, kept = torch.tensor([[0, 1]] * 9), torch.tensor([[True, False]] * 9)
    given["w13"][1] = torch.inf
    given["gate"].fill_(1.0)
    got = run(quick.grouped, (given, index, kept), torch.bfloat16, DEVICE)
    assert all(x.isfinite().all() for x in got.values())


def test_repeatable_to_the_bit():
    case = made(3000 if CUDA else 200, 8, 3, d=64, f=32, kept=0.9)
    first = run(quick.grouped, case, torch.bfloat16, DEVICE)
    for _ in range(5):
        again = run(quick.grouped, case, torch.bfloat16, DEVICE)
        assert all(torch.equal(again[name], x) for name, x in first.items())


def test_a_token_alone_is_the_token_among_others():
    """Rows of other tokens, before, behind and beside it, leave no trace."""
    given, index, kept = made(20, 4, 2)
    weights = {name: x.float().to(DEVICE).bfloat16() for name, x in given.items() if name not in ("x", "gate")}
    x, gate = given["x"].bfloat16().to(DEVICE), given["gate"].float().to(DEVICE)
    index, kept = index.to(DEVICE), kept.to(DEVICE)
    y = quick.grouped(x, Routing(index, gate, kept), **weights)
    for i in range(20):
        own = slice(i, i + 1)
        alone = quick.grouped(x[own], Routing(index[own], gate[own], kept[own]), **weights)
        torch.testing.assert_close(alone, y[own], rtol=2**-7, atol=2**-7)


# --------------------------------------------------------------------------------------- the kernels around products

SOME = st.sampled_from((-torch.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3e38, torch.inf, torch.nan, -torch.nan))


@given(e=st.sampled_from((1, 2, 3, 8, 31, 64)), rows=st.integers(0, 3), data=st.data())
@settings(max_examples=15)
def test_the_largest_are_the_reference_s(e, rows, data):
    """Equal ones in the order of their columns, the two zeros and all that are no numbers too. (Not for torch's sort on
    a GPU, which goes by bits: to it what is no number is the least if its sign is minus.)"""
    values = data.draw(st.lists(SOME, min_size=rows * e, max_size=rows * e))
    values = torch.tensor(values, dtype=torch.float32).view(rows, e)
    k = data.draw(st.integers(0, e))
    wanted = routers.top(values, k)
    with mock.patch.object(routers, "top", None):
        assert torch.equal(fast.ops.top(values.to(DEVICE), k).cpu(), wanted)


def test_the_largest_of_many(monkeypatch):
    values = draw(300, 64).float().round().to(DEVICE)
    names = launched(monkeypatch)
    assert torch.equal(fast.ops.top(values, 8), routers.top(values, 8)) and names == ["top_rows"]
    for other in (values.double(), torch.zeros(1, 1025, device=DEVICE)):
        assert torch.equal(fast.ops.top(other, 3), routers.top(other, 3)) and len(names) == 1


@given(
    n=st.integers(0, 40),
    e=st.sampled_from((1, 2, 7, 8)),
    tile=st.sampled_from(((16, (64, 4)), (sorting.TILE, sorting.AT_ONCE))),
    kept=st.sampled_from((1.0, 0.6, 0.0)),
    alike=st.booleans(),
    seed=st.integers(0, 99),
)
@example(n=90, e=70, tile=(128, (128, 4)), kept=0.6, alike=True, seed=0)  # several tiles, of several parts each
@settings(max_examples=15)
def test_pairs_are_sorted_as_by_the_reference(n, e, tile, kept, alike, seed):
    _, index, stays = made(n, e, min(e, 3), kept=kept, alike=alike, seed=seed)
    index, stays = index.to(DEVICE), stays.to(DEVICE)
    wanted = moe.by_expert(index, stays, e)
    with mock.patch.object(moe, "by_expert", None), mock.patch.multiple(sorting, TILE=tile[0], AT_ONCE=tile[1]):
        for got, right in zip(fast.ops.by_expert(index, stays, e), wanted, strict=True):
            assert torch.equal(got, right) and got.dtype == right.dtype


NARROW = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA


def places_of(n, k, kept, spare, seed):
    """Each pair's row, in any order, among rows of which `spare` are nobody's; and how many rows there are."""
    rng = torch.Generator().manual_seed(seed)
    stays = torch.rand(n, k, generator=rng) < kept
    size = int(stays.sum()) + spare
    place = torch.randint(size, size + 9, (n, k), generator=rng)
    place[stays] = torch.randperm(size, generator=rng)[: size - spare]
    return place, size


def moved(way, module, inputs, place, size, gated, dtype, device):
    """What stands in the rows of pairs, or of tokens, and all gradients; rows that are nobody's hold NaN."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, gate, D = (y.to(wide if i == 1 else dtype).to(device) for i, y in enumerate(inputs))
    place, own = place.to(device), torch.zeros(size, dtype=torch.bool, device=device)
    own[place[place < size]] = True
    if way == "taken":
        D[~own] = torch.nan
    else:
        x[~own] = torch.nan
    leaves = [x.requires_grad_(), *([gate.requires_grad_()] if gated else [])]
    more = {"rows": size} if way == "taken" else {}
    y = getattr(module, way)(x, place, **more, gate=gate if gated else None)
    dx, *dgate = torch.autograd.grad(y, leaves, D)
    y, dx = (y.detach()[own], dx) if way == "taken" else (y.detach(), dx[own])
    return [z.cpu() for z in (y, dx, *dgate)]


@pytest.mark.parametrize("way", ["taken", "combined"])
@pytest.mark.parametrize("dtype", NARROW)
@given(
    n=st.integers(0, 9),
    k=st.sampled_from((1, 2, 3, 5, 8)),
    d=st.integers(1, 70),
    kept=st.sampled_from((1.0, 0.6, 0.0)),
    spare=st.sampled_from((0, 1, 11)),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=15)
def test_kernels_that_dispatch_and_combine(way, dtype, n, k, d, kept, spare, gated, seed):
    """Any number of tokens, pairs and channels; tokens without a row and rows that are nobody's, which hold NaN."""
    place, size = places_of(n, k, kept, spare, seed)
    there, here = (n, size) if way == "taken" else (size, n)
    inputs = [draw(there, d, seed=seed), draw(n, k, seed=seed + 1), draw(here, d, seed=seed + 2)]
    inputs = [y.to(dtype if i != 1 else torch.float32).double() for i, y in enumerate(inputs)]
    exact = moved(way, moe, inputs, place, size, gated, torch.float64, "cpu")
    plain = moved(way, moe, inputs, place, size, gated, dtype, "cpu")
    with mock.patch.object(moe, way, None):  # the kernels, and nothing else
        got = moved(way, quick, inputs, place, size, gated, dtype, DEVICE)
    for name, a, b, c in zip(("y", "dx", "dgate"), got, plain, exact, strict=False):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        if a.numel():
            judged = (a.to(dtype), b) if name == "dgate" else (a, b)
            assert_within_budget(*judged, c, f"{way} {name}")


@pytest.mark.parametrize("dtype", NARROW)
def test_kernels_round_once(dtype):
    """To the dtype that is asked for, from sums and products in float32."""
    (n, k, d), size = (7, 3, 20), 21
    place = torch.randperm(size, generator=torch.Generator().manual_seed(0)).view(n, k).to(DEVICE)
    x, rows = (draw(m, d, seed=m).to(DEVICE, dtype) for m in (n, size))
    gate = draw(n, k).to(DEVICE, torch.float32)
    taken = quick.taken(x.float(), place, size, gate, dtype)
    assert taken.dtype == dtype
    assert torch.equal(taken[place.flatten()], (gate[..., None] * x[:, None].float()).to(dtype).flatten(0, 1))
    wide = quick.combined(rows, place, gate, torch.float32)
    assert wide.dtype == torch.float32 and torch.equal(quick.combined(rows, place, gate), wide.to(dtype))
    exact = moe.combined(rows.double().cpu(), place.cpu(), gate.double().cpu())
    torch.testing.assert_close(wide.cpu().double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("way", ["taken", "combined"])
def test_kernels_that_do_not_compute_a_pair_know_no_infinity_of_it(way):
    place, tokens, gate, rows = torch.tensor([[0, 9], [1, 2]]), draw(2, 5), draw(2, 2, seed=1), draw(3, 5, seed=2)
    tokens[0] = torch.inf
    inputs = (tokens, gate, rows) if way == "taken" else (rows, gate, tokens)
    *_, dgate = moved(way, quick, inputs, place, 3, True, torch.float32, DEVICE)
    assert dgate[0, 1] == 0
    torch.testing.assert_close(dgate[1], (rows[1:] @ tokens[1]).float())


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("dtype", NARROW)
@given(
    p=st.sampled_from((0, 1, 20)),
    f=st.sampled_from((1, 7, 130, 300)),
    scale=st.sampled_from((1.0, 30.0)),
    seed=st.integers(0, 9),
)
@settings(max_examples=10)
def test_swiglu_s_kernels(dtype, p, f, scale, seed):
    h, da = scale * draw(p, 2 * f, seed=seed).to(dtype), draw(p, f, seed=seed + 1).to(dtype)

    def run(function, dtype, device):
        own = h.to(dtype).to(device).requires_grad_()
        a = function(own)
        return [y.cpu() for y in (a.detach(), *torch.autograd.grad(a, own, da.to(dtype).to(device)))]

    exact, plain = run(moe.swiglu, torch.float64, "cpu"), run(moe.swiglu, dtype, "cpu")
    with mock.patch.object(moe, "swiglu", None):
        got = run(quick.swiglu, dtype, DEVICE)
    for a, b, c in zip(got, plain, exact, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if a.numel():
            assert_within_budget(a, b, c)


def launched(monkeypatch):
    names, own = [], kernels.launch

    def launch(kernel, *args, **meta):
        names.append(kernel.__name__)
        own(kernel, *args, **meta)

    for family in (kernels, sorting):
        monkeypatch.setattr(family, "launch", launch)
    return names


@pytest.mark.parametrize("gate_at", ["output", "input"])
def test_which_kernels_a_layer_launches(gate_at, monkeypatch):
    """Two that sort, one for each way of the tokens and of swiglu, and for each gradient of weights, and nothing of the
    reference's around products."""
    names = launched(monkeypatch)
    for function in ("taken", "combined", "by_expert"):
        monkeypatch.setattr(moe, function, None)
    case = made(9, 4, 2, biases=False, kept=0.7)
    run(quick.grouped, case, torch.bfloat16 if CUDA else torch.float32, DEVICE, gate_at=gate_at)
    forth, back = ["spread", "swiglu_forward", "gathered"], ["spread", "swiglu_backward"]
    assert names == ["counts", "starts", "ranks", *forth, *back, "visited_alone", "visited_alone", "gathered"]


@gpu
def test_kernels_allocate_what_they_return():
    """No copy of the tokens for each of their pairs: 64 MB of rows, 8 MB of tokens."""
    (n, k, d), slack = (4096, 8, 1024), 2**23
    x = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gate = torch.rand(n, k, device="cuda", requires_grad=True)
    place = torch.randperm(n * k, device="cuda").view(n, k)

    def more(function):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return function(), torch.cuda.max_memory_allocated() - before

    rows, bytes_there = more(lambda: quick.taken(x, place, n * k))
    y, bytes_back = more(lambda: quick.combined(rows, place, gate))
    _, bytes_backward = more(lambda: torch.autograd.grad(y, (x, gate), torch.empty_like(y)))
    assert bytes_there <= rows.nbytes + slack and bytes_back <= y.nbytes + slack
    assert bytes_backward <= rows.nbytes + 2 * y.nbytes + slack


# -------------------------------------------------------------------------------------------------- where it applies


def called(monkeypatch):
    names = []
    for place, name in ((quick, "grouped"), (moe, "experts")):
        own = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, own=own, name=name, **m: (names.append(name), own(*a, **m))[1])
    return names


def test_on_a_cpu_the_loop_is_shared(monkeypatch):
    """To the bit, in every dtype: the grouped product is for GPUs."""
    names = called(monkeypatch)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        case = made(9, 4, 2, kept=0.8)
        got, want = (run(f, case, dtype, "cpu") for f in (quick.experts, ops.experts))
        assert all(torch.equal(got[name], x) for name, x in want.items())
    assert "grouped" not in names and fast.ops.experts is quick.experts and "experts" not in fast.ops.kept


@pytest.mark.parametrize("room", [None, 20])
def test_all_that_is_asked_is_handed_on(room, monkeypatch):
    monkeypatch.setattr(quick, "has_grouped", lambda *_: True)
    names = called(monkeypatch)
    case = made(9, 4, 2, kind="relu_squared", kept=0.7)
    how = {"inner": moe.relu_squared, "gate_at": "input", "drop": Drop(0.3, 1, torch.arange(9)), "room": room}
    got, want = (run(f, case, torch.float32, "cpu", **how) for f in (quick.experts, ops.experts))
    assert names[0] == ("grouped" if room is None else "experts")
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-6)


@gpu
@pytest.mark.parametrize(
    "dtype, autocast, sizes, room, grouped",
    [
        (torch.bfloat16, False, (8, 16), None, True),
        (torch.float32, True, (8, 16), None, True),
        (torch.float32, False, (8, 16), None, False),
        (torch.float16, False, (8, 16), None, False),
        (torch.float64, True, (8, 16), None, False),
        (torch.bfloat16, False, (12, 16), None, False),
        (torch.bfloat16, False, (8, 12), None, False),
        (torch.bfloat16, False, (8, 16), 40, False),
    ],
)
def test_grouped_where_the_docstring_says(dtype, autocast, sizes, room, grouped, monkeypatch):
    names = called(monkeypatch)
    run(quick.experts, made(9, 4, 2, *sizes), dtype, "cuda", autocast, room=room)
    assert names == ["grouped" if grouped else "experts"]


@gpu
@pytest.mark.parametrize("way", WAYS)
def test_a_larger_layer(way):
    compare(way, made(1500, 64, 8, d=128, f=64, kept=0.9), quick.experts)
    compare(way, made(700, 16, 2, d=256, f=128, alike=True), quick.experts)


# ------------------------------------------------------------------------------------------------------ no question

QUESTIONS = (DataDependentOutputException, DynamicOutputShapeException)


def layer_of(router, dtype, device, backend):
    row = ROUTER[router]
    limits = {"groups": 2, "groups_kept": 1} if row.group_best else {}
    extra = {"vocabulary": 7} if "table" in row.weights else {}
    config = Experts(16, 8, row.top_k or 2, 16, router, biases=True, shared=8, dropout=0.1, **limits, **extra)
    layer = MoE(config, backend)
    initialize(layer, 0, starts(layer))
    layer.begin(0)
    return layer.to(device, dtype)


def forward_and_back(layer, x, documents):
    b, t, _ = x.shape
    index = torch.arange(b * t, device=x.device).view(b, t)
    side = SimpleNamespace(documents=documents, key=5, index=index, tokens=index % 7)
    y, load = layer(x, side)
    loss = (y.float() ** 2).sum() + load.sequence + load.z + load.chance.sum()
    loss.backward()
    return y


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("router", ROUTER)
def test_a_training_layer_asks_nothing(router, packed, monkeypatch):
    """Of tensors without numbers nothing can be asked: sizes, largest numbers, which are true. (Where some are.)"""
    monkeypatch.setattr(quick, "has_grouped", lambda *_: True)
    monkeypatch.setattr(quick, "has_kernels", lambda *_: True)
    torch.use_deterministic_algorithms(False)
    layer = layer_of(router, torch.bfloat16, "cpu", fast.ops)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = torch.empty(2, 12, 16, dtype=torch.bfloat16, requires_grad=True)
        documents = torch.empty(2, 12, dtype=torch.int64) if packed else None
        faked = {name: mode.from_tensor(p) for name, p in (*layer.named_parameters(), *layer.named_buffers())}
    wrapped = Wrapped(layer)

    def go():
        with mode:
            torch.func.functional_call(wrapped, {f"layer.{name}": x for name, x in faked.items()}, (x, documents))

    if router in ASKING:
        with pytest.raises(QUESTIONS):
            go()
    else:
        go()


class Wrapped(torch.nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, documents):
        return forward_and_back(self.layer, x, documents)


@gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("router", [name for name in ROUTER if name not in ASKING])
def test_the_host_does_not_wait(router, packed):
    """Forward and backward of a layer in training, told by torch itself."""
    torch.use_deterministic_algorithms(False)
    layer = layer_of(router, torch.bfloat16, "cuda", fast.ops)
    x = draw(2, 12, 16).to("cuda", torch.bfloat16).requires_grad_()
    documents = torch.arange(12, device="cuda").expand(2, 12) // 5 if packed else None
    forward_and_back(layer, x, documents)  # compilers and libraries start
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_back(layer, x, documents)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_compiler_sees_one_graph():
    torch.use_deterministic_algorithms(False)
    given, index, kept = made(9, 4, 2, kept=0.7)
    given = {name: x.to(DEVICE, torch.float32 if name == "gate" else torch.bfloat16) for name, x in given.items()}
    given = {name: x.requires_grad_() for name, x in given.items()}
    index, kept = index.to(DEVICE), kept.to(DEVICE)

    def f(x, gate, **weights):
        return quick.grouped(x, Routing(index, gate, kept), **weights).float().sin()

    compiled_alike(f, given)


@pytest.mark.parametrize("gate_at", ["output", "input"])
def test_a_compiler_sees_kernels_as_operators(gate_at):
    torch.use_deterministic_algorithms(False)
    place = torch.tensor([[0, 3, 9], [2, 1, 4]], device=DEVICE)
    given = {"x": draw(2, 12), "gate": draw(2, 3, seed=1)}
    given = {name: x.float().to(DEVICE).requires_grad_() for name, x in given.items()}

    def f(x, gate):
        first, second = (None, gate) if gate_at == "output" else (gate, None)
        return quick.combined(quick.swiglu(quick.taken(x, place, 5, first)), place, second).sin()

    compiled_alike(f, given)


# --------------------------------------------------------------------------------------------------------- memory


def kept_bytes(function, case, autocast):
    """Bytes of all that is kept for a gradient, besides the inputs: each storage once."""
    given, index, kept = case
    dtype = torch.float32 if autocast else torch.bfloat16
    given = {n: x.to(torch.float32 if n == "gate" else dtype).requires_grad_() for n, x in given.items()}
    weights = {name: x for name, x in given.items() if name not in ("x", "gate")}
    inputs = {x.untyped_storage().data_ptr() for x in (*given.values(), index, kept)}
    found = {}

    def keep(x):
        storage = x.untyped_storage()
        if x.is_floating_point() and storage.data_ptr() not in inputs:
            found[storage.data_ptr()] = storage  # alive, so that nobody else gets its place
        return x

    seen = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with seen, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = function(given["x"], Routing(index, given["gate"], kept), **weights)
    del y
    return sum(storage.nbytes() for storage in found.values())


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_more_is_kept_than_by_the_loop(autocast, biases):
    """But for eight ones a row, and eight columns a bias."""
    n, e, k, d, f = 400, 8, 3, 32, 48
    case = made(n, e, k, d=d, f=f, biases=biases)
    ones = 2 * 2 * 8 * n * k + 8 * 2 * e * (2 * f + d) if biases else 0
    ours, theirs = (kept_bytes(f, case, autocast) for f in (quick.grouped, moe.experts))
    assert ours <= theirs + ones


# -------------------------------------------------------------------------------------------------- over ranks, cut


def by_products(x, routing, *weights, room=None, **how):
    return quick.grouped(x, routing, *weights, **how)


def over_ranks():
    """How far grouped experts are from the loop, each way of sharing them: outputs and all gradients."""
    group = comm.world()
    ranks, me = comm.size(group), comm.rank(group)
    place = mesh.make(mesh.Degrees(expert=ranks), torch.device("cpu")).experts["expert"]
    given, index, kept = made(7 * ranks, 4, 2, kept=0.8)
    given = {name: w.float() for name, w in given.items()}
    own, mine = slice(7 * me, 7 * (me + 1)), slice(4 // ranks * me, 4 // ranks * (me + 1))

    def results(function, way):
        leaves = dict(given)
        backend, part = ops._replace(experts=function), slice(None)
        if way == "tensor":
            backend = tensor.sharing(backend, tensor.team_of(group))
        else:
            backend, part = shared.over(backend, group, way), own
            placed = {name: DTensor.from_local(w[mine], place, [Shard(0)]) for name, w in given.items()}
            leaves = placed | {name: given[name][part] for name in ("x", "gate")}
        x, gate, *weights = (w.detach().clone().requires_grad_() for w in leaves.values())
        y = backend.experts(x, Routing(index[part], gate, kept[part]), *weights, gate_at="input")
        y.square().sum().backward()
        return [y.detach(), *(shard.local(w.grad) for w in (x, gate, *weights))]

    ways = (*shared.DISPATCH, "tensor")
    pairs = {way: zip(results(by_products, way), results(ops.experts, way), strict=True) for way in ways}
    return {way: max((a - b).abs().max().item() for a, b in both) for way, both in pairs.items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks are forks, which a process that used a GPU cannot have")
def test_shared_out_over_ranks_and_cut_in_channels():
    for said in testing.run(2, over_ranks):
        assert set(said) == {"pair", "rank", "tensor"} and max(said.values()) < 1e-4, said
