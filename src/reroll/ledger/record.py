"""A record: runs of one config under several seeds, judged by their track's rule, which anyone can verify."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reroll.errors import RunError, UsageError
from reroll.ledger.log import Log, read_log, write_log
from reroll.ledger.track import Track, statistics
from reroll.specs.task import GENERATED
from reroll.train.records import read_json
from reroll.train.run import replacing

STATUSES = ("record", "valid", "negative")
"""Faster than all before; reached the target, but not faster; did not reach it, and is worth knowing."""
PER_RUN = {"run.seed", "run.device", "run.threads", "run.eval_every", "run.checkpoint_every", "run.keep"}
"""Fields in which the runs of one record may differ."""
SHOWN = {
    "name": str, "date": str, "status": str, "summary": str, "seconds": float, "peak_bytes": int, "loss": float,
    "p": float,
}  # fmt: skip
"""Fields of record.json that others than `verify` read, besides `baseline`, if there is one."""


def judge(
    track: Track, folder: Path, summary: str, logs: Sequence[Log], baseline: Sequence[Log] = (), beaten: str = ""
) -> dict[str, Any]:
    """Return what record.json says of a record; its `refusals` are why it is none by its track's rule.

    Args:
        track: the track.
        folder: of the record, DATE_NAME.
        summary: what was changed and why.
        logs: its runs, of different seeds.
        baseline: runs of the record to beat, on the same machine; none: times are not compared.
        beaten: the folder of that record.
    """
    others = _others(track, folder)
    refusals = [f"{log.path.name}: {why}" for log in (*logs, *baseline) for why in _wrong(track, log)]
    refusals += _differences(logs) + _differences(baseline) + _unequal(track, [*logs, *baseline])
    if baseline and beaten not in others:
        refusals.append(f"its baseline, {beaten or 'of no name'}, is no record of the track; submit it without one")
    elif baseline:
        differ = _unlike(baseline[0], read_log(track.path / beaten / "run-0.txt"))
        refusals += [f"the baseline is not the record to beat, {beaten}: it differs in {name}" for name in differ]
    if len(baseline) == 1 or (baseline and len(logs) == 1):
        raise UsageError("times are compared by 2 runs or more of each; pass more, or no baseline.")
    losses = [log.summary["valid_loss"] for log in logs]
    p = track.p_value(losses)
    mean = math.fsum(losses) / len(losses)
    if not (mean <= track.target and p < track.p):
        refusals.append(
            f"the mean loss {mean:.4f} of {len(losses)} runs is not significantly below {track.target:g} "
            f"(p = {p:.2g}; the track asks for p < {track.p:g})"
        )
    fields: dict[str, Any] = {
        "runs": [_row(log) for log in logs], "loss": mean, "p": _rounded(p), "seconds": _mean(logs, "seconds"),
        "peak_bytes": max(log.summary["peak_bytes"] for log in logs),
    }  # fmt: skip
    if baseline:
        rows = [_row(log) for log in baseline]
        fields["baseline"] = {"record": beaten, "runs": rows, **_compared(logs, baseline)}
    status = _status(track, folder, fields.get("baseline"), others)
    rivals = [name for name, other in others.items() if _beats(other) == beaten and other["date"] <= folder.name[:10]]
    if baseline and status == "record" and rivals:
        refusals.append(f"{rivals[0]} is faster than {beaten} too: the later one is to be timed beside the earlier")
    status = "negative" if refusals else status
    about = {"track": track.name, "name": folder.name[11:], "date": folder.name[:10], "summary": summary}
    return about | {"status": status} | fields | {"refusals": refusals}


def submit(
    track: Track,
    runs: Sequence[Path],
    *,
    name: str,
    summary: str,
    baseline: Sequence[Path] = (),
    negative: bool = False,
) -> Path:
    """Write a record of finished runs into the track's folder, and return its folder.

    Args:
        track: the track.
        runs: run folders, of one config and different seeds.
        name: of the record, in a word.
        summary: what was changed and why, for its README.
        baseline: run folders of the newest record, which is to be beaten, made on the same machine.
        negative: what did not reach the target, and is worth knowing, is not refused.

    Raises:
        RunError: if a run is unfinished or damaged, or the runs are no record of the track.
        UsageError: if the name or folder cannot be used.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise UsageError(f"name={name!r} must be letters, digits, _ and -.")
    folder = track.path / f"{time.strftime('%Y-%m-%d')}_{name}"
    if folder.exists():
        raise UsageError(f"name={name!r} is taken: {folder} exists. Choose another.")
    if not runs:
        raise UsageError("runs=() is empty. Pass the run folders of the record.")
    if not summary:
        raise UsageError("summary='' is empty. Say what was changed, and why.")
    for other in folders(track.path):
        read_record(other)  # of a damaged one nobody knows whether it is to be beaten
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        for prefix, some in (("run", runs), ("baseline", baseline)):
            for index, run in enumerate(some):
                write_log(run, temporary / f"{prefix}-{index}.txt")
        record = judge(track, folder, summary, *_logs(temporary), _standing(track) if baseline else "")
        if record["refusals"] and not negative:
            raise RunError(f"{runs[0]} is no record of {track.name}: {'; '.join(record['refusals'])}.")
        (temporary / "record.json").write_text(_text(record), encoding="utf-8")
        (temporary / "README.md").write_text(readme(track, record), encoding="utf-8")
    return folder


