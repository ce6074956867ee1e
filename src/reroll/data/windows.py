"""Windows of series that lie one after another, and which of them are held out.

Steps are counted through all series; everything here depends on lengths alone, not on what the series are of.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from reroll.kernels.philox import random_integers
from reroll.keys import Key

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


class Windows(NamedTuple):
    """Ranges of the steps of all series together: the series [W], the first step [W], and the end of the series [W]."""

    series: IntArray
    begin: IntArray
    end: IntArray


def cut(lengths: IntArray, length: int, shift: int) -> Windows:
    """Return windows of `length` steps that cover all series; the last window of a series may be shorter.

    With shift=1 the target of a step is the next step, so that the last step starts no window.

    Example:
        >>> windows = cut(np.array([5, 1, 3]), length=2, shift=1)
        >>> windows.series.tolist(), windows.begin.tolist(), windows.end.tolist()
        ([0, 0, 2], [0, 2, 6], [5, 5, 9])
    """
    ends = np.cumsum(lengths)
    counts = -(-np.maximum(lengths - shift, 0) // length)
    series = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(series)) - np.repeat(np.cumsum(counts) - counts, counts)
    return Windows(series, (ends - lengths)[series] + within * length, ends[series])


def hold_out(
    windows: Windows, lengths: IntArray, chosen: BoolArray | None = None
) -> tuple[dict[str, Windows], BoolArray]:
    """Return the windows of "train" and "valid", and which steps of all belong to training.

    Of several series a tenth is held out, whole: those whose index has a small hash, so that neither the seed nor the
    order of the classes matters. Of one series it is the last tenth of its windows.

    Args:
        windows, lengths: of all series, as `cut` makes and takes them.
        chosen: the series to hold out, if there are several, [N]; None: as said.

    Example:
        >>> lengths = np.array([6])
        >>> parts, training = hold_out(cut(lengths, length=2, shift=0), lengths)
        >>> parts["valid"].begin.tolist(), training.tolist()
        ([4], [True, True, True, True, False, False])
    """
    series, count = np.unique(windows.series), len(windows.begin)
    if len(series) == 1:
        held_out = np.arange(count) >= count - max(count // 10, 1)
        training = np.arange(int(lengths.sum())) < windows.begin[held_out][0]
    else:
        if chosen is None:
            draws = random_integers(Key(0).at("data").at("arrays").at("held out"), len(lengths), 2**31)
            order = series[np.argsort(draws[series], kind="stable")]
            chosen = np.isin(np.arange(len(lengths)), order[: max(len(series) // 10, 1)])
        held_out, training = chosen[windows.series], np.repeat(~chosen, lengths)
    parts = {"train": ~held_out, "valid": held_out}
    return {split: Windows(*(part[which] for part in windows)) for split, which in parts.items()}, training
