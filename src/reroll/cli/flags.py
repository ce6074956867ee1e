"""Flags: dataclasses as command lines, by argparse, with every mistake reported in one line.

Values stay strings until they are applied to a config, whose fields know their types; so a command line is parsed once,
and it is known which flags were passed.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from reroll.errors import RerollError, UsageError
from reroll.specs.base import OBJECT, convert, hints, leaves
from reroll.train.config import Config
from reroll.train.toml import parse_value, put

T = TypeVar("T")
NAMED = re.compile(
    r"""(?<!\w)(?:'[^']*'|"[^"]*")|(?<!--set )(?<![\w./-])([a-z]+\.[a-z_.]*[a-z]|lr\b|epsilon\b|[a-z]\w*(?==))"""
)
"""What is quoted; or a name: of a field with its section, of what is never a word, or before a value."""


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
    parser, types = Parser(prog, kind.__doc__ or "", "".join(f" {name}" for name in names)), hints(kind)
    for f in fields:
        many = get_origin(types[f.name]) is tuple
        if f in places:
            metavar = f.name.upper() if f.default is dataclasses.MISSING else f"[{f.name.upper()}]"
            parser.add_argument(f.name, nargs="*" if many else "?", metavar=metavar, help=f.metadata["help"])
        else:
            options = {"action": "store_true"} if f.default is False else {"metavar": "VALUE"}
            options |= {"nargs": "+"} if many else {}
            parser.flag(f.name.replace("_", "-"), f.metadata["help"], f.default, **options)
    passed = parser.read(arguments)
    for f in places:
        if passed.get(f.name) in (None, []) and f.default is dataclasses.MISSING:
            raise UsageError(f"{prog}: {f.name.upper()} is missing. Pass {f.metadata['help']}.")
    flags = {name: f"--{name.replace('_', '-')}" for name in passed}
    return kind(**{n: convert(_value(text, types[n]), types[n], flags[n]) for n, text in passed.items()})


def _value(text: Any, kind: Any) -> Any:
    """Return what a flag's text stands for in a config file: a string, a TOML value, or "none"."""
    kinds = get_args(kind) or (kind,)
    if text == "None" and type(None) in kinds:
        return "none"
    return text if {bool, str, Path} & {*kinds} or get_origin(kind) is Literal else parse_value(text)


