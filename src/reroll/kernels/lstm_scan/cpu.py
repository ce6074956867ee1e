"""lstm_scan on the CPU: Numba, one head at a time with all its steps, sixteen sequences side by side.

The batch is the last, contiguous axis, so one vector holds the same feature of sixteen sequences and a weight is read
once for all of them. The gates and state of a head stay in the L1 cache from the first step to the last, and its input
projection is computed step by step with the recurrence: no pre-activations are stored for the sequence.

The scan is a torch operation, `reroll::lstm_scan`, with a rule for `torch.func.vmap`: a probe axis is folded into the
heads, which is what makes evaluating many perturbed small models at once fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from reroll.kernels.jit import jit
from reroll.kernels.simd import LANES, broadcast, fma, load, mul, sigmoid, splat, store, tanh
from reroll.kernels.threads import split


def scan(
    inputs: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the sequence; see `lstm_scan`. bf16 arguments are computed in fp32, and the results are rounded."""
    dtype = inputs.dtype
    width = weight_hh.shape[1]
    heads, gates = h.shape[1] // width, 4 * width
    outputs, h, c = _scan(
        inputs.permute(1, 2, 0).unsqueeze(0).float(),
        weight_ih.unflatten(0, (heads, gates)).float(),
        weight_hh.unflatten(0, (heads, gates)).float(),
        bias.unflatten(0, (heads, gates)).float(),
        h.unflatten(-1, (heads, width)).permute(1, 2, 0).float(),
        c.unflatten(-1, (heads, width)).permute(1, 2, 0).float(),
    )
    return (
        outputs.flatten(1, 2).permute(2, 0, 1).to(dtype),
        h.flatten(0, 1).movedim(-1, 0).to(dtype),
        c.flatten(0, 1).movedim(-1, 0).to(dtype),
    )


