"""Every rollout computes the trajectory of the loop, and its gradient, for every cell."""

import pytest
import torch
from torch import nn

from reroll.cells import ARGRU, CELLS, DNC, LSTM, RNN, Lorenz96, MeanField, TwoWell, cell_from
from reroll.cells.layout import Layout
from reroll.errors import RunError, UsageError
from reroll.outcome import Outcome
from reroll.rollout import (
    ROLLOUTS,
    Block,
    Clip,
    Dense,
    Diagonal,
    Hutchinson,
    Kalman,
    Newton,
    Scale,
    Sequential,
    jacobi,
    quasi_deer,
)  # fmt: skip
from reroll.rollout.agreement import verify_agreement

TIGHT = {"rtol": 1e-12, "atol": 1e-12, "max_iterations": 300}
MORE = {
    "block": Newton(Block(2), **TIGHT),
    "hutchinson": Newton(Hutchinson(4), **TIGHT),
    "scale": Newton(Diagonal(), Scale(0.1), **TIGHT),
    "clip": Newton(Diagonal(), Clip(0.9), **TIGHT),
    "stale": Newton(Diagonal(every=3), **TIGHT),
    "smoother": Newton(Dense(), Kalman(1e3, smoother=True), **TIGHT),
    "quasi smoother": Newton(Diagonal(), Kalman(1e3, smoother=True), **TIGHT),
    "adaptive": Newton(Diagonal(), Kalman(1e2, adaptive=True), **TIGHT),
    "windows": quasi_deer(window=17, **TIGHT),
    "zeros": quasi_deer(guess="zeros", **TIGHT),
    "s0": quasi_deer(guess="s0", **TIGHT),
    "splitting": quasi_deer(adjoint="splitting", **TIGHT),
    "one by one": quasi_deer(adjoint="sequential", **TIGHT),
}


def tightened(rollout):
    if not isinstance(rollout, Newton):
        return rollout
    options = {name: getattr(rollout, name) for name in ("linearise", "damping")}
    return Newton(**options, **TIGHT)


def contractive(kind):
    torch.manual_seed(5)
    cell = DNC(3, 4, word_size=2, memory_size=3) if kind is DNC else LSTM(3, 4, heads=2) if kind is LSTM else kind(3, 4)
    cell = cell.double()
    with torch.no_grad():
        for p in cell.parameters():
            p.mul_(0.6)
    return cell


ALL = {
    f"{i} {type(r).__name__} {getattr(getattr(r, 'linearise', None), 'kind', '')}": r for i, r in enumerate(ROLLOUTS)
}


@pytest.mark.parametrize("name", [*ALL, *MORE])
@pytest.mark.parametrize("kind", [kind for kind in CELLS if kind is not DNC])
def test_values_and_gradients_are_those_of_the_loop(name, kind):
    borders = (len(name) + len(kind.__name__)) % 2  # every rollout and every cell with and without
    rollout = tightened(ALL[name]) if name in ALL else MORE[name]
    cell, inputs = contractive(kind), torch.randn(3, 37, 3, dtype=torch.float64)
    reset = torch.rand(3, 37) < 0.06 if borders else None
    agreement = verify_agreement(rollout, cell, inputs, reset=reset, tolerance=1e-10)
    assert agreement.ok, str(agreement)
    if getattr(getattr(rollout, "linearise", None), "kind", "") != "identity":
        assert bool(agreement.trajectory.converged.all())


