"""Cells whose Jacobian is diagonal, or a 2×2 block per channel, by construction (ParaRNN, Danieli et al., 2025).

    ParaGRU    z = σ(a_z ∘ h + u_z),  r = σ(a_r ∘ h + u_r),  c = tanh(a_c ∘ (h ∘ r) + u_c),  h ← (1 − z) ∘ h + z ∘ c
    ParaLSTM   f = σ(a_f ∘ h + d_f ∘ c + u_f),  z = tanh(a_z ∘ h + u_z),  c ← f ∘ c + (1 − f) ∘ z
               o = σ(a_o ∘ h + d_o ∘ c + u_o),  h ← o ∘ tanh(c)

Channels do not see one another within a layer; they are mixed by the input matrices of the next. Every step of Newton's
method is then exact with a diagonal, and three or four iterations reach rounding error whatever the length, while the
gains |a|, |d| stay below about one half.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from reroll.cells.base import Layer
from reroll.cells.lstm import LSTMState


class ParaGRU(Layer):
    """A gated recurrent unit with one recurrent gain per channel and gate.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of the state.

    Example:
        >>> sum(p.numel() for p in ParaGRU(3, 5).parameters())
        75
    """

    gains: nn.Parameter

    def __init__(self, input_size: int, hidden_size: int):
        h = hidden_size
        super().__init__(input_size, h, weight_ih=(3 * h, input_size), bias=(3 * h,), gains=(3, h))

    def reset_parameters(self) -> None:
        """Draw input weights from N(0, 1/fan-in), gains from [−½, ½]; the biases are zero."""
        super().reset_parameters()
        nn.init.uniform_(self.gains, -0.5, 0.5)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        u_z, u_r, u_c = u.chunk(3, -1)
        a_z, a_r, a_c = self.gains.unbind(0)
        z, r = torch.sigmoid(u_z + a_z * state), torch.sigmoid(u_r + a_r * state)
        c = torch.tanh(u_c + a_c * (state * r))
        return (1 - z) * state + z * c


class ParaLSTM(Layer):
    """A long short-term memory cell with peepholes, coupled gates, and one recurrent gain per channel and gate.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of h and of c.

    Example:
        >>> sum(p.numel() for p in ParaLSTM(3, 5).parameters())
        85
    """

    gains: nn.Parameter
    peepholes: nn.Parameter

    def __init__(self, input_size: int, hidden_size: int):
        h = hidden_size
        super().__init__(input_size, h, weight_ih=(3 * h, input_size), bias=(3 * h,), gains=(3, h), peepholes=(2, h))

    def reset_parameters(self) -> None:
        """Draw input weights from N(0, 1/fan-in), gains and peepholes from [−½, ½]; the biases are zero."""
        super().reset_parameters()
        nn.init.uniform_(self.gains, -0.5, 0.5)
        nn.init.uniform_(self.peepholes, -0.5, 0.5)

    def init_state(self, batch_shape: Sequence[int]) -> LSTMState:
        zeros = self.bias.new_zeros(*batch_shape, self.hidden_size)
        return LSTMState(zeros, zeros)

    def step(self, u: Tensor, state: LSTMState) -> LSTMState:
        h, c = state
        u_f, u_z, u_o = u.chunk(3, -1)
        a_f, a_z, a_o = self.gains.unbind(0)
        d_f, d_o = self.peepholes.unbind(0)
        f, z = torch.sigmoid(u_f + a_f * h + d_f * c), torch.tanh(u_z + a_z * h)
        c = f * c + (1 - f) * z
        o = torch.sigmoid(u_o + a_o * h + d_o * c)
        return LSTMState(o * torch.tanh(c), c)

    def readout(self, state: LSTMState) -> Tensor:
        return state.h
