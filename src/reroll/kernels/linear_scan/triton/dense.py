"""linear_scan with a matrix per step: parallel over sequences, groups, columns and chunks of time (`chunks.py`).

The steps of a chunk compose to P ← A_t P and x ← A_t x + b_t, from P = I and x = 0; each program takes some columns of
P. That is D times the arithmetic of the steps themselves, done by programs that a device has to spare.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.linear_scan.operators import strides_from
from reroll.kernels.linear_scan.triton.chunks import INTERPRETED, in_three_phases

SIZE = 64
"""The largest matrix: a program keeps one and columns of another in its registers. Most of larger ones would spill."""

_PROGRAMS = 12 if INTERPRETED else 4096  # programs of few threads that run at once
_FEWEST = 3  # chunks from which the steps of the three phases, one after another, are fewer than those of one chunk


class Cut(NamedTuple):
    """How a scan is divided: chunks of `length` steps, and in their composition blocks of `columns` columns."""

    chunks: int
    length: int
    columns: int
    blocks: int


def cut(rows: int, time: int, size: int, columns: int) -> Cut:
    """Return how `time` steps of `rows` sequences are divided.

    With chunks of T/c steps, 2 T/c + c steps follow one another: fewest at c = √(2T).
    """
    blocks = triton.cdiv(size, columns)
    chunks = min(math.isqrt(2 * time), _PROGRAMS // (rows * blocks))
    length = triton.cdiv(time, chunks) if chunks >= _FEWEST else time
    return Cut(triton.cdiv(time, length), length, columns, blocks)


def scan(A: Tensor, b: Tensor, initial: Tensor, out: Tensor, reverse: bool) -> None:
    """Write s_t = A_t s_{t−1} + b_t into `out`, which may be b.

    A is [B, T, G, D, D], b is [B, T, G, D], `initial` is [B, G, D].
    """
    batch, time, groups, size = b.shape
    width = triton.next_power_of_2(size)
    plan = cut(batch * groups, time, size, width if width <= 32 else 16)
    ends = plan._replace(chunks=1, length=plan.chunks - 1)
    in_three_phases(_launch, plan, ends, A, b, initial, out, reverse)


def warps(width: int) -> int:
    """Return the warps of a program: 16 numbers of a matrix per thread, and at least one."""
    return max(1, width * width // 512)


def stages(width: int, size: int) -> int:
    """Return how many steps' matrices are loaded ahead: shared memory, of which older cards have 64 KB, holds them."""
    return 3 if width * width * size <= 1 << 14 else 1


def _launch(
    plan: Cut, A: Tensor, b: Tensor, starts: Tensor, out: Tensor, reverse: bool,
    composed: tuple[Tensor, Tensor] | None,
) -> None:  # fmt: skip
    batch, time, groups, size = b.shape
    width = triton.next_power_of_2(size)
    blocks = 1 if composed is None else plan.blocks
    chunk_A, chunk_b = (A, b) if composed is None else composed
    _dense[(batch * groups * blocks * plan.chunks,)](
        A, b, starts, out, chunk_A, chunk_b, time, groups, size, plan.chunks, plan.length, blocks,
        *strides_from(A, reverse), *strides_from(b, reverse), *starts.stride(), *strides_from(out, reverse),
        REDUCE=composed is not None, D=width, N=plan.columns, enable_fp_fusion=True,
        num_warps=warps(width), num_stages=stages(width, b.element_size()),
    )  # fmt: skip


@triton.jit
def product(a, b, D: tl.constexpr):
    """The matrix product a b, D the size of a."""
    if D >= 16:  # the least that tl.dot multiplies
        return tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)
    else:
        return tl.sum(a[:, :, None] * b[None, :, :], 1)


@triton.jit
def times(a, x):
    """The matrix a times the vector x."""
    return tl.sum(a * x[None, :], 1)


@triton.jit
def _dense(
    A, b, starts, out, chunk_A, chunk_b, time, groups, size, chunks, length, blocks,
    A_first, A_row, A_time, A_group, A_i, A_j, b_first, b_row, b_time, b_group, b_i,
    s_row, s_chunk, s_group, s_i, o_first, o_row, o_time, o_group, o_i,
    REDUCE: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    block = program % blocks
    chunk = (program // blocks % chunks).to(tl.int64)
    row = (program // blocks // chunks).to(tl.int64)
    sequence, group = row // groups, row % groups
    i = tl.arange(0, D).to(tl.int64)
    inside = (i[:, None] < size) & (i[None, :] < size)
    A += A_first + sequence * A_row + group * A_group + i[:, None] * A_i + i[None, :] * A_j
    b += b_first + sequence * b_row + group * b_group + i * b_i
    out += o_first + sequence * o_row + group * o_group + i * o_i
    columns = block * N + tl.arange(0, N)
    real: tl.constexpr = b.dtype.element_ty
    P = (i[:, None] == columns[None, :]).to(real)
    x = tl.zeros((D,), real)
    if not REDUCE:
        x = tl.load(starts + sequence * s_row + chunk * s_chunk + group * s_group + i * s_i, mask=i < size, other=0.0)
    first = chunk * length
    steps = tl.minimum(length, time - first)
    for step in range(steps):
        t = first + step
        a = tl.load(A + t * A_time, mask=inside, other=0.0)
        x = times(a, x) + tl.load(b + t * b_time, mask=i < size, other=0.0)
        if not REDUCE:
            tl.store(out + t * o_time, x, mask=i < size)
        else:
            P = product(a, P, D)
    if REDUCE:
        at = (sequence * chunks + chunk) * groups + group
        to = chunk_A + at * size * size + i[:, None] * size + columns[None, :]
        tl.store(to, P, mask=(i[:, None] < size) & (columns[None, :] < size))
        if block == 0:
            tl.store(chunk_b + at * size + i, x, mask=i < size)
