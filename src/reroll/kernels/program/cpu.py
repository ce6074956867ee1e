"""Programs on the CPU: an interpreter in Numba that works on blocks of 64 rows, or of 16 where there are no more.

The registers of a block are one array, the register file, `width` numbers each; nothing outside it is touched between
LOAD and STORE. The cost of decoding an instruction is shared by the numbers of a block.
"""

from __future__ import annotations

import numpy as np
from numba import carray
from numba import types as numba_types
from numba.extending import intrinsic

from reroll.kernels.jit import jit
from reroll.kernels.program.operations import CODE, ROWS
from reroll.kernels.simd import (
    LANES,
    add,
    broadcast,
    div,
    fma,
    load,
    load_lanes,
    mul,
    sigmoid,
    splat,
    store,
    store_lanes,
    sub,
    tanh,
)

LOAD, STORE, GATHER, LINEAR = (CODE[name] for name in ("load", "store", "gather", "linear"))
ADD, SUB, MUL, DIV = (CODE[name] for name in ("add", "sub", "mul", "div"))
ADD_C, MUL_C, RSUB_C, RDIV_C = (CODE[name] for name in ("add_c", "mul_c", "rsub_c", "rdiv_c"))
ADDCMUL_C, FILL = (CODE[name] for name in ("addcmul_c", "fill"))
SIGMOID, TANH, RELU, SIGN = (CODE[name] for name in ("sigmoid", "tanh", "relu", "sign"))
EXP, LOG, LOG1P, SQRT, SIN, COS = (CODE[name] for name in ("exp", "log", "log1p", "sqrt", "sin", "cos"))


