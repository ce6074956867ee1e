"""Where text comes from: files, a folder, JSON lines, Parquet, or the Python that is running; and what is held out.

    corpus = find("notes/")              a folder: its text files, hidden and binary ones left out
    corpus = find("logs/**/*.txt")       a glob
    corpus = find("pages.jsonl")         a document a line, in its field "text"; of an array in .json an object
    corpus = find("pages.parquet")       a document a row, in its column "text"
    corpus = find("ptb/")                a folder with ptb.train.txt, ptb.valid.txt, ptb.test.txt: these are the splits
    corpus = find("stdlib")              prose and sources of Python's standard library: text that is always there
    for passage in passages(corpus): …   (split, document, begin, end)

Held out ("valid") is about a tenth: of several documents those whose name has a small hash, so that order and date of
the text do not tell the splits apart; of a single document its end. Documents are read in chunks, when they are used.
"""

from __future__ import annotations

import codecs
import functools
import glob
import hashlib
import importlib
import itertools
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from reroll.data import jsontext, parquet
from reroll.data.encoding import UTF16, from_utf16, is_text, open_bytes, open_utf8
from reroll.data.jsontext import FIELD
from reroll.errors import UsageError

CHUNK = 1 << 20  # bytes read at a time
UNITS = {".jsonl": "line", ".ndjson": "line", ".parquet": "row", ".json": "object"}
FEW = 100  # with fewer documents than this, a tenth of the text is held out, not of the documents
COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"PAR1")
"""How gzip, zip, bzip2, xz, zstd and Parquet files begin."""

# Folders of the standard library to skip: tests, applications, installed packages, and the topics, read separately.
LEFT_OUT = {
    *("__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test"),
    *("tests", "turtledemo", "idle_test"),
}
SPLIT_NAME = re.compile(r"(?P<stem>.*?)(?:^|[._-])(?P<split>train|valid|val|validation|test)\.(?P<ending>\w+)$")
KINDS = "a file, a folder, a glob such as 'texts/*.txt', a .jsonl or .parquet file, 'stdlib' or 'stdlib:prose'"


@dataclass(frozen=True)
class Document:
    """A text, in a file or in memory.

    Args:
        name: decides the split; does not change when the folder moves.
        source: the file, or the text as bytes.
        size: in bytes.
        skip: bytes before the text, a byte-order mark.
    """

    name: str
    source: Path | bytes
    size: int
    skip: int = 0

    @property
    def where(self) -> str:
        """The path of the file, or the name of a text in memory."""
        return str(self.source) if isinstance(self.source, Path) else self.name

    def chunks(self, begin: int = 0, end: int | None = None, chunk: int = CHUNK) -> Iterator[bytes]:
        """Yield the bytes from `begin` to `end` (None: the end of the file), at most `chunk` at a time."""
        with open_bytes(self.source) as file:
            file.seek(begin + self.skip)
            while block := file.read(chunk if end is None else min(chunk, end - begin)):
                begin += len(block)
                yield block


