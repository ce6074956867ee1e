"""Gradient descent with momentum and decoupled weight decay: the one rule for runs and for `CDRGE`.

    v ← μ v + g          θ ← (1 − η λ) θ − η v

It differs from `torch.optim.SGD` in two ways. The decay is decoupled, so it does not pass through the momentum; and v
is at least fp32 whatever the weights are, since a buffer in bf16 loses every gradient below 2⁻⁸ of its value. For
fp32 weights and λ = 0 the two give the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """Return the result of a closure, called with gradients enabled, as torch's optimizers do."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def in_range(group: Mapping[str, Any], **below: float) -> None:
    """Raise `UsageError` for the first of these numbers of a group that does not lie in [0, its bound)."""
    for name, high in below.items():
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, Real | Tensor):
            raise UsageError(f"{name}={value!r} must be a number.")
        if not 0 <= float(value) < high:
            raise UsageError(f"{name}={value} must lie in [0, {high}).")


def keep_precision(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Restore moments in their saved precision: torch casts a state to the dtype of its weight, such as bf16."""
    indices = [index for group in state_dict["param_groups"] for index in group["params"]]
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in zip(indices, tensors):
        wide = torch.promote_types(p.dtype, torch.float32)
        for name, saved in state_dict["state"].get(index, {}).items():
            optimizer.state[p][name] = saved.to(device=p.device, dtype=wide, copy=True)


class SGD(torch.optim.Optimizer):
    """Gradient descent with momentum.

    Args:
        params: parameters, named parameters or groups, as for every torch optimizer.
        lr, weight_decay: η and λ.
        momentum: μ, in [0, 1); without it there is no state.
        more: further defaults of a group.

    Example:
        >>> p = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = SGD([p], lr=0.5, weight_decay=0.2)
        >>> p.grad = torch.ones(2)
        >>> optimizer.step()
        >>> p
        Parameter containing:
        tensor([0.4000, 0.4000], requires_grad=True)
    """

    def __init__(self, params: Iterable[Any], lr: float, momentum: float = 0.0, weight_decay: float = 0.0, **more: Any):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **more})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see `torch.optim.Optimizer`."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except UsageError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        in_range(group, lr=math.inf, momentum=1.0, weight_decay=math.inf)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with every `.grad` there is; return what the closure returned."""
        loss = evaluated(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    descend(p, group, self.state, lambda target, factor, g=p.grad: target.add_(g, alpha=factor))
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, the momentum in its own precision."""
        super().load_state_dict(state_dict)
        keep_precision(self, state_dict)


def descend(p: Tensor, group: dict[str, Any], state: Any, add: Callable[[Tensor, float], Any]) -> None:
    """Take the step of one tensor; add(target, factor) adds factor · g to the target."""
    p, parameter = p.detach(), p
    lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
    if decay:
        p.mul_(1 - lr * decay)
    if not momentum:
        add(p, -lr)
        return
    if "momentum_buffer" not in state[parameter]:
        wide = torch.promote_types(p.dtype, torch.float32)
        state[parameter]["momentum_buffer"] = torch.zeros_like(p, dtype=wide)
    buffer = state[parameter]["momentum_buffer"].mul_(momentum)
    add(buffer, 1.0)
    p.add_(buffer.to(p.dtype), alpha=-lr)
