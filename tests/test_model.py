"""The laws of the language model, for patterns, rows and routers, in float64; and two released models as oracles."""

import copy
import math
import sys
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from inputs import Made, assert_within_budget, small, unpadded
from oracles.common import draw
from parallel.graph import recomputed
from reference import exact, moe, ops, routers
from reference.head import IGNORED, token_losses
from reference.lsm import LSM
from reference.model import LanguageModel, decayed, for_writing, initialize, looks_ahead, sizes, starts, state_bytes
from reference.moe import MoE
from reference.noise import dropout, noise
from reference.presets import Model
from reference.routers import ROUTER

PATTERNS = ["L", "N", "LLLN", "NL", "ELEN", "LDNE", "LLD", "D", "L+EN+D", "E+LN+E+D"]
VOCABULARY = 13
close = {"rtol": 1e-8, "atol": 1e-9}


def make(seed=0, ops=ops, dtype=torch.float64, **config):
    """A small model with random weights, none of them at a special value."""
    lsm = config.get("lsm", "gated_delta_net")
    sizes = small(lsm) | {"vocabulary": VOCABULARY, "experts": 6, "expert_width": 5, "dense_width": 7, "lsm": lsm}
    sizes |= config
    sizes["top_k"] = ROUTER[sizes.get("router", "linear_moe")].top_k or sizes.get("top_k", 2)
    model = LanguageModel(Model(**sizes), ops)
    rng = torch.Generator().manual_seed(seed)
    for weight in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
        scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.5
        weight.data = (torch.randn(weight.shape, generator=rng, dtype=torch.float64) * scale).to(dtype)
    return model


def text(b, t, seed=0):
    return torch.randint(VOCABULARY, (b, t), generator=torch.Generator().manual_seed(seed))


def packed(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def same_state(got, wanted):
    assert torch.equal(got.position, wanted.position)
    for a, b in zip(got.mixers, wanted.mixers, strict=True):
        assert type(a) is type(b)
        for x, y in zip(unpadded(a), unpadded(b), strict=True):
            torch.testing.assert_close(x, y, **close)


def part_of(state, i):
    """The state of sequence (document) i alone."""
    rows = [None if m is None else type(m)(*(x[i : i + 1] for x in m)) for m in state.mixers]
    return type(state)(state.position[i : i + 1], tuple(rows))


# ----------------------------------------------------------------------------------------- texts and their pieces

CASES = [{"pattern": p} for p in PATTERNS] + [{"pattern": "NL", "lsm": name} for name in LSM]
CASES += [{"pattern": "NL", "window": 3}, {"pattern": "NL", "attention": "latent"}]
CASES += [{"pattern": "NLDNL", "lsm": "rwkv7"}]  # whose first L hands its values to the second
MIXTURE = {"attention": "mixture", "mixer_experts": 4, "window": 3}  # of heads
SEVERAL = [  # projections
    {"lsm": "mamba", "projection_experts": ("input", "gate", "output"), "mixer_experts": 3},
    {"lsm": "longhorn", "projection_experts": ("output",), "mixer_experts": 3},
]
CASES += [{"pattern": "NL"} | MIXTURE, {"pattern": "LN"} | MIXTURE | SEVERAL[0], {"pattern": "L"} | SEVERAL[1]]
CASES += [{"pattern": "LN", "router": name, "groups": 1} for name in ROUTER]
stable = [c for c in CASES if ROUTER[c.get("router", "linear_moe")].prefix_stable()]


def names(cases):
    return ["-".join(str(v) for k, v in c.items() if k != "groups") for c in cases]


@pytest.mark.parametrize("config", stable, ids=names(stable))
@given(lengths=st.lists(st.sampled_from([0, 1, 1, 2, 5]), min_size=1, max_size=5), seed=st.integers(0, 99))
@settings(max_examples=5)
@torch.no_grad()
def test_pieces_equal_the_whole(config, lengths, seed):
    model, tokens = make(seed, **config), text(2, sum(lengths) + 1, seed)
    whole = model(tokens, keep_state=True)
    state, logits = None, []
    for piece in tokens.split([*lengths, 1], 1):
        out = model(piece, state=state, keep_state=True)
        state = out.state
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole.logits, **close)
    same_state(state, whole.state)


LENGTH = st.sampled_from([0, 1, 3, 6])


@pytest.mark.parametrize("config", CASES, ids=names(CASES))
@given(lengths=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=4), seed=st.integers(0, 99))
@example(lengths=[(2, 0), (3, 1)], seed=0)  # one new token for several documents
@settings(max_examples=5)
@torch.no_grad()
def test_packed_documents_equal_each_alone(config, lengths, seed):
    """From nothing, then each from its own state; a document's experts have room of their own."""
    model, state, alone = make(seed, **config), None, [None] * len(lengths)
    for turn, now in enumerate(zip(*lengths, strict=True)):
        cu_seqlens, tokens = packed(*now), text(1, sum(now), seed + turn)
        out = model(tokens, cu_seqlens=cu_seqlens, state=state, keep_state=True)
        state = out.state
        for i, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
            own = model(tokens[:, a:b], state=alone[i], keep_state=True)
            alone[i] = own.state
            torch.testing.assert_close(out.logits[:, a:b], own.logits, **close)
            same_state(part_of(state, i), own.state)


@pytest.mark.parametrize("router", ["linear_moe", "switch"])
@torch.no_grad()
def test_no_layer_sorts_documents(router, monkeypatch):
    """They are numbered once a batch, from their borders."""
    for place in (moe, routers):
        monkeypatch.setattr(place, "numbered", None)
    make(pattern="LN", router=router)(text(1, 9), cu_seqlens=packed(4, 0, 5), index=text(1, 9), key=1)


