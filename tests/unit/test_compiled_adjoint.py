"""Going back along time in compiled code: the adjoint of a program equals backpropagation in double precision."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional

from reroll.cells import CELLS, DNC, GRU, LSTM, MeanField, cell_from
from reroll.errors import UsageError
from reroll.kernels.program import Builder
from reroll.kernels.program.reverse import reverse
from reroll.rollout import Newton, Sequential, adjoint, auto, deer, native, quasi_deer
from reroll.rollout.problem import make_problem

COMPILED = Sequential(kernel="compiled")
LOOP = Sequential(kernel="reference")


@pytest.fixture
def went_back(monkeypatch):
    """Count the calls that found an adjoint."""
    calls, found = native.adjoint, []

    def counted(*arguments):
        result = calls(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(native, "adjoint", counted)
    return found


def gradients(rollout, cell, inputs, state=None, reset=None):
    """Return ∂ℓ/∂(inputs, initial state, parameters) for a loss that weighs every state differently."""
    inputs = inputs.detach().requires_grad_()
    state = None if state is None else tuple(part.detach().requires_grad_() for part in state)
    given = state if state is None or len(state) > 1 else state[0]
    states = rollout(cell, inputs, given, reset).states
    parts = (states,) if isinstance(states, torch.Tensor) else states
    weights = [torch.linspace(-1, 2, part.numel(), dtype=torch.float64).view(part.shape) for part in parts]
    loss = sum((part * weight.to(part.dtype)).sum() for part, weight in zip(parts, weights))
    return torch.autograd.grad(loss, [inputs, *(state or ()), *cell.parameters()], allow_unused=True)


def agree(got, expected, tolerance=2e-5):
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.isfinite(a).all()
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize("rollout", [COMPILED, quasi_deer(rtol=1e-6, atol=1e-6)])
@pytest.mark.parametrize("kind", [kind for kind in (*CELLS, MeanField) if kind is not DNC])
def test_gradients_of_every_cell_are_those_of_backpropagation(kind, rollout, went_back):
    torch.manual_seed(3)
    cell = kind(3, 6) if kind is not MeanField else MeanField(6, 0.8)
    inputs = torch.randn(5, 70, cell.input_size)
    expected = gradients(LOOP, copy.deepcopy(cell).double(), inputs.double())
    agree(gradients(rollout, cell, inputs), expected)
    assert went_back == [True]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [1, 5, 20, 33])
@pytest.mark.parametrize("kind", [GRU, LSTM])
def test_states_resets_and_windows(kind, batch, threads, went_back, monkeypatch):
    torch.manual_seed(batch)
    torch.set_num_threads(threads)
    monkeypatch.setattr(native, "THREAD_FLOATS", 1 << 10)
    monkeypatch.setattr(native, "FEWEST_FLOATS", 1)
    cell, inputs = kind(3, 7), torch.randn(batch, 61, 3)
    parts = 2 if kind is LSTM else 1
    state = tuple(torch.randn(batch, 7) for _ in range(parts))
    reset = torch.rand(batch, 61) < 0.1
    reset[:, 1], reset[0, -1] = True, True
    doubles = copy.deepcopy(cell).double(), inputs.double(), tuple(part.double() for part in state), reset
    expected = gradients(LOOP, *doubles)
    for floats in (native.ADJOINT_FLOATS, 9 * batch * 50, 1):
        monkeypatch.setattr(native, "ADJOINT_FLOATS", floats)
        agree(gradients(COMPILED, cell, inputs, state, reset), expected)
    assert went_back == [True] * 3


STEPS = {
    "sigmoid": lambda u, s: torch.sigmoid(s + u),
    "tanh": lambda u, s: torch.tanh(1.5 * s - u),
    "relu": lambda u, s: torch.relu(u - 0.5 * s) * 0.9,
    "exp": lambda u, s: torch.exp(-(s * s) - 0.5) + u,
    "log": lambda u, s: torch.log(2 + s * s) * 0.4 + u,
    "sqrt": lambda u, s: torch.sqrt(1 + s * s) * 0.6 - u,
    "sin": lambda u, s: torch.sin(s + u),
    "cos": lambda u, s: torch.cos(s * u),
    "log1p": lambda u, s: torch.log1p(s * s) * 0.4 + u,
    "softplus": lambda u, s: functional.softplus(s - u) * 0.7,
    "silu": lambda u, s: functional.silu(s + u),
    "abs": lambda u, s: (s + u).abs() * 0.8 - 0.3,
    "divide": lambda u, s: s / (2 + s * s) + u / (2.5 + torch.tanh(s)),
    "reciprocal": lambda u, s: (2.5 + torch.tanh(s + u)).reciprocal() - 1 / (3 + torch.sigmoid(s)),
    "from a number": lambda u, s: 0.5 - s * 0.7 + u,
    "twice the same": lambda u, s: (lambda x: x + x - x * x * 0.3)(torch.tanh(0.4 * s + u)),
    "addcmul": lambda u, s: torch.addcmul(u, torch.tanh(s), torch.sigmoid(s)),
    "parts": lambda u, s: torch.cat([s.chunk(2, -1)[1] * 0.5, torch.tanh(s[..., 1:3])], -1) + u,
    "some features only": lambda u, s: torch.cat([torch.tanh(s[..., :2]), s[..., :2] * 0.3], -1) + u,
    "broadcast": lambda u, s: torch.tanh(s[..., :1] * s + u),
    "roll": lambda u, s: torch.tanh(s.roll(1, -1) - 0.5 * s.flip(-1) + u),
    "heads": lambda u, s: torch.tanh(s.unflatten(-1, (2, 2)) * s[..., :2].unsqueeze(-2)).flatten(-2) + u,
    "a copy": lambda u, s: s.clone().contiguous() * 0.9 + u,
    "no state": lambda u, s: torch.tanh(u) + s * 0.0,
}


@pytest.mark.parametrize("name", STEPS)
def test_every_operation_is_differentiated(name, went_back):
    torch.manual_seed(5)
    cell, inputs = cell_from(STEPS[name], 4), torch.randn(3, 100, 4)
    start = (torch.randn(3, 4),)
    expected = gradients(LOOP, cell, inputs.double(), (start[0].double(),))
    agree(gradients(COMPILED, cell, inputs, start), expected)
    assert went_back == [True]


def test_a_product_is_differentiated_by_its_transpose(went_back):
    torch.manual_seed(6)
    first, second = nn.Linear(5, 9), nn.Linear(9, 5, bias=False)
    both = nn.ModuleList([first, second])
    inputs = torch.randn(4, 80, 5)

    def built(both):
        return cell_from(lambda u, s: torch.tanh(both[1](torch.tanh(both[0](s)))) + u, 5, module=both)

    expected = gradients(LOOP, built(copy.deepcopy(both).double()), inputs.double())
    agree(gradients(COMPILED, built(both), inputs), expected)
    assert went_back == [True]


def test_slopes_where_a_function_has_a_kink_are_those_of_torch():
    for function in (functional.softplus, torch.relu, torch.abs, functional.silu):
        zero = torch.zeros(1, 300, 4)  # every argument of the function is exactly 0
        cell = cell_from(lambda u, s, function=function: function(s * u) + 0.25 * s, 4)
        start = (torch.zeros(1, 4),)
        got, expected = (gradients(rollout, cell, zero, start) for rollout in (COMPILED, LOOP))
        agree(got, [tensor.double() for tensor in expected])


def test_registers_of_a_program_are_differentiated_alone():
    torch.manual_seed(0)
    rows, size = 70, 5
    x, u, g = torch.randn(size, rows), torch.randn(size, rows), torch.randn(2 * size, rows)
    builder = Builder()
    given, other, cotangent = builder.input(x), builder.input(u), builder.input(g)
    y = builder.emit("tanh", size, builder.emit("mul", size, given, other))
    chosen = builder.adjacent([y + 4, y, y, given + 1, y + 2])
    z = builder.emit("add", size, chosen, builder.emit("mul", size, y, given))
    back = reverse(builder, [(y, size), (z, size)], [cotangent, cotangent + size], (given, size))
    out = torch.empty(size, rows)
    builder.finish([(back, size)]).run(out)

    def function(x):
        y = torch.tanh(x * u.double())
        return torch.cat([y, torch.stack([y[4], y[0], y[0], x[1], y[2]]) + y * x])

    leaf = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf, g.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert reverse(builder, [(other, size)], [cotangent], (given, size)) is None
    assert reverse(builder, [(builder.emit("sign", size, given), size)], [cotangent], (given, size)) is None


def test_what_a_program_cannot_do_goes_back_in_torch(went_back):
    cell = cell_from(lambda u, s: torch.tanh(functional.layer_norm(s + u, (4,))), 4)
    inputs = torch.randn(3, 100, 4)
    rollout = Newton()
    agree(gradients(rollout, cell, inputs), gradients(LOOP, cell, inputs.double()), 1e-3)
    assert went_back == [False]


def test_the_named_methods_stay_what_they_are(went_back):
    cell, inputs = GRU(3, 6), torch.randn(4, 90, 3)
    problem = make_problem(cell, inputs, None, None)
    with torch.no_grad():
        states = native.step_by_step(problem)
        weights = torch.randn(states.shape)
        found = {method: adjoint.adjoint(problem, states, weights, method) for method in adjoint.METHODS}
    assert went_back == [True, True]  # "auto" and "sequential"
    for tensor in found.values():
        torch.testing.assert_close(tensor, found["dense"], rtol=1e-4, atol=1e-5)


def test_a_reset_stops_what_is_not_finite_too():
    """exp of the state before a reset overflows; nothing comes from there, and nothing may go back there."""
    cell, inputs = cell_from(lambda u, s: 0.1 * torch.exp(s) + u, 4), torch.zeros(3, 150, 4)
    inputs[:, 50] = 100.0
    reset = torch.zeros(3, 150, dtype=torch.bool)
    reset[:, 51] = True

    def gradient(rollout):
        leaf = inputs.clone().requires_grad_()
        states = rollout(cell, leaf, None, reset).states
        loss = states[:, :40].sum() + states[:, 100:].square().sum()
        return torch.autograd.grad(loss, leaf)[0]

    expected = gradient(LOOP)
    assert expected.isfinite().all()
    for rollout in (COMPILED, auto(), *(quasi_deer(adjoint=method) for method in adjoint.METHODS)):
        torch.testing.assert_close(gradient(rollout), expected, rtol=1e-4, atol=1e-6)


class Reversed(torch.autograd.Function):
    """The identity with a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return -0.5 * g


