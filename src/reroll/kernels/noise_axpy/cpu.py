"""noise_axpy on the CPU: Numba, sixteen weights at a time, no memory beyond 16 KB per thread.

Work goes by panels of 16 consecutive blocks (2,048 sign bits). The 16 Philox calls of a panel run side by side in
vector lanes; each word then flips the sign of 32 copies of the factor by a bit mask, so a probe costs one addition per
weight and p is read and written once whatever the number of probes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit, types, uint32, uint64
from numba.extending import overload
from torch import Tensor

from reroll.kernels.jit import jit
from reroll.kernels.noise_axpy.noises import Stream, layout
from reroll.kernels.philox import MULTIPLIERS, WEYL
from reroll.kernels.simd import LANES, add, load, masked_signs, signs, store
from reroll.kernels.threads import split

PANEL = LANES * 128
"""Weights of one panel."""

_M0, _M1 = (np.uint64(m) for m in MULTIPLIERS)
_W0, _W1 = (np.uint64(w) for w in WEYL)
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_PER_THREAD = 8  # panels below which another thread costs more than it saves


# ---- calling the kernels from torch: all tensors are contiguous


def axpy(p: Tensor, out: Tensor, stream: Stream, first_row: int, probes: np.ndarray, factors: np.ndarray) -> None:
    """Compute out ← p + Σ_k factors[k] · z(probes[k]); see `noise_axpy`."""
    prepare(p, out, stream, first_row)(probes, factors)


def prepare(p: Tensor, out: Tensor, stream: Stream, first_row: int) -> Callable[[np.ndarray, np.ndarray], None]:
    """Return `axpy` as a function of probes and factors alone: for a small tensor most of a call is preparation."""
    rows, columns = layout(p.shape)
    source, target, spec = _array(p, (rows, columns)), _array(out, (rows, columns)), _spec(stream)
    panels = -(-rows * -(-columns // 128) // LANES)

    def add(probes: np.ndarray, factors: np.ndarray) -> None:
        if panels < 2 * _PER_THREAD:
            _axpy(target, source, first_row, *spec, probes, factors, 0, panels)
        else:
            operands = target, source, first_row, *spec, probes, factors
            split(lambda begin, end: _axpy(*operands, begin, end), panels, _PER_THREAD)

    return add


def axpy_each(p: Tensor, out: Tensor, stream: Stream, probes: np.ndarray, factors: np.ndarray) -> None:
    """Compute out[k] ← p + factors[k] · z(probes[k]); see `noise_axpy_each`."""
    rows, columns = layout(p.shape)
    source, target, spec = _array(p, (rows, columns)), _array(out, (len(probes), rows, columns)), _spec(stream)

    def work(begin: int, end: int) -> None:
        _axpy_each(target, source, *spec, probes, factors, begin, end)

    split(work, len(probes), -(-_PER_THREAD * PANEL // p.numel()))


def axpy_rows(p: Tensor, out: Tensor, rows: Tensor, stream: Stream, probe: int, factors: np.ndarray) -> None:
    """Compute out[i] ← p[rows[i]] + factor · z at row rows[i]; see `noise_axpy_rows`."""
    source, target, spec = _array(p, tuple(p.shape)), _array(out, tuple(out.shape)), _spec(stream)
    indices, probes = rows.numpy(), np.array([probe], dtype=np.uint32)

    def work(begin: int, end: int) -> None:
        _axpy_rows(target, source, indices, *spec, probes, factors, begin, end)

    split(work, len(indices), -(-_PER_THREAD * PANEL // p.shape[1]))


def _spec(stream: Stream) -> tuple[np.uint32, np.uint32, np.ndarray, bool]:
    k0, k1 = stream.key.words
    return np.uint32(k0), np.uint32(k1), np.array(stream.ids, dtype=np.uint32), stream.is_normal


def _array(tensor: Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """View a contiguous tensor as a numpy array; bf16 as its 16-bit patterns, which numpy has no type for."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16).reshape(shape)
    return tensor.numpy().reshape(shape)


# ---- the kernels


@jit
def _axpy(out, p, first_row, k0, k1, ids, normal, probes, factors, begin, end):
    """out ← p + Σ_k factors[k] z(probes[k]) for the panels begin … end − 1 of a [rows, columns] array."""
    rows, columns = p.shape
    per_row = (columns + 127) // 128
    words = np.empty(4 * LANES, np.uint32)
    masks = np.empty(4 * LANES, np.uint32)
    partial = np.empty(PANEL, factors.dtype)
    total = np.empty(PANEL, factors.dtype)
    for panel in range(begin, end):
        block = panel * LANES
        count = min(LANES, rows * per_row - block)
        if len(probes) > 128:
            total[:] = 0
        for start in range(0, len(probes), 128):
            partial[:] = 0
            for k in range(start, min(start + 128, len(probes))):
                if normal:
                    for lane in range(count):
                        row, column = divmod(block + lane, per_row)
                        position = (first_row + row) * columns + column * 128
                        length = min(128, columns - column * 128)
                        _add_normals(partial, lane * 128, length, position, k0, k1, ids[0], probes[k], factors[k])
                else:
                    _philox(words, k0, k1, first_row * per_row + block, probes[k], ids[0])
                    if len(ids) > 1:
                        masks[:] = uint32(0xFFFFFFFF)
                        for m in range(1, len(ids)):
                            _and_philox(masks, k0, k1, first_row * per_row + block, probes[k], ids[m])
                        _add_masked(partial, words, masks, factors[k])
                    else:
                        _add_signs(partial, words, factors[k])
            if len(probes) > 128:
                for j in range(PANEL):
                    total[j] += partial[j]
        steps = total if len(probes) > 128 else partial
        for lane in range(count):
            row, column = divmod(block + lane, per_row)
            start = column * 128
            length = min(128, columns - start)
            source, target = p[row, start : start + length], out[row, start : start + length]
            for j in range(length):
                target[j] = _round(target, _widen(source[j]) + steps[lane * 128 + j])


