"""What is shown while a run trains: a live bar on a terminal, elsewhere a plain line every few seconds."""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from reroll.cli.flags import in_flags
from reroll.cli.lines import wrapped
from reroll.cli.scores import EXACT, SQUARED, in_words, loss_unit, without_training
from reroll.errors import RerollError, visible
from reroll.specs.task import Generated
from reroll.train.config import Config
from reroll.train.loop import Reporter
from reroll.train.rates import mean_mfu
from reroll.train.records import read_metrics
from reroll.train.session import Session

WIDE = 100
"""Characters of a line that has room for a longer bar."""
EVERY = 10.0
"""Seconds between lines without a terminal."""
BLOCKS = "▁▂▃▄▅▆▇█"


class Console(Reporter):
    """A reporter for `reroll.train.loop.train`."""

    def __init__(self, config: Config):
        self.config, self.terminal = config, Terminal(highlight=False, soft_wrap=True, emoji=False)
        self.live = self.terminal.is_terminal
        self.losses = Sparkline()
        self.valid: dict[str, Any] = {}
        self.last_line = 0.0
        self.first: tuple[float, float, int] | None = None
        self.bar: Progress | None = None
        self.job: Any = None
        self.task: Any = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def start(self, session: Session) -> None:
        """Remember the task, which knows the units of the losses."""
        self.task = session.task

    def note(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        text = wrapped(visible(in_flags(line)))
        (self.bar.console if self.bar is not None else self.terminal).print(text, markup=False)

    def step(self, row: dict[str, Any], config: Config) -> None:
        """Show a step."""
        self.losses.add(row["loss"])
        if self.first is None:
            self.first = time.monotonic(), row.get("total_seconds", 0.0), row["step"]
        self.valid = {name: value for name, value in row.items() if name.startswith("valid_")} or self.valid
        if self.live:
            self._update_bar(row, config)
        elif time.monotonic() - self.last_line >= EVERY or row["step"] + 1 == config.run.steps:
            self.last_line = time.monotonic()
            self.note(f"step {_of(row['step'] + 1, config)}  {self._text(row)}")

    def closing(self, summary: dict[str, Any], path: Path) -> str:
        """Return the last lines of a run: how it ended, its scores, what to try next."""
        lines = [f"{summary['state']}: {summary['reason']}"]
        valid = {n.removeprefix("valid_"): v for n, v in summary.items() if n.startswith("valid_")}
        scores = {name: value for name, value in valid.items() if isinstance(value, float)}
        if scores and self.task is None:  # a run that was finished before: read its data, if they are still there
            with suppress(RerollError):
                self.task = self.config.task.build(self.config.run.seed)
        if scores:
            lines.append(f"held-out {in_words(scores, self._unit(scores))}")
        if "exact" in scores:
            lines.append(EXACT)
        if self.task is not None and self.task.splits and (rules := without_training(self.task, self.task.splits[0])):
            lines.append(f"held-out {rules}")
        real = self.config.task.kind == "arrays" if self.task is None else getattr(self.task, "inputs", None)
        if speed := _speed(summary, path, "rows" if real else "tokens"):
            lines.append(speed)
        if summary["state"] == "done":
            lines.append(f"run folder {path}; try: reroll eval {path}")
        return visible("\n".join(lines))

    def _unit(self, scores: dict[str, float]) -> str:
        if self.task is not None:
            return loss_unit(self.task)
        return "nats" if "bits" in scores else SQUARED if self.config.task.kind == "arrays" else ""

    def _update_bar(self, row: dict[str, Any], config: Config) -> None:
        bar = 12 if self.terminal.width >= WIDE else 6
        if self.bar is None:
            # A terminal too narrow for a word of the text cuts that, and never the step, the bar or the time left.
            text = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
            columns = (TextColumn("{task.fields[step]}"), BarColumn(bar), TextColumn("{task.fields[left]}"), text)
            self.bar = Progress(*columns, console=self.terminal, expand=True)
            self.bar.start()
            self.job = self.bar.add_task("", total=1.0, step="", left="")
        step, (share, left) = _of(row["step"] + 1, config), self.remaining(row, config)
        text = self._text(row, str(self.losses), self.terminal.width - len(step) - bar - len(left) - 3)
        self.bar.update(self.job, completed=share, step=step, left=left, description=text)

    def remaining(self, row: dict[str, Any], config: Config) -> tuple[float, str]:
        """Return the share of the run that is done, and the time left, by its steps or its seconds."""
        run, done, trained = config.run, row["step"] + 1, row.get("total_seconds", 0.0)
        share = done / run.steps
        if run.max_seconds is not None:
            share = min(max(share, trained / run.max_seconds), 1.0)
        if self.first is None or done - 1 == self.first[2]:
            return share, "-:--:-- left"
        start, before, first = self.first
        wall = time.monotonic() - start
        left = wall / (done - 1 - first) * (run.steps - done)
        if run.max_seconds is not None and trained > before:
            left = min(left, wall / (trained - before) * max(run.max_seconds - trained, 0.0))
        hours, seconds = divmod(round(left), 3600)
        return share, f"{hours}:{seconds // 60:02d}:{seconds % 60:02d} left"

    def _text(self, row: dict[str, Any], losses: str = "", room: float = math.inf) -> str:
        """Return the average loss of the last ten steps or so, the last held-out score, and what else has room."""
        loss, valid, task = row.get("loss_fast", row["loss"]), self.valid, self.config.task
        symbols = isinstance(task, Generated) or getattr(self.task, "categorical", "valid_bits" in valid)
        if task.kind == "text":
            parts = [f"loss {loss / math.log(2):.3f} bits"]
        elif symbols:
            parts = [f"loss {loss:.3f} nats"]
        else:
            parts = [f"squared error {loss:.3f}" if task.kind == "arrays" else f"loss {loss:.3f}"]
        if "valid_bits" in valid and task.kind == "text":
            parts.append(f"held-out {valid['valid_bits']:.3f}")
        elif "valid_accuracy" in valid:
            parts.append(f"held-out accuracy {valid['valid_accuracy']:.3f}")
        elif "valid_loss" in valid:
            parts.append(f"held-out {valid['valid_loss']:.3f}")
        if row.get("rollout_iterations"):
            parts.append(f"{row['rollout_iterations']} iterations")
            if row.get("rollout_fell_back"):
                parts.append(f"{row['rollout_fell_back']} sequences fell back to the loop")
        if "seconds" in row:
            parts.append(f"{row['seconds']:.3g} s/step")
        if losses:
            parts.append(losses)
        text = parts[0]
        for part in parts[1:]:
            text += f"  {part}" if len(text) + 2 + len(part) <= room else ""
        return text


def _speed(summary: dict[str, Any], path: Path, unit: str) -> str:
    """Return the mean speed of a run, its peak memory, and what else is known: the share of the peak, the cost."""
    seconds = summary.get("total_seconds") or 0.0
    if not (seconds and "tokens" in summary):
        return ""
    parts = [f"{summary['tokens'] / seconds:,.0f} {unit}/s"]
    if "mfu" in summary and (mfu := mean_mfu(read_metrics(path))) is not None:
        parts.append(f"MFU {mfu:.1%}")
    if summary.get("peak_bytes"):
        parts.append(f"{summary['peak_bytes'] / 1e9:.2f} GB")
    if "dollars" in summary:
        parts.append(f"${summary['dollars']:.2f}")
    return f"in {seconds:,.0f} s of training: {', '.join(parts)}"


def _of(step: int, config: Config) -> str:
    """Return a step of all; where only the clock ends a run, of none."""
    by_clock = config.run.max_seconds is not None and config.run.steps >= 10**6
    return f"{step}" if by_clock else f"{step}/{config.run.steps}"


class Sparkline:
    """A series of any length as a line of blocks; neighbours are averaged once there are more than fit.

    Args:
        width: maximum number of blocks.

    Example:
        >>> line = Sparkline(width=3)
        >>> for value in (4.0, 2.0, 2.0, 2.0, 1.0, 1.0):
        ...     line.add(value)
        >>> str(line)
        '█▅▁'
    """

    def __init__(self, width: int = 24):
        self.width, self.stride = width, 1
        self.means: list[float] = []
        self.rest: list[float] = []

    def add(self, value: float) -> None:
        """Append a value; non-finite ones are dropped."""
        if not math.isfinite(value):
            return
        self.rest.append(value)
        if len(self.rest) == self.stride:
            self.means.append(sum(self.rest) / self.stride)
            self.rest = []
        if len(self.means) > self.width:
            pairs = zip(self.means[::2], self.means[1::2])
            odd = self.means[-1:] if len(self.means) % 2 else []
            self.means, self.stride = [(a + b) / 2 for a, b in pairs], 2 * self.stride
            self.rest = odd * (self.stride // 2)

    def __str__(self) -> str:
        low, high = min(self.means, default=0.0), max(self.means, default=0.0)
        if not high > low:
            return BLOCKS[0] * len(self.means)
        return "".join(BLOCKS[min(7, round(7 * (mean - low) / (high - low)))] for mean in self.means)
