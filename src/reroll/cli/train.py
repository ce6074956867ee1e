"""`reroll train [RECIPE] [flags]`: train a recipe, changed by files and flags, into a run folder."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, get_args

from reroll.cli.flags import Parser, add_config, as_flags, flag_fields, run_folder, tables_of
from reroll.cli.launch import launch, launched
from reroll.errors import UsageError, did_you_mean
from reroll.recipes import INSTEAD, RECIPES, by
from reroll.specs.base import leaves
from reroll.specs.task import SERIES
from reroll.train import toml
from reroll.train.config import Config, resolve
from reroll.train.records import read_config
from reroll.train.run import new_folder

EXTRA: dict[str, dict[str, Any]] = {
    "run-dir": {"type": Path, "metavar": "FOLDER", "help": "the run folder (default: a new one under runs/)"},
    "resume": {"action": "store_true", "help": "continue the run in --run-dir; start one if there is none"},
    "nproc": {
        "type": int, "metavar": "N", "help": "train in N processes on this machine (on several machines: torchrun)",
    },
    "init": {"metavar": "RUN", "help": "start from the weights of a run or an exported file"},
    "config": {
        "type": Path, "metavar": "FILE", "nargs": "+", "action": "extend",
        "help": "TOML files that change the recipe, in order",
    },
    "set": {
        "metavar": "FIELD=VALUE", "nargs": "+", "action": "extend",
        "help": "any other fields, as section.field=value (`reroll show` lists them)",
    },
}  # fmt: skip
"""Flags of `train` besides those of the config, with their options for argparse."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for: the config, where each value is from, and the flags that were passed."""

    config: Config
    origin: dict[str, str]
    flags: dict[str, Any]


def run(command: str, arguments: Sequence[str]) -> int:
    request = read(command, arguments)
    config = resolved(request)
    path, resume, source = (request.flags.get(flag) for flag in ("run_dir", "resume", "init"))
    if resume and path is None:
        raise UsageError("--resume needs the run to continue: --run-dir runs/NAME (`reroll runs` lists them).")
    if resume and source is not None:
        raise UsageError(f"--init {source} starts a new run and --resume continues one; drop one of them.")
    named = arguments[:1] and not arguments[0].startswith("-")
    started = path is not None and (path / "config.toml").is_file()
    if resume and not (named or started or "config" in request.flags):
        raise UsageError(
            f"--run-dir {path} has no run to resume (no config.toml; see `reroll runs`). To start one there, name its "
            f"recipe: reroll train RECIPE --run-dir {path}"
        )
    if getattr(config.task, "path", "") is None:
        raise UsageError(_needs_path(config))
    if not (resume and started):
        _require_gpu(config)
    processes = request.flags.get("nproc", 1)
    if processes < 1:
        raise UsageError(f"--nproc {processes} must be 1 or more.")
    if processes > 1 and not launched():
        return launch([sys.executable, "-m", "reroll", command, *arguments], processes)
    path = path or new_folder(config.recipe)
    try:
        with as_flags(request.flags, run_folder(path)):
            return _train(config, path, bool(resume), source)
    except KeyboardInterrupt:
        if launched():  # one of several processes, of which another may know the folder
            raise
        raise KeyboardInterrupt(_what_remains(path)) from None


def _train(config: Config, path: Path, resume: bool, source: str | None) -> int:
    """Train, print the closing lines, and return the exit code."""
    if sys.stdout.isatty() and not launched():
        print(f"Preparing {config.recipe} …", flush=True)  # importing torch and reading the data take seconds
    from reroll.cli.console import Console
    from reroll.train.loop import Reporter, train
    from reroll.train.mesh import Processes

    init = None
    if source is not None:
        from reroll.train.checkpoint import weights_of
        from reroll.train.load import load

        init = weights_of(load(source))
    mesh = Processes.join(config.run.device)
    path = mesh.share(path)
    with Console(config) as console:
        report = console if mesh.writes else Reporter()
        summary = train(config, path, resume=resume, init=init, report=report, mesh=mesh)
    if mesh.writes:
        console.note(console.closing(summary, path))
    mesh.leave()  # after the last line: the others end with 1 as well, and then this one is soon ended
    return 0 if summary["state"] == "done" and summary.get("target_reached", True) else 1


def _needs_path(config: Config) -> str:
    """Return the error for a recipe whose data are the user's own; its docstring says which files it reads."""
    recipe = RECIPES.get(config.recipe)
    _, _, files = ((recipe and recipe.__doc__) or "").strip().partition("\n")[0].partition("--path ")
    which = f" {files.rstrip('.')}" if files else ", the file or folder to train on"
    return f"{config.recipe if recipe else f'task {config.task.kind}'} needs --path{which}."


def _require_gpu(config: Config) -> None:
    """Refuse a recipe that would take months here, unless the device is asked for."""
    if config.recipe in INSTEAD and config.run.device == "auto":
        import torch

        if not torch.cuda.is_available():
            raise UsageError(
                f"{config.recipe} needs a GPU, and there is none here that torch can use. Instead: reroll train "
                f"{INSTEAD[config.recipe]}, the same method in minutes on a CPU; --device cpu trains it here anyway."
            )


def _what_remains(path: Path) -> str:
    """Return what is left of a run that was interrupted before it could save and end."""
    if any((path / "checkpoints").glob("step-*")):
        return f"The newest checkpoint remains; to resume: reroll train --run-dir {path} --resume"
    if not path.exists():
        return "Nothing was trained."
    metrics = path / "metrics.jsonl"
    trained = "No checkpoint was written yet" if metrics.exists() and metrics.stat().st_size else "Nothing was trained"
    return f"{trained}: delete {path}, or start it again with --resume."


