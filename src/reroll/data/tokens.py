"""Token shards, the files that speedruns share, and batches of them.

    bytes 0 … 1023      256 little-endian int32: the magic number 20240520, version 1, the number of tokens n, zeros
    bytes 1024 …        n little-endian uint16

    write_shard("my_train_000001.bin", tokens)
    tokens = read_shard("my_train_000001.bin")            memory-mapped
    task = TokenBatches("fineweb10B/", length=1024, batch=512)

A step's *global* batch is a function of the step alone. Batch t of a shard of n tokens begins at t · B · T, row r of it
at t · B · T + r · T; the shard has ⌊(n − 1) / (B T)⌋ of them, and then the next one begins. Whoever wants some of the
rows asks for them (`rows=`), so no number of processes, and no batch per device, changes which tokens a step sees.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reroll.data.cache import replacing
from reroll.data.text import IntArray, Windows
from reroll.data.tokenizers import Tokenizer, from_dict
from reroll.errors import RunError, UsageError, require_positive
from reroll.kernels.philox import random_integers

MAGIC, VERSION, HEADER = 20240520, 1, 1024
ABOUT = "tokens.json"
"""Beside the shards, what is known of them: the tokenizer, and of every file its tokens, bytes of text and SHA-256."""
SAMPLE = 1 << 20  # bytes at either end of a shard that its fingerprint is made of
GPT2_SYMBOLS = 50_257


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
            file.write(array.astype("<u2", copy=False).tobytes())
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
            here, array = shard == index, self.arrays[index]
            if self.paths[index].stat().st_size < HEADER + 2 * len(array):  # to read on would end the process
                raise RunError(f"{self.paths[index]} has become shorter since it was opened. Get it again, and resume.")
            result[here] = array[places[here] - (self.ends[index] - len(array))]
            if (largest := int(result[here].max())) >= self.vocab:
                raise RunError(f"{self.paths[index]} holds token {largest}; the vocabulary is 0 … {self.vocab - 1}.")
        return result

    def fingerprint(self) -> str:
        """Return a SHA-256 of every shard's length and of a megabyte at either end of it."""
        digest = hashlib.sha256()
        for array in self.arrays:
            digest.update(np.int64(len(array)).tobytes())
            digest.update(array[: SAMPLE // 2].tobytes() + array[-SAMPLE // 2 :].tobytes())
        return digest.hexdigest()


class TokenBatches(Windows):
    """Predict the next token of shards, read from end to end.

    Args:
        path: a folder with shards, or a glob; "train" and "val" in their names say which split they are of.
        length: T, tokens per row.
        batch: B, rows of the *global* batch.
        seed: names the shifts of later epochs.
        carry: row b reads on and on, from ⌊b m / B⌋ of all m tokens, so that a state can be carried; `Batch.reset` is
            True where a document begins.
        epochs: how often the tokens may be seen; every epoch after the first begins up to T tokens further on, so that
            its rows are cut elsewhere.
        valid_tokens: of the "val" shards, the first ones that are scored; None: all.
        vocab: symbols. None: of the tokenizer that tokens.json names; without that file GPT-2's.
        whole: there need be no "train" shard.

    Attributes: `most_steps`, the number of batches there are to train on.

    Raises:
        UsageError: if there are no shards, one is damaged, or there are too few tokens for a batch or for validation.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> write_shard(folder / "x_train_000001.bin", np.arange(100))
        >>> write_shard(folder / "x_val_000000.bin", np.arange(50))
        >>> task = TokenBatches(folder, length=8, batch=4, valid_tokens=32)
        >>> task.most_steps, task.batch(1).inputs[0].tolist()
        (3, [32, 33, 34, 35, 36, 37, 38, 39])
    """

    name = "tokens"

    def __init__(
        self,
        path: str | os.PathLike[str],
        length: int = 1024,
        batch: int = 512,
        seed: int = 0,
        *,
        carry: bool = False,
        epochs: int = 1,
        valid_tokens: int | None = 10_485_760,
        vocab: int | None = None,
        whole: bool = False,
    ) -> None:
        require_positive(length=length, batch=batch, epochs=epochs, valid_tokens=valid_tokens, vocab=vocab)
        self.path, self.length, self.batch_size, self.seed = os.fspath(path), length, batch, seed
        self.carries, self.epochs, self.eval_batches = carry, epochs, None
        files = _find(self.path, needs_train=not whole)
        self.tokenizer = _tokenizer(files["valid"][0].parent)
        self.document = getattr(self.tokenizer, "separator", None)
        self.vocab = self.outputs = vocab or (self.tokenizer.size if self.tokenizer else GPT2_SYMBOLS)
        self.tokens: dict[str, Any] = {split: Shards(paths, self.vocab) for split, paths in files.items()}
        self.fingerprint = hashlib.sha256("".join(s.fingerprint() for s in self.tokens.values()).encode()).hexdigest()
        self.trains = "train" in self.tokens
        self._limit_validation(valid_tokens)
        if whole:
            return
        shift = length if epochs > 1 else 0
        counts = [max(len(array) - 1 - shift, 0) // (batch * length) for array in self.tokens["train"].arrays]
        self.shard_batches = np.cumsum(counts)
        if not self.shard_batches[-1]:
            raise UsageError(
                f"{self.path} has no shard with the {batch} × {length} + 1 tokens of one batch; lower batch or length."
            )
        pairs = len(self.tokens["train"]) - 1
        per_epoch = -(-pairs // (batch * length)) if carry else int(self.shard_batches[-1])
        self.most_steps = epochs * per_epoch

    def begins(self, step: int, unit: int | None, steps: int) -> IntArray:
        """Return where the rows of a step begin; every unit sees the same ones."""
        if step >= (self.most_steps or 0):
            raise UsageError(
                f"step={step} has no tokens left: {self.path} has {self.most_steps} batches of {self.batch_size} × "
                f"{self.length} in {self.epochs} epoch(s). Give more shards, more epochs, or take fewer steps."
            )
        epoch, index = divmod(step, int(self.shard_batches[-1]))
        shard = int(np.searchsorted(self.shard_batches, index, "right"))
        before, tokens = (int(self.shard_batches[shard - 1]) if shard else 0), self.tokens["train"]
        begin = int(tokens.ends[shard]) - len(tokens.arrays[shard]) + (index - before) * self.batch_size * self.length
        if epoch:
            begin += int(random_integers(self.key("train", epoch, None).at("shift"), 1, self.length)[0])
        return begin + np.arange(self.batch_size) * self.length

    def describe(self) -> str:
        """Return how many tokens there are, in a line."""
        counts = ", ".join(f"{len(shards):,} to {split}" for split, shards in self.tokens.items())
        return f"{self.path}: {counts.replace('to valid', 'held out')}; vocabulary of {self.vocab}."

    def _limit_validation(self, wanted: int | None) -> None:
        held_out = self.tokens["valid"]
        if wanted is not None and len(held_out) < wanted + 1:
            raise UsageError(
                f"the val shards of {self.path} have {len(held_out)} tokens; valid_tokens={wanted} needs one more than "
                "that. Give more, or set valid_tokens (none: all), which is another number than others report."
            )
        held_out.limit = len(held_out) if wanted is None else wanted + 1
        self.splits = ("valid",)


def _find(path: str, needs_train: bool) -> dict[str, list[Path]]:
    """The shards of a folder or a glob by split, in the order of their names."""
    files = sorted(Path(path).glob("*.bin") if Path(path).is_dir() else map(Path, glob.glob(path)))
    held_out = [file for file in files if "val" in file.name]
    splits = {"train": [file for file in files if "train" in file.name], "valid": held_out}
    missing = [split for split in ("valid", "train")[: 1 + needs_train] if not splits[split]]
    if missing:
        raise UsageError(
            f"{path} has no {' and no '.join(missing)} shard: files NAME_train_000001.bin and NAME_val_000000.bin are "
            "read. `reroll data prepare tokens --path TEXT --to FOLDER` makes them of a text, and "
            "`reroll data prepare fineweb` fetches the speedrun's."
        )
    return {split: paths for split, paths in splits.items() if paths}


def _tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer that tokens.json names; None without such a file."""
    try:
        about = json.loads((folder / ABOUT).read_text())
        return from_dict(about["tokenizer"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{folder / ABOUT} is damaged ({type(error).__name__}); make the shards again.") from None
