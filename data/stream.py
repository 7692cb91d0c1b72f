"""Training samples as a function of (seed, index), and validation batches that predict every byte once.

An epoch is the documents in a shuffled order, each as [START, bytes ...], cut in windows of `length` + 1 tokens that
overlap by one, visited in a shuffled order. Sample i is window i % windows of epoch i // windows: there is no state, so
a resumed run, and any number of ranks, see the same data. The text is kept once; an epoch is two permutations.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from data.corpus import START, Document

IGNORED = -100  # the label that torch's cross entropy skips


class Batch(NamedTuple):
    """Rows packed one after the other (b == 1). Every row, and every document inside a row, is a piece of its own."""

    tokens: Int64[Tensor, "1 t"]
    labels: Int64[Tensor, "1 t"]  # the next token; -100 where that is START
    positions: Int64[Tensor, "1 t"]  # inside the piece, from 0
    cu_seqlens: Int32[Tensor, "pieces+1"]  # where pieces begin, and the end; no piece is empty
    indices: Int64[Tensor, "1 t"]  # the token's number in the whole run, the key of its dropout


class _Epoch(NamedTuple):
    documents: Int64[np.ndarray, "n"]  # in the order of this epoch
    ends: Int64[np.ndarray, "n"]  # where each ends in the epoch's stream
    windows: Int64[np.ndarray, "w"]  # in the order of the visits


class Stream:
    """Random access to the samples of a corpus: `length` tokens each, `windows` of them an epoch.

    The last tokens of an epoch that fill no window (fewer than `length` + 1) are left out of it; the next epoch is
    shuffled anew. Raises ValueError if the text is shorter than one window.
    """

    def __init__(self, documents: Sequence[Document], length: int, seed: int):
        if length < 1 or seed < 0:
            raise ValueError(f"a stream needs length >= 1 and seed >= 0, found length={length} and seed={seed}")
        self.length, self.seed = length, seed
        self.text = np.frombuffer(b"".join(d.text for d in documents), np.uint8)
        self.sizes = np.array([len(d.text) + 1 for d in documents], np.int64)  # START included
        self.windows = int(self.sizes.sum() - 1) // length
        if self.windows < 1 or not self.text.size:
            raise ValueError(
                f"the text is shorter than one window: length {length} needs {length + 1} tokens, found "
                f"{self.sizes.sum()} ({self.text.size} bytes, {len(documents)} documents with a start token each)"
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffled)  # two: a batch may reach into the next epoch

    def _shuffled(self, epoch: int) -> _Epoch:
        documents = _permutation(len(self.sizes), self.seed, (epoch, 0))
        return _Epoch(documents, self.sizes[documents].cumsum(), _permutation(self.windows, self.seed, (epoch, 1)))

    def sample(self, index: int) -> Int64[np.ndarray, "length+1"]:
        """The tokens of sample `index`: `length` inputs, each followed by its label."""
        if index < 0:
            raise ValueError(f"samples count from 0, found sample {index}")
        epoch = self._epoch(index // self.windows)
        at = epoch.windows[index % self.windows] * self.length + np.arange(self.length + 1)
        place = np.searchsorted(epoch.ends, at, side="right")
        document = epoch.documents[place]
        offset = at - epoch.ends[place] + self.sizes[document]  # in the document; 0 is its START
        byte = self.text.take(self._first[document] + offset - 1, mode="clip").astype(np.int64)
        return np.where(offset == 0, START, byte)

    @functools.cached_property
    def _first(self) -> Int64[np.ndarray, "n"]:
        return (self.sizes - 1).cumsum() - (self.sizes - 1)  # each document's first byte in the text

    def batch(self, samples: Sequence[int]) -> Batch:
        """The samples in the order given, a row each; t = len(samples) * length."""
        samples = np.array([int(i) for i in samples], np.int64)
        rows = np.array([self.sample(int(i)) for i in samples], np.int64).reshape(-1, self.length + 1)
        tokens, following = rows[:, :-1], rows[:, 1:]
        begins = tokens == START
        begins[:, 0] = True
        return _packed(
            tokens.ravel(),
            np.where(following == START, IGNORED, following).ravel(),
            begins.ravel(),
            (samples[:, None] * self.length + np.arange(self.length)).ravel(),
        )


def _permutation(n: int, seed: int, key: tuple[int, ...]) -> Int64[np.ndarray, "n"]:
    # By sorting raw draws: numpy promises never to change those of SeedSequence and Philox, unlike `permutation`.
    return np.argsort(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(n), kind="stable")


def _packed(
    tokens: Int64[np.ndarray, "t"],
    labels: Int64[np.ndarray, "t"],
    begins: Bool[np.ndarray, "t"],
    indices: Int64[np.ndarray, "t"],
) -> Batch:
    at = np.arange(len(tokens))
    positions = at - np.maximum.accumulate(np.where(begins, at, 0))
    borders = np.append(np.flatnonzero(begins), len(tokens)).astype(np.int32)
    row = (torch.from_numpy(np.ascontiguousarray(x, np.int64))[None] for x in (tokens, labels, positions, indices))
    tokens, labels, positions, indices = row
    return Batch(tokens, labels, positions, torch.from_numpy(borders), indices)


def evaluation(documents: Sequence[Document], length: int, rows: int) -> Iterator[Batch]:
    """Batches of at most `rows` * `length` tokens in which every byte of the documents is a label once, in order.

    A document is cut in pieces of `length` tokens (the last may be shorter). Its first piece begins with START; a later
    one begins with the last byte before it, and knows nothing else of what came before. No label is ignored, so the
    summed loss over (bytes * ln 2) is bits per byte. `indices` count the bytes. Empty documents are skipped.
    Raises ValueError at once for a length or rows below 1.
    """
    if length < 1 or rows < 1:
        raise ValueError(f"an evaluation needs length >= 1 and rows >= 1, found length={length} and rows={rows}")
    return _evaluation(documents, length, rows * length)


def _evaluation(documents: Sequence[Document], length: int, limit: int) -> Iterator[Batch]:
    pending, size, done = [], 0, 0
    for piece in _pieces(documents, length):
        if size + len(piece[0]) > limit:
            yield _joined(pending, done)
            pending, size, done = [], 0, done + size
        pending.append(piece)
        size += len(piece[0])
    if pending:
        yield _joined(pending, done)


def _pieces(documents: Sequence[Document], length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for document in documents:
        labels = np.frombuffer(document.text, np.uint8).astype(np.int64)
        tokens = np.insert(labels[:-1], 0, START)
        for i in range(0, len(labels), length):
            yield tokens[i : i + length], labels[i : i + length]


def _joined(pieces: list[tuple[np.ndarray, np.ndarray]], done: int) -> Batch:
    tokens, labels = (np.concatenate(side) for side in zip(*pieces, strict=True))
    begins = np.zeros(len(tokens), bool)
    begins[np.cumsum([0] + [len(piece[0]) for piece in pieces[:-1]])] = True
    return _packed(tokens, labels, begins, done + np.arange(len(tokens)))
