"""linear_scan on the CPU: Numba, one step after another, sixteen channels at a time, threads over what is independent.

A sequential step costs K² multiply-adds per channel where a parallel scan multiplies matrices (K³), so on a CPU nothing
is won by parallelism along time. What counts is memory: every number of A and b is read once and every state written
once, whatever the strides, and the previous state is read back from where it was just written. States may therefore be
written over b.

Three kernels: one for few channels (the state stays in registers, four rows side by side hide the latency of the
multiply-add), one for many channels and for blocks, one for dense matrices.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from reroll.kernels.jit import jit
from reroll.kernels.linear_scan.operators import SCALAR_KALMAN, Affine, Operator, State
from reroll.kernels.simd import (
    LANES,
    add,
    at_most,
    broadcast,
    div,
    fma,
    load,
    load_part,
    mul,
    prefetch,
    row_sums,
    splat,
    store,
    store_part,
    sub,
)
from reroll.kernels.threads import split

_PER_THREAD = 1 << 15  # multiply-adds below which another thread costs more than it saves

_AHEAD = 1024  # numbers of A between what a dense step uses and what it asks for
_LINE = 8  # numbers in a cache line of 64 bytes, at most 8 bytes each


def scan(operator: Affine, A: Tensor, b: Tensor, initial: Tensor, out: Tensor, reverse: bool) -> None:
    """Write s_t = A_t s_{t−1} + b_t into `out`, which may be b; see `reroll.kernels.linear_scan.scan_into`."""
    if operator.name == "dense":
        _scan_dense(A, b, initial, out, reverse)
        return
    if operator.name == "diagonal":
        A, b, initial, out = A[:, :, None, None], b[:, :, None], initial[:, None], out[:, :, None]
    batch, time, order, channels = out.shape
    A, b, initial = (_with_unit_stride(tensor) for tensor in (A, b, initial))
    arrays = [flat(tensor) for tensor in (out, A, b, initial)]
    strides = [_from(out, reverse), _from(A, reverse), _from(b, reverse), initial.stride()[:2]]
    blocks = -(-channels // LANES)
    kernel = _few_channels if order == 1 and blocks <= 4 else _many_channels

    def work(begin: int, end: int) -> None:
        kernel(*arrays, *strides, (time, order, channels), begin, end)

    split(work, batch * blocks, -(-_PER_THREAD // (time * order * order * LANES)))


def _scan_dense(A: Tensor, b: Tensor, initial: Tensor, out: Tensor, reverse: bool) -> None:
    batch, time, groups, size = out.shape
    by_columns = A.stride(-1) != 1 and A.stride(-2) == 1
    A = A.mT if by_columns else A
    A, b, initial = (_with_unit_stride(tensor) for tensor in (A, b, initial))
    arrays = [flat(tensor) for tensor in (out, A, b, initial)]
    strides = [_from(out, reverse), _from(A, reverse), _from(b, reverse), initial.stride()[:2]]

    def work(begin: int, end: int) -> None:
        _dense(*arrays, *strides, (time, groups, size), by_columns, begin, end)

    split(work, batch * groups, -(-_PER_THREAD // (time * size * size)))


def flat(tensor: Tensor) -> np.ndarray:
    """View all the memory between a tensor's first and last element as one axis."""
    if tensor.is_contiguous():
        return tensor.detach().view(-1).numpy()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.detach().as_strided((extent,), (1,)).numpy()


