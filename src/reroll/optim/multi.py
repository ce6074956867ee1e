"""Several optimizers that step as one, each over its own parameters: Muon beside AdamW, say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError


class MultiOptimizer(torch.optim.Optimizer):
    """Optimizers by name, as one.

    Args:
        optimizers: by name; no tensor is in two of them.

    `param_groups` are theirs, one after the other, so that learning-rate schedulers work; `state_dict` holds theirs by
    name. Groups are added to the optimizer that is meant, not here.

    Example:
        >>> p, q = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        >>> both = MultiOptimizer({"sgd": torch.optim.SGD([p], lr=0.1), "adamw": torch.optim.AdamW([q], lr=0.01)})
        >>> [group["lr"] for group in both.param_groups], list(both.state_dict())
        ([0.1, 0.01], ['sgd', 'adamw'])
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]):
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        super().__init__([group for optimizer in optimizers.values() for group in optimizer.param_groups], {})
        self.optimizers = dict(optimizers)

    @property
    def state(self) -> dict[Tensor, Any]:
        """The states of all, by tensor; read it only."""
        return {p: state for optimizer in self.optimizers.values() for p, state in optimizer.state.items()}

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]: torch's is an attribute
        # torch's constructor begins an empty one; each optimizer keeps its own.
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: which of the optimizers is meant?"""
        if self.optimizers:
            raise UsageError(f"add the group to one of .optimizers: {', '.join(self.optimizers)}.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with each; return what the closure returned, which is called once."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all, by name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        if state_dict.keys() != self.optimizers.keys():
            raise UsageError(
                f"the state is of {', '.join(state_dict)}; the optimizers are {', '.join(self.optimizers)}."
            )
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])
        self._adopt()

    def _adopt(self) -> None:
        """Have the groups of the optimizers as they are now: loading makes new ones."""
        self.param_groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": {}, "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt()
