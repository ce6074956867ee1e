"""The processes that train one run together, of which one writes its folder.

    mesh.writes             this process owns the run folder
    mesh.share(value)       the first process's value, on all: the plan, a learning rate that was searched
    mesh.gather(losses)     the losses of every process's probes, in unit order: all that travels in a step of probes
    mesh.barrier()          wait for the others
    mesh.execute            who evaluates the units of a step; None: threads of this process

`Alone` is a mesh of one process, and costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from reroll.grad.execute import Execute

T = TypeVar("T")


class Mesh(Protocol):
    """Processes with numbers from 0 to `size` − 1."""

    @property
    def rank(self) -> int:
        """The number of this one."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    @property
    def writes(self) -> bool:
        """Whether this one writes the run folder."""
        ...

    @property
    def execute(self) -> Execute | None:
        """Who evaluates the units of a step; None: threads of this process."""
        ...

    def share(self, value: T) -> T:
        """Return the value of process 0; a small one that can be serialised."""
        ...

    def gather(self, losses: Tensor) -> Tensor:
        """Return the losses of all processes, fp32, one behind the other along the last axis."""
        ...

    def barrier(self) -> None:
        """Wait until all have come here."""
        ...


@dataclass(frozen=True)
class Alone:
    """A mesh of one process.

    Example:
        >>> mesh = Alone()
        >>> mesh.writes, mesh.share("plan")
        (True, 'plan')
    """

    rank: int = 0
    size: int = 1
    writes: bool = True
    execute: Execute | None = None

    def share(self, value: Any) -> Any:
        """Return the value."""
        return value

    def gather(self, losses: Tensor) -> Tensor:
        """Return the losses."""
        return losses

    def barrier(self) -> None:
        """Do nothing."""


ALONE = Alone()
"""The mesh of a run that nobody shares."""