@torch.no_grad()
def test_positions_start_anew_in_every_document_and_may_be_given():
    model, tokens = make(pattern="N"), text(1, 9)
    cu_seqlens = packed(4, 5)
    plain = model(tokens, cu_seqlens=cu_seqlens).logits
    own = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    assert torch.equal(plain, model(tokens, cu_seqlens=cu_seqlens, positions=own).logits)
    torch.testing.assert_close(plain, model(tokens, cu_seqlens=cu_seqlens, positions=own + 7).logits, **close)
    assert not torch.allclose(plain, model(tokens, cu_seqlens=cu_seqlens, positions=2 * own).logits)


@pytest.mark.parametrize("config", CASES, ids=names(CASES))
def test_no_token_sees_a_later_one_or_another_row(config):
    model, tokens = make(**config), text(3, 8)
    x = functional_embedding(model, tokens)
    logits = after_embedding(model, x, tokens)
    gradient = torch.autograd.grad(logits[1, 4].sum(), x)[0].abs().amax(-1)
    assert gradient[0].max() == gradient[2].max() == 0
    mixing = ROUTER[model.config.router].pooled == "always"  # Soft MoE: the one that cannot help looking ahead
    assert (gradient[1, 5:].max() > 0) == mixing
    assert gradient[1, 4] > 0 and (gradient[1, :4].min() > 0 or not set("LN") & set(model.config.letters))


def functional_embedding(model, tokens):
    return model.embedding.detach()[tokens].requires_grad_()


def after_embedding(model, x, tokens):
    """The logits as a function of the embedded tokens: the blocks themselves, as `forward` calls them."""
    side = model.side(tokens, None, None, None, None, None)
    for block in model.blocks:
        x, side, _, _ = block(x, side)
    return ops.norm(x, model.norm, model.config.eps) @ model.head.T


def test_layers_are_numbered_over_both_kinds():
    """Softmax layers count, feed-forward layers do not: so MiniMax's slopes and HGRN2's bounds know their depth."""
    model = make(pattern="LENDLE", lsm="lightning")
    fades = [s.inner.fade for block in model.blocks for s in block.sublayers if hasattr(s.inner, "fade")]
    assert fades == pytest.approx([1.0, 0.0], abs=2e-5)
    model = make(pattern="NLNL", lsm="hgrn2")
    layers = [s.inner.layer for block in model.blocks for s in block.sublayers if hasattr(s.inner, "layer")]
    assert layers == [1, 3] and len(model.common["lower_bounds"]) == 4


def test_the_first_layer_of_its_kind_hands_its_values_to_all_later_ones():
    """Whatever stands before and between. Where they take nothing but those, their own matrices do not matter."""
    model, tokens = make(pattern="NLDNLL", lsm="rwkv7"), text(2, 8)
    first, *later = (s.inner for block in model.blocks for s in block.sublayers if hasattr(s.inner, "needs_values"))
    assert [layer.needs_values for layer in (first, *later)] == [False, True, True]
    with torch.no_grad():
        first.o.weight.zero_()  # from here on its values are all that it does
        for layer in later:
            layer.nu[2].bias.fill_(100.0)
        before = model(tokens).logits
        for layer in later:
            layer.v.weight.zero_()
    after = model(tokens).logits
    torch.testing.assert_close(after, before, **close)
    assert torch.autograd.grad(after.square().sum(), first.v.weight)[0].abs().min() > 0


@torch.no_grad()
def test_the_blocks_are_the_model():
    model, tokens = make(pattern="LLLN"), text(2, 8)
    torch.testing.assert_close(
        after_embedding(model, functional_embedding(model, tokens), tokens), model(tokens).logits, **close
    )


@pytest.mark.parametrize("pattern", ["L", "LD", "N", "LN"])
@pytest.mark.parametrize("lsm", LSM)
@torch.no_grad()
def test_only_softmax_attention_makes_the_state_grow(pattern, lsm):
    if pattern == "N" and lsm != "gla":
        return
    model = make(pattern=pattern, lsm=lsm)
    few, many = (state_bytes(model(text(2, t), keep_state=True).state) for t in (5, 30))
    assert 0 < few <= many and (many > few) == ("N" in pattern)


def test_state_bytes_counts_tensors_however_deep():
    tree = (torch.zeros(3, dtype=torch.float64), (torch.zeros(2, 2), None), ((torch.zeros(5, dtype=torch.int8),),))
    assert state_bytes(tree) == 3 * 8 + 4 * 4 + 5


# ------------------------------------------------------------------------------------------------------- losses


def test_losses_are_those_of_the_logits_and_ignored_labels_cost_nothing():
    model, tokens, labels = make(), text(2, 7), text(2, 7, seed=1)
    labels[0, 3] = labels[1, 0] = -100
    losses = model(tokens, labels).losses
    assert model(tokens, labels).logits is None and model(tokens).losses is None
    logits = model(tokens).logits.detach()
    for b in range(2):
        for t in range(7):
            row = logits[b, t]
            wanted = 0.0 if labels[b, t] == -100 else math.log(row.exp().sum()) - row[labels[b, t]].item()
            assert math.isclose(losses[b, t].item(), wanted, rel_tol=1e-9, abs_tol=1e-12)
    gradient = torch.autograd.grad(losses[:, 3][:1].sum() + losses[1, 0], [*model.parameters()], materialize_grads=True)
    assert all(g.abs().max() == 0 for g in gradient)


