"""`reroll bench throughput`: how much of the speed of a plain training loop a run has.

    loop       tokens per second of `reroll train` ÷ those of forward, backward and optimizer in a loop of four lines:
               the model of `cpu_bytes`, 16 × 256 bytes a step, steps of both alternately
    record 8   where there is a GPU: the speedrun's configuration, 524,288 tokens a step; tokens per second and MFU

A step of a run is all of it: batch, gradient, checks, update, row of the metrics. Validation and checkpoints are left
out, as they are of the seconds of a run. Tokens are random: their values do not matter for speed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from reroll.bench.harness import Alternate, medians, publish, ratio, spread
from reroll.data.tokens import write_shard
from reroll.kernels.threads import torch_threads
from reroll.models import Interface
from reroll.recipes import cpu_bytes, fineweb_124m
from reroll.train.config import Config
from reroll.train.load import build_model
from reroll.train.loop import train
from reroll.train.records import read_config, read_metrics

PAIRS = 8
"""Pairs of steps in a round."""
WARM = 3
"""Pairs that are not counted."""


def run(rounds: int = 5, path: Path | None = None) -> dict[str, Any]:
    """Measure everything, print it, and write it as JSON if a path is passed."""
    loop = _loop(rounds, cpu_bytes())
    card = _record_8(rounds, fineweb_124m()) if torch.cuda.is_available() else None
    return publish({"run_over_bare": loop["ratio"], "record_8": card, "details": {"loop": loop}}, _report, path)


def _on_random_tokens(config: Config, folder: Path, steps: int, vocab: int) -> Config:
    """Return a config with data for some steps, and one validation at its end, of a batch."""
    batch = config.task.batch * config.task.length
    tokens = np.random.default_rng(0).integers(vocab, size=batch * steps + 1)
    write_shard(folder / "x_train_000001.bin", tokens)
    write_shard(folder / "x_val_000000.bin", tokens[: batch + 1])
    return config.replace(
        task={"path": str(folder), "valid_tokens": batch, "vocab": vocab, "shuffle": False},
        run={"steps": steps, "eval_every": steps, "checkpoint_every": steps, "target_valid": None},
    )


def _bare(config: Config) -> tuple[Any, Callable[[], None]]:
    """Return the run's model, and a step of the plain loop with it, its optimizer and all threads."""
    task = config.task.build(config.run.seed)
    model = build_model(config.model, Interface.of(task), config.run.seed)
    assert isinstance(config.optim.lr, float)
    optimizer, batch = config.optim.build(model, config.optim.lr), task.batch(0)
    inputs, targets, threads = batch.inputs, batch.targets.flatten(), torch.get_num_threads()

    def step() -> None:
        with torch_threads(threads):
            optimizer.zero_grad()
            functional.cross_entropy(model(inputs).flatten(0, 1), targets).backward()
            optimizer.step()

    return model, step


def _loop(rounds: int, config: Config) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="reroll-bench-") as folder:
        config = _on_random_tokens(config, Path(folder), WARM + PAIRS * rounds + 1, 256)
        timer = Alternate(("run", "bare"), _bare(config)[1], wall=True)
        seconds = timer.train(config, Path(folder, "run"), slice(WARM, -1))  # the last one validates
    tokens = config.task.batch * config.task.length
    return {
        "ratio": ratio(seconds, "bare", "run"), "range": spread(seconds, "bare", "run"), "pairs": len(seconds["run"]),
        "of_sums": sum(seconds["bare"]) / sum(seconds["run"]), "seconds": medians(seconds),
        "tokens_per_second": {name: tokens / time for name, time in medians(seconds).items()},
    }  # fmt: skip


def _record_8(rounds: int, config: Config) -> dict[str, Any]:
    """Measure steps on a GPU by the clock of the run, which waits for the device, after some to compile."""
    with tempfile.TemporaryDirectory(prefix="reroll-bench-") as name:
        config = _on_random_tokens(config, Path(name), WARM + 2 * rounds, 50_257)
        config = config.replace(gradient={"device_batch": "auto"}, run={"warm_up": WARM})
        train(config, Path(name, "run"))
        rows, done = list(read_metrics(Path(name, "run")))[WARM:], read_config(Path(name, "run"))
    rates = [row["tokens_per_second"] for row in rows]
    return {
        "tokens_per_second": statistics.median(rates), "range": (min(rates), max(rates)),
        "mfu": statistics.median(row["mfu"] for row in rows) if "mfu" in rows[-1] else None,
        "peak_bytes": rows[-1]["peak_bytes"], "device_batch": getattr(done.gradient, "device_batch", None),
        "compile": done.run.compile, "steps": len(rows),
    }  # fmt: skip


def _report(result: dict[str, Any]) -> str:
    loop, card = result["details"]["loop"], result["record_8"]
    low, high = loop["range"]
    more = (
        f"{low:.3f} … {high:.3f}; of the sums {loop['of_sums']:.3f}; {loop['tokens_per_second']['run']:,.0f} tokens/s"
    )
    lines = [f"{'run ÷ plain loop, tokens/s':<34}{loop['ratio']:>10.3f}  {'≥ 0.97':<20} {more}"]
    value, more = "–", "no GPU here"
    if card is not None:
        mfu = "MFU unknown" if card["mfu"] is None else f"MFU {card['mfu']:.1%}"
        value, more = f"{card['tokens_per_second']:,.0f}", f"{mfu}; {card['device_batch']} sequences at once"
    lines += [f"{'record 8, tokens/s':<34}{value:>10}  {'≥ 490,000 on an H200':<20} {more}"]
    return "\n".join(lines)
