"""Gated cells with as little recurrence as possible.

MinGRU     h ← (1 − z) ∘ h + z ∘ (W_h x + b_h),  z = σ(W_z x + b_z)         linear in h (Feng et al., arXiv:2410.01201)
MinRNN     z = tanh(W x + b),  u = σ(R h + U z + c),  h ← u ∘ h + (1 − u) ∘ z    (Chen, arXiv:1711.06788)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Cell
from reroll.errors import require_positive


class MinGRU(Cell):
    """A gated recurrent unit whose gate and candidate do not see the state: linear, and so solved in one iteration.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of the state.

    Example:
        >>> sum(p.numel() for p in MinGRU(3, 5).parameters())
        40
    """

    stepwise = True

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        require_positive(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(2 * hidden_size, input_size))
        self.bias = nn.Parameter(torch.empty(2 * hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 1/fan-in); the biases are zero."""
        nn.init.normal_(self.weight_ih, std=self.input_size**-0.5)
        nn.init.zeros_(self.bias)

    def init_state(self, batch_shape: Sequence[int]) -> Tensor:
        return self.bias.new_zeros(*batch_shape, self.hidden_size)

    def project(self, inputs: Tensor) -> Tensor:
        """Return 1 − z and z ∘ candidate: nothing else of the inputs enters the step."""
        gate, candidate = functional.linear(inputs, self.weight_ih, self.bias).chunk(2, -1)
        z = torch.sigmoid(gate)
        return torch.cat([1 - z, z * candidate], -1)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        keep, new = u.chunk(2, -1)
        return keep * state + new


class MinRNN(Cell):
    """A cell with one gate that sees the state.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of the state.

    Example:
        >>> sum(p.numel() for p in MinRNN(3, 5).parameters())
        75
    """

    stepwise = True

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        require_positive(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, hidden_size
        self.weight_ih = nn.Parameter(torch.empty(hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.weight_zh = nn.Parameter(torch.empty(hidden_size, hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))
        self.bias_gate = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 1/fan-in); the biases are zero."""
        for weight in (self.weight_ih, self.weight_hh, self.weight_zh):
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.bias_gate)

    def init_state(self, batch_shape: Sequence[int]) -> Tensor:
        return self.bias.new_zeros(*batch_shape, self.hidden_size)

    def project(self, inputs: Tensor) -> Tensor:
        z = torch.tanh(functional.linear(inputs, self.weight_ih, self.bias))
        return torch.cat([z, functional.linear(z, self.weight_zh, self.bias_gate)], -1)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        z, gate = u.chunk(2, -1)
        keep = torch.sigmoid(gate + functional.linear(state, self.weight_hh))
        return keep * state + (1 - keep) * z
