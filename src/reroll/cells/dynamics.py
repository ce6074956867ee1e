"""Recurrences from outside machine learning, as cells: what the experiments on parallel evaluation run.

MeanField      s ← W tanh(s) + u,  W_ij ~ N(0, g²/D), no self-connection: chaotic for large gain g
ARGRU          a generator that feeds its own output back: x ← μ(h) + softplus(ς(h)) u, h ← GRU(x, h)
Lorenz96       dx_i/dt = (x_{i+1} − x_{i−2}) x_{i−1} − x_i + F, one Runge–Kutta step: chaotic for F = 8
TwoWell        Langevin dynamics in a mixture of two Gaussians: s ← s − ε ∇U(s) + √(2ε) u
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Cell
from reroll.cells.layers import gated
from reroll.errors import UsageError, require_positive


class MeanField(Cell):
    """A random network of rate units; the inputs are added to it.

    Args:
        size: D.
        gain: g; the recurrence forgets below about 1.2 and is chaotic above.
    """

    def __init__(self, size: int, gain: float):
        super().__init__()
        require_positive(size=size, gain=gain)
        self.input_size = self.output_size = size
        self.weight = nn.Parameter(torch.randn(size, size) * gain * size**-0.5)
        with torch.no_grad():
            self.weight.fill_diagonal_(0.0)

    def init_state(self, batch_shape: Sequence[int]) -> Tensor:
        return self.weight.new_zeros(*batch_shape, self.output_size)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        return functional.linear(torch.tanh(state), self.weight) + u


class ARState(NamedTuple):
    """The last output [..., 1] and the hidden state [..., H]."""

    x: Tensor
    h: Tensor


class ARGRU(Cell):
    """A GRU that generates a series: the input of a step is noise, its readout the next value.

    h ← GRU(x, h),   (μ, ς) = W (h + x) + b,   x ← μ + softplus(ς) · u

    Args:
        hidden_size: H, features of the GRU.
    """

    def __init__(self, hidden_size: int = 3):
        super().__init__()
        require_positive(hidden_size=hidden_size)
        self.input_size = self.output_size = 1
        self.hidden_size = hidden_size
        self.weight_ih = nn.Parameter(torch.randn(3 * hidden_size, 1))
        self.weight_hh = nn.Parameter(torch.randn(3 * hidden_size, hidden_size) * hidden_size**-0.5)
        self.bias = nn.Parameter(torch.zeros(3 * hidden_size))
        self.bias_new = nn.Parameter(torch.zeros(hidden_size))
        self.decode = nn.Linear(hidden_size, 2)
        nn.init.normal_(self.decode.weight, std=0.1 * math.sqrt(2 / (hidden_size + 2)))
        nn.init.zeros_(self.decode.bias)

    def init_state(self, batch_shape: Sequence[int]) -> ARState:
        zeros = self.bias.new_zeros
        return ARState(zeros(*batch_shape, 1), zeros(*batch_shape, self.hidden_size))

    def step(self, u: Tensor, state: ARState) -> ARState:
        mean, spread, h = self.predict(state)
        return ARState(mean + spread * u, h)

    def predict(self, state: ARState) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean and standard deviation of the next value, [..., 1] each, and the next hidden state."""
        x, h = state
        u = functional.linear(x, self.weight_ih, self.bias)
        v = functional.linear(h, self.weight_hh) + functional.pad(self.bias_new, (2 * self.hidden_size, 0))
        h = gated(u, v, h)
        mean, spread = self.decode(h + x).chunk(2, -1)
        return mean, functional.softplus(spread), h

    def readout(self, state: ARState) -> Tensor:
        return state.x


class Lorenz96(Cell):
    """The Lorenz-96 system by one step of the classical Runge–Kutta method; it ignores its inputs.

    Args:
        size: D, at least 4.
        forcing: F; 8 is chaotic.
        dt: time of a step.
    """

    def __init__(self, size: int = 5, forcing: float = 8.0, dt: float = 0.01):
        super().__init__()
        if size < 4:
            raise UsageError(f"size={size} must be at least 4: a site has three neighbours.")
        require_positive(dt=dt)
        self.input_size, self.output_size, self.forcing, self.dt = 1, size, forcing, dt

    def init_state(self, batch_shape: Sequence[int]) -> Tensor:
        return torch.full((*batch_shape, self.output_size), self.forcing)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        k_1 = self._rate(state)
        k_2 = self._rate(state + 0.5 * self.dt * k_1)
        k_3 = self._rate(state + 0.5 * self.dt * k_2)
        k_4 = self._rate(state + self.dt * k_3)
        return state + self.dt / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)

    def _rate(self, x: Tensor) -> Tensor:
        return (x.roll(-1, -1) - x.roll(2, -1)) * x.roll(1, -1) - x + self.forcing


class TwoWell(Cell):
    """Langevin dynamics in U = −log Σ_k w_k N(s; m_k, diag v_k); the inputs are standard normal noise [..., 2].

    Args:
        epsilon: ε, the time step.
    """

    def __init__(self, epsilon: float = 0.01):
        super().__init__()
        require_positive(epsilon=epsilon)
        self.input_size = self.output_size = 2
        self.epsilon = epsilon
        self.register_buffer("means", torch.tensor([[-1.4, 0.0], [1.6, 0.0]]))
        self.register_buffer("variances", torch.tensor([[0.45, 0.45], [0.54, 0.45]]))
        self.register_buffer("log_weights", torch.tensor([0.49, 0.51]).log())
        self.means: Tensor
        self.variances: Tensor
        self.log_weights: Tensor

    def init_state(self, batch_shape: Sequence[int]) -> Tensor:
        return self.means.new_zeros(*batch_shape, 2)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        return state + self.epsilon * self._score(state) + math.sqrt(2 * self.epsilon) * u

    def _score(self, s: Tensor) -> Tensor:
        """−∇U: the pull of each well, weighted by its share of the density at s."""
        logs = [
            self.log_weights[k] - 0.5 * ((s - self.means[k]) ** 2 / self.variances[k] + self.variances[k].log()).sum(-1)
            for k in (0, 1)
        ]
        share = torch.sigmoid(logs[0] - logs[1]).unsqueeze(-1)
        pulls = [(self.means[k] - s) / self.variances[k] for k in (0, 1)]
        return share * pulls[0] + (1 - share) * pulls[1]
