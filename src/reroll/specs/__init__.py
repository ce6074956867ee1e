"""Every choice of a run as plain data: tables from the name of a kind to the dataclass that describes it.

    TASKS["text"](path="my.txt").build(seed=0)        a `reroll.data.text.Text`

A kind is a dataclass with its fields, its `check` and its `build`, and one row in a table. No torch: what a spec builds
is imported when it is built.
"""

from reroll.specs.gradient import GRADIENTS
from reroll.specs.model import MODELS, ROLLOUTS
from reroll.specs.optim import OPTIMIZERS, SCHEDULES
from reroll.specs.task import TASKS

__all__ = ["GRADIENTS", "MODELS", "OPTIMIZERS", "ROLLOUTS", "SCHEDULES", "TASKS"]
