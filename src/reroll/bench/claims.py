"""`reroll reproduce`: one table of claims, each with what was published and what we measured.

A claim is a row: what it says, where it is from, the published value, how to measure it here, how far off it may be.
The last measurement of each is kept in the user's cache; `measured.json` beside this file ships ours.
"""

from __future__ import annotations

import importlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.data.cache import cache_folder
from reroll.errors import UsageError, nearest
from reroll.train.machine import commit, hardware
from reroll.train.records import read_json

SHIPPED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Claim:
    """One claim.

    Args:
        name: what `reroll reproduce NAME` takes.
        says: the claim, in a line.
        source: the seed document and its place.
        published: the published value, as text.
        recipes: the recipes that are run.
        key: which number of the result decides.
        accept: whether a result bears the claim out.
        tolerance: that rule, as text.
        minutes: about how long it takes on two cores.
        measure: does it; at the published size if its argument is True, where that is not what is run anyway.
        report: the result as text.
        draw: the result on an empty matplotlib figure; None: there is no figure.
    """

    name: str
    says: str
    source: str
    published: str
    recipes: tuple[str, ...]
    key: str
    accept: Callable[[dict[str, Any]], bool]
    tolerance: str
    minutes: float
    measure: Callable[[bool], dict[str, Any]]
    report: Callable[[dict[str, Any]], str]
    draw: Callable[[dict[str, Any], Any], None] | None = None


def reproduce(name: str, full: bool = False) -> dict[str, Any]:
    """Measure a claim, keep the result, and return it with `status`, `commit` and `hardware`.

    Args:
        name: the claim.
        full: at the published size, which may need a GPU or hours.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in CLAIMS:
        raise UsageError(f'claim "{name}" is unknown.{nearest(name, CLAIMS)}')
    claim, began = CLAIMS[name], time.perf_counter()
    found = claim.measure(full)
    found |= {
        "status": "holds" if claim.accept(found) else "does not hold",
        "seconds": time.perf_counter() - began, "commit": commit(), "hardware": hardware(),
        "published": claim.published, "tolerance": claim.tolerance, "full": full,
    }  # fmt: skip
    kept = measured()
    kept[name] = {
        "value": found[claim.key],
        **{k: found[k] for k in ("status", "commit", "hardware", "seconds", "full")},
    }
    _own().write_text(json.dumps(kept, indent=2) + "\n")
    return found


def write(name: str, found: dict[str, Any], folder: Path) -> list[str]:
    """Write the table of a result, NAME.txt, and its figure, NAME.png; return where they are, a line each.

    Raises:
        UsageError: if the folder cannot be written.
    """
    from reroll.bench.experiments.show import figure

    claim = CLAIMS[name]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(f"{claim.says}\n{claim.report(found)}\npublished: {claim.published}\n")
    except OSError as error:
        raise UsageError(f"--to {folder} cannot be written ({error.strerror}); name another folder.") from None
    lines = [f"table: {folder / f'{name}.txt'}"]
    return lines if claim.draw is None else [*lines, figure(folder / f"{name}.png", claim.draw, found, claim.published)]


def measured() -> dict[str, dict[str, Any]]:
    """Return the last measurement of every claim: the user's own, else ours."""
    found = read_json(SHIPPED) | read_json(_own())
    return {name: m for name, m in found.items() if _is_whole(m)}


def _is_whole(m: Any) -> bool:
    """Whether this is a measurement; the user's cache may be damaged."""
    if not isinstance(m, dict) or not {"status", "commit", "hardware"} <= m.keys():
        return False
    return isinstance(m.get("value"), int | float)


def _own() -> Path:
    return cache_folder() / "reproduce.json"


def table() -> str:
    """Return a line for every claim: its name, its last measured value, what it says."""
    rows = [(claim.name, _last(claim, short=True), claim.says) for claim in CLAIMS.values()]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {says}" for name, value, says in rows)


def details(claim: Claim) -> str:
    """Return all about a claim, with its last measured value."""
    return "\n".join(
        [
            f"{claim.name}: {claim.says}",
            f"    source     {claim.source}",
            f"    published  {claim.published}",
            f"    measured   {claim.key} = {_last(claim)}",
            f"    holds if   {claim.tolerance}; about {claim.minutes:g} min on two cores; recipes: "
            + (", ".join(claim.recipes) or "none"),
        ]
    )


