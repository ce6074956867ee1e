"""`reroll bench zeroth`: what a step of CD-RGE costs beside the forward passes it cannot do without.

    dense    step ÷ 2N plain forwards, one LSTM of 512, batch 16 × 64, N = 96, fp32
    bf16     the same step evaluated in bf16 ÷ 2N plain fp32 forwards, and how its coefficients correlate with fp32's
    tiny     step ÷ 2N forwards of the step-by-step reference, LSTM of 240 in 12 heads, batch 16 × 20
    memory   peak of a step above plain inference, 112.6 M weights, tiles and fused update
    noise    perturbing a weight, and summing 128 probes onto it, against torch's seeded Bernoulli

A plain forward is the loss of the batch without a gradient, with all cores working on it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reroll.bench.timing import in_turn, ratio, spread
from reroll.cells import LSTM
from reroll.data.batch import Batch
from reroll.data.task import sequence_losses
from reroll.grad import CentralDifference, Seeded
from reroll.kernels.noise_axpy import Stream, noise_axpy
from reroll.kernels.threads import torch_threads
from reroll.keys import Key
from reroll.models import Recurrent
from reroll.optim import SGD, step
from reroll.rollout import Sequential
from reroll.train.machine import commit, hardware
from reroll.train.measure import measure

PROBES = 96
LARGE = {"hidden": 66_000, "heads": 220}
"""The paper's "large" LSTM: 112,606,100 weights with 100 symbols."""


def run(rounds: int = 5, path: Path | None = None) -> dict[str, Any]:
    """Measure everything, print it, and write it as JSON if a path is given."""
    dense, tiny = _dense(rounds), _tiny(rounds)
    found = {
        "step_over_forwards": {"dense": dense["fp32"], "tiny": tiny["step"], "bf16": dense["bf16"]},
        "memory_overhead_bytes": (memory := _memory())["overhead"],
        "noise": (noise := _noise(rounds)) and {k: noise[k] for k in ("perturb_speedup", "replay_speedup")},
        "hardware": hardware(), "commit": commit(), "torch": torch.__version__, "threads": torch.get_num_threads(),
        "details": {"dense": dense, "tiny": tiny, "memory": memory, "noise": noise},
    }  # fmt: skip
    print(_report(found))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n")
    return found


@dataclass(frozen=True)
class Case:
    """A model and a batch of random symbols."""

    model: Recurrent
    batch: Batch

    @classmethod
    def of(cls, hidden: int, heads: int, rows: int, time: int, vocab: int = 100, kernel: Any = "auto") -> Case:
        torch.manual_seed(0)
        cell = LSTM(100, hidden, heads=heads)
        model = Recurrent(cell=cell, vocab=vocab, rollout=Sequential(kernel=kernel))
        ids = torch.randint(vocab, (rows, time + 1), generator=torch.Generator().manual_seed(1))
        mask = torch.ones(rows, time, dtype=torch.bool)
        return cls(model, Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), mask))

    @torch.no_grad()
    def forward(self) -> float:
        losses = sequence_losses(self.model, self.batch)
        assert isinstance(losses, Tensor)
        return losses.mean().item()

    def forwards(self, count: int) -> None:
        for _ in range(count):
            self.forward()

    def step(self, probes: int = PROBES, epsilon: float = 0.01, **options: Any) -> Tensor:
        """A whole step: estimate and fused update (with a rate of nothing to speak of); returns the coefficients."""
        estimator = CentralDifference(probes, epsilon, **options)
        optimizer = SGD(self.model.parameters(), lr=1e-12)
        key = Key(0).at(0)
        result = step(self.model, sequence_losses, estimator, optimizer, self.batch, None, key, update="fused")
        assert isinstance(result.gradient, Seeded)
        return result.gradient.coefficients


