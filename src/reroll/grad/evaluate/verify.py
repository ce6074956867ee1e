"""See that the perturbation reaches what the loss reads, and go another way where it doesn't.

A loss can read weights past `tiles` and `batched`: it closes over the model where a copy is evaluated, runs compiled
code, calls `.item()`. So on the first use of a model, a loss and a way, one probe is also evaluated by the reference,
on as many tensors as the budget of `tiles` can copy. Where losses differ by more than rounding, or the way raises,
the next one is taken; the last is the reference (in another dtype than the weights', interception):

    tiles on a copy → tiles by interception → in_place          batched → in_place

Where generators or buffers have moved afterwards, the step is taken once more with its branches isolated.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from reroll.errors import UsageError
from reroll.grad.evaluate.base import Evaluator, ProbeContext
from reroll.grad.evaluate.batched import Batched
from reroll.grad.evaluate.in_place import InPlace, Replicas
from reroll.grad.evaluate.plan import Plan
from reroll.grad.evaluate.snapshot import Snapshot, cuda_devices
from reroll.grad.evaluate.tiles import Tiles
from reroll.grad.units import Execute, Result, Unit, threads
from reroll.passes import passes
from reroll.rollout.monitor import monitoring

ROUNDING = 16
"""Units in the last place of a loss by which two ways may differ, and differences of unperturbed losses."""
FLOOR = 64
"""Units in the last place of one by which losses may differ that are small differences of larger numbers, as those of a
model that has learned its data are …"""
SHARE = 0.1
"""… if that is no more than this share of what the probe does to the loss: a weight that is not reached costs more."""
AMPLIFIED = 6.0
"""Square roots of a unit in the last place by which unperturbed losses may differ: 0.2 % in fp32."""
UNREACHED = "its losses differ from those of another way, so not all that the loss reads is perturbed"

REMEMBERED = 64
"""Losses of a model that are remembered."""

_settled: MutableMapping[Any, dict[Any, Any]] = WeakIdKeyDictionary()
"""Of a model: what was settled, by plan and loss; each with references to the objects whose ids are in its key."""


@dataclass
class Evaluation:
    """How the units of a step are evaluated.

    Args:
        plan: what was planned; what was settled on, once units were evaluated.
        restore: for "in_place".
        asked: the mode was asked for by name, so none is taken in its place.
        execute: who evaluates units; None: threads of this process.
        drift: of "in_place" on a grid, tensors that came back changed.
    """

    probes: ProbeContext
    plan: Plan
    restore: str
    asked: bool
    execute: Execute | None = None
    drift: int | None = None

    def run(self, units: list[Unit]) -> list[Result]:
        """Evaluate units as it is planned."""
        with evaluator(self.plan, self.probes, self.restore) as way:
            execute = self.execute or threads(self.plan.workers, self.plan.threads)
            results = execute(way, units)
        self.drift = way.drift if isinstance(way, InPlace) else None
        return results

    def settle(self, units: list[Unit], loss_fn: Callable[..., Any]) -> list[Result]:
        """Evaluate the units of a step, the first time beside `in_place`.

        Raises:
            UsageError: if the mode was asked for and cannot evaluate this model and loss.
        """
        model = self.probes.model
        loss, objects = identity(loss_fn)
        key = (self.plan.evaluate, self.plan.whole, self.probes.dtype, model and model.training, loss)
        memo = _settled.setdefault(next(iter(self.probes.parameters.values())) if model is None else model, {})
        references, settled = memo.get(key, ((), {}))
        # While all of them live, their ids are nobody else's.
        is_settled = key in memo and all(reference() is not None for reference in references)
        if is_settled:
            self._change(**settled)
        results = self._evaluate(units, trusted=is_settled or is_ours(model, loss_fn))
        if len(memo) >= REMEMBERED and key not in memo:
            memo.clear()
        settled = {name: getattr(self.plan, name) for name in ("evaluate", "whole", "isolate", "reason")}
        memo[key] = tuple(map(_reference, objects)), settled
        return results

    def _evaluate(self, units: list[Unit], trusted: bool) -> list[Result]:
        """Evaluate units, if need be by one way after the other, until there is one to trust."""
        # Branches that are isolated put back themselves what modules keep.
        before = Snapshot(None if self.plan.isolate else self.probes.model, cuda_devices(self.probes.parameters))
        first, reason = self.plan.evaluate, None
        while True:
            try:
                results = self.run(units)
                if not self.plan.isolate and before.has_moved():
                    self._change(isolate=True)
                    trusted = False
                    continue
                if trusted or self._is_last() or self._agrees(units[0], results[0]):
                    break
                reason = reason or UNREACHED
            except Exception as error:
                if self._is_last():
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

    def _is_last(self) -> bool:
        """Whether there is no other way to go over to: this one is the measure."""
        if self.probes.dtype is None:
            return self.plan.evaluate == "in_place"
        return self.plan.evaluate == "tiles" and not self.plan.whole

    def _report(self, first: str, reason: str) -> None:
        taken = self.plan.evaluate
        if self.asked:
            raise UsageError(
                f'evaluate="{first}" cannot evaluate this model and loss: {reason}. Use evaluate="{taken}" or "auto".'
            )
        self.plan = replace(self.plan, reason=f"{first} cannot: {reason}")
        if reason == UNREACHED:  # where a way raises, another is simply taken
            warnings.warn(f'evaluate="{first}" would be wrong here: {reason}; "{taken}" is used.', stacklevel=4)

    def _agrees(self, unit: Unit, result: Result) -> bool:
        """Whether the first probe of a unit has the losses that it has by the last way."""
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
        # Rounding may be amplified, by a long recurrence say: then unperturbed losses differ, too, if little.
        still = replace(probes, epsilon=0.0)
        clean, base = (self._once(still, one, plan).double() for plan in (self.plan, reference))
        amplified, effect = (clean - base).abs(), (theirs - base).abs()
        if bool((alike | ((gap <= FLOOR * precision) & (gap <= SHARE * effect))).all()):
            return True
        if bool((amplified > AMPLIFIED * precision**0.5 * clean.abs()).any()):
            return False
        return bool((alike | (gap <= bound + ROUNDING * amplified)).all())

    def _once(self, probes: ProbeContext, unit: Unit, plan: Plan) -> Tensor:
        with passes(0), monitoring(quiet=True), evaluator(plan, probes, "copy") as way:
            return threads(1, plan.threads)(way, [unit])[0].losses


def is_ours(model: nn.Module | None, loss_fn: Callable[..., Any]) -> bool:
    """Whether model and loss are reroll's own, in which tests hold all ways to one another."""
    task = type(getattr(loss_fn, "__self__", None)).__module__
    plain = (nn.Linear, nn.Embedding, nn.ModuleList)
    return (
        model is not None
        and task.startswith("reroll.data.")
        and all(type(m) in plain or type(m).__module__.startswith("reroll.") for m in model.modules())
    )


