"""Text as a task: its windows are pieces of the file, its streams are the file, its baselines are counts."""

import gzip
import itertools
import json
import math
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from reroll.data.text import Text, baselines, entropy, random_places
from reroll.data.tokenizers import Byte, fit
from reroll.errors import UsageError
from reroll.keys import Key

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "—", "naïve", "café\n"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REROLL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def path(tmp_path):
    """A text of 3,000 words without a period."""
    draws = np.random.default_rng(0).integers(0, len(WORDS), 3000)
    file = tmp_path / "text.txt"
    file.write_text(" ".join(WORDS[draw] for draw in draws), newline="")
    return file


def oracle(task, batch):
    return lambda inputs: 1000.0 * torch.nn.functional.one_hot(batch.targets, task.vocab).float()


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word"])
def test_windows_are_pieces_of_the_training_part(path, tokenizer):
    task = Text(path, tokenizer, length=16, batch=8)
    tokens = task.tokens["train"].tolist()
    pieces = {tuple(tokens[begin : begin + 17]) for begin in range(len(tokens) - 16)}
    for step in range(5):
        batch = task.batch(step)
        assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (8, 16)
        assert batch.mask.all()
        assert batch.reset is None
        for inputs, targets in zip(batch.inputs.tolist(), batch.targets.tolist()):
            assert (*inputs, targets[-1]) in pieces
            assert inputs[1:] == targets[:-1]


def test_a_perfect_model_is_perfect(path):
    task = Text(path, length=16, batch=8)
    for split in ("train", "valid"):
        batch = task.batch(0, split)
        assert task.loss(oracle(task, batch), batch).tolist() == [0.0] * len(batch)
        assert task.score(oracle(task, batch), batch).summary(categorical=True)["accuracy"] == 1.0


def test_batches_are_a_function_of_seed_and_step(path):
    usual = Text(path, length=16).batch(3).inputs
    assert torch.equal(Text(path, length=16).batch(3).inputs, usual)
    assert not torch.equal(Text(path, length=16, seed=1).batch(3).inputs, usual)
    assert not torch.equal(Text(path, length=16).batch(4).inputs, usual)
    # A curriculum takes shorter windows, and more places to begin them at.
    assert Text(path, length=16).batch(3, length=5).inputs.shape == (16, 5)


def test_windows_begin_anywhere(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(100)))
    task = Text(tmp_path / "a.bin", length=7, batch=2000)
    assert set(task.batch(0).inputs[:, 0].tolist()) == set(range(len(task.tokens["train"]) - 7))


@pytest.mark.parametrize("batch, length", [(1, 10), (3, 10), (4, 7), (5, 64)])
def test_an_evaluation_covers_the_held_out_part_once_and_in_order(path, batch, length):
    task = Text(path, length=length, batch=batch, eval_batches=None)
    tokens = task.tokens["valid"].tolist()
    inputs, targets = [], []
    for step in range(task.batches("valid")):
        part = task.batch(step, "valid")
        assert part.time == length
        assert part.mask.any(1).all()  # the last batch has fewer rows rather than empty ones
        inputs += part.inputs[part.mask].tolist()
        targets += part.targets[part.mask].tolist()
    assert inputs == tokens[:-1]
    assert targets == tokens[1:]
    limited = Text(path, length=length, batch=batch, eval_batches=2)
    assert limited.batches("valid") == 2
    assert torch.equal(limited.batch(1, "valid").inputs, task.batch(1, "valid").inputs)


def resets_of(batch):
    """The mask of resets; None stands for no reset, so that such a batch can be run by one kernel."""
    assert batch.reset is None or batch.reset.any()
    return torch.zeros_like(batch.mask) if batch.reset is None else batch.reset


