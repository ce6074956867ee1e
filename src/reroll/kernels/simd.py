"""Sixteen numbers at a time: a vector type for Numba, so that the CPU kernels say what they mean.

    total = fma(broadcast(w, k), load(h, i), total)      # 16 multiply-adds
    store(out, i, tanh(total))

Numba vectorises a loop when LLVM finds that it may; for bit tricks and short loops it often does not (measured: 20
times slower). Here a vector is a value, `f32x16` or `f64x16`, and each function below is one or a few LLVM vector
operations. LLVM splits them to what the processor has (one AVX-512 register, two AVX2, four NEON), so the code is
portable and its result the same everywhere: `fma` rounds once, on every target.

These functions can be called only from compiled (`njit`) code. Indices count elements of a one-dimensional array.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from reroll.kernels.jit import jit

LANES = 16

_I1, _I8, _I16, _I32 = (ir.IntType(bits) for bits in (1, 8, 16, 32))
_ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}


class Vector(types.Type):
    """The Numba type of sixteen float32 or float64 numbers."""

    def __init__(self, element: types.Float):
        self.element = element
        super().__init__(name=f"f{element.bitwidth}x{LANES}")


def _llvm(element: types.Float) -> ir.VectorType:
    return ir.VectorType(_ELEMENTS[element], LANES)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector):
        super().__init__(manager, vector, _llvm(vector.element))


# ---- helpers that emit LLVM instructions


def _integers(values: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(values)), list(values))


class _Emitter:
    """Emits vector instructions for one element type."""

    def __init__(self, builder: Any, element: types.Float):
        self.builder, self.type = builder, _llvm(element)
        self.align = element.bitwidth // 8
        self.suffix = f"v{LANES}f{element.bitwidth}"

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [value] * LANES)

    def splat(self, scalar: Any) -> Any:
        undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(first, undefined, _integers([0] * LANES))

    def call(self, name: str, *arguments: Any, returns: Any = None) -> Any:
        """Call an LLVM intrinsic, which returns a vector unless a type is named."""
        signature = ir.FunctionType(returns or self.type, [argument.type for argument in arguments])
        return self.builder.call(
            cgutils.get_or_insert_function(self.builder.module, signature, f"llvm.{name}"), arguments
        )

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.call(f"fma.{self.suffix}", a, b, c)

    def abs(self, x: Any) -> Any:
        return self.call(f"fabs.{self.suffix}", x)

    def polynomial(self, x: Any, *coefficients: float) -> Any:
        """Horner's rule, highest power first."""
        total = self.constant(coefficients[0])
        for coefficient in coefficients[1:]:
            total = self.fma(total, x, self.constant(coefficient))
        return total

    def pointer(self, data: Any, index: Any, width: int = LANES) -> Any:
        """Return the address of `width` numbers from `data[index]` on."""
        return self.builder.bitcast(
            self.builder.gep(data, [index]), ir.VectorType(self.type.element, width).as_pointer()
        )


def _element(argument: types.Type) -> types.Type | None:
    """Return the type of the numbers in an array or a vector, or of a real number; None for others."""
    if isinstance(argument, types.Array):
        return argument.dtype
    return argument.element if isinstance(argument, Vector) else argument if isinstance(argument, types.Float) else None


