"""Flags: from dataclasses to a command line by tyro, with every mistake in one line.

tyro writes its errors as boxes of several lines; here they are caught and told as one: what was wrong, and the nearest
flag or the flag's own help. All use of tyro is in this file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args, get_origin

from reroll.errors import UsageError, nearest
from reroll.specs.base import OBJECT, hints, leaves
from reroll.train.config import Config
from reroll.train.toml import parse_value, put

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], prog: str, description: str, default: T | None = None) -> T:
    """Return a dataclass filled from arguments.

    Args:
        kind: a dataclass; its fields are the flags.
        arguments: the command line after the command.
        prog: how the command is called.
        description: what `--help` says first.
        default: where values that are not given come from.

    Raises:
        UsageError: one line, for anything wrong.
        SystemExit: with 0, after `--help`.
    """
    import tyro

    refuse_unusable(arguments)
    wide = {} if {"-h", "--help"} & set(arguments) else {"COLUMNS": "1000"}
    before = {name: os.environ.get(name) for name in wide}
    os.environ.update(wide)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options: dict[str, Any] = {} if default is None else {"default": default}
            return tyro.cli(
                tyro.conf.OmitArgPrefixes[kind],  # pyright: ignore[reportInvalidTypeForm]: tyro takes types made at run time
                args=list(arguments), prog=prog, description=description, **options,
            )  # fmt: skip
    except SystemExit as end:
        if end.code in (0, None):
            raise
        known = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(kind)]  # pyright: ignore[reportArgumentType]: T is a dataclass
        raise UsageError(f"{prog}: {one_line(errors.getvalue(), known)}") from None
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def refuse_unusable(arguments: Sequence[str]) -> None:
    """Raise `UsageError` for an argument that no file can be named: it holds a NUL, or half a character."""
    for argument in arguments:
        try:
            if b"\0" not in os.fsencode(argument):
                continue
        except UnicodeEncodeError:
            pass
        raise UsageError(f"the argument {argument!r} holds a character that no file's name can have; leave it out.")


def one_line(box: str, known: Sequence[str]) -> str:
    """Return what one of tyro's boxes says in a line, and the remedy.

    Args:
        box: what tyro printed.
        known: the flags there are.

    Example:
        >>> box = "╭─ Unrecognized ─╮\\n│ Unrecognized options: --stpes, 3 │\\n│ ──── │\\n│ Perhaps you meant: │"
        >>> one_line(box, ["--steps"])
        '--stpes is unknown. Did you mean --steps?'
    """
    lines = []
    for raw in box.splitlines():
        line = re.sub(r"\x1b\[[0-9;]*m", "", raw).strip().strip("│").strip()
        if not line or set(line) <= set("─╭╮╰╯-") or line.startswith(("╭", "╰", "For full helptext")):
            continue
        lines.append(line)
    if "╭" not in box:  # where there is no UTF-8, tyro draws no box, and the title is a line of its own
        lines = lines[1:]
    text = " ".join(" ".join(lines).split())
    choice = re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", text)
    if choice:
        value, flag, choices = choice.groups()
        known = re.findall("'([^']*)'", choices)
        return f"{flag} {value!r} is unknown.{nearest(value, known)}"
    if text.startswith("Unrecognized options: "):
        return _unknown(lines[0].removeprefix("Unrecognized options: ").split(", "), known)
    if text.startswith("Missing from "):
        return _missing(lines[1:])
    return text.rstrip(".") + "."


def _unknown(words: Sequence[str], known: Sequence[str]) -> str:
    """What is said of words that are no options; what follows an unknown flag is its value."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    close = [match for flag in flags for match in difflib.get_close_matches(flag, known, n=1)]
    named = ", ".join(flags or words)
    remedy = f"Did you mean {', '.join(close)}?" if close else "Leave it out; --help lists the options."
    return f"{named} {'are' if len(flags or words) > 1 else 'is'} unknown. {remedy}"


