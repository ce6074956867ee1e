"""Scoring a model on a split of a task, without a gradient; and the precision that losses and scores share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from reroll.data.batch import START
from reroll.data.task import Score, Task, sequence_score
from reroll.train.mesh import ALONE, Mesh


@dataclass(frozen=True)
class Precision:
    """The precision of forward passes: `dtype`, by autocast on a type of device, or that of the weights (None).

    Example:
        >>> with Precision("cpu", torch.bfloat16).scope():
        ...     print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
        torch.bfloat16
    """

    device: str
    dtype: torch.dtype | None = None

    def scope(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device, dtype=self.dtype)

    def under(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, running in this precision."""

        def within(*arguments: Any) -> Any:
            with self.scope():
                return function(*arguments)

        return function if self.dtype is None else within


@torch.no_grad()
def evaluate(
    model: Any,
    task: Task,
    split: str,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] = lambda done, batches: None,
    mesh: Mesh = ALONE,
    sums: Callable[[Score], None] = lambda total: None,
) -> dict[str, float]:
    """Return the mean loss over the batches of a split; for symbols also bits, accuracy and exact match.

    Args:
        model: the model; its training mode is restored afterwards.
        task: the task.
        split: "train", or one of `task.splits`. A carried text keeps its state from batch to batch.
        device: of the model.
        progress: called after every batch with the number of batches done, and of all.
        mesh: processes that share the batches, each with this call; a carried text is evaluated by all.
        sums: called at the end with the sums that the means are made of.

    Example:
        >>> from reroll import Recurrent, cells
        >>> from reroll.data.synthetic import Copy
        >>> task = Copy(length=3, batch=4)
        >>> sorted(evaluate(Recurrent(cell=cells.RNN(8, 8), vocab=task.vocab), task, "valid"))
        ['accuracy', 'bits', 'exact', 'loss']
    """
    training = model.training
    model.eval()
    scores, state, batches = [], START, task.batches(split)
    carries = task.carries and split != "train"
    mesh = ALONE if carries else mesh
    try:
        for index in range(mesh.rank, batches, mesh.size):
            batch = task.batch(index, split).to(device)
            if carries:
                score, state = sequence_score(model, replace(batch, state=state))
            else:
                score = task.score(model, batch)
            scores.append(score)
            progress(index + 1, batches)
    finally:
        model.train(training)
    total = sum(mesh.interleave(scores), Score())
    sums(total)
    return task.summary(total, split)