def without_gradient(u, s):
    with torch.no_grad():
        gate = torch.sigmoid(s)
    return gate * 0.9 * torch.tanh(s + u)


OWN = {
    "no_grad": without_gradient,
    "a backward of its own": lambda u, s: torch.tanh(0.5 * Reversed.apply(s) + u),
    "detach": lambda u, s: torch.sigmoid(s).detach() * 0.9 * torch.tanh(s + u),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OWN)
def test_a_derivative_that_is_not_that_of_the_operations_is_torchs(name, dtype):
    torch.manual_seed(1)
    inputs = torch.randn(3, 300, 4, dtype=dtype)
    for rollout in (COMPILED, auto(), *(quasi_deer(adjoint=method) for method in adjoint.METHODS), deer()):
        cell = cell_from(OWN[name], 4)
        agree(gradients(rollout, cell, inputs), gradients(LOOP, cell_from(OWN[name], 4), inputs.double()), 1e-3)
        torch.testing.assert_close(rollout(cell, inputs).states, LOOP(cell, inputs).states, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rollout", [COMPILED, auto(), quasi_deer(), deer()])
@pytest.mark.parametrize("loss", [lambda states: states.sum(), lambda states: states.square().sum()])
def test_second_derivatives_are_refused(rollout, loss):
    weight = torch.full((4,), 0.5, requires_grad=True)
    cell = cell_from(lambda u, s: torch.tanh(weight * s + u), 4, module=nn.ParameterList([weight]))
    states = rollout(cell, torch.randn(3, 300, 4)).states
    with pytest.raises(UsageError, match="second derivative"):
        torch.autograd.grad(loss(states), weight, create_graph=True)
    states = rollout(cell, torch.randn(3, 300, 4)).states
    with pytest.raises(UsageError, match="second derivative"):
        loss(states).backward(create_graph=True)


@pytest.mark.parametrize("rollout", [COMPILED, quasi_deer()])
def test_inputs_and_weights_changed_before_the_way_back_are_noticed(rollout):
    for change in (lambda inputs, weight: inputs.zero_(), lambda inputs, weight: weight.zero_()):
        weight = torch.full((4,), 0.5, requires_grad=True)
        cell = cell_from(
            lambda u, s, weight=weight: torch.tanh(s + weight) * 0.7 + u, 4, module=nn.ParameterList([weight])
        )
        inputs = torch.randn(3, 300, 4)
        loss = rollout(cell, inputs).states.square().sum()
        with torch.no_grad():
            change(inputs, weight)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, at the first dual tensor
def test_forward_mode_derivatives_go_through_a_loop_or_are_refused():
    cell, inputs = GRU(3, 5).requires_grad_(False), torch.randn(2, 300, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs, torch.ones_like(inputs))
        expected = forward_ad.unpack_dual(LOOP(cell, dual).states).tangent
        assert torch.equal(forward_ad.unpack_dual(auto()(cell, dual).states).tangent, expected)
        for rollout in (COMPILED, quasi_deer()):
            with pytest.raises(UsageError, match="forward-mode"):
                rollout(cell, dual)


def test_auto_takes_no_sequences_and_looks_at_the_state_it_is_given():
    cell = GRU(3, 5).requires_grad_(False)
    assert auto()(cell, torch.zeros(0, 300, 3)).states.shape == (0, 300, 5)
    one, wide = torch.zeros(1, 300, 3), torch.zeros(1, 5, requires_grad=True)
    assert auto().choose(cell, one) == quasi_deer()
    assert auto().choose(cell, one, wide) == COMPILED
