"""The valid steps of a padded batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError


def steps_of(lengths: Any, padded: Tensor) -> tuple[Tensor, Tensor]:
    """Return lengths as int64 on the device of a padded batch [B, T, …], and a mask of the valid steps, [B, T].

    Raises:
        UsageError: if `lengths` does not fit the batch.

    Example:
        >>> steps_of(torch.tensor([2, 0]), torch.zeros(2, 3))[1].int()
        tensor([[1, 1, 0],
                [0, 0, 0]], dtype=torch.int32)
    """
    batch, time = padded.shape[:2]
    expected = f"expected whole numbers of shape ({batch},)"
    if not isinstance(lengths, Tensor):
        raise UsageError(f"lengths is a {type(lengths).__name__}; {expected}: torch.tensor(lengths).")
    if lengths.shape != (batch,) or lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        name = str(lengths.dtype).removeprefix("torch.")
        raise UsageError(f"lengths has shape {tuple(lengths.shape)} and dtype {name}; {expected}.")
    if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= time:
        raise UsageError(f"lengths lie in {int(lengths.min())} … {int(lengths.max())}; there are {time} steps.")
    lengths = lengths.to(padded.device, torch.int64)
    return lengths, torch.arange(time, device=padded.device) < lengths.unsqueeze(1)
