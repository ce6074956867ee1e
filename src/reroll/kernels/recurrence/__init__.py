"""A recurrence whose step is a program, along time on the CPU: step by step, or by Newton's method in short windows.

Both go through all steps of some sequences without coming back to Python, and with all they touch in the cache.
`newton` is the loop of `reroll.rollout.newton` without damping, for windows of a few steps: it starts every window
where the one before ended, repeats

    r_t = f_t(s_{t−1}) − s_t,   δ_t = A_t δ_{t−1} + r_t,   s_t ← s_t + δ_t

until residual and correction of every feature of a sequence are within tolerance, and stops for good at the first
window with numbers that are not finite, or that takes too many iterations: what is to be done there is decided in
`reroll.rollout`.

Numbers lie feature by feature, [D, rows]; the rows of B sequences are steps outermost, row = first + t · B + b.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reroll.kernels.program import Program
from reroll.kernels.threads import split


class Rows(NamedTuple):
    """Sequences in groups, B of each in `counts`, that a thread goes through by itself; all have T steps."""

    counts: tuple[int, ...]
    time: int

    @property
    def firsts(self) -> list[int]:
        """The first row of every group."""
        return [self.time * sum(self.counts[:i]) for i in range(len(self.counts))]

    def turned(self, tensor: Tensor) -> Tensor:
        """Return [B, T, F] as rows, [F, rows] in memory."""
        parts = [part.permute(2, 1, 0).flatten(1) for part in tensor.split(self.counts)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()

    def back(self, field: Tensor, begin: int, end: int) -> Tensor:
        """Return steps begin … end − 1 of rows [F, rows] as [B, steps, F]."""
        out = field.new_empty(sum(self.counts), end - begin, field.shape[0])
        for first, count, part in zip(self.firsts, self.counts, out.split(self.counts)):
            rows = field[:, first + begin * count : first + end * count]
            part.copy_(rows.unflatten(1, (-1, count)).permute(2, 1, 0))
        return out


class Found(NamedTuple):
    """What `newton` returns: the steps it solved in all groups, and per sequence iterations and largest residual."""

    steps: int
    iterations: np.ndarray
    residual: np.ndarray


def loop(program: Program, rows: Rows, start: Tensor, fresh: Tensor, reset: np.ndarray, out: Tensor) -> None:
    """Run a recurrence step by step into `out`, [D, rows].

    `start` and `fresh` are the states before the first step and after a reset, [D, B]; `reset` says where sequences
    start afresh, [rows], or is empty. The first input of the program is the state.
    """
    from reroll.kernels.recurrence import cpu

    firsts, columns = rows.firsts, np.cumsum([0, *rows.counts])
    starts, freshes, states = start.contiguous().numpy(), fresh.contiguous().numpy(), out.numpy()
    features = np.array([0, *(t.shape[0] for t in program.inputs[1:])], np.int64)

    def work(begin: int, end: int) -> None:
        for g in range(begin, end):
            group = (firsts[g], columns[g], rows.counts[g], rows.time)
            cpu.loop(
                program.code, program.registers, _addresses(program), features, group, starts, freshes, reset, states
            )

    split(work, len(firsts), 1)


def newton(
    programs: tuple[Program, Program],
    kind: str,
    order: int,
    rows: Rows,
    given: tuple[Tensor, Tensor, np.ndarray],
    guess: Tensor | None,
    window: int,
    tolerance: tuple[float, float],
    limit: int,
    every: int,
    out: Tensor,
) -> Found:
    """Solve a recurrence window by window into `out`, as far as it goes.

    Args:
        programs: the step, and the step with its Jacobian behind the next states.
        kind, order: the structure of the Jacobian; K, features that act on one another: 1 for a diagonal, D for all.
        given: (start, fresh, reset) as in `loop`.
        guess: states to begin with, [D, rows]; None: f of the state before the window.
        window, tolerance, limit, every: steps, (absolute, relative), most iterations, and iterations for which a
            Jacobian is used.
    """
    from reroll.kernels.recurrence import cpu

    start, fresh, reset = given
    firsts, columns = rows.firsts, np.cumsum([0, *rows.counts])
    starts, freshes, states = start.contiguous().numpy(), fresh.contiguous().numpy(), out.numpy()
    guesses = np.empty((0, 0), np.float32) if guess is None else guess.contiguous().numpy()
    batch = int(columns[-1])
    windows = -(-rows.time // window)
    iterations, residual = np.zeros((windows, batch), np.int64), np.zeros((windows, batch), np.float32)
    solved = np.zeros(len(firsts), np.int64)
    how = (cpu.KINDS[kind], order, window, limit, every)
    within = tuple(np.float32(t) for t in tolerance)

    def work(begin: int, end: int) -> None:
        for g in range(begin, end):
            group = (firsts[g], columns[g], rows.counts[g], rows.time)
            a, b = ((p.code, p.registers, p.outputs, _addresses(p)) for p in programs)
            solved[g] = cpu.newton(
                a, b, group, how, within, starts, freshes, reset, guesses, states, iterations, residual
            )

    split(work, len(firsts), 1)
    steps = int(solved.min())
    whole_windows = -(-steps // window)  # some groups may have gone on
    return Found(steps, *(each[:whole_windows].max(0, initial=0) for each in (iterations, residual)))


def _addresses(program: Program) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the inputs of a program lie; the first, the state, is filled in by the kernels."""
    tensors = program.inputs[1:]
    addresses = np.array([0, *(t.data_ptr() for t in tensors)], np.int64)
    strides = np.array([0, *(t.shape[1] for t in tensors)], np.int64)
    return addresses, strides, np.zeros(len(addresses), np.int64)
