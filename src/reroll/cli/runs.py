"""`reroll runs [FOLDER]`: a table of every run under a folder. `reroll runs stop NAME`: save a run and end it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.cli.flags import flag_fields, parse, positional
from reroll.cli.lines import ENDLESS, line_width
from reroll.errors import RunError, UsageError, visible
from reroll.specs.base import OBJECT, leaves, option
from reroll.specs.task import TASKS
from reroll.train.records import ROOT, Tally, find, find_run, holder, read_config, read_json


@dataclass(frozen=True)
class Runs:
    """List every run under a folder. See also: reroll runs stop --help."""

    folder: Path = positional("the folder to search, at any depth (default: runs)", ROOT)
    follow: bool = option(False, "refresh the table every two seconds, until Ctrl-C")
    json: bool = option(False, "print a JSON list instead of a table")


@dataclass(frozen=True)
class Stop:
    """Ask a running run to save and end; it can be resumed."""

    name: str = positional("a run folder, or the name of one under runs/")
    wait: float = option(60.0, "seconds to wait for it to end")


def run(command: str, arguments: Sequence[str]) -> int:
    if arguments and arguments[0] == "stop":
        return _stop(parse(Stop, arguments[1:], "reroll runs stop"))
    request = parse(Runs, arguments, "reroll runs")
    if not request.folder.is_dir():
        raise UsageError(f"folder {request.folder} does not exist; pass the folder that your runs are in.")
    if request.follow and not request.json:
        return _follow(request.folder)
    rows = with_configs(find(request.folder))
    if request.json:
        print(json.dumps(rows, indent=2))
        return 0
    # Without a terminal nothing has to fit a line. A name that is wider than one is printed in full, to be copied.
    width = line_width()
    console = _console(fitting(rows, width)[1])
    if width < ENDLESS:
        console.print(table(rows, width))
        return 0
    with console.capture() as text:
        console.print(table(rows, width))
    print("\n".join(line.rstrip() for line in text.get().splitlines()))
    return 0


COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "run": lambda row: visible(row["name"]),
    "state": lambda row: visible(row["state"]),
    "step": lambda row: _step(row),
    "loss": lambda row: _number(row["loss"]),
    "best": lambda row: _number(row["best"]),
    "held-out": lambda row: _number(row["valid_loss"]),
    "unit": lambda row: row["unit"],
    "time": lambda row: _time(row["seconds"]),
    "memory": lambda row: _memory(row["peak_bytes"]),
    "to go": lambda row: _time(row["seconds_left"]),
    "differs": lambda row: visible(" ".join(f"{name}={_value(name, value)}" for name, value in row["differs"].items())),
}
"""Columns of the table, and what is in them."""
LEAST, MOST_LINES = 20, 3
"""Characters that the column `differs` is given on a narrow line, and lines of a run there."""
DISPENSABLE = ("memory", "best", "to go", "time", "unit", "loss", "held-out")
"""Columns that are dropped where they are empty, and in this order where a line is too narrow for all."""
COLOURS = {"running": "green", "done": "default", "dead": "red", "diverged": "red", "failed": "red"}


def with_configs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add to every run the unit of its losses, and of the flags of `reroll train` those in which it differs.

    Of runs that have the flag: kinds tell apart those that do not. What tells a run from others of its recipe comes
    first, then what is the recipe's own; in both, what the fewest share.
    """
    configs: list[dict[str, Any]] = [{} for _ in rows]
    for row, values in zip(rows, configs):
        with contextlib.suppress(UsageError):  # a config that cannot be read shows no differences
            values.update(_named(leaves(read_config(Path(row["path"])))))
        row["unit"] = _unit(values.get("task.kind", ""), row.pop("bits"), row["valid_loss"] is not None)
    # Counted among all runs (None) and among those of a recipe.
    groups = [(group, values) for values in configs for group in (None, repr(values.get("recipe")))]
    counts = Counter((group, name, repr(value)) for group, values in groups for name, value in values.items())
    having = Counter((group, name) for group, values in groups for name in values)
    flags = {"recipe": "recipe"} | {flag: dotted for flag, (dotted, *_) in flag_fields().items() if flag != "threads"}
    flags = {flag: flags[flag] for flag in ("cell", "gradient", "optimizer", "lr", *flags)}
    for row, values in zip(rows, configs):
        differing: dict[str, int] = {}
        for group in (repr(values.get("recipe")), None):
            shared = {f: counts[group, d, repr(values[d])] for f, d in flags.items() if d in values}
            rest = [f for f in shared if f not in differing and shared[f] < having[group, flags[f]]]
            differing |= {flag: shared[flag] for flag in sorted(rest, key=shared.__getitem__)}
        row["differs"] = {flag: values[flags[flag]] for flag in differing}
    return rows


