"""What a cell promises, for every cell, and the parameter counts of the paper."""

import functools

import pytest
import torch

from reroll.cells import CELLS, DNC, GRU, LSTM, RNN, Cell, cell_from
from reroll.errors import UsageError
from reroll.models import Recurrent
from reroll.trees import map_state


def build(kind, size=5, seed=0):
    torch.manual_seed(seed)
    if kind is DNC:
        return DNC(size, 6, word_size=4, memory_size=7, heads=2)
    return LSTM(size, 6, heads=2) if kind is LSTM else kind(size, 6)


def leaves(state):
    found = []
    map_state(state, lambda tensor: found.append(tensor) or tensor)
    return found


def random_state(cell, batch, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return map_state(
        cell.init_state((batch,)), lambda s: torch.randn(s.shape, generator=generator, dtype=s.dtype).detach()
    )


@pytest.mark.parametrize("kind", CELLS)
def test_step_leaves_its_arguments_alone(kind):
    cell = build(kind)
    u, state = cell.project(torch.randn(3, 5)).detach(), random_state(cell, 3)
    before = [t.clone() for t in leaves(state)]
    u_before = u.clone()
    cell.step(u, state)
    assert torch.equal(u, u_before)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves(state)))


@pytest.mark.parametrize("kind", CELLS)
def test_step_works_under_any_leading_axes_and_treats_rows_alone(kind):
    cell = build(kind).double()
    u = cell.project(torch.randn(4, 3, 5, dtype=torch.float64))
    states = map_state(random_state(cell, 12), lambda s: s.view(4, 3, *s.shape[1:]))
    together = leaves(cell.step(u, states))
    for a in range(4):
        for b in range(3):
            alone = leaves(cell.step(u[a, b], map_state(states, lambda s, a=a, b=b: s[a, b])))
            for whole, part in zip(together, alone):
                torch.testing.assert_close(whole[a, b], part, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", CELLS)
def test_vmap_of_a_step_is_a_loop_of_steps(kind):
    cell = build(kind).double()
    u, states = cell.project(torch.randn(3, 5, dtype=torch.float64)), random_state(cell, 3)
    mapped = leaves(torch.vmap(cell.step)(u, states))
    for i in range(3):
        alone = leaves(cell.step(u[i], map_state(states, lambda s, i=i: s[i])))
        for a, b in zip(mapped, alone):
            torch.testing.assert_close(a[i], b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", CELLS)
def test_the_state_keeps_its_structure_and_shapes(kind):
    cell = build(kind)
    state = cell.init_state((3,))
    after = cell.step(cell.project(torch.randn(3, 5)), state)
    assert type(after) is type(state)
    assert [t.shape for t in leaves(after)] == [t.shape for t in leaves(state)]
    assert cell.readout(after).shape == (3, cell.output_size)


@pytest.mark.parametrize("kind", CELLS)
def test_a_step_has_derivatives_that_finite_differences_confirm(kind):
    cell = build(kind).double()
    u = cell.project(torch.randn(2, 5, dtype=torch.float64)).detach().requires_grad_()
    state = [s.requires_grad_() for s in leaves(random_state(cell, 2))]
    template = cell.init_state((2,))

    def function(u, *parts):
        rest = iter(parts)
        after = cell.step(u, map_state(template, lambda s: next(rest)))
        return tuple(leaves(after))

    assert torch.autograd.gradcheck(function, (u, *state), eps=1e-6, atol=1e-6)


def count(cell, vocab=100):
    with torch.device("meta"):
        model = Recurrent(cell=cell(), vocab=vocab)
    assert all(p.is_meta for p in model.parameters())
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "hidden, heads, vocab, published",
    [
        (240, 12, 100, 150_740),
        (1_600, 32, 100, 1_139_700),
        (9_600, 64, 100, 10_627_700),
        (66_000, 220, 100, 112_606_100),
        (297_500, 350, 100, 1_162_045_100),
        (1_000_000, 1_000, 100, 4_506_010_100),
        (131_072, 256, 50_260, 6_914_405_668),
    ],
)
def test_lstm_counts_are_those_of_the_paper(hidden, heads, vocab, published):
    assert count(lambda: LSTM(100, hidden, heads=heads), vocab) == published


@pytest.mark.parametrize(
    "scale, published",
    [
        (1, 304_357),
        (2, 1_132_901),
        (4, 4_362_853),
        (8, 17_114_213),
        (16, 67_782_757),
        (32, 269_783_141),
        (64, 1_076_437_093),
        (128, 4_300_357_733),
    ],
)
def test_dnc_counts_are_those_of_the_paper(scale, published):
    width = 128 * scale
    assert count(lambda: DNC(width, width, word_size=width, memory_size=128)) == published


def test_memory_size_adds_no_parameters():
    counts = {m: sum(p.numel() for p in DNC(4, 4, word_size=3, memory_size=m).parameters()) for m in (1, 9)}
    assert len(set(counts.values())) == 1


def test_dnc_memory_rows_start_and_stay_different():
    """Content addressing keeps equal rows equal for ever; the reference's memory is one vector for that reason."""
    cell = build(DNC)
    state = cell.init_state((2,))
    distances = []
    for _ in range(50):
        state = cell.step(torch.randn(2, 5), state)
        distances.append(torch.pdist(state.memory[0]).min().item())
    assert min(distances) > 0
    weights = cell._address(cell.read_key_norm(torch.randn(2, 1, 4)), state.memory)
    assert weights.std(-1).min() > 0


def test_initial_memory_does_not_depend_on_the_seed_and_is_no_parameter():
    a, b = build(DNC, seed=0), build(DNC, seed=1)
    assert torch.equal(a.rows, b.rows)
    assert not torch.equal(a.weight_ih, b.weight_ih)
    assert "rows" not in dict(a.named_parameters())


def test_lstm_heads_are_independent_lstms():
    cell = build(LSTM)
    u = torch.randn(3, 24)
    state = random_state(cell, 3)
    together = cell.step(u, state)
    for n in range(2):
        alone = LSTM(5, 3)
        with torch.no_grad():
            alone.weight_hh.copy_(cell.weight_hh[12 * n : 12 * n + 12])
        part = alone.step(u[:, 12 * n : 12 * n + 12], type(state)(*(s[:, 3 * n : 3 * n + 3] for s in state)))
        torch.testing.assert_close(together.h[:, 3 * n : 3 * n + 3], part.h)
        torch.testing.assert_close(together.c[:, 3 * n : 3 * n + 3], part.c)


def test_gru_is_torchs():
    cell, torchs = build(GRU), torch.nn.GRUCell(5, 6)
    with torch.no_grad():
        for name, parameter in torchs.named_parameters():
            parameter.copy_(getattr(cell, name))
    x, h = torch.randn(3, 5), torch.randn(3, 6)
    torch.testing.assert_close(cell.step(cell.project(x), h), torchs(x, h))


def test_bad_sizes_name_the_argument():
    with pytest.raises(UsageError, match="hidden_size=10 is not divisible by heads=3"):
        LSTM(4, 10, heads=3)
    with pytest.raises(UsageError, match="hidden_size=0 must be greater than zero"):
        RNN(4, 0)
    with pytest.raises(UsageError, match="memory_size=-1 must be"):
        DNC(4, 4, 4, -1)


def test_a_function_is_a_cell():
    class Mixer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3, 3))

        def advance(self, u, state):
            return torch.tanh(u + state @ self.weight)

    mixer = Mixer()
    cell = cell_from(mixer.advance, 3)
    assert isinstance(cell, Cell)
    assert [name for name, _ in cell.named_parameters()] == ["module.weight"]
    assert cell_from(lambda u, s: s, 3, module=mixer).module is mixer
    with pytest.raises(UsageError, match="state_size=0"):
        cell_from(lambda u, s: s, 0)
    with pytest.raises(UsageError, match="step=3 must be a function"):
        cell_from(3, 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        torch.nn.GRUCell,
        torch.nn.LSTMCell,
        torch.nn.RNNCell,
        lambda *a, **k: torch.nn.RNNCell(*a, nonlinearity="relu", **k),
    ],
)
def test_kernels_for_whole_sequences_serve_torchs_own_cells(make, bias):
    from reroll.cells import cell_from
    from reroll.rollout import Sequential

    torch.manual_seed(0)
    module, x = make(5, 6, bias=bias), torch.randn(3, 40, 5)
    cell = cell_from(module, 6)
    assert cell.fused(x, cell.init_state((3,))) is not None
    (outputs, final), (truth, last) = Sequential().read(cell, x), Sequential(kernel="reference").read(cell, x)
    torch.testing.assert_close(outputs, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(final, last, rtol=1e-5, atol=1e-5)
    parameters = list(module.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (outputs, truth))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM])
