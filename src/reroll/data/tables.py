"""Tables as people have them, read by pandas: CSV in its dialects, compressed or not, and Parquet.

    values, features, lengths, note = read_table(Path("power.txt"), Reading(decimal=","))

What a `Reading` leaves open is inferred: separator, encoding, header, decimal mark. Columns that only count the rows
(dates, an index, an epoch of constant step) are not features, and rows are sorted by their dates.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import lzma
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reroll.errors import UsageError, did_you_mean

TEXTS, PARQUET = (".csv", ".tsv", ".txt", ".dat"), (".parquet", ".pq")
OPEN: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas", r"\s+": "spaces"}
WORDS = {"tab": "\t", r"\t": "\t", "space": r"\s+", " ": r"\s+"}
MISSING = ("", "?", "-", "--", ".", "na", "n/a", "#n/a", "nan", "-nan", "null", "none", "nil", "missing", "<na>")
TIME = re.compile(r"date|time|epoch|unix|stamp|unnamed|^(t|ts|index|no\.?|row|step)$", re.IGNORECASE)
NUMBER = re.compile(r"[+-]?[\d.,' ]*\d[\d.,' ]*(e[+-]?\d+)?", re.IGNORECASE)
HEAD = 1 << 16  # bytes from which the form of a text is inferred; more if they hold less than two lines
LONGEST = 1 << 24  # bytes that are searched for two lines
EXACT = 1 << 53  # whole numbers up to this are exact as floats; beyond, neighbours become one value


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
        frame, decimal = _parquet(path) if path.suffix.lower() in PARQUET else _text(path, reading, notes)
        names = [printable(name) for name in frame.columns]
        frame.columns = [name if names.count(name) == 1 else f"{name}.{place}" for place, name in enumerate(names)]
        if frame.empty:
            fault = "a header and no rows" if names else "nothing in it"
            raise UsageError(f"path={path} has {fault}; give a table, a row for every step.")
        chosen = [_column(path, frame, "columns", c) for c in reading.columns.split(",")] if reading.columns else None
        several = (name for name in ("series", "id") if name in frame and frame[name].duplicated().any())
        group = next((name for name in several if name not in (chosen or ())), None)
        if group and frame[group].dtype.kind == "f" and (frame[group].abs() > EXACT).any():
            raise UsageError(f"path={path}: {group} was read as floats, which round beyond 2⁵³; save it as text.")
        series = np.zeros(len(frame), int) if group is None else _pandas().factorize(frame[group])[0]
        features = frame.drop(columns=[group] if group else [])
        features, series = _in_order(path, features, series, reading, chosen or (), notes)
        names = chosen or _features(path, features, series, decimal, notes)
        for name in names:
            _require_numbers(path, features[name], decimal)
    values = features[names].to_numpy(dtype=np.float64, na_value=np.nan)[np.argsort(series, kind="stable")]
    return values, tuple(names), np.unique(series, return_counts=True)[1], "; ".join(notes)


def _pandas() -> Any:
    import pandas  # takes a second, so only when there is a table

    return pandas


def _parquet(path: Path) -> tuple[Any, str]:
    def read(**options: Any) -> Any:
        frame = _pandas().read_parquet(path, **options)
        return frame if isinstance(frame.index, _pandas().RangeIndex) else frame.reset_index()

    try:
        frame = read()
    except ImportError:
        raise UsageError(f"path={path} needs pyarrow: pip install 'reroll[data]'; or save it as .csv.") from None
    if rounded := _maybe_rounded(frame):
        exact = read(dtype_backend="numpy_nullable")
        for name in rounded:
            frame[name] = exact[name] if exact[name].dtype.kind in "iu" else frame[name]
    return _take_numbers(frame, "."), "."


def _maybe_rounded(frame: Any) -> list[Any]:
    """The columns of floats that may be whole numbers, which a missing value among them made floats."""
    return [name for name in frame if frame[name].dtype.kind == "f" and (frame[name].abs() >= EXACT).any()]


def _text(path: Path, reading: Reading, notes: list[str]) -> tuple[Any, str]:
    """The cells of a text, columns of numbers where all cells are numbers; and the decimal mark."""
    encoding, lines, comments = _head(path)
    lone = _is_lone_column(lines, reading)
    sep, rows = _cells(lines, ";" if lone else reading.sep and WORDS.get(reading.sep, reading.sep))
    header = _is_header(rows[0], rows[1:])
    row_names = len(rows) > 1 and all(len(row) == len(rows[0]) + 1 and row[-1] for row in rows[1:])
    missing = [*MISSING, *(word.strip() for word in (reading.missing or "").split(","))]

    def read(**options: Any) -> Any:
        return _pandas().read_csv(
            path, sep=sep, header=0 if header else None, index_col=0 if row_names else False, skipinitialspace=True,
            comment="#" if comments else None, na_values=[*missing, *map(str.upper, missing), "None", "Null"],
            **options,
        )  # fmt: skip

    try:
        frame = read(encoding=encoding)
    except UnicodeDecodeError:
        frame = read(encoding=(encoding := "Latin-1"))
    decimal = reading.decimal or _decimal(frame.iloc[:10_000], sep)
    if decimal == ",":
        frame = read(encoding=encoding, decimal=",")  # which leaves 1.234, maybe 1234, as text
    if rounded := _maybe_rounded(frame):
        cells = read(encoding=encoding, dtype=str)
        for name in rounded:
            frame[name] = cells[name] if _inexact(cells[name], frame[name], decimal) else frame[name]
    frame = _take_numbers(frame.reset_index(drop=True), decimal)
    if not header:
        frame.columns = [str(number) for number in range(1, len(frame.columns) + 1)]
    facts = {
        f"{SEPARATORS.get(sep, repr(sep))} between cells": sep != "," and not lone, "decimal commas": decimal == ",",
        "decimal points": decimal == "." and sep == ";", encoding: encoding != "utf-8-sig",
        "comments after #": comments,
        "no header line, columns are named 1, 2, …": not header,
    }  # fmt: skip
    notes += [note for note, is_so in facts.items() if is_so]
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
    if reading.sep or reading.decimal == "." or not cells or NUMBER.fullmatch(name) or re.search(r"[,;|\t]", name):
        return False
    if not all(re.fullmatch(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?", cell.strip()) for cell in cells):
        return False
    whole = [cell.strip().partition(",")[0] for cell in cells]
    counts_rows = [str(int(whole[0]) + n) for n in range(len(whole))] == whole if whole[0].isdigit() else False
    return any("," in cell for cell in cells) and (reading.decimal == "," or not counts_rows)


def _is_header(first: list[str], rest: list[list[str]]) -> bool:
    """Whether the first line names columns: it has a word above numbers, or no number at all."""

    def is_value(cell: str) -> bool:
        return bool(NUMBER.fullmatch(cell)) or bool(_date_formats(cell))

    for column, cell in enumerate(first):
        below = [row[column] for row in rest if len(row) > column and row[column].lower() not in MISSING]
        if below and not is_value(cell) and all(map(is_value, below)):
            return cell == "" or cell.lower() not in MISSING
    return not any(map(is_value, first))


def _is_text(column: Any) -> bool:
    return column.dtype.kind == "O"


def _numbers(column: Any, decimal: str) -> tuple[Any, Any]:
    """The numbers of a column, NaN where a cell is none; and which cells are not missing.

    Thousands separators are removed where they are in their places: in 1,234.5 but not in 1,5.
    """
    if not _is_text(column):
        return column, column.notna()
    cells = column.astype(str).str.strip()
    known = column.notna() & ~cells.str.lower().isin(MISSING)
    mark = "." if decimal == "," else ","
    grouped = cells.str.fullmatch(rf"[+-]?\d{{1,3}}(?:[{mark}' \u00a0]\d{{3}})+(?:[{decimal}]\d*)?")
    cells = cells.mask(grouped, cells.str.replace(rf"[{mark}' \u00a0]", "", regex=True))
    cells = cells.str.replace(",", ".", regex=False) if decimal == "," else cells
    return _pandas().to_numeric(cells.where(known), errors="coerce").astype(float), known


def _inexact(column: Any, numbers: Any, decimal: str) -> list[str]:
    """The cells of a column that are whole numbers which floats round."""
    large = [] if column.dtype.kind == "f" else column[numbers.astype(float).abs() >= EXACT].astype(str)
    whole = re.compile(r"\s*[+-]?\d[\d.,' \u00a0]*")
    whole_cells = [cell for cell in large if whole.fullmatch(cell) and decimal not in cell]
    return [cell for cell in whole_cells if int(re.sub(r"\D", "", cell)) > EXACT]


def _if_numbers(column: Any, decimal: str) -> Any | None:
    """The numbers of a column of text whose cells are all numbers, else None."""
    numbers, known = _numbers(column, decimal)
    are_numbers = _is_text(column) and known.any() and numbers[known].notna().all()
    return numbers if are_numbers and not _inexact(column, numbers, decimal) else None


def _take_numbers(frame: Any, decimal: str) -> Any:
    """Convert columns of text whose cells are all numbers."""
    for name in frame:
        if (numbers := _if_numbers(frame[name], decimal)) is not None:
            frame[name] = numbers
    return frame


def _decimal(frame: Any, sep: str) -> str:
    """The decimal mark by which more columns of text are numbers; a comma if both do and none separates cells."""
    points, commas = (sum(_if_numbers(frame[name], mark) is not None for name in frame) for mark in ".,")
    return "," if commas > points or (commas == points > 0 and sep != ",") else "."


def _date_formats(cell: str) -> list[str]:
    """The ways to read a cell as a date; its month or its day may come first."""
    if len(cell) > 40 or not re.search(r"\d\D+\d", cell):
        return []
    formats = [_pandas().tseries.api.guess_datetime_format(cell, dayfirst=first) for first in (False, True)]
    return [form for form in dict.fromkeys(formats) if form and "%d" in form]


def _dates(column: Any) -> Any | None:
    """A column as dates, None if it has none: in the format that reads most cells, or gives sorted dates."""
    if column.dtype.kind == "M" or not (_is_text(column) and column.notna().any()):
        return column if column.dtype.kind == "M" else None
    cells = column.astype(str).str.strip()
    read = [
        _pandas().to_datetime(cells, format=form, errors="coerce", utc=True)
        for form in _date_formats(cells[column.notna()].iloc[0])
    ]
    best = max(read, key=lambda dates: (dates.notna().sum(), dates.is_monotonic_increasing), default=None)
    return best if best is not None and best.notna().sum() >= 0.9 * column.notna().sum() else None


def _column(path: Path, frame: Any, option: str, name: str) -> str:
    """The column of a name, or of a number from 1."""
    names, name = list(frame.columns), name.strip()
    if name not in names and name.isdecimal() and 0 < int(name) <= len(names):
        return names[int(name) - 1]
    if name not in names:
        raise UsageError(f"{option}={name!r} is no column of {path}.{did_you_mean(name, names[:50])}")
    return name


def _in_order(
    path: Path, frame: Any, series: Any, reading: Reading, chosen: Collection[str], notes: list[str]
) -> tuple[Any, Any]:
    """The rows and their series sorted by date, without the columns of dates."""
    sort_by = None if reading.time is None else _column(path, frame, "time", reading.time)
    dates = {name: _dates(frame[name]) for name in ([sort_by] if sort_by else frame) if name not in chosen or sort_by}
    times = {name: frame[name] if time is None else time for name, time in dates.items() if sort_by or time is not None}
    if not times:
        return frame, series
    name, time = next(iter(times.items()))
    if _is_text(time):
        raise UsageError(f"time={name!r} holds neither dates nor numbers; give another column, or none.")
    first, last = (str(t).removesuffix("+00:00").removesuffix(" 00:00:00") for t in (time.min(), time.max()))
    notes.append(f"{_shown(times)} tells the time, from {first} to {last}")
    frame = frame.drop(columns=[*times])
    if time.isna().any() or all(part.is_monotonic_increasing for _, part in time.groupby(series)):
        return frame, series
    notes[-1] += ", by which the rows are sorted"
    order = np.argsort(time.to_numpy(), kind="stable")
    return frame.iloc[order], series[order]


def _features(path: Path, frame: Any, series: Any, decimal: str, notes: list[str]) -> list[str]:
    """The columns of numbers, except those that only count the rows."""
    numbers = [name for name in frame if _has_numbers(frame[name], decimal)]
    if not numbers:
        raise UsageError(f"path={path} has no column of numbers; its columns are {', '.join(frame)[:500]}.")
    counting = [name for name in numbers if _counts(frame[name], series)]
    # If all of them count, only one with the name of a time is left out.
    names = [name for name in numbers if name not in counting]
    names = names or [name for name in numbers if not TIME.search(name)] or numbers
    words = [name for name in frame if name not in numbers and not name.startswith("Unnamed")]
    left = {"no numbers": words, "only counts the rows": [name for name in numbers if name not in names]}
    notes += [f"without {_shown(columns)} ({reason})" for reason, columns in left.items() if columns]
    return names


def _shown(names: Collection[str]) -> str:
    """Names of columns, as a user reads them."""
    return ", ".join(re.sub(r"^Unnamed: (\d+)$", lambda m: f"the unnamed column {int(m[1]) + 1}", n) for n in names)


def _has_numbers(column: Any, decimal: str) -> bool:
    """Whether a column starts with a number: a later word is then a mistake."""
    numbers, known = _numbers(column, decimal)
    return column.dtype.kind in "biufO" and bool(known.any()) and bool(numbers[known].notna().iloc[0])


def _counts(column: Any, series: Any) -> bool:
    """Whether a column grows by a constant step, or has the name of a time and always grows."""
    if _is_text(column):
        return False
    if column.dtype.kind in "iu" and column.notna().all() and _inexact(column, column, "."):
        column = column.astype(object) - int(column.iloc[0])
    values = column.astype(float).to_numpy()
    if column.name == "Unnamed: 0":
        return len(np.unique(values)) == len(values)
    order = np.argsort(series, kind="stable")
    steps = np.diff(values[order])[np.diff(series[order]) == 0]
    if len(steps) < 2 or not np.isfinite(steps).all() or not steps[0]:
        return False
    rounding = 4e-16 * np.abs(values).max() + 1e-6 * abs(steps[0])
    return bool((abs(steps - steps[0]) <= rounding).all() or (TIME.search(column.name) and (steps > 0).all()))


def _require_numbers(path: Path, column: Any, decimal: str) -> None:
    """Refuse a column with a word among its numbers, or with whole numbers that would be rounded."""
    numbers, known = _numbers(column, decimal)
    wrong = column[known & numbers.isna()]
    if len(wrong):
        cell = printable(wrong.iloc[0])
        raise UsageError(
            f"path={path}, row {wrong.index[0] + 1}: {column.name}={cell!r} is no number; leave it empty, give "
            f"missing={cell!r}, or name the columns to read."
        )
    if cells := _inexact(column, numbers, decimal):
        raise UsageError(
            f"path={path}: {column.name}={printable(cells[0])} is beyond 2⁵³, where floats round whole numbers; name "
            "the columns to read without it, or subtract a constant from it."
        )
