"""A track: a task and a target that many compete for, in a file that does not change once it is open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from reroll.errors import UsageError, did_you_mean
from reroll.train import toml

ROOT = Path("records")


@dataclass(frozen=True)
class Track:
    """What a run must reach, and what it must not change.

    Args:
        path: the folder of the track.
        title: one line.
        opened: the date, since which nothing here has changed.
        command: what trains a run of its newest record.
        target: the largest mean of the held-out losses, after the last step.
        fingerprint: SHA-256 of the data, as a run records it; None: not compared, as of data made from the seed.
        valid_fingerprint: of held-out shards alone, whatever the number of training shards; None: not known yet.
        vocab: symbols of the data; None: any number.
        cores: of the processor; None: any.
        gpus: how many trained the run, of one kind, a process each; None: any number.
        p: the significance level.
        sigma: standard deviation of the loss over seeds; None: that of the submitted runs.
        sigma_runs: number of runs that `sigma` is from.
        fixed: values of the config, by dotted name, that every run must have.
        free: what may differ, in words.
        invalid: what makes a run invalid though no program sees it, in words.
        history: what was reached elsewhere, a line each.
    """

    path: Path
    title: str
    opened: str
    command: str
    target: float
    fingerprint: str | None = None
    valid_fingerprint: str | None = None
    vocab: int | None = None
    cores: int | None = None
    gpus: int | None = None
    p: float = 0.01
    sigma: float | None = None
    sigma_runs: int = 0
    fixed: Mapping[str, Any] = field(default_factory=dict)
    free: Sequence[str] = ()
    invalid: Sequence[str] = ()
    history: Sequence[str] = ()

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.name

    def p_value(self, losses: Sequence[float]) -> float:
        """Return the probability of a mean this small if the true mean were the target: a one-sided t-test.

            t = (target − mean) √n / σ,  with the degrees of freedom of the runs that σ is from

        Raises:
            UsageError: for a single run on a track without a spread of its own.
        """
        import numpy as np

        n = len(losses)
        if self.sigma is None and n < 2:
            raise UsageError(f"{self.name} has no spread of its own; submit 2 runs or more, of different seeds.")
        sigma = float(np.std(losses, ddof=1)) if self.sigma is None else self.sigma
        freedom = (n if self.sigma is None else self.sigma_runs) - 1
        distance = (self.target - float(np.mean(losses))) * math.sqrt(n)
        if sigma == 0:
            return 0.0 if distance > 0 else 1.0
        return float(statistics().t.sf(distance / sigma, freedom))


def statistics() -> Any:
    """Return scipy.stats.

    Raises:
        UsageError: if SciPy is not installed.
    """
    try:
        from scipy import stats
    except ImportError:
        raise UsageError("p-values need SciPy: pip install 'reroll[records]'.") from None
    return stats


def tracks(root: Path = ROOT) -> dict[str, Track]:
    """Return the tracks in a folder, by name.

    Raises:
        UsageError: if there is no such folder, or a file of a track is damaged.
    """
    if not root.is_dir():
        raise UsageError(f"root={root} is not a folder of tracks; run this in a clone of reroll, or pass another.")
    return {path.parent.name: _read(path) for path in sorted(root.glob("*/track.toml"))}


def find_track(name: str, root: Path = ROOT) -> Track:
    """Return a track by name, with dashes or underscores.

    Raises:
        UsageError: if there is none.
    """
    known = tracks(root)
    found = next((track for key, track in known.items() if key.replace("-", "_") == name.replace("-", "_")), None)
    if found is None:
        raise UsageError(f'track "{name}" is unknown in {root}.{did_you_mean(name, known)}')
    return found


def _read(path: Path) -> Track:
    table = toml.load(path)
    names = {f.name for f in fields(Track)} - {"path"}
    if unknown := sorted(table.keys() - names):
        raise UsageError(f"{path}: {unknown[0]} is not a field of a track.{did_you_mean(unknown[0], names)}")
    try:
        track = Track(path.parent, **table)
    except TypeError:
        missing = sorted({"title", "opened", "command", "target"} - table.keys())
        raise UsageError(f"{path} lacks {', '.join(missing)}.") from None
    if track.sigma is not None and (track.sigma <= 0 or track.sigma_runs < 2):
        raise UsageError(f"{path}: sigma={track.sigma} must be positive, of sigma_runs=2 runs or more.")
    return track
