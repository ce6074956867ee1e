"""Evaluate probes on private copies of a small model, one per worker, whose weights are overwritten for every branch.

    copy of p ← p + ε z,  L⁺;    copy of p ← p − ε z,  L⁻

This is `tiles` when all perturbed weights fit the budget: nothing has to be intercepted then. The copy shares
everything with the model but its weights, which are in the dtype of the evaluation.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from reroll.grad.evaluate.probing import Evaluator, Probing, Result, Unit
from reroll.kernels.noise_axpy import perturber


class Replica(NamedTuple):
    """A worker's copy of the model, and a function (probe, alpha) per weight that perturbs it."""

    model: nn.Module
    perturb: dict[str, Callable[[int, float], None]]


class Replicas(Evaluator):
    """Evaluate units on copies of the model. Several threads may call `losses` at once.

    Args:
        probing: the step's probes, of a model.
    """

    def __init__(self, probing: Probing):
        assert probing.model is not None
        self.probing, self.model = probing, probing.model
        self.thread = threading.local()
        self.copying = threading.Lock()

    def losses(self, unit: Unit) -> Result:
        replica = self._own()
        losses, states = [], []
        with self.probing.isolated(replica.model) as rewind:
            for index, side, probe in self.probing.branches(unit):
                rewind()
                for name, perturb in replica.perturb.items():
                    perturb(probe, self.probing.alpha(name, side))
                loss, state = self.probing.loss(unit, unit.states and unit.states[index], replica.model)
                losses.append(loss)
                states.append(state)
        return Result(torch.stack(losses).view(len(self.probing.sides), -1), states)

    def _own(self) -> Replica:
        """This thread's copy, made at its first unit."""
        if not hasattr(self.thread, "replica"):
            with self.copying:
                self.thread.replica = self._copy()
        return self.thread.replica

    def _copy(self) -> Replica:
        names = {id(p): name for name, p in self.probing.parameters.items()}
        # deepcopy takes what it finds in `memo` instead of copying: buffers are shared, weights replaced.
        memo: dict[int, Any] = {id(buffer): buffer for buffer in self.model.buffers()}
        perturb = {}
        for p in self.model.parameters():
            own = self._like(p, id(p) in names)
            memo[id(p)] = nn.Parameter(own, requires_grad=False)
            if id(p) in names:
                name = names[id(p)]
                perturb[name] = perturber(p, self.probing.stream(name), own)
        return Replica(copy.deepcopy(self.model, memo), perturb)

    def _like(self, p: Tensor, perturbed: bool) -> Tensor:
        """Memory for a perturbed weight; a weight that is not perturbed itself, cast if need be."""
        dtype = self.probing.dtype if self.probing.dtype is not None and p.is_floating_point() else p.dtype
        return torch.empty(p.shape, dtype=dtype, device=p.device) if perturbed else p.detach().to(dtype)
