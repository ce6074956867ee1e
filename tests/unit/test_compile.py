"""A GPT whose blocks are compiled: the same numbers and names, one graph for all blocks, and resumed as it was."""

import contextlib

import pytest
import torch
from torch.nn import functional

import reroll
from reroll.data import task
from reroll.data.synthetic import Copy
from reroll.errors import RunError, UsageError
from reroll.models import Interface
from reroll.train import checkpoint, loop, session
from reroll.train.config import resolve
from reroll.train.load import build_model
from reroll.train.loop import train
from reroll.train.records import read_config, read_metrics
from reroll.train.resume import open_session
from reroll.train.session import Session
from tests.runs import Abandoned, Interrupt, left, small

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch, when it reads one to trace


@pytest.fixture(autouse=True)
def graphs(monkeypatch):
    """Compile without a compiler; the list has an entry for every graph."""
    torch.compiler.reset()
    made = []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(session, "COMPILE", {"backend": backend})
    yield made
    torch.compiler.reset()


def gpt(compile, **sections):
    config = small(gradient="backprop", optim={"kind": "adamw", "lr": 0.01}, run={"compile": compile})
    return config.replace(model={"kind": "gpt", "layers": 3, "heads": 2, "width": 8}).replace(**sections)


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


def test_it_is_the_same_run(tmp_path, graphs):
    for compile in ("off", "on"):
        train(gpt(compile), tmp_path / compile)
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert left(tmp_path / "on")["weights"] == left(tmp_path / "off")["weights"]
    # Training, and held-out batches without a gradient: blocks share their graphs.
    assert len(graphs) == 2
    saved = checkpoint.newest(tmp_path / "on" / "checkpoints")
    config = resolve(gpt("off"))
    plain = build_model(config.model, Interface.of(config.task.build(7)), 0)
    assert saved.weights.keys() == dict(plain.named_parameters()).keys()
    assert torch.equal(reroll.load(tmp_path / "on").head.weight, saved.weights["head.weight"])


@pytest.mark.parametrize("how", ["signal", "abandoned"])
def test_it_is_resumed_compiled(tmp_path, graphs, how):
    train(gpt("on"), tmp_path / "straight")
    with contextlib.suppress(Abandoned):
        train(gpt("on"), tmp_path / "run", report=Interrupt(4, how))
    graphs.clear()
    torch.compiler.reset()
    train(gpt("on"), tmp_path / "run", resume=True)
    assert len(graphs) == 2
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")
    assert left(tmp_path / "run")["weights"] == left(tmp_path / "straight")["weights"]
    with pytest.raises(UsageError, match=r"run.compile='off', but the run to resume has 'on'"):
        train(gpt("off"), tmp_path / "run", resume=True)


def test_it_is_compiled_where_a_loss_stores_no_logits(tmp_path, monkeypatch, graphs):
    """Then the loss calls `features`, which compiling the module alone would not reach."""
    monkeypatch.setattr(task, "LOGITS", 1)
    train(gpt("on", run={"compile": "on", "steps": 1}), tmp_path)
    assert graphs


def test_automatic_is_decided_and_recorded(tmp_path, monkeypatch, graphs):
    train(gpt("auto"), tmp_path / "run")
    assert read_config(tmp_path / "run").run.compile == "off"
    assert not graphs
    opened, _ = open_session(resolve(gpt("auto")), tmp_path / "other")
    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: name)
    opened.device = torch.device("cuda")
    assert opened._compiles_well()
    for changed in (small(), small(gradient="backprop"), gpt("auto", gradient="probes")):
        opened.config = changed
        assert not opened._compiles_well()
    opened.config = gpt("auto")
    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: None)  # no Triton
    assert not opened._compiles_well()


@pytest.mark.parametrize("config", [small(), small(gradient="backprop"), gpt("on", gradient="probes")])
def test_other_models_and_gradients_are_refused(config):
    with pytest.raises(UsageError, match="compile=on is for model=gpt by gradient=backprop"):
        resolve(config.replace(run={"compile": "on"}))


def test_a_gpt_of_ones_own_is_compiled_by_its_method(tmp_path, graphs):
    copy = Copy(length=3, batch=4)
    model = reroll.GPT(copy.vocab, layers=2, heads=1, width=4)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    names = list(dict(model.named_parameters()))
    model.compile(**session.COMPILE)
    train(Session.of(copy, model, reroll.Backprop(), sgd, steps=2), tmp_path / "run")
    assert graphs
    assert sorted(checkpoint.newest(tmp_path / "run" / "checkpoints").weights) == sorted(names)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own compiler says so of itself
def test_compiled_code_has_the_gradients_of_the_plain_one():
    """By the default backend of torch, with the C++ compiler that is here."""
    ids = torch.randint(19, (3, 8))
    plain = reroll.GPT(vocab=19, layers=2, heads=1, width=8, zero_init=False)
    compiled = reroll.GPT(vocab=19, layers=2, heads=1, width=8)
    compiled.load_state_dict(plain.state_dict())
    compiled.compile()
    for model in (plain, compiled):
        functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    for p, q in zip(plain.parameters(), compiled.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)


def test_what_is_compiled_is_looked_at_uncompiled(tmp_path):
    """Hooks are not seen by compiled code, so where a loss that is not finite comes from is looked for without."""
    opened, _ = open_session(resolve(gpt("on")), tmp_path / "run")
    opened.plan()
    with torch.no_grad():
        opened.loss_fn(opened.model, opened.batch(0))
        opened.model.blocks[1].up.weight.fill_(torch.nan)
    with pytest.raises(RunError, match="the weight blocks.1.up.weight; then the output of blocks.1.up"):
        loop.take_step(opened)
