"""linear_scan with a diagonal A or 2×2 blocks: parallel over sequences, channels and chunks of time (`chunks.py`).

Within a chunk, tiles of [time, channels] are scanned by `tl.associative_scan`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.linear_scan.operators import strides_from
from reroll.kernels.linear_scan.triton.chunks import TILE, Plan, in_three_phases, last, place, plan_of


def scan(A: Tensor, b: Tensor, initial: Tensor, out: Tensor, reverse: bool) -> None:
    """Write s_t = A_t s_{t−1} + b_t into `out`, which may be b.

    A is [B, T, K, K, C], b is [B, T, K, C], `initial` is [B, K, C].
    """
    batch, time, order, channels = b.shape
    plan = plan_of(batch, time, channels, TILE // order)
    ends = plan_of(batch, plan.chunks - 1, channels, TILE // order, one_chunk=True) if plan.chunks > 1 else plan
    in_three_phases(_launch_affine, plan, ends, A, b, initial, out, reverse)


def _launch_affine(
    plan: Plan, A: Tensor, b: Tensor, starts: Tensor, out: Tensor, reverse: bool,
    composed: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    chunk_A, chunk_b = (A, b) if composed is None else composed
    _affine[(plan.programs,)](
        A, b, starts, out, chunk_A, chunk_b, b.shape[1], b.shape[3], plan.chunks, plan.tiles,
        *strides_from(A, reverse), *strides_from(b, reverse), *starts.stride(), *strides_from(out, reverse),
        K=b.shape[2], REDUCE=composed is not None, BLOCK_T=plan.block_t, BLOCK_C=plan.block_c, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _compose(a1, b1, a2, b2):
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _compose_blocks(p00, p01, p10, p11, x0, x1, q00, q01, q10, q11, y0, y1):
    return (
        q00 * p00 + q01 * p10,
        q00 * p01 + q01 * p11,
        q10 * p00 + q11 * p10,
        q10 * p01 + q11 * p11,
        q00 * x0 + q01 * x1 + y0,
        q10 * x0 + q11 * x1 + y1,
    )


@triton.jit
def _affine(
    A, b, starts, out, chunk_A, chunk_b, time, channels, chunks, tiles,
    A_first, A_row, A_time, A_i, A_j, A_c, b_first, b_row, b_time, b_i, b_c, s_row, s_chunk, s_i, s_c,
    o_first, o_row, o_time, o_i, o_c,
    K: tl.constexpr, REDUCE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, chunk, first, c = place(channels, chunks, tiles, BLOCK_T, BLOCK_C)
    A += A_first + row * A_row
    b += b_first + row * b_row
    out += o_first + row * o_row
    starts += row * s_row + chunk * s_chunk + c * s_c
    s0 = tl.zeros((BLOCK_C,), b.dtype.element_ty)
    s1 = s0
    p00, p01, p10, p11 = s0 + 1.0, s0, s0, s0 + 1.0
    if not REDUCE:
        s0 = tl.load(starts, mask=c < channels, other=0.0)
        if K == 2:
            s1 = tl.load(starts + s_i, mask=c < channels, other=0.0)
    for tile in range(tiles):
        t = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < time)[:, None] & (c < channels)[None, :]
        at_A = A + t[:, None] * A_time + c[None, :] * A_c
        at_b = b + t[:, None] * b_time + c[None, :] * b_c
        at_out = out + t[:, None] * o_time + c[None, :] * o_c
        a00 = tl.load(at_A, mask=inside, other=1.0)
        x0 = tl.load(at_b, mask=inside, other=0.0)
        if K == 1:
            a00, x0 = tl.associative_scan((a00, x0), 0, _compose)
            x0 = a00 * s0[None, :] + x0
            if REDUCE:
                p00 = last(a00, BLOCK_T) * p00
            else:
                tl.store(at_out, x0, mask=inside)
            s0 = last(x0, BLOCK_T)
        else:
            a01 = tl.load(at_A + A_j, mask=inside, other=0.0)
            a10 = tl.load(at_A + A_i, mask=inside, other=0.0)
            a11 = tl.load(at_A + A_i + A_j, mask=inside, other=1.0)
            x1 = tl.load(at_b + b_i, mask=inside, other=0.0)
            a00, a01, a10, a11, x0, x1 = tl.associative_scan((a00, a01, a10, a11, x0, x1), 0, _compose_blocks)
            x0 = a00 * s0[None, :] + a01 * s1[None, :] + x0
            x1 = a10 * s0[None, :] + a11 * s1[None, :] + x1
            if REDUCE:
                q00, q01, q10, q11 = last(a00, BLOCK_T), last(a01, BLOCK_T), last(a10, BLOCK_T), last(a11, BLOCK_T)
                p00, p10 = q00 * p00 + q01 * p10, q10 * p00 + q11 * p10
                p01, p11 = q00 * p01 + q01 * p11, q10 * p01 + q11 * p11
            else:
                tl.store(at_out, x0, mask=inside)
                tl.store(at_out + o_i, x1, mask=inside)
            s0, s1 = last(x0, BLOCK_T), last(x1, BLOCK_T)
    if REDUCE:
        at = (row * chunks + chunk) * K * channels + c
        matrix = (row * chunks + chunk) * K * K * channels + c
        tl.store(chunk_A + matrix, p00, mask=c < channels)
        tl.store(chunk_b + at, s0, mask=c < channels)
        if K == 2:
            tl.store(chunk_A + matrix + channels, p01, mask=c < channels)
            tl.store(chunk_A + matrix + 2 * channels, p10, mask=c < channels)
            tl.store(chunk_A + matrix + 3 * channels, p11, mask=c < channels)
            tl.store(chunk_b + at + channels, s1, mask=c < channels)
