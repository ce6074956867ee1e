"""`reroll reproduce`: a table of claims, each with the published value and the one measured here.

A claim is a row: a statement, its source, the published value, and the experiment that measures it. The last
measurement of each is stored in the user's cache; `measured.json`, next to this file, has ours.
"""

from __future__ import annotations

import importlib
import json
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.data.cache import cache_folder
from reroll.errors import UsageError, did_you_mean
from reroll.train.machine import commit, hardware
from reroll.train.records import read_json

SHIPPED = Path(__file__).with_name("measured.json")


@dataclass(frozen=True)
class Claim:
    """One claim.

    Args:
        name: the argument of `reroll reproduce`.
        module: the module of `reroll.bench.experiments` that measures it.
        key: the deciding number of the result.
        minutes: approximate time on two cores.
        says: the claim, in one line.
        source: the document, and the place in it.
        published: the published value, in words.
        tolerance: when the claim holds, in words.
        recipes: the recipes that are run.
        options: arguments of the module's `measure` besides `full`.
    """

    name: str
    module: str
    key: str
    minutes: float
    says: str
    source: str
    published: str
    tolerance: str
    recipes: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def experiment(self) -> Any:
        """The module, imported on first use."""
        return importlib.import_module(f"reroll.bench.experiments.{self.module}")


ELK_PAPER = "arXiv:2407.19115 (seed 003)"
ROWS = (
    Claim(
        "memorise", "memorise", "steps", 0.5,
        "CD-RGE memorises nine symbols in a few steps, without a backward pass",
        "notes on arXiv:2505.17852 (seed 000 §2: 112.6 M weights, loss 7.54 → 0.095 in 4 steps; seed 001: "
        "6.9 B weights, 6 steps), here at 1.1 M weights",
        "4 … 6 steps at 112.6 M … 6.9 B weights",
        "loss < 0.1 within 20 steps for each of three seeds; N = 96, η = ε = 0.1, momentum 0.9",
        recipes=("memorise",),
    ),
    Claim(
        "memory", "memory", "overhead_reduction", 2,
        "a CD-RGE step needs far less memory on top of the model than BPTT, ever less as sequences grow",
        "a replication of arXiv:2505.17852 (seed 002, Memory Comparison: T = 32, batch 16, 113.6 against 30.1 MB)",
        "73.5 % less at T = 32",
        "≥ 0.95 at T = 1024; T = 32 is reported too",
    ),
    Claim(
        "elk-fig8", "lorenz", "elk", 1,
        "on chaotic Lorenz-96, ELK with variance 300 finds the trajectory in fewer iterations than scaled DEER",
        f"{ELK_PAPER} figure 8; counts by an independent implementation on one initial condition",
        "a figure without numbers; counted 152 (ELK), 249 (DEER scaled by 0.8), none (DEER), 931 (quasi-DEER)",
        "mean over ten initial conditions: ELK within 0.7 … 1.4 × 152, scaled within 0.7 … 1.4 × 249, ELK first",
    ),
    Claim(
        "elk-fig7", "sweep", "best_elk", 3,
        "ELK has an optimal variance: a smaller one is slow, a larger one explodes",
        f"{ELK_PAPER} figures 7 (a generator) and 8 (Lorenz-96)",
        "figures without numbers; the sweeps chose 1e6 (ELK), 1e2 (quasi-ELK) on its generator, 300, 10 on Lorenz",
        "on Lorenz-96 both optima inside 0.3 … 1e6, ELK's within a decade of 300; on the generator trained here ELK's "
        "inside 1 … 3e8",
    ),
    Claim(
        "elk-fig5", "agreement", "deviation", 0.5,
        "DEER and quasi-DEER give the sequential trajectory to float32 rounding (GRU, D = 4, T = 10 000)",
        f"{ELK_PAPER} figure 5",
        "a figure without numbers: differences at the level of float32",
        "largest deviation in float32 ≤ 16 ulp of 1 (1.9e-6) at a tenth of the default tolerance, all converged",
    ),
    Claim(
        "predictability", "predictable", "rank_correlation", 1,
        "the Lyapunov exponent predicts the number of iterations: few below zero, about T above",
        "arXiv:2508.16817 figures 2 and 3, at D = 64, T = 300 (in full: D = 100, T = 1000)",
        "few iterations below g ≈ 1.2, about T above; two wells ≤ 35 at T = 10 000",
        "rank correlation of exponent and iterations ≥ 0.9; two wells ≤ 35 iterations",
    ),
    Claim(
        "elk-fig4", "generator", "elk_iterations", 2,
        "on a trained generator undamped methods explode; ELK stays finite and converges sooner",
        f"{ELK_PAPER} figure 4, with a generator trained here, at T = 2000 (in full: 10 000)",
        "undamped methods unstable, ELK and quasi-ELK converge rapidly; the loop takes 96 ms, the best of them 221",
        "on all of five sequences DEER and quasi-DEER go non-finite or fail, on none ELK (1e3 … 1e6), and the best "
        "ELK is within 0.1 in fewer iterations",
    ),
    Claim(
        "elk-fig3", "worms", "loss_deviation", 2,
        "training by DEER and quasi-DEER equals backpropagation through the sequential loop, step by step",
        f"{ELK_PAPER} figure 3: EigenWorms (prepare it by `reroll data`; else generated series of its shape)",
        "a figure without numbers: the training curves of the three agree (DEER's paper: 26 times faster on a GPU)",
        "losses of 20 updates agree to 1e-3, and fall; every 64th step, 5 layers of 16 (in full: all steps, 32)",
    ),
    *(
        Claim(
            name, "scaling", "memory_ratio", 4,
            f"quasi-DEER needs far less memory than DEER, ever less as the state widens (GRU, batch {batch})",
            f"{ELK_PAPER} figure {name[-1]}, at sizes for two cores (in full: the published sizes, on a GPU)",
            "about a tenth of the memory; up to about 20 times as fast as the loop, on a V100",
            "DEER ÷ quasi-DEER ≥ 5 at the largest size; times are reported",
            options=(("batch", batch),),
        )
        for name, batch in (("elk-fig2", 16), ("elk-fig6", 1))
    ),
)  # fmt: skip
CLAIMS = {claim.name: claim for claim in ROWS}
"""Every claim by name."""


