"""Lorenz-96 in parallel (Gonzalez et al., arXiv:2407.19115, figure 8): which damping finds a chaotic trajectory.

D = 5, F = 8, Runge–Kutta steps of 0.01, T = 1000, float64, guess zero. The initial conditions are the states of one
long run from (8.01, 8, 8, 8, 8) after steps 10 000, 11 000 … 19 000. The count is the iteration at which the mean
absolute deviation from the sequential trajectory falls below 10⁻³.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from reroll.bench.experiments.convergence import approach, arrival
from reroll.bench.harness import columns
from reroll.cells.dynamics import Lorenz96
from reroll.rollout import Dense, Diagonal, Kalman, Scale, Sequential

SPIN_UP, BETWEEN = 10_000, 1000
"""Steps of the long run before the first initial condition, and from one to the next."""
REACHED = 1e-3
"""Mean absolute deviation that counts as having reached the trajectory."""
PUBLISHED = {"ELK(300)": 152, "Scale(0.2)": 249, "DEER": None, "quasi-DEER": 931, "quasi-ELK(10)": 467}
"""Counts by an independent implementation of the published formulas on one initial condition."""
METHODS: dict[str, tuple[Any, Any, int]] = {
    "ELK(300)": (Dense(), Kalman(300.0), 400),
    "Scale(0.2)": (Dense(), Scale(0.2), 400),
    "DEER": (Dense(), None, 500),
    "quasi-DEER": (Diagonal(), None, 1001),
    "quasi-ELK(10)": (Diagonal(), Kalman(10.0), 1000),
}
"""Linearisation, damping, maximum iterations."""


def initial_conditions(count: int, spin_up: int = SPIN_UP, between: int = BETWEEN) -> Tensor:
    """Return states of one long run, [count, 5]."""
    cell, state = Lorenz96(), torch.full((1, 5), 8.0, dtype=torch.float64)
    state[0, 0] += 0.01
    states, nothing = [], torch.zeros(1, 1, dtype=torch.float64)
    with torch.no_grad():
        for step in range(spin_up + (count - 1) * between + 1):
            if step >= spin_up and (step - spin_up) % between == 0:
                states.append(state)
            state = cell.step(nothing, state)
    return torch.cat(states)


def run_method(linearise: Any, damping: Any, limit: int, states: Tensor, steps: int) -> dict[str, Any]:
    """Return the iterations of one method on all initial conditions [batch, 5], and its curve on the first."""
    cell, inputs = Lorenz96(), states.new_zeros(len(states), steps, 1)
    truth = Sequential()(cell, inputs, states).states.permute(2, 1, 0)
    run = approach(linearise, damping, limit, cell, inputs, states, truth)
    counts = [arrival(curve, REACHED) for curve in run.curves]
    arrived = [count for count in counts if count is not None]
    return {
        "counts": counts, "mean": sum(arrived) / len(arrived) if len(arrived) == len(counts) else None,
        "replaced": sum(run.replaced), "limit": limit, "ms": 1e3 * run.seconds / len(run.curves[0]),
        "curve": run.curves[0],
    }  # fmt: skip


def measure(full: bool, steps: int = 1000, count: int = 10) -> dict[str, Any]:
    """Return the counts of all methods; `full` changes nothing: the published size is always run."""
    states = initial_conditions(count)
    methods = {name: run_method(*method, states, steps) for name, method in METHODS.items()}
    elk, scale = (methods[name]["mean"] or math.inf for name in ("ELK(300)", "Scale(0.2)"))
    return {"elk": elk, "scale": scale, "methods": methods}


def holds(result: dict[str, Any]) -> bool:
    """Whether the counts are near the published ones, and ELK needs fewer than scaling."""
    elk, scale = result["elk"], result["scale"]
    return 0.7 <= elk / 152 <= 1.4 and 0.7 <= scale / 249 <= 1.4 and elk < scale


def report(result: dict[str, Any]) -> str:
    """Return a table with a row for every method."""
    rows: list[list[Any]] = [["method", "mean", "min", "max", "reached", "replaced", "ms each", "published"]]
    for name, method in result["methods"].items():
        arrived = [count for count in method["counts"] if count is not None]
        least, most = min(arrived, default=None), max(arrived, default=None)
        values = (method["mean"], least, most, len(arrived), method["replaced"], method["ms"], PUBLISHED[name])
        rows.append([name, *values])
    return f"iterations to a mean absolute deviation of {REACHED:g}\n{columns(rows)}"


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot the deviation by iteration for the first initial condition."""
    axes = figure.add_subplot(
        xlabel="iteration", ylabel="mean absolute deviation", yscale="log",
        title="Lorenz-96: iterations to the trajectory of the loop\n(mean over the initial conditions; published)",
    )  # fmt: skip
    # Longest first, so that it lies at the back; curves that jump between overflow and restart are thin.
    by_length = sorted(result["methods"].items(), key=lambda item: -len(item[1]["curve"]))
    for name, method in by_length:
        mean, published = ("never" if x is None else f"{x:.0f}" for x in (method["mean"], PUBLISHED[name]))
        width = 0.4 if any(value > 1e3 for value in method["curve"]) else 1.5
        steps = range(1, len(method["curve"]) + 1)
        axes.plot(steps, method["curve"], label=f"{name}: {mean} ({published})", linewidth=width)
    axes.set_ylim(bottom=1e-9)
    axes.axhline(REACHED, color="grey", linewidth=0.8, linestyle="--")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
