"""Generated tasks: copy, repeat_copy, reverse, sort, add, parity, recall, memorise.

A sequence is a prompt, SEP, the output, EOS, and PAD up to the width of the batch:

    abc|cba$...        reverse, as `task.decode` prints it: SEP is |, EOS is $, PAD is .

`inputs` is the sequence without its last symbol, `targets` the sequence shifted by one. The mask scores every symbol of
the output, the first one included (it is predicted at SEP), and EOS; nothing else. So a perfect model has loss 0,
accuracy 1 and exact match 1.

    task = Sort(length=10, batch=32, seed=0)
    task.batch(step)               lengths 1 … 10
    task.batch(step, "valid")      the same lengths, other sequences
    task.batch(step, "longer")     lengths 11 … 20: does the model know the rule, or the length?

Content symbols are 0 … S−1, then come SEP, EOS, PAD, then what a task needs besides (repeat counts, "+"). Row b of a
batch does not depend on the number of rows. Everything is drawn from Key(seed).at("data").at(name).at(split).at(step).
"""

from __future__ import annotations

import hashlib
import re
import string
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from reroll.data.batch import Batch
from reroll.data.task import Task
from reroll.errors import UsageError, nearest, require_positive
from reroll.kernels.philox import random_integers
from reroll.keys import Key

IntArray = npt.NDArray[np.int64]

DIGITS = string.digits
# Letters of one character each for 452 symbols; Latin letters with accents follow the plain ones.
LETTERS = string.ascii_letters + "".join(map(chr, range(0xC0, 0x250)))


class Ragged(NamedTuple):
    """B rows of different lengths: symbols [B, W], of which the first `lengths` [B] of a row count."""

    symbols: IntArray
    lengths: IntArray

    @property
    def inside(self) -> npt.NDArray[np.bool_]:
        """True at the places that count, [B, W]."""
        return np.arange(self.symbols.shape[1]) < self.lengths[:, None]


def join(parts: Sequence[Ragged], fill: int) -> Ragged:
    """Return rows one after the other, without gaps, filled up with `fill` to the sum of the widths.

    Example:
        >>> a = Ragged(np.array([[1, 2], [3, 9]]), np.array([2, 1]))
        >>> join([a, a], fill=0).symbols.tolist()
        [[1, 2, 1, 2], [3, 3, 0, 0]]
    """
    width = sum(part.symbols.shape[1] for part in parts)
    symbols = np.full((len(parts[0].lengths), width), fill, dtype=np.int64)
    begin = np.zeros(len(symbols), dtype=np.int64)
    for part in parts:
        place = np.arange(width) - begin[:, None]
        source = np.take_along_axis(part.symbols, place.clip(0, part.symbols.shape[1] - 1), 1)
        symbols = np.where((place >= 0) & (place < part.lengths[:, None]), source, symbols)
        begin = begin + part.lengths
    return Ragged(symbols, begin)


def flip(rows: Ragged) -> Ragged:
    """Return every row backwards; what lies after its end is arbitrary.

    Example:
        >>> flip(Ragged(np.array([[1, 2, 3]]), np.array([2]))).symbols[:, :2].tolist()
        [[2, 1]]
    """
    place = rows.lengths[:, None] - 1 - np.arange(rows.symbols.shape[1])
    return Ragged(np.take_along_axis(rows.symbols, place.clip(0), 1), rows.lengths)


