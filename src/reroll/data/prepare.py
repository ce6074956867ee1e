"""Token shards of a text, or from the network: what `reroll data prepare` does for `reroll.data.tokens`.

    encode("notes/", "shards/", tokenizer="byte")         of whatever `corpus.find` reads
    download("shards/", count=25)                         FineWeb as the speedruns use it, in GPT-2's tokens
    openwebtext("shards/", count=25)                      OpenWebText, by any tokenizer

Every document follows a separator (0 for bytes, the last symbol of byte pairs, a new line for characters and words),
and runs on from shard to shard.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reroll.data import parquet
from reroll.data.cache import fit_to, replacing
from reroll.data.corpus import CHUNK, Corpus, Document, File, find, passages
from reroll.data.fetch import fetch
from reroll.data.shards import (
    ABOUT,
    GPT2_DOCUMENT,
    HEADER,
    About,
    described,
    read_shard,
    write_shard,
)  # fmt: skip
from reroll.data.symbols import Tokenizer, encode_pieces
from reroll.data.tokenizers import GPT2
from reroll.errors import RunError, UsageError, require_count

SHARD = 100_000_000
"""Tokens of a shard, as the speedruns cut them."""
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
FINEWEB_SHARDS, FINEWEB_LICENCE = 103, "ODC-By 1.0 (HuggingFaceFW/fineweb, sample-10BT)"
OPENWEBTEXT = "https://huggingface.co/datasets/Skylion007/openwebtext/resolve/79d93d786212f7344586290adb811d4ae6a1762c/plain_text/"
OPENWEBTEXT_FILES, OPENWEBTEXT_LICENCE = 80, "CC0 1.0 for the collection; the texts belong to their authors"


def encode(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    tokenizer: str | Tokenizer = "byte",
    *,
    max_vocab: int | None = None,
    field: str = "text",
    shard: int = SHARD,
) -> dict[str, Any]:
    """Write the shards of a text, and beside them tokens.json: its path and SHA-256, its tokenizer, how many documents
    have no text, and the tokens, bytes of text and SHA-256 of each file. It is returned.

    Args:
        path, max_vocab, field: as for `reroll.data.text.Text`.
        folder: is made; shards of the same text by the same tokenizer in it are replaced.
        tokenizer: "byte", "char", "word", "bpe" or "gpt2"; or one that is ready.
        shard: tokens of a shard.

    Raises:
        UsageError: if there is no such text, the vocabulary is larger than a shard's 65,536, or the folder holds the
            shards of another text, or by another tokenizer.
        RunError: if the folder cannot be written.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "a.txt").write_text("to be or not to be " * 50)
        >>> about = encode(folder / "a.txt", folder / "shards", shard=500)
        >>> [(name, file["tokens"]) for name, file in about["files"].items()]
        [('a_train_000001.bin', 500), ('a_train_000002.bin', 359), ('a_val_000000.bin', 93)]
    """
    require_count(shard=shard)
    stem = re.sub(r"[^\w.-]+", "-", Path(path).stem).strip("-") or "text"
    corpus = find(path, field)
    return _encode(corpus, Path(folder), stem, tokenizer, max_vocab, shard, _digest(corpus))


def _digest(corpus: Corpus) -> str:
    """The SHA-256 of all that decides the text of a corpus: its field, and the names and bytes of its files."""
    total = hashlib.sha256(corpus.field.encode())
    for file in corpus.files:
        content = hashlib.sha256()
        for chunk in Document(file.name, file.source, 0).chunks():
            content.update(chunk)
        total.update(os.fsencode(file.name) + b"\0" + content.digest())
    return total.hexdigest()


def _encode(
    corpus: Corpus, target: Path, stem: str, tokenizer: str | Tokenizer, max_vocab: int | None, shard: int, text: str
) -> dict[str, Any]:
    """Write the shards of a corpus, called by a stem; `text` tells it from others."""
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = fit_to(corpus, tokenizer, max_vocab)
    if tokenizer.size > 1 << 16:
        raise UsageError(
            f"path={corpus.path} has a vocabulary of {tokenizer.size} symbols; a shard holds 65536. Set "
            "max_vocab=65536 or less."
        )
    files, totals = {}, Counter[str]()
    _make_room(target, stem, text, tokenizer)
    for split, label, first in (("train", "train", 1), ("valid", "val", 0)):
        for number, (tokens, size) in enumerate(
            _shards(_symbols(corpus, tokenizer, split, totals), tokenizer, shard), first
        ):
            name = f"{stem}_{label}_{number:06d}.bin"
            write_shard(target / name, tokens)
            files[name] = described(target / name, size)
    about = {
        "path": corpus.path, "text": text,
        "tokenizer": tokenizer.to_dict(), "vocab": tokenizer.size, "document": _marks(tokenizer)[1], "files": files,
        "empty": totals["empty"] // (1 if corpus.files[0].split else 2),  # without splits all is read for each
    }  # fmt: skip
    _write_about(target, about)
    return about


def _make_room(target: Path, stem: str, text: str, tokenizer: Tokenizer) -> None:
    """Make the folder, and delete the same shards there; refuse one with those of another text or tokenizer."""
    shards = _shards_in(target, stem)
    try:
        if shards and (target / ABOUT).exists():
            before = json.loads((target / ABOUT).read_text())
            if before.get("text") != text:
                path = f" ({before['path']}, as it was then)" if "path" in before else ""
                raise _occupied(target, f"of another text{path}")
            if before["tokenizer"] != tokenizer.to_dict():
                name, size = before["tokenizer"]["name"], before["vocab"]
                new = f"{tokenizer.name} of {tokenizer.size} symbols"
                raise _occupied(target, f"by another tokenizer ({name} of {size} symbols, not {new})")
        for old in (target / ABOUT, *shards):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise _occupied(target, f"of which {ABOUT}, being damaged, does not say the text") from None


def _occupied(target: Path, fault: str) -> UsageError:
    return UsageError(
        f"{target} holds shards {fault}, and runs on them may be there: take another folder (to=…), or delete its "
        f"shards and {ABOUT}."
    )


def _shards_in(target: Path, stem: str) -> list[Path]:
    """The shards of a text in a folder, which is made; one with shards of another text is refused."""
    try:
        target.mkdir(parents=True, exist_ok=True)
        shards = sorted(target.glob("*.bin"))
    except OSError as error:
        raise RunError(f"{target} cannot be made: {error.strerror}.") from None
    ours = re.compile(re.escape(stem) + r"_(train|val)_\d{6}\.bin")
    if others := [file.name for file in shards if not ours.fullmatch(file.name)]:
        raise UsageError(f"{target} holds shards of another text ({others[0]}); take another folder.")
    return shards


def _write_about(target: Path, about: dict[str, Any]) -> None:
    try:
        with replacing(target / ABOUT) as file:
            file.write(json.dumps(about, indent=1).encode())
    except OSError as error:
        raise RunError(f"{target / ABOUT} cannot be written: {error.strerror}.") from None


def _marks(tokenizer: Tokenizer) -> tuple[int | None, int | None]:
    """The symbol that is put before every document, and the same if it is found nowhere else.

    For bytes it is 0, which no text holds. Characters and words have none but that of a new line.
    """
    if tokenizer.name == "byte":
        return 0, 0
    return tokenizer.separator, None if tokenizer.has_unknown else tokenizer.separator


Part = tuple[str | None, npt.NDArray[Any], int]
"""A piece of a document: its text (None for bytes, which are their own symbols), its symbols, and its bytes."""


def _symbols(corpus: Corpus, tokenizer: Tokenizer, split: str, totals: Counter[str]) -> Iterator[Part]:
    """The pieces of a split; what is put before a document is one of no bytes."""
    before = _marks(tokenizer)[0]
    files = tuple(file for file in corpus.files if file.split in (None, split))  # else gigabytes are read for nothing
    for passage in passages(replace(corpus, files=files), totals) if files else ():
        if passage.split == split:
            if before is not None:
                yield None, np.array([before]), 0
            chunks = passage.document.chunks(passage.begin, passage.end, CHUNK)
            yield from encode_pieces(tokenizer, chunks, passage.document.where)


def _shards(parts: Iterator[Part], tokenizer: Tokenizer, size: int) -> Iterator[tuple[npt.NDArray[np.uint16], int]]:
    """The same symbols in shards of a size, the last one shorter, with their bytes of text.

    All shards are in one buffer: what is yielded holds until the next one is asked for.
    """
    buffer, count, total = np.empty(size, np.uint16), 0, 0
    for text, symbols, length in parts:
        taken = taken_bytes = 0
        while count + len(symbols) - taken >= size:
            more = size - count
            upto = _bytes_of(tokenizer, text, symbols, taken + more, length)
            buffer[count:] = symbols[taken : taken + more]
            yield buffer, total + upto - taken_bytes
            count, total, taken, taken_bytes = 0, 0, taken + more, upto
        buffer[count : count + len(symbols) - taken] = symbols[taken:]
        count, total = count + len(symbols) - taken, total + length - taken_bytes
    if count:
        yield buffer[:count], total


def _bytes_of(tokenizer: Tokenizer, text: str | None, symbols: npt.NDArray[Any], count: int, length: int) -> int:
    """The bytes of text that the first symbols of a piece stand for."""
    if count == len(symbols):
        return length
    if text is None:
        return count
    if not tokenizer.has_unknown:
        return len(tokenizer.decode_bytes(symbols[:count]))
    places = range(len(text) + 1)
    end = bisect.bisect_right(places, count, key=lambda place: len(tokenizer.encode(text[:place]))) - 1
    return len(text[:end].encode())


def download(
    folder: str | os.PathLike[str], count: int, say: Callable[[str], None] = print, source: str = FINEWEB
) -> None:
    """Fetch the validation shard and the first training shards of FineWeb; go on where an earlier call ended.

    What is whole is left alone. Every file is checked: its header, its length, and its SHA-256 where tokens.json or the
    server names one. tokens.json is written beside them.

    Raises:
        UsageError: if there are not so many shards, or the folder holds those of another text.
        RunError: if the network fails (what has come is kept), or a file is not what it should be.
    """
    if not 1 <= count <= FINEWEB_SHARDS:
        raise UsageError(f"shards={count} must be 1 to {FINEWEB_SHARDS}.")
    target = Path(folder)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]
    say(f"{len(names)} files of up to {(HEADER + 2 * SHARD) / 1e6:.0f} MB from {source}, licence {FINEWEB_LICENCE}.")
    _shards_in(target, "fineweb")
    files = dict(About.beside(target / names[0]).files)
    for name in names:
        known = files.get(name, {}).get("sha256", "")
        if not fetch(source + name, target / name, read_shard, say, known) and name in files:
            continue
        files[name] = described(target / name)
        about = {"tokenizer": {"name": GPT2.name}, "vocab": GPT2.size, "document": GPT2_DOCUMENT, "files": files}
        _write_about(target, about)


def openwebtext(
    folder: str | os.PathLike[str],
    count: int,
    tokenizer: str | Tokenizer = "gpt2",
    *,
    max_vocab: int | None = None,
    shard: int = SHARD,
    say: Callable[[str], None] = print,
    source: str = OPENWEBTEXT,
) -> dict[str, Any]:
    """Fetch Parquet files of OpenWebText, as `download` does, and write their shards, as `encode` does.

    The first file, about 100,000 documents, is held out, so with any number of others the validation is the same. The
    files stay, in the folder parquet/, for other tokenizers.

    Args:
        folder, tokenizer, max_vocab, shard: as for `encode`.
        count: files to train on, of 303 MB.

    Raises:
        UsageError: as `encode`, and if there are not so many files.
        RunError: as `download`.

    Source: Gokaslan and Cohen, "OpenWebText Corpus" (2019).
    """
    if not 1 <= count < OPENWEBTEXT_FILES:
        raise UsageError(f"shards={count} must be 1 to {OPENWEBTEXT_FILES - 1}.")
    require_count(shard=shard)
    say(f"{count + 1} files of 303 MB from {source}, licence {OPENWEBTEXT_LICENCE}.")
    parquet.library("openwebtext")
    if tokenizer == GPT2.name:
        tokenizer = GPT2()  # if it is not there, that is said before the files come
    target, files = Path(folder), []
    _shards_in(target, "openwebtext")
    rows = target / "parquet"
    _shards_in(rows, "openwebtext")
    for number in range(count + 1):
        name = f"train-{number:05d}-of-{OPENWEBTEXT_FILES:05d}.parquet"
        fetch(source + name, rows / name, lambda path: parquet.require_column(path, "text"), say)
        files.append(File(name, rows / name, "train" if number else "valid"))
    return _encode(Corpus(source, tuple(files)), target, "openwebtext", tokenizer, max_vocab, shard, source)
