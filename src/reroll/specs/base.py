"""Specs: frozen dataclasses with a kind, whose fields declare default, help, range and flag in one place.

    spec.check()                                types and ranges of all fields, and the rules of the kind
    change(spec, {"kind": "gru"}, MODELS)       other values; another kind keeps the fields that both have
    leaves(config)                              {"model.rollout.kind": "elk", …}

Plain data, no torch: the class that a spec builds is named by a string and imported when it is built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from reroll.errors import UsageError, did_you_mean

O = TypeVar("O", bound="Options")  # noqa: E741 (a type of options; not mistaken for a zero here)


RENAMED = {"cell": "kind", "method": "kind", "share": "batch", "optimizer": "kind"}
"""Fields of config files of format 1 → their present names."""


def option(default: Any, help: str, *, flag: str = "", within: str = "", kinds: Mapping[str, Any] | None = None) -> Any:
    """A field.

    Args:
        default: its default value.
        help: shown by --help.
        flag: the name of its command-line flag, if it has one; for a nested spec, of the flag that sets its kind.
        within: the interval of a number; by default [1, 2**24] for integers, (0, 1e18] for others.
        kinds: for a nested spec, the table of its kinds.
    """
    metadata = {"help": help, "flag": flag, "within": within, "kinds": kinds}
    return field(default=default, metadata=metadata)


class Options:
    """A dataclass of options that can check itself."""

    def check(self) -> None:
        """Raise `UsageError` for a value of the wrong type or out of range; kinds add rules of their own."""
        for f in dataclasses.fields(typing.cast(Any, self)):
            value = getattr(self, f.name)
            if isinstance(value, Options):
                value.check()
            else:
                _check_value(f.name, convert(value, hints(type(self))[f.name], f.name), f.metadata.get("within", ""))


@dataclass(frozen=True)
class Spec(Options):
    """Options of one of several kinds."""

    kind: str = option("", "the kind")


OBJECT = "object"
"""The kind of an object that was passed in; a command line cannot ask for it."""


@dataclass(frozen=True)
class ObjectSpec(Options):
    """Records the class of an object that was passed in, and must be passed in again to resume the run."""

    kind: str = option(OBJECT, "an object that was passed in")
    name: str = option("", "its class")

    def build(self, *arguments: Any, **options: Any) -> Any:
        """Raise `UsageError`: it cannot be built from a config."""
        raise UsageError(
            f"the run was trained with your own {self.name}, which a command line does not have. In Python: "
            "reroll.load(run, model) returns your model with the run's weights, reroll.train.evaluate.evaluate(model, "
            "task, 'valid') scores it, and train(Session.of(task, model, …), run, resume=True) continues."
        )

    @classmethod
    def of(cls, value: Any, **options: Any) -> Any:
        """Return the spec of an object."""
        return cls(name=f"{type(value).__module__}.{type(value).__qualname__}", **options)


@functools.cache
def hints(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields."""
    types_of = typing.get_type_hints(kind)
    return {f.name: types_of[f.name] for f in dataclasses.fields(kind)}


def _check_value(name: str, value: Any, within: str) -> None:
    if isinstance(value, str) and ("\0" in value or value.encode("utf-8", "ignore").decode() != value):
        raise UsageError(f"{name}={value!r} has a character that cannot be stored in a file; remove it.")
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, Real) and not isinstance(number, bool):
            within = within or ("[1, 2**24]" if isinstance(number, Integral) else "(0, 1e18]")
            if not _in_interval(number, within):
                raise UsageError(f"{name}={value!r} must lie in {within}.")


def _in_interval(number: Any, within: str) -> bool:
    low, high = map(_bound, within[1:-1].split(","))
    above = low <= number if within[0] == "[" else low < number
    return above and (number <= high if within[-1] == "]" else number < high)


def _bound(text: str) -> float:
    base, _, power = text.partition("**")
    return float(base) ** float(power or 1)


def exclude(*pairs: tuple[Any, str, str]) -> None:
    """Raise `UsageError` for the first pair that is present: (whether it is, the pair in words, why it is refused)."""
    for present, pair, reason in pairs:
        if present:
            raise UsageError(f"{pair} exclude each other: {reason}. Drop one of them.")


