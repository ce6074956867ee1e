"""The definition of the noise stream that every implementation follows: layout and sums.

**Layout.** A tensor is R rows of its last dimension C; with C < 32 or one axis it is a single row. Row r has ⌈C/128⌉
blocks of 128 sign bits, numbered from r·⌈C/128⌉; block b of probe k of a tensor is one Philox call with counter
(b low, b high, k, id of the name). Bit i of a block (word 0 first, lowest bit first) is the sign of column i: 0 → +1,
1 → −1. So any group of rows starts on a block and can be made alone.

**Sums** over probes run in ascending order inside blocks of 128 probes, then over the blocks, in fp32 (fp64 for fp64
tensors, or on request), and one addition brings the sum to p. Nothing is reassociated: this is why p, and not only z,
has the same bits everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCK = 128  # sign bits of one Philox call
PROBE_BLOCK = 128  # probes summed before a partial sum is added to the total
NARROW = 32  # tensors with fewer columns than this are laid out as one row


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
