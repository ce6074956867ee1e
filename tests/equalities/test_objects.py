"""A run of one's own objects is a run: recorded, killed, resumed to the same bits, replayed, by one writer."""

import pytest
import torch
from torch import nn

import reroll
from reroll import Backprop, CentralDifference, Key
from reroll.data.batch import Batch
from reroll.data.task import Task
from reroll.errors import RunError, UsageError
from reroll.grad.evaluate.snapshot import seeded_generators
from reroll.train import Session, checkpoint, train
from reroll.train.evaluate import evaluate
from reroll.train.load import load
from reroll.train.mesh import Mesh
from reroll.train.records import read_config, read_metrics
from reroll.train.replay import replay
from tests.runs import TIMING, Abandoned, Interrupt, differences, left, small

pytestmark = pytest.mark.usefixtures("quick_steps")


class Largest(Task):
    """Which of five symbols is the largest: a task that is nobody else's, with a loss of its own."""

    fingerprint = "largest"

    def make(self, step, split, length, unit):
        generator = torch.Generator().manual_seed(1000 * (split == "valid") + step)
        ids = torch.randint(9, (6, 5), generator=generator)
        return Batch(ids, ids.amax(1), torch.ones(6, dtype=torch.bool))

    def batches(self, split):
        return 2

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(batch.inputs), batch.targets, reduction="none", label_smoothing=0.1)


