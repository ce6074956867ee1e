"""Token shards: the format, every kind of damage, and batches that no number of readers changes."""

import hashlib
import json
import pathlib
import sys
import tracemalloc
from importlib import metadata
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reroll import GPT, Backprop, Key
from reroll.data import packages
from reroll.data.corpus import is_held_out
from reroll.data.prepare import encode
from reroll.data.shards import Shards
from reroll.data.tokenizers import Byte, Char, Word
from reroll.data.tokens import ABOUT, HEADER, MAGIC, TokenBatches, read_shard, write_shard
from reroll.errors import RunError, UsageError
from reroll.train.checkpoint import checksum, newest, weights_of
from reroll.train.config import Config
from reroll.train.evaluate import evaluate
from reroll.train.load import require_symbols
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


NO_SHARD = "is no token shard: it does not begin with the number 20240520"
DAMAGE = {
    "magic": NO_SHARD,
    "version": "is a token shard of version 2; this is version 1",
    "count": "has 2578 bytes; its header says 778 tokens, which take 2580",
    "negative": "has 2578 bytes; its header says -5 tokens",
    "odd": "has 2577 bytes; its header says 777 tokens, which take 2578. Get it again",
    "header only": "has 1024 bytes; its header says 777 tokens",
    "short": NO_SHARD,
    "empty": NO_SHARD,
    "longer": "has 2580 bytes; its header says 777 tokens",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_shard_is_named(folder, how):
    path = folder[0] / "x_train_000002.bin"
    path.write_bytes(damaged(path.read_bytes(), how))
    for read in (lambda: read_shard(path), lambda: batches(folder[0])):
        with pytest.raises(UsageError, match=f"^{path} {DAMAGE[how]}") as caught:
            read()
        assert "\n" not in str(caught.value)
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


@pytest.mark.parametrize("size", [96, 97, 98, 104, 192, 193])
def test_a_shard_has_as_many_batches_as_fit_with_the_token_after_them(tmp_path, size):
    """⌊(n − 1) / (B T)⌋; a shifted epoch has what fits behind T − 1 tokens; the first one is unchanged."""
    tokens = np.arange(size)
    for name in ("x_train_000001.bin", "x_val_000000.bin"):
        write_shard(tmp_path / name, tokens)
    shifted = (size - 1 - 7) // 96
    if size == 96:
        with pytest.raises(UsageError, match="no shard with the 12 × 8"):
            batches(tmp_path, valid_tokens=None)
        return
    task, thrice = batches(tmp_path, valid_tokens=None), batches(tmp_path, valid_tokens=None, epochs=3)
    assert task.most_steps == (size - 1) // 96
    assert thrice.most_steps == task.most_steps + 2 * shifted
    for step in range(thrice.most_steps):
        batch = thrice.batch(step)
        if step < task.most_steps:
            assert torch.equal(batch.inputs, task.batch(step).inputs)
        else:
            assert 1 <= batch.inputs[0, 0] - (step - task.most_steps) % shifted * 96 <= 7
        assert (batch.targets == batch.inputs + 1).all()


def test_shifts_of_later_epochs_are_never_none(folder):
    task = batches(folder[0], length=2, batch=4, epochs=60)
    first, later = int(task.first_epoch[-1]), int(task.later_epochs[-1])
    assert all(task.begins(first + epoch * later, None, 2)[0] == 1 for epoch in range(59))
    task = batches(folder[0], epochs=60)
    first, later = int(task.first_epoch[-1]), int(task.later_epochs[-1])
    assert {int(task.begins(first + epoch * later, None, 8)[0]) for epoch in range(59)} == set(range(1, 8))
    assert task.batch(task.most_steps - 1).inputs.shape == (12, 8)
    one = batches(folder[0], length=1, batch=1, epochs=2)
    assert one.batch(one.most_steps - 1).inputs.shape == (1, 1)


def test_rows_of_a_batch_are_read_as_fast_as_a_slice(folder, monkeypatch):
    """Rows next to one another are one slice of the file, and only the ones that are asked for are read."""
    task, read = batches(folder[0]), []
    whole = Shards.read
    monkeypatch.setattr(Shards, "read", lambda self, begin, count: read.append(count) or whole(self, begin, count))
    monkeypatch.delattr(Shards, "__getitem__")
    task.batch(11)
    task.batch(11, rows=range(3, 5))
    task.batch(11, length=3)
    task.batch(0, "valid")
    assert read == [97, 17, 92, 97]
    shorter = task.batch(11, length=3)
    assert torch.equal(shorter.inputs, task.batch(11).inputs[:, :3])
    assert torch.equal(shorter.targets, task.batch(11).targets[:, :3])
    for part in (task.batch(11), task.batch(11, rows=range(3, 5)), task.batch(0, "valid", rows=range(2))):
        assert part.scored == part.mask.sum() == part.inputs.numel()


def test_slices_cross_the_borders_of_shards(folder):
    path, tokens = folder
    shards, row = batches(path).tokens["train"], np.concatenate(tokens[:3])
    for begin, count in ((0, 5), (990, 20), (999, 1), (1000, 1), (995, 1000), (0, 3090), (3089, 1)):
        assert (shards.read(begin, count) == row[begin : begin + count]).all()
    assert (np.asarray(shards) == row).all()


@pytest.mark.parametrize("epochs, steps", [(1, 32), (2, 64), (3, 96)])
def test_carried_rows_see_no_token_more_often_than_there_are_epochs(folder, epochs, steps):
    task = batches(folder[0], carry=True, epochs=epochs)
    assert task.most_steps == epochs * (3089 // 12) // 8 == steps


def test_carried_rows_read_on_and_are_reset_at_documents(folder):
    path, tokens = folder
    (path / ABOUT).write_text(json.dumps({"tokenizer": Byte().to_dict(), "document": 7}))
    task = batches(path, carry=True)
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
    largest = int(folder[1][0][:97].max())
    with pytest.raises(RunError, match=f"holds token {largest}; the vocabulary is 0 … {largest - 1}"):
        batches(path, vocab=largest).batch(0)
    batches(path, vocab=largest + 1).batch(0)
    task, file = batches(path), path / "x_train_000002.bin"
    file.write_bytes(file.read_bytes()[:-200])
    task.batch(0)
    with pytest.raises(RunError, match="x_train_000002.bin has become shorter"):
        task.batch(12)


def test_a_held_out_file_that_shrinks_is_named_before_its_bytes_are_counted(tmp_path):
    write_texts(tmp_path / "texts")
    encode(tmp_path / "texts", tmp_path / "shards")
    task = TokenBatches(tmp_path / "shards", length=8, batch=1, valid_tokens=40)
    file = tmp_path / "shards" / "texts_val_000000.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(RunError, match="texts_val_000000.bin has become shorter"):
        _ = task.valid_bytes


def test_a_shard_holds_65536_symbols(tmp_path):
    words = [f"w{i}" for i in range(65_535)]
    (tmp_path / "a.txt").write_text(f"{words[-2]} {words[0]}\n" * 9)
    with pytest.raises(UsageError, match="a.txt has a vocabulary of 65537 symbols.*max_vocab=65536 or less"):
        encode(tmp_path / "a.txt", tmp_path / "shards", Word(words))
    assert not (tmp_path / "shards").exists()
    encode(tmp_path / "a.txt", tmp_path / "shards", Word(words[:-1]))
    assert read_shard(tmp_path / "shards" / "a_train_000001.bin")[1:4].tolist() == [65_535, 2, 1]


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
    for place in (5, 388, 770):  # anywhere in it
        tokens[1][place] ^= 1
        write_shard(path / "x_train_000002.bin", tokens[1])
        assert batches(path).fingerprint != before
        before = batches(path).fingerprint


def test_held_out_shards_have_a_fingerprint_of_their_own(folder):
    """The same with any number of training shards, and another with other tokens."""
    path, tokens = folder
    whole, digest = batches(path), hashlib.sha256((path / "x_val_000000.bin").read_bytes()).hexdigest()
    assert whole.metadata()["valid_fingerprint"] == hashlib.sha256(f'["{digest}"]'.encode()).hexdigest()
    (path / "x_train_000003.bin").unlink()
    fewer = batches(path)
    assert (fewer.valid_fingerprint, fewer.fingerprint == whole.fingerprint) == (whole.valid_fingerprint, False)
    write_shard(path / "x_val_000000.bin", tokens[3][::-1])
    assert batches(path).valid_fingerprint != whole.valid_fingerprint


def test_splits_are_told_apart_by_the_end_of_the_name(tmp_path):
    for name in ("interval_train_000001.bin", "train_val_000000.bin", "a_train_of_values_train_000002.bin"):
        write_shard(tmp_path / name, RANDOM.integers(0, 300, 500))
    tokens = batches(tmp_path).tokens
    assert [p.name for p in tokens["valid"].paths] == ["train_val_000000.bin"]
    assert [p.name for p in tokens["train"].paths] == [
        "a_train_of_values_train_000002.bin",
        "interval_train_000001.bin",
    ]
    for name in ("interval.bin", "x_train.bin", "x_val_1.bin.bin", "x_validation_000001.bin"):
        write_shard(tmp_path / name, [1, 2, 3])
        with pytest.raises(UsageError, match=f"{name} is neither"):
            batches(tmp_path)
        (tmp_path / name).unlink()


def test_a_shard_that_is_not_the_one_of_tokens_json_is_named(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts")
    encode(tmp_path / "texts", tmp_path / "shards", shard=250)
    options = {"length": 8, "batch": 1, "valid_tokens": None}
    TokenBatches(tmp_path / "shards", **options)
    hashed = []
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: hashed.append(file.name))
    TokenBatches(tmp_path / "shards", **options)
    assert not hashed  # once a file
    monkeypatch.undo()
    path = sorted((tmp_path / "shards").glob("*_train_*.bin"))[1]
    content = bytearray(path.read_bytes())
    content[HEADER + 300] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{path.name} is damaged: its SHA-256"):
        TokenBatches(tmp_path / "shards", **options)


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
    documents = {label: sorted(text.split(b"\0")[1:]) for label, text in written.items()}
    assert sorted(documents["train"] + documents["val"]) == sorted(texts.values())
    assert all(file["tokens"] <= shard for file in about["files"].values())
    for name, file in about["files"].items():
        content = (tmp_path / "shards" / name).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    assert sum(file["bytes"] for file in about["files"].values()) == sum(map(len, texts.values()))
    task = TokenBatches(tmp_path / "shards", length=8, batch=1, valid_tokens=None)
    assert (task.vocab, task.document, task.decode([104, 105])) == (256, 0, "hi")
    # Again with more room, the shards of before are gone.
    assert set(encode(tmp_path / "texts", tmp_path / "shards")["files"]) == {
        p.name for p in (tmp_path / "shards").glob("*.bin")
    }


TEXT = "Où est\t\tle  chat ?\n\nIci,  là-bas, « ou » non.\n" * 30


@pytest.mark.parametrize("shard", [7, 100, 10_000])
@pytest.mark.parametrize("name", ["byte", "char", "word"])
def test_bytes_are_those_of_the_text_itself(tmp_path, name, shard, monkeypatch):
    """Whatever a tokenizer leaves out or does not know, and however the text is cut into chunks and shards."""
    monkeypatch.setattr("reroll.data.prepare.CHUNK", 64)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    known = {"byte": "byte", "char": Char(" \nOestlcha"), "word": Word(["est", "le", "chat"])}[name]
    about = encode(tmp_path / "a.txt", tmp_path / "shards", known, shard=shard)
    sizes = {file: about["files"][file]["bytes"] for file in sorted(about["files"])}
    assert sum(sizes.values()) == len(TEXT.encode())
    if name == "word":
        return
    text = TEXT.encode() if name == "byte" else TEXT  # a symbol each
    for file, size in sizes.items():
        count = about["files"][file]["tokens"] - file.endswith(("train_000001.bin", "val_000000.bin"))  # the separator
        part, text = text[:count], text[count:]
        assert size == (len(part) if name == "byte" else len(part.encode()))


@pytest.mark.parametrize("name, document", [("byte", 0), ("char", None), ("word", None)])
def test_documents_begin_at_what_was_written_there(tmp_path, name, document):
    """A new line is no beginning of a document."""
    (tmp_path / "texts").mkdir()
    for i in range(12):
        (tmp_path / "texts" / f"{i}.txt").write_text("one two\nthree\n\nfour\n" * 20)
    encode(tmp_path / "texts", tmp_path / "shards", name)
    task = TokenBatches(tmp_path / "shards", length=50, batch=2, valid_tokens=None, carry=True)
    assert task.document == document
    resets = [
        batch.reset.sum().item() for step in range(task.most_steps) if (batch := task.batch(step)).reset is not None
    ]
    texts = (np.asarray(task.tokens["train"]) == 0).sum() if name == "byte" else 0
    assert texts - 2 <= sum(resets) <= texts + 2
    assert batches_of_gpt2(tmp_path).document == 50_256


def batches_of_gpt2(folder):
    """Shards without tokens.json."""
    (folder / "bare").mkdir(exist_ok=True)
    for name in ("x_train_000001.bin", "x_val_000000.bin"):
        write_shard(folder / "bare" / name, RANDOM.integers(0, 50_257, 300))
    return TokenBatches(folder / "bare", length=8, batch=2, valid_tokens=None)


def test_shards_of_gpt2_need_no_tiktoken(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    batches_of_gpt2(tmp_path)
    about = {"tokenizer": {"name": "gpt2"}, "vocab": 50_257, "document": 50_256, "files": {}}
    (tmp_path / "bare" / ABOUT).write_text(json.dumps(about))
    task = TokenBatches(tmp_path / "bare", length=8, batch=2, valid_tokens=None)
    assert (task.vocab, task.document, task.tokenizer) == (50_257, 50_256, None)
    (tmp_path / "bare" / ABOUT).write_text(json.dumps({"tokenizer": {"name": "gpt2"}}))
    assert TokenBatches(tmp_path / "bare", length=8, batch=2, valid_tokens=None).document == 50_256
    (tmp_path / "bare" / ABOUT).write_text(json.dumps(about | {"tokenizer": {"name": "other"}}))
    with pytest.raises(UsageError, match="tokens.json is damaged"):
        TokenBatches(tmp_path / "bare", length=8, batch=2, valid_tokens=None)


@pytest.mark.parametrize("name", ["byte", "char"])
def test_a_text_needs_the_memory_of_one_shard(tmp_path, name):
    """Two bytes a token, and a few chunks."""
    (tmp_path / "a.txt").write_bytes(b"to be or not to be, that is it\n" * 260_000)
    tracemalloc.start()
    encode(tmp_path / "a.txt", tmp_path / "shards", name, shard=4_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 4e6 + 18 * (1 << 20)


@pytest.mark.parametrize("valid_tokens", [None, 40])
def test_bits_per_byte_count_the_bytes_of_the_text(tmp_path, valid_tokens):
    write_texts(tmp_path / "texts")
    encode(tmp_path / "texts", tmp_path / "shards", shard=64)
    task = TokenBatches(tmp_path / "shards", length=8, batch=3, valid_tokens=valid_tokens)
    scores = evaluate(GPT(256, layers=1, heads=1, width=8), task, "valid")
    tokens = np.asarray(task.tokens["valid"])[1:]
    text = (tokens != 0).sum()  # what is put before a document is none of it
    assert scores["bits_per_byte"] == pytest.approx(8 * len(tokens) / text)
    assert "bits_per_byte" not in evaluate(GPT(50_257, layers=1, heads=1, width=8), batches_of_gpt2(tmp_path), "valid")


def test_the_shards_of_another_text_are_neither_mixed_in_nor_deleted(tmp_path):
    for name in ("a", "b", "a_train_000009"):
        (tmp_path / f"{name}.txt").write_text("to be or not to be " * 50)
    encode(tmp_path / "a.txt", tmp_path / "shards", shard=300)
    before = {p.name for p in (tmp_path / "shards").iterdir()}
    for other in ("b", "a_train_000009"):
        with pytest.raises(UsageError, match=r"shards of another text \(a_train_000001.bin\)"):
            encode(tmp_path / f"{other}.txt", tmp_path / "shards")
    assert {p.name for p in (tmp_path / "shards").iterdir()} == before
    encode(tmp_path / "a.txt", tmp_path / "shards")
    assert {p.name for p in (tmp_path / "shards").iterdir()} == {ABOUT, "a_train_000001.bin", "a_val_000000.bin"}


def test_the_same_shards_may_be_made_again_and_others_are_refused(tmp_path):
    """Runs may be on those that are there: another text, even of that name, or tokenizer would mislead them."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("to be or not to be " * 50)
    (tmp_path / "a.txt").write_text("to be or not to be " * 50)
    made, remedy = tmp_path / "shards", r"another folder \(to=…\), or delete its shards and tokens.json"
    encode(tmp_path / "a", made)
    before = {p.name: p.read_bytes() for p in made.iterdir()}
    with pytest.raises(UsageError, match=rf"shards of another text \({tmp_path / 'a'}, as it was then\).*{remedy}"):
        encode(tmp_path / "a.txt", made)
    with pytest.raises(UsageError, match=rf"\(byte of 256 symbols, not char of 8 symbols\).*{remedy}"):
        encode(tmp_path / "a", made, "char")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / "a")
    encode(tmp_path / "a", made)
    assert {p.name: p.read_bytes() for p in made.iterdir()} == before
    (tmp_path / "a" / "one.txt").write_text("to be or not to be?" * 50)
    with pytest.raises(UsageError, match="another text"):
        encode(tmp_path / "a", made)
    assert {p.name: p.read_bytes() for p in made.iterdir()} == before
    (made / ABOUT).write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        encode(tmp_path / "a", made)
    (made / ABOUT).unlink()  # as when writing was interrupted
    encode(tmp_path / "a", made)
    assert {p.name: p.read_bytes() for p in made.iterdir()} != before


def test_a_run_without_a_tokenizer_was_on_tokens_of_gpt2(tmp_path):
    """Which is not there, or is there now; shards by another one mislead it."""

    class Gpt2(Char):
        name = "gpt2"

    for tokenizer in (None, Gpt2("ab")):
        for task in (SimpleNamespace(tokenizer=None), SimpleNamespace(tokenizer=Gpt2("ab")), SimpleNamespace()):
            require_symbols(task, tokenizer)
        with pytest.raises(RunError, match=r"x was encoded by another tokenizer \(char of 3 symbols\)"):
            require_symbols(SimpleNamespace(path="x", tokenizer=Char("ab")), tokenizer)
    with pytest.raises(RunError, match=r"\(none\) than when the run was trained \(char of 3 symbols\)"):
        require_symbols(batches_of_gpt2(tmp_path), Char("ab"))


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


def install(tmp_path, monkeypatch, files):
    """A package "texts" 1.0 with these files, in the way of the real ones."""
    (tmp_path / "site" / "texts-1.0.dist-info").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "site" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "site" / name).write_bytes(text)
    info = tmp_path / "site" / "texts-1.0.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: texts\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))
    monkeypatch.syspath_prepend(tmp_path / "site")


def test_the_text_of_packages(tmp_path, monkeypatch):
    files = {f"texts/{i}.py": f"x = {i}\r\n".encode() * 5 for i in range(40)} | {
        "texts/a.txt": b"no",
        "other/a.py": b"no",
    }
    install(tmp_path, monkeypatch, files)
    monkeypatch.setenv("REROLL_CACHE", str(tmp_path / "cache"))
    source = packages.source_files("texts")
    assert source == {f"texts/{i}.py": f"x = {i}\n".encode() * 5 for i in range(40)}
    pinned = packages.Packages({"texts": "1.0"}, packages.digest(source))
    monkeypatch.setitem(packages.PACKAGES, "texts", pinned)
    path = pathlib.Path(packages.shards_of("texts"))
    assert packages.shards_of("texts") == str(path)
    about = json.loads((path / ABOUT).read_text())
    held_out = {name for name in source if is_held_out(name)}
    assert 0 < len(held_out) < 20
    for label, names in (("train_000001", source.keys() - held_out), ("val_000000", held_out)):
        tokens = read_shard(path / f"bytes_{label}.bin").astype(np.uint8).tobytes()
        assert tokens == b"".join(b"\0" + source[name] for name in sorted(names))
        assert about["files"][f"bytes_{label}.bin"] == {
            "tokens": len(tokens), "bytes": len(tokens) - len(names),
            "sha256": hashlib.sha256((path / f"bytes_{label}.bin").read_bytes()).hexdigest(),
        }  # fmt: skip
    task = TokenBatches(path, length=8, batch=1, valid_tokens=None)
    assert (task.vocab, task.document, task.valid_bytes) == (256, 0, sum(len(source[name]) for name in held_out))
    monkeypatch.setitem(packages.PACKAGES, "few", packages.Packages({"texts": "1.0"}, packages.digest(source), 10))
    few = pathlib.Path(packages.shards_of("few"))
    assert read_shard(few / "bytes_val_000000.bin").tolist() == read_shard(path / "bytes_val_000000.bin").tolist()
    tokens = read_shard(few / "bytes_train_000001.bin").astype(np.uint8).tobytes()
    kept = tokens[1:].split(b"\0")
    assert sum(map(len, kept)) == sum(len(source[name]) for name in source.keys() - held_out) // 10
    assert sum(any(source[name] == text for name in source) for text in kept) >= len(kept) - 1  # all but the last whole
    monkeypatch.setitem(packages.PACKAGES, "texts", packages.Packages({"texts": "1.1"}, "0" * 64))
    with pytest.raises(UsageError, match="pip install texts==1.1"):
        packages.shards_of("texts")
    with pytest.raises(UsageError, match="pip install absent"):
        packages.source_files("absent")
    assert packages.shards_of("elsewhere") == "elsewhere"


@pytest.mark.parametrize(
    "name, of", [
        ("numpy/distutils/a/b.py", True), ("numpy/__config__.py", True), ("numpy/__init__.py", True),
        ("pandas/__init__.py", True), ("numpy/fft/__init__.py", False), ("pandas/core/frame.py", False),
    ],
)  # fmt: skip
def test_what_differs_between_the_wheels_of_a_version_is_left_out(name, of):
    assert bool(packages.OF_A_WHEEL.fullmatch(name)) == of


def test_cpu_bytes_is_the_text_of_the_pinned_versions():
    """The same for the wheels of CPython 3.11 to 3.13 on Linux, and of 3.12 on macOS, Windows and ARM."""
    pinned = packages.PACKAGES["cpu-bytes"]
    for package, version in pinned.versions.items():
        if metadata.version(package) != version:
            pytest.skip(f"{package} is not {version}")
    files = {name: text for package in pinned.versions for name, text in packages.source_files(package).items()}
    assert packages.digest(files) == pinned.sha256
    assert not any(b"\0" in text for text in files.values())


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


def test_a_run_warms_up_on_data_that_end(folder, tmp_path):
    """On their last batches, though they are fewer than its steps; it leaves no trace."""
    config = Config(recipe="t").replace(
        task={"kind": "tokens", "path": str(folder[0]), "length": 8, "batch": 12, "valid_tokens": 333, "vocab": 300},
        model={"kind": "gpt", "layers": 1, "heads": 1, "width": 8}, gradient="backprop",
        optim={"kind": "adamw", "lr": 0.01}, run={"steps": 2, "threads": 1},
    )  # fmt: skip
    train(config, tmp_path / "plain")
    train(config.replace(run={"warm_up": batches(folder[0]).most_steps + 2}), tmp_path / "warm")
    assert left(tmp_path / "plain")["weights"] == left(tmp_path / "warm")["weights"]


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


@pytest.mark.parametrize("length, batch, epochs", [(7, 5, 1), (16, 3, 2), (1, 8, 3)])
def test_shuffled_windows_are_each_taken_once_an_epoch(folder, length, batch, epochs):
    task = TokenBatches(
        folder[0], length=length, batch=batch, vocab=300, valid_tokens=None, shuffle=True, epochs=epochs
    )
    everything = np.concatenate([array[:] for array in task.tokens["train"].arrays]).astype(np.int64)
    steps = (len(everything) - 1) // (batch * length)
    begins = np.concatenate([task.begins(step, None, length) for step in range(steps)])
    assert (np.sort(begins) == np.arange(steps * batch) * length).all()
    gaps = np.abs(np.diff(np.sort(task.begins(steps // 2, None, length))))
    assert gaps.min() > len(everything) / batch / 4  # a step sees all of the text
    later = np.concatenate([task.begins(step, None, length) for step in range(steps, task.most_steps)] or [[]])
    assert len({*later}) >= len(later) // max(epochs - 1, 1)
    for step in (0, task.most_steps - 1):
        inputs, targets = task.batch(step).inputs.numpy(), task.batch(step).targets.numpy()
        for row, begin in enumerate(task.begins(step, None, length)):
            assert (inputs[row] == everything[begin : begin + length]).all()
            assert (targets[row] == everything[begin + 1 : begin + length + 1]).all()
    some = task.batch(1, rows=range(1, batch)).inputs
    assert some.equal(task.batch(1).inputs[1:])


def test_shuffling_and_carrying_exclude_each_other(folder):
    with pytest.raises(UsageError, match="carry=True reads the text in order"):
        TokenBatches(folder[0], length=4, batch=2, vocab=300, valid_tokens=None, carry=True, shuffle=True)
