"""A config as TOML, and TOML, dictionaries and KEY=VALUE pairs laid over a config, checked field by field.

    overlay(config, {"optim": {"lr": 0.01}}, "flags")          unknown keys fail with the nearest match
    text = dumps(config)                                       what `runs/NAME/config.toml` holds

Read by the standard library's tomllib. Written by hand: a config is five flat tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from reroll.errors import UsageError, nearest
from reroll.train.config import SECTIONS, Config, fields_of

FORMAT = 1
"""Version of the file; another one is refused rather than misread."""


def overlay(config: Config, tables: Mapping[str, Any], source: str) -> Config:
    """Return the config with the given fields replaced.

    Args:
        config: what is laid under.
        tables: `{section: {field: value}}`; also `recipe` and `format`.
        source: where they come from, for errors.

    Raises:
        UsageError: for an unknown section or field (with the nearest known one), or a value of another type.
    """
    for section, values in tables.items():
        if section == "format":
            if values != FORMAT:
                raise UsageError(
                    f"{source}: format={values!r} is of another version of reroll (this one reads {FORMAT})."
                )
        elif section == "recipe":
            config = dataclasses.replace(config, recipe=_convert(values, str, "recipe", source))
        elif section not in SECTIONS:
            raise UsageError(f"{source}: unknown section [{section}].{nearest(section, SECTIONS)}")
        elif not isinstance(values, Mapping):
            raise UsageError(f"{source}: {section}={values!r} must be a table of fields, [{section}].")
        else:
            part = getattr(config, section)
            changed = dataclasses.replace(part, **_fields(part, section, values, source))
            config = dataclasses.replace(config, **{section: changed})
    return config


def load(path: str | Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        UsageError: if it is missing, not readable, or no TOML.
    """
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"config {path} does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config {path} cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"config {path} is not TOML: {error}.") from None


def parse(text: str) -> dict[str, Any]:
    """Read a text as TOML.

    Raises:
        tomllib.TOMLDecodeError: if it is none, or holds what Python's parser cannot take: numbers of thousands of
            digits, a thousand brackets within one another.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise tomllib.TOMLDecodeError(str(error)) from None


def parse_pairs(pairs: typing.Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read `section.field=value` pairs; a value is TOML, or a bare word.

    Example:
        >>> parse_pairs(["optim.lr=0.01", "gradient.shaping=rank"])
        {'optim': {'lr': 0.01}, 'gradient': {'shaping': 'rank'}}
    """
    tables: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        section, dot, name = key.strip().partition(".")
        if not (equals and section and dot and name):
            raise UsageError(f"--set {pair!r} must be section.field=value, for example optim.lr=0.01.")
        try:
            found = parse(f"value = {text}")
        except tomllib.TOMLDecodeError:
            found = {}
        # A text of several lines may be read as more than a value; then it is meant as a text.
        value = found["value"] if found.keys() == {"value"} else text.strip()
        tables.setdefault(section, {})[name] = value
    return tables


def dumps(config: Config, origin: Mapping[str, str] | None = None) -> str:
    """Return a config as TOML.

    Args:
        config: the config; TOML knows no None, which is written as the word "none".
        origin: `section.field` → where its value came from, written behind it.

    Example:
        >>> overlay(Config(), tomllib.loads(dumps(Config().replace(run={"seed": 3}))), "text").run.seed
        3
    """
    lines = [f"format = {FORMAT}", f"recipe = {_value(config.recipe)}"]
    current = ""
    for section, f, value in fields_of(config):
        if section != current:
            lines += ["", f"[{section}]"]
            current = section
        note = f"  # {origin[f'{section}.{f.name}']}" if origin and f"{section}.{f.name}" in origin else ""
        lines.append(f"{f.name} = {_value(value)}{note}")
    return "\n".join(lines) + "\n"


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: '"none"', True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(_value(item) for item in value)}]"
    if isinstance(value, float):
        return repr(value)
    # A JSON string is a TOML string, but for characters beyond the first 65,536 (escaped as surrogates) and DEL (bare).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else str(value)


def _fields(section: Any, name: str, values: Mapping[str, Any], source: str) -> dict[str, Any]:
    hints = typing.get_type_hints(type(section))
    for key in values:
        if key not in hints:
            raise UsageError(f"{source}: unknown key {name}.{key}.{nearest(key, hints)}")
    return {key: _convert(value, hints[key], f"{name}.{key}", source) for key, value in values.items()}


def _convert(value: Any, kind: Any, key: str, source: str) -> Any:
    """Return a value as the type of a field, or raise."""
    origin = get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value in (None, "none") and type(None) in get_args(kind):
            return None
        for choice in get_args(kind):
            if choice is not type(None):
                try:
                    return _convert(value, choice, key, source)
                except UsageError:
                    continue
    elif origin is Literal:
        if value in get_args(kind) and isinstance(value, str):
            return value
        known = [str(choice) for choice in get_args(kind)]
        raise UsageError(f"{source}: {key}={value!r} must be {', '.join(known)}.{_closest(value, known)}")
    elif origin is tuple:
        parts = get_args(kind)
        if isinstance(value, list | tuple) and len(value) == len(parts):
            return tuple(_convert(v, part, key, source) for v, part in zip(value, parts))
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
            with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
                return float(value)
    elif (isinstance(value, kind) and not isinstance(value, bool)) or (kind is bool and isinstance(value, bool)):
        return value
    raise UsageError(f"{source}: {key}={value!r} must be {describe(kind)}.")


def _closest(value: Any, known: list[str]) -> str:
    hint = nearest(str(value), known)
    return hint if "Did you mean" in hint else ""


def describe(kind: Any) -> str:
    """Return a type in words.

    Example:
        >>> describe(int | None), describe(float | Literal["auto"]), describe(tuple[float, float])
        ('an integer or none', 'a number or "auto"', 'a list of 2 numbers')
    """
    names = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "none"}
    origin = get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(choice) for choice in get_args(kind))
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(kind))
    if origin is tuple:
        return f"a list of {len(get_args(kind))} numbers"
    return names.get(kind, str(kind))
