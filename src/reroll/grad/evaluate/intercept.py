"""Run an unchanged model with perturbed weights, by intercepting the operations that use them.

Inside `with Intercept(source):` a torch function called in this thread with a perturbed parameter gets what the source
substitutes for it: a perturbed copy, a slice of a stack under vmap, or, for products that the source has rules for,
tile after tile. The module is not changed, so several threads can evaluate it at once.

This is torch's public `TorchFunctionMode`; code that reads weights outside torch functions (an extension that takes a
data pointer) is not intercepted and needs `evaluate="in_place"`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Functions that read the metadata of a tensor and none of its values.
_ABOUT = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "is_leaf", "ndim", "layout", "is_cuda", "is_meta", "grad")
} | {
    getattr(Tensor, name)
    for name in (
        "size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "is_contiguous",
        "is_floating_point", "is_complex", "get_device", "new_empty", "new_zeros", "new_ones", "new_full",
        "new_tensor", "__hash__", "__len__",
    )
} | {torch.is_floating_point, torch.is_complex, torch.numel}  # fmt: skip


class Source(Protocol):
    """Where perturbed weights come from."""

    ids: set[int]
    """`id` of every parameter that is replaced."""

    rules: dict[Callable[..., Any], Callable[..., Any]]
    """Functions that the source computes itself if a parameter is an argument: called with (*args, **kwargs)."""

    anywhere: dict[Callable[..., Any], Callable[..., Any]]
    """Functions that it computes itself whatever their arguments."""

    def tensor(self, p: Tensor) -> Tensor: ...


class Intercept(TorchFunctionMode):
    """Replace the parameters among the arguments of torch functions by what a source substitutes for them."""

    def __init__(self, source: Source):
        super().__init__()
        self.source = source

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        source = self.source
        anywhere = source.anywhere.get(func)
        if anywhere is not None:
            return anywhere(*args, **kwargs)
        if func in _ABOUT or not (_mentions(args, source.ids) or (kwargs and _mentions(kwargs.values(), source.ids))):
            return func(*args, **kwargs)
        rule = source.rules.get(func)
        if rule is not None:
            return rule(*args, **kwargs)
        return func(*_replace(args, source), **{name: _replace(value, source) for name, value in kwargs.items()})


def _mentions(values: Any, ids: set[int]) -> bool:
    return any(
        id(value) in ids
        or (isinstance(value, list | tuple) and not isinstance(value, torch.Size) and _mentions(value, ids))
        for value in values
    )


def _replace(value: Any, source: Source) -> Any:
    if id(value) in source.ids:
        return source.tensor(value)
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        items = [_replace(item, source) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
