"""A config as TOML; and overlaying one with TOML, dictionaries or KEY=VALUE pairs, checked field by field.

overlay(config, {"optim": {"lr": 0.01}}, "flags")          unknown keys fail with the nearest match
text = dumps(config)                                       what `runs/NAME/config.toml` holds
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reroll.errors import UsageError
from reroll.specs.base import change, leaves
from reroll.train.config import Config

FORMAT = 2
"""Version of the file format; any other is refused rather than misread."""


def overlay(config: Config, tables: Mapping[str, Any], source: str) -> Config:
    """Return the config with the fields in `tables` replaced.

    Args:
        config: the config to change.
        tables: `{section: {field: value}}`; also `recipe` and `format`.
        source: where they come from, for errors; "" for none.

    Raises:
        UsageError: for another format, an unknown field (with the nearest known one), or a value of another type.
    """
    place = f"{source}: " if source else ""
    if (version := tables.get("format", FORMAT)) != FORMAT:
        raise UsageError(f"{place}format={version!r} is of another version of reroll (this one reads {FORMAT}).")
    try:
        return change(config, {name: values for name, values in tables.items() if name != "format"})
    except UsageError as error:
        raise UsageError(f"{place}{error}") from None


def load(path: str | Path) -> dict[str, Any]:
    """Read a TOML file; raise `UsageError` if it is missing, unreadable, or not TOML."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"config {path} does not exist. Check the path; `reroll show copy > {path}` writes one to start from."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"config {path} is not TOML: {error}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config {path} cannot be read: {error}.") from None


def parse(text: str) -> dict[str, Any]:
    """Parse TOML; raise `tomllib.TOMLDecodeError` if it is invalid, or too deep or long for Python's parser."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise tomllib.TOMLDecodeError(str(error)) from None


def parse_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `section.field=value` pairs; a value is TOML, or a bare word.

    Example:
        >>> parse_pairs(["optim.lr=0.01", "optim.schedule.kind=linear"])
        {'optim': {'lr': 0.01, 'schedule': {'kind': 'linear'}}}
    """
    tables: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        names = key.strip().split(".")
        if not (equals and len(names) > 1 and all(names)):
            raise UsageError(f"pair {pair!r} must be section.field=value, for example optim.lr=0.01.")
        put(tables, names, parse_value(text))
    return tables


def parse_value(text: str) -> Any:
    """Return the value of a TOML expression, or the text itself if it is not one."""
    try:
        values = parse(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    # A text of several lines may parse as more than one value; then it is meant as text.
    return values["value"] if values.keys() == {"value"} else text.strip()


def put(tables: dict[str, Any], names: Sequence[str], value: Any) -> None:
    """Put a value into nested tables; a bare kind becomes the field `kind` of its table."""
    for name in names[:-1]:
        inner = tables.get(name, {})
        tables[name] = inner if isinstance(inner, dict) else {"kind": inner}
        tables = tables[name]
    if isinstance(tables.get(names[-1]), dict) and isinstance(value, str):
        tables, names = tables[names[-1]], ["kind"]
    tables[names[-1]] = value


def dumps(config: Config, origin: Mapping[str, str] | None = None) -> str:
    """Return a config as TOML, with None as "none"; `origin` adds where each dotted name is from, as a comment.

    Example:
        >>> overlay(Config(), tomllib.loads(dumps(Config().replace(run={"seed": 3}))), "text").run.seed
        3
    """
    lines, current = [f"format = {FORMAT}"], ""
    for name, value in leaves(config).items():
        section, _, field = name.rpartition(".")
        if section != current:
            lines += ["", f"[{section}]"]
            current = section
        lines.append(f"{field} = {_value(value)}" + (f"  # {origin[name]}" if origin and name in origin else ""))
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    """Return a value as TOML, which is JSON except for None, items of lists, inf and nan, and DEL in strings."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps("none" if value is None else value, ensure_ascii=False).replace("\x7f", "\\u007f")
