"""Programs: what a step does, run block by block, is what torch computes operation by operation."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reroll.cells import ARGRU, CELLS, DNC, LSTM, Cell, MeanField, cell_from, jacobian
from reroll.cells.compiled import compile_step
from reroll.cells.layout import Layout
from reroll.kernels.program import Builder
from reroll.rollout import Sequential, deer, jacobi, quasi_deer

D = 6
W = torch.randn(D, D, generator=torch.Generator().manual_seed(3))


def w(like):
    return W.to(like.dtype)


USERS = {
    "mixed": lambda u, s: torch.tanh(torch.relu(s @ w(s)) @ w(s) + u) * torch.sigmoid(s) / 3 + 2 / (3 + s * s),
    "turned": lambda u, s: torch.tanh(torch.cat([s[:, 3:], s[:, :3]], -1) @ w(s) + u) - s.roll(1, -1) * 0.3,
    "functions": lambda u, s: torch.sin(s + u) * torch.exp(-s * s) + (2 + torch.cos(u * s)).log() - (1 + s * s).sqrt(),
    "more": lambda u, s: F.silu(s @ w(s)) + F.softplus(u - 3 * s) / (1 + u * u) - abs(u + s) * (2 + s * s).reciprocal(),
    "named": lambda u, s: torch.tanh(torch.roll(s.unflatten(-1, (2, -1)).flatten(start_dim=-2), 1, dims=-1) + u),
    "inputs": lambda u, s: torch.softmax(u, -1) * s + torch.addcmul(u, s, 1 - u) + (u > 0) * u,
}  # fmt: skip
WRITTEN = {
    **{kind.__name__: lambda kind=kind: kind(3, D) for kind in CELLS if kind is not DNC},
    **{kind.__name__: lambda kind=kind: cell_from(kind(3, D), D) for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)},
    "MeanField": lambda: MeanField(D, 1.0),
    "ARGRU": ARGRU,
    **{name: lambda step=step: cell_from(step, D) for name, step in USERS.items()},
}


def setting(name, rows):
    torch.manual_seed(0)
    cell = WRITTEN[name]()
    layout = Layout.of(cell.init_state((2,)))
    u = jacobian.feature_major(cell.project(torch.randn(rows, cell.input_size)).detach())
    return cell, layout, u, torch.randn(layout.size, rows)


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("structure", [None, "diagonal", "block", "dense"])
@pytest.mark.parametrize("rows", [7, 64, 203])
@torch.no_grad()
def test_a_program_computes_the_step_and_its_jacobian(name, structure, rows):
    cell, layout, u, state = setting(name, rows)
    if structure == "block" and len(set(layout.sizes)) > 1:  # parts of several sizes have no blocks
        assert compile_step(cell, layout, u, structure, len(layout.sizes)) is None
        return
    step, program = compile_step(cell, layout, u, structure, len(layout.sizes))
    out = torch.full((program.outputs, rows), torch.nan)
    program.run(out, 0, state)
    exact = cell.double()
    following = jacobian.step(exact, layout, u.double(), state.T.double())
    torch.testing.assert_close(out[: layout.size].T.double(), following, rtol=2e-6, atol=2e-6)
    alone = torch.full((step.outputs, rows), torch.nan)
    step.run(alone, 0, state)
    assert torch.equal(alone, out[: layout.size])
    if structure is not None:
        truth = jacobian._by_autograd(exact, layout, u.double(), state.T.double(), structure, len(layout.sizes))[1]
        found = out[layout.size :].view(*truth.shape[1:], rows).movedim(-1, 0)
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("begin", [0, 5, 70])
@torch.no_grad()
def test_a_window_of_rows(begin):
    cell, layout, u, state = setting("GRU", 203)
    _, program = compile_step(cell, layout, u, "diagonal")
    whole, part = torch.empty(program.outputs, 203), torch.empty(program.outputs, 100)
    program.run(whole, 0, state)
    program.run(part, begin, state[:, begin : begin + 100].contiguous())
    assert torch.equal(part, whole[:, begin : begin + 100])


@torch.no_grad()
def test_threads_do_not_change_a_bit():
    cell, layout, u, state = setting("LSTM", 5000)
    _, program = compile_step(cell, layout, u, "block", 2)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.empty(program.outputs, 5000))
        program.run(results[-1], 0, state)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_registers_are_used_again():
    builder = Builder()
    x = builder.input(torch.zeros(3, 10))
    for _ in range(50):
        x = builder.emit("sigmoid", 3, x)
    assert builder.registers == 153
    assert builder.finish([(x, 3)]).registers <= 9


@torch.no_grad()
def test_what_is_not_finite_stays_so():
    cell, layout, u, state = setting("GRU", 64)
    state[2, 5], state[1, 7] = torch.nan, torch.inf
    program, _ = compile_step(cell, layout, u, None)
    out = torch.empty(program.outputs, 64)
    program.run(out, 0, state)
    assert bool(out[:, 5].isnan().all())
    assert not bool(out[:, 6].isnan().any())


class Branching(Cell):
    input_size = output_size = D

    def init_state(self, batch_shape):
        return torch.zeros(*batch_shape, D)

    def step(self, u, state):
        return torch.tanh(state + u) if float(u.sum()) > -1e9 else state


def test_what_cannot_be_written_runs_as_it_is():
    for cell in (LSTM(3, D, heads=2), Branching(), DNC(3, 4, word_size=2, memory_size=3)):
        u = cell.project(torch.randn(5, cell.input_size)).detach()
        assert compile_step(cell, Layout.of(cell.init_state((2,))), u, "diagonal") is None
        x = torch.randn(4, 300, cell.input_size)
        found, expected = quasi_deer()(cell, x).final, Sequential()(cell, x).final
        pairs = zip(found, expected) if isinstance(found, tuple) else [(found, expected)]
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("rollout", [deer(), quasi_deer(), quasi_deer(window=100), jacobi(max_iterations=300)])
@pytest.mark.parametrize("name", ["GRU", "LSTM", "LEM", "mixed"])
@torch.no_grad()
def test_rollouts_by_programs_agree_with_the_loop(rollout, name):
    torch.manual_seed(1)
    cell = WRITTEN[name]()
    for p in cell.parameters():
        p.mul_(0.6)
    x = torch.randn(5, 333, cell.input_size) * 0.5
    reset = torch.rand(5, 333) < 0.02
    found, expected = rollout(cell, x, reset=reset), Sequential(kernel="reference")(cell, x, reset=reset)
    pack = Layout.of(expected.final).pack
    torch.testing.assert_close(pack(found.states), pack(expected.states), rtol=0, atol=1e-4)


def test_a_function_that_works_in_place_is_no_program():
    """Its argument changes under the step, which a program would not see."""

    def step(u, s):
        v = s * 0.5 + u
        return torch.tanh(F.silu(v, inplace=True) + v)

    cell, x = cell_from(step, D), torch.randn(2, 9, D)
    expected = Sequential(kernel="reference")(cell, x).states
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it runs as a loop
        found = Sequential(kernel="compiled")(cell, x).states
    torch.testing.assert_close(found, expected)
