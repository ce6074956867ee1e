"""From symbols or series to logits or values: `Recurrent` is a stack of cells under a rollout.

What training asks of a model is in `base`; any `nn.Module` will do.
"""

from reroll.models.base import Headed, Interface, Model, Stateful
from reroll.models.gpt import GPT
from reroll.models.recurrent import Recurrent
from reroll.models.roles import ROLES, roles

__all__ = ["GPT", "ROLES", "Headed", "Interface", "Model", "Recurrent", "Stateful", "roles"]
