"""Losses and scores in words: their units, what they average over, and what is reached without training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SQUARED = "(mean squared error, of standardised values)"
EXACT = "exact: the share of sequences in which every scored output is right"


def loss_unit(task: Any) -> str:
    """Return what a task's loss is measured in, to follow a number; empty for a loss of one's own."""
    from reroll.data.task import loss_unit as of

    unit = of(task)
    return unit if unit in ("", "nats") else SQUARED if hasattr(task, "std") else f"({unit})"


def outputs_of(task: Any) -> str:
    """Return what a task's loss is the mean over."""
    if getattr(task, "readout", "every") != "every":
        return "series"
    return "rows" if getattr(task, "vocab", None) is None else "symbols"


def in_words(scores: Mapping[str, float], unit: str, digits: int = 4) -> str:
    """Return scores on one line, the loss with its unit."""
    parts = [f"{name} {value:.{digits}g}" for name, value in scores.items()]
    return "  ".join(f"{part} {unit}" if unit and part.startswith("loss ") else part for part in parts)


def without_training(task: Any, split: str) -> str:
    """Return what rules without training reach, on one line; empty for a task that has none."""
    from reroll.data.text import Baselines

    rules = getattr(task, "baselines", None)
    if rules is None:
        return ""
    reached = rules(split)
    what = "loss"
    if isinstance(reached, Baselines):
        what, reached = "bits per symbol", {name: getattr(reached, name) for name in ("unigram", "bigram", "gzip")}
    return f"{what} without training: " + "  ".join(f"{rule} {loss:.4g}" for rule, loss in reached.items())
