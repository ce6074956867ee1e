"""The loop: one for every task, model, estimator and optimizer.

settings → batch → step (estimate → clip → journal → update) → observers → row → evaluate · checkpoint · stop?
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from reroll.errors import EpsilonTooSmall, RunError, UsageError
from reroll.grad.base import Seeded, trainable
from reroll.grad.units import batch_size
from reroll.kernels.threads import torch_threads
from reroll.keys import Key
from reroll.optim import StepResult, step
from reroll.outcome import Outcome
from reroll.rollout.monitor import monitoring
from reroll.train import guard
from reroll.train.config import Config, resolve
from reroll.train.evaluate import evaluate
from reroll.train.fit import parts_for
from reroll.train.journal import Record
from reroll.train.machine import signals
from reroll.train.mesh import ALONE, Mesh
from reroll.train.observers import OBSERVERS, CompletedStep, Warnings, ends, how_to_continue, slow_start, target_reached
from reroll.train.records import read_config, read_json
from reroll.train.resume import merge_resumed, open_session, start_record
from reroll.train.search import search_lr, trial
from reroll.train.session import Session

SAVE_SECONDS = 60.0
"""A run that is killed loses no more than this, and the step it is at."""


class Reporter:
    """Who is told what happens; this one says nothing. See `reroll.cli.console`."""

    def start(self, session: Session) -> None:
        """The session is ready; the first step comes next."""

    def note(self, line: str) -> None:
        """Something worth a line."""

    def step(self, row: dict[str, Any], config: Config) -> None:
        """A step was taken."""


def train(
    what: Config | Session,
    path: Path,
    *,
    resume: bool = False,
    init: dict[str, torch.Tensor] | None = None,
    report: Reporter | None = None,
    mesh: Mesh = ALONE,
) -> dict[str, Any]:
    """Train, and leave the record in a folder.

    Args:
        what: a config, which is resolved here, or a session of objects (`Session.of`), made again as it was to resume.
        path: the run folder, new or (with `resume`) one to go on with.
        resume: go on from the newest checkpoint; on a finished run nothing is done.
        init, report: weights to begin with; who is told.
        mesh: the processes that train it together, each with this call; a session has its own.

    Returns:
        The last row of the metrics, with `state`: "done", "stopped" (it can be resumed) or "diverged"; `reason`; and
        `target_reached`, if it is done and had one.

    Raises:
        UsageError: if something asked for cannot be done.
        RunError: if it fails on the way; what was saved before is intact.
    """
    report = report or Reporter()
    config, mesh = (what.config, what.mesh) if isinstance(what, Session) else ((what := resolve(what)), mesh)
    finished = mesh.share(_finished(config, path, report) if resume and mesh.writes else None)
    if finished is not None:
        return finished
    session, note = open_session(what, path, resume=resume, init=init, mesh=mesh)

    def say(line: str) -> None:
        session.folder.log(line)
        report.note(line)

    report.start(session)
    for line in filter(None, (note, session.task.describe())):
        say(line)
    with signals(says=mesh.writes) as stop, monitoring():
        try:
            session.folder.write_status("running", step=session.progress.step, steps=session.config.run.steps)
            if not session.progress.step:
                say(session.plan())
            # Backpropagation runs with the run's number of threads, which its results depend on.
            with torch_threads(None if session.config.gradient.seeded else session.config.run.threads):
                _prepare(session, say, stop)
                return _run(session, report, stop, say)
        except Exception as error:
            _failed(session, error, fresh=not resume)
            raise
        finally:
            session.folder.close()
            if session.journal is not None:
                session.journal.close()


def _failed(session: Session, error: Exception, fresh: bool) -> None:
    """Leave the state and reason of a run that failed; nothing of one where nothing was trained."""
    step, steps = session.progress.step, session.config.run.steps
    if session.folder.lost:
        return
    if step == 0 and (isinstance(error, UsageError) or fresh):
        session.folder.discard()
        return
    reason = " ".join(str(error).split()) or type(error).__name__
    session.folder.write_status("failed", step=step, steps=steps, reason=reason)


def _finished(config: Config, path: Path, report: Reporter) -> dict[str, Any] | None:
    """The status of a run that has ended, unless it is asked to go on for longer, and could take another step."""
    status = read_json(path / "status.json")
    if status.get("state") not in ("done", "diverged"):
        return None
    saved = read_config(path)
    status = {"step": saved.run.steps, "reason": "it had ended before."} | status
    asked = merge_resumed(saved, config)
    if status["state"] == "diverged":  # what made the loss so may be mended outside, or the limit of it raised
        over = (asked.run.steps, asked.run.diverged) == (saved.run.steps, saved.run.diverged)
    else:
        over = asked.run.steps == status["step"] or bool(target_reached(asked.run, status))
    if asked != saved and not over:
        return None
    report.note(f"{path} is finished ({status['state']} at step {status['step']}); nothing to do.")
    if status["state"] == "done":
        report.note(how_to_continue(config, float(status.get("total_seconds") or 0.0)))
    return status


def _prepare(session: Session, say: Callable[[str], None], stop: list[str]) -> None:
    """Before the first step, find a learning rate where none is set, and begin the record."""
    if session.progress.step:
        return
    if searched := session.config.optim.lr == "auto":
        lr = session.mesh.share(search_lr(session, say, stop))
        if lr is None:
            return
        session.config = session.config.replace(optim={"lr": lr})
    start_record(session, searched)


def _run(session: Session, report: Reporter, stop: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Take steps until something ends the run."""
    config, progress, warn = session.config, session.progress, Warnings(say)
    eval_every, checkpoint_every = config.run.eval_every or 1, config.run.checkpoint_every or 1
    row: dict[str, Any] = {"step": progress.step - 1}
    if progress.step:
        row = session.folder.last_row() or row
    # A run that was killed after its last step, and before it said so, has nothing left to do.
    ended = session.mesh.share(ends(session, row, stop))
    if ended is not None and ended[0] == "done":
        say(how_to_continue(config, progress.seconds))
    if config.run.warm_up and ended is None:
        trial(session, session.settings().lr, config.run.warm_up)
    saved = time.monotonic()
    while ended is None and progress.step < config.run.steps:
        row = take_step(session)
        last = progress.step >= config.run.steps
        due = progress.step % eval_every == 0 or last
        if due:  # before it is decided whether to stop: the score may be what was waited for
            row |= validate(session)
        # Clocks and signals differ between processes; one decides for all.
        overdue = time.monotonic() - saved > SAVE_SECONDS
        ended, overdue = session.mesh.share((ends(session, row, stop), overdue))
        if ended is not None and ended[0] != "stopped" and not due:
            row |= validate(session)
        warn(row, progress.refused_in_a_row > 0)
        if slow := slow_start(config, row):
            say(slow)
        session.folder.record(row)
        report.step(row, config)
        if progress.step % checkpoint_every == 0 or last or ended is not None or overdue:
            session.save()
            saved = time.monotonic()
    every = f"all {config.run.steps} steps are" if config.run.steps > 1 else "the one step is"
    state, reason = ended or ("done", f"{every} taken.")
    reached = target_reached(config.run, row) if state == "done" else None
    reason += " The target was not reached." * (reached is False)
    row |= {} if reached is None else {"target_reached": reached}
    summary = row | {"state": state, "reason": reason, "step": progress.step, "steps": config.run.steps}
    session.folder.write_status(state, **{k: v for k, v in summary.items() if k != "state"})
    session.folder.log(f"{state}: {reason}")
    return summary


