"""Damaged, foreign and dangerous files, full disks and too little memory: one line each, and nothing saved is lost."""

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from reroll.train import checkpoint, journal, loop
from tests.cli import BACKPROP, TRAIN, contents, weights_of


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def trap(tmp_path):
    """A pickle in torch's two formats and in Python's, and the file that exists if one was loaded."""
    sprung = tmp_path / "sprung"
    files = [tmp_path / name for name in ("plain.pt", "zip.pt", "old.pth")]
    files[0].write_bytes(pickle.dumps(Trap(sprung)))
    torch.save(Trap(sprung), files[1])
    torch.save(Trap(sprung), files[2], _use_new_zipfile_serialization=False)
    pickle.loads(files[0].read_bytes())
    assert sprung.exists(), "the trap must work, or the test says nothing"
    sprung.unlink()
    return files, sprung


def test_pickles_are_never_loaded(cli, run, trap, tmp_path):
    files, sprung = trap
    for file in files:
        renamed = file.with_suffix(".safetensors")
        renamed.write_bytes(file.read_bytes())
        for path in (file, renamed):
            for arguments in (("eval", path), ("sample", path), ("export", path), (*TRAIN, "--init", path)):
                found = cli(*arguments)
                assert found.code == 1
                assert "Pickles" in found.error
            assert cli("train", "smoke", "--config", path).code == 2
        array = tmp_path / "array.npy"
        array.write_bytes(file.read_bytes())
        assert "path=array.npy" in cli("train", "arrays", "--path", "array.npy").error
        for name in ("journal", "checkpoints/step-00000004/model.safetensors", "checkpoints/step-00000004/state.json"):
            resumed = ("train", "--run-dir", "copy", "--resume", "--steps", 5)
            for arguments in (("eval", "copy"), ("replay", "copy"), resumed):
                shutil.copytree(run, "copy")
                Path("copy", name).write_bytes(file.read_bytes())
                # Whatever does not need the file goes on without it.
                assert cli(*arguments).code == (name == "journal" and arguments[0] != "eval")
                shutil.rmtree("copy")
    assert not sprung.exists()


def damage_checkpoints(run, how):
    for folder in checkpoint.all_of(run / "checkpoints"):
        file = folder / "model.safetensors"
        if how == "cut":
            file.write_bytes(file.read_bytes()[:-9])
        else:
            state = json.loads((folder / "state.json").read_text())
            (folder / "state.json").write_text(json.dumps(state | {"format": 99}))


@pytest.mark.parametrize("how", ["cut", "version"])
def test_damaged_checkpoints_are_said_and_left(cli, run, caplog, how):
    damage_checkpoints(run, how)
    before = contents(run)
    for arguments in (("eval", "run"), ("export", "run"), ("train", "--run-dir", "run", "--resume", "--steps", 7)):
        found = cli(*arguments)
        assert found.code == 1
        assert "checkpoint" in found.error
        assert contents(run) == before
    for arguments in (("eval", "run"), ("sample", "run"), ("train", "--run-dir", "run", "--resume", "--steps", 7)):
        assert "reroll replay run --to STEP --out model.safetensors" in cli(*arguments).error
    assert cli("replay", "run", "--checksum").code == 0  # the journal still has every step


def test_one_damaged_checkpoint_is_passed_over(cli, run, tmp_path):
    whole = weights_of(run)
    newest = checkpoint.all_of(run / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"\0" * 100)
    assert "after 3 steps" in cli("eval", "run").out
    resumed = cli("train", "--run-dir", "run", "--resume", "--steps", 5)
    assert resumed.code == 0
    assert "Resuming run at step 3" in resumed.out
    assert cli("replay", "run", "--to", 4, "--checksum").out.splitlines()[-1] == whole
    assert cli("replay", "run", "--checksum").out.splitlines()[-1] == weights_of(run)


def foreign_journals(data):
    """Journals that are whole, by their checksums, and not of this run."""
    begin = int.from_bytes(data[len(journal.MAGIC) :][:4], "little") + len(journal.MAGIC) + 12
    kept, records = data[len(journal.MAGIC) + 12 : begin], data[begin:]
    header = json.loads(kept)
    headers = [
        "x",
        {k: v for k, v in header.items() if k != "sizes"},
        header | {"sizes": {"vocab": -3, "inputs": None, "outputs": 1, "readout": "every"}},
        header | {"noise": "pink"},
        header | {"init": True},
        header | {"initial": "0" * 64},
        header | {"config": "["},
        header | {"config": header["config"].replace("seed = 0", "seed = 1")},
    ]
    for changed in headers:
        yield journal.MAGIC + journal._block(json.dumps(changed).encode()) + records
    yield journal.MAGIC + journal._block(kept) + journal._block(b"short")
    yield journal.MAGIC + journal._block(kept) + journal._block(records[12:-4])
    yield data[: len(journal.MAGIC) + 20]
    yield b""
    yield data.replace(b"journal.2", b"journal.1", 1)


def test_foreign_journals_are_refused(cli, run):
    path = run / "journal"
    whole = path.read_bytes()
    for changed in foreign_journals(whole):
        path.write_bytes(changed)
        found = cli("replay", "run", "--checksum")
        assert found.code in (1, 2), changed[:80]
        assert "journal" in found.error or "initial weights" in found.error or "init.safetensors" in found.error
        assert found.out == ""
    path.unlink()
    assert "cannot be read" in cli("replay", "run").error
    before = contents(run)
    assert "journal" in cli("train", "--run-dir", "run", "--resume", "--steps", 6).error
    assert contents(run) == before


