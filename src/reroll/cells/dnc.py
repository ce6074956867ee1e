"""An LSTM with a content-addressed memory: the "DNC" of arXiv:2505.17852 (of the family of Graves et al., 2014, 2016).

With N read heads, memory of M rows of W numbers, y the normalised hidden state and r the last read vectors:

    h, c ← LSTM(LN[x ; r])                  y = LN(h)
    w = σ(s) · softmax(LN(k_w) · LN(row))   write: rows ← rows ∘ (1 − w ⊗ σ(e)) + w ⊗ tanh(a)
    r_n = Σ softmax(LN(k_n) · LN(row)) row  read, with the memory just written
    readout = LN[y ; r]

where k_n, k_w, s, e, a are linear in y. There is no temperature, usage, or link: addressing is by content alone.

Content addressing gives equal rows equal weights, so a memory whose rows start identical keeps them identical for ever
and is one vector, whatever M. Here the rows start as a fixed buffer of different random rows, which are not trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Cell
from reroll.errors import require_positive
from reroll.kernels.lstm_scan.reference import gated
from reroll.kernels.noise_axpy import noise
from reroll.keys import Key


class DNCState(NamedTuple):
    """Controller state h, c [..., H], memory [..., M, W] and the last read vectors [..., N·W]."""

    h: Tensor
    c: Tensor
    memory: Tensor
    read: Tensor


class DNC(Cell):
    """An LSTM controller with a memory that is read and written by content.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of the controller.
        word_size: W, numbers in a memory row.
        memory_size: M, rows of the memory; adds no parameters.
        heads: N, vectors read at every step.

    Example:
        >>> sum(p.numel() for p in DNC(128, 128, word_size=128, memory_size=16).parameters())
        265857
    """

    def __init__(self, input_size: int, hidden_size: int, word_size: int, memory_size: int, heads: int = 1):
        super().__init__()
        require_positive(
            input_size=input_size, hidden_size=hidden_size, word_size=word_size, memory_size=memory_size, heads=heads
        )
        self.input_size, self.hidden_size, self.heads = input_size, hidden_size, heads
        self.word_size, self.memory_size = word_size, memory_size
        read = heads * word_size
        self.output_size = hidden_size + read
        self.input_norm = nn.LayerNorm(input_size + read)
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size + read))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(4 * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(4 * hidden_size))
        self.hidden_norm = nn.LayerNorm(hidden_size)
        self.read_key = nn.Linear(hidden_size, read)
        self.write_key = nn.Linear(hidden_size, word_size)
        self.write_strength = nn.Linear(hidden_size, 1)
        self.erase = nn.Linear(hidden_size, word_size)
        self.add = nn.Linear(hidden_size, word_size)
        self.read_key_norm = nn.LayerNorm(word_size)
        self.write_key_norm = nn.LayerNorm(word_size)
        self.row_norm = nn.LayerNorm(word_size)
        self.output_norm = nn.LayerNorm(self.output_size)
        self.register_buffer("rows", torch.empty(memory_size, word_size))
        self.rows: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights from N(0, 1/fan-in); biases are zero but for the forget gate's. Memory rows are constant."""
        for weight in [self.weight_ih, self.weight_hh, *(m.weight for m in self._linears())]:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        for bias in [self.bias_ih, self.bias_hh, *(m.bias for m in self._linears())]:
            nn.init.zeros_(bias)
        with torch.no_grad():
            self.bias_ih.view(4, -1)[1] = 1.0
            if not self.rows.is_meta:
                rows = noise(Key(0).at("DNC"), self.rows.shape, 0, "rows", kind="normal")
                self.rows.copy_(rows * self.word_size**-0.5)

    def _linears(self) -> tuple[nn.Linear, ...]:
        return self.read_key, self.write_key, self.write_strength, self.erase, self.add

    def init_state(self, batch_shape: Sequence[int]) -> DNCState:
        zeros = self.rows.new_zeros
        return DNCState(
            zeros(*batch_shape, self.hidden_size),
            zeros(*batch_shape, self.hidden_size),
            self.rows.expand(*batch_shape, -1, -1),
            zeros(*batch_shape, self.heads * self.word_size),
        )

    def step(self, u: Tensor, state: DNCState) -> DNCState:
        h, c, memory, read = state
        x = self.input_norm(torch.cat([u, read], -1))
        pre = functional.linear(x, self.weight_ih, self.bias_ih) + functional.linear(h, self.weight_hh, self.bias_hh)
        h, c = gated(pre, c)
        y = self.hidden_norm(h)

        write = self._address(self.write_key_norm(self.write_key(y)).unsqueeze(-2), memory)
        write = (write * torch.sigmoid(self.write_strength(y)).unsqueeze(-1)).transpose(-1, -2)
        erase, add = torch.sigmoid(self.erase(y)).unsqueeze(-2), torch.tanh(self.add(y)).unsqueeze(-2)
        memory = memory * (1 - write * erase) + write * add

        keys = self.read_key(y).unflatten(-1, (self.heads, self.word_size))
        read = (self._address(self.read_key_norm(keys), memory) @ memory).flatten(-2)
        return DNCState(h, c, memory, read)

    def _address(self, keys: Tensor, memory: Tensor) -> Tensor:
        """Attention of keys [..., n, W] over the rows, [..., n, M]."""
        return torch.softmax(keys @ self.row_norm(memory).transpose(-1, -2), -1)

    def readout(self, state: DNCState) -> Tensor:
        return self.output_norm(torch.cat([self.hidden_norm(state.h), state.read], -1))

    @property
    def step_floats(self) -> int:
        return self.input_size + self.output_size
