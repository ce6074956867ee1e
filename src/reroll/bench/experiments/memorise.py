"""Memorising nine symbols by CD-RGE: steps to a loss below 0.1. The recipe `memorise`, with three seeds."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

from reroll.recipes import RECIPES
from reroll.train.loop import train
from reroll.train.records import read_metrics

SEEDS = 3


def measure(full: bool) -> dict[str, Any]:
    """Return the losses by seed, and `steps`, those of the slowest; `full` changes nothing."""
    losses = []
    for seed in range(SEEDS):
        with tempfile.TemporaryDirectory(prefix="reroll-reproduce-") as folder:
            train(RECIPES["memorise"]().replace(run={"seed": seed}), Path(folder, "run"))
            losses.append([row["loss"] for row in read_metrics(Path(folder, "run"))])
    steps = [next((step for step, loss in enumerate(of_seed) if loss < 0.1), math.inf) for of_seed in losses]
    return {"losses": losses, "steps_by_seed": steps, "steps": max(steps)}


def holds(result: dict[str, Any]) -> bool:
    return result["steps"] <= 20


def report(result: dict[str, Any]) -> str:
    lines = [f"seed {seed}: " + "  ".join(f"{x:.3g}" for x in losses) for seed, losses in enumerate(result["losses"])]
    return "\n".join([*lines, f"below 0.1 at steps {result['steps_by_seed']}"])
