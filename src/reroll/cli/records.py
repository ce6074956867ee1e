"""`reroll records {list,show,verify,submit}`: the ledger of tracks and records, in a clone of the repository."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.cli.flags import as_flags, parse, positional
from reroll.errors import RerollError, RunError, UsageError, did_you_mean, visible
from reroll.ledger import Track, find_track, submit, tracks, verify
from reroll.ledger.record import folders, read_record
from reroll.ledger.track import ROOT
from reroll.specs.base import leaves, option
from reroll.train.records import find_run, look_for, read_config


@dataclass(frozen=True)
class List:
    """List the tracks, and the fastest record of each."""

    root: Path = option(ROOT, "the folder of tracks")


@dataclass(frozen=True)
class Show:
    """Show a track: its rules and its records."""

    track: str = positional("the name of a track (see `reroll records list`)")
    root: Path = option(ROOT, "the folder of tracks")


@dataclass(frozen=True)
class Verify:
    """Recompute a record from its logs; exit with 1 if anything differs."""

    record: str = positional("the folder of a record", "")
    all: bool = option(False, "verify every record of every track")
    root: Path = option(ROOT, "the folder of tracks")


@dataclass(frozen=True)
class Submit:
    """Judge finished runs by a track's rules, and write them as a record."""

    track: str = positional("the name of a track (see `reroll records list`), or a run that only one track fits")
    runs: tuple[str, ...] = positional("run folders of one config and different seeds", ())
    name: str = option("", "name of the record, in a word")
    summary: str = option("", "what was changed, and why")
    baseline: tuple[str, ...] = option((), "runs of the record to beat, made on this machine")
    negative: bool = option(False, "the target was not reached, and that is worth knowing")
    root: Path = option(ROOT, "the folder of tracks")


def run(command: str, arguments: Sequence[str]) -> int:
    actions = {"list": _list, "show": _show, "verify": _verify, "submit": _submit}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: reroll records {{{','.join(actions)}}} [flags]; each takes --help")
        return 0
    if arguments[0] not in actions:
        raise UsageError(f'reroll records "{arguments[0]}" is unknown.{did_you_mean(arguments[0], actions)}')
    return actions[arguments[0]](arguments[1:])


def _list(arguments: Sequence[str]) -> int:
    with as_flags(request := parse(List, arguments, "reroll records list")):
        known = tracks(request.root)
    for track in known.values():
        records = [record for record in _rows(track) if record["status"] == "record"]
        best = min(records, key=lambda record: record["seconds"], default=None)
        shown = "no record yet" if best is None else f"{best['seconds']:.1f} s by {best['name']} ({best['date']})"
        print(f"{track.name:<20} held-out loss ≤ {track.target:g}: {shown}")
    return 0


def _show(arguments: Sequence[str]) -> int:
    request = parse(Show, arguments, "reroll records show")
    with as_flags(request):
        track = find_track(request.track, request.root)
    data = "" if track.fingerprint is None else f", data {track.fingerprint[:12]}"
    data += "" if track.vocab is None else f", {track.vocab:,} symbols"
    print(f"{track.name}: {track.title}\nopened {track.opened}{data}")
    spread = "" if track.sigma is None else f", spread over seeds {track.sigma:g} ({track.sigma_runs} runs)"
    print(f"target: mean held-out loss ≤ {track.target:g}, one-sided t-test p < {track.p:g}{spread}")
    for name, value in track.fixed.items():
        print(f"fixed: {name} = {value}")
    for title, lines in (("free", track.free), ("invalid", track.invalid), ("history", track.history)):
        for line in lines:
            print(f"{title}: {line}")
    rows = _rows(track)
    for record in sorted(rows, key=lambda record: record["seconds"]):
        memory = record["peak_bytes"] / 1e6
        print(
            f"{record['date']}  {record['status']:<8} {record['seconds']:>8.1f} s  {memory:>6.0f} MB  "
            f"loss {record['loss']:.4f}  p = {record['p']:.1g}  {record['name']}: {visible(record['summary'])}"
        )
    if not rows:
        print(f"no record yet; train one: {track.command}, and reroll records submit {track.name} RUN …")
    return 0


def _rows(track: Track) -> list[dict[str, Any]]:
    """Return the records of a track; of a damaged one, print a line."""
    rows = []
    for folder in folders(track.path):
        try:
            rows.append(read_record(folder))
        except RunError as error:
            print(f"damaged: {error}")
    return rows


def _verify(arguments: Sequence[str]) -> int:
    request = parse(Verify, arguments, "reroll records verify")
    with as_flags(request):
        known = tracks(request.root)
    if request.all == bool(request.record):
        raise UsageError("pass either the folder of a RECORD, or --all.")
    # Of every folder, also one without track.toml or record.json: what was deleted must not go unseen.
    every = [folder for track in folders(request.root) for folder in folders(track)]
    failed = 0
    for folder in every if request.all else [Path(request.record)]:
        name = folder.resolve().parent.name
        try:
            if name not in known:
                raise UsageError(f"{folder} is not the folder of a record; those are {request.root}/TRACK/DATE_NAME.")
            record = verify(known[name], folder)
            print(f"ok      {folder}: {len(record['runs'])} runs, loss {record['loss']:.4f}, p = {record['p']:.2g}")
        except RerollError as error:
            if not request.all and isinstance(error, UsageError):
                raise
            failed += 1
            print(f"failed  {error}")
    return 1 if failed else 0


def _submit(arguments: Sequence[str]) -> int:
    of_train = {"without init=…": "without --init", "with lr=": "with --lr "}
    with as_flags(request := parse(Submit, arguments, "reroll records submit"), of_train):
        track, runs = _track_and_runs(request)
        folder = submit(
            track,
            [find_run(run) for run in runs],
            name=request.name,
            summary=request.summary,
            baseline=[find_run(run) for run in request.baseline],
            negative=request.negative,
        )
    print(f"{folder} is written; add it with git, and open a pull request (records/README.md says how).")
    return 0


def _track_and_runs(request: Submit) -> tuple[Track, Sequence[str]]:
    """Return the track and the runs; where the track is left out, the one whose fixed values the first run has."""
    run = look_for(request.track)
    if run is None or request.track in (known := tracks(request.root)):
        if not request.runs:
            raise UsageError("RUNS is missing. Pass run folders of one config and different seeds.")
        return find_track(request.track, request.root), request.runs
    config = leaves(read_config(run))
    fit = [track for track in known.values() if track.fixed.items() <= config.items()]
    if len(fit) != 1:
        names = ", ".join(track.name for track in fit) or "no track"
        raise UsageError(f"{run} fits {names}; name the track: reroll records submit TRACK {run} …")
    return fit[0], (request.track, *request.runs)
