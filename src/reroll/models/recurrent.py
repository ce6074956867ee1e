"""A recurrent model: embed → cells, each under a rollout → head.

model = Recurrent(cell=LSTM(64, 128), vocab=256)          symbols in, logits out at every step
model = Recurrent(cell=GRU(3, 32), inputs=3, outputs=5, readout="last")      a series in, five values out

logits = model(ids)                                       [B, T] → [B, T, vocab]
logits, state = model.advance(ids, state)                 the same, from a state; returns the next
logits, state = model.step(ids_t, state)                  one symbol, O(1); model.start(batch) is the initial state
logits = model.head(model.features(ids))                  the same as model(ids); features [B, T, D]
ids = model.generate(prompt, length, temperature=0.8, top_k=40, seed=0)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reroll.cells.base import Cell, State
from reroll.data.task import Readout
from reroll.data.tokenizers import Tokenizer
from reroll.errors import UsageError, require_positive
from reroll.kernels.lengths import steps_of
from reroll.models import convert
from reroll.models.base import READOUTS
from reroll.models.generate import generate
from reroll.rollout.base import Rollout, require_rollout, start
from reroll.rollout.sequential import Sequential

WINDOW_FLOATS = 1 << 22
"""Numbers a window of steps may keep alive when no gradient is needed: 16 MB of fp32."""


class Recurrent(nn.Module):
    """A stack of cells between an embedding and a linear head.

    Args:
        cell: one cell, or a tuple of cells that feed one another.
        vocab: number of input symbols; give this or `inputs`.
        inputs: features of real-valued inputs.
        outputs: logits or values per output. None: `vocab` for symbols; for series no head, the last cell's readout.
        embed: features of a symbol's embedding; None is the first cell's input size, the only value that fits it.
        rollout: how the cells are evaluated along time.
        readout: "every" step, the "last", or the "mean" over steps.
        window_floats: numbers a window of steps may keep alive when no gradient is needed.

    It is `Stateful` and, unless it is of series without `outputs`, `Headed` (`reroll.models.base`). `tokenizer` is that
    of the run or file a model was loaded from (`reroll.load`), else None.

    Raises:
        UsageError: if sizes do not fit together; the message names the two that disagree.

    Example:
        >>> from reroll.cells import LSTM
        >>> model = Recurrent(cell=LSTM(100, 240, heads=12), vocab=100)
        >>> sum(p.numel() for p in model.parameters())
        150740
        >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 100])
    """

    stateful = True
    tokenizer: Tokenizer | None = None

    def __init__(
        self,
        cell: Cell | tuple[Cell, ...],
        vocab: int | None = None,
        inputs: int | None = None,
        outputs: int | None = None,
        embed: int | None = None,
        rollout: Rollout | None = None,
        readout: Readout = "every",
        window_floats: int = WINDOW_FLOATS,
    ):
        super().__init__()
        cells = (cell,) if isinstance(cell, Cell) else tuple(cell)
        _check_sizes(cells, vocab, inputs, embed, readout)
        require_positive(outputs=outputs, window_floats=window_floats)
        self.vocab, self.inputs, self.readout = vocab, inputs, readout
        self.outputs = outputs or vocab or cells[-1].output_size
        self.window_floats = window_floats
        self.rollout: Rollout = Sequential() if rollout is None else rollout
        require_rollout(self.rollout)
        self.embed = nn.Embedding(vocab, cells[0].input_size) if vocab is not None else None
        self.cells = nn.ModuleList(cells)
        has_head = vocab is not None or outputs is not None
        self.head = nn.Linear(cells[-1].output_size, self.outputs) if has_head else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Embedding from N(0, ¼); head from N(0, ¼/fan-in), so that the first loss is close to ln(outputs)."""
        if self.embed is not None:
            nn.init.normal_(self.embed.weight, std=0.5)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.5 * self.head.in_features**-0.5)
            nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Tensor, *, present: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Run whole sequences from the initial state: [B, T, outputs] for readout "every", else [B, outputs].

        Args:
            inputs: symbols [B, T], or series [B, T, inputs].
            present: True at the steps that exist, [B, T], for readout "last" or "mean"; None: all.
            lengths: steps of each sequence, [B], followed by padding; see `Rollout`.
        """
        return self._outputs(self.features(inputs, present=present, lengths=lengths))

    @property
    def headed(self) -> bool:
        """Whether the outputs are a linear map of the features."""
        return self.head is not None

    def features(self, inputs: Tensor, *, present: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Return what the head maps to the outputs, [B, T, D] or [B, D]; the arguments are those of `forward`."""
        if self.readout == "every":
            return self._run(inputs, None, None, lengths)[0]
        if present is None and lengths is not None:
            present = steps_of(lengths, inputs)[1]
        return self._summary(inputs, present, lengths)

    def advance(
        self,
        inputs: Tensor,
        state: tuple[State, ...] | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        head: bool = True,
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Run some steps from a state; return the outputs of every step and the state after the last.

        Args:
            inputs, lengths: as for `forward`; behind `lengths` the head sees zeros.
            state: the state of every cell, from `start` or `advance`; None: the initial state.
            reset: True at the steps before which the state is reset, [B, T].
            head: False returns features, without the head.
        """
        features, state = self._run(inputs, state, reset, lengths)
        return self._outputs(features) if head else features, state

    def start(self, batch: int) -> tuple[State, ...]:
        """Return the state of every cell before the first step, for this many sequences."""
        like = next(self.parameters())
        return tuple(start(cell, like.new_empty(batch, 0, cell.input_size), None) for cell in self._cells)

    def step(self, inputs: Tensor, state: tuple[State, ...]) -> tuple[Tensor, tuple[State, ...]]:
        """Advance one step: inputs [B] symbols or [B, inputs]; returns ([B, outputs], state). Time and memory O(1)."""
        outputs, state = self.advance(inputs.unsqueeze(1), state)
        return outputs.squeeze(1), state

    generate = generate

    def time_chunk(self, batch: int) -> int:
        """Return how many steps to run at once when no gradient is needed, so that memory is bounded in the length."""
        return max(1, self.window_floats // (batch * self.step_floats))

    @property
    def step_floats(self) -> int:
        """About how many numbers one step of one sequence keeps in memory."""
        return sum(cell.step_floats for cell in self._cells) + self.outputs

    @classmethod
    def from_torch(cls, module: nn.LSTM | nn.GRU) -> Recurrent:
        """Return the model that computes what a torch LSTM or GRU does: inputs [B, T, features] → hidden states.

        Bidirectional or projected modules, and those with dropout or batch_first=False, are refused.
        """
        return cls(cell=convert.cells_from_torch(module), inputs=module.input_size)

    def to_torch(self, initial: bool = False) -> Any:
        """Return the cells as one torch module (batch first). Embedding, head and readout are not part of it.

        An LSTM here trains its initial state, which a torch module does not have: with `initial` the pair (module,
        initial state) is returned, [layers, 1, hidden] each, to be expanded to the batch for `module(x, state)`.

        Raises:
            UsageError: if the cells are not all LSTM, or all GRU, of one hidden size; or if an initial state that is
                not zero would be lost.
        """
        return convert.cells_to_torch(tuple(self._cells), initial)

    @property
    def _cells(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if isinstance(cell, Cell))

    def _run(
        self, inputs: Tensor, state: tuple[State, ...] | None, reset: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, tuple[State, ...]]:
        """Return the last cell's readouts of every step, and the states after it."""
        expected = "[batch, time] symbols" if self.embed is not None else f"[batch, time, {self.inputs}]"
        fits = inputs.dim() == 2 if self.embed is not None else inputs.dim() == 3 and inputs.shape[-1] == self.inputs
        if not fits:
            raise UsageError(f"inputs has shape {tuple(inputs.shape)}; expected {expected}.")
        if self.embed is not None and lengths is not None:  # padding need not be a symbol
            inputs = torch.where(steps_of(lengths, inputs)[1], inputs, 0)
        features = inputs if self.embed is None else self._embedded(self.embed, inputs)
        states, padded = [], {} if lengths is None else {"lengths": lengths}
        for i, cell in enumerate(self._cells):
            features, final = self.rollout.read(cell, features, None if state is None else state[i], reset, **padded)
            states.append(final)
        return features, tuple(states)

    def _embedded(self, embed: nn.Embedding, symbols: Tensor) -> Tensor:
        if symbols.is_floating_point():
            raise UsageError(f"inputs has dtype {symbols.dtype}; a model with vocab={self.vocab} takes whole numbers.")
        try:
            return embed(symbols)
        except IndexError:
            low, high = int(symbols.min()), int(symbols.max())
            raise UsageError(
                f"inputs has symbols {low} … {high}; the model has 0 … {embed.num_embeddings - 1}."
            ) from None

    def _outputs(self, features: Tensor) -> Tensor:
        return features if self.head is None else self.head(features)

    def _summary(self, inputs: Tensor, present: Tensor | None, lengths: Tensor | None) -> Tensor:
        """Return the last or the mean readout of the steps that exist, window by window without a gradient."""
        batch, time = inputs.shape[:2]
        if present is None:
            present = torch.ones(batch, time, dtype=torch.bool, device=inputs.device)
        chunk = max(1, time if torch.is_grad_enabled() else self.time_chunk(batch))
        last = present.long().cumsum(1).argmax(1)
        total, state = None, None
        for begin in range(0, max(time, 1), chunk):
            window = slice(begin, begin + chunk)
            left = None if lengths is None else (lengths - begin).clamp(0, inputs[:, window].shape[1])
            features, state = self._run(inputs[:, window], state, None, left)
            weight = present[:, window].to(features.dtype)
            if self.readout == "last":
                steps = torch.arange(begin, begin + features.shape[1], device=inputs.device)
                weight = weight * (steps == last.unsqueeze(1))
            part = (features * weight.unsqueeze(-1)).sum(1)
            total = part if total is None else total + part
        assert total is not None
        return total / present.sum(1, keepdim=True).clamp(min=1) if self.readout == "mean" else total


def _check_sizes(
    cells: tuple[Cell, ...], vocab: int | None, inputs: int | None, embed: int | None, readout: str
) -> None:
    if not cells:
        raise UsageError("cell=() is empty; give one cell or a tuple of cells.")
    if (vocab is None) == (inputs is None):
        raise UsageError(f"Give vocab (symbols) or inputs (real-valued series); got vocab={vocab}, inputs={inputs}.")
    require_positive(vocab=vocab, inputs=inputs, embed=embed)
    if readout not in READOUTS:
        raise UsageError(f'readout="{readout}" must be "every", "last" or "mean".')
    if embed is not None and vocab is None:
        raise UsageError(f"embed={embed} is for symbols; a model with inputs={inputs} has no embedding.")
    name, size = ("embed", embed) if vocab is not None else ("inputs", inputs)
    for cell in cells:
        if size is not None and cell.input_size != size:
            raise UsageError(f"{name}={size} does not fit {type(cell).__name__} with input_size={cell.input_size}.")
        name, size = f"{type(cell).__name__}.output_size", cell.output_size
