"""Text as a task: predict the next symbol, in windows drawn at random or in streams whose state is carried on.

    task = Text("stdlib:prose", length=128, batch=16)         bytes of the prose of Python's own documentation
    task = Text("ptb/", tokenizer="word", carry=True)         Penn Treebank, read as one long text
    task.baselines("valid")                                   bits per symbol of unigrams, bigrams and gzip

Inputs are tokens[i : i + T], targets tokens[i + 1 : i + T + 1], all of them scored. A split of n tokens has m = n − 1
of these pairs. An evaluation goes through the held-out part in order, each pair once; at training

    drawn      row b of step t begins at ⌊u·(m − T + 1)⌋, u from Key(seed).at("data").at("text").at("train").at(t)
    carried    row b of step t begins at (b·⌊m/B⌋ + t·T) mod m: B readers of the same text at equal distances
"""

from __future__ import annotations

import os
import zlib
from abc import abstractmethod
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reroll.data.batch import Batch, check_rows
from reroll.data.cache import Streams, load
from reroll.data.corpus import find, whole_held_out
from reroll.data.task import FileTask
from reroll.data.tokenizers import Tokenizer
from reroll.errors import UsageError, plural, require_positive
from reroll.kernels.philox import random_integers
from reroll.keys import Key

IntArray = npt.NDArray[np.int64]

MEASURED = 1 << 22  # symbols that baselines measure: their pairs are sorted in 100 MB


