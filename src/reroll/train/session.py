"""Everything a run holds while it runs, built from its config, or put back from a checkpoint.

A `Session` is the task, model, estimator, optimizer and record of one run; its `Progress` is all that changes from step
to step besides weights and optimizer. Both together are what a checkpoint saves.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from reroll.data.batch import START, Batch
from reroll.data.task import Task
from reroll.data.tokenizers import from_dict
from reroll.errors import RunError, UsageError
from reroll.grad.base import Estimator, LossFn, trainable
from reroll.grad.central_difference import CentralDifference
from reroll.grad.units import BranchStates
from reroll.kernels.noise_axpy import layout
from reroll.kernels.philox import stream_id
from reroll.keys import Key
from reroll.models import Recurrent
from reroll.optim import Average, Plateau, Schedule, StepSettings
from reroll.specs.base import leaves
from reroll.train import build, checkpoint, journal, toml
from reroll.train.config import Config
from reroll.train.evaluate import Precision
from reroll.train.load import rescue
from reroll.train.mesh import ALONE, Mesh
from reroll.train.process import Clock
from reroll.train.run import RunFolder, read_config, read_json
from reroll.trees import map_state

log = logging.getLogger(__name__)

FAST, SLOW = 0.9, 0.99
"""Decays of the two averages of the loss."""


@dataclass
class Progress:
    """What changes from step to step, besides weights and optimizer.

    Args:
        step: steps taken.
        tokens: input positions seen, of the batch alone (probes see them again).
        forward_passes: evaluations of the loss of a batch.
        seconds: of training, without evaluations.
        first_loss, fast, slow, best: the first loss, its two averages, and the smallest.
        valid: the last score on held-out data.
        refused: steps that were not taken because their gradient was not finite; `refused_in_a_row`: the last ones.
        length: the curriculum's limit, None without one; `below`: steps its loss was low enough.
        carried: state of a carried text.
    """

    step: int = 0
    tokens: int = 0
    forward_passes: int = 0
    seconds: float = 0.0
    first_loss: float = math.nan
    fast: float = math.nan
    slow: float = math.nan
    best: float = math.inf
    valid: dict[str, float] = field(default_factory=dict)
    refused: int = 0
    refused_in_a_row: int = 0
    length: int | None = None
    below: int = 0
    carried: Any = START

    def see(self, loss: float) -> None:
        """Take the loss of a step into the averages."""
        if self.step == 0:
            self.first_loss = self.fast = self.slow = loss
        self.fast = FAST * self.fast + (1 - FAST) * loss
        self.slow = SLOW * self.slow + (1 - SLOW) * loss
        self.best = min(self.best, loss)


@dataclass
class Session:
    """The objects of one run."""

    config: Config
    folder: RunFolder
    device: torch.device
    task: Task
    model: Recurrent
    loss_fn: LossFn
    estimator: Estimator
    optimizer: Any
    schedule: Schedule
    plateau: Plateau
    average: Average | None
    progress: Progress
    precision: Precision
    clock: Clock
    mesh: Mesh = ALONE
    run: str = ""
    journal: journal.Writer | None = None

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, on the device, with the state it carries on."""
        index = 0 if self.config.task.overfit else step
        batch = self.task.batch(index, length=self.progress.length).to(self.device)
        if self.task.carries:
            gradient = self.config.gradient
            begins = gradient.per_branch_state and gradient.episode_begin(step) == step
            batch = replace(batch, state=START if begins else self.progress.carried)
        return batch

    def key(self) -> Key:
        """Return the key of the present step: the windows of an episode share one."""
        return Key(self.config.run.seed).at(self.config.gradient.episode_begin(self.progress.step))

    def settings(self) -> StepSettings:
        """Return the settings of the present step: base rate, schedule, plateau, and the ε tied to them."""
        base = self.config.optim.lr
        assert isinstance(base, float)
        lr = base * self.schedule(self.progress.step) * self.plateau.multiplier
        return StepSettings(lr, epsilon=self.epsilon(lr))

    def epsilon(self, lr: float) -> float:
        """Return ε: tied to the current learning rate, or fixed but for plateaus, with a floor."""
        return self.config.gradient.epsilon_at(lr, self.plateau.multiplier)

    def save(self) -> Path:
        """Write a checkpoint of the present step, behind the record of all steps that led to it."""
        self.folder.sync()
        if self.journal is not None:
            self.journal.sync()
        state = {
            "run": self.run,
            "progress": asdict(replace(self.progress, carried=None)),
            "carried": None if self.progress.carried is START else self.progress.carried,
            "optimizer": self.optimizer.state_dict(),
            "plateau": self.plateau.state_dict(),
            "average": self.average and {"count": self.average.count, "tensors": self.average.tensors},
        }
        return checkpoint.save(self.folder.checkpoints, self.progress.step, self.model, state, self.config.run.keep)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Put everything back as it was when the checkpoint was written.

        Raises:
            RunError: if the checkpoint is of another model, or of another version.
        """
        checkpoint.put_weights(self.model, saved.weights, "the checkpoint")
        try:
            self._restore(saved.state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise RunError(f"The checkpoint of step {saved.step} is of another version of reroll ({what}).") from None

    def _restore(self, state: dict[str, Any]) -> None:
        self.run = state["run"]
        self.progress = Progress(**{**state["progress"], "carried": START})
        if state["carried"] is not None:
            self.progress.carried = self._carried(state["carried"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.plateau.load_state_dict(state["plateau"])
        if self.average is not None and state["average"] is not None:
            self.average.count = state["average"]["count"]
            self.average.tensors = {n: t.to(self.device) for n, t in state["average"]["tensors"].items()}

    def _carried(self, saved: Any) -> Any:
        """The carried state with the types the cells gave it: a checkpoint keeps plain tuples."""
        template = self.model.start(1)

        def typed(values: Any) -> Any:
            leaves: list[torch.Tensor] = []
            map_state(values, lambda t: leaves.append(t.to(self.device)) or t)
            flat = iter(leaves)
            return map_state(template, lambda _: next(flat))

        if self.config.gradient.per_branch_state:
            return BranchStates(None if branch is None else typed(branch) for branch in saved)
        return typed(saved)


def open_session(
    config: Config, path: Path, *, resume: bool = False, init: dict[str, torch.Tensor] | None = None
) -> tuple[Session, str]:
    """Begin a run in a folder, or go on with the one that is there.

    Args:
        config: resolved.
        path: the run folder.
        resume: go on with what the folder holds; an empty or absent one is begun.
        init: weights to begin with instead of drawn ones.

    Returns:
        The session, and a sentence on how it begins.

    Raises:
        UsageError: if the folder or config cannot be used, or the config is not the folder's.
        RunError: if what the folder holds is damaged.
    """
    folder = RunFolder(path)
    if not (resume and (path / "config.toml").is_file()):
        if not (resume and folder.is_unbegun()):
            folder.refuse_used(resume)
        return _begin(config, folder, init), _says_start(path, resume)
    folder.refuse_running()
    saved = checkpoint.newest(folder.checkpoints)
    if saved is None and not checkpoint.all_of(folder.checkpoints):
        # Nothing was trained yet, so nothing binds it to the config it was to be trained with.
        folder.cut_metrics(0)
        return _begin(config, folder, init), f"{path} has no checkpoint yet: it begins again, at step 0."
    config, extra = agree(read_config(path), config), read_json(path / "environment.json")
    if saved is None or not {"sizes", "run"} <= extra.keys():
        what = "none of its checkpoints is whole" if saved is None else "environment.json is missing or damaged"
        remedy = rescue(path, config) if saved is None else "Begin another run in another folder."
        raise RunError(f"{path} cannot be resumed: {what}. It is left as it is. {remedy}")
    if config.run.steps < saved.step:
        raise UsageError(
            f"--steps {config.run.steps}: {path} has taken {saved.step} steps already, and none is taken back. "
            "Give more to go on."
        )
    record = journal.read(folder.journal) if config.gradient.seeded else None
    _require_one_run(folder, config, extra, saved, record)
    session = _build(config, folder, extra)
    session.restore(saved)
    note = f"Resuming {path} at step {saved.step}."
    if record is not None:
        session.journal = journal.Writer.append(record, saved.step)
        if record.torn:
            note += f" The journal's last record was torn ({record.torn} bytes); it is dropped."
        if record.damage:
            note += f" The journal is damaged at step {record.steps}, from where on it is written again."
    # From here on, what is later than the checkpoint goes: it is about to be made again.
    folder.write_config(config)
    folder.cut_metrics(saved.step)
    checkpoint.set_aside(folder.checkpoints, saved.step)
    folder.clear_temporary()
    return session, note


def _says_start(path: Path, resume: bool) -> str:
    return f"Nothing to resume in {path}: a new run begins." if resume else f"Run folder: {path}"


FREE = {
    "run.steps", "run.max_seconds", "run.target_loss", "run.target_valid", "run.eval_every", "run.checkpoint_every",
    "run.keep", "run.log_every", "run.warm_up",
}  # fmt: skip
"""What may change when a run is resumed; everything else would make it another run."""
DERIVED = {"gradient.chunk", "run.threads"}
"""What is none until static rules decide it, once; none says nothing about the run to resume."""


def agree(saved: Config, given: Config) -> Config:
    """Return the saved config of a resumed run with what may change taken from the given one.

    Raises:
        UsageError: if another field was given with another value.
    """
    changed: dict[str, Any] = {}
    old = leaves(saved)
    for name, value in leaves(given).items():
        if name == "recipe" or value == old.get(name) or value == "auto" or (value is None and name in DERIVED):
            continue
        if name not in FREE:
            raise UsageError(
                f"{name}={value!r}, but the run to resume has {old.get(name)!r}. Leave it as it was, or begin another "
                "run."
            )
        changed[name.removeprefix("run.")] = value
    return saved.replace(run=changed)


def run_id(config: Config, extra: dict[str, Any]) -> str:
    """Return the name of a run in its files: a digest of its `binding` config, initial weights and data."""
    parts = (toml.dumps(binding(config)), extra.get("initial"), extra.get("fingerprint"))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def binding(config: Config) -> Config:
    """Return a config with what may change when a run is resumed left out: what makes it this run and no other."""
    free = {name.partition(".")[2] for name in FREE}
    return config.replace(run={name: getattr(Config().run, name) for name in free})


def _require_one_run(
    folder: RunFolder, config: Config, extra: dict[str, Any], saved: checkpoint.Checkpoint, record: Any
) -> None:
    """Raise `RunError` if config, environment, checkpoint and journal do not name one run."""
    name, step = extra["run"], f"step-{saved.step:08d}"
    wrong = {
        f"checkpoints/{step} is of another run": saved.state.get("run") != name,
        "the journal is of another run": record is not None and record.header.get("run") != name,
        "config.toml or environment.json is not what it was when the run began": run_id(config, extra) != name,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise RunError(f"{folder.path} cannot be resumed: {what}. Bring back the run's own, or begin another run.")


def _begin(config: Config, folder: RunFolder, init: dict[str, torch.Tensor] | None) -> Session:
    """Begin a run; of one that was killed before its first checkpoint, the initial weights are still there."""
    session = _build(config, folder, None)
    if folder.init.exists():
        init = checkpoint.load_file(folder.init)
    if init is not None:
        checkpoint.put_weights(session.model, init, "--init")
    folder.make()  # only now, when all that was asked for is known to be there
    if init is not None:
        folder.write_init(checkpoint.weights_of(session.model))
    folder.write_config(config)  # what `--resume` looks for: it comes last
    return session


def _build(config: Config, folder: RunFolder, extra: dict[str, Any] | None) -> Session:
    """Build the objects; `extra` is the environment.json of a run to go on with."""
    device = build.find_device(config.run.device)
    try:
        tokenizer = from_dict(extra["tokenizer"]) if extra and extra.get("tokenizer") else None
    except UsageError as error:
        raise UsageError(f"{folder.path / 'environment.json'}: {error}") from None
    task = config.task.build(config.run.seed, tokenizer)
    if extra and extra.get("fingerprint") not in (None, task.fingerprint):
        before = str(extra["fingerprint"])[:12]
        raise RunError(
            f"The data have changed since the run began (fingerprint {task.fingerprint[:12]}, was {before}): going on "
            "would be another run. Bring the data back, or begin a new one."
        )
    sizes = build.Sizes.of(task)
    model = build.build_model(config.model, sizes, config.run.seed).to(device)
    lr = 1.0 if config.optim.lr == "auto" else config.optim.lr
    schedule, plateau = build.build_schedule(config)
    average = config.optim.average
    progress = Progress(length=config.task.curriculum_start)
    backprop_in_bf16 = not config.gradient.seeded and config.run.dtype == "bf16"
    precision = Precision(device.type, torch.bfloat16 if backprop_in_bf16 else None)
    return Session(
        config, folder, device, task, model, precision.under(task.loss),
        build.build_estimator(config, config.gradient.epsilon_at(lr)), build.build_optim(config, model, lr),
        schedule, plateau, None if average is None else Average(trainable(model), average), progress, precision,
        Clock(device),
    )  # fmt: skip


def start_record(session: Session) -> None:
    """Write config, environment and the journal's header; what a run does before its first step."""
    config, folder, task, model = session.config, session.folder, session.task, session.model
    metadata = task.metadata() | {"initial": checkpoint.checksum(checkpoint.weights_of(model))}
    session.run = run_id(config, metadata)
    folder.write_config(config)
    folder.write_environment(
        run=session.run, **metadata, parameters=sum(p.numel() for p in model.parameters()), device=str(session.device),
    )  # fmt: skip
    if isinstance(session.estimator, CentralDifference):
        header = {
            "run": session.run,
            "config": toml.dumps(binding(config)),
            "sizes": metadata["sizes"],
            "initial": metadata["initial"],
            "noise": session.estimator.kind,
            "restore": config.gradient.restore if config.gradient.evaluate == "in_place" else "copy",
            "update": config.optim.update,
            "sums": session.estimator.sums,
            "init": folder.init.exists(),
            "parameters": [
                {"name": name, "shape": list(p.shape), "layout": layout(p.shape), "id": stream_id(name)}
                for name, p in trainable(model).items()
            ],
            "plan": [session.estimator.evaluate, session.estimator.chunk, config.run.threads],
        }  # fmt: skip
        session.journal = journal.Writer.create(folder.journal, json.loads(json.dumps(header)))
