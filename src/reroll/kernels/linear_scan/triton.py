"""linear_scan and the scalar Kalman filter on a CUDA device: parallel over sequences, channels and chunks of time.

Three phases. Each program composes the steps of one chunk of time; a second launch scans the chunks, which gives the
state at the start of each; a third steps through all chunks at once. So A and b are read twice and the states written
once, and one channel of one long sequence fills a GPU as well as many short ones. Within a chunk, tiles of
[time, channels] are scanned by `tl.associative_scan`. With few chunks to win, the first two phases are left out.

Diagonal A and 2×2 blocks, float32 and float64. Without a GPU the same code runs in Triton's interpreter
(`TRITON_INTERPRET=1`), in small tiles.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.linear_scan.operators import Affine, Operator, State

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_TILE = 8 if INTERPRETED else 2048  # numbers of one array in a tile
_PROGRAMS = 4 if INTERPRETED else 1024  # programs that fill a device


class _Plan(NamedTuple):
    """How a scan is divided: chunks of `tiles` tiles of [block_t, block_c], for each sequence and block of channels."""

    chunks: int
    tiles: int
    block_t: int
    block_c: int
    programs: int


def _plan(batch: int, time: int, channels: int, tile: int, one_chunk: bool = False) -> _Plan:
    block_c = min(triton.next_power_of_2(channels), 32, tile // 2)
    block_t = min(triton.next_power_of_2(time), tile // block_c)
    rows = batch * triton.cdiv(channels, block_c)
    total = triton.cdiv(time, block_t)
    chunks = 1 if one_chunk else min(total, triton.cdiv(_PROGRAMS, rows))
    tiles = triton.cdiv(total, chunks)
    chunks = triton.cdiv(total, tiles)
    return _Plan(chunks, tiles, block_t, block_c, rows * chunks)


def scan(operator: Affine, A: Tensor, b: Tensor, initial: Tensor, out: Tensor, reverse: bool) -> None:
    """Write s_t = A_t s_{t−1} + b_t into `out`, which may be b; see `reroll.kernels.linear_scan.scan_into`."""
    if operator.name == "diagonal":
        A, b, initial, out = A[:, :, None, None], b[:, :, None], initial[:, None], out[:, :, None]
    batch, time, order, channels = b.shape
    plan = _plan(batch, time, channels, _TILE // order)
    starts = initial.unsqueeze(1)
    if plan.chunks > 1:
        whole_A = b.new_empty(batch, plan.chunks, order, order, channels)
        whole_b = b.new_empty(batch, plan.chunks, order, channels)
        _launch_affine(plan, A, b, starts, out, reverse, (whole_A, whole_b))
        starts = b.new_empty(batch, plan.chunks, order, channels)
        starts[:, 0] = initial
        ends = _plan(batch, plan.chunks - 1, channels, _TILE // order, one_chunk=True)
        _launch_affine(ends, whole_A[:, :-1], whole_b[:, :-1], initial.unsqueeze(1), starts[:, 1:], False, None)
    _launch_affine(plan, A, b, starts, out, reverse, None)


def _launch_affine(
    plan: _Plan, A: Tensor, b: Tensor, starts: Tensor, out: Tensor, reverse: bool, whole: tuple[Tensor, Tensor] | None
) -> None:
    """Step through all chunks from `starts` [B, chunks, K, C] into `out`, or compose each into `whole`."""
    whole_A, whole_b = (A, b) if whole is None else whole
    _affine[(plan.programs,)](
        A, b, starts, out, whole_A, whole_b, b.shape[1], b.shape[3], plan.chunks, plan.tiles,
        *_from(A, reverse), *_from(b, reverse), *starts.stride(), *_from(out, reverse),
        K=b.shape[2], REDUCE=whole is not None, BLOCK_T=plan.block_t, BLOCK_C=plan.block_c, enable_fp_fusion=True,
    )  # fmt: skip


def kalman(
    operator: Operator, given: tuple[Tensor, Tensor, Tensor], precision: Tensor, state: State, into: Any
) -> None:
    """Write mean and (unless None) variance after every step `into` memory; see `kalman_scan`."""
    batch, time, channels = given[1].shape
    mean, variance = into
    plan = _plan(batch, time, channels, _TILE // 2)
    starts = [part.unsqueeze(1) for part in state]
    if plan.chunks > 1:
        whole = mean.new_empty(5, batch, plan.chunks, channels)
        _launch_kalman(plan, given, precision, starts, None, None, whole)
        starts = [mean.new_empty(batch, plan.chunks, channels) for _ in state]
        for start, part in zip(starts, state):
            start[:, 0] = part
        ends = _plan(batch, plan.chunks - 1, channels, _TILE // 2, one_chunk=True)
        _launch_kalman(
            ends, tuple(whole[:, :, :-1]), precision, [part.unsqueeze(1) for part in state],
            starts[0][:, 1:], starts[1][:, 1:], None,
        )  # fmt: skip
    _launch_kalman(plan, given, precision, starts, mean, variance, None)


def _launch_kalman(
    plan: _Plan, given: tuple[Tensor, ...], precision: Tensor, starts: list[Tensor], mean: Tensor | None,
    variance: Tensor | None, whole: Tensor | None,
) -> None:  # fmt: skip
    """Filter all chunks from `starts`, given (A, b, y) or elements; or compose each into `whole` [5, B, chunks, C]."""
    elements = len(given) == 5
    inputs = [*given, *given[:2]][:5]  # what is not there is not read
    out = inputs[0] if mean is None else mean
    spread = out if variance is None else variance
    _kalman[(plan.programs,)](
        *inputs, precision.contiguous(), *starts, out, spread, out if whole is None else whole,
        given[1].shape[1], given[1].shape[2], given[1].shape[0], plan.chunks, plan.tiles,
        *given[0].stride(), *given[1].stride(), *given[2].stride(), *starts[0].stride(), *starts[1].stride(),
        *out.stride(), *spread.stride(),
        ELEMENTS=elements, REDUCE=whole is not None, KEEP=variance is not None,
        BLOCK_T=plan.block_t, BLOCK_C=plan.block_c, enable_fp_fusion=True,
    )  # fmt: skip


def _from(tensor: Tensor, reverse: bool) -> tuple[int, ...]:
    """Return where the scan starts and all strides; time runs backwards in reverse."""
    row, time, *others = tensor.stride()
    return ((tensor.shape[1] - 1) * time, row, -time, *others) if reverse else (0, row, time, *others)


@triton.jit
def _place(channels, chunks, tiles, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sequence, the chunk, its first step and the channels of this program."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    chunk = program % chunks
    row = (program // chunks // blocks).to(tl.int64)
    c = (program // chunks % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return row, chunk.to(tl.int64), chunk.to(tl.int64) * tiles * BLOCK_T, c


@triton.jit
def _last(x, BLOCK_T: tl.constexpr):
    """The last row of a tile."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_T)[:, None] == BLOCK_T - 1, x, 0.0), 0)


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
    A, b, starts, out, whole_A, whole_b, time, channels, chunks, tiles,
    A_first, A_row, A_time, A_i, A_j, A_c, b_first, b_row, b_time, b_i, b_c, s_row, s_chunk, s_i, s_c,
    o_first, o_row, o_time, o_i, o_c,
    K: tl.constexpr, REDUCE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row, chunk, first, c = _place(channels, chunks, tiles, BLOCK_T, BLOCK_C)
    A += A_first + row * A_row
    b += b_first + row * b_row
    out += o_first + row * o_row
    starts += row * s_row + chunk * s_chunk + c * s_c
    real: tl.constexpr = b.dtype.element_ty
    s0 = tl.zeros((BLOCK_C,), real)
    s1 = s0
    p00, p11 = s0 + 1.0, s0 + 1.0
    p01, p10 = s0, s0
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
                p00 = _last(a00, BLOCK_T) * p00
            else:
                tl.store(at_out, x0, mask=inside)
            s0 = _last(x0, BLOCK_T)
        else:
            a01 = tl.load(at_A + A_j, mask=inside, other=0.0)
            a10 = tl.load(at_A + A_i, mask=inside, other=0.0)
            a11 = tl.load(at_A + A_i + A_j, mask=inside, other=1.0)
            x1 = tl.load(at_b + b_i, mask=inside, other=0.0)
            a00, a01, a10, a11, x0, x1 = tl.associative_scan((a00, a01, a10, a11, x0, x1), 0, _compose_blocks)
            x0 = a00 * s0[None, :] + a01 * s1[None, :] + x0
            x1 = a10 * s0[None, :] + a11 * s1[None, :] + x1
            if REDUCE:
                q00, q01, q10, q11 = _last(a00, BLOCK_T), _last(a01, BLOCK_T), _last(a10, BLOCK_T), _last(a11, BLOCK_T)
                p00, p10 = q00 * p00 + q01 * p10, q10 * p00 + q11 * p10
                p01, p11 = q00 * p01 + q01 * p11, q10 * p01 + q11 * p11
            else:
                tl.store(at_out, x0, mask=inside)
                tl.store(at_out + o_i, x1, mask=inside)
            s0, s1 = _last(x0, BLOCK_T), _last(x1, BLOCK_T)
    if REDUCE:
        at = (row * chunks + chunk) * K * channels + c
        matrix = (row * chunks + chunk) * K * K * channels + c
        tl.store(whole_A + matrix, p00, mask=c < channels)
        tl.store(whole_b + at, s0, mask=c < channels)
        if K == 2:
            tl.store(whole_A + matrix + channels, p01, mask=c < channels)
            tl.store(whole_A + matrix + 2 * channels, p10, mask=c < channels)
            tl.store(whole_A + matrix + 3 * channels, p11, mask=c < channels)
            tl.store(whole_b + at + channels, s1, mask=c < channels)


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
    A, b, y, eta, J, precision, means, variances, mean, variance, whole, time, channels, batch, chunks, tiles,
    A_row, A_time, A_c, b_row, b_time, b_c, y_row, y_time, y_c, m_row, m_chunk, m_c, v_row, v_chunk, v_c,
    o_row, o_time, o_c, w_row, w_time, w_c,
    ELEMENTS: tl.constexpr, REDUCE: tl.constexpr, KEEP: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Elements, where they are given, lie as A does; y is then their C. Their gain is that of `elements`."""
    row, chunk, first, c = _place(channels, chunks, tiles, BLOCK_T, BLOCK_C)
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
            given = tl.load(b + row * b_row + t[:, None] * b_time + c[None, :] * b_c, mask=inside, other=0.0)
            seen = tl.load(y + row * y_row + t[:, None] * y_time + c[None, :] * y_c, mask=inside, other=0.0)
            gap = gain * (seen - given)
            ea = tl.where(inside, keep * transition, 1.0)
            eb = given + gap
            eC = tl.where(inside, keep, 0.0)
            ee = transition * gap
            eJ = tl.where(inside, gain * transition * transition, 0.0)
        ea, eb, eC, ee, eJ = tl.associative_scan((ea, eb, eC, ee, eJ), 0, _compose_filters)
        if REDUCE:
            la, lb, lC = _last(ea, BLOCK_T), _last(eb, BLOCK_T), _last(eC, BLOCK_T)
            le, lJ = _last(ee, BLOCK_T), _last(eJ, BLOCK_T)
            ta, tb, tC, te, tJ = _compose_filters(ta, tb, tC, te, tJ, la, lb, lC, le, lJ)
        else:
            shrunk = ea / (1.0 + v[None, :] * eJ)
            eb = shrunk * (m[None, :] + v[None, :] * ee) + eb
            eC = shrunk * v[None, :] * ea + eC
            tl.store(mean + row * o_row + t[:, None] * o_time + c[None, :] * o_c, eb, mask=inside)
            if KEEP:
                tl.store(variance + row * w_row + t[:, None] * w_time + c[None, :] * w_c, eC, mask=inside)
            m, v = _last(eb, BLOCK_T), _last(eC, BLOCK_T)
    if REDUCE:
        at = (row * chunks + chunk) * channels + c
        part = batch.to(tl.int64) * chunks * channels
        tl.store(whole + at, ta, mask=c < channels)
        tl.store(whole + part + at, tb, mask=c < channels)
        tl.store(whole + 2 * part + at, tC, mask=c < channels)
        tl.store(whole + 3 * part + at, te, mask=c < channels)
        tl.store(whole + 4 * part + at, tJ, mask=c < channels)
