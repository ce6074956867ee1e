"""How a scan is divided among the programs of a device, and what its kernels have in common.

Three phases. Each program composes the steps of one chunk of time; a second launch scans the chunks, which gives the
state at the start of each; a third steps through all chunks at once. So A and b are read twice and the states written
once, and one channel of one long sequence fills a GPU as well as many short ones. A scan that is a single chunk skips
the first two phases.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TILE = 8 if INTERPRETED else 2048  # numbers of one array in a tile
PROGRAMS = 4 if INTERPRETED else 1024  # programs that fill a device


class Plan(NamedTuple):
    """How a scan is divided: chunks of `tiles` tiles of [block_t, block_c], for each sequence and block of channels."""

    chunks: int
    tiles: int
    block_t: int
    block_c: int
    programs: int


def plan_of(batch: int, time: int, channels: int, tile: int, one_chunk: bool = False) -> Plan:
    block_c = min(triton.next_power_of_2(channels), 32, tile // 2)
    block_t = min(triton.next_power_of_2(time), tile // block_c)
    rows = batch * triton.cdiv(channels, block_c)
    total = triton.cdiv(time, block_t)
    chunks = 1 if one_chunk else min(total, triton.cdiv(PROGRAMS, rows))
    tiles = triton.cdiv(total, chunks)
    chunks = triton.cdiv(total, tiles)
    return Plan(chunks, tiles, block_t, block_c, rows * chunks)


def in_three_phases(
    launch: Callable[..., None], plan: Any, ends: Any, A: Tensor, b: Tensor, initial: Tensor, out: Tensor, reverse: bool
) -> None:
    """Scan by `launch(plan, A, b, starts, out, reverse, composed)`, which steps through all chunks or composes them.

    Args:
        launch: steps from `starts` [B, chunks, …] into `out`; with memory `composed`, composes every chunk into it.
        plan, ends: how the steps are divided, and how the chunks are in the scan over them.
        A, b, initial, out, reverse: as in `linear_scan`.
    """
    starts = initial.unsqueeze(1)
    if plan.chunks > 1:
        chunk_A, chunk_b = (b.new_empty(len(b), plan.chunks, *t.shape[2:]) for t in (A, b))
        launch(plan, A, b, starts, out, reverse, (chunk_A, chunk_b))
        chunk_starts = torch.empty_like(chunk_b)
        chunk_starts[:, 0] = initial
        launch(ends, chunk_A[:, :-1], chunk_b[:, :-1], starts, chunk_starts[:, 1:], False, None)
        starts = chunk_starts
    launch(plan, A, b, starts, out, reverse, None)


@triton.jit
def place(channels, chunks, tiles, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr):
    """The sequence, the chunk, its first step and the channels of this program."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, BLOCK_C)
    chunk = program % chunks
    row = (program // chunks // blocks).to(tl.int64)
    c = (program // chunks % blocks).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return row, chunk.to(tl.int64), chunk.to(tl.int64) * tiles * BLOCK_T, c


@triton.jit
def last(x, BLOCK_T: tl.constexpr):
    """The last row of a tile."""
    return tl.sum(tl.where(tl.arange(0, BLOCK_T)[:, None] == BLOCK_T - 1, x, 0.0), 0)
