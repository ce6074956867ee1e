"""A trained generator in parallel (Gonzalez et al., arXiv:2407.19115, figure 4), on which undamped methods explode.

An AR-GRU (see `reroll.cells.dynamics`) of hidden size 3 learns a noisy sine by maximum likelihood,
−Σ_t log N(x_t; μ_t, ς_t²) with the observed x fed back, by backpropagation; then its own outputs are fed back. Its
trajectory from fixed noise is solved by every method from a guess of zeros, in float32, and compared with the loop's.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from reroll.bench.experiments.convergence import approach, arrival
from reroll.bench.harness import columns
from reroll.cells.dynamics import ARGRU, ARState
from reroll.rollout import Dense, Diagonal, Kalman, Scale, Sequential

PERIOD, NOISE = 50, 0.05
"""Of the sine: steps per period, and the standard deviation of the noise."""
METHODS: dict[str, tuple[Any, Any]] = {
    "DEER": (Dense(), None),
    "quasi-DEER": (Diagonal(), None),
    **{f"ELK({name})": (Dense(), Kalman(float(name))) for name in ("1e6", "1e5", "1e4", "1e3")},
    "quasi-ELK(1e2)": (Diagonal(), Kalman(1e2)),
    "DEER, scaled by 0.9": (Dense(), Scale(0.1)),
}
SEQUENCES = 5
"""Sequences of noise, each solved alone; figures are medians over them."""
LEVELS = (0.5, 0.1, 1e-3)
"""Mean absolute deviations of the output at which iterations are counted."""


def noisy_sine(batch: int, steps: int) -> Tensor:
    """Return sines of random phase with noise, [batch, steps, 1]."""
    phase = 2 * math.pi * torch.rand(batch, 1, 1)
    angle = 2 * math.pi * torch.arange(steps).view(1, -1, 1) / PERIOD
    return torch.sin(angle + phase) + NOISE * torch.randn(batch, steps, 1)


def hidden_states(cell: ARGRU, x: Tensor) -> Tensor:
    """Return h after every step of observed series, [batch, steps, H], by torch's GRU, whose equations are the same."""
    bias = torch.cat([cell.bias.new_zeros(2 * cell.hidden_size), cell.bias_new])
    start = x.new_zeros(1, len(x), cell.hidden_size)
    weights = [cell.weight_ih, cell.weight_hh, cell.bias, bias]
    return torch.gru(x, start, weights, True, 1, 0.0, True, False, True)[0]


def loss(cell: ARGRU, series: Tensor) -> Tensor:
    """Return the negative log-likelihood per step of series [batch, steps, 1], each value given those before."""
    before = series[:, :-1]
    mean, spread = cell.decode(hidden_states(cell, before) + before).chunk(2, -1)
    spread = functional.softplus(spread)
    return (0.5 * ((series[:, 1:] - mean) / spread).square() + spread.log()).mean() + 0.5 * math.log(2 * math.pi)


