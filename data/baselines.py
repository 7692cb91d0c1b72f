"""What a compressor and a byte n-gram get on the same split, in bits per byte; and what a sample has by heart.

The n-gram is interpolated, modified Kneser-Ney (Kneser & Ney, ICASSP 1995; Chen & Goodman, Computer Speech & Language
13(4), 1999, section 3), with w a byte, h the n bytes before it, h' the last n - 1 of them, c a count:

    p_n(w | h) = (c(h w) - D[c(h w)]) / c(h)  +  sum_w' D[c(h w')] / c(h) * p_{n-1}(w | h')        p_{-1} = 1 / 256

c counts occurrences at the model's own order, and below it the different symbols seen in front of `h w`. The discount D
depends on the count (0, 1, 2, 3 or more) and is estimated from the counts of counts. A context never seen hands over
to the shorter one. Contexts stop at the document's start, which is START, n times over.

An n-gram of order n is one int64: 9 bits a symbol, the byte predicted in the lowest, the oldest in the highest.
"""

import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from data.corpus import BYTES, START, Document

LARGEST = 6  # 7 symbols of 9 bits fill an int64
FALLBACK = (0.5, 1.0, 1.5)  # where counts of counts say nothing (tiny texts): half of each count


class Level(NamedTuple):
    """The sorted n-grams of one order, and what is needed of each context: c(h) and the mass discounted from it."""

    keys: Int64[np.ndarray, "n"]
    counts: Int64[np.ndarray, "n"]
    contexts: Int64[np.ndarray, "c"]
    totals: Int64[np.ndarray, "c"]
    discounted: Float64[np.ndarray, "c"]
    discounts: Float64[np.ndarray, "4"]


def ngram(
    training: Sequence[Document], validation: Sequence[Document], order: int, discounts: Sequence[float] | None = None
) -> float:
    """Bits per byte over `validation` of the n-gram with `order` bytes of context; see `ngrams`."""
    return ngrams(training, validation, (order,), discounts)[order]


def ngrams(
    training: Sequence[Document],
    validation: Sequence[Document],
    orders: Sequence[int] = (2, 4),
    discounts: Sequence[float] | None = None,
) -> dict[int, float]:
    """{order: bits per byte over `validation`} of n-grams that have seen `training`, all orders from one sort.

    `discounts` are D[1], D[2], D[3 or more], used at every order; estimated from `training` if None.
    Raises ValueError for an order outside 0 ... 6, discounts not in 0 < D[i] <= i, or a side without text.
    """
    for side, documents in (("training", training), ("validation", validation)):
        if not any(d.text for d in documents):
            raise ValueError(f"an n-gram needs {side} text, found {len(documents)} documents and 0 bytes")
    models = fit(training, orders, discounts)
    keys, counts = _count(_grams(validation, max(orders)))
    bits = {order: -np.log2(probability(models[order], keys)) for order in orders}
    return {order: float(counts @ bits[order] / counts.sum()) for order in orders}


def fit(
    training: Sequence[Document], orders: Sequence[int], discounts: Sequence[float] | None = None
) -> dict[int, list[Level]]:
    """{order: its levels, the shortest context first}. Orders share the levels below their own."""
    if not orders or not all(0 <= order <= LARGEST for order in orders):
        raise ValueError(f"n-grams have orders 0 ... {LARGEST} (bytes of context), found {tuple(orders)}")
    if discounts is not None and not (len(discounts) == 3 and all(0 < d <= i for i, d in enumerate(discounts, 1))):
        raise ValueError(f"expected three discounts with 0 < D[i] <= i, i = 1, 2, 3, found {tuple(discounts)}")
    keys, counts = _count(_grams(training, max(orders)))
    own, below = {max(orders): _level(keys, counts, discounts)}, {}
    for order in reversed(range(max(orders))):
        shorter = keys & _mask(order)  # drops the oldest byte: each key is one different byte in front
        below[order] = _level(*_count(shorter), discounts)
        keys, counts = _count(shorter, counts)
        own[order] = _level(keys, counts, discounts)
    return {order: [below[n] for n in range(order)] + [own[order]] for order in orders}


def probability(levels: Sequence[Level], keys: Int64[np.ndarray, "n"]) -> Float64[np.ndarray, "n"]:
    """p(w | h) of each key, a packed n-gram at least as long as the model's."""
    p = np.full(len(keys), 1 / BYTES)
    for order, level in enumerate(levels):
        gram = keys & _mask(order)
        count = _look_up(level.keys, level.counts, gram)
        total = _look_up(level.contexts, level.totals, gram >> 9)
        rest = _look_up(level.contexts, level.discounted, gram >> 9)
        seen = (count - level.discounts[np.minimum(count, 3)] + rest * p) / np.maximum(total, 1)
        p = np.where(total > 0, seen, p)
    return p


def distribution(levels: Sequence[Level], context: bytes) -> Float64[np.ndarray, "256"]:
    """p(. | context): the next byte of a document of which `context` is all, or at least `order` bytes, so far."""
    order = len(levels) - 1
    symbols = [START] * order + list(context)
    h = 0
    for symbol in symbols[len(symbols) - order :]:
        h = h << 9 | symbol
    return probability(levels, (h << 9) + np.arange(BYTES))


def _mask(order: int) -> int:
    return (1 << 9 * (order + 1)) - 1


def _grams(documents: Sequence[Document], order: int) -> Int64[np.ndarray, "n"]:
    """Every byte of the documents with the `order` symbols before it, packed: 8 bytes of memory a byte of text."""
    start = np.full(order, START, np.uint16)
    parts = [part for d in documents for part in (start, np.frombuffer(d.text, np.uint8))]
    symbols = np.concatenate([*parts, np.empty(0, np.uint16)])
    keys = np.zeros(len(symbols) - order, np.int64)
    for i in range(order + 1):
        keys <<= 9
        keys |= symbols[i : len(symbols) - order + i]
    return keys[keys & 0x1FF != START]


