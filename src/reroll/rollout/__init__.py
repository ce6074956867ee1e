"""How a cell is evaluated along time: a choice like the optimizer. `Sequential` is the loop everyone trusts."""

from reroll.rollout.agreement import Agreement, verify_agreement
from reroll.rollout.auto import Auto, auto
from reroll.rollout.base import Rollout, Trajectory
from reroll.rollout.damping import Clip, Kalman, Scale
from reroll.rollout.linearise import Block, Dense, Diagonal, Hutchinson, Identity, Zero
from reroll.rollout.newton import Newton
from reroll.rollout.predict import Predictability, lyapunov, predictability
from reroll.rollout.presets import deer, elk, jacobi, picard, quasi_deer, quasi_elk
from reroll.rollout.sequential import Sequential

__all__ = [
    "ROLLOUTS", "Agreement", "Auto", "Block", "Clip", "Dense", "Diagonal", "Hutchinson", "Identity", "Kalman", "Newton",
    "Predictability", "Rollout", "Scale", "Sequential", "Trajectory", "Zero", "auto", "deer", "elk", "jacobi",
    "lyapunov", "picard", "predictability", "quasi_deer", "quasi_elk", "verify_agreement",
]  # fmt: skip

ROLLOUTS = (
    Sequential(),
    Sequential(kernel="reference"),
    deer(),
    quasi_deer(),
    elk(),
    quasi_elk(),
    picard(),
    jacobi(),
    auto(),
)
"""Every rollout. The tests run over this tuple, so a new entry inherits them."""
