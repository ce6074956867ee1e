"""What a run asks of its process: the signals that end it, its memory, and a clock that waits for the device."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Clock:
    """Seconds of training: from `start` to `stop`, each after the device has done what it was given.

    What happens in between two steps is not in them: evaluations, checkpoints, the search for a learning rate.
    """

    device: torch.device
    began: float = 0.0

    def start(self) -> None:
        """Begin to count."""
        self._wait()
        self.began = time.perf_counter()

    def stop(self) -> float:
        """Return the seconds since `start`."""
        self._wait()
        return time.perf_counter() - self.began

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()


def peak_bytes(device: torch.device) -> int:
    """Return the largest memory so far: of the allocator on a card, resident of the process else (0: not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):
        import resource  # Windows has none

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return 0


@contextmanager
def signals() -> Iterator[list[str]]:
    """Collect SIGTERM and Ctrl-C instead of dying of them; the second Ctrl-C is let through."""
    received: list[str] = []

    def note(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals are someone else's
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
