"""Probes through a rollout that iterates: begin every branch at the trajectory of the unperturbed weights.

A probe moves the weights by ε, and so the trajectory by about ε: from the unperturbed one, Newton's method has less far
to go than from anywhere else. And since a loss difference is divided by 2ε, what the solver leaves over is divided by
it too: (error of a coefficient) ≈ (error of the loss) / ε. That error is measured at every step, by solving the
unperturbed trajectory once more, a hundred times as exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from reroll.grad.evaluate.probing import split_result
from reroll.rollout import Newton
from reroll.rollout.auto import Auto
from reroll.rollout.watch import watching

TIGHTER = 0.01
"""Factor on the tolerance of the solution that the other one is compared with."""
TOO_LOOSE = 0.1
"""Share of the spread of the loss differences that the solver's error may have."""


def iterates(model: nn.Module | None) -> bool:
    """Whether a model evaluates a recurrence by a method that iterates."""
    if model is None:
        return False
    return any(isinstance(getattr(module, "rollout", None), Newton | Auto) for module in model.modules())


def alone_in_place(model: nn.Module | None) -> str | None:
    """Return why the branches of a model can only be evaluated with its weights in place, or None."""
    if iterates(model):
        return "the rollout iterates until it has converged, differently for every branch"
    if model is not None and any(
        getattr(getattr(module, "rollout", None), "kernel", "") == "compiled" for module in model.modules()
    ):
        return "the rollout compiles the step with the weights of every branch"
    return None


class WarmStarts:
    """The trajectories of the unperturbed weights on every part of a batch, and a loss that begins there.

    Args:
        loss_fn: (model, batch) → loss, or (loss, state).
    """

    def __init__(self, loss_fn: Callable[[Any, Any], Any]):
        self.loss_fn = loss_fn
        self.kept: dict[Any, list[Tensor]] = {}
        self.error = 0.0
        self.passes = 0

    def prepare(self, model: nn.Module, parts: Iterable[Any]) -> None:
        """Solve the parts of a batch with the weights as they are.

        Args:
            model: the model.
            parts: what the probes will see of the batch.
        """
        for part in parts:
            if _name(part) in self.kept:
                continue
            with watching(keep=True) as clean:
                loss = _mean(self.loss_fn(model, part))
            with watching(guesses=clean.kept, tolerance=TIGHTER):
                exact = _mean(self.loss_fn(model, part))
            self.kept[_name(part)] = clean.kept
            self.error = max(self.error, abs(loss - exact))
            self.passes += 2

    def __call__(self, model: Any, batch: Any) -> Any:
        """Return the loss, begun at the trajectory of the unperturbed weights."""
        with watching(guesses=self.kept.get(_name(batch), ())):
            return self.loss_fn(model, batch)


def _name(batch: Any) -> Any:
    """What tells one part of a batch from another: where its first tensor lies."""
    first = getattr(batch, "inputs", batch)
    while isinstance(first, tuple | list | dict) and first:
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    return (first.data_ptr(), tuple(first.shape)) if isinstance(first, Tensor) else id(first)


def _mean(result: Any) -> float:
    return float(split_result(result, single=False)[0].to(torch.float64))
