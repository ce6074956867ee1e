"""What all evaluators share: the probes of a step, the loss of a branch, the loop over branches."""

from __future__ import annotations

import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from reroll.errors import UsageError
from reroll.grad.evaluate.snapshot import Snapshot, cuda_devices, seed_of, seeded_generators
from reroll.grad.units import Result, Unit, with_state
from reroll.kernels.noise_axpy import RADEMACHER, Noise, Stream
from reroll.keys import Key


@dataclass(frozen=True)
class ProbeContext:
    """One step's probes. Probe k is evaluated on its branches, θ + ε z_k and θ − ε z_k (or only the first).

    Args:
        parameters: the perturbed tensors by name.
        call: (model, batch) → loss (scalar or [batch]), or a pair (loss, state after the batch).
        key: the key of the step.
        epsilon: ε, the size of a probe.
        noise: the distribution of the directions.
        sides: (+1, −1) for central differences, (+1,) for one-sided ones.
        dtype: evaluate in this dtype; None: the weights' own.
        scales: a factor on ε per tensor.
        model: the module, where there is one.
        padding: the row of an embedding that gets no noise, by tensor.
        isolate: give every branch the same random numbers, and undo its changes of buffers and the global generator.
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
    padding: Mapping[str, int] = field(default_factory=dict)

    def stream(self, name: str) -> Stream:
        return Stream(self.key, name, self.noise, self.padding.get(name))

    def alpha(self, name: str, side: int) -> float:
        """Return the factor on the noise of a tensor: ±ε, times its scale."""
        return side * self.epsilon * self.scales.get(name, 1.0)

    def dtype_of(self, p: Tensor) -> torch.dtype:
        """Return the dtype in which a weight is evaluated."""
        return self.dtype if self.dtype is not None and p.is_floating_point() else p.dtype

    def branches(self, unit: Unit) -> list[tuple[int, int]]:
        """Return (side, probe) of every branch of a unit, sides outermost."""
        return [(side, probe) for side in self.sides for probe in unit.probes]

    def loss(self, unit: Unit, state: Any, model: nn.Module | None) -> tuple[Tensor, Any]:
        """Call the loss for a branch that carries this state; return (scalar loss, state after)."""
        return split_result(self.call(model, with_state(unit.batch, state)), unit.single)

    @contextmanager
    def isolated(self, model: nn.Module | None) -> Iterator[Callable[[], None]]:
        """Isolate branches from one another: yield a function to call before each of them.

        It sets torch's generators to a state that depends on the step alone, and restores what modules store, so that
        every branch sees the same dropout and the same statistics. Afterwards everything is as before.
        """
        if not self.isolate:
            yield lambda: None
            return
        devices = cuda_devices(self.parameters)
        with seeded_generators(seed_of(self.key), devices):
            before = Snapshot(model, devices)
            try:
                yield before.restore
            finally:
                before.restore()


class Evaluator(ABC):
    """Computes the losses of units. It is a context manager, which restores whatever it changed."""

    def __init__(self, probes: ProbeContext):
        self.probes = probes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    @abstractmethod
    def losses(self, unit: Unit) -> Result:
        """Return the losses of a unit and the states after its branches."""


class BranchByBranch(Evaluator):
    """Evaluates one branch after the other."""

    def losses(self, unit: Unit) -> Result:
        model, results = self.model(), []
        with self.probes.isolated(model) as rewind:
            for index, (side, probe) in enumerate(self.probes.branches(unit)):
                rewind()
                with self.branch(side, probe):
                    results.append(self.probes.loss(unit, unit.states and unit.states[index], model))
        losses, states = zip(*results)
        return Result(torch.stack(losses).view(len(self.probes.sides), -1), list(states))

    def model(self) -> nn.Module | None:
        """Return the module that this thread evaluates."""
        return self.probes.model

    @abstractmethod
    def branch(self, side: int, probe: int) -> AbstractContextManager[None]:
        """Let that module compute with θ + side · ε · z(probe) inside the block."""


def split_result(result: Any, single: bool = False) -> tuple[Tensor, Any]:
    """Return (scalar loss, state) of what a loss function returned; `single`: one number per sequence is needed."""
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

    Plain numbers, NumPy numbers and arrays, counts and booleans are losses too, as an error rate or a simulator returns
    them. A mapping, such as Hugging Face's ModelOutput, is read at "loss".
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