@torch.no_grad()
def test_a_kernel_for_whole_sequences_is_only_used_for_the_step_it_was_written_for(kind):
    from reroll.rollout import Sequential, auto, quasi_deer

    def halved(self, u, state):
        after = kind.step(self, u, state)
        return type(after)(*(0.5 * part for part in after)) if kind is LSTM else 0.5 * after

    class Mixin:
        step = halved

    torch.manual_seed(0)
    x = torch.randn(2, 300, 3)
    for cell in (type("Subclass", (kind,), {"step": halved})(3, 4), type("Mixed", (Mixin, kind), {})(3, 4), kind(3, 4)):
        for rollout in (Sequential(), auto(), quasi_deer()):
            before = rollout.read(cell, x)[0]  # whatever is remembered of a cell is of its old step
            if type(cell) is kind:
                cell.step = functools.partial(halved, cell)
            expected, final = Sequential(kernel="reference").read(cell, x)
            outputs, last = rollout.read(cell, x)
            torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-4)
            torch.testing.assert_close(last, final, rtol=0, atol=1e-4)
            if type(cell) is kind:
                assert (before - outputs).abs().max() > 1e-2
                del cell.step


@pytest.mark.parametrize("kind", [torch.nn.GRUCell, torch.nn.LSTMCell])
@pytest.mark.parametrize("how", ["subclass", "patch", "hook", "pre-hook"])
@torch.no_grad()
def test_a_torch_cell_whose_forward_was_replaced_is_called(kind, how):
    from reroll.rollout import Sequential, auto, quasi_deer

    def halved(state):
        return tuple(0.5 * part for part in state) if kind is torch.nn.LSTMCell else 0.5 * state

    def change(module):
        if how == "patch":
            forward = module.forward
            module.forward = lambda x, h: halved(forward(x, h))
        elif how == "hook":
            module.register_forward_hook(lambda module, arguments, result: halved(result))
        elif how == "pre-hook":
            module.register_forward_pre_hook(lambda module, arguments: (0.5 * arguments[0], arguments[1]))

    class Halved(kind):
        def forward(self, input, hx=None):
            return halved(super().forward(input, hx))

    torch.manual_seed(0)
    module, x = (Halved if how == "subclass" else kind)(3, 4), torch.randn(2, 300, 3)
    early = cell_from(module, 4)
    for rollout in (rollouts := (Sequential(), auto(), quasi_deer())):
        rollout.read(early, x)  # whatever is remembered of a cell is of the old forward
    change(module)
    state, expected = early.init_state((2,)), []
    for t in range(300):
        state = module(x[:, t], state)
        expected.append(early.readout(state))
    for cell in (early, cell_from(module, 4)):
        for rollout in rollouts:
            torch.testing.assert_close(rollout.read(cell, x)[0], torch.stack(expected, 1), rtol=0, atol=1e-4)
