"""`reroll bench rollouts`: ways to evaluate a recurrence along time, side by side: speed and deviation in one table.

    loop        the step in a Python loop (`Sequential(kernel="reference")`)
    library     torch's fused kernel for the same cell
    quasi_deer, deer, jacobi        parallel in time
    auto        what `reroll.auto()` chooses

Cells: a GRU written by a user in plain torch operations, and torch's own `GRUCell`; forward, no gradient, float32.
Every figure is a median over interleaved rounds; deviations are from the loop.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.bench.timing import in_turn, ratio
from reroll.cells import Cell, cell_from
from reroll.rollout import Sequential, auto, deer, jacobi, quasi_deer
from reroll.train.run import commit, hardware

CASES = ((8, 16), (32, 4), (32, 16))
"""(D, B): features of the state, sequences."""


def run(rounds: int = 7, path: Path | None = None, steps: int = 10_000) -> dict[str, Any]:
    """Measure all cases, print a table, and write it as JSON if a path is given."""
    rows = [case(size, batch, steps, rounds) for size, batch in CASES]
    found = {"rows": rows, "steps": steps, "hardware": hardware(), "commit": commit(), "torch": torch.__version__}
    print(report(found))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    return found


def written_by_a_user(module: nn.GRUCell) -> Cell:
    """Return the GRU of a module as a user would write it: plain operations, the input projected in the step."""

    def step(u: Tensor, s: Tensor) -> Tensor:
        x_r, x_z, x_n = functional.linear(u, module.weight_ih, module.bias_ih).chunk(3, -1)
        h_r, h_z, h_n = functional.linear(s, module.weight_hh, module.bias_hh).chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return n + z * (s - n)

    return cell_from(step, module.hidden_size, module=module)


@torch.no_grad()
def case(size: int, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    """Return seconds and deviations of every method on one size."""
    torch.manual_seed(0)
    library = nn.GRU(size, size, batch_first=True)
    module = nn.GRUCell(size, size)
    for name, p in module.named_parameters():
        p.copy_(getattr(library, f"{name}_l0"))
    inputs = torch.randn(batch, steps, size)
    user, own = written_by_a_user(module), cell_from(module, size)
    runs: dict[str, Callable[[], Tensor]] = {
        "library": lambda: library(inputs)[0],
        "user: loop": lambda: Sequential(kernel="reference")(user, inputs).states,
        "user: quasi_deer": lambda: quasi_deer()(user, inputs).states,
        "user: deer": lambda: deer()(user, inputs).states,
        "user: jacobi": lambda: jacobi()(user, inputs).states,
        "user: auto": lambda: auto()(user, inputs).states,
        "GRUCell: quasi_deer": lambda: quasi_deer()(own, inputs).states,
        "GRUCell: deer": lambda: deer()(own, inputs).states,
    }
    exact = runs["user: loop"]()
    deviation = {name: float((call() - exact).abs().max()) for name, call in runs.items()}
    seconds = in_turn(runs, rounds)
    median = {name: sorted(times)[len(times) // 2] for name, times in seconds.items()}
    best = min(value for name, value in median.items() if name.startswith("user") and name != "user: auto")
    return {
        "D": size, "B": batch, "seconds": median, "deviation": deviation,
        "loop_over_quasi_deer": ratio(seconds, "user: loop", "user: quasi_deer"),
        "quasi_deer_over_library": ratio(seconds, "GRUCell: quasi_deer", "library"),
        "deer_over_library": ratio(seconds, "GRUCell: deer", "library"),
        "auto_over_best": median["user: auto"] / best,
    }  # fmt: skip


def report(found: dict[str, Any]) -> str:
    """Return the table."""
    lines = []
    for row in found["rows"]:
        lines.append(f"D = {row['D']}, B = {row['B']}, T = {found['steps']:,}")
        for name, value in row["seconds"].items():
            lines.append(f"    {name:<22}{1e3 * value:>9.1f} ms   deviation {row['deviation'][name]:.1e}")
        lines.append(
            f"    loop ÷ quasi-DEER {row['loop_over_quasi_deer']:.2f} (user's cell); quasi-DEER ÷ library "
            f"{row['quasi_deer_over_library']:.2f}, DEER ÷ library {row['deer_over_library']:.2f}; auto ÷ best "
            f"{row['auto_over_best']:.2f}"
        )
    return "\n".join([*lines, f"{found['hardware']}, torch {found['torch']}, commit {found['commit']}"])
