"""What to train: stacked recurrent cells and how they are evaluated along time, or a transformer."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

from reroll.errors import UsageError
from reroll.specs.base import OBJECT, ObjectSpec, Spec, option, runtime


@dataclass(frozen=True)
class RolloutSpec(Spec):
    """How a recurrence is evaluated along time: step by step."""

    kind: str = option("sequential", "how the recurrence is evaluated along time: step by step, or in parallel")
    iterates: ClassVar[bool] = False
    """Whether it iterates to convergence."""

    def build(self) -> Any:
        """Return the `reroll.rollout.Rollout`."""
        return runtime("rollout:Sequential")()


@dataclass(frozen=True)
class Parallel(RolloutSpec):
    """In parallel, by iteration."""

    kind: str = option("quasi_deer", "the method")
    rtol: float | None = option(None, "tolerance; none: 1e-5 in fp32")
    iterations: int | None = option(None, "maximum iterations; none: 100, deer 50")
    iterates: ClassVar[bool] = True

    def build(self) -> Any:
        options = {"rtol": self.rtol, "atol": self.rtol, "variance": getattr(self, "variance", None)}
        options = {name: value for name, value in options.items() if value is not None}
        return runtime(f"rollout:{self.kind}")(max_iterations=self.iterations, **options)


@dataclass(frozen=True)
class Elk(Parallel):
    """In parallel, damped by a Kalman filter."""

    kind: str = option("elk", "the method")
    variance: float | None = option(None, "σ² of the filter: smaller damps more; none: the method's default")


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
        """Whether its forward pass iterates to convergence."""
        return False

    def resolved(self) -> Any:
        """Return the spec with its derived fields filled in."""
        return self

    def build(self, sizes: Any) -> Any:
        """Return the module for a `reroll.models.Interface`, initialised from torch's global generator."""
        raise NotImplementedError


@dataclass(frozen=True)
class Cells(ModelSpec):
    """Stacked recurrent cells."""

    kind: str = option("gru", "the recurrent cell")
    hidden: int = option(64, "size of the state; cost grows with its square", flag="hidden")
    layers: int = option(1, "number of layers", flag="layers")
    embed: int | None = option(None, "size of the embedding; none: half of hidden, at most 100")
    window_floats: int = option(
        1 << 22, "memory of a rollout without gradients, in numbers; less: shorter windows", within="[1, 2**62]"
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
    """An LSTM with a block-diagonal recurrent matrix."""

    kind: str = option("lstm", "the recurrent cell")
    heads: int = option(1, "blocks of the recurrent matrix (lstm); read heads (dnc)", flag="heads")

    def check(self) -> None:
        super().check()
        if self.hidden % self.heads:
            raise UsageError(f"hidden={self.hidden} is not divisible by heads={self.heads}; choose a divisor.")

    def cell(self, size: int) -> Any:
        return runtime("cells:LSTM")(size, self.hidden, self.heads)


@dataclass(frozen=True)
class DNC(Cells):
    """A differentiable neural computer: an LSTM controller with an external memory."""

    kind: str = option("dnc", "the recurrent cell")
    heads: int = option(1, "read heads")
    word_size: int = option(16, "width of a memory row")
    memory_size: int = option(32, "memory rows; adds no parameters")

    def cell(self, size: int) -> Any:
        return runtime("cells:DNC")(size, self.hidden, self.word_size, self.memory_size, self.heads)


CELLS = {
    "rnn": "RNN", "gru": "GRU", "lem": "LEM", "min_gru": "MinGRU", "min_rnn": "MinRNN", "para_gru": "ParaGRU",
    "para_lstm": "ParaLSTM",
}  # fmt: skip
"""Cells without options of their own → their class in `reroll.cells`."""


@dataclass(frozen=True)
class GPT(ModelSpec):
    """A decoder-only transformer."""

    kind: str = option("gpt", "the model")
    layers: int = option(4, "number of layers")
    heads: int = option(4, "attention heads")
    width: int = option(64, "width of the residual stream (gpt)", flag="width")
    vocab: int | None = option(None, "vocabulary size, if padded beyond the task's for speed; none: the task's")
    position: Literal["rotary", "learned"] = option("rotary", "position encoding")
    qk_norm: bool = option(True, "normalise queries and keys")
    activation: Literal["relu2", "gelu"] = option("relu2", "activation of the MLPs")
    zero_init: bool = option(True, "initialise an untied head and the projections into the residual stream to zero")
    tied: bool = option(False, "share the weights of embedding and head")
    embed_norm: bool = option(True, "normalise the embedding")
    softcap: float | None = option(None, "bound c of the logits, c · tanh(logits / c); none: no bound")
    value_residual: bool = option(False, "mix the first layer's values into those of the others")
    embed_shortcut: bool = option(False, "mix the embedding into the residual stream before every layer")
    context: int = option(1024, "maximum sequence length with position=learned")

    def check(self) -> None:
        super().check()
        if self.width % self.heads or self.width // self.heads % 2:
            raise UsageError(f"width={self.width} must be heads={self.heads} times an even number of features.")

    def build(self, sizes: Any) -> Any:
        if sizes.vocab is None or sizes.readout != "every":
            raise UsageError("model=gpt reads symbols, with an output at every step; use recurrent cells for series.")
        size = max(sizes.vocab, sizes.outputs)
        if self.vocab is not None and self.vocab < size:
            raise UsageError(f"vocab={self.vocab} is less than the {size} symbols of the task.")
        options = {f.name: getattr(self, f.name) for f in fields(GPT) if f.name not in ("kind", "vocab")}
        return runtime("models:GPT")(self.vocab or size, **options)


@dataclass(frozen=True)
class ObjectModel(ObjectSpec, ModelSpec):
    """A module that was passed in."""


MODELS: dict[str, type[ModelSpec]] = {
    "lstm": LSTM,
    "dnc": DNC,
    "gpt": GPT,
    **dict.fromkeys(CELLS, Cells),
    OBJECT: ObjectModel,
}
"""Every model by name."""
