"""`reroll bench estimator`: the estimated gradient against the true one and against theory; and which ε work.

relative error²    E‖ĝ − g‖² / ‖g‖²      theory: (P − 1)/N for ±1 noise
cosine             ĝᵀg / ‖ĝ‖‖g‖          theory: √(N / (N + P − 1))
ε window           slope of log spread(L⁺ − L⁻) against log ε: 1 where ε is neither lost in rounding nor too large
"""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from reroll.bench.cases import Case
from reroll.bench.harness import columns, publish
from reroll.data.batch import Batch
from reroll.data.task import sequence_losses
from reroll.grad import CentralDifference
from reroll.grad.base import trainable
from reroll.grad.probes import expected_relative_error
from reroll.keys import Key
from reroll.models import Recurrent

EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def run(rounds: int = 20, path: Path | None = None) -> dict[str, Any]:
    """Measure everything, errors as means over `rounds` draws of the noise; print the result, and write it as JSON."""
    model, batch = _problem()
    errors = [
        _error(model, batch, probes, kind, rounds)
        for kind in ("rademacher", "normal", "sparse")
        for probes in (16, 96, 512)
    ]
    weights = sum(p.numel() for p in model.parameters())
    return publish({"weights": weights, "errors": errors, "window": _window(model, batch)}, _report, path)


def _problem() -> tuple[Recurrent, Batch]:
    case = Case.lstm(32, 1, 16, 16, inputs=16, vocab=20)
    return case.model, case.batch


def _error(model: Recurrent, batch: Batch, probes: int, kind: str, draws: int) -> dict[str, Any]:
    named = trainable(model)
    loss = sequence_losses(model, batch)
    assert isinstance(loss, torch.Tensor)
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(loss.mean(), list(named.values()))]).double()
    errors, cosines, last = [], [], None
    for step in range(draws):
        last = CentralDifference(probes, 1e-2, kind)(model, sequence_losses, batch, Key(1).at(step))
        gradient: Any = last.gradient
        guess = torch.cat([gradient.tensor(name).flatten() for name in named]).double()
        errors.append(((guess - truth).square().sum() / truth.square().sum()).item())
        cosines.append(torch.nn.functional.cosine_similarity(guess, truth, 0).item())
    assert last is not None
    return {
        "noise": kind, "probes": probes, "error": sum(errors) / draws,
        "error_theory": expected_relative_error(len(truth), probes, kind), "cosine": sum(cosines) / draws,
        "cosine_theory": math.sqrt(probes / (probes + len(truth) - 1)), "spread": last.stats["spread"],
        "snr": last.stats["probe_snr"], "drift": last.stats.get("drift", 0),
    }  # fmt: skip


def _window(model: Recurrent, batch: Batch) -> list[dict[str, float]]:
    spreads = [CentralDifference(64, e)(model, sequence_losses, batch, Key(2)).stats["spread"] for e in EPSILONS]
    slopes = [math.nan] + [math.log(b / a) / math.log(f / e) if a > 0 and b > 0 else math.nan
              for (a, b), (e, f) in zip(pairwise(spreads), pairwise(EPSILONS))]  # fmt: skip
    return [{"epsilon": e, "spread": s, "slope": k} for e, s, k in zip(EPSILONS, spreads, slopes)]


def _report(result: dict[str, Any]) -> str:
    errors = [["noise", "N", "error²", "theory", "cosine", "theory", "spread", "SNR", "drift"]]
    for e in result["errors"]:
        errors.append([
            e["noise"], e["probes"], f"{e['error']:.1f}", f"{e['error_theory']:.1f}", f"{e['cosine']:.3f}",
            f"{e['cosine_theory']:.3f}", f"{e['spread']:.2e}", f"{e['snr']:.0f}", e["drift"],
        ])  # fmt: skip
    window = [["ε", "spread", "slope"]]
    window += [[f"{w['epsilon']:.0e}", f"{w['spread']:.2e}", f"{w['slope']:.2f}"] for w in result["window"]]
    head = f"{result['weights']:,} weights, ε = 0.01, against autograd"
    return f"{head}\n{columns(errors)}\n\n{columns(window)}\n(slope 1 where ε works)"
