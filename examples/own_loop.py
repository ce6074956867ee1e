"""A training loop of your own: estimate, look at the gradient, step with any optimizer.

The gradient of probes is a key and one number per probe; every tensor of it can be made when it is wanted. Here it is
compared with autograd's as it is trained on: its cosine should be near √(N / (N + P − 1)) for N probes and P weights.

    python examples/own_loop.py --steps 60
"""

import argparse
import math

import torch
from torch import nn

from reroll import CentralDifference, Key, apply


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def a_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(128, 6, generator=torch.Generator().manual_seed(seed))
    return inputs, torch.sin(inputs.sum(1, keepdim=True)) + inputs[:, :1] * inputs[:, 1:2]


def main(steps: int, probes: int = 256) -> dict[str, float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 1))
    weights = sum(p.numel() for p in model.parameters())
    estimator = CentralDifference(probes, epsilon=1e-2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    key, cosines, losses = Key(0), [], []
    for step in range(steps):
        batch = a_batch(step)
        estimate = estimator(model, loss_fn, batch, key.at(step))

        guess = torch.cat([estimate.gradient.tensor(name).flatten() for name, _ in model.named_parameters()])
        exact = torch.autograd.grad(loss_fn(model, batch), list(model.parameters()))
        cosines.append(torch.cosine_similarity(guess, torch.cat([g.flatten() for g in exact]), 0).item())

        apply(estimate.gradient, optimizer)  # how="stream" would hold one tensor of the gradient at a time
        losses.append(estimate.loss.item())
    print(f"{probes} probes, {weights} weights, {estimate.stats['forward_passes']} forward passes a step")
    print(f"a step of the run is {estimate.gradient.coefficients.numel()} numbers and a key")
    expected = math.sqrt(probes / (probes + weights - 1))
    cosine = sum(cosines) / steps
    print(f"cosine to autograd's gradient: {cosine:.3f}, by theory {expected:.3f}")
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    return {"cosine": cosine, "expected": expected, "first": losses[0], "last": losses[-1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=60)
    result = main(parser.parse_args().steps)
