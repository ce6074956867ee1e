"""The command line: what each command does, from the help to the weights of a step."""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import reroll
from reroll.cli import COMMANDS
from reroll.cli.console import Console
from reroll.cli.runs import DISPENSABLE
from reroll.data.arrays import Arrays
from reroll.data.text import Text
from reroll.data.tokenizers import from_dict
from reroll.errors import UsageError
from reroll.models import Interface
from reroll.recipes import INSTEAD, RECIPES
from reroll.specs.model import ObjectModel
from reroll.specs.optim import ObjectOptimizer
from reroll.specs.task import ObjectTask
from reroll.train import checkpoint, toml
from reroll.train.config import Config
from reroll.train.load import build_model, export, open_model
from reroll.train.mesh import Mesh, Processes
from reroll.train.records import read_config, read_metrics
from tests.cli import TINY, TRAIN, contents, weights_of
from tests.runs import write_text

# What is printed without any work


def test_help_and_version(cli):
    overview = cli("--help")
    assert (overview.code, overview.err) == (0, "")
    assert all(re.search(rf"^  {name} ", overview.out, re.MULTILINE) for name in COMMANDS)
    assert cli() == overview
    assert cli("--version") == (0, f"{reroll.__version__}\n", "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(cli, command):
    found = cli(command, "--help")
    assert found.code == 0
    assert found.out.startswith(f"usage: reroll {command}")
    assert command not in ("train", "show") or "[RECIPE]  " in found.out
    assert cli("runs", "stop", "--help").out.startswith("usage: reroll runs stop")


@pytest.mark.parametrize("recipe", RECIPES)
def test_help_of_a_recipe_shows_its_values(cli, recipe):
    found = cli("train", recipe, "--help")
    batch = RECIPES[recipe]().task.batch
    assert found.code == 0
    assert f"(default: {batch})" in found.out
    assert recipe in cli("recipes").out


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from reroll.cli import main\n"
        "for arguments in (['--help'], ['train', '--help'], ['train', 'smoke', '--stpes', '1'], ['recipes']):\n"
        "    main(arguments)\n"
        "print([m for m in ('torch', 'numpy', 'numba', 'safetensors') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_debug_shows_the_traceback(cli):
    with pytest.raises(UsageError, match="smokee"):
        cli("train", "smokee", "--debug")
    command = [sys.executable, "-m", "reroll", "train", "smokee"]
    plain = subprocess.run(command, capture_output=True, text=True)
    assert (plain.returncode, plain.stderr.count("\n")) == (2, 1)
    assert "Traceback" in subprocess.run([*command, "--debug"], capture_output=True, text=True).stderr


def test_output_that_cannot_be_written_is_an_error():
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full, a disk that is always full, is a file of Linux")
    # Written at the end: what is buffered fails after everything else.
    options = {"stderr": subprocess.PIPE, "env": {**os.environ, "PYTHONUNBUFFERED": ""}}
    for argument in ("recipes", "--help"):
        with open("/dev/full", "w") as full:
            done = subprocess.run([sys.executable, "-m", "reroll", argument], stdout=full, **options)
        assert done.returncode == 1
        assert done.stderr.startswith(b"error: No space left on device")
        assert done.stderr.count(b"\n") == 1
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as gone:
        done = subprocess.run([sys.executable, "-m", "reroll", "recipes"], stdout=gone, **options)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_that_lacks_characters_is_no_reason_to_fail(tmp_path):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "reroll", "show", "text", "--path", b"na\xefve"]
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert b"has a character that cannot be stored in a file" in done.stderr
    done = subprocess.run([*command[:-1], "ε"], capture_output=True, env=environment, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb'path = "\u03b5"' in done.stdout


# A run from beginning to end


def test_train_smoke_reaches_its_target(smoke):
    rows = list(read_metrics(smoke))
    assert rows[-1]["loss"] < RECIPES["smoke"]().run.target_loss < rows[0]["loss"]
    assert read_config(smoke).run.threads == 1


def test_eval(cli, smoke):
    found = cli("eval", smoke)
    assert (found.code, found.err) == (0, "")
    last = list(read_metrics(smoke))[-1]
    words = re.fullmatch(
        r"valid, after (\d+) steps: loss (\S+) nats  bits \S+  accuracy 1  exact 1\nmean over 9 symbols; exact: .*\n",
        found.out,
    )
    assert int(words[1]) == last["step"] + 1
    assert float(words[2]) == pytest.approx(last["valid_loss"], rel=1e-5)


def test_eval_fails_if_the_loss_is_not_finite(cli, smoke):
    loaded = open_model(smoke)
    torch.nn.init.constant_(next(loaded.model.parameters()), math.nan)
    export(loaded, Path("nan.safetensors"))
    found = cli("eval", "nan.safetensors")
    assert (found.code, "loss nan" in found.out) == (1, True)
    assert "The loss is not finite" in found.error
    sampled = cli("sample", "nan.safetensors")
    assert (sampled.code, sampled.out) == (1, "")
    assert "outputs are NaN: it has diverged" in sampled.error


def test_sample_goes_on_with_the_prompt(cli, smoke):
    found = cli("sample", smoke, "--prompt", "abc", "--length", 7, "--seed", 5)
    assert (found.code, found.err) == (0, "")
    assert found.out.startswith("abc")
    assert cli("sample", smoke, "--prompt", "abc", "--length", 7, "--seed", 5) == found
    assert cli("sample", smoke, "--temperature", 0, "--top-k", 1, "--length", 3).code == 0


def test_the_memorised_sequence_is_what_is_sampled(cli, smoke):
    """The model knows one sequence by heart: from its first symbol on, the most likely symbols are the rest of it."""

    loaded = open_model(smoke)
    task = loaded.config.task.build(loaded.config.run.seed)
    batch = task.batch(0)
    sequence = task.decode([*batch.inputs[0].tolist(), int(batch.targets[0, -1])])
    first, scored = task.decode(batch.inputs[0, :1].tolist()), int(batch.mask[0].sum())
    found = cli("sample", smoke, "--prompt", first, "--temperature", 0, "--length", scored)
    assert found.out.rstrip("\n") == sequence[: len(first) + scored]


def test_export_load_and_init(cli, smoke, tmp_path):
    found = cli("export", smoke, "--to", "deep/model.safetensors")
    assert (found.code, found.out) == (0, f"written: {Path('deep/model.safetensors')}, {Path('deep/model.toml')}\n")
    file = tmp_path / "deep" / "model.safetensors"
    assert tomllib.loads(file.with_suffix(".toml").read_text())["recipe"] == "smoke"
    assert checkpoint.checksum(load_file(file)) == weights_of(smoke)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(reroll.load(file)(ids), reroll.load(smoke)(ids))
    assert cli("eval", file).out == cli("eval", smoke).out
    assert cli("sample", file, "--prompt", "a").out == cli("sample", smoke, "--prompt", "a").out
    for source in (file, smoke):
        path = tmp_path / f"from-{source.name}"
        assert cli("train", "smoke", "--init", source, "--run-dir", path, "--steps", 1).code == 0
        assert next(read_metrics(path))["loss"] < 0.2
    assert weights_of(tmp_path / "from-smoke") == weights_of(tmp_path / "from-model.safetensors")
    # What was begun with other weights than the seed's is replayed from them.
    assert cli("replay", path, "--checksum").out.splitlines()[-1] == weights_of(path)
    # A vocabulary may be larger than the tokenizer's; what is beyond is never drawn.
    loaded = open_model(file)
    padded = build_model(loaded.config.model, Interface(300, None, 300, "every"), 0)
    export(replace(loaded, model=padded, tokenizer=from_dict({"name": "byte"})), file)
    model = reroll.load(file)
    assert (model.vocab, model.tokenizer.size) == (300, 256)
    assert model.generate(model.tokenizer.encode("a").tolist(), 200, temperature=9.0).max() < 256


def test_replay_gives_the_weights_of_every_checkpoint(cli, smoke, tmp_path):
    for folder in checkpoint.all_of(smoke / "checkpoints"):
        saved = checkpoint.read(folder)
        found = cli("replay", smoke, "--to", saved.step, "--checksum")
        assert found.code == 0
        assert re.fullmatch(r"[0-9a-f]{64}", found.out.splitlines()[-1])
        assert found.out.splitlines()[-1] == checkpoint.checksum(saved.weights)
    assert "replayed 0 steps" in cli("replay", smoke, "--to", 0).out
    assert cli("replay", smoke, "--out", "again.safetensors").code == 0
    assert checkpoint.checksum(load_file(tmp_path / "again.safetensors")) == weights_of(smoke)
    assert cli("eval", "again.safetensors").out == cli("eval", smoke).out


def test_the_checksum_is_of_name_type_shape_and_bytes(cli, run):
    """SHA-256 over (name, dtype, shape, little-endian bytes) sorted by name, computed here without the library."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.newest(run / "checkpoints").weights.items()):
        array = tensor.numpy()
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    assert cli("replay", "run", "--checksum").out.splitlines()[-1] == digest.hexdigest()


def test_text_is_sampled_scored_and_resumed(cli, tmp_path):
    Path("my.txt").write_text("the cat sat on the mat. " * 60)
    Path("more.txt").write_text("a dog ran. " * 90)
    flags = (*TINY[2:], "--length", 8, "--tokenizer", "char")
    assert cli("train", "text", "--path", "my.txt", *flags, "--run-dir", "run").code == 0
    found = cli("sample", "run", "--prompt", "the c", "--length", 11)
    assert (found.code, len(found.out)) == (0, len("the c") + 11 + 1)
    own, other = cli("eval", "run"), cli("eval", "run", "--path", "more.txt")
    assert own.code == other.code == 0
    assert own.out.startswith("valid, after 4 steps: loss")
    assert other.out.startswith("more.txt (all of it), after 4 steps: loss")
    # "d", "g", "r", "u" and "." of "a dog ran. ": the first four are not in what was learned.
    unknown = sum(character not in Path("my.txt").read_text() for character in Path("more.txt").read_text())
    assert f"{unknown} of 990 symbols ({100 * unknown / 990:.2f} %) were not in the vocabulary" in other.out
    assert "vocabulary" not in own.out
    Path("nine.txt").write_text("the cat s")
    assert cli("eval", "run", "--path", "nine.txt").code == 0
    Path("parts").mkdir()
    for name in ("train", "valid"):
        Path("parts", f"my.{name}.txt").write_text("the cat sat on the mat. " * 9)
    assert cli("eval", "run", "--path", "parts").out.startswith("parts (valid), after 4 steps")
    refused = cli("sample", "run", "--prompt", "the €uro")
    assert refused.code == 2
    assert "--prompt: '€', 'u', 'r' are not among the" in refused.error
    (tmp_path / "my.txt").write_text("something else, and more of it. " * 60)
    before = contents(tmp_path / "run")
    changed = cli("train", "--run-dir", "run", "--resume", "--steps", 6)
    assert changed.code == 1
    assert "data have changed" in changed.error
    assert contents(tmp_path / "run") == before


def test_a_terminal_is_told_nothing_but_text(cli, tmp_path):
    Path("my.txt").write_bytes(bytes(range(128)) * 9)
    flags = (*TINY[2:], "--length", 8)
    assert cli("train", "text", "--path", "my.txt", *flags, "--run-dir", "run").code == 0
    found = cli("sample", "run", "--prompt", "a\tb\n\x1b[2J\x9b", "--length", 500)
    assert found.out.startswith("a\tb\n␛[2J�")
    assert all(character.isprintable() or character in "\n\t" for character in found.out)


def test_series_are_scored_whole_and_in_the_units_of_the_run(cli, tmp_path):
    rows = np.random.default_rng(0).normal(5, 3, (300, 2))

    def write(name, header, values):
        Path(name).write_text(header + "\n" + "\n".join(",".join(map(str, row)) for row in values))

    write("my.csv", "t,h", rows)
    write("moved.csv", "t,h", rows[:80] + 100)
    write("wide.csv", "t,h,p", np.ones((300, 3)))
    flags = (*TINY[2:], "--length", 8)
    trained = cli("train", "arrays", "--path", "my.csv", *flags, "--run-dir", "run")
    # 299 pairs in 38 windows of 8, of which the last three, the last of them with three pairs, are held out.
    line = (
        "my.csv: 1 series × 300 steps × 2 features (t, h); predicts the next row, 19 rows (6.35 %) held out. Held-out"
    )
    assert f"{line} loss without" in trained.out
    assert "\nmean over 19 rows\n" in cli("eval", "run").out
    found = cli("eval", "run", "--path", "moved.csv")
    assert found.out.startswith("moved.csv (all of it), after 4 steps: loss ")
    # In its own units it would be like the training part; in those of the run it is a hundred away.
    assert float(re.search(r"steps: loss (\S+)", found.out)[1]) > 100
    assert cli("export", "run", "--to", "m.safetensors").code == 0
    assert cli("eval", "m.safetensors", "--path", "moved.csv").out == found.out
    assert cli("eval", "m.safetensors").out == cli("eval", "run").out
    refused = cli("eval", "run", "--path", "wide.csv")
    assert refused.code == 2
    assert "--path=wide.csv has 3 features (t, h, p), but the model was trained on 2" in refused.error
    about = json.loads(Path("run/environment.json").read_text())
    Path("run/environment.json").write_text(json.dumps({k: v for k, v in about.items() if k != "units"}))
    assert "standardised by its own" in cli("eval", "run", "--path", "moved.csv").out  # a run of an older version
    assert "has 3 columns of numbers, but run reads 2" in cli("eval", "run", "--path", "wide.csv").error
    Path("run/environment.json").write_text(json.dumps(about | {"units": [[1.0], [0.0]]}))
    assert "units=" in cli("eval", "run").error


def test_a_classifier_is_scored_on_files_of_its_classes(cli, tmp_path):
    inputs = np.random.default_rng(0).normal(size=(30, 9, 2))
    np.savez("my.npz", inputs=inputs, targets=np.arange(30) % 3)
    np.savez("two.npz", inputs=inputs[:5], targets=np.arange(5) % 2)
    np.savez("many.npz", inputs=inputs, targets=np.arange(30) % 7)
    np.savez("none.npz", inputs=inputs)
    flags = (*TINY[2:], "--length", 9)
    assert cli("train", "arrays", "--path", "my.npz", *flags, "--run-dir", "run").code == 0
    assert cli("eval", "run", "--path", "two.npz").code == 0
    assert "7 outputs per series, but run has 3" in cli("eval", "run", "--path", "many.npz").error
    assert "2 outputs per step, but run has 3" in cli("eval", "run", "--path", "none.npz").error


# Configs: recipe < files < --set < flags


def test_show_says_what_and_why(cli):
    found = cli("show", "copy", "--lr", "0.25", "--set", "optim.clip=2.5", "gradient.shaping=rank")
    assert (found.code, found.err) == (0, "")
    lines = dict(re.findall(r"^(\w+) = (.*)$", found.out, re.MULTILINE))
    assert lines["lr"] == "0.25  # flag"
    assert lines["clip"] == "2.5  # --set"
    assert lines["shaping"] == '"rank"  # --set'
    assert lines["heads"] == "4  # recipe copy"
    assert lines["layers"] == "1  # default"
    assert lines["eval_every"] == "100  # derived"
    notes = [line for line in found.out.splitlines() if line.startswith("#")]
    assert re.match(r"# device (cpu|cuda) \((no CUDA|CUDA is available)\), dtype fp32", notes[0])
    assert re.match(r"# noise by \w+: .", notes[1])
    assert re.match(r"# lstm, without a gradient, by \w+: .", notes[2])
    assert notes[3] == "# 15,485 weights, 192 forward passes a step (96 probes)"
    assert notes[4].startswith("# a checkpoint every 100 steps, and at least every 60 seconds")
    resolved = toml.overlay(Config(), tomllib.loads(found.out), "show")
    assert resolved.optim.clip == 2.5


def test_a_rate_is_for_as_many_probes_as_are_asked_for(cli):
    def shown(*flags):
        return re.search("^lr = (.*)$", cli("show", "arrays", *flags).out, re.MULTILINE)[1]

    assert shown("--probes", 24) == "0.0125  # recipe arrays: 0.05 for 96 probes"
    assert shown("--probes", 128) == shown() == "0.05  # recipe arrays"
    assert shown("--probes", 24, "--lr", 0.05) == "0.05  # flag"
    assert shown("--probes", 24, "--optimizer", "adamw") == "0.05  # recipe arrays"
    Path("own.toml").write_text("gradient.probes = 24")
    assert shown("--config", "own.toml") == "0.05  # recipe arrays"
    flags = ("train", "copy", "--steps", 1, "--batch", 2, "--run-dir", "run", "--set", "run.threads=1")
    assert cli(*flags, "--probes", 24).code == 0
    assert cli("train", "copy", "--run-dir", "run", "--resume", "--steps", 2).code == 0
    assert read_config(Path("run")).optim.lr == 0.0125


def test_show_a_run(cli, smoke):
    found = cli("show", smoke)
    assert found.out.startswith((smoke / "config.toml").read_text())
    assert f"done at step {len(list(read_metrics(smoke)))}; 22372 weights" in found.out
    assert cli("show", smoke, "--lr", "0.3").code == 2


def test_precedence(cli, tmp_path):
    (tmp_path / "a.toml").write_text("[optim]\nlr = 0.2\nmomentum = 0.5\n[model]\nhidden = 12\nheads = 2\n")
    (tmp_path / "b.toml").write_text("[optim]\nmomentum = 0.6\n[task]\nbatch = 5\n")
    pairs = ("--set", "task.batch=6", "run.seed=3", "--set", "run.keep=4")
    found = cli("show", "copy", "--config", "a.toml", "--config", "b.toml", *pairs, "--seed", "9", "--momentum=0.9")
    lines = dict(re.findall(r"^(\w+) = (.*)$", found.out, re.MULTILINE))
    assert lines["hidden"] == "12  # a.toml"
    assert lines["lr"] == "0.2  # a.toml"
    assert lines["momentum"] == "0.9  # flag"  # also the recipe's: but the files had said otherwise
    assert "\nbatch = 6  # --set\n" in found.out
    assert lines["keep"] == "4  # --set"
    assert lines["seed"] == "9  # flag"
    assert cli("show", "copy", "--config", "a.toml", "b.toml", *pairs, "--seed", "9", "--momentum=0.9") == found


def test_a_recipe_takes_arguments_and_any_spelling(cli):
    assert "hidden = 240  # recipe memorise\n" in cli("show", "memorise", "--size", "tiny").out
    assert "hidden = 1600" in cli("show", "memorise").out
    assert cli("show", "memorise", "--size", "huge").code == 2
    assert cli("show", "repeat-copy") == cli("show", "repeat_copy")
    assert re.search(r"--size .*tiny", cli("train", "memorise", "--help").out)


def test_another_gradient_has_its_own_optimizer_but_for_what_was_given(cli):
    lines = dict(re.findall(r"^(\w+) = (.*)$", cli("show", "copy", "--gradient", "backprop").out, re.MULTILINE))
    assert (lines["lr"], lines["clip"]) == ("0.003  # recipe copy", "1.0  # recipe copy")
    assert "betas" in lines
    pairs = ("--set", "gradient.kind=backprop", "optim.lr=0.2")
    mixed = cli("show", "copy", *pairs, "--optimizer", "sgd").out
    assert "lr = 0.2  # --set\n" in mixed
    assert "momentum = 0.9" in mixed


def test_options_come_with_their_kind(cli):
    assert cli("show", "copy", "--cell", "gru").code == 0
    assert "--heads=2 is for model lstm or dnc" in cli("show", "copy", "--cell", "gru", "--heads", "2").error
    for recipe in ("text", "arrays", "ptb"):
        assert 'path = "none"' in cli("show", recipe).out
    assert "needs --path" in cli("train", "text").error


def test_what_is_resumed_has_its_weights(cli, run):
    assert "--init" in cli(*TRAIN, "--run-dir", run, "--resume", "--init", run).error


def test_none_is_written_as_the_help_writes_it(cli):
    for flags in (("--epsilon", "none"), ("--epsilon", "None"), ("--set", "gradient.epsilon=none")):
        assert 'epsilon = "none"' in cli("show", "copy", *flags).out


def test_the_config_of_a_run_repeats_it(cli, run, tmp_path):
    assert cli("train", "--config", "run/config.toml", "--run-dir", "again").code == 0
    assert weights_of(tmp_path / "again") == weights_of(run)
    assert (tmp_path / "again" / "journal").read_bytes() == (run / "journal").read_bytes()
    assert (tmp_path / "again" / "config.toml").read_text() == (run / "config.toml").read_text()
    assert cli("train", "copy", "--config", "run/config.toml", "--run-dir", "other", "--seed", "8").code == 0
    assert weights_of(tmp_path / "other") != weights_of(run)


# Folders


def test_runs_are_found_by_path_and_by_name(cli, tmp_path):
    assert cli(*TRAIN, "--run-dir", "runs/x", "--steps", 3).code == 0
    assert "after 3 steps" in cli("eval", "x").out
    assert cli(*TRAIN, "--run-dir", "x", "--steps", 2).code == 0
    assert "after 2 steps" in cli("eval", "x").out
    assert "after 3 steps" in cli("eval", "runs/x").out
    assert cli("replay", "runs/x", "--checksum").out.splitlines()[-1] == weights_of(tmp_path / "runs/x")


def test_without_run_dir_a_new_name_is_made(cli, tmp_path):
    odd = ("--config", "odd.toml")
    (tmp_path / "odd.toml").write_text('recipe = "../../a\\tb/c"\n')
    for _ in range(2):
        assert cli(*TRAIN, *odd).code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert all((path / "config.toml").is_file() for path in (tmp_path / "runs").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "odd.toml"}


def test_runs_lists_and_json(cli, run, tmp_path):
    odd = tmp_path / "a[b]" / "[" / "]"  # markup, if a name were taken for such
    assert cli(*TRAIN, "--run-dir", odd, "--steps", 2).code == 0
    (run / "status.json").write_text('{"state": "running", "pid": 1, "started": "x", "host": "elsewhere", "steps": 9}')
    found = cli("runs", ".")
    assert (found.code, found.err) == (0, "")
    header, *lines = (line.split() for line in found.out.splitlines())
    assert header[:4] == ["run", "state", "step", "loss"]
    table = {line[0]: line[1:] for line in lines}
    assert table["run"][:2] == ["dead", "4/9"]
    assert table["a[b]/[/]"][:2] == ["done", "2/2"]
    rows = {row["name"]: row for row in json.loads(cli("runs", ".", "--json").out)}
    assert set(rows) == {"run", "a[b]/[/]"}
    done = rows["a[b]/[/]"]
    losses = [row["loss"] for row in read_metrics(odd)]
    assert (done["state"], done["step"], done["steps"]) == ("done", 2, 2)
    assert (done["loss"], done["best"]) == (losses[-1], min(losses))
    assert done["peak_bytes"] > 10**7
    assert done["seconds"] > 0
    assert done["seconds_left"] is None
    assert rows["run"]["state"] == "dead"
    assert json.loads(cli("runs", odd, "--json").out)[0]["name"] == "]"
    Path("empty").mkdir()
    assert "no runs here yet" in cli("runs", "empty").out
    assert cli("runs", "empty", "--json").out == "[]\n"


def test_runs_shows_what_it_can_of_damaged_records(cli, run):
    (run / "metrics.jsonl").write_bytes(
        b'{"step": 0, "loss": "x", "seconds": "y", "valid_loss": []}\n{"step": 1, "loss": 2.0}\n\xff\xfe {"step": 2'
    )
    for status in ('{"state": ["x"], "steps": "y"}', "[1]", '{"state": "running", "steps": {}}', "\x00"):
        (run / "status.json").write_text(status)
        table, listed = cli("runs", "."), cli("runs", ".", "--json")
        assert (table.code, table.err) == (listed.code, listed.err) == (0, "")
        assert json.loads(listed.out)[0]["loss"] == 2.0


def test_runs_never_wraps_a_name(cli, run, tmp_path, monkeypatch):
    name = tmp_path / "a-run-whose-name-says-what-it-is-1a2b"
    run.rename(name)
    left_out = []
    order = [name for name in DISPENSABLE if name != "to go"]
    for width in (120, 70, 60, 50, 20):
        monkeypatch.setenv("COLUMNS", str(width))
        header, line = cli("runs", ".").out.splitlines()
        assert "to go" not in header  # it is empty: nothing is running
        missing = [column for column in order if column not in header]
        assert missing == order[: len(missing)]
        assert line.split()[:3] == [name.name, "done", "4/4"]
        assert width == 20 or len(line) <= width
        left_out.append(len(missing))
    assert left_out[0] == 0 < left_out[2] < left_out[-1] == len(order)
    assert left_out == sorted(left_out)


def test_what_differs_is_shown_whole(cli, run, monkeypatch):
    """On a pipe on one line; on a terminal wrapped, in its column."""
    other = ("--lr", "0.01", "--cell", "gru", "--probes", 5, "--epsilon", 0.03, "--schedule", "linear")
    assert cli(*TRAIN, *other, "--run-dir", "other").code == 0
    differs = ["cell=gru", "lr=0.01", "probes=5", "epsilon=0.03", "schedule=linear"]
    monkeypatch.delenv("COLUMNS", raising=False)
    header, *lines = cli("runs", ".").out.splitlines()
    assert len(lines) == 2
    line = next(line for line in lines if line.startswith("other"))
    assert [line.split().count(pair) for pair in differs] == [1] * 5
    assert not any(line.endswith(" ") for line in (header, *lines))
    assert {"memory", "best", "time"} <= set(header.split())
    for width in (80, 100):
        monkeypatch.setenv("COLUMNS", str(width))
        out = cli("runs", ".").out
        assert "…" not in out
        assert "held-out" in out
        assert all(out.split().count(pair) == 1 for pair in differs)
        assert max(map(len, out.splitlines())) <= width


def test_a_run_is_compared_with_others_of_its_recipe_first(cli, tmp_path, monkeypatch):
    copies = [RECIPES["copy"]().replace(optim={"lr": lr}) for lr in (0.5, 0.25, 0.25)]
    timed = RECIPES["demo_backprop"]().replace(run={"steps": 10**6, "max_seconds": 32.82535})
    texts = [RECIPES["text"]().replace(task={"path": f"{'deep/' * 20}{i}.txt"}) for i in (1, 2)]
    configs = dict(zip(("a", "b", "c", "timed", "text1", "text2"), (*copies, timed, *texts)))
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(toml.dumps(config))
        (tmp_path / name / "status.json").write_text(f'{{"state": "done", "steps": {config.run.steps}}}')
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1703, "loss": 2.0}\n')
    rows = {row["name"]: list(row["differs"].items()) for row in json.loads(cli("runs", ".", "--json").out)}
    assert [rows[name][0] for name in "abc"] == [("lr", 0.5), ("lr", 0.25), ("lr", 0.25)]
    assert all(dict(rows[name])["recipe"] == "copy" for name in "abc")
    line = next(line for line in cli("runs", ".").out.splitlines() if line.startswith("timed"))
    assert line.split()[:3] == ["timed", "done", "1704"]
    assert "max-seconds=33" in line.split()
    monkeypatch.setenv("COLUMNS", "80")
    words = cli("runs", ".").out.split()
    assert [words.count(pair) for pair in ("lr=0.25", "lr=0.5")] == [2, 1]
    paths = [word for word in words if word.startswith("path=…")]
    assert sorted(path[-6:] for path in paths) == ["/1.txt", "/2.txt"]


def test_unrelated_runs_fit_a_terminal(cli, tmp_path, monkeypatch):
    """What they differ in is cut after three lines, the rarest first; losses have units, and objects their classes."""
    own = Config(
        recipe="object", task=ObjectTask(name="me.Mine"), model=ObjectModel(name="me.Net"),
        gradient=RECIPES["text"]().gradient, optim=ObjectOptimizer(name="torch.optim.adamw.AdamW"),
    )  # fmt: skip
    names = ["copy", "smoke", "text", "arrays", "parallel", "cpu_bytes", "cdrge_gpt_bytes", "cdrge_lstm_owt"]
    for name, config in {"own": own, **{name: RECIPES[name]() for name in names}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(toml.dumps(config))
        (tmp_path / name / "status.json").write_text('{"state": "done"}')
        row = {"step": 0, "loss": 2.0, "valid_loss": 1.25}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    rows = {row["name"]: row for row in json.loads(cli("runs", ".", "--json").out)}
    assert (rows["own"]["unit"], rows["arrays"]["unit"], rows["text"]["unit"]) == ("", "mse", "nats")
    differs = rows["own"]["differs"]
    assert [differs[flag] for flag in ("recipe", "cell", "optimizer")] == ["Mine", "Net", "AdamW"]
    values = [row["differs"] for row in rows.values()]
    for differs in values:
        shares = [sum(flag in other and other[flag] == differs[flag] for other in values) for flag in differs]
        assert shares == sorted(shares)
        assert all(any(other.get(flag, value) != value for other in values) for flag, value in differs.items())
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        header, *lines = cli("runs", ".").out.splitlines()
        assert "held-out" in header
        assert max(map(len, [header, *lines])) <= width
        assert len(lines) <= 3 * len(rows)
        assert sum("1.25" in line for line in lines) == len(rows)
        assert any(line.rstrip().endswith("…") for line in lines)


@pytest.mark.parametrize("width", [60, 80])
def test_what_a_run_says_is_wrapped_at_words(cli, tmp_path, monkeypatch, width):
    write_text(tmp_path / "a text with a name.txt")
    monkeypatch.setenv("COLUMNS", str(width))
    text = ("train", "text", "--path", "a text with a name.txt", *TINY[2:], "--length", 9)
    trained, scored = cli(*text, "--run-dir", "run").out, cli("eval", "run").out
    monkeypatch.delenv("COLUMNS")
    plain, about = cli("eval", "run").out, Text("a text with a name.txt", length=9).describe()
    assert max(map(len, (trained + scored).splitlines())) <= width < min(len(about), max(map(len, plain.splitlines())))
    assert about in " ".join(trained.split())
    assert scored.split() == plain.split()


def test_a_command_to_copy_is_not_wrapped(monkeypatch):
    from reroll.cli.lines import wrapped

    monkeypatch.setenv("COLUMNS", "40")
    command = "reroll train --run-dir runs/a-folder-with-a-name --resume"
    lines = wrapped(f"stopped: SIGTERM after 3 steps. Everything is saved. To resume: {command}").splitlines()
    assert lines[-1].strip() == command
    assert max(map(len, lines[:-1])) <= 40
    assert wrapped("To try: reroll demo") == "To try: reroll demo"


@pytest.mark.parametrize("width", [70, 80])
@pytest.mark.parametrize(
    "command", [("recipes",), ("doctor",), ("reproduce", "--list"), ("reproduce", "elk-fig5", "--list")]
)
def test_long_lines_are_wrapped_with_an_indent(cli, monkeypatch, command, width):
    monkeypatch.delenv("COLUMNS", raising=False)
    plain = cli(*command).out
    monkeypatch.setenv("COLUMNS", str(width))
    wrapped = cli(*command).out
    assert max(map(len, wrapped.splitlines())) <= width
    if command == ("doctor",):  # how busy the machine is may have changed
        return
    assert wrapped != plain
    assert wrapped.split() == plain.split()


def test_every_recipe_says_what_it_is(cli):
    lines = [recipe.__doc__.strip().splitlines()[0] for recipe in RECIPES.values()]
    assert len(set(lines)) == len(lines)
    assert "07+95|102$" in RECIPES["add"].__doc__


def test_the_line_of_a_step_shows_the_rollouts(cli):
    Path("text.txt").write_text("A few words that come again. " * 40)
    small = ("--path", "text.txt", "--length", 20, "--hidden", 4, "--batch", 2, "--steps", 1, "--run-dir", "run")
    trained = cli("train", "parallel", *small)
    assert re.search(r"^step 1/1 .*  \d+ iterations  ", trained.out, re.MULTILINE)
    assert "fell back" not in trained.out
    least = ("--set", "model.rollout.iterations=1")
    again = cli("train", "--config", "run/config.toml", *least, "--run-dir", "other")
    assert re.search(r"1 iterations  2 sequences fell back to the loop  ", again.out)
    assert again.out.count("step 1: Some sequences did not converge") == 1
    scored = cli("eval", "other")
    assert scored.code == 0
    assert re.search(r"^\d+ evaluations of a sequence: Some sequences did not converge", scored.out, re.MULTILINE)
    assert "did not converge" not in cli("eval", "run").out


def test_a_tolerance_too_loose_for_the_probes_is_said_once(cli):
    loose = ("--set", "model.rollout.rtol=0.9", "--set", "gradient.epsilon=0.001", "--lr", "0.001")
    Path("text.txt").write_text("A few words that come again. " * 40)
    small = ("--path", "text.txt", "--length", 40, "--batch", 2, "--probes", 4, "--steps", 3)
    trained = cli("train", "parallel_probes", *small, *loose)
    assert trained.code == 0
    assert trained.out.count("What the rollout's solver leaves over") == 1


def test_a_time_limit_that_is_used_up_is_refused_before_anything_is_lost(cli, run):
    shutil.rmtree(checkpoint.all_of(run / "checkpoints")[-1])  # as if killed: the last row has no checkpoint
    (run / "status.json").unlink()
    before = contents(run)
    found = cli("train", "--run-dir", "run", "--resume", "--max-seconds", 1e-6)
    assert found.code == 2
    assert re.search(r"--max-seconds=1e-06 counts the whole run, which has used \S+ s already", found.error)
    assert contents(run) == before
    for limit in (("--steps", 3), ("--target-loss", 100)):
        found = cli("train", "--run-dir", "run", "--resume", *limit)
        assert found.code == 2
        assert "would end at its checkpoint of step 3" in found.error
        assert contents(run) == before
    assert cli("train", "--run-dir", "run", "--resume", "--max-seconds", 1000).code == 0


def test_how_to_continue_names_the_seconds_that_are_used(cli, tmp_path):
    assert "the time limit" in cli(*TRAIN, "--run-dir", "run", "--max-seconds", 1e-6).out
    used = list(read_metrics(tmp_path / "run"))[-1]["total_seconds"]
    again = cli("train", "--run-dir", "run", "--resume").out
    assert f"--max-seconds above {math.ceil(used)} (it counts the whole run, which has used {used:.1f} s)" in again


def test_a_flag_that_may_not_change_on_resuming_is_named_as_it_was_typed(cli, run):
    assert (
        "--threads=2, but the run to resume has 1" in cli("train", "--run-dir", run, "--resume", "--threads", 2).error
    )


def test_an_interrupt_says_what_remains(cli, run, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("reroll.train.loop.train", interrupted)
    assert cli("train", "copy", "--run-dir", "new") == (1, "", "Interrupted. Nothing was trained.\n")
    found = cli("train", "--run-dir", "run", "--resume", "--steps", 6)
    assert (found.code, "to resume: reroll train --run-dir run --resume" in found.err) == (1, True)
    shutil.rmtree(run / "checkpoints")
    assert "No checkpoint was written yet: delete run, or start it again" in cli(*TRAIN, "--run-dir", "run").err
    (run / "metrics.jsonl").unlink()
    assert "Nothing was trained: delete run" in cli(*TRAIN, "--run-dir", "run").err


def test_a_run_of_a_newer_version_is_named_as_such(cli, run):
    (run / "config.toml").write_text((run / "config.toml").read_text() + "novelty = 1\n")
    assert "novelty" in cli("eval", "run").error
    assert f"If a newer reroll than this one ({reroll.__version__})" in cli("eval", "run").error


def test_losses_have_units_and_stand_beside_what_needs_no_training(cli, tmp_path):
    inputs = np.random.default_rng(0).normal(size=(40, 9, 2))
    np.savez("classes.npz", inputs=inputs, targets=(np.arange(40) % 4 == 0).astype(int))
    np.savez("values.npz", inputs=inputs, targets=inputs.sum((1, 2)))
    flags = (*TINY[2:], "--length", 9)
    found = cli("train", "arrays", "--path", "values.npz", *flags, "--run-dir", "values")
    assert re.search(r"^step 4/4  squared error \S+  held-out \S+  \S+ s/step$", found.out, re.MULTILINE)
    assert re.search(r"^held-out loss \S+ \(mean squared error, of standardised values\)$", found.out, re.MULTILINE)
    assert re.search(r"^held-out loss without training: mean of the targets \S+$", found.out, re.MULTILINE)
    assert "mean over 4 series" in cli("eval", "values").out
    assert "predicts 1 target value for every series, 4 series (10 %) held out" in found.out
    assert re.search(r"^in \d+ s of training: [\d,]+ rows/s, ", found.out, re.MULTILINE)
    found = cli("train", "arrays", "--path", "classes.npz", *flags, "--run-dir", "classes")
    assert re.search(r"^step 1/4  loss \S+ nats  ", found.out, re.MULTILINE)
    assert re.search(r"^held-out loss \S+ nats  bits ", found.out, re.MULTILINE)
    # One class a series has no symbols of which all could be right.
    assert "exact" not in found.out + cli("eval", "classes").out
    assert re.search(r"without training: class frequencies \(accuracy \S+\) \S+$", found.out, re.MULTILINE)
    assert "reroll forecast values" in cli("sample", "values").error


def test_a_text_stands_beside_counting_and_gzip(cli, tmp_path):
    found = cli("train", "text", "--path", write_text(tmp_path / "a.txt"), *TINY[2:], "--length", 9, "--run-dir", "run")
    reached = Text(str(tmp_path / "a.txt"), length=9).baselines()
    rules = "  ".join(f"{rule} {getattr(reached, rule):.4g}" for rule in ("unigram", "bigram", "gzip"))
    line = f"bits per symbol without training: {rules}"
    assert f"\nheld-out {line}\n" in found.out
    assert line in cli("eval", "run").out
    again = ("train", "--run-dir", "run", "--resume")
    assert f"\nheld-out {line}\n" in cli(*again).out  # of a run that is finished nothing else is read
    (tmp_path / "a.txt").unlink()
    assert "held-out loss" in (without := cli(*again)).out
    assert (without.code, "without training" in without.out) == (0, False)


def test_a_resumed_run_takes_no_step_back(cli, run):
    before = contents(run)
    found = cli("train", "--run-dir", "run", "--resume", "--steps", 2)
    assert found.code == 2
    assert "--steps=2: run has already taken 4 steps" in found.error
    assert contents(run) == before


def test_resume(cli, tmp_path):
    resumed = (*TRAIN, "--run-dir", "run", "--resume")
    first = cli(*resumed)
    assert first.code == 0
    assert "Nothing to resume in run: starting a new run." in first.out
    whole, before = weights_of(tmp_path / "run"), contents(tmp_path / "run")
    again = cli(*resumed)
    assert again.code == 0
    assert "is finished" in again.out
    assert cli("train", "--run-dir", "run", "--resume").code == 0
    assert cli("train", "copy", "--run-dir", "run", "--resume").code == 0  # the recipe alone changes nothing
    assert contents(tmp_path / "run") == before
    Path("empty").mkdir()
    assert cli(*TRAIN, "--run-dir", "empty", "--resume").code == 0
    assert weights_of(tmp_path / "empty") == whole
    refused = cli(*TRAIN, "--run-dir", "run")
    assert refused.code == 2
    assert "--run-dir run is not empty" in refused.error
    assert "--resume" in refused.error
    assert contents(tmp_path / "run") == before
    assert cli("train", "copy", "--run-dir", "run", "--resume", "--steps", 6).code == 0
    assert checkpoint.newest(tmp_path / "run" / "checkpoints").step == 6


def test_resume_refuses_another_run(cli, run):
    before = contents(run)
    other = cli("train", "sort", "--run-dir", "run", "--resume")
    assert (other.code, '"copy", not of "sort"' in other.error) == (2, True)
    for flag, value, said in (
        ("--lr", 0.3, "--lr=0.3"),
        ("--seed", 4, "--seed=4"),
        ("--hidden", 16, "--hidden=16"),
    ):
        found = cli("train", "copy", "--run-dir", "run", "--resume", flag, value)
        assert found.code == 2
        assert said in found.error
    Path("other").mkdir()
    Path("other/notes.txt").write_text("mine")
    foreign = cli(*TRAIN, "--run-dir", "other", "--resume")
    assert (foreign.code, "has no run in it" in foreign.error) == (2, True)
    assert contents(run) == before


def test_doctor(cli):
    found = cli("doctor")
    assert (found.code, found.err) == (0, "")
    lines = {line[6:20].strip(): line for line in found.out.splitlines() if line.startswith(("ok", "note"))}
    assert lines["torch"] == f"ok    {'torch':<14} {torch.__version__}"
    assert "same bits as the reference" in lines["cpu kernels"]
    assert {"python", "GPU", "threads", "text cache", "disk", "extra plot"} <= set(lines)


def test_export_writes_over_its_own_config_and_no_other(cli, run, tmp_path):
    assert cli("export", "run", "--to", "x.safetensors").code == 0
    assert cli("export", "run", "--to", "x.safetensors").code == 0
    mine = "recipe = 'mine'\n"
    (tmp_path / "x.toml").write_text(mine)
    (tmp_path / "y.toml").write_text(mine)
    for name in ("x", "y"):
        for command in (("export", "run", "--to"), ("replay", "run", "--out")):
            assert f"{name}.toml" in cli(*command, f"{name}.safetensors").error
        assert (tmp_path / f"{name}.toml").read_text() == mine
    assert not (tmp_path / "y.safetensors").exists()


def test_what_differs_between_runs_is_shown(cli, run):
    assert cli(*TRAIN, "--lr", "0.01", "--cell", "gru", "--run-dir", "other").code == 0
    rows = {row["name"]: row["differs"] for row in json.loads(cli("runs", ".", "--json").out)}
    assert (rows["other"]["cell"], rows["other"]["lr"]) == ("gru", 0.01)
    assert rows["run"].keys() >= {"cell", "lr"}
    assert not {"batch", "recipe", "seed"} & rows["run"].keys()
    assert "cell=gru" in cli("runs", ".").out


def test_names_that_only_the_estimator_knows_are_refused_by_show(cli):
    assert "noise='pink'" in cli("show", "copy", "--noise", "pink").error.replace('"', "'")
    assert 'difference="sideways"' in cli("show", "copy", "--set", "gradient.difference=sideways").error


def test_a_series_is_continued_in_its_own_units(cli, tmp_path):
    rows = [f"{20 + 3 * np.sin(t / 4):.4f};{5 - t % 7}" for t in range(200)]
    (tmp_path / "power.csv").write_text("\n".join(["load;day", *rows]))
    run = ("--length", 20, "--batch", 4, "--hidden", 6, "--steps", 3, "--gradient", "backprop", "--run-dir", "run")
    found = cli("train", "arrays", "--path", "power.csv", *run)
    assert "Held-out loss without training: persistence" in found.out
    assert "loss without training: persistence" in cli("eval", "run").out
    lines = cli("forecast", "run", "--steps", 5).out.splitlines()
    assert lines[0] == "step,load,day"
    assert len(lines) == 6
    model, task = open_model("run"), Arrays("power.csv", length=20)
    values, state = torch.from_numpy(task.history(20)[0])[None], None
    for line in lines[1:]:  # the first row after all twenty, the others after the row that was predicted
        with torch.no_grad():
            outputs, state = model.model.advance(values, state)
        values = outputs[:, -1:]
        expected = values[0, 0].double().numpy() * task.std + task.mean
        assert [float(cell) for cell in line.split(",")[1:]] == pytest.approx(expected.tolist(), rel=1e-5)
    assert "5 rows of step, load, day" in cli("forecast", "run", "--steps", 5, "--to", "next.csv").out
    assert Path("next.csv").read_text().splitlines() == lines
    Path("far.csv").write_text("load;day\n" + "".join(f"{21 + t % 2};{1e6 + t % 7}\n" for t in range(300)))
    said = "Most values of day (", "over 10 standard deviations"
    assert all(words in cli("forecast", "run", "--path", "far.csv").err for words in said)
    assert all(words in cli("eval", "run", "--path", "far.csv").out for words in said)
    assert cli("forecast", "run", "--path", "power.csv").err == ""
    np.save("two.npy", np.ones((2, 30, 2)))
    assert len(cli("forecast", "run", "--path", "two.npy", "--steps", 3).out.splitlines()) == 7
    assert "steps=0" in cli("forecast", "run", "--steps", 0).error
    torch.nn.init.constant_(next(model.model.parameters()), math.nan)
    export(model, Path("nan.safetensors"))
    assert "is not finite: the model has diverged" in cli("forecast", "nan.safetensors").error
    assert "cannot be written" in cli("forecast", "run", "--to", "no/such/folder.csv").error


def test_what_does_not_predict_the_next_row_is_not_continued(cli, smoke):
    error = cli("forecast", smoke).error
    assert "does not predict the next row" in error
    assert f"reroll sample {smoke}" in error


def test_a_forecast_shows_what_a_series_varies_by_and_whose_columns_it_has(cli, tmp_path):
    rows = [(12345678 + np.sin(t / 7), 1e-3 * np.cos(t / 5)) for t in range(120)]

    def write(name, header, columns):
        Path(name).write_text(header + "\n" + "\n".join(",".join(f"{row[c]:.17g}" for c in columns) for row in rows))

    write("ok.csv", "a,b", (0, 1))
    write("swapped.csv", "b,a", (1, 0))
    write("other.csv", "x,y", (0, 1))
    run = ("--length", 20, "--batch", 4, "--hidden", 6, "--steps", 3, "--gradient", "backprop", "--run-dir", "run")
    assert cli("train", "arrays", "--path", "ok.csv", *run).code == 0
    found = cli("forecast", "run", "--steps", 3)
    values = np.array([[float(cell) for cell in line.split(",")[1:]] for line in found.out.splitlines()[1:]])
    assert len(set(values[:, 0])) == 3
    assert (values[:, 0] % 1 != 0).all()
    assert np.abs(values[:, 1]).max() < 0.01
    assert cli("forecast", "run", "--steps", 3, "--path", "swapped.csv").out == found.out
    assert "the columns x, y; the model was trained on a, b" in cli("forecast", "run", "--path", "other.csv").error
    Path("nan.csv").write_text("a,b\n1,1\n" + ",\n" * 60)
    assert "every row lacks a value" in cli("eval", "run", "--path", "nan.csv").error
    Path("one.csv").write_text("a,b\n1,1\n")
    assert "needs two rows" in cli("eval", "run", "--path", "one.csv").error
    for recipe, path in (("arrays", "~nosuch/x.csv"), ("text", "~nosuch/x")):
        assert "does not exist" in cli("train", recipe, "--path", path).error


def test_a_field_may_be_set_of_the_kind_that_a_flag_asks_for(cli, tmp_path):
    sizes = ("model.layers=1", "model.heads=2", "model.width=16", "run.threads=1")
    flags = ("--gradient", "backprop", "--optimizer", "muon", "--steps", 2, "--length", 3, "--batch", 2)
    assert (
        cli("train", "copy", "--cell", "gpt", *flags, "--run-dir", "run", "--set", *sizes, "optim.ns_steps=4").code == 0
    )
    config = read_config(tmp_path / "run")
    assert (config.model.kind, config.model.width, config.optim.ns_steps) == ("gpt", 16, 4)
    assert "rtol = 0.1" in cli("show", "copy", "--rollout", "deer", "--set", "model.rollout.rtol=0.1").out


def test_shards_of_a_text_are_made_and_trained_on(cli, tmp_path):
    Path("my notes.txt").write_text("to be or not to be " * 400)
    found = cli("data", "prepare", "tokens", "--path", "my notes.txt", "--to", "shards", "--shard", 3000)
    assert "my-notes_train_000001.bin: 3,000 tokens of 2,999 bytes" in found.out
    assert "skipped" not in found.out
    for number, names in enumerate((["a.txt", "b.txt"], ["a.train.jsonl", "a.valid.jsonl"])):
        (tmp_path / f"{number}").mkdir()
        for name in names:
            (tmp_path / f"{number}" / name).write_text('{"text": "one"}\n\n\n' if number else "one")
        (tmp_path / f"{number}" / "empty.txt").touch()
    for number, empty in enumerate((1, 4)):
        path = tmp_path / f"{number}"
        prepared = cli("data", "prepare", "tokens", "--path", path, "--to", f"shards-{number}")
        assert f"skipped, having no text: {empty}\n" in prepared.out
    advice = found.out.splitlines()[-1].partition("reroll ")[2].split()
    small = ("model.width=16", "model.layers=1", "run.threads=1")
    run = cli(*advice, *small, "--batch", 2, "--length", 16, "--steps", 3, "--run-dir", "run")
    assert run.code == 0
    assert "to train" in run.out
    assert len(cli("sample", "run", "--prompt", "to", "--length", 5).out) >= 7
    shutil.rmtree("shards")
    cli("data", "prepare", "tokens", "--path", "my notes.txt", "--to", "shards", "--tokenizer", "char")
    for again in (("eval", "run"), (*advice, *small, "--batch", 2, "--length", 16, "--resume", "--run-dir", "run")):
        refused = cli(*again, *(("--steps", 4) if again[0] == "train" else ()))
        assert "shards was encoded by another tokenizer (char of 8 symbols) than when the run was" in refused.error
        assert "(byte of 256 symbols)" in refused.error
    assert "reroll data prepare fineweb" in cli("train", "fineweb-124m", "--device", "cpu", "--run-dir", "other").error


def test_a_run_of_a_gpu_is_resumed_without_one(cli, run, monkeypatch):
    """What began on a GPU may go on, and a finished one is said to be; a new one is refused."""
    monkeypatch.setitem(INSTEAD, "copy", "cpu_bytes")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "is finished" in cli("train", "--run-dir", "run", "--resume").out
    for folder in ("--run-dir", "new", "--resume"), ("--run-dir", "new"):
        found = cli(*TRAIN, *folder)
        assert found.code == 2
        assert "copy needs a GPU" in found.error


def test_the_last_lines_are_printed_before_the_other_processes_leave(cli, monkeypatch):
    """They end with 1 after a missed target, and the process that has the terminal is ended soon after."""
    said = []

    class Beside(Mesh):
        def leave(self):
            said.append("left")

    monkeypatch.setattr(Processes, "join", lambda device: Beside())
    monkeypatch.setattr(Console, "closing", lambda self, summary, path: said.append("closing") or "")
    assert cli(*TRAIN, "--run-dir", "run", "--target-loss", 1e-9).code == 1
    assert said == ["closing", "left"]
