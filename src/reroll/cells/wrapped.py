"""Other code as cells: plain functions, and torch's `RNNCell`, `GRUCell` and `LSTMCell`.

torch's cells are rewritten in plain operations here, on the module's own weights, so training the cell trains the
module. Such a step can be projected ahead, tracked, and mapped; torch's kernels for one step allow none of that.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from reroll.cells.base import Cell
from reroll.cells.layers import by_library, gated
from reroll.cells.lstm import LSTMState
from reroll.errors import UsageError, require_count
from reroll.kernels.lstm_scan import lstm_scan, reference
from reroll.passes import is_untouched

KINDS = (nn.RNNCell, nn.GRUCell, nn.LSTMCell)


def is_as_torchs(module: nn.Module, kinds: tuple[type[nn.Module], ...] = KINDS) -> bool:
    """Whether a module computes what torch's class does: it has no forward of its own, and no hooks."""
    own = (isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)
    return is_untouched(module) and any(own)  # a hook may compute a weight


class Wrapped(Cell):
    """A torch cell of any of the three kinds; one with a forward of its own, or hooks, is called at every step.

    Example:
        >>> module = nn.GRUCell(3, 5)
        >>> cell, x, h = Wrapped(module), torch.randn(2, 3), torch.randn(2, 5)
        >>> torch.allclose(cell.step(cell.project(x), h), module(x, h), atol=1e-6)
        True
    """

    stepwise = True

    def __init__(self, module: nn.RNNCellBase):
        super().__init__()
        self.module = module
        self.input_size, self.output_size = module.input_size, module.hidden_size

    def init_state(self, batch_shape: Sequence[int]) -> Tensor | LSTMState:
        zeros = self.module.weight_hh.new_zeros(*batch_shape, self.output_size)
        return LSTMState(zeros, zeros) if isinstance(self.module, nn.LSTMCell) else zeros

    def project(self, inputs: Tensor) -> Tensor:
        if not is_as_torchs(self.module):
            return inputs
        return functional.linear(inputs, self.module.weight_ih, self.module.bias_ih)

    def step(self, u: Tensor, state: Any) -> Any:
        if not is_as_torchs(self.module):
            after = self.module(u, state)
            return LSTMState(*after) if isinstance(self.module, nn.LSTMCell) else after
        h = state[0] if isinstance(self.module, nn.LSTMCell) else state
        v = functional.linear(h, self.module.weight_hh, self.module.bias_hh)
        if isinstance(self.module, nn.GRUCell):
            return gated(u, v, h)
        if isinstance(self.module, nn.LSTMCell):
            return LSTMState(*reference.gated(u + v, state[1]))
        return (torch.tanh if self.module.nonlinearity == "tanh" else torch.relu)(u + v)

    def fused(self, inputs: Tensor, state: Any) -> tuple[Tensor, Any] | None:
        m = self.module
        if not is_as_torchs(m):
            return None
        if isinstance(m, nn.LSTMCell):
            bias = m.bias_ih + m.bias_hh if m.bias else m.weight_ih.new_zeros(4 * m.hidden_size)
            outputs, h, c = lstm_scan(inputs, m.weight_ih, m.weight_hh, bias, *state)
            return outputs, LSTMState(h, c)
        operation = "gru" if isinstance(m, nn.GRUCell) else "rnn" if m.nonlinearity == "tanh" else "rnn_relu"
        return by_library(operation, inputs, state, (m.weight_ih, m.weight_hh, m.bias_ih, m.bias_hh))

    @property
    def has_kernel(self) -> bool:
        return isinstance(self.module, nn.LSTMCell) and is_as_torchs(self.module)

    def readout(self, state: Any) -> Tensor:
        return state[0] if isinstance(self.module, nn.LSTMCell) else state


class FunctionCell(Cell):
    """A plain function as a cell; see `cell_from`."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], state_size: int, module: nn.Module | None):
        super().__init__()
        self.function = None if function is module else function  # a module twice would be saved twice
        self.module = module
        self.input_size = self.output_size = self.state_size = state_size

    def init_state(self, batch_shape: Sequence[int]) -> Tensor:
        return torch.zeros(*batch_shape, self.state_size)

    def step(self, u: Tensor, state: Tensor) -> Tensor:
        step = self.module if self.function is None else self.function
        assert step is not None
        return step(u, state)


def cell_from(step: Callable[..., Any], state_size: int, *, module: nn.Module | None = None) -> Cell:
    """Return a cell from a plain function.

    Args:
        step: `step(input_t, state) → state`, on [rows, features] and [rows, state_size]; pure (see `Cell`). Also
            torch's `RNNCell`, `GRUCell` or `LSTMCell`, whose state is a pair.
        state_size: features of the state, which starts as zeros.
        module: the module whose parameters `step` uses, so that they are trained. A bound method brings its own.

    Raises:
        UsageError: if `step` cannot be called, or state_size is not positive.

    Example:
        >>> cell = cell_from(lambda u, s: torch.tanh(s + u), 3)
        >>> cell.step(torch.zeros(2, 3), cell.init_state((2,))).shape
        torch.Size([2, 3])
    """
    if not callable(step):
        raise UsageError(f"step={step!r} must be a function step(input_t, state) → state.")
    require_count(state_size=state_size)
    if isinstance(step, KINDS) and step.hidden_size != state_size:
        raise UsageError(f"state_size={state_size} does not fit {step}, whose hidden_size is {step.hidden_size}.")
    if isinstance(step, nn.RNNBase):
        kind = type(step).__name__
        raise UsageError(f"step is an nn.{kind}, which runs whole sequences; pass an nn.{kind}Cell, a single step.")
    _require_two_arguments(step)
    if isinstance(step, KINDS):
        return Wrapped(step)
    owner = step if isinstance(step, nn.Module) else getattr(step, "__self__", None)
    if module is None and isinstance(owner, nn.Module):
        module = owner
    return FunctionCell(step, state_size, module)


def _require_two_arguments(step: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(step.forward if isinstance(step, nn.Module) else step, follow_wrapped=False)
    except (TypeError, ValueError):  # a function written in C may have none
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(step, "__name__", type(step).__name__)
        raise UsageError(f"step={name} must take (input_t, state): {error}.") from error
