"""Find out, once per cell, whether its step is what a solver along time takes it for: pure, and row by row."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from reroll.cells.base import Cell
from reroll.cells.jacobian import step
from reroll.errors import UsageError

_known: weakref.WeakKeyDictionary[Cell, set[tuple[bool, ...]]] = weakref.WeakKeyDictionary()
"""Cells that were tried, and in which modes (training or not): dropout acts in one of them."""


@torch.no_grad()
def require_pure(cell: Cell, problem: Any) -> None:
    """Call the step twice on the first step of two sequences, and raise if it edits its arguments or is random.

    Raises:
        UsageError: naming the cell and what it does.
    """
    mode = tuple(module.training for module in cell.modules())
    if mode in _known.setdefault(cell, set()):
        return
    u, state = problem.u[:2, 0].detach().clone(), problem.start[:2].detach().clone()
    given_u, given_state = u.clone(), state.clone()
    devices = [u.device] if u.device.type == "cuda" else []
    name = type(cell).__name__
    with torch.random.fork_rng(devices):
        first = step(cell, problem.layout, u, state)
        second = step(cell, problem.layout, given_u.clone(), given_state.clone())
    if first.shape != given_state.shape:
        raise UsageError(
            f"{name}.step returns a state of shape {tuple(first.shape)} for one of {tuple(given_state.shape)}; a step "
            "must keep the shape of its state."
        )
    if not (_same(u, given_u) and _same(state, given_state)):
        raise UsageError(f"{name}.step changes its arguments in place; let it return new tensors.")
    if not _same(first, second):
        raise UsageError(
            f"{name}.step gives different results for the same arguments (dropout, or random numbers drawn inside). "
            "Give the noise as part of the inputs, or use rollout=Sequential()."
        )
    _known[cell].add(mode)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
