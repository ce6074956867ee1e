"""How many iterations a trajectory takes, and how exact it is then: counts and limits that the literature states."""

import pytest
import torch

from reroll.cells import GRU, MeanField, ParaGRU, cell_from
from reroll.rollout import (
    Dense,
    Diagonal,
    Hutchinson,
    Kalman,
    Newton,
    Sequential,
    deer,
    jacobi,
    lyapunov,
    quasi_deer,
)

PLAIN_JACOBI = jacobi(max_iterations=200, window=None)


@pytest.fixture(scope="module")
def gru():
    """A GRU as torch initialises it, D = 4, and 10,000 steps of input, float64."""
    torch.manual_seed(0)
    cell = cell_from(torch.nn.GRUCell(4, 4), 4).double()
    return cell, torch.randn(1, 10_000, 4, dtype=torch.float64)


@torch.no_grad()
def test_counts_and_errors_in_float64(gru):
    cell, x = gru
    expected = Sequential()(cell, x).states
    known = ((deer(window=None), 1, 6, 1e-12), (quasi_deer(window=None), 6, 20, 1e-8), (PLAIN_JACOBI, 40, 65, 1e-8))
    for rollout, least, most, error in known:
        found = rollout(cell, x)
        assert bool(found.converged.all())
        assert least <= int(found.iterations) <= most
        assert (found.states - expected).abs().max() < error


@pytest.mark.parametrize("window", [None, "auto"])
@torch.no_grad()
def test_counts_in_float32(gru, window):
    cell, x = gru
    single = cell_from(torch.nn.GRUCell(4, 4), 4)
    single.load_state_dict(cell.state_dict())
    expected = Sequential()(cell, x).states
    options = {"rtol": 1e-4, "atol": 1e-4, "window": window}
    for rollout, most in ((deer(**options), 5), (quasi_deer(**options), 10)):
        found = rollout(single, x.float())
        assert bool(found.converged.all())
        assert int(found.iterations) <= most
        assert (found.states - expected).abs().max() < 3e-4


@torch.no_grad()
def test_a_linear_recurrence_takes_one_iteration():
    matrix = torch.randn(5, 5, dtype=torch.float64) * 0.3
    cell = cell_from(lambda u, s: s @ matrix.T + u, 5)
    x = torch.randn(2, 50, 5, dtype=torch.float64)
    assert deer()(cell, x).iterations.tolist() == [1, 1]


@torch.no_grad()
def test_the_word_problem_of_five_letters_is_exact():
    """Products of random permutations of five: a linear recurrence that forgets nothing."""
    swaps = torch.stack([torch.eye(5)[torch.randperm(5)] for _ in range(300)]).double()
    cell = cell_from(lambda u, s: (u.unflatten(-1, (5, 5)) @ s.unsqueeze(-1)).squeeze(-1), 5)
    first = torch.arange(5.0, dtype=torch.float64).unsqueeze(0)
    found = deer()(cell, swaps.flatten(1).unsqueeze(0), first)
    assert int(found.iterations) == 1
    expected = first[0]
    for t, swap in enumerate(swaps):
        expected = swap @ expected
        assert torch.equal(found.states[0, t], expected)


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_a_mean_field_network_needs_more_the_less_it_forgets(seed):
    """Known: 3, 4, 5, 14, 40, 97 at exponents −0.74, −0.28, −0.09, −0.004, … of one network; 32 units vary much."""
    counts, exponents = [], []
    for gain in (0.5, 0.8, 1.0, 1.2, 1.5, 2.0):
        generator = torch.Generator().manual_seed(seed)
        cell = MeanField(32, gain).double()
        weight = torch.randn(32, 32, generator=generator, dtype=torch.float64) * gain / 32**0.5
        cell.weight.copy_(weight.fill_diagonal_(0.0))
        x, first = torch.zeros(1, 300, 32).double(), torch.randn(1, 32, generator=generator, dtype=torch.float64)
        options = {"window": None, "rtol": 0.0, "atol": 1e-5, "max_iterations": 301}
        counts.append(int(Newton(Dense(), **options)(cell, x, first).iterations))
        exponents.append(float(lyapunov(cell, x, first)))
        if gain <= 1.0 and exponents[-1] < -0.05:
            assert counts[-1] <= 6
        if gain <= 0.8:  # its diagonal is zero, so quasi-DEER is Jacobi
            quasi = Newton(Diagonal(), **options)(cell, x, first)
            assert torch.equal(quasi.iterations, jacobi(**options)(cell, x, first).iterations)
    assert counts == sorted(counts)
    assert exponents[:3] == sorted(exponents[:3])
    assert exponents[1] < -0.1
    assert min(counts[4:]) >= 30


