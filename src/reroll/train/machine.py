"""The machine of a run: its versions and hardware, device, memory, clock and signals. Imports no torch."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reroll.errors import UsageError

if TYPE_CHECKING:
    import torch


def environment() -> dict[str, Any]:
    """Return versions, hardware and commit, as they are now."""
    import torch

    from reroll import __version__

    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "numba", "safetensors", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "reroll": __version__, "commit": commit(), "command": sys.argv, "versions": versions, "hardware": hardware(),
        "threads": torch.get_num_threads(), "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip


def hardware() -> str:
    """Return the processor, the cores that this process may use, and GPU in one line."""
    import torch

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    gpus = Counter(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))
    return ", ".join([processor, f"{cores()} cores", *(f"{count} × {name}" for name, count in gpus.items())])


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


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def find_device(name: str) -> torch.device:
    """Return the device of a name ("auto": CUDA if available, else the CPU); refuse one that is not available."""
    import torch

    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available[name]:
        others = " or ".join(f"device={device}" for device, is_there in available.items() if is_there)
        raise UsageError(f"device={name}: there is no {name.upper()} device here that torch can use; use {others}.")
    return torch.device(name)


def peak_bytes(device: torch.device) -> int:
    """Return the peak memory so far: of the allocator on a GPU, else resident (0 where that is unknown)."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):
        import resource  # Windows has none

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return 0


@dataclass
class Clock:
    """Seconds of training, from `start` to `stop`; both first wait for the device to finish its work."""

    device: torch.device
    started: float = 0.0

    def start(self) -> None:
        self._wait()
        self.started = time.perf_counter()

    def stop(self) -> float:
        """Return the seconds since `start`."""
        self._wait()
        return time.perf_counter() - self.started

    def _wait(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


@contextmanager
def signals(says: bool = True) -> Iterator[list[str]]:
    """Collect SIGTERM and Ctrl-C instead of dying of them; a second Ctrl-C interrupts as usual, which is said."""
    received: list[str] = []

    def note(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if says:
                # Not by print: a signal may come in the middle of one, and Ctrl-C also ends what output is piped into.
                with contextlib.suppress(OSError):
                    os.write(2, b"\nCtrl-C: ending after the step at hand. Again: ending at once, without saving.\n")

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, which alone may handle signals
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
