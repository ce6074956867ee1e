"""`reroll bench grid`: the speed grid of DEER (Lim et al., ICLR 2024), a GRU's widths and lengths; batch 16, float32.

Forward, and forward with the gradient of all weights and inputs; a Python loop, torch's kernel, DEER, quasi-DEER and
what `auto()` chooses. A corner of the grid on a CPU, all of it on a GPU: D from 1 to 64, T from 1,000 to 1,000,000.
The published times, for D = 1 on a V100, are shown next to ours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from reroll.bench.harness import columns, evaluation, in_turn, medians, publish
from reroll.bench.rollouts.cells import like
from reroll.cells import cell_from
from reroll.rollout import Rollout, Sequential, auto, deer, quasi_deer

BATCH = 16
CORNER = ((1, 4, 16), (1000, 10_000))
GRID = ((1, 2, 4, 8, 16, 32, 64), (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000))
"""Widths and lengths."""
PUBLISHED = {
    1000: (9.96, 0.557, 35.1, 0.852), 3000: (29.3, 0.673, 104, 0.961), 10_000: (97.4, 0.713, 349, 1.37),
    30_000: (291, 0.772, 1056, 1.42), 100_000: (972, 0.873, 3473, 4.30), 300_000: (2921, 1.455, 10_500, 13.1),
}  # fmt: skip
"""Milliseconds at D = 1 by length: loop and DEER forward, then with gradient. V100, JAX; from the paper's logs."""
LOOPED = 10_000
"""Maximum steps of the Python loop; beyond, its time is extrapolated."""
JACOBIANS = 1 << 31
"""Entries of the Jacobians beyond which DEER is skipped: 8 GB."""


def run(rounds: int = 5, path: Path | None = None, sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None) -> Any:
    """Measure the grid, print it, and write it as JSON if a path is given."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    widths, lengths = sizes or (GRID if device == "cuda" else CORNER)
    rows = [
        point(size, steps, gradient, rounds, device)
        for gradient in (False, True) for size in widths for steps in lengths
    ]  # fmt: skip
    return publish({"rows": rows, "rounds": rounds}, report, path)


def point(size: int, steps: int, gradient: bool, rounds: int, device: str) -> dict[str, Any]:
    """Return seconds of every method at one width and length, and its largest deviation from torch, relative.

    With a gradient, the deviation is that of the gradient with respect to the inputs.
    """
    torch.manual_seed(0)
    library = nn.GRU(size, size, batch_first=True).to(device)
    cell = cell_from(like(library, nn.GRUCell(size, size).to(device)), size)
    inputs = torch.randn(BATCH, steps, size, device=device)
    rollouts: dict[str, Rollout] = {"quasi_deer": quasi_deer(), "auto": auto()}
    if BATCH * steps * size**2 <= JACOBIANS:
        rollouts["deer"] = deer()

    def through(rollout: Rollout, x: torch.Tensor) -> Any:
        return evaluation(lambda x: rollout.read(cell, x)[0], x, cell, gradient)

    calls = {name: through(rollout, inputs) for name, rollout in rollouts.items()}
    calls["library"] = evaluation(lambda x: library(x)[0], inputs, library, gradient)
    exact = calls["library"]()[0]
    deviation = {name: float((calls[name]()[0] - exact).abs().max() / exact.abs().max()) for name in rollouts}
    looped = min(steps, LOOPED)
    calls["loop"] = through(Sequential(kernel="reference"), inputs[:, :looped])
    seconds = medians(in_turn(calls, rounds))
    seconds["loop"] *= steps / looped
    return {"D": size, "T": steps, "gradient": gradient, "seconds": seconds, "deviation": deviation}


def report(result: dict[str, Any]) -> str:
    """Return the table, in milliseconds."""
    names = ("loop", "library", "deer", "quasi_deer", "auto")
    rows: list[list[Any]] = [["what", "D", "T", *names, "loop ÷ DEER", "loop ÷ auto", "published loop, DEER"]]
    for row in result["rows"]:
        ms = {name: 1e3 * value for name, value in row["seconds"].items()}
        published = PUBLISHED.get(row["T"]) if row["D"] == 1 else None
        before = published and "{:g}, {:g}".format(*(published[2:] if row["gradient"] else published[:2]))
        deer = ms["loop"] / ms["deer"] if "deer" in ms else None
        what = "forward and backward" if row["gradient"] else "forward"
        times = [ms.get(name) for name in names]
        rows.append([what, row["D"], row["T"], *times, deer, ms["loop"] / ms["auto"], before])
    return f"milliseconds, batch {BATCH}\n{columns(rows)}"
