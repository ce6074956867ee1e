"""Tables as people have them, read by pandas: CSV in its dialects, compressed or not, and Parquet.

    values, features, lengths, note = read_table(Path("power.txt"), Reading(decimal=","))

What a `Reading` leaves open is inferred: separator, encoding, header, decimal mark (here), numbers, dates, what counts
the rows (`columns`), and the order of time (`order`). Whatever was left out, removed or sorted is in the note.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reroll.data.columns import (
    EXACT,
    MISSING,
    NUMBER,
    TIME,
    counts,
    date_formats,
    has_numbers,
    has_thousands,
    if_numbers,
    inexact,
    numbers,
    pandas,
)
from reroll.data.order import column_of, in_order, shown
from reroll.errors import UsageError

TEXTS, PARQUET = (".csv", ".tsv", ".txt", ".dat"), (".parquet", ".pq")
OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas", r"\s+": "spaces"}
WORDS = {"tab": "\t", r"\t": "\t", "space": r"\s+", " ": r"\s+"}
ABOVE = " Delete what is above the header, if these are no names of columns; a text is for the recipe text."
ONE = "; decimal=',' reads one column"
REMOVED = "without the marks between thousands, as in {}"
HEAD = 1 << 16  # bytes from which the form of a text is inferred; more if they hold less than two lines
LONGEST = 1 << 24  # bytes that are searched for two lines


@dataclass(frozen=True)
class Reading:
    """How to read a table; None: inferred.

    Args:
        sep: what separates cells: a character, "tab" or "space".
        decimal: the decimal mark, "." or ",".
        columns: the features, by name or by number from 1, separated by commas.
        time: the column by which the steps are sorted; it is not a feature.
        missing: further words for a missing value, besides an empty cell, ?, NA and -, separated by commas.
    """

    sep: str | None = None
    decimal: str | None = None
    columns: str | None = None
    time: str | None = None
    missing: str | None = None

    def __post_init__(self) -> None:
        if self.decimal not in (None, ".", ","):
            raise UsageError(f"decimal={self.decimal!r} is no decimal mark; give a point or a comma.")
        if self.sep is not None and self.sep not in WORDS and (len(self.sep) != 1 or self.sep in '"\r\n'):
            raise UsageError(f"sep={self.sep!r} cannot separate cells; give one character, tab or space.")


def is_table(path: Path) -> bool:
    """Return whether a path has the name of a table."""
    inner = Path(path.stem) if path.suffix.lower() in OPEN else path
    return inner.suffix.lower() in (*TEXTS, *PARQUET)


def printable(name: object) -> str:
    """Return a name as a terminal can show it.

    Example:
        >>> printable(" a\\x1b[2J ")
        'a�[2J'
    """
    return "".join(c if c.isprintable() else "�" for c in str(name).strip())[:100]


def read_table(path: Path, reading: Reading) -> tuple[Any, tuple[str, ...], Any, str]:
    """Return the numbers of a table, [M, F], its columns' names, the steps of its series, and how it was read.

    A column `series`, or an `id` that repeats, separates several series, which are concatenated.

    Raises:
        UsageError: if it has none, or lacks a column that was named.
    """
    notes: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame, decimal = _parquet(path, notes) if path.suffix.lower() in PARQUET else _text(path, reading, notes)
        names = [printable(name) for name in frame.columns]
        frame.columns = [name if names.count(name) == 1 else f"{name}.{place}" for place, name in enumerate(names)]
        if frame.empty:
            fault = "a header and no rows" if names else "nothing in it"
            raise UsageError(f"path={path} has {fault}; give a table, a row for every step.")
        chosen = [column_of(path, frame, "columns", c) for c in reading.columns.split(",")] if reading.columns else None
        several = (name for name in ("series", "id") if name in frame and frame[name].duplicated().any())
        group = next((name for name in several if name not in (chosen or ())), None)
        if group and frame[group].dtype.kind == "f" and (frame[group].abs() > EXACT).any():
            raise UsageError(f"path={path}: {group} was read as floats, which round beyond 2⁵³; save it as text.")
        series = np.zeros(len(frame), int) if group is None else pandas().factorize(frame[group])[0]
        features = frame.drop(columns=[group] if group else [])
        features, series = in_order(path, features, series, reading.time, chosen or (), notes)
        names = chosen or _features(path, features, series, decimal, notes)
        for name in names:
            _require_numbers(path, features[name], decimal)
    values = features[names].to_numpy(dtype=np.float64, na_value=np.nan)[np.argsort(series, kind="stable")]
    return values, tuple(names), np.unique(series, return_counts=True)[1], "; ".join(notes)


def _parquet(path: Path, notes: list[str]) -> tuple[Any, str]:
    def read(**options: Any) -> Any:
        frame = pandas().read_parquet(path, **options)
        return frame if isinstance(frame.index, pandas().RangeIndex) else frame.reset_index()

    try:
        frame = read()
    except ImportError:
        raise UsageError(f"path={path} needs pyarrow: pip install 'reroll[data]'; or save it as .csv.") from None
    if rounded := _maybe_rounded(frame):
        exact = read(dtype_backend="numpy_nullable")
        for name in rounded:
            frame[name] = exact[name] if exact[name].dtype.kind in "iu" else frame[name]
    notes += [REMOVED.format(cell) for cell in _take_numbers(frame, ".")[:1]]
    return frame, "."


def _maybe_rounded(frame: Any) -> list[Any]:
    """The columns of floats that may be whole numbers, which a missing value among them made floats."""
    return [name for name in frame if frame[name].dtype.kind == "f" and (frame[name].abs() >= EXACT).any()]


def _text(path: Path, reading: Reading, notes: list[str]) -> tuple[Any, str]:
    """The cells of a text, columns of numbers where all cells are numbers; and the decimal mark."""
    encoding, lines, comments = _head(path)
    excel = re.fullmatch(r"sep=(.)", lines[0]) if len(lines) > 1 else None
    lines, given = lines[bool(excel) :], reading.sep or (excel and excel[1])
    lone = not given and _is_lone_column(lines, reading)
    sep, rows = _cells(lines, ";" if lone else given and WORDS.get(given, given))
    header = _is_header(rows[0], rows[1:])
    row_names = len(rows) > 1 and all(len(row) == len(rows[0]) + 1 and row[-1] for row in rows[1:])
    missing = [*MISSING, *(word.strip() for word in (reading.missing or "").split(","))]

    def read(**options: Any) -> Any:
        return pandas().read_csv(
            path, sep=sep, header=0 if header else None, index_col=0 if row_names else False, skipinitialspace=True,
            comment="#" if comments else None, skiprows=1 if excel else None,
            na_values=[*missing, *map(str.upper, missing), "None", "Null"],
            **options,
        )  # fmt: skip

    try:
        frame = read(encoding=encoding)
    except UnicodeDecodeError:
        try:
            frame = read(encoding=(encoding := "cp1252"))
        except UnicodeDecodeError:
            frame = read(encoding=(encoding := "Latin-1"))
    decimal = reading.decimal or _decimal(frame.iloc[:10_000], sep)
    if decimal == ",":
        frame = read(encoding=encoding, decimal=",")  # which leaves 1.234, maybe 1234, as text
    if rounded := _maybe_rounded(frame):
        cells = read(encoding=encoding, dtype=str)
        for name in rounded:
            frame[name] = cells[name] if inexact(cells[name], frame[name], decimal) else frame[name]
    frame = frame.reset_index(drop=True)
    marked = _take_numbers(frame, decimal)
    if not header:
        frame.columns = [str(number) for number in range(1, len(frame.columns) + 1)]
    facts = {
        f"{SEPARATORS.get(sep, repr(sep))} between cells": sep != "," and not lone, "decimal commas": decimal == ",",
        "decimal points": decimal == "." and sep == ";", encoding: encoding != "utf-8-sig",
        "comments after #": comments,
        f"without the first cell of every row, its name{ONE * (len(rows[0]) == 1)}": row_names,
        "no header line, columns are named 1, 2, …": not header,
    }  # fmt: skip
    notes += [note for note, is_so in facts.items() if is_so] + [REMOVED.format(cell) for cell in marked[:1]]
    return frame, decimal


def _head(path: Path) -> tuple[str, list[str], bool]:
    """The encoding, the first 20 lines that are not comments, and whether there are comments."""
    with OPEN.get(path.suffix.lower(), open)(path, "rb") as file:
        head = file.read(HEAD)
        while True:
            more = file.read(len(head)) if head else b""
            encoding = _encoding(path, head)
            lines = head.decode(encoding, "replace").splitlines()[: -1 if more else None]
            content = [line for line in lines if line.strip() and not line.startswith("#")]
            if len(content) > 1 or not more or len(head) > LONGEST:
                break
            head += more
    if not content:
        fault = f"has no whole line in its first {len(head) >> 20} MB" if more else "is empty"
        raise UsageError(f"path={path} {fault}; give a table, a row for every step.")
    return encoding, content[:20], any(line.startswith("#") for line in lines)


def _encoding(path: Path, head: bytes) -> str:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "UTF-16"
    if head.count(0) * 4 > len(head):
        return "UTF-16-LE" if head[1::2].count(0) > head[::2].count(0) else "UTF-16-BE"
    if b"\0" in head:
        raise UsageError(f"path={path} is no text (it holds NUL bytes), whatever its name says.")
    return "utf-8-sig"


def _cells(lines: list[str], sep: str | None) -> tuple[str, list[list[str]]]:
    """The separator and the cells of lines: the first by which all have as many, else the first to cut them."""
    several = {}
    for candidate in [sep] if sep else SEPARATORS:
        spaces = candidate == r"\s+"
        rows = [x.split() for x in lines] if spaces else csv.reader(lines, delimiter=candidate, skipinitialspace=True)
        try:
            rows = [[cell.strip() for cell in row] for row in rows]
        except csv.Error:  # a cell beyond csv's limit: another separator cuts the line
            continue
        counts = {len(row) for row in rows[1:]} or {len(rows[0])}
        if max(counts) > 1 and len(counts) == 1 and len(rows[0]) in (max(counts), max(counts) - 1):
            return candidate, rows
        if max(counts) > 1 and not spaces:
            several.setdefault(candidate, rows)
    return next(iter(several.items()), (sep or ",", [[line] for line in lines]))


def _is_lone_column(lines: list[str], reading: Reading) -> bool:
    """Whether these are a name and decimal commas, such as 2.345,67: one column, not row names with numbers."""
    name, *cells = lines
    if reading.decimal == "." or not cells or NUMBER.fullmatch(name) or re.search(r"[,;|\t]", name):
        return False
    if not all(re.fullmatch(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?", cell.strip()) for cell in cells):
        return False
    whole = [cell.strip().partition(",")[0] for cell in cells]
    counts_rows = [str(int(whole[0]) + n) for n in range(len(whole))] == whole if whole[0].isdigit() else False
    return any("," in cell for cell in cells) and (reading.decimal == "," or not counts_rows)


def _is_header(first: list[str], rest: list[list[str]]) -> bool:
    """Whether the first line names columns: it has a word above numbers, or no number at all."""

    def kind(cell: str) -> int:
        return 2 if NUMBER.fullmatch(cell) else int(bool(date_formats(cell)))

    for column, cell in enumerate(first):
        below = [row[column] for row in rest if len(row) > column and row[column].lower() not in MISSING]
        if below and kind(cell) < min(map(kind, below)):
            return cell == "" or cell.lower() not in MISSING
    return not any(map(kind, first))


def _take_numbers(frame: Any, decimal: str) -> list[str]:
    """Convert columns of text whose cells are all numbers; return some cells that had marks between thousands."""
    marked = []
    for name in frame:
        if (values := if_numbers(frame[name], decimal)) is not None:
            marked += map(printable, frame[name][has_thousands(frame[name], decimal)].head(1))
            frame[name] = values
    return marked


def _decimal(frame: Any, sep: str) -> str:
    """The decimal mark by which more columns of text are numbers; a comma if both do and none separates cells."""
    points, commas = (sum(if_numbers(frame[name], mark) is not None for name in frame) for mark in ".,")
    return "," if commas > points or (commas == points > 0 and sep != ",") else "."


def _features(path: Path, frame: Any, series: Any, decimal: str, notes: list[str]) -> list[str]:
    """The columns of numbers, except those that only count the rows."""
    numeric = [name for name in frame if has_numbers(frame[name], decimal)]
    if not numeric:
        raise UsageError(f"path={path} has no column of numbers; its columns are {', '.join(frame)[:200]}.{ABOVE}")
    counting = [name for name in numeric if counts(frame[name], series)]
    # If all of them count, only one with the name of a time is left out.
    names = [name for name in numeric if name not in counting]
    names = names or [name for name in numeric if not TIME.search(name)] or numeric
    words = [name for name in frame if name not in numeric and not name.startswith("Unnamed")]
    words = [f"{shown([name])}{_example(frame[name])}" for name in words]
    left = {"no numbers": words, "only counts the rows": [name for name in numeric if name not in names]}
    notes += [f"without {shown(columns)} ({reason})" for reason, columns in left.items() if columns]
    return names


def _example(column: Any) -> str:
    cells = column.dropna()
    return f": {printable(cells.iloc[0])[:20]!r}" if len(cells) else ""


def _require_numbers(path: Path, column: Any, decimal: str) -> None:
    """Refuse a column with a word among its numbers, what is infinite, or whole numbers that would be rounded."""
    values, known = numbers(column, decimal)
    endless = values.isin([np.inf, -np.inf])
    wrong = column[(known & values.isna()) | endless]
    if len(wrong):
        fault = "infinite" if endless[wrong.index[0]] else "no number"
        cell, first = printable(wrong.iloc[0]), len(wrong) == 1 and wrong.index[0] == 0
        units = " If the line holds units, or is above the header, delete it." * first
        raise UsageError(
            f"path={path}, row {wrong.index[0] + 1}: {column.name}={cell!r} is {fault}; leave it empty, give "
            f"missing={cell!r}, or name the columns to read.{units}"
        )
    if cells := inexact(column, values, decimal):
        raise UsageError(
            f"path={path}: {column.name}={printable(cells[0])} is beyond 2⁵³, where floats round whole numbers; name "
            "the columns to read without it, or subtract a constant from it."
        )
