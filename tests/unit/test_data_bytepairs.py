"""Byte pairs of a text of one's own: any bytes come back, and merges are those that counting by hand finds."""

import copy
import itertools
import json
import random
import re
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reroll.data.bytepairs import byte_letters
from reroll.data.cache import fit_to
from reroll.data.corpus import find, passages
from reroll.data.prepare import encode
from reroll.data.symbols import encode_chunks
from reroll.data.text import Text
from reroll.data.tokenizers import BytePairs, fit, from_dict
from reroll.data.tokens import ABOUT, TokenBatches, read_shard
from reroll.errors import UsageError

TEXT = "naïve café — 東京 🜁 it's\r\nthe  end,\tthe end.\n\n  indented 12345\n" * 5
# GPT-2's own expression, with classes that Python's `re` knows.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("tokenizers", reason="byte pairs need the extra `data`")


@pytest.fixture(scope="module")
def known(library):
    return fit("bpe", [TEXT], max_vocab=330)


def pairs_by_hand(text, size):
    """The merges as numbers of symbols: the most frequent pair, of several the first; within pieces of the text."""
    order = [*map(ord, byte_letters()), *range(1000, 10_000)]
    words = Counter(tuple(piece.encode()) for piece in re.findall(PIECES, text))
    merges = []
    while 257 + len(merges) < size:
        counts = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                counts[pair] += times
        best = min(counts, key=lambda pair: (-counts[pair], *(order[s] for s in pair)), default=None)
        if best is None or counts[best] < 2:
            break
        words = Counter({joined(word, best, 256 + len(merges)): times for word, times in words.items()})
        merges.append(best)
    return merges


def joined(word, pair, symbol):
    result = []
    for letter in word:
        if result and (result[-1], letter) == pair:
            result[-1] = symbol
        else:
            result.append(letter)
    return tuple(result)


@pytest.mark.parametrize("chunk", [7, 64, 10**6])
def test_merges_are_those_found_by_hand(library, chunk):
    """Letters that are drawn, without a pair of equal ones, whose overlaps could be counted in two ways."""
    draw = random.Random(chunk)
    words = ["".join(draw.choice("abcdeé") + draw.choice("xyz7") for _ in range(draw.randint(1, 4))) for _ in range(40)]
    text = "".join(draw.choice(["", " ", ", ", "\n"]) + word for word in draw.choices(words, k=700))
    tokenizer = fit("bpe", [text[i : i + chunk] for i in range(0, len(text), chunk)], max_vocab=400)
    merges = pairs_by_hand(text, 400)
    assert len(merges) > 60
    texts = [bytes([byte]) for byte in range(256)]
    for left, right in merges:
        texts.append(texts[left] + texts[right])
    assert [tokenizer.decode_bytes([symbol]) for symbol in range(tokenizer.size - 1)] == texts
    assert tokenizer.size == 257 + len(merges)


def test_what_is_encoded_is_merged_in_order(known):
    """Each word by the first merge that applies, until none does."""
    symbols = {known.decode_bytes([symbol]): symbol for symbol in range(known.size - 1)}
    expected = []
    for piece in re.findall(PIECES, TEXT):
        word = tuple(piece.encode())
        for merge in known.merges:
            left, right = (symbols[known.decode_bytes([known._symbols[part]])] for part in merge.split(" "))
            word = joined(word, (left, right), known._symbols[merge.replace(" ", "")])
        expected += word
    assert known.encode(TEXT).tolist() == expected
    assert len(expected) < len(TEXT.encode()) / 2


@settings(max_examples=150, deadline=None)
@given(st.binary(), st.integers(1, 5))
@example(b"a\0\xff\xed\xa0\x80 \xe6\x9d", 1)
def test_any_bytes_come_back(known, data, chunk):
    """UTF-8 or not, whole or in chunks; and no bytes are the symbol between documents."""
    parts = list(encode_chunks(known, [data[i : i + chunk] for i in range(0, len(data), chunk)], "text"))
    symbols = np.concatenate([*parts, np.empty(0, np.uint16)])
    assert known.decode_bytes(symbols) == data
    assert known.separator not in symbols
    assert symbols.tolist() == known.encode(data.decode("utf-8", "surrogateescape")).tolist()


@settings(max_examples=150, deadline=None)
@given(st.text(), st.integers(1, 5))
@example("the<|endoftext|> \x85 \u3000 end\u2028 x \x1c the", 1)
def test_any_text_comes_back_and_chunks_do_not_show(known, text, chunk):
    assert known.decode(known.encode(text)) == text
    parts = list(encode_chunks(known, [text.encode()[i : i + chunk] for i in range(0, len(text.encode()), chunk)], "x"))
    assert np.concatenate([*parts, []]).tolist() == known.encode(text).tolist()


