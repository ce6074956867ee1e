"""A `Session`: the objects of a run, built from its config or passed in, and restored from a checkpoint."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch

from reroll.data.batch import START, Batch
from reroll.data.task import Task
from reroll.errors import RunError, UsageError, require_positive
from reroll.grad import Backprop
from reroll.grad.base import Estimator, LossFn, trainable
from reroll.grad.central_difference import CentralDifference
from reroll.grad.evaluate.plan import SMALL
from reroll.grad.probes import RULES
from reroll.grad.units import BranchStates
from reroll.keys import Key
from reroll.models import Interface
from reroll.optim import Average, Plateau, StepSettings
from reroll.specs import gradient as specs
from reroll.specs.base import OBJECT
from reroll.specs.gradient import GradientSpec
from reroll.specs.model import ObjectModel
from reroll.specs.optim import ObjectOptimizer
from reroll.specs.task import ObjectTask
from reroll.train import checkpoint, journal
from reroll.train.config import Config, resolve
from reroll.train.evaluate import Precision
from reroll.train.fit import largest_part, parts_for
from reroll.train.load import build_model, read_about, require_symbols
from reroll.train.machine import Clock, find_device
from reroll.train.mesh import ALONE, Mesh
from reroll.train.rates import Rates
from reroll.train.run import RunFolder
from reroll.trees import map_state

COMPILE: dict[str, Any] = {}
"""Options of `torch.compile`."""
FAST, SLOW = 0.9, 0.99
"""Decays of the two averages of the loss."""


@dataclass
class Progress:
    """What changes from step to step, besides weights and optimizer.

    Args:
        step: steps taken.
        tokens: input positions of the batches so far, counted once however many probes see them.
        forward_passes: evaluations of the loss of a batch.
        seconds: of training, without evaluations; `dollars`: of those that had a price.
        first_loss, fast, slow, best: the first loss, its two averages, and the smallest.
        valid: the last score on held-out data.
        refused: steps skipped because their gradient was not finite; `refused_in_a_row`: the latest of them.
        length: the curriculum's present length, None without a curriculum; `below`: steps with a low enough loss.
        carried: the state of a carried text.
    """

    step: int = 0
    tokens: int = 0
    forward_passes: int = 0
    seconds: float = 0.0
    dollars: float = 0.0
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
        """Add the loss of a step to the averages."""
        if self.step == 0:
            self.first_loss = self.fast = self.slow = loss
        self.fast = FAST * self.fast + (1 - FAST) * loss
        self.slow = SLOW * self.slow + (1 - SLOW) * loss
        self.best = min(self.best, loss)


@dataclass
class Session:
    """The objects of a run, and its config: what they were built from, or what describes them.

    Args:
        config: resolved.
        task, model, estimator, optimizer: the model is on its device already.
        mesh: the processes of the run.
    """

    config: Config
    task: Task
    model: Any
    estimator: Estimator
    optimizer: Any
    mesh: Mesh = ALONE
    run: str = field(init=False, default="")
    folder: RunFolder = field(init=False, repr=False)  # unset before `train`
    journal: journal.Writer | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        config = self.config
        most = self.task.most_steps if isinstance(self.task, Task) and not config.task.overfit else None
        if most is not None and config.run.steps > most:
            raise UsageError(
                f"steps={config.run.steps} are more than the {most} batches of the data; use more data or epochs, or "
                "fewer steps."
            )
        self.device = next(self.model.parameters()).device
        self.plateau = Plateau(config.optim.plateau, config.optim.plateau_factor)
        average = config.optim.average
        self.average = None if average is None else Average(trainable(self.model), average)
        self.progress = Progress(length=config.task.curriculum_start)
        under_autocast = not config.gradient.seeded and config.run.dtype == "bf16"
        self.precision = Precision(self.device.type, torch.bfloat16 if under_autocast else None)
        self.loss_fn: LossFn = self.precision.under(self.task.loss)
        self.clock = Clock(self.device)
        self.rates = Rates.of_run(self.model, config, self.device, self.mesh.size)
        self.mesh.share_out(self.optimizer)

    @classmethod
    def of(
        cls,
        task: Task,
        model: torch.nn.Module,
        estimator: Estimator,
        optimizer: torch.optim.Optimizer,
        *,
        steps: int,
        seed: int = 0,
        clip: float | None = None,
        update: str = "auto",
        average: float | None = None,
        schedule: str | Mapping[str, Any] = "constant",
        mesh: Mesh = ALONE,
        **run: Any,
    ) -> Session:
        """Create a session from your own objects, for `reroll.train.train`; create it again to resume or replay it.

        Args:
            task: a `reroll.data.task.Task`: batches as a function of the step, a loss, a score.
            model: any module, on its device.
            estimator: `CentralDifference` (journaled, can be replayed), `Backprop`, or one of your own.
            optimizer: over the model's parameters; groups keep the ratios of their learning rates.
            steps: length of the run.
            seed: names the probes.
            clip: largest norm of the gradient.
            update: "write", "stream" or "fused"; see `reroll.optim.apply`.
            average: decay of a running average of the weights.
            schedule: of the learning rate: a kind, or a table such as {"kind": "linear", "warmup": 10}.
            mesh: the processes of the run.
            run: the fields of the section [run] (`reroll.specs.run.RunSpec`): eval_every, max_seconds, target_valid …

        Raises:
            UsageError: naming the argument that cannot be used.

        Example:
            >>> from reroll import Backprop, Recurrent, cells
            >>> from reroll.data.synthetic import Copy
            >>> task = Copy(length=3, batch=4)
            >>> model = Recurrent(cell=cells.RNN(8, 8), vocab=task.vocab)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> Session.of(task, model, Backprop(), sgd, steps=10).settings().lr
            0.1
        """
        _require_objects(task, model, estimator, optimizer)
        leading, first = optimizer.param_groups[0], task.batch(0)
        require_positive(lr=float(leading["lr"]))  # which those of the others are relative to
        base = float(leading["lr"]) / leading.get("lr_scale", 1.0)
        for group in optimizer.param_groups:
            group.setdefault("lr_scale", float(group["lr"]) / base)
        gradient, also = described(estimator)
        optim = ObjectOptimizer.of(optimizer, lr=base, clip=clip, update=update, average=average)
        run = {"steps": steps, "seed": seed, **also, **run}
        config = Config(
            recipe=OBJECT, task=ObjectTask.of(task, length=max(first.time, 1), batch=len(first)),
            model=ObjectModel.of(model), gradient=gradient, optim=optim,
        )  # fmt: skip
        config = resolve(config.replace(optim={"schedule": schedule}, run=run))
        return cls(config, task, model, estimator, optimizer, mesh)

    @classmethod
    def of_config(
        cls, config: Config, mesh: Mesh = ALONE, extra: Mapping[str, Any] | None = None, source: str = ""
    ) -> Session:
        """Build everything from a config; `extra` is the environment.json, at `source`, of a run to resume."""
        tokenizer = None if extra is None else read_about(extra, source)[1]
        device = find_device(config.run.device)
        task = config.task.build(config.run.seed, tokenizer)
        if extra is not None:
            require_symbols(task, tokenizer)
        model = build_model(config.model, Interface.of(task), config.run.seed).to(device)
        lr = 1.0 if config.optim.lr == "auto" else config.optim.lr
        estimator = config.gradient.build(config.gradient.epsilon_at(lr), config.run)
        return cls(config, task, model, estimator, config.optim.build(model, lr), mesh)

    @property
    def of_objects(self) -> bool:
        """Whether it was created from objects, whose weights are not a function of the seed."""
        return self.config.model.kind == OBJECT

    def plan(self) -> str:
        """Choose, by static rules, how gradients are evaluated (mode, chunk, threads); return a sentence about it."""
        config, estimator = self.config, self.estimator
        weights = sum(p.numel() for p in trainable(self.model).values())
        if config.gradient.seeded and isinstance(estimator, CentralDifference):
            batch: Any = self.batch(0)
            if estimator.micro_batch is not None:
                batch = batch.rows(0, min(estimator.micro_batch, len(batch)))
            plan = estimator.plan(self.model, trainable(self.model), batch)
            chunk = plan.chunk
            if estimator.chunk is None:  # a unit for every process
                chunk = min(chunk, parts_for(estimator.probes, self.mesh.size))
            config = config.replace(gradient={"evaluate": plan.evaluate, "chunk": chunk})
            sides = len(RULES[estimator.difference].sides)
            at_once = f"{chunk * sides:,} of them" if plan.evaluate == "batched" else f"{chunk:,}"
            note = (
                f"{estimator.probes:,} probes of {weights:,} weights, {estimator.probes * sides:,} forward passes a "
                f"step; evaluated {plan.evaluate}, {at_once} at a time ({plan.reason})."
            )
            threads = plan.threads
        else:
            small = weights <= SMALL and not config.model.iterates
            threads = config.run.threads or (1 if small else torch.get_num_threads())
            note = f"{weights:,} weights, gradient by backpropagation, on {threads} thread{'s' * (threads != 1)}."
            if getattr(config.gradient, "device_batch", None) == "auto":
                most = self._fitting()
                config = config.replace(gradient={"device_batch": most})
                note += f" {most} sequences at once."
        compile = config.run.compile
        if compile == "auto":
            compile = "on" if self._compiles_well() else "off"
        note += " Its blocks are compiled in the first steps." * (compile == "on")
        self.planned(self.mesh.share(config.replace(run={"threads": threads, "compile": compile})))
        return note

    def planned(self, config: Config) -> None:
        """Adopt a config in which it is settled how gradients are evaluated."""
        self.config = config
        execute = getattr(self.estimator, "execute", None)
        if config.gradient.kind != OBJECT:
            self.estimator = config.gradient.build(1.0, config.run)
        if execute is not None and isinstance(self.estimator, CentralDifference):
            self.estimator = replace(self.estimator, execute=execute)
        most = getattr(config.gradient, "device_batch", None)
        if isinstance(most, int) and isinstance(self.estimator, Backprop):
            parts = parts_for(parts_for(config.task.batch, self.mesh.size), most)
            self.estimator = replace(self.estimator, accumulate=min(parts, config.task.batch // self.mesh.size))
        self.estimator = self.mesh.estimator(self.estimator)
        if config.run.compile == "on":  # after the largest batch is found: other sizes would be compiled as well
            self.model.compile(**COMPILE)

    def _compiles_well(self) -> bool:
        """Whether compiling is known to be worth its time, and possible."""
        config, on_card = self.config, self.device.type == "cuda"
        dense_gpt = config.model.kind == "gpt" and config.gradient.kind == "backprop"
        return on_card and dense_gpt and importlib.util.find_spec("triton") is not None

    def _fitting(self) -> int:
        """How many sequences a device holds, of the share of one process."""
        batch: Any = self.batch(0)
        share = batch.rows(0, parts_for(len(batch), self.mesh.size))
        most = largest_part(self.estimator, self.model, self.loss_fn, share, self.key())
        return min(self.mesh.interleave([most]))

    def batch(self, step: int) -> Batch:
        """Return the batch of a step, on the device, with the carried state."""
        index = 0 if self.config.task.overfit else step
        batch: Any = self.task.batch(index, length=self.progress.length).to(self.device)
        if self.task.carries:
            gradient = self.config.gradient
            begins = gradient.per_branch_state and gradient.episode_start(step) == step
            batch = replace(batch, state=START if begins else self.progress.carried)
        return batch

    def key(self) -> Key:
        """Return the key of the current step; the windows of an episode share one."""
        return Key(self.config.run.seed).at(self.config.gradient.episode_start(self.progress.step))

    def settings(self, lr: float | None = None) -> StepSettings:
        """Return the settings of the current step: η by base rate, schedule and plateau, or `lr`; and ε to match."""
        if lr is None:
            optim, run = self.config.optim, self.config.run
            assert isinstance(optim.lr, float)
            lr = optim.lr * optim.schedule(self.progress.step, run.steps) * self.plateau.multiplier
        momentum = self.config.optim.momentum_at(self.progress.step)
        return StepSettings(lr, momentum, self.config.gradient.epsilon_at(lr, self.plateau.multiplier))

    def save(self) -> None:
        """Write a checkpoint of the current step, after the record of all steps that led to it."""
        self.mesh.barrier()
        if not self.mesh.writes:
            return
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
        checkpoint.save(self.folder.checkpoints, self.progress.step, self.model, state, self.config.run.keep)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Restore everything from a checkpoint; refuse one of another model or version."""
        checkpoint.put_weights(self.model, saved.weights, "the checkpoint")
        try:
            self._restore(saved.state)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise RunError(f"The checkpoint of step {saved.step} is from another version of reroll ({what}).") from None

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
        """Return the carried state with the types of the cells' states: a checkpoint stores plain tuples."""
        template = self.model.start(1)

        def typed(values: Any) -> Any:
            leaves: list[torch.Tensor] = []
            map_state(values, lambda t: leaves.append(t.to(self.device)) or t)
            flat = iter(leaves)
            return map_state(template, lambda _: next(flat))

        if self.config.gradient.per_branch_state:
            return BranchStates(None if branch is None else typed(branch) for branch in saved)
        return typed(saved)


