"""Verify that the perturbation reaches the loss, and evaluate in another way where it does not.

A loss can bypass `tiles` and `batched`: it closes over the model where a copy is evaluated, runs compiled code, calls
`.item()`. So the first time a model and a loss are evaluated in a mode, one probe is also evaluated by the reference,
on as many tensors as the budget of `tiles` can copy. If losses differ by more than rounding, or the mode raises, the
next one is used; the last is the reference (in another dtype than the weights', interception):

    tiles on a copy → tiles by interception → in_place          batched → in_place

If generators or buffers have changed afterwards, the step is evaluated once more with isolated branches.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from reroll.errors import UsageError, warn
from reroll.grad.evaluate.base import Evaluator, ProbeContext
from reroll.grad.evaluate.batched import Batched
from reroll.grad.evaluate.in_place import InPlace, Replicas
from reroll.grad.evaluate.plan import Plan
from reroll.grad.evaluate.snapshot import Snapshot, cuda_devices
from reroll.grad.evaluate.tiles import Tiles
from reroll.grad.units import Distribute, Result, Unit, threads
from reroll.passes import is_untouched, passes
from reroll.rollout.monitor import monitoring

ROUNDING = 16
"""Units in the last place of a loss by which two modes may differ, and differences of unperturbed losses."""
FLOOR = 64
"""Units in the last place of one by which losses may differ that are small differences of larger numbers, such as those
of a model that has learned its data …"""
SHARE = 0.1
"""… if that is at most this share of the probe's effect on the loss: an unreached weight makes a larger one."""
AMPLIFIED = 6.0
"""Square roots of a unit in the last place by which unperturbed losses may differ: 0.2 % in fp32."""
UNREACHED = "its losses differ from those of another mode, so not everything that the loss reads is perturbed"

REMEMBERED = 64
"""Entries per model in the memo."""

_memo: MutableMapping[Any, dict[Any, Any]] = WeakIdKeyDictionary()
"""By model, mode and loss, the plan that was verified, and references to the objects whose ids are in the key."""


@dataclass
class Evaluation:
    """How the units of a step are evaluated.

    Args:
        plan: the plan; after an evaluation the one that was used.
        restore: for "in_place".
        explicit: the user chose the mode, so no other one replaces it.
        execute: the executor of units; None: threads of this process.
        drift: for "in_place" on a grid, the number of tensors that were not restored exactly.
    """

    probes: ProbeContext
    plan: Plan
    restore: str
    explicit: bool
    execute: Distribute | None = None
    drift: int | None = None

    def run(self, units: list[Unit]) -> list[Result]:
        """Evaluate units as planned."""
        with evaluator(self.plan, self.probes, self.restore) as mode:
            here = threads(self.plan.workers, self.plan.threads)
            results = here(mode, units) if self.execute is None else self.execute(here, mode, units)
        self.drift = mode.drift if isinstance(mode, InPlace) else None
        return results

    def run_verified(self, units: list[Unit], loss_fn: Callable[..., Any]) -> list[Result]:
        """Evaluate the units of a step, and verify the mode the first time.

        Raises:
            UsageError: if the user chose the mode and it cannot evaluate this model and loss.
        """
        model = self.probes.model
        (loss, objects), ours = identity(loss_fn), is_ours(model, loss_fn)
        key = (self.plan.evaluate, self.plan.whole, self.probes.dtype, model and model.training, ours, loss)
        memo = _memo.setdefault(next(iter(self.probes.parameters.values())) if model is None else model, {})
        references, changes = memo.get(key, ((), {}))
        # While these objects live, no others have their ids.
        is_verified = key in memo and all(reference() is not None for reference in references)
        if is_verified:
            self._change(**changes)
        results = self._evaluate(units, trusted=is_verified or ours)
        if len(memo) >= REMEMBERED and key not in memo:
            memo.clear()
        changes = {name: getattr(self.plan, name) for name in ("evaluate", "whole", "isolate", "reason")}
        memo[key] = tuple(map(_reference, objects)), changes
        return results

    def _evaluate(self, units: list[Unit], trusted: bool) -> list[Result]:
        """Evaluate units, if need be in one mode after the other, until one is verified."""
        # Isolated branches restore by themselves what modules store.
        before = Snapshot(None if self.plan.isolate else self.probes.model, cuda_devices(self.probes.parameters))
        first, reason = self.plan.evaluate, None
        while True:
            try:
                results = self.run(units)
                if not self.plan.isolate and before.has_changed():
                    self._change(isolate=True)
                    trusted = False
                    continue
                if trusted or self._is_reference() or self._agrees(units[0], results[0]):
                    break
                reason = reason or UNREACHED
            except Exception as error:
                if self._is_reference():
                    raise
                reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
            finally:
                before.restore()
            if self.probes.dtype is not None or (self.plan.evaluate == "tiles" and self.plan.whole):
                self._change(evaluate="tiles", whole=False)
            else:
                self._change(isolate=True, evaluate="in_place")
        if reason is not None and self.plan.evaluate != first:
            self._report(first, reason)
        return results

    def _change(self, **changes: Any) -> None:
        plan = replace(self.plan, **changes)
        self.plan = replace(plan, workers=1) if plan.isolate or plan.evaluate == "in_place" else plan
        self.probes = replace(self.probes, isolate=plan.isolate)

    def _is_reference(self) -> bool:
        """Whether the mode is the one that others are compared with."""
        if self.probes.dtype is None:
            return self.plan.evaluate == "in_place"
        return self.plan.evaluate == "tiles" and not self.plan.whole

    def _report(self, first: str, reason: str) -> None:
        used = self.plan.evaluate
        if self.explicit:
            raise UsageError(
                f'evaluate="{first}" cannot evaluate this model and loss: {reason}. Use evaluate="{used}" or "auto".'
            )
        self.plan = replace(self.plan, reason=f"{first} cannot: {reason}")
        if reason == UNREACHED:  # a mode that raises is replaced silently
            warn(f'evaluate="{first}" would be wrong here: {reason}; "{used}" is used.')

    def _agrees(self, unit: Unit, result: Result) -> bool:
        """Whether the first probe of a unit has the same losses in the reference mode."""
        count = len(unit.probes)
        states = unit.states and [state for i, state in enumerate(unit.states) if i % count == 0]
        one = unit._replace(probes=unit.probes[:1], states=states)
        probes = replace(self.probes, parameters=_affordable(self.probes.parameters, self.plan.tile_bytes))
        reference = replace(self.plan, evaluate="in_place" if probes.dtype is None else "tiles", whole=False)
        whole = len(probes.parameters) == len(self.probes.parameters)
        losses = result.losses[:, :1] if whole else self._once(probes, one, self.plan)
        mine, theirs = losses.double(), self._once(probes, one, reference).double()
        visible = 2 * torch.finfo(losses.dtype).eps * theirs.abs().max()
        if len(mine) == 2 and mine[0] == mine[1] and (theirs[0] - theirs[1]).abs() > visible:
            return False
        precision = max(torch.finfo(probes.dtype or p.dtype).eps for p in (losses, *probes.parameters.values()))
        bound = ROUNDING * precision * torch.maximum(mine.abs(), theirs.abs())
        gap = (mine - theirs).abs()
        alike = (mine == theirs) | ~(mine.isfinite() | theirs.isfinite()) | (gap <= bound)
        if bool(alike.all()):
            return True
        # Rounding may be amplified, as in a long recurrence: then the unperturbed losses differ slightly as well.
        unperturbed = replace(probes, epsilon=0.0)
        clean, base = (self._once(unperturbed, one, plan).double() for plan in (self.plan, reference))
        amplified, effect = (clean - base).abs(), (theirs - base).abs()
        if bool((alike | ((gap <= FLOOR * precision) & (gap <= SHARE * effect))).all()):
            return True
        if bool((amplified > AMPLIFIED * precision**0.5 * clean.abs()).any()):
            return False
        return bool((alike | (gap <= bound + ROUNDING * amplified)).all())

    def _once(self, probes: ProbeContext, unit: Unit, plan: Plan) -> Tensor:
        with passes(0), monitoring(quiet=True), evaluator(plan, probes, "copy") as mode:
            return threads(1, plan.threads)(mode, [unit])[0].losses


