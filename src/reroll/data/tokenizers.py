"""Text into symbols and back: bytes, characters, words, or the byte pairs of GPT-2.

    tokenizer = fit("char", texts, max_vocab=100)     texts: pieces of the training part, in order
    symbols = tokenizer.encode("text")                a numpy array of the smallest unsigned type that holds them
    text = tokenizer.decode(symbols)
    tokenizer == from_dict(tokenizer.to_dict())       a run folder keeps the dictionary as JSON

A text need not be in memory as a whole: `encode_chunks` cuts it only where `tokenizer.cut` says that
encode(a + b) = encode(a) + encode(b), so the symbols do not depend on the size of the chunks.
"""

from __future__ import annotations

import codecs
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reroll.errors import UsageError, did_you_mean, require_positive

Symbols = npt.NDArray[Any]

UNKNOWN, END_OF_LINE = "<unk>", "<eos>"
# Counting keeps at most this many words; the rarest, far from any vocabulary, are dropped.
COUNTED_WORDS = 1 << 21


class Tokenizer(ABC):
    """A map between text and symbols 0 … size − 1.

    Attributes a subclass sets: `name`, `size`, `separator`, the symbol put after each of several documents (None if
    the vocabulary has none), and `has_unknown`, True if symbol 0 is everything that is not in the vocabulary.
    """

    name: str
    size: int
    separator: int | None
    has_unknown: bool = False

    @abstractmethod
    def encode(self, text: str) -> Symbols:
        """Return the symbols of a text, as an array of `symbol_dtype(size)`."""

    @abstractmethod
    def decode_bytes(self, symbols: Sequence[int] | Symbols) -> bytes:
        """Return the text of symbols as UTF-8, cut anywhere: the bytes of parts are parts of the bytes."""

    def cut(self, text: str) -> int:
        """Return the last position at which the text can be cut without changing its symbols, whatever comes next."""
        return len(text)

    def to_dict(self) -> dict[str, Any]:
        """Return the definition, ready for JSON; `from_dict` reads it."""
        return {"name": self.name}

    def decode(self, symbols: Sequence[int] | Symbols) -> str:
        """Return the text of symbols. Invalid UTF-8, which a model may generate, becomes �."""
        return self.decode_bytes(symbols).decode("utf-8", "replace")

    def unknown(self, text: str) -> list[str]:
        """Return the parts of a text that have no symbol of their own and become symbol 0, each once, in order."""
        return []

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.name, self.size))


class Byte(Tokenizer):
    """The 256 bytes of UTF-8.

    Example:
        >>> Byte().encode("é!").tolist(), Byte().decode([195, 169, 33, 195])
        ([195, 169, 33], 'é!�')
    """

    name, size, separator = "byte", 256, ord("\n")

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


class GPT2(Tokenizer):
    """The 50,257 byte pairs of GPT-2, by tiktoken (extra `data`); symbol 50256 ends a document.

    Raises:
        UsageError: if tiktoken is not installed, or its table neither cached nor available.
    """

    name, size, separator = "gpt2", 50257, 50256

    def __init__(self) -> None:
        try:
            import tiktoken

            self._encoding = tiktoken.get_encoding("gpt2")
        except ImportError:
            raise UsageError(
                "tokenizer='gpt2' needs tiktoken: pip install 'reroll[data]'; or take tokenizer='byte', which needs "
                "nothing."
            ) from None
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            raise UsageError(
                f"tokenizer='gpt2' could not fetch its table ({type(error).__name__}): load it once with a network and "
                "TIKTOKEN_CACHE_DIR set, then keep that folder; or take tokenizer='byte', which needs no network."
            ) from None

    def encode(self, text: str) -> Symbols:
        # encode_ordinary: <|endoftext|> in a text is just these letters.
        return np.asarray(self._encoding.encode_ordinary(text), dtype=symbol_dtype(self.size))

    def decode_bytes(self, symbols: Sequence[int] | Symbols) -> bytes:
        return self._encoding.decode_bytes(np.asarray(symbols).tolist())

    def cut(self, text: str) -> int:
        # GPT-2 first cuts text by a regular expression whose matches have white space only in front, so a border
        # before a space that follows a letter is always one of theirs. Near the end there nearly always is one.
        for begin in (max(len(text) - 1000, 0), 0):
            borders = [match.end() - 1 for match in re.finditer(r"\S[ \n]", text[begin:])]
            if borders:
                return begin + borders[-1]
        return 0


TOKENIZERS: dict[str, type[Byte] | type[Char] | type[Word] | type[GPT2]] = {
    tokenizer.name: tokenizer for tokenizer in (Byte, Char, Word, GPT2)
}
"""Every tokenizer, by its name on the command line."""
DEFAULT_SIZES = {"char": 1024, "word": 10_000}


