"""Laws of the data: samples are functions of (seed, index), every byte counts once, baselines are right."""

import hashlib
import itertools
import json
import math
import random
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import baselines, corpus
from data.corpus import START, Document
from data.stream import Stream, evaluation

laws = settings(deadline=None, derandomize=True, max_examples=60)
texts = st.lists(st.binary(max_size=12), min_size=1, max_size=6)
few_letters = st.lists(st.text("ab \n", max_size=14).map(str.encode), min_size=1, max_size=4)
lengths = st.integers(1, 9)


def named(texts):
    return [Document(f"{i}.txt", text) for i, text in enumerate(texts)]


def one_line(error):
    return "\n" not in str(error.value)


# --- the corpus ---


@pytest.fixture(scope="module")
def library():
    return corpus.builtin()


def test_builtin_is_the_standard_library_less_its_guests(library):
    names = [d.name for d in library]
    assert names == sorted(set(names)) and {"argparse.py", "json/__init__.py", "encodings/utf_8.py"} <= set(names)
    assert all(name.endswith(".py") for name in names)
    assert not any({"site-packages", "dist-packages"} & set(name.split("/")) for name in names)
    root = Path(sysconfig.get_path("stdlib"))
    assert len(names) == sum(not {"site-packages", "dist-packages"} & set(f.parts) for f in root.rglob("*.py"))
    assert all(d.text == (root / d.name).read_bytes() for d in library[::50])


def test_builtin_splits_about_one_in_twenty(library):
    training, validation = corpus.split(library)
    assert sorted(training + validation) == library
    assert 0.03 < len(validation) / len(library) < 0.08
    assert corpus.load(None) == library


NAMES = {  # sha256 % 20 == 0, fixed: a run's validation text must never move into another run's training text
    True: ["a.jsonl:31", "3.txt", "40.txt", "größe 10.txt", "日本/21.py", "docs/a b33.md", "functools.py"],
    False: ["a.jsonl:30", "4.txt", "", "größe 11.txt", "日本/22.py", "docs/a b34.md", "argparse.py"],
}


def test_split_is_by_the_hash_of_the_name():
    documents = [Document(name, b"x") for side in NAMES.values() for name in side]
    training, validation = corpus.split(documents)
    assert [d.name for d in validation] == NAMES[True] and [d.name for d in training] == NAMES[False]


@laws
@given(st.lists(st.text(max_size=8), unique=True, max_size=8), st.data())
def test_split_of_a_part_is_the_part_of_the_split(names, data):
    anchors = [Document("3.txt", b"v"), Document("4.txt", b"t")]  # keeps both sides filled
    documents = [Document(name, b"x") for name in names]
    training, validation = corpus.split(anchors + documents)
    part = data.draw(st.lists(st.sampled_from(documents), unique=True)) if documents else []
    assert all((d in training) != (d in validation) for d in documents)
    assert set(corpus.split(anchors + part)[1]) == set(validation) & set(anchors + part)
    for d in documents:
        assert (d in validation) == (int(hashlib.sha256(d.name.encode()).hexdigest(), 16) % 20 == 0)


@pytest.mark.parametrize("size, kept", [(2, 1), (19, 18), (40, 38), (59, 57), (1000, 950)])
def test_one_document_is_split_by_its_text(size, kept):
    text = bytes(i % 251 for i in range(size))
    [training], [validation] = corpus.split([Document("book", text)])
    assert training == ("book", text[:kept]) and validation == ("book", text[kept:])


@pytest.mark.parametrize(
    "documents, side",
    [
        ([("3.txt", b"x"), ("19.txt", b"y")], "training"),
        ([("4.txt", b"x"), ("5.txt", b"y")], "validation"),
        ([("4.txt", b"x"), ("3.txt", b"")], "validation"),
        ([("one", b"x")], "training"),
        ([], "training"),
    ],
)
def test_split_with_an_empty_side_raises(documents, side):
    with pytest.raises(ValueError, match=f"no {side} text: {len(documents)} documents") as error:
        corpus.split([Document(*d) for d in documents])
    assert one_line(error)