@pytest.mark.parametrize("batch, length", [(1, 10), (3, 10), (4, 7), (5, 64)])
def test_carried_batches_are_the_text_read_on(path, batch, length):
    task = Text(path, length=length, batch=batch, carry=True)
    tokens = task.tokens["train"].tolist()
    pairs = len(tokens) - 1
    steps = 2 * pairs // length
    parts = [task.batch(step) for step in range(steps)]
    inputs, targets = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("inputs", "targets"))
    resets = torch.cat([resets_of(part) for part in parts], 1)
    for row in range(batch):
        begin = row * (pairs // batch)
        places = [(begin + place) % pairs for place in range(steps * length)]
        assert inputs[row].tolist() == [tokens[place] for place in places]
        assert targets[row].tolist() == [tokens[place + 1] for place in places]
        assert resets[row].tolist() == [place == 0 or index == 0 for index, place in enumerate(places)]
    assert all(part.mask.all() for part in parts)


@pytest.mark.parametrize("batch, length", [(1, 10), (3, 10), (7, 64)])
def test_a_carried_evaluation_covers_the_held_out_part_once(path, batch, length):
    task = Text(path, length=length, batch=batch, carry=True, eval_batches=None)
    tokens = task.tokens["valid"].tolist()
    parts = [task.batch(step, "valid") for step in range(task.batches("valid"))]
    rows = [[], []]
    for row in range(batch):
        for part in parts:
            rows[0] += part.inputs[row][part.mask[row]].tolist()
            rows[1] += part.targets[row][part.mask[row]].tolist()
    assert rows == [tokens[:-1], tokens[1:]]
    assert [resets_of(part).sum().item() for part in parts] == [batch] + [0] * (len(parts) - 1)


def test_a_short_text_gives_its_last_window_for_validation(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    task = Text(tmp_path / "a.txt", length=9, batch=2)
    assert bytes(task.tokens["valid"]) == b"qrstuvwxyz"
    assert bytes(task.tokens["train"]) == b"abcdefghijklmnop"
    assert task.decode(task.batch(0, "valid").inputs[0].tolist()) == "qrstuvwxy"


def test_penn_treebank_is_read_with_its_own_splits(tmp_path):
    for split, text in {
        "train": " the cat <unk> \n sat N \n",
        "valid": " the dog \n sat \n",
        "test": " cat sat \n \n",
    }.items():
        (tmp_path / f"ptb.{split}.txt").write_text(text)
    task = Text(tmp_path, "word", length=2, batch=1)
    assert task.splits == ("valid", "test")
    assert task.tokenizer.words == ["<unk>", "<eos>", "N", "cat", "sat", "the"]
    assert task.tokens["train"].tolist() == [5, 3, 0, 1, 4, 2, 1]
    assert task.tokens["valid"].tolist() == [5, 0, 1, 4, 1]
    assert task.decode(task.tokens["test"].tolist()) == "cat sat\n\n"


def test_text_is_encoded_and_decoded(path):
    task = Text(path, "char")
    assert task.decode(task.encode("the café")) == "the café"
    assert isinstance(task.encode("a")[0], int)
    # A tokenizer that is given is used as it is.
    assert Text(path, fit("char", ["abc"])).vocab == 4


def test_a_task_is_sent_by_its_arguments(path):
    task = Text(path, "char", length=9, batch=2, seed=4, carry=True, max_vocab=9, eval_batches=3)
    sent = pickle.dumps(task)
    assert len(sent) < 1000
    again = pickle.loads(sent)
    assert again.fingerprint == task.fingerprint
    assert torch.equal(again.batch(7).inputs, task.batch(7).inputs)
    assert again.batches("valid") == task.batches("valid") == 3


def test_fingerprints_are_of_the_symbols(path, tmp_path):
    usual = Text(path)
    assert Text(path, length=7, seed=3).fingerprint == usual.fingerprint
    (tmp_path / "same.txt").write_bytes(path.read_bytes())
    assert Text(tmp_path / "same.txt").fingerprint == usual.fingerprint
    (tmp_path / "same.txt").write_bytes(path.read_bytes()[:-1] + b"!")
    assert Text(tmp_path / "same.txt").fingerprint != usual.fingerprint
    assert Text(path, "char").fingerprint != usual.fingerprint


def by_counting(tokens):
    """Entropies from their definition, in plain Python."""
    ones, firsts, pairs = Counter(tokens), Counter(tokens[:-1]), Counter(itertools.pairwise(tokens))
    unigram = -sum(n / len(tokens) * math.log2(n / len(tokens)) for n in ones.values())
    bigram = -sum(n / (len(tokens) - 1) * math.log2(n / firsts[pair[0]]) for pair, n in pairs.items())
    return unigram, bigram


def test_what_was_read_is_said_in_a_line(path, tmp_path):
    task, size = Text(path, "char", length=16), len(path.read_bytes())
    total, held_out = sum(map(len, task.tokens.values())), len(task.tokens["valid"])
    assert total == len(path.read_bytes().decode()) < size
    share = f"{held_out:,} ({100 * held_out / total:.3g} %) held out"
    known = f"vocabulary of {task.vocab} (tokenizer char)"
    assert task.describe() == f"{path}: {size:,} bytes of text in 1 document; {total:,} symbols, {share}; {known}."
    assert f"{total:,} symbols, all of it scored; " in Text(path, "char", length=16, whole=True).describe()
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in {"a.txt": b"one ", "b.txt": b"two ", "c.bin": b"\0", "d.txt": b""}.items():
        (folder / name).write_bytes(100 * content)
    said = Text(folder, length=16).describe()
    assert ": 800 bytes of text in 2 documents; 802 symbols, 401 (50 %) held out; vocabulary of 256 " in said
    assert said.endswith("; skipped, having no text: 1; skipped, being binary or no files: 1, such as 'c.bin'.")
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "a line " * 9}) + '\n{"text": null}\n{"text": ""}\n')
    said = Text(tmp_path / "one.jsonl", length=4).describe()
    assert "in 1 document; " in said
    assert said.endswith("; skipped, having no text: 2.")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    assert (
        Text(tmp_path / "latin.txt", length=16)
        .describe()
        .endswith("; not UTF-8 text: its bytes are learned as they are.")
    )
    (tmp_path / "latin.txt").write_bytes(b"\xe9 " * 100)
    with pytest.raises(UsageError, match=r"latin.txt is not UTF-8 from its beginning \("):
        Text(tmp_path / "latin.txt", "char", length=16)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word"])
