"""`reroll bench rollouts`: speed and accuracy of all ways to evaluate a recurrence along time.

    loop            the step in a Python loop (`Sequential(kernel="reference")`)
    library         torch's fused kernel for the same cell (oneDNN, cuDNN)
    compiled        the step as a program, looped over in compiled code (`Sequential(kernel="compiled")`)
    quasi_deer, deer, jacobi, picard, elk, quasi_elk        parallel in time
    auto            what `reroll.auto()` chooses

Cells: a GRU in plain torch operations, as a user would write it; torch's `GRUCell` and `LSTMCell`; and a user's cell
that cannot be made a program. On a CPU in float32: the readouts of all steps, with and without a gradient. On a GPU:
forward and backward, T = 100,000. Every figure is a median over interleaved rounds; deviations are from the loop.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from reroll.bench import grid
from reroll.bench.harness import publish
from reroll.bench.rollouts import cpu
from reroll.rollout import quasi_deer

GPU = ((8, 16, 32, 64), 100_000)
"""State sizes, and steps, measured on a GPU: points of the grid, with a gradient."""


def run(rounds: int = 7, path: Path | None = None, steps: int = 10_000) -> dict[str, Any]:
    """Measure all cases, print a table, and write it as JSON if a path is passed."""
    rows = [row for case in cpu.cases(steps) for row in cpu.rows_of(case, rounds)]
    result: dict[str, Any] = {
        "steps": steps,
        "rounds": rounds,
        "rows": rows,
        "auto_over_best": cpu.auto_over_best(rows),
    }
    result["lengths"] = cpu.padded(rounds, steps // 10)
    result["memory_floats"] = {
        "quasi_deer()": cpu.memory(quasi_deer(), steps),
        "quasi_deer(window=None)": cpu.memory(quasi_deer(window=None), steps),
    }
    if torch.cuda.is_available():
        result["gpu"] = [grid.point(size, GPU[1], True, rounds, "cuda") for size in GPU[0]]
    return publish(result, report, path)


def report(result: dict[str, Any]) -> str:
    """Return the table."""
    lines = []
    for row in result["rows"]:
        what = "forward and backward" if row["gradient"] else "forward"
        lines.append(f"D = {row['D']}, B = {row['B']}, T = {row['T']:,}, {what}: {row['cell']}")
        for name, value in row["seconds"].items():
            lines.append(f"    {name:<12}{1e3 * value:>10.1f} ms   deviation {row['deviation'][name]:.1e}")
            if count := row["fell_back"].get(name):
                lines[-1] += f"   {count} of {row['B']} sequences did not converge, and fell back to the loop"
        ratios = [f"loop ÷ quasi-DEER {row['loop_over_quasi_deer']:.2f}"]
        for name, title in (("quasi_deer", "quasi-DEER"), ("deer", "DEER"), ("auto", "auto")):
            if f"{name}_over_library" in row:
                ratios.append(f"{title} ÷ library {row[f'{name}_over_library']:.2f}")
        lines.append(f"    {', '.join(ratios)}; auto ÷ best ({row['best']}) {row['auto_over_best']:.2f}")
    auto = result["auto_over_best"]
    lines.append(f"auto ÷ best: at most {auto['largest']:.2f}, geometric mean {auto['geometric_mean']:.2f}")
    if padded := result.get("lengths"):
        times = ", ".join(f"{name} {1e3 * value:.1f} ms" for name, value in padded["seconds"].items())
        lines.append(
            f"GRUCell, lengths 1 … {padded['T']:,}, D = {padded['D']}, B = {padded['B']}, forward and backward: "
            f"{times}; lengths ÷ packed {padded['lengths_over_packed']:.2f}"
        )
    lines += [
        f"memory of {name}: {value:.1f} numbers per number of state" for name, value in result["memory_floats"].items()
    ]
    for row in result.get("gpu", ()):
        times = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in row["seconds"].items())
        lines.append(f"GPU, D = {row['D']}, B = {grid.BATCH}, T = {row['T']:,}, forward and backward: {times}")
    return "\n".join(lines)
