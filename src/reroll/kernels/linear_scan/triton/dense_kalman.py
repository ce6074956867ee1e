"""The Kalman filter of a whole state: parallel over sequences and chunks of time (`chunks.py`).

One step, with p = A m + b, Q = A P Aᵀ + I, v = y − p and R = (I + Q/σ²)⁻¹, by elimination:

    P ← Q R        m ← p + P v/σ²

What a chunk's steps compose to (`operators.DenseKalman`) is that filter from m = 0 and P = 0, and what its innovations
say about the state before it: with Φ the derivative of m in that state, from Φ = I, and F = A Φ,

    J ← J + Fᵀ R F/σ²        η ← η + Fᵀ R v/σ²        Φ ← R F

The element is then (Φ, m, P, η, J). The few chunks are scanned by the reference.

Reference: Särkkä and García-Fernández, "Temporal parallelization of Bayesian smoothers", 2021.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.linear_scan import reference
from reroll.kernels.linear_scan.operators import DENSE_KALMAN, State
from reroll.kernels.linear_scan.triton.dense import Cut, cut, product, times

SIZE = 32
"""The largest state: a program keeps eight matrices in its registers."""


def kalman(inputs: tuple[Tensor, Tensor, Tensor], precision: Tensor, state: State, out: Any) -> None:
    """Write mean and (unless None) covariance after every step into `out`; see `kalman_scan`."""
    batch, time, size = inputs[1].shape
    plan = cut(batch, time, size, size)
    starts = tuple(part.unsqueeze(1) for part in state)
    if plan.chunks > 1:
        vector, matrix = (batch, plan.chunks, size), (batch, plan.chunks, size, size)
        composed = [inputs[1].new_empty(shape) for shape in (matrix, vector, matrix, vector, matrix)]
        _launch(plan, inputs, precision, starts, out, composed)
        ends = reference.states_of(DENSE_KALMAN, tuple(part[:, :-1] for part in composed), state)
        starts = tuple(torch.cat([first, rest], 1) for first, rest in zip(starts, ends))
    _launch(plan, inputs, precision, starts, out, None)


def _launch(
    plan: Cut, inputs: tuple[Tensor, Tensor, Tensor], precision: Tensor, starts: State, out: Any,
    composed: list[Tensor] | None,
) -> None:  # fmt: skip
    """Filter all chunks from `starts` [B, chunks, …] into `out`, or compose each into `composed`."""
    mean, covariance = out
    batch, time, size = inputs[1].shape
    spread = inputs[0] if covariance is None else covariance  # without a covariance it is not written
    width = triton.next_power_of_2(size)
    _filter[(batch * plan.chunks,)](
        *inputs, precision.contiguous(), *starts, mean, spread, *(composed or 5 * [mean]),
        time, size, plan.chunks, plan.length,
        *inputs[0].stride(), *inputs[1].stride(), *inputs[2].stride(), *starts[0].stride(), *starts[1].stride(),
        *mean.stride(), *spread.stride(),
        REDUCE=composed is not None, KEEP=covariance is not None, D=width, enable_fp_fusion=True,
        num_warps=warps(width),
    )  # fmt: skip


def warps(width: int) -> int:
    """Return the warps of a program: four numbers of a matrix per thread, as it holds several, and at least one."""
    return max(1, width * width // 128)


@triton.jit
def _inverse(M, D: tl.constexpr):
    """M⁻¹ in place, by elimination without exchanges: M = I + Q/σ² is positive definite."""
    i = tl.arange(0, D)
    for pivot in range(D):
        this_row, this_column = i[:, None] == pivot, i[None, :] == pivot
        row = tl.sum(tl.where(this_row, M, 0.0), 0)
        column = tl.sum(tl.where(this_column & (i[:, None] != pivot), M, 0.0), 1)
        row = tl.where(i == pivot, 1.0, row) / tl.sum(tl.where(i == pivot, row, 0.0), 0)
        M = tl.where(this_row, row[None, :], tl.where(this_column, 0.0, M) - column[:, None] * row[None, :])
    return M


@triton.jit
def _filter(
    A, b, y, precision, means, covariances, mean, covariance, chunk_A, chunk_b, chunk_C, chunk_eta, chunk_J,
    time, size, chunks, length,
    A_row, A_time, A_i, A_j, b_row, b_time, b_i, y_row, y_time, y_i, m_row, m_chunk, m_i,
    P_row, P_chunk, P_i, P_j, o_row, o_time, o_i, w_row, w_time, w_i, w_j,
    REDUCE: tl.constexpr, KEEP: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    i = tl.arange(0, D).to(tl.int64)
    inside = (i[:, None] < size) & (i[None, :] < size)
    A += row * A_row + i[:, None] * A_i + i[None, :] * A_j
    covariance += row * w_row + i[:, None] * w_i + i[None, :] * w_j
    b += row * b_row + i * b_i
    y += row * y_row + i * y_i
    mean += row * o_row + i * o_i
    k = tl.load(precision + row)
    real: tl.constexpr = b.dtype.element_ty
    eye = (i[:, None] == i[None, :]).to(real)
    F, J = eye, tl.zeros((D, D), real)
    m, eta = tl.zeros((D,), real), tl.zeros((D,), real)
    P = J
    if not REDUCE:
        m = tl.load(means + row * m_row + chunk * m_chunk + i * m_i, mask=i < size, other=0.0)
        at = covariances + row * P_row + chunk * P_chunk + i[:, None] * P_i + i[None, :] * P_j
        P = tl.load(at, mask=inside, other=0.0)
    first = chunk * length
    for step in range(tl.minimum(length, time - first)):
        t = first + step
        a = tl.load(A + t * A_time, mask=inside, other=0.0)
        p = times(a, m) + tl.load(b + t * b_time, mask=i < size, other=0.0)
        v = tl.load(y + t * y_time, mask=i < size, other=0.0) - p
        Q = product(product(a, P, D), tl.trans(a), D) + eye
        R = _inverse(eye + k * Q, D)
        P = product(Q, R, D)
        m = p + k * times(P, v)
        if REDUCE:
            F = product(a, F, D)
            eta += k * times(tl.trans(F), times(R, v))
            shrunk = product(R, F, D)
            J += k * product(tl.trans(F), shrunk, D)
            F = shrunk
        else:
            tl.store(mean + t * o_time, m, mask=i < size)
            if KEEP:
                tl.store(covariance + t * w_time, P, mask=inside)
    if REDUCE:
        at_vector = (row * chunks + chunk) * size + i
        at_matrix = (row * chunks + chunk) * size * size + i[:, None] * size + i[None, :]
        tl.store(chunk_A + at_matrix, F, mask=inside)
        tl.store(chunk_b + at_vector, m, mask=i < size)
        tl.store(chunk_C + at_matrix, P, mask=inside)
        tl.store(chunk_eta + at_vector, eta, mask=i < size)
        tl.store(chunk_J + at_matrix, J, mask=inside)