def test_without_tests_judges_folders_only():
    kept = ["doctest.py", "test.py", "unittest/mock.py", "json/encoder.py", "encodings.py", "contest/a.py", "a/test"]
    dropped = ["test/a.py", "ctypes/test/a.py", "lib2to3/tests/data/a.py", "idlelib/idle_test/a.py", "encodings/a.py"]
    documents = [Document(name, b"") for name in kept + dropped]
    assert [d.name for d in corpus.without_tests(documents)] == kept


@laws
@given(st.lists(st.integers(0, START)))
def test_decode_drops_starts_and_inverts_encode(tokens):
    text = bytes(t for t in tokens if t != START)
    assert corpus.decode(tokens) == corpus.decode(torch.tensor(tokens, dtype=torch.long)) == text
    assert corpus.decode(corpus.encode(text)) == text and corpus.encode(text).dtype == np.int64


def test_encode_is_utf8():
    assert corpus.encode("é\n").tolist() == [0xC3, 0xA9, 10]
    assert corpus.VOCABULARY == START + 1 == corpus.BYTES + 1 == 257


@pytest.mark.parametrize("token", [-1, 257, 2**40])
def test_decode_refuses_other_tokens(token):
    with pytest.raises(ValueError, match=rf"token {token}: expected 0 \.\.\. 255, or 256"):
        corpus.decode([65, token])


def test_load_reads_a_file_a_folder_and_lines(tmp_path):
    for name, text in {"b.txt": b"bee\r\n", "a/z.md": b"\xff", ".git/x": b"no", "a/.y": b"no", "empty": b""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    lines = [json.dumps({"text": "é\u2028\ud800", "id": 1}), "", json.dumps({"text": "", "body": "B"})]
    (tmp_path / "c.jsonl").write_text("\n".join(lines) + "\n")
    spoken = [("c.jsonl:1", "é\u2028\ud800".encode("utf-8", "surrogatepass")), ("c.jsonl:3", b"")]
    assert corpus.load(tmp_path / "b.txt") == [("b.txt", b"bee\r\n")]
    assert corpus.load(str(tmp_path / "c.jsonl")) == spoken
    assert corpus.load(tmp_path) == [("a/z.md", b"\xff"), ("b.txt", b"bee\r\n"), *spoken, ("empty", b"")]
    (tmp_path / "d.jsonl").write_text(json.dumps({"body": "B"}))
    assert corpus.load(tmp_path / "d.jsonl", field="body") == [("d.jsonl:1", b"B")]


BAD = [
    ("image.png", b"PNG\0", r"is not a text file: found a NUL byte at offset 3"),
    ("x.jsonl", b'{"text": "a"}\n{"text"\n', r" line 2 is not JSON: Expecting ':' delimiter$"),
    ("x.jsonl", b'{"text": "\xff"}', r" line 1 is not JSON: .*utf-8"),
    ("x.jsonl", b'{"text": "a"}\n\n["a"]', r" line 3 is a JSON list, expected an object with the field 'text'"),
    ("x.jsonl", b'{"body": "a", "id": 1}', r" line 1 .* field 'text'; fields found: body \(str\), id \(int\)$"),
    ("x.jsonl", b'{"text": 3}', r" line 1 has no .* field 'text'; fields found: text \(int\)$"),
    ("x.jsonl", b"{}", r" line 1 .* fields found: none$"),
]


@pytest.mark.parametrize("name, text, message", BAD)
def test_load_names_the_bad_file_and_line(tmp_path, name, text, message):
    (tmp_path / "good.txt").write_bytes(b"good")
    (tmp_path / name).write_bytes(text)
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name}.*{message}") as error:
            corpus.load(path)
        assert one_line(error)


