"""Will a recurrence evaluate well in parallel? Its Lyapunov exponent tells before anything is timed.

    λ = lim (1/T) log ‖A_T … A_1‖

λ < 0: the recurrence forgets, and Newton's method needs a handful of iterations whatever T is. λ > 0: it is chaotic,
and needs a number of iterations proportional to T, so there is no gain. λ ≈ 0: in between; damping can help.
Gonzalez et al., "Predictability enables parallelization", arXiv:2508.16817.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reroll.cells import jacobian
from reroll.cells.base import Cell, State
from reroll.errors import UsageError, require_positive
from reroll.rollout.auto import auto
from reroll.rollout.base import Rollout
from reroll.rollout.linearise import Dense, Diagonal
from reroll.rollout.newton import Newton
from reroll.rollout.presets import deer, elk, quasi_deer
from reroll.rollout.problem import make_problem
from reroll.rollout.purity import require_pure
from reroll.rollout.sequential import Sequential
from reroll.trees import map_state

JACOBIAN_FLOATS = 1 << 22
"""Numbers in the Jacobians of a window."""
SHORT = 500
"""Steps below which there is too little to parallelise along time."""
FEW = 0.05
"""Iterations per step up to which a parallel rollout can pay."""
PROBED = 512
"""First steps, on which iterations are counted."""


@torch.no_grad()
def lyapunov(cell: Cell, inputs: Tensor, state: State | None = None, *, starts: int = 3, seed: int = 0) -> Tensor:
    """Return the largest Lyapunov exponent per step, for each sequence.

    Random unit vectors are pushed through the Jacobians along the trajectory and their growth is averaged,
    λ = (1/T) Σ_t log(‖A_t v_t‖ / ‖v_t‖), over `starts` of them. For a flow divide by its time step.

    Args:
        cell: the recurrence.
        inputs: [batch, time, input_size].
        state: before the first step.
        starts: vectors per sequence.
        seed: seed of the vectors.

    Returns:
        λ, [batch]; −infinity where nothing of the state survives.

    Example:
        >>> from reroll.cells import cell_from
        >>> lyapunov(cell_from(lambda u, s: 0.5 * s + u, 2), torch.zeros(1, 50, 2)).exp()
        tensor([0.5000])

    Reference: Benettin et al., 1980; Gonzalez et al., arXiv:2508.16817.
    """
    return _growth(cell, inputs, state, starts, seed)[0]


def _growth(cell: Cell, inputs: Tensor, state: State | None, starts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return λ and the overshoot log a = max_t Σ_{k ≤ t} (log growth_k − λ), [batch] each."""
    require_positive(starts=starts)
    problem = make_problem(cell, inputs, state, None).piece()
    if 0 in inputs.shape[:2]:
        raise UsageError(f"inputs has shape {tuple(inputs.shape)}; pass a typical batch of sequences.")
    require_pure(cell, problem)
    if not bool(torch.isfinite(inputs).all()):
        raise UsageError("inputs has numbers that are not finite; such a trajectory has no Lyapunov exponent.")
    batch, time, size = *inputs.shape[:2], problem.layout.size
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(batch, size, starts, generator=generator, dtype=torch.float64).to(problem.start)
    v = v / v.norm(dim=1, keepdim=True)
    states, logs = problem.start, []
    width = max(1, JACOBIAN_FLOATS // (batch * size * size))
    for begin in range(0, time, width):
        before = []
        for t in range(begin, min(begin + width, time)):
            before.append(states)
            states = jacobian.step(cell, problem.layout, problem.u[:, t], states)
        rows = torch.stack(before, 1).flatten(0, 1)
        u = problem.u[:, begin : begin + len(before)].flatten(0, 1)
        matrices = jacobian.linearise(cell, problem.layout, u, rows, "dense")[1].unflatten(0, (batch, -1))
        for a in matrices.unbind(1):
            v = a @ v
            growth = v.norm(dim=1, keepdim=True)
            logs.append(growth.log().squeeze(1))
            v = torch.where(growth > 0, v / growth, v)
    stacked = torch.stack(logs, 1)
    exponent = stacked.mean(1)
    overshoot = (stacked.cumsum(1) - exponent.unsqueeze(1) * torch.arange(1, time + 1).view(1, -1, 1).to(v)).amax(1)
    return exponent.mean(-1), overshoot.mean(-1)


@dataclass(frozen=True)
class Predictability:
    """What to expect of a recurrence in parallel.

    Args:
        exponent: λ per step, the largest of the sequences.
        overshoot: a of ‖A_T … A_1‖ ≤ a e^{λT}: how much it grows before it shrinks.
        expected_iterations: of DEER and quasi-DEER on the whole length.
        rollout: the one to use.
        reason: why.
    """

    exponent: float
    overshoot: float
    expected_iterations: dict[str, int]
    rollout: Rollout
    reason: str

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.expected_iterations.items())
        return (
            f"Lyapunov exponent {self.exponent:+.4f} per step, overshoot {self.overshoot:.3g}; "
            f"expected iterations: {counts}\nuse {self.rollout}: {self.reason}"
        )


