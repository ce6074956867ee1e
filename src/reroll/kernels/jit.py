"""Compile a function with Numba and keep the result on disk, for as long as no kernel's source changes.

Numba compiles a function again when its own file changes, but what is compiled holds the code of all it calls: after a
change to another file, a kernel kept from before would go on running the old code. So the folder in which kernels are
kept is named by a hash of all their sources.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

KERNELS = Path(__file__).parent
CONFIG: Any = numba.config  # its attributes are made from the environment


@functools.cache
def folder() -> str:
    """Return where compiled kernels are kept; where it cannot be written, Numba takes the user's own cache folder."""
    digest = hashlib.sha256()
    for path in sorted(KERNELS.rglob("*.py")):
        digest.update(path.read_bytes())
    parent = Path(CONFIG.CACHE_DIR or KERNELS / "__pycache__")  # NUMBA_CACHE_DIR, if it is set
    return str(parent / f"numba-{digest.hexdigest()[:16]}")


def jit(function: Callable[..., Any]) -> Any:
    """Compile a function that needs no interpreter and holds no lock, with IEEE division."""
    # The setting is read when a function is decorated; it is the process's, so others' functions must not see it.
    before = CONFIG.CACHE_DIR
    CONFIG.CACHE_DIR = folder()
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    finally:
        CONFIG.CACHE_DIR = before
