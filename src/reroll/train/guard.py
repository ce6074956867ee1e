"""Which tensor was the first that is not finite, in words. It is looked for after a failure, and costs nothing before.

first_weight(model)                          the weight blocks.1.up.weight
first_output(model, loss_fn, batch, key)     the output of blocks.1.up
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from reroll.data.batch import START
from reroll.grad.base import LossFn
from reroll.grad.evaluate.base import read_loss
from reroll.grad.evaluate.snapshot import Snapshot, cuda_devices, seed_of, seeded_generators
from reroll.grad.units import BranchStates, batch_rows, batch_size, first_tensor
from reroll.keys import Key
from reroll.models.roles import canonical_name
from reroll.trees import map_state


class _Found(Exception):
    """A tensor is not finite; what it is."""


def describe(model: nn.Module, loss_fn: LossFn, batch: Any, key: Key, parts: int = 1) -> str:
    """Return a sentence on where a loss that is not finite comes from: a weight, and the first output of a module.

    Args:
        model, loss_fn, batch, key: those of the step.
        parts: how many pieces of the batch to look at in turn, as the step did to save memory.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> nn.init.constant_(model[1].bias, torch.inf)[0].item()
        inf
        >>> describe(model, lambda model, x: model(x).mean(), torch.ones(3, 2), Key(0))
        'First tensor that is not finite: the weight 1.bias; then the output of 1.'
    """
    weight, output = first_weight(model), first_output(model, loss_fn, batch, key, parts)
    if weight or output:
        return f"First tensor that is not finite: {'; then '.join(filter(None, (weight, output)))}."
    return "Of the weights themselves the loss is finite, and so are they."


def first_weight(model: nn.Module) -> str:
    """Return the first parameter or buffer that is not finite, in the model's order; empty if there is none."""
    named = (("weight", model.named_parameters()), ("buffer", model.named_buffers()))
    found = (f"the {what} {canonical_name(name)}" for what, each in named for name, t in each if not _finite([t]))
    return next(found, "")


@torch.no_grad()
def first_output(model: nn.Module, loss_fn: LossFn, batch: Any, key: Key, parts: int = 1) -> str:
    """Return the first output of a module that is not finite, in the order of evaluation; empty if the loss is finite.

    The batch is evaluated once more, without a gradient or `torch.compile`, and what that changes is restored. Where
    something not finite arises between modules, that is said of the input of the next.
    """
    if not _finite([first_tensor(batch)]):
        return "the inputs of the batch"
    if isinstance(states := getattr(batch, "state", None), BranchStates):
        batch = replace(batch, state=START if states[0] is None else states[0])
    size, devices = batch_size(batch) or 1, cuda_devices(dict(model.named_parameters()))
    before = Snapshot(model, devices)
    hooks = [module.register_forward_hook(_look(name)) for name, module in model.named_modules()]
    try:
        with seeded_generators(seed_of(key), devices), torch.compiler.set_stance("force_eager"):
            for part in range(min(parts, size)):
                rows = batch_rows(batch, size * part // parts, size * (part + 1) // parts) if parts > 1 else batch
                if not _finite([read_loss(loss_fn(model, rows))[0]]):
                    return "the loss, though every module's output is finite"
    except _Found as found:
        return str(found)
    finally:
        for hook in hooks:
            hook.remove()
        before.restore()
    return ""


def _look(name: str) -> Any:
    name = canonical_name(name) if name else "the model"

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        for what, values in (("input", inputs), ("output", output)):
            if not _finite(_tensors(values)):
                raise _Found(f"the {what} of {name}")

    return look


def _tensors(values: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    map_state(values, lambda tensor: tensors.append(tensor) or tensor)
    return tensors


def _finite(tensors: Iterable[Tensor | None]) -> bool:
    return all(t is None or bool(t.isfinite().all()) for t in tensors)
