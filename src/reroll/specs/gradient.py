"""Where the gradient comes from."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, Literal

from reroll.errors import UsageError
from reroll.specs.base import OBJECT, Handed, Options, Spec, exclude, option, runtime


@dataclass(frozen=True)
class GradientSpec(Spec):
    """A source of gradients, as differentiation is: one whole gradient in `.grad`, nothing to replay."""

    seeded: ClassVar[bool] = False
    """Whether a gradient is coefficients of seeded noise: it is journaled, replayed, streamed into the weights."""
    knobs: ClassVar[str] = "lr"
    """What to lower when a run diverges."""

    @property
    def per_branch_state(self) -> bool:
        """Whether every branch carries a state of its own."""
        return False

    @property
    def is_tied(self) -> bool:
        """Whether ε follows the learning rate."""
        return False

    def episode_begin(self, step: int) -> int:
        """Return the first step of the episode that a step is in."""
        return step

    def epsilon_at(self, lr: float, multiplier: float = 1.0) -> float:
        """Return ε at a learning rate and the multiplier of plateaus; a gradient without ε ignores it."""
        return lr

    def build(self, epsilon: float, run: Any) -> Any:
        """Return the `reroll.grad.base.Estimator`.

        Args:
            epsilon: ε, where there is one.
            run: the section [run]; its threads and dtype.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ProbeOptions(Options):
    """What `reroll.CentralDifference` and the config of a run by probes have in common."""

    probes: int = option(96, "directions per step: the cost grows with it, the error as 1/√N", flag="probes")
    epsilon: float | None = option(None, "size of a probe; none: tied to the learning rate", flag="epsilon")
    noise: str = option("rademacher", "what a direction is made of: rademacher, normal or sparse", flag="noise")
    evaluate: Literal["auto", "in_place", "tiles", "batched"] = option(
        "auto", "how perturbed losses are computed", flag="evaluate"
    )
    batch: Literal["shared", "split"] = option("shared", "every probe sees the whole batch, or they share it out")
    _: KW_ONLY
    shaping: Literal["raw", "zscore", "rank", "sign"] = option("raw", "what of a loss difference is kept")
    difference: str = option("central", "central: both signs of a probe; one_sided: one, and the clean loss")
    density: float | None = option(None, "share of non-zero coordinates of sparse noise: 1/2, 1/4 …")
    restore: Literal["copy", "grid"] = option("copy", "in_place: keep a copy, or round the weights to a grid")
    micro_batch: int | None = option(None, "most sequences evaluated at once; none: the batch")
    chunk: int | None = option(None, "probes of a unit; none: by static rules")
    workers: int | None = option(None, "units at a time; none: by static rules", within="[1, 1024]")
    sums: Literal["fp32", "fp64"] = option("fp32", "precision of sums over probes")

    def check(self) -> None:
        super().check()
        if self.density is not None and self.noise != "sparse":
            raise UsageError(f'density={self.density} is for noise="sparse"; noise is "{self.noise}".')
        clean, states = self.takes_clean_loss, bool(getattr(self, "per_branch_state", False))
        exclude(
            (clean and self.batch == "split", f'difference="{self.difference}" and batch="split"',
             "a probe's loss is of its own sequences, the unperturbed one of all"),
            (clean and states, f'a state per branch and difference="{self.difference}"',
             "the unperturbed model has no state of its own among the branches"),
            (states and self.micro_batch, f"a state per branch and micro_batch={self.micro_batch}",
             "the states of branches are not cut by sequences"),
        )  # fmt: skip

    @property
    def takes_clean_loss(self) -> bool:
        """Whether the loss of the unperturbed weights is needed too."""
        return self.difference == "one_sided"


@dataclass(frozen=True)
class Probes(ProbeOptions, GradientSpec):
    """Forward passes only (CD-RGE)."""

    kind: str = option("probes", "probes: forward passes only (CD-RGE); backprop: automatic differentiation")
    epsilon_ratio: float = option(1.0, "a tied ε is this times the current learning rate")
    epsilon_min: float = option(1e-5, "floor of a tied ε, and of what plateaus leave of a fixed one")
    episode: int | None = option(None, "windows for which carried text keeps its probes and a state per branch (NRES)")
    seeded: ClassVar[bool] = True
    knobs: ClassVar[str] = "lr or epsilon"

    @property
    def per_branch_state(self) -> bool:
        return self.episode is not None

    @property
    def is_tied(self) -> bool:
        return self.epsilon is None

    def episode_begin(self, step: int) -> int:
        return step - step % (self.episode or 1)

    def epsilon_at(self, lr: float, multiplier: float = 1.0) -> float:
        if self.epsilon is None:
            return max(lr * self.epsilon_ratio, self.epsilon_min)
        # A fixed ε below the floor stays what it is.
        return max(self.epsilon * multiplier, min(self.epsilon, self.epsilon_min))

    def build(self, epsilon: float, run: Any) -> Any:
        import torch

        options = {f.name: getattr(self, f.name) for f in fields(ProbeOptions)} | {"epsilon": epsilon}
        return runtime("grad:CentralDifference")(
            **options, dtype=torch.bfloat16 if run.dtype == "bf16" else None,
            per_branch_state=self.per_branch_state, threads=run.threads,
        )  # fmt: skip


@dataclass(frozen=True)
class BackpropOptions(Options):
    """What `reroll.Backprop` and the config of a run by backprop have in common."""

    accumulate: int = option(1, "parts the batch is cut into")
    truncate: int | None = option(None, "steps through which the gradient flows; none: all")
    checkpoint: bool = option(False, "recompute on the way back, memory as √T")

    def check(self) -> None:
        super().check()
        pair = f"truncate={self.truncate} and checkpoint=True"
        exclude((self.checkpoint and self.truncate, pair, "windows are cut or recomputed"))


@dataclass(frozen=True)
class Backprop(BackpropOptions, GradientSpec):
    """Automatic differentiation."""

    kind: str = option("backprop", "probes: forward passes only (CD-RGE); backprop: automatic differentiation")

    def build(self, epsilon: float, run: Any) -> Any:
        return runtime("grad:Backprop")(self.accumulate, self.truncate, self.checkpoint)


@dataclass(frozen=True)
class ObjectGradient(Handed, GradientSpec):
    """An estimator that was handed in and that no other spec describes: its steps are not journaled."""


GRADIENTS: dict[str, type[GradientSpec]] = {"probes": Probes, "backprop": Backprop, OBJECT: ObjectGradient}
"""Every source of gradients by name."""
