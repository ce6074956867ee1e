"""The ledger: runs become a record that anyone can verify, and that no edited digit survives."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from reroll.cli import main
from reroll.errors import RunError, UsageError
from reroll.ledger import find_track, read_log, submit, tracks, verify, write_log
from reroll.ledger.track import Track
from reroll.recipes import RECIPES
from reroll.specs.base import leaves
from reroll.train.config import Config
from reroll.train.loop import train
from reroll.train.records import read_json
from tests.runs import write_text

TRACK = """
title = "a track of the tests"
opened = "2026-11-27"
command = "reroll train text"
target = 3.0
fingerprint = "{fingerprint}"
free = ["the model"]
invalid = ["validation data before the last step"]
[fixed]
"task.kind" = "text"
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A track, and run folders of three seeds and of two slower configs; made once, and only read."""
    folder = tmp_path_factory.mktemp("ledger")
    text = write_text(folder / "text.txt")
    seeds = {"a": 0, "b": 1, "c": 2, "slow": 0, "slow2": 1, "mid": 0, "mid2": 1}
    for name, seed in seeds.items():
        steps = 8 if name in "abc" else 12 if "slow" in name else 10
        config = Config(recipe="text").replace(
            task={"kind": "text", "path": str(text), "tokenizer": "char", "length": 8, "batch": 8},
            model={"kind": "lstm", "hidden": 8, "heads": 1, "embed": 4},
            gradient="backprop", optim={"kind": "adamw", "lr": 0.05}, run={"steps": steps, "seed": seed},
        )  # fmt: skip
        train(config, folder / name)
        about = read_json(folder / name / "environment.json")
        about |= {
            "commit": "0123456789ab",
            "command": ["/home/me/bin/reroll", "train", "--run-dir", f"/home/me/{name}"],
        }
        (folder / name / "environment.json").write_text(json.dumps(about))
    track = folder / "records" / "tiny"
    track.mkdir(parents=True)
    (track / "track.toml").write_text(TRACK.format(fingerprint=about["fingerprint"]))
    return folder


@pytest.fixture
def here(world, tmp_path):
    """A copy of the world, to change."""
    return shutil.copytree(world, tmp_path / "world")


def tiny(folder, **changes) -> Track:
    track = find_track("tiny", folder / "records")
    return Track(**{**vars(track), **changes})


def runs(folder, names="abc"):
    return [folder / name for name in names]


def test_p_is_that_of_a_one_sided_t_test():
    from scipy import stats

    losses = np.random.default_rng(1).normal(3.2, 0.05, 7)
    track = Track(Path("x"), "", "", "", 3.25)
    assert track.p_value(losses) == pytest.approx(stats.ttest_1samp(losses, 3.25, alternative="less").pvalue, rel=1e-9)
    shipped = Track(Path("x"), "", "", "", 3.25, sigma=0.05, sigma_runs=20)
    t = (3.25 - 3.2) / 0.05
    assert shipped.p_value([3.2]) == pytest.approx(stats.t.cdf(-t, 19), rel=1e-9)
    assert track.p_value([3.0, 3.0]) == 0
    with pytest.raises(UsageError, match="2 runs or more"):
        track.p_value([3.0])


def test_a_record_is_written_verified_and_shown(here, capsys, monkeypatch):
    folder = submit(tiny(here), runs(here), name="first", summary="AdamW.").resolve()
    record = verify(tiny(here), folder)
    with monkeypatch.context() as within:
        within.chdir(folder)
        assert verify(tiny(folder.parents[2]), Path(".")) == record
    log = (folder / "run-0.txt").read_text()
    assert '"command": ["reroll", "train", "--run-dir", "a"]' in log
    assert "/home/me" not in log
    losses = [read_json(run / "status.json")["valid_loss"] for run in runs(here)]
    seconds = [read_json(run / "status.json")["total_seconds"] for run in runs(here)]
    assert record["status"] == "record"
    assert [run["loss"] for run in record["runs"]] == losses
    assert record["loss"] == pytest.approx(math.fsum(losses) / 3)
    assert record["seconds"] == pytest.approx(math.fsum(seconds) / 3)
    root = ["--root", str(here / "records")]
    assert main(["records", "verify", "--all", *root]) == 0
    assert "3 runs" in capsys.readouterr().out
    assert main(["records", "list", *root]) == 0
    assert "by first" in capsys.readouterr().out
    assert main(["records", "show", "tiny", *root]) == 0
    shown = capsys.readouterr().out
    assert "AdamW." in shown
    assert "invalid: validation data" in shown


@pytest.mark.parametrize("file", ["run-1.txt", "record.json", "README.md"])
def test_one_edited_digit_fails(here, file, capsys):
    """Every tenth digit of a file, one after the other, made another."""
    folder = submit(tiny(here), runs(here, "ab"), name="first", summary="AdamW 2.")
    path = folder / file
    text = path.read_text()
    places = [i for i, letter in enumerate(text) if letter.isdigit()]
    if file == "record.json":  # the summary is nobody's to recompute
        places.remove(text.index("AdamW 2") + 6)
    for place in places[:: max(1, len(places) // 25)]:
        path.write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
        with pytest.raises(RunError):
            verify(tiny(here), folder)
    path.write_text(text)
    verify(tiny(here), folder)
    path.write_text(text[:-9])
    assert main(["records", "verify", str(folder), "--root", str(here / "records")]) == 1
    assert "failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"note": 5}, {"note": None}, {"name": "other"}, {"name": None}, {"date": "2026-11-01"}, {"p": "0"}, {"runs": 1},
        {"baseline": []}, {"status": []},
    ],
)  # fmt: skip
def test_a_field_too_many_or_too_few_fails_and_the_others_are_still_listed(here, changes, capsys):
    root = ["--root", str(here / "records")]
    whole = submit(tiny(here), runs(here), name="whole", summary="x")
    damaged = submit(tiny(here), runs(here, "ab"), name="a", summary="x")
    record = read_json(damaged / "record.json") | changes
    kept = {name: value for name, value in record.items() if name != "name" or value}
    (damaged / "record.json").write_text(json.dumps(kept, indent=1) + "\n")
    assert main(["records", "verify", "--all", *root]) == 1
    failed, ok = capsys.readouterr().out.splitlines()
    assert failed.startswith("failed")
    assert ok.startswith(f"ok      {whole}")
    assert main(["records", "verify", str(damaged), *root]) == 1
    for words in (["show", "tiny"], ["list"]):
        assert main(["records", *words, *root]) == 0
    shown = capsys.readouterr()
    assert "whole: x" in shown.out
    assert not shown.err


def test_verifying_all_sees_what_was_deleted_and_goes_on(here, capsys):
    root = ["--root", str(here / "records")]
    folders = [submit(tiny(here), runs(here, "ab"), name=name, summary="x") for name in "cba"][::-1]
    (folders[0] / "record.json").unlink()
    (folders[1] / "run-1.txt").unlink()  # a track without a spread needs two
    assert main(["records", "verify", "--all", *root]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "record.json is missing" in lines[0]
    assert "submit 2 runs or more" in lines[1]
    assert [line.split()[0] for line in lines] == ["failed", "failed", "ok"]
    (here / "records" / "tiny" / "track.toml").unlink()
    assert main(["records", "verify", "--all", *root]) == 1
    assert capsys.readouterr().out.count("is not the folder of a record") == 3


@pytest.mark.parametrize(
    "changes, some, message",
    [
        ({"target": 0.5}, "abc", r"mean loss .* is not significantly below 0.5 \(p = "),
        ({"p": 1e-9}, "abc", "the track asks for p < 1e-09"),
        ({"fingerprint": "f" * 64}, "abc", "the fingerprint .*, the track's ffffffffffff"),
        ({"fixed": {"model.hidden": 9}}, "abc", "run-0.txt: model.hidden=8, but the track fixes 9"),
        ({"cores": 1000}, "abc", "but the track is for 1000 cores"),
        ({"gpus": 8}, "abc", r"it ran in 1 process\(es\) on cpu, .*; the track is for 8 GPU\(s\) of one kind"),
        ({}, "aa", "two runs have one seed"),
        ({}, ("a", "slow"), "the runs differ in run.steps"),
    ],
)
def test_what_is_no_record_is_refused(here, changes, some, message):
    with pytest.raises(RunError, match=message):
        submit(tiny(here, **changes), runs(here, some), name="first", summary="x")
    assert not list((here / "records" / "tiny").glob("*_first*"))


def test_runs_that_cannot_be_submitted(here):
    about = read_json(here / "a" / "environment.json")
    (here / "a" / "environment.json").write_text(json.dumps(about | {"commit": "0123456789ab+"}))
    with pytest.raises(RunError, match="commit your changes"):
        submit(tiny(here), runs(here), name="x", summary="x")
    status = read_json(here / "b" / "status.json")
    (here / "b" / "status.json").write_text(json.dumps(status | {"state": "stopped"}))
    with pytest.raises(RunError, match="is stopped, not done"):
        submit(tiny(here), runs(here, "bc"), name="x", summary="x")
    (here / "b" / "status.json").unlink()
    with pytest.raises(RunError, match=r"b has no status.json; let it finish, then submit it\.$"):
        submit(tiny(here), runs(here, "bc"), name="x", summary="x")
    lines = (here / "c" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (here / "c" / "metrics.jsonl").write_text("".join(lines[:3] + lines[4:]))
    with pytest.raises(RunError, match="not each of the 8 steps once"):
        submit(tiny(here), runs(here, "c"), name="x", summary="x")
    with pytest.raises(UsageError, match="name='a b'"):
        submit(tiny(here), runs(here), name="a b", summary="x")


@pytest.mark.parametrize(
    "change", [{"seconds": None}, {"seconds": "1"}, {"tokens": None}, {"peak_bytes": "x"}, {"valid_loss": "y"}]
)
def test_damaged_rows_are_one_line(here, change, capsys):
    """Of the last row of a run; a record of it is refused without a traceback."""
    lines = (here / "a" / "metrics.jsonl").read_text().splitlines()
    (here / "a" / "metrics.jsonl").write_text(
        "\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | change)]) + "\n"
    )
    words = ("records", "submit", "tiny", str(here / "a"), str(here / "b"), "--name", "x", "--summary", "x")
    assert main([*words, "--root", str(here / "records")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--debug" not in error


def test_a_second_record_is_timed_beside_the_first(here):
    """Without that it is valid, as machines differ; with it, Welch's test says whether it is faster."""
    from scipy import stats

    slow = submit(tiny(here), runs(here, ("slow", "slow2")), name="slow", summary="x")
    assert verify(tiny(here), slow)["status"] == "record"
    folder = submit(tiny(here), runs(here), name="again", summary="x")
    assert verify(tiny(here), folder)["status"] == "valid"
    assert verify(tiny(here), slow)["status"] == "record"
    folder = submit(tiny(here), runs(here), name="timed", summary="x", baseline=runs(here, ("slow", "slow2")))
    record = verify(tiny(here), folder)
    beaten = record["baseline"]
    assert beaten["ratio"] == record["seconds"] / beaten["seconds"]
    # Welch and Satterthwaite by hand, for the logarithms.
    logs = [np.log([run["seconds"] for run in some["runs"]]) for some in (record, beaten)]
    parts = [values.var(ddof=1) / len(values) for values in logs]
    freedom = sum(parts) ** 2 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, logs))
    width = stats.t.ppf(0.975, freedom) * sum(parts) ** 0.5
    middle = logs[0].mean() - logs[1].mean()
    assert beaten["interval"] == pytest.approx([math.exp(middle - width), math.exp(middle + width)], rel=0.01)
    assert record["status"] == ("record" if beaten["ratio"] < 1 and beaten["p"] < 0.01 else "valid")
    text = (folder / "record.json").read_text()
    other = "valid" if record["status"] == "record" else "record"
    (folder / "record.json").write_text(text.replace(f'"status": "{record["status"]}"', f'"status": "{other}"'))
    with pytest.raises(RunError, match="status="):
        verify(tiny(here), folder)


