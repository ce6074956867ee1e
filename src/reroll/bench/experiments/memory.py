"""How much memory a step needs on top of the model, by BPTT and by CD-RGE: the question of the replication report.

LSTM of 512 features, batch 16. Each method in a fresh process: build, one warm-up step, then one step, whose peak of
resident memory is taken over what was resident before it. CD-RGE rounds the weights to a grid, so that it keeps no copy
of them: what remains is inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reroll.bench.cases import Case
from reroll.bench.harness import Prepared, columns
from reroll.grad import Backprop, CentralDifference
from reroll.train.measure import measure as weigh

PROBES = 8
"""Probes of the measured step, which its memory does not depend on."""
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
    return Case.lstm(hidden, heads, rows, time).call(METHODS[method])


def measure(full: bool) -> dict[str, Any]:
    """Return `overhead_reduction` = 1 − CD-RGE ÷ BPTT at T = 1024, and the bytes of all methods."""
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
