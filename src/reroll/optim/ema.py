"""A running average of the weights, which is often better than the last of them (Polyak and Juditsky, 1992).

a ← β a + (1 − β) θ        with β_t = min(β, (1 + t) / (10 + t)), so that the initial weights fade
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """An exponential average of some tensors.

    Args:
        parameters: the tensors by name.
        decay: β, in [0, 1).

    Example:
        >>> p = torch.zeros(1)
        >>> average = Average({"p": p}, 0.5)
        >>> average.update(p.fill_(1.0) and {"p": p})
        >>> average.tensors["p"]
        tensor([0.8182])
    """

    def __init__(self, parameters: Mapping[str, Tensor], decay: float):
        self.decay, self.count = decay, 0
        self.tensors = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor]) -> None:
        """Update the average with the weights after a step."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, p in parameters.items():
            self.tensors[name].lerp_(p.detach(), 1 - decay)

    @contextmanager
    def swapped_in(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Swap the average and the weights inside the block; the weights come back bit for bit."""
        self._swap(parameters)
        try:
            yield
        finally:
            self._swap(parameters)

    @torch.no_grad()
    def _swap(self, parameters: Mapping[str, Tensor]) -> None:
        for name, p in parameters.items():
            before = p.detach().clone()
            p.detach().copy_(self.tensors[name])
            self.tensors[name].copy_(before)