@given(n=st.integers(0, 9), rows=st.integers(0, 10), masked=st.integers(0, 2**9), seed=st.integers(0, 99))
def test_losses_piece_by_piece_are_those_of_all_logits_at_once(n, rows, masked, seed):
    """Values, and the gradients of features and head by weights of each token's own; rows: tokens of a piece."""
    rng = torch.Generator().manual_seed(seed)
    x, head, D = (3 * torch.randn(s, generator=rng, dtype=torch.float64) for s in ((n, 4), (VOCABULARY, 4), (n,)))
    labels = torch.randint(VOCABULARY, (n,), generator=rng)
    labels[[i for i in range(n) if masked >> i & 1]] = IGNORED
    inputs = [x.requires_grad_(), head.requires_grad_()]
    found = []
    for held in (n * VOCABULARY + VOCABULARY, rows * VOCABULARY + 5):
        losses = token_losses(x, head, labels, held)
        found.append([losses, *torch.autograd.grad(losses, inputs, D)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-13)
    assert found[1][0].masked_select(labels == IGNORED).eq(0).all()


@pytest.mark.parametrize("narrow", [False, True])
def test_pieces_of_losses_are_as_precise_as_the_whole(narrow):
    """In float32, and in bfloat16 products under autocast: no further from float64 than all logits at once are."""
    rng = torch.Generator().manual_seed(0)
    x, head = torch.randn(64, 16, generator=rng), torch.randn(VOCABULARY, 16, generator=rng)
    labels = torch.randint(VOCABULARY, (64,), generator=rng)

    def run(dtype, held, narrow):
        leaves = [t.to(dtype).requires_grad_() for t in (x, head)]
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            losses = token_losses(*leaves, labels, held)
        assert losses.dtype == dtype
        return [losses.detach(), *torch.autograd.grad(losses.sum() / 64, leaves)]

    exact = run(torch.float64, 10**9, False)
    for whole, cut, wanted in zip(
        run(torch.float32, 10**9, narrow), run(torch.float32, 99, narrow), exact, strict=True
    ):
        assert cut.dtype == torch.float32
        assert (cut - wanted).abs().max() <= 2 * (whole - wanted).abs().max() + 1e-6


def test_pieces_of_losses_keep_no_logits():
    """Neither between the passes nor within one: nothing of the logits' size is ever made."""
    x, head = torch.randn(100, 2, requires_grad=True), torch.randn(50, 2, requires_grad=True)
    with Made() as made:
        token_losses(x, head, torch.arange(100) % 50, held=500).sum().backward()
    assert 0 < max(made.sizes) <= 500


def test_tied_weights_are_one_parameter_of_two_uses():
    tied, free = make(tied=True), make(tied=False)
    assert set(dict(free.named_parameters())) - set(dict(tied.named_parameters())) == {"head"}
    weights = {n: p.detach().clone().requires_grad_() for n, p in tied.named_parameters()}
    tokens, labels = text(2, 7), text(2, 7, seed=1)

    def gradients(model, weights, leaves):
        return torch.autograd.grad(functional_call(model, weights, (tokens, labels)).losses.sum(), leaves)

    both = gradients(tied, weights, [weights["embedding"]])[0]
    head = weights["embedding"].detach().clone().requires_grad_()
    parts = gradients(free, weights | {"head": head}, [weights["embedding"], head])
    torch.testing.assert_close(both, parts[0] + parts[1], **close)
    assert parts[0].abs().max() > 0 and parts[1].abs().max() > 0


def test_tokens_outside_the_vocabulary_are_named_in_one_line():
    model = make()
    model.check(text(2, 5))
    model.check(text(2, 0))
    for wrong in (VOCABULARY, -1):
        with pytest.raises(
            ValueError, match=f"tokens are .*{wrong}.*the vocabulary is 0 ... {VOCABULARY - 1}"
        ) as caught:
            model.check(torch.tensor([[3, wrong]]))
        assert "\n" not in str(caught.value)


def test_every_parameter_gets_a_gradient():
    for config in CASES:
        model = make(shared_width=4, shared_gate=True, **config)
        out = model(text(3, 20), text(3, 20, seed=1), index=torch.arange(60).view(3, 20), key=2)
        out.losses.sum().backward()
        for name, weight in model.named_parameters():
            assert weight.grad is not None and weight.grad.abs().max() > 0, (config, name)


# --------------------------------------------------------------------------------- the definition as the backend


def gradients(model, *inputs, **named):
    out = model(*inputs, **named)
    leaves = list(model.parameters())
    return [out.losses, *torch.autograd.grad(out.losses.sum(), leaves, materialize_grads=True)]


@pytest.mark.parametrize("lsm", LSM)
def test_token_loop_and_chunks_make_the_same_model(lsm):
    """The backend `exact` runs every recurrence by its definition; more than one chunk, and packed documents."""
    tokens, labels = text(1, 70), text(1, 70, seed=1)
    for cu_seqlens in (None, packed(5, 0, 65)):
        got, wanted = (
            gradients(make(pattern="LN", lsm=lsm, ops=backend), tokens, labels, cu_seqlens=cu_seqlens)
            for backend in (ops, exact)
        )
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, **close)


class Recomputed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, side, state=None):
        return recomputed(self.block, x, side, state)


RECOMPUTED = [{"router": name} for name in ROUTER] + [{"lsm": "rwkv7"}, MIXTURE | SEVERAL[0]]
RECOMPUTED += [{"lsm": "mom_gla"}, {"pattern": "L+ELN+E"}]


@pytest.mark.parametrize("config", RECOMPUTED, ids=names(RECOMPUTED))
def test_recomputing_blocks_changes_nothing(config):
    """Losses, loads and gradients, bit by bit, with dropout and with the load's own gradient."""
    model, tokens, labels = (
        make(**{"pattern": "LLN", "dropout": 0.2, "dtype": torch.float32} | config),
        text(2, 9),
        text(2, 9, 1),
    )
    index = torch.arange(18).view(2, 9)

    def run(model):
        out = model(tokens, labels, index=index, key=3)
        loads = [out.loads, *(load for _, load in out.inside)]
        loss = out.losses.sum()
        for load in loads:
            loss = loss + (load.probability * torch.arange(load.counts.shape[-1])).sum() + load.z.sum()
        known = [x for load in loads for x in load]
        return [out.losses, *known, *torch.autograd.grad(loss, list(model.parameters()))]

    plain = run(model)
    again = copy.deepcopy(model)
    again.blocks = nn.ModuleList(Recomputed(block) for block in again.blocks)
    for a, b in zip(plain, run(again), strict=True):
        assert torch.equal(a, b)


