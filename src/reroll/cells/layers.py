"""Recurrent cells of the literature: plain, gated, minimal, and with a diagonal Jacobian."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Cell, State
from reroll.cells.lstm import LSTMState
from reroll.errors import require_positive
from reroll.kernels import dispatch


class Layer(Cell):
    """Base class of these cells: two sizes, an input matrix, and the initialisation of the weights.

    Args:
        input_size: E, features of the input.
        hidden_size: H, features of the state.
        shapes: of the parameters, by name, in order.
    """

    weight_ih: nn.Parameter
    bias: nn.Parameter
    stepwise = True

    def __init__(self, input_size: int, hidden_size: int, **shapes: tuple[int, ...]):
        super().__init__()
        require_positive(input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.output_size = input_size, hidden_size, hidden_size
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights from N(0, 1/fan-in), gains and peepholes from [−½, ½]; the biases are zero."""
        for name, p in self.named_parameters():
            if name.startswith("weight"):
                nn.init.normal_(p, std=p.shape[1] ** -0.5)
            elif name.startswith("bias"):
                nn.init.zeros_(p)
            else:
                nn.init.uniform_(p, -0.5, 0.5)

    def init_state(self, batch_shape: Sequence[int]) -> State:
        return self.weight_ih.new_zeros(*batch_shape, self.hidden_size)

    def project(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight_ih, self.bias)


def by_library(
    operation: str, inputs: Tensor, state: Tensor, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor] | None:
    """Run a sequence, or return None where torch has no kernel for this call.

    Args:
        operation: "gru", "rnn" (tanh) or "rnn_relu".
        inputs: [B, T, E].
        state: [B, H].
        weights: weight_ih, weight_hh, and bias_ih, bias_hh or None, as torch orders them.

    Returns:
        Outputs [B, T, H] and the last of them, [B, H].
    """
    if not dispatch.library_runs(operation, inputs):
        return None
    kernel = {"gru": torch.gru, "rnn": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}[operation]
    parameters = [w for w in weights if w is not None]
    options = (len(parameters) == 4, 1, 0.0, torch.is_grad_enabled(), False, True)
    outputs, final = kernel(inputs, state.unsqueeze(0), parameters, *options)
    return outputs, final.squeeze(0)


class RNN(Layer):
    """The plain recurrent cell: h ← tanh(W_in x + R h + b)  (Elman, 1990).

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


class GRU(Layer):
    """The gated recurrent unit, with torch's gate order (r, z, n) and two biases (Cho et al., arXiv:1406.1078).

        r = σ(W_r x + b_r + R_r h + c_r)        z = σ(W_z x + b_z + R_z h + c_z)
        n = tanh(W_n x + b_n + r ∘ (R_n h + c_n))
        h ← (1 − z) ∘ n + z ∘ h

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
    """Return the next state, from u = W x + b, v = R h + c, [..., 3H] each, and h."""
    u_r, u_z, u_n = u.chunk(3, -1)
    v_r, v_z, v_n = v.chunk(3, -1)
    r, z = torch.sigmoid(u_r + v_r), torch.sigmoid(u_z + v_z)
    n = torch.tanh(u_n + r * v_n)
    return (1 - z) * n + z * h


class MinGRU(Layer):
    """A gated recurrent unit whose gate and candidate do not see the state: linear, and so solved in one iteration.

        z = σ(W_z x + b_z)        h ← (1 − z) ∘ h + z ∘ (W_h x + b_h)        (Feng et al., arXiv:2410.01201)

    Example:
        >>> sum(p.numel() for p in MinGRU(3, 5).parameters())
        40
    """

    stepwise = True

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__(input_size, hidden_size, weight_ih=(2 * hidden_size, input_size), bias=(2 * hidden_size,))

    def project(self, inputs: Tensor) -> Tensor:
        """Return 1 − z and z ∘ candidate, which is all the step needs of the inputs."""
        gate, candidate = functional.linear(inputs, self.weight_ih, self.bias).chunk(2, -1)
        z = torch.sigmoid(gate)
        return torch.cat([1 - z, z * candidate], -1)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        keep, new = u.chunk(2, -1)
        return keep * state + new


class MinRNN(Layer):
    """A cell with one gate that sees the state  (Chen, arXiv:1711.06788).

        z = tanh(W x + b)        u = σ(R h + U z + c)        h ← u ∘ h + (1 − u) ∘ z

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


class ParaGRU(Layer):
    """A gated recurrent unit with one recurrent gain per channel and gate  (ParaRNN, Danieli et al., 2025).

        z = σ(a_z ∘ h + u_z)    r = σ(a_r ∘ h + u_r)    c = tanh(a_c ∘ (h ∘ r) + u_c)    h ← (1 − z) ∘ h + z ∘ c

    Channels do not see one another within a layer, so its Jacobian is diagonal: every step of Newton's method is exact
    with a diagonal, and three or four iterations reach rounding error whatever the length, while |a| < ½ or so.

    Example:
        >>> sum(p.numel() for p in ParaGRU(3, 5).parameters())
        75
    """

    gains: nn.Parameter

    def __init__(self, input_size: int, hidden_size: int):
        h = hidden_size
        super().__init__(input_size, h, weight_ih=(3 * h, input_size), bias=(3 * h,), gains=(3, h))

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        u_z, u_r, u_c = u.chunk(3, -1)
        a_z, a_r, a_c = self.gains.unbind(0)
        z, r = torch.sigmoid(u_z + a_z * state), torch.sigmoid(u_r + a_r * state)
        c = torch.tanh(u_c + a_c * (state * r))
        return (1 - z) * state + z * c


class ParaLSTM(Layer):
    """A long short-term memory cell with peepholes, coupled gates, and one recurrent gain per channel and gate.

        f = σ(a_f ∘ h + d_f ∘ c + u_f)    z = tanh(a_z ∘ h + u_z)    c ← f ∘ c + (1 − f) ∘ z
        o = σ(a_o ∘ h + d_o ∘ c + u_o)    h ← o ∘ tanh(c)

    Its Jacobian is a 2×2 block per channel. As `ParaGRU`, of the same authors.

    Example:
        >>> sum(p.numel() for p in ParaLSTM(3, 5).parameters())
        85
    """

    gains: nn.Parameter
    peepholes: nn.Parameter

    def __init__(self, input_size: int, hidden_size: int):
        h = hidden_size
        super().__init__(input_size, h, weight_ih=(3 * h, input_size), bias=(3 * h,), gains=(3, h), peepholes=(2, h))

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


class LEMState(NamedTuple):
    """The two fields, [..., H] each."""

    y: Tensor
    z: Tensor


class LEM(Layer):
    """The long expressive memory cell: two fields, of H numbers each, with gated time steps.

        Δ̄ = dt σ(u₁ + R₁ y)     Δ = dt σ(u₂ + R₂ y)
        z ← (1 − Δ) z + Δ tanh(u_z + R_z y)
        y ← (1 − Δ̄) y + Δ̄ tanh(W z + u_y)

    Its readout is y. `dt` is the longest time step. (Rusch et al., arXiv:2110.04744)

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
