"""The recurrent model: ways of running it that must agree, its first loss, its conversion to torch."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from reroll.cells import CELLS, DNC, GRU, LSTM, RNN, cell_from
from reroll.data.batch import START, Batch
from reroll.data.task import sequence_losses
from reroll.errors import UsageError
from reroll.models import Recurrent, roles
from reroll.outcome import Outcome
from reroll.rollout import ROLLOUTS, Sequential, auto
from reroll.trees import map_state
from tests.unit.test_cells import build, leaves


def model_of(kind, **options):
    return Recurrent(cell=build(kind), **{"vocab": 11, **options})


def symbols(*shape, high=11, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("batch, time", [(1, 1), (5, 7), (2, 0)])
def test_rollouts_agree(kind, batch, time):
    cell = build(kind).double()  # rollouts that iterate stop at 1e-9
    inputs = torch.randn(batch, time, 5, dtype=torch.float64)
    reference, final = Sequential(kernel="reference").read(cell, inputs)
    assert reference.shape == (batch, time, cell.output_size)
    for rollout in ROLLOUTS:
        outputs, end = rollout.read(cell, inputs)
        torch.testing.assert_close(outputs, reference, rtol=1e-5, atol=1e-6)
        trajectory = rollout(cell, inputs)
        torch.testing.assert_close(cell.readout(trajectory.states), reference, rtol=1e-5, atol=1e-6)
        for a, b, c in zip(leaves(end), leaves(trajectory.final), leaves(final)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)
        assert trajectory.converged.all() == (trajectory.outcome is Outcome.ok)


@pytest.mark.parametrize("kind", CELLS)
def test_a_reset_starts_a_new_sequence(kind):
    cell = build(kind)
    inputs = torch.randn(3, 8, 5)
    reset = torch.zeros(3, 8, dtype=torch.bool)
    reset[1, 3] = reset[1, 6] = reset[2, 0] = True
    rollout = Sequential()
    outputs, _ = rollout.read(cell, inputs, None, reset)
    plain, _ = rollout.read(cell, inputs)
    torch.testing.assert_close(outputs[0], plain[0])
    torch.testing.assert_close(outputs[2], plain[2])
    for begin, end in ((0, 3), (3, 6), (6, 8)):
        alone, _ = rollout.read(cell, inputs[1:2, begin:end])
        torch.testing.assert_close(outputs[1, begin:end], alone[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CELLS)
def test_step_by_step_equals_the_whole(kind):
    model, ids = model_of(kind), symbols(4, 9)
    whole = model(ids)
    state, steps = model.start(4), []
    for t in range(9):
        logits, state = model.step(ids[:, t], state)
        steps.append(logits)
    torch.testing.assert_close(torch.stack(steps, 1), whole, rtol=1e-5, atol=1e-5)
    first, state = model.advance(ids[:, :4])
    second, _ = model.advance(ids[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("vocab", [11, 300])
def test_first_loss_is_close_to_ln_v(kind, vocab):
    torch.manual_seed(3)
    cell = DNC(64, 64, 32, 16) if kind is DNC else kind(64, 64)
    model, ids = Recurrent(cell=cell, vocab=vocab), symbols(16, 33, high=vocab)
    loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss.item() - math.log(vocab)) < 0.2


@pytest.mark.parametrize("kind", CELLS)
def test_last_and_mean_readouts(kind):
    every = model_of(kind)
    ids = symbols(3, 10)
    present = torch.ones(3, 10, dtype=torch.bool)
    present[1, 6:] = False
    logits = every(ids)
    for readout, expected in [
        ("last", torch.stack([logits[0, 9], logits[1, 5], logits[2, 9]])),
        ("mean", torch.stack([logits[0].mean(0), logits[1, :6].mean(0), logits[2].mean(0)])),
    ]:
        every.readout = readout
        torch.testing.assert_close(every(ids, present=present), expected, rtol=1e-5, atol=1e-5)
        every.window_floats = 400  # windows of a few steps
        with torch.no_grad():
            assert every.time_chunk(3) < 10
            torch.testing.assert_close(every(ids, present=present), expected, rtol=1e-5, atol=1e-5)


def test_stacks_feed_one_another():
    torch.manual_seed(0)
    layers = (GRU(5, 6), LSTM(6, 8, heads=2), RNN(8, 4))
    model = Recurrent(cell=layers, inputs=5, outputs=3)
    x = torch.randn(2, 7, 5)
    features = x
    for cell in layers:
        features, _ = Sequential(kernel="reference").read(cell, features)
    torch.testing.assert_close(model(x), model.head(features), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("readout", ["every", "last", "mean"])
def test_the_head_maps_features_to_outputs(readout):
    model, ids = model_of(GRU, readout=readout), symbols(3, 6)
    assert torch.equal(model.head(model.features(ids)), model(ids))
    features, state = model.advance(ids, head=False)
    logits, expected = model.advance(ids)
    assert torch.equal(model.head(features), logits)
    assert all(torch.equal(a, b) for a, b in zip(leaves(state), leaves(expected)))
    assert not Recurrent(cell=GRU(3, 4), inputs=3).headed


class Cached(nn.Module):
    """A model with methods that are called like those of a `Stateful` one, for other reasons."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(7, 4), nn.Linear(4, 7)

    def forward(self, ids):
        return self.linear(self.embed(ids))

    def advance(self, ids, cache):
        raise AssertionError("advance was called")

    start = features = time_chunk = advance


