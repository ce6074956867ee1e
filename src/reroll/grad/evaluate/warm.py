"""Probes through an iterative rollout: warm-start every branch from the trajectory of the unperturbed weights.

A probe moves the weights by ε, and so the trajectory by about ε: Newton's method needs the fewest iterations from the
unperturbed one. And since a loss difference is divided by 2ε, so is the solver's error: (error of a coefficient) ≈
(error of the loss) / ε. It is measured at every step: some of the probes are evaluated again with a hundredth of the
tolerance. (What both sides share cancels, so the unperturbed loss would tell little.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from reroll.grad.units import Result, Unit, batch_size
from reroll.rollout import Newton
from reroll.rollout.auto import Auto
from reroll.rollout.monitor import monitoring
from reroll.trees import map_state

TIGHTER = 0.01
"""Factor on the tolerance of the evaluation that serves as the reference."""
SHARE = 16
"""One probe in this many is evaluated again."""
TOO_LOOSE = 0.1
"""The largest acceptable error of the solver, as a share of the spread of the loss differences."""


def iterates(model: nn.Module) -> bool:
    """Whether a model contains a rollout that iterates."""
    return any(isinstance(getattr(module, "rollout", None), Newton | Auto) for module in model.modules())


class WarmStarts:
    """The trajectories of the unperturbed weights on the parts of a batch, and a loss that starts from them."""

    def __init__(self, loss_fn: Callable[[Any, Any], Any]):
        self.loss_fn = loss_fn
        self.trajectories: dict[Any, tuple[Any, list[Tensor]]] = {}
        """By `_address`, a part and its trajectories: while the part lives, no other one is at its address."""
        self.tolerance = 1.0
        self.passes = 0

    def prepare(self, model: nn.Module, parts: Iterable[Any]) -> None:
        """Solve the parts of a batch that the probes will see with the unperturbed weights."""
        for part in parts:
            if _address(part) in self.trajectories:
                continue
            with monitoring(keep=True) as clean:
                self.loss_fn(model, part)
            self.trajectories[_address(part)] = part, clean.trajectories
            self.passes += 1

    def __call__(self, model: Any, batch: Any) -> Any:
        """Return the loss, warm-started from the unperturbed trajectory if there is one."""
        _, guesses = self.trajectories.get(_address(batch), (None, ()))
        with monitoring(guesses=guesses, tolerance=self.tolerance, quiet=self.tolerance != 1.0):
            return self.loss_fn(model, batch)

    def error(
        self, units: list[Unit], results: list[Result], run: Callable[[list[Unit]], list[Result]]
    ) -> float | None:
        """Return the solver's error of a loss difference: the root mean square over every `SHARE`-th probe.

        It is None if none of these probes has a finite loss; `results` are those of `units`, all of the step.
        """
        firsts = [-unit.probes.start % SHARE for unit in units]
        some = [(unit, first, result) for unit, first, result in zip(units, firsts, results) if unit.probes[first:]]
        self.tolerance = TIGHTER
        try:
            exact = run([_every(unit, first) for unit, first, _ in some])
        finally:
            self.tolerance = 1.0
        total, weight = defaultdict[int, Any](float), defaultdict[int, int](int)
        for (unit, first, result), again in zip(some, exact):
            errors = (result.losses[:, first::SHARE] - again.losses).double().cpu()
            self.passes += errors.numel()
            rows = batch_size(unit.batch) or 1
            differences = errors[0] - errors[1] if len(errors) == 2 else errors[0]
            for probe, difference in zip(unit.probes[first::SHARE], differences):
                total[probe] = total[probe] + rows * difference
                weight[probe] += rows
        error = torch.stack([total[probe] / weight[probe] for probe in total])
        error = error[error.isfinite()]
        return float(error.square().mean().sqrt()) if len(error) else None


def _every(unit: Unit, first: int) -> Unit:
    """Return the unit with every `SHARE`-th of its probes."""
    count, states = len(unit.probes), unit.states
    if states is not None:
        states = [state for i, state in enumerate(states) if i % count >= first and (i % count - first) % SHARE == 0]
    return unit._replace(probes=unit.probes[first::SHARE], states=states)


def _address(batch: Any) -> Any:
    """What identifies a part of a batch: the memory of its tensors, or without tensors the object itself."""
    tensors: list[Tensor] = []
    map_state(getattr(batch, "inputs", batch), lambda tensor: tensors.append(tensor) or tensor)
    strided = torch.strided
    return tuple((t.data_ptr(), t.shape, t.stride()) if t.layout is strided else id(t) for t in tensors) or id(batch)