def test_what_runs_again_runs_under_the_same_autocast_and_in_every_backward_pass():
    layer, x = nn.Linear(3, 3), draw(4, 3, dtype=torch.float32).requires_grad_()

    def gradients(run):
        with torch.autocast("cpu", torch.bfloat16):
            loss = run(lambda x: layer(x).tanh(), x).float().square().sum()
        both = [torch.autograd.grad(loss, [x, layer.weight], retain_graph=True) for _ in range(2)]
        return [*both[0], *both[1]]

    for a, b in zip(gradients(lambda f, x: f(x)), gradients(recomputed), strict=True):
        assert torch.equal(a, b)


def test_what_runs_again_is_asked_for_once_and_saves_as_much_as_before():
    class Greedy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            return dy + 0 * ctx.saved_tensors[0] + 0 * ctx.saved_tensors[0]

    x, runs = draw(4).requires_grad_(), []
    with pytest.raises(RuntimeError, match="asked for once in a backward pass"):
        recomputed(Greedy.apply, x).sum().backward()

    def other(x):
        runs.append(1)
        return x.exp() if len(runs) == 1 else x * 2

    with pytest.raises(RuntimeError, match="saves 0 tensors, 1 in its first run"):
        recomputed(other, x).sum().backward()


# ----------------------------------------------------------------------------------------------------- autocast

LAYERS = [{"pattern": "L", "lsm": name} for name in LSM] + [{"pattern": p} for p in ("N", "D", "E", "L+E", "E+N+D")]
LAYERS += [{"pattern": "N", "attention": "latent"}, {"pattern": "N"} | MIXTURE]
LAYERS += [{"pattern": "L"} | given for given in SEVERAL]


def one_layer(config, kind, dtype=torch.float32, wide=False):
    """Of a block under autocast to `kind` (None: without it): which dtypes its layers saw and which are narrow (`wide`:
    none), its output and all gradients."""
    model, x, seen = make(dtype=dtype, **config), draw(1, 9, 12, dtype=dtype).requires_grad_(), []
    block, side = model.blocks[0], model.side(text(1, 9), None, None, None, None, None)
    layers = [block.sublayers[0].inner, *block.sublayers[0].beside]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        layer.narrow = layer.narrow and not wide
    with torch.autocast("cpu", kind, enabled=kind is not None):
        y, side, _, _ = block(x, side)
    wanted = [x, *(p for p in block.parameters() if p.requires_grad)]
    grads = torch.autograd.grad(y, wanted, draw(1, 9, 12, seed=1).to(y), materialize_grads=True)
    return seen, [layer.narrow for layer in layers], [y.detach(), *grads]


@pytest.mark.parametrize("config", LAYERS, ids=names(LAYERS))
def test_under_autocast_layers_see_the_dtype_they_ask_for(config):
    """To the bit what it is where every product rounds for itself, and gradients about as near the exact ones; without
    autocast nothing is rounded."""
    seen, narrow, got = one_layer(config, torch.bfloat16)
    assert seen == [torch.bfloat16 if own else torch.float32 for own in narrow]
    _, _, anew = one_layer(config, torch.bfloat16, wide=True)
    assert torch.equal(got[0], anew[0])
    exact = one_layer(config, None, dtype=torch.float64)
    assert set(exact[0]) == {torch.float64} and set(one_layer(config, None)[0]) == {torch.float32}
    for i, (a, b, c) in enumerate(zip(got, anew, exact[2], strict=True)):
        assert a.dtype == torch.float32
        assert_within_budget(a.bfloat16(), b, c, str(i))


@pytest.mark.parametrize(
    ("pattern", "asked"), [("LD", [torch.bfloat16] * 2), ("LE+D", [torch.bfloat16, torch.float32])]
)
def test_the_norm_of_narrow_layers_is_written_in_their_dtype(pattern, asked):
    """No pass of its own rounds it, unless some layer sees it as wide as it is."""
    written = []

    def norm(x, weight, eps, gate=None, activation="silu", dtype=None):
        written.extend([dtype] if gate is None and weight is not None and x.shape[-1] == 12 else [])
        return ops.norm(x, weight, eps, gate, activation, dtype)

    model = make(ops=ops._replace(norm=norm), dtype=torch.float32, pattern=pattern, lsm="gated_delta_net")
    with torch.autocast("cpu", torch.bfloat16):
        model(text(1, 9))
    assert written[:-1] == asked and written[-1] is None, "the last one is the head's"


# -------------------------------------------------------------------------------------------------------- loads


@pytest.mark.parametrize("pattern", ["LLLN", "ELDE", "D"])
def test_loads_are_stacked_by_expert_layer_and_nothing_adds_up_inside(pattern):
    model, tokens = make(pattern=pattern, top_k=2), text(2, 9)
    layers = model.config.letters.count("E")
    loads = model(tokens).loads
    if not layers:
        assert loads is None
        return
    again = model(tokens).loads
    assert all(torch.equal(a, b) for a, b in zip(loads, again, strict=True))
    assert loads.counts.shape == loads.probability.shape == loads.dropped.shape == (layers, 6)
    assert loads.counts.sum(-1).tolist() == [2 * 18] * layers and loads.tokens.tolist() == [18] * layers
    torch.testing.assert_close(loads.probability.sum(-1), torch.full((layers,), 18.0, dtype=torch.float64))


