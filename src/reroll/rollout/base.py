"""What a rollout is: a cell and inputs in, the trajectory of states out, and how well it was computed.

    trajectory = rollout(cell, inputs)                      all states
    outputs, final = rollout.read(cell, inputs, state)      only what a model needs; may use a kernel for the sequence

A rollout that iterates reports its iterations, residual and convergence per sequence, and how it ended as an `Outcome`:
non-convergence is a value, never silent.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from reroll.cells.base import Cell, FunctionCell, State
from reroll.data.batch import map_state
from reroll.errors import UsageError
from reroll.outcome import Outcome


class Trajectory(NamedTuple):
    """The states of a sequence.

    Args:
        states: the state after every step, with the structure of the cell's state and time as axis 1.
        final: the state after the last step.
        outcome: how the evaluation ended.
        iterations: passes over the sequence, [batch] int64.
        residual: largest violation of the recurrence that the method itself left, before any fallback, [batch].
        converged: True where the method itself reached its tolerance, [batch]; False where a fallback was used.
        resets: entries that were not finite on the way and had to be replaced, [batch]; None if nothing iterates.
    """

    states: State
    final: State
    outcome: Outcome
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    resets: Tensor | None = None

    def __repr__(self) -> str:
        parts = (self.states,) if isinstance(self.states, Tensor) else tuple(self.states)
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        most = int(self.iterations.max()) if self.iterations.numel() else 0
        worst = float(self.residual.max()) if self.residual.numel() else 0.0
        return (
            f"Trajectory(states {shapes}, outcome {self.outcome.name}, at most {most} iterations, "
            f"residual {worst:.2g}, {int(self.converged.sum())} of {self.converged.numel()} converged)"
        )


class Rollout(Protocol):
    """A way to evaluate a cell along time."""

    def __call__(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> Trajectory:
        """Return all states; see `Trajectory`.

        Args:
            cell: the recurrence.
            inputs: [batch, time, input_size].
            state: the state before the first step; None is the cell's own.
            reset: True at the steps before which the state starts afresh, [batch, time].
        """
        ...

    def read(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return the readouts [batch, time, output_size] and the state after the last step."""
        ...


def start(cell: Cell, inputs: Tensor, state: State | None) -> State:
    """Return the state before the first step: the one given, or the cell's, in the inputs' dtype and on their device.

    Raises:
        UsageError: if the cell is none, the inputs are not [batch, time, features], or the state does not fit.
    """
    check(cell, inputs)
    if state is not None:
        _check_state(cell, inputs, state)
        return state
    like = inputs if inputs.is_floating_point() else None
    initial = cell.init_state(inputs.shape[:1])
    return initial if like is None else map_state(initial, lambda tensor: tensor.to(like.device, like.dtype))


def has_tangent(tensor: Tensor) -> bool:
    """Return whether a forward-mode derivative goes along with a tensor (`torch.autograd.forward_ad`)."""
    return forward_ad.unpack_dual(tensor).tangent is not None


def check(cell: Any, inputs: Any) -> None:
    """Raise if these are not a cell and inputs that it takes."""
    if not isinstance(cell, Cell):
        remedy = "call it as rollout(cell, inputs)" if isinstance(cell, Tensor) or hasattr(cell, "read") else (
            "wrap it: reroll.cell_from(step, state_size)"
        )  # fmt: skip
        raise UsageError(f"cell is a {type(cell).__name__}, not a cell; {remedy}.")
    if not isinstance(inputs, Tensor) or inputs.dim() != 3:
        what = f"shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else f"type {type(inputs).__name__}"
        raise UsageError(f"inputs has {what}; expected a tensor [batch, time, features].")
    # A plain function may take any number of features.
    if not isinstance(cell, FunctionCell) and inputs.shape[-1] != cell.input_size:
        raise UsageError(
            f"inputs has shape {tuple(inputs.shape)}; {type(cell).__name__} takes [batch, time, {cell.input_size}]."
        )


def _check_state(cell: Cell, inputs: Tensor, state: State) -> None:
    expected = _shapes(cell.init_state(inputs.shape[:1]))
    found = _shapes(state)
    if found != expected:
        raise UsageError(f"state is {found}; {type(cell).__name__} takes {expected} for inputs {tuple(inputs.shape)}.")


def _shapes(state: State) -> str:
    if isinstance(state, Tensor):
        return str(list(state.shape))
    if not isinstance(state, tuple):
        return type(state).__name__
    return f"({', '.join(_shapes(part) for part in state)})"


def where_reset(reset: Tensor, initial: State, state: State) -> State:
    """Return `initial` for the sequences [batch] in which `reset` is True, and `state` for the others."""
    if isinstance(state, Tensor):
        mask = reset.view(-1, *[1] * (state.dim() - 1))
        return torch.where(mask, initial, state)
    parts = (where_reset(reset, a, b) for a, b in zip(initial, state))
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
