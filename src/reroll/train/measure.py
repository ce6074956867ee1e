"""Time, memory and forward passes of a call. Every memory figure of the project comes from here.

    seconds, peak_bytes, forward_passes = measure(lambda: model(x))

Memory is the peak during the call minus what was in use before it: on a GPU the allocator's; on a CPU the resident
memory of a fresh process that has done nothing else, after a warm-up call. That process returns freed memory to the
system at once (`MALLOC_MMAP_THRESHOLD_`), so that memory used again is counted again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from reroll.errors import RunError, UsageError


class Measurement(NamedTuple):
    """What a call took: wall time, its peak memory above what was in use before, and all evaluations of models."""

    seconds: float
    peak_bytes: int
    forward_passes: int


def measure(function: Callable[[], Any], *, warmup: int = 1, threads: int | None = None) -> Measurement:
    """Call a function and return what it took.

    Args:
        function: called without arguments. On the CPU it runs in a fresh process (sent by cloudpickle, so lambdas and
            closures over models and tensors work), and what it returns or changes stays there.
        warmup: calls before the measured one: compilation, thread pools, persistent state.
        threads: torch's threads in that process; None: as here.

    Raises:
        RunError: if it fails in that process, with its error.
        UsageError: if it cannot be sent there.

    Example:
        >>> import torch
        >>> measure(lambda: torch.zeros(4 << 20).sum()).peak_bytes > 15_000_000
        True
    """
    import torch

    from reroll.passes import count_forward_passes

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for _ in range(warmup):
            function()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        with count_forward_passes() as passes:
            function()
        torch.cuda.synchronize()
        return Measurement(time.perf_counter() - start, torch.cuda.max_memory_allocated() - before, passes.count)
    return _in_fresh_process(function, warmup, threads or torch.get_num_threads())


def _in_fresh_process(function: Callable[[], Any], warmup: int, threads: int) -> Measurement:
    import cloudpickle

    with tempfile.TemporaryDirectory(prefix="reroll-measure-") as folder:
        request, answer = Path(folder, "request"), Path(folder, "answer")
        try:
            request.write_bytes(cloudpickle.dumps((function, warmup, threads)))
        except Exception as error:  # whatever an object's own pickling raises
            raise UsageError(
                f"function={function!r} cannot be sent to a fresh process ({type(error).__name__}: {error}). Create "
                "what cannot be pickled (files, locks, threads) inside it."
            ) from error
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "65536",
            "MALLOC_TRIM_THRESHOLD_": "65536", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # fmt: skip
        command = [sys.executable, "-m", "reroll.train.measure", str(request), str(answer)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode or not answer.exists():
            died = f"no message; its process exited with {done.returncode}, as when memory runs out"
            raise RunError(f"The measured call failed: {(done.stderr.strip().splitlines() or [died])[-1]}")
        return Measurement(*pickle.loads(answer.read_bytes()))


def _memory(field: str) -> int:
    """Return a size in /proc/self/status: VmRSS, resident now; VmHWM, its peak since the last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RunError(f"/proc/self/status has no {field}; memory of a process can be measured on Linux only.")


def _child(request: str, answer: str) -> None:
    """The fresh process: warm up, call once, report."""
    import gc

    import torch

    from reroll.passes import count_forward_passes

    function, warmup, threads = pickle.loads(Path(request).read_bytes())
    torch.set_num_threads(threads)
    for _ in range(warmup):
        function()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # so that reuse of freed memory counts
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, start = _memory("VmRSS"), time.perf_counter()
    with count_forward_passes() as passes:
        function()
    seconds = time.perf_counter() - start
    peak = _memory("VmHWM")
    Path(answer).write_bytes(pickle.dumps((seconds, max(0, peak - before), passes.count)))


if __name__ == "__main__":
    _child(*sys.argv[1:])
