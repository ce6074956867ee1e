"""How probes are evaluated, in what units, by how many threads: static rules, applied once.

The rules depend on the model, the shapes and the number of cores, never on a clock or on free memory: a resumed run
does the same arithmetic. `evaluate`, `chunk` and `threads` can change the last bits of a loss; `workers` cannot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from reroll.errors import UsageError
from reroll.grad.base import TILE_BYTES, weight_bytes
from reroll.grad.evaluate.snapshot import STATISTICS
from reroll.grad.evaluate.warm import iterates
from reroll.grad.units import first_tensor
from reroll.models import Stateful

SMALL = 1 << 18
"""Weights up to which a model is evaluated batched: a perturbed copy (1 MB) and the next stay in the L2 cache.

Up to here torch also runs on one thread: a second gains 15 %, and costs a factor of 3 and more when another process
needs the core, because threads that have finished an operation wait for the others by spinning (docs/log.md)."""
BATCHED_FLOATS = 1 << 20
"""Numbers in the perturbed copies of a batched unit, 4 MB of fp32; but a unit has at least four probes."""
BATCHED_ACTIVATIONS = 1 << 24
"""Numbers a batched unit may keep alive beside its weights: 64 MB of fp32."""
ONE_THREAD = 1 << 23
"""Weights up to which a unit is given one thread and the cores work on different units."""

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@dataclass(frozen=True)
class Plan:
    """How the probes of a step are evaluated.

    Args:
        evaluate: "in_place", "tiles" or "batched".
        chunk: probes of a unit.
        threads: threads of torch within a unit.
        workers: units evaluated at the same time.
        isolate: whether branches may draw random numbers or change buffers, and so have to be isolated.
        tile_bytes: budget of perturbed weights per worker, for tiles.
        whole: all perturbed weights fit the budget and the model can be copied, so nothing is cut into tiles.
        reason: why, for people.
    """

    evaluate: str
    chunk: int
    threads: int
    workers: int
    isolate: bool
    tile_bytes: int
    whole: bool
    reason: str

    def extra_bytes(self, parameters: Mapping[str, Tensor], restore: str, dtype: torch.dtype | None) -> int:
        """Return the bytes of perturbed or pristine copies that exist at once."""
        size = weight_bytes(parameters, dtype)
        if self.evaluate == "in_place":
            return weight_bytes(parameters) if restore == "copy" else 0
        per_worker = min(size, self.tile_bytes) if self.evaluate == "tiles" else 2 * self.chunk * size
        return per_worker * self.workers


def make_plan(
    model: nn.Module | None, parameters: Mapping[str, Tensor], batch: Any, options: Any, sides: int, copies: bool = True
) -> Plan:
    """Decide what is "auto" or None in the options of a `CentralDifference`; of the batch only shapes matter.

    Without a model nothing is assumed about the loss. `sides` is the number of branches of a probe; without `copies`
    the loss evaluates this very module.
    """
    evaluate, chunk, threads, dtype = options.evaluate, options.chunk, options.threads, options.dtype
    if evaluate in ("tiles", "batched") and (why := _why_in_place(model)) is not None:
        raise UsageError(f'evaluate="{evaluate}" cannot follow this model: {why}. Use "in_place".')
    weights = sum(p.numel() for p in parameters.values())
    low = any(p.dtype.itemsize < 4 for p in parameters.values()) or dtype is not None
    on_cpu = all(p.device.type == "cpu" for p in parameters.values())
    # Torch's modules and ours use their weights in torch operations only.
    is_known = model is not None and all(
        type(module).__module__.startswith(("torch.nn.", "reroll.")) for module in model.modules()
    )
    reason = "asked for"
    if evaluate == "auto":
        evaluate, reason = _choose(model if is_known and copies else None, weights, low, _why_in_place(model))
    isolate = model is None or not is_known or any(_draws_or_changes(m) for m in model.modules() if m.training)
    # One unit at a time where units would share weights, the global generator, buffers or a device.
    alone = evaluate == "in_place" or isolate or not on_cpu
    cores = torch.get_num_threads() if on_cpu else 1
    if threads is None:
        threads = 1 if weights <= (SMALL if alone else ONE_THREAD) else cores
    workers = 1 if alone else options.workers or max(1, cores // threads)
    if chunk is None and evaluate == "batched":
        chunk = _chunk(weights, -(-options.probes // workers), sides, _activations(model, batch))
    tile_bytes = max(TILE_BYTES, weight_bytes(parameters) // 100)
    whole = is_known and copies and weight_bytes(parameters, dtype) <= tile_bytes
    return Plan(evaluate, max(1, min(chunk or 1, options.probes)), threads, workers, isolate, tile_bytes, whole, reason)


def _choose(model: nn.Module | None, weights: int, low: bool, why_in_place: str | None) -> tuple[str, str]:
    """The mode and the reason; `model` is None where nothing can be assumed about it."""
    if why_in_place is not None:
        return "in_place", why_in_place
    if model is None and low:
        return "tiles", "evaluation below fp32 works on copies, never in place"
    if model is None:
        return "in_place", "the model has code of its own, which may use its weights in any way"
    if weights <= SMALL and not any(map(_cannot_be_mapped, model.modules())):
        return "batched", "the model is small: perturbed copies of it fit into the cache"
    return "tiles", "the model is large: its weights stay untouched, and tiles of them are perturbed as they are used"


def _why_in_place(model: nn.Module | None) -> str | None:
    """Why the branches of a model can only be evaluated with its weights in place, or None."""
    if model is not None and iterates(model):
        return "the rollout iterates until it has converged, differently for every branch"
    scripts = () if model is None else (m for m in model.modules() if isinstance(m, torch.jit.ScriptModule))
    if any(next(script.parameters(), None) is not None for script in scripts):
        return "code compiled by torch.jit reads its weights by itself"
    rollouts = () if model is None else (getattr(module, "rollout", None) for module in model.modules())
    if any(getattr(rollout, "kernel", "") == "compiled" for rollout in rollouts):
        return "the rollout compiles the step with the weights of every branch"
    return None


def _chunk(weights: int, most: int, sides: int, activations: int) -> int:
    """The largest power of two whose weights and activations fit."""
    by_weights = max(4, BATCHED_FLOATS // (sides * max(weights, 1)))
    by_activations = BATCHED_ACTIVATIONS // (sides * max(activations, 1))
    return 1 << (max(1, min(by_weights, by_activations, most)).bit_length() - 1)


def _activations(model: nn.Module | None, batch: Any) -> int:
    """About how many numbers one evaluation keeps alive: positions of the batch times numbers per position."""
    first = first_tensor(batch)
    if first is None:
        return 1
    positions = first.numel() if not first.is_floating_point() else first.numel() // max(first.shape[-1], 1)
    if model is None:
        return positions
    if getattr(model, "stateful", False):
        stateful = cast(Stateful, model)
        return min(positions * stateful.step_floats, stateful.window_floats)
    # An unknown model: per position the inputs and outputs of all its matrices.
    return positions * sum(sum(p.shape[-2:]) for p in model.parameters() if p.dim() > 1)


def _cannot_be_mapped(module: nn.Module) -> bool:
    """Whether a module fails under torch.func.vmap: torch's recurrent ones, and what writes batch statistics."""
    return isinstance(module, nn.RNNBase | nn.RNNCellBase) or (module.training and isinstance(module, STATISTICS))


def _draws_or_changes(module: nn.Module) -> bool:
    """Whether a module of torch or reroll draws random numbers or changes a buffer in training."""
    if isinstance(module, _DROPOUT):
        return module.p > 0
    if isinstance(module, nn.LSTM | nn.GRU | nn.RNN | nn.MultiheadAttention | nn.RReLU):
        return getattr(module, "dropout", 1.0) > 0
    return isinstance(module, STATISTICS)
