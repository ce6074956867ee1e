"""What the demo compares: CD-RGE and backpropagation on the same model, data and wall time; and their memory.

Memory is the peak of a step over that of inference, each in a fresh process: at the demo's sequence length, where it
hardly matters, and at a long one, where backpropagation has to store every step and probes do not. The demo trains by
batched evaluation, fast but with copies of the weights, measured at its own length; evaluation in place has none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reroll.bench.cases import Case, symbols
from reroll.bench.harness import Prepared, mean_seconds
from reroll.data.task import Task
from reroll.data.text import Text
from reroll.grad import Backprop, CentralDifference
from reroll.models import Interface
from reroll.optim import build_optimizer
from reroll.specs.model import ModelSpec
from reroll.train.load import build_model
from reroll.train.machine import cores
from reroll.train.measure import measure

LONG = 2048
"""Steps of the long sequences."""
TIMING, FEWEST = 2.0, 4
"""Seconds in which steps are timed, to plan how many there will be, and the fewest such steps."""
USUAL = 397, 39.0
"""Steps of CD-RGE and their seconds in the README's table, of an idle machine of two cores."""


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    name: str
    bits: float
    forward_passes: int | None = None
    seconds: float | None = None
    memory: Sequence[int | None] = (None, None)


def prepare(what: str, config: ModelSpec, sizes: Interface, rows: int, length: int) -> Callable[[], Any]:
    """Return a step, or inference, of the demo's model on random symbols, as a call."""
    case = Case(build_model(config, sizes, 0), symbols(sizes.outputs, rows, length))
    estimators: dict[str, Any] = {
        "inference": None,
        "backprop": Backprop(),
        "probes": CentralDifference(4, 0.01, evaluate="in_place"),
        "batched": CentralDifference(96, 0.01),
    }
    options: dict[str, Any] = {} if what == "backprop" else {"momentum": 0.0}
    optimizer = build_optimizer("adamw" if what == "backprop" else "sgd", case.model, 1e-6, **options)
    return case.call(estimators[what], optimizer)


def steps_in(seconds: float, config: ModelSpec, task: Task, rows: int, length: int) -> int:
    """Return about how many steps of CD-RGE this machine takes in some seconds, by timing a few."""
    step = prepare("batched", config, Interface.of(task), rows, length)
    step()  # compiles, and fills caches
    calls = max(FEWEST, int(min(TIMING, seconds / 10) / mean_seconds(step, 2)))
    return max(1, int(seconds / mean_seconds(step, calls)))


def memory_over_inference(
    config: ModelSpec,
    task: Task,
    rows: int,
    short: int,
    seconds: float = math.inf,
    measured: Callable[[str, int, int], Any] = lambda *case: None,
) -> dict[str, list[int | None]]:
    """Return bytes over inference at the demo's length and at `LONG`: in place, as trained, by backprop.

    A case that was not started within `seconds` is None, and so is one that would take long and tell little. Each is
    told to `measured` (way, length and peak bytes) when it is known, from any thread.
    """
    peaks: dict[tuple[str, int], int] = {}
    start = time.perf_counter()

    def weigh(case: tuple[str, int]) -> None:
        if time.perf_counter() - start < seconds:
            way, length = case
            call = Prepared(prepare, way, config, Interface.of(task), rows, length)
            peaks[case] = measure(call).peak_bytes
            measured(way, length, peaks[case])

    cases = [(way, LONG) for way in ("inference", "backprop", "probes")]
    cases += [(way, short) for way in ("inference", "backprop", "batched")]
    # Each is a process of its own; on a GPU they are not, and share its allocator.
    with ThreadPoolExecutor(1 if torch.cuda.is_available() else min(2, cores())) as pool:
        list(pool.map(weigh, cases))

    def over(way: str, length: int) -> int | None:
        if (way, length) not in peaks or ("inference", length) not in peaks:
            return None
        return max(0, peaks[way, length] - peaks["inference", length])

    return {way: [over(way, short), over(way, LONG)] for way in ("probes", "batched", "backprop")}


def rows_of(
    task: Text, probes: dict[str, Any], backprop: dict[str, Any], memory: dict[str, list[int | None]]
) -> list[Row]:
    """Return the table: baselines without a model, then both runs."""
    base = task.baselines("valid")
    return [
        Row("unigram entropy", base.unigram),
        Row("bigram entropy", base.bigram),
        Row("gzip -9", base.gzip),
        Row("CD-RGE (forward passes only)", probes["valid_bits"], probes["forward_passes"], probes["total_seconds"],
            memory["batched"]),
        Row("    evaluated in place", math.nan, memory=memory["probes"]),
        Row("backprop (BPTT, AdamW)", backprop["valid_bits"], backprop["forward_passes"], backprop["total_seconds"],
            memory["backprop"]),
    ]  # fmt: skip


def sample(path: Path, length: int = 240) -> str:
    """Return text generated by a run's model."""
    from reroll.train.load import load

    model = load(path)
    prompt = model.tokenizer.encode("The ").tolist()
    return "The " + model.tokenizer.decode(model.generate(prompt, length, 0.7).tolist())
