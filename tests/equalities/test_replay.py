"""Weights made again from seed and journal are the run's, bit for bit, at every step, and without the run's data."""

import math

import pytest
import torch

import reroll
from reroll.cli import main
from reroll.errors import RunError, UsageError
from reroll.grad.base import Seeded, trainable
from reroll.models import Interface
from reroll.specs.task import Generated
from reroll.train import checkpoint, journal, load
from reroll.train import replay as replaying
from reroll.train.loop import train
from reroll.train.records import read_config, read_metrics
from reroll.train.replay import replay
from tests.runs import Abandoned, Interrupt, interrupted, left, small, write_text

pytestmark = pytest.mark.usefixtures("quick_steps")

STEPS = 6
CASES = {
    "fused": dict(optim={"momentum": 0.0}),
    "fused-decay": dict(optim={"momentum": 0.0, "weight_decay": 0.2}),
    "sgd-stream": dict(optim={"momentum": 0.0, "update": "stream", "weight_decay": 0.2}),
    "sgd-write": dict(optim={"momentum": 0.0, "update": "write"}),
    "momentum": dict(optim={"momentum": 0.9, "weight_decay": 0.2}),
    "momentum-write": dict(optim={"momentum": 0.9, "update": "write"}),
    "adamw": dict(optim={"kind": "adamw", "lr": 0.02, "weight_decay": 0.2, "betas": (0.8, 0.9)}),
    "adamw-write": dict(optim={"kind": "adamw", "lr": 0.02, "update": "write"}),
    "muon": dict(optim={"kind": "muon", "lr": 0.02, "weight_decay": 0.2}),
    "muon-write": dict(optim={"kind": "muon", "lr": 0.02, "update": "write"}),
    "clip": dict(optim={"clip": 0.3}),
    "clip-fused": dict(optim={"clip": 0.3, "momentum": 0.0}),
    "batched": dict(gradient={"evaluate": "batched", "chunk": 2}),
    "tiles": dict(gradient={"evaluate": "tiles"}),
    "in_place": dict(gradient={"evaluate": "in_place"}),
    "grid": dict(gradient={"evaluate": "in_place", "restore": "grid"}),
    "grid-fused": dict(gradient={"evaluate": "in_place", "restore": "grid"}, optim={"momentum": 0.0}),
    "grid-adamw": dict(gradient={"evaluate": "in_place", "restore": "grid"}, optim={"kind": "adamw", "lr": 0.02}),
    "grid-unused": dict(gradient={"evaluate": "tiles", "restore": "grid"}),
    "normal": dict(gradient={"noise": "normal"}),
    "sparse": dict(gradient={"noise": "sparse", "density": 0.25}),
    "rank": dict(gradient={"shaping": "rank"}),
    "one-sided": dict(gradient={"difference": "one_sided"}),
    "split": dict(gradient={"batch": "split"}),
    "many-probes": dict(gradient={"probes": 131, "sums": "fp64"}),
    "tied-epsilon": dict(
        gradient={"epsilon": None}, optim={"schedule": {"kind": "cosine", "warmup": 2}, "plateau": 1, "lr": 0.01}
    ),
    "average": dict(optim={"average": 0.9}),
    "bf16": dict(run={"dtype": "bf16"}),
    "searched": dict(optim={"lr": "auto", "search_low": 0.01, "search_high": 0.1, "search_steps": 2}),
    "gru-stack": dict(model={"kind": "gru", "layers": 2}),
    "dnc": dict(model={"kind": "dnc", "word_size": 3, "memory_size": 4}, optim={"lr": 0.01}),
}  # fmt: skip


def recorded(path, config, **options):
    """Train with a checkpoint of every step; return the checksums of the weights by step."""
    every = {"checkpoint_every": 1, "keep": 100, "eval_every": 50, "diverged": 1e9}
    train(config.replace(run={"steps": STEPS, **every}), path, **options)
    saved = map(checkpoint.read, checkpoint.all_of(path / "checkpoints"))
    found = {s.step: checkpoint.checksum(s.weights) for s in saved}
    assert sorted(found) == list(range(1, STEPS + 1))
    return {0: journal.read(path / "journal").header["initial"], **found}


