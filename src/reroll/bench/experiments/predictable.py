"""Iterations against the Lyapunov exponent (Gonzalez et al., arXiv:2508.16817, figures 2 and 3).

A mean-field network s ← W tanh(s), W_ij ~ N(0, g²/D), from a normal state, in float64: contracting for a small gain g,
chaotic for a large one; and Langevin dynamics in two wells, ε = 0.01, which contract slowly at any length. 64 units are
the fewest for which gain decides: with 32, some networks reach fixed points late at any gain, and the rank correlation
over eight gains and three seeds is only 0.78.
"""

from __future__ import annotations

from typing import Any

import torch

from reroll.bench.harness import columns
from reroll.cells.dynamics import MeanField, TwoWell
from reroll.rollout import Dense, Diagonal, Newton, lyapunov

GAINS = (0.5, 0.8, 1.0, 1.2, 1.35, 1.5, 1.75, 2.0)
PUBLISHED_TWO_WELL = 35
"""Published maximum of iterations for the two wells, up to T = 10 000."""


def _row(cell: Any, inputs: torch.Tensor, state: torch.Tensor, **more: Any) -> dict[str, Any]:
    """Return the exponent of a recurrence, and the iterations of DEER and quasi-DEER."""
    limit = inputs.shape[1] + 1
    newton, quasi = (
        int(Newton(linearise, window=None, max_iterations=limit)(cell, inputs, state).iterations.max())
        for linearise in (Dense(), Diagonal())
    )
    return {**more, "exponent": float(lyapunov(cell, inputs, state)), "newton": newton, "quasi": quasi}


def network(gain: float, seed: int, size: int, steps: int) -> dict[str, Any]:
    """Return the row of one network."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        cell = MeanField(size, gain).double()
        state, inputs = torch.randn(1, size, dtype=torch.float64), torch.zeros(1, steps, size, dtype=torch.float64)
        return _row(cell, inputs, state, gain=gain, seed=seed)


def wells(steps: int) -> dict[str, Any]:
    """Return the row of the two wells."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        cell, state = TwoWell().double(), torch.zeros(1, 2, dtype=torch.float64)
        return _row(cell, torch.randn(1, steps, 2, dtype=torch.float64), state, steps=steps)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Return Spearman's rank correlation; ties share their mean rank.

    Example:
        >>> round(rank_correlation([1.0, 2.0, 5.0], [7.0, 8.0, 9.0]), 6)
        1.0
    """

    def ranks(values: list[float]) -> torch.Tensor:
        v = torch.tensor(values, dtype=torch.float64)
        return (v[:, None] > v).double().sum(1) + 0.5 * (v[:, None] == v).double().sum(1)

    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def measure(
    full: bool, size: int = 64, steps: int = 300, seeds: int = 3, lengths: tuple[int, ...] = (100, 1000, 10_000)
) -> dict[str, Any]:
    """Return every network and the two wells; `full` is D = 100, T = 1000, 50 gains, 20 seeds."""
    gains = GAINS
    if full:
        size, steps, seeds, gains = 100, 1000, 20, tuple(0.5 + 1.5 * i / 49 for i in range(50))
    networks = [network(gain, seed, size, steps) for gain in gains for seed in range(seeds)]
    return {
        "networks": networks, "wells": [wells(length) for length in lengths], "steps": steps,
        "rank_correlation": rank_correlation([n["exponent"] for n in networks], [n["newton"] for n in networks]),
    }  # fmt: skip


def holds(result: dict[str, Any]) -> bool:
    """Whether iterations rise with the exponent, and the two wells need no more than published."""
    return result["rank_correlation"] >= 0.9 and all(w["newton"] <= PUBLISHED_TWO_WELL for w in result["wells"])


def report(result: dict[str, Any]) -> str:
    """Return tables with a row for every gain (means over seeds), and for every length of the two wells."""
    rows: list[list[Any]] = [["gain", "exponent", "Newton", "quasi-DEER"]]
    for gain in sorted({n["gain"] for n in result["networks"]}):
        same = [n for n in result["networks"] if n["gain"] == gain]
        rows.append(
            [f"{gain:.3g}", *(sum(n[key] for n in same) / len(same) for key in ("exponent", "newton", "quasi"))]
        )
    below = [["two wells, T", "exponent", "Newton", "quasi-DEER"]]
    below += [[f"{w['steps']}", w["exponent"], w["newton"], w["quasi"]] for w in result["wells"]]
    return f"mean-field network, T = {result['steps']}\n{columns(rows)}\n{columns(below)}"


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot iterations by exponent."""
    axes = figure.add_subplot(
        xlabel="Lyapunov exponent per step", ylabel="iterations", yscale="log",
        title=f"mean-field networks, T = {result['steps']}",
    )  # fmt: skip
    for key, label, color in (("newton", "Newton", "C0"), ("quasi", "quasi-DEER", "C1")):
        for rows, marker, where in ((result["networks"], "o", ""), (result["wells"], "x", ", two wells")):
            x, y = [row["exponent"] for row in rows], [row[key] for row in rows]
            axes.plot(x, y, marker, color=color, label=label + where)
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.legend()
