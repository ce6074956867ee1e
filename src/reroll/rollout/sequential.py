"""The recurrence evaluated one step after another: the reference for every other rollout.

    s_t = step(project(x)_t, s_{t−1})

`read` passes the whole sequence to the cell's own kernel where it has one that computes the same thing (cuDNN, oneDNN,
a compiled scan); `Sequential(kernel="reference")` always loops. `Sequential(kernel="compiled")` compiles the step of
any cell to a program (see `reroll.rollout.native`) and runs that for all steps, on a CPU in float32; its gradient is
the exact one of `reroll.rollout.adjoint`. A cell that cannot be compiled is looped over.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reroll.cells.base import Cell, State
from reroll.errors import UsageError
from reroll.rollout import adjoint, native
from reroll.rollout.base import (
    Trajectory,
    check,
    check_reset,
    exact,
    explaining_dtypes,
    explaining_shapes,
    require_same_shapes,
    start,
    uncompiled,
    where_reset,
)  # fmt: skip
from reroll.rollout.lengths import Padded, dropping, filled, packing
from reroll.rollout.problem import make_problem
from reroll.rollout.purity import require_pure
from reroll.trees import combine_states


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

    @uncompiled
    def __call__(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Trajectory:  # fmt: skip
        """Return all states; see `Rollout`."""
        padded = self._run_compiled(cell, inputs, state, reset, lengths)
        if padded is not None:
            return padded.trajectory._replace(states=padded.zeroed(padded.trajectory.states))

        def run(x: Tensor, first: State, cut: Tensor | None, projected: bool = False) -> tuple[State, State]:
            states, final = [], first
            for final in _steps(cell, x, first, cut, projected):
                states.append(final)
            return _stack(states, first), final

        states, final = self._run(run, cell, inputs, state, reset, lengths)
        return exact(states, final, inputs)

    @uncompiled
    def read(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Return the readouts and the final state; see `Rollout`."""
        padded = self._run_compiled(cell, inputs, state, reset, lengths)
        if padded is not None:
            return padded.zeroed(cell.readout(padded.trajectory.states)), padded.trajectory.final

        def run(x: Tensor, first: State, cut: Tensor | None, projected: bool = False) -> tuple[State, State]:
            if self.kernel == "auto" and cut is None and not projected and cell.can_fuse:
                with explaining_dtypes(cell, x, first):
                    result = cell.fused(x, first)
                if result is not None:
                    return result
            outputs, final = [], first
            for final in _steps(cell, x, first, cut, projected):
                outputs.append(cell.readout(final))
            return _stack(outputs, cell.readout(first)), final

        return self._run(run, cell, inputs, state, reset, lengths)

    def _run(
        self, run: Any, cell: Cell, inputs: Tensor, state: State | None, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Any, State]:
        initial = start(cell, inputs, state)
        check_reset(reset, inputs)
        if lengths is None:
            return run(inputs, initial, reset)
        if cell.projects_stepwise:
            return dropping(run, inputs, initial, reset, lengths)
        with explaining_dtypes(cell, inputs, initial):
            u = cell.project(filled(inputs, lengths)[0])
        return dropping(functools.partial(run, projected=True), u, initial, reset, lengths)

    def _run_compiled(
        self, cell: Cell, inputs: Tensor, state: State | None, reset: Tensor | None, lengths: Tensor | None
    ) -> Padded | None:
        """Return all states by the compiled step, or None where that was not asked for or is not possible."""
        if self.kernel != "compiled":
            return None
        check(cell, inputs)
        if 0 in inputs.shape[:2]:
            return None
        return packing(_compiled, cell, inputs, state, reset, lengths)


def _compiled(cell: Cell, inputs: Tensor, state: State | None, reset: Tensor | None) -> Trajectory | None:
    problem = make_problem(cell, inputs, state, reset)
    require_pure(cell, problem)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        states = native.step_by_step(problem)
    if states is None:
        return None
    if torch.is_grad_enabled():
        states = adjoint.attach(problem, states, "auto")
    return exact(problem.layout.unpack(states), problem.layout.unpack(states[:, -1]), inputs)


def _steps(cell: Cell, inputs: Tensor, state: State, reset: Tensor | None, projected: bool) -> Any:
    """Yield the state after every step of inputs, which may be projected already."""
    fresh = start(cell, inputs.new_empty(len(inputs), 0, cell.input_size), None) if reset is not None else None
    with explaining_dtypes(cell, inputs, state), explaining_shapes(cell, inputs, state):
        for t, u in enumerate((inputs if projected else cell.project(inputs)).unbind(1)):
            if reset is not None:
                state = where_reset(reset[:, t], fresh, state)
            before, state = state, cell.step(u, state)
            if t == 0:
                require_same_shapes(cell, before, state)
            yield state


def _stack(states: list[State], like: State) -> State:
    """Stack states along a new axis 1; with no steps, that axis is empty."""
    return combine_states(
        [like, *states], lambda tensors: torch.stack(tensors[1:], 1) if states else tensors[0].unsqueeze(1)[:, :0]
    )
