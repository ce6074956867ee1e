"""When a run ends, why, and how it goes on; and what steps have to say beyond their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from reroll.grad.evaluate.warm import TOO_LOOSE
from reroll.outcome import Outcome
from reroll.train.session import Session

REFUSED = 5
"""Steps in a row whose gradient is not finite, after which a run has diverged."""
Say = Callable[[str], None]


def ends(session: Session, row: dict[str, Any], stop: list[str]) -> tuple[str, str] | None:
    """Whether the run ends with this row: (state, reason) or None."""
    run, progress, loss = session.config.run, session.progress, row.get("loss")
    if isinstance(loss, float):
        diverged = _diverged(session, row)
        if diverged is not None:
            return "diverged", diverged
        if run.target_loss is not None and loss < run.target_loss:
            return "done", f"the loss is below the target {run.target_loss:g} after {progress.step} steps."
        if run.target_valid is not None and row.get("valid_loss", math.inf) < run.target_valid:
            return "done", f"the held-out loss is below the target {run.target_valid:g} after {progress.step} steps."
        if run.max_seconds is not None and progress.seconds >= run.max_seconds:
            return "done", f"{run.max_seconds:g} seconds are over, after {progress.step} steps."
    if stop and progress.step < run.steps:
        where = session.folder.path
        return "stopped", f"{stop[0]} after {progress.step} steps. Go on with: reroll train --run-dir {where} --resume"
    return None


def _diverged(session: Session, row: dict[str, Any]) -> str | None:
    """Why the run has diverged; None if it has not."""
    run, progress = session.config.run, session.progress
    if not math.isfinite(row["loss"]):
        return str(row.get("reason"))
    if progress.refused_in_a_row >= REFUSED:
        return f"the gradients of {REFUSED} steps in a row were not finite. {Outcome.gradient_not_finite.value}"
    if progress.fast > run.diverged * max(progress.first_loss, 1e-12):
        return (
            f"the loss (average {progress.fast:.4g}) is more than {run.diverged:g} times the first "
            f"({progress.first_loss:.4g}). Lower {session.config.gradient.knobs}, or raise run.diverged."
        )
    return None


def how_to_go_on(run: Any) -> str:
    """How a run that is done goes on."""
    limits = [f"--steps above {run.steps}"]
    limits += [] if run.max_seconds is None else [f"--max-seconds above {run.max_seconds:g}"]
    limits += [] if run.target_loss is None else [f"--target-loss below {run.target_loss:g}"]
    limits += [] if run.target_valid is None else [f"--set run.target_valid below {run.target_valid:g}"]
    return f"To go on, give {', or '.join(limits)}: the one that ended it."


class Warnings:
    """What steps have to say beyond their numbers, each once."""

    def __init__(self, say: Say):
        self.say, self.said = say, set[Outcome]()

    def __call__(self, row: dict[str, Any], refused: bool) -> None:
        signs = {
            Outcome.some_probes_lost: row.get("lost_probes", 0) > 0,
            Outcome.solver_too_loose: row.get("solver_error", 0.0) > TOO_LOOSE,
            Outcome.fell_back: row.get("rollout_fell_back", 0) + row.get("valid_fell_back", 0) > 0,
            Outcome.gradient_not_finite: refused,
            Outcome.no_difference: row.get("no_difference", False),
        }
        for outcome, shown in signs.items():
            if shown and outcome not in self.said:
                self.said.add(outcome)
                self.say(f"step {row['step'] + 1}: {outcome.value} (Said once.)")
