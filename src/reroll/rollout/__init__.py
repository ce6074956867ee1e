"""How a cell is evaluated along time: a choice like the optimizer. `Sequential` is the loop everyone trusts."""

from reroll.rollout.base import Rollout, Trajectory
from reroll.rollout.damping import Clip, Kalman, Scale
from reroll.rollout.linearise import Block, Dense, Diagonal, Hutchinson, Identity, Zero
from reroll.rollout.newton import Newton
from reroll.rollout.presets import deer, elk, jacobi, picard, quasi_deer, quasi_elk
from reroll.rollout.sequential import Sequential

__all__ = [
    "ROLLOUTS", "Block", "Clip", "Dense", "Diagonal", "Hutchinson", "Identity", "Kalman", "Newton", "Rollout", "Scale",
    "Sequential", "Trajectory", "Zero", "deer", "elk", "jacobi", "picard", "quasi_deer", "quasi_elk",
]  # fmt: skip

ROLLOUTS = (Sequential(), Sequential(kernel="reference"), deer(), quasi_deer(), elk(), quasi_elk(), picard(), jacobi())
"""Every rollout. The tests run over this tuple, so a new entry inherits them."""
