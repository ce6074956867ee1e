"""Every way to scan a linear recurrence equals the loop in float64, values and gradients; filters and smoothers too."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

import reroll
from reroll.errors import UsageError
from reroll.kernels import dispatch
from reroll.kernels.linear_scan import kalman_scan, kalman_smooth, linear_scan, operators, reference, scan_into
from reroll.kernels.linear_scan.kalman import elements

STRUCTURES = ["diagonal", "block", "dense"]
IMPLEMENTATIONS = ["cpu", "odd_even", "chunked", "triton"]
TIMES = [0, 1, 2, 3, 31, 32, 33, 1000]


@contextmanager
def using(implementation, op="linear_scan"):
    """Force an implementation; the two methods of the reference are told apart by where one gives way to the other."""
    before = reference.CHUNKED_FROM
    if implementation == "triton":
        pytest.importorskip("triton", reason="triton is in the dev extra, for Linux only")
    if implementation in ("odd_even", "chunked"):
        reference.CHUNKED_FROM = 0 if implementation == "chunked" else float("inf")
        implementation = "reference"
    try:
        with dispatch.use(op, implementation):
            yield
    finally:
        reference.CHUNKED_FROM = before


def random(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def problem(structure, batch, time, channels, order=2, dtype=torch.float64):
    """A, b, initial; about one A in four is zero or, for matrices, has zeros, and half of the numbers are negative."""
    shape, matrix = {
        "diagonal": ((channels,), (channels,)),
        "block": ((order, channels), (order, order, channels)),
        "dense": ((channels,), (channels, channels)),
    }[structure]
    scale = 0.9 / (1.0 if structure == "diagonal" else matrix[0] ** 0.5)
    A = random(batch, time, *matrix) * scale * (torch.rand(batch, time, *matrix) > 0.25)
    return A.to(dtype), random(batch, time, *shape, dtype=dtype), random(batch, *shape, dtype=dtype)


def by_hand(A, b, initial, reverse, structure):
    """One step after another."""
    step = {"diagonal": "b...c,b...c->b...c", "block": "bij...,bj...->bi...", "dense": "b...ij,b...j->b...i"}[structure]
    state = torch.zeros_like(b).sum(1) if initial is None else initial
    states = [None] * b.shape[1]
    for t in reversed(range(b.shape[1])) if reverse else range(b.shape[1]):
        state = torch.einsum(step, A[:, t], state) + b[:, t]
        states[t] = state
    return torch.stack(states, 1) if states else b.clone()


def close(got, expected, tolerance=1e-12):
    assert got.shape == expected.shape
    torch.testing.assert_close(got.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)


def check(implementation, structure, batch, time, channels, order=2, dtype=torch.float64, tolerance=1e-12):
    A, b, initial = problem(structure, batch, time, channels, order, dtype)
    for reverse in (False, True):
        for start in (None, initial):
            with using(implementation):
                got = linear_scan(A, b, start, reverse, structure=structure)
            exact = [None if x is None else x.double() for x in (A, b, start)]
            close(got.double(), by_hand(*exact, reverse, structure), tolerance)
            assert got.dtype == dtype


# ---- values


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("implementation", ["cpu", "odd_even", "chunked"])
def test_every_implementation_equals_the_loop(implementation, structure, time):
    check(implementation, structure, 2, time, 5)


@pytest.mark.parametrize("time", [*TIMES[:-1], pytest.param(131, marks=pytest.mark.slow)])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_triton_kernel_equals_the_loop(structure, time):
    # Triton's interpreter takes about half a millisecond per number.
    check("triton", structure, *((1, time, 1) if time > 3 else (2, time, 3)))


@pytest.mark.parametrize("channels", [1, 4, 8, 15, 16, 17, 40, 64, 65, 128, 1100])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_cpu_kernel_at_every_width(order, channels):
    if order == 1:  # five sequences, because up to 64 channels are computed four sequences at a time
        check("cpu", "diagonal", 5, 6, channels)
        check("cpu", "diagonal", 5, 6, channels, dtype=torch.float32, tolerance=1e-5)
    else:
        check("cpu", "block", 2, 3, channels, order)
        check("cpu", "block", 2, 3, channels, order, torch.float32, 1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 16, 17, 32, 37])
def test_cpu_kernel_at_every_size_of_matrix(size):
    check("cpu", "dense", 3, 6, size)
    check("cpu", "dense", 3, 6, size, dtype=torch.float32, tolerance=1e-5)
    A, b, initial = problem("dense", 3, 6, size)
    by_columns = A.mT.contiguous().mT
    close(linear_scan(by_columns, b, initial, reverse=True), by_hand(A, b, initial, True, "dense"))


def test_triton_kernel_over_several_blocks_of_channels():
    check("triton", "diagonal", 1, 5, 9)
    check("triton", "block", 1, 3, 5, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 16, 17, 33, 64])
def test_triton_kernel_at_every_size_of_matrix(size):
    check("triton", "dense", 2, 3, size)
    check("triton", "dense", 1, 19, size, dtype=torch.float32, tolerance=1e-5)


@pytest.mark.parametrize("batch, time, groups, size", [(2, 7, 2, 3), (1, 7, 4, 3), (2, 7, 1, 5)])
def test_triton_kernel_over_chunks_of_several_sequences_and_groups(batch, time, groups, size):
    from reroll.kernels.linear_scan.triton.dense import cut

    assert cut(batch * groups, time, size, triton_width(size)).chunks > 2
    A, b = random(batch, time, groups, size, size) * 0.5, random(batch, time, groups, size)
    initial = random(batch, groups, size)
    for reverse in (False, True):
        expected = by_hand(A, b, initial, reverse, "dense")
        with using("triton"):
            close(linear_scan(A, b, initial, reverse, structure="dense"), expected)
            out = b.clone()
            scan_into(A, out, out, initial, reverse, structure="dense")
            close(out, expected)
            alike = A[:, :1].expand_as(A)
            close(linear_scan(alike, b, initial, reverse), by_hand(alike, b, initial, reverse, "dense"))


def triton_width(size):
    return 1 << (size - 1).bit_length()


@pytest.mark.parametrize("order", [1, 3, 4])
def test_triton_kernel_takes_larger_blocks_as_matrices(order):
    check("triton", "block", 2, 12, 3, order)


def test_triton_kernel_leaves_what_is_too_large_to_the_reference():
    for structure, sizes in [("dense", (1, 2, 65)), ("block", (1, 2, 2, 65))]:
        A, b, _ = problem(structure, *sizes)
        with using("triton"), pytest.raises(UsageError, match="matrices up to 64×64"):
            linear_scan(A, b, structure=structure)
    given = kalman_problem(True, 1, 2, 33)
    with using("triton", "kalman_scan"), pytest.raises(UsageError, match="states up to 32"):
        kalman_scan(*given)
    from reroll.kernels.linear_scan.triton import dense, dense_kalman

    assert (dense.SIZE, dense_kalman.SIZE) == (64, 32)


def test_blocks_of_any_order_in_the_reference():
    check("odd_even", "block", 2, 9, 3, order=4)
    check("chunked", "block", 2, 9, 3, order=1)


@pytest.mark.parametrize("implementation", ["cpu", "odd_even", "chunked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_permutations_are_followed_exactly(implementation, dtype):
    """The word problem of S₅: products of permutations, which no diagonal recurrence can track."""
    time = 500
    order = torch.stack([torch.randperm(5) for _ in range(2 * time)]).view(2, time, 5)
    A = torch.nn.functional.one_hot(order, 5).to(dtype)  # row i has its 1 in column order[i]
    state, states = torch.arange(1, 6).expand(2, 5), []
    for t in range(time):
        state = state.gather(1, order[:, t])
        states.append(state)
    with using(implementation):
        got = linear_scan(A, torch.zeros(2, time, 5, dtype=dtype), torch.arange(1.0, 6.0, dtype=dtype).expand(2, 5))
    assert torch.equal(got.long(), torch.stack(states, 1))


@pytest.mark.parametrize("implementation", ["cpu", "odd_even", "chunked"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_identity_and_zero_transitions(implementation, structure):
    A, b, initial = problem(structure, 2, 33, 3)
    operator = operators.AFFINE[structure]
    identity = operator.identity((A, b))[0]
    with using(implementation):
        close(linear_scan(identity, b, initial, structure=structure), b.cumsum(1) + initial.unsqueeze(1))
        assert torch.equal(linear_scan(0 * A, b, initial, structure=structure), b)


@pytest.mark.parametrize(
    "structure, sizes", [("diagonal", (20, 400, 90)), ("block", (9, 500, 20)), ("dense", (9, 300, 6))]
)
def test_result_does_not_depend_on_threads_or_on_the_rest_of_the_batch(structure, sizes):
    A, b, initial = problem(structure, *sizes, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear_scan(A, b, initial, structure=structure))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[0][4:5], linear_scan(A[4:5], b[4:5], initial[4:5], structure=structure))


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_half_precision_is_computed_in_float32_and_rounded_once(dtype, tolerance):
    A, b, initial = problem("diagonal", 2, 50, 5, dtype=dtype)
    got = linear_scan(A, b, initial)
    assert got.dtype == dtype
    exact = by_hand(A.double(), b.double(), initial.double(), False, "diagonal")
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1e-5)


# ---- memory


def strided(tensor):
    """The same numbers, elsewhere in memory: views with gaps, other orders of axes, and expanded axes are all legal."""
    yield tensor.mT.contiguous().mT
    yield tensor.transpose(0, 1).contiguous().transpose(0, 1)
    yield torch.stack([tensor, -tensor], 0)[0]
    yield torch.stack([tensor, -tensor], -1)[..., 0]
    yield torch.cat([tensor, -tensor], 1)[:, : tensor.shape[1]]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_do_not_matter(implementation, structure):
    A, b, initial = problem(structure, 2, 4, 2)
    with using(implementation):
        for reverse in (False, True):
            expected = by_hand(A, b, initial, reverse, structure)
            for other_A, other_b in zip(strided(A), strided(b)):
                close(linear_scan(other_A, other_b, initial, reverse, structure=structure), expected)
            for start in (initial.flip(0).flip(0), torch.stack([initial, initial], -1)[..., 0]):
                close(linear_scan(A, b, start, reverse, structure=structure), expected)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("implementation", ["cpu", "odd_even"])
def test_what_is_equal_everywhere_can_be_expanded(implementation, structure):
    A, b, initial = problem(structure, 3, 7, 5)
    with using(implementation):
        for some in (A[:1], A[:, :1], A[:1, :1], A[:1, :1, :1]):
            many = some.expand_as(A)
            close(
                linear_scan(many, b, initial, structure=structure),
                by_hand(many, b, initial, False, structure),
            )
        start = initial[:1].expand_as(initial)
        close(linear_scan(A, b[:, :1].expand_as(b), start, structure=structure),
              by_hand(A, b[:, :1].expand_as(b), start, False, structure))  # fmt: skip


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("channels", [3, 20])
def test_states_can_be_written_over_b(implementation, structure, channels):
    if implementation == "triton" and channels > 3:
        pytest.skip("slow in the interpreter; 3 channels write over the same buffers")
    A, b, initial = problem(structure, 2, 7, channels)
    for reverse in (False, True):
        for start in (None, initial):
            out = b.clone()
            with using(implementation):
                scan_into(A, out, out, start, reverse, structure=structure)
            close(out, by_hand(A, b, start, reverse, structure))


def test_arguments_are_left_alone():
    A, b, initial = problem("dense", 2, 9, 3)
    copies = [tensor.clone() for tensor in (A, b, initial)]
    for implementation in ("cpu", "odd_even", "chunked"):
        with using(implementation):
            linear_scan(A, b, initial)
            linear_scan(A, b, reverse=True)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((A, b, initial), copies))


def test_axes_beyond_the_usual():
    A, b, initial = random(2, 5, 3, 4), random(2, 5, 3, 4), random(2, 3, 4)
    close(linear_scan(A, b, initial), by_hand(A, b, initial, False, "diagonal"))
    close(linear_scan(A[..., 0, 0], b[..., 0, 0], initial[..., 0, 0])[..., None],
          by_hand(A[..., 0, :1], b[..., 0, :1], initial[..., 0, :1], False, "diagonal"))  # fmt: skip
    A, b, initial = random(2, 5, 3, 4, 4) / 2, random(2, 5, 3, 4), random(2, 3, 4)
    close(linear_scan(A, b, initial, reverse=True), by_hand(A, b, initial, True, "dense"))
    A, b, initial = random(2, 5, 2, 2, 3, 4) / 2, random(2, 5, 2, 3, 4), random(2, 2, 3, 4)
    close(linear_scan(A, b, initial), by_hand(A, b, initial, False, "block"))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0), (2, 0, 3)])
def test_nothing_to_scan(shape):
    b = torch.zeros(shape, requires_grad=True)
    A = torch.zeros(shape, requires_grad=True)
    initial = torch.zeros(shape[0], shape[2], requires_grad=True)
    got = linear_scan(A, b, initial)
    assert got.shape == shape
    gradients = torch.autograd.grad(got.sum(), (A, b, initial))
    assert [g.shape for g in gradients] == [A.shape, b.shape, initial.shape]
    assert not any(g.count_nonzero() for g in gradients)
    assert kalman_scan(A, b, b, 1.0).mean.shape == shape


# ---- gradients


@pytest.mark.parametrize("with_initial", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_and_their_gradients(structure, reverse, with_initial):
    for time in (1, 3):
        tensors = problem(structure, 2, time, 2)[: 3 if with_initial else 2]
        arguments = [tensor.requires_grad_() for tensor in tensors]

        def scan(A, b, initial=None):
            return linear_scan(A, b, initial, reverse, structure=structure)

        assert torch.autograd.gradcheck(scan, arguments)
        assert torch.autograd.gradgradcheck(scan, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_equal_those_of_the_loop(structure, implementation):
    for reverse in (False, True):
        arguments = [tensor.requires_grad_() for tensor in problem(structure, 2, 9, 3)]
        weights = random(*arguments[1].shape)
        expected = torch.autograd.grad((by_hand(*arguments, reverse, structure) * weights).sum(), arguments)
        with using(implementation):
            got = torch.autograd.grad(
                (linear_scan(*arguments, reverse, structure=structure) * weights).sum(), arguments
            )
        for a, b in zip(got, expected):
            close(a, b)


def test_gradients_reach_whoever_asks_and_nobody_else(monkeypatch):
    A, b, initial = problem("dense", 2, 9, 3)
    weights = random(2, 9, 3)
    full = [tensor.clone().requires_grad_() for tensor in (A, b, initial)]
    expected = torch.autograd.grad((by_hand(*full, False, "dense") * weights).sum(), full)
    for asked in range(3):
        arguments = [tensor.clone().requires_grad_(i == asked) for i, tensor in enumerate((A, b, initial))]
        with monkeypatch.context() as patch:
            if asked:  # the derivative in A is the costly one, and must not be computed for nothing
                patch.setattr(operators.Dense, "outer", lambda *_: pytest.fail("the derivative in A was computed"))
            (linear_scan(*arguments) * weights).sum().backward()
        assert [argument.grad is not None for argument in arguments] == [i == asked for i in range(3)]
        close(arguments[asked].grad, expected[asked])


def test_gradient_of_a_sum_whose_gradient_is_expanded():
    arguments = [tensor.requires_grad_() for tensor in problem("diagonal", 2, 5, 4)]
    got = torch.autograd.grad(linear_scan(*arguments).sum(), arguments)
    expected = torch.autograd.grad(by_hand(*arguments, False, "diagonal").sum(), arguments)
    for a, b in zip(got, expected):
        close(a, b)


def test_half_precision_gradients_have_the_dtype_of_their_tensors():
    arguments = [tensor.requires_grad_() for tensor in problem("block", 2, 5, 4, dtype=torch.bfloat16)]
    gradients = torch.autograd.grad(linear_scan(*arguments).sum(), arguments)
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16] * 3


@pytest.mark.parametrize("structure", STRUCTURES)
def test_functional_transforms(structure):
    A, b, _ = problem(structure, 3 * 2, 5, 2)
    initial = problem(structure, 2, 5, 2)[2]
    copies = [tensor.unflatten(0, (3, 2)) for tensor in (A, b)]

    def scan(A, b):
        return linear_scan(A, b, initial, structure=structure)

    mapped = torch.func.vmap(scan)(*copies)
    looped = [by_hand(A, b, initial, False, structure) for A, b in zip(*copies)]
    close(mapped, torch.stack(looped))

    def loss(A, b):
        return scan(A, b).square().sum()

    per_copy = torch.func.vmap(torch.func.grad(loss))(*copies)
    for k, A in enumerate(copies[0]):
        A = A.clone().requires_grad_()
        (expected,) = torch.autograd.grad(by_hand(A, copies[1][k], initial, False, structure).square().sum(), A)
        close(per_copy[k], expected)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does just that
def test_it_can_stand_in_a_compiled_graph():
    arguments = [tensor.requires_grad_() for tensor in problem("block", 2, 5, 3)]

    @torch.compile(backend="eager", fullgraph=True)
    def compiled(A, b, initial):
        return linear_scan(2 * A, b, initial) + 1

    A, b, initial = arguments
    expected = by_hand(2 * A, b, initial, False, "block") + 1
    close(compiled(*arguments), expected)
    weights = random(*expected.shape)
    got = torch.autograd.grad((compiled(*arguments) * weights).sum(), arguments)
    for x, y in zip(got, torch.autograd.grad((expected * weights).sum(), arguments)):
        close(x, y)


# ---- operators


def kalman_steps(operator, count, size):
    A = random(1, count, size) if operator is operators.SCALAR_KALMAN else random(1, count, size, size) / 2
    return elements(operator, A, random(1, count, size), random(1, count, size), torch.full((1,), 0.7).double())


def steps_of(name, count=3, size=3):
    if name in STRUCTURES:
        A, b, initial = problem(name, 1, count, size)
        return operators.AFFINE[name], (A, b), (initial.unsqueeze(1),)
    operator = operators.SCALAR_KALMAN if name == "scalar Kalman" else operators.DENSE_KALMAN
    given = kalman_steps(operator, count, size)
    return operator, given, (random(1, 1, size), torch.zeros_like(given[2][:, :1]))


@pytest.mark.parametrize("name", [*STRUCTURES, "scalar Kalman", "dense Kalman"])
def test_operators_are_associative_and_have_an_identity(name):
    operator, steps, state = steps_of(name)
    a, b, c = (tuple(part[:, t : t + 1] for part in steps) for t in range(3))
    left = operator.combine(operator.combine(a, b), c)
    right = operator.combine(a, operator.combine(b, c))
    nothing = operator.identity(a)
    for x, y in [
        (left, right),
        (operator.combine(nothing, a), a),
        (operator.combine(a, nothing), a),
        (operator.apply(nothing, state), state),
        (operator.apply(operator.combine(a, b), state), operator.apply(b, operator.apply(a, state))),
    ]:
        for p, q in zip(x, y):
            close(p, q, 1e-14)


# ---- Kalman


def filter_by_hand(A, b, observed, variance, initial):
    """The textbook filter: gain by an inverse, one step after another, matrices throughout."""
    batch, time, size = b.shape
    eye = torch.eye(size, dtype=b.dtype)
    noise = torch.as_tensor(variance, dtype=b.dtype).expand(batch).view(-1, 1, 1) * eye
    A = torch.diag_embed(A) if A.dim() == 3 else A
    P = torch.zeros(batch, size, size, dtype=b.dtype)
    m, means, covariances = initial, [], []
    for t in range(time):
        p = b[:, t] if m is None else torch.einsum("bij,bj->bi", A[:, t], m) + b[:, t]
        Q = A[:, t] @ P @ A[:, t].mT + eye
        gain = Q @ torch.linalg.inv(Q + noise)
        m = p + torch.einsum("bij,bj->bi", gain, observed[:, t] - p)
        P = (eye - gain) @ Q
        means.append(m)
        covariances.append(P)
    return torch.stack(means, 1), torch.stack(covariances, 1)


def kalman_problem(dense, batch, time, size):
    A, b, initial = problem("dense" if dense else "diagonal", batch, time, size)
    return A, b, random(batch, time, size), torch.rand(batch, dtype=torch.float64) * 5 + 0.1, initial


@pytest.mark.parametrize("time", [1, 2, 3, 31, 32, 33, 1000])
@pytest.mark.parametrize("implementation", ["cpu", "odd_even", "chunked"])
def test_filters_equal_the_textbook(implementation, time):
    for dense in (False, True):
        A, b, observed, variance, initial = kalman_problem(dense, 2, time, 3)
        for start in (None, initial):
            mean, covariance = filter_by_hand(A, b, observed, variance, start)
            with using(implementation, "kalman_scan"):
                got = kalman_scan(A, b, observed, variance, start, keep_variance=True)
                alone = kalman_scan(A, b, observed, variance, start)
            close(got.mean, mean)
            close(got.variance if dense else torch.diag_embed(got.variance), covariance)
            assert alone.variance is None
            assert torch.equal(alone.mean, got.mean)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("batch, time, size", [(2, 1, 1), (2, 2, 3), (1, 13, 3), (1, 17, 1), (1, 3, 9), (1, 2, 17)])
def test_triton_filter_equals_the_textbook(batch, time, size, dense):
    A, b, observed, variance, initial = kalman_problem(dense, batch, time, size)
    for start in (None, initial):
        mean, covariance = filter_by_hand(A, b, observed, variance, start)
        with using("triton", "kalman_scan"):
            got = kalman_scan(A, b, observed, variance, start, keep_variance=True)
            alone = kalman_scan(A, b, observed, variance, start)
        close(got.mean, mean)
        close(got.variance if dense else torch.diag_embed(got.variance), covariance)
        assert torch.equal(alone.mean, got.mean)


@pytest.mark.parametrize("variance", [1e-6, 1e8])
def test_triton_filter_of_a_whole_state_in_float32(variance):
    A, b, observed, _, initial = kalman_problem(True, 2, 9, 5)
    mean, covariance = filter_by_hand(A, b, observed, variance, initial)
    with using("triton", "kalman_scan"):
        given = (tensor.float() for tensor in (A, b, observed))
        got = kalman_scan(*given, variance, initial.float(), keep_variance=True)
    close(got.mean.double(), mean, 1e-5)
    close(got.variance.double() / variance, covariance / variance, 1e-5)


@pytest.mark.parametrize("implementation", ["cpu", "odd_even"])
def test_scalar_filters_are_the_dense_filter_with_diagonal_matrices(implementation):
    A, b, observed, variance, initial = kalman_problem(False, 2, 100, 20)
    with using(implementation, "kalman_scan"):
        scalar = kalman_scan(A, b, observed, variance, initial, keep_variance=True)
        dense = kalman_scan(torch.diag_embed(A), b, observed, variance, initial, keep_variance=True)
    close(dense.mean, scalar.mean)
    close(dense.variance, torch.diag_embed(scalar.variance))


@pytest.mark.parametrize("size", [1, 4, 8, 17, 70])
def test_cpu_filters_at_every_width_in_float32(size):
    A, b, observed, _, initial = kalman_problem(False, 3, 9, size)
    mean, covariance = filter_by_hand(A, b, observed, 2.0, initial)
    got = kalman_scan(A.float(), b.float(), observed.float(), 2.0, initial.float(), keep_variance=True)
    close(got.mean.double(), mean, 1e-5)
    close(torch.diag_embed(got.variance).double(), covariance, 1e-5)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strides_do_not_matter_to_a_filter(implementation, dense):
    A, b, observed, variance, initial = kalman_problem(dense, 2, 5, 3)
    mean, _ = filter_by_hand(A, b, observed, variance, initial)
    with using(implementation, "kalman_scan"):
        for given in zip(strided(A), strided(b), strided(observed)):
            start = torch.stack([initial, initial], -1)[..., 0]
            close(kalman_scan(*given, variance, start).mean, mean)


@pytest.mark.parametrize("dense", [False, True])
def test_a_filter_that_trusts_nothing_observed_is_the_linear_scan(dense):
    A, b, observed, _, initial = kalman_problem(dense, 2, 50, 3)
    close(kalman_scan(A, b, observed, 1e14, initial).mean, linear_scan(A, b, initial), 1e-10)
    close(kalman_scan(A, b, observed, 1e-14, initial).mean, observed, 1e-10)


def test_filter_results_do_not_depend_on_threads():
    for dense in (False, True):
        A, b, observed, variance, initial = kalman_problem(dense, 9, 200, 20 if dense else 200)
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(kalman_scan(A, b, observed, variance, initial, keep_variance=True))
        assert torch.equal(results[0].mean, results[1].mean)
        assert torch.equal(results[0].variance, results[1].variance)


def test_a_filter_on_the_cpu_survives_an_enormous_transition():
    A = torch.tensor([0.5, 1e25, -0.5, 0.5]).view(1, 4, 1)
    observed = torch.ones_like(A)
    got = kalman_scan(A, torch.zeros_like(A), observed, 4.0, torch.ones(1, 1), keep_variance=True)
    assert got.mean.isfinite().all()
    assert torch.equal(got.variance[0, 1], torch.tensor([4.0]))  # the prediction is worthless, the observation is kept


@pytest.mark.parametrize("dense", [False, True])
def test_smoother_solves_the_normal_equations(dense):
    """The minimum of |J s − c|² + |s − y|²/σ², with J the matrix of all steps at once."""
    batch, time, size = 2, 12, 3
    A, b, observed, variance, initial = kalman_problem(dense, batch, time, size)
    got = kalman_smooth(A, b, kalman_scan(A, b, observed, variance, initial, keep_variance=True))
    matrices = A if dense else torch.diag_embed(A)
    for k in range(batch):
        J = torch.eye(time * size, dtype=torch.float64)
        c = b[k].clone()
        c[0] += matrices[k, 0] @ initial[k]
        for t in range(1, time):
            J[t * size : (t + 1) * size, (t - 1) * size : t * size] = -matrices[k, t]
        left = J.T @ J + torch.eye(time * size, dtype=torch.float64) / variance[k]
        right = J.T @ c.flatten() + observed[k].flatten() / variance[k]
        close(got[k].flatten(), torch.linalg.solve(left, right))


# ---- choices and errors


def test_the_choice_is_reported_with_its_reason():
    linear_scan(*problem("diagonal", 1, 3, 2)[:2])
    choice = dispatch.report()["linear_scan"]
    assert choice.name == "cpu"
    assert "diagonal A, float64 on cpu" in choice.reason
    kalman_scan(*problem("diagonal", 1, 3, 2)[:2], random(1, 3, 2), 1.0)
    assert "scalar Kalman filter" in dispatch.report()["kalman_scan"].reason
    with pytest.raises(UsageError, match="matrices up to 64×64: dense A"), using("triton"):
        linear_scan(*problem("dense", 1, 3, 65)[:2])


def test_it_is_public():
    assert reroll.linear_scan is linear_scan


def test_a_structure_that_shapes_cannot_tell_must_be_said():
    A, b = random(2, 3, 4, 4, 4), random(2, 3, 4, 4)
    with pytest.raises(UsageError, match='say structure="block" or structure="dense"'):
        linear_scan(A, b)
    close(linear_scan(A, b, structure="block"), by_hand(A, b, None, False, "block"))
    close(linear_scan(A, b, structure="dense"), by_hand(A, b, None, False, "dense"))


GIVEN, STATE = torch.zeros(2, 5, 3), torch.zeros(2, 3)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((GIVEN[:, :4], GIVEN), {}, "does not fit b of shape (2, 5, 3). Expected diagonal: (2, 5, 3); dense: (2,"),
        ((torch.zeros(2, 5, 3, 4), GIVEN), {}, "dense: (2, 5, 3, 3)"),
        ((GIVEN[:1], GIVEN), {}, "Expand what is shared"),
        ((GIVEN, GIVEN), dict(structure="dense"), "Expected dense: (2, 5, 3, 3)"),
        ((GIVEN, GIVEN), dict(structure="block"), "Expected block: b needs another axis"),
        ((GIVEN, GIVEN), dict(structure="diagnoal"), 'structure="diagnoal" is not known. Did you mean "diagonal"?'),
        ((GIVEN, GIVEN, STATE[:1]), {}, "initial has shape (1, 3); expected (2, 3)"),
        ((GIVEN.double(), GIVEN), {}, "A is float64 (2, 5, 3) on cpu; expected dtype and device of b, float32"),
        ((GIVEN, GIVEN, STATE.half()), {}, "initial is float16 (2, 3) on cpu; expected dtype"),
        ((GIVEN.to("meta"), GIVEN), {}, "A is float32 (2, 5, 3) on meta; expected dtype and device"),
        ((GIVEN.long(), GIVEN.long()), {}, "b is int64 (2, 5, 3) on cpu; expected floating-point numbers"),
        ((STATE[0], STATE[0]), {}, "b is float32 (3,) on cpu; expected"),
    ],
)  # fmt: skip
def test_errors_say_what_was_given_and_what_was_expected(arguments, options, message):
    with pytest.raises(UsageError) as error:
        linear_scan(*arguments, **options)
    assert message in str(error.value)


def test_errors_of_scan_into_and_the_filter():
    with pytest.raises(UsageError, match="out is float64"):
        scan_into(GIVEN, GIVEN, torch.zeros(2, 5, 3, dtype=torch.float64))
    with pytest.raises(UsageError, match="not contiguous"):
        scan_into(GIVEN, GIVEN, torch.zeros(2, 3, 5).mT)
    for arguments, message in [
        ((GIVEN[..., :2], GIVEN, GIVEN, 1.0), "A has shape (2, 5, 2); expected (2, 5, 3) or (2, 5, 3, 3)"),
        ((GIVEN, GIVEN, GIVEN[:, :2], 1.0), "observed has shape (2, 2, 3)"),
        ((GIVEN, GIVEN, GIVEN, torch.ones(5)), "variance has shape (5,); expected () or (2,)"),
        ((GIVEN, GIVEN, GIVEN, 0.0), "variance=0.0 must be positive and finite"),
        ((GIVEN, GIVEN, GIVEN, float("inf")), "variance=inf must be positive and finite"),
        ((GIVEN, GIVEN, GIVEN, torch.tensor([1.0, -2.0])), "variance=-2.0 must be positive and finite"),
        ((GIVEN, GIVEN, GIVEN, torch.tensor(float("nan"))), "variance=nan must be positive and finite"),
        ((GIVEN, GIVEN, GIVEN, torch.ones(2, 1)), "variance has shape (2, 1); expected () or (2,)"),
        ((GIVEN, GIVEN, GIVEN, torch.ones(2).double()), "variance is torch.float64 on cpu; expected torch.float32"),
        ((GIVEN, GIVEN, GIVEN, "1"), "variance='1' must be a number, or a tensor of one per sequence"),
        ((GIVEN, GIVEN, GIVEN.double(), 1.0), "observed is torch.float64"),
        ((GIVEN, GIVEN, GIVEN, 1.0, GIVEN), "initial has shape (2, 5, 3)"),
        ((GIVEN.long(), GIVEN.long(), GIVEN.long(), 1.0), "b is torch.int64"),
    ]:
        with pytest.raises(UsageError) as error:
            kalman_scan(*arguments)
        assert message in str(error.value)
    with pytest.raises(UsageError, match="keep_variance=True"):
        kalman_smooth(GIVEN, GIVEN, kalman_scan(GIVEN, GIVEN, GIVEN, 1.0))


# ---- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_gpu_gives_what_the_cpu_gives(structure):
    for batch, time, channels in [(1, 100_000, 1), (3, 1000, 40), (2, 33, 5), (70, 2000, 8), (1, 1, 1), (2, 0, 3)]:
        arguments = [tensor.requires_grad_() for tensor in problem(structure, batch, time, channels)]
        on_gpu = [tensor.detach().cuda().requires_grad_() for tensor in arguments]
        for reverse in (False, True):
            got, expected = (linear_scan(*a, reverse, structure=structure) for a in (on_gpu, arguments))
            close(got.cpu(), expected)
            pairs = zip(torch.autograd.grad(got.sum(), on_gpu), torch.autograd.grad(expected.sum(), arguments))
            for a, b in pairs:
                close(a.cpu(), b)


@pytest.mark.gpu
@pytest.mark.parametrize("dense", [False, True])
def test_a_gpu_filters_as_the_cpu_does(dense):
    for batch, time, size in [(1, 50_000, 1), (3, 1000, 5), (2, 1, 3)]:
        given = kalman_problem(dense, batch, time, size)
        got = kalman_scan(*(tensor.cuda() for tensor in given), keep_variance=True)
        expected = kalman_scan(*given, keep_variance=True)
        close(got.mean.cpu(), expected.mean, 1e-10)
        close(got.variance.cpu(), expected.variance, 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("real", ["*fp32", "*fp64"])
def test_triton_kernels_compile_for_a_gpu(real, tmp_path):
    """The interpreter accepts more than the compiler; Triton brings its own assembler, so no GPU is needed for this."""
    pytest.importorskip("triton", reason="triton is in the dev extra, for Linux only")
    script = f"""
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from reroll.kernels.linear_scan.triton import affine, dense, dense_kalman, scalar_kalman
tile = dict(BLOCK_T=32, BLOCK_C=32)
flags = [(False, True, False), (True, False, True), (False, False, False)]
both = (True, False)
kernels = [(affine._affine, dict(K=k, REDUCE=r, **tile), 4) for k, r in itertools.product((1, 2), both)]
kernels += [(scalar_kalman._kalman, dict(ELEMENTS=e, REDUCE=r, KEEP=k, **tile), 4) for e, r, k in flags]
sizes = ((1, 1), (8, 8), (64, 16))
kernels += [(dense._dense, dict(REDUCE=r, D=d, N=n), dense.warps(d)) for r in both for d, n in sizes]
kernels += [
    (dense_kalman._filter, dict(REDUCE=r, KEEP=not r, D=d), dense_kalman.warps(d)) for r in both for d in (8, 32)
]
pointers = "A b y eta J precision starts means variances covariances out mean variance covariance".split()
pointers += "composed chunk_A chunk_b chunk_C chunk_eta chunk_J".split()
counts = ("time", "channels", "batch", "chunks", "tiles", "groups", "size", "length", "blocks")
for (function, constants, warps), ones in itertools.product(kernels, both):
    # An argument that is 1 becomes a constant, without a type: tried where nothing else varies.
    if ones and (constants.get("D", 8) != 8 or constants.get("REDUCE")):
        continue
    constants = constants | (dict.fromkeys([n for n in counts if n in function.arg_names], 1) if ones else {{}})
    signature = {{name: "{real}" if name in pointers else "i32" for name in function.arg_names}}
    signature |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=function, signature=signature, constexprs=constants)
    options = dict(enable_fp_fusion=True, num_warps=warps)
    if function is dense._dense:
        options["num_stages"] = dense.stages(constants["D"], {4 if real == "*fp32" else 8})
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= 1 << 16, (function, constants, kernel.metadata.shared)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
