"""One step of training, the same for runs, searches, the drop-in optimizer and benchmarks.

    estimate at ε → is it finite? → clip → record → update

A gradient that is not finite never reaches the weights; the result says so by its outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from reroll.grad.base import Estimate, Estimator, Gradient, LossFn
from reroll.grad.checks import visibly
from reroll.keys import Key
from reroll.optim.apply import apply, clip_norm, drop_grads
from reroll.optim.settings import StepSettings, configure
from reroll.outcome import Outcome


@dataclass(frozen=True)
class StepResult:
    """What a step did.

    Args:
        loss: the loss it saw, a 0-dimensional tensor.
        outcome: how it ended; `bool(outcome)` is False where the weights are as before.
        gradient: as applied, so clipped.
        norm: ‖g‖ before clipping; None where nobody asked for it.
        state: the state after the batch's last step, when the batch carried one.
        stats: numbers from the estimator; always `forward_passes`.
        settings: what it was taken with: as given, ε raised where it had to be.
    """

    loss: Tensor
    outcome: Outcome
    gradient: Gradient
    norm: float | None
    state: Any
    stats: dict[str, Any]
    settings: StepSettings | None = None


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
        model, loss_fn, batch, key: for the estimator, which gives the gradient.
        optimizer, update: what takes it, and how ("write", "stream" or "fused"); see `reroll.optim.apply`.
        settings: of this step, set in the optimizer and (ε) in the estimator; None leaves both as they are.
        clip, norm: largest norm of the gradient; whether to return its norm though nothing is clipped.
        tied: ε follows the learning rate; where the weights cannot show it, the least that they can is taken.
        record: called with the result before the weights move, so that a record of the step precedes its effect.

    Example:
        >>> import torch; from reroll import CentralDifference
        >>> model = torch.nn.Linear(3, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> loss_fn = lambda model, x: model(x).square().mean()
        >>> probes, settings = CentralDifference(8, 1.0), StepSettings(lr=0.1, epsilon=0.01)
        >>> result = step(model, loss_fn, probes, sgd, torch.ones(5, 3), settings, Key(0).at(0), update="fused")
        >>> result.outcome.name, result.stats["epsilon"]
        ('ok', 0.01)
    """
    if settings is not None:
        configure(optimizer, settings)

    def at(epsilon: float | None) -> Estimate:
        nonlocal settings
        settings = settings and replace(settings, epsilon=epsilon)
        return at_epsilon(estimator, epsilon)(model, loss_fn, batch, key)

    asked = settings and settings.epsilon
    estimate = at(asked) if asked is None or not tied else visibly(at, asked)
    gradient, outcome, size = estimate.gradient, estimate.outcome, None
    if outcome and (clip is not None or norm):
        size = gradient.norm()
    if outcome and not gradient.is_finite(size):
        outcome = Outcome.gradient_not_finite
    if outcome and clip is not None:
        gradient, size = clip_norm(gradient, clip, size)
    result = StepResult(estimate.loss, outcome, gradient, size, estimate.state, estimate.stats, settings)
    if not outcome:
        drop_grads(optimizer)
        return result
    if record is not None:
        record(result)
    apply(gradient, optimizer, update)
    return result


def at_epsilon(estimator: Any, epsilon: float | None) -> Any:
    """Return the estimator with another ε, if it has one."""
    return estimator if epsilon is None or not hasattr(estimator, "epsilon") else replace(estimator, epsilon=epsilon)
