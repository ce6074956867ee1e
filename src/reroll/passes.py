"""Count forward passes: the unit in which zeroth-order and backpropagated training can be compared.

A call of a module from outside (not from within another module) is one pass, and so is one evaluation of a task's loss,
however many windows of time it is run in. Under vmap one call is as many passes as there are copies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Passes:
    """A number of forward passes that is being counted."""

    def __init__(self) -> None:
        self.count, self.lock = 0, threading.Lock()


_counters: list[Passes] = []


class _Here(threading.local):
    depth = 0
    """How many modules or `passes` blocks this thread is inside of."""


_here = _Here()


@contextmanager
def passes(count: int = 1) -> Iterator[None]:
    """Say that what happens inside is so many forward passes, whatever modules it calls."""
    _enter(count)
    try:
        yield
    finally:
        _leave()


@contextmanager
def count_forward_passes() -> Iterator[Passes]:
    """Count the forward passes of all modules, in all threads, inside the block.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())
        >>> with count_forward_passes() as passes:
        ...     _ = model(torch.ones(1, 2)), model(torch.ones(1, 2))
        >>> passes.count
        2
    """
    from torch.nn.modules import module

    counter = Passes()
    hooks = [
        module.register_module_forward_pre_hook(lambda *_: _enter(1)),
        module.register_module_forward_hook(lambda *_: _leave(), always_call=True),
    ]
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)
        for hook in hooks:
            hook.remove()


def is_untouched(module: Any) -> bool:
    """Whether a pass of a module is that of its class: it has no forward of its own, and no hooks but reroll's."""
    hooks = *module._forward_pre_hooks.values(), *module._forward_hooks.values()
    return "forward" not in vars(module) and all(str(getattr(h, "__module__", "")).startswith("reroll.") for h in hooks)


def _enter(count: int) -> None:
    if _here.depth == 0:
        for counter in _counters:
            with counter.lock:
                counter.count += count
    _here.depth += 1


def _leave(*_: Any) -> None:
    _here.depth -= 1
