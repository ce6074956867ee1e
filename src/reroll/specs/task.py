"""What to learn: generated sequences, a text, or series of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reroll.errors import UsageError
from reroll.specs.base import OBJECT, Handed, Spec, exclude, option, runtime

SERIES = (".csv", ".tsv", ".parquet", ".npy", ".npz")
"""Endings of files with numbers."""


@dataclass(frozen=True)
class TaskSpec(Spec):
    """A task, and how long its sequences are while the model learns."""

    length: int = option(10, "steps of a sequence (for generated tasks: symbols of the prompt)", flag="length")
    batch: int = option(32, "sequences per step", flag="batch")
    overfit: bool = option(False, "train on the first batch for ever", flag="overfit")
    curriculum_start: int | None = option(None, "length to begin with; none: the full length at once")
    curriculum_step: int = option(1, "by how much the length grows")
    curriculum_threshold: float = option(0.5, "loss (fast average) below which it grows", within="(-inf, inf)")
    curriculum_patience: int = option(10, "steps below the threshold before it grows")

    def check(self) -> None:
        super().check()
        if self.curriculum_start and self.curriculum_start > self.length:
            raise UsageError(
                f"curriculum_start={self.curriculum_start} is longer than length={self.length}, up to which the "
                "curriculum grows."
            )

    @property
    def carries(self) -> bool:
        """Whether the state goes on from batch to batch."""
        return False

    def build(self, seed: int, tokenizer: Any = None, *, units: Any = None, whole: bool = False) -> Any:
        """Return the `reroll.data.task.Task`.

        Args:
            seed: names the batches.
            tokenizer: of a text, if there is one already (a resumed run must not make another vocabulary).
            units: mean and std of series, if there are some already (a model reads another file in its own units).
            whole: all of a text or of series is "valid", none of it for training.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Generated(TaskSpec):
    """Sequences made from the seed."""

    kind: str = option("copy", "the task")
    symbols: int | None = option(None, "content symbols; none: what is usual for the task")

    def build(self, seed: int, tokenizer: Any = None, *, units: Any = None, whole: bool = False) -> Any:
        return runtime("data.synthetic:SYNTHETIC")[self.kind](self.length, self.batch, seed, symbols=self.symbols)


@dataclass(frozen=True)
class FileTask(TaskSpec):
    """A task whose data are in files."""

    path: str | None = option(None, "file, folder or glob of text; a table, .npy or .npz; or stdlib", flag="path")
    eval_batches: int = option(64, "most batches of an evaluation; 0: the whole held-out part", within="[0, 2**24]")

    def named(self) -> str:
        """Return the path, or raise `UsageError` if there is none."""
        if self.path is None:
            raise UsageError(f"task {self.kind} needs --path.")
        return self.path


@dataclass(frozen=True)
class Text(FileTask):
    """The next symbol of a text."""

    kind: str = option("text", "the task")
    tokenizer: Literal["byte", "char", "word", "gpt2"] = option("byte", "what a symbol of a text is", flag="tokenizer")
    max_vocab: int | None = option(None, "largest vocabulary of char and word; none: 1024 and 10000")
    field: str = option("text", "field of a JSON line that holds the text; a.b is b inside a", flag="field")
    carry: bool = option(False, "read a text on and on, and carry the state from window to window")

    def check(self) -> None:
        super().check()
        if self.path is not None and Path(self.path).suffix.lower() in SERIES:
            raise UsageError(
                f"path={self.path} holds numbers, not text: reroll train arrays --path {self.path} (to read it as text "
                "nevertheless, rename it to .txt)."
            )
        curriculum, carry = self.curriculum_start, self.carry
        exclude(
            (carry and curriculum, "carry=true and curriculum_start", "carried windows have one length"),
            (carry and self.overfit, "carry=true and overfit", "overfitting stays on one batch"),
        )

    @property
    def carries(self) -> bool:
        return self.carry

    def build(self, seed: int, tokenizer: Any = None, *, units: Any = None, whole: bool = False) -> Any:
        options = {} if tokenizer else {"max_vocab": self.max_vocab}
        return runtime("data.text:Text")(
            self.named(), tokenizer or self.tokenizer, self.length, self.batch, seed, carry=self.carry,
            field=self.field, eval_batches=self.eval_batches or None, whole=whole, **options,
        )  # fmt: skip


@dataclass(frozen=True)
class Tokens(TaskSpec):
    """The next token of shards."""

    kind: str = option("tokens", "the task")
    path: str | None = option(None, "folder or glob of token shards; or cpu-bytes", flag="path")
    epochs: int = option(1, "how often the tokens may be seen")
    valid_tokens: int | None = option(10_485_760, "tokens that are scored, the first held-out ones; none: all")
    vocab: int | None = option(None, "symbols; none: what tokens.json beside the shards says, or GPT-2's 50257")
    carry: bool = option(False, "read on and on, and carry the state from window to window")

    @property
    def carries(self) -> bool:
        return self.carry

    def build(self, seed: int, tokenizer: Any = None, *, units: Any = None, whole: bool = False) -> Any:
        if self.path is None:
            raise UsageError(f"task {self.kind} needs --path.")
        path = runtime("data.packages:shards_of")(self.path)
        return runtime("data.tokens:TokenBatches")(
            path, self.length, self.batch, seed, carry=self.carry, epochs=self.epochs, valid_tokens=self.valid_tokens,
            vocab=self.vocab, whole=whole,
        )  # fmt: skip


@dataclass(frozen=True)
class Arrays(FileTask):
    """Series of numbers: the next row, or a target of each."""

    kind: str = option("arrays", "the task")
    readout: Literal["last", "mean", "every"] = option("last", "where the answer is read, for one target per series")
    sep: str | None = option(None, "of a table: what is between cells (a character, tab, space)", flag="sep")
    decimal: Literal[".", ","] | None = option(None, "of a table: the decimal mark", flag="decimal")
    columns: str | None = option(None, "of a table: the columns to learn, by name or number, a,b", flag="columns")
    time: str | None = option(None, "of a table: the column in whose order the rows are", flag="time")
    missing: str | None = option(None, "of a table: further marks of a missing value, a,b", flag="missing")

    def build(self, seed: int, tokenizer: Any = None, *, units: Any = None, whole: bool = False) -> Any:
        return runtime("data.arrays:Arrays")(
            self.named(), self.length, self.batch, seed, readout=self.readout, eval_batches=self.eval_batches or None,
            whole=whole, units=units, sep=self.sep, decimal=self.decimal, columns=self.columns, time=self.time,
            missing=self.missing,
        )  # fmt: skip


@dataclass(frozen=True)
class ObjectTask(Handed, TaskSpec):
    """A task that was handed in."""


GENERATED = ("copy", "repeat_copy", "reverse", "sort", "add", "parity", "recall", "memorise")
TASKS: dict[str, type[TaskSpec]] = {
    **dict.fromkeys(GENERATED, Generated),
    "text": Text,
    "arrays": Arrays,
    "tokens": Tokens,
    OBJECT: ObjectTask,
}
"""Every task by name."""
