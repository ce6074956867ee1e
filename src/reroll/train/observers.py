"""What follows from a step: its row of the metrics, warnings, and whether the run ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reroll.data.task import with_nats
from reroll.errors import plural
from reroll.grad.base import trainable
from reroll.grad.evaluate.warm import TOO_LOOSE
from reroll.optim import StepResult, StepSettings
from reroll.outcome import Outcome
from reroll.rollout.monitor import Monitor
from reroll.specs.base import OBJECT
from reroll.specs.run import RunSpec
from reroll.train.config import Config
from reroll.train.machine import peak_bytes
from reroll.train.session import Session

PROBING = ("spread", "probe_snr", "lost_probes", "drift", "solver_error")
"""Statistics of the probes in a row; see `reroll.grad.probes.Coefficients`."""
SLOW = 10.0
"""Seconds of a first step from which a smaller one is suggested."""
REFUSED = 5
"""Consecutive steps with a non-finite gradient after which a run counts as diverged."""


@dataclass(frozen=True)
class CompletedStep:
    """A step: its number, batch and settings, its result, its loss as a number, and statistics of its rollouts."""

    number: int
    batch: Any
    settings: StepSettings
    result: StepResult
    loss: float
    rollouts: Monitor


def average(session: Session, step: CompletedStep) -> dict[str, Any]:
    """The running average of the weights."""
    if session.average is not None and step.result.outcome:
        session.average.update(trainable(session.model))
    return {}


def losses(session: Session, step: CompletedStep) -> dict[str, Any]:
    """The loss, its averages, and the rate that falls when it stops improving."""
    progress = session.progress
    progress.see(step.loss)
    session.plateau.see(step.loss)
    return {"loss": step.loss, "loss_fast": progress.fast, "loss_slow": progress.slow}


def refusals(session: Session, step: CompletedStep) -> dict[str, Any]:
    """The steps that were skipped because their gradient was not finite."""
    progress = session.progress
    progress.refused_in_a_row = 0 if step.result.outcome else progress.refused_in_a_row + 1
    progress.refused += not step.result.outcome
    return {"refused_steps": progress.refused} if progress.refused else {}


def curriculum(session: Session, step: CompletedStep) -> dict[str, Any]:
    """The sequence length, which grows once the loss has been low for long enough."""
    task, progress = session.config.task, session.progress
    if progress.length is not None and progress.length < task.length:
        progress.below = progress.below + 1 if progress.fast < task.curriculum_threshold else 0
        if progress.below >= task.curriculum_patience:
            progress.length, progress.below = min(progress.length + task.curriculum_step, task.length), 0
    return {"length": progress.length or task.length}


def counters(session: Session, step: CompletedStep) -> dict[str, Any]:
    """Steps, tokens and forward passes so far; and the state that a carried text continues from."""
    progress = session.progress
    if session.task.carries:
        progress.carried = step.result.state
    progress.step += 1
    progress.tokens += len(step.batch) * step.batch.time
    progress.forward_passes += step.result.stats["forward_passes"]
    return {"step": step.number, "forward_passes": progress.forward_passes, "tokens": progress.tokens}


def diagnostics(session: Session, step: CompletedStep) -> dict[str, Any]:
    """The settings of the step, its gradient and its rollouts."""
    result, rollouts = step.result, step.rollouts
    row = {"lr": step.settings.lr, "epsilon": result.stats.get("epsilon"), "peak_bytes": peak_bytes(session.device)}
    if result.norm is not None:
        row["gradient_norm"] = result.norm
    if rollouts.calls:
        row |= {"rollout_iterations": rollouts.iterations, "rollout_fell_back": rollouts.fell_back}
    if result.where:
        row["not_finite"] = result.where
    if result.outcome is Outcome.no_difference:
        row["no_difference"] = True
    return row | {name: value for name, value in result.stats.items() if name in PROBING}


OBSERVERS: tuple[Callable[[Session, CompletedStep], dict[str, Any]], ...] = (
    average, losses, refusals, curriculum, counters, diagnostics,
)  # fmt: skip
"""In this order. The journal is written before all of them, and before the weights change."""


class Warnings:
    """Warnings about steps, each shown once."""

    def __init__(self, note: Callable[[str], None]):
        self.note, self.shown = note, set[Outcome]()

    def __call__(self, row: dict[str, Any], refused: bool) -> None:
        signs = {
            Outcome.some_probes_lost: row.get("lost_probes", 0) > 0,
            Outcome.solver_too_loose: row.get("solver_error", 0.0) > TOO_LOOSE,
            Outcome.fell_back: row.get("rollout_fell_back", 0) + row.get("valid_fell_back", 0) > 0,
            Outcome.gradient_not_finite: refused,
            Outcome.no_difference: row.get("no_difference", False),
        }
        for outcome in (outcome for outcome, sign in signs.items() if sign and outcome not in self.shown):
            self.shown.add(outcome)
            where = _where(row) if outcome is Outcome.gradient_not_finite else ""
            self.note(f"step {row['step'] + 1}: {outcome.value}{where} (Shown once.)")


def _where(row: dict[str, Any]) -> str:
    """Return a sentence on the first tensor whose gradient is not finite, where that is known."""
    return f" The first such gradient is that of {row['not_finite']}." if "not_finite" in row else ""


def ends(session: Session, row: dict[str, Any], stop: list[str]) -> tuple[str, str] | None:
    """Return (state, reason) if the run ends with this row, else None."""
    run, progress, loss = session.config.run, session.progress, row.get("loss")
    if isinstance(loss, float):
        after = f"after {plural(progress.step, 'step')}."
        diverged = _diverged(session, row)
        if diverged is not None:
            return "diverged", diverged
        if run.target_loss is not None and loss < run.target_loss:
            target = with_nats(session.task, f"{run.target_loss:g}")
            return "done", f"the loss is below the target {target} {after}"
        if run.target_valid is not None and row.get("valid_loss", math.inf) < run.target_valid:
            target = with_nats(session.task, f"{run.target_valid:g}")
            return "done", f"the held-out loss is below the target {target} {after}"
        if run.max_seconds is not None and progress.seconds >= run.max_seconds:
            return "done", f"the time limit of {run.max_seconds:g} seconds was reached {after}"
    if stop and progress.step < run.steps:
        how = f"reroll train --run-dir {session.folder.path} --resume"
        how = "train(session, path, resume=True)" if session.of_objects else how
        return "stopped", f"{stop[0]} after {plural(progress.step, 'step')}. To resume: {how}"
    return None


def target_reached(run: RunSpec, row: dict[str, Any]) -> bool | None:
    """Return whether the last row of a run is below a target of it; None if it has none."""
    targets = {"loss": run.target_loss, "valid_loss": run.target_valid}
    pairs = [(row.get(name, math.inf), target) for name, target in targets.items() if target is not None]
    return any(value < target for value, target in pairs) if pairs else None


def _diverged(session: Session, row: dict[str, Any]) -> str | None:
    run, progress = session.config.run, session.progress
    if not math.isfinite(row["loss"]):
        return str(row.get("reason"))
    if progress.refused_in_a_row >= REFUSED:
        why = f"{Outcome.gradient_not_finite.value}{_where(row)}"
        return f"the gradients of {REFUSED} steps in a row, up to step {row['step'] + 1}, were not finite. {why}"
    if progress.fast > run.diverged * max(progress.first_loss, 1e-12):
        average, first = (with_nats(session.task, f"{loss:.4g}") for loss in (progress.fast, progress.first_loss))
        return (
            f"the loss (average {average}) is more than {run.diverged:g} times the first ({first}). "
            f"Lower {session.config.gradient.knobs}, or raise run.diverged."
        )
    return None


def slow_start(config: Config, row: dict[str, Any]) -> str:
    """Return a suggestion after a first step that took long; empty after any other."""
    seconds, run = row.get("seconds", 0.0), config.run
    if row["step"] > 0 or seconds < SLOW:
        return ""
    hours, compiling = seconds * run.steps / 3600, "some of it perhaps for compiling"
    whole = f"{run.steps:,} at this pace take {hours:.1f} hours" if hours >= 1 else f"there are {run.steps:,} to take"
    if config.recipe == OBJECT:
        smaller = "a smaller model or batch"
    else:
        size = "width" if config.model.kind == "gpt" else "hidden"
        half = f"model.{size}={getattr(config.model, size) // 2}"
        smaller = f"a smaller model ({half}) or task.batch" + " or fewer gradient.probes" * config.gradient.seeded
    return f"The first step took {seconds:.0f} s, {compiling}; {whole}. Faster: {smaller}."


def how_to_continue(config: Config, seconds: float) -> str:
    """Return how to continue a run that is done, after some seconds of training."""
    run = config.run
    if config.recipe == OBJECT:
        return "To continue, create its session again with more steps, or a limit beyond the one that ended it."
    limits = [f"run.steps above {run.steps}"]
    if run.max_seconds is not None:
        used = max(math.ceil(seconds), math.floor(run.max_seconds))
        limits.append(f"run.max_seconds above {used} (it counts the whole run, which has used {seconds:.1f} s)")
    limits += [] if run.target_loss is None else [f"run.target_loss below {run.target_loss:g}"]
    limits += [] if run.target_valid is None else [f"run.target_valid below {run.target_valid:g}"]
    return f"To continue, change the limit that ended it: {', or '.join(limits)}."
