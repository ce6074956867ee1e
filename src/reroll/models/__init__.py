"""From symbols or series to logits or values: `Recurrent` is a stack of cells under a rollout."""

from reroll.models.recurrent import Recurrent

__all__ = ["Recurrent"]
