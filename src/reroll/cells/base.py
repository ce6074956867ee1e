"""A cell: one step of a recurrence, and nothing but the step.

    state = cell.init_state((batch,))
    u = cell.project(inputs)                  everything that does not depend on the state, all steps at once
    state = cell.step(u[:, t], state)         the recurrent half
    y = cell.readout(state)

`step` is pure: no in-place edits, no randomness, no branch on values, any leading axes. Because of these promises the
same cell can be looped, linearised, put under `torch.func.vmap`, or replaced by a kernel for a whole sequence. A state
is a tensor or a (named) tuple of tensors whose first axes are the batch.

Your own cell is a subclass with `step` and `init_state`, or a plain function through `cell_from` (`cells/wrapped.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

State = Any
"""A tensor, or a (named) tuple of tensors."""
METHODS = ("step", "project", "readout")
"""The methods that a kernel for whole sequences stands for."""


class Cell(nn.Module, ABC):
    """One step of a recurrence.

    A subclass sets `input_size` and `output_size` (features of `readout`), and defines `step` and `init_state`.

    Example:
        >>> import torch
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
    """Whether `project` treats every step by itself and draws no random numbers: then a long sequence may be projected
    in pieces. It is of the `project` of the same class: a subclass that overrides `project` must set it anew."""

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

    _fused_methods: ClassVar[tuple[Any, ...]] = ()
    """The methods that `fused` was written for."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "fused" in vars(cls):
            cls._fused_methods = tuple(getattr(cls, name) for name in METHODS)

    @property
    def can_fuse(self) -> bool:
        """Whether `fused` computes what this cell does: a subclass, a mixin or `cell.step = f` may replace that."""
        methods = tuple(vars(self).get(name, getattr(type(self), name)) for name in METHODS)
        return "fused" in vars(self) or methods == self._fused_methods

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
        """Whether the class whose `project` this is sets `stepwise`."""
        owner = next(kind for kind in type(self).__mro__ if "project" in vars(kind))
        return "project" not in vars(self) and bool(vars(owner).get("stepwise", False))

    @property
    def step_floats(self) -> int:
        """About how many numbers per step and sequence are in memory while a window of steps is run."""
        return self.input_size + 5 * self.output_size
