"""What a person sees while a run trains: a live bar on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from reroll.train.config import Config

EVERY = 10.0
"""Seconds between lines where there is no terminal."""
BLOCKS = "▁▂▃▄▅▆▇█"


class Console:
    """A reporter for `reroll.train.loop.train`."""

    def __init__(self, config: Config):
        self.config, self.terminal = config, Terminal(highlight=False, soft_wrap=True, emoji=False)
        self.live = self.terminal.is_terminal
        self.losses: list[float] = []
        self.valid: dict[str, Any] = {}
        self.spoke = 0.0
        self.bar: Progress | None = None
        self.job: Any = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def note(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        (self.bar.console if self.bar is not None else self.terminal).print(line, markup=False)

    def step(self, row: dict[str, Any], config: Config) -> None:
        """Show a step."""
        self.losses.append(row["loss"])
        self.valid = {name: value for name, value in row.items() if name.startswith("valid_")} or self.valid
        if self.live:
            self._advance(row, config)
        elif time.monotonic() - self.spoke >= EVERY or row["step"] + 1 == config.run.steps:
            self.spoke = time.monotonic()
            self.note(f"step {row['step'] + 1}/{config.run.steps}  {self._words(row)}")

    def farewell(self, summary: dict[str, Any], path: Path) -> str:
        """Return what is said at the end."""
        lines = [f"{summary['state']}: {summary['reason']}"]
        valid = [(name, value) for name, value in summary.items() if name.startswith("valid_")]
        if valid:
            words = (f"{name.removeprefix('valid_')} {value:.4g}" for name, value in valid if isinstance(value, float))
            lines.append("held-out " + "  ".join(words))
        if summary["state"] == "done":
            lines.append(f"run folder {path}; try: reroll eval {path}")
        return "\n".join(lines)

    def _advance(self, row: dict[str, Any], config: Config) -> None:
        if self.bar is None:
            columns = (BarColumn(24), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=self.terminal, transient=False)
            self.bar.start()
            self.job = self.bar.add_task("", total=config.run.steps, completed=row["step"])
        self.bar.update(
            self.job, completed=row["step"] + 1, description=f"{self._words(row)}  {sparkline(self.losses)}"
        )

    def _words(self, row: dict[str, Any]) -> str:
        parts = [f"loss {row.get('loss_fast', row['loss']):.3f}"]
        if "valid_bits" in self.valid and self.config.task.name == "text":
            parts.append(f"held-out {self.valid['valid_bits']:.3f} bits")
        elif "valid_accuracy" in self.valid:
            parts.append(f"held-out accuracy {self.valid['valid_accuracy']:.3f}")
        elif "valid_loss" in self.valid:
            parts.append(f"held-out loss {self.valid['valid_loss']:.3f}")
        if row.get("rollout_iterations"):
            parts.append(f"{row['rollout_iterations']} iterations")
            if row.get("rollout_fell_back"):
                parts.append(f"{row['rollout_fell_back']} sequences fell back to the loop")
        if "seconds" in row:
            parts.append(f"{row['seconds']:.3g} s/step")
        return "  ".join(parts)


def sparkline(values: list[float], width: int = 24) -> str:
    """Return a line of blocks for a series, averaged into `width` pieces.

    Example:
        >>> sparkline([3.0, 2.0, 1.0], width=3)
        '█▅▁'
    """
    values = [value for value in values if math.isfinite(value)]
    count = min(width, len(values))
    pieces = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    means = [sum(piece) / len(piece) for piece in pieces]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if not high > low:
        return BLOCKS[0] * count
    return "".join(BLOCKS[min(7, round(7 * (mean - low) / (high - low)))] for mean in means)