def _unknown(words: Sequence[str], known: Sequence[str], typed: Sequence[str]) -> str:
    """Return the error for unknown arguments; what follows an unknown flag is taken for its value."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")] or words
    close = [match for flag in flags for match in _meant(flag, known, typed)]
    remedy = f"Did you mean {', '.join(close)}?" if close else "Drop it, or see --help for the options."
    return f"{', '.join(flags)} {'are' if len(flags) > 1 else 'is'} unknown. {remedy}"


def _meant(flag: str, known: Sequence[str], typed: Sequence[str]) -> list[str]:
    """Return what an unknown flag may stand for: the config field of that name, a flag, or fields with it in theirs."""
    name, after = flag.lstrip("-").replace("-", "_"), iter(typed)
    word = next((word for word in after if word.partition("=")[0] == flag), flag)
    value = word.partition("=")[2] or next(after, "VALUE")
    fields = {dotted: dotted.rpartition(".")[2] for dotted in _names()} if "--set" in known else {}
    exact = [f"--set {dotted}={value}" for dotted, field in fields.items() if field == name]
    parts = [f"--set {dotted}={value}" for dotted, field in fields.items() if name in field.split("_")]
    return exact or difflib.get_close_matches(flag, known, n=1, cutoff=0.7) or parts


@contextmanager
def as_flags(passed: Any, also: Mapping[str, str] | None = None) -> Iterator[None]:
    """Name flags instead of fields and arguments in an error; see `in_flags`.

    Example:
        >>> with as_flags({"batch"}):
        ...     raise UsageError("batch=-3 must lie in [1, 10]. Give batch=10 or less, or length=5.")
        Traceback (most recent call last):
        reroll.errors.UsageError: --batch=-3 must lie in [1, 10]. Give --batch=10 or less, or --length=5.
    """
    try:
        yield
    except RerollError as error:
        error.args = (in_flags(str(error), passed, also),)
        raise


def run_folder(path: Path) -> dict[str, str]:
    """Return how errors about the folder and processes of a run are said: of `train`, it is the argument `path`."""
    return {
        f"path={path} ": f"--run-dir {path} ",
        "resume=True": "--resume",
        "start fewer processes": "lower --nproc",
    }


def in_flags(text: str, passed: Any = (), also: Mapping[str, str] | None = None) -> str:
    """Return a message with flags instead of fields and arguments.

    What the message is about may be from a file: it keeps its name unless its flag was passed. What the remedy asks for
    (after the first sentence or semicolon, or after "To" at the beginning) can be passed by a flag, or by --set.

    Args:
        text: the message; what it quotes stays as it is.
        passed: names of the flags passed for a config; or a command's dataclass, of which all fields are flags.
        also: other words → what replaces them.

    Example:
        >>> in_flags("the loss grew. Lower lr, or raise run.diverged.")
        'the loss grew. Lower --lr, or raise --set run.diverged=….'
    """
    flags: dict[str, str] = {}
    if of_config := not dataclasses.is_dataclass(passed):
        for flag, (dotted, *_) in flag_fields().items():
            flags |= dict.fromkeys((dotted, flag.replace("-", "_")), f"--{flag}")
    else:
        passed = {f.name for f in dataclasses.fields(passed) if "positional" not in f.metadata}
    here = {name: f"--{name.replace('_', '-')}" for name in passed}
    flags |= here
    for words, flag in (also or {}).items():
        text = text.replace(words, flag)
    remedy = re.search("^To |[.;] |$", text)
    start = remedy.start() if remedy else 0

    def rename(match: re.Match[str]) -> str:
        name = match[1]
        by_set = f"--set {name}" + "=…" * (match.end() == len(text) or text[match.end()] != "=")
        flag = flags.get(name) or (by_set if of_config and name in _names() and "." in name else "")
        from_file = match.start() < start and (flag not in here.values() or ".toml: " in text[: match.start()])
        return match[0] if not flag or from_file else flag

    return NAMED.sub(rename, text)


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
        shown = "" if default in (None, "", ()) or default is False else f" (default: {default})"
        (group or self).add_argument(f"--{name}", help=f"{help}{shown}".replace("%", "%%"), **options)

    def read(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Return the values of the flags on a command line, by name with underscores.

        Raises:
            UsageError: one line, for anything wrong.
            SystemExit: with 0, after `--help`.
        """
        values, unknown = self.parse_known_args(list(arguments))
        if unknown:
            raise UsageError(f"{self.prog}: {_unknown(unknown, self.flags, arguments)}")
        return vars(values)

    def error(self, message: str) -> Any:
        raise UsageError(f"{self.prog}: {message.removeprefix('argument ')}.")


def config_fields() -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    """Yield every config field, whichever kind has it: (dotted name, type, field); of a nested spec, its kind."""

    def collect(kinds: Mapping[str, type], prefix: str) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
        for kind in dict.fromkeys(kinds.values()):
            for f in dataclasses.fields(kind):
                if nested := f.metadata["kinds"]:
                    names = [name for name in nested if name not in ("", OBJECT)]
                    if names:
                        yield f"{prefix}{f.name}.kind", Literal[*names], f
                    yield from collect(nested, f"{prefix}{f.name}.")
                else:
                    yield prefix + f.name, hints(kind)[f.name], f

    return collect({"": Config}, "")


def flag_fields() -> dict[str, tuple[str, Any, dataclasses.Field[Any]]]:
    """Return every config field with a flag, whichever kind has it: flag → (dotted name, type, field)."""
    flags: dict[str, tuple[str, Any, dataclasses.Field[Any]]] = {}
    for dotted, kind, f in config_fields():
        if flag := f.metadata["flag"]:
            flags.setdefault(flag, (dotted, kind, f))
    return flags


@functools.cache
def _names() -> dict[str, None]:
    """Every field with its section; a dictionary keeps their order."""
    return dict.fromkeys(dotted for dotted, *_ in config_fields())


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
