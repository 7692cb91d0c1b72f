"""The layers around the rows: against independent implementations with the same weights, and the laws of them all.

The oracles are the classes of transformers, where it has the layer, and otherwise the published formula, written out
below token by token and head by head. Both are functions of our layer's weights, so that the gradient of every weight
is compared too.
"""

import importlib
import math
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from reference import mixers, ops
from reference.attention import Past
from reference.lsm import LSM
from reference.mixers.softmax import Softmax
from reference.model import Side, state_bytes
from reference.presets import Model

MIXERS = [*LSM, "softmax"]
every = pytest.mark.parametrize("name", MIXERS)


class Layer(torch.nn.Module):
    """A mixer and what its kind shares, with random weights: called with tokens, states and where they stand."""

    def __init__(self, name, number=1, layers=3, seed=0, dtype=torch.float64, ops=ops, **sizes):
        super().__init__()
        sizes = {"width": 12, "heads": 2, "key_size": 4, "value_size": 6, "key_heads": 1} | sizes
        config = Model(lsm="gla" if name == "softmax" else name, **sizes)
        if name == "softmax":
            self.inner, common = Softmax(config, ops), {}
        else:
            self.inner, common = mixers.build(config, number, layers, ops), mixers.kind(name).common(config, layers)
        self.common = torch.nn.ParameterDict(common)
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
        return self.inner(x, Side(places, cu_seqlens, common=dict(self.common.items())), state)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --------------------------------------------------------------------------------- the oracles: transformers


@pytest.fixture(autouse=True)
def no_kernels_behind_the_oracle(monkeypatch):
    """transformers' layers take these packages' kernels if they can be imported: then they would not be independent."""
    for package in ("fla", "mamba_ssm", "causal_conv1d"):
        assert sys.modules.get(package) is None, f"{package} was loaded before the oracle"
        monkeypatch.setitem(sys.modules, package, None)


def released(model: str, name: str, kind: str, layer: int = 0, **config):
    """That layer of transformers, on its plain PyTorch path."""
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    settings = importlib.import_module(f"transformers.models.{model}.configuration_{model}")
    oracle = getattr(module, kind)(getattr(settings, name)(**config), layer)
    assert not {"fla", "mamba_ssm", "causal_conv1d"} & {n for n, m in sys.modules.items() if m is not None}
    return oracle.eval()


def called(oracle, weights, inputs, named=None):
    """The oracle with exactly these weights for its own."""
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in oracle.named_parameters()}
    return functional_call(oracle, weights, inputs, named)


def renamed(w, names: str):
    """Our weights under the oracle's names, given as "theirs=ours ..."; convolutions get their middle axis."""
    pairs = (name.split("=") for name in names.split())
    return {theirs: w[ours][:, None] if ours == "conv" else w[ours] for theirs, ours in pairs}


def minimax(layer, layers=4):
    oracle = released(
        "minimax",
        "MiniMaxConfig",
        "MiniMaxLightningAttention",
        layer,
        hidden_size=24,
        num_attention_heads=3,
        num_key_value_heads=3,
        num_hidden_layers=layers,
        block_size=64,
        layer_types=["linear_attention"] * layers,
    )
    names = "qkv_proj.weight=qkv.weight out_proj.weight=o.weight norm.weight=norm output_gate.weight=gate.weight"
    return lambda w, x: called(oracle, renamed(w, names), (x, None, None))[0]


def by_head(w, *names, heads=3):
    """Rows of several matrices, head after head."""
    return torch.cat([w[f"{n}.weight"].unflatten(0, (heads, -1)) for n in names], 1).flatten(0, 1)


def qwen3_next():
    oracle = released(
        "qwen3_next",
        "Qwen3NextConfig",
        "Qwen3NextGatedDeltaNet",
        hidden_size=24,
        linear_num_key_heads=3,
        linear_num_value_heads=3,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        rms_norm_eps=1e-5,
    )
    names = "norm.weight=norm out_proj.weight=o.weight conv1d.weight=conv A_log=A_log dt_bias=dt_bias"

    def run(w, x):
        projections = {"in_proj_qkvz": by_head(w, *"qkv", "gate"), "in_proj_ba": by_head(w, "beta", "a")}
        projections = {f"{n}.weight": matrix for n, matrix in projections.items()}
        return called(oracle, renamed(w, names) | projections, (x,))

    return run


