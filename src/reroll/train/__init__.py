"""Runs: train a config, or a session of your own objects, into a run folder, and resume it.

from reroll.train import Session, train
session = Session.of(task, model, estimator, optimizer, steps=1000)
train(session, Path("runs/mine"))                 resume=True continues it
"""

import importlib
from typing import Any

_PUBLIC = {"Session": "session", "train": "loop"}
"""Name → the module that defines it, imported on first use: `reroll --help` reads configs without torch."""


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'reroll.train' has no attribute {name!r}")
    return getattr(importlib.import_module(f"reroll.train.{_PUBLIC[name]}"), name)
