"""Token shards: the format, every kind of damage, and batches that no number of readers changes."""

import functools
import hashlib
import http.server
import json
import pathlib
import threading

import numpy as np
import pytest
import torch

from reroll import GPT, Backprop, Key
from reroll.data.prepare import download, encode
from reroll.data.tokenizers import Byte
from reroll.data.tokens import ABOUT, HEADER, MAGIC, TokenBatches, read_shard, write_shard
from reroll.errors import RunError, UsageError
from reroll.train.checkpoint import checksum, newest, weights_of
from reroll.train.config import Config
from reroll.train.loop import train
from reroll.train.replay import replay
from tests.runs import Interrupt, differences, left

RANDOM = np.random.default_rng(0)


@pytest.fixture
def folder(tmp_path):
    """Three training shards and one for validation, of random tokens below 300; and the tokens."""
    tokens = [RANDOM.integers(0, 300, n) for n in (1000, 777, 1313, 500)]
    for i, part in enumerate(tokens[:3]):
        write_shard(tmp_path / f"x_train_{i + 1:06d}.bin", part)
    write_shard(tmp_path / "x_val_000000.bin", tokens[3])
    return tmp_path, tokens


def batches(path, **options):
    return TokenBatches(path, **({"length": 8, "batch": 12, "valid_tokens": 333, "vocab": 300} | options))


@pytest.mark.parametrize("count", [1, 2, 65_537])
def test_what_is_written_is_read(tmp_path, count):
    tokens = RANDOM.integers(0, 65_536, count)
    write_shard(tmp_path / "a.bin", tokens)
    content = (tmp_path / "a.bin").read_bytes()
    assert content[:12] == MAGIC.to_bytes(4, "little") + (1).to_bytes(4, "little") + count.to_bytes(4, "little")
    assert content[12:HEADER] == bytes(HEADER - 12)
    assert content[HEADER:] == b"".join(int(t).to_bytes(2, "little") for t in tokens)
    assert (read_shard(tmp_path / "a.bin") == tokens).all()
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


@pytest.mark.parametrize("tokens", [[], [-1], [65_536], [1.5], [[1, 2]], ["a"]])
def test_what_no_shard_can_hold_is_refused(tmp_path, tokens):
    with pytest.raises(UsageError, match="tokens"):
        write_shard(tmp_path / "a.bin", np.array(tokens))
    assert not list(tmp_path.iterdir())


def damaged(content, how):
    header = bytearray(content)
    if how == "magic":
        header[0] ^= 1
    elif how == "version":
        header[4] = 2
    elif how == "count":
        header[8] += 1
    elif how == "negative":
        header[8:12] = (-5).to_bytes(4, "little", signed=True)
    return {"odd": content[:-1], "header only": content[:HEADER], "short": content[:50], "empty": b"",
            "longer": content + b"ab"}.get(how, bytes(header))  # fmt: skip