@pytest.mark.parametrize("name, text, found", [("a", b"", 1), ("a.jsonl", b"\n\n", 0), ("a.jsonl", b'{"text": ""}', 1)])
def test_load_refuses_no_text(tmp_path, name, text, found):
    cases = [(tmp_path / "none", "expected a text file, a .jsonl file or a folder, found nothing there")]
    (tmp_path / "empty").mkdir()
    cases += [(tmp_path / "empty", "found 0 documents and 0 bytes")]
    (tmp_path / name).write_bytes(text)
    cases += [(path, f"found {found} documents and 0 bytes") for path in (tmp_path, tmp_path / name)]
    for path, message in cases:
        with pytest.raises(ValueError, match=f"no text at {path}: .*{message}") as error:
            corpus.load(path)
        assert one_line(error)


# --- the stream ---


def streams(draw):
    """A stream of random texts, or None where they are shorter than a window."""
    documents, length = named(draw(texts)), draw(lengths)
    tokens = sum(len(d.text) + 1 for d in documents)
    enough = tokens > length and any(d.text for d in documents)
    return documents, length, draw(st.integers(0, 2**70)), enough


stream_cases = st.composite(streams)().filter(lambda case: case[-1]).map(lambda case: case[:-1])


@laws
@given(stream_cases, st.lists(st.integers(0, 200), max_size=6), st.randoms(use_true_random=False))
def test_a_sample_depends_on_seed_and_index_only(case, samples, rng):
    documents, length, seed = case
    batch = Stream(documents, length, seed).batch(samples)
    used = Stream(documents, length, seed)
    used.batch(rng.sample(range(300), 5))  # whatever was asked before
    alone = {i: used.batch([i]) for i in rng.sample(samples, len(samples))}
    for name in ("tokens", "labels", "positions", "indices"):
        rows = getattr(batch, name)
        assert rows.shape == (1, len(samples) * length) and rows.dtype == torch.int64
        for row, i in zip(rows.view(len(samples), length), samples, strict=True):
            assert torch.equal(row, getattr(alone[i], name)[0]), name


def test_samples_are_fixed_for_ever():
    """A change here breaks the resumption of every run: the second half of it would see other text than planned."""
    stream = Stream(named([b"abcdefgh", b"", b"ijklmnopqr", b"stuvwxyz"]), 5, seed=7)
    assert stream.windows == 5
    epochs = [[corpus.decode(stream.sample(i)) for i in range(e * 5, e * 5 + 5)] for e in range(2)]
    assert epochs == [
        [b"ijklm", b"stuv", b"defgh", b"rabcd", b"mnopqr"],
        [b"abcde", b"efghi", b"stuvw", b"ijklmn", b"wxyz"],
    ]


@laws
@given(st.permutations(range(256)), st.lists(st.integers(0, 255), max_size=8), lengths, st.integers(0, 99))
def test_an_epoch_visits_every_token_once(letters, cuts, length, epoch):
    cuts = sorted(cuts)
    pieces = [bytes(letters[i:j]) for i, j in zip([0, *cuts], [*cuts, 256], strict=True)]  # every byte has one place
    follows = {a: b for piece in pieces for a, b in itertools.pairwise([*piece, -100])}
    stream = Stream(named(pieces), length, seed=3)
    batch = stream.batch(range(epoch * stream.windows, (epoch + 1) * stream.windows))
    tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
    total = 256 + len(pieces)
    assert len(tokens) == stream.windows * length and 1 <= total - len(tokens) <= length
    counts = Counter(tokens)
    starts = counts.pop(START, 0)
    assert set(counts.values()) == {1} and starts <= len(pieces) and len(counts) + starts == len(tokens)
    first = Counter(piece[0] if piece else -100 for piece in pieces)
    assert all(label == follows[token] for token, label in zip(tokens, labels, strict=True) if token != START)
    assert not Counter(b for a, b in zip(tokens, labels, strict=True) if a == START) - first - Counter([-100])
    assert max(Counter(b for b in labels if b != -100).values()) == 1


