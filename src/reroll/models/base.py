"""What training asks of a model.

Any `nn.Module` can be trained; `Stateful` and `Headed` are capabilities beyond that. They are declared by an attribute:
methods that happen to be called `advance` or `features` do not count.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol, get_args

from torch import Tensor, nn

from reroll.data.task import Readout

READOUTS = get_args(Readout)


class Model(Protocol):
    """A model: symbols [B, T] or series [B, T, inputs] in, [B, T, outputs] or, read out once, [B, outputs] out."""

    vocab: int | None
    """Input symbols 0 … vocab−1; may be more than the task has (a padded vocabulary). None: real-valued inputs."""
    inputs: int | None
    """Features of real-valued inputs."""
    outputs: int
    """Logits or values per output; of symbols, at least as many as the task has."""
    readout: Readout
    """Whether there is an output at every step, or one, of the last step or the mean of all."""

    def __call__(self, inputs: Tensor, *, present: Tensor | None = None) -> Tensor: ...


class Stateful(Protocol):
    """A model that can stop after any step and continue from its state."""

    stateful: bool
    """True. Then `advance` is how training evaluates the model wherever there is an output at every step."""
    window_floats: int
    """Numbers that a window of steps may keep alive without a gradient; `time_chunk` is derived from it."""

    @property
    def step_floats(self) -> int:
        """About how many numbers one step of one sequence keeps alive."""
        ...

    def start(self, batch: int) -> Any:
        """Return the state before the first step of this many sequences: a tree of tensors [B, …]."""
        ...

    def advance(
        self, inputs: Tensor, state: Any = None, reset: Tensor | None = None, *, head: bool = True
    ) -> tuple[Tensor, Any]:
        """Run some steps from a state (None: the first); return their outputs and the state after them.

        `reset` [B, T] is True at steps that start from the initial state. A model that is also `Headed` returns, with
        head=False, the features instead of the outputs.
        """
        ...

    def time_chunk(self, batch: int) -> int:
        """Return how many steps of this many sequences to run at once where no gradient is needed."""
        ...


class Headed(Protocol):
    """A model whose outputs are model.head(model.features(inputs)), so that a loss need not store all logits."""

    headed: bool
    """True if there is a head."""
    head: nn.Linear | None

    def features(self, inputs: Tensor, *, present: Tensor | None = None) -> Tensor:
        """Return what the head maps to the outputs: [B, T, D], or [B, D] where there is one output per sequence."""
        ...


@dataclass(frozen=True)
class Interface:
    """What a task and a model agree on: enough to build the model without the data."""

    vocab: int | None
    inputs: int | None
    outputs: int
    readout: Readout

    @classmethod
    def of(cls, thing: Any) -> Interface:
        """Return the interface of a task or a model."""
        return cls(thing.vocab, thing.inputs, thing.outputs, thing.readout)

    @classmethod
    def read(cls, saved: Any) -> Interface:
        """Return the interface from a dictionary in a file; raise `ValueError` or `TypeError` if it is none."""
        if not isinstance(saved, dict):
            raise ValueError(f"sizes={saved!r} are those of no model")
        interface = cls(**saved)
        counts = [interface.outputs, *(n for n in (interface.vocab, interface.inputs) if n is not None)]
        whole = len(counts) == 2 and all(type(n) is int and 0 < n < 1 << 31 for n in counts)
        if not whole or interface.readout not in READOUTS:
            raise ValueError(f"sizes={saved!r} are those of no model")
        return interface

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, ready for JSON; `read` takes them."""
        return asdict(self)
