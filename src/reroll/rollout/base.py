"""What a rollout is: a cell and inputs in, the trajectory of states out, and how well it was computed.

    trajectory = rollout(cell, inputs)                      all states
    outputs, final = rollout.read(cell, inputs, state)      only what a model needs; may use a kernel for the sequence

A rollout that iterates reports its iterations, residual and convergence per sequence, and how it ended as an `Outcome`:
non-convergence is a value, never silent.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from reroll.cells.base import Cell, State
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
        UsageError: if the inputs are not [batch, time, features].
    """
    if inputs.dim() != 3:
        raise UsageError(f"inputs has shape {tuple(inputs.shape)}; expected [batch, time, features].")
    if state is not None:
        return state
    like = inputs if inputs.is_floating_point() else None
    initial = cell.init_state(inputs.shape[:1])
    return initial if like is None else map_state(initial, lambda tensor: tensor.to(like.device, like.dtype))


def where_reset(reset: Tensor, initial: State, state: State) -> State:
    """Return `initial` for the sequences [batch] in which `reset` is True, and `state` for the others."""
    if isinstance(state, Tensor):
        mask = reset.view(-1, *[1] * (state.dim() - 1))
        return torch.where(mask, initial, state)
    parts = (where_reset(reset, a, b) for a, b in zip(initial, state))
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
