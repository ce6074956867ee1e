"""See that the perturbation reaches what the loss reads, and go another way where it doesn't.

`tiles` and `batched` hand perturbed weights to the operations of a model; a loss can read weights past them (a copy of
the model is evaluated and the loss closes over the model itself, compiled code, a kernel that is chosen by the kind of
its arguments, `.item()`). So on the first use of a model, a loss and a way of evaluating, one probe is evaluated
`in_place` as well, on as many tensors as the budget of `tiles` can copy. Where losses differ by more than rounding, or
the way raises, the next one is taken:

    tiles on a copy → tiles by interception → in_place          batched → in_place

In another dtype than the weights' nothing can be done in place; interception is the measure then.

A loss that draws from torch's generators, or a model that changes its buffers, shows when they have moved afterwards:
then the step is taken once more with its branches separated, one unit at a time.
"""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from reroll.errors import UsageError
from reroll.grad.checks import Memo
from reroll.grad.evaluate.batched import Batched
from reroll.grad.evaluate.in_place import InPlace
from reroll.grad.evaluate.plan import Plan
from reroll.grad.evaluate.probing import Evaluator, Probing, Result, Unit
from reroll.grad.evaluate.replicas import Replicas
from reroll.grad.evaluate.surroundings import Surroundings, cuda_devices
from reroll.grad.evaluate.tiles import Tiles
from reroll.grad.execute import Execute, threads
from reroll.passes import uncounted
from reroll.rollout.watch import watching

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

_settled = Memo()


@dataclass
class Evaluation:
    """How the units of a step are evaluated, after what is known of the model and the loss.

    Args:
        plan: what was planned; what was settled on, once units were evaluated.
        restore: for "in_place".
        asked: the mode was asked for by name, so none is taken in its place.
        execute: who evaluates units; None: threads of this process.
    """

    probing: Probing
    plan: Plan
    restore: str
    asked: bool
    execute: Execute | None = None
    drift: int | None = None

    def run(self, units: list[Unit]) -> list[Result]:
        """Evaluate units as it is planned."""
        with evaluator(self.plan, self.probing, self.restore) as way:
            execute = self.execute or threads(self.plan.workers, self.plan.threads)
            results = execute(way, units)
        self.drift = way.drift if isinstance(way, InPlace) else None
        return results

    def settle(self, units: list[Unit], loss_fn: Callable[..., Any]) -> list[Result]:
        """Evaluate the units of a step, the first time beside `in_place`.

        Raises:
            UsageError: if the mode was asked for and cannot evaluate this model and loss.
        """
        probing, model = self.probing, self.probing.model
        loss, objects = identity(loss_fn)
        key = (self.plan.evaluate, self.plan.whole, probing.dtype, model and model.training, loss)
        memo = _settled.of(next(iter(probing.parameters.values())) if model is None else model)
        refs, settled = memo.get(key, ((), {}))
        # While all of them live, their ids are nobody else's.
        known = key in memo and all(ref() is not None for ref in refs)
        if known:
            self._take(**settled)
        else:
            known = is_ours(model, loss_fn)
        around = Surroundings(model, cuda_devices(probing.parameters))
        first, reason = self.plan.evaluate, None
        while True:
            try:
                results = self.run(units)
                if not self.plan.isolate and around.moved():
                    around.rewind()
                    around.restore()
                    self._take(isolate=True)
                    known = False
                    continue
                if known or self._is_last() or self._agrees(units[0], results[0]):
                    break
                reason = reason or UNREACHED
            except Exception as error:
                if self._is_last():
                    raise
                reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
            finally:
                around.restore()
            self._next()
        if reason is not None and self.plan.evaluate != first:
            self._say(first, reason)
        if len(memo) >= REMEMBERED and key not in memo:
            memo.clear()
        settled = {name: getattr(self.plan, name) for name in ("evaluate", "whole", "isolate", "reason")}
        memo[key] = tuple(map(_reference, objects)), settled
        return results

    def _take(self, isolate: bool, **changes: Any) -> None:
        workers = 1 if isolate or changes.get("evaluate") == "in_place" else self.plan.workers
        self.plan = replace(self.plan, isolate=isolate, workers=workers, **changes)
        self.probing = replace(self.probing, isolate=isolate)

    def _is_last(self) -> bool:
        """Whether there is no other way to go over to: this one is the measure."""
        if self.probing.dtype is None:
            return self.plan.evaluate == "in_place"
        return self.plan.evaluate == "tiles" and not self.plan.whole

    def _next(self) -> None:
        """Go over to the next way."""
        if self.probing.dtype is not None or (self.plan.evaluate == "tiles" and self.plan.whole):
            self._take(isolate=self.plan.isolate, evaluate="tiles", whole=False)
        else:
            self._take(isolate=True, evaluate="in_place")

    def _say(self, first: str, reason: str) -> None:
        taken = self.plan.evaluate
        if self.asked:
            raise UsageError(
                f'evaluate="{first}" cannot evaluate this model and loss: {reason}. Use evaluate="{taken}" or "auto".'
            )
        self.plan = replace(self.plan, reason=f"{first} cannot: {reason}")
        if reason == UNREACHED:  # where a way raises, another is simply taken
            warnings.warn(f'evaluate="{first}" would be wrong here: {reason}; "{taken}" is used.', stacklevel=3)

    def _agrees(self, unit: Unit, result: Result) -> bool:
        """Whether the first probe of a unit has the losses that it has by the last way."""
        probing, count = self.probing, len(unit.probes)
        states = unit.states and [state for i, state in enumerate(unit.states) if i % count == 0]
        one = unit._replace(probes=unit.probes[:1], states=states)
        some = _affordable(probing.parameters, self.plan.tile_bytes)
        if len(some) < len(probing.parameters):
            probing = replace(probing, parameters=some)
            losses = self._once(probing, one, self.plan)
        else:
            losses = result.losses[:, :1]
        measure = replace(self.plan, evaluate="in_place" if probing.dtype is None else "tiles", whole=False)
        mine, theirs = losses.double(), self._once(probing, one, measure).double()
        precision = max(torch.finfo(probing.dtype or p.dtype).eps for p in (losses, *probing.parameters.values()))
        bound = ROUNDING * precision * torch.maximum(mine.abs(), theirs.abs())
        visible = 2 * torch.finfo(losses.dtype).eps * theirs.abs().max()
        if len(mine) == 2 and mine[0] == mine[1] and (theirs[0] - theirs[1]).abs() > visible:
            return False
        apart = (mine - theirs).abs()
        alike = (mine == theirs) | ~(mine.isfinite() | theirs.isfinite())
        if bool((alike | (apart <= bound)).all()):
            return True
        # Rounding may be amplified, by a long recurrence say: then unperturbed losses are apart, too, if little.
        still = replace(probing, epsilon=0.0)
        clean = self._once(still, one, self.plan).double()
        base = self._once(still, one, measure).double()
        amplified, effect = (clean - base).abs(), (theirs - base).abs()
        if bool((alike | ((apart <= FLOOR * precision) & (apart <= SHARE * effect))).all()):
            return True
        if bool((amplified > AMPLIFIED * precision**0.5 * clean.abs()).any()):
            return False
        return bool((alike | (apart <= bound + ROUNDING * amplified)).all())

    def _once(self, probing: Probing, unit: Unit, plan: Plan) -> Tensor:
        with uncounted(), watching(quiet=True), evaluator(plan, probing, "copy") as way:
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


