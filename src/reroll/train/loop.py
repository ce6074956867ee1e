"""The loop: one for every task, model, estimator and optimizer.

    batch → estimate → clip → record → step → averages → row → evaluate · checkpoint · stop?

Nothing here knows which of them it is running.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from reroll import optim
from reroll.errors import EpsilonTooSmall, RunError
from reroll.grad.base import Seeded, trainable
from reroll.grad.evaluate.warm import TOO_LOOSE
from reroll.kernels.threads import torch_threads
from reroll.keys import Key
from reroll.outcome import Outcome
from reroll.rollout.watch import watching
from reroll.train import build
from reroll.train.config import Config, resolve
from reroll.train.evaluate import evaluate
from reroll.train.journal import Record
from reroll.train.run import read_config, read_json
from reroll.train.search import search_lr
from reroll.train.session import Session, agree, open_session, start_record

PROBING = ("spread", "probe_snr", "lost_probes", "drift", "solver_error")
"""What a row says of the probes; see `reroll.grad.probes.Coefficients`."""


class Reporter(Protocol):
    """Who is told what happens; see `reroll.cli.console`."""

    def note(self, line: str) -> None:
        """Something worth a line."""

    def step(self, row: dict[str, Any], config: Config) -> None:
        """A step was taken."""


class Quiet:
    """A reporter that says nothing."""

    def note(self, line: str) -> None:
        return None

    def step(self, row: dict[str, Any], config: Config) -> None:
        return None


def train(
    config: Config,
    path: Path,
    *,
    resume: bool = False,
    init: dict[str, torch.Tensor] | None = None,
    report: Reporter | None = None,
) -> dict[str, Any]:
    """Train, and leave the record in a folder.

    Args:
        config: what to do; it is resolved here.
        path: the run folder, new or (with `resume`) one to go on with.
        resume: go on from the newest checkpoint; on a finished run nothing is done.
        init: weights to begin with.
        report: who is told.

    Returns:
        The last row of the metrics, with `state`: "done", "stopped" (a signal: it can be resumed) or "diverged"; and
        `reason`, a sentence.

    Raises:
        UsageError: if something asked for cannot be done.
        RunError: if it fails on the way; what was saved before is intact.
    """
    report = report or Quiet()
    config = resolve(config)
    finished = _finished(config, path) if resume else None
    if finished is not None:
        report.note(f"{path} is finished ({finished['state']} at step {finished['step']}); nothing to do.")
        return finished
    session, note = open_session(config, path, resume=resume, init=init)

    def say(line: str) -> None:
        session.folder.log(line)
        report.note(line)

    say(note)
    if session.task.describe():
        say(session.task.describe())
    with torch_threads(_threads(session.config)), _signals() as stop, watching():
        try:
            if session.progress.step == 0:
                _prepare(session, say)
            return _run(session, report, stop, say)
        except Exception as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            session.folder.write_status("failed", step=session.progress.step, reason=reason)
            raise
        finally:
            session.folder.close()
            if session.journal is not None:
                session.journal.close()


def _threads(config: Config) -> int | None:
    """Backpropagation runs with the run's number of threads, which its results depend on."""
    return config.run.threads if config.gradient.method == "backprop" else None


def _finished(config: Config, path: Path) -> dict[str, Any] | None:
    """The status of a run that has ended, unless it is asked to go on for longer than it was."""
    status = read_json(path / "status.json")
    if status.get("state") not in ("done", "diverged"):
        return None
    saved = read_config(path)
    if agree(saved, config) != saved:
        return None
    return {"step": saved.run.steps, "reason": "it had ended before."} | status


def _prepare(session: Session, say: Callable[[str], None]) -> None:
    """What happens once, before the first step: decide the units, find a learning rate, begin the record."""
    session.config, note = build.plan_units(session.config, session.model, session.batch(0))
    say(note)
    if session.config.optim.lr == "auto":
        lr = search_lr(session, say)
        session.config = session.config.replace(optim={"lr": lr})
        session.optimizer = build.build_optim(session.config, session.model, lr)
    session.estimator = build.build_estimator(session.config, 1.0)
    start_record(session)


