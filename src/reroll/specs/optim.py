"""The update rule, and its learning rate over time."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from reroll.errors import UsageError
from reroll.specs.base import OBJECT, ObjectSpec, Spec, exclude, option, runtime


@dataclass(frozen=True)
class ScheduleSpec(Spec):
    """A multiplier of the learning rate for every step: a linear warm-up, then constant.

    Example:
        >>> [round(Linear(warmup=2, warmdown=4)(t, 10), 2) for t in range(10)]
        [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    """

    kind: str = option("constant", "learning rate over time")
    warmup: int = option(0, "steps of linear warm-up", within="[0, 2**31]")

    def __call__(self, step: int, steps: int) -> float:
        """Return the multiplier of a step, from 0, of `steps`; past the end, the last value."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return self.shape(max(steps - step, 0), max(steps - self.warmup, 1))

    def shape(self, left: int, rest: int) -> float:
        """Return the multiplier with `left` of the `rest` steps after the warm-up still to come."""
        return 1.0


@dataclass(frozen=True)
class Cosine(ScheduleSpec):
    """floor + (1 − floor) · ½ (1 + cos π x), x from 0 to 1 after the warm-up."""

    kind: str = option("cosine", "learning rate over time")
    floor: float = option(0.0, "where the schedule ends, as a share of the learning rate", within="[0, 1]")

    def shape(self, left: int, rest: int) -> float:
        return self.floor + (1 - self.floor) * (0.5 * (1 - math.cos(math.pi * min(left / rest, 1.0))))


@dataclass(frozen=True)
class Linear(ScheduleSpec):
    """1, then a linear decay to `floor` over the last steps ("warm-down", the trapezoid of the speedruns)."""

    kind: str = option("linear", "learning rate over time")
    floor: float = option(0.0, "where the schedule ends, as a share of the learning rate", within="[0, 1]")
    warmdown: int | None = option(None, "steps of the final decay; none: all after the warm-up", within="[1, 2**31]")

    def shape(self, left: int, rest: int) -> float:
        return self.floor + (1 - self.floor) * min(left / min(self.warmdown or rest, rest), 1.0)


SCHEDULES: dict[str, type[ScheduleSpec]] = {"constant": ScheduleSpec, "linear": Linear, "cosine": Cosine}
"""Every schedule by name."""


@dataclass(frozen=True)
class OptimizerSpec(Spec):
    """An update rule."""

    fuses: ClassVar[bool] = False
    """Whether a seeded gradient can be added to the weights, or to their momentum, as it is generated."""
    lr: float | Literal["auto"] = option(0.1, "learning rate; auto: search for one", flag="lr")
    embedding_lr: float | None = option(None, "learning rate of the embedding; none: lr")
    head_lr: float | None = option(None, "learning rate of the head; none: lr")
    vector_lr: float | None = option(None, "learning rate of biases, gains and initial states; none: lr")
    weight_decay: float = option(0.0, "decoupled weight decay of matrices", within="[0, 1e18]")
    clip: float | None = option(None, "maximum gradient norm; none: no clipping", flag="clip")
    update: Literal["auto", "write", "stream", "fused"] = option("auto", "how the gradient is applied to the weights")
    average: float | None = option(
        None, "decay of a running average of the weights, used for evaluation; none: no average", within="[0, 1)"
    )
    plateau: int = option(
        0, "steps without improvement before learning rate and ε are reduced; 0: never", within="[0, 2**31]"
    )
    plateau_factor: float = option(0.5, "factor of learning rate and ε on a plateau", within="(0, 1]")
    search_low: float = option(1e-5, "lr=auto: smallest rate tried")
    search_high: float = option(0.1, "lr=auto: largest rate tried")
    search_steps: int = option(10, "lr=auto: steps per rate")
    schedule: ScheduleSpec = option(ScheduleSpec(), "learning rate over time", flag="schedule", kinds=SCHEDULES)

    def check(self) -> None:
        super().check()
        own_rates = self.embedding_lr or self.head_lr or self.vector_lr
        exclude((self.lr == "auto" and own_rates, "lr=auto and a rate of a role", "the latter are relative to lr"))
        if self.search_low >= self.search_high:
            raise UsageError(f"search_low={self.search_low} must be below search_high={self.search_high}.")
        if self.update == "fused" and not self.fuses:
            raise UsageError(f'update="fused" is for optimizer=sgd; optimizer={self.kind} needs update="stream".')

    def build(self, model: Any, lr: float) -> Any:
        """Return the optimizer over the parameters of a model."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _COMMON}
        rates = {role: getattr(self, f"{role}_lr") for role in ("embedding", "head", "vector")}
        scales = {role: rate / lr for role, rate in rates.items() if rate is not None}
        make = runtime("optim:build_optimizer")
        return make(self.kind, model, lr, weight_decay=self.weight_decay, lr_scales=scales, **own)

    def momentum_at(self, step: int) -> float | None:
        """Return the momentum at a step; None: the optimizer's own."""
        return None


_COMMON = {f.name for f in fields(OptimizerSpec)} | {"momentum_start", "momentum_warmup"}


@dataclass(frozen=True)
class Momentum(OptimizerSpec):
    """A rule with momentum, and a warm-up of it."""

    momentum: float = option(
        0.9, "momentum of sgd and muon; 0: none (sgd: no state either)", flag="momentum", within="[0, 1)"
    )
    momentum_start: float = option(0.85, "momentum at the start of its warm-up", within="[0, 1)")
    momentum_warmup: int = option(0, "steps of linear momentum warm-up", within="[0, 2**31]")

    def momentum_at(self, step: int) -> float | None:
        if not self.momentum_warmup:
            return None
        share = min(step / self.momentum_warmup, 1.0)
        return (1 - share) * self.momentum_start + share * self.momentum


@dataclass(frozen=True)
class SGD(Momentum):
    """Gradient descent, with momentum."""

    kind: str = option("sgd", "the update rule")
    fuses: ClassVar[bool] = True


@dataclass(frozen=True)
class AdamW(OptimizerSpec):
    """Adam with decoupled weight decay."""

    kind: str = option("adamw", "the update rule")
    betas: tuple[float, float] = option((0.9, 0.999), "decay of the two moments", within="[0, 1)")
    eps: float = option(1e-8, "added to the root of the second moment")


@dataclass(frozen=True)
class Muon(Momentum):
    """Orthogonalised updates of hidden matrices; AdamW for the rest."""

    kind: str = option("muon", "the update rule")
    betas: tuple[float, float] = option((0.9, 0.999), "AdamW: decay of the two moments", within="[0, 1)")
    eps: float = option(1e-8, "AdamW: added to the root of the second moment")
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = option(
        "match_rms_adamw", "factor of the rate by shape: original, √max(1, m/n), or match_rms_adamw, 0.2 √max(m, n)"
    )
    nesterov: bool = option(True, "orthogonalise gradient plus momentum, rather than the momentum alone")
    ns_coefficients: Literal["jordan", "polar_express", "turbo", "svd"] = option(
        "jordan", "how matrices are orthogonalised: coefficients of Newton–Schulz steps, or svd, exactly"
    )
    ns_steps: int | None = option(None, "Newton–Schulz steps; none: 5, of turbo 4")
    normalize_rows: bool = option(False, "divide rows by their length before they are orthogonalised (MuonEq-R)")
    beta2: float | None = option(None, "decay of the rows' second moment (NorMuon); none: plain Muon", within="[0, 1)")
    cautious: bool = option(False, "decay only weights that the update moves towards zero")


@dataclass(frozen=True)
class ObjectOptimizer(ObjectSpec, OptimizerSpec):
    """An optimizer that was passed in: `lr` is its first group's rate, and the others keep their ratio to it."""


OPTIMIZERS: dict[str, type[OptimizerSpec]] = {"sgd": SGD, "adamw": AdamW, "muon": Muon, OBJECT: ObjectOptimizer}
"""Every optimizer by name."""
