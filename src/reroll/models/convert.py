"""Cells from torch's LSTM and GRU modules, and back, weight by weight.

torch adds two bias vectors in an LSTM where one does the same; here they are summed on the way in, and one of them is
zero on the way out. A block-diagonal recurrence becomes a dense matrix with zeros outside the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reroll.cells.base import Cell
from reroll.cells.layers import GRU
from reroll.cells.lstm import LSTM
from reroll.cells.wrapped import is_as_torchs
from reroll.errors import UsageError

_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


@torch.no_grad()
def cells_from_torch(module: nn.LSTM | nn.GRU) -> tuple[Cell, ...]:
    """Return one cell per layer of the module; see `Recurrent.from_torch`."""
    if not isinstance(module, nn.LSTM | nn.GRU):
        raise UsageError(f"from_torch takes torch.nn.LSTM or torch.nn.GRU; got {type(module).__name__}.")
    if not is_as_torchs(module, (nn.LSTM, nn.GRU)):
        raise UsageError(
            f"from_torch: this {type(module).__name__} has a forward of its own, or hooks, which the weights do not "
            "show; remove them, or write it as a reroll.Cell."
        )
    for option in ("bidirectional", "proj_size", "dropout"):
        if value := getattr(module, option):
            raise UsageError(f"from_torch: {option}={value} has no counterpart here; use a module without it.")
    if not module.batch_first:
        raise UsageError(
            "from_torch: this module has batch_first=False, and a Recurrent reads [batch, time, features]. Set "
            "module.batch_first = True (the weights are the same) and give it inputs of that shape."
        )
    kind = LSTM if isinstance(module, nn.LSTM) else GRU
    cells = []
    for layer in range(module.num_layers):
        weights = {name: getattr(module, f"{name}_l{layer}", None) for name in _NAMES}
        zero = torch.zeros_like(getattr(module, f"weight_hh_l{layer}")[:, 0])
        weights = {name: zero if weight is None else weight for name, weight in weights.items()}
        if kind is LSTM:
            weights["bias"] = weights.pop("bias_ih") + weights.pop("bias_hh")
        cell = kind(weights["weight_ih"].shape[1], module.hidden_size).to(zero)
        for name, weight in weights.items():
            getattr(cell, name).copy_(weight)
        cells.append(cell)
    return tuple(cells)


@torch.no_grad()
def cells_to_torch(cells: tuple[Cell, ...], initial: bool) -> Any:
    """Return one torch module for all cells, and its initial state if asked for; see `Recurrent.to_torch`."""
    kinds, sizes = {type(cell) for cell in cells}, {cell.output_size for cell in cells}
    if len(kinds) != 1 or not kinds <= {LSTM, GRU} or len(sizes) != 1:
        names = ", ".join(f"{type(cell).__name__}({cell.input_size}, {cell.output_size})" for cell in cells)
        raise UsageError(f"to_torch needs cells that are all LSTM, or all GRU, of one hidden size; these are {names}.")
    first = cells[0]
    build = nn.LSTM if isinstance(first, LSTM) else nn.GRU
    module = build(first.input_size, first.output_size, num_layers=len(cells), batch_first=True)
    module.to(next(first.parameters()))
    for layer, cell in enumerate(cells):
        target = {name: getattr(module, f"{name}_l{layer}") for name in _NAMES}
        if isinstance(cell, LSTM):
            target["weight_ih"].copy_(_gate_major(cell.weight_ih, cell.heads))
            target["weight_hh"].copy_(_gate_major(_dense(cell), cell.heads))
            target["bias_ih"].copy_(_gate_major(cell.bias, cell.heads))
            target["bias_hh"].zero_()
        else:
            for name, parameter in target.items():
                parameter.copy_(getattr(cell, name))
    if not isinstance(first, LSTM):
        return (module, next(first.parameters()).new_zeros(len(cells), 1, first.output_size)) if initial else module
    state = _stack(cells, "h0"), _stack(cells, "c0")
    if not initial and any(tensor.any() for tensor in state):
        raise UsageError(
            "to_torch would lose the trained initial state (h0, c0 are not zero). "
            "Call to_torch(initial=True), which returns it beside the module."
        )
    return (module, state) if initial else module


def _gate_major(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows from head, gate, unit to gate, head, unit."""
    return rows.unflatten(0, (heads, 4, -1)).transpose(0, 1).flatten(0, 2)


def _dense(cell: LSTM) -> Tensor:
    """The recurrent matrix with its zeros, [4H, H], rows still by head."""
    heads, width = cell.heads, cell.weight_hh.shape[1]
    blocks = cell.weight_hh.unflatten(0, (heads, 4 * width))
    dense = cell.weight_hh.new_zeros(heads, 4 * width, heads, width)
    for n in range(heads):
        dense[n, :, n] = blocks[n]
    return dense.flatten(2).flatten(0, 1)


def _stack(cells: tuple[Cell, ...], name: str) -> Tensor:
    return torch.stack([getattr(cell, name).detach().clone() for cell in cells]).unsqueeze(1)