def test_loads_come_in_the_order_of_the_layers():
    model = make(pattern="LELE")
    last = model.blocks[1].sublayers[1].inner
    with torch.no_grad():
        last.gate.zero_()  # ties go to the first experts
    counts = model(text(2, 9)).loads.counts
    assert counts[1].tolist() == [18, 18, 0, 0, 0, 0] and counts[0, 2:].sum() > 0


def test_routers_inside_mixers_report_by_their_number_of_experts_and_visits():
    """Apart from those of the expert layers; of all tokens, and nothing adds up inside."""
    config = {"pattern": "LN", "repeat": 2} | MIXTURE | SEVERAL[0]
    model, tokens = make(**config, mixer_top_k=2), text(2, 9)
    for _ in range(2):
        out = model(tokens)
        assert [(k, tuple(load.counts.shape)) for k, load in out.inside] == [(1, (6, 3)), (2, (2, 3))]
        assert all(load.counts.sum(-1).eq(18 * k).all() and load.tokens.eq(18).all() for k, load in out.inside)
        assert out.loads.counts.shape == (4, 6)
    assert make(**config, mixer_top_k=1)(tokens).inside[0].load.counts.shape == (8, 3)
    assert [k for k, _ in make(pattern="L", lsm="mom_gla", memories_kept=3)(tokens).inside] == [3]
    assert make(pattern="LN")(tokens).inside == ()


# -------------------------------------------------------------------------------------------------- side by side


@pytest.mark.parametrize("pattern", ["L+E", "E+L", "N+D", "N+D+E", "D+E"])
def test_layers_side_by_side_see_the_same_and_are_added(pattern):
    """One norm, one residual: x + f(norm x) + g(norm x); then the same letters one behind the other are not that."""
    model, tokens = make(pattern=pattern), text(2, 8)
    (layer,) = model.blocks[0].sublayers
    x, side = functional_embedding(model, tokens), model.side(tokens, None, None, None, None, None)
    seen = ops.norm(x, layer.norm, layer.eps)
    wanted = x
    for letter, inner in zip(pattern.split("+"), [layer.inner, *layer.beside], strict=True):
        y = {"D": lambda f: f(seen), "E": lambda f: f(seen, side)[0]}.get(letter, lambda f: f(seen, side, None)[0])
        wanted = wanted + y(inner)
    torch.testing.assert_close(layer(x, side)[0], wanted, **close)
    assert [name for name, _ in layer.named_parameters() if name.endswith("norm") and "." not in name] == ["norm"]


def test_blocks_begin_at_mixers_wherever_they_stand_in_a_sublayer():
    model = make(pattern="L+ED", last="E+N", repeat=2)
    assert [len(block.sublayers) for block in model.blocks] == [2, 2, 1]
    assert [s.number for block in model.blocks for s in block.sublayers] == [0, 2, 3, 5, 6]
    out = model(text(2, 5), keep_state=True)
    assert len(out.state.mixers) == 3 and out.loads.counts.shape == (3, 6)
    experts = [m for m in model.modules() if isinstance(m, MoE)]
    assert [m.number for m in experts] == [1, 4, 6], "each draws noise of its own"


def test_a_token_uses_some_of_the_experts_wherever_they_are():
    """Width 12: of heads 2 of 4 (or 3) experts of two matrices, of Mamba 1 of 3 of each, and 2 of 6 of 15 x 12."""
    for config, idle in (
        ({"pattern": "N+D"} | MIXTURE, 2 * 2 * 144),
        ({"pattern": "L+D"} | SEVERAL[0], 2 * 3 * 144),
        ({"pattern": "N+ELE"} | MIXTURE | SEVERAL[0], 1 * 2 * 144 + 2 * 3 * 144 + 2 * 4 * 180),
    ):
        count = sizes(make(**config).config)
        assert count["total"] - count["active"] == idle


# ------------------------------------------------------------------------------------------------------ dropout


