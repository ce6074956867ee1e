"""Real-valued series in files: .npy, .npz and .csv, read into one table of steps.

    .npy   one series [T] or [T, F], or series [N, T, F]; memory-mapped
    .npz   `inputs` (or `x`) as in .npy; optional `targets` (or `y`) and `mask`
    .csv   a header line, a column for every feature, a row for every step; a column `series` (or `id`) tells several
           series apart; an empty cell is a missing value

A table is one series in every format: a row for every step, a column for every feature. Only `targets` or a `mask`
beside it, of which there is one for each of N, make it N series of one feature, [N, T].

All series lie one after the other in `values` [M, F], so that a window is a range of rows whatever file it came from.
Pickles are never loaded.
"""

from __future__ import annotations

import csv
import logging
import os
import struct
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any, TextIO
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from reroll.errors import UsageError

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

ENDINGS = (".csv", ".npy", ".npz")
MISSING = {"", "na", "n/a", "nan", "null", "none"}
ROWS = 1 << 16  # steps looked at at a time
SERIES_COLUMNS = ("series", "id")
MAGIC = (b"\x93NUMPY", b"PK")  # how a .npy and a .npz file begin
FOREIGN = (SyntaxError, TokenError, TypeError, KeyError, OverflowError, RuntimeError, struct.error, zlib.error)
"""What numpy and zipfile raise besides, for a damaged header or member."""


@dataclass(frozen=True)
class Series:
    """N series, M steps together.

    Args:
        values: [M, F], all steps of the first series, then all of the second …; NaN where a value is missing.
        lengths: steps of every series, [N].
        targets: [N], [N, O], [N, T] or [N, T, O], as the file has them; None: none.
        mask: [N, T] or [N], as the file has it; None: all.
        gaps: True if NaN means a missing value, False if it is a mistake where the mask is True.
        features: names of the features, if they have any.
        dropped: names of the columns that were left out, since they hold no numbers.
    """

    values: Array
    lengths: npt.NDArray[np.int64]
    targets: Array | None = None
    mask: npt.NDArray[np.bool_] | None = None
    gaps: bool = False
    features: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()


def read_series(path: str | os.PathLike[str]) -> Series:
    """Return the series of a file.

    Raises:
        UsageError: if the file is missing, of another kind, or its shapes do not fit together.
    """
    where = Path(path).expanduser()
    ending = where.suffix.lower()
    if ending not in ENDINGS:
        raise UsageError(f"path={where} ends in {ending or 'nothing'!r}; known are {', '.join(ENDINGS)}.")
    if not where.is_file():
        raise UsageError(f"path={where} does not exist, or is no file.")
    try:
        if ending == ".csv":
            with where.open(newline="", encoding="utf-8-sig") as file:
                return _read_csv(where, file)
        if ending == ".npy":
            return _read_npy(where)
        with where.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            if isinstance(arrays, np.ndarray):
                raise UsageError(f"path={where} is no .npz file but a .npy one; name it so.")
            return _read_npz(where, arrays)
    except UsageError:
        raise
    except (OSError, EOFError, BadZipFile) as error:
        raise UsageError(f"path={where} cannot be read ({error}); is it whole, and yours to read?") from None
    except UnicodeDecodeError:
        raise UsageError(f"path={where} is not UTF-8 text; convert it.") from None
    except (ValueError, csv.Error, *FOREIGN) as error:
        if ending != ".csv" and not _begins_as_numpy(where):
            raise UsageError(
                f"path={where} is no numpy file, whatever its name says (pickles are never loaded); save arrays of "
                f"numbers by numpy.{'savez' if ending == '.npz' else 'save'}, or give a .csv file."
            ) from None
        # numpy says so of object arrays.
        if "pickle" in str(error) or "Python objects" in str(error):
            raise UsageError(
                f"path={where} holds Python objects, which are never loaded (a pickle can run any code); "
                "save arrays of numbers, padded to one length, with a mask."
            ) from None
        raise UsageError(f"path={where} cannot be read ({error}); is it whole?") from None