def _warnings(row: dict[str, Any]) -> list[Outcome]:
    """Return what a step has to say beyond its numbers."""
    signs = {
        Outcome.some_probes_lost: row.get("lost_probes", 0) > 0,
        Outcome.solver_too_loose: row.get("solver_error", 0.0) > TOO_LOOSE,
        Outcome.fell_back: row.get("rollout_fell_back", 0) + row.get("valid_fell_back", 0) > 0,
    }
    return [outcome for outcome, shown in signs.items() if shown]


def _run(session: Session, report: Reporter, stop: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Take steps until something ends the run."""
    config, progress = session.config, session.progress
    eval_every, checkpoint_every = config.run.eval_every or 1, config.run.checkpoint_every or 1
    session.folder.write_status("running", step=progress.step, steps=config.run.steps)
    row: dict[str, Any] = {"step": progress.step - 1}
    if progress.step:
        row = session.folder.last_row() or row
    # A run that was killed after its last step, and before it said so, has nothing left to do.
    ended = _ends(session, row, stop) if isinstance(row.get("loss"), float) else None
    said: set[Outcome] = set()
    while ended is None and progress.step < config.run.steps:
        row = take_step(session)
        ended = _ends(session, row, stop)
        last = ended is not None or progress.step >= config.run.steps
        stopped = ended is not None and ended[0] == "stopped"
        if progress.step % eval_every == 0 or (last and not stopped):
            row |= _validate(session)
        for outcome in _warnings(row):
            if outcome not in said:
                said.add(outcome)
                say(f"step {row['step'] + 1}: {outcome.value} (Said once.)")
        session.folder.record(row)
        report.step(row, config)
        if progress.step % checkpoint_every == 0 or last:
            session.save()
    state, reason = ended or ("done", f"all {config.run.steps} steps are taken.")
    summary = row | {"state": state, "reason": reason, "step": progress.step, "steps": config.run.steps}
    session.folder.write_status(state, **{k: v for k, v in summary.items() if k != "state"})
    session.folder.log(f"{state}: {reason}")
    return summary | {"state": state}


def take_step(session: Session) -> dict[str, Any]:
    """Take one step and return its row of the metrics."""
    config, progress, began = session.config, session.progress, time.perf_counter()
    step, lr = progress.step, _learning_rate(session)
    epsilon = session.epsilon(lr)
    key = Key(config.run.seed).at(step - step % (config.gradient.episode or 1))
    batch = session.batch(step)

    def record(result: optim.StepResult) -> None:
        if session.journal is not None and isinstance(result.gradient, Seeded):
            # ε as it was asked for: with restore="grid", it is what the grid of the weights is made from.
            session.journal.write(Record(step, key, epsilon, lr, float(result.loss), result.gradient.coefficients))

    try:
        with watching() as rollouts:
            result = optim.step(
                session.model, session.loss_fn, session.estimator, session.optimizer, batch,
                optim.StepSettings(lr, epsilon=epsilon), key, clip=config.optim.clip, update=config.optim.update,
                norm=True, record=record,
            )  # fmt: skip
    except EpsilonTooSmall as error:
        if step == 0:
            raise
        return _lost(session, f"Since the first step the weights have grown, or ε has shrunk: {error}")
    if not result.outcome:
        return _lost(session, result.outcome.value)
    loss = float(result.loss)
    if session.average is not None:
        session.average.update(trainable(session.model))
    progress.see(loss)
    session.plateau.see(loss)
    _grow(session)
    if session.task.carries:
        progress.carried = result.state
    progress.step += 1
    progress.tokens += len(batch) * batch.time
    progress.forward_passes += result.stats["forward_passes"]
    seconds = time.perf_counter() - began
    progress.seconds += seconds
    probing = {name: value for name, value in result.stats.items() if name in PROBING}
    if rollouts.calls:
        probing |= {"rollout_iterations": rollouts.iterations, "rollout_fell_back": rollouts.fell_back}
    length = progress.length or config.task.length
    return {
        "step": step, "loss": loss, "loss_fast": progress.fast, "loss_slow": progress.slow, "lr": lr,
        "epsilon": result.stats.get("epsilon"), "gradient_norm": result.norm, "length": length,
        "forward_passes": progress.forward_passes, "tokens": progress.tokens, "seconds": seconds,
        "total_seconds": progress.seconds, "peak_bytes": peak_bytes(session.device), **probing,
    }  # fmt: skip


def _learning_rate(session: Session) -> float:
    """η of the step: base rate, schedule, plateau."""
    base = session.config.optim.lr
    assert isinstance(base, float)
    return base * session.schedule(session.progress.step) * session.plateau.multiplier


def _grow(session: Session) -> None:
    """Let the curriculum's length grow when the loss has been low for long enough."""
    task, progress = session.config.task, session.progress
    if progress.length is None or progress.length >= task.length:
        return
    progress.below = progress.below + 1 if progress.fast < task.curriculum_threshold else 0
    if progress.below >= task.curriculum_patience:
        progress.length, progress.below = min(progress.length + task.curriculum_step, task.length), 0


def _lost(session: Session, reason: str) -> dict[str, Any]:
    """There is no gradient: an error at the first step, the end of the run at a later one."""
    if session.progress.step == 0:
        raise RunError(f"The loss is not finite at step 0. {reason}")
    return {"step": session.progress.step, "loss": math.nan, "reason": reason}


def _ends(session: Session, row: dict[str, Any], stop: list[str]) -> tuple[str, str] | None:
    """Whether the run ends with this step: (state, reason) or None."""
    run, progress, loss = session.config.run, session.progress, row["loss"]
    if not math.isfinite(loss):
        return "diverged", str(row.get("reason"))
    knobs = "--lr or --epsilon" if session.config.gradient.method == "probes" else "--lr"
    if progress.fast > run.diverged * max(progress.first_loss, 1e-12):
        return "diverged", (
            f"the loss (average {progress.fast:.4g}) is more than {run.diverged:g} times the first "
            f"({progress.first_loss:.4g}). Lower {knobs}, or raise run.diverged."
        )
    if run.target_loss is not None and loss < run.target_loss:
        return "done", f"the loss is below the target {run.target_loss:g} after {progress.step} steps."
    if run.max_seconds is not None and progress.seconds >= run.max_seconds:
        return "done", f"{run.max_seconds:g} seconds are over, after {progress.step} steps."
    if stop and progress.step < run.steps:
        where = session.folder.path
        return "stopped", f"{stop[0]} after {progress.step} steps. Go on with: reroll train --run-dir {where} --resume"
    return None


def _validate(session: Session) -> dict[str, float]:
    """Score the (averaged) weights on held-out data."""
    model, task = session.model, session.task
    averaged = nullcontext() if session.average is None else session.average.swapped_in(trainable(model))
    with averaged, watching() as rollouts:
        found = evaluate(model, task, task.splits[0], session.device)
    session.progress.valid = {f"valid_{name}": value for name, value in found.items()}
    return session.progress.valid | ({"valid_fell_back": rollouts.fell_back} if rollouts.fell_back else {})


def peak_bytes(device: torch.device) -> int:
    """Return the largest memory so far: of the allocator on a card, resident of the process else (0: not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):
        import resource  # Windows has none

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return 0


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect SIGTERM and Ctrl-C instead of dying of them; the second Ctrl-C is let through."""
    received: list[str] = []

    def note(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: signals are someone else's
        yield received
        return
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