@dataclass(frozen=True)
class File:
    """A document, or several if it has a `unit`; `split` if the name of the file states it."""

    name: str
    source: Path | bytes
    split: str | None = None

    @functools.cached_property
    def unit(self) -> str:
        """What of the file may be a document: a line, a row, an object of an array; empty: nothing but all of it."""
        if not isinstance(self.source, Path):
            return ""
        unit = UNITS.get(self.source.suffix.lower(), "")
        return unit if unit != "object" or jsontext.is_array(open_utf8(self.source)) else ""

    @property
    def signature(self) -> list[str | int]:
        """A value that changes with the file."""
        if isinstance(self.source, bytes):
            return [self.name, hashlib.sha256(self.source).hexdigest(), self.split or ""]
        state = self.source.stat()
        return [self.name, str(self.source.resolve()), state.st_size, state.st_mtime_ns, self.split or ""]

    def documents(self, field: str, *, alone: bool = False) -> Iterator[Document]:
        """Yield the documents of the file, also those that are empty; `alone`: there is no other file."""
        objects = self._objects(field, alone)
        if objects or self.unit in ("line", "row"):
            yield from self._many(field, objects)
            return
        with open_bytes(self.source) as file:
            head = file.read(3)
            skip = len(codecs.BOM_UTF8) * (head == codecs.BOM_UTF8)
            size = file.seek(0, os.SEEK_END) - skip
        if head.startswith(UTF16) and isinstance(self.source, Path) and is_text(self.source):
            content = from_utf16(self.source)
            yield Document(self.name, content, len(content))
        else:
            yield Document(self.name, self.source, size, skip)

    def _objects(self, field: str, alone: bool) -> list[Any] | None:
        if self.unit != "object":
            return None
        with open_utf8(Path(str(self.source))) as file:
            return jsontext.objects(file.read(), Path(str(self.source)), field, alone=alone)

    def _rows(self, field: str) -> Iterator[Any]:
        path = Path(str(self.source))
        return parquet.rows(path, field) if self.unit == "row" else jsontext.lines(open_utf8(path), path)

    def _many(self, field: str, objects: list[Any] | None) -> Iterator[Document]:
        unit = self.unit
        for number, entry in enumerate(objects or self._rows(field), 1):
            if (text := jsontext.text_of(entry, field)) is None:
                shown = ascii(entry)
                shown = shown if len(shown) <= 80 else f"{shown[:79]}…"
                raise UsageError(
                    f"path={self.source}, {unit} {number}, has no text in field={field!r}: {shown}. "
                    f"Give field=… that every {unit} has."
                )
            content = text.encode("utf-8", "replace")
            yield Document(f"{self.name}:{number}", content, len(content))


@dataclass(frozen=True)
class Corpus:
    """The files of a path in a fixed order, the field that holds the text of a JSON line, what is worth saying."""

    path: str
    files: tuple[File, ...]
    field: str = FIELD
    note: str = ""

    @property
    def signature(self) -> list[object]:
        """A value that changes with any file, and when other files are found."""
        field = self.field if any(file.unit for file in self.files) else ""
        return [field, [file.signature for file in self.files]]

    def documents(self, totals: Counter[str] | None = None) -> Iterator[tuple[File, Document]]:
        """Yield every document with text, and its file; `totals` counts them, their size, and the empty ones."""
        totals = Counter() if totals is None else totals
        for file in self.files:
            for document in file.documents(self.field):
                totals.update({"documents": 1, "size": document.size} if document.size else {"empty": 1})
                if document.size:
                    yield file, document


class Passage(NamedTuple):
    """Bytes `begin` … `end` of a document, in one split; `separated` if other documents follow it there."""

    split: str
    document: Document
    begin: int
    end: int | None
    separated: bool

    def chunks(self) -> Iterator[bytes]:
        """Yield its bytes."""
        return self.document.chunks(self.begin, self.end, CHUNK)


def find(path: str | os.PathLike[str], field: str = FIELD, *, unused: bool = False) -> Corpus:
    """Return the corpus a path names.

    Args:
        path: a file, a folder, a glob, a .jsonl or .parquet file, "stdlib" or "stdlib:prose" (its prose alone, 0.5 MB).
        field: the field of a JSON line, or the column, that holds the text; `a.b` is the field b of a.
        unused: a field may be named though no file has any.

    Raises:
        UsageError: if there is nothing of the kind, or nothing to read in it.
    """
    corpus = _find(path, field)
    of_array = Path(corpus.path).suffix.lower() == ".json" and isinstance(corpus.files[0].source, bytes)
    if field != FIELD and not (unused or of_array or any(file.unit for file in corpus.files)):
        raise UsageError(
            f"field={field!r} is of nothing in path={corpus.path!r}: only .jsonl, .ndjson and .parquet files, and "
            ".json files that are an array of objects, have fields. Leave it out."
        )
    return corpus


