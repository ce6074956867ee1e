"""What a rollout is: a cell and inputs in, the trajectory of states out, and how well it was computed.

    trajectory = rollout(cell, inputs)                      all states
    outputs, final = rollout.read(cell, inputs, state)      only what a model needs; may use a kernel for the sequence

A rollout that iterates reports its iterations, residual and convergence per sequence, and how it ended as an `Outcome`:
non-convergence is a value, never silent.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence

from reroll.cells.base import Cell, State
from reroll.cells.wrapped import FunctionCell
from reroll.errors import UsageError
from reroll.outcome import Outcome
from reroll.trees import combine_states, map_state

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Trajectory(NamedTuple):
    """The states of a sequence.

    Args:
        states: the state after every step, with the structure of the cell's state and time as axis 1.
        final: the state after the last step of each sequence.
        outcome: how the evaluation ended.
        iterations: passes over the sequence, [batch] int64.
        residual: largest residual of the recurrence that the solver left, before any fallback, [batch].
        converged: True where the solver reached its tolerance, [batch]; False where a fallback was used.
        resets: entries that were not finite in some iteration and were replaced, [batch]; None without iterations.
    """

    states: State
    final: State
    outcome: Outcome
    iterations: Tensor
    residual: Tensor
    converged: Tensor
    resets: Tensor | None = None

    def __repr__(self) -> str:
        parts = (self.states,) if isinstance(self.states, Tensor) else tuple(self.states)
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        most = int(self.iterations.max()) if self.iterations.numel() else 0
        worst = float(self.residual.max()) if self.residual.numel() else 0.0
        return (
            f"Trajectory(states {shapes}, outcome {self.outcome.name}, at most {most} iterations, "
            f"residual {worst:.2g}, {int(self.converged.sum())} of {self.converged.numel()} converged)"
        )


def exact(states: State, final: State, inputs: Tensor, passes: int = 1) -> Trajectory:
    """Return the trajectory of states that were computed without a solver."""
    batch, device = inputs.shape[0], inputs.device
    return Trajectory(
        states, final, Outcome.ok, iterations=torch.full((batch,), passes, dtype=torch.int64, device=device),
        residual=torch.zeros(batch, device=device), converged=torch.ones(batch, dtype=torch.bool, device=device),
    )  # fmt: skip


class Rollout(Protocol):
    """A way to evaluate a cell along time."""

    def __call__(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Trajectory:  # fmt: skip
        """Return all states; see `Trajectory`.

        Args:
            cell: the recurrence.
            inputs: [batch, time, input_size].
            state: the state before the first step; None is the cell's initial state.
            reset: True at the steps before which the state is reset to the cell's initial state, [batch, time].
            lengths: steps of each sequence, [batch]; None: all T. Padding is not read, whatever it holds: the states
                there are zero, and `final` is the state after the last step of each sequence.
        """
        ...

    def read(
        self, cell: Cell, inputs: Tensor, state: State | None = None, reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:  # fmt: skip
        """Return the readouts [batch, time, output_size] and the state after the last step."""
        ...


Method = TypeVar("Method", bound=Callable[..., Any])


def uncompiled(method: Method) -> Method:
    """Let `torch.compile` break its graph at a method of a rollout, and run the method eagerly."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return torch.compiler.disable(method)(*args, **kwargs)
        return method(*args, **kwargs)

    return call  # type: ignore[return-value]: a function in place of a method of the same signature


def start(cell: Cell, inputs: Tensor, state: State | None) -> State:
    """Return the state before the first step: the argument, or the cell's in the inputs' dtype and on their device.

    Complex numbers stay complex, in the inputs' precision.

    Raises:
        UsageError: if the cell is no `Cell`, the inputs are not [batch, time, features], or the state does not fit.
    """
    check(cell, inputs)
    initial = cell.init_state(inputs.shape[:1])
    if (kind := _not_a_state(initial)) is not None:
        raise UsageError(
            f"{type(cell).__name__}.init_state returns a {kind}; a state is a tensor or a (named) tuple of tensors."
        )
    for part in (initial,) if isinstance(initial, Tensor) else initial if isinstance(initial, tuple) else ():
        if isinstance(part, Tensor) and part.shape[:1] != inputs.shape[:1]:
            raise UsageError(
                f"{type(cell).__name__}.init_state({tuple(inputs.shape[:1])}) returns {_shapes(initial)}; it must "
                "return a state with these leading axes (expand a state that all sequences share)."
            )
    if state is not None:
        if (shapes := _shapes(state)) != (expected := _shapes(initial)):
            raise UsageError(
                f"state is {shapes}; {type(cell).__name__} takes {expected} for inputs {tuple(inputs.shape)}."
            )
        return _like(state, initial)
    if not inputs.is_floating_point():
        return initial
    dtype = inputs.dtype
    return map_state(
        initial, lambda tensor: tensor.to(inputs.device, dtype.to_complex() if tensor.is_complex() else dtype)
    )


def _not_a_state(state: Any) -> str | None:
    """Return the type of the first part that is neither a tensor nor a tuple; None if this is a state."""
    if isinstance(state, tuple):
        return next((kind for part in state if (kind := _not_a_state(part)) is not None), None)
    return None if isinstance(state, Tensor) else type(state).__name__


def check_reset(reset: Any, inputs: Tensor) -> None:
    """Raise unless this is None or a mask of the inputs' batch and time."""
    if reset is None:
        return
    expected = f"expected a mask (dtype bool) of shape {tuple(inputs.shape[:2])}"
    if not isinstance(reset, Tensor):
        raise UsageError(f"reset is a {type(reset).__name__}; {expected}.")
    if reset.shape != inputs.shape[:2] or reset.dtype != torch.bool:
        raise UsageError(f"reset has shape {tuple(reset.shape)} and dtype {dtype_name(reset)}; {expected}.")


