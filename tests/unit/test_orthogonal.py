"""`orthogonalize` against the definitions of its methods, exact singular vectors, and its stated results."""

import copy
import functools
from itertools import product

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from reroll import orthogonalize
from reroll.errors import UsageError
from reroll.optim.orthogonal import JORDAN, METHODS, POLAR_EXPRESS, TURBO, newton_schulz_flops

WAYS = [*product(METHODS, [False, True])]
SHAPES = [(7, 7), (20, 9), (9, 20), (33, 64), (3, 5, 4), (2, 2, 6, 11)]


def with_singular_values(shape, low, dtype=torch.float64):
    """A random matrix whose singular values are spread evenly from `low` to 1 in their logarithm; and its U Vᵀ."""
    u, s, vh = torch.linalg.svd(torch.randn(shape, dtype=dtype), full_matrices=False)
    values = torch.logspace(torch.tensor(low).log10().item(), 0, s.shape[-1], dtype=dtype)
    return u * values @ vh, u @ vh


def scaled(matrix, name, normalize_rows):
    """What a method takes its steps from: of norm 1, its rows of one length, preconditioned."""
    if normalize_rows:
        matrix = torch.stack([row / row.norm() for row in matrix])
    matrix = matrix / matrix.norm()
    if name == "turbo":
        m, n = matrix.shape
        sums = (matrix @ matrix.T if m <= n else matrix.T @ matrix).abs().sum(0)
        matrix = (sums**-0.5).diag() @ matrix if m <= n else matrix @ (sums**-0.5).diag()
    return matrix


def polar(matrix):
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def defined(matrix, name, steps, normalize_rows):
    """One step after the other, as the formulas say it."""
    x = scaled(matrix, name, normalize_rows)
    if name == "svd":
        return polar(x)
    for step in range(steps):
        a, b, c = METHODS[name].coefficients[min(step, len(METHODS[name].coefficients) - 1)]
        x = a * x + b * x @ x.T @ x + c * x @ x.T @ x @ x.T @ x
    return x


