"""What to learn: generated sequences, a text, or series of numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from reroll.errors import UsageError
from reroll.specs.base import OBJECT, ObjectSpec, Spec, exclude, option, runtime

SERIES = (".csv", ".tsv", ".parquet", ".npy", ".npz")
"""Suffixes of files of numbers."""


@dataclass(frozen=True)
class TaskSpec(Spec):
    """A task, and the length of its sequences during training."""

    length: int = option(10, "length of a sequence (of the prompt, in generated tasks)", flag="length")
    batch: int = option(32, "sequences per step", flag="batch")
    overfit: bool = option(False, "train on the first batch only", flag="overfit")
    curriculum_start: int | None = option(None, "initial length of a curriculum; none: no curriculum")
    curriculum_step: int = option(1, "steps by which the length grows")
    curriculum_threshold: float = option(0.5, "loss (fast average) below which the length grows", within="(0, inf)")
    curriculum_patience: int = option(10, "training steps below the threshold before it grows")

    def check(self) -> None:
        super().check()
        if self.curriculum_start and self.curriculum_start > self.length:
            raise UsageError(
                f"curriculum_start={self.curriculum_start} is longer than length={self.length}, the full length "
                "of the curriculum."
            )

    @property
    def carries(self) -> bool:
        """Whether the state is carried from batch to batch."""
        return False

    def build(self, seed: int, tokenizer: Any = None, *, units: Any = None, whole: bool = False) -> Any:
        """Return the `reroll.data.task.Task`.

        Args:
            seed: of the batches.
            tokenizer: of a text, if it exists already (a resumed run must not build another vocabulary).
            units: mean and std of series, if they exist already (a model reads another file in its own units).
            whole: treat all of a text or of series as "valid", and none as training data.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Generated(TaskSpec):
    """Sequences made from the seed."""

    kind: str = option("copy", "the task")
    symbols: int | None = option(None, "content symbols; none: the task's default")

    def build(self, seed: int, tokenizer: Any = None, *, units: Any = None, whole: bool = False) -> Any:
        return runtime("data.synthetic:SYNTHETIC")[self.kind](self.length, self.batch, seed, symbols=self.symbols)


@dataclass(frozen=True)
class FileTask(TaskSpec):
    """A task whose data are in files."""

    path: str | None = option(None, "text file, folder or glob; table, .npy or .npz; or stdlib", flag="path")
    eval_batches: int = option(64, "maximum batches per evaluation; 0: all held-out data", within="[0, 2**24]")

    def required_path(self) -> str:
        """Return the path; raise `UsageError` if there is none."""
        if self.path is None:
            raise UsageError(f"task {self.kind} has no files. Give path=….")
        return self.path


@dataclass(frozen=True)
class Text(FileTask):
    """The next symbol of a text."""

    kind: str = option("text", "the task")
    tokenizer: Literal["byte", "char", "word", "bpe", "gpt2"] = option("byte", "symbols of a text", flag="tokenizer")
    max_vocab: int | None = option(None, "maximum vocabulary; none: 1024 for char, 10000 for word, 8192 for bpe")
    field: str = option("text", "field of JSON lines or column that has the text; a.b is b inside a", flag="field")
    carry: bool = option(False, "read the text in order, carrying the state from window to window")

    def check(self) -> None:
        super().check()
        if self.path is not None and Path(self.path).suffix.lower() in {*SERIES} - {".parquet"}:
            raise UsageError(
                f"path={self.path} contains numbers, not text: reroll train arrays --path {self.path} (to read it as "
                "text anyway, rename it to .txt)."
            )
        curriculum, carry = self.curriculum_start, self.carry
        exclude(
            (carry and curriculum, "carry=true and curriculum_start", "carried windows all have the same length"),
            (carry and self.overfit, "carry=true and overfit", "overfitting uses a single batch"),
        )

    @property
    def carries(self) -> bool:
        return self.carry

    def build(self, seed: int, tokenizer: Any = None, *, units: Any = None, whole: bool = False) -> Any:
        options = {} if tokenizer else {"max_vocab": self.max_vocab}
        return runtime("data.text:Text")(
            self.required_path(), tokenizer or self.tokenizer, self.length, self.batch, seed, carry=self.carry,
            field=self.field, eval_batches=self.eval_batches or None, whole=whole, **options,
        )  # fmt: skip


@dataclass(frozen=True)
class Tokens(TaskSpec):
    """The next token of shards."""

    kind: str = option("tokens", "the task")
    path: str | None = option(None, "folder or glob of token shards; or cpu-bytes, or cpu-bytes-small", flag="path")
    epochs: int = option(1, "maximum passes over the tokens")
    valid_tokens: int | None = option(10_485_760, "held-out tokens to score, from the first; none: all")
    vocab: int | None = option(None, "vocabulary size; none: that in tokens.json next to the shards, or GPT-2's 50257")
    carry: bool = option(False, "read the tokens in order, carrying the state from window to window")
    shuffle: bool = option(False, "take windows from all over the text, not in its order")

    def check(self) -> None:
        super().check()
        exclude((self.carry and self.shuffle, "carry=true and shuffle", "a carried text is read in order"))

    @property
    def carries(self) -> bool:
        return self.carry

    def build(self, seed: int, tokenizer: Any = None, *, units: Any = None, whole: bool = False) -> Any:
        if self.path is None:
            raise UsageError(f"task {self.kind} has no files. Give path=….")
        path = runtime("data.packages:shards_of")(self.path)
        return runtime("data.tokens:TokenBatches")(
            path, self.length, self.batch, seed, carry=self.carry, epochs=self.epochs, valid_tokens=self.valid_tokens,
            vocab=self.vocab, whole=whole, shuffle=self.shuffle,
        )  # fmt: skip


@dataclass(frozen=True)
class Arrays(FileTask):
    """Series of numbers: the next row, or a target of each."""

    kind: str = option("arrays", "the task")
    readout: Literal["last", "mean", "every"] = option("last", "which outputs to read for a target per series")
    sep: str | None = option(None, "tables: the separator (a character, tab or space)", flag="sep")
    decimal: Literal[".", ","] | None = option(None, "tables: the decimal mark", flag="decimal")
    columns: str | None = option(None, "tables: the columns to learn, by name or number: a,b", flag="columns")
    time: str | None = option(None, "tables: the column that orders the rows", flag="time")
    missing: str | None = option(None, "tables: further markers of missing values: a,b", flag="missing")

    def build(self, seed: int, tokenizer: Any = None, *, units: Any = None, whole: bool = False) -> Any:
        return runtime("data.arrays:Arrays")(
            self.required_path(), self.length, self.batch, seed, readout=self.readout, whole=whole,
            eval_batches=self.eval_batches or None, units=units, sep=self.sep, decimal=self.decimal,
            columns=self.columns, time=self.time, missing=self.missing,
        )  # fmt: skip


@dataclass(frozen=True)
class ObjectTask(ObjectSpec, TaskSpec):
    """A task that was passed in."""


GENERATED = ("copy", "repeat_copy", "reverse", "sort", "add", "parity", "recall", "memorise")
TASKS: dict[str, type[TaskSpec]] = {
    **dict.fromkeys(GENERATED, Generated),
    "text": Text,
    "arrays": Arrays,
    "tokens": Tokens,
    OBJECT: ObjectTask,
}
"""Every task by name."""
