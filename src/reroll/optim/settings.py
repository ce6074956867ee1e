"""What may differ from step to step: learning rate, momentum and ε, as one value, and how an optimizer takes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepSettings:
    """The numbers of one step; with the gradient they say what the optimizer does.

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
