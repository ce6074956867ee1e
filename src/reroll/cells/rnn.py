"""The plain recurrent cell: h_t = tanh(W_in x_t + R h_{t−1} + b)  (Elman, 1990)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Layer
from reroll.cells.library import by_library


class RNN(Layer):
    """h_t = tanh(W_in x_t + R h_{t−1} + b).

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of the state.

    Example:
        >>> sum(p.numel() for p in RNN(3, 5).parameters())
        45
    """

    weight_hh: nn.Parameter

    def __init__(self, input_size: int, hidden_size: int):
        h = hidden_size
        super().__init__(input_size, h, weight_ih=(h, input_size), weight_hh=(h, h), bias=(h,))

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(u + functional.linear(state, self.weight_hh))

    def fused(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor] | None:
        weights = (self.weight_ih, self.weight_hh, self.bias, torch.zeros_like(self.bias))
        return by_library("rnn", inputs, state, weights)
