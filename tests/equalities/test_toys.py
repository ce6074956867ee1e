"""A task, a model, an optimizer, a rule and a noise that the library has never seen, each added by a class and a row.

They are trained, interrupted and resumed, and made again from the journal, as those that come with it are.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from reroll.data.batch import Batch
from reroll.data.task import Task
from reroll.kernels.philox import random_integers
from reroll.specs import MODELS, OPTIMIZERS, TASKS
from reroll.specs.base import option
from reroll.specs.model import ModelSpec
from reroll.specs.optim import OptimizerSpec
from reroll.specs.task import TaskSpec
from reroll.train import checkpoint
from reroll.train.replay import replay
from tests.runs import differences, interrupted, left, small, train


class Shifted(Task):
    """What comes `shift` symbols later in the alphabet."""

    name, vocab, outputs, fingerprint = "shifted", 7, 7, "shifted"

    def __init__(self, length, rows, seed, shift):
        self.length, self.rows, self.seed, self.shift = length, rows, seed, shift

    def make(self, step, split, length, unit):
        ids = torch.from_numpy(random_integers(self.key(split, step, unit), (self.rows, self.length), self.vocab))
        return Batch(ids, (ids + self.shift) % self.vocab, torch.ones(ids.shape, dtype=torch.bool))


@dataclass(frozen=True)
class ShiftedSpec(TaskSpec):
    kind: str = option("shifted", "the task")
    shift: int = option(1, "by how much")

    def build(self, seed, tokenizer=None, *, units=None, whole=False):
        return Shifted(self.length, self.batch, seed, self.shift)


@dataclass(frozen=True)
class LookupSpec(ModelSpec):
    kind: str = option("lookup", "the model")
    width: int = option(4, "features")

    def build(self, sizes):
        return nn.Sequential(nn.Embedding(sizes.vocab, self.width), nn.Linear(self.width, sizes.outputs))


class Signs(torch.optim.Optimizer):
    """θ ← θ − η sign(g + ½ last g)."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    last = self.state[p].setdefault("last", torch.zeros_like(p))
                    p.sub_(torch.sign(p.grad + last / 2), alpha=group["lr"])
                    last.copy_(p.grad)


@dataclass(frozen=True)
class SignsSpec(OptimizerSpec):
    kind: str = option("signs", "the update rule")

    def build(self, model, lr):
        return Signs([p for p in model.parameters() if p.requires_grad], lr)


TOYS = {
    "task": dict(task={"kind": "shifted", "shift": 2}),
    "model": dict(model={"kind": "lookup", "width": 3}),
    "optimizer": dict(optim={"kind": "signs", "lr": 0.01}),
    "all": dict(task="shifted", model="lookup", optim={"kind": "signs", "lr": 0.01}),
}


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    monkeypatch.setitem(TASKS, "shifted", ShiftedSpec)
    monkeypatch.setitem(MODELS, "lookup", LookupSpec)
    monkeypatch.setitem(OPTIMIZERS, "signs", SignsSpec)


@pytest.mark.parametrize("gradient", ["probes", "backprop"])
@pytest.mark.parametrize("toy", TOYS)
def test_a_toy_is_trained_resumed_and_replayed(tmp_path, toy, gradient):
    config = small(**TOYS[toy]).replace(gradient=gradient)
    train(config, tmp_path / "straight")
    interrupted(config, tmp_path / "resumed", (4, "abandoned"), (6, "signal"))
    straight, resumed = left(tmp_path / "straight"), left(tmp_path / "resumed")
    assert differences(straight, resumed) == []
    losses = [row["loss"] for row in straight["rows"]]
    assert len(set(losses)) == 9
    if gradient == "probes":
        for path in ("straight", "resumed"):
            model, steps = replay(tmp_path / path)
            assert steps == 9
            assert checkpoint.checksum(checkpoint.weights_of(model)) == straight["weights"]
