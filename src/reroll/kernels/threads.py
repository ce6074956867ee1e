"""Split a compiled loop over threads, as many as torch would use for one operation in this thread.

Numba's own parallel loops cannot be entered from two Python threads at once, which is how probes are evaluated; the
kernels here release the GIL instead and take a range of their work each. How a loop is split never changes its result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch


@functools.cache
def pool(threads: int) -> ThreadPoolExecutor:
    """Return the shared pool with this many threads; pools live as long as the process."""
    return ThreadPoolExecutor(threads, thread_name_prefix="reroll-kernel")


def split(work: Callable[[int, int], object], count: int, minimum: int) -> None:
    """Call `work(begin, end)` over [0, count) in up to `torch.get_num_threads()` ranges of at least `minimum` each."""
    parts = min(torch.get_num_threads(), count // max(minimum, 1))
    if parts <= 1:
        work(0, count)
        return
    edges = [count * i // parts for i in range(parts + 1)]
    others = [pool(parts - 1).submit(work, edges[i], edges[i + 1]) for i in range(1, parts)]
    work(edges[0], edges[1])
    for other in others:
        other.result()