class Generated(Task):
    """What all generated tasks share: their arguments, their symbols, and symbols as text.

    Args:
        length: L, the largest length of the training sequences (what is counted is said by the task).
        batch: B, sequences per batch.
        seed: names the sequences; in [0, 2⁶⁴).
        symbols: S, the number of content symbols.
        names: one short text for every symbol of the vocabulary.
    """

    def __init__(self, length: int, batch: int, seed: int, symbols: int, names: Sequence[str]) -> None:
        require_positive(length=length, batch=batch)
        if symbols < 2:
            raise UsageError(f"symbols={symbols} leaves {self.name} nothing to tell apart; give at least 2.")
        self.length, self.batch_size, self.seed, self.symbols = length, batch, seed, symbols
        self.names = tuple(names)
        self.vocab = self.outputs = len(names)
        # The vocabulary says how many repeat counts there are. The batch is no part of the definition: row b stays.
        definition = f"{self.name}(length={length}, seed={seed}, symbols={symbols}, vocab={self.vocab})"
        self.fingerprint = hashlib.sha256(definition.encode()).hexdigest()

    def decode(self, symbols: Sequence[int]) -> str:
        """Return symbols as text: letters or digits, | for SEP, $ for EOS, . for PAD."""
        return "".join(self.names[symbol] for symbol in symbols)

    def encode(self, text: str) -> list[int]:
        """Return the symbols of a text in the notation of `decode`.

        Raises:
            UsageError: if the task has no such symbol.
        """
        ids = {name: symbol for symbol, name in enumerate(self.names)}
        pieces = re.findall(r"<[^<>]+>|.", text, flags=re.DOTALL)
        for piece in pieces:
            if piece not in ids:
                raise UsageError(f"{self.name} has no symbol {piece!r} in text={text!r}. Known: {''.join(self.names)}")
        return [ids[piece] for piece in pieces]

    def _limit(self, split: str, length: int | None) -> int:
        """Check the arguments of `batch`, and return the largest training length."""
        if split not in ("train", *self.splits):
            raise UsageError(f"split={split!r} is none of {self.name}'s.{nearest(split, ('train', *self.splits))}")
        limit = self.length if length is None else length
        if not 1 <= limit <= self.length:
            raise UsageError(f"length={length} must lie in [1, {self.length}], the length of the task.")
        return limit


class Transduction(Generated):
    """A task that turns a prompt into an output: prompt, output, EOS, PAD…; subclasses say which output.

    Args:
        length: L; training lengths are uniform in 1 … L, those of the split "longer" in L+1 … 2L.
        batch: B, sequences per batch.
        seed: names the sequences.
        symbols: S, the number of content symbols; None is the usual number of the task.

    Example:
        >>> task = Reverse(length=4, batch=2, seed=1)
        >>> batch = task.batch(0)
        >>> [task.decode(row) for row in batch.inputs.tolist()]
        ['sy|ys$...', 'hzaj|jazh']
        >>> [task.decode(row[scored].tolist()) for row, scored in zip(batch.targets, batch.mask)]
        ['ys$', 'jazh$']
    """

    splits = ("valid", "longer")
    alphabet = LETTERS
    usual_symbols = 26
    extras: Sequence[str] = ()

    def __init__(self, length: int = 10, batch: int = 32, seed: int = 0, *, symbols: int | None = None) -> None:
        symbols = self.usual_symbols if symbols is None else symbols
        names = [*_names(self.alphabet, symbols), "|", "$", ".", *self.extras]
        self.separator, self.end, self.pad, self.first_extra = range(symbols, symbols + 4)
        super().__init__(length, batch, seed, symbols, names)

    def make(self, step: int, split: str, length: int | None, unit: int | None) -> Batch:
        """Return the sequences of a step. A smaller `length` is a smaller L; L and the split alone decide the width."""
        limit = self._limit(split, length)
        low, high = (limit + 1, 2 * limit) if split == "longer" else (1, limit)
        key = self.key(split, step, unit)
        lengths = random_integers(key.at("lengths"), self.batch_size, high + 1, low)
        prompt, output = self.example(key, lengths, high)
        begin = prompt.lengths[:, None] - 1  # the output's first symbol is predicted at the prompt's last
        rows = join([prompt, output, self.mark(self.end)], self.pad)
        place = np.arange(rows.symbols.shape[1] - 1)
        mask = (place >= begin) & (place <= begin + output.lengths[:, None])
        symbols = torch.from_numpy(rows.symbols)
        return Batch(symbols[:, :-1].contiguous(), symbols[:, 1:].contiguous(), torch.from_numpy(mask))

    @abstractmethod
    def example(self, key: Key, lengths: IntArray, limit: int) -> tuple[Ragged, Ragged]:
        """Return prompts and outputs of given lengths [B], in widths that depend on the largest length alone."""

    def content(self, key: Key, lengths: IntArray, limit: int) -> Ragged:
        """Return random content symbols."""
        return Ragged(random_integers(key.at("content"), (len(lengths), limit), self.symbols), lengths)

    def mark(self, symbol: int | IntArray) -> Ragged:
        """Return rows of one symbol: the same in all of them, or one each, [B]."""
        one = np.ones(self.batch_size, dtype=np.int64)
        return Ragged((one * symbol)[:, None], one)

    def prompt(self, *parts: Ragged) -> Ragged:
        """Return the parts, then SEP."""
        return join([*parts, self.mark(self.separator)], self.pad)