def _last(claim: Claim, short: bool = False) -> str:
    m = measured().get(claim.name)
    if m is None:
        return "not measured yet"
    size = ", --full" if m.get("full") else ""
    return f"{m['value']:.4g}, {m['status']}" + ("" if short else f" ({m['commit']}, {m['hardware']}{size})")


# ---- the claims


def _memory(full: bool) -> dict[str, Any]:
    from reroll.bench.memory import reproduce

    return reproduce()


def _memory_report(found: dict[str, Any]) -> str:
    from reroll.bench.memory import report

    return report(found)


def _memorise(full: bool) -> dict[str, Any]:
    import tempfile

    from reroll.recipes import RECIPES
    from reroll.train.loop import train
    from reroll.train.records import read_metrics

    found: dict[str, Any] = {"losses": []}
    for seed in range(3):
        with tempfile.TemporaryDirectory(prefix="reroll-reproduce-") as folder:
            train(RECIPES["memorise"]().replace(run={"seed": seed}), Path(folder, "run"))
            found["losses"].append([row["loss"] for row in read_metrics(Path(folder, "run"))])
    found["steps_by_seed"] = [
        next((step for step, loss in enumerate(losses) if loss < 0.1), math.inf) for losses in found["losses"]
    ]
    return found | {"steps": max(found["steps_by_seed"])}


def _memorise_report(found: dict[str, Any]) -> str:
    lines = [
        f"seed {seed}: " + "  ".join(f"{loss:.3g}" for loss in losses) for seed, losses in enumerate(found["losses"])
    ]
    return "\n".join([*lines, f"below 0.1 at steps {found['steps_by_seed']}"])


def _in(module: str, function: str) -> Callable[..., Any]:
    """A function of an experiment, imported when it is called."""
    return lambda *arguments: getattr(importlib.import_module(f"reroll.bench.experiments.{module}"), function)(
        *arguments
    )


ELK_PAPER = "arXiv:2407.19115 (seed 003)"

