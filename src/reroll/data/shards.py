"""The files of token shards: their format, what tokens.json says of them, and several of them as one row of tokens.

write_shard("my_train_000001.bin", tokens)
tokens = read_shard("my_train_000001.bin")            memory-mapped
about = About.beside(Path("my_train_000001.bin"))     the tokenizer, and checksums
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reroll.data.cache import cache_folder, replacing
from reroll.data.tokenizers import GPT2, Tokenizer, from_dict
from reroll.errors import RunError, UsageError

log = logging.getLogger(__name__)

MAGIC, VERSION, HEADER = 20240520, 1, 1024
ABOUT = "tokens.json"
"""Beside the shards, what is known of them: the tokenizer and its size, the symbol that precedes every document (null:
none that means only that), and of every file its tokens, bytes of text and SHA-256."""
GPT2_DOCUMENT = 50_256
DECODED = 1 << 20  # tokens decoded at once, where their bytes are counted


def write_shard(path: str | os.PathLike[str], tokens: npt.ArrayLike) -> None:
    """Write a shard; it takes its place when it is whole.

    Raises:
        UsageError: if the tokens are not whole numbers 0 … 65535 in one row, at least one.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "my_train_000001.bin"
        >>> write_shard(path, [1, 2, 50256])
        >>> path.stat().st_size, read_shard(path).tolist()
        (1030, [1, 2, 50256])
    """
    array, path = np.asarray(tokens), Path(path)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise UsageError(f"tokens of shape {array.shape} and {array.dtype} must be one row of whole numbers.")
    if array.min() < 0 or array.max() > 0xFFFF:
        raise UsageError(f"tokens lie in [{array.min()}, {array.max()}]; a shard holds 0 … 65535.")
    if array.size >= 1 << 31:
        raise UsageError(f"{array.size} tokens are more than a shard's header can count; write several.")
    header = np.zeros(HEADER // 4, "<i4")
    header[:3] = MAGIC, VERSION, array.size
    try:
        with replacing(path) as file:
            file.write(header.tobytes())
            file.write(np.ascontiguousarray(array, "<u2").data)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror}.") from None


def read_shard(path: str | os.PathLike[str]) -> npt.NDArray[np.uint16]:
    """Return the tokens of a shard, memory-mapped.

    Raises:
        UsageError: if the file cannot be read, or its header or length is not that of a shard.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            header = np.frombuffer(file.read(HEADER), "<i4") if path.stat().st_size >= HEADER else np.zeros(3, "<i4")
            size = path.stat().st_size
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    magic, version, count = (int(n) for n in header[:3])
    if magic != MAGIC:
        raise UsageError(f"{path} is no token shard: it does not begin with the number {MAGIC}.")
    if version != VERSION:
        raise UsageError(f"{path} is a token shard of version {version}; this is version {VERSION}.")
    if count < 1 or size != HEADER + 2 * count:
        raise UsageError(
            f"{path} has {size} bytes; its header says {count} tokens, which take {HEADER + 2 * count}. Get it again."
        )
    return np.memmap(path, "<u2", "r", HEADER, (count,))


