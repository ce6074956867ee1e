"""What the demo compares: CD-RGE and backpropagation on the same model, data and wall time; and their memory.

Memory is the peak of a step above that of plain inference, each in a fresh process: at the demo's sequence length,
where it hardly matters, and at a long one, where backpropagation has to keep every step and probes do not. The demo
trains in the faster batched evaluation, whose copies are measured at its own length; the lean one is in place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.bench.cases import Case, symbols
from reroll.bench.harness import Prepared
from reroll.data.task import Task
from reroll.data.text import Text
from reroll.grad import Backprop, CentralDifference
from reroll.models import Interface
from reroll.optim import build_optimizer
from reroll.specs.model import ModelSpec
from reroll.train.load import build_model
from reroll.train.measure import measure

LONG = 2048
"""Steps of the long sequences."""


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    name: str
    bits: float
    forward_passes: int | None = None
    seconds: float | None = None
    memory: Sequence[int | None] = (None, None)


def prepare(what: str, config: ModelSpec, sizes: Interface, rows: int, length: int) -> Callable[[], Any]:
    """Return a step, or plain inference, of the demo's model on random symbols, as a call."""
    case = Case(build_model(config, sizes, 0), symbols(sizes.outputs, rows, length))
    if what == "inference":
        return case.forward
    estimators: dict[str, Any] = {
        "backprop": Backprop(),
        "probes": CentralDifference(4, 0.01, evaluate="in_place"),
        "batched": CentralDifference(96, 0.01),
    }
    options: dict[str, Any] = {} if what == "backprop" else {"momentum": 0.0}
    optimizer = build_optimizer("adamw" if what == "backprop" else "sgd", case.model, 1e-6, **options)
    return lambda: case.step(estimators[what], optimizer)


def steps_in(seconds: float, config: ModelSpec, task: Task, rows: int, length: int) -> int:
    """Return about how many steps of CD-RGE this machine takes in some seconds, from a step that is timed."""
    step = prepare("batched", config, Interface.of(task), rows, length)
    step()  # compiles, and fills caches
    began = time.perf_counter()
    step()
    return max(1, int(seconds / (time.perf_counter() - began)))


def memory_over_inference(
    config: ModelSpec, task: Task, rows: int, short: int, seconds: float = math.inf
) -> dict[str, list[int | None]]:
    """Return bytes above plain inference at the demo's length and at `LONG`: in place, as trained, by backprop.

    What is not begun after `seconds` is None, and so is what would take long and says little.
    """
    peaks: dict[tuple[str, int], int] = {}
    began = time.perf_counter()
    for length, ways in ((LONG, ("inference", "backprop", "probes")), (short, ("inference", "backprop", "batched"))):
        for way in ways:
            if time.perf_counter() - began < seconds:
                call = Prepared(prepare, way, config, Interface.of(task), rows, length)
                peaks[way, length] = measure(call).peak_bytes

    def over(way: str, length: int) -> int | None:
        if (way, length) not in peaks or ("inference", length) not in peaks:
            return None
        return max(0, peaks[way, length] - peaks["inference", length])

    return {way: [over(way, short), over(way, LONG)] for way in ("probes", "batched", "backprop")}


def rows_of(
    task: Text, probes: dict[str, Any], backprop: dict[str, Any], memory: dict[str, list[int | None]]
) -> list[Row]:
    """Return the table: both runs below what needs no model."""
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
    """Return some text that a run's model makes up."""
    from reroll.train.load import load

    model = load(path)
    prompt = model.tokenizer.encode("The ").tolist()
    return "The " + model.tokenizer.decode(model.generate(prompt, length, 0.7).tolist())
