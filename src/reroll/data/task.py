"""What a task is: batches as a pure function of the step, a loss, a score.

    batch = task.batch(step)                   the same on every machine, in any order, after any restart
    loss  = task.loss(model, batch).mean()     one loss per sequence, so that a batch can be divided among probes
    score = task.score(model, batch)           sums: loss, scored, correct, exact …; scores add up

Without a gradient the loss is computed in windows of time, so its memory does not grow with the length.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.data.batch import START, Batch
from reroll.errors import UsageError, did_you_mean
from reroll.kernels.cross_entropy import cross_entropy
from reroll.keys import Key
from reroll.passes import is_untouched, passes

LOGITS = 1 << 26
"""Logits held at once (256 MB of fp32); the head of a `Headed` model with more is evaluated in chunks."""


class Score(NamedTuple):
    """Sums over outputs and sequences. Adding two scores gives the score of both sets.

    Args:
        loss: summed loss (nats, or squared error), of `scored` outputs.
        scored: number of scored outputs.
        correct: scored outputs whose largest logit is the target (0 for real-valued targets).
        exact: sequences of which every scored output is correct.
        sequences: number of sequences.
    """

    loss: float = 0.0
    scored: float = 0.0
    correct: float = 0.0
    exact: float = 0.0
    sequences: float = 0.0

    def __add__(  # pyright: ignore[reportIncompatibleMethodOverride]: elementwise, where tuples would be concatenated
        self, other: tuple[float, ...]
    ) -> Score:
        return Score(*(a + b for a, b in zip(self, other)))

    def summary(self, categorical: bool) -> dict[str, float]:
        """Return means: `loss`; for symbols and classes also `bits` per output, `accuracy` and `exact`."""
        scored, sequences = self.scored or math.nan, self.sequences or math.nan
        loss = self.loss / scored
        classes = {"bits": loss / math.log(2), "accuracy": self.correct / scored, "exact": self.exact / sequences}
        return {"loss": loss} | (classes if categorical else {})


Readout = Literal["every", "last", "mean"]
"""Where a model's outputs are read: at every step, at the last, or as the mean of all."""


class Losses(NamedTuple):
    """Losses of the sequences of a batch, [B], whose mean is the loss; and the state after its last step."""

    losses: Tensor
    state: Any


class Task(ABC):
    """A source of batches with a loss.

    Attributes a subclass sets: `vocab` (number of input symbols, or None), `inputs` (features of real-valued inputs, or
    None), `outputs` (logits or values the model gives), `readout` ("every", "last" or "mean"), `splits` (names other
    than "train"), `categorical` (whether targets are symbols or classes, not numbers), `fingerprint` (SHA-256 of the
    data, or of its definition), `carries` (whether batches continue each other, so that a state can be carried),
    `length` (the longest sequences; 0: any), `most_steps` (batches to train on; None: any number), `finite` (whether
    there is an end to held-out batches), `trains` (whether there is a split "train"), `name` and `seed`, which name its
    random numbers. It defines `make`, and overrides `make_rows` if it can read some rows alone.
    """

    name: str = ""
    seed: int = 0
    vocab: int | None = None
    inputs: int | None = None
    outputs: int = 0
    readout: Readout = "every"
    splits: tuple[str, ...] = ("valid",)
    categorical: bool = True
    fingerprint: str = ""
    carries: bool = False
    length: int = 0
    most_steps: int | None = None
    finite: bool = False
    trains: bool = True

    @abstractmethod
    def make(self, step: int, split: str, length: int | None, unit: int | None) -> Batch:
        """Return all sequences of a batch; the arguments are those of `batch`, and were checked there."""

    def batch(
        self,
        step: int,
        split: str = "train",
        length: int | None = None,
        rows: range | None = None,
        unit: int | None = None,
    ) -> Batch:
        """Return the batch of a step, a pure function of the seed and the arguments.

        Args:
            step: any integer ≥ 0; below `batches(split)` where an evaluation reads something held out.
            split: "train", or one of `splits`.
            length: limits the sequences, for a curriculum; None is the full length.
            rows: which sequences of the batch, the same ones whatever else is asked for; None: all.
            unit: another training batch of the same step for every integer, for probes that each see their own; None:
                the batch they share.

        Raises:
            UsageError: if there is no such batch.
        """
        self.check_split(split)
        if length is not None and not 1 <= length <= (self.length or length):
            raise UsageError(f"length={length} must lie in [1, {self.length}], the length of the task.")
        if step < 0 or (self.finite and split != "train" and step >= self.batches(split)):
            below = "" if split == "train" else f" and below {self.batches(split)}, the number of batches of {split!r}"
            raise UsageError(f"step={step} must be 0 or more{below}.")
        return self.make_rows(step, split, length, unit, rows)

    def make_rows(self, step: int, split: str, length: int | None, unit: int | None, rows: range | None) -> Batch:
        """Return some sequences of a batch; a task that can read them alone does so here."""
        return self.make(step, split, length, unit).part(rows)

    def check_split(self, split: str) -> None:
        """Raise `UsageError` if the task has no such split."""
        if split not in (splits := (*(("train",) if self.trains else ()), *self.splits)):
            raise UsageError(f"split={split!r} is none of the task's.{did_you_mean(split, splits)}")

    def key(self, split: str, step: int, unit: int | None) -> Key:
        """Return the key of a batch's random numbers."""
        key = Key(self.seed).at("data").at(self.name).at(split).at(step)
        return key if unit is None else key.at("unit").at(unit)

    def metadata(self) -> dict[str, Any]:
        """Return what a run stores of its task, ready for JSON: enough to build its model and use it without the data.

        `fingerprint`; `sizes`; `tokenizer`, as a dictionary, and `units`, the mean and std of every feature, or None.
        """
        sizes = {"vocab": self.vocab, "inputs": self.inputs, "outputs": self.outputs, "readout": self.readout}
        return {"fingerprint": self.fingerprint, "sizes": sizes, "tokenizer": None, "units": None}

    def batches(self, split: str) -> int:
        """Return how many batches an evaluation of this split takes."""
        return 8

    def loss(self, model: Any, batch: Batch) -> Tensor | Losses:
        """Return the losses of the sequences, [B]; if `batch.state` is set, also the state after the last step."""
        return sequence_losses(model, batch)

    def score(self, model: Any, batch: Batch) -> Score:
        """Return the summed loss and the number of correct outputs and sequences."""
        return sequence_score(model, batch)[0]

    def summary(self, score: Score, split: str) -> dict[str, float]:
        """Return the means of a score over the batches of a split, by name."""
        means = score.summary(self.categorical)
        if self.readout != "every":  # one class per sequence: to be exact is to be accurate
            means.pop("exact", None)
        return means

    def describe(self) -> str:
        """Return one line on the data that was read; empty if there is none."""
        return ""

    def decode(self, symbols: list[int]) -> str:
        """Return symbols as text a person can read."""
        return " ".join(map(str, symbols))

    def encode(self, text: str) -> list[int]:
        """Return text as symbols; the reverse of `decode`."""
        raise UsageError(f"{type(self).__name__} has no text to encode; give symbols as numbers.")


