"""The recurrence evaluated one step after another: the reference for every other rollout.

    s_t = step(project(x)_t, s_{t−1})

`read` hands the whole sequence to the cell's own kernel where it has one that computes the same thing (cuDNN, oneDNN, a
compiled scan); `Sequential(kernel="reference")` always loops. `Sequential(kernel="compiled")` writes the step of any
cell as a program (see `reroll.rollout.native`) and runs that for all steps, on a CPU in float32; its gradient is the
exact one of `reroll.rollout.adjoint`. A cell that cannot be written so is looped over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reroll.cells.base import Cell, State
from reroll.errors import UsageError
from reroll.outcome import Outcome
from reroll.rollout import adjoint, native
from reroll.rollout.base import (
    Trajectory,
    check_reset,
    explaining_dtypes,
    require_same_shapes,
    start,
    where_reset,
)  # fmt: skip
from reroll.rollout.problem import make_problem
from reroll.rollout.purity import require_pure


@dataclass(frozen=True)
class Sequential:
    """Evaluate a cell step by step.

    Args:
        kernel: "auto" lets `read` use the cell's kernel for whole sequences; "reference" always loops over `step`;
            "compiled" loops over a program of the step, which must be pure (see `Cell`).

    Example:
        >>> from reroll.cells import GRU
        >>> Sequential()(GRU(3, 5), torch.zeros(2, 7, 3)).states.shape
        torch.Size([2, 7, 5])
    """

    kernel: Literal["auto", "reference", "compiled"] = "auto"

    def __post_init__(self) -> None:
        if self.kernel not in ("auto", "reference", "compiled"):
            raise UsageError(f'kernel="{self.kernel}" must be "auto", "reference" or "compiled".')

    def __call__(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> Trajectory:
        """Return all states; see `Rollout`."""
        found = self._compiled(cell, inputs, state, reset)
        if found is not None:
            return found
        initial = start(cell, inputs, state)
        check_reset(reset, inputs)
        states, final = [], initial
        for final in _steps(cell, inputs, initial, reset):
            states.append(final)
        return _trajectory(_stack(states, initial), final, inputs)

    def read(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the readouts and the final state; see `Rollout`."""
        found = self._compiled(cell, inputs, state, reset)
        if found is not None:
            return cell.readout(found.states), found.final
        initial = start(cell, inputs, state)
        check_reset(reset, inputs)
        if self.kernel == "auto" and reset is None:
            with explaining_dtypes(cell, inputs, initial):
                result = cell.fused(inputs, initial)
            if result is not None:
                return result
        outputs, final = [], initial
        for final in _steps(cell, inputs, initial, reset):
            outputs.append(cell.readout(final))
        return _stack(outputs, cell.readout(initial)), final

    def _compiled(self, cell: Cell, inputs: Tensor, state: State | None, reset: Tensor | None) -> Trajectory | None:
        """Return all states by a program of the step, or None where that was not asked for or cannot be."""
        if self.kernel != "compiled" or 0 in inputs.shape[:2]:
            return None
        problem = make_problem(cell, inputs, state, reset)
        require_pure(cell, problem)
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            states = native.step_by_step(problem)
        if states is None:
            return None
        if torch.is_grad_enabled():
            states = adjoint.attach(problem, states, "auto")
        return _trajectory(problem.layout.unpack(states), problem.layout.unpack(states[:, -1]), inputs)


def _trajectory(states: State, final: State, inputs: Tensor) -> Trajectory:
    batch, device = inputs.shape[0], inputs.device
    return Trajectory(
        states=states,
        final=final,
        outcome=Outcome.ok,
        iterations=torch.ones(batch, dtype=torch.int64, device=device),
        residual=torch.zeros(batch, device=device),
        converged=torch.ones(batch, dtype=torch.bool, device=device),
    )


def _steps(cell: Cell, inputs: Tensor, state: State, reset: Tensor | None) -> Any:
    """Yield the state after every step."""
    fresh = start(cell, inputs, None) if reset is not None else None
    with explaining_dtypes(cell, inputs, state):
        for t, u in enumerate(cell.project(inputs).unbind(1)):
            if reset is not None:
                state = where_reset(reset[:, t], fresh, state)
            before, state = state, cell.step(u, state)
            if t == 0:
                require_same_shapes(cell, before, state)
            yield state


def _stack(states: list[State], like: State) -> State:
    """Stack states along a new axis 1; with no steps, that axis is empty."""
    if isinstance(like, Tensor):
        return torch.stack(states, 1) if states else like.unsqueeze(1)[:, :0]
    parts = (_stack([state[i] for state in states], part) for i, part in enumerate(like))
    return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
