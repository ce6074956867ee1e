"""`reroll bench NAME` and `reroll reproduce NAME`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reroll.cli.flags import as_flags, parse, positional
from reroll.cli.lines import hanging
from reroll.errors import UsageError, did_you_mean
from reroll.specs.base import option

DETAILS = 15
"""Characters before the text in a line of a claim's details."""
BENCHES = ("zeroth", "estimator", "rollouts", "grid", "throughput")


@dataclass(frozen=True)
class Bench:
    """Measure speed and memory, as ratios within one run."""

    name: str = positional(
        "zeroth (speed and memory of CD-RGE), estimator (accuracy of its gradient), rollouts (sequential and parallel "
        "in time), grid (rollouts on the grid of the DEER paper) or throughput (a run's speed beside a plain loop's)"
    )
    json: Path | None = option(None, "write the result to this file")
    rounds: int | None = option(
        None, "repetitions, of which the median is reported (default: 5; rollouts 7, estimator 20)"
    )


@dataclass(frozen=True)
class Reproduce:
    """Measure a claim of the papers on this machine."""

    name: str | None = positional("the claim to measure (default: list them all)", None)
    list: bool = option(False, "list all claims with their last measured values; with NAME, its details")
    full: bool = option(False, "measure at the published size, which may take a GPU, or hours")
    to: Path | None = option(None, "folder for the table and the figure (default: reproduce/ in the cache)")
    json: Path | None = option(None, "write the result to this file")


def run(command: str, arguments: Sequence[str]) -> int:
    return _bench(arguments) if command == "bench" else _reproduce(arguments)


def _bench(arguments: Sequence[str]) -> int:
    request = parse(Bench, arguments, "reroll bench")
    if request.name not in BENCHES:
        raise UsageError(f'bench "{request.name}" is unknown.{did_you_mean(request.name, BENCHES)}')
    if request.rounds is not None and request.rounds < 1:
        raise UsageError(f"--rounds={request.rounds} must be greater than zero.")
    _refuse_unwritable(request.json)
    rounds = {} if request.rounds is None else {"rounds": request.rounds}
    importlib.import_module(f"reroll.bench.{request.name}").run(**rounds, path=request.json)
    return 0


def _reproduce(arguments: Sequence[str]) -> int:
    request = parse(Reproduce, arguments, "reroll reproduce")
    from reroll.bench import claims
    from reroll.data.cache import cache_folder

    if request.name is None:
        rows = claims.rows()
        widths = [max(map(len, column)) for column in zip(*rows)]
        for name, value, says in rows:
            print(hanging(f"{name:<{widths[0]}}  {value:<{widths[1]}}  ", says))
        print("\nDetails of one: reroll reproduce NAME --list")
        return 0
    claim = claims.claim_of(request.name)
    if request.list:
        for line in claims.details(claim).splitlines():
            label, text = line[:DETAILS], line[DETAILS:]
            print(hanging(label, text) if line.startswith("    ") else hanging("", line))
        return 0
    _refuse_unwritable(request.json)
    folder = request.to or cache_folder() / "reproduce"
    with as_flags(request, {"folder=": "--to "}), claims.writing(folder):  # refused now, not after measuring
        pass
    result = claims.reproduce(request.name, request.full)
    print(f"{claim.name}: {claim.says}\n{claim.experiment.report(result)}")
    print(f"published: {claim.published}")
    print(f"measured:  {claim.key} = {result[claim.key]:.4g}, {result['status']} ({claim.tolerance})")
    print(f"{result['hardware']}, commit {result['commit']}, {result['seconds']:.0f} s")
    print("\n".join(claims.write(request.name, result, folder)))
    if request.json is not None:
        request.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if result["status"] == "holds" else 1


def _refuse_unwritable(path: Path | None) -> None:
    """Refuse a file that cannot be written before minutes are spent measuring, not after."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--json {path} cannot be written ({error.strerror}); choose another file.") from None
    if path.is_dir() or not path.name:
        raise UsageError(f"--json {str(path)!r} is a folder; name a file in it.")