def lorenz(u, s):
    """Lorenz-63 by an Euler step of 0.01; where an input is given, it takes the place of y (an observer)."""
    x, y, z = s.unbind(-1)
    seen = torch.where(u[:, 0] == 0, y, u[:, 0])
    return s + 0.01 * torch.stack([10 * (seen - x), x * (28 - z) - seen, x * seen - 8 / 3 * z], -1)


@torch.no_grad()
def test_a_chaotic_system_takes_up_to_as_many_iterations_as_steps():
    cell, first = cell_from(lorenz, 3), torch.ones(1, 3, dtype=torch.float64)
    x = torch.zeros(1, 1000, 1, dtype=torch.float64)
    found = Newton(Dense(), window=None, max_iterations=1000)(cell, x, first)
    assert bool(found.converged.all())
    assert 200 < int(found.iterations) <= 1000
    assert (found.states - Sequential()(cell, x, first).states).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", [Dense(), Diagonal()])
@torch.no_grad()
def test_an_observer_of_it_takes_a_handful(kind):
    cell, first = cell_from(lorenz, 3), torch.ones(1, 3, dtype=torch.float64)
    free = Sequential()(cell, torch.zeros(1, 30_000, 1, dtype=torch.float64), first).states
    seen = torch.cat([first.unsqueeze(1), free[:, :-1]], 1)[..., 1:2]
    found = Newton(kind, window=None)(cell, seen)  # from another state
    assert bool(found.converged.all())
    assert int(found.iterations) <= 5
    torch.testing.assert_close(found.states, Sequential()(cell, seen).states, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.states[:, -1, ::2], free[:, -1, ::2], rtol=0, atol=1e-6)  # x and z; y is given


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_huge_weights_blow_up_on_the_way_and_not_in_the_end(seed):
    torch.manual_seed(seed)
    cell = GRU(2, 2)
    for p in cell.parameters():
        p.mul_(100)
    x = torch.randn(2, 100, 2) * 0.01
    found = deer(max_iterations=101, guess="zeros", window=None)(cell, x)
    expected = Sequential(kernel="reference")(cell, x)
    assert bool((found.resets > 0).any())
    assert bool(found.converged.all())
    torch.testing.assert_close(found.states, expected.states, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quasi", [False, True])
@torch.no_grad()
def test_a_filter_that_trusts_fully_is_newton(quasi):
    torch.manual_seed(0)
    cell, x = GRU(3, 5).double(), torch.randn(2, 300, 3, dtype=torch.float64)
    kind = Diagonal() if quasi else Dense()
    options = {"window": None, "rtol": 0.0, "atol": 1e-13}
    plain, trusting = Newton(kind, **options)(cell, x), Newton(kind, Kalman(1e12), **options)(cell, x)
    torch.testing.assert_close(trusting.states, plain.states, rtol=0, atol=1e-12)
    assert (trusting.iterations - plain.iterations).abs().max() <= 1  # undamped also waits for a small correction


@torch.no_grad()
def test_numbers_that_are_not_finite_on_the_way_are_counted():
    cell = cell_from(lambda u, s: torch.exp(0.5 * s * s) * 0.1 + u, 2)
    x = torch.randn(3, 80, 2, dtype=torch.float64) * 0.1
    guess = torch.full((3, 80, 2), 60.0, dtype=torch.float64)
    found = quasi_deer(guess=guess, max_iterations=90)(cell, x)
    assert bool((found.resets > 0).all())
    assert bool(found.converged.all())
    torch.testing.assert_close(found.states, Sequential()(cell, x).states, rtol=0, atol=1e-8)


@pytest.mark.parametrize("time", [256, 2048, 16_384])
@torch.no_grad()
def test_a_diagonal_cell_converges_in_four_whatever_the_length(time):
    torch.manual_seed(0)
    cell, x = ParaGRU(8, 16), torch.randn(1, time, 8)
    found = Newton(Diagonal(), window=None, max_iterations=4, rtol=0.0, atol=1e-6)(cell, x)
    assert bool(found.converged.all()), found.residual
    torch.testing.assert_close(found.states, Sequential(kernel="reference")(cell, x).states, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_estimated_diagonal_converges_where_the_exact_one_does():
    torch.manual_seed(0)
    cell, x = GRU(8, 32).double(), torch.randn(1, 400, 8, dtype=torch.float64)
    exact, estimated = (Newton(kind)(cell, x) for kind in (Diagonal(), Hutchinson(4)))
    assert bool(estimated.converged.all())
    assert int(estimated.iterations) < 2 * int(exact.iterations)
