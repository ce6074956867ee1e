"""Real-valued series as a task: say the next value, a value or class of every step, or one of the whole sequence.

    task = Arrays("weather.csv", length=100)          predict the next row from the rows before
    task = Arrays("worms.npz", readout="last")        inputs [N, T, F] and one class each, targets [N]
    task.describe()                                   what was read, in a line

    file                                    what is predicted                       readout   loss
    no targets                              the next value of every feature         every     squared error
    targets [N], integers                   the class of the sequence               last      cross-entropy
    targets [N] or [N, O], real             O values of the sequence                last      squared error
    targets [N, T], integers                the class of every step                 every     cross-entropy
    targets [N, T, O], real                 O values of every step                  every     squared error

Inputs are standardised, (x − mean) / std of every feature over the training part; next values are in the same units,
other targets as they are in the file. A tenth of the series is held out, those whose index has a small hash; of one
long series the last tenth of its windows. `series.read_series` says what the files look like.
"""

from __future__ import annotations

import hashlib
import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from reroll.data.batch import Batch
from reroll.data.series import Series, first_not_finite, moments, read_series
from reroll.data.task import Readout, Task
from reroll.errors import UsageError, nearest, require_positive
from reroll.kernels.philox import random_integers
from reroll.keys import Key

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

USUAL_LENGTH = 128  # of the windows of one long series
SHOWN = 8  # names of features in a description
READOUTS = ("last", "mean", "every")


class Windows(NamedTuple):
    """Ranges of the steps of all series together: the series [W], the first step [W], and the end of the series [W]."""

    series: IntArray
    begin: IntArray
    end: IntArray


