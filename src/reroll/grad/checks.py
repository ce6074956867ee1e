"""Whether every weight can be perturbed by itself, and whether its precision resolves ε."""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from reroll.errors import EpsilonTooSmall, UsageError
from reroll.grad.base import fetch

WIDE = 64.0
"""An ε this many times above the floor is not checked again at every step."""

RAISED = (
    "ε, tied to the learning rate, is below two units in the last place of the weights; the smallest they can resolve "
    "is used instead. Raise lr, epsilon_min or epsilon, or keep the weights in fp32."
)

_smallest: MutableMapping[Any, dict[Any, float]] = WeakIdKeyDictionary()
"""The smallest ε of a set of tensors when it was last measured, by the first tensor and what else it depends on."""


def floors(parameters: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, float]:
    """Return two units in the last place of a weight of typical size, for every tensor: the smallest ε it resolves.

    Below that, rounding decides where a probe goes. A tensor of zeros has no last place: it resolves any ε.
    """
    sizes = fetch([torch.linalg.vector_norm(p).double() / max(p.numel(), 1) ** 0.5 for p in parameters.values()])
    return {
        name: torch.finfo(dtype or p.dtype).eps * 2.0 ** math.frexp(size)[1] if 0 < size < math.inf else 0.0
        for (name, p), size in zip(parameters.items(), sizes)
    }


def check_memory(named: Mapping[str, Tensor]) -> None:
    """Raise `UsageError` if entries share memory, within or between tensors: they would be perturbed several times."""
    ranges: list[tuple[str, int, int, str]] = []
    for name, p in named.items():
        if p.is_meta:
            raise UsageError(f'{name} is on the device "meta", without numbers; give the model some: model.to_empty().')
        spans = [(size, stride) for size, stride in zip(p.shape, p.stride()) if size > 1]
        if p.numel() and any(stride == 0 for _, stride in spans):
            raise UsageError(f"{name} is an expanded tensor, whose entries share memory; make it with .clone().")
        extent = (1 + sum((size - 1) * stride for size, stride in spans)) * p.element_size() if p.numel() else 0
        if extent:
            ranges.append((str(p.device), p.data_ptr(), p.data_ptr() + extent, name))
    beside: list[str] = []
    on, last = "", 0
    for device, start, end, name in sorted(ranges):
        if device != on or start >= last:
            _check_apart(beside, named)
            beside, on, last = [], device, 0
        beside, last = [*beside, name], max(last, end)
    _check_apart(beside, named)


def _check_apart(names: list[str], named: Mapping[str, Tensor]) -> None:
    """Raise `UsageError` if tensors whose address ranges overlap share an entry: columns of a matrix do not."""
    if len(names) < 2:
        return
    starts = [named[name].data_ptr() - named[names[0]].data_ptr() for name in names]
    unit = math.gcd(*starts, *(named[name].element_size() for name in names))
    strides = {name: [stride * named[name].element_size() // unit for stride in named[name].stride()] for name in names}
    sizes = [sum((n - 1) * s for n, s in zip(named[name].shape, strides[name])) for name in names]
    owner = torch.zeros(1 + max(start // unit + size for start, size in zip(starts, sizes)), dtype=torch.int32)
    for number, (name, start) in enumerate(zip(names, starts), 1):
        mine = owner.as_strided(named[name].shape, strides[name], start // unit)
        if other := int(mine.max()):
            raise UsageError(
                f'"{names[other - 1]}" and "{name}" are two parameters that share memory; use one nn.Parameter.'
            )
        mine.fill_(number)


def check_epsilon(
    parameters: Mapping[str, Tensor], epsilon: float, scales: Mapping[str, float], dtype: torch.dtype | None,
    again: bool = False,
) -> None:  # fmt: skip
    """Raise `EpsilonTooSmall` if ε is below the floor of a tensor.

    That takes a pass over the weights, made the first time, while ε is close to the last floor, and with `again`: when
    no probe changes the loss, the weights may have outgrown ε.
    """
    seen = _smallest.setdefault(next(iter(parameters.values())), {})
    key = (tuple(parameters), dtype, tuple(scales.items()))
    if key not in seen:
        check_memory(parameters)
    if not again and epsilon >= WIDE * seen.get(key, math.inf):
        return
    least = {name: (floor / scales.get(name, 1.0), floor) for name, floor in floors(parameters, dtype).items()}
    name, (smallest, floor) = max(least.items(), key=lambda item: item[1])
    if epsilon < smallest * (1 - 1e-12):  # a scale is rounded
        kind = str(dtype or parameters[name].dtype).removeprefix("torch.")
        raise EpsilonTooSmall(
            f"epsilon={epsilon * scales.get(name, 1.0):g} is below two units in the last place of {name} "
            f"({floor:.2g} in {kind}); raise it, or evaluate in a wider dtype.",
            smallest,
        )
    seen[key] = smallest
