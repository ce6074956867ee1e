"""Keys: names for random streams, derived by hashing and never by adding.

    Key(seed).at(step)     the key of one step

A key is eight bytes, the first eight of

    SHA-256("reroll.key.1" ‖ parent ‖ tag ‖ payload)

with tag "s" and the seed for a root, "i" and an unsigned 64-bit integer for `.at(int)`, "n" and UTF-8 for `.at(str)`
(integers little-endian). Adding seeds (`base + parameter + chunk`) gives neighbouring tensors the same noise; hashing
does not, and the result depends on nothing but the path, so any process can derive it alone. The two little-endian
words of a key are the key words of the Philox generator (`reroll.kernels.philox`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from reroll.errors import UsageError

_DOMAIN = b"reroll.key.1"


@dataclass(frozen=True, slots=True, init=False, repr=False)
class Key:
    """Eight bytes that name a random stream; `seed` is an integer in [0, 2⁶⁴).

    Example:
        >>> Key(0).at(0).digest.hex()
        '93b8755c74c34196'
        >>> Key(0).at("data").at(7) == Key(0).at("data").at(7)
        True
    """

    digest: bytes

    def __init__(self, seed: int):
        object.__setattr__(self, "digest", _hash(b"", b"s", _u64(seed, "seed")))

    def at(self, index: int | str) -> Key:
        """Return the key one step down the path: `.at(3)` for the third step, `.at("data")` for a named purpose."""
        if isinstance(index, str):
            return Key.from_bytes(_hash(self.digest, b"n", index.encode()))
        return Key.from_bytes(_hash(self.digest, b"i", _u64(index, "index")))

    @classmethod
    def from_bytes(cls, digest: bytes) -> Key:
        """Return the key with these eight bytes, as a journal stores it."""
        if len(digest) != 8:
            raise UsageError(f"A key has 8 bytes; got {len(digest)}.")
        key = object.__new__(cls)
        object.__setattr__(key, "digest", bytes(digest))
        return key

    @property
    def words(self) -> tuple[int, int]:
        """The two 32-bit key words of the generator, low word first."""
        return int.from_bytes(self.digest[:4], "little"), int.from_bytes(self.digest[4:], "little")

    def __repr__(self) -> str:
        return f"Key({self.digest.hex()})"


def _hash(parent: bytes, tag: bytes, payload: bytes) -> bytes:
    return hashlib.sha256(_DOMAIN + parent + tag + payload).digest()[:8]


def _u64(value: int, name: str) -> bytes:
    # bool and numpy integers are integers here; floats are not, since 2**53 + 1 would silently be another key.
    try:
        integer = value.__index__()
    except AttributeError:
        raise UsageError(f"{name}={value!r} must be an integer or, for .at(), a string.") from None
    if not 0 <= integer < 2**64:
        raise UsageError(f"{name}={integer} must lie in [0, 2**64).")
    return integer.to_bytes(8, "little")
