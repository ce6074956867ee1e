"""A run that was killed at any moment, or asked to end, goes on as the run that never stopped.

The random moments are drawn anew every time; a failure says which they were.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch

from reroll.cli import console, main
from reroll.models import Interface
from reroll.train import checkpoint, journal
from reroll.train.config import resolve
from reroll.train.load import build_model
from reroll.train.loop import train
from reroll.train.records import read_config, read_json, read_metrics
from reroll.train.run import RunFolder
from tests.runs import Abandoned, Interrupt, differences, interrupted, left, small

pytestmark = pytest.mark.usefixtures("quick_steps")


class Crash:
    """Lets some changes of the disk through, and then no more: the process is gone, and nothing is tidied up."""

    def __init__(self, patch, allowed):
        self.left, self.happened = allowed, 0
        for owner, name in (
            *((Path, n) for n in ("write_text", "mkdir", "touch", "rename", "unlink")), (os, "replace"),
            (shutil, "rmtree"), (checkpoint, "save_file"), (safetensors.torch, "save_file"),
            (journal.Writer, "write"), (RunFolder, "record"), (RunFolder, "log"),
        ):  # fmt: skip
            patch.setattr(owner, name, self.counted(getattr(owner, name)))

    def counted(self, function):
        def call(*arguments, **options):
            self.happened += 1
            if self.happened > self.left:
                raise Abandoned
            return function(*arguments, **options)

        return call


SEARCHING = dict(
    optim={"lr": "auto", "search_low": 0.01, "search_high": 0.1, "search_steps": 1},
    run={"steps": 3, "checkpoint_every": 1, "keep": 1},
)


UNTIDY = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
"""A process that is gone closes no files; within one process that is a warning."""


def crash_after(allowed, config, path, **options):
    """Train, resuming what is there, until so many changes of the disk have been made; return how many were."""
    with pytest.MonkeyPatch.context() as patch:
        crash = Crash(patch, allowed)
        with contextlib.suppress(Abandoned):
            train(config, path, resume=True, **options)
    return crash.happened


@pytest.fixture
def initial(tmp_path):
    model = build_model(resolve(small()).model, Interface.of(small().task.build(0)), seed=99)
    return checkpoint.weights_of(model)


@UNTIDY
def test_killed_between_any_two_changes_of_the_disk(tmp_path, initial):
    config = small(**SEARCHING)
    train(config, tmp_path / "straight", init=initial)
    straight = left(tmp_path / "straight")
    changes = crash_after(10**6, config, tmp_path / "counted", init=initial)
    assert changes > 40
    for allowed in random.sample(range(changes), 12):
        path = tmp_path / f"after-{allowed}"
        assert crash_after(allowed, config, path, init=initial) > allowed
        train(config, path, resume=True, init=initial)
        assert differences(straight, left(path)) == [], f"killed after {allowed} of {changes} changes"
        assert not list(path.rglob(".*.tmp"))


@UNTIDY
@pytest.mark.slow
def test_killed_between_any_two_changes_of_the_disk_and_again(tmp_path, initial):
    config = small(**SEARCHING)
    train(config, tmp_path / "straight", init=initial)
    straight = left(tmp_path / "straight")
    changes = crash_after(10**6, config, tmp_path / "counted", init=initial)
    for first in range(changes):
        path, moments = tmp_path / f"after-{first}", [first]
        crash_after(first, config, path, init=initial)
        while random.random() < 0.7:
            moments.append(random.randrange(25))
            crash_after(moments[-1], config, path, init=initial)
        train(config, path, resume=True, init=initial)
        assert differences(straight, left(path)) == [], f"killed after {moments} changes"


class GoneWhileSearching(Interrupt):
    def note(self, line):
        super().note(line)
        if line.startswith("Trying"):
            raise Abandoned


def test_a_run_killed_while_it_searches_knows_what_it_was_asked_for(tmp_path, initial):
    """It has neither checkpoint nor journal yet, but its config, and the weights it was to begin with."""
    path = tmp_path / "run"
    train(small(**SEARCHING), tmp_path / "straight", init=initial)
    with pytest.raises(Abandoned):
        train(small(**SEARCHING), path, init=initial, report=GoneWhileSearching())
    _, report = interrupted(read_config(path), path)
    assert report.notes[0] == f"{path} has no checkpoint yet: starting again, at step 0."
    assert differences(left(tmp_path / "straight"), left(path)) == []


def test_what_was_half_written_is_cleared_away(tmp_path):
    path = tmp_path / "run"
    train(small(), path, report=Interrupt(3))
    half = [path / ".config.toml.123.tmp", path / "checkpoints" / ".step-00000006.123.tmp"]
    half[0].write_text("format")
    half[1].mkdir()
    (half[1] / "model.safetensors").write_bytes(b"half")
    train(small(), path, resume=True)
    assert not any(p.exists() for p in half)


def test_a_signal_saves_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "run"
    command = ["train", "copy", "--steps", "9", "--length", "3", "--batch", "3", "--probes", "5", "--threads", "1"]
    assert main([*command, "--run-dir", str(tmp_path / "straight")]) == 0
    step = console.Console.step
    for number, at in ((signal.SIGTERM, 1), (signal.SIGINT, 4)):

        def interrupt(self, row, config, number=number, at=at):
            step(self, row, config)
            if row["step"] == at:
                signal.raise_signal(number)

        capsys.readouterr()
        monkeypatch.setattr(console.Console, "step", interrupt)
        assert main([*command, "--run-dir", str(path), "--resume"]) == 1
        said, name = capsys.readouterr().out, signal.Signals(number).name
        way = f"stopped: {name} after {at + 2} steps. To resume: reroll train --run-dir {path} --resume"
        assert way in said
        assert read_json(path / "status.json")["state"] == "stopped"
        assert checkpoint.newest(path / "checkpoints").step == at + 2
    # Exactly as it was said.
    assert main(way.partition("reroll ")[2].split()) == 0
    assert differences(left(tmp_path / "straight"), left(path)) == []


def launch(*arguments):
    command = [sys.executable, "-m", "reroll", "train", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


SMOKE = ["smoke", "--steps", "150", "--target-loss", "none", "--set", "run.checkpoint_every=7", "run.eval_every=50"]


def wait_for_rows(process, path, count):
    while process.poll() is None:
        if sum(1 for _ in read_metrics(path)) >= count:
            return
        time.sleep(0.01)
    pytest.fail(f"ended before {count} steps: {process.communicate()[0]}")


@pytest.mark.slow
def test_kill_9_at_random_moments(tmp_path):
    seed = random.randrange(2**32)
    generator, path, where = random.Random(seed), tmp_path / "run", ["--run-dir", tmp_path / "run", "--resume"]
    assert main(["train", *SMOKE, "--run-dir", str(tmp_path / "straight")]) == 0
    rows = 0
    for _ in range(3):
        process = launch(*SMOKE, *where)
        rows += generator.randrange(1, 45)
        wait_for_rows(process, path, rows)
        time.sleep(generator.uniform(0, 0.05))
        process.kill()
        process.communicate()
    process = launch(*SMOKE, *where)
    assert "Resuming" in process.communicate()[0], f"seed {seed}"
    assert process.returncode == 0
    assert differences(left(tmp_path / "straight"), left(path)) == [], f"seed {seed}"


@pytest.mark.slow
def test_a_terminated_process_saves_and_says_how_to_go_on(tmp_path):
    path = tmp_path / "run"
    process = launch(*SMOKE, "--run-dir", path)
    wait_for_rows(process, path, 20)
    process.terminate()
    said = process.communicate()[0]
    assert process.returncode == 1
    steps = checkpoint.newest(path / "checkpoints").step
    assert f"stopped: SIGTERM after {steps} steps. To resume: reroll train --run-dir {path} --resume" in said
    assert len(list(read_metrics(path))) == steps
    assert "Traceback" not in said
