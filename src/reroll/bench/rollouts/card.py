"""Rollouts on a card: forward and backward over T = 100,000 steps of a GRU, against cuDNN and a Python loop."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from reroll.bench.rollouts.cells import like
from reroll.bench.timing import in_turn, ratio
from reroll.cells import cell_from
from reroll.rollout import Rollout, Sequential, deer, quasi_deer

SIZES = ((8, 16), (16, 16), (32, 16), (64, 16))
"""(D, B): features of the state, sequences."""
STEPS = 100_000
LOOPED_SHARE = 50
"""The Python loop runs over one in so many of the steps, and its time is multiplied: it takes minutes."""


def gpu_case(size: int, batch: int, steps: int, rounds: int, device: str = "cuda") -> dict[str, Any]:
    """Return seconds and deviations of the gradient of a GRU's states on a card; those of the loop are extrapolated."""
    torch.manual_seed(0)
    library = nn.GRU(size, size, batch_first=True).to(device)
    cell = cell_from(like(library, nn.GRUCell(size, size).to(device)), size)
    inputs = torch.randn(batch, steps, size, device=device)

    def through(states: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            leaf = x.detach().requires_grad_()
            gradients = torch.autograd.grad(states(leaf).square().mean(), [leaf, *parameters])
            if leaf.is_cuda:
                torch.cuda.synchronize()
            return gradients[0]

        return call

    def by(rollout: Rollout, x: Tensor) -> Callable[[], Tensor]:
        return through(lambda x: rollout(cell, x).states, x, list(cell.parameters()))

    runs = {
        "library": through(lambda x: library(x)[0], inputs, list(library.parameters())),
        "quasi_deer": by(quasi_deer(), inputs),
    }
    if size <= 32:
        runs["deer"] = by(deer(), inputs)
    exact = runs["library"]()
    deviation = {name: float((call() - exact).abs().max() / exact.abs().max()) for name, call in runs.items()}
    seconds = in_turn(runs, rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    looped = in_turn({"loop": by(Sequential(kernel="reference"), inputs[:, : steps // LOOPED_SHARE])}, 1)
    median["loop"] = LOOPED_SHARE * statistics.median(looped["loop"])
    return {
        "D": size, "B": batch, "T": steps, "seconds": median, "deviation_of_gradient": deviation,
        "quasi_deer_over_library": ratio(seconds, "quasi_deer", "library"),
    }  # fmt: skip