def claim_of(name: str) -> Claim:
    """Return the claim of a name; raise `UsageError` if there is none."""
    if name not in CLAIMS:
        raise UsageError(f'claim "{name}" is unknown.{did_you_mean(name, CLAIMS)}')
    return CLAIMS[name]


def reproduce(name: str, full: bool = False) -> dict[str, Any]:
    """Measure a claim, store the result, and return it with `status`, `commit` and `hardware`.

    Args:
        name: the claim.
        full: at the published size, which may need a GPU or hours.

    Raises:
        UsageError: for an unknown name.
    """
    claim, start = claim_of(name), time.perf_counter()
    result = claim.experiment.measure(full, **dict(claim.options))
    about = {
        "status": "holds" if claim.experiment.holds(result) else "does not hold", "commit": commit(),
        "hardware": hardware(), "seconds": time.perf_counter() - start, "full": full,
    }  # fmt: skip
    _cache().write_text(json.dumps(measured() | {name: {"value": result[claim.key], **about}}, indent=2) + "\n")
    return result | about | {"published": claim.published, "tolerance": claim.tolerance}


def write(name: str, result: dict[str, Any], folder: Path) -> list[str]:
    """Write the table of a result, NAME.txt, and its figure, NAME.png; return their paths, one line each.

    Raises:
        UsageError: if the folder cannot be written.
    """
    claim, table = CLAIMS[name], folder / f"{name}.txt"
    report = claim.experiment.report(result)
    with writing(folder):
        table.write_text(f"{claim.says}\n{report}\npublished: {claim.published}\n")
    figure = [_figure(claim, result, folder / f"{name}.png")] if hasattr(claim.experiment, "draw") else []
    return [f"table: {table}", *figure]


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make the folder of the results; `UsageError` if it cannot be made, or written to inside."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UsageError(f"folder={folder} cannot be written ({error.strerror}); choose another folder.") from None


def _figure(claim: Claim, result: dict[str, Any], path: Path) -> str:
    """Draw a result; return its path, or what is missing to draw it, in a sentence."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return "no figure: matplotlib is not installed (pip install 'reroll[plot]')."
    figure = FigureCanvasAgg(Figure(figsize=(7, 4.5), layout="constrained")).figure
    claim.experiment.draw(result, figure)
    figure.supxlabel(textwrap.fill(f"published: {claim.published}", 125), fontsize=7, color="0.35")
    figure.savefig(path, dpi=150)
    return f"figure: {path}"


def measured() -> dict[str, dict[str, Any]]:
    """Return the last measurement of every claim: the user's own, else ours; damaged entries are dropped."""
    return {
        name: m
        for name, m in (read_json(SHIPPED) | read_json(_cache())).items()
        if isinstance(m, dict)
        and {"status", "commit", "hardware"} <= m.keys()
        and isinstance(m.get("value"), float | int)
    }


def _cache() -> Path:
    return cache_folder() / "reproduce.json"


def rows() -> list[tuple[str, str, str]]:
    """Return the name, the last measured value and the statement of every claim."""
    return [(claim.name, _last(claim), claim.says) for claim in CLAIMS.values()]


def _last(claim: Claim) -> str:
    m = measured().get(claim.name)
    return "not measured yet" if m is None else f"{m['value']:.4g}, {m['status']}"


def details(claim: Claim) -> str:
    """Return the details of a claim, with its last measured value."""
    m = measured().get(claim.name)
    where = "" if m is None else f" ({m['commit']}, {m['hardware']}{', in full' if m.get('full') else ''})"
    return "\n".join(
        [
            f"{claim.name}: {claim.says}",
            f"    source     {claim.source}",
            f"    published  {claim.published}",
            f"    measured   {claim.key} = {_last(claim)}{where}",
            f"    holds if   {claim.tolerance}",
            f"    takes      about {claim.minutes:g} min on two cores; recipes: {', '.join(claim.recipes) or 'none'}",
        ]
    )
