"""Mistakes in the call of a rollout: each is named, with its value and the remedy."""

import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

from reroll import Recurrent
from reroll.cells import GRU, LSTM, Cell, MeanField, cell_from
from reroll.errors import UsageError
from reroll.outcome import Outcome
from reroll.rollout import (
    Sequential,
    auto,
    deer,
    elk,
    jacobi,
    lyapunov,
    predictability,
    quasi_deer,
    quasi_elk,
    verify_agreement,
)


class Mixing(Cell):
    input_size = output_size = 4

    def init_state(self, batch_shape):
        return torch.zeros(*batch_shape, 4)

    def step(self, u, state):
        return torch.tanh(state + u) if float(state.sum()) > 0 else torch.tanh(u - state)


class Averaging(Mixing):
    def step(self, u, state):
        return torch.tanh(state + u - state.mean(0, keepdim=True))


class Nameless(Mixing):
    input_size = None

    def step(self, u, state):
        return torch.tanh(u + 0.5 * state)


class Shared(Nameless):
    input_size = 4

    def init_state(self, batch_shape):
        return torch.zeros(1, 4)


class Counting(Mixing):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def step(self, u, state):
        self.seen += 1
        return torch.tanh(u + 0.5 * state)


class Forgetful(Mixing):
    def step(self, u, state):
        return torch.tanh(u), state


class Normed(Mixing):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def step(self, u, state):
        return torch.tanh(self.norm(state) + u)


class Named(Mixing):
    def init_state(self, batch_shape):
        return {"h": torch.zeros(*batch_shape, 4)}

    def step(self, u, state):
        return {"h": torch.tanh(state["h"] + u)}


