"""s_t = A_t s_{t−1} + b_t on the CPU: sixteen channels at a time, threads over what is independent.

Three kernels: one for few channels (the state stays in registers, four rows side by side hide the latency of the
multiply-add), one for many channels and for blocks, one for dense matrices.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from reroll.kernels.jit import jit
from reroll.kernels.linear_scan.operators import Affine, strides_from
from reroll.kernels.simd import (
    LANES,
    add,
    broadcast,
    fma,
    load,
    load_lanes,
    load_part,
    prefetch,
    row_sums,
    splat,
    store,
    store_lanes,
    store_part,
)
from reroll.kernels.threads import split

PER_THREAD = 1 << 15  # multiply-adds below which another thread costs more than it saves

_AHEAD = 1024  # numbers of A between what a dense step uses and what it asks for
_LINE = 8  # numbers in a cache line of 64 bytes, at most 8 bytes each


def scan(operator: Affine, A: Tensor, b: Tensor, initial: Tensor, out: Tensor, reverse: bool) -> None:
    """Write s_t = A_t s_{t−1} + b_t into `out`, which may be b; see `reroll.kernels.linear_scan.scan_into`."""
    if operator.name == "dense":
        batch, time, groups, size = out.shape
        by_columns = A.stride(-1) != 1 and A.stride(-2) == 1
        kernel, options, independent, cost = _dense, ((time, groups, size), by_columns), batch * groups, size * size
        A = A.mT if by_columns else A
    else:
        if operator.name == "diagonal":
            A, b, initial, out = A[:, :, None, None], b[:, :, None], initial[:, None], out[:, :, None]
        batch, time, order, channels = out.shape
        blocks = -(-channels // LANES)
        kernel = _few_channels if order == 1 and blocks <= 4 else _many_channels
        options, independent, cost = ((time, order, channels),), batch * blocks, order * order * LANES
    A, b, initial = (with_unit_stride(tensor) for tensor in (A, b, initial))
    arrays = [flat(tensor) for tensor in (out, A, b, initial)]
    strides = [*(strides_from(tensor, reverse) for tensor in (out, A, b)), initial.stride()]

    def work(begin: int, end: int) -> None:
        kernel(*arrays, *strides, *options, begin, end)

    split(work, independent, -(-PER_THREAD // (time * cost)))


def flat(tensor: Tensor) -> np.ndarray:
    """View all the memory between a tensor's first and last element as one axis."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1).numpy()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.detach().as_strided((extent,), (1,)).numpy()