def test_epochs_shuffle_documents_and_windows():
    stream = Stream(named([bytes([i]) * 9 for i in range(50)]), 10, seed=0)  # one document a window
    epochs = [[int(stream.sample(e * 50 - e + i)[1]) for i in range(49)] for e in range(2)]
    assert stream.windows == 49
    assert all(sorted(set(epoch)) == sorted(epoch) != epoch for epoch in epochs) and epochs[0] != epochs[1]
    assert [int(Stream(named([bytes([i]) * 9 for i in range(50)]), 10, 1).sample(i)[1]) for i in range(49)] != epochs[0]
    tail = [int(t) for t in Stream(named([bytes(range(100))]), 1, 0).batch(range(100)).tokens[0]]
    assert tail != sorted(tail)  # one document: only the windows can move


@laws
@given(stream_cases, st.lists(st.integers(0, 99), min_size=1, max_size=5))
def test_labels_positions_and_pieces_follow_from_the_tokens(case, samples):
    documents, length, seed = case
    stream = Stream(documents, length, seed)
    batch = stream.batch(samples)
    borders, positions = [], []
    tokens = batch.tokens[0].tolist()
    for at, token in enumerate(tokens):  # the slow way: one token after the other
        if at % length == 0 or token == START:
            borders.append(at)
        positions.append(at - borders[-1])
    assert batch.cu_seqlens.tolist() == [*borders, len(tokens)] and batch.cu_seqlens.dtype == torch.int32
    assert batch.positions[0].tolist() == positions
    assert batch.indices[0].tolist() == [i * length + offset for i in samples for offset in range(length)]
    following = [int(t) for i in samples for t in stream.sample(i)[1:]]
    assert batch.labels[0].tolist() == [-100 if t == START else t for t in following]
    for at in range(len(tokens) - 1):  # a label is the next token, and the last of a document has none
        if (at + 1) % length:
            assert batch.labels[0, at] == (-100 if tokens[at + 1] == START else tokens[at + 1])


@pytest.mark.parametrize("texts, length", [([b"abc"], 4), ([b"a", b""], 3), ([b"", b"", b""], 2), ([], 1)])
def test_a_text_shorter_than_a_window_raises(texts, length):
    found = sum(len(t) + 1 for t in texts)
    with pytest.raises(ValueError, match=rf"length {length} needs {length + 1} tokens, found {found}") as error:
        Stream(named(texts), length, 0)
    assert one_line(error)


def test_one_window_is_enough_and_bad_numbers_are_not():
    assert Stream(named([b"abc"]), 3, 0).windows == 1
    for length, seed in ((0, 0), (1, -1)):
        with pytest.raises(ValueError, match=f"length={length} and seed={seed}"):
            Stream(named([b"abc"]), length, seed)
    with pytest.raises(ValueError, match="found sample -1"):
        Stream(named([b"abc"]), 3, 0).batch([0, -1])
    for length, rows in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"length={length} and rows={rows}"):
            evaluation([], length, rows)  # before the first batch is asked for


@laws
@given(texts, lengths, st.integers(1, 4))
@example([b"", b""], 3, 1)
@example([b"abcdef", b"", b"ghi"], 3, 2)
def test_evaluation_predicts_every_byte_once(texts, length, rows):
    batches = list(evaluation(named(texts), length, rows))
    whole = b"".join(texts)
    tokens, labels, indices = ([int(t) for b in batches for t in b[i][0]] for i in (0, 1, 4))
    assert bytes(labels) == whole and sum(int((b.labels != -100).sum()) for b in batches) == len(whole)
    assert indices == list(range(len(whole)))
    assert tokens == [t for text in texts if text for t in (START, *text[:-1])]
    sizes = [b.tokens.shape[1] for b in batches]
    assert all(rows * length - length < size <= rows * length for size in sizes[:-1])
    assert all(0 < size <= rows * length for size in sizes)
    pieces = [len(text[i : i + length]) for text in texts for i in range(0, len(text), length)]
    found = [int(n) for b in batches for n in b.cu_seqlens.diff()]
    assert found == pieces
    for b in batches:
        assert b.cu_seqlens[0] == 0 and b.cu_seqlens[-1] == b.tokens.shape[1] and b.cu_seqlens.dtype == torch.int32
        assert b.positions[0].tolist() == [i for n in b.cu_seqlens.diff().tolist() for i in range(n)]