X = torch.zeros(2, 9, 3)
LONG = torch.zeros(2, 300, 4)
NOISY = cell_from(lambda u, s: s + torch.rand_like(s), 3)
GROWS = cell_from(lambda u, s: torch.tanh(0.5 * s + u), 1)
NORMED = "Normed.norm is a BatchNorm1d in training.*LayerNorm"
MISTAKES = {
    "whole numbers": (lambda: quasi_deer()(GRU(3, 5), X.long()), r"inputs has dtype int64 .* inputs.to\(torch.float32"),
    "whole numbers in a loop": (lambda: Sequential()(GRU(3, 5), X.long()), r"inputs has dtype int64"),
    "dtype of a loop": (lambda: Sequential()(GRU(3, 5), X.double()), r"float64.*float32.*cell.to\(torch.float64\)"),
    "dtype of a kernel": (lambda: Sequential().read(GRU(3, 5), X.double()), "float64.*float32.*convert"),
    "dtype of a state": (lambda: quasi_deer()(GRU(3, 5), X, torch.zeros(2, 5).double()), "state has dtype float64"),
    "a list for a mask": (lambda: quasi_deer()(GRU(3, 5), X, reset=[1]), "reset is a list; expected a mask"),
    "a mask of a loop": (lambda: Sequential()(GRU(3, 5), X, reset=torch.zeros(2, 9)), "dtype float32.*mask"),
    "half an iteration": (lambda: quasi_deer(max_iterations=2.5), "max_iterations=2.5 must be a whole number"),
    "a word for a window": (lambda: quasi_deer(window="all"), "window='all' must be a whole number"),
    "a word for a tolerance": (lambda: quasi_deer(rtol="1e-3"), "rtol='1e-3' must be zero or a positive number"),
    "no variance": (lambda: elk(variance=None), "variance=None must be greater than zero"),
    "a variance per sequence": (lambda: elk(torch.ones(2)), r"variance is a tensor of shape \(2,\); it must be one"),
    "a module of one argument": (lambda: cell_from(nn.Linear(3, 3), 3), r"step=Linear must take \(input_t, state\)"),
    "a step of one argument": (lambda: cell_from(lambda s: s, 3), r"must take \(input_t, state\)"),
    "a whole network": (lambda: cell_from(nn.GRU(3, 3), 3), "nn.GRU, which runs whole sequences; pass an nn.GRUCell"),
    "half a feature": (lambda: cell_from(lambda u, s: s, 2.5), "state_size=2.5 must be a whole number"),
    "no input size": (lambda: quasi_deer()(Nameless(), LONG), "Nameless sets no input_size"),
    "a buffer": (lambda: quasi_deer()(Counting(), LONG), "Counting.step changes the buffer seen"),
    "a state for one": (lambda: Sequential()(Shared(), LONG), r"init_state\(\(2,\)\) returns \[1, 4\]; .*leading axes"),
    "a state that grows": (lambda: Sequential()(GROWS, LONG), r"returns a state \[2, 4\] for a state \[2, 1\]"),
    "a state that grows, auto": (lambda: auto()(GROWS, LONG[:, :20]), "must keep the type and the shape"),
    "shapes, auto": (lambda: auto()(cell_from(lambda u, s: s + u, 5), LONG), r"input \[2, 4\] and a state \[2, 5\]: "),
    "shapes of a loop": (lambda: Sequential()(cell_from(lambda u, s: s @ u.T, 5), X), r"\[2, 3\] and a state \[2, 5\]"),
    "a step that fails": (lambda: quasi_deer()(cell_from(lambda u, s: s.chunk(2, -1)[2], 3), X), "fails on 8 rows"),
    "a preset not called, tried": (lambda: verify_agreement(quasi_deer, GRU(3, 5), X), r"reroll.quasi_deer\(\)"),
    "an exponent of noise": (lambda: lyapunov(NOISY, X), "different results"),
    "an exponent of nothing": (lambda: lyapunov(GRU(3, 5), X[:0]), r"\(0, 9, 3\); pass a typical batch"),
    "nothing to predict": (lambda: predictability(GRU(3, 5), X[:, :0]), "pass a typical batch"),
    "a torch module": (lambda: quasi_deer()(torch.nn.GRUCell(3, 5), torch.zeros(2, 9, 3)), "GRUCell.*cell_from"),
    "arguments swapped": (lambda: quasi_deer()(torch.zeros(2, 9, 3), GRU(3, 5)), "rollout\\(cell, inputs\\)"),
    "rollout for cell": (lambda: Sequential()(quasi_deer(), torch.zeros(2, 9, 3)), "Newton.*rollout\\(cell, inputs\\)"),
    "a list": (lambda: quasi_deer()(GRU(3, 5), [[1.0]]), "type list"),
    "features": (lambda: quasi_deer()(GRU(3, 5), torch.zeros(2, 9, 4)), r"\(2, 9, 4\); GRU takes \[batch, time, 3\]"),
    "features of a loop": (lambda: Sequential()(GRU(3, 5), torch.zeros(2, 9, 4)), "GRU takes"),
    "dtype": (lambda: quasi_deer()(GRU(3, 5), torch.zeros(2, 9, 3).double()), "float64.*float32.*convert"),
    "state": (lambda: quasi_deer()(GRU(3, 5), X, torch.zeros(2, 6)), r"state is \[2, 6\]; GRU takes \[2, 5\]"),
    "state of a loop": (lambda: Sequential()(LSTM(3, 5), X, torch.zeros(2, 5)), r"LSTM takes \(\[2, 5\], \[2, 5\]\)"),
    "a branch on the batch": (lambda: quasi_deer()(Mixing(), torch.zeros(3, 300, 4)), "mixes sequences"),
    "a mean over the batch": (lambda: quasi_deer()(Averaging(), torch.zeros(3, 300, 4)), "mixes sequences"),
    "a dict": (lambda: Sequential()(Named(), LONG), "Named.init_state returns a dict; .*tuple of tensors"),
    "a dict, solved": (lambda: quasi_deer()(Named(), LONG), "Named.init_state returns a dict; .*tuple of tensors"),
    "no tensor": (lambda: auto()(GRU(3, 5), None), "inputs has type NoneType; expected a tensor"),
    "no tensor, read": (lambda: auto().read(GRU(3, 5), [1.0]), "inputs has type list; expected a tensor"),
    "complex results": (lambda: quasi_deer()(cell_from(lambda u, s: s * (0.5 + 1j) + u, 4), LONG), "complex numbers"),
    "batch norm": (lambda: quasi_deer()(Normed(), LONG), NORMED),
    "batch norm in a loop": (lambda: Sequential()(Normed(), LONG), NORMED),
    "batch norm in a loop, read": (lambda: Sequential().read(Normed(), LONG), NORMED),
    "batch norm, chosen": (lambda: auto()(Normed(), LONG), NORMED),
    "batch norm, ragged": (lambda: Sequential()(Normed(), LONG, lengths=torch.tensor([300, 7])), NORMED),
    "another kind of state": (lambda: quasi_deer()(Forgetful(), LONG), "must keep the type and the shape"),
    "nothing but nan": (lambda: predictability(GRU(3, 5), torch.full((1, 9, 3), torch.nan)), "not finite"),
    "a name for a rollout": (lambda: Recurrent(GRU(3, 5), inputs=3, rollout="quasi_deer"), r"reroll.quasi_deer\(\)"),
    "a preset not called": (lambda: Recurrent(GRU(3, 5), inputs=3, rollout=quasi_deer), r"reroll.quasi_deer\(\)"),
    "features of a model": (lambda: Recurrent(GRU(3, 5), inputs=3)(torch.zeros(2, 6, 4)), r"expected .*, time, 3\]"),
    "a symbol too many": (lambda: Recurrent(GRU(3, 5), vocab=10)(torch.tensor([[3, 11]])), "symbols 3 … 11.*0 … 9"),
    "a symbol that is none": (lambda: Recurrent(GRU(3, 5), vocab=10)(torch.zeros(1, 2)), "whole numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_named(name):
    call, message = MISTAKES[name]
    with pytest.raises(UsageError, match=message):
        call()


def test_an_unknown_option_is_refused_at_once():
    for preset in (auto, quasi_deer, elk):
        with pytest.raises(TypeError, match="tolerence"):
            preset(tolerence=1e-3)


def test_a_plain_tuple_will_do_for_a_named_one():
    cell, x = LSTM(3, 4), torch.randn(2, 20, 3)
    state = (torch.randn(2, 4), torch.randn(2, 4))
    for rollout in (Sequential(), quasi_deer()):
        found, named = rollout(cell, x, state), rollout(cell, x, type(cell.init_state((2,)))(*state))
        assert torch.equal(found.states.h, named.states.h)
        assert type(found.final) is type(named.final)


def test_a_module_given_as_a_step_is_saved_once():
    cell = cell_from(nn.Bilinear(3, 5, 5), 5)
    assert sorted(cell.state_dict()) == ["module.bias", "module.weight"]
    assert cell.step(torch.ones(2, 3), torch.ones(2, 5)).shape == (2, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_half_precision(dtype):
    """What converges is within its tolerance; what does not is the loop, bit for bit."""
    torch.manual_seed(0)
    cell, x = GRU(3, 5).to(dtype), torch.randn(2, 300, 3).to(dtype)
    expected = Sequential(kernel="reference")(cell, x).states
    for rollout in (deer(), quasi_deer(), elk(), quasi_elk()):
        found = rollout(cell, x)
        assert bool(found.converged.all())
        assert (found.states - expected).abs().max() < (0.02 if dtype == torch.float16 else 0.12)
    for rollout in (jacobi(max_iterations=2), quasi_deer(max_iterations=2), quasi_elk(max_iterations=1)):
        found = rollout(cell, x)
        assert found.outcome is Outcome.fell_back
        assert torch.equal(found.states, expected)


def test_agreement_of_what_has_no_gradients_or_no_numbers():
    x = torch.randn(2, 20, 3)
    symbols = cell_from(lambda u, s: torch.tanh(u.float() + 0.5 * s), 3)
    assert "gradients none to compare" in str(verify_agreement(quasi_deer(), symbols, x.long()))
    for cell, given in ((cell_from(lambda u, s: s, 3), x), (GRU(3, 4), x[:, :0]), (GRU(3, 4), x[:0])):
        assert verify_agreement(quasi_deer(), cell, given).ok
        assert "agrees" in str(verify_agreement(quasi_deer(), cell, given))


class Spoiling(Sequential):
    """A rollout whose values are right and whose gradients are not numbers."""

    def __call__(self, cell, inputs, state=None, reset=None):
        found = super().__call__(cell, inputs, state, reset)
        return found._replace(states=found.states + 0 * torch.sqrt(0 * inputs.sum()))


def test_gradients_that_are_not_numbers_do_not_agree():
    agreement = verify_agreement(Spoiling(), GRU(3, 3), torch.randn(2, 9, 3))
    assert agreement.states == 0.0
    assert agreement.gradients["inputs"] == math.inf
    assert not agreement.ok


def test_advice_is_sound():
    torch.manual_seed(0)
    slow = predictability(cell_from(lambda u, s: 0.999 * s + 0.1 * torch.tanh(u), 3), torch.randn(1, 2000, 3))
    assert slow.rollout == quasi_deer()
    assert "neither forgets nor explodes, but quasi-DEER converged" in slow.reason
    torch.manual_seed(0)
    marginal = predictability(MeanField(32, 1.35), torch.randn(1, 600, 32) * 0.02)
    assert abs(marginal.exponent) < 0.01
    assert marginal.rollout == elk(adaptive=True)
    assert "undamped iterations for 600 steps are too many" in marginal.reason
    weight = 3 * torch.linalg.qr(torch.randn(8, 8))[0].triu(1)  # it forgets all in eight steps, and grows before
    grows = predictability(cell_from(lambda u, s: torch.sin(s @ weight + u), 8), torch.randn(1, 600, 8))
    assert grows.exponent < 0
    assert "forgets" in grows.reason


class Caching(Nameless):
    """A buffer that is the same after every step is no state; one that is made at the first is none either."""

    input_size = 4

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("kept", torch.zeros(()))

    def step(self, u, state):
        self.kept = self.weight.detach().clone()
        if not hasattr(self, "late"):
            self.register_buffer("late", torch.ones(()))
        return torch.tanh(u + self.weight * state)


@torch.no_grad()
def test_steps_that_are_no_mistakes():
    x = torch.randn(2, 40, 4)
    assert verify_agreement(quasi_deer(), Caching(), x).ok
    scaled = functools.wraps(nn.Linear.forward)(lambda u, s: torch.tanh(0.5 * s + u))
    assert verify_agreement(quasi_deer(), cell_from(scaled, 4), x).ok
    wide = cell_from(lambda u, s: torch.tanh(u.to(s.dtype) + 0.5 * s), 4)
    found = quasi_deer()(wide, x, torch.zeros(2, 4, dtype=torch.float64))
    expected = Sequential()(wide, x, torch.zeros(2, 4, dtype=torch.float64))
    torch.testing.assert_close(found.states, expected.states, rtol=0, atol=1e-8)
    numpy_window = quasi_deer(window=np.int64(10))
    assert numpy_window.window == 10
    assert type(numpy_window.window) is int


@pytest.mark.parametrize("how", ["a forward", "a hook", "another module"])
def test_what_is_changed_in_a_module_of_a_cell_is_tested_again(how):
    inner = nn.ModuleDict({"act": nn.Tanh()})
    cell, x = cell_from(lambda u, s: inner["act"](u + 0.5 * s), 4, module=inner), torch.randn(3, 300, 4)
    for rollout in (deer(), quasi_deer()):
        rollout(cell, x)
    if how == "a forward":
        inner["act"].forward = lambda v: torch.tanh(v - v.mean(0))
    elif how == "a hook":
        inner["act"].register_forward_hook(lambda module, arguments, result: result - result.mean(0))
    else:
        inner["act"] = nn.Softmax(0)
    for rollout in (deer(), quasi_deer()):
        with pytest.raises(UsageError, match="mixes sequences"):
            rollout(cell, x)


@torch.no_grad()
def test_a_step_that_asks_for_the_type_of_its_arguments_computes_what_it_does_on_tensors():
    cell = cell_from(lambda u, s: torch.tanh((0.5 if isinstance(s, torch.Tensor) else 0.9) * s + u), 4)
    x = torch.randn(2, 300, 4)
    expected = Sequential(kernel="reference")(cell, x).states
    for rollout in (Sequential(kernel="compiled"), auto(), quasi_deer(), deer(), jacobi()):
        torch.testing.assert_close(rollout(cell, x).states, expected, rtol=0, atol=1e-4)