DELTA = (
    "q_proj.weight=q.weight k_proj.weight=k.weight v_proj.weight=v.weight o_proj.weight=o.weight o_norm.weight=norm "
)
DELTA += "b_proj.weight=beta.weight conv1d.weight=conv "


def olmo_hybrid():
    oracle = released(
        "olmo_hybrid",
        "OlmoHybridConfig",
        "OlmoHybridGatedDeltaNet",
        hidden_size=24,
        num_attention_heads=3,
        linear_key_head_dim=8,
        linear_value_head_dim=12,
        linear_allow_neg_eigval=False,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    names = DELTA + "a_proj.weight=a.weight g_proj.weight=gate.weight A_log=A_log dt_bias=dt_bias"
    return lambda w, x: called(oracle, renamed(w, names), (x,))


KDA = {"hidden_size": 24, "linear_num_heads": 3, "linear_head_dim": 8, "rms_norm_eps": 1e-5, "num_hidden_layers": 1}


def kimi():
    oracle = released("kimi_linear", "KimiLinearConfig", "KimiLinearDeltaAttention", **KDA)
    names = DELTA + "g_a_proj.weight=gate.0.weight g_b_proj.weight=gate.1.weight forget_gate.dt_bias=dt_bias "
    names += "forget_gate.f_a_proj.weight=a.0.weight forget_gate.f_b_proj.weight=a.1.weight"

    def run(w, x):
        A_log = {"forget_gate.A_log": w["A_log"][None, None, :, None]}
        return called(oracle, renamed(w, names) | A_log, (x,))

    return run


def bailing():
    """Its two gates are full matrices; ours are products of two."""
    kind = {"kda_safe_gate": False, "layer_types": ["linear_attention"]}
    oracle = released("bailing_hybrid", "BailingHybridConfig", "BailingHybridDeltaAttention", **KDA, **kind)
    names = DELTA + "forget_gate.dt_bias=dt_bias forget_gate.A_log=A_log"

    def run(w, x):
        full = {theirs: w[f"{n}.1.weight"] @ w[f"{n}.0.weight"] for theirs, n in (("g_proj", "gate"), ("f_proj", "a"))}
        gates = {"g_proj.weight": full["g_proj"], "forget_gate.f_proj.weight": full["f_proj"]}
        return called(oracle, renamed(w, names) | gates, (x,))

    return run


def state_space(*kind, **config):
    oracle = released(*kind, hidden_size=24, n_groups=1, chunk_size=64, **config)
    names = "in_proj.weight=project.weight conv1d.weight=conv conv1d.bias=conv_bias A_log=A_log dt_bias=dt_bias D=D "
    names += "norm.weight=norm out_proj.weight=o.weight"
    return lambda w, x: called(oracle, renamed(w, names), (x,))


def mamba2():
    sizes = {"num_heads": 3, "head_dim": 16, "state_size": 8, "num_hidden_layers": 1}
    return state_space("mamba2", "Mamba2Config", "Mamba2Mixer", **sizes)


def nemotron():
    sizes = {"mamba_num_heads": 3, "mamba_head_dim": 16, "ssm_state_size": 8, "time_step_min": 0.0}
    sizes["layers_block_type"] = ["linear_attention"]
    return state_space("nemotron_h", "NemotronHConfig", "NemotronHMamba2Mixer", **sizes)


def llama():
    sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "attn_implementation": "sdpa"}
    oracle = released("llama", "LlamaConfig", "LlamaAttention", **sizes)
    rotary = sys.modules[type(oracle).__module__].LlamaRotaryEmbedding(oracle.config)
    names = " ".join(f"{n}_proj.weight={n}.weight" for n in "qkvo")

    def run(w, x):
        angles = rotary(x, torch.arange(x.shape[1])[None])
        return called(oracle, renamed(w, names), (x, angles), {"attention_mask": None})[0]

    return run


# ------------------------------------------------------------------------- the oracles: formulas, written out


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def silu(x):
    return x * sigmoid(x)


def rms(x, weight):
    return weight * x / torch.sqrt((x * x).mean() + 1e-5)


def unit(x):
    return x / torch.sqrt((x * x).sum() + 1e-6)


