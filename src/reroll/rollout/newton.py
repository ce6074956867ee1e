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
from reroll.rollout.linearise import WINDOW_FLOATS, Diagonal, Linearisation, Zero, is_written
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
    """States of a window, [D, T, B], or of all of them, [B, T, D]; and per sequence how they were found."""

    states: Tensor
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    resets: Tensor


@dataclass(frozen=True, repr=False)
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
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        usual = {f.name: f.default for f in fields(self)}
        shown = (
            f"{name}={list(value.shape) if isinstance(value, Tensor) else repr(value)}"
            for name, value in given.items()
            if name == "linearise" or isinstance(value, Tensor) or value != usual[name]
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
            found = self._solve(problem)
            states = found.states
        if torch.is_grad_enabled():
            states = adjoint.attach(problem, states, self.adjoint)
        layout = problem.layout
        outcome = Outcome.ok if bool(found.converged.all()) else Outcome.fell_back
        trajectory = Trajectory(layout.unpack(states), layout.unpack(states[:, -1]), outcome, *found[1:])
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
            # Who reads sees no outcome, and nobody watches for him.
            warn(f"{type(cell).__name__}: {trajectory.outcome.value}")
        return padded.zeroed(cell.readout(trajectory.states)), trajectory.final

    # ---- solving

    def _solve(self, problem: Problem) -> Solution:
        """Solve window after window; what does not converge is evaluated step by step before the next one begins."""
        batch, time, size = problem.shape
        monitor = current()
        warm = None if monitor is None else monitor.guess((batch, time, size))
        given = self.guess if warm is None else warm
        if isinstance(given, Tensor) and ((given.shape[0], given.shape[-1]) != (batch, size) or given.shape[1] < time):
            raise UsageError(
                f"guess has shape {tuple(given.shape)}; expected states [batch, time, D] = ({batch}, ≥ {time}, {size})."
            )
        # A piece ends where a window would, or, of windows by static rules, begins new ones; one window is not cut.
        windowed = isinstance(self.window, int) or (self.window == "auto" and problem.start.device.type == "cpu")
        pieces = problem.pieces(self.window if isinstance(self.window, int) else 1) if windowed else [(0, time)]
        if len(pieces) == 1:
            return self._solve_piece(problem.piece(), given)
        found, start, states = [], problem.start, problem.start.new_empty(batch, time, size)
        for begin, end in pieces:
            guess = given[:, begin:end] if isinstance(given, Tensor) else given
            part = self._solve_piece(problem.piece(begin, end, start), guess)
            states[:, begin:end], start = part.states, part.states[:, -1].clone()
            found.append(part._replace(states=start.unsqueeze(1)))  # a view would keep the piece
        return _joined(found)._replace(states=states)

    def _solve_piece(self, problem: Problem, given: str | Tensor) -> Solution:
        time = problem.shape[1]
        windows = self._in_compiled_code(problem, given)
        done = sum(w.states.shape[1] for w in windows)
        if done < time:
            windows += self._window_by_window(problem.field(), given, done, [w.states[:, -1].T for w in windows])
        return _joined(windows)

    def _in_compiled_code(self, problem: Problem, guess: str | Tensor) -> list[Solution]:
        """Solve as many steps as compiled code can; often all of them or none."""
        undamped = self.damping is None or isinstance(self.damping, Undamped)
        observed = (monitor := current()) is not None and monitor.observed
        linearise = self.linearise
        if not (undamped and is_written(linearise)) or observed or (isinstance(guess, str) and guess != "f0"):
            return []
        method = native.Method(
            linearise.kind, linearise.structure, linearise.blocks(problem.layout), self.window,
            self._tolerances(problem.start.dtype), self._limit, linearise.every,
        )  # fmt: skip
        solved = native.newton(problem, method, guess if isinstance(guess, Tensor) else None)
        if solved is None or solved[1].steps == 0:
            return []
        states, found = solved
        iterations, residual = torch.from_numpy(found.iterations), torch.from_numpy(found.residual)
        return [Solution(states, iterations, residual, torch.ones_like(iterations, dtype=torch.bool), 0 * iterations)]

    def _window_by_window(self, field: Field, guess: str | Tensor, done: int, first: list[Tensor]) -> list[Solution]:
        """Solve the steps from `done` on in torch operations; `first` holds the state before, if not the start."""
        time = field.shape[1]
        if is_written(self.linearise):
            field = field.compiled(self.linearise.structure, self.linearise.blocks(field.layout))
        width = self._width(field)
        before = first[0] if first else field.start
        windows: list[Solution] = []
        for begin in range(done, time, width):
            end = min(begin + width, time)
            part = field if end - begin == time else field.window(begin, end, before)
            found = self._newton(part, self._guess(part, guess, begin, end))
            if not bool(found.converged.all()):
                self._say(found)
                found = _stepped(part, found)
            before = found.states[:, -1]
            windows.append(found._replace(states=found.states.permute(2, 1, 0)))
        return windows

    def _width(self, field: Field) -> int:
        size, time, batch = field.shape
        if self.window == "auto" and field.u.device.type == "cpu":
            # On a CPU a window whose states fit the cache makes the scan and the tests as fast as the cells.
            width = max(64, WINDOW_FLOATS // (batch * size * (size if self.linearise.kind == "dense" else 1)))
        else:
            width = self.window if isinstance(self.window, int) else time
        if self.linearise.kind == "dense":
            require_memory_for_jacobians(
                batch, min(width, time), size, field.u.dtype, field.u.device, filters=isinstance(self.damping, Kalman)
            )
        return width

    def _guess(self, field: Field, given: str | Tensor, begin: int, end: int) -> Tensor:
        size, steps, batch = field.shape
        repeated = field.start.unsqueeze(1).expand(size, steps, batch)
        if isinstance(given, Tensor):
            return given[:, begin:end].permute(2, 1, 0).to(field.u.dtype).contiguous()
        if given == "zeros":
            return torch.zeros_like(repeated, memory_format=torch.contiguous_format)
        if given == "s0":
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
        found = Iterate.at(field, guess, self.linearise)
        iterations, resets = (torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(2))
        converged = (found.error == 0).all(0)
        trust = torch.ones(batch, dtype=guess.dtype, device=device) if damping.adaptive else None
        for iteration in range(1, self._limit(field.shape[1]) + 1):
            if bool(converged.all()):
                break
            trial, replaced = found.advance(damping, trust, guess, converged)
            following = Iterate.at(field, trial, self.linearise, found.transition, iteration % every == 1 % every)
            iterations += ~converged
            resets += torch.where(converged, 0, replaced)
            near = self._near(found, following, damping, atol, rtol)
            if trust is not None:
                worse = ~(following.merit() < found.merit()) & ~near & ~converged
                trust = torch.where(worse, trust / 3, trust * 3).clamp(1e-9, 1e9)
                following = following.merged(found, worse)
            found = following
            converged = converged | near
            if monitor is not None:
                monitor.show(found.states)
        return Solution(found.states, iterations, found.error.amax(0), converged, resets)

    def _near(self, before: Iterate, found: Iterate, damping: Damping, atol: float, rtol: float) -> Tensor:
        """Return which sequences have converged, [B]: by their residual and, if undamped, by their last correction."""
        scale = largest(found.states)
        bound = atol + rtol * scale
        near = ((found.error <= bound) & torch.isfinite(scale)).all(0)
        if not damping.damped and bool(near.any()):
            # At rounding error there is nothing left to correct, however large the last correction was.
            exact = found.error <= 16 * torch.finfo(scale.dtype).eps * scale
            near &= ((largest(found.states - before.states) <= bound) | exact).all(0)
        return near

    def _limit(self, steps: int) -> int:
        if self.max_iterations is not None:
            return self.max_iterations
        most = 50 if self.linearise.kind == "dense" else 100
        # Undamped methods are exact after as many iterations as there are steps; a filter never is.
        return most if self.damping is not None else min(steps + 2, most)

    def _tolerances(self, dtype: torch.dtype) -> tuple[float, float]:
        usual = TOLERANCE.get(dtype, TOLERANCE[torch.float32])
        factor = 1.0 if (monitor := current()) is None else monitor.factor
        floor = 8 * torch.finfo(dtype).eps
        atol, rtol = (usual if given is None else given for given in (self.atol, self.rtol))
        if factor == 1.0:
            return atol, rtol
        return max(factor * atol, min(atol, floor)), max(factor * rtol, min(rtol, floor))

    def _say(self, found: Solution) -> None:
        """Raise or warn about sequences that have not converged, if that was asked for."""
        if self.on_failure == "sequential" or ((monitor := current()) is not None and monitor.quiet):
            return
        message = (
            f"{int((~found.converged).sum())} of {len(found.converged)} sequences did not converge in "
            f"{int(found.iterations.max())} iterations (largest residual {float(found.residual.max()):.3g})."
        )
        if self.on_failure == "raise":
            raise RunError(f"{message} {ADVICE}")
        warn(f"{message} They were evaluated step by step.")


def _stepped(field: Field, found: Solution) -> Solution:
    """Evaluate the sequences that have not converged step by step, from where they are still exact."""
    failed = (~found.converged).nonzero().squeeze(1)
    part, states = field.sequences(failed), found.states[..., failed]
    exact = int(Iterate.at(part, states, Zero()).exact_steps().min())
    state = part.start if exact == 0 else states[:, exact - 1]
    for t in range(exact, states.shape[1]):
        state = part.one_step(t, state)
        states[:, t] = state
    everything = found.states.clone()
    everything[..., failed] = states
    return found._replace(states=everything)


def _joined(windows: list[Solution]) -> Solution:
    """One solution out of those of all windows: the most iterations, the largest residual, converged if all have."""
    if len(windows) == 1:
        return windows[0]._replace(states=windows[0].states.contiguous())
    return Solution(
        torch.cat([w.states for w in windows], 1),
        torch.stack([w.iterations for w in windows]).amax(0),
        torch.stack([w.residual for w in windows]).amax(0),
        torch.stack([w.converged for w in windows]).all(0),
        torch.stack([w.resets for w in windows]).sum(0),
    )
