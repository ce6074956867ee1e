"""One step of training, the same for runs, searches, the drop-in optimizer and benchmarks.

    settings → estimate at ε → clip → is it finite? → record → update

A gradient that is not finite, or whose sum of squares is not (in fp16: in bf16's range), never reaches the weights; the
result says so by its outcome.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from reroll.errors import EpsilonTooSmall, warn
from reroll.grad.base import Dense, Estimator, Gradient, LossFn
from reroll.grad.checks import RAISED
from reroll.keys import Key
from reroll.optim.apply import apply, clip_norm, drop_grads
from reroll.outcome import Outcome


@dataclass(frozen=True)
class StepSettings:
    """What may differ from step to step; with the gradient it determines the update.

    Args:
        lr: η, of groups whose `lr_scale` is 1.
        momentum: μ, of every group that has one; None leaves it as it is.
        epsilon: ε of the probes; None leaves it to the estimator.
    """

    lr: float
    momentum: float | None = None
    epsilon: float | None = None


def configure(optimizer: Any, settings: StepSettings) -> None:
    """Set the numbers of a step in every parameter group: η · `lr_scale`, and μ where the rule has a momentum.

    Example:
        >>> import torch
        >>> groups = [{"params": [torch.ones(1)]}, {"params": [torch.ones(1)], "lr_scale": 0.5}]
        >>> optimizer = torch.optim.SGD(groups, lr=1.0)
        >>> configure(optimizer, StepSettings(0.2))
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.2, 0.1]
    """
    for group in optimizer.param_groups:
        group["lr"] = settings.lr * group.get("lr_scale", 1.0)
        if settings.momentum is not None and "momentum" in group:
            group["momentum"] = settings.momentum


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Args:
        loss, state, stats: of the `Estimate`.
        outcome: how it ended; `bool(outcome)` is False where the weights are as before.
        gradient: as applied, so clipped.
        norm: ‖g‖ before clipping; None if it was not computed.
        settings: the settings of the step, with ε raised if it had to be.
        where: the first tensor, in the model's order, whose gradient is not finite, if that is how it ended.
    """

    loss: Tensor
    outcome: Outcome
    gradient: Gradient
    norm: float | None
    state: Any
    stats: dict[str, Any]
    settings: StepSettings | None = None
    where: str = ""


def step(
    model: Any,
    loss_fn: LossFn,
    estimator: Estimator,
    optimizer: Any,
    batch: Any,
    settings: StepSettings | None,
    key: Key,
    *,
    clip: float | None = None,
    update: str = "write",
    norm: bool = False,
    tied: bool = False,
    record: Callable[[StepResult], None] | None = None,
) -> StepResult:
    """Take one step.

    Args:
        model, loss_fn, batch, key: for the estimator of the gradient.
        optimizer, update: what applies it, and how ("write", "stream" or "fused"); see `reroll.optim.apply`.
        settings: of this step, set in the optimizer and (ε) in the estimator; None leaves both as they are.
        clip, norm: largest norm of the gradient; whether to return its norm though nothing is clipped.
        tied: ε follows the learning rate; if the weights cannot resolve it, the smallest that they can is used.
        record: called with the result before the weights move.

    Example:
        >>> import torch; from reroll import CentralDifference
        >>> model = torch.nn.Linear(3, 1)
        >>> sgd, loss_fn = torch.optim.SGD(model.parameters(), lr=1.0), lambda model, x: model(x).square().mean()
        >>> probes, settings = CentralDifference(8, 1.0), StepSettings(lr=0.1, epsilon=0.01)
        >>> result = step(model, loss_fn, probes, sgd, torch.ones(5, 3), settings, Key(0).at(0), update="fused")
        >>> result.outcome.name, result.stats["epsilon"]
        ('ok', 0.01)
    """
    if settings is not None:
        configure(optimizer, settings)

    epsilon = settings and settings.epsilon
    try:
        estimate = at_epsilon(estimator, epsilon)(model, loss_fn, batch, key)
    except EpsilonTooSmall as error:
        if settings is None or not tied or epsilon is None or error.least <= epsilon:
            raise
        warn(RAISED)
        settings = replace(settings, epsilon=error.least)
        estimate = at_epsilon(estimator, error.least)(model, loss_fn, batch, key)
    gradient, outcome = estimate.gradient, estimate.outcome
    size = left = gradient.norm() if outcome and (clip is not None or norm) else None
    if size is not None and size < math.inf and clip is not None:
        (gradient, _), left = clip_norm(gradient, clip, size), min(size, clip)
    if outcome and not gradient.is_finite(left):
        outcome = Outcome.gradient_not_finite
    result = StepResult(estimate.loss, outcome, gradient, size, estimate.state, estimate.stats, settings)
    if not outcome:
        return _refused(result, optimizer)
    if record is not None:
        record(result)
    apply(gradient, optimizer, update)
    return result


def _refused(result: StepResult, optimizer: Any) -> StepResult:
    """Drop a gradient that must not be applied, after a look at where it is not finite."""
    if result.outcome is Outcome.gradient_not_finite and isinstance(result.gradient, Dense):
        stored = result.gradient.parameters.items()
        bad = (name for name, p in stored if p.grad is not None and not p.grad.isfinite().all())
        result = replace(result, where=next(bad, ""))
    drop_grads(optimizer)
    return result


def at_epsilon(estimator: Any, epsilon: float | None) -> Any:
    """Return the estimator with another ε, if it has one."""
    return estimator if epsilon is None or not hasattr(estimator, "epsilon") else replace(estimator, epsilon=epsilon)
