"""The vector functions against numpy in double precision, at every lane, and NaN wherever a NaN goes in."""

import numpy as np
import pytest
from numba import njit

from reroll.kernels import simd


@njit
def apply_sigmoid(x, out):
    for i in range(0, len(x), 16):
        simd.store(out, i, simd.sigmoid(simd.load(x, i)))


@njit
def apply_tanh(x, out):
    for i in range(0, len(x), 16):
        simd.store(out, i, simd.tanh(simd.load(x, i)))


@njit
def apply_arithmetic(x, y, out):
    for i in range(0, len(x), 16):
        product = simd.mul(simd.load(x, i), simd.broadcast(y, i))
        simd.store(out, i, simd.fma(simd.splat(y[i + 1]), simd.load(x, i), simd.add(product, simd.load(y, i))))


GRID = np.concatenate(
    [
        np.linspace(-100, 100, 4001),
        np.linspace(-1, 1, 4001),
        [0.0, -0.0, 1e-30, -1e-30, 0.625, 3e38, -3e38],
        np.zeros(7),
    ]
).astype(np.float32)


@pytest.mark.parametrize("function, exact", [(apply_sigmoid, lambda x: 1 / (1 + np.exp(-x))), (apply_tanh, np.tanh)])
def test_functions_are_within_a_few_units_in_the_last_place(function, exact):
    assert len(GRID) % 16 == 0
    out = np.empty_like(GRID)
    function(GRID, out)
    with np.errstate(over="ignore"):
        truth = exact(GRID.astype(np.float64))
    # Beyond ±87 the sigmoid stays at e⁻⁸⁷ instead of going on to the smallest number.
    assert np.abs(out - truth).max() < 2e-7
    inside = np.abs(GRID) < 80
    assert (np.abs(out - truth)[inside] <= 4e-7 * np.abs(truth)[inside]).all()


@pytest.mark.parametrize("function", [apply_sigmoid, apply_tanh])
def test_nan_stays_nan_and_infinity_saturates(function):
    x = np.full(16, 0.5, np.float32)
    x[3], x[7], x[9] = np.nan, np.inf, -np.inf
    out = np.empty_like(x)
    function(x, out)
    assert np.isnan(out).tolist() == np.isnan(x).tolist()
    assert out[7] == 1
    assert abs(out[9] - (0 if function is apply_sigmoid else -1)) < 1e-30


def test_arithmetic_and_broadcast():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 48)).astype(np.float32)
    out = np.empty_like(x)
    apply_arithmetic(x, y, out)
    for i in range(0, 48, 16):
        lanes = slice(i, i + 16)
        truth = y[i + 1].astype(float) * x[lanes] + (x[lanes].astype(float) * y[i] + y[lanes])
        np.testing.assert_allclose(out[lanes], truth, rtol=1e-6, atol=1e-6)


@njit
def apply_differences(x, y, out):
    difference = simd.sub(simd.load(x, 0), simd.load(y, 0))
    simd.store(out, 0, simd.at_most(simd.div(difference, simd.load(y, 0)), simd.splat(np.float32(0.5))))


def test_differences_quotients_and_bounds():
    x, y = np.random.default_rng(1).standard_normal((2, 16)).astype(np.float32)
    x[3], x[5] = np.nan, np.inf
    out = np.empty_like(x)
    apply_differences(x, y, out)
    truth = (x - y) / y
    assert np.isnan(out[3])
    np.testing.assert_array_equal(out, np.where(truth > 0.5, np.float32(0.5), truth))


@njit
def copy_part(x, out, count):
    simd.prefetch(x, 1 << 20)  # far outside: only a hint
    part = simd.load_part(x, 2, count)
    simd.store_part(out, 3, part, count)
    simd.store(out, 32, part)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", range(17))
def test_parts_of_a_vector_touch_nothing_else(count, dtype):
    x = np.arange(1, 20, dtype=dtype)[: 2 + count]
    out = np.full(48, -1, dtype)
    copy_part(x, out, count)
    expected = np.full(48, -1, dtype)
    expected[3 : 3 + count] = x[2:]
    expected[32:] = 0
    expected[32 : 32 + count] = x[2:]
    np.testing.assert_array_equal(out, expected)


@njit
def apply_row_sums(matrix, vector, stride, rows, columns, out):
    simd.store_part(out, 0, simd.row_sums(matrix, 1, stride, rows, vector, 2, columns), rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 5), (8, 8), (16, 16), (7, 40), (16, 33)])
def test_row_sums(rows, columns, dtype):
    rng = np.random.default_rng(2)
    matrix = rng.standard_normal((rows, columns + 3)).astype(dtype)
    vector = rng.standard_normal(columns + 2).astype(dtype)
    out = np.full(16, np.nan, dtype)
    apply_row_sums(matrix.reshape(-1), vector, columns + 3, rows, columns, out)
    truth = matrix[:, 1 : columns + 1].astype(float) @ vector[2:].astype(float)
    tolerance = 1e-5 if dtype == np.float32 else 1e-13
    np.testing.assert_allclose(out[:rows], truth, rtol=tolerance, atol=tolerance)
    assert np.isnan(out[rows:]).all()
