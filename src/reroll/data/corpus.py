"""Where text comes from: a file, a folder, a glob, JSON lines, or the Python that is running; and what is held out.

    corpus = find("notes/")              a folder: its text files, hidden and binary ones left out
    corpus = find("logs/**/*.txt")       a glob
    corpus = find("pages.jsonl")         a document a line, in its field "text"
    corpus = find("ptb/")                a folder with ptb.train.txt, ptb.valid.txt, ptb.test.txt: these are the splits
    corpus = find("stdlib")              prose and sources of Python's standard library: text that is always there
    for piece in pieces(corpus): …       (split, document, begin, end)

Held out ("valid") is about a tenth: of several documents those whose name has a small hash, so that order and date of
the text do not tell the parts apart; of a single document its end. Nothing is read before it is used, and documents
are read in chunks.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import importlib
import itertools
import json
import logging
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from reroll.errors import UsageError

log = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes read at a time
FEW = 100  # fewer documents than this are held out by size, so that a tenth of the text is, not of the documents

COMPRESSED = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"(\xb5/\xfd": "zstd",
    b"PAR1": "Parquet",
}  # fmt: skip

# Folders of the standard library that are no library: tests, applications, what pip installed, the topics twice.
LEFT_OUT = {
    *("__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test"),
    *("tests", "turtledemo", "idle_test"),
}
SPLIT_NAME = re.compile(r"(?P<stem>.*?)(?:^|[._-])(?P<split>train|valid|val|validation|test)\.(?P<ending>\w+)$")
KINDS = "a file, a folder, a glob such as 'texts/*.txt', a .jsonl file, 'stdlib' or 'stdlib:prose'"


@dataclass(frozen=True)
class Document:
    """A text, in a file or in memory.

    Args:
        name: says which split it belongs to; stays the same when the folder moves.
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
        if isinstance(self.source, bytes):
            part = memoryview(self.source)[begin:end]
            yield from (bytes(part[place : place + chunk]) for place in range(0, len(part), chunk))
            return
        with _open(self.source) as file:
            file.seek(begin + self.skip)
            while end is None or begin < end:
                block = file.read(chunk if end is None else min(chunk, end - begin))
                if not block:
                    return
                begin += len(block)
                yield block


@dataclass(frozen=True)
class File:
    """A document, or with the ending .jsonl a document a line; `split` if the file says which one it is."""

    name: str
    source: Path | bytes
    split: str | None = None

    @property
    def lines(self) -> bool:
        """True if every line is a document."""
        return isinstance(self.source, Path) and self.source.suffix.lower() in (".jsonl", ".ndjson")

    @property
    def signature(self) -> list[str | int]:
        """What changes when the file does."""
        if isinstance(self.source, bytes):
            return [self.name, hashlib.sha256(self.source).hexdigest(), *([self.split] if self.split else [])]
        state = self.source.stat()
        return [self.name, str(self.source.resolve()), state.st_size, state.st_mtime_ns, self.split or ""]

    def documents(self, field: str) -> Iterator[Document]:
        """Yield the documents of the file that are not empty."""
        if self.lines and isinstance(self.source, Path):
            yield from _json_lines(self.source, self.name, field)
        else:
            skip = 0 if isinstance(self.source, bytes) else _mark(self.source)
            size = len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size - skip
            if size:
                yield Document(self.name, self.source, size, skip)


@dataclass(frozen=True)
class Corpus:
    """The files of a path in a fixed order, and the field that holds the text of a JSON line."""

    path: str
    files: tuple[File, ...]
    field: str = "text"

    @property
    def signature(self) -> list[object]:
        """What changes when any file does, or when other files are found."""
        return [self.field if any(file.lines for file in self.files) else "", [file.signature for file in self.files]]

    def documents(self) -> Iterator[tuple[File, Document]]:
        """Yield every document with the file it comes from."""
        for file in self.files:
            for document in file.documents(self.field):
                yield file, document


class Piece(NamedTuple):
    """Bytes `begin` … `end` of a document, in one split; `separated` if other documents follow it there."""

    split: str
    document: Document
    begin: int
    end: int | None
    separated: bool


def find(path: str | os.PathLike[str], field: str = "text") -> Corpus:
    """Return the corpus a path names.

    Args:
        path: a file, a folder, a glob, a .jsonl file, "stdlib" or "stdlib:prose" (its prose alone, 0.5 MB).
        field: the field of a JSON line that holds the text; `a.b` is the field b of a.

    Raises:
        UsageError: if there is nothing of the kind, or nothing to read in it.
    """
    name = os.fspath(path)
    if not name:
        raise UsageError(f"path='' names nothing. Give {KINDS}.")
    if name in ("stdlib", "stdlib:prose"):
        return Corpus(name, _standard_library(prose_only=name == "stdlib:prose"), field)
    where = Path(name).expanduser()
    if where.is_dir():
        files = _once(name, [Path(folder, file) for folder, _, found in _walk(where) for file in found])
        return _choose(name, where, files, field)
    if where.exists():
        file = File(where.name, where)
        _refuse_unreadable(name, where)
        if not file.lines and not _is_text(where):
            log.info("%s is not text: its bytes are learned as they are, which tokenizer='byte' alone can do.", name)
        return Corpus(name, (file,), field)
    if not glob.has_magic(name):
        raise UsageError(f"path={name!r} does not exist. Give {KINDS}.")
    files = _once(name, _matches(where))
    if not files:
        raise UsageError(f"path={name!r} matches no file; quote it for the shell, and try it with ls.")
    return _choose(name, Path(os.path.commonpath([file.parent for file in files])), files, field)