def replayed(path):
    return {step: checkpoint.checksum(checkpoint.weights_of(replay(path, step)[0])) for step in range(STEPS + 1)}


def initial_of(config):
    return load.build_model(config.model, Interface.of(config.task.build(0)), 11)


@pytest.fixture
def without_data(monkeypatch):
    """Whoever asks for data fails."""

    def forget():
        monkeypatch.setattr(Generated, "build", lambda *arguments: pytest.fail("a replay needs no data"))

    return forget


@pytest.mark.parametrize("name", CASES)
def test_every_step_is_made_again(tmp_path, without_data, name):
    expected = recorded(tmp_path, small(**CASES[name]))
    assert len(set(expected.values())) == STEPS + 1
    without_data()
    assert replayed(tmp_path) == expected


@pytest.mark.filterwarnings("ignore:ε, tied to the learning rate", "ignore:The two losses")
def test_an_epsilon_that_had_to_be_raised_is_recorded_as_it_was_raised(tmp_path):
    """With restore="grid" it is what the grid of the weights is made from."""
    gradient = {"epsilon": None, "epsilon_min": 1e-12, "evaluate": "in_place", "restore": "grid"}
    expected = recorded(tmp_path, small(gradient=gradient, optim={"lr": 1e-9, "momentum": 0.0}))
    records = list(journal.read(tmp_path / "journal").iterate())
    assert all(record.settings.epsilon > 1e-8 for record in records)
    assert replayed(tmp_path) == expected


def test_the_grid_of_a_step_that_was_not_taken_is_made_again(tmp_path, monkeypatch):
    """It rounds the weights by an ε of its own, and the next step rounds them again by another."""
    seen = []
    monkeypatch.setattr(Seeded, "is_finite", lambda *args: seen.append(0) or len(seen) != 1)
    gradient = {"epsilon": None, "epsilon_min": 1e-12, "evaluate": "in_place", "restore": "grid"}
    config = small(gradient=gradient, optim={"lr": 0.5, "momentum": 0.0, "schedule": "cosine"})
    expected = recorded(tmp_path, config)
    assert [bool(taken.terms) for taken in journal.read(tmp_path / "journal").iterate()] == [False] + 5 * [True]
    assert replayed(tmp_path) == expected


@pytest.mark.parametrize("options", [{}, {"carry": True}, {"carry": True, "episode": 4}], ids=str)
def test_a_text_may_be_gone(tmp_path, monkeypatch, options):
    cache, path = tmp_path / "cache", tmp_path / "run"
    monkeypatch.setenv("REROLL_CACHE", str(cache))
    text = write_text(tmp_path / "text.txt")
    task = {"kind": "text", "path": str(text), "tokenizer": "char", "length": 5, "carry": options.get("carry", False)}
    expected = recorded(path, small(task=task, gradient={"episode": options.get("episode")}))
    text.unlink()
    for file in [file for file in cache.rglob("*") if file.is_file()]:
        file.unlink()
    assert replayed(path) == expected
    keys = [record.terms[0].key for record in journal.read(path / "journal").iterate()]
    assert len(set(keys)) == (2 if "episode" in options else STEPS)


def test_initial_weights_of_another_run_are_kept(tmp_path):
    train(small(run={"seed": 1}), tmp_path / "first")
    init = checkpoint.newest(tmp_path / "first" / "checkpoints").weights
    expected = recorded(tmp_path / "run", small(), init=init)
    assert expected[0] == checkpoint.checksum(init)
    assert replayed(tmp_path / "run") == expected


def test_a_resumed_run_is_made_again(tmp_path):
    interrupted(small(), tmp_path / "run", (1, "signal"), (6, "abandoned"))
    model, steps = replay(tmp_path / "run")
    assert steps == 9
    assert checkpoint.checksum(checkpoint.weights_of(model)) == left(tmp_path / "run")["weights"]


