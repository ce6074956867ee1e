"""noise_axpy on a CUDA device: one Triton program per eight blocks of noise, bits made and used in registers.

p is read and written once whatever the number of probes. Without a GPU the same code runs in Triton's interpreter
(`TRITON_INTERPRET=1`), which is how the tests compare it with the reference, bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from reroll.kernels.noise_axpy.noises import BLOCK, Stream, layout

_BLOCKS = 8  # blocks of 128 bits per program


def axpy(p: Tensor, out: Tensor, stream: Stream, first_row: int, probes: np.ndarray, factors: np.ndarray) -> None:
    """Compute out ← p + Σ_k factors[k] · z(probes[k]); see `noise_axpy`."""
    _launch(p, None, out, layout(p.shape), stream, first_row, probes, factors)


def axpy_rows(p: Tensor, out: Tensor, rows: Tensor, stream: Stream, probe: int, factors: np.ndarray) -> None:
    """Compute out[i] ← p[rows[i]] + factor · z at row rows[i]; see `noise_axpy_rows`."""
    shape = (len(rows), p.shape[1])
    _launch(p, rows.contiguous(), out, shape, stream, 0, np.array([probe], dtype=np.uint32), factors)


def _launch(
    p: Tensor, rows: Tensor | None, out: Tensor, shape: tuple[int, int], stream: Stream, first_row: int,
    probes: np.ndarray, factors: np.ndarray,
) -> None:  # fmt: skip
    count, columns = shape
    per_row = -(-columns // BLOCK)
    k0, k1 = stream.key.words
    device = p.device
    # torch has no uint32 operations: probes and ids are passed as int32 bit patterns, and the kernel casts them back.
    indices = torch.from_numpy(probes.view(np.int32)).to(device)
    scalars = torch.from_numpy(np.ascontiguousarray(factors)).to(device)
    ids = torch.from_numpy(np.array(stream.ids, dtype=np.uint32).view(np.int32)).to(device)
    _kernel[(triton.cdiv(count * per_row, _BLOCKS),)](
        _patterns(p), _patterns(out), indices if rows is None else rows, indices, scalars, ids, count, columns,
        per_row, first_row, k0 | k1 << 32, len(probes), MASKS=len(stream.ids) - 1, NORMAL=stream.is_normal,
        ROWS=rows is not None, DOUBLE=factors.dtype == np.float64, BLOCKS=_BLOCKS, enable_fp_fusion=False,
    )  # fmt: skip


def _patterns(tensor: Tensor) -> Tensor:
    # bf16 is read and rounded by hand, on its bits: Triton's interpreter truncates where a GPU rounds to nearest even.
    return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor


@triton.jit
def _words(key, block, probe, stream):
    """The four words of each block, [BLOCKS, 4]."""
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = low * 0
    w0, w1, w2, w3 = tl.philox(key, low, high, zero + probe, zero + stream)
    return w0, w1, w2, w3


@triton.jit
def _bits(key, block, probe, stream, BLOCKS: tl.constexpr):
    """The 128 bits of each block, [BLOCKS, 128], in order."""
    w0, w1, w2, w3 = _words(key, block, probe, stream)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCKS, 4, 1))
    shifts = tl.arange(0, 32).to(tl.uint32)[None, None, :]
    return tl.reshape((words >> shifts) & 1, (BLOCKS, 128))


@triton.jit
def _normals(key, position, probe, stream):
    """Box–Muller at flat positions, in fp64, rounded to fp32."""
    w0, w1, w2, w3 = _words(key, position // 4, probe, stream)
    lane = position % 4
    first = tl.where(lane < 2, w0, w2).to(tl.float64)
    second = tl.where(lane < 2, w1, w3).to(tl.float64)
    scale: tl.constexpr = 2.3283064365386963e-10
    radius = tl.sqrt(-2.0 * tl.log((first + 0.5) * scale))
    angle = 6.283185307179586 * ((second + 0.5) * scale)
    return (radius * tl.where(lane % 2 == 0, tl.cos(angle), tl.sin(angle))).to(tl.float32)


@triton.jit(do_not_specialize=["first_row", "count", "key", "probes"])
def _kernel(
    p, out, rows, indices, factors, ids, count, columns, per_row, first_row, key, probes,
    MASKS: tl.constexpr, NORMAL: tl.constexpr, ROWS: tl.constexpr, DOUBLE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    real: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS).to(tl.int64)
    row = block // per_row
    column = (block % per_row)[:, None] * 128 + tl.arange(0, 128)[None, :]
    inside = (row < count)[:, None] & (column < columns)
    if ROWS:
        source = tl.load(rows + row, mask=row < count, other=0)
        noise_row = source
    else:
        source = row
        noise_row = row + first_row
    noise_block = noise_row * per_row + block % per_row
    position = noise_row[:, None] * columns + column

    total = tl.zeros((BLOCKS, 128), real)
    for start in range(0, probes, 128):
        partial = tl.zeros((BLOCKS, 128), real)
        for k in range(start, tl.minimum(start + 128, probes)):
            probe = tl.load(indices + k).to(tl.uint32, bitcast=True)
            factor = tl.load(factors + k)
            stream = tl.load(ids).to(tl.uint32, bitcast=True)
            if NORMAL:
                term = _normals(key, position, probe, stream).to(real) * factor
            else:
                term = tl.where(_bits(key, noise_block, probe, stream, BLOCKS) == 0, factor, -factor)
                for m in range(MASKS):
                    mask = tl.load(ids + 1 + m).to(tl.uint32, bitcast=True)
                    term = tl.where(_bits(key, noise_block, probe, mask, BLOCKS) == 0, 0.0, term)
            partial += term
        total += partial

    old = tl.load(p + source[:, None] * columns + column, mask=inside, other=0)
    if old.dtype == tl.int16:
        wide = (old.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = old
    new = wide.to(real) + total if wide.dtype == tl.float32 else wide + total.to(tl.float64)
    if out.dtype.element_ty == tl.int16:
        bits = new.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded)
        result = rounded.to(tl.uint16).to(tl.int16, bitcast=True)
    else:
        result = new.to(out.dtype.element_ty)
    tl.store(out + row[:, None] * columns + column, result, mask=inside)