def verify(track: Track, folder: Path) -> dict[str, Any]:
    """Recompute a record from its logs, and return it.

    Raises:
        RunError: naming the first thing that is not what the logs give.
    """
    folder = folder.resolve()  # whose name has the date and the name of the record
    record = read_record(folder)
    computed = judge(track, folder, record["summary"], *_logs(folder), _beats(record))
    if computed["refusals"] and record["status"] != "negative":
        raise RunError(f"{folder} is no record of {track.name}: {computed['refusals'][0]}.")
    difference = _difference(record, computed)
    if difference is not None:
        raise RunError(f"{folder / 'record.json'}: {difference}.")
    for name, text in (("record.json", _text(computed)), ("README.md", readme(track, computed))):
        try:
            same = (folder / name).read_text(encoding="utf-8") == text
        except (OSError, ValueError):
            same = False
        if not same:
            raise RunError(f"{folder / name} is missing or has been changed: it is not what the logs give.")
    return record


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record.json of a folder.

    Raises:
        RunError: if it is missing, or lacks what all of them have.
    """
    record = read_json(folder / "record.json")
    kinds = {**SHOWN, "baseline": dict} if "baseline" in record else SHOWN
    if not all(isinstance(record.get(name), kind) for name, kind in kinds.items()):
        raise RunError(f"{folder / 'record.json'} is missing or damaged; restore it, or delete the folder.")
    return record


def folders(path: Path) -> list[Path]:
    """Return the folders in a folder: of tracks, or of a track's records, the oldest first."""
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def readme(track: Track, record: dict[str, Any]) -> str:
    """Return the README of a record: its summary, losses, times, and p-value."""
    lines = [f"# {record['name']}, {record['date']} ({record['status']})", "", record["summary"], ""]
    lines += [f"Track {track.name}: held-out loss ≤ {track.target:g}, p < {track.p:g}.", ""]
    lines += ["| log | seed | held-out loss | seconds | peak MB |", "|---|---|---|---|---|"]
    baseline = record.get("baseline")
    for run in (*record["runs"], *(baseline["runs"] if baseline else ())):
        memory = run["peak_bytes"] / 1e6
        lines += [f"| {run['log']} | {run['seed']} | {run['loss']:.4f} | {run['seconds']:.1f} | {memory:.0f} |"]
    lines += ["", f"Mean loss {record['loss']:.4f}, p = {record['p']:.2g}; mean time {record['seconds']:.1f} s."]
    if baseline:
        low, high = baseline["interval"]
        text = f"The record before, timed on the same machine: {baseline['seconds']:.1f} s"
        ratio = f"ratio {baseline['ratio']:.3f} (95 % interval {low:g} … {high:g})"
        lines += [f"{text}; {ratio}; Welch's t-test, p = {baseline['p']:.2g}."]
    lines += [f"Not met: {why}." for why in record["refusals"]]
    return "\n".join(lines) + "\n"


