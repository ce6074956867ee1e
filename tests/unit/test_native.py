"""Recurrences in compiled code: the loop and Newton's windows give what `Sequential` gives, or hand over and say so."""

import gc
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from reroll import Outcome
from reroll.cells import CELLS, DNC, GRU, LSTM, RNN, Cell, MeanField, cell_from
from reroll.errors import UsageError
from reroll.rollout import (
    Block,
    Dense,
    Diagonal,
    Newton,
    Sequential,
    auto,
    deer,
    jacobi,
    native,
    picard,
    problem,
    quasi_deer,
)
from reroll.rollout.monitor import monitoring
from reroll.rollout.problem import make_problem

TIGHT = {"rtol": 1e-6, "atol": 1e-6}
COMPILED = Sequential(kernel="compiled")
LOOP = Sequential(kernel="reference")
SMALL = Newton(Diagonal(), window=3, **TIGHT)
ROLLOUTS = {
    "compiled": COMPILED, "quasi_deer": quasi_deer(**TIGHT), "deer": deer(**TIGHT), "jacobi": jacobi(**TIGHT),
    "short windows": SMALL, "one window": quasi_deer(window=None, **TIGHT),
}  # fmt: skip


@pytest.fixture
def natively(monkeypatch):
    """Count what compiled code solved: (steps asked for, steps solved)."""
    solved = []
    newton, step_by_step = native.newton, native.step_by_step

    def counted(given, *others):
        found = newton(given, *others)
        solved.append((given.shape[1], 0 if found is None else found[0].shape[1]))
        return found

    def looped(given):
        found = step_by_step(given)
        solved.append((given.shape[1], 0 if found is None else found.shape[1]))
        return found

    monkeypatch.setattr(native, "newton", counted)
    monkeypatch.setattr(native, "step_by_step", looped)
    return solved


def flat(states):
    return states if isinstance(states, torch.Tensor) else torch.cat(tuple(states), -1)


def case(kind, batch, time, size=6, features=3):
    torch.manual_seed(batch * time)
    cell = kind(features, size) if kind is not MeanField else MeanField(size, 0.8)
    inputs = torch.randn(batch, time, cell.input_size)
    return cell, inputs


