"""The recurrence evaluated for all steps at once: Newton's method on the trajectory, and its relatives.

All solve r_t = f_t(s_{t−1}) − s_t = 0 by repeating a linear recurrence along time, δ_t = Ã_t δ_{t−1} + r_t, s ← s + δ:

    linearise       how Ã approximates the Jacobian       (DEER, quasi-DEER, Picard, Jacobi …)
    damping         how far a step is trusted             (ELK, scaling, clipping)

    trajectory = Newton(Diagonal())(cell, inputs)         or by the papers' names: `quasi_deer()(cell, inputs)`

How many iterations are needed depends on the dynamics (see `reroll.predictability`): a handful where the recurrence
forgets, as many as there are steps where it is chaotic. What has not converged is evaluated step by step from where it
is still exact, and the outcome says so. Gradients are the exact ones of the trajectory (see `rollout.adjoint`).

Lim et al., arXiv:2309.12252 (DEER); Gonzalez et al., arXiv:2407.19115 (quasi-DEER, ELK).
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from reroll.cells import jacobian
from reroll.cells.base import Cell, State
from reroll.errors import RunError, UsageError, require_count, warn
from reroll.outcome import Outcome
from reroll.rollout import adjoint, native
from reroll.rollout.base import Trajectory, exact, uncompiled
from reroll.rollout.damping import Damping, Kalman, Undamped
from reroll.rollout.iterate import Iterate, largest
from reroll.rollout.lengths import in_place
from reroll.rollout.linearise import WINDOW_FLOATS, Diagonal, Linearisation, Zero, is_compilable
from reroll.rollout.memory import require_memory_for_jacobians
from reroll.rollout.monitor import current
from reroll.rollout.problem import Field, Problem, make_problem, rows
from reroll.rollout.purity import require_pure

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Default `rtol` and `atol`."""
ADVICE = (
    "Raise max_iterations, damp the iteration (elk, quasi_elk with a smaller variance), or use Sequential; "
    "reroll.predictability says which of them can work."
)


class Solution(NamedTuple):
    """States of a window, [D, T, B], or of all of them, [B, T, D]; and how the iteration ended, per sequence."""

    states: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    resets: Tensor