OTHERS = {
    "DNC": lambda: contractive(DNC),
    "ARGRU": lambda: ARGRU().double(),
    "MeanField": lambda: MeanField(5, 0.7).double(),
    "TwoWell": lambda: TwoWell().double(),
    "Lorenz96": lambda: Lorenz96(5, forcing=0.5, dt=0.05),
    "GRUCell": lambda: cell_from(nn.GRUCell(3, 4), 4).double(),
    "LSTMCell": lambda: cell_from(nn.LSTMCell(3, 4), 4).double(),
    "RNNCell": lambda: cell_from(nn.RNNCell(3, 4, nonlinearity="relu"), 4).double(),
}
"""Cells that are no layer of this library: without structure, from physics, of torch."""


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("other", OTHERS)
def test_other_cells_agree_over_two_hundred_steps(name, other):
    torch.manual_seed(7)
    cell = OTHERS[other]()
    x = torch.randn(2, 23 if other == "DNC" else 200, cell.input_size, dtype=torch.float64)
    first = Layout.of(cell.init_state((2,)))
    state = first.unpack(0.3 * torch.randn(2, first.size, dtype=torch.float64))
    agreement = verify_agreement(tightened(ALL[name]), cell, x, state, tolerance=1e-10)
    assert agreement.ok, str(agreement)
    if name.startswith(("2", "3", "4", "5")):
        assert bool(agreement.trajectory.converged.all())


@pytest.mark.parametrize("adjoint", ["dense", "splitting", "sequential"])
def test_gradcheck(adjoint):
    torch.manual_seed(5)
    cell = RNN(3, 3).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    s = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[1, 3] = True
    rollout = quasi_deer(adjoint=adjoint, **TIGHT)
    assert torch.autograd.gradcheck(lambda x, s: rollout(cell, x, s, reset).states, (x, s))
    assert torch.autograd.gradcheck(lambda x, s: rollout(cell, x, s).final, (x, s))
    names, weights = zip(*((name, p.detach().clone().requires_grad_()) for name, p in cell.named_parameters()))

    def states(*given):
        return torch.func.functional_call(Unrolled(cell, rollout), dict(zip((f"cell.{n}" for n in names), given)), (x,))

    assert torch.autograd.gradcheck(states, weights)


class Unrolled(nn.Module):
    """A cell under a rollout, as a module, so that its weights can be substituted."""

    def __init__(self, cell, rollout):
        super().__init__()
        self.cell, self.rollout = cell, rollout

    def forward(self, x):
        return self.rollout(self.cell, x.detach()).states


@pytest.mark.parametrize("adjoint", ["dense", "splitting", "sequential"])
def test_the_gradient_does_not_know_what_linearisation_found_the_states(adjoint):
    cell = contractive(LSTM)
    x = torch.randn(2, 40, 3, dtype=torch.float64)
    found = []
    for kind in (Dense(), Diagonal()):
        states = Newton(kind, adjoint=adjoint, **TIGHT)(cell, x).states
        found.append(torch.autograd.grad(states.h.square().sum() + states.c.sum(), list(cell.parameters())))
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_the_initial_state_gets_its_gradient():
    cell = contractive(LSTM)
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    grads = []
    for rollout in (Sequential(kernel="reference"), quasi_deer(**TIGHT)):
        final = rollout(cell, x).final
        grads.append(torch.autograd.grad(final.h.sum() + final.c.square().sum(), [cell.h0, cell.c0]))
    for a, b in zip(*grads):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_second_derivatives_are_refused():
    cell = contractive(RNN)
    x = torch.randn(1, 5, 3, dtype=torch.float64, requires_grad=True)
    states = quasi_deer(**TIGHT)(cell, x).states
    with pytest.raises(UsageError, match="second derivative"):
        torch.autograd.grad(states.square().sum(), x, create_graph=True)


def test_a_sequence_does_not_depend_on_its_batch():
    """One that needs few iterations beside those that need many; and each alone."""
    torch.manual_seed(3)
    weight = torch.randn(4, 4, dtype=torch.float64) * 0.4
    cell = cell_from(lambda u, s: torch.tanh(s @ weight * (1 + u[:, :1]) + u), 4)
    x = torch.randn(5, 80, 4, dtype=torch.float64) * 0.3
    x[2, :, 0] = 2.0
    together = quasi_deer(**TIGHT)(cell, x)
    assert together.iterations[2] < 0.7 * together.iterations[[0, 1, 3, 4]].min()
    for i in range(5):
        alone = quasi_deer(**TIGHT)(cell, x[i : i + 1])
        assert alone.iterations[0] == together.iterations[i]
        torch.testing.assert_close(alone.states[0], together.states[i], rtol=0, atol=1e-14)


