"""What is reached on series without training: the period of a series, and the losses of constant predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def period_of(rows: npt.NDArray[np.float64]) -> int | None:
    """Return the lag of the best seasonal rule, x_t ≈ x_{t−p}; None if no lag is better than noise would make it.

    Args:
        rows: [n, F], standardised; lags up to a third of n are tried.

    Example:
        >>> period_of(np.sin(2 * np.pi * np.arange(200) / 12)[:, None])
        12
    """
    count, lags = len(rows), np.arange(1, len(rows) // 3 + 1)
    if len(lags) < 2:
        return None
    # Σ (x_t − x_{t−p})² for all lags p: two sums of squares, less twice the correlation.
    spectrum = np.fft.rfft(rows, 2 * count, axis=0)
    correlation = np.fft.irfft(np.abs(spectrum) ** 2, axis=0)[lags].sum(1)
    squares = np.concatenate([[0.0], np.square(rows).sum(1).cumsum()])
    errors = (squares[count - lags] + squares[count] - squares[lags] - 2 * correlation) / (count - lags)
    unlike = np.flatnonzero(errors > errors.mean())
    if not len(unlike):
        return None
    # The first minimum about as deep as the deepest: multiples of a period predict as well as the period.
    # Noise has a correlation of about 1/√n at every lag; a period must be well beyond that.
    low = min(errors[unlike[0] :].min() + 0.02 * errors.mean(), (1 - max(5 / count**0.5, 0.2)) * errors.mean())
    walled = np.pad(errors, 1, constant_values=np.inf)
    valleys = np.flatnonzero((errors <= low) & (errors <= walled[:-2]) & (errors <= walled[2:]))
    return next((int(lags[valley]) for valley in valleys if valley > unlike[0]), None)


def constant_losses(trained: npt.NDArray[Any], scored: npt.NDArray[Any], classes: int | None) -> dict[str, float]:
    """Return the loss of one prediction for all, by a name that says which.

    Args:
        trained, scored: targets, [n, O], or classes [n].
        classes: how many there are; None: the targets are numbers.

    Example:
        >>> constant_losses(np.array([[0.0], [2.0]]), np.array([[1.0], [3.0]]), None)
        {'mean of the targets': 2.0}
    """
    if classes is None:
        return {"mean of the targets": float(np.square(scored.astype(np.float64) - trained.mean(0)).mean())}
    counts = np.bincount(trained, minlength=classes) + 1.0  # one more of each: none is impossible
    accuracy = float((scored == counts.argmax()).mean())
    losses = -np.log(counts / counts.sum())[scored]
    return {f"class frequencies (accuracy {accuracy:.3g})": float(losses.mean())}
