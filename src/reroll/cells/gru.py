"""The gated recurrent unit, in the form torch and cuDNN compute (Cho et al., arXiv:1406.1078).

r = σ(W_r x + b_r + R_r h + c_r)        z = σ(W_z x + b_z + R_z h + c_z)
n = tanh(W_n x + b_n + r ∘ (R_n h + c_n))
h ← (1 − z) ∘ n + z ∘ h
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Layer
from reroll.cells.library import by_library


class GRU(Layer):
    """A gated recurrent unit with torch's gate order (r, z, n) and its two biases.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of the state.

    Example:
        >>> sum(p.numel() for p in GRU(3, 5).parameters())
        150
    """

    weight_hh: nn.Parameter
    bias_ih: nn.Parameter
    bias_hh: nn.Parameter
    stepwise = True

    def __init__(self, input_size: int, hidden_size: int):
        h, gates = hidden_size, 3 * hidden_size
        super().__init__(
            input_size, h, weight_ih=(gates, input_size), weight_hh=(gates, h), bias_ih=(gates,), bias_hh=(gates,)
        )

    def project(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight_ih, self.bias_ih)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        return gated(u, functional.linear(state, self.weight_hh, self.bias_hh), state)

    def fused(self, inputs: Tensor, state: Tensor) -> tuple[Tensor, Tensor] | None:
        return by_library("gru", inputs, state, (self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh))


def gated(u: Tensor, v: Tensor, h: Tensor) -> Tensor:
    """Return the state after h: u = W x + b and v = R h + c, [..., 3H] each."""
    u_r, u_z, u_n = u.chunk(3, -1)
    v_r, v_z, v_n = v.chunk(3, -1)
    r, z = torch.sigmoid(u_r + v_r), torch.sigmoid(u_z + v_z)
    n = torch.tanh(u_n + r * v_n)
    return (1 - z) * n + z * h
