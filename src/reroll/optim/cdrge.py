"""CD-RGE as a drop-in optimizer: four lines around any module, no backward pass.

    optimizer = CDRGE(model.named_parameters(), lr=0.01)
    loss = optimizer.step(lambda: loss_fn(model(x), y))

It is a thin front of `CentralDifference` and a step of gradient descent, for plain loops, accelerate, or any code that
steps an optimizer with a closure. Learning-rate schedulers and `state_dict` work as on every torch optimizer.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from reroll.errors import RunError, UsageError, require_positive
from reroll.grad.base import Estimate, Seeded, canonical_name, check_names, check_streams
from reroll.grad.central_difference import CentralDifference, Evaluate
from reroll.keys import Key
from reroll.outcome import Outcome

_EXAMPLE = (
    "CDRGE.step needs a closure that returns the loss and does not call backward():\n"
    "    loss = optimizer.step(lambda: loss_fn(model(x), y))"
)


class CDRGE(torch.optim.Optimizer):
    """Gradient descent on central differences along random directions.

    The closure is called 2N times per step, under `no_grad`, with perturbed weights; it must see the same batch each
    time. Both signs of a probe, and all probes of a step, get the same random numbers from torch's generators, which
    are put back afterwards. Buffers that the forward pass changes (batch statistics) see all these passes.

    Args:
        params: parameters, parameter groups, or `model.named_parameters()`. With names, the noise of a tensor follows
            its name; without, its place, "group.index".
        lr: η.
        probes: N, directions per step.
        epsilon: ε. None ties it to the learning rate, ε = max(η, epsilon_min), group by group, at every step.
        seed: names the noise of the run.
        epsilon_min: the floor of a tied ε.
        momentum: μ of v ← μ v + ĝ, θ ← θ − η v; it keeps one more copy of the weights.
        weight_decay: λ, decoupled.
        noise, evaluate: as for `CentralDifference`; "auto" overwrites the weights and restores them bit for bit,
            "tiles" leaves them untouched.

    Raises:
        UsageError: if an argument is out of range or a parameter cannot be trained.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> x, y = torch.eye(2), torch.ones(2, 1)
        >>> optimizer = CDRGE(model.named_parameters(), lr=0.05, probes=16)
        >>> losses = [optimizer.step(lambda: (model(x) - y).square().mean()).item() for _ in range(50)]
        >>> losses[-1] < 0.1 * losses[0], model.weight.grad
        (True, None)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        probes: int = 96,
        epsilon: float | None = None,
        *,
        seed: int = 0,
        epsilon_min: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        noise: str = "rademacher",
        evaluate: Evaluate = "auto",
    ):
        if isinstance(params, torch.nn.Module):
            raise UsageError(f"params is a {type(params).__name__}; pass its weights: model.named_parameters().")
        require_positive(probes=probes, epsilon=epsilon, epsilon_min=epsilon_min)
        # Says what is wrong with these now, not at the first step.
        CentralDifference(probes, 1.0, noise, evaluate=evaluate)
        defaults = {"lr": lr, "epsilon": epsilon, "momentum": momentum, "weight_decay": weight_decay}
        self.probes, self.epsilon_min, self.noise = probes, epsilon_min, noise
        self.evaluate: Evaluate = evaluate
        self.key = Key(seed)
        self.last: Estimate | None = None
        super().__init__(_with_names(params), {**defaults, "step": 0})
        check_streams(self._named())

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see `torch.optim.Optimizer`. It may have its own lr, epsilon, momentum and weight_decay.

        Raises:
            UsageError: if a number is out of range, or a tensor has the name of another.
        """
        super().add_param_group(param_group)
        try:
            check_names(name for name, _, _ in self._entries())
        except UsageError:
            self.param_groups.pop()
            raise
        group = self.param_groups[-1]
        require_positive(epsilon=group["epsilon"])
        for name, low, high in (("lr", 0, math.inf), ("momentum", 0, 1), ("weight_decay", 0, math.inf)):
            if not low <= float(group[name]) < high:
                raise UsageError(f"{name}={group[name]} must lie in [{low}, {high}).")

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]: torch returns None without a closure, this needs one
        self, closure: Callable[[], Any] | None = None
    ) -> Tensor:
        """Take one step and return the loss: the mean of (L⁺ + L⁻)/2 over the probes, a 0-dimensional tensor.

        Args:
            closure: returns the loss of the current batch; must not call `backward()`.

        Raises:
            UsageError: without a closure, or if it calls `backward()`.
            RunError: if every probe gave a non-finite loss; the weights are as before.
        """
        if closure is None:
            raise UsageError(_EXAMPLE)
        named, groups = self._named(), self._group_of()
        sizes = {name: self._epsilon(groups[name]) for name in named}
        epsilon = next(iter(sizes.values()))
        estimator = CentralDifference(self.probes, epsilon, self.noise, self.evaluate)
        scales = {name: size / epsilon for name, size in sizes.items() if size != epsilon}
        step = self.param_groups[0]["step"]
        try:
            estimate = estimator.estimate(named, lambda model, batch: closure(), None, self.key.at(step), scales=scales)
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise UsageError(_EXAMPLE) from error
            raise
        if not estimate.outcome:
            raise RunError(estimate.outcome.value)
        if estimate.outcome is Outcome.solver_too_loose:
            warnings.warn(f"solver_error={estimate.stats['solver_error']:.2g}. {estimate.outcome.value}", stacklevel=2)
        assert isinstance(estimate.gradient, Seeded)
        for name, p in named.items():
            self._update(estimate.gradient, name, p, groups[name])
        for group in self.param_groups:
            group["step"] += 1
        self.last = estimate
        return estimate.loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned, the momentum in its own precision."""
        super().load_state_dict(state_dict)
        # torch casts a state to the dtype of its weight: what bf16 would lose is taken from what was saved.
        indices = [index for group in state_dict["param_groups"] for index in group["params"]]
        tensors = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(indices, tensors):
            saved = state_dict["state"].get(index, {}).get("momentum_buffer")
            if saved is not None:
                wide = torch.promote_types(p.dtype, torch.float32)
                self.state[p]["momentum_buffer"] = saved.to(device=p.device, dtype=wide, copy=True)

    def _update(self, gradient: Seeded, name: str, p: Tensor, group: dict[str, Any]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        if group["weight_decay"]:
            p.mul_(1 - lr * group["weight_decay"])
        if not momentum:
            gradient.add_to(p, name, -lr)
            return
        state = self.state[p]
        if "momentum_buffer" not in state:
            wide = torch.promote_types(p.dtype, torch.float32)
            state["momentum_buffer"] = torch.zeros_like(p, dtype=wide, requires_grad=False)
        buffer = state["momentum_buffer"].mul_(momentum)
        gradient.add_to(buffer, name)
        p.add_(buffer.to(p.dtype), alpha=-lr)

    def _epsilon(self, group: dict[str, Any]) -> float:
        return max(float(group["lr"]), self.epsilon_min) if group["epsilon"] is None else group["epsilon"]

    def _named(self) -> dict[str, Tensor]:
        """The tensors to train by name."""
        return {name: p for name, p, _ in self._entries()}

    def _group_of(self) -> dict[str, dict[str, Any]]:
        return {name: group for name, _, group in self._entries()}

    def _entries(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        found = []
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"]):
                if p.requires_grad:
                    found.append((canonical_name(name), p, group))
        return found


def _with_names(params: Iterable[Any]) -> list[Any]:
    """Parameters as torch's Optimizer takes them: it keeps names of (name, tensor) pairs itself."""
    params = list(params)
    if not params:
        raise UsageError("params is empty; give model.parameters() or model.named_parameters().")
    return params
