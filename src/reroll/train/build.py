"""From a config to the objects it names: the model, the estimator, the optimizer, on a device."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from reroll.errors import UsageError
from reroll.grad import CentralDifference
from reroll.grad.base import Estimator, trainable
from reroll.grad.evaluate.snapshot import seeded_generators
from reroll.models import Interface
from reroll.specs.model import ModelSpec
from reroll.train.config import Config

Units = tuple[list[float], list[float]]
"""The mean and std of every feature of series: what a model was trained to read them in."""


def build_model(spec: ModelSpec, sizes: Interface, seed: int) -> Any:
    """Return the model on the CPU, in fp32, with weights drawn from the seed; the global generator is left alone."""
    with seeded_generators(seed):
        return spec.build(sizes)


def build_estimator(config: Config, epsilon: float) -> Estimator:
    """Return the estimator; `epsilon` is where a tied ε starts."""
    return config.gradient.build(epsilon, config.run)


def build_optim(config: Config, model: nn.Module, lr: float) -> Any:
    """Return the optimizer over the trainable parameters."""
    return config.optim.build(model, lr)


def plan_units(config: Config, estimator: Estimator, model: nn.Module, batch: Any) -> tuple[Config, str]:
    """Fill in how probes are evaluated (mode, chunk, threads), by static rules; return the config and a sentence."""
    if not config.gradient.seeded or not isinstance(estimator, CentralDifference):
        threads = config.run.threads or torch.get_num_threads()
        words = "1 thread" if threads == 1 else f"{threads} threads"
        return config.replace(run={"threads": threads}), f"Gradient by backpropagation, on {words}."
    if estimator.micro_batch is not None:
        batch = batch.rows(0, min(estimator.micro_batch, len(batch)))
    plan = estimator.plan(model, trainable(model), batch)
    gradient = {"evaluate": plan.evaluate, "chunk": plan.chunk}
    note = f"Probes are evaluated {plan.evaluate}, {plan.chunk} at a time ({plan.reason})."
    return config.replace(gradient=gradient, run={"threads": plan.threads}), note


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
