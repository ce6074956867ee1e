"""Rollouts under torch.compile, torch.func and complex numbers: the loop's results, or one line that says why not."""

import pytest
import torch
from torch import nn

from reroll import Recurrent
from reroll.cells import GRU, Cell
from reroll.errors import UsageError
from reroll.rollout import ROLLOUTS, Newton, Sequential, auto, quasi_deer

COMPILED = Sequential(kernel="compiled")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch reads it
@pytest.mark.parametrize("rollout", [Sequential(kernel="reference"), COMPILED, quasi_deer(), auto()], ids=repr)
def test_a_compiled_model_gives_what_the_model_gives(rollout):
    torch.manual_seed(0)
    model = Recurrent(GRU(3, 4), inputs=3, outputs=2, rollout=rollout)
    x, lengths, weights = torch.randn(2, 260, 3), torch.tensor([260, 31]), list(model.parameters())
    compiled = torch.compile(model, backend="eager")
    for options in ({}, {"lengths": lengths}):
        found, expected = (each(x, **options) for each in (compiled, model))
        assert torch.equal(found, expected)
        for a, b in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (found, expected))):
            assert torch.equal(a, b)
    with pytest.raises(UsageError, match=r"expected \[batch, time, 3\]"):
        compiled(x[..., :2])


class Unrolled(nn.Module):
    def __init__(self, cell, rollout):
        super().__init__()
        self.cell, self.rollout = cell, rollout

    def forward(self, x):
        return self.rollout(self.cell, x).states


@pytest.mark.parametrize("rollout", [*ROLLOUTS, COMPILED], ids=repr)
def test_functional_transforms_are_right_or_refused(rollout):
    torch.manual_seed(0)
    model, x = Unrolled(GRU(3, 4), rollout), torch.randn(5, 2, 260, 3)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights, x):
        return torch.func.functional_call(model, weights, (x,)).square().sum()

    exact = Unrolled(model.cell, Sequential(kernel="reference"))
    if isinstance(rollout, Newton) or rollout == COMPILED:
        for call in (lambda: torch.func.grad(loss)(weights, x[0]), lambda: torch.vmap(model)(x)):
            with pytest.raises(UsageError, match="inside torch.func.grad or vmap.*Sequential"):
                call()
        return
    found = torch.func.grad(loss)(weights, x[0])
    expected = torch.autograd.grad(exact(x[0]).square().sum(), list(exact.parameters()))
    for a, b in zip(found.values(), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    if rollout != Sequential():  # whose `read` may use a kernel; a call loops
        mapped = torch.vmap(model)(x)
        torch.testing.assert_close(mapped, torch.stack([exact(one) for one in x]), rtol=1e-4, atol=1e-5)


class Turning(Cell):
    """A diagonal complex recurrence with real inputs, as of an LRU."""

    input_size, output_size = 3, 4

    def __init__(self):
        super().__init__()
        self.log_rate, self.angle = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4))
        self.map = nn.Linear(3, 4)

    def init_state(self, batch_shape):
        return torch.zeros(*batch_shape, 4, dtype=torch.complex64)

    def project(self, inputs):
        return self.map(inputs)

    def step(self, u, state):
        return torch.exp(torch.complex(-self.log_rate, self.angle)) * state + u

    def readout(self, state):
        return state.real


@pytest.mark.parametrize("rollout", [*ROLLOUTS, COMPILED], ids=repr)
def test_a_complex_state_stays_complex_or_is_refused(rollout):
    torch.manual_seed(0)
    cell, x = Turning().double(), torch.randn(2, 300, 3, dtype=torch.float64)
    cell.init_state = lambda shape: torch.zeros(*shape, 4, dtype=torch.complex64)  # half of what the inputs have
    if isinstance(rollout, Newton) or rollout == COMPILED:
        with pytest.raises(UsageError, match="state has dtype complex128; .*Sequential"):
            rollout(cell, x)
        return
    a, u = torch.exp(torch.complex(-cell.log_rate, cell.angle)), cell.project(x)
    power = a ** torch.arange(300).unsqueeze(1)  # s_t = Σ_k a^k u_{t−k}, by a convolution
    states = torch.fft.ifft(torch.fft.fft(power, 600, 0) * torch.fft.fft(u, 600, 1), 600, 1)[:, :300]
    trajectory = rollout(cell, x)
    torch.testing.assert_close(trajectory.states, states, rtol=1e-9, atol=1e-9)
    outputs, final = rollout.read(cell, x, lengths=torch.tensor([300, 120]))
    torch.testing.assert_close(final, torch.stack([states[0, -1], states[1, 119]]), rtol=1e-9, atol=1e-9)
    weights = list(cell.parameters())
    found = torch.autograd.grad(outputs.square().sum(), weights, retain_graph=True)
    exact = torch.autograd.grad(states.real[0].square().sum() + states.real[1, :120].square().sum(), weights)
    for a, b in zip(found, exact):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-8)