def test_baselines_are_counts(path, tokenizer):
    task = Text(path, tokenizer, length=16)
    for split in ("train", "valid"):
        tokens = task.tokens[split].tolist()
        found = task.baselines(split)
        assert (found.unigram, found.bigram) == pytest.approx(by_counting(tokens))
        assert found.symbols == len(tokens)
        text = task.tokenizer.decode_bytes(tokens)
        assert found.gzip == pytest.approx(8 * len(gzip.compress(text, 9)) / len(tokens), rel=0.01)


def test_no_bigram_model_gets_below_the_baseline(path):
    task = Text(path, length=16, batch=8, eval_batches=None)
    tokens = task.tokens["valid"].astype(np.int64)
    counts = np.zeros((256, 256))
    np.add.at(counts, (tokens[:-1], tokens[1:]), 1)
    table = torch.from_numpy(np.log(counts / counts.sum(1, keepdims=True).clip(1) + 1e-300)).float()
    scores = [task.score(lambda ids: table[ids], task.batch(step, "valid")) for step in range(task.batches("valid"))]
    best = sum(score.loss for score in scores) / sum(score.scored for score in scores) / math.log(2)
    assert best == pytest.approx(task.baselines("valid").bigram, rel=1e-5)


def test_baselines_look_at_the_beginning_of_a_long_text():
    tokens = np.frombuffer(b"ab" * 50 + b"z" * 1000, dtype=np.uint8)
    assert baselines(tokens, Byte(), limit=100)[:2] == pytest.approx((1.0, 0.0))
    assert entropy(np.zeros(5, dtype=np.int64)) == 0


