"""Whatever is not finite is named: the step, and the first tensor, of a weight, an output or a gradient."""

import math

import pytest
import torch
from torch import nn

import reroll
from reroll import Key, cells
from reroll.data.batch import Batch
from reroll.data.synthetic import Copy
from reroll.data.task import sequence_losses
from reroll.errors import RunError
from reroll.optim import step
from reroll.train import guard, loop
from reroll.train.config import resolve
from reroll.train.loop import train
from reroll.train.resume import open_session
from reroll.train.session import Session
from tests.runs import small


def gpt():
    return reroll.GPT(vocab=11, layers=3, heads=1, width=6, zero_init=False)


def lstm():
    return reroll.Recurrent(cell=(cells.LSTM(5, 8), cells.LSTM(8, 8)), vocab=11)


def symbols():
    ids = torch.randint(11, (3, 7))
    return Batch(ids[:, :-1], ids[:, 1:], torch.ones(3, 6, dtype=torch.bool))


POISONED = [
    (gpt, "blocks.1.up.weight", "the output of blocks.1.up"),
    (gpt, "embed.weight", "the output of embed"),
    (gpt, "head.weight", "the output of head"),
    (lstm, "embed.weight", "the output of embed"),
    (lstm, "cells.1.w_hh", "the input of head"),  # no module is called in between
    (lstm, "head.bias", "the output of head"),
]


@pytest.mark.parametrize("make, weight, output", POISONED)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_poisoned_weight_is_named_and_what_it_reaches_first(make, weight, output, value, parts):
    model, batch = make(), symbols()
    names = [name for name, _ in model.named_parameters()]
    weight = weight if weight in names else next(name for name in names if name.startswith("cells.1"))
    with torch.no_grad():
        # All of it: one infinite entry of an embedding may be of a symbol that the batch doesn't have.
        dict(model.named_parameters())[weight].fill_(value)
    said = guard.describe(model, sequence_losses, batch, Key(0), parts)
    assert said == f"First tensor that is not finite: the weight {weight}; then {output}."
    assert all(not module._forward_hooks for module in model.modules())


def test_an_output_is_named_where_all_weights_are_finite():
    model = gpt()
    with torch.no_grad():
        model.blocks[2].up.weight.fill_(1e30)
    # 1e30² overflows between `up` and `down`.
    said = guard.describe(model, sequence_losses, symbols(), Key(0))
    assert said == "First tensor that is not finite: the input of blocks.2.down."


def test_what_is_finite_is_not_blamed():
    assert "and their loss are finite" in guard.describe(gpt(), sequence_losses, symbols(), Key(0))
    said = guard.first_output(gpt(), lambda m, b: sequence_losses(m, b) * math.nan, symbols(), Key(0))
    assert said == "the loss, though every module's output is finite"
    inputs = torch.tensor([[1.0, math.nan]])
    assert guard.first_output(nn.Linear(2, 1), lambda m, x: m(x).mean(), inputs, Key(0)) == "the inputs of the batch"


