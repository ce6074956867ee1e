"""Which rule updates which parameter: rules × roles → groups that are explicit and complete.

    sgd      every parameter; momentum
    adamw    every parameter
    muon     matrices by `Muon`; embedding, head, kernels and vectors by AdamW

Weight decay is decoupled, and leaves vectors alone. Muon orthogonalises the update of a matrix, which makes sense
for a matrix that maps features to features; the rows of an embedding and of a head are separate vectors (Jordan et al.,
"Muon", 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from reroll.errors import UsageError, did_you_mean, require_positive
from reroll.grad.base import trainable
from reroll.models.roles import ROLES, roles
from reroll.optim.muon import Muon
from reroll.optim.orthogonal import JORDAN
from reroll.optim.sgd import SGD, evaluated

Groups = list[dict[str, Any]]
Betas = tuple[float, float]


def _sgd(groups: Groups, lr: float, *, momentum: float = 0.9) -> torch.optim.Optimizer:
    return SGD(groups, lr, momentum)


def _adamw(groups: Groups, lr: float, *, betas: Betas = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr, betas, eps)


def _muon(
    groups: Groups, lr: float, *, momentum: float = 0.9, nesterov: bool = True, ns_coefficients: Any = JORDAN,
    ns_steps: int | None = None, adjust_lr_fn: Any = "match_rms_adamw", beta2: float | None = None,
    cautious: bool = False, normalize_rows: bool = False, dtype: torch.dtype | None = None,
) -> torch.optim.Optimizer:  # fmt: skip
    return Muon(
        groups, lr, momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients, ns_steps=ns_steps,
        adjust_lr_fn=adjust_lr_fn, beta2=beta2, cautious=cautious, normalize_rows=normalize_rows, dtype=dtype,
    )  # fmt: skip


RULES: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw, "muon": _muon}
"""Every update rule, over groups with their own weight decay; each takes the options that it names."""

OPTIMIZERS: dict[str, dict[str, str]] = {
    "sgd": dict.fromkeys(ROLES, "sgd"),
    "adamw": dict.fromkeys(ROLES, "adamw"),
    "muon": dict.fromkeys(ROLES, "adamw") | {"matrix": "muon"},
}
"""Every optimizer a config can name: the rule of each role. The tests run over this table."""


def build_optimizer(
    name: str,
    model: nn.Module | Mapping[str, Tensor],
    lr: float,
    *,
    weight_decay: float = 0.0,
    lr_scales: Mapping[str, float] | None = None,
    **options: Any,
) -> torch.optim.Optimizer:
    """Return an optimizer over the parameters of a model.

    Args:
        name: "sgd", "adamw" or "muon".
        model: the module, whose parameters with `requires_grad` are trained; or tensors by name, whose roles follow
            from their shapes.
        lr: η.
        weight_decay: λ, decoupled (θ ← (1 − η λ) θ), on tensors with two axes or more.
        lr_scales: factors on η by role.
        options: of the rules: momentum (0.9) of sgd and muon; betas and eps of adamw; the others of `Muon`, whose
            adjust_lr_fn is "match_rms_adamw" here.

    Raises:
        UsageError: for an unknown name or role, a number out of range, or a rule without parameters.
    """
    require_positive(lr=lr, **{f"lr_scales[{role!r}]": scale for role, scale in (lr_scales or {}).items()})
    momentum, betas = options.get("momentum", 0.0), options.get("betas", ())
    if not 0 <= momentum < 1 or not all(0 <= beta < 1 for beta in betas) or weight_decay < 0:
        raise UsageError(
            f"momentum={momentum} and betas={betas} must lie in [0, 1), weight_decay={weight_decay} must be ≥ 0."
        )
    if name not in OPTIMIZERS:
        raise UsageError(f'optimizer="{name}" is not known.{did_you_mean(name, OPTIMIZERS)}')
    all_groups = groups(model, OPTIMIZERS[name], weight_decay, lr_scales)
    for group in all_groups:
        group["lr"] = lr * group["lr_scale"]
    by_rule = {rule: [g for g in all_groups if g["rule"] == rule] for rule in dict.fromkeys(OPTIMIZERS[name].values())}
    if not by_rule[OPTIMIZERS[name]["matrix"]]:
        raise UsageError(f'optimizer="{name}" needs matrices besides embedding and head; use optimizer="adamw".')
    takes = {rule: signature(RULES[rule]).parameters for rule in by_rule}
    known = {name for parameters in takes.values() for name in list(parameters)[2:]}
    for option in options.keys() - known:
        raise UsageError(f'{option} is no option of optimizer="{name}".{did_you_mean(option, known)}')
    built = {
        rule: RULES[rule](some, lr, **{name: value for name, value in options.items() if name in takes[rule]})
        for rule, some in by_rule.items()
        if some
    }
    return next(iter(built.values())) if len(built) == 1 else MultiOptimizer(built)


def groups(
    model: nn.Module | Mapping[str, Tensor],
    rules: Mapping[str, str],
    weight_decay: float = 0.0,
    lr_scales: Mapping[str, float] | None = None,
) -> Groups:
    """Return parameter groups, as torch's optimizers take them, in which every trainable parameter is exactly once.

    Args:
        model, weight_decay, lr_scales: as for `build_optimizer`.
        rules: the rule of each role.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
        >>> for group in groups(model, OPTIMIZERS["muon"], 0.1, {"head": 0.5}):
        ...     print(group["rule"], group["lr_scale"], group["weight_decay"], *group["param_names"])
        muon 1.0 0.1 1.weight
        adamw 1.0 0.1 0.weight
        adamw 0.5 0.1 2.weight
        adamw 1.0 0.0 1.bias 2.bias
    """
    scales = lr_scales or {}
    for role in (*rules, *scales):
        if role not in ROLES:
            raise UsageError(f'"{role}" is no role of a parameter.{did_you_mean(role, ROLES)}')
    parameters, role_of = trainable(model) if isinstance(model, nn.Module) else model, roles(model)
    if parameters is model and any(
        (rules[role], scales.get(role)) != (rules["matrix"], scales.get("matrix")) for role in ("embedding", "head")
    ):
        raise UsageError("an embedding or a head cannot be told from a matrix by its shape; pass the model itself.")
    members: dict[tuple[str, float, float], list[str]] = {}
    for name in sorted(parameters, key=lambda name: ROLES.index(role_of[name])):
        role = role_of[name]
        numbers = rules[role], scales.get(role, 1.0), weight_decay if role != "vector" else 0.0
        members.setdefault(numbers, []).append(name)
    return [
        {"params": [parameters[name] for name in names], "param_names": names, "rule": rule, "lr_scale": scale,
         "weight_decay": decay}
        for (rule, scale, decay), names in members.items()
    ]  # fmt: skip


class MultiOptimizer(torch.optim.Optimizer):
    """Optimizers by name, as one; no tensor is in two of them.

    `param_groups` are theirs, concatenated, so that learning-rate schedulers work; `state_dict` holds theirs by name.
    A group is added to one of the optimizers, not here.

    Example:
        >>> p, q = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
        >>> both = MultiOptimizer({"sgd": torch.optim.SGD([p], lr=0.1), "adamw": torch.optim.AdamW([q], lr=0.01)})
        >>> [group["lr"] for group in both.param_groups], list(both.state_dict())
        ([0.1, 0.01], ['sgd', 'adamw'])
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]):
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        super().__init__([group for optimizer in optimizers.values() for group in optimizer.param_groups], {})
        self.optimizers = dict(optimizers)

    @property
    def state(self) -> dict[Tensor, Any]:
        """The states of all, by tensor; read-only."""
        return {p: state for optimizer in self.optimizers.values() for p, state in optimizer.state.items()}

    @state.setter
    def state(self, value: Any) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]: torch's is an attribute
        # torch's constructor sets an empty one; each optimizer has its own.
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: the optimizer to add it to is ambiguous."""
        if self.optimizers:
            raise UsageError(f"add the group to one of .optimizers: {', '.join(self.optimizers)}.")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step with each; return what the closure returned, which is called once."""
        loss = evaluated(closure)
        for optimizer in self.optimizers.values():
            optimizer.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all, by name."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if state_dict.keys() != self.optimizers.keys():
            raise UsageError(
                f"the state is of {', '.join(state_dict)}; the optimizers are {', '.join(self.optimizers)}."
            )
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state_dict[name])
        self._share_groups()

    def _share_groups(self) -> None:
        # Loading replaces the groups.
        self.param_groups = [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]

    def __getstate__(self) -> dict[str, Any]:
        return {"defaults": {}, "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share_groups()


def optimizers_of(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers that one is made of: those of a `MultiOptimizer`, or itself."""
    return list(optimizer.optimizers.values()) if isinstance(optimizer, MultiOptimizer) else [optimizer]
