"""Flags: from dataclasses to a command line by argparse, with every mistake in one line.

Values stay texts until they are laid over a config, whose fields know their types, so that a command line is read once
and what was given is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import typing
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from reroll.errors import UsageError
from reroll.specs.base import OBJECT, convert, hints, leaves
from reroll.train.config import Config
from reroll.train.toml import parse_value, put

T = TypeVar("T")


def positional(help: str, default: Any = dataclasses.MISSING) -> Any:
    """A field of a command that is given without a flag."""
    return dataclasses.field(default=default, metadata={"help": help, "positional": True})


def parse(kind: type[T], arguments: Sequence[str], prog: str, description: str) -> T:
    """Return a dataclass filled from arguments.

    Args:
        kind: a dataclass whose fields are flags, by `reroll.specs.base.option`, or `positional`.
        arguments: the command line after the command.
        prog: how the command is called.
        description: what `--help` says first.

    Raises:
        UsageError: one line, for anything wrong.
        SystemExit: with 0, after `--help`.
    """
    fields = dataclasses.fields(typing.cast(Any, kind))
    places = [f for f in fields if "positional" in f.metadata]
    parser = Parser(prog, description, "".join(f" {f.name.upper()}" for f in places))
    for f in fields:
        if f in places:
            parser.add_argument(f.name, nargs="?", metavar=f.name.upper(), help=f.metadata["help"])
        else:
            options = {"action": "store_true"} if f.default is False else {"metavar": "VALUE"}
            parser.flag(f.name.replace("_", "-"), f.metadata["help"], f.default, **options)
    given = parser.read(arguments)
    for f in places:
        if f.name not in given and f.default is dataclasses.MISSING:
            raise UsageError(f"{prog}: {f.name.upper()} is missing. Give {f.metadata['help']}.")
    return kind(**{name: _typed(value, hints(kind)[name], name.replace("_", "-")) for name, value in given.items()})


def _typed(value: Any, kind: Any, name: str) -> Any:
    """A value of a command line as the type of a field."""
    kinds = get_args(kind) or (kind,)
    if value in ("none", "None") and type(None) in kinds:
        return None
    if Path in kinds:
        return Path(value)
    return value if isinstance(value, bool) or str in kinds else convert(parse_value(value), kind, f"--{name}")


def _unknown(words: Sequence[str], known: Sequence[str]) -> str:
    """What is said of words that are no options; what follows an unknown flag is its value."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    close = [match for flag in flags for match in difflib.get_close_matches(flag, known, n=1)]
    named = ", ".join(flags or words)
    remedy = f"Did you mean {', '.join(close)}?" if close else "Leave it out; --help lists the options."
    return f"{named} {'are' if len(flags or words) > 1 else 'is'} unknown. {remedy}"


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

    def __init__(self, prog: str, description: str, places: str = ""):
        super().__init__(
            prog, usage=f"{prog}{places} [flags]", description=description, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        )  # fmt: skip
        self.flags: list[str] = []

    def flag(self, name: str, help: str, default: Any = None, group: Any = None, **options: Any) -> None:
        """Add a flag, in a group of the help; `default` is only told there."""
        self.flags.append(f"--{name}")
        shown = "" if default in (None, False, "") else f" (default: {default})"
        (group or self).add_argument(f"--{name}", help=f"{help}{shown}".replace("%", "%%"), **options)

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the values of the flags on a command line, by name with underscores.

        Raises:
            UsageError: one line, for anything wrong.
            SystemExit: with 0, after `--help`.
        """
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
    values, groups = leaves(config), {f.name: parser.add_argument_group(f.name) for f in dataclasses.fields(config)[1:]}
    for flag, (name, kind, f) in flag_fields().items():
        options: dict[str, Any] = {"metavar": "|".join(get_args(kind)) if get_origin(kind) is Literal else "VALUE"}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.flag(flag, f.metadata["help"], values.get(name), groups[name.partition(".")[0]], **options)


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
