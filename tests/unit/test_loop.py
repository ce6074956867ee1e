"""The loop: what a row says, what ends a run and what it leaves then, and that nothing saved is ever lost."""

import io
import itertools
import math
import re
import signal
import threading
import types

import pytest
import torch
from rich.console import Console as Terminal

from reroll.cli import main
from reroll.cli.console import Console, Sparkline
from reroll.cli.flags import in_flags
from reroll.data.batch import START
from reroll.data.synthetic import Copy
from reroll.errors import RunError, UsageError
from reroll.grad import Backprop
from reroll.models import Interface
from reroll.outcome import Outcome
from reroll.specs.optim import SCHEDULES
from reroll.train import checkpoint, journal, loop, machine
from reroll.train.config import resolve
from reroll.train.evaluate import evaluate
from reroll.train.load import build_model, load
from reroll.train.loop import train
from reroll.train.observers import slow_start
from reroll.train.records import read_config, read_json, read_metrics
from reroll.train.replay import replay
from reroll.train.resume import open_session
from reroll.train.session import Session
from tests.runs import Interrupt, differences, left, small, write_text

pytestmark = pytest.mark.usefixtures("quick_steps")

GRADIENTS = ["probes", "backprop"]


def rows_of(path):
    return list(read_metrics(path))


# ---- what a row says


@pytest.mark.parametrize("method", GRADIENTS)
def test_rows_add_up(tmp_path, method):
    train(small(gradient=method), tmp_path)
    rows = rows_of(tmp_path)
    task = read_config(tmp_path).task.build(7)
    fast = slow = rows[0]["loss"]
    passes, tokens, seconds = 2 * 5 if method == "probes" else 1, 0, 0.0
    for step, row in enumerate(rows):
        fast, slow = 0.9 * fast + 0.1 * row["loss"], 0.99 * slow + 0.01 * row["loss"]
        tokens, seconds = tokens + task.batch(step).inputs.numel(), seconds + row["seconds"]
        expected = {
            "step": step, "loss_fast": fast, "loss_slow": slow, "tokens": tokens, "forward_passes": passes * (step + 1),
            "total_seconds": seconds, "length": 3, "lr": 0.1,
        }  # fmt: skip
        assert {name: row[name] for name in expected} == pytest.approx(expected)
        assert row["peak_bytes"] > 10**7
        assert ("valid_loss" in row) == (step in (2, 5, 8))
        assert row.get("drift", 0) == row.get("lost_probes", 0) == 0
        assert row["epsilon"] == (0.02 if method == "probes" else None)


def test_the_loss_and_the_norm_are_those_of_the_gradient(tmp_path):
    """With backprop both can be computed beside the run, from the weights a step began with."""
    config = small(gradient="backprop", run={"checkpoint_every": 1, "keep": 20, "log_every": 1})
    train(config, tmp_path)
    rows, task = rows_of(tmp_path), config.task.build(7)
    for saved in map(checkpoint.read, checkpoint.all_of(tmp_path / "checkpoints")[:-1]):
        model = build_model(read_config(tmp_path).model, Interface.of(task), 0)
        checkpoint.put_weights(model, saved.weights, "it")
        loss = task.loss(model, task.batch(saved.step)).mean()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
        row = rows[saved.step]
        assert (row["loss"], row["gradient_norm"]) == pytest.approx((loss.item(), norm), rel=1e-5)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rates_follow_the_schedule_and_epsilon_follows_the_rate(tmp_path, schedule):
    optim = {"schedule": {"kind": schedule, "warmup": 2}, "lr": 0.01}
    gradient = {"epsilon": None, "epsilon_ratio": 3.0, "epsilon_min": 0.02}
    train(small(optim=optim, gradient=gradient), tmp_path)
    expected = [0.01 * SCHEDULES[schedule](schedule, warmup=2)(step, 9) for step in range(9)]
    assert [row["lr"] for row in rows_of(tmp_path)] == pytest.approx(expected)
    assert [row["epsilon"] for row in rows_of(tmp_path)] == pytest.approx([max(3 * lr, 0.02) for lr in expected])
    assert [r.settings.lr for r in journal.read(tmp_path / "journal").iterate()] == pytest.approx(expected)


