"""Probes through a rollout that iterates: begin every branch at the trajectory of the unperturbed weights.

A probe moves the weights by ε, and so the trajectory by about ε: from the unperturbed one, Newton's method has less far
to go than from anywhere else. And since a loss difference is divided by 2ε, what the solver leaves over is divided by
it too: (error of a coefficient) ≈ (error of the loss) / ε. That error is measured at every step: some of the probes are
evaluated once more, a hundred times as exactly. (What both sides share cancels: the unperturbed loss would say little.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reroll.grad.units import Result, Unit, batch_size
from reroll.rollout import Newton
from reroll.rollout.auto import Auto
from reroll.rollout.monitor import monitoring
from reroll.trees import map_state

TIGHTER = 0.01
"""Factor on the tolerance of the evaluation that the other one is compared with."""
SHARE = 16
"""One probe in so many is evaluated again."""
TOO_LOOSE = 0.1
"""Share of the spread of the loss differences that the solver's error may have."""


def iterates(model: nn.Module) -> bool:
    """Whether a model evaluates a recurrence by a method that iterates."""
    return any(isinstance(getattr(module, "rollout", None), Newton | Auto) for module in model.modules())


class WarmStarts:
    """The trajectories of the unperturbed weights on every part of a batch, and a loss that begins there."""

    def __init__(self, loss_fn: Callable[[Any, Any], Any]):
        self.loss_fn = loss_fn
        self.trajectories: dict[Any, tuple[Any, list[Tensor]]] = {}
        """The part and its trajectories, by `_address` of the part: while it lives, no other is there."""
        self.tolerance = 1.0
        self.passes = 0

    def prepare(self, model: nn.Module, parts: Iterable[Any]) -> None:
        """Solve the parts of a batch that the probes will see with the weights as they are."""
        for part in parts:
            if _address(part) in self.trajectories:
                continue
            with monitoring(keep=True) as clean:
                self.loss_fn(model, part)
            self.trajectories[_address(part)] = part, clean.trajectories
            self.passes += 1

    def __call__(self, model: Any, batch: Any) -> Any:
        """Return the loss, warm-started from the unperturbed trajectory if there is one."""
        again = self.tolerance != 1.0
        _, guesses = self.trajectories.get(_address(batch), (None, ()))
        with monitoring(guesses=guesses, tolerance=self.tolerance, quiet=again):
            return self.loss_fn(model, batch)

    def error(
        self, units: list[Unit], results: list[Result], run: Callable[[list[Unit]], list[Result]]
    ) -> float | None:
        """Return how far the solver moves a loss difference: the root mean square over every `SHARE`-th probe.

        It is None if none of these probes has a finite loss; `results` are those of `units`, all of the step.
        """
        firsts = [-unit.probes.start % SHARE for unit in units]
        some = [(unit, first, result) for unit, first, result in zip(units, firsts, results) if unit.probes[first:]]
        with self._tightly():
            exact = run([_every(unit, first) for unit, first, _ in some])
        total, weight = defaultdict[int, Any](float), defaultdict[int, int](int)
        for (unit, first, result), again in zip(some, exact):
            errors = (result.losses[:, first::SHARE] - again.losses).double().cpu()
            self.passes += errors.numel()
            rows = batch_size(unit.batch) or 1
            differences = errors[0] - errors[1] if len(errors) == 2 else errors[0]
            for probe, difference in zip(unit.probes[first::SHARE], differences):
                total[probe] = total[probe] + rows * difference
                weight[probe] += rows
        moved = torch.stack([total[probe] / weight[probe] for probe in total])
        moved = moved[moved.isfinite()]
        return float(moved.square().mean().sqrt()) if len(moved) else None

    @contextmanager
    def _tightly(self) -> Iterator[None]:
        self.tolerance = TIGHTER
        try:
            yield
        finally:
            self.tolerance = 1.0


def _every(unit: Unit, first: int) -> Unit:
    """Return the unit with every `SHARE`-th of its probes."""
    count, states = len(unit.probes), unit.states
    if states is not None:
        states = [state for i, state in enumerate(states) if i % count >= first and (i % count - first) % SHARE == 0]
    return unit._replace(probes=unit.probes[first::SHARE], states=states)


def _address(batch: Any) -> Any:
    """What tells one part of a batch from another: where its tensors are, or without tensors the object itself."""
    tensors: list[Tensor] = []
    map_state(getattr(batch, "inputs", batch), lambda tensor: tensors.append(tensor) or tensor)
    strided = torch.strided
    return tuple((t.data_ptr(), t.shape, t.stride()) if t.layout is strided else id(t) for t in tensors) or id(batch)
