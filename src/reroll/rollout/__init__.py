"""How a cell is evaluated along time: a choice like the optimizer. `Sequential` is the loop everyone trusts."""

from reroll.rollout.base import Rollout, Trajectory
from reroll.rollout.sequential import Sequential

__all__ = ["ROLLOUTS", "Rollout", "Sequential", "Trajectory"]

ROLLOUTS = (Sequential(), Sequential(kernel="reference"))
"""Every rollout. The tests run over this tuple, so a new entry inherits them."""
