"""Compile a function with Numba and cache the result on disk, for as long as no kernel's source changes.

Numba recompiles a function when its own file changes, but the compiled code includes all functions that it calls: after
a change to another file, a cached kernel would run their old code. So the cache folder is named by a hash of all kernel
sources.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.event import Listener, register

log = logging.getLogger(__name__)
KERNELS = Path(__file__).parent
CONFIG: Any = numba.config  # its attributes are made from the environment


@functools.cache
def folder() -> str:
    """Return the cache folder of compiled kernels; where it is not writable, Numba uses the user's cache folder."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.rglob("*.py")):
        digest.update(path.read_bytes())
    parent = Path(CONFIG.CACHE_DIR or KERNELS / "__pycache__")  # NUMBA_CACHE_DIR, if it is set
    return str(parent / f"numba-{digest.hexdigest()[:16]}")


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function to machine code that releases the GIL and divides by IEEE rules (1/0 is inf)."""
    # Numba reads the setting when a function is decorated. It is global, so it is restored for the functions of others.
    before = CONFIG.CACHE_DIR
    CONFIG.CACHE_DIR = folder()
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    finally:
        CONFIG.CACHE_DIR = before


class Announcer(Listener):
    """Says once in a process that a kernel is compiled, which happens where none is kept."""

    said = False

    def on_start(self, event: Any) -> None:
        if not self.said and str(event.data["dispatcher"].py_func.__module__).startswith("reroll."):
            self.said = True
            log.warning("Compiling some kernels for this processor (kept for next time): it can take a minute or two.")

    def on_end(self, event: Any) -> None:
        pass


ANNOUNCER = Announcer()
register("numba:compile", ANNOUNCER)
