"""The processes that train one run together: each holds the model, one of them writes the run folder.

    reroll train cpu_bytes --nproc 2                    on this machine
    torchrun --nnodes 2 … -m reroll train cpu_bytes     on several

A gradient by backpropagation is the mean over processes, each of which takes its rows of the batch: one all-reduce a
step, however often a process accumulates; statistics of BatchNorm are averaged with it. Probes are shared out by units,
of which only the losses travel, and the states of carried texts. Whatever else is decided is decided by process 0. With
equal sums everywhere, the weights stay equal, and so do the checkpoints: a run can be resumed by another number of
processes.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reroll.errors import UsageError, plural
from reroll.grad.base import Dense, Estimate, Estimator, LossFn
from reroll.grad.central_difference import CentralDifference
from reroll.grad.evaluate.snapshot import STATISTICS
from reroll.grad.units import Distribute, Execute, Result, Unit, batch_rows, batch_size
from reroll.keys import Key
from reroll.optim import Muon, optimizers_of
from reroll.outcome import Outcome
from reroll.trees import combine_states, map_state

BUCKET = 1 << 24
"""Numbers of gradients that travel at once: 64 MB of fp32."""


@dataclass(frozen=True)
class Mesh:
    """One process, which costs nothing; `Processes` are several.

    Args:
        rank: the number of this process.
        size: how many there are.
        execute: who evaluates the units of a step; None: threads of this process.

    Example:
        >>> mesh = Mesh()
        >>> mesh.writes, mesh.share("plan"), mesh.interleave([1, 2])
        (True, 'plan', [1, 2])
    """

    rank: int = 0
    size: int = 1
    execute: Distribute | None = None

    @property
    def writes(self) -> bool:
        """Whether this process writes the run folder."""
        return self.rank == 0

    def share(self, value: Any) -> Any:
        """Return the value of process 0: the plan, a learning rate that was searched, whether the run ends."""
        return value

    def barrier(self) -> None:
        """Wait until all processes have come here."""

    def interleave(self, values: list[Any]) -> list[Any]:
        """Return the values of all processes: the first of each, the second of each, …"""
        return values

    def estimator(self, estimator: Estimator) -> Estimator:
        """Return the estimator as the processes compute it together."""
        if self.execute is not None and isinstance(estimator, CentralDifference):
            return replace(estimator, execute=self.execute)
        return estimator

    def share_out(self, optimizer: Any) -> None:
        """Let the processes share the work of an optimizer, where it can be."""

    def equalize(self, model: Any) -> None:
        """Give every process the weights and buffers of process 0."""

    def leave(self) -> None:
        """Wait for the others, and part from them: the last thing that a program does with its mesh."""


ALONE = Mesh()
"""The mesh of a run that nobody shares."""


@dataclass(frozen=True)
class Processes(Mesh):
    """The processes of torch.distributed's default group.

    Example:
        >>> Processes.join(environment={}) is ALONE
        True
    """

    control: Any = None
    """A group on CPUs, for what is no gradient: a card needn't be waited for."""
    sharing: list[Muon] = field(default_factory=list)
    """Optimizers that share their work out."""

    @classmethod
    def join(cls, device: str = "auto", environment: Any = os.environ) -> Mesh:
        """Return the mesh that this process was started for (`RANK`, `WORLD_SIZE` …), and join it.

        Args:
            device: "cuda" or "auto": every process of a machine takes a card of its own.
            environment: where the variables are.

        Raises:
            UsageError: if a machine has fewer cards than processes.
        """
        size = int(environment.get("WORLD_SIZE", 1))
        if size == 1:
            return ALONE
        rank, local = int(environment["RANK"]), int(environment.get("LOCAL_RANK", environment["RANK"]))
        on_card = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        if on_card:
            if local >= torch.cuda.device_count():
                raise UsageError(
                    f"process {local} of this machine has no card of its own: there are {torch.cuda.device_count()}; "
                    'start fewer processes, or pass device="cpu".'
                )
            torch.cuda.set_device(local)
        if not on_card and "OMP_NUM_THREADS" not in environment:
            beside = int(environment.get("LOCAL_WORLD_SIZE", size))
            torch.set_num_threads(max(1, torch.get_num_threads() // beside))
        if not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_card else "gloo", timeout=timedelta(minutes=10))
        control = dist.new_group(backend="gloo") if on_card else dist.group.WORLD
        mesh = cls(rank, size, control=control)
        if not on_card:
            atexit.register(mesh._destroy)
        return mesh

    def share(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control, device=torch.device("cpu"))
        return box[0]

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def interleave(self, values: list[Any]) -> list[Any]:
        everyone = self._of_all(values)
        return [values[i] for i in range(max(map(len, everyone))) for values in everyone if i < len(values)]

    def estimator(self, estimator: Estimator) -> Estimator:
        if isinstance(estimator, CentralDifference):
            return replace(estimator, execute=self.evaluate)
        return estimator if isinstance(estimator, Averaged) else Averaged(estimator, self)

    def share_out(self, optimizer: Any) -> None:
        for each in optimizers_of(optimizer):
            if isinstance(each, Muon):
                each.process_group = dist.group.WORLD
                self.sharing.append(each)

    def equalize(self, model: Any) -> None:
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor, src=0)

    def leave(self) -> None:
        self.barrier()
        self._destroy()

    def _destroy(self) -> None:
        """Drop the groups: Gloo's threads would abort a process that ends while something holds one."""
        for optimizer in self.sharing:
            optimizer.process_group = None
        object.__setattr__(self, "control", None)
        if dist.is_initialized():
            dist.destroy_process_group()

    def evaluate(self, here: Execute, evaluator: Any, units: Sequence[Unit]) -> list[Result]:
        """Evaluate every `size`-th unit, and return the results of all."""
        mine = here(evaluator, units[self.rank :: self.size])
        to_cpu = lambda result: Result(result.losses.cpu(), map_state(result.states, Tensor.cpu))
        return self.interleave([to_cpu(result) for result in mine])

    def average(
        self, estimate: Estimate, share: float, device: torch.device, statistics: Sequence[Tensor] = ()
    ) -> Estimate:
        """Return an estimate from part of a batch, averaged over all parts, as `statistics` are in place."""
        assert isinstance(estimate.gradient, Dense)
        parameters = list(estimate.gradient.parameters.values())
        # A parameter that no process reached stays without a gradient, as it would in one process.
        facts = torch.tensor(
            [float(estimate.loss) * share, *(p.grad is not None for p in parameters)], dtype=torch.float64
        )
        dist.all_reduce(facts, group=self.control)
        reached = [p for p, count in zip(parameters, facts[1:].tolist()) if count]
        for statistic in statistics:
            dist.all_reduce(statistic.mul_(share))
        for p in reached:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for bucket in _buckets(reached):
            flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None]).mul_(share)
            dist.all_reduce(flat)
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket])):
                p.grad = part.view_as(p)
        state = estimate.state
        if state is not None:
            states = self._of_all(map_state(state, Tensor.cpu))
            state = map_state(combine_states(states, torch.cat), lambda tensor: tensor.to(device))
        outcome = estimate.outcome if bool(facts[0].isfinite()) else Outcome.not_finite
        return replace(estimate, loss=facts[0], state=state, outcome=outcome)

    def _of_all(self, value: Any) -> list[Any]:
        everyone: list[Any] = [None] * self.size
        dist.all_gather_object(everyone, value, group=self.control)
        return everyone


