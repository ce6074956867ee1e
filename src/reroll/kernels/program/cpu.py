"""Programs on the CPU: an interpreter in Numba that works on blocks of 64 rows, four vectors a feature."""

from __future__ import annotations

import numpy as np
from numba import carray, njit
from numba import types as numba_types
from numba.extending import intrinsic

from reroll.kernels.program import CODE, ROWS
from reroll.kernels.simd import (
    LANES,
    add,
    broadcast,
    div,
    fma,
    load,
    load_part,
    mul,
    sigmoid,
    splat,
    store,
    store_part,
    sub,
    tanh,
)  # fmt: skip

_jit = njit(nogil=True, cache=True, error_model="numpy")

(
    LOAD,
    COPY,
    ADD,
    SUB,
    MUL,
    DIV,
    ADD_C,
    MUL_C,
    RSUB_C,
    RDIV_C,
    SIGMOID,
    TANH,
    RELU,
    STEP,
    ADDCMUL,
    ADDCMUL_C,
    LINEAR,
    FILL,
    GATHER,
    STORE,
) = range(20)
assert CODE["store"] == STORE
VECTORS = ROWS // LANES


@intrinsic
def _pointer_to(typing_context, address):
    """Return an address as a pointer to float32."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return numba_types.CPointer(numba_types.float32)(numba_types.int64), code


@_jit
def run(table, gathered, constants, addresses, strides, starts, registers, out, first, last):
    """Run a program over blocks first … last − 1 of the rows of `out`."""
    file = np.empty(max(registers, 1) * ROWS, np.float32)
    flat = out.reshape(-1)
    rows = out.shape[1]
    for block in range(first, last):
        begin = block * ROWS
        count = min(ROWS, rows - begin)
        for i in range(table.shape[0]):
            code, dst, a, b, c, features = table[i]
            if code == LOAD:
                memory = carray(_pointer_to(addresses[a]), (1 << 62,))
                for m in range(features):
                    _copy(memory, m * strides[a] + starts[a] + begin, file, (dst + m) * ROWS, count, False)
            elif code == STORE:
                for m in range(features):
                    _copy(file, (a + m) * ROWS, flat, (dst + m) * rows + begin, count, True)
            elif code == GATHER:
                for m in range(features):
                    _copy(file, gathered[a + m] * ROWS, file, (dst + m) * ROWS, ROWS, False)
            elif code == LINEAR:
                _linear(file, constants, dst, a, b, c, features)
            else:
                _elementwise(file, constants, code, dst * ROWS, a * ROWS, b * ROWS, c * ROWS, b, c, features)


@_jit
def _copy(source, at, target, to, count, part):
    if count == ROWS:
        for v in range(VECTORS):
            store(target, to + v * LANES, load(source, at + v * LANES))
        return
    for v in range(VECTORS):
        left = count - v * LANES
        if left >= LANES:
            store(target, to + v * LANES, load(source, at + v * LANES))
        elif left > 0:
            if part:
                store_part(target, to + v * LANES, load(source, at + v * LANES), left)
            else:
                store(target, to + v * LANES, load_part(source, at + v * LANES, left))
        elif not part:
            store(target, to + v * LANES, splat(np.float32(0)))


@_jit
def _linear(file, constants, dst, a, weight, inputs, features):
    """dst_j = bias_j + Σ_i W[j, i] a_i; constants hold W row by row, then the bias."""
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


@_jit
def _elementwise(file, constants, code, dst, a, b, c, b_constant, c_constant, features):
    size = features * ROWS
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
    elif code == ADDCMUL:
        for i in range(0, size, LANES):
            store(file, dst + i, fma(load(file, b + i), load(file, c + i), load(file, a + i)))
    elif code == SIGMOID:
        for i in range(0, size, LANES):
            store(file, dst + i, sigmoid(load(file, a + i)))
    elif code == TANH:
        for i in range(0, size, LANES):
            store(file, dst + i, tanh(load(file, a + i)))
    elif code == COPY:
        for i in range(0, size, LANES):
            store(file, dst + i, load(file, a + i))
    elif code in (RELU, STEP):
        for i in range(size):
            x = file[a + i]
            positive = x > 0
            file[dst + i] = (x if code == RELU else np.float32(1)) if positive else (x * 0 if x != x else np.float32(0))
    else:
        for m in range(features):
            k = broadcast(constants, (c_constant if code == ADDCMUL_C else b_constant) + m)
            for v in range(VECTORS):
                i = m * ROWS + v * LANES
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
