"""CD-RGE: the gradient from forward passes alone, by central differences along seeded random directions.

    ĝ = (1/N) Σ_k (L(θ + ε z_k) − L(θ − ε z_k)) / 2ε · z_k

Exact on average for a quadratic loss, whatever ε; its relative mean squared error is (P − 1)/N for P weights and ±1
noise, so more probes and fewer weights are better, and the step must be small when N ≪ P. Nothing is differentiated:
the loss may be an accuracy, the model a black box, and memory is that of inference.

References: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation",
1992; Chaubard and Kochenderfer, arXiv:2505.17852; Malladi et al., arXiv:2305.17333.
"""

from __future__ import annotations

import contextvars
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reroll.errors import EpsilonTooSmall, UsageError, require_positive
from reroll.grad.base import Estimate, LossFn, Seeded, trainable
from reroll.grad.evaluate.batched import Batched
from reroll.grad.evaluate.in_place import InPlace, snap_to_grid
from reroll.grad.evaluate.plan import MODES, Plan, make_plan
from reroll.grad.evaluate.probing import (
    Evaluator,
    Probing,
    Result,
    Unit,
    batch_rows,
    batch_size,
    split_result,
    with_state,
)
from reroll.grad.evaluate.replicas import Replicas
from reroll.grad.evaluate.tiles import Tiles
from reroll.grad.evaluate.warm import TOO_LOOSE, WarmStarts, iterates
from reroll.grad.probes import SHAPINGS, coefficients
from reroll.kernels.noise_axpy import Noise, noise_of
from reroll.kernels.threads import pool, torch_threads
from reroll.keys import Key
from reroll.outcome import Outcome
from reroll.rollout.watch import watching
from reroll.trees import combine_states

Evaluate = Literal["auto", "in_place", "tiles", "batched"]
"""How perturbed losses are computed; see `reroll.grad.evaluate`."""


