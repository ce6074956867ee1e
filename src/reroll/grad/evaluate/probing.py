"""What every way of evaluating probes is given, and the bookkeeping around one evaluation of the loss.

One step has N probes; probe k is evaluated on its branches, θ + ε z_k and θ − ε z_k (or only the first). A *unit* is a
few consecutive probes, both signs together, on a fixed part of the batch: the piece of work that a thread, a process or
a rank takes whole.
"""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from reroll.errors import UsageError
from reroll.grad.evaluate.surroundings import Surroundings, cuda_devices, seed_of, seeded_generators
from reroll.kernels.noise_axpy import RADEMACHER, Noise, Stream
from reroll.keys import Key


class Unit(NamedTuple):
    """Consecutive probes on a part of the batch.

    Args:
        probes: indices of the probes.
        batch: the part of the batch they see.
        states: one carried state per branch, [(side, probe)], sides outermost; None: the batch's own.
        single: True if the part is a single sequence of several, so that the loss must come per sequence.
    """

    probes: range
    batch: Any
    states: list[Any] | None = None
    single: bool = False


class Result(NamedTuple):
    """Losses [sides, probes of the unit], and the state after each branch, in the order of `Unit.states`."""

    losses: Tensor
    states: list[Any]


@dataclass(frozen=True)
class Probing:
    """One step's probes.

    Args:
        parameters: the perturbed tensors by name.
        call: (model, batch) → loss (scalar or [batch]), or a pair (loss, state after the batch).
        key: the key of the step.
        epsilon: ε, the size of a probe.
        noise: what directions are made of.
        sides: (+1, −1) for central differences, (+1,) for one-sided ones.
        dtype: evaluate in this dtype; None: the weights' own.
        scales: a factor on ε per tensor.
        model: the module, where there is one.
        still: a row per tensor that has no noise.
        isolate: give every branch the same random numbers, and undo what it does to buffers and the global generator.
    """

    parameters: Mapping[str, Tensor]
    call: Callable[[Any, Any], Any]
    key: Key
    epsilon: float
    noise: Noise = RADEMACHER
    sides: tuple[int, ...] = (1, -1)
    dtype: torch.dtype | None = None
    scales: Mapping[str, float] = field(default_factory=dict)
    model: nn.Module | None = None
    isolate: bool = True
    still: Mapping[str, int] = field(default_factory=dict)

    def stream(self, name: str) -> Stream:
        """Return the noise stream of a tensor."""
        return Stream(self.key, name, self.noise, self.still.get(name))

    def alpha(self, name: str, side: int) -> float:
        """Return the factor on the noise of a tensor: ±ε, times its scale."""
        return side * self.epsilon * self.scales.get(name, 1.0)

    def branches(self, unit: Unit) -> Iterator[tuple[int, int, int]]:
        """Yield (index, side, probe) of every branch of a unit, sides outermost."""
        for s, side in enumerate(self.sides):
            for i, probe in enumerate(unit.probes):
                yield s * len(unit.probes) + i, side, probe

    def loss(self, unit: Unit, state: Any, model: nn.Module | None = None) -> tuple[Tensor, Any]:
        """Call the loss once, as the branch that carries this state sees it; return (scalar loss, state after).

        Args:
            unit: its part of the batch is what the loss sees.
            state: the carried state of this branch, or None.
            model: a copy of the model to evaluate instead of the model itself.
        """
        result = self.call(self.model if model is None else model, with_state(unit.batch, state))
        return split_result(result, unit.single)

    @contextmanager
    def isolated(self, model: nn.Module | None = None) -> Iterator[Callable[[], None]]:
        """Separate branches: gives a function to call before each of them.

        It sets torch's generators to a state that depends on the step alone, and buffers and tensors that modules keep
        to what they were, so that every branch sees the same dropout and the same statistics. Afterwards all are as
        before.

        Args:
            model: the copy of the model that is evaluated, where it is not the model itself.
        """
        if not self.isolate:
            yield lambda: None
            return
        devices = cuda_devices(self.parameters)
        with seeded_generators(seed_of(self.key), devices):
            around = Surroundings(model or self.model, devices)

            def rewind() -> None:
                around.rewind()
                around.restore()

            try:
                yield rewind
            finally:
                around.restore()


class Evaluator(ABC):
    """A way to compute the losses of units. It is a context: whatever it changes is put back when it ends."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    @abstractmethod
    def losses(self, unit: Unit) -> Result:
        """Return the losses of a unit; see `Result`."""


def split_result(result: Any, single: bool = False) -> tuple[Tensor, Any]:
    """Return (scalar loss, state) of what a loss function returned: a loss, or a pair of a loss and a state.

    Raises:
        UsageError: as `read_loss`, or if the loss is a scalar where one number per sequence is needed.
    """
    loss, state = read_loss(result)
    if single and loss.dim() == 0:
        raise UsageError(
            'batch="split" gives every probe its own sequence, but loss_fn returned a scalar. '
            "Return one loss per sequence, [batch], or lower probes below the batch size."
        )
    loss = loss.detach()
    return (loss.mean() if loss.dim() else loss), state


def read_loss(result: Any) -> tuple[Tensor, Any]:
    """Return (loss, state) of what a loss function returned; the loss is floating, a scalar or [batch].

    A plain number, a NumPy number or array, and counts and booleans are losses too: what an error rate or a simulator
    gives. Of a mapping, such as Hugging Face's ModelOutput, its "loss" is taken.

    Raises:
        UsageError: if the loss is neither tensor nor number, is complex, or has more than one axis.
    """
    loss, state = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if isinstance(loss, Mapping) and "loss" in loss:
        loss = loss["loss"]
    if not isinstance(loss, Tensor) and (isinstance(loss, numbers.Real) or hasattr(loss, "__array__")):
        loss = torch.as_tensor(np.asarray(loss, dtype=np.float64))
    if not isinstance(loss, Tensor) or loss.is_complex():
        kind = "a complex tensor" if isinstance(loss, Tensor) else f"of type {type(loss).__name__}"
        raise UsageError(f"the loss is {kind}; it must be a number or a tensor, scalar or [batch].")
    if loss.dim() > 1:
        raise UsageError(
            f"loss_fn returned shape {tuple(loss.shape)}; it must return a scalar or one loss per sequence."
        )
    return (loss if loss.is_floating_point() else loss.double()), state


# ---- batches of any kind


def batch_size(batch: Any) -> int | None:
    """Return the number of sequences of a batch: its `len` if it can be cut by rows, or that of its first tensor."""
    if hasattr(batch, "rows"):
        return len(batch)
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, tuple | list):
        sizes = [size for size in map(batch_size, batch) if size is not None]
        return sizes[0] if sizes else None
    return None


def batch_rows(batch: Any, begin: int, end: int) -> Any:
    """Return some of the sequences of a batch: its own `rows`, or the rows of every tensor in it."""
    if hasattr(batch, "rows"):
        return batch.rows(begin, end)
    if isinstance(batch, Tensor):
        return batch[begin:end] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {name: batch_rows(value, begin, end) for name, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(batch_rows(value, begin, end) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(batch_rows(value, begin, end) for value in batch)
    return batch


def with_state(batch: Any, state: Any) -> Any:
    """Return the batch with this carried state; None leaves it as it is."""
    if state is None:
        return batch
    return replace(batch, state=state)
