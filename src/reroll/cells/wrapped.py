"""torch's own `RNNCell`, `GRUCell` and `LSTMCell` as cells: the same parameters, the step written in operations.

The modules stay the owners of their weights, so whoever trains the cell trains the module. Written out, a step can be
projected ahead, linearised by its structure, and mapped; torch's kernels for one step allow none of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Cell
from reroll.cells.library import by_library
from reroll.cells.lstm import LSTMState
from reroll.kernels.lstm_scan import lstm_scan


class Wrapped(Cell):
    """A torch cell of any of the three kinds.

    Example:
        >>> module = nn.GRUCell(3, 5)
        >>> cell, x, h = Wrapped(module), torch.randn(2, 3), torch.randn(2, 5)
        >>> torch.allclose(cell.step(cell.project(x), h), module(x, h), atol=1e-6)
        True
    """

    stepwise = True

    def __init__(self, module: nn.RNNCellBase):
        super().__init__()
        self.module = module
        self.input_size, self.output_size = module.input_size, module.hidden_size

    def init_state(self, batch_shape: Sequence[int]) -> Tensor | LSTMState:
        zeros = self.module.weight_hh.new_zeros(*batch_shape, self.output_size)
        return LSTMState(zeros, zeros) if isinstance(self.module, nn.LSTMCell) else zeros

    def project(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.module.weight_ih, self.module.bias_ih)

    def step(self, u: Tensor, state: Any) -> Any:
        h = state[0] if isinstance(self.module, nn.LSTMCell) else state
        v = functional.linear(h, self.module.weight_hh, self.module.bias_hh)
        if isinstance(self.module, nn.GRUCell):
            u_r, u_z, u_n = u.chunk(3, -1)
            v_r, v_z, v_n = v.chunk(3, -1)
            r, z = torch.sigmoid(u_r + v_r), torch.sigmoid(u_z + v_z)
            n = torch.tanh(u_n + r * v_n)
            return (1 - z) * n + z * h
        if isinstance(self.module, nn.LSTMCell):
            i, f, g, o = (u + v).chunk(4, -1)
            c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
            return LSTMState(torch.sigmoid(o) * torch.tanh(c), c)
        return (torch.tanh if self.module.nonlinearity == "tanh" else torch.relu)(u + v)

    def fused(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any] | None:
        m = self.module
        if isinstance(m, nn.LSTMCell):
            bias = m.bias_ih + m.bias_hh if m.bias else m.weight_ih.new_zeros(4 * m.hidden_size)
            outputs, h, c = lstm_scan(inputs, m.weight_ih, m.weight_hh, bias, *state)
            return outputs, LSTMState(h, c)
        operation = "gru" if isinstance(m, nn.GRUCell) else "rnn" if m.nonlinearity == "tanh" else "rnn_relu"
        return by_library(operation, inputs, state, (m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh))

    @property
    def has_kernel(self) -> bool:
        return isinstance(self.module, nn.LSTMCell)

    def readout(self, state: Any) -> Tensor:
        return state[0] if isinstance(self.module, nn.LSTMCell) else state
