"""`reroll runs [DIR]`: one table of every run under a folder. `reroll runs stop NAME`: stop one; it saves first."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from collections.abc import Sequence
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
    _console().print(table(find(request.folder)))
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


def table(rows: list[dict[str, Any]]) -> Any:
    """Return the rows as a table."""
    from rich.table import Table
    from rich.text import Text

    found = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("run", "state", "step", "loss", "best", "held-out", "time", "memory", "to go"):
        found.add_column(name, justify="left" if name in ("run", "state") else "right", overflow="fold")
    colours = {"running": "green", "done": "default", "dead": "red", "diverged": "red", "failed": "red"}
    for row in rows:
        # As Text: in a plain string, brackets in the name of a folder would be markup.
        name, state = Text(row["name"]), Text(row["state"], colours.get(row["state"], "yellow"))
        found.add_row(
            name, state, f"{row['step']}/{row['steps'] or '?'}", _number(row["loss"]), _number(row["best"]),
            _number(row["valid_loss"]), _time(row["seconds"]), _memory(row["peak_bytes"]), _time(row["seconds_left"]),
        )  # fmt: skip
    if not rows:
        found.add_row("no runs here yet: reroll train")
    return found


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False)


def _follow(folder: Path) -> int:
    from rich.live import Live

    try:
        with Live(table(find(folder)), console=_console(), auto_refresh=False) as live:
            while True:
                time.sleep(2)
                live.update(table(find(folder)), refresh=True)
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