def evaluator(plan: Plan, probing: Probing, restore: str) -> Evaluator:
    """Return what evaluates units as planned."""
    if plan.evaluate == "batched":
        return Batched(probing)
    if plan.evaluate == "tiles":
        return Replicas(probing) if plan.whole else Tiles(probing, plan.tile_bytes)
    return InPlace(probing, restore)


def identity(function: Any) -> tuple[Any, list[Any]]:
    """Return what tells a loss from another, and the objects whose ids are in it.

    That is its code, and the modules, parameters and functions that it is bound to, closes over or has as defaults. A
    lambda that is made anew at every step is the same loss.
    """
    objects: list[Any] = []

    def name(thing: Any) -> Any:
        objects.append(thing)
        return id(thing)

    def of(value: Any, depth: int) -> Any:
        if isinstance(value, nn.Module | nn.Parameter):
            return name(value)
        if depth and isinstance(value, types.FunctionType | types.MethodType | functools.partial):
            return told(value, depth - 1)
        if depth and isinstance(value, list | tuple | dict):
            inside = value.values() if isinstance(value, dict) else value
            return tuple(part for part in (of(each, depth - 1) for each in inside) if part is not None)
        return None

    def told(function: Any, depth: int) -> Any:
        bound: list[Any] = []
        while isinstance(function, functools.partial):
            bound += [function.args, function.keywords]
            function = function.func
        plain = getattr(function, "__func__", function)
        if getattr(plain, "__code__", None) is None:
            return type(function), name(function), of(bound, depth)
        owner = getattr(function, "__self__", None)
        for cell in plain.__closure__ or ():
            try:
                bound.append(cell.cell_contents)
            except ValueError:  # not yet filled
                continue
        bound += [plain.__defaults__, plain.__kwdefaults__]
        return plain.__code__, None if owner is None else name(owner), of(bound, depth)

    return told(function, 5), objects


def _reference(thing: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(thing)
    except TypeError:
        return lambda: thing


def _affordable(parameters: Mapping[str, Tensor], budget: int) -> dict[str, Tensor]:
    """The tensors, smallest first, that the budget allows to copy; in their order."""
    chosen, total = set(), 0
    for name, p in sorted(parameters.items(), key=lambda item: item[1].numel()):
        total += p.numel() * p.element_size()
        if total > budget and chosen:
            break
        chosen.add(name)
    return {name: p for name, p in parameters.items() if name in chosen}
