"""CD-RGE: the gradient from forward passes alone, by central differences along seeded random directions.

    ĝ = (1/N) Σ_k (L(θ + ε z_k) − L(θ − ε z_k)) / 2ε · z_k

Unbiased for a quadratic loss at any ε; its relative mean squared error is (P − 1)/N for P weights and ±1
noise, so more probes and fewer weights are better, and the step must be small when N ≪ P. Nothing is differentiated:
the loss may be an accuracy, the model a black box, and the memory is that of inference.

References: Spall, "Multivariate stochastic approximation using a simultaneous perturbation gradient approximation",
1992; Chaubard and Kochenderfer, arXiv:2505.17852; Malladi et al., arXiv:2305.17333.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from reroll.errors import UsageError, did_you_mean, warn
from reroll.grad.base import Estimate, LossFn, Seeded, padding_rows, trainable
from reroll.grad.checks import check_epsilon
from reroll.grad.evaluate.base import ProbeContext, split_result
from reroll.grad.evaluate.in_place import snap_to_grid
from reroll.grad.evaluate.plan import Plan, make_plan
from reroll.grad.evaluate.verify import Evaluation
from reroll.grad.evaluate.warm import TOO_LOOSE, WarmStarts, iterates
from reroll.grad.probes import RULES, Coefficients, coefficients
from reroll.grad.units import Distribute, batch_size, cut, gather, with_state
from reroll.kernels.noise_axpy import Noise, noise_of
from reroll.keys import Key
from reroll.outcome import Outcome
from reroll.rollout.monitor import current, monitoring
from reroll.specs.gradient import ProbeOptions
from reroll.trees import combine_states, map_state

Evaluate = Literal["auto", "in_place", "tiles", "batched"]
"""How perturbed losses are computed; see `reroll.grad.evaluate`."""


@dataclass(frozen=True)
class CentralDifference(ProbeOptions):
    """Estimate a gradient by central differences along N random directions.

    Args:
        probes: N, directions per step; the cost grows with N, the error falls as 1/√N.
        epsilon: ε, the size of a probe; in fp32 about 1e-3 … 0.1 (see `probe_snr` in the stats).
        noise: "rademacher", "normal", or "sparse" with `density`; or a `Noise`.
        evaluate: "auto", "in_place", "tiles" or "batched" (see `reroll.grad.evaluate`).
        batch: "shared": every probe sees the whole batch; "split": the batch is divided among the probes. For the
            same number of sequence evaluations "split" affords more probes: better while the loss has little noise.
        dtype: evaluate in this dtype, such as torch.bfloat16, and leave the weights as they are; None: their own.
        shaping: "raw", "zscore", "rank" or "sign" of the differences.
        difference: "central", or "one_sided": N + 1 forward passes instead of 2N, and an error of order ε.
        density: of sparse noise, a negative power of two; None is ½.
        restore: for "in_place": "copy" keeps a pristine copy, "grid" rounds fp32 weights so that none is needed.
        micro_batch: the most sequences evaluated at once, which bounds activation memory. None: the whole batch.
        per_branch_state: carry a state per branch instead of one for all (NRES); use the same key for every window of
            an episode.
        chunk, threads, workers: probes per unit, torch threads per unit, units at a time; None: by static rules.
        sums: "fp32" or "fp64", for sums over probes.
        execute: who evaluates the units of a step (see `reroll.grad.units`); None: threads of this process.

    Every branch of a step sees the same random numbers from torch's global generators, whose state is restored
    afterwards. A loss that draws its data from them does not advance them: draw the data before, and pass it as the
    batch.

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

    probes: int = field()
    epsilon: float = field()
    noise: str | Noise = "rademacher"  # pyright: ignore[reportIncompatibleVariableOverride]: a name, or what it names
    _: KW_ONLY
    dtype: torch.dtype | None = None
    per_branch_state: bool = False
    threads: int | None = None
    execute: Distribute | None = None

    def __post_init__(self) -> None:
        if self.difference not in RULES:
            raise UsageError(f'difference="{self.difference}" is no rule.{did_you_mean(self.difference, RULES)}')
        self.check()
        _ = self.directions  # raises if the noise is unknown

    @property
    def takes_clean_loss(self) -> bool:
        return RULES[self.difference].clean

    @functools.cached_property
    def directions(self) -> Noise:
        """What directions are made of, density included."""
        if isinstance(self.noise, Noise) or self.density is None:
            return noise_of(self.noise) if isinstance(self.noise, str) else self.noise
        return noise_of(f"sparse:{self.density}")

    def __call__(self, model: nn.Module, loss_fn: LossFn, batch: Any, key: Key) -> Estimate:
        """Estimate the gradient of the loss; see `reroll.grad.base.Estimator`."""
        return self.estimate(trainable(model), loss_fn, batch, key, model=model)

    def plan(
        self, model: nn.Module | None, parameters: Mapping[str, Tensor], batch: Any = None, copies: bool = True
    ) -> Plan:
        """Return how the probes of this model would be evaluated on such a batch, and why."""
        return make_plan(model, parameters, batch, self, len(RULES[self.difference].sides), copies)

    @torch.no_grad()
    def estimate(
        self, parameters: Mapping[str, Tensor], loss_fn: LossFn, batch: Any, key: Key, *,
        model: nn.Module | None = None, scales: Mapping[str, float] | None = None,
        combine: Callable[[Tensor], Tensor] | None = None, copies: bool = True,
    ) -> Estimate:  # fmt: skip
        """Estimate the gradient with respect to these tensors; what `__call__` does for those of a module.

        Args:
            parameters: the tensors by name; the names fix the noise.
            model: the module, if there is one: it decides how probes can be evaluated.
            scales: a factor on ε per tensor.
            combine: maps the losses of all branches, [sides, N], to those to use: their means over processes.
            copies: whether the loss evaluates the module that it is given, which may be a copy.
        """
        if not isinstance(key, Key):
            raise UsageError(f"key={key!r} must be a Key, such as reroll.Key(seed).at(step).")
        plan, rule = self.plan(model, parameters, batch, copies), RULES[self.difference]
        # Without a module to inspect, only a call shows whether something iterates inside the loss.
        warm = WarmStarts(loss_fn) if model is None or iterates(model) else None
        probes = self._context(parameters, warm or loss_fn, key, plan, model, scales or {})
        states = getattr(batch, "state", None)
        carried = states is not None and not self.per_branch_state
        units = cut(
            batch, self.probes, plan.chunk, split=self.batch == "split", micro_batch=self.micro_batch,
            states=states if self.per_branch_state else None,
        )  # fmt: skip
        # Weights that the plan did not snap to a grid need a copy, should they be evaluated in place after all.
        restore = self.restore if plan.evaluate == "in_place" else "copy"
        evaluation = Evaluation(probes, plan, restore, self.evaluate != "auto", self.execute)
        with _casting(model, self.dtype):
            if warm is not None and model is not None:
                with probes.isolated(model) as rewind:
                    rewind()
                    warm.prepare(model, [with_state(unit.batch, unit.states and unit.states[0]) for unit in units])
            with monitoring() as seen:
                results = evaluation.run_verified(units, loss_fn)
                error = warm.error(units, results, evaluation.run) if warm is not None and seen.calls else None
            losses, branches = gather(units, results, self.probes)
            losses = losses if combine is None else combine(losses)
            clean, after, passes = None, None, 0
            if rule.clean or carried:
                clean, after, passes = self._clean(evaluation, batch)
        coefs = coefficients(losses, probes.epsilon, self.shaping, self.difference, clean if rule.clean else None)
        gradient = Seeded.of(
            key, coefs.values, self.directions, parameters, scales={n: 1.0 / s for n, s in probes.scales.items()},
            sums=torch.float64 if self.sums == "fp64" else None, padding=probes.padding,
        )  # fmt: skip
        passes += sum(len(unit.probes) * len(rule.sides) for unit in units) + (warm.passes if warm else 0)
        stats = {"forward_passes": passes, **self._stats(coefs, evaluation)}
        outcome = _outcome(coefs, error, stats)
        if outcome is Outcome.no_difference:
            check_epsilon(parameters, self.epsilon, probes.scales, self.dtype, again=True)
            if current() is None:  # a monitor reports it itself
                warn(outcome.value)
        return Estimate(coefs.loss, gradient, outcome, stats, branches if self.per_branch_state else after)

    def _context(
        self, parameters: Mapping[str, Tensor], call: LossFn, key: Key, plan: Plan, model: nn.Module | None,
        scales: Mapping[str, float],
    ) -> ProbeContext:  # fmt: skip
        check_epsilon(parameters, self.epsilon, scales, self.dtype)
        epsilon = self.epsilon
        if plan.evaluate == "in_place" and self.restore == "grid":
            epsilon = snap_to_grid(parameters, epsilon, self.directions)
        return ProbeContext(
            parameters=parameters, call=call, key=key, epsilon=epsilon, noise=self.directions, dtype=self.dtype,
            sides=RULES[self.difference].sides, scales=scales, model=model, isolate=plan.isolate,
            padding=padding_rows(model, parameters),
        )  # fmt: skip

    def _stats(self, coefs: Coefficients, evaluation: Evaluation) -> dict[str, Any]:
        plan, probes = evaluation.plan, evaluation.probes
        return {
            "lost_probes": coefs.lost, "spread": coefs.spread, "probe_snr": coefs.snr, "epsilon": probes.epsilon,
            "evaluate": plan.evaluate, "chunk": plan.chunk, "threads": plan.threads, "workers": plan.workers,
            "reason": plan.reason, "extra_bytes": plan.extra_bytes(probes.parameters, evaluation.restore, self.dtype),
        } | ({} if evaluation.drift is None else {"drift": evaluation.drift})  # fmt: skip

    def _clean(self, evaluation: Evaluation, batch: Any) -> tuple[Tensor, Any, int]:
        """The unperturbed model's loss, in the dtype and micro-batches of branches; the state after it; evaluations."""
        units = cut(batch, 1, 1, micro_batch=self.micro_batch)
        probes, results = evaluation.probes, []
        if self.dtype is None:
            # The branches are perturbed copies of these very weights.
            with probes.isolated(probes.model) as rewind:
                for unit in units:
                    rewind()
                    results.append(split_result(probes.call(probes.model, unit.batch)))
        else:
            # A branch of size zero is the model in another dtype.
            unperturbed = replace(evaluation, probes=replace(probes, epsilon=0.0, sides=(1,)))
            results = [(result.losses.flatten()[0], result.states[0]) for result in unperturbed.run(units)]
        if len(units) == 1:
            return results[0][0].cpu(), results[0][1], 1
        rows = [batch_size(unit.batch) or 1 for unit in units]
        total = torch.zeros((), dtype=torch.float64)
        for (loss, _), count in zip(results, rows):  # in this order: a sum over a stack may use another
            total = total + loss.cpu().double() * count
        total = total / sum(rows)
        return total.to(results[0][0].dtype), combine_states([state for _, state in results], torch.cat), len(units)


def _outcome(coefs: Coefficients, error: float | None, stats: dict[str, Any]) -> Outcome:
    """The outcome of the step; adds the solver's error, if there is one, to `stats`."""
    loose = False
    scale = coefs.spread or coefs.rms  # one probe has no spread
    if error is not None and scale > 0:
        stats["solver_error"] = error / scale
        loose = stats["solver_error"] > TOO_LOOSE
    if coefs.lost == len(coefs.values):
        return Outcome.all_probes_lost
    if coefs.rms == 0:
        return Outcome.no_difference
    if coefs.lost:
        return Outcome.some_probes_lost
    return Outcome.solver_too_loose if loose else Outcome.ok


@contextmanager
def _casting(model: nn.Module | None, dtype: torch.dtype | None) -> Iterator[None]:
    """Cast the model's floating-point inputs to the dtype of the evaluation."""
    if model is None or dtype is None:
        yield
        return
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            f"dtype={dtype} cannot evaluate a ScriptModule; pass dtype=None, and convert it by model.to()."
        )

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    hook = model.register_forward_pre_hook(lambda _, args, kwargs: map_state((args, kwargs), cast), with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
