"""A batch of sequences, and the parts it can be cut into without changing what its loss means.

The loss of a batch is Σ (loss of each scored position) / scored. A part carries the share of `scored` that makes losses
of parts add up: rows are averaged by their number, steps of time are summed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.trees import map_state


@dataclass(frozen=True)
class Batch:
    """B sequences of T steps, what should come out, and which outputs are scored.

    Args:
        inputs: symbols [B, T] (int64), or real numbers [B, T, features].
        targets: of every step, [B, T] symbols or [B, T, outputs] numbers; or one per sequence, [B] or [B, outputs].
            Numbers in the shape of the mask are one output each: [B] becomes [B, 1].
        mask: True where the output is scored, [B, T]; or [B] for one output per sequence.
        scored: how many outputs the loss is averaged over; 0 counts the mask.
        present: True at the steps that exist, [B, T], for models that read out the last step or the mean; None: all.
        state: the model's state before the first step, and the request to return the one after the last; `START` for
            the first of several windows. None: the initial state, and none is returned.
        reset: True at the steps before which the state is reset (a new document begins), [B, T].

    Raises:
        UsageError: if targets, mask, present or reset have another shape; a wrong one could broadcast to a wrong loss.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    scored: float = 0.0
    present: Tensor | None = None
    state: Any = None
    reset: Tensor | None = None

    def __post_init__(self) -> None:
        size, real = self.inputs.shape[:2], self.targets.is_floating_point()
        if real and self.targets.shape == self.mask.shape and self.mask.shape in (size[:1], size):
            object.__setattr__(self, "targets", self.targets.unsqueeze(-1))
        outputs = size[:1] + self.targets.shape[1:]
        places = outputs[:-1] if real else outputs
        for name, shape in (("targets", outputs), ("mask", places), ("present", size), ("reset", size)):
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != shape:
                raise UsageError(
                    f"{name} has shape {list(tensor.shape)}; to inputs of shape {list(self.inputs.shape)} and targets "
                    f"of shape {list(self.targets.shape)} belongs one of {list(shape)}."
                )
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

    def part(self, rows: range | None) -> Batch:
        """Return the sequences of a range; None: all.

        Raises:
            UsageError: if the range is empty, has gaps or goes beyond the batch.
        """
        if rows is None:
            return self
        check_rows(rows, len(self))
        return self.rows(rows.start, rows.stop)

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
        tensors = {name: getattr(self, name) for name in ("inputs", "targets", "mask", "present", "reset")}
        return replace(self, **{name: change(tensor) for name, tensor in tensors.items() if tensor is not None})


def check_rows(rows: range, count: int) -> None:
    """Raise `UsageError` if a range of rows is empty, has gaps or goes beyond the rows of a batch."""
    if rows.step != 1 or not 0 <= rows.start < rows.stop <= count:
        raise UsageError(f"rows={rows} must be a range with step 1 inside range(0, {count}), and not empty.")


class _Start:
    """The initial state, with the request to return the state after the last step."""

    def __repr__(self) -> str:
        return "START"


START = _Start()
"""`Batch.state` of the first of several windows."""