# --- the baselines ---


class Slow:
    """Interpolated modified Kneser-Ney from its definition: dictionaries of tuples, one byte at a time."""

    def __init__(self, texts, order, discounts):
        grams = [g for text in texts for g in self.grams(text, order)]
        self.counts = {order: Counter(grams)}
        kinds = set(grams)
        for n in range(order - 1, -1, -1):
            fronts = {}
            for gram in kinds:
                fronts.setdefault(gram[1:], set()).add(gram[0])
            self.counts[n] = {gram: len(front) for gram, front in fronts.items()}
            kinds = set(fronts)
        self.D = {n: [0, *(discounts or self.estimate(counts.values()))] for n, counts in self.counts.items()}

    @staticmethod
    def grams(text, order):
        symbols = [START] * order + list(text)
        return [tuple(symbols[i : i + order + 1]) for i in range(len(text))]

    @staticmethod
    def estimate(counts):
        n1, n2, n3, n4 = (sum(c == i for c in counts) for i in (1, 2, 3, 4))
        if 0 in (n1, n2, n3, n4):
            return 0.5, 1.0, 1.5
        Y = n1 / (n1 + 2 * n2)
        D = 1 - 2 * Y * n2 / n1, 2 - 3 * Y * n3 / n2, 3 - 4 * Y * n4 / n3
        return D if min(D) > 0 else (0.5, 1.0, 1.5)

    def p(self, gram):
        n, shorter = len(gram) - 1, self.p(gram[1:]) if len(gram) > 1 else 1 / 256
        here = {g[-1]: c for g, c in self.counts[n].items() if g[:-1] == gram[:-1]}
        if not here:
            return shorter
        c, D, total = here.get(gram[-1], 0), self.D[n], sum(here.values())
        return (c - D[min(c, 3)]) / total + sum(D[min(c, 3)] for c in here.values()) / total * shorter

    def bits(self, texts, order):
        surprise = [-math.log2(self.p(g)) for text in texts for g in self.grams(text, order)]
        return sum(surprise) / len(surprise)


@settings(laws, max_examples=30)
@given(few_letters, few_letters, st.lists(st.integers(0, 6), min_size=1, max_size=3), st.booleans())
def test_ngrams_equal_their_definition(training, validation, orders, given_discounts):
    if not any(training) or not any(validation):
        return
    discounts = (0.7, 1.1, 2.9) if given_discounts else None
    found = baselines.ngrams(named(training), named(validation), orders, discounts)
    assert set(found) == set(orders)
    for order in orders:
        assert found[order] == pytest.approx(Slow(training, order, discounts).bits(validation, order), rel=1e-12)


def test_ngram_estimates_its_discounts():
    """A text long enough for the counts of counts to speak, at every order above the letters' own."""
    words = random.Random(0).choices(["def ", "self", ".x", "(a, b)", ":\n", "return "], [6, 5, 4, 3, 2, 1], k=160)
    training, validation = ["".join(words[:100]).encode(), b"q = 1"], ["".join(words[100:]).encode(), b"zz"]
    slow = Slow(training, 3, None)
    assert sum(D[1:] != [0.5, 1.0, 1.5] for D in slow.D.values()) >= 2
    assert baselines.ngram(named(training), named(validation), 3) == pytest.approx(slow.bits(validation, 3), rel=1e-12)


