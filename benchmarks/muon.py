"""A step of Muon for the matrices of a 124M GPT, ours against torch.optim.Muon's: python benchmarks/muon.py [THREADS]

48 matrices of 768 × 768, and twelve each of 3072 × 768 and 768 × 3072, in turn, the same gradients.
"""

import statistics
import sys
import time

import torch

from reroll import Muon

SHAPES = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12
ROUNDS = 7


def seconds(optimizer: torch.optim.Optimizer) -> float:
    begin = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - begin


def main() -> None:
    if len(sys.argv) > 1:
        torch.set_num_threads(int(sys.argv[1]))
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES] for _ in range(2))
    gradients = [torch.randn(shape) for shape in SHAPES]
    for p, q, g in zip(ours, theirs, gradients):
        p.grad, q.grad = g, g
    first, second = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    pairs = [(seconds(first), seconds(second)) for _ in range(ROUNDS + 1)][1:]
    ratios = [a / b for a, b in pairs]
    print(
        f"reroll.Muon {statistics.median(a for a, _ in pairs):.2f} s, torch.optim.Muon "
        f"{statistics.median(b for _, b in pairs):.2f} s; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} … {max(ratios):.2f}), {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
