"""Generated tasks: copy, repeat_copy, reverse, sort, add, parity, recall, memorise.

A sequence is a prompt that ends in SEP, an output, EOS, and PAD up to the width of the batch: `abc|cba$...` is reverse
as `task.decode` prints it. The mask scores every symbol of the output (the first is predicted at SEP) and EOS, so a
perfect model has loss 0, accuracy 1 and exact match 1.

    task = Sort(length=10, batch=32, seed=0)
    task.batch(step)               lengths 1 … 10
    task.batch(step, "valid")      the same lengths, other sequences
    task.batch(step, "longer")     lengths 11 … 20: has the model learned the rule, or the length?

Content symbols are 0 … S−1, then come SEP, EOS, PAD, then symbols special to a task (repeat counts, "+"). Row b of a
batch does not depend on the number of rows. Everything is drawn from Key(seed).at("data").at(name).at(split).at(step).
"""

from __future__ import annotations

import hashlib
import re
import string
from abc import abstractmethod
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from reroll.data.batch import Batch
from reroll.data.task import Task
from reroll.errors import UsageError, require_positive
from reroll.kernels.philox import random_integers
from reroll.keys import Key

IntArray = npt.NDArray[np.int64]
Examples = Iterable[tuple[list[int], list[int]]]
"""A prompt and an output for every row."""

DIGITS = string.digits
# Letters of one character each for 452 symbols; Latin letters with accents follow the plain ones.
LETTERS = string.ascii_letters + "".join(map(chr, range(0xC0, 0x250)))


class Generated(Task):
    """What all generated tasks share: their arguments, their symbols, and symbols as text.

    Args:
        length: L, the largest length of the training sequences (each task defines its unit).
        batch: B, sequences per batch.
        seed: selects the sequences; in [0, 2⁶⁴).
        symbols: S, the number of content symbols; None: the default of the task.
        marks: the texts of the symbols after these.
    """

    alphabet = LETTERS
    default_symbols = 26

    def __init__(self, length: int, batch: int, seed: int, symbols: int | None, marks: Sequence[str] = ()) -> None:
        require_positive(length=length, batch=batch)
        symbols = self.default_symbols if symbols is None else symbols
        if symbols < 2:
            raise UsageError(f"symbols={symbols} leaves {self.name} nothing to tell apart; give at least 2.")
        self.length, self.batch_size, self.seed, self.symbols = length, batch, seed, symbols
        content = [self.alphabet[n] if n < len(self.alphabet) else f"<{n}>" for n in range(symbols)]
        self.names = (*content, *marks)
        self.vocab = self.outputs = len(self.names)
        # The vocabulary includes the repeat counts. The batch is not part of it: row b is always the same.
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
        names = re.findall(r"<[^<>]+>|.", text, flags=re.DOTALL)
        if unknown := [name for name in names if name not in ids]:
            raise UsageError(f"{self.name} has no symbol {unknown[0]!r} in text={text!r}. Known: {''.join(self.names)}")
        return [ids[name] for name in names]