@torch.no_grad()
def predictability(cell: Cell, inputs: Tensor, state: State | None = None) -> Predictability:
    """Return what to expect of a recurrence in parallel, and which rollout to use.

    The exponent is measured along the trajectory. Iterations are counted on the first steps and extrapolated to the
    whole length: unchanged where the recurrence forgets, in proportion to the length where it does not.

    Args:
        cell: the recurrence.
        inputs: a typical batch, [batch, time, input_size].
        state: before the first step.

    Example:
        >>> from reroll.cells import GRU
        >>> predictability(GRU(4, 4), torch.randn(1, 600, 4)).exponent < 0
        True
    """
    growth, peak = _growth(cell, inputs, state, 3, 0)
    exponent, overshoot = float(growth.max()), math.exp(min(float(peak.nan_to_num(0.0).max()), 700.0))
    time = inputs.shape[1]
    probed = min(time, PROBED)
    forgets = exponent * probed < -10  # within the probed steps a disturbance shrinks below e⁻¹⁰
    counts = {}
    for name, linearise in (("DEER", Dense()), ("quasi-DEER", Diagonal())):
        trajectory = Newton(linearise, max_iterations=probed, window=None, on_failure="sequential")(
            cell, inputs[:1, :probed], None if state is None else map_state(state, lambda s: s[:1])
        )
        count = int(trajectory.iterations.max())
        counts[name] = count if forgets or probed == time else math.ceil(count * time / max(probed, 1))
    rollout, reason = _advise(exponent, time, counts)
    return Predictability(exponent, overshoot, counts, rollout, reason)


def _advise(exponent: float, time: int, counts: dict[str, int]) -> tuple[Rollout, str]:
    fewest = min(counts, key=lambda name: (counts[name], name == "DEER"))  # of equal ones the cheaper
    few = counts[fewest] <= time * FEW
    if time < SHORT:
        return Sequential(), f"{time} steps are too few to parallelise"
    if exponent * time > 10:
        return Sequential(), "the recurrence is chaotic: iterations grow in proportion to the number of steps"
    if exponent * time < -10 and few:
        return auto(), f"the recurrence forgets: {counts[fewest]} iterations, whatever the length"
    if exponent * time < -10:
        return Sequential(), f"the recurrence forgets, but too slowly: {counts[fewest]} iterations for {time} steps"
    if few:
        rollout = deer() if fewest == "DEER" else quasi_deer()
        return rollout, f"the recurrence neither forgets nor explodes, but {fewest} converged where it was tried"
    many = f"{counts[fewest]} undamped iterations for {time} steps are too many"
    return elk(adaptive=True), f"the recurrence neither forgets nor explodes, and {many}"