def test_a_plateau_halves_a_fixed_epsilon_down_to_its_floor(tmp_path):
    session, _ = open_session(resolve(small(gradient={"epsilon": 0.02, "epsilon_min": 0.004})), tmp_path / "run")
    seen = []
    for multiplier in (1.0, 0.5, 0.25, 0.125):
        session.plateau.multiplier = multiplier
        seen.append(session.settings(0.1).epsilon)
    assert seen == [0.02, 0.01, 0.005, 0.004]
    session.config = session.config.replace(gradient={"epsilon": 0.001})
    assert session.settings(0.1).epsilon == 0.001


def test_a_plateau_halves_rate_and_epsilon_together(tmp_path):
    train(small(optim={"plateau": 2, "lr": 1e-6}), tmp_path)
    rows = rows_of(tmp_path)
    multipliers = [row["lr"] / 1e-6 for row in rows]
    assert min(multipliers) <= 0.25
    assert [row["epsilon"] for row in rows] == pytest.approx([0.02 * m for m in multipliers])


def test_what_is_told_is_what_is_written(tmp_path):
    report = Interrupt()
    summary = train(small(), tmp_path, report=report)
    assert report.rows == rows_of(tmp_path)
    status = read_json(tmp_path / "status.json")
    assert {name: status[name] for name in summary} == summary
    assert {k: summary[k] for k in report.rows[-1] if k != "step"} == {
        k: v for k, v in report.rows[-1].items() if k != "step"
    }
    log = (tmp_path / "log.txt").read_text()
    assert all(note in log for note in report.notes)


@pytest.mark.parametrize("average", [None, 0.8])
def test_scores_are_of_the_weights_that_are_loaded(tmp_path, average):
    """The average where there is one; the weights that train on are left alone by it."""
    train(small(optim={"average": average}), tmp_path / "run")
    task = small().task.build(7)
    model = load(tmp_path / "run")
    found = evaluate(model, task, "valid")
    last = rows_of(tmp_path / "run")[-1]
    assert {name: last[f"valid_{name}"] for name in found} == found
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints")
    same = checkpoint.checksum(checkpoint.weights_of(model)) == checkpoint.checksum(saved.weights)
    assert same == (average is None)
    train(small(), tmp_path / "plain")
    assert checkpoint.checksum(saved.weights) == left(tmp_path / "plain")["weights"]


def test_every_setting_reaches_the_optimizer():
    model = build_model(resolve(small()).model, Interface(9, None, 9, "every"), 0)
    momentum, betas, decay = {"momentum": 0.7}, {"betas": (0.6, 0.5)}, {"weight_decay": 0.3}
    options = {"sgd": momentum | decay, "adamw": betas | decay, "muon": momentum | betas | decay}
    sgd, adamw, muon = (small(optim={"kind": name, **own}).optim.build(model, 0.2) for name, own in options.items())
    assert [(g["lr"], g["momentum"], g["weight_decay"]) for g in sgd.param_groups] == [
        (0.2, 0.7, 0.3), (0.2, 0.7, 0.0),
    ]  # fmt: skip
    assert [(g["lr"], g["betas"], g["weight_decay"]) for g in adamw.param_groups] == [
        (0.2, (0.6, 0.5), 0.3), (0.2, (0.6, 0.5), 0.0),
    ]  # fmt: skip
    assert [(g["lr"], g.get("momentum"), g.get("betas"), g["weight_decay"]) for g in muon.param_groups] == [
        (0.2, 0.7, None, 0.3), (0.2, None, (0.6, 0.5), 0.3), (0.2, None, (0.6, 0.5), 0.0),
    ]  # fmt: skip


@pytest.mark.parametrize("episode", [None, 4])
def test_a_carried_state_ends_with_its_episode(tmp_path, episode):
    task = {"kind": "text", "path": str(write_text(tmp_path / "t.txt")), "length": 5, "carry": True}
    session, _ = open_session(resolve(small(task=task, gradient={"episode": episode})), tmp_path / "run")
    session.progress.carried = carried = (torch.ones(1),)
    for step in range(9):
        begins = episode is not None and step % episode == 0
        assert session.batch(step).state is (START if begins else carried)


