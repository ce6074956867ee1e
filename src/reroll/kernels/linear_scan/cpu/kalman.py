"""Kalman filters on the CPU: scalar ones sixteen channels at a time, dense ones with a Cholesky factor per step."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from reroll.kernels.jit import jit
from reroll.kernels.linear_scan.cpu.affine import PER_THREAD, flat, with_unit_stride
from reroll.kernels.linear_scan.operators import SCALAR_KALMAN, Operator, State
from reroll.kernels.simd import LANES, at_most, div, fma, load, load_lanes, mul, splat, store, store_lanes, sub
from reroll.kernels.threads import split


def kalman(
    operator: Operator,
    inputs: tuple[Tensor, Tensor, Tensor],
    precision: Tensor,
    state: State,
    out: tuple[Tensor, Tensor | None],
) -> None:
    """Write mean and (unless None) variance after every step into `out`; see `kalman_scan`."""
    (batch, time, size), (mean, variance) = out[0].shape, out
    if operator is SCALAR_KALMAN:
        kernel, independent, cost = _scalar_filters, batch * -(-size // LANES), LANES * 8
        operands = [with_unit_stride(tensor) for tensor in (*inputs, *state)]
    else:
        kernel, independent, cost = _dense_filters, batch, size**3 * 4
        operands = [tensor if tensor[0, 0].is_contiguous() else tensor.contiguous() for tensor in inputs]
        operands += [tensor if tensor[0].is_contiguous() else tensor.contiguous() for tensor in state]
    tensors = [mean, mean if variance is None else variance, *operands]
    arrays = [flat(tensor) for tensor in tensors]
    strides = tuple(tensor.stride()[:2] for tensor in tensors)
    precisions = precision.contiguous().numpy()

    def work(begin: int, end: int) -> None:
        kernel(*arrays, precisions, strides, (time, size), variance is not None, begin, end)

    split(work, independent, -(-PER_THREAD // (time * cost)))


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
                transition = load_lanes(A, a + c, count)
                square = mul(transition, transition)
                predicted = at_most(fma(square, load(spread, c), one), bound)
                updated = div(predicted, fma(k, predicted, one))
                expected = fma(transition, load(center, c), load_lanes(b, x + c, count))
                gap = sub(load_lanes(y, z + c, count), expected)
                mid = fma(mul(k, updated), gap, expected)
                store(center, c, mid)
                store(spread, c, updated)
                store_lanes(mean, o + c, mid, count)
                if keep:
                    store_lanes(variance, v + c, updated, count)
            o, v = o + strides[0][1], v + strides[1][1]
            a, x, z = a + strides[2][1], x + strides[3][1], z + strides[4][1]


@jit
def _dense_filters(mean, variance, A, b, y, m, P, precision, strides, sizes, keep, begin, end):
    """Sequences begin … end − 1; all matrices are stored by rows, strides are those of [B, T] in argument order."""
    time, size = sizes
    area = size * size
    AP, Q = np.empty(area, A.dtype), np.empty(area, A.dtype)
    L, spread = np.empty(area, A.dtype), np.empty(area, A.dtype)
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
