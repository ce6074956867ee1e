"""The best variance of the damping (Gonzalez et al., arXiv:2407.19115, figures 7 and 8): less is slow, more explodes.

Iterations to the sequential trajectory, by ELK and quasi-ELK, for every variance of the published grids, on two
recurrences, from a guess of zeros: Lorenz-96 (see `lorenz`), and the generator trained here (see `generator`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from reroll.bench.experiments import generator, lorenz
from reroll.bench.harness import columns
from reroll.rollout import Dense, Diagonal, Kalman

LORENZ = (0.3, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5, 1e6)
GENERATOR = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 3e7, 1e8, 3e8)
LINEARISE = {"ELK": Dense(), "quasi-ELK": Diagonal()}
LEVEL = 1
"""Index of the generator's level of deviation to count at: 0.1."""
Count = Callable[[Any, float, int], float | None]
"""(linearisation, variance, maximum iterations) → iterations; None if the trajectory is not reached."""


def measure(full: bool, steps: tuple[int, int] = (1000, 2000), updates: int = 2000,
            limits: tuple[int, int] = (500, 1000)) -> dict[str, Any]:  # fmt: skip
    """Return the counts of both methods for every variance, on both recurrences.

    Args:
        full: ten initial conditions instead of one, fifteen sequences of noise instead of three.
        steps: T of Lorenz-96, and of the generator.
        updates: training steps of the generator.
        limits: maximum iterations of ELK, and of quasi-ELK.
    """
    states = lorenz.initial_conditions(10 if full else 1)
    cell, _ = generator.trained(updates)
    noise, truth = generator.trajectories(cell, 15 if full else 3, steps[1])

    def on_lorenz(linearise: Any, variance: float, limit: int) -> float | None:
        return lorenz.run_method(linearise, Kalman(variance), limit, states, steps[0])["mean"]

    def on_generator(linearise: Any, variance: float, limit: int) -> float | None:
        return generator.run_method(linearise, Kalman(variance), limit, cell, noise, truth)["reached"][LEVEL]

    sweeps = {"Lorenz-96": _sweep(LORENZ, on_lorenz, limits), "generator": _sweep(GENERATOR, on_generator, limits)}
    best = {name: sweep["best"]["ELK"] for name, sweep in sweeps.items()}
    return {"swept": sweeps, "best_elk": best["Lorenz-96"], "best_elk_generator": best["generator"]}


def _sweep(variances: Sequence[float], count: Count, limits: tuple[int, int]) -> dict[str, Any]:
    counts = {
        name: [count(linearise, variance, limit) for variance in variances]
        for (name, linearise), limit in zip(LINEARISE.items(), limits)
    }
    return {"variances": list(variances), "counts": counts, "best": {n: _best(variances, c) for n, c in counts.items()}}


def _best(variances: Sequence[float], counts: Sequence[float | None]) -> float:
    """Return the variance with the fewest iterations; NaN if the trajectory was never reached."""
    reached = [(count, variance) for count, variance in zip(counts, variances) if count is not None]
    return min(reached)[1] if reached else math.nan


def holds(result: dict[str, Any]) -> bool:
    """Whether ELK's best variance lies strictly inside both grids, quasi-ELK's inside that of Lorenz-96, ELK's there
    within a decade of 300."""
    inside = [
        swept["variances"][0] < swept["best"][name] < swept["variances"][-1]
        for swept, name in (
            (result["swept"]["Lorenz-96"], "ELK"), (result["swept"]["Lorenz-96"], "quasi-ELK"),
            (result["swept"]["generator"], "ELK"),
        )
    ]  # fmt: skip
    return all(inside) and 30 <= result["best_elk"] <= 3000


def report(result: dict[str, Any]) -> str:
    """Return a table for every recurrence, with a row for every variance."""
    lines = []
    for recurrence, swept in result["swept"].items():
        rows: list[list[Any]] = [["variance", *swept["counts"]]]
        rows += [[f"{v:g}", *(c[i] for c in swept["counts"].values())] for i, v in enumerate(swept["variances"])]
        best = ", ".join(
            f"{name} {'–' if math.isnan(variance) else f'{variance:g}'}" for name, variance in swept["best"].items()
        )
        lines.append(
            f"{recurrence}: iterations to a mean absolute deviation of {_level(recurrence):g} (–: not reached)\n"
            f"{columns(rows)}\nbest: {best}"
        )
    return "\n".join(lines)


def _level(recurrence: str) -> float:
    return lorenz.REACHED if recurrence == "Lorenz-96" else generator.LEVELS[LEVEL]


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot iterations by variance, in a panel for every recurrence."""
    for axes, (recurrence, swept) in zip(figure.subplots(1, 2), result["swept"].items()):
        top = 1.08 * max((c for counts in swept["counts"].values() for c in counts if c is not None), default=1.0)
        for name, counts in swept["counts"].items():
            reached = [(v, c) for v, c in zip(swept["variances"], counts) if c is not None]
            missing = [v for v, c in zip(swept["variances"], counts) if c is None]
            (line,) = axes.plot([v for v, _ in reached], [c for _, c in reached], "o-", label=name)
            label = f"{name}, not reached" if missing else None
            axes.plot(missing, [top] * len(missing), "x", color=line.get_color(), label=label)
        axes.set(xlabel="variance σ²", xscale="log", title=recurrence)
        axes.set_ylabel(f"iterations to a deviation of {_level(recurrence):g}")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
