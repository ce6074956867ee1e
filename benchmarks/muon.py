"""A step of Muon for the matrices of a 124M GPT, ours against torch.optim.Muon's; with --methods, of every method.

    python benchmarks/muon.py [THREADS] [--methods] [--rounds 7] [--device cpu]

48 matrices of 768 × 768, and twelve each of 3072 × 768 and 768 × 3072, in turn, the same gradients. --methods takes a
twelfth of them, and the matrices of `cpu-bytes`: milliseconds, ÷ the default's of the same round (median, and range),
and the distances ‖O Oᵀ − 1‖ and ‖O − U Vᵀ‖, ÷ √min(m, n), root mean square over a normal matrix of each shape.
"""

import argparse
import statistics
import time

import torch

from reroll import Muon
from reroll.optim.orthogonal import METHODS

SHAPES = [(768, 768)] * 48 + [(3072, 768)] * 12 + [(768, 3072)] * 12
SETS = {
    "768 (124M)": [(768, 768)] * 4 + [(3072, 768), (768, 3072)],
    "128 (cpu-bytes)": ([(128, 128)] * 4 + [(512, 128), (128, 512)]) * 4,
}
OPTIONS = {
    **{name: {"ns_coefficients": name} for name in METHODS},
    "polar_express, 12 steps": {"ns_coefficients": "polar_express", "ns_steps": 12},
    "rows, jordan": {"normalize_rows": True},
    "rows, turbo": {"ns_coefficients": "turbo", "normalize_rows": True},
    "NorMuon": {"beta2": 0.95},
}


def seconds(optimizer: torch.optim.Optimizer) -> float:
    device = optimizer.param_groups[0]["params"][0].device
    begin = time.perf_counter()
    optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def parameters(shapes, device, count):
    """The same matrices and gradients for `count` optimizers."""
    pairs = [(torch.randn(shape, device=device), torch.randn(shape, device=device)) for shape in shapes]
    several = [[torch.nn.Parameter(weight.clone()) for weight, _ in pairs] for _ in range(count)]
    for of_one in several:
        for p, (_, gradient) in zip(of_one, pairs):
            p.grad = gradient
    return several


def against_torch(rounds: int, device: str) -> None:
    ours, theirs = parameters(SHAPES, device, 2)
    first, second = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds + 1)][1:]
    ratios = [a / b for a, b in pairs]
    print(
        f"reroll.Muon {statistics.median(a for a, _ in pairs):.2f} s, torch.optim.Muon "
        f"{statistics.median(b for _, b in pairs):.2f} s; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} … {max(ratios):.2f}), {torch.get_num_threads()} threads"
    )


def errors(matrices, options) -> list[float]:
    """Root mean squares of the two distances, of the first update from zeros."""
    squares = []
    for matrix in matrices:
        p = torch.nn.Parameter(torch.zeros_like(matrix))
        p.grad = matrix
        Muon([p], lr=1.0, momentum=0.0, **options).step()
        found = -p.detach().double() / max(1.0, p.shape[0] / p.shape[1]) ** 0.5
        u, _, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        gram = found @ found.mT if p.shape[0] <= p.shape[1] else found.mT @ found
        off = gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        squares.append([(d.square().sum() / len(gram)).item() for d in (off, found - u @ vh)])
    return [statistics.mean(of) ** 0.5 for of in zip(*squares)]


def methods(rounds: int, device: str) -> None:
    for title, shapes in SETS.items():
        several = parameters(shapes, device, len(OPTIONS))
        optimizers = [Muon(of_one, lr=0.02, **options) for of_one, options in zip(several, OPTIONS.values())]
        times = [[seconds(optimizer) for optimizer in optimizers] for _ in range(rounds + 1)][1:]
        matrices = [torch.randn(shape, device=device) for shape in dict.fromkeys(shapes)]
        print(f"{title}: {len(shapes)} matrices, {torch.get_num_threads()} threads, {rounds} rounds")
        for i, (name, options) in enumerate(OPTIONS.items()):
            ratios = [of_round[i] / of_round[0] for of_round in times]
            orthogonality, distance = errors(matrices, options)
            print(
                f"  {name:24}{1000 * statistics.median(of_round[i] for of_round in times):8.1f} ms "
                f"{statistics.median(ratios):6.2f} ({min(ratios):.2f} … {max(ratios):.2f})"
                f"   orthogonality {orthogonality:.4f}   distance {distance:.4f}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("threads", nargs="?", type=int)
    parser.add_argument("--methods", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    request = parser.parse_args()
    if request.threads:
        torch.set_num_threads(request.threads)
    torch.manual_seed(0)
    (methods if request.methods else against_torch)(request.rounds, request.device)


if __name__ == "__main__":
    main()
