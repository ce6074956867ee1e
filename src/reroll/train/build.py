"""From a config to the objects it names: the task, the model, the estimator, the optimizer, on a device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from reroll.cells import DNC, GRU, LEM, LSTM, RNN, Cell, MinGRU, MinRNN, ParaGRU, ParaLSTM
from reroll.data.arrays import READOUTS, Arrays
from reroll.data.synthetic import SYNTHETIC
from reroll.data.task import Readout, Task
from reroll.data.text import Text
from reroll.data.tokenizers import Tokenizer
from reroll.errors import UsageError, nearest
from reroll.grad import Backprop, CentralDifference
from reroll.grad.base import Estimator, trainable
from reroll.grad.evaluate.surroundings import seeded_generators
from reroll.models import Recurrent
from reroll.optim import Plateau, Schedule, build_optimizer
from reroll.rollout import Rollout, Sequential, auto, deer, elk, jacobi, picard, quasi_deer, quasi_elk
from reroll.train.config import Config, ModelConfig, TaskConfig

Units = tuple[list[float], list[float]]
"""The mean and std of every feature of series: what a model was trained to read them in."""
TASKS = (*SYNTHETIC, "text", "arrays")
"""Every task a config can name."""


@dataclass(frozen=True)
class Sizes:
    """What a model must know of its task: enough to build it without the data."""

    vocab: int | None
    inputs: int | None
    outputs: int
    readout: Readout

    @classmethod
    def of(cls, task: Task) -> Sizes:
        return cls(task.vocab, task.inputs, task.outputs, task.readout)

    @classmethod
    def read(cls, saved: Any) -> Sizes:
        """Return the sizes that a file keeps as a dictionary; raise `ValueError` or `TypeError` if it is another."""
        if not isinstance(saved, dict):
            raise ValueError(f"sizes={saved!r} are those of no model")
        sizes = cls(**saved)
        counts = [sizes.outputs, *(n for n in (sizes.vocab, sizes.inputs) if n is not None)]
        whole = len(counts) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in counts)
        if not whole or sizes.readout not in READOUTS:
            raise ValueError(f"sizes={saved!r} are those of no model")
        return sizes


def build_task(
    config: TaskConfig,
    seed: int,
    tokenizer: Tokenizer | None = None,
    *,
    units: Units | None = None,
    whole: bool = False,
) -> Task:
    """Return the task a config names.

    Args:
        config: the section [task].
        seed: names the batches.
        tokenizer: of a text, where it is known already (a resumed run must not make another vocabulary).
        units: mean and std of series, where they are known already (a model reads another file in its own units).
        whole: all of a text or of series is "valid", none of it for training.

    Raises:
        UsageError: for an unknown task, or data that cannot be used.
    """
    eval_batches = config.eval_batches or None
    if config.name == "text":
        options: dict[str, Any] = {"max_vocab": config.max_vocab} if tokenizer is None else {}
        return Text(
            _path(config), tokenizer or config.tokenizer, config.length, config.batch, seed, carry=config.carry,
            field=config.field, eval_batches=eval_batches, whole=whole, **options,
        )  # fmt: skip
    if config.name == "arrays":
        return Arrays(
            _path(config), config.length, config.batch, seed, readout=config.readout, eval_batches=eval_batches,
            whole=whole, units=units,
        )  # fmt: skip
    if config.name not in SYNTHETIC:
        raise UsageError(f'task.name="{config.name}" is no task.{nearest(config.name, TASKS)}')
    return SYNTHETIC[config.name](config.length, config.batch, seed, symbols=config.symbols)


def _path(config: TaskConfig) -> str:
    if config.path is None:
        raise UsageError(f"task {config.name} needs --path.")
    return config.path


def build_model(config: ModelConfig, sizes: Sizes, seed: int) -> Recurrent:
    """Return the model on the CPU, in fp32, with weights drawn from the seed; the global generator is left alone."""
    first = config.embed if sizes.vocab is not None else sizes.inputs
    assert first is not None
    with seeded_generators(seed):
        cells: list[Cell] = []
        for _ in range(config.layers):
            cells.append(_cell(config, cells[-1].output_size if cells else first))
        model = Recurrent(
            tuple(cells),
            vocab=sizes.vocab,
            inputs=sizes.inputs,
            outputs=sizes.outputs,
            readout=sizes.readout,
            rollout=build_rollout(config),
        )
    model.window_floats = config.window_floats
    return model


def _cell(config: ModelConfig, size: int) -> Cell:
    if config.cell == "lstm":
        return LSTM(size, config.hidden, config.heads)
    if config.cell == "dnc":
        return DNC(size, config.hidden, config.word_size, config.memory_size, config.heads)
    kinds = {
        "rnn": RNN, "gru": GRU, "lem": LEM, "min_gru": MinGRU, "min_rnn": MinRNN, "para_gru": ParaGRU,
        "para_lstm": ParaLSTM,
    }  # fmt: skip
    return kinds[config.cell](size, config.hidden)


def build_rollout(config: ModelConfig) -> Rollout:
    """Return how the cells are evaluated along time."""
    if config.rollout == "sequential":
        return Sequential()
    presets = {
        "deer": deer, "quasi_deer": quasi_deer, "elk": elk, "quasi_elk": quasi_elk, "picard": picard, "jacobi": jacobi,
        "auto": auto,
    }  # fmt: skip
    options: dict[str, Any] = {"max_iterations": config.rollout_iterations}
    if config.rollout_rtol is not None:
        options |= {"rtol": config.rollout_rtol, "atol": config.rollout_rtol}
    if config.rollout_variance is not None:
        options["variance"] = config.rollout_variance
    return presets[config.rollout](**options)


def build_estimator(config: Config, epsilon: float) -> Estimator:
    """Return the estimator; `epsilon` is where a tied ε starts."""
    gradient = config.gradient
    if gradient.method == "backprop":
        return Backprop(gradient.accumulate, gradient.truncate, gradient.checkpoint)
    return CentralDifference(
        gradient.probes, epsilon, gradient.noise, gradient.evaluate, gradient.share,
        dtype=torch.bfloat16 if config.run.dtype == "bf16" else None, shaping=gradient.shaping,
        difference=gradient.difference, density=gradient.density, restore=gradient.restore,
        micro_batch=gradient.micro_batch, per_branch_state=gradient.episode is not None, chunk=gradient.chunk,
        threads=config.run.threads, workers=gradient.workers, sums=gradient.sums,
    )  # fmt: skip


def plan_units(config: Config, model: nn.Module, batch: Any) -> tuple[Config, str]:
    """Fill in how probes are evaluated (mode, chunk, threads), by static rules; return the config and a sentence."""
    if config.gradient.method == "backprop":
        threads = config.run.threads or torch.get_num_threads()
        return config.replace(run={"threads": threads}), f"Gradient by backpropagation, on {threads} threads."
    estimator = build_estimator(config, 1.0)
    assert isinstance(estimator, CentralDifference)
    if config.gradient.micro_batch is not None:
        batch = batch.rows(0, min(config.gradient.micro_batch, len(batch)))
    plan = estimator.plan(model, trainable(model), batch)
    gradient = {"evaluate": plan.evaluate, "chunk": plan.chunk}
    note = f"Probes are evaluated {plan.evaluate}, {plan.chunk} at a time ({plan.reason})."
    return config.replace(gradient=gradient, run={"threads": plan.threads}), note


def build_optim(config: Config, model: nn.Module, lr: float) -> Any:
    """Return the optimizer over the trainable parameters."""
    optim = config.optim
    return build_optimizer(
        optim.optimizer, model, lr, momentum=optim.momentum, betas=optim.betas, weight_decay=optim.weight_decay
    )


def build_schedule(config: Config) -> tuple[Schedule, Plateau]:
    """Return the schedule of the learning rate, and the rule that halves it on a plateau."""
    optim = config.optim
    schedule = Schedule(config.run.steps, optim.schedule, optim.warmup, optim.warmdown, optim.floor)
    return schedule, Plateau(optim.plateau, optim.plateau_factor)


def find_device(name: str) -> torch.device:
    """Return the device of a name; "auto" is a CUDA card if there is one, else the CPU.

    Raises:
        UsageError: if the device is not there; the message says which are.
    """
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    if not there[name]:
        raise UsageError(f"device={name} is not there; this machine has {', '.join(d for d in there if there[d])}.")
    return torch.device(name)


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
