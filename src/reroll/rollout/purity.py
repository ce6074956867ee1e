"""Find out, once per cell, whether its step is what a solver along time takes it for: pure, and row by row."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from reroll.cells.base import Cell
from reroll.cells.compiled import compile_adjoint
from reroll.cells.jacobian import feature_major, followed_vjp, leave_to_autograd, step, vjp
from reroll.cells.layout import Layout
from reroll.errors import RerollError, UsageError
from reroll.kernels import dispatch
from reroll.rollout.base import explaining_dtypes

_known: weakref.WeakKeyDictionary[Cell, set[tuple[bool, ...]]] = weakref.WeakKeyDictionary()
"""Cells that were tried, and in which modes (training or not): dropout acts in one of them."""


ROWS = 8
"""Rows on which a step is tried."""
WIDEST = 1 << 12
"""Numbers of state up to which its derivative is tried: to follow it takes their square."""
BAD = (RuntimeError, IndexError, TypeError, ValueError, AttributeError)
"""What a step may raise that does not fit its arguments."""
LOOSE = 1e-2
"""Difference between a row alone and among others that is rounding; a branch makes one of order 1."""


@torch.no_grad()
def require_pure(cell: Cell, problem: Any) -> None:
    """Try the step on a few rows, and raise if it edits its arguments, is random, or mixes rows.

    Raises:
        UsageError: naming the cell and what it does.
    """
    mode = tuple(module.training for module in cell.modules())
    if mode in _known.setdefault(cell, set()):
        return
    u, state = _tried(problem)
    given_u, given_state = u.clone(), state.clone()
    held = _buffers(cell)
    devices = [u.device] if u.device.type == "cuda" else []
    name = type(cell).__name__
    with torch.random.fork_rng(devices), _restoring(cell, held):
        try:
            with explaining_dtypes(cell, u, state):
                after = cell.step(u, problem.layout.unpack(state))
        except BAD as error:
            if isinstance(error, RerollError):
                raise
            raise UsageError(
                f"{name}.step fails on {ROWS} rows, [{ROWS}, {u.shape[1]}] and [{ROWS}, {state.shape[1]}]: {error}. A "
                "rollout along time evaluates many steps side by side as rows; use rollout=Sequential() otherwise."
            ) from error
        _require_same_kind(after, problem, name)
        first = step(cell, problem.layout, u, state)
        once = _buffers(cell)
        second = step(cell, problem.layout, given_u.clone(), given_state.clone())
        twice = _buffers(cell)
        alone = torch.cat([step(cell, problem.layout, u[i : i + 1], state[i : i + 1]) for i in range(len(u))])
    if first.shape != given_state.shape:
        raise UsageError(
            f"{name}.step returns {tuple(first.shape)} numbers, rows and features, for {tuple(state.shape)}; a "
            "step must keep the shape of its state."
        )
    if not (_same(u, given_u) and _same(state, given_state)):
        raise UsageError(f"{name}.step changes its arguments in place; let it return new tensors.")
    for buffer in once:
        if not _same(once[buffer], twice[buffer]):
            raise UsageError(
                f"{name}.step changes the buffer {buffer}; what one step hands to the next belongs into the state."
            )
    if not _same(first, second):
        raise UsageError(
            f"{name}.step gives different results for the same arguments (dropout, or random numbers drawn inside). "
            "Give the noise as part of the inputs, or use rollout=Sequential()."
        )
    if not torch.allclose(first, alone, rtol=LOOSE, atol=LOOSE, equal_nan=True):
        raise UsageError(
            f"{name}.step mixes sequences: the result of a row changes with the other rows (a branch on values, or a "
            "mean over the batch). A rollout along time evaluates many steps side by side as rows; compute every row "
            "by itself, or use rollout=Sequential()."
        )
    if state.shape[1] <= WIDEST and not dispatch.is_mapped():
        with torch.inference_mode(False), torch.autocast(u.device.type, enabled=False):
            _follow_derivatives(cell, problem.layout, u.clone(), state.clone())
    _known[cell].add(mode)


def _buffers(cell: Cell) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in cell.named_buffers()}


@contextmanager
def _restoring(cell: Cell, held: dict[str, torch.Tensor]) -> Iterator[None]:
    """Put back what a trial did to buffers."""
    try:
        yield
    finally:
        for name, buffer in cell.named_buffers():
            if name in held and held[name].shape == buffer.shape and not _same(buffer, held[name]):
                buffer.copy_(held[name])


def _follow_derivatives(cell: Cell, layout: Layout, u: torch.Tensor, state: torch.Tensor) -> None:
    """Leave a step to automatic differentiation whose derivative, by its operations, is another than torch's.

    A solver runs the code of a step on values that follow it. They see neither `no_grad` nor a backward of one's own.
    """
    cotangent = torch.linspace(-1, 1, state.numel(), device=state.device).to(state.dtype).view(state.shape)
    try:
        with torch.enable_grad():
            leaf = state.clone().requires_grad_()
            expected = vjp(step(cell, layout, u, leaf), leaf, cotangent, retain=False)
    except RuntimeError:  # it has none, as a step through NumPy; torch says so where one is asked for
        return
    for way in (followed_vjp, _written_vjp):
        found = way(cell, layout, u, state, cotangent)
        if found is None:
            continue
        known = found.isfinite() & expected.isfinite()  # an infinite slope spoils a row's sum in its own way
        found, given = found[known], expected[known]
        atol = LOOSE * max(1.0, float(given.abs().max())) if given.numel() else 0.0
        if not torch.allclose(found, given, rtol=LOOSE, atol=atol):
            leave_to_autograd(cell)


def _written_vjp(
    cell: Cell, layout: Layout, u: torch.Tensor, state: torch.Tensor, cotangent: torch.Tensor
) -> torch.Tensor | None:
    """Return Aᵀ · cotangent as the step's program gives it; None if it has none."""
    if u.device.type != "cpu" or not u.dtype == state.dtype == torch.float32:
        return None
    columns, nothing = state.T.contiguous(), torch.zeros(layout.size, len(state))
    program = compile_adjoint(cell, layout, feature_major(u), columns, nothing)
    if program is None:
        return None
    out = torch.empty_like(nothing)
    program.run(out, 0, cotangent.T.contiguous())
    return out.T


def _tried(problem: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return some rows: the first step's inputs, with states around the first one, so that they differ in sign."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(ROWS) % len(problem.start)
    u, state = problem.piece(0, 1).u[rows, 0].detach(), problem.start[rows].detach()
    around = torch.randn(state.shape, generator=generator, dtype=torch.float64).to(state)
    around[0] = 0
    return u.clone(), state + around


def _require_same_kind(after: Any, problem: Any, name: str) -> None:
    """A step that returns a state of another kind, such as a tuple for a tensor, would fail in the solver's words."""
    kind = problem.layout.kind
    known = isinstance(after, torch.Tensor) if kind is torch.Tensor else isinstance(after, tuple)
    if not known or (kind is not torch.Tensor and len(after) != len(problem.layout.sizes)):
        raise UsageError(
            f"{name}.step returns a {type(after).__name__} for a state that is a {kind.__name__}; it must return one "
            "like the one it was given."
        )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
