"""Does any seed of `cpu-bytes`, shrunk, meet a NaN, and how far apart do seeds end?

    python benchmarks/seeds.py [--seeds 100] [--steps 20] [--coefficients jordan] [--path cpu-bytes]

Two layers of width 32, eight sequences of 64 bytes a step; the recipe's optimizer, and the loop's own step. It prints
mean, standard deviation and range of the last step's losses, and exits with 1 if a seed met a loss, a gradient or
a weight that is not finite.
"""

import argparse
import math
import statistics
import sys
import time

import torch

from reroll.errors import RunError
from reroll.optim.orthogonal import METHODS
from reroll.recipes import cpu_bytes
from reroll.train.config import Config, resolve
from reroll.train.loop import take_step
from reroll.train.session import Session


def shrunk(steps: int, coefficients: str, path: str) -> Config:
    config = cpu_bytes().replace(
        task={"path": path, "vocab": 256, "length": 64, "batch": 8, "valid_tokens": None},
        model={"layers": 2, "heads": 2, "width": 32},
        optim={"ns_coefficients": coefficients}, run={"steps": steps, "threads": 1, "device": "cpu"},
    )  # fmt: skip
    return resolve(config)


def last_loss(config: Config, seed: int) -> float:
    """The loss of the last step; NaN if anything was not finite."""
    session, row = Session.of_config(config.replace(run={"seed": seed})), {}
    session.plan()
    while session.progress.step < config.run.steps:
        try:
            row = take_step(session)
        except RunError as error:  # the first loss
            row = {"reason": str(error)}
        if "reason" in row or "refused_steps" in row:
            print(f"seed {seed}: {row.get('reason', 'a gradient is not finite')}")
            return math.nan
    if all(p.isfinite().all() for p in session.model.parameters()):
        return row["loss"]
    print(f"seed {seed}: a weight is not finite after the last step")
    return math.nan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--coefficients", choices=METHODS, default="jordan")
    parser.add_argument("--path", default="cpu-bytes", help="token shards, or cpu-bytes")
    request = parser.parse_args()
    torch.set_num_threads(1)
    config, began = shrunk(request.steps, request.coefficients, request.path), time.perf_counter()
    losses = [last_loss(config, seed) for seed in range(request.seeds)]
    finite = [loss for loss in losses if math.isfinite(loss)]
    print(
        f"{request.seeds} seeds × {request.steps} steps in {time.perf_counter() - began:.0f} s, "
        f"{len(losses) - len(finite)} not finite"
    )
    if len(finite) > 1:
        print(
            f"last loss {statistics.mean(finite):.4f}, standard deviation {statistics.stdev(finite):.4f}, "
            f"{min(finite):.4f} … {max(finite):.4f}"
        )
    return int(len(finite) < len(losses))


if __name__ == "__main__":
    sys.exit(main())