class Heads:
    """A token's projections, head by head."""

    def __init__(self, w, x, heads):
        self.w, self.x, self.heads = w, x, heads

    def __call__(self, name, h, x=None):
        rows = self.w[f"{name}.weight"].chunk(self.heads)[h]
        return rows @ (self.x if x is None else x)


def sequence(step, memories):
    """A formula for one head and token, step(w, text, t, M, h) -> (output, memory), as a function of a batch."""

    def run(w, x):
        texts = []
        for text in x.unbind():
            y, M = [], list(memories)
            for t in range(len(text)):
                heads = [step(w, text, t, before, h) for h, before in enumerate(M)]
                M = [after for _, after in heads]
                o = torch.cat([part for part, _ in heads])
                o = rms(o, w["norm"]) if step.__name__ == "hgrn2_step" else o  # its norm is over all heads at once
                y.append(w["o.weight"] @ o)
            texts.append(torch.stack(y))
        return torch.stack(texts)

    return run


H, K, V = 3, 4, 6


def elu_features(x):
    return torch.where(x > 0, x + 1, torch.exp(x))


def linear_attention_step(w, x, t, M, h):
    """2503.05447: o = φ(q) M, norm, ⊙ SiLU(W x)."""
    of = Heads(w, x[t], H)
    M = M + torch.outer(elu_features(of("k", h)), of("v", h))
    o = elu_features(of("q", h)) / math.sqrt(K) @ M
    return rms(o, w["norm"]) * silu(of("gate", h)), M


def normalized_step(w, x, t, M, h):
    """2006.16236, equation 9: the weights of all values sum to one. M is [sum of φ(k)ᵀ v | sum of φ(k)]."""
    of = Heads(w, x[t], H)
    k = elu_features(of("k", h))
    M = M + torch.cat([torch.outer(k, of("v", h)), k[:, None]], 1)
    seen = elu_features(of("q", h)) @ M
    return rms(seen[:-1] / seen[-1], w["norm"]) * silu(of("gate", h)), M


