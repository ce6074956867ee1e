"""The recurrence evaluated for all steps at once: Newton's method on the trajectory, and its relatives.

All solve r_t = f_t(s_{t−1}) − s_t = 0 by repeating a linear recurrence along time, δ_t = Ã_t δ_{t−1} + r_t, s ← s + δ:

    linearise       what Ã keeps of the Jacobian          (DEER, quasi-DEER, Picard, Jacobi …)
    damping         how far a step is trusted             (ELK, scaling, clipping)

    trajectory = Newton(Diagonal())(cell, inputs)         or by the papers' names: `quasi_deer()(cell, inputs)`

How many iterations are needed depends on the dynamics (see `reroll.predictability`): a handful where the recurrence
forgets, as many as there are steps where it is chaotic. What has not converged is evaluated step by step from where it
is still exact, and the outcome says so. Gradients are the exact ones of the trajectory (see `rollout.adjoint`).

Lim et al., arXiv:2309.12252 (DEER); Gonzalez et al., arXiv:2407.19115 (quasi-DEER, ELK).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reroll.cells import jacobian
from reroll.cells.base import Cell, State
from reroll.cells.layout import Layout
from reroll.errors import RunError, UsageError, require_positive
from reroll.outcome import Outcome
from reroll.rollout import adjoint
from reroll.rollout.base import Trajectory, start
from reroll.rollout.damping import Damping, Undamped
from reroll.rollout.linearise import ROWS_FLOATS, Diagonal, Kind, Linearisation, Transition
from reroll.rollout.purity import require_pure
from reroll.rollout.watch import current

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
"""Default `rtol` and `atol`; lower precisions are solved in float32."""
CLIP = 1e8
"""States beyond this are held there while iterating."""


class Problem(NamedTuple):
    """A recurrence on vectors.

    Args:
        cell, layout: the recurrence, and how its state becomes a vector.
        u: projected inputs, [B, T, U].
        start: the state before the first step, [B, D].
        fresh: the state after a reset, [B, D].
        reset: [B, T] or None.
    """

    cell: Cell
    layout: Layout
    u: Tensor
    start: Tensor
    fresh: Tensor | None = None
    reset: Tensor | None = None

    def before(self, states: Tensor) -> Tensor:
        """Return the state before every step, [B, T, D]."""
        previous = torch.cat([self.start.unsqueeze(1), states[:, :-1]], 1)
        if self.reset is None or self.fresh is None:
            return previous
        return torch.where(self.reset.unsqueeze(-1), self.fresh.unsqueeze(1), previous)

    def window(self, begin: int, end: int, start: Tensor) -> Problem:
        """Return some of the steps."""
        reset = None if self.reset is None else self.reset[:, begin:end]
        return self._replace(u=self.u[:, begin:end], start=start, reset=reset)

    def rows(self, keep: Tensor) -> Problem:
        """Return some of the sequences."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[keep]

        return self._replace(u=self.u[keep], start=self.start[keep], fresh=pick(self.fresh), reset=pick(self.reset))

    def step(self, states: Tensor) -> Tensor:
        """Return f of every step, [B, T, D], given the states of all steps."""
        before = self.before(states)
        return jacobian.step(self.cell, self.layout, self.u.flatten(0, 1), before.flatten(0, 1)).view_as(before)


class Solution(NamedTuple):
    """States of a window, and per sequence how they were found."""

    states: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    resets: Tensor


