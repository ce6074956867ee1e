"""The run folder: everything about a run in one place.

runs/NAME/
    config.toml         resolved; `reroll train --config runs/NAME/config.toml` repeats the run
    environment.json    versions, hardware, commit, fingerprint of the data, sizes of the model
    metrics.jsonl       a row per step
    journal             probes only: the weights of every step can be rebuilt from it (`reroll replay`)
    checkpoints/        the newest ones
    status.json         state, process, last step: what `reroll runs` shows
    log.txt             what was printed
    lock                the id of the process that is training it; a file lock, which ends with the process
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from reroll.errors import RunError, UsageError
from reroll.train import machine, toml
from reroll.train.config import Config
from reroll.train.records import LOCK, ROOT, fcntl, holder, parse_rows, read_metrics


def new_folder(recipe: str) -> Path:
    """Return a new name under runs/: date, recipe, four hexadecimal digits."""
    word = re.sub(r"[^\w.-]+", "_", recipe)[:60]  # a config's recipe may be any text
    return ROOT / f"{time.strftime('%Y-%m-%d')}-{word}-{secrets.token_hex(2)}"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name to write a file or folder under; it becomes `path` on success, else it is deleted."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        yield temporary
        if temporary.is_dir():
            remove(path)
        os.replace(temporary, path)
    except BaseException:
        remove(temporary)
        raise


def remove(path: Path) -> None:
    """Delete a file or folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class RunFolder:
    """The files of a run that is being written."""

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.journal = path / "journal"
        self.init = path / "init.safetensors"
        self._metrics: Any = None
        self._lock: Any = None
        self.lost = False
        """Whether another process has the folder now."""

    def refuse_used(self, resume: bool = False) -> None:
        """Raise `UsageError` unless the folder is free: absent, empty or, to resume, that of a run killed at once."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"path={self.path} is a file; choose a folder.")
        content = list(self.path.iterdir())
        if resume and self.checkpoints.is_dir() and not any(self.checkpoints.iterdir()):
            early = {self.checkpoints, self.init, self.path / "log.txt", self.path / LOCK, *self.path.glob(".*.tmp")}
            content = [path for path in content if path not in early]
        if content and not self.locked and holder(self.path) is not None:
            raise UsageError(self._held())
        if content and resume:
            raise UsageError(
                f"path={self.path} is not empty and has no run in it (no config.toml); choose another folder."
            )
        if content:
            there = (self.path / "config.toml").is_file()
            remedy = "Pass resume=True to continue its run, or choose" if there else "Choose"
            raise UsageError(f"path={self.path} is not empty. {remedy} another folder.")

    def lock(self) -> None:
        """Lock the folder for this process, until `close` or its end: two processes would mix their records.

        Raises:
            UsageError: naming the process that holds the lock.
        """
        if fcntl is None or self.locked:
            return
        for _ in range(5):  # `holder` takes the lock for an instant
            file = (self.path / LOCK).open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_there(file):
                    break
            except BlockingIOError:
                time.sleep(0.05)
            file.close()
        else:
            raise UsageError(self._held())
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        self._lock = file

    def _held(self) -> str:
        who = holder(self.path) or "of another user"
        return (
            f"path={self.path} is being trained by process {who}. Wait for it, or stop it: reroll runs stop {self.path}"
        )

    def _is_there(self, file: Any) -> bool:
        """Whether the lock is this file, which could have been deleted, and made anew by another process."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), (self.path / LOCK).stat())
        except FileNotFoundError:
            return False

    def _keep_lock(self) -> None:
        """Take the lock again if its file was deleted; raise `RunError` if another process was faster."""
        if self._lock is None or self._is_there(self._lock):
            return
        self.close()
        try:
            self.lock()
        except UsageError as error:
            self.lost = True
            raise RunError(f"{self.path / LOCK} was deleted, and {error} This process ends.") from None

    @property
    def locked(self) -> bool:
        """Whether this object holds the lock."""
        return self._lock is not None

    def make(self) -> None:
        """Make the folder; raise `RunError` if it cannot be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (self.path / "log.txt").touch()
        except OSError as error:
            raise RunError(f"path={self.path} cannot be written ({error.strerror}); choose another folder.") from None

    def clear_temporary(self) -> None:
        """Delete the files that were being written when the run was killed."""
        for path in (*self.path.glob(".*.tmp"), *self.checkpoints.glob(".*.tmp")):
            remove(path)

    def write_init(self, weights: dict[str, Any]) -> None:
        """Write the initial weights of a run, if they are not drawn from its seed."""
        from safetensors.torch import save_file

        with replacing(self.init) as file:
            save_file(weights, file)

    def write_config(self, config: Config) -> None:
        self._write("config.toml", toml.dumps(config))

    def write_environment(self, **more: Any) -> None:
        self._write("environment.json", json.dumps(machine.environment() | more, indent=2))

    def write_status(self, state: str, **more: Any) -> None:
        """Write status.json: "running", "done", "stopped", "diverged" or "failed", with more fields."""
        content = {"state": state, "pid": os.getpid(), "host": socket.gethostname(), "time": time.time()}
        self._write("status.json", json.dumps(content | more))

    def _write(self, name: str, text: str) -> None:
        with replacing(self.path / name) as file:
            file.write_text(text.rstrip("\n") + "\n", encoding="utf-8")

    def record(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl; raise `RunError` if the folder has become another process's."""
        self._keep_lock()
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a")
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()

    def sync(self) -> None:
        """Wait until the rows are on disk."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def last_row(self) -> dict[str, Any] | None:
        """Return the last row of metrics.jsonl."""
        return next(iter(deque(read_metrics(self.path), 1)), None)

    def log(self, line: str) -> None:
        """Append a line to log.txt."""
        with (self.path / "log.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def cut_metrics(self, steps: int) -> int:
        """Keep the rows of the first `steps` steps, and return how many damaged lines were dropped.

        A resumed run writes the later ones again.
        """
        path, rows, damaged = self.path / "metrics.jsonl", [], 0
        if path.exists():
            for line, row in parse_rows(path.read_bytes().splitlines(keepends=True)):
                damaged += row is None and line.endswith(b"\n")  # without one, the row was being written
                if row is not None and row["step"] < steps:
                    rows.append(line.rstrip(b"\n") + b"\n")
            with replacing(path) as file:
                file.write_bytes(b"".join(rows))
        return damaged

    def discard(self) -> None:
        """Delete the files of a run that was refused before its first step, so that the folder is free again."""
        self.clear_temporary()
        for name in ("config.toml", "environment.json", "status.json", "log.txt", "journal", self.init.name, LOCK):
            remove(self.path / name)
        for folder in (self.checkpoints, self.path):
            with contextlib.suppress(OSError):  # it contains something else
                folder.rmdir()

    def close(self) -> None:
        """Close the files, and release the lock."""
        for file in (self._metrics, self._lock):
            if file is not None:
                file.close()
        self._metrics = self._lock = None

    def __del__(self) -> None:
        self.close()  # a session that is no longer referenced must not keep the lock


class Reader(RunFolder):
    """The folder of a run that another process writes; methods that would change it do nothing."""

    def _nothing(self, *arguments: Any, **options: Any) -> Any:
        return None

    refuse_used = lock = make = write_init = write_config = write_environment = write_status = _nothing
    clear_temporary = record = log = cut_metrics = discard = _nothing
