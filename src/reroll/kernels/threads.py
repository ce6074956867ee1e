"""Threads: pools that live as long as the process, torch's number of threads in a block, loops split over threads.

Numba's parallel loops cannot be entered from two Python threads at once, which is how probes are evaluated. So kernels
release the GIL instead, and each thread calls them on a range of the work. The split never changes the result.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@functools.cache
def pool(workers: int, threads: int | None = None) -> ThreadPoolExecutor:
    """Return the shared pool of this many workers, each with `threads` torch threads; None keeps torch's default.

    torch's setting is per thread, and setting it empties oneDNN's cache of compiled primitives, so it is set once.
    """
    if threads is None:
        return ThreadPoolExecutor(workers, "reroll-kernel")
    return ThreadPoolExecutor(workers, "reroll-unit", initializer=torch.set_num_threads, initargs=(threads,))


# A forked child inherits the pools but not their threads: a task submitted there would never run.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Run the block with this number of torch threads in the calling thread; None leaves it unchanged."""
    before = torch.get_num_threads()
    if threads in (None, before):
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
