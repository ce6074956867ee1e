"""Take a step with a gradient, in one of three ways that give the same weights.

    write     fill every `.grad`, optimizer.step()                  any optimizer       memory: the weights once more
    stream    fill one `.grad`, optimizer.step(), forget it, next   per parameter       memory: the largest tensor
    fused     θ ← (1 − η λ) θ − η ĝ, added as it is generated       SGD, no momentum    memory: none

`stream` needs no special optimizer: torch's skip parameters whose `.grad` is None, and count steps per parameter.

A parameter group with `reroll_weight_decay` λ has its weights multiplied by 1 − η λ before the step, whatever the
optimizer does with its own `weight_decay`: SGD's is coupled to the momentum, this one is not.
"""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError, nearest
from reroll.grad.base import Dense, Gradient, Seeded

WAYS = ("write", "stream", "fused")


@torch.no_grad()
def apply(gradient: Gradient, optimizer: Any, how: str = "write") -> None:
    """Take one step, with this gradient alone: other tensors' `.grad` is dropped. Every `.grad` is None afterwards.

    Args:
        gradient: `Dense` or `Seeded`, as an estimator returns it.
        optimizer: a `torch.optim.Optimizer`, with every tensor of the gradient among its parameters.
        how: "write", "stream" or "fused".

    Raises:
        UsageError: if the way is unknown or cannot be used with this gradient and optimizer, or the optimizer lacks a
            tensor of the gradient.

    Example:
        >>> from reroll import CentralDifference, Key
        >>> model = torch.nn.Linear(3, 1)
        >>> estimate = CentralDifference(8, 0.01)(model, lambda m, x: m(x).square().mean(), torch.ones(5, 3), Key(0))
        >>> apply(estimate.gradient, torch.optim.SGD(model.parameters(), lr=0.1), how="fused")
    """
    if not isinstance(gradient, Dense | Seeded):
        remedy = "pass estimate.gradient" if hasattr(gradient, "gradient") else "pass what an estimator returned"
        raise UsageError(f"gradient is a {type(gradient).__name__}; {remedy}.")
    if how not in WAYS:
        raise UsageError(f'how="{how}" is no way to apply a gradient.{nearest(how, WAYS)}')
    groups = _groups_of(gradient, optimizer)
    rates = {id(group): _fused_rate(group, optimizer) for group in groups.values()} if how == "fused" else {}
    if how != "write" and isinstance(gradient, Dense):
        raise UsageError(f'how="{how}" is for gradients from probes; a dense one is in .grad already. Use how="write".')
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError(
            "LBFGS evaluates the loss itself, several times a step, and takes no gradient from outside. "
            "Use SGD or AdamW here, or call LBFGS.step with a closure."
        )
    # What an earlier backward() left would be stepped on too: once with "write", once per tensor with "stream".
    filled = {id(p) for p in gradient.parameters.values()} if isinstance(gradient, Dense) else set()
    drop_grads(optimizer, filled)
    for group in optimizer.param_groups:
        _decay(group)
    if isinstance(gradient, Dense):
        optimizer.step()
    elif how == "write":
        for name, p in gradient.parameters.items():
            p.grad = gradient.tensor(name).to(p.dtype)
        optimizer.step()
    elif how == "stream":
        for name, p in gradient.parameters.items():
            p.grad = gradient.tensor(name).to(p.dtype)
            optimizer.step()
            p.grad = None
    else:
        for name, p in gradient.parameters.items():
            lr, decay = rates[id(groups[name])]
            _fused_step(gradient, name, p, lr, decay)
    drop_grads(optimizer)


def drop_grads(optimizer: Any, but: Container[int] = ()) -> None:
    """Set every `.grad` to None, except of tensors with these `id`s."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in but:
                p.grad = None


def _groups_of(gradient: Gradient, optimizer: Any) -> dict[str, dict[str, Any]]:
    """The parameter group of every tensor of the gradient."""
    owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in gradient.parameters.items() if id(p) not in owner]
    if missing:
        raise UsageError(
            f"{len(missing)} tensors of the gradient are not in the optimizer, {missing[0]} first. "
            "Give it model.parameters(), or set requires_grad=False on what is not to be trained."
        )
    return {name: owner[id(p)] for name, p in gradient.parameters.items()}


def _fused_rate(group: dict[str, Any], optimizer: Any) -> tuple[float, float]:
    """(η, λ) of a group; raises unless the rule is θ ← θ − η (g + λ θ)."""
    plain = isinstance(optimizer, torch.optim.SGD) and not group["momentum"] and not group["maximize"]
    if not plain:
        what = f"{type(optimizer).__name__} keeps state per weight or is another rule"
        if isinstance(optimizer, torch.optim.SGD):
            what = f"SGD with momentum={group['momentum']}, maximize={group['maximize']} is another rule"
        raise UsageError(f'how="fused" adds −lr · g and nothing else; {what}. Use how="stream".')
    return float(group["lr"]), float(group["weight_decay"])


def _fused_step(gradient: Seeded, name: str, p: Tensor, lr: float, decay: float) -> None:
    if decay:
        p.detach().mul_(1 - lr * decay)
    gradient.add_to(p.detach(), name, -lr)


def _decay(group: dict[str, Any]) -> None:
    decay = group.get("reroll_weight_decay", 0.0)
    if decay:
        for p in group["params"]:
            if p.requires_grad:
                p.detach().mul_(1 - float(group["lr"]) * decay)


def clip_norm(gradient: Gradient, most: float, norm: float | None = None) -> tuple[Gradient, float]:
    """Scale a gradient so that its norm over all tensors is at most `most`; return it and the norm it had.

    One whose norm is not finite is returned as it is: there is no number to scale it by.

    Args:
        gradient: `Dense` (scaled in place) or `Seeded` (its coefficients are scaled; one pass to find the norm).
        most: the largest norm allowed.
        norm: the norm, where it is known already.
    """
    norm = gradient.norm() if norm is None else norm
    return (gradient.scaled(most / norm) if most < norm < math.inf else gradient), norm
