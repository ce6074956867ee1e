"""Checkpoints: what goes in comes out, half of one is none, and nothing is ever unpickled."""

import hashlib
import json
import logging
import pickle

import pytest
import torch
from torch import nn

from reroll.errors import RunError
from reroll.train import checkpoint

SHARED = torch.randn(2, 3)
STATE = {
    "numbers": [1, 2.5, None, True, "text", float("inf")],
    "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 1: {"m": torch.randn(2, 3)}}, "groups": [{"params": [0]}]},
    "pair": (torch.ones(1, dtype=torch.bfloat16), {"deep": torch.arange(3)}),
    "empty": {},
    "shared": (SHARED, SHARED, SHARED[1]),
}


def flat(value, path=""):
    if isinstance(value, dict):
        return [x for key, item in value.items() for x in flat(item, f"{path}/{key!r}")]
    if isinstance(value, list | tuple):
        return [(path, type(value))] + [x for i, item in enumerate(value) for x in flat(item, f"{path}/{i}")]
    return [(path, value.tolist(), value.dtype) if isinstance(value, torch.Tensor) else (path, value)]


def test_state_comes_back_as_it_was(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    checkpoint.save(tmp_path, 7, model, STATE, keep=1)
    saved = checkpoint.newest(tmp_path)
    assert saved.step == 7
    assert flat(saved.state) == flat(STATE)
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    checkpoint.put_weights(other, saved.weights, "it")
    for a, b in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(a, b)


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 10, 9):
        checkpoint.save(tmp_path, step, nn.Linear(1, 1), {}, keep=2)
    assert [p.name for p in checkpoint.all_of(tmp_path)] == ["step-00000009", "step-00000010"]


def test_steps_are_numbers_however_long(tmp_path):
    for step in (99_999_999, 100_000_000, 1_000_000_001):
        checkpoint.save(tmp_path, step, nn.Linear(1, 1), {}, keep=2)
    assert checkpoint.newest(tmp_path).step == 1_000_000_001
    assert [checkpoint.step_of(path) for path in checkpoint.all_of(tmp_path)] == [100_000_000, 1_000_000_001]
    checkpoint.set_aside(tmp_path, 100_000_000)
    assert checkpoint.newest(tmp_path).step == 100_000_000


@pytest.mark.parametrize("step", [float("inf"), float("nan"), None, [3]])
def test_a_step_that_is_no_number_is_one_line(tmp_path, step):
    path = checkpoint.save(tmp_path, 1, nn.Linear(1, 1), {}, keep=1)
    content = json.loads((path / "state.json").read_text()) | {"step": step}
    del content["own_sha256"]
    content["own_sha256"] = checkpoint._sha256_of(content)
    (path / "state.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match="cannot be read as a checkpoint"):
        checkpoint.read(path)


@pytest.mark.parametrize("file", ["model.safetensors", "state.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "pickle"])
def test_a_damaged_one_is_passed_over(tmp_path, caplog, file, damage):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, nn.Linear(4, 4), STATE, keep=5)
    path = tmp_path / "step-00000002" / file
    data = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.write_bytes(pickle.dumps({"weights": [1, 2, 3]}))
    with caplog.at_level(logging.WARNING):
        saved = checkpoint.newest(tmp_path)
    # A flipped bit of state.json may leave it readable JSON of the same numbers; then it is whole enough.
    assert saved.step in ((1, 2) if (file, damage) == ("state.json", "flip") else (1,))
    if saved.step == 1:
        assert "Skipping it" in caplog.text


def test_an_interrupted_save_leaves_the_old_ones(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, nn.Linear(2, 2), STATE, keep=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_to_disk", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, nn.Linear(2, 2), STATE, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path).step == 1


def test_another_version_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, 1, nn.Linear(2, 2), {}, keep=1) / "state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(RunError, match="another version of reroll"):
        checkpoint.read(path.parent)


def test_weights_that_do_not_fit_are_named():
    weights = checkpoint.weights_of(nn.Linear(3, 2))
    with pytest.raises(RunError, match=r"weight has shape \(2, 3\), the model's is \(2, 4\)"):
        checkpoint.put_weights(nn.Linear(4, 2), weights, "file")
    with pytest.raises(RunError, match=r"1 missing \(bias\), 0 unknown"):
        checkpoint.put_weights(nn.Linear(3, 2), {"weight": weights["weight"]}, "file")


def test_the_checksum_is_as_documented():
    weights = {"b": torch.tensor([1.5, -2.0]), "a": torch.tensor(3, dtype=torch.int64)}
    expected = hashlib.sha256()
    expected.update(b"a\0int64\0()\0" + (3).to_bytes(8, "little"))
    expected.update(b"b\0float32\0(2,)\0" + bytes.fromhex("0000c03f000000c0"))
    assert checkpoint.checksum(weights) == expected.hexdigest()
    assert checkpoint.checksum({"b": weights["b"].clone(), "a": weights["a"]}) == expected.hexdigest()
    assert checkpoint.checksum({**weights, "b": weights["b"].double()}) != expected.hexdigest()
    assert checkpoint.checksum({**weights, "b": weights["b"].view(2, 1)}) != expected.hexdigest()