@torch.library.custom_op("reroll::lstm_scan", mutates_args=())
def _scan(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run all heads over all steps.

    Args:
        x: inputs [X, T, E, B]; head n reads x[n // (N / X)].
        weight_ih: [N, 4D, E].
        weight_hh: [N, 4D, D].
        bias: [N, 4D].
        h, c: the state before the first step, [N, D, B].

    Returns:
        Hidden states [T, N, D, B], and the state after the last step, [N, D, B] each.
    """
    _, time, _, batch = x.shape
    heads, _, width = weight_hh.shape
    outputs = x.new_empty(time, heads, width, batch)
    h, c = (state.clone(memory_format=torch.contiguous_format) for state in (h, c))
    tensors = (x.contiguous(), weight_ih.contiguous(), weight_hh.contiguous(), bias.contiguous(), h, c, outputs)
    arrays = [tensor.numpy() for tensor in tensors]

    def work(begin: int, end: int) -> None:
        _scan_tiles(*arrays, begin, end)

    # Another thread is worth it from about a million multiply-adds on.
    products = time * LANES * (weight_ih[0].numel() + weight_hh[0].numel()) + 1
    split(work, heads * -(-batch // LANES), -(-(1 << 20) // products))
    return outputs, h, c


@_scan.register_fake
def _(
    x: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = x.new_empty(x.shape[1], weight_hh.shape[0], weight_hh.shape[2], x.shape[3])
    return outputs, h.new_empty(h.shape), c.new_empty(c.shape)


@_scan.register_vmap
def _(info: Any, axes: tuple[int | None, ...], *tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Fold the mapped axis into the heads: K copies of N heads are K·N heads. Inputs all copies share stay single."""

    def fold(tensor: Tensor, axis: int | None) -> Tensor:
        mapped = tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)
        return mapped.flatten(0, 1)

    shared_inputs = axes[0] is None and tensors[0].shape[0] == 1
    x = tensors[0] if shared_inputs else fold(tensors[0], axes[0])
    outputs, h, c = _scan(x, *(fold(tensor, axis) for tensor, axis in zip(tensors[1:], axes[1:])))
    split_axis = (info.batch_size, -1)
    return (outputs.unflatten(1, split_axis), h.unflatten(0, split_axis), c.unflatten(0, split_axis)), (1, 0, 0)


@jit
def _scan_tiles(x, weight_ih, weight_hh, bias, h, c, outputs, begin, end):
    """Tiles begin … end − 1, a tile being one head of sixteen sequences, head-major. Shapes as in `_scan`."""
    copies, time, size, batch = x.shape
    heads, gates, width = weight_hh.shape
    tiles = (batch + LANES - 1) // LANES
    gate = np.zeros(gates * LANES, np.float32)
    now = np.zeros(size * LANES, np.float32)  # x_t
    hidden = np.zeros(width * LANES, np.float32)
    cell = np.zeros(width * LANES, np.float32)
    flat_x, flat_ih, flat_hh = x.reshape(-1), weight_ih.reshape(-1), weight_hh.reshape(-1)
    flat_outputs, flat_h, flat_c = outputs.reshape(-1), h.reshape(-1), c.reshape(-1)
    part = width * LANES
    for tile in range(begin, end):
        n, first = tile // tiles, (tile % tiles) * LANES
        lanes = min(LANES, batch - first)
        copy = n // (heads // copies)
        state = n * width * batch + first
        _gather(hidden, flat_h, state, batch, width, lanes)
        _gather(cell, flat_c, state, batch, width, lanes)
        for t in range(time):
            _gather(now, flat_x, (copy * time + t) * size * batch + first, batch, size, lanes)
            for g in range(gates):
                store(gate, g * LANES, splat(bias[n, g]))
            _multiply_add(gate, flat_ih, n * gates * size, now, gates, size)
            _multiply_add(gate, flat_hh, n * gates * width, hidden, gates, width)
            for at in range(0, part, LANES):
                forget = mul(sigmoid(load(gate, part + at)), load(cell, at))
                new = fma(sigmoid(load(gate, at)), tanh(load(gate, 2 * part + at)), forget)
                store(cell, at, new)
                store(hidden, at, mul(sigmoid(load(gate, 3 * part + at)), tanh(new)))
            _scatter(hidden, flat_outputs, (t * heads + n) * width * batch + first, batch, width, lanes)
        _scatter(hidden, flat_h, state, batch, width, lanes)
        _scatter(cell, flat_c, state, batch, width, lanes)


@jit
def _gather(tile, array, first, stride, rows, lanes):
    """tile[r, :lanes] ← array[first + r · stride : … + lanes]; tiles have sixteen lanes, of which the last may idle."""
    for r in range(rows):
        if lanes == LANES:
            store(tile, r * LANES, load(array, first + r * stride))
        else:
            for b in range(lanes):
                tile[r * LANES + b] = array[first + r * stride + b]


@jit
def _scatter(tile, array, first, stride, rows, lanes):
    """The reverse of `_gather`."""
    for r in range(rows):
        if lanes == LANES:
            store(array, first + r * stride, load(tile, r * LANES))
        else:
            for b in range(lanes):
                array[first + r * stride + b] = tile[r * LANES + b]


@jit
def _multiply_add(gate, weight, offset, vector, gates, size):
    """gate[g] += Σ_k weight[offset + g · size + k] · vector[k], sixteen sequences wide.

    Eight gates at a time: eight sums in registers hide the latency of the multiply-add. There are 4D gates, so four may
    remain.
    """
    for g in range(0, gates - 7, 8):
        at, row = g * LANES, offset + g * size
        a0, a1, a2, a3 = load(gate, at), load(gate, at + 16), load(gate, at + 32), load(gate, at + 48)
        a4, a5, a6, a7 = load(gate, at + 64), load(gate, at + 80), load(gate, at + 96), load(gate, at + 112)
        for k in range(size):
            v, w = load(vector, k * LANES), row + k
            a0 = fma(broadcast(weight, w), v, a0)
            a1 = fma(broadcast(weight, w + size), v, a1)
            a2 = fma(broadcast(weight, w + 2 * size), v, a2)
            a3 = fma(broadcast(weight, w + 3 * size), v, a3)
            a4 = fma(broadcast(weight, w + 4 * size), v, a4)
            a5 = fma(broadcast(weight, w + 5 * size), v, a5)
            a6 = fma(broadcast(weight, w + 6 * size), v, a6)
            a7 = fma(broadcast(weight, w + 7 * size), v, a7)
        store(gate, at, a0)
        store(gate, at + 16, a1)
        store(gate, at + 32, a2)
        store(gate, at + 48, a3)
        store(gate, at + 64, a4)
        store(gate, at + 80, a5)
        store(gate, at + 96, a6)
        store(gate, at + 112, a7)
    for g in range(gates - gates % 8, gates):
        a, row = load(gate, g * LANES), offset + g * size
        for k in range(size):
            a = fma(broadcast(weight, row + k), load(vector, k * LANES), a)
        store(gate, g * LANES, a)
