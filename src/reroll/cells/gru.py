"""The gated recurrent unit, in the form torch and cuDNN compute (Cho et al., arXiv:1406.1078).

r = σ(W_r x + b_r + R_r h + c_r)        z = σ(W_z x + b_z + R_z h + c_z)
n = tanh(W_n x + b_n + r ∘ (R_n h + c_n))
h ← (1 − z) ∘ n + z ∘ h
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Cell
from reroll.cells.library import by_library
from reroll.errors import require_positive


class GRU(Cell):
    """A gated recurrent unit with torch's gate order (r, z, n) and its two biases.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of the state.

    Example:
        >>> sum(p.numel() for p in GRU(3, 5).parameters())
        150
    """

    stepwise = True

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        require_positive(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(3 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(3 * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(3 * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(3 * hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 1/fan-in); the biases are zero."""
        nn.init.normal_(self.weight_ih, std=self.input_size**-0.5)
        nn.init.normal_(self.weight_hh, std=self.hidden_size**-0.5)
        nn.init.zeros_(self.bias_ih)
        nn.init.zeros_(self.bias_hh)

    def init_state(self, batch_shape: Sequence[int]) -> Tensor:
        return self.bias_hh.new_zeros(*batch_shape, self.hidden_size)

    def project(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight_ih, self.bias_ih)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        u_r, u_z, u_n = u.chunk(3, -1)
        v_r, v_z, v_n = functional.linear(state, self.weight_hh, self.bias_hh).chunk(3, -1)
        r, z = torch.sigmoid(u_r + v_r), torch.sigmoid(u_z + v_z)
        n = torch.tanh(u_n + r * v_n)
        return (1 - z) * n + z * state

    def fused(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor] | None:
        return by_library("gru", inputs, state, (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh))