def splitmix64(key, counter):
    """The finaliser in Python's own integers, 24 bits of it as a number in [0, 1)."""
    z = (counter + key * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return ((z ^ z >> 31) >> 40) / 2**24


@given(key=st.integers(0, 2**63 - 1), start=st.sampled_from([0, 1, 2**31, 2**50]))
def test_noise_is_the_hash_it_says(key, start):
    got = noise(key, torch.arange(start, start + 3)[None], 5)
    wanted = [[splitmix64(key, (start + t) * 5 + c) for c in range(5)] for t in range(3)]
    assert got[0].tolist() == wanted


@given(key=st.integers(0, 2**40), seed=st.integers(0, 99))
def test_a_tokens_mask_depends_on_its_number_and_the_key_alone(key, seed):
    """Not on the row, the place in it or who else is there."""
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    x = torch.ones(1, 12, 8)
    mask = dropout(x, 0.5, key, torch.arange(12)[None])
    assert torch.equal(dropout(x, 0.5, key, order[None])[0], mask[0, order])
    assert torch.equal(dropout(x.view(3, 4, 8), 0.5, key, order.view(3, 4)).view(12, 8), mask[0, order])
    assert torch.equal(dropout(x[:, :5], 0.5, key, order[None, :5])[0], mask[0, order[:5]])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_dropout_keeps_the_right_share_and_the_mean(share):
    """Over all draws, by channel and by token, within six standard deviations. What is kept becomes 1/(1-share)."""
    t, d = 2000, 64
    y = dropout(torch.ones(1, t, d, dtype=torch.float64), share, 5, torch.arange(t)[None])[0]
    assert set(y.unique().tolist()) == {0.0, 1 / (1 - share)}
    sigma = math.sqrt(share / (1 - share))
    assert abs(y.mean() - 1) < 6 * sigma / math.sqrt(t * d)
    assert (y.mean(0) - 1).abs().max() < 6 * sigma / math.sqrt(t)
    assert (y.mean(1) - 1).abs().max() < 6 * sigma / math.sqrt(d)


def test_masks_of_neighbours_have_nothing_in_common():
    """Of the next key (the next sublayer's), the next token and the next channel."""
    n = 4000
    a = noise(7, torch.arange(n)[None], 16)[0] - 0.5
    others = [
        noise(8, torch.arange(n)[None], 16)[0] - 0.5,
        a.roll(1, 0),
        a.roll(1, 1),
        noise(7 + 2**20, torch.arange(n)[None], 16)[0] - 0.5,
    ]
    for b in others:
        assert abs((a * b).mean() * 12) < 6 / math.sqrt(16 * n)


def test_models_drop_by_token_not_by_place():
    """Two texts in either order, or packed in one row: the same losses and gradients. Another key: others."""
    model, tokens, labels = make(pattern="LN", dropout=0.3), text(2, 6), text(2, 6, seed=1)
    index = torch.arange(100, 112).view(2, 6)
    plain = model(tokens, labels, index=index, key=11).losses
    turned = model(tokens.flip(0), labels.flip(0), index=index.flip(0), key=11).losses
    torch.testing.assert_close(turned.flip(0), plain, **close)
    row = model(tokens.view(1, 12), labels.view(1, 12), cu_seqlens=packed(6, 6), index=index.view(1, 12), key=11).losses
    torch.testing.assert_close(row.view(2, 6), plain, **close)
    alone = model(tokens[1:], labels[1:], index=index[1:], key=11).losses
    torch.testing.assert_close(alone, plain[1:], **close)
    for other in ({"key": 12, "index": index}, {"key": 11, "index": index + 1}, {}):
        assert not torch.allclose(model(tokens, labels, **other).losses, plain)


def test_dropout_without_token_numbers_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"key 1 needs the tokens' index") as caught:
        make(dropout=0.3)(text(2, 6), key=1)
    assert "\n" not in str(caught.value)


def test_every_sublayer_draws_its_own_mask():
    """Two sublayers with the same weights and input drop different numbers, each as the hash of its own key says."""
    model, x = make(pattern="DD", dropout=0.5), torch.ones(1, 50, 12, dtype=torch.float64)
    first, second = model.blocks[0].sublayers
    second.load_state_dict(first.state_dict())
    side = model.side(text(1, 50), None, None, torch.arange(50)[None], 9, None)
    masks = [layer(x, side)[0] != x for layer in (first, second)]
    for layer, mask in zip((first, second), masks, strict=True):
        assert torch.equal(mask, noise(9 + layer.number, side.index, 12) >= 0.5)
    assert not torch.equal(*masks)


# ----------------------------------------------------------------------------------------------- initialisation


def values(seed, reverse=False, **config):
    model = make(**config)
    how = starts(model)
    initialize(model, seed, dict(reversed(how.items())) if reverse else how)
    return {name: weight.detach().clone() for name, weight in [*model.named_parameters(), *model.named_buffers()]}


RAMPS = {"rwkv6": "w.2.bias", "mamba": "A_log", "s4": "frequency"}  # not drawn, though their numbers differ


@pytest.mark.parametrize("lsm", LSM)
def test_parameters_begin_from_the_seed_and_their_name_alone(lsm):
    first, again = values(3, lsm=lsm, pattern="LN"), values(3, True, lsm=lsm, pattern="LN")
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = values(4, lsm=lsm, pattern="LN")
    differ = {name for name in first if not torch.equal(first[name], other[name])}
    draws = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    how = starts(make(lsm=lsm, pattern="LN"))
    random = {name for name, (shape, start) in how.items() if not torch.equal(*(start(shape, rng) for rng in draws))}
    assert differ == random and {"embedding", "head"} < differ
    deeper = values(3, lsm=lsm, pattern="LNLN")
    shared = random & {n for n in deeper if deeper[n].shape == first.get(n, torch.empty(0)).shape}
    assert (
        all(torch.equal(first[name], deeper[name]) for name in shared)
        and "blocks.1.sublayers.0.inner.q.weight" in shared
    )
    assert not torch.equal(deeper["blocks.0.sublayers.1.inner.w2"], deeper["blocks.2.sublayers.1.inner.w2"])


@pytest.mark.parametrize("lsm", LSM)
def test_a_model_made_without_memory_begins_the_same(lsm):
    """Memory comes later (as when it is sharded), which makes new parameters: `starts` is asked before."""
    config = make(pattern="LN", lsm=lsm).config
    with torch.device("meta"):
        model = LanguageModel(config, ops)
    how = starts(model)
    model = model.to_empty(device="cpu")
    initialize(model, 3, how)
    whole = LanguageModel(config, ops)
    initialize(whole, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole.parameters(), strict=True))


KINDS = [{"lsm": name} for name in LSM] + [
    {"qk_norm": True, "attention_gate": True},
    {"attention": "latent", "query_rank": 4, "attention_gate": True},
    MIXTURE | SEVERAL[0],
]


@pytest.mark.parametrize("kind", KINDS, ids=names(KINDS))
def test_starts_and_decay_know_every_parameter(kind):
    """Weight decay is for the matrices that multiply activations; what starts at a value of its own is left alone."""
    model = make(**kind, pattern="LDNE", shared_width=4, shared_gate=True)
    weights = dict(model.named_parameters())
    assert set(starts(model)) == set(weights)
    falls = decayed(model)
    assert falls <= set(weights) and {"embedding", "head"} <= falls
    own = ("conv", "mix_up", "mix_bias", "u", "lower_bounds", "dt_up", "A_log", "rate", "frequency", "c")
    own += ("W", "scale", "shift", "ridge", "mix", "rho", "B_bias", "C_bias")
    own += ("A", "q", "k", "dt")  # of rows as printed: matrices under these names are no projections
    for name, weight in weights.items():
        last = name.split(".")[-1]
        if weight.ndim == 1 or last in own:
            assert name not in falls, name
        else:
            assert name in falls, name


