"""`reroll show`: the resolved config of a recipe or run, where each value is from, and what it would run on.
`reroll recipes`: what can be trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reroll.cli.flags import as_flags, parse
from reroll.cli.lines import hanging
from reroll.cli.train import Request, read, resolved
from reroll.errors import UsageError, visible
from reroll.recipes import RECIPES
from reroll.specs.base import leaves
from reroll.specs.gradient import ProbeOptions
from reroll.specs.model import LSTM
from reroll.specs.task import Generated
from reroll.train import toml
from reroll.train.config import Config
from reroll.train.machine import cores, find_device
from reroll.train.records import ROOT, look_for, read_config, read_json


@dataclass(frozen=True)
class Recipes:
    """List what can be trained."""


def run(command: str, arguments: Sequence[str]) -> int:
    if command == "recipes":
        parse(Recipes, arguments, "reroll recipes")
        width = max(map(len, RECIPES))
        for name, recipe in RECIPES.items():
            print(hanging(f"{name:<{width}}  ", (recipe.__doc__ or "").strip().splitlines()[0]))
        print("\nTrain one: reroll train NAME. See its settings: reroll show NAME.")
        return 0
    folder = _run_folder(arguments)
    if folder is not None:
        if len(arguments) > 1:
            raise UsageError(f"{arguments[1]!r} cannot change a run; `reroll show {folder}` shows what it did.")
        about = read_json(folder / "environment.json")
        status = read_json(folder / "status.json")
        state = f"{status.get('state', 'unknown')} at step {status.get('step')}; {about.get('parameters')} weights"
        origin = f"trained by reroll {about.get('reroll')} ({about.get('commit')}) on {about.get('hardware')}"
        print(visible(f"{toml.dumps(read_config(folder))}\n# {state}\n# {origin}"))
        return 0
    request = read("show", arguments, "Show the config of RECIPE, changed by flags and files.")
    config = resolved(request)
    with as_flags(request.flags):  # only the estimator itself knows the names of noises and differences
        config.gradient.build(config.gradient.epsilon_at(1.0), config.run)
    print(toml.dumps(config, _origins(request, config)))
    print("\n".join(filter(None, (_backends(config), _size(config), _checkpoints(config)))))
    return 0


def _run_folder(arguments: Sequence[str]) -> Path | None:
    """Return the run folder that the first argument names; None if it names a recipe, or is a flag."""
    if not arguments or arguments[0].startswith("-") or arguments[0] in RECIPES:
        return None
    path = look_for(arguments[0])
    if path is not None:
        return path
    if os.sep in arguments[0] or "/" in arguments[0] or (ROOT / arguments[0]).exists():
        raise UsageError(
            f"{arguments[0]!r} is not a run: it has no config.toml. See `reroll runs`, or `reroll recipes`."
        )
    return None


def _origins(request: Request, config: Config) -> dict[str, str]:
    """Return where each value is from, including those that `resolve` filled in."""
    before, after, origins = leaves(request.config), leaves(config), dict(request.origin)
    kinds = Config().replace(
        **{name: {"kind": getattr(config, name).kind} for name in ("task", "model", "gradient", "optim")}
    )
    defaults = leaves(kinds)
    for name, value in after.items():
        if value != before[name]:
            origins[name] = "derived"
        elif name[-4:] != "kind" and origins[name].startswith("recipe") and value == defaults.get(name):
            origins[name] = "default"
    return origins


def _size(config: Config) -> str:
    """Return the number of weights, where the task is known without files, and of forward passes by probes."""
    import torch

    from reroll.models import Interface

    parts = []
    if isinstance(config.task, Generated):
        with torch.device("meta"):  # the shapes, without the memory
            model = config.model.build(Interface.of(config.task.build(config.run.seed)))
        parts.append(f"{sum(p.numel() for p in model.parameters()):,} weights")
    if isinstance(config.gradient, ProbeOptions):
        from reroll.grad.probes import RULES

        passes = config.gradient.probes * len(RULES[config.gradient.difference].sides)
        parts.append(f"{passes:,} forward passes a step ({config.gradient.probes:,} probes)")
    return f"# {', '.join(parts)}" if parts else ""


def _checkpoints(config: Config) -> str:
    """Return how often a checkpoint is written, and so how much a kill can cost."""
    from reroll.train.loop import SAVE_SECONDS

    every = config.run.checkpoint_every
    return f"# a checkpoint every {every} steps, and at least every {SAVE_SECONDS:g} seconds: a kill loses no more"


def _backends(config: Config) -> str:
    """Return which device, dtype and kernels the run would use, and why."""
    import torch

    from reroll.kernels import lstm_scan

    device = find_device(config.run.device)
    why = "as requested" if config.run.device != "auto" else "CUDA is available" if device.type == "cuda" else "no CUDA"
    lines = [f"# device {device} ({why}), dtype {config.run.dtype}, {cores()} cores, torch {torch.__version__}"]
    if config.gradient.seeded:
        from reroll.kernels.noise_axpy.noises import candidates

        kernel = next(c for c in candidates(device.type, torch.float32, torch.float32) if c.applies)
        lines.append(f"# noise by {kernel.name}: {kernel.reason}")
    if isinstance(config.model, LSTM):
        model, heads = config.model, config.model.heads
        shapes = [(config.task.batch, config.task.length, 1), (1, 1), (4 * model.hidden, model.hidden // heads)]
        number = torch.empty((), device=device if device.type != "mps" else "cpu")
        inputs, _, hh = (number.expand(shape) for shape in shapes)  # the shapes, without the memory
        with torch.no_grad():
            kernel = next(c for c in lstm_scan.candidates((inputs, hh, hh)) if c.applies)
        where = "without a gradient" if config.gradient.seeded else "in evaluation"
        lines.append(f"# lstm, {where}, by {kernel.name}: {kernel.reason}")
    return "\n".join(lines)