def evaluator(plan: Plan, probes: ProbeContext, restore: str) -> Evaluator:
    """Return what evaluates units as planned."""
    if plan.evaluate == "batched":
        return Batched(probes)
    if plan.evaluate == "tiles":
        return Replicas(probes) if plan.whole else Tiles(probes, plan.tile_bytes)
    return InPlace(probes, restore)


FEW = 64
"""Entries of a container that are looked at."""


def identity(loss_fn: Any, depth: int = 5) -> tuple[Any, list[Any]]:
    """Return what tells a loss from another, and the objects whose ids are in it.

    That is its code, and the modules, parameters and functions that it is bound to, closes over or has as defaults; of
    a list, tuple or dict only the first 64 entries count, so two losses that differ in a later one are taken for the
    same, and the second is not compared. A lambda that is made anew at every step is the same loss.
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
            # A container may hold a data set; what tells losses apart is few and in front.
            inside = list(itertools.islice(value.values() if isinstance(value, dict) else value, FEW))
        else:
            return by_id(value) if isinstance(value, nn.Parameter) or callable(value) else None
        parts = (describe(part, depth - 1) for part in inside) if depth else ()
        return code, *(part for part in parts if part not in (None, (None,)))

    return describe(loss_fn, depth), objects


def _closure(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not yet filled
            yield cell.cell_contents


def _reference(thing: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def _affordable(parameters: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """The tensors, smallest first, that the budget allows to copy, or the smallest; in their order."""
    by_size = sorted(parameters, key=lambda name: parameters[name].numel())
    totals = itertools.accumulate(parameters[name].nbytes for name in by_size)
    chosen = {name for i, (name, total) in enumerate(zip(by_size, totals)) if total <= budget or i == 0}
    return {name: p for name, p in parameters.items() if name in chosen}
