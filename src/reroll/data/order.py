"""Which column of a table tells the time, and the rows in its order.

It is the one that is named, else the first that rises or falls throughout, of dates or of numbers with the name of a
time, else dates with such a name. Other columns order nothing, and what was left as it is is said.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reroll.data.columns import TIME, as_floats, counts, dates, differences, has_hours, is_text, trend
from reroll.errors import UsageError, did_you_mean, plural

ROWS = re.compile(r"^unnamed|^(index|no\.?|row|step)$", re.IGNORECASE)  # names of columns that count rows, not time


@dataclass(frozen=True, eq=False)
class _Clock:
    names: tuple[str, ...]
    column: Any
    values: Any
    trend: int
    sure: bool
    dated: bool


def shown(names: Collection[str]) -> str:
    """Return names of columns as a user reads them."""
    return ", ".join(re.sub(r"^Unnamed: (\d+)$", lambda m: f"the unnamed column {int(m[1]) + 1}", n) for n in names)


def column_of(path: Path, frame: Any, option: str, name: str) -> str:
    """Return the column of a name, or of a number from 1."""
    names, name = list(frame.columns), name.strip()
    if name not in names and name.isdecimal() and 0 < int(name) <= len(names):
        return names[int(name) - 1]
    if name not in names:
        raise UsageError(f"{option}={name!r} is no column of {path}.{did_you_mean(name, names[:50])}")
    return name


def in_order(
    path: Path, frame: Any, series: Any, time: str | None, chosen: Collection[str], notes: list[str]
) -> tuple[Any, Any]:
    """Return the rows and their series in the order of time, without the column that tells it."""
    named = None if time is None else column_of(path, frame, "time", time)
    clock = _inferred(frame, series, chosen, notes) if named is None else _clock(frame, named, series)
    if named is not None and clock is None:
        raise UsageError(f"time={named!r} holds neither dates nor numbers; give another column, or none.")
    if clock is None or (named is None and not clock.dated and clock.trend > 0):
        return frame, series  # numbers that count the rows are left out with all of their kind
    ends = clock.column.min(), clock.column.max()
    first, last = (str(end).removesuffix("+00:00").removesuffix(" 00:00:00") for end in ends)
    note = f"{shown(clock.names[:1])} tells the time" + f" with {shown(clock.names[1:])}" * (len(clock.names) > 1)
    note += f", from {first} to {last}"
    rest, absent = frame.drop(columns=[*clock.names]), int(np.isnan(clock.values).sum())
    counter = next((n for n in rest if rest[n].dtype.kind in "iuf" and counts(rest[n], series)), None)
    doubts = {
        f"missing in {plural(absent, 'row')}": absent > 0,
        "day and month cannot be told apart": not clock.sure,
        f"{shown([counter or ''])} counts the rows": counter is not None and named is None and clock.trend == 0,
    }
    doubt = " and ".join(reason for reason, holds in doubts.items() if holds)
    if clock.trend == 0 and doubt and named is not None:
        raise UsageError(f"path={path}: time={named!r} cannot sort the rows: {doubt}; write 2024-12-31 in every row.")
    note += f" ({doubt})" if doubt else ""
    if clock.trend < 0 or (clock.trend == 0 and not doubt):
        order = np.argsort(clock.values, kind="stable") if clock.trend == 0 else np.arange(len(frame))[::-1]
        notes.append(f"{note}, by which the rows are sorted")
        return rest.iloc[order], series[order]
    notes.append(note + ", rows stay in the order of the file" * (clock.trend == 0))
    return rest, series


def _inferred(frame: Any, series: Any, chosen: Collection[str], notes: list[str]) -> _Clock | None:
    kinds = {name: frame[name].dtype.kind for name in frame if name not in chosen}
    columns = [name for name, kind in kinds.items() if kind in "MO" or (kind in "iuf" and TIME.search(name))]
    clocks = [clock for name in columns if (clock := _clock(frame, name, series))]
    strict = [c for c in clocks if abs(c.trend) == 2 and (c.dated or len(differences(c.values, series)) > 1)]
    named = [clock for clock in clocks if clock.dated and TIME.search(clock.names[0])]
    if candidates := [*sorted(strict, key=lambda clock: bool(ROWS.search(clock.names[0]))), *named]:
        return candidates[0]
    distinct = [c for c in clocks if c.column.dtype.kind in "iu" and len(np.unique(c.values)) == len(frame)]
    unordered = [c.names[0] for c in clocks if c.dated or (c in distinct and c.trend == 0)]
    if unordered:
        notes.append(f"rows stay in the order of the file, not in that of {shown(unordered)}; time=… sorts by one")
    return None


def _clock(frame: Any, name: str, series: Any) -> _Clock | None:
    """A column as a clock, dates joined with the column of hours that they may need; None if it is of words."""
    read = dates(frame[name], series)
    if read is None:
        values = None if is_text(frame[name]) else as_floats(frame[name])
        return None if values is None else _Clock((name,), frame[name], values, trend(values, series), True, False)
    names = (name,)
    if abs(read[1]) < 2 and (hour := next((n for n in frame if n != name and has_hours(frame[n])), None)) is not None:
        cells = frame[hour].astype(str).str.strip().str.replace(r"\.(?=\d\d(\.|$))", ":", regex=True)
        joined = frame[name].astype(str).str.strip() + " " + cells
        both = dates(joined.where(frame[name].notna() & frame[hour].notna()), series)
        names, read = ((name, hour), both) if both else (names, read)
    return _Clock(names, read[0], as_floats(read[0]), *read[1:], True)