def test_a_run_that_is_gone_is_made_again_to_its_last_whole_step(tmp_path, caplog):
    with pytest.raises(Abandoned):
        train(small(), tmp_path / "run", report=Interrupt(6, "abandoned"))
    train(small(run={"checkpoint_every": 1, "keep": 9}), tmp_path / "whole")
    data = (tmp_path / "run" / "journal").read_bytes()
    (tmp_path / "run" / "journal").write_bytes(data[:-1])
    model, steps = replay(tmp_path / "run")
    assert "last record is incomplete" in caplog.text
    assert steps == 6
    expected = checkpoint.read(tmp_path / "whole" / "checkpoints" / "step-00000006")
    assert checkpoint.checksum(checkpoint.weights_of(model)) == checkpoint.checksum(expected.weights)


def exponent(largest, epsilon):
    """Of the grid a tensor is rounded to; see `reroll.grad.evaluate.in_place.snap_to_grid`."""
    return math.frexp(largest + 2 * epsilon)[1]


def test_the_grid_is_that_of_the_epsilon_asked_for(tmp_path):
    """Where max |p| + 2 ε is close above a power of two, ε as it was used could be of a finer grid."""
    unit, near = 2.0**-23, [0.96 + i * 2.0**-24 for i in range(-3, 4)]
    epsilon, used, largest = next(
        (epsilon, round(epsilon / unit) * unit, p)
        for epsilon in (0.02 + i * 1e-9 for i in range(200))
        for p in torch.tensor(near).tolist()
        if exponent(p, epsilon) == 1 and exponent(p, round(epsilon / unit) * unit) == 0
    )
    gradient = {"evaluate": "in_place", "restore": "grid", "epsilon": epsilon}
    config = small(gradient=gradient, optim={"lr": 1e-7, "momentum": 0.0})
    init = {name: tensor.clamp(-0.5, 0.5) for name, tensor in checkpoint.weights_of(initial_of(config)).items()}
    init["head.weight"].view(-1)[0] = largest
    expected = recorded(tmp_path / "run", config, init=init)
    assert next(iter(read_metrics(tmp_path / "run")))["epsilon"] == used
    assert replayed(tmp_path / "run") == expected


# ---- an independent reference


def initial_weights(path):
    config, header = read_config(path), journal.read(path / "journal").header
    return load.build_model(config.model, Interface(**header["sizes"]), config.run.seed)


@pytest.mark.parametrize("momentum, decay", [(0.0, 0.0), (0.0, 0.3), (0.9, 0.3)])
@pytest.mark.parametrize("kind", ["rademacher", "normal", "sparse:0.25"])
def test_the_fold_is_the_sum_over_probes(tmp_path, momentum, decay, kind):
    """θ ← (1 − η λ) θ − η v, v ← μ v + Σ_k c_k z_k, written out with the public noise, in fp64; λ for matrices only."""
    noise, _, density = kind.partition(":")
    gradient = {"noise": noise, "density": float(density) if density else None}
    config = small(
        gradient=gradient, optim={"momentum": momentum, "weight_decay": decay, "schedule": "linear", "lr": 0.05}
    )
    recorded(tmp_path, config)
    weights = {name: p.detach().double() for name, p in trainable(initial_weights(tmp_path)).items()}
    velocity = {name: torch.zeros_like(p) for name, p in weights.items()}
    for step, record in enumerate(journal.read(tmp_path / "journal").iterate()):
        key = reroll.Key(config.run.seed).at(step)
        ((used, _, coefficients),), lr = record.terms, record.settings.lr
        assert used == key
        for name, p in weights.items():
            z = [reroll.noise(key, p.shape, k, name, kind=kind).double() for k in range(config.gradient.probes)]
            slope = sum(c * each for c, each in zip(coefficients.double(), z, strict=True))
            velocity[name] = momentum * velocity[name] + slope
            p *= 1 - lr * decay * (p.dim() >= 2)
            p -= lr * velocity[name]
        made = trainable(replay(tmp_path, step + 1)[0])
        for name, p in weights.items():
            torch.testing.assert_close(made[name].detach().double(), p, rtol=1e-5, atol=2e-6)


