"""The cells that rollouts are compared on, and torch's fused modules for the same recurrences."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells import Cell, cell_from


class Compared(NamedTuple):
    """A cell, and torch's fused module with the same weights, or None if it has none."""

    cell: Cell
    library: nn.RNNBase | None


def compared(size: int) -> dict[str, Compared]:
    """Return all cells, with states of `size`."""
    gru, lstm = nn.GRU(size, size, batch_first=True), nn.LSTM(size, size, batch_first=True)
    own = nn.GRUCell(size, size)
    like(gru, own)
    return {
        "user": Compared(written_by_a_user(own), gru),
        "GRUCell": Compared(cell_from(own, size), gru),
        "LSTMCell": Compared(cell_from(like(lstm, nn.LSTMCell(size, size)), size), lstm),
        "not writable": Compared(not_writable(nn.RNNCell(size, size)), None),
    }


def written_by_a_user(module: nn.GRUCell) -> Cell:
    """Return a module's GRU as a user would write it: plain operations, with the input projected in the step."""

    def step(u: Tensor, s: Tensor) -> Tensor:
        x_r, x_z, x_n = functional.linear(u, module.weight_ih, module.bias_ih).chunk(3, -1)
        h_r, h_z, h_n = functional.linear(s, module.weight_hh, module.bias_hh).chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + r * h_n)
        return n + z * (s - n)

    return cell_from(step, module.hidden_size, module=module)


def not_writable(module: nn.RNNCell) -> Cell:
    """Return a user's cell with an operation that programs lack, and a Jacobian without structure."""

    def step(u: Tensor, s: Tensor) -> Tensor:
        pre = functional.linear(u, module.weight_ih, module.bias_ih) + functional.linear(s, module.weight_hh)
        return torch.tanh(functional.layer_norm(pre, pre.shape[-1:]))

    return cell_from(step, module.hidden_size, module=module)


def like(library: nn.RNNBase, module: nn.Module) -> nn.Module:
    """Give a module the weights of torch's fused one."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(getattr(library, f"{name}_l0"))
    return module