class Masked(nn.Module):
    """Attention weights of six scores behind a causal mask: a buffer, and an output, that are −∞ on purpose."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scores, self.mask, self.out = nn.Linear(6, 6), nn.Identity(), nn.Linear(6, 1)
        self.register_buffer("causal", torch.full((6, 6), -torch.inf).triu(1))
        self.scale = scale

    def forward(self, x):
        return self.out(self.mask(self.scores(x) + self.causal).softmax(-1)) * self.scale


def test_what_is_infinite_on_purpose_is_not_blamed():
    model, x = Masked(), torch.randn(6, 6)
    loss_fn = lambda model, x: model(x).mean()
    assert "and their loss are finite" in guard.describe(model, loss_fn, x, Key(0))
    with torch.no_grad():
        model.out.weight[0, 2] = math.nan
    said = guard.describe(model, loss_fn, x, Key(0))
    assert said == "First tensor that is not finite: the weight out.weight; then the output of out."
    assert guard.first_output(Masked(math.nan), loss_fn, x, Key(0)) == "the output of the model"
    model = Masked()
    model.causal[2, 1] = math.nan
    assert guard.first_weight(model) == "the buffer causal"
    # −1e30² overflows, and nothing else follows, all the way to the loss.
    big = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Identity())
    for p, value in zip(big.parameters(), (1e30, 1e30, -1e30, -1e30)):
        nn.init.constant_(p, value)
    assert guard.first_output(big, loss_fn, torch.ones(2, 1), Key(0)) == "the output of 1"


class Mapped(nn.Module):
    """Its inner module is called where no value can be looked at."""

    def __init__(self, vocab):
        super().__init__()
        self.inner, self.scale = nn.Linear(1, vocab), nn.Parameter(torch.ones(()))

    def forward(self, ids):
        return torch.vmap(self.inner)(ids[..., None].float()) * self.scale


@pytest.mark.parametrize("at", [0, 2])
def test_a_search_that_fails_leaves_the_reason(tmp_path, at):
    copy = Copy(length=3, batch=4)
    model = Mapped(copy.vocab)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    session = Session.of(copy, model, reroll.Backprop(), sgd, steps=5)

    class Poison(loop.Reporter):
        def step(self, row, config):
            if row["step"] + 1 == at:
                nn.init.constant_(model.scale, math.nan)

    if at == 0:
        nn.init.constant_(model.scale, math.nan)
        with pytest.raises(RunError) as error:
            train(session, tmp_path / "run")
        reason = str(error.value)
    else:
        summary = train(session, tmp_path / "run", report=Poison())
        assert summary["state"] == "diverged"
        reason = summary["reason"]
    assert reason.startswith(f"The loss is not finite at step {at + 1}. Lower lr")
    assert "the weight scale. Where it arises could not be looked for (RuntimeError: " in reason


def test_looking_changes_nothing():
    model, inputs = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1)), torch.randn(5, 4)
    before, state = {n: t.clone() for n, t in model.state_dict().items()}, torch.get_rng_state()
    guard.first_output(model, lambda m, x: m(x).mean() * math.nan, inputs, Key(0))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_first_gradient_that_is_not_finite_is_named(clip):
    model = gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(model, batch):
        """√0 has an infinite derivative; in the model's order `key` comes before `down`."""
        zero = 0 * (model.blocks[2].down.weight.sum() + model.blocks[1].attention.key.weight.sum())
        return sequence_losses(model, batch) + zero.sqrt()

    result = step(model, loss_fn, reroll.Backprop(), optimizer, symbols(), None, Key(0), clip=clip)
    assert (result.outcome.name, result.where) == ("gradient_not_finite", "blocks.1.attention.key.weight")
    fine = step(model, sequence_losses, reroll.Backprop(), optimizer, symbols(), None, Key(0), clip=clip)
    assert (fine.outcome.name, fine.where) == ("ok", "")


@pytest.mark.parametrize("method", ["backprop", "probes"])
@pytest.mark.parametrize("at", [0, 2])
def test_a_run_names_step_and_tensor(tmp_path, method, at):
    session, _ = open_session(resolve(small(gradient=method)), tmp_path / "run")
    session.plan()
    for _ in range(at):
        loop.take_step(session)
    with torch.no_grad():
        session.model.head.bias.fill_(math.nan)
    said = f"The loss is not finite at step {at + 1}. "
    first = "First tensor that is not finite: the weight head.bias; then the output of head."
    if at == 0:
        with pytest.raises(RunError) as error:
            loop.take_step(session)
        reason = str(error.value)
    else:
        reason = loop.take_step(session)["reason"]
    assert reason.startswith(said)
    assert reason.endswith(first)


@pytest.mark.parametrize("method", [{"kind": "backprop", "accumulate": 3}, {"kind": "probes", "micro_batch": 1}])
def test_it_takes_no_more_memory_than_the_step(tmp_path, method):
    """The batch of three is looked at in the pieces that the step cut it into."""
    session, _ = open_session(resolve(small(gradient=method)), tmp_path / "run")
    session.plan()
    loss_fn, sizes = session.loss_fn, []

    def bad(model, batch):
        sizes.append(len(batch))
        return loss_fn(model, batch) * (math.nan if lost else 1.0)

    lost = session.loss_fn = bad
    with pytest.raises(RunError, match="the loss, though every module's output is finite"):
        loop.take_step(session)
    assert set(sizes) == {1}
    lost = None
    sizes.clear()
    assert "their loss are finite" in loop._source(session, session.batch(0), Key(0))
    assert sizes == [1, 1, 1]


def test_a_refused_gradient_is_named_in_its_row_and_in_the_end(tmp_path, monkeypatch):
    rows, notes, backprop = [], [], reroll.Backprop.__call__

    def bad(self, model, loss_fn, batch, key):
        estimate = backprop(self, model, loss_fn, batch, key)
        model.head.weight.grad[0, 0] = math.nan
        return estimate

    class Keep(loop.Reporter):
        def step(self, row, config):
            rows.append(row)

        def note(self, line):
            notes.append(line)

    monkeypatch.setattr(reroll.Backprop, "__call__", bad)
    summary = train(small(gradient="backprop"), tmp_path / "run", report=Keep())
    assert [row["not_finite"] for row in rows] == ["head.weight"] * 5
    named = "The first such gradient is that of head.weight."
    assert any(line.startswith("step 1: ") and named in line for line in notes)
    assert "up to step 5" in summary["reason"]
    assert summary["reason"].endswith(named)


def test_nothing_is_looked_for_in_a_healthy_run(tmp_path, monkeypatch):
    for name in ("describe", "first_weight", "first_output"):
        monkeypatch.setattr(guard, name, None)
    assert train(small(gradient="backprop"), tmp_path / "run")["state"] == "done"
