"""Reading run folders, for `reroll runs`, `show`, `load` and resuming; nothing here writes."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from reroll import __version__
from reroll.errors import UsageError
from reroll.train import toml
from reroll.train.config import Config

try:
    import fcntl
except ImportError:  # Windows: there, nothing stops two processes from using one folder
    fcntl = None  # type: ignore[assignment]: a module, or None

ROOT = Path("runs")
LOCK = "lock"
NUMBERS = ("loss", "valid_loss", "seconds", "total_seconds")
"""What of a row is compared with numbers: a run may end by it."""


def look_for(name: str) -> Path | None:
    """Return the folder of a run, a path or a name under runs/; None if there is no such run."""
    with contextlib.suppress(OSError, ValueError):  # the name cannot be a path
        return next((path for path in (Path(name), ROOT / name) if (path / "config.toml").is_file()), None)
    return None


def find_run(name: str) -> Path:
    """Return the folder of a run: a path, or a name under runs/.

    Raises:
        UsageError: if there is none.
    """
    path = look_for(name)
    if path is None:
        places = f"{name} has no" if ROOT / name == Path(name) else f"neither {name} nor {ROOT / name} has a"
        raise UsageError(
            f"{name!r} is not a run: {places} config.toml. Give a run folder, the name of a run under {ROOT}/ (see "
            "`reroll runs`), or a file of `reroll export`."
        )
    return path


def read_config(path: Path) -> Config:
    """Return the config of a run."""
    tables = toml.load(path / "config.toml")
    try:
        return toml.overlay(Config(), tables, str(path / "config.toml"))
    except UsageError as error:
        newer = f"If a newer reroll than this one ({__version__}) trained the run, use that one."
        raise UsageError(f"{error} {newer}") from None


def parse_row(line: bytes) -> dict[str, Any] | None:
    """Return a row of metrics.jsonl; None if it is damaged."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    return row if all(type(row.get(name, 0)) in (int, float) for name in NUMBERS) else None


def parse_rows(lines: Iterable[bytes]) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield the lines of metrics.jsonl with their rows; None for one that is damaged or whose step is out of order.

    Rows that were dropped as damaged leave gaps: a step may be as far ahead as damaged lines explain, or as the next
    row confirms; where there is none, by one.
    """
    last, damaged = -1, 0
    rows = chain(((line, parse_row(line)) for line in lines), [(b"", None)])
    for (line, row), (after, following) in pairwise(rows):
        if row is not None and last < row["step"] and (
            row["step"] <= last + 1 + max(damaged, not after)
            or (following is not None and following["step"] == row["step"] + 1)
        ):  # fmt: skip
            last, damaged = row["step"], 0
            yield line, row
        else:
            damaged += 1
            yield line, None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the undamaged rows of metrics.jsonl."""
    if (path / "metrics.jsonl").exists():
        with (path / "metrics.jsonl").open("rb") as lines:
            yield from (row for _, row in parse_rows(lines) if row is not None)


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def holder(path: Path) -> int | None:
    """Return the id of the process that is training the run in a folder; 0 if that is unknown, None if there is none.

    The lock is the system's and ends with its process; /proc tells whether the process named in the file is a Python
    that holds it.
    """
    if fcntl is None:
        return None
    try:
        with (path / LOCK).open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                pid = int(file.read(20) or 0)
    except OSError:
        return None
    except ValueError:
        return 0
    return pid if pid > 0 and _has_open(pid, path / LOCK) and _is_python(pid) else 0


def _is_python(pid: int) -> bool:
    """Whether a process may be one of ours: whoever trains by `reroll.train.train` is called by the name of Python."""
    try:
        program = Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
    except OSError:
        return not Path("/proc/self/cmdline").exists()
    return os.path.basename(program).lower().startswith((b"python", b"pypy", b"reroll"))


def _has_open(pid: int, file: Path) -> bool:
    if not Path("/proc/self/fd").exists():
        return True
    with contextlib.suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed in the meantime
                if descriptor.samefile(file):
                    return True
    return False


class Tally:
    """A summary of a run's rows, each of which is read once, even while the run continues.

    Args:
        path: the run folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self._clear(0)

    def _clear(self, file: int) -> None:
        self.file, self.offset, self.damaged = file, 0, 0
        self.last: dict[str, Any] = {}
        self.loss, self.best, self.valid, self.bits = None, None, None, False
        self.recent: deque[float] = deque(maxlen=20)  # seconds of steps

    def read(self) -> None:
        """Read the rows that were added; all of them if the file was replaced (the run was resumed)."""
        try:
            lines = (self.path / "metrics.jsonl").open("rb")
        except FileNotFoundError:
            return
        with lines:
            about = os.fstat(lines.fileno())
            if about.st_ino != self.file or about.st_size < self.offset:
                self._clear(about.st_ino)
            lines.seek(self.offset)
            for line in lines:
                row = parse_row(line)
                if row is None and not line.endswith(b"\n"):
                    break  # it is being written
                self.offset += len(line)
                self.damaged += row is None
                if row is not None:
                    self._add(row)

    def _add(self, row: dict[str, Any]) -> None:
        self.last = row
        loss, valid, seconds = (number(row, name) for name in ("loss", "valid_loss", "seconds"))
        if loss is not None:
            self.loss, self.best = loss, loss if self.best is None else min(self.best, loss)
        if valid is not None:
            self.valid, self.bits = valid, "valid_bits" in row
        if seconds is not None:
            self.recent.append(seconds)

    def row(self, name: str) -> dict[str, Any]:
        """Return the state of the run, its step, losses, seconds, memory and time left."""
        status, running = read_json(self.path / "status.json"), holder(self.path) is not None
        state = str(status.get("state", "unknown"))
        state = "running" if running else "dead" if state == "running" and fcntl is not None else state
        try:
            self.read()
        except OSError:  # no permission: the other runs are still shown
            state = "unreadable"
        step, steps = (self.last["step"] + 1 if self.last else 0), number(status, "steps")
        left = (steps - step) * sum(self.recent) / len(self.recent) if running and self.recent and steps else None
        return {
            "name": name, "path": str(self.path), "state": state, "step": step, "steps": steps, "loss": self.loss,
            "best": self.best, "valid_loss": self.valid, "seconds": number(self.last, "total_seconds"),
            "peak_bytes": number(self.last, "peak_bytes"), "seconds_left": left, "damaged_rows": self.damaged,
            "bits": self.bits,
        }  # fmt: skip


def number(row: dict[str, Any], name: str) -> Any:
    """Return the number of a name if it is finite, else None: rows may be damaged, and losses diverge."""
    value = row.get(name)
    return value if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 else None


def find(folder: Path, tallies: dict[Path, Tally] | None = None) -> list[dict[str, Any]]:
    """Return a row for every run under a folder, newest first.

    Args:
        folder: searched at any depth; links are not followed.
        tallies: what was read before, by run; updated in place.
    """
    tallies = {} if tallies is None else tallies
    rows = []
    for base, inside, files in os.walk(folder):
        if "config.toml" in files and {"environment.json", "status.json"} & set(files):
            inside.clear()
            path, age = Path(base), math.inf
            with contextlib.suppress(OSError):  # deleted in the meantime
                age = -(path / "config.toml").stat().st_mtime
            name = str(path.relative_to(folder)) if path != folder else path.name
            rows.append((age, tallies.setdefault(path, Tally(path)).row(name)))
    return [row for _, row in sorted(rows, key=lambda pair: pair[0])]
