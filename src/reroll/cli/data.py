"""`reroll data prepare NAME`: turn files of an archive into one that `reroll train arrays` reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reroll.cli.flags import parse, positional
from reroll.errors import UsageError, nearest
from reroll.specs.base import option

ARCHIVES = ("eigenworms", "ts")


@dataclass(frozen=True)
class Data:
    action: str = positional("prepare")
    name: str = positional("eigenworms, or ts for any other classified series in .ts files")
    path: Path | None = option(
        None, "a .ts file, or a folder with NAME_TRAIN.ts and NAME_TEST.ts; nothing is downloaded"
    )
    to: Path | None = option(
        None, "folder for NAME.npz; none: the cache folder, where `reroll reproduce elk-fig3` finds it"
    )
    every: int = option(1, "keep every k-th step")


def run(command: str, arguments: Sequence[str]) -> int:
    request = parse(Data, arguments, "reroll data", "Turn files of an archive into one that can be trained on.")
    if request.action != "prepare":
        raise UsageError(f'action "{request.action}" is unknown.{nearest(request.action, ["prepare"])}')
    if request.name not in ARCHIVES:
        raise UsageError(f'archive "{request.name}" is unknown.{nearest(request.name, ARCHIVES)}')
    if request.path is None:
        raise UsageError("--path is missing: name a .ts file or a folder of them; nothing is downloaded.")
    from reroll.data.cache import cache_folder
    from reroll.data.timeseries import prepare

    target = (request.to or cache_folder()) / f"{request.name}.npz"
    arrays = prepare(request.path, target, request.every)
    count, steps, features = arrays["inputs"].shape
    print(f"{target}: {count} series of {steps} steps, {features} features, {len(arrays['labels'])} classes")
    if "held_out" in arrays:
        print(f"held out: the {arrays['held_out'].sum()} series of the test file")
    print(f"train on it: reroll train arrays --path {target} --length {steps}")
    return 0
