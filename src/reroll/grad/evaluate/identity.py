"""A key by which a loss is recognised, though its function is made anew at every step."""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from reroll.passes import is_untouched

FEW = 64
"""Entries of a container that are inspected."""


def identity(loss_fn: Any, depth: int = 5) -> tuple[Any, list[Any]]:
    """Return a key that identifies a loss, and the objects whose ids are in it.

    It consists of the code, and of the modules, parameters and functions that the loss is bound to, closes over or has
    as defaults; of numbers there, only whether they are zero, as the weight of a term may be at first; of a module like
    `CrossEntropyLoss()`, which may be made anew, the type and such numbers and texts. Of a list, tuple
    or dict only the first 64 entries count, and of the first two no numbers: losses that differ in others have the same
    key, and the second is not verified. A lambda that is created anew at every step is the same loss.
    """
    objects: list[Any] = []

    def by_id(thing: Any) -> int:
        objects.append(thing)
        return id(thing)

    def describe(value: Any, depth: int) -> Any:
        code, inside = None, ()
        if isinstance(value, types.FunctionType):
            code, inside = value.__code__, (*_closure(value), *(value.__defaults__ or ()), value.__kwdefaults__)
        elif isinstance(value, types.MethodType):
            code, inside = by_id(value.__self__), (value.__func__,)
        elif isinstance(value, functools.partial):
            inside = value.func, *value.args, value.keywords
        elif isinstance(value, int | float):
            return value != 0
        elif isinstance(value, dict):
            inside = list(itertools.islice(value.values(), FEW))
        elif isinstance(value, list | tuple):
            # A sequence may be a data set; one of modules or parameters is short.
            inside = [part for part in itertools.islice(value, FEW) if not isinstance(part, int | float)]
        elif isinstance(value, nn.Module) and (settings := _settings(value)) is not None:
            return type(value), *(s if isinstance(s, str) else describe(s, 0) for s in settings)
        else:
            return by_id(value) if isinstance(value, nn.Parameter) or callable(value) else None
        parts = (describe(part, depth - 1) for part in inside) if depth else ()
        return code, *(part for part in parts if part not in (None, (None,)))

    return describe(loss_fn, depth), objects


_BARE = frozenset(vars(nn.Module()))


def _closure(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def _settings(module: nn.Module) -> list[Any] | None:
    """The attributes of a module of torch that is nothing but numbers and texts, or None."""
    own = [value for name, value in vars(module).items() if name not in _BARE]
    plain = type(module).__module__.startswith("torch.nn.") and is_untouched(module)
    plain = plain and not [*module.parameters(), *module.children()]
    return own if plain and all(isinstance(value, str | int | float | None) for value in own) else None


def reference(thing: Any) -> Callable[[], Any]:
    """Return a call that gives an object, or None once it is gone; one that cannot be referred to weakly is kept."""
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing
