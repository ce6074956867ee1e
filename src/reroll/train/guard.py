"""Which tensor was the first that is not finite, in words. It is looked for after a failure, and costs nothing before.

first_weight(model)                          the weight blocks.1.up.weight
first_output(model, loss_fn, batch, key)     the output of blocks.1.up
"""

from __future__ import annotations

import math
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

MASKED, WORSE = 1, 2
"""Of numbers that are not finite: −∞ alone; NaN or +∞ among them."""


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
    first, failed = [], ""
    try:
        first.append(first_weight(model))
        first.append(first_output(model, loss_fn, batch, key, parts))
    except Exception as error:  # the loss that is not finite remains the reason why the run ends
        why = " ".join(str(error).split())[:200]
        failed = f"Where it arises could not be looked for ({type(error).__name__}: {why})."
    if any(first):
        return f"First tensor that is not finite: {'; then '.join(filter(None, first))}. {failed}".rstrip()
    return failed or "The unperturbed weights and their loss are finite."


def first_weight(model: nn.Module) -> str:
    """Return the first parameter or buffer that is not finite, in the model's order; empty if there is none.

    What is not trained may be infinite on purpose, as a causal mask is: there, only NaN counts.
    """
    named = (("weight", model.named_parameters()), ("buffer", model.named_buffers()))
    bad = ((what, name) for what, each in named for name, t in each if (_worst([t]) if t.requires_grad else _nan(t)))
    return next((f"the {what} {canonical_name(name)}" for what, name in bad), "")


@torch.no_grad()
def first_output(model: nn.Module, loss_fn: LossFn, batch: Any, key: Key, parts: int = 1) -> str:
    """Return the first output of a module that is not finite, in the order of evaluation; empty if the loss is finite.

    The batch is evaluated once more, without a gradient or `torch.compile`, and what that changes is restored. Where
    something not finite arises between modules, that is said of the input of the next. −∞ may be on purpose, as that of
    masked logits is: a tensor with it, and nothing worse, is named only if no other follows.
    """
    if _worst([first_tensor(batch)]):
        return "the inputs of the batch"
    if isinstance(states := getattr(batch, "state", None), BranchStates):
        batch = replace(batch, state=START if states[0] is None else states[0])
    size, devices = batch_size(batch) or 1, cuda_devices(dict(model.named_parameters()))
    before = Snapshot(model, devices)
    seen: dict[int, str] = {}
    hooks = [module.register_forward_hook(_look(name, seen)) for name, module in model.named_modules()]
    try:
        with seeded_generators(seed_of(key), devices), torch.compiler.set_stance("force_eager"):
            for part in range(min(parts, size)):
                rows = batch_rows(batch, size * part // parts, size * (part + 1) // parts) if parts > 1 else batch
                seen.clear()
                if _worst([read_loss(loss_fn(model, rows))[0]]):
                    return seen.get(WORSE) or seen.get(MASKED) or "the loss, though every module's output is finite"
    finally:
        for hook in hooks:
            hook.remove()
        before.restore()
    return ""


def _look(name: str, seen: dict[int, str]) -> Any:
    name = canonical_name(name) if name else "the model"

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        for what, values in (("input", inputs), ("output", output)):
            seen.setdefault(_worst(_tensors(values)), f"the {what} of {name}")

    return look


def _tensors(values: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    map_state(values, lambda tensor: tensors.append(tensor) or tensor)
    return tensors


def _worst(tensors: Iterable[Tensor | None]) -> int:
    """Return 0 if all numbers are finite, else `MASKED` or `WORSE`."""
    bad = [t for t in tensors if t is not None and not bool(t.isfinite().all())]
    return WORSE if any(bool((~t.isfinite() & (t != -math.inf)).any()) for t in bad) else MASKED if bad else 0


def _nan(tensor: Tensor) -> bool:
    return bool(tensor.isnan().any())