def _missing(lines: Sequence[str]) -> str:
    """What is said of a required argument: tyro gives its name, for a flag, and then what it is."""
    names = [line.split()[0] for line in lines if line.startswith("--")] or ["an argument"]
    what = next((line.partition(" (required)")[0] for line in lines if "(required)" in line), "see --help")
    return f"{', '.join(names)} is missing. Give {what}."


@contextmanager
def as_flags(given: Collection[str]) -> Iterator[None]:
    """Say what is wrong with a field in the words of its flag, if that is among those given.

    Example:
        >>> with as_flags({"batch"}):
        ...     raise UsageError("batch=-3 must lie in [1, 10].")
        Traceback (most recent call last):
        reroll.errors.UsageError: --batch=-3 must lie in [1, 10].
    """
    try:
        yield
    except UsageError as error:
        name, _, rest = str(error).partition("=")
        flag = {dotted: flag for flag, (dotted, *_) in flag_fields().items()}.get(name, name.replace("_", "-"))
        raise UsageError(f"--{flag}={rest}" if flag.replace("-", "_") in given else str(error)) from None


class Parser(argparse.ArgumentParser):
    """A parser that knows only what was given: a flag that is not on the command line has no value."""

    def __init__(self, prog: str, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog, usage=f"{prog} [flags]", description=description, formatter_class=formatter, allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )  # fmt: skip
        self.flags: list[str] = []

    def flag(self, name: str, help: str, default: Any = None, **options: Any) -> None:
        """Add a flag; `default` is only told in the help."""
        self.flags.append(f"--{name}")
        shown = "" if default is None or default is False else f" (default: {default})"
        self.add_argument(f"--{name}", help=f"{help}{shown}".replace("%", "%%"), **options)

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the values of the flags on a command line, by name with underscores.

        Raises:
            UsageError: one line, for anything wrong.
            SystemExit: with 0, after `--help`.
        """
        refuse_unusable(arguments)
        values, unknown = self.parse_known_args(list(arguments))
        if unknown:
            raise UsageError(f"{self.prog}: {_unknown(unknown, self.flags)}")
        return vars(values)

    def error(self, message: str) -> Any:
        raise UsageError(f"{self.prog}: {message.removeprefix('argument ')}.")


def flag_fields() -> dict[str, tuple[str, Any, dataclasses.Field[Any]]]:
    """Return every config field with a flag, whichever kind has it: flag → (dotted name, type, field)."""
    flags: dict[str, tuple[str, Any, dataclasses.Field[Any]]] = {}

    def collect(kinds: Mapping[str, type], prefix: str) -> None:
        for kind in dict.fromkeys(kinds.values()):
            for f in dataclasses.fields(kind):
                nested, flag = f.metadata["kinds"], f.metadata["flag"]
                if flag and nested:
                    kinds_of = Literal[*(name for name in nested if name != OBJECT)]
                    flags.setdefault(flag, (f"{prefix}{f.name}.kind", kinds_of, f))
                elif flag:
                    flags.setdefault(flag, (prefix + f.name, hints(kind)[f.name], f))
                if nested:
                    collect(nested, f"{prefix}{f.name}.")

    collect({"": Config}, "")
    return flags


def add_config(parser: Parser, config: Config) -> None:
    """Add the flags of a config; the help tells its values."""
    values = leaves(config)
    for flag, (name, kind, f) in flag_fields().items():
        options: dict[str, Any] = {"metavar": "|".join(get_args(kind)) if get_origin(kind) is Literal else "VALUE"}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.flag(flag, f.metadata["help"], values.get(name), **options)


def tables_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the flags on a command line change in a config, as tables to lay over it."""
    tables: dict[str, Any] = {}
    for flag, (name, kind, _) in flag_fields().items():
        value: Any = given.get(flag.replace("-", "_"))
        if value is not None:
            if value == "None" and type(None) in get_args(kind):
                value = "none"  # the word of config files for no value
            is_text = str in (kind, *get_args(kind)) or get_origin(kind) is Literal or kind is bool
            put(tables, name.split("."), value if is_text else parse_value(value))
    return tables
