"""lr=auto: which rates are tried, that trying leaves no trace, and that the rate it takes is a good one."""

import itertools
import math
import random
import signal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reroll.errors import RunError
from reroll.grad.base import trainable
from reroll.train import checkpoint, search
from reroll.train.config import resolve
from reroll.train.loop import train
from reroll.train.records import read_config, read_json, read_metrics
from reroll.train.resume import open_session
from reroll.train.search import grid, midpoints, search_lr
from tests.runs import Interrupt, differences, left, small, write_text

pytestmark = pytest.mark.usefixtures("quick_steps")


def opened(path, **sections):
    """A session that has not begun, with lr=auto."""
    optim = {"lr": "auto", "search_steps": 4, **sections.pop("optim", {})}
    session, _ = open_session(resolve(small(optim=optim, **sections)), path)
    return session


def quadratic(curvature):
    """½ a ‖θ‖²: gradient descent with η multiplies θ by 1 − η a."""

    def loss_fn(model, batch):
        return 0.5 * curvature * sum(p.square().sum() for p in trainable(model).values())

    return loss_fn


# ---- which rates


@given(st.floats(1e-9, 1.0), st.floats(1.001, 1e9))
def test_a_grid_goes_from_low_to_high_in_even_steps_of_ten_at_most(low, ratio):
    high = low * ratio
    rates = grid(low, high)
    assert rates[0] == pytest.approx(low, rel=1e-5)
    assert rates[-1] == pytest.approx(high, rel=1e-5)
    steps = [math.log10(b / a) for a, b in itertools.pairwise(rates)]
    assert max(steps) <= 1 + 1e-5
    assert max(steps) - min(steps) < 1e-4
    assert len(rates) - 1 <= max(1, math.log10(ratio) + 1)


def tried(monkeypatch, session, loss_of):
    """Search with made-up losses; return the rates in the order they were tried, and the one that was taken."""
    rates = []

    def trial(session, lr, steps):
        rates.append(lr)
        return loss_of(lr)

    monkeypatch.setattr(search, "trial", trial)
    return rates, search_lr(session, lambda line: None)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("search") / "run")


