"""The replication report's question: how much more memory than the model does a step need, by BPTT and by CD-RGE?

LSTM of 512 features, batch 16. Each method in a fresh process: build, one step to warm up, then one step, of which the
peak of the resident memory is taken above what was resident before it. CD-RGE runs with weights on a grid, so that it
keeps no copy of them: what is left is inference.
"""

from __future__ import annotations

from typing import Any

import torch

from reroll.data.batch import Batch
from reroll.data.task import sequence_losses
from reroll.grad import Backprop, CentralDifference
from reroll.keys import Key
from reroll.models import Recurrent
from reroll.optim import step
from reroll.train.measure import measure

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


class OneStep:
    """A step of one method; the model is built at the first call, in the process that is measured."""

    def __init__(self, method: str, time: int, heads: int = 1, hidden: int = 512, rows: int = 16):
        self.method, self.time, self.heads, self.hidden, self.rows = method, time, heads, hidden, rows
        self.built: Any = None

    def __call__(self) -> None:
        if self.built is None:
            self.built = self._build()
        model, batch, optimizer = self.built
        estimator = METHODS[self.method]
        if estimator is None:
            with torch.no_grad():
                sequence_losses(model, batch)
            return
        update = "fused" if isinstance(estimator, CentralDifference) else "write"
        step(model, sequence_losses, estimator, optimizer, batch, None, Key(0), update=update)

    def _build(self) -> tuple[Recurrent, Batch, torch.optim.Optimizer]:
        from reroll.cells import LSTM

        torch.manual_seed(0)
        model = Recurrent(cell=LSTM(100, self.hidden, heads=self.heads), vocab=100)
        ids = torch.randint(100, (self.rows, self.time + 1))
        mask = torch.ones(self.rows, self.time, dtype=torch.bool)
        batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask)
        return model, batch, torch.optim.SGD(model.parameters(), lr=0.001)


def overheads(time: int, heads: int = 1) -> dict[str, int]:
    """Return the bytes that each method needs above the model, for sequences of this length."""
    return {method: measure(OneStep(method, time, heads)).peak_bytes for method in METHODS}


def reproduce() -> dict[str, Any]:
    """Return `overhead_reduction` = 1 − CD-RGE ÷ BPTT at T = 1024, and all that was measured."""
    found = {f"T={time}, heads={heads}": overheads(time, heads) for heads in (1, 8) for time in (32, 1024)}
    reductions = {case: 1 - m["CD-RGE"] / m["BPTT"] for case, m in found.items()}
    return {
        "overhead_reduction": reductions["T=1024, heads=1"], "reductions": reductions, "overhead_bytes": found,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """Return the measurements as a table, in megabytes above the model."""
    cases = list(found["overhead_bytes"])
    lines = ["MB above the model" + "".join(f"{case:>18}" for case in cases)]
    for method in METHODS:
        lines.append(f"{method:<18}" + "".join(f"{found['overhead_bytes'][c][method] / 1e6:>18.1f}" for c in cases))
    lines.append(f"{'1 − CD-RGE ÷ BPTT':<18}" + "".join(f"{found['reductions'][c]:>18.3f}" for c in cases))
    return "\n".join(lines)
