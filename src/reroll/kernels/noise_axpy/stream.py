"""The definition of the noise stream that every implementation follows: kinds, names, layout.

**Layout.** A tensor is R rows of its last dimension C; with C < 32 or one axis it is a single row. Row r has ⌈C/128⌉
blocks of 128 sign bits, numbered from r·⌈C/128⌉; block b of probe k of a tensor is one Philox call with counter
(b low, b high, k, id of the name). Bit i of a block (word 0 first, lowest bit first) is the sign of column i: 0 → +1,
1 → −1. So any group of rows starts on a block and can be made alone.

**Sums** over probes run in ascending order inside blocks of 128 probes, then over the blocks, in fp32 (fp64 for fp64
tensors, or on request), and one addition brings the sum to p. Nothing is reassociated: this is why p, and not only z,
has the same bits everywhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from reroll.errors import UsageError
from reroll.kernels.philox import stream_id
from reroll.keys import Key

BLOCK = 128  # sign bits of one Philox call
PROBE_BLOCK = 128  # probes summed before a partial sum is added to the total
NARROW = 32  # tensors with fewer columns than this are laid out as one row


class Kind(NamedTuple):
    """A kind of noise, parsed: its base distribution and, for sparse noise, how many masks are ANDed."""

    base: str
    masks: int

    @property
    def scale(self) -> float:
        """The factor that gives every coordinate unit variance: √(2^masks)."""
        return math.sqrt(2.0**self.masks)


@functools.cache
def parse_kind(kind: str) -> Kind:
    """Read "rademacher", "normal", "sparse" or "sparse:0.25".

    Raises:
        UsageError: for another name, or a density that is no negative power of two.

    Example:
        >>> parse_kind("sparse:0.25")
        Kind(base='rademacher', masks=2)
    """
    base, _, argument = kind.partition(":")
    if base in ("rademacher", "normal") and not argument:
        return Kind(base, 0)
    if base != "sparse":
        raise UsageError(f'noise="{kind}" is not a kind of noise. Known: normal, rademacher, sparse, sparse:DENSITY.')
    try:
        density = float(argument or 0.5)
        masks = round(-math.log2(density))
    except ValueError:
        density, masks = math.nan, 0
    if not (1 <= masks <= 16 and density == 2.0**-masks):
        raise UsageError(f'noise="{kind}": the density must be 1/2, 1/4, … 2**-16, for example "sparse:0.25".')
    return Kind("rademacher", masks)


@dataclass(frozen=True)
class Stream:
    """Where the noise of one tensor comes from.

    Args:
        key: the key of the step.
        name: the tensor's name; two tensors with the same name get the same noise.
        kind: "rademacher", "normal", "sparse" or "sparse:DENSITY".
    """

    key: Key
    name: str
    kind: str = "rademacher"

    @property
    def ids(self) -> tuple[int, ...]:
        """The counter words c3 this stream uses: of the signs, then of the masks; or of the normal numbers."""
        return _ids(self.name, self.kind)

    @property
    def is_normal(self) -> bool:
        return parse_kind(self.kind).base == "normal"


@functools.lru_cache(maxsize=4096)
def _ids(name: str, kind: str) -> tuple[int, ...]:
    base, masks = parse_kind(kind)
    if base == "normal":
        return (stream_id(name, "normal"),)
    return (stream_id(name), *(stream_id(name, f"mask{i + 1}") for i in range(masks)))


def layout(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a tensor of this shape in the noise stream.

    Example:
        >>> layout((4, 3, 64)), layout((100, 20)), layout((7,)), layout(())
        ((12, 64), (1, 2000), (1, 7), (1, 1))
    """
    count = math.prod(shape)
    if len(shape) < 2 or shape[-1] < NARROW:
        return 1, count
    return count // shape[-1], shape[-1]
