"""Rows of Parquet files, by pyarrow (extra `data`): one after the other, never a file in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reroll.errors import UsageError

AT_ONCE = 64  # rows
READ = 1 << 20  # bytes read at a time of the part of a column that is in one row group


def is_table(path: Path) -> bool:
    """Return whether a file is called a Parquet file."""
    return path.suffix.lower() == ".parquet"


def has_column(path: Path, field: str) -> bool:
    """Return whether a file has a column; `a.b` is b inside a.

    Raises:
        UsageError: if pyarrow is not installed, or the file damaged.
    """
    return not {field, field.partition(".")[0]}.isdisjoint(_open(path).schema_arrow.names)


def require_column(path: Path, field: str) -> None:
    """Raise `UsageError` if pyarrow is not installed, the file damaged, or there is no such column."""
    if not has_column(path, field):
        names = _open(path).schema_arrow.names
        shown = ", ".join(names[:8]) + ", …" * (len(names) > 8)
        raise UsageError(f"path={path} has no column {field!r}; its columns are {shown}. Give one of them as field=….")


def rows(path: Path, field: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file, of each nothing but a column.

    Raises:
        UsageError: as `require_column`, and if a row cannot be read.
    """
    require_column(path, field)
    try:
        for batch in _open(path).iter_batches(AT_ONCE, columns=[field], use_threads=False):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def library(what: str) -> Any:
    """Return the library that reads them.

    Raises:
        UsageError: that says `what` needs it, if it is not installed.
    """
    try:
        import pyarrow.parquet

        return pyarrow.parquet
    except ImportError:
        raise UsageError(f"{what} needs pyarrow: pip install 'reroll[data]'.") from None


def _open(path: Path) -> Any:
    reader = library(f"path={path}").ParquetFile
    try:
        return reader(path, buffer_size=READ, pre_buffer=False)  # else groups of rows are read whole
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UsageError:
    reason = str(error).partition("\n")[0]
    return UsageError(f"path={path} cannot be read as Parquet ({reason}). Get it again.")