def timed(folder, names, seconds):
    """Run folders, with the seconds of their steps set."""
    for number, run in enumerate(runs(folder, names)):
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        each = (seconds + number / 100) / len(rows)
        (run / "metrics.jsonl").write_text("".join(json.dumps(row | {"seconds": each}) + "\n" for row in rows))
    return runs(folder, names)


def test_each_record_beats_the_one_before_and_none_an_older_one(here):
    """Of one day, in an order that is not that of the names: slow, fast, and what lies between."""
    track = tiny(here)
    slow, fast = timed(here, ("slow", "slow2"), 40.0), timed(here, "abc", 4.0)
    first = submit(track, slow, name="slow", summary="x")
    second = submit(track, fast, name="fast", summary="x", baseline=slow)
    between = timed(here, ("mid", "mid2"), 20.0)
    with pytest.raises(RunError, match="not the record to beat, .*_fast: it differs in run.steps"):
        submit(track, between, name="mid", summary="x", baseline=slow)
    third = submit(track, between, name="mid", summary="x", baseline=fast)
    assert [verify(track, folder)["status"] for folder in (first, second, third)] == ["record", "record", "valid"]
    faster = submit(track, timed(here, ("mid", "mid2"), 2.0), name="all", summary="x", baseline=fast)
    assert verify(track, faster)["status"] == "record"
    assert verify(track, faster)["baseline"]["record"] == second.name
    assert [verify(track, folder)["status"] for folder in (first, second, third)] == ["record", "record", "valid"]


