"""Several processes train one run: the same losses as one, one record, one message where something is wrong."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reroll.cli.launch import launch
from reroll.data.tokens import write_shard
from reroll.train.config import resolve
from reroll.train.mesh import Mesh
from reroll.train.records import read_metrics
from reroll.train.session import Session
from tests.runs import small, write_text

WORKER = """
import json, sys
from pathlib import Path
import torch
from reroll import GPT, Backprop, Muon, Session
from reroll.data.tokens import TokenBatches
from reroll.optim import MultiOptimizer
from reroll.train import train
from reroll.train.mesh import Processes

shards, out, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
mesh = Processes.join("cpu")
for dtype, accumulate in cases:
    torch.manual_seed(mesh.rank)  # those of process 0 count
    model = GPT(vocab=37, layers=2, heads=2, width=16, zero_init=False).to(getattr(torch, dtype))
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks") and p.dim() > 1]
    others = [p for p in model.parameters() if not any(p is q for q in matrices)]
    muon = Muon(matrices, lr=0.02, dtype=model.head.weight.dtype)
    optimizer = MultiOptimizer({"muon": muon, "adamw": torch.optim.AdamW(others, lr=0.01, weight_decay=0.0)})
    task = TokenBatches(shards, length=8, batch=8, vocab=37, valid_tokens=100)
    session = Session.of(task, model, Backprop(accumulate=accumulate), optimizer, steps=20, eval_every=10, mesh=mesh)
    train(session, out / f"{dtype}-{accumulate}")
mesh.leave()
"""


@pytest.fixture
def shards(tmp_path):
    generator = np.random.default_rng(5)
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, count in (("x_train_000001", 1500), ("x_val_000000", 150)):
        write_shard(folder / f"{name}.bin", generator.integers(0, 3, count).cumsum() % 37)
    return folder


def losses(folder: Path) -> np.ndarray:
    rows = list(read_metrics(folder))
    assert [row["step"] for row in rows] == list(range(len(rows)))
    return np.array([(row["loss"], row.get("valid_loss", 0.0)) for row in rows])


def test_losses_do_not_depend_on_processes_or_accumulation(tmp_path, shards):
    """4 × 2 rows, 3 of 2 or 3, 2 × 4, 1 × 8, in 1, 2 or 4 parts; attention, Muon, AdamW, validation."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    cases = {1: [1, 2, 4], 2: [1, 4], 3: [1], 4: [1]}
    results = {}
    for processes, parts in cases.items():
        of = [[dtype, accumulate] for dtype in ("float64", "float32") for accumulate in parts]
        out = tmp_path / str(processes)
        command = [sys.executable, str(script), str(shards), str(out), json.dumps(of)]
        assert launch(command, processes) == 0
        results |= {(dtype, processes, a): losses(out / f"{dtype}-{a}") for dtype, a in of}
    for (dtype, *_), got in results.items():
        one = results[dtype, 1, 1]
        assert one[-1, 0] < one[0, 0] - 0.5
        assert one[-1, 1] > 0
        if dtype == "float64":
            assert np.abs(got - one).max() <= 1e-9
        else:
            assert np.abs(got - one)[:5].max() <= 1e-5
            assert np.abs(got - one).max() <= 1e-3


def reroll(*arguments: str, processes: int = 1) -> int:
    return launch([sys.executable, "-m", "reroll", *arguments], processes)


