"""`eval`, `sample`, `export` and `replay`: using a trained model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reroll.cli.flags import as_flags, parse, positional
from reroll.cli.lines import wrapped
from reroll.cli.scores import EXACT, in_words, loss_unit, outputs_of, without_training
from reroll.errors import RunError, UsageError, plural, visible
from reroll.specs.base import option

if TYPE_CHECKING:
    from reroll.train.load import Loaded


MODEL = "a run folder, the name of a run under runs/, or a file written by `reroll export`"


@dataclass(frozen=True)
class Eval:
    """Score a model on held-out data."""

    model: str = positional(MODEL)
    path: str | None = option(
        None, "other data to score, all of it; if its files are split into train and valid, the latter"
    )
    split: str | None = option(None, "valid, test or longer (default: the first that the task has)")


@dataclass(frozen=True)
class Sample:
    """Generate text from a prompt."""

    model: str = positional(MODEL)
    prompt: str = option("", "text to continue (default: a newline, or the first symbol)")
    length: int = option(200, "symbols to generate")
    temperature: float = option(0.8, "0: always the most likely symbol; 1: the model's own probabilities")
    top_k: int | None = option(None, "sample from this many of the most likely symbols only")
    seed: int = option(0, "seed of the sampling")


@dataclass(frozen=True)
class Export:
    """Write a model as safetensors, with its config next to it."""

    model: str = positional(MODEL)
    to: Path = option(Path("model.safetensors"), "the file to write; its config goes next to it")


@dataclass(frozen=True)
class Replay:
    """Rebuild the weights of a step from seed and journal, without the data."""

    run: str = positional("a run folder trained by probes, or the name of one under runs/")
    to: int | None = option(None, "steps to replay (default: all)")
    checksum: bool = option(False, "print the weights' checksum, alone on the last line")
    out: Path | None = option(None, "write the weights to this file, as `reroll export` does")


def run(command: str, arguments: Sequence[str]) -> int:
    commands: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
        "eval": (Eval, _eval), "sample": (Sample, _sample), "export": (Export, _export), "replay": (Replay, _replay)
    }  # fmt: skip
    kind, function = commands[command]
    with as_flags(request := parse(kind, arguments, f"reroll {command}")):
        return function(request)


def _eval(request: Eval) -> int:
    from reroll.outcome import Outcome
    from reroll.rollout.monitor import monitoring
    from reroll.train.evaluate import evaluate
    from reroll.train.load import open_model

    loaded = open_model(request.model)
    task = task_of(loaded, request)
    split = request.split or task.splits[0]
    if split not in task.splits:
        raise UsageError(f'split="{split}" does not exist; this task has {", ".join(task.splits)}.')
    with monitoring() as rollouts:
        sums: list[Any] = []
        scores = evaluate(loaded.model, task, split, progress=_progress, sums=sums.append)
    part = split if "train" in getattr(task, "tokens", {}) else "all of it"  # files named after splits stay split
    what = split if request.path is None else f"{request.path} ({part})"
    lines = [f"{what}, after {plural(loaded.step, 'step')}: {in_words(scores, loss_unit(task), digits=6)}"]
    lines.append(f"mean over {int(sums[0].scored):,} {outputs_of(task)}" + (f"; {EXACT}" if "exact" in scores else ""))
    lines += _notes(loaded, task, split, request)
    if rollouts.fell_back:
        lines.append(f"{rollouts.fell_back} evaluations of a sequence: {Outcome.fell_back.value}")
    print(wrapped("\n".join(lines)))
    if not math.isfinite(scores["loss"]):
        raise RunError(
            "The loss is not finite: the model has diverged, or the data are far from what it was trained on."
        )
    return 0


def _progress(done: int, batches: int) -> None:
    """Show progress on a terminal, in one line that is overwritten and erased at the end."""
    if sys.stderr.isatty():
        line = f"\r{done}/{batches} batches" if done < batches else "\r\033[K"
        print(line, end="", file=sys.stderr, flush=True)


def task_of(loaded: Any, request: Any) -> Any:
    """Return what to score: the run's own task, or all of another file of the same kind."""
    from dataclasses import replace

    from reroll.models import Interface
    from reroll.specs.task import FileTask
    from reroll.train.load import require_symbols

    spec = loaded.config.task
    if isinstance(spec, FileTask):
        spec = replace(spec, eval_batches=0)
    if request.path is None:
        task = spec.build(loaded.config.run.seed, loaded.tokenizer, units=loaded.units)
        require_symbols(task, loaded.tokenizer)
        return task
    if not isinstance(spec, FileTask):
        raise UsageError(f"--path {request.path}: {request.model} was trained on generated sequences; drop --path.")
    spec = replace(spec, path=request.path)
    task = spec.build(loaded.config.run.seed, loaded.tokenizer, units=loaded.units, whole=True)
    data, model = Interface.of(task), Interface.of(loaded.model)
    if data.inputs != model.inputs:
        raise UsageError(
            f"--path {request.path} has {data.inputs} columns of numbers, but {request.model} reads {model.inputs}; "
            f"use a file with {model.inputs}."
        )
    fewer = task.categorical and data.outputs <= model.outputs  # the file need not contain every class
    if data.readout != model.readout or not (fewer or data.outputs == model.outputs):
        places = ["per step" if sizes.readout == "every" else "per series" for sizes in (data, model)]
        raise UsageError(
            f"--path {request.path} needs {data.outputs} outputs {places[0]}, but {request.model} has {model.outputs} "
            f"{places[1]}; use a file with the same targets as in training."
        )
    return task


