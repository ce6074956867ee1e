"""The grid: every model, by every gradient, with every optimizer, is one loop and learns one batch."""

import itertools

import pytest
import torch

from reroll.train.config import Config
from reroll.train.loop import train
from reroll.train.records import read_metrics

MODELS = {
    "loop": {"kind": "lstm", "hidden": 8, "heads": 2, "embed": 8},
    "parallel": {"kind": "gru", "hidden": 8, "embed": 8, "rollout": "quasi_deer"},
    "attention": {"kind": "gpt", "layers": 2, "heads": 2, "width": 16},
}
GRADIENTS = {"probes": {"kind": "probes", "probes": 96, "epsilon": 0.01}, "backprop": {"kind": "backprop"}}
OPTIMIZERS = {
    "sgd": {"probes": {"lr": 0.05, "momentum": 0.0}, "backprop": {"lr": 0.3, "momentum": 0.0}},
    "adamw": {"probes": {"lr": 0.01}, "backprop": {"lr": 0.02}},
    "muon": {"probes": {"lr": 0.02}, "backprop": {"lr": 0.02}},
}


@pytest.mark.parametrize("model, gradient, optimizer", list(itertools.product(MODELS, GRADIENTS, OPTIMIZERS)))
def test_three_steps_improve_on_one_batch(model, gradient, optimizer, tmp_path):
    torch.set_num_threads(1)
    config = Config().replace(
        task={"kind": "copy", "length": 4, "batch": 8, "overfit": True},
        model=MODELS[model],
        gradient=GRADIENTS[gradient],
        optim={"kind": optimizer, "schedule": "constant", "clip": None} | OPTIMIZERS[optimizer][gradient],
        run={"steps": 4, "eval_every": 4, "threads": 1},
    )
    assert train(config, tmp_path / "run")["state"] == "done"
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert losses[3] < losses[0]  # that of the fourth step is the loss after three