@pytest.mark.parametrize("name, normalize_rows", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [None, 1, 2, 12])
def test_a_method_is_what_its_formulas_say(shape, name, normalize_rows, steps):
    matrix = torch.randn(shape, dtype=torch.float64) * torch.logspace(-2, 1, shape[-2], dtype=torch.float64)[:, None]
    found = orthogonalize(matrix, steps, coefficients=name, normalize_rows=normalize_rows)
    own = {"turbo": 4}.get(name, 5)
    alone = [defined(one, name, steps or own, normalize_rows) for one in matrix.view(-1, *shape[-2:])]
    torch.testing.assert_close(found, torch.stack(alone).view(shape), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name, normalize_rows", WAYS)
@pytest.mark.parametrize("shape", [(23, 23), (41, 17), (17, 41)])
@pytest.mark.parametrize("condition", [1, 10, 100, 1e4])
def test_the_distance_to_the_exact_result_is_bounded(name, normalize_rows, shape, condition):
    """By the polynomials on the singular values there are; and by what scaling does to the singular vectors.

    The second is ‖polar(A) − polar(B)‖ ≤ 2 ‖A − B‖ / (σ(A) + σ(B)), σ the smallest (R.-C. Li, 1995), B any multiple.
    """
    matrix, exact = with_singular_values(shape, 1 / condition)
    found = orthogonalize(matrix, coefficients=name, normalize_rows=normalize_rows)
    start = scaled(matrix, name, normalize_rows)
    values = torch.linalg.svdvals(start)
    x = torch.logspace(values[-1].log10().item(), values[0].log10().item(), 4001, dtype=torch.float64)
    for a, b, c in {"jordan": JORDAN * 5, "polar_express": POLAR_EXPRESS[:5], "turbo": TURBO, "svd": ()}[name]:
        x = a * x + b * x**3 + c * x**5
    error = (x - 1).abs().max() * 1.001 + 1e-10 if name != "svd" else 1e-10
    assert torch.linalg.matrix_norm(found - polar(start), 2) < error
    start = start * (matrix * start).sum() / start.square().sum()
    moved = 2 * (matrix - start).norm() / (1 / condition + torch.linalg.svdvals(start)[-1])
    assert (found - exact).norm() < error * min(shape) ** 0.5 + moved


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients, low, high", [(JORDAN, 0.68, 1.14), (POLAR_EXPRESS, 0.84, 1.15)])
def test_singular_values_end_in_the_stated_band(shape, coefficients, low, high):
    matrix, exact = with_singular_values(shape, 0.05)
    found = orthogonalize(matrix, coefficients=coefficients)
    values = torch.linalg.svdvals(found)
    assert low < values.min()
    assert values.max() < high
    # The singular vectors are those of the matrix: Uᵀ O V is diagonal.
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ found @ vh.mT
    assert (inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-9
    # Steps of coefficients whose fixed point is 1 go on to U Vᵀ itself.
    newton_schulz = ((1.875, -1.25, 0.375),)
    assert (orthogonalize(matrix, 30, coefficients=newton_schulz) - exact).abs().max() < 1e-9


@pytest.mark.parametrize("steps", [1, 4, 5, 7])
@pytest.mark.parametrize("coefficients", [JORDAN, POLAR_EXPRESS, ((2.0, -1.5, 0.5), *JORDAN)])
def test_a_step_is_the_polynomial_of_the_singular_values(steps, coefficients):
    matrix = torch.randn(11, 6, dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    x = s / matrix.norm()
    for step in range(steps):
        a, b, c = coefficients[min(step, len(coefficients) - 1)]
        x = a * x + b * x**3 + c * x**5
    torch.testing.assert_close(orthogonalize(matrix, steps, coefficients=coefficients), u * x @ vh)


def test_coefficients_are_those_that_were_published():
    """Of the speedrun's record 8; of five steps of Amsel et al., algorithm 1, from norm 1/1.02; You's last four."""
    assert JORDAN == ((3.4445, -4.7750, 2.0315),)
    first, *others = POLAR_EXPRESS
    assert [c * 1.02**power for c, power in zip(first, (1, 3, 5))] == pytest.approx([8.15655, -22.48329, 15.87877])
    assert others == [
        (4.04293, -2.80892, 0.50002), (3.89167, -2.77248, 0.50606), (3.28575, -2.36813, 0.46449),
        (2.34654, -1.70978, 0.42324), (15 / 8, -10 / 8, 3 / 8),
    ]  # fmt: skip
    assert TURBO == (
        (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    )  # fmt: skip


@pytest.mark.parametrize(
    "name, start, low, high",
    [("jordan", 0.003, 0.68, 1.203), ("jordan", 0.01, 0.68, 1.135), ("polar_express", 0.001, 0.84, 1.15),
     ("turbo", 0.01, 0.97, 1.15)],
)  # fmt: skip
def test_the_band_that_is_stated(name, start, low, high):
    """Of the polynomials, over all singular values from where it is said to begin; no wider than it has to be."""
    values = torch.logspace(torch.tensor(start).log10().item(), 0, 8001, dtype=torch.float64)
    for step in range(METHODS[name].steps):
        a, b, c = METHODS[name].coefficients[min(step, len(METHODS[name].coefficients) - 1)]
        values = a * values + b * values**3 + c * values**5
    assert low < values.min() < low + 0.01
    assert high - 0.01 < values.max() < high


def test_more_steps_settle_with_polar_express_alone():
    matrix, exact = with_singular_values((15, 12), 1e-3)
    assert (orthogonalize(matrix, 12, coefficients="polar_express") - exact).norm() < 1e-10
    assert (orthogonalize(matrix, 12) - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("how", [copy.deepcopy, list, lambda c: [list(abc) for abc in c]])
def test_names_stand_for_numbers_that_can_be_saved(how, tmp_path):
    matrix = torch.randn(9, 6, dtype=torch.float64)
    torch.save(how(POLAR_EXPRESS), tmp_path / "c.pt")
    for coefficients in (how(POLAR_EXPRESS), torch.load(tmp_path / "c.pt")):
        expected = orthogonalize(matrix, coefficients="polar_express")
        assert torch.equal(orthogonalize(matrix, coefficients=coefficients), expected)
    assert torch.equal(orthogonalize(matrix, coefficients=JORDAN[0]), orthogonalize(matrix))


@pytest.mark.parametrize("shape", [(6, 4), (9, 4), (4, 9)])  # two steps are one where a side is twice the other
@pytest.mark.parametrize("name", METHODS)
def test_vmap_goes_over_stacks(shape, name):
    matrices = torch.randn(3, *shape, dtype=torch.float64)
    one = functools.partial(orthogonalize, coefficients=name)
    torch.testing.assert_close(torch.vmap(one)(matrices), one(matrices))


def test_it_is_one_graph():
    """No value decides what is computed, so that torch.compile has nothing to break at."""
    matrix = torch.randn(6, 4, dtype=torch.float64)
    compiled = torch.compile(orthogonalize, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(matrix), orthogonalize(matrix))


def test_bf16_is_enough():
    matrix, _ = with_singular_values((64, 200), 0.01, torch.float32)
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.6
    assert values.max() < 1.25
    exact = orthogonalize(matrix.double())
    assert (orthogonalize(matrix) - exact).norm() < 0.05 * exact.norm()
    assert (orthogonalize(matrix, dtype=torch.float32) - exact).norm() < 1e-4 * exact.norm()


@pytest.mark.parametrize("name, normalize_rows", WAYS)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (9, 4)])
def test_extreme_matrices_have_the_stated_results(name, normalize_rows, shape):
    def found(matrix):
        return orthogonalize(matrix, coefficients=name, normalize_rows=normalize_rows)

    matrix = torch.randn(shape)
    assert torch.equal(found(torch.zeros(shape)), torch.zeros(shape))
    tiny = found(matrix * 1e-30)  # far below ε: proportionally less
    assert 0 < tiny.abs().max() < (1e-12 if name != "turbo" or not normalize_rows else 1e-6)
    torch.testing.assert_close(found(matrix * 0.5e-30), tiny / 2, atol=0, rtol=1e-5)
    torch.testing.assert_close(found(matrix * 2.0**100), found(matrix))
    torch.testing.assert_close(found(matrix * 1e30), found(matrix), rtol=0, atol=0.05)
    torch.testing.assert_close(found(matrix * 2.0**-15), found(matrix))
    for bad in (torch.nan, torch.inf):
        one = torch.stack([matrix, matrix])
        one[0, 2, 3] = bad
        assert found(one[0]).isnan().any()
        torch.testing.assert_close(found(one)[1], found(matrix), rtol=0, atol=0.05)  # the other one is left alone
    one_row = torch.zeros(shape)
    one_row[2] = matrix[2]
    assert found(one_row)[[0, 1, 3]].abs().max() == 0  # no direction that is not there


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_svd_leaves_out_directions_of_rounding_errors(dtype, close):
    u, s = torch.linalg.qr(torch.randn(13, 2, dtype=torch.float64)).Q, torch.tensor([3.0, 1.0], dtype=torch.float64)
    vh = torch.linalg.qr(torch.randn(9, 2, dtype=torch.float64)).Q.mT
    found = orthogonalize((u * s @ vh).to(dtype), coefficients="svd")
    assert (found - u @ vh).abs().max() < close


def test_what_is_no_matrix_of_real_numbers_is_refused():
    assert orthogonalize(torch.zeros(0, 4)).shape == (0, 4)
    for wrong in (torch.zeros(5), torch.zeros(3, 3, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.complex64)):
        with pytest.raises(UsageError, match="must be real and have two axes"):
            orthogonalize(wrong)
    with pytest.raises(UsageError, match='coefficients="tubro" is not known. Did you mean "turbo"'):
        orthogonalize(torch.zeros(3, 3), coefficients="tubro")


@pytest.mark.parametrize("shape, stack", [((13, 9), ()), ((9, 13), ()), ((20, 10), ()), ((8, 31), (3,))])
@pytest.mark.parametrize("name, steps", [("jordan", 1), ("jordan", 5), ("polar_express", 12), ("turbo", 4)])
def test_the_operations_of_products_are_counted(shape, stack, name, steps):
    matrix = torch.randn(*stack, *shape)
    with FlopCounterMode(display=False) as counter:
        orthogonalize(matrix, steps, coefficients=name)
    assert newton_schulz_flops((*stack, *shape), steps) == counter.get_total_flops()
