"""Rebuild the weights of any step of a run from its seed and journal, without its data.

    θ_0 from the seed (or the saved initial weights), checked against its checksum
    for each record: ĝ = Σ_k c_k z_k from its key and coefficients; a step of the run's optimizer with its η

The optimizer is run again with its recorded settings, which rebuilds its momentum and moments too. On the run's machine
and version of torch, the weights are the run's bit for bit.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from reroll.errors import RunError, UsageError, plural
from reroll.grad.base import Seeded, padding_rows, trainable
from reroll.grad.evaluate.in_place import snap_to_grid
from reroll.kernels.noise_axpy import noise_of
from reroll.models import Interface
from reroll.optim import apply, configure
from reroll.specs.model import ObjectModel
from reroll.train import checkpoint, journal, toml
from reroll.train.config import Config, resolve
from reroll.train.load import build_model
from reroll.train.records import read_config
from reroll.train.session import Session

log = logging.getLogger(__name__)


def replay(path: Path, to: int | None = None, session: Session | None = None) -> tuple[Any, int]:
    """Return the model as it was after some steps, on the CPU.

    Args:
        path: the run folder.
        to: how many steps; None: all in the journal.
        session: for a run of objects, its session, created again as it was at the start; its model is returned.

    Returns:
        The model and the number of steps.

    Raises:
        UsageError: if the run has no such step, or was trained by backprop, which has no journal.
        RunError: if the journal is damaged, or the initial weights are not the run's.
    """
    config = resolve(read_config(path))
    if not config.gradient.seeded:
        saved = ", ".join(p.name for p in checkpoint.all_of(path / "checkpoints")) or "none"
        raise UsageError(f"{path} was trained by backprop, whose steps cannot be replayed; its checkpoints: {saved}.")
    if isinstance(config.model, ObjectModel) and session is None:
        raise UsageError(
            f"{path} was trained with your own {config.model.name}: create its session again in Python, and call "
            "reroll.train.replay.replay(path, session=session)."
        )
    record = journal.read(path / "journal")
    steps = record.steps if to is None else to
    if record.damage and (to is None or to > record.steps):
        raise RunError(record.damage)
    if not 0 <= steps <= record.steps:
        raise UsageError(f"to={to}: the journal of {path} has {plural(record.steps, 'step')}.")
    if record.torn:
        log.warning("%s: the last record is incomplete (%d bytes), and ignored.", record.path, record.torn)
    try:
        # The config that the run was trained with, whatever config.toml says now.
        config = toml.overlay(Config(), toml.parse(record.header["config"]), str(record.path))
        return _take_steps(path, config, record, steps, session), steps
    except RunError:
        raise
    except checkpoint.UNREADABLE as error:
        what = f"{type(error).__name__}: {error}"
        raise RunError(f"the journal of {path} is from another run or version of reroll ({what}).") from None


def _take_steps(path: Path, config: Config, record: journal.Journal, steps: int, session: Session | None) -> Any:
    """Draw the initial weights, check them, and take the steps."""
    header = record.header
    if session is None:
        model: Any = build_model(config.model, Interface.read(header["sizes"]), config.run.seed)
        optimizer = config.optim.build(model, 1.0)  # every record sets its own rate
    else:
        model, optimizer = session.model, session.optimizer
    if header["init"]:
        checkpoint.put_weights(model, checkpoint.load_file(path / "init.safetensors"), "init.safetensors")
    if checkpoint.checksum(checkpoint.weights_of(model)) != header["initial"]:
        raise RunError(
            f"{path}: the initial weights from the seed are not the run's; it was trained with another torch "
            "(see environment.json), or init.safetensors has changed."
        )
    parameters: dict[str, torch.Tensor] = dict(trainable(model))
    padding = padding_rows(model, parameters)
    sums = torch.float64 if header["sums"] == "fp64" else None
    for entry in record.iterate(to=steps):
        if header["restore"] == "grid":  # a skipped step rounds the weights too
            snap_to_grid(parameters, entry.settings.epsilon or 0.0)
        if not entry.terms:  # the gradient was not finite, and the step was skipped
            continue
        configure(optimizer, entry.settings)
        gradient = Seeded(entry.terms, noise_of(header["noise"]), parameters, sums=sums, padding=padding)
        apply(gradient, optimizer, header["update"])
    return model
