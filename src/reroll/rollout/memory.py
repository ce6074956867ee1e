"""Whether whole Jacobians fit into memory: nothing else here grows with the square of the state size."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from reroll.errors import UsageError

GROUP = Path("/sys/fs/cgroup")
COPIES = 3
"""Copies of the Jacobians that an undamped step needs: themselves, transposed for the scan, and its products."""
FILTER_COPIES = 6
"""The same for a filter, which has two more matrices per step."""


def require_memory_for_jacobians(
    batch: int, steps: int, size: int, dtype: torch.dtype, device: torch.device, *, filters: bool
) -> None:
    """Raise if the whole Jacobians of these sequences and steps do not fit into free memory.

    Raises:
        UsageError: with their bytes, and what to use instead.
    """
    itemsize = max(4, dtype.itemsize) if filters else dtype.itemsize
    per_step = batch * size * size * itemsize * (FILTER_COPIES if filters else COPIES)
    left = memory_left(device)
    if steps * per_step <= left:
        return
    alternative = f", or a shorter window (window={left // per_step})" if per_step <= left else ""
    raise UsageError(
        f"Whole Jacobians of {batch} sequences × {steps} steps × {size}² numbers, and the solver's copies, are "
        f"{steps * per_step:,} bytes; {left:,} are free. Use {'quasi_elk' if filters else 'quasi_deer'}(){alternative}."
    )


def memory_left(device: torch.device) -> int:
    """Return the free bytes of a device, by the system's count."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
        return min(left, _left_in_container())
    except (OSError, StopIteration):  # not Linux
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, ValueError, OSError):  # Windows
            return 1 << 33


def _left_in_container() -> int:
    """Return the free bytes within a container's limit (control group, version 2)."""
    try:
        return int((GROUP / "memory.max").read_text()) - int((GROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such limit: the file says "max"
        return 1 << 60
