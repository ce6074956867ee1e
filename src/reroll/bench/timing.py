"""Compare times on a machine that is shared and changes speed: measure in turn, and quote the median of the ratios."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any


def in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Call all functions in turns, a round to warm up and then `rounds` that count; return their seconds.

    Example:
        >>> times = in_turn({"a": lambda: None, "b": lambda: sum(range(1000))}, rounds=3)
        >>> len(times["a"]), ratio(times, "b", "a") > 1
        (3, True)
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with without_collections():
        _fill(seconds, functions, rounds)
    return seconds


def _fill(seconds: dict[str, list[float]], functions: Mapping[str, Callable[[], Any]], rounds: int) -> None:
    for round_ in range(rounds + 1):
        gc.collect()
        # Shuffled, so that nothing always runs after the one that leaves the memory in pieces.
        for name, function in random.Random(round_).sample(list(functions.items()), len(functions)):
            began = time.perf_counter()
            function()
            if round_:
                seconds[name].append(time.perf_counter() - began)


@contextmanager
def without_collections() -> Any:
    """Run without collections of garbage: a full one takes longer than what is timed, and falls on any call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def ratio(seconds: Mapping[str, list[float]], above: str, below: str) -> float:
    """Return the median over the rounds of time `above` ÷ time `below`."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below]))


def spread(seconds: Mapping[str, list[float]], above: str, below: str) -> tuple[float, float]:
    """Return the smallest and largest of these ratios."""
    ratios = [a / b for a, b in zip(seconds[above], seconds[below])]
    return min(ratios), max(ratios)


@contextmanager
def torch_threads(threads: int) -> Any:
    """Run with a number of torch threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
