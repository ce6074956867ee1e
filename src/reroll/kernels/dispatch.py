"""Which implementation of an operation runs, and why.

    choice = choose("noise_axpy", [("triton", on_cuda, "…"), ("cpu", on_cpu, "…"), ("reference", True, "…")])

The first candidate whose condition holds is chosen. The rules depend on types, shapes and devices, never on timings or
free memory, so the same call always runs the same code. `report` returns the last choice for every operation, and its
reason. Tests force one with `with use("noise_axpy", "reference"):`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

from torch import Tensor

from reroll.errors import UsageError


class Choice(NamedTuple):
    """The chosen implementation and the reason for it."""

    name: str
    reason: str


class Candidate(NamedTuple):
    """One implementation: its name, whether it can compute this call, and why (or why not)."""

    name: str
    applies: bool
    reason: str


_forced: ContextVar[dict[str, str] | None] = ContextVar("forced implementations", default=None)
_mapped: ContextVar[bool] = ContextVar("inside vmap", default=False)
_taken: dict[str, Choice] = {}


def choose(op: str, candidates: Sequence[Candidate]) -> Choice:
    """Return the first candidate that applies, or the one forced by `use`.

    Raises:
        UsageError: if the forced implementation cannot compute this call.
    """
    wanted = (_forced.get() or {}).get(op)
    for name, applies, reason in candidates:
        if wanted in (None, name) and applies:
            choice = Choice(name, reason if wanted is None else "asked for")
            _taken[op] = choice
            return choice
    reasons = "; ".join(f"{name}: {reason}" for name, applies, reason in candidates if not applies)
    raise UsageError(f"No implementation of {op} can compute this call (asked for {wanted or 'any'}). {reasons}.")


@contextmanager
def use(op: str, implementation: str) -> Iterator[None]:
    """Force one implementation of `op` inside the block (this thread and its context only)."""
    token = _forced.set({**(_forced.get() or {}), op: implementation})
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def mapped() -> Iterator[None]:
    """Declare that the block runs under `torch.func.vmap`, where torch's own recurrent kernels cannot be called."""
    token = _mapped.set(True)
    try:
        yield
    finally:
        _mapped.reset(token)


def is_mapped() -> bool:
    """Return whether this code runs inside `mapped`."""
    return _mapped.get()


@functools.cache
def triton_runs_on(device: str) -> bool:
    """Return whether Triton kernels run there: on a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
    interpreted = device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    return (device == "cuda" or interpreted) and importlib.util.find_spec("triton") is not None


def library_runs(op: str, inputs: Tensor) -> bool:
    """Choose between torch's kernel for a whole sequence ("library") and a loop over steps ("reference")."""
    device = inputs.device.type
    runs = device in ("cpu", "cuda") and not is_mapped() and inputs.shape[1] > 0
    return choose(op, library_candidates(runs, device)).name == "library"


@functools.cache
def library_candidates(runs: bool, device: str) -> tuple[Candidate, ...]:
    return (
        Candidate("library", runs, f"torch's kernel for a whole sequence, on {device}"),
        Candidate("reference", True, f"step by step in torch operations, on {device}"),
    )


def report() -> dict[str, Choice]:
    """Return the last choice for every operation used so far in this process."""
    return dict(_taken)
