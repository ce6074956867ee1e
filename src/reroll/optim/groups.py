"""Build the optimizer for a model: which rule for which parameter, explicit and complete.

    sgd      every parameter; momentum; weight decay decoupled, on matrices only
    adamw    every parameter; weight decay on matrices only
    muon     matrices of the recurrence by torch.optim.Muon; embedding, head and vectors by AdamW

Muon orthogonalises the update of a matrix, which means something for a matrix that maps features to features; the rows
of an embedding and of a head are separate vectors (Jordan et al., "Muon", 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from reroll.errors import UsageError, nearest, require_positive

OPTIMIZERS = ("sgd", "adamw", "muon")
"""Every optimizer a config can name. The tests run over this tuple."""


def build_optimizer(
    name: str,
    parameters: Mapping[str, Tensor],
    lr: float,
    *,
    momentum: float = 0.9,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
) -> Any:
    """Return an optimizer over named parameters.

    Args:
        name: "sgd", "adamw" or "muon".
        parameters: the tensors by name, as `reroll.grad.base.trainable` gives them.
        lr: η.
        momentum: of sgd and muon.
        betas: of adamw.
        weight_decay: λ, decoupled (θ ← (1 − η λ) θ), on tensors with two axes or more.

    Raises:
        UsageError: for an unknown name or a number out of range.
    """
    require_positive(lr=lr)
    if not 0 <= momentum < 1 or not all(0 <= beta < 1 for beta in betas) or weight_decay < 0:
        raise UsageError(
            f"momentum={momentum} and betas={betas} must lie in [0, 1), weight_decay={weight_decay} must be ≥ 0."
        )
    matrices = [p for p in parameters.values() if p.dim() >= 2]
    vectors = [p for p in parameters.values() if p.dim() < 2]
    if name == "sgd":
        groups = [
            {"params": matrices, "reroll_weight_decay": weight_decay},
            {"params": vectors, "reroll_weight_decay": 0.0},
        ]
        return torch.optim.SGD([group for group in groups if group["params"]], lr=lr, momentum=momentum)
    if name == "adamw":
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)
    if name == "muon":
        hidden = [p for n, p in parameters.items() if is_hidden_matrix(n, p)]
        others = {n: p for n, p in parameters.items() if not is_hidden_matrix(n, p)}
        if not hidden:
            raise UsageError('optimizer="muon" needs matrices besides embedding and head; use optimizer="adamw".')
        muon = torch.optim.Muon(
            hidden, lr=lr, momentum=momentum, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        if not others:
            return muon
        return Together(muon, build_optimizer("adamw", others, lr, betas=betas, weight_decay=weight_decay))
    raise UsageError(f'optimizer="{name}" is not known.{nearest(name, OPTIMIZERS)}')


def is_hidden_matrix(name: str, p: Tensor) -> bool:
    """Whether a parameter maps features to features: a matrix that is neither embedding nor head.

    Example:
        >>> is_hidden_matrix("cells.0.weight_hh", torch.zeros(4, 4)), is_hidden_matrix("head.weight", torch.zeros(4, 4))
        (True, False)
    """
    return p.dim() == 2 and name.split(".")[0] not in ("embed", "head")


class Together:
    """Several optimizers that step as one, each over its own parameters."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all of them."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        """Take a step with each."""
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all, by position."""
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` returned."""
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])