def test_runs_of_another_machine_or_source_are_not_compared(here):
    slow, about = timed(here, ("slow", "slow2"), 40.0), read_json(here / "b" / "environment.json")
    submit(tiny(here), slow, name="slow", summary="x")
    versions, machine = about["versions"], {"hardware": "another, 2 cores"}
    for changes, message in (
        (
            machine,
            "baseline-0.txt has hardware .*, run-0.txt another, 2 cores: the machine and data must be the same",
        ),
        ({"versions": versions | {"torch": "2.9.0"}}, "torch"),
        ({"versions": versions | {"python": "3.12.1"}}, "python"),
        ({"versions": None}, "python 3.*, run-0.txt None"),
    ):
        for run in runs(here):
            (run / "environment.json").write_text(json.dumps(about | changes))
        with pytest.raises(RunError, match=message):
            submit(tiny(here), timed(here, "abc", 4.0), name="fast", summary="x", baseline=slow)
    for changes, message in (
        (machine, "run-1.txt has hardware"),
        ({"commit": "fedcba987654"}, "of several commits, 01"),
    ):
        for run, change in zip(runs(here), ({}, changes, {})):
            (run / "environment.json").write_text(json.dumps(about | change))
        with pytest.raises(RunError, match=message):
            submit(tiny(here), runs(here), name="fast", summary="x")
    for run in runs(here):  # a baseline may be of an older source
        (run / "environment.json").write_text(json.dumps(about | {"commit": "fedcba987654"}))
    submit(tiny(here), timed(here, "abc", 4.0), name="fast", summary="x", baseline=slow)
    (here / "a" / "environment.json").write_text(json.dumps(about | machine | {"device": "cuda"}))
    with pytest.raises(RunError, match="it ran on cuda, .* but the track is for 2 cores"):
        submit(tiny(here, cores=2), runs(here), name="card", summary="x")


