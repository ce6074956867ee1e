"""How far parallel trajectories are from the sequential one (Gonzalez et al., arXiv:2407.19115, figure 5).

An untrained GRU of width 4, T = 10 000, one sequence of standard normal inputs, float32 and float64. With the default
tolerances the iteration stops as soon as the residual is within them; with a tenth of these, only rounding remains.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import torch

from reroll.bench.harness import columns
from reroll.cells import GRU
from reroll.rollout import Dense, Diagonal, Newton, Sequential
from reroll.rollout.newton import TOLERANCE

METHODS = {"DEER": Dense(), "quasi-DEER": Diagonal()}
BOUND = 16 * torch.finfo(torch.float32).eps
"""float32 rounding, for states within ±1."""


def measure(full: bool, steps: int = 10_000) -> dict[str, Any]:
    """Return iterations and the largest deviation; `full` changes nothing: the published size is always run."""
    rows = []
    for dtype in (torch.float32, torch.float64):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            cell, inputs = GRU(4, 4).to(dtype), torch.randn(1, steps, 4).to(dtype)
            truth = Sequential()(cell, inputs).states
            for name, tenth in itertools.product(METHODS, (False, True)):
                tolerance = TOLERANCE[dtype] / 10 if tenth else None
                start = time.perf_counter()
                trajectory = Newton(METHODS[name], rtol=tolerance, atol=tolerance)(cell, inputs)
                error = (trajectory.states - truth).abs()[0].amax(-1)
                rows.append({
                    "dtype": str(dtype).removeprefix("torch."), "method": name, "tight": tenth,
                    "tolerance": tolerance or TOLERANCE[dtype],
                    "deviation": float(error.max()),
                    "iterations": int(trajectory.iterations.max()), "converged": bool(trajectory.converged.all()),
                    "seconds": time.perf_counter() - start, "error": error[:: max(1, steps // 1000)].tolist(),
                })  # fmt: skip
    tight = [row["deviation"] for row in rows if row["dtype"] == "float32" and row["tight"]]
    return {"deviation": max(tight), "rows": rows}


def holds(result: dict[str, Any]) -> bool:
    """Whether all converged, and float32 at the tight tolerance deviates by rounding only."""
    return result["deviation"] <= BOUND and all(row["converged"] for row in result["rows"])


def report(result: dict[str, Any]) -> str:
    """Return a table with a row for every method and precision."""
    keys = ["dtype", "method", "tolerance", "iterations", "converged", "deviation", "seconds"]
    return columns([keys, *([row[key] for key in keys] for row in result["rows"])])


def draw(result: dict[str, Any], figure: Any) -> None:
    """Draw the deviation along the sequence."""
    axes = figure.add_subplot(
        xlabel="part of the sequence", ylabel="deviation from the loop (gaps: none)", title="GRU, D = 4, T = 10,000"
    )
    axes.set_yscale("log")
    for row in (row for row in result["rows"] if row["tight"]):
        steps = [i / len(row["error"]) for i in range(len(row["error"]))]
        error = [e if e > 0 else math.nan for e in row["error"]]
        axes.plot(steps, error, label=f"{row['method']}, {row['dtype']}", linewidth=0.7)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