def trained(updates: int, steps: int = 200, batch: int = 16, seed: int = 0) -> tuple[ARGRU, float]:
    """Return a trained generator and its last loss."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cell = ARGRU(3)
        optimizer = torch.optim.Adam(cell.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        value = torch.tensor(math.nan)
        for _ in range(updates):
            optimizer.zero_grad()
            value = loss(cell, noisy_sine(batch, steps))
            value.backward()
            torch.nn.utils.clip_grad_norm_(cell.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return cell.requires_grad_(False), float(value.detach())


def trajectories(cell: ARGRU, sequences: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return noise [sequences, steps, 1], and what the cell makes of it by the loop, of the same shape."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        noise = torch.randn(sequences, steps, 1)
        states = Sequential()(cell, noise).states
    assert isinstance(states, ARState)
    return noise, states.x


def run_once(linearise: Any, damping: Any, limit: int, cell: ARGRU, noise: Tensor, truth: Tensor) -> dict[str, Any]:
    """Return the result of one method on one sequence, [T, 1]."""
    run = approach(linearise, damping, limit, cell, noise[None], None, truth.T[..., None])
    (curve,) = run.curves
    return {
        "iterations": len(curve), "converged": run.converged[0], "finite": run.replaced[0] == 0,
        "deviation": curve[-1], "seconds": run.seconds, "curve": curve,
        "reached": [arrival(curve, level) or math.inf for level in LEVELS],
    }  # fmt: skip


def run_method(linearise: Any, damping: Any, limit: int, cell: ARGRU, noise: Tensor, truth: Tensor) -> dict[str, Any]:
    """Return the results of one method on sequences [n, T, 1], each alone: counts, medians, and the first curve."""
    runs = [run_once(linearise, damping, limit, cell, *pair) for pair in zip(noise, truth)]
    reached = map(statistics.median, zip(*(run["reached"] for run in runs)))
    return {
        **{key: statistics.median(run[key] for run in runs) for key in ("iterations", "deviation", "seconds")},
        **{key: sum(run[key] for run in runs) for key in ("converged", "finite")},
        "reached": [None if math.isinf(k) else k for k in reached], "curve": runs[0]["curve"],
    }  # fmt: skip


def measure(full: bool, updates: int = 2000, steps: int = 2000, limit: int = 500) -> dict[str, Any]:
    """Return the results of every method; `full` is T = 10 000, and up to as many iterations."""
    if full:
        steps, limit = 10_000, 10_000
    cell, last = trained(updates)
    noise, truth = trajectories(cell, SEQUENCES, steps)
    methods = {name: run_method(*method, limit, cell, noise, truth) for name, method in METHODS.items()}
    arrived = {name: m["reached"][1] or math.inf for name, m in methods.items() if name.startswith("ELK")}
    best = min(arrived, key=arrived.__getitem__)
    return {
        "loss": last, "best_loss": math.log(NOISE) + 0.5 * math.log(2 * math.pi * math.e), "steps": steps,
        "limit": limit, "methods": methods, "series": truth[0, :400, 0].tolist(), "best": best,
        "elk_iterations": arrived[best],
    }  # fmt: skip


def holds(result: dict[str, Any]) -> bool:
    """Whether undamped methods explode or fail on every sequence, ELK on none, and ELK comes within 0.1 sooner."""
    methods = result["methods"]
    undamped = [methods["DEER"], methods["quasi-DEER"]]
    unstable = all(min(m["finite"], m["converged"]) == 0 for m in undamped)
    finite = all(m["finite"] == SEQUENCES for name, m in methods.items() if name.startswith("ELK"))
    return unstable and finite and result["elk_iterations"] < min(m["reached"][1] or math.inf for m in undamped)


def report(result: dict[str, Any]) -> str:
    """Return a table with a row for every method."""
    rows: list[list[Any]] = [["method", "iterations", "converged", "finite", "last deviation", "seconds"]]
    rows[0] += [f"to {level:g}" for level in LEVELS]
    for name, m in result["methods"].items():
        keys = ("iterations", "converged", "finite", "deviation", "seconds")
        rows.append([name, *(m[key] for key in keys), *m["reached"]])
    return (
        f"trained to {result['loss']:.3f} nats per step (the noise alone: {result['best_loss']:.3f}); "
        f"T = {result['steps']}, at most {result['limit']} iterations; "
        f"medians over {SEQUENCES} sequences of noise; to a mean absolute deviation of the output of …\n{columns(rows)}"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot the generated series, and the deviation by iteration."""
    above, below = figure.subplots(2, 1)
    above.plot(result["series"], linewidth=0.8)
    above.set(title="generated sequentially", xlabel="step")
    for name, method in result["methods"].items():
        below.plot(range(1, len(method["curve"]) + 1), [max(d, 1e-9) for d in method["curve"]], label=name, linewidth=1)
    below.set(xlabel="iteration", ylabel="mean absolute deviation", yscale="log")
    below.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1.05))
