"""linear_scan and kalman_scan on a CUDA device: float32 and float64, parallel over chunks of time too.

    affine           diagonal A and 2×2 blocks
    dense            a matrix per step, and larger blocks, up to 64×64
    scalar_kalman    the filter of one channel
    dense_kalman     the filter of a whole state, up to 32 numbers

`chunks` is what they have in common. Without a GPU the same code runs in Triton's interpreter (`TRITON_INTERPRET=1`),
in small tiles.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from reroll.kernels.linear_scan.operators import SCALAR_KALMAN, Affine, Operator, State
from reroll.kernels.linear_scan.triton import affine, dense, dense_kalman, scalar_kalman


def scan(operator: Affine, A: Tensor, b: Tensor, initial: Tensor, out: Tensor, reverse: bool) -> None:
    """Write s_t = A_t s_{t−1} + b_t into `out`, which may be b; see `reroll.kernels.linear_scan.scan_into`."""
    if operator.name == "diagonal":
        affine.scan(A[:, :, None, None], b[:, :, None], initial[:, None], out[:, :, None], reverse)
    elif operator.name == "block" and b.shape[2] == 2:
        affine.scan(A, b, initial, out, reverse)
    elif operator.name == "block":
        dense.scan(A.permute(0, 1, 4, 2, 3), b.mT, initial.mT, out.mT, reverse)
    else:
        dense.scan(A, b, initial, out, reverse)


def kalman(
    operator: Operator, inputs: tuple[Tensor, Tensor, Tensor], precision: Tensor, state: State, out: Any
) -> None:
    """Write mean and (unless None) variance after every step into `out`; see `kalman_scan`."""
    (scalar_kalman if operator is SCALAR_KALMAN else dense_kalman).kalman(inputs, precision, state, out)
