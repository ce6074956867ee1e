"""A run in one text file: its config, what it ran on, every row, and a summary in the last line.

    === config.toml
    format = 2 …
    === environment.json
    {"reroll": …, "commit": …, "hardware": …, "fingerprint": …}
    === metrics.jsonl
    {"step": 0, "loss": …, "seconds": …}
    === summary
    {"valid_loss": …, "seconds": …, "peak_bytes": …, "sha256": of everything above}

`reroll train --config` reads the first part as it stands.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.errors import RunError, UsageError
from reroll.specs.base import leaves
from reroll.train import toml
from reroll.train.config import Config
from reroll.train.rates import mean_mfu
from reroll.train.records import number, read_json, read_metrics

PARTS = ("config.toml", "environment.json", "metrics.jsonl", "summary")
COLUMNS = ("step", "loss", "lr", "seconds", "peak_bytes", "tokens", "mfu", "dollars")
"""What a log keeps of a row, besides scores of held-out data."""


@dataclass(frozen=True)
class Log:
    """What a log says.

    Args:
        path: the file.
        config: its values by dotted name.
        environment: versions, commit, hardware, fingerprint.
        rows: one per step.
        summary: the last line.
    """

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def summarize(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the rows of a run come to: the last held-out loss, seconds of training, the largest memory.

    And, where the rows have them, tokens per second, MFU and dollars.
    """
    scores = [row["valid_loss"] for row in rows if "valid_loss" in row]
    seconds, last = math.fsum(row["seconds"] for row in rows), rows[-1] if rows else {}
    rates = {"tokens_per_second": round(last["tokens"] / seconds, 1)} if "tokens" in last and seconds else {}
    if (mfu := mean_mfu(rows)) is not None:
        rates["mfu"] = round(mfu, 4)
    rates |= {"dollars": round(last["dollars"], 4)} if "dollars" in last else {}
    return rates | {
        "steps": len(rows),
        "valid_loss": scores[-1] if rows and "valid_loss" in rows[-1] else None,
        "seconds": seconds,
        "peak_bytes": max((row.get("peak_bytes") or 0 for row in rows), default=0),
    }


def write_log(run: Path, to: Path) -> None:
    """Write the log of a finished run.

    Raises:
        RunError: if the run is not finished, or its record is damaged.
    """
    status = read_json(run / "status.json")
    if status.get("state") != "done":
        state = f"is {status['state']}, not done" if "state" in status else "has no status.json"
        raise RunError(f"{run} {state}; let it finish, then submit it.")
    rows = [
        {name: value for name, value in row.items() if name in COLUMNS or name.startswith("valid_")}
        for row in read_metrics(run)
    ]
    environment = read_json(run / "environment.json")
    # A log is public: of the paths of whoever ran it, it has the last part.
    command = [Path(word).name if Path(word).is_absolute() else word for word in environment.get("command", ())]
    environment |= {"command": command}
    config = (run / "config.toml").read_text(encoding="utf-8").strip()
    parts = (config, json.dumps(environment), "\n".join(map(json.dumps, rows)))
    text = "".join(f"=== {name}\n{part}\n" for name, part in zip(PARTS, parts)) + "=== summary\n"
    try:
        summary = summarize(rows) | {"sha256": hashlib.sha256(text.encode()).hexdigest()}
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{run / 'metrics.jsonl'} is damaged: {type(error).__name__} {error}") from None
    to.write_text(text + json.dumps(summary) + "\n", encoding="utf-8")
    read_log(to)  # what could not be verified is not written


def read_log(path: Path) -> Log:
    """Return a log, recomputed: the checksum, the steps, the sums and the last line.

    Raises:
        RunError: naming the file and what is wrong with it.
    """
    try:
        text = path.read_text(encoding="utf-8")
        head, _, last = text.rpartition("=== summary\n")
        first, environment, metrics = (_part(head, name) for name in PARTS[:3])
        config = leaves(toml.overlay(Config(), toml.parse(first), str(path)))
        rows = [json.loads(line) for line in metrics.splitlines()]
        summary, about = json.loads(last), dict(json.loads(environment))
        expected = summarize(rows) | {"sha256": hashlib.sha256(f"{head}=== summary\n".encode()).hexdigest()}
    except (ArithmeticError, AttributeError, KeyError, OSError, TypeError, UsageError, ValueError) as error:
        raise RunError(f"{path} is no log of a run: {type(error).__name__} {error}") from None
    for name, value in expected.items():
        if summary.get(name) != value:
            raise RunError(f"{path} has been changed: its rows give {name}={value}, its last line {summary.get(name)}.")
    if last != json.dumps(summary) + "\n":  # a 17th digit may be another and the number the same
        raise RunError(f"{path} has been changed: its last line is not as it was written.")
    if [row.get("step") for row in rows] != list(range(config["run.steps"])):
        raise RunError(f"{path} has {len(rows)} rows, not each of the {config['run.steps']} steps once.")
    if number(summary, "valid_loss") is None:
        raise RunError(f"{path} has no held-out loss after its last step.")
    return Log(path, config, about, rows, summary)


def _part(text: str, name: str) -> str:
    begin = text.index(f"=== {name}\n") + len(f"=== {name}\n")
    end = text.find("\n=== ", begin)
    return text[begin : end if end >= 0 else len(text)]
