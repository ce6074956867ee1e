"""`reroll train [RECIPE] [flags]`: a recipe, changed by files and flags, trained into a run folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from reroll.cli.flags import Parser, add_config, as_flags, tables_of
from reroll.errors import UsageError, did_you_mean
from reroll.recipes import RECIPES, by
from reroll.specs.base import leaves
from reroll.specs.task import SERIES
from reroll.train import toml
from reroll.train.config import Config, resolve
from reroll.train.records import read_config
from reroll.train.run import new_folder

EXTRA: dict[str, dict[str, Any]] = {
    "run-dir": {"type": Path, "help": "the run folder itself; none: a new name under runs/"},
    "resume": {"action": "store_true", "help": "go on with the run in --run-dir; begin one if there is none"},
    "init": {"help": "begin with the weights of a run or an exported file"},
    "config": {"type": Path, "nargs": "+", "action": "extend", "help": "TOML files laid over the recipe, in order"},
    "set": {"nargs": "+", "action": "extend", "help": "other fields, as section.field=value (see `reroll show`)"},
}
"""Flags of `train` besides those of the config, and what argparse must know of each."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for: the config, where each changed value is from, and the other flags."""

    config: Config
    origin: dict[str, str]
    flags: Any
    given: dict[str, Any]


def run(command: str, arguments: Sequence[str]) -> int:
    request = read(command, arguments)
    flags, config = request.flags, resolved(request)
    if flags.resume and flags.run_dir is None:
        raise UsageError("--resume goes on with a run; name it: --run-dir runs/NAME (`reroll runs` lists them).")
    if flags.resume and flags.init is not None:
        raise UsageError(f"--init {flags.init} begins a run and --resume goes on with one; drop one of them.")
    from reroll.cli.console import Console
    from reroll.train.loop import train

    init = None
    if flags.init is not None:
        from reroll.train.checkpoint import weights_of
        from reroll.train.load import load

        init = weights_of(load(flags.init))
    path = flags.run_dir or new_folder(config.recipe)
    with Console(config) as console:
        summary = train(config, path, resume=flags.resume, init=init, report=console)
    print(console.farewell(summary, path))
    return 0 if summary["state"] == "done" else 1


def resolved(request: Request) -> Config:
    """Return the resolved config; what is wrong with it is said in the words of the command line.

    Raises:
        UsageError: if it cannot be carried out.
    """
    with as_flags(request.given):
        return resolve(request.config)


def read(command: str, arguments: Sequence[str], about: str = "Train RECIPE, changed by flags and files.") -> Request:
    """Put a command line together: recipe < files < --set < flags."""
    arguments = list(arguments)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    recipe = None if name is None else _recipe(name)
    parser = Parser(f"reroll {command}", _description(command, name, about), f" {name or '[RECIPE]'}")
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="where to begin (see `reroll recipes`); none: demo")
    for flag, options in EXTRA.items():
        if command == "train" or flag in ("config", "set"):
            parser.flag(flag, **options)
    arguments_of = signature(recipe or RECIPES["demo"], eval_str=True).parameters
    for argument in arguments_of.values():
        choices = get_args(argument.annotation) or None
        parser.flag(argument.name, f"{argument.name} of the recipe", argument.default, choices=choices)
    add_config(parser, (recipe or RECIPES["demo"])())
    given = parser.read(arguments)
    if "recipe" in given:
        raise UsageError(f"{given['recipe']} is unknown here: what is trained comes first, and flags behind it.")
    flags = SimpleNamespace(**dict.fromkeys(flag.replace("-", "_") for flag in EXTRA) | given)
    layers = [(toml.load(path), str(path)) for path in flags.config or ()]
    # Kinds first: --set may be of a field that only the kind asked for has.
    kinds = tables_of({flag: given[flag] for flag in ("cell", "gradient", "optimizer") if flag in given})
    layers += [(kinds, ""), (toml.parse_pairs(flags.set or ()), "--set"), (tables_of(given), "")]
    base = _base(name, recipe, flags, {n: value for n, value in given.items() if n in arguments_of}, layers)
    config, origin = base, dict.fromkeys(leaves(base), f"recipe {base.recipe}")
    with as_flags(given):
        for tables, source in layers:
            config, origin = _lay(config, tables, source, origin)
    return Request(config, origin, flags, given)


def _recipe(name: str) -> Callable[..., Config]:
    recipe = RECIPES.get(name.replace("-", "_"))
    if recipe is None:
        hint = f" To train on the file: {_suggestion(name)}" if os.path.exists(name) else did_you_mean(name, RECIPES)
        raise UsageError(f'recipe "{name}" is unknown.{hint}')
    return recipe


def _suggestion(path: str) -> str:
    return f"reroll train {'arrays' if Path(path).suffix.lower() in SERIES else 'text'} --path {path}"


def _base(
    name: str | None,
    recipe: Callable[..., Config] | None,
    flags: Any,
    arguments: dict[str, Any],
    layers: list[tuple[dict[str, Any], str]],
) -> Config:
    """The config that everything is laid over: a resumed run's, the recipe's, or plain defaults under --config."""
    if flags.resume and flags.run_dir is not None and (flags.run_dir / "config.toml").is_file():
        saved = read_config(flags.run_dir)
        if recipe is not None and not flags.config and saved.recipe != recipe().recipe:
            raise UsageError(f'--run-dir {flags.run_dir} holds a run of the recipe "{saved.recipe}", not of "{name}".')
        for argument, value in arguments.items():
            raise UsageError(f"--{argument} {value} chooses the recipe of a new run; leave it out with --resume.")
        return saved
    config = Config() if recipe is None and flags.config else (recipe or RECIPES["demo"])(**arguments)
    for tables, _ in layers:
        gradient = tables.get("gradient", {})
        config = by(config, str(gradient.get("kind") if isinstance(gradient, dict) else gradient))
    return config


def _lay(config: Config, tables: dict[str, Any], source: str, origin: dict[str, str]) -> tuple[Config, dict[str, str]]:
    changed = toml.overlay(config, tables, source)
    touched = dict.fromkeys(_names(tables), source or "flag")
    return changed, {name: touched.get(name, origin.get(name, "default")) for name in leaves(changed)}


def _names(tables: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted names in nested tables; what is no table may be a kind."""
    found: list[str] = []
    for name, value in tables.items():
        name = prefix + name
        found += _names(value, f"{name}.") if isinstance(value, dict) else [name, f"{name}.kind"]
    return found


def _description(command: str, name: str | None, about: str) -> str:
    doc = (_recipe(name).__doc__ or "").strip().splitlines()[:1] if name else []
    example = f"example: reroll {command} {name or 'copy'} --steps 300 --probes 128"
    return "\n\n".join([about, *doc, example, "Any command takes --debug, which shows the traceback of an error."])
