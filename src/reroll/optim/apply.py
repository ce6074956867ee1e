"""Take a step with a gradient, in one of three ways that give the same weights.

    write     fill every `.grad`, optimizer.step()                  any optimizer       memory: the weights once more
    stream    fill some, optimizer.step(), drop them, next          per parameter       memory: the largest tensor
    fused     θ ← (1 − η λ) θ − η ĝ, added as it is generated       `SGD`               memory: none (v with momentum)

`stream` needs no special optimizer: torch's skip parameters whose `.grad` is None, and count steps per parameter. It
passes the optimizer tensors of one shape together, as many as the budget allows.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError, did_you_mean
from reroll.grad.base import Gradient
from reroll.optim.sgd import SGD, descend

WAYS = ("write", "stream", "fused")


@torch.no_grad()
def apply(gradient: Gradient, optimizer: Any, how: str = "write", budget: int | None = None) -> None:
    """Take one step, with this gradient alone: other tensors' `.grad` is dropped. Every `.grad` is None afterwards.

    Args:
        gradient: `Dense` or `Seeded`, as an estimator returns it.
        optimizer: a `torch.optim.Optimizer`, with every tensor of the gradient among its parameters.
        how: "write", "stream" or "fused".
        budget: the most bytes of gradients that exist at once for "stream"; None: the largest tensor.

    Raises:
        UsageError: if the way is unknown or cannot be used with this gradient and optimizer, or the optimizer lacks a
            tensor of the gradient.

    Example:
        >>> from reroll import CentralDifference, Key
        >>> model = torch.nn.Linear(3, 1)
        >>> estimate = CentralDifference(8, 0.01)(model, lambda m, x: m(x).square().mean(), torch.ones(5, 3), Key(0))
        >>> apply(estimate.gradient, torch.optim.SGD(model.parameters(), lr=0.1), how="fused")
    """
    if not hasattr(gradient, "ways"):
        remedy = "pass estimate.gradient" if hasattr(gradient, "gradient") else "pass what an estimator returned"
        raise UsageError(f"gradient is a {type(gradient).__name__}; {remedy}.")
    if how not in WAYS:
        raise UsageError(f'how="{how}" is no way to apply a gradient.{did_you_mean(how, WAYS)}')
    groups = _groups_of(gradient, optimizer)
    if how == "fused":
        _refuse_unless_fusable(optimizer, groups)
    if how not in gradient.ways:
        raise UsageError(f'how="{how}" is for gradients from probes; a dense one is in .grad already. Use how="write".')
    if isinstance(optimizer, torch.optim.LBFGS):
        raise UsageError(
            "LBFGS evaluates the loss itself, several times a step, and takes no gradient from outside. "
            "Use SGD or AdamW here, or call LBFGS.step with a closure."
        )
    # Gradients of an earlier backward() would be applied too: once with "write", once per group with "stream".
    drop_grads(optimizer, {id(p) for p in gradient.parameters.values()} if how == "write" else ())
    if how == "fused":
        for name, p in gradient.parameters.items():
            add = lambda target, factor, name=name: gradient.add_to(target, name, factor)
            descend(p, groups[name], optimizer.state, add)
    else:
        for names in _by_shape(gradient.parameters, math.inf if how == "write" else budget):
            for p, g in gradient.each(names):
                p.grad = g
            optimizer.step()
            for name in names:
                gradient.parameters[name].grad = None
    drop_grads(optimizer)


def _by_shape(parameters: Mapping[str, Tensor], budget: float | None) -> Iterator[list[str]]:
    """Yield groups of names, by shape, the largest first, of at most `budget` bytes or of one tensor."""
    budget = max((p.nbytes for p in parameters.values()), default=0) if budget is None else budget
    group: list[str] = []
    used = 0
    for name, p in sorted(parameters.items(), key=lambda item: (-item[1].nbytes, tuple(item[1].shape))):
        if group and used + p.nbytes > budget:
            yield group
            group, used = [], 0
        group.append(name)
        used += p.nbytes
    if group:
        yield group


def drop_grads(optimizer: Any, but: Container[int] = ()) -> None:
    """Set every `.grad` to None, except of tensors with these `id`s."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) not in but:
                p.grad = None


def _groups_of(gradient: Gradient, optimizer: Any) -> dict[str, dict[str, Any]]:
    owner = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in gradient.parameters.items() if id(p) not in owner]
    if missing:
        raise UsageError(
            f"{len(missing)} tensors of the gradient are not in the optimizer, {missing[0]} first. "
            "Give it model.parameters(), or set requires_grad=False on what is not to be trained."
        )
    return {name: owner[id(p)] for name, p in gradient.parameters.items()}


def _refuse_unless_fusable(optimizer: Any, groups: Mapping[str, dict[str, Any]]) -> None:
    """Raise unless the rule of these groups is `descend`."""
    # Without momentum, torch's coupled decay is the decoupled one.
    plain = isinstance(optimizer, torch.optim.SGD) and not any(g["momentum"] or g["maximize"] for g in groups.values())
    if not plain and not isinstance(optimizer, SGD):
        raise UsageError(
            'how="fused" is for reroll.optim.SGD, and for torch.optim.SGD with momentum=0; '
            f'this {type(optimizer).__name__} is another rule. Use how="stream".'
        )


def clip_norm(gradient: Gradient, most: float, norm: float | None = None) -> tuple[Gradient, float]:
    """Scale a gradient so that its norm over all tensors is at most `most`; return it and the norm it had.

    One whose norm is not finite is returned as it is: no factor would help.

    Args:
        gradient: `Dense` (scaled in place) or `Seeded` (its coefficients are scaled; one pass to find the norm).
        most: the largest norm allowed.
        norm: the norm, if it is known.
    """
    norm = gradient.norm() if norm is None else norm
    return (gradient.scaled(most / norm) if most < norm < math.inf else gradient), norm
