"""The model and batch that steps are measured on: an LSTM over random symbols."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reroll.cells import LSTM
from reroll.data.batch import Batch
from reroll.data.task import sequence_losses
from reroll.grad import CentralDifference
from reroll.grad.base import Estimator, Gradient
from reroll.keys import Key
from reroll.models import Recurrent
from reroll.optim import SGD, step
from reroll.rollout import Sequential


@dataclass(frozen=True)
class Case:
    """A model and a batch."""

    model: Recurrent
    batch: Batch

    @classmethod
    def lstm(
        cls, hidden: int, heads: int, rows: int, time: int, *, inputs: int = 100, vocab: int = 100, kernel: Any = "auto"
    ) -> Case:
        torch.manual_seed(0)
        cell = LSTM(inputs, hidden, heads=heads)
        return cls(Recurrent(cell=cell, vocab=vocab, rollout=Sequential(kernel=kernel)), symbols(vocab, rows, time))

    @torch.no_grad()
    def forward(self, times: int = 1) -> None:
        for _ in range(times):
            losses = sequence_losses(self.model, self.batch)
            assert isinstance(losses, Tensor)
            losses.mean().item()

    def call(self, estimator: Estimator | None, optimizer: Any = None) -> Callable[[], Any]:
        """Return a step, or for no estimator a forward pass, as a call."""
        return self.forward if estimator is None else lambda: self.step(estimator, optimizer)

    def step(self, estimator: Estimator, optimizer: Any = None) -> Gradient:
        """Take a step, estimate and update; without an optimizer, at a negligible learning rate."""
        optimizer = optimizer or SGD(self.model.parameters(), lr=1e-12)
        update = "fused" if isinstance(estimator, CentralDifference) else "write"
        key = Key(0).at(0)
        return step(self.model, sequence_losses, estimator, optimizer, self.batch, None, key, update=update).gradient


def symbols(vocab: int, rows: int, time: int) -> Batch:
    """Return a batch of random symbols; the target of each is the next one."""
    ids = torch.randint(vocab, (rows, time + 1))
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), torch.ones(rows, time, dtype=torch.bool))
