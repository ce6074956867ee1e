"""noise_axpy in plain torch operations: the readable version, for any device and dtype. The others must equal it.

Bits are unpacked into int64 tensors, so it needs about a hundred bytes per weight while it runs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from reroll.kernels.noise_axpy.noises import BLOCK, PROBE_BLOCK, Stream, layout
from reroll.kernels.philox import MASK, philox


def axpy(p: Tensor, out: Tensor, stream: Stream, first_row: int, probes: np.ndarray, factors: np.ndarray) -> None:
    """Compute out ← p + Σ_k factors[k] · z(probes[k]); see `noise_axpy`."""
    rows, columns = layout(p.shape)
    numbers = torch.arange(first_row, first_row + rows, device=p.device)
    total = torch.zeros((), device=p.device)
    for begin in range(0, len(probes), PROBE_BLOCK):
        partial = torch.zeros((), device=p.device)
        for k in range(begin, min(begin + PROBE_BLOCK, len(probes))):
            partial = partial + _term(numbers, columns, stream, int(probes[k]), factors[k])
        total = total + partial
    _write(p, out, total)


def axpy_rows(p: Tensor, out: Tensor, rows: Tensor, stream: Stream, probe: int, factors: np.ndarray) -> None:
    """Compute out[i] ← p[rows[i]] + factor · z at row rows[i]; see `noise_axpy_rows`."""
    _write(p[rows], out, _term(rows, p.shape[1], stream, probe, factors[0]))


def _term(rows: Tensor, columns: int, stream: Stream, probe: int, factor: np.floating) -> Tensor:
    """Return factor · z for the rows with these numbers, [rows, columns], rounded once to the dtype of the factor."""
    scalar = torch.tensor(factor, device=rows.device)
    if stream.is_normal:
        positions = rows.unsqueeze(1) * columns + torch.arange(columns, device=rows.device)
        # Two operations, here and in the sum: a fused multiply-add would round once where the definition rounds twice.
        return normals(positions, stream, probe).to(scalar.dtype) * scalar
    count = -(-columns // BLOCK)
    blocks = rows.unsqueeze(1) * count + torch.arange(count, device=rows.device)
    negative, *masks = (bits(blocks, columns, stream.key.words, i, probe) for i in stream.ids)
    z = torch.where(negative, -scalar, scalar)
    for keep in masks:
        z = torch.where(keep, z, torch.zeros_like(scalar))
    return z


def bits(blocks: Tensor, columns: int, key: tuple[int, int], stream: int, probe: int) -> Tensor:
    """Return the first `columns` bits of each row of blocks (int64 [rows, ⌈columns/128⌉]) as booleans."""
    words = torch.stack(philox(blocks & MASK, blocks >> 32, probe, stream, key), dim=-1)
    shifts = torch.arange(32, device=blocks.device)
    return ((words.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :columns].bool()


def normals(positions: Tensor, stream: Stream, probe: int) -> Tensor:
    """Return standard normal numbers at flat positions (int64, any shape): Box–Muller in fp64, rounded to fp32.

    Positions 4b … 4b+3 come from the four words of block b, u = (w + ½)·2⁻³²: two pairs (radius from the first word,
    angle from the second; cosine, then sine).
    """
    block, lane = positions // 4, positions % 4
    words = torch.stack(philox(block & MASK, block >> 32, probe, stream.ids[0], stream.key.words), dim=-1)
    uniform = (words.double() + 0.5) * 2.0**-32
    pair = (lane // 2 * 2).unsqueeze(-1)
    radius = torch.sqrt(-2.0 * torch.log(uniform.gather(-1, pair))).squeeze(-1)
    angle = 2.0 * math.pi * uniform.gather(-1, pair + 1).squeeze(-1)
    return (radius * torch.where(lane % 2 == 0, torch.cos(angle), torch.sin(angle))).float()


def _write(p: Tensor, out: Tensor, total: Tensor) -> None:
    wide = torch.promote_types(torch.promote_types(p.dtype, torch.float32), total.dtype)
    out.copy_(p.to(wide) + total.view(p.shape).to(wide))
