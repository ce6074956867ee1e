"""Time and memory against length and width (Gonzalez et al., arXiv:2407.19115, figures 2 and 6).

An untrained GRU, float32, forward without gradients, on all steps at once (no windows). On a CPU each method runs in a
fresh process, else on the GPU; memory is the peak over the model and the inputs. Batch 16 is figure 2, batch 1 is
figure 6. A dense Jacobian takes D² numbers per step, its diagonal D; other memory makes the ratio smaller: about 5 at
D = 32, so it is taken at the largest published width, 64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from reroll.bench.harness import Prepared, columns
from reroll.cells import GRU
from reroll.errors import RunError
from reroll.rollout import Dense, Diagonal, Newton, Sequential
from reroll.train.measure import measure as weigh

METHODS = ("loop", "torch GRU", "DEER", "quasi-DEER")
SIZES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {16: ((8, 64), (500, 1500)), 1: ((4, 64), (3000, 10_000))}
"""Widths (a small one, and the largest published) and lengths by batch, for two cores."""
FULL: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    16: ((8, 16, 32, 64), (30_000, 100_000, 300_000, 1_000_000)),
    1: ((1, 2, 4, 8, 16, 32, 64), (1000, 10_000, 100_000, 1_000_000)),
}
"""Those of the figures."""


def prepare(method: str, size: int, steps: int, batch: int) -> Callable[[], Any]:
    """Return a call that evaluates a GRU by one method."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    linearise = {"DEER": Dense(), "quasi-DEER": Diagonal()}.get(method)
    rollout = Sequential() if linearise is None else Newton(linearise, window=None)
    cell, inputs = GRU(size, size).to(device), torch.randn(batch, steps, size, device=device)
    run = rollout.read if method == "torch GRU" else rollout
    return torch.no_grad()(lambda: run(cell, inputs))


def measure(
    full: bool, batch: int, sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None, rounds: int = 1
) -> dict[str, Any]:
    """Return seconds (the median of the rounds) and peak bytes of every method at every size.

    Args:
        full: at the sizes of the figures.
        batch: 16 or 1.
        sizes: widths and lengths in place of the usual ones.
        rounds: how often each is measured.
    """
    if torch.cuda.is_available():
        torch.cuda.init()  # makes `measure` measure on the GPU
    widths, lengths = sizes or (FULL if full else SIZES)[batch]
    rows = []
    for size in widths:
        for steps in lengths:
            for method in METHODS:
                row: dict[str, Any] = {"method": method, "size": size, "steps": steps}
                rows.append(row | _measure(Prepared(prepare, method, size, steps, batch), rounds))
    widest = [row for row in rows if (row["size"], row["steps"]) == (max(widths), max(lengths))]
    by_method = {row["method"]: row for row in widest}
    dense, diagonal, loop = (by_method[name] for name in ("DEER", "quasi-DEER", "loop"))
    return {
        "batch": batch, "rows": rows, "memory_ratio": dense["bytes"] / max(diagonal["bytes"], 1),
        "speed_against_loop": loop["seconds"] / diagonal["seconds"],
    }  # fmt: skip


def _measure(call: Prepared, rounds: int) -> dict[str, float]:
    """Return seconds and bytes; NaN if memory runs out."""
    try:
        measurements = [weigh(call, warmup=3) for _ in range(rounds)]
    except (RunError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        return {"seconds": float("nan"), "bytes": float("nan")}
    return {
        "seconds": statistics.median(m.seconds for m in measurements),
        "bytes": max(m.peak_bytes for m in measurements),
    }


def holds(result: dict[str, Any]) -> bool:
    """Whether diagonals need at most a fifth of the memory of dense Jacobians; true if those do not fit at all."""
    return not result["memory_ratio"] < 5


def report(result: dict[str, Any]) -> str:
    """Return a table with a row for every method and size."""
    rows: list[list[Any]] = [["method", "D", "T", "ms", "MB"]]
    rows += [[r["method"], r["size"], r["steps"], 1e3 * r["seconds"], r["bytes"] / 1e6] for r in result["rows"]]
    return (
        f"GRU, batch {result['batch']}, forward\n{columns(rows)}\n"
        f"at the largest: DEER takes {result['memory_ratio']:.3g} times the memory of quasi-DEER, "
        f"which is {result['speed_against_loop']:.3g} times as fast as the loop"
    )


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot time and memory by length, for the largest width."""
    widest, steps = max(row["size"] for row in result["rows"]), sorted({row["steps"] for row in result["rows"]})
    for axes, key, label in zip(figure.subplots(1, 2), ("seconds", "bytes"), ("seconds", "bytes above the model")):
        for method in METHODS:
            rows = [r for r in result["rows"] if r["method"] == method and r["size"] == widest]
            axes.plot([r["steps"] for r in rows], [r[key] for r in rows], "o-", label=method)
        axes.set(xlabel="steps", ylabel=label, xscale="log", yscale="log", title=f"D = {widest}")
        axes.set_xticks(steps, labels=[f"{s:,}" for s in steps])
        axes.minorticks_off()
        axes.legend(fontsize="small")
