"""`reroll train [RECIPE] [flags]`: a recipe, changed by files and flags, trained into a run folder."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from reroll.cli.flags import as_flags, config_flags, given, parse, together, values_of
from reroll.errors import UsageError, nearest
from reroll.recipes import RECIPES
from reroll.train import toml
from reroll.train.config import Config, fields_of, resolve
from reroll.train.run import new_folder, read_config

ENDINGS = (".csv", ".npy", ".npz")
"""Of files with numbers; those of `reroll.data.series`, whose import takes a second."""
EXTRA = [
    ("run_dir", Path | None, None, "the run folder itself; none: a new name under runs/"),
    ("resume", bool, False, "go on with the run in --run-dir; begin one if there is none"),
    ("init", str | None, None, "begin with the weights of a run or an exported file"),
    ("config", tuple[Path, ...], (), "TOML files laid over the recipe, in order"),
    ("set", tuple[str, ...], (), "any other field, as section.field=value (see `reroll show`)"),
]
"""Flags of `train` besides those of the config."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a command line asks for: the config, where each changed value is from, and the other flags."""

    config: Config
    origin: dict[str, str]
    flags: Any


def run(command: str, arguments: Sequence[str]) -> int:
    request = read(command, arguments)
    flags, config = request.flags, resolved(request)
    if flags.resume and flags.run_dir is None:
        raise UsageError("--resume goes on with a run; name it: --run-dir runs/NAME (`reroll runs` lists them).")
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
        UsageError: if it cannot be carried out, or a flag would have no effect.
    """
    by_flag = {name.partition(".")[2] for name, source in request.origin.items() if source == "flag"}
    refuse_without_effect(request.config, by_flag)
    try:
        return resolve(request.config)
    except UsageError as error:
        raise UsageError(as_flags(str(error), by_flag)) from None


def refuse_without_effect(config: Config, given: Collection[str]) -> None:
    """Raise `UsageError` for a flag, of those that are given, that the task has no use for."""
    task = config.task
    if "path" in given and task.name not in ("text", "arrays"):
        raise UsageError(
            f"--path {task.path} has no effect: {task.name} makes its own sequences. Drop it, or train on the file: "
            f"{_suggestion(str(task.path))}"
        )
    if "tokenizer" in given and task.name != "text":
        raise UsageError(f"--tokenizer {task.tokenizer} has no effect: {task.name} has no text to cut. Drop it.")
    if "path" in given and task.name == "text" and Path(str(task.path)).suffix.lower() in ENDINGS:
        raise UsageError(
            f"--path {task.path} holds numbers, not text: {_suggestion(str(task.path))} (to read it as text "
            "nevertheless, rename it to .txt)."
        )


def _suggestion(path: str) -> str:
    return f"reroll train {'arrays' if Path(path).suffix.lower() in ENDINGS else 'text'} --path {path}"


def read(command: str, arguments: Sequence[str]) -> Request:
    """Put a command line together: recipe < files < --set < flags."""
    arguments = list(arguments)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    if name is not None and name not in RECIPES:
        hint = f" To train on the file: {_suggestion(name)}" if os.path.exists(name) else nearest(name, RECIPES)
        raise UsageError(f'recipe "{name}" is unknown.{hint}')
    prog = f"reroll {command}{' ' + name if name else ''}"
    kind = config_flags("train", EXTRA)
    # The word of config files for "no value", as tyro knows it.
    arguments = ["None" if argument == "none" else argument for argument in together(arguments, ("--set", "--config"))]
    # Flags are read twice: first to find the files and pairs, then with what these say as defaults.
    first = parse(kind, arguments, prog, _description(name), kind(**values_of(_base(name, None))))
    base = _base(name, first)
    config, origin = base, dict.fromkeys(_names(), f"recipe {base.recipe}")
    for path in first.config:
        config, origin = _lay(config, toml.load(path), str(path), origin)
    config, origin = _lay(config, toml.parse_pairs(first.set), "--set", origin)
    extra = {n: getattr(first, n) for n, *_ in EXTRA}
    flags = parse(kind, arguments, prog, _description(name), kind(**values_of(config), **extra))
    config, origin = _lay(config, given(config, flags), "flag", origin)
    return Request(config, origin, flags)


def _base(name: str | None, flags: Any) -> Config:
    """The config that everything is laid over: a resumed run's, the recipe's, or plain defaults under --config."""
    if flags is not None and flags.resume and flags.run_dir is not None and (flags.run_dir / "config.toml").is_file():
        saved = read_config(flags.run_dir)
        if name is not None and not flags.config and saved.recipe != name:
            raise UsageError(f'--run-dir {flags.run_dir} holds a run of the recipe "{saved.recipe}", not of "{name}".')
        return saved
    if name is not None:
        return RECIPES[name]()
    return Config() if flags is not None and flags.config else RECIPES["demo"]()


def _lay(config: Config, tables: dict[str, Any], source: str, origin: dict[str, str]) -> tuple[Config, dict[str, str]]:
    changed = toml.overlay(config, tables, source)
    touched = {f"{s}.{name}" for s, fields in tables.items() if isinstance(fields, dict) for name in fields}
    return changed, origin | dict.fromkeys(touched, source)


def _names() -> list[str]:
    return [f"{section}.{f.name}" for section, f, _ in fields_of(Config())]


def _description(name: str | None) -> str:
    about = (RECIPES[name].__doc__ or "").strip().splitlines()[0] if name else "Train the recipe `demo`, or RECIPE."
    example = f"example: reroll train {name or 'copy'} --steps 300 --probes 128"
    return f"{about}\n\n{example}\nAny command takes --debug, which shows the traceback of an error."
