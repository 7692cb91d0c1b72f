"""Small tasks that tell families of sequence models apart, drawn as a function of (seed, index).

A task is a row of `TASK`: how a sample is drawn, its sizes, and what it separates. Sample i of a seed is the same
whatever the batch around it; it is drawn again until a hash of its tokens, and of nothing else, falls on its side:
one sample in four is held out, so no held-out sequence is ever trained on, under any seed.

    b batch   t time   n draws of a sample
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt64
from torch import Tensor

from data.stream import IGNORED

ROUNDS = 256  # redraws before the sizes are said to be too small for two sides


class Samples(NamedTuple):
    """Rows of one task."""

    tokens: Int64[Tensor, "b t"]
    labels: Int64[Tensor, "b t"]  # what is to be predicted at each token; -100 where nothing is


class Task(NamedTuple):
    """One task of the table. `draw` takes the randomness and the sizes by name, and raises ValueError for bad ones."""

    draw: Callable[..., tuple[np.ndarray, np.ndarray]]
    vocabulary: Callable[..., int]  # number of tokens, from the sizes
    answers: Callable[..., int]  # how many answers are equally likely before anything is known
    sizes: Mapping[str, int]  # of training
    longer: Mapping[str, int]  # how many times larger some of them are when the trained model is asked for more
    title: str
    paper: str
    separates: str


# ------------------------------------------------------------------------------- randomness that is a function


def mixed(z: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """The splitmix64 finaliser (Steele et al., OOPSLA 2014): every bit of the result depends on every bit of z."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def steps(count: Int64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    """splitmix64's increments: numbers that lie near each other come far apart, and 0 away from 0."""
    return (count.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)


def chained(*parts: int | Int64[np.ndarray, " b"]) -> UInt64[np.ndarray, " b"]:
    """A hash of the parts in their order."""
    z = np.zeros(1, np.uint64)
    for part in parts:
        z = mixed(z + steps(np.atleast_1d(part)))
    return z


class Draw:
    """The randomness of b samples: row i depends on (seed, round, index_i) and on what was drawn before, only."""

    def __init__(self, seed: int, turn: int, indices: Int64[np.ndarray, " b"]):
        self.rows, self.drawn = chained(seed, turn, indices)[:, None], 0

    def bits(self, n: int) -> UInt64[np.ndarray, "b n"]:
        counters = np.arange(self.drawn, self.drawn + n)
        self.drawn += n
        return mixed(self.rows + steps(counters))

    def below(self, high: int, n: int) -> Int64[np.ndarray, "b n"]:
        """n numbers in 0 ... high - 1."""
        return (self.bits(n) % np.uint64(high)).astype(np.int64)

    def choice(self, n: int, count: int) -> Int64[np.ndarray, "b n"]:
        """`count` different numbers in 0 ... n - 1, in random order."""
        return np.argsort(self.bits(n), 1, kind="stable")[:, :count]


def latest(x: Int64[np.ndarray, "b n"]) -> Int64[np.ndarray, "b n"]:
    """Where each entry stood the last time before, -1 if nowhere."""
    at = np.arange(x.shape[1])
    same = (x[:, :, None] == x[:, None, :]) & (at[None, :] < at[:, None])
    return np.where(same, at, -1).max(2)


# ------------------------------------------------------------------------------------------------------ the tasks


