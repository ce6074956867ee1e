"""Tokenizers: text comes back, chunks do not show, vocabularies are in a stated order."""

import json
import re
import sys
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reroll.data.symbols import encode_chunks, symbol_dtype
from reroll.data.tokenizers import Byte, Char, Tokenizer, Word, fit, from_dict
from reroll.errors import UsageError

TEXT = "naïve café — 東京 🜁 it's\r\nthe  end,\tthe end.\n\n  indented 12345\n" * 5
# GPT-2's own expression, with classes that Python's `re` knows.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"


class FakeEncoding:
    """What tiktoken's encoding does, with one symbol for every piece and every byte of its table learned on the way."""

    def __init__(self):
        self.pieces = []

    def encode_ordinary(self, text):
        found = re.findall(PIECES, text)
        assert "".join(found) == text
        self.pieces += [piece for piece in dict.fromkeys(found) if piece not in self.pieces]
        return [self.pieces.index(piece) for piece in found]

    def decode_bytes(self, symbols):
        return "".join(self.pieces[symbol] for symbol in symbols).encode()


@pytest.fixture
def tiktoken(monkeypatch):
    module = types.ModuleType("tiktoken")
    encoding = FakeEncoding()
    module.get_encoding = lambda name: encoding
    monkeypatch.setitem(sys.modules, "tiktoken", module)
    return module


def tokenizers(text):
    return [fit("byte"), fit("char", [text]), fit("char", [text], max_vocab=6), fit("word", [text], max_vocab=9)]


def in_chunks(data, size):
    return [data[begin : begin + size] for begin in range(0, len(data), size)]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("which", range(4))
def test_chunks_do_not_show(which, chunk):
    tokenizer = tokenizers(TEXT)[which]
    parts = list(encode_chunks(tokenizer, in_chunks(TEXT.encode(), chunk), "text"))
    assert np.concatenate(parts).tolist() == tokenizer.encode(TEXT).tolist()


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1000])
def test_chunks_do_not_show_in_byte_pairs(tiktoken, chunk):
    tokenizer = fit("gpt2")
    whole = tokenizer.encode(TEXT)
    parts = list(encode_chunks(tokenizer, in_chunks(TEXT.encode(), chunk), "text"))
    assert np.concatenate(parts).tolist() == whole.tolist()
    assert tokenizer.decode(whole) == TEXT
    assert tokenizer.size == 50257
    assert whole.dtype == np.uint16
    assert from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer


@settings(max_examples=60, deadline=None)
@given(st.text(), st.integers(1, 5))
def test_chunks_of_any_text_do_not_show(text, chunk):
    text = text.replace("\0", "0")
    data = text.encode()
    for tokenizer in tokenizers(text + "some words\n"):
        parts = list(encode_chunks(tokenizer, in_chunks(data, chunk), "text"))
        assert np.concatenate([*parts, []]).tolist() == tokenizer.encode(text).tolist()


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    assert Byte().decode(Byte().encode(text)) == text
    tokenizer = fit("char", [text], max_vocab=10**6)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    text = text.replace("<eos>", "eos")  # to a word tokenizer it is the end of a line
    words = fit("word", [text], max_vocab=10**6)
    assert words.decode(words.encode(text)).split() == text.split()
    assert words.encode(text).max(initial=1) < words.size


@settings(max_examples=100, deadline=None)
@given(st.binary())
def test_any_bytes_can_be_decoded(data):
    assert Byte().decode(list(data)) == data.decode("utf-8", "replace")
    assert Byte().decode_bytes(list(data)) == data


@pytest.mark.parametrize("which", range(4))
def test_a_tokenizer_is_restored_from_its_dictionary(which):
    tokenizer = tokenizers(TEXT)[which]
    again = from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert isinstance(again, Tokenizer)
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert again.size == tokenizer.size
    assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
    assert again.decode(again.encode(TEXT)) == tokenizer.decode(tokenizer.encode(TEXT))


def test_characters_are_in_order_of_frequency_then_code_point():
    text = "bbb" + "ccc" + "aa" + "éé" + "z"
    tokenizer = fit("char", [text[:4], text[4:]])
    assert tokenizer.characters == "bcaéz"
    assert tokenizer.size == 6
    assert fit("char", [text], max_vocab=4).characters == "bca"
    assert tokenizer.encode("azx🜁").tolist() == [3, 5, 0, 0]
    assert tokenizer.decode([3, 0, 4]) == "a�é"


