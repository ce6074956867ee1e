"""Observe and steer the rollouts inside a model without changing the model.

    with monitoring() as monitor:
        loss_fn(model, batch)
    monitor.iterations, monitor.fell_back               how hard they were to evaluate

    with monitoring(keep=True) as clean: …              record the trajectories of an evaluation,
    with monitoring(guesses=clean.trajectories): …      and start the next ones from them: a warm start
    with monitoring(observe=look): …                    look(states) at every iterate, [D, steps of the window, batch]

Blocks can be nested; an outer one still records, guesses and tightens. Rollouts that do not iterate are not monitored.
Guesses are matched by the order of the calls, as cells may be copies: a model that skips a layer starts the next one at
that layer's trajectory, if their shapes agree. That costs iterations, but converges to the same solution.
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
    """A record of the rollouts inside a block, and options for them.

    Args:
        guesses: initial trajectories, in the order of the calls; those of another shape are ignored.
        keep: record the trajectories in `trajectories`.
        tolerance: factor on `rtol` and `atol`.
        quiet: fall back step by step without an error or a warning, and record nothing in outer blocks.
        observe: called with every iterate of every window except the guess; it must not change its argument.
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
        """Return the guess for the next call, if there is one of this shape."""
        if not self.guesses and self.outer is not None:
            return self.outer.guess(shape)
        if self.calls < len(self.guesses) and tuple(self.guesses[self.calls].shape) == shape:
            return self.guesses[self.calls]
        return None

    @property
    def factor(self) -> float:
        """Factor on `rtol` and `atol`, outer blocks included."""
        return self.tolerance * (1.0 if self.outer is None else self.outer.factor)

    @property
    def observed(self) -> bool:
        """Whether there is an observer of iterates, outer blocks included."""
        return self.observe is not None or (self.outer is not None and self.outer.observed)

    def show(self, states: Tensor) -> None:
        """Pass an iterate, [D, T, B], to the observers."""
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
    """Monitor the rollouts of a block; see `Monitor`."""
    monitor = Monitor(guesses, keep, tolerance, quiet, observe, outer=_current.get())
    token = _current.set(monitor)
    try:
        yield monitor
    finally:
        _current.reset(token)