class Arrays(Task):
    """Learn real-valued series from a .npy, .npz or .csv file.

    Args:
        path: the file.
        length: T, steps per window. None: whole series; of one long series 128, or a tenth of it.
        batch: B, windows per batch.
        seed: names the training windows; what is held out does not depend on it.
        readout: "last" or "mean" of the steps, for one target per sequence; "every" says that real targets [N, T] are
            values of the steps, not T values of the sequence.
        eval_batches: the most batches an evaluation takes; None is the whole of the held-out part.
        whole: all of the file is "valid", none of it for training: to score a model on it.
        units: the mean and the std of every feature, [F] each, to standardise by; None: those of the training part.

    Attributes: `mean` and `std`, [F], of the features; `features`, their names; `fingerprint`, SHA-256 of the file.

    A missing value (an empty cell, or a step whose mask is False) is the mean, 0 after standardising, and not scored.
    With one target per sequence the mask says which steps there are (`Batch.present`); with targets of every step it
    says which are scored, and inputs stay.

    Raises:
        UsageError: if the file cannot be read, its shapes do not fit together, or there is too little in it.
    """

    name = "arrays"

    def __init__(
        self,
        path: str | os.PathLike[str],
        length: int | None = None,
        batch: int = 32,
        seed: int = 0,
        *,
        readout: Readout = "last",
        eval_batches: int | None = 64,
        whole: bool = False,
        units: tuple[list[float], list[float]] | None = None,
    ) -> None:
        require_positive(length=length, batch=batch, eval_batches=eval_batches)
        if readout not in READOUTS:
            raise UsageError(f"readout={readout!r} is unknown.{nearest(readout, READOUTS)}")
        self.path, self.batch_size, self.seed, self.eval_batches = os.fspath(path), batch, seed, eval_batches
        self._arguments = {"path": self.path, "length": length, "readout": readout, "whole": whole, "units": units}
        self._whole = whole
        data = read_series(path)
        self.fingerprint = _file_hash(Path(path).expanduser())
        self.inputs, self.features = int(data.values.shape[1]), data.features
        self._values, self._mask, self._sequence_mask = data.values, _every_step(data), data.mask
        self._set_targets(data, readout)
        self.length = self._window_length(data.lengths, length)
        windows = cut(data.lengths, self.length, shift=int(self.predicts == "next"))
        self._windows, training = self._hold_out(windows, data.lengths)
        _refuse_not_finite(self.path, data, self._mask)
        # With targets of every step the mask is about the targets; the inputs are all there.
        used = training if self._mask is None or self.predicts == "every" else training & self._mask
        self.mean, self.std = moments(data.values, used) if units is None else self._given(units)
        self._description = self._described(data)

    def __reduce__(self) -> tuple[Any, ...]:
        # By its arguments, for another process to map the same file.
        options = {"batch": self.batch_size, "seed": self.seed, "eval_batches": self.eval_batches}
        return partial(Arrays, **self._arguments, **options), ()

    def make(self, step: int, split: str, length: int | None, unit: int | None) -> Batch:
        """Return the windows of a step; a smaller `length` is the first steps of every window."""
        steps = self.length if length is None else length
        if not 1 <= steps <= self.length:
            raise UsageError(f"length={length} must lie in [1, {self.length}], the length of the task.")
        windows = self._split(split)
        if split == "train":
            which = random_integers(self.key(split, step, unit), self.batch_size, len(windows.begin))
        elif 0 <= step < self.batches(split):
            which = np.arange(step * self.batch_size, min((step + 1) * self.batch_size, len(windows.begin)))
        else:
            raise UsageError(f"step={step} must lie in [0, {self.batches(split)}), the batches of {split!r}.")
        return self._gather(Windows(*(part[which] for part in windows)), steps)

    def batches(self, split: str) -> int:
        """Return how many batches an evaluation of this split takes."""
        if split == "train":
            return super().batches(split)
        count = -(-len(self._split(split).begin) // self.batch_size)
        return count if self.eval_batches is None else min(count, self.eval_batches)

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {"units": (self.mean.tolist(), self.std.tolist())}

    def standardise(self, values: Array) -> npt.NDArray[np.float32]:
        """Return values [..., F] in units of the training part: (x − mean) / std."""
        return ((values - self.mean) / self.std).astype(np.float32)

    def describe(self) -> str:
        return self._description

    def _described(self, data: Series) -> str:
        """What was read: how many series, steps and features; what is predicted, held out, left out and filled in."""
        least, most = int(data.lengths.min()), int(data.lengths.max())
        steps = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        held_out = len(self._windows["valid"].begin) / sum(len(windows.begin) for windows in self._windows.values())
        many = "" if self.inputs == 1 else "s"
        parts = [
            f"{self.path}: {len(data.lengths):,} series × {steps} steps × {self.inputs} feature{many}{self._names()}"
        ]
        held = "all of it scored" if self._whole else f"{100 * held_out:.0f} % held out"
        parts.append(f"{self._goal()}, {held}")
        if data.dropped:
            parts.append(f"without the columns {', '.join(data.dropped)}, which hold no numbers")
        missing = int(np.isnan(data.values).sum()) if data.gaps else 0
        if missing:
            parts.append(f"empty cells ({missing:,}) are filled with their column's mean, and not scored")
        return "; ".join(parts) + "."

    def _names(self) -> str:
        shown = ", ".join(self.features[:SHOWN]) + ", …" * (len(self.features) > SHOWN)
        return f" ({shown})" if shown else ""

    def _goal(self) -> str:
        what = f"one of {self.outputs} classes" if self.categorical else f"{self.outputs} target values"
        goals = {"next": "to say the next row", "every": f"to say {what} for every step"}
        return goals.get(self.predicts, f"to say {what} for every series")

    def _given(self, units: tuple[list[float], list[float]]) -> tuple[Array, Array]:
        mean, std = (np.asarray(values, dtype=np.float64) for values in units)
        if mean.shape != (self.inputs,) or std.shape != (self.inputs,):
            raise UsageError(
                f"path={self.path} has {self.inputs} features{self._names()}, but {mean.size} are wanted; give a file "
                f"with {mean.size} columns of numbers, those of the training."
            )
        return mean, std

    def _split(self, split: str) -> Windows:
        if split not in self._windows:
            raise UsageError(f"split={split!r} is unknown.{nearest(split, self._windows)}")
        return self._windows[split]

    def _set_targets(self, data: Series, readout: Readout) -> None:
        """Decide what is predicted, "next", "every" or "sequence", and keep the targets by step or by sequence."""
        self.predicts, self._targets, self.outputs, self.readout = "next", None, data.values.shape[1], "every"
        self.categorical = False
        targets, mask = data.targets, self._mask
        if targets is None:
            return
        shape = list(targets.shape)
        steps = int(data.lengths[0])
        classes = targets.dtype.kind in "biu" and len(shape) < 3
        each = len(shape) == 3 or (len(shape) == 2 and (classes or readout == "every"))
        if (each and shape[1] != steps) or (readout == "every" and not each):
            raise UsageError(
                f"path={self.path}: targets of type {targets.dtype} and shape {targets.shape} do not fit inputs of "
                f"{len(data.lengths)} sequences × {steps} steps. Give [N] integers (classes) or [N, O] reals for "
                "sequences; [N, T] integers or [N, T, O] reals for steps."
            )
        if not each:
            self.predicts, self.readout = "sequence", readout
            mask = np.any(data.mask, axis=1) if data.mask is not None and data.mask.ndim == 2 else data.mask
        else:
            self.predicts = "every"
        self.categorical = classes
        columns = 1 if len(shape) == 1 or (each and len(shape) == 2) else shape[-1]
        rows = targets.reshape(-1, columns)
        self._targets = _cleaned(self.path, rows, mask, classes)
        self.outputs = int(self._targets.max()) + 1 if classes else columns

    def _window_length(self, lengths: IntArray, length: int | None) -> int:
        longest = int(lengths.max()) - (self.predicts == "next")
        if self.predicts == "sequence":
            if length is not None and length < longest and not self._whole:
                raise UsageError(
                    f"length={length} would cut sequences of {longest} steps with one target; give length={longest}."
                )
            return longest
        if len(lengths) == 1 and length is None:
            return max(min(USUAL_LENGTH, longest // 10), 1)
        return max(longest if length is None else min(length, longest), 1)

    def _hold_out(self, windows: Windows, lengths: IntArray) -> tuple[dict[str, Windows], BoolArray]:
        """The windows of the splits, and which steps of all belong to training."""
        if self._whole and len(windows.begin):
            return {"valid": windows}, np.ones(int(lengths.sum()), dtype=bool)
        series = np.unique(windows.series)
        if len(windows.begin) < 2 or (self.predicts == "sequence" and len(series) < 2):
            raise UsageError(
                f"path={self.path} is too short: {len(lengths)} series of {int(lengths.max())} steps at most give "
                f"{len(windows.begin)} windows of length={self.length}; two are needed, one of them to be held out."
            )
        if len(series) == 1:
            held_out = np.arange(len(windows.begin)) >= len(windows.begin) - max(len(windows.begin) // 10, 1)
            training = np.arange(int(lengths.sum())) < windows.begin[held_out][0]
        else:
            # By the index alone: neither the seed nor the order of the classes has a part in it.
            draws = random_integers(Key(0).at("data").at("arrays").at("held out"), len(lengths), 2**31)
            order = series[np.argsort(draws[series], kind="stable")]
            chosen = np.isin(np.arange(len(lengths)), order[: max(len(series) // 10, 1)])
            held_out, training = chosen[windows.series], np.repeat(~chosen, lengths)
        parts = {"train": ~held_out, "valid": held_out}
        return {split: Windows(*(part[which] for part in windows)) for split, which in parts.items()}, training

    def _gather(self, windows: Windows, steps: int) -> Batch:
        """The batch of some windows: their first `steps` steps, filled up with what is not scored."""
        later = int(self.predicts == "next")
        place = windows.begin[:, None] + np.arange(steps + later)
        inside = place < windows.end[:, None]
        place = np.minimum(place, windows.end[:, None] - 1)
        values = np.asarray(self._values[place], dtype=np.float64)
        there = inside if self._mask is None else inside & self._mask[place]
        known = np.isfinite(values) & (inside if self.predicts == "every" else there)[:, :, None]
        values = self.standardise(np.where(known, values, self.mean))
        inputs = torch.from_numpy(values[:, :steps])
        if self._targets is None:
            scored = known[:, 1:].all(-1) & inside[:, :steps]
            return Batch(inputs, torch.from_numpy(values[:, 1:].copy()), torch.from_numpy(scored))
        if self.predicts == "every":
            return Batch(inputs, torch.from_numpy(self._targets[place]), torch.from_numpy(there))
        targets = torch.from_numpy(self._targets[windows.series])
        by_step = self._sequence_mask is not None and self._sequence_mask.ndim == 2
        scored = there.any(1) if self._sequence_mask is not None else np.ones(len(there), dtype=bool)
        present = torch.from_numpy(there) if by_step else None
        return Batch(inputs, targets, torch.from_numpy(scored), present=present)


def cut(lengths: IntArray, length: int, shift: int) -> Windows:
    """Return the windows of series that lie one after the other, each series cut into as few as hold all its steps.

    Args:
        lengths: steps of every series.
        length: steps of a window; the last one of a series may have fewer.
        shift: 1 if a step needs the one after it as its target, so that the last step begins no window; else 0.

    Example:
        >>> windows = cut(np.array([5, 1, 3]), length=2, shift=1)
        >>> windows.series.tolist(), windows.begin.tolist(), windows.end.tolist()
        ([0, 0, 2], [0, 2, 6], [5, 5, 9])
    """
    ends = np.cumsum(lengths)
    counts = -(-np.maximum(lengths - shift, 0) // length)
    series = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(series)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Windows(series, (ends - lengths)[series] + within * length, ends[series])


def _every_step(data: Series) -> BoolArray | None:
    """The mask of all steps of all series."""
    if data.mask is None:
        return None
    return data.mask.reshape(-1) if data.mask.ndim == 2 else np.repeat(data.mask, data.lengths)


def _cleaned(path: str, targets: Array, scored: BoolArray | None, classes: bool) -> Array:
    """Targets [n, O] as float32, or classes [n] as int64, with 0 where they are not scored.

    What is scored must be finite, or a class.
    """
    scored = np.ones(len(targets), dtype=bool) if scored is None else scored
    wrong = (targets < 0 if classes else ~np.isfinite(targets)).any(1) & scored
    if wrong.any():
        fault = "negative" if classes else "not finite"
        raise UsageError(
            f"path={path}: {int(wrong.sum())} targets are {fault}, the first number {int(np.flatnonzero(wrong)[0])} of "
            f"{len(targets)}. Mend them, or mark what is missing by a mask that is False there."
        )
    cleaned = np.where(scored[:, None], targets, 0)
    return cleaned[:, 0].astype(np.int64) if classes else cleaned.astype(np.float32)


def _refuse_not_finite(path: str, data: Series, mask: BoolArray | None) -> None:
    place = first_not_finite(data.values, mask, data.gaps)
    if place is None:
        return
    row, feature = place
    series = int(np.searchsorted(np.cumsum(data.lengths), row, side="right"))
    step = row - int(data.lengths[:series].sum())
    raise UsageError(
        f"path={path}: the value of series {series}, step {step}, feature {feature} is not finite. "
        "Fill it in, or give an .npz file with a mask that is False there."
    )


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