def _find(path: str | os.PathLike[str], field: str) -> Corpus:
    name = os.fspath(path)
    if name in ("stdlib", "stdlib:prose"):
        return Corpus(name, _standard_library(prose_only=name == "stdlib:prose"), field)
    where = Path(os.path.expanduser(name))
    if not name or not (where.exists() or glob.has_magic(name)):
        raise UsageError(f"path={name!r} does not exist. Give {KINDS}.")
    if where.is_dir():
        return _several(name, list(_below(where)), field, where)
    if not where.exists():
        return _several(name, _matches(where), field)
    if not where.is_file():
        raise UsageError(f"path={name!r} is a pipe, socket or device; save its text as a file.")
    file = File(where.name, where)
    with open_bytes(where) as opened:
        compressed = opened.read(6).startswith(COMPRESSED)
    if compressed and not file.unit and not is_text(where):
        raise UsageError(
            f"path={name!r} is compressed, not text. Unpack it; a table is read as it is: reroll train arrays --path "
            f"{name}"
        )
    if not where.stat().st_size:
        raise UsageError(f"path={name!r} is empty; give a file with text in it.")
    note = "" if file.unit or is_text(where) else "not UTF-8 text: its bytes are learned as they are"
    if file.unit != "object":
        return Corpus(name, (file,), field, note)
    files = tuple(File(document.name, document.source) for document in file.documents(field, alone=True))
    if files[0].name == file.name:
        note = f"its objects have no {FIELD!r}, so that it is one text; name a field of theirs as field=…"
    return Corpus(name, files, field, note)


def whole_held_out(corpus: Corpus) -> Corpus:
    """Return the corpus with all of it held out, to score a model on; named splits stay as they are."""
    if corpus.files[0].split:
        return corpus
    return replace(corpus, files=tuple(replace(file, split="valid") for file in corpus.files))


def passages(corpus: Corpus, totals: Counter[str] | None = None) -> Iterator[Passage]:
    """Yield the passages of a corpus, in its order.

    Args:
        corpus: what `find` returns.
        totals: counts the "documents" with text, their "size" in bytes, and the "empty" ones, which are skipped.

    Raises:
        UsageError: if there is no text at all.
    """
    if corpus.files[0].split:
        files = Counter(file.split for file in corpus.files)
        for file, document in corpus.documents(totals):
            yield Passage(file.split or "", document, 0, None, document.name != file.name or files[file.split] > 1)
        return
    first = [document for _, document in itertools.islice(corpus.documents(), FEW)]
    if not first:
        raise UsageError(f"path={corpus.path!r} has no text: every document in it is empty.")
    held_out = _hold_out({document.name: document.size for document in first}) if len(first) < FEW else None
    for _, document in corpus.documents(totals):
        if len(first) == 1:
            border = _border(document)
            yield Passage("train", document, 0, border, False)
            yield Passage("valid", document, border, None, False)
            continue
        valid = is_held_out(document.name) if held_out is None else document.name in held_out
        yield Passage("valid" if valid else "train", document, 0, None, True)


def _hold_out(sizes: dict[str, int]) -> set[str]:
    """The names of documents with about a tenth of the text, by the order of their hashes: at least one, never all."""
    total, size, names = sum(sizes.values()), 0, set[str]()
    for name in sorted(sizes, key=_hash):
        if size < total / 10 and size + sizes[name] <= total / 5:
            names.add(name)
            size += sizes[name]
    return names or {min(sizes, key=lambda name: (sizes[name], name))}


