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


@intrinsic
def add(typing_context, a, b):
    """Return a + b."""

    def code(context, builder, signature, arguments):
        return builder.fadd(*arguments)

    return a(a, b), code


@intrinsic
def mul(typing_context, a, b):
    """Return a · b."""

    def code(context, builder, signature, arguments):
        return builder.fmul(*arguments)

    return a(a, b), code


@intrinsic
def fma(typing_context, a, b, c):
    """Return a · b + c with one rounding."""

    def code(context, builder, signature, arguments):
        return _Writer(builder, a.element).fma(*arguments)

    return a(a, b, c), code


@intrinsic
def signs(typing_context, word, shift, a):
    """Return ±a by bits `shift … shift + 15` of a 32-bit word: +a where the bit is 0, −a where it is 1."""

    def code(context, builder, signature, arguments):
        word, shift, scalar = arguments
        write = _Writer(builder, a)
        bits = builder.bitcast(_sixteen_bits(builder, word, shift), ir.VectorType(_I1, LANES))
        return builder.select(bits, write.splat(builder.fneg(scalar)), write.splat(scalar))

    return Vector(a)(types.uint32, types.uint32, a), code


@intrinsic
def masked_signs(typing_context, word, mask, shift, a):
    """Return `signs(word, shift, a)` where the same bit of `mask` is 1, and 0 elsewhere."""

    def code(context, builder, signature, arguments):
        word, mask, shift, scalar = arguments
        write = _Writer(builder, a)
        lanes = ir.VectorType(_I1, LANES)
        bits = builder.bitcast(_sixteen_bits(builder, word, shift), lanes)
        keep = builder.bitcast(_sixteen_bits(builder, mask, shift), lanes)
        value = builder.select(bits, write.splat(builder.fneg(scalar)), write.splat(scalar))
        return builder.select(keep, value, write.constant(0.0))

    return Vector(a)(types.uint32, types.uint32, types.uint32, a), code


def _sixteen_bits(builder: Any, word: Any, shift: Any) -> Any:
    return builder.trunc(builder.lshr(word, shift), _I16)


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