@pytest.mark.parametrize("kind", KINDS, ids=names(KINDS))
def test_parameters_begin_where_they_should(kind):
    model = make(**kind, pattern="LLN", width=64, heads=4, shared_width=8, router="deepseek_v3")
    initialize(model, 0)
    lsm = model.config.lsm
    other = [f"inner.{name}" for name in goose(0, 3, 64, 16)] if lsm == "rwkv7" else []
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        last, x = name.split(".")[-1], weight.detach()
        if any(name.endswith(known) for known in other):
            continue  # below
        if last.endswith("norm"):
            assert (x == 1).all(), name
        elif name in decayed(model):
            assert abs(x.std() - 0.02) < 0.02 * 5 / math.sqrt(2 * x.numel()) and abs(x.mean()) < 0.1 / math.sqrt(
                x.numel()
            )
        elif last == "dt_bias" and lsm == "longhorn":
            assert (x == 0).all()
        elif last == "dt_bias":
            step = nn.functional.softplus(x)
            assert step.min() > 0.99e-3 and step.max() < 0.101
        elif last == "A_log":
            assert x.exp().max() <= 16 and x.exp().min() >= (1 if lsm.startswith("mamba") or lsm == "kda" else 1e-4)
        elif last == "dt_up":
            assert x.abs().max() <= 0.5 and x.std() > 0.2  # even in ± rank^-1/2
        elif last == "conv":
            assert x.abs().max() <= 0.5 and x.std() > 0.2  # even in ± w^-1/2
        elif last in ("L", "B_bias", "C_bias") or (last == "c" and lsm == "comba"):
            assert (x == 1).all()
        elif last == "D":
            assert 0.7 < x.std() < 1.3 if lsm == "s4" else (x == 1).all()
        elif last == "rate":  # S4D: A = -1/2 + iπn, steps between 1/1000 and 1/10, normal c
            torch.testing.assert_close(x.exp(), torch.full_like(x, 0.5))
        elif last == "frequency":
            torch.testing.assert_close(x[:, 0], (math.pi * torch.arange(len(x))).to(x.dtype), atol=1e-5, rtol=1e-6)
            assert (x == x[:, :1]).all()
        elif last == "dt_log":
            assert x.min() > math.log(0.999e-3) and x.max() < math.log(0.101) and x.std() > 1
        elif ".rates." in name or ".still." in name:  # rows as printed
            assert x.abs().max() < (0.5 if last == "A" else 5)
        elif last == "scale":
            assert (x == 1).all()
        elif last == "ridge":  # Mesa's Λ is 1
            torch.testing.assert_close(nn.functional.softplus(x) + 0.25, torch.ones_like(x))
        elif name.endswith("forget.bias"):  # Titans forgets less than 1/50 a token
            assert (x == -4).all()
        elif last == "c" and lsm == "s4":
            assert 0.65 < x.std() < 0.75
        elif name.endswith("w.2.bias"):  # RWKV6: a head's channels forget between e^-6 and e^-1 a token
            assert (x.view(4, -1)[:, 0] == -6).all() and (x.view(4, -1)[:, -1] == -1).all()
        elif name.endswith(("alpha.bias", "gamma.bias")):  # gated fast weights: gates even in (1/n, 1 - 1/n)
            gates = x.sigmoid()
            assert 1 / len(x) <= gates.min() and gates.max() <= 1 - 1 / len(x) and gates.std() > 0.15
        elif last in ("mix", "mix_bias", "u"):
            assert x.min() >= 0 and x.max() <= 1 and x.std() > 0.2
        elif last in ("mix_up", "W"):
            assert 0.015 < x.std() < 0.025
        else:
            assert last in ("bias", "conv_bias", "norm_bias", "lower_bounds", "shift", "c", "tau"), name
            assert (x == 0).all(), name


def test_hedgehog_begins_as_the_identity():
    model = make(lsm="linear_attention", feature_map="hedgehog", pattern="L")
    initialize(model, 0)
    maps = {name: x for name, x in model.named_parameters() if "phi_" in name}
    assert len(maps) == 4 and not set(maps) & decayed(model)
    assert all(torch.equal(x.float(), torch.eye(4) if x.ndim == 2 else torch.zeros(4)) for x in maps.values())


def goose(layer, layers, width, size):
    """RWKV7's vectors, channel by channel, as in its authors' training code (RWKV-LM, RWKV-v7): all are square."""
    depth, rest = layer / (layers - 1), 1 - layer / layers
    channels = range(width)
    line = [n / (width - 1) - 0.5 for n in channels]
    bend = [(n % size - (size - 1) / 2) / ((size - 1) / 2) for n in channels]
    bend = [z * abs(z) for z in bend]
    slow = [-6 + 6 * (n / (width - 1)) ** (1 + depth**0.3) + 0.5 for n in channels]
    return {
        "mix": [
            [1 - (n / width) ** (p * rest) for n in channels] for p in (0.2, 0.9, 0.7, 0.7, 0.9, 0.2)
        ],  # r w k v a g
        "w.2.bias": [a + 2.5 * b for a, b in zip(slow, bend, strict=True)],
        "a.2.bias": [-0.19 + 0.3 * b + 0.4 * a for a, b in zip(line, bend, strict=True)],
        "nu.2.bias": [0.73 - 0.4 * a for a in line],
        "xi": [0.71 - 0.1 * a for a in line],
        "alpha": [1.02] * width,
        "rho": [[-0.04] * size] * (width // size),
        "norm": [((layer + 1) / layers) ** 0.7] * width,
    }


def test_rwkv7_begins_as_its_authors_let_it():
    model = make(lsm="rwkv7", pattern="LLN", width=64, heads=4, key_size=16, value_size=16)
    initialize(model, 0)
    for layer in range(2):
        got = dict(model.blocks[layer].sublayers[0].inner.named_parameters())
        wanted = goose(layer, 3, 64, 16)
        assert ("nu.2.bias" in got) == (layer > 0)
        for name in wanted.keys() & got.keys():
            torch.testing.assert_close(got[name], torch.tensor(wanted[name], dtype=torch.float64), rtol=0, atol=2e-6)


# ------------------------------------------------------------------------------------- released models as oracles


@pytest.fixture
def no_kernels(monkeypatch):
    for package in ("fla", "mamba_ssm", "causal_conv1d"):
        assert sys.modules.get(package) is None
        monkeypatch.setitem(sys.modules, package, None)


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"num_hidden_layers": 2, "intermediate_size": 12, "rms_norm_eps": 1e-5, "attn_implementation": "sdpa"}
ATTENTION = {f"self_attn.{n}_proj.weight": f"{n}.weight" for n in "qkvo"}


