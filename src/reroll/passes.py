"""Count forward passes: the unit in which zeroth-order and backpropagated training can be compared.

A call of a module from outside (not from within another module) is one pass, and so is one evaluation of a task's loss,
however many windows of time it is run in. Under vmap one call is as many passes as there are copies.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Passes:
    """A number of forward passes that is being counted."""

    count: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, passes: int) -> None:
        """Count some passes."""
        with self.lock:
            self.count += passes


_counters: list[Passes] = []
_inside = threading.local()


def add_passes(passes: int) -> None:
    """Add passes to every count that is running."""
    if not getattr(_inside, "uncounted", False):
        for counter in _counters:
            counter.add(passes)


@contextmanager
def one_pass() -> Iterator[None]:
    """Say that what happens inside is one forward pass, whatever modules it calls."""
    _enter()
    try:
        yield
    finally:
        _leave()


@contextmanager
def uncounted() -> Iterator[None]:
    """Leave out what happens inside, in this thread: a check that is made once is no part of a step."""
    before, _inside.uncounted = getattr(_inside, "uncounted", False), True
    try:
        yield
    finally:
        _inside.uncounted = before


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
        module.register_module_forward_pre_hook(lambda *_: _enter()),
        module.register_module_forward_hook(lambda *_: _leave(), always_call=True),
    ]
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)
        for hook in hooks:
            hook.remove()


def _enter(*_: Any) -> None:
    depth = getattr(_inside, "depth", 0)
    _inside.depth = depth + 1
    if depth == 0:
        add_passes(1)


def _leave(*_: Any) -> None:
    _inside.depth -= 1