@dataclass(frozen=True)
class Newton:
    """Evaluate a cell for all steps at once.

    Args:
        linearise: what is kept of the Jacobian.
        damping: how far a step is trusted; None is all the way.
        adjoint: how the gradient is found; see `reroll.rollout.adjoint`. All ways are exact.
        guess: where to begin: "f0" (every step from the first state), "s0" (the first state), "zeros", or states
            [batch, time, D] (a warm start).
        window: steps solved at a time, one window after another; None is all, "auto" by static rules.
        max_iterations: None is 100 (50 with a dense Jacobian), and never more than the steps of a window need.
        rtol, atol: tolerance of the residual, and of the last correction if undamped, against the largest state;
            None is 1e-9 in float64 and 1e-5 in float32.
        on_failure: what is done about sequences that do not converge: evaluate them step by step from where they are
            exact ("sequential"), the same with a warning ("warn"), or raise.

    Example:
        >>> from reroll.cells import GRU
        >>> trajectory = Newton()(GRU(3, 5), torch.randn(2, 100, 3))
        >>> trajectory.states.shape, bool(trajectory.converged.all())
        (torch.Size([2, 100, 5]), True)
    """

    linearise: Linearisation = field(default_factory=Diagonal)
    damping: Damping | None = None
    adjoint: Literal["auto", "dense", "splitting", "sequential"] = "auto"
    guess: Literal["f0", "s0", "zeros"] | Tensor = "f0"
    window: int | Literal["auto"] | None = "auto"
    max_iterations: int | None = None
    rtol: float | None = None
    atol: float | None = None
    on_failure: Literal["sequential", "raise", "warn"] = "sequential"

    def __post_init__(self) -> None:
        require_positive(max_iterations=self.max_iterations, window=None if self.window == "auto" else self.window)
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None and not 0 <= value < float("inf"):
                raise UsageError(f"{name}={value} must be zero or a positive number.")
        if self.on_failure not in ("sequential", "raise", "warn"):
            raise UsageError(f'on_failure="{self.on_failure}" must be "sequential", "raise" or "warn".')
        if isinstance(self.guess, str) and self.guess not in ("f0", "s0", "zeros"):
            raise UsageError(f'guess="{self.guess}" must be "f0", "s0", "zeros" or a tensor of states.')
        if self.adjoint not in adjoint.METHODS:
            raise UsageError(f'adjoint="{self.adjoint}" must be {", ".join(adjoint.METHODS)}.')

    def __call__(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> Trajectory:
        """Return all states; see `Rollout`.

        Raises:
            UsageError: if shapes do not fit, the state is not floating point, or the cell edits its arguments or is
                random.
            RunError: with on_failure="raise", if a sequence does not converge.
        """
        problem = make_problem(cell, inputs, state, reset)
        if inputs.shape[1] == 0:
            return _empty(problem, inputs)
        require_pure(cell, problem)
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            detached = problem._replace(
                u=problem.u.detach(), start=problem.start.detach(),
                fresh=None if problem.fresh is None else problem.fresh.detach(),
            )  # fmt: skip
            found = self._solve(detached)
        outcome, found = self._finish(detached, found)
        states = found.states
        if torch.is_grad_enabled():
            states = adjoint.attach(problem, states, self.adjoint)
        trajectory = Trajectory(
            states=problem.layout.unpack(states),
            final=problem.layout.unpack(states[:, -1]),
            outcome=outcome,
            iterations=found.iterations,
            residual=found.residual,
            converged=found.converged,
            resets=found.resets,
        )
        if (watch := current()) is not None:
            watch.see(trajectory, states)
        return trajectory

    def read(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the readouts and the final state; see `Rollout`."""
        trajectory = self(cell, inputs, state, reset)
        return cell.readout(trajectory.states), trajectory.final

    # ---- solving

    def _solve(self, problem: Problem) -> Solution:
        """Solve window after window."""
        batch, time, size = problem.u.shape[0], problem.u.shape[1], problem.layout.size
        width = self._width(problem, batch, time, size)
        watch = current()
        warm = None if watch is None else watch.guess((batch, time, size))
        if width >= time:
            return self._newton(problem, self._guess(problem, warm, 0, time))
        windows: list[Solution] = []
        begin_state = problem.start
        for begin in range(0, time, width):
            end = min(begin + width, time)
            part = problem.window(begin, end, begin_state)
            found = self._newton(part, self._guess(part, warm, begin, end))
            if not bool(found.converged.all()):
                found = _repair(part, found)
            windows.append(found)
            begin_state = found.states[:, -1]
        return _joined(windows)

    def _width(self, problem: Problem, batch: int, time: int, size: int) -> int:
        if self.window == "auto":
            if problem.u.device.type != "cpu":
                return time
            # On a CPU a window whose states fit the second cache makes the scan and the tests as fast as the cells.
            per_step = batch * size * (size if self.linearise.kind == "dense" else 1)
            return max(64, ROWS_FLOATS // per_step)
        return self.window or time

    def _guess(self, problem: Problem, warm: Tensor | None, begin: int, end: int) -> Tensor:
        batch, steps, size = *problem.u.shape[:2], problem.layout.size
        repeated = problem.start.unsqueeze(1).expand(batch, steps, size)
        if warm is not None:
            return warm[:, begin:end].to(problem.u.dtype)
        if isinstance(self.guess, Tensor):
            expected = (batch, size)
            if (self.guess.shape[0], self.guess.shape[-1]) != expected or self.guess.shape[1] < end:
                raise UsageError(
                    f"guess has shape {tuple(self.guess.shape)}; expected states [batch, time, D] = "
                    f"({batch}, ≥ {end}, {size})."
                )
            return self.guess[:, begin:end].to(problem.u.dtype)
        if self.guess == "zeros":
            return torch.zeros_like(repeated)
        if self.guess == "s0":
            return repeated.contiguous()
        return _evaluate(problem, repeated, _StepOnly(), 0, None)[0]

    def _newton(self, problem: Problem, guess: Tensor) -> Solution:
        """Iterate on one window until every sequence has converged, or the iterations are used up."""
        damping: Damping = self.damping or Undamped()
        limit = self._limit(problem.u.shape[1])
        atol, rtol = self._tolerances(problem.u.dtype)
        batch = problem.u.shape[0]
        found = _Iterate.first(problem, guess, self.linearise)
        iterations = torch.zeros(batch, dtype=torch.int64, device=guess.device)
        resets = torch.zeros_like(iterations)
        converged = found.residual_size() == 0
        trust = torch.ones(batch, dtype=guess.dtype, device=guess.device) if _adaptive(damping) else None
        for iteration in range(1, limit + 1):
            if bool(converged.all()):
                break
            exact = found.exact_steps(atol, rtol)
            trial, replaced = found.advance(damping, trust, guess, exact, converged)
            following = _Iterate.at(problem, trial, self.linearise, iteration, found.transition)
            worse = None
            if trust is not None:
                worse = ~(following.merit() < found.merit()) & ~converged
                trust = torch.where(worse, trust / 3, trust * 3).clamp(1e-9, 1e9)
            change = (trial - found.states).abs().amax((1, 2))
            found = following if worse is None or not bool(worse.any()) else following.merged(found, worse)
            iterations += ~converged
            resets += torch.where(converged, 0, replaced)
            bound = atol + rtol * found.states.abs().amax((1, 2))
            near = found.residual_size() <= bound
            if not damping.damped:
                near &= change <= bound
            converged |= near & (True if worse is None else ~worse)
        return Solution(found.states, iterations, found.residual_size(), converged, resets)

    def _limit(self, steps: int) -> int:
        if self.max_iterations is not None:
            return self.max_iterations
        return min(steps + 1, 50 if self.linearise.kind == "dense" else 100)

    def _tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        usual = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
        factor = 1.0 if (watch := current()) is None else watch.tolerance
        atol, rtol = (usual if given is None else given for given in (self.atol, self.rtol))
        return factor * atol, factor * rtol

    def _finish(self, problem: Problem, found: Solution) -> tuple[Outcome, Solution]:
        """Do what `on_failure` says about sequences that have not converged."""
        if bool(found.converged.all()):
            return Outcome.ok, found
        failed = int((~found.converged).sum())
        message = (
            f"{failed} of {len(found.converged)} sequences did not converge in {int(found.iterations.max())} "
            f"iterations (largest residual {float(found.residual.max()):.3g})."
        )
        if self.on_failure == "raise":
            raise RunError(f"{message} {Outcome.fell_back.value}")
        if self.on_failure == "warn":
            warnings.warn(f"{message} They were evaluated step by step.", stacklevel=3)
        with torch.no_grad():
            return Outcome.fell_back, _repair(problem, found)


class _StepOnly:
    """A linearisation that keeps nothing."""

    kind: Kind = "zero"

    def __call__(self, cell, layout, u, state, steps, iteration, kept):  # type: ignore[no-untyped-def]
        return jacobian.step(cell, layout, u, state), None


class _Iterate(NamedTuple):
    """A trajectory, its residual, and the linearisation there."""

    problem: Problem
    states: Tensor
    residual: Tensor
    transition: Transition

    @classmethod
    def first(cls, problem: Problem, guess: Tensor, linearise: Linearisation) -> _Iterate:
        return cls.at(problem, guess, linearise, 0, Transition(linearise.kind))

    @classmethod
    def at(
        cls, problem: Problem, states: Tensor, linearise: Linearisation, iteration: int, before: Transition
    ) -> _Iterate:
        following, kept = _evaluate(problem, states, linearise, iteration, before.tensor)
        return cls(problem, states, following.sub_(states), Transition(linearise.kind, kept))

    def residual_size(self) -> Tensor:
        return self.residual.abs().amax((1, 2)).nan_to_num(nan=torch.inf)

    def merit(self) -> Tensor:
        return self.residual.square().sum((1, 2)).nan_to_num(nan=torch.inf)

    def exact_steps(self, atol: float, rtol: float) -> Tensor:
        """Return how many leading steps satisfy the recurrence, [B]."""
        bound = atol + rtol * self.states.abs().amax(-1)
        return (self.residual.abs().amax(-1) <= bound).long().cumprod(1).sum(1)

    def advance(
        self, damping: Damping, trust: Tensor | None, guess: Tensor, exact: Tensor, frozen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the next states, and per sequence how many of their entries had to be replaced."""
        transition, residual, broken = self._finite(guess)
        states = self.states + damping.correct(transition, residual, trust)
        bad = ~torch.isfinite(states)
        if broken is not None or bool(bad.any()):
            # What is exact stays; elsewhere the guess is as good as anything finite.
            bad = bad if broken is None else bad | broken
            known = torch.arange(states.shape[1], device=states.device) < exact.unsqueeze(1)
            states = torch.where(bad, torch.where(known.unsqueeze(-1), self.states, guess), states)
        states = torch.where(frozen.view(-1, 1, 1), self.states, states.clamp_(-CLIP, CLIP))
        return states, bad.flatten(1).sum(1)

    def _finite(self, guess: Tensor) -> tuple[Transition, Tensor, Tensor | None]:
        """Return the linearisation with steps that cannot be computed cut out, and where those are."""
        kind, a = self.transition
        bad = ~torch.isfinite(self.residual).all(-1)
        if a is not None and kind != "identity":
            bad = bad | ~torch.isfinite(a).flatten(2).all(-1)
        if not bool(bad.any()):
            return self.transition, self.residual, None
        residual = torch.where(bad.unsqueeze(-1), guess - self.states, self.residual)
        residual = residual.nan_to_num(0.0, 0.0, 0.0)
        if a is not None:
            a = torch.where(bad.view(*bad.shape, *[1] * (a.dim() - 2)), 0.0, a)
        return Transition(kind, a), residual, bad.unsqueeze(-1).expand_as(residual)

    def merged(self, other: _Iterate, rows: Tensor) -> _Iterate:
        """Return this with some sequences taken from another."""

        def take(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *[1] * (a.dim() - 1)), b, a)

        mine, others = self.transition.tensor, other.transition.tensor
        tensor = None if mine is None or others is None else take(mine, others)
        return self._replace(
            states=take(self.states, other.states), residual=take(self.residual, other.residual),
            transition=Transition(self.transition.kind, tensor),
        )  # fmt: skip


def _evaluate(
    problem: Problem, states: Tensor, linearise: Linearisation, iteration: int, kept: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return f of every step and its transition, which is zero where a sequence starts."""
    batch, time, size = states.shape
    before = problem.before(states)
    rows, u = before.flatten(0, 1), problem.u.flatten(0, 1)
    flat = None if kept is None else kept.flatten(0, 1)
    following, a = linearise(problem.cell, problem.layout, u, rows, time, iteration, flat)
    following = following.view(batch, time, size)
    if linearise.kind == "identity":
        a = torch.ones_like(following)
    if a is None:
        return following, None
    a = a.unflatten(0, (batch, time)) if a.shape[0] == batch * time and linearise.kind != "identity" else a
    a = a.contiguous() if a is kept or not a.is_contiguous() else a
    a[:, 0] = 0
    if problem.reset is not None:
        a = a.masked_fill(problem.reset.view(batch, time, *[1] * (a.dim() - 2)), 0.0)
    return following, a


def _adaptive(damping: Damping) -> bool:
    return bool(getattr(damping, "adaptive", False))


def _repair(problem: Problem, found: Solution) -> Solution:
    """Evaluate the sequences that have not converged step by step, from where they are still exact."""
    failed = (~found.converged).nonzero().squeeze(1)
    part, states = problem.rows(failed), found.states[failed].clone()
    residual = part.step(states).sub_(states).abs()
    bound = 1e-12 * (1 + states.abs().amax(-1)) if states.dtype == torch.float64 else 1e-6 * (1 + states.abs().amax(-1))
    exact = int((residual.amax(-1) <= bound).long().cumprod(1).sum(1).min())
    state = part.start if exact == 0 else states[:, exact - 1]
    for t in range(exact, states.shape[1]):
        if part.reset is not None and part.fresh is not None:
            state = torch.where(part.reset[:, t : t + 1], part.fresh, state)
        state = jacobian.step(part.cell, part.layout, part.u[:, t], state)
        states[:, t] = state
    everything = found.states.clone()
    everything[failed] = states
    return found._replace(states=everything)


def _joined(windows: list[Solution]) -> Solution:
    """One solution out of those of all windows: the most iterations, the largest residual, converged if all have."""
    return Solution(
        torch.cat([w.states for w in windows], 1),
        torch.stack([w.iterations for w in windows]).amax(0),
        torch.stack([w.residual for w in windows]).amax(0),
        torch.stack([w.converged for w in windows]).all(0),
        torch.stack([w.resets for w in windows]).sum(0),
    )


def make_problem(cell: Cell, inputs: Tensor, state: State | None, reset: Tensor | None) -> Problem:
    """Return the recurrence on vectors.

    Raises:
        UsageError: if shapes do not fit, or the state is not floating point.
    """
    initial = start(cell, inputs, state)
    layout = Layout.of(initial)
    first = layout.pack(initial)
    if first.shape != (inputs.shape[0], layout.size):
        raise UsageError(
            f"state has {first.shape[0]} sequences and inputs has {inputs.shape[0]}; they must have the same."
        )
    if reset is None:
        return Problem(cell, layout, cell.project(inputs), first)
    if reset.shape != inputs.shape[:2] or reset.dtype != torch.bool:
        raise UsageError(
            f"reset has shape {tuple(reset.shape)} and dtype {reset.dtype}; expected a mask {tuple(inputs.shape[:2])}."
        )
    fresh = layout.pack(start(cell, inputs, None))
    return Problem(cell, layout, cell.project(inputs), first, fresh, reset)


def _empty(problem: Problem, inputs: Tensor) -> Trajectory:
    batch, device = inputs.shape[0], inputs.device
    states = problem.start.new_zeros(batch, 0, problem.layout.size)
    return Trajectory(
        states=problem.layout.unpack(states), final=problem.layout.unpack(problem.start), outcome=Outcome.ok,
        iterations=torch.zeros(batch, dtype=torch.int64, device=device), residual=problem.start.new_zeros(batch),
        converged=torch.ones(batch, dtype=torch.bool, device=device),
    )  # fmt: skip