def weights_dtype(cell: Cell, inputs: Tensor) -> torch.dtype:
    """Return the dtype of a cell's weights; the inputs' if it has none."""
    return next((p.dtype for p in cell.parameters() if p.is_floating_point()), inputs.dtype)


def dtype_name(tensor: Tensor | torch.dtype) -> str:
    """Return "float32" for `torch.float32`."""
    return str(tensor.dtype if isinstance(tensor, Tensor) else tensor).removeprefix("torch.")


@contextmanager
def explaining_dtypes(cell: Cell, inputs: Tensor, state: State | None = None) -> Iterator[None]:
    """Turn a dtype error inside the block into one that names which of inputs, weights and state differ."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, UsageError) or "dtype" not in str(error):
            raise
        require_one_dtype(cell, inputs, state)
        raise


@contextmanager
def explaining_shapes(cell: Cell, inputs: Tensor, state: State) -> Iterator[None]:
    """Turn an error about sizes inside the block into one that names the shapes that a step was called with."""
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error) for words in ("must match", "cannot be multiplied", "size mismatch")):
            raise
        raise UsageError(
            f"{type(cell).__name__}.step fails on an input {[len(inputs), inputs.shape[-1]]} and a state "
            f"{_shapes(state)}: {error}. Make both fit what it computes."
        ) from error


def require_one_dtype(cell: Cell, inputs: Tensor, state: State | None) -> None:
    """Raise if inputs or state have another dtype than the weights."""
    expected = weights_dtype(cell, inputs)
    parts = () if state is None else (state,) if isinstance(state, Tensor) else tuple(state)
    for name, tensor in (("inputs", inputs), *(("state", part) for part in parts)):
        if tensor.dtype != expected:
            change = f", or cell.to({tensor.dtype})" if tensor.is_floating_point() and expected != inputs.dtype else ""
            raise UsageError(
                f"{name} has dtype {dtype_name(tensor)} and the weights of {type(cell).__name__} have "
                f"{dtype_name(expected)}; convert one: {name}.to({expected}){change}."
            )


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a tensor is inside `torch.func.grad` or `vmap`, and so has no memory of its own."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return True
    return False


def has_tangent(tensor: Tensor) -> bool:
    """Return whether a tensor carries a forward-mode derivative (`torch.autograd.forward_ad`)."""
    return forward_ad.unpack_dual(tensor).tangent is not None


def require_rollout(rollout: Any) -> None:
    """Raise if this is no rollout: a name, or a preset that was not called."""
    if isinstance(rollout, type) or not hasattr(rollout, "read"):
        name = rollout if isinstance(rollout, str) else getattr(rollout, "__name__", type(rollout).__name__)
        raise UsageError(f"rollout={rollout!r} is no rollout; pass the object: reroll.{name}().")


def require_same_shapes(cell: Cell, state: State, following: State) -> None:
    """Raise if a step changes the type or the shapes of its state."""
    if _shapes(following) != _shapes(state):
        raise UsageError(
            f"{type(cell).__name__}.step returns a state {_shapes(following)} for a state {_shapes(state)}; a step "
            "must keep the type and the shape of its state."
        )


def check(cell: Any, inputs: Any) -> None:
    """Raise unless these are a cell and inputs that it takes."""
    if not isinstance(cell, Cell):
        remedy = "call it as rollout(cell, inputs)" if isinstance(cell, Tensor) or hasattr(cell, "read") else (
            "wrap it: reroll.cell_from(step, state_size)"
        )  # fmt: skip
        raise UsageError(f"cell is a {type(cell).__name__}, not a cell; {remedy}.")
    if isinstance(inputs, PackedSequence):
        raise UsageError(
            "inputs is a PackedSequence; unpack it, x, lengths = pad_packed_sequence(inputs, batch_first=True), and "
            "call rollout(cell, x, lengths=lengths)."
        )
    if not isinstance(inputs, Tensor) or inputs.dim() != 3:
        what = f"shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else f"type {type(inputs).__name__}"
        raise UsageError(f"inputs has {what}; expected a tensor [batch, time, features].")
    if getattr(cell, "input_size", None) is None:
        raise UsageError(f"{type(cell).__name__} sets no input_size; a cell says how many features it takes.")
    # A plain function may take any number of features.
    if not isinstance(cell, FunctionCell) and inputs.shape[-1] != cell.input_size:
        raise UsageError(
            f"inputs has shape {tuple(inputs.shape)}; {type(cell).__name__} takes [batch, time, {cell.input_size}]."
        )
    for path, module in cell.named_modules():
        if isinstance(module, BATCH_NORMS) and (module.training or module.running_mean is None):
            raise UsageError(
                f"{type(cell).__name__}.{path} is a {type(module).__name__} in training, whose result for a row "
                "changes with the other rows; put it in eval mode, or use LayerNorm."
            )


def _like(state: State, kind: State) -> State:
    """Return a state in the cell's own type: a plain tuple may stand for a named one."""
    if isinstance(kind, Tensor) or type(state) is type(kind):
        return state
    return type(kind)(*state) if hasattr(kind, "_fields") else tuple(state)


def _shapes(state: State) -> str:
    if isinstance(state, Tensor):
        return str(list(state.shape))
    if not isinstance(state, tuple):
        return type(state).__name__
    return f"({', '.join(_shapes(part) for part in state)})"


def where_reset(reset: Tensor, initial: State, state: State) -> State:
    """Return `initial` for the sequences [batch] in which `reset` is True, and `state` for the others."""
    return combine_states(
        [state, initial], lambda pair: torch.where(reset.view(-1, *[1] * (pair[0].dim() - 1)), pair[1], pair[0])
    )
