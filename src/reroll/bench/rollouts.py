"""`reroll bench rollouts`: ways to evaluate a recurrence along time, side by side: speed and deviation in one table.

    loop            the step in a Python loop (`Sequential(kernel="reference")`)
    library         torch's fused kernel for the same cell (oneDNN, cuDNN)
    compiled        the step written as a program, and looped over in compiled code (`Sequential(kernel="compiled")`)
    quasi_deer, deer, jacobi, picard, elk, quasi_elk        parallel in time
    auto            what `reroll.auto()` chooses

Cells: a GRU written by a user in plain torch operations, torch's own `GRUCell` and `LSTMCell`, and a user's cell that
cannot be written as a program. On a CPU: the readouts of all steps, no gradient, float32. On a GPU: forward and
backward, T = 100,000. Every figure is a median over interleaved rounds; deviations are from the loop.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.bench.timing import in_turn, ratio
from reroll.cells import GRU, Cell, cell_from
from reroll.rollout import Rollout, Sequential, auto, deer, elk, jacobi, picard, quasi_deer, quasi_elk
from reroll.train.measure import measure
from reroll.train.run import commit, hardware

CASES = ((8, 16), (32, 4), (32, 16), (8, 1))
"""(D, B): features of the state, sequences."""
GPU_CASES = ((8, 16), (16, 16), (32, 16), (64, 16))
GPU_STEPS = 100_000
LOOPED_SHARE = 50
"""On a GPU the Python loop runs over one in so many of the steps, and its time is multiplied: it takes minutes."""
METHODS: dict[str, Callable[[], Rollout]] = {
    "loop": lambda: Sequential(kernel="reference"),
    "compiled": lambda: Sequential(kernel="compiled"),
    "quasi_deer": quasi_deer,
    "deer": deer,
    "jacobi": jacobi,
    "picard": picard,
    "quasi_elk": quasi_elk,
    "elk": elk,
    "auto": auto,
}
SLOW = 20_000
"""Whole Jacobians are damped up to this many numbers of them and sequences; more take minutes on a CPU."""

Runs = dict[str, Callable[[], Tensor]]


def run(rounds: int = 7, path: Path | None = None, steps: int = 10_000) -> dict[str, Any]:
    """Measure all cases, print a table, and write it as JSON if a path is given."""
    rows = [row for size, batch in CASES for row in case(size, batch, steps, rounds)]
    found: dict[str, Any] = {"steps": steps, "rows": rows, "auto_over_best": _auto(rows)}
    found["memory_floats"] = {
        "quasi_deer()": memory(quasi_deer(), steps), "quasi_deer(window=None)": memory(quasi_deer(window=None), steps)
    }  # fmt: skip
    if torch.cuda.is_available():
        found["gpu"] = [gpu_case(size, batch, GPU_STEPS, rounds) for size, batch in GPU_CASES]
    found |= {"hardware": hardware(), "commit": commit(), "torch": torch.__version__}
    print(report(found))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    return found


# ---- cells


def written_by_a_user(module: nn.GRUCell) -> Cell:
    """Return the GRU of a module as a user would write it: plain operations, the input projected in the step."""

    def step(u: Tensor, s: Tensor) -> Tensor:
        x_r, x_z, x_n = functional.linear(u, module.weight_ih, module.bias_ih).chunk(3, -1)
        h_r, h_z, h_n = functional.linear(s, module.weight_hh, module.bias_hh).chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return n + z * (s - n)

    return cell_from(step, module.hidden_size, module=module)


def not_writable(module: nn.RNNCell) -> Cell:
    """Return a user's cell with an operation that programs do not have, and whose Jacobian has no structure."""

    def step(u: Tensor, s: Tensor) -> Tensor:
        pre = functional.linear(u, module.weight_ih, module.bias_ih) + functional.linear(s, module.weight_hh)
        return torch.tanh(functional.layer_norm(pre, pre.shape[-1:]))

    return cell_from(step, module.hidden_size, module=module)