def test_words_are_in_order_of_frequency_then_code_point():
    tokenizer = fit("word", ["the cat a", "nd the dog\nand the c", "at\n"])
    assert tokenizer.words == ["<unk>", "<eos>", "the", "and", "cat", "dog"]
    assert fit("word", ["b a b a c"], max_vocab=4).words[2:] == ["a", "b"]
    assert tokenizer.encode("the bird\nand\n").tolist() == [2, 0, 1, 3, 1]
    assert tokenizer.decode([2, 0, 1, 3, 1]) == "the <unk>\nand\n"


def test_words_of_penn_treebank_know_their_own_unk():
    tokenizer = fit("word", [" no it was n't <unk> N \n"])
    assert "<unk>" not in tokenizer.words[1:]
    assert tokenizer.encode(" it <unk> \n").tolist()[1:] == [0, 1]


def test_counting_forgets_rare_words_only(monkeypatch):
    monkeypatch.setattr("reroll.data.tokenizers.COUNTED_WORDS", 20)
    texts = [f"the cat w{number} " for number in range(200)]
    assert set(fit("word", texts, max_vocab=4).words[2:]) == {"the", "cat"}


@pytest.mark.parametrize("size, dtype", [(2, "<u1"), (256, "<u1"), (257, "<u2"), (65536, "<u2"), (65537, "<u4")])
def test_symbols_take_as_few_bytes_as_they_can(size, dtype):
    assert symbol_dtype(size) == np.dtype(dtype)


def test_encodings_are_of_the_smallest_type():
    assert Byte().encode("a").dtype == np.uint8
    assert Char("".join(map(chr, range(300, 700)))).encode("a").dtype == np.uint16
    assert Word(["a"]).encode("a b").dtype == np.uint8


def test_lone_surrogates_do_not_stop_an_encoder():
    # json.loads and os.fsdecode both make them.
    assert Byte().decode(Byte().encode("a\ud800")) == "a?"
    assert fit("char", ["a\ud800"]).decode([1, 2]) == "a?"


def consume(tokenizer, *chunks):
    return list(encode_chunks(tokenizer, chunks, "f.txt"))


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda: fit("bytes"), "tokenizer='bytes' is unknown. Did you mean \"byte\""),
        (lambda: from_dict({"name": "bpe"}), "bpe.* is not known to this version of reroll"),
        (lambda: from_dict({"name": "bpe", "merges": ["ab c"]}), "bpe.* is not known to this version of reroll"),
        (lambda: from_dict({"name": "bpe", "merges": ["a"]}), "bpe.* is not known to this version of reroll"),
        (lambda: from_dict({"name": "bpe", "merges": [3]}), "bpe.* is not known to this version of reroll"),
        (lambda: fit("bpe", max_vocab=256), "max_vocab=256 leaves no room .*at least 257"),
        (lambda: fit("byte", max_vocab=300), "max_vocab=300 has no meaning for tokenizer='byte'"),
        (lambda: fit("char", ["a"], max_vocab=0), "max_vocab=0 must be greater than zero"),
        (lambda: fit("word", ["a"], max_vocab=2), "max_vocab=2 leaves no room"),
        (lambda: consume(Char("a"), b"aa\xc3", b"a"), "path=f.txt is not UTF-8 after 'aa'.*tokenizer='byte'"),
        (lambda: consume(Char("a"), b"aa\xff"), "path=f.txt is not UTF-8 after 'aa'"),
        (lambda: consume(Char("a"), b"aa\xc3"), "path=f.txt is not UTF-8"),
    ],
)
def test_errors(act, message):
    with pytest.raises(UsageError, match=message):
        act()


def test_byte_pairs_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UsageError, match=re.escape("pip install 'reroll[data]'; or take tokenizer='byte'")):
        fit("gpt2")


def test_byte_pairs_without_a_network(tiktoken):
    def unreachable(name):
        raise ConnectionError("no route")

    tiktoken.get_encoding = unreachable
    with pytest.raises(UsageError, match=r"could not fetch its table \(ConnectionError\).*TIKTOKEN_CACHE_DIR.*'byte'"):
        fit("gpt2")


def test_what_a_tokenizer_does_not_know_becomes_symbol_0():
    known = "the cat sat\n"
    for name, text, unknown in (
        ("char", "a cat, €5 �", [",", "€", "5"]),  # � is what symbol 0 is shown as
        ("word", "the dog sat <unk> dog ran\n", ["dog", "ran"]),
        ("byte", "€", []),
    ):
        tokenizer = fit(name, [known])
        assert tokenizer.unknown(text) == unknown
        assert tokenizer.unknown(known) == []
        assert all((tokenizer.encode(part) == 0).all() for part in unknown)
        assert tokenizer.has_unknown == (name != "byte")