def recall(draw: Draw, length: int, pairs: int, keys: int, values: int) -> tuple[np.ndarray, np.ndarray]:
    """k v k v ...: each key of a sample always stands before the same value. At a key that stood before, say its value.

    Tokens: the keys, then the values. A sample has `pairs` different keys, in any order and as often as it happens;
    values may be shared.
    """
    if not 1 <= pairs <= keys or values < 1 or length < 4 or length % 2:
        raise ValueError(
            f"recall of {pairs} pairs needs 1 or more of them, as many keys, a value and an even length of 4 or more; "
            f"found keys={keys}, values={values}, length={length}"
        )
    key, value = draw.choice(keys, pairs), keys + draw.below(values, pairs)
    which = draw.below(pairs, length // 2)
    tokens = np.stack([np.take_along_axis(x, which, 1) for x in (key, value)], 2).reshape(len(key), length)
    labels = np.full(tokens.shape, IGNORED)
    labels[:, ::2] = np.where(latest(which) < 0, IGNORED, tokens[:, 1::2])
    return tokens, labels


def copying(draw: Draw, length: int, letters: int, alphabet: int) -> tuple[np.ndarray, np.ndarray]:
    """Letters scattered among `length` places of noise, then as many marks: the letters are to be said in order.

    Tokens: 0 noise, 1 mark, then the alphabet.
    """
    if not 1 <= letters <= length or alphabet < 1:
        raise ValueError(
            f"copying needs 1 <= letters <= length and an alphabet, found letters={letters}, length={length}, "
            f"alphabet={alphabet}"
        )
    letter = 2 + draw.below(alphabet, letters)
    b = len(letter)
    tokens, labels = np.ones((b, length + letters), np.int64), np.full((b, length + letters), IGNORED)
    tokens[:, :length] = 0
    np.put_along_axis(tokens, np.sort(draw.choice(length, letters), 1), letter, 1)
    labels[:, length:] = letter
    return tokens, labels


def induction(draw: Draw, length: int, alphabet: int) -> tuple[np.ndarray, np.ndarray]:
    """Random letters. Where a letter stood before, what followed it the last time is to be said: A B ... A -> B."""
    if length < 3 or alphabet < 1:
        raise ValueError(
            f"induction needs length >= 3 (A B A) and an alphabet, found length={length}, alphabet={alphabet}"
        )
    tokens = draw.below(alphabet, length)
    last = latest(tokens)
    following = np.take_along_axis(tokens, last + 1, 1)
    return tokens, np.where(last < 0, IGNORED, following)


def parity(draw: Draw, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits; at each of them: is the number of ones so far odd?"""
    if length < 1:
        raise ValueError(f"parity needs length >= 1, found length={length}")
    tokens = draw.below(2, length)
    return tokens, tokens.cumsum(1) % 2


TASK: dict[str, Task] = {
    "recall": Task(
        recall,
        lambda length, pairs, keys, values: keys + values,
        lambda length, pairs, keys, values: values,
        {"length": 64, "pairs": 16, "keys": 32, "values": 16},
        {"pairs": 2, "length": 2},
        "Multi-query associative recall",
        "2312.04927",
        "how many pairs a memory holds apart: large memories and delta rules from sums that never forget",
    ),
    "copying": Task(
        copying,
        lambda length, letters, alphabet: 2 + alphabet,
        lambda length, letters, alphabet: alphabet,
        {"length": 24, "letters": 8, "alphabet": 16},
        {"length": 4},
        "Selective copying",
        "2312.00752",
        "what is written depends on the token: noise must not be remembered",
    ),
    "induction": Task(
        induction,
        lambda length, alphabet: alphabet,
        lambda length, alphabet: alphabet,
        {"length": 32, "alphabet": 16},
        {"length": 4},
        "Induction heads",
        "2209.11895",
        "a token is found again by the one before it: two layers, or a short convolution",
    ),
    "parity": Task(
        parity,
        lambda length: 2,
        lambda length: 2,
        {"length": 32},
        {"length": 4},
        "Parity",
        "2411.12537",
        "a state that flips: transitions with negative eigenvalues from pure decays",
    ),
}


# ---------------------------------------------------------------------------------------------------- the samples


def task(name: str) -> Task:
    """The task of that name; ValueError lists the names there are."""
    if name not in TASK:
        raise ValueError(f"unknown task {name!r}; expected one of {', '.join(TASK)}")
    return TASK[name]


def held_out(tokens: Int64[np.ndarray, "b t"]) -> Bool[np.ndarray, " b"]:
    """Whether each sequence is for testing: one in four, by the tokens alone."""
    places = np.arange(tokens.shape[1]) << 32
    return mixed(mixed(steps(tokens + places)).sum(1, dtype=np.uint64)) % np.uint64(4) == 0


def samples(name: str, indices: Iterable[int], seed: int = 0, test: bool = False, **sizes: int) -> Samples:
    """The samples of these indices, of a task's training side or of its test side; `sizes` replace the task's own.

    Raises ValueError, in one line, for an unknown task, for sizes that it does not have or that cannot be, and for
    sizes so small that one side is empty.
    """
    row = task(name)
    unknown = [size for size in sizes if size not in row.sizes]
    if unknown:
        raise ValueError(f"{name} has no size {unknown[0]!r}; it has {', '.join(row.sizes)}")
    if seed < 0:
        raise ValueError(f"a seed must be at least 0, found {seed}")
    sizes = {**row.sizes, **sizes}
    indices = np.array(list(indices), np.int64)
    tokens, labels = row.draw(Draw(seed, 0, indices), **sizes)
    for turn in range(1, ROUNDS):
        wrong = np.flatnonzero(held_out(tokens) != test)
        if not len(wrong):
            return Samples(torch.from_numpy(tokens), torch.from_numpy(labels))
        tokens[wrong], labels[wrong] = row.draw(Draw(seed, turn, indices[wrong]), **sizes)
    side = "test" if test else "training"
    raise ValueError(f"{name} with {said(sizes)} has too few sequences: none of {ROUNDS} draws was for the {side} side")


def said(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={size}" for name, size in sizes.items())