def _count(
    keys: Int64[np.ndarray, "n"], weights: Int64[np.ndarray, "n"] | None = None
) -> tuple[Int64[np.ndarray, "u"], Int64[np.ndarray, "u"]]:
    """Sorted unique keys, and how often each occurs (or the sum of its weights)."""
    if weights is None:
        return np.unique(keys, return_counts=True)
    order = np.argsort(keys)
    keys = keys[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    return keys[first], np.add.reduceat(weights[order], first)


def _level(keys: Int64[np.ndarray, "n"], counts: Int64[np.ndarray, "n"], discounts: Sequence[float] | None) -> Level:
    D = np.array([0.0, *(_discounts(counts) if discounts is None else discounts)])
    first = np.flatnonzero(np.diff(keys >> 9, prepend=-1))
    totals, discounted = (np.add.reduceat(x, first) for x in (counts, D[np.minimum(counts, 3)]))
    return Level(keys, counts, keys[first] >> 9, totals, discounted, D)


def _discounts(counts: Int64[np.ndarray, "n"]) -> Sequence[float]:
    """D[i] = i - (i + 1) Y n_{i+1} / n_i,  Y = n_1 / (n_1 + 2 n_2),  n_i of the n-grams occur i times."""
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    if not n[1:5].all():
        return FALLBACK
    Y = n[1] / (n[1] + 2 * n[2])
    D = [i - (i + 1) * Y * n[i + 1] / n[i] for i in (1, 2, 3)]
    return D if min(D) > 0 else FALLBACK  # a context must keep something for what it has not seen


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)


def zlib_bits(validation: Sequence[Document]) -> float:
    """Bits per byte of zlib, level 9, over the documents one after the other; it sees no training text."""
    text = b"".join(d.text for d in validation)
    if not text:
        raise ValueError(f"zlib needs text, found {len(validation)} documents and 0 bytes")
    return 8 * len(zlib.compress(text, 9)) / len(text)


def longest_match(sample: bytes, training: bytes) -> int:
    """Bytes of the longest substring of `sample` that occurs in `training`, exactly.

    A match of 2 s - 1 bytes or more covers one of the training text's aligned blocks of s bytes, so one pass that
    compares aligned blocks with the sample finds where such matches lie; only there single bytes are looked at.
    s = 8 first, and shorter blocks only when nothing long enough was found.
    """
    for size in (8, 4, 2):
        best = _longest_around_blocks(sample, training, size)
        if best >= 2 * size - 1:
            return best
    pairs = any(sample[i : i + 2] in training for i in range(len(sample) - 1))
    return 2 if pairs else int(any(byte in training for byte in sample))


def _longest_around_blocks(sample: bytes, training: bytes, size: int) -> int:
    """The longest match that covers an aligned block of `size` bytes and starts less than `size` before it; else 0.

    A substring of the sample is known by its class: equal ones share a number. Each place in the training text carries
    one class, not the many places of the sample that it stands for, or 300 blanks would mean millions of pairs.
    """
    if min(len(sample), len(training)) < size:
        return 0
    s, t = np.frombuffer(sample, np.uint8), np.frombuffer(training, np.uint8)
    grams = np.lib.stride_tricks.sliding_window_view(s, size).copy().view(f"u{size}")[:, 0]
    unique, classes = np.unique(grams, return_inverse=True)
    at, state = _hits(unique, np.frombuffer(training, f"u{size}", len(training) // size))
    at, best = at * size, 0
    for n in range(size, 2 * size):  # a block, with n - size bytes before it
        if len(at) == 0:
            break
        best = max(best, _longest_from(s, t, n, classes, at, state))
        at, state = at[at > 0] - 1, state[at > 0]
        classes, state, known = _grown(classes[1:], s[: len(s) - n], state, t[at])
        at = at[known]
    return best


def _hits(unique: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where blocks are among the sorted `unique`, and which they are."""
    pair = np.zeros(1 << 16, bool)  # most blocks differ in two bytes already, and a table is faster than a search
    pair[unique.view(np.uint16)[:: unique.itemsize // 2]] = True
    at = np.flatnonzero(pair[blocks.view(np.uint16)[:: blocks.itemsize // 2]])
    place = np.minimum(np.searchsorted(unique, blocks[at]), len(unique) - 1)
    same = unique[place] == blocks[at]
    return at[same], place[same]


def _longest_from(s: np.ndarray, t: np.ndarray, n: int, classes: np.ndarray, at: np.ndarray, state: np.ndarray) -> int:
    """Bytes of the longest match that starts at one of `at`, where n bytes are known to match the class `state`."""
    while n < len(s):
        inside = at + n < len(t)
        at, state = at[inside], state[inside]
        classes, state, known = _grown(classes[:-1], s[n:], state, t[at + n])
        at = at[known]
        if len(at) == 0:
            break
        n += 1
    return n


def _grown(
    classes: np.ndarray, letters: np.ndarray, state: np.ndarray, byte: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Classes one letter longer; the states that the byte leads to; and which states it leads anywhere."""
    unique, longer = np.unique(classes * 256 + letters, return_inverse=True)
    key = state * 256 + byte
    if len(unique) == 0:
        return longer, state[:0], np.zeros(len(state), bool)
    place = np.minimum(np.searchsorted(unique, key), len(unique) - 1)
    known = unique[place] == key
    return longer, place[known], known
