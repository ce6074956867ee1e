"""A state as one vector per sequence, which is what solvers along time work on.

layout = Layout.of(cell.init_state((batch,)))
vector = layout.pack(state)               [..., D], the parts one after another
state = layout.unpack(vector)             views where the state is one tensor
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reroll.cells.base import State
from reroll.errors import UsageError


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a state lie in its vector.

    Args:
        shapes: of each tensor, without the batch axis.
        kind: the type of the state: a named tuple's, `tuple`, or `Tensor`.
    """

    shapes: tuple[tuple[int, ...], ...]
    kind: Any

    @classmethod
    def of(cls, state: State) -> Layout:
        """Return the layout of a state with one batch axis.

        Raises:
            UsageError: if the state is not floating point, or nested deeper than a tuple of tensors.

        Example:
            >>> from reroll.cells import LSTM
            >>> Layout.of(LSTM(3, 4).init_state((2,))).size
            8
        """
        parts = (state,) if isinstance(state, Tensor) else tuple(state)
        for part in parts:
            if not isinstance(part, Tensor):
                raise UsageError(f"state holds a {type(part).__name__}; it must be a tensor or a tuple of tensors.")
            if not part.is_floating_point():
                raise UsageError(
                    f"state has dtype {str(part.dtype).removeprefix('torch.')}; only a floating-point state has the "
                    "Jacobian that a rollout in parallel needs. Use rollout=Sequential()."
                )
        return cls(tuple(tuple(part.shape[1:]) for part in parts), Tensor if isinstance(state, Tensor) else type(state))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """D, numbers in the state."""
        return sum(self.sizes)

    def parts(self, state: State) -> tuple[Any, ...]:
        """Return the tensors of a state with their features flattened, [..., size]."""
        tensors = (state,) if self.kind is Tensor else tuple(state)
        return tuple(
            t if len(shape) == 1 else t.flatten(t.dim() - len(shape)) if shape else t.unsqueeze(-1)
            for t, shape in zip(tensors, self.shapes)
        )

    def pack(self, state: State) -> Tensor:
        """Return a state as one vector, [..., D]."""
        parts = self.parts(state)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def unpack(self, vector: Any) -> State:
        """Return the state of a vector [..., D]."""
        if self.kind is Tensor:
            return self._shaped(vector, self.shapes[0])
        parts, begin = [], 0
        for shape, size in zip(self.shapes, self.sizes):
            parts.append(self._shaped(vector[..., begin : begin + size], shape))
            begin += size
        return self.kind(*parts) if hasattr(self.kind, "_fields") else tuple(parts)

    @staticmethod
    def _shaped(part: Any, shape: tuple[int, ...]) -> Any:
        return part if len(shape) == 1 else part.unflatten(-1, shape) if shape else part.squeeze(-1)
