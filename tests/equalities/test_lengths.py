"""Padded sequences with `lengths` are each alone: values, gradients and convergence, whatever the padding holds."""

import pytest
import torch
from torch import nn

from reroll import Recurrent
from reroll.cells import CELLS, DNC, GRU, LSTM, ParaGRU, cell_from
from reroll.errors import UsageError
from reroll.kernels.linear_scan import linear_scan
from reroll.rollout import ROLLOUTS, Sequential, auto, quasi_deer
from reroll.trees import map_state
from tests.equalities.test_rollouts import ALL, MORE, contractive, tightened

LENGTHS = [(19, 5, 0, 13, 1), (17, 19, 16, 2, 2)]
ROLLOUT = {**{name: tightened(rollout) for name, rollout in ALL.items()}, **MORE, "compiled": Sequential("compiled")}


def leaves(tree):
    found = []
    map_state(tree, lambda t: found.append(t) or t)
    return found


def padded(lengths, features=3, time=19, dtype=torch.float64, content=torch.nan):
    inputs = torch.randn(len(lengths), time, features, dtype=dtype, generator=torch.Generator().manual_seed(3))
    for row, length in enumerate(lengths):
        inputs[row, length:] = content
    return inputs


def alone(cell, inputs, lengths, state, reset):
    """Every sequence by the loop, without its padding: readouts, states behind one another, the last states."""
    found = []
    for row, length in enumerate(lengths):
        first = map_state(state, lambda t, row=row: t[row : row + 1])
        cut = None if reset is None else reset[row : row + 1, :length]
        trajectory = Sequential(kernel="reference")(cell, inputs[row : row + 1, :length], first, cut)
        found.append((cell.readout(trajectory.states), trajectory.states, trajectory.final))
    return found


@pytest.mark.parametrize("name", ROLLOUT)
@pytest.mark.parametrize("kind", [kind for kind in CELLS if kind is not DNC])
def test_padding_touches_nothing(name, kind):
    index = len(name) + len(kind.__name__)
    lengths, rollout, cell = LENGTHS[index % 2], ROLLOUT[name], contractive(kind)
    inputs = padded(lengths, content=[torch.nan, torch.inf, 1e30][index % 3]).requires_grad_()
    reset = torch.rand(5, 19) < 0.1 if index % 2 else None
    state = None
    if index % 4 > 1:
        state = map_state(cell.init_state((5,)), lambda t: torch.randn_like(t).requires_grad_())
    given = [inputs, *cell.parameters(), *([] if state is None else leaves(state))]
    sizes = torch.tensor(lengths)
    trajectory = rollout(cell, inputs, state, reset, sizes)
    readouts, final = rollout.read(cell, inputs, state, reset, sizes)
    rows = [(readouts[row, :n], [s[row, :n] for s in leaves(trajectory.states)], [f[row] for f in leaves(final)])
            for row, n in enumerate(lengths)]  # fmt: skip
    expected = [
        (r[0], [s[0] for s in leaves(states)], [f[0] for f in leaves(end)])
        for r, states, end in alone(cell, inputs, lengths, state, reset)
    ]
    flat, truth = ([torch.cat([t.flatten() for t in (r, *s, *f)]) for r, s, f in each] for each in (rows, expected))
    torch.testing.assert_close(torch.cat(flat), torch.cat(truth), rtol=1e-9, atol=1e-10)
    for part in (readouts, *leaves(trajectory.states)):
        for row, length in enumerate(lengths):
            assert not part[row, length:].any()
    for a, b in zip(leaves(trajectory.final), leaves(final)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    weights = torch.randn(sum(len(t) for t in flat), dtype=torch.float64)
    found, exact = (
        torch.autograd.grad((torch.cat(t) * weights).sum(), given, allow_unused=True) for t in (flat, truth)
    )
    for source, a, b in zip(given, found, exact):
        a, b = (torch.zeros_like(source) if g is None else g for g in (a, b))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
    if "identity" not in name:
        assert bool(trajectory.converged.all())


@pytest.mark.parametrize("structure", ["diagonal", "block", "dense", "complex"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_scan_of_padded_sequences(structure, reverse, first):
    torch.manual_seed(0)
    dtype = torch.complex128 if structure == "complex" else torch.float64
    shape = {"diagonal": (3,), "complex": (3,), "block": (2, 2, 3), "dense": (3, 3)}[structure]
    b = torch.randn(4, 7, *shape[-2 if structure == "block" else -1 :], dtype=dtype)
    A, lengths = 0.5 * torch.randn(4, 7, *shape, dtype=dtype), torch.tensor([7, 0, 3, 1])
    for row, length in enumerate(lengths):
        A[row, length:] = b[row, length:] = torch.nan
    initial = torch.randn(4, *b.shape[2:], dtype=dtype) if first else None
    A, b = A.requires_grad_(), b.requires_grad_()
    kind = "diagonal" if structure == "complex" else structure
    found = linear_scan(A, b, initial, reverse, structure=kind, lengths=lengths)
    total = 0
    for row, length in enumerate(lengths):
        assert not found[row, length:].any()
        s, order = torch.zeros_like(b[0, 0]) if initial is None else initial[row], range(length)
        for t in reversed(order) if reverse else order:
            a, now = A[row, t], b[row, t]
            product = (a * s) if kind == "diagonal" else torch.einsum("ijc,jc->ic", a, s) if kind == "block" else a @ s
            s = product + now
            torch.testing.assert_close(found[row, t], s, rtol=1e-12, atol=1e-12)
            total = total + (s.real**2 if s.is_complex() else s**2).sum() + (s.imag.sum() if s.is_complex() else 0)
    ours = (found.real**2 if found.is_complex() else found**2).sum() + (found.imag.sum() if found.is_complex() else 0)
    for x, y in zip(torch.autograd.grad(ours, (A, b)), torch.autograd.grad(total, (A, b))):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)


def test_gru_against_packed_sequences_of_torch():
    """nn.GRU on a PackedSequence is a reference that is not ours."""
    torch.manual_seed(0)
    lengths = torch.tensor([260, 7, 31])
    inputs = padded(lengths.tolist(), 5, 260, torch.float32)
    module, step = nn.GRU(5, 8, batch_first=True), nn.GRUCell(5, 8)
    with torch.no_grad():
        for name, p in step.named_parameters():
            p.copy_(getattr(module, f"{name}_l0"))
    packed = nn.utils.rnn.pack_padded_sequence(inputs, lengths, batch_first=True, enforce_sorted=False)
    expected, last = module(packed)
    expected = nn.utils.rnn.pad_packed_sequence(expected, batch_first=True)[0]
    exact = torch.autograd.grad(expected.square().sum() + last.sum(), list(module.parameters()))
    cell = cell_from(step, 8)
    for rollout in (Sequential(), Sequential("compiled"), auto(), quasi_deer()):
        leaf = inputs.clone().requires_grad_()
        with torch.no_grad():
            trajectory = rollout(cell, inputs, lengths=lengths)
        assert bool(trajectory.converged.all())
        torch.testing.assert_close(trajectory.states, expected, rtol=1e-4, atol=2e-5)
        outputs, final = rollout.read(cell, leaf, lengths=lengths)
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(final, last[0], rtol=1e-4, atol=2e-5)
        sources = [leaf, step.weight_ih, step.weight_hh, step.bias_ih, step.bias_hh]
        found = torch.autograd.grad(outputs.square().sum() + final.sum(), sources)
        assert bool(torch.isfinite(found[0]).all())
        for a, b in zip(found[1:], exact):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))
        with pytest.raises(UsageError, match="PackedSequence; unpack it"):
            rollout(cell, packed)