@settings(laws, max_examples=30)
@given(few_letters, st.text("abz \n", max_size=8).map(str.encode), st.integers(0, 6))
def test_ngrams_sum_to_one_after_seen_and_unseen_contexts(training, context, order):
    if not any(training):
        return
    levels = baselines.fit(named(training), [order])[order]
    for h in (context, b"", max(training), max(training)[:-1], b"\xff" * 9):
        p = baselines.distribution(levels, h)
        assert p.shape == (256,) and p.min() > 0 and p.sum() == pytest.approx(1, abs=1e-12)
    slow = Slow(training, order, None)
    expected = [slow.p((*slow.grams(context + b"?", order)[-1][:-1], w)) for w in range(256)]
    np.testing.assert_allclose(baselines.distribution(levels, context), expected, rtol=1e-12)


def test_ngrams_know_nothing_of_bytes_never_seen():
    assert baselines.ngram(named([b"a" * 500]), named([bytes(range(128, 256))]), 2) > 8
    assert baselines.ngram(named([b"ab" * 500]), named([b"ab" * 500]), 1) < 0.1


@pytest.mark.parametrize("orders", [(), (-1,), (2, 7)])
def test_ngrams_refuse_other_orders(orders):
    with pytest.raises(ValueError, match=r"orders 0 \.\.\. 6 .*found"):
        baselines.ngrams(named([b"a"]), named([b"a"]), orders)


@pytest.mark.parametrize("discounts", [(0.5, 1.0), (0.0, 1.0, 1.0), (0.5, 2.5, 1.0)])
def test_ngrams_refuse_other_discounts(discounts):
    with pytest.raises(ValueError, match=r"three discounts with 0 < D\[i\] <= i"):
        baselines.ngram(named([b"a"]), named([b"a"]), 1, discounts)


def test_baselines_need_text():
    for training, validation, side in (([b""], [b"a"], "training"), ([b"a"], [b"", b""], "validation")):
        with pytest.raises(ValueError, match=f"needs {side} text"):
            baselines.ngrams(named(training), named(validation))
    with pytest.raises(ValueError, match="zlib needs text, found 1 documents"):
        baselines.zlib_bits(named([b""]))


@pytest.mark.parametrize("texts", [[b"a"], [b"", b"ab", b"c"], [b"abcdefgh"]])
def test_zlib_bits_by_hand(texts):
    """2 bytes of header, 3 bits, 8 a letter below 144, 7 for the end, 4 bytes of checksum (RFC 1950, 1951)."""
    n = len(b"".join(texts))
    assert baselines.zlib_bits(named(texts)) == 8 * (2 + -(-(3 + 8 * n + 7) // 8) + 4) / n


def brute_force(sample, training):
    parts = {sample[i:j] for i in range(len(sample)) for j in range(i + 1, len(sample) + 1)}
    return max((len(part) for part in parts if part in training), default=0)


@settings(laws, max_examples=200)
@given(st.sampled_from(["a", "ab", "abc", "abcdefgh"]), st.data())
def test_longest_match_equals_brute_force(letters, data):
    """One letter: everything matches; two: runs of about 8; eight: runs of 2 or 3, for the smallest blocks."""
    rng = data.draw(st.randoms(use_true_random=False))
    draw = lambda n: "".join(rng.choices(letters, k=n)).encode()
    training, sample = draw(rng.randrange(200)), draw(rng.randrange(40))
    if rng.random() < 0.5:  # something learned by heart
        at = rng.randrange(len(training) + 1)
        sample = draw(rng.randrange(9)) + training[at : at + rng.randrange(40)] + draw(rng.randrange(9))
    assert baselines.longest_match(sample, training) == brute_force(sample, training)


@pytest.mark.parametrize("n", [*range(18), 30, 31, 32])
def test_longest_match_at_every_alignment(n):
    piece = bytes(range(100, 100 + n))
    for before, after in itertools.product(range(17), (0, 1, 7)):
        training = b"\1" * before + piece + b"\2" * after
        assert baselines.longest_match(b"\3" * 5 + piece + b"\4" * 3, training) == n
    assert baselines.longest_match(piece, b"") == baselines.longest_match(b"", piece) == 0