class Transduction(Generated):
    """A task that turns a prompt into an output: prompt, output, EOS, PAD…; subclasses define the output.

    Training lengths are uniform in 1 … L, those of the split "longer" in L+1 … 2L.

    Example:
        >>> task = Reverse(length=4, batch=2, seed=1)
        >>> batch = task.batch(0)
        >>> [task.decode(row) for row in batch.inputs.tolist()]
        ['sy|ys$...', 'hzaj|jazh']
        >>> [task.decode(row[scored].tolist()) for row, scored in zip(batch.targets, batch.mask)]
        ['ys$', 'jazh$']
    """

    splits = ("valid", "longer")
    extras: Sequence[str] = ()
    widest = (2, 2)
    """(a, b) of the longest sequence of a limit n: a·n + b symbols."""

    def __init__(self, length: int = 10, batch: int = 32, seed: int = 0, *, symbols: int | None = None) -> None:
        super().__init__(length, batch, seed, symbols, ("|", "$", ".", *self.extras))
        self.separator, self.end, self.pad, self.first_extra = range(self.symbols, self.symbols + 4)

    def make(self, step: int, split: str, length: int | None, unit: int | None) -> Batch:
        """Return the sequences of a step. A smaller `length` is a smaller L; L and the split determine the width."""
        limit = length or self.length
        low, high = (limit + 1, 2 * limit) if split == "longer" else (1, limit)
        key = self.key(split, step, unit)
        lengths = random_integers(key.at("lengths"), self.batch_size, high + 1, low)
        width, rows, ends = self.widest[0] * high + self.widest[1], [], []
        for prompt, output in self.examples(key, lengths, high):
            row = [*prompt, *output, self.end]
            rows.append(row + [self.pad] * (width - len(row)))
            ends.append((len(prompt) - 1, len(row) - 1))  # a symbol is predicted at the previous one
        symbols, place = torch.from_numpy(np.array(rows)), np.arange(width - 1)
        begin, end = np.array(ends).T[:, :, None]
        mask = torch.from_numpy((place >= begin) & (place < end))
        return Batch(symbols[:, :-1].contiguous(), symbols[:, 1:].contiguous(), mask)

    @abstractmethod
    def examples(self, key: Key, lengths: IntArray, limit: int) -> Examples:
        """Yield prompts and outputs of these lengths [B], none above `limit`."""

    def content(self, key: Key, lengths: IntArray, limit: int) -> list[list[int]]:
        """Return random content symbols."""
        drawn = random_integers(key.at("content"), (len(lengths), limit), self.symbols).tolist()
        return [row[:length] for row, length in zip(drawn, lengths.tolist())]


class Copy(Transduction):
    """Repeat the content: abc|abc$. The length counts its symbols."""

    name = "copy"

    def examples(self, key: Key, lengths: IntArray, limit: int) -> Examples:
        for content in self.content(key, lengths, limit):
            yield [*content, self.separator], self.answer(content)

    def answer(self, content: list[int]) -> list[int]:
        """Return the output for a content."""
        return content


class Reverse(Copy):
    """Output the content backwards: abc|cba$. The length counts its symbols."""

    name = "reverse"

    def answer(self, content: list[int]) -> list[int]:
        return content[::-1]


class Sort(Copy):
    """Output the content in order: cab|abc$. The length counts its symbols."""

    name = "sort"

    def answer(self, content: list[int]) -> list[int]:
        return sorted(content)


class Parity(Copy):
    """Tell whether the number of ones is odd: 1011|1$. The length counts the bits.

    With more `symbols` the answer is the sum of the content modulo S.
    """

    name = "parity"
    alphabet = DIGITS + LETTERS
    default_symbols = 2
    widest = (1, 3)

    def answer(self, content: list[int]) -> list[int]:
        return [sum(content) % self.symbols]


