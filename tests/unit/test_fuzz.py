"""Thousands of malformed command lines and files: each ends with 0, 1 or 2 and one line, never in an error of Python's.

What nobody thought of would be told as `SomeError: … (run again with --debug …)`. That it is never reached is the test.
"""

import itertools
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reroll.cli import COMMANDS
from tests.cli import TINY, TRAIN
from tests.fuzz import INTEGERS, LARGE, PATHS, SMALL, VALUES, call, changes, examples, mangled, tables

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("little_room")]

NUMBERS = itertools.count()


def fresh():
    return f"new-{next(NUMBERS)}"


@given(changes(SMALL | INTEGERS | LARGE), st.sampled_from(["copy", "smoke", "text", "arrays", "demo"]))
@examples(700)
def test_any_flags_are_shown_or_refused(flags, recipe):
    call("show", recipe, *flags)


@given(
    changes(SMALL | SMALL | SMALL | INTEGERS), st.sampled_from(["copy", "sort", "recall", "parity", "memorise", "add"])
)
@examples(700)
def test_any_flags_are_trained_or_refused(flags, task):
    small = (*TINY, f"task.kind={task}", "optim.search_steps=1", "run.checkpoint_every=1")
    folder = fresh()
    code, _, err = call("train", "copy", *small, *flags, "--steps", 1, "--run-dir", folder)
    if code == 2 and "epsilon=" not in err:  # an ε too small for the weights is seen at the first step
        assert not Path(folder).exists(), "refused, but the folder was made"
    shutil.rmtree(folder, ignore_errors=True)


@given(
    st.sampled_from(sorted({*COMMANDS, "stop", "trian"} - {"train", "demo", "bench", "reproduce"})),
    st.lists(VALUES, max_size=4),
)
@examples(400)
def test_any_words_are_refused(command, words):
    call(command, *words)


@given(
    st.sampled_from(["eval", "sample", "export", "replay", "show", "runs", "stop", "init", "config", "text", "arrays"]),
    PATHS,
)
@examples(400)
def test_any_path_is_read_or_refused(tmp_path, command, path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir(exist_ok=True)
    small = (*TINY[2:], "--length", 2, "--steps", 1, "--run-dir", "new")
    lines = {
        "stop": ("runs", "stop", path), "init": ("train", "copy", *small, "--init", path),
        "config": ("train", "copy", *small, "--config", path),
        "text": ("train", "text", *small, f"--path={path}"), "arrays": ("train", "arrays", *small, f"--path={path}"),
    }  # fmt: skip
    call(*lines.get(command, (command, path)))
    shutil.rmtree("new", ignore_errors=True)


@given(st.sampled_from(["run-dir", "to", "out"]), PATHS)
@examples(200)
def test_any_path_is_written_or_refused(tmp_path_factory, run, command, path):
    place = tmp_path_factory.mktemp("written")
    (place / "file").touch()
    (place / "folder").mkdir()
    os.chdir(place)
    lines = {
        "run-dir": (*TRAIN, "--steps", 1, f"--run-dir={path}"), "to": ("export", run, f"--to={path}"),
        "out": ("replay", run, f"--out={path}"),
    }  # fmt: skip
    call(*lines[command])
    os.chdir(run.parent)
    shutil.rmtree(place)


CONFIG = '[task]\nname = "copy"\nlength = 3\nbatch = 2\n[model]\nhidden = 8\n[gradient]\nprobes = 3\n[run]\nsteps = 1\n'


@given(st.one_of(tables(), mangled(CONFIG.encode()), st.binary(max_size=40)), st.booleans())
@examples(500)
def test_any_config_is_taken_or_refused(content, train):
    Path("config.toml").write_bytes(content)
    if train:
        small = ("--batch", 2, "--probes", 2, "--hidden", 8, "--heads", 1, "--layers", 1, "--length", 2, "--steps", 1)
        call("train", "copy", "--config", "config.toml", *small, "--run-dir", "new")
        shutil.rmtree("new", ignore_errors=True)
    else:
        call("show", "--config", "config.toml")
