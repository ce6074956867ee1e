"""A rule that watches the loss: `Plateau` lowers the learning rate when it has not improved for a while."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Plateau:
    """Multiply the learning rate and ε by `factor` when the loss stops improving.

    An average e ← α ℓ + (1 − α) e of the loss counts as improved when it is more than `threshold`, relatively, below
    the best; after `patience` steps without, `multiplier` falls and the count starts again.

    Args:
        patience: steps without improvement; 0: the multiplier never falls.
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
        """Record the loss of a step and return the multiplier for the next."""
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
        """Return the fields as plain numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        for name, value in state.items():
            setattr(self, name, value)
