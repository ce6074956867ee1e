"""Probes through a rollout that iterates: coefficients, warm starts, and the solver's tolerance against ε."""

import warnings

import pytest
import torch

from reroll import CDRGE, CentralDifference, Key, Recurrent
from reroll.cells import GRU, cell_from
from reroll.grad.evaluate.warm import TOO_LOOSE, WarmStarts
from reroll.outcome import Outcome
from reroll.rollout import Sequential, jacobi, quasi_deer
from reroll.rollout.monitor import current, monitoring

EPSILON = 1e-3


def squared(model, batch):
    inputs, wanted = batch
    return (model(inputs) - wanted).square().mean((1, 2))


def problem(rollout, seed=0):
    torch.manual_seed(seed)
    model = Recurrent(cell=GRU(3, 6), inputs=3, outputs=2, rollout=rollout).double()
    torch.manual_seed(seed + 100)
    return model, (torch.randn(2, 83, 3, dtype=torch.float64), torch.randn(2, 83, 2, dtype=torch.float64))


def estimate(rollout, seed=0, probes=6, **options):
    model, batch = problem(rollout, seed)
    return CentralDifference(probes=probes, epsilon=EPSILON, **options)(model, squared, batch, Key(seed))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("options", [{}, {"difference": "one_sided"}, {"micro_batch": 1}, {"batch": "split"}])
def test_coefficients_are_the_loops_to_tolerance_over_epsilon(options, seed):
    expected = estimate(Sequential(kernel="reference"), seed, **options)
    for tolerance in (1e-10, 1e-7):
        found = estimate(quasi_deer(rtol=tolerance, atol=tolerance), seed, **options)
        assert found.outcome is Outcome.ok
        apart = (found.gradient.coefficients - expected.gradient.coefficients).abs().max()
        # What is left of a state moves the loss by a few times as much: a mean of squares of errors of about one.
        assert apart <= 3 * tolerance / EPSILON + 1e-6 * expected.gradient.coefficients.abs().max()


def test_a_warm_start_saves_iterations():
    model, batch = problem(quasi_deer())
    with monitoring() as cold:
        squared(model, batch)
    with monitoring() as seen:
        CentralDifference(probes=1, epsilon=EPSILON)(model, squared, batch, Key(0))
    assert seen.calls == 3  # the unperturbed weights and both sides; what is tried again is not seen
    looked = []
    original = type(model.rollout).read

    class Counting(type(model.rollout)):
        def read(self, *arguments):
            with monitoring() as one:
                result = original(self, *arguments)
            looked.append(one.iterations)
            return result

    model.rollout = Counting(**{name: getattr(model.rollout, name) for name in ("linearise", "damping")})
    CentralDifference(probes=3, epsilon=EPSILON)(model, squared, batch, Key(0))
    assert looked[0] == cold.iterations
    assert max(looked[1:7]) < cold.iterations


def test_a_part_is_warm_started_from_its_own_trajectory_alone():
    """Not that of a part that is gone and whose address was used again, nor of one with the same first tensor."""

    class Part:
        def __init__(self, x, wanted):
            self.both = x, wanted

    model, batch = problem(quasi_deer())
    guesses = []

    def loss_fn(model, part):
        guesses.append(current().guesses)
        return squared(model, part.both)

    warm = WarmStarts(loss_fn)
    warm.prepare(model, [Part(*batch)])
    for _ in range(10):
        warm(model, Part(*batch))
    assert not any(map(len, guesses))

    x, wanted = batch
    scale = torch.ones((), dtype=x.dtype)
    warm = WarmStarts(lambda model, part: squared(model, part[1:]) * part[0])
    warm.prepare(model, [(scale, x[:1], wanted[:1]), (scale, x[1:], wanted[1:]), (scale, x[:1], wanted[:1])])
    assert warm.passes == 2


