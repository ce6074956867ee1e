"""Starting a run in a folder, or resuming the one that is there."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from reroll.errors import RunError, UsageError
from reroll.grad.central_difference import CentralDifference
from reroll.specs.base import leaves
from reroll.train import checkpoint, journal, toml
from reroll.train.config import Config
from reroll.train.load import recovery_hint
from reroll.train.mesh import ALONE, Mesh
from reroll.train.observers import ends
from reroll.train.records import read_config, read_json, read_metrics
from reroll.train.run import Reader, RunFolder
from reroll.train.session import Session

FREE = {
    "run.steps", "run.max_seconds", "run.target_loss", "run.target_valid", "run.eval_every", "run.checkpoint_every",
    "run.keep", "run.log_every", "run.warm_up", "run.price",
}  # fmt: skip
"""Fields that may change when a run is resumed; any other would make it a different run."""
DERIVED = {"gradient.chunk", "run.threads"}
"""Fields that are none until static rules decide them; none does not contradict the run to resume."""


def open_session(
    what: Config | Session,
    path: Path,
    *,
    resume: bool = False,
    init: dict[str, torch.Tensor] | None = None,
    mesh: Mesh = ALONE,
) -> tuple[Session, str]:
    """Start a run in a folder, or resume the one that is there.

    Args:
        what: a resolved config, or a session of objects.
        path: the run folder.
        resume: resume the folder's run; if it has none, or is absent, start one.
        init: initial weights, instead of random ones.
        mesh: the processes of the run; a session has its own.

    Returns:
        The session, and a sentence on how it starts.

    Raises:
        UsageError: if the folder or config cannot be used, or the config is not the folder's.
        RunError: if the folder's run is damaged.
    """
    mesh = what.mesh if isinstance(what, Session) else mesh
    if not mesh.writes:
        mesh.barrier()  # process 0 comes first
    folder = RunFolder(path) if mesh.writes else Reader(path)
    try:
        session, note = _open(what, path, folder, resume, init, mesh)
        if mesh.writes:
            mesh.barrier()
        mesh.equalize(session.model)
        return session, note
    except BaseException:
        folder.close()
        raise


def _open(
    what: Config | Session,
    path: Path,
    folder: RunFolder,
    resume: bool,
    init: dict[str, torch.Tensor] | None,
    mesh: Mesh,
) -> tuple[Session, str]:
    there = resume and (path / "config.toml").is_file()
    if there:
        folder.lock()
        if checkpoint.all_of(folder.checkpoints):
            return _resume(what, folder, mesh)
    else:
        folder.refuse_used(resume)
    # Before the first checkpoint, nothing ties a run to its config: it may be started with another.
    note = f"Nothing to resume in {path}: starting a new run." if resume else f"Run folder: {path}"
    if there:
        last = folder.last_row()
        lost = "" if last is None else f"; the {last['step'] + 1} steps recorded before are repeated"
        note = f"{path} has no checkpoint yet: starting again, at step 0{lost}."
        folder.cut_metrics(0)
    session = what if isinstance(what, Session) else Session.of_config(what, mesh)
    return _begin(session, folder, init), note


def _resume(what: Config | Session, folder: RunFolder, mesh: Mesh) -> tuple[Session, str]:
    """Restore a run to its newest checkpoint."""
    path, environment = folder.path, folder.path / "environment.json"
    config = merge_resumed(read_config(path), what.config if isinstance(what, Session) else what)
    saved, extra = checkpoint.newest(folder.checkpoints), read_json(environment)
    if saved is None:
        raise _unresumable(path, "none of its checkpoints is intact", recovery_hint(path, config))
    if config.run.steps < saved.step:
        raise UsageError(
            f"steps={config.run.steps}: {path} has already taken {saved.step} steps, which are not undone. "
            "Ask for more to continue."
        )
    _require_time(config, read_config(path), folder.last_row(), saved)
    record = journal.read(folder.journal) if config.gradient.seeded else None
    _require_one_run(folder, config, extra, saved, record)
    session = what if isinstance(what, Session) else Session.of_config(config, mesh, extra, str(environment))
    before, now = extra.get("fingerprint"), session.task.fingerprint
    if before not in (None, now):
        raise RunError(
            f"The data have changed since the run started (fingerprint {now[:12]}, was {str(before)[:12]}): resuming "
            "would make it a different run. Restore the data, or start a new run."
        )
    session.folder = folder
    session.planned(config)
    session.restore(saved)
    _require_a_step(session, folder)
    note = f"Resuming {path} at step {saved.step}."
    for later in (p.name for p in checkpoint.all_of(folder.checkpoints) if checkpoint.step_of(p) > saved.step):
        note += f" The newer checkpoint {later} is damaged, and kept as damaged-{later}."
    if record is not None and mesh.writes:
        session.journal = journal.Writer.append(record, saved.step)
        if record.torn:
            note += f" The journal's last record was incomplete ({record.torn} bytes), and is dropped."
        if record.damage:
            note += f" The journal is damaged at step {record.steps}, and is rewritten from there on."
    last = folder.last_row()
    if last is not None and last["step"] >= saved.step:
        note += f" The {last['step'] + 1 - saved.step} steps recorded after it are repeated."
    # From here on, everything later than the checkpoint is deleted: it is about to be repeated.
    folder.write_config(config)
    damaged = folder.cut_metrics(saved.step)
    if damaged:
        note += f" {damaged} damaged {'row' if damaged == 1 else 'rows'} of metrics.jsonl dropped."
    if mesh.writes:
        checkpoint.set_aside(folder.checkpoints, saved.step)
    folder.clear_temporary()
    return session, note


def _require_time(config: Config, before: Config, last: dict[str, Any] | None, saved: checkpoint.Checkpoint) -> None:
    """Refuse another time limit that the run has used up: what is recorded after the checkpoint would be lost."""
    limit = config.run.max_seconds
    if limit is None or limit == before.run.max_seconds:
        return
    progress = saved.state.get("progress")
    used = [row.get(name) for row, name in ((last, "total_seconds"), (progress, "seconds")) if isinstance(row, dict)]
    seconds = max((float(value) for value in used if isinstance(value, int | float)), default=0.0)
    if seconds >= limit:
        raise UsageError(
            f"max_seconds={limit:g} counts the whole run, which has used {seconds:.3g} s already: give more to "
            "continue. Nothing was changed."
        )


def _require_a_step(session: Session, folder: RunFolder) -> None:
    """Refuse limits that end the run at its checkpoint, if steps after it are recorded: they would be lost."""
    rows = {row["step"]: row for row in read_metrics(folder.path)}
    step = session.progress.step
    if not any(number >= step for number in rows):
        return
    ended = ends(session, rows.get(step - 1, {}), [])
    reason = ended[1] if ended else f"all {step} steps are taken." if session.config.run.steps == step else None
    if reason is not None:
        raise UsageError(
            f"{folder.path} would end at its checkpoint of step {step} ({reason.rstrip('.')}), and lose the steps "
            "recorded after it: change that limit, or drop it. Nothing was changed."
        )


def _unresumable(path: Path, why: str, remedy: str) -> RunError:
    return RunError(f"{path} cannot be resumed: {why}. Nothing was changed. {remedy}")


def merge_resumed(saved: Config, asked: Config) -> Config:
    """Return the saved config of a run to resume, with the fields that may change taken from `asked`.

    Raises:
        UsageError: if any other field has another value.
    """
    changed: dict[str, Any] = {}
    old = leaves(saved)
    for name, value in leaves(asked).items():
        if name == "recipe" or value == old.get(name) or value == "auto" or (value is None and name in DERIVED):
            continue
        if name not in FREE:
            why = " (the number of threads changes the order of sums)" if name == "run.threads" else ""
            raise UsageError(
                f"{name}={value!r}, but the run to resume has {old.get(name)!r}{why}. Keep that value, or start a new "
                "run."
            )
        changed[name.removeprefix("run.")] = value
    return saved.replace(run=changed)


def run_id(config: Config, extra: dict[str, Any]) -> str:
    """Return the id of a run in its files: a digest of its `binding` config, initial weights and data."""
    parts = (toml.dumps(binding(config)), extra.get("initial"), extra.get("fingerprint"))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def binding(config: Config) -> Config:
    """Return a config with the fields that may change on resuming at their defaults: what identifies a run."""
    free = {name.partition(".")[2] for name in FREE}
    return config.replace(run={name: getattr(Config().run, name) for name in free})


def _require_one_run(
    folder: RunFolder, config: Config, extra: dict[str, Any], saved: checkpoint.Checkpoint, record: Any
) -> None:
    """Raise `RunError` unless config, environment, checkpoint and journal belong to one run."""
    if not {"sizes", "run"} <= extra.keys():
        why = "environment.json is missing or damaged"
        if "reroll" in extra and "run" not in extra:
            why = f"it was trained by an older version of reroll ({extra['reroll']})"
        raise _unresumable(folder.path, why, "Start a new run in another folder.")
    name, step = extra["run"], f"step-{saved.step:08d}"
    mismatches = {
        f"checkpoints/{step} is from another run": saved.state.get("run") != name,
        "the journal is from another run": record is not None and record.header.get("run") != name,
        "config.toml or environment.json has changed since the run started": run_id(config, extra) != name,
    }
    for why, is_so in mismatches.items():
        if is_so:
            raise _unresumable(folder.path, why, "Restore the run's own, or start a new run.")


def _begin(session: Session, folder: RunFolder, init: dict[str, torch.Tensor] | None) -> Session:
    """Start a run; one that was killed before its first checkpoint keeps its initial weights."""
    session.folder = folder
    if folder.init.exists():
        init = checkpoint.load_file(folder.init)
    if init is not None:
        checkpoint.put_weights(session.model, init, "init=…")
    restarted = folder.locked
    folder.make()  # only now that task, model and weights exist
    folder.lock()
    if not restarted and (folder.path / "config.toml").exists():  # another process was faster
        folder.refuse_used()
    folder.clear_temporary()
    if init is not None or session.of_objects:
        folder.write_init(checkpoint.weights_of(session.model))
    folder.write_config(session.config)  # last, since `--resume` looks for it
    return session


def start_record(session: Session, searched: bool) -> None:
    """Write config, environment and the journal's header, before the first step of a run.

    Args:
        session: of the run.
        searched: its learning rate was found by a search, whose seconds are nobody's.
    """
    config, folder, model = session.config, session.folder, session.model
    metadata = session.task.metadata() | {"initial": checkpoint.checksum(checkpoint.weights_of(model))}
    session.run = run_id(config, metadata)
    folder.write_config(config)
    folder.write_environment(
        run=session.run, **metadata, parameters=sum(p.numel() for p in model.parameters()), device=str(session.device),
        processes=session.mesh.size, init=folder.init.exists(), searched=searched,
    )  # fmt: skip
    if config.gradient.seeded and session.mesh.writes:
        assert isinstance(session.estimator, CentralDifference)
        header = {
            "run": session.run, "config": toml.dumps(binding(config)), "sizes": metadata["sizes"],
            "initial": metadata["initial"], "noise": session.estimator.directions.name,
            "restore": session.estimator.restore if session.estimator.evaluate == "in_place" else "copy",
            "update": config.optim.update, "sums": session.estimator.sums, "init": folder.init.exists(),
        }  # fmt: skip
        session.journal = journal.Writer.create(folder.journal, header)
