"""A gradient into an update: three ways to apply one, schedules, optimizers by name, and CD-RGE as an optimizer."""

from reroll.optim.apply import apply, clip_norm
from reroll.optim.cdrge import CDRGE
from reroll.optim.ema import Average
from reroll.optim.groups import OPTIMIZERS, MultiOptimizer, build_optimizer, groups, optimizers_of
from reroll.optim.muon import Muon
from reroll.optim.orthogonal import orthogonalize
from reroll.optim.schedule import Plateau
from reroll.optim.sgd import SGD
from reroll.optim.step import StepResult, StepSettings, configure, step

__all__ = [
    "CDRGE",
    "OPTIMIZERS",
    "SGD",
    "Average",
    "MultiOptimizer",
    "Muon",
    "Plateau",
    "StepResult",
    "StepSettings",
    "apply",
    "build_optimizer",
    "clip_norm",
    "configure",
    "groups",
    "optimizers_of",
    "orthogonalize",
    "step",
]  # fmt: skip