def test_the_best_is_closed_in_on(monkeypatch, session):
    """Losses with a valley at 0.004: the grid, then midpoints on both sides of the best, twice."""
    rates, best = tried(monkeypatch, session, lambda lr: abs(math.log(lr / 0.004)))
    assert rates[:5] == [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert rates[5:] == pytest.approx([10**-2.5, 10**-1.5, 10**-2.75, 10**-2.25], rel=1e-5)
    assert best == pytest.approx(10**-2.5, rel=1e-5)


@pytest.mark.parametrize("at, expected", [(0, [10**-4.5, 10**-4.75]), (4, [10**-1.5, 10**-1.25])])
def test_at_the_edge_there_is_one_side(monkeypatch, session, at, expected):
    edge = 10.0 ** (at - 5)
    rates, best = tried(monkeypatch, session, lambda lr: abs(math.log(lr / edge)))
    assert rates[5:] == pytest.approx(expected, rel=1e-5)
    assert best == edge


@given(seed=st.integers(0, 2**32), infinite=st.floats(0, 0.9))
def test_no_rate_is_tried_twice_and_the_best_is_taken(session, seed, infinite):
    generator, losses = random.Random(seed), {}

    def loss_of(lr):
        losses[lr] = math.inf if generator.random() < infinite else generator.random()
        return losses[lr]

    with pytest.MonkeyPatch.context() as patch:
        try:
            rates, best = tried(patch, session, loss_of)
        except RunError:
            assert not any(map(math.isfinite, losses.values()))
            return
    assert len(set(rates)) == len(rates)
    assert losses[best] == min(losses.values()) < math.inf


@pytest.mark.parametrize("at, said", [(0.01, None), (1e-5, "search_low=1e-06"), (0.1, "search_high=1")])
def test_a_best_rate_at_the_edge_is_said(monkeypatch, session, at, said):
    notes = []
    monkeypatch.setattr(search, "trial", lambda session, lr, steps: abs(math.log(lr / at)))
    search_lr(session, notes.append)
    assert notes[-1].endswith(f"; try optim.{said}.") if said else "edge" not in notes[-1]


def test_a_signal_ends_the_search_after_the_trial_at_hand(tmp_path):
    """It counts as a run that is running, and can be begun again."""

    class Stop(Interrupt):
        def note(self, line):
            super().note(line)
            if line.startswith("Trying"):
                states.append(read_json(tmp_path / "run" / "status.json"))
                signal.raise_signal(signal.SIGTERM)

    states, report, config = [], Stop(), small(optim={"lr": "auto", "search_steps": 1})
    summary = train(config, tmp_path / "run", report=report)
    assert [status["state"] for status in states] == ["running"]
    assert (summary["state"], summary["step"], report.rows) == ("stopped", 0, [])
    assert read_json(tmp_path / "run" / "status.json")["state"] == "stopped"
    train(config, tmp_path / "run", resume=True)
    train(config, tmp_path / "straight")
    assert differences(left(tmp_path / "straight"), left(tmp_path / "run")) == []


def test_midpoints_leave_out_what_was_tried():
    assert midpoints({0.01: 2.0, 0.1: 1.0, 1.0: 3.0, 0.0316228: 1.5}) == [0.0562342, 0.316228]
    assert midpoints({1.0: 1.0}) == []
    assert midpoints({1.0: 1.0, 1.00001: 2.0}) == []  # nothing lies between them in six digits


def test_when_every_rate_fails_it_says_what_to_change(monkeypatch, session):
    with pytest.raises(RunError, match=r"every rate from 1e-05 to 0.1 .* Lower optim.search_low"):
        tried(monkeypatch, session, lambda lr: math.inf)


# ---- no trace


@pytest.mark.parametrize("name", ["probes", "backprop", "adamw", "carried", "dnc"])
def test_a_search_leaves_everything_as_it_was(tmp_path, name):
    text = {"kind": "text", "path": str(write_text(tmp_path / "text.txt")), "tokenizer": "char", "carry": True}
    sections = {
        "probes": {},
        "backprop": {"gradient": {"kind": "backprop"}},
        "adamw": {"optim": {"kind": "adamw"}},
        "carried": {"task": {**text, "length": 5}, "gradient": {"episode": 3}},
        "dnc": {"model": {"kind": "dnc", "word_size": 3, "memory_size": 4}},
    }[name]
    session = opened(tmp_path / "run", **sections)
    session.plan()
    weights = {n: t.clone() for n, t in checkpoint.weights_of(session.model).items()}
    progress, batch = dict(vars(session.progress)), session.batch(0)
    random.seed(3)
    generators = torch.get_rng_state(), random.getstate()
    objects = [session.model, session.optimizer, session.estimator, session.config, session.plateau.state_dict()]
    notes = []
    search_lr(session, notes.append)
    assert differences(weights, checkpoint.weights_of(session.model)) == []
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    after = [session.model, session.optimizer, session.estimator, session.config, session.plateau.state_dict()]
    assert all(a is b for a, b in zip(objects[:4], after))
    assert objects[4] == after[4]
    assert not session.optimizer.state_dict()["state"]
    assert dict(vars(session.progress)) == progress
    assert torch.equal(session.batch(0).inputs, batch.inputs)
    assert all(p.grad is None for p in session.model.parameters())
    assert len(notes) > 6


def test_a_search_that_fails_midway_puts_the_weights_back(tmp_path):
    session = opened(tmp_path / "run", gradient="backprop")
    weights = {n: t.clone() for n, t in checkpoint.weights_of(session.model).items()}
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return session.task.loss(model, batch)

    session.loss_fn = loss_fn
    with pytest.raises(MemoryError):
        search_lr(session, lambda line: None)
    assert differences(weights, checkpoint.weights_of(session.model)) == []


@pytest.mark.parametrize("gradient", [{}, {"epsilon": None}, {"kind": "backprop"}], ids=str)
def test_a_run_with_the_found_rate_is_the_same_run(tmp_path, gradient):
    optim = {"search_low": 0.003, "search_high": 0.1, "search_steps": 2}
    train(small(gradient=gradient, optim={"lr": "auto", **optim}), tmp_path / "searched")
    lr = read_config(tmp_path / "searched").optim.lr
    assert isinstance(lr, float)
    train(small(gradient=gradient, optim={"lr": lr, **optim}), tmp_path / "given")
    assert differences(left(tmp_path / "searched"), left(tmp_path / "given")) == []
    assert {row["lr"] for row in read_metrics(tmp_path / "searched")} == {lr}


# ---- a good one


@pytest.mark.parametrize("curvature", [0.3, 8.0, 300.0])
@pytest.mark.parametrize("gradient", [{"kind": "backprop"}, {"epsilon": 1e-3, "probes": 400}], ids=str)
def test_the_rate_suits_the_curvature(tmp_path, curvature, gradient):
    """On ½ a ‖θ‖² the best η is 1/a, and above 2/a it diverges. Probes take fewer: their noise shrinks the step."""
    optim = {"search_low": 1e-4, "search_high": 10.0, "momentum": 0.0}
    session = opened(tmp_path / "run", optim=optim, gradient=gradient)
    session.loss_fn = quadratic(curvature)
    weights = sum(p.numel() for p in trainable(session.model).values())
    best = 1 / curvature
    if "probes" in gradient:  # E‖ĝ‖² = ‖g‖² (1 + (P − 1)/N)
        best /= 1 + (weights - 1) / gradient["probes"]
    lr = search_lr(session, lambda line: None)
    assert best / 2 < lr < best * 2


def test_a_rate_is_judged_by_the_second_half_of_its_steps(tmp_path):
    session = opened(tmp_path / "run", gradient="backprop", optim={"momentum": 0.0, "search_steps": 5})
    session.loss_fn = quadratic(2.0)
    start = quadratic(2.0)(session.model, None).item()
    # θ shrinks by 1 − 2 η = 0.8 a step, the loss by 0.64.
    expected = start * sum(0.64**t for t in (2, 3, 4)) / 3
    assert search.trial(session, 0.1, session.config.optim.search_steps) == pytest.approx(expected, rel=1e-4)


def test_trials_clip_as_the_run_does(tmp_path):
    """With steps of a fixed length a steep valley does not diverge: without the clip this rate is infinite."""
    losses = {}
    for clip in (None, 0.1):
        session = opened(tmp_path / f"{clip}", gradient="backprop", optim={"clip": clip, "search_steps": 40})
        session.loss_fn = quadratic(1e4)
        losses[clip] = search.trial(session, 0.1, session.config.optim.search_steps)
    assert losses[None] > 1e30 or losses[None] == math.inf
    assert losses[0.1] < 1e6


def test_trials_are_on_batches_the_run_does_not_begin_with(tmp_path):
    for overfit in (False, True):
        session = opened(tmp_path / f"{overfit}", gradient="backprop", task={"overfit": overfit})
        seen = []

        def loss_fn(model, batch, session=session, seen=seen):
            seen.append(batch.inputs)
            return session.task.loss(model, batch)

        session.loss_fn = loss_fn
        search.trial(session, 0.01, session.config.optim.search_steps)
        early = [session.batch(step).inputs for step in range(50)]
        same = [any(torch.equal(inputs, other) for other in early) for inputs in seen]
        assert same == [overfit] * 4


def test_a_rate_that_leaves_what_is_finite_is_infinite(tmp_path):
    session = opened(tmp_path / "run", gradient="backprop", optim={"momentum": 0.0, "search_steps": 60})
    session.loss_fn = quadratic(1e3)
    assert search.trial(session, 1.0, session.config.optim.search_steps) == math.inf
    assert all(p.grad is None for p in session.model.parameters())
    session.planned(session.config.replace(gradient={"kind": "probes", "epsilon": 0.01}))
    assert search.trial(session, 1.0, session.config.optim.search_steps) == math.inf
