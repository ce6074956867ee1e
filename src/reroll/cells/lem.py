"""The long expressive memory cell (Rusch et al., arXiv:2110.04744): two fields with time steps they set themselves.

Δ̄ = dt σ(u₁ + R₁ y)     Δ = dt σ(u₂ + R₂ y)
z ← (1 − Δ) z + Δ tanh(u_z + R_z y)
y ← (1 − Δ̄) y + Δ̄ tanh(W z + u_y)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Layer
from reroll.errors import require_positive


class LEMState(NamedTuple):
    """The two fields, [..., H] each."""

    y: Tensor
    z: Tensor


class LEM(Layer):
    """A long expressive memory cell; its readout is y.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of each field.
        dt: longest time step.

    Example:
        >>> LEM(3, 5).step(torch.zeros(2, 20), LEM(3, 5).init_state((2,))).y.shape
        torch.Size([2, 5])
    """

    weight_hh: nn.Parameter
    weight_z: nn.Parameter

    def __init__(self, input_size: int, hidden_size: int, dt: float = 1.0):
        require_positive(dt=dt)
        h = hidden_size
        super().__init__(
            input_size, h, weight_ih=(4 * h, input_size), weight_hh=(3 * h, h), weight_z=(h, h), bias=(4 * h,)
        )
        self.dt = dt

    def init_state(self, batch_shape: Sequence[int]) -> LEMState:
        zeros = self.bias.new_zeros(*batch_shape, self.hidden_size)
        return LEMState(zeros, zeros)

    def step(self, u: Tensor, state: LEMState) -> LEMState:
        y, z = state
        u_1, u_2, u_z, u_y = u.chunk(4, -1)
        v_1, v_2, v_z = functional.linear(y, self.weight_hh).chunk(3, -1)
        slow, fast = self.dt * torch.sigmoid(u_1 + v_1), self.dt * torch.sigmoid(u_2 + v_2)
        z = (1 - fast) * z + fast * torch.tanh(u_z + v_z)
        y = (1 - slow) * y + slow * torch.tanh(u_y + functional.linear(z, self.weight_z))
        return LEMState(y, z)

    def readout(self, state: LEMState) -> Tensor:
        return state.y
