"""The scalar Kalman filter: parallel over sequences, channels and chunks of time, as `affine.py`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.linear_scan.operators import State
from reroll.kernels.linear_scan.triton.chunks import TILE, Plan, last, place, plan_of


def kalman(inputs: tuple[Tensor, Tensor, Tensor], precision: Tensor, state: State, out: Any) -> None:
    """Write mean and (unless None) variance after every step into `out`; see `kalman_scan`."""
    batch, time, channels = inputs[1].shape
    mean, variance = out
    plan = plan_of(batch, time, channels, TILE // 2)
    starts = [part.unsqueeze(1) for part in state]
    if plan.chunks > 1:
        composed = mean.new_empty(5, batch, plan.chunks, channels)
        _launch_kalman(plan, inputs, precision, starts, None, None, composed)
        starts = [mean.new_empty(batch, plan.chunks, channels) for _ in state]
        for start, part in zip(starts, state):
            start[:, 0] = part
        ends = plan_of(batch, plan.chunks - 1, channels, TILE // 2, one_chunk=True)
        _launch_kalman(
            ends, tuple(composed[:, :, :-1]), precision, [part.unsqueeze(1) for part in state],
            starts[0][:, 1:], starts[1][:, 1:], None,
        )  # fmt: skip
    _launch_kalman(plan, inputs, precision, starts, mean, variance, None)


def _launch_kalman(
    plan: Plan, inputs: tuple[Tensor, ...], precision: Tensor, starts: list[Tensor], mean: Tensor | None,
    variance: Tensor | None, composed: Tensor | None,
) -> None:  # fmt: skip
    """Filter all chunks from `starts`, or compose each into `composed` [5, B, chunks, C].

    `inputs` are (A, b, y), or the five parts of elements.
    """
    operands = [*inputs, *inputs[:2]][:5]  # without elements the last two are not read
    out = inputs[0] if mean is None else mean
    spread = out if variance is None else variance
    _kalman[(plan.programs,)](
        *operands, precision.contiguous(), *starts, out, spread, out if composed is None else composed,
        inputs[1].shape[1], inputs[1].shape[2], inputs[1].shape[0], plan.chunks, plan.tiles,
        *inputs[0].stride(), *inputs[1].stride(), *inputs[2].stride(), *starts[0].stride(), *starts[1].stride(),
        *out.stride(), *spread.stride(),
        ELEMENTS=len(inputs) == 5, REDUCE=composed is not None, KEEP=variance is not None,
        BLOCK_T=plan.block_t, BLOCK_C=plan.block_c, enable_fp_fusion=True,
    )  # fmt: skip


@triton.jit
def _compose_filters(a1, b1, C1, e1, J1, a2, b2, C2, e2, J2):
    shrunk1 = a1 / (1.0 + C1 * J2)
    shrunk2 = a2 / (1.0 + C1 * J2)
    return (
        a2 * shrunk1,
        shrunk2 * (b1 + C1 * e2) + b2,
        shrunk2 * C1 * a2 + C2,
        shrunk1 * (e2 - J2 * b1) + e1,
        shrunk1 * J2 * a1 + J1,
    )


@triton.jit
def _kalman(
    A, b, y, eta, J, precision, means, variances, mean, variance, composed, time, channels, batch, chunks, tiles,
    A_row, A_time, A_c, b_row, b_time, b_c, y_row, y_time, y_c, m_row, m_chunk, m_c, v_row, v_chunk, v_c,
    o_row, o_time, o_c, w_row, w_time, w_c,
    ELEMENTS: tl.constexpr, REDUCE: tl.constexpr, KEEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Filter a chunk, or with REDUCE compose it. With ELEMENTS, A … J are elements of A's strides (y is their C)."""
    row, chunk, first, c = place(channels, chunks, tiles, BLOCK_T, BLOCK_C)
    real: tl.constexpr = b.dtype.element_ty
    k = tl.load(precision + row)
    keep = 1.0 / (1.0 + k)
    gain = k / (1.0 + k)
    m = tl.zeros((BLOCK_C,), real)
    v = m
    ta, tb, tC, te, tJ = m + 1.0, m, m, m, m
    if not REDUCE:
        m = tl.load(means + row * m_row + chunk * m_chunk + c * m_c, mask=c < channels, other=0.0)
        v = tl.load(variances + row * v_row + chunk * v_chunk + c * v_c, mask=c < channels, other=0.0)
    for tile in range(tiles):
        t = first + tile * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < time)[:, None] & (c < channels)[None, :]
        at = row * A_row + t[:, None] * A_time + c[None, :] * A_c
        ea = tl.load(A + at, mask=inside, other=1.0)
        if ELEMENTS:
            eb = tl.load(b + at, mask=inside, other=0.0)
            eC = tl.load(y + at, mask=inside, other=0.0)
            ee = tl.load(eta + at, mask=inside, other=0.0)
            eJ = tl.load(J + at, mask=inside, other=0.0)
        else:
            transition = ea
            bias = tl.load(b + row * b_row + t[:, None] * b_time + c[None, :] * b_c, mask=inside, other=0.0)
            seen = tl.load(y + row * y_row + t[:, None] * y_time + c[None, :] * y_c, mask=inside, other=0.0)
            gap = gain * (seen - bias)
            ea = tl.where(inside, keep * transition, 1.0)
            eb = bias + gap
            eC = tl.where(inside, keep, 0.0)
            ee = transition * gap
            eJ = tl.where(inside, gain * transition * transition, 0.0)
        ea, eb, eC, ee, eJ = tl.associative_scan((ea, eb, eC, ee, eJ), 0, _compose_filters)
        if REDUCE:
            la, lb, lC = last(ea, BLOCK_T), last(eb, BLOCK_T), last(eC, BLOCK_T)
            le, lJ = last(ee, BLOCK_T), last(eJ, BLOCK_T)
            ta, tb, tC, te, tJ = _compose_filters(ta, tb, tC, te, tJ, la, lb, lC, le, lJ)
        else:
            shrunk = ea / (1.0 + v[None, :] * eJ)
            eb = shrunk * (m[None, :] + v[None, :] * ee) + eb
            eC = shrunk * v[None, :] * ea + eC
            tl.store(mean + row * o_row + t[:, None] * o_time + c[None, :] * o_c, eb, mask=inside)
            if KEEP:
                tl.store(variance + row * w_row + t[:, None] * w_time + c[None, :] * w_c, eC, mask=inside)
            m, v = last(eb, BLOCK_T), last(eC, BLOCK_T)
    if REDUCE:
        at = (row * chunks + chunk) * channels + c
        part = (row * 0 + batch) * chunks * channels  # row, because a batch of 1 is a constant here, of no type
        tl.store(composed + at, ta, mask=c < channels)
        tl.store(composed + part + at, tb, mask=c < channels)
        tl.store(composed + 2 * part + at, tC, mask=c < channels)
        tl.store(composed + 3 * part + at, te, mask=c < channels)
        tl.store(composed + 4 * part + at, tJ, mask=c < channels)
