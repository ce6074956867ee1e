"""A state is a tree of tensors: a tensor, or (named) tuples, lists and dicts of states, with None for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def combine_states(states: list[Any], combine: Callable[[list[Tensor]], Tensor]) -> Any:
    """Combine states of one structure tensor by tensor, with `torch.stack` or `torch.cat` say.

    Example:
        >>> import torch
        >>> combine_states([(torch.ones(1), None), (torch.zeros(1), None)], torch.cat)
        (tensor([1., 0.]), None)
    """
    columns: list[list[Tensor]] = []
    for state in states:
        leaves: list[Tensor] = []
        map_state(state, lambda tensor, leaves=leaves: leaves.append(tensor) or tensor)
        columns.append(leaves)
    combined = iter([combine(list(tensors)) for tensors in zip(*columns)])
    return map_state(states[0], lambda tensor: next(combined))


def map_state(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to every tensor of a state: a tensor, or (named) tuples, lists and dicts of states; None stays.

    Example:
        >>> import torch
        >>> map_state((torch.ones(2), None), lambda t: t + 1)
        (tensor([2., 2.]), None)
    """
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, dict):
        return {name: map_state(value, change) for name, value in state.items()}
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        return type(state)(*(map_state(value, change) for value in state))
    if isinstance(state, list | tuple):
        return type(state)(map_state(value, change) for value in state)
    return state
