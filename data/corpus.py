"""Where text comes from: a list of named documents, split by name, read as bytes.

The built-in corpus is the source of the running Python's standard library: tens of megabytes that are already on every
machine. A model of bytes needs no tokenizer: token n is byte n, and one more token starts a document.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

BYTES = 256
START = 256  # precedes every document; it is context and never a label
VOCABULARY = 257

_TESTS = {"test", "tests", "encodings"}


class Document(NamedTuple):
    """One text. `name` is a posix path relative to where the corpus lies (a line of a .jsonl: `path:LINE`)."""

    name: str
    text: bytes


def builtin() -> list[Document]:
    """Every `*.py` of the running Python's standard library, its own tests included, sorted by name.

    `site-packages` and `dist-packages` lie in the same folder and are not the library. The text depends on the Python
    version, so a loss on it is comparable only with losses of the same version.
    """
    root = Path(sysconfig.get_path("stdlib"))
    names = (file.relative_to(root) for file in root.rglob("*.py") if file.is_file())
    ours = (name for name in names if not {"site-packages", "dist-packages"} & set(name.parts))
    return [Document(name, (root / name).read_bytes()) for name in sorted(name.as_posix() for name in ours)]


def load(path: str | Path | None = None, field: str = "text") -> list[Document]:
    """The documents at `path`; the built-in corpus if None.

    A file is one document. A folder is one document a file, at any depth, sorted by name, hidden files and folders
    skipped. A `.jsonl` file, alone or in a folder, is one document a line: the string under `field`, as UTF-8.
    Raises ValueError for a missing path, a file with a NUL byte, a bad line, and when there is no text at all.
    """
    if path is None:
        return builtin()
    path = Path(path)
    if path.is_dir():
        documents = [d for name in _visible(path) for d in _read(path / name, name, field)]
    elif path.is_file():
        documents = _read(path, path.name, field)
    else:
        raise ValueError(f"no text at {path}: expected a text file, a .jsonl file or a folder, found nothing there")
    if not any(d.text for d in documents):
        raise ValueError(f"no text at {path}: found {len(documents)} documents and 0 bytes, expected at least 1 byte")
    return documents


def _visible(folder: Path) -> list[str]:
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def _read(file: Path, name: str, field: str) -> list[Document]:
    text = file.read_bytes()
    if 0 in text:
        raise ValueError(f"{file} is not a text file: found a NUL byte at offset {text.index(0)}, expected plain text")
    if file.suffix != ".jsonl":
        return [Document(name, text)]
    lines = enumerate(text.split(b"\n"), 1)  # not splitlines: JSON lines end in a line feed and in nothing else
    return [Document(f"{name}:{n}", _text(line, f"{file} line {n}", field)) for n, line in lines if line.strip()]


def _text(line: bytes, where: str, field: str) -> bytes:
    try:
        record = json.loads(line.decode())
    except ValueError as error:  # json's own, or not UTF-8; json's `msg` leaves out its line, which is always 1 here
        raise ValueError(f"{where} is not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} is a JSON {type(record).__name__}, expected an object with the field {field!r}")
    if not isinstance(record.get(field), str):
        found = ", ".join(f"{key} ({type(value).__name__})" for key, value in record.items()) or "none"
        raise ValueError(f"{where} has no text in the field {field!r}; fields found: {found}")
    return record[field].encode("utf-8", "surrogatepass")  # JSON may spell half a surrogate pair


def split(documents: Sequence[Document]) -> tuple[list[Document], list[Document]]:
    """(training, validation): a document validates iff sha256(name) % 20 == 0, whatever else the corpus holds.

    So a document never changes sides when others come or go. A corpus of one document has no names to split by: there
    the last 5 % of the text (at least one byte) are for validation. Raises ValueError if a side has no text.
    """
    if len(documents) == 1:
        [(name, text)] = documents
        cut = len(text) - max(1, len(text) // 20)
        training, validation = [Document(name, text[: max(cut, 0)])], [Document(name, text[max(cut, 0) :])]
    else:
        training = [d for d in documents if not _validates(d.name)]
        validation = [d for d in documents if _validates(d.name)]
    for side, part in (("training", training), ("validation", validation)):
        if not any(d.text for d in part):
            raise ValueError(
                f"no {side} text: {len(documents)} documents split by the hash of their names (1 in 20 validates) gave "
                f"{len(training)} for training and {len(validation)} for validation; add documents or pass one file"
            )
    return training, validation


def _validates(name: str) -> bool:
    # surrogateescape: a file's name need not be UTF-8, and Python hands such bytes over in this form
    return int(hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest(), 16) % 20 == 0


def without_tests(documents: Iterable[Document]) -> list[Document]:
    """The built-in corpus less the library's own tests and its `encodings` (tables of characters, hardly prose).

    Judged by the folders in the name, hence of little meaning for any other corpus; may be empty there.
    """
    return [d for d in documents if not any(p in _TESTS or p.endswith("_test") for p in d.name.split("/")[:-1])]


def encode(text: bytes | str) -> Int64[np.ndarray, "t"]:
    """Tokens of a text, one a byte (a str as UTF-8). No START is added."""
    return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8).astype(np.int64)


def decode(tokens: Iterable[int]) -> bytes:
    """The bytes of tokens (a list, an array, a CPU tensor); START stands for no byte.

    Raises ValueError for a token outside 0 ... 256.
    """
    tokens = np.asarray(tokens).reshape(-1)
    wrong = tokens[(tokens < 0) | (tokens >= VOCABULARY)]
    if wrong.size:
        raise ValueError(
            f"cannot decode token {wrong[0]}: expected 0 ... {BYTES - 1}, or {START} for a document's start"
        )
    return tokens[tokens != START].astype(np.uint8).tobytes()