def _dense(rounds: int) -> dict[str, Any]:
    case = Case.of(512, 1, 16, 64)
    high, low = case.step(), case.step(dtype=torch.bfloat16)
    seconds = in_turn(
        {
            "forwards": lambda: case.forwards(2 * PROBES),
            "fp32": case.step,
            "bf16": lambda: case.step(dtype=torch.bfloat16),
        },
        rounds,
    )
    return {
        "fp32": ratio(seconds, "fp32", "forwards"), "fp32_range": spread(seconds, "fp32", "forwards"),
        "bf16": ratio(seconds, "bf16", "forwards"), "bf16_range": spread(seconds, "bf16", "forwards"),
        "bf16_correlation": torch.corrcoef(torch.stack([high, low]))[0, 1].item(),
        "seconds": {name: sorted(times)[len(times) // 2] for name, times in seconds.items()},
    }  # fmt: skip


def _tiny(rounds: int) -> dict[str, Any]:
    case, eager = Case.of(240, 12, 16, 20), Case.of(240, 12, 16, 20, kernel="reference")
    seconds = in_turn(
        {
            "eager": lambda: eager.forwards(2 * PROBES),
            "fastest": lambda: case.forwards(2 * PROBES),
            "step": case.step,
        },
        rounds,
    )
    return {
        "step": ratio(seconds, "step", "eager"), "step_range": spread(seconds, "step", "eager"),
        "step_over_fastest": ratio(seconds, "step", "fastest"),
        "seconds": {name: sorted(times)[len(times) // 2] for name, times in seconds.items()},
    }  # fmt: skip


class Weigh:
    """Inference or a step of the large model; built at the first call, in the process that is measured."""

    def __init__(self, what: str):
        self.what = what
        self.case: Case | None = None

    def __call__(self) -> None:
        if self.case is None:
            self.case = Case.of(**LARGE, rows=1, time=10)
        if self.what == "inference":
            self.case.forward()
        else:
            self.case.step(probes=2, evaluate="tiles")


def _memory() -> dict[str, Any]:
    inference, step = (measure(Weigh(what)).peak_bytes for what in ("inference", "step"))
    weights = sum(p.numel() for p in _on_meta().parameters())
    return {
        "overhead": step - inference, "step": step, "inference": inference, "weights": weights,
        "bar": int(0.01 * 4 * weights) + (8 << 20),
    }  # fmt: skip


def _on_meta() -> Recurrent:
    with torch.device("meta"):
        return Recurrent(cell=LSTM(100, LARGE["hidden"], heads=LARGE["heads"]), vocab=100)


def _noise(rounds: int) -> dict[str, Any]:
    """One thread each: nanoseconds per weight, and per weight and probe."""
    size, probes = 1 << 20, 128
    p, stream, generator = torch.randn(size // 512, 512), Stream(Key(0), "w"), torch.Generator()
    alphas = [1e-3] * probes

    def bernoulli() -> None:
        generator.manual_seed(1)
        p.add_(torch.empty_like(p).bernoulli_(0.5, generator=generator).mul_(2).sub_(1), alpha=1e-9)

    with torch_threads(1):
        seconds = in_turn(
            {
                "bernoulli": bernoulli,
                "perturb": lambda: noise_axpy(p, stream, [3], [1e-9]),
                "replay": lambda: noise_axpy(p, stream, range(probes), alphas),
            },
            max(rounds, 5),
        )
    seconds["replay"] = [s / probes for s in seconds["replay"]]
    median = {name: 1e9 * sorted(times)[len(times) // 2] / size for name, times in seconds.items()}
    return {
        "perturb_speedup": ratio(seconds, "bernoulli", "perturb"),
        "replay_speedup": ratio(seconds, "bernoulli", "replay"),
        "nanoseconds_per_weight": median,
    }


def _report(found: dict[str, Any]) -> str:
    d, t = found["details"]["dense"], found["details"]["tiny"]
    m, n = found["details"]["memory"], found["details"]["noise"]
    ns = n["nanoseconds_per_weight"]
    rows = [
        ("dense, step ÷ 2N forwards", f"{d['fp32']:.3f}", "≤ 1.10", "{:.3f} … {:.3f}".format(*d["fp32_range"])),
        ("bf16, step ÷ 2N fp32 forwards", f"{d['bf16']:.3f}", "≤ 0.62", "{:.3f} … {:.3f}".format(*d["bf16_range"])),
        ("bf16, correlation with fp32", f"{d['bf16_correlation']:.5f}", "≥ 0.99", ""),
        ("tiny, step ÷ 2N eager forwards", f"{t['step']:.3f}", "≤ 0.40", f"{t['step_over_fastest']:.2f} of fastest"),
        ("memory over inference, 112.6 M", f"{m['overhead'] / 1e6:.1f} MB", f"≤ {m['bar'] / 1e6:.1f} MB",
         f"step {m['step'] / 1e6:.1f}, inference {m['inference'] / 1e6:.1f} MB"),
        ("noise, perturb a weight", f"{n['perturb_speedup']:.0f} ×", "≥ 8 ×", f"{ns['perturb']:.2f} ns"),
        ("noise, a probe onto a weight", f"{n['replay_speedup']:.0f} ×", "≥ 80 ×", f"{ns['replay']:.3f} ns"),
    ]  # fmt: skip
    lines = [f"{name:<34}{value:>10}  {bar:<10} {more}" for name, value, bar, more in rows]
    return "\n".join([*lines, f"{found['hardware']}, torch {found['torch']}, commit {found['commit']}"])
