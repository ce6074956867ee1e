"""One step of many rows and its Jacobian: by the step's structure where it can be followed, else by autograd.

    next, A = linearise(cell, layout, u, state, "diagonal")      u [rows, U], state [rows, D] → [rows, D] each

Structures: "diagonal" [rows, D], "block" [rows, K, K, C] (a K×K matrix for each of C channels, D = K·C), "dense"
[rows, D, D]. Cells are called on rows, never under vmap: torch's own cells are slow or fail there. What comes back lies
in memory feature by feature, and is fastest if u and the states do too (`feature_major`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from reroll.cells import pieces, tracked
from reroll.cells.base import Cell
from reroll.cells.layout import Layout
from reroll.errors import UsageError

Structure = Literal["diagonal", "block", "dense"]

Result = TypeVar("Result")

_untrackable: weakref.WeakKeyDictionary[Cell, str] = weakref.WeakKeyDictionary()
"""Cells whose step does something that cannot be followed, and what: tried once."""
OWN_DERIVATIVE = "its derivative is not that of its operations"


def step(cell: Cell, layout: Layout, u: Tensor, state: Tensor) -> Tensor:
    """Return the next state of rows: u [rows, U], state [rows, D] → [rows, D]."""
    return layout.pack(cell.step(u, layout.unpack(state)))


def feature_major(rows: Tensor) -> Tensor:
    """Return [rows, features] with the rows of a feature next to one another in memory."""
    return rows.T.contiguous().T


@torch.no_grad()
def advance(cell: Cell, layout: Layout, u: Tensor | tracked.Tracked, state: Tensor) -> Tensor:
    """Return what `step` returns, without a graph, feature-major where the step can be followed."""

    def followed() -> Tensor:
        after = cell.step(_inputs(u), layout.unpack(tracked.Tracked(state, (), moves=True)))
        return _joined(layout.parts(after))

    following = _followed(cell, followed)
    return step(cell, layout, tracked.value_of(u), state) if following is None else following


def leave_to_autograd(cell: Cell) -> None:
    """Say that the derivative of a cell's step is not that of its operations, but one of its own."""
    _untrackable[cell] = OWN_DERIVATIVE


def has_own_derivative(cell: Cell) -> bool:
    """Return whether that was said."""
    return _untrackable.get(cell) == OWN_DERIVATIVE


@torch.no_grad()
def followed_vjp(cell: Cell, layout: Layout, u: Tensor, state: Tensor, cotangent: Tensor) -> Tensor | None:
    """Return Aᵀ · cotangent for every row as the structure of the step gives it; None if it cannot be followed."""

    def followed() -> Tensor:
        parts = layout.parts(cell.step(_inputs(u), layout.unpack(tracked.Tracked.state(state))))
        return pieces.times_transposed(parts, cotangent.split(layout.sizes, -1))

    return _followed(cell, followed)


def why_untrackable(cell: Cell) -> str | None:
    """Return what in a cell's step hides its structure; None if it was followed, or not tried yet."""
    return _untrackable.get(cell)


@torch.no_grad()
def linearise(
    cell: Cell, layout: Layout, u: Tensor | tracked.Tracked, state: Tensor, structure: Structure, blocks: int = 1
) -> tuple[Tensor, Tensor]:
    """Return the next states and their Jacobian in a structure; see the module.

    Args:
        cell: the recurrence.
        layout: of its state.
        u: projected inputs, [rows, U]; `tracked.Tracked.inputs` of them where they come again.
        state: [rows, D].
        structure: what of the Jacobian is wanted.
        blocks: K, for "block"; must divide D.

    Raises:
        UsageError: if K does not divide D.
    """
    if structure == "block" and layout.size % blocks:
        raise UsageError(f"blocks={blocks} does not divide the {layout.size} numbers of the state.")
    found = _followed(cell, lambda: _by_structure(cell, layout, u, state, structure, blocks))
    return _by_autograd(cell, layout, tracked.value_of(u), state, structure, blocks) if found is None else found


def _by_structure(
    cell: Cell, layout: Layout, u: Tensor | tracked.Tracked, state: Tensor, structure: Structure, blocks: int
) -> tuple[Tensor, Tensor]:
    after = cell.step(_inputs(u), layout.unpack(tracked.Tracked.state(state)))
    parts = layout.parts(after)
    if structure == "diagonal":
        found = pieces.diagonal_of(parts, layout.sizes)
    elif structure == "dense":
        found = pieces.dense_of(parts, layout.size)
    elif len(parts) == blocks and len(set(layout.sizes)) == 1:
        found = pieces.blocks_of(parts, blocks)
    elif len(parts) == 1:
        found = pieces.blocks_of(parts[0].chunk(blocks, -1), blocks)
    else:
        width = layout.size // blocks
        dense = pieces.dense_of(parts, layout.size).unflatten(1, (blocks, width)).unflatten(0, (blocks, width))
        found = dense.diagonal(dim1=1, dim2=3).movedim(-1, 2)
    return _joined(parts), found.movedim(-1, 0)


def _inputs(u: Tensor | tracked.Tracked) -> Any:
    if not isinstance(u, tracked.Tracked):
        return tracked.Tracked(u, ())
    if u.tape is not None:
        u.tape.position = 0
    return u


def _joined(parts: tuple[Any, ...]) -> Tensor:
    values = [part.value if isinstance(part, tracked.Tracked) else part for part in parts]
    return values[0] if len(values) == 1 else torch.cat([value.T for value in values]).T


def _followed(cell: Cell, run: Callable[[], Result]) -> Result | None:
    """Return what a step on tracked values gives; None where it cannot be followed.

    An operation that cannot be followed is remembered. Any other error is taken to be of this call alone, such as want
    of memory: plain tensors are used for it, and a mistake in the step itself comes up again on them.
    """
    if cell in _untrackable:
        return None
    try:
        return run()
    except tracked.Untrackable as error:
        _untrackable[cell] = str(error)
    except (AttributeError, TypeError, IndexError, RuntimeError):
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
        gradients = (_row(following, leaf, i, retain=i + 1 < size) for i in range(size))
        if structure == "diagonal":
            found = torch.stack([row[:, i] for i, row in enumerate(gradients)], 1)
        elif structure == "block":
            width = size // blocks
            rows = [row[:, i % width :: width] for i, row in enumerate(gradients)]  # [rows, K]: same channel
            found = torch.stack(rows, 1).unflatten(1, (blocks, width)).transpose(-1, -2)
        else:
            found = torch.stack(list(gradients), 1)
    return following.detach(), found


def _row(following: Tensor, leaf: Tensor, index: int, retain: bool) -> Tensor:
    if not following.requires_grad:
        return torch.zeros_like(leaf)
    (row,) = torch.autograd.grad(following[:, index].sum(), leaf, retain_graph=retain, allow_unused=True)
    return torch.zeros_like(leaf) if row is None else row


@torch.no_grad()
def hutchinson(cell: Cell, layout: Layout, u: Tensor, state: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    """Return the next states and an unbiased estimate of the Jacobian's diagonal, v ∘ Aᵀv averaged over v = ±1.

    Args:
        cell, layout, u, state: as for `linearise`.
        signs: v, [m, rows, D].
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
    (found,) = torch.autograd.grad(following, leaf, cotangent, retain_graph=retain, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found
