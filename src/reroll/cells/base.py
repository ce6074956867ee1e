"""A cell: one step of a recurrence, and nothing but the step.

    state = cell.init_state((batch,))
    u = cell.project(inputs)                  everything that does not wait for the state, all steps at once
    state = cell.step(u[:, t], state)         the recurrent half
    y = cell.readout(state)

`step` is pure: no in-place edits, no randomness, no branch on values, any leading axes. Because of these promises the
same cell can be looped, linearised, put under `torch.func.vmap`, or replaced by a kernel for a whole sequence. A state
is a tensor or a (named) tuple of tensors whose first axes are the batch.

Your own cell is a subclass with `step` and `init_state`, or a plain function through `cell_from`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reroll.errors import UsageError, require_count

State = Any
"""A tensor, or a (named) tuple of tensors."""


class Cell(nn.Module, ABC):
    """One step of a recurrence.

    A subclass sets `input_size` and `output_size` (features of `readout`), and defines `step` and `init_state`.

    Example:
        >>> class Leak(Cell):
        ...     input_size = output_size = 1
        ...     def init_state(self, batch_shape):
        ...         return torch.zeros(*batch_shape, 1)
        ...     def step(self, u, state):
        ...         return 0.5 * state + u
        >>> Leak().step(torch.ones(2, 1), Leak().init_state((2,)))
        tensor([[1.],
                [1.]])
    """

    input_size: int
    output_size: int
    has_kernel = False
    """Whether `fused` runs a kernel of this project, written for this cell."""
    stepwise = True
    """Whether `project`, of the class that defines both, takes every step by itself and draws no random numbers: then a
    long sequence may be projected in pieces. A class that defines `project` alone is taken at no such word."""

    @abstractmethod
    def init_state(self, batch_shape: Sequence[int]) -> State:
        """Return the state before the first step, with these leading axes."""

    @abstractmethod
    def step(self, u: Tensor, state: State) -> State:
        """Advance one step.

        Args:
            u: projected inputs, [..., features of `project`].
            state: the state before the step.

        Returns:
            The state after the step, with the structure and shapes of `state`.
        """

    def project(self, inputs: Tensor) -> Tensor:
        """Return the part of a step that depends on the inputs alone, [..., input_size] → [..., any]."""
        return inputs

    def readout(self, state: State) -> Tensor:
        """Return what the next layer sees, [..., output_size]."""
        return state

    def fused(self, inputs: Tensor, state: State) -> tuple[Tensor, State] | None:
        """Run a whole sequence by a faster kernel, if there is one that computes the same thing.

        Args:
            inputs: [batch, time, input_size].
            state: the state before the first step.

        Returns:
            (readouts [batch, time, output_size], the state after the last step); or None: loop over `step`.
        """
        return None

    @property
    def projects_stepwise(self) -> bool:
        """Whether `stepwise` was said by the class whose `project` this is."""
        owner = next(kind for kind in type(self).__mro__ if "project" in vars(kind))
        return "project" not in vars(self) and bool(vars(owner).get("stepwise", False))

    @property
    def step_floats(self) -> int:
        """About how many numbers one step of one sequence keeps alive while a window of steps is run."""
        return self.input_size + 5 * self.output_size


class FunctionCell(Cell):
    """A plain function as a cell; see `cell_from`."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], state_size: int, module: nn.Module | None):
        super().__init__()
        self.function = None if function is module else function  # a module twice would be saved twice
        self.module = module
        self.input_size = self.output_size = self.state_size = state_size

    def init_state(self, batch_shape: Sequence[int]) -> Tensor:
        return torch.zeros(*batch_shape, self.state_size)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        step = self.module if self.function is None else self.function
        assert step is not None
        return step(u, state)


def cell_from(step: Callable[..., Any], state_size: int, *, module: nn.Module | None = None) -> Cell:
    """Return a cell from a plain function.

    Args:
        step: `step(input_t, state) → state`, on [rows, features] and [rows, state_size]; pure (see `Cell`). Also
            torch's `RNNCell`, `GRUCell` or `LSTMCell`, whose state is a pair.
        state_size: features of the state, which starts as zeros.
        module: the module whose parameters `step` uses, so that they are trained. A bound method brings its own.

    Raises:
        UsageError: if `step` cannot be called, or state_size is not positive.

    Example:
        >>> cell = cell_from(lambda u, s: torch.tanh(s + u), 3)
        >>> cell.step(torch.zeros(2, 3), cell.init_state((2,))).shape
        torch.Size([2, 3])
    """
    if not callable(step):
        raise UsageError(f"step={step!r} must be a function step(input_t, state) → state.")
    require_count(state_size=state_size)
    if isinstance(step, nn.RNNCell | nn.GRUCell | nn.LSTMCell):
        from reroll.cells.wrapped import Wrapped

        if step.hidden_size != state_size:
            raise UsageError(f"state_size={state_size} does not fit {step}, whose hidden_size is {step.hidden_size}.")
        return Wrapped(step)
    if isinstance(step, nn.RNNBase):
        kind = type(step).__name__
        raise UsageError(f"step is an nn.{kind}, which runs whole sequences; give an nn.{kind}Cell, a single step.")
    _require_two_arguments(step)
    owner = step if isinstance(step, nn.Module) else getattr(step, "__self__", None)
    if module is None and isinstance(owner, nn.Module):
        module = owner
    return FunctionCell(step, state_size, module)


def _require_two_arguments(step: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(step.forward if isinstance(step, nn.Module) else step, follow_wrapped=False)
    except (TypeError, ValueError):  # a function written in C may have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(step, "__name__", type(step).__name__)
        raise UsageError(f"step={name} must take (input_t, state): {error}.") from error
