"""Byte pairs: those of GPT-2, and those that are frequent in a text of one's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from reroll.data.symbols import Symbols, Tokenizer, pieces, symbol_dtype
from reroll.errors import UsageError

TRAINED = 1 << 28  # characters that byte pairs are counted in
SURROGATES = "[\ud800-\udfff]+"


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
        return last_border(text)


class BytePairs(Tokenizer):
    """Pairs of bytes, of a byte and a pair, …, that are frequent in a training text; the last symbol ends a document.

    Symbols 0 … 255 are the bytes, so that any bytes come back; then there is one for every merge, in their order, and
    last the one between documents, which no text is encoded as, shown as a new line. Encoding needs the package
    tokenizers (extra `data`), all else does not.

    Args:
        merges: what is joined, the most frequent first: two symbols in GPT-2's letters for bytes, with a space between.

    Raises:
        UsageError: when encoding, if tokenizers is not installed.

    Source: Sennrich, Haddow and Birch, "Neural machine translation of rare words with subword units" (2016); of bytes,
    within pieces of a regular expression: Radford et al., "Language models are unsupervised multitask learners" (2019).

    Example:
        >>> tokenizer = BytePairs(["h e", "Ġ he"])
        >>> tokenizer.size, tokenizer.decode([116, 256, 257, 33]), tokenizer.decode_bytes([255])
        (259, 'the he!', b'\\xff')
    """

    name, any_bytes = "bpe", True

    def __init__(self, merges: Sequence[str]) -> None:
        self.merges = list(merges)
        letters = byte_letters()
        self._symbols = {letter: symbol for symbol, letter in enumerate(letters)}
        for merge in self.merges:
            left, right = merge.split(" ")
            if not {left, right} <= self._symbols.keys():
                raise KeyError(merge)
            self._symbols.setdefault(left + right, len(self._symbols))  # two merges may make the same symbol
        codes = {letter: code for code, letter in enumerate(letters)}
        self._texts = [bytes(codes[letter] for letter in symbol) for symbol in self._symbols] + [b"\n"]
        self.separator = len(self._symbols)
        self.size = self.separator + 1

    @cached_property
    def _encoder(self) -> Any:
        library = _library()
        merges = [tuple(merge.split(" ")) for merge in self.merges]
        return _with_pieces(library, library.models.BPE(vocab=self._symbols, merges=merges))

    def encode(self, text: str) -> Symbols:
        symbols: list[int] = []
        for number, part in enumerate(re.split("([\udc80-\udcff]+)", text)):
            if number % 2:  # bytes that are no UTF-8, as `decode_utf8` has them
                symbols += part.encode("utf-8", "surrogateescape")
            elif part:
                valid = part.encode("utf-8", "replace").decode()
                symbols += self._encoder.encode_batch_fast([valid], add_special_tokens=False)[0].ids
        return np.asarray(symbols, dtype=symbol_dtype(self.size))

    def decode_bytes(self, symbols: Sequence[int] | Symbols) -> bytes:
        return b"".join([self._texts[symbol] for symbol in np.asarray(symbols).tolist()])

    def cut(self, text: str) -> int:
        return last_border(text)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "merges": self.merges}


def train(texts: Iterable[str], size: int) -> BytePairs:
    """Return the byte pairs of a training text, cut anywhere: merged are always the two neighbours that are most often
    side by side, of equally frequent ones the first in the order of letters and then of merges, until there are `size`
    symbols in all or no two that are so twice. The first 268 million characters count.

    Raises:
        UsageError: if tokenizers is not installed.
    """
    library = _library()
    whole = _with_pieces(library, library.models.BPE())
    trainer = library.trainers.BpeTrainer(
        vocab_size=size - 1, min_frequency=2, show_progress=False, initial_alphabet=byte_letters(), special_tokens=[]
    )
    parts = (part for piece in pieces(_first(texts, TRAINED), last_border) for part in re.split(SURROGATES, piece))
    whole.train_from_iterator(parts, trainer)
    return BytePairs([" ".join(merge) for merge in json.loads(whole.to_str())["model"]["merges"]])


def byte_letters() -> list[str]:
    """Return the letter that stands for every byte, as in GPT-2's files: itself if it can be seen, else one of those
    from U+0100 on.

    Example:
        >>> letters = byte_letters()
        >>> letters[65], letters[32], letters[0], len({*letters})
        ('A', 'Ġ', 'Ā', 256)
    """
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def last_border(text: str) -> int:
    """Return the last place where a text can be cut without changing its byte pairs, 0 if there is none.

    They do not go beyond the matches of a regular expression with white space only in front, so a border before a space
    that follows a letter is always one of theirs. Near the end there nearly always is one.
    """
    for begin in (max(len(text) - 1000, 0), 0):
        borders = [match.end() - 1 for match in re.finditer(r"\S[ \n]", text[begin:])]
        if borders:
            return begin + borders[-1]
    return 0


def _with_pieces(library: Any, model: Any) -> Any:
    """The library's tokenizer of a model, with GPT-2's regular expression before it."""
    whole = library.Tokenizer(model)
    whole.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return whole


def _library() -> Any:
    try:
        import tokenizers

        return tokenizers
    except ImportError:
        raise UsageError(
            "tokenizer='bpe' needs tokenizers: pip install 'reroll[data]'; or take tokenizer='byte', which needs "
            "nothing."
        ) from None


def _first(texts: Iterable[str], count: int) -> Iterator[str]:
    """The first characters of a text."""
    for text in texts:
        if count <= 0:
            return
        yield text[:count]
        count -= len(text)