def test_a_capability_is_declared_and_not_read_off_a_name():
    ids = symbols(2, 6, high=7)
    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones(2, 5, dtype=torch.bool))
    with torch.no_grad():
        assert sequence_losses(Cached(), batch).shape == (2,)
    with pytest.raises(UsageError, match="carry a state"):
        sequence_losses(Cached(), replace(batch, state=START))


class Step(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, u, state):
        return torch.tanh(self.linear(state) + u)


def test_roles_a_module_declares_come_before_those_of_its_shapes():
    class Declares(Cached):
        def roles(self):
            return {"linear.weight": "matrix"}

    model = nn.Sequential(Declares())
    assert roles(model) == {"0.embed.weight": "embedding", "0.linear.weight": "matrix", "0.linear.bias": "vector"}
    headless = roles(Recurrent(cell=cell_from(Step(), 3), inputs=3))
    assert [role for name, role in headless.items() if name.endswith("linear.weight")] == ["matrix"]
    Declares.roles = lambda self: {"oops": "matrix"}
    with pytest.raises(UsageError, match="oops"):
        roles(model)


@pytest.mark.parametrize("build_torch", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("layers, bias", [(1, True), (3, True), (2, False)])
def test_torch_modules_convert_both_ways(build_torch, layers, bias):
    torch.manual_seed(5)
    torchs = build_torch(4, 7, num_layers=layers, bias=bias, batch_first=True)
    x = torch.randn(3, 20, 4)
    model = Recurrent.from_torch(torchs)
    torch.testing.assert_close(model(x), torchs(x)[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.to_torch()(x)[0], torchs(x)[0], rtol=1e-6, atol=1e-6)


def test_heads_and_initial_state_survive_the_conversion_to_torch():
    torch.manual_seed(5)
    model = Recurrent(cell=(LSTM(4, 6, heads=3), LSTM(6, 6)), inputs=4)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    x = torch.randn(3, 9, 4)
    with pytest.raises(UsageError, match=r"to_torch\(initial=True\)"):
        model.to_torch()
    torchs, (h, c) = model.to_torch(initial=True)
    outputs, _ = torchs(x, (h.repeat(1, 3, 1), c.repeat(1, 3, 1)))
    torch.testing.assert_close(outputs, model(x), rtol=1e-6, atol=1e-6)


def test_what_torch_has_and_we_have_not_is_refused():
    with pytest.raises(UsageError, match="bidirectional=True"):
        Recurrent.from_torch(nn.LSTM(3, 4, bidirectional=True))
    with pytest.raises(UsageError, match="batch_first"):
        Recurrent.from_torch(nn.GRU(3, 4))
    patched, hooked = nn.GRU(3, 4, batch_first=True), nn.LSTM(3, 4, batch_first=True)
    patched.forward = lambda x: (x, x[:, -1])
    hooked.register_forward_pre_hook(lambda module, arguments: None)
    for module in (patched, hooked):
        with pytest.raises(UsageError, match=f"this {type(module).__name__} has a forward of its own, or hooks"):
            Recurrent.from_torch(module)
    with pytest.raises(UsageError, match="takes torch.nn.LSTM or torch.nn.GRU; got Linear"):
        Recurrent.from_torch(nn.Linear(3, 4))
    with pytest.raises(UsageError, match=r"these are GRU\(3, 4\), LSTM\(4, 4\)"):
        Recurrent(cell=(GRU(3, 4), LSTM(4, 4)), inputs=3).to_torch()


def test_generate_is_a_function_of_its_seed_and_leaves_the_generator_alone():
    model = model_of(GRU)
    before = torch.get_rng_state()
    a, b, c = (model.generate([1, 2, 3], 40, seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert model.generate(symbols(4, 2), 6).shape == (4, 6)


def test_generate_follows_the_distribution():
    model = model_of(RNN)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.log(torch.arange(1.0, 12.0)))
    expected = torch.arange(1.0, 12.0) / 66
    drawn = model.generate(symbols(200, 1), 100)
    frequency = torch.bincount(drawn.flatten(), minlength=11) / drawn.numel()
    assert (frequency - expected).abs().max() < 5 * (0.25 / drawn.numel()) ** 0.5
    assert set(model.generate([0], 200, top_k=2).tolist()) == {9, 10}
    assert set(model.generate([0], 50, temperature=0).tolist()) == {10}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompt=[], length=3), "at least one symbol"),
        (dict(prompt=[11], length=3), r"the vocabulary is \[0, 11\)"),
        (dict(prompt=[1], length=0), "length=0"),
        (dict(prompt=[1], length=1, temperature=-1), "temperature=-1"),
        (dict(prompt=[1], length=1, top_k=0), "top_k=0"),
    ],
)
def test_generate_names_bad_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        model_of(RNN).generate(**arguments)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(cell=()), "cell=.. is empty"),
        (dict(cell=RNN(4, 4)), "Give vocab .* or inputs"),
        (dict(cell=RNN(4, 4), vocab=3, inputs=3), "Give vocab .* or inputs"),
        (dict(cell=RNN(4, 4), vocab=3, embed=5), "embed=5 does not fit RNN with input_size=4"),
        (dict(cell=RNN(4, 4), inputs=3), "inputs=3 does not fit RNN with input_size=4"),
        (dict(cell=(RNN(4, 6), GRU(5, 5)), vocab=3), "RNN.output_size=6 does not fit GRU with input_size=5"),
        (dict(cell=RNN(4, 4), vocab=3, readout="first"), 'readout="first" must be'),
        (dict(cell=RNN(4, 4), vocab=0), "vocab=0 must be greater than zero"),
    ],
)
def test_sizes_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(UsageError, match=message):
        Recurrent(**arguments)


