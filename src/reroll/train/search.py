"""`--lr auto`: find a learning rate by trying several for a few steps each, from the same weights.

    1. a logarithmic grid from low to high, one point per factor of ten
    2. around the best: the geometric means of it and its tested neighbours
    3. the same once more

A rate is scored by the mean loss over the second half of its steps, on batches other than the run's first; one that
diverges scores infinity. No rate is tested twice. Weights, optimizer and generators are restored bit for bit. An ε tied
to the rate is varied with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from reroll.data.task import with_nats
from reroll.errors import EpsilonTooSmall, RunError
from reroll.keys import Key
from reroll.optim import step
from reroll.rollout.monitor import monitoring
from reroll.train import checkpoint
from reroll.train.session import Session

ROUNDS = 2


def search_lr(session: Session, note: Callable[[str], None], stop: Sequence[str] = ()) -> float | None:
    """Return the best learning rate of those tried, or None on a signal in `stop`; the session is left unchanged."""
    optim = session.config.optim
    losses: dict[float, float] = {}
    for round in range(1 + ROUNDS):
        for lr in midpoints(losses) if round else grid(optim.search_low, optim.search_high):
            losses[lr] = trial(session, lr, optim.search_steps)
            note(f"Trying lr {lr:.3g}: loss {with_nats(session.task, f'{losses[lr]:.4f}')}")
            if session.mesh.share(bool(stop)):
                return None
    best = min(losses, key=lambda lr: losses[lr])
    if not math.isfinite(losses[best]):
        raise RunError(
            f"lr=auto: every rate from {optim.search_low:g} to {optim.search_high:g} gave a non-finite loss, or an ε "
            "too small for the precision. Lower optim.search_low, set epsilon, or check the data."
        )
    note(f"Using lr {best:.3g}, the best of {len(losses)}.")
    for edge, name, beyond in ((min(losses), "search_low", "below"), (max(losses), "search_high", "above")):
        if best == edge:
            edge *= 10 if beyond == "above" else 0.1
            note(f"It is at the edge of the range, and a rate {beyond} it may be better; try optim.{name}={edge:g}.")
    return best


def grid(low: float, high: float) -> list[float]:
    """Return rates from low to high, evenly spaced in their logarithm, by a factor of ten or less.

    Example:
        >>> grid(1e-5, 0.1)
        [1e-05, 0.0001, 0.001, 0.01, 0.1]
    """
    count = max(1, math.ceil(math.log10(high / low) - 1e-9))
    return [float(f"{low * (high / low) ** (i / count):.6g}") for i in range(count + 1)]


def midpoints(losses: dict[float, float]) -> list[float]:
    """Return the untested geometric means of the best rate and its tested neighbours.

    Example:
        >>> midpoints({0.01: 2.0, 0.1: 1.0, 1.0: 3.0})
        [0.0316228, 0.316228]
    """
    rates = sorted(losses)
    at = rates.index(min(losses, key=lambda lr: losses[lr]))
    means = [float(f"{math.sqrt(low * high):.6g}") for low, high in pairwise(rates[max(at - 1, 0) : at + 2])]
    return [lr for lr in means if lr not in losses]


def trial(session: Session, lr: float, steps: int) -> float:
    """Take a few steps at a rate and restore weights and optimizer; return the mean loss of the second half."""
    config, most, losses = session.config, getattr(session.task, "most_steps", None), []
    before = {name: tensor.clone() for name, tensor in checkpoint.weights_of(session.model).items()}
    state = copy.deepcopy(session.optimizer.state_dict())
    key, settings = Key(config.run.seed).at("lr search"), session.settings(lr)
    try:
        for number in range(steps):
            # Far from the first batches, which the run itself will use; of data with an end, the last ones.
            far = 10**9 + number if most is None else (most - 1 - number) % most
            batch = session.batch(0 if config.task.overfit else far)
            try:
                with monitoring():  # fallbacks during the search are not reported
                    result = step(
                        session.model, session.loss_fn, session.estimator, session.optimizer, batch, settings,
                        key.at(number), clip=config.optim.clip, update=config.optim.update,
                        tied=config.gradient.is_tied,
                    )  # fmt: skip
            except EpsilonTooSmall:  # at this rate, or for the weights it has led to
                return math.inf
            if not result.outcome:
                return math.inf
            losses.append(float(result.loss))
    finally:
        checkpoint.put_weights(session.model, before, "the snapshot before the trial")
        session.optimizer.load_state_dict(state)
    late = losses[len(losses) // 2 :]
    return sum(late) / len(late)
