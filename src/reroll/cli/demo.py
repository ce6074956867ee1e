"""`reroll demo`: a character LSTM learns real text by CD-RGE, then by backpropagation in the same time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.cli.flags import parse
from reroll.recipes import RECIPES
from reroll.train.config import Config, resolve
from reroll.train.run import new_folder


@dataclass(frozen=True)
class Demo:
    steps: int = RECIPES["demo"]().run.steps
    """steps of CD-RGE; backprop gets the same time"""
    seed: int = 0
    """names all randomness"""
    run_dir: Path | None = None
    """the folder of the CD-RGE run; none: a new name under runs/"""


def run(command: str, arguments: Sequence[str]) -> int:
    request = parse(Demo, arguments, "reroll demo", "Train on real text by CD-RGE, and by backprop in the same time.")
    config = resolve(RECIPES["demo"]().replace(run={"steps": request.steps, "seed": request.seed}))
    path = request.run_dir or new_folder("demo")
    print("Text: the prose of this Python's own documentation. Model: an LSTM of characters. No download, no backward.")
    probes = _train(config, path)
    if probes["state"] != "done":
        return 1
    print(f"\nThe same model and data by backpropagation, for the same {probes['total_seconds']:.0f} seconds:")
    backprop = RECIPES["demo_backprop"]().replace(
        run={"seed": request.seed, "max_seconds": probes["total_seconds"], "steps": 10**6, "eval_every": 10**6}
    )
    other = _train(backprop, path.with_name(f"{path.name}-backprop"))
    if other["state"] != "done":
        return 1
    print("\nWeighing both, in fresh processes …")
    print(_result(config, probes, other, path))
    return 0


def _train(config: Config, path: Path) -> dict[str, Any]:
    from reroll.cli.console import Console
    from reroll.train.loop import train

    with Console(config) as console:
        summary = train(config, path, report=console)
        if summary["state"] != "done":
            console.note(console.farewell(summary, path))
    return summary


def _result(config: Config, probes: dict[str, Any], backprop: dict[str, Any], path: Path) -> str:
    from rich.console import Console as Terminal
    from rich.table import Table

    from reroll.bench.demo import LONG, memory_over_inference, rows_of, sample
    from reroll.data.text import Text

    task = config.task.build(config.run.seed)
    assert isinstance(task, Text)
    memory = memory_over_inference(config.model, task, config.task.batch, config.task.length)
    rows = rows_of(task, probes, backprop, memory)
    table = Table(title="held-out text, bits per character (less is better)", title_justify="left", box=None)
    table.add_column("")
    for name in ("bits", "forward passes", "seconds", f"memory* T={config.task.length}", f"memory* T={LONG}"):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = ["", ""] if row.memory is None else [f"{size / 1e6:.1f} MB" for size in row.memory]
        passes = "" if row.forward_passes is None else f"{row.forward_passes:,}"
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        table.add_row(row.name, "" if math.isnan(row.bits) else f"{row.bits:.3f}", passes, seconds, *sizes)
    terminal = Terminal(width=110, highlight=False)
    with terminal.capture() as captured:
        terminal.print(table)
    short, long = memory["backprop"]
    beaten = "below" if rows[3].bits < rows[0].bits else "NOT below"
    return "\n".join(
        [
            captured.get().rstrip(),
            "* peak of a step above that of plain inference; the demo's batched evaluation trades memory for speed",
            "",
            f"CD-RGE is {beaten} the unigram entropy. Backprop learns faster where it fits: take it while there is",
            "memory and the loss has a gradient. Take CD-RGE for sequences or models that do not fit, for losses",
            f"without a gradient, on hardware that only infers: backprop's memory grew from {short / 1e6:.0f} to "
            f"{long / 1e6:.0f} MB with the sequence.",
            "",
            "a sample of what it learned:",
            textwrap.indent(textwrap.fill(" ".join(sample(path).split()), 100), "    "),
            "",
            f"run folder: {path}   (try: reroll sample {path} --temperature 0.5, reroll show {path})",
        ]
    )
