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

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_I1, _I16, _I32 = ir.IntType(1), ir.IntType(16), ir.IntType(32)
_ELEMENTS = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_SUFFIX = {types.float32: "v16f32", types.float64: "v16f64"}


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


# ---- helpers that write LLVM instructions


class _Writer:
    """Writes vector instructions for one element type."""

    def __init__(self, builder: Any, element: types.Float):
        self.builder, self.element, self.type = builder, element, _llvm(element)

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [value] * LANES)

    def splat(self, scalar: Any) -> Any:
        undefined = ir.Constant(self.type, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))

    def call(self, name: str, *arguments: Any) -> Any:
        signature = ir.FunctionType(self.type, [self.type] * len(arguments))
        function = cgutils.get_or_insert_function(
            self.builder.module, signature, f"llvm.{name}.{_SUFFIX[self.element]}"
        )
        return self.builder.call(function, arguments)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        return self.call("fma", a, b, c)

    def shuffle(self, a: Any, b: Any, order: list[int]) -> Any:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, LANES), order))

    def polynomial(self, x: Any, *coefficients: float) -> Any:
        """Horner's rule, highest power first."""
        total = self.constant(coefficients[0])
        for coefficient in coefficients[1:]:
            total = self.fma(total, x, self.constant(coefficient))
        return total


def _pointer(context: Any, builder: Any, array_type: types.Array, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _llvm(array_type.dtype).as_pointer())


# ---- memory


@intrinsic
def load(typing_context, array, index):
    """Return the sixteen numbers `array[index : index + 16]`."""

    def code(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Vector(array.dtype)(array, types.intp), code


@intrinsic
def store(typing_context, array, index, vector):
    """Write sixteen numbers to `array[index : index + 16]`."""

    def code(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], arguments[0], arguments[1])
        builder.store(arguments[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), code


@intrinsic
def load_part(typing_context, array, index, count):
    """Return `array[index : index + count]` in the first lanes and 0 in the others; nothing beyond is read."""

    def code(context, builder, signature, arguments):
        return _load_part(context, builder, signature.args[0], *arguments)

    return Vector(array.dtype)(array, types.intp, types.intp), code


def _load_part(context: Any, builder: Any, array_type: types.Array, array: Any, index: Any, count: Any) -> Any:
    part = _Part(context, builder, array_type, array, index, count)
    zeros = part.write.constant(0.0)
    result = cgutils.alloca_once_value(builder, zeros)

    def exact(width: int) -> None:
        value = builder.load(part.pointer_to(width), align=part.align)
        zero = ir.Constant(value.type, [0.0] * width)
        order = [min(lane, width) for lane in range(LANES)]  # `width` is the first of the zeros
        lanes = ir.Constant(ir.VectorType(_I32, LANES), order)
        builder.store(builder.shuffle_vector(value, zero, lanes), result)

    def masked() -> None:
        kinds = [part.pointer.type, _I32, part.mask.type, zeros.type]
        function = part.intrinsic("load", ir.FunctionType(zeros.type, kinds))
        builder.store(builder.call(function, [part.pointer, ir.Constant(_I32, part.align), part.mask, zeros]), result)

    part.by_width(exact, masked)
    return builder.load(result)


@intrinsic
def store_part(typing_context, array, index, vector, count):
    """Write the first `count` lanes to `array[index : index + count]`; nothing beyond is written."""

    def code(context, builder, signature, arguments):
        array, index, vector, count = arguments
        part = _Part(context, builder, signature.args[0], array, index, count)

        def exact(width: int) -> None:
            lanes = ir.Constant(ir.VectorType(_I32, width), list(range(width)))
            builder.store(builder.shuffle_vector(vector, vector, lanes), part.pointer_to(width), align=part.align)

        def masked() -> None:
            kinds = [vector.type, part.pointer.type, _I32, part.mask.type]
            function = part.intrinsic("store", ir.FunctionType(ir.VoidType(), kinds))
            builder.call(function, [vector, part.pointer, ir.Constant(_I32, part.align), part.mask])

        part.by_width(exact, masked)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, types.intp), code