@pytest.mark.parametrize("rollout", [quasi_deer(max_iterations=12), Newton(Dense(), max_iterations=6), jacobi()])
@torch.no_grad()
def test_a_stiff_sequence_fails_alone(rollout):
    """One that cannot converge beside those that do: only it is told of, and the others stay as they were."""
    torch.manual_seed(3)
    weight = torch.randn(4, 4, dtype=torch.float64)
    cell = cell_from(lambda u, s: torch.tanh(s @ weight * u[:, :1] + u[:, 1:]), 4)
    x = torch.randn(4, 150, 5, dtype=torch.float64) * 0.3
    x[:, :, 0] = torch.tensor([0.1, 4.0, 0.05, 0.1], dtype=torch.float64).unsqueeze(1)
    found, expected = rollout(cell, x), Sequential()(cell, x).states
    assert found.converged.tolist() == [True, False, True, True]
    assert found.residual[1] > 1e-3
    assert bool((found.residual[[0, 2, 3]] < 1e-7).all())
    torch.testing.assert_close(found.states[1], expected[1], rtol=0, atol=1e-12)
    for i in (0, 2, 3):
        alone = rollout(cell, x[i : i + 1])
        torch.testing.assert_close(alone.states[0], found.states[i], rtol=0, atol=1e-14)
        torch.testing.assert_close(alone.states[0], expected[i], rtol=0, atol=1e-7)


def chaotic():
    torch.manual_seed(0)
    weight = torch.randn(4, 4, dtype=torch.float64) * 2.5
    return cell_from(lambda u, s: torch.tanh(s @ weight + u), 4), torch.randn(3, 60, 4, dtype=torch.float64) * 0.1


@pytest.mark.parametrize("name", ["Dense", "Diagonal", "Identity", "Zero", "Scale", "Clip", "windows"])
def test_after_as_many_iterations_as_steps_the_trajectory_is_exact(name):
    from reroll.rollout import deer, picard

    cell, x = chaotic()
    exact = {"rtol": 1e-15, "atol": 1e-15, "max_iterations": x.shape[1]}
    rollout = {
        "Dense": deer(**exact), "Diagonal": quasi_deer(**exact), "Zero": jacobi(**exact), "Identity": picard(**exact),
        "Scale": Newton(Diagonal(), Scale(0.3), **exact), "Clip": Newton(Diagonal(), Clip(0.5), **exact),
        "windows": quasi_deer(window=20, **exact),
    }[name]  # fmt: skip
    found = rollout(cell, x)
    expected = Sequential()(cell, x)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.states, expected.states, rtol=0, atol=1e-12)


@pytest.mark.parametrize("window", [None, 20])
def test_what_does_not_converge_is_evaluated_step_by_step_and_said(window):
    cell, x = chaotic()
    found = quasi_deer(max_iterations=3, window=window)(cell, x)
    assert found.outcome is Outcome.fell_back
    assert not found.converged.any()
    assert bool((found.residual > 1e-3).all())
    torch.testing.assert_close(found.states, Sequential()(cell, x).states, rtol=0, atol=1e-12)
    with pytest.warns(UserWarning, match="3 of 3 sequences did not converge in 3 iterations") as caught:
        quasi_deer(max_iterations=3, on_failure="warn", window=window)(cell, x)
    assert {warning.filename for warning in caught} == {__file__}
    with pytest.raises(RunError, match=r"did not converge in 3 iterations .largest residual .*Raise max_iterations"):
        quasi_deer(max_iterations=3, on_failure="raise", window=window)(cell, x)