def test_foreign_weights_and_a_rate_that_was_searched_for_are_refused(here, capsys):
    root = ["--root", str(here / "records"), "--name", "x", "--summary", "x"]
    for flags, message in (
        (["--init", str(here / "c")], "run-0.txt: its weights are not drawn from its seed: train it without --init"),
        (
            ["--lr", "auto", "--set", "optim.search_steps=1"],
            "the search for its learning rate is not in its seconds: train it with --lr ",
        ),
    ):
        again = here / f"a{flags[0]}"
        assert main(["train", "--config", str(here / "a" / "config.toml"), *flags, "--run-dir", str(again)]) == 0
        assert main(["records", "submit", "tiny", str(again), str(here / "b"), *root]) == 1
        assert message in capsys.readouterr().err


def test_data_of_a_track_without_a_fingerprint(here):
    """Runs of one record have the same, a baseline the same held-out ones; so has a track that names them."""
    track, about = tiny(here, fingerprint=None), read_json(here / "b" / "environment.json")

    def submitted(name, some, changes, track=track, **options):
        for run, change in zip(some, changes):
            (run / "environment.json").write_text(json.dumps(about | change))
        return submit(track, some, name=name, summary="x", **options)

    slow, fast, more, less = timed(here, ("slow", "slow2"), 40.0), timed(here, "abc", 4.0), {}, {}
    more, less = ({"fingerprint": name, "valid_fingerprint": "val"} for name in ("more shards", "fewer shards"))
    submitted("slow", slow, [more] * 2)
    with pytest.raises(RunError, match="the runs differ in their data"):
        submitted("mixed", fast, [more, less, less])
    with pytest.raises(RunError, match="baseline-0.txt has valid_fingerprint val, run-0.txt other"):
        submitted("other", fast, [{"valid_fingerprint": "other"}] * 3, baseline=slow)
    named = tiny(here, fingerprint=None, valid_fingerprint="f" * 64)
    with pytest.raises(RunError, match="its held-out data have the fingerprint val, the track's ffffffffffff"):
        submitted("named", fast, [less] * 3, named)
    with pytest.raises(RunError, match=f"its data have {about['sizes']['vocab']} symbols, the track's 50257"):
        submitted("symbols", fast, [less] * 3, tiny(here, fingerprint=None, vocab=50257))
    folder = submitted("fast", fast, [less] * 3, baseline=slow)
    assert verify(track, folder)["status"] == "record"


