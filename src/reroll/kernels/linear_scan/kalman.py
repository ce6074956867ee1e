"""The Kalman filter along time, which is how ELK damps a Newton iteration, and its smoother.

    s_t = A_t s_{t−1} + b_t + noise of variance I        y_t = s_t + noise of variance σ²

The mean of s_t given y_1 … y_t follows from the mean m and variance P of the step before:

    predicted mean  p = A_t m + b_t         predicted variance  Q = A_t P A_tᵀ + I
    P ← (Q⁻¹ + I/σ²)⁻¹                      m ← p + P (y_t − p)/σ²

In parallel the same numbers come from composing one element per step (`operators.py`). There is no gradient: an
iteration towards a fixed point needs none.

Non-finite numbers are not repaired. Where A or b holds one, the states from there on are not finite either, and where
products of A overflow, a parallel scan may fail at other steps than the loop does; the caller must replace them.

References: Särkkä and García-Fernández, "Temporal parallelization of Bayesian smoothers", 2021; Gonzalez et al.,
"Towards scalable and stable parallelization of nonlinear RNNs", 2024 (ELK).
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.kernels.linear_scan.operators import (
    DENSE,
    DENSE_KALMAN,
    DIAGONAL,
    SCALAR_KALMAN,
    Element,
    Operator,
    identity,
    times,
)
from reroll.kernels.linear_scan.scan import implementation, linear_scan


class Filtered(NamedTuple):
    """The distribution of s_t given y_1 … y_t.

    Args:
        mean: [B, T, D].
        variance: of every channel, [B, T, D], or for dense A the covariance, [B, T, D, D]; None if not requested.
    """

    mean: Tensor
    variance: Tensor | None


@torch.no_grad()
def kalman_scan(
    A: Tensor,
    b: Tensor,
    observed: Tensor,
    variance: float | Tensor,
    initial: Tensor | None = None,
    *,
    keep_variance: bool = False,
) -> Filtered:
    """Filter: the mean of s_t given y_1 … y_t; see the equations of the module.

    Args:
        A: [B, T, D] diagonals, one filter per channel, or [B, T, D, D] matrices. float32 or float64.
        b: [B, T, D].
        observed: y, [B, T, D].
        variance: σ², positive and finite: a number, or one per sequence, [B]. The smaller it is, the closer the mean
            stays to y; as it grows the mean becomes that of `linear_scan`.
        initial: s_0, [B, D], known exactly. None: A_1 is not used, and s_1 is b_1 with variance 1.
        keep_variance: return the variances too; without them less memory is written.

    Raises:
        UsageError: if shapes, dtypes or devices disagree, or `variance` is not a positive finite number.

    Example:
        >>> y = torch.tensor([4.0, 0.0]).view(1, 2, 1)
        >>> kalman_scan(torch.ones_like(y), torch.zeros_like(y), y, variance=1.0).mean.flatten()
        tensor([2.0000, 0.8000])
    """
    operator = _check(A, b, observed, variance, initial)
    precision = 1 / torch.as_tensor(variance, dtype=b.dtype, device=b.device).expand(b.shape[0])
    mean = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    spread = torch.empty(A.shape, dtype=b.dtype, device=b.device) if keep_variance else None
    if not mean.numel():
        return Filtered(mean, spread)
    rest = slice(0, None)
    if initial is None:
        initial, now = _first(operator, b[:, 0], observed[:, 0], precision)
        mean[:, 0] = initial
        if spread is not None:
            spread[:, 0] = now
        rest = slice(1, None)
    else:
        now = torch.zeros_like(A[:, 0])
    if rest.start < mean.shape[1]:
        out = mean[:, rest], None if spread is None else spread[:, rest]
        inputs = A[:, rest], b[:, rest], observed[:, rest]
        _implementation(operator, b)(operator, inputs, precision, (initial, now), out)
    return Filtered(mean, spread)


@torch.no_grad()
def kalman_smooth(A: Tensor, b: Tensor, filtered: Filtered) -> Tensor:
    """Smooth: the mean of s_t given all of y, from the result of `kalman_scan(…, keep_variance=True)`.

    It is the least-squares trajectory: the minimum of Σ_t |s_t − A_t s_{t−1} − b_t|² + |s_t − y_t|²/σ². One scan
    backwards: s_t = E_t s_{t+1} + m_t − E_t (A_{t+1} m_t + b_{t+1}), E_t = P_t A_{t+1}ᵀ (A_{t+1} P_t A_{t+1}ᵀ + I)⁻¹.

    Args:
        A, b: the arguments of `kalman_scan`.
        filtered: its result.

    Returns:
        The smoothed means, [B, T, D].

    Raises:
        UsageError: if the result has no variances.

    Example:
        >>> y = torch.tensor([4.0, 0.0]).view(1, 2, 1)
        >>> A, b = torch.ones_like(y), torch.zeros_like(y)
        >>> kalman_smooth(A, b, kalman_scan(A, b, y, variance=1.0, keep_variance=True)).flatten()
        tensor([1.6000, 0.8000])
    """
    if filtered.variance is None:
        raise UsageError("kalman_smooth needs the variances; call kalman_scan with keep_variance=True.")
    if not b.shape[1]:
        return filtered.mean
    m, P, next_A = filtered.mean[:, :-1], filtered.variance[:, :-1], A[:, 1:]
    operator = DIAGONAL if A.dim() == b.dim() else DENSE
    AP = operator.product(next_A, P)
    if operator is DIAGONAL:
        E = AP / (AP * next_A + 1)
    else:
        E = torch.linalg.solve_ex(AP @ next_A.mT + identity(b, b.shape[-1]), AP)[0].mT
    shift = m - operator.times(E, operator.times(next_A, m) + b[:, 1:])
    last = filtered.mean[:, -1]
    return torch.cat([linear_scan(E, shift, last, reverse=True), last.unsqueeze(1)], 1)


def elements(operator: Operator, A: Tensor, b: Tensor, observed: Tensor, precision: Tensor) -> Element:
    """Return one element per step: the update by y_t of a filter, as a function of the state before it.

    With the gain K = 1/(1 + σ²): a = (1−K) A, b + K (y − b), C = (1−K) I, η = K Aᵀ (y − b), J = K AᵀA.
    """
    scalar = operator is SCALAR_KALMAN
    gain = (precision / (1 + precision)).view(-1, 1, 1)
    gap = observed - b
    updated = torch.addcmul(b, gain, gap)
    if scalar:
        return (1 - gain) * A, updated, (1 - gain).expand_as(b), gain * A * gap, gain * A * A
    gains = gain.unsqueeze(-1)
    variance = ((1 - gains) * identity(b, b.shape[-1])).expand_as(A)
    return (1 - gains) * A, updated, variance, times(A.mT, gain * gap), gains * (A.mT @ A)


def _first(operator: Operator, b: Tensor, observed: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance after the first step, where the predicted variance is 1."""
    gain = (precision / (1 + precision)).view(-1, 1)
    variance = 1 / (1 + precision).view(-1, 1)
    mean = torch.addcmul(b, gain, observed - b)
    if operator is SCALAR_KALMAN:
        return mean, variance.expand_as(b)
    return mean, variance.unsqueeze(-1) * identity(b, b.shape[-1])


