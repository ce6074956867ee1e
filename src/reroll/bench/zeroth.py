"""`reroll bench zeroth`: what a step of CD-RGE costs, compared with the forward passes it consists of.

    dense    step ÷ 2N plain forwards, one LSTM of 512, batch 16 × 64, N = 96, fp32
    bf16     the same step evaluated in bf16 ÷ 2N plain fp32 forwards, and the correlation of its coefficients with fp32
    train    the same step in the loop of `reroll train`, by its own clock ÷ the step alone
    tiny     step ÷ 2N forwards of the step-by-step reference, LSTM of 240 in 12 heads, batch 16 × 20
    memory   peak of a step over inference, 112.6 M weights, tiles and fused update
    noise    perturbing a weight, and adding 128 probes to it, against torch's seeded Bernoulli

A plain forward is the loss of the batch without a gradient, on all cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reroll.bench.cases import Case
from reroll.bench.harness import Alternate, Prepared, in_turn, medians, publish, ratio, spread
from reroll.cells import LSTM
from reroll.data.batch import Batch
from reroll.data.task import Task
from reroll.grad import CentralDifference, Seeded
from reroll.kernels.noise_axpy import Stream, noise_axpy
from reroll.kernels.threads import torch_threads
from reroll.keys import Key
from reroll.models import Recurrent
from reroll.optim import SGD
from reroll.train.measure import measure
from reroll.train.session import Session

PROBES = 96
FULL, HALF = CentralDifference(PROBES, 0.01), CentralDifference(PROBES, 0.01, dtype=torch.bfloat16)
LARGE = (66_000, 220)
"""Features and heads of the paper's "large" LSTM: 112,606,100 weights with 100 symbols."""


def run(rounds: int = 5, path: Path | None = None) -> dict[str, Any]:
    """Measure everything, print it, and write it as JSON if a path is passed."""
    dense, trained, tiny, memory, noise = _dense(rounds), _trained(rounds), _tiny(rounds), _memory(), _noise(rounds)
    result = {
        "step_over_forwards": {"dense": dense["fp32"], "tiny": tiny["step"], "bf16": dense["bf16"]},
        "train_over_step": trained["train"],
        "memory_overhead_bytes": memory["overhead"],
        "noise": {k: noise[k] for k in ("perturb_speedup", "replay_speedup")},
        "details": {"dense": dense, "train": trained, "tiny": tiny, "memory": memory, "noise": noise},
    }
    return publish(result, _report, path)


def _dense_case() -> Case:
    return Case.lstm(512, 1, 16, 64)


def _coefficients(case: Case, estimator: CentralDifference) -> Tensor:
    gradient = case.step(estimator)
    assert isinstance(gradient, Seeded)
    return gradient.coefficients


def _dense(rounds: int) -> dict[str, Any]:
    case = _dense_case()
    both = torch.stack([_coefficients(case, FULL), _coefficients(case, HALF)])
    calls = {
        "forwards": lambda: case.forward(2 * PROBES),
        "fp32": case.call(FULL),
        "bf16": case.call(HALF),
    }
    seconds = in_turn(calls, rounds)
    return {
        "fp32": ratio(seconds, "fp32", "forwards"), "fp32_range": spread(seconds, "fp32", "forwards"),
        "bf16": ratio(seconds, "bf16", "forwards"), "bf16_range": spread(seconds, "bf16", "forwards"),
        "bf16_correlation": torch.corrcoef(both)[0, 1].item(), "seconds": medians(seconds),
    }  # fmt: skip


class _Repeated(Task):
    """A task with the same batch at every step."""

    def __init__(self, case: Case):
        self.repeated, self.vocab, self.outputs, self.splits = case.batch, case.model.vocab, case.model.outputs, ()

    def make(self, step: int, split: str, length: int | None, unit: int | None) -> Batch:
        return self.repeated


PAIRS = 24
"""Steps of a run that are timed alternately with bare ones."""


def _trained(rounds: int) -> dict[str, Any]:
    """Measure the loop as `reroll train` runs it, with journal, metrics and checkpoints; first steps warm up."""
    case = _dense_case()
    optimizer = SGD(case.model.parameters(), lr=1e-12)
    # The time of a step varies by a third on a shared machine: ten pairs cannot tell 1.02 from 1.04. Every tenth step
    # includes the costly diagnostics.
    steps = max(rounds, PAIRS) + 1
    session = Session.of(_Repeated(case), case.model, FULL, optimizer, steps=steps, checkpoint_every=2)
    session.config = session.config.replace(optim={"update": "fused"})  # as recipes with plain SGD are
    timer = Alternate(("train", "step"), case.call(FULL, optimizer))
    with tempfile.TemporaryDirectory(prefix="reroll-bench-") as folder:
        seconds = timer.train(session, Path(folder, "run"), slice(1, None))
    return {
        "train": ratio(seconds, "train", "step"), "train_range": spread(seconds, "train", "step"),
        "train_of_sums": sum(seconds["train"]) / sum(seconds["step"]), "seconds": medians(seconds),
    }  # fmt: skip