def test_places_reach_beyond_31_bits():
    places = random_places(Key(1), 20_000, 10**10)
    assert places.min() >= 0
    assert places.max() < 10**10
    counts = np.bincount(places // 10**9, minlength=10)
    assert (np.abs(counts - 2000) < 5 * 2000**0.5).all()
    assert set(random_places(Key(1), 500, 3)) == {0, 1, 2}


def test_the_whole_of_a_text_is_scored(path, tmp_path):
    task = Text(path, length=16, batch=8, eval_batches=None, whole=True)
    assert (task.splits, sorted(task.tokens)) == (("valid",), ["valid"])
    assert bytes(task.tokens["valid"]) == path.read_bytes()
    assert (
        sum(task.batch(index, "valid").scored for index in range(task.batches("valid"))) == len(path.read_bytes()) - 1
    )
    assert sorted(Text(path, length=16).tokens) == ["train", "valid"]  # and has a place of its own in the cache
    short = tmp_path / "short.txt"
    short.write_text("seventeen symbols")
    assert Text(short, length=16, whole=True, carry=True).batch(0, "valid").scored == 16
    assert Text(short, length=99, whole=True).batch(0, "valid").scored == 16
    short.write_text("s")
    with pytest.raises(UsageError, match="short.txt, which has 1 symbols; 2 are needed. Give more text"):
        Text(short, whole=True)
    folder = tmp_path / "several"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text(name * 9)
    assert bytes(Text(folder, length=3, whole=True).tokens["valid"]) == b"aaaaaaaaa\nbbbbbbbbb\n"
    for name in ("train", "valid"):  # a folder that says what is held out is believed
        (folder / f"my.{name}.txt").write_text(name)
    assert bytes(Text(folder, length=3, whole=True).tokens["valid"]) == b"valid"


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda path: Text(path, length=0), "length=0 must be greater than zero"),
        (lambda path: Text(path, eval_batches=0), "eval_batches=0"),
        (lambda path: Text(path.parent / "none"), "path='.*none' does not exist"),
        (
            lambda path: Text(path, length=10**6),
            r"length=1000000 is too long for .*text.txt.*: its end is held out for val",
        ),
        (lambda path: Text(path, "words"), "tokenizer='words' is unknown. Did you mean \"word\""),
        (lambda path: Text(path, Byte(), max_vocab=9), "max_vocab=9 cannot change a finished tokenizer"),
        (lambda path: Text(path).batch(0, "test"), "split='test' is none of"),
        (lambda path: Text(path).batch(-1), "step=-1 must be 0 or more"),
        (
            lambda path: Text(path, length=16).batch(999, "valid"),
            r"step=999 must be 0 or more and below \d+",
        ),
        (lambda path: Text(path, length=16).batch(0, length=17), r"length=17 must lie in \[1, 16\]"),
        (lambda path: Text(path, carry=True).batch(0, length=5), "length=5 cannot change with carry=True"),
        (lambda path: Text(path, batch=10**6, carry=True), "batch=1000000 has more rows than"),
        (lambda path: baselines(np.zeros(1), Byte()), "tokens has 1 symbols"),
    ],
)
def test_errors(path, act, message):
    with pytest.raises(UsageError, match=message) as caught:
        act(path)
    assert "\n" not in str(caught.value)


def test_a_split_shorter_than_a_window_is_named(tmp_path):
    for split, text in {"train": "text " * 10, "valid": "text ", "test": "t"}.items():
        (tmp_path / f"{split}.txt").write_text(text)
    with pytest.raises(UsageError, match=r"length=9 is too long for the split 'valid' of .*Give length=4 or less"):
        Text(tmp_path, length=9)
    with pytest.raises(UsageError, match=r"length=3 is too long for the split 'test' of .*Give more text"):
        Text(tmp_path, length=3)


def test_a_split_that_is_not_there_is_named_everywhere(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("to be or not to be " * 50)
    task = Text(path, length=8, batch=2)
    for call in (task.batches, task.baselines, lambda split: task.batch(0, split)):
        with pytest.raises(UsageError, match="split='tets' is none of the task's"):
            call("tets")
    with pytest.raises(UsageError, match="split='train' is none of the task's"):
        Text(path, length=8, batch=2, whole=True).batch(0)


def test_nul_bytes_and_cut_characters_are_no_text(tmp_path):
    (tmp_path / "wide.txt").write_bytes("to be or not to be ".encode("utf-16-le") * 50)
    with pytest.raises(UsageError, match="NUL bytes"):
        Text(tmp_path / "wide.txt", "char", length=8, batch=2)
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text("to be or not to be " * 50)
    (tmp_path / "texts" / "cut.txt").write_bytes("é".encode() * 20 + b"\xc3")
    assert Text(tmp_path / "texts", "char", length=8, batch=2).vocab < 12