class Shards:
    """Several shards as one row of tokens, indexed by arrays of places.

    Args:
        paths: the files, in order.
        vocab: every token is below it; checked as tokens are read.
    """

    def __init__(self, paths: Sequence[Path], vocab: int):
        self.paths, self.vocab = paths, vocab
        self.arrays = [read_shard(path) for path in paths]
        self.ends = np.cumsum([len(array) for array in self.arrays])
        self.limit = int(self.ends[-1])

    def __len__(self) -> int:
        return self.limit

    def __getitem__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        result = np.empty(places.shape, np.int64)
        shard = np.searchsorted(self.ends, places, "right")
        for index in np.unique(shard):
            here = shard == index
            result[here] = self.part(index, places[here] - (self.ends[index] - len(self.arrays[index])))
        return result

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self.read(0, self.limit).astype(dtype or np.int64, copy=False)

    def read(self, begin: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens that follow one another: a hundred times faster than by their places."""
        result, end = np.empty(count, np.int64), begin + count
        for index, after in enumerate(self.ends):
            first = int(after) - len(self.arrays[index])
            if begin < after and first < end:
                part = self.part(index, slice(max(begin - first, 0), end - first))
                result[max(first - begin, 0) :][: len(part)] = part
        return result

    def part(self, index: int, places: Any) -> npt.NDArray[np.uint16]:
        """Return some tokens of a shard.

        Raises:
            RunError: if its file has become shorter, or one of them is beyond the vocabulary.
        """
        path, array = self.paths[index], self.arrays[index]
        if path.stat().st_size < HEADER + 2 * len(array):  # to read on would end the process
            raise RunError(f"{path} has become shorter since it was opened. Get it again, and resume.")
        part = array[places]
        if (largest := int(part.max())) >= self.vocab:
            raise RunError(f"{path} holds token {largest}; the vocabulary is 0 … {self.vocab - 1}.")
        return part


@dataclass(frozen=True)
class About:
    """What tokens.json says of the shards beside it; without that file, that they are GPT-2's.

    Args:
        tokenizer: None if there is none, or it needs a package that is not installed: training needs none.
        vocab: symbols.
        document: the symbol that precedes every document and occurs nowhere else, or None.
        files: of every shard its tokens, bytes and SHA-256, as far as known.
    """

    tokenizer: Tokenizer | None = None
    vocab: int = GPT2.size
    document: int | None = GPT2_DOCUMENT
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def beside(cls, shard: Path) -> About:
        """Read the file in the folder of a shard."""
        path = shard.parent / ABOUT
        try:
            about = json.loads(path.read_text())
            tokenizer = None
            try:
                tokenizer = from_dict(about["tokenizer"])
            except UsageError as error:
                if about["tokenizer"]["name"] != GPT2.name:
                    raise
                log.info("%s names GPT-2's tokenizer, which is not there (%s).", path, error)
            usual = GPT2_DOCUMENT if about["tokenizer"]["name"] == GPT2.name else None
            vocab = int(tokenizer.size if tokenizer is not None else GPT2.size)
            return cls(tokenizer, vocab, about.get("document", usual), dict(about.get("files", {})))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is damaged ({type(error).__name__}); make the shards again.") from None

    def check(self, path: Path) -> str:
        """Return the SHA-256 of a shard.

        Raises:
            UsageError: if it is not the one that is expected.
        """
        found, expected = sha256_of(path), self.files.get(path.name, {}).get("sha256")
        if expected is not None and found != expected:
            raise UsageError(
                f"{path} is damaged: its SHA-256 is {found[:12]}…, {ABOUT} says {expected[:12]}…. Get it again."
            )
        return found

    def bytes_of(self, shards: Shards) -> int | None:
        """Return the bytes of text of the tokens after the first one of some shards, up to their limit, if known."""
        total, left = 0, shards.limit
        for index, (path, array) in enumerate(zip(shards.paths, shards.arrays)):
            size = self.files.get(path.name, {}).get("bytes")
            if left < len(array):  # the end of the limit lies inside this one
                size = self._bytes(shards.part(index, slice(left)))
            if size is None:
                return None
            total, left = total + size, left - min(left, len(array))
            if not left:
                break
        first = shards.part(0, slice(1))
        begins = self.tokenizer is not None and self.tokenizer.has_unknown and first[0] == self.tokenizer.separator
        size = 0 if begins else self._bytes(first)
        return None if size is None else total - size

    def _bytes(self, tokens: npt.NDArray[np.uint16]) -> int | None:
        """The bytes of text of some tokens; None where a tokenizer does not keep them."""
        if self.document is not None:
            tokens = tokens[tokens != self.document]
        if not len(tokens):
            return 0
        if self.tokenizer is None or self.tokenizer.has_unknown:
            return None
        parts = (tokens[begin : begin + DECODED] for begin in range(0, len(tokens), DECODED))
        return sum(len(self.tokenizer.decode_bytes(part)) for part in parts)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file; remembered in the cache folder until its size, time or place on the disk changes.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        path = path.resolve()
        status = path.stat()
        seen = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = cache_folder() / f"sha256-{hashlib.sha256(os.fsencode(path)).hexdigest()[:24]}.json"
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            saved = json.loads(known.read_text())
            if saved["seen"] == seen:
                return str(saved["sha256"])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from None
    with contextlib.suppress(OSError), replacing(known) as file:
        file.write(json.dumps({"path": str(path), "seen": seen, "sha256": found}).encode())
    return found


def described(path: Path, size: int | None = None) -> dict[str, Any]:
    """Return what tokens.json says of a shard: its tokens, SHA-256 and, if known, bytes of text."""
    about: dict[str, Any] = {"tokens": len(read_shard(path))}
    return about | ({} if size is None else {"bytes": size}) | {"sha256": sha256_of(path)}