RULES = {
    "cpu-bytes": "8f79fd94cdbf1e74",
    "cpu-copy": "ff8a3f59e0896b52",
    "fineweb-124m": "c18949a28bde099c",
    "fineweb-124m-1gpu": "5502f5ae002961fe",
}
"""Of every open track the SHA-256 of what its records are judged by: a new track has a new line, no line changes."""


def test_the_rules_of_an_open_track_do_not_change():
    """Its command and history may; valid_fingerprint is filled in by the first record, and then verified with each."""
    for name, track in tracks(Path(__file__).parents[2] / "records").items():
        free = ("path", "command", "history", "valid_fingerprint")
        rules = json.dumps({field: value for field, value in vars(track).items() if field not in free}, sort_keys=True)
        assert hashlib.sha256(rules.encode()).hexdigest()[:16] == RULES[name], name


def test_the_first_run_of_a_recipe_fits_its_track():
    root = Path(__file__).parents[2] / "records"
    for track in tracks(root).values():
        words = track.command.split()
        values = leaves(RECIPES[words[2].replace("-", "_")]())
        values |= {"run.threads": int(words[words.index("--threads") + 1])} if "--threads" in words else {}
        assert {name: values[name] for name in track.fixed} == track.fixed, track.name


def test_two_records_that_beat_the_same_one_are_not_both_records(here):
    """As two pull requests may have it: the later one is to be timed again."""
    track, slow = tiny(here), timed(here, ("slow", "slow2"), 40.0)
    submit(track, slow, name="slow", summary="x")
    fast = submit(track, timed(here, "abc", 4.0), name="fast", summary="x", baseline=slow)
    fast.rename(here / "aside")
    other = submit(track, timed(here, ("mid", "mid2"), 20.0), name="other", summary="x", baseline=slow)
    (here / "aside").rename(fast)
    with pytest.raises(RunError, match="_fast is faster than .*_slow too"):
        verify(track, other)


def test_a_baseline_is_that_of_a_record_and_enough_of_it(here):
    slow = runs(here, ("slow", "slow2"))
    with pytest.raises(RunError, match="is no record of the track; submit it without one"):
        submit(tiny(here), runs(here), name="early", summary="x", baseline=slow)
    submit(tiny(here), runs(here), name="first", summary="x")
    with pytest.raises(UsageError, match="2 runs or more of each"):
        submit(tiny(here), runs(here), name="once", summary="x", baseline=runs(here, "a"))
    with pytest.raises(RunError, match="the baseline is not the record to beat"):
        submit(tiny(here), runs(here), name="other", summary="x", baseline=slow)


def test_the_track_may_be_left_out_where_the_run_fits_one(here, capsys):
    words = ["records", "submit", *map(str, runs(here)), "--name", "x", "--summary", "x", "--root"]
    words.append(str(here / "records"))
    assert main(words) == 0
    assert len(list((here / "records" / "tiny").glob("*_x/run-*.txt"))) == 3
    shutil.copytree(here / "records" / "tiny", here / "records" / "twin")
    assert main(words) == 2
    assert "fits tiny, twin; name the track: reroll records submit TRACK" in capsys.readouterr().err
    for name in ("tiny", "twin"):
        path = here / "records" / name / "track.toml"
        path.write_text(path.read_text().replace('"text"\n', '"copy"\n'))
    assert main(words) == 2
    assert "fits no track; name the track" in capsys.readouterr().err