class Copy(Transduction):
    """Say the content again: abc|abc$. The length counts its symbols."""

    name = "copy"

    def example(self, key: Key, lengths: IntArray, limit: int) -> tuple[Ragged, Ragged]:
        content = self.content(key, lengths, limit)
        return self.prompt(content), content


class RepeatCopy(Transduction):
    """Say the content as often as its last symbol asks for: ab3|ababab$. The length counts the symbols before it.

    Args:
        length, batch, seed, symbols: as in every transduction.
        repeats: the largest count; counts are uniform in 1 … repeats and symbols of their own.
    """

    name = "repeat_copy"

    def __init__(
        self, length: int = 10, batch: int = 32, seed: int = 0, *, symbols: int | None = None, repeats: int = 4
    ) -> None:
        require_positive(repeats=repeats)
        self.extras = [str(count) if count < 10 else f"<x{count}>" for count in range(1, repeats + 1)]
        self.repeats = repeats
        super().__init__(length, batch, seed, symbols=symbols)

    def example(self, key: Key, lengths: IntArray, limit: int) -> tuple[Ragged, Ragged]:
        content = self.content(key, lengths, limit)
        counts = random_integers(key.at("repeats"), self.batch_size, self.repeats + 1, 1)
        place = np.arange(self.repeats * limit) % lengths[:, None]
        output = Ragged(np.take_along_axis(content.symbols, place, 1), lengths * counts)
        return self.prompt(content, self.mark(self.first_extra + counts - 1)), output


class Reverse(Transduction):
    """Say the content backwards: abc|cba$. The length counts its symbols."""

    name = "reverse"

    def example(self, key: Key, lengths: IntArray, limit: int) -> tuple[Ragged, Ragged]:
        content = self.content(key, lengths, limit)
        return self.prompt(content), flip(content)


class Sort(Transduction):
    """Say the content in order: cab|abc$. The length counts its symbols."""

    name = "sort"

    def example(self, key: Key, lengths: IntArray, limit: int) -> tuple[Ragged, Ragged]:
        content = self.content(key, lengths, limit)
        # What lies after the end of a row sorts behind every symbol.
        ordered = np.sort(np.where(content.inside, content.symbols, self.symbols), axis=1)
        return self.prompt(content), Ragged(ordered, lengths)


class Add(Transduction):
    """Add two numbers of n digits each: 07+95|102$. The length counts n; SEP stands for the sign =.

    The most significant digit comes first. Numbers are written with all n digits and sums with n + 1, zeros included,
    so what a place means depends on n alone. `symbols` is the base.
    """

    name = "add"
    alphabet = DIGITS + LETTERS
    usual_symbols = 10
    extras = ("+",)

    def example(self, key: Key, lengths: IntArray, limit: int) -> tuple[Ragged, Ragged]:
        # Drawn with the least significant digit first, where both numbers and their sum are aligned.
        digits = random_integers(key.at("content"), (self.batch_size, 2, limit), self.symbols)
        digits = np.where(np.arange(limit) < lengths[:, None, None], digits, 0)
        total = np.zeros((self.batch_size, limit + 1), dtype=np.int64)
        for place in range(limit):
            here = total[:, place] + digits[:, 0, place] + digits[:, 1, place]
            total[:, place], total[:, place + 1] = here % self.symbols, here // self.symbols
        first, second = (flip(Ragged(digits[:, which], lengths)) for which in (0, 1))
        return self.prompt(first, self.mark(self.first_extra), second), flip(Ragged(total, lengths + 1))


