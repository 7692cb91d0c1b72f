"""The small tasks: labels against solvers in plain Python, samples as functions of (seed, index), two sides apart."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.stream import IGNORED
from data.tasks import TASK, held_out, samples

SEEDS = st.integers(0, 2**63 - 1)


@st.composite
def sizes(draw, name):
    """Sizes that the task accepts, large enough to have sequences on both sides."""
    drawn = {
        "recall": lambda: recall_sizes(draw),
        "copying": lambda: copying_sizes(draw),
        "induction": lambda: {"length": draw(st.integers(8, 40)), "alphabet": draw(st.integers(2, 20))},
        "parity": lambda: {"length": draw(st.integers(8, 70))},
    }
    return drawn[name]()


def recall_sizes(draw):
    pairs = draw(st.integers(2, 9))
    keys, values = pairs + draw(st.integers(2, 9)), draw(st.integers(3, 9))
    return {"length": 2 * draw(st.integers(4, 30)), "pairs": pairs, "keys": keys, "values": values}


def copying_sizes(draw):
    letters = draw(st.integers(3, 9))
    return {"length": letters + draw(st.integers(2, 30)), "letters": letters, "alphabet": draw(st.integers(4, 20))}


# ------------------------------------------------------------------------------------------------------ the solvers
# Each reads the tokens of one sample from left to right and says what a perfect model says.


def solve_recall(tokens, length, pairs, keys, values):
    known, said = {}, []
    for key, value in zip(tokens[::2], tokens[1::2], strict=True):
        assert key < keys <= value
        said += [known.get(key, IGNORED), IGNORED]
        assert known.setdefault(key, value) == value, "a key with two values"
    assert len(tokens) == length and len(known) <= pairs
    return said


def solve_copying(tokens, length, letters, alphabet):
    seen, said = [], []
    for i, token in enumerate(tokens):
        assert (token == 1) == (i >= length)
        seen += [token] if token > 1 else []
        said.append(seen[i - length] if token == 1 else IGNORED)
    assert len(seen) == letters and len(tokens) == length + letters
    return said


def solve_induction(tokens, length, alphabet):
    after, said, before = {}, [], None
    for token in tokens:
        if before is not None:
            after[before] = token
        said.append(after.get(token, IGNORED))
        before = token
    return said


def solve_parity(tokens, length):
    state, said = False, []
    for token in tokens:
        state ^= token == 1
        said.append(int(state))
    return said


SOLVER = {"recall": solve_recall, "copying": solve_copying, "induction": solve_induction, "parity": solve_parity}


@pytest.mark.parametrize("name", TASK)
@given(data=st.data(), seed=SEEDS, test=st.booleans())
def test_labels_are_those_of_a_plain_solver(name, data, seed, test):
    size = data.draw(sizes(name))
    batch = samples(name, range(5), seed, test, **size)
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.tokens.min() >= 0 and batch.tokens.max() < TASK[name].vocabulary(**size)
    for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
        assert SOLVER[name](tokens, **size) == labels


@pytest.mark.parametrize("name", TASK)
def test_the_tables_own_sizes_and_the_longer_ones(name):
    row = TASK[name]
    longer = {size: row.sizes[size] * times for size, times in row.longer.items()}
    trained, tested = samples(name, range(64)), samples(name, range(64), test=True, **longer)
    assert tested.tokens.shape[1] > trained.tokens.shape[1]
    assert row.vocabulary(**{**row.sizes, **longer}) == row.vocabulary(**row.sizes), "the model knows every token"
    for batch, size in ((trained, row.sizes), (tested, {**row.sizes, **longer})):
        assert (batch.labels >= 0).any(1).all()
        for tokens, labels in zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True):
            assert SOLVER[name](tokens, **size) == labels
    assert re.fullmatch(r"\d{4}\.\d{5}", row.paper)


@pytest.mark.parametrize("name", TASK)
def test_every_answer_is_as_likely_as_the_next(name):
    """What a model gets that knows nothing: the chance that the picture's colours start from."""
    row = TASK[name]
    said = samples(name, range(4000)).labels
    counts = said[said >= 0].unique(return_counts=True)[1].float()
    assert len(counts) == row.answers(**row.sizes)
    assert (counts / counts.mean() - 1).abs().max() < 0.15


