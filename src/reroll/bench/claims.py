"""`reroll reproduce`: one table of claims, each with what was published and what we measured.

A claim is a row: what it says, where it is from, the published value, how to measure it here, how far off it may be.
The last measurement of each is kept in the user's cache; `measured.json` beside this file ships ours.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.data.cache import cache_folder
from reroll.errors import UsageError, nearest
from reroll.train.run import commit, hardware, read_json

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
        accept: whether a value of it bears the claim out.
        tolerance: that rule, as text.
        minutes: about how long it takes on two cores.
        measure: does it.
        report: the result as text.
    """

    name: str
    says: str
    source: str
    published: str
    recipes: tuple[str, ...]
    key: str
    accept: Callable[[float], bool]
    tolerance: str
    minutes: float
    measure: Callable[[], dict[str, Any]]
    report: Callable[[dict[str, Any]], str]


def reproduce(name: str) -> dict[str, Any]:
    """Measure a claim, keep the result, and return it with `status`, `commit` and `hardware`.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in CLAIMS:
        raise UsageError(f'claim "{name}" is unknown.{nearest(name, CLAIMS)}')
    claim, began = CLAIMS[name], time.perf_counter()
    found = claim.measure()
    found |= {
        "status": "holds" if claim.accept(found[claim.key]) else "does not hold",
        "seconds": time.perf_counter() - began, "commit": commit(), "hardware": hardware(),
        "published": claim.published, "tolerance": claim.tolerance,
    }  # fmt: skip
    kept = measured()
    kept[name] = {"value": found[claim.key], **{k: found[k] for k in ("status", "commit", "hardware", "seconds")}}
    _own().write_text(json.dumps(kept, indent=2) + "\n")
    return found


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
    """Return all claims with their last measured values."""
    last, lines = measured(), []
    for claim in CLAIMS.values():
        m = last.get(claim.name)
        value = "not measured yet" if m is None else f"{m['value']:.4g}, {m['status']} ({m['commit']}, {m['hardware']})"
        lines += [
            f"{claim.name}: {claim.says}",
            f"    source     {claim.source}",
            f"    published  {claim.published}",
            f"    measured   {claim.key} = {value}",
            f"    holds if   {claim.tolerance}; about {claim.minutes:g} min on two cores; recipes: "
            + (", ".join(claim.recipes) or "none"),
        ]
    return "\n".join(lines)


# ---- the claims


def _memory() -> dict[str, Any]:
    from reroll.bench.memory import reproduce

    return reproduce()


def _memory_report(found: dict[str, Any]) -> str:
    from reroll.bench.memory import report

    return report(found)


def _memorise() -> dict[str, Any]:
    import tempfile

    from reroll.recipes import RECIPES
    from reroll.train.loop import train
    from reroll.train.run import read_metrics

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
            lambda steps: steps <= 20,
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
            lambda reduction: reduction >= 0.95,
            "≥ 0.95 at T = 1024; T = 32 beside it",
            2,
            _memory,
            _memory_report,
        ),
    )
}
"""Every claim. `reproduce --list` prints this table; a new claim is a new row."""
