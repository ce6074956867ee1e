"""A run that was interrupted and resumed is the run that never stopped: weights, state, metrics, journal, every bit."""

import logging
import os
import shutil
import subprocess
import sys
import time

import pytest

from reroll.errors import RunError, UsageError
from reroll.train import checkpoint, journal
from reroll.train.config import resolve
from reroll.train.loop import train
from reroll.train.records import find, holder, read_config
from reroll.train.resume import FREE, merge_resumed
from reroll.train.run import RunFolder
from tests.runs import Abandoned, Interrupt, differences, interrupted, left, small, write_text

pytestmark = pytest.mark.usefixtures("quick_steps")

GRADIENTS = {"probes": {}, "backprop": {"gradient": {"kind": "backprop"}}}
OPTIMIZERS = {
    "sgd": {"momentum": 0.0},
    "momentum": {"momentum": 0.9},
    "adamw": {"kind": "adamw", "lr": 0.02, "weight_decay": 0.1},
    "muon": {"kind": "muon", "lr": 0.02, "weight_decay": 0.1},
}
TWICE = ((1, "signal"), (6, "abandoned"))
"""Stopped after three steps, where no checkpoint was due; gone after seven, when the newest checkpoint is of six."""


def text_task(tmp_path, **more):
    return {"kind": "text", "path": str(write_text(tmp_path / "text.txt")), "tokenizer": "char", "length": 5, **more}


def compare(config, tmp_path, *interrupts, **options):
    """Check that a run with interruptions equals one without; return what it left and the notes of its last part."""
    train(config, tmp_path / "straight", **options)
    _, report = interrupted(config, tmp_path / "resumed", *interrupts, **options)
    straight, resumed = left(tmp_path / "straight"), left(tmp_path / "resumed")
    assert differences(straight, resumed) == []
    assert straight["step"] == len(straight["rows"]) == config.run.steps
    return resumed, report


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("gradient", GRADIENTS)
def test_resumed_is_straight(tmp_path, gradient, optimizer):
    config = small(optim=OPTIMIZERS[optimizer], **GRADIENTS[gradient])
    found, report = compare(config, tmp_path, *TWICE)
    assert len(report.rows) == 3  # what was taken again and what was left, not the whole run
    assert (found["journal"] is None) == (gradient == "backprop")


def test_wherever_it_is_interrupted(tmp_path):
    train(small(), tmp_path / "straight")
    straight = left(tmp_path / "straight")
    for how in ("signal", "abandoned"):
        for step in range(7 if how == "signal" else 9):
            path = tmp_path / f"{how}-{step}"
            interrupted(small(), path, (step, how))
            assert differences(straight, left(path)) == [], (how, step)


@pytest.mark.parametrize("step", [7, 8])
def test_a_signal_at_the_end_stops_nothing(tmp_path, step):
    train(small(), tmp_path / "straight")
    assert train(small(), tmp_path / "run", report=Interrupt(step))["state"] == "done"
    assert differences(left(tmp_path / "straight"), left(tmp_path / "run")) == []


