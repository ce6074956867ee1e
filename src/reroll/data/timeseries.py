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
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from reroll.data.tables import printable
from reroll.errors import UsageError

LONGEST = 1 << 24
"""Characters of a line: a file of one endless line, or padded with zeros, is refused before it fills the memory."""


def read_ts(path: str | os.PathLike[str]) -> tuple[list[npt.NDArray[np.float32]], list[int], tuple[str, ...]]:
    """Return the series of a .ts file, [T, F] each, NaN where a value is missing; their classes; the classes' names.

    Raises:
        UsageError: if it cannot be read or is malformed; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"path={path} is no .ts file. Give one, or a folder with NAME_TRAIN.ts and NAME_TEST.ts.")
    header: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8") as file:
            lines = _lines(path, file)
            while "data" not in header and (numbered := next(lines, None)):
                where, line = numbered
                word, *values = line.split()
                if not word.startswith("@"):
                    raise UsageError(f"{where}: data before `@data`; is this a .ts file?")
                header[word[1:].lower()] = values
                if "true" in map(str.lower, header.get("timestamps", [])):
                    raise UsageError(f"path={path} has time stamps; resample to equal steps, and save without.")
            flag, *labels = header.get("classlabel") or ["false"]
            if "data" in header and (flag.lower() != "true" or not labels):
                raise UsageError(f"path={path} has no classes; its header needs a line such as `@classLabel true a b`.")
            rows = [_row(where, line, labels) for where, line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"path={path} cannot be read as text ({printable(error)}).") from None
    if not rows:
        raise UsageError(f"path={path} has no series after a line `@data`; is this a .ts file?")
    features = sorted({values.shape[1] for values, _ in rows})
    declared = next(iter(header.get("dimensions", [])), str(features[0]))
    if len(features) > 1 or declared != str(features[0]):
        raise UsageError(
            f"path={path}: its series have {features} dimensions, the header says {printable(declared)}; correct it."
        )
    return [values for values, _ in rows], [label for _, label in rows], tuple(labels)


def _lines(path: Path, file: TextIO) -> Iterator[tuple[str, str]]:
    """Yield (position, line) of the lines that are neither empty nor comments."""
    for number, text in enumerate(iter(lambda: file.readline(LONGEST), ""), 1):
        where, line = f"path={path}, line {number}", text.strip()
        if len(text) == LONGEST:
            raise UsageError(f"{where}: longer than {LONGEST:,} characters; is it a .ts file?")
        if line and not text.startswith("#"):
            yield where, line


def _row(where: str, line: str, labels: list[str]) -> tuple[npt.NDArray[np.float32], int]:
    """One series, [T, F], and the number of its class."""
    *dimensions, label = (part.strip() for part in line.split(":"))
    if not dimensions or label not in labels:
        known = printable(", ".join(labels))
        raise UsageError(f'{where}: the class "{printable(label)[:40]}" is not one of {known}.')
    try:
        columns = [np.array(dimension.replace("?", "nan").split(","), dtype=np.float32) for dimension in dimensions]
    except ValueError as error:
        raise UsageError(f"{where}: {printable(error)}.") from None
    if len({len(column) for column in columns}) > 1:
        raise UsageError(f"{where}: its dimensions have {[len(column) for column in columns]} steps; they must agree.")
    return np.stack(columns, 1), labels.index(label)


def name_of(path: str | os.PathLike[str]) -> str:
    """Return the name of the series of a .ts file, or of the two of a folder: NAME of NAME_TRAIN.ts and NAME_TEST.ts.

    Raises:
        UsageError: if the folder has other files.
    """
    files = _files(Path(path))
    name = files[-1].stem  # of two: TRAIN comes after TEST
    return re.sub(r"[ _.-]?train$", "", name, flags=re.IGNORECASE) or name if len(files) > 1 else name


def prepare(path: str | os.PathLike[str], target: Path, every: int = 1) -> dict[str, npt.NDArray[Any]]:
    """Write the series of a .ts file, or of the two of a folder, NAME_TRAIN.ts and NAME_TEST.ts, as an .npz file.

    Args:
        path: what to read.
        target: the .npz file.
        every: k, to keep only every k-th step.

    Returns:
        What the file holds: `inputs` [N, T, F], padded with NaN, `lengths`, `targets` and `labels`; of a folder also
        `held_out`, True for the series of the test file.

    Raises:
        UsageError: if there are other files or they disagree, or `target` cannot be written.
    """
    if every < 1:
        raise UsageError(f"every={every} must be at least 1.")
    path = Path(path)
    files = _files(path)
    parts = [read_ts(file) for file in files]
    if len({(labels, series[0].shape[1]) for series, _, labels in parts}) > 1:
        raise UsageError(f"path={path}: its files have different classes or dimensions; name one of them.")
    series = [values[::every] for several, *_ in parts for values in several]
    lengths = np.array([len(values) for values in series])
    inputs = np.full((len(series), lengths.max(), series[0].shape[1]), np.nan, dtype=np.float32)
    inputs[np.arange(lengths.max()) < lengths[:, None]] = np.concatenate(series)
    arrays = {
        "inputs": inputs, "lengths": lengths, "targets": np.concatenate([classes for _, classes, _ in parts]),
        "labels": np.array(parts[0][2]),
    }  # fmt: skip
    if len(files) > 1:
        arrays["held_out"] = np.repeat([_is_test(file) for file in files], [len(classes) for _, classes, _ in parts])
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            np.savez_compressed(file, **arrays)
    except OSError as error:
        raise UsageError(f"{target} cannot be written ({error.strerror}).") from None
    return arrays


def _is_test(file: Path) -> bool:
    return "test" in file.stem.lower()


def _files(path: Path) -> list[Path]:
    """The .ts file of a path, or the two of a folder: that to test on, and that to train on."""
    files = sorted(path.glob("*.ts"), key=lambda file: (not _is_test(file), file)) if path.is_dir() else [path]
    if len(files) != 1 and not (
        len(files) == 2 and sum(map(_is_test, files)) == 1 and "train" in files[1].stem.lower()
    ):
        raise UsageError(
            f"path={path} holds {len(files)} .ts files; a folder should hold one, or NAME_TRAIN.ts and NAME_TEST.ts. "
            "Name one of them."
        )
    return files