@intrinsic
def _pointer_to(typing_context, address):
    """Return an address as a pointer to float32."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba_types.CPointer(numba_types.float32)(numba_types.int64), code


@jit
def run(code, registers, inputs, out, first, last):
    """Run a program over blocks first … last − 1 of the rows of `out`; see `execute`."""
    rows = out.shape[1]
    file = np.empty(max(registers, 1) * ROWS, np.float32)
    flat = out.reshape(-1)
    for block in range(first, last):
        begin = block * ROWS
        execute(code, inputs, file, ROWS, begin, min(ROWS, rows - begin), flat, begin, rows)


@jit
def execute(code, inputs, file, width, begin, count, out, to, stride):
    """Run a program once, over `count` ≤ `width` rows.

    Args:
        code: (table, gathered, constants) of the program.
        inputs: (addresses, strides, starts) of the inputs: of the first number, from one feature to the next, and what
            is added to `begin` to give the row to read.
        file: the register file, `width` numbers for each register.
        width: 16 or 64.
        begin, count: the rows of the inputs.
        out, to, stride: output m goes to out[to + m · stride …].
    """
    table, gathered, constants = code
    addresses, strides, starts = inputs
    for i in range(table.shape[0]):
        code, dst, a, b, c, features = table[i, 0], table[i, 1], table[i, 2], table[i, 3], table[i, 4], table[i, 5]
        if code == LOAD:
            memory = carray(_pointer_to(addresses[a]), (1 << 62,))
            at = starts[a] + begin
            for m in range(features):
                _copy(memory, m * strides[a] + at, file, (dst + m) * width, width, count, False)
        elif code == STORE:
            for m in range(features):
                _copy(file, (a + m) * width, out, (dst + m) * stride + to, width, count, True)
        elif code == GATHER:
            for m in range(features):
                _copy(file, gathered[a + m] * width, file, (dst + m) * width, width, width, False)
        elif code == LINEAR:
            if width == ROWS:
                _linear(file, constants, dst, a, b, c, features)
            else:
                _narrow_linear(file, constants, dst, a, b, c, features)
        else:
            _elementwise(file, constants, code, dst * width, a * width, b * width, b, c, features, width)


@jit
def gather_rows(inputs, features, out, begin, count):
    """Copy rows begin … begin + count − 1 of all inputs but the first into [features, rows]."""
    addresses, strides, starts = inputs
    row = 0
    for i in range(1, len(addresses)):
        memory = carray(_pointer_to(addresses[i]), (1 << 62,))
        for m in range(features[i]):
            at = m * strides[i] + starts[i] + begin
            for r in range(count):
                out[row, r] = memory[at + r]
            row += 1


@jit
def _copy(source, at, target, to, width, count, part):
    """Copy `count` ≤ `width` numbers; the rest of the target is set to 0, or with `part` not written."""
    if count == width:
        for v in range(0, width, LANES):
            store(target, to + v, load(source, at + v))
        return
    for v in range(0, width, LANES):
        left = count - v
        if left <= 0:
            if not part:
                store(target, to + v, splat(np.float32(0)))
        elif part:
            store_lanes(target, to + v, load(source, at + v), left)
        else:
            store(target, to + v, load_lanes(source, at + v, left))


@jit
def _linear(file, constants, dst, a, weight, inputs, features):
    """dst_j = bias_j + Σ_i W[j, i] a_i, on 64 rows; constants hold W row by row, then the bias."""
    bias = weight + features * inputs
    for j in range(features):
        x0 = x1 = x2 = x3 = broadcast(constants, bias + j)
        for i in range(inputs):
            w = broadcast(constants, weight + j * inputs + i)
            at = (a + i) * ROWS
            x0 = fma(w, load(file, at), x0)
            x1 = fma(w, load(file, at + LANES), x1)
            x2 = fma(w, load(file, at + 2 * LANES), x2)
            x3 = fma(w, load(file, at + 3 * LANES), x3)
        to = (dst + j) * ROWS
        store(file, to, x0)
        store(file, to + LANES, x1)
        store(file, to + 2 * LANES, x2)
        store(file, to + 3 * LANES, x3)


@jit
def _narrow_linear(file, constants, dst, a, weight, inputs, features):
    """The same on 16 rows: four features side by side hide the latency of the multiply-add."""
    bias = weight + features * inputs
    for j in range(0, features - 3, 4):
        x0, x1 = broadcast(constants, bias + j), broadcast(constants, bias + j + 1)
        x2, x3 = broadcast(constants, bias + j + 2), broadcast(constants, bias + j + 3)
        w = weight + j * inputs
        for i in range(inputs):
            x = load(file, (a + i) * LANES)
            x0 = fma(broadcast(constants, w + i), x, x0)
            x1 = fma(broadcast(constants, w + inputs + i), x, x1)
            x2 = fma(broadcast(constants, w + 2 * inputs + i), x, x2)
            x3 = fma(broadcast(constants, w + 3 * inputs + i), x, x3)
        to = (dst + j) * LANES
        store(file, to, x0)
        store(file, to + LANES, x1)
        store(file, to + 2 * LANES, x2)
        store(file, to + 3 * LANES, x3)
    for j in range(features - features % 4, features):
        x0 = broadcast(constants, bias + j)
        for i in range(inputs):
            x0 = fma(broadcast(constants, weight + j * inputs + i), load(file, (a + i) * LANES), x0)
        store(file, (dst + j) * LANES, x0)


@jit
def _elementwise(file, constants, code, dst, a, b, b_constant, c_constant, features, width):
    size = features * width
    if code == ADD:
        for i in range(0, size, LANES):
            store(file, dst + i, add(load(file, a + i), load(file, b + i)))
    elif code == SUB:
        for i in range(0, size, LANES):
            store(file, dst + i, sub(load(file, a + i), load(file, b + i)))
    elif code == MUL:
        for i in range(0, size, LANES):
            store(file, dst + i, mul(load(file, a + i), load(file, b + i)))
    elif code == DIV:
        for i in range(0, size, LANES):
            store(file, dst + i, div(load(file, a + i), load(file, b + i)))
    elif code == SIGMOID:
        for i in range(0, size, LANES):
            store(file, dst + i, sigmoid(load(file, a + i)))
    elif code == TANH:
        for i in range(0, size, LANES):
            store(file, dst + i, tanh(load(file, a + i)))
    elif code == RELU:
        for i in range(size):
            x = file[a + i]
            file[dst + i] = x if x > 0 or x != x else np.float32(0)
    elif code in (ADD_C, MUL_C, RSUB_C, RDIV_C, ADDCMUL_C, FILL):
        for m in range(features):
            k = broadcast(constants, (c_constant if code == ADDCMUL_C else b_constant) + m)
            for i in range(m * width, (m + 1) * width, LANES):
                if code == ADD_C:
                    x = add(load(file, a + i), k)
                elif code == MUL_C:
                    x = mul(load(file, a + i), k)
                elif code == RSUB_C:
                    x = sub(k, load(file, a + i))
                elif code == RDIV_C:
                    x = div(k, load(file, a + i))
                elif code == ADDCMUL_C:
                    x = fma(load(file, b + i), k, load(file, a + i))
                else:
                    x = k
                store(file, dst + i, x)
    else:
        for i in range(size):
            file[dst + i] = _function(code, file[a + i])


@jit
def _function(code, x):
    """Functions that steps rarely use, number by number."""
    if code == SIGN:
        return np.float32(1) if x > 0 else np.float32(-1) if x < 0 else x
    if code == EXP:
        return np.exp(x)
    if code == LOG:
        return np.log(x)
    if code == LOG1P:
        return np.log1p(x)
    if code == SQRT:
        return np.sqrt(x)
    if code == SIN:
        return np.sin(x)
    if code == COS:
        return np.cos(x)
    return max(x, np.float32(0)) + np.log1p(np.exp(-abs(x)))  # softplus, so that it cannot overflow
