"""The plain recurrent cell: h_t = tanh(W_in x_t + R h_{t−1} + b)  (Elman, 1990)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Cell
from reroll.cells.library import by_library
from reroll.errors import require_positive


class RNN(Cell):
    """h_t = tanh(W_in x_t + R h_{t−1} + b).

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of the state.

    Example:
        >>> sum(p.numel() for p in RNN(3, 5).parameters())
        45
    """

    stepwise = True

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        require_positive(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 1/fan-in); the bias is zero."""
        nn.init.normal_(self.weight_ih, std=self.input_size**-0.5)
        nn.init.normal_(self.weight_hh, std=self.hidden_size**-0.5)
        nn.init.zeros_(self.bias)

    def init_state(self, batch_shape: Sequence[int]) -> Tensor:
        return self.bias.new_zeros(*batch_shape, self.hidden_size)

    def project(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight_ih, self.bias)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(u + functional.linear(state, self.weight_hh))

    def fused(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor] | None:
        weights = (self.weight_ih, self.weight_hh, self.bias, torch.zeros_like(self.bias))
        return by_library("rnn", inputs, state, weights)
