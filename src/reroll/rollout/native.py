"""A recurrence along time in compiled code: for cells whose step can be written as a program, on a CPU, in float32.

    step_by_step(problem)        all states, one after another
    newton(problem, …)           windows of a few steps, one after another, each by Newton's method

Both return None where a step cannot be written as a program (see `reroll.cells.compiled`) or it would not pay. The
arithmetic is that of `Sequential` and of `Newton`, but no tensor of a whole sequence is materialised between one
operation and the next, so a step costs what its arithmetic costs. Sequences are divided among threads.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reroll.cells.base import Cell
from reroll.cells.compiled import compile_adjoint, compile_step
from reroll.cells.layout import Layout
from reroll.errors import UsageError
from reroll.kernels import dispatch
from reroll.kernels.program import Program
from reroll.kernels.recurrence import Convergence, Rows, loop
from reroll.kernels.recurrence import newton as solve
from reroll.kernels.simd import LANES
from reroll.rollout.linearise import Compilable
from reroll.rollout.problem import Problem, make_problem
from reroll.rollout.purity import require_pure

FEWEST_FLOATS = 1 << 10
"""Numbers of state, over all steps, from which compiling a program pays."""
THREAD_FLOATS = 1 << 14
"""Numbers of state that are worth another thread."""
CACHE_FLOATS = 1 << 16
"""Numbers in the working set of a window: 256 KB, which fit the L2 cache."""
WINDOW_ROWS = 256
"""Rows of a window, steps times sequences: more take more iterations, fewer leave lanes empty."""
WINDOW_STEPS = 4
"""Fewest steps of a window."""
ADJOINT_FLOATS = 1 << 22
"""Numbers of inputs, states and cotangents that an adjoint transposes at a time, unless one step has more."""
MOST_FLOATS = 1 << 26
"""Numbers that a window of the caller's size may take."""

_compilable: weakref.WeakKeyDictionary[Cell, Layout] = weakref.WeakKeyDictionary()
"""Cells that could be compiled, so that it is not tried again. A failure is not remembered: it may be of one call."""


class Prepared(NamedTuple):
    """A recurrence as programs: `whole` is the step with its Jacobian; `initial` is (start, fresh, reset)."""

    rows: Rows
    step: Program
    whole: Program
    initial: tuple[Tensor, Tensor, np.ndarray]


def prepare(problem: Problem, fewest: int, structure: str | None, blocks: int = 1) -> Prepared | None:
    """Compile a step to programs over rows (`compile_step`), or return None; a thread gets at least `fewest`."""
    batch, time, _ = problem.u.shape
    u = problem.u.detach()
    floats = batch * time * problem.layout.size
    if not _is_supported(problem) or floats < FEWEST_FLOATS:
        return None
    rows = Rows(_groups(batch, fewest, floats), time)
    programs = compile_step(problem.cell, problem.layout, rows.pack(u).T, structure, blocks)
    if programs is None:
        return None
    reset = np.empty(0, np.bool_)
    start, fresh = (t.detach().T.contiguous() for t in (problem.start, problem.start))
    if problem.reset is not None and problem.fresh is not None:
        fresh, reset = problem.fresh.detach().T.contiguous(), rows.pack(problem.reset.unsqueeze(-1))[0].numpy()
    return Prepared(rows, *programs, (start, fresh, reset))