def test_forward_passes_are_counted():
    probes = 6
    assert estimate(Sequential()).stats["forward_passes"] == 2 * probes
    assert estimate(quasi_deer()).stats["forward_passes"] == 2 * probes + 1 + 2
    assert estimate(quasi_deer(), difference="one_sided").stats["forward_passes"] == probes + 1 + 1 + 1


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_the_solvers_error_is_measured_where_it_counts(seed):
    """Two probes of 32 tell how far the solver moves the coefficients, within a factor of eight; tight is tight."""
    exact = estimate(Sequential(kernel="reference"), seed, 32).gradient.coefficients
    for tolerance in (1e-1, 1e-2, 1e-4):
        found = estimate(quasi_deer(rtol=tolerance, atol=tolerance), seed, 32)
        error = (found.gradient.coefficients - exact).square().mean().sqrt() / exact.std(correction=0)
        assert 1 / 8 < found.stats["solver_error"] / float(error) < 8
        assert (found.outcome is Outcome.solver_too_loose) == (found.stats["solver_error"] > TOO_LOOSE)
    assert found.stats["solver_error"] < 0.01


def test_only_some_probes_are_evaluated_again():
    for chunk in (None, 5):
        found = estimate(quasi_deer(), probes=33, chunk=chunk)
        assert found.stats["forward_passes"] == 66 + 1 + 2 * 3


def unsettled():
    """A recurrence that forgets slowly, so that a loose tolerance leaves much over where steps are taken singly."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(0.95 * torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0])
    module = torch.nn.ParameterList([weight])
    return cell_from(lambda u, s: torch.tanh(s @ weight + u), 4, module=module), torch.randn(2, 200, 4).double()


def test_the_optimizer_says_so_too():
    cell, x = unsettled()
    for rollout, loud in ((jacobi(rtol=0.5, atol=0.5), True), (quasi_deer(), False), (Sequential(), False)):
        optimizer = CDRGE(cell.named_parameters(), lr=1e-9, epsilon=1e-4, probes=4)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step(lambda rollout=rollout: rollout(cell, x).states.square().mean())
        assert any("solver_error=" in str(w.message) for w in caught) == loud
        assert ("solver_error" in optimizer.last.stats) == isinstance(rollout, type(quasi_deer()))


def test_a_model_that_falls_back_says_so_unless_it_is_watched():
    model, (x, _) = problem(quasi_deer(max_iterations=1))
    with pytest.warns(UserWarning, match="GRU: Some sequences did not converge") as caught:
        model(x)
    assert caught[0].filename == __file__
    with warnings.catch_warnings(), monitoring() as seen:
        warnings.simplefilter("error")
        model(x)
    assert seen.fell_back == 2


def test_the_error_is_not_said_of_lost_probes_and_not_of_one_probe():
    model, batch = problem(quasi_deer())
    calls = []

    def sometimes_lost(model, batch):
        calls.append(1)
        loss = squared(model, batch)
        return loss * torch.inf if len(calls) == 4 else loss  # of probe 0, which is one of those tried again

    found = CentralDifference(probes=4, epsilon=EPSILON)(model, sometimes_lost, batch, Key(0))
    assert found.outcome is Outcome.some_probes_lost
    assert "solver_error" not in found.stats
    assert 0 <= estimate(quasi_deer(), probes=1).stats["solver_error"] < 1e-3


def test_the_error_is_that_of_the_whole_batch_when_that_is_cut():
    for seed in range(3):
        whole = estimate(quasi_deer(rtol=1e-2, atol=1e-2), seed, 32)
        cut = estimate(quasi_deer(rtol=1e-2, atol=1e-2), seed, 32, micro_batch=1)
        assert cut.stats["solver_error"] == pytest.approx(whole.stats["solver_error"], rel=0.2)


@pytest.mark.parametrize("on_failure", ["raise", "warn", "sequential"])
def test_what_is_tried_again_more_exactly_fails_no_step(on_failure):
    """It converges with so many iterations, and would not at a hundredth of the tolerance."""
    model, batch = problem(jacobi())
    with monitoring() as seen:
        squared(model, batch)
    model.rollout = jacobi(on_failure=on_failure, max_iterations=seen.iterations + 1)
    with warnings.catch_warnings(), monitoring() as seen:
        warnings.simplefilter("error")
        found = CentralDifference(probes=3, epsilon=EPSILON)(model, squared, batch, Key(0))
    assert found.outcome is Outcome.ok
    assert seen.fell_back == 0