def _with_unit_stride(tensor: Tensor) -> Tensor:
    """Copy a tensor unless its last axis is contiguous; the other axes may have any strides, zero too."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _from(tensor: Tensor, reverse: bool) -> tuple[int, ...]:
    """Return where the scan starts and the strides of all axes but the last; time runs backwards in reverse."""
    row, time, *others = tensor.stride()[:-1]
    return ((tensor.shape[1] - 1) * time, row, -time, *others) if reverse else (0, row, time, *others)


# ---- diagonal A, at most 64 channels: a block of sixteen is one state, kept in a register


@jit
def _few_channels(out, A, b, initial, out_strides, A_strides, b_strides, initial_strides, sizes, begin, end):
    """Blocks begin … end − 1, numbered by row, then channel; four of them at a time."""
    time, _, channels = sizes
    blocks = (channels + LANES - 1) // LANES
    whole = channels % LANES == 0
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
            s0 = fma(_load(A, a0 + a, n0, whole), s0, _load(b, b0 + x, n0, whole))
            s1 = fma(_load(A, a1 + a, n1, whole), s1, _load(b, b1 + x, n1, whole))
            s2 = fma(_load(A, a2 + a, n2, whole), s2, _load(b, b2 + x, n2, whole))
            s3 = fma(_load(A, a3 + a, n3, whole), s3, _load(b, b3 + x, n3, whole))
            _store(out, o0 + o, s0, n0, whole)
            _store(out, o1 + o, s1, n1, whole)
            _store(out, o2 + o, s2, n2, whole)
            _store(out, o3 + o, s3, n3, whole)
    for block in range(end - (end - begin) % 4, end):
        o0, a0, b0, i0, n0 = _block(block, blocks, channels, out_strides, A_strides, b_strides, initial_strides)
        s0 = load_part(initial, i0, n0)
        for t in range(time):
            a, x = t * strides[1], t * strides[2]
            s0 = fma(_load(A, a0 + a, n0, whole), s0, _load(b, b0 + x, n0, whole))
            _store(out, o0 + t * strides[0], s0, n0, whole)


@jit
def _block(number, blocks, channels, out_strides, A_strides, b_strides, initial_strides):
    """Where a block starts in every array, and how many channels it has."""
    row, block = divmod(number, blocks)
    first = block * LANES
    return (
        out_strides[0] + row * out_strides[1] + first,
        A_strides[0] + row * A_strides[1] + first,
        b_strides[0] + row * b_strides[1] + first,
        row * initial_strides[0] + first,
        min(LANES, channels - first),
    )


@jit
def _load(array, index, count, whole):
    if whole:
        return load(array, index)
    return load_part(array, index, count)


@jit
def _store(array, index, vector, count, whole):
    if whole:
        store(array, index, vector)
    else:
        store_part(array, index, vector, count)


# ---- any number of channels, K×K blocks: all channels of a step together, so that memory is read in order


@jit
def _many_channels(out, A, b, initial, out_strides, A_strides, b_strides, initial_strides, sizes, begin, end):
    """Blocks begin … end − 1 of sixteen channels, numbered by row, then channel; up to 1,024 channels at a time.

    The state is kept in whole vectors beside `out`: a vector that was stored in part cannot be loaded again at once.
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
                whole = count >= LANES
                for i in range(order):
                    s = _load(b, x + i * b_strides[3] + c, count, whole)
                    for j in range(order):
                        entry = _load(A, a + i * A_strides[3] + j * A_strides[4] + c, count, whole)
                        s = fma(entry, load(states, before + j * width + c - first), s)
                    store(states, after + i * width + c - first, s)
                    _store(out, o + i * out_strides[3] + c, s, count, whole)
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
    # The matrices come from memory faster than a step waits for the one before, if they are asked for early enough.
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


# ---- Kalman filters


