"""`--nproc N`: the same command line in N processes of this machine, which train one run together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import IO, Any

GRACE = 10.0
"""Seconds that the others have to end after one has failed."""
SAME = 3.0
"""Seconds in which process 0 fails by itself, if it fails of the same."""


def launched() -> bool:
    """Whether this process is one of several: of ours, or of torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def launch(command: Sequence[str], processes: int) -> int:
    """Run a command in so many processes; return the exit code of the first that failed, or 0.

    Process 0 has the terminal. The others' messages are shown where one of them is the first to fail.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    common |= {"LOCAL_WORLD_SIZE": str(processes), "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo")}
    with ExitStack() as stack:
        started: list[tuple[subprocess.Popen[bytes], IO[bytes] | None]] = []
        for rank in range(processes):
            output = stack.enter_context(tempfile.TemporaryFile()) if rank else None
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append((subprocess.Popen(command, env=environment, stdout=output, stderr=output), output))
        handlers = {number: signal.signal(number, _pass_on(started)) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return _wait(started)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _pass_on(started: Sequence[tuple[subprocess.Popen[bytes], Any]]) -> Any:
    """A handler of signals. Ctrl-C on a terminal reaches all processes by itself, and process 0 decides for all."""

    def handle(number: int, frame: Any) -> None:
        if number == signal.SIGTERM:
            started[0][0].send_signal(number)

    return handle


def _wait(started: Sequence[tuple[subprocess.Popen[bytes], IO[bytes] | None]]) -> int:
    failed: tuple[subprocess.Popen[bytes], IO[bytes] | None] | None = None
    while any(process.poll() is None for process, _ in started):
        failed = next(((p, out) for p, out in started if p.poll() not in (None, 0)), None)
        if failed is not None:
            break
        time.sleep(0.05)
    failed = failed or next(((p, out) for p, out in started if p.poll()), None)
    if failed is None:
        return 0
    process, output = failed
    first = started[0][0]
    if output is not None:
        with suppress(subprocess.TimeoutExpired):  # what all refuse is said once
            first.wait(SAME)
    said = bool(first.poll())
    _end([process for process, _ in started])
    if output is not None and not said:
        output.seek(0)
        sys.stderr.write(output.read().decode(errors="backslashreplace")[-2000:])
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        print(f"error: process {[p for p, _ in started].index(process)} was ended by {name}.", file=sys.stderr)
    return process.returncode if process.returncode > 0 else 1


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End what still runs: it waits for a process that is gone."""
    deadline = time.monotonic() + GRACE
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
