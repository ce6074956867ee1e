"""`reroll bench grid`: the speed grid of DEER (Lim et al., ICLR 2024), a GRU's widths and lengths; batch 16, float32.

Forward, and forward with the gradient of all weights and inputs; a Python loop, torch's kernel, DEER, quasi-DEER and
what `auto()` takes. On two cores a corner of the grid, on a card all of it: D from 1 to 64, T from 1,000 to 1,000,000.
The published times, of D = 1 on a V100, stand beside ours.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reroll.bench.experiments.show import columns
from reroll.bench.rollouts.cells import like
from reroll.bench.timing import in_turn
from reroll.cells import cell_from
from reroll.rollout import Sequential, auto, deer, quasi_deer
from reroll.train.machine import commit, hardware

BATCH = 16
CORNER = ((1, 4, 16), (1000, 10_000))
GRID = ((1, 2, 4, 8, 16, 32, 64), (1000, 3000, 10_000, 30_000, 100_000, 300_000, 1_000_000))
"""Widths and lengths."""
PUBLISHED = {
    1000: (9.96, 0.557, 35.1, 0.852), 3000: (29.3, 0.673, 104, 0.961), 10_000: (97.4, 0.713, 349, 1.37),
    30_000: (291, 0.772, 1056, 1.42), 100_000: (972, 0.873, 3473, 4.30), 300_000: (2921, 1.455, 10_500, 13.1),
}  # fmt: skip
"""Milliseconds at D = 1 by length: loop and DEER forward, the same with the gradient. V100, JAX; logs of the code."""
LOOPED = 10_000
"""Steps that the Python loop runs at most; more are extrapolated."""
JACOBIANS = 1 << 31
"""Numbers of whole Jacobians beyond which DEER is left out: 8 GB."""

Call = Callable[[], Tensor]


def run(rounds: int = 5, path: Path | None = None, sizes: tuple[tuple[int, ...], tuple[int, ...]] | None = None) -> Any:
    """Measure the grid, print it, and write it as JSON if a path is given."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    widths, lengths = sizes or (GRID if device == "cuda" else CORNER)
    rows = [
        point(size, steps, gradient, rounds, device)
        for gradient in (False, True) for size in widths for steps in lengths
    ]  # fmt: skip
    found = {"rows": rows, "rounds": rounds, "hardware": hardware(), "commit": commit(), "torch": torch.__version__}
    print(report(found))
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n")
    return found


def point(size: int, steps: int, gradient: bool, rounds: int, device: str) -> dict[str, Any]:
    """Return seconds of every method at one width and length, and how far it is from torch, relative to the largest."""
    torch.manual_seed(0)
    library = nn.GRU(size, size, batch_first=True).to(device)
    cell = cell_from(like(library, nn.GRUCell(size, size).to(device)), size)
    inputs = torch.randn(BATCH, steps, size, device=device)
    looped = min(steps, LOOPED)
    rollouts = {"loop": Sequential(kernel="reference"), "quasi_deer": quasi_deer(), "auto": auto()}
    if BATCH * steps * size**2 <= JACOBIANS:
        rollouts["deer"] = deer()
    calls: dict[str, Call] = {
        name: _call(lambda x, rollout=rollout: rollout.read(cell, x)[0], cell, inputs, gradient)
        for name, rollout in rollouts.items() if name != "loop"
    }  # fmt: skip
    calls["library"] = _call(lambda x: library(x)[0], library, inputs, gradient)
    exact = calls["library"]()
    scale = exact.abs().max()
    others = [(name, call) for name, call in calls.items() if name != "library"]
    deviation = {name: float((call() - exact).abs().max() / scale) for name, call in others}
    calls["loop"] = _call(lambda x: rollouts["loop"].read(cell, x)[0], cell, inputs[:, :looped], gradient)
    seconds = {name: statistics.median(times) for name, times in in_turn(calls, rounds).items()}
    seconds["loop"] *= steps / looped
    return {"D": size, "T": steps, "gradient": gradient, "seconds": seconds, "deviation": deviation}


def _call(states: Callable[[Tensor], Tensor], module: nn.Module, inputs: Tensor, gradient: bool) -> Call:
    def call() -> Tensor:
        with torch.set_grad_enabled(gradient):
            leaf = inputs.detach().requires_grad_(gradient)
            found = states(leaf)
            if gradient:
                found = torch.autograd.grad(found.square().sum(), [leaf, *module.parameters()])[0]
        if found.is_cuda:
            torch.cuda.synchronize()
        return found

    return call


def report(found: dict[str, Any]) -> str:
    """Return the table, in milliseconds."""
    names = ("loop", "library", "deer", "quasi_deer", "auto")
    head = ["what", "D", "T", *names, "loop ÷ DEER", "loop ÷ auto", "published loop, DEER"]
    rows: list[list[Any]] = [head]
    for row in found["rows"]:
        ms = {name: 1e3 * value for name, value in row["seconds"].items()}
        known = PUBLISHED.get(row["T"]) if row["D"] == 1 else None
        before = None if known is None else "{:g}, {:g}".format(*(known[2:] if row["gradient"] else known[:2]))
        deer = ms["loop"] / ms["deer"] if "deer" in ms else None
        what = "forward and backward" if row["gradient"] else "forward"
        given = [what, row["D"], row["T"], *(ms.get(name) for name in names)]
        rows.append([*given, deer, ms["loop"] / ms["auto"], before])
    where = f"{found['hardware']}, torch {found['torch']}, commit {found['commit']}"
    return f"milliseconds, batch {BATCH}\n{columns(rows)}\n{where}"
