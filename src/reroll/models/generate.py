"""Continue a prompt, one symbol at a time; or a series, row by row.

    p ∝ exp(logits / temperature), restricted to the `top_k` largest

A symbol is drawn by the Gumbel-max trick, argmax(logits/temperature + g), with g from the keyed generator: the same
seed gives the same text on every device, and no global random state is used.

Reference: Gumbel, "Statistical theory of extreme values", 1954.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reroll.errors import RunError, UsageError, require_positive
from reroll.kernels.philox import random_words
from reroll.keys import Key


@torch.no_grad()
def generate(
    model: Any,
    prompt: Tensor | list[int],
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Continue a prompt; return the new symbols, [length] or [batch, length] as the prompt is.

    Args:
        model: of symbols and `Stateful` (`reroll.models.base`), such as `reroll.models.Recurrent`.
        prompt: symbols [time] or [batch, time], at least one.
        length: how many symbols to add.
        temperature: 1 samples the model's distribution, towards 0 the most likely symbol; 0 is exactly that.
        top_k: draw only from the k most likely symbols.
        seed: selects the draws.

    Raises:
        UsageError: if an argument cannot be used.
        RunError: if the model's outputs are NaN: its weights have diverged.

    Example:
        >>> from reroll import Recurrent, cells
        >>> model = Recurrent(cell=cells.RNN(8, 8), vocab=10)
        >>> model.generate([1, 2, 3], 5, seed=1).shape
        torch.Size([5])
    """
    if isinstance(prompt, str):
        raise UsageError(
            "prompt is a string; pass its symbols, model.tokenizer.encode(prompt), or use `reroll sample`."
        )
    ids = torch.as_tensor(prompt, dtype=torch.int64)
    batched = ids.dim() == 2
    ids = (ids if batched else ids.unsqueeze(0)).to(next(model.parameters()).device)
    require_positive(length=length, top_k=top_k)
    if model.vocab is None:
        raise UsageError("generate needs a model of symbols; this one reads real-valued series (inputs=…).")
    tokenizer = getattr(model, "tokenizer", None)
    size = model.vocab if tokenizer is None else tokenizer.size  # a padded vocabulary has symbols that mean nothing
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise UsageError(f"prompt has shape {tuple(ids.shape)}; pass at least one symbol, [time] or [batch, time].")
    if not 0 <= int(ids.min()) <= int(ids.max()) < size:
        raise UsageError(f"prompt has symbols in [{ids.min()}, {ids.max()}]; the vocabulary is [0, {size}).")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature={temperature} must be zero or a positive number.")
    outputs, state = model.advance(ids)
    key, new, finite = Key(seed).at("generate"), [], []
    for position in range(length):
        if new:
            outputs, state = model.advance(new[-1].unsqueeze(1), state)
        logits = outputs[:, -1, :size]
        finite.append(~logits.isnan().any())  # −inf is a logit: of a symbol that is never drawn
        new.append(_draw(logits, temperature, top_k, key.at(position)))
    if not torch.stack(finite).all():
        raise RunError("The model's outputs are NaN: it has diverged. Load an earlier checkpoint, or train it again.")
    result = torch.stack(new, 1)
    return result if batched else result[0]


@torch.no_grad()
def forecast(model: Any, history: Tensor, steps: int) -> Tensor:
    """Continue a series: each row predicted is the input of the next; returns [batch, steps, features].

    Args:
        model: of series, with an output for every step that predicts the next row; `Stateful` (`reroll.models.base`).
        history: [batch, time, features], at least one step, in the units of training.
        steps: how many rows to add.

    Example:
        >>> from reroll import Recurrent, cells
        >>> forecast(Recurrent(cell=cells.RNN(2, 8), inputs=2, outputs=2), torch.randn(1, 9, 2), 4).shape
        torch.Size([1, 4, 2])
    """
    require_positive(steps=steps)
    if model.vocab is not None or model.outputs != model.inputs or model.readout != "every":
        raise UsageError("forecast needs a model that predicts the next row of a series from every row.")
    if history.dim() != 3 or not history.shape[1]:
        raise UsageError(
            f"history has shape {tuple(history.shape)}; pass [batch, time, features], with at least one step."
        )
    outputs, state = model.advance(history)
    rows = [outputs[:, -1]]
    for _ in range(steps - 1):
        outputs, state = model.advance(rows[-1].unsqueeze(1), state)
        rows.append(outputs[:, -1])
    return torch.stack(rows, 1)


def _draw(logits: Tensor, temperature: float, top_k: int | None, key: Key) -> Tensor:
    """Draw one symbol per row of logits [batch, vocab]."""
    if temperature == 0:
        return logits.argmax(-1)
    scores = logits.float() / temperature
    if top_k is not None and top_k < scores.shape[-1]:
        smallest = scores.topk(top_k, -1).values[:, -1:]
        scores = scores.masked_fill(scores < smallest, -torch.inf)
    words = torch.from_numpy(random_words(key, scores.numel())).view(scores.shape)
    uniform = (words.double() + 0.5) * 2.0**-32
    gumbel = -torch.log(-torch.log(uniform))
    return (scores + gumbel.to(scores)).argmax(-1)