def resolved(request: Request) -> Config:
    """Return the resolved config.

    Raises:
        UsageError: if it cannot be run, naming the flag at fault if one is.
    """
    with as_flags(request.flags):
        return resolve(request.config)


def read(command: str, arguments: Sequence[str], about: str = "Train RECIPE, changed by flags and files.") -> Request:
    """Read a command line; later sources win: recipe < files < --set < flags."""
    arguments = list(arguments)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    recipe = None if name is None else _recipe(name)
    parser = Parser(f"reroll {command}", _description(command, name, about), f" {name or '[RECIPE]'}")
    parser.add_argument("recipe", nargs="?", metavar="[RECIPE]", help="see `reroll recipes` (default: demo)")
    for flag, options in EXTRA.items():
        if command == "train" or flag in ("config", "set"):
            parser.flag(flag, **options)
    arguments_of = signature(recipe or RECIPES["demo"], eval_str=True).parameters
    for argument in arguments_of.values():
        choices = get_args(argument.annotation) or None
        parser.flag(argument.name, f"{argument.name} of the recipe", argument.default, choices=choices)
    add_config(parser, (recipe or RECIPES["demo"])())
    flags = parser.read(arguments)
    if "recipe" in flags:
        raise UsageError(f"{flags['recipe']!r} is unexpected here: the recipe comes first, then flags only.")
    layers = [(toml.load(path), str(path)) for path in flags.get("config", ())]
    # Kinds first: --set may name a field that only the kind asked for has.
    kinds = tables_of(
        {f: flags[f] for f, (dotted, *_) in flag_fields().items() if dotted.endswith("kind") and f in flags}
    )
    with as_flags(flags, {"pair ": "--set "}):
        pairs = toml.parse_pairs(flags.get("set", ()))
    layers += [(kinds, ""), (pairs, "--set"), (tables_of(flags), "")]
    config = _base(name, recipe, flags, {n: value for n, value in flags.items() if n in arguments_of}, layers)
    origin, usual = dict.fromkeys(leaves(config), f"recipe {config.recipe}"), getattr(config.gradient, "probes", 0)
    with as_flags(flags):
        for tables, source in layers:
            config = toml.overlay(config, tables, source)
            changed = dict.fromkeys(_names(tables), source or "flag")
            origin = {name: changed.get(name, origin.get(name, "default")) for name in leaves(config)}
    probes, lr = getattr(config.gradient, "probes", usual), config.optim.lr
    asked = config.recipe in RECIPES and origin.get("gradient.probes") in ("flag", "--set")
    default = config.optim.kind == "sgd" and origin["optim.lr"].startswith("recipe")
    if asked and probes < usual and default and isinstance(lr, float):
        # The largest stable rate is proportional to the number of probes, where these are few.
        config = config.replace(optim={"lr": float(f"{lr * probes / usual:.3g}")})
        origin["optim.lr"] = f"recipe {config.recipe}: {lr:g} for {usual} probes"
    return Request(config, origin, flags)


def _recipe(name: str) -> Callable[..., Config]:
    recipe = RECIPES.get(name.replace("-", "_"))
    if recipe is None:
        kind = "arrays" if Path(name).suffix.lower() in SERIES else "text"
        on_file = f" To train on the file: reroll train {kind} --path {name}"
        raise UsageError(
            f'recipe "{name}" is unknown.{on_file if os.path.exists(name) else did_you_mean(name, RECIPES)}'
        )
    return recipe


def _base(
    name: str | None,
    recipe: Callable[..., Config] | None,
    flags: dict[str, Any],
    arguments: dict[str, Any],
    layers: list[tuple[dict[str, Any], str]],
) -> Config:
    """Return the config to change: a resumed run's, the recipe's, or plain defaults with --config alone."""
    folder, files = flags.get("run_dir"), "config" in flags
    if "resume" in flags and folder is not None and (folder / "config.toml").is_file():
        saved = read_config(folder)
        if recipe is not None and not files and saved.recipe != recipe().recipe:
            raise UsageError(f'--run-dir {folder} contains a run of the recipe "{saved.recipe}", not of "{name}".')
        for argument, value in arguments.items():
            raise UsageError(f"--{argument} {value} is for a new run of the recipe; drop it with --resume.")
        return saved
    config = Config() if recipe is None and files else (recipe or RECIPES["demo"])(**arguments)
    for tables, _ in layers:
        gradient = tables.get("gradient", {})
        config = by(config, str(gradient.get("kind") if isinstance(gradient, dict) else gradient))
    return config


def _names(tables: dict[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names in nested tables; a value that stands for a table is its kind."""
    names: list[str] = []
    for name, value in tables.items():
        name = prefix + name
        names += _names(value, f"{name}.") if isinstance(value, dict) else [name, f"{name}.kind"]
    return names


def _description(command: str, name: str | None, about: str) -> str:
    doc = (_recipe(name).__doc__ or "").strip().splitlines()[:1] if name else []
    probes = " --probes 128" * _recipe(name or "copy")().gradient.seeded
    example = f"example: reroll {command} {name or 'copy'} --steps 300{probes}"
    return "\n\n".join([about, *doc, example, "Every command takes --debug, which shows the traceback of an error."])
