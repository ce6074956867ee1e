"""The Jacobian of a step from the pieces that its new state carries (`tracked.py`): diagonal, blocks or all of it.

Results lie feature-major: the rows come last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reroll.cells.rules import product
from reroll.cells.tracked import Tracked


def diagonal_of(parts: Sequence[Any], sizes: Sequence[int]) -> Tensor:
    """Return the diagonal of the Jacobian, [D, rows], of a new state given by its parts [rows, size]."""
    begin, found = 0, []
    for part, size in zip(parts, sizes):
        found.append(band(part, torch.arange(begin, begin + size)).T)
        begin += size
    return torch.cat(found)


def blocks_of(parts: Sequence[Any], count: int) -> Tensor:
    """Return the derivatives of feature c of part k by feature c of part l, [K, K, C, rows]; all parts are equal."""
    width = parts[0].shape[-1]
    columns = [torch.arange(width * other, width * (other + 1)) for other in range(count)]
    return torch.stack([torch.stack([band(part, c).T for c in columns]) for part in parts])


def band(part: Any, columns: Tensor) -> Any:
    """Return ∂v_c/∂s_{columns[c]} for every feature c of a part, [rows, C]."""
    if not isinstance(part, Tracked):
        return torch.zeros_like(part)
    features, total = torch.arange(part.shape[-1]), None
    for t in part.terms:
        total = _accumulate(total, t.alpha, t.weight[columns, features], part.value)
    for c in part.chains:
        assert c.inner.alpha is not None
        # Σ_p L[c, p] α_p W[p, c]: one product for all rows
        entries = product(c.inner.alpha, c.inner.weight[columns] * c.outer.T, None)
        entries = entries if c.beta is None else c.beta * entries
        total = entries if total is None else total + entries
    return torch.zeros_like(part.value) if total is None else total


def _accumulate(total: Any, alpha: Any, factor: Tensor, like: Any) -> Any:
    if alpha is None:
        return torch.ones_like(like) * factor if total is None else total + factor
    return alpha * factor if total is None else torch.addcmul(total, alpha, factor)


def times_transposed(parts: Sequence[Any], cotangents: Sequence[Tensor]) -> Tensor:
    """Return Aᵀ · cotangent for every row, [rows, D], of cotangents given by parts [rows, size] as the state is."""
    total: Tensor | None = None
    for part, v in zip(parts, cotangents):
        for t in part.terms if isinstance(part, Tracked) else ():
            found = (v if t.alpha is None else v * t.alpha) @ t.weight.T
            total = found if total is None else total + found
        for c in part.chains if isinstance(part, Tracked) else ():
            assert c.inner.alpha is not None
            found = (((v if c.beta is None else v * c.beta) @ c.outer.T) * c.inner.alpha) @ c.inner.weight.T
            total = found if total is None else total + found
    return torch.zeros_like(torch.cat(list(cotangents), -1)) if total is None else total


def dense_of(parts: Sequence[Any], size: int) -> Tensor:
    """Return the Jacobian, [D, D, rows]: entry [i, j] is the derivative of s_i by the old s_j."""
    return torch.cat([_dense(part, size) for part in parts])


def _dense(part: Any, size: int) -> Tensor:
    rows, features = part.shape
    if not isinstance(part, Tracked):
        return part.new_zeros(features, size, rows)
    total: Tensor | None = None
    for t in part.terms:
        matrix = t.weight.T.unsqueeze(-1)
        if t.alpha is None:
            total = matrix.expand(-1, -1, rows).clone() if total is None else total.add_(matrix)
        elif total is None:
            total = t.alpha.T.unsqueeze(1) * matrix
        else:
            total.addcmul_(t.alpha.T.unsqueeze(1), matrix)
    for c in part.chains:
        assert c.inner.alpha is not None
        # Σ_p L[i, p] α_p W[p, j], a product over p of all pairs (i, j)
        pairs = (c.outer.T.unsqueeze(1) * c.inner.weight.unsqueeze(0)).flatten(0, 1)
        matrix = (pairs @ c.inner.alpha.T).unflatten(0, (features, size))
        matrix = matrix if c.beta is None else c.beta.T.unsqueeze(1) * matrix
        total = matrix if total is None else total.add_(matrix)
    return part.value.new_zeros(features, size, rows) if total is None else total
