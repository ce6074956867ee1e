"""Sequences of different lengths in one padded batch: padding has no effect on any result.

    trajectory = rollout(cell, inputs, lengths=lengths)      states after the end are zero, as torch pads them;
                                                             final is the state after the last step of each sequence

Padding is never read, whatever it holds. There are three ways, all exact:

    dropping        loops and kernels for whole sequences: run to the end of the shortest sequence, drop it, go on
    packing         programs: sequences are concatenated with a reset between them, so few steps are wasted
    in_place        solvers: at each padded step the sequence restarts with its first input, a step already solved
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reroll.cells.base import Cell, State
from reroll.kernels.lengths import steps_of
from reroll.rollout.base import Trajectory, check, check_reset, start
from reroll.trees import combine_states, map_state

Run = Callable[[Tensor, State, Tensor | None], tuple[State, State]]
"""(inputs, state, reset) → (a result of every step, the state after the last)."""
Solve = Callable[[Cell, Tensor, State | None, Tensor | None], Trajectory | None]


class Padded(NamedTuple):
    """A trajectory whose states at padded steps are arbitrary; which steps are not padding, None: all."""

    trajectory: Trajectory
    valid: Tensor | None

    def zeroed(self, tree: Any) -> Any:
        """Return results of every step, [B, T, …], with zeros at padded ones."""
        if self.valid is None:
            return tree
        valid = self.valid
        return map_state(tree, lambda t: torch.where(valid.view(*valid.shape, *[1] * (t.dim() - 2)), t, 0))


def filled(inputs: Tensor, lengths: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs padded with the first input of each sequence, a mask of valid steps [B, T], and the lengths."""
    lengths, valid = steps_of(lengths, inputs)
    if not bool(valid.any()):
        return torch.zeros_like(inputs), valid, lengths
    rows = torch.arange(len(lengths), device=inputs.device)
    first = inputs[torch.where(lengths > 0, rows, lengths.argmax()), 0].detach()  # an empty one takes another's
    return torch.where(valid.unsqueeze(-1), inputs, first.unsqueeze(1)), valid, lengths


def in_place(
    solve: Solve, cell: Cell, inputs: Tensor, state: State | None, reset: Tensor | None, lengths: Any
) -> Padded | None:
    """Solve with a reset at every padded step; None where `solve` returns None."""
    if lengths is None:
        trajectory = solve(cell, inputs, state, reset)
        return None if trajectory is None else Padded(trajectory, None)
    check(cell, inputs)
    check_reset(reset, inputs)
    inputs, valid, lengths = filled(inputs, lengths)
    trajectory = solve(cell, inputs, state, ~valid if reset is None else ~valid | reset)
    if trajectory is None:
        return None
    return Padded(trajectory._replace(final=_last(trajectory.states, cell, inputs, state, lengths)), valid)


