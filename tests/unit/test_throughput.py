"""The benchmark of throughput, at a tiny size: both loops do the same work, and what it writes is what it timed."""

import json
import statistics

import pytest
import torch

from reroll.bench import throughput
from reroll.recipes import cpu_bytes, fineweb_124m
from reroll.train import checkpoint
from reroll.train.loop import train

TINY = {"layers": 1, "heads": 1, "width": 8, "vocab": None}


def tiny(config):
    return config.replace(task={"length": 8, "batch": 2}, model=TINY, run={"threads": 1})


def test_the_bare_loop_does_the_work_of_a_step(tmp_path):
    config = throughput._on_random_tokens(tiny(cpu_bytes()), tmp_path, 1, 256)
    train(config.replace(run={"eval_every": 1}), tmp_path / "run")
    model, step = throughput._bare(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step()
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints").weights
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    for name, p in model.named_parameters():
        assert torch.allclose(p, saved[name], rtol=1e-5, atol=1e-7)


def test_pairs_are_divided_and_written(tmp_path, monkeypatch, capsys):
    timers = []

    class Keep(throughput.Alternate):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            timers.append(self)

    monkeypatch.setattr(throughput, "Alternate", Keep)
    monkeypatch.setattr(throughput, "cpu_bytes", lambda: tiny(cpu_bytes()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = throughput.run(1, tmp_path / "throughput.json")
    assert json.loads((tmp_path / "throughput.json").read_text()) == json.loads(json.dumps(found))
    seconds = {name: times[3:-1] for name, times in timers[0].seconds.items()}
    ratios = [bare / run for bare, run in zip(seconds["bare"], seconds["run"])]
    assert len(ratios) == throughput.PAIRS
    assert found["run_over_bare"] == statistics.median(ratios)
    assert found["record_8"] is None
    assert found["details"]["loop"]["range"] == (min(ratios), max(ratios))
    assert found["details"]["loop"]["tokens_per_second"]["run"] == pytest.approx(16 / statistics.median(seconds["run"]))
    assert "no GPU here" in capsys.readouterr().out


def test_record_8_is_measured_by_its_own_clock(tmp_path):
    """On a CPU and tiny: that it is ready to run."""
    found = throughput._record_8(1, tiny(fineweb_124m()).replace(run={"device": "cpu"}))
    assert (found["steps"], found["device_batch"], found["compile"], found["mfu"]) == (2, 2, "off", None)
    low, high = found["range"]
    assert 0 < low <= found["tokens_per_second"] <= high
    report = throughput._report({"record_8": found, "details": {"loop": throughput._loop(1, tiny(cpu_bytes()))}})
    assert "MFU unknown; 2 sequences at once" in report
