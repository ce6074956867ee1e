"""Train what autograd cannot: hidden units that are hard steps, and the error rate itself as the loss.

Both have a gradient of zero almost everywhere. `CDRGE` only compares losses of perturbed weights, so it needs neither.

    python examples/own_model.py --steps 150
"""

import argparse

import torch
from torch import nn

import reroll


class Steps(nn.Module):
    """A perceptron with one hidden layer of units that say +1 or −1."""

    def __init__(self, hidden: int = 24):
        super().__init__()
        self.first, self.second = nn.Linear(2, hidden), nn.Linear(hidden, 1)

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(points).sign()).squeeze(-1)


def points_in_a_ring(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points of a square, and whether each lies in a ring: no line separates the two."""
    points = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    radius = points.norm(dim=1)
    return points, (radius > 0.6) & (radius < 1.6)


def error_rate(model: nn.Module, points: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    return ((model(points) > 0) != inside).float().mean()


def main(steps: int) -> dict[str, float]:
    torch.manual_seed(0)
    model = Steps()
    held_out = points_in_a_ring(4000, seed=10**6)
    before = error_rate(model, *held_out).item()
    optimizer = reroll.CDRGE(model.named_parameters(), lr=0.1, probes=64, epsilon=0.1, momentum=0.9)
    for step in range(steps):
        points, inside = points_in_a_ring(1000, seed=step)
        loss = optimizer.step(lambda points=points, inside=inside: error_rate(model, points, inside))
        if step % 25 == 0:
            print(f"step {step:4}  error rate {loss.item():.3f}")
    after = error_rate(model, *held_out).item()
    print(f"held-out error rate: {before:.3f} before, {after:.3f} after")
    return {"before": before, "after": after}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=150)
    result = main(parser.parse_args().steps)
