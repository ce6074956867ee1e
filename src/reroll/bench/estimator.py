"""`reroll bench estimator`: the estimated gradient against the true one, beside what theory says, and the ε that work.

relative error²    E‖ĝ − g‖² / ‖g‖²      theory: (P − 1)/N for ±1 noise
cosine             ĝᵀg / ‖ĝ‖‖g‖          theory: √(N / (N + P − 1))
ε window           slope of the spread of L⁺ − L⁻ against ε: 1 where ε is neither lost in rounding nor too far
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch

from reroll.data.batch import Batch
from reroll.data.task import sequence_losses
from reroll.grad import CentralDifference
from reroll.grad.base import trainable
from reroll.grad.probes import expected_relative_error
from reroll.keys import Key
from reroll.models import Recurrent
from reroll.train.machine import commit, hardware

EPSILONS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


def run(draws: int = 20) -> dict[str, Any]:
    """Measure and print; returns everything printed."""
    model, batch = _problem()
    weights = sum(p.numel() for p in model.parameters())
    found: dict[str, Any] = {"weights": weights, "hardware": hardware(), "commit": commit()}
    found["errors"] = [
        _error(model, batch, probes, kind, draws)
        for kind in ("rademacher", "normal", "sparse")
        for probes in (16, 96, 512)
    ]
    found["window"] = _window(model, batch)
    print(_report(found))
    return found


def _problem() -> tuple[Recurrent, Batch]:
    from reroll.cells import LSTM

    torch.manual_seed(0)
    model = Recurrent(cell=LSTM(16, 32), vocab=20)
    ids = torch.randint(20, (16, 17))
    return model, Batch(ids[:, :-1], ids[:, 1:], torch.ones(16, 16, dtype=torch.bool))


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


def _report(found: dict[str, Any]) -> str:
    lines = [
        f"{found['weights']:,} weights, ε = 0.01, against autograd",
        f"{'noise':<12}{'N':>5}{'error²':>10}{'theory':>10}{'cosine':>9}{'theory':>9}{'spread':>11}{'SNR':>9}{'drift':>7}",
    ]
    for e in found["errors"]:
        lines.append(
            f"{e['noise']:<12}{e['probes']:>5}{e['error']:>10.1f}{e['error_theory']:>10.1f}{e['cosine']:>9.3f}"
            f"{e['cosine_theory']:>9.3f}{e['spread']:>11.2e}{e['snr']:>9.0f}{e['drift']:>7}"
        )
    lines += ["", f"{'ε':>8}{'spread':>12}{'slope':>8}   (1 where ε works)"]
    lines += [f"{w['epsilon']:>8.0e}{w['spread']:>12.2e}{w['slope']:>8.2f}" for w in found["window"]]
    return "\n".join([*lines, f"{found['hardware']}, commit {found['commit']}"])