class FileTask(Task):
    """A task whose data are in files: an evaluation reads the held-out part once, in order.

    Attributes a subclass sets: `eval_batches`, the most batches of an evaluation (None: all). It is pickled by its
    arguments, so that another process maps the same files.
    """

    eval_batches: int | None
    finite = True
    _again: partial[Any]

    def __new__(cls, *arguments: Any, **options: Any) -> FileTask:
        task = super().__new__(cls)
        task._again = partial(cls, *arguments, **options)
        return task

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again, ()

    @abstractmethod
    def count(self, split: str) -> int:
        """Return how many batches a held-out split has."""

    def batches(self, split: str) -> int:
        self.check_split(split)
        if split == "train":
            return super().batches(split)
        return min(self.count(split), self.eval_batches or self.count(split))


def loss_unit(task: Any) -> str:
    """Return what the loss of a task is measured in: "nats", "mean squared error"; empty for a loss of its own."""
    if not isinstance(task, Task) or type(task).loss is not Task.loss or type(task).score is not Task.score:
        return ""
    return "nats" if task.categorical else "mean squared error"


def with_nats(task: Any, loss: str) -> str:
    """Return a loss, as text, with its unit if that is nats; the others have no short name."""
    return f"{loss} nats" if loss_unit(task) == "nats" else loss


def sequence_losses(model: Any, batch: Batch) -> Tensor | Losses:
    """Return per-sequence losses [B] whose mean is Σ loss / scored: cross-entropy for symbols, squared error else.

    Args:
        model: called as `model(inputs)`; one that declares `stateful` (`reroll.models.base`) is run by `advance`, and
            window by window where no gradient is needed.
        batch: the batch; with a `state` the result is `Losses(losses, state)`.
    """
    total, state = torch.zeros((), dtype=torch.float64, device=batch.inputs.device), None
    dtype = torch.float32
    for outputs, part, after in predictions(model, batch):
        each, _ = outputs.against(part.targets)
        # fp32 sums of thousands of terms would lose the digits that a central difference needs.
        total = total + (each * part.mask).view(len(batch), -1).sum(1, dtype=torch.float64)
        dtype, state = each.dtype, after
    losses = (total * (len(batch) / max(batch.scored, 1e-9))).to(dtype)
    return losses if batch.state is None else Losses(losses, state)