def test_lengths_of_nothing_and_lengths_that_do_not_fit():
    cell, inputs = GRU(3, 4), torch.full((2, 9, 3), torch.nan)
    state = torch.randn(2, 4)
    for rollout in ROLLOUTS:
        trajectory = rollout(cell, inputs, state, None, torch.tensor([0, 0]))
        assert torch.equal(trajectory.final, state)
        assert not trajectory.states.any()
        for lengths, message in (
            ([1, 2], "lengths is a list; expected whole numbers"),
            (torch.tensor([1.0, 2.0]), r"dtype float32; expected whole numbers of shape \(2,\)"),
            (torch.tensor([1, 10]), "lengths lie in 1 … 10; there are 9 steps"),
        ):
            with pytest.raises(UsageError, match=message):
                rollout(cell, inputs, lengths=lengths)


def test_a_projection_that_mixes_steps_is_not_cut():
    """Only a class that says so takes every step by itself."""

    class Averaging(ParaGRU):
        def project(self, inputs):
            return super().project(inputs.cumsum(1))

    torch.manual_seed(0)
    cell, lengths = Averaging(3, 4).double(), (19, 5, 0, 13, 1)
    inputs = padded(lengths)
    for rollout in (Sequential(), Sequential("compiled"), quasi_deer()):
        outputs, final = rollout.read(cell, inputs, lengths=torch.tensor(lengths))
        for row, (length, one) in enumerate(zip(lengths, alone(cell, inputs, lengths, cell.init_state((5,)), None))):
            torch.testing.assert_close(outputs[row, :length], one[0][0], rtol=1e-7, atol=1e-8)
            torch.testing.assert_close(final[row], one[2][0], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("readout", ["every", "last", "mean"])
@pytest.mark.parametrize("symbols", [True, False])
def test_a_model_of_padded_sequences(readout, symbols):
    torch.manual_seed(0)
    lengths = torch.tensor([9, 2, 5])
    cells = (GRU(4, 5), LSTM(5, 3))
    model = Recurrent(
        cells, **({"vocab": 7, "outputs": 2} if symbols else {"inputs": 4, "outputs": 2}), readout=readout
    )
    model.double().window_floats = 1  # one step at a time where no gradient is needed
    inputs = padded(lengths.tolist(), 4, 9)
    if symbols:
        inputs = torch.randint(7, (3, 9))
        for row, length in enumerate(lengths):
            inputs[row, length:] = -100
    with torch.no_grad():
        windows = model(inputs, lengths=lengths)
    outputs = model(inputs, lengths=lengths)
    torch.testing.assert_close(outputs.detach(), windows)
    for row, length in enumerate(lengths):
        one = model(inputs[row : row + 1, :length])
        torch.testing.assert_close(
            outputs[row : row + 1, :length] if readout == "every" else outputs[row : row + 1], one
        )


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3)])
@pytest.mark.parametrize("structure", [1, 3])
def test_nothing_to_scan_is_scanned(shape, structure):
    b = torch.ones(shape)
    A = torch.ones(shape) if structure == 1 else torch.ones(*shape, 3)
    assert linear_scan(A, b, lengths=torch.zeros(shape[0], dtype=torch.int64)).shape == shape
