"""Where the gradient comes from."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, ClassVar, Literal

from reroll.errors import UsageError
from reroll.specs.base import OBJECT, ObjectSpec, Options, Spec, exclude, option, runtime


@dataclass(frozen=True)
class GradientSpec(Spec):
    """A source of gradients; by default one like autograd, with a dense gradient in `.grad` and nothing to replay."""

    seeded: ClassVar[bool] = False
    """Whether gradients are coefficients of seeded noise, which can be journaled, replayed and streamed."""
    knobs: ClassVar[str] = "lr"
    """What to lower when a run diverges."""

    @property
    def per_branch_state(self) -> bool:
        """Whether every perturbed branch carries its own state."""
        return False

    @property
    def is_tied(self) -> bool:
        """Whether ε follows the learning rate."""
        return False

    def episode_start(self, step: int) -> int:
        """Return the first step of the episode that contains a step."""
        return step

    def epsilon_at(self, lr: float, multiplier: float = 1.0) -> float:
        """Return ε at a learning rate and plateau multiplier; unused by gradients without ε."""
        return lr

    def build(self, epsilon: float, run: Any) -> Any:
        """Return the `reroll.grad.base.Estimator`.

        Args:
            epsilon: ε, for gradients that have one.
            run: the section [run], for its threads and dtype.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ProbeOptions(Options):
    """The fields that `reroll.CentralDifference` and the config of a run by probes share."""

    probes: int = option(96, "random directions per step, N; the error falls as 1/√N", flag="probes")
    epsilon: float | None = option(None, "size of a perturbation; none: tied to the learning rate", flag="epsilon")
    noise: str = option("rademacher", "distribution of the directions: rademacher, normal or sparse", flag="noise")
    evaluate: Literal["auto", "in_place", "tiles", "batched"] = option(
        "auto", "how perturbed losses are computed", flag="evaluate"
    )
    batch: Literal["shared", "split"] = option(
        "shared", "shared: every probe sees the whole batch; split: the probes divide it"
    )
    _: KW_ONLY
    shaping: Literal["raw", "zscore", "rank", "sign"] = option("raw", "transform of the loss differences")
    difference: str = option("central", "central: both signs of a probe; one_sided: one sign and the unperturbed loss")
    density: float | None = option(None, "fraction of non-zero coordinates in sparse noise: 1/2, 1/4 …")
    restore: Literal["copy", "grid"] = option("copy", "in_place: keep a copy of the weights, or round them to a grid")
    micro_batch: int | None = option(None, "maximum number of sequences evaluated at once; none: the batch")
    chunk: int | None = option(None, "probes per unit of work; none: automatic")
    workers: int | None = option(None, "units evaluated in parallel; none: automatic", within="[1, 1024]")
    sums: Literal["fp32", "fp64"] = option("fp32", "precision of sums over probes")

    def check(self) -> None:
        super().check()
        if self.density is not None and self.noise != "sparse":
            raise UsageError(f'density={self.density} is for noise="sparse"; noise is "{self.noise}".')
        clean, states = self.takes_clean_loss, bool(getattr(self, "per_branch_state", False))
        exclude(
            (clean and self.batch == "split", f'difference="{self.difference}" and batch="split"',
             "a probe's loss is over its own sequences, the unperturbed loss over all"),
            (clean and states, f'a state per branch and difference="{self.difference}"',
             "the unperturbed model has no state among the branches"),
            (states and self.micro_batch, f"a state per branch and micro_batch={self.micro_batch}",
             "the states of branches are not split by sequence"),
        )  # fmt: skip

    @property
    def takes_clean_loss(self) -> bool:
        """Whether the loss of the unperturbed weights is needed too."""
        return self.difference == "one_sided"


@dataclass(frozen=True)
class Probes(ProbeOptions, GradientSpec):
    """Forward passes only (CD-RGE)."""

    kind: str = option("probes", "probes: forward passes only (CD-RGE); backprop: automatic differentiation")
    epsilon_ratio: float = option(1.0, "a tied ε is the current learning rate times this")
    epsilon_min: float = option(1e-5, "lower bound of a tied ε, and of a fixed ε reduced on plateaus")
    episode: int | None = option(None, "carried text: windows that share their probes, with a state per branch (NRES)")
    seeded: ClassVar[bool] = True
    knobs: ClassVar[str] = "lr or epsilon"

    @property
    def per_branch_state(self) -> bool:
        return self.episode is not None

    @property
    def is_tied(self) -> bool:
        return self.epsilon is None

    def episode_start(self, step: int) -> int:
        return step - step % (self.episode or 1)

    def epsilon_at(self, lr: float, multiplier: float = 1.0) -> float:
        if self.epsilon is None:
            return max(lr * self.epsilon_ratio, self.epsilon_min)
        # A fixed ε below the bound stays as it is.
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
    """The fields that `reroll.Backprop` and the config of a run by backprop share."""

    accumulate: int = option(1, "micro-batches that the batch is split into")
    truncate: int | None = option(None, "steps that the gradient flows back through; none: all")
    checkpoint: bool = option(False, "recompute activations in the backward pass: memory grows as √T")

    def check(self) -> None:
        super().check()
        pair = f"truncate={self.truncate} and checkpoint=True"
        exclude((self.checkpoint and self.truncate, pair, "windows are either truncated or recomputed"))


@dataclass(frozen=True)
class Backprop(BackpropOptions, GradientSpec):
    """Automatic differentiation."""

    kind: str = option("backprop", "probes: forward passes only (CD-RGE); backprop: automatic differentiation")
    device_batch: int | Literal["auto"] | None = option(
        None, "most sequences in memory at once; auto: as many as fit; none: all", flag="device-batch"
    )

    def check(self) -> None:
        super().check()
        both = self.accumulate > 1 and self.device_batch is not None
        exclude((both, f"accumulate={self.accumulate} and device_batch", "either says how a batch is cut"))

    def build(self, epsilon: float, run: Any) -> Any:
        return runtime("grad:Backprop")(self.accumulate, self.truncate, self.checkpoint)


@dataclass(frozen=True)
class ObjectGradient(ObjectSpec, GradientSpec):
    """An estimator that was passed in and that no other spec describes; its steps are not journaled."""


GRADIENTS: dict[str, type[GradientSpec]] = {"probes": Probes, "backprop": Backprop, OBJECT: ObjectGradient}
"""Every source of gradients by name."""
