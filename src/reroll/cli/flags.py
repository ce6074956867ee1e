"""Flags: from dataclasses to a command line by tyro, with every mistake in one line.

tyro writes its errors as boxes of several lines; here they are caught and told as one: what was wrong, and the nearest
flag or the flag's own help. All use of tyro is in this file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
from collections.abc import Collection, Sequence
from typing import Annotated, Any, TypeVar

from reroll.errors import UsageError, nearest
from reroll.train.config import SECTIONS, Config

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


def together(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Return the arguments with all values of a flag that takes several in one place: tyro would keep the last mention.

    Raises:
        UsageError: if such a flag is given without a value.

    Example:
        >>> together(["--set", "a=1", "--lr", "2", "--set=b=2"], ["--set"])
        ['--lr', '2', '--set', 'a=1', 'b=2']
    """
    rest: list[str] = []
    values: dict[str, list[str]] = {}
    current: str | None = None
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if argument.startswith("-"):
            current = flag if flag in names else None
            if current is None:
                rest.append(argument)
            else:
                values.setdefault(current, []).extend([value] if equals else [])
        elif current is None:
            rest.append(argument)
        else:
            values[current].append(argument)
    for flag, given_values in values.items():
        if not given_values:
            raise UsageError(f"{flag} is given without a value; give one behind it, or leave it out.")
        rest += [flag, *given_values]
    return rest


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


def as_flags(message: str, names: Collection[str]) -> str:
    """Return a message that begins with an argument of one of these names with the flag of this name instead.

    Example:
        >>> as_flags("batch=-3 must be greater than zero.", {"batch"})
        '--batch=-3 must be greater than zero.'
    """
    name = message.partition("=")[0]
    return f"--{name.replace('_', '-')}{message[len(name) :]}" if name in names else message


def flag_fields() -> dict[str, tuple[str, dataclasses.Field[Any], Any]]:
    """Return the config fields that have a flag: flag's attribute → (section, field, type)."""
    import typing

    found = {}
    for section in SECTIONS:
        kind = type(getattr(Config(), section))
        hints = typing.get_type_hints(kind)
        for f in dataclasses.fields(kind):
            if f.metadata["flag"]:
                found[f.metadata["flag"].replace("-", "_")] = (section, f, hints[f.name])
    return found


def config_flags(name: str, extra: Sequence[tuple[str, Any, Any, str]] = ()) -> type[Any]:
    """Return a dataclass of all flags of a config, and of some more given as (name, type, default, help)."""
    import tyro

    fields: list[Any] = [
        (n, Annotated[kind, tyro.conf.arg(help=help)], dataclasses.field(default=value))
        for n, kind, value, help in extra
    ]
    for attribute, (_, f, kind) in flag_fields().items():
        annotated = Annotated[kind, tyro.conf.arg(help=f.metadata["help"])]
        fields.append((attribute, annotated, dataclasses.field(default=f.default)))
    return dataclasses.make_dataclass(name, fields, frozen=True)


def values_of(config: Config) -> dict[str, Any]:
    """Return the values that the flags have in a config."""
    return {
        attribute: getattr(getattr(config, section), f.name) for attribute, (section, f, _) in flag_fields().items()
    }


def given(config: Config, flags: Any) -> dict[str, dict[str, Any]]:
    """Return what the flags change in a config, as tables to lay over it."""
    before, tables = values_of(config), {}
    for attribute, (section, f, _) in flag_fields().items():
        value = getattr(flags, attribute)
        if isinstance(value, float) and math.isnan(value):
            raise UsageError(f"--{attribute.replace('_', '-')}=nan must be a number.")
        if value != before[attribute]:
            tables.setdefault(section, {})[f.name] = value
    return tables
