"""Token streams on disk: a corpus is encoded once, chunk by chunk, and then memory-mapped.

    streams = load(find("texts/"), "char", max_vocab=100)
    streams.tokens["train"]        a memory-mapped array, of 1, 2 or 4 bytes a symbol

The folder is $REROLL_CACHE, or $XDG_CACHE_HOME/reroll, or ~/.cache/reroll; anything in it may be deleted at any time. A
file is named by a hash of the texts' paths, sizes and times and of the tokenizer's settings, and moved into place when
it is complete. A file of the wrong length is built again.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from reroll.data.corpus import Corpus, passages
from reroll.data.symbols import Tokenizer, decode_utf8, encode_chunks, symbol_dtype
from reroll.data.tokenizers import TOKENIZERS, fit, from_dict
from reroll.errors import RunError, UsageError

log = logging.getLogger(__name__)

FORMAT = 5  # of the files; a change rebuilds them

_temporary: Path | None = None  # created once per process, if the cache folder cannot be written


@dataclass(frozen=True)
class Streams:
    """The symbols of every split of a corpus, and the tokenizer they came from.

    Args:
        tokenizer: turns them back into text.
        tokens: the symbols by split, memory-mapped.
        fingerprint: SHA-256 of the symbols of all splits.
        documents: how many have text.
        empty: how many have none, and are skipped.
        size: bytes of text in all of them.
        single: True if "valid" is the end of the document that "train" begins.
    """

    tokenizer: Tokenizer
    tokens: dict[str, npt.NDArray[Any]]
    fingerprint: str
    documents: int
    empty: int
    size: int
    single: bool


def cache_folder() -> Path:
    """Return the cache folder, created if need be; a temporary one if it cannot be written."""
    global _temporary
    usual = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(os.environ.get("REROLL_CACHE") or Path(usual, "reroll")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if _temporary is None:
            _temporary = Path(tempfile.mkdtemp(prefix="reroll-"))
            atexit.register(shutil.rmtree, _temporary, ignore_errors=True)
            remedy = "texts are encoded again for every run. Set REROLL_CACHE to a folder that can"
            log.warning("The cache folder %s cannot be written (%s): %s.", folder, error.strerror, remedy)
        return _temporary


def load(corpus: Corpus, tokenizer: str | Tokenizer = "byte", max_vocab: int | None = None) -> Streams:
    """Return the symbols of a corpus, from the cache if they are there.

    Args:
        corpus: what `find` returns.
        tokenizer: a name, for a vocabulary of the training part; or a tokenizer, used as it is.
        max_vocab: the largest vocabulary, see `tokenizers.fit`.

    Raises:
        UsageError: if a text cannot be read or encoded.
        RunError: if the disk has no room for the symbols.
    """
    if isinstance(tokenizer, Tokenizer) and max_vocab is not None:
        raise UsageError(f"max_vocab={max_vocab} cannot change a finished tokenizer; leave it out.")
    settings = tokenizer.to_dict() if isinstance(tokenizer, Tokenizer) else [tokenizer, max_vocab]
    identity = json.dumps([FORMAT, corpus.signature, settings])
    place = cache_folder() / f"text-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
    try:
        return _open(place)
    except FileNotFoundError:
        pass
    except UsageError:  # GPT-2 without its table: building afresh would not help
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("The cache entry %s is damaged (%s) and built again.", place, error)
    _build(place, corpus, tokenizer, max_vocab)
    return _open(place)


def _open(place: Path) -> Streams:
    """Open the streams of a cache entry; any error means that it is missing or damaged."""
    saved = json.loads(place.with_suffix(".json").read_text())
    tokenizer = from_dict(saved["tokenizer"])
    dtype, tokens = symbol_dtype(tokenizer.size), {}
    for split, count in saved["counts"].items():
        path = place.with_suffix(f".{split}")
        if path.stat().st_size != count * dtype.itemsize:
            raise ValueError(f"{path} should hold {count} symbols")
        tokens[split] = np.memmap(path, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)
    return Streams(
        tokenizer, tokens, *(saved[name] for name in ("fingerprint", "documents", "empty", "size", "single"))
    )


def _build(place: Path, corpus: Corpus, tokenizer: str | Tokenizer, max_vocab: int | None) -> None:
    """Encode a corpus into the files of a cache entry; the description comes last, when they are complete."""
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = fit_to(corpus, tokenizer, max_vocab)
    files: dict[str, BinaryIO] = {}
    digests: dict[str, Any] = {}
    totals = Counter[str](documents=0, empty=0, size=0)
    try:
        with contextlib.ExitStack() as undo:
            for split, symbols in _encoded(corpus, tokenizer, totals):
                if split not in files:
                    files[split] = undo.enter_context(replacing(place.with_suffix(f".{split}")))
                    digests[split] = hashlib.sha256()
                files[split].write(symbols)
                digests[split].update(symbols)
            counts = {split: file.tell() // symbol_dtype(tokenizer.size).itemsize for split, file in files.items()}
        every = "".join(f"{split} {digests[split].hexdigest()}\n" for split in sorted(digests))
        description = {
            "path": corpus.path,
            "tokenizer": tokenizer.to_dict(),
            "counts": counts,
            "single": totals["documents"] == 1 and not corpus.files[0].split,
            **totals,
            "fingerprint": hashlib.sha256(every.encode()).hexdigest(),
        }
        with replacing(place.with_suffix(".json")) as file:
            file.write(json.dumps(description).encode())
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise RunError(f"{place.parent} has no room for the symbols of {corpus.path}: set REROLL_CACHE.") from None


def _encoded(corpus: Corpus, tokenizer: Tokenizer, totals: Counter[str]) -> Iterator[tuple[str, bytes]]:
    """The symbols of all passages in order, as bytes, with their splits; documents and their bytes are counted."""
    dtype = symbol_dtype(tokenizer.size)
    after = b"" if tokenizer.separator is None else np.array([tokenizer.separator], dtype).tobytes()
    for passage in passages(corpus, totals):
        for symbols in encode_chunks(tokenizer, passage.chunks(), passage.document.where):
            yield passage.split, symbols.astype(dtype, copy=False).tobytes()
        if passage.separated:
            yield passage.split, after


def fit_to(corpus: Corpus, name: str, max_vocab: int | None) -> Tokenizer:
    """Return a tokenizer with the vocabulary of the training part of a corpus, if it has one; see `tokenizers.fit`."""
    any_bytes = name in TOKENIZERS and TOKENIZERS[name].any_bytes
    return fit(name, _training_text(corpus, any_bytes), max_vocab)


def _training_text(corpus: Corpus, any_bytes: bool) -> Iterator[str]:
    for passage in passages(corpus):
        if passage.split == "train":
            yield from decode_utf8(passage.chunks(), passage.document.where, any_bytes)
            if passage.separated:
                yield "\n"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that replaces `path` when it is complete, and is deleted after an error."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(4).hex()}")
    try:
        with temporary.open("xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