def test_foreign_safetensors_are_refused(cli, run, tmp_path):
    cli("export", "run", "--to", "good.safetensors")
    good = tmp_path / "good.safetensors"
    weights = load_file(good)
    with good.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        about = json.loads(json.loads(file.read(size))["__metadata__"]["reroll"])
    changed = [
        {k: v for k, v in about.items() if k != "sizes"},
        about | {"sizes": about["sizes"] | {"outputs": True}},
        about | {"step": None},
        about | {"config": "format = 7"},
        about | {"config": "["},
        about | {"config": about["config"].replace("hidden = 8", "hidden = 16")},
        about | {"tokenizer": {"name": "char", "characters": "".join(map(chr, range(300, 900)))}},
        about | {"tokenizer": {"name": "char"}},
        None,
    ]
    file = tmp_path / "bad.safetensors"
    for content in changed:
        save_file(weights, file, {"reroll": json.dumps(content)})
        found = cli("eval", file)
        assert found.code in (1, 2), content
        assert found.error
    save_file(weights, file)
    assert "not written by `reroll export`" in cli("eval", file).error
    save_file(weights | {"more": torch.ones(1)}, file, {"reroll": json.dumps(about)})
    assert "1 unknown (more)" in cli("eval", file).error
    for cut in (0, 7, 8, 100, len(good.read_bytes()) - 1):
        file.write_bytes(good.read_bytes()[:cut])
        assert "cannot be read as a safetensors file" in cli("eval", file).error


def test_damaged_records_of_a_run_are_said(cli, run):
    kept = (run / "environment.json").read_text()
    foreign = kept.replace('"tokenizer": null', '"tokenizer": 4')
    for content in ("", "[]", '{"sizes": 3}', '{"sizes": {"vocab": 3}}', foreign):
        (run / "environment.json").write_text(content)
        found = cli("eval", "run")
        assert found.code == (2 if content == foreign else 1)
        assert "environment.json" in found.error
    before = contents(run)
    found = cli("train", "--run-dir", "run", "--resume", "--steps", 5)
    assert found.code == 2
    assert "environment.json: tokenizer=4" in found.error
    assert contents(run) == before
    (run / "environment.json").write_text(kept)
    for content in ("format = 3", "[task", "[optim]\nlr = 'x'", "[model]\nhidden = 0"):
        (run / "config.toml").write_text(content)
        for arguments in (("eval", "run"), ("replay", "run"), ("train", "--run-dir", "run", "--resume")):
            found = cli(*arguments)
            assert found.code == 2
            assert found.error


# The machine


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.safetensors"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "model.safetensors"),
    ],
    ids=["full", "full-in-safetensors", "read-only"],
)
def test_a_disk_that_fails_loses_nothing(cli, run, tmp_path, monkeypatch, error):
    """The third checkpoint cannot be written: those before it stay, and resuming gives the run that never failed."""
    saved, count = checkpoint.save_file, iter(range(100))

    def failing(*arguments):
        if next(count) >= 4:  # two files a checkpoint
            raise error
        saved(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", failing)
    found = cli(*TRAIN, "--run-dir", "failed")
    assert found.code == 1
    assert os.strerror(getattr(error, "errno", errno.ENOSPC)) in found.error
    assert [p.name for p in checkpoint.all_of(tmp_path / "failed/checkpoints")] == ["step-00000001", "step-00000002"]
    assert json.loads(cli("runs", "failed", "--json").out)[0]["state"] == "failed"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    resumed = cli("train", "--run-dir", "failed", "--resume")
    assert resumed.code == 0
    assert "Resuming failed at step 2" in resumed.out
    assert weights_of(tmp_path / "failed") == weights_of(run)


def test_a_disk_that_is_full_at_once(cli, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    found = cli(*TRAIN, "--run-dir", "run")
    assert found.code == 1
    assert "No space left on device. Free some space, or choose another folder with --run-dir." in found.error


def test_a_folder_that_cannot_be_written(cli, tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    found = cli(*TRAIN, "--run-dir", "run")
    assert found.code == 1
    assert "--run-dir run cannot be written (Permission denied); choose another folder." in found.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 8.00 GiB for an array"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB."),
        MemoryError(),
    ],
    ids=["numpy", "cpu", "cuda", "python"],
)
def test_out_of_memory_is_one_line_with_remedies(cli, run, tmp_path, monkeypatch, error):

    take_step = loop.take_step

    def failing(session):
        if session.progress.step == 2:
            raise error
        return take_step(session)

    monkeypatch.setattr(loop, "take_step", failing)
    found = cli(*TRAIN, "--run-dir", "failed")
    assert found.code == 1
    assert found.error.startswith("error: Out of memory: ")
    assert "Lower --batch" in found.error
    monkeypatch.setattr(loop, "take_step", take_step)
    assert cli("train", "--run-dir", "failed", "--resume").code == 0
    assert weights_of(tmp_path / "failed") == weights_of(run)


def test_more_memory_than_there_is(cli, tmp_path):
    found = cli(*TRAIN, "--run-dir", "run", "--hidden", 2**22)
    assert found.code == 1
    assert found.error.startswith("error: Out of memory: ")
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_run_ends_with_1(cli, tmp_path):
    found = cli(*TRAIN, "--run-dir", "run", "--steps", 300, "--lr", 30, "--set", "run.eval_every=300")
    assert found.code == 1
    assert "diverged: the loss" in found.out
    assert "Lower --lr or --epsilon, or raise --set run.diverged=…" in found.out
    found = cli(*BACKPROP, "--run-dir", "other", "--steps", 300, "--lr", 300, "--set", "run.eval_every=300")
    assert "Lower --lr, or raise --set run.diverged=…" in found.out