def _operation(returns: bool = True, integers: types.Integer = types.intp) -> Callable[[Callable[..., Any]], Any]:
    """Make a function that emits LLVM instructions one that compiled code can call.

    The decorated function is given an `_Emitter` and the values of its arguments: of an array the pointer to its data.
    The emitter's element type is that of the first array, vector or real number among them.

    Args:
        returns: whether it returns a vector; else it returns nothing.
        integers: the type to which integer arguments are converted.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        @functools.wraps(emit)  # Numba reads the names of the arguments from here
        def typed(typing_context: Any, *arguments: types.Type) -> Any:
            element = next(filter(None, map(_element, arguments)))

            def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
                pairs = zip(signature.args, values)
                values = [
                    context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
                    for kind, value in pairs
                ]
                result = emit(_Emitter(builder, element), *values)
                return result if returns else context.get_dummy_value()

            kinds = (integers if isinstance(kind, types.Integer) else kind for kind in arguments)
            return (Vector(element) if returns else types.void)(*kinds), code

        return intrinsic(typed)

    return decorate


# ---- memory


@_operation()
def load(emitter, array, index):
    """Return the sixteen numbers `array[index : index + 16]`."""
    return emitter.builder.load(emitter.pointer(array, index), align=emitter.align)


@_operation(returns=False)
def store(emitter, array, index, vector):
    """Write sixteen numbers to `array[index : index + 16]`."""
    emitter.builder.store(vector, emitter.pointer(array, index), align=emitter.align)


@_operation()
def load_part(emitter, array, index, count):
    """Return `array[index : index + count]` in the first lanes and 0 in the others; nothing beyond is read."""
    return _load_part(emitter, array, index, count)


def _load_part(emitter: _Emitter, array: Any, index: Any, count: Any) -> Any:
    builder, zeros = emitter.builder, emitter.constant(0.0)
    result = cgutils.alloca_once_value(builder, zeros)

    def exact(width: int) -> None:
        value = builder.load(emitter.pointer(array, index, width), align=emitter.align)
        zero = ir.Constant(value.type, [0.0] * width)
        order = [min(lane, width) for lane in range(LANES)]  # `width` is the first of the zeros
        builder.store(builder.shuffle_vector(value, zero, _integers(order)), result)

    def masked(align: Any, mask: Any) -> None:
        arguments = emitter.pointer(array, index), align, mask, zeros
        builder.store(emitter.call(f"masked.load.{emitter.suffix}.p0", *arguments), result)

    _by_width(emitter, count, exact, masked)
    return builder.load(result)


@_operation(returns=False)
def store_part(emitter, array, index, vector, count):
    """Write the first `count` lanes to `array[index : index + count]`; nothing beyond is written."""
    builder = emitter.builder

    def exact(width: int) -> None:
        first = builder.shuffle_vector(vector, vector, _integers(range(width)))
        builder.store(first, emitter.pointer(array, index, width), align=emitter.align)

    def masked(align: Any, mask: Any) -> None:
        arguments = vector, emitter.pointer(array, index), align, mask
        emitter.call(f"masked.store.{emitter.suffix}.p0", *arguments, returns=ir.VoidType())

    _by_width(emitter, count, exact, masked)


def _by_width(emitter: _Emitter, count: Any, exact: Callable[[int], None], masked: Callable[[Any, Any], None]) -> None:
    """Emit an access to the first `count` lanes: `exact(width)` for a count of 8 or 4, else `masked(align, mask)`.

    Eight or four are one short vector. Any other number is a vector under a mask, which the processor takes for an
    access to all sixteen numbers: it waits where those overlap with what was just written (measured: 3 times slower).
    """
    builder = emitter.builder
    mask = builder.icmp_signed("<", _integers(range(LANES)), emitter.splat(builder.trunc(count, _I32)))

    def branch(widths: tuple[int, ...]) -> None:
        if not widths:
            masked(ir.Constant(_I32, emitter.align), mask)
            return
        equal = builder.icmp_signed("==", count, ir.Constant(count.type, widths[0]))
        with builder.if_else(equal) as (then, otherwise):
            with then:
                exact(widths[0])
            with otherwise:
                branch(widths[1:])

    branch((8, 4))


@jit
def load_lanes(array, index, count):
    """`load` where sixteen numbers or more are left, else `load_part`."""
    if count >= LANES:
        return load(array, index)
    return load_part(array, index, count)


@jit
def store_lanes(array, index, vector, count):
    """`store` where there is room for sixteen numbers or more, else `store_part`."""
    if count >= LANES:
        store(array, index, vector)
    else:
        store_part(array, index, vector, count)


@_operation(returns=False)
def prefetch(emitter, array, index):
    """Ask for the cache line of `array[index]`; the index may lie outside of the array."""
    pointer = emitter.builder.bitcast(emitter.builder.gep(array, [index]), _I8.as_pointer())
    # To be read, and soon read again; of the data cache.
    hints = (ir.Constant(_I32, value) for value in (0, 3, 1))
    emitter.call("prefetch.p0", pointer, *hints, returns=ir.VoidType())


@_operation()
def broadcast(emitter, array, index):
    """Return a vector whose sixteen numbers are all `array[index]`."""
    return emitter.splat(emitter.builder.load(emitter.builder.gep(array, [index])))


# ---- arithmetic


@_operation()
def splat(emitter, scalar):
    """Return a vector whose sixteen numbers are all `scalar`."""
    return emitter.splat(scalar)


def _binary(instruction: str) -> Any:
    """Return the operation on two vectors that is one LLVM instruction."""

    def emit(emitter, a, b):
        return getattr(emitter.builder, instruction)(a, b)

    emit.__name__ = instruction
    return _operation()(emit)


add, sub, mul, div = map(_binary, ("fadd", "fsub", "fmul", "fdiv"))


@_operation()
def fma(emitter, a, b, c):
    """Return a · b + c with one rounding."""
    return emitter.fma(a, b, c)


@_operation()
def at_most(emitter, a, limit):
    """Return `limit` where a is above it and a elsewhere, so that a NaN stays one."""
    return emitter.builder.select(emitter.builder.fcmp_ordered(">", a, limit), limit, a)


@_operation()
def max_abs(emitter, a, x):
    """Return |x| where it is above a, and a elsewhere, also where x is not a number."""
    magnitude = emitter.abs(x)
    return emitter.builder.select(emitter.builder.fcmp_ordered(">", magnitude, a), magnitude, a)


@_operation()
def row_sums(emitter, matrix, at, stride, rows, array, index, columns):
    """Return lane i = Σ_j matrix[at + i · stride + j] · array[index + j] for i < rows, j < columns.

    Lanes from `rows` ≥ 1 on repeat the last row, which costs less than leaving them out. Sixteen rows are multiplied
    side by side and their lanes summed together by halves: 45 operations for 16 sums, where one sum alone takes eight.
    """
    builder = emitter.builder
    last = builder.sub(rows, ir.Constant(at.type, 1))
    starts, sums = [], []
    for i in (ir.Constant(at.type, i) for i in range(LANES)):
        row = builder.select(builder.icmp_signed("<", i, last), i, last)
        starts.append(builder.add(at, builder.mul(stride, row)))
        sums.append(cgutils.alloca_once_value(builder, emitter.constant(0.0)))
    zero, step = ir.Constant(at.type, 0), ir.Constant(at.type, LANES)
    with cgutils.for_range_slice(builder, zero, columns, step, inc=True) as (j, _):
        left = builder.sub(columns, j)
        vector = _load_part(emitter, array, builder.add(index, j), left)
        for start, total in zip(starts, sums):
            row = _load_part(emitter, matrix, builder.add(start, j), left)
            builder.store(emitter.fma(row, vector, builder.load(total)), total)
    return _sum_lanes(builder, [builder.load(total) for total in sums])


def _sum_lanes(builder: Any, vectors: list[Any]) -> Any:
    """Return the vector of the sums of sixteen vectors.

    Each round adds the halves of every vector and puts the results of two vectors into one: 16 vectors of 16 partial
    sums become 8 of 2 × 8, 4 of 4 × 4, 2 of 8 × 2, and one of 16 × 1.
    """
    half = LANES // 2
    while half:
        low = [side + first + i for first in range(0, LANES, 2 * half) for side in (0, LANES) for i in range(half)]
        high = [lane + half for lane in low]
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, _integers(low)), builder.shuffle_vector(a, b, _integers(high)))
            for a, b in zip(vectors[:half], vectors[half:])
        ]
        half //= 2
    return vectors[0]


@_operation(integers=types.uint32)
def signs(emitter, word, shift, a):
    """Return ±a by bits `shift … shift + 15` of a 32-bit word: +a where the bit is 0, −a where it is 1."""
    return _signs(emitter, word, shift, a)


@_operation(integers=types.uint32)
def masked_signs(emitter, word, mask, shift, a):
    """Return `signs(word, shift, a)` where the same bit of `mask` is 1, and 0 elsewhere."""
    bits = _bits(emitter.builder, mask, shift)
    return emitter.builder.select(bits, _signs(emitter, word, shift, a), emitter.constant(0.0))


def _signs(emitter: _Emitter, word: Any, shift: Any, a: Any) -> Any:
    bits = _bits(emitter.builder, word, shift)
    return emitter.builder.select(bits, emitter.splat(emitter.builder.fneg(a)), emitter.splat(a))


def _bits(builder: Any, word: Any, shift: Any) -> Any:
    return builder.bitcast(builder.trunc(builder.lshr(word, shift), _I16), ir.VectorType(_I1, LANES))


# ---- functions of a float32 vector

# exp on [-87, 87] to about 1 unit in the last place: x = n·ln 2 + r, a polynomial in r, and 2ⁿ by its exponent bits.
# The coefficients of exp and tanh are those of the Cephes library (S. Moshier, single precision).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def _exp(emitter: _Emitter, x: Any) -> Any:
    builder = emitter.builder
    # Comparisons rather than min and max: those would turn a NaN into a number, and a NaN must reach the loss.
    for limit, side in ((87.0, ">"), (-87.0, "<")):
        bound = emitter.constant(limit)
        x = builder.select(builder.fcmp_ordered(side, x, bound), bound, x)
    # Adding 1.5·2²³ rounds to an integer and leaves it in the low bits, from where a shift puts it into the exponent.
    shifter = emitter.constant(12582912.0)
    shifted = emitter.fma(x, emitter.constant(1.4426950408889634), shifter)
    n = builder.fsub(shifted, shifter)
    r = emitter.fma(n, emitter.constant(-_LN2_LOW), emitter.fma(n, emitter.constant(-_LN2_HIGH), x))
    p = emitter.polynomial(r, *_EXP)
    p = builder.fadd(emitter.fma(builder.fmul(p, r), r, r), emitter.constant(1.0))
    exponent = builder.shl(builder.bitcast(shifted, ir.VectorType(_I32, LANES)), _integers([23] * LANES))
    power = builder.add(exponent, _integers([127 << 23] * LANES))
    return builder.fmul(p, builder.bitcast(power, emitter.type))


@_operation()
def sigmoid(emitter, x):
    """Return 1 / (1 + e⁻ˣ), of float32."""
    one = emitter.constant(1.0)
    return emitter.builder.fdiv(one, emitter.builder.fadd(one, _exp(emitter, emitter.builder.fneg(x))))


@_operation()
def tanh(emitter, x):
    """Return tanh x, of float32: an odd polynomial below 0.625, 1 − 2 / (e²ˣ + 1) above."""
    builder, one, two = emitter.builder, emitter.constant(1.0), emitter.constant(2.0)
    large = builder.fsub(one, builder.fdiv(two, builder.fadd(_exp(emitter, builder.fmul(two, x)), one)))
    square = builder.fmul(x, x)
    small = emitter.fma(builder.fmul(emitter.polynomial(square, *_TANH), square), x, x)
    near_zero = builder.fcmp_ordered("<", emitter.abs(x), emitter.constant(0.625))
    return builder.select(near_zero, small, large)
