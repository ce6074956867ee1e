"""The run folder: one place that tells the whole story of a run.

runs/NAME/
    config.toml         resolved; `reroll train --config runs/NAME/config.toml` does it again
    environment.json    versions, hardware, commit, fingerprint of the data, sizes of the model
    metrics.jsonl       a row per step
    journal             probes only: the weights of every step can be made from it (`reroll replay`)
    checkpoints/        the newest ones
    status.json         state, process, last step: what `reroll runs` shows
    log.txt             what was printed
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reroll.errors import RunError, UsageError
from reroll.train import toml
from reroll.train.config import Config

ROOT = Path("runs")


def new_folder(recipe: str) -> Path:
    """Return a fresh name under runs/: date, recipe, four hexadecimal digits."""
    word = re.sub(r"[^\w.-]+", "_", recipe)[:60]  # a config may call itself anything
    return ROOT / f"{time.strftime('%Y-%m-%d')}-{word}-{secrets.token_hex(2)}"


def find_run(name: str) -> Path:
    """Return the folder of a run: a path, or a name under runs/.

    Raises:
        UsageError: if there is none.
    """
    for path in (Path(name), ROOT / name):
        if (path / "config.toml").is_file():
            return path
    raise UsageError(
        f"RUN={name!r} is no run: neither {name} nor {ROOT / name} holds a config.toml. See `reroll runs`."
    )


class RunFolder:
    """The files of a run that is being written."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.journal = path / "journal"
        self.init = path / "init.safetensors"
        self._metrics: Any = None

    def refuse_used(self, resume: bool = False) -> None:
        """Raise `UsageError` if the folder exists and is not empty."""
        if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
            return
        if not self.path.is_dir():
            raise UsageError(f"--run-dir {self.path} is a file; name a folder.")
        if resume:
            raise UsageError(
                f"--run-dir {self.path} is not empty and holds no run (no config.toml); name another folder."
            )
        raise UsageError(f"--run-dir {self.path} is not empty. Add --resume to go on with it, or name another folder.")

    def refuse_running(self) -> None:
        """Raise `UsageError` if another process is training this run now: two would mix their records."""
        status = read_json(self.path / "status.json")
        if status.get("state") == "running" and status.get("pid") != os.getpid() and is_alive(status):
            raise UsageError(
                f"--run-dir {self.path} is being trained by process {status['pid']}. Wait for it, or stop it: "
                f"reroll runs stop {self.path}"
            )

    def is_unbegun(self) -> bool:
        """Return whether the folder holds nothing but what a run makes before its config: it was killed at once."""
        if not self.path.exists():
            return True
        if not (self.checkpoints.is_dir() and not any(self.checkpoints.iterdir())):
            return False
        early = (self.checkpoints.name, self.init.name, "log.txt")
        return all(p.name in early or _is_temporary(p) for p in self.path.iterdir())

    def make(self) -> None:
        """Make the folder; raise `RunError` if it cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "log.txt").touch()
        except OSError as error:
            raise RunError(
                f"--run-dir {self.path} cannot be written ({error.strerror}); name another folder."
            ) from None

    def write_init(self, weights: dict[str, Any]) -> None:
        """Write the weights a run begins with, if they are not drawn from its seed."""
        from safetensors.torch import save_file

        temporary = _temporary(self.init)
        save_file(weights, temporary)
        os.replace(temporary, self.init)

    def clear_temporary(self) -> None:
        """Delete what was being written when the run was killed."""
        for path in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def write_config(self, config: Config) -> None:
        """Write config.toml."""
        _replace(self.path / "config.toml", toml.dumps(config))

    def write_environment(self, **more: Any) -> None:
        """Write environment.json: what the run ran on, and what is given."""
        _replace(self.path / "environment.json", json.dumps(environment() | more, indent=2) + "\n")

    def write_status(self, state: str, **more: Any) -> None:
        """Write status.json: "running", "done", "stopped", "diverged" or "failed", and what is given."""
        content = {"state": state, "pid": os.getpid(), "started": process_start(os.getpid())}
        content |= {"host": socket.gethostname(), "time": time.time()}
        _replace(self.path / "status.json", json.dumps(content | more) + "\n")

    def record(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a")
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()

    def sync(self) -> None:
        """Wait until the rows are on the disk."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def last_row(self) -> dict[str, Any] | None:
        """Return the last row of metrics.jsonl."""
        return next(iter(deque(read_metrics(self.path), 1)), None)

    def log(self, line: str) -> None:
        """Append a line to log.txt."""
        with (self.path / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def cut_metrics(self, steps: int) -> None:
        """Keep the rows of the first `steps` steps; a resumed run writes the others again."""
        path = self.path / "metrics.jsonl"
        if path.exists():
            kept = [json.dumps(row) for row in read_metrics(self.path) if row["step"] < steps]
            _replace(path, "".join(line + "\n" for line in kept))

    def discard(self) -> None:
        """Delete what a run wrote that was refused before its first step: the folder is free again."""
        self.close()
        self.clear_temporary()
        for name in ("config.toml", "environment.json", "status.json", "log.txt", "journal", self.init.name):
            (self.path / name).unlink(missing_ok=True)
        for folder in (self.checkpoints, self.path):
            with contextlib.suppress(OSError):  # something else is in it
                folder.rmdir()

    def close(self) -> None:
        """Close the files."""
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None


class Reader(RunFolder):
    """The folder of a run that another process writes: what would change it does nothing."""

    def _nothing(self, *arguments: Any, **options: Any) -> None:
        return None

    refuse_used = refuse_running = make = write_init = write_config = write_environment = write_status = _nothing
    clear_temporary = record = log = cut_metrics = discard = _nothing


def read_config(path: Path) -> Config:
    """Return the config of a run."""
    return toml.overlay(Config(), toml.load(path / "config.toml"), str(path / "config.toml"))


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of metrics.jsonl; a torn last line is left out."""
    file = path / "metrics.jsonl"
    if not file.exists():
        return
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                return
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                yield row


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file of a run; an empty one if it is missing or torn."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def environment() -> dict[str, Any]:
    """Return versions, hardware and commit, as they are now."""
    import torch

    packages = ("torch", "numpy", "numba", "safetensors", "triton")
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    from reroll import __version__

    return {
        "reroll": __version__,
        "commit": commit(),
        "command": sys.argv,
        "versions": versions,
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def hardware() -> str:
    """Return the processor, cores and card in one line."""
    import torch

    parts = [processor(), f"{os.cpu_count()} cores"]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    return ", ".join(parts)


def processor() -> str:
    """Return the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def commit() -> str | None:
    """Return the commit of the source tree, with a plus if it has changes; None outside a repository."""
    source = Path(__file__).resolve().parents[3]
    if not (source / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(source), *arguments], capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except OSError:
        return None


def process_start(pid: int) -> str | None:
    """Return when a process started, in the kernel's words: with its number it names a process for good.

    None for one that is not there, or has ended and waits for its parent to take notice.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_alive(status: dict[str, Any]) -> bool:
    """Return whether the process of a status.json still runs here: same host, number and start."""
    if status.get("host") != socket.gethostname() or not isinstance(status.get("pid"), int):
        return False
    started = process_start(status["pid"])
    if started is not None or Path("/proc/self").exists():
        return started is not None and started == status.get("started")
    try:  # without /proc the number alone has to do
        os.kill(status["pid"], 0)
    except OSError:
        return False
    return True


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is either the old or the new one."""
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".tmp")
