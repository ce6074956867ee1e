"""Gated cells with as little recurrence as possible.

MinGRU     h ← (1 − z) ∘ h + z ∘ (W_h x + b_h),  z = σ(W_z x + b_z)         linear in h (Feng et al., arXiv:2410.01201)
MinRNN     z = tanh(W x + b),  u = σ(R h + U z + c),  h ← u ∘ h + (1 − u) ∘ z    (Chen, arXiv:1711.06788)
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Layer


class MinGRU(Layer):
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
        super().__init__(input_size, hidden_size, weight_ih=(2 * hidden_size, input_size), bias=(2 * hidden_size,))

    def project(self, inputs: Tensor) -> Tensor:
        """Return 1 − z and z ∘ candidate: nothing else of the inputs enters the step."""
        gate, candidate = functional.linear(inputs, self.weight_ih, self.bias).chunk(2, -1)
        z = torch.sigmoid(gate)
        return torch.cat([1 - z, z * candidate], -1)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        keep, new = u.chunk(2, -1)
        return keep * state + new


class MinRNN(Layer):
    """A cell with one gate that sees the state.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of the state.

    Example:
        >>> sum(p.numel() for p in MinRNN(3, 5).parameters())
        75
    """

    weight_hh: nn.Parameter
    weight_zh: nn.Parameter
    bias_gate: nn.Parameter
    stepwise = True

    def __init__(self, input_size: int, hidden_size: int):
        h = hidden_size
        super().__init__(
            input_size, h, weight_ih=(h, input_size), weight_hh=(h, h), weight_zh=(h, h), bias=(h,), bias_gate=(h,)
        )

    def project(self, inputs: Tensor) -> Tensor:
        z = torch.tanh(functional.linear(inputs, self.weight_ih, self.bias))
        return torch.cat([z, functional.linear(z, self.weight_zh, self.bias_gate)], -1)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        z, gate = u.chunk(2, -1)
        keep = torch.sigmoid(gate + functional.linear(state, self.weight_hh))
        return keep * state + (1 - keep) * z
