"""One step of many rows and its Jacobian: in closed form where the step can be tracked, else by autograd.

    next, A = linearise(cell, layout, u, state, "diagonal")      u [rows, U], state [rows, D] → [rows, D] each

Structures: "diagonal" [rows, D], "block" [rows, K, K, C] (a K×K matrix for each of C channels, D = K·C), "dense"
[rows, D, D]. Cells are called on rows, never under vmap: torch's own cells are slow or fail there. Results are
feature-major in memory, and computed fastest if u and the states are too (`feature_major`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from reroll.cells.base import Cell
from reroll.cells.layout import Layout
from reroll.cells.rules import product
from reroll.cells.tracked import Tracked, value_of
from reroll.errors import UsageError
from reroll.kernels.program.symbol import Untrackable

Structure = Literal["diagonal", "block", "dense"]

Result = TypeVar("Result")

_untrackable: weakref.WeakKeyDictionary[Cell, str] = weakref.WeakKeyDictionary()
"""Cells whose step does something that cannot be tracked, and what: tried once."""
MISTAKES = (AttributeError, TypeError, IndexError, RuntimeError, ValueError, AssertionError)
"""What a step may raise on arguments that do not fit, or on tracked values in place of tensors."""
OWN_DERIVATIVE = "its derivative is not that of its operations"
OTHER_VALUES = "it computes something else where its arguments are no tensors"


def step(cell: Cell, layout: Layout, u: Tensor, state: Tensor) -> Tensor:
    """Return the next state of rows: u [rows, U], state [rows, D] → [rows, D]."""
    return layout.pack(cell.step(u, layout.unpack(state)))


def feature_major(rows: Tensor) -> Tensor:
    """Return [rows, features] with the rows of a feature next to one another in memory."""
    return rows.T.contiguous().T


@torch.no_grad()
def advance(cell: Cell, layout: Layout, u: Tensor | Tracked, state: Tensor) -> Tensor:
    """Return what `step` returns, without a graph, feature-major where the step can be tracked."""

    def tracked() -> Tensor:
        after = cell.step(_inputs(u), layout.unpack(Tracked(state, moves=True)))
        return _joined(layout.parts(after))

    following = _run_tracked(cell, tracked)
    return step(cell, layout, value_of(u), state) if following is None else following


def leave_to_autograd(cell: Cell, reason: str) -> None:
    """Run a cell's step on tensors only, for `OWN_DERIVATIVE` or `OTHER_VALUES`."""
    _untrackable[cell] = reason


@torch.no_grad()
def tracked_vjp(cell: Cell, layout: Layout, u: Tensor, state: Tensor, cotangent: Tensor) -> Tensor | None:
    """Return Aᵀ · cotangent for every row by the tracked step; None if it cannot be tracked."""

    def tracked() -> Tensor:
        parts = layout.parts(cell.step(_inputs(u), layout.unpack(Tracked.state(state))))
        return times_transposed(parts, cotangent.split(layout.sizes, -1))

    return _run_tracked(cell, tracked)


def why_untrackable(cell: Cell) -> str | None:
    """Return what in a cell's step cannot be tracked; None if it was tracked, or not tried yet."""
    return _untrackable.get(cell)


