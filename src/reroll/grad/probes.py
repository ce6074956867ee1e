"""From the losses of probes to the coefficients of a gradient, with statistics of the probes.

    d_k = (L⁺_k − L⁻_k) / 2ε            central         d_k = (L⁺_k − L_0) / ε            one-sided
    c_k = shaped(d)_k / N               over the N probes with finite losses; 0 for the others

Shaping trades the size of a difference for robustness: "raw" keeps it, "zscore" normalises it over the probes,
"rank" keeps only its rank, "sign" only its sign. Everything is computed in fp64 and rounded to fp32 once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from reroll.kernels.noise_axpy import noise_of


class Slopes(NamedTuple):
    """What a rule computes from losses, one number per probe in fp64; `slopes` are directional derivatives."""

    differences: Tensor
    losses: Tensor
    slopes: Tensor


def central(losses: Tensor, clean: Tensor | None, epsilon: float) -> Slopes:
    """(L⁺ − L⁻) / 2ε."""
    differences = losses[0] - losses[1]
    return Slopes(differences, losses.mean(0), differences / (2 * epsilon))


def one_sided(losses: Tensor, clean: Tensor | None, epsilon: float) -> Slopes:
    """(L⁺ − L_0) / ε."""
    assert clean is not None
    differences = losses[0] - clean
    return Slopes(differences, clean.expand(len(differences)), differences / epsilon)


class Rule(NamedTuple):
    """Turns losses into slopes."""

    slopes: Callable[[Tensor, Tensor | None, float], Slopes]
    """(losses [sides, N], L_0, ε) → `Slopes`."""
    sides: tuple[int, ...]
    """The branches of a probe, as factors of ε."""
    clean: bool
    """Whether it needs L_0, the loss of the unperturbed weights."""


RULES = {"central": Rule(central, (1, -1), clean=False), "one_sided": Rule(one_sided, (1,), clean=True)}
"""Every rule by its name, a value of `difference`."""


class Coefficients(NamedTuple):
    """The coefficients of a step, and statistics of its losses."""

    values: Tensor
    """c_k in fp32, zero for lost probes."""
    loss: Tensor
    """Mean of (L⁺ + L⁻)/2 over finite probes, or L_0; NaN without any."""
    lost: int
    """Probes with a non-finite loss."""
    spread: float
    """Standard deviation of L⁺ − L⁻ (of L⁺ − L_0) over finite probes."""
    rms: float
    """Their root mean square."""
    snr: float
    """The root mean square over the rounding error of one difference."""


def coefficients(
    losses: Tensor, epsilon: float, shaping: str = "raw", rule: str = "central", clean: Tensor | None = None
) -> Coefficients:
    """Turn losses [sides, N] (L⁺ and L⁻, or L⁺ alone, as the rule has it) into coefficients.

    `shaping` is a name in `SHAPINGS`, `rule` one in `RULES`, and `clean` is L_0, for rules that need it.

    Example:
        >>> c = coefficients(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 0.5)
        >>> c.values, c.loss
        (tensor([ 1.0000, -0.5000]), tensor(1.7500, dtype=torch.float64))
    """
    # A difference cannot resolve one unit in the last place of the loss.
    precision = torch.finfo(losses.dtype).eps
    clean = None if clean is None else clean.double()
    differences, mean, slopes = RULES[rule].slopes(losses.double(), clean, epsilon)
    finite = torch.isfinite(differences)
    count = int(finite.sum())
    values = torch.zeros_like(slopes)
    differences, loss = differences[finite], mean[finite].mean()
    if not count:
        return Coefficients(values.float(), loss, len(values), math.nan, math.nan, math.nan)
    values[finite] = SHAPINGS[shaping](slopes[finite]) / count
    rms = differences.square().mean().sqrt().item()
    rounding = math.sqrt(2) * precision * abs(loss.item()) / 2
    return Coefficients(
        values.float(), loss, lost=len(values) - count, spread=differences.std(correction=0).item(), rms=rms,
        snr=rms / rounding if rounding > 0 else math.inf,
    )  # fmt: skip


def _zscore(slopes: Tensor) -> Tensor:
    deviation = slopes.std(correction=0)
    return (slopes - slopes.mean()) / deviation if deviation > 0 else torch.zeros_like(slopes)


def _rank(slopes: Tensor) -> Tensor:
    """Ranks 0 … n − 1 brought to [−½, ½]; ties share the mean of their ranks."""
    ordered = slopes.sort().values
    below, up_to = (torch.searchsorted(ordered, slopes, right=right) for right in (False, True))
    return (below.to(slopes) + (up_to - below - 1) / 2) / max(len(slopes) - 1, 1) - 0.5


SHAPINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "raw": lambda slopes: slopes, "zscore": _zscore, "rank": _rank, "sign": torch.sign,
}  # fmt: skip
"""Every shaping by its name: a function of the finite slopes."""


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
