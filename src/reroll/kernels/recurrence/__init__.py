"""A recurrence whose step is a program, along time on the CPU: step by step, or by Newton's method in short windows.

Both take a group of sequences through all steps without returning to Python, with a working set that fits the cache.
`newton` is the loop of `reroll.rollout.newton` without damping, for windows of a few steps: each window starts from the
last state of the one before and repeats

    r_t = f_t(s_{t−1}) − s_t,   δ_t = A_t δ_{t−1} + r_t,   s_t ← s_t + δ_t

until residual and correction of every feature of a sequence are within tolerance. The first window that is not finite
or exceeds the iteration limit ends the loop, and `reroll.rollout` decides how to go on from there.

Arrays are feature-major, [D, rows]; the rows of B sequences have the steps outermost, row = first + t · B + b.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from reroll.kernels.program import Program
from reroll.kernels.threads import split


class Rows(NamedTuple):
    """How sequences of T steps are laid out as rows: in groups of `counts` sequences, each the work of one thread."""

    counts: tuple[int, ...]
    time: int

    @property
    def firsts(self) -> list[int]:
        """The first row of every group."""
        return [self.time * sum(self.counts[:i]) for i in range(len(self.counts))]

    def pack(self, tensor: Tensor) -> Tensor:
        """Return [B, T, F] as [F, rows], contiguous."""
        parts = [part.permute(2, 1, 0).flatten(1) for part in tensor.split(self.counts)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0].contiguous()

    def unpack(self, packed: Tensor, begin: int, end: int) -> Tensor:
        """Return steps begin … end − 1 of [F, rows] as [B, steps, F]."""
        out = packed.new_empty(sum(self.counts), end - begin, packed.shape[0])
        for first, count, part in zip(self.firsts, self.counts, out.split(self.counts)):
            rows = packed[:, first + begin * count : first + end * count]
            part.copy_(rows.unflatten(1, (-1, count)).permute(2, 1, 0))
        return out


class Convergence(NamedTuple):
    """How far `newton` got: steps solved in all groups, and per sequence iterations and largest residual."""

    steps: int
    iterations: np.ndarray
    residual: np.ndarray


def loop(program: Program, rows: Rows, start: Tensor, fresh: Tensor, reset: np.ndarray, out: Tensor) -> None:
    """Run a recurrence step by step into `out`, [D, rows].

    Args:
        program: the step; its first input is the state.
        rows: the order of the sequences and steps.
        start, fresh: the states before the first step and after a reset, [D, B].
        reset: True at the steps before which a sequence is reset, [rows]; empty if none is.
        out: memory for the states.
    """
    from reroll.kernels.recurrence import cpu

    features = np.array([0, *(t.shape[0] for t in program.inputs[1:])], np.int64)
    starts, states = [t.contiguous().numpy() for t in (start, fresh)], out.numpy()

    def run(g: int, group: tuple[int, ...]) -> None:
        cpu.loop(program.code, program.registers, _addresses(program), features, group, *starts, reset, states)

    _for_groups(rows, run)


def newton(
    programs: tuple[Program, Program],
    kind: str,
    order: int,
    rows: Rows,
    initial: tuple[Tensor, Tensor, np.ndarray],
    guess: Tensor | None,
    window: int,
    tolerance: tuple[float, float],
    limit: int,
    every: int,
    out: Tensor,
) -> Convergence:
    """Solve a recurrence window by window into `out`, up to the first window that fails.

    Args:
        programs: the step, and the step with its Jacobian behind the next states.
        kind, order: the structure of the Jacobian; K, features that act on one another: 1 for a diagonal, D for all.
        rows, out: as in `loop`.
        initial: (start, fresh, reset) as in `loop`.
        guess: initial states of the iteration, [D, rows]; None: f of the state before the window.
        window, tolerance, limit, every: steps of a window, (absolute, relative), most iterations, and iterations for
            which a Jacobian is used.
    """
    from reroll.kernels.recurrence import cpu

    start, fresh, reset = initial
    starts, states = [t.contiguous().numpy() for t in (start, fresh)], out.numpy()
    guesses = np.empty((0, 0), np.float32) if guess is None else guess.contiguous().numpy()
    shape = -(-rows.time // window), sum(rows.counts)
    iterations, residual = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    solved = np.zeros(len(rows.counts), np.int64)
    options = (cpu.KINDS[kind], order, window, limit, every)
    tolerances = tuple(np.float32(t) for t in tolerance)

    def run(g: int, group: tuple[int, ...]) -> None:
        step, with_jacobian = ((p.code, p.registers, p.outputs, _addresses(p)) for p in programs)
        solved[g] = cpu.newton(
            step, with_jacobian, group, options, tolerances, *starts, reset, guesses, states, iterations, residual
        )

    _for_groups(rows, run)
    steps = int(solved.min())
    windows = -(-steps // window)  # some groups may have got further
    return Convergence(steps, *(each[:windows].max(0, initial=0) for each in (iterations, residual)))


def _for_groups(rows: Rows, run: Callable[[int, tuple[int, ...]], None]) -> None:
    """Call `run(g, (first row, first sequence, sequences, steps))` for every group, on several threads."""
    firsts, columns = rows.firsts, np.cumsum([0, *rows.counts])

    def work(begin: int, end: int) -> None:
        for g in range(begin, end):
            run(g, (firsts[g], columns[g], rows.counts[g], rows.time))

    split(work, len(firsts), 1)


def _addresses(program: Program) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return addresses, strides and first rows of the inputs; the kernels fill in the first, which is the state."""
    tensors = program.inputs[1:]
    addresses = np.array([0, *(t.data_ptr() for t in tensors)], np.int64)
    strides = np.array([0, *(t.shape[1] for t in tensors)], np.int64)
    return addresses, strides, np.zeros(len(addresses), np.int64)