def checkpoint_of(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").iterdir())
    return load_file(newest / "model.safetensors")


def test_probes_give_the_same_bits_for_any_number_of_processes(tmp_path):
    """Only losses travel, and the states of a carried text; 7 probes in units of 2 are shared unevenly."""
    text = write_text(tmp_path / "text.txt")
    flags = ("--path", str(text), "--length", "5", "--batch", "4", "--hidden", "8", "--probes", "7", "--steps", "4")
    flags += ("--threads", "1", "--set", "task.carry=true", "gradient.chunk=2", "gradient.batch=split")
    for processes in (1, 3):
        assert reroll("train", "text", *flags, "--run-dir", str(tmp_path / str(processes)), processes=processes) == 0
    one, three = (tmp_path / str(processes) for processes in (1, 3))
    assert (losses(one) == losses(three)).all()
    weights = checkpoint_of(three)
    assert all(weights[name].equal(tensor) for name, tensor in checkpoint_of(one).items())
    assert (one / "journal").read_bytes()[-200:] == (three / "journal").read_bytes()[-200:]


@pytest.mark.parametrize("size", [2, 3, 7, 20])
def test_there_is_a_unit_for_every_process(size):
    """Probes that one process evaluates at once are cut; a chunk that was asked for stays."""

    def planned(chunk, mesh):
        session = Session.of_config(resolve(small(gradient={"probes": 7, "chunk": chunk})), mesh)
        session.plan()
        return session.config.gradient.chunk

    assert planned(None, Mesh(size=size)) == min(planned(None, Mesh()), -(-7 // size))
    assert planned(2, Mesh(size=size)) == 2


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """Backpropagation through a carried text: the state of all rows is in the checkpoint."""
    text = write_text(tmp_path / "text.txt")
    flags = ("--gradient", "backprop", "--path", str(text), "--length", "5", "--batch", "5", "--hidden", "8")
    flags += ("--threads", "1", "--optimizer", "muon", "--set", "task.carry=true")
    folders = [("--run-dir", str(tmp_path / name)) for name in "ab"]
    assert reroll("train", "text", *flags, *folders[0], "--steps", "8", processes=2) == 0
    assert reroll("train", "text", *flags, *folders[1], "--steps", "4", processes=3) == 0
    assert reroll("train", "--resume", *folders[1], "--steps", "8") == 0
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert len(a) == 8
    assert np.abs(a[:, 0] - b[:, 0]).max() <= 1e-5


def test_what_one_process_refuses_is_said_once(tmp_path, capfd):
    folder = ("--run-dir", str(tmp_path / "run"))
    assert reroll("train", "copy", "--nproc", "0") == 2
    assert "--nproc 0 must be 1 or more" in capfd.readouterr().err
    flags = ("--gradient", "backprop", "--batch", "1", "--steps", "3", "--nproc", "2")
    assert reroll("train", "copy", *flags, *folder) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "a batch of 1 sequence cannot be shared by 2 processes; lower --nproc." in error
    assert not (tmp_path / "run").exists()


def test_one_that_dies_ends_the_others(tmp_path, capfd):
    began = time.monotonic()
    script = (
        "import os, signal, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    )
    assert launch([sys.executable, "-c", script], 3) == 1
    assert capfd.readouterr().err == "error: process 1 was ended by SIGKILL.\n"
    assert time.monotonic() - began < 30


BUFFERS = """
import sys
import torch
from reroll import Backprop, Key
from reroll.train.mesh import Processes


class Own(torch.nn.Module):
    def forward(self, x):
        self.register_buffer("last", x)  # of each process's rows
        return x


mesh = Processes.join("cpu")
torch.manual_seed(0)
model, x = torch.nn.Sequential(Own(), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)), torch.randn(7, 3)
estimator, collectives, reduce = mesh.estimator(Backprop()), [], torch.distributed.all_reduce
torch.distributed.all_reduce = lambda tensor, **options: [collectives.append(tensor.shape), reduce(tensor, **options)]
estimator(model, lambda model, x: model(x).square().mean(), x, Key(0))
accumulated = mesh.estimator(Backprop(accumulate=3))
accumulated(torch.nn.Linear(3, 1), lambda model, x: model(x).mean(), x, Key(0))
torch.save([list(model[1].buffers()), len(collectives)], f"{sys.argv[1]}/{mesh.rank}")
mesh.leave()
"""


def test_running_statistics_are_averaged(tmp_path):
    """By rows, 3 and 4, as the gradient is, which travels once a step; a state of rows in a buffer is not."""
    (tmp_path / "worker.py").write_text(BUFFERS)
    assert launch([sys.executable, str(tmp_path / "worker.py"), str(tmp_path)], 2) == 0
    torch.manual_seed(0)
    torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 1)
    parts = torch.randn(7, 3).split([3, 4])
    means, variances = ([f(part) for part in parts] for f in (lambda x: x.mean(0), lambda x: x.var(0)))
    expected = [
        0.1 * (3 * means[0] + 4 * means[1]) / 7,
        0.9 + 0.1 * (3 * variances[0] + 4 * variances[1]) / 7,
    ]
    for rank in "01":
        (mean, variance, count), collectives = torch.load(tmp_path / rank)
        for got, value in zip((mean, variance), expected):
            torch.testing.assert_close(got, value)
        assert count == 1
        assert collectives == 2 + 2 + 2  # buffers; facts and gradient of two models


CDRGE = """
import json, sys
import torch, torch.distributed as dist
import reroll

dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()


def run(case):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    x, y = torch.randn(12, 3), torch.randn(12, 1)
    options = {"seed": rank if case in ("seed", "alone") else 7}
    if case in ("plain", "ddp"):
        model, x, y = model.double(), x.double(), y.double()
    elif case in ("tiles", "batched", "bf16"):
        options |= {"model": model, "evaluate": "auto" if case == "bf16" else case}
        options |= {"dtype": torch.bfloat16} if case == "bf16" else {}
    elif case == "alone":
        options["process_group"] = None
    if case in ("weights", "alone") and rank:
        torch.nn.init.zeros_(model[0].weight)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if case == "ddp" else model
    optimizer = reroll.CDRGE(model.named_parameters(), lr=0.02, probes=6, momentum=0.9, **options)
    part = slice(12 * rank // size, 12 * (rank + 1) // size)
    try:
        losses = [optimizer.step(lambda: (wrapped(x[part]) - y[part]).square().mean()).item() for _ in range(4)]
    except reroll.errors.UsageError as error:
        return {"error": str(error)}
    return {"losses": losses, "weights": torch.cat([p.flatten() for p in model.parameters()]).tolist()}


results = {case: run(case) for case in sys.argv[2].split()}
with open(f"{sys.argv[1]}/{size}-{rank}", "w") as file:
    json.dump(results, file)
dist.barrier()
dist.destroy_process_group()
"""


def test_cdrge_gathers_its_losses_in_processes(tmp_path):
    """Each with its part of the data: the weights of one process with all of it, and equal bits in all."""
    (tmp_path / "worker.py").write_text(CDRGE)
    command = [sys.executable, str(tmp_path / "worker.py"), str(tmp_path)]
    ways = {"plain": 1e-9, "ddp": 1e-9, "tiles": 1e-5, "batched": 1e-5, "bf16": 1e-2}
    for size, cases in ((1, ways), (2, (*ways, "weights", "seed", "alone")), (3, ("plain",))):
        assert launch([*command, " ".join(cases)], size) == 0
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("?-?")}
    for way, bound in ways.items():
        assert results["2-0"][way] == results["2-1"][way]
        for name, got in results["2-0"][way].items():
            assert np.allclose(got, results["1-0"][way][name], rtol=0, atol=bound)
    assert results["3-0"] == results["3-1"] == results["3-2"]
    assert np.allclose(results["3-0"]["plain"]["weights"], results["1-0"]["plain"]["weights"], rtol=0, atol=1e-9)
    assert results["2-0"]["alone"]["weights"] != results["2-1"]["alone"]["weights"]
    for case, what in (("weights", "weights"), ("seed", "arguments of CDRGE")):
        for rank in ("2-0", "2-1"):
            assert f"process 1 begins with other {what} than process 0" in results[rank][case]["error"]
