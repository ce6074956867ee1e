"""Columns of a table: which cells are numbers, which are dates, and which columns count the rows."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

MISSING = ("", "?", "-", "--", ".", "na", "n/a", "#n/a", "nan", "-nan", "null", "none", "nil", "missing", "<na>")
TIME = re.compile(
    r"^(?!.*(left|remain|until|[ _]to[ _]))"  # what counts down to an event
    r"(.*(date|time|epoch|unix|stamp|unnamed)|((?-i:t|ts)|index|no\.?|row|step|year|month|week|day|hour|when)$)",
    re.IGNORECASE,
)
TIME_OF_DAY = r"\d{1,2}([:.]\d{2}){1,2}([.,]\d+)?( ?[AaPp][Mm])?"
MARKS = "' \u00a0\u202f"  # between thousands, besides the mark that is not the decimal one
NUMBER = re.compile(rf"[+\-\u2212]?[\d.,{MARKS}]*\d[\d.,{MARKS}]*(e[+-]?\d+)?", re.IGNORECASE)
EXACT = 1 << 53  # whole numbers up to this are exact as floats; beyond, neighbours become one value


def pandas() -> Any:
    """Return pandas, which takes a second to import, so only when there is a table."""
    import pandas

    return pandas


def is_text(column: Any) -> bool:
    """Return whether a column holds cells as they were written."""
    return column.dtype.kind == "O"


def _cells(column: Any) -> Any:
    return column.astype(str).str.strip().str.replace("\u2212", "-", regex=False)


def has_thousands(column: Any, decimal: str) -> Any:
    """Return which cells have marks between thousands, all in their places: 1,234.5 but not 1,5."""
    mark = "." if decimal == "," else ","
    return _cells(column).str.fullmatch(rf"[+-]?\d{{1,3}}(?:[{mark}{MARKS}]\d{{3}})+(?:[{decimal}]\d*)?")


def numbers(column: Any, decimal: str) -> tuple[Any, Any]:
    """Return the numbers of a column, NaN where a cell is none; and which cells are not missing."""
    if not is_text(column):
        return column, column.notna()
    cells = _cells(column)
    known = column.notna() & ~cells.str.lower().isin(MISSING)
    mark = "." if decimal == "," else ","
    cells = cells.mask(has_thousands(column, decimal), cells.str.replace(rf"[{mark}{MARKS}]", "", regex=True))
    cells = cells.str.replace(",", ".", regex=False) if decimal == "," else cells
    return pandas().to_numeric(cells.where(known), errors="coerce").astype(float), known


def inexact(column: Any, values: Any, decimal: str) -> list[str]:
    """Return the cells of a column that are whole numbers which floats round."""
    large = [] if column.dtype.kind == "f" else column[values.astype(float).abs() >= EXACT].astype(str)
    whole = re.compile(rf"\s*[+-]?\d[\d.,{MARKS}]*")
    whole_cells = [cell for cell in large if whole.fullmatch(cell) and decimal not in cell]
    return [cell for cell in whole_cells if int(re.sub(r"\D", "", cell)) > EXACT]


def if_numbers(column: Any, decimal: str) -> Any | None:
    """Return the numbers of a column of text whose cells are all numbers, else None."""
    values, known = numbers(column, decimal)
    are_numbers = is_text(column) and known.any() and values[known].notna().all()
    return values if are_numbers and not inexact(column, values, decimal) else None


def has_numbers(column: Any, decimal: str) -> bool:
    """Return whether a column is at least half numbers: a word is then a mistake."""
    values, known = numbers(column, decimal)
    return column.dtype.kind in "biufO" and bool(known.any()) and bool(values[known].notna().mean() >= 0.5)


def date_formats(cell: str) -> list[str]:
    """Return the ways to read a cell as a date; its month or its day may come first.

    Example:
        >>> date_formats("05.02.24"), date_formats("Jan 2024"), date_formats("Jan 3, 2024 2:00 PM")
        (['%m.%d.%y', '%d.%m.%y'], ['%b %Y'], ['%b %d, %Y %I:%M %p'])
    """
    if len(cell) > 40 or not re.search(r"\d\D+\d|[a-z]\W\d{4}$", cell, re.IGNORECASE):
        return []
    # What pandas does not guess is made what it does: a year of two digits, a month without a day, halves of a day.
    whole, half = re.subn(r"\s[AP]M$", "", cell, flags=re.IGNORECASE)
    whole, short = re.subn(r"^(\d\d?([./-])(?:\d\d?|[A-Za-z]{3})\2)(\d\d)(?!\d)", r"\g<1>20\3", whole)
    whole, month = re.subn(r"^([A-Za-z]{3,9})(\W)(\d{4})$", r"1\2\1\2\3", whole)
    formats = [pandas().tseries.api.guess_datetime_format(whole, dayfirst=first) for first in (False, True)]
    formats = [form for form in dict.fromkeys(formats) if form and "%d" in form and not form.startswith("%Y-%d")]
    formats = [form[3:] if month else form.replace("%Y", "%y") if short else form for form in formats]
    return [form.replace("%H", "%I") + " %p" if half else form for form in formats]


def dates(column: Any, series: Any) -> tuple[Any, int, bool] | None:
    """Return a column as dates, their `trend`, and whether day and month could be told apart; None if it has none.

    The format is the one that reads most cells, or else the one whose dates are in order.
    """
    if column.dtype.kind == "M" or not (is_text(column) and column.notna().any()):
        return (column, trend(as_floats(column), series), True) if column.dtype.kind == "M" else None
    cells = column.astype(str).str.strip()
    formats = date_formats(cells[column.notna()].iloc[0])
    read = [pandas().to_datetime(cells, format=form, errors="coerce", utc=True) for form in formats]
    most = max((int(times.notna().sum()) for times in read), default=0)
    if most < max(0.9 * column.notna().sum(), 1):
        return None
    read = [times for times in read if times.notna().sum() == most]
    trends = [trend(as_floats(times), series) for times in read]
    best = max(range(len(read)), key=lambda place: (trends[place] != 0, trends[place]))
    sure = all(times.equals(read[0]) for times in read) or sum(map(bool, trends)) == 1
    return read[best], trends[best] if sure or len(set(np.sign(trends))) == 1 else 0, sure


def has_hours(column: Any) -> bool:
    """Return whether all cells of a column are times of day, such as 17:24 or 5:24 PM."""
    known = column.dropna().astype(str).str.strip() if is_text(column) else ()
    return len(known) > 0 and bool(known.str.fullmatch(TIME_OF_DAY).all())


def as_floats(column: Any) -> Any:
    """Return numbers or dates as floats that keep their differences, NaN where one is missing."""
    if column.dtype.kind == "M":
        return (column - column.min()).dt.total_seconds().to_numpy()
    if column.dtype.kind in "iu" and column.notna().all() and inexact(column, column, "."):
        column = column.astype(object) - int(column.iloc[0])
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def differences(values: Any, series: Any) -> Any:
    """Return the differences between the values of a series that follow each other, without missing ones."""
    order = np.argsort(series, kind="stable")
    order = order[~np.isnan(values[order])]
    return np.diff(values[order])[np.diff(series[order]) == 0]


def trend(values: Any, series: Any) -> int:
    """Return 2 if values rise throughout every series, 1 if they never fall, -2 and -1 for the opposite, else 0."""
    steps = differences(values, series)
    for sign in (1, -1):
        if (sign * steps >= 0).all():
            return 2 * sign if (steps != 0).all() else sign
    return 0


def counts(column: Any, series: Any) -> bool:
    """Return whether a column changes by a constant step, or has the name of a time and always grows."""
    if is_text(column):
        return False
    values = as_floats(column)
    if column.name == "Unnamed: 0":
        return len(np.unique(values)) == len(values)
    steps = differences(values, series)
    if len(steps) < 2 or not np.isfinite(values).all() or not steps[0]:
        return False
    rounding = 4e-16 * np.abs(values).max() + 1e-6 * abs(steps[0])
    return bool((abs(steps - steps[0]) <= rounding).all() or (TIME.search(column.name) and (steps > 0).all()))
