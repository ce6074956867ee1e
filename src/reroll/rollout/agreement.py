"""Does a rollout compute what the loop computes, on this cell and these inputs? Values and gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reroll.cells.base import Cell, State
from reroll.cells.layout import Layout
from reroll.rollout.base import Rollout, Trajectory, require_rollout
from reroll.rollout.sequential import Sequential


@dataclass(frozen=True)
class Agreement:
    """How far a rollout is from the loop; gradients are of a random projection of the states.

    Args:
        states: largest deviation of a state, relative to the largest state.
        gradients: the same for the gradient with respect to every parameter and the inputs, by name; infinite where
            only one of the two is finite.
        tolerance: what `ok` allows.
        trajectory: what the rollout returned.
    """

    states: float
    gradients: dict[str, float]
    tolerance: float
    trajectory: Trajectory

    @property
    def ok(self) -> bool:
        """Whether everything is within the tolerance."""
        return all(deviation <= self.tolerance for deviation in (self.states, *self.gradients.values()))

    def __str__(self) -> str:
        worst = max(self.gradients, key=lambda name: self.gradients[name], default=None)
        gradients = "none to compare" if worst is None else f"{self.gradients[worst]:.1e} (worst: {worst})"
        iterations = self.trajectory.iterations
        most = int(iterations.max()) if iterations.numel() else 0
        return (
            f"{'agrees' if self.ok else 'DOES NOT AGREE'} (tolerance {self.tolerance:.1e}): states differ by at most "
            f"{self.states:.1e}, gradients {gradients}; {most} iterations, outcome {self.trajectory.outcome.name}"
        )


def verify_agreement(
    rollout: Rollout, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None,
    lengths: Tensor | None = None, *, tolerance: float | None = None, seed: int = 0,
) -> Agreement:  # fmt: skip
    """Compare a rollout with `Sequential`, in values and gradients.

    Args:
        rollout: the rollout to check.
        cell, inputs, state, reset, lengths: as for a rollout.
        tolerance: relative; None is 1e-6 in float64 and 1e-3 in float32.
        seed: seed of the projection whose gradient is compared.

    Example:
        >>> from reroll.cells import GRU
        >>> from reroll.rollout import quasi_deer
        >>> verify_agreement(quasi_deer(), GRU(3, 5), torch.randn(2, 50, 3)).ok
        True
    """
    require_rollout(rollout)
    if tolerance is None:
        tolerance = 1e-6 if inputs.dtype == torch.float64 else 1e-3
    call = (cell, inputs, state, reset, {} if lengths is None else {"lengths": lengths})
    expected, reference = _run(Sequential(kernel="reference"), *call, seed)
    trajectory, gradients = _run(rollout, *call, seed)
    # A gradient that is zero but for rounding (a bias in front of a softmax) is compared at the scale of the others.
    floor = 1e-6 * max((float(g.abs().max()) for g in reference.values() if g.numel()), default=0.0)
    return Agreement(
        _deviation(_flat(trajectory), _flat(expected)),
        {name: _deviation(gradients[name], gradient, floor) for name, gradient in reference.items()},
        tolerance,
        trajectory,
    )


def _run(
    rollout: Rollout, cell: Cell, inputs: Tensor, state: State | None, reset: Tensor | None, options: Any, seed: int
) -> tuple[Trajectory, dict[str, Tensor]]:
    with torch.enable_grad():
        leaf = inputs.detach()
        if leaf.is_floating_point():  # symbols have no gradient
            leaf.requires_grad_()
        trajectory = rollout(cell, leaf, state, reset, **options)
        flat = _flat(trajectory)
        generator = torch.Generator().manual_seed(seed)
        weights = torch.randn(flat.shape, generator=generator, dtype=torch.float64).to(flat)
        sources = {"inputs": leaf} | dict(cell.named_parameters())
        sources = {name: source for name, source in sources.items() if source.requires_grad}
        gradients: tuple[Tensor | None, ...] = (None,) * len(sources)
        if sources and flat.requires_grad:
            gradients = torch.autograd.grad((flat * weights).sum(), list(sources.values()), allow_unused=True)
    zeros = {name: torch.zeros_like(source) for name, source in sources.items()}
    return trajectory, {name: zeros[name] if g is None else g for name, g in zip(sources, gradients)}


def _flat(trajectory: Trajectory) -> Tensor:
    return Layout.of(trajectory.final).pack(trajectory.states)


def _deviation(a: Tensor, b: Tensor, floor: float = 1e-30) -> float:
    if not b.numel():
        return 0.0
    a, b = a.detach(), b.detach()
    same = (a == b) | (a.isnan() & b.isnan())
    if bool(same.all()):
        return 0.0
    scale = max(float(b.abs().nan_to_num(0.0, 0.0, 0.0).max()), floor, 1e-30)
    deviation = float(torch.where(same, 0.0, a - b).abs().max()) / scale
    return deviation if math.isfinite(deviation) else math.inf
