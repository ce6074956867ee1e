"""Real-valued series in files: tables, .npy and .npz, read into one table of steps; docs/data.md describes them.

All series are concatenated in `values` [M, F], so that a window is a range of rows whatever the file. NaN is a missing
value. Pickles are never loaded.
"""

from __future__ import annotations

import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reroll.data.tables import EXACT, Reading, is_table, printable, read_table
from reroll.errors import UsageError

Array = npt.NDArray[Any]
BoolArray = npt.NDArray[np.bool_]

NAMES = ("inputs", "targets", "mask", "lengths", "held_out", "labels")  # what is read of an .npz file
UNUSABLE = "infinite, or a whole number beyond 2⁵³, which a float rounds"
ROWS = 1 << 16  # steps read at a time


@dataclass(frozen=True)
class Series:
    """N series, M steps together.

    Args:
        values: [M, F], all steps of the first series, then all of the second …; NaN where a value is missing.
        lengths: steps of every series, [N].
        inside: which steps of a file's array [N, T] these are.
        targets: [N], [N, O], [N, T] or [N, T, O], as the file has them; None: none.
        mask: which steps there are, or count, [M]; None: all.
        by_step: True if the mask differs within a series, or lengths differ.
        held_out: which series are held out, [N]; None: unspecified.
        features, labels: names of the features and classes, if they have any.
        note: how the file was read, for the user.
    """

    values: Array
    lengths: npt.NDArray[np.int64]
    inside: BoolArray | None = None
    targets: Array | None = None
    mask: BoolArray | None = None
    by_step: bool = False
    held_out: BoolArray | None = None
    features: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    note: str = ""


def read_series(path: str | os.PathLike[str], reading: Reading | None = None) -> Series:
    """Return the series of a file.

    Raises:
        UsageError: if the file is missing, of another kind, or its shapes do not fit together.
    """
    where, reading = Path(os.path.expanduser(path)), reading or Reading()
    known = ".csv, .tsv, .txt (also .gz), .parquet, .npy, .npz"
    if where.is_dir():
        raise UsageError(f"path={where} is a folder; give one of its files, a table or array: {known}.")
    if not is_table(where) and where.suffix.lower() not in (".npy", ".npz"):
        raise UsageError(f"path={where} ends in {where.suffix or 'nothing'!r}; known are {known}.")
    if not where.is_file():
        raise UsageError(f"path={where} does not exist, or is no file. Give a table or array: {known}.")
    try:
        if is_table(where):
            values, features, lengths, note = read_table(where, reading)
            return Series(values, lengths, features=features, note=note)
        if reading != Reading():
            raise UsageError(f"sep, decimal, columns, time and missing are for tables; {where} holds arrays.")
        with where.open("rb") as file:
            if file.peek(6)[:6] != b"\x93NUMPY":
                return _read_npz(where, np.load(file, allow_pickle=False))
        return _one_or_many(where, _numbers(where, "the array", np.load(where, mmap_mode="r", allow_pickle=False)))
    except UsageError:
        raise
    except Exception as error:  # numpy, zipfile, pandas and pyarrow raise all kinds of errors for damaged files
        if "pickle" in str(error) or "Python objects" in str(error):
            raise UsageError(
                f"path={where} is no file of numbers (and pickles, which can run any code, are never loaded): save "
                "arrays of numbers by numpy.save or numpy.savez, padded to one length, with `lengths`."
            ) from None
        if ragged := re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error)):
            cells, row, more = ragged.groups()
            raise UsageError(
                f"path={where}, line {row} has {more} cells, not {cells}; correct or delete it, or what is above it if "
                "the table begins there."
            ) from None
        if isinstance(error, zipfile.BadZipFile):
            raise UsageError(
                f"path={where} is no whole .npz archive: cut short, or of another format. Copy it again, or save its "
                "arrays by numpy.savez."
            ) from None
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        raise UsageError(f"path={where} cannot be read ({reason}); is it complete, and yours to read?") from None


@np.errstate(invalid="ignore", over="ignore")  # a signalling NaN, or squares beyond 1e308
def moments(values: Array, used: BoolArray) -> tuple[Array, Array]:
    """Return mean and standard deviation of every feature, [F] each; of a constant feature 1 as its deviation.

    Args:
        values: [M, F], memory-mapped or not; those that are not finite are ignored.
        used: which steps count, [M].

    Example:
        >>> moments(np.array([[1.0, 5.0], [3.0, 5.0], [9.0, 9.0]]), np.array([True, True, False]))
        (array([2., 5.]), array([1., 1.]))
    """
    mean, squares, count = np.zeros((3, values.shape[1]))
    for begin in range(0, len(values), ROWS):
        block = np.asarray(values[begin : begin + ROWS][used[begin : begin + ROWS]], dtype=np.float64)
        counts = np.isfinite(block)
        more = counts.sum(0)
        total = np.maximum(count + more, 1)
        block_mean = np.where(counts, block, 0).sum(0) / np.maximum(more, 1)
        squares += (np.where(counts, block - block_mean, 0) ** 2).sum(0)
        squares += (block_mean - mean) ** 2 * count * more / total
        mean += (block_mean - mean) * more / total
        count += more
    std = np.sqrt(squares / np.maximum(count, 1))
    # Rounding leaves a constant feature a spread of about 1e-16 of its mean.
    return mean, np.where(std > 1e-12 * np.abs(mean), std, 1.0)


