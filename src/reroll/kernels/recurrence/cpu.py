"""Recurrences of programs on the CPU: Numba kernels that take one group of sequences through all steps."""

from __future__ import annotations

import numpy as np

from reroll.kernels.jit import jit
from reroll.kernels.program.cpu import execute, gather_rows
from reroll.kernels.program.operations import ROWS
from reroll.kernels.simd import LANES, add, fma, load, load_part, max_abs, mul, splat, store, store_part, sub

PIECE = 256
"""Rows whose inputs a loop brings together at a time."""
EPS = np.finfo(np.float32).eps
ZERO, IDENTITY, BLOCKS = range(3)
KINDS = {"zero": ZERO, "identity": IDENTITY, "diagonal": BLOCKS, "block": BLOCKS, "dense": BLOCKS}


@jit
def loop(code, registers, inputs, features, group, start, fresh, reset, out):
    """Run one group of sequences through all steps.

    A step touches a few numbers of each of many features, which lie far apart. So a piece of the inputs is brought
    together first, and the states of a piece are written when it is done.
    """
    first, column, count, time = group
    size = start.shape[0]
    width = LANES if count <= LANES else ROWS
    padded = (count + width - 1) // width * width
    window = max(1, PIECE // count)
    most = min(window, time) * count
    addresses = inputs[0]
    local = (
        np.zeros(len(addresses), np.int64),
        np.full(len(addresses), most, np.int64),
        np.zeros(len(addresses), np.int64),
    )
    piece, states = np.zeros((features.sum(), most), np.float32), np.zeros((size, most), np.float32)
    flat, file = states.reshape(-1), np.zeros(registers * width, np.float32)
    before, after = np.zeros(size * padded, np.float32), np.zeros(size * padded, np.float32)
    for d in range(size):
        before[d * padded : d * padded + count] = start[d, column : column + count]
    m = 0
    for i in range(1, len(addresses)):
        local[0][i] = piece[m:].ctypes.data
        m += features[i]
    local[1][0] = padded
    for begin in range(0, time, window):
        steps = min(window, time - begin)
        rows, row = steps * count, first + begin * count
        gather_rows(inputs, features, piece, row, rows)
        for t in range(steps):
            if len(reset):
                for b in range(count):
                    if reset[row + t * count + b]:
                        for d in range(size):
                            before[d * padded + b] = fresh[d, column + b]
            local[0][0], local[2][0] = before.ctypes.data, -t * count
            for b in range(0, count, width):
                execute(code, local, file, width, t * count + b, min(width, count - b), after, b, padded)
            for d in range(size):
                for b in range(0, count, LANES):
                    _store(flat, d * most + t * count + b, load(after, d * padded + b), min(LANES, count - b))
            before, after = after, before
        out[:, row : row + rows] = states[:, :rows]


@jit
def newton(step, whole, group, how, within, start, fresh, reset, guess, out, iterations, residual):
    """Solve the windows of one group, and return how many steps are solved."""
    first, column, count, time = group
    window = how[2]
    size, resets = start.shape[0], len(reset) > 0
    step_code, step_registers, _, step_inputs = step
    _, whole_registers, outputs, whole_inputs = whole
    most = min(window, time) * count
    # Every group owns its memory, so that threads share nothing but what they read and disjoint columns of the results.
    held = count + most  # the state before the window, then those of the window: the states before, one step early
    file = np.zeros(max(step_registers, whole_registers) * ROWS, np.float32)
    states, correction = np.zeros(size * held, np.float32), np.zeros(size * most, np.float32)
    following = np.zeros(max(outputs, size) * most, np.float32)
    ahead = np.zeros(size * most if resets else 0, np.float32)
    for inputs in (step_inputs, whole_inputs):
        inputs[0][0] = ahead.ctypes.data if resets else states.ctypes.data
        inputs[1][0] = most if resets else held
    memory = (file, states, following, correction, ahead)
    errors, scales = np.zeros((size, count), np.float32), np.zeros((size, count), np.float32)
    changes = np.zeros((size, count), np.float32)
    lanes = count * LANES // np.gcd(count, LANES)  # after which rows of vectors and of sequences begin together
    sums, moving = np.zeros((2, lanes), np.float32), np.zeros(lanes, np.float32)
    done, used = np.zeros(count, np.bool_), np.zeros(count, np.int64)
    found = (errors, scales, changes, sums, moving, done, used)
    flat, stride = out.reshape(-1), out.shape[1]
    for d in range(size):
        states[d * held : d * held + count] = start[d, column : column + count]
    for begin in range(0, time, window):
        steps = min(window, time - begin)
        rows, row = steps * count, first + begin * count
        step_inputs[2][0] = whole_inputs[2][0] = -row
        sizes = (size, count, rows, held, most)
        _guess(states, guess, row, sizes)
        if resets:
            _begin_afresh(ahead, states, reset, fresh, row, column, sizes)
        if guess.size == 0:
            _evaluate(step_code, step_inputs, file, row, rows, following, most)
            for d in range(size):
                at = d * held + count
                states[at : at + rows] = following[d * most : d * most + rows]
        if not _solve(step, whole, how, within, memory, found, reset, fresh, row, column, sizes):
            return begin
        for d in range(size):
            at = d * held + count
            flat[d * stride + row : d * stride + row + rows] = states[at : at + rows]
            states[d * held : d * held + count] = states[d * held + rows : d * held + rows + count]
        for b in range(count):
            iterations[begin // window, column + b] = used[b]
            residual[begin // window, column + b] = errors[:, b].max()
    return time


@jit
def _solve(step, whole, how, within, memory, found, reset, fresh, row, column, sizes):
    """Iterate on one window until it is within tolerance; return whether it got there."""
    kind, order, _, limit, every = how
    _, count, rows, _, most = sizes
    step_code, _, _, step_inputs = step
    whole_code, _, outputs, whole_inputs = whole
    file, states, following, correction, ahead = memory
    errors, scales, changes, sums, moving, done, used = found
    done[:], used[:], moving[:] = False, 0, 1
    for iteration in range(limit + 1):
        if len(reset) > 0:
            _begin_afresh(ahead, states, reset, fresh, row, column, sizes)
        if kind == BLOCKS and (iteration == 0 or iteration % every == 1 % every):
            _evaluate(whole_code, whole_inputs, file, row, rows, following, most)
            _cut(following, reset, row, outputs, sizes)
        else:
            _evaluate(step_code, step_inputs, file, row, rows, following, most)
        if not _residuals(states, following, sums, errors, scales, sizes):
            return False
        if _unfinished(iteration, within, errors, scales, changes, done) == 0:
            return True
        for b in range(count):
            used[b] += not done[b]
        for lane in range(len(moving)):
            moving[lane] = not done[lane % count]
        if iteration < limit:
            _correct(kind, order, following, correction, sizes)
            _move(states, correction, moving, sums, changes, sizes)
    return False


@jit
def _guess(states, guess, row, sizes):
    """Put the guess of a window behind the state before it; without one, that state again and again."""
    size, count, rows, held, _ = sizes
    for d in range(size):
        at = d * held + count
        if guess.size:
            states[at : at + rows] = guess[d, row : row + rows]
        else:
            for i in range(rows):
                states[at + i] = states[at + i - count]


@jit
def _begin_afresh(ahead, states, reset, fresh, row, column, sizes):
    """Write the state before every step, which after a reset is not that of the step before."""
    size, count, rows, held, most = sizes
    for d in range(size):
        for i in range(rows):
            ahead[d * most + i] = fresh[d, column + i % count] if reset[row + i] else states[d * held + i]


@jit
def _cut(following, reset, row, outputs, sizes):
    """Let nothing flow into the first step, where even an infinite Jacobian has nothing to act on, or over a reset."""
    size, count, rows, _, most = sizes
    for m in range(size, outputs):
        following[m * most : m * most + count] = 0
    for i in range(rows if len(reset) else 0):
        if reset[row + i]:
            for m in range(size, outputs):
                following[m * most + i] = 0


@jit
def _evaluate(code, inputs, file, row, rows, out, stride):
    for i in range(0, rows, ROWS):
        execute(code, inputs, file, ROWS, row + i, min(ROWS, rows - i), out, i, stride)


@jit
def _residuals(states, following, sums, errors, scales, sizes):
    """Turn f into r = f − s; find the largest |r| and |s| of each feature and sequence; and whether all is finite."""
    size, count, rows, held, most = sizes
    lanes = sums.shape[1]
    largest, scale = sums[0], sums[1]
    rest, bad = np.zeros(LANES, np.float32), splat(np.float32(0))
    for d in range(size):
        sums[:] = 0
        lane = 0
        for i in range(0, rows, LANES):
            n = min(LANES, rows - i)
            s = _load(states, d * held + count + i, n)
            r = sub(_load(following, d * most + i, n), s)
            _store(following, d * most + i, r, n)
            store(largest, lane, max_abs(load(largest, lane), r))
            store(scale, lane, max_abs(load(scale, lane), s))
            bad = fma(r, splat(np.float32(0)), bad)  # 0 · r is NaN where r is not finite, and a sum keeps it
            lane = lane + LANES if lane + LANES < lanes else 0
        _fold(largest, errors, d)
        _fold(scale, scales, d)
    store(rest, 0, bad)
    return rest.sum() == 0


@jit
def _fold(sums, found, d):
    """Take the largest over the lanes of each sequence."""
    count = found.shape[1]
    found[d] = 0
    for lane in range(len(sums)):
        found[d, lane % count] = max(found[d, lane % count], sums[lane])


@jit
def _unfinished(iteration, within, errors, scales, changes, done):
    """Note which sequences have converged, and return how many have not."""
    size, count = errors.shape
    absolute, relative = within
    left = 0
    for b in range(count):
        if done[b]:
            continue
        near = True
        for d in range(size):
            error, scale = errors[d, b], scales[d, b]
            bound = absolute + relative * scale
            if iteration == 0:
                near &= error == 0
            else:
                # At rounding error there is nothing left to correct, however large the last correction was.
                near &= error <= bound and (changes[d, b] <= bound or error <= 16 * EPS * scale)
        done[b] = near
        left += not near
    return left


@jit
def _correct(kind, order, following, correction, sizes):
    """δ_t = A_t δ_{t−1} + r_t from δ = 0; `following` holds r, then A: K×K blocks of C channels each."""
    size, count, rows, _, most = sizes
    if kind == ZERO:
        correction[:] = following[: size * most]
    elif order == 1 and kind == BLOCKS and count < 4:
        _scalar_scan(following, correction, sizes)
    else:
        order = 1 if kind == IDENTITY else order
        channels = size // order
        deltas = np.zeros(2 * order * LANES, np.float32)
        for c in range(channels):
            for b in range(0, count, LANES):
                n = min(LANES, count - b)
                if order == 1:
                    delta = splat(np.float32(0))
                    for i in range(c * most + b, c * most + rows, count):
                        r = _load(following, i, n)
                        a = splat(np.float32(1)) if kind == IDENTITY else _load(following, size * most + i, n)
                        delta = fma(a, delta, r)
                        _store(correction, i, delta, n)
                    continue
                deltas[:] = 0
                before, after = 0, order * LANES
                for i in range(b, rows, count):
                    for k in range(order):
                        delta = _load(following, (k * channels + c) * most + i, n)
                        for j in range(order):
                            a = _load(following, (size + (k * order + j) * channels + c) * most + i, n)
                            delta = fma(a, load(deltas, before + j * LANES), delta)
                        store(deltas, after + k * LANES, delta)
                        _store(correction, (k * channels + c) * most + i, delta, n)
                    before, after = after, before


@jit
def _scalar_scan(following, correction, sizes):
    """The same for a diagonal and few sequences: four features side by side, as each step waits for the one before."""
    size, count, rows, _, most = sizes
    a = size * most
    for b in range(count):
        for d in range(0, size - 3, 4):
            i0, i1, i2, i3 = d * most, (d + 1) * most, (d + 2) * most, (d + 3) * most
            x0 = x1 = x2 = x3 = np.float32(0)
            for i in range(b, rows, count):
                x0 = following[a + i0 + i] * x0 + following[i0 + i]
                x1 = following[a + i1 + i] * x1 + following[i1 + i]
                x2 = following[a + i2 + i] * x2 + following[i2 + i]
                x3 = following[a + i3 + i] * x3 + following[i3 + i]
                correction[i0 + i], correction[i1 + i], correction[i2 + i], correction[i3 + i] = x0, x1, x2, x3
        for d in range(size - size % 4, size):
            x0 = np.float32(0)
            for i in range(d * most + b, d * most + rows, count):
                x0 = following[a + i] * x0 + following[i]
                correction[i] = x0


@jit
def _move(states, correction, moving, sums, changes, sizes):
    """Add δ to the states of the sequences that move, and find its largest magnitude."""
    size, count, rows, held, most = sizes
    lanes = sums.shape[1]
    largest = sums[0]
    for d in range(size):
        largest[:] = 0
        lane = 0
        for i in range(0, rows, LANES):
            n = min(LANES, rows - i)
            delta = mul(_load(correction, d * most + i, n), load(moving, lane))
            at = d * held + count + i
            _store(states, at, add(_load(states, at, n), delta), n)
            store(largest, lane, max_abs(load(largest, lane), delta))
            lane = lane + LANES if lane + LANES < lanes else 0
        _fold(largest, changes, d)


@jit
def _load(array, index, count):
    if count == LANES:
        return load(array, index)
    return load_part(array, index, count)


@jit
def _store(array, index, vector, count):
    if count == LANES:
        store(array, index, vector)
    else:
        store_part(array, index, vector, count)