DAMAGE = ["magic", "version", "count", "negative", "odd", "header only", "short", "empty", "longer"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_is_named(folder, how):
    path = folder[0] / "x_train_000002.bin"
    path.write_bytes(damaged(path.read_bytes(), how))
    for read in (lambda: read_shard(path), lambda: batches(folder[0])):
        with pytest.raises(UsageError, match="x_train_000002.bin"):
            read()
    with pytest.raises(UsageError, match="none.bin cannot be read"):
        read_shard(folder[0] / "none.bin")


def test_every_token_that_fits_is_trained_on_once_in_order(folder):
    path, tokens = folder
    task = batches(path)
    seen = [task.batch(step) for step in range(task.most_steps)]
    expected = np.concatenate([part[: (len(part) - 1) // 96 * 96] for part in tokens[:3]])
    after = np.concatenate([part[1 : (len(part) - 1) // 96 * 96 + 1] for part in tokens[:3]])
    assert (torch.cat([batch.inputs.flatten() for batch in seen]).numpy() == expected).all()
    assert (torch.cat([batch.targets.flatten() for batch in seen]).numpy() == after).all()
    with pytest.raises(UsageError, match=rf"step={task.most_steps} has no tokens left"):
        task.batch(task.most_steps)


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("per_call", [1, 3])
def test_no_number_of_readers_changes_the_batch(folder, readers, per_call):
    task = batches(folder[0])
    for step in (0, 9, 10, 30):
        whole, share = task.batch(step), 12 // readers
        size = share // per_call if share % per_call == 0 else share
        parts = [task.batch(step, rows=range(begin, begin + size)) for begin in range(0, 12, size)]
        assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
        assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)


def test_validation_is_exactly_the_first_tokens(folder):
    path, tokens = folder
    task = batches(path)
    parts = [task.batch(i, "valid") for i in range(task.batches("valid"))]
    assert sum(batch.mask.sum().item() for batch in parts) == 333
    assert (torch.cat([b.inputs[b.mask] for b in parts]).numpy() == tokens[3][:333]).all()
    assert (torch.cat([b.targets[b.mask] for b in parts]).numpy() == tokens[3][1:334]).all()
    for length, batch in ((1, 5), (333, 1), (50, 7)):  # whatever the shape
        other = batches(path, length=length, batch=batch)
        assert sum(other.batch(i, "valid").mask.sum().item() for i in range(other.batches("valid"))) == 333
    assert len(batches(path, valid_tokens=None).tokens["valid"]) == 500
    with pytest.raises(UsageError, match="500 tokens; valid_tokens=500 needs one more"):
        batches(path, valid_tokens=500)


def test_later_epochs_cut_the_rows_elsewhere(folder):
    task = batches(folder[0], epochs=3)
    per_epoch = task.most_steps // 3
    first, second, third = (task.batch(epoch * per_epoch).inputs[0] for epoch in range(3))
    assert len({tuple(row.tolist()) for row in (first, second, third)}) == 3
    assert torch.equal(second, batches(folder[0], epochs=3).batch(per_epoch).inputs[0])
    last = task.batch(task.most_steps - 1)
    assert last.inputs.shape == (12, 8)


def test_carried_rows_read_on_and_are_reset_at_documents(folder):
    path, tokens = folder
    (path / ABOUT).write_text(json.dumps({"tokenizer": Byte().to_dict()}))
    task = batches(path, carry=True)
    task.document = 7
    stream, begin = np.concatenate(tokens[:3]), np.arange(12) * ((3090 - 1) // 12)
    for step in range(5):
        batch = task.batch(step)
        expected = stream[begin[:, None] + step * 8 + np.arange(8)]
        assert (batch.inputs.numpy() == expected).all()
        reset = expected == 7
        reset[:, 0] |= step == 0
        assert (batch.reset is None and not reset.any()) or (batch.reset.numpy() == reset).all()


def test_tokens_beyond_the_vocabulary_and_files_that_shrink_are_named(folder):
    path = folder[0]
    with pytest.raises(RunError, match=r"x_train_000001.bin holds token \d+; the vocabulary is 0 … 99"):
        batches(path, vocab=100).batch(0)
    task, file = batches(path), path / "x_train_000002.bin"
    file.write_bytes(file.read_bytes()[:-200])
    task.batch(0)
    with pytest.raises(RunError, match="x_train_000002.bin has become shorter"):
        task.batch(12)


def test_missing_shards_and_too_few_tokens_are_refused(folder, tmp_path):
    path, _ = folder
    with pytest.raises(UsageError, match="no shard with the 512 × 1024"):
        batches(path, length=1024, batch=512)
    (path / ABOUT).write_text("{")
    with pytest.raises(UsageError, match="tokens.json is damaged"):
        batches(path)
    (path / ABOUT).unlink()
    (path / "x_val_000000.bin").unlink()
    with pytest.raises(UsageError, match="no valid shard"):
        batches(path)
    with pytest.raises(UsageError, match="no valid and no train shard"):
        batches(path / "nowhere")


def test_the_fingerprint_is_of_the_tokens(folder):
    path, tokens = folder
    before = batches(path).fingerprint
    assert batches(path, length=4).fingerprint == before
    tokens[1][5] ^= 1
    write_shard(path / "x_train_000002.bin", tokens[1])
    assert batches(path).fingerprint != before


def write_texts(folder):
    folder.mkdir()
    texts = {
        f"{name}.txt": RANDOM.integers(97, 123, size, dtype=np.uint8).tobytes()
        for name, size in (("a", 400), ("b", 90), ("c", 700))
    }
    for name, text in texts.items():
        (folder / name).write_bytes(text)
    return texts


@pytest.mark.parametrize("shard", [64, 250, 10_000])  # a document longer than a shard, too
def test_a_text_is_cut_into_shards(tmp_path, shard):
    texts = write_texts(tmp_path / "texts")
    about = encode(tmp_path / "texts", tmp_path / "shards", shard=shard)
    parts = {label: [f for f in sorted(about["files"]) if label in f] for label in ("train", "val")}
    written = {label: b"".join(read_shard(tmp_path / "shards" / f).astype(np.uint8).tobytes() for f in files)
               for label, files in parts.items()}  # fmt: skip
    documents = {label: sorted(text.split(b"\n")[1:]) for label, text in written.items()}
    assert sorted(documents["train"] + documents["val"]) == sorted(texts.values())
    assert all(file["tokens"] <= shard for file in about["files"].values())
    for name, file in about["files"].items():
        content = (tmp_path / "shards" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert sum(file["bytes"] for file in about["files"].values()) == sum(map(len, texts.values()))
    task = TokenBatches(tmp_path / "shards", length=8, batch=1, valid_tokens=None)
    assert (task.vocab, task.document, task.decode([104, 105])) == (256, 10, "hi")
    # Again with more room, the shards of before are gone.
    assert set(encode(tmp_path / "texts", tmp_path / "shards")["files"]) == {
        p.name for p in (tmp_path / "shards").glob("*.bin")
    }


def test_bytes_are_those_of_the_text_though_separators_look_like_some(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\n" * 100)
    files = encode(tmp_path / "a.txt", tmp_path / "shards", shard=301)["files"].values()
    assert sum(file["bytes"] for file in files) == 900
    assert sum(file["tokens"] for file in files) == 902  # two documents, one in each split


def test_a_session_needs_enough_tokens_for_its_steps(folder, tmp_path):
    config = Config(recipe="t").replace(
        task={"kind": "tokens", "path": str(folder[0]), "length": 8, "batch": 12, "valid_tokens": 333, "vocab": 300},
        model={"kind": "gpt", "layers": 1, "heads": 1, "width": 8}, gradient="backprop", optim="adamw",
        run={"steps": 32, "threads": 1},
    )  # fmt: skip
    with pytest.raises(UsageError, match="steps=32 are more than the 31 batches"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    for more in ({"task": {"epochs": 2}}, {"run": {"steps": 31}}):
        assert train(config.replace(**more), tmp_path / f"run {more}")["state"] == "done"


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves files with ranges; ends after `give` bytes of a file, and names `digest`."""

    give, digest = 10**9, None

    def do_GET(self):
        content = (pathlib.Path(self.directory) / self.path[1:]).read_bytes()
        begin = int((self.headers.get("Range") or "bytes=0-").split("=")[1].rstrip("-"))
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(content) - begin))
        if self.digest:
            self.send_header("X-Linked-ETag", f'"{self.digest}"')
        self.end_headers()
        self.wfile.write(content[begin : begin + self.give])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"):
        write_shard(tmp_path / "served" / name, RANDOM.integers(0, 50_257, 3000))
    kind = type("Here", (Server,), {})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=tmp_path / "served"))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}/", kind, tmp_path
    running.shutdown()
    running.server_close()


def test_a_download_goes_on_where_it_ended(server):
    address, kind, path = server
    said = []
    kind.give = 2000
    with pytest.raises(RunError, match="run the command again"):
        download(path / "got", 2, said.append, address)
    assert "3 files" in said[0]
    assert "licence ODC-By" in said[0]
    assert (path / "got" / "fineweb_val_000000.bin.part").stat().st_size >= 2000
    kind.give = 10**9
    download(path / "got", 2, said.append, address)
    for file in (path / "served").iterdir():
        assert (path / "got" / file.name).read_bytes() == file.read_bytes()
    said.clear()
    download(path / "got", 2, said.append, address)
    assert len(said) == 1  # nothing is fetched twice


def test_a_download_that_is_damaged_is_thrown_away(server):
    address, kind, path = server
    kind.digest = "0" * 64
    with pytest.raises(RunError, match="came damaged"):
        download(path / "got", 1, lambda line: None, address)
    assert not list((path / "got").iterdir())
    with pytest.raises(RunError, match="could not be fetched"):
        download(path / "got", 1, lambda line: None, address + "nowhere/")
    with pytest.raises(UsageError, match="shards=0"):
        download(path / "got", 0, lambda line: None, address)


@pytest.mark.usefixtures("quick_steps")
def test_a_gpt_that_is_interrupted_goes_on_as_if_it_had_not_been(folder, tmp_path):
    config = Config(recipe="t").replace(
        task={"kind": "tokens", "path": str(folder[0]), "length": 8, "batch": 12, "valid_tokens": 333, "vocab": 300},
        model={"kind": "gpt", "layers": 1, "heads": 1, "width": 8, "value_residual": True},
        gradient={"kind": "backprop", "accumulate": 5},
        optim={"kind": "muon", "momentum_warmup": 7, "head_lr": 0.01, "beta2": 0.9},
        run={"steps": 9, "eval_every": 4, "checkpoint_every": 2, "threads": 1},
    )
    train(config, tmp_path / "straight")
    train(config, tmp_path / "run", report=Interrupt(4))
    train(config, tmp_path / "run", resume=True)
    assert differences(left(tmp_path / "straight"), left(tmp_path / "run")) == []


def test_a_batch_in_parts_has_the_gradient_of_the_whole(folder):
    task, model = batches(folder[0]), GPT(300, layers=2, heads=2, width=16, zero_init=False).double()
    gradients = []
    for parts in (1, 12, 5):
        estimate = Backprop(accumulate=parts)(model, task.loss, task.batch(3), Key(0))
        gradients.append([g.clone() for _, g in estimate.gradient.each(list(estimate.gradient.parameters))])
    for other in gradients[1:]:
        for g, h in zip(gradients[0], other):
            torch.testing.assert_close(g, h, rtol=0, atol=1e-9)


def test_probes_train_a_gpt_too(folder, tmp_path):
    config = Config(recipe="t").replace(
        task={"kind": "tokens", "path": str(folder[0]), "length": 8, "batch": 4, "valid_tokens": 64, "vocab": 300},
        model={"kind": "gpt", "layers": 1, "heads": 2, "width": 8, "zero_init": False},
        gradient={"kind": "probes", "probes": 8, "epsilon": 0.01}, run={"steps": 4, "threads": 1},
    )  # fmt: skip
    for optimizer in ("sgd", "adamw", "muon"):
        path = tmp_path / optimizer
        assert train(config.replace(optim={"kind": optimizer, "lr": 1e-3}), path)["state"] == "done"
        model, steps = replay(path)
        assert steps == 4
        assert checksum(weights_of(model)) == checksum(newest(path / "checkpoints").weights)
