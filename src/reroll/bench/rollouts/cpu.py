"""Rollouts on the CPU, in float32: the readouts of all steps without a gradient, or with the gradient of a loss."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from reroll.bench.harness import evaluation, in_turn, medians, ratio
from reroll.bench.rollouts.cells import Compared, compared
from reroll.cells import GRU
from reroll.rollout import Rollout, Sequential, auto, deer, elk, jacobi, picard, quasi_deer, quasi_elk
from reroll.rollout.monitor import monitoring
from reroll.train.measure import measure

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
LIKELY = ("loop", "compiled", "quasi_deer", "auto")
"""Methods that can be the fastest at other sizes, or with a gradient."""
WHOLE_JACOBIANS = 2_000
"""Entries of a step's dense Jacobians up to which ELK is run; more take minutes on a CPU."""
LEAST_SECONDS = 0.05
"""Minimum of a timing; shorter calls are repeated and averaged, as a single one mostly measures other load."""

Runs = dict[str, Callable[[], list[Tensor]]]


class Case(NamedTuple):
    """A size (D features, B sequences, T steps), with or without a gradient, its methods and cells."""

    size: int
    batch: int
    steps: int
    gradient: bool = False
    methods: tuple[str, ...] = LIKELY
    cells: tuple[str, ...] = ("user", "GRUCell", "LSTMCell", "not writable")


def cases(steps: int) -> list[Case]:
    """Return all cases: `steps` forward by every method; a tenth as many at other sizes, and with a gradient."""
    short = steps // 10
    return [
        *(Case(size, batch, steps, methods=tuple(METHODS)) for size, batch in ((8, 16), (32, 4), (32, 16), (8, 1))),
        *(
            Case(size, batch, short, cells=("user", "GRUCell", "LSTMCell"))
            for size, batch in ((64, 4), (128, 1), (256, 4), (16, 64), (64, 64))
        ),
        *(
            Case(size, batch, short, gradient=True)
            for size, batch in ((8, 1), (8, 16), (32, 16), (64, 16), (16, 64), (64, 64), (128, 4), (256, 4))
        ),
    ]


def rows_of(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Return, for every cell, seconds of every method and its deviation from the loop.

    The deviation is the largest over all tensors: absolute for readouts, relative to the largest entry for gradients.
    """
    torch.manual_seed(0)
    inputs = torch.randn(case.batch, case.steps, case.size)
    every = compared(case.size)
    runs = {name: _runs(case, every[name], inputs) for name in case.cells}
    # All in one round, so that other load on the machine affects all of them.
    together = {f"{cell}: {method}": call for cell, methods in runs.items() for method, call in methods.items()}
    deviation, fell_back = {}, {}
    exact = {cell: methods["loop"]() for cell, methods in runs.items()}
    for name, call in together.items():
        with monitoring() as monitor:
            deviation[name] = _deviation(case, call(), exact[name.split(":")[0]])
        fell_back[name] = monitor.fell_back
    with monitoring():  # fallbacks are in the row already, and need no warning at every call
        seconds = in_turn(together, rounds, LEAST_SECONDS)
    return [_row(case, cell, list(methods), seconds, deviation, fell_back) for cell, methods in runs.items()]


def _runs(case: Case, compared: Compared, inputs: Tensor) -> Runs:
    cell, library = compared

    def through(rollout: Rollout) -> Callable[[], list[Tensor]]:
        return evaluation(lambda x: rollout.read(cell, x)[0], inputs, cell, case.gradient)

    small = case.batch * case.size**2 <= WHOLE_JACOBIANS
    runs = {name: through(METHODS[name]()) for name in case.methods if name != "elk" or small}
    if library is not None:
        runs["library"] = evaluation(lambda x: library(x)[0], inputs, library, case.gradient)
    return runs


def _deviation(case: Case, tensors: list[Tensor], exact: list[Tensor]) -> float:
    scales = [float(b.abs().max()) if case.gradient else 1.0 for b in exact]
    return max(float((a - b).abs().max()) / scale for a, b, scale in zip(tensors, exact, scales, strict=True))


def _row(
    case: Case, cell: str, methods: list[str], seconds: Mapping[str, list[float]],
    deviation: Mapping[str, float], fell_back: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    times = {method: seconds[f"{cell}: {method}"] for method in methods}
    median = medians(times)
    # torch's kernel is not an option for a user's own code.
    best = min((m for m in methods if m != "auto" and not (m == "library" and cell == "user")), key=median.__getitem__)
    row: dict[str, Any] = {
        "D": case.size, "B": case.batch, "T": case.steps, "gradient": case.gradient, "cell": cell, "seconds": median,
        "deviation": {method: deviation[f"{cell}: {method}"] for method in methods},
        "fell_back": {method: n for method in methods if (n := fell_back[f"{cell}: {method}"])},
        "best": best, "auto_over_best": ratio(times, "auto", best),
        "loop_over_quasi_deer": ratio(times, "loop", "quasi_deer"),
    }  # fmt: skip
    if "library" in methods:
        row |= {f"{m}_over_library": ratio(times, m, "library") for m in ("quasi_deer", "deer", "auto") if m in methods}
    return row


def padded(rounds: int, steps: int, size: int = 32, batch: int = 64) -> dict[str, Any]:
    """Return seconds of a GRU's gradient on sequences of 1 … `steps` steps: with `lengths`, and packed by torch."""
    torch.manual_seed(0)
    cell, library = compared(size)["GRUCell"]
    assert library is not None
    inputs, lengths = torch.randn(batch, steps, size), torch.linspace(1, steps, batch).long()[torch.randperm(batch)]

    def packed(x: Tensor) -> Tensor:
        outputs = library(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[0]
        return pad_packed_sequence(outputs, batch_first=True)[0]

    case = Case(size, batch, steps, gradient=True)
    runs = {
        "packed": evaluation(packed, inputs, library, True),
        "lengths": evaluation(lambda x: auto().read(cell, x, lengths=lengths)[0], inputs, cell, True),
    }
    deviation = _deviation(case, runs["lengths"](), runs["packed"]())
    seconds = in_turn(runs, rounds, LEAST_SECONDS)
    return {
        "D": size, "B": batch, "T": steps, "seconds": medians(seconds),
        "deviation": deviation, "lengths_over_packed": ratio(seconds, "lengths", "packed"),
    }  # fmt: skip


def auto_over_best(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the largest ratio of all rows, and the geometric mean."""
    ratios = [row["auto_over_best"] for row in rows]
    return {"largest": max(ratios), "geometric_mean": math.exp(statistics.fmean(map(math.log, ratios)))}


def memory(rollout: Rollout, steps: int, size: int = 32, batch: int = 16) -> float:
    """Return the peak memory of a forward pass over the inputs, in floats per float of state; in a fresh process."""
    cell, inputs = GRU(size, size), torch.randn(batch, steps, size)
    return measure(torch.no_grad()(lambda: rollout(cell, inputs))).peak_bytes / (4 * size * batch * steps)