def retention_step(w, x, t, M, h):
    """2307.08621, equations 6 and 8, rotations as complex numbers."""
    of = Heads(w, x[t], H)
    turn = torch.exp(1j * t * 10000.0 ** (-torch.arange(K // 2, dtype=torch.float64) / (K // 2)))

    def rotated(y):
        z = torch.complex(y[: K // 2], y[K // 2 :]) * turn
        return torch.cat([z.real, z.imag])

    M = (1 - 2.0 ** (-5 - h)) * M + torch.outer(rotated(of("k", h)), of("v", h))
    o = rotated(of("q", h)) / math.sqrt(K) @ M
    return rms(o, w["norm"]) * silu(of("gate", h)), M


def gla_step(w, x, t, M, h):
    """2312.06635, equations 4 and section 4.4: α = sigmoid(W₂ W₁ x + b)^(1/16)."""
    of = Heads(w, x[t], H)
    raw = of("decay.1", h, w["decay.0.weight"] @ x[t]) + w["decay.1.bias"].chunk(H)[h]
    M = sigmoid(raw)[:, None] ** (1 / 16) * M + torch.outer(of("k", h), of("v", h))
    o = of("q", h) / math.sqrt(K) @ M
    return rms(o, w["norm"]) * silu(of("gate", h)), M


def hgrn2(layer):
    def hgrn2_step(w, x, t, M, h):
        """2404.07904: α = l + (1 - l) sigmoid(W x), k = 1 - α, l the softmax over layers, summed after the first."""
        of = Heads(w, x[t], H)
        share = torch.exp(w["common.lower_bounds"]) / torch.exp(w["common.lower_bounds"]).sum(0)
        bound = share[1 : layer + 1].sum(0).chunk(H)[h]
        alpha = bound + (1 - bound) * sigmoid(of("f", h))
        M = alpha[:, None] * M + torch.outer(1 - alpha, of("i", h))
        return silu(of("q", h)) / math.sqrt(K) @ M, M

    return hgrn2_step


def rwkv6_step(w, x, t, M, h):
    """2404.05892, equations 16 to 20; the norm is a group norm with a head a group."""
    now = x[t]
    step = (x[t - 1] if t else torch.zeros_like(now)) - now
    rank = w["mix_up"].shape[1]
    hidden = torch.tanh(w["mix_down.weight"] @ (now + step * w["mix"]))
    mixed = {}
    for i, name in enumerate("wkvrg"):
        share = hidden[i * rank : (i + 1) * rank] @ w["mix_up"][i] + w["mix_bias"][i]
        mixed[name] = now + step * share
    of = Heads(w, None, H)
    low = torch.tanh(w["w.0.weight"] @ mixed["w"])
    decay = torch.exp(-torch.exp(of("w.2", h, low) + w["w.2.bias"].chunk(H)[h]))
    k, v, r = (of(n, h, mixed[n]) for n in "kvr")
    o = r @ (M + torch.outer(w["u"][h] * k, v))
    o = (o - o.mean()) / torch.sqrt(((o - o.mean()) ** 2).mean() + 1e-5)
    o = o * w["norm"].chunk(H)[h] + w["norm_bias"].chunk(H)[h]
    return o * silu(of("g", h, mixed["g"])), decay[:, None] * M + torch.outer(k, v)


def delta_net_step(w, x, t, M, h):
    """2406.06484, equations 1 to 3 and section 3.4: short convolutions, unit keys and queries."""
    taps = w["conv"].split([H * K, H * K, H * V])

    def convolved(name, taps):
        window = range(max(0, t - 3), t + 1)
        return silu(sum(taps.chunk(H)[h][:, 3 - (t - s)] * Heads(w, x[s], H)(name, h) for s in window))

    q, k, v = (convolved(n, tap) for n, tap in zip("qkv", taps, strict=True))
    q, k, beta = unit(q), unit(k), sigmoid(w["beta.weight"][h] @ x[t])
    M = M - beta * torch.outer(k, k @ M) + beta * torch.outer(k, v)
    return rms(q / math.sqrt(K) @ M, w["norm"]), M


class Oracle(NamedTuple):
    lsm: str
    make: Callable  # () -> the oracle as a function of our weights and x : b t d
    layer: dict  # our layer's configuration
    t: int = 131
    tolerance: float = 2e-6  # of the largest number, 4 times that for gradients; the classes compute in float32
    dtype: torch.dtype = torch.float32


def classes(lsm, make, value_size, tolerance=2e-6, **layer):
    sizes = {"width": 24, "heads": 3, "key_size": 8, "value_size": value_size}
    return Oracle(lsm, make, sizes | layer, tolerance=tolerance)


def written(lsm, step, columns=V, **layer):
    """A formula is compared in float64 on a short text."""
    sizes = {"width": 6, "heads": H, "key_size": K, "value_size": V}
    memories = [torch.zeros(K, columns, dtype=torch.float64)] * H
    return Oracle(lsm, lambda: sequence(step, memories), sizes | layer, 9, 1e-12, torch.float64)


def lightning(layer):
    return classes("lightning", lambda: minimax(layer), 8, eps=1e-6, number=layer, layers=4)


ORACLES = {
    "MiniMaxLightningAttention, first": lightning(0),
    "MiniMaxLightningAttention, third": lightning(2),
    "MiniMaxLightningAttention, last": lightning(3),
    "Qwen3NextGatedDeltaNet": classes("gated_delta_net", qwen3_next, 12),
    "OlmoHybridGatedDeltaNet": classes("gated_delta_net", olmo_hybrid, 12),
    "KimiLinearDeltaAttention": classes("kda", kimi, 8, 5e-6),
    "BailingHybridDeltaAttention": classes("kda", bailing, 8),
    "Mamba2Mixer": classes("mamba2", mamba2, 16),
    "NemotronHMamba2Mixer": classes("mamba2", nemotron, 16),
    "LlamaAttention": Oracle("softmax", llama, {"width": 24, "heads": 6, "key_heads": 2}),
    "formula of 2503.05447": written("linear_attention", linear_attention_step),
    "formula of 2006.16236": written("linear_attention_normalized", normalized_step, V + 1),
    "formula of 2307.08621": written("retention", retention_step),
    "formula of 2312.06635": written("gla", gla_step),
    "formula of 2404.07904, first": written("hgrn2", hgrn2(0), number=0),
    "formula of 2404.07904, last": written("hgrn2", hgrn2(2), number=2),
    "formula of 2404.05892": written("rwkv6", rwkv6_step),
    "formula of 2406.06484": written("delta_net", delta_net_step),
}


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
