"""Every recipe, shrunk, learns: held-out loss and training loss end clearly below where they began."""

import random

import numpy as np
import pytest
import torch

from reroll.data.prepare import encode
from reroll.data.tokens import write_shard
from reroll.models import Interface
from reroll.recipes import RECIPES
from reroll.train.config import resolve
from reroll.train.evaluate import evaluate
from reroll.train.load import build_model
from reroll.train.loop import train
from reroll.train.records import read_metrics

GENERATED = ("copy", "repeat_copy", "reverse", "sort", "add", "parity", "recall")
STEPS = {"memorise": 40, "smoke": 80} | dict.fromkeys(GENERATED, 250)
"""Steps of a shrunk run; 60 for the others. With a rate that falls, fewer steps are also a lower rate."""
PROBES = {"parallel_probes": 12}  # each of them iterates


def write_text(folder):
    words = random.Random(0).choices(["ab", "bca", "cabb", "d e", "\n"], k=700)
    (folder / "my.txt").write_text("".join(words))
    return folder / "my.txt"


def write_ptb(folder):
    generator, words = random.Random(0), ["the", "cat", "dog", "sat", "ran", "<unk>", "N"]
    for split, lines in (("train", 400), ("valid", 60), ("test", 60)):
        text = [" ".join(generator.choices(words, [20, 6, 4, 2, 1, 1, 1], k=6)) + " \n" for _ in range(lines)]
        (folder / f"ptb.{split}.txt").write_text("".join(text))
    return folder


def write_arrays(folder):
    time = np.arange(400)
    np.save(folder / "series.npy", np.stack([np.sin(time / 5), np.cos(time / 7)], -1)[None].astype(np.float32))
    return folder / "series.npy"


def write_shards(folder):
    words = random.Random(0).choices([b"ab", b"bca", b"cabb", b"d e", b"\n"], k=9000)
    write_shard(folder / "x_train_000001.bin", list(b"".join(words)))
    write_shard(folder / "x_val_000000.bin", list(b"".join(words[:400])))
    return folder


def prepare_stdlib(folder):
    encode("stdlib:prose", folder)
    return folder


FILES = {
    "text": write_text,
    "ptb": write_ptb,
    "arrays": write_arrays,
    "fineweb_124m": write_shards,
    "fineweb_1b5": write_shards,
    "cpu_bytes": write_shards,
    "cpu_bytes_small": write_shards,
    "cdrge_gpt_bytes": write_shards,
    "cdrge_lstm_owt": prepare_stdlib,
}
SHRUNK = {"gpt": {"layers": 2, "heads": 2, "width": 16}}


def shrunk(name, folder):
    """A recipe with its task, method, optimizer and schedule as they are, and a model of a few hundred weights."""
    config = RECIPES[name]()
    task = {"batch": min(config.task.batch, 8), "length": min(config.task.length, 16)}
    if name in FILES:
        folder.mkdir()
        task["path"] = str(FILES[name](folder))
    if config.task.kind == "tokens":
        task |= {"valid_tokens": None, "vocab": 256}
    steps = STEPS.get(name, 60)
    return config.replace(
        task=task,
        model=SHRUNK.get(config.model.kind)
        or {"hidden": 16, "embed": 8} | ({"heads": 2} if getattr(config.model, "heads", 1) > 1 else {}),
        gradient={"probes": PROBES.get(name, 32)} if config.gradient.seeded else {},
        run={"steps": steps, "eval_every": steps, "threads": 1, "target_loss": None, "target_valid": None},
    )


def untrained(config):
    """The held-out loss of the weights a run begins with."""
    config = resolve(config)
    task = config.task.build(config.run.seed)
    model = build_model(config.model, Interface.of(task), config.run.seed)
    return evaluate(model, task, task.splits[0])["loss"]


@pytest.mark.parametrize("name", RECIPES)
def test_shrunk_it_improves(name, tmp_path):
    torch.set_num_threads(1)
    config = shrunk(name, tmp_path / "data")
    before = untrained(config)
    summary = train(config, tmp_path / "run")
    rows = list(read_metrics(tmp_path / "run"))
    assert summary["state"] == "done"
    assert len(rows) == config.run.steps
    assert summary["loss_fast"] < 0.93 * rows[0]["loss"]
    assert summary["valid_loss"] < 0.93 * before
    assert not rows[-1].get("drift")