@dataclass(frozen=True)
class Averaged:
    """An estimator of dense gradients, each process of its rows of the batch, averaged over all."""

    each: Any
    mesh: Processes

    def __call__(self, model: Any, loss_fn: LossFn, batch: Any, key: Key) -> Estimate:
        """Compute the gradient; see `reroll.grad.base.Estimator`."""
        size, mesh = batch_size(batch), self.mesh
        if size is None or size < mesh.size:
            sequences = plural(size or 0, "sequence")
            raise UsageError(
                f"a batch of {sequences} cannot be shared by {mesh.size} processes; start fewer processes."
            )
        begin, end = size * mesh.rank // mesh.size, size * (mesh.rank + 1) // mesh.size
        key = key.at("process").at(mesh.rank) if mesh.rank else key  # dropout differs from part to part
        estimate = self.each(model, loss_fn, batch_rows(batch, begin, end), key)
        if not isinstance(estimate.gradient, Dense):
            raise UsageError(
                f"{type(self.each).__name__} cannot be shared by {mesh.size} processes; train in one process."
            )
        moving = [m for m in model.modules() if isinstance(m, STATISTICS) and m.training]
        statistics = [b for m in moving for b in m.buffers(recurse=False) if b.is_floating_point()]
        return mesh.average(estimate, (end - begin) / size, next(model.parameters()).device, statistics)


def _buckets(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors of one dtype and at most `BUCKET` numbers, or one larger tensor, together; in their order."""
    buckets: list[list[Tensor]] = []
    for p in parameters:
        last = buckets[-1] if buckets else []
        fits = last and last[0].dtype == p.dtype and sum(q.numel() for q in last) + p.numel() <= BUCKET
        if fits:
            last.append(p)
        else:
            buckets.append([p])
    return buckets