@dataclass(frozen=True)
class CentralDifference:
    """Estimate a gradient by central differences along N random directions.

    Args:
        probes: N, directions per step; the cost grows with N, the error falls as 1/√N.
        epsilon: ε, how far a probe goes; in fp32 about 1e-3 … 0.1 (see `probe_snr` in the stats).
        noise: "rademacher", "normal", or "sparse" with `density`; or a `Noise`.
        evaluate: "auto", "in_place", "tiles" or "batched" (see `reroll.grad.evaluate`).
        batch: "shared": every probe sees the whole batch; "split": the probes share it out. For the same number of
            forward passes over sequences, "split" affords more probes: better while the loss is little noisy.
        dtype: evaluate in this dtype, torch.bfloat16 say, and keep the weights as they are; None is the weights' own.
        shaping: "raw", "zscore", "rank" or "sign" of the differences.
        difference: "central", or "one_sided": N + 1 forward passes instead of 2N, and an error of order ε.
        density: of sparse noise, a negative power of two; None is ½.
        restore: for "in_place": "copy" keeps a pristine copy, "grid" rounds fp32 weights so that none is needed.
        micro_batch: most sequences evaluated at once; bounds the memory of activations. None: the whole batch.
        per_branch_state: carry a state per branch instead of one for all (NRES); give every window of an episode the
            same key.
        chunk, threads, workers: probes of a unit, torch threads of a unit, units at a time; None: by static rules.
        sums: "fp32" or "fp64", for sums over probes.

    Raises:
        UsageError: naming the argument that is out of range.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> def loss_fn(model, x):
        ...     return model(x).square().mean()
        >>> estimate = CentralDifference(probes=8, epsilon=1e-2)(model, loss_fn, torch.ones(5, 3), Key(0).at(0))
        >>> estimate.outcome, estimate.stats["forward_passes"], model.weight.grad
        (<Outcome.ok: ...>, 16, None)
    """

    probes: int
    epsilon: float
    noise: str | Noise = "rademacher"
    evaluate: Evaluate = "auto"
    batch: Literal["shared", "split"] = "shared"
    dtype: torch.dtype | None = None
    shaping: Literal["raw", "zscore", "rank", "sign"] = "raw"
    difference: Literal["central", "one_sided"] = "central"
    density: float | None = None
    restore: Literal["copy", "grid"] = "copy"
    micro_batch: int | None = None
    per_branch_state: bool = False
    chunk: int | None = None
    threads: int | None = None
    workers: int | None = None
    sums: Literal["fp32", "fp64"] = "fp32"

    def __post_init__(self) -> None:
        require_positive(
            probes=self.probes, epsilon=self.epsilon, micro_batch=self.micro_batch, chunk=self.chunk,
            threads=self.threads, workers=self.workers, density=self.density,
        )  # fmt: skip
        choices = {
            "batch": ("shared", "split"),
            "shaping": SHAPINGS,
            "difference": ("central", "one_sided"),
            "restore": ("copy", "grid"),
            "sums": ("fp32", "fp64"),
            "evaluate": ("auto", *MODES),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f'{name}="{getattr(self, name)}" must be {" or ".join(known)}.')
        _ = self.directions  # says what is wrong with it
        one_sided = self.difference == "one_sided"
        pairs = [
            (one_sided and self.batch == "split", 'batch="split" and difference="one_sided"',
             "a probe's loss is of its own sequences, the unperturbed one of all"),
            (one_sided and self.per_branch_state, 'per_branch_state=True and difference="one_sided"',
             "the unperturbed model has no state of its own among the branches"),
            (self.per_branch_state and self.micro_batch, f"per_branch_state=True and micro_batch={self.micro_batch}",
             "the states of branches are not cut by sequences"),
        ]  # fmt: skip
        for broken, pair, reason in pairs:
            if broken:
                raise UsageError(f"{pair} exclude each other: {reason}. Drop one of them.")

    @functools.cached_property
    def directions(self) -> Noise:
        """What directions are made of, density included."""
        if isinstance(self.noise, Noise) or self.density is None:
            return noise_of(self.noise) if isinstance(self.noise, str) else self.noise
        if self.noise != "sparse":
            raise UsageError(f'density={self.density} is for noise="sparse"; noise is "{self.noise}".')
        return noise_of(f"sparse:{self.density}")

    def __call__(self, model: nn.Module, loss_fn: LossFn, batch: Any, key: Key) -> Estimate:
        """Estimate the gradient of the loss; see `reroll.grad.base.Estimator`.

        Raises:
            UsageError: if the loss has a shape that cannot be used, the batch cannot be cut as asked, or ε is too small
                for the precision of the evaluation.
        """
        return self.estimate(trainable(model), loss_fn, batch, key, model=model)

    def plan(self, model: nn.Module | None, parameters: Mapping[str, Tensor], batch: Any = None) -> Plan:
        """Return how the probes of this model would be evaluated on such a batch, and why."""
        return make_plan(
            model, parameters, self.probes, batch=batch, evaluate=self.evaluate, chunk=self.chunk, threads=self.threads,
            workers=self.workers, dtype=self.dtype, sides=2 if self.difference == "central" else 1,
        )  # fmt: skip

    @torch.no_grad()
    def estimate(
        self,
        parameters: Mapping[str, Tensor],
        loss_fn: LossFn,
        batch: Any,
        key: Key,
        *,
        model: nn.Module | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> Estimate:
        """Estimate the gradient with respect to these tensors; what `__call__` does for those of a module.

        Args:
            parameters: the tensors by name; the names fix the noise.
            loss_fn: (model, batch) → loss, or (loss, state).
            batch: given to `loss_fn`, cut by rows where probes share it out.
            key: the key of this step.
            model: the module, if there is one: it decides how probes can be evaluated.
            scales: a factor on ε per tensor.
        """
        if not isinstance(key, Key):
            raise UsageError(f"key={key!r} must be a Key, such as reroll.Key(seed).at(step).")
        plan = self.plan(model, parameters, batch)
        epsilon = self._usable_epsilon(parameters, plan, scales or {})
        # Without a module to look at, whether something iterates inside the loss shows when it is called.
        warm = WarmStarts(loss_fn) if model is None or iterates(model) else None
        probing = Probing(
            parameters=parameters, call=warm or loss_fn, key=key, epsilon=epsilon, noise=self.directions,
            sides=(1, -1) if self.difference == "central" else (1,), dtype=self.dtype, scales=scales or {}, model=model,
            isolate=plan.isolate,
        )  # fmt: skip
        units = self._units(batch, plan)
        if warm is not None and model is not None:
            with probing.isolated() as rewind:
                rewind()
                warm.prepare(model, [with_state(unit.batch, unit.states and unit.states[0]) for unit in units])
        before = bit_sums(parameters)
        with _evaluator(plan, probing, self.restore) as evaluator, watching() as seen:
            results = _run(evaluator, units, plan)
            error = None
            if warm is not None and seen.calls:
                error = warm.error(units, results, lambda some: _run(evaluator, some, plan))
        after_probing = bit_sums(parameters)
        losses, states = self._gather(units, results)
        clean, after, passes = None, None, 0
        if self.difference == "one_sided" or (getattr(batch, "state", None) is not None and not self.per_branch_state):
            clean, after, passes = self._clean(probing, batch, plan)
        found = coefficients(losses, epsilon, self.shaping, clean if self.difference == "one_sided" else None)
        gradient = Seeded.of(
            key, found.values, self.directions, parameters, scales=_inverse(scales),
            sums=torch.float64 if self.sums == "fp64" else None,
        )  # fmt: skip
        stats = {
            "forward_passes": sum(len(unit.probes) * len(probing.sides) for unit in units) + passes,
            "drift": sum(before[name] != after_probing[name] for name in before),
            "lost_probes": found.lost, "spread": found.spread, "probe_snr": found.snr, "epsilon": epsilon,
            "evaluate": plan.evaluate, "chunk": plan.chunk, "threads": plan.threads, "workers": plan.workers,
            "reason": plan.reason, "extra_bytes": plan.extra_bytes(parameters, self.restore, self.dtype),
        }  # fmt: skip
        outcome = Outcome.ok if not found.lost else Outcome.some_probes_lost
        if warm is not None:
            stats["forward_passes"] += warm.passes
        scale = found.spread or found.rms  # one probe has no spread
        if error is not None and scale > 0:
            stats["solver_error"] = error / scale
            if outcome is Outcome.ok and stats["solver_error"] > TOO_LOOSE:
                outcome = Outcome.solver_too_loose
        if found.lost == self.probes:
            outcome = Outcome.all_probes_lost
        return Estimate(found.loss, gradient, outcome, stats, states if self.per_branch_state else after)

    def _usable_epsilon(self, parameters: Mapping[str, Tensor], plan: Plan, scales: Mapping[str, float]) -> float:
        """Return ε, on the grid if weights are restored by one; raise if it is too small for the precision."""
        for name, p in parameters.items():
            typical = float(torch.linalg.vector_norm(p)) / max(p.numel(), 1) ** 0.5
            # Two units in the last place of a weight of typical size: below, rounding decides where a probe goes.
            smallest = torch.finfo(self.dtype or p.dtype).eps * 2.0 ** math.frexp(typical)[1]
            own = self.epsilon * scales.get(name, 1.0)
            if own < smallest:
                raise EpsilonTooSmall(
                    f"epsilon={own:g} is below two units in the last place of {name} ({smallest:.2g} in "
                    f"{str(self.dtype or p.dtype).removeprefix('torch.')}); raise it, or evaluate in a wider dtype."
                )
        if plan.evaluate == "in_place" and self.restore == "grid":
            return snap_to_grid(parameters, self.epsilon, self.directions)
        return self.epsilon

    def _units(self, batch: Any, plan: Plan) -> list[Unit]:
        """Cut the step into units: probes by `chunk`, the batch by `micro_batch`, or one part per group of probes."""
        size = batch_size(batch)
        parts = self._shares(size) if self.batch == "split" else [(range(self.probes), 0, size, False)]
        states = getattr(batch, "state", None) if self.per_branch_state else None
        units = []
        for probes, begin, end, single in parts:
            for row in _pieces(begin, end, self.micro_batch):
                part = batch if row is None or row == (0, size) else batch_rows(batch, *row)
                for first in range(probes.start, probes.stop, plan.chunk):
                    chunk = range(first, min(first + plan.chunk, probes.stop))
                    units.append(Unit(chunk, part, _own_states(states, chunk, self.probes), single))
        return units

    def _shares(self, size: int | None) -> list[tuple[range, int | None, int | None, bool]]:
        """Give every group of probes its own sequences: as many groups as there are probes or sequences."""
        if size is None:
            raise UsageError('batch="split" needs a batch that can be cut by sequences; this one has no first axis.')
        groups = min(self.probes, size)
        shares = []
        for g in range(groups):
            begin, end = size * g // groups, size * (g + 1) // groups
            probes = range(self.probes * g // groups, self.probes * (g + 1) // groups)
            shares.append((probes, begin, end, end - begin == 1 and size > 1))
        return shares

    def _gather(self, units: list[Unit], results: list[Result]) -> tuple[Tensor, Any]:
        """Put the losses of all units into one [sides, N]; parts of the batch count by their sequences."""
        sides = results[0].losses.shape[0]
        dtype = torch.float64 if results[0].losses.dtype == torch.float64 else torch.float32
        total = torch.zeros(sides, self.probes, dtype=torch.float64)
        weight = torch.zeros(self.probes, dtype=torch.float64)
        states: list[Any] = [None] * (sides * self.probes)
        for unit, result in zip(units, results):
            rows, probes = batch_size(unit.batch) or 1, slice(unit.probes.start, unit.probes.stop)
            # Losses travel as fp32, in unit order, however many workers or ranks computed them.
            total[:, probes] += result.losses.to(dtype).cpu().double() * rows
            weight[probes] += rows
            for index, state in enumerate(result.states):
                side, i = divmod(index, len(unit.probes))
                states[side * self.probes + unit.probes.start + i] = state
        return (total / weight).to(dtype), BranchStates(states)

    def _clean(self, probing: Probing, batch: Any, plan: Plan) -> tuple[Tensor, Any, int]:
        """Evaluate the unperturbed model as branches are, in their dtype and micro-batches.

        Returns:
            Its loss, the state it carries on, and the number of evaluations.
        """
        size = batch_size(batch)
        parts = [
            batch if row is None or row == (0, size) else batch_rows(batch, *row)
            for row in _pieces(0, size, self.micro_batch)
        ]
        if self.dtype is None:
            # The weights themselves are what the branches are perturbed copies of.
            with probing.isolated() as rewind:
                found = []
                for part in parts:
                    rewind()
                    found.append(split_result(probing.call(probing.model, part), single=False))
        else:
            # A branch of size zero is the model in another dtype.
            still = replace(probing, epsilon=0.0, sides=(1,))
            with _evaluator(plan, still, "copy") as evaluator:
                results = _run(evaluator, [Unit(range(1), part) for part in parts], plan)
            found = [(result.losses.flatten()[0], result.states[0]) for result in results]
        if len(parts) == 1:
            return found[0][0].cpu(), found[0][1], 1
        rows = [batch_size(part) or 1 for part in parts]
        total = sum(loss.cpu().double() * count for (loss, _), count in zip(found, rows)) / sum(rows)
        assert isinstance(total, Tensor)
        return total.to(found[0][0].dtype), combine_states([state for _, state in found], torch.cat), len(parts)


class BranchStates(list[Any]):
    """The carried states of all branches of a step, L⁺ of every probe and then L⁻; `Batch.state` for NRES."""


def _own_states(states: Any, probes: range, total: int) -> list[Any] | None:
    """The states of a unit's branches: its own part of `BranchStates`, or the same start for all."""
    if states is None:
        return None
    if not isinstance(states, BranchStates):
        return [states] * (2 * len(probes))
    return [states[side * total + k] for side in range(len(states) // total) for k in probes]


def _pieces(begin: int | None, end: int | None, most: int | None) -> list[tuple[int, int] | None]:
    if begin is None or end is None:
        return [None]
    step = most or max(end - begin, 1)
    return [(first, min(first + step, end)) for first in range(begin, end, step)] or [(begin, end)]


def _inverse(scales: Mapping[str, float] | None) -> dict[str, float]:
    # Probing a tensor with s·ε gives coefficients that estimate s times its gradient.
    return {name: 1.0 / scale for name, scale in (scales or {}).items()}


def bit_sums(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the sum of every tensor's bit patterns. A tensor that probing left changed has another one."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = {}
    for name, p in parameters.items():
        patterns = p.detach().view(words[p.element_size()]).flatten()
        # In pieces: torch makes an int64 copy of what it sums in int64.
        sums[name] = sum(int(piece.sum(dtype=torch.int64)) for piece in patterns.split(1 << 16))
    return sums


def _evaluator(plan: Plan, probing: Probing, restore: str) -> Evaluator:
    if plan.evaluate == "batched":
        return Batched(probing)
    if plan.evaluate == "tiles":
        return Replicas(probing) if plan.whole else Tiles(probing, plan.tile_bytes)
    return InPlace(probing, restore)


def _run(evaluator: Evaluator, units: list[Unit], plan: Plan) -> list[Result]:
    """Evaluate the units, several at a time, each with the plan's number of threads; results in the order of units."""

    def one(unit: Unit) -> Result:
        with torch.no_grad():
            return evaluator.losses(unit)

    if plan.workers > 1:
        # Each unit runs in a copy of this context, so that a forced implementation holds in the workers too.
        workers = pool(plan.workers, plan.threads)
        futures = [workers.submit(contextvars.copy_context().run, one, unit) for unit in units]
        return [future.result() for future in futures]
    with torch_threads(plan.threads):
        return [one(unit) for unit in units]