def fit(name: str, texts: Iterable[str] = (), max_vocab: int | None = None) -> Tokenizer:
    """Return a tokenizer, with the vocabulary of a training text where it has one.

    Symbols are in order of frequency, then of code point, so the same text gives the same symbols everywhere.

    Args:
        name: "byte", "char", "word" or "gpt2".
        texts: the training text, cut anywhere; read by `char` and `word` alone.
        max_vocab: the largest size of the vocabulary, special symbols included. None: 1024 characters or 10,000 words
            (which is all of Penn Treebank's).

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
    if size < 3:
        raise UsageError(f"max_vocab={max_vocab} leaves no room beside the special symbols; give at least 3.")
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


def symbol_dtype(size: int) -> np.dtype[Any]:
    """Return the smallest little-endian unsigned type for symbols below `size`: 1, 2 or 4 bytes."""
    return np.dtype("<u1" if size <= 1 << 8 else "<u2" if size <= 1 << 16 else "<u4")


def split_words(text: str) -> list[str]:
    """Return the words of a text, with <eos> for every newline."""
    return text.replace("\n", f" {END_OF_LINE} ").split()


def last_space(text: str) -> int:
    """Return the position after the last white space of a text, 0 if there is none."""
    if not text or text[-1].isspace():
        return len(text)
    return len(text) - len(text.rsplit(None, 1)[-1])


def decode_utf8(chunks: Iterable[bytes], name: str) -> Iterator[str]:
    """Yield the text of chunks of bytes that may end within a character; `name` is for errors.

    Raises:
        UsageError: if they are not UTF-8.
    """
    try:
        for text in codecs.iterdecode(chunks, "utf-8"):
            if "\0" in text:
                raise UsageError(
                    f"path={name} holds NUL bytes, as UTF-16 and binary files do. Convert it to UTF-8 text, or take "
                    "tokenizer='byte', which learns any file."
                )
            yield text
    except UnicodeDecodeError as error:
        before = error.object[max(error.start - 20, 0) : error.start].decode("utf-8", "ignore")
        raise UsageError(
            f"path={name} is not UTF-8 after {before!r} ({error.reason}). Convert it to UTF-8 text, or take "
            "tokenizer='byte', which learns any file."
        ) from None


def encode_chunks(tokenizer: Tokenizer, chunks: Iterable[bytes], name: str) -> Iterator[Symbols]:
    """Yield the symbols of a document that comes in chunks of bytes; together they are those of the whole.

    Memory is that of a few chunks; a word longer than a chunk has to fit as well. `name` is for errors.
    """
    yield from (symbols for _, symbols, _ in encode_pieces(tokenizer, chunks, name))


def encode_pieces(
    tokenizer: Tokenizer, chunks: Iterable[bytes], name: str
) -> Iterator[tuple[str | None, Symbols, int]]:
    """Yield what `encode_chunks` does with the text of the symbols (None for bytes) and its length in bytes."""
    if isinstance(tokenizer, Byte):
        # The bytes as they are, UTF-8 or not.
        yield from ((None, np.frombuffer(chunk, dtype=np.uint8), len(chunk)) for chunk in chunks)
        return
    for text in _pieces(decode_utf8(chunks, name), tokenizer.cut):
        yield text, tokenizer.encode(text), len(text.encode())


def _pieces(texts: Iterable[str], cut: Callable[[str], int]) -> Iterator[str]:
    """The same text, regrouped to end where it can be cut."""
    pending = ""
    for text in texts:
        pending += text
        place = cut(pending)
        yield pending[:place]
        pending = pending[place:]
    yield pending


def _count_characters(texts: Iterable[str]) -> Counter[str]:
    counts = np.zeros(0x110000, dtype=np.int64)
    for text in texts:
        present, times = np.unique(_codes(text), return_counts=True)
        counts[present] += times
    return Counter({chr(code): int(counts[code]) for code in np.flatnonzero(counts)})


def _count_words(texts: Iterable[str]) -> Counter[str]:
    counts = Counter[str]()
    for piece in _pieces(texts, last_space):
        counts.update(split_words(piece))
        if len(counts) > COUNTED_WORDS:
            counts = Counter(dict(counts.most_common(COUNTED_WORDS // 2)))
    return counts


def _most_frequent(counts: Counter[str], size: int) -> list[str]:
    return sorted(counts, key=lambda item: (-counts[item], item))[:size]


def _codes(text: str) -> npt.NDArray[np.uint32]:
    """The code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
