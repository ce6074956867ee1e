"""Models from configs, runs and files, and into files.

model = load("runs/2026-11-22-text-1a2b")        the newest checkpoint of a run
model = load("model.safetensors")                a file of `export`
export(open_model(run), "model.safetensors")     weights, and with them the config, sizes and tokenizer
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from reroll.data.arrays import Units
from reroll.data.tokenizers import GPT2, Tokenizer, from_dict
from reroll.errors import RerollError, RunError, UsageError
from reroll.grad.evaluate.snapshot import seeded_generators
from reroll.models import Interface
from reroll.specs.model import ModelSpec, ObjectModel
from reroll.train import checkpoint, toml
from reroll.train.checkpoint import UNREADABLE
from reroll.train.config import Config, resolve
from reroll.train.records import find_run, read_config, read_json

METADATA = "reroll"


@dataclass(frozen=True)
class Loaded:
    """A model with its config, tokenizer, step, and the units of its series."""

    model: nn.Module
    config: Config
    tokenizer: Tokenizer | None
    step: int
    units: Units | None = None


def build_model(spec: ModelSpec, sizes: Interface, seed: int) -> Any:
    """Return the model on the CPU, in fp32, initialised from the seed; torch's global generator is not touched."""
    with seeded_generators(seed):
        return spec.build(sizes)


def load(path: str | Path, model: nn.Module | None = None) -> Any:
    """Return a trained model, on the CPU, in evaluation mode.

    Args:
        path: a run folder, the name of one under runs/, or a .safetensors file of `reroll export`.
        model: for a run of a module of your own (`Session.of`): such a module, whose weights are overwritten.

    Returns:
        The module that was trained, such as a `reroll.Recurrent`. Its `tokenizer` turns text into the model's symbols
        and back (`encode`, `decode`); None if it was not trained on text.

    Raises:
        UsageError: if there is no such run or file.
        RunError: if it is damaged, or from another version. Pickles are never loaded.
    """
    if model is None:
        return open_model(path).model
    run = find_run(str(path))
    checkpoint.put_weights(model, _newest(run, read_config(run))[0], str(run))
    return model.eval()


def open_model(path: str | Path) -> Loaded:
    """Return a trained model with its config, tokenizer and step; see `load`. An average of weights is preferred."""
    if Path(path).is_file():
        return _from_file(Path(path))
    run = find_run(str(path))
    config, environment = read_config(run), run / "environment.json"
    weights, step = _newest(run, config)
    return _assemble(config, read_json(environment), weights, step, str(run), str(environment))


def _newest(run: Path, config: Config) -> tuple[dict[str, Tensor], int]:
    """Return the weights of a run's newest checkpoint, averaged if the run averages them, and its step."""
    saved = checkpoint.newest(run / "checkpoints")
    if saved is None and checkpoint.all_of(run / "checkpoints"):
        raise RunError(f"{run} has only damaged checkpoints. {recovery_hint(run, config)}")
    if saved is None:
        raise RunError(f"{run} has no checkpoint yet; wait for its first, or resume it.")
    average = saved.state.get("average")
    return saved.weights | (average["tensors"] if average else {}), saved.step


def _from_file(path: Path) -> Loaded:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        weights = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read as a safetensors file ({error}). Pickles (.pt, .pth, .bin) are never loaded."
        ) from None
    if METADATA not in metadata:
        raise UsageError(f"{path} was not written by `reroll export`: it does not say which model it is of.")
    try:
        about = json.loads(metadata[METADATA])
        config = toml.overlay(Config(), toml.parse(about["config"]), str(path))
        step = int(about["step"])
    except RerollError:
        raise
    except UNREADABLE as error:
        raise _foreign(str(path), error) from None
    return _assemble(config, about, weights, step, str(path), str(path))


def _assemble(
    config: Config, about: dict[str, Any], weights: dict[str, Tensor], step: int, source: str, where: str
) -> Loaded:
    """Return the model of some weights from `source`; `about`, read from `where`, holds sizes and tokenizer."""
    config = resolve(config)  # refuses impossible sizes
    if isinstance(config.model, ObjectModel):
        config.model.build(None)  # raises: only its author has the module
    sizes, tokenizer, units = read_about(about, where)
    if tokenizer is not None and tokenizer.size > (sizes.vocab or 0):
        raise RunError(f"{where} is damaged: its model has {sizes.vocab} symbols, its tokenizer {tokenizer.size}.")
    model = build_model(config.model, sizes, seed=0)
    checkpoint.put_weights(model, weights, source)
    model.tokenizer = tokenizer
    return Loaded(model.eval(), config, tokenizer, step, units)


