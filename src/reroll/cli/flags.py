"""Flags: dataclasses as command lines, by argparse, with every mistake reported in one line.

Values stay strings until they are applied to a config, whose fields know their types; so a command line is parsed once,
and it is known which flags were passed.
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
    """A field of a command that is passed without a flag."""
    return dataclasses.field(default=default, metadata={"help": help, "positional": True})


def parse(kind: type[T], arguments: Sequence[str], prog: str) -> T:
    """Return a dataclass filled from arguments.

    Args:
        kind: a dataclass whose fields are flags, by `reroll.specs.base.option`, or `positional`; its docstring heads
            the help.
        arguments: the command line after the command.
        prog: the command, as it is typed.

    Raises:
        UsageError: one line, for anything wrong.
        SystemExit: with 0, after `--help`.
    """
    fields = dataclasses.fields(typing.cast(Any, kind))
    places = [f for f in fields if "positional" in f.metadata]
    names = (f.name.upper() if f.default is dataclasses.MISSING else f"[{f.name.upper()}]" for f in places)
    parser = Parser(prog, kind.__doc__ or "", "".join(f" {name}" for name in names))
    for f in fields:
        if f in places:
            metavar = f.name.upper() if f.default is dataclasses.MISSING else f"[{f.name.upper()}]"
            parser.add_argument(f.name, nargs="?", metavar=metavar, help=f.metadata["help"])
        else:
            options = {"action": "store_true"} if f.default is False else {"metavar": "VALUE"}
            parser.flag(f.name.replace("_", "-"), f.metadata["help"], f.default, **options)
    passed = parser.read(arguments)
    for f in places:
        if f.name not in passed and f.default is dataclasses.MISSING:
            raise UsageError(f"{prog}: {f.name.upper()} is missing. Pass {f.metadata['help']}.")
    types = hints(kind)
    flags = {name: f"--{name.replace('_', '-')}" for name in passed}
    return kind(**{n: convert(_value(text, types[n]), types[n], flags[n]) for n, text in passed.items()})


def _value(text: Any, kind: Any) -> Any:
    """Return what a flag's text stands for in a config file: a string, a TOML value, or "none"."""
    kinds = get_args(kind) or (kind,)
    if text == "None" and type(None) in kinds:
        return "none"
    return text if {bool, str, Path} & {*kinds} or get_origin(kind) is Literal else parse_value(text)


def _unknown(words: Sequence[str], known: Sequence[str]) -> str:
    """Return the error for unknown arguments; what follows an unknown flag is taken for its value."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")] or words
    close = [match for flag in flags for match in difflib.get_close_matches(flag, known, n=1)]
    remedy = f"Did you mean {', '.join(close)}?" if close else "Drop it, or see --help for the options."
    return f"{', '.join(flags)} {'are' if len(flags) > 1 else 'is'} unknown. {remedy}"


@contextmanager
def as_flags(passed: Collection[str]) -> Iterator[None]:
    """Name the flag instead of the field in an error, if that flag is among those passed.

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
        if flag.replace("-", "_") not in passed:
            raise
        raise UsageError(f"--{flag}={rest}") from None


class Parser(argparse.ArgumentParser):
    """A parser of what is on the command line and no more: other flags have no value, not even their default."""

    def __init__(self, prog: str, description: str, places: str = ""):
        super().__init__(
            prog, usage=f"{prog}{places} [flags]", description=description, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS,
        )  # fmt: skip
        self.flags: list[str] = []

    def flag(self, name: str, help: str, default: Any = None, group: Any = None, **options: Any) -> None:
        """Add a flag, in a group of the help; `default` is only shown there."""
        self.flags.append(f"--{name}")
        shown = "" if default in (None, "") or default is False else f" (default: {default})"
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
    """Add the flags of a config; the help shows its values as defaults."""
    values, groups = leaves(config), {f.name: parser.add_argument_group(f.name) for f in dataclasses.fields(config)[1:]}
    for flag, (name, kind, f) in flag_fields().items():
        options: dict[str, Any] = {"metavar": "|".join(get_args(kind)) if get_origin(kind) is Literal else "VALUE"}
        if kind is bool:
            options = {"action": argparse.BooleanOptionalAction}
        parser.flag(flag, f.metadata["help"], values.get(name), groups[name.partition(".")[0]], **options)


def tables_of(passed: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the flags on a command line change in a config, as tables to overlay it with."""
    tables: dict[str, Any] = {}
    for flag, (name, kind, _) in flag_fields().items():
        value: Any = passed.get(flag.replace("-", "_"))
        if value is not None:
            put(tables, name.split("."), _value(value, kind))
    return tables