def test_wrong_inputs_are_named():
    with pytest.raises(UsageError, match=r"inputs has shape \(3,\); expected \[batch, time\] symbols"):
        model_of(RNN)(symbols(3))
    with pytest.raises(UsageError, match=r"expected \[batch, time, 2\]"):
        Recurrent(cell=RNN(2, 2), inputs=2)(torch.zeros(3, 2))


def test_a_function_cell_takes_the_dtype_of_its_inputs():
    model = Recurrent(cell=cell_from(lambda u, s: torch.tanh(s + u), 3), inputs=3)
    assert model(torch.randn(2, 4, 3, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("cell", [GRU, LSTM, RNN], ids=lambda c: c.__name__)
@pytest.mark.parametrize("method", ["project", "step", "readout"])
@pytest.mark.parametrize("mixed", [False, True], ids=["own", "of a mixin"])
def test_a_subclass_with_a_step_of_its_own_runs_no_kernel_of_its_parent(cell, method, mixed):
    def doubled(self, *arguments):
        value = getattr(cell, method)(self, *arguments)
        return map_state(value, lambda t: 2 * t)

    kinds, body = ((type("Mixin", (), {method: doubled}), cell), {}) if mixed else ((cell,), {method: doubled})
    changed = type("Changed", kinds, body)(3, 5)
    x, states = torch.randn(2, 7, 3), []
    state = changed.init_state((2,))
    for t in range(7):
        state = changed.step(changed.project(x[:, t]), state)
        states.append(changed.readout(state))
    for rollout in (Sequential(), auto()):
        with torch.no_grad():
            outputs, _ = rollout.read(changed, x)
        torch.testing.assert_close(outputs, torch.stack(states, 1), rtol=1e-5, atol=1e-5)