def _tiny(rounds: int) -> dict[str, Any]:
    case, eager = Case.lstm(240, 12, 16, 20), Case.lstm(240, 12, 16, 20, kernel="reference")
    calls = {
        "eager": lambda: eager.forward(2 * PROBES),
        "fastest": lambda: case.forward(2 * PROBES),
        "step": case.call(FULL),
    }
    seconds = in_turn(calls, rounds)
    return {
        "step": ratio(seconds, "step", "eager"), "step_range": spread(seconds, "step", "eager"),
        "step_over_fastest": ratio(seconds, "step", "fastest"), "seconds": medians(seconds),
    }  # fmt: skip


def _prepare_large(what: str) -> Callable[[], Any]:
    estimator = None if what == "inference" else CentralDifference(2, 0.01, evaluate="tiles")
    return Case.lstm(*LARGE, rows=1, time=10).call(estimator)


def _memory() -> dict[str, Any]:
    inference, step = (measure(Prepared(_prepare_large, what)).peak_bytes for what in ("inference", "step"))
    weights = _large_weights()
    return {
        "overhead": step - inference, "step": step, "inference": inference, "weights": weights,
        "bar": int(0.01 * 4 * weights) + (8 << 20),
    }  # fmt: skip


def _large_weights() -> int:
    hidden, heads = LARGE
    with torch.device("meta"):
        return sum(p.numel() for p in Recurrent(cell=LSTM(100, hidden, heads=heads), vocab=100).parameters())


def _noise(rounds: int) -> dict[str, Any]:
    """Measure noise on one thread: nanoseconds per weight, and per weight and probe."""
    size, probes = 1 << 20, 128
    p, stream, generator = torch.randn(size // 512, 512), Stream(Key(0), "w"), torch.Generator()
    alphas = [1e-3] * probes

    def bernoulli() -> None:
        generator.manual_seed(1)
        p.add_(torch.empty_like(p).bernoulli_(0.5, generator=generator).mul_(2).sub_(1), alpha=1e-9)

    calls = {
        "bernoulli": bernoulli,
        "perturb": lambda: noise_axpy(p, stream, [3], [1e-9]),
        "replay": lambda: noise_axpy(p, stream, range(probes), alphas),
    }
    with torch_threads(1):
        seconds = in_turn(calls, max(rounds, 5))
    seconds["replay"] = [s / probes for s in seconds["replay"]]
    return {
        "perturb_speedup": ratio(seconds, "bernoulli", "perturb"),
        "replay_speedup": ratio(seconds, "bernoulli", "replay"),
        "nanoseconds_per_weight": {name: 1e9 * s / size for name, s in medians(seconds).items()},
    }


def _report(result: dict[str, Any]) -> str:
    d, r, t, m, n = (result["details"][name] for name in ("dense", "train", "tiny", "memory", "noise"))
    ns, between = n["nanoseconds_per_weight"], "{:.3f} … {:.3f}".format
    rows = [
        ("dense, step ÷ 2N forwards", f"{d['fp32']:.3f}", "≤ 1.10", between(*d["fp32_range"])),
        ("bf16, step ÷ 2N fp32 forwards", f"{d['bf16']:.3f}", "≤ 0.62", between(*d["bf16_range"])),
        ("bf16, correlation with fp32", f"{d['bf16_correlation']:.5f}", "≥ 0.99", ""),
        ("reroll train's step ÷ step", f"{r['train']:.3f}", "≤ 1.02",
         f"{between(*r['train_range'])}; of the sums {r['train_of_sums']:.3f}"),
        ("tiny, step ÷ 2N eager forwards", f"{t['step']:.3f}", "≤ 0.40", f"{t['step_over_fastest']:.2f} of fastest"),
        ("memory over inference, 112.6 M", f"{m['overhead'] / 1e6:.1f} MB", f"≤ {m['bar'] / 1e6:.1f} MB",
         f"step {m['step'] / 1e6:.1f}, inference {m['inference'] / 1e6:.1f} MB"),
        ("noise, perturb a weight", f"{n['perturb_speedup']:.0f} ×", "≥ 8 ×", f"{ns['perturb']:.2f} ns"),
        ("noise, a probe onto a weight", f"{n['replay_speedup']:.0f} ×", "≥ 80 ×", f"{ns['replay']:.3f} ns"),
    ]  # fmt: skip
    return "\n".join(f"{name:<34}{value:>10}  {bar:<10} {more}" for name, value, bar, more in rows)
