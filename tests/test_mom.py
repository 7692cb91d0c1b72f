"""Mixture-of-Memories: all in one recurrence are one memory after the other, each over its own tokens."""

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracles.common import draw
from reference import exact, ops
from reference.lsm import LSM
from reference.mixers import kind
from reference.mixers.mom import MixtureOfMemories
from reference.model import Side
from test_mixers import Layer

NAMES = [name for name in LSM if issubclass(kind(name), MixtureOfMemories)]
every = pytest.mark.parametrize("name", NAMES)
LENGTH = st.sampled_from([0, 1, 1, 2, 5])


def memory_of(mixture, e: int):
    """Memory e as a layer of its own."""
    layer = copy.copy(mixture.first)
    layer._modules = {**layer._modules, **dict(mixture.others[e - 1].items() if e else ())}
    return layer


def one_by_one(mixture, x, texts, state):
    """o = Σ w_e (memory e over the tokens that were sent to it, text by text), and the states: text, memory.

    A text is (row of the batch, start, stop).
    """
    p = (x @ mixture.router.T).softmax(-1)
    best = p.topk(mixture.kept)
    weight = torch.zeros_like(p).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    weight = torch.cat([weight, torch.ones_like(weight[..., :1])], -1)  # the one that all share
    first, states = mixture.first, []
    o = x.new_zeros(*x.shape[:2], first.value_heads, first.value_size)
    for i, (row, start, stop) in enumerate(texts):
        states.append([])
        for e in range(mixture.count + 1):
            who = start + weight[row, start:stop, e].nonzero()[:, 0]
            layer, seat = memory_of(mixture, e), (torch.full_like(who, row), who)
            before = None if state is None else type(state)(*(part[i : i + 1, e] for part in state))
            tokens, constants, carried = layer.inputs(x[seat][None], Side(who[None]), before)
            y, M = exact.recurrence(layer.row, tokens, constants, before and before.memory)
            o = o.index_put(seat, weight[seat][:, e, None, None] * y[0], accumulate=True)
            states[-1].append((M, *carried))
    parts = zip(*(zip(*text, strict=True) for text in states), strict=True)
    return first.output(o, x), [torch.stack([torch.cat(memories) for memories in texts]) for texts in parts]


def in_line(x, lengths, packed):
    """(the tokens, their borders, their texts): rows of a batch of the first length, or documents of all of them."""
    if not packed:
        t = lengths[0]
        return (
            x[:, : len(lengths) * t].view(len(lengths), t, x.shape[-1]),
            None,
            [(i, 0, t) for i in range(len(lengths))],
        )
    borders = torch.tensor([0, *lengths]).cumsum(0)
    return x[:, : borders[-1]], borders.int(), [(0, a, b) for a, b in pairwise(borders.tolist())]


@every
@given(
    lengths=st.lists(LENGTH, min_size=1, max_size=3), seed=st.integers(0, 99), packed=st.booleans(), of=st.booleans()
)
@example(lengths=[1, 1, 1], seed=0, packed=False, of=True)  # one token each
@example(lengths=[0, 0], seed=0, packed=True, of=False)  # and none
@settings(max_examples=8)
def test_all_memories_at_once_are_one_after_the_other(name, lengths, seed, packed, of):
    """Outputs, states and every gradient, from nothing and from a state."""
    layer = Layer(name, seed=seed, memories=4, memories_kept=2)
    x, cu_seqlens, texts = in_line(draw(1, 20, 12, seed=seed), lengths, packed)
    like, leaves = layer(x, cu_seqlens=cu_seqlens)[1], [x.requires_grad_(), *layer.inner.parameters()]
    state = type(like)(*(draw(*y.shape, seed=seed + i).requires_grad_() for i, y in enumerate(like))) if of else None
    leaves += state or ()
    y, after = layer(x, state, torch.zeros(len(lengths), dtype=torch.int64), cu_seqlens)
    pairs = [(y, *after)]
    y, after = one_by_one(layer.inner, x, texts, state)
    pairs.append((y, *after))
    for got, wanted in zip(*pairs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    seeds = [draw(*y.shape, seed=seed + i) for i, y in enumerate(pairs[0])]
    losses = [sum((y * seed).sum() for y, seed in zip(ys, seeds, strict=True)) for ys in pairs]
    grads = [torch.autograd.grad(loss, leaves, materialize_grads=True) for loss in losses]
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():  # one token a sequence takes the step
        again = layer(x, state, torch.zeros(len(lengths), dtype=torch.int64), cu_seqlens)
    torch.testing.assert_close((again[0], *again[1]), pairs[1], rtol=1e-12, atol=1e-12)


@every
@pytest.mark.parametrize("tokens", [1, 7])
def test_one_call_runs_all_memories(name, tokens):
    """Of the recurrence, or of the step; of the convolution, and of each projection."""
    called = Counter()
    names = ("recurrence", "step", "short_convolution", "linears")
    spied = {n: lambda *x, n=n: (called.update([n]), getattr(ops, n)(*x))[1] for n in names}
    layer, x = Layer(name, ops=ops._replace(**spied), memories=4, memories_kept=2), draw(2, 8, 12)
    with torch.no_grad():
        state = layer(x[:, tokens:])[1]
        called.clear()
        layer(x[:, :tokens], state)
    run = "step" if tokens == 1 else "recurrence"
    assert called == {run: 1, "linears": 4} | ({} if name == "mom_gla" else {"short_convolution": 1})


@every
def test_a_memory_that_nobody_visits_gets_a_gradient_of_zeros(name):
    """Not none: an optimizer that sees none would leave its own state of the memory as it is."""
    layer, x = Layer(name, memories=4, memories_kept=2), draw(2, 9, 12)
    with torch.no_grad():
        x[..., 0] = 1.0
        layer.inner.router.zero_()[1:3, 0] = 9.0
    layer(x)[0].square().sum().backward()
    gradients = {n: w.grad for n, w in layer.inner.others.named_parameters()}  # from the second to the shared one
    assert all(gradient is not None for gradient in gradients.values())
    moved = {n.split(".")[0] for n, gradient in gradients.items() if gradient.any()}
    assert moved == {"0", "1", "3"}
