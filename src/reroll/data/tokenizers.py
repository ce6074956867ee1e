"""Text into symbols and back: bytes, characters, words, byte pairs of the text or those of GPT-2.

tokenizer = fit("char", texts, max_vocab=100)     texts: pieces of the training part, in order
symbols = tokenizer.encode("text")                a numpy array of the smallest unsigned type that holds them
text = tokenizer.decode(symbols)
tokenizer == from_dict(tokenizer.to_dict())       a run folder keeps the dictionary as JSON
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reroll.data.bytepairs import GPT2, BytePairs, train
from reroll.data.symbols import Symbols, Tokenizer, pieces, symbol_dtype
from reroll.errors import UsageError, did_you_mean, require_positive

__all__ = ["GPT2", "Byte", "BytePairs", "Char", "Tokenizer", "Word", "fit", "from_dict"]

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
# Counting keeps at most this many words; the rarest, far from any vocabulary, are dropped.
COUNTED_WORDS = 1 << 21


class Byte(Tokenizer):
    """The 256 bytes of UTF-8.

    Example:
        >>> Byte().encode("é!").tolist(), Byte().decode([195, 169, 33, 195])
        ([195, 169, 33], 'é!�')
    """

    name, size, separator, any_bytes = "byte", 256, ord("\n"), True

    def encode(self, text: str) -> Symbols:
        return np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).copy()

    def decode_bytes(self, symbols: Sequence[int] | Symbols) -> bytes:
        return np.asarray(symbols, dtype=np.uint8).tobytes()


class Char(Tokenizer):
    """The characters of a training text, the most frequent first; symbol 0 is every other character.

    Args:
        characters: the known characters, in the order of their symbols 1, 2, …

    Example:
        >>> tokenizer = fit("char", ["hello"], max_vocab=3)
        >>> tokenizer.encode("hello").tolist(), tokenizer.decode([0, 2, 1, 1])
        ([0, 2, 1, 1, 0], '�ell')
    """

    name, has_unknown = "char", True

    def __init__(self, characters: str) -> None:
        self.characters = characters
        self.size = len(characters) + 1
        codes = _codes(characters)
        self._symbols = np.zeros(int(codes.max(initial=0)) + 2, dtype=symbol_dtype(self.size))
        self._symbols[codes] = np.arange(1, self.size)
        self._codes = np.concatenate([[0xFFFD], codes]).astype(np.uint32)
        self.separator = characters.find("\n") + 1 or None

    def encode(self, text: str) -> Symbols:
        # The last entry of the table belongs to no character: it stays 0, for all codes beyond.
        return self._symbols[np.minimum(_codes(text), len(self._symbols) - 1)]

    def unknown(self, text: str) -> list[str]:
        # � stands for symbol 0.
        return [character for character in dict.fromkeys(text) if character not in "�" + self.characters]

    def decode_bytes(self, symbols: Sequence[int] | Symbols) -> bytes:
        codes = self._codes[np.asarray(symbols, dtype=np.int64)]
        return codes.tobytes().decode("utf-32-le", "surrogatepass").encode("utf-8", "replace")

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "characters": self.characters}


class Word(Tokenizer):
    """The words of a training text between white space, the most frequent first, and <eos> at the end of each line.

    Symbol 0 is <unk>, for every other word, and symbol 1 is <eos>. <unk> in a text, as in Penn Treebank, is symbol
    0. White space is lost: decoding puts one space after a word.

    Args:
        words: the known words, in the order of their symbols 2, 3, …

    Example:
        >>> tokenizer = fit("word", ["the cat the dog\\n"], max_vocab=4)
        >>> tokenizer.encode("the dog\\n").tolist(), tokenizer.decode([2, 0, 3, 1, 2])
        ([2, 0, 1], 'the <unk> cat\\nthe')
    """

    name, separator, has_unknown = "word", 1, True

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [UNKNOWN, END_OF_LINE, *words]
        self.size = len(self.words)
        self._symbols = {word: symbol for symbol, word in enumerate(self.words)}
        self._texts = [word.encode("utf-8", "replace") + b" " for word in self.words]
        self._texts[1] = b"\n"

    def encode(self, text: str) -> Symbols:
        words, symbols = split_words(text), self._symbols
        return np.fromiter((symbols.get(word, 0) for word in words), symbol_dtype(self.size), len(words))

    def unknown(self, text: str) -> list[str]:
        return [word for word in dict.fromkeys(split_words(text)) if word not in self._symbols]

    def decode_bytes(self, symbols: Sequence[int] | Symbols) -> bytes:
        return b"".join([self._texts[symbol] for symbol in np.asarray(symbols).tolist()])

    def decode(self, symbols: Sequence[int] | Symbols) -> str:
        return self.decode_bytes(symbols).decode("utf-8", "replace").replace(" \n", "\n").removesuffix(" ")

    def cut(self, text: str) -> int:
        return last_space(text)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "words": self.words[2:]}


TOKENIZERS: dict[str, type[Byte] | type[Char] | type[Word] | type[BytePairs] | type[GPT2]] = {
    tokenizer.name: tokenizer for tokenizer in (Byte, Char, Word, BytePairs, GPT2)
}
"""Every tokenizer, by its name on the command line."""
DEFAULT_SIZES = {"char": 1024, "word": 10_000, "bpe": 8192}


def fit(name: str, texts: Iterable[str] = (), max_vocab: int | None = None) -> Tokenizer:
    """Return a tokenizer, with the vocabulary of a training text where it has one.

    Symbols are in order of frequency, then of code point, so the same text gives the same symbols everywhere.

    Args:
        name: "byte", "char", "word", "bpe" or "gpt2".
        texts: the training text, cut anywhere; read by `char`, `word` and `bpe` alone.
        max_vocab: the largest size of the vocabulary, special symbols included. None: 1024 characters, 10,000 words
            (which is all of Penn Treebank's) or 8192 byte pairs.

    Raises:
        UsageError: if the name is unknown, or the vocabulary not one that can be chosen.
    """
    if name not in TOKENIZERS:
        raise UsageError(f"tokenizer={name!r} is unknown.{did_you_mean(name, TOKENIZERS)}")
    if name not in DEFAULT_SIZES:
        if max_vocab is not None:
            raise UsageError(f"max_vocab={max_vocab} has no meaning for tokenizer={name!r}; leave it out.")
        return GPT2() if name == "gpt2" else Byte()
    require_positive(max_vocab=max_vocab)
    size = DEFAULT_SIZES[name] if max_vocab is None else max_vocab
    if size < (least := 257 if name == "bpe" else 3):
        raise UsageError(f"max_vocab={max_vocab} leaves no room beside the special symbols; give at least {least}.")
    if name == "bpe":
        return train(texts, size)
    if name == "char":
        return Char("".join(_most_frequent(_count_characters(texts), size - 1)))
    words = _count_words(texts)
    del words[UNKNOWN], words[END_OF_LINE]
    return Word(_most_frequent(words, size - 2))


def from_dict(saved: dict[str, Any]) -> Tokenizer:
    """Return the tokenizer a dictionary of `to_dict` describes.

    Example:
        >>> from_dict({"name": "char", "characters": "ab"}).encode("abc").tolist()
        [1, 2, 0]
    """
    try:
        options = dict(saved)
        return TOKENIZERS[options.pop("name")](**options)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"tokenizer={str(saved)[:60]} is not known to this version of reroll ({error!r}).") from None


def split_words(text: str) -> list[str]:
    """Return the words of a text, with <eos> for every newline."""
    return text.replace("\n", f" {END_OF_LINE} ").split()


def last_space(text: str) -> int:
    """Return the position after the last white space of a text, 0 if there is none."""
    if not text or text[-1].isspace():
        return len(text)
    return len(text) - len(text.rsplit(None, 1)[-1])


def _count_characters(texts: Iterable[str]) -> Counter[str]:
    counts = np.zeros(0x110000, dtype=np.int64)
    for text in texts:
        present, times = np.unique(_codes(text), return_counts=True)
        counts[present] += times
    return Counter({chr(code): int(counts[code]) for code in np.flatnonzero(counts)})


def _count_words(texts: Iterable[str]) -> Counter[str]:
    counts = Counter[str]()
    for piece in pieces(texts, last_space):
        counts.update(split_words(piece))
        if len(counts) > COUNTED_WORDS:
            counts = Counter(dict(counts.most_common(COUNTED_WORDS // 2)))
    return counts


def _most_frequent(counts: Counter[str], size: int) -> list[str]:
    return sorted(counts, key=lambda item: (-counts[item], item))[:size]


def _codes(text: str) -> npt.NDArray[np.uint32]:
    """The code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
