"""Classified time series in .ts files, as the UEA archive has them: EigenWorms and others.

    # a comment
    @dimensions 2                                      header lines: a word and its values
    @classLabel true worm1 worm2
    @data
    0.5,0.25,?:1.0,2.0,3.0:worm2                       dimensions by colons, steps by commas, the class last

Archives with time stamps, "(time,value)", are refused. `prepare` writes an .npz file that the task `arrays` reads.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reroll.errors import UsageError


class TimeSeries(NamedTuple):
    """What a .ts file holds.

    Args:
        inputs: [N, T, F] float32; NaN where a value is missing, and after the end of a shorter series.
        targets: the class of every series, [N] int64: its place in `labels`.
        labels: the classes' names, in the order of the header.
        lengths: steps of every series, [N].
    """

    inputs: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int64]
    labels: tuple[str, ...]
    lengths: npt.NDArray[np.int64]


def read_ts(path: str | os.PathLike[str]) -> TimeSeries:
    """Read a .ts file.

    Raises:
        UsageError: if it cannot be read or is not of that form; with the line.
    """
    path, series, classes = Path(path), [], []
    try:
        with path.open(encoding="utf-8") as file:
            header, first = _header(path, file)
            labels = tuple(header.get("classlabel", [])[1:])
            if header.get("classlabel", ["false"])[0].lower() != "true" or not labels:
                raise UsageError(f"path={path} has no classes; its header needs a line such as `@classLabel true a b`.")
            if header.get("timestamps", ["false"])[0].lower() == "true":
                raise UsageError(f"path={path} has time stamps; only series of equal steps can be read.")
            for number, line in enumerate(file, first + 1):
                if line.strip() and not line.startswith("#"):
                    values, label = _row(f"path={path}, line {number}", line.strip(), labels)
                    series.append(values)
                    classes.append(label)
    except OSError as error:
        raise UsageError(f"path={path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise UsageError(f"path={path} is not UTF-8 text.") from None
    if not series:
        raise UsageError(f"path={path} has no series after `@data`.")
    features = {values.shape[1] for values in series}
    declared = int(header["dimensions"][0]) if header.get("dimensions", [""])[0].isdigit() else None
    if len(features | ({declared} - {None})) > 1:
        raise UsageError(f"path={path}: its series have {sorted(features)} dimensions, the header says {declared}.")
    lengths = np.array([len(values) for values in series], dtype=np.int64)
    return TimeSeries(_padded(series, int(lengths.max())), np.array(classes, dtype=np.int64), labels, lengths)


def _header(path: Path, file: Any) -> tuple[dict[str, list[str]], int]:
    """The words of the header, in small letters, with their values; and how many lines it has."""
    header: dict[str, list[str]] = {}
    for number, line in enumerate(file, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if not words[0].startswith("@"):
            raise UsageError(f"path={path}, line {number}: data before `@data`; is this a .ts file?")
        if words[0].lower() == "@data":
            return header, number
        header[words[0][1:].lower()] = words[1:]
    raise UsageError(f"path={path} has no line `@data`; is this a .ts file?")


def _row(where: str, line: str, labels: tuple[str, ...]) -> tuple[npt.NDArray[np.float32], int]:
    """One series, [T, F], and the number of its class."""
    *dimensions, label = (part.strip() for part in line.split(":"))
    if not dimensions or label not in labels:
        raise UsageError(f'{where}: the class "{label[:40]}" is not one of {", ".join(labels)}.')
    try:
        columns = [
            np.array(
                [np.nan if cell.strip() == "?" else float(cell) for cell in dimension.split(",")], dtype=np.float32
            )
            for dimension in dimensions
        ]
    except ValueError as error:
        raise UsageError(f"{where}: {error}.") from None
    if len({len(column) for column in columns}) > 1:
        raise UsageError(f"{where}: its dimensions have {[len(column) for column in columns]} steps; they must agree.")
    return np.stack(columns, 1), labels.index(label)


def _padded(series: list[npt.NDArray[np.float32]], steps: int) -> npt.NDArray[np.float32]:
    inputs = np.full((len(series), steps, series[0].shape[1]), np.nan, dtype=np.float32)
    for row, values in zip(inputs, series):
        row[: len(values)] = values
    return inputs


def find_ts(path: str | os.PathLike[str]) -> list[Path]:
    """Return a .ts file, or all of a folder by name.

    Raises:
        UsageError: if there is none.
    """
    path = Path(path)
    files = sorted(path.glob("*.ts")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise UsageError(f"path={path} is no .ts file and no folder that holds some.")
    return files


def prepare(path: str | os.PathLike[str], target: Path, every: int = 1) -> tuple[int, ...]:
    """Write the series of a .ts file, or of all in a folder one after the other, as an .npz file.

    The file has `inputs` [N, T, F], `targets` [N] and `labels`; `mask` [N, T] too if something is missing.

    Args:
        path: what to read.
        target: the .npz file.
        every: keep every k-th step only.

    Returns:
        N, T, F and the number of classes.

    Raises:
        UsageError: if files disagree, or `target` cannot be written.
    """
    if every < 1:
        raise UsageError(f"every={every} must be at least 1.")
    parts = [read_ts(file) for file in find_ts(path)]
    if len({(part.labels, part.inputs.shape[2]) for part in parts}) > 1:
        raise UsageError(f"path={path}: its files have different classes or dimensions; name one of them.")
    steps = max(part.inputs.shape[1] for part in parts)
    rows = [row for part in parts for row in part.inputs]
    inputs = _padded(rows, steps)[:, ::every]
    there = np.all(np.isfinite(inputs), axis=-1, keepdims=True)
    arrays: dict[str, Any] = {
        "inputs": np.where(there, inputs, 0), "labels": np.array(parts[0].labels),
        "targets": np.concatenate([part.targets for part in parts]),
    }  # fmt: skip
    if not np.all(there):
        arrays["mask"] = there[..., 0]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}).") from None
    return (*inputs.shape, len(parts[0].labels))
