"""The layers around the rows: against independent implementations with the same weights, and the laws of them all.

The oracles (`tests/oracles`) are functions of our layer's weights, so that every weight's gradient is compared too.
"""

import re
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from inputs import small, unpadded
from oracles import ORACLES
from oracles.common import Heads, draw, rms, silu
from oracles.linear_attention import FEATURES
from reference import mixers, ops
from reference.lsm import LSM
from reference.mixers.linear_attention import FEATURE_MAP, POSITIVE, dpfp, feature_map
from reference.mixers.parts import Mixer
from reference.mixers.softmax import ATTENTION, Latents
from reference.model import Side, state_bytes
from reference.presets import Model

SOFTMAX = {
    "softmax": {},
    "window": {"window": 4},
    "partial": {"rope_share": 0.5, "head_size": 8, "qk_norm": True, "attention_gate": True},
    "nope": {"rope_share": 0.0},
    "bias": {"qkv_bias": True},
    "mixture": {"attention": "mixture", "mixer_experts": 4},
    "latent": {"attention": "latent", "latent_value_size": 5},
    "latent, window": {"attention": "latent", "query_rank": 7, "window": 5},
}
SEVERAL = {"projections": {"lsm": "mamba", "projection_experts": ("input", "output"), "mixer_experts": 3}}
SEVERAL |= {"a projection": {"lsm": "mamba", "projection_experts": ("gate",), "mixer_experts": 3}}
VARIANTS = {  # layers that a field of the configuration makes
    "elementwise product": {"lsm": "linear_attention", "feature_map": "elementwise_product"},
    "hedgehog": {"lsm": "linear_attention", "feature_map": "hedgehog"},
    "t2r": {"lsm": "linear_attention_normalized", "feature_map": "t2r"},
    # many features are 0: with few channels some tokens have nothing in common
    "dpfp": {"lsm": "linear_attention_normalized", "feature_map": "dpfp", "key_size": 8},
}
MIXERS = {name: {"lsm": name} for name in LSM} | SOFTMAX | SEVERAL | VARIANTS
every = pytest.mark.parametrize("name", MIXERS)


class Layer(torch.nn.Module):
    """A mixer and what its kind shares, with random weights: called with tokens, states and where they stand.

    The values that an earlier layer would hand to it are here a matrix times its own tokens.
    """

    def __init__(self, name, number=1, layers=3, seed=0, dtype=torch.float64, ops=ops, **given):
        super().__init__()
        kind = MIXERS[name]
        config = Model(**small(kind.get("lsm", "gla")) | kind | given)
        if name in SOFTMAX:
            self.inner, common = ATTENTION[config.attention](config, ops), {}
        else:
            self.inner, common = (
                mixers.build(config, number, layers, ops),
                mixers.kind(config.lsm).common(config, layers),
            )
        self.common = torch.nn.ParameterDict(common)
        if getattr(self.inner, "needs_values", False):
            self.values = torch.nn.Parameter(torch.empty(self.inner.values, config.width))
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
    assert {oracle.mixer for oracle in ORACLES.values()} == set(MIXERS) - set(VARIANTS)


@pytest.mark.parametrize("oracle", ORACLES.values(), ids=ORACLES)
def test_layers_equal_their_oracles(oracle):
    layer = Layer(oracle.mixer, dtype=oracle.dtype, **oracle.layer)
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
    for a, b in zip(unpadded(got), unpadded(wanted), strict=True):
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
    first = max(7 - MIXERS[name].get("window", 7), 0)
    assert gradient[1, first:7].min() > 0 and not gradient[1, :first].any()


@every
def test_no_packed_token_sees_another_document(name):
    layer, x = Layer(name), draw(1, 12, 12).requires_grad_()
    cu_seqlens = torch.tensor([0, 4, 4, 9, 12], dtype=torch.int32)
    gradient = torch.autograd.grad(layer(x, cu_seqlens=cu_seqlens)[0][0, 7].sum(), x)[0][0].abs().amax(-1)
    assert gradient[:4].max() == gradient[8:].max() == 0
    assert gradient[4:8].min() > 0