class Parity(Transduction):
    """Say whether the number of ones is odd: 1011|1$. The length counts the bits.

    With more `symbols` the answer is the sum of the content modulo S.
    """

    name = "parity"
    alphabet = DIGITS + LETTERS
    usual_symbols = 2

    def example(self, key: Key, lengths: IntArray, limit: int) -> tuple[Ragged, Ragged]:
        content = self.content(key, lengths, limit)
        return self.prompt(content), self.mark((content.symbols * content.inside).sum(1) % self.symbols)


class Recall(Transduction):
    """Associative recall, say the value of a key: akbz|bz$ holds the pairs ak and bz. The length counts pairs.

    Keys differ within a sequence, so the split "longer" needs S ≥ 2L; S is max(26, 2L) unless it is given. Keys and
    values are of the same symbols.
    """

    name = "recall"

    def __init__(self, length: int = 10, batch: int = 32, seed: int = 0, *, symbols: int | None = None) -> None:
        symbols = max(self.usual_symbols, 2 * length) if symbols is None else symbols
        if symbols < 2 * length:
            raise UsageError(
                f"symbols={symbols} is too few for recall of length={length}: its split 'longer' has {2 * length} "
                f"different keys. Give symbols={2 * length} or more, or length={symbols // 2} or less."
            )
        super().__init__(length, batch, seed, symbols=symbols)

    def example(self, key: Key, lengths: IntArray, limit: int) -> tuple[Ragged, Ragged]:
        # A random order of all symbols, of which the first n are the keys.
        order = random_integers(key.at("keys"), (self.batch_size, self.symbols), 2**31)
        names = np.argsort(order, axis=1, kind="stable")[:, :limit]
        values = random_integers(key.at("values"), (self.batch_size, limit), self.symbols)
        pairs = np.stack([names, values], axis=-1).reshape(self.batch_size, 2 * limit)
        # ⌊u·n / 2³¹⌋ is uniform in 0 … n−1 for lengths n that differ by row.
        asked = ((random_integers(key.at("query"), self.batch_size, 2**31) * lengths) >> 31)[:, None]
        query, answer = (np.take_along_axis(side, asked, 1)[:, 0] for side in (names, values))
        prompt = join([self.prompt(Ragged(pairs, 2 * lengths)), self.mark(query)], self.pad)
        return prompt, self.mark(answer)


class Memorise(Generated):
    """Memorise random sequences: B rows of L + 1 symbols, of which every next symbol is scored.

    There is nothing to learn but the sequences themselves, so the loss says what a model can hold. `batch` gives the
    same batch at every step and for every split, and a smaller `length` its first steps. The vocabulary is the S
    content symbols alone.

    Example:
        >>> task = Memorise(length=9)
        >>> batch = task.batch(0)
        >>> batch.inputs.shape, int(batch.scored), torch.equal(batch.inputs, task.batch(7, "valid").inputs)
        (torch.Size([1, 9]), 9, True)
    """

    name = "memorise"

    def __init__(self, length: int = 9, batch: int = 1, seed: int = 0, *, symbols: int | None = None) -> None:
        symbols = 100 if symbols is None else symbols
        super().__init__(length, batch, seed, symbols, _names(DIGITS + LETTERS, symbols))
        # Here the number of rows is what there is to learn, so another batch is another task.
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} batch={batch}".encode()).hexdigest()

    def make(self, step: int, split: str, length: int | None, unit: int | None) -> Batch:
        """Return the one batch; `step` and `unit` do not change it, nor does the split."""
        limit = self._limit(split, length)
        key = Key(self.seed).at("data").at(self.name)
        symbols = torch.from_numpy(random_integers(key, (self.batch_size, self.length + 1), self.symbols))
        inputs, targets = symbols[:, :limit].contiguous(), symbols[:, 1 : limit + 1].contiguous()
        return Batch(inputs, targets, torch.ones_like(inputs, dtype=torch.bool))

    def batches(self, split: str) -> int:
        """Return 1: there is one batch."""
        return 1


def _names(alphabet: str, symbols: int) -> list[str]:
    return [alphabet[symbol] if symbol < len(alphabet) else f"<{symbol}>" for symbol in range(symbols)]


# Every generated task, by the name it has on the command line.
SYNTHETIC: dict[str, type[Transduction] | type[Memorise]] = {
    task.name: task for task in (Copy, RepeatCopy, Reverse, Sort, Add, Parity, Recall, Memorise)
}
