"""Lines that fit a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap

ENDLESS = 10_000
"""The width of output that is not a terminal's, where lines are not wrapped: a program may read them."""


def line_width() -> int:
    """Return the width of a line: COLUMNS if it is set, else the terminal's."""
    if not os.environ.get("COLUMNS", "").isdecimal() and not sys.stdout.isatty():
        return ENDLESS
    return shutil.get_terminal_size().columns


def wrapped(text: str) -> str:
    """Return a text with its lines wrapped at words; a command at the end of one stays whole, to be copied."""
    return "\n".join(map(_line, text.split("\n")))


def _line(text: str) -> str:
    before, colon, command = text.rpartition(": reroll ")
    if colon and len(text) > line_width():
        return f"{hanging('', before)}:\n  reroll {command}"
    return hanging("", text)


def hanging(head: str, text: str) -> str:
    """Return `head` and `text` on one line, or wrapped with what follows aligned with the beginning of the text."""
    width, indent = max(line_width(), len(head) + 16), " " * len(head)
    return textwrap.fill(
        head + text, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )  # fmt: skip
