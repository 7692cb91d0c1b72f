"""The layers around the rows: against independent implementations with the same weights, and the laws of them all.

The oracles (`tests/oracles`) are functions of our layer's weights, so that every weight's gradient is compared too.
"""

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracles import ORACLES
from oracles.common import Heads, draw, rms, silu
from oracles.linear_attention import elu_features
from reference import mixers, ops
from reference.attention import Past
from reference.lsm import LSM
from reference.mixers.softmax import Softmax
from reference.model import Side, state_bytes
from reference.presets import Model

MIXERS = [*LSM, "softmax"]
every = pytest.mark.parametrize("name", MIXERS)


class Layer(torch.nn.Module):
    """A mixer and what its kind shares, with random weights: called with tokens, states and where they stand.

    The values that an earlier layer would hand to it are here a matrix times its own tokens.
    """

    def __init__(self, name, number=1, layers=3, seed=0, dtype=torch.float64, ops=ops, **sizes):
        super().__init__()
        sizes = {"width": 12, "heads": 2, "key_size": 4, "value_size": 6, "key_heads": 1} | sizes
        config = Model(lsm="gla" if name == "softmax" else name, **sizes)
        if name == "softmax":
            self.inner, common = Softmax(config, ops), {}
        else:
            self.inner, common = mixers.build(config, number, layers, ops), mixers.kind(name).common(config, layers)
        self.common = torch.nn.ParameterDict(common)
        if getattr(self.inner, "needs_values", False):
            self.values = torch.nn.Parameter(torch.empty(self.inner.values, sizes["width"]))
        rng = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.7
            weight.data = (torch.randn(weight.shape, generator=rng, dtype=torch.float64) * scale).to(dtype)

    def forward(self, x, state=None, at=None, cu_seqlens=None):
        """`at` says how many tokens each sequence (or document) had before; the outputs and the new state."""
        if cu_seqlens is None:
            places = torch.arange(x.shape[1]).expand(x.shape[:2])
            places = places if at is None else places + at[:, None]
        else:
            lengths = cu_seqlens.diff().tolist()
            starts = [0] * len(lengths) if at is None else at.tolist()
            places = torch.cat([torch.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])[None]
        values = x @ self.values.T if hasattr(self, "values") else None
        side = Side(places, cu_seqlens, common=dict(self.common.items()), values=values)
        return self.inner(x, side, state)[:2]


@pytest.fixture(autouse=True)
def no_kernels_behind_the_oracle(monkeypatch):
    """transformers' layers take these packages' kernels if they can be imported: then they would not be independent."""
    for package in ("fla", "mamba_ssm", "causal_conv1d"):
        assert sys.modules.get(package) is None, f"{package} was loaded before the oracle"
        monkeypatch.setitem(sys.modules, package, None)


def test_every_mixer_has_an_oracle():
    assert {oracle.lsm for oracle in ORACLES.values()} == set(MIXERS)


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_layers_equal_their_oracles(oracle):
    layer = Layer(oracle.lsm, dtype=oracle.dtype, **oracle.layer)
    run = oracle.make()
    x = draw(2, oracle.t, oracle.layer["width"], seed=1, dtype=oracle.dtype)
    weights = dict(layer.named_parameters())
    names = {n: n.removeprefix("inner.") for n in weights}
    got = layer(x.requires_grad_())[0]
    wanted = run({names[n]: w for n, w in weights.items()}, x)
    assert got.shape == wanted.shape
    near(got, wanted, oracle.tolerance, "output")

    push = draw(*got.shape, seed=2, dtype=oracle.dtype)
    leaves = [x, *weights.values()]
    pairs = [torch.autograd.grad((y * push).sum(), leaves, materialize_grads=True) for y in (got, wanted)]
    for name, mine, theirs in zip(["x", *weights], *pairs, strict=True):
        unbound = name == "common.lower_bounds" and oracle.layer["number"] == 0  # as HGRN2's first layer is
        assert (theirs == 0).all() if unbound else (theirs != 0).all(), f"{name} does not move the oracle"
        near(mine, theirs, 4 * oracle.tolerance, name)


def near(got, wanted, tolerance, what):
    error, size = (got - wanted).abs().max().item(), wanted.abs().max().item()
    assert error <= tolerance * size, f"{what}: {error:.1e} of {size:.1e}"


# ---------------------------------------------------------------------------------------- the laws of them all


close = {"rtol": 1e-8, "atol": 1e-9}


def same_state(got, wanted):
    assert type(got) is type(wanted)
    if isinstance(got, Past):  # behind a sequence's length there is padding
        assert torch.equal(got.length, wanted.length)
        for i, n in enumerate(got.length.tolist()):
            torch.testing.assert_close(got.k[i, :n], wanted.k[i, :n], **close)
            torch.testing.assert_close(got.v[i, :n], wanted.v[i, :n], **close)
        return
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **close)


