"""Cut a step into units, and put their results together again.

Probes are cut by `chunk`, the batch by `micro_batch`; or the probes share the batch out and every group of them sees
its own sequences ("split").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.grad.evaluate.probing import Result, Unit, batch_rows, batch_size


class BranchStates(list[Any]):
    """The carried states of all branches of a step, L⁺ of every probe and then L⁻; `Batch.state` for NRES."""


def cut(
    batch: Any, probes: int, chunk: int, *, split: bool = False, micro_batch: int | None = None, states: Any = None
) -> list[Unit]:
    """Return the units of a step.

    Args:
        batch: the whole batch.
        probes: N.
        chunk: probes of a unit.
        split: give every group of probes its own sequences.
        micro_batch: most sequences of a unit.
        states: the states of branches, where every branch carries its own.
    """
    size = batch_size(batch)
    shares = _shares(size, probes) if split else [(range(probes), 0, size, False)]
    units = []
    for group, begin, end, single in shares:
        for row in _pieces(begin, end, micro_batch):
            part = batch if row is None or row == (0, size) else batch_rows(batch, *row)
            for first in range(group.start, group.stop, chunk):
                some = range(first, min(first + chunk, group.stop))
                units.append(Unit(some, part, _states_of(states, some, probes), single))
    return units


def parts(batch: Any, micro_batch: int | None) -> list[Any]:
    """Return the batch in parts of at most `micro_batch` sequences."""
    return [unit.batch for unit in cut(batch, 1, 1, micro_batch=micro_batch)]


def gather(units: list[Unit], results: list[Result], probes: int) -> tuple[Tensor, BranchStates]:
    """Put the losses of all units into one [sides, N]; parts of the batch count by their sequences."""
    sides = results[0].losses.shape[0]
    dtype = torch.float64 if results[0].losses.dtype == torch.float64 else torch.float32
    total = torch.zeros(sides, probes, dtype=torch.float64)
    weight = torch.zeros(probes, dtype=torch.float64)
    states: list[Any] = [None] * (sides * probes)
    for unit, result in zip(units, results):
        rows, some = batch_size(unit.batch) or 1, slice(unit.probes.start, unit.probes.stop)
        # Losses travel as fp32, in unit order, however many workers or ranks computed them.
        total[:, some] += result.losses.to(dtype).cpu().double() * rows
        weight[some] += rows
        for index, state in enumerate(result.states):
            side, i = divmod(index, len(unit.probes))
            states[side * probes + unit.probes.start + i] = state
    return (total / weight).to(dtype), BranchStates(states)


def _shares(size: int | None, probes: int) -> list[tuple[range, int | None, int | None, bool]]:
    """Give every group of probes its own sequences: as many groups as there are probes or sequences."""
    if size is None:
        raise UsageError('batch="split" needs a batch that can be cut by sequences; this one has no first axis.')
    groups = min(probes, size)
    shares = []
    for g in range(groups):
        begin, end = size * g // groups, size * (g + 1) // groups
        some = range(probes * g // groups, probes * (g + 1) // groups)
        shares.append((some, begin, end, end - begin == 1 and size > 1))
    return shares


def _pieces(begin: int | None, end: int | None, most: int | None) -> list[tuple[int, int] | None]:
    if begin is None or end is None:
        return [None]
    step = most or max(end - begin, 1)
    return [(first, min(first + step, end)) for first in range(begin, end, step)] or [(begin, end)]


def _states_of(states: Any, probes: range, total: int) -> list[Any] | None:
    """The states of a unit's branches: its part of `BranchStates`, or the same start for all."""
    if states is None:
        return None
    if not isinstance(states, BranchStates):
        return [states] * (2 * len(probes))
    return [states[side * total + k] for side in range(len(states) // total) for k in probes]
