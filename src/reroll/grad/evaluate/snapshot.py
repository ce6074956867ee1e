"""Side effects of a forward pass, and undoing them: generators, buffers, tensors that modules store."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from reroll.keys import Key

STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)
"""Layers that change their buffers in training."""


class _Generators:
    """The lock on torch's global generators, for whoever seeds them for a while."""

    lock = threading.RLock()


if hasattr(os, "register_at_fork"):  # a child has none of the threads that may hold it
    os.register_at_fork(after_in_child=lambda: setattr(_Generators, "lock", threading.RLock()))


def seed_of(key: Key) -> int:
    """Return a seed for torch's own generators, for modules that draw from them."""
    return int.from_bytes(key.digest, "little") >> 1


def cuda_devices(parameters: Mapping[str, Tensor]) -> list[int]:
    """Return the indices of the CUDA devices these tensors are on."""
    return sorted({p.device.index or 0 for p in parameters.values() if p.device.type == "cuda"})


@contextmanager
def seeded_generators(seed: int, devices: Sequence[int] = ()) -> Iterator[None]:
    """Seed torch's generators of the CPU and of these GPUs for a while; afterwards they are as before.

    One thread at a time: the generators are the process's. torch.manual_seed would also seed every other device, and
    those that are initialised later, for good.
    """
    with _Generators.lock, torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def exclusively() -> AbstractContextManager[Any]:
    """Keep other threads from seeding torch's generators inside the block, which may draw from them."""
    return _Generators.lock


class Snapshot:
    """The state of the generators, of buffers that may change, and of tensors that modules store."""

    def __init__(self, model: nn.Module | None, devices: Sequence[int] = ()):
        self.devices = devices
        modules = [] if model is None else list(model.modules())
        owners = [(m, n, b) for m in modules if _may_change(m) for n, b in m.named_buffers(recurse=False) if b.numel()]
        self.buffers = [(module, name, buffer, buffer.detach().clone()) for module, name, buffer in owners]
        self.attributes = [(module, dict(vars(module))) for module in modules]
        with _Generators.lock:
            self.generators = self._read()

    def _read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    def has_changed(self) -> bool:
        """Whether a generator, a buffer or a stored tensor has changed."""
        with _Generators.lock:
            drawn = not all(map(torch.equal, self.generators, self._read()))
        if drawn or any(_changed(module, before) for module, before in self.attributes):
            return True
        return any(getattr(m, n) is not b or not torch.equal(b, before) for m, n, b, before in self.buffers)

    def restore(self) -> None:
        """Restore all of it."""
        with _Generators.lock:
            torch.set_rng_state(self.generators[0])
            for device, state in zip(self.devices, self.generators[1:]):
                torch.cuda.set_rng_state(state, device)
        for module, name, buffer, before in self.buffers:
            if getattr(module, name) is not buffer:
                setattr(module, name, buffer)
            buffer.detach().copy_(before)
        for module, before in self.attributes:
            for name in _changed(module, before):
                if name in before:
                    vars(module)[name] = before[name]
                else:
                    del vars(module)[name]


def _may_change(module: nn.Module) -> bool:
    """Whether a forward pass may change a module's buffers: ours, and batch statistics in eval mode, are constants."""
    # A subclass or a patch with a forward of its own may do anything.
    if isinstance(module, STATISTICS) and module.forward.__module__.startswith("torch.nn."):
        return module.training
    return not type(module).__module__.startswith("reroll.")


def _changed(module: nn.Module, before: dict[str, Any]) -> list[str]:
    """The attributes that have been reassigned, from or to a number or something that contains a tensor."""
    now, none = vars(module), object()
    pairs = {name: (before.get(name, none), now.get(name, none)) for name in before.keys() | now.keys()}
    return [
        name
        for name, pair in pairs.items()
        if pair[0] is not pair[1] and name != "_flat_weights" and any(map(_has_number, pair))
    ]


def _has_number(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_number, value.values()))
    return isinstance(value, Tensor | int | float) or (isinstance(value, tuple | list) and any(map(_has_number, value)))
