"""EigenWorms by three rollouts (Gonzalez et al., arXiv:2407.19115, figure 3): the same training, step by step.

Stacked GRUs are trained by Adam to classify series of 17 984 steps: sequentially, by DEER and by quasi-DEER, from the
same weights on the same batches. The series are those that `reroll data prepare eigenworms` wrote to the cache folder,
else generated ones of the same shape, whose class is the frequency of a wave in noise.
"""

from __future__ import annotations

import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from reroll.bench.harness import columns
from reroll.cells import GRU
from reroll.data.cache import cache_folder
from reroll.errors import UsageError
from reroll.models import Recurrent
from reroll.rollout import Dense, Diagonal, Newton, Rollout, Sequential
from reroll.rollout.monitor import monitoring

STEPS, FEATURES, CLASSES = 17_984, 6, 5
"""Of EigenWorms; it has 259 series."""
SMALL = {"layers": 5, "hidden": 16, "stride": 64, "batch": 4, "rate": 3e-3}
PUBLISHED = {"layers": 5, "hidden": 32, "stride": 1, "batch": 4, "rate": 3e-5}
"""Layers, width, stride over the steps, series per batch, learning rate."""
EPOCHS = 9
METHODS: dict[str, Rollout] = {
    "sequential": Sequential(kernel="reference"),
    "DEER": Newton(Dense()),
    "quasi-DEER": Newton(Diagonal()),
}


def generated(count: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return series [count, steps, 6] and their classes [count]: of class c, waves of 2 + 2c periods in noise."""
    classes = torch.arange(count) % CLASSES
    periods = (2 + 2 * classes).view(-1, 1, 1)
    phase = 2 * math.pi * torch.rand(count, 1, FEATURES)
    angle = 2 * math.pi * periods * torch.arange(steps).view(1, -1, 1) / steps
    return torch.sin(angle + phase) + 0.3 * torch.randn(count, steps, FEATURES), classes


def series(stride: int) -> tuple[Tensor, Tensor, str]:
    """Return standardised series, their classes, and their source."""
    path = cache_folder() / "eigenworms.npz"
    if not path.exists():
        return *generated(40, STEPS // stride), "generated"
    with np.load(path) as arrays:
        if "lengths" in arrays and (arrays["lengths"] != arrays["inputs"].shape[1]).any():
            raise UsageError(f"{path} has series of several lengths; those of EigenWorms all have {STEPS:,} steps.")
        inputs, classes = torch.from_numpy(arrays["inputs"])[:, ::stride], torch.from_numpy(arrays["targets"])
    inputs = (inputs - inputs.mean((0, 1))) / inputs.std((0, 1)).clamp(min=1e-12)
    return inputs.float(), classes, str(path)


def train(rollout: Rollout, inputs: Tensor, classes: Tensor, settings: dict[str, Any], updates: int) -> dict[str, Any]:
    """Return losses, the final accuracy on all series, the maximum iterations, and seconds per update."""
    torch.manual_seed(0)
    sizes = [inputs.shape[2], *[settings["hidden"]] * settings["layers"]]
    cells = tuple(GRU(before, after) for before, after in pairwise(sizes))
    model = Recurrent(cell=cells, inputs=sizes[0], outputs=int(classes.max()) + 1, rollout=rollout, readout="mean").to(
        inputs.device
    )
    optimizer = torch.optim.Adam(model.parameters(), settings.get("rate", 3e-3))
    losses, start = [], time.perf_counter()
    with monitoring() as monitor:
        for update in range(updates):
            rows = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(update))[: settings["batch"]]
            loss = functional.cross_entropy(model(inputs[rows]), classes[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    seconds = (time.perf_counter() - start) / updates
    with torch.no_grad():
        correct = [model(part).argmax(-1) == labels for part, labels in zip(inputs.split(16), classes.split(16))]
    return {
        "losses": losses, "accuracy": float(torch.cat(correct).double().mean()), "iterations": monitor.iterations,
        "fell_back": monitor.fell_back, "seconds": seconds,
    }  # fmt: skip


def measure(full: bool, settings: dict[str, Any] | None = None, updates: int = 20) -> dict[str, Any]:
    """Return the training curves of every method; `full` is 5 layers of 32 on all steps for nine epochs."""
    settings = settings or (PUBLISHED if full else SMALL)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs, classes, source = series(settings["stride"])
        device = "cuda" if torch.cuda.is_available() else "cpu"
        inputs, classes = inputs.to(device), classes.to(device)
        if full:
            updates = EPOCHS * len(inputs) // settings["batch"]
        methods = {name: train(rollout, inputs, classes, settings, updates) for name, rollout in METHODS.items()}
    truth = methods["sequential"]["losses"]
    for method in methods.values():
        method["deviation"] = max(abs(a - b) for a, b in zip(method["losses"], truth))
    return {
        "loss_deviation": max(method["deviation"] for method in methods.values()), "source": source,
        "shape": list(inputs.shape), "settings": settings, "methods": methods,
    }  # fmt: skip


def holds(result: dict[str, Any]) -> bool:
    """Whether all three training curves agree, and the loss falls."""
    losses = result["methods"]["sequential"]["losses"]
    return result["loss_deviation"] <= 1e-3 and min(losses[-3:]) < losses[0]


def report(result: dict[str, Any]) -> str:
    """Return a table with a row for every method."""
    rows: list[list[Any]] = [["method", "first loss", "last loss", "deviation", "accuracy", "iterations", "s/update"]]
    for name, m in result["methods"].items():
        values = (m["losses"][0], m["losses"][-1], m["deviation"], m["accuracy"], m["iterations"], m["seconds"])
        rows.append([name, *values])
    settings = ", ".join(f"{key} {value:g}" for key, value in result["settings"].items())
    return f"{result['source']} series {result['shape']}; {settings}\n{columns(rows)}"


def draw(result: dict[str, Any], figure: Any) -> None:
    """Plot the loss by update."""
    axes = figure.add_subplot(xlabel="update", ylabel="loss", title="EigenWorms" if result["source"] != "generated" else
                              "generated series")  # fmt: skip
    for (name, method), style in zip(result["methods"].items(), ("-", "--", ":")):
        axes.plot(range(1, len(method["losses"]) + 1), method["losses"], style, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
