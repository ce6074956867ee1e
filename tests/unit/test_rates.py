"""Tokens per second, MFU and dollars: known ones are right, unknown ones are absent."""

import dataclasses
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import reroll
from reroll.cli.console import Console
from reroll.data.synthetic import Copy
from reroll.ledger.log import summarize
from reroll.train import rates
from reroll.train.config import Config, resolve
from reroll.train.loop import train
from reroll.train.rates import Rates
from reroll.train.records import read_metrics
from reroll.train.session import Session
from tests.runs import small


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("position", ["rotary", "learned"])
def test_flops_are_those_of_the_matrix_products(tied, position):
    """Counted by torch: of the products of one step, forward and backward, with attention as plain products."""
    model = reroll.GPT(vocab=37, layers=3, heads=2, width=20, tied=tied, position=position, context=11)
    ids = torch.randint(37, (5, 11))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids).square().mean().backward()
    assert counter.get_total_flops() == 5 * 11 * model.flops_per_token(11)


def test_record_8_has_the_published_flops():
    with torch.device("meta"):
        model = reroll.GPT(vocab=50_304)
    assert model.flops_per_token(1024) == 6 * 123_568_128 + 12 * 12 * 1024 * 768
    # One H200 at the bar of the speedrun: 42.3 % of its peak.
    known = Rates(rates.PEAKS["NVIDIA H200"]["bf16"], model.flops_per_token)
    assert known.of(524_288, 1024, 1.0707, 1.0)["mfu"] == pytest.approx(0.423, abs=5e-4)


def gpt(**run):
    config = small(gradient="backprop", optim={"kind": "adamw", "lr": 0.01}, run=run)
    return resolve(config.replace(model={"kind": "gpt", "layers": 1, "heads": 1, "width": 8}))


def test_every_row_has_them_and_the_end_sums_them_up(tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "peak_of", lambda device, dtype: {"fp32": 1e9, "bf16": 2e9}[dtype])
    summary = train(gpt(price=7.2), tmp_path)
    rows, model = list(read_metrics(tmp_path)), reroll.load(tmp_path)
    before, total = 0, 0.0
    for row in rows:
        tokens, total = row["tokens"] - before, total + row["seconds"]
        before, each = row["tokens"], model.flops_per_token(tokens // 3)
        expected = {"tokens_per_second": tokens / row["seconds"], "dollars": 7.2 * total / 3600}
        expected["mfu"] = expected["tokens_per_second"] * each / 1e9
        assert {name: row[name] for name in expected} == pytest.approx(expected)
    mean = rows[-1]["tokens"] / total
    found = summarize(rows)
    assert found["tokens_per_second"] == pytest.approx(mean, abs=0.06)
    assert found["mfu"] == pytest.approx(mean * each / 1e9, abs=6e-5)
    line = Console(Config()).closing(summary, tmp_path)
    assert f"{mean:,.0f} tokens/s, MFU {mean * each / 1e9:.1%}, " in line
    assert " GB, $" in line


def test_an_hour_costs_what_it_did_when_it_was_trained(tmp_path):
    """At 24 dollars an hour for a part, and at 2 for the rest."""
    first = train(gpt(price=24.0, steps=3), tmp_path)
    second = train(gpt(price=2.0, steps=6), tmp_path, resume=True)
    spent = 2 * (second["total_seconds"] - first["total_seconds"]) / 3600
    assert second["dollars"] == pytest.approx(first["dollars"] + spent, rel=1e-9)
    assert list(read_metrics(tmp_path))[-1]["dollars"] == second["dollars"]


def test_a_checkpoint_from_before_there_were_dollars_is_loaded():
    config = gpt(price=2.0)
    session = Session.of_config(config)
    state = {"run": "", "progress": dataclasses.asdict(session.progress), "carried": None, "average": None}
    state |= {"optimizer": session.optimizer.state_dict(), "plateau": session.plateau.state_dict()}
    del state["progress"]["dollars"]
    session._restore(state)
    assert session.progress.dollars == 0


def test_a_run_partly_on_a_cpu_has_no_mfu(tmp_path):
    """The rows before it moved to a card have none; a share of the seconds is not the run's."""
    rows = [{"step": i, "tokens": 8 * (i + 1), "seconds": 2.0, "valid_loss": 1.0} for i in range(2)]
    rows[1]["mfu"] = 0.4
    assert "mfu" not in summarize(rows)
    summary = rows[1] | {"state": "done", "reason": "", "total_seconds": 4.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "MFU" not in Console(Config()).closing(summary, tmp_path)
    rows[0] |= {"mfu": 0.2, "seconds": 6.0}  # a slower step, of other length
    assert summarize(rows)["mfu"] == 0.25
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "2 tokens/s, MFU 25.0%" in Console(Config()).closing(summary | {"total_seconds": 8.0}, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sessions_of_objects_have_no_peak(monkeypatch, dtype):
    """Their config says fp32, whatever their weights and loss are computed in."""
    monkeypatch.setattr(rates, "peak_of", lambda device, dtype: 1e12)
    copy = Copy(length=3, batch=4)
    model = reroll.GPT(copy.vocab, layers=1, heads=1, width=4).to(dtype)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session.of(copy, model, reroll.Backprop(), sgd, steps=2, price=4.0)
    assert session.rates.of(10, 2, 1.0, 0.0).keys() == {"tokens_per_second", "dollars"}


def test_what_is_unknown_is_absent(tmp_path):
    train(gpt(), tmp_path / "cpu")
    train(small(), tmp_path / "probes")
    for name in ("cpu", "probes"):
        rows = list(read_metrics(tmp_path / name))
        assert all("tokens_per_second" in row and not {"mfu", "dollars"} & row.keys() for row in rows)
    old = [{"step": 0, "loss": 1.0, "seconds": 2.0}]  # a log from before there were rates
    assert summarize(old) == {"steps": 1, "valid_loss": None, "seconds": 2.0, "peak_bytes": 0}
    assert rates.peak_of(torch.device("cpu"), "fp32") is None


@pytest.mark.parametrize(
    "name, dtype, expected",
    [
        ("NVIDIA H200", "bf16", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5e12),
        ("NVIDIA H100 PCIe", "bf16", 756.5e12),
        ("NVIDIA GeForce GTX 1080", "bf16", None),
    ],
)
def test_peaks_go_by_the_exact_name_of_the_device(monkeypatch, name, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert rates.peak_of(torch.device("cuda"), dtype) == expected
    with monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        assert rates.peak_of(torch.device("cuda"), "fp32") is None
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert rates.peak_of(torch.device("cuda"), "fp32") is None  # TF32


def test_a_gradient_that_evaluates_more_than_once_has_no_mfu(monkeypatch):
    monkeypatch.setattr(rates, "peak_of", lambda device, dtype: 1e12)
    model, device = reroll.GPT(vocab=9, layers=1, heads=1, width=4), torch.device("cpu")
    known = Rates.of_run(model, gpt(), device, 3)
    assert (known.peak, known.flops(2)) == (3e12, model.flops_per_token(2))
    for config in (small(), small(gradient={"kind": "backprop", "truncate": 2})):
        assert Rates.of_run(model, config, device, 1).flops is None
    rematerialised = small(gradient={"kind": "backprop", "checkpoint": True})  # of the model, they count once
    assert Rates.of_run(model, rematerialised, device, 1).flops == model.flops_per_token
    assert dataclasses.replace(known, flops=None).of(10, 2, 1.0, 1.0).keys() == {"tokens_per_second"}