def like(library: nn.RNNBase, module: nn.Module) -> nn.Module:
    """Give a module the weights of torch's fused one."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(getattr(library, f"{name}_l0"))
    return module


# ---- on the CPU, forward


@torch.no_grad()
def case(size: int, batch: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """Return, for every cell of one size, seconds and deviations of every method."""
    torch.manual_seed(0)
    inputs = torch.randn(batch, steps, size)
    gru, lstm = nn.GRU(size, size, batch_first=True), nn.LSTM(size, size, batch_first=True)
    own = like(gru, nn.GRUCell(size, size))
    cells: dict[str, tuple[Cell, nn.RNNBase | None]] = {
        "user": (written_by_a_user(own), gru),  # type: ignore[arg-type]
        "GRUCell": (cell_from(own, size), gru),
        "LSTMCell": (cell_from(like(lstm, nn.LSTMCell(size, size)), size), lstm),
        "not writable": (not_writable(nn.RNNCell(size, size)), None),
    }
    runs: dict[str, Runs] = {name: _runs(*given, inputs) for name, given in cells.items()}
    # All in one round, so that whatever else the machine does falls on all of them.
    together = {f"{cell}: {method}": call for cell, methods in runs.items() for method, call in methods.items()}
    exact = {cell: methods["loop"]() for cell, methods in runs.items()}
    deviation = {name: float((call() - exact[name.split(":")[0]]).abs().max()) for name, call in together.items()}
    seconds = in_turn(together, rounds)
    return [_row(size, batch, cell, list(methods), seconds, deviation) for cell, methods in runs.items()]


def _runs(cell: Cell, library: nn.RNNBase | None, inputs: Tensor) -> Runs:
    batch, _, size = inputs.shape

    def through(make: Callable[[], Rollout]) -> Callable[[], Tensor]:
        rollout = make()
        return lambda: rollout.read(cell, inputs)[0]

    wanted = {name: make for name, make in METHODS.items() if name != "elk" or batch * size**2 <= SLOW // 10}
    runs = {name: through(make) for name, make in wanted.items()}
    if library is not None:
        runs["library"] = lambda: library(inputs)[0]
    return runs


def _row(
    size: int,
    batch: int,
    cell: str,
    methods: list[str],
    seconds: dict[str, list[float]],
    deviation: Mapping[str, float],
) -> dict[str, Any]:
    mine = {method: seconds[f"{cell}: {method}"] for method in methods}
    median = {method: statistics.median(times) for method, times in mine.items()}
    # torch's kernel is no choice for a user's own code.
    best = min((m for m in methods if m != "auto" and not (m == "library" and cell == "user")), key=median.__getitem__)
    row: dict[str, Any] = {
        "D": size, "B": batch, "cell": cell, "seconds": median,
        "deviation": {method: deviation[f"{cell}: {method}"] for method in methods},
        "best": best, "auto_over_best": ratio(mine, "auto", best),
        "loop_over_quasi_deer": ratio(mine, "loop", "quasi_deer"),
    }  # fmt: skip
    if "library" in methods:
        row |= {f"{method}_over_library": ratio(mine, method, "library") for method in ("quasi_deer", "deer")}
    return row


def _auto(rows: list[dict[str, Any]]) -> dict[str, float]:
    ratios = [row["auto_over_best"] for row in rows]
    return {"largest": max(ratios), "geometric_mean": math.exp(statistics.fmean(map(math.log, ratios)))}


def memory(rollout: Rollout, steps: int, size: int = 32, batch: int = 16) -> float:
    """Return the peak of a forward pass above the inputs, in numbers per number of state; in a fresh process."""
    cell, inputs = GRU(size, size), torch.randn(batch, steps, size)
    return measure(torch.no_grad()(lambda: rollout(cell, inputs))).peak_bytes / (4 * size * batch * steps)


# ---- on a GPU, forward and backward


def gpu_case(size: int, batch: int, steps: int, rounds: int, device: str = "cuda") -> dict[str, Any]:
    """Return seconds and deviations of the gradient of a GRU's states on a card; those of the loop are extrapolated."""
    torch.manual_seed(0)
    library = nn.GRU(size, size, batch_first=True).to(device)
    cell = cell_from(like(library, nn.GRUCell(size, size).to(device)), size)
    inputs = torch.randn(batch, steps, size, device=device)

    def through(states: Callable[[Tensor], Tensor], x: Tensor, parameters: list[nn.Parameter]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            leaf = x.detach().requires_grad_()
            gradients = torch.autograd.grad(states(leaf).square().mean(), [leaf, *parameters])
            return gradients[0].cpu()  # waits for the card

        return call

    def by(rollout: Rollout, x: Tensor) -> Callable[[], Tensor]:
        return through(lambda x: rollout(cell, x).states, x, list(cell.parameters()))

    runs: Runs = {
        "library": through(lambda x: library(x)[0], inputs, list(library.parameters())),
        "quasi_deer": by(quasi_deer(), inputs),
    }
    if size <= 32:
        runs["deer"] = by(deer(), inputs)
    exact = runs["library"]()
    deviation = {name: float((call() - exact).abs().max() / exact.abs().max()) for name, call in runs.items()}
    seconds = in_turn(runs, rounds)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    looped = in_turn({"loop": by(Sequential(kernel="reference"), inputs[:, : steps // LOOPED_SHARE])}, 1)
    median["loop"] = LOOPED_SHARE * statistics.median(looped["loop"])
    return {
        "D": size, "B": batch, "T": steps, "seconds": median, "deviation_of_gradient": deviation,
        "quasi_deer_over_library": ratio(seconds, "quasi_deer", "library"),
    }  # fmt: skip


# ---- the table


def report(found: dict[str, Any]) -> str:
    """Return the table."""
    lines = []
    for row in found["rows"]:
        lines.append(f"D = {row['D']}, B = {row['B']}, T = {found['steps']:,}: {row['cell']}")
        for name, value in row["seconds"].items():
            lines.append(f"    {name:<12}{1e3 * value:>10.1f} ms   deviation {row['deviation'][name]:.1e}")
        said = f"    loop ÷ quasi-DEER {row['loop_over_quasi_deer']:.2f}"
        if "quasi_deer_over_library" in row:
            said += f"; quasi-DEER ÷ library {row['quasi_deer_over_library']:.2f}"
            said += f", DEER ÷ library {row['deer_over_library']:.2f}"
        said += f"; auto ÷ best ({row['best']}) {row['auto_over_best']:.2f}"
        lines.append(said)
    auto = found["auto_over_best"]
    lines.append(f"auto ÷ best: at most {auto['largest']:.2f}, geometric mean {auto['geometric_mean']:.2f}")
    lines += [
        f"memory of {name}: {value:.1f} numbers per number of state" for name, value in found["memory_floats"].items()
    ]
    for row in found.get("gpu", ()):
        times = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in row["seconds"].items())
        lines.append(f"GPU, D = {row['D']}, B = {row['B']}, T = {row['T']:,}, forward and backward: {times}")
    return "\n".join([*lines, f"{found['hardware']}, torch {found['torch']}, commit {found['commit']}"])