def _text(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def _wrong(track: Track, log: Log) -> list[str]:
    """What in a log is against the rules of a track."""
    about, wrong = log.environment, []
    for name, data in (("fingerprint", "data"), ("valid_fingerprint", "held-out data")):
        expected, found = getattr(track, name), str(about.get(name))
        if expected is not None and found != expected:
            wrong.append(f"its {data} have the fingerprint {found[:12]}, the track's {expected[:12]}")
    vocab = about["sizes"].get("vocab") if isinstance(about.get("sizes"), dict) else None
    if track.vocab is not None and vocab != track.vocab:
        wrong.append(f"its data have {vocab} symbols, the track's {track.vocab}")
    for name, value in track.fixed.items():
        if log.config.get(name) != value:
            wrong.append(f"{name}={log.config.get(name)!r}, but the track fixes {value!r}")
    hardware, used = str(about.get("hardware")), about.get("processes", 1)
    cores, on_cpu = re.search(r", (\d+) cores", hardware), about.get("device") == "cpu"
    if track.cores is not None and not (on_cpu and cores is not None and int(cores[1]) == track.cores):
        wrong.append(f"it ran on {about.get('device')}, {hardware}, but the track is for {track.cores} cores")
    on_cards = str(about.get("device")).startswith("cuda") and hardware.count(" × ") == 1  # of one kind
    if track.gpus is not None and not (on_cards and used == track.gpus):
        how = f"in {used} process(es) on {about.get('device')}, {hardware}"
        wrong.append(f"it ran {how}; the track is for {track.gpus} GPU(s) of one kind, a process each")
    if about.get("init"):
        wrong.append("its weights are not drawn from its seed: train it without init=…")
    if about.get("searched"):
        wrong.append(
            f"the search for its learning rate is not in its seconds: train it with lr={log.config.get('optim.lr')}"
        )
    commit = about.get("commit")
    if not commit or str(commit).endswith("+"):
        wrong.append(f"its source is {commit or 'of no commit'}: commit your changes, and run it again")
    return wrong


def _differences(logs: Sequence[Log]) -> list[str]:
    """What keeps runs from being one record: one seed twice, another config, other source or data."""
    seeds = [log.config["run.seed"] for log in logs]
    wrong = [f"the runs differ in {name}" for log in logs for name in _unlike(logs[0], log)]
    wrong += ["two runs have one seed"] if len({*seeds}) < len(seeds) else []
    # Of generated data, the seed is part of the fingerprint.
    data = {str(log.environment.get("fingerprint")) for log in logs if log.config["task.kind"] not in GENERATED}
    wrong += ["the runs differ in their data, by its fingerprint"] if len(data) > 1 else []
    commits = sorted({str(log.environment.get("commit")) for log in logs})
    return wrong + ([f"the runs are of several commits, {', '.join(commits)}"] if len(commits) > 1 else [])


def _unequal(track: Track, logs: Sequence[Log]) -> list[str]:
    """What keeps runs from being compared: other hardware or versions, or, if the track names none, held-out data."""

    def setting(log: Log) -> dict[str, Any]:
        about, versions = log.environment, log.environment.get("versions")
        known = versions if isinstance(versions, dict) else {}
        found = {"hardware": about.get("hardware"), "python": known.get("python"), "torch": known.get("torch")}
        return found if track.fingerprint else found | {"valid_fingerprint": about.get("valid_fingerprint")}

    first = setting(logs[0])
    return [
        f"{log.path.name} has {name} {value}, {logs[0].path.name} {first[name]}: the machine and data must be the same"
        for log in logs for name, value in setting(log).items() if value != first[name]
    ]  # fmt: skip


def _unlike(one: Log, other: Log) -> list[str]:
    """The fields in which the configs of two runs differ, but those `PER_RUN`."""
    names = sorted((one.config.keys() | other.config.keys()) - PER_RUN)
    return [name for name in names if one.config.get(name) != other.config.get(name)]


def _logs(folder: Path) -> tuple[list[Log], list[Log]]:
    paths = {prefix: sorted(folder.glob(f"{prefix}-*.txt"), key=_number) for prefix in ("run", "baseline")}
    if not paths["run"]:
        raise RunError(f"{folder} has no log run-0.txt.")
    return [read_log(path) for path in paths["run"]], [read_log(path) for path in paths["baseline"]]


def _number(path: Path) -> int:
    return int("".join(filter(str.isdigit, path.stem)) or 0)


def _row(log: Log) -> dict[str, Any]:
    summary = log.summary
    return {
        "log": log.path.name, "seed": log.config["run.seed"], "loss": summary["valid_loss"],
        "seconds": summary["seconds"], "peak_bytes": summary["peak_bytes"], "sha256": summary["sha256"],
    }  # fmt: skip


def _compared(logs: Sequence[Log], baseline: Sequence[Log]) -> dict[str, Any]:
    """Mean seconds of a baseline, the ratio of the means and its 95 % interval, and p, by Welch's test.

    The interval is that of the difference of the logarithms.
    """
    ours, theirs = ([log.summary["seconds"] for log in some] for some in (logs, baseline))
    test, seconds = statistics().ttest_ind, _mean(baseline, "seconds")
    of_logs = test(*([math.log(second) for second in some] for some in (ours, theirs)), equal_var=False)
    return {
        "seconds": seconds, "ratio": _mean(logs, "seconds") / seconds,
        "interval": [_rounded(math.exp(end)) for end in of_logs.confidence_interval(0.95)],
        "p": _rounded(float(test(ours, theirs, equal_var=False, alternative="less").pvalue)),
    }  # fmt: skip


def _rounded(p: float) -> float:
    """What SciPy computes to three digits: the others depend on its version."""
    return float(f"{p:.3g}")


def _mean(logs: Sequence[Log], name: str) -> float:
    return math.fsum(log.summary[name] for log in logs) / len(logs)


def _status(track: Track, folder: Path, beaten: dict[str, Any] | None, others: dict[str, dict[str, Any]]) -> str:
    """Whether it is a "record" or "valid". Without a baseline only the first one can be a record: machines differ."""
    if beaten is not None:
        return "record" if beaten["ratio"] < 1 and beaten["p"] < track.p else "valid"
    # Of the same day, one that beat a baseline came after the record that is its baseline.
    earlier = [
        other for other in others.values()
        if other["date"] < folder.name[:10] or (other["date"] == folder.name[:10] and "baseline" not in other)
    ]  # fmt: skip
    return "valid" if earlier else "record"


def _others(track: Track, folder: Path) -> dict[str, dict[str, Any]]:
    """The track's records besides one, by the name of their folder; a damaged one is none."""
    found: dict[str, dict[str, Any]] = {}
    for path in folders(track.path):
        with contextlib.suppress(RunError):
            if path.name != folder.name and (record := read_record(path))["status"] == "record":
                found[path.name] = record
    return found


def _beats(record: dict[str, Any]) -> str:
    """The folder of the record that one was timed beside, or ""."""
    return str(record.get("baseline", {}).get("record", ""))


def _standing(track: Track) -> str:
    """The folder of the record to beat, or "": each has beaten the one before, and nobody this one."""
    every = _others(track, Path())
    return max(every.keys() - {_beats(record) for record in every.values()}, default="")


def _difference(record: Any, computed: Any, path: str = "") -> str | None:
    """Where a record is not what was computed, in words."""
    if isinstance(computed, dict) and isinstance(record, dict):
        parts = ((name, record.get(name), computed.get(name)) for name in computed | record)
    elif isinstance(computed, list) and isinstance(record, list) and len(computed) == len(record):
        parts = ((str(i), a, b) for i, (a, b) in enumerate(zip(record, computed)))
    else:
        return None if record == computed else f"{path}={record!r}, but the logs give {computed!r}"
    return next((d for name, a, b in parts if (d := _difference(a, b, f"{path}.{name}".lstrip("."))) is not None), None)
