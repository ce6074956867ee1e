"""Evaluate probes on private copies of a small model, one per worker, whose weights are overwritten for every branch.

This is `tiles` when all perturbed weights fit the budget: nothing has to be intercepted then. A copy shares everything
with the model but its weights, which are in the dtype of the evaluation.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from reroll.grad.evaluate.base import BranchByBranch, ProbeContext
from reroll.kernels.noise_axpy import perturber


class Replicas(BranchByBranch):
    """Evaluate units on copies of the model. Several threads may call `losses` at once."""

    def __init__(self, probes: ProbeContext):
        super().__init__(probes)
        self.thread = threading.local()
        self.copying = threading.Lock()

    def model(self) -> nn.Module:
        """Return this thread's copy, made at its first unit."""
        if not hasattr(self.thread, "model"):
            with self.copying:
                self.thread.model, self.thread.perturb = self._copy()
        return self.thread.model

    @contextmanager
    def branch(self, side: int, probe: int) -> Iterator[None]:
        for name, perturb in self.thread.perturb.items():
            perturb(probe, self.probes.alpha(name, side))
        yield

    def _copy(self) -> tuple[nn.Module, dict[str, Callable[[int, float], None]]]:
        """A copy of the model, and a function (probe, alpha) per weight that perturbs it there."""
        model = self.probes.model
        assert model is not None
        names = {id(p): name for name, p in self.probes.parameters.items()}
        # deepcopy takes what is in `memo` instead of copying: buffers are shared, weights replaced.
        memo: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
        perturb = {}
        for p in model.parameters():
            dtype, name = self.probes.dtype_of(p), names.get(id(p))
            weight = p.detach().to(dtype) if name is None else torch.empty(p.shape, dtype=dtype, device=p.device)
            memo[id(p)] = nn.Parameter(weight, requires_grad=False)
            if name is not None:
                perturb[name] = perturber(p, self.probes.stream(name), weight)
        return copy.deepcopy(model, memo), perturb
