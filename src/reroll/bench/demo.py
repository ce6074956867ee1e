"""What the demo compares: CD-RGE and backpropagation on the same model, data and wall time; and their memory.

Memory is the peak of a step above that of plain inference, each in a fresh process: at the demo's sequence length,
where it hardly matters, and at a long one, where backpropagation has to keep every step and probes do not. The demo
trains in the faster batched evaluation, whose copies are measured at its own length; the lean one is in place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reroll.data.batch import Batch
from reroll.data.task import Task, sequence_losses
from reroll.data.text import Text
from reroll.grad import Backprop, CentralDifference
from reroll.keys import Key
from reroll.models import Interface, Recurrent
from reroll.optim import build_optimizer, step
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


class Weigh:
    """A step, or plain inference, of the demo's model on random symbols; built at the first call."""

    def __init__(self, what: str, config: ModelSpec, sizes: Interface, rows: int, time: int):
        self.what, self.config, self.sizes, self.rows, self.time = what, config, sizes, rows, time
        self.built: tuple[Recurrent, Batch, Any] | None = None

    def __call__(self) -> None:
        if self.built is None:
            model = build_model(self.config, self.sizes, 0)
            ids = torch.randint(self.sizes.outputs, (self.rows, self.time + 1))
            mask = torch.ones(self.rows, self.time, dtype=torch.bool)
            batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask)
            name = "adamw" if self.what == "backprop" else "sgd"
            self.built = model, batch, build_optimizer(name, model, 1e-6, momentum=0.0)
        model, batch, optimizer = self.built
        if self.what == "inference":
            with torch.no_grad():
                sequence_losses(model, batch)
        elif self.what == "backprop":
            step(model, sequence_losses, Backprop(), optimizer, batch, None, Key(0))
        else:
            lean = self.what == "probes"
            estimator = CentralDifference(4 if lean else 96, 0.01, evaluate="in_place" if lean else "auto")
            step(model, sequence_losses, estimator, optimizer, batch, None, Key(0), update="fused")


def steps_in(seconds: float, config: ModelSpec, task: Task, rows: int, time_steps: int) -> int:
    """Return about how many steps of CD-RGE this machine takes in some seconds, from a step that is timed."""
    step = Weigh("batched", config, Interface.of(task), rows, time_steps)
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
                peaks[way, length] = measure(Weigh(way, config, Interface.of(task), rows, length), warmup=1).peak_bytes

    def over(way: str, length: int) -> int | None:
        known = (way, length) in peaks and ("inference", length) in peaks
        return max(0, peaks[way, length] - peaks["inference", length]) if known else None

    return {way: [over(way, short), over(way, LONG)] for way in ("probes", "batched", "backprop")}


def rows_of(
    task: Text, probes: dict[str, Any], backprop: dict[str, Any], memory: dict[str, list[int | None]]
) -> list[Row]:
    """Return the table: both runs below what needs no model."""
    base = task.baselines("valid")
    return [
        Row("unigram entropy of the held-out text", base.unigram),
        Row("bigram entropy of the held-out text", base.bigram),
        Row("gzip -9 of the held-out text", base.gzip),
        Row("CD-RGE (forward passes only)", probes["valid_bits"], probes["forward_passes"], probes["total_seconds"],
            memory["batched"]),
        Row("    the same, evaluated in place", math.nan, memory=memory["probes"]),
        Row("backprop (BPTT, AdamW)", backprop["valid_bits"], backprop["forward_passes"], backprop["total_seconds"],
            memory["backprop"]),
    ]  # fmt: skip


def sample(path: Path, length: int = 240) -> str:
    """Return some text that a run's model makes up."""
    from reroll.train.load import load

    model = load(path)
    prompt = model.tokenizer.encode("The ").tolist()
    return "The " + model.tokenizer.decode(model.generate(prompt, length, 0.7).tolist())