def moments(values: Array, used: npt.NDArray[np.bool_]) -> tuple[Array, Array]:
    """Return mean and standard deviation of every feature, [F] each; of a constant feature 1 as its deviation.

    Args:
        values: [M, F], memory-mapped or not; what is not finite does not count.
        used: which steps count, [M].

    Example:
        >>> moments(np.array([[1.0, 5.0], [3.0, 5.0], [9.0, 9.0]]), np.array([True, True, False]))
        (array([2., 5.]), array([1., 1.]))

    Reference: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    1979: the moments of parts, put together without cancellation.
    """
    count, mean, squares = (np.zeros(values.shape[1]) for _ in range(3))
    for begin in range(0, len(values), ROWS):
        block = np.asarray(values[begin : begin + ROWS], dtype=np.float64)
        counts = np.isfinite(block) & used[begin : begin + ROWS, None]
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


def first_not_finite(values: Array, mask: npt.NDArray[np.bool_] | None, gaps: bool) -> tuple[int, int] | None:
    """Return (step, feature) of the first value that is not finite where the mask [M] is True; `gaps` allows NaN.

    Example:
        >>> first_not_finite(np.array([[0.0, 1.0], [2.0, np.inf]]), None, gaps=True)
        (1, 1)
    """
    for begin in range(0, len(values), ROWS):
        block = np.asarray(values[begin : begin + ROWS])
        wrong = np.isinf(block) if gaps else ~np.isfinite(block)
        if mask is not None:
            wrong &= mask[begin : begin + ROWS, None]
        if wrong.any():
            row, feature = np.argwhere(wrong)[0].tolist()
            return begin + row, feature
    return None


def _read_npy(path: Path) -> Series:
    loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(loaded, np.ndarray):
        raise UsageError(f"path={path} is no .npy file but a .npz one; name it so.")
    array = _numbers(path, "the array", loaded)
    if array.ndim not in (1, 2, 3):
        raise UsageError(f"path={path} has shape {array.shape}; expected [T], [T, F] or [N, T, F].")
    return _stacked(_one_series(array))


def _read_npz(path: Path, arrays: Any) -> Series:
    found = {name: _first(arrays, keys) for name, keys in {"inputs": "inputs x", "targets": "targets y"}.items()}
    if found["inputs"] is None:
        raise UsageError(f"path={path} has the arrays {', '.join(arrays.files) or 'none'}; it needs `inputs` (or `x`).")
    inputs = _numbers(path, "inputs", found["inputs"])
    targets, mask = found["targets"], _first(arrays, "mask")
    if targets is None and mask is None and inputs.ndim in (1, 2):
        return _stacked(_one_series(inputs))
    if inputs.ndim not in (2, 3):
        raise UsageError(f"path={path}: inputs have shape {inputs.shape}; expected [N, T, F], or [N, T].")
    if targets is not None:
        targets = _numbers(path, "targets", targets)
        # One for every sequence, or one for every step.
        if targets.ndim not in (1, 2, 3) or targets.shape[0] != len(inputs):
            raise UsageError(f"path={path}: targets of shape {targets.shape} do not fit inputs of {inputs.shape}.")
    if mask is not None:
        mask = _numbers(path, "mask", mask)
        if mask.shape not in (inputs.shape[:2], inputs.shape[:1]):
            raise UsageError(f"path={path}: the mask of shape {mask.shape} does not fit inputs of {inputs.shape}.")
        mask = mask.astype(bool)
    return _stacked(inputs, targets, mask)