def kalman(
    operator: Operator, given: tuple[Tensor, Tensor, Tensor], precision: Tensor, state: State, into: Any
) -> None:
    """Write mean and (unless None) variance after every step `into` memory; see `kalman_scan`."""
    (batch, time, size), (mean, variance) = into[0].shape, into
    scalar = operator is SCALAR_KALMAN
    if scalar:
        stored = [_with_unit_stride(tensor) for tensor in (*given, *state)]
    else:
        stored = [tensor if tensor[0, 0].is_contiguous() else tensor.contiguous() for tensor in given]
        stored += [tensor if tensor[0].is_contiguous() else tensor.contiguous() for tensor in state]
    tensors = [mean, mean if variance is None else variance, *stored]
    arrays = [flat(tensor) for tensor in tensors]
    strides = tuple(tensor.stride()[:2] for tensor in tensors)
    precisions = precision.contiguous().numpy()
    kernel = _scalar_filters if scalar else _dense_filters

    def work(begin: int, end: int) -> None:
        kernel(*arrays, precisions, strides, (time, size), variance is not None, begin, end)

    if scalar:
        split(work, batch * -(-size // LANES), -(-_PER_THREAD // (time * LANES * 8)))
    else:
        split(work, batch, -(-_PER_THREAD // (time * size**3 * 4)))


@jit
def _scalar_filters(mean, variance, A, b, y, m, P, precision, strides, sizes, keep, begin, end):
    """Blocks begin … end − 1 of sixteen channels, numbered by row, then channel; strides of [B, T] in argument order.

    The predicted variance is bounded, so that a huge A makes a filter believe y instead of overflowing.
    """
    time, channels = sizes
    blocks = (channels + LANES - 1) // LANES
    center, spread = np.zeros(blocks * LANES, A.dtype), np.zeros(blocks * LANES, A.dtype)
    one, bound = splat(A.dtype.type(1)), splat(A.dtype.type(1e30))
    at = begin
    while at < end:
        row, block = divmod(at, blocks)
        run = min(blocks - block, end - at)
        at += run
        first, last = block * LANES, min(channels, (block + run) * LANES)
        for c in range(first, last):
            center[c], spread[c] = m[row * strides[5][0] + c], P[row * strides[6][0] + c]
        o, v = row * strides[0][0], row * strides[1][0]
        a, x, z = row * strides[2][0], row * strides[3][0], row * strides[4][0]
        k = splat(precision[row])
        for _ in range(time):
            for c in range(first, last, LANES):
                count = last - c
                whole = count >= LANES
                transition = _load(A, a + c, count, whole)
                square = mul(transition, transition)
                predicted = at_most(fma(square, load(spread, c), one), bound)
                updated = div(predicted, fma(k, predicted, one))
                expected = fma(transition, load(center, c), _load(b, x + c, count, whole))
                gap = sub(_load(y, z + c, count, whole), expected)
                mid = fma(mul(k, updated), gap, expected)
                store(center, c, mid)
                store(spread, c, updated)
                _store(mean, o + c, mid, count, whole)
                if keep:
                    _store(variance, v + c, updated, count, whole)
            o, v = o + strides[0][1], v + strides[1][1]
            a, x, z = a + strides[2][1], x + strides[3][1], z + strides[4][1]


@jit
def _dense_filters(mean, variance, A, b, y, m, P, precision, strides, sizes, keep, begin, end):
    """Sequences begin … end − 1; all matrices are stored by rows, strides are those of [B, T] in argument order."""
    time, size = sizes
    area = size * size
    AP, Q, L, spread = (
        np.empty(area, A.dtype),
        np.empty(area, A.dtype),
        np.empty(area, A.dtype),
        np.empty(area, A.dtype),
    )
    center = np.empty(size, A.dtype)
    for row in range(begin, end):
        for i in range(area):
            spread[i] = P[row * strides[6][0] + i]
        state, before = m, row * strides[5][0]
        for t in range(time):
            o = row * strides[0][0] + t * strides[0][1]
            a = row * strides[2][0] + t * strides[2][1]
            x = row * strides[3][0] + t * strides[3][1]
            z = row * strides[4][0] + t * strides[4][1]
            _predict(Q, AP, A, a, spread, size)
            for i in range(size):
                center[i] = b[x + i]
                for j in range(size):
                    center[i] += A[a + i * size + j] * state[before + j]
            _update(Q, L, spread, precision[row], size)
            for i in range(size):
                correction = center[i] - center[i]
                for j in range(size):
                    correction += spread[i * size + j] * (y[z + j] - center[j])
                mean[o + i] = center[i] + precision[row] * correction
            state, before = mean, o
            if keep:
                for i in range(area):
                    variance[row * strides[1][0] + t * strides[1][1] + i] = spread[i]


@jit
def _predict(Q, AP, A, a, spread, size):
    """Q ← A P Aᵀ + I."""
    for i in range(size):
        at = i * size
        for c in range(size):
            AP[at + c] = 0
        for j in range(size):
            factor = A[a + at + j]
            for c in range(size):
                AP[at + c] += factor * spread[j * size + c]
    for i in range(size):
        for j in range(i + 1):
            entry = AP.dtype.type(1 if i == j else 0)
            for c in range(size):
                entry += AP[i * size + c] * A[a + j * size + c]
            Q[i * size + j] = Q[j * size + i] = entry


@jit
def _update(Q, L, spread, precision, size):
    """P ← (I + Q/σ²)⁻¹ Q by a Cholesky factor L, which exists because I + Q/σ² ≥ I; P is made symmetric."""
    for i in range(size):
        at = i * size
        for j in range(i + 1):
            entry = precision * Q[at + j] + (1 if i == j else 0)
            for c in range(j):
                entry -= L[at + c] * L[j * size + c]
            L[at + j] = np.sqrt(entry) if i == j else entry / L[j * size + j]
    for i in range(size):
        at = i * size
        for c in range(size):
            spread[at + c] = Q[at + c]
        for j in range(i):
            _subtract(spread, at, L[at + j], j * size, size)
        _divide(spread, at, L[at + i], size)
    for i in range(size - 1, -1, -1):
        for j in range(i + 1, size):
            _subtract(spread, i * size, L[j * size + i], j * size, size)
        _divide(spread, i * size, L[i * size + i], size)
    for i in range(size):
        for j in range(i):
            entry = (spread[i * size + j] + spread[j * size + i]) / 2
            spread[i * size + j] = spread[j * size + i] = entry


@jit
def _subtract(matrix, row, factor, other, size):
    for c in range(size):
        matrix[row + c] -= factor * matrix[other + c]


@jit
def _divide(matrix, row, divisor, size):
    for c in range(size):
        matrix[row + c] /= divisor