def runtime(name: str) -> Any:
    """Import and return what "module:name" names in this package."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(f"reroll.{module}"), attribute)


def change(spec: O, values: Any, kinds: Mapping[str, type[O]] | None = None, where: str = "") -> O:
    """Return a spec with some fields replaced.

    Args:
        spec: the spec to change.
        values: fields by name; a string is a kind; a spec is taken as it is. On a change of kind, fields of the same
            name keep their values if these are valid, and the rest take the new kind's defaults.
        kinds: the table of kinds; None for options without any.
        where: the name of the spec, for errors.

    Raises:
        UsageError: for an unknown kind or field (with the nearest known one), a field of another kind, or a value of
            the wrong type.
    """
    kinds = kinds or {"": type(spec)}
    if isinstance(values, Options):
        return typing.cast(O, values)
    if isinstance(values, str) and "" not in kinds:
        values = {"kind": values}
    if not isinstance(values, Mapping):
        raise UsageError(f"{where}={values!r} must be a table of fields: [{where}].")
    before = getattr(spec, "kind", "")
    kind = values.get("kind", before) if "" not in kinds else ""
    named = [k for k in kinds if k != OBJECT or before == OBJECT or "name" in values]
    if not isinstance(kind, str) or kind not in named:
        raise UsageError(f"{where}.kind={kind!r} is unknown.{did_you_mean(str(kind), named)}")
    target, prefix = kinds[kind], f"{where}." if where else ""
    fields: dict[str, Any] = {f.name: f for f in dataclasses.fields(typing.cast(Any, target))}
    for name in values:
        if name not in fields:
            others = [other for other, owner in kinds.items() if name in hints(owner)]
            if others:
                remedy = "Drop it, or choose one of those."
                raise UsageError(
                    f"{name}={values[name]!r} is for {where} {' or '.join(others)}; this one is {kind}. {remedy}"
                )
            if RENAMED.get(name) in fields:
                raise UsageError(f"{prefix}{name} is now called {prefix}{RENAMED[name]}.")
            raise UsageError(f"unknown key {prefix}{name}.{did_you_mean(name, fields)}")
    result: dict[str, Any] = {"kind": kind} if kind else {}
    for name, f in fields.items():
        hint, nested = hints(target)[name], f.metadata["kinds"]
        if name in values and nested:
            result[name] = change(getattr(spec, name, f.default), values[name], nested, prefix + name)
        elif name in values:
            result[name] = convert(values[name], hint, prefix + name)
        elif name != "kind" and hasattr(spec, name):
            with contextlib.suppress(UsageError):
                value = getattr(spec, name)
                result[name] = value if kind == before or nested else convert(value, hint, name)
    return target(**result)


def leaves(options: Options, prefix: str = "") -> dict[str, Any]:
    """Return every value by its dotted name, in order, nested specs last."""
    values = {f.name: getattr(options, f.name) for f in dataclasses.fields(typing.cast(Any, options))}
    named = {prefix + name: value for name, value in values.items() if not isinstance(value, Options)}
    for name, value in values.items():
        if isinstance(value, Options):
            named |= leaves(value, f"{prefix}{name}.")
    return named


def convert(value: Any, kind: Any, key: str) -> Any:
    """Return a value as the type of a field; raise `UsageError` if it is of another."""
    origin = get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value in (None, "none") and type(None) in get_args(kind):
            return None
        for choice in get_args(kind):
            with contextlib.suppress(UsageError):
                return convert(value, choice, key)
    elif origin is Literal:
        if value in get_args(kind) and isinstance(value, str):
            return value
        choices = [str(choice) for choice in get_args(kind)]
        hint = did_you_mean(str(value), choices)
        raise UsageError(f"{key}={value!r} must be {', '.join(choices)}.{hint if 'Did you mean' in hint else ''}")
    elif origin is tuple:
        parts = get_args(kind)
        if isinstance(value, list | tuple) and (Ellipsis in parts or len(value) == len(parts)):
            parts = parts[:1] * len(value) if Ellipsis in parts else parts
            return tuple(convert(v, part, key) for v, part in zip(value, parts))
    elif kind is float:
        if isinstance(value, Real) and not isinstance(value, bool) and value == value:
            with contextlib.suppress(OverflowError):  # an integer of hundreds of digits
                return float(value)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(value, Integral if kind is int else origin or kind) and (
        kind is bool or not isinstance(value, bool)
    ):
        return value
    raise UsageError(f"{key}={value!r} must be {describe(kind)}.")


def describe(kind: Any) -> str:
    """Return a type in words.

    Example:
        >>> describe(int | None), describe(float | Literal["auto"]), describe(tuple[float, float])
        ('an integer or none', 'a number or "auto"', 'a list of 2 numbers')
    """
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "none"}
    origin = get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(choice) for choice in get_args(kind))
    if origin is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(kind))
    if origin is tuple:
        return f"a list of {len(get_args(kind))} numbers"
    return names.get(kind, str(kind))
