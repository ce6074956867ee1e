"""A batch is cut to what the memory holds, before the first step, and the run is that of the whole batch."""

import pytest
import torch
from torch import nn

from reroll import Backprop, Key
from reroll.cli import main
from reroll.errors import RunError, UsageError
from reroll.train.config import Config, resolve
from reroll.train.fit import largest_part
from reroll.train.loop import train
from reroll.train.records import read_config, read_metrics
from tests.runs import small


class Tight(nn.Module):
    """Runs out of memory beyond so many sequences, in one of the ways that torch says it."""

    def __init__(self, most, error):
        super().__init__()
        self.layer, self.norm, self.most, self.error = nn.Linear(3, 2), nn.BatchNorm1d(2), most, error
        self.norm.momentum = 0.5

    def forward(self, x):
        y = self.norm(self.layer(x)) if len(x) > 1 else self.layer(x)
        if len(x) > self.most:
            raise self.error
        return y


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    MemoryError(),
]


def squares(model, x):
    return model(x).square().mean()


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("most, found", [(100, 13), (13, 13), (12, 7), (3, 2), (2, 2)])
def test_the_largest_part_that_fits(most, found, error):
    model = Tight(most, error)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert largest_part(Backprop(), model, squares, torch.randn(13, 3), Key(0)) == found
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_other_errors_and_one_sequence_too_many():
    with pytest.raises(RuntimeError, match="shapes"):
        largest_part(Backprop(), Tight(9, RuntimeError("shapes")), squares, torch.randn(13, 3), Key(0))
    with pytest.raises(RunError, match="one sequence is too much"):
        largest_part(Backprop(), Tight(0, MemoryError()), squares, torch.randn(13, 3), Key(0))


def backprop(**gradient) -> Config:
    return small(gradient="backprop").replace(task={"batch": 5}, gradient=gradient, optim={"kind": "adamw", "lr": 0.01})


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


def test_parts_give_the_losses_of_the_whole(tmp_path):
    for name, options in (("whole", {}), ("parts", {"device_batch": 2}), ("auto", {"device_batch": "auto"})):
        train(backprop(**options), tmp_path / name)
    train(backprop(accumulate=3), tmp_path / "three")
    assert losses(tmp_path / "parts") == losses(tmp_path / "three")  # 5 sequences, at most 2 at once
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert losses(tmp_path / "auto") == losses(tmp_path / "whole")
    assert read_config(tmp_path / "auto").gradient.device_batch == 5


def test_it_goes_on_in_the_same_parts(tmp_path):
    train(backprop(device_batch=2), tmp_path / "a")
    train(backprop(device_batch=2).replace(run={"steps": 4}), tmp_path / "b")
    assert main(["train", "--run-dir", str(tmp_path / "b"), "--resume", "--steps", "9"]) == 0
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_two_ways_to_cut_a_batch_exclude_each_other():
    with pytest.raises(UsageError, match="accumulate=3 and device_batch exclude each other"):
        resolve(backprop(accumulate=3, device_batch=2))
