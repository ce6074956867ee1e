"""reroll: train sequence models past the three walls of backpropagation through time.

    memory   gradients from probes, forward passes only (`CentralDifference`, `CDRGE`)
    time     the recurrence evaluated in parallel along time (`Sequential` is the reference)
    cost     a lean loop, one record of every run, optimizers that follow either gradient

Everything public is named here and loaded when it is first used, so that `reroll --help` never imports torch.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Key": "reroll.keys",
    "Outcome": "reroll.outcome",
    "noise": "reroll.kernels.noise_axpy",
    "linear_scan": "reroll.kernels.linear_scan",
    "cells": "reroll.cells",
    "Cell": "reroll.cells",
    "cell_from": "reroll.cells",
    "Sequential": "reroll.rollout",
    "Trajectory": "reroll.rollout",
    "Newton": "reroll.rollout",
    "deer": "reroll.rollout",
    "quasi_deer": "reroll.rollout",
    "elk": "reroll.rollout",
    "quasi_elk": "reroll.rollout",
    "picard": "reroll.rollout",
    "jacobi": "reroll.rollout",
    "auto": "reroll.rollout",
    "lyapunov": "reroll.rollout",
    "predictability": "reroll.rollout",
    "verify_agreement": "reroll.rollout",
    "Recurrent": "reroll.models",
    "GPT": "reroll.models",
    "Backprop": "reroll.grad",
    "CentralDifference": "reroll.grad",
    "Dense": "reroll.grad",
    "Estimate": "reroll.grad",
    "Seeded": "reroll.grad",
    "CDRGE": "reroll.optim",
    "Muon": "reroll.optim",
    "orthogonalize": "reroll.optim",
    "apply": "reroll.optim",
    "Session": "reroll.train.session",
    "train": "reroll.train",
    "load": "reroll.train.load",
    "measure": "reroll.train.measure",
}
"""Public name → the module that defines it."""

__all__ = ["__version__", *_PUBLIC]  # pyright: ignore[reportUnsupportedDunderAll]: one list, not two


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'reroll' has no attribute {name!r}")
    module = importlib.import_module(_PUBLIC[name])
    value = module if _PUBLIC[name] == f"reroll.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