def whole(corpus: Corpus) -> Corpus:
    """Return the corpus with all of it held out, to score a model on; one whose files say their splits keeps them."""
    if corpus.files[0].split:
        return corpus
    return replace(corpus, files=tuple(replace(file, split="valid") for file in corpus.files))


def is_single(corpus: Corpus) -> bool:
    """Return whether a corpus is one document, whose end is held out."""
    return not corpus.files[0].split and len(list(itertools.islice(corpus.documents(), 2))) == 1


def pieces(corpus: Corpus) -> Iterator[Piece]:
    """Yield what is to be read, in the order of the corpus, with the split it belongs to.

    Raises:
        UsageError: if there is no text at all.
    """
    if corpus.files[0].split:
        files = Counter(file.split for file in corpus.files)
        for file, document in corpus.documents():
            yield Piece(file.split or "", document, 0, None, file.lines or files[file.split] > 1)
        return
    first = [(document.name, document.size) for _, document in itertools.islice(corpus.documents(), FEW)]
    if not first:
        raise UsageError(f"path={corpus.path!r} has no text: every document in it is empty.")
    if len(first) == 1:
        document = next(corpus.documents())[1]
        border = _border(document)
        yield Piece("train", document, 0, border, False)
        yield Piece("valid", document, border, None, False)
        return
    held_out = _hold_out(first) if len(first) < FEW else None
    for _, document in corpus.documents():
        valid = _hash(document.name) < 2**64 // 10 if held_out is None else document.name in held_out
        yield Piece("valid" if valid else "train", document, 0, None, True)


def _hold_out(documents: list[tuple[str, int]]) -> set[str]:
    """The names of documents with about a tenth of the text, in the order of their hashes: at least one, never all."""
    total, taken, names = sum(size for _, size in documents), 0, set[str]()
    for name, size in sorted(documents, key=lambda document: _hash(document[0])):
        if taken < total / 10 and taken + size <= total / 5:
            names.add(name)
            taken += size
    return names or {min(documents, key=lambda document: (document[1], document[0]))[0]}


