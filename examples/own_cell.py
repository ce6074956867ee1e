"""A recurrence of your own, trained by probes and by backpropagation: only the estimator changes.

The cell is a leaky memory whose leak is learned; the task is to answer every number with the one two steps before it.

    python examples/own_cell.py --steps 200
"""

import argparse

import torch
from torch import Tensor, nn

from reroll import Backprop, Cell, CentralDifference, Key, Recurrent, apply


class Leaky(Cell):
    """s ← a ∘ s + (1 − a) ∘ tanh(W x + R s), with a = σ(leak)."""

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.input_size, self.output_size = input_size, hidden_size
        self.into, self.back = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, hidden_size, bias=False)
        self.leak = nn.Parameter(torch.zeros(hidden_size))

    def init_state(self, batch_shape: tuple[int, ...]) -> Tensor:
        return self.leak.new_zeros(*batch_shape, self.output_size)

    def project(self, inputs: Tensor) -> Tensor:
        return self.into(inputs)  # what does not wait for the state: all steps at once

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        a = self.leak.sigmoid()
        return a * state + (1 - a) * torch.tanh(u + self.back(state))


def loss_fn(model: Recurrent, inputs: Tensor) -> Tensor:
    return (model(inputs)[:, 2:] - inputs[:, :-2]).square().mean()


def main(steps: int) -> dict[str, list[float]]:
    # "auto" evaluates code it does not know in place; the step of a cell is pure, so probes can also go side by side.
    probes, losses = CentralDifference(64, epsilon=0.01, evaluate="batched"), {}
    for name, estimator in (("probes", probes), ("backprop", Backprop())):
        torch.manual_seed(0)
        model = Recurrent(cell=Leaky(1, 16), inputs=1, outputs=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for step in range(steps):
            inputs = torch.rand(32, 12, 1, generator=torch.Generator().manual_seed(step)) * 2 - 1
            estimate = estimator(model, loss_fn, inputs, Key(0).at(step))
            apply(estimate.gradient, optimizer)
            losses.setdefault(name, []).append(estimate.loss.item())
        print(f"{name:8}  loss {losses[name][0]:.3f} → {losses[name][-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    result = main(parser.parse_args().steps)