# ---- what ends a run


def ended(path):
    """The state and reason a run's folder tells, its steps, and that all of them are saved and recorded."""
    status, config = read_json(path / "status.json"), read_config(path)
    saved = checkpoint.newest(path / "checkpoints")
    assert saved.step == status["step"] == saved.state["progress"]["step"]
    assert len([row for row in rows_of(path) if math.isfinite(row["loss"])]) == status["step"]
    if config.gradient.seeded:
        assert journal.read(path / "journal").steps == status["step"]
    return status["state"], status["reason"], status["step"]


@pytest.mark.parametrize("method", GRADIENTS)
def test_all_steps_are_taken(tmp_path, method):
    summary = train(small(gradient=method), tmp_path)
    assert (summary["state"], summary["reason"], summary["step"]) == ended(tmp_path)
    assert ended(tmp_path) == ("done", "all 9 steps are taken.", 9)


@pytest.mark.parametrize("method", GRADIENTS)
def test_a_target_ends_it_at_the_first_loss_below(tmp_path, method):
    config = small(task={"overfit": True}, gradient=method, optim={"lr": 0.05})
    train(config, tmp_path / "all")
    losses = [row["loss"] for row in rows_of(tmp_path / "all")]
    target = losses[6] + 1e-9
    steps = next(step for step, loss in enumerate(losses) if loss < target) + 1
    train(config.replace(run={"target_loss": target}), tmp_path / "run")
    reason = f"the loss is below the target {target:g} nats after {steps} steps."
    assert ended(tmp_path / "run") == ("done", reason, steps)
    assert "valid_loss" in rows_of(tmp_path / "run")[-1]


def test_time_ends_it(tmp_path, monkeypatch):
    """By the seconds of training; here every step takes two."""
    monkeypatch.setattr(machine.time, "perf_counter", itertools.count(0, 2.0).__next__)
    train(small(run={"max_seconds": 7.0}), tmp_path)
    assert ended(tmp_path) == ("done", "the time limit of 7 seconds was reached after 4 steps.", 4)
    assert rows_of(tmp_path)[-1]["total_seconds"] == 8.0
    assert "valid_loss" in rows_of(tmp_path)[-1]
    train(small(run={"max_seconds": 11.0}), tmp_path, resume=True)
    assert ended(tmp_path) == ("done", "the time limit of 11 seconds was reached after 6 steps.", 6)


@pytest.mark.parametrize("method", GRADIENTS)
def test_a_loss_many_times_the_first_is_divergence(tmp_path, method):
    config = small(task={"overfit": True}, gradient=method, optim={"lr": 20.0}, run={"diverged": 1.5})
    summary = train(config.replace(run={"steps": 200}), tmp_path)
    state, reason, steps = ended(tmp_path)
    rows = rows_of(tmp_path)
    over = [row["loss_fast"] > 1.5 * rows[0]["loss"] for row in rows]
    assert over == [False] * (steps - 1) + [True]
    assert state == summary["state"] == "diverged"
    average, first = (f"{loss:.4g} nats" for loss in (rows[-1]["loss_fast"], rows[0]["loss"]))
    assert f"the loss (average {average}) is more than 1.5 times the first ({first}). Lower" in reason
    assert "Lower lr" in reason
    # It has ended, and asking for more steps does not change that.
    for steps_asked in (200, 300):
        report = Interrupt()
        again = train(config.replace(run={"steps": steps_asked}), tmp_path, resume=True, report=report)
        assert (again["state"], again["step"], report.rows) == ("diverged", steps, [])


def poison(monkeypatch, step, value=math.nan, config=None):
    """Make the loss of the batch of a step not finite; everything else stays as it is."""
    bad = (config or small()).task.build(7).batch(step).inputs
    loss = Copy.loss

    def poisoned(self, model, batch):
        hit = batch.inputs.shape == bad.shape and bool((batch.inputs == bad).all())
        return loss(self, model, batch) * (value if hit else 1.0)

    monkeypatch.setattr(Copy, "loss", poisoned)


