"""A recurrence on vectors: what a cell and its inputs become for a solver.

A `Problem` is batch-first and attached to the autograd graph. A `Field` is the same without a graph and feature-major,
[D, T, B] in memory: elementwise functions then run over contiguous ranges, a step forward in time is a shift by B
numbers, and a diagonal recurrence along time is a scan over D·B channels of which B are adjacent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from reroll.cells import jacobian
from reroll.cells.base import Cell, State
from reroll.cells.compiled import compile_step
from reroll.cells.layout import Layout
from reroll.cells.tracked import Tracked
from reroll.errors import UsageError
from reroll.kernels.program import Program
from reroll.rollout import base
from reroll.rollout.base import check, check_reset, explaining_dtypes, require_one_dtype, start, weights_dtype
from reroll.trees import map_state

PIECE_FLOATS = 1 << 23
"""Numbers of inputs and states that are transposed at a time: 32 MB of float32, whatever the length. For each piece the
step is compiled anew, which takes some milliseconds."""
PROGRAM_FLOATS = 1 << 12
"""Numbers of state from which compiling a program pays."""


class Problem(NamedTuple):
    """A recurrence, batch-first.

    Args:
        cell, layout: the recurrence, and how its state is packed into a vector.
        inputs: [B, T, features].
        start: the state before the first step, [B, D].
        fresh: the state after a reset, [B, D].
        reset: [B, T] or None.
        projected: the inputs as a step takes them, [B, T, U]; None: every piece projects its own.
    """

    cell: Cell
    layout: Layout
    inputs: Tensor
    start: Tensor
    fresh: Tensor | None = None
    reset: Tensor | None = None
    projected: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, D)."""
        return self.inputs.shape[0], self.inputs.shape[1], self.layout.size

    @property
    def u(self) -> Tensor:
        """Projected inputs, [B, T, U], of a problem whose inputs are projected (see `piece`)."""
        assert self.projected is not None
        return self.projected

    def piece(self, begin: int = 0, end: int | None = None, start: Tensor | None = None) -> Problem:
        """Return a range of steps with their inputs projected; `start`: the state before them, None: the first one."""
        inputs = self.inputs[:, begin:end]
        if self.projected is not None:
            u = self.projected[:, begin:end]
        else:
            with explaining_dtypes(self.cell, inputs), torch.autocast(inputs.device.type, enabled=False):
                u = self.cell.project(inputs)
        reset = None if self.reset is None else self.reset[:, begin:end]
        return self._replace(inputs=inputs, start=self.start if start is None else start, reset=reset, projected=u)

    def pieces(self, multiple: int = 1) -> list[tuple[int, int]]:
        """Return (begin, end) of pieces of bounded memory; all but the last are a multiple of so many steps long."""
        batch, time, size = self.shape
        per_step = batch * (self.inputs.shape[-1] + 4 * size)
        count = max(1, -(-time * per_step // PIECE_FLOATS))
        width = -(-time // (count * multiple)) * multiple  # of about equal length
        return [(begin, min(begin + width, time)) for begin in range(0, time, width)]

    def before(self, states: Tensor) -> Tensor:
        """Return the state before every step, [B, T, D]."""
        return _before(states, self.start, self.fresh, None if self.reset is None else self.reset.unsqueeze(-1))

    def field(self) -> Field:
        """Return the same without a graph, feature-major."""

        def transpose(t: Tensor) -> Tensor:
            return t.detach().permute(*range(t.dim() - 1, -1, -1)).clone(memory_format=torch.contiguous_format)

        fresh, reset = (None if t is None else transpose(t) for t in (self.fresh, self.reset))
        u = transpose(self.u)
        return Field(self.cell, self.layout, u, Tracked.inputs(rows(u)), transpose(self.start), fresh, reset)


class Field(NamedTuple):
    """A recurrence, feature-major: u [U, T, B] and its rows on tape, start and fresh [D, B], reset [T, B]."""

    cell: Cell
    layout: Layout
    u: Tensor
    inputs: Tracked
    start: Tensor
    fresh: Tensor | None = None
    reset: Tensor | None = None
    programs: Programs | None = None
    offset: int = 0

    def compiled(self, structure: str | None, blocks: int) -> Field:
        """Return the same with its step compiled, where that is possible and it is long enough to pay."""
        size, time, batch = self.shape
        supported = self.u.device.type == "cpu" and self.u.dtype == torch.float32 == self.start.dtype
        if not supported or time * batch * size < PROGRAM_FLOATS:
            return self
        programs = compile_step(self.cell, self.layout, rows(self.u), structure, blocks)
        return self if programs is None else self._replace(programs=Programs(*programs, structure, blocks))

    def run(self, ahead: Tensor, fresh: bool) -> tuple[Tensor, Tensor | None]:
        """Return f at every step [D, T, B] and, if `fresh`, its Jacobian [D, T, B], [K, K, C, T, B] or [D, D, T, B]."""
        assert self.programs is not None
        size, time, batch = ahead.shape
        program = self.programs.whole if fresh else self.programs.step
        out = torch.empty(program.outputs, time * batch, dtype=ahead.dtype)
        program.run(out, self.offset, ahead.flatten(1))
        following, rest = out[:size].view(size, time, batch), out[size:]
        if not len(rest):
            return following, None
        blocks = self.programs.blocks
        shape = {"diagonal": (size,), "dense": (size, size), "block": (blocks, blocks, size // blocks)}
        return following, rest.view(*shape[self.programs.structure or ""], time, batch)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, T, B)."""
        return self.layout.size, self.u.shape[1], self.u.shape[2]

    def before(self, states: Tensor) -> Tensor:
        """Return the state before every step, [D, T, B]."""
        return _before(states, self.start, self.fresh, self.reset)

    def window(self, begin: int, end: int, start: Tensor) -> Field:
        """Return a range of steps."""
        reset = None if self.reset is None else self.reset[begin:end]
        if self.programs is not None:  # these read the inputs in place
            return self._replace(
                u=self.u[:, begin:end], start=start, reset=reset, offset=self.offset + begin * self.u.shape[2]
            )
        u = self.u[:, begin:end].contiguous()
        return self._replace(u=u, inputs=Tracked.inputs(rows(u)), start=start, reset=reset)

    def sequences(self, which: Tensor) -> Field:
        """Return some of the sequences."""

        def pick(t: Tensor | None) -> Tensor | None:
            return None if t is None else t[..., which]

        u = self.u[..., which]
        return self._replace(
            u=u, inputs=Tracked.inputs(rows(u)), start=self.start[..., which], fresh=pick(self.fresh),
            reset=pick(self.reset), programs=None,
        )  # fmt: skip

    def one_step(self, t: int, state: Tensor) -> Tensor:
        """Return the state [D, B] after step t."""
        if self.reset is not None and self.fresh is not None:
            state = torch.where(self.reset[t], self.fresh, state)
        return jacobian.step(self.cell, self.layout, self.u[:, t].T, state.T).T


class Programs(NamedTuple):
    """A step as a program, alone and with its Jacobian in a structure."""

    step: Program
    whole: Program
    structure: str | None
    blocks: int


def _before(states: Tensor, start: Tensor, fresh: Tensor | None, reset: Tensor | None) -> Tensor:
    previous = torch.cat([start.unsqueeze(1), states[:, :-1]], 1)
    return previous if reset is None or fresh is None else torch.where(reset, fresh.unsqueeze(1), previous)


def rows(field: Tensor) -> Tensor:
    """Return a field [F, T, B] as rows [T·B, F] in the same memory."""
    return field.flatten(1).T


def _in_one_dtype(cell: Cell, inputs: Tensor, state: State | None) -> tuple[Tensor, State | None]:
    """Under autocast cast inputs and state to the dtype of the weights; otherwise raise if inputs have another one.

    A solver works in the precision of the weights: with the rounding of autocast it would not converge.
    """
    dtype = weights_dtype(cell, inputs)
    if torch.is_autocast_enabled(inputs.device.type):
        state = None if state is None else map_state(state, lambda t: t.to(dtype) if t.is_floating_point() else t)
        return (inputs.to(dtype) if inputs.is_floating_point() else inputs), state
    if inputs.is_floating_point():
        require_one_dtype(cell, inputs, None)  # a state of another dtype may be fine: the step is tested
    return inputs, state


def make_problem(cell: Cell, inputs: Tensor, state: State | None, reset: Tensor | None) -> Problem:
    """Return the recurrence on vectors, or raise `UsageError` if a solver cannot take it."""
    check(cell, inputs)
    if base.has_tangent(inputs):
        raise UsageError(
            "inputs carries a forward-mode derivative, which only a loop over the steps supports; use "
            "rollout=Sequential()."
        )
    if base.is_transformed(inputs) or any(map(base.is_transformed, cell.parameters())):
        raise UsageError(
            f"inputs, or a weight of {type(cell).__name__}, is inside torch.func.grad or vmap, which only a loop "
            "over the steps supports; use rollout=Sequential()."
        )
    inputs, state = _in_one_dtype(cell, inputs, state)
    with torch.autocast(inputs.device.type, enabled=False):
        initial = start(cell, inputs, state)
        check_reset(reset, inputs)
        layout = Layout.of(initial)
        fresh = None if reset is None else layout.pack(start(cell, inputs, None))
        problem = Problem(cell, layout, inputs, layout.pack(initial), fresh, reset)
        # A gradient needs the graph of all steps at once; without one, each piece is projected when it is solved.
        return problem if cell.projects_stepwise and not torch.is_grad_enabled() else problem.piece()