def test_the_coefficients_are_the_differences_of_losses(tmp_path):
    """c_k = (L(θ + ε z_k) − L(θ − ε z_k)) / (2 ε N), from the task, the weights of the step, and the public noise."""
    config = small(gradient={"probes": 3, "epsilon": 0.05})
    recorded(tmp_path, config)
    task = config.task.build(config.run.seed)
    for record in journal.read(tmp_path / "journal").iterate(to=3):
        ((key, _, coefficients),) = record.terms
        model = replay(tmp_path, record.step)[0].double()
        weights = {name: p.detach().clone() for name, p in trainable(model).items()}
        for k, coefficient in enumerate(coefficients.tolist()):
            losses = []
            for sign in (1, -1):
                with torch.no_grad():
                    for name, p in trainable(model).items():
                        p.copy_(weights[name] + sign * 0.05 * reroll.noise(key, p.shape, k, name).double())
                    losses.append(task.loss(model, task.batch(record.step)).mean().item())
            assert coefficient == pytest.approx((losses[0] - losses[1]) / (2 * 0.05 * 3), rel=1e-4, abs=1e-5)


# ---- on the command line, and what goes wrong


def test_the_checksum_is_alone_on_the_last_line(tmp_path, capsys):
    path, out = tmp_path / "run", tmp_path / "out" / "model.safetensors"
    expected = recorded(path, small())
    assert main(["replay", str(path), "--to", "3", "--checksum", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == expected[3]
    assert checkpoint.checksum(checkpoint.weights_of(reroll.load(out))) == expected[3]
    assert main(["replay", str(path), "--checksum"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == expected[STEPS]


def test_steps_the_journal_has_not_are_refused(tmp_path, capsys):
    recorded(tmp_path, small())
    for to in (-1, STEPS + 1):
        with pytest.raises(UsageError, match=f"to={to}: the journal of .* has {STEPS} steps"):
            replay(tmp_path, to)
    assert main(["replay", str(tmp_path), "--to", str(STEPS + 1)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_backprop_names_its_checkpoints(tmp_path, capsys):
    train(small(gradient="backprop"), tmp_path)
    with pytest.raises(UsageError, match="trained by backprop.*its checkpoints: step-00000008, step-00000009"):
        replay(tmp_path)
    assert main(["replay", str(tmp_path)]) == 2


def test_an_edited_config_changes_no_replay(tmp_path):
    """What it needs is in the journal."""
    expected, config = recorded(tmp_path, small()), tmp_path / "config.toml"
    text = config.read_text()
    for old, new in (("momentum = 0.9", "momentum = 0.5"), ("seed = 7", "seed = 8"), ("lr = 0.1", "lr = 0.3")):
        assert old in text
        config.write_text(text.replace(old, new))
        assert replayed(tmp_path) == expected


def test_other_initial_weights_are_refused(tmp_path, monkeypatch):
    """A seed that gives other weights than it did, as another torch may; and changed weights of --init."""
    init = checkpoint.weights_of(initial_of(small()))
    recorded(tmp_path / "drawn", small())
    recorded(tmp_path / "given", small(), init=init)
    init["head.bias"] += 1e-6
    checkpoint.save_file(init, tmp_path / "given" / "init.safetensors")
    made = load.build_model
    monkeypatch.setattr(replaying, "build_model", lambda config, sizes, seed: made(config, sizes, seed + 1))
    for name in ("drawn", "given"):
        with pytest.raises(RunError, match="the initial weights .* are not the run's"):
            replay(tmp_path / name)


def test_a_damaged_journal_is_refused(tmp_path, capsys):
    expected = recorded(tmp_path, small())
    file = tmp_path / "journal"
    whole, offsets = file.read_bytes(), journal.read(file).offsets
    for at in (offsets[3] + 1, offsets[3] + 40):  # a length, a content
        data = bytearray(whole)
        data[at] ^= 1
        file.write_bytes(data)
        with pytest.raises(RunError, match=r"damaged at step 3: .*--to 3"):
            replay(tmp_path)
        assert main(["replay", str(tmp_path), "--checksum"]) == 1
        assert main(["replay", str(tmp_path), "--checksum", "--to", "3"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == expected[3]
    file.unlink()
    with pytest.raises(RunError, match="cannot be read"):
        replay(tmp_path)