def test_they_are_restored_and_decode_without_the_package(known, monkeypatch):
    saved = json.loads(json.dumps(known.to_dict()))
    assert from_dict(saved) == known == copy.deepcopy(known)
    assert from_dict(saved).encode(TEXT).tolist() == known.encode(TEXT).tolist()
    assert known.encode(TEXT).dtype == np.uint16
    assert known.decode([known.separator]) == "\n"
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    again = from_dict(saved)
    assert (again.size, again.decode(known.encode(TEXT))) == (known.size, TEXT)
    for act in (lambda: again.encode("a"), lambda: fit("bpe", ["a"])):
        with pytest.raises(UsageError, match=re.escape("pip install 'reroll[data]'; or take tokenizer='byte'")):
            act()
    assert again.encode("").tolist() == []


def test_the_vocabulary_is_as_large_as_the_text_allows(library, monkeypatch):
    assert fit("bpe", [], max_vocab=5000).size == 257
    assert fit("bpe", ["abcd"], max_vocab=5000).size == 257  # no two are side by side twice
    assert fit("bpe", ["ab\ud800\udc80ab ab"], max_vocab=5000).size == 258  # but " ab" is there once
    assert fit("bpe", ["xy " * 9] * 2, max_vocab=258).merges == ["x y"]
    monkeypatch.setattr("reroll.data.bytepairs.TRAINED", 6)
    assert fit("bpe", ["ab a", "b ac ac ac ac"], max_vocab=5000).merges == ["a b"]


def test_two_merges_may_make_the_same_symbol(library):
    """ab + c and a + bc: the second one is no new symbol."""
    tokenizer = BytePairs(["a b", "b c", "ab c", "a bc", "abc d"])
    assert tokenizer.size == 256 + 4 + 1
    assert tokenizer.encode("abcd").tolist() == [259]
    assert tokenizer.encode("bcd").tolist() == [257, 100]


@pytest.fixture(scope="module")
def texts(library, tmp_path_factory):
    """Twelve documents of random words, one of them no UTF-8."""
    folder, draw = tmp_path_factory.mktemp("texts"), random.Random(0)
    for i in range(12):
        words = " ".join(draw.choices(["to", "be", "or", "not", "that", "is", "東京", "<|endoftext|>\n"], k=30 + 9 * i))
        (folder / f"{i}.txt").write_bytes(words.encode() + b"\0\xff" * (i == 7))
    encode(folder, folder / ".shards", "bpe", max_vocab=280, shard=97)  # most documents are longer than a shard
    return folder


def test_shards_of_byte_pairs(texts):
    """Every document is its bytes after a symbol that is nowhere else; the bytes of a shard are those of its text."""
    shards, about = texts / ".shards", json.loads((texts / ".shards" / ABOUT).read_text())
    tokenizer = from_dict(about["tokenizer"])
    assert (about["vocab"], about["document"]) == (280, 279) == (tokenizer.size, tokenizer.separator)
    assert tokenizer == fit_to(find(texts), "bpe", 280)
    for split, label in (("train", "train"), ("valid", "val")):
        files = sorted(name for name in about["files"] if f"_{label}_" in name)
        tokens = np.concatenate([read_shard(shards / name) for name in files])
        documents = [b"".join(p.chunks()) for p in passages(find(texts)) if p.split == split]
        begins = np.flatnonzero(tokens == 279)
        assert begins[0] == 0
        assert [tokenizer.decode_bytes(part[1:]) for part in np.split(tokens, begins[1:])] == documents
        for name in files:
            part = read_shard(shards / name)
            assert about["files"][name]["bytes"] == len(tokenizer.decode_bytes(part[part != 279]))
    task = TokenBatches(shards, length=8, batch=1, valid_tokens=None)
    assert task.valid_bytes == sum(len(document) for document in documents)
    part = tokenizer.decode_bytes(tokens[1:41][tokens[1:41] != 279])
    assert TokenBatches(shards, length=8, batch=1, valid_tokens=40).valid_bytes == len(part)
    assert b"".join(documents).startswith(part)


def test_a_run_of_byte_pairs_is_sampled_and_scored(texts, cli, tmp_path, monkeypatch):
    assert cli("data", "prepare", "tokens", "--path", texts, "--tokenizer", "bpe", "--max-vocab", 270,
               "--to", tmp_path / "shards").code == 0  # fmt: skip
    assert json.loads((tmp_path / "shards" / ABOUT).read_text())["vocab"] == 270
    run = tmp_path / "run"
    options = ("--tokenizer", "bpe", "--set", "task.max_vocab=270", "model.embed=4", "run.threads=1")
    small = ("--length", 8, "--batch", 2, "--hidden", 8, "--steps", 2, "--probes", 2, "--run-dir", run)
    assert cli("train", "text", "--path", texts, *small, *options).code == 0
    sampled = cli("sample", run, "--prompt", "to be", "--length", 20)
    assert sampled.code == 0
    assert sampled.out.startswith("to be")
    assert cli("eval", run).code == 0
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "pip install 'reroll[data]'" in cli("sample", run, "--prompt", "to be").error


def test_windows_of_byte_pairs(texts):
    task = Text(texts, "bpe", length=16, batch=3, max_vocab=280)
    assert task.vocab == 280
    assert task.tokenizer.decode_bytes(task.tokens["valid"]) == b"\n".join(
        [b"".join(p.chunks()) for p in passages(find(texts)) if p.split == "valid"] + [b""]
    )
