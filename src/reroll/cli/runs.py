"""`reroll runs [DIR]`: one table of every run under a folder. `reroll runs stop NAME`: stop one; it saves first."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.cli.flags import flag_fields, parse, positional
from reroll.errors import RunError, UsageError, visible
from reroll.specs.base import leaves, option
from reroll.train.records import ROOT, Tally, find, find_run, holder, read_config, read_json


@dataclass(frozen=True)
class Runs:
    folder: Path = positional("the folder whose runs are listed, however deep", ROOT)
    follow: bool = option(False, "show the table again every two seconds, until Ctrl-C")
    json: bool = option(False, "print one JSON list instead of a table")


@dataclass(frozen=True)
class Stop:
    name: str = positional("a run folder, or the name of one under runs/")
    wait: float = option(60.0, "seconds to wait until it has saved and ended")


def run(command: str, arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "stop":
        return _stop(parse(Stop, arguments[1:], "reroll runs stop", "Ask a running run to save and end."))
    request = parse(Runs, arguments, "reroll runs", "List every run under a folder. See also: reroll runs stop NAME.")
    if not request.folder.is_dir():
        raise UsageError(f"folder {request.folder} does not exist; give the folder your runs are in.")
    if request.json:
        print(json.dumps(tell_apart(find(request.folder)), indent=2))
        return 0
    if request.follow:
        return _follow(request.folder)
    rows, width = tell_apart(find(request.folder)), _console().width
    # A name that is wider than the line is printed all the same: it is there to be copied.
    _console(fitting(rows, width)[1]).print(table(rows, width))
    return 0


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "run": lambda row: visible(row["name"]),
    "state": lambda row: visible(row["state"]),
    "step": lambda row: f"{row['step']}/{row['steps'] or '?'}",
    "loss": lambda row: _number(row["loss"]),
    "best": lambda row: _number(row["best"]),
    "held-out": lambda row: _number(row["valid_loss"]),
    "time": lambda row: _time(row["seconds"]),
    "memory": lambda row: _memory(row["peak_bytes"]),
    "to go": lambda row: _time(row["seconds_left"]),
    "differs": lambda row: visible(" ".join(f"{name}={value}" for name, value in row["differs"].items())),
}
"""Columns of the table, and what is in them."""
DISPENSABLE = ("memory", "best", "time", "to go", "held-out", "loss")
"""Columns that make room where a line is too narrow for all of them, the first of them first."""
COLOURS = {"running": "green", "done": "default", "dead": "red", "diverged": "red", "failed": "red"}


def tell_apart(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to every run the values of the flags, as in `reroll train`, that are not the same in all of them."""
    configs = []
    for row in rows:
        values = {}
        with contextlib.suppress(UsageError):  # a config that cannot be read tells nothing
            values = leaves(read_config(Path(row["path"])))
        configs.append(values)
    flags = {"recipe": "recipe"} | {flag: dotted for flag, (dotted, *_) in flag_fields().items() if flag != "threads"}
    flags = {flag: flags[flag] for flag in ("cell", "gradient", "optimizer", "lr", *flags)}
    for row, values in zip(rows, configs):
        differing = {f: d for f, d in flags.items() if d in values and any(c.get(d) != values[d] for c in configs)}
        row["differs"] = {flag: values[dotted] for flag, dotted in differing.items()}
    return rows


def fitting(rows: list[dict[str, Any]], width: int) -> tuple[list[str], int]:
    """Return the columns that fit into a line of some width, and how wide they are; what tells runs apart stays."""
    from rich.cells import cell_len

    wide = {name: max(map(cell_len, [name, *map(content, rows)])) for name, content in COLUMNS.items()}
    if any(row["differs"] for row in rows):
        wide["differs"] = min(wide["differs"], width // 3)
    else:
        del wide["differs"]
    for name in DISPENSABLE:
        if sum(wide.values()) + len(wide) - 1 > width:
            del wide[name]
    return list(wide), sum(wide.values()) + len(wide) - 1


def table(rows: list[dict[str, Any]], width: int) -> Any:
    """Return the rows as a table for lines of some width."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    names = fitting(rows, width)[0] if rows else list(COLUMNS)
    for name in names:
        left = "left" if name in ("run", "state", "differs") else "right"
        most = width // 3 if name == "differs" else None
        shown.add_column(name, justify=left, no_wrap=bool(rows), max_width=most, overflow="ellipsis")
    for row in rows:
        # As Text: in a plain string, brackets in the name of a folder would be markup.
        colours = {"state": COLOURS.get(row["state"], "yellow")}
        shown.add_row(*(Text(COLUMNS[name](row), colours.get(name, "")) for name in names))
    if not rows:
        shown.add_row("no runs here yet: reroll train")
    return shown


def _console(least: int = 0) -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, least)
    return console


def _follow(folder: Path) -> int:
    from rich.live import Live

    tallies: dict[Path, Tally] = {}
    with contextlib.suppress(KeyboardInterrupt):
        console = _console()
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(table(tell_apart(find(folder, tallies)), console.width), refresh=True)
                time.sleep(2)
    return 0


def _stop(request: Stop) -> int:
    path = find_run(request.name)
    pid = holder(path)
    if not pid:
        state = read_json(path / "status.json").get("state", "unknown")
        why = f"state {state}" if pid is None else "its lock names no process that has it"
        raise UsageError(visible(f"{path} is not running on this machine, as a process of yours ({why})."))
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + request.wait
    while time.monotonic() < deadline:
        if holder(path) is None:
            now = read_json(path / "status.json")
            how = f"{now.get('state')} at step {now.get('step')}"
            print(visible(f"{path}: {how}. Go on: reroll train --run-dir {path} --resume"))
            return 0
        time.sleep(0.1)
    raise RunError(f"{path} has not ended after {request.wait:g} seconds; it was asked to, and ends after its step.")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _memory(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f} MB"