class Net(nn.Module):
    """Somebody's module, with a row for padding, a frozen weight and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed, self.gru = nn.Embedding(9, 6, padding_idx=0), nn.GRU(6, 8, batch_first=True)
        self.head = nn.Linear(8, 9)
        self.gru.bias_hh_l0.requires_grad_(False)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, ids):
        return self.head(self.gru(self.embed(ids) * self.scale)[0][:, -1])


ESTIMATORS = {
    "probes": lambda: CentralDifference(5, 0.02, noise="sparse", density=0.5, threads=1),
    "backprop": Backprop,
    "own": lambda: lambda model, loss_fn, batch, key: Backprop(accumulate=2)(model, loss_fn, batch, key),
}


def session(name="probes", steps=9, **options):
    with seeded_generators(3):
        model = Net()
    groups = [
        {"params": [*model.embed.parameters(), *model.gru.parameters()]},
        {"params": model.head.parameters(), "lr": 0.2},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    options = {"clip": 2.0, "eval_every": 3, "checkpoint_every": 2, "threads": 1} | options
    return Session.of(Largest(), model, ESTIMATORS[name](), optimizer, steps=steps, seed=7, **options)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_run_of_objects_is_resumed_to_the_same_bits(tmp_path, name):
    summary = train(session(name), tmp_path / "straight")
    rows = list(read_metrics(tmp_path / "straight"))
    assert (summary["state"], len(rows), "valid_accuracy" in rows[2]) == ("done", 9, True)
    path = tmp_path / "run"
    for step, how in ((3, "abandoned"), (5, "signal"), (None, "")):
        try:
            train(session(name), path, resume=path.exists(), report=Interrupt(step, how))
        except Abandoned:
            assert how == "abandoned"
    assert differences(left(tmp_path / "straight"), left(path)) == []
    with pytest.raises(UsageError, match=r"optim\.clip=1\.0"):
        train(session(name, clip=1.0), path, resume=True)


def test_steps_of_objects_are_those_of_a_loop_of_ones_own(tmp_path):
    train(session("backprop", schedule={"kind": "linear", "warmup": 2}), tmp_path)
    mine = session("backprop").model
    rates = [row["lr"] for row in read_metrics(tmp_path)]
    groups = [{"params": [*mine.embed.parameters(), *mine.gru.parameters()]}, {"params": mine.head.parameters()}]
    optimizer, task = torch.optim.SGD(groups, lr=0.1, momentum=0.9), Largest()
    for step, rate in enumerate(rates):
        optimizer.zero_grad()
        task.loss(mine, task.batch(step)).mean().backward()
        nn.utils.clip_grad_norm_(mine.parameters(), 2.0)
        for group, scale in zip(optimizer.param_groups, (1, 2)):
            group["lr"] = rate * scale
        optimizer.step()
    weights = checkpoint.newest(tmp_path / "checkpoints").weights
    for name, tensor in checkpoint.weights_of(mine).items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("average", [None, 0.9])
def test_a_run_of_objects_is_replayed_with_the_same_objects(tmp_path, average):
    train(session(average=average, checkpoint_every=1, keep=20), tmp_path)
    for saved in map(checkpoint.read, checkpoint.all_of(tmp_path / "checkpoints")):
        again = session()
        model, steps = replay(tmp_path, saved.step, again)
        assert (model is again.model, steps) == (True, saved.step)
        assert checkpoint.checksum(checkpoint.weights_of(model)) == checkpoint.checksum(saved.weights)
    for call in (lambda: replay(tmp_path), lambda: load(tmp_path)):
        with pytest.raises(UsageError, match=r"test_objects\.Net"):
            call()
    assert read_config(tmp_path).task.kind == "object"


@pytest.mark.parametrize("average", [None, 0.9])
def test_the_weights_of_a_run_of_objects_come_back_into_a_module(tmp_path, average):
    """What a command line cannot do, in two calls: load, and evaluate."""
    summary = train(session(average=average), tmp_path / "run")
    with seeded_generators(8):
        model = Net().train()
    assert load(tmp_path / "run", model) is model
    assert not model.training
    assert evaluate(model, Largest(), "valid")["loss"] == pytest.approx(summary["valid_loss"], rel=1e-6)
    with pytest.raises(UsageError, match=r"reroll\.load\(run, model\).*evaluate\(model, task, 'valid'\).*resume=True"):
        load(tmp_path / "run")
    with pytest.raises(RunError, match="shape|weights"):
        load(tmp_path / "run", nn.Linear(2, 3))


def test_an_estimator_that_no_config_describes_keeps_no_journal(tmp_path):
    train(session("own"), tmp_path)
    assert not (tmp_path / "journal").exists()
    with pytest.raises(UsageError, match="cannot be replayed"):
        replay(tmp_path, session=session("own"))


def test_the_probes_of_objects_are_named_by_the_seed(tmp_path):
    train(session(), tmp_path)
    model = session().model
    batch, estimator = Largest().batch(0), ESTIMATORS["probes"]()
    estimate = estimator(model, Largest().loss, batch, Key(7).at(0))
    assert next(iter(read_metrics(tmp_path)))["loss"] == float(estimate.loss)


def backwards(here, evaluator, units):
    """An executor that is not threads: the last unit first."""
    return here(evaluator, units[::-1])[::-1]


class Follower(Mesh):
    """A process that is not the first, as far as it can be one alone."""

    writes = False


@pytest.mark.parametrize("of", ["objects", "config"])
def test_only_one_process_of_a_mesh_writes(tmp_path, of):
    """The others take the same steps, whoever evaluates their units, and leave nothing."""
    summaries = []
    for name, mesh in {"0": Mesh(), "1": Follower(execute=backwards)}.items():
        what, options = (session(mesh=mesh), {}) if of == "objects" else (small(), {"mesh": mesh})
        summaries.append(train(what, tmp_path / name, **options))
    assert not (tmp_path / "1").exists()
    a, b = ({k: v for k, v in summary.items() if k not in TIMING} for summary in summaries)
    assert differences(a, b) == []


def test_it_can_be_printed_before_it_is_trained():
    assert repr(session()).startswith("Session(")


def test_a_rate_of_zero_is_refused():
    module = Net()
    with pytest.raises(UsageError, match="lr=0.0 must be greater than zero"):
        Session.of(Largest(), module, Backprop(), torch.optim.SGD(module.parameters(), lr=0.0), steps=3)


def test_it_is_public():
    assert reroll.Session is Session
    assert reroll.train.train is train


def test_what_is_no_object_of_its_kind_is_one_line():
    task, net = small().task.build(0), nn.Linear(2, 2)
    right = {
        "task": task,
        "model": net,
        "estimator": Backprop(),
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
    }
    for name, value in (("task", "copy"), ("model", None), ("estimator", "probes"), ("optimizer", None)):
        with pytest.raises(UsageError, match=f"{name}={value!r} must be a "):
            Session.of(**right | {name: value}, steps=1)
