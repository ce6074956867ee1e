"""`reroll forecast RUN --steps N`: predict the next rows of a series, in the units of its file, as CSV."""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reroll.cli.flags import as_flags, parse, positional
from reroll.cli.models import MODEL, far_from_training, task_of
from reroll.errors import RunError, UsageError, require_count
from reroll.specs.base import option


@dataclass(frozen=True)
class Forecast:
    """Predict the next rows of a series, one after another."""

    model: str = positional(MODEL)
    steps: int = option(10, "rows to predict for every series")
    path: str | None = option(None, "other series to continue (default: the run's own)")
    context: int | None = option(None, "rows to read first (default: the length of a training window)")
    to: Path | None = option(None, "CSV file to write (default: standard output)")


def run(command: str, arguments: Sequence[str]) -> int:
    with as_flags(request := parse(Forecast, arguments, "reroll forecast")):
        return _forecast(request)


def _forecast(request: Forecast) -> int:
    import torch

    from reroll.models.generate import forecast
    from reroll.train.load import open_model

    require_count(steps=request.steps, context=request.context)
    loaded = open_model(request.model)
    task = task_of(loaded, request)
    if getattr(task, "predicts", "") != "next":
        series = "For that, train on series without targets: reroll train arrays --path FILE.csv"
        instead = series if loaded.model.vocab is None else f"To continue a text: reroll sample {request.model}"
        raise UsageError(
            f"{request.model} does not predict the next row of a series, so it cannot continue one. {instead}"
        )
    if request.path is not None and (far := far_from_training(task)):
        print(far, file=sys.stderr)
    rows: list[list[Any]] = []
    # Digits down to a millionth of a column's standard deviation, whatever its mean.
    places = [min(max(6 - math.floor(math.log10(std)), 0), 17) for std in task.std[: task.inputs]]
    histories = task.history(request.context or loaded.config.task.length)
    for number, history in enumerate(histories):
        new = forecast(loaded.model, torch.from_numpy(history)[None], request.steps)[0].double()
        if not new.isfinite().all():
            raise RunError(f"The forecast of {request.model} is not finite: the model has diverged.")
        values = new.numpy() * task.std[: task.inputs] + task.mean[: task.inputs]
        series = [number] if len(histories) > 1 else []
        rows += [[*series, step + 1, *(f"{v:.{n}f}" for v, n in zip(row, places))] for step, row in enumerate(values)]
    names = list(task.features) or [f"value{i}" for i in range(task.inputs)]
    header = [*(["series"] if len(histories) > 1 else []), "step", *names]
    if request.to is None:
        csv.writer(sys.stdout, lineterminator="\n").writerows([header, *rows])
        return 0
    try:
        with request.to.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows([header, *rows])
    except OSError as error:
        raise RunError(f"{request.to} cannot be written: {error.strerror}.") from None
    print(f"written: {request.to}, {len(rows)} rows of {', '.join(header)}")
    return 0