@pytest.mark.parametrize(
    "recipe, argument", [*(("fineweb_124m", record) for record in "1234567"), ("fineweb_1b5", "adamw")]
)
def test_every_record_of_the_speedrun_trains(recipe, argument, tmp_path):
    config = RECIPES[recipe](argument)
    model = SHRUNK["gpt"] | {"vocab": 300}
    (tmp_path / "data").mkdir()
    path = str(write_shards(tmp_path / "data"))
    config = config.replace(
        task={"path": path, "length": 16, "batch": 4, "valid_tokens": 600, "vocab": 256},
        model=model,
        optim={"schedule": {"warmup": 2}},
        run={"steps": 12, "threads": 1, "target_valid": None},
    )
    summary = train(config, tmp_path / "run")
    rows = list(read_metrics(tmp_path / "run"))
    assert summary["state"] == "done"
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_record_8_is_the_published_one():
    config = resolve(RECIPES["fineweb_124m"]())
    assert config.run.steps * config.task.batch * config.task.length == 2_400_190_464
    assert [config.optim.schedule(step, 4578) for step in (0, 3269, 3270)] == [1, 1, 1]
    assert config.optim.schedule(4577, 4578) == pytest.approx(1 / 1308)
    assert config.task.valid_tokens == 10_485_760
    with torch.device("meta"):
        model = config.model.build(Interface(50_257, None, 50_257, "every"))
        optimizer = config.optim.build(model, config.optim.lr)
    assert sum(p.numel() for p in model.parameters()) == 162_201_600
    groups = [(g["rule"], len(g["params"]), g["lr"]) for g in optimizer.param_groups]
    assert sorted(groups) == [
        ("adamw", 1, pytest.approx(0.002)), ("adamw", 1, pytest.approx(0.3)), ("muon", 72, pytest.approx(0.02)),
    ]  # fmt: skip


def test_the_scale_up_has_the_weights_of_its_log():
    """52 · 12 · 1536² in the layers, and 50,304 · 1536 in the embedding, which is the head."""
    config = resolve(RECIPES["fineweb_1b5"]())
    assert config.run.steps * config.task.batch * config.task.length == 9_999_482_880
    with torch.device("meta"):
        model = config.model.build(Interface(50_257, None, 50_257, "every"))
    assert sum(p.numel() for p in model.parameters()) == 52 * 12 * 1536**2 + 50_304 * 1536


def test_smoke_as_it_is_reaches_its_target(tmp_path):
    summary = train(RECIPES["smoke"](), tmp_path / "run")
    assert summary["state"] == "done"
    assert summary["loss"] < 0.1
    assert summary["valid_exact"] == 1.0


def test_every_recipe_is_named_as_its_key_and_says_what_it_is():
    for name, recipe in RECIPES.items():
        assert recipe().recipe == name
        assert recipe.__doc__.strip()


@pytest.mark.slow
def test_memorise_as_it_is_reaches_its_target_within_twenty_steps(tmp_path):
    config = RECIPES["memorise"]()
    assert config.run.steps == 20
    assert config.gradient.epsilon is None  # tied: ε = η
    assert train(config, tmp_path / "run")["loss"] < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["copy", "repeat_copy", "recall"])
def test_through_the_whole_schedule_nothing_is_unlearned(name, tmp_path):
    """Fewer weights and probes: the noise of the estimate, about √(weights ÷ probes), is nearly as it is in full."""
    config = RECIPES[name]().replace(model={"hidden": 16, "heads": 2, "embed": 8}, gradient={"probes": 16})
    run = {"threads": 1, "steps": 400, "eval_every": 100}
    summary = train(config.replace(task={"batch": 16}, run=run), tmp_path / "run")
    rows = list(read_metrics(tmp_path / "run"))
    valid = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert summary["state"] == "done"
    assert len(valid) == 4
    assert valid[-1] < 1.1 * min(valid)
    assert valid[-1] < 0.92 * rows[0]["loss"]
