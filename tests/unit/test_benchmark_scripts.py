"""The scripts of benchmarks/ that are about Muon, with few seeds and small matrices."""

import dataclasses
import importlib.util
import math
import re
import statistics
from pathlib import Path

import pytest
from torch import nn

from reroll.data.tokens import write_shard
from reroll.recipes import cpu_bytes
from reroll.train import toml
from reroll.train.config import resolve
from reroll.train.loop import train

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shards(tmp_path):
    for name, count in (("x_train_000001", 9000), ("x_val_000000", 600)):
        write_shard(tmp_path / f"{name}.bin", list(b"abcab c" * count)[:count])
    return str(tmp_path)


def test_the_spread_of_seeds_is_that_of_runs(shards, tmp_path, monkeypatch, capsys):
    seeds = script("seeds")
    arguments = ["seeds", "--path", shards, "--seeds", "3", "--steps", "4"]
    monkeypatch.setattr("sys.argv", arguments)
    assert seeds.main() == 0
    printed = [float(number) for number in re.findall(r"\d\.\d{4}", capsys.readouterr().out)]
    config = seeds.shrunk(4, "jordan", shards)
    runs = [train(config.replace(run={"seed": seed}), tmp_path / f"run-{seed}")["loss"] for seed in range(3)]
    assert printed == pytest.approx([statistics.mean(runs), statistics.stdev(runs), min(runs), max(runs)], abs=1e-4)


@pytest.mark.parametrize("at", [0, 2, 3, 4])
def test_a_seed_with_nan_fails(at, shards, monkeypatch, capsys):
    seeds = script("seeds")
    monkeypatch.setattr("sys.argv", ["seeds", "--path", shards, "--seeds", "2", "--steps", "4"])
    take_step = seeds.take_step

    def poisoned(session):
        def poison():
            if (session.config.run.seed, session.progress.step) == (1, at):
                nn.init.constant_(session.model.head.weight, math.nan)

        poison()
        row = take_step(session)
        poison()
        return row

    monkeypatch.setattr(seeds, "take_step", poisoned)
    assert seeds.main() == 1
    assert "2 seeds × 4 steps" in (said := capsys.readouterr().out)
    assert "1 not finite" in said
    assert ("seed 1: a weight" if at == 4 else f"seed 1: The loss is not finite at step {at + 1}.") in said


def test_every_method_is_timed_and_compared_with_the_exact_result(monkeypatch, capsys):
    muon = script("muon")
    monkeypatch.setattr(muon, "SETS", {"small": [(6, 6), (12, 6), (6, 12)]})
    muon.methods(2, "cpu")
    lines = dict(re.findall(r"^  (.{24})(.*)$", capsys.readouterr().out, flags=re.MULTILINE))
    found = {name.strip(): [float(n) for n in re.findall(r"\d+\.\d+", line)] for name, line in lines.items()}
    assert found.keys() == muon.OPTIONS.keys()
    assert found["jordan"][1:4] == [1.0, 1.0, 1.0]
    assert found["svd"][-2:] == [0.0, 0.0]
    assert all(0 < n < 1 for name, numbers in found.items() for n in numbers[-2:] if name != "svd")


def test_rows_of_the_ablation_have_rates_of_their_own(tmp_path):
    """A tied embedding is the head, and must not get the rate of one that is normalised; the baseline's file agrees."""
    ablation = script("ablation")
    rows = {name: resolve(config) for name, config in ablation.configs().items()}
    first, *_, last = (rows[name] for name in ablation.ADDED)
    assert rows["LSTM"].model.layers == rows["GRU"].model.layers == 1
    for config in rows.values():
        if getattr(config.model, "tied", False):
            assert config.optim.embedding_lr in (None, 0.001)
    assert (first.model.position, first.optim.kind, first.optim.embedding_lr) == ("learned", "adamw", None)
    assert (last.model, last.optim.kind) == (resolve(cpu_bytes()).model, "muon")
    assert dataclasses.replace(last.optim, momentum_warmup=0) == resolve(cpu_bytes()).optim
    file = toml.overlay(cpu_bytes(), toml.load(SCRIPTS / "adamw_gpt2.toml"), "")
    assert (file.model, file.optim.embedding_lr, file.optim.head_lr) == (first.model, None, None)
    runs = [{"row": name, "seed": seed, "loss": 1.0 + seed, "seconds": 2.0} for name in rows for seed in range(3)]
    assert all(f"| {name} | 2.000 ± 1.000 | 2 |" in ablation.table(runs) for name in rows)