def _implementation(operator: Operator, b: Tensor) -> Callable[..., None]:
    fits = operator is SCALAR_KALMAN or b.shape[-1] <= 32  # `triton.dense_kalman.SIZE`
    limits = "for scalar filters and states up to 32"
    return implementation("kalman_scan", f"{operator.name} filter", fits, limits, b.device.type, b.dtype).kalman


def _check(A: Tensor, b: Tensor, observed: Tensor, variance: float | Tensor, initial: Tensor | None) -> Operator:
    if b.dim() != 3 or not b.is_floating_point():
        raise UsageError(
            f"kalman_scan: b is {b.dtype} {tuple(b.shape)}; expected floating point, [batch, time, state]."
        )
    batch, _, size = b.shape
    expected = {
        "A": (A, [tuple(b.shape), (*b.shape, size)]),
        "observed": (observed, [tuple(b.shape)]),
        "initial": (initial, [(batch, size)]),
        "variance": (variance, [(), (batch,)]),
    }
    for name, (tensor, allowed) in expected.items():
        if isinstance(tensor, Tensor) and tuple(tensor.shape) not in allowed:
            options = " or ".join(map(str, allowed))
            raise UsageError(f"kalman_scan: {name} has shape {tuple(tensor.shape)}; expected {options}.")
        if isinstance(tensor, Tensor) and (tensor.dtype, tensor.device) != (b.dtype, b.device):
            raise UsageError(
                f"kalman_scan: {name} is {tensor.dtype} on {tensor.device}; expected {b.dtype} on {b.device}, as b."
            )
    if not isinstance(variance, Tensor | Real):
        raise UsageError(f"kalman_scan: variance={variance!r} must be a number, or a tensor of one per sequence.")
    values = torch.as_tensor(variance).flatten()
    if len(wrong := values[~((values > 0) & values.isfinite())]):
        raise UsageError(
            f"kalman_scan: variance={float(wrong[0])} must be positive and finite; linear_scan is the limit."
        )
    return SCALAR_KALMAN if A.dim() == 3 else DENSE_KALMAN