@pytest.mark.parametrize("method", GRADIENTS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_at_the_start_names_what_to_change(tmp_path, monkeypatch, method, value):
    poison(monkeypatch, 0, value)
    with pytest.raises(RunError, match=r"The loss is not finite at step 1\. .*Lower (epsilon|lr)") as error:
        train(small(gradient=method), tmp_path)
    assert str(error.value).count("The loss is not finite") == 1
    assert not tmp_path.exists()  # nothing was trained: the folder is free for the next attempt


def test_a_module_that_fails_at_once_leaves_the_folder_to_its_successor(tmp_path):
    """No weights of the first attempt are left, which would be taken for those of the second."""

    def session(width):
        task = Copy(length=3, batch=2)
        model = torch.nn.Sequential(torch.nn.Embedding(task.vocab, 8), torch.nn.Linear(width, task.outputs))
        return Session.of(task, model, Backprop(), torch.optim.SGD(model.parameters(), lr=0.1), steps=2)

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(session(7), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(session(8), tmp_path / "run")["state"] == "done"


@pytest.mark.parametrize("method", GRADIENTS)
@pytest.mark.parametrize("step", [1, 5])
def test_a_loss_that_is_not_finite_later_ends_it_with_everything_saved(tmp_path, monkeypatch, method, step):
    config = small(gradient=method)
    train(config.replace(run={"steps": step}), tmp_path / "before")
    with monkeypatch.context() as patch:
        poison(patch, step)
        summary = train(config, tmp_path / "run")
        state, reason, steps = ended(tmp_path / "run")
        assert (state, steps) == (summary["state"], summary["step"]) == ("diverged", step)
        assert re.search("Lower (epsilon|lr)", reason)
        last = rows_of(tmp_path / "run")[-1]
        assert (last["step"], last["reason"], math.isnan(last["loss"])) == (step, reason, True)
        assert left(tmp_path / "run")["weights"] == left(tmp_path / "before")["weights"]
        assert train(config, tmp_path / "run", resume=True)["state"] == "diverged"
    # With the loss mended, and more steps asked for, it goes on where it was.
    longer = config.replace(run={"steps": 10})
    train(longer, tmp_path / "straight")
    assert train(longer, tmp_path / "run", resume=True)["state"] == "done"
    assert differences(left(tmp_path / "straight"), left(tmp_path / "run")) == []


def test_a_step_that_is_lost_leaves_no_gradient(tmp_path):
    session, _ = open_session(resolve(small(gradient="backprop")), tmp_path / "run")
    session.estimator = session.config.gradient.build(1.0, session.config.run)
    loss_fn = session.loss_fn
    loop.take_step(session)
    session.loss_fn = lambda model, batch: loss_fn(model, batch) * math.nan
    assert math.isnan(loop.take_step(session)["loss"])
    assert all(p.grad is None for p in session.model.parameters())


def test_weights_that_outgrow_epsilon_are_divergence_and_not_a_mistake(tmp_path):
    config = small(optim={"lr": 1e7, "momentum": 0.0}, run={"diverged": 1e30})
    assert train(config, tmp_path / "run")["state"] == "diverged"
    state, reason, steps = ended(tmp_path / "run")
    assert (state, steps > 0) == ("diverged", True)
    assert "the weights have grown, or ε has shrunk: epsilon=0.02 is below two units" in reason
    # From the start it is one.
    with pytest.raises(UsageError, match="epsilon=1e-12 is below two units"):
        train(small(gradient={"epsilon": 1e-12}), tmp_path / "other")


@pytest.mark.parametrize("method", GRADIENTS)
@pytest.mark.parametrize(
    "error", [MemoryError("no room"), OSError(28, "No space left on device")], ids=lambda e: type(e).__name__
)
def test_a_failure_on_the_way_loses_nothing_that_was_saved(tmp_path, monkeypatch, method, error):
    config = small(gradient=method)
    train(config, tmp_path / "straight")
    bad, loss = config.task.build(7).batch(5).inputs, Copy.loss

    def failing(self, model, batch):
        if torch.equal(batch.inputs, bad):
            raise error
        return loss(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Copy, "loss", failing)
        with pytest.raises(type(error)):
            train(config, tmp_path / "run")
    status = read_json(tmp_path / "run" / "status.json")
    assert (status["state"], status["step"], status["reason"]) == ("failed", 5, str(error))
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 4
    train(config, tmp_path / "run", resume=True)
    assert differences(left(tmp_path / "straight"), left(tmp_path / "run")) == []


# ---- a gradient that is not finite


def unbounded(monkeypatch, steps):
    """Make the gradient of the batches of some steps not finite, while their losses are.

    √0 has an infinite derivative; and losses of 1e300 differ by more than a coefficient in fp32 can hold.
    """
    task, loss = small().task.build(7), Copy.loss
    bad = [task.batch(step).inputs for step in steps]

    def unbounded_loss(self, model, batch):
        losses = loss(self, model, batch)
        if not any(torch.equal(batch.inputs, inputs) for inputs in bad):
            return losses
        if torch.is_grad_enabled():
            return losses + (0 * next(model.parameters()).sum()).sqrt()
        return losses.double() * 1e300

    monkeypatch.setattr(Copy, "loss", unbounded_loss)


UNBOUNDED = {"run": {"diverged": 1e307, "checkpoint_every": 1, "keep": 20, "eval_every": 9}}


@pytest.mark.parametrize("method", GRADIENTS)
@pytest.mark.parametrize("optim", [{}, {"clip": 1.0}, {"kind": "adamw", "lr": 1e-3}], ids=str)
def test_a_step_whose_gradient_is_not_finite_is_refused_counted_and_said_once(tmp_path, monkeypatch, method, optim):
    unbounded(monkeypatch, [0, 4, 6])
    report = Interrupt()
    summary = train(small(gradient=method, optim=optim, **UNBOUNDED), tmp_path, report=report)
    assert (summary["state"], summary["step"], summary["refused_steps"]) == ("done", 9, 3)
    assert [row.get("refused_steps", 0) for row in report.rows] == [1, 1, 1, 1, 2, 2, 3, 3, 3]
    assert len([note for note in report.notes if Outcome.gradient_not_finite.value in note]) == 1
    sums = [checkpoint.checksum(checkpoint.read(p).weights) for p in checkpoint.all_of(tmp_path / "checkpoints")]
    assert [a == b for a, b in itertools.pairwise(sums)] == [step in (4, 6) for step in range(1, 9)]
    if method == "probes":
        model, steps = replay(tmp_path)
        assert (steps, checkpoint.checksum(checkpoint.weights_of(model))) == (9, sums[-1])


@pytest.mark.parametrize("method", GRADIENTS)
def test_gradients_that_are_not_finite_five_times_in_a_row_are_divergence(tmp_path, monkeypatch, method):
    config = small(gradient=method, **UNBOUNDED)
    train(config.replace(run={"steps": 3}), tmp_path / "good")
    unbounded(monkeypatch, range(3, 9))
    summary = train(config, tmp_path / "run")
    assert (summary["state"], summary["step"], summary["refused_steps"]) == ("diverged", 8, 5)
    assert "not finite" in summary["reason"]
    assert left(tmp_path / "run")["weights"] == left(tmp_path / "good")["weights"]
    assert train(config, tmp_path / "run", resume=True)["state"] == "diverged"


# ---- what is scored, when, and in what


@pytest.mark.parametrize("name", ["target_loss", "target_valid"])
def test_a_target_that_is_not_reached_is_said(tmp_path, name):
    """It is done, and its record and exit code say that it missed; more steps can be asked for."""
    for target, reached in ((1e-9, False), (100.0, True), (None, None)):
        folder = tmp_path / str(target)
        summary = train(small(run={name: target}), folder)
        status = read_json(folder / "status.json")
        assert summary["state"] == status["state"] == "done"
        assert summary.get("target_reached") is status.get("target_reached") is reached
        assert ("The target was not reached." in status["reason"]) == (reached is False)
        assert main(["train", "--run-dir", str(folder), "--resume"]) == (reached is False)
    longer = train(small(run={name: 1e-9, "steps": 10}), tmp_path / "1e-09", resume=True)
    assert (longer["step"], longer["target_reached"]) == (10, False)


def test_a_target_that_is_reached_as_the_time_ends_counts(tmp_path):
    """The last weights are scored, though time ended the run."""
    summary = train(small(run={"target_valid": 100.0, "max_seconds": 1e-9, "eval_every": 5}), tmp_path)
    assert (summary["step"], summary["target_reached"]) == (1, True)


def test_a_target_on_the_held_out_loss_ends_it_where_it_is_scored(tmp_path):
    """It is scored every third step, and the score of a step can end the run at it."""
    train(small(optim={"lr": 0.05}), tmp_path / "all")
    scores = [row["valid_loss"] for row in rows_of(tmp_path / "all") if "valid_loss" in row]
    target = scores[1] + 1e-9
    step = 3 * (1 + next(i for i, score in enumerate(scores) if score < target))
    config = small(optim={"lr": 0.05}, run={"target_valid": target})
    summary = train(config, tmp_path / "run")
    assert ended(tmp_path / "run") == (summary["state"], summary["reason"], step)
    assert (summary["state"], "held-out loss is below" in summary["reason"]) == ("done", True)
    report = Interrupt()
    train(config, tmp_path / "run", resume=True, report=report)
    assert report.rows == []
    assert "run.target_valid below" in report.notes[-1]


def test_a_run_in_bf16_is_scored_in_bf16(tmp_path):
    config = small(gradient="backprop", run={"dtype": "bf16", "steps": 1})
    session, _ = open_session(resolve(config), tmp_path / "run")
    found = {name: value for name, value in loop.validate(session).items() if name != "valid_fell_back"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = evaluate(session.model, session.task, "valid")
    assert found == {f"valid_{name}": value for name, value in expected.items()}
    assert found["valid_loss"] != evaluate(session.model, session.task, "valid")["loss"]


def test_steps_before_the_clock_leave_no_trace(tmp_path, monkeypatch):
    train(small(), tmp_path / "plain")
    clocks = []
    monkeypatch.setattr(machine.Clock, "start", lambda self: clocks.append(1))
    train(small(run={"warm_up": 3}), tmp_path / "warm")
    assert differences(left(tmp_path / "plain"), left(tmp_path / "warm")) == []
    assert len(clocks) == 9


def test_a_long_step_is_saved_by_the_minute(tmp_path, monkeypatch):
    """By the wall clock, here 25 s a look: every third step is more than a minute after the last checkpoint."""
    clock = types.SimpleNamespace(monotonic=itertools.count(0.0, 25.0).__next__)
    monkeypatch.setattr(loop, "time", clock)
    saved = []
    monkeypatch.setattr(Session, "save", lambda self: saved.append(self.progress.step))
    train(small(run={"checkpoint_every": 100}), tmp_path)
    assert saved == [3, 6, 9]


# ---- a run that is refused


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    "gradient, message",
    [({"epsilon": 1e-12}, "two units"), ({"kind": "backprop", "accumulate": 100}, "accumulate=100")],
    ids=["epsilon", "accumulate"],
)
def test_a_first_step_that_is_refused_leaves_no_run(tmp_path, gradient, message, there):
    path = tmp_path / "run"
    if there:
        path.mkdir()
    with pytest.raises(UsageError, match=message):
        train(small(gradient=gradient), path)
    assert not path.exists()
    assert train(small(), path)["state"] == "done"


def test_a_run_that_failed_at_its_first_step_can_begin_again_as_another(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, 0)
        with pytest.raises(RunError):
            train(small(), tmp_path / "run")
    train(small(optim={"lr": 0.02}), tmp_path / "run", resume=True)
    train(small(optim={"lr": 0.02}), tmp_path / "straight")
    assert differences(left(tmp_path / "straight"), left(tmp_path / "run")) == []


# ---- the rest of the process


def test_threads_and_handlers_of_signals_come_back(tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    torch.set_num_threads(1)
    seen = []

    class Look(Interrupt):
        def step(self, row, config):
            seen.append(torch.get_num_threads())

    train(small(gradient="backprop", run={"threads": 2}), tmp_path, report=Look())
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_a_second_interrupt_is_let_through(tmp_path, capfd):
    class Impatient(Interrupt):
        def step(self, row, config):
            signal.raise_signal(signal.SIGINT)
            assert "Ctrl-C: ending after the step at hand." in capfd.readouterr().err
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(small(), tmp_path, report=Impatient())
    assert signal.getsignal(signal.SIGINT) == before


def test_it_trains_in_any_thread(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(train(small(), tmp_path / "thread")))
    thread.start()
    thread.join()
    train(small(), tmp_path / "main")
    assert found[0]["state"] == "done"
    assert differences(left(tmp_path / "main"), left(tmp_path / "thread")) == []


def test_training_leaves_the_global_generator_alone(tmp_path):
    before = torch.get_rng_state()
    for method in GRADIENTS:
        train(small(gradient=method), tmp_path / method)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_live_bar_survives_a_loss_that_is_not_finite():
    config = resolve(small())
    with Console(config) as console:
        console.live = True
        for step, loss in enumerate([3.0, math.nan, math.inf, 2.0]):
            console.step({"step": step, "loss": loss}, config)
    assert len(str(console.losses)) == 2


def test_a_series_of_any_length_is_the_means_of_equal_shares():
    """Of 1,000 values in at most 24 blocks: as many of each share as went into it, and none that is not finite."""
    series, values = Sparkline(), [math.cos(i / 100) for i in range(1000)]
    for value in values:
        series.add(value)
        series.add(math.nan)
    size = series.stride
    shares = [values[i : i + size] for i in range(0, 1000 - size + 1, size)]
    assert series.means == pytest.approx([sum(share) / size for share in shares])
    assert 12 <= len(str(series)) <= 24


@pytest.mark.parametrize("width", [68, 80, 120])
@pytest.mark.parametrize("limit, expected", [(None, "0:00:14"), (8.0, "0:00:02")])
def test_step_bar_and_time_to_go_fit_a_line(monkeypatch, width, limit, expected):
    """After 6 of 20 steps at a second each, with 14 to go, or 2 of the seconds a run may train."""
    clock = itertools.count(100.0)
    monkeypatch.setattr("reroll.cli.console.time", types.SimpleNamespace(monotonic=clock.__next__))
    config = resolve(small(run={"steps": 20, "max_seconds": limit}))
    with Console(config) as console:
        console.live, console.terminal = True, Terminal(file=io.StringIO(), force_terminal=True, width=width)
        for step in range(6):
            row = {"step": step, "loss": 3.0 - step / 10, "seconds": 1.0, "total_seconds": step + 1.0}
            console.step(row | {"valid_accuracy": 0.25}, config)
    line = [line for line in console.terminal.file.getvalue().splitlines() if "6/20" in line][-1]
    assert ["━" in line, f"{expected} left" in line] == [True, True]
    # What a narrow terminal leaves out, and does not cut, is the curve and then the pace, never the held-out score.
    assert "nats  held-out accuracy 0.250" in line
    assert [part in line for part in ("  1 s/step", "s/s", "  █▇▅▄▂▁", "█", "…")] == [
        width > 68, width > 68, width == 120, width == 120, False
    ]  # fmt: skip


def test_a_slow_first_step_suggests_a_smaller_one():
    config = resolve(small(run={"steps": 400}))
    line = slow_start(config, {"step": 0, "seconds": 74.0})
    assert "74 s" in line
    assert "400 at this pace take 8.2 hours" in line
    half = config.model.hidden // 2
    assert f"Faster: a smaller model (model.hidden={half}) or task.batch or fewer gradient.probes." in line
    assert f"Faster: a smaller model (--hidden={half}) or --batch or fewer --probes." in in_flags(line)
    assert "--width=32)" in in_flags(slow_start(resolve(small(model="gpt")), {"step": 0, "seconds": 74.0}))
    assert slow_start(config, {"step": 1, "seconds": 74.0}) == slow_start(config, {"step": 0, "seconds": 1.0}) == ""


def test_the_plan_names_weights_and_forward_passes(tmp_path):
    report = Interrupt()
    train(small(run={"steps": 1}), tmp_path / "probes", report=report)
    line = r"^5 probes of [\d,]+ weights, 10 forward passes a step; evaluated batched, (2|4|8) of them at a time \("
    assert re.search(line, report.notes[1])
    train(small(gradient="backprop", run={"steps": 1}), tmp_path / "backprop", report=report)
    assert re.search(r"^[\d,]+ weights, gradient by backpropagation, on 1 thread\.$", report.notes[-1])