def _border(document: Document) -> int:
    """Where the last tenth of a document begins: after a line, else after a word, else at a character."""
    border = document.size * 9 // 10
    window = b"".join(document.chunks(border, border + min(max(document.size // 100, 4), 4096)))
    for pattern in (rb"\n", rb"\s", rb"(?=[\x00-\x7f\xc0-\xff])"):
        match = re.search(pattern, window)
        if match and border + match.end() < document.size:
            return border + match.end()
    return border


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "little")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"path={path} cannot be read ({error.strerror}); check its permissions.") from None


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk in a fixed order, without what is hidden."""
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield place, folders, sorted(name for name in files if not name.startswith("."))


def _choose(name: str, root: Path, files: list[Path], field: str) -> Corpus:
    """The corpus of several files: those named after splits if there are such, else all that hold text."""
    splits = _named_splits(files)
    if splits:
        log.info("%s: the splits are %s.", name, ", ".join(f"{split} = {file.name}" for split, file in splits.items()))
        return Corpus(name, tuple(File(file.name, file, split) for split, file in splits.items()), field)
    texts = [file for file in files if _is_text(file)]
    if len(texts) < len(files):
        log.info("%s: %d of %d files are binary and left out.", name, len(files) - len(texts), len(files))
    if not texts:
        raise UsageError(f"path={name!r} has no text files (of {len(files)} files). Give {KINDS}.")
    if not any(file.stat().st_size for file in texts):
        raise UsageError(f"path={name!r} has nothing but empty files; give files with text in them.")
    return Corpus(name, tuple(File(file.relative_to(root).as_posix(), file) for file in texts), field)


def _once(name: str, files: list[Path]) -> list[Path]:
    """Every file once, by its own name if it has one here; pipes, sockets and broken links are left out."""
    other = [file.name for file in files if not os.path.isfile(file)]
    if other:
        log.info("%s: %d entries are no files and left out, such as %r.", name, len(other), other[0])
    real: dict[str, Path] = {}
    for file in sorted(filter(os.path.isfile, files), key=os.path.islink):
        real.setdefault(os.path.realpath(file), file)
    once = set(real.values())
    return [file for file in files if file in once]


def _matches(pattern: Path) -> list[Path]:
    """What a glob matches, in order; ** follows no links, and what is hidden must be named."""
    parts = [part if part == "**" else re.sub(r"\*\*+", "*", part) for part in pattern.parts]
    parts += ["*"] * (parts[-1] == "**")
    fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    root, hidden = Path(*parts[:fixed]), any(part.startswith(".") for part in parts[fixed:])
    matched = [path for path in set(root.glob("/".join(parts[fixed:]))) if not path.is_dir()]
    visible = [path for path in matched if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    return sorted(matched if hidden else visible, key=str)


def _refuse_unreadable(name: str, path: Path) -> None:
    """Refuse a path that is no file, or an empty or compressed one."""
    if not path.is_file():
        raise UsageError(f"path={name!r} is a pipe, socket or device; save its text as a file.")
    with _open(path) as file:
        head = file.read(6)
    if not head:
        raise UsageError(f"path={name!r} is empty; give a file with text in it.")
    kind = next((kind for begin, kind in COMPRESSED.items() if head.startswith(begin)), None)
    if kind and not _is_text(path):
        raise UsageError(
            f"path={name!r} is compressed ({kind}), not text. Unpack it; a table is read as it is: reroll train arrays "
            f"--path {name}"
        )


def _mark(path: Path) -> int:
    """The bytes of a byte-order mark at the beginning of a file."""
    with _open(path) as file:
        return len(codecs.BOM_UTF8) * (file.read(3) == codecs.BOM_UTF8)


def _named_splits(files: list[Path]) -> dict[str, Path]:
    """The files named train, valid and maybe test, such as ptb.train.txt; of several such sets the shortest name's."""
    sets: dict[tuple[int, str, str, str], dict[str, Path]] = {}
    for file in files:
        match = SPLIT_NAME.fullmatch(file.name)
        if match:
            split = match["split"] if match["split"] in ("train", "test") else "valid"
            stem = match["stem"]
            sets.setdefault((len(stem), stem, match["ending"], str(file.parent)), {})[split] = file
    for _, found in sorted(sets.items()):
        if {"train", "valid"} <= set(found):
            return {split: found[split] for split in ("train", "valid", "test") if split in found}
    return {}


def _is_text(path: Path) -> bool:
    """True if the beginning of a file is UTF-8 without NUL bytes."""
    with _open(path) as file:
        head = file.read(8192)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # A character that the end of the head cuts is no fault.
        return b"\0" not in head and len(head) == 8192 and error.start > len(head) - 4
    return b"\0" not in head


def _json_lines(path: Path, name: str, field: str) -> Iterator[Document]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
                raise UsageError(
                    f"path={path}, line {number}, is not JSON ({error}); mend or delete the line."
                ) from None
            text = _field(entry, field)
            if text is None:
                known = ", ".join(_texts(entry))[:200]
                raise UsageError(
                    f"path={path}, line {number}, has no text in field={field!r}; its fields with text: "
                    f"{ascii(known)[1:-1] or 'none'}. Give field=… that every line has."
                )
            content = text.encode("utf-8", "replace")
            if content:
                yield Document(f"{name}:{number}", content, len(content))


def _field(entry: Any, field: str) -> str | None:
    """The text of a field, `a.b` inside a; empty if it is null, None if there is no text."""
    first, dot, rest = field.partition(".")
    if isinstance(entry, dict) and field not in entry and dot:
        return _field(entry.get(first), rest)
    value = entry.get(field, 0) if isinstance(entry, dict) else 0
    return value if isinstance(value, str) else "" if value is None else None


def _texts(entry: Any, depth: int = 3) -> list[str]:
    """The names of the fields with text."""
    fields = entry.items() if isinstance(entry, dict) and depth else ()
    inner = [f"{name}.{further}" for name, value in fields for further in _texts(value, depth - 1)]
    return [name for name, value in fields if isinstance(value, str)] + inner


def _standard_library(prose_only: bool) -> tuple[File, ...]:
    """The texts of `help()` by topic, and the sources of the standard library, in order of their names."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # left out of stripped Pythons
        topics = {}
    files = [File(f"topics/{topic}", topics[topic].encode()) for topic in sorted(topics)]
    if not prose_only:
        root = Path(sysconfig.get_path("stdlib"))
        for place, folders, names in _walk(root):
            folders[:] = [name for name in folders if name not in LEFT_OUT]
            paths = [Path(place, name) for name in names if name.endswith(".py")]
            files += [File(path.relative_to(root).as_posix(), path) for path in paths if _is_text(path)]
    if not files:
        missing = "pydoc_data.topics" if prose_only else "pydoc_data.topics nor sources"
        raise UsageError(
            f"path='stdlib{':prose' * prose_only}': this Python comes without {missing} (a stripped or zipped one). "
            "Give the path of a text file or folder, or train on a generated task such as copy."
        )
    return tuple(files)
