"""Scans along time in torch operations, for any operator, device and dtype. The others must equal them.

    odd_even    pairs of steps are composed, the scan of T/2 pairs gives every second state, one step gives the others:
                about 2T operations in 2 log₂ T rounds
    chunked     √T chunks of √T steps: compose each chunk, scan the chunks, then step through all chunks at once:
                2T operations in about 3√T rounds, with far less memory traffic per operation

Reference: Blelloch, "Prefix sums and their applications", 1990.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from reroll.kernels.linear_scan.kalman import elements
from reroll.kernels.linear_scan.operators import Affine, Element, Operator, State

CHUNKED_FROM = 64
"""Numbers per step (batch × channels) from which a CPU takes chunks.

Far below it odd-even is up to twice as fast, far above chunks are three to six times.
"""


def scan(operator: Affine, A: Tensor, b: Tensor, initial: Tensor, out: Tensor, reverse: bool) -> None:
    """Write s_t = A_t s_{t−1} + b_t into `out`, which may be b; see `reroll.kernels.linear_scan.scan_into`."""
    if reverse:
        A, b = A.flip(1), b.flip(1)
    (states,) = states_of(operator, (A, b), (initial,))
    out.copy_(states.flip(1) if reverse else states)


def kalman(
    operator: Operator, inputs: tuple[Tensor, Tensor, Tensor], precision: Tensor, state: State, out: Any
) -> None:
    """Write mean and (unless None) variance after every step into `out`; see `kalman_scan`."""
    for memory, result in zip(out, states_of(operator, elements(operator, *inputs, precision), state)):
        if memory is not None:
            memory.copy_(result)


def states_of(operator: Operator, elements: Element, state: State) -> State:
    """Return the state after every step (axis 1 of the elements) by the method that suits the sizes and the device."""
    wide = state[0].numel() >= CHUNKED_FROM
    on_cpu = elements[0].device.type == "cpu"
    # On a GPU the launch of every operation costs time, and the odd-even scan has the fewest.
    return (chunked if wide and on_cpu else odd_even)(operator, elements, state)


def odd_even(operator: Operator, elements: Element, state: State) -> State:
    """Return the state after every step; see the module."""
    time = elements[0].shape[1]
    first = tuple(part.unsqueeze(1) for part in state)
    if time == 1:
        return operator.apply(elements, first)
    even, odd = (tuple(part[:, begin::2] for part in elements) for begin in (0, 1))
    pairs = operator.combine(tuple(part[:, : time // 2] for part in even), odd)
    after_odd = odd_even(operator, pairs, state)
    before_even = (torch.cat([s, p[:, : (time - 1) // 2]], 1) for s, p in zip(first, after_odd))
    after_even = operator.apply(even, tuple(before_even))
    states = []
    for evens, odds in zip(after_even, after_odd):
        both = evens.new_empty(evens.shape[0], time, *evens.shape[2:])
        both[:, 0::2], both[:, 1::2] = evens, odds
        states.append(both)
    return tuple(states)


def chunked(operator: Operator, elements: Element, state: State) -> State:
    """Return the state after every step; see the module. The last chunk is padded with identity steps."""
    time = elements[0].shape[1]
    length = math.isqrt(time - 1) + 1
    chunks = -(-time // length)
    missing = chunks * length - time
    if missing:
        padding = operator.identity(tuple(part[:, :1].expand(-1, missing, *part.shape[2:]) for part in elements))
        elements = tuple(torch.cat([part, rest], 1) for part, rest in zip(elements, padding))
    steps = list(zip(*(part.unflatten(1, (chunks, length)).unbind(2) for part in elements)))
    ends = odd_even(operator, functools.reduce(operator.combine, steps), state)
    now = tuple(torch.cat([s.unsqueeze(1), e[:, :-1]], 1) for s, e in zip(state, ends))
    states = []
    for step in steps:
        now = operator.apply(step, now)
        states.append(now)
    return tuple(torch.stack(parts, 2).flatten(1, 2)[:, :time] for parts in zip(*states))