CASES = {
    "average": (dict(optim={"average": 0.5}), lambda f: f["state"]["average"]["count"] == 9),
    "plateau": (
        dict(optim={"plateau": 2, "lr": 1e-3}, gradient={"epsilon": None}),
        lambda f: len({row["lr"] for row in f["rows"]}) > 2 < len({row["epsilon"] for row in f["rows"]}),
    ),
    "curriculum": (
        dict(task={"curriculum_start": 1, "curriculum_threshold": 100.0, "curriculum_patience": 4}),
        lambda f: [row["length"] for row in f["rows"]] == [1] * 3 + [2] * 4 + [3] * 2,
    ),
    "linear": (
        dict(optim={"schedule": {"kind": "linear", "warmup": 2, "warmdown": 4, "floor": 0.1}}),
        lambda f: len({row["lr"] for row in f["rows"]}) > 4,
    ),
    "cosine": (
        dict(optim={"schedule": {"kind": "cosine", "warmup": 2}}, gradient={"epsilon": None}),
        lambda f: len({row["lr"] for row in f["rows"]}) > 6,
    ),
    "clip": (
        dict(optim={"clip": 0.5}),
        lambda f: all(row["gradient_norm"] > 0.5 for row in f["rows"]),
    ),
    "overfit": (dict(task={"overfit": True}), lambda f: len({row["tokens"] for row in f["rows"]}) == 9),
    "grid": (dict(gradient={"evaluate": "in_place", "restore": "grid"}), lambda f: f["rows"][0]["epsilon"] != 0.02),
    "workers": (dict(gradient={"workers": 2, "evaluate": "tiles"}), lambda f: True),
    "bf16": (dict(run={"dtype": "bf16"}), lambda f: True),
    "bf16-backprop": (dict(run={"dtype": "bf16"}, gradient="backprop"), lambda f: True),
    "dnc": (dict(model={"kind": "dnc", "word_size": 3, "memory_size": 4}, optim={"lr": 0.01}), lambda f: True),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_resumed_is_straight_with(tmp_path, name):
    sections, is_in_play = CASES[name]
    found, _ = compare(small(**sections), tmp_path, *TWICE)
    assert is_in_play(found)


CARRIED = {
    "probes": {},
    "backprop": {"kind": "backprop"},
    "backprop-truncated": {"kind": "backprop", "truncate": 2},
    "episodes": {"episode": 4},
}


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("name", CARRIED)
def test_a_carried_state_is_carried_over_the_interruption(tmp_path, name, cell):
    config = small(task=text_task(tmp_path, carry=True), gradient=CARRIED[name], model={"kind": cell})
    found, _ = compare(config.replace(model={"layers": 2}), tmp_path, *TWICE)
    assert name != "episodes" or len(found["state"]["carried"]) == 2 * config.gradient.probes


def test_a_found_learning_rate_is_not_searched_again(tmp_path):
    config = small(optim={"lr": "auto", "search_low": 0.01, "search_high": 0.1, "search_steps": 2})
    _, report = compare(config, tmp_path, *TWICE)
    assert not any("Trying" in note for note in report.notes)


def test_initial_weights_are_kept(tmp_path):
    train(small(run={"seed": 1}), tmp_path / "first")
    init = checkpoint.newest(tmp_path / "first" / "checkpoints").weights
    found, _ = compare(small(), tmp_path, (0, "abandoned"), *TWICE, init=init)
    train(small(), tmp_path / "drawn")
    assert found["weights"] != left(tmp_path / "drawn")["weights"]


# ---- a record that is damaged


def test_a_torn_end_is_dropped_and_said_so(tmp_path):
    train(small(), tmp_path / "straight")
    path = tmp_path / "run"
    with pytest.raises(Abandoned):
        train(small(), path, report=Interrupt(5, "abandoned"))
    whole = (path / "journal").read_bytes()
    (path / "journal").write_bytes(whole[:-7])
    rows = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text(rows[:-30])
    torn = journal.read(path / "journal").torn
    assert torn > 7
    _, report = interrupted(small(), path)
    assert report.notes[0].startswith(f"Resuming {path} at step 4. ")
    assert f"({torn} bytes)" in report.notes[0]
    assert differences(left(tmp_path / "straight"), left(path)) == []


def test_a_whole_end_is_not_said_to_be_torn(tmp_path):
    _, report = interrupted(small(), tmp_path / "run", (5, "abandoned"))
    assert report.notes[0].startswith(f"Resuming {tmp_path / 'run'} at step 4. ")
    assert ["incomplete" in report.notes[0], "2 steps recorded after it" in report.notes[0]] == [False, True]


def damage(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, caplog):
    train(small(), tmp_path / "straight")
    path = tmp_path / "run"
    with pytest.raises(Abandoned):
        train(small(), path, report=Interrupt(7, "abandoned"))
    *_, before, newest = checkpoint.all_of(path / "checkpoints")
    assert (before.name, newest.name) == ("step-00000004", "step-00000006")
    damage(newest)
    with caplog.at_level(logging.WARNING):
        interrupted(small(), path, (4, "signal"))
    assert "step-00000006 is damaged" in caplog.text
    said = "The newer checkpoint step-00000006 is damaged, and kept as damaged-step-00000006."
    assert said in (path / "log.txt").read_text()
    assert differences(left(tmp_path / "straight"), left(path)) == []


def test_a_damaged_checkpoint_does_not_crowd_out_whole_ones(tmp_path):
    """Only checkpoints that the run can go on from count among those it keeps."""
    path = tmp_path / "run"
    with pytest.raises(Abandoned):
        train(small(), path, report=Interrupt(7, "abandoned"))
    damage(checkpoint.all_of(path / "checkpoints")[-1])
    with pytest.raises(Abandoned):
        train(small(run={"checkpoint_every": 1}), path, resume=True, report=Interrupt(5, "abandoned"))
    assert checkpoint.newest(path / "checkpoints").step == 5
    assert [p.name for p in checkpoint.all_of(path / "checkpoints")] == ["step-00000004", "step-00000005"]
    assert (path / "checkpoints" / "damaged-step-00000006" / "model.safetensors").exists()


@pytest.mark.parametrize("loss", ["every checkpoint", "environment"])
def test_a_run_that_cannot_be_resumed_is_left_as_it_is(tmp_path, loss):
    path = tmp_path / "run"
    with pytest.raises(Abandoned):
        train(small(), path, report=Interrupt(7, "abandoned"))
    if loss == "environment":
        (path / "environment.json").write_text("{")
    else:
        for folder in checkpoint.all_of(path / "checkpoints"):
            damage(folder)
    before = contents(path)
    with pytest.raises(RunError, match=r"cannot be resumed: (none of its|environment.json).*Nothing was changed"):
        train(small(), path, resume=True)
    assert contents(path) == before


def test_a_journal_shorter_than_its_checkpoint_is_refused(tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Abandoned):
        train(small(), path, report=Interrupt(7, "abandoned"))
    journal.Writer.append(journal.read(path / "journal"), 3).close()
    before = contents(path)
    with pytest.raises(RunError, match="has only 3 of the checkpoint's 6 steps. .*after step 3"):
        train(small(), path, resume=True)
    assert contents(path) == before


def refused(path, message):
    before = contents(path)
    with pytest.raises(RunError, match=message):
        train(small(), path, resume=True)
    assert contents(path) == before


def test_a_damaged_journal_is_named_and_goes_on_before_its_damage(tmp_path):
    train(small(), tmp_path / "straight")
    path = tmp_path / "run"
    with pytest.raises(Abandoned):
        train(small(), path, report=Interrupt(7, "abandoned"))
    file = path / "journal"
    whole, offsets = file.read_bytes(), journal.read(file).offsets
    for step in (3, 6):
        data = bytearray(whole)
        data[offsets[step]] ^= 1
        file.write_bytes(data)
        if step == 3:
            refused(path, "journal is damaged at step 3")
    _, report = interrupted(small(), path)
    assert "at step 6. The journal is damaged at step 6" in report.notes[0]
    assert differences(left(tmp_path / "straight"), left(path)) == []


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_files_of_another_run_of_the_same_shape_are_refused(tmp_path, gradient):
    for seed in (1, 2):
        config = small(run={"seed": seed}, **GRADIENTS[gradient])
        with pytest.raises(Abandoned):
            train(config, tmp_path / str(seed), report=Interrupt(5, "abandoned"))
    files = {"checkpoints": "checkpoints/step-00000004 is from another run", "environment.json": "is from another run"}
    files |= {"journal": "the journal is from another run"} if gradient == "probes" else {}
    for name, message in files.items():
        shutil.copytree(tmp_path / "1", tmp_path / name)
        mixed, other = tmp_path / name / name, tmp_path / "2" / name
        if mixed.is_dir():
            shutil.rmtree(mixed)
            shutil.copytree(other, mixed)
        else:
            shutil.copy(other, mixed)
        before = contents(tmp_path / name)
        with pytest.raises(RunError, match=message):
            train(small(run={"seed": 1}, **GRADIENTS[gradient]), tmp_path / name, resume=True)
        assert contents(tmp_path / name) == before


def test_an_edited_config_is_not_resumed(tmp_path):
    train(small(), tmp_path / "run", report=Interrupt(3))
    file = tmp_path / "run" / "config.toml"
    file.write_text(file.read_text().replace("momentum = 0.9", "momentum = 0.5"))
    with pytest.raises(RunError, match=r"config.toml or environment.json has changed"):
        train(small(optim={"momentum": 0.5}), tmp_path / "run", resume=True)


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


# ---- what may change, and what may not


@pytest.mark.parametrize(
    "change",
    [
        dict(task={"length": 4}), dict(task={"overfit": True}), dict(model={"hidden": 16}),
        dict(gradient={"probes": 7}), dict(gradient={"epsilon": None}), dict(gradient={"shaping": "rank"}),
        dict(gradient={"chunk": 1}), dict(optim={"lr": 0.2}), dict(optim={"clip": None}),
        dict(optim={"momentum": 0.5}), dict(optim={"update": "write"}), dict(model={"kind": "gru"}),
        dict(run={"seed": 8}), dict(run={"threads": 3}), dict(run={"dtype": "bf16"}), dict(run={"diverged": 4.0}),
    ],
    ids=lambda change: "-".join(f"{s}.{name}" for s, fields in change.items() for name in fields),
)  # fmt: skip
def test_another_run_is_refused_by_the_name_of_what_changed(tmp_path, change):
    path, config = tmp_path / "run", small(optim={"clip": 1.0})
    train(config, path, report=Interrupt(3))
    before = contents(path)
    ((section, fields),) = change.items()
    ((name, value),) = fields.items()
    old = getattr(getattr(read_config(path), section), name)
    with pytest.raises(UsageError) as error:
        train(config.replace(**change), path, resume=True)
    assert f"{section}.{name}={value!r}, but the run to resume has {old!r}" in str(error.value)
    assert contents(path) == before


def test_what_is_free_is_taken(tmp_path):
    values = {
        "steps": 4, "max_seconds": 50.0, "target_loss": 1e-3, "target_valid": 1e-3, "eval_every": 1,
        "checkpoint_every": 5, "keep": 4, "log_every": 2, "warm_up": 1,
        "price": 2.5,
    }  # fmt: skip
    assert {f"run.{name}" for name in values} == FREE
    saved = resolve(small(run={"target_loss": 0.5}))
    for name, value in values.items():
        assert merge_resumed(saved, resolve(small(run={"target_loss": 0.5, name: value}))) == saved.replace(
            run={name: value}
        )
    # A limit that is not passed any more is none.
    assert merge_resumed(saved, resolve(small())) == resolve(small())
    path = tmp_path / "run"
    train(small(), path, report=Interrupt(2))
    train(small(run=values), path, resume=True)
    assert read_config(path).run.checkpoint_every == 5


def test_what_rules_have_decided_need_not_be_given_again(tmp_path):
    config = small(run={"threads": None})
    train(config, tmp_path / "run", report=Interrupt(2))
    saved = read_config(tmp_path / "run")
    assert None not in (saved.run.threads, saved.gradient.chunk)
    assert saved.gradient.evaluate != "auto"
    assert merge_resumed(saved, resolve(config)) == saved


def test_changed_data_are_refused(tmp_path):
    config, path = small(task=text_task(tmp_path)), tmp_path / "run"
    train(config, path, report=Interrupt(3))
    write_text(tmp_path / "text.txt", seed=1)
    before = contents(path)
    with pytest.raises(RunError, match=r"The data have changed since the run started \(fingerprint .*Restore the data"):
        train(config, path, resume=True)
    assert contents(path) == before
    write_text(tmp_path / "text.txt")
    assert train(config, path, resume=True)["state"] == "done"


# ---- where there is nothing to resume, or nothing left to do


def test_a_finished_run_is_left_alone(tmp_path):
    path = tmp_path / "run"
    summary = train(small(), path)
    before = contents(path)
    report = Interrupt()
    again = train(small(), path, resume=True, report=report)
    assert (again["state"], again["step"], again["loss"]) == ("done", 9, summary["loss"])
    assert report.notes[0] == f"{path} is finished (done at step 9); nothing to do."
    assert "run.steps above 9" in report.notes[1]
    assert report.rows == []
    assert contents(path) == before
    for limits in ({"max_seconds": 900.0}, {"target_loss": 100.0, "steps": 20}, {"keep": 3}):
        report = Interrupt()
        assert train(small(run=limits), path, resume=True, report=report)["step"] == 9
        assert report.notes[0] == f"{path} is finished (done at step 9); nothing to do."
        assert contents(path) == before


def test_a_finished_run_goes_on_with_more_steps(tmp_path):
    train(small(run={"steps": 14}), tmp_path / "straight")
    train(small(), tmp_path / "run")
    report = Interrupt()
    assert train(small(run={"steps": 14}), tmp_path / "run", resume=True, report=report)["step"] == 14
    assert [row["step"] for row in report.rows] == [9, 10, 11, 12, 13]
    assert differences(left(tmp_path / "straight"), left(tmp_path / "run")) == []


def test_a_run_killed_before_it_said_that_it_was_done_takes_no_further_step(tmp_path, monkeypatch):
    """Its target was reached and all was saved, but for the status."""
    config = small(run={"target_loss": 100.0})
    straight = train(config, tmp_path / "straight")
    assert straight["step"] == 1

    def gone(self, state, **more):
        if state == "done":
            raise Abandoned

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_status", gone)
        with pytest.raises(Abandoned):
            train(config, tmp_path / "run")
    summary = train(config, tmp_path / "run", resume=True)
    assert {k: v for k, v in summary.items() if k in ("state", "reason", "step", "loss", "valid_loss")} == {
        k: straight[k] for k in ("state", "reason", "step", "loss", "valid_loss")
    }
    assert differences(left(tmp_path / "straight"), left(tmp_path / "run")) == []


@pytest.mark.parametrize("there", [True, False])
def test_resuming_nothing_begins_and_says_so(tmp_path, there):
    path = tmp_path / "run"
    if there:
        path.mkdir()
    report = Interrupt()
    assert train(small(), path, resume=True, report=report)["state"] == "done"
    assert report.notes[0] == f"Nothing to resume in {path}: starting a new run."


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for resume, message in [
        (True, "has no run in it .no config.toml.; choose another"),
        (False, "is not empty. Choose another"),
    ]:
        with pytest.raises(UsageError, match=message):
            train(small(), tmp_path, resume=resume)
    with pytest.raises(UsageError, match="mine.txt is a file; choose a folder"):
        train(small(), tmp_path / "mine.txt", resume=True)
    assert contents(tmp_path) == {"mine.txt": b"mine"}


# ---- one folder, one process


WAITS = """
import sys
from tests.runs import Interrupt, small
from reroll.train.loop import train
from pathlib import Path

class Wait(Interrupt):
    def step(self, row, config):
        if row["step"] == 1:
            print("training", flush=True)
            sys.stdin.readline()

print(train(small(), Path(sys.argv[1]), resume=sys.argv[2] == "resume", report=Wait())["state"], flush=True)
"""


@pytest.mark.parametrize("how", ["start", "resume"])
def test_of_two_processes_one_trains_and_the_other_says_who(tmp_path, how, capfd):
    """Real ones, since a lock is the system's: the record is that of one, and ends with it however it ends."""
    train(small(), tmp_path / "straight")
    path = tmp_path / "run"
    if how == "resume":
        train(small(), path, report=Interrupt(0))
        os.unlink(path / "status.json")  # as if it had not been written yet
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS, path, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if how == "start":
        assert process.stdout.readline() == "training\n"
    else:
        while not holder(path):
            time.sleep(0.01)
    before = contents(path) if how == "start" else None
    for resume in (False, True) if how == "start" else (True,):
        with pytest.raises(UsageError, match=f"trained by process {process.pid}"):
            train(small(), path, resume=resume)
    assert before in (None, contents(path))
    assert find(tmp_path)[0]["state"] == "running"
    if how == "start":
        process.kill()
        process.communicate()
        assert holder(path) is None
        train(small(), path, resume=True)
    else:
        assert process.communicate("\n")[0].splitlines()[-1] == "done"
    assert differences(left(tmp_path / "straight"), left(path)) == []


def test_a_damaged_row_costs_that_row(tmp_path):
    train(small(), tmp_path / "straight")
    path = tmp_path / "run"
    train(small(), path, report=Interrupt(5))
    lines = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b'"step"', b'"st\xff')
    (path / "metrics.jsonl").write_bytes(b"".join(lines))
    _, report = interrupted(small(), path)
    assert "1 damaged row" in report.notes[0]
    a, b = left(tmp_path / "straight"), left(path)
    del a["rows"][2]
    assert differences(a, b) == []