def read_about(about: Mapping[str, Any], where: str) -> tuple[Interface, Tokenizer | None, Units | None]:
    """Return sizes, symbols and units of a model from environment.json or an exported file's metadata, at `where`."""
    try:
        tokenizer = from_dict(about["tokenizer"]) if about.get("tokenizer") else None
        return Interface.read(about.get("sizes")), tokenizer, _units(about.get("units"))
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    except UNREADABLE as error:
        raise _foreign(where, error) from None


def require_symbols(task: Any, tokenizer: Tokenizer | None) -> None:
    """Raise `RunError` if a task's symbols are not those that a run was trained on: shards may have been made anew.

    None is GPT-2's tokenizer, which training does without.
    """
    found = getattr(task, "tokenizer", None)
    names = {GPT2.name if t is None else t.name for t in (found, tokenizer)}
    if found == tokenizer or (None in (found, tokenizer) and names == {GPT2.name}):
        return
    now, then = (f"{t.name} of {t.size} symbols" if t else "none" for t in (found, tokenizer))
    raise RunError(
        f"{task.path} was encoded by another tokenizer ({now}) than when the run was trained ({then}), so that its "
        "symbols mean other text: make the shards again as they were, or start a new run."
    )


def _units(saved: Any) -> Units | None:
    if saved is None:
        return None
    mean, std = ([float(value) for value in values] for values in saved[:2])
    names = [str(name) for name in (saved[2] if len(saved) > 2 else ())]
    if len(mean) != len(std) or not all(map(math.isfinite, mean + std)) or min(std, default=1.0) <= 0:
        raise UsageError(f"units={str(saved)[:100]} are not the means and deviations of a series.")
    return mean, std, names


def _foreign(source: str, error: Exception) -> RunError:
    return RunError(f"{source} is damaged, or from another version of reroll ({type(error).__name__}: {error}).")


def recovery_hint(run: Path, config: Config) -> str:
    """Return what can be done when no checkpoint of a run is intact."""
    if not config.gradient.seeded:
        return "A run by backprop has no journal to rebuild its weights from: train it again in another folder."
    return f"Its journal has every step: reroll replay {run} --to STEP --out model.safetensors rebuilds the weights."


def export(loaded: Loaded, path: Path) -> list[Path]:
    """Write a model as safetensors, with all that is needed to load it in its metadata, and its config next to it.

    Returns:
        The files written: PATH, and PATH with the suffix .toml.

    Raises:
        UsageError: if PATH is not one of a file that ends in .safetensors.
        RunError: if they cannot be written.
    """
    refuse_unwritable(path)
    model, config = loaded.model, loaded.config
    about = {
        "format": checkpoint.FORMAT, "config": toml.dumps(config), "step": loaded.step,
        "sizes": Interface.of(model).to_dict(), "units": loaded.units,
        "tokenizer": loaded.tokenizer and loaded.tokenizer.to_dict(),
    }  # fmt: skip
    beside = path.with_suffix(".toml")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(checkpoint.weights_of(model), path, {METADATA: json.dumps(about)})
        beside.write_text(toml.dumps(config), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be written ({error}).") from None
    return [path, beside]


def refuse_unwritable(path: Path) -> None:
    """Raise `UsageError` if `export` could not write there: better to know before the work is done."""
    refused = f"the weights cannot be written to {str(path)!r}"
    if not path.name or (path.exists() and not path.is_file()):
        raise UsageError(f"{refused}; name a file, such as model.safetensors.")
    if path.suffix != ".safetensors":
        raise UsageError(f"{refused}: the format is safetensors, so name it {path.stem}.safetensors.")
    beside = path.with_suffix(".toml")
    if os.path.lexists(beside) and not _is_ours(beside, path):
        raise UsageError(f"{beside}, where the config would go, exists and is not an export's; choose another name.")


def _is_ours(beside: Path, path: Path) -> bool:
    """Return whether a config file was written with the weights in `path`."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[METADATA])["config"] == beside.read_text(encoding="utf-8")
    except UNREADABLE:
        return False
