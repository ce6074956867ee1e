"""Learning rates over time: pure functions of the step, and one rule that watches the loss.

    multiplier(step) = warm-up · shape

    warm-up    (step + 1) / W for the first W steps
    constant   1
    linear     1 until the last D steps, then down to `floor` ("warm-down", the trapezoid of the speedruns)
    cosine     floor + (1 − floor) · ½ (1 + cos π x), x from 0 to 1 after the warm-up

`Plateau` halves on top of it: its factor is multiplied when the loss has not improved for a while.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from reroll.errors import UsageError, require_positive

SHAPES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A multiplier of the learning rate for every step.

    Args:
        steps: length of the run.
        shape: "constant", "linear" or "cosine".
        warmup: steps of linear warm-up.
        warmdown: steps of the final linear descent, for "linear"; None is all steps after the warm-up.
        floor: where the multiplier ends.

    Example:
        >>> [round(Schedule(10, "linear", warmup=2, warmdown=4)(t), 2) for t in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    steps: int
    shape: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    warmdown: int | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        require_positive(steps=self.steps, warmdown=self.warmdown)
        if self.shape not in SHAPES:
            raise UsageError(f'schedule="{self.shape}" must be {", ".join(SHAPES)}.')
        if self.warmup < 0 or not 0 <= self.floor <= 1:
            raise UsageError(f"warmup={self.warmup} must not be negative, and floor={self.floor} lie in [0, 1].")

    def __call__(self, step: int) -> float:
        """Return the multiplier of a step, counted from 0. Beyond the end it stays where it ended."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.shape == "constant":
            return 1.0
        rest = max(self.steps - self.warmup, 1)
        down = rest if self.shape == "cosine" or self.warmdown is None else min(self.warmdown, rest)
        left = min(max(self.steps - step, 0) / down, 1.0)
        weight = left if self.shape == "linear" else 0.5 * (1 - math.cos(math.pi * left))
        return self.floor + (1 - self.floor) * weight


@dataclass
class Plateau:
    """Multiply the learning rate and ε by `factor` when the loss stops improving.

    An average e ← α ℓ + (1 − α) e of the loss counts as improved when it is more than `threshold`, relatively, below
    the best; after `patience` steps without, `multiplier` falls and the count starts again.

    Args:
        patience: steps without improvement; 0 never falls.
        factor: what the multiplier is multiplied by.
        threshold: relative improvement that counts.
        smoothing: α.

    Example:
        >>> plateau = Plateau(patience=2)
        >>> [plateau.see(loss) for loss in (3.0, 3.0, 3.0, 3.0)]
        [1.0, 1.0, 0.5, 0.5]
    """

    patience: int
    factor: float = 0.5
    threshold: float = 0.01
    smoothing: float = 0.1
    multiplier: float = 1.0
    average: float = math.nan
    best: float = math.inf
    waited: int = 0

    def see(self, loss: float) -> float:
        """Take in the loss of a step and return the multiplier for the next."""
        if not math.isfinite(loss):
            return self.multiplier
        old = loss if math.isnan(self.average) else self.average
        self.average = self.smoothing * loss + (1 - self.smoothing) * old
        if math.isinf(self.best) or (self.best - self.average) > self.threshold * abs(self.best):
            self.best, self.waited = self.average, 0
        else:
            self.waited += 1
        if self.patience and self.waited >= self.patience:
            self.multiplier, self.waited = self.multiplier * self.factor, 0
        return self.multiplier

    def state_dict(self) -> dict[str, Any]:
        """Return everything as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)