@torch.no_grad()
def linearise(
    cell: Cell, layout: Layout, u: Tensor | Tracked, state: Tensor, structure: Structure, blocks: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the next states and their Jacobian in a structure; see the module.

    `u` are projected inputs, [rows, U], or `Tracked.inputs` of them if they are used again; `blocks` is K, for "block".

    Raises:
        UsageError: if K does not divide D.
    """
    if structure == "block" and layout.size % blocks:
        raise UsageError(f"blocks={blocks} does not divide the {layout.size} numbers of the state.")
    result = _run_tracked(cell, lambda: _by_structure(cell, layout, u, state, structure, blocks))
    return _by_autograd(cell, layout, value_of(u), state, structure, blocks) if result is None else result


def _by_structure(
    cell: Cell, layout: Layout, u: Tensor | Tracked, state: Tensor, structure: Structure, blocks: int
) -> tuple[Tensor, Tensor]:
    after = cell.step(_inputs(u), layout.unpack(Tracked.state(state)))
    parts = layout.parts(after)
    if structure == "diagonal":
        jacobian = diagonal_of(parts, layout.sizes)
    elif structure == "dense":
        jacobian = dense_of(parts, layout.size)
    elif len(parts) == blocks and len(set(layout.sizes)) == 1:
        jacobian = blocks_of(parts, blocks)
    elif len(parts) == 1:
        jacobian = blocks_of(parts[0].chunk(blocks, -1), blocks)
    else:
        width = layout.size // blocks
        dense = dense_of(parts, layout.size).unflatten(1, (blocks, width)).unflatten(0, (blocks, width))
        jacobian = dense.diagonal(dim1=1, dim2=3).movedim(-1, 2)
    return _joined(parts), jacobian.movedim(-1, 0)


def _inputs(u: Tensor | Tracked) -> Any:
    if not isinstance(u, Tracked):
        return Tracked(u)
    if u.tape is not None:
        u.tape.position = 0
    return u


def _joined(parts: tuple[Any, ...]) -> Tensor:
    values = [part.value if isinstance(part, Tracked) else part for part in parts]
    return values[0] if len(values) == 1 else torch.cat([value.T for value in values]).T


def _run_tracked(cell: Cell, run: Callable[[], Result]) -> Result | None:
    """Return the result of a step on tracked values; None where it cannot be tracked.

    An operation that cannot be tracked is remembered. Any other error, such as too little memory, is of this call only:
    plain tensors are used for it, and a mistake in the step itself is raised again there.
    """
    if cell in _untrackable:
        return None
    try:
        return run()
    except Untrackable as error:
        _untrackable[cell] = str(error)
    except MISTAKES:
        pass
    return None


def _by_autograd(
    cell: Cell, layout: Layout, u: Tensor, state: Tensor, structure: Structure, blocks: int
) -> tuple[Tensor, Tensor]:
    """D products with the transposed Jacobian: row i of all Jacobians is the gradient of Σ_rows s_i."""
    with torch.enable_grad():
        leaf = state.detach().requires_grad_()
        following = step(cell, layout, u.detach(), leaf)
        size = layout.size
        units = torch.eye(size, dtype=following.dtype, device=following.device)
        gradients = (vjp(following, leaf, e.repeat(len(leaf), 1), retain=i + 1 < size) for i, e in enumerate(units))
        if structure == "diagonal":
            jacobian = torch.stack([row[:, i] for i, row in enumerate(gradients)], 1)
        elif structure == "block":
            width = size // blocks
            rows = [row[:, i % width :: width] for i, row in enumerate(gradients)]  # [rows, K]: same channel
            jacobian = torch.stack(rows, 1).unflatten(1, (blocks, width)).transpose(-1, -2)
        else:
            jacobian = torch.stack(list(gradients), 1)
    return following.detach(), jacobian


@torch.no_grad()
def hutchinson(cell: Cell, layout: Layout, u: Tensor, state: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next states and an unbiased estimate of the Jacobian's diagonal: v ∘ Aᵀv, averaged over `signs`.

    v is ±1, [m, rows, D]; the rest is as for `linearise`.
    """
    with torch.enable_grad():
        leaf = state.detach().requires_grad_()
        following = step(cell, layout, u.detach(), leaf)
        total = torch.zeros_like(leaf)
        for i, v in enumerate(signs):
            total = total + v * vjp(following, leaf, v, retain=i + 1 < len(signs))
    return following.detach(), total.detach() / len(signs)


def vjp(following: Tensor, leaf: Tensor, cotangent: Tensor, retain: bool) -> Tensor:
    """Return Aᵀ · cotangent for every row, from a step evaluated on `leaf`."""
    if not following.requires_grad:
        return torch.zeros_like(leaf)
    (product,) = torch.autograd.grad(following, leaf, cotangent, retain_graph=retain, allow_unused=True)
    return torch.zeros_like(leaf) if product is None else product


# ---- a Jacobian from the terms that the new state carries; results are feature-major, rows last


def diagonal_of(parts: Sequence[Any], sizes: Sequence[int]) -> Tensor:
    """Return the diagonal of the Jacobian, [D, rows], of a new state in parts [rows, size]."""
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    return torch.cat([band(p, torch.arange(b, b + size)).T for p, b, size in zip(parts, begins, sizes)])


def blocks_of(parts: Sequence[Any], count: int) -> Tensor:
    """Return the derivatives of feature c of part k by feature c of part l, [K, K, C, rows]; all parts are equal."""
    columns = torch.arange(parts[0].shape[-1] * count).chunk(count)
    return torch.stack([torch.stack([band(part, c).T for c in columns]) for part in parts])


def band(part: Any, columns: Tensor) -> Any:
    """Return ∂v_c/∂s_{columns[c]} for every feature c of a part, [rows, C]."""
    if not isinstance(part, Tracked):
        return torch.zeros_like(part)
    features, total = torch.arange(part.shape[-1]), None
    for p in part.terms:
        if p.inner is not None:
            # Σ_p L[c, p] β_p W[p, c]: one product for all rows; β is there wherever the weight is
            entries = product(p.inner.alpha, p.inner.weight[columns] * p.weight.T, None)  # type: ignore[arg-type]: tensors here
            entries = entries if p.alpha is None else p.alpha * entries
            total = entries if total is None else total + entries
            continue
        factor = p.weight[columns, features]
        if p.alpha is None:
            total = torch.ones_like(part.value) * factor if total is None else total + factor
        else:
            total = p.alpha * factor if total is None else torch.addcmul(total, p.alpha, factor)
    return torch.zeros_like(part.value) if total is None else total


def times_transposed(parts: Sequence[Any], cotangents: Sequence[Tensor]) -> Tensor:
    """Return Aᵀ · cotangent for every row, [rows, D]; cotangents are in parts [rows, size], as the state is."""
    total = torch.zeros_like(torch.cat(list(cotangents), -1))
    for part, v in zip(parts, cotangents):
        for term in part.terms if isinstance(part, Tracked) else ():
            back, p = v, term
            while p is not None:
                back, p = (back if p.alpha is None else back * p.alpha) @ p.weight.T, p.inner
            total = total + back
    return total


def dense_of(parts: Sequence[Any], size: int) -> Tensor:
    """Return the Jacobian, [D, D, rows]: entry [i, j] is the derivative of s_i by the old s_j."""
    return torch.cat([_dense(part, size) for part in parts])


def _dense(part: Any, size: int) -> Tensor:
    rows, features = part.shape
    total: Tensor | None = None
    for p in part.terms if isinstance(part, Tracked) else ():
        if p.inner is not None:
            # Σ_p L[i, p] β_p W[p, j], a product over p of all pairs (i, j)
            assert p.inner.alpha is not None
            pairs = (p.weight.T.unsqueeze(1) * p.inner.weight.unsqueeze(0)).flatten(0, 1)
            matrix = (pairs @ p.inner.alpha.T).unflatten(0, (features, size))
        else:
            matrix = p.weight.T.unsqueeze(-1)
        if p.alpha is None:
            total = matrix.expand(-1, -1, rows).clone() if total is None else total.add_(matrix)
        elif total is None:
            total = p.alpha.T.unsqueeze(1) * matrix
        else:
            total.addcmul_(p.alpha.T.unsqueeze(1), matrix)
    return value_of(part).new_zeros(features, size, rows) if total is None else total
