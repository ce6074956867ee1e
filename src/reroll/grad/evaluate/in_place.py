"""Evaluate probes by overwriting weights: the model's own, which come back bit for bit, or those of copies.

Adding a perturbation and subtracting it again does not give p back: floating-point addition rounds (in bf16 the weights
drift by more than an update). So a pristine copy is stored, which costs as much memory as the weights; or, with
`restore="grid"`, fp32 weights are first rounded to a fixed-point grid on which adding and removing a multiple of the
grid is exact, by at most half a unit, 2⁻²⁴ of the tensor's largest:

    unit = 2^(e − 24) with 2^e > max |p| + 2 ε,        ε ← a multiple of the largest unit of all tensors
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from reroll.errors import EpsilonTooSmall, UsageError
from reroll.grad.base import fetch
from reroll.grad.evaluate.base import BranchByBranch, ProbeContext
from reroll.kernels.noise_axpy import RADEMACHER, Noise, noise_axpy, perturber


class InPlace(BranchByBranch):
    """Evaluate units by overwriting the weights; one unit at a time."""

    drift: int | None = None
    """Number of tensors that were not restored exactly; counted where there is no copy of them."""

    def __init__(self, probes: ProbeContext, restore: str = "copy"):
        super().__init__(probes)
        if probes.dtype is not None:
            raise UsageError('evaluate="in_place" cannot change the dtype of the weights; use evaluate="tiles".')
        self.on_grid = restore == "grid"
        self.copies: dict[str, Tensor] = {}

    def __enter__(self) -> Self:
        named = self.probes.parameters
        # A forward pass that renormalises a weight takes it off the grid.
        copied = renormalised(self.probes.model, named) if self.on_grid else named
        self.copies = {name: named[name].detach().clone() for name in copied}
        self.before = bit_sums(named) if self.on_grid else []
        return self

    def __exit__(self, *error: Any) -> None:
        self._put_back()
        self.copies = {}
        if self.on_grid:
            self.drift = sum(a != b for a, b in zip(self.before, bit_sums(self.probes.parameters)))

    @contextmanager
    def branch(self, side: int, probe: int) -> Iterator[None]:
        self._perturb(side, probe)
        try:
            yield
        finally:
            if self.on_grid:
                self._perturb(-side, probe)
                self._put_back()

    def _perturb(self, side: int, probe: int) -> None:
        for name, p in self.probes.parameters.items():
            source = self.copies.get(name, p)
            noise_axpy(source, self.probes.stream(name), [probe], [self.probes.alpha(name, side)], out=p.detach())

    def _put_back(self) -> None:
        for name, pristine in self.copies.items():
            self.probes.parameters[name].detach().copy_(pristine)


class Replicas(BranchByBranch):
    """Evaluate units on private copies of a small model, one per worker. Several threads may call `losses` at once.

    This is `tiles` when all perturbed weights fit the budget: then nothing has to be intercepted. A copy shares
    everything with the model but its weights, which are in the dtype of the evaluation.
    """

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


def renormalised(model: nn.Module | None, named: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors that a forward pass rescales in place: those of embeddings with `max_norm`."""
    modules = [] if model is None else model.modules()
    embeddings = [m for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.max_norm is not None]
    ids = {id(m.weight) for m in embeddings}
    return [name for name, p in named.items() if id(p) in ids]


def bit_sums(parameters: Mapping[str, Tensor]) -> list[int]:
    """Return the sum of every tensor's bit patterns, which tells a tensor that has changed."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    patterns = [p.detach().view(words[p.element_size()]).flatten() for p in parameters.values()]
    # In blocks: torch makes an int64 copy of what it sums in int64.
    return fetch([torch.stack([block.sum(dtype=torch.int64) for block in p.split(1 << 20)]).sum() for p in patterns])


def snap_to_grid(parameters: Mapping[str, Tensor], epsilon: float, noise: Noise = RADEMACHER) -> float:
    """Round fp32 weights in place to grids on which ±ε is exact, and return that ε.

    It is the multiple of the largest grid unit that is nearest to `epsilon`.

    Raises:
        UsageError: for weights that are not fp32, noise that is not ±1, or an ε below the largest unit.

    Example:
        >>> p = torch.tensor([0.3, -1.7])
        >>> epsilon = snap_to_grid({"p": p}, 0.01)
        >>> torch.equal((p + epsilon) - epsilon, p)
        True
    """
    if not noise.signs:
        raise UsageError(f'restore="grid" needs noise="rademacher"; with noise="{noise.name}" use restore="copy".')
    for name, p in parameters.items():
        if p.dtype != torch.float32:
            raise UsageError(f'restore="grid" needs fp32 weights; {name} is {p.dtype}. Use restore="copy".')
    some = {name: p.detach() for name, p in parameters.items() if p.numel()}
    largest = dict(zip(some, fetch([torch.linalg.vector_norm(p, float("inf")) for p in some.values()])))

    def grids(epsilon: float) -> dict[str, float]:
        bounds = {name: largest[name] + 2 * epsilon if name in largest else epsilon for name in parameters}
        return {n: 2.0 ** (math.frexp(b)[1] - 24) if math.isfinite(b) else 1.0 for n, b in bounds.items()}

    units = grids(epsilon)
    coarsest = max(units.values())
    multiple = round(epsilon / coarsest)
    if multiple < 1:
        least = max(grids(coarsest).values())  # which may itself make the grid coarser
        raise EpsilonTooSmall(f"epsilon={epsilon:g} is below the grid of the weights, {least:g}; raise it.", least)
    for name, p in parameters.items():
        # Dividing by a power of two and rounding are exact; so is the product.
        p.detach().div_(units[name]).round_().mul_(units[name])
    return multiple * coarsest
