"""One iterate of Newton's method along time: a trajectory, its residual r_t = f_t(s_{t−1}) − s_t, the linearisation.

Everything is a field, [D, T, B] (see `reroll.rollout.problem`), so sequences are the last axis.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from reroll.rollout.damping import Damping
from reroll.rollout.linearise import Linearisation, Transition
from reroll.rollout.problem import Field, rows

CLIP = 1e8
"""States are clamped to this magnitude while iterating."""


class Iterate(NamedTuple):
    """A trajectory, and its residual and linearisation.

    Args:
        field: the recurrence.
        states, residual: [D, T, B].
        transition: the linearisation.
        error: largest residual of each feature and sequence, [D, B]; infinite where that is not finite.
    """

    field: Field
    states: Tensor
    residual: Tensor
    transition: Transition
    error: Tensor

    @classmethod
    def at(
        cls,
        field: Field,
        states: Tensor,
        linearise: Linearisation,
        before: Transition | None = None,
        fresh: bool = True,
    ) -> Iterate:
        """Evaluate the recurrence at a trajectory; `fresh`: linearise anew, do not reuse the previous linearisation."""
        size, time, batch = field.shape
        ahead = field.before(states)
        fresh = fresh or before is None or before.tensor is None
        if field.programs is not None:
            following, a = field.run(ahead, fresh)
        else:
            following, a = linearise(field.cell, field.layout, field.inputs, rows(ahead), time, fresh)
            following = following.T.reshape(size, time, batch)
            # [rows, …] → […, T, B]
            a = None if a is None else a.movedim(0, -1).contiguous().unflatten(-1, (time, batch))
        if a is None and linearise.kind == "identity":
            a = torch.ones_like(states)
        if a is None:
            a = None if before is None else before.tensor
        else:  # zero where a sequence starts
            a[..., 0, :] = 0
            if field.reset is not None:
                a.masked_fill_(field.reset, 0.0)
        residual = following - states
        return cls(field, states, residual, Transition(linearise.kind, a), largest(residual))

    def merit(self) -> Tensor:
        """Return Σ r², [B]."""
        return self.residual.square().sum((0, 1)).nan_to_num(nan=torch.inf, posinf=torch.inf)

    def exact_steps(self) -> Tensor:
        """Return how many leading steps satisfy the recurrence to rounding, [B]."""
        epsilon = torch.finfo(self.states.dtype).eps
        # In half precision a rounding error changes the following states as much as a wrong state would.
        precision = 8 * epsilon if epsilon < 1e-5 else 0.0
        # Against f and not s: where everything before is exact, f is the truth, and s may be anything.
        exact = (
            self.residual.abs() <= precision * (self.states + self.residual).abs() + torch.finfo(self.states.dtype).tiny
        )
        return exact.all(0).long().cumprod(0).sum(0)

    def advance(self, damping: Damping, trust: Tensor | None, guess: Tensor, frozen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next trajectory, and how many numbers of each sequence were replaced by the guess, [B].

        Sequences that are `frozen` [B] do not change; `trust` [B] multiplies the damping's variance.
        """
        correction = damping.correct(self.transition, self.residual, trust)
        states, resets = correction.add_(self.states), torch.zeros_like(frozen, dtype=torch.int64)
        # One number that is not finite makes the sum so; so may many large ones, which are clamped below.
        if not bool(torch.isfinite(states.sum())):
            states, resets = self._restart(damping, trust, guess)
        limit = min(CLIP, torch.finfo(states.dtype).max)
        states.clamp_(-limit, limit)
        if bool(frozen.any()):
            states = torch.where(frozen, self.states, states)
        return states, resets

    def _restart(self, damping: Damping, trust: Tensor | None, guess: Tensor) -> tuple[Tensor, Tensor]:
        """Advance with steps that are not finite reset to the guess; steps that are exact do not change."""
        guess = guess.nan_to_num(0.0, 0.0, 0.0)
        kind, a = self.transition
        broken = ~torch.isfinite(self.residual).all(0)
        residual = torch.where(broken, guess - self.states, self.residual).nan_to_num(0.0, 0.0, 0.0)
        if a is not None:
            a = torch.where(broken | ~torch.isfinite(a).flatten(0, -3).all(0), 0.0, a)
        cut = Transition(kind, a)
        states = self.states + damping.correct(cut, residual, trust)
        bad = ~torch.isfinite(states) | broken
        is_exact = torch.arange(states.shape[1], device=states.device).unsqueeze(1) < self.exact_steps()
        states = torch.where(bad, torch.where(is_exact, self.states, guess), states)
        return states, bad.sum((0, 1))

    def merged(self, other: Iterate, which: Tensor) -> Iterate:
        """Return this with some sequences [B] taken from another."""

        def take(a: Tensor, b: Tensor) -> Tensor:
            return torch.where(which, b, a)

        mine, others = self.transition.tensor, other.transition.tensor
        tensor = None if mine is None or others is None else take(mine, others)
        return self._replace(
            states=take(self.states, other.states), residual=take(self.residual, other.residual),
            transition=Transition(self.transition.kind, tensor), error=take(self.error, other.error),
        )  # fmt: skip


def largest(field: Tensor) -> Tensor:
    """Return the largest magnitude of each feature and sequence, [D, B]; infinity where a number is not finite."""
    size, time, batch = field.shape
    # torch reduces a short last axis number by number; blocks of √T steps make it long.
    block = math.isqrt(time)
    whole = time - time % block
    magnitudes = field.abs()
    by_block = magnitudes[:, :whole].reshape(size, -1, block * batch).amax(1).view(size, block, batch).amax(1)
    if whole < time:
        by_block = torch.maximum(by_block, magnitudes[:, whole:].amax(1))
    return by_block.nan_to_num(nan=torch.inf, posinf=torch.inf)