def test_a_failure_is_kept_as_negative(here):
    strict = tiny(here, target=0.1)
    record = verify(strict, submit(strict, runs(here), name="no", summary="x", negative=True))
    assert record["status"] == "negative"
    assert "not significantly below 0.1" in record["refusals"][0]


def test_a_log_is_a_config_to_train_again(here, tmp_path):
    write_log(here / "a", tmp_path / "log.txt")
    log = read_log(tmp_path / "log.txt")
    assert log.config["run.steps"] == 8
    assert log.rows[-1]["valid_loss"] == log.summary["valid_loss"]
    text = (tmp_path / "log.txt").read_text()
    (tmp_path / "again.toml").write_text(text.partition("=== environment.json")[0].partition("\n")[2])
    assert main(["train", "--config", str(tmp_path / "again.toml"), "--run-dir", str(tmp_path / "again")]) == 0
    again = read_json(tmp_path / "again" / "status.json")
    assert again["valid_loss"] == log.summary["valid_loss"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("title = 1", "lacks command, opened, target"),
        (TRACK.replace("target", "targte"), 'targte is not a field of a track. Did you mean "target"'),
        ("x = [", "is not TOML"),
        ("sigma = 0.0\n" + TRACK, "sigma=0.0 must be positive"),
    ],
)
def test_a_damaged_track_is_one_line(tmp_path, text, message):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "track.toml").write_text(text)
    with pytest.raises(UsageError, match=message):
        tracks(tmp_path)


def test_mistakes_at_the_command_line(here, capsys):
    root = ["--root", str(here / "records")]
    submit(tiny(here), runs(here), name="taken", summary="x")
    for words, message in (
        (["show", "tyni", *root], 'track "tyni" is unknown'),
        (["verify", *root], "either the folder of a RECORD, or --all"),
        (["verify", str(here / "records" / "tiny"), *root], "tiny is not the folder of a record; those are "),
        (["submit", "tiny", *root], "RUNS is missing"),
        (["submit", "tiny", str(here / "a"), *root], "--name='' must be letters"),
        (["submit", "tiny", str(here / "a"), "--name", "x", *root], "--summary='' is empty"),
        (["submit", "tiny", str(here / "a"), "--name", "taken", "--summary", "x", *root], "--name='taken' is taken"),
        (["lst"], 'Did you mean "list"'),
        (["list", "--root", "nowhere"], "--root=nowhere is not a folder of tracks"),
    ):
        assert main(["records", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_track_of_gpus_and_of_data_without_a_fingerprint(here, tmp_path):
    about = read_json(here / "a" / "environment.json")
    for run in runs(here):
        changed = about | {"hardware": "AMD EPYC, 112 cores, 8 × NVIDIA H100 80GB HBM3"}
        changed |= {"processes": 8, "device": "cuda:0"}
        (run / "environment.json").write_text(json.dumps(changed))
    track = tiny(here, gpus=8, fingerprint=None)
    assert verify(track, submit(track, runs(here), name="first", summary="x"))["status"] == "record"
    with pytest.raises(RunError, match=r"the track is for 1 GPU\(s\)"):
        submit(tiny(here, gpus=1, fingerprint=None), runs(here), name="second", summary="x")
    for other in ({"processes": 1}, {"device": "cpu"}, {"hardware": "AMD EPYC, 112 cores, 7 × A, 1 × B"}):
        (here / "a" / "environment.json").write_text(json.dumps(changed | other))
        with pytest.raises(RunError, match="run-0.txt: it ran in .* of one kind"):
            submit(track, runs(here), name="third", summary="x")


def test_the_spread_of_every_open_track_is_that_of_runs_in_it():
    root = Path(__file__).parents[2] / "records"
    opened = tracks(root)
    assert {"cpu-bytes", "cpu-copy", "fineweb-124m", "fineweb-124m-1gpu"} <= opened.keys()
    for track in (track for track in opened.values() if track.sigma is not None):
        shipped = [read_json(folder / "record.json")["runs"] for folder in track.path.glob("*/")]
        runs = next(runs for runs in shipped if len(runs) == track.sigma_runs >= 20)
        assert track.sigma == pytest.approx(np.std([run["loss"] for run in runs], ddof=1), rel=0.01)