@dataclass(frozen=True, repr=False)
class Newton:
    """Evaluate a cell for all steps at once.

    Args:
        linearise: which approximation of the Jacobian is used.
        damping: how far a step is trusted; None takes the full step.
        adjoint: how the gradient is computed; see `reroll.rollout.adjoint`. All ways are exact.
        guess: the initial guess: "f0" (every step applied to the first state), "s0" (the first state), "zeros", or
            states [batch, time, D] (a warm start).
        window: steps solved at a time, one window after another; None: all at once, "auto": by static rules.
        max_iterations: None is 100 (50 with a dense Jacobian), and never more than the steps of a window need.
        rtol, atol: tolerance of the residual, and of the last correction if undamped, relative to the largest state;
            None is 1e-9 in float64 and 1e-5 in float32.
        on_failure: what to do with sequences that do not converge: "sequential" evaluates them step by step from the
            first step that is not exact, "warn" does the same with a warning, "raise" raises.

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
        require_count(max_iterations=self.max_iterations, window=None if self.window == "auto" else self.window)
        if isinstance(self.window, Integral):  # such as one of numpy's
            object.__setattr__(self, "window", int(self.window))
        for name, value in (("rtol", self.rtol), ("atol", self.atol)):
            if value is not None and not (isinstance(value, Real) and 0 <= value < float("inf")):
                raise UsageError(f"{name}={value!r} must be zero or a positive number.")
        if self.on_failure not in ("sequential", "raise", "warn"):
            raise UsageError(f'on_failure="{self.on_failure}" must be "sequential", "raise" or "warn".')
        if isinstance(self.guess, str) and self.guess not in ("f0", "s0", "zeros"):
            raise UsageError(f'guess="{self.guess}" must be "f0", "s0", "zeros" or a tensor of states.')
        if self.adjoint not in adjoint.METHODS:
            raise UsageError(f'adjoint="{self.adjoint}" must be {", ".join(adjoint.METHODS)}.')

    def __repr__(self) -> str:
        values = {f: getattr(self, f.name) for f in fields(self)}
        shown = (
            f"{f.name}={list(value.shape) if isinstance(value, Tensor) else repr(value)}"
            for f, value in values.items()
            if f.name == "linearise" or isinstance(value, Tensor) or value != f.default
        )
        return f"Newton({', '.join(shown)})"

    @uncompiled
    def __call__(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Trajectory:  # fmt: skip
        """Return all states; see `Rollout`.

        Raises:
            UsageError: if shapes do not fit, the state is not floating point, or the cell edits its arguments or is
                random.
            RunError: with on_failure="raise", if a sequence does not converge.
        """
        padded = in_place(self._run, cell, inputs, state, reset, lengths)
        assert padded is not None
        return padded.trajectory._replace(states=padded.zeroed(padded.trajectory.states))

    def _run(self, cell: Cell, inputs: Tensor, state: State | None, reset: Tensor | None) -> Trajectory:
        problem = make_problem(cell, inputs, state, reset)
        if inputs.shape[0] == 0 or inputs.shape[1] == 0:
            empty = problem.start.new_zeros(problem.shape)
            return exact(problem.layout.unpack(empty), problem.layout.unpack(problem.start), inputs, passes=0)
        require_pure(cell, problem)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            solution = self._solve(problem)
            states = solution.states
        if torch.is_grad_enabled():
            states = adjoint.attach(problem, states, self.adjoint)
        layout = problem.layout
        outcome = Outcome.ok if bool(solution.converged.all()) else Outcome.fell_back
        trajectory = Trajectory(layout.unpack(states), layout.unpack(states[:, -1]), outcome, *solution[1:])
        if (monitor := current()) is not None:
            monitor.record(trajectory, states)
        return trajectory

    @uncompiled
    def read(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Return the readouts and the final state; see `Rollout`."""
        padded = in_place(self._run, cell, inputs, state, reset, lengths)
        assert padded is not None
        trajectory = padded.trajectory
        if trajectory.outcome is Outcome.fell_back and self.on_failure == "sequential" and current() is None:
            # The caller of `read` gets no outcome, and no monitor records it.
            warn(f"{type(cell).__name__}: {trajectory.outcome.value}")
        return padded.zeroed(cell.readout(trajectory.states)), trajectory.final

    # ---- solving

    def _solve(self, problem: Problem) -> Solution:
        """Solve window after window; a window that does not converge is evaluated step by step before the next."""
        batch, time, size = problem.shape
        monitor = current()
        warm = None if monitor is None else monitor.guess((batch, time, size))
        guess = self.guess if warm is None else warm
        if isinstance(guess, Tensor) and ((guess.shape[0], guess.shape[-1]) != (batch, size) or guess.shape[1] < time):
            raise UsageError(
                f"guess has shape {tuple(guess.shape)}; expected states [batch, time, D] = ({batch}, ≥ {time}, {size})."
            )
        # Pieces end where windows of a fixed size do; window="auto" starts afresh in each piece; one window is not cut.
        windowed = isinstance(self.window, int) or (self.window == "auto" and problem.start.device.type == "cpu")
        pieces = problem.pieces(self.window if isinstance(self.window, int) else 1) if windowed else [(0, time)]
        if len(pieces) == 1:
            return self._solve_piece(problem.piece(), guess)
        parts, start, states = [], problem.start, problem.start.new_empty(batch, time, size)
        for begin, end in pieces:
            part_guess = guess[:, begin:end] if isinstance(guess, Tensor) else guess
            part = self._solve_piece(problem.piece(begin, end, start), part_guess)
            states[:, begin:end], start = part.states, part.states[:, -1].clone()
            parts.append(part._replace(states=start.unsqueeze(1)))  # a view would keep the piece alive
        return _join(parts)._replace(states=states)

    def _solve_piece(self, problem: Problem, guess: str | Tensor) -> Solution:
        windows = self._solve_compiled(problem, guess)
        done = sum(w.states.shape[1] for w in windows)
        if done < problem.shape[1]:
            windows += self._window_by_window(problem.field(), guess, done, [w.states[:, -1].T for w in windows])
        return _join(windows)

    def _solve_compiled(self, problem: Problem, guess: str | Tensor) -> list[Solution]:
        """Solve as many steps as compiled code can; often all of them or none."""
        undamped = self.damping is None or isinstance(self.damping, Undamped)
        observed = (monitor := current()) is not None and monitor.observed
        linearise = self.linearise
        if not (undamped and is_compilable(linearise)) or observed or (isinstance(guess, str) and guess != "f0"):
            return []
        tolerances, guesses = self._tolerances(problem.start.dtype), guess if isinstance(guess, Tensor) else None
        result = native.newton(problem, linearise, guesses, self.window, tolerances, self._limit)
        if result is None or result[1].steps == 0:
            return []
        states, counts = result
        iterations, residual = torch.from_numpy(counts.iterations), torch.from_numpy(counts.residual)
        return [Solution(states, iterations, residual, torch.ones_like(iterations, dtype=torch.bool), 0 * iterations)]

    def _window_by_window(self, field: Field, guess: str | Tensor, done: int, first: list[Tensor]) -> list[Solution]:
        """Solve the steps from `done` on in torch operations; `first` holds the state before them if done > 0."""
        time = field.shape[1]
        if is_compilable(self.linearise):
            field = field.compiled(self.linearise.structure, self.linearise.blocks(field.layout))
        width = self._width(field)
        before = first[0] if first else field.start
        windows: list[Solution] = []
        for begin in range(done, time, width):
            end = min(begin + width, time)
            part = field if end - begin == time else field.window(begin, end, before)
            solution = self._newton(part, self._initial_guess(part, guess, begin, end))
            if not bool(solution.converged.all()):
                self._report_failure(solution)
                solution = _fall_back(part, solution)
            before = solution.states[:, -1]
            windows.append(solution._replace(states=solution.states.permute(2, 1, 0)))
        return windows

    def _width(self, field: Field) -> int:
        size, time, batch = field.shape
        if self.window == "auto" and field.u.device.type == "cpu":
            # On a CPU the scan and the convergence tests are as fast as the cells if a window's states fit the cache.
            width = max(64, WINDOW_FLOATS // (batch * size * (size if self.linearise.kind == "dense" else 1)))
        else:
            width = self.window if isinstance(self.window, int) else time
        if self.linearise.kind == "dense":
            require_memory_for_jacobians(
                batch, min(width, time), size, field.u.dtype, field.u.device, filters=isinstance(self.damping, Kalman)
            )
        return width

    def _initial_guess(self, field: Field, guess: str | Tensor, begin: int, end: int) -> Tensor:
        size, steps, batch = field.shape
        repeated = field.start.unsqueeze(1).expand(size, steps, batch)
        if isinstance(guess, Tensor):
            return guess[:, begin:end].permute(2, 1, 0).to(field.u.dtype).contiguous()
        if guess == "zeros":
            return torch.zeros_like(repeated, memory_format=torch.contiguous_format)
        if guess == "s0":
            return repeated.contiguous()
        ahead = field.before(repeated)
        if field.programs is not None:
            return field.run(ahead, fresh=False)[0]
        return jacobian.advance(field.cell, field.layout, field.inputs, rows(ahead)).T.reshape(size, steps, batch)

    def _newton(self, field: Field, guess: Tensor) -> Solution:
        """Iterate on one window until every sequence has converged, or the iterations are used up."""
        damping: Damping = self.damping or Undamped()
        monitor = current()
        batch, device = field.shape[2], guess.device
        atol, rtol = self._tolerances(guess.dtype)
        every = self.linearise.every
        iterate = Iterate.at(field, guess, self.linearise)
        iterations, resets = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        converged = (iterate.error == 0).all(0)
        trust = torch.ones(batch, dtype=guess.dtype, device=device) if damping.adaptive else None
        for iteration in range(1, self._limit(field.shape[1]) + 1):
            if bool(converged.all()):
                break
            states, replaced = iterate.advance(damping, trust, guess, converged)
            trial = Iterate.at(field, states, self.linearise, iterate.transition, iteration % every == 1 % every)
            iterations += ~converged
            resets += torch.where(converged, 0, replaced)
            close = _is_close(iterate, trial, damping, atol, rtol)
            if trust is not None:
                worse = ~(trial.merit() < iterate.merit()) & ~close & ~converged
                trust = torch.where(worse, trust / 3, trust * 3).clamp(1e-9, 1e9)
                trial = trial.merged(iterate, worse)
            iterate = trial
            converged = converged | close
            if monitor is not None:
                monitor.show(iterate.states)
        return Solution(iterate.states, iterations, iterate.error.amax(0), converged, resets)

    def _limit(self, steps: int) -> int:
        if self.max_iterations is not None:
            return self.max_iterations
        most = 50 if self.linearise.kind == "dense" else 100
        # Undamped methods are exact after as many iterations as there are steps; a filter never is.
        return most if self.damping is not None else min(steps + 2, most)

    def _tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        default = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
        factor = 1.0 if (monitor := current()) is None else monitor.factor
        floor = 8 * torch.finfo(dtype).eps
        atol, rtol = (default if value is None else value for value in (self.atol, self.rtol))
        if factor == 1.0:
            return atol, rtol
        return max(factor * atol, min(atol, floor)), max(factor * rtol, min(rtol, floor))

    def _report_failure(self, solution: Solution) -> None:
        """Raise or warn about sequences that did not converge, as `on_failure` says."""
        if self.on_failure == "sequential" or ((monitor := current()) is not None and monitor.quiet):
            return
        message = (
            f"{int((~solution.converged).sum())} of {len(solution.converged)} sequences did not converge in "
            f"{int(solution.iterations.max())} iterations (largest residual {float(solution.residual.max()):.3g})."
        )
        if self.on_failure == "raise":
            raise RunError(f"{message} {ADVICE}")
        warn(f"{message} They were evaluated step by step.")


def _is_close(before: Iterate, iterate: Iterate, damping: Damping, atol: float, rtol: float) -> Tensor:
    """Return which sequences have converged, [B]: by their residual and, if undamped, by their last correction."""
    scale = largest(iterate.states)
    bound = atol + rtol * scale
    close = ((iterate.error <= bound) & torch.isfinite(scale)).all(0)
    if not damping.damped and bool(close.any()):
        # At rounding error there is nothing left to correct, however large the last correction was.
        exact = iterate.error <= 16 * torch.finfo(scale.dtype).eps * scale
        close &= ((largest(iterate.states - before.states) <= bound) | exact).all(0)
    return close


def _fall_back(field: Field, solution: Solution) -> Solution:
    """Evaluate the sequences that did not converge step by step, from their first step that is not exact."""
    failed = (~solution.converged).nonzero().squeeze(1)
    part, states = field.sequences(failed), solution.states[..., failed]
    exact = int(Iterate.at(part, states, Zero()).exact_steps().min())
    state = part.start if exact == 0 else states[:, exact - 1]
    for t in range(exact, states.shape[1]):
        state = part.one_step(t, state)
        states[:, t] = state
    whole = solution.states.clone()
    whole[..., failed] = states
    return solution._replace(states=whole)


def _join(windows: list[Solution]) -> Solution:
    """Join the solutions of all windows: the most iterations, the largest residual, converged where all converged."""
    if len(windows) == 1:
        return windows[0]._replace(states=windows[0].states.contiguous())
    return Solution(
        torch.cat([w.states for w in windows], 1),
        torch.stack([w.iterations for w in windows]).amax(0),
        torch.stack([w.residual for w in windows]).amax(0),
        torch.stack([w.converged for w in windows]).all(0),
        torch.stack([w.resets for w in windows]).sum(0),
    )
