"""From losses of probes to coefficients of a gradient, and what the losses say about the probes.

    d_k = (L⁺_k − L⁻_k) / 2ε            central         d_k = (L⁺_k − L_0) / ε            one-sided
    c_k = shaped(d)_k / N               over the N probes with finite losses; 0 for the others

Shaping trades the size of a difference for robustness: "raw" keeps it, "zscore" normalises it over the probes,
"rank" keeps its rank only, "sign" its sign only. All is computed in fp64 and rounded to fp32 once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.kernels.noise_axpy import noise_of

SHAPINGS = ("raw", "zscore", "rank", "sign")


class Coefficients(NamedTuple):
    """What the losses of a step gave.

    Args:
        values: c_k in fp32, zero for lost probes.
        loss: mean of (L⁺ + L⁻)/2 over finite probes, or L_0; NaN without any.
        lost: probes with a non-finite loss.
        spread: standard deviation of L⁺ − L⁻ (of L⁺ − L_0) over finite probes.
        rms: their root mean square.
        snr: root mean square of the differences over the rounding error of one.
    """

    values: Tensor
    loss: Tensor
    lost: int
    spread: float
    rms: float
    snr: float


def coefficients(losses: Tensor, epsilon: float, shaping: str = "raw", clean: Tensor | None = None) -> Coefficients:
    """Turn losses into coefficients.

    Args:
        losses: [2, N], L⁺ and L⁻; or [1, N], L⁺ alone, with `clean`.
        epsilon: ε.
        shaping: "raw", "zscore", "rank" or "sign".
        clean: L_0, for one-sided differences.

    Raises:
        UsageError: for an unknown shaping.

    Example:
        >>> c = coefficients(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 0.5)
        >>> c.values, c.loss
        (tensor([ 1.0000, -0.5000]), tensor(1.7500, dtype=torch.float64))
    """
    if shaping not in SHAPINGS:
        raise UsageError(f'shaping="{shaping}" must be {", ".join(SHAPINGS)}.')
    # One unit in the last place of the loss is what a difference cannot see.
    precision = torch.finfo(losses.dtype).eps
    losses = losses.double()
    if clean is None:
        differences, mean = losses[0] - losses[1], losses.mean(0)
        slopes = differences / (2 * epsilon)
    else:
        differences = losses[0] - clean.double()
        mean, slopes = clean.double().expand(len(differences)), differences / epsilon
    finite = torch.isfinite(differences)
    count = int(finite.sum())
    values = torch.zeros_like(slopes)
    if not count:
        return Coefficients(
            values.float(), torch.tensor(math.nan, dtype=torch.float64), len(values), math.nan, math.nan, math.nan
        )
    values[finite] = _shape(slopes[finite], shaping) / count
    found, loss = differences[finite], mean[finite].mean()
    rms = found.square().mean().sqrt().item()
    rounding = math.sqrt(2) * precision * abs(loss.item()) / 2
    return Coefficients(
        values=values.float(),
        loss=loss,
        lost=len(values) - count,
        spread=found.std(correction=0).item(),
        rms=rms,
        snr=rms / rounding if rounding > 0 else math.inf,
    )


def _shape(slopes: Tensor, shaping: str) -> Tensor:
    if shaping == "zscore":
        deviation = slopes.std(correction=0)
        return (slopes - slopes.mean()) / deviation if deviation > 0 else torch.zeros_like(slopes)
    if shaping == "rank":
        # Ranks 0 … n − 1 brought to [−½, ½]; ties share the mean of their ranks.
        ordered = slopes.sort().values
        below, up_to = (torch.searchsorted(ordered, slopes, right=right) for right in (False, True))
        return (below.to(slopes) + (up_to - below - 1) / 2) / max(len(slopes) - 1, 1) - 0.5
    return slopes.sign() if shaping == "sign" else slopes


def expected_relative_error(weights: int, probes: int, noise: str = "rademacher") -> float:
    """Return the relative mean squared error of ĝ that theory predicts, E‖ĝ − g‖² / ‖g‖², on a locally linear loss.

    (P − 1)/N for ±1 noise, (P + 1)/N for normal noise, (P + 1/d − 2)/N for sparse noise of density d.

    Args:
        weights: P, perturbed numbers.
        probes: N.
        noise: the kind.

    Example:
        >>> expected_relative_error(1001, 10)
        100.0
    """
    # Var over coordinates is Σ_{i≠j} g_j² + g_i² (E z⁴ − 1): the fourth moment is 1, 3, and 1/d.
    return (weights - 2 + noise_of(noise).fourth_moment) / probes