def _require_objects(*objects: Any) -> None:
    wanted = (
        ("task", "batch", "a reroll.data.task.Task"), ("model", "named_parameters", "a torch.nn.Module"),
        ("estimator", "__call__", "a reroll.CentralDifference, a reroll.Backprop or one of your own"),
        ("optimizer", "param_groups", "a torch.optim.Optimizer"),
    )  # fmt: skip
    for value, (name, attribute, kind) in zip(objects, wanted):
        if not hasattr(value, attribute):
            raise UsageError(f"{name}={value!r} must be {kind}.")


def described(estimator: Any) -> tuple[GradientSpec, dict[str, Any]]:
    """Return the spec of an estimator, and its fields in the section [run]."""
    if type(estimator) is Backprop:
        return specs.Backprop(**{f.name: getattr(estimator, f.name) for f in fields(Backprop)}), {}
    probes = type(estimator) is CentralDifference and isinstance(estimator.noise, str)
    if not probes or estimator.per_branch_state or estimator.dtype not in (None, torch.bfloat16):
        return specs.ObjectGradient.of(estimator), {}
    also = {"threads": estimator.threads, "dtype": "bf16" if estimator.dtype is torch.bfloat16 else "fp32"}
    return specs.Probes(**{f.name: getattr(estimator, f.name) for f in fields(specs.ProbeOptions)}), also
