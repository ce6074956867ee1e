"""Pools of threads survive a fork, and torch's number of threads comes back."""

import os
import signal

import pytest
import torch

from reroll import CentralDifference, Key
from reroll.data.synthetic import Copy
from reroll.kernels.threads import pool, torch_threads
from reroll.train.loop import train
from reroll.train.records import read_config
from tests.runs import small


def test_threads_are_put_back():
    before = torch.get_num_threads()
    for threads in (before + 1, None):
        with torch_threads(threads):
            assert torch.get_num_threads() == (threads or before)
        assert torch.get_num_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_pools_that_work():
    """Both kinds, and an estimator that was used before the fork: its units run in a pool."""
    estimator = CentralDifference(4, 0.01, evaluate="tiles", workers=2, threads=1, chunk=2)
    model = torch.nn.Linear(3, 1)

    def estimate():
        return estimator(model, lambda m, x: m(x).square().mean(), torch.ones(2, 3), Key(0)).gradient.coefficients

    expected = estimate()
    assert pool(2).submit(int, 7).result() == pool(2, 1).submit(int, 7).result() == 7
    child = os.fork()
    if not child:
        try:
            signal.alarm(60)  # a child that waits for ever ends by this
            good = pool(2).submit(int, 7).result() == pool(2, 1).submit(int, 7).result() == 7
            os._exit(0 if good and torch.equal(estimate(), expected) else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_small_models_backpropagate_on_the_threads_that_the_config_records(tmp_path, monkeypatch):
    """One, whatever torch has, unless another number was asked for: in the first process as in one that resumes."""
    seen = []

    def threads_of(config, resume=False):
        seen.clear()
        with torch_threads(3):
            train(config, tmp_path / str(config.run.threads), resume=resume)
        return seen, read_config(tmp_path / str(config.run.threads)).run.threads

    original = Copy.loss
    monkeypatch.setattr(Copy, "loss", lambda *args: seen.append(torch.get_num_threads()) or original(*args))
    for asked, expected in ((None, 1), (2, 2)):
        config = small(gradient="backprop", run={"threads": asked, "steps": 2})
        assert threads_of(config) == ([expected] * 2, expected)
        assert threads_of(config.replace(run={"steps": 4}), resume=True) == ([expected] * 2, expected)