def take_step(session: Session) -> dict[str, Any]:
    """Take one step and return its row of the metrics."""
    config, number = session.config, session.progress.step
    session.clock.start()
    settings, key, batch = session.settings(), session.key(), session.batch(number)

    def record(result: StepResult) -> None:
        if session.journal is not None and isinstance(result.gradient, Seeded):
            terms = result.gradient.terms if result.outcome else ()  # a step that was not taken has none
            # ε as it was asked for: with restore="grid", it is what the grid of the weights is made from.
            session.journal.write(Record(number, float(result.loss), result.settings or settings, terms))

    try:
        with monitoring() as rollouts:
            result = step(
                session.model, session.loss_fn, session.estimator, session.optimizer, batch, settings, key,
                clip=config.optim.clip, update=config.optim.update, norm=number % config.run.log_every == 0,
                tied=config.gradient.is_tied, record=record,
            )  # fmt: skip
    except EpsilonTooSmall as error:
        if number == 0:
            raise
        return _lost(number, f"Since the first step the weights have grown, or ε has shrunk: {error}")
    if not result.outcome and result.outcome is not Outcome.gradient_not_finite:
        why = f"{result.outcome.value.removeprefix('The loss is not finite. ')} {_source(session, batch, key)}"
        reason = f"The loss is not finite at step {number + 1}. {why}"
        if number == 0:
            raise RunError(reason)
        return _lost(number, reason)
    if not result.outcome:
        record(result)
    completed = CompletedStep(number, batch, settings, result, float(result.loss), rollouts)
    row: dict[str, Any] = {}
    for observe in OBSERVERS:
        row |= observe(session, completed)
    seconds = session.clock.stop()
    session.progress.seconds += seconds
    rates = session.rates.of(len(batch) * batch.time, batch.time, seconds, session.progress.dollars)
    session.progress.dollars = rates.get("dollars", session.progress.dollars)
    return row | {"seconds": seconds, "total_seconds": session.progress.seconds} | rates


def _lost(number: int, reason: str) -> dict[str, Any]:
    """Return the last row of a run, for a step after the first that has no gradient."""
    return {"step": number, "loss": math.nan, "reason": reason}


def _source(session: Session, batch: Any, key: Key) -> str:
    """Return a sentence on where the loss of a batch that is not finite comes from."""
    each, rows = getattr(session.estimator, "each", session.estimator), batch_size(batch) or 1
    parts = parts_for(rows, getattr(each, "micro_batch", None) or rows)
    parts = max(parts, getattr(each, "accumulate", 1) * session.mesh.size)
    return guard.describe(session.model, session.loss_fn, batch, key, parts)


def validate(session: Session) -> dict[str, float]:
    """Score the (averaged) weights on held-out data, in the precision of the run."""
    model, task = session.model, session.task
    if not task.splits:
        return {}
    averaged = nullcontext() if session.average is None else session.average.swapped_in(trainable(model))
    with averaged, session.precision.scope(), monitoring() as rollouts:
        scores = evaluate(model, task, task.splits[0], session.device, mesh=session.mesh)
    session.progress.valid = {f"valid_{name}": value for name, value in scores.items()}
    return session.progress.valid | ({"valid_fell_back": rollouts.fell_back} if rollouts.fell_back else {})
