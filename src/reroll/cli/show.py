"""`reroll show`: the resolved config of a recipe or run, where each value is from, and what would compute it.
`reroll recipes`: what can be trained."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reroll.cli.flags import as_flags, parse
from reroll.cli.train import Request, read, resolved
from reroll.errors import UsageError, visible
from reroll.recipes import RECIPES
from reroll.specs.base import leaves
from reroll.specs.model import LSTM
from reroll.train import toml
from reroll.train.config import Config
from reroll.train.machine import cores, find_device
from reroll.train.records import ROOT, look_for, read_config, read_json


@dataclass(frozen=True)
class Recipes:
    pass


def run(command: str, arguments: Sequence[str]) -> int:
    if command == "recipes":
        parse(Recipes, arguments, "reroll recipes", "List the recipes: what can be trained, a line each.")
        width = max(map(len, RECIPES))
        for name, recipe in RECIPES.items():
            print(f"{name:<{width}}  {(recipe.__doc__ or '').strip().splitlines()[0]}")
        print("\nTrain one: reroll train NAME. See all of its values: reroll show NAME.")
        return 0
    folder = _run_folder(arguments)
    if folder is not None:
        if len(arguments) > 1:
            raise UsageError(f"{arguments[1]!r} changes nothing of a run; `reroll show {folder}` shows what it did.")
        about = read_json(folder / "environment.json")
        status = read_json(folder / "status.json")
        state = f"{status.get('state', 'unknown')} at step {status.get('step')}; {about.get('parameters')} weights"
        made = f"made by reroll {about.get('reroll')} ({about.get('commit')}) on {about.get('hardware')}"
        print(visible(f"{toml.dumps(read_config(folder))}\n# {state}\n# {made}"))
        return 0
    request = read(
        "show", arguments, "Show the config of RECIPE, changed by flags and files, and where its values are from."
    )
    config = resolved(request)
    with as_flags(request.given):  # what only the estimator itself knows: names of noises and differences
        config.gradient.build(config.gradient.epsilon_at(1.0), config.run)
    print(toml.dumps(config, _origins(request, config)), end="")
    print("\n" + _computing(config))
    return 0


def _run_folder(arguments: Sequence[str]) -> Path | None:
    """The run folder the first argument names, if it names one and no recipe."""
    if not arguments or arguments[0].startswith("-") or arguments[0] in RECIPES:
        return None
    path = look_for(arguments[0])
    if path is not None:
        return path
    if os.sep in arguments[0] or "/" in arguments[0] or (ROOT / arguments[0]).exists():
        raise UsageError(
            f"{arguments[0]!r} is no run: it holds no config.toml. See `reroll runs`, or `reroll recipes`."
        )
    return None


def _origins(request: Request, config: Config) -> dict[str, str]:
    """Where each value is from, with what `resolve` filled in."""
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


def _computing(config: Config) -> str:
    """Which device, dtype and kernels the run would use, and why."""
    import torch

    from reroll.kernels.lstm_scan import _candidates

    device = find_device(config.run.device)
    why = "asked for" if config.run.device != "auto" else "a CUDA card is there" if device.type == "cuda" else "no card"
    lines = [f"# device {device} ({why}), dtype {config.run.dtype}, {cores()} cores, torch {torch.__version__}"]
    if config.gradient.seeded:
        from reroll.kernels.noise_axpy.noises import candidates

        taken = next(c for c in candidates(device.type, torch.float32, torch.float32) if c.applies)
        lines.append(f"# noise by {taken.name}: {taken.reason}")
    if isinstance(config.model, LSTM):
        model, heads = config.model, config.model.heads
        shapes = [(config.task.batch, config.task.length, 1), (1, 1), (4 * model.hidden, model.hidden // heads)]
        number = torch.empty((), device=device if device.type != "mps" else "cpu")
        inputs, _, hh = (number.expand(shape) for shape in shapes)  # the shapes, without the memory
        with torch.no_grad():
            taken = next(c for c in _candidates((inputs, hh, hh)) if c.applies)
        lines.append(f"# lstm, without a gradient, by {taken.name}: {taken.reason}")
    return "\n".join(lines)