@pytest.mark.parametrize("kind", [kind for kind in (*CELLS, MeanField) if kind is not DNC])
@pytest.mark.parametrize("name", ROLLOUTS)
@torch.no_grad()
def test_every_cell_by_every_way_equals_the_loop_in_double_precision(kind, name, natively):
    cell, x = case(kind, 5, 211)
    found = ROLLOUTS[name](cell, x)
    truth = LOOP(cell.double(), x.double())
    torch.testing.assert_close(flat(found.states).double(), flat(truth.states), rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(flat(found.final).double(), flat(truth.final), rtol=2e-5, atol=2e-5)
    assert found.outcome is Outcome.ok
    assert bool(found.converged.all())
    assert natively == [(211, 211)]


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 8, 16, 17, 33, 70])
@pytest.mark.parametrize("name", ROLLOUTS)
@pytest.mark.parametrize("threads", [1, 2, 3])
@torch.no_grad()
def test_any_number_of_sequences_and_threads(batch, name, threads, natively):
    cell, x = case(GRU, batch, 4099 // batch + 300, size=5)
    torch.set_num_threads(threads)
    found = ROLLOUTS[name](cell, x).states
    torch.testing.assert_close(found, LOOP(cell, x).states, rtol=2e-5, atol=2e-5)
    assert natively[0][0] == natively[0][1]


@pytest.mark.parametrize("batch", [1, 5, 20])
@pytest.mark.parametrize("name", ROLLOUTS)
@pytest.mark.parametrize("kind", [GRU, LSTM])
@torch.no_grad()
def test_a_given_state_and_resets(batch, name, kind, natively):
    cell, x = case(kind, batch, 400)
    generator = torch.Generator().manual_seed(1)
    reset = torch.rand(batch, 400, generator=generator) < 0.05
    reset[0, :2] = True
    state = cell.init_state((batch,))
    state = type(state)(*(p + 0.3 for p in state)) if kind is LSTM else state + 0.3
    found, truth = ROLLOUTS[name](cell, x, state, reset), LOOP(cell, x, state, reset)
    torch.testing.assert_close(flat(found.states), flat(truth.states), rtol=2e-5, atol=2e-5)
    assert natively == [(400, 400)]


@torch.no_grad()
def test_blocks_of_an_lstm_take_fewer_iterations_than_its_diagonal():
    cell, x = case(LSTM, 3, 500)
    found = {name: Newton(kind, **TIGHT)(cell, x) for name, kind in (("block", Block()), ("diagonal", Diagonal()))}
    truth = flat(LOOP(cell, x).states)
    for trajectory in found.values():
        torch.testing.assert_close(flat(trajectory.states), truth, rtol=2e-5, atol=2e-5)
    assert found["block"].iterations.max() < found["diagonal"].iterations.max()


@pytest.mark.parametrize("make", [quasi_deer, deer, jacobi, picard])
@pytest.mark.parametrize("often", [0, 0.1])
@torch.no_grad()
def test_compiled_windows_take_as_many_iterations_as_those_in_torch(monkeypatch, make, often):
    cell, x = case(GRU, 4, 400)
    reset = torch.rand(4, 400) < often
    for rollout in (make(window=80, max_iterations=82), make(window=400, max_iterations=402)):
        here = rollout(cell, x, reset=reset)
        with monkeypatch.context() as patch:
            patch.setattr(native, "newton", lambda *given: None)
            there = rollout(cell, x, reset=reset)
        # One window ends at rounding error, where a bit decides.
        assert int((here.iterations - there.iterations).abs().max()) <= 1
        assert bool(here.converged.all())
        torch.testing.assert_close(here.states, there.states, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_the_residual_is_that_of_the_states():
    cell, x = case(GRU, 4, 400)
    found = jacobi(rtol=1e-3, atol=1e-3, window=400)(cell, x)
    before = torch.cat([torch.zeros(4, 1, 6), found.states[:, :-1]], 1)
    truth = (cell.step(cell.project(x), before) - found.states).abs().amax((1, 2))
    assert float(truth.min()) > 1e-6
    torch.testing.assert_close(found.residual, truth, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("batch", [2, 4, 16])
@torch.no_grad()
def test_a_sequence_that_has_converged_does_not_move(batch):
    torch.set_num_threads(1)
    cell, x = case(GRU, batch, 800)
    near = LOOP(cell, x).states
    loose = jacobi(rtol=1e-3, atol=1e-3, window=50, guess=near + 0.01)
    mixed = near + 0.01
    mixed[1:] += 1.0
    together, apart = loose(cell, x), Newton(loose.linearise, guess=mixed, window=50, rtol=1e-3, atol=1e-3)(cell, x)
    assert together.iterations[0] < apart.iterations[1]
    assert torch.equal(together.states[0], apart.states[0])


@torch.no_grad()
def test_a_warm_start_is_used():
    cell, x = case(GRU, 4, 400)
    exact = LOOP(cell, x).states
    assert int(quasi_deer(guess=exact)(cell, x).iterations.max()) <= 1
    with monitoring(guesses=[exact]):
        assert int(quasi_deer()(cell, x).iterations.max()) <= 1
    assert int(quasi_deer()(cell, x).iterations.max()) > 3


class Exploding(Cell):
    """Grows past all bounds where the input is one, from step 200 on."""

    input_size = output_size = 4

    def init_state(self, batch_shape):
        return torch.zeros(*batch_shape, 4)

    def step(self, u, state):
        return 0.5 * state + 0.1 + u * state * state


@torch.no_grad()
def test_what_is_not_finite_is_handed_over_with_the_steps_before_it(natively):
    cell, x = Exploding(), torch.zeros(3, 600, 4)
    x[1, 200:] = 3.0
    found, truth = quasi_deer()(cell, x).states, LOOP(cell, x).states
    asked, solved = natively[0]
    assert (asked, 0 < solved <= 210) == (600, True)
    assert torch.equal(found[[0, 2]].isfinite(), truth[[0, 2]].isfinite())
    torch.testing.assert_close(found[[0, 2]], truth[[0, 2]], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(found[1, :200], truth[1, :200], rtol=2e-5, atol=2e-5)
    trajectory = quasi_deer()(cell, x)
    assert trajectory.converged.tolist() == [True, False, True]
    assert trajectory.outcome is Outcome.fell_back


@torch.no_grad()
def test_what_another_thread_solved_beyond_a_hand_over_is_not_counted(monkeypatch):
    monkeypatch.setattr(native, "THREAD_FLOATS", 1 << 10)
    monkeypatch.setattr(native, "FEWEST_FLOATS", 1)
    torch.set_num_threads(2)
    cell, x = Exploding(), torch.zeros(2, 600, 4)
    x[0, 100:] = 3.0
    x[1, 400:] = 0.5  # takes more iterations here, long after the other sequence has ended
    options = (Diagonal(), None, 50, (1e-6, 1e-6), lambda window: 100)
    _, found = native.newton(make_problem(cell, x, None, None).piece(), *options)
    assert 100 <= found.steps < 200
    alone = native.newton(make_problem(cell, x[1:, : found.steps], None, None).piece(), *options)[1]
    far = native.newton(make_problem(cell, x[1:], None, None).piece(), *options)[1]
    assert far.iterations[0] > alone.iterations[0] == found.iterations[1]
    assert found.residual[1] == alone.residual[0]


@torch.no_grad()
def test_too_few_iterations_fall_back_to_the_loop():
    cell, x = case(GRU, 3, 500)
    found = quasi_deer(max_iterations=2)(cell, x)
    assert found.outcome is Outcome.fell_back
    assert not bool(found.converged.any())
    torch.testing.assert_close(found.states, LOOP(cell, x).states, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_tolerance_is_kept():
    cell, x = case(GRU, 16, 1000)
    truth = LOOP(cell.double(), x.double()).states
    cell.float()
    errors = [float((quasi_deer(rtol=t, atol=t)(cell, x).states - truth).abs().max()) for t in (1e-2, 1e-4, 1e-6)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert [error <= 20 * t for error, t in zip(errors, (1e-2, 1e-4, 1e-6))] == [True] * 3


@pytest.mark.parametrize("name", ["compiled", "quasi_deer"])
def test_gradients_are_those_of_backpropagation(name):
    cell, x = case(GRU, 5, 300)
    x.requires_grad_()
    state = torch.randn(5, 6, requires_grad=True)

    def gradients(rollout):
        states = rollout(cell, x, state).states
        weights = torch.linspace(-1, 1, states.numel()).view_as(states)
        return torch.autograd.grad((states * weights).sum(), [x, state, *cell.parameters()])

    for found, truth in zip(gradients(ROLLOUTS[name]), gradients(LOOP)):
        assert float((found - truth).norm() / truth.norm()) < 1e-5


@torch.no_grad()
def test_rows_lie_as_they_say():
    rows = native.Rows((3, 2), 4)
    x = torch.randn(5, 4, 6)
    turned = rows.pack(x)
    assert turned.is_contiguous()
    for group, (first, count) in enumerate(zip(rows.firsts, rows.counts)):
        for t in range(4):
            for b in range(count):
                assert torch.equal(turned[:, first + t * count + b], x[3 * group + b, t])
    assert torch.equal(rows.unpack(turned, 1, 3), x[:, 1:3])


def written_by_hand(module):
    def step(u, s):
        r, z = (functional.linear(u, module.weight_ih) + functional.linear(s, module.weight_hh)).sigmoid().chunk(2, -1)
        return z * s + (1 - z) * torch.tanh(u + r * s)

    return cell_from(step, 4, module=module)


class Weights(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight_ih, self.weight_hh = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 4) / 2)


@torch.no_grad()
def test_weights_are_those_of_the_call():
    module = Weights()
    cell, x = written_by_hand(module), torch.randn(3, 700, 4)
    before = COMPILED(cell, x).states
    module.weight_hh.mul_(-1)
    for rollout in (COMPILED, quasi_deer(), auto()):
        torch.testing.assert_close(rollout(cell, x).states, LOOP(cell, x).states, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, COMPILED(cell, x).states, atol=1e-2)


@torch.no_grad()
def test_readouts_of_a_compiled_loop():
    cell, x = case(LSTM, 3, 300)
    (outputs, final), (truth, last) = COMPILED.read(cell, x), LOOP.read(cell, x)
    torch.testing.assert_close(outputs, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(flat(final), flat(last), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_cannot_be_compiled_is_looped_over():
    other = cell_from(lambda u, s: torch.tanh(torch.cumsum(u + s, -1)), 4)
    for cell, x in ((other, torch.randn(2, 600, 4)), (GRU(4, 4).double(), torch.randn(2, 600, 4).double())):
        assert torch.equal(COMPILED(cell, x).states, LOOP(cell, x).states)
        assert auto().choose(cell, x) == deer()
        assert auto().choose(cell, x.repeat(3, 1, 1)) == Sequential()
    assert native.examine(cell_from(lambda u, s: s + 1, 4), torch.zeros(2, 300, 4)) == (4, True)
    assert native.examine(other, torch.zeros(2, 300, 4)) == (4, False)


def test_a_step_that_draws_numbers_is_refused():
    cell = cell_from(lambda u, s: s + torch.rand_like(s), 4)
    with pytest.raises(UsageError, match="different results"):
        COMPILED(cell, torch.zeros(2, 600, 4))


def test_an_unknown_kernel_is_named():
    with pytest.raises(UsageError, match='kernel="fast"'):
        Sequential(kernel="fast")


@pytest.mark.parametrize(
    "cell, shape, expected",
    [
        (RNN(8, 8), (16, 100), "sequential"),
        (RNN(8, 8), (16, 1000), "compiled"),
        (RNN(8, 8), (1, 1000), "quasi_deer"),
        (RNN(8, 100), (1, 1000), "compiled"),
        (RNN(8, 200), (1, 1000), "sequential"),
        (RNN(8, 200), (5, 1000), "compiled"),
        (RNN(8, 300), (5, 1000), "sequential"),
    ],
)
@torch.no_grad()
def test_auto_goes_by_the_sizes(cell, shape, expected):
    kinds = {"sequential": Sequential(), "compiled": COMPILED, "quasi_deer": quasi_deer()}
    assert auto().choose(cell, torch.zeros(*shape, 8)) == kinds[expected]


def test_auto_goes_by_the_gradient_and_by_kernels_for_whole_sequences():
    x, wide = torch.zeros(16, 1000, 8), RNN(8, 128)
    assert auto().choose(wide, x) == COMPILED
    assert auto().choose(wide, x, fused=True) == COMPILED
    assert auto().choose(wide, x.expand(2, 16, 1000, 8).flatten(0, 1)) == Sequential()  # 32 × 128 numbers of state
    assert auto().choose(GRU(8, 8), x[:1]) == COMPILED  # not in windows
    with torch.no_grad():
        assert auto().choose(LSTM(8, 8), x[:1], fused=True) == COMPILED  # 16 numbers: torch's kernel has more overhead
        assert auto().choose(LSTM(8, 16), x[:1], fused=True) == Sequential()
        assert auto().choose(wide, x) == COMPILED
        assert auto().choose(wide, x, fused=True) == Sequential()
        assert auto().choose(GRU(8, 8), x, fused=True) == COMPILED
        assert auto().choose(LSTM(8, 8), x, fused=True) == Sequential()
        assert auto().choose(LSTM(8, 8), x) == COMPILED
        assert auto().read(LSTM(8, 8), x)[0].shape == (16, 1000, 8)


@torch.no_grad()
def test_programs_read_the_inputs_of_a_problem():
    cell, x = case(GRU, 5, 300)
    prepared = native.prepare(make_problem(cell, x, None, None).piece(), 1, "diagonal")
    assert sum(prepared.rows.counts) == 5
    assert prepared.step.inputs[1].data_ptr() == prepared.whole.inputs[1].data_ptr()


# ---- steps that a program must not get wrong


def in_place(u, s):
    h = 0.5 * torch.tanh(s + u)
    kept = h
    h *= 0.5
    return h + kept


STEPS = {
    "softplus with a threshold": lambda u, s: 0.5 * functional.softplus(s, threshold=0.5) + u,
    "softplus with a factor": lambda u, s: 0.5 * functional.softplus(s, beta=2.0) + u,
    "softplus far below zero": lambda u, s: 1e6 * functional.softplus(-15 + 0.1 * torch.tanh(s)) + 0.1 * u,
    "an operation in place": in_place,
    "a constant with an axis for rows": lambda u, s: torch.tanh(s * torch.linspace(-1, 1, 4).view(1, 4) + u),
    "an empty slice": lambda u, s: torch.cat([torch.tanh(s[..., 4:]), 0.5 * s], -1) + u,
    "an infinite slope at the start": lambda u, s: 0.5 * torch.sqrt(s) + u * u,
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("rollout", [COMPILED, quasi_deer(**TIGHT), deer(**TIGHT), jacobi(**TIGHT), auto()])
@torch.no_grad()
def test_steps_with_traps(name, rollout):
    torch.manual_seed(2)
    cell, x = cell_from(STEPS[name], 4), torch.randn(5, 300, 4)
    torch.testing.assert_close(rollout(cell, x).states, LOOP(cell, x).states, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_an_infinite_slope_at_the_start_stays_in_compiled_code(natively):
    cell, x = cell_from(STEPS["an infinite slope at the start"], 4), torch.randn(5, 300, 4)
    quasi_deer()(cell, x)
    assert natively == [(300, 300)]


class Scalar(Cell):
    input_size = output_size = 1

    def init_state(self, batch_shape):
        return torch.zeros(*batch_shape)

    def step(self, u, state):
        return torch.tanh(0.5 * state + u[..., 0])


@pytest.mark.parametrize("rollout", [COMPILED, quasi_deer(), deer(), jacobi(), auto()])
@torch.no_grad()
def test_a_state_that_is_one_number(rollout):
    x = torch.randn(3, 1200, 1)
    torch.testing.assert_close(rollout(Scalar(), x).states, LOOP(Scalar(), x).states, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rollout", [COMPILED, quasi_deer(), auto()])
def test_autocast_changes_nothing_inside_a_solver(rollout):
    cell, x = case(GRU, 4, 300)
    with torch.autocast("cpu", torch.bfloat16):
        states = rollout(cell, x.bfloat16()).states
        (rounded,) = torch.autograd.grad(states.square().sum(), cell.weight_hh, retain_graph=True)
    (gradient,) = torch.autograd.grad(states.square().sum(), cell.weight_hh)
    exact = LOOP(cell, x.bfloat16().float()).states
    (truth,) = torch.autograd.grad(exact.square().sum(), cell.weight_hh)
    torch.testing.assert_close(states, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, truth, rtol=1e-3, atol=1e-3)
    # torch's own backward of a product is rounded where it is called inside.
    assert float((rounded - truth).norm() / truth.norm()) < 0.02


def test_what_auto_finds_out_in_one_call_is_not_held_against_the_next():
    from reroll import CentralDifference, Key, Recurrent

    cell, x = GRU(8, 8), torch.randn(16, 400, 8)
    model = Recurrent(cell, inputs=8, rollout=auto())
    loss_fn = lambda model, x: model(x).square().mean()
    CentralDifference(2, 0.01)(model, loss_fn, x, Key(0))
    with torch.no_grad():
        assert auto().choose(cell, x) == COMPILED
    small = Recurrent(GRU(3, 4), inputs=3)
    estimate = CentralDifference(2, 0.01, evaluate="batched")(small, loss_fn, torch.randn(2, 500, 3), Key(0))
    assert estimate.outcome is Outcome.ok
    with torch.no_grad(), native.dispatch.mapped():
        assert auto().choose(small.cells[0], torch.randn(2, 500, 3)) == Sequential()


@torch.no_grad()
def test_auto_loops_over_what_others_refuse():
    x = torch.zeros(3, 600, 4)
    bias = torch.randn(3, 4)
    mixes = cell_from(lambda u, s: torch.tanh(s + u - s.mean(0, keepdim=True)), 4)
    for cell in (cell_from(lambda u, s: torch.tanh(s + bias), 4), mixes):
        assert auto().choose(cell, x) == Sequential()
    wide = cell_from(lambda u, s: torch.tanh(torch.cumsum(s, -1) / 200 + u), 200)
    assert auto().choose(wide, x[:1, :, :1]) == Sequential()


@torch.no_grad()
def test_auto_draws_no_random_numbers():
    class Noisy(GRU):
        def project(self, inputs):
            return super().project(functional.dropout(inputs, 0.5))

    cell, x = Noisy(3, 200).train(), torch.randn(2, 300, 3)
    before = torch.get_rng_state()
    auto().choose(cell, x)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_a_linearisation_of_ones_own_is_called():
    called = []

    class Own(Diagonal):
        def __call__(self, *given):
            called.append(True)
            return super().__call__(*given)

    cell, x = case(GRU, 3, 300)
    torch.testing.assert_close(Newton(Own())(cell, x).states, LOOP(cell, x).states, rtol=1e-4, atol=1e-4)
    assert called


@pytest.mark.parametrize("rollout", [quasi_deer(), Newton(Dense(), window=16), Sequential(kernel="compiled")])
def test_nothing_is_kept_after_a_call(rollout):
    cell, x = GRU(3, 4), torch.randn(2, 500, 3)
    rollout(cell, x)
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        with torch.no_grad():
            rollout(cell, x)
        assert sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()) == before
    finally:
        gc.enable()


@pytest.mark.parametrize("rollout", [quasi_deer(window=7, rtol=1e-6, atol=1e-6), Sequential(kernel="compiled")])
@pytest.mark.parametrize("gradient", [False, True])
def test_pieces_of_a_long_sequence_are_those_of_the_whole(rollout, gradient, monkeypatch):
    cell, x = LSTM(3, 4), torch.randn(3, 331, 3)
    reset = torch.rand(3, 331) < 0.02
    guess = torch.randn(3, 331, 8)
    with torch.set_grad_enabled(gradient):
        for options in ({}, {"guess": guess}):
            if options and not isinstance(rollout, Newton):
                continue
            way = replace(rollout, **options)
            whole = way(cell, x, reset=reset)
            monkeypatch.setattr(problem, "PIECE_FLOATS", 3 * 35 * 60)
            found = way(cell, x, reset=reset)
            monkeypatch.undo()
            # Equal where vectors are as long; other processors may cut them otherwise.
            torch.testing.assert_close(found.states.h, whole.states.h, rtol=0, atol=1e-5)
            torch.testing.assert_close(found.final.c, whole.final.c, rtol=0, atol=1e-5)
            assert torch.equal(found.final.h, found.states.h[:, -1])
            assert (found.iterations - whole.iterations).abs().max() <= 1


def test_a_failure_in_one_piece_is_one_of_the_whole(monkeypatch):
    monkeypatch.setattr(problem, "PIECE_FLOATS", 2 * 19 * 50)
    cell, x = GRU(3, 4), torch.randn(2, 300, 3)
    x[1, 200, 0] = torch.nan
    found = quasi_deer()(cell, x)
    assert found.converged.tolist() == [True, False]
    expected = Sequential(kernel="reference")(cell, x).states
    torch.testing.assert_close(found.states, expected, rtol=0, atol=1e-4, equal_nan=True)


@pytest.mark.slow
def test_memory_is_bounded_by_the_window_and_sixteen_numbers_a_state():
    from reroll.bench.rollouts import cpu

    assert cpu.memory(quasi_deer(window=None), 5000) <= 16
    shorter, longer = cpu.memory(quasi_deer(), 8_000), cpu.memory(quasi_deer(), 20_000)
    assert max(shorter, longer) <= 16
    # Above the states themselves it does not grow with the length.
    assert (longer - 1) * 20_000 < 1.3 * (shorter - 1) * 8_000


class Smoothing(GRU):
    """A projection that looks back along time: not of every step by itself."""

    def project(self, inputs):
        return super().project(inputs.cumsum(1) / inputs.shape[1])


class Dropping(GRU):
    def project(self, inputs):
        return functional.dropout(super().project(inputs), 0.3)


@pytest.mark.parametrize("kind", [Smoothing, Dropping])
@pytest.mark.parametrize("rollout", [quasi_deer(), Sequential(kernel="compiled")])
@torch.no_grad()
def test_a_projection_of_ones_own_sees_the_whole_sequence_once(kind, rollout, monkeypatch):
    monkeypatch.setattr(problem, "PIECE_FLOATS", 2 * 23 * 180)
    cell, x = kind(3, 4), torch.randn(2, 300, 3)
    for _ in range(2):  # also the first time, when the step is tried
        torch.manual_seed(1)
        expected = Sequential(kernel="reference")(cell, x).states
        torch.manual_seed(1)
        torch.testing.assert_close(rollout(cell, x).states, expected, rtol=0, atol=1e-4)
    assert not cell.projects_stepwise
    assert GRU(3, 4).projects_stepwise
