"""The replication report's question: how much more memory than the model does a step need, by BPTT and by CD-RGE?

LSTM of 512 features, batch 16. Each method in a fresh process: build, one step to warm up, then one step, of which the
peak of the resident memory is taken above what was resident before it. CD-RGE runs with weights on a grid, so that it
keeps no copy of them: what is left is inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reroll.bench.cases import Case
from reroll.bench.harness import Prepared, columns
from reroll.grad import Backprop, CentralDifference
from reroll.train.measure import measure as weigh

PROBES = 8
"""Probes of the measured step; memory does not depend on them."""
METHODS: dict[str, Any] = {
    "inference": None,
    "BPTT": Backprop(),
    "BPTT, checkpoints": Backprop(checkpoint=True),
    "CD-RGE": CentralDifference(PROBES, 0.01, evaluate="in_place", restore="grid"),
    "CD-RGE, copy": CentralDifference(PROBES, 0.01, evaluate="in_place"),
    "CD-RGE, tiles": CentralDifference(PROBES, 0.01, evaluate="tiles", workers=1),
}


def prepare(method: str, time: int, heads: int = 1, hidden: int = 512, rows: int = 16) -> Callable[[], Any]:
    """Return a call that takes a step by one method."""
    case, estimator = Case.lstm(hidden, heads, rows, time), METHODS[method]
    return case.forward if estimator is None else lambda: case.step(estimator)


def measure(full: bool) -> dict[str, Any]:
    """Return `overhead_reduction` = 1 − CD-RGE ÷ BPTT at T = 1024, and the bytes of all methods; `full` is the same."""
    overheads = {
        f"T={time}, heads={heads}": {m: weigh(Prepared(prepare, m, time, heads)).peak_bytes for m in METHODS}
        for heads in (1, 8)
        for time in (32, 1024)
    }
    reductions = {case: 1 - m["CD-RGE"] / m["BPTT"] for case, m in overheads.items()}
    return {
        "overhead_reduction": reductions["T=1024, heads=1"], "reductions": reductions, "overhead_bytes": overheads,
    }  # fmt: skip


def holds(result: dict[str, Any]) -> bool:
    return result["overhead_reduction"] >= 0.95


def report(result: dict[str, Any]) -> str:
    cases = list(result["overhead_bytes"])
    rows: list[list[Any]] = [["MB above the model", *cases]]
    rows += [[method, *(f"{result['overhead_bytes'][c][method] / 1e6:.1f}" for c in cases)] for method in METHODS]
    return columns([*rows, ["1 − CD-RGE ÷ BPTT", *(f"{result['reductions'][c]:.3f}" for c in cases)]])