class RepeatCopy(Transduction):
    """Repeat the content as often as its last symbol says: ab3|ababab$. The length counts the symbols before it.

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
        self.repeats, self.widest = repeats, (1 + repeats, 3)
        super().__init__(length, batch, seed, symbols=symbols)

    def examples(self, key: Key, lengths: IntArray, limit: int) -> Examples:
        counts = random_integers(key.at("repeats"), self.batch_size, self.repeats + 1, 1).tolist()
        for content, count in zip(self.content(key, lengths, limit), counts):
            yield [*content, self.first_extra + count - 1, self.separator], content * count


class Add(Transduction):
    """Add two numbers of n digits each: 07+95|102$. The length counts n; SEP stands for the sign =.

    The most significant digit comes first. Numbers are written with all n digits and sums with n + 1, zeros included,
    so what a digit stands for depends on n alone. `symbols` is the base.
    """

    name = "add"
    alphabet = DIGITS + LETTERS
    default_symbols = 10
    extras = ("+",)
    widest = (3, 4)

    def examples(self, key: Key, lengths: IntArray, limit: int) -> Examples:
        drawn = random_integers(key.at("content"), (self.batch_size, 2, limit), self.symbols).tolist()
        for numbers, length in zip(drawn, lengths.tolist()):
            # Drawn with the least significant digit first.
            first, second = (number[:length] for number in numbers)
            total, carry = [], 0
            for a, b in zip([*first, 0], [*second, 0]):
                total.append((a + b + carry) % self.symbols)
                carry = (a + b + carry) // self.symbols
            yield [*first[::-1], self.first_extra, *second[::-1], self.separator], total[::-1]


class Recall(Transduction):
    """Associative recall, output the value of a key: akbz|bz$ holds the pairs ak and bz. The length counts pairs.

    Keys differ within a sequence, so the split "longer" needs S ≥ 2L; S is max(26, 2L) by default. Keys and
    values are of the same symbols.
    """

    name = "recall"
    widest = (2, 4)

    def __init__(self, length: int = 10, batch: int = 32, seed: int = 0, *, symbols: int | None = None) -> None:
        symbols = max(self.default_symbols, 2 * length) if symbols is None else symbols
        if symbols < 2 * length:
            raise UsageError(
                f"symbols={symbols} is too few for recall of length={length}: its split 'longer' has {2 * length} "
                f"different keys. Give symbols={2 * length} or more, or length={symbols // 2} or less."
            )
        super().__init__(length, batch, seed, symbols=symbols)

    def examples(self, key: Key, lengths: IntArray, limit: int) -> Examples:
        # A random order of all symbols, of which the first n are the keys.
        order = random_integers(key.at("keys"), (self.batch_size, self.symbols), 2**31)
        keys = np.argsort(order, axis=1, kind="stable")[:, :limit]
        values = random_integers(key.at("values"), (self.batch_size, limit), self.symbols)
        pairs = np.stack([keys, values], axis=-1).reshape(self.batch_size, -1).tolist()
        # ⌊u·n / 2³¹⌋ is uniform in 0 … n−1 for lengths n that differ by row.
        queried = (random_integers(key.at("query"), self.batch_size, 2**31) * lengths) >> 31
        for row, length, place in zip(pairs, lengths.tolist(), queried.tolist()):
            key_symbol, value = row[2 * place : 2 * place + 2]
            yield [*row[: 2 * length], self.separator, key_symbol], [value]


class Memorise(Generated):
    """Memorise random sequences: B rows of L + 1 symbols, of which every next symbol is scored.

    There is nothing to learn but the sequences themselves, so the loss measures how much a model can store. `batch` is
    the same batch at every step and for every split, and a smaller `length` its first steps. The vocabulary is the S
    content symbols alone.

    Example:
        >>> task = Memorise(length=9)
        >>> batch = task.batch(0)
        >>> batch.inputs.shape, int(batch.scored), torch.equal(batch.inputs, task.batch(7, "valid").inputs)
        (torch.Size([1, 9]), 9, True)
    """

    name = "memorise"
    alphabet = DIGITS + LETTERS
    default_symbols = 100

    def __init__(self, length: int = 9, batch: int = 1, seed: int = 0, *, symbols: int | None = None) -> None:
        super().__init__(length, batch, seed, symbols)
        # The number of rows is how much there is to learn, so another batch is another task.
        self.fingerprint = hashlib.sha256(f"{self.fingerprint} batch={batch}".encode()).hexdigest()

    def make(self, step: int, split: str, length: int | None, unit: int | None) -> Batch:
        """Return the one batch; `step` and `unit` do not change it, nor does the split."""
        limit = length or self.length
        key = Key(self.seed).at("data").at(self.name)
        symbols = torch.from_numpy(random_integers(key, (self.batch_size, self.length + 1), self.symbols))
        inputs, targets = symbols[:, :limit].contiguous(), symbols[:, 1 : limit + 1].contiguous()
        return Batch(inputs, targets, torch.ones_like(inputs, dtype=torch.bool))

    def batches(self, split: str) -> int:
        """Return 1: there is one batch."""
        return 1


SYNTHETIC: dict[str, type[Transduction] | type[Memorise]] = {
    task.name: task for task in (Copy, RepeatCopy, Reverse, Sort, Add, Parity, Recall, Memorise)
}
"""Every generated task, by its name on the command line."""
