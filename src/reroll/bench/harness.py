"""Shared by all benchmarks: interleaved timing, ratios of times, tables, and publishing a result.

On a shared machine whose speed varies, only ratios of times measured close together are meaningful; so figures are
medians, over rounds, of ratios within a round.
"""

from __future__ import annotations

import gc
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reroll.train.loop import Reporter, train
from reroll.train.machine import commit, hardware

Seconds = Mapping[str, list[float]]


def in_turn(functions: Mapping[str, Callable[[], Any]], rounds: int, least: float = 0.0) -> dict[str, list[float]]:
    """Time all functions alternately, `rounds` times after a warm-up; return their seconds by name.

    Args:
        functions: the functions to time.
        rounds: timings of each.
        least: minimum seconds of a timing; shorter functions are called several times, and the mean is taken.

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
            # Shuffled, so that no function always runs after one that fragments the memory.
            for name, function in random.Random(round_).sample(list(functions.items()), len(functions)):
                seconds[name].append(mean_seconds(function, calls[name]))
    return seconds


def _calls(function: Callable[[], Any], least: float) -> int:
    """Warm a function up, and return how many calls take `least` seconds."""
    function()
    return math.ceil(least / mean_seconds(function, 1)) if least else 1


def mean_seconds(function: Callable[[], Any], calls: int) -> float:
    """Return the mean time of some calls."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


@contextmanager
def without_collections() -> Iterator[None]:
    """Turn garbage collection off: a full collection takes longer than what is timed, and can hit any call."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Alternate(Reporter):
    """Times a call after every step of a run, so that other load on the machine affects both.

    Args:
        names: of the run and of the call, in `seconds`.
        wall: a step lasts from the end of one call to the next, all that the loop does included; else `seconds` of its
            row.
    """

    def __init__(self, names: tuple[str, str], call: Callable[[], Any], wall: bool = False):
        self.names, self.call, self.wall, self.began = names, call, wall, 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    def step(self, row: dict[str, Any], config: Any) -> None:
        """Time the step that was taken, and the call."""
        now, (run, alone) = time.perf_counter(), self.names
        self.seconds[run].append(now - self.began if self.wall else row["seconds"])
        self.seconds[alone].append(mean_seconds(self.call, 1))
        self.began = time.perf_counter()

    def train(self, what: Any, folder: Path, counted: slice) -> dict[str, list[float]]:
        """Train in a folder, and return the seconds of the steps that count."""
        with without_collections():
            train(what, folder, report=self)
        return {name: times[counted] for name, times in self.seconds.items()}


def ratio(seconds: Seconds, above: str, below: str) -> float:
    """Return the median over the rounds of time `above` ÷ time `below`."""
    return statistics.median(a / b for a, b in zip(seconds[above], seconds[below]))


def spread(seconds: Seconds, above: str, below: str) -> tuple[float, float]:
    """Return the smallest and largest of these ratios."""
    ratios = [a / b for a, b in zip(seconds[above], seconds[below])]
    return min(ratios), max(ratios)


def medians(seconds: Seconds) -> dict[str, float]:
    """Return the median seconds of each function."""
    return {name: statistics.median(times) for name, times in seconds.items()}


class Prepared:
    """A call that is prepared on first use, which is in the fresh process where its memory is measured."""

    def __init__(self, prepare: Callable[..., Callable[[], Any]], *arguments: Any):
        self.prepare, self.arguments = prepare, arguments
        self.call: Callable[[], Any] | None = None

    def __call__(self) -> None:
        self.call = self.call or self.prepare(*self.arguments)
        self.call()


def evaluation(
    outputs: Callable[[Tensor], Tensor], inputs: Tensor, module: nn.Module, gradient: bool
) -> Callable[[], list[Tensor]]:
    """Return a call that computes the outputs, or the gradient of their squared sum by inputs and weights."""

    def call() -> list[Tensor]:
        leaf = inputs.detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            results = [outputs(leaf)]
        if gradient:
            sources = [leaf, *(p for p in module.parameters() if p.requires_grad)]
            gradients = torch.autograd.grad(results[0].square().sum(), sources, allow_unused=True)
            results = [g for g in gradients if g is not None]
        if leaf.is_cuda:
            torch.cuda.synchronize()
        return results

    return call


def columns(rows: Sequence[Sequence[Any]]) -> str:
    """Return rows as a table, with the first column left-aligned and the others right-aligned.

    Example:
        >>> print(columns([["method", "count"], ["ELK", 152.25], ["DEER", None]]))
        method  count
        ELK     152.2
        DEER        –
    """
    texts = [[_text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in texts
    )


def _text(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def publish(result: dict[str, Any], report: Callable[[dict[str, Any]], str], path: Path | None) -> dict[str, Any]:
    """Add machine and versions to a result, print its report, write it as JSON if a path is passed, and return it."""
    result |= {
        "hardware": hardware(), "commit": commit(), "torch": torch.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    print(f"{report(result)}\n{result['hardware']}, torch {result['torch']}, commit {result['commit']}")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result
