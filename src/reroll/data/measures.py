"""What a language model has to beat: counting, and gzip.

    unigram   H(X)              = −Σ_a p(a) log₂ p(a)
    bigram    H(X_t | X_{t−1})  = −Σ_{a,b} p(a, b) log₂ p(b | a)
    gzip      8 · bytes of `gzip -9` of the text / symbols

All in bits per symbol. The entropies are those of the frequencies of the very text that is measured, so no model that
looks at no symbol, or at one symbol, before the next can have a lower loss there, however it was trained.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reroll.data.tokenizers import Tokenizer
from reroll.errors import UsageError

LIMIT = 1 << 22  # symbols looked at: the pairs of these are sorted in 100 MB
CHUNK = 1 << 18  # symbols decoded at a time


class Baselines(NamedTuple):
    """Bits per symbol of a text by counting symbols, by counting pairs, by gzip -9; and how many were measured."""

    unigram: float
    bigram: float
    gzip: float
    symbols: int


def baselines(tokens: npt.NDArray[Any], tokenizer: Tokenizer, limit: int = LIMIT) -> Baselines:
    """Return the bits per symbol that counting and gzip need for a text.

    Args:
        tokens: the symbols of the text, [n]; of a memory-mapped array only what is measured is read.
        tokenizer: turns them into text for gzip.
        limit: at most so many symbols from the beginning are measured.

    Raises:
        UsageError: if there are fewer than two symbols.

    Example:
        >>> from reroll.data.tokenizers import Byte
        >>> measured = baselines(np.frombuffer(b"abababab" * 100, np.uint8), Byte())
        >>> measured.unigram, measured.bigram < 0.01, measured.gzip < 0.5
        (1.0, True, True)
    """
    part = np.asarray(tokens[:limit]).astype(np.int64)
    if len(part) < 2:
        raise UsageError(f"tokens has {len(part)} symbols; entropies need at least 2.")
    pairs = entropy(part[:-1] * tokenizer.size + part[1:])
    squeeze = zlib.compressobj(9, zlib.DEFLATED, 31)  # 31: with the header of gzip
    size = sum(
        len(squeeze.compress(tokenizer.decode_bytes(part[begin : begin + CHUNK])))
        for begin in range(0, len(part), CHUNK)
    )
    size += len(squeeze.flush())
    return Baselines(entropy(part), pairs - entropy(part[:-1]), 8 * size / len(part), len(part))


def entropy(symbols: npt.NDArray[np.int64]) -> float:
    """Return the entropy of the frequencies of symbols, in bits.

    Example:
        >>> entropy(np.array([0, 0, 1, 2]))
        1.5
    """
    counts = np.unique(symbols, return_counts=True)[1]
    return float(np.log2(len(symbols)) - (counts * np.log2(counts)).sum() / len(symbols))
