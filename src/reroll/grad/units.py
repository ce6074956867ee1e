"""Units, the work items of threads and ranks: how a step is cut into them, evaluated, and put together again.

A unit is a run of consecutive probes, both signs together, on a fixed part of the batch. Probes are cut by `chunk`, the
batch by `micro_batch`; or the batch is divided among groups of probes, each with its own sequences ("split").
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reroll.errors import UsageError
from reroll.kernels.threads import pool, torch_threads


class Unit(NamedTuple):
    """Consecutive probes on a part of the batch.

    Args:
        probes: indices of the probes.
        batch: the part of the batch they see.
        states: one carried state per branch, [(side, probe)], sides outermost; None: the batch's own.
        single: True if the part is a single sequence of several, so that the loss must come per sequence.
    """

    probes: range
    batch: Any
    states: list[Any] | None = None
    single: bool = False


class Result(NamedTuple):
    """Losses [sides, probes of the unit], and the state after each branch, in the order of `Unit.states`."""

    losses: Tensor
    states: list[Any]


class BranchStates(list[Any]):
    """The carried states of all branches of a step, L⁺ of every probe and then L⁻; `Batch.state` for NRES."""


# ---- executors


Execute = Callable[[Any, Sequence[Unit]], list[Result]]
"""(evaluator, units) → results in the order of the units. All that follows is a function of the results."""
Distribute = Callable[[Execute, Any, Sequence[Unit]], list[Result]]
"""(executor of this process, evaluator, units) → the same results, some of which other processes computed."""


def threads(workers: int, each: int) -> Execute:
    """Return the executor of this process: `workers` units at a time, with `each` threads of torch per unit."""

    def execute(evaluator: Any, units: Sequence[Unit]) -> list[Result]:
        precision = [(d, torch.get_autocast_dtype(d)) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)]

        def one(unit: Unit) -> Result:
            with torch.no_grad(), ExitStack() as stack:
                for device, dtype in precision:
                    # Autocast as the calling thread does, without its cache: cast weights are those of one branch.
                    stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
                return evaluator.losses(unit)

        if workers > 1:
            # Each unit runs in a copy of this context, so that a forced implementation applies in the workers too.
            shared = pool(workers, each)
            futures = [shared.submit(contextvars.copy_context().run, one, unit) for unit in units]
            return [future.result() for future in futures]
        with torch_threads(each):
            return [one(unit) for unit in units]

    return execute


# ---- cutting a step into units, and gathering their losses


def cut(
    batch: Any, probes: int, chunk: int, *, split: bool = False, micro_batch: int | None = None, states: Any = None
) -> list[Unit]:
    """Return the units of a step with `probes` probes; `states` are the branches' own, where each carries one."""
    size = batch_size(batch)
    shares: list[Any] = _shares(size, probes) if split else [(range(probes), 0, size)]
    units = []
    for group, begin, end in shares:
        single = split and end == begin + 1 and size != 1
        for rows in _ranges(begin, end, micro_batch):
            part = batch if rows is None or rows == (0, size) else batch_rows(batch, *rows)
            for first in range(group.start, group.stop, chunk):
                some = range(first, min(first + chunk, group.stop))
                units.append(Unit(some, part, _states_of(states, some, probes), single))
    return units


def gather(units: list[Unit], results: list[Result], probes: int) -> tuple[Tensor, BranchStates]:
    """Gather the losses of all units, [sides, N], and the states; parts of the batch weigh as their sequences."""
    sides = results[0].losses.shape[0]
    dtype = torch.float64 if results[0].losses.dtype == torch.float64 else torch.float32
    total = torch.zeros(sides, probes, dtype=torch.float64)
    weight = torch.zeros(probes, dtype=torch.float64)
    states: list[Any] = [None] * (sides * probes)
    for unit, result in zip(units, results):
        rows, some = batch_size(unit.batch) or 1, slice(unit.probes.start, unit.probes.stop)
        # Rounded to fp32 and added in unit order, so that workers and ranks do not change the bits.
        total[:, some] += result.losses.to(dtype).cpu().double() * rows
        weight[some] += rows
        for index, state in enumerate(result.states):
            side, i = divmod(index, len(unit.probes))
            states[side * probes + unit.probes.start + i] = state
    return (total / weight).to(dtype), BranchStates(states)


def _shares(size: int | None, probes: int) -> list[tuple[range, int, int]]:
    """Every group of probes with its sequences; as many groups as there are probes or sequences."""
    if size is None:
        raise UsageError('batch="split" needs a batch that can be split by sequences; this one has no first axis.')
    count = min(probes, size)
    edges = [(probes * g // count, size * g // count) for g in range(count + 1)]
    return [(range(p, q), begin, end) for (p, begin), (q, end) in pairwise(edges)]


def _ranges(begin: int, end: int | None, most: int | None) -> list[tuple[int, int] | None]:
    """Ranges of at most `most` sequences; [None]: the batch cannot be cut."""
    if end is None:
        return [None]
    step = most or max(end - begin, 1)
    return [(first, min(first + step, end)) for first in range(begin, end, step)] or [(begin, end)]


def _states_of(states: Any, probes: range, total: int) -> list[Any] | None:
    """The states of a unit's branches: its part of `BranchStates`, or the same state for all."""
    if states is None:
        return None
    if not isinstance(states, BranchStates):
        return [states] * (2 * len(probes))
    return [states[side * total + k] for side in range(len(states) // total) for k in probes]


# ---- batches of any kind


def batch_size(batch: Any) -> int | None:
    """Return the number of sequences of a batch: its `len` if it has `rows`, else that of its first tensor."""
    if hasattr(batch, "rows"):
        return len(batch)
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list):
        return next((size for size in map(batch_size, batch) if size is not None), None)
    return None


def batch_rows(batch: Any, begin: int, end: int) -> Any:
    """Return some of the sequences of a batch: its own `rows`, or the rows of every tensor in it."""
    cut_part = lambda part: batch_rows(part, begin, end)
    if hasattr(batch, "rows"):
        return batch.rows(begin, end)
    if isinstance(batch, Tensor):
        return batch[begin:end] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {name: cut_part(value) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(*map(cut_part, batch)) if hasattr(batch, "_fields") else type(batch)(map(cut_part, batch))
    return batch


def first_tensor(batch: Any) -> Tensor | None:
    """Return the first tensor of a batch: of its inputs, if it has them."""
    first = getattr(batch, "inputs", batch)
    while isinstance(first, tuple | list | dict) and first:
        first = next(iter(first.values())) if isinstance(first, dict) else first[0]
    return first if isinstance(first, Tensor) else None


def with_state(batch: Any, state: Any) -> Any:
    """Return the batch with this carried state; None leaves it as it is."""
    return batch if state is None else replace(batch, state=state)
