"""The Jacobian of a step, found by its structure, against finite differences and automatic differentiation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reroll.cells import (
    ARGRU,
    CELLS,
    DNC,
    GRU,
    LSTM,
    Lorenz96,
    MeanField,
    ParaGRU,
    ParaLSTM,
    TwoWell,
    cell_from,
    jacobian,
)  # fmt: skip
from reroll.cells.layout import Layout
from reroll.errors import UsageError

D = 6
W, V = torch.randn(2, D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind(0)
HEADS = W.view(2, 3, 6)[..., :3]
P = torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

USERS = {
    "two layers": lambda u, s: s * 0.5 + torch.tanh(torch.tanh(s @ W + u) @ V) * torch.sigmoid(s) / (2 + s * s),
    "functions": lambda u, s: F.gelu(F.linear(s, W)) + torch.where(u > 0, s, s.roll(1, -1)) - s.cos() ** 2,
    "joined": lambda u, s: torch.tanh(F.linear(torch.cat([u, s], -1), torch.cat([W, V], 1))),
    "pieces": lambda u, s: torch.cat([s[..., 2:].exp() * u[..., 2:], torch.lerp(s[:, :2], u[:, :2], 0.3)], -1),
    "heads": lambda u, s: torch.einsum("...nd,nde->...ne", s.unflatten(-1, (2, 3)), HEADS).flatten(-2) + u,
    "sums": lambda u, s: u * s.sum(-1, keepdim=True) + s.square().mean(-1).unsqueeze(-1) - (2 - s),
    "addmm": lambda u, s: torch.addmm(u, s, W) / s.abs().add(1.0) + torch.addcmul(u, s, s),
    "wide": lambda u, s: torch.relu(F.linear(s, P)) @ P + 1 / (1 + s.square()),
}  # fmt: skip
HIDDEN = {  # code without such a structure
    "three layers": lambda u, s: torch.tanh(torch.tanh(torch.tanh(s @ W) @ V) @ W + u),
    "attention": lambda u, s: torch.softmax(s.unsqueeze(-1) * s.unsqueeze(-2), -1).sum(-1) + u,
    "a branch": lambda u, s: s * 2 if (s > 100).any() else torch.tanh(s @ W),
}


def cells():
    torch.manual_seed(0)
    found = {kind.__name__: kind(3, D) for kind in CELLS if kind is not DNC}
    found |= {"heads": LSTM(3, D, heads=3), "DNC": DNC(3, D, word_size=2, memory_size=3)}
    found |= {"MeanField": MeanField(D, 1.0), "ARGRU": ARGRU(3), "Lorenz96": Lorenz96(5), "TwoWell": TwoWell()}
    found |= {kind.__name__: cell_from(kind(3, D), D) for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)}
    found |= {name: cell_from(step, D) for name, step in (USERS | HIDDEN).items()}
    return found


def at_random(cell, rows=5, seed=2):
    cell = cell.double()
    layout = Layout.of(cell.init_state((rows,)))
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(rows, layout.size, dtype=torch.float64, generator=generator)
    u = cell.project(torch.randn(rows, cell.input_size, dtype=torch.float64, generator=generator)).detach()
    return cell, layout, u, state


def by_differences(cell, layout, u, state, step=1e-6):
    columns = []
    for j in range(layout.size):
        shift = torch.zeros_like(state)
        shift[:, j] = step
        up, down = (jacobian.step(cell, layout, u, state + sign * shift) for sign in (1, -1))
        columns.append((up - down) / (2 * step))
    return torch.stack(columns, -1).detach()


@pytest.mark.parametrize("name", cells())
def test_every_structure_agrees_with_finite_differences(name):
    cell, layout, u, state = at_random(cells()[name])
    truth = by_differences(cell, layout, u, state)
    following, dense = jacobian.linearise(cell, layout, u, state, "dense")
    torch.testing.assert_close(following, jacobian.step(cell, layout, u, state).detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(dense, truth, rtol=1e-7, atol=1e-8)
    diagonal = jacobian.linearise(cell, layout, u, state, "diagonal")[1]
    torch.testing.assert_close(diagonal, dense.diagonal(dim1=1, dim2=2), rtol=1e-12, atol=1e-13)
    for blocks in (k for k in (1, 2, 3) if layout.size % k == 0):
        found = jacobian.linearise(cell, layout, u, state, "block", blocks)[1]
        width = layout.size // blocks
        for k in range(blocks):
            for m in range(blocks):
                part = dense[:, k * width : (k + 1) * width, m * width : (m + 1) * width].diagonal(dim1=1, dim2=2)
                torch.testing.assert_close(found[:, k, m], part, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", cells())
def test_what_is_followed_and_what_is_not(name):
    """A cell of ours or of this shape that falls back to D derivatives would be right, and slow."""
    cell, layout, u, state = at_random(cells()[name])
    jacobian.linearise(cell, layout, u, state, "diagonal")
    assert (jacobian.why_untrackable(cell) is not None) == (name in (*HIDDEN, "DNC", "Lorenz96"))


@pytest.mark.parametrize("name", ["GRU", "LSTM", "DNC", "three layers", "two layers"])
def test_the_estimate_of_the_diagonal_is_unbiased(name):
    """All 2^D sign vectors together give the exact diagonal."""
    cell, layout, u, state = at_random(cells()[name], rows=1)
    size = min(layout.size, 6)
    cell = cell_from(lambda u, s: jacobian.step(cell_of, layout, u, torch.cat([s, rest], -1))[..., :size], size)
    cell_of, rest = cells()[name].double(), state[:, size:]
    small = Layout.of(state[:, :size])
    signs = torch.tensor([[1.0 if i >> b & 1 else -1.0 for b in range(size)] for i in range(2**size)]).double()
    _, estimate = jacobian.hutchinson(cell, small, u, state[:, :size], signs.unsqueeze(1))
    truth = by_differences(cell, small, u, state[:, :size]).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(estimate, truth, rtol=1e-6, atol=1e-8)


def test_the_formula_of_the_paragru():
    """A = (1−z) + (c−h) a_z σ'_z + z a_c (1−c²)(r + h a_r σ'_r), written out by hand."""
    cell, layout, u, h = at_random(ParaGRU(3, D))
    u_z, u_r, u_c = u.chunk(3, -1)
    a_z, a_r, a_c = cell.gains.detach().unbind(0)
    z, r = torch.sigmoid(u_z + a_z * h), torch.sigmoid(u_r + a_r * h)
    c = torch.tanh(u_c + a_c * h * r)
    by_hand = (1 - z) + (c - h) * a_z * z * (1 - z) + z * a_c * (1 - c**2) * (r + h * a_r * r * (1 - r))
    torch.testing.assert_close(jacobian.linearise(cell, layout, u, h, "diagonal")[1], by_hand, rtol=1e-13, atol=1e-14)
    dense = jacobian.linearise(cell, layout, u, h, "dense")[1]
    assert torch.equal(dense, torch.diag_embed(dense.diagonal(dim1=1, dim2=2)))


def test_the_paralstm_is_a_block_per_channel():
    cell, layout, u, state = at_random(ParaLSTM(3, D))
    dense = jacobian.linearise(cell, layout, u, state, "dense")[1].unflatten(2, (2, D)).unflatten(1, (2, D))
    off = dense * (1 - torch.eye(D, dtype=torch.float64)).view(D, 1, D)
    assert off.abs().max() == 0


def test_gru_of_torch_and_ours_are_the_same_function():
    module = nn.GRU(3, D, batch_first=True).double()
    cell = GRU(3, D).double()
    with torch.no_grad():
        for ours, theirs in zip((cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh), module.parameters()):
            ours.copy_(theirs)
    x, h = torch.randn(4, 1, 3).double(), torch.randn(4, D).double()
    torch.testing.assert_close(cell.step(cell.project(x[:, 0]), h), module(x, h[None])[1][0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("bias", [True, False])
def test_torch_cells_are_wrapped_with_their_weights(kind, bias):
    module = kind(3, D, bias=bias).double()
    cell = cell_from(module, D)
    x, h = torch.randn(4, 3).double(), torch.randn(4, D).double()
    state = (h, torch.randn(4, D).double()) if kind is nn.LSTMCell else h
    ours, theirs = cell.step(cell.project(x), state), module(x, state)
    for a, b in zip(*((ours, theirs) if kind is nn.LSTMCell else ((ours,), (theirs,)))):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    assert {id(p) for p in cell.parameters()} == {id(p) for p in module.parameters()}
    with pytest.raises(UsageError, match=f"state_size=4 does not fit .*hidden_size is {D}"):
        cell_from(module, 4)


def test_blocks_must_divide_the_state():
    cell, layout, u, state = at_random(GRU(3, D))
    with pytest.raises(UsageError, match="blocks=4 does not divide the 6 numbers"):
        jacobian.linearise(cell, layout, u, state, "block", 4)


@pytest.mark.parametrize("error", [RuntimeError, TypeError, MemoryError])
def test_an_error_of_one_call_does_not_hide_the_structure(error):
    failing = True

    def step(u, s):
        nonlocal failing
        if failing:
            failing = False
            raise error("only once; cannot allocate")
        return torch.tanh(s @ W + u)

    cell, layout, u, state = at_random(cell_from(step, D))
    for _ in range(2):  # once on plain tensors, then by structure
        try:
            found = jacobian.linearise(cell, layout, u, state, "dense")[1]
        except MemoryError:
            found = jacobian.linearise(cell, layout, u, state, "dense")[1]
        torch.testing.assert_close(found, by_differences(cell, layout, u, state), rtol=1e-7, atol=1e-8)
    assert jacobian.why_untrackable(cell) is None