def missing(path: str, series: Series, mask: BoolArray | None) -> int:
    """Return how many values are NaN where the mask [M] is True; None: everywhere.

    Raises:
        UsageError: for an infinite value there, or a whole number that a float rounds.
    """
    count = 0
    for begin in range(0, len(series.values), ROWS):
        block = np.asarray(series.values[begin : begin + ROWS])
        there = True if mask is None else mask[begin : begin + ROWS, None]
        count += int((np.isnan(block) & there).sum())
        wrong = np.argwhere(cannot_be_used(block) & there)
        if len(wrong):
            place = begin + int(wrong[0, 0])
            which = int(np.searchsorted(np.cumsum(series.lengths), place, side="right"))
            raise UsageError(
                f"path={path}: the value of series {which}, step {place - int(series.lengths[:which].sum())}, feature "
                f"{wrong[0, 1]} is {UNUSABLE}. Correct it, or make it NaN, a missing value."
            )
    return count


def cannot_be_used(values: Array) -> BoolArray:
    """Return which values are infinite, or whole numbers beyond 2⁵³, which float64 rounds."""
    return np.isinf(values) if values.dtype.kind == "f" else (values > EXACT) | (values < -EXACT)


def _read_npz(path: Path, archive: Any) -> Series:
    names = {"x": "inputs", "y": "targets"} | {name: name for name in NAMES}
    arrays = {names[name]: archive[name] for name in archive.files if name in names}
    inputs, targets = arrays.get("inputs"), arrays.get("targets")
    if inputs is None:
        known = printable(", ".join(archive.files))
        raise UsageError(f"path={path} has the arrays {known or 'none'}; it needs `inputs` (or `x`).")
    inputs = _numbers(path, "inputs", inputs)
    beside = {name: arrays.get(name) for name in ("mask", "lengths", "held_out")}
    if targets is None and inputs.ndim in (1, 2) and all(array is None for array in beside.values()):
        return _one_or_many(path, inputs)
    if inputs.ndim not in (2, 3):
        raise UsageError(f"path={path}: inputs have shape {inputs.shape}; expected [N, T, F], or [N, T].")
    count, steps = inputs.shape[:2]
    for name, array in [*beside.items(), ("targets", targets)]:
        if array is None:
            continue
        shape = _numbers(path, name, array).shape
        many = {"mask": ((count,), (count, steps)), "targets": (shape,) if 0 < len(shape) < 4 else ()}
        if shape[:1] != (count,) or shape not in many.get(name, ((count,),)):
            fitting = {
                "mask": f"({count},) or ({count}, {steps})",
                "targets": f"({count},) or ({count}, O), or ({count}, {steps}) or ({count}, {steps}, O)",
            }  # fmt: skip
            raise UsageError(
                f"path={path}: {name} of shape {array.shape} do not fit inputs of {inputs.shape}; expected "
                f"{fitting.get(name, f'({count},)')}."
            )
    series = _one_or_many(path, inputs[:, :, None] if inputs.ndim == 2 else inputs)
    lengths, mask, held_out = beside["lengths"], beside["mask"], beside["held_out"]
    lengths = series.lengths if lengths is None else lengths
    if ((lengths < 1) | (lengths > steps)).any() or lengths.dtype.kind not in "iu":
        raise UsageError(f"path={path}: lengths must be whole numbers in [1, {steps}], the steps of the inputs.")
    inside = np.arange(steps) < lengths[:, None]
    by_step = not inside.all() or (mask is not None and mask.ndim == 2)
    if mask is not None:
        mask = np.broadcast_to(mask.astype(bool).reshape(count, -1), inside.shape)[inside]
    labels = tuple(printable(name) for name in np.atleast_1d(arrays.get("labels", ()))[:1000])
    return Series(
        series.values if inside.all() else series.values[inside.reshape(-1)], lengths.astype(np.int64), inside, targets,
        mask, by_step, None if held_out is None else held_out.astype(bool), labels=labels,
    )  # fmt: skip


def _one_or_many(path: Path, array: Array) -> Series:
    """One series [T] or [T, F], or several of one length, [N, T, F]."""
    if array.ndim not in (1, 2, 3) or 0 in array.shape:
        empty = ", which is empty" if 0 in array.shape else ""
        raise UsageError(f"path={path} has shape {array.shape}{empty}; expected [T], [T, F] or [N, T, F].")
    array = array[None, :, None] if array.ndim == 1 else array[None] if array.ndim == 2 else array
    return Series(array.reshape(-1, array.shape[2]), np.full(len(array), array.shape[1], dtype=np.int64))


def _numbers(path: Path, name: str, array: Array) -> Array:
    if not isinstance(array, np.ndarray):  # numpy returns the bytes of a member that is no array
        raise UsageError(f"path={path}: {name} are no array; save the archive with numpy.savez.")
    if array.dtype.kind not in "biuf":
        raise UsageError(f"path={path}: {name} are of type {array.dtype}; expected real numbers.")
    return array