class Windows(FileTask):
    """Predict the next symbol in windows of one long row of symbols for every split.

    Attributes a subclass sets: `tokens`, by split; `length` and `batch_size`, T and B; `tokenizer`, or None; and
    `document`, the symbol that begins a document when carrying, or None. It defines `begins`.
    """

    tokens: dict[str, Any]
    batch_size: int
    tokenizer: Tokenizer | None
    document: int | None = None

    @abstractmethod
    def begins(self, step: int, unit: int | None, steps: int) -> IntArray:
        """Return where the rows of a training step begin, [B], if nothing is carried."""

    def make(self, step: int, split: str, length: int | None, unit: int | None) -> Batch:
        """Return the windows of a step; when carrying each batch begins where the last one ended, in every unit.

        A held-out part is read in B windows one after the other; when carrying, by B readers of a B-th each.
        """
        return self.make_rows(step, split, length, unit, None)

    def make_rows(self, step: int, split: str, length: int | None, unit: int | None, rows: range | None) -> Batch:
        """Return some windows of a step; where nothing is carried the others are not read."""
        tokens, row = self.tokens[split], np.arange(self.batch_size)
        pairs, steps = len(tokens) - 1, length or self.length
        if self.carries and steps != self.length:
            raise UsageError(f"length={length} cannot change with carry=True; drop the curriculum, or the carrying.")
        if self.carries:
            share = pairs // self.batch_size if split == "train" else -(-pairs // self.batch_size)
            begin, end = row * share + step * self.length, (row + 1) * share
        elif split == "train":
            begin = end = self.begins(step, unit, steps)
        else:
            begin = (step * self.batch_size + row) * self.length
            begin = begin[begin < pairs]  # the last batch may have fewer rows
            end = begin + self.length
        count, scored = len(begin), len(begin) * steps
        if split != "train":
            scored = int((np.minimum(end, pairs) - begin).clip(0, steps).sum())
        if rows is not None:
            check_rows(rows, count)
            begin, end = begin[rows.start : rows.stop], end[rows.start : rows.stop]
        scored = scored * (len(begin) / count)
        if not self.carries and (whole := self._read(split, begin, steps)) is not None:
            return Batch(*whole, torch.from_numpy(np.ones((len(begin), steps), dtype=bool)), scored)
        place = begin[:, None] + np.arange(steps)
        if split == "train":  # wraps around
            place, mask = place % pairs, np.ones(place.shape, dtype=bool)
        else:
            place, mask = np.minimum(place, pairs - 1), place < np.minimum(end, pairs)[:, None]
        inputs, targets = (torch.from_numpy(tokens[at].astype(np.int64)) for at in (place, place + 1))
        reset = place == 0
        reset[:, 0] |= step == 0
        if self.document is not None:
            reset |= inputs.numpy() == self.document
        # With a mask of resets a model cannot run the sequence by one kernel; most batches begin no document.
        begins = torch.from_numpy(reset) if self.carries and reset.any() else None
        return Batch(inputs, targets, torch.from_numpy(mask), scored, reset=begins)

    def _read(self, split: str, begin: IntArray, steps: int) -> tuple[Tensor, Tensor] | None:
        """Inputs and targets of rows that are read faster than place by place; None: these are not."""
        return None

    def count(self, split: str) -> int:
        pairs = len(self.tokens[split]) - 1
        return -(-pairs // (self.batch_size * self.length))

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {"tokenizer": self.tokenizer and self.tokenizer.to_dict()}

    def decode(self, symbols: list[int]) -> str:
        """Return the text of symbols."""
        return super().decode(symbols) if self.tokenizer is None else self.tokenizer.decode(symbols)

    def encode(self, text: str) -> list[int]:
        """Return the symbols of a text."""
        return super().encode(text) if self.tokenizer is None else self.tokenizer.encode(text).tolist()


class Text(Windows):
    """Predict the next symbol of a text.

    Args:
        path: a file, a folder, a glob, a .jsonl or .parquet file, "stdlib" or "stdlib:prose"; see `corpus.find`.
        tokenizer: "byte", "char", "word", "bpe" or "gpt2"; or a tokenizer, used as it is.
        length: T, steps per window.
        batch: B, windows per batch.
        seed: selects the windows.
        carry: batches continue each other, row by row, so that a model's state can be carried on; `Batch.reset` is
            True where a row begins, at the first step and whenever it comes around to the beginning of the text.
        max_vocab: the largest vocabulary of `char` (None: 1024), `word` (None: 10,000) and `bpe` (None: 8192).
        field: the field of a JSON line, or the column, that holds the text.
        eval_batches: the most batches of an evaluation; None: all of the held-out part.
        whole: hold out all of the text, to score a model on it. One that is shorter than `length` is one window.

    Attributes: `tokenizer`; `tokens`, the symbols by split, memory-mapped; `fingerprint`, SHA-256 of all of them.

    Raises:
        UsageError: if there is no such text, or it is shorter than a window.

    Example:
        >>> task = Text("stdlib:prose", length=32, batch=2)
        >>> batch = task.batch(0)
        >>> batch.inputs.shape, batch.scored, task.vocab
        (torch.Size([2, 32]), 64.0, 256)
        >>> torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        True
    """

    name = "text"

    def __init__(
        self,
        path: str | os.PathLike[str],
        tokenizer: str | Tokenizer = "byte",
        length: int = 128,
        batch: int = 16,
        seed: int = 0,
        *,
        carry: bool = False,
        max_vocab: int | None = None,
        field: str = "text",
        eval_batches: int | None = 64,
        whole: bool = False,
    ) -> None:
        require_positive(length=length, batch=batch, eval_batches=eval_batches)
        self.path, self.batch_size, self.seed = os.fspath(path), batch, seed
        self.carries, self.eval_batches = carry, eval_batches
        corpus = find(path, field, unused=whole)  # the field may be that of the text that was trained on
        streams = load(whole_held_out(corpus) if whole else corpus, tokenizer, max_vocab)
        self.tokenizer, self.fingerprint = streams.tokenizer, streams.fingerprint
        self.vocab = self.outputs = streams.tokenizer.size
        if whole:  # a text that is shorter than a window is one window
            length = max(min(length, len(streams.tokens.get("valid", ())) - 1), 1)
        self.length = length
        self.tokens = _splits(streams, self.path, length, whole)
        self.splits = tuple(split for split in self.tokens if split != "train")
        self.trains = "train" in self.tokens
        self._description = self._described(streams, corpus.note)
        if carry and not whole and len(self.tokens["train"]) <= batch:
            raise UsageError(f"batch={batch} has more rows than {self.path} has symbols; lower it, or give more text.")

    def begins(self, step: int, unit: int | None, steps: int) -> IntArray:
        """Return positions drawn with the key of the step."""
        return random_places(self.key("train", step, unit), self.batch_size, len(self.tokens["train"]) - steps)

    def describe(self) -> str:
        """Return in one line what was read: its size, documents and vocabulary, and the share that is held out."""
        return self._description

    def _described(self, streams: Streams, note: str) -> str:
        counts = {split: len(symbols) for split, symbols in self.tokens.items()}
        total, documents = sum(counts.values()), streams.documents
        share = f"{counts['valid']:,} ({100 * counts['valid'] / total:.3g} %) held out"
        parts = [
            f"{self.path}: {streams.size:,} bytes of text in {plural(documents, 'document')}",
            f"{total:,} symbols, {share if self.trains else 'all of it scored'}",
            f"vocabulary of {self.vocab:,} (tokenizer {streams.tokenizer.name})",
            f"skipped, having no text: {streams.empty:,}" * bool(streams.empty), note,
        ]  # fmt: skip
        return "; ".join(filter(None, parts)) + "."

    def baselines(self, split: str = "valid") -> Baselines:
        """Return the bits per symbol that counting and gzip need for a split; see `baselines`."""
        self.check_split(split)
        assert self.tokenizer is not None
        return baselines(self.tokens[split], self.tokenizer)


class Baselines(NamedTuple):
    """Bits per symbol of a text by counting symbols, by counting pairs, by gzip -9; and how many were measured."""

    unigram: float
    bigram: float
    gzip: float
    symbols: int


def baselines(tokens: npt.NDArray[Any], tokenizer: Tokenizer, limit: int = MEASURED) -> Baselines:
    """Return the bits per symbol that counting and gzip need for a text.

        unigram   H(X)              = −Σ_a p(a) log₂ p(a)
        bigram    H(X_t | X_{t−1})  = −Σ_{a,b} p(a, b) log₂ p(b | a)
        gzip      8 · bytes of `gzip -9` of the text / symbols

    The frequencies are those of the measured text itself, so no model that sees no symbol, or one symbol, before the
    next can have a lower loss there, however it was trained.

    Args:
        tokens: the symbols of the text, [n]; of a memory-mapped array only what is measured is read.
        tokenizer: turns them into text for gzip.
        limit: the most symbols measured, from the beginning.

    Raises:
        UsageError: if there are fewer than two symbols.

    Example:
        >>> from reroll.data.tokenizers import Byte
        >>> measured = baselines(np.frombuffer(b"abababab" * 100, np.uint8), Byte())
        >>> measured.unigram, measured.bigram < 0.01, measured.gzip < 0.5
        (1.0, True, True)
    """
    part = np.asarray(tokens[:limit]).astype(np.int64)
    if len(part) < 2:
        raise UsageError(f"tokens has {len(part)} symbols; entropies need at least 2.")
    pairs = entropy(part[:-1] * tokenizer.size + part[1:])
    size = len(zlib.compress(tokenizer.decode_bytes(part), 9, 31))  # 31: with the header of gzip
    return Baselines(entropy(part), pairs - entropy(part[:-1]), 8 * size / len(part), len(part))


def entropy(symbols: IntArray) -> float:
    """Return the entropy of the frequencies of symbols, in bits.

    Example:
        >>> entropy(np.array([0, 0, 1, 2]))
        1.5
    """
    counts = np.unique(symbols, return_counts=True)[1]
    return float(np.log2(len(symbols)) - (counts * np.log2(counts)).sum() / len(symbols))


def random_places(key: Key, count: int, high: int) -> IntArray:
    """Return integers in [0, high) for any `high` < 2⁵³: ⌊u · high⌋, u with 53 bits.

    Example:
        >>> random_places(Key(0), 4, 10**12).max() > 2**31
        np.True_
    """
    coarse = random_integers(key.at("coarse"), count, 2**26)
    fine = random_integers(key.at("fine"), count, 2**27)
    # The product may round up to `high` itself.
    return np.minimum(((coarse << 27) + fine) * 2.0**-53 * high, high - 1).astype(np.int64)


def _splits(streams: Streams, path: str, length: int, whole: bool) -> dict[str, npt.NDArray[Any]]:
    """The symbols by split, each with one window at least.

    The held-out end of a single short text is extended to a window; other splits stay as they are.
    """
    expected, needed = ("valid",) if whole else ("train", "valid"), length + 1
    tokens = dict.fromkeys(expected, np.empty(0, dtype=np.uint8)) | streams.tokens  # no symbols, no file
    if streams.single and len(tokens["valid"]) < needed:
        everything = np.concatenate([tokens["train"], tokens["valid"]])
        if len(everything) < 2 * needed:
            raise UsageError(
                f"length={length} is too long for {path}, which has {len(everything)} symbols: its end is held out for "
                f"validation, and both parts need a window of {needed}, the length and the symbol after it. "
                f"Give {_shorter(len(everything) // 2)}."
            )
        tokens = {"train": everything[:-needed], "valid": everything[-needed:]}
    for split, symbols in tokens.items():
        if len(symbols) < needed and (split == "valid" or not whole):
            raise UsageError(
                f"length={length} is too long for {path if whole else f'the split {split!r} of {path}'}, which has "
                f"{len(symbols)} symbols; {needed} are needed. Give {_shorter(len(symbols))}."
            )
    return {split: symbols for split, symbols in tokens.items() if len(symbols) >= needed}


def _shorter(symbols: int) -> str:
    return "more text" if symbols < 2 else f"length={symbols - 1} or less, or more text"
