"""CD-RGE as a drop-in optimizer: four lines around any module, no backward pass.

    optimizer = CDRGE(model.named_parameters(), lr=0.01)
    loss = optimizer.step(lambda: loss_fn(model(x), y))

It is `CentralDifference`, `reroll.optim.step` and `reroll.optim.SGD` behind one call, for plain loops, accelerate, or
any code that steps an optimizer with a closure. Learning-rate schedulers and `state_dict` work as on every torch
optimizer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from reroll.errors import RunError, UsageError, require_count, require_positive
from reroll.grad.base import Estimate, check_names, check_streams
from reroll.grad.central_difference import CentralDifference, Evaluate
from reroll.grad.checks import visibly
from reroll.keys import Key
from reroll.models.roles import canonical_name
from reroll.optim.sgd import SGD
from reroll.optim.step import StepResult, step
from reroll.outcome import Outcome

_SAVED = ("probes", "epsilon_min", "noise", "dtype")
_EXAMPLE = (
    "CDRGE.step needs a closure that returns the loss and does not call backward():\n"
    "    loss = optimizer.step(lambda: loss_fn(model(x), y))"
)


class CDRGE(SGD):
    """Gradient descent on central differences along random directions.

    The closure is called 2N times per step, under `no_grad`, with perturbed weights; it must see the same batch each
    time. Both signs of a probe, and all probes of a step, get the same random numbers from torch's generators, which
    are put back afterwards. Buffers that the forward pass changes (batch statistics) see all these passes, unless
    `model` says whose they are.

    Args:
        params: parameters, parameter groups, or `model.named_parameters()`. With names, the noise of a tensor follows
            its name; without, its place, "group.index".
        lr: η.
        probes: N, directions per step.
        epsilon: ε. None ties it to the learning rate, group by group, at every step: the largest of η, `epsilon_min`,
            and what the precision of the weights can show.
        model: the module that the closure evaluates: its buffers come back after every evaluation.
        seed: names the noise of the run.
        epsilon_min: the floor of a tied ε.
        momentum: μ of v ← μ v + ĝ, θ ← θ − η v; it keeps one more copy of the weights, in fp32 at least.
        weight_decay: λ, decoupled.
        noise, dtype: as for `CentralDifference`.
        evaluate: "auto" overwrites the weights and restores them bit for bit, or takes "tiles" below fp32, which leaves
            them untouched.

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
        model: torch.nn.Module | None = None,
        seed: int = 0,
        epsilon_min: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        noise: str = "rademacher",
        evaluate: Evaluate = "auto",
        dtype: torch.dtype | None = None,
    ):
        if isinstance(params, torch.nn.Module):
            raise UsageError(f"params is a {type(params).__name__}; pass its weights: model.named_parameters().")
        require_count(probes=probes)
        require_positive(epsilon=epsilon, epsilon_min=epsilon_min)
        self.probes, self.epsilon_min, self.noise, self.dtype = probes, epsilon_min, noise, dtype
        self.evaluate: Evaluate = evaluate
        self.key, self.model = Key(seed), model
        self.last: StepResult | None = None
        self._estimator(1.0)  # says what is wrong with these now, not at the first step
        params = list(params)
        if not params:
            raise UsageError("params is empty; give model.parameters() or model.named_parameters().")
        super().__init__(params, lr, momentum, weight_decay, epsilon=epsilon, step=0)
        check_streams(self._named())

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        require_positive(epsilon=group["epsilon"])
        check_names(name for name, _, _ in self._entries())

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]: torch returns None without a closure, this needs one
        self, closure: Callable[[], Any] | None = None
    ) -> Tensor:
        """Take one step and return the loss: the mean of (L⁺ + L⁻)/2 over the probes, a 0-dimensional tensor.

        Args:
            closure: returns the loss of the current batch; must not call `backward()`.

        Raises:
            UsageError: without a closure, or if it calls `backward()`.
            RunError: if there is no finite gradient; the weights are as before.
        """
        if closure is None:
            raise UsageError(_EXAMPLE)
        named = self._named()
        if not named:
            raise UsageError("every parameter is frozen (requires_grad=False); there is nothing to train.")
        sizes = {name: self._epsilon(group) for name, p, group in self._entries() if p.requires_grad}
        epsilon = next(iter(sizes.values()))
        scales = {name: size / epsilon for name, size in sizes.items() if size != epsilon}
        tied = all(group["epsilon"] is None for group in self.param_groups)

        def estimate(model: Any, loss_fn: Any, batch: Any, key: Key) -> Estimate:
            at = lambda e: self._estimator(e).estimate(named, loss_fn, batch, key, model=model, scales=scales)
            return visibly(at, epsilon) if tied else at(epsilon)

        call = closure if self.last is not None or self.model is not None else _noting_buffers(closure)
        key = self.key.at(self.param_groups[0]["step"])
        try:
            result = step(self.model, lambda *_: call(), estimate, self, None, None, key, update="fused")
        except RuntimeError as error:
            if "does not require grad" in str(error):
                raise UsageError(_EXAMPLE) from error
            raise
        if not result.outcome:
            raise RunError(result.outcome.value)
        if result.outcome is Outcome.solver_too_loose:
            warnings.warn(f"solver_error={result.stats['solver_error']:.2g}. {result.outcome.value}", stacklevel=2)
        for group in self.param_groups:
            group["step"] += 1
        self.last = result
        return result.loss

    def state_dict(self) -> dict[str, Any]:
        """Return groups and states as every torch optimizer, and all else that the next steps follow from."""
        own = {name: getattr(self, name) for name in _SAVED}
        return {**super().state_dict(), "cdrge": {**own, "key": self.key.digest.hex(), "names": self._names()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` returned: seed, probes and noise too, and the momentum in its own precision.

        Raises:
            UsageError: if it is of another optimizer, or of parameters of other names, whose noise would be another.
        """
        own = state_dict.get("cdrge")
        if own is None:
            raise UsageError("the state is of another optimizer: it names no seed. Give that of a CDRGE.")
        if own["names"] != self._names():
            raise UsageError(
                f"the state is of parameters named {_some(own['names'])}; these are {_some(self._names())} and have "
                "other noise. Give CDRGE the same parameters in the same way."
            )
        super().load_state_dict(state_dict)
        for name in _SAVED:
            setattr(self, name, own[name])
        self.key = Key.from_bytes(bytes.fromhex(own["key"]))

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps the first three only when an optimizer is pickled or copied.
        own = {name: getattr(self, name) for name in (*_SAVED, "evaluate", "key", "model")}
        return {**super().__getstate__(), **own, "last": None}

    def _estimator(self, epsilon: float) -> CentralDifference:
        evaluate = self.evaluate
        if evaluate == "auto" and self.model is not None:
            # The closure evaluates this module, not a copy of it that an estimator may choose to make.
            narrow = self.dtype is not None or any(p.dtype.itemsize < 4 for p in self.model.parameters())
            evaluate = "tiles" if narrow else "in_place"
        return CentralDifference(self.probes, epsilon, self.noise, evaluate, dtype=self.dtype)

    def _epsilon(self, group: dict[str, Any]) -> float:
        return max(float(group["lr"]), self.epsilon_min) if group["epsilon"] is None else group["epsilon"]

    def _named(self) -> dict[str, Tensor]:
        """The tensors to train by name."""
        return {name: p for name, p, _ in self._entries() if p.requires_grad}

    def _names(self) -> list[str]:
        return [name for name, _, _ in self._entries()]

    def _entries(self) -> list[tuple[str, Tensor, dict[str, Any]]]:
        """Every parameter: its name, itself, its group."""
        entries = []
        for g, group in enumerate(self.param_groups):
            names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
            entries += [(canonical_name(name), p, group) for name, p in zip(names, group["params"])]
        return entries


def _noting_buffers(closure: Callable[[], Any]) -> Callable[[], Any]:
    """Return the closure, which warns after its first call if that has changed a buffer of some module."""
    called = False

    def call() -> Any:
        nonlocal called
        if called:
            return closure()
        called, before = True, {}

        def note(module: torch.nn.Module, _: Any) -> None:
            for name, buffer in module.named_buffers(recurse=False):
                before.setdefault((type(module).__name__, name, id(buffer)), (buffer, buffer.detach().clone()))

        with register_module_forward_pre_hook(note):
            result = closure()
        moved = [f"{kind}.{name}" for (kind, name, _), (now, old) in before.items() if not torch.equal(now, old)]
        if moved:
            warnings.warn(
                f"every evaluation changes {moved[0]}, 2 · probes times a step; pass CDRGE(model=…), which undoes it.",
                stacklevel=2,
            )
        return result

    return call


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