def stack_of(weights, attention, feed_forward, norms="input_layernorm post_attention_layernorm"):
    """Our weights under the names of a Llama-like model of two layers."""
    theirs = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "head", "model.norm.weight": "norm"}
    for i in range(2):
        for j, (parts, norm) in enumerate(zip((attention, feed_forward), norms.split(), strict=True)):
            ours = f"blocks.{i}.sublayers.{j}"
            theirs[f"model.layers.{i}.{norm}.weight"] = f"{ours}.norm"
            theirs |= {f"model.layers.{i}.{name}": f"{ours}.inner.{own}" for name, own in parts.items()}
    return {name: weights[own] for name, own in theirs.items()}


def mixtral(weights):
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2, pad_token_id=None))
    experts = {"mlp.gate.weight": "gate", "mlp.experts.gate_up_proj": "w13", "mlp.experts.down_proj": "w2"}
    return model, stack_of(weights, ATTENTION, experts)


def llama(weights):
    from transformers import LlamaConfig, LlamaForCausalLM

    weights = dict(weights)
    for i in range(2):
        own = f"blocks.{i}.sublayers.1.inner"
        weights[f"{own}.gate"], weights[f"{own}.up"] = weights[f"{own}.w13"].chunk(2)
    dense = {"mlp.gate_proj.weight": "gate", "mlp.up_proj.weight": "up", "mlp.down_proj.weight": "w2"}
    return LlamaForCausalLM(LlamaConfig(**SIZES)), stack_of(weights, ATTENTION, dense)


OURS = {"width": 24, "heads": 4, "key_heads": 2, "repeat": 2, "dtype": torch.float32}


@pytest.mark.parametrize(
    "oracle, config",
    [
        (mixtral, {"pattern": "N", "router": "mixtral", "experts": 6, "expert_width": 12, "rope_base": 1e6}),
        (llama, {"pattern": "ND", "dense_width": 12}),
    ],
)
def test_the_stack_equals_released_models(no_kernels, oracle, config):
    """Embedding, order of norms and residuals, positions, experts, head: logits and the gradient of every weight."""
    ours, tokens = make(**OURS, **config), text(2, 33)
    weights = dict(ours.named_parameters())
    theirs, renamed = oracle(weights)
    assert {n: w.shape for n, w in renamed.items()} == {n: w.shape for n, w in theirs.named_parameters()}
    got = ours(tokens).logits
    wanted = functional_call(theirs.eval(), renamed, (), {"input_ids": tokens, "use_cache": False}).logits
    push = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    pairs = [torch.autograd.grad((y * push).sum(), list(weights.values())) for y in (got, wanted)]
    for name, a, b in zip(["logits", *weights], [got, *pairs[0]], [wanted, *pairs[1]], strict=True):
        assert b.abs().max() > 0, f"{name} does not move the oracle"
        assert (a - b).abs().max() <= 5e-6 * b.abs().max(), name


# ------------------------------------------------------------------------------------- writing token by token


CROWDED = [name for name, router in ROUTER.items() if not router.prefix_stable() and router.pooled != "always"]


@pytest.mark.parametrize("name", CROWDED)
@torch.no_grad()
def test_a_router_that_goes_by_the_whole_text_writes_by_itself(name):
    """Said in a line; then prompt and steps equal the whole, with the same parameters."""
    model = make(pattern="LN", router=name, groups=1)
    writer, otherwise = for_writing(model)
    assert ROUTER[name].title in otherwise and "\n" not in otherwise
    assert [p.data_ptr() for p in writer.parameters()] == [p.data_ptr() for p in model.parameters()]
    tokens = text(2, 9)
    whole, state, logits = writer(tokens).logits, None, []
    for piece in tokens.split([5, 1, 1, 1, 1], 1):
        out = writer(piece, state=state, keep_state=True)
        state = out.state
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, **close)
    assert not torch.allclose(model(tokens).logits, whole)  # and it is another function of the text


def test_routers_that_can_write_do_and_one_cannot():
    model = make(pattern="LN", router="mixtral")
    assert for_writing(model) == (model, "")
    with pytest.raises(ValueError, match="router Soft MoE mixes all tokens of a text: it cannot write them one by one"):
        for_writing(make(pattern="LN", router="soft"))


@pytest.mark.parametrize("name", ["gshard", "mixtral", "switch", "base"])
def test_a_router_that_looks_ahead_says_so(name):
    looks_ahead.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")  # whatever resets Python's own memory of what it said
        for _ in range(3):
            make(pattern="L", router=name)
    said = [str(w.message) for w in caught]
    assert len(said) == (not ROUTER[name].causal())  # once
    assert all("is not causal here" in line and ROUTER[name].title in line for line in said)