def with_unit_stride(tensor: Tensor) -> Tensor:
    """Copy a tensor unless its last axis is contiguous; the other axes may have any strides, zero too."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


# ---- diagonal A, at most 64 channels: a block of sixteen is one state, kept in a register


@jit
def _few_channels(out, A, b, initial, out_strides, A_strides, b_strides, initial_strides, sizes, begin, end):
    """Blocks begin … end − 1, numbered by row, then channel; four of them at a time."""
    time, _, channels = sizes
    blocks = (channels + LANES - 1) // LANES
    strides = (out_strides[2], A_strides[2], b_strides[2])
    for first in range(begin, end - 3, 4):
        o0, a0, b0, i0, n0 = _block(first, blocks, channels, out_strides, A_strides, b_strides, initial_strides)
        o1, a1, b1, i1, n1 = _block(first + 1, blocks, channels, out_strides, A_strides, b_strides, initial_strides)
        o2, a2, b2, i2, n2 = _block(first + 2, blocks, channels, out_strides, A_strides, b_strides, initial_strides)
        o3, a3, b3, i3, n3 = _block(first + 3, blocks, channels, out_strides, A_strides, b_strides, initial_strides)
        s0, s1 = load_part(initial, i0, n0), load_part(initial, i1, n1)
        s2, s3 = load_part(initial, i2, n2), load_part(initial, i3, n3)
        for t in range(time):
            o, a, x = t * strides[0], t * strides[1], t * strides[2]
            s0 = fma(load_lanes(A, a0 + a, n0), s0, load_lanes(b, b0 + x, n0))
            s1 = fma(load_lanes(A, a1 + a, n1), s1, load_lanes(b, b1 + x, n1))
            s2 = fma(load_lanes(A, a2 + a, n2), s2, load_lanes(b, b2 + x, n2))
            s3 = fma(load_lanes(A, a3 + a, n3), s3, load_lanes(b, b3 + x, n3))
            store_lanes(out, o0 + o, s0, n0)
            store_lanes(out, o1 + o, s1, n1)
            store_lanes(out, o2 + o, s2, n2)
            store_lanes(out, o3 + o, s3, n3)
    for block in range(end - (end - begin) % 4, end):
        o0, a0, b0, i0, n0 = _block(block, blocks, channels, out_strides, A_strides, b_strides, initial_strides)
        s0 = load_part(initial, i0, n0)
        for t in range(time):
            a, x = t * strides[1], t * strides[2]
            s0 = fma(load_lanes(A, a0 + a, n0), s0, load_lanes(b, b0 + x, n0))
            store_lanes(out, o0 + t * strides[0], s0, n0)


@jit
def _block(number, blocks, channels, out_strides, A_strides, b_strides, initial_strides):
    """Return where a block starts in every array, and how many channels it has."""
    row, block = divmod(number, blocks)
    first = block * LANES
    return (
        out_strides[0] + row * out_strides[1] + first,
        A_strides[0] + row * A_strides[1] + first,
        b_strides[0] + row * b_strides[1] + first,
        row * initial_strides[0] + first,
        min(LANES, channels - first),
    )


# ---- any number of channels, K×K blocks: all channels of a step together, so that memory is read in order


@jit
def _many_channels(out, A, b, initial, out_strides, A_strides, b_strides, initial_strides, sizes, begin, end):
    """Blocks begin … end − 1 of sixteen channels, numbered by row, then channel; up to 1,024 channels at a time.

    The state is kept in whole vectors, not read back from `out`: a load right after a partial store of the same memory
    stalls until the store has left the store buffer.
    """
    time, order, channels = sizes
    blocks = (channels + LANES - 1) // LANES
    width = min(blocks, 64) * LANES
    states = np.zeros(2 * order * width, out.dtype)
    at = begin
    while at < end:
        row, block = divmod(at, blocks)
        run = min(blocks - block, end - at, 64)
        at += run
        first, last = block * LANES, min(channels, (block + run) * LANES)
        for i in range(order):
            for c in range(first, last):
                states[i * width + c - first] = initial[row * initial_strides[0] + i * initial_strides[1] + c]
        o = out_strides[0] + row * out_strides[1]
        a = A_strides[0] + row * A_strides[1]
        x = b_strides[0] + row * b_strides[1]
        before, after = 0, order * width
        for _ in range(time):
            for c in range(first, last, LANES):
                count = last - c
                for i in range(order):
                    s = load_lanes(b, x + i * b_strides[3] + c, count)
                    for j in range(order):
                        entry = load_lanes(A, a + i * A_strides[3] + j * A_strides[4] + c, count)
                        s = fma(entry, load(states, before + j * width + c - first), s)
                    store(states, after + i * width + c - first, s)
                    store_lanes(out, o + i * out_strides[3] + c, s, count)
            before, after = after, before
            o, a, x = o + out_strides[2], a + A_strides[2], x + b_strides[2]


# ---- dense A: sixteen rows of the matrix at a time


@jit
def _dense(out, A, b, initial, out_strides, A_strides, b_strides, initial_strides, sizes, by_columns, begin, end):
    """Groups begin … end − 1, numbered by sequence. Either the rows or the columns of A are contiguous.

    Both happen: the adjoint of a scan has the transposes of its matrices.
    """
    time, groups, size = sizes
    stride = A_strides[4]
    width = (size + LANES - 1) // LANES * LANES
    states = np.zeros(2 * width, out.dtype)
    # Each step depends on the one before, so the processor cannot run ahead to load the next matrices: prefetch them.
    ahead = max(1, _AHEAD // (size * size)) * A_strides[2]
    for number in range(begin, end):
        row, group = divmod(number, groups)
        o = out_strides[0] + row * out_strides[1] + group * out_strides[3]
        a = A_strides[0] + row * A_strides[1] + group * A_strides[3]
        x = b_strides[0] + row * b_strides[1] + group * b_strides[3]
        for i in range(size):
            states[i] = initial[row * initial_strides[0] + group * initial_strides[1] + i]
        before, after = 0, width
        for _ in range(time):
            for i in range(0, size * size, _LINE):
                prefetch(A, a + ahead + i)
            for i in range(0, size, LANES):
                count = min(LANES, size - i)
                s = load_part(b, x + i, count)
                if by_columns:
                    s = _add_columns(s, A, a + i, stride, states, before, size, count)
                else:
                    s = add(s, row_sums(A, a + i * stride, stride, count, states, before, size))
                store(states, after + i, s)
                store_part(out, o + i, s, count)
            before, after = after, before
            o, a, x = o + out_strides[2], a + A_strides[2], x + b_strides[2]


@jit
def _add_columns(s0, A, at, stride, state, before, size, count):
    """s0 + Σ_j (column j of A) · state[j]; four sums, because each multiply-add waits for the one before it."""
    s1 = s2 = s3 = splat(A.dtype.type(0))
    for j in range(0, size - 3, 4):
        s0 = fma(load_part(A, at, count), broadcast(state, before + j), s0)
        s1 = fma(load_part(A, at + stride, count), broadcast(state, before + j + 1), s1)
        s2 = fma(load_part(A, at + 2 * stride, count), broadcast(state, before + j + 2), s2)
        s3 = fma(load_part(A, at + 3 * stride, count), broadcast(state, before + j + 3), s3)
        at += 4 * stride
    for j in range(size - size % 4, size):
        s0 = fma(load_part(A, at, count), broadcast(state, before + j), s0)
        at += stride
    return add(add(s0, s1), add(s2, s3))
