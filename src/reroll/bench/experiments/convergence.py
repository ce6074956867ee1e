"""How fast a method approaches the sequential trajectory: what the experiments on damping count."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reroll.cells import Cell
from reroll.rollout import Newton
from reroll.rollout.monitor import monitoring


class Approach(NamedTuple):
    """The progress of a solve.

    Args:
        curves: the mean absolute deviation after every iteration, [batch][iterations].
        replaced: the count of non-finite numbers on the way, [batch].
        converged: [batch].
        seconds: for all sequences.
    """

    curves: list[list[float]]
    replaced: list[int]
    converged: list[bool]
    seconds: float


@torch.no_grad()
def approach(
    linearise: Any, damping: Any, limit: int, cell: Cell, inputs: Tensor, state: Any, truth: Tensor
) -> Approach:
    """Solve from a guess of zeros in one window, and compare every iterate with the truth.

    Args:
        linearise, damping, limit: the method, and its maximum iterations.
        cell, inputs, state: the recurrence.
        truth: the leading features of the trajectory, [features, T, batch].
    """
    deviations: list[Tensor] = []
    rollout = Newton(linearise, damping, guess="zeros", window=None, max_iterations=limit)
    start = time.perf_counter()
    with monitoring(observe=lambda states: deviations.append((states[: len(truth)] - truth).abs().mean((0, 1)))):
        trajectory = rollout(cell, inputs, state)
    assert trajectory.resets is not None
    return Approach(
        torch.stack(deviations, 1).tolist(), trajectory.resets.tolist(), trajectory.converged.tolist(),
        time.perf_counter() - start,
    )  # fmt: skip


def arrival(curve: list[float], level: float) -> int | None:
    """Return the first iteration, counted from 1, after which the deviation is below a level; None if none is."""
    return next((k for k, value in enumerate(curve, 1) if value < level), None)
