"""Files of text as UTF-8: in which encoding one is, and its bytes."""

from __future__ import annotations

import codecs
import io
from pathlib import Path
from typing import BinaryIO

from reroll.errors import UsageError

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def open_bytes(source: Path | bytes) -> BinaryIO:
    """Open a file, or bytes as one.

    Raises:
        UsageError: if it cannot be read.
    """
    try:
        return io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    except OSError as error:
        raise UsageError(f"path={source} cannot be read ({error.strerror}); check its permissions.") from None


def open_utf8(path: Path) -> BinaryIO:
    """Open a text as UTF-8; one in UTF-16 is read whole."""
    with open_bytes(path) as file:
        wide = file.read(2) in UTF16
    return open_bytes(from_utf16(path) if wide else path)


def from_utf16(path: Path) -> bytes:
    """Return the text of a file in UTF-16 as UTF-8.

    Raises:
        UsageError: if it cannot be read, or is not UTF-16.
    """
    try:
        return path.read_bytes().decode("utf-16").encode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"path={path} cannot be read as UTF-16 ({error}). Save it as UTF-8.") from None


def is_text(path: Path) -> bool:
    """Return whether the beginning of a file is UTF-8, or UTF-16 after its mark, without NUL characters."""
    with open_bytes(path) as file:
        head = file.read(8192)
    try:
        # A character may be cut off by the end of the head, but not by the end of the file.
        wide = head.startswith(UTF16) and len(head) > 2  # a mark alone is no text
        decoder = codecs.getincrementaldecoder("utf-16" if wide else "utf-8")()
        return "\0" not in decoder.decode(head, final=len(head) < 8192)
    except UnicodeDecodeError:
        return False
