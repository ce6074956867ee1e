"""How long, where, and what is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reroll.specs.base import Options, option


@dataclass(frozen=True)
class RunSpec(Options):
    """How long, where, and what is written."""

    steps: int = option(200, "training steps", flag="steps", within="[1, 2**31]")
    seed: int = option(0, "seed of all randomness: weights, data, probes", flag="seed", within="[0, 2**64)")
    device: Literal["auto", "cpu", "cuda", "mps"] = option("auto", "the device; auto: cuda, else cpu", flag="device")
    dtype: Literal["fp32", "bf16"] = option("fp32", "precision of the forward passes; weights stay fp32", flag="dtype")
    compile: Literal["auto", "on", "off"] = option(
        "auto", "torch.compile of the model; auto: of gpt by backprop on CUDA"
    )
    threads: int | None = option(
        None, "torch's threads per unit of work; none: automatic", flag="threads", within="[1, 1024]"
    )
    max_seconds: float | None = option(
        None, "stop after this many seconds of training, over the whole run", flag="max-seconds", within="(0, inf)"
    )
    price: float | None = option(
        None, "dollars per hour of the whole machine, for the cost of the run in its log", flag="price"
    )
    target_loss: float | None = option(
        None, "stop when the training loss is below this", flag="target-loss", within="(-inf, inf)"
    )
    target_valid: float | None = option(None, "stop when the held-out loss is below this", within="(-inf, inf)")
    diverged: float = option(3.0, "stop when the loss exceeds this multiple of the first loss", within="(0, inf)")
    eval_every: int | None = option(None, "steps between evaluations; none: a tenth of the run", within="[1, 2**31]")
    checkpoint_every: int | None = option(
        None,
        "steps between checkpoints, of which one a minute is written anyway; none: as evaluations",
        within="[1, 2**31]",
    )
    log_every: int = option(10, "steps between costly diagnostics (the gradient norm)")
    warm_up: int = option(
        0, "steps taken and undone before the clock starts, so that compilation is not timed", within="[0, 2**24]"
    )
    keep: int = option(2, "number of checkpoints to keep")
