"""`--lr auto`: find a learning rate by trying some, a few steps each, from the same weights.

    1. a logarithmic grid from low to high, a point per factor of ten
    2. around the best: the geometric middles between it and its tested neighbours
    3. again, once

A rate is judged by the mean loss over the second half of its steps, on batches the run itself does not begin with; one
that diverges counts as infinite. No rate is tested twice, and weights, optimizer and generators come back bit for bit.
The ε tied to a rate is tried with it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

from reroll.errors import EpsilonTooSmall, RunError
from reroll.keys import Key
from reroll.optim import step
from reroll.rollout.monitor import monitoring
from reroll.train import checkpoint
from reroll.train.session import Session

ROUNDS = 2


def search_lr(session: Session, note: Callable[[str], None], stop: Sequence[str] = ()) -> float | None:
    """Return the best learning rate of those tried, None once there is a signal in `stop`; the session is as before."""
    optim = session.config.optim
    losses: dict[float, float] = {}
    for round in range(1 + ROUNDS):
        for lr in middles(losses) if round else grid(optim.search_low, optim.search_high):
            losses[lr] = trial(session, lr, optim.search_steps)
            note(f"Trying lr {lr:.3g}: loss {losses[lr]:.4f}")
            if stop:
                return None
    best = min(losses, key=lambda lr: losses[lr])
    if not math.isfinite(losses[best]):
        raise RunError(
            f"lr=auto: every rate from {optim.search_low:g} to {optim.search_high:g} gave a non-finite loss, or an ε "
            "too small for the precision. Set optim.search_low lower or --epsilon, or check the data."
        )
    note(f"Taking lr {best:.3g} of the {len(losses)} tried.")
    for edge, name, beyond in ((min(losses), "search_low", "below"), (max(losses), "search_high", "above")):
        if best == edge:
            note(f"It is the edge of what was tried: a rate {beyond} it may be better. Set optim.{name} {beyond} it.")
    return best


def grid(low: float, high: float) -> list[float]:
    """Return rates from low to high, evenly spaced in their logarithm, a factor of ten or less apart.

    Example:
        >>> grid(1e-5, 0.1)
        [1e-05, 0.0001, 0.001, 0.01, 0.1]
    """
    count = max(1, math.ceil(math.log10(high / low) - 1e-9))
    return [float(f"{low * (high / low) ** (i / count):.6g}") for i in range(count + 1)]


def middles(losses: dict[float, float]) -> list[float]:
    """Return the untested geometric middles between the best rate and its tested neighbours.

    Example:
        >>> middles({0.01: 2.0, 0.1: 1.0, 1.0: 3.0})
        [0.0316228, 0.316228]
    """
    rates = sorted(losses)
    at = rates.index(min(losses, key=lambda lr: losses[lr]))
    near = [rates[i] for i in (at - 1, at + 1) if 0 <= i < len(rates)]
    between = [float(f"{math.sqrt(rates[at] * other):.6g}") for other in near]
    return [lr for lr in between if lr not in losses]


def trial(session: Session, lr: float, steps: int) -> float:
    """Take a few steps with a rate, and put weights and optimizer back; return the mean loss of the second half."""
    config, losses = session.config, []
    before = {name: tensor.clone() for name, tensor in checkpoint.weights_of(session.model).items()}
    state = copy.deepcopy(session.optimizer.state_dict())
    key, settings = Key(config.run.seed).at("lr search"), session.settings(lr)
    try:
        for number in range(steps):
            # Far from the first batches, which the run itself will see.
            batch = session.batch(0 if config.task.overfit else 10**9 + number)
            try:
                with monitoring():  # fallbacks during the search are not reported
                    result = step(
                        session.model, session.loss_fn, session.estimator, session.optimizer, batch, settings,
                        key.at(number), clip=config.optim.clip, update=config.optim.update,
                        tied=config.gradient.is_tied,
                    )  # fmt: skip
            except EpsilonTooSmall:  # for this rate, or for what it has made of the weights
                return math.inf
            if not result.outcome:
                return math.inf
            losses.append(float(result.loss))
    finally:
        checkpoint.put_weights(session.model, before, "the snapshot before the trial")
        session.optimizer.load_state_dict(state)
    late = losses[len(losses) // 2 :]
    return sum(late) / len(late)