@every
@torch.no_grad()
def test_only_softmax_attention_without_a_window_keeps_the_text(name):
    layer = Layer(name)
    few, many = (state_bytes(layer(draw(2, t, 12))[1]) for t in (5, 40))
    assert few > 0
    assert many > few if name in SOFTMAX and "window" not in MIXERS[name] else many == few


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
    assert name in SOFTMAX or state.memory.dtype == torch.float32
    wanted = exact(x.double())[0]
    assert (y - wanted).norm() < 0.03 * wanted.norm()


@every
@torch.no_grad()
def test_what_narrow_layers_see_meets_products_alone(name):
    """Under autocast they cannot tell whether it was rounded before; all others can."""
    layer, x = Layer(name, dtype=torch.float32), draw(2, 9, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        given, rounded = layer(x)[0], layer(x.bfloat16())[0]
    assert torch.equal(given, rounded) == layer.inner.narrow


# ------------------------------------------------------------------------------------------ mixtures of heads


@torch.no_grad()
def test_a_mixture_of_heads_decodes_as_jet_moe():
    """A prompt into the cache, then token by token."""
    from transformers import DynamicCache

    from oracles.attention import HEADS_OF_EXPERTS, jet_moe, mixture

    layer, oracle, cache = Layer("mixture", dtype=torch.float32, **HEADS_OF_EXPERTS), jet_moe(), DynamicCache()
    w, x = dict(layer.inner.named_parameters()), draw(2, 12, 24, dtype=torch.float32)
    state, at = None, 0
    for piece in x.split([9, 1, 1, 1], 1):
        y, state = layer(piece, state, torch.tensor([at, at]))
        near(y, mixture(oracle, w, piece, at, cache), 2e-6, f"token {at}")
        at += piece.shape[1]
    assert state.k.shape == (2, 12, 3, 6), "keys and values are those of one expert"


@given(heads=st.sampled_from([2, 4, 6]), k=st.integers(1, 3), seed=st.integers(0, 99))
@settings(max_examples=5)
@torch.no_grad()
def test_heads_of_every_expert_share_keys_with_their_neighbours(heads, k, seed):
    """Half as many heads of keys are the same as every one of them twice."""
    sizes = {"heads": heads, "head_size": 4, "mixer_top_k": k, "seed": seed}
    few, many = (Layer("mixture", **sizes, key_heads=n) for n in (heads // 2, heads))
    w = dict(few.named_parameters())
    for name in ("inner.k.weight", "inner.v.weight"):
        w[name] = w[name].unflatten(0, (heads // 2, 4)).repeat_interleave(2, 0).flatten(0, 1)
    x = draw(2, 7, 12, seed=seed)
    torch.testing.assert_close(few(x)[0], functional_call(many, w, (x,))[0], **close)


@torch.no_grad()
def test_slots_of_the_same_weights_are_one_attention():
    """Experts that are all alike: grouped attention plus the bias, whatever the router says."""
    layer, plain = Layer("mixture"), Layer("softmax")
    own, theirs = layer.inner, plain.inner
    for name in "qo":
        getattr(own, name).weight.copy_(getattr(theirs, name).weight)
    for name in "kv":
        getattr(own, name).weight.copy_(getattr(theirs, name).weight)
    x = draw(2, 7, 12)
    torch.testing.assert_close(layer(x)[0], plain(x)[0] + own.bias, **close)


@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        ("mixture", {"qkv_bias": True}, "a mixture of heads has no qkv_bias: it is True, expected False"),
        ("mixture", {"attention_gate": True}, "a mixture of heads has no attention_gate: it is True"),
        ("mixture", {"mixer_top_k": 5}, "mixer_top_k is 5; it must be at least 1 and at most the 4 mixer_experts"),
        ("mixture", {"mixer_top_k": 0}, "mixer_top_k is 0; it must be at least 1"),
        ("kda", {"projection_experts": ("gate",)}, r"has no projection_experts: it is \('gate',\), expected None"),
        ("mamba2", {"projection_experts": ()}, r"Mamba2 has no projection_experts: it is \(\), expected None"),
        ("mamba", {"projection_experts": ("state",)}, "unknown projection 'state'; .* some of input, gate, output"),
    ],
)
def test_experts_that_a_mixer_cannot_have_give_one_line(name, field, message):
    with pytest.raises(ValueError, match=message) as caught:
        Layer(name, **field)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- latent attention


@given(
    before=st.lists(st.sampled_from([0, 1, 2, 6]), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    sizes=st.tuples(*[st.integers(1, 5)] * 3),
    shared=st.sampled_from([0, 2, 4]),
    window=st.sampled_from([None, 1, 3]),
    seed=st.integers(0, 99),
)
def test_one_token_is_answered_in_the_latent_space(before, heads, sizes, shared, window, seed):
    """Without a key or value of any head, and equal to attention over all of them: outputs, caches and gradients."""
    names = ("latent_rank", "nope_size", "latent_value_size")
    how = dict(zip(names, sizes, strict=True)) | {"heads": heads, "rope_size": shared, "window": window}
    layer = Layer("latent", seed=seed, **how).inner
    b, c = len(before), sizes[0] + shared
    past, x = draw(b, max(before), c, seed=seed).requires_grad_(), draw(b, 1, 12, seed=seed + 1).requires_grad_()
    state, at = Latents(past, torch.tensor(before)), Side(torch.tensor(before)[:, None])
    asked = layer.queries(x, at), layer.latents(x, at), state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "keys_and_values", None)
        o, own = layer.absorbed(*asked)
        assert torch.equal(layer(x, at, state)[0], layer.output(o, x))
    wanted, kept = layer.expanded(*asked)
    push, leaves = draw(*o.shape, seed=seed + 2), [past, x, layer.up.weight, layer.q.weight, layer.down.weight]
    again = {"materialize_grads": True, "retain_graph": True}  # queries and latents are common to both
    pairs = [torch.autograd.grad((y * push).sum(), leaves, **again) for y in (o, wanted)]
    for got, exact in zip((o, *pairs[0]), (wanted, *pairs[1]), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(p, q) for p, q in zip(unpadded(own), unpadded(kept), strict=True))


@pytest.mark.parametrize("heads", [2, 6])
def test_latents_take_the_same_memory_whatever_the_heads(heads):
    layer = Layer("latent", heads=heads, head_size=6, latent_rank=8, rope_size=4)
    assert state_bytes(layer(draw(3, 7, 12))[1]) == 3 * 7 * (8 + 4) * 8 + 3 * 8


@torch.no_grad()
def test_attention_knows_positions_by_their_distance_or_not_at_all():
    """NoPE layers give the same whatever the positions; the others the same if all move, another if they stretch."""
    x, places = draw(2, 9, 12), torch.arange(9).expand(2, 9)
    for name, how in [*SOFTMAX.items(), ("latent", {"rope_share": 0.0}), ("latent", {"rope_size": 0})]:
        turns = how.get("rope_share") != 0 and how.get("rope_size") != 0
        layer = Layer(name, **how).inner
        y, moved, stretched = (layer(x, Side(at))[0] for at in (places, places + 1000, 3 * places))
        torch.testing.assert_close(moved, y, **close)
        assert torch.equal(stretched, y) != turns, name


# ------------------------------------------------------------------------------------------- single models
SHARE = [name for name in LSM if "value_heads" in mixers.kind(name).takes and issubclass(mixers.kind(name), Mixer)]


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
    message = f"{re.escape(LSM[name].title)} has no {field}: it is .*, expected None"
    with pytest.raises(ValueError, match=message) as caught:
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


def test_short_steps_of_s4_keep_their_digits():
    """The discrete system of steps down to 1e-7, in float32: as a difference e^{ΔA} - 1 would have none left."""
    layer = Layer("s4", dtype=torch.float32).inner
    with torch.no_grad():
        layer.dt_log.uniform_(-16, -8)
        got, wanted = layer.discrete(), layer.double().discrete()
    for name in got:
        torch.testing.assert_close(got[name].double(), wanted[name], rtol=1e-5, atol=1e-6 * wanted[name].abs().max())


def test_heads_of_mamba2_divide_into_groups():
    with pytest.raises(ValueError, match="2 heads cannot share 3 state_groups: heads must be a multiple") as caught:
        Layer("mamba2", state_groups=3)
    assert "\n" not in str(caught.value)


NARROW = {
    "gla": "a key would have 0 channels and a value 1;",
    "rwkv6": "a key would have 0 channels and a value 1;",
}


@pytest.mark.parametrize("name", NARROW)
def test_heads_without_channels_are_refused_in_one_line(name):
    message = f"width 2 is too small for 2 heads of {LSM[name].title}: {NARROW[name]} use fewer heads, or give both"
    with pytest.raises(ValueError, match=message) as caught:
        Layer(name, pattern="L", width=2, key_size=None, value_size=None)
    assert "\n" not in str(caught.value)
    Layer(name, pattern="L", width=2, key_size=1, value_size=1)


def test_pairs_of_half_a_key_turn_in_mamba3():
    message = r"half a key of 3 channels cannot rotate: Mamba3 \(SISO\)'s key_size must be at least 4"
    with pytest.raises(ValueError, match=message) as caught:
        Layer("mamba3", key_size=3)
    assert "\n" not in str(caught.value)
    assert [Layer("mamba3", key_size=n).inner.turns for n in (4, 6, 7, 8, 10)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("name", ["rwkv6", "rwkv7"])
@torch.no_grad()
def test_a_head_of_one_channel_has_no_variance_and_reads_nothing(name):
    """One token alone: the norm of every head leaves 0, its bias and, in RWKV7, the bonus behind it."""
    layer = Layer(name, value_size=1)
    layer.inner.norm_bias.zero_()
    y = layer(draw(1, 1, 12))[0]
    assert torch.isfinite(y).all() and (name == "rwkv7") == y.any()


def test_only_positive_features_can_be_normalized():
    for features in FEATURE_MAP:
        if features in POSITIVE:
            Layer("linear_attention_normalized", feature_map=features)
            continue
        with pytest.raises(ValueError, match=f"{features}.*use one of elu, relu, hedgehog, t2r, dpfp") as caught:
            Layer("linear_attention_normalized", feature_map=features)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("features", FEATURE_MAP)
@given(size=st.integers(1, 6), seed=st.integers(0, 99))
def test_features_have_their_sizes_and_signs(features, size, seed):
    """What is called positive is never negative; what is not, is soon."""
    phi, x = feature_map(features, size), draw(200, size, seed=seed, dtype=torch.float32)
    for i, weight in enumerate(phi.parameters() if isinstance(phi, torch.nn.Module) else ()):
        weight.data = draw(*weight.shape, seed=seed + 1 + i, dtype=torch.float32)
    y = phi(x)
    assert y.shape == (200, {"hedgehog": 2, "dpfp": 8}.get(features, 1) * size)
    assert (y.min() >= 0) == (features in POSITIVE)


def test_dpfp_by_hand():
    """[1, -2] is [1 0 0 2] without signs; times itself rolled by 1, 2, 3 and 4."""
    wanted = [[2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2], [1, 0, 0, 4]]
    assert dpfp(torch.tensor([1.0, -2.0])).view(4, 4).tolist() == wanted


@pytest.mark.parametrize("features", FEATURE_MAP)
@pytest.mark.parametrize("gate", [True, False])
def test_linear_attention_takes_its_features_and_gate_from_the_configuration(features, gate):
    """Without a gate, and with each map: one token from nothing is φ(q)·φ(k) v, whose norm is v's."""
    layer, x = Layer("linear_attention", feature_map=features, gate=gate), draw(1, 1, 12)
    w = dict(layer.inner.named_parameters())
    heads = []
    for h in range(2):
        of = Heads(w, x[0, 0], 2)
        q, k = (FEATURES[features](w, name, of(name, h)) for name in "qk")
        o = (q / len(q) ** 0.5 @ k) * of("v", h)
        heads.append(rms(o, w["norm"]) * (silu(of("gate", h)) if gate else 1))
    torch.testing.assert_close(layer(x)[0][0, 0], w["o.weight"] @ torch.cat(heads), **close)


UNEQUAL = "TTT-linear's inner model maps keys to values: key_size 4 and value_size 6 must be equal"


@pytest.mark.parametrize(
    ("name", "sizes", "message"),
    [
        ("ttt_linear", {"key_size": 4, "value_size": 6}, UNEQUAL),
        ("ttt_linear", {"key_size": 4, "value_size": None}, UNEQUAL),  # 6 of the width 12 to each of 2 heads
        ("ttt_linear", {"key_size": 3, "value_size": 3}, "3 channels cannot rotate: TTT-linear's key_size"),
        ("ttt", {"key_size": 5}, "5 channels cannot rotate: TTT, plain gradient's key_size"),
    ],
)
def test_heads_that_test_time_training_cannot_have_give_one_line(name, sizes, message):
    with pytest.raises(ValueError, match=message) as caught:
        Layer(name, **sizes)
    assert "\n" not in str(caught.value)


def test_places_without_reach_see_no_earlier_token():
    """Rates never fall below zero: where 1/(i+1) + tau does, the inner model is as its mini-batch began."""
    layer, x = Layer("ttt_linear", mini_batch=4), draw(1, 11, 12).requires_grad_()
    with torch.no_grad():
        layer.inner.tau.copy_(torch.tensor([-1.5, 2, -9, 1]))
    y = layer(x)[0][0]
    seen = [torch.autograd.grad(y[i].sum(), x, retain_graph=True)[0][0].abs().amax(-1) != 0 for i in range(11)]
    for i in range(11):
        begun = i // 4 * 4
        wanted = [j < begun or j == i or (i % 4 in (1, 3) and j <= i) for j in range(11)]
        assert seen[i].tolist() == wanted


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7])
@given(seed=st.integers(0, 99))
@torch.no_grad()
def test_mini_batches_of_ttt_never_grow_the_memory(n, twice, seed):
    """The step is at most the identity (its negative) for every key, even at the highest rate and for equal tokens."""
    layer = Layer("ttt", seed=seed, mini_batch=n, negative_eigenvalues=twice).inner
    layer.rate.bias.fill_(50.0)
    x = draw(1, 1, 12, seed=seed).expand(1, n, 12)
    A = ops.span(layer.row, layer.tokens(x, torch.arange(n)[None])).A[..., : layer.key_size, : layer.key_size]
    least = torch.linalg.eigvalsh(A).min()
    assert torch.linalg.matrix_norm(A, 2).max() <= 1 + 1e-9
    assert least < -0.5 if n == 1 and twice else least > (-1 if twice else -1e-9)


@pytest.mark.parametrize(("twice", "grows"), [(False, False), (True, True)])
@torch.no_grad()
def test_titans_learns_a_key_that_repeats_at_every_rate(twice, grows):
    """The hardest case: all that is old is forgotten, momentum and all, and the step is as long as it may be."""
    layer = Layer("titans", negative_eigenvalues=twice)
    for name, bias in (("forget", 9.0), ("momentum", -9.0)):
        getattr(layer.inner, name).bias.fill_(bias)
        getattr(layer.inner, name).weight.zero_()
    x = draw(1, 1, 12)
    layer.inner.beta.weight.copy_(9 * x[0] / x.square().sum())
    memory = layer(x.expand(1, 600, 12))[1].memory
    assert (memory.abs().max() > 1e3) == grows
