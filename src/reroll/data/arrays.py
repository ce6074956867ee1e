"""Real-valued series as a task: predict the next value, a value or class of every step, or one of the whole sequence.

    task = Arrays("weather.csv", length=100)          predict the next row from the rows before
    task = Arrays("worms.npz", readout="last")        inputs [N, T, F] and one class each, targets [N]
    task.describe()                                   one line on what was read

    file                                    what is predicted                       readout   loss
    no targets                              the next value of every feature         every     squared error
    targets [N], integers                   the class of the sequence               last      cross-entropy
    targets [N] or [N, O], real             O values of the sequence                last      squared error
    targets [N, T], integers                the class of every step                 every     cross-entropy
    targets [N, T, O], real                 O values of every step                  every     squared error

Inputs and real targets are standardised, (x − mean) / std over the training part. A tenth of the series is held out:
those whose index has a small hash, or those that the file marks; of one long series the last tenth of its windows.
docs/data.md describes the files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch

from reroll.data.baselines import constant_losses, period_of
from reroll.data.batch import Batch
from reroll.data.series import UNUSABLE, Series, cannot_be_used, missing, moments, read_series
from reroll.data.tables import Reading
from reroll.data.task import FileTask, Readout
from reroll.data.windows import Windows, cut, hold_out
from reroll.errors import UsageError, did_you_mean, plural, require_positive
from reroll.kernels.philox import random_integers

Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
Units = tuple[list[float], list[float]] | tuple[list[float], list[float], list[str]]
"""Mean and standard deviation of every feature, and maybe their names: the units that a model was trained in."""
BoolArray = npt.NDArray[np.bool_]

DEFAULT_LENGTH = 128  # of the windows of one long series
SHOWN = 8  # names of features that a description lists
SEASON = 1 << 15  # rows that are searched for a period
MOST_CLASSES = 1 << 20


class Arrays(FileTask):
    """Learn real-valued series from a table, a .npy or a .npz file.

    Args:
        path: the file.
        length: T, steps per window. None: whole series; of one long series 128, or a tenth of it.
        batch: B, windows per batch.
        seed: selects the training windows; what is held out does not depend on it.
        readout: "last" or "mean" of the steps, for one target per sequence; "every" says that real targets [N, T] are
            values of the steps, not T values of the sequence.
        eval_batches: the most batches of an evaluation; None: all of the held-out part.
        whole: hold out all of the file, to score a model on it.
        units: the mean and the std of every feature, then of every real target, to standardise by, and maybe the names
            of the features, by which columns are then ordered; None: those of the training part.
        sep, decimal, columns, time, missing: how a table is read, see `tables.Reading`.

    Attributes: `mean` and `std`, [F + O], of the features and the real targets; `features` and `labels`, the names of
    features and classes; `fingerprint`, SHA-256 of the file.

    A missing value (NaN, an empty cell, or a step whose mask is False) is replaced by the mean, 0 after standardising,
    and not scored. With one target per sequence the mask says which steps exist (`Batch.present`); with a target per
    step it says which are scored, and leaves the inputs alone.

    Raises:
        UsageError: if the file cannot be read, its shapes do not match, or it holds too little data.
    """

    name = "arrays"
    _targets: Any = None  # by step or by sequence; None: the next step is predicted
    _scored: Any = True  # which of them, or which steps, are scored

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
        units: Units | None = None,
        **reading: str | None,
    ) -> None:
        require_positive(length=length, batch=batch, eval_batches=eval_batches)
        if readout not in get_args(Readout):
            raise UsageError(f"readout={readout!r} is unknown.{did_you_mean(readout, get_args(Readout))}")
        self.path, self.batch_size, self.seed, self.eval_batches = os.fspath(path), batch, seed, eval_batches
        self._whole = whole
        data = read_series(path, Reading(**reading))
        if units is not None and len(units) > 2:
            data = _in_order(self.path, data, tuple(units[2]))
        with Path(os.path.expanduser(path)).open("rb") as file:
            self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        self.inputs, self.features, self.labels = int(data.values.shape[1]), data.features, data.labels
        self._values, self._mask, self._by_step = data.values, data.mask, data.by_step
        self._ends = np.cumsum(data.lengths)
        self._set_targets(data, readout)
        self.length = self._window_length(data.lengths, length)
        windows = cut(data.lengths, self.length, shift=int(self.predicts == "next"))
        self._windows, training = self._hold_out(windows, data)
        self.trains = "train" in self._windows
        rows = training[np.cumsum(data.lengths) - 1] if self.predicts == "sequence" else training
        for split in self._windows:
            if not ((rows if split == "train" or whole else ~rows) & self._scored).any():
                raise UsageError(
                    f"path={self.path}: nothing in the split {split!r} is scored. The mask or held_out excludes "
                    "all of it, or all of its targets are missing; correct them."
                )
        self.mean, self.std = self._moments(training, rows) if units is None else self._check_units(units)
        if self._targets is not None and not self.categorical:
            targets = (self._targets - self.mean[self.inputs :]) / self.std[self.inputs :]
            self._targets = np.where(self._scored[:, None], targets, 0).astype(np.float32)
        self._description = self._described(data)

    @np.errstate(invalid="ignore")  # a signalling NaN
    def make(self, step: int, split: str, length: int | None, unit: int | None) -> Batch:
        """Return the windows of a step, padded with unscored steps; a smaller `length` keeps their first steps."""
        windows, steps, later = self._windows[split], length or self.length, int(self.predicts == "next")
        if split == "train":
            which: Any = random_integers(self.key(split, step, unit), self.batch_size, len(windows.begin))
        else:
            which = slice(step * self.batch_size, (step + 1) * self.batch_size)
        series, begin, end = (part[which] for part in windows)
        place = begin[:, None] + np.arange(steps + later)
        inside = place < end[:, None]
        place = np.minimum(place, end[:, None] - 1)
        values = np.asarray(self._values[place], dtype=np.float64)
        there = inside if self._mask is None else inside & self._mask[place]
        known = np.isfinite(values) & (inside if self.predicts == "every" else there)[:, :, None]
        values = self.standardise(np.where(known, values, self.mean[: self.inputs]))
        inputs = torch.from_numpy(values[:, :steps])
        if self._targets is None:
            scored = known[:, 1:].all(-1) & inside[:, :steps]
            return Batch(inputs, torch.from_numpy(values[:, 1:].copy()), torch.from_numpy(scored))
        at = place if self.predicts == "every" else series
        scored = self._scored[at] & inside if self.predicts == "every" else self._scored[at]
        present = torch.from_numpy(there) if self._by_step and self.predicts == "sequence" else None
        return Batch(inputs, torch.from_numpy(self._targets[at]), torch.from_numpy(scored), present=present)

    def count(self, split: str) -> int:
        return -(-len(self._windows[split].begin) // self.batch_size)

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {"units": (self.mean.tolist(), self.std.tolist(), list(self.features))}

    def standardise(self, values: Array) -> npt.NDArray[np.float32]:
        """Return values [..., F] in units of the training part: (x − mean) / std."""
        return ((values - self.mean[: self.inputs]) / self.std[: self.inputs]).astype(np.float32)

    def history(self, steps: int) -> list[Array]:
        """Return the last rows of every series, at most `steps`, standardised as inputs are, [T, F] each."""
        begins = np.maximum(self._ends - np.diff(self._ends, prepend=0), self._ends - steps)
        return [self._standard(np.arange(begin, end))[0] for begin, end in zip(begins, self._ends)]

    @np.errstate(over="ignore", invalid="ignore")  # values far beyond those of the training part
    def baselines(self, split: str = "valid") -> dict[str, float]:
        """Return the loss of two untrained rules on the outputs that an evaluation scores.

            persistence       the next row is this row
            seasonal (p)      the next row is the one p steps before it

        The period p is the lag with the least error on the training part, beyond the first lag with more than the mean
        error; without such a lag there is no seasonal rule. Rows without a row p steps before them are predicted by the
        row before. With explicit targets the rules are

            mean of the targets     of the training part, for real targets
            class frequencies       of the training part; the accuracy is that of the most frequent class

        and there are none without a training part.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp()) / "days.npy"
            >>> np.save(path, np.tile([0.0, 1.0, 5.0, 2.0, 0.0, -3.0, -1.0], 60))
            >>> {rule: round(loss, 3) for rule, loss in Arrays(path, length=10).baselines().items()}
            {'persistence': 1.177, 'seasonal (7 steps)': 0.0}
        """
        if self.predicts != "next":
            return self._constant(split)
        seen = slice(self.batches(split) * self.batch_size)
        windows = Windows(*(part[seen] for part in self._windows[split]))
        place = windows.begin[:, None] + np.arange(1, self.length + 1)
        inside = place < windows.end[:, None]
        start = np.broadcast_to((self._ends - np.diff(self._ends, prepend=0))[windows.series][:, None], place.shape)
        place, start = place[inside], start[inside]
        targets, known = self._standard(place)
        scored, period = known.all(-1), self._period()
        if not scored.any():
            raise UsageError(f"path={self.path}: nothing in the split {split!r} is scored: every row lacks a value.")

        def loss(lag: int) -> float:
            before = np.where(place - lag >= start, place - lag, place - 1)
            errors = targets.astype(np.float64) - self._standard(before)[0]
            return float(np.square(errors)[scored].mean())

        seasonal = {} if period is None else {f"seasonal ({period} steps)": loss(period)}
        return {"persistence": loss(1)} | seasonal

    def _constant(self, split: str) -> dict[str, float]:
        """The loss of the best constant of the training part, on the targets that an evaluation scores."""
        if not self.trains or split == "train":
            return {}

        def targets(windows: Windows) -> Array:
            at: Any = np.unique(windows.series)
            if self.predicts == "every":
                place = windows.begin[:, None] + np.arange(self.length)
                at = place[place < windows.end[:, None]]
            return self._targets[at][self._scored[at]]

        trained = targets(self._windows["train"])
        scored = targets(Windows(*(part[: self.batches(split) * self.batch_size] for part in self._windows[split])))
        return constant_losses(trained, scored, self.outputs if self.categorical else None)

    @np.errstate(over="ignore", invalid="ignore")  # as for baselines; and a signalling NaN
    def _standard(self, place: IntArray) -> tuple[Array, BoolArray]:
        """The rows at these places, standardised, 0 where a value is missing; and where none is, [n, F]."""
        values = np.asarray(self._values[place], dtype=np.float64)
        there = np.ones(len(place), dtype=bool) if self._mask is None else self._mask[place]
        known = np.isfinite(values) & there[:, None]
        return self.standardise(np.where(known, values, self.mean[: self.inputs])), known

    def _period(self) -> int | None:
        """The lag of the best seasonal rule over the end of the longest series that was trained on."""
        windows = self._windows.get("train", self._windows["valid"])
        begin, end = windows.begin, np.minimum(windows.begin + self.length + 1, windows.end)
        where = np.unique(windows.series, return_index=True)[1]  # windows are in the order of their series
        firsts, lasts = np.minimum.reduceat(begin, where), np.maximum.reduceat(end, where)
        longest = int((lasts - firsts).argmax())
        first, last = firsts[longest], lasts[longest]
        rows = self._standard(np.arange(max(first, last - SEASON), last))[0].astype(np.float64)
        return period_of(rows)

    def describe(self) -> str:
        losses = ", ".join(f"{rule} {loss:.4g}" for rule, loss in self.baselines().items())
        return self._description + (f" Held-out loss without training: {losses}." if losses else "")

    def _described(self, data: Series) -> str:
        """A line on the data: series, steps and features; what is predicted, held out, left out and filled in."""
        least, most = int(data.lengths.min()), int(data.lengths.max())
        steps = f"{most:,}" if least == most else f"{least:,} to {most:,}"
        sequences, later = self.predicts == "sequence", int(self.predicts == "next")
        counts = {
            split: len(begin) if sequences else int(np.minimum(end - begin - later, self.length).sum())
            for split, (_, begin, end) in self._windows.items()
        }
        held_out = f"{counts['valid']:,} series" if sequences else plural(counts["valid"], "row")
        shape = f"{len(data.lengths):,} series × {steps} steps × {self.inputs} feature{'s' * (self.inputs != 1)}"
        percent = 100 * counts["valid"] / sum(counts.values())
        share = "all of it scored" if self._whole else f"{held_out} ({percent:.3g} %) held out"
        what = f"one of {self.outputs} classes{_names(self.labels)}"
        what = what if self.categorical else f"{self.outputs} target value{'s' * (self.outputs != 1)}"
        goal = {"next": "the next row", "every": f"{what} for every step", "sequence": f"{what} for every series"}
        parts = [f"{self.path}: {shape}{_names(self.features)}", f"predicts {goal[self.predicts]}, {share}", data.note]
        if absent := missing(self.path, data, None if self.predicts == "every" else data.mask):
            parts.append(f"missing values ({absent:,}) are filled with their column's mean, and not scored")
        return "; ".join(filter(None, parts)) + "."

    def _moments(self, training: BoolArray, rows: BoolArray) -> tuple[Array, Array]:
        """Mean and std of the features over the training part, and of real targets behind them."""
        # With a target per step the mask is about targets; all inputs exist.
        used = training if self._mask is None or self.predicts == "every" else training & self._mask
        units = [moments(self._values, used)]
        if self._targets is not None and not self.categorical:
            units.append(moments(self._targets, rows & self._scored))
        mean, std = np.concatenate(units, axis=1)
        return mean, std

    def _check_units(self, units: Units) -> tuple[Array, Array]:
        mean, std = (np.asarray(values, dtype=np.float64) for values in units[:2])
        values = 0 if self._targets is None or self.categorical else self.outputs
        if mean.shape != (len(self._values[0]) + values,) or std.shape != mean.shape:
            raise UsageError(
                f"path={self.path} has {self.inputs} features{_names(self.features)}, but the model was trained on "
                f"{mean.size - values}; give a file with the same columns of numbers."
            )
        return mean, std

    def _set_targets(self, data: Series, readout: Readout) -> None:
        """Decide what is predicted, "next", "every" or "sequence", and store the targets by step or by sequence."""
        self.predicts, self.outputs, self.readout = "next", data.values.shape[1], "every"
        self.categorical, self._scored = False, True if data.mask is None else data.mask
        targets, inside = data.targets, data.inside
        if targets is None or inside is None:
            return
        shape, steps = list(targets.shape), len(inside[0])
        classes = targets.dtype.kind in "biu" and len(shape) < 3
        each = len(shape) == 3 or (len(shape) == 2 and (classes or readout == "every"))
        if (each and shape[1] != steps) or (readout == "every" and not each):
            raise UsageError(
                f"path={self.path}: targets of type {targets.dtype} and shape {targets.shape} do not fit inputs of "
                f"{len(data.lengths)} sequences × {steps} steps. Give [N] integers (classes) or [N, O] reals for "
                "sequences; [N, T] integers or [N, T, O] reals for steps."
            )
        self.predicts, self.categorical = "every" if each else "sequence", classes
        known = np.ones(len(data.values), dtype=bool) if data.mask is None else data.mask
        if not each:
            self.readout, known = readout, np.logical_or.reduceat(known, np.cumsum(data.lengths) - data.lengths)
        rows = targets.reshape(*inside.shape, -1)[inside] if each else targets.reshape(len(targets), -1)
        self._scored, self._targets = _cleaned(self.path, rows, known, classes)
        self.outputs = int(self._targets.max()) + 1 if classes else rows.shape[1]

    def _window_length(self, lengths: IntArray, length: int | None) -> int:
        longest = int(lengths.max()) - (self.predicts == "next")
        if self.predicts == "sequence":
            if length is not None and length < longest and not self._whole:
                raise UsageError(
                    f"length={length} would cut sequences of {longest} steps with one target; give length={longest}."
                )
            return longest
        if len(lengths) == 1 and length is None:
            return max(min(DEFAULT_LENGTH, longest // 10), 1)
        return max(longest if length is None else min(length, longest), 1)

    def _hold_out(self, windows: Windows, data: Series) -> tuple[dict[str, Windows], BoolArray]:
        """The windows of the splits, and which steps of all belong to training."""
        lengths = data.lengths
        series, count = np.unique(windows.series), len(windows.begin)
        if self._whole and count:
            return {"valid": windows}, np.ones(len(data.values), dtype=bool)
        if self._whole:
            raise UsageError(f"path={self.path} is too short: to score the next row, a series needs two rows.")
        if count < 2 or (self.predicts == "sequence" and len(series) < 2):
            raise UsageError(
                f"path={self.path} is too short: {len(lengths)} series of {int(lengths.max())} steps at most give "
                f"{count} windows of length={self.length}; two are needed, one of them held out."
            )
        return hold_out(windows, lengths, data.held_out)


def _in_order(path: str, data: Series, names: tuple[str, ...]) -> Series:
    """The series with its columns in the order of the names a model was trained on, if both have names."""
    if not names or not data.features or len(names) != len(data.features) or names == data.features:
        return data
    if set(names) != set(data.features):
        raise UsageError(
            f"path={path} has the columns {', '.join(data.features)}; the model was trained on {', '.join(names)}. "
            "If they mean the same, rename them."
        )
    order = [data.features.index(name) for name in names]
    return dataclasses.replace(data, values=data.values[:, order], features=names)


def _names(names: tuple[str, ...]) -> str:
    return f" ({', '.join(names[:SHOWN])}{', …' * (len(names) > SHOWN)})" if names else ""


def _cleaned(path: str, targets: Array, known: BoolArray, classes: bool) -> tuple[BoolArray, Array]:
    """Which targets are scored, [n], and the targets [n, O], or classes [n] as int64, with 0 where they are not.

    NaN is a missing target. What is scored must be finite, or a class.
    """
    known = known if classes else known & ~np.isnan(targets).any(1)
    wrong = ((targets < 0) | (targets >= MOST_CLASSES) if classes else cannot_be_used(targets)).any(1) & known
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        fault = f"no class, 0 … {MOST_CLASSES - 1}" if classes else UNUSABLE
        raise UsageError(
            f"path={path}: {int(wrong.sum())} targets are {fault}; the first is number {first} of {len(targets)}, "
            f"{targets[first].tolist()}. Correct them, or give a mask that is False where they are missing."
        )
    cleaned = np.where(known[:, None], targets, 0)
    return known, cleaned[:, 0].astype(np.int64) if classes else cleaned.astype(np.float64)
