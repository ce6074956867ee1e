"""Token shards of a text, or from the network: what `reroll data prepare` does for `reroll.data.tokens`.

    encode("notes/", "shards/", tokenizer="byte")         of whatever `corpus.find` reads
    download("shards/", count=25)                         FineWeb as the speedruns use it, in GPT-2's tokens

Every document follows a separator (0 for bytes, the last symbol of byte pairs, a new line for characters and words),
and runs on from shard to shard.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reroll.data.cache import fit_to, replacing
from reroll.data.corpus import CHUNK, Corpus, find, passages
from reroll.data.shards import (
    ABOUT,
    GPT2_DOCUMENT,
    HEADER,
    About,
    described,
    read_shard,
    sha256_of,
    write_shard,
)  # fmt: skip
from reroll.data.symbols import Tokenizer, encode_pieces
from reroll.data.tokenizers import GPT2
from reroll.errors import RunError, UsageError, require_count

SHARD = 100_000_000
"""Tokens of a shard, as the speedruns cut them."""
FINEWEB = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main/"
FINEWEB_SHARDS, FINEWEB_LICENCE = 103, "ODC-By 1.0 (HuggingFaceFW/fineweb, sample-10BT)"


def encode(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    tokenizer: str | Tokenizer = "byte",
    *,
    max_vocab: int | None = None,
    field: str = "text",
    shard: int = SHARD,
) -> dict[str, Any]:
    """Write the shards of a text, and beside them tokens.json: its tokenizer, and the tokens, bytes of text and SHA-256
    of each file. It is returned.

    Args:
        path, max_vocab, field: as for `reroll.data.text.Text`.
        folder: is made; shards of a text of this name in it are replaced.
        tokenizer: "byte", "char", "word", "bpe" or "gpt2"; or one that is ready.
        shard: tokens of a shard.

    Raises:
        UsageError: if there is no such text, the vocabulary is larger than a shard's 65,536, or the folder holds the
            shards of another text.
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
    corpus = find(path, field)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = fit_to(corpus, tokenizer, max_vocab)
    if tokenizer.size > 1 << 16:
        raise UsageError(
            f"the tokenizer has {tokenizer.size} symbols; a shard holds 65536. Set max_vocab=65536 or less."
        )
    target, stem, files = Path(folder), re.sub(r"[^\w.-]+", "-", Path(path).stem).strip("-") or "text", {}
    _make_room(target, stem)
    for split, label, first in (("train", "train", 1), ("valid", "val", 0)):
        for number, (tokens, size) in enumerate(_shards(_symbols(corpus, tokenizer, split), tokenizer, shard), first):
            name = f"{stem}_{label}_{number:06d}.bin"
            write_shard(target / name, tokens)
            files[name] = described(target / name, size)
    about = {
        "tokenizer": tokenizer.to_dict(), "vocab": tokenizer.size, "document": _marks(tokenizer)[1], "files": files,
    }  # fmt: skip
    _write_about(target, about)
    return about


def _make_room(target: Path, stem: str) -> None:
    """Make the folder, and delete the shards of the same text there; refuse one with shards of another."""
    shards = _shards_in(target, stem)
    try:
        for old in (target / ABOUT, *shards):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{target} cannot be written: {error.strerror}.") from None


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


def _symbols(corpus: Corpus, tokenizer: Tokenizer, split: str) -> Iterator[Part]:
    """The pieces of a split; what is put before a document is one of no bytes."""
    before = _marks(tokenizer)[0]
    for passage in passages(corpus):
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
        path = target / name
        try:
            if path.exists() and _is_whole(path, files.get(name), source + name):
                continue
            say(f"fetching {name}")
            _fetch(source + name, path)
        except OSError as error:  # of urllib too
            raise RunError(f"{source + name} could not be fetched ({error}); run the command again to go on.") from None
        files[name] = described(path)
        about = {"tokenizer": {"name": GPT2.name}, "vocab": GPT2.size, "document": GPT2_DOCUMENT, "files": files}
        _write_about(target, about)


def _is_whole(path: Path, known: Mapping[str, Any] | None, url: str) -> bool:
    """Whether a file is the shard that it should be: by tokens.json, else by what the server says."""
    try:
        read_shard(path)
    except UsageError:
        return False
    expected = (known or {}).get("sha256", "")
    if not expected:
        with contextlib.suppress(OSError):  # without a network it is what it is
            answer, expected = _open(urllib.request.Request(url, method="HEAD"))
            answer.close()
    return not expected or sha256_of(path) == expected


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and keeps the checksum that one names: the storage it leads to does not know it."""

    checksum = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.checksum = self.checksum or _checksum(headers)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _checksum(headers: Any) -> str:
    """The SHA-256 in the headers of an answer; empty if there is none."""
    tag = (headers.get("X-Linked-ETag") or "").strip('"')
    return tag if re.fullmatch("[0-9a-f]{64}", tag) else ""


def _open(request: urllib.request.Request) -> tuple[Any, str]:
    """The answer to a request, and the SHA-256 that it or a redirect to it names."""
    redirects = _Redirects()
    try:
        answer = urllib.request.build_opener(redirects).open(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        answer = error  # the part that is asked for begins at the end
    return answer, redirects.checksum or _checksum(answer.headers)


def _fetch(url: str, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    answer, expected = _open(urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {}))
    left = 0
    with answer:
        if answer.status == 416:
            if (answer.headers.get("Content-Range") or "").rpartition("/")[2] != str(have):
                part.unlink()  # longer than the file
                raise ConnectionError("what was fetched before is not a part of it")
        else:
            with part.open("ab") as file:
                if have and answer.status != 206:  # a server that begins again
                    file.truncate(0)
                left = int(answer.headers.get("Content-Length") or 0)
                while block := answer.read(CHUNK):
                    left -= file.write(block)
    if left > 0:
        raise ConnectionError(f"the connection ended {left} bytes early")
    try:
        with part.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest() if expected else ""
        if got != expected:
            raise RunError(
                f"{target.name} came damaged (SHA-256 {got[:12]}…, not {expected[:12]}…); run the command again."
            )
        read_shard(part)
    except UsageError:
        part.unlink()
        raise RunError(f"{url} is no token shard; what came is thrown away.") from None
    except RunError:
        part.unlink()
        raise
    os.replace(part, target)
