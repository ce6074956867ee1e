"""Time and memory against length and width (Gonzalez et al., arXiv:2407.19115, figures 2 and 6).

A GRU at its initial weights, float32, forward without gradients, on all steps at once (no windows). Each method runs
in a fresh process on a CPU, on the device where there is one; memory is the peak above the model and the inputs.
Batch 16 is figure 2, batch 1 is figure 6. A whole Jacobian takes D² numbers a step, its diagonal D;
what is needed beside them makes the ratio smaller: about 5 at D = 32, so it is taken at the published largest, 64.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from reroll.bench.experiments.show import columns
from reroll.train.measure import measure as take

METHODS = ("loop", "torch GRU", "DEER", "quasi-DEER")
SIZES: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {16: ((8, 64), (500, 1500)), 1: ((4, 64), (3000, 10_000))}
"""Widths (the least, and the largest published one) and lengths by batch, for two cores."""
FULL: dict[int, tuple[tuple[int, ...], tuple[int, ...]]] = {
    16: ((8, 16, 32, 64), (30_000, 100_000, 300_000, 1_000_000)),
    1: ((1, 2, 4, 8, 16, 32, 64), (1000, 10_000, 100_000, 1_000_000)),
}
"""Those of the figures."""


class Evaluate:
    """One evaluation by one method; the model and the inputs are built at the first call, where it is measured."""

    def __init__(self, method: str, size: int, steps: int, batch: int):
        self.method, self.size, self.steps, self.batch = method, size, steps, batch
        self.built: tuple[Any, Any, torch.Tensor] | None = None

    def __call__(self) -> None:
        if self.built is None:
            self.built = self._build()
        rollout, cell, inputs = self.built
        with torch.no_grad():
            if self.method == "torch GRU":
                rollout.read(cell, inputs)
            else:
                rollout(cell, inputs)

    def _build(self) -> tuple[Any, Any, torch.Tensor]:
        from reroll.cells import GRU
        from reroll.rollout import Dense, Diagonal, Newton, Sequential

        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        kept = {"DEER": Dense(), "quasi-DEER": Diagonal()}.get(self.method)
        rollout = Sequential() if kept is None else Newton(kept, window=None)
        inputs = torch.randn(self.batch, self.steps, self.size, device=device)
        return rollout, GRU(self.size, self.size).to(device), inputs


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
        torch.cuda.init()  # what is measured then is the device
    widths, lengths = sizes or (FULL if full else SIZES)[batch]
    rows = []
    for size in widths:
        for steps in lengths:
            for method in METHODS:
                row: dict[str, Any] = {"method": method, "size": size, "steps": steps}
                rows.append(row | _taken(Evaluate(method, size, steps, batch), rounds))
    widest = [row for row in rows if (row["size"], row["steps"]) == (max(widths), max(lengths))]
    by_method = {row["method"]: row for row in widest}
    dense, diagonal, loop = (by_method[name] for name in ("DEER", "quasi-DEER", "loop"))
    return {
        "batch": batch, "rows": rows, "memory_ratio": dense["bytes"] / max(diagonal["bytes"], 1),
        "speed_against_loop": loop["seconds"] / diagonal["seconds"],
    }  # fmt: skip


def _taken(evaluate: Evaluate, rounds: int) -> dict[str, float]:
    """Seconds and bytes; not numbers where the memory does not suffice."""
    from reroll.errors import RunError

    try:
        found = [take(evaluate, warmup=3) for _ in range(rounds)]
    except (RunError, RuntimeError) as error:
        if "memory" not in str(error):
            raise
        return {"seconds": float("nan"), "bytes": float("nan")}
    return {"seconds": statistics.median(m.seconds for m in found), "bytes": max(m.peak_bytes for m in found)}


def holds(found: dict[str, Any]) -> bool:
    """Whether diagonals need a fifth of the memory of whole Jacobians; where those do not fit at all, that is so."""
    return not found["memory_ratio"] < 5


def report(found: dict[str, Any]) -> str:
    """Return a row for every method and size."""
    rows: list[list[Any]] = [["method", "D", "T", "ms", "MB"]]
    rows += [[r["method"], r["size"], r["steps"], 1e3 * r["seconds"], r["bytes"] / 1e6] for r in found["rows"]]
    return (
        f"GRU, batch {found['batch']}, forward\n{columns(rows)}\n"
        f"at the largest: DEER takes {found['memory_ratio']:.3g} times the memory of quasi-DEER, "
        f"which is {found['speed_against_loop']:.3g} times as fast as the loop"
    )


def draw(found: dict[str, Any], figure: Any) -> None:
    """Draw time and memory against the length, for the widest."""
    widest, steps = max(row["size"] for row in found["rows"]), sorted({row["steps"] for row in found["rows"]})
    for axes, key, label in zip(figure.subplots(1, 2), ("seconds", "bytes"), ("seconds", "bytes above the model")):
        for method in METHODS:
            rows = [r for r in found["rows"] if r["method"] == method and r["size"] == widest]
            axes.plot([r["steps"] for r in rows], [r[key] for r in rows], "o-", label=method)
        axes.set(xlabel="steps", ylabel=label, xscale="log", yscale="log", title=f"D = {widest}")
        axes.set_xticks(steps, labels=[f"{s:,}" for s in steps])
        axes.minorticks_off()
        axes.legend(fontsize="small")


def measure_16(full: bool) -> dict[str, Any]:
    """Figure 2."""
    return measure(full, 16)


def measure_1(full: bool) -> dict[str, Any]:
    """Figure 6."""
    return measure(full, 1)