def _read_csv(path: Path, file: TextIO) -> Series:
    header = file.readline()
    delimiter = max(",;\t", key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter), [])]
    if not any(names):
        raise UsageError(f"path={path} is empty; its first line should name the columns.")
    if all(_number(name) is not None for name in names):
        raise UsageError(f"path={path} begins with numbers; its first line should name the columns.")
    group = next((names.index(name) for name in SERIES_COLUMNS if name in names), None)
    columns: dict[int, dict[str, array[float]]] = {}
    text: set[int] = set()
    rows: dict[str, int] = {}
    for line, cells in _rows(path, file, delimiter, len(names)):
        series = cells[group] if group is not None else ""
        rows[series] = rows.get(series, 0) + 1
        for column, cell in enumerate(cells):
            if column == group or column in text:
                continue
            value = _number(cell)
            if value is None and not _has_number(columns.get(column)):
                text.add(column)  # words from its first value on, such as a date
                columns.pop(column, None)
                continue
            if value is None:
                raise UsageError(f"path={path}, line {line}: {names[column]}={cell!r} is not a number; leave it empty.")
            columns.setdefault(column, {}).setdefault(series, array("d")).append(value)
    if not rows:
        raise UsageError(f"path={path} has a header and no rows.")
    kept = [column for column in columns if _has_number(columns[column])]
    others = [name for column, name in enumerate(names) if column not in (*kept, group)]
    if others:
        log.info("%s: without the columns %s, which hold no numbers.", path, ", ".join(others))
    if not kept:
        raise UsageError(f"path={path} has no column of numbers; its columns are {', '.join(names)}.")
    parts = [np.stack([np.frombuffer(columns[column][series]) for column in kept], axis=1) for series in rows]
    lengths = np.array(list(rows.values()), dtype=np.int64)
    features = tuple(names[column] for column in kept)
    return Series(np.concatenate(parts), lengths, gaps=True, features=features, dropped=tuple(others))


def _rows(path: Path, file: TextIO, delimiter: str, count: int) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file after its header, with their line numbers."""
    reader = csv.reader(file, delimiter=delimiter)
    for cells in reader:
        if not any(cell.strip() for cell in cells):
            continue
        line = reader.line_num + 1  # the header was read before
        if len(cells) != count:
            raise UsageError(f"path={path}, line {line}: {len(cells)} cells, but the header names {count} columns.")
        yield line, [cell.strip() for cell in cells]


def _number(cell: str) -> float | None:
    """The value of a cell: NaN if it is missing, None if it is not a number."""
    if cell.lower() in MISSING:
        return float("nan")
    try:
        return float(cell)
    except ValueError:
        return None


def _has_number(column: dict[str, array[float]] | None) -> bool:
    return column is not None and any(not np.isnan(np.frombuffer(values)).all() for values in column.values())


def _begins_as_numpy(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(8).startswith(MAGIC)


def _one_series(array: Array) -> Array:
    """A series [T] or [T, F] as [1, T, F]; several, [N, T, F], as they are."""
    return array[None, :, None] if array.ndim == 1 else array[None] if array.ndim == 2 else array


def _stacked(inputs: Array, targets: Array | None = None, mask: npt.NDArray[np.bool_] | None = None) -> Series:
    """Series of equal lengths, [N, T] or [N, T, F]."""
    if 0 in inputs.shape:
        raise UsageError(f"The array has shape {inputs.shape}, which is empty.")
    features = inputs.shape[2] if inputs.ndim == 3 else 1
    lengths = np.full(inputs.shape[0], inputs.shape[1], dtype=np.int64)
    return Series(inputs.reshape(-1, features), lengths, targets, mask)


def _first(arrays: Any, names: str) -> Array | None:
    """The first of some arrays that is there."""
    return next((arrays[name] for name in names.split() if name in arrays.files), None)


def _numbers(path: Path, name: str, array: Array) -> Array:
    if not isinstance(array, np.ndarray):  # numpy gives a member of an archive that is no array as its bytes
        raise UsageError(f"path={path}: {name} are no array; save the archive with numpy.savez.")
    if array.dtype.kind not in "biuf":
        raise UsageError(f"path={path}: {name} are of type {array.dtype}; expected real numbers.")
    return array
