"""A batch of sequences, and the parts it can be cut into without changing what its loss means.

The loss of a batch is Σ (loss of each scored position) / scored. A part of a batch carries the share of `scored` that
makes losses of parts add up: rows are averaged by their number, steps of time are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """B sequences of T steps, what should come out, and which outputs are scored.

    Args:
        inputs: symbols [B, T] (int64), or real numbers [B, T, features].
        targets: of every step, [B, T] symbols or [B, T, outputs] numbers; or one per sequence, [B] or [B, outputs].
        mask: True where the output is scored, [B, T]; or [B] for one output per sequence.
        scored: how many outputs the loss is averaged over; 0 counts the mask.
        present: True at the steps that exist, [B, T], for models that read out the last step or the mean; None: all.
        state: the model's state before the first step, and the wish to have the one after the last; `START` for the
            first of several windows. None starts afresh, and nothing is carried.
        reset: True at the steps before which the state is reset (a new document begins), [B, T].
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    scored: float = 0.0
    present: Tensor | None = None
    state: Any = None
    reset: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.scored:
            object.__setattr__(self, "scored", float(self.mask.sum()))

    def __len__(self) -> int:
        return self.inputs.shape[0]

    @property
    def time(self) -> int:
        """T, the number of steps."""
        return self.inputs.shape[1]

    def rows(self, begin: int, end: int) -> Batch:
        """Return some of the sequences. The loss of the batch is the mean of the losses of its parts, by their rows."""
        part = self._map(lambda tensor: tensor[begin:end])
        share = (end - begin) / max(len(self), 1)
        return replace(part, scored=self.scored * share, state=map_state(self.state, lambda s: s[begin:end]))

    def steps(self, begin: int, end: int) -> Batch:
        """Return some steps of every sequence. The loss of the batch is the sum of the losses of its parts."""
        return self._map(lambda tensor: tensor[:, begin:end])

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Batch:
        """Return the batch on a device, with floating inputs in `dtype`."""
        moved = self._map(lambda tensor: tensor.to(device))
        if dtype is not None and moved.inputs.is_floating_point():
            moved = replace(moved, inputs=moved.inputs.to(dtype))
        return moved

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return replace(
            self,
            inputs=change(self.inputs),
            targets=change(self.targets),
            mask=change(self.mask),
            present=None if self.present is None else change(self.present),
            reset=None if self.reset is None else change(self.reset),
        )


class _Start:
    """A state that has not begun: start afresh, and give the state after the last step back."""

    def __repr__(self) -> str:
        return "START"


START = _Start()
"""`Batch.state` of the first of several windows."""


def combine_states(states: list[Any], combine: Callable[[list[Tensor]], Tensor]) -> Any:
    """Combine states of one structure tensor by tensor, with `torch.stack` or `torch.cat` say.

    Example:
        >>> combine_states([(torch.ones(1), None), (torch.zeros(1), None)], torch.cat)
        (tensor([1., 0.]), None)
    """
    columns: list[list[Tensor]] = []
    for state in states:
        leaves: list[Tensor] = []
        map_state(state, lambda tensor, leaves=leaves: leaves.append(tensor) or tensor)
        columns.append(leaves)
    combined = iter([combine(list(tensors)) for tensors in zip(*columns)])
    return map_state(states[0], lambda tensor: next(combined))


def map_state(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a state: a tensor, or (named) tuples, lists and dicts of states; None stays.

    Example:
        >>> map_state((torch.ones(2), None), lambda t: t + 1)
        (tensor([2., 2.]), None)
    """
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {name: map_state(value, change) for name, value in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(map_state(value, change) for value in state))
    if isinstance(state, list | tuple):
        return type(state)(map_state(value, change) for value in state)
    return state