def _notes(loaded: Any, task: Any, split: str, request: Eval) -> list[str]:
    """Return notes on how much was scored, the baselines, and what the model cannot know of the data."""
    notes, validated = [], getattr(loaded.config.task, "eval_batches", 0)
    if rules := without_training(task, split):
        notes.append(rules)
    if request.path is None and 0 < validated < task.batches(split):
        notes.append(f"This scores all {task.batches(split)} batches; during training, only the first {validated}.")
    if loaded.tokenizer is not None and loaded.tokenizer.has_unknown:
        import numpy as np

        tokens = np.asarray(task.tokens[split])
        count = int((tokens == 0).sum())
        if count:
            share = f"{count:,} of {len(tokens):,} symbols ({100 * count / len(tokens):.2f} %)"
            notes.append(f"{share} were not in the vocabulary of the training data; they all count as one symbol.")
    if request.path is not None and (far := far_from_training(task)):
        notes.append(far)
    if request.path is not None and task.inputs is not None and loaded.units is None:
        notes.append("The run does not record its mean and scale: the file was standardised by its own.")
    return notes


def far_from_training(task: Any) -> str:
    """Return a warning if most of the last 50 values of a column are unlike those trained on; empty if none are.

    At most 1 % of any data are 10 standard deviations from their mean (Chebyshev).
    """
    if task.inputs is None or not hasattr(task, "history"):
        return ""
    import numpy as np

    shares = (abs(np.concatenate(task.history(50))) > 10).mean(0)
    names = list(task.features) or [f"value{i}" for i in range(task.inputs)]
    which = [
        f"{name} ({mean:.4g} ± {std:.2g})"
        for name, mean, std, share in zip(names, task.mean, task.std, shares)
        if share > 0.5
    ]
    if not which:
        return ""
    return (
        f"Most values of {', '.join(which[:3])}{', …' * (len(which) > 3)} lie over 10 standard deviations from "
        "the mean in training: the model has seen none like them. Are columns and units the same?"
    )


def _sample(request: Sample) -> int:
    from reroll.models.generate import generate
    from reroll.rollout.monitor import monitoring
    from reroll.train.load import open_model

    loaded = open_model(request.model)
    encode, decode, start = _symbols(loaded, request.model)
    _refuse_unknown(loaded, request.prompt)
    prompt = encode(request.prompt) if request.prompt else start
    with monitoring():  # keeps warnings about fallbacks out of the generated text
        new = generate(loaded.model, prompt, request.length, request.temperature, request.top_k, request.seed)
    print(visible(request.prompt + decode(new.tolist())))
    return 0


def _refuse_unknown(loaded: Loaded, prompt: str) -> None:
    if loaded.tokenizer is None:
        return
    unknown = loaded.tokenizer.unknown(prompt)
    if unknown and loaded.tokenizer.name == "char":
        raise UsageError(
            f"--prompt: {', '.join(map(repr, unknown))} {'is' if len(unknown) == 1 else 'are'} not among the "
            f"{loaded.tokenizer.size - 1} characters the model was trained on; leave them out."
        )
    if unknown:
        print(f"--prompt: unknown to the model, and read as <unk>: {', '.join(unknown)}", file=sys.stderr)


def _symbols(loaded: Any, model: str) -> tuple[Any, Any, list[int]]:
    """Return encode, decode and the default prompt, for a model of text or of a generated task."""
    from reroll.train.load import require_symbols

    if loaded.tokenizer is not None:
        start = loaded.tokenizer.encode("\n").tolist() or [0]
        return lambda text: loaded.tokenizer.encode(text).tolist(), loaded.tokenizer.decode, start
    if loaded.model.vocab is None:
        raise UsageError(
            f"sample needs a model of symbols; {model} reads real-valued series. To predict their next rows: "
            f"reroll forecast {model}"
        )
    task = loaded.config.task.build(loaded.config.run.seed)
    require_symbols(task, None)
    return task.encode, task.decode, [0]


def _export(request: Export) -> int:
    from reroll.train.load import export, open_model

    written = export(open_model(request.model), request.to)
    print(visible(f"written: {', '.join(map(str, written))}"))
    return 0


def _replay(request: Replay) -> int:
    from reroll.train import checkpoint
    from reroll.train.load import Loaded, export, read_about, refuse_unwritable
    from reroll.train.records import find_run, read_config, read_json
    from reroll.train.replay import replay

    path = find_run(request.run)
    if request.out is not None:
        refuse_unwritable(request.out)
    model, steps = replay(path, request.to)
    print(visible(f"replayed {plural(steps, 'step')} of {path}"))
    if request.out is not None:
        _, tokenizer, units = read_about(read_json(path / "environment.json"), str(path / "environment.json"))
        loaded = Loaded(model, read_config(path), tokenizer, steps, units)
        print(visible(f"written: {', '.join(map(str, export(loaded, request.out)))}"))
    if request.checksum:
        print(checkpoint.checksum(checkpoint.weights_of(model)))
    return 0