class _Part:
    """Writes the access to some of sixteen lanes.

    Eight or four are one short vector. Any other number is a vector under a mask, which the processor takes for an
    access to all sixteen numbers: it waits where those overlap with what was just written (measured: 3 times slower).
    """

    def __init__(self, context: Any, builder: Any, array_type: types.Array, array: Any, index: Any, count: Any):
        self.builder, self.count, self.element = builder, count, array_type.dtype
        self.write = _Writer(builder, array_type.dtype)
        self.pointer = _pointer(context, builder, array_type, array, index)
        self.align = array_type.dtype.bitwidth // 8
        lanes = ir.VectorType(_I32, LANES)
        first = builder.insert_element(
            ir.Constant(lanes, ir.Undefined), builder.trunc(count, _I32), ir.Constant(_I32, 0)
        )
        counts = builder.shuffle_vector(first, first, ir.Constant(lanes, [0] * LANES))
        self.mask = builder.icmp_signed("<", ir.Constant(lanes, list(range(LANES))), counts)

    def pointer_to(self, width: int) -> Any:
        return self.builder.bitcast(self.pointer, ir.VectorType(_ELEMENTS[self.element], width).as_pointer())

    def intrinsic(self, name: str, signature: ir.FunctionType) -> Any:
        name = f"llvm.masked.{name}.{_SUFFIX[self.element]}.p0"
        return cgutils.get_or_insert_function(self.builder.module, signature, name)

    def by_width(self, exact: Any, masked: Any, widths: tuple[int, ...] = (8, 4)) -> None:
        """Write `exact(width)` for counts equal to a width and `masked()` for all others."""
        if not widths:
            masked()
            return
        equal = self.builder.icmp_signed("==", self.count, ir.Constant(self.count.type, widths[0]))
        with self.builder.if_else(equal) as (then, otherwise):
            with then:
                exact(widths[0])
            with otherwise:
                self.by_width(exact, masked, widths[1:])


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of `array[index]`; the index may lie outside of the array."""

    def code(context, builder, signature, arguments):
        array_type, (array, index) = signature.args[0], arguments
        pointer = builder.gep(context.make_array(array_type)(context, builder, array).data, [index])
        pointer = builder.bitcast(pointer, ir.IntType(8).as_pointer())
        called = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, called, "llvm.prefetch.p0")
        # To be read, and soon read again; of the data cache.
        builder.call(function, [pointer, *(ir.Constant(_I32, value) for value in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.intp), code


@intrinsic
def broadcast(typing_context, array, index):
    """Return a vector whose sixteen numbers are all `array[index]`."""

    def code(context, builder, signature, arguments):
        array_type, array, index = signature.args[0], arguments[0], arguments[1]
        data = context.make_array(array_type)(context, builder, array).data
        return _Writer(builder, array_type.dtype).splat(builder.load(builder.gep(data, [index])))

    return Vector(array.dtype)(array, types.intp), code


# ---- arithmetic


@intrinsic
def splat(typing_context, scalar):
    """Return a vector whose sixteen numbers are all `scalar`."""

    def code(context, builder, signature, arguments):
        return _Writer(builder, scalar).splat(arguments[0])

    return Vector(scalar)(scalar), code


def _binary(instruction: str) -> Any:
    """Return the operation on two vectors that is one LLVM instruction."""

    def operation(typing_context, a, b):
        return a(a, b), lambda context, builder, signature, arguments: getattr(builder, instruction)(*arguments)

    operation.__name__ = instruction
    return intrinsic(operation)


add, sub, mul, div = map(_binary, ("fadd", "fsub", "fmul", "fdiv"))


@intrinsic
def at_most(typing_context, a, limit):
    """Return `limit` where a is above it and a elsewhere, so that a NaN stays one."""

    def code(context, builder, signature, arguments):
        a, limit = arguments
        return builder.select(builder.fcmp_ordered(">", a, limit), limit, a)

    return a(a, limit), code


@intrinsic
def max_abs(typing_context, a, x):
    """Return |x| where it is above a, and a elsewhere, also where x is not a number."""

    def code(context, builder, signature, arguments):
        a, x = arguments
        magnitude = _Writer(builder, signature.return_type.element).call("fabs", x)
        return builder.select(builder.fcmp_ordered(">", magnitude, a), magnitude, a)

    return a(a, x), code


@intrinsic
def fma(typing_context, a, b, c):
    """Return a · b + c with one rounding."""

    def code(context, builder, signature, arguments):
        return _Writer(builder, a.element).fma(*arguments)

    return a(a, b, c), code


@intrinsic
def row_sums(typing_context, matrix, at, stride, rows, array, index, columns):
    """Return lane i = Σ_j matrix[at + i · stride + j] · array[index + j] for i < rows, j < columns.

    Lanes from `rows` ≥ 1 on repeat the last row, which costs less than leaving them out. Sixteen rows are multiplied
    side by side and their lanes summed together by halves: 45 operations for 16 sums, where one sum alone takes eight.
    """

    def code(context, builder, signature, arguments):
        matrix, at, stride, rows, array, index, columns = arguments
        write = _Writer(builder, signature.return_type.element)
        last = builder.sub(rows, ir.Constant(at.type, 1))
        starts, sums = [], []
        for i in (ir.Constant(at.type, i) for i in range(LANES)):
            row = builder.select(builder.icmp_signed("<", i, last), i, last)
            starts.append(builder.add(at, builder.mul(stride, row)))
            sums.append(cgutils.alloca_once_value(builder, write.constant(0.0)))
        zero, step = ir.Constant(at.type, 0), ir.Constant(at.type, LANES)
        with cgutils.for_range_slice(builder, zero, columns, step, inc=True) as (j, _):
            left = builder.sub(columns, j)
            vector = _load_part(context, builder, signature.args[4], array, builder.add(index, j), left)
            for start, total in zip(starts, sums):
                row = _load_part(context, builder, signature.args[0], matrix, builder.add(start, j), left)
                builder.store(write.fma(row, vector, builder.load(total)), total)
        return _sum_lanes(write, [builder.load(total) for total in sums])

    integers = [types.intp] * 3
    return Vector(matrix.dtype)(matrix, *integers, array, types.intp, types.intp), code


def _sum_lanes(write: _Writer, vectors: list[Any]) -> Any:
    """Return the vector of the sums of sixteen vectors."""
    half = LANES // 2
    while half:
        low = [side + first + i for first in range(0, LANES, 2 * half) for side in (0, LANES) for i in range(half)]
        high = [lane + half for lane in low]
        pairs = zip(vectors[:half], vectors[half:])
        vectors = [write.builder.fadd(write.shuffle(a, b, low), write.shuffle(a, b, high)) for a, b in pairs]
        half //= 2
    return vectors[0]


@intrinsic
def signs(typing_context, word, shift, a):
    """Return ±a by bits `shift … shift + 15` of a 32-bit word: +a where the bit is 0, −a where it is 1."""

    def code(context, builder, signature, arguments):
        return _signs(_Writer(builder, a), *arguments)

    return Vector(a)(types.uint32, types.uint32, a), code


@intrinsic
def masked_signs(typing_context, word, mask, shift, a):
    """Return `signs(word, shift, a)` where the same bit of `mask` is 1, and 0 elsewhere."""

    def code(context, builder, signature, arguments):
        word, mask, shift, scalar = arguments
        write = _Writer(builder, a)
        return builder.select(_bits(builder, mask, shift), _signs(write, word, shift, scalar), write.constant(0.0))

    return Vector(a)(types.uint32, types.uint32, types.uint32, a), code


def _signs(write: _Writer, word: Any, shift: Any, scalar: Any) -> Any:
    bits = _bits(write.builder, word, shift)
    return write.builder.select(bits, write.splat(write.builder.fneg(scalar)), write.splat(scalar))


def _bits(builder: Any, word: Any, shift: Any) -> Any:
    return builder.bitcast(builder.trunc(builder.lshr(word, shift), _I16), ir.VectorType(_I1, LANES))


# ---- functions of a float32 vector

# exp on [-87, 87] to about 1 unit in the last place: x = n·ln 2 + r, a polynomial in r, and 2ⁿ by its exponent bits.
# The coefficients of exp and tanh are those of the Cephes library (S. Moshier, single precision).
_EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4


def _exp(write: _Writer, x: Any) -> Any:
    builder = write.builder
    # Comparisons rather than min and max: those would turn a NaN into a number, and a NaN must reach the loss.
    for limit, side in ((87.0, ">"), (-87.0, "<")):
        bound = write.constant(limit)
        x = builder.select(builder.fcmp_ordered(side, x, bound), bound, x)
    # Adding 1.5·2²³ rounds to an integer and leaves it in the low bits, from where a shift puts it into the exponent.
    shifter = write.constant(12582912.0)
    shifted = write.fma(x, write.constant(1.4426950408889634), shifter)
    n = builder.fsub(shifted, shifter)
    r = write.fma(n, write.constant(-_LN2_LOW), write.fma(n, write.constant(-_LN2_HIGH), x))
    p = write.polynomial(r, *_EXP)
    p = builder.fadd(write.fma(builder.fmul(p, r), r, r), write.constant(1.0))
    integers = ir.VectorType(_I32, LANES)
    exponent = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [23] * LANES))
    power = builder.add(exponent, ir.Constant(integers, [127 << 23] * LANES))
    return builder.fmul(p, builder.bitcast(power, write.type))


@intrinsic
def sigmoid(typing_context, x):
    """Return 1 / (1 + e⁻ˣ), of float32."""

    def code(context, builder, signature, arguments):
        write = _Writer(builder, types.float32)
        one = write.constant(1.0)
        return builder.fdiv(one, builder.fadd(one, _exp(write, builder.fneg(arguments[0]))))

    return x(x), code


@intrinsic
def tanh(typing_context, x):
    """Return tanh x, of float32: an odd polynomial below 0.625, 1 − 2 / (e²ˣ + 1) above."""

    def code(context, builder, signature, arguments):
        (value,) = arguments
        write = _Writer(builder, types.float32)
        one, two = write.constant(1.0), write.constant(2.0)
        large = builder.fsub(one, builder.fdiv(two, builder.fadd(_exp(write, builder.fmul(two, value)), one)))
        square = builder.fmul(value, value)
        small = write.fma(builder.fmul(write.polynomial(square, *_TANH), square), value, value)
        near_zero = builder.fcmp_ordered("<", write.call("fabs", value), write.constant(0.625))
        return builder.select(near_zero, small, large)

    return x(x), code
