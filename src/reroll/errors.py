"""What goes wrong, in words by which the reader can act: the argument, the value it had, the remedy.

`UsageError` (exit code 2) is also a `ValueError` and `RunError` (exit code 1) a `RuntimeError`, so callers need not
know this module.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable
from numbers import Integral, Real


class RerollError(Exception):
    """Base class: a message meant for a person, and the exit code the command line ends with."""

    exit_code = 1


class UsageError(RerollError, ValueError):
    """The request cannot be carried out as written; nothing was started."""

    exit_code = 2


class EpsilonTooSmall(UsageError):
    """ε is below what the precision of the weights can show, of which `least` is the smallest."""

    def __init__(self, message: str, least: float = 0.0):
        super().__init__(message)
        self.least = least


class RunError(RerollError, RuntimeError):
    """A well-formed request failed while it ran; what was saved before is intact."""

    exit_code = 1


def warn(message: str) -> None:
    """Warn at the user's line: that of the innermost call made outside this package and torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("reroll", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def visible(text: str) -> str:
    r"""Return a text with a symbol for every control character but newline and tab: a terminal would obey them.

    Example:
        >>> visible("a\x1b[2J\r\n\x7f\x9b")
        'a␛[2J␍\n␡�'
    """
    symbols = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "␡"}
    return text.translate(symbols | dict.fromkeys(range(0x80, 0xA0), "�"))


def plural(count: int, noun: str) -> str:
    """Return a count with its noun.

    Example:
        >>> plural(1, "step"), plural(2000, "step")
        ('1 step', '2,000 steps')
    """
    return f"{count:,} {noun}{'s' * (count != 1)}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean "x"?` for the closest known word, or the list of all of them when none is close.

    Example:
        >>> did_you_mean("lsmt", ["lstm", "gru"])
        ' Did you mean "lstm"?'
        >>> did_you_mean("zzz", ["lstm", "gru"])
        ' Known: gru, lstm.'
    """
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f' Did you mean "{close[0]}"?' if close else f" Known: {', '.join(known)}."


def require_positive(**arguments: float | None) -> None:
    """Raise `UsageError` naming the first argument that is not a finite number above zero (`None` is let through).

    Example:
        >>> require_positive(probes=0)
        Traceback (most recent call last):
        reroll.errors.UsageError: probes=0 must be greater than zero.
    """
    for name, value in arguments.items():
        if value is None:
            continue
        if not isinstance(value, Real):
            raise UsageError(f"{name}={value!r} must be a number.")
        if not 0 < value < float("inf"):
            raise UsageError(f"{name}={value} must be {'finite' if value == float('inf') else 'greater than zero'}.")


def require_count(**arguments: int | None) -> None:
    """Raise `UsageError` naming the first argument that is not a whole number above zero (`None` is let through).

    Example:
        >>> require_count(window=2.5)
        Traceback (most recent call last):
        reroll.errors.UsageError: window=2.5 must be a whole number, 1 or more.
    """
    for name, value in arguments.items():
        if value is not None and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            raise UsageError(f"{name}={value!r} must be a whole number, 1 or more.")