def sequence_score(model: Any, batch: Batch) -> tuple[Score, Any]:
    """Return the summed loss of a batch and how many outputs and sequences are correct; and the state after it."""
    total, correct, state = 0.0, 0.0, None
    wrong = torch.zeros(len(batch), dtype=torch.bool, device=batch.inputs.device)
    for outputs, part, after in predictions(model, batch):
        state = after
        each, hit = outputs.against(part.targets, hits=True)
        total += (each * part.mask).sum(dtype=torch.float64).item()
        if hit is not None:
            correct += (hit & part.mask).sum().item()
            wrong |= (~hit & part.mask).reshape(len(batch), -1).any(1)
    exact = 0.0 if batch.targets.is_floating_point() else float((~wrong).sum())
    return Score(total, float(batch.mask.sum()), correct, exact, float(len(batch))), state


class Outputs(NamedTuple):
    """A model's outputs at some positions; with a head, features that it has yet to map to logits."""

    values: Tensor
    head: nn.Linear | None = None

    def against(self, targets: Tensor, hits: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return the loss of every position, and if asked for whether its largest logit is the target symbol.

        The loss is cross-entropy in nats for int64 targets, else the mean squared error.
        """
        if self.head is not None:
            return cross_entropy(self.values, self.head.weight, self.head.bias, targets)
        self._require_fit(targets)
        # At least fp32, whatever the model computes in.
        outputs = self.values.to(torch.promote_types(self.values.dtype, torch.float32))
        if targets.is_floating_point():
            return (outputs - targets).square().mean(-1), None
        try:
            losses = functional.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
        except IndexError:
            classes, largest = outputs.shape[-1], int(targets.max())
            raise UsageError(
                f"the model gives {classes} logits, for classes 0 … {classes - 1}; the batch has targets up to "
                f"{largest}. Build it with outputs={largest + 1} or more: task.outputs says how many there are."
            ) from None
        return losses.view(targets.shape), self.values.argmax(-1) == targets if hits else None

    def _require_fit(self, targets: Tensor) -> None:
        shape, real = getattr(self.values, "shape", None), targets.is_floating_point()
        if shape is not None and (shape if real else shape[:-1]) == targets.shape:
            return
        result = f"a {type(self.values).__name__}" if shape is None else f"outputs of shape {list(shape)}"
        expected = ", ".join([*map(str, targets.shape), *([] if real else ["classes"])])
        raise UsageError(
            f"the model returned {result}; the task needs a tensor of shape [{expected}]. Return that: an output per "
            "step for readout 'every', per sequence for 'last' and 'mean'."
        )


def predictions(model: Any, batch: Batch) -> Iterator[tuple[Outputs, Batch, Any]]:
    """Yield (outputs, the part of the batch they belong to, the state after it).

    A gradient needs the whole sequence at once, and so does a model that is not `stateful`, or one output per sequence.
    Everything else is run in windows of `model.time_chunk(B)` steps.
    """
    with passes():
        yield from (_windows if getattr(model, "stateful", False) and batch.mask.dim() > 1 else _whole)(model, batch)


def _whole(model: Any, batch: Batch) -> Iterator[tuple[Outputs, Batch, Any]]:
    if batch.state is not None:
        raise UsageError(
            f"{type(model).__name__} cannot carry a state: it needs advance(inputs, state, reset) → (outputs, state), "
            "stateful = True and an output at every step. Switch carrying off, or use reroll.Recurrent."
        )
    head = _large_head(model, batch)
    head = head if head is None or is_untouched(model) else None
    run = model if head is None else model.features
    outputs = run(batch.inputs) if batch.present is None else run(batch.inputs, present=batch.present)
    yield Outputs(outputs[0] if isinstance(outputs, tuple | list) else outputs, head), batch, None


def _windows(model: Any, batch: Batch) -> Iterator[tuple[Outputs, Batch, Any]]:
    most = batch.time if torch.is_grad_enabled() else model.time_chunk(len(batch))
    windows = -(-batch.time // max(most, 1))  # as few as possible, of equal length
    chunk = -(-batch.time // max(windows, 1))
    state = None if batch.state is START else batch.state
    for begin in range(0, batch.time, max(chunk, 1)):
        part = batch.steps(begin, begin + chunk)
        head = _large_head(model, part)
        options = {} if head is None else {"head": False}
        outputs, state = model.advance(part.inputs, state, part.reset, **options)
        yield Outputs(outputs, head), replace(part, state=None), state


def _large_head(model: Any, batch: Batch) -> nn.Linear | None:
    """The head of a model whose logits for a batch are too many to hold at once."""
    head = model.head if getattr(model, "headed", False) else None
    # Any other head may compute more than the product with its weight.
    if type(head) is not nn.Linear or not is_untouched(head) or batch.targets.is_floating_point():
        return None
    return head if batch.targets.numel() * head.out_features > LOGITS else None
