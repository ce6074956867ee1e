"""Forward passes are counted by what was evaluated, however it was evaluated."""

import threading

import pytest
import torch
from torch import nn

from reroll.data.task import sequence_losses, sequence_score
from reroll.grad import Backprop, CentralDifference
from reroll.keys import Key
from reroll.passes import count_forward_passes, passes
from tests.models import a_batch, build

KEY = Key(3).at(0)


def passes_of(call):
    with count_forward_passes() as counted:
        result = call()
    return counted.count, result


@pytest.mark.parametrize("name", ["gru", "lstm-heads", "stack"])
@pytest.mark.parametrize(
    "options, expected",
    [
        (dict(evaluate="in_place"), 14),
        (dict(evaluate="tiles"), 14),
        (dict(evaluate="tiles", workers=3), 14),
        (dict(evaluate="batched", chunk=1), 14),
        (dict(evaluate="batched", chunk=3), 14),
        (dict(evaluate="in_place", micro_batch=4), 28),
        (dict(evaluate="batched", chunk=7, batch="split"), 14),
        (dict(evaluate="tiles", difference="one_sided"), 8),
    ],
    ids=str,
)
def test_n_probes_are_two_n_passes(name, options, expected):
    estimator = CentralDifference(7, 0.01, **options)
    count, estimate = passes_of(lambda: estimator(build(name), sequence_losses, a_batch(), KEY))
    assert count == expected == estimate.stats["forward_passes"]


@pytest.mark.parametrize("name", ["torch-lstm", "foreign", "noisy"])
def test_modules_that_are_not_ours_are_counted_too(name):
    count, estimate = passes_of(lambda: CentralDifference(5, 0.01)(build(name), sequence_losses, a_batch(), KEY))
    assert count == 10 == estimate.stats["forward_passes"]


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, 1),
        (dict(accumulate=3), 3),
        (dict(truncate=2), 3),
        (dict(truncate=2, accumulate=2), 6),
        (dict(checkpoint=True), 4),
    ],
    ids=str,
)
def test_backprop_counts_every_window_and_what_it_computes_again(options, expected):
    """Five steps are three windows of two, and for checkpointing two windows of three, each computed twice."""
    count, estimate = passes_of(lambda: Backprop(**options)(build("gru"), sequence_losses, a_batch(time=5), KEY))
    assert count == expected == estimate.stats["forward_passes"]


def test_a_loss_in_windows_of_time_is_one_pass(monkeypatch):
    model, batch = build("lstm"), a_batch(time=9)
    model.window_floats, windows, advance = 1, [], model.advance
    monkeypatch.setattr(model, "advance", lambda *arguments, **head: windows.append(1) or advance(*arguments, **head))
    with torch.no_grad():
        assert passes_of(lambda: sequence_losses(model, batch))[0] == 1
        assert passes_of(lambda: sequence_score(model, batch))[0] == 1
    assert len(windows) == 18


def test_modules_within_modules_are_part_of_the_pass():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)))
    assert passes_of(lambda: [model(torch.ones(1, 2)) for _ in range(3)])[0] == 3


def test_what_fails_is_counted_and_the_next_one_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(3, 3))

    def call():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="shapes"):
                model(torch.ones(1, 2))
        with pytest.raises(KeyError), passes():
            raise KeyError
        return model[0](torch.ones(1, 2))

    assert passes_of(call)[0] == 4


def test_counts_lie_within_one_another_and_end():
    model = nn.Linear(2, 2)
    with count_forward_passes() as outer:
        model(torch.ones(1, 2))
        with count_forward_passes() as inner:
            model(torch.ones(1, 2))
        with passes():
            model(torch.ones(1, 2))
            model(torch.ones(1, 2))
    model(torch.ones(1, 2))
    assert (outer.count, inner.count) == (3, 1)


def test_threads_are_counted_together():
    model = nn.Sequential(nn.Linear(2, 2))
    with count_forward_passes() as counted:
        threads = [threading.Thread(target=lambda: [model(torch.ones(1, 2)) for _ in range(50)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counted.count == 200
