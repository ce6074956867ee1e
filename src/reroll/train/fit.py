"""The largest part of a batch that a device holds: tried before the first step, so that no step fails."""

from __future__ import annotations

import gc
from typing import Any

import torch

from reroll.errors import RunError
from reroll.grad.units import batch_rows, batch_size


def parts_for(rows: int, most: int) -> int:
    """Return into how many parts rows are cut so that none has more than `most`.

    Example:
        >>> parts_for(64, 64), parts_for(64, 24), parts_for(5, 2)
        (1, 3, 3)
    """
    return -(-rows // most)


def largest_part(estimator: Any, model: Any, loss_fn: Any, batch: Any, key: Any) -> int:
    """Return how many sequences of a batch a gradient can be taken of at once: all, a half, a quarter …

    Beside the gradient there is room for an optimizer's two moments and its update, in fp32. Gradients are dropped, and
    buffers that the loss changes are restored.

    Raises:
        RunError: if even one sequence is too much.
    """
    rows = batch_size(batch) or 1
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    room: list[torch.Tensor] = []
    while True:
        try:
            room += [p.new_empty(3, *p.shape, dtype=torch.float32) for p in model.parameters()]
            estimator(model, loss_fn, batch_rows(batch, 0, rows), key)
            return rows
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if rows == 1:
                raise RunError("one sequence is too much for the memory; lower length=… or the model's size.") from None
            rows = -(-rows // 2)
        finally:
            room.clear()
            for p in model.parameters():
                p.grad = None
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
