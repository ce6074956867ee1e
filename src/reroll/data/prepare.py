"""Token shards of a text, or from the network: what `reroll data prepare` does for `reroll.data.tokens`.

    encode("notes/", "shards/", tokenizer="byte")         of whatever `corpus.find` reads
    download("shards/", count=24)                         FineWeb as the speedruns use it, in GPT-2's tokens

Every document follows the tokenizer's separator (GPT-2's 50256), and runs on from shard to shard.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reroll.data.cache import training_text
from reroll.data.corpus import CHUNK, Corpus, find, passages
from reroll.data.tokenizers import Tokenizer, encode_chunks, fit
from reroll.data.tokens import ABOUT, HEADER, read_shard, write_shard
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
        folder: is made; shards in it are replaced.
        tokenizer: "byte", "char", "word" or "gpt2"; or one that is ready.
        shard: tokens of a shard.

    Raises:
        UsageError: if there is no such text, or the vocabulary is larger than a shard's 65,536.
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
        tokenizer = fit(tokenizer, training_text(corpus), max_vocab)
    if tokenizer.size > 1 << 16:
        raise UsageError(
            f"the tokenizer has {tokenizer.size} symbols; a shard holds 65536. Set max_vocab=65536 or less."
        )
    target, stem, files = Path(folder), re.sub(r"[^\w.-]+", "-", Path(path).stem).strip("-") or "text", {}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for old in (ABOUT, *(p.name for p in target.glob(f"{glob.escape(stem)}_*_??????.bin"))):
            (target / old).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"{target} cannot be made: {error.strerror}.") from None
    for split, label, first in (("train", "train", 1), ("valid", "val", 0)):
        separators: list[int] = []  # their places: they are no bytes of the text, even where they look like some
        for number, tokens in enumerate(_shards(_symbols(corpus, tokenizer, split, separators), shard), first):
            name = f"{stem}_{label}_{number:06d}.bin"
            write_shard(target / name, tokens)
            begin = (number - first) * shard
            inserted = [tokenizer.separator or 0 for place in separators if begin <= place < begin + shard]
            size = len(tokenizer.decode_bytes(tokens)) - len(tokenizer.decode_bytes(inserted))
            files[name] = {
                "tokens": len(tokens), "bytes": size,
                "sha256": hashlib.sha256((target / name).read_bytes()).hexdigest(),
            }  # fmt: skip
    about = {"tokenizer": tokenizer.to_dict(), "vocab": tokenizer.size, "files": files}
    (target / ABOUT).write_text(json.dumps(about, indent=1))
    return about


def _symbols(corpus: Corpus, tokenizer: Tokenizer, split: str, separators: list[int]) -> Iterator[npt.NDArray[Any]]:
    """The symbols of a split; the places of the separators are put into the list."""
    count = 0
    for passage in passages(corpus):
        if passage.split == split:
            chunks = passage.document.chunks(passage.begin, passage.end, CHUNK)
            if tokenizer.separator is not None:
                separators.append(count)
                count += 1
                yield np.array([tokenizer.separator])
            for symbols in encode_chunks(tokenizer, chunks, passage.document.where):
                count += len(symbols)
                yield symbols


def _shards(parts: Iterator[npt.NDArray[Any]], size: int) -> Iterator[npt.NDArray[np.uint16]]:
    """The same symbols in pieces of a size, the last one shorter."""
    held: list[npt.NDArray[np.uint16]] = []
    count = 0
    for part in parts:
        held.append(part.astype(np.uint16))
        count += len(part)
        while count >= size:
            whole = np.concatenate(held)
            yield whole[:size]
            held, count = [whole[size:]], count - size
    if count:
        yield np.concatenate(held)


def download(
    folder: str | os.PathLike[str], count: int, say: Callable[[str], None] = print, source: str = FINEWEB
) -> None:
    """Fetch the validation shard and the first training shards of FineWeb; go on where an earlier call ended.

    What is whole is left alone. Every file is checked: its header, its length, and its SHA-256 where the server names
    one.

    Raises:
        UsageError: if there are not so many shards.
        RunError: if the network fails (what has come is kept), or a file is not what it should be.
    """
    if not 1 <= count <= FINEWEB_SHARDS:
        raise UsageError(f"shards={count} must be 1 to {FINEWEB_SHARDS}.")
    target = Path(folder)
    names = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, count + 1))]
    say(f"{len(names)} files of up to {(HEADER + 2 * SHARD) / 1e6:.0f} MB from {source}, licence {FINEWEB_LICENCE}.")
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        if (target / name).exists():
            read_shard(target / name)
            continue
        say(f"fetching {name}")
        try:
            _fetch(source + name, target / name)
        except (OSError, urllib.error.URLError) as error:
            raise RunError(f"{source + name} could not be fetched ({error}); run the command again to go on.") from None
        read_shard(target / name)


def _fetch(url: str, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer, part.open("ab") as file:
        if have and answer.status != 206:  # a server that begins again
            file.truncate(0)
        digest = (answer.headers.get("X-Linked-ETag") or "").strip('"')
        left = int(answer.headers.get("Content-Length") or 0)
        while block := answer.read(CHUNK):
            left -= file.write(block)
    if left > 0:
        raise ConnectionError(f"the connection ended {left} bytes early")
    if len(digest) == 64:
        with part.open("rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
        if got != digest:
            part.unlink()
            raise RunError(
                f"{target.name} came damaged (SHA-256 {got[:12]}…, not {digest[:12]}…); run the command again."
            )
    os.replace(part, target)
