"""`reroll runs [DIR]`: one table of every run under a folder. `reroll runs stop NAME`: stop one; it saves first."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from reroll.cli.flags import parse
from reroll.errors import RunError, UsageError
from reroll.train.run import ROOT, is_alive, read_json, read_metrics


@dataclass(frozen=True)
class Runs:
    folder: Annotated[Path, tyro.conf.Positional] = ROOT
    """the folder whose runs are listed, however deep"""
    follow: bool = False
    """show the table again every two seconds, until Ctrl-C"""
    json: bool = False
    """print one JSON list instead of a table"""


@dataclass(frozen=True)
class Stop:
    name: Annotated[str, tyro.conf.Positional]
    """a run folder, or the name of one under runs/"""
    wait: float = 60.0
    """seconds to wait until it has saved and ended"""


def run(command: str, arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "stop":
        return _stop(parse(Stop, arguments[1:], "reroll runs stop", "Ask a running run to save and end."))
    request = parse(Runs, arguments, "reroll runs", "List every run under a folder. See also: reroll runs stop NAME.")
    if not request.folder.is_dir():
        raise UsageError(f"folder {request.folder} does not exist; give the folder your runs are in.")
    if request.json:
        print(json.dumps(find(request.folder), indent=2))
        return 0
    if request.follow:
        return _follow(request.folder)
    rows, width = find(request.folder), _console().width
    # A name that is wider than the line is printed all the same: it is there to be copied.
    _console(fitting(rows, width)[1]).print(table(rows, width))
    return 0


def find(folder: Path) -> list[dict[str, Any]]:
    """Return a row for every run under a folder, newest first."""
    configs = [path for path in folder.rglob("config.toml") if (path.parent / "environment.json").exists()]
    return [row_of(path.parent, folder) for path in sorted(configs, key=_age)]


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # it was deleted meanwhile
        return math.inf


def row_of(path: Path, root: Path) -> dict[str, Any]:
    """Return what is known of a run: state, step, losses, seconds, memory, time to go."""
    status = read_json(path / "status.json")
    rows = list(read_metrics(path))
    state = str(status.get("state", "unknown"))
    if state == "running" and not is_alive(status):
        state = "dead"
    last = rows[-1] if rows else {}
    losses, valid, recent = _numbers(rows, "loss"), _numbers(rows, "valid_loss"), _numbers(rows[-20:], "seconds")
    step, steps = (last["step"] + 1 if last else 0), _last(_numbers([status], "steps"))
    left = (steps - step) * sum(recent) / len(recent) if state == "running" and recent and steps else None
    return {
        "name": str(path.relative_to(root)) if path != root else path.name, "path": str(path), "state": state,
        "step": step, "steps": steps, "loss": _last(losses), "best": min(losses, default=None),
        "valid_loss": _last(valid), "seconds": _last(_numbers([last], "total_seconds")),
        "peak_bytes": _last(_numbers([last], "peak_bytes")), "seconds_left": left,
    }  # fmt: skip


def _numbers(rows: list[dict[str, Any]], name: str) -> list[Any]:
    """The finite numbers of this name; a record may be damaged, and a loss that diverged is not finite."""
    values = [row.get(name) for row in rows]
    return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e300]


def _last(values: list[Any]) -> Any:
    return values[-1] if values else None


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "run": lambda row: row["name"],
    "state": lambda row: row["state"],
    "step": lambda row: f"{row['step']}/{row['steps'] or '?'}",
    "loss": lambda row: _number(row["loss"]),
    "best": lambda row: _number(row["best"]),
    "held-out": lambda row: _number(row["valid_loss"]),
    "time": lambda row: _time(row["seconds"]),
    "memory": lambda row: _memory(row["peak_bytes"]),
    "to go": lambda row: _time(row["seconds_left"]),
}
"""Columns of the table, and what is in them."""
DISPENSABLE = ("memory", "best", "time", "to go", "held-out", "loss")
"""Columns that make room where a line is too narrow for all of them, the first of them first."""
COLOURS = {"running": "green", "done": "default", "dead": "red", "diverged": "red", "failed": "red"}


def fitting(rows: list[dict[str, Any]], width: int) -> tuple[list[str], int]:
    """Return the columns that fit into a line of some width, and how wide they are; what tells runs apart stays."""
    from rich.cells import cell_len

    wide = {name: max(map(cell_len, [name, *map(content, rows)])) for name, content in COLUMNS.items()}
    for name in DISPENSABLE:
        if sum(wide.values()) + len(wide) - 1 > width:
            del wide[name]
    return list(wide), sum(wide.values()) + len(wide) - 1


def table(rows: list[dict[str, Any]], width: int) -> Any:
    """Return the rows as a table for lines of some width."""
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    names = fitting(rows, width)[0] if rows else list(COLUMNS)
    for name in names:
        found.add_column(name, justify="left" if name in ("run", "state") else "right", no_wrap=bool(rows))
    for row in rows:
        # As Text: in a plain string, brackets in the name of a folder would be markup.
        colours = {"state": COLOURS.get(row["state"], "yellow")}
        found.add_row(*(Text(COLUMNS[name](row), colours.get(name, "")) for name in names))
    if not rows:
        found.add_row("no runs here yet: reroll train")
    return found


def _console(least: int = 0) -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, least)
    return console


def _follow(folder: Path) -> int:
    from rich.live import Live

    try:
        console = _console()
        with Live(table(find(folder), console.width), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(2)
                live.update(table(find(folder), console.width), refresh=True)
    except KeyboardInterrupt:
        return 0


def _stop(request: Stop) -> int:
    path = next((p for p in (Path(request.name), ROOT / request.name) if (p / "status.json").is_file()), None)
    if path is None:
        raise UsageError(f"NAME={request.name!r} is no run: no status.json there, nor under {ROOT}. See `reroll runs`.")
    status = read_json(path / "status.json")
    if status.get("state") != "running" or not is_alive(status):
        raise UsageError(f"{path} is not running on this machine (state {status.get('state', 'unknown')}).")
    os.kill(status["pid"], signal.SIGTERM)
    deadline = time.monotonic() + request.wait
    while time.monotonic() < deadline:
        now = read_json(path / "status.json")
        if now.get("state") != "running" or not is_alive(now):
            print(
                f"{path}: {now.get('state')} at step {now.get('step')}. Go on: reroll train --run-dir {path} --resume"
            )
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