def packing(
    solve: Solve, cell: Cell, inputs: Tensor, state: State | None, reset: Tensor | None, lengths: Any
) -> Padded | None:
    """Solve with sequences concatenated into as few lanes as hold them; None where `solve` returns None.

    A reset goes to the cell's initial state, so sequences with another `state` get a lane each, and so do those of a
    cell whose projection may look beyond a step.
    """
    if lengths is None or state is not None or not cell.projects_stepwise:
        return in_place(solve, cell, inputs, state, reset, lengths)
    check(cell, inputs)
    check_reset(reset, inputs)
    lengths, valid = steps_of(lengths, inputs)
    batch, time = inputs.shape[:2]
    lanes, begins = _lanes(lengths.tolist())
    if not lanes:
        return None
    width = int(lengths.max())
    steps = torch.arange(width)
    # Where each step of each lane comes from; the rest of a lane repeats its first sequence's first step.
    source = torch.stack([torch.full((width,), lane[0] * time) for lane in lanes])
    cut = torch.ones(len(lanes), width, dtype=torch.bool)
    target = torch.zeros(batch, time, dtype=torch.int64)
    for lane, members in enumerate(lanes):
        for b in members:
            begin, length = begins[b], int(lengths[b])
            source[lane, begin : begin + length] = b * time + steps[:length]
            cut[lane, begin + 1 : begin + length] = False
            target[b] = lane * width + begin
            target[b, :length] += steps[:length]
    source, cut, target = (t.to(inputs.device) for t in (source, cut, target))
    if reset is not None:
        cut |= reset.flatten()[source]
    trajectory = solve(cell, _rows(inputs, source), None, cut)
    if trajectory is None:
        return None
    states = map_state(trajectory.states, lambda t: _rows(t, target))
    lane_of = target[:, 0] // width
    trajectory = trajectory._replace(
        states=states, final=_last(states, cell, inputs, None, lengths), iterations=trajectory.iterations[lane_of],
        residual=trajectory.residual[lane_of], converged=trajectory.converged[lane_of],
    )  # fmt: skip
    return Padded(trajectory, valid)


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Return rows of [B, T, …] by their flat indices, in the shape of `index`."""
    return tensor.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)


def _lanes(lengths: list[int]) -> tuple[list[list[int]], list[int]]:
    """Assign sequences to lanes, the longest first, each to the first with room; return lanes and their offsets."""
    width, lanes, used, begins = max(lengths, default=0), [], [], [0] * len(lengths)
    for b in sorted(range(len(lengths)), key=lambda b: -lengths[b]):
        if lengths[b] == 0:
            break
        lane = next((i for i, n in enumerate(used) if n + lengths[b] <= width), len(lanes))
        if lane == len(lanes):
            lanes.append([])
            used.append(0)
        lanes[lane].append(b)
        begins[b] = used[lane]
        used[lane] += lengths[b]
    return lanes, begins


def dropping(run: Run, inputs: Tensor, state: State, reset: Tensor | None, lengths: Any) -> tuple[State, State]:
    """Run from one distinct length to the next over the sequences that are that long, sorted by length.

    Returns:
        The results of `run` at every step, zero at padding, and the state after the last step of each sequence.
    """
    lengths, _ = steps_of(lengths, inputs)
    batch, time = inputs.shape[:2]
    order = lengths.argsort(descending=True)
    back, lengths = order.argsort(), lengths[order]
    inputs, state = inputs[order], map_state(state, lambda t: t[order])
    reset = None if reset is None else reset[order]
    parts, ended, begin = [], [], 0
    for end in sorted({*lengths.tolist()} - {0}) or [0]:
        left = int((lengths >= end).sum())
        ended.append(map_state(state, lambda t, n=left: t[n:]))
        part, state = run(
            inputs[:left, begin:end],
            map_state(state, lambda t, n=left: t[:n]),
            None if reset is None else reset[:left, begin:end],
        )
        parts.append(map_state(part, lambda t: _pad(t, 0, batch)))
        begin = end
    every = map_state(combine_states(parts, lambda tensors: torch.cat(tensors, 1)), lambda t: _pad(t, 1, time))
    final = combine_states([state, *reversed(ended)], torch.cat)
    return map_state(every, lambda t: t[back]), map_state(final, lambda t: t[back])


def _pad(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Return a tensor padded with zeros along an axis to a size."""
    shape = list(tensor.shape)
    shape[axis] = size - shape[axis]
    return torch.cat([tensor, tensor.new_zeros(shape)], axis) if shape[axis] else tensor


def _last(states: State, cell: Cell, inputs: Tensor, state: State | None, lengths: Tensor) -> State:
    """Return the state after the last step of each sequence; the initial state of an empty one."""
    rows = torch.arange(len(lengths), device=lengths.device)

    def pick(pair: list[Tensor]) -> Tensor:
        every, first = pair
        if not every.shape[1]:
            return first
        last = every[rows, (lengths - 1).clamp(min=0)]
        return torch.where((lengths > 0).view(-1, *[1] * (last.dim() - 1)), last, first)

    return combine_states([states, start(cell, inputs, state)], pick)
