"""Verify that the perturbation reaches the loss, and evaluate in another way where it does not.

A loss can bypass `tiles` and `batched`: it closes over the model where a copy is evaluated, runs compiled code, calls
`.item()`. So the first time a model and a loss are evaluated in a mode, the reference also evaluates probes, one for
every two of the step, each on a group of tensors that the budget of `tiles` can copy; a larger tensor is not compared.
If losses differ by more than rounding, or the mode raises, the next one is used; the last is the reference (in another
dtype than the weights', interception):

    tiles on a copy → tiles by interception → in_place          batched → in_place

A loss may change, so this is done again at its 2nd, 4th, 8th … evaluation, on the next groups. If generators or
buffers have changed afterwards, branches are isolated; if a loss cannot be repeated even so, that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from reroll.errors import UsageError, warn
from reroll.grad.evaluate.base import Evaluator, ProbeContext
from reroll.grad.evaluate.batched import Batched
from reroll.grad.evaluate.identity import identity, reference
from reroll.grad.evaluate.in_place import InPlace, Replicas, renormalised
from reroll.grad.evaluate.plan import Plan
from reroll.grad.evaluate.snapshot import Snapshot, cuda_devices, exclusively
from reroll.grad.evaluate.tiles import Tiles
from reroll.grad.units import Distribute, Result, Unit, threads
from reroll.kernels.noise_axpy import noise_of
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
GROWTH = 32
"""Factor on ε for another look at a probe whose effect on the loss is no larger than rounding may be.

