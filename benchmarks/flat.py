"""Does a long run keep its memory? Resident memory after 200 steps and at the end, each case in a fresh process.

The bar: 20,000 steps of `batched`, 2,000 of every other evaluator and of every rollout along time (forward and
backward), flat within 2 MB after the first 200.

    python benchmarks/flat.py [CASE …] --json FILE
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
from pathlib import Path

EVALUATORS = ("batched", "in_place", "tiles")
ROLLOUTS = ("Sequential", "auto", "deer", "quasi_deer", "elk", "quasi_elk", "picard", "jacobi")
FIRST = 200


def resident() -> float:
    """MB of this process that are in memory now, less what the allocator would give back."""
    import ctypes

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmRSS in /proc/self/status: this needs Linux.")


def evaluator(name: str):
    """One step of CD-RGE on a small LSTM, through the loop's own step."""
    import torch

    from reroll import CentralDifference, Key, Recurrent
    from reroll.cells import LSTM
    from reroll.data.batch import Batch
    from reroll.data.task import sequence_losses
    from reroll.optim import step

    model = Recurrent(cell=LSTM(8, 16), vocab=11)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    estimator = CentralDifference(4, 0.01, evaluate=name)
    key = Key(0)

    def once(k: int) -> None:
        ids = torch.randint(11, (3, 6))
        batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(3, 5, dtype=torch.bool))
        step(model, sequence_losses, estimator, optimizer, batch, None, key.at(k), update="write")

    return once


def rollout(name: str):
    """Values and gradients of a user's cell along twenty time steps."""
    import torch

    import reroll.rollout as rollouts
    from reroll.cells import GRU

    cell = GRU(3, 5)
    along = getattr(rollouts, name)()

    def once(k: int) -> None:
        states = along(cell, torch.randn(2, 20, 3)).states
        states.square().sum().backward()
        cell.zero_grad(set_to_none=True)

    return once


def measure(case: str, steps: int, line) -> None:
    import torch

    torch.manual_seed(0)
    once = evaluator(case) if case in EVALUATORS else rollout(case)
    for k in range(FIRST):
        once(k)
    before = resident()
    for k in range(FIRST, steps):
        once(k)
    line.send((before, resident()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=[*EVALUATORS, *ROLLOUTS])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    spawn, rows = multiprocessing.get_context("spawn"), {}
    print(f"{'case':12} {'steps':>6} {'MB at 200':>10} {'MB at the end':>14} {'growth':>8}")
    for case in options.cases:
        steps = 20_000 if case == "batched" else 2_000
        here, there = spawn.Pipe()
        process = spawn.Process(target=measure, args=(case, steps, there))
        process.start()
        there.close()  # so that a case that dies ends the wait for it
        before, after = here.recv()
        process.join()
        rows[case] = {"steps": steps, "before_mb": before, "after_mb": after}
        print(f"{case:12} {steps:6} {before:10.1f} {after:14.1f} {after - before:+8.1f}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