@every
@given(lengths=st.lists(st.sampled_from([0, 1, 1, 1, 2, 3, 7]), min_size=2, max_size=7), seed=st.integers(0, 99))
@settings(max_examples=10)
@torch.no_grad()
def test_pieces_equal_the_whole(name, lengths, seed):
    """Prefill in pieces, single tokens (which take the step) and prefill after them."""
    layer, x = Layer(name, seed=seed), draw(2, sum(lengths) + 1, 12, seed=seed)
    whole, last = layer(x)
    state, o, at = None, [], torch.zeros(2, dtype=torch.int64)
    for piece in x.split([*lengths, 1], 1):
        y, state = layer(piece, state, at)
        o.append(y)
        at = at + piece.shape[1]
    torch.testing.assert_close(torch.cat(o, 1), whole, **close)
    same_state(state, last)


@every
def test_gradients_flow_through_the_state(name):
    layer, x = Layer(name), draw(2, 9, 12).requires_grad_()
    leaves = [x, *layer.inner.parameters()]
    push = draw(2, 9, 12, seed=3)
    whole = torch.autograd.grad((layer(x)[0] * push).sum(), leaves)
    head, state = layer(x[:, :5])
    tail = layer(x[:, 5:], state, torch.tensor([5, 5]))[0]
    for a, b in zip(torch.autograd.grad((torch.cat([head, tail], 1) * push).sum(), leaves), whole, strict=True):
        torch.testing.assert_close(a, b, **close)


LENGTH = st.sampled_from([0, 1, 2, 3, 5, 9])


