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
import math
import os
import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reroll.data.shards import ABOUT, HEADER, MAGIC, About, Shards, read_shard, write_shard
from reroll.data.task import Score
from reroll.data.text import IntArray, Windows
from reroll.errors import UsageError, require_positive
from reroll.kernels.philox import random_integers

__all__ = ["ABOUT", "HEADER", "MAGIC", "TokenBatches", "read_shard", "write_shard"]

NAME = re.compile(r"_(train|val)_\d+\.bin$")
"""What the name of a shard ends in, by which it is of a split."""


class TokenBatches(Windows):
    """Predict the next token of shards, read from end to end.

    Args:
        path: a folder with shards, or a glob; "train" and "val" in their names say which split they are of.
        length: T, tokens per row.
        batch: B, rows of the *global* batch.
        seed: names the shifts of later epochs.
        carry: row b reads on and on, from ⌊b m / B⌋ of all m tokens, so that a state can be carried; `Batch.reset` is
            True where a document begins.
        epochs: how often the tokens may be seen; every epoch after the first begins 1 … T − 1 tokens further on, so
            that its rows are cut elsewhere.
        shuffle: take the n windows of T tokens in the order i k mod n, with k ≈ 0.618 n and no common divisor: rows
            and steps from all over the text. False: in the order of the text, as FineWeb's documents are in no order.
        valid_tokens: of the "val" shards, the first ones that are scored; None: all.
        vocab: symbols. None: as many as tokens.json says; without that file GPT-2's.
        whole: there need be no "train" shard.

    Attributes: `most_steps`, the number of batches there are to train on; `fingerprint`, of the SHA-256 of every shard,
    and `valid_fingerprint`, of those of the held-out ones; `valid_bytes`, by which a score has `bits_per_byte`.

    The SHA-256 of a shard is computed when it is first opened (0.1 to 0.4 s for 200 MB), compared with tokens.json, and
    remembered in the cache until the file changes.

    Raises:
        UsageError: if there are no shards, one is damaged or does not have the SHA-256 that tokens.json says, or there
            are too few tokens for a batch or for validation.

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
        shuffle: bool = False,
        valid_tokens: int | None = 10_485_760,
        vocab: int | None = None,
        whole: bool = False,
    ) -> None:
        require_positive(length=length, batch=batch, epochs=epochs, valid_tokens=valid_tokens, vocab=vocab)
        if carry and shuffle:
            raise UsageError("carry=True reads the text in order; drop shuffle=True.")
        self.path, self.length, self.batch_size, self.seed = os.fspath(path), length, batch, seed
        self.carries, self.epochs, self.shuffle, self.eval_batches = carry, epochs, shuffle, None
        files = _find(self.path, needs_train=not whole)
        about = About.beside(files["valid"][0])
        self.tokenizer, self.document = about.tokenizer, about.document
        self.vocab = self.outputs = vocab or about.vocab
        self.tokens: dict[str, Any] = {split: Shards(paths, self.vocab) for split, paths in files.items()}
        sums = {split: [about.check(path) for path in paths] for split, paths in files.items()}
        self.fingerprint = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()
        self.valid_fingerprint = hashlib.sha256(json.dumps(sums["valid"]).encode()).hexdigest()
        self.shards = {file.name: digest for split, paths in files.items() for file, digest in zip(paths, sums[split])}
        self.trains = "train" in self.tokens
        self._limit_validation(valid_tokens)
        self._about = about
        if not whole:
            self._count_batches()

    @cached_property
    def valid_bytes(self) -> int | None:
        """The bytes of text of the scored tokens; None where they are not known."""
        return self._about.bytes_of(self.tokens["valid"])

    def _count_batches(self) -> None:
        train, size = self.tokens["train"], self.batch_size * self.length
        lengths = [len(train)] if self.shuffle else list(map(len, train.arrays))  # a window may lie in two shards
        # By shard, how many batches there are up to its end: in the first epoch, and where the rows are shifted.
        self.first_epoch, self.later_epochs = (
            np.cumsum([max(length - 1 - shift, 0) // size for length in lengths])
            for shift in (0, max(self.length - 1, 1))
        )
        if not self.first_epoch[-1]:
            raise UsageError(
                f"{self.path} has no shard with the {self.batch_size} × {self.length} + 1 tokens of one batch; lower "
                "batch or length."
            )
        self.most_steps = int(self.first_epoch[-1] + (self.epochs - 1) * self.later_epochs[-1])
        if self.carries:  # every row reads its own share of the tokens, `epochs` times
            self.most_steps = self.epochs * ((len(train) - 1) // self.batch_size) // self.length

    def begins(self, step: int, unit: int | None, steps: int) -> IntArray:
        """Return where the rows of a step begin; every unit sees the same ones."""
        if step >= (self.most_steps or 0):
            raise UsageError(
                f"step={step} has no tokens left: {self.path} has {self.most_steps} batches of {self.batch_size} × "
                f"{self.length} in {self.epochs} epoch(s). Give more shards, more epochs, or take fewer steps."
            )
        counts, epoch, index, tokens = self.first_epoch, 0, step, self.tokens["train"]
        if step >= counts[-1]:
            counts = self.later_epochs
            epoch, index = divmod(step - int(self.first_epoch[-1]), int(counts[-1]))
            epoch += 1
        row = np.arange(self.batch_size)
        if self.shuffle:
            windows = int(counts[-1]) * self.batch_size
            begin = (index * self.batch_size + row) * golden_stride(windows) % windows * self.length
        else:
            shard = int(np.searchsorted(counts, index, "right"))
            before = int(counts[shard - 1]) if shard else 0
            of_shard = int(tokens.ends[shard]) - len(tokens.arrays[shard])
            begin = of_shard + ((index - before) * self.batch_size + row) * self.length
        if epoch:
            key = self.key("train", epoch, None).at("shift")
            begin += 1 + int(random_integers(key, 1, max(self.length - 1, 1))[0])
        return begin

    def _read(self, split: str, begin: IntArray, steps: int) -> tuple[Tensor, Tensor] | None:
        if self.shuffle and split == "train":
            return None
        first, count = int(begin[0]), (len(begin) - 1) * self.length + steps + 1
        if first + count > len(self.tokens[split]):
            return None  # the last rows of a held-out part
        tokens = self.tokens[split].read(first, count)
        whole = torch.from_numpy(tokens)
        parts = whole[:-1], whole[1:]  # one piece of memory
        inputs, targets = (part.as_strided((len(begin), steps), (self.length, 1)) for part in parts)
        return inputs, targets

    def summary(self, score: Score, split: str) -> dict[str, float]:
        """Return the means of a score, with `bits_per_byte` of text where the bytes are known."""
        means = super().summary(score, split)
        if self.valid_bytes and split == "valid" and score.scored == len(self.tokens["valid"]) - 1:
            means["bits_per_byte"] = score.loss / math.log(2) / self.valid_bytes
        return means

    def metadata(self) -> dict[str, Any]:
        """Return also the SHA-256 of every shard, and one of those of the held-out ones."""
        return super().metadata() | {"shards": self.shards, "valid_fingerprint": self.valid_fingerprint}

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


def golden_stride(count: int) -> int:
    """Return a number near count / 1.618 without a common divisor: its multiples fall into the widest gaps.

    Example:
        >>> stride = golden_stride(10)
        >>> stride, sorted(i * stride % 10 for i in range(10)) == list(range(10))
        (7, True)
    """
    stride = max(1, round(count * (5**0.5 - 1) / 2))
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


def _find(path: str, needs_train: bool) -> dict[str, list[Path]]:
    """The shards of a folder or a glob by split, in the order of their names."""
    files = sorted(Path(path).glob("*.bin") if Path(path).is_dir() else map(Path, glob.glob(path)))
    splits: dict[str, list[Path]] = {"train": [], "valid": []}
    for file in files:
        if (match := NAME.search(file.name)) is None:
            raise UsageError(f"{file} is neither NAME_train_000001.bin nor NAME_val_000000.bin, so of no split.")
        splits["train" if match[1] == "train" else "valid"].append(file)
    missing = [split for split in ("valid", "train")[: 1 + needs_train] if not splits[split]]
    if missing:
        raise UsageError(
            f"{path} has no {' and no '.join(missing)} shard: files NAME_train_000001.bin and NAME_val_000000.bin are "
            "read. `reroll data prepare tokens --path TEXT --to FOLDER` makes them of a text, and "
            "`reroll data prepare fineweb` fetches the speedrun's."
        )
    return {split: paths for split, paths in splits.items() if paths}
