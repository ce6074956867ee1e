"""How far a Newton step is trusted: the correction δ of the states from the residual and the linearisation.

    undamped        δ_t = A_t δ_{t−1} + r_t,   r_t = f_t(s_{t−1}) − s_t,   δ_0 = 0
    Scale(k)        (1 − k) A_t in place of A_t
    Clip(limit)     a diagonal A_t clamped to ±limit
    Kalman(σ²)      δ seen as a chain with noise of variance 1, and "δ = 0" observed with variance σ² at every step

The last is ELK (arXiv:2407.19115). Its filter mean is what the paper's code runs; the smoother mean is the
Levenberg–Marquardt step of its text, the solution of (JᵀJ + 1/σ²) δ = Jᵀr. As σ² → ∞ both are the undamped step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Protocol

import torch
from torch import Tensor

from reroll.errors import UsageError, require_positive
from reroll.kernels.linear_scan import kalman_scan, kalman_smooth, linear_scan, scan_into
from reroll.rollout.linearise import Transition


class Damping(Protocol):
    """How corrections are computed."""

    @property
    def damped(self) -> bool:
        """Whether steps may be shortened, so that a small one is no sign of convergence."""
        ...

    @property
    def adaptive(self) -> bool:
        """Whether the variance follows the residual."""
        ...

    def correct(self, transition: Transition, residual: Tensor, trust: Tensor | None) -> Tensor:
        """Return δ, [D, T, B], for A, zero where a sequence starts, and r [D, T, B]; `trust` [B] multiplies σ²."""
        ...


LANES = 4
"""Batch size from which a CPU scans whole matrices with one sequence per lane."""


def solve(transition: Transition, residual: Tensor) -> Tensor:
    """Return δ of δ_t = A_t δ_{t−1} + r_t, [D, T, B]."""
    kind, a = transition
    if a is None:
        return residual.clone()
    if kind in ("diagonal", "identity"):
        correction = torch.empty_like(residual, memory_format=torch.contiguous_format)
        scan_into(a, residual, correction, structure="diagonal")
        return correction
    if kind == "dense" and residual.shape[2] >= LANES and a.device.type == "cpu":
        kind, a = "block", a.unsqueeze(2)  # the state as D parts of one feature
    if kind == "block":
        r = residual.unflatten(0, (len(a), -1)).permute(1, 2, 0, 3)
        correction = linear_scan(a.permute(2, 3, 0, 1, 4), r, structure="block")
        return correction.permute(2, 0, 1, 3).flatten(0, 1).contiguous()
    correction = linear_scan(a.permute(3, 2, 0, 1), residual.permute(2, 1, 0), structure="dense")
    return correction.permute(2, 1, 0).contiguous()


@dataclass(frozen=True)
class Undamped:
    """The full Newton step."""

    damped = False
    adaptive = False

    def correct(self, transition: Transition, residual: Tensor, trust: Tensor | None) -> Tensor:
        return solve(transition, residual)


@dataclass(frozen=True)
class Scale:
    """(1 − k) A: exact after T iterations, as the undamped step is.

    Args:
        k: in [0, 1]; 0 is undamped, 1 is Jacobi.
    """

    k: float
    damped = True
    adaptive = False

    def __post_init__(self) -> None:
        if not 0 <= self.k <= 1:
            raise UsageError(f"k={self.k} must lie in [0, 1].")

    def correct(self, transition: Transition, residual: Tensor, trust: Tensor | None) -> Tensor:
        a = transition.tensor
        return solve(transition._replace(tensor=None if a is None else (1 - self.k) * a), residual)


@dataclass(frozen=True)
class Clip:
    """A diagonal clamped to ±limit.

    Args:
        limit: 1 keeps every channel from growing.
    """

    limit: float = 1.0
    damped = True
    adaptive = False

    def __post_init__(self) -> None:
        require_positive(limit=self.limit)

    def correct(self, transition: Transition, residual: Tensor, trust: Tensor | None) -> Tensor:
        if transition.kind != "diagonal" or transition.tensor is None:
            raise UsageError(f"Clip takes a diagonal, not a transition of kind {transition.kind}; use Scale or Kalman.")
        return solve(transition._replace(tensor=transition.tensor.clamp(-self.limit, self.limit)), residual)


@dataclass(frozen=True)
class Kalman:
    """A trust region as a Kalman filter or smoother; see the module.

    Args:
        variance: σ², the papers' "sigmasq"; smaller is stronger damping.
        smoother: also run the smoother: the Levenberg–Marquardt step.
        adaptive: multiply σ² by 3 when Σ r² falls; when it rises, divide by 3 and undo the step.
    """

    variance: float
    smoother: bool = False
    adaptive: bool = False
    damped = True

    def __post_init__(self) -> None:
        if isinstance(self.variance, Tensor):
            raise UsageError(
                f"variance is a tensor of shape {tuple(self.variance.shape)}; it must be one number for all sequences, "
                "such as float(variance)."
            )
        if not isinstance(self.variance, Real) or math.isnan(self.variance) or self.variance <= 0:
            raise UsageError(f"variance={self.variance!r} must be greater than zero; infinity is undamped.")

    def correct(self, transition: Transition, residual: Tensor, trust: Tensor | None) -> Tensor:
        if math.isinf(self.variance):
            return solve(transition, residual)
        kind, a = transition
        if residual.element_size() < 4 and a is not None:  # a gain is a quotient of variances
            trust = None if trust is None else trust.float()
            return self.correct(Transition(kind, a.float()), residual.float(), trust).to(residual.dtype)
        if kind not in ("diagonal", "dense") or a is None:
            raise UsageError(f"Kalman works with Dense or Diagonal, not a transition of kind {kind}.")
        if kind == "diagonal" and trust is None:
            return self._filtered(a, residual, self.variance)
        # Batch-first, as matrices and a variance per sequence need it.
        limits = torch.finfo(residual.dtype)
        variance = self.variance if trust is None else (self.variance * trust).clamp(limits.tiny, limits.max)
        a = a.permute(2, 1, 0) if kind == "diagonal" else a.permute(3, 2, 0, 1)
        correction = self._filtered(a.contiguous(), residual.permute(2, 1, 0).contiguous(), variance)
        return correction.permute(2, 1, 0).contiguous()

    def _filtered(self, a: Tensor, residual: Tensor, variance: float | Tensor) -> Tensor:
        observed = torch.zeros_like(residual)
        filtered = kalman_scan(a, residual, observed, variance, keep_variance=self.smoother)
        return kalman_smooth(a, residual, filtered) if self.smoother else filtered.mean
