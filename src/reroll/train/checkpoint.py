"""Checkpoints: everything a run needs to be resumed, in safetensors and JSON, written whole or not at all.

    checkpoints/step-00000200/
        model.safetensors     the weights and buffers, by name
        state.safetensors     every other tensor: optimizer, averages, carried states
        state.json            numbers, the shape of the optimizer's state, SHA-256 of both files and of itself

A checkpoint is written into a folder of another name, which is renamed once all of it is on disk. One that fails its
checksums is skipped, with a message, for the one before it. Pickles are neither written nor read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reroll.errors import RunError
from reroll.train.run import remove, replacing

log = logging.getLogger(__name__)

FORMAT = 1
UNREADABLE = (
    OSError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError, RecursionError, SafetensorError,
)  # fmt: skip
"""What reading a file of other origin, or a damaged one, can raise."""
_FILES = ("model.safetensors", "state.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after some steps.

    Args:
        step: steps taken.
        weights: parameters and buffers by name.
        state: the rest, as it was passed to `save`: nested dicts, lists, numbers and tensors.
    """

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, model: nn.Module, state: dict[str, Any], keep: int) -> Path:
    """Write a checkpoint, and delete all but the newest `keep`.

    Args:
        folder: the run's `checkpoints/`.
        step: steps taken.
        model: its parameters and buffers are saved.
        state: nested dicts (with string or integer keys), lists, tuples, numbers, strings, None, dtypes and tensors.
        keep: how many checkpoints remain.

    Raises:
        RunError, OSError: if it cannot be written; earlier checkpoints stay.
    """
    target = folder / f"step-{step:08d}"
    tensors: dict[str, Tensor] = {}
    content = {"format": FORMAT, "step": step, "state": _flatten(state, "", tensors)}
    seen: set[int] = set()
    for name, tensor in tensors.items():  # safetensors refuses shared storage, as in a carried (h, h)
        place = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    try:
        with replacing(target) as temporary:
            temporary.mkdir(parents=True)
            for name, values in zip(_FILES, (weights_of(model), tensors)):
                save_file(values, temporary / name)
            content["sha256"] = {name: _sha256(temporary / name) for name in _FILES}
            (temporary / "state.json").write_text(json.dumps(content | {"own_sha256": _sha256_of(content)}))
            for path in (*temporary.iterdir(), temporary):
                _to_disk(path)
        _to_disk(folder)
    except SafetensorError as error:  # how safetensors reports a failed write
        raise RunError(f"{target} cannot be written ({error}); earlier checkpoints are intact.") from None
    for old in all_of(folder)[:-keep]:
        remove(old)
    return target


def all_of(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, oldest first; they may be damaged."""
    named = [path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal()]
    return sorted(named, key=step_of)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint is named after."""
    return int(path.name.removeprefix("step-"))


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints of later steps: they could not be read, and the resumed run will write its own."""
    for path in all_of(folder):
        if step_of(path) > step:
            target = path.with_name(f"damaged-{path.name}")
            remove(target)
            path.rename(target)


def newest(folder: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint, or None; damaged ones are skipped with a message."""
    for path in reversed(all_of(folder)):
        try:
            return read(path)
        except RunError as error:
            log.warning("%s Skipping it.", error)
    return None


def read(path: Path) -> Checkpoint:
    """Read a checkpoint; raise `RunError` if it is damaged, or from another version."""
    try:
        content = json.loads((path / "state.json").read_text())
        if content.get("format") != FORMAT:
            raise RunError(f"{path} was written by another version of reroll (format {content.get('format')}).")
        checks = {"state.json": content.pop("own_sha256") == _sha256_of(content)}
        checks |= {name: _sha256(path / name) == expected for name, expected in content["sha256"].items()}
        for name, matches in checks.items():
            if not matches:
                raise RunError(f"{path} is damaged: {name} does not match its checksum.")
        weights, tensors = load_file(path / _FILES[0]), load_file(path / _FILES[1])
        return Checkpoint(int(content["step"]), weights, _unflatten(content["state"], tensors))
    except UNREADABLE as error:
        raise RunError(f"{path} cannot be read as a checkpoint ({type(error).__name__}: {error}).") from None


# ---- weights


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers on the CPU by name, tied ones once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in named}


@torch.no_grad()
def put_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copy weights into a model; raise `RunError` if their names or shapes are not the model's."""
    named = dict([*model.named_parameters(), *model.named_buffers()])
    missing, unknown = sorted(named.keys() - weights.keys()), sorted(weights.keys() - named.keys())
    remedy = "Use a model of the sizes that it was trained with."
    if missing or unknown:
        raise RunError(
            f"{source} does not have the model's weights: {len(missing)} missing ({_some(missing)}), "
            f"{len(unknown)} unknown ({_some(unknown)}). {remedy}"
        )
    for name, tensor in named.items():
        shape = tuple(weights[name].shape)
        if tensor.shape != shape:
            raise RunError(f"{source}: {name} has shape {shape}, the model's is {tuple(tensor.shape)}. {remedy}")
        tensor.copy_(weights[name])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) or "none"


def checksum(weights: Mapping[str, Tensor]) -> str:
    """Return SHA-256 over (name, dtype, shape, little-endian bytes) of all tensors, sorted by name, in hex."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes() if tensor.dim() else tensor.numpy().tobytes())
    return digest.hexdigest()


# ---- nested state as tensors and JSON


def _flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Move tensors into `tensors` under their path, and return the rest as JSON."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().cpu().contiguous()
        return {"tensor": path}
    if isinstance(value, Mapping):
        # As pairs: JSON keys are strings, and optimizers number their parameters.
        return {"dict": [[key, _flatten(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_flatten(item, f"{path}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise TypeError(f"cannot save {type(value).__name__} at {path}")


def _unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content].clone()  # memory-mapped tensors are not aligned, and the bits of sums depend on that
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "dict":
        return {key: _unflatten(item, tensors) for key, item in content}
    if kind in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[kind](_unflatten(item, tensors) for item in content)
    return getattr(torch, content) if kind == "dtype" else content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
