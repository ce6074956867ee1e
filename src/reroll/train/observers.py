"""What becomes of a step: every observer takes in its result, and returns what the row of the metrics says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reroll.grad.base import trainable
from reroll.optim import StepResult, StepSettings
from reroll.outcome import Outcome
from reroll.rollout.watch import Watch
from reroll.train.process import peak_bytes
from reroll.train.session import Session

PROBING = ("spread", "probe_snr", "lost_probes", "drift", "solver_error")
"""What a row says of the probes; see `reroll.grad.probes.Coefficients`."""


@dataclass(frozen=True)
class Taken:
    """A step: its number, what it was taken with, and what came of it.

    Args:
        loss: the loss as a number.
        rollouts: what was seen of the rollouts inside the model.
    """

    step: int
    batch: Any
    settings: StepSettings
    result: StepResult
    loss: float
    rollouts: Watch


def average(session: Session, taken: Taken) -> dict[str, Any]:
    """The running average of the weights."""
    if session.average is not None and taken.result.outcome:
        session.average.update(trainable(session.model))
    return {}


def losses(session: Session, taken: Taken) -> dict[str, Any]:
    """The loss, its averages, and the rate that falls when it stops improving."""
    progress = session.progress
    progress.see(taken.loss)
    session.plateau.see(taken.loss)
    return {"loss": taken.loss, "loss_fast": progress.fast, "loss_slow": progress.slow}


def refusals(session: Session, taken: Taken) -> dict[str, Any]:
    """Steps that were not taken, because their gradient was not finite."""
    progress = session.progress
    progress.refused_in_a_row = 0 if taken.result.outcome else progress.refused_in_a_row + 1
    progress.refused += not taken.result.outcome
    return {"refused_steps": progress.refused} if progress.refused else {}


def curriculum(session: Session, taken: Taken) -> dict[str, Any]:
    """The length, which grows when the loss has been low for long enough."""
    task, progress = session.config.task, session.progress
    if progress.length is not None and progress.length < task.length:
        progress.below = progress.below + 1 if progress.fast < task.curriculum_threshold else 0
        if progress.below >= task.curriculum_patience:
            progress.length, progress.below = min(progress.length + task.curriculum_step, task.length), 0
    return {"length": progress.length or task.length}


def carry(session: Session, taken: Taken) -> dict[str, Any]:
    """The state with which the next batch goes on."""
    if session.task.carries:
        session.progress.carried = taken.result.state
    return {}


def counters(session: Session, taken: Taken) -> dict[str, Any]:
    """How much was done."""
    progress = session.progress
    progress.step += 1
    progress.tokens += len(taken.batch) * taken.batch.time
    progress.forward_passes += taken.result.stats["forward_passes"]
    return {"step": taken.step, "forward_passes": progress.forward_passes, "tokens": progress.tokens}


def diagnostics(session: Session, taken: Taken) -> dict[str, Any]:
    """What the step was taken with, and what is known of its gradient and of the rollouts."""
    result, rollouts = taken.result, taken.rollouts
    row = {"lr": taken.settings.lr, "epsilon": result.stats.get("epsilon"), "peak_bytes": peak_bytes(session.device)}
    if result.norm is not None:
        row["gradient_norm"] = result.norm
    if rollouts.calls:
        row |= {"rollout_iterations": rollouts.iterations, "rollout_fell_back": rollouts.fell_back}
    if result.outcome is Outcome.no_difference:
        row["no_difference"] = True
    return row | {name: value for name, value in result.stats.items() if name in PROBING}


OBSERVERS: tuple[Callable[[Session, Taken], dict[str, Any]], ...] = (
    average, losses, refusals, curriculum, carry, counters, diagnostics,
)  # fmt: skip
"""In this order; the journal comes before all of them, and before the weights move."""
