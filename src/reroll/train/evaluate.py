"""The score of a model on a split of a task, without a gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from reroll.data.batch import START
from reroll.data.task import Score, Task, sequence_score


@torch.no_grad()
def evaluate(model: Any, task: Task, split: str, device: torch.device | str = "cpu") -> dict[str, float]:
    """Return the mean loss over the batches of a split; for symbols also bits, accuracy and exact match.

    Args:
        model: the model; it is left in the mode (training or not) it was in.
        task: the task.
        split: "train", or one of `task.splits`. A carried text is read on with its state.
        device: where the model is.

    Example:
        >>> from reroll import Recurrent, cells
        >>> from reroll.data.synthetic import Copy
        >>> task = Copy(length=3, batch=4)
        >>> sorted(evaluate(Recurrent(cell=cells.RNN(8, 8), vocab=task.vocab), task, "valid"))
        ['accuracy', 'bits', 'exact', 'loss']
    """
    training = model.training
    model.eval()
    carry = task.carries and split != "train"
    total, state = Score(), START if carry else None
    try:
        for index in range(task.batches(split)):
            batch = task.batch(index, split).to(device)
            if carry:
                score, state = sequence_score(model, replace(batch, state=state))
            else:
                score = task.score(model, batch)
            total = total + score
    finally:
        model.train(training)
    return total.summary(task.categorical)
