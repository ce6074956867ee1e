"""`reroll bench NAME` and `reroll reproduce NAME`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reroll.cli.flags import parse, positional
from reroll.errors import UsageError, did_you_mean
from reroll.specs.base import option

BENCHES = ("zeroth", "estimator", "rollouts", "grid")


@dataclass(frozen=True)
class Bench:
    name: str = positional(
        "zeroth (speed and memory of CD-RGE), estimator (its gradient), rollouts (ways along time) or grid (DEER's)"
    )
    json: Path | None = option(None, "write the result to this file")
    rounds: int | None = option(
        None, "times everything is measured, of which the median counts; none: 5, 7 for rollouts, 20 for estimator"
    )


@dataclass(frozen=True)
class Reproduce:
    name: str | None = positional("the claim to measure; none: list them", None)
    list: bool = option(False, "list all claims with their last measured values; with a name, all about it")
    full: bool = option(False, "at the published size, which may need a GPU or hours")
    to: Path | None = option(None, "folder for the table and the figure; none: reproduce/ in the cache folder")
    json: Path | None = option(None, "write the result to this file")


def run(command: str, arguments: Sequence[str]) -> int:
    return _bench(arguments) if command == "bench" else _reproduce(arguments)


def _bench(arguments: Sequence[str]) -> int:
    request = parse(Bench, arguments, "reroll bench", "Measure speed and memory, as ratios, in one run.")
    if request.name not in BENCHES:
        raise UsageError(f'bench "{request.name}" is unknown.{did_you_mean(request.name, BENCHES)}')
    if request.rounds is not None and request.rounds < 1:
        raise UsageError(f"rounds={request.rounds} must be greater than zero.")
    _make_room(request.json)
    rounds = {} if request.rounds is None else {"rounds": request.rounds}
    importlib.import_module(f"reroll.bench.{request.name}").run(**rounds, path=request.json)
    return 0


def _reproduce(arguments: Sequence[str]) -> int:
    request = parse(Reproduce, arguments, "reroll reproduce", "Measure a claim of the papers here.")
    from reroll.bench import claims
    from reroll.data.cache import cache_folder

    if request.list or request.name is None:
        if request.name in claims.CLAIMS:
            print(claims.details(claims.CLAIMS[request.name]))
        elif request.name is None:
            print(claims.table(), "reroll reproduce NAME --list says more about one.", sep="\n\n")
        else:
            raise UsageError(f'"{request.name}" is no claim.')
        return 0
    _make_room(request.json)
    folder = request.to or cache_folder() / "reproduce"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--to {folder} cannot be written ({error.strerror}); name another folder.") from None
    result = claims.reproduce(request.name, request.full)
    claim = claims.CLAIMS[request.name]
    print(f"{claim.name}: {claim.says}\n{claim.experiment.report(result)}")
    print(f"published: {claim.published}")
    print(f"measured:  {claim.key} = {result[claim.key]:.4g}, {result['status']} ({claim.tolerance})")
    print(f"{result['hardware']}, commit {result['commit']}, {result['seconds']:.0f} s")
    print("\n".join(claims.write(request.name, result, folder)))
    if request.json is not None:
        request.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["status"] == "holds" else 1


def _make_room(path: Path | None) -> None:
    """Refuse a file that cannot be written before the minutes of measuring, not after them."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror}); name another file.") from None
    if path.is_dir() or not path.name:
        raise UsageError(f"--json {str(path)!r} is a folder; name a file in it.")