def _border(document: Document) -> int:
    """Where the last tenth of a document begins: after a line, else after a word, else at a character."""
    border = document.size * 9 // 10
    window = b"".join(document.chunks(border, border + min(max(document.size // 100, 4), 4096)))
    for pattern in (rb"\n", rb"\s", rb"(?=[\x00-\x7f\xc0-\xff])"):
        match = re.search(pattern, window)
        if match and border + match.end() < document.size:
            return border + match.end()
    return border


def is_held_out(name: str) -> bool:
    """Whether the hash of a document's name puts it into the held-out tenth."""
    return _hash(name) < 2**64 // 10


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")


def _below(folder: Path, left_out: Collection[str] = ()) -> Iterator[Path]:
    """The files of a folder in a fixed order, without what is hidden."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in left_out)
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


def _matches(pattern: Path) -> list[Path]:
    """What a glob matches, in order; ** follows no links, and what is hidden must be named."""
    parts = [part if part == "**" else re.sub(r"\*\*+", "*", part) for part in pattern.parts]
    parts += ["*"] * (parts[-1] == "**")
    fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    root, hidden = Path(*parts[:fixed]), any(part.startswith(".") for part in parts[fixed:])
    matched = (path for path in set(root.glob("/".join(parts[fixed:]))) if not path.is_dir())
    return sorted((p for p in matched if hidden or "/." not in f"/{p.relative_to(root).as_posix()}"), key=str)


def _several(name: str, paths: list[Path], field: str, root: Path | None = None) -> Corpus:
    """The corpus of several files, each once: those named after splits if there are such, else all that hold text."""
    if not paths and glob.has_magic(name):
        raise UsageError(f"path={name!r} matches no file. Give {KINDS}.")
    real: dict[object, Path] = {}
    for path in sorted(filter(os.path.isfile, paths), key=os.path.islink):
        state = path.stat()
        # Some file systems give files no number of their own.
        key = (state.st_dev, state.st_ino) if state.st_nlink > 1 and state.st_ino else os.path.realpath(path)
        real.setdefault(key, path)  # by its own name if it has one here
    once = set(real.values())
    files = [path for path in paths if path in once]
    if splits := _named_splits(files):
        note = ", ".join(f"{split} is {file.name}" for split, file in splits.items())
        return Corpus(name, tuple(File(file.name, file, split) for split, file in splits.items()), field, note)
    texts = [path for path in files if (parquet.has_column(path, field) if parquet.is_table(path) else is_text(path))]
    readable = set(texts)
    other = [path.name for path in paths if path not in readable and (path in once or not os.path.isfile(path))]
    note = f"skipped, being binary or no files: {len(other)}, such as {other[0]!r}" if other else ""
    if not any(file.stat().st_size for file in texts):
        column = f", and no .parquet file has a column {field!r}" * any(map(parquet.is_table, files))
        raise UsageError(f"path={name!r} has no text in its {len(paths)} files{column}. Give {KINDS}.")
    root = root or Path(os.path.commonpath([file.parent for file in files]))
    return Corpus(name, tuple(File(file.relative_to(root).as_posix(), file) for file in texts), field, note)


def _named_splits(files: list[Path]) -> dict[str, Path]:
    """The files named train, valid and maybe test, such as ptb.train.txt; of several such sets the shortest name's."""
    sets: dict[tuple[int, str, str, str], dict[str, Path]] = {}
    for file in files:
        if match := SPLIT_NAME.fullmatch(file.name):
            split = match["split"] if match["split"] in ("train", "test") else "valid"
            key = (len(match["stem"]), match["stem"], match["ending"], str(file.parent))
            sets.setdefault(key, {})[split] = file
    for _, splits in sorted(sets.items()):
        if {"train", "valid"} <= set(splits):
            return {split: splits[split] for split in ("train", "valid", "test") if split in splits}
    return {}


def _standard_library(prose_only: bool) -> tuple[File, ...]:
    """The texts of `help()` by topic, and the sources of the standard library, in order of their names."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # left out of stripped Pythons
        topics = {}
    files = [File(f"topics/{topic}", topics[topic].encode()) for topic in sorted(topics)]
    if not prose_only:
        root = Path(sysconfig.get_path("stdlib"))
        sources = (path for path in _below(root, LEFT_OUT) if path.suffix == ".py" and is_text(path))
        files += [File(path.relative_to(root).as_posix(), path) for path in sources]
    if not files:
        raise UsageError(
            f"path='stdlib{':prose' * prose_only}': this Python comes without them (a stripped or zipped one). "
            "Give the path of a text file or folder, or train on a generated task such as copy."
        )
    return tuple(files)
