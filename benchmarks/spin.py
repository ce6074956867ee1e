"""What torch's threads cost where others want the cores: a small LSTM, forward and backward (docs/log.md).

    python benchmarks/spin.py [--busy 4] [--threads 1]

Set GOMP_SPINCOUNT around it to see how long threads should spin while they wait for one another.
"""

import argparse
import multiprocessing
import os
import statistics
import time

import torch
from torch import nn


def burn() -> None:
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    others = [multiprocessing.Process(target=burn, daemon=True) for _ in range(options.busy)]
    for other in others:
        other.start()
    embed, lstm, head = nn.Embedding(80, 64), nn.LSTM(64, 64, batch_first=True), nn.Linear(64, 80)
    ids, seconds = torch.randint(80, (32, 64)), []
    until = time.perf_counter() + options.seconds
    while time.perf_counter() < until or len(seconds) < 3:
        began = time.perf_counter()
        nn.functional.cross_entropy(head(lstm(embed(ids))[0]).flatten(0, 1), ids.flatten()).backward()
        seconds.append(time.perf_counter() - began)
    spins = os.environ.get("GOMP_SPINCOUNT", "default")
    print(
        f"{options.threads} threads, {options.busy} busy processes, GOMP_SPINCOUNT {spins}: "
        f"median {1e3 * statistics.median(seconds):.1f} ms, mean {1e3 * statistics.fmean(seconds):.1f} ms a step"
    )


if __name__ == "__main__":
    main()