def test_a_failed_sequence_has_the_exact_gradient_too():
    cell, x = chaotic()
    agreement = verify_agreement(quasi_deer(max_iterations=3), cell, x[:, :20], tolerance=1e-8)
    assert agreement.ok, str(agreement)


@pytest.mark.parametrize("time", [1, 2, 3])
def test_short_sequences(time):
    x = torch.randn(2, time, 3, dtype=torch.float64)
    for rollout in ROLLOUTS:
        agreement = verify_agreement(tightened(rollout), contractive(LSTM), x, tolerance=1e-9)
        assert agreement.ok, str(agreement)


def test_no_steps_at_all():
    cell = contractive(LSTM)
    state = cell.init_state((2,))
    for rollout in ROLLOUTS:
        found = rollout(cell, torch.zeros(2, 0, 3, dtype=torch.float64))
        assert found.states.h.shape == (2, 0, 4)
        assert torch.equal(found.final.c, state.c)
        assert found.outcome is Outcome.ok


def test_a_warm_start_needs_fewer_iterations():
    cell, x = contractive(RNN), torch.randn(2, 50, 3, dtype=torch.float64)
    cold = quasi_deer(**TIGHT)(cell, x)
    warm = quasi_deer(guess=cold.states.detach(), **TIGHT)(cell, x + 1e-7)
    assert warm.iterations.max() < cold.iterations.min() / 2 + 1
    with pytest.raises(UsageError, match=r"guess has shape \(2, 50, 4\); expected states"):
        quasi_deer(guess=cold.states.detach())(cell, x[:1])


def test_bad_input():
    cell = contractive(RNN)
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    with pytest.raises(UsageError, match=r"inputs has shape \(5, 3\); expected a tensor \[batch, time, features\]"):
        quasi_deer()(cell, x[0])
    with pytest.raises(UsageError, match="state is \\[3, 4\\]; RNN takes \\[2, 4\\]"):
        quasi_deer()(cell, x, torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(UsageError, match="reset has shape"):
        quasi_deer()(cell, x, reset=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(UsageError, match="state has dtype int64; only a floating-point state"):
        quasi_deer()(cell_from(lambda u, s: s, 4), x[..., :1], torch.zeros(2, 4, dtype=torch.int64))
    noisy = cell_from(lambda u, s: s + torch.rand_like(s), 3)
    with pytest.raises(UsageError, match="FunctionCell.step gives different results for the same arguments"):
        quasi_deer()(noisy, x)
    before = torch.random.get_rng_state()
    with pytest.raises(UsageError, match="different results"):
        quasi_deer()(noisy, x)
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(UsageError, match="FunctionCell.step changes its arguments in place"):
        quasi_deer()(cell_from(lambda u, s: s.mul_(0.5).add_(u), 3), x)
    with pytest.raises(UsageError, match=r"returns a state \[8, 5\] for a state \[8, 3\]"):
        quasi_deer()(cell_from(lambda u, s: torch.cat([s, u[:, :2]], -1), 3), x)
    with pytest.raises(UsageError, match="Clip takes a diagonal"):
        Newton(Dense(), Clip())(cell, x)
    with pytest.raises(UsageError, match="variance=0 must be"):
        Kalman(0)
    with pytest.raises(UsageError, match="max_iterations=0"):
        quasi_deer(max_iterations=0)
    with pytest.raises(UsageError, match='on_failure="ignore" must be'):
        quasi_deer(on_failure="ignore")


def test_layouts_round_trip():
    state = DNC(3, 4, word_size=2, memory_size=3).init_state((5,))
    layout = Layout.of(state)
    vector = layout.pack(state)
    assert vector.shape == (5, layout.size)
    for a, b in zip(layout.unpack(vector), state):
        assert torch.equal(a, b)
    deep = layout.unpack(vector.view(5, 1, -1).expand(-1, 7, -1))
    assert deep.memory.shape == (5, 7, 3, 2)
