"""The processes that train one run together, of which one writes its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from reroll.grad.units import Execute


@dataclass(frozen=True)
class Mesh:
    """One process, which costs nothing; a mesh of several overrides `share` and `barrier`.

    Args:
        rank: the number of this process.
        size: how many there are.
        writes: whether this one writes the run folder.
        execute: who evaluates the units of a step; None: threads of this process.

    Example:
        >>> mesh = Mesh()
        >>> mesh.writes, mesh.share("plan")
        (True, 'plan')
    """

    rank: int = 0
    size: int = 1
    writes: bool = True
    execute: Execute | None = None

    def share(self, value: Any) -> Any:
        """Return the value of process 0: the plan, a learning rate that was searched."""
        return value

    def barrier(self) -> None:
        """Wait until all processes have come here."""


ALONE = Mesh()
"""The mesh of a run that nobody shares."""