There a loss may be undefined or chaotic: only a difference at weights where the modes otherwise agree counts."""
UNREACHED = "its losses differ from those of another mode, so not everything that the loss reads is perturbed"
UNREPEATED = (
    "the same weights and random numbers give different losses, so that probes differ by more than their weights; "
    "what can cause it: random numbers that are not from torch's global generators (numpy, random, a torch.Generator), "
    "data drawn inside the loss, state kept between calls that is no buffer (a list, a dict, a tensor edited in place)"
)

NO_MEMORY = (MemoryError, torch.OutOfMemoryError)
REMEMBERED = 64
"""Entries per model in the memo."""

_memo: MutableMapping[Any, dict[Any, Any]] = WeakIdKeyDictionary()
"""By model, mode and loss: references to the objects whose ids are in the key, calls, the plan that was verified."""


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
        references, calls, changes = memo.get(key, ((), 0, {}))
        # While these objects live, no others have their ids.
        if not all(reference() is not None for reference in references):
            calls = 0
        if calls:
            self._change(**changes)
        look = None if ours or calls & (calls + 1) else calls.bit_length()  # at calls 0, 1, 3, 7 …
        if look == 0:
            self._repeat(units[0])
        results = self._evaluate(units, look)
        if len(memo) >= REMEMBERED and key not in memo:
            memo.clear()
        changes = {name: getattr(self.plan, name) for name in ("evaluate", "whole", "isolate", "reason")}
        memo[key] = tuple(map(reference, objects)), calls + 1, changes
        return results

    def _repeat(self, unit: Unit) -> None:
        """Isolate branches that draw or store; where a loss differs from itself even so, say it, or refuse."""
        unit = unit._replace(probes=unit.probes[:1])
        some = self._groups(min(p.nbytes for p in self.probes.parameters.values()))[0]
        devices = cuda_devices(self.probes.parameters)

        def once() -> Tensor:
            return self._once(replace(self.probes, parameters=some, sides=(1,)), unit, self._reference())

        with exclusively():  # until it is known whether it draws
            before = Snapshot(self.probes.model, devices)
            try:
                first = once()
                if not self.plan.isolate and before.has_changed():
                    before.restore()
                    self._change(isolate=True)
                    first = once()
                again = once()
            finally:
                before.restore()
        if not repeats(first, again, self._precision(first, some), self._device):
            mode = self.plan.evaluate
            self._change(isolate=True, evaluate=self._reference().evaluate, whole=False)
            if self.plan.evaluate != mode or (self.explicit and mode != "in_place"):
                self._report(mode, UNREPEATED)
            warn(UNREPEATED[0].upper() + UNREPEATED[1:] + ".")

    def _evaluate(self, units: list[Unit], look: int | None) -> list[Result]:
        """Evaluate units, if need be in one mode after the other, until one is verified; None: it is trusted."""
        # Isolated branches restore by themselves what modules store.
        before = Snapshot(None if self.plan.isolate else self.probes.model, cuda_devices(self.probes.parameters))
        first, reason = self.plan.evaluate, None
        while True:
            results = None
            try:
                results = self.run(units)
                if not self.plan.isolate and before.has_changed():
                    self._change(isolate=True)
                    look = look or 0
                    continue
                if look is None or self._is_reference() or self._agrees(units, look):
                    break
                reason = reason or UNREACHED
            except Exception as error:
                if self._is_reference() or (results is not None and isinstance(error, NO_MEMORY)):
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

    def _reference(self) -> Plan:
        """The mode that others are compared with."""
        return replace(self.plan, evaluate="in_place" if self.probes.dtype is None else "tiles", whole=False)

    def _is_reference(self) -> bool:
        is_copy = self.plan.evaluate == "tiles" and self.plan.whole
        return self.plan.evaluate == self._reference().evaluate and not is_copy

    def _report(self, first: str, reason: str) -> None:
        used = self.plan.evaluate
        if self.explicit:
            remedy = '"auto"' if used == first else f'"{used}" or "auto"'
            raise UsageError(
                f'evaluate="{first}" cannot evaluate this model and loss: {reason}. Use evaluate={remedy}.'
            )
        self.plan = replace(self.plan, reason=f"{first} cannot: {reason}")
        if reason == UNREACHED:  # a mode that raises is replaced silently
            warn(f'evaluate="{first}" would be wrong here: {reason}; "{used}" is used.')

    def _agrees(self, units: list[Unit], look: int) -> bool:
        """Whether a probe has the same losses in the reference mode, on groups of tensors; the next at the next look.

        Its numbers are normal whatever those of the step are: signs often cancel, as in a sum of equal weights.
        """
        groups = self._groups(self.plan.tile_bytes)
        count = min(len(groups), max(1, len({k for unit in units for k in unit.probes}) // 2))  # the cost of a step
        probes = replace(self.probes, key=self.probes.key.at("verify"), noise=noise_of("normal"), sides=(1, -1))
        some = [replace(probes, parameters=groups[(look * count + i) % len(groups)]) for i in range(count)]
        unit = units[0]._replace(probes=range(1), states=units[0].states and units[0].states[:1] * 2)
        try:
            with torch.autocast(self._device, enabled=False):  # whose rounding would hide what is missing
                return all(self._agrees_on(part, unit) for part in some)
        except RuntimeError:  # dtypes that only autocast brings together
            if not torch.is_autocast_enabled(self._device):
                raise
        return all(self._agrees_on(part, unit) for part in some)

    def _agrees_on(self, probes: ProbeContext, unit: Unit) -> bool:
        """Whether both losses of a probe are the same, and if they hardly differ, those of a larger one as well."""
        agrees = self._compare(probes, unit)
        if agrees is None:
            try:
                agrees = self._compare(replace(probes, epsilon=GROWTH * probes.epsilon), unit, larger=True)
            except NO_MEMORY:
                raise
            except Exception:  # a weight may be out of the range that the loss allows
                return True
        return agrees is not False

    def _compare(self, probes: ProbeContext, unit: Unit, larger: bool = False) -> bool | None:
        """Whether both losses of a probe are the same; None: it cannot be told from them."""
        mine, theirs = (self._once(probes, unit, plan) for plan in (self.plan, self._reference()))
        precision, rounding = self._precision(mine, probes.parameters), torch.finfo(mine.dtype).eps
        mine, theirs = mine.double(), theirs.double()
        if larger and not bool((mine + theirs).isfinite().all()):
            return None
        effect, gap, share = (theirs[0] - theirs[1]).abs(), (mine - theirs).abs(), SHARE / (10 if larger else 1)
        bound = ROUNDING * precision * torch.maximum(mine.abs(), theirs.abs())
        told = True if bool((bound <= SHARE * effect).all()) else None
        bound = bound + larger * share * effect
        if mine[0] == mine[1] and effect > 2 * rounding * theirs.abs().max():
            if not larger:
                return False
            bound = 0 * bound
        alike = _alike(mine, theirs, bound)
        if alike.all():
            return told
        base, amplified = self._apart(probes, unit, 0)
        alike |= (gap <= FLOOR * precision) & (gap <= share * (theirs - base).abs())
        if alike.all():
            return told
        if larger:
            amplified = torch.stack([amplified, *(self._apart(probes, unit, side)[1] for side in (1, -1))]).amax()
        if bool((amplified > AMPLIFIED * precision**0.5 * base.abs()).any()):
            return None if larger else False
        return told if bool((alike | (gap <= bound + ROUNDING * amplified)).all()) else False

    def _apart(self, probes: ProbeContext, unit: Unit, side: int) -> tuple[Tensor, Tensor]:
        """The reference's loss with the weights themselves on a side of a probe (0: as they are), and the mode's gap.

        Rounding may be amplified, as in a long recurrence: then the modes differ slightly there as well.
        """
        with InPlace(replace(probes, dtype=None)) as weights, weights.branch(side, 0):
            plans, still = (self.plan, self._reference()), replace(probes, epsilon=0.0)
            mine, theirs = (self._once(still, unit, plan).double() for plan in plans)
        return theirs, (mine - theirs).abs()

    def _groups(self, budget: int) -> list[dict[str, Tensor]]:
        """The tensors that the budget allows to copy, from the smallest to the largest, in groups that it allows."""
        parameters, groups, room = self.probes.parameters, [], 0
        small = {name: p for name, p in parameters.items() if p.nbytes <= budget}
        for name, p in sorted(small.items(), key=lambda item: item[1].nbytes):
            if not groups or p.nbytes > room:
                # Those that a forward pass changes are in all of them, so that they are copied and come back.
                groups.append({n: parameters[n] for n in renormalised(self.probes.model, parameters)})
                room = budget
            groups[-1][name] = p
            room -= p.nbytes
        return groups

    def _precision(self, losses: Tensor, parameters: Mapping[str, Tensor]) -> float:
        """The coarsest unit in the last place of one of all dtypes that an evaluation computes in."""
        dtypes = [losses.dtype, *(self.probes.dtype or p.dtype for p in parameters.values())]
        if torch.is_autocast_enabled(self._device):
            dtypes.append(torch.get_autocast_dtype(self._device))
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    @property
    def _device(self) -> str:
        return next(iter(self.probes.parameters.values())).device.type

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


def _alike(mine: Tensor, theirs: Tensor, bound: Tensor) -> Tensor:
    """Whether losses differ by no more than a bound; where neither is finite they are alike."""
    return (mine == theirs) | ~(mine.isfinite() | theirs.isfinite()) | ((mine - theirs).abs() <= bound)


def repeats(first: Tensor, again: Tensor, precision: float, device: str) -> bool:
    """Whether two losses of the same mode and weights are the same.

    On a CPU the bits of a sum repeat, in bf16 as well, unless memory is aligned differently; atomic sums on a card
    differ by as much as modes may.
    """
    precision = min(precision, torch.finfo(torch.float32).eps)
    within = ROUNDING * precision if device == "cpu" else AMPLIFIED * precision**0.5 + 2 * torch.finfo(first.dtype).eps
    return bool(_alike(first, again, within * first.abs()).all())
