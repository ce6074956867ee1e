"""Which variance damps best (Gonzalez et al., arXiv:2407.19115, figures 7 and 8): less is slow, more explodes.

Iterations to the sequential trajectory, by ELK and by quasi-ELK, for every variance of the published grids, on two
recurrences: Lorenz-96 (see `lorenz`) and the generator trained here (see `generator`), from a guess of zeros.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from reroll.bench.experiments import generator, lorenz
from reroll.bench.experiments.show import columns
from reroll.rollout import Dense, Diagonal, Kalman, Sequential

LORENZ = (0.3, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5, 1e6)
GENERATOR = (1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 3e7, 1e8, 3e8)
KEPT = {"ELK": Dense(), "quasi-ELK": Diagonal()}
LEVEL = 1
"""Which of the generator's levels of deviation counts: 0.1."""
Count = float | None


def measure(full: bool, steps: tuple[int, int] = (1000, 2000), updates: int = 2000,
            limits: tuple[int, int] = (500, 1000)) -> dict[str, Any]:  # fmt: skip
    """Return the counts of both methods for every variance, on both recurrences.

    Args:
        full: ten initial conditions in place of one, fifteen sequences of noise in place of three.
        steps: T of Lorenz-96, and of the generator.
        updates: in training the generator.
        limits: the most iterations of ELK and of quasi-ELK.
    """
    found = {
        "Lorenz-96": _swept(LORENZ, _on_lorenz(10 if full else 1, steps[0], limits)),
        "generator": _swept(GENERATOR, _on_generator(15 if full else 3, steps[1], updates, limits)),
    }
    best = found["Lorenz-96"]["best"]["ELK"]
    return {"swept": found, "best_elk": best, "best_elk_generator": found["generator"]["best"]["ELK"]}


def _swept(variances: Sequence[float], count: Callable[[str, float], Count]) -> dict[str, Any]:
    counts = {name: [count(name, variance) for variance in variances] for name in KEPT}
    return {"variances": list(variances), "counts": counts, "best": {n: _best(variances, c) for n, c in counts.items()}}


def _best(variances: Sequence[float], counts: Sequence[Count]) -> float:
    """The variance with the fewest iterations; not a number if none arrived."""
    arrived = [(count, variance) for count, variance in zip(counts, variances) if count is not None]
    return min(arrived)[1] if arrived else math.nan


def _on_lorenz(conditions: int, steps: int, limits: tuple[int, int]) -> Callable[[str, float], Count]:
    states = lorenz.initial_conditions(conditions)

    def count(name: str, variance: float) -> Count:
        limit = limits[list(KEPT).index(name)]
        return lorenz.run_method(KEPT[name], Kalman(variance), limit, states, steps)["mean"]

    return count


def _on_generator(sequences: int, steps: int, updates: int, limits: tuple[int, int]) -> Callable[[str, float], Count]:
    cell, _ = generator.trained(updates)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        noise = torch.randn(sequences, steps, 1)
        truth = Sequential()(cell, noise).states.x

    @torch.no_grad()
    def count(name: str, variance: float) -> Count:
        limit = limits[list(KEPT).index(name)]
        reached = [
            generator.run_once(KEPT[name], Kalman(variance), cell, noise[i : i + 1], truth[i : i + 1], limit)["reached"]
            for i in range(sequences)
        ]
        value = statistics.median(math.inf if r[LEVEL] is None else r[LEVEL] for r in reached)
        return None if math.isinf(value) else value

    return count


def holds(found: dict[str, Any]) -> bool:
    """Whether ELK's best variance lies strictly inside both grids, quasi-ELK's inside that of Lorenz-96, ELK's there
    within a decade of 300."""
    inside = [
        swept["variances"][0] < swept["best"][name] < swept["variances"][-1]
        for swept, name in (
            (found["swept"]["Lorenz-96"], "ELK"), (found["swept"]["Lorenz-96"], "quasi-ELK"),
            (found["swept"]["generator"], "ELK"),
        )
    ]  # fmt: skip
    return all(inside) and 30 <= found["best_elk"] <= 3000


def report(found: dict[str, Any]) -> str:
    """Return a table for every recurrence, a row for every variance."""
    lines = []
    for recurrence, swept in found["swept"].items():
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


def draw(found: dict[str, Any], figure: Any) -> None:
    """Draw iterations against variance, a panel for every recurrence."""
    for axes, (recurrence, swept) in zip(figure.subplots(1, 2), found["swept"].items()):
        top = 1.08 * max((c for counts in swept["counts"].values() for c in counts if c is not None), default=1.0)
        for name, counts in swept["counts"].items():
            there = [(v, c) for v, c in zip(swept["variances"], counts) if c is not None]
            missing = [v for v, c in zip(swept["variances"], counts) if c is None]
            (line,) = axes.plot([v for v, _ in there], [c for _, c in there], "o-", label=name)
            label = f"{name}, not reached" if missing else None
            axes.plot(missing, [top] * len(missing), "x", color=line.get_color(), label=label)
        axes.set(xlabel="variance σ²", xscale="log", title=recurrence)
        axes.set_ylabel(f"iterations to a deviation of {_level(recurrence):g}")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
