"""Philox4x32-10, the counter-based generator behind every random number of the project.

    words = philox(counter, key)        four 32-bit words from four counter words and two key words

The same counter and key give the same words on every device, in any order, for any chunk size: there is no state to
seed or advance. This is the readable version; `noise_axpy/cpu.py` and `noise_axpy/triton.py` compute the same bits.

Reference: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The published
known-answer vectors of Random123 are in tests/unit/test_philox.py.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from reroll.errors import UsageError
from reroll.keys import Key

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MASK = 0xFFFFFFFF


def philox(c0: Any, c1: Any, c2: Any, c3: Any, key: tuple[int, int]) -> tuple[Any, Any, Any, Any]:
    """Return the four output words of Philox4x32-10.

    Args:
        c0, c1, c2, c3: counter words in [0, 2³²), as int64 numpy arrays or torch tensors of broadcastable shapes (or
            Python integers).
        key: the two key words.

    Returns:
        Four words in [0, 2³²), of the same kind as the counters.

    Example:
        >>> [hex(w) for w in philox(0, 0, 0, 0, (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    k0, k1 = key
    for _ in range(ROUNDS):
        # A 32 × 32-bit product needs 64 bits. In int64 it wraps around, but its bits are right: masking gives the low
        # word, and masking after the (arithmetic) shift the high word.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


@functools.lru_cache(maxsize=1 << 16)
def stream_id(name: str, purpose: str = "") -> int:
    """Return the counter word c3 that separates the streams of different tensors and purposes.

    It is the first four bytes (little-endian) of SHA-256(name ‖ 0x00 ‖ purpose).

    Example:
        >>> hex(stream_id("rnn.weight"))
        '0xc611f971'
    """
    return int.from_bytes(hashlib.sha256(name.encode() + b"\0" + purpose.encode()).digest()[:4], "little")


def random_words(key: Key, count: int, purpose: str = "words") -> npt.NDArray[np.int64]:
    """Return `count` random 32-bit words of a key, as an int64 array with values in [0, 2³²)."""
    blocks = np.arange(-(-count // 4), dtype=np.int64)
    words = philox(blocks & MASK, blocks >> 32, 0, stream_id("", purpose), key.words)
    return np.stack(words, axis=-1).reshape(-1)[:count]


def random_integers(key: Key, shape: int | Sequence[int], high: int, low: int = 0) -> npt.NDArray[np.int64]:
    """Return integers in [low, high), each from one 32-bit word by multiplication.

    The probability of each value is off by at most 2⁻³², which no experiment here can see.

    Args:
        key: names the numbers; the same key and shape give the same numbers everywhere.
        shape: the shape of the result.
        high: one above the largest value; at most 2³¹ above `low`.
        low: the smallest value.

    Raises:
        UsageError: if the range is empty or wider than 2³¹.

    Example:
        >>> random_integers(Key(0), 5, 10).tolist()
        [9, 1, 4, 2, 0]
    """
    if not 0 < high - low <= 2**31:
        raise UsageError(f"random_integers needs 0 < high - low <= 2**31; got low={low}, high={high}.")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    words = random_words(key, int(np.prod(shape, dtype=np.int64)))
    return ((words * (high - low)) >> 32).reshape(shape) + low
