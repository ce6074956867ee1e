"""What to train: cells on top of one another, and how they are evaluated along time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from reroll.errors import UsageError
from reroll.specs.base import OBJECT, Handed, Spec, option, runtime


@dataclass(frozen=True)
class RolloutSpec(Spec):
    """How a recurrence is evaluated along time: step by step."""

    kind: str = option("sequential", "how the recurrence is evaluated along time: step by step, or in parallel")
    iterates: ClassVar[bool] = False
    """Whether it iterates until it has converged, over whole sequences of real weights."""

    def build(self) -> Any:
        """Return the `reroll.rollout.Rollout`."""
        return runtime("rollout:Sequential")()


@dataclass(frozen=True)
class Parallel(RolloutSpec):
    """In parallel, by iteration."""

    kind: str = option("quasi_deer", "the method")
    rtol: float | None = option(None, "tolerance; none: 1e-5 in fp32")
    iterations: int | None = option(None, "most iterations; none: 100, deer 50")
    iterates: ClassVar[bool] = True

    def build(self) -> Any:
        options = {"rtol": self.rtol, "atol": self.rtol, "variance": getattr(self, "variance", None)}
        given = {name: value for name, value in options.items() if value is not None}
        return runtime(f"rollout:{self.kind}")(max_iterations=self.iterations, **given)


@dataclass(frozen=True)
class Elk(Parallel):
    """In parallel, held back by a Kalman filter."""

    kind: str = option("elk", "the method")
    variance: float | None = option(None, "σ²: smaller is more careful; none: usual")


ROLLOUTS: dict[str, type[RolloutSpec]] = {
    "sequential": RolloutSpec,
    **dict.fromkeys(("deer", "quasi_deer", "picard", "jacobi", "auto"), Parallel),
    **dict.fromkeys(("elk", "quasi_elk"), Elk),
}
"""Every rollout by name."""


@dataclass(frozen=True)
class ModelSpec(Spec):
    """A model."""

    @property
    def iterates(self) -> bool:
        """Whether its forward pass iterates until it has converged."""
        return False

    def resolved(self) -> Any:
        """Return the spec with what follows from the rest of it filled in."""
        return self

    def build(self, sizes: Any) -> Any:
        """Return the module for a `reroll.models.Interface`, with weights drawn from the global generator."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cells(ModelSpec):
    """Recurrent cells on top of one another."""

    kind: str = option("gru", "the recurrent cell")
    hidden: int = option(64, "features of the state; the cost grows with its square", flag="hidden")
    layers: int = option(1, "cells on top of one another", flag="layers")
    embed: int | None = option(None, "features of a symbol; none: half of hidden, at most 100")
    window_floats: int = option(
        1 << 22, "numbers kept alive at once without a gradient; smaller: shorter windows", within="[1, 2**62]"
    )
    rollout: RolloutSpec = option(
        RolloutSpec(), "how the recurrence is evaluated along time", flag="rollout", kinds=ROLLOUTS
    )

    @property
    def iterates(self) -> bool:
        return self.rollout.iterates

    def resolved(self) -> Any:
        return replace(self, embed=self.embed or max(1, min(100, self.hidden // 2)))

    def cell(self, size: int) -> Any:
        """Return a `reroll.cells.Cell` for inputs of a size."""
        return runtime(f"cells:{CELLS[self.kind]}")(size, self.hidden)

    def build(self, sizes: Any) -> Any:
        size: Any = self.embed if sizes.vocab is not None else sizes.inputs
        cells: list[Any] = []
        for _ in range(self.layers):
            cells.append(self.cell(size))
            size = cells[-1].output_size
        return runtime("models:Recurrent")(
            tuple(cells), vocab=sizes.vocab, inputs=sizes.inputs, outputs=sizes.outputs, readout=sizes.readout,
            rollout=self.rollout.build(), window_floats=self.window_floats,
        )  # fmt: skip


@dataclass(frozen=True)
class LSTM(Cells):
    """An LSTM whose recurrent matrix is of blocks."""

    kind: str = option("lstm", "the recurrent cell")
    heads: int = option(1, "blocks of the recurrent matrix (lstm), read heads (dnc)", flag="heads")

    def check(self) -> None:
        super().check()
        if self.hidden % self.heads:
            raise UsageError(f"hidden={self.hidden} is not divisible by heads={self.heads}; choose a divisor of it.")

    def cell(self, size: int) -> Any:
        return runtime("cells:LSTM")(size, self.hidden, self.heads)


@dataclass(frozen=True)
class DNC(Cells):
    """A controller with a memory."""

    kind: str = option("dnc", "the recurrent cell")
    heads: int = option(1, "read heads")
    word_size: int = option(16, "numbers in a memory row")
    memory_size: int = option(32, "memory rows; adds no parameters")

    def cell(self, size: int) -> Any:
        return runtime("cells:DNC")(size, self.hidden, self.word_size, self.memory_size, self.heads)


CELLS = {
    "rnn": "RNN", "gru": "GRU", "lem": "LEM", "min_gru": "MinGRU", "min_rnn": "MinRNN", "para_gru": "ParaGRU",
    "para_lstm": "ParaLSTM",
}  # fmt: skip
"""Cells with no options besides those of all; the class of each in `reroll.cells`."""


@dataclass(frozen=True)
class ObjectModel(Handed, ModelSpec):
    """A module that was handed in."""


MODELS: dict[str, type[ModelSpec]] = {"lstm": LSTM, "dnc": DNC, **dict.fromkeys(CELLS, Cells), OBJECT: ObjectModel}
"""Every model by name."""
