"""Look at, and steer, the rollouts inside a model without touching the model.

    with monitoring() as seen:
        loss_fn(model, batch)
    seen.iterations, seen.fell_back              how hard they were to evaluate

    with monitoring(keep=True) as clean: …         keep the trajectories of an evaluation,
    with monitoring(guesses=clean.trajectories): …         and begin the next ones there: a warm start
    with monitoring(observe=look): …               look(states) at every iterate, [D, steps of the window, batch]

Blocks can be nested; an outer one goes on seeing, guessing and tightening. Rollouts that do not iterate take no part.
Guesses go by the order of the calls, as cells may be copies: a model that skips a layer begins the next one at that
layer's trajectory, where their shapes agree. That costs iterations; what is converged to is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from reroll.rollout.base import Trajectory


@dataclass
class Monitor:
    """What was seen of the rollouts inside a block.

    Args:
        guesses: trajectories to begin with, in the order of the calls; those of another shape are passed over.
        keep: keep the trajectories in `trajectories`.
        tolerance: factor on `rtol` and `atol`.
        quiet: what does not converge is evaluated step by step without a word, and no block around this one sees it.
        observe: called with every iterate of every window, the guess left out; it must not change what it is given.
        trajectories: the trajectories [batch, time, D], in the order of the calls.
        calls: how many rollouts ran.
        iterations: the most that any needed.
        fell_back: sequences that did not converge.
    """

    guesses: Sequence[Tensor] = ()
    keep: bool = False
    tolerance: float = 1.0
    quiet: bool = False
    observe: Callable[[Tensor], None] | None = None
    trajectories: list[Tensor] = field(default_factory=list)
    calls: int = 0
    iterations: int = 0
    fell_back: int = 0
    outer: Monitor | None = None

    def guess(self, shape: tuple[int, ...]) -> Tensor | None:
        """Return the trajectory for the call that comes, if there is one that fits."""
        if not self.guesses and self.outer is not None:
            return self.outer.guess(shape)
        if self.calls < len(self.guesses) and tuple(self.guesses[self.calls].shape) == shape:
            return self.guesses[self.calls]
        return None

    @property
    def factor(self) -> float:
        """What `rtol` and `atol` are multiplied by, all blocks around this one included."""
        return self.tolerance * (1.0 if self.outer is None else self.outer.factor)

    @property
    def observed(self) -> bool:
        """Whether someone wants to see the iterates."""
        return self.observe is not None or (self.outer is not None and self.outer.observed)

    def show(self, states: Tensor) -> None:
        """Let the observers look at an iterate, [D, T, B]."""
        if self.observe is not None:
            self.observe(states)
        if self.outer is not None:
            self.outer.show(states)

    def record(self, trajectory: Trajectory, states: Tensor) -> None:
        """Record a finished call."""
        self.calls += 1
        if trajectory.iterations.numel():
            self.iterations = max(self.iterations, int(trajectory.iterations.max()))
            self.fell_back += int((~trajectory.converged).sum())
        if self.keep:
            self.trajectories.append(states.detach())
        if self.outer is not None and not self.quiet:
            self.outer.record(trajectory, states)


_current: ContextVar[Monitor | None] = ContextVar("rollout monitor", default=None)


def current() -> Monitor | None:
    """Return the innermost monitor of this context."""
    return _current.get()


@contextmanager
def monitoring(
    *,
    guesses: Sequence[Tensor] = (),
    keep: bool = False,
    tolerance: float = 1.0,
    quiet: bool = False,
    observe: Callable[[Tensor], None] | None = None,
) -> Iterator[Monitor]:
    """Monitor over the rollouts of a block; see `Monitor`."""
    monitor = Monitor(guesses, keep, tolerance, quiet, observe, outer=_current.get())
    token = _current.set(monitor)
    try:
        yield monitor
    finally:
        _current.reset(token)
