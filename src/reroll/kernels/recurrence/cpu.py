"""Recurrences of programs on the CPU: Numba kernels that take one group of sequences through all steps."""

from __future__ import annotations

import numpy as np

from reroll.kernels.jit import jit
from reroll.kernels.program.cpu import execute, gather_rows
from reroll.kernels.program.operations import ROWS
from reroll.kernels.simd import LANES, add, fma, load, load_lanes, max_abs, mul, splat, store, store_lanes, sub

CHUNK_ROWS = 256
"""Rows that a loop buffers at a time."""
EPS = np.finfo(np.float32).eps
ZERO, IDENTITY, BLOCKS = range(3)
KINDS = {"zero": ZERO, "identity": IDENTITY, "diagonal": BLOCKS, "block": BLOCKS, "dense": BLOCKS}


@jit
def loop(code, registers, inputs, features, group, start, fresh, reset, out):
    """Run one group of sequences through all steps.

    A step touches a few numbers of each of many features, which lie far apart in memory. So the inputs of some steps
    are first copied into a small buffer, and the states of those steps are written out together at the end.
    """
    first, column, count, time = group
    size = start.shape[0]
    width = LANES if count <= LANES else ROWS
    padded = (count + width - 1) // width * width
    length = max(1, CHUNK_ROWS // count)
    stride = min(length, time) * count
    addresses = inputs[0]
    local = (
        np.zeros(len(addresses), np.int64),
        np.full(len(addresses), stride, np.int64),
        np.zeros(len(addresses), np.int64),
    )
    chunk, states = np.zeros((features.sum(), stride), np.float32), np.zeros((size, stride), np.float32)
    flat, file = states.reshape(-1), np.zeros(registers * width, np.float32)
    before, after = np.zeros(size * padded, np.float32), np.zeros(size * padded, np.float32)
    for d in range(size):
        before[d * padded : d * padded + count] = start[d, column : column + count]
    m = 0
    for i in range(1, len(addresses)):
        local[0][i] = chunk[m:].ctypes.data
        m += features[i]
    local[1][0] = padded
    for begin in range(0, time, length):
        steps = min(length, time - begin)
        rows, row = steps * count, first + begin * count
        gather_rows(inputs, features, chunk, row, rows)
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
                    store_lanes(flat, d * stride + t * count + b, load(after, d * padded + b), min(LANES, count - b))
            before, after = after, before
        out[:, row : row + rows] = states[:, :rows]


@jit
def newton(step, with_jacobian, group, options, tolerance, start, fresh, reset, guess, out, iterations, residual):
    """Solve the windows of one group, and return how many steps are solved."""
    first, column, count, time = group
    window = options[2]
    size, resets = start.shape[0], len(reset) > 0
    step_code, step_registers, _, step_inputs = step
    _, jacobian_registers, outputs, jacobian_inputs = with_jacobian
    stride = min(window, time) * count
    # Every group owns its memory: threads share only what they read, and write disjoint columns of the results.
    state_stride = count + stride  # s_0 … s_T of a window; read from the start these are the states before its steps
    file = np.zeros(max(step_registers, jacobian_registers) * ROWS, np.float32)
    states, correction = np.zeros(size * state_stride, np.float32), np.zeros(size * stride, np.float32)
    f = np.zeros(max(outputs, size) * stride, np.float32)
    previous = np.zeros(size * stride if resets else 0, np.float32)
    for inputs in (step_inputs, jacobian_inputs):
        inputs[0][0] = previous.ctypes.data if resets else states.ctypes.data
        inputs[1][0] = stride if resets else state_stride
    memory = (file, states, f, correction, previous)
    errors, scales = np.zeros((size, count), np.float32), np.zeros((size, count), np.float32)
    changes = np.zeros((size, count), np.float32)
    lanes = count * LANES // np.gcd(count, LANES)  # after which rows of vectors and of sequences begin together
    sums, active = np.zeros((2, lanes), np.float32), np.zeros(lanes, np.float32)
    converged, counts = np.zeros(count, np.bool_), np.zeros(count, np.int64)
    progress = (errors, scales, changes, sums, active, converged, counts)
    flat, out_stride = out.reshape(-1), out.shape[1]
    for d in range(size):
        states[d * state_stride : d * state_stride + count] = start[d, column : column + count]
    for begin in range(0, time, window):
        steps = min(window, time - begin)
        rows, row = steps * count, first + begin * count
        step_inputs[2][0] = jacobian_inputs[2][0] = -row
        sizes = (size, count, rows, state_stride, stride)
        _guess(states, guess, row, sizes)
        if resets:
            _previous_states(previous, states, reset, fresh, row, column, sizes)
        if guess.size == 0:
            _evaluate(step_code, step_inputs, file, row, rows, f, stride)
            for d in range(size):
                at = d * state_stride + count
                states[at : at + rows] = f[d * stride : d * stride + rows]
        if not _solve(step, with_jacobian, options, tolerance, memory, progress, reset, fresh, row, column, sizes):
            return begin
        for d in range(size):
            at = d * state_stride + count
            flat[d * out_stride + row : d * out_stride + row + rows] = states[at : at + rows]
            states[at - count : at] = states[at - count + rows : at + rows]
        for b in range(count):
            iterations[begin // window, column + b] = counts[b]
            residual[begin // window, column + b] = errors[:, b].max()
    return time


@jit
def _solve(step, with_jacobian, options, tolerance, memory, progress, reset, fresh, row, column, sizes):
    """Iterate on one window until it is within tolerance; return whether it converged."""
    kind, order, _, limit, every = options
    _, count, rows, _, stride = sizes
    step_code, _, _, step_inputs = step
    jacobian_code, _, outputs, jacobian_inputs = with_jacobian
    file, states, f, correction, previous = memory
    errors, scales, changes, sums, active, converged, counts = progress
    converged[:], counts[:], active[:] = False, 0, 1
    for iteration in range(limit + 1):
        if len(reset) > 0:
            _previous_states(previous, states, reset, fresh, row, column, sizes)
        if kind == BLOCKS and (iteration == 0 or iteration % every == 1 % every):
            _evaluate(jacobian_code, jacobian_inputs, file, row, rows, f, stride)
            _zero_jacobians(f, reset, row, outputs, sizes)
        else:
            _evaluate(step_code, step_inputs, file, row, rows, f, stride)
        if not _residuals(states, f, sums, errors, scales, sizes):
            return False
        if _count_unconverged(iteration, tolerance, errors, scales, changes, converged) == 0:
            return True
        for b in range(count):
            counts[b] += not converged[b]
        for lane in range(len(active)):
            active[lane] = not converged[lane % count]
        if iteration < limit:
            _scan(kind, order, f, correction, sizes)
            _update(states, correction, active, sums, changes, sizes)
    return False


@jit
def _guess(states, guess, row, sizes):
    """Write the guess of a window behind the state before it; without one, repeat that state."""
    size, count, rows, state_stride, _ = sizes
    for d in range(size):
        at = d * state_stride + count
        if guess.size:
            states[at : at + rows] = guess[d, row : row + rows]
        else:
            for i in range(rows):
                states[at + i] = states[at + i - count]


@jit
def _previous_states(previous, states, reset, fresh, row, column, sizes):
    """Write the state from which every step starts: that of the step before, or after a reset the fresh one."""
    size, count, rows, state_stride, stride = sizes
    for d in range(size):
        for i in range(rows):
            previous[d * stride + i] = fresh[d, column + i % count] if reset[row + i] else states[d * state_stride + i]


@jit
def _zero_jacobians(f, reset, row, outputs, sizes):
    """Zero the Jacobians of the first step and after resets: δ is 0 before them, and 0 · ∞ would be NaN."""
    size, count, rows, _, stride = sizes
    for m in range(size, outputs):
        f[m * stride : m * stride + count] = 0
    for i in range(rows if len(reset) else 0):
        if reset[row + i]:
            for m in range(size, outputs):
                f[m * stride + i] = 0


@jit
def _evaluate(code, inputs, file, row, rows, out, stride):
    for i in range(0, rows, ROWS):
        execute(code, inputs, file, ROWS, row + i, min(ROWS, rows - i), out, i, stride)


@jit
def _residuals(states, f, sums, errors, scales, sizes):
    """Replace f by r = f − s, compute the largest |r| and |s| of each feature and sequence; whether r is finite."""
    size, count, rows, state_stride, stride = sizes
    lanes = sums.shape[1]
    largest, scale = sums[0], sums[1]
    rest, bad = np.zeros(LANES, np.float32), splat(np.float32(0))
    for d in range(size):
        sums[:] = 0
        lane = 0
        for i in range(0, rows, LANES):
            n = min(LANES, rows - i)
            s = load_lanes(states, d * state_stride + count + i, n)
            r = sub(load_lanes(f, d * stride + i, n), s)
            store_lanes(f, d * stride + i, r, n)
            store(largest, lane, max_abs(load(largest, lane), r))
            store(scale, lane, max_abs(load(scale, lane), s))
            bad = fma(r, splat(np.float32(0)), bad)  # 0 · r is NaN where r is not finite, and a sum keeps it
            lane = lane + LANES if lane + LANES < lanes else 0
        _reduce_lanes(largest, errors, d)
        _reduce_lanes(scale, scales, d)
    store(rest, 0, bad)
    return rest.sum() == 0


@jit
def _reduce_lanes(sums, out, d):
    """Write the largest over the lanes of each sequence to out[d]."""
    count = out.shape[1]
    out[d] = 0
    for lane in range(len(sums)):
        out[d, lane % count] = max(out[d, lane % count], sums[lane])


@jit
def _count_unconverged(iteration, tolerance, errors, scales, changes, converged):
    """Note which sequences have converged, and return how many have not."""
    size, count = errors.shape
    absolute, relative = tolerance
    left = 0
    for b in range(count):
        if converged[b]:
            continue
        close = True
        for d in range(size):
            error, scale = errors[d, b], scales[d, b]
            bound = absolute + relative * scale
            if iteration == 0:
                close &= error == 0
            else:
                # At rounding error there is nothing left to correct, however large the last correction was.
                close &= error <= bound and (changes[d, b] <= bound or error <= 16 * EPS * scale)
        converged[b] = close
        left += not close
    return left


@jit
def _scan(kind, order, f, correction, sizes):
    """δ_t = A_t δ_{t−1} + r_t from δ = 0; `f` holds r, then A: K×K blocks of C channels each."""
    size, count, rows, _, stride = sizes
    if kind == ZERO:
        correction[:] = f[: size * stride]
    elif order == 1 and kind == BLOCKS and count < 4:
        _scalar_scan(f, correction, sizes)
    else:
        order = 1 if kind == IDENTITY else order
        channels = size // order
        deltas = np.zeros(2 * order * LANES, np.float32)
        for c in range(channels):
            for b in range(0, count, LANES):
                n = min(LANES, count - b)
                if order == 1:
                    delta = splat(np.float32(0))
                    for i in range(c * stride + b, c * stride + rows, count):
                        r = load_lanes(f, i, n)
                        a = splat(np.float32(1)) if kind == IDENTITY else load_lanes(f, size * stride + i, n)
                        delta = fma(a, delta, r)
                        store_lanes(correction, i, delta, n)
                    continue
                deltas[:] = 0
                before, after = 0, order * LANES
                for i in range(b, rows, count):
                    for k in range(order):
                        delta = load_lanes(f, (k * channels + c) * stride + i, n)
                        for j in range(order):
                            a = load_lanes(f, (size + (k * order + j) * channels + c) * stride + i, n)
                            delta = fma(a, load(deltas, before + j * LANES), delta)
                        store(deltas, after + k * LANES, delta)
                        store_lanes(correction, (k * channels + c) * stride + i, delta, n)
                    before, after = after, before


@jit
def _scalar_scan(f, correction, sizes):
    """The same for a diagonal and few sequences: four features side by side hide the latency of the multiply-add."""
    size, count, rows, _, stride = sizes
    a = size * stride
    for b in range(count):
        for d in range(0, size - 3, 4):
            i0, i1, i2, i3 = d * stride, (d + 1) * stride, (d + 2) * stride, (d + 3) * stride
            x0 = x1 = x2 = x3 = np.float32(0)
            for i in range(b, rows, count):
                x0 = f[a + i0 + i] * x0 + f[i0 + i]
                x1 = f[a + i1 + i] * x1 + f[i1 + i]
                x2 = f[a + i2 + i] * x2 + f[i2 + i]
                x3 = f[a + i3 + i] * x3 + f[i3 + i]
                correction[i0 + i], correction[i1 + i], correction[i2 + i], correction[i3 + i] = x0, x1, x2, x3
        for d in range(size - size % 4, size):
            x0 = np.float32(0)
            for i in range(d * stride + b, d * stride + rows, count):
                x0 = f[a + i] * x0 + f[i]
                correction[i] = x0


@jit
def _update(states, correction, active, sums, changes, sizes):
    """Add δ to the states of active sequences, and compute its largest magnitude."""
    size, count, rows, state_stride, stride = sizes
    lanes = sums.shape[1]
    largest = sums[0]
    for d in range(size):
        largest[:] = 0
        lane = 0
        for i in range(0, rows, LANES):
            n = min(LANES, rows - i)
            delta = mul(load_lanes(correction, d * stride + i, n), load(active, lane))
            at = d * state_stride + count + i
            store_lanes(states, at, add(load_lanes(states, at, n), delta), n)
            store(largest, lane, max_abs(load(largest, lane), delta))
            lane = lane + LANES if lane + LANES < lanes else 0
        _reduce_lanes(largest, changes, d)