@jit
def _axpy_each(out, p, k0, k1, ids, normal, probes, factors, begin, end):
    panels = (p.shape[0] * ((p.shape[1] + 127) // 128) + LANES - 1) // LANES
    for k in range(begin, end):
        _axpy(out[k], p, 0, k0, k1, ids, normal, probes[k : k + 1], factors[k : k + 1], 0, panels)


@jit
def _axpy_rows(out, p, rows, k0, k1, ids, normal, probes, factors, begin, end):
    panels = ((p.shape[1] + 127) // 128 + LANES - 1) // LANES
    for i in range(begin, end):
        row = rows[i]
        _axpy(out[i : i + 1], p[row : row + 1], row, k0, k1, ids, normal, probes, factors, 0, panels)


@jit
def _add_signs(partial, words, factor):
    for lane in range(LANES):
        for w in range(4):
            word, at = words[w * LANES + lane], lane * 128 + w * 32
            store(partial, at, add(load(partial, at), signs(word, uint32(0), factor)))
            store(partial, at + 16, add(load(partial, at + 16), signs(word, uint32(16), factor)))


@jit
def _add_masked(partial, words, masks, factor):
    for lane in range(LANES):
        for w in range(4):
            word, mask, at = words[w * LANES + lane], masks[w * LANES + lane], lane * 128 + w * 32
            store(partial, at, add(load(partial, at), masked_signs(word, mask, uint32(0), factor)))
            store(partial, at + 16, add(load(partial, at + 16), masked_signs(word, mask, uint32(16), factor)))


@jit
def _add_normals(partial, at, length, position, k0, k1, stream, probe, factor):
    """Add factor · z for flat positions position … position + length − 1; Box–Muller as in the reference."""
    scale = 2.0**-32
    z = np.empty(4, np.float32)
    for j in range(length):
        block, lane = divmod(position + j, 4)
        if j == 0 or lane == 0:
            c0, c1, c2, c3 = _block(uint64(block), uint64(k0), uint64(k1), uint64(probe), uint64(stream))
            for pair, (first, second) in enumerate(((c0, c1), (c2, c3))):
                radius = np.sqrt(-2.0 * np.log((float(first) + 0.5) * scale))
                angle = 2.0 * np.pi * ((float(second) + 0.5) * scale)
                z[2 * pair], z[2 * pair + 1] = radius * np.cos(angle), radius * np.sin(angle)
        partial[at + j] += z[lane] * factor


@jit
def _philox(words, k0, k1, first, probe, stream):
    """Fill words[w · 16 + l] with word w of block first + l. LLVM vectorises this loop over the lanes."""
    for lane in range(LANES):
        c0, c1, c2, c3 = _block(uint64(first + lane), uint64(k0), uint64(k1), uint64(probe), uint64(stream))
        words[lane] = uint32(c0)
        words[LANES + lane] = uint32(c1)
        words[2 * LANES + lane] = uint32(c2)
        words[3 * LANES + lane] = uint32(c3)


@jit
def _and_philox(words, k0, k1, first, probe, stream):
    more = np.empty(4 * LANES, np.uint32)
    _philox(more, k0, k1, first, probe, stream)
    for i in range(4 * LANES):
        words[i] &= more[i]


@njit(inline="always")
def _round_of(c0, c1, c2, c3, k0, k1):
    p0, p1 = _M0 * c0, _M1 * c2
    return (p1 >> _32) ^ c1 ^ k0, p1 & _LOW, (p0 >> _32) ^ c3 ^ k1, p0 & _LOW, (k0 + _W0) & _LOW, (k1 + _W1) & _LOW


@njit(inline="always")
def _block(index, k0, k1, c2, c3):
    """Philox4x32-10, all words in uint64. Written out because an inner loop would keep LLVM from using the lanes."""
    c0, c1 = index & _LOW, index >> _32
    c0, c1, c2, c3, k0, k1 = _round_of(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round_of(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round_of(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round_of(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round_of(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round_of(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round_of(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round_of(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round_of(c0, c1, c2, c3, k0, k1)
    c0, c1, c2, c3, k0, k1 = _round_of(c0, c1, c2, c3, k0, k1)
    return c0, c1, c2, c3


# ---- bf16, which is the upper half of a float32


def _widen(value: Any) -> Any:
    """Return a stored weight as a float: bf16 bit patterns (uint16) become float32, floats stay."""


@overload(_widen, inline="always")
def _widen_implementation(value):
    if value == types.uint16:
        return lambda value: np.uint32(uint32(value) << uint32(16)).view(np.float32)
    return lambda value: value


def _round(target: Any, value: Any) -> Any:
    """Return a float as the element type of `target`: rounded to nearest even for bf16, else as numpy converts it."""


@overload(_round, inline="always")
def _round_implementation(target, value):
    if target.dtype != types.uint16:
        return lambda target, value: value

    def to_bf16(target, value):
        bits = np.float32(value).view(np.uint32)
        if (bits & uint32(0x7FFFFFFF)) > uint32(0x7F800000):
            return np.uint16(0x7FC0)
        return np.uint16((bits + uint32(0x7FFF) + ((bits >> uint32(16)) & uint32(1))) >> uint32(16))

    return to_bf16
