"""Torch's own generators are borrowed for dropout and initialisation, and nobody else's are touched."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from reroll.grad import Backprop, CentralDifference
from reroll.grad.evaluate.snapshot import Snapshot, seeded_generators
from reroll.keys import Key
from reroll.models import Interface
from reroll.specs.model import LSTM
from reroll.train.load import build_model

USERS = {
    "central_difference": lambda net, x: CentralDifference(3, 0.01)(net, loss_fn, x, Key(0)),
    "backprop": lambda net, x: Backprop(accumulate=2)(net, loss_fn, x, Key(0)),
    "build_model": lambda net, x: build_model(LSTM(embed=8), Interface(5, None, 5, "every"), seed=3),
}


def loss_fn(net, x):
    return net(x).square().mean()


@pytest.mark.parametrize("name", USERS)
def test_no_device_is_seeded_but_the_one_that_is_used(name, monkeypatch):
    """torch.manual_seed seeds all devices, also those that are initialised later: a side effect that would stay."""

    def refuse(seed):
        raise AssertionError("torch.manual_seed was called")

    net, x = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)), torch.randn(6, 4)
    before = torch.get_rng_state()
    monkeypatch.setattr(torch, "manual_seed", refuse)
    USERS[name](net, x)
    assert torch.equal(torch.get_rng_state(), before)


def test_seeded_generators_give_what_manual_seed_gives():
    torch.manual_seed(17)
    expected, before = torch.rand(5), torch.get_rng_state()
    with seeded_generators(17):
        assert torch.equal(torch.rand(5), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_snapshot_copies_buffers_that_can_move_and_puts_them_back():
    model = nn.Sequential(nn.BatchNorm1d(3), spectral_norm(nn.Linear(3, 3)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    snapshot = Snapshot(model)
    assert not snapshot.has_changed()
    model(torch.randn(5, 3))
    assert snapshot.has_changed()
    snapshot.restore()
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert {name for _, name, *_ in Snapshot(model.eval()).buffers} == {"_u", "_v"}


def test_batch_statistics_are_constants_in_eval_mode_only_where_torchs_own_forward_runs():
    """A subclass, or a patch, may go on counting in eval mode."""

    class Counting(nn.BatchNorm1d):
        def forward(self, x):
            self.num_batches_tracked.add_(1)
            return nn.BatchNorm1d.forward(self, x)

    patched = nn.BatchNorm1d(3)
    patched.forward = lambda x: Counting.forward(patched, x)
    for norm in (Counting(3), patched):
        model = nn.Sequential(nn.Linear(3, 3), norm).eval()
        CentralDifference(3, 0.01)(model, loss_fn, torch.randn(6, 3), Key(0))
        assert norm.num_batches_tracked == 0
        assert len(Snapshot(model).buffers) == 3
    assert not Snapshot(nn.BatchNorm1d(3).eval()).buffers