# ------------------------------------------------------------------------------------------------- the randomness


@pytest.mark.parametrize("name", TASK)
@given(data=st.data(), seed=SEEDS, test=st.booleans())
def test_a_sample_is_the_same_whatever_the_batch(name, data, seed, test):
    size = data.draw(sizes(name))
    indices = data.draw(st.lists(st.integers(0, 2**40), min_size=1, max_size=6))
    together = samples(name, indices, seed, test, **size)
    for i, index in enumerate(indices):
        alone = samples(name, [index], seed, test, **size)
        assert torch.equal(alone.tokens[0], together.tokens[i]) and torch.equal(alone.labels[0], together.labels[i])


@pytest.mark.parametrize("name", TASK)
def test_samples_differ_by_index_and_by_seed(name):
    rows = [tuple(x) for seed in range(3) for x in samples(name, range(300), seed).tokens.tolist()]
    assert len(set(rows)) == len(rows)


def test_a_sample_is_the_same_on_every_machine():
    """The draws are a hash of our own, and results from other days stay comparable."""
    bits = [1, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1]
    assert samples("parity", [7], 3, length=16).tokens[0].tolist() == bits
    pairs = [4, 5, 0, 5, 1, 8, 4, 5, 1, 8]
    assert samples("recall", [0], 0, length=10, pairs=3, keys=5, values=4).tokens[0].tolist() == pairs


@pytest.mark.parametrize("name", TASK)
@given(data=st.data(), seeds=st.tuples(SEEDS, SEEDS))
def test_no_held_out_sequence_is_trained_on(name, data, seeds):
    """Of sizes so small that every sequence is drawn many times, under any two seeds."""
    small = {
        "recall": {"length": 4, "pairs": 2, "keys": 3, "values": 3},
        "copying": {"length": 4, "letters": 2, "alphabet": 3},
        "induction": {"length": 4, "alphabet": 3},
        "parity": {"length": 6},
    }[name]
    train, test = (
        {tuple(x) for x in samples(name, range(400), seed, side, **small).tokens.tolist()}
        for seed, side in zip(seeds, (False, True), strict=True)
    )
    assert train and test and not train & test


def test_one_sample_in_four_is_held_out():
    import numpy as np

    tokens = (np.arange(2**14)[:, None] >> np.arange(14)) % 2
    assert held_out(tokens).mean() == pytest.approx(0.25, abs=0.01)
    assert (held_out(tokens) == held_out(tokens[::-1])[::-1]).all()


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "name, how, message",
    [
        ("recal", {}, "unknown task 'recal'; expected one of recall, copying, induction, parity"),
        ("parity", {"pairs": 3}, "parity has no size 'pairs'; it has length"),
        ("parity", {"length": 0}, "length >= 1, found length=0"),
        ("parity", {"seed": -1}, "at least 0, found -1"),
        ("recall", {"pairs": 0}, "recall of 0 pairs"),
        ("recall", {"pairs": 40}, "40 pairs needs.*as many keys.*found keys=32"),
        ("recall", {"length": 23}, "even length.*length=23"),
        ("recall", {"length": 2}, "length of 4 or more.*length=2"),
        ("recall", {"values": 0}, "values=0"),
        ("copying", {"letters": 30, "length": 29}, "letters=30, length=29"),
        ("copying", {"letters": 0}, "letters=0"),
        ("copying", {"alphabet": 0}, "alphabet=0"),
        ("induction", {"length": 2}, "length=2"),
        ("induction", {"alphabet": 0}, "alphabet=0"),
        ("induction", {"alphabet": 1}, "too few sequences"),
    ],
)
def test_bad_sizes_are_one_line(name, how, message):
    with pytest.raises(ValueError, match=message) as found:
        samples(name, range(3), test=how.pop("test", True), **how)
        samples(name, range(3), test=False, **how)
    assert "\n" not in str(found.value)