@every
@given(lengths=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=4), seed=st.integers(0, 99))
@example(lengths=[(2, 0), (3, 1)], seed=0)  # one new token for several documents
@settings(max_examples=10)
@torch.no_grad()
def test_packed_documents_equal_each_alone(name, lengths, seed):
    """Twice: from nothing, then each document from its own state. Empty documents keep theirs."""
    n = len(lengths)
    layer, state, at, alone = Layer(name, seed=seed), None, torch.zeros(n, dtype=torch.int64), [None] * n
    for turn, now in enumerate(zip(*lengths, strict=True)):
        cu_seqlens = torch.tensor([0, *now], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        x = draw(1, sum(now), 12, seed=seed + turn)
        y, state = layer(x, state, at, cu_seqlens)
        for i, (start, stop) in enumerate(pairwise(cu_seqlens)):
            own, alone[i] = layer(x[:, start:stop], alone[i], at[i : i + 1])
            torch.testing.assert_close(y[:, start:stop], own, **close)
            same_state(type(state)(*(part[i : i + 1] for part in state)), alone[i])
        at = at + cu_seqlens.diff()


@every
def test_no_token_sees_a_later_one_or_another_row(name):
    layer, x = Layer(name), draw(3, 11, 12).requires_grad_()
    gradient = torch.autograd.grad(layer(x)[0][1, 6].sum(), x)[0].abs().amax(-1)
    assert gradient[0].max() == gradient[2].max() == gradient[1, 7:].max() == 0
    assert gradient[1, :7].min() > 0


@every
def test_no_packed_token_sees_another_document(name):
    layer, x = Layer(name), draw(1, 12, 12).requires_grad_()
    cu_seqlens = torch.tensor([0, 4, 4, 9, 12], dtype=torch.int32)
    gradient = torch.autograd.grad(layer(x, cu_seqlens=cu_seqlens)[0][0, 7].sum(), x)[0][0].abs().amax(-1)
    assert gradient[:4].max() == gradient[8:].max() == 0
    assert gradient[4:8].min() > 0


@every
@torch.no_grad()
def test_only_softmax_attention_keeps_the_text(name):
    layer = Layer(name)
    few, many = (state_bytes(layer(draw(2, t, 12))[1]) for t in (3, 40))
    assert few > 0
    assert many > few if name == "softmax" else many == few


@every
def test_every_parameter_gets_a_gradient(name):
    layer = Layer(name)
    layer(draw(2, 9, 12))[0].square().sum().backward()
    for n, weight in layer.named_parameters():
        assert weight.grad is not None and (weight.grad != 0).double().mean() > 0.9, n


@every
def test_half_precision_layers_keep_a_wide_memory(name):
    half, exact = Layer(name, dtype=torch.bfloat16), Layer(name, dtype=torch.bfloat16).double()
    x = draw(2, 20, 12, dtype=torch.bfloat16)
    y, state = half(x)
    assert y.dtype == torch.bfloat16
    assert name == "softmax" or state.memory.dtype == torch.float32
    wanted = exact(x.double())[0]
    assert (y - wanted).norm() < 0.03 * wanted.norm()


SHARE = [name for name in LSM if "value_heads" in mixers.kind(name).takes]


@pytest.mark.parametrize("name", SHARE)
@given(heads=st.integers(1, 3), share=st.integers(1, 3), cut=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=5)
@torch.no_grad()
def test_heads_that_share_keys_equal_heads_with_the_same_keys(name, heads, share, cut, seed):
    """Value head j has key head j // share: in a prefill, and in a step after it."""
    sizes = {"seed": seed, "width": 12 * heads}
    layer, alone = (
        Layer(name, heads=heads, value_heads=heads * share, **sizes),
        Layer(name, heads=heads * share, **sizes),
    )
    owner, steps = torch.arange(heads * share) // share, layer.inner.steps

    def own(weight, steps=1):
        """The rows of every value head's key head, for each step."""
        return weight.unflatten(0, (steps, heads, -1))[:, owner].flatten(0, 2)

    given = dict(layer.inner.named_parameters())
    q, k, v = given["conv"].split(layer.inner.parts)
    given |= {"q.weight": own(given["q.weight"]), "k.weight": own(given["k.weight"], steps)}
    given |= {"conv": torch.cat([own(q), own(k, steps), v])}
    given |= {n: given[n][owner] for n in ("c", "D") if n in given}
    alone.inner.load_state_dict(given)
    x = draw(2, cut + 1, 12 * heads, seed=seed)
    whole = alone(x)[0]
    torch.testing.assert_close(layer(x)[0], whole, **close)
    head, state = layer(x[:, :cut])
    torch.testing.assert_close(torch.cat([head, layer(x[:, cut:], state)[0]], 1), whole, **close)


WANTED = {"value_heads": 4, "gate_floor": -5.0}


@pytest.mark.parametrize("field", WANTED)
@pytest.mark.parametrize("name", LSM)
def test_a_field_that_the_layer_does_not_have_is_refused_in_one_line(name, field):
    if field in mixers.kind(name).takes:
        Layer(name, **{field: WANTED[field]})
        return
    with pytest.raises(ValueError, match=f"{LSM[name].title} has no {field}: it is .*, expected None") as caught:
        Layer(name, **{field: WANTED[field]})
    assert "\n" not in str(caught.value)


@given(floor=st.floats(-20, -0.01), seed=st.integers(0, 99))
def test_a_floor_keeps_the_log_decay_above_it(floor, seed):
    """Whatever the tokens; and at the floor's own depth where a gate without one would be far below."""
    layer = Layer("kda", seed=seed, gate_floor=floor)
    g = layer.inner.decay(100 * draw(2, 9, 12, seed=seed))["g"]
    assert (floor <= g).all() and (g <= 0).all() and g.min() < 0.9 * floor and g.max() > 0.1 * floor


@pytest.mark.parametrize("peak", [0, 1, 2])
@pytest.mark.parametrize("number", [1, 2])
def test_bounds_of_hgrn2_may_be_as_uneven_as_they_like(number, peak):
    """A bound that is 0 or 1 up to rounding still has a finite gradient, and so has all below it."""
    layer = Layer("hgrn2", number=number)
    with torch.no_grad():
        layer.common["lower_bounds"].zero_()[peak] = 60.0
    y = layer(draw(2, 9, 12))[0]
    y.square().sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(weight.grad).all() for weight in layer.parameters())


def test_only_positive_features_can_be_normalized():
    for features in ("elu", "relu"):
        Layer("linear_attention_normalized", feature_map=features)
    for features in ("silu", "identity"):
        with pytest.raises(ValueError, match=f"{features}.*use elu or relu") as caught:
            Layer("linear_attention_normalized", feature_map=features)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("features", ["elu", "relu", "silu", "identity"])
@pytest.mark.parametrize("gate", [True, False])
def test_linear_attention_takes_its_features_and_gate_from_the_configuration(features, gate):
    """Without a gate, and with each map: one token from nothing is φ(q)·φ(k) v, whose norm is v's."""
    layer, x = Layer("linear_attention", feature_map=features, gate=gate), draw(1, 1, 12)
    w = dict(layer.inner.named_parameters())
    phi = {
        "elu": elu_features,
        "relu": lambda y: y.clamp(min=0),
        "silu": silu,
        "identity": lambda y: y,
    }[features]
    heads = []
    for h in range(2):
        of = Heads(w, x[0, 0], 2)
        o = (phi(of("q", h)) / 2 @ phi(of("k", h))) * of("v", h)
        heads.append(rms(o, w["norm"]) * (silu(of("gate", h)) if gate else 1))
    torch.testing.assert_close(layer(x)[0][0, 0], w["o.weight"] @ torch.cat(heads), **close)
