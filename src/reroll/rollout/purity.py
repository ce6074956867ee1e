"""Test, once per cell, that its step is what a solver along time assumes: pure, and independent for each row."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reroll.cells import jacobian
from reroll.cells.base import Cell
from reroll.cells.compiled import compile_adjoint
from reroll.cells.jacobian import MISTAKES, OTHER_VALUES, OWN_DERIVATIVE, leave_to_autograd, step
from reroll.cells.layout import Layout
from reroll.errors import RerollError, UsageError
from reroll.kernels import dispatch
from reroll.rollout.base import explaining_dtypes, require_same_shapes
from reroll.rollout.problem import Problem

_tested: weakref.WeakKeyDictionary[Cell, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""Cells that were tested: with which step, if one was assigned to the object, and with which modules (`_state_of`)."""

ROWS = 8
"""Rows on which a step is tested."""
WIDEST = 1 << 12
"""State size up to which the derivative is tested: tracking it takes the square in memory."""
LOOSE = 1e-2
"""Difference between a row alone and among others that counts as rounding; a branch makes one of order 1."""
ALONG = "A parallel rollout evaluates many steps at once, as rows; for such a step use rollout=Sequential()."


@torch.no_grad()
def require_pure(cell: Cell, problem: Problem) -> None:
    """Test the step on a few rows, and raise if it edits its arguments, is random, or mixes rows.

    Raises:
        UsageError: naming the cell and what it does.
    """
    mode = (id(vars(cell).get("step")), *(part for module in cell.modules() for part in _state_of(module)))
    if mode in _tested.setdefault(cell, set()):
        return
    name, layout, (u, state) = type(cell).__name__, problem.layout, _test_rows(problem)
    with torch.random.fork_rng([u.device] if u.device.type == "cuda" else []), _restoring_buffers(cell):
        try:
            with explaining_dtypes(cell, u, state):
                after = cell.step(u.clone(), layout.unpack(state.clone()))
        except MISTAKES as error:
            if isinstance(error, RerollError):
                raise
            raise UsageError(
                f"{name}.step fails on {ROWS} rows, [{ROWS}, {u.shape[1]}] and [{ROWS}, {state.shape[1]}]: {error}. "
                f"{ALONG}"
            ) from error
        require_same_shapes(cell, layout.unpack(state), after)
        u_after, state_after = u.clone(), state.clone()
        first, once = step(cell, layout, u_after, state_after), _buffers(cell)
        second, twice = step(cell, layout, u.clone(), state.clone()), _buffers(cell)
        alone = torch.cat([step(cell, layout, u[i : i + 1].clone(), state[i : i + 1].clone()) for i in range(ROWS)])
    changed = [buffer for buffer in once if not _same(once[buffer], twice[buffer])]
    wrong = None
    if first.is_complex():
        wrong = "returns complex numbers for a real state; use rollout=Sequential()."
    elif not (_same(u_after, u) and _same(state_after, state)):
        wrong = "changes its arguments in place; let it return new tensors."
    elif changed:
        wrong = f"changes the buffer {changed[0]}; what one step passes to the next belongs in the state."
    elif not _same(first, second):
        wrong = (
            "gives different results for the same arguments (dropout, or random numbers drawn inside). Pass the noise "
            "as part of the inputs, or use rollout=Sequential()."
        )
    elif not torch.allclose(first, alone, rtol=LOOSE, atol=LOOSE, equal_nan=True):
        wrong = (
            "mixes sequences: the result of a row changes with the other rows (a branch on values, or a mean over the "
            f"batch). {ALONG}"
        )
    if wrong:
        raise UsageError(f"{name}.step {wrong}")
    if not dispatch.is_mapped():
        with torch.inference_mode(False), torch.autocast(u.device.type, enabled=False):
            if not _tracks(cell, layout, u, state):
                leave_to_autograd(cell, OTHER_VALUES)
            elif state.shape[1] <= WIDEST:
                _test_derivatives(cell, layout, u.clone(), state.clone())
    _tested[cell].add(mode)


def _state_of(module: nn.Module) -> tuple[int, ...]:
    """What of a module can change after its cell was tested: whether it trains, its forward, and its hooks."""
    forward = vars(module).get("forward", type(module).forward)
    return module.training, id(forward), *module._forward_pre_hooks, *module._forward_hooks


def _buffers(cell: Cell) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in cell.named_buffers()}


@contextmanager
def _restoring_buffers(cell: Cell) -> Iterator[None]:
    """Restore the buffers that a test changed."""
    before = _buffers(cell)
    try:
        yield
    finally:
        for name, buffer in cell.named_buffers():
            if name in before and before[name].shape == buffer.shape and not _same(before[name], buffer):
                buffer.copy_(before[name])


@torch.no_grad()
def _tracks(cell: Cell, layout: Layout, u: Tensor, state: Tensor) -> bool:
    """Return whether a step computes the same on tracked values: not if it branches on the type of its arguments."""
    expected, tracked = (run(cell, layout, u.clone(), state.clone()) for run in (step, jacobian.advance))
    loose = max(LOOSE, 16 * torch.finfo(state.dtype).eps)
    return torch.allclose(tracked, expected, rtol=loose, atol=loose, equal_nan=True)


def _test_derivatives(cell: Cell, layout: Layout, u: Tensor, state: Tensor) -> None:
    """Leave a step to autograd if its derivative differs from that of its operations.

    A solver runs the code of a step on tracked values, which see neither `no_grad` nor a custom backward.
    """
    cotangent = torch.linspace(-1, 1, state.numel(), device=state.device).to(state.dtype).view(state.shape)
    try:
        with torch.enable_grad():
            leaf = state.clone().requires_grad_()
            expected = jacobian.vjp(step(cell, layout, u, leaf), leaf, cotangent, retain=False)
    except RuntimeError:  # it has none, such as a step through NumPy; torch raises where a gradient is needed
        return
    for method in (jacobian.tracked_vjp, _compiled_vjp):
        product = method(cell, layout, u, state, cotangent)
        if product is None:
            continue
        finite = product.isfinite() & expected.isfinite()  # an infinite slope spoils a sum differently in each
        product, truth = product[finite], expected[finite]
        atol = LOOSE * max(1.0, float(truth.abs().max())) if truth.numel() else 0.0
        if not torch.allclose(product, truth, rtol=LOOSE, atol=atol):
            leave_to_autograd(cell, OWN_DERIVATIVE)


def _compiled_vjp(cell: Cell, layout: Layout, u: Tensor, state: Tensor, cotangent: Tensor) -> Tensor | None:
    """Return Aᵀ · cotangent by the step's program; None if it has none."""
    if u.device.type != "cpu" or not u.dtype == state.dtype == torch.float32:
        return None
    nothing = torch.zeros(layout.size, len(state))
    program = compile_adjoint(cell, layout, jacobian.feature_major(u), state.T.contiguous(), nothing)
    if program is None:
        return None
    out = torch.empty_like(nothing)
    program.run(out, 0, cotangent.T.contiguous())
    return out.T


def _test_rows(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return some rows: the first step's inputs, with states around the initial one, so that they differ in sign."""
    rows = torch.arange(ROWS) % len(problem.start)
    u, state = problem.piece(0, 1).u[rows, 0].detach(), problem.start[rows].detach()
    around = torch.randn(state.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(state)
    around[0] = 0
    return u.clone(), state + around


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())