def _named(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a config, with the class of an object in place of the word "object"."""
    names = {name: values.get(f"{name.removesuffix('kind')}name", "") for name in values if name.endswith(".kind")}
    names["recipe"] = values.get("task.name", "")
    return values | {name: own.rpartition(".")[2] for name, own in names.items() if values.get(name) == OBJECT}


def _unit(task: str, bits: bool, scored: bool) -> str:
    """What the losses of a run are measured in: nats, squared errors (mse), or what is not known."""
    if task == "arrays":
        return "nats" if bits else "mse" if scored else ""
    return "nats" if task in TASKS else ""  # not the class of a task of one's own


def fitting(rows: list[dict[str, Any]], width: int) -> tuple[list[str], int]:
    """Return the columns that fit into a line of some width, and their total width; what identifies a run stays."""
    from rich.cells import cell_len

    cells = {name: [content(row) for row in rows] for name, content in COLUMNS.items()}
    widths = {
        name: max(map(cell_len, [name, *texts]))
        for name, texts in cells.items()
        if any(texts) or name not in ("differs", *DISPENSABLE)
    }
    if "differs" in widths:
        widths["differs"] = min(widths["differs"], _room(rows, width))
    for name in DISPENSABLE:
        if name in widths and sum(widths.values()) + len(widths) - 1 > width:
            del widths[name]
    return list(widths), sum(widths.values()) + len(widths) - 1


def _room(rows: list[dict[str, Any]], width: int) -> int:
    """Return the characters that the column `differs` has at least: for its longest pair, if that is no longer."""
    longest = max((len(word) for row in rows for word in COLUMNS["differs"](row).split()), default=0)
    return max(width // 4, LEAST, min(longest, width // 3))


def _within(word: str, room: int) -> str:
    """Return a word, such as name=value; of one that is too long, the end of the value, which tells files apart."""
    head = word[: word.find("=") + 1]
    return word if len(word) <= room else f"{head}…{word[len(head) :][-max(room - len(head) - 1, 1) :]}"


def table(rows: list[dict[str, Any]], width: int) -> Any:
    """Return the rows as a table for lines of some width."""
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return "no runs here yet; start one: reroll train"
    shown = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    names, whole = fitting(rows, width)
    limit = _room(rows, width) + max(width - whole, 0)  # what differs is wrapped, in what the others leave
    for name in names:
        justify, wraps = "left" if name in ("run", "state", "differs") else "right", name == "differs"
        shown.add_column(name, justify=justify, no_wrap=not wraps, max_width=limit if wraps else None, overflow="fold")
    for row in rows:
        # As Text: in a plain string, brackets in a folder's name would be taken for markup.
        colours = {"state": COLOURS.get(row["state"], "yellow")}
        cells = {name: COLUMNS[name](row) for name in names}
        if "differs" in cells:
            text = " ".join(_within(word, limit) for word in cells["differs"].split(" "))
            lines = textwrap.wrap(text, limit, max_lines=MOST_LINES, placeholder=" …", break_on_hyphens=False)
            cells["differs"] = "\n".join(lines)
        shown.add_row(*(Text(text, colours.get(name, "")) for name, text in cells.items()))
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
                live.update(table(with_configs(find(folder, tallies)), console.width), refresh=True)
                time.sleep(2)
    return 0


def _stop(request: Stop) -> int:
    path = find_run(request.name)
    pid = holder(path)
    if not pid:
        state = read_json(path / "status.json").get("state", "unknown")
        why = f"state {state}" if pid is None else "the process named in its lock does not hold it, or is no Python"
        raise UsageError(visible(f"{path} is not running on this machine as a process of yours ({why})."))
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + request.wait
    while time.monotonic() < deadline:
        if holder(path) is None:
            status = read_json(path / "status.json")
            how = f"{status.get('state')} at step {status.get('step')}"
            print(visible(f"{path}: {how}. To resume: reroll train --run-dir {path} --resume"))
            return 0
        time.sleep(0.1)
    raise RunError(f"{path} is still running after {request.wait:g} seconds; it will end after its current step.")


def _step(row: dict[str, Any]) -> str:
    """Return a step of all; of none where a run is done before them, by its time or a target."""
    early = row["state"] == "done" and row["step"] < (row["steps"] or 0)
    return str(row["step"]) if early else f"{row['step']}/{row['steps'] or '?'}"


def _value(name: str, value: Any) -> str:
    if name == "max-seconds" and value is not None:
        return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
    return "none" if value is None else str(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _memory(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.0f} MB"
