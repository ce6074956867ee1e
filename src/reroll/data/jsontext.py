"""Documents in JSON: an object a line, or the objects of an array."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from reroll.errors import UsageError

FIELD = "text"


def is_array(file: BinaryIO) -> bool:
    """Return whether a file in UTF-8 begins as an array of objects."""
    with file:
        return bool(re.match(rb"\s*\[\s*\{", file.read(8192).removeprefix(codecs.BOM_UTF8)))


def lines(file: BinaryIO, path: Path) -> Iterator[Any]:
    """Yield the value of every line, None for an empty one.

    Raises:
        UsageError: for a line that is not JSON.
    """
    with file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line) if line.strip() else None
            except (ValueError, RecursionError) as error:  # of JSON, or of UTF-8
                reason = f"is not JSON ({error}); correct or delete the line."
                raise UsageError(f"path={path}, line {number}, {reason}") from None


def objects(content: bytes, path: Path, field: str, *, alone: bool) -> list[Any] | None:
    """Return the objects of an array; None if the file is one text.

    Of several files that is one that is not JSON, or has an object without text: sources have many such. A file `alone`
    is one text if no object has the field, and none is where another field than the usual one is asked for.

    Raises:
        UsageError: if the file is not JSON, and is alone or asked for a field.
    """
    named = field != FIELD
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        if not (alone or named):
            return None
        raise UsageError(f"path={path} is not JSON ({error}); correct it, or call it .txt.") from None
    if alone:
        several = any(isinstance(entry, dict) and field in entry for entry in entries)
    else:
        several = all(text_of(entry, field) is not None for entry in entries)
    return entries if named or several else None


def text_of(entry: Any, field: str) -> str | None:
    """Return the text of a field, `a.b` inside a; empty if it is null, None if there is no text."""
    if entry is None:
        return ""
    first, dot, rest = field.partition(".")
    if isinstance(entry, dict) and field not in entry and dot:
        return text_of(entry.get(first, 0), rest)
    value = entry.get(field, 0) if isinstance(entry, dict) else 0
    return value if isinstance(value, str) else "" if value is None else None
