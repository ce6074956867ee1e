"""The run folder: what it refuses, what it says of a run that is going on, and of one that is not."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reroll.cli import main
from reroll.errors import RunError, UsageError
from reroll.train import machine, records
from reroll.train.loop import train
from reroll.train.records import find_run, holder, read_json, read_metrics
from reroll.train.run import RunFolder, new_folder
from tests.runs import Abandoned, Interrupt, small

pytestmark = pytest.mark.usefixtures("quick_steps")


# ---- names and folders


def test_a_run_is_found_by_its_path_and_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("here", "runs/there", "runs/here"):
        Path(path).mkdir(parents=True)
        Path(path, "config.toml").touch()
    assert find_run("here") == Path("here")  # a path comes first
    assert find_run("there") == Path("runs/there")
    assert find_run(str(tmp_path / "runs" / "there")) == tmp_path / "runs" / "there"
    Path("runs/empty").mkdir()
    for name in ("nowhere", "empty", "runs"):
        with pytest.raises(UsageError, match=f"'{name}' is not a run: neither {name} nor runs/{name} has a config"):
            find_run(name)


def test_new_names_differ():
    names = {new_folder("copy") for _ in range(3)}  # of 65,536
    assert len(names) == 3
    assert all(re.fullmatch(r"runs/\d{4}-\d\d-\d\d-copy-[0-9a-f]{4}", name.as_posix()) for name in names)


def test_a_used_folder_is_refused_and_an_empty_one_is_not(tmp_path):
    RunFolder(tmp_path / "absent").refuse_used()
    RunFolder(tmp_path).refuse_used()
    (tmp_path / ".hidden").touch()
    with pytest.raises(UsageError, match="is not empty. Choose another"):
        RunFolder(tmp_path).refuse_used()
    with pytest.raises(UsageError, match="hidden is a file"):
        RunFolder(tmp_path / ".hidden").refuse_used()


def test_a_run_that_was_killed_at_once_can_be_begun_again(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.refuse_used(resume=True)
    folder.make()
    (folder.path / ".config.toml.77.tmp").touch()
    folder.refuse_used(resume=True)
    other = RunFolder(tmp_path / "other")
    other.path.mkdir()
    for somebodys in (folder.path / "notes.md", folder.checkpoints / "step-00000002", other.path / "log.txt"):
        somebodys.touch()
        with pytest.raises(UsageError, match="has no run in it"):
            RunFolder(tmp_path / somebodys.relative_to(tmp_path).parts[0]).refuse_used(resume=True)
        somebodys.unlink()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="path=.*/file/run cannot be written .Not a directory.; choose another folder"):
        RunFolder(tmp_path / "file" / "run").make()


# ---- rows


ROWS = [{"step": 0, "loss": 3.0}, {"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": float("nan")}]


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.make()
    for row in ROWS:
        folder.record(row)
    folder.close()
    return folder


def test_rows_come_back_as_they_were(folder):
    assert str(list(read_metrics(folder.path))) == str(ROWS)
    assert str(folder.last_row()) == str(ROWS[-1])
    folder.record({"step": 3})
    folder.close()
    assert folder.last_row() == {"step": 3}


def test_a_row_is_there_as_soon_as_it_is_recorded(tmp_path):
    folder = RunFolder(tmp_path)
    for step in range(3):
        folder.record({"step": step})
        assert folder.last_row() == {"step": step}
    folder.close()


def test_without_rows_there_is_no_last_one(tmp_path):
    assert RunFolder(tmp_path).last_row() is None
    assert list(read_metrics(tmp_path)) == []


def test_a_torn_last_row_is_left_out_wherever_it_is_torn(folder):
    file = folder.path / "metrics.jsonl"
    whole = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        # Without its line end a row is whole all the same.
        assert len(list(read_metrics(folder.path))) == sum(end - 1 <= size for end in ends)


@pytest.mark.parametrize("steps", [0, 1, 2, 9])
@pytest.mark.parametrize("torn", ["", '{"step": 3, "lo'])
def test_cutting_keeps_the_first_rows_as_they_are(folder, steps, torn):
    file = folder.path / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines) + torn)
    folder.cut_metrics(steps)
    assert file.read_text() == "".join(lines[:steps])


DAMAGES = {
    "none": (lambda rows: rows, 0, [0, 1, 2, 3, 4, 5]),
    "a step ahead": (lambda rows: [*rows[:3], {"step": 93}, *rows[4:]], 1, [0, 1, 2, 4, 5]),
    "a step ahead at the end": (lambda rows: [*rows[:5], {"step": 93}], 1, [0, 1, 2, 3, 4]),
    "the step of the next": (lambda rows: [*rows[:3], {"step": 4}, *rows[4:]], 1, [0, 1, 2, 4, 5]),
    "a step before": (lambda rows: [*rows[:3], {"step": 1}, *rows[4:]], 1, [0, 1, 2, 4, 5]),
    "a step below zero": (lambda rows: [*rows[:3], {"step": -3}, *rows[4:]], 1, [0, 1, 2, 4, 5]),
    "twice": (lambda rows: [*rows[:4], rows[3], *rows[4:]], 1, [0, 1, 2, 3, 4, 5]),
    "a text": (lambda rows: [*rows[:5], {"step": 5, "valid_loss": "x"}], 1, [0, 1, 2, 3, 4]),
    "no seconds": (lambda rows: [{"step": 0, "seconds": None}, *rows[1:]], 1, [1, 2, 3, 4, 5]),
    "the last but one dropped before": (lambda rows: [*rows[:4], rows[5]], 0, [0, 1, 2, 3, 5]),
    "dropped before": (lambda rows: [*rows[:2], *rows[4:]], 0, [0, 1, 4, 5]),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_rows_whose_step_or_numbers_are_damaged_are_counted_and_the_others_kept(tmp_path, case):
    change, damaged, kept = DAMAGES[case]
    folder, rows = RunFolder(tmp_path), [{"step": i, "loss": 1.0 + i} for i in range(6)]
    text = "".join(json.dumps(row) + "\n" for row in change(rows))
    (tmp_path / "metrics.jsonl").write_text(text)
    assert list(read_metrics(tmp_path)) == [rows[i] for i in kept]
    assert folder.cut_metrics(9) == damaged
    assert list(map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())) == [rows[i] for i in kept]


def test_json_that_cannot_be_read_is_empty(tmp_path):
    for content in (None, "", '{"state": "run', "[1]", "3"):
        if content is not None:
            (tmp_path / "status.json").write_text(content)
        assert read_json(tmp_path / "status.json") == {}


# ---- processes


HOLDS = """
import fcntl, os, signal, sys, time
from pathlib import Path
file = Path(sys.argv[1], "lock").open("a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.truncate(0)
file.write(sys.argv[2] if len(sys.argv) > 2 else str(os.getpid()))
file.flush()
"""
WAITS = "print('ready', flush=True); time.sleep(600)"


@pytest.fixture
def living():
    """Starts processes that live until the test ends."""
    started = []

    def start(code, *arguments):
        started.append(subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE))
        assert started[-1].stdout.readline() == b"ready\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_folder_is_of_one_process_until_it_ends(folder, living):
    assert holder(folder.path) is None
    folder.lock()
    assert folder.locked
    assert holder(folder.path) == os.getpid()
    other = RunFolder(folder.path)
    with pytest.raises(UsageError, match=f"is being trained by process {os.getpid()}.*reroll runs stop"):
        other.lock()
    folder.close()
    other.lock()
    other.close()
    process = living(HOLDS + WAITS, folder.path)
    assert holder(folder.path) == process.pid
    with pytest.raises(UsageError, match=f"process {process.pid}"):
        folder.lock()
    process.kill()
    process.wait()
    assert holder(folder.path) is None


def test_a_lock_that_names_another_process_names_none(folder, living):
    innocent = living("import time;" + WAITS)
    (folder.path / "lock").write_text(str(innocent.pid))
    assert holder(folder.path) is None  # nobody has it
    for forged in (innocent.pid, "-1", "x", ""):
        (folder.path / "lock").write_text("")
        process = living(HOLDS + WAITS, folder.path, forged)
        assert holder(folder.path) == 0
        assert main(["runs", "stop", str(folder.path)]) == 2
        process.kill()
        process.wait()
    assert innocent.poll() is None


def test_a_process_that_is_no_python_is_not_stopped(folder, living, tmp_path):
    shell = f"exec 9<>{folder.path}/lock; flock 9; echo $$ > {folder.path}/lock; echo ready; read"
    process = subprocess.Popen(["bash", "-c", shell], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        assert holder(folder.path) == 0
        assert main(["runs", "stop", str(folder.path), "--wait", "0"]) == 2
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


def test_a_second_start_is_told_who_has_the_folder(folder, living):
    (folder.path / "config.toml").touch()
    with pytest.raises(UsageError, match="is not empty"):
        folder.refuse_used()
    process = living(HOLDS + WAITS, folder.path)
    for resume in (False, True):
        with pytest.raises(UsageError, match=f"is being trained by process {process.pid}.*reroll runs stop"):
            folder.refuse_used(resume)


def test_a_deleted_lock_is_taken_again_and_one_of_another_process_ends_the_run(folder, living):
    folder.lock()
    (folder.path / "lock").unlink()
    folder.record({"step": 3})
    assert holder(folder.path) == os.getpid()
    (folder.path / "lock").unlink()
    process = living(HOLDS + WAITS, folder.path)
    rows = list(read_metrics(folder.path))
    with pytest.raises(RunError, match=f"lock was deleted, and .* is being trained by process {process.pid}"):
        folder.record({"step": 4})
    assert list(read_metrics(folder.path)) == rows
    assert folder.lost


class Deprived(Interrupt):
    """Has its folder taken away at a step."""

    def step(self, row, config):
        if row["step"] == 1:
            (self.path / "lock").unlink()
            self.other = RunFolder(self.path)
            self.other.lock()


def test_who_lost_the_folder_writes_nothing_into_it(tmp_path):
    report = Deprived()
    report.path = tmp_path / "run"
    with pytest.raises(RunError, match="lock was deleted"):
        train(small(), report.path, report=report)
    assert len(list(read_metrics(report.path))) == 2
    assert read_json(report.path / "status.json")["state"] == "running"
    report.other.close()


# ---- every run under a folder


@pytest.fixture
def runs(tmp_path, living):
    """A folder of runs in every state, and the process of the one that is running."""
    train(small(run={"steps": 3}), tmp_path / "done")
    train(small(task={"overfit": True}, optim={"lr": 30.0}), tmp_path / "deep" / "diverged")
    train(small(), tmp_path / "stopped", report=Interrupt(1))
    for name in ("running", "dead"):
        with pytest.raises(Abandoned):
            train(small(), tmp_path / name, report=Interrupt(3, "abandoned"))
    process = living(HOLDS + WAITS, tmp_path / "running")
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run" / "config.toml").touch()
    return tmp_path, process


def strictly(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_every_run_is_listed_with_its_state(runs, capsys):
    folder, _ = runs
    assert main(["runs", str(folder), "--json"]) == 0
    rows = {row["name"]: row for row in strictly(capsys.readouterr().out)}
    states = {name: (row["state"], row["step"], row["steps"]) for name, row in rows.items()}
    diverged = len([row for row in read_metrics(folder / "deep" / "diverged") if row["loss"] == row["loss"]])
    assert diverged < 9
    assert states == {
        "done": ("done", 3, 3), "deep/diverged": ("diverged", diverged, 9), "stopped": ("stopped", 3, 9),
        "running": ("running", 4, 9), "dead": ("dead", 4, 9),
    }  # fmt: skip
    for name, row in rows.items():
        kept = list(read_metrics(folder / name))
        assert row["path"] == str(folder / name)
        assert row["loss"] == kept[-1]["loss"]
        assert row["best"] == min(r["loss"] for r in kept)
        assert row["seconds"] == kept[-1]["total_seconds"]
        assert row["peak_bytes"] == kept[-1]["peak_bytes"] > 0
        scores = [r["valid_loss"] for r in kept if "valid_loss" in r]
        assert row["valid_loss"] == (scores[-1] if scores else None)
        per_step = sum(r["seconds"] for r in kept) / len(kept)
        assert row["seconds_left"] == (pytest.approx(5 * per_step) if name == "running" else None)
    assert main(["runs", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (state, step, steps) in states.items():
        assert any(line.split()[:3] == [name, state, f"{step}/{steps}"] for line in lines), name


def test_a_folder_without_runs_and_none_at_all(tmp_path, capsys):
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert strictly(capsys.readouterr().out) == []
    assert main(["runs", str(tmp_path / "absent")]) == 2
    assert "absent does not exist" in capsys.readouterr().err


SAVES_AND_ENDS = (
    HOLDS
    + """
def end(*_):
    Path(sys.argv[1], "status.json").write_text('{"state": "stopped", "step": 5}')
    sys.exit(1)

signal.signal(signal.SIGTERM, end)
"""
)


def test_stop_asks_the_process_that_has_the_folder_and_no_other(tmp_path, living, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    processes = {}
    for name in ("mine", "other"):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        (path / "config.toml").touch()
        processes[name] = living(SAVES_AND_ENDS + WAITS, path)
    (tmp_path / "runs/mine/status.json").write_text(json.dumps({"state": "running", "pid": processes["other"].pid}))
    assert main(["runs", "stop", "mine"]) == 0
    assert (
        capsys.readouterr().out
        == "runs/mine: stopped at step 5. To resume: reroll train --run-dir runs/mine --resume\n"
    )
    assert processes["mine"].wait() == 1
    assert processes["other"].poll() is None
    assert main(["runs", "stop", "mine"]) == 2
    assert "runs/mine is not running on this machine" in capsys.readouterr().err


def test_stop_of_what_is_no_run(tmp_path, capsys):
    assert main(["runs", "stop", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_stop_says_when_it_takes_too_long(tmp_path, living, capsys):
    (tmp_path / "config.toml").touch()
    process = living(HOLDS + "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + WAITS, tmp_path)
    assert main(["runs", "stop", str(tmp_path), "--wait", "0.2"]) == 1
    assert "is still running after 0.2 seconds" in capsys.readouterr().err
    assert process.poll() is None


def test_a_run_in_this_process_can_be_stopped_by_its_name(tmp_path):
    """What `runs stop` sends is what the loop listens to."""

    class Stop(Interrupt):
        def step(self, row, config):
            status = read_json(tmp_path / "run" / "status.json")
            assert (status["state"], holder(tmp_path / "run")) == ("running", status["pid"])
            if row["step"] == 2:
                os.kill(status["pid"], signal.SIGTERM)

    summary = train(small(), tmp_path / "run", report=Stop())
    assert (summary["state"], summary["step"]) == ("stopped", 4)
    assert read_json(tmp_path / "run" / "status.json")["state"] == "stopped"


class StopsTheSearch(Interrupt):
    def note(self, line):
        super().note(line)
        if line.startswith("Trying") and len(self.notes) < 5:
            os.kill(holder(self.path), signal.SIGTERM)


def test_a_search_for_a_rate_counts_as_running_and_can_be_stopped(tmp_path):
    report = StopsTheSearch()
    report.path = tmp_path / "run"
    search = {"lr": "auto", "search_low": 0.01, "search_high": 0.1, "search_steps": 1}
    assert train(small(optim=search), report.path, report=report)["state"] == "stopped"
    assert sum(note.startswith("Trying") for note in report.notes) == 1


# ---- rows that are read again and again, and names that would command a terminal


def test_rows_are_read_once(folder, monkeypatch):
    tallies, seen = {}, []
    (folder.path / "config.toml").touch()
    (folder.path / "status.json").write_text('{"state": "done"}')
    parse = records.parse_row
    monkeypatch.setattr(records, "parse_row", lambda line: seen.append(line) or parse(line))
    assert records.find(folder.path, tallies)[0]["step"] == 3
    assert len(seen) == 3
    folder.record({"step": 3, "loss": 1.5})
    with (folder.path / "metrics.jsonl").open("a") as file:
        file.write('broken\n{"step": 4, "lo')
    (row,) = records.find(folder.path, tallies)
    assert (row["step"], row["loss"], row["best"], row["damaged_rows"]) == (4, 1.5, 0.1 + 0.2, 1)
    assert len(seen) == 6
    assert folder.cut_metrics(2) == 1
    folder.close()
    assert records.find(folder.path, tallies)[0]["step"] == 2


def test_one_folder_that_cannot_be_read_does_not_hide_the_others(runs, capsys):
    folder, _ = runs
    (folder / "done" / "metrics.jsonl").unlink()
    (folder / "done" / "metrics.jsonl").mkdir()
    assert main(["runs", str(folder), "--json"]) == 0
    rows = {row["name"]: row["state"] for row in strictly(capsys.readouterr().out)}
    assert len(rows) == 5
    assert rows["done"] == "unreadable"


def test_names_and_records_do_not_command_the_terminal(tmp_path, capsys):
    path = tmp_path / "a\x1b[2Jb\x9b"
    train(small(run={"steps": 1}), path)
    for file, key in (("environment.json", "hardware"), ("status.json", "state")):
        content = read_json(path / file)
        (path / file).write_text(json.dumps(content | {key: "\x1b]0;x\x07"}))
    for arguments in (["runs", str(tmp_path)], ["show", str(path)], ["replay", str(path)], ["eval", str(path / "x")]):
        main(arguments)
        captured = capsys.readouterr()
        assert not set("\x1b\x07\x9b") & set(captured.out + captured.err), arguments


def test_hardware_counts_the_cores_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 8}, raising=False)
    assert ", 3 cores" in machine.hardware()