def _groups(batch: int, fewest: int, floats: int) -> tuple[int, ...]:
    """Divide sequences among threads: how many each takes."""
    groups = max(1, min(batch // fewest, torch.get_num_threads(), floats // THREAD_FLOATS))
    return tuple(batch * (g + 1) // groups - batch * g // groups for g in range(groups))


def _is_supported(problem: Problem) -> bool:
    """Return whether programs run on this device and dtype, outside vmap."""
    u, state = problem.u, problem.start
    return u.device.type == "cpu" and u.dtype == torch.float32 == state.dtype and not dispatch.is_mapped()


class Examined(NamedTuple):
    """A cell that a solver can take: D, and whether its step can be compiled."""

    size: int
    compilable: bool


@torch.no_grad()
def examine(cell: Cell, inputs: Tensor) -> Examined | None:
    """Try a cell on two steps of two sequences; None if it needs a loop: its step is not pure, or has no Jacobian."""
    try:
        with torch.random.fork_rng([]):  # a projection may draw random numbers, as dropout does
            problem = make_problem(cell, inputs[:2, :2], None, None).piece()
        require_pure(cell, problem)
    except UsageError:  # such as a state of integers, or a step that is random
        return None
    if not _is_supported(problem):
        return Examined(problem.layout.size, False)
    if _compilable.get(cell) != problem.layout:
        u = problem.u.flatten(0, 1).T.contiguous().T
        if compile_step(cell, problem.layout, u, None) is None:
            return Examined(problem.layout.size, False)
        _compilable[cell] = problem.layout
    return Examined(problem.layout.size, True)


def step_by_step(problem: Problem) -> Tensor | None:
    """Return the states of all steps, [B, T, D]."""
    out, start = problem.start.new_empty(problem.shape), problem.start
    for begin, end in problem.pieces():
        prepared = prepare(problem.piece(begin, end, start), LANES, None)  # fewer sequences leave lanes empty
        if prepared is None:
            return None
        rows = prepared.rows
        states = torch.empty(problem.layout.size, sum(rows.counts) * rows.time)
        loop(prepared.step, rows, *prepared.initial, states)
        out[:, begin:end] = rows.unpack(states, 0, rows.time)
        start = out[:, end - 1]
    return out


def adjoint(problem: Problem, states: Tensor, cotangent: Tensor) -> Tensor | None:
    """Return g_t = c_t + A_{t+1}ᵀ g_{t+1} for cotangents c [B, T, D], one step after another from the last.

    That is a recurrence backwards in time of a program: the step followed by its derivative. Jacobians are never
    formed, and nothing is saved in the forward pass but the states.
    """
    batch, time, size = states.shape
    if not _is_supported(problem) or states.numel() < FEWEST_FLOATS:
        return None
    gradient = torch.empty_like(states)
    g = gradient[:, -1] = cotangent[:, -1]
    nothing = torch.zeros(size, batch)
    width = max(1, ADJOINT_FLOATS // (batch * (problem.u.shape[-1] + 3 * size)))
    counts = _groups(batch, LANES, states.numel())
    for end in range(time - 1, 0, -width):
        begin = max(0, end - width)
        rows = Rows(counts, end - begin)
        # The transition out of steps begin … end − 1 is the Jacobian of steps begin + 1 … end.
        u, s = problem.u[:, begin + 1 : end + 1].detach(), states[:, begin:end]
        if problem.reset is not None and problem.fresh is not None:
            s = torch.where(problem.reset[:, begin + 1 : end + 1, None], problem.fresh.detach().unsqueeze(1), s)
        u, s, c = (rows.pack(t.flip(1)) for t in (u, s, cotangent[:, begin:end]))
        program = compile_adjoint(problem.cell, problem.layout, u.T, s, c)
        if program is None:
            return None
        cut = np.empty(0, np.bool_)
        if problem.reset is not None:
            cut = rows.pack(problem.reset[:, begin + 1 : end + 1].flip(1).unsqueeze(-1))[0].numpy()
        out = torch.empty(size, batch * (end - begin))
        loop(program, rows, g.T.contiguous(), nothing, cut, out)
        gradient[:, begin:end] = rows.unpack(out, 0, end - begin).flip(1)
        g = gradient[:, begin]
    return gradient


def newton(
    problem: Problem,
    linearise: Compilable,
    guess: Tensor | None,
    window: int | str | None,
    tolerance: tuple[float, float],
    limit: Callable[[int], int],
) -> tuple[Tensor, Convergence] | None:
    """Return the states of the first steps [B, steps, D], all of them unless it failed, and the counts of the solver.

    `guess`: initial states, [B, T, D]; None: f of the state before the window. `window` and `tolerance` (absolute,
    relative) are those of `reroll.rollout.Newton`; `limit`: most iterations for a window of so many steps.
    """
    size, time, blocks = problem.layout.size, problem.u.shape[1], linearise.blocks(problem.layout)
    if linearise.kind == "identity" and problem.reset is not None:
        return None
    prepared = prepare(problem, 1, linearise.structure, blocks)
    if prepared is None:
        return None
    rows = prepared.rows
    per_row = 4 * size + prepared.whole.outputs
    steps = _window(window, max(rows.counts), per_row, time)
    if steps * max(rows.counts) * per_row > MOST_FLOATS:
        return None
    order = {"block": blocks, "dense": size}.get(linearise.kind, 1)
    out = torch.empty(size, sum(rows.counts) * time)
    guesses = None if guess is None else rows.pack(guess[:, :time].to(torch.float32))
    counts = solve(
        (prepared.step, prepared.whole), linearise.kind, order, rows, prepared.initial, guesses, steps, tolerance,
        limit(steps), linearise.every, out,
    )  # fmt: skip
    return rows.unpack(out, 0, counts.steps), counts


def _window(window: int | str | None, count: int, per_row: int, time: int) -> int:
    if window is None:
        return time
    if isinstance(window, int):
        return min(window, time)
    rows = min(WINDOW_ROWS, max(64, CACHE_FLOATS // per_row))
    return min(time, max(WINDOW_STEPS, rows // count))
