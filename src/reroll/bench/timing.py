"""Compare times on a machine that is shared and changes speed: measure in turn, and quote the median of the ratios."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any


def in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int, least: float = 0.0) -> dict[str, list[float]]:
    """Call all functions in turns, a round to warm up and then `rounds` that count; return their seconds.

    Args:
        functions: what is timed, by name.
        rounds: how often.
        least: seconds that a turn should take; what is shorter is called several times in a row, and the mean counts.

    Example:
        >>> times = in_turn({"a": lambda: None, "b": lambda: sum(range(1000))}, rounds=3)
        >>> len(times["a"]), ratio(times, "b", "a") > 1
        (3, True)
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    with without_collections():
        calls = {name: _calls(function, least) for name, function in functions.items()}
        for round_ in range(rounds):
            gc.collect()
            # Shuffled, so that nothing always runs after the one that leaves the memory in pieces.
            for name, function in random.Random(round_).sample(list(functions.items()), len(functions)):
                seconds[name].append(_mean(function, calls[name]))
    return seconds


def _calls(function: Callable[[], Any], least: float) -> int:
    """Warm a function up, and return how many calls take `least` seconds."""
    function()
    return math.ceil(least / _mean(function, 1)) if least else 1


def _mean(function: Callable[[], Any], calls: int) -> float:
    """Return the seconds of a call, over several."""
    began = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - began) / calls


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