CLAIMS: dict[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim(
            "memorise",
            "CD-RGE memorises nine symbols in a few steps, without a backward pass",
            "the notes to arXiv:2505.17852 (seed 000 §2: 112.6 M weights, loss 7.54 → 0.095 in 4 steps; seed 001: "
            "6.9 B weights, 6 steps), here at 1.1 M weights",
            "4 … 6 steps at 112.6 M … 6.9 B weights",
            ("memorise",),
            "steps",
            lambda found: found["steps"] <= 20,
            "loss < 0.1 within 20 steps for each of three seeds; N = 96, η = ε = 0.1, momentum 0.9",
            0.5,
            _memorise,
            _memorise_report,
        ),
        Claim(
            "memory",
            "a CD-RGE step needs far less memory above the model than a BPTT step, the more so the longer the sequence",
            "a replication of arXiv:2505.17852 (seed 002, Memory Comparison: T = 32, batch 16, 113.6 against 30.1 MB)",
            "73.5 % less at T = 32",
            (),
            "overhead_reduction",
            lambda found: found["overhead_reduction"] >= 0.95,
            "≥ 0.95 at T = 1024; T = 32 beside it",
            2,
            _memory,
            _memory_report,
        ),
        Claim(
            "elk-fig8",
            "on chaotic Lorenz-96 a Kalman filter of variance 300 finds the trajectory, sooner than scaled DEER does",
            f"{ELK_PAPER} figure 8; counts by an independent implementation on one initial condition",
            "a figure without numbers; counted 152 (ELK), 249 (DEER scaled by 0.8), none (DEER), 931 (quasi-DEER)",
            (),
            "elk",
            _in("lorenz", "holds"),
            "mean over ten initial conditions: ELK within 0.7 … 1.4 × 152, scaled within 0.7 … 1.4 × 249, ELK first",
            1,
            _in("lorenz", "measure"),
            _in("lorenz", "report"),
            _in("lorenz", "draw"),
        ),
        Claim(
            "elk-fig7",
            "ELK's variance has a best value in between: less is slow, more explodes",
            f"{ELK_PAPER} figures 7 (a generator) and 8 (Lorenz-96)",
            "figures without numbers; the sweeps chose 1e6 (ELK), 1e2 (quasi-ELK) on its generator, 300, 10 on Lorenz",
            (),
            "best_elk",
            _in("sweep", "holds"),
            "on Lorenz-96 both best variances inside 0.3 … 1e6, ELK's within a decade of 300; on the generator trained "
            "here ELK's inside 1 … 3e8",
            3,
            _in("sweep", "measure"),
            _in("sweep", "report"),
            _in("sweep", "draw"),
        ),
        Claim(
            "elk-fig5",
            "DEER and quasi-DEER give the sequential trajectory to float32 rounding (GRU, D = 4, T = 10 000)",
            f"{ELK_PAPER} figure 5",
            "a figure without numbers: differences at the level of float32",
            (),
            "deviation",
            _in("agreement", "holds"),
            "largest deviation in float32 ≤ 16 ulp of 1 (1.9e-6) at a tenth of the default tolerance, all converged",
            0.5,
            _in("agreement", "measure"),
            _in("agreement", "report"),
            _in("agreement", "draw"),
        ),
        Claim(
            "predictability",
            "the Lyapunov exponent says how many iterations are needed: few below zero, about T above",
            "arXiv:2508.16817 figures 2 and 3, at D = 64, T = 300 (--full: D = 100, T = 1000)",
            "few iterations below g ≈ 1.2, about T above; two wells ≤ 35 at T = 10 000",
            (),
            "rank_correlation",
            _in("predictable", "holds"),
            "rank correlation of exponent and iterations ≥ 0.9; two wells ≤ 35 iterations",
            1,
            _in("predictable", "measure"),
            _in("predictable", "report"),
            _in("predictable", "draw"),
        ),
        Claim(
            "elk-fig4",
            "on a trained generator undamped methods explode; ELK stays finite and arrives sooner",
            f"{ELK_PAPER} figure 4, with a generator trained here, at T = 2000 (--full: 10 000)",
            "undamped methods unstable, ELK and quasi-ELK converge rapidly; the loop takes 96 ms, the best of them 221",
            (),
            "elk_iterations",
            _in("generator", "holds"),
            "on all of five sequences DEER and quasi-DEER go non-finite or fail, on none ELK (1e3 … 1e6), and the best "
            "ELK is within 0.1 in fewer iterations",
            2,
            _in("generator", "measure"),
            _in("generator", "report"),
            _in("generator", "draw"),
        ),
        Claim(
            "elk-fig3",
            "training by DEER and quasi-DEER is the training by backpropagation through the loop, step by step",
            f"{ELK_PAPER} figure 3: EigenWorms (prepare it by `reroll data`; else generated series of its shape)",
            "a figure without numbers: the training curves of the three agree (DEER's paper: 26 times faster on a GPU)",
            (),
            "loss_deviation",
            _in("worms", "holds"),
            "losses of 20 updates agree to 1e-3, and fall; every 64th step, 5 layers of 16 (--full: all steps, 32)",
            2,
            _in("worms", "measure"),
            _in("worms", "report"),
            _in("worms", "draw"),
        ),
        *(
            Claim(
                name,
                f"quasi-DEER needs far less memory than DEER, the more so the wider the state (GRU, batch {batch})",
                f"{ELK_PAPER} figure {name[-1]}, at sizes for two cores (--full: the published sizes, on a GPU)",
                "about a tenth of the memory; up to about 20 times as fast as the loop, on a V100",
                (),
                "memory_ratio",
                _in("scaling", "holds"),
                "DEER ÷ quasi-DEER ≥ 5 at the largest size; times are reported",
                4,
                _in("scaling", f"measure_{batch}"),
                _in("scaling", "report"),
                _in("scaling", "draw"),
            )
            for name, batch in (("elk-fig2", 16), ("elk-fig6", 1))
        ),
    )
}
"""Every claim. `reproduce --list` prints this table; a new claim is a new row."""
