"""CD-RGE as a drop-in optimizer: four lines around any module, no backward pass.

    optimizer = CDRGE(model.named_parameters(), lr=0.01)
    loss = optimizer.step(lambda: loss_fn(model(x), y))

It is `CentralDifference`, `reroll.optim.step` and `reroll.optim.SGD` behind one call, for any code that steps an
optimizer with a closure.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from reroll.errors import EpsilonTooSmall, RunError, UsageError, require_count, require_positive, warn
from reroll.grad.base import Estimate, check_names, check_streams, padding_rows
from reroll.grad.central_difference import CentralDifference, Evaluate
from reroll.grad.checks import RAISED, floors
from reroll.keys import Key
from reroll.models.roles import canonical_name
from reroll.optim.sgd import SGD, in_range
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
    time. Both signs of a probe, and all probes of a step, get the same random numbers from torch's generators, whose
    state is restored afterwards. Buffers that the forward pass changes (batch statistics) see all these passes, unless
    `model` is passed; so it must be for embeddings whose `padding_idx` stays.

    In the processes of `torch.distributed` (DistributedDataParallel, accelerate, torchrun), each closure sees its own
    part of the data: the loss of a branch is its mean over processes, 2N numbers that are gathered once a step, and the
    weights stay equal. They, and the arguments here, must be equal at the start, and every process must take every
    step.

    Args:
        params: parameters, parameter groups, or `model.named_parameters()`. With names, the noise of a tensor follows
            its name; without, its position, "group.index".
        lr: η.
        probes: N, directions per step.
        epsilon: ε. None ties it to the learning rate, group by group, at every step: the largest of η, `epsilon_min`,
            and what the precision of the weights can resolve.
        model: the module that the closure evaluates: its buffers are restored after every evaluation.
        seed: selects the noise of the run.
        epsilon_min: the floor of a tied ε.
        momentum: μ of v ← μ v + ĝ, θ ← θ − η v; v takes the memory of the weights, in at least fp32.
        weight_decay: λ, decoupled.
        noise, dtype: as for `CentralDifference`.
        process_group: the processes that train together. "auto": all, where `torch.distributed` is initialised; None:
            this one trains alone. It is an attribute too.
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

    process_group: Any = "auto"

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
        process_group: Any = "auto",
    ):
        self.process_group = process_group
        if isinstance(params, torch.nn.Module):
            raise UsageError(f"params is a {type(params).__name__}; pass its weights: model.named_parameters().")
        require_count(probes=probes)
        in_range({"epsilon_min": epsilon_min}, epsilon_min=math.inf)
        require_positive(epsilon=epsilon, epsilon_min=epsilon_min)
        if not isinstance(model, torch.nn.Module | None):
            raise UsageError(f"model={model!r} must be the torch.nn.Module that the closure evaluates, or None.")
        self.probes, self.epsilon_min, self.noise, self.dtype = probes, epsilon_min, noise, dtype
        self.evaluate: Evaluate = evaluate
        self.key, self.model = Key(seed), model
        self.last: StepResult | None = None
        self._estimator(1.0)  # raises for a bad option now, not at the first step
        params = list(params)
        if not params:
            raise UsageError("params is empty; give model.parameters() or model.named_parameters().")
        super().__init__(params, lr, momentum, weight_decay, epsilon=epsilon, step=0)
        check_streams(self._named())

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        require_positive(epsilon=group["epsilon"])
        check_names(self._names())

    @torch.no_grad()
    def step(  # pyright: ignore[reportIncompatibleMethodOverride]: torch returns None without a closure, this needs one
        self, closure: Callable[[], Any] | None = None
    ) -> Tensor:
        """Take one step and return the loss: the mean of (L⁺ + L⁻)/2 over the probes, a 0-dimensional tensor.

        The closure returns the loss of the current batch and must not call `backward()`. At the 1st, 2nd, 4th, 8th …
        step it is called more than 2N times, to verify the evaluation, so it must not draw its batch (`next(it)`).

        Raises:
            RunError: if there is no finite gradient; the weights are as before.
        """
        if closure is None:
            raise UsageError(_EXAMPLE)
        named = self._named()
        if not named:
            raise UsageError("every parameter is frozen (requires_grad=False); there is nothing to train.")

        def estimate(model: Any, loss_fn: Any, batch: Any, key: Key) -> Estimate:
            def at(sizes: dict[str, float]) -> Estimate:
                epsilon = sizes[next(iter(named))]
                scales = {name: sizes[name] / epsilon for name in named if sizes[name] != epsilon}
                return self._estimator(epsilon).estimate(
                    named, loss_fn, batch, key, model=model, scales=scales, combine=combine, copies=False
                )

            sizes = self._epsilons()
            try:
                return at(sizes)
            except EpsilonTooSmall:
                raised = self._epsilons(floors(named, self.dtype))
                if raised == sizes:  # none is tied
                    raise
                warn(RAISED)
                return at(raised)

        group = self._group()
        combine = None if group is None else lambda losses: _averaged(losses, group)
        call = closure if self.last is not None or self.model is not None else _watched(closure, named)
        if group is not None and self.last is None:
            self._check_equal(group)
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
            warn(f"solver_error={result.stats['solver_error']:.2g}. {result.outcome.value}")
        for group in self.param_groups:
            group["step"] += 1
        self.last = result
        return result.loss

    def state_dict(self) -> dict[str, Any]:
        """Return groups and states as every torch optimizer does, and all else that determines the next steps."""
        saved = {name: getattr(self, name) for name in _SAVED}
        return {**super().state_dict(), "cdrge": {**saved, "key": self.key.digest.hex(), "names": self._names()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned: seed, probes and noise too, and the momentum in its own precision."""
        saved = state_dict.get("cdrge")
        if saved is None:
            raise UsageError("the state is of another optimizer: it has no seed. Pass that of a CDRGE.")
        if saved["names"] != self._names():
            raise UsageError(
                f"the state is of parameters named {_some(saved['names'])}; these are {_some(self._names())} and have "
                "other noise. Pass CDRGE the same parameters in the same way."
            )
        super().load_state_dict(state_dict)
        for name in _SAVED:
            setattr(self, name, saved[name])
        self.key = Key.from_bytes(bytes.fromhex(saved["key"]))

    def __getstate__(self) -> dict[str, Any]:
        # torch pickles and copies its own three attributes only.
        mine = {name: getattr(self, name) for name in (*_SAVED, "evaluate", "key", "model")}
        alone = {"process_group": None} if self.process_group is None else {}  # a group cannot be copied
        return {**super().__getstate__(), **mine, **alone, "last": None}

    def _estimator(self, epsilon: float) -> CentralDifference:
        return CentralDifference(self.probes, epsilon, self.noise, self.evaluate, dtype=self.dtype)

    def _group(self) -> Any:
        """The processes that this one averages its losses with; None: it is alone."""
        if self.process_group == "auto":
            return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
        return self.process_group

    def _check_equal(self, group: Any) -> None:
        """Refuse processes that begin with other weights or settings than the first one."""
        state = hashlib.sha256()
        for p in self._named().values():
            state.update(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        own = [{n: v for n, v in each.items() if n != "params"} for each in self.param_groups]
        settings = repr((self._names(), self.key, *(getattr(self, name) for name in _SAVED), own))
        everyone = _of_all({"weights": state.hexdigest(), "arguments of CDRGE": settings}, group)
        for rank, facts in enumerate(everyone):
            for what in (name for name in facts if facts[name] != everyone[0][name]):
                raise UsageError(
                    f"process {rank} begins with other {what} than process 0; give every process the same, "
                    "or pass CDRGE(process_group=None) to train each alone."
                )

    def _epsilons(self, least: Mapping[str, float] | None = None) -> dict[str, float]:
        """ε of every tensor: its group's, or the rate's, but at least what all weights of the group can resolve."""
        sizes = {}
        for g, group in enumerate(self.param_groups):
            names = self._names_of(g)
            lowest = max(((least or {}).get(name, 0.0) for name in names), default=0.0)
            tied = max(float(group["lr"]), self.epsilon_min, lowest)
            sizes |= dict.fromkeys(names, tied if group["epsilon"] is None else group["epsilon"])
        return sizes

    def _named(self) -> dict[str, Tensor]:
        """The tensors to train by name."""
        pairs = zip(self._names(), (p for group in self.param_groups for p in group["params"]))
        return {name: p for name, p in pairs if p.requires_grad}

    def _names(self) -> list[str]:
        return [name for g in range(len(self.param_groups)) for name in self._names_of(g)]

    def _names_of(self, g: int) -> list[str]:
        group = self.param_groups[g]
        names = group.get("param_names") or [f"{g}.{i}" for i in range(len(group["params"]))]
        return [canonical_name(name) for name in names]


def _of_all(value: Any, group: Any) -> list[Any]:
    """The values of all processes."""
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def _averaged(losses: Tensor, group: Any) -> Tensor:
    """The mean of losses over processes: of the same numbers in the same order everywhere, so of equal bits."""
    return torch.stack(_of_all(losses.double().cpu(), group)).mean(0).to(losses)


def _watched(closure: Callable[[], Any], named: Mapping[str, Tensor]) -> Callable[[], Any]:
    """Return the closure, whose first call looks at the modules that run.

    It warns if a buffer of one has changed, and raises `UsageError` if an embedding of one has a padding row.
    """
    calls, modules = itertools.count(), {}

    def call() -> Any:
        result = closure() if next(calls) else watch()
        # At every call: another mode might be tried after an error in one.
        for name, row in padding_rows(torch.nn.ModuleList(modules.values()), named).items():
            raise UsageError(f"model=None would move row {row} of {name}, its padding_idx; pass CDRGE(model=…).")
        return result

    def watch() -> Any:
        before = {}

        def note(module: torch.nn.Module, _: Any) -> None:
            modules[id(module)] = module
            for name, buffer in module.named_buffers(recurse=False):
                before.setdefault((type(module).__name__, name, id(buffer)), (buffer, buffer.detach().clone()))

        with register_module_forward_pre_hook(note):
            result = closure()
        moved = [f"{kind}.{name}" for (kind, name, _), (now, old) in before.items() if not torch.equal(now, old)]
        if moved:
            warn(
                f"every evaluation changes {moved[0]}, 2 · probes times a step; pass CDRGE(model=…), which undoes it.",
            )
        return result

    return call


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
