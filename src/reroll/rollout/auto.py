"""The rollout that is likely the fastest, by static rules on the cell, the sizes and the device.

The rules come from `reroll bench rollouts` (figures in docs/results.md). They never look at a clock, so the same call
always takes the same way; what was taken is in `Trajectory.method` and `reroll.kernels.dispatch.report()`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reroll.cells.base import Cell, State
from reroll.kernels import dispatch
from reroll.rollout.base import Rollout, Trajectory
from reroll.rollout.presets import quasi_deer
from reroll.rollout.sequential import Sequential

SHORT = 256
"""Steps below which a loop is taken: there is not enough along time to share out."""


@dataclass(frozen=True)
class Auto:
    """Chooses among `Sequential` and `quasi_deer` for every call.

    Args:
        options: keyword arguments of `Newton`, where that is taken.
    """

    options: tuple[tuple[str, Any], ...] = ()

    def __call__(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> Trajectory:
        """Return all states; see `Rollout`."""
        rollout = self.choose(cell, inputs)
        return rollout(cell, inputs, state, reset)

    def read(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the readouts and the final state; see `Rollout`."""
        return self.choose(cell, inputs).read(cell, inputs, state, reset)

    def choose(self, cell: Cell, inputs: Tensor) -> Rollout:
        """Return the rollout for a cell and inputs of this shape on this device."""
        batch, time = inputs.shape[:2]
        candidates = (
            dispatch.Candidate("sequential", time < SHORT, f"{time} steps are too few to share out"),
            dispatch.Candidate("quasi_deer", True, f"{time} steps of {batch} sequences at once"),
        )
        name = dispatch.choose("rollout", candidates).name
        return Sequential() if name == "sequential" else quasi_deer(**dict(self.options))


def auto(**options: Any) -> Auto:
    """Return a rollout that chooses; keyword arguments are those of `Newton`."""
    return Auto(tuple(options.items()))
