"""The long short-term memory cell, with block-diagonal heads (Hochreiter and Schmidhuber, 1997; arXiv:2505.17852).

    pre = W_in x + R h + b                  gates in the order i, f, z, o
    c ← σ(f) ∘ c + σ(i) ∘ tanh(z)
    h ← σ(o) ∘ tanh(c)

With N heads, R is block-diagonal: a head of width D = H/N sees only its own part of h. One head is the ordinary LSTM.
The initial h and c are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Cell
from reroll.errors import UsageError, require_positive
from reroll.kernels.lstm_scan import lstm_scan
from reroll.kernels.lstm_scan.reference import step


class LSTMState(NamedTuple):
    """Hidden and cell state, [..., H] each."""

    h: Tensor
    c: Tensor


class LSTM(Cell):
    """A long short-term memory cell.

    Parameters are ordered by head, then gate (i, f, z, o), then unit: `weight_ih` [4H, E], `weight_hh` [4H, D],
    `bias` [4H], and the initial state `h0`, `c0` [H]. With one head this is torch's own order.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of h and of c.
        heads: N, blocks of the recurrent matrix; must divide H.

    Raises:
        UsageError: if a size is not positive or `heads` does not divide `hidden_size`.

    Example:
        >>> sum(p.numel() for p in LSTM(100, 240, heads=12).parameters())
        116640
    """

    has_kernel = True

    stepwise = True

    def __init__(self, input_size: int, hidden_size: int, heads: int = 1):
        super().__init__()
        require_positive(input_size=input_size, hidden_size=hidden_size, heads=heads)
        if hidden_size % heads:
            raise UsageError(f"hidden_size={hidden_size} is not divisible by heads={heads}; choose a divisor of it.")
        self.input_size, self.hidden_size, self.output_size, self.heads = input_size, hidden_size, hidden_size, heads
        width = hidden_size // heads
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, width))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size))
        self.h0 = nn.Parameter(torch.empty(hidden_size))
        self.c0 = nn.Parameter(torch.empty(hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 1/fan-in); biases are zero but for the forget gate's, which is one."""
        nn.init.normal_(self.weight_ih, std=self.input_size**-0.5)
        nn.init.normal_(self.weight_hh, std=(self.hidden_size // self.heads) ** -0.5)
        nn.init.zeros_(self.h0)
        nn.init.zeros_(self.c0)
        with torch.no_grad():
            self.bias.zero_().unflatten(0, (self.heads, 4, -1))[:, 1] = 1.0

    def init_state(self, batch_shape: Sequence[int]) -> LSTMState:
        return LSTMState(self.h0.expand(*batch_shape, -1), self.c0.expand(*batch_shape, -1))

    def project(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight_ih, self.bias)

    def step(self, u: Tensor, state: LSTMState) -> LSTMState:
        return LSTMState(*step(u, self.weight_hh, *state))

    def readout(self, state: LSTMState) -> Tensor:
        return state.h

    def fused(self, inputs: Tensor, state: LSTMState) -> tuple[Tensor, LSTMState]:
        outputs, h, c = lstm_scan(inputs, self.weight_ih, self.weight_hh, self.bias, *state)
        return outputs, LSTMState(h, c)

    @property
    def step_floats(self) -> int:
        # Several heads are run one after another: only inputs and outputs (in two layouts) live for a whole window.
        return self.input_size + self.hidden_size * (5 if self.heads == 1 else 2)
