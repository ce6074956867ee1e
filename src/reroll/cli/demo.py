"""`reroll demo`: train a character LSTM on real text by CD-RGE, then by backpropagation for the same time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reroll.cli.flags import as_flags, parse, run_folder
from reroll.cli.lines import wrapped
from reroll.errors import plural, require_positive
from reroll.recipes import RECIPES
from reroll.specs.base import option
from reroll.train.config import Config, resolve
from reroll.train.run import new_folder

if TYPE_CHECKING:
    from reroll.bench.demo import Row

MEASURING = 40.0
"""Seconds after which no further measurement of memory is started."""
WAYS = {"inference": "inference", "probes": "CD-RGE in place", "batched": "CD-RGE", "backprop": "backprop"}


@dataclass(frozen=True)
class Demo:
    """Train on real text by CD-RGE, then by backprop for the same time, and compare."""

    seconds: float = option(45.0, "training time of each")
    seed: int = option(0, "seed of all randomness")
    run_dir: Path | None = option(None, "folder of the CD-RGE run (default: a new one under runs/)")


def run(command: str, arguments: Sequence[str]) -> int:
    request = parse(Demo, arguments, "reroll demo")
    with as_flags(request):
        require_positive(seconds=request.seconds)
    clock = {"seed": request.seed, "max_seconds": request.seconds, "eval_every": 10**6}
    config = resolve(RECIPES["demo"]().replace(run=clock))
    path = request.run_dir or new_folder("demo")
    about = "Text: the prose of Python's own documentation. Model: a character LSTM. No download."
    first = f"First by CD-RGE, without a backward pass, for about {request.seconds:g} seconds:"
    print(wrapped(f"{about}\n{first}\nTiming a few steps, to plan how many there will be …"), flush=True)
    from reroll.bench.demo import steps_in

    task = config.task.build(request.seed)
    steps = steps_in(request.seconds, config.model, task, config.task.batch, config.task.length)
    planned = f"Planned: {plural(steps, 'step')} of about {_time(request.seconds / steps)}."
    print(wrapped(planned), flush=True)
    schedule = {"kind": "linear", "warmdown": max(1, 3 * steps // 10), "floor": 0.05}
    config = config.replace(run={"steps": steps}, optim={"schedule": schedule})
    with as_flags(request, run_folder(path)):
        probes = _train(config, path)
    if probes["state"] != "done":
        return 1
    used = max(probes["total_seconds"], 1e-9)
    if used < 0.9 * request.seconds:
        planned = f"not {_time(request.seconds)}: a step took {_time(used / steps)}, less than when it was planned"
        print(wrapped(f"{plural(steps, 'step')} took {_time(used)}, {planned}."))
    print(wrapped(f"\nThe same model and data by backpropagation, for the same {_time(used)}:"), flush=True)
    backprop = RECIPES["demo_backprop"]().replace(run=clock | {"steps": 10**6, "max_seconds": used})
    other = _train(backprop, path.with_name(f"{path.name}-backprop"))
    if other["state"] != "done":
        return 1
    about = f"six cases, each in a fresh process; none is begun after {_time(MEASURING)}"
    print(wrapped(f"\nMeasuring memory, {about}:"), flush=True)
    print(_result(config, task, probes, other, path))
    return 0


def _train(config: Config, path: Path) -> dict[str, Any]:
    from reroll.cli.console import Console
    from reroll.train.loop import train

    with Console(config) as console:
        summary = train(config, path, report=console)
        if summary["state"] != "done":
            console.note(console.closing(summary, path))
    return summary


def _result(config: Config, task: Any, probes: dict[str, Any], backprop: dict[str, Any], path: Path) -> str:
    from reroll.bench.demo import LONG, memory_over_inference, rows_of, sample
    from reroll.bench.harness import columns

    def measured(way: str, length: int, peak: int) -> None:
        print(f"    {WAYS[way]} at T={length}: {peak / 1e6:.1f} MB", flush=True)

    memory = memory_over_inference(config.model, task, config.task.batch, config.task.length, MEASURING, measured)
    rows = rows_of(task, probes, backprop, memory)
    table = [["held-out text", "bits", "forwards", "seconds", f"memory* T={config.task.length}", f"T={LONG}"]]
    for row in rows:
        sizes = ["" if size is None else f"{size / 1e6:.1f} MB" for size in row.memory]
        passes = "" if row.forward_passes is None else f"{row.forward_passes:,}"
        seconds = "" if row.seconds is None else f"{row.seconds:.0f}"
        table.append([row.name, "" if math.isnan(row.bits) else f"{row.bits:.3f}", passes, seconds, *sizes])
    return "\n".join(
        [
            columns(table),
            wrapped("bits per character, lower is better; * peak memory of a step over that of inference"),
            *_missing(memory, config.task.length),
            "",
            *map(wrapped, _verdict(rows[3], rows[-1], rows[0].bits, memory)),
            *map(wrapped, _slow(probes["step"], probes["total_seconds"])),
            "",
            "a sample of what the CD-RGE run learned:",
            textwrap.indent(textwrap.fill(" ".join(sample(path).split()), 76), "    "),
            "",
            f"Run folder: {path}. Try next:",
            f"    reroll sample {path} --temperature 0.5",
            "    reroll train text --path FILE        on a text of your own",
        ]
    )


def _missing(memory: dict[str, Any], short: int) -> list[str]:
    """Return a line about the memory that was not measured, if any."""
    from reroll.bench.demo import LONG

    expected = [("backprop", 1), ("probes", 1), ("batched", 0), ("backprop", 0)]
    missing = [f"{WAYS[way]} at T={(short, LONG)[i]}" for way, i in expected if memory[way][i] is None]
    return [f"not measured, for want of time: {', '.join(missing)}"] if missing else []


def _slow(steps: int, seconds: float) -> list[str]:
    """Return why there were few steps where each took more than twice as long as usual, and what to do."""
    from reroll.bench.demo import USUAL

    if 2 * steps > USUAL[0] or seconds / steps < 2 * USUAL[1] / USUAL[0]:
        return []
    taken = f"it took {plural(steps, 'step')} of CD-RGE in {_time(seconds)}"
    usual = f"where the README's figures are of {USUAL[0]} in {USUAL[1]:.0f}"
    enough = 60 * math.ceil(USUAL[0] * seconds / steps / 60)
    return [f"This machine is slow or busy: {taken}, {usual}; to take as many: reroll demo --seconds {enough}"]


def _time(seconds: float) -> str:
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"


def _verdict(probes: Row, backprop: Row, unigram: float, memory: dict[str, Any]) -> list[str]:
    """Return the result in sentences."""
    names = {"CD-RGE": probes, "backprop": backprop}
    first, second = sorted(names, key=lambda name: names[name].bits)
    times = [_time(row.seconds or 0.0) for row in names.values()]
    if times[0] == times[1]:
        reached = f"In the same {times[0]} {first} reached {names[first].bits:.3f} bits and {second} "
        reached += f"{names[second].bits:.3f}."
    else:
        reached = f"CD-RGE reached {probes.bits:.3f} bits in {times[0]}, backprop {backprop.bits:.3f} in {times[1]}."
    lines = [f"{reached} CD-RGE is {'below' if probes.bits < unigram else 'NOT below'} the unigram entropy."]
    short, long = memory["backprop"]
    if short is not None and long is not None:
        lines.append(f"Backprop's memory grew from {short / 1e6:.0f} to {long / 1e6:.0f} MB with the sequence.")
    lines.append(
        "CD-RGE is for sequences and models that do not fit into memory, losses without a gradient, and hardware that "
        "only does inference."
    )
    return lines
