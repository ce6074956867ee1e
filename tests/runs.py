"""Small runs, ways to interrupt them, and what of a run must not depend on whether it was interrupted."""

import random
import signal

import torch

from reroll.train import checkpoint
from reroll.train.config import Config
from reroll.train.loop import Reporter, train
from reroll.train.records import read_metrics

TIMING = {"seconds", "total_seconds", "peak_bytes", "tokens_per_second"}
"""What differs between two runs that are the same."""


def small(**sections):
    """A run of nine steps that takes a tenth of a second; a checkpoint every two steps, at odd places of the scores."""
    base = Config(recipe="copy").replace(
        task={"kind": "copy", "length": 3, "batch": 3},
        model={"hidden": 8, "heads": 2, "embed": 5},
        gradient={"probes": 5, "epsilon": 0.02},
        optim={"lr": 0.1, "momentum": 0.9},
        run={"steps": 9, "eval_every": 3, "checkpoint_every": 2, "threads": 1, "seed": 7},
    )
    return base.replace(**sections)


def write_text(path, seed=0, symbols=900):
    """A text with a pattern in it, and its path."""
    words = ["ab", "bca", "cabb", " ", "d"]
    generator = random.Random(seed)
    path.write_text("".join(generator.choice(words) for _ in range(symbols))[:symbols])
    return path


class Abandoned(BaseException):
    """The process is gone: nothing that would catch an error is run."""


class Interrupt(Reporter):
    """A reporter that ends the run after a step, by a signal or without a word; it keeps what it is told.

    Args:
        step: the step after which; None never.
        how: "signal": SIGTERM, which lets one more step be taken, saves and stops. "abandoned": the step's record is
            written, its checkpoint is not.
    """

    def __init__(self, step=None, how="signal"):
        self.at, self.how, self.notes, self.rows = step, how, [], []

    def note(self, line):
        self.notes.append(line)

    def step(self, row, config):
        self.rows.append(row)
        if row["step"] == self.at:
            if self.how == "abandoned":
                raise Abandoned
            signal.raise_signal(signal.SIGTERM)


def interrupted(config, path, *interrupts, **options):
    """Train with interruptions, each (step, how), then to the end; return the summary and the last reporter."""
    for step, how in interrupts:
        try:
            summary = train(config, path, resume=path.exists(), report=Interrupt(step, how), **options)
            assert (how, summary["state"]) == ("signal", "stopped")
        except Abandoned:
            assert how == "abandoned"
    report = Interrupt()
    return train(config, path, resume=True, report=report, **options), report


def left(path):
    """What a run leaves, without times: to be compared by `same`."""
    saved = checkpoint.newest(path / "checkpoints")
    state = saved.state | {"progress": {k: v for k, v in saved.state["progress"].items() if k != "seconds"}}
    journal = path / "journal"
    return {
        "step": saved.step,
        "weights": checkpoint.checksum(saved.weights),
        "state": state,
        "rows": [{k: v for k, v in row.items() if k not in TIMING} for row in read_metrics(path)],
        "journal": journal.read_bytes() if journal.exists() else None,
    }


def differences(a, b, where=""):
    """Where two nested values differ; NaN equals NaN, tensors and numbers are compared bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        missing = [f"{where}/{key}" for key in keys if key not in a or key not in b]
        return missing + [
            x for key in keys if key in a and key in b for x in differences(a[key], b[key], f"{where}/{key}")
        ]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        found = [] if len(a) == len(b) else [f"{where}: {len(a)} and {len(b)} of them"]
        return found + [x for i, (p, q) in enumerate(zip(a, b)) for x in differences(p, q, f"{where}/{i}")]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    equal = type(a) is type(b) and (a == b or (a != a and b != b))
    return [] if equal else [f"{where}: {str(a)[:40]} and {str(b)[:40]}"]
