"""The gradient by backpropagation: the baseline for everything else.

g = ∂L/∂θ                     exact, of the whole sequence (BPTT)
truncate = k                  the state is carried from window to window of k steps, its gradient is not
checkpoint = True             exact, storing only the state at the borders of about √T windows and recomputing the
                              rest in the backward pass
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from reroll.data.batch import START
from reroll.errors import UsageError
from reroll.grad.base import Dense, Estimate, LossFn, trainable
from reroll.grad.evaluate.base import read_loss
from reroll.grad.evaluate.snapshot import cuda_devices, seed_of, seeded_generators
from reroll.grad.units import batch_rows, batch_size, with_state
from reroll.keys import Key
from reroll.outcome import Outcome
from reroll.specs.gradient import BackpropOptions
from reroll.trees import combine_states, map_state

NO_GRADIENT = (
    "the loss has no gradient: it depends on no trainable parameter, or went through .item(), .detach(), NumPy or "
    "no_grad. Use CentralDifference for such a loss."
)


@dataclass(frozen=True)
class Backprop(BackpropOptions):
    """Compute the gradient by automatic differentiation, into `.grad`.

    Args:
        accumulate: parts the batch is split into by sequences: the same gradient with the memory of one part.
        truncate: steps through which the gradient flows; None is all of them.
        checkpoint: recompute, for memory that grows as √T.

    `truncate` and `checkpoint` need a model that carries a state (`reroll.models.Stateful`, such as `reroll.Recurrent`)
    and batches with `steps` (`reroll.data.Batch`). What model and loss draw from torch's global generators is
    derived from the key, and the generators' state is restored afterwards.

    Example:
        >>> model = nn.Linear(3, 1)
        >>> estimate = Backprop()(model, lambda m, x: m(x).square().mean(), torch.ones(5, 3), Key(0))
        >>> model.weight.grad.shape, estimate.stats["forward_passes"]
        (torch.Size([1, 3]), 1)
    """

    def __post_init__(self) -> None:
        self.check()

    def __call__(self, model: nn.Module, loss_fn: LossFn, batch: Any, key: Key) -> Estimate:
        """Compute the gradient; see `reroll.grad.base.Estimator`."""
        parameters = dict(trainable(model))
        for p in parameters.values():
            p.grad = None
        size = batch_size(batch)
        if self.accumulate > 1 and (size is None or size < self.accumulate):
            raise UsageError(f"accumulate={self.accumulate} cannot split a batch of {size} sequences; lower it.")
        total, passes, states = torch.zeros((), dtype=torch.float64), 0, []
        with seeded_generators(seed_of(key), cuda_devices(parameters)), torch.enable_grad():
            for a in range(self.accumulate):
                part, share = batch, 1.0
                if self.accumulate > 1 and size is not None:
                    begin, end = size * a // self.accumulate, size * (a + 1) // self.accumulate
                    part, share = batch_rows(batch, begin, end), (end - begin) / size
                try:
                    loss, state, windows = self._backward(model, loss_fn, part, share)
                except RuntimeError as error:
                    if "numpy() on Tensor that requires grad" in str(error):
                        raise UsageError(NO_GRADIENT) from error
                    raise
                total, passes = total + loss, passes + windows
                states.append(state)
        finite = bool(torch.isfinite(total))
        return Estimate(
            loss=total,
            gradient=Dense(dict(parameters)),
            outcome=Outcome.ok if finite else Outcome.not_finite,
            stats={"forward_passes": passes},
            state=states[0] if len(states) == 1 else combine_states(states, torch.cat),
        )

    def _backward(self, model: Any, loss_fn: LossFn, batch: Any, share: float) -> tuple[Tensor, Any, int]:
        """Add share · gradient of the batch to `.grad`; return its loss, the state after it, and forward passes."""
        if not (self.truncate or self.checkpoint):
            result = loss_fn(model, batch)
            loss, state = _mean(result)
            (loss * share).backward()
            return loss.detach().cpu().double() * share, map_state(state, torch.detach), 1
        windows = self._windows(model, batch)
        fresh = batch.state is None or batch.state is START
        state = model.start(len(batch)) if fresh else batch.state
        total, graph = torch.zeros((), dtype=torch.float64), None
        for window in windows:
            if self.truncate:
                loss, state = _mean(loss_fn(model, with_state(window, map_state(state, torch.detach))))
                (loss * share).backward()
            else:
                loss, state = recompute(_window_loss, loss_fn, model, window, state, use_reentrant=False)
                graph = loss if graph is None else graph + loss
            total = total + loss.detach().cpu().double() * share
        if graph is not None:
            (graph * share).backward()
        carried = map_state(state, torch.detach) if batch.state is not None else None
        return total, carried, len(windows) * (2 if self.checkpoint else 1)

    def _windows(self, model: Any, batch: Any) -> list[Any]:
        option = f"truncate={self.truncate}" if self.truncate else "checkpoint=True"
        if not (getattr(model, "stateful", False) and hasattr(batch, "steps") and batch.mask.dim() > 1):
            raise UsageError(
                f"{option} needs a model that carries a state (reroll.models.Stateful, such as reroll.Recurrent), a "
                "reroll Batch, and an output at every step."
            )
        length = self.truncate or math.isqrt(max(batch.time - 1, 0)) + 1
        return [replace(batch.steps(t, t + length), state=None) for t in range(0, max(batch.time, 1), length)]


def _window_loss(loss_fn: LossFn, model: Any, window: Any, state: Any) -> tuple[Tensor, Any]:
    return _mean(loss_fn(model, with_state(window, state)))


def _mean(result: Any) -> tuple[Tensor, Any]:
    loss, state = read_loss(result)
    if not loss.requires_grad:
        raise UsageError(NO_GRADIENT)
    return (loss.mean() if loss.dim() else loss), state