def is_ours(model: nn.Module | None, loss_fn: Callable[..., Any]) -> bool:
    """Whether model and loss are reroll's own, without code of others in it: the tests compare all modes for them."""
    task = type(getattr(loss_fn, "__self__", None)).__module__
    plain = (nn.Linear, nn.Embedding, nn.ModuleList)
    return (
        model is not None
        and task.startswith("reroll.data.")
        and all(type(m) in plain or type(m).__module__.startswith("reroll.") for m in model.modules())
        and all(map(is_untouched, model.modules()))
    )


def evaluator(plan: Plan, probes: ProbeContext, restore: str) -> Evaluator:
    """Return the evaluator of a plan."""
    if plan.evaluate == "batched":
        return Batched(probes)
    if plan.evaluate == "tiles":
        return Replicas(probes) if plan.whole else Tiles(probes, plan.tile_bytes)
    return InPlace(probes, restore)


FEW = 64
"""Entries of a container that are inspected."""


def identity(loss_fn: Any, depth: int = 5) -> tuple[Any, list[Any]]:
    """Return a key that identifies a loss, and the objects whose ids are in it.

    It consists of the code, and of the modules, parameters and functions that the loss is bound to, closes over or has
    as defaults. Of a list, tuple or dict only the first 64 entries count: losses that differ in a later one have the
    same key, and the second is not verified. A lambda that is created anew at every step is the same loss.
    """
    objects: list[Any] = []

    def by_id(thing: Any) -> int:
        objects.append(thing)
        return id(thing)

    def describe(value: Any, depth: int) -> Any:
        code, inside = None, ()
        if isinstance(value, types.FunctionType):
            code, inside = value.__code__, (*_closure(value), value.__defaults__, value.__kwdefaults__)
        elif isinstance(value, types.MethodType):
            code, inside = by_id(value.__self__), (value.__func__,)
        elif isinstance(value, functools.partial):
            inside = value.func, value.args, value.keywords
        elif isinstance(value, list | tuple | dict):
            # A container may be a data set; one of modules or parameters is short.
            inside = list(itertools.islice(value.values() if isinstance(value, dict) else value, FEW))
        else:
            return by_id(value) if isinstance(value, nn.Parameter) or callable(value) else None
        parts = (describe(part, depth - 1) for part in inside) if depth else ()
        return code, *(part for part in parts if part not in (None, (None,)))

    return describe(loss_fn, depth), objects


def _closure(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def _reference(thing: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def _affordable(parameters: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """The smallest tensors, at least one, that the budget allows to copy; in their order."""
    by_size = sorted(parameters, key=lambda name: parameters[name].numel())
    totals = itertools.accumulate(parameters[name].nbytes for name in by_size)
    chosen = {name for i, (name, total) in enumerate(zip(by_size, totals)) if total <= budget or i == 0}
    return {name: p for name, p in parameters.items() if name in chosen}
