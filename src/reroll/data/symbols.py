"""What a tokenizer is, and how a text that need not be in memory as a whole goes through one.

`encode_chunks` cuts a text only where `tokenizer.cut` says that encode(a + b) = encode(a) + encode(b), so the symbols
do not depend on the size of the chunks.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reroll.errors import UsageError

Symbols = npt.NDArray[Any]


class Tokenizer(ABC):
    """A map between text and symbols 0 … size − 1.

    Attributes a subclass sets: `name`, `size`, `separator`, the symbol put after each of several documents (None if
    the vocabulary has none), `has_unknown`, True if symbol 0 is everything that is not in the vocabulary, and
    `any_bytes`, True if bytes that are no UTF-8 have symbols, too.
    """

    name: str
    size: int
    separator: int | None
    has_unknown: bool = False
    any_bytes: bool = False

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


def symbol_dtype(size: int) -> np.dtype[Any]:
    """Return the smallest little-endian unsigned type for symbols below `size`: 1, 2 or 4 bytes."""
    return np.dtype("<u1" if size <= 1 << 8 else "<u2" if size <= 1 << 16 else "<u4")


def decode_utf8(chunks: Iterable[bytes], name: str, any_bytes: bool = False) -> Iterator[str]:
    """Yield the text of chunks of bytes that may end within a character; `name` is for errors.

    With `any_bytes`, those that are no UTF-8 become surrogates, as in names of files.

    Raises:
        UsageError: if they are not UTF-8, and have to be.
    """
    if any_bytes:
        yield from codecs.iterdecode(chunks, "utf-8", "surrogateescape")
        return
    last = ""
    try:
        for text in codecs.iterdecode(chunks, "utf-8"):
            if "\0" in text:
                raise UsageError(
                    f"path={name} holds NUL bytes, as UTF-16 and binary files do. Convert it to UTF-8 text, or take "
                    "tokenizer='byte' or 'bpe', which learn any file."
                )
            yield text
            last = text[-20:]
    except UnicodeDecodeError as error:
        before = (last + error.object[max(error.start - 20, 0) : error.start].decode("utf-8", "ignore"))[-20:]
        where = f"after {before!r}" if before else "from its beginning"
        raise UsageError(
            f"path={name} is not UTF-8 {where} ({error.reason}). Convert it to UTF-8 text, or take "
            "tokenizer='byte' or 'bpe', which learn any file."
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
    if tokenizer.name == "byte":
        # The bytes as they are, UTF-8 or not.
        yield from ((None, np.frombuffer(chunk, dtype=np.uint8), len(chunk)) for chunk in chunks)
        return
    for text in pieces(decode_utf8(chunks, name, tokenizer.any_bytes), tokenizer.cut):
        yield text, tokenizer.encode(text), len(text.encode("utf-8", "surrogateescape"))


def pieces(texts: Iterable[str], cut: Callable[[str], int]) -> Iterator[str]:
    """Yield the same text, regrouped to end where it can be cut."""
    pending = ""
    for text in texts:
        pending += text
        place = cut(pending)
        yield pending[:place]
        pending = pending[place:]
    yield pending
